"""The GGUF reader on hostile and damaged files: each gives one clear GGUFError, quickly and in bounded memory."""

import os
import re
import resource
import subprocess
import sys
import time
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import gguf_writer as w
import pytest

from realm_jax.errors import GGUFError
from realm_jax.gguf import describe, open_gguf

SECONDS = 1.0
# Beyond the file's own size: one read chunk of 256 KiB, twice, and small change; an eighth for the growing buffer.
SLACK = 1 << 20

F32, Q4_0, Q4_K, I8 = 0, 2, 12, 24
NAME = w.key("general.architecture", w.STRING, "llama")


def one_tensor(*args, data: bytes = bytes(128), keys=(), alignment: int = 32, **kwargs) -> bytes:
    return w.gguf(keys, [w.tensor(*args, **kwargs)], data, alignment=alignment)


def raw_array(name: str, kind: int, count: int, body: bytes = b"") -> bytes:
    return w.string(name) + w.u32(w.ARRAY) + w.u32(kind) + w.u64(count) + body


def nested(depth: int) -> bytes:
    return w.string("x.deep") + w.u32(w.ARRAY) + (w.u32(w.ARRAY) + w.u64(1)) * depth + w.u32(w.U8) + w.u64(0)


def sparse(head: bytes, size: int) -> Callable[[Path], None]:
    """A file of `size` bytes that holds next to nothing on disk."""

    def write(path: Path) -> None:
        path.write_bytes(head)
        os.truncate(path, size)

    return write


def alignment(value: int) -> bytes:
    return w.gguf([w.key("general.alignment", w.U32, value)], [w.tensor("t", (4,), F32, 0)], bytes(64))


RICH = w.rich_file()

# (what is wrong, the file's bytes or a function that writes it, a pattern of the message)
CASES: list[tuple[str, bytes | Callable[[Path], None], str]] = [
    # magic, version and counts
    ("empty", b"", r"header, byte 0: the file has 0 bytes; a GGUF file has at least 24"),
    ("four bytes", b"GGUF", r"the version takes 4 bytes, but only 0 of the file's 4 are left"),
    ("three bytes", b"GGU", r"the file has 3 bytes"),
    ("other magic", b"FUGG" + RICH[4:], r"the file starts with 'FUGG'; a GGUF file starts with 'GGUF'"),
    ("a zip file", b"PK\x03\x04" + bytes(60), r"the file starts with 'PK\\x03\\x04'"),
    ("a ggjt file", b"tjgg" + w.u32(3) + bytes(60), r"the older GGJT format"),
    ("version 0", w.gguf(version=0), r"the GGUF version is 0; little-endian versions 2 and 3"),
    ("version 1", w.gguf(version=1), r"the GGUF version is 1, which ggml withdrew"),
    ("version 4", w.gguf(version=4), r"byte 4: the GGUF version is 4; little-endian versions 2 and 3"),
    ("version 2^32-1", w.gguf(version=2**32 - 1), r"the GGUF version is 4294967295"),
    ("big endian", w.gguf(version=3 << 24), r"this is a big-endian file of version 3"),
    ("counts missing", b"GGUF" + w.u32(3), r"the tensor count takes 8 bytes, but only 0"),
    ("key count missing", b"GGUF" + w.u32(3) + w.u64(0) + b"\0\0", r"the metadata count takes 8 bytes, but only 2"),
    ("tensor count 2^63", w.gguf(tensor_count=2**63), r"the tensor count is 9223372036854775808; at most 131072"),
    ("tensor count 2^64-1", w.gguf(tensor_count=2**64 - 1), r"the tensor count is 18446744073709551615"),
    ("key count 2^40", w.gguf(key_count=2**40), r"the metadata count is 1099511627776; at most 65536"),
    ("more keys than bytes", w.gguf([NAME], key_count=5000), r"5000 metadata values and 0 tensors take at least 70000"),
    (
        "more tensors than bytes",
        w.gguf([NAME], tensor_count=9),
        r"9 tensors take at least 239 bytes, but only 45 follow",
    ),
    ("one key too few", w.gguf([NAME, NAME[:8]], key_count=2), r"metadata value 2 of 2, byte 77: the key takes 20"),
    # keys
    ("key length 2^63", w.gguf([w.u64(2**63) + bytes(64)]), r"the key has a length of 9223372036854775808 bytes"),
    ("key length 2^40", w.gguf([w.u64(2**40) + bytes(64)]), r"1 to 65535 are accepted"),
    ("key past the end", w.gguf([w.string("key", 60000) + bytes(64)]), r"the key takes 60000 bytes, but only"),
    ("empty key", w.gguf([w.key("", w.U8, 1) + bytes(8)], key_count=1), r"the key has a length of 0 bytes"),
    ("key of 65536 bytes", w.gguf([w.key("k" * 65536, w.U8, 1)]), r"the key has a length of 65536 bytes"),
    ("key no UTF-8", w.gguf([w.key(b"k\xff\xfe", w.U8, 1)]), r"the key 'kÿþ' is not UTF-8"),
    ("key with NUL", w.gguf([w.key("a\0b", w.U8, 1)]), r"the key 'a\\x00b' holds a NUL character"),
    ("key twice", w.gguf([NAME, NAME]), r"'general.architecture', byte 69: the key occurs twice"),
    (
        "control characters",
        w.gguf([w.key("a\x1b[2J\n", 99, b"")]),
        r"key 'a\\x1b\[2J\\n', byte \d+: the value type is 99",
    ),
    # values
    ("value type 13", w.gguf([w.key("k", 13, b"\0")]), r"key 'k', byte 33: the value type is 13; ids 0 to 12"),
    ("value type 2^32-1", w.gguf([w.key("k", 2**32 - 1, b"\0")]), r"the value type is 4294967295"),
    ("value missing", w.gguf([w.key("kkkk", w.U64, b"\0\0")]), r"a value of type UINT64 takes 8 bytes, but only 2"),
    ("bool of 2", w.gguf([w.key("k", w.BOOL, b"\2")]), r"a BOOL is 2; 0 and 1 are accepted"),
    ("array bool of 255", w.gguf([raw_array("k", w.BOOL, 3, b"\0\1\xff")]), r"an array of BOOL holds 255; 0 and 1"),
    (
        "string of 2^40",
        w.gguf([w.key("k", w.STRING, w.string("abc", 2**40))]),
        r"a string of 1099511627776 bytes takes",
    ),
    (
        "string of 2^63",
        w.gguf([w.key("k", w.STRING, w.string("abc", 2**63))]),
        r"a string of 9223372036854775808 bytes",
    ),
    (
        "string of 2^64-8",
        w.gguf([w.key("k", w.STRING, w.string("abc", 2**64 - 8))]),
        r"a string of 18446744073709551608",
    ),
    ("string one too long", w.gguf([w.key("k", w.STRING, w.string("abc", 4))]), r"takes 12 bytes, but only 11"),
    # arrays
    (
        "array of 2^40 bytes",
        w.gguf([raw_array("k", w.U8, 2**40, bytes(9))]),
        r"an array of 1099511627776 UINT8 elements",
    ),
    ("array of 2^63 bytes", w.gguf([raw_array("k", w.I8, 2**63)]), r"an array of 9223372036854775808 INT8 elements"),
    ("array size wraps", w.gguf([raw_array("k", w.U64, 2**61 + 1, bytes(8))]), r"takes at least 18446744073709551624"),
    (
        "array of 2^40 strings",
        w.gguf([raw_array("k", w.STRING, 2**40, bytes(64))]),
        r"an array of 1099511627776 STRING",
    ),
    ("array of 2^63 strings", w.gguf([raw_array("k", w.STRING, 2**63)]), r"an array of 9223372036854775808 STRING"),
    ("array one short", w.gguf([w.array("k", w.F32, [1.0, 2.0], count=3)]), r"an array of 3 FLOAT32 elements takes"),
    (
        "array string too long",
        w.gguf([raw_array("k", w.STRING, 2, w.string("a") + w.string("b", 2**50))]),
        r"1125899906842",
    ),
    (
        "array string cut",
        w.gguf([raw_array("k", w.STRING, 2, w.string("a") + bytes(7))]),
        r"length of a string takes 8",
    ),
    ("array type unknown", w.gguf([raw_array("k", 77, 1, bytes(8))]), r"the array's element type is 77"),
    ("array without length", w.gguf([w.string("k") + w.u32(w.ARRAY) + w.u32(w.U8)]), r"the length of an array takes 8"),
    ("array of arrays", w.gguf([nested(1)]), r"key 'x.deep', byte \d+: an array of arrays; arrays of numbers"),
    ("arrays 5,000 deep", w.gguf([nested(5000)]), r"an array of arrays"),
    ("six million strings", sparse(w.gguf([raw_array("k", w.STRING, 6 << 20)]), 49 << 20), r"at most 4194304 are"),
    ("300 MB of metadata", sparse(w.gguf([raw_array("k", w.U8, 300 << 20)]), 301 << 20), r"at most 268435456 are"),
    ("300 MB string", sparse(w.gguf([w.key("k", w.STRING, w.u64(300 << 20))]), 301 << 20), r"at most 268435456 are"),
    (
        "64 MB array, then a defect",
        sparse(w.gguf([raw_array("k", w.U8, 64 << 20)], key_count=2), (64 << 20) + 64),
        r"metadata value 2 of 2, byte \d+: the key has a length of 0 bytes",
    ),
    # alignment
    ("alignment 0", alignment(0), r"'general.alignment', byte \d+: the alignment is 0; powers of two are accepted"),
    ("alignment 48", alignment(48), r"the alignment is 48; powers of two are accepted"),
    ("alignment 2^32-1", alignment(2**32 - 1), r"the alignment is 4294967295; powers of two"),
    ("alignment 2^31", alignment(2**31), r"at offset 0 would end at byte 2147483664, but the file has"),
    ("alignment u64", w.gguf([w.key("general.alignment", w.U64, 32)]), r"the alignment is of type UINT64; UINT32 is"),
    ("alignment text", w.gguf([w.key("general.alignment", w.STRING, "32")]), r"is of type STRING; UINT32 is accepted"),
    ("alignment array", w.gguf([w.array("general.alignment", w.U32, [32])]), r"is of type array of UINT32; UINT32 is"),
    # tensor names
    (
        "tensor name 2^63",
        w.gguf([], [w.u64(2**63) + bytes(64)]),
        r"the tensor name has a length of 9223372036854775808",
    ),
    ("tensor name of 64", one_tensor("n" * 64, (4,), F32, 0), r"has a length of 64 bytes; 1 to 63 are accepted"),
    ("tensor name empty", one_tensor("", (4,), F32, 0), r"tensor 1 of 1, byte 24: the tensor name has a length of 0"),
    ("tensor name no UTF-8", one_tensor(b"\xc3\x28", (4,), F32, 0), r"the tensor name 'Ã\(' is not UTF-8"),
    ("tensor name with NUL", one_tensor("a\0", (4,), F32, 0), r"the tensor name 'a\\x00' holds a NUL"),
    (
        "tensor name twice",
        w.gguf([], [w.tensor("t", (4,), F32, 0), w.tensor("t", (4,), F32, 32)], bytes(64)),
        r"tensor 't', byte 57: the tensor name occurs twice",
    ),
    # shapes and types
    ("five dimensions", one_tensor("t", (1,) * 5, F32, 0), r"the tensor has 5 dimensions; at most 4"),
    ("2^32-1 dimensions", one_tensor("t", (1,), F32, 0, n_dims=2**32 - 1), r"the tensor has 4294967295 dimensions"),
    ("dimension 0", one_tensor("t", (4, 0), F32, 0), r"the shape is \(0, 4\); dimensions of at least 1"),
    ("dimension 2^63", one_tensor("t", (2**63,), I8, 0), r"the shape is \(9223372036854775808,\)"),
    ("product 2^64 wraps to 0", one_tensor("t", (2**32, 2**32), F32, 0), r"fewer than 2\^63 elements are accepted"),
    ("product 2^64 + 4", one_tensor("t", (4, 2**30 - 1, 2**30 + 1, 4), F32, 0), r"the shape is \(4, 1073741825"),
    ("bytes 2^64 wrap to 0", one_tensor("t", (2**62,), F32, 0), r"its 18446744073709551616 bytes of data"),
    ("padding wraps", one_tensor("t", (4, 2**30 - 1, 2**30 + 1), F32, 0), r"its 18446744073709551600 bytes of data"),
    ("type 4 removed", one_tensor("t", (32,), 4, 0), r"the tensor type 4 \(Q4_2\) was removed from ggml"),
    ("type 31 removed", one_tensor("t", (32,), 31, 0), r"the tensor type 31 \(Q4_0_4_4\) was removed"),
    ("type 38 removed", one_tensor("t", (32,), 38, 0), r"the tensor type 38 \(IQ4_NL_8_8\) was removed"),
    ("type 43 unknown", one_tensor("t", (32,), 43, 0), r"the tensor type 43 is unknown; ids up to 42 \(Q2_0\)"),
    ("type 2^32-1", one_tensor("t", (32,), 2**32 - 1, 0), r"the tensor type 4294967295 is unknown"),
    (
        "row of 33 in Q4_0",
        one_tensor("t", (33, 32), Q4_0, 0),
        r"rows of 33 elements in Q4_0; multiples of its block of 32",
    ),
    ("row of 576 in Q4_K", one_tensor("t", (576, 4), Q4_K, 0), r"rows of 576 elements in Q4_K; multiples .* of 256"),
    ("no dimensions in Q4_0", one_tensor("t", (), Q4_0, 0), r"rows of 1 elements in Q4_0"),
    # where the data lie
    ("offset unaligned", one_tensor("t", (4,), F32, 8), r"the data offset is 8; multiples of the alignment 32"),
    (
        "offset past the end",
        one_tensor("t", (4,), F32, 4096),
        r"at offset 4096 would end at byte 4176, but the file has",
    ),
    ("offset wraps to 0", one_tensor("t", (8,), F32, 2**64 - 32), r"at offset 18446744073709551584 would end"),
    ("offset 2^63", one_tensor("t", (8,), F32, 2**63), r"at offset 9223372036854775808 would end"),
    (
        "data one byte short",
        one_tensor("t", (32,), F32, 0, data=bytes(127)),
        r"would end at byte 192, but the file has 191",
    ),
    ("no data at all", one_tensor("t", (32,), F32, 0, data=b""), r"would end at byte 192, but the file has 64"),
    ("padding cut", one_tensor("t", (4,), F32, 0, data=b"")[:60], r"would end at byte 80, but the file has 60 bytes"),
    (
        "same data twice",
        w.gguf([], [w.tensor("a", (8,), F32, 0), w.tensor("b", (8,), F32, 0)], bytes(64)),
        r"tensor 'b', byte 96: its data starts inside that of tensor 'a' \(bytes 96 to 128\)",
    ),
    (
        "overlap by one block",
        w.gguf([], [w.tensor("a", (8,), F32, 64), w.tensor("b", (24,), F32, 0)], bytes(96)),
        r"tensor 'a', byte 160: its data starts inside that of tensor 'b'",
    ),
    (
        "tensor entry cut",
        w.gguf([], [w.tensor("t", (4,), F32, 0)[:-1]], alignment=1),
        r"the offset takes 8 bytes, but only 7",
    ),
    ("tensor shape cut", w.gguf([], [w.string("t") + w.u32(4) + bytes(17)]), r"the shape takes 32 bytes, but only"),
    (
        "a terabyte claimed",
        one_tensor("t", (2**40,), I8, 0),
        r"its 1099511627776 bytes of data \(I8, shape \(10995116277",
    ),
    # split keys in one file
    ("split.no without count", w.gguf([w.key("split.no", w.U16, 1)]), r"'split.no' is 1, but 'split.count' is absent"),
    ("split.count negative", w.gguf([w.key("split.count", w.I32, -3)]), r"'split.count' is -3; an integer from 0 to"),
    ("split.count huge", w.gguf([w.key("split.count", w.U64, 2**63)]), r"'split.count' is 9223372036854775808; an int"),
    ("split.count text", w.gguf([w.key("split.count", w.STRING, "3\n")]), r"'split.count' is '3\\n'; an integer"),
    ("split.count bool", w.gguf([w.key("split.count", w.BOOL, True)]), r"'split.count' is True; an integer"),
    ("split.count array", w.gguf([w.array("split.count", w.U16, [3])]), r"'split.count' is an array; an integer"),
    ("split.no missing", w.gguf([w.key("split.count", w.U16, 3)]), r"'split.no' is None; 0 to 2 are accepted"),
    (
        "split.no too large",
        w.gguf([w.key("split.count", w.U16, 3), w.key("split.no", w.U16, 3)]),
        r"'split.no' is 3; 0 to 2 are accepted",
    ),
    (
        "part under another name",
        w.gguf([w.key("split.count", w.U16, 3), w.key("split.no", w.U16, 0)]),
        r"part 1 of 3, so its name has to end in '-00001-of-00003.gguf'",
    ),
]


def check_one_line(error: GGUFError, path: Path) -> None:
    assert str(error).startswith(f"{path}: ")
    assert str(error).isprintable()
    assert len(str(error)) < len(str(path)) + 400


@pytest.mark.parametrize(("content", "message"), [c[1:] for c in CASES], ids=[c[0] for c in CASES])
def test_hostile_file(tmp_path: Path, content: bytes | Callable[[Path], None], message: str) -> None:
    path = tmp_path / "m.gguf"
    content(path) if callable(content) else path.write_bytes(content)
    started = time.perf_counter()
    with pytest.raises(GGUFError, match=message) as caught:
        open_gguf(path)
    assert time.perf_counter() - started < SECONDS
    check_one_line(caught.value, path)
    tracemalloc.start()
    try:
        with pytest.raises(GGUFError):
            open_gguf(path)
        assert tracemalloc.get_traced_memory()[1] <= 1.125 * path.stat().st_size + SLACK
    finally:
        tracemalloc.stop()


def test_every_truncation_of_a_valid_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    for length in range(len(RICH)):
        path.write_bytes(RICH[:length])
        with pytest.raises(GGUFError) as caught:
            open_gguf(path)
        check_one_line(caught.value, path)


def test_hostile_files_leave_the_process_small(tmp_path: Path) -> None:
    """All cases in one process of their own, under a limit of the address space: its peak grows by little."""
    for number, (_, content, _) in enumerate(CASES):
        path = tmp_path / f"{number:03d}.gguf"
        content(path) if callable(content) else path.write_bytes(content)
    code = """
import resource, sys
from pathlib import Path
from realm_jax.errors import GGUFError
from realm_jax.gguf import open_gguf
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
before, refused = peak(), 0
used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + (512 << 20), resource.RLIM_INFINITY))
for path in sorted(Path(sys.argv[1]).glob("*.gguf")):
    try:
        open_gguf(path)
    except GGUFError:
        refused += 1
print(refused, peak() - before)
"""
    if not Path("/proc/self/statm").exists():
        pytest.skip("needs Linux's /proc")
    done = subprocess.run(
        [sys.executable, "-c", code, tmp_path], capture_output=True, text=True, check=True, timeout=120
    )
    refused, grown = map(int, done.stdout.split())
    assert refused == len(CASES)
    # The sparse file of 64 MB is the only one read far; of those of 49 and 301 MB nothing but the beginning is.
    assert grown < 96 << 20


def test_worst_valid_header_stays_bounded(tmp_path: Path) -> None:
    """The most tensors that are accepted, then a defect at the very end."""
    count = 1 << 17
    tensors = [w.tensor(f"{i}", (1,), I8, 32 * i) for i in range(count)]
    path = tmp_path / "m.gguf"
    path.write_bytes(w.gguf([], tensors, bytes(32 * count - 32)))
    started = time.perf_counter()
    with pytest.raises(GGUFError, match=r"tensor '131071', byte \d+: its 1 bytes of data"):
        open_gguf(path)
    assert time.perf_counter() - started < 5 * SECONDS  # 9 MB of header; about 0.5 s on a quiet machine


# -- files that are no regular files ---------------------------------------------------------------------------------


def test_missing_file(tmp_path: Path) -> None:
    with pytest.raises(GGUFError, match=r"none\.gguf: there is no such file"):
        open_gguf(tmp_path / "none.gguf")


def test_directory(tmp_path: Path) -> None:
    with pytest.raises(GGUFError, match=r"is a directory; a regular file is accepted"):
        open_gguf(tmp_path)


def test_pipe_is_refused_without_waiting(tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    os.mkfifo(path)
    started = time.perf_counter()
    with pytest.raises(GGUFError, match=r"is a pipe; a regular file is accepted"):
        open_gguf(path)
    assert time.perf_counter() - started < SECONDS


@pytest.mark.skipif(not Path("/dev/zero").exists(), reason="needs /dev/zero")
def test_device() -> None:
    with pytest.raises(GGUFError, match=r"^/dev/zero: is a device; a regular file is accepted$"):
        open_gguf("/dev/zero")


def test_file_in_the_place_of_a_directory(tmp_path: Path) -> None:
    (tmp_path / "f").write_bytes(RICH)
    with pytest.raises(GGUFError, match=r"cannot be opened: Not a directory"):
        open_gguf(tmp_path / "f" / "m.gguf")


def test_symbolic_link_to_itself(tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    path.symlink_to(path)
    with pytest.raises(GGUFError, match=r"cannot be opened: Too many levels of symbolic links"):
        open_gguf(path)


def test_permission_denied(tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    path.write_bytes(RICH)
    path.chmod(0)
    code = """
import os, sys
from realm_jax.errors import GGUFError
from realm_jax.gguf import open_gguf
if os.geteuid() == 0:
    os.setuid(65534)
try:
    open_gguf(sys.argv[1])
except GGUFError as error:
    print(error)
"""
    for parent in [tmp_path, *tmp_path.parents][:3]:
        parent.chmod(0o755)
    done = subprocess.run([sys.executable, "-c", code, path], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == f"{path}: cannot be opened: Permission denied"


def test_odd_paths(tmp_path: Path) -> None:
    with pytest.raises(GGUFError, match=r"^'a\\x00b': a file name cannot hold a NUL character$"):
        open_gguf("a\0b")
    odd = tmp_path / "a\n\x1b\udcff.gguf"
    with pytest.raises(GGUFError, match=r"/a\\n\\x1b\\udcff.gguf': there is no such file$") as caught:
        open_gguf(odd)
    assert str(caught.value).isprintable()
    odd.write_bytes(RICH)
    with open_gguf(os.fsencode(odd)) as file:
        assert describe(file)["path"].endswith("/a\n\x1b\ufffd.gguf")


# -- split files -------------------------------------------------------------------------------------------------------


def split_keys(number: int, count: int, tensors: int | None) -> list[bytes]:
    keys = [w.key("split.no", w.U16, number), w.key("split.count", w.U16, count)]
    return keys + ([] if tensors is None else [w.key("split.tensors.count", w.I32, tensors)])


SPLIT_CASES: list[tuple[str, dict[int, list[bytes]], str]] = [
    (
        "a part says another number",
        {1: split_keys(2, 3, 6)},
        r"00002-of-00003.gguf: the file says part 3 of 3, but its",
    ),
    ("a part says another count", {1: split_keys(1, 4, 6)}, r"the file says part 2 of 4, but its name part 2 of 3"),
    ("a part is whole", {2: []}, r"00003-of-00003.gguf: the file says no 'split.count', but its name part 3 of 3"),
    ("a part has another total", {1: split_keys(1, 3, 7)}, r"'split.tensors.count' is 7, but 6 in"),
    ("a part has no total", {1: split_keys(1, 3, None)}, r"'split.tensors.count' is None, but 6 in"),
    ("too many tensors", {n: split_keys(n, 3, 5) for n in range(3)}, r"is 5, but the 3 parts hold 6 tensors"),
    ("a tensor is missing", {n: split_keys(n, 3, 7) for n in range(3)}, r"is 7, but the 3 parts hold 6 tensors"),
    ("no total anywhere", {n: split_keys(n, 3, None) for n in range(3)}, r"is None, but the 3 parts hold 6 tensors"),
    ("first is whole by its keys", {0: []}, r"the name says part 1 of 3, but the file has no 'split.count'"),
    ("first says another number", {0: split_keys(1, 3, 6)}, r"has to end in '-00002-of-00003.gguf'"),
    ("65,535 parts", {0: split_keys(0, 65535, 6)}, r"has to end in '-00001-of-65535.gguf'"),
]


@pytest.mark.parametrize(("keys", "message"), [c[1:] for c in SPLIT_CASES], ids=[c[0] for c in SPLIT_CASES])
def test_inconsistent_split(tmp_path: Path, keys: dict[int, list[bytes]], message: str) -> None:
    for name, raw in w.split_files("m", 3, keys=keys).items():
        (tmp_path / name).write_bytes(raw)
    with pytest.raises(GGUFError, match=message) as caught:
        open_gguf(tmp_path / "m-00001-of-00003.gguf")
    assert str(caught.value).isprintable()


def test_missing_part_is_named(tmp_path: Path) -> None:
    for name, raw in w.split_files("m", 3).items():
        (tmp_path / name).write_bytes(raw)
    missing = tmp_path / "m-00002-of-00003.gguf"
    missing.unlink()
    with pytest.raises(GGUFError, match=rf"part 2 of 3 is missing: {re.escape(str(missing))}$"):
        open_gguf(tmp_path / "m-00003-of-00003.gguf")


def test_a_part_count_of_65535_stops_at_the_first_missing_part(tmp_path: Path) -> None:
    path = tmp_path / "m-00001-of-65535.gguf"
    path.write_bytes(w.gguf(split_keys(0, 65535, 1)))
    started = time.perf_counter()
    with pytest.raises(GGUFError, match=r"part 2 of 65535 is missing"):
        open_gguf(path)
    assert time.perf_counter() - started < SECONDS


def test_damaged_part_is_named(tmp_path: Path) -> None:
    for name, raw in w.split_files("m", 3).items():
        (tmp_path / name).write_bytes(raw[:-1] if "00003-of" in name else raw)
    with pytest.raises(GGUFError, match=r"m-00003-of-00003.gguf: tensor 't.2.2', byte \d+: its 32 bytes"):
        open_gguf(tmp_path / "m-00001-of-00003.gguf")


def test_a_tensor_in_two_parts(tmp_path: Path) -> None:
    names = list(w.split_files("m", 2))
    for n, name in enumerate(names):
        (tmp_path / name).write_bytes(w.gguf(split_keys(n, 2, 2), [w.tensor("t", (8,), F32, 0)], bytes(32)))
    with pytest.raises(GGUFError, match=r"00002-of-00002.gguf: tensor 't' is in .*00001-of-00002.gguf too"):
        open_gguf(tmp_path / names[0])


def test_more_parts_than_file_descriptors(tmp_path: Path) -> None:
    """A hostile split of many links to one file ends in an error, with every descriptor closed again."""
    count = 200
    first = tmp_path / f"m-00001-of-{count:05d}.gguf"
    for n in range(count):
        path = tmp_path / f"m-{n + 1:05d}-of-{count:05d}.gguf"
        path.write_bytes(w.gguf(split_keys(n, count, count), [w.tensor(f"t{n}", (8,), F32, 0)], bytes(32)))
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (64, hard))
    try:
        with pytest.raises(GGUFError, match=r"cannot be (opened|read): Too many open files"):
            open_gguf(first)
        with open(first, "rb") as again:
            assert again.read(4) == b"GGUF"
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    with open_gguf(first) as file:
        assert len(file.tensors) == count
