"""The operation in its plainest form, in float32: what every backend is tested against."""

import jax
import jax.numpy as jnp

from .case import Adapters


def delta(x: jax.Array, slots: jax.Array, adapters: Adapters, layer: int | jax.Array) -> jax.Array:
    """x float32 [M, K], slots int32 [M] -> float32 [M, N]: row i is scale * B (A x[i]) of its slot, or zeros."""
    a, b, scales = adapters
    active = (slots >= 0) & (slots < a.shape[1])
    ids = jnp.where(active, slots, 0)
    # What a row without an adapter would have read is masked before it is used, so that gradients are masked too.
    a_rows = jnp.where(active[:, None, None], a[layer, ids].astype(jnp.float32), 0.0)  # [M, R, K]
    b_rows = jnp.where(active[:, None, None], b[layer, ids].astype(jnp.float32), 0.0)  # [M, N, R]
    t = jnp.einsum("mk,mrk->mr", x, a_rows, precision="highest")
    return jnp.einsum("mr,mnr->mn", t, b_rows, precision="highest") * jnp.where(active, scales[ids], 0.0)[:, None]
