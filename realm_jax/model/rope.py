"""Rotary position embeddings: from metadata to tables of cosines and sines per kind of layer (host side, numpy)."""

import math
from dataclasses import dataclass
from typing import Literal

import numpy as np

# YaRN: pairs that turn more often than this over the original context are left alone, less often are interpolated.
BETA_FAST, BETA_SLOW = 32.0, 1.0

FINE_POSITIONS = 64  # see rotation_tables

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
        float64 [dim / 2], radians.

    YaRN (Peng et al. 2023, arXiv:2309.00071) keeps fast pairs as they are, interpolates slow ones, and blends between.
    """
    half = rope.dim // 2
    extrapolated = rope.base ** (-np.arange(half, dtype=np.float64) * 2.0 / rope.dim)
    if factors is not None:
        extrapolated = extrapolated / factors.astype(np.float64)
    interpolated = extrapolated / rope.factor
    if rope.extrapolation == 0.0:
        return interpolated

    def correction_dim(rotations: float) -> float:
        return rope.dim * math.log(rope.original_context / (rotations * 2 * math.pi)) / (2 * math.log(rope.base))

    low = max(0.0, math.floor(correction_dim(BETA_FAST)))
    high = min(rope.dim - 1.0, math.ceil(correction_dim(BETA_SLOW)))
    ramp = 1.0 - np.clip((np.arange(half) - low) / max(0.001, high - low), 0.0, 1.0)
    mix = ramp * rope.extrapolation
    return interpolated * (1.0 - mix) + extrapolated * mix


def rotation_tables(
    ropes: tuple[RopeConfig, ...], context: int, factors: np.ndarray | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Cosines and sines of every position up to a context length, as two small tables.

    A position is split into a multiple of FINE_POSITIONS and a rest, whose rotations the device combines by the
    addition theorem: exact to float32 at any length, where an angle in float32 loses digits as it grows.

    Args:
        ropes: kinds of rotation, of equal dim.
        context: positions to cover.
        factors: for the first kind, see inverse_frequencies.

    Returns:
        coarse float32 [kinds + 1, ceil(context / FINE_POSITIONS), 2, dim / 2] and fine float32
        [kinds + 1, FINE_POSITIONS, 2, dim / 2], cosines before sines. The last kind rotates by nothing. A kind's
        magnitude is in its coarse table.
    """
    coarse, fine = [], []
    for kind, rope in enumerate(ropes):
        frequencies = inverse_frequencies(rope, factors if kind == 0 else None)
        steps = np.arange(-(-context // FINE_POSITIONS))[:, None] * FINE_POSITIONS * frequencies
        rests = np.arange(FINE_POSITIONS)[:, None] * frequencies
        coarse.append(np.stack([np.cos(steps), np.sin(steps)], axis=1) * rope.magnitude)
        fine.append(np.stack([np.cos(rests), np.sin(rests)], axis=1))
    for tables in (coarse, fine):
        tables.append(np.zeros_like(tables[0]))
        tables[-1][:, 0] = 1.0
    return np.stack(coarse).astype(np.float32), np.stack(fine).astype(np.float32)
