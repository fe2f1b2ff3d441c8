"""Attention of one sequence over its cached and its new rows, in fixed-size blocks of positions."""

import jax
import jax.numpy as jnp
from jax import lax

from realm_jax.cache import BLOCK_PAGES, BLOCK_SIZE, CacheView
from realm_jax.model.ops import softcap as apply_softcap
from realm_jax.numerics import exp

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
    grouped = q.reshape(tokens, kv_heads, group, head_dim) * scale
    latent = values.shape[-1] == 0
    num_pages = cache.pool.num_pages
    flat = (cache.pool.keys.shape[0] * num_pages, *cache.pool.keys.shape[2:-1])  # sizes in full: values may be empty
    pool_keys = cache.pool.keys.reshape(*flat, head_dim)  # [layers * pages, page, kv_heads, dim]
    pool_values = cache.pool.values.reshape(*flat, values.shape[-1])
    lookback = jnp.where(window > 0, window, jnp.iinfo(jnp.int32).max)

    def rows(new: jax.Array, pool: jax.Array, pages: jax.Array, at: jax.Array) -> jax.Array:
        """Rows of the block [BLOCK_SIZE, kv_heads, dim]: new where at >= 0, else cached."""
        cached = pool[layer * num_pages + pages].reshape(BLOCK_SIZE, *pool.shape[2:])
        fresh = new[jnp.clip(at, 0, tokens - 1)]
        return jnp.where((at >= 0)[:, None, None], fresh, cached.astype(jnp.float32))

    def step(block: jax.Array, carry: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        top, mixed = carry  # running maximum [T, kv_heads, group]; weighted values, and the sum of weights behind them
        pages = lax.dynamic_slice(cache.table, (block * BLOCK_PAGES,), (BLOCK_PAGES,))
        at_position = block * BLOCK_SIZE + jnp.arange(BLOCK_SIZE)
        at = at_position - cache.length
        k = rows(keys, pool_keys, pages, at)
        v = k[..., :value_dim] if latent else rows(values, pool_values, pages, at)
        scores = jnp.einsum("tkgd,skd->tkgs", grouped, k, precision=lax.Precision.HIGHEST)
        scores = apply_softcap(scores, softcap)
        distance = positions[:, None] - at_position[None, :]  # [T, BLOCK_SIZE]
        seen = (distance >= 0) & (distance < lookback)
        scores = jnp.where(seen[:, None, None, :], scores, _MASKED)
        new_top = jnp.maximum(top, scores.max(-1))
        weights = jnp.where(seen[:, None, None, :], exp(scores - new_top[..., None]), 0.0)
        # A column of ones beside the values sums the weights in the same product.
        v = jnp.concatenate([v, jnp.ones((*v.shape[:-1], 1), jnp.float32)], axis=-1)
        added = jnp.einsum("tkgs,skd->tkgd", weights, v, precision=lax.Precision.HIGHEST)
        return new_top, mixed * exp(top - new_top)[..., None] + added

    shape = (tokens, kv_heads, group)
    start = (jnp.full(shape, _MASKED), jnp.zeros((*shape, value_dim + 1)))
    top, mixed = lax.fori_loop(0, cache.blocks, step, start)
    total = mixed[..., value_dim]
    if sinks is not None:
        # The sink joins the normalisation as a row of its own whose value is zero.
        sink = sinks.reshape(kv_heads, group)
        new_top = jnp.maximum(top, sink)
        keep = exp(top - new_top)
        total = total * keep + exp(sink - new_top)
        mixed = mixed * keep[..., None]
    return (mixed[..., :value_dim] / jnp.maximum(total, 1e-30)[..., None]).reshape(tokens, heads, value_dim)
