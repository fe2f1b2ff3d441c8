"""Bit fields of a batch of blocks, in numpy."""

import numpy as np


def f16(blocks: np.ndarray, at: int) -> np.ndarray:
    """The float16 at byte ``at`` of every block, [n, 1]."""
    return np.ascontiguousarray(blocks[:, at : at + 2]).view("<f2")


def u16(part: np.ndarray) -> np.ndarray:
    """uint8 [n, 2w] -> uint16 [n, w], little endian."""
    return np.ascontiguousarray(part).view("<u2")


def u32(part: np.ndarray) -> np.ndarray:
    """uint8 [n, 4w] -> uint32 [n, w], little endian."""
    return np.ascontiguousarray(part).view("<u4")


def split(part: np.ndarray, bits: int, stride: int) -> np.ndarray:
    """Codes of b bits -> one a byte, [n, elements]: byte j of each ``stride`` bytes holds elements j, j+stride, ..."""
    n, width = part.shape
    out = part.reshape(n, width // stride, 1, stride) >> np.arange(0, 8, bits, dtype=np.uint8)[:, None]
    out &= np.uint8((1 << bits) - 1)
    return out.reshape(n, width * 8 // bits)


def plane(codes: np.ndarray, bits: int) -> np.ndarray:
    """Codes of b bits, one a byte [n, block] -> uint8 [n, block*bits/8], in natural order from the low bits up."""
    if bits == 1:
        return np.packbits(codes, axis=1, bitorder="little")
    if bits == 2:
        words = u32(codes)
        words = words | (words >> np.uint32(6))  # bytes 0 and 2 hold two codes each
        return (words | (words >> np.uint32(12))).astype(np.uint8)
    pairs = u16(codes)
    return (pairs | (pairs >> np.uint16(4))).astype(np.uint8)


def nibbles(small: np.ndarray) -> np.ndarray:
    """Integers below 16 [n, w] -> uint8 [n, w/2], the even ones in the low nibbles."""
    return small[:, ::2] | (small[:, 1::2] << np.uint8(4))
