"""The Pallas kernels for TPUs: backward; one for the gradient of queries, one for those of keys and values."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from .blocks import tpu_blocks
from .case import ABSENT, Options, block_span, key_span, query_span
from .tpu_tiles import clear_from, heads_first, natural_factor, parameters, product, query_block, scores_of, seen_by


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
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """As ``xla.backward``."""
    blocks = tpu_blocks(max(q.shape[3], v.shape[3]))
    rows, keys = query_block(blocks.backward_queries, q.shape[1]), blocks.backward_keys
    length, keys_given, dtype = q.shape[1], k.shape[1], q.dtype
    per_row = ((0, 0), (0, 0), (0, -length % rows))
    lse = jnp.pad(lse, per_row, constant_values=ABSENT)[:, :, None]  # [B, heads, 1, T]
    delta = jnp.pad(delta, per_row)[:, :, None]
    transposed = heads_first(k, keys, transposed=True)
    q, k, v, grad = heads_first(q, rows), heads_first(k, keys), heads_first(v, keys), heads_first(grad, rows)
    shared: dict[str, Any] = {"options": options, "rows": rows, "keys": keys, "interpret": interpret}
    dq = _query_gradient(bounds, q, k, transposed, v, grad, lse, delta, **shared)
    dk, dv = _key_gradients(bounds, q, k, v, grad, lse, delta, **shared)
    dk, dv = (a[:, :, :keys_given].swapaxes(1, 2).astype(dtype) for a in (dk, dv))
    return dq[..., :length].transpose(0, 3, 1, 2).astype(dtype), dk, dv


def _query_gradient(
    bounds: jax.Array,
    q: jax.Array,
    k: jax.Array,
    transposed: jax.Array,
    v: jax.Array,
    grad: jax.Array,
    lse: jax.Array,
    delta: jax.Array,
    *,
    options: Options,
    rows: int,
    keys: int,
    interpret: bool,
) -> jax.Array:
    """Gradient of the queries, [B, heads, D, T]."""
    from jax.experimental import pallas as pl
    from jax.experimental.pallas import tpu as pltpu

    batch, heads, length, dim = q.shape
    group = heads // k.shape[1]
    value_dim = v.shape[3]

    def key_block(b, i, j, bounds_ref):
        low, _, _, high = _keys_of(bounds_ref, b, i, rows, keys, options)
        return jnp.clip(low + j, 0, jnp.maximum(high - 1, 0))

    def of_queries(size):
        return pl.BlockSpec((None, None, rows, size), lambda b, h, i, j, _: (b, h, i, 0))

    def of_keys(size):
        return pl.BlockSpec(
            (None, None, keys, size), lambda b, h, i, j, ref: (b, lax.div(h, group), key_block(b, i, j, ref), 0)
        )

    row = pl.BlockSpec((None, None, 1, rows), lambda b, h, i, j, _: (b, h, 0, i))
    return pl.pallas_call(
        functools.partial(_query_kernel, options=options),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=(batch, heads, length // rows, k.shape[2] // keys),
            in_specs=[
                of_queries(dim),
                of_keys(dim),
                pl.BlockSpec(
                    (None, None, dim, keys),
                    lambda b, h, i, j, ref: (b, lax.div(h, group), 0, key_block(b, i, j, ref)),
                ),
                of_keys(value_dim),
                of_queries(value_dim),
                row,
                row,
            ],
            out_specs=pl.BlockSpec((None, None, dim, rows), lambda b, h, i, j, _: (b, h, 0, i)),
            scratch_shapes=[pltpu.VMEM((dim, rows), jnp.float32)],
        ),
        out_shape=jax.ShapeDtypeStruct((batch, heads, dim, length), q.dtype),
        compiler_params=parameters(3),
        interpret=interpret,
        name="flash_attention_dq",
    )(bounds, q, k, transposed, v, grad, lse, delta)


def _keys_of(bounds_ref: Any, b: Any, i: Any, rows: int, size: int, options: Options) -> tuple[Any, Any, Any, Any]:
    start, keys, queries = bounds_ref[b, 0], bounds_ref[b, 1], bounds_ref[b, 2]
    row = i * rows
    return block_span(key_span(start + row, start + jnp.minimum(row + rows, queries) - 1, keys, options), size)


def _query_kernel(
    bounds_ref: Any,
    q_ref: Any,
    k_ref: Any,
    transposed_ref: Any,
    v_ref: Any,
    grad_ref: Any,
    lse_ref: Any,
    delta_ref: Any,
    dq_ref: Any,
    acc_ref: Any,
    *,
    options: Options,
) -> None:
    from jax.experimental import pallas as pl

    b, i, j = pl.program_id(0), pl.program_id(2), pl.program_id(3)
    rows, keys = q_ref.shape[0], k_ref.shape[0]
    low, all_low, all_high, high = _keys_of(bounds_ref, b, i, rows, keys, options)
    block = low + j

    @pl.when(j == 0)
    def _start():
        acc_ref[...] = jnp.zeros(acc_ref.shape, jnp.float32)

    def step(masked):
        scores, slope = scores_of(k_ref[...], q_ref[...], options)  # [keys, queries]
        weights = jnp.exp(scores * natural_factor(options) - lse_ref[...])
        dscores = weights * (product(v_ref[...], grad_ref[...], (1, 1)) - delta_ref[...]) * slope
        transposed = transposed_ref[...]  # [D, keys]
        if masked:
            seen = seen_by(
                bounds_ref[b, 0], block * keys, i * rows, bounds_ref[b, 1], bounds_ref[b, 2], scores.shape, options
            )
            dscores = jnp.where(seen, dscores, 0.0)
            transposed = clear_from(transposed, 1, bounds_ref[b, 1] - block * keys)
        acc_ref[...] += product(transposed, dscores.astype(transposed.dtype), (1, 0))

    inner = (block >= all_low) & (block < all_high)
    pl.when(inner & (block < high))(functools.partial(step, False))
    pl.when(jnp.logical_not(inner) & (block < high))(functools.partial(step, True))

    @pl.when(j == pl.num_programs(3) - 1)
    def _finish():
        row = i * rows + lax.broadcasted_iota(jnp.int32, acc_ref.shape, 1)
        value = jnp.where(row < bounds_ref[b, 2], acc_ref[...] * options.scale, 0.0)
        dq_ref[...] = value.astype(dq_ref.dtype)


def _key_gradients(
    bounds: jax.Array,
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    grad: jax.Array,
    lse: jax.Array,
    delta: jax.Array,
    *,
    options: Options,
    rows: int,
    keys: int,
    interpret: bool,
) -> tuple[jax.Array, jax.Array]:
    """Gradients of keys and values, [B, kv_heads, S, dim]. The grid's last axis walks over the heads of a group, and in
    each over the tiles of queries that see the block of keys."""
    from jax.experimental import pallas as pl
    from jax.experimental.pallas import tpu as pltpu

    batch, kv_heads, keys_given, dim = k.shape
    group = q.shape[1] // kv_heads
    tiles = q.shape[2] // rows
    value_dim = v.shape[3]

    def query_tile(b, j, t, bounds_ref):
        low, _, _, high = _queries_of(bounds_ref, b, j, keys, rows, options)
        return jnp.clip(low + lax.rem(t, tiles), 0, jnp.maximum(high - 1, 0))

    def of_queries(size):
        return pl.BlockSpec(
            (None, None, rows, size),
            lambda b, h, j, t, ref: (b, h * group + lax.div(t, tiles), query_tile(b, j, t, ref), 0),
        )

    def of_keys(size):
        return pl.BlockSpec((None, None, keys, size), lambda b, h, j, t, _: (b, h, j, 0))

    row = pl.BlockSpec(
        (None, None, 1, rows),
        lambda b, h, j, t, ref: (b, h * group + lax.div(t, tiles), 0, query_tile(b, j, t, ref)),
    )
    return pl.pallas_call(
        functools.partial(_key_kernel, options=options, tiles=tiles),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=(batch, kv_heads, keys_given // keys, group * tiles),
            in_specs=[of_queries(dim), of_keys(dim), of_keys(value_dim), of_queries(value_dim), row, row],
            out_specs=[of_keys(dim), of_keys(value_dim)],
            scratch_shapes=[pltpu.VMEM((keys, dim), jnp.float32), pltpu.VMEM((keys, value_dim), jnp.float32)],
        ),
        out_shape=[jax.ShapeDtypeStruct(k.shape, k.dtype), jax.ShapeDtypeStruct(v.shape, v.dtype)],
        compiler_params=parameters(3),
        interpret=interpret,
        name="flash_attention_dkv",
    )(bounds, q, k, v, grad, lse, delta)


def _queries_of(bounds_ref: Any, b: Any, j: Any, size: int, rows: int, options: Options) -> tuple[Any, Any, Any, Any]:
    """Tiles of ``rows`` queries that see block j of ``size`` keys, as ``case.block_span``; none past the keys' end."""
    start, keys, queries = bounds_ref[b, 0], bounds_ref[b, 1], bounds_ref[b, 2]
    span = query_span(j * size, j * size + size - 1, start, queries, options)
    low, all_low, all_high, high = block_span(span, rows)
    return low, all_low, all_high, jnp.where(j * size < keys, high, low)


def _key_kernel(
    bounds_ref: Any,
    q_ref: Any,
    k_ref: Any,
    v_ref: Any,
    grad_ref: Any,
    lse_ref: Any,
    delta_ref: Any,
    dk_ref: Any,
    dv_ref: Any,
    dk_acc_ref: Any,
    dv_acc_ref: Any,
    *,
    options: Options,
    tiles: int,
) -> None:
    from jax.experimental import pallas as pl

    b, j, t = pl.program_id(0), pl.program_id(2), pl.program_id(3)
    rows, keys = q_ref.shape[0], k_ref.shape[0]
    low, all_low, all_high, high = _queries_of(bounds_ref, b, j, keys, rows, options)
    tile = low + lax.rem(t, tiles)

    @pl.when(t == 0)
    def _start():
        dk_acc_ref[...] = jnp.zeros(dk_acc_ref.shape, jnp.float32)
        dv_acc_ref[...] = jnp.zeros(dv_acc_ref.shape, jnp.float32)

    def step(masked):
        q, grad = q_ref[...], grad_ref[...]
        if masked:
            q, grad = (clear_from(a, 0, bounds_ref[b, 2] - tile * rows) for a in (q, grad))
        scores, slope = scores_of(k_ref[...], q, options)  # [keys, queries]
        weights = jnp.exp(scores * natural_factor(options) - lse_ref[...])
        if masked:
            seen = seen_by(
                bounds_ref[b, 0], j * keys, tile * rows, bounds_ref[b, 1], bounds_ref[b, 2], scores.shape, options
            )
            weights = jnp.where(seen, weights, 0.0)
        dscores = weights * (product(v_ref[...], grad, (1, 1)) - delta_ref[...]) * slope
        dv_acc_ref[...] += product(weights.astype(grad.dtype), grad, (1, 0))
        dk_acc_ref[...] += product(dscores.astype(q.dtype), q, (1, 0))

    inner = (tile >= all_low) & (tile < all_high)
    pl.when(inner & (tile < high))(functools.partial(step, False))
    pl.when(jnp.logical_not(inner) & (tile < high))(functools.partial(step, True))

    @pl.when(t == pl.num_programs(3) - 1)
    def _finish():
        left = bounds_ref[b, 1] - j * keys
        dk_ref[...] = clear_from(dk_acc_ref[...] * options.scale, 0, left).astype(dk_ref.dtype)
        dv_ref[...] = clear_from(dv_acc_ref[...], 0, left).astype(dv_ref.dtype)
