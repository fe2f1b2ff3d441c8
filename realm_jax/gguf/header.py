"""The header of a GGUF file, read as untrusted input: magic, version, metadata and tensor descriptions.

Every count is compared with the bytes that are left before anything is allocated for it, and the whole header is walked
and checked before the first value is built: a defective file costs at most about its own size in memory. The header is
read into memory rather than mapped, so that a file cut short meanwhile is an error and not a SIGBUS.

Source of the layout: the GGUF specification in ggml's docs/gguf.md, versions 2 and 3 (they differ in byte order only).
"""

import io
import itertools
import struct
from dataclasses import dataclass
from typing import Any

import numpy as np

from realm_jax.errors import GGUFError
from realm_jax.gguf.types import REMOVED_TYPES, SCALAR_DTYPES, GGMLType, ValueType

MAGIC = b"GGUF"
VERSIONS = (2, 3)
DEFAULT_ALIGNMENT = 32
ALIGNMENT_KEY = "general.alignment"

# Limits of ggml itself: GGML_MAX_NAME counts the closing NUL, and the specification bounds keys at 2^16 - 1.
MAX_TENSOR_NAME = 63
MAX_KEY = 65535
MAX_DIMS = 4

# Limits that keep a hostile header cheap. The largest vocabularies published have about 10^6 entries and as many
# merges, the largest models about 50,000 tensors (every expert by itself) and a few hundred keys.
MAX_HEADER_BYTES = 1 << 28
MAX_KEYS = 1 << 16
MAX_TENSORS = 1 << 17
MAX_ARRAY_STRINGS = 1 << 22  # in all arrays together

# The fewest bytes that one item can take in the file.
_MIN_KEY = 8 + 1 + 4 + 1  # name length, one byte of name, type, one byte of value
_MIN_TENSOR = 8 + 1 + 4 + 4 + 8  # name length, one byte of name, dimension count, type, offset
_MIN_STRING = 8

_READ_CHUNK = 1 << 18

_U32 = struct.Struct("<I")
_U64 = struct.Struct("<Q")
_PREDECESSORS = {b"lmgg": "GGML", b"fmgg": "GGMF", b"tjgg": "GGJT", b"algg": "GGLA"}


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """A tensor as the file describes it.

    shape: dimensions in numpy's order, the outermost first: a linear weight is (out_features, in_features).
    nbytes: bytes of its data; offset: where they start, from the beginning of file number `part` of GGUFFile.parts.
    """

    name: str
    shape: tuple[int, ...]
    type: GGMLType
    nbytes: int
    offset: int
    part: int = 0

    @property
    def elements(self) -> int:
        count = 1
        for dim in self.shape:
            count *= dim
        return count


@dataclass(frozen=True, slots=True)
class Header:
    """Everything in front of the tensor data. Offsets in `tensors` are from the beginning of the file."""

    version: int
    metadata: dict[str, Any]
    tensors: list[TensorInfo]


@dataclass(frozen=True, slots=True)
class _Value:
    """Where a checked metadata value lies. count is None for a scalar; type is the element's type for an array."""

    type: int
    count: int | None
    start: int
    end: int


def quote(text: str, limit: int = 80) -> str:
    """`text` in quotes for a one-line message: control characters escaped, long text cut."""
    return repr(text) if len(text) <= limit else repr(text[:limit]) + "..."


class HeaderReader:
    """Reads one header from an unbuffered binary file standing at its beginning.

    raw: the open file; size: its length in bytes; label: its name in messages.
    """

    def __init__(self, raw: io.RawIOBase, size: int, label: str) -> None:
        self._raw = raw
        self._size = size
        self._label = label
        self._buffer = bytearray()  # the first bytes of the file, as far as they have been needed
        self._position = 0
        self._place = "header"  # what is being read, for messages
        self._strings = 0  # strings in arrays so far

    def read(self) -> Header:
        """Check the whole header, then build it. Raises GGUFError."""
        version, tensor_count, key_count = self._read_counts()
        values = self._read_keys(key_count)
        alignment = self._alignment(values)
        tensors = self._read_tensors(tensor_count, alignment)
        self._check_overlaps(tensors)
        metadata = {key: self._build(value) for key, value in values.items()}
        return Header(version, metadata, tensors)

    # -- primitives ------------------------------------------------------------------------------------------------

    def _error(self, problem: str, at: int | None = None) -> GGUFError:
        return GGUFError(f"{self._label}: {self._place}, byte {self._position if at is None else at}: {problem}")

    def _need(self, count: int, what: str) -> int:
        """Have `count` more bytes in the buffer and return the position where they start, moving past them."""
        start = self._position
        end = start + count
        if end > len(self._buffer):
            self._load(start, end, what)
        self._position = end
        return start

    def _load(self, start: int, end: int, what: str) -> None:
        """Read on until the buffer reaches `end`; `start` is where the item begins, for messages."""
        if end > self._size:
            raise self._error(
                f"{what} takes {end - start} bytes, but only {self._size - start} of the file's {self._size} are left",
                start,
            )
        if end > MAX_HEADER_BYTES:
            raise self._error(f"the header goes on past {end} bytes; at most {MAX_HEADER_BYTES} are accepted", start)
        while len(self._buffer) < end:
            wanted = min(_READ_CHUNK, self._size - len(self._buffer))
            chunk = self._raw.read(wanted)
            if not chunk:
                raise self._error(
                    f"the file ended after {len(self._buffer)} bytes; it had {self._size} when it was opened",
                    start,
                )
            self._buffer += chunk

    def _u32(self, what: str) -> int:
        return _U32.unpack_from(self._buffer, self._need(4, what))[0]

    def _u64(self, what: str) -> int:
        return _U64.unpack_from(self._buffer, self._need(8, what))[0]

    def _name(self, what: str, longest: int) -> str:
        """A key or tensor name: 1 to `longest` bytes of UTF-8 without NUL (C programs would read a shorter name)."""
        at = self._position
        length = self._u64(f"the length of the {what}")
        if not 1 <= length <= longest:
            raise self._error(f"the {what} has a length of {length} bytes; 1 to {longest} are accepted", at)
        start = self._need(length, f"the {what}")
        raw = bytes(self._buffer[start : self._position])
        try:
            name = raw.decode("utf-8")
        except UnicodeDecodeError as error:
            shown = quote(raw.decode("latin-1"))
            raise self._error(f"the {what} {shown} is not UTF-8 ({error.reason})", start) from None
        if "\0" in name:
            raise self._error(f"the {what} {quote(name)} holds a NUL character; names without it are accepted", start)
        return name

    # -- magic, version, counts --------------------------------------------------------------------------------------

    def _read_counts(self) -> tuple[int, int, int]:
        if self._size < 4:
            raise self._error(f"the file has {self._size} bytes; a GGUF file has at least 24 and starts with 'GGUF'", 0)
        start = self._need(4, "the magic")
        magic = bytes(self._buffer[start : self._position])
        if magic in _PREDECESSORS:
            raise self._error(
                f"the file is in the older {_PREDECESSORS[magic]} format; only GGUF is accepted: convert it again", 0
            )
        if magic != MAGIC:
            raise self._error(
                f"the file starts with {quote(magic.decode('latin-1'))}; a GGUF file starts with 'GGUF'", 0
            )
        version = self._u32("the version")
        if version not in VERSIONS:
            raise self._version_error(version)
        tensor_count = self._u64("the tensor count")
        key_count = self._u64("the metadata count")
        if tensor_count > MAX_TENSORS:
            raise self._error(f"the tensor count is {tensor_count}; at most {MAX_TENSORS} are accepted", 8)
        if key_count > MAX_KEYS:
            raise self._error(f"the metadata count is {key_count}; at most {MAX_KEYS} are accepted", 16)
        left = self._size - self._position
        least = key_count * _MIN_KEY + tensor_count * _MIN_TENSOR
        if least > left:
            raise self._error(
                f"{key_count} metadata values and {tensor_count} tensors take at least {least} bytes, "
                f"but only {left} follow in the file",
                8,
            )
        return version, tensor_count, key_count

    def _version_error(self, version: int) -> GGUFError:
        accepted = "little-endian versions 2 and 3 are accepted"
        if version & 0xFFFF == 0 and version != 0:
            swapped = int.from_bytes(version.to_bytes(4, "little"), "big")
            return self._error(
                f"the version reads {version}: this is a big-endian file of version {swapped}; {accepted}", 4
            )
        if version == 1:
            return self._error(f"the GGUF version is 1, which ggml withdrew; {accepted}: convert the file again", 4)
        return self._error(f"the GGUF version is {version}; {accepted}", 4)

    # -- metadata ------------------------------------------------------------------------------------------------------

    def _read_keys(self, count: int) -> dict[str, _Value]:
        values: dict[str, _Value] = {}
        for index in range(count):
            self._place = f"metadata value {index + 1} of {count}"
            at = self._position
            key = self._name("key", MAX_KEY)
            self._place = f"metadata key {quote(key)}"
            if key in values:
                raise self._error("the key occurs twice; keys are unique", at)
            values[key] = self._check_value()
        return values

    def _check_value(self) -> _Value:
        """Walk over one value, checking everything in it without building it."""
        at = self._position
        value_type = self._u32("the value type")
        if value_type == ValueType.ARRAY:
            return self._check_array()
        if value_type == ValueType.STRING:
            start = self._position
            self._walk_strings(1)
            return _Value(value_type, None, start, self._position)
        if value_type not in SCALAR_DTYPES:
            raise self._error(f"the value type is {value_type}; ids 0 to {max(ValueType)} are accepted", at)
        size = np.dtype(SCALAR_DTYPES[value_type]).itemsize
        start = self._need(size, f"a value of type {ValueType(value_type).name}")
        if value_type == ValueType.BOOL and self._buffer[start] > 1:
            raise self._error(f"a BOOL is {self._buffer[start]}; 0 and 1 are accepted", start)
        return _Value(value_type, None, start, self._position)

    def _check_array(self) -> _Value:
        at = self._position
        element_type = self._u32("the element type of an array")
        count = self._u64("the length of an array")
        if element_type == ValueType.ARRAY:
            raise self._error(
                "an array of arrays; arrays of numbers, booleans or strings are accepted (as in ggml)", at
            )
        if element_type != ValueType.STRING and element_type not in SCALAR_DTYPES:
            raise self._error(
                f"the array's element type is {element_type}; ids 0 to {max(ValueType)} but 9 are accepted", at
            )
        name = ValueType(element_type).name
        is_string = element_type == ValueType.STRING
        size = _MIN_STRING if is_string else np.dtype(SCALAR_DTYPES[element_type]).itemsize
        left = self._size - self._position
        if count > left // size:
            raise self._error(
                f"an array of {count} {name} elements takes at least {count * size} bytes, but only {left} follow", at
            )
        start = self._position
        if is_string:
            self._strings += count
            if self._strings > MAX_ARRAY_STRINGS:
                raise self._error(
                    f"arrays with {self._strings} strings in all; at most {MAX_ARRAY_STRINGS} are accepted", at
                )
            self._walk_strings(count)
        else:
            self._need(count * size, f"an array of {count} {name} elements")
            if element_type == ValueType.BOOL and count:
                raw = np.frombuffer(self._buffer, np.uint8, count, start)
                worst = int(raw.max())
                del raw  # the buffer cannot grow while an array looks at it
                if worst > 1:
                    raise self._error(f"an array of BOOL holds {worst}; 0 and 1 are accepted", start)
        return _Value(element_type, count, start, self._position)

    def _walk_strings(self, count: int) -> None:
        """Move past `count` strings. A plain loop over local names: half a million merges pass through here."""
        buffer, position, unpack = self._buffer, self._position, _U64.unpack_from
        loaded = len(buffer)
        for _ in range(count):
            start = position
            if start + 8 > loaded:
                self._position = start
                self._load(start, start + 8, "the length of a string")
                loaded = len(buffer)
            position += 8 + unpack(buffer, start)[0]
            if position > loaded:
                self._position = start
                self._load(start, position, f"a string of {position - start - 8} bytes")
                loaded = len(buffer)
        self._position = position

    def _build(self, value: _Value) -> Any:
        """The checked value: a Python scalar or str; for arrays a read-only numpy array or a list of str.

        Text that is no UTF-8 keeps its bytes as lone surrogates (the surrogateescape error handler).
        """
        raw = bytes(memoryview(self._buffer)[value.start : value.end])
        if value.type == ValueType.STRING:
            if value.count is None:
                return raw[8:].decode("utf-8", "surrogateescape")
            return _decode_strings(raw, value.count)
        dtype = SCALAR_DTYPES[value.type]
        # The array keeps `raw` and looks into it: read-only, no second copy. numpy refuses to look into nothing.
        array = np.frombuffer(raw, dtype) if raw else np.empty(0, dtype)
        return array if value.count is not None else array[0].item()

    def _alignment(self, values: dict[str, _Value]) -> int:
        value = values.get(ALIGNMENT_KEY)
        if value is None:
            return DEFAULT_ALIGNMENT
        self._place = f"metadata key {quote(ALIGNMENT_KEY)}"
        if value.type != ValueType.UINT32 or value.count is not None:
            kind = ValueType(value.type).name if value.count is None else f"array of {ValueType(value.type).name}"
            raise self._error(f"the alignment is of type {kind}; UINT32 is accepted", value.start)
        alignment = self._build(value)
        if alignment < 1 or alignment & (alignment - 1):
            raise self._error(f"the alignment is {alignment}; powers of two are accepted", value.start)
        return alignment

    # -- tensors -------------------------------------------------------------------------------------------------------

    def _read_tensors(self, count: int, alignment: int) -> list[TensorInfo]:
        described = []
        seen: set[str] = set()
        for index in range(count):
            self._place = f"tensor {index + 1} of {count}"
            at = self._position
            name = self._name("tensor name", MAX_TENSOR_NAME)
            self._place = f"tensor {quote(name)}"
            if name in seen:
                raise self._error("the tensor name occurs twice; names are unique", at)
            seen.add(name)
            described.append((name, *self._read_shape_and_type(), self._position, self._u64("the offset")))
        header_end = self._position
        data_start = -(-header_end // alignment) * alignment
        tensors = []
        for name, shape, tensor_type, nbytes, at, offset in described:
            self._place = f"tensor {quote(name)}"
            if offset % alignment:
                raise self._error(
                    f"the data offset is {offset}; multiples of the alignment {alignment} are accepted", at
                )
            if data_start + offset + nbytes > self._size:
                raise self._error(
                    f"its {nbytes} bytes of data ({tensor_type.name}, shape {shape}) at offset {offset} would end "
                    f"at byte {data_start + offset + nbytes}, but the file has {self._size} bytes",
                    at,
                )
            tensors.append(TensorInfo(name, shape, tensor_type, nbytes, data_start + offset))
        return tensors

    def _read_shape_and_type(self) -> tuple[tuple[int, ...], GGMLType, int]:
        at = self._position
        dims = self._u32("the number of dimensions")
        if dims > MAX_DIMS:
            raise self._error(f"the tensor has {dims} dimensions; at most {MAX_DIMS} are accepted", at)
        sizes = struct.unpack_from(f"<{dims}Q", self._buffer, self._need(8 * dims, "the shape"))
        elements = 1
        for size in sizes:
            elements *= size
            # A file never holds 2^63 elements, and other programs count them in a signed 64-bit integer.
            if size < 1 or elements >= 1 << 63:
                raise self._error(
                    f"the shape is {sizes[::-1]}; dimensions of at least 1 and fewer than 2^63 elements are accepted",
                    at,
                )
        at = self._position
        type_id = self._u32("the tensor type")
        if type_id in REMOVED_TYPES:
            raise self._error(
                f"the tensor type {type_id} ({REMOVED_TYPES[type_id]}) was removed from ggml; quantize the model again",
                at,
            )
        try:
            tensor_type = GGMLType(type_id)
        except ValueError:
            raise self._error(
                f"the tensor type {type_id} is unknown; ids up to {max(GGMLType)} ({max(GGMLType).name}) are accepted",
                at,
            ) from None
        row = sizes[0] if sizes else 1
        if row % tensor_type.block_size:
            raise self._error(
                f"rows of {row} elements in {tensor_type.name}; multiples of its block of {tensor_type.block_size} "
                "are accepted",
                at,
            )
        return tuple(sizes[::-1]), tensor_type, tensor_type.nbytes(elements)

    def _check_overlaps(self, tensors: list[TensorInfo]) -> None:
        ordered = sorted(tensors, key=lambda tensor: tensor.offset)
        for first, second in itertools.pairwise(ordered):
            if second.offset < first.offset + first.nbytes:
                self._place = f"tensor {quote(second.name)}"
                raise self._error(
                    f"its data starts inside that of tensor {quote(first.name)} (bytes {first.offset} to "
                    f"{first.offset + first.nbytes}); tensors may not overlap",
                    second.offset,
                )


def _decode_strings(raw: bytes, count: int) -> list[str]:
    """The strings of a checked array: each a length of 8 bytes, then its bytes."""
    strings: list[str] = []
    append, unpack = strings.append, _U64.unpack_from
    position = 0
    for _ in range(count):
        start = position + 8
        position = start + unpack(raw, position)[0]
        append(raw[start:position].decode("utf-8", "surrogateescape"))
    return strings
