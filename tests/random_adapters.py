"""Random adapters of tiny models, the same on every machine, and the plain arithmetic they are compared with."""

from collections.abc import Callable, Mapping
from types import MappingProxyType

import numpy as np
from random_blocks import RandomBits

from realm_jax.lora.adapter import Adapter, Pair, Place, name_of
from realm_jax.model.adapters import EMBEDDING


def random_adapter(
    shapes: Mapping[Place, tuple[int, ...]],
    rank: int | Callable[[Place], int],
    *,
    architecture: str = "llama",
    alpha: float = 8.0,
    seed: int = 0,
    gain: float = 0.3,
    dtype: type = np.float16,
    takes: Callable[[Place], bool] = lambda place: True,
) -> Adapter:
    """An adapter of every matrix (of two axes) that it `takes`, whose product is about `gain` times a usual weight."""
    pairs = {}
    for place, shape in sorted(shapes.items(), key=lambda item: name_of(item[0])):
        if len(shape) != 2 or not takes(place):
            continue
        n, k = shape[::-1] if place[0] == EMBEDDING else shape
        r = rank(place) if callable(rank) else rank
        bits = RandomBits(seed, f"{name_of(place)}/{r}")

        def normal(rows: int, columns: int, deviation: float, bits: RandomBits = bits) -> np.ndarray:
            unit = (2 * bits.uniform(rows * columns) - 1).reshape(rows, columns)
            return (3**0.5 * deviation * unit).astype(dtype)

        # The embedding's A is looked up row by row, and the sum over ranks divided by alpha / r.
        deviation = 1.0 if place[0] == EMBEDDING else k**-0.5
        a = normal(k, r, deviation) if place[0] == EMBEDDING else normal(r, k, deviation)
        pairs[place] = Pair(a, normal(n, r, gain * r**0.5 / alpha), alpha / r)
    return Adapter(architecture, MappingProxyType(pairs))


def nmse(reference: np.ndarray, other: np.ndarray) -> float:
    """sum((a - b)^2) / sum(a^2)."""
    a, b = np.asarray(reference, np.float64), np.asarray(other, np.float64)
    return float(((a - b) ** 2).sum() / (a**2).sum())
