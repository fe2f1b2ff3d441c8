"""The GGUF reader under random files: whatever the bytes, a file opens whole or gives one GGUFError, nothing else."""

import json
import os
import random
import struct
import time
from collections.abc import Iterator
from pathlib import Path

import gguf_writer as w
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from realm_jax.errors import GGUFError
from realm_jax.gguf import GGMLType, describe, open_gguf

CASES = 100_000  # of the slow run

# Values that sit on the edges of checks and of machine integers.
EDGES = [0, 1, 2, 3, 7, 8, 9, 12, 13, 31, 32, 33, 63, 64, 65, 255, 256, 2**15, 2**16 - 1, 2**16, 2**17 + 1, 2**22 + 1]
EDGES += [2**31 - 1, 2**31, 2**32 - 1, 2**32, 2**40, 2**61, 2**62, 2**63 - 1, 2**63, 2**64 - 64, 2**64 - 32, 2**64 - 1]


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("fuzz") / "m.gguf"


def outcome(path: Path, content: bytes) -> str:
    """Open, describe and read everything: "opened", or "refused" by a one-line GGUFError. Anything else fails."""
    path.write_bytes(content)
    try:
        with open_gguf(path) as file:
            json.dumps(describe(file), allow_nan=False)
            assert sum(len(file.data(name)) for name in file.tensors) <= len(content)
            return "opened"
    except GGUFError as error:
        message = str(error)
    assert message.isprintable()
    assert len(message) < len(str(path)) + 500
    return "refused"


def mutate(content: bytes, rng: random.Random) -> bytes:
    """One to four changes: bits, bytes, edge values over integers, cuts, doubled and inserted runs."""
    raw = bytearray(content)
    for _ in range(rng.choice([1, 1, 1, 2, 4])):
        at = rng.randrange(len(raw) or 1)
        kind = rng.randrange(8)
        if kind == 0 and raw:
            raw[at] ^= 1 << rng.randrange(8)
        elif kind == 1 and raw:
            raw[at] = rng.randrange(256)
        elif kind in (2, 3):
            raw[at : at + 8] = struct.pack("<Q", rng.choice(EDGES))
        elif kind == 4:
            raw[at : at + 4] = struct.pack("<I", rng.choice(EDGES) % 2**32)
        elif kind == 5:
            del raw[at : at + rng.choice([1, 4, 8, 64, len(raw)])]
        elif kind == 6:
            raw[at:at] = raw[at : at + rng.choice([1, 8, 32, 200])]
        else:
            raw[at:at] = rng.randbytes(rng.choice([1, 4, 8]))
    return bytes(raw)


def seeds() -> list[bytes]:
    """Valid files to start from; a short one, so that most changes meet its header."""
    small = w.gguf([w.array("tokens", w.STRING, ["a", "bc"])], [w.tensor("t", (32, 2), 2, 0)], bytes(36))
    parts = list(w.split_files("m", 2).values())
    return [w.rich_file(2), w.rich_file(3), small, *parts]


@pytest.mark.slow
def test_many_mutations(path: Path) -> None:
    rng = random.Random(20261121)
    started = [*seeds()]
    counts = {"opened": 0, "refused": 0}
    slowest = 0.0
    for _ in range(CASES):
        begun = time.perf_counter()
        counts[outcome(path, mutate(rng.choice(started), rng))] += 1
        slowest = max(slowest, time.perf_counter() - begun)
    print(f"{CASES} mutated files: {counts}, the slowest took {slowest * 1000:.0f} ms")
    assert min(counts.values()) > CASES // 20  # both ways out were exercised
    assert slowest < 1


@settings(max_examples=400, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(seed=st.integers(0, 2**64), start=st.sampled_from(seeds()))
def test_mutated_files_open_or_are_refused(path: Path, seed: int, start: bytes) -> None:
    outcome(path, mutate(start, random.Random(seed)))


@settings(max_examples=200, deadline=None)
@given(tail=st.binary(max_size=400), counts=st.tuples(st.integers(0, 5), st.integers(0, 5)))
def test_random_bytes_after_a_valid_beginning(path: Path, tail: bytes, counts: tuple[int, int]) -> None:
    outcome(path, b"GGUF" + w.u32(3) + w.u64(counts[0]) + w.u64(counts[1]) + tail)


# Pieces of a file put together at random: most are wrong somewhere deep in the header.
numbers = st.sampled_from(EDGES) | st.integers(0, 2**64 - 1)
names = st.text(max_size=70) | st.binary(max_size=70)
pieces = st.one_of(
    st.builds(w.string, names, st.none() | numbers),
    st.builds(w.u64, numbers),
    st.builds(lambda n: w.u32(n % 2**32), numbers),
    st.builds(lambda name, kind, raw: w.key(name, kind, raw), names, st.integers(0, 13), st.binary(max_size=40)),
    st.builds(
        lambda name, kind, count, raw: w.string(name) + w.u32(w.ARRAY) + w.u32(kind) + w.u64(count) + raw,
        names,
        st.integers(0, 13),
        numbers,
        st.binary(max_size=80),
    ),
    st.builds(
        lambda name, dims, kind, offset: w.tensor(name, dims, kind, offset),
        names,
        st.lists(numbers, max_size=5),
        st.integers(0, 45),
        numbers,
    ),
)


@settings(max_examples=400, deadline=None)
@given(parts=st.lists(pieces, max_size=6), counts=st.tuples(st.integers(0, 3), st.integers(0, 6)), data=st.binary())
def test_random_structures(path: Path, parts: list[bytes], counts: tuple[int, int], data: bytes) -> None:
    outcome(path, w.gguf(parts, [data], tensor_count=counts[0], key_count=counts[1]))


# -- valid files of any content come back as they were written -------------------------------------------------------

text = st.text(st.characters(exclude_categories=["Cs"]), max_size=12)
integers = {
    kind: st.integers(-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) if signed else st.integers(0, 2**bits - 1)
    for kind, bits, signed in [
        (w.U8, 8, False),
        (w.I8, 8, True),
        (w.U16, 16, False),
        (w.I16, 16, True),
        (w.U32, 32, False),
        (w.I32, 32, True),
        (w.U64, 64, False),
        (w.I64, 64, True),
    ]
}
values = {
    **integers,
    w.F32: st.floats(width=32, allow_nan=False),
    w.F64: st.floats(allow_nan=False),
    w.BOOL: st.booleans(),
    w.STRING: text,
}
scalar = st.sampled_from(sorted(values)).flatmap(lambda kind: st.tuples(st.just(kind), values[kind]))
listed = st.sampled_from(sorted(values)).flatmap(
    lambda kind: st.tuples(st.just(kind), st.lists(values[kind], max_size=6))
)
key_name = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), min_size=1, max_size=20).filter(
    lambda name: not name.startswith(("split.", "general.alignment"))
)
tensor_name = key_name.filter(lambda name: len(name.encode()) < 64)
shape = st.tuples(st.sampled_from(list(GGMLType)), st.integers(1, 2), st.lists(st.integers(1, 3), max_size=3))


@settings(max_examples=300, deadline=None)
@given(
    metadata=st.dictionaries(key_name, scalar | listed, max_size=6),
    tensors=st.dictionaries(tensor_name, shape, max_size=5),
    alignment=st.sampled_from([1, 8, 32, 256]),
    gap=st.integers(0, 2),
    version=st.sampled_from([2, 3]),
)
def test_valid_files_come_back(path: Path, metadata, tensors, alignment: int, gap: int, version: int) -> None:
    keys = [w.key("general.alignment", w.U32, alignment)]
    for name, (kind, value) in metadata.items():
        keys.append((w.array if isinstance(value, list) else w.key)(name, kind, value))
    infos, data, contents = [], b"", {}
    for number, (name, (kind, blocks, outer)) in enumerate(tensors.items()):
        dims = [blocks * kind.block_size, *outer]
        nbytes = blocks * int(np.prod(outer, dtype=int)) * kind.type_size
        data += bytes(-len(data) % alignment + gap * alignment)
        infos.append(w.tensor(name, dims, kind, len(data)))
        contents[name] = (tuple(dims[::-1]), kind, bytes([number + 1]) * nbytes)
        data += contents[name][2]
    path.write_bytes(w.gguf(keys, infos, data, version=version, alignment=alignment))
    with open_gguf(path) as file:
        read = {k: v.tolist() if isinstance(v, np.ndarray) else v for k, v in file.metadata.items()}
        assert read == {"general.alignment": alignment} | {name: value for name, (_, value) in metadata.items()}
        assert {t.name: (t.shape, t.type, file.data(t.name).tobytes()) for t in file.tensors.values()} == contents
        assert list(file.tensors) == list(tensors)


def test_fuzz_leaves_no_descriptors(path: Path) -> None:
    if not Path("/proc/self/fd").exists():
        pytest.skip("needs Linux's /proc")

    def descriptors() -> Iterator[str]:
        for number in os.listdir("/proc/self/fd"):
            link = Path("/proc/self/fd", number)
            if link.is_symlink():
                yield os.readlink(link)

    rng = random.Random(1)
    for _ in range(200):
        outcome(path, mutate(w.rich_file(), rng))
    assert str(path) not in set(descriptors())
