"""The XLA backend: float32 arithmetic, blocks of 128 keys at a time, in tiles of 128 queries.

A query's result has the same bits on the CPU however many queries, keys and sequences are in the call. For that, keys
are visited in blocks aligned to their positions, a block beyond a query's sight leaves its result as it is, and exp,
tanh and sums are this library's own. The order in which XLA's CPU dots sum does not depend on the number of rows, from
two on, where the columns are a multiple of WIDTH and at most WIDEST: values are padded to that, and taken in parts.
tests/test_flash_attention.py holds it to that. On other platforms XLA promises nothing.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.numerics import exp, log, row_sum, tanh

from .case import KEY_BLOCK, NOTHING, Options, block_span, key_span, visible

QUERY_TILE = 128  # queries whose scores exist at once
WIDTH, WIDEST = 64, 256


def unsupported(q: Any, k: Any, v: Any, options: Options, interpreted: bool) -> str | None:
    """Why this backend does not take a case: it takes all."""
    return None


def forward(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    bounds: jax.Array,
    sinks: jax.Array | None,
    options: Options,
) -> tuple[jax.Array, jax.Array]:
    """q [B, T, heads, D], k [B, S, kv_heads, D], v [B, S, kv_heads, DV], bounds int32 [B, 4], sinks f32 [B, heads].

    Returns out [B, T, heads, DV] of q's type and lse float32 [B, heads, T].
    """
    batch, length, heads, _ = q.shape
    kv_heads, value_dim = k.shape[2], v.shape[3]
    group = heads // kv_heads
    k, v = _whole_blocks(k), jnp.pad(_whole_blocks(v), ((0, 0),) * 3 + ((0, -value_dim % WIDTH),))
    tile = min(length, QUERY_TILE)
    unit = _unit(options)
    sink = None if sinks is None else jnp.tile(sinks.reshape(batch, kv_heads, 1, group), (1, 1, tile, 1))
    keys = bounds[:, 1, None, None, None]

    def one(i, carry):
        out, lse = carry
        at = jnp.minimum(i * tile, length - tile)  # the last tile overlaps its neighbour when T is no multiple
        rows = _heads_first(_at(q, at, tile), kv_heads) * _factor(options)  # [B, kv_heads, tile * group, D]
        low, high, position, fresh = _tile(bounds, at, tile, group, options)

        def step(j, state):
            top, total, mixed = state  # running maximum, sum of weights, weighted values
            block, key = _block(k, v, j)
            scores, _ = _scores(rows, block[0], options)
            seen = fresh & visible(position, key, options) & (key < keys)
            new_top = jnp.maximum(top, jnp.where(seen, scores, NOTHING).max(-1))
            weights = jnp.where(seen, exp((scores - new_top[..., None]) * unit), 0.0)
            values = jnp.where((key < keys).swapaxes(-1, -2), block[1], 0.0)
            parts = [_product(weights, values[..., c : c + WIDEST], 3, 2) for c in range(0, values.shape[3], WIDEST)]
            keep = exp((top - new_top) * unit)
            total = total * keep + row_sum(weights)[..., 0]
            return new_top, total, mixed * keep[..., None] + jnp.concatenate(parts, -1)

        shape = rows.shape[:3]
        state = (jnp.full(shape, NOTHING), jnp.zeros(shape), jnp.zeros((*shape, v.shape[3])))
        top, total, mixed = lax.fori_loop(low, high, step, state)
        some = top > 0.1 * NOTHING
        top = top * unit
        if sink is not None:  # a row of its own whose value is zero
            logit = _pair(sink.reshape(batch, kv_heads, tile * group), 2)
            new_top = jnp.maximum(top, logit)
            keep = exp(top - new_top)
            top, total, mixed = new_top, total * keep + exp(logit - new_top), mixed * keep[..., None]
        total = jnp.where(some, total, 1.0)
        mixed = jnp.where(some[..., None], mixed[..., :value_dim], 0.0) / total[..., None]
        part = jnp.where(some, top + log(total), -jnp.inf)
        part = part[:, :, : tile * group].reshape(batch, kv_heads, tile, group).swapaxes(2, 3)
        out = lax.dynamic_update_slice(out, _tokens_first(mixed, tile, heads).astype(out.dtype), (0, at, 0, 0))
        return out, lax.dynamic_update_slice(lse, part.reshape(batch, heads, tile), (0, 0, at))

    carry = (jnp.zeros((batch, length, heads, value_dim), q.dtype), jnp.zeros((batch, heads, length)))
    return lax.fori_loop(0, -(-length // tile), one, carry)


def backward(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    bounds: jax.Array,
    lse: jax.Array,
    delta: jax.Array,
    grad: jax.Array,
    options: Options,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Gradients of q, k and v, of their types, given ``grad`` of the output.

    lse float32 [B, heads, T] is the forward's with ``case.ABSENT`` for queries that saw nothing; delta, alike, is the
    sum over a query's outputs of grad * out, less the gradient of its log-sum-exp (Dao 2023, arXiv:2307.08691, 3.1).
    """
    batch, length, heads, _ = q.shape
    keys_given, kv_heads = k.shape[1:3]
    group = heads // kv_heads
    types = q.dtype, k.dtype, v.dtype
    k, v = _whole_blocks(k), _whole_blocks(v)
    tile = min(length, QUERY_TILE)
    keys = bounds[:, 1, None, None, None]

    def row_values(a, at):  # [B, heads, T] -> [B, kv_heads, tile * group, 1], in the order of _heads_first
        part = lax.dynamic_slice_in_dim(a, at, tile, 2).reshape(batch, kv_heads, group, tile)
        return _pair(part.swapaxes(2, 3).reshape(batch, kv_heads, tile * group), 2)[..., None]

    def one(i, carry):
        dq, dk, dv = carry
        at = jnp.minimum(i * tile, length - tile)
        low, high, position, fresh = _tile(bounds, at, tile, group, options)
        rows = jnp.where(fresh, _heads_first(_at(q, at, tile), kv_heads), 0.0)
        arriving = jnp.where(fresh, _heads_first(_at(grad, at, tile), kv_heads), 0.0)
        top, mean = row_values(lse, at), row_values(delta, at)
        # Rows the overlap of the last tile has counted already are left out of the sums over queries.
        index = jnp.arange(rows.shape[2])[:, None]
        counted = fresh & (at + index // group >= i * tile) & (index < tile * group)

        def step(j, state):
            drows, dk, dv = state
            block, key = _block(k, v, j)
            known = (key < keys).swapaxes(-1, -2)
            block = [jnp.where(known, a, 0.0) for a in block]
            scores, slope = _scores(rows * _factor(options), block[0], options)
            seen = fresh & visible(position, key, options) & (key < keys)
            weights = jnp.where(seen, exp(scores * _unit(options) - top), 0.0)
            dscores = weights * (_product(arriving, block[1], 3, 3) - mean) * slope * options.scale
            drows = drows + _product(dscores, block[0], 3, 2)
            dk = _add_block(dk, j, _product(jnp.where(counted, dscores, 0.0), rows, 2, 2))
            dv = _add_block(dv, j, _product(jnp.where(counted, weights, 0.0), arriving, 2, 2))
            return drows, dk, dv

        drows, dk, dv = lax.fori_loop(low, high, step, (jnp.zeros(rows.shape), dk, dv))
        part = _tokens_first(drows, tile, heads).astype(dq.dtype)
        return lax.dynamic_update_slice(dq, part, (0, at, 0, 0)), dk, dv

    def sums(a):  # [B, kv_heads, S, dim]
        return jnp.zeros((batch, kv_heads, a.shape[1], a.shape[3]))

    carry = (jnp.zeros(q.shape, types[0]), sums(k), sums(v))
    dq, dk, dv = lax.fori_loop(0, -(-length // tile), one, carry)
    dk, dv = (a[:, :, :keys_given].swapaxes(1, 2) for a in (dk, dv))
    return dq, dk.astype(types[1]), dv.astype(types[2])


def _tile(bounds: jax.Array, at: Any, tile: int, group: int, options: Options) -> tuple[Any, ...]:
    """Of the queries at..at+tile: the blocks of keys that any sequence's may see, the position of every row
    [B, 1, tile * group, 1], and whether it is a query rather than padding."""
    start, keys, queries = bounds[:, 0], bounds[:, 1], bounds[:, 2]
    first = start + at
    span = block_span(key_span(first, first + tile - 1, keys, options), KEY_BLOCK)
    low, high = span[0].min(), jnp.where(queries > at, span[3], 0).max()
    row = at + _pair(jnp.repeat(jnp.arange(tile), group), 0)[:, None]
    return low, high, start[:, None, None, None] + row, row < queries[:, None, None, None]


def _scores(rows: jax.Array, keys: jax.Array, options: Options) -> tuple[jax.Array, jax.Array | float]:
    """Scores over ``_unit`` [B, kv_heads, rows, KEY_BLOCK] of rows times ``_factor``, and the soft-cap's derivative.

    Products beside sums may or may not be contracted with them, so there are none: the soft-cap divides the rows, and
    multiplies differences.
    """
    scores = _product(rows, keys, 3, 3)
    if not options.softcap:
        return scores, 1.0
    squashed = tanh(scores)
    return squashed, 1.0 - squashed * squashed


def _factor(options: Options) -> float:
    return options.scale / options.softcap if options.softcap else options.scale


def _unit(options: Options) -> float:
    return options.softcap or 1.0


def _block(k: jax.Array, v: jax.Array, j: Any) -> tuple[list[jax.Array], jax.Array]:
    """Block j of keys and values, float32 [B, kv_heads, KEY_BLOCK, dim], and its positions [1, KEY_BLOCK]."""
    parts = [_at(a, j * KEY_BLOCK, KEY_BLOCK).swapaxes(1, 2).astype(jnp.float32) for a in (k, v)]
    return parts, j * KEY_BLOCK + jnp.arange(KEY_BLOCK)[None]


def _add_block(sums: jax.Array, j: Any, part: jax.Array) -> jax.Array:
    old = lax.dynamic_slice_in_dim(sums, j * KEY_BLOCK, KEY_BLOCK, 2)
    return lax.dynamic_update_slice_in_dim(sums, old + part, j * KEY_BLOCK, 2)


def _whole_blocks(a: jax.Array) -> jax.Array:
    return jnp.pad(a, ((0, 0), (0, -a.shape[1] % KEY_BLOCK), (0, 0), (0, 0)))


def _at(a: jax.Array, at: Any, size: int) -> jax.Array:
    return lax.dynamic_slice_in_dim(a, at, size, 1)


def _heads_first(a: jax.Array, kv_heads: int) -> jax.Array:
    """[B, tile, heads, dim] -> float32 [B, kv_heads, tile * group, dim]: what shares a head of keys is one matrix."""
    batch, tile, heads, dim = a.shape
    a = a.astype(jnp.float32).reshape(batch, tile, kv_heads, heads // kv_heads, dim).transpose(0, 2, 1, 3, 4)
    return _pair(a.reshape(batch, kv_heads, -1, dim), 2)


def _tokens_first(a: jax.Array, tile: int, heads: int) -> jax.Array:
    """The reverse of ``_heads_first``."""
    batch, kv_heads, _, dim = a.shape
    group = heads // kv_heads
    a = a[:, :, : tile * group].reshape(batch, kv_heads, tile, group, dim).transpose(0, 2, 1, 3, 4)
    return a.reshape(batch, tile, heads, dim)


def _pair(a: jax.Array, axis: int) -> jax.Array:
    """A lone row becomes two, for products of a matrix and a vector sum in another order."""
    return jnp.concatenate([a, a], axis) if a.shape[axis] == 1 else a


def _product(a: jax.Array, b: jax.Array, a_axis: int, b_axis: int) -> jax.Array:
    """Matrix products over the two leading axes."""
    numbers = (((a_axis,), (b_axis,)), ((0, 1), (0, 1)))
    return lax.dot_general(a, b, numbers, precision=lax.Precision.HIGHEST)
