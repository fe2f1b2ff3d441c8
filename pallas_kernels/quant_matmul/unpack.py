"""From codes in words to values, for the Pallas kernels: a handful of arithmetic instructions per weight, no gathers.

A code is brought into the top of a float's mantissa under the exponent of 1.0, by a shift and a selection of bits per
plane; read as a float32 it is f = 1 + code / 2^bits, so that scale * (code - bias + delta) + offset is one multiply and
add of f. Codebooks are computed: a table of magnitudes under a sign bit that bends upwards is the largest of a few
lines, IQ4's is a rounded polynomial of degree four, and what is left is a tree of selects.
"""

import functools
import itertools
from collections.abc import Callable
from functools import cache
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import lax

from .formats import Format
from .reference import IQ1_DELTA, Groups, _e8m0, _ue4m3

ONE = 0x3F800000  # 1.0; kernels get it at run time: as a constant, the compiler would load it again for every weight
MANTISSA = 23


def fraction(words: list[tuple[Any, int]], fmt: Format, one: Any) -> Any:
    """f = 1 + code / 2^bits, float32.

    words: for each plane the uint32 words and the bit at which the code's part starts.
    one: uint32 ONE, unknown to the compiler.
    """
    at, out = MANTISSA - sum(fmt.planes), one
    for (word, first), bits in zip(words, fmt.planes):
        shift = at - first
        moved = word << jnp.uint32(shift) if shift > 0 else word >> jnp.uint32(-shift) if shift else word
        part = moved & jnp.uint32(((1 << bits) - 1) << at)
        out = out | part if out is one else out ^ part  # unlike, so that no compiler takes the chain apart
        at += bits
    return lax.bitcast_convert_type(out, jnp.float32)


def weigher(groups: Groups, fmt: Format) -> Callable[[Any], Any]:
    """f -> weight, for elements that share ``groups`` (scale, offset or None, delta or None)."""
    codes = float(1 << sum(fmt.planes))
    scale, offset, delta = groups
    if fmt.table is None:
        slope = scale * codes
        shift = -(fmt.bias + codes) if delta is None else delta - (fmt.bias + codes)
        constant = scale * shift if offset is None else scale * shift + offset
        return lambda f: f * slope + constant
    value = _table(fmt.table)
    if offset is None:
        return lambda f: value(f) * scale
    return lambda f: value(f) * scale + offset


def scales(stored: Any, kind: str, fmt: Format) -> Any:
    """Stored group numbers (uint8, int8 or floats; nibbles already apart) as float32 factors, before ``super``."""
    if kind == "e8m0":
        return _e8m0(stored, jnp)
    if kind == "ue4m3":
        return _ue4m3(stored, jnp)
    if kind in ("iq1s", "iq1m"):
        stored = stored & jnp.uint32(7)
    out = stored.astype(jnp.int32).astype(jnp.float32) if stored.dtype == jnp.uint32 else stored.astype(jnp.float32)
    return out if (fmt.scale_mul, fmt.scale_add) == (1.0, 0.0) else out * fmt.scale_mul + fmt.scale_add


def delta_of(stored: Any, bit: int) -> Any:
    """IQ1's shift of a run of elements, from its sign in uint32 ``stored``."""
    return jnp.where((stored >> jnp.uint32(bit)) & jnp.uint32(1) != 0, jnp.float32(-IQ1_DELTA), jnp.float32(IQ1_DELTA))


@cache
def _table(table: tuple[int, ...]) -> Callable[[Any], Any]:
    """f -> table[code] as float32, exactly, for f = 1 + code / len(table)."""
    size, half = len(table), len(table) // 2
    if half < 2 or table[half:] != tuple(-v for v in table[:half]):
        return _values(table, size)
    magnitude = _values(table[:half], size)

    def signed(f: Any) -> Any:
        bits = lax.bitcast_convert_type(f, jnp.uint32)
        sign = (bits << jnp.uint32(32 - MANTISSA)) & jnp.uint32(1 << 31)
        rest = lax.bitcast_convert_type(bits & jnp.uint32(0xFFFFFFFF ^ (1 << (MANTISSA - 1))), jnp.float32)
        return lax.bitcast_convert_type(lax.bitcast_convert_type(magnitude(rest), jnp.uint32) ^ sign, jnp.float32)

    return signed


def _values(values: tuple[int, ...], size: int) -> Callable[[Any], Any]:
    """f -> values[code] for f = 1 + code / size."""

    def largest(f: Any) -> Any:
        parts = [f * float(a * size) + float(b - a * size) for a, b in lines]
        return functools.reduce(jnp.maximum, parts)

    def rounded(f: Any) -> Any:
        c = f * float(size) - (size + (len(values) - 1) / 2)  # the code, less the middle of its range
        out = functools.reduce(lambda out, coefficient: out * c + coefficient, coefficients)
        return jnp.floor(out + 0.5)

    def tree(f: Any) -> Any:
        bits = lax.bitcast_convert_type(f, jnp.uint32)
        level, bit = [jnp.float32(v) for v in values], MANTISSA - (size.bit_length() - 1)
        while len(level) > 1:
            odd = bits & jnp.uint32(1 << bit) != 0
            level = [jnp.where(odd, hi, lo) for lo, hi in zip(level[::2], level[1::2])]
            bit += 1
        return level[0]

    if lines := _lines(values):
        return largest
    if coefficients := _polynomial(values):
        return rounded
    return tree


def _lines(values: tuple[int, ...]) -> list[tuple[int, int]]:
    """The lines (a, b) whose largest a * code + b is values[code]; none when values do not bend upwards throughout."""
    steps = [b - a for a, b in itertools.pairwise(values)]
    if steps != sorted(steps):
        return []
    return [(a, values[steps.index(a)] - a * steps.index(a)) for a in sorted(set(steps))]


def _polynomial(values: tuple[int, ...]) -> list[float]:
    """Of degree 4 in code - (len - 1) / 2, highest first: within 0.45 of every value; none when there is none."""
    c, wanted = np.arange(len(values)) - (len(values) - 1) / 2, np.array(values, np.float64)
    weight, best, found = np.ones(len(values)), 0.45, []
    if len(values) < 8:
        return []
    for _ in range(500):  # towards the least maximal error: what is off weighs more (Lawson's iteration)
        fit = np.polyfit(c, wanted, 4, w=weight)
        error = np.abs(np.polyval(fit, c) - wanted)
        if error.max() < best:
            best, found = error.max(), [float(v) for v in fit]
        weight *= 0.5 + error / error.max()
    return found
