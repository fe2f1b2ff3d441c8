"""The Pallas kernels for NVIDIA cards, through Triton: backward, without atomics, so that it is deterministic.

One kernel makes the gradient of the queries, as the forward pass goes: a program per tile of queries and head. Another
makes those of keys and values: a program per block of keys and key/value head walks over the heads of its group and
over the queries that see the block. Both recompute the weights from q, k and the log-sum-exp.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from .blocks import GpuBlocks
from .case import ABSENT, LOG2_E, Options, block_span, key_span, query_span, visible
from .gpu_tiles import Arithmetic, blocks_for, capped, load, log2_factor, padded, parts_of, store


def backward(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    bounds: jax.Array,
    lse: jax.Array,
    delta: jax.Array,
    grad: jax.Array,
    options: Options,
    *,
    interpret: bool = False,
    blocks: tuple[GpuBlocks, GpuBlocks] | None = None,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """As ``xla.backward``. blocks: other block sizes than the device's own, of the two kernels, for tuning."""
    dq_blocks, dkv_blocks = blocks or (blocks_for("dq", q, v), blocks_for("dkv", q, v))
    shared: dict[str, Any] = {"options": options, "interpret": interpret}
    dq = _query_gradient(q, k, v, bounds, lse, delta, grad, blocks=dq_blocks, **shared)
    return (dq, *_key_gradients(q, k, v, bounds, lse, delta, grad, blocks=dkv_blocks, **shared))


def _query_gradient(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    bounds: jax.Array,
    lse: jax.Array,
    delta: jax.Array,
    grad: jax.Array,
    *,
    options: Options,
    blocks: GpuBlocks,
    interpret: bool,
) -> jax.Array:
    from jax.experimental import pallas as pl
    from jax.experimental.pallas import triton

    batch, length, heads, dim = q.shape
    kv_heads, value_dim = v.shape[2:]
    group = heads // kv_heads
    tiles = pl.cdiv(length, blocks.queries)
    key_rows = pl.cdiv(k.shape[1], blocks.keys) * blocks.keys

    def queries(size):
        return pl.BlockSpec((None, blocks.queries, None, padded(size)), lambda i, h, b: (b, tiles - 1 - i, h, 0))

    def keys(size):
        return pl.BlockSpec((None, key_rows, None, padded(size)), lambda i, h, b: (b, 0, lax.div(h, group), 0))

    row = pl.BlockSpec((None, None, blocks.queries), lambda i, h, b: (b, h, tiles - 1 - i))
    return pl.pallas_call(
        functools.partial(
            _query_kernel,
            options=options,
            blocks=blocks,
            tiles=tiles,
            length=length,
            dims=(dim, value_dim),
            unit=Arithmetic(q.dtype, interpret),
        ),
        grid=(tiles, heads, batch),
        in_specs=[
            pl.BlockSpec((None, 4), lambda i, h, b: (b, 0)),
            queries(dim),
            keys(dim),
            keys(value_dim),
            row,
            row,
            queries(value_dim),
        ],
        out_specs=queries(dim),
        out_shape=jax.ShapeDtypeStruct(q.shape, q.dtype),
        compiler_params=triton.CompilerParams(num_warps=blocks.warps, num_stages=blocks.stages),
        interpret=interpret,
        name="flash_attention_dq",
    )(bounds, q, k, v, lse, delta, grad)


def _query_kernel(
    bounds_ref: Any,
    q_ref: Any,
    k_ref: Any,
    v_ref: Any,
    lse_ref: Any,
    delta_ref: Any,
    grad_ref: Any,
    dq_ref: Any,
    *,
    options: Options,
    blocks: GpuBlocks,
    tiles: int,
    length: int,
    dims: tuple[int, int],
    unit: Arithmetic,
) -> None:
    from jax.experimental import pallas as pl
    from jax.experimental.pallas import triton

    parts, value_parts = parts_of(dims[0]), parts_of(dims[1])
    start, keys, queries = bounds_ref[0], bounds_ref[1], bounds_ref[2]
    row = (tiles - 1 - pl.program_id(0)) * blocks.queries
    rows = row + jnp.arange(blocks.queries)
    fresh = rows < queries
    position = start + rows
    q = load(q_ref, None, parts, dims[0], fresh)
    grad = load(grad_ref, None, value_parts, dims[1], fresh)
    lse = triton.load(lse_ref, mask=fresh, other=ABSENT) * LOG2_E
    delta = triton.load(delta_ref, mask=fresh, other=0.0)
    span = key_span(start + row, start + jnp.minimum(row + blocks.queries, queries) - 1, keys, options)
    low, all_low, all_high, high = block_span(span, blocks.keys)
    factor = log2_factor(options)

    def step(masked, j, acc):
        at = pl.ds(j * blocks.keys, blocks.keys)
        key = j * blocks.keys + jnp.arange(blocks.keys)
        known: Any = key < keys if masked else None
        k = load(k_ref, at, parts, dims[0], known)
        v = load(v_ref, at, value_parts, dims[1], known)
        scores, slope = capped(unit.product(q, k), options, unit)
        weights = unit.exp2(scores * factor - lse[:, None])
        dscores = weights * (unit.product(grad, v) - delta[:, None]) * slope
        if masked:
            seen = visible(position[:, None], key[None, :], options) & known[None, :]
            dscores = jnp.where(seen, dscores, 0.0)
        dscores = dscores.astype(k_ref.dtype)
        return [a + unit.dot(dscores, part) for a, part in zip(acc, k)]

    acc = [jnp.zeros((blocks.queries, size), jnp.float32) for _, size in parts]
    if options.window:
        acc = lax.fori_loop(low, all_low, functools.partial(step, True), acc)
    acc = lax.fori_loop(all_low, all_high, functools.partial(step, False), acc)
    acc = lax.fori_loop(all_high, high, functools.partial(step, True), acc)
    store(dq_ref, [a * options.scale for a in acc], parts, dims[0], rows < length)


def _key_gradients(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    bounds: jax.Array,
    lse: jax.Array,
    delta: jax.Array,
    grad: jax.Array,
    *,
    options: Options,
    blocks: GpuBlocks,
    interpret: bool,
) -> tuple[jax.Array, jax.Array]:
    from jax.experimental import pallas as pl
    from jax.experimental.pallas import triton

    batch, length, heads, dim = q.shape
    kv_heads, value_dim = v.shape[2:]
    group = heads // kv_heads
    rows = pl.cdiv(length, blocks.queries) * blocks.queries

    def queries(size):
        return pl.BlockSpec((None, rows, group, padded(size)), lambda j, h, b: (b, 0, h, 0))

    def keys(size):
        return pl.BlockSpec((None, blocks.keys, None, padded(size)), lambda j, h, b: (b, j, h, 0))

    row = pl.BlockSpec((None, group, rows), lambda j, h, b: (b, h, 0))
    return tuple(
        pl.pallas_call(
            functools.partial(
                _key_kernel,
                options=options,
                blocks=blocks,
                group=group,
                keys_given=k.shape[1],
                dims=(dim, value_dim),
                unit=Arithmetic(q.dtype, interpret),
            ),
            grid=(pl.cdiv(k.shape[1], blocks.keys), kv_heads, batch),
            in_specs=[
                pl.BlockSpec((None, 4), lambda j, h, b: (b, 0)),
                queries(dim),
                keys(dim),
                keys(value_dim),
                row,
                row,
                queries(value_dim),
            ],
            out_specs=[keys(dim), keys(value_dim)],
            out_shape=[jax.ShapeDtypeStruct(k.shape, k.dtype), jax.ShapeDtypeStruct(v.shape, v.dtype)],
            compiler_params=triton.CompilerParams(num_warps=blocks.warps, num_stages=blocks.stages),
            interpret=interpret,
            name="flash_attention_dkv",
        )(bounds, q, k, v, lse, delta, grad)
    )


def _key_kernel(
    bounds_ref: Any,
    q_ref: Any,
    k_ref: Any,
    v_ref: Any,
    lse_ref: Any,
    delta_ref: Any,
    grad_ref: Any,
    dk_ref: Any,
    dv_ref: Any,
    *,
    options: Options,
    blocks: GpuBlocks,
    group: int,
    keys_given: int,
    dims: tuple[int, int],
    unit: Arithmetic,
) -> None:
    from jax.experimental import pallas as pl
    from jax.experimental.pallas import triton

    parts, value_parts = parts_of(dims[0]), parts_of(dims[1])
    start, keys, queries = bounds_ref[0], bounds_ref[1], bounds_ref[2]
    first = pl.program_id(0) * blocks.keys
    key = first + jnp.arange(blocks.keys)
    known = key < keys
    k = load(k_ref, None, parts, dims[0], known)
    v = load(v_ref, None, value_parts, dims[1], known)
    span = query_span(first, first + blocks.keys - 1, start, queries, options)
    low, all_low, all_high, high = block_span(span, blocks.queries)
    high = jnp.where(first < keys, high, low)
    all_high, all_low = jnp.minimum(all_high, high), jnp.minimum(all_low, high)
    factor = log2_factor(options)

    def step(masked, head, i, carry):  # scores are keys by queries here
        dk, dv = carry
        at = pl.ds(i * blocks.queries, blocks.queries)
        rows = i * blocks.queries + jnp.arange(blocks.queries)
        fresh: Any = rows < queries if masked else None
        q = load(q_ref, at, parts, dims[0], fresh, head)
        grad = load(grad_ref, at, value_parts, dims[1], fresh, head)
        lse = triton.load(lse_ref.at[head, at], mask=fresh, other=ABSENT if masked else None) * LOG2_E
        delta = triton.load(delta_ref.at[head, at], mask=fresh, other=0.0 if masked else None)
        scores, slope = capped(unit.product(k, q), options, unit)
        weights = unit.exp2(scores * factor - lse[None, :])
        if masked:
            seen = visible((start + rows)[None, :], key[:, None], options) & fresh[None, :]
            weights = jnp.where(seen, weights, 0.0)
        dscores = weights * (unit.product(v, grad) - delta[None, :]) * slope
        weights, dscores = weights.astype(grad_ref.dtype), dscores.astype(q_ref.dtype)
        dv = [a + unit.dot(weights, part) for a, part in zip(dv, grad)]
        dk = [a + unit.dot(dscores, part) for a, part in zip(dk, q)]
        return dk, dv

    def one_head(head, carry):
        if options.causal or options.window:
            carry = lax.fori_loop(low, all_low, functools.partial(step, True, head), carry)
        carry = lax.fori_loop(all_low, all_high, functools.partial(step, False, head), carry)
        return lax.fori_loop(all_high, high, functools.partial(step, True, head), carry)

    def zeros(sizes):
        return [jnp.zeros((blocks.keys, size), jnp.float32) for _, size in sizes]

    dk, dv = lax.fori_loop(0, group, one_head, (zeros(parts), zeros(value_parts)))
    inside = key < keys_given
    store(dk_ref, [jnp.where(known[:, None], a * options.scale, 0.0) for a in dk], parts, dims[0], inside)
    store(dv_ref, [jnp.where(known[:, None], a, 0.0) for a in dv], value_parts, dims[1], inside)
