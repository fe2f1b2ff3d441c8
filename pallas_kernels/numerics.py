"""Elementary functions and sums whose bits do not depend on the shape they are computed in.

XLA:CPU compiles exp, log, tanh and sums differently from one shape to the next (in jax 0.10 and 0.12 their last bit
changes with the size of the batch), which would let a request's tokens depend on its company. So these are spelled out
in multiplications, additions and comparisons, and sums are taken in a fixed order. All are float32.
"""

import jax
import jax.numpy as jnp
from jax import lax

# Cody and Waite's split of ln 2; minimax polynomials of exp and log after range reduction (Moshier, Cephes).
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


_LOG_POLYNOMIAL = (
    7.0376836292e-2,
    -1.1514610310e-1,
    1.1676998740e-1,
    -1.2420140846e-1,
    1.4249322787e-1,
    -1.6668057665e-1,
    2.0000714765e-1,
    -2.4999993993e-1,
    3.3333331174e-1,
)


def log(x: jax.Array) -> jax.Array:
    """Natural logarithm of a positive, normal, finite x; relative error below 2e-7."""
    bits = lax.bitcast_convert_type(x, jnp.int32)
    # x = 2^n m with m in [sqrt(1/2), sqrt(2)): 0x3F3504F3 are the bits of sqrt(1/2).
    n = (bits - 0x3F3504F3) >> 23
    r = lax.bitcast_convert_type(bits - (n << 23), jnp.float32) - 1.0
    square = r * r
    p = jnp.float32(_LOG_POLYNOMIAL[0])
    for coefficient in _LOG_POLYNOMIAL[1:]:
        p = p * r + coefficient
    n = n.astype(jnp.float32)
    return (p * r * square + n * _LN2_LOW - 0.5 * square) + r + n * _LN2_HIGH


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
