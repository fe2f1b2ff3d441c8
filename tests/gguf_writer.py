"""Writes GGUF files byte by byte, right or wrong on purpose: every count, length and offset can be a false one."""

import struct
from collections.abc import Iterable, Sequence

import numpy as np

# Metadata value types by id, with the struct format of the fixed-size ones.
U8, I8, U16, I16, U32, I32, F32, BOOL, STRING, ARRAY, U64, I64, F64 = range(13)
FORMATS = {U8: "B", I8: "b", U16: "H", I16: "h", U32: "I", I32: "i", F32: "f", BOOL: "?", U64: "Q", I64: "q", F64: "d"}


def u32(value: int) -> bytes:
    return struct.pack("<I", value)


def u64(value: int) -> bytes:
    return struct.pack("<Q", value)


def string(text: str | bytes, length: int | None = None) -> bytes:
    """A string as the file holds it, or one that states another length."""
    raw = text.encode() if isinstance(text, str) else text
    return u64(len(raw) if length is None else length) + raw


def pack(kind: int, value) -> bytes:
    return string(value) if kind == STRING else struct.pack("<" + FORMATS[kind], value)


def key(name: str | bytes, kind: int, value) -> bytes:
    """A metadata key with a scalar value; `value` as bytes is written as it is (for STRING too)."""
    return string(name) + u32(kind) + (value if isinstance(value, bytes) else pack(kind, value))


def array(name: str, kind: int, values: Sequence = (), count: int | None = None) -> bytes:
    """A metadata key with an array, or one that states another length."""
    body = b"".join(pack(kind, value) for value in values)
    return string(name) + u32(ARRAY) + u32(kind) + u64(len(values) if count is None else count) + body


def tensor(name: str | bytes, dims: Sequence[int], kind: int, offset: int, n_dims: int | None = None) -> bytes:
    """A tensor's description; dims innermost first, as the file has them."""
    count = len(dims) if n_dims is None else n_dims
    return string(name) + u32(count) + b"".join(u64(dim) for dim in dims) + u32(kind) + u64(offset)


def gguf(
    keys: Iterable[bytes] = (),
    tensors: Iterable[bytes] = (),
    data: bytes = b"",
    *,
    version: int = 3,
    magic: bytes = b"GGUF",
    key_count: int | None = None,
    tensor_count: int | None = None,
    alignment: int = 32,
) -> bytes:
    """A whole file from its packed pieces."""
    keys, tensors = list(keys), list(tensors)
    head = magic + u32(version)
    head += u64(len(tensors) if tensor_count is None else tensor_count)
    head += u64(len(keys) if key_count is None else key_count)
    head += b"".join(keys) + b"".join(tensors)
    return head + bytes(-len(head) % alignment) + data if tensors else head


def rich_file(version: int = 3) -> bytes:
    """A small valid file with every kind of metadata value and array, and tensors of several types and ranks."""
    keys = [
        key("general.architecture", STRING, "llama"),
        key("general.name", STRING, "tiny \N{HOT BEVERAGE}"),
        key("general.alignment", U32, 64),
        key("x.u8", U8, 255),
        key("x.i8", I8, -128),
        key("x.u16", U16, 65535),
        key("x.i16", I16, -32768),
        key("x.u32", U32, 2**32 - 1),
        key("x.i32", I32, -(2**31)),
        key("x.f32", F32, 1.5),
        key("x.bool", BOOL, True),
        key("x.u64", U64, 2**64 - 1),
        key("x.i64", I64, -(2**63)),
        key("x.f64", F64, 0.1),
        key("x.empty", STRING, ""),
        array("x.a.u8", U8, [0, 1, 255]),
        array("x.a.i16", I16, [-1, 2]),
        array("x.a.u32", U32, range(40)),
        array("x.a.f32", F32, [0.5, -0.25]),
        array("x.a.bool", BOOL, [True, False, True]),
        array("x.a.i64", I64, [-(2**63), 2**63 - 1]),
        array("x.a.none", I32, []),
        array("x.a.no_strings", STRING, []),
        array("tokenizer.ggml.tokens", STRING, ["<s>", "", "\u2581the", "a\nb", "\N{HOT BEVERAGE}"]),
    ]
    shapes = [
        ("token_embd.weight", (64, 5), 8, 2 * 5 * 34),  # Q8_0
        ("norm.weight", (64,), 0, 64 * 4),  # F32
        ("blk.0.w", (256, 2, 3), 12, 6 * 144),  # Q4_K
        ("blk.0.scale", (), 0, 4),  # F32, no dimensions
        ("blk.0.e", (3, 1, 2, 2), 30, 12 * 2),  # BF16
    ]
    rng = np.random.default_rng(7)
    tensors, data = [], b""
    for name, dims, kind, nbytes in shapes:
        data += bytes(-len(data) % 64)
        tensors.append(tensor(name, dims, kind, len(data)))
        data += rng.integers(0, 256, nbytes, np.uint8).tobytes()
    return gguf(keys, tensors, data, version=version, alignment=64)


def split_files(prefix: str, count: int = 3, **overrides: dict[int, list[bytes]]) -> dict[str, bytes]:
    """The parts of a valid split file by name: part n holds n + 1 tensors t.<n>.<i> of 8 floats, each n + i / 100.

    keys={part: [packed keys]} replaces a part's metadata.
    """
    total = sum(n + 1 for n in range(count))
    files = {}
    for n in range(count):
        keys = [key("split.no", U16, n), key("split.count", U16, count), key("split.tensors.count", I32, total)]
        if n == 0:
            keys.insert(0, key("general.architecture", STRING, "llama"))
        keys = overrides.get("keys", {}).get(n, keys)
        tensors = [tensor(f"t.{n}.{i}", (8,), 0, 32 * i) for i in range(n + 1)]
        data = b"".join(np.full(8, n + i / 100, "<f4").tobytes() for i in range(n + 1))
        files[f"{prefix}-{n + 1:05d}-of-{count:05d}.gguf"] = gguf(keys, tensors, data)
    return files
