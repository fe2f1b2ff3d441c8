"""The plainest attention, in float32 with all scores at once: what every backend is measured against."""

import jax
import jax.numpy as jnp
from jax import lax

from .case import Options, visible


def attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    bounds: jax.Array,
    sinks: jax.Array | None,
    options: Options,
) -> tuple[jax.Array, jax.Array]:
    """q [B, T, heads, D], k [B, S, kv_heads, D], v [B, S, kv_heads, DV], bounds as ``case.bounds_of``, sinks [heads].

    Returns [B, T, heads, DV] of q's type and the float32 log-sum-exp [B, heads, T]. Differentiable by jax.grad.
    """
    group = q.shape[2] // k.shape[2]
    wide = [a.astype(jnp.float32) for a in (q, jnp.repeat(k, group, axis=2), jnp.repeat(v, group, axis=2))]
    start, keys, queries = (bounds[:, i, None, None, None] for i in range(3))
    row = jnp.arange(q.shape[1])[:, None]
    key = jnp.arange(k.shape[1])[None, :]
    seen = visible(start + row, key, options) & (key < keys) & (row < queries)  # [B, 1, T, S]

    scores = jnp.einsum("bthd,bshd->bhts", wide[0], wide[1], precision=lax.Precision.HIGHEST) * options.scale
    if options.softcap:
        scores = options.softcap * jnp.tanh(scores / options.softcap)
    scores = jnp.where(seen, scores, -jnp.inf)
    some = seen.any(-1)  # [B, 1, T]
    sink = -jnp.inf if sinks is None else sinks.astype(jnp.float32)[None, :, None]
    top = lax.stop_gradient(jnp.where(some, jnp.maximum(scores.max(-1), sink), 0.0))  # [B, heads, T]
    weights = jnp.exp(scores - top[..., None])
    total = jnp.where(some, weights.sum(-1) + jnp.exp(sink - top), 1.0)
    out = jnp.einsum("bhts,bshd->bthd", weights / total[..., None], wide[2], precision=lax.Precision.HIGHEST)
    return out.astype(q.dtype), jnp.where(some, top + jnp.log(total), -jnp.inf)
