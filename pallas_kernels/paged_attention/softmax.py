"""The online softmax as the Pallas kernels compute it: in powers of two, maxima being rounded up to integers.

So every factor that scales a sum is a power of two, hence exact, however a compiler contracts multiplications and
additions; and sums over nothing change no bit of others.
"""

from typing import Any

import jax.numpy as jnp
from jax import lax

from .pages import FLOAT16_MAX

LOG2_E = 1.4426950408889634
MASKED = -1e30  # a score that is not seen
START = -1e20  # the maximum of nothing: above MASKED, so that 2^(MASKED - START) is 0, and below every score
EVERY = 1 << 30  # a window that hides nothing


def query_factor(scale: float, softcap: float) -> float:
    """What queries are multiplied by, for ``exponents`` of their products with keys."""
    return scale * LOG2_E * (2.0 / softcap if softcap else 1.0)


def exponents(products: Any, softcap: float) -> Any:
    """Scores as exponents of two."""
    if softcap:  # tanh(x) = 1 - 2 / (1 + e^2x)
        return (1.0 - 2.0 / (1.0 + jnp.exp2(products))) * (softcap * LOG2_E)
    return products


def power(exponent: Any) -> Any:
    """2^exponent exactly, for integers in float32 up to 127; 0 from -127 on down."""
    bits = (jnp.maximum(exponent, -127.0).astype(jnp.int32) + 127) << 23
    return lax.bitcast_convert_type(bits, jnp.float32)


def terms(q: Any, dtype: Any) -> list[Any]:
    """float32 q as one array of dtype or, bfloat16 having 8 bits only, as two whose sum it is."""
    if dtype == jnp.bfloat16:
        high = q.astype(dtype)
        return [high, (q - high.astype(jnp.float32)).astype(dtype)]
    if dtype == jnp.float16:
        q = jnp.minimum(jnp.maximum(q, -FLOAT16_MAX), FLOAT16_MAX)
    return [q.astype(dtype)]


def lookback(window: Any) -> Any:
    """Positions that a query sees, itself included, for a window of 0 too."""
    return jnp.where(window > 0, jnp.minimum(window, EVERY), EVERY)
