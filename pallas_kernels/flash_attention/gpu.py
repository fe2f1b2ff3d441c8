"""The Pallas kernel for NVIDIA cards of compute capability 8.0 and above, through Triton: forward.

One program per tile of queries and head. Programs with the most keys start first. Blocks of keys that no query of the
tile sees are not visited, and masks are applied in those blocks alone that need them. Exponentials are powers of two.
A head size that is no power of two is taken in parts that are. The backward kernels are in gpu_backward.py.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.devices import cuda_capability

from .blocks import MAX_HEAD, MIN_CAPABILITY, GpuBlocks
from .case import LOG2_E, NOTHING, Options, block_span, key_span, visible
from .gpu_backward import backward
from .gpu_tiles import Arithmetic, blocks_for, capped, load, log2_factor, padded, parts_of, store

__all__ = ["backward", "forward", "unsupported"]


def unsupported(q: Any, k: Any, v: Any, options: Options, interpreted: bool) -> str | None:
    """Why the kernel does not take this case, or None."""
    capability = cuda_capability()
    if capability is not None and capability < MIN_CAPABILITY and not interpreted:
        return f"the card has compute capability {capability / 10}, and Triton's kernels need 8.0"
    return unsupported_heads(q.shape[3], v.shape[3])


def unsupported_heads(key_dim: int, value_dim: int) -> str | None:
    for dim in (key_dim, value_dim):
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
    blocks: GpuBlocks | None = None,
) -> tuple[jax.Array, jax.Array]:
    """As ``xla.forward``. blocks: other block sizes than the device's own, for tuning."""
    from jax.experimental import pallas as pl
    from jax.experimental.pallas import triton

    batch, length, heads, dim = q.shape
    kv_heads, value_dim = v.shape[2:]
    group = heads // kv_heads
    blocks = blocks or blocks_for("forward", q, v)
    tiles = pl.cdiv(length, blocks.queries)
    key_rows = pl.cdiv(k.shape[1], blocks.keys) * blocks.keys

    specs = [
        pl.BlockSpec((None, 4), lambda i, h, b: (b, 0)),
        pl.BlockSpec((None, blocks.queries, None, padded(dim)), lambda i, h, b: (b, tiles - 1 - i, h, 0)),
        pl.BlockSpec((None, key_rows, None, padded(dim)), lambda i, h, b: (b, 0, lax.div(h, group), 0)),
        pl.BlockSpec((None, key_rows, None, padded(value_dim)), lambda i, h, b: (b, 0, lax.div(h, group), 0)),
    ]
    arguments = [bounds, q, k, v]
    if sinks is not None:
        specs.append(pl.BlockSpec((None, None, 1), lambda i, h, b: (b, h, 0)))
        arguments.append(sinks[..., None])
    return pl.pallas_call(
        functools.partial(
            _kernel,
            options=options,
            blocks=blocks,
            tiles=tiles,
            length=length,
            dims=(dim, value_dim),
            unit=Arithmetic(q.dtype, interpret),
        ),
        grid=(tiles, heads, batch),
        in_specs=specs,
        out_specs=[
            pl.BlockSpec((None, blocks.queries, None, padded(value_dim)), lambda i, h, b: (b, tiles - 1 - i, h, 0)),
            pl.BlockSpec((None, None, blocks.queries), lambda i, h, b: (b, h, tiles - 1 - i)),
        ],
        out_shape=[
            jax.ShapeDtypeStruct((batch, length, heads, value_dim), q.dtype),
            jax.ShapeDtypeStruct((batch, heads, length), jnp.float32),
        ],
        compiler_params=triton.CompilerParams(num_warps=blocks.warps, num_stages=blocks.stages),
        interpret=interpret,
        name="flash_attention_forward",
    )(*arguments)


def _kernel(
    bounds_ref: Any,
    q_ref: Any,
    k_ref: Any,
    v_ref: Any,
    *refs: Any,
    options: Options,
    blocks: GpuBlocks,
    tiles: int,
    length: int,
    dims: tuple[int, int],
    unit: Arithmetic,
) -> None:
    from jax.experimental import pallas as pl
    from jax.experimental.pallas import triton

    sinks_ref, out_ref, lse_ref = refs if len(refs) == 3 else (None, *refs)
    parts, value_parts = parts_of(dims[0]), parts_of(dims[1])
    start, keys, queries = bounds_ref[0], bounds_ref[1], bounds_ref[2]
    row = (tiles - 1 - pl.program_id(0)) * blocks.queries
    rows = row + jnp.arange(blocks.queries)
    q = load(q_ref, None, parts, dims[0], rows < length)
    position = start + rows
    span = key_span(start + row, start + jnp.minimum(row + blocks.queries, queries) - 1, keys, options)
    low, all_low, all_high, high = block_span(span, blocks.keys)
    factor = log2_factor(options)

    def step(masked, j, carry):
        top, total, acc = carry  # maximum before the factor [queries], sum of weights, weighted values by parts
        at = pl.ds(j * blocks.keys, blocks.keys)
        key = j * blocks.keys + jnp.arange(blocks.keys)
        known: Any = key < keys if masked else None
        k = load(k_ref, at, parts, dims[0], known)
        scores, _ = capped(unit.product(q, k), options, unit)
        if masked:
            seen = visible(position[:, None], key[None, :], options) & known[None, :]
            scores = jnp.where(seen, scores, NOTHING)
        new_top = jnp.maximum(top, scores.max(1))
        base = new_top * factor
        if masked:  # where a query has seen nothing yet, NOTHING less NOTHING might be rounded to anything
            base = jnp.where(new_top > 0.1 * NOTHING, base, 0.0)
        weights = unit.exp2(scores * factor - base[:, None])
        keep = unit.exp2((top - new_top) * factor)
        total = total * keep + weights.sum(1)
        v = load(v_ref, at, value_parts, dims[1], known)
        weights = weights.astype(v_ref.dtype)
        acc = [a * keep[:, None] + unit.dot(weights, part) for a, part in zip(acc, v)]
        return new_top, total, acc

    carry = (
        jnp.full((blocks.queries,), NOTHING, jnp.float32),
        jnp.zeros((blocks.queries,), jnp.float32),
        [jnp.zeros((blocks.queries, size), jnp.float32) for _, size in value_parts],
    )
    if options.window:
        carry = lax.fori_loop(low, all_low, functools.partial(step, True), carry)
    carry = lax.fori_loop(all_low, all_high, functools.partial(step, False), carry)
    top, total, acc = lax.fori_loop(all_high, high, functools.partial(step, True), carry)

    some = (top > 0.1 * NOTHING) & (rows < queries)
    top = top * factor
    if sinks_ref is not None:  # a key of its own whose value is zero
        sink = sinks_ref[0] * LOG2_E
        new_top = jnp.maximum(top, sink)
        keep = unit.exp2(top - new_top)
        top, total = new_top, total * keep + unit.exp2(sink - new_top)
        acc = [a * keep[:, None] for a in acc]
    inside = rows < length
    store(out_ref, [jnp.where(some[:, None], a / total[:, None], 0.0) for a in acc], value_parts, dims[1], inside)
    lse = jnp.where(some, (top + jnp.log2(total)) * (1 / LOG2_E), -jnp.inf)
    triton.store(lse_ref, lse, mask=inside)
