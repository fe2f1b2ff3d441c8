"""Rotary position embeddings: from metadata to one frequency table per kind of layer (host side, numpy only)."""

import math
from dataclasses import dataclass
from typing import Literal

import numpy as np

# YaRN: pairs that turn more often than this over the original context are left alone, less often are interpolated.
BETA_FAST, BETA_SLOW = 32.0, 1.0

Scaling = Literal["none", "linear", "yarn", "longrope"]


@dataclass(frozen=True)
class RopeConfig:
    """One kind of rotation. Layers with a sliding window may use another one than the rest."""

    pairs: Literal["norm", "neox"]
    dim: int  # rotated leading elements of a head; the rest pass unchanged
    base: float
    factor: float = 1.0  # context extension: positions are divided by it (linear, yarn)
    scaling: Scaling = "none"
    original_context: int = 0  # tokens the model was trained on before the extension
    magnitude: float = 1.0  # cosines and sines are multiplied by it
    extrapolation: float = 0.0  # YaRN's mixing weight; 0 means plain interpolation


def inverse_frequencies(rope: RopeConfig, factors: np.ndarray | None = None) -> np.ndarray:
    """Angle per position of each rotated pair.

    Args:
        rope: the rotation.
        factors: optional float32 [dim / 2] divisors (Llama 3's rope_freqs, longrope's long or short factors).

    Returns:
        float32 [dim / 2].

    YaRN (Peng et al. 2023, arXiv:2309.00071) keeps fast pairs as they are, interpolates slow ones, and blends between.
    """
    half = rope.dim // 2
    extrapolated = rope.base ** (-np.arange(half, dtype=np.float64) * 2.0 / rope.dim)
    if factors is not None:
        extrapolated = extrapolated / factors.astype(np.float64)
    interpolated = extrapolated / rope.factor
    if rope.extrapolation == 0.0:
        return interpolated.astype(np.float32)

    def correction_dim(rotations: float) -> float:
        return rope.dim * math.log(rope.original_context / (rotations * 2 * math.pi)) / (2 * math.log(rope.base))

    low = max(0.0, math.floor(correction_dim(BETA_FAST)))
    high = min(rope.dim - 1.0, math.ceil(correction_dim(BETA_SLOW)))
    ramp = 1.0 - np.clip((np.arange(half) - low) / max(0.001, high - low), 0.0, 1.0)
    mix = ramp * rope.extrapolation
    return (interpolated * (1.0 - mix) + extrapolated * mix).astype(np.float32)
