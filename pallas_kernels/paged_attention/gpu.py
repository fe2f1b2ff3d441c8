"""The Pallas kernels for NVIDIA cards of compute capability 8.0 and above, through Triton.

A program takes a tile of rows, the queries of some tokens for all heads that share a key/value head, and visits the
pages of their sequence one by one. The positions are cut into parts of PART_PAGES pages from position 0 on; the partial
results of the parts are merged in order. Two forms give the same bits:

* split, for few rows: programs share the parts of a tile, so that a short query over a long context fills the card; a
  second kernel merges.
* whole, for many rows: a program per tile goes through all parts and merges as it goes.

Bits do not depend on the form, on the tile or on the company, for these reasons: factors of sums are powers of two (see
softmax.py); weights are summed by a product with ones, in the order of the tensor cores' products, not in one that
depends on how a tile lies in registers; and a page that a row does not see adds exact zeros.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp

from ..devices import cuda_capability
from ..errors import UnsupportedError
from .gpu_kernels import MERGE_ROWS, Columns, Static, merge_kernel, parts_of, split_kernel, whole_kernel
from .pages import PAGE_SIZE, Case, KVPages
from .softmax import query_factor
from .tiles import MAX_HEAD, MIN_CAPABILITY, PART_PAGES, Tile, programs, tiles
from .xla import append_rows

__all__ = ["append_rows", "paged_attention", "unsupported"]


def unsupported(case: Case) -> str | None:
    """Why the kernels do not take this case, or None."""
    capability = cuda_capability()
    if capability is not None and capability < MIN_CAPABILITY:
        return f"the card has compute capability {capability / 10}, and Triton's kernels need 8.0"
    if _tiles(case.head_dim, case.value_dim, case.dtype) is None:
        return _too_large(case.head_dim, case.value_dim, case.dtype)
    return None


def _tiles(head_dim: int, value_dim: int, dtype: Any) -> tuple[Tile, Tile] | None:
    return tiles(cuda_capability(), max(head_dim, value_dim), dtype == jnp.float32)


def _too_large(head_dim: int, value_dim: int, dtype: Any) -> str:
    heads = f"{head_dim} (keys) and {value_dim} (values)"
    return f"registers and shared memory of the card do not hold tiles of {dtype} heads of {heads} elements"


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
    split: bool | None = None,
) -> jax.Array:
    """As api.paged_attention, batch form. interpret: run the kernels on a CPU. split: the form, by size if None.

    Raises UnsupportedError for int8 pages of 2 to 4 GiB, where Triton's offsets of 32 bits wrap.
    """
    batch, tokens, heads, head_dim = q.shape
    kv_heads, dtype = pool.keys.shape[2], pool.keys.dtype
    for name, array in (("keys", pool.keys), ("values", pool.values)):
        if dtype == jnp.int8 and 1 << 31 < array.size <= 1 << 32:
            raise UnsupportedError(
                f"{name} of the pool are int8 {array.shape}: Triton's offsets wrap in arrays of 2 to 4 GiB; take a "
                "larger pool or a smaller one"
            )
    group = heads // kv_heads
    pair = _tiles(head_dim, value_dim, dtype)
    if pair is None:
        raise UnsupportedError(_too_large(head_dim, value_dim, dtype))
    few, many = pair
    if interpret:  # a CPU rounds short floats or not, by the number of rows
        few = many
    rows_each = tokens * group
    if split is None:  # as soon as whole tiles cannot occupy half of the card
        split = _cdiv(rows_each, many.rows) * kv_heads * batch < programs(cuda_capability()) // 2
    # Sums are written by way of shared memory, some columns at a time. Products with keys are cut up in the same way in
    # both forms, as their bits go by it.
    most = 64 if split or pool.latent else MAX_HEAD
    value_parts = parts_of(0, value_dim, most)
    key_parts = value_parts + parts_of(value_dim, head_dim, most) if pool.latent else parts_of(0, head_dim)
    static = Static(
        tile=few if split and rows_each <= few.rows else many,
        tokens=tokens,
        group=group,
        key_parts=key_parts,
        value_parts=value_parts,
        latent=pool.latent,
        quantized=dtype == jnp.int8,
        sinks=sinks is not None,
        query_factor=query_factor(scale, softcap),
        softcap=softcap,
        float32=dtype == jnp.float32,
        interpret=interpret,
    )
    operands = [x.reshape(1) for x in (layer, blocks, window)] + [tables, positions]
    rows = [q.reshape(batch, tokens, kv_heads, group, head_dim), pool.keys]
    rows += [] if pool.latent else [pool.values]
    rows += [] if pool.key_scales is None else [pool.key_scales]
    rows += [] if pool.value_scales is None or pool.latent else [pool.value_scales]
    logits = [] if sinks is None else [sinks.reshape(kv_heads, group)]
    if split:
        parts = _split(operands, rows, static, programs(cuda_capability()))
        out = _merge(operands, logits, parts, static)
    else:
        out = _whole(operands, rows, logits, static)
    return out.reshape(batch, tokens, heads, value_dim)


def _cdiv(a: int, b: int) -> int:
    return -(-a // b)


def _padded(parts: tuple[Columns, ...]) -> int:
    return max(part.first + part.size for part in parts)


def _operand_specs(operands: list[jax.Array]) -> list[Any]:
    """Of layer, blocks, window, tables and positions, for a grid (any, kv_heads, batch)."""
    from jax.experimental import pallas as pl

    one = pl.BlockSpec((1,), lambda i, h, b: (0,))
    return [one, one, one, *(pl.BlockSpec((None, a.shape[1]), lambda i, h, b: (b, 0)) for a in operands[3:])]


def _row_specs(rows: list[jax.Array], static: Static) -> list[Any]:
    """Of queries, keys, values and their scales; all pages, as the kernel picks them."""
    from jax.experimental import pallas as pl

    layers, pages = rows[1].shape[:2]
    queries = (None, static.tokens, None, static.group, _padded(static.key_parts))
    specs = [pl.BlockSpec(queries, lambda i, h, b: (b, 0, h, 0, 0))]
    dims = [_padded(static.key_parts)] + ([] if static.latent else [_padded(static.value_parts)])
    for dim in dims:
        specs.append(pl.BlockSpec((layers, pages, None, PAGE_SIZE, dim), lambda i, h, b: (0, 0, h, 0, 0)))
    while len(specs) < len(rows):
        specs.append(pl.BlockSpec((layers, pages, None, PAGE_SIZE), lambda i, h, b: (0, 0, h, 0)))
    return specs


def _out_spec(static: Static) -> Any:
    from jax.experimental import pallas as pl

    shape = (None, static.tokens, None, static.group, _padded(static.value_parts))
    return pl.BlockSpec(shape, lambda i, h, b: (b, 0, h, 0, 0))


def _sink_specs(logits: list[jax.Array]) -> list[Any]:
    from jax.experimental import pallas as pl

    return [pl.BlockSpec((None, a.shape[1]), lambda i, h, b: (h, 0)) for a in logits]


def _out_shape(rows: jax.Array, static: Static) -> Any:
    batch, tokens, kv_heads, group, _ = rows.shape
    return jax.ShapeDtypeStruct((batch, tokens, kv_heads, group, static.value_parts[-1].end), jnp.float32)


def _parameters(tile: Tile) -> Any:
    from jax.experimental.pallas import triton

    return triton.CompilerParams(num_warps=tile.warps, num_stages=tile.stages)


def _whole(operands: list[jax.Array], rows: list[jax.Array], logits: list[jax.Array], static: Static) -> jax.Array:
    """All parts and their merging in one kernel -> [B, T, kv_heads, group, value_dim]."""
    from jax.experimental import pallas as pl

    batch, _, kv_heads = rows[0].shape[:3]
    count = _cdiv(static.rows, static.tile.rows)
    return pl.pallas_call(
        functools.partial(whole_kernel, static=static, count=count),
        grid=(count, kv_heads, batch),
        in_specs=_operand_specs(operands) + _row_specs(rows, static) + _sink_specs(logits),
        out_specs=_out_spec(static),
        out_shape=_out_shape(rows[0], static),
        compiler_params=_parameters(static.tile),
        interpret=static.interpret,
        name="paged_attention_whole",
    )(*operands, *rows, *logits)


def _split(operands: list[jax.Array], rows: list[jax.Array], static: Static, busy: int) -> list[jax.Array]:
    """The parts: tops and totals [B, kv_heads, parts, T * group], values [B, kv_heads, parts, T * group, value_dim].

    Parts that a row sees nothing of are not all written.
    """
    from jax.experimental import pallas as pl

    batch, _, kv_heads = rows[0].shape[:3]
    count = _cdiv(static.rows, static.tile.rows)
    parts = _cdiv(operands[3].shape[1], PART_PAGES)
    lanes = max(1, min(parts, busy // (count * kv_heads * batch)))  # programs that share the parts of a tile
    shape = (batch, kv_heads, parts, static.rows)
    spec = pl.BlockSpec((None, None, parts, static.rows), lambda i, h, b: (b, h, 0, 0))
    dims = (parts, static.rows, _padded(static.value_parts))
    return pl.pallas_call(
        functools.partial(split_kernel, static=static, count=count, lanes=lanes),
        grid=(count * lanes, kv_heads, batch),
        in_specs=_operand_specs(operands) + _row_specs(rows, static),
        out_specs=[spec, spec, pl.BlockSpec((None, None, *dims), lambda i, h, b: (b, h, 0, 0, 0))],
        out_shape=[
            jax.ShapeDtypeStruct(shape, jnp.float32),
            jax.ShapeDtypeStruct(shape, jnp.float32),
            jax.ShapeDtypeStruct((*shape, static.value_parts[-1].end), jnp.float32),
        ],
        compiler_params=_parameters(static.tile),
        interpret=static.interpret,
        name="paged_attention_split",
    )(*operands, *rows)


def _merge(operands: list[jax.Array], logits: list[jax.Array], parts: list[jax.Array], static: Static) -> jax.Array:
    """The parts of every row merged in order -> [B, T, kv_heads, group, value_dim]."""
    from jax.experimental import pallas as pl

    batch, kv_heads, count, rows = parts[0].shape
    spec = pl.BlockSpec((None, None, count, rows), lambda i, h, b: (b, h, 0, 0))
    dims = (count, rows, _padded(static.value_parts))
    values = pl.BlockSpec((None, None, *dims), lambda i, h, b: (b, h, 0, 0, 0))
    shape = (batch, static.tokens, kv_heads, static.group, static.value_parts[-1].end)
    operands = operands[1:3] + operands[4:]  # blocks, window, positions
    specs = _operand_specs([operands[0], *operands[:2], operands[2]])[1:]
    return pl.pallas_call(
        functools.partial(merge_kernel, static=static, count=count),
        grid=(_cdiv(rows, MERGE_ROWS), kv_heads, batch),
        in_specs=[*specs, spec, spec, values, *_sink_specs(logits)],
        out_specs=_out_spec(static),
        out_shape=jax.ShapeDtypeStruct(shape, jnp.float32),
        compiler_params=_parameters(Tile(MERGE_ROWS, 4, 1)),
        interpret=static.interpret,
        name="paged_attention_merge",
    )(*operands, *parts, *logits)
