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


def plane(codes: np.ndarray, bits: int, below: int = 0) -> np.ndarray:
    """Bits below..below+bits of codes [n, block], packed in the kernels' order: uint8 [n, block*bits/8]."""
    n, block = codes.shape
    parts = codes.reshape(n, 8 // bits, block * bits // 8)
    mask = np.uint8((1 << bits) - 1)
    out = np.zeros((n, block * bits // 8), np.uint8)
    for i in range(8 // bits):
        out |= ((parts[:, i] >> np.uint8(below)) & mask) << np.uint8(i * bits)
    return out


def nibbles(small: np.ndarray) -> np.ndarray:
    """Integers below 16 [n, w] -> uint8 [n, w/2], the even ones in the low nibbles."""
    return small[:, ::2] | (small[:, 1::2] << np.uint8(4))
