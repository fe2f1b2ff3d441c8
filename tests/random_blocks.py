"""Random numbers that are the same everywhere, and random valid blocks of every quantized ggml type."""

import zlib

import gguf
import numpy as np
from gguf import GGMLQuantizationType


class RandomBits:
    """PCG64's raw stream, keyed by a seed and a label."""

    def __init__(self, seed: int, label: str):
        self._generator = np.random.PCG64((seed << 32) | zlib.crc32(label.encode()))

    def uniform(self, count: int) -> np.ndarray:
        """float64 in [0, 1)."""
        return (self._generator.random_raw(count) >> np.uint64(11)).astype(np.float64) * 2.0**-53

    def integers(self, count: int) -> np.ndarray:
        """uint8, all 256 values alike."""
        return self._generator.random_raw(-(-count // 8)).astype("<u8").view(np.uint8)[:count].copy()


# Where each type keeps its f16 scale and f16 minimum (byte offsets within a block), and the minimum that centres its
# values, as a multiple of the scale.
_SCALES: dict[str, tuple[int, int | None, float]] = {
    "Q4_0": (0, None, 0),
    "Q4_1": (0, 2, -7.5),
    "Q5_0": (0, None, 0),
    "Q5_1": (0, 2, -15.5),
    "Q8_0": (0, None, 0),
    "Q2_K": (80, 82, 1.5),
    "Q3_K": (108, None, 0),
    "Q4_K": (0, 2, 7.5),
    "Q5_K": (0, 2, 15.5),
    "Q6_K": (208, None, 0),
    "IQ1_S": (0, None, 0),
    "IQ2_XXS": (0, None, 0),
    "IQ2_XS": (0, None, 0),
    "IQ2_S": (0, None, 0),
    "IQ3_XXS": (0, None, 0),
    "IQ3_S": (0, None, 0),
    "IQ4_NL": (0, None, 0),
    "IQ4_XS": (0, None, 0),
    "TQ1_0": (52, None, 0),
    "TQ2_0": (64, None, 0),
}


def _set_f16(blocks: np.ndarray, offset: int, values: np.ndarray) -> None:
    blocks[:, offset : offset + 2] = values.astype("<f2").view(np.uint8).reshape(-1, 2)


def _set_scales(name: str, blocks: np.ndarray, scale: np.ndarray) -> None:
    """Writes each block's scale (float32 [blocks]) into its bytes, in place."""
    if name == "IQ1_M":  # an f16 spread over the top four bits of four 16-bit words
        bits = scale.astype("<f2").view(np.uint16)
        for i in range(4):
            high = (bits >> (4 * i)) & 0xF
            blocks[:, 49 + 2 * i] = (blocks[:, 49 + 2 * i] & 0x0F) | (high << 4).astype(np.uint8)
    elif name == "MXFP4":  # a power of two
        blocks[:, 0] = np.clip(np.round(np.log2(scale)) + 128, 1, 254).astype(np.uint8)
    elif name == "NVFP4":  # four unsigned e4m3 scales; powers of two are enough
        exponent = np.clip(np.round(np.log2(scale)) + 8, 1, 14).astype(np.uint8)
        blocks[:, :4] = (exponent << 3)[:, None]
    else:
        at, minimum_at, centre = _SCALES[name]
        _set_f16(blocks, at, scale)
        if minimum_at is not None:
            _set_f16(blocks, minimum_at, scale * centre)


def random_blocks(name: str, shape: tuple[int, ...], std: float, bits: RandomBits) -> np.ndarray:
    """Random valid blocks of a ggml type, uint8 [*shape[:-1], row bytes]; `std` is the deviation of their values."""
    ggml_type = GGMLQuantizationType[name]
    elements, size = gguf.GGML_QUANT_SIZES[ggml_type]
    count = int(np.prod(shape)) // elements
    if shape[-1] % elements:
        raise ValueError(f"{name} needs rows of a multiple of {elements} elements, not {shape[-1]}")
    blocks = bits.integers(count * size).reshape(count, size)
    if name == "TQ1_0":  # each byte holds a fraction of 3^5: any byte below 243 scaled up, as ggml packs it
        packed = blocks[:, :52].astype(np.uint16) % 243
        blocks[:, :52] = ((packed * 256 + 242) // 243).astype(np.uint8)
    elif name == "TQ2_0":  # two bits a value, of which 3 is never written
        for shift in (0, 2, 4, 6):
            three = (blocks[:, :64] >> shift) & 3 == 3
            blocks[:, :64] = np.where(three, blocks[:, :64] & ~np.uint8(2 << shift), blocks[:, :64])
    spread = 2.0 ** (np.floor(3 * bits.uniform(count)) - 1)  # blocks differ in scale by 1/2, 1, 2
    if name in _SCALES:  # and in sign, which keeps values centred where a type's codes are not
        spread *= np.where(bits.uniform(count) < 0.5, -1.0, 1.0)
    _set_scales(name, blocks, spread.astype(np.float32) / 16)
    measured = float(gguf.quants.dequantize(blocks.reshape(-1), ggml_type).std())
    _set_scales(name, blocks, (spread * (std / measured) / 16).astype(np.float32))
    return blocks.reshape(*shape[:-1], shape[-1] // elements * size)
