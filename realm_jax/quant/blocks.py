"""What lies where in one ggml block, as functions from file bytes to packed arrays.

Each function takes uint8 [n, bytes per block] and returns, for n blocks, the arrays that
pallas_kernels.quant_matmul.formats describes: name -> [n, width per block]. Source of every layout: ggml-common.h and
ggml-quants.c of ggml. Codebook types with a grid are in codebooks.py.
"""

from collections.abc import Callable

import ml_dtypes
import numpy as np

from realm_jax.errors import UnsupportedModelError

from . import codebooks
from .bits import f16, nibbles, plane, split, u16

Packed = dict[str, np.ndarray]


def _float64(b: np.ndarray) -> Packed:
    with np.errstate(over="ignore"):
        return {"values": b.view("<f8").astype(np.float32)}


def _integer(dtype: str) -> Callable[[np.ndarray], Packed]:
    def unpack(b: np.ndarray) -> Packed:
        values: np.ndarray = b.view(dtype)
        narrow: np.ndarray = values.astype(np.int32)
        if not np.array_equal(values, narrow):
            raise UnsupportedModelError("an I64 tensor holds values outside int32")
        return {"values": narrow}

    return unpack


def _halves(part: np.ndarray) -> np.ndarray:
    """Sixteen bytes with element j in the low nibble of byte j and j+16 in the high one -> natural order."""
    words = u16(part)  # [n, 8]
    low = (words & np.uint16(0x0F)) | ((words >> np.uint16(4)) & np.uint16(0xF0))
    high = ((words >> np.uint16(4)) & np.uint16(0x0F)) | ((words >> np.uint16(8)) & np.uint16(0xF0))
    return np.concatenate([low, high], axis=1).astype(np.uint8)


def _q4_0(b: np.ndarray) -> Packed:
    return {"scales": f16(b, 0), "codes": _halves(b[:, 2:])}


def _q4_1(b: np.ndarray) -> Packed:
    return {"scales": f16(b, 0), "mins": f16(b, 2), "codes": _halves(b[:, 4:])}


def _q5_0(b: np.ndarray) -> Packed:
    return {"scales": f16(b, 0), "high": b[:, 2:6], "codes": _halves(b[:, 6:])}


def _q5_1(b: np.ndarray) -> Packed:
    return {"scales": f16(b, 0), "mins": f16(b, 2), "high": b[:, 4:8], "codes": _halves(b[:, 8:])}


def _q8_0(b: np.ndarray) -> Packed:
    return {"scales": f16(b, 0), "codes": b[:, 2:].view(np.int8)}


def _q8_1(b: np.ndarray) -> Packed:  # the second float16, d times the sum of the codes, says nothing new
    return {"scales": f16(b, 0), "codes": b[:, 4:].view(np.int8)}


def _q8_k(b: np.ndarray) -> Packed:  # followed by the sums of each 16 codes, which say nothing new
    return {"scales": np.ascontiguousarray(b[:, :4]).view("<f4"), "codes": b[:, 4:260].view(np.int8)}


def _q1_0(b: np.ndarray) -> Packed:
    return {"scales": f16(b, 0), "codes": b[:, 2:]}


def _q2_0(b: np.ndarray) -> Packed:
    return {"scales": f16(b, 0), "codes": b[:, 2:]}


def _q2_k(b: np.ndarray) -> Packed:
    return {
        "scales": nibbles(b[:, :16] & np.uint8(15)),
        "mins": nibbles(b[:, :16] >> np.uint8(4)),
        "codes": plane(split(b[:, 16:80], 2, 32), 2),
        "super": f16(b, 80),
        "super_mins": f16(b, 82),
    }


def _q3_k(b: np.ndarray) -> Packed:
    low = split(b[:, 96:104], 4, 8)  # [n, 16]: low four bits of the scales
    high = split(b[:, 104:108], 2, 4)  # [n, 16]: high two bits
    return {
        "high": plane(split(b[:, :32], 1, 32), 1),
        "codes": plane(split(b[:, 32:96], 2, 32), 2),
        "scales": (low | (high << np.uint8(4))).view(np.int8) - np.int8(32),
        "super": f16(b, 108),
    }


def _scales_4k(s: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The twelve bytes of Q4_K and Q5_K -> (scales, mins), each [n, 8] of 6 bits."""
    low, low_min, rest = s[:, :4], s[:, 4:8], s[:, 8:]
    high = (low >> np.uint8(2)) & np.uint8(0x30)
    high_min = (low_min >> np.uint8(2)) & np.uint8(0x30)
    scales = np.concatenate([low & np.uint8(63), (rest & np.uint8(15)) | high], axis=1)
    mins = np.concatenate([low_min & np.uint8(63), (rest >> np.uint8(4)) | high_min], axis=1)
    return scales, mins


def _q4_k(b: np.ndarray) -> Packed:
    scales, mins = _scales_4k(b[:, 4:16])
    codes = plane(split(b[:, 16:], 4, 32), 4)
    return {"super": f16(b, 0), "super_mins": f16(b, 2), "scales": scales, "mins": mins, "codes": codes}


def _q5_k(b: np.ndarray) -> Packed:
    scales, mins = _scales_4k(b[:, 4:16])
    high, codes = plane(split(b[:, 16:48], 1, 32), 1), plane(split(b[:, 48:], 4, 32), 4)
    return {"super": f16(b, 0), "super_mins": f16(b, 2), "scales": scales, "mins": mins, "codes": codes, "high": high}


def _q6_k(b: np.ndarray) -> Packed:
    return {
        "codes": plane(split(b[:, :128], 4, 64), 4),
        "high": plane(split(b[:, 128:192], 2, 32), 2),
        "scales": b[:, 192:208].view(np.int8),
        "super": f16(b, 208),
    }


def _trits(part: np.ndarray, stride: int, powers: int) -> np.ndarray:
    """Base-3 digits -> codes 0, 1, 2, [n, bytes * powers]. A byte holds ceil(256/243 of the number)."""
    n = part.shape[0]
    factors = np.array([1, 3, 9, 27, 81][:powers], np.uint8)[:, None]
    digits = part.reshape(n, -1, 1, stride) * factors  # wraps at 256, on purpose: what is left of the higher digits
    return ((digits.astype(np.uint16) * np.uint16(3)) >> np.uint16(8)).astype(np.uint8).reshape(n, -1)


def _tq1_0(b: np.ndarray) -> Packed:
    parts = [_trits(b[:, :32], 32, 5), _trits(b[:, 32:48], 16, 5), _trits(b[:, 48:52], 4, 4)]
    return {"codes": plane(np.concatenate(parts, axis=1), 2), "scales": f16(b, 52)}


def _tq2_0(b: np.ndarray) -> Packed:
    return {"codes": plane(split(b[:, :64], 2, 32), 2), "scales": f16(b, 64)}


def _mxfp4(b: np.ndarray) -> Packed:
    return {"scales": b[:, :1], "codes": _halves(b[:, 1:])}


def _nvfp4(b: np.ndarray) -> Packed:
    return {"scales": b[:, :4], "codes": plane(split(b[:, 4:], 4, 8), 4)}


def _iq4_xs(b: np.ndarray) -> Packed:
    low = split(b[:, 4:8], 4, 1)  # [n, 8]
    high = (u16(b[:, 2:4]) >> np.arange(0, 16, 2, dtype=np.uint16)).astype(np.uint8) & np.uint8(3)
    return {
        "super": f16(b, 0),
        "scales": (low | (high << np.uint8(4))).view(np.int8) - np.int8(32),
        "codes": plane(split(b[:, 8:], 4, 16), 4),
    }


BLOCKS: dict[str, tuple[int, Callable[[np.ndarray], Packed]]] = {  # ggml name -> (bytes per block, packer)
    "F32": (4, lambda b: {"values": b.view("<f4")}),
    "F16": (2, lambda b: {"values": b.view("<f2")}),
    "BF16": (2, lambda b: {"values": b.view(ml_dtypes.bfloat16)}),
    "F64": (8, _float64),
    "I8": (1, _integer("<i1")),
    "I16": (2, _integer("<i2")),
    "I32": (4, _integer("<i4")),
    "I64": (8, _integer("<i8")),
    "Q4_0": (18, _q4_0),
    "Q4_1": (20, _q4_1),
    "Q5_0": (22, _q5_0),
    "Q5_1": (24, _q5_1),
    "Q8_0": (34, _q8_0),
    "Q8_1": (36, _q8_1),
    "Q8_K": (292, _q8_k),
    "Q1_0": (18, _q1_0),
    "Q2_0": (18, _q2_0),
    "Q2_K": (84, _q2_k),
    "Q3_K": (110, _q3_k),
    "Q4_K": (144, _q4_k),
    "Q5_K": (176, _q5_k),
    "Q6_K": (210, _q6_k),
    "TQ1_0": (54, _tq1_0),
    "TQ2_0": (66, _tq2_0),
    "MXFP4": (17, _mxfp4),
    "NVFP4": (36, _nvfp4),
    "IQ4_NL": (18, _q4_0),
    "IQ4_XS": (136, _iq4_xs),
    "IQ2_XXS": (66, codebooks.iq2_xxs),
    "IQ2_XS": (74, codebooks.iq2_xs),
    "IQ2_S": (82, codebooks.iq2_s),
    "IQ3_XXS": (98, codebooks.iq3_xxs),
    "IQ3_S": (110, codebooks.iq3_s),
    "IQ1_S": (50, codebooks.iq1_s),
    "IQ1_M": (56, codebooks.iq1_m),
}
