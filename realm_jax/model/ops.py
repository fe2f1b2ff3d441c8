"""Small pure operations of a layer."""

import jax
import jax.numpy as jnp

from pallas_kernels.numerics import tanh


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
