"""The native backend, on CPUs: rows of any type read where they lie, sums in float32.

One numerics class: a query's bits depend on the query and the rows it sees only (native/attention_isa.cc says how they
are summed), for one token and for a whole prompt alike.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.native import available, isa, register, why_not

from .pages import Case, KVPages

MAX_DIM = 8192  # of a row: a block of rows is held in float32 by each thread


def unsupported(case: Case) -> str | None:
    """Why a case is not taken; None when it is."""
    if not available():
        return why_not()
    if case.head_dim > MAX_DIM:
        return f"rows of {case.head_dim} elements; at most {MAX_DIM}"
    return None


def append_rows(
    pool: KVPages, k: jax.Array, v: jax.Array, tables: jax.Array, positions: jax.Array, *, layer: jax.Array
) -> KVPages:
    """As api.append_rows, batch form: the pool is changed where it lies, or in a copy that XLA makes where it must."""
    arrays = _arrays(pool)
    written = _call(
        "realm_paged_append",
        tuple(jax.ShapeDtypeStruct(a.shape, a.dtype) for a in arrays),
        input_output_aliases={5 + i: i for i in range(len(arrays))},
    )(k, v, tables, positions, layer.reshape(1), *arrays, isa=np.int64(isa()))
    if pool.latent:
        return pool._replace(keys=written[0], key_scales=written[1] if len(written) > 1 else None)
    return KVPages(*written)


def paged_attention(
    q: jax.Array,
    pool: KVPages,
    tables: jax.Array,
    positions: jax.Array,
    *,
    layer: jax.Array,
    blocks: jax.Array,
    scale: float,
    window: jax.Array,
    softcap: float,
    sinks: jax.Array | None,
    value_dim: int,
) -> jax.Array:
    """As api.paged_attention, batch form."""
    scalars = (x.reshape(1) for x in (layer, blocks, window))
    logits = jnp.zeros(0, jnp.float32) if sinks is None else sinks
    attributes = {"scale": np.float32(scale), "softcap": np.float32(softcap), "isa": np.int64(isa())}
    out = jax.ShapeDtypeStruct((*q.shape[:3], value_dim), jnp.float32)
    call = _call("realm_paged_attention", out)
    return call(q, tables, positions, *scalars, logits, *_arrays(pool), **attributes)


def _arrays(pool: KVPages) -> list[jax.Array]:
    """Those the kernels see: no values where they are a part of the keys, and then the scales, if any."""
    names = ("keys", "key_scales") if pool.latent else KVPages._fields
    return [array for name in names if (array := getattr(pool, name)) is not None]


def _call(name: str, outs: Any, **options: Any) -> Any:
    return jax.ffi.ffi_call(register(name), outs, **options)
