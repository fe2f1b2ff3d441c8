"""The Pallas kernel for TPUs.

A program takes a tile of rows, the queries of some tokens for the heads that share a key/value head, of all key/value
heads. The grid's last axis walks over the blocks of positions that the tile sees, some at a time; their pages, found
through the table in scalar memory, are copied while the ones before are summed. The grid is as long as `blocks` says;
what it has beyond a tile's blocks costs neither a copy nor arithmetic. Sums run over blocks of BLOCK_SIZE positions in
order, so bits depend neither on the tile nor on how many blocks a step takes.
"""

import functools
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from .pages import BLOCK_PAGES, BLOCK_SIZE, Case, KVPages
from .softmax import LOG2_E, MASKED, START, exponents, lookback, power, query_factor, terms
from .tiles import TPU
from .xla import append_rows

__all__ = ["append_rows", "paged_attention", "unsupported"]


def unsupported(case: Case) -> str | None:
    """Why the kernel does not take this case, or None."""
    if case.dtype == jnp.float16:
        return "TPUs have no float16; bfloat16 pages do"
    size = _block_bytes(case.kv_heads, case.head_dim, 0 if case.latent else case.value_dim, case.dtype)
    if size > TPU.step_bytes:
        heads = f"{case.kv_heads} key/value heads of {case.head_dim} and {case.value_dim} elements"
        return f"{BLOCK_SIZE} positions of {heads} in {case.dtype} have {size} bytes, more than {TPU.step_bytes}"
    return None


@dataclass(frozen=True)
class _Static:
    """What the kernel is specialised by."""

    rows: int  # of a tile
    group: int
    blocks: int  # a step
    value_dim: int
    latent: bool
    quantized: bool
    sinks: bool
    softcap: float


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
    interpret: bool = False,
) -> jax.Array:
    """As api.paged_attention, batch form. interpret: run the kernel on a CPU."""
    from jax.experimental import pallas as pl
    from jax.experimental.pallas import tpu as pltpu

    batch, tokens, heads, head_dim = q.shape
    kv_heads, dtype = pool.keys.shape[2], pool.keys.dtype
    group = heads // kv_heads
    size = _block_bytes(kv_heads, head_dim, pool.values.shape[-1], dtype)
    static = _Static(
        rows=_tile_rows(tokens * group, kv_heads * max(head_dim, value_dim)),
        group=group,
        blocks=max(1, min(TPU.step_blocks, TPU.step_bytes // size)),
        value_dim=value_dim,
        latent=pool.latent,
        quantized=dtype == jnp.int8,
        sinks=sinks is not None,
        softcap=softcap,
    )
    tiles = -(-tokens * group // static.rows)

    def tiled(x: jax.Array) -> jax.Array:
        """[B, T, kv_heads, group, n] -> [B, kv_heads, rows of all tiles, n]"""
        x = x.transpose(0, 2, 1, 3, 4).reshape(x.shape[0], x.shape[2], tokens * group, x.shape[4])
        return jnp.pad(x, ((0, 0), (0, 0), (0, tiles * static.rows - tokens * group), (0, 0)))

    queries = tiled((q * query_factor(scale, softcap)).reshape(batch, tokens, kv_heads, group, head_dim))
    where = tiled(jnp.broadcast_to(positions[:, :, None, None, None] + 1, (batch, tokens, 1, group, 1)))[:, 0] - 1
    scalars = jnp.stack([layer, blocks, window])
    counts = (positions >= 0).sum(1, dtype=jnp.int32)
    starts = positions[:, 0]
    prefetched = (scalars, tables.reshape(-1), starts, counts)

    rows = static.rows
    in_specs = [
        pl.BlockSpec((None, kv_heads, rows, head_dim), lambda b, i, j, *_: (b, 0, i, 0)),
        pl.BlockSpec((None, rows, 1), lambda b, i, j, *_: (b, i, 0)),
    ]
    operands = [queries, where]
    if sinks is not None:
        each = jnp.broadcast_to(sinks.reshape(1, 1, kv_heads, group, 1), (1, tokens, kv_heads, group, 1))
        in_specs.append(pl.BlockSpec((None, kv_heads, rows, 1), lambda b, i, j, *_: (0, 0, i, 0)))
        operands.append(tiled(each) * LOG2_E)

    def at(number: int, rank: int) -> Any:
        """Index map of page ``number`` of a step, of an array [layers, pages, ...]."""

        def index(b: Any, i: Any, j: Any, scalars: Any, tables_ref: Any, starts: Any, counts: Any) -> Any:
            low, end = _span(scalars, starts[b], counts[b], i, static)
            # Past the tile's last block, that one again: no new copy.
            block = jnp.maximum(jnp.minimum(low + j * static.blocks + number // BLOCK_PAGES, end - 1), 0)
            page = tables_ref[b * tables.shape[1] + block * BLOCK_PAGES + number % BLOCK_PAGES]
            page = jnp.maximum(jnp.minimum(page, pool.num_pages - 1), 0)
            return scalars[0], page, *(0,) * (rank - 2)

        return index

    arrays = [pool.keys] + ([] if pool.latent else [pool.values])
    arrays += [a for a in (pool.key_scales, None if pool.latent else pool.value_scales) if a is not None]
    for array in arrays:
        shape = (None, None, *array.shape[2:])
        in_specs += [pl.BlockSpec(shape, at(n, array.ndim)) for n in range(static.blocks * BLOCK_PAGES)]
        operands += [array] * (static.blocks * BLOCK_PAGES)

    steps = jnp.maximum(-(-blocks // static.blocks), 1)
    out = pl.pallas_call(
        functools.partial(_kernel, static=static),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=len(prefetched),
            grid=(batch, tiles, steps),
            in_specs=in_specs,
            out_specs=pl.BlockSpec((None, kv_heads, rows, value_dim), lambda b, i, j, *_: (b, 0, i, 0)),
            scratch_shapes=[
                pltpu.VMEM((kv_heads, rows, 1), jnp.float32),
                pltpu.VMEM((kv_heads, rows, 1), jnp.float32),
                pltpu.VMEM((kv_heads, rows, value_dim), jnp.float32),
            ],
        ),
        out_shape=jax.ShapeDtypeStruct((batch, kv_heads, tiles * rows, value_dim), jnp.float32),
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "parallel", "arbitrary")),
        interpret=interpret,
        name="paged_attention",
    )(*prefetched, *operands)
    out = out[:, :, : tokens * group].reshape(batch, kv_heads, tokens, group, value_dim)
    return out.transpose(0, 2, 1, 3, 4).reshape(batch, tokens, heads, value_dim)


def _block_bytes(kv_heads: int, head_dim: int, value_dim: int, dtype: Any) -> int:
    """Of the keys and values of a block of positions."""
    return BLOCK_SIZE * kv_heads * (head_dim + value_dim) * dtype.itemsize


def _tile_rows(rows: int, elements: int) -> int:
    """Rows of a tile, a multiple of 8, for ``rows`` in all with ``elements`` for each in all key/value heads."""
    most = max(8, min(TPU.rows, TPU.tile_bytes // (4 * elements) // 8 * 8))
    return min(most, -(-rows // 8) * 8)


def _span(scalars: Any, start: Any, count: Any, tile: Any, static: _Static) -> tuple[Any, Any]:
    """The blocks a tile sees: the first one and the one after the last."""
    first = lax.div(tile * static.rows, static.group)
    last = jnp.minimum(lax.div((tile + 1) * static.rows - 1, static.group), count - 1)
    low = lax.div(jnp.maximum(start + first - lookback(scalars[2]) + 1, 0), BLOCK_SIZE)
    end = jnp.minimum(lax.div(start + last, BLOCK_SIZE) + 1, scalars[1])
    return low, jnp.where(first < count, end, 0)


def _kernel(*refs: Any, static: _Static) -> None:
    from jax.experimental import pallas as pl

    scalars, _, starts, counts, q_ref, where_ref, *rest = refs
    sinks_ref = rest.pop(0) if static.sinks else None
    *rest, out_ref, top_ref, total_ref, mixed_ref = rest
    pages = static.blocks * BLOCK_PAGES
    kinds = [rest[n : n + pages] for n in range(0, len(rest), pages)]
    keys = kinds.pop(0)
    values = keys if static.latent else kinds.pop(0)
    b, i, j = (pl.program_id(axis) for axis in range(3))
    low, end = _span(scalars, starts[b], counts[b], i, static)
    reach = lookback(scalars[2])

    @pl.when(j == 0)
    def _begin() -> None:
        top_ref[...] = jnp.full(top_ref.shape, START, jnp.float32)
        total_ref[...] = jnp.zeros(total_ref.shape, jnp.float32)
        mixed_ref[...] = jnp.zeros(mixed_ref.shape, jnp.float32)

    for n in range(static.blocks):
        block = low + j * static.blocks + n
        own = slice(n * BLOCK_PAGES, (n + 1) * BLOCK_PAGES)
        sums = functools.partial(
            _block,
            static=static,
            first=block * BLOCK_SIZE,
            used=(starts[b] + lax.div(i * static.rows, static.group) - reach, starts[b] + counts[b] - 1),
            reach=reach,
            refs=(q_ref, where_ref, top_ref, total_ref, mixed_ref),
            keys=keys[own],
            values=values[own],
            scales=[kind[own] for kind in kinds],
        )
        pl.when(block < end)(functools.partial(lax.fori_loop, 0, q_ref.shape[0], lambda h, _, sums=sums: sums(h), None))

    @pl.when(j == pl.num_programs(2) - 1)
    def _finish() -> None:
        total, mixed = total_ref[...], mixed_ref[...]
        if sinks_ref is not None:  # a position of its own whose value is zero
            sink = sinks_ref[...]
            top = jnp.maximum(top_ref[...], jnp.ceil(sink))
            factor = power(top_ref[...] - top)
            total = total * factor + jnp.exp2(sink - top)
            mixed = mixed * factor
        out_ref[...] = mixed / jnp.where(total > 0.0, total, 1.0)


def _block(
    head: Any,
    *,
    static: _Static,
    first: Any,
    used: tuple[Any, Any],
    reach: Any,
    refs: tuple[Any, ...],
    keys: list[Any],
    values: list[Any],
    scales: list[Any],
) -> None:
    """Adds the positions first..first+BLOCK_SIZE-1 to the sums of a key/value head.

    used: the positions above the first and up to the second are seen; others may hold anything, NaN too.
    """
    from jax.experimental import pallas as pl

    q_ref, where_ref, top_ref, total_ref, mixed_ref = refs
    dtype = jnp.dtype(jnp.bfloat16) if static.quantized else keys[0].dtype
    precision = lax.Precision.HIGHEST if dtype == jnp.float32 else None

    def rows_of(pages: list[Any]) -> Any:  # [BLOCK_SIZE, dim]
        return jnp.concatenate([ref[head] for ref in pages], axis=0).astype(dtype)

    def scale_of(pages: list[Any]) -> Any:  # [1, BLOCK_SIZE]
        return jnp.concatenate([ref[pl.ds(head, 1), :] for ref in pages], axis=1)

    def product(a: Any, b: Any, contracted: int) -> Any:
        numbers = (((1,), (contracted,)), ((), ()))
        return lax.dot_general(a, b, numbers, precision=precision, preferred_element_type=jnp.float32)

    k = rows_of(keys)
    products = functools.reduce(jnp.add, [product(q, k, 1) for q in terms(q_ref[head], dtype)])  # [rows, BLOCK_SIZE]
    if static.quantized:
        products = products * scale_of(scales[0])
    where = where_ref[...]  # [rows, 1]
    at = first + lax.broadcasted_iota(jnp.int32, products.shape, 1)
    seen = (at <= where) & (at > where - reach)
    scores = jnp.where(seen, exponents(products, static.softcap), MASKED)
    top = top_ref[head]
    new_top = jnp.maximum(top, jnp.ceil(scores.max(1, keepdims=True)))
    weights = jnp.exp2(scores - new_top)
    keep = power(top - new_top)
    total_ref[head] = total_ref[head] * keep + weights.astype(dtype).astype(jnp.float32).sum(1, keepdims=True)
    top_ref[head] = new_top
    v = k[:, : static.value_dim] if static.latent else rows_of(values)
    row = first + lax.broadcasted_iota(jnp.int32, v.shape, 0)
    v = jnp.where((row > used[0]) & (row <= used[1]), v, jnp.zeros_like(v))
    if static.quantized:
        weights = jnp.where(seen, weights * scale_of(scales[-1]), 0.0)
    mixed_ref[head] = mixed_ref[head] * keep + product(weights.astype(dtype), v, 0)
