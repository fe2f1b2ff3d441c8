"""Small pure operations of a layer."""

import jax
import jax.numpy as jnp

from pallas_kernels.numerics import row_sum, sigmoid, tanh


def gated(gate: jax.Array, up: jax.Array, activation: str) -> jax.Array:
    """The gated activation of the feed-forward blocks; "swiglu_oai" is gpt-oss's clamped variant."""
    if activation == "silu":
        return gate * sigmoid(gate) * up
    if activation == "gelu_tanh":  # x (1 + tanh u) / 2 = x sigmoid(2 u)
        return gate * sigmoid(1.5957691216057308 * (gate + 0.044715 * gate * gate * gate)) * up
    gate, up = jnp.minimum(gate, 7.0), jnp.clip(up, -7.0, 7.0)
    return gate * sigmoid(1.702 * gate) * (up + 1.0)


def rms_norm(x: jax.Array, weight: jax.Array, eps: float) -> jax.Array:
    """x [..., K] over the root of its mean square (Zhang and Sennrich 2019, arXiv:1910.07467), times weight [K]."""
    return x / jnp.sqrt(row_sum(x * x) * (1.0 / x.shape[-1]) + eps) * weight


def softcap(x: jax.Array, cap: float) -> jax.Array:
    """Squashes x into (-cap, cap); 0 leaves it as it is."""
    return cap * tanh(x * (1.0 / cap)) if cap else x


def rotate(x: jax.Array, cos_sin: tuple[jax.Array, jax.Array], pairs: str) -> jax.Array:
    """Rotates the leading elements of each head of x [T, heads, dim] by angles whose cosines are [T, pairs]."""
    cos, sin = cos_sin[0][:, None, :], cos_sin[1][:, None, :]  # [T, 1, pairs]
    half = cos.shape[-1]
    turned, rest = x[..., : 2 * half], x[..., 2 * half :]
    if pairs == "neox":
        a, b = turned[..., :half], turned[..., half:]
        out = jnp.concatenate([a * cos - b * sin, a * sin + b * cos], axis=-1)
    else:
        split = turned.reshape(*turned.shape[:-1], half, 2)
        a, b = split[..., 0], split[..., 1]
        out = jnp.stack([a * cos - b * sin, a * sin + b * cos], axis=-1).reshape(turned.shape)
    return jnp.concatenate([out, rest], axis=-1) if rest.shape[-1] else out
