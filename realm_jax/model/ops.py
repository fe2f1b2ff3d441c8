"""Small pure operations of a layer, whose bits do not depend on how many sequences are computed together.

XLA:CPU compiles exp, tanh and sums differently from one shape to the next (in jax 0.10 and 0.12 their last bit changes
with the size of the batch), which would let a request's tokens depend on its company. So these are spelled out in
multiplications, additions and comparisons, and sums are taken in a fixed order.
"""

import jax
import jax.numpy as jnp
from jax import lax

# Cody and Waite's split of ln 2, and the minimax polynomial of exp(r) - 1 - r on |r| <= ln(2) / 2 (Moshier, Cephes).
_LN2_HIGH, _LN2_LOW = 0.693359375, -2.12194440e-4
_EXP_POLYNOMIAL = (1.9875691500e-4, 1.3981999507e-3, 8.3334519073e-3, 4.1665795894e-2, 1.6666665459e-1, 5.0000001201e-1)


def exp(x: jax.Array) -> jax.Array:
    """e to the x, float32; relative error below 1e-7. Arguments are clamped to [-87, 88]."""
    x = jnp.clip(x, -87.0, 88.0)
    n = jnp.round(x * 1.4426950408889634)
    r = (x - n * _LN2_HIGH) - n * _LN2_LOW
    p = jnp.float32(_EXP_POLYNOMIAL[0])
    for coefficient in _EXP_POLYNOMIAL[1:]:
        p = p * r + coefficient
    mantissa = p * r * r + r + 1.0
    return mantissa * lax.bitcast_convert_type((n.astype(jnp.int32) + 127) << 23, jnp.float32)


def sigmoid(x: jax.Array) -> jax.Array:
    return 1.0 / (1.0 + exp(-x))


def tanh(x: jax.Array) -> jax.Array:
    e = exp(-2.0 * jnp.abs(x))
    return jnp.sign(x) * ((1.0 - e) / (1.0 + e))


def row_sum(x: jax.Array) -> jax.Array:
    """Sum over the last axis, kept as 1: halves added to halves, the same way for every shape of the rest."""
    size = 1 << (x.shape[-1] - 1).bit_length()
    x = jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, size - x.shape[-1])])
    while size > 1:
        size //= 2
        x = x[..., :size] + x[..., size:]
    return x


def softmax(x: jax.Array) -> jax.Array:
    """Over the last axis."""
    e = exp(x - x.max(axis=-1, keepdims=True))
    return e / row_sum(e)


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
