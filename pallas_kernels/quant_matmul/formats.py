"""The family of packed weight formats: what each ggml type becomes in memory.

A weight [..., N, K] (N outputs, K inputs) is a dict of arrays, each with the same leading dims [..., N], so that rows
can be gathered and stacks of layers indexed. A quantized element is

    w = scale * (value(code) + delta) + offset

* ``codes``/``high``: the code, split into planes of 8, 4, 2 or 1 bits. An 8-bit plane is int8 [..., N, K]. A plane of b
  bits is uint32 [..., N, K*b/32] in the elements' natural order: element e is bits b*e.. of the row read as one little
  endian number. A word shifted by 0, b, 2b, ... is what XLA turns into vector code (8 times faster on a CPU than ggml's
  order of nibbles in bytes). ``high`` continues the code above the bits of ``codes``.
* ``scales``: one per ``group`` elements. With ``super``: a float16 per ``block`` times the group's small integer.
* ``mins`` (with ``super_mins``): the offset, one per group.
* value(code) is ``code - bias``, or ``table[code]`` for codebook types.

Every product of a scale by a code is exact in float32 for the formats whose scales are float16, so compiled code that
contracts a multiply and an add still gives the reference's bits.
"""

from dataclasses import dataclass
from typing import Any

import ml_dtypes
import numpy as np

_IQ4 = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)
_E2M1 = (0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12)  # twice the e2m1 value


def _signed(magnitudes: tuple[int, ...]) -> tuple[int, ...]:
    """Codebook of a code whose highest bit is the sign."""
    return magnitudes + tuple(-m for m in magnitudes)


_IQ2 = _signed((8, 25, 43, 0))  # magnitude code 3 does not occur
_IQ3_XXS = _signed((4, 12, 20, 28, 36, 44, 52, 62))
_IQ3_S = _signed((1, 3, 5, 7, 9, 11, 13, 15))


@dataclass(frozen=True)
class Format:
    """Static description of one packed format; hashable, so it can be an argument of jit.

    name: ggml's type name. block: elements per ggml block (rows are multiples of it). planes: bits per code plane, low
    first; empty for dense formats. group: elements per scale. scale: how ``scales`` is stored, one of "f16", "f32",
    "u8", "u4" (two to a byte), "i8", "e8m0", "ue4m3", "iq1s", "iq1m". has_super: a float16 per block multiplies the
    group's scale, which is then ``scale_mul * code + scale_add``. mins: None, "f16" (added), or "u8"/"u4" (times
    super_mins, subtracted). bias, table: the value of a code. dtype: of "values", in dense formats.
    """

    name: str
    block: int = 1
    planes: tuple[int, ...] = ()
    group: int = 1
    scale: str = "f16"
    has_super: bool = False
    scale_mul: float = 1.0
    scale_add: float = 0.0
    mins: str | None = None
    bias: int = 0
    table: tuple[int, ...] | None = None
    dtype: str = ""

    @property
    def dense(self) -> bool:
        """True for formats that hold plain numbers in one array called "values"."""
        return not self.planes

    def spec(self, shape: tuple[int, ...]) -> dict[str, tuple[tuple[int, ...], np.dtype]]:
        """Shapes and dtypes of the arrays of a weight of logical ``shape`` [..., K].

        Raises ValueError when K is no multiple of the block.
        """
        if self.dense:
            return {"values": (tuple(shape), np.dtype(_DTYPES[self.dtype]))}
        *lead, k = shape
        if k % self.block:
            raise ValueError(f"{self.name}: a row of {k} elements is not a multiple of the block of {self.block}")
        out: dict[str, tuple[tuple[int, ...], np.dtype]] = {}
        for name, bits in zip(("codes", "high"), self.planes):
            out[name] = ((*lead, k), np.dtype(np.int8)) if bits == 8 else ((*lead, k * bits // 32), np.dtype(np.uint32))
        out["scales"] = ((*lead, _width(k // self.group, self.scale)), np.dtype(_DTYPES[self.scale]))
        if self.mins is not None:
            out["mins"] = ((*lead, _width(k // self.group, self.mins)), np.dtype(_DTYPES[self.mins]))
        if self.has_super:
            out["super"] = ((*lead, k // self.block), np.dtype(np.float16))
            if self.mins is not None:
                out["super_mins"] = ((*lead, k // self.block), np.dtype(np.float16))
        return out

    def columns(self, arrays: dict[str, Any]) -> int:
        """K, read from the packed arrays."""
        if self.dense:
            return arrays["values"].shape[-1]
        width = arrays["codes"].shape[-1]
        return width if self.planes[0] == 8 else width * 32 // self.planes[0]


_DTYPES = {
    "f16": np.float16,
    "f32": np.float32,
    "bf16": ml_dtypes.bfloat16,
    "i32": np.int32,
    "i8": np.int8,
    "u8": np.uint8,
    "u4": np.uint8,
    "e8m0": np.uint8,
    "ue4m3": np.uint8,
    "iq1s": np.uint8,
    "iq1m": np.uint8,
}


def _width(groups: int, stored: str) -> int:
    return groups // 2 if stored == "u4" else groups


def _super(name: str, planes: tuple[int, ...], group: int, scale: str, **rest: Any) -> Format:
    """A format in blocks of 256 with a float16 each."""
    return Format(name, 256, planes, group, scale, has_super=True, **rest)


FORMATS: dict[str, Format] = {
    f.name: f
    for f in (
        Format("F32", dtype="f32"),
        Format("F16", dtype="f16"),
        Format("BF16", dtype="bf16"),
        Format("F64", dtype="f32"),
        *(Format(name, dtype="i32") for name in ("I8", "I16", "I32", "I64")),
        Format("Q4_0", 32, (4,), 32, bias=8),
        Format("Q4_1", 32, (4,), 32, mins="f16"),
        Format("Q5_0", 32, (4, 1), 32, bias=16),
        Format("Q5_1", 32, (4, 1), 32, mins="f16"),
        Format("Q8_0", 32, (8,), 32),
        Format("Q8_1", 32, (8,), 32),
        Format("Q8_K", 256, (8,), 256, scale="f32"),
        Format("Q1_0", 128, (1,), 128, table=(-1, 1)),
        Format("Q2_0", 64, (2,), 64, bias=1),
        _super("Q2_K", (2,), 16, "u4", mins="u4"),
        _super("Q3_K", (2, 1), 16, "i8", bias=4),
        _super("Q4_K", (4,), 32, "u8", mins="u8"),
        _super("Q5_K", (4, 1), 32, "u8", mins="u8"),
        _super("Q6_K", (4, 2), 16, "i8", bias=32),
        Format("TQ1_0", 256, (2,), 256, bias=1),
        Format("TQ2_0", 256, (2,), 256, bias=1),
        Format("MXFP4", 32, (4,), 32, scale="e8m0", table=_E2M1),
        Format("NVFP4", 64, (4,), 16, scale="ue4m3", table=_E2M1),
        Format("IQ4_NL", 32, (4,), 32, table=_IQ4),
        _super("IQ4_XS", (4,), 32, "i8", table=_IQ4),
        _super("IQ2_XXS", (2, 1), 32, "u4", scale_mul=0.25, scale_add=0.125, table=_IQ2),
        _super("IQ2_XS", (2, 1), 16, "u4", scale_mul=0.25, scale_add=0.125, table=_IQ2),
        _super("IQ2_S", (2, 1), 16, "u4", scale_mul=0.25, scale_add=0.125, table=_IQ2),
        _super("IQ3_XXS", (4,), 32, "u4", scale_mul=0.5, scale_add=0.25, table=_IQ3_XXS),
        _super("IQ3_S", (4,), 32, "u4", scale_mul=2.0, scale_add=1.0, table=_IQ3_S),
        _super("IQ1_S", (2,), 32, "iq1s", scale_mul=2.0, scale_add=1.0, bias=1),
        _super("IQ1_M", (2,), 16, "iq1m", scale_mul=2.0, scale_add=1.0, bias=1),
    )
}
