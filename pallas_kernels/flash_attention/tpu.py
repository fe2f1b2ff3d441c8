"""The Pallas kernel for TPUs: forward.

The grid's last axis walks over the blocks of keys that some query of the tile sees; what the grid has beyond them costs
neither a copy nor arithmetic. The backward kernels are in tpu_backward.py.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from .blocks import MAX_HEAD, tpu_blocks
from .case import NOTHING, Options, block_span, key_span
from .tpu_backward import backward
from .tpu_tiles import clear_from, heads_first, natural_factor, parameters, product, query_block, scores_of, seen_by

__all__ = ["backward", "forward", "unsupported"]


def unsupported(q: Any, k: Any, v: Any, options: Options, interpreted: bool) -> str | None:
    """Why the kernel does not take this case, or None."""
    for dim in (q.shape[3], v.shape[3]):
        if dim % 8 or dim > MAX_HEAD:
            return f"a head size of {dim} is no multiple of 8 up to {MAX_HEAD}"
    return None


def forward(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    bounds: jax.Array,
    sinks: jax.Array | None,
    options: Options,
    *,
    interpret: bool = False,
) -> tuple[jax.Array, jax.Array]:
    """As ``xla.forward``."""
    from jax.experimental import pallas as pl
    from jax.experimental.pallas import tpu as pltpu

    batch, length, heads, dim = q.shape
    kv_heads, value_dim = v.shape[2:]
    group = heads // kv_heads
    blocks = tpu_blocks(max(dim, value_dim))
    rows, keys = query_block(blocks.queries, length), blocks.keys
    dtype = q.dtype
    q, k, v = heads_first(q, rows), heads_first(k, keys), heads_first(v, keys, transposed=True)

    def key_block(b, i, j, bounds_ref):  # past the last block a tile sees, the last one again: no new copy
        low, _, _, high = _span(bounds_ref, b, i, rows, keys, options)
        return jnp.clip(low + j, 0, jnp.maximum(high - 1, 0))

    grid = pltpu.PrefetchScalarGridSpec(
        num_scalar_prefetch=1 if sinks is None else 2,
        grid=(batch, heads, q.shape[2] // rows, k.shape[2] // keys),
        in_specs=[
            pl.BlockSpec((None, None, rows, dim), lambda b, h, i, j, bounds_ref, *_: (b, h, i, 0)),
            pl.BlockSpec(
                (None, None, keys, dim),
                lambda b, h, i, j, bounds_ref, *_: (b, lax.div(h, group), key_block(b, i, j, bounds_ref), 0),
            ),
            pl.BlockSpec(
                (None, None, value_dim, keys),
                lambda b, h, i, j, bounds_ref, *_: (b, lax.div(h, group), 0, key_block(b, i, j, bounds_ref)),
            ),
        ],
        out_specs=[
            pl.BlockSpec((None, None, value_dim, rows), lambda b, h, i, j, *_: (b, h, 0, i)),
            pl.BlockSpec((None, None, 1, rows), lambda b, h, i, j, *_: (b, h, 0, i)),
        ],
        scratch_shapes=[
            pltpu.VMEM((1, rows), jnp.float32),
            pltpu.VMEM((1, rows), jnp.float32),
            pltpu.VMEM((value_dim, rows), jnp.float32),
        ],
    )
    out, lse = pl.pallas_call(
        functools.partial(_kernel, options=options, with_sinks=sinks is not None),
        grid_spec=grid,
        out_shape=[
            jax.ShapeDtypeStruct((batch, heads, value_dim, q.shape[2]), q.dtype),
            jax.ShapeDtypeStruct((batch, heads, 1, q.shape[2]), jnp.float32),
        ],
        compiler_params=parameters(3),
        interpret=interpret,
        name="flash_attention_forward",
    )(bounds, *(() if sinks is None else (sinks,)), q, k, v)
    return out[..., :length].transpose(0, 3, 1, 2).astype(dtype), lse[:, :, 0, :length]


def _span(bounds_ref: Any, b: Any, i: Any, rows: int, size: int, options: Options) -> tuple[Any, Any, Any, Any]:
    """Blocks of ``size`` keys that tile i of ``rows`` queries sees, as ``case.block_span``."""
    start, keys, queries = bounds_ref[b, 0], bounds_ref[b, 1], bounds_ref[b, 2]
    row = i * rows
    return block_span(key_span(start + row, start + jnp.minimum(row + rows, queries) - 1, keys, options), size)


def _kernel(*refs: Any, options: Options, with_sinks: bool) -> None:
    from jax.experimental import pallas as pl

    bounds_ref, sinks_ref = refs[0], refs[1] if with_sinks else None
    q_ref, k_ref, v_ref, out_ref, lse_ref, top_ref, total_ref, acc_ref = refs[2 if with_sinks else 1 :]
    b, h, i, j = (pl.program_id(axis) for axis in range(4))
    (rows, _), (keys, _) = q_ref.shape, k_ref.shape
    low, all_low, all_high, high = _span(bounds_ref, b, i, rows, keys, options)
    block = low + j
    factor = natural_factor(options)

    @pl.when(j == 0)
    def _start():
        top_ref[...] = jnp.full(top_ref.shape, NOTHING, jnp.float32)
        total_ref[...] = jnp.zeros(total_ref.shape, jnp.float32)
        acc_ref[...] = jnp.zeros(acc_ref.shape, jnp.float32)

    def step(masked):
        scores, _ = scores_of(k_ref[...], q_ref[...], options)  # [keys, queries]
        v = v_ref[...]  # [DV, keys]
        if masked:
            seen = seen_by(
                bounds_ref[b, 0], block * keys, i * rows, bounds_ref[b, 1], bounds_ref[b, 2], scores.shape, options
            )
            scores = jnp.where(seen, scores, NOTHING)
            v = clear_from(v, 1, bounds_ref[b, 1] - block * keys)
        top = top_ref[...]
        new_top = jnp.maximum(top, scores.max(0, keepdims=True))
        base = new_top * factor
        if masked:  # where a query has seen nothing yet, NOTHING less NOTHING might be rounded to anything
            base = jnp.where(new_top > 0.1 * NOTHING, base, 0.0)
        weights = jnp.exp(scores * factor - base)
        keep = jnp.exp((top - new_top) * factor)
        top_ref[...] = new_top
        total_ref[...] = total_ref[...] * keep + weights.sum(0, keepdims=True)
        acc_ref[...] = acc_ref[...] * keep + product(v, weights.astype(v.dtype), (1, 0))

    inner = (block >= all_low) & (block < all_high)
    pl.when(inner & (block < high))(functools.partial(step, False))
    pl.when(jnp.logical_not(inner) & (block < high))(functools.partial(step, True))

    @pl.when(j == pl.num_programs(3) - 1)
    def _finish():
        top, total, acc = top_ref[...], total_ref[...], acc_ref[...]
        row = i * rows + lax.broadcasted_iota(jnp.int32, top.shape, 1)
        some = (top > 0.1 * NOTHING) & (row < bounds_ref[b, 2])
        top = top * factor
        if sinks_ref is not None:  # a key of its own whose value is zero
            sink = sinks_ref[b, h]
            new_top = jnp.maximum(top, sink)
            keep = jnp.exp(top - new_top)
            top, total, acc = new_top, total * keep + jnp.exp(sink - new_top), acc * keep
        total = jnp.where(some, total, 1.0)
        out_ref[...] = jnp.where(some, acc / total, 0.0).astype(out_ref.dtype)
        lse_ref[...] = jnp.where(some, top + jnp.log(total), -jnp.inf)
