"""The IQ1, IQ2 and IQ3 types, whose codes are indices into ggml's grids of 4 or 8 values.

Grids are spelt out into a code per element when a model is loaded: kernels then need no table larger than 16 entries.
The grids themselves are read off the gguf package's public ``dequantize``, by dequantizing blocks that count through
all indices with a scale of one.
"""

from collections.abc import Callable
from functools import cache

import numpy as np

from .bits import f16, nibbles, plane, split, u16, u32

Packed = dict[str, np.ndarray]

_MAGNITUDES = {"IQ2": (8, 25, 43), "IQ3_XXS": (4, 12, 20, 28, 36, 44, 52, 62), "IQ3_S": (1, 3, 5, 7, 9, 11, 13, 15)}


def _probe_iq2_xxs(at: np.ndarray) -> list[np.ndarray]:
    words = np.zeros((at.shape[0], 8, 8), np.uint8)
    words[:, :, :4] = at.reshape(-1, 8, 4)
    return [words.reshape(-1, 64)]


def _probe_iq2_xs(at: np.ndarray) -> list[np.ndarray]:
    return [at.astype("<u2").view(np.uint8), np.zeros((at.shape[0], 8), np.uint8)]


def _probe_iq2_s(at: np.ndarray) -> list[np.ndarray]:
    high = (at.reshape(-1, 8, 4) >> 8 << np.array([0, 2, 4, 6])).sum(-1)
    return [at & 255, np.zeros((at.shape[0], 32), np.uint8), high, np.zeros((at.shape[0], 8), np.uint8)]


def _probe_iq3_xxs(at: np.ndarray) -> list[np.ndarray]:
    return [at, np.zeros((at.shape[0], 32), np.uint8)]


def _probe_iq3_s(at: np.ndarray) -> list[np.ndarray]:
    high = (at.reshape(-1, 8, 8) >> 8 << np.arange(8)).sum(-1)
    return [at & 255, high, np.zeros((at.shape[0], 36), np.uint8)]


def _probe_iq1_s(at: np.ndarray) -> list[np.ndarray]:
    high = (at.reshape(-1, 8, 4) >> 8 << np.array([0, 3, 6, 9])).sum(-1)
    return [at & 255, high.astype("<u2").view(np.uint8)]


# type -> (entries, elements an entry, the float16 scale that makes the group's scale one, block bytes after it)
_PROBES: dict[str, tuple[int, int, float, Callable[[np.ndarray], list[np.ndarray]]]] = {
    "IQ2_XXS": (256, 8, 8.0, _probe_iq2_xxs),
    "IQ2_XS": (512, 8, 8.0, _probe_iq2_xs),
    "IQ2_S": (1024, 8, 8.0, _probe_iq2_s),
    "IQ3_XXS": (256, 4, 4.0, _probe_iq3_xxs),
    "IQ3_S": (512, 4, 1.0, _probe_iq3_s),
    "IQ1_S": (2048, 8, 1.0, _probe_iq1_s),
}


@cache
def grid(name: str) -> np.ndarray:
    """Codes of every grid entry, its elements packed as the bytes of one integer: uint32 or uint64 [entries]."""
    from gguf import GGMLQuantizationType  # only models of these types need the package
    from gguf.quants import dequantize

    entries, width, scale, probe = _PROBES[name]
    at = np.arange(entries).reshape(-1, 256 // width)  # [blocks, indices a block]
    scales: np.ndarray = np.full((at.shape[0], 1), scale, np.float16).view(np.uint8)
    blocks = np.concatenate([scales, *(p.astype(np.uint8) for p in probe(at))], axis=1)
    values = dequantize(blocks, GGMLQuantizationType[name]).reshape(entries, width)
    if name == "IQ1_S":
        codes = (values - np.float32(0.125) + 1).astype(np.uint8)  # -1, 0, 1, all shifted by the positive delta
    else:
        codes = np.searchsorted(_MAGNITUDES["IQ2" if name.startswith("IQ2") else name], values).astype(np.uint8)
    return np.ascontiguousarray(codes).view(np.uint64 if width == 8 else np.uint32)[:, 0]


def _spelt(name: str, indices: np.ndarray) -> np.ndarray:
    """Grid indices [n, w] -> codes uint8 [n, 256]."""
    return grid(name)[indices].view(np.uint8).reshape(indices.shape[0], 256)


@cache
def _even_signs() -> np.ndarray:
    """Seven sign bits -> eight, the last making their number even: uint8 [128]."""
    seven: np.ndarray = np.arange(128, dtype=np.uint8)
    return seven | (np.bitwise_count(seven) & np.uint8(1)) << np.uint8(7)


def _sign_bits(signs: np.ndarray) -> np.ndarray:
    """uint8 [n, 32] -> [n, 256], one bit a byte."""
    return split(signs, 1, 1)


def _word_signs(words: np.ndarray) -> np.ndarray:
    """Four times seven sign bits in each uint32 [n, 8] -> eight bits each: uint8 [n, 32]."""
    seven = (words[:, :, None] >> np.array([0, 7, 14, 21], np.uint32)) & np.uint32(127)
    return _even_signs()[seven].reshape(-1, 32)


def iq2_xxs(b: np.ndarray) -> Packed:
    """66 bytes: scale, 8 x (4 grid bytes, a word of signs and scale)."""
    words = u32(b[:, 2:]).reshape(-1, 8, 2)
    indices = np.ascontiguousarray(words[:, :, 0]).view(np.uint8)  # [n, 32]
    return {
        "super": f16(b, 0),
        "scales": nibbles((words[:, :, 1] >> np.uint32(28)).astype(np.uint8)),
        "codes": plane(_spelt("IQ2_XXS", indices), 2),
        "high": _word_signs(words[:, :, 1]),
    }


def iq2_xs(b: np.ndarray) -> Packed:
    """74 bytes: scale, 32 x (9 bits of grid, 7 of signs), 16 scales of 4 bits."""
    words = u16(b[:, 2:66])
    return {
        "super": f16(b, 0),
        "scales": b[:, 66:],
        "codes": plane(_spelt("IQ2_XS", words & np.uint16(511)), 2),
        "high": _even_signs()[words >> np.uint16(9)],
    }


def iq2_s(b: np.ndarray) -> Packed:
    """82 bytes: scale, 32 low grid bytes, 32 bytes of signs, 32 x 2 high grid bits, 16 scales of 4 bits."""
    indices = b[:, 2:34].astype(np.uint16) | split(b[:, 66:74], 2, 1).astype(np.uint16) << np.uint16(8)
    return {
        "super": f16(b, 0),
        "scales": b[:, 74:],
        "codes": plane(_spelt("IQ2_S", indices), 2),
        "high": b[:, 34:66],
    }


def iq3_xxs(b: np.ndarray) -> Packed:
    """98 bytes: scale, 64 grid bytes, 8 words of signs and scale."""
    words = u32(b[:, 66:])
    codes = _spelt("IQ3_XXS", b[:, 2:66]) | _sign_bits(_word_signs(words)) << np.uint8(3)
    return {
        "super": f16(b, 0),
        "scales": nibbles((words >> np.uint32(28)).astype(np.uint8)),
        "codes": plane(codes, 4),
    }


def iq3_s(b: np.ndarray) -> Packed:
    """110 bytes: scale, 64 low grid bytes, 64 high grid bits, 32 bytes of signs, 8 scales of 4 bits."""
    indices = b[:, 2:66].astype(np.uint16) | split(b[:, 66:74], 1, 1).astype(np.uint16) << np.uint16(8)
    codes = _spelt("IQ3_S", indices) | _sign_bits(b[:, 74:106]) << np.uint8(3)
    return {"super": f16(b, 0), "scales": b[:, 106:], "codes": plane(codes, 4)}


def iq1_s(b: np.ndarray) -> Packed:
    """50 bytes: scale, 32 low grid bytes, 8 x (4 x 3 high grid bits, 3 of scale, 1 of delta's sign)."""
    words = u16(b[:, 34:])  # [n, 8]
    high = ((words[:, :, None] >> np.array([0, 3, 6, 9], np.uint16)) & np.uint16(7)).reshape(-1, 32)
    return {
        "super": f16(b, 0),
        "scales": (words >> np.uint16(12)).astype(np.uint8),  # three bits of scale, then the sign: stored alike
        "codes": plane(_spelt("IQ1_S", b[:, 2:34].astype(np.uint16) | high << np.uint16(8)), 2),
    }


def iq1_m(b: np.ndarray) -> Packed:
    """56 bytes: 32 low grid bytes, 32 x (3 high grid bits, 1 of delta's sign), 4 x (4 scales of 3 bits, 4 of d)."""
    words = u16(b[:, 48:])  # [n, 4]
    d = np.zeros(b.shape[0], np.uint16)
    for i in range(4):
        d |= (words[:, i] >> np.uint16(12)) << np.uint16(4 * i)
    scales = ((words[:, :, None] >> np.array([0, 3, 6, 9], np.uint16)) & np.uint16(7)).astype(np.uint8).reshape(-1, 16)
    fields = b[:, 32:48]  # [n, 16]
    signs = (fields & np.uint8(8)) | (fields & np.uint8(128)) >> np.uint8(3)  # bits 3 and 4
    high = (split(fields, 4, 1) & np.uint8(7)).astype(np.uint16)  # [n, 32]
    return {
        "super": d.view(np.float16)[:, None],
        "scales": scales | signs,
        "codes": plane(_spelt("IQ1_S", b[:, :32].astype(np.uint16) | high << np.uint16(8)), 2),
    }
