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


def top_mask(score: jax.Array, mass: jax.Array, target: jax.Array) -> jax.Array:
    """By bisection over the bits of the scores, then of the indices."""
    vocab = score.shape[-1]
    key = _ordered_bits(score)
    threshold = _bisect(key, mass, target, bits=32)[:, None]
    above, tied = key > threshold, key == threshold
    missing = target - row_sum(jnp.where(above, mass, 0.0))[:, 0]
    index_key = jnp.arange(vocab, 0, -1, dtype=jnp.uint32)[None]  # lower index, larger key; never 0
    first = _bisect(jnp.where(tied, index_key, 0), mass, missing, bits=vocab.bit_length())[:, None]
    return above | (tied & (index_key >= first))


def _bisect(key: jax.Array, mass: jax.Array, target: jax.Array, bits: int) -> jax.Array:
    """uint32 [B]: the largest threshold for which the mass of the entries with key >= threshold reaches target."""

    def set_bit(i: jax.Array, threshold: jax.Array) -> jax.Array:
        candidate = threshold | (jnp.uint32(1) << (bits - 1 - i).astype(jnp.uint32))
        reached = row_sum(jnp.where(key >= candidate[:, None], mass, 0.0))[:, 0]
        return jnp.where((reached >= target) & (reached > 0), candidate, threshold)

    return jax.lax.fori_loop(0, bits, set_bit, jnp.zeros(key.shape[0], jnp.uint32))


def _ordered_bits(x: jax.Array) -> jax.Array:
    """uint32 keys in the order of the float32 values; the two zeros are equal."""
    bits = jax.lax.bitcast_convert_type(jnp.where(x == 0, 0.0, x), jnp.uint32)
    return jnp.where(bits >> 31 == 1, ~bits, bits | jnp.uint32(1 << 31))
