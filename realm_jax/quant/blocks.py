"""What lies where in one ggml block, as functions from file bytes to packed arrays.

Each function takes uint8 [n, bytes per block] and returns the arrays of pallas_kernels.quant_matmul.formats for n blocks:
name -> [n, width per block]. Source of every layout: ggml-common.h and ggml-quants.c of ggml.
"""

from collections.abc import Callable
from functools import cache

import ml_dtypes
import numpy as np

Packed = dict[str, np.ndarray]


def _f16(blocks: np.ndarray, at: int) -> np.ndarray:
    """The float16 at byte ``at`` of every block, [n, 1]."""
    return np.ascontiguousarray(blocks[:, at : at + 2]).view(np.float16)


def _u32(part: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(part).view("<u4").astype(np.uint32, copy=False)


def _u16(part: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(part).view("<u2").astype(np.uint16, copy=False)


def _split(part: np.ndarray, bits: int, stride: int) -> np.ndarray:
    """Codes of b bits -> one a byte, [n, elements]: byte j of each ``stride`` bytes holds elements j, j+stride, ..."""
    n, width = part.shape
    shifts = np.arange(0, 8, bits, dtype=np.uint8)[:, None]
    out = part.reshape(n, width // stride, 1, stride) >> shifts
    out &= np.uint8((1 << bits) - 1)
    return out.reshape(n, width * 8 // bits)


def _plane(codes: np.ndarray, bits: int, below: int = 0) -> np.ndarray:
    """Bits below..below+bits of codes [n, block], packed in the kernel's order: [n, block*bits/8]."""
    n, block = codes.shape
    parts = codes.reshape(n, 8 // bits, block * bits // 8)
    out = np.zeros((n, block * bits // 8), np.uint8)
    for i in range(8 // bits):
        part = parts[:, i] >> np.uint8(below) if below else parts[:, i]
        out |= (part & np.uint8((1 << bits) - 1)) << np.uint8(i * bits)
    return out


def _nibbles(small: np.ndarray) -> np.ndarray:
    """Group integers below 16, two to a byte."""
    return small[:, ::2] | (small[:, 1::2] << np.uint8(4))


def _q4_0(b: np.ndarray) -> Packed:
    return {"scales": _f16(b, 0), "codes": b[:, 2:]}


def _q4_1(b: np.ndarray) -> Packed:
    return {"scales": _f16(b, 0), "mins": _f16(b, 2), "codes": b[:, 4:]}


def _q8_0(b: np.ndarray) -> Packed:
    return {"scales": _f16(b, 0), "codes": b[:, 2:].view(np.int8)}


def _scales_4k(s: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Q4_K's twelve bytes -> (scales, mins), each [n, 8] of 6 bits."""
    low, low_min, rest = s[:, :4], s[:, 4:8], s[:, 8:]
    high = (low >> 2) & np.uint8(0x30)
    high_min = (low_min >> 2) & np.uint8(0x30)
    scales = np.concatenate([low & np.uint8(63), (rest & np.uint8(15)) | high], axis=1)
    mins = np.concatenate([low_min & np.uint8(63), (rest >> np.uint8(4)) | high_min], axis=1)
    return scales, mins


def _q4_k(b: np.ndarray) -> Packed:
    scales, mins = _scales_4k(b[:, 4:16])
    return {
        "super": _f16(b, 0),
        "super_mins": _f16(b, 2),
        "scales": scales,
        "mins": mins,
        "codes": _plane(_split(b[:, 16:], 4, 32), 4),
    }


def _q6_k(b: np.ndarray) -> Packed:
    return {
        "codes": _plane(_split(b[:, :128], 4, 64), 4),
        "high": _plane(_split(b[:, 128:192], 2, 32), 2),
        "scales": b[:, 192:208].view(np.int8),
        "super": _f16(b, 208),
    }


BLOCKS: dict[str, tuple[int, Callable[[np.ndarray], Packed]]] = {  # ggml name -> (bytes per block, packer)
    "F32": (4, lambda b: {"values": b.view("<f4")}),
    "F16": (2, lambda b: {"values": b.view("<f2")}),
    "BF16": (2, lambda b: {"values": b.view(ml_dtypes.bfloat16)}),
    "Q4_0": (18, _q4_0),
    "Q4_1": (20, _q4_1),
    "Q8_0": (34, _q8_0),
    "Q4_K": (144, _q4_k),
    "Q6_K": (210, _q6_k),
}
