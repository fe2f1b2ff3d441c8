"""The plainest form of both operations, in float32: what every backend is compared with."""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from .pages import FLOAT16_MAX, PAGE_SIZE, KVPages


def quantize_rows(rows: jax.Array, dtype: Any) -> tuple[jax.Array, jax.Array | None]:
    """float32 [..., D] as rows of a page: (values, scales [...] or None).

    float16 saturates. int8 rows are multiples of their largest magnitude / 127.
    """
    if dtype == jnp.int8:
        largest = jnp.abs(rows).max(-1, initial=0.0)
        codes = jnp.round(rows * jnp.where(largest > 0, 127.0 / largest, 0.0)[..., None])
        return codes.astype(jnp.int8), largest * (1.0 / 127.0)
    if dtype == jnp.float16:
        rows = jnp.clip(rows, -FLOAT16_MAX, FLOAT16_MAX)
    return rows.astype(dtype), None


def append_rows(
    pool: KVPages, k: jax.Array, v: jax.Array, tables: jax.Array, positions: jax.Array, *, layer: Any
) -> KVPages:
    """As api.append_rows, batch form."""
    slot = jnp.maximum(positions, 0)
    page = jnp.take_along_axis(tables, slot // PAGE_SIZE, axis=1, mode="fill", fill_value=pool.num_pages)
    page = jnp.where((positions >= 0) & (page >= 0), page, pool.num_pages)  # out of range, hence dropped
    offset = slot % PAGE_SIZE

    def write(pages: jax.Array, scales: jax.Array | None, new: jax.Array) -> tuple[jax.Array, jax.Array | None]:
        rows, factors = quantize_rows(new, pages.dtype)
        pages = pages.at[layer, page, :, offset].set(rows, mode="drop")
        return pages, None if scales is None else scales.at[layer, page, :, offset].set(factors, mode="drop")

    keys, key_scales = write(pool.keys, pool.key_scales, k)
    values, value_scales = write(pool.values, pool.value_scales, v)
    return KVPages(keys, values, key_scales, value_scales)


def paged_attention(
    q: jax.Array,
    pool: KVPages,
    tables: jax.Array,
    positions: jax.Array,
    *,
    layer: Any,
    scale: float,
    window: Any,
    softcap: float = 0.0,
    sinks: jax.Array | None = None,
    value_dim: int,
) -> jax.Array:
    """As api.paged_attention, batch form, over everything the tables name."""
    batch, tokens, heads, _ = q.shape
    kv_heads = pool.keys.shape[2]

    def rows(pages: jax.Array, scales: jax.Array | None) -> jax.Array:
        """[B, kv_heads, S, D] float32 of all positions S of the tables."""
        taken = pages[layer, tables].astype(jnp.float32)  # [B, pages, kv_heads, PAGE_SIZE, D]
        if scales is not None:
            taken = taken * scales[layer, tables][..., None]
        return taken.swapaxes(1, 2).reshape(batch, kv_heads, -1, pages.shape[-1])

    k = rows(pool.keys, pool.key_scales)
    v = k[..., :value_dim] if pool.latent else rows(pool.values, pool.value_scales)
    q = (q * scale).reshape(batch, tokens, kv_heads, heads // kv_heads, -1)
    scores = jnp.einsum("btkgd,bksd->bkgts", q, k, precision=lax.Precision.HIGHEST)
    if softcap:
        scores = softcap * jnp.tanh(scores / softcap)
    distance = positions[:, :, None] - jnp.arange(k.shape[2])  # [B, T, S]
    seen = (distance >= 0) & ((distance < window) | (window == 0))
    scores = jnp.where(seen[:, None, None], scores, -jnp.inf)
    if sinks is not None:
        sink = jnp.broadcast_to(sinks.reshape(kv_heads, -1, 1, 1), (*scores.shape[:-1], 1))
        scores = jnp.concatenate([scores, sink], axis=-1)
    weights = jnp.where(jnp.isneginf(scores), 0.0, jax.nn.softmax(scores, axis=-1))[..., : k.shape[2]]
    used = seen.any(1)  # [B, S]; other rows may hold anything, NaN too
    v = jnp.where(used[:, None, :, None], v, 0.0)
    out = jnp.einsum("bkgts,bksd->btkgd", weights, v, precision=lax.Precision.HIGHEST)
    return out.reshape(batch, tokens, heads, value_dim)
