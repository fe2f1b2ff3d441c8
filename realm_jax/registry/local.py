"""Which GGUF files belong together, and which one of a folder or listing is meant."""

import re
from pathlib import Path, PurePosixPath

from realm_jax.errors import ModelNotFoundError

CHECKPOINT_FILE = "realm.json"  # in a folder that is a checkpoint

_SPLIT = re.compile(r"^(?P<stem>.*)-(?P<part>\d{5})-of-(?P<count>\d{5})\.gguf$", re.IGNORECASE)
# Projectors of vision models and importance matrices are GGUF files, but no language models.
_NO_MODEL = re.compile(r"(^|[-_.])(mmproj|imatrix)([-_.]|$)", re.IGNORECASE)


def group_parts(names: list[str]) -> dict[str, list[str]]:
    """Language models among file names: the name without part number -> its parts in order.

    A file that is not split is a group of one. Groups of which a part is missing are kept: whoever opens them says so.
    """
    groups: dict[str, list[str]] = {}
    for name in sorted(names):
        base = PurePosixPath(name).name
        if not base.lower().endswith(".gguf") or _NO_MODEL.search(base[:-5]):
            continue
        split = _SPLIT.match(name)
        groups.setdefault(f"{split['stem']}-of-{split['count']}.gguf" if split else name, []).append(name)
    return groups


def in_folder(folder: Path) -> Path:
    """The one model of a folder: a GGUF file, or the first part of a split one, or the folder if it is a checkpoint.

    Raises:
        ModelNotFoundError: it holds none, or several.
    """
    if (folder / CHECKPOINT_FILE).is_file():
        return folder
    groups = group_parts([entry.name for entry in folder.iterdir() if entry.is_file()])
    if len(groups) == 1:
        return folder / next(iter(groups.values()))[0]
    if not groups:
        raise ModelNotFoundError(f"the folder {folder} holds no .gguf file, and is no checkpoint")
    names = ", ".join(parts[0] for parts in groups.values())
    raise ModelNotFoundError(f"the folder {folder} holds {len(groups)} models; name one of: {names}")
