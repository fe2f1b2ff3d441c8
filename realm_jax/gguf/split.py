"""Split GGUF files: a model in parts named NAME-00001-of-0000N.gguf, each with its own header.

Source of the convention: llama.cpp's gguf-split tool; every part carries split.no, split.count and split.tensors.count.
"""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from realm_jax.errors import GGUFError
from realm_jax.gguf.header import quote

NUMBER_KEY = "split.no"
COUNT_KEY = "split.count"
TENSORS_KEY = "split.tensors.count"
MAX_PARTS = 65535  # the keys are 16 bits wide

_PART_NAME = re.compile(r"(?P<prefix>.*)-(?P<number>[0-9]{5})-of-(?P<count>[0-9]{5})\.gguf", re.DOTALL)


@dataclass(frozen=True, slots=True)
class Split:
    """What one part says of the whole. number counts from 0; tensors is None where the part does not say."""

    number: int
    count: int
    tensors: int | None


def read_split(metadata: Mapping[str, Any], label: str) -> Split | None:
    """The split keys of one part, or None for a file that is whole. Raises GGUFError where they are inconsistent."""
    count = _integer(metadata, COUNT_KEY, MAX_PARTS, label)
    number = _integer(metadata, NUMBER_KEY, MAX_PARTS, label)
    tensors = _integer(metadata, TENSORS_KEY, (1 << 63) - 1, label)
    if count is None or count <= 1:  # a merged file says 0
        if number:
            stated = "absent" if count is None else count
            raise GGUFError(f"{label}: metadata key '{NUMBER_KEY}' is {number}, but '{COUNT_KEY}' is {stated}")
        return None
    if number is None or number >= count:
        raise GGUFError(f"{label}: metadata key '{NUMBER_KEY}' is {number}; 0 to {count - 1} are accepted")
    return Split(number, count, tensors)


def part_name_of(path: Path) -> tuple[int, int] | None:
    """(number from 0, count) as the file's name tells, or None for a name of another form."""
    match = _PART_NAME.fullmatch(path.name)
    return (int(match["number"]) - 1, int(match["count"])) if match else None


def part_paths(path: Path, split: Split, label: str) -> Iterator[Path]:
    """Where the parts lie, given one of them, in order. Raises GGUFError where its name contradicts its split keys."""
    match = _PART_NAME.fullmatch(path.name)
    wanted = f"-{split.number + 1:05d}-of-{split.count:05d}.gguf"
    if match is None or not path.name.endswith(wanted):
        raise GGUFError(
            f"{label}: the file says it is part {split.number + 1} of {split.count}, so its name has to end in "
            f"{quote(wanted)}: the other parts are found by their names"
        )
    prefix = match["prefix"]
    return (path.with_name(f"{prefix}-{n + 1:05d}-of-{split.count:05d}.gguf") for n in range(split.count))


def _integer(metadata: Mapping[str, Any], key: str, largest: int, label: str) -> int | None:
    value = metadata.get(key)
    if value is None:
        return None
    if type(value) is not int or not 0 <= value <= largest:
        shown = quote(value) if isinstance(value, str) else value if isinstance(value, int | float) else "an array"
        raise GGUFError(f"{label}: metadata key '{key}' is {shown}; an integer from 0 to {largest} is accepted")
    return value
