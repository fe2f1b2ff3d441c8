"""What the Pallas TPU kernels share: scores with keys along sublanes and queries along lanes, and grids.

So the maximum, the sum and the log-sum-exp of a query are rows [1, queries] that lie along lanes as they do in memory,
and reductions over keys run along sublanes.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from .case import Options, visible


def scores_of(k: Any, q: Any, options: Options) -> tuple[Any, Any]:
    """k [keys, D], q [queries, D] -> scores [keys, queries] up to ``natural_factor``, and the soft-cap's derivative."""
    scores = product(k, q, (1, 1))
    if options.softcap:
        squashed = jnp.tanh(scores * (options.scale / options.softcap))
        return squashed * options.softcap, 1.0 - squashed * squashed
    return (scores, 1.0) if options.scale > 0 else (scores * options.scale, 1.0)


def natural_factor(options: Options) -> float:
    """What turns ``scores_of`` into exponents of e."""
    return options.scale if options.scale > 0 and not options.softcap else 1.0


def product(a: Any, b: Any, axes: tuple[int, int]) -> Any:
    """Float32 product of two matrices over one axis of each."""
    precision = lax.Precision.HIGHEST if a.dtype == jnp.float32 else lax.Precision.DEFAULT
    return lax.dot_general(
        a, b, (((axes[0],), (axes[1],)), ((), ())), precision=precision, preferred_element_type=jnp.float32
    )


def seen_by(start: Any, key: Any, row: Any, keys: Any, queries: Any, shape: tuple[int, int], options: Options) -> Any:
    """bool [keys, queries]: whether key ``key + s`` is seen by query row ``row + t``, neither being padding."""
    at_key = key + lax.broadcasted_iota(jnp.int32, shape, 0)
    at_row = row + lax.broadcasted_iota(jnp.int32, shape, 1)
    return visible(start + at_row, at_key, options) & (at_key < keys) & (at_row < queries)


def clear_from(a: Any, axis: int, first: Any) -> Any:
    """``a`` with zeros from index ``first`` of an axis on, whatever is there."""
    return jnp.where(lax.broadcasted_iota(jnp.int32, a.shape, axis) < first, a, jnp.zeros_like(a))


def heads_first(a: jax.Array, block: int, *, transposed: bool = False) -> jax.Array:
    """[B, rows, heads, dim] -> [B, heads, rows, dim], or [B, heads, dim, rows]; rows zero-padded to whole blocks.

    float16, which TPUs do not have, becomes float32.
    """
    if a.dtype == jnp.float16:
        a = a.astype(jnp.float32)
    a = jnp.pad(a, ((0, 0), (0, -a.shape[1] % block), (0, 0), (0, 0)))
    return a.transpose(0, 2, 3, 1) if transposed else a.transpose(0, 2, 1, 3)


def query_block(blocks: int, length: int) -> int:
    """Queries per step: whole lanes, no more than needed."""
    return min(blocks, -(-length // 128) * 128)


def parameters(steps: int) -> Any:
    """Of a grid whose last axis runs in order and the ``steps`` before it in any."""
    from jax.experimental.pallas import tpu as pltpu

    semantics: Any = ("parallel",) * steps + ("arbitrary",)
    return pltpu.CompilerParams(dimension_semantics=semantics)
