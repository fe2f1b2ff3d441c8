"""The XLA backend: float32 activations, weights dequantized a tile of rows at a time in front of one dot.

A tile is sliced straight out of the stack and is small enough to stay in cache, so no full-precision copy of a weight
exists. A row's result has the same bits however many rows are in the call. That leans on how XLA's CPU dots (YNNPACK)
choose a kernel and its order of summing over K: by the number of columns, here the tile, and by K, never by the number
of rows, from two rows on; a single row is computed as two. The transposed product, weight times x, would be faster for
few rows and is not invariant. tests/test_quant_matmul.py holds it to that, bit for bit.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from .formats import Format
from .reference import dequantize, elements, group_parameters

TILE_BYTES = 4 << 20  # of dequantized float32 weight
MIN_TILE = 16  # rows; below it the dot depends on the number of rows of x: matrix-vector code, or K split for threads


def matmul(x: jax.Array, arrays: dict[str, Any], fmt: Format, lead: tuple[Any, ...]) -> jax.Array:
    """x [M, K] float32 times weight ``lead`` (an index a leading axis) of a stack [..., N, K] -> [M, N]."""
    n, k = _rows(arrays, lead), x.shape[-1]
    m = x.shape[0]
    if m == 1:
        x = jnp.concatenate([x, x])  # a lone row would take XLA's matrix-vector code, which sums in another order
    tile = _tile(n, k)

    def dot(start):  # [M, tile]
        weight = _dequantize(_slice(arrays, lead, start, tile), fmt, start if tile < n else x)
        if n < MIN_TILE:
            weight = jnp.pad(weight, ((0, MIN_TILE - n), (0, 0)))
        return lax.dot_general(x, weight, (((1,), (1,)), ((), ())), precision=lax.Precision.HIGHEST)

    if tile == n:
        return dot(0)[:m, :n]

    def step(i, out):
        start = jnp.minimum(i * tile, n - tile)  # the last tile overlaps its neighbour when N is no multiple
        return lax.dynamic_update_slice(out, dot(start), (jnp.int32(0), start))

    return lax.fori_loop(0, -(-n // tile), step, jnp.zeros((x.shape[0], n), jnp.float32))[:m]


def matmul_transposed(g: jax.Array, arrays: dict[str, Any], fmt: Format, lead: tuple[Any, ...]) -> jax.Array:
    """g [M, N] float32 times weight [N, K] -> [M, K] float32: the gradient of ``matmul`` with respect to x."""
    n, k = _rows(arrays, lead), fmt.columns(arrays)
    tile = _tile(n, k)

    def dot(start, part):
        weight = _dequantize(_slice(arrays, lead, start, tile), fmt, start if tile < n else g)
        return jnp.matmul(part, weight, precision=lax.Precision.HIGHEST)

    if tile == n:
        return dot(0, g)

    def step(i, out):
        start = jnp.minimum(i * tile, n - tile)
        part = lax.dynamic_slice(g, (jnp.int32(0), start), (g.shape[0], tile))
        fresh = start + jnp.arange(tile) >= i * tile  # rows the overlap has counted already are left out
        return out + dot(start, jnp.where(fresh, part, 0.0))

    return lax.fori_loop(0, -(-n // tile), step, jnp.zeros((g.shape[0], k), jnp.float32))


def _dequantize(arrays: dict[str, Any], fmt: Format, varying: Any) -> jax.Array:
    """As the reference; ``varying`` is any value that changes from one turn of the surrounding loop to the next.

    Two barriers against XLA's optimizer. Group parameters are decoded once; else their decoding is fused into every
    element's. And the shifts that take codes out of words stay inside the loop; hoisted out of it they become loads of
    unknown numbers, and the loop is no longer vectorised (3 to 5 times slower).
    """
    if fmt.dense:
        return dequantize(arrays, fmt)
    one, _ = lax.optimization_barrier((jnp.uint32(1), varying))
    return elements(arrays, lax.optimization_barrier(group_parameters(arrays, fmt)), fmt, one)


def _tile(n: int, k: int) -> int:
    """Rows of the weight dequantized at once."""
    rows = max(MIN_TILE, TILE_BYTES // (4 * k) // 8 * 8)
    return n if rows >= n else rows


def _rows(arrays: dict[str, Any], lead: tuple[Any, ...]) -> int:
    return next(iter(arrays.values())).shape[len(lead)]


def _slice(arrays: dict[str, Any], lead: tuple[Any, ...], start: Any, tile: int) -> dict[str, Any]:
    """Rows start..start+tile of weight ``lead`` of every array, [tile, *]."""
    out = {}
    for name, a in arrays.items():
        index = (*lead, start, 0)
        out[name] = lax.dynamic_slice(a, index, (*(1,) * len(lead), tile, a.shape[-1])).reshape(tile, a.shape[-1])
    return out
