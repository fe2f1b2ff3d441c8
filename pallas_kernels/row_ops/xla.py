"""The XLA backend, on every platform: compilers of GPUs and TPUs fuse these by themselves."""

import jax
import jax.numpy as jnp

from pallas_kernels.numerics import row_sum, sigmoid


def rms_norm(x: jax.Array, weight: jax.Array, layer: jax.Array, eps: float) -> jax.Array:
    """x [..., K], weight [L, K]."""
    return x / jnp.sqrt(row_sum(x * x) * (1.0 / x.shape[-1]) + eps) * weight[layer]


def gated(gate: jax.Array, up: jax.Array, activation: str) -> jax.Array:
    if activation == "silu":
        return gate * sigmoid(gate) * up
    if activation == "gelu_tanh":  # x (1 + tanh u) / 2 = x sigmoid(2 u)
        return gate * sigmoid(1.5957691216057308 * (gate + 0.044715 * gate * gate * gate)) * up
    gate, up = jnp.minimum(gate, 7.0), jnp.clip(up, -7.0, 7.0)
    return gate * sigmoid(1.702 * gate) * (up + 1.0)


def argmax(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    # Two reductions, because XLA:CPU runs the one of jnp.argmax as a scalar loop.
    index = jnp.arange(x.shape[-1], dtype=jnp.int32)
    first = jnp.min(jnp.where(x == jnp.max(x, axis=-1, keepdims=True), index, x.shape[-1] - 1), axis=-1)
    return first, jnp.all(jnp.isfinite(x), axis=-1)
