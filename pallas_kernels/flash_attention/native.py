"""The native backend, on CPUs: the kernels of paged attention, reading contiguous keys and values where they lie.

Sums are float32, in one numerics class: a query's bits depend on the query and what it sees only. The backward pass is
the XLA backend's, from the saved log-sum-exp.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.native import available, isa, register, why_not

from . import xla
from .case import Options

MAX_DIM = 8192  # of a row: a block of rows is held in float32 by each thread


def unsupported(q: Any, k: Any, v: Any, options: Options, interpreted: bool) -> str | None:
    """Why this backend does not take a case; None when it does."""
    if not available():
        return why_not()
    if options.window and not options.causal:
        return "windows are for causal attention"
    if max(q.shape[3], v.shape[3]) > MAX_DIM:
        return f"rows of {max(q.shape[3], v.shape[3])} elements; at most {MAX_DIM}"
    return None


def forward(
    q: jax.Array, k: jax.Array, v: jax.Array, bounds: jax.Array, sinks: jax.Array | None, options: Options
) -> tuple[jax.Array, jax.Array]:
    """As the XLA backend's."""
    batch, queries, heads, _ = q.shape
    row = jnp.arange(queries, dtype=jnp.int32)
    start, keys, count = bounds[:, 0, None], bounds[:, 1, None], bounds[:, 2, None]
    last = start + row if options.causal else keys - 1  # of the keys it sees
    positions = jnp.where(row < count, last, -1)
    outs = (
        jax.ShapeDtypeStruct((batch, queries, heads, v.shape[3]), jnp.float32),
        jax.ShapeDtypeStruct((batch, heads, queries), jnp.float32),
    )
    attributes = {
        "window": np.int64(options.window),
        "scale": np.float32(options.scale),
        "softcap": np.float32(options.softcap),
        "isa": np.int64(isa()),
    }
    logits = jnp.zeros(0, jnp.float32) if sinks is None else sinks
    call = jax.ffi.ffi_call(register("realm_flash_attention"), outs)
    out, lse = call(q.astype(jnp.float32), k, v, positions, logits, **attributes)
    return out.astype(q.dtype), lse


backward = xla.backward
