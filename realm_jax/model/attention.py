"""Attention of one sequence over its cached and its new rows, in fixed-size blocks of positions."""

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.numerics import exp
from realm_jax.cache import BLOCK_PAGES, BLOCK_SIZE, CacheView
from realm_jax.model.ops import softcap as apply_softcap

_MASKED = -1e30  # finite, so that a block with nothing to see adds exact zeros rather than NaN


def attend(
    q: jax.Array,
    keys: jax.Array,
    values: jax.Array,
    positions: jax.Array,
    cache: CacheView,
    layer: jax.Array,
    *,
    scale: float,
    window: jax.Array,
    softcap: float = 0.0,
    sinks: jax.Array | None = None,
    value_dim: int,
) -> jax.Array:
    """Causal attention with an online softmax (Milakov and Gimelshein 2018, arXiv:1805.02867).

    Args:
        q: float32 [T, heads, head_dim].
        keys: new rows [T, kv_heads, head_dim], at positions cache.length onwards.
        values: new rows [T, kv_heads, dim]; dim 0 means that values are the first value_dim elements of the keys.
        positions: int32 [T]; negative marks padding, whose result is meaningless.
        cache: the sequence's view.
        layer: int32 scalar.
        scale: of the scores.
        window: int32 scalar, how many positions a query sees, itself included; 0 for all.
        softcap: scores become softcap * tanh(scores / softcap); 0 for none.
        sinks: float32 [heads], a logit per head that only takes part in the normalisation.
        value_dim: of the result.

    Returns:
        float32 [T, heads, value_dim].

    Keys are visited in blocks aligned to absolute positions, a block's new rows laid over its cached ones. So sums are
    grouped by position, however a prompt is cut into chunks and whatever the length of the longest sequence in the
    batch: blocks beyond a query's position leave its result as it is, bit for bit.
    """
    tokens, heads, head_dim = q.shape
    kv_heads = keys.shape[1]
    group = heads // kv_heads
    latent = values.shape[-1] == 0
    num_pages = cache.pool.num_pages
    # [layers * pages, kv_heads, page, dim]
    pool_keys, pool_values = (
        a.reshape(a.shape[0] * a.shape[1], *a.shape[2:]) for a in (cache.pool.keys, cache.pool.values)
    )
    # The queries that share a key/value head, of all tokens, are the rows of one product.
    grouped = (q * scale).reshape(tokens, kv_heads, group, head_dim).transpose(1, 0, 2, 3)
    grouped = grouped.reshape(kv_heads, tokens * group, head_dim)
    row_position = jnp.repeat(positions, group)  # [T * group]
    lookback = jnp.where(window > 0, window, jnp.iinfo(jnp.int32).max)

    def rows(new: jax.Array, pool: jax.Array, pages: jax.Array, at: jax.Array) -> jax.Array:
        """Rows of the block [kv_heads, BLOCK_SIZE, dim]: new where at >= 0, else cached."""
        cached = pool[layer * num_pages + pages].transpose(1, 0, 2, 3).reshape(kv_heads, BLOCK_SIZE, pool.shape[-1])
        fresh = new[jnp.clip(at, 0, tokens - 1)].transpose(1, 0, 2)
        return jnp.where((at >= 0)[None, :, None], fresh, cached.astype(jnp.float32))

    def step(block: jax.Array, carry: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        top, mixed = carry  # running maximum [kv_heads, T * group]; weighted values, the sum of weights behind them
        pages = lax.dynamic_slice(cache.table, (block * BLOCK_PAGES,), (BLOCK_PAGES,))
        at_position = block * BLOCK_SIZE + jnp.arange(BLOCK_SIZE)
        at = at_position - cache.length
        k = rows(keys, pool_keys, pages, at)
        v = k[..., :value_dim] if latent else rows(values, pool_values, pages, at)
        scores = apply_softcap(_product(grouped, k, (2, 2)), softcap)  # [kv_heads, T * group, BLOCK_SIZE]
        distance = row_position[:, None] - at_position[None, :]
        seen = (distance >= 0) & (distance < lookback)
        scores = jnp.where(seen, scores, _MASKED)
        new_top = jnp.maximum(top, scores.max(-1))
        weights = jnp.where(seen, exp(scores - new_top[..., None]), 0.0)
        # A column of ones beside the values sums the weights in the same product.
        v = jnp.concatenate([v, jnp.ones((*v.shape[:-1], 1), jnp.float32)], axis=-1)
        return new_top, mixed * exp(top - new_top)[..., None] + _product(weights, v, (2, 1))

    shape = (kv_heads, tokens * group)
    start = (jnp.full(shape, _MASKED), jnp.zeros((*shape, value_dim + 1)))
    top, mixed = lax.fori_loop(0, cache.blocks, step, start)
    total = mixed[..., value_dim]
    if sinks is not None:
        # The sink joins the normalisation as a row of its own whose value is zero.
        sink = jnp.tile(sinks.reshape(kv_heads, group), tokens)
        new_top = jnp.maximum(top, sink)
        keep = exp(top - new_top)
        total = total * keep + exp(sink - new_top)
        mixed = mixed * keep[..., None]
    out = mixed[..., :value_dim] / jnp.maximum(total, 1e-30)[..., None]
    return out.reshape(kv_heads, tokens, group, value_dim).transpose(1, 0, 2, 3).reshape(tokens, heads, value_dim)


def _product(a: jax.Array, b: jax.Array, contracted: tuple[int, int]) -> jax.Array:
    """One matrix product a key/value head, the leading axis of both."""
    numbers = (((contracted[0],), (contracted[1],)), ((0,), (0,)))
    return lax.dot_general(a, b, numbers, precision=lax.Precision.HIGHEST)
