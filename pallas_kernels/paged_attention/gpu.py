"""The Pallas kernels for NVIDIA cards of compute capability 8.0 and above, through Triton.

A program takes a tile of rows, the queries of some tokens for all heads that share a key/value head, and visits the
pages of their sequence one by one. The positions are cut into parts of PART_PAGES pages from position 0 on; the partial
results of the parts are merged in order. Two forms give the same bits:

* split, for few rows: a program per part and tile, so that a short query over a long context fills the card; a second
  kernel merges.
* whole, for many rows: a program per tile goes through all parts and merges as it goes.

Bits do not depend on the form, on the tile or on the company, for these reasons: factors of sums are powers of two (see
softmax.py); weights are summed by a product with ones, in the order of the tensor cores' products, not in one that
depends on how a tile lies in registers; and a page that a row does not see adds exact zeros.
"""

import functools
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from ..devices import cuda_capability
from ..errors import UnsupportedError
from .pages import BLOCK_PAGES, PAGE_SIZE, Case, KVPages
from .softmax import LOG2_E, MASKED, START, exponents, lookback, power, query_factor, terms
from .tiles import MIN_CAPABILITY, PART_PAGES, Tile, programs, tiles
from .xla import append_rows

__all__ = ["append_rows", "paged_attention", "unsupported"]

_ONES = 16  # columns of the product that sums weights, the fewest there can be
_MERGE_ROWS, _MERGE_UNROLL = 4, 8


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


@dataclass(frozen=True)
class _Columns:
    """Elements first..first+size-1 of a head, those from ``end`` on left out."""

    first: int
    size: int
    end: int

    def index(self) -> Any:  # [1, size]
        return (self.first + jnp.arange(self.size))[None, :]

    def mask(self, rows: Any) -> Any:
        """Those of rows [rows] that there are: [rows, size]."""
        if self.first + self.size <= self.end:
            return jnp.broadcast_to(rows[:, None], (rows.shape[0], self.size))
        return rows[:, None] & (self.index() < self.end)


@dataclass(frozen=True)
class _Static:
    """What the kernels are specialised by."""

    tile: Tile
    tokens: int
    group: int  # heads that share a key/value head
    key_parts: tuple[_Columns, ...]
    value_parts: tuple[_Columns, ...]
    latent: bool
    quantized: bool
    sinks: bool
    query_factor: float
    softcap: float
    precision: Any

    @property
    def rows(self) -> int:
        return self.tokens * self.group


class _Part(NamedTuple):
    """Sums over some positions: the integer maximum of the exponents of two [rows], the sum of weights [rows, _ONES]
    (all columns alike), the weighted values [rows, size] by parts of a head."""

    top: Any
    total: Any
    mixed: tuple[Any, ...]


class _Span(NamedTuple):
    """Positions of rows: of each row, -1 where there is none; the lowest that is seen, less one; and over all rows the
    lowest and highest position seen, the first page and the one after the last."""

    position: Any
    floor: Any
    low: Any
    high: Any
    begin: Any
    end: Any


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
    if dtype == jnp.int8 and 1 << 31 < pool.keys.size <= 1 << 32:
        raise UnsupportedError(
            f"int8 pages of shape {pool.keys.shape}: Triton's offsets wrap in arrays of 2 to 4 GiB; take a larger or a "
            "smaller pool"
        )
    if pool.latent:
        value_parts = parts_of(0, value_dim)
        key_parts = value_parts + parts_of(value_dim, head_dim)
    else:
        key_parts, value_parts = parts_of(0, head_dim), parts_of(0, value_dim)
    group = heads // kv_heads
    pair = _tiles(head_dim, value_dim, dtype)
    if pair is None:
        raise UnsupportedError(_too_large(head_dim, value_dim, dtype))
    few, many = pair
    rows_each = tokens * group
    if split is None:  # as soon as whole tiles cannot occupy half of the card
        split = _cdiv(rows_each, many.rows) * kv_heads * batch < programs(cuda_capability()) // 2
    static = _Static(
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
        precision=_precision(dtype, interpret),
    )
    operands = [x.reshape(1) for x in (layer, blocks, window)] + [tables, positions]
    rows = [q.reshape(batch, tokens, kv_heads, group, head_dim), pool.keys]
    rows += [] if pool.latent else [pool.values]
    rows += [] if pool.key_scales is None else [pool.key_scales]
    rows += [] if pool.value_scales is None or pool.latent else [pool.value_scales]
    logits = [] if sinks is None else [sinks.reshape(kv_heads, group)]
    if split:
        parts = _split(operands, rows, static, programs(cuda_capability()), interpret)
        out = _merge(operands, logits, parts, static, interpret)
    else:
        out = _whole(operands, rows, logits, static, interpret)
    return out.reshape(batch, tokens, heads, value_dim)


def parts_of(first: int, end: int) -> tuple[_Columns, ...]:
    """Elements first..end-1 of a head in powers of two from 16 on, large ones first; the last may reach over end."""
    parts = []
    while first < end:
        size = 16
        while first + 2 * size <= end:
            size *= 2
        parts.append(_Columns(first, size, end))
        first += size
    return tuple(parts)


def _cdiv(a: int, b: int) -> int:
    return -(-a // b)


def _precision(dtype: Any, interpret: bool) -> Any:
    """Of products: float32 by three TF32 products, which a CPU does not have."""
    if dtype != jnp.float32:
        return None
    return lax.Precision.HIGHEST if interpret else lax.DotAlgorithmPreset.TF32_TF32_F32_X3


def _padded(parts: tuple[_Columns, ...]) -> int:
    return max(part.first + part.size for part in parts)


def _operand_specs(operands: list[jax.Array]) -> list[Any]:
    """Of layer, blocks, window, tables and positions, for a grid (any, kv_heads, batch)."""
    from jax.experimental import pallas as pl

    one = pl.BlockSpec((1,), lambda i, h, b: (0,))
    return [one, one, one, *(pl.BlockSpec((None, a.shape[1]), lambda i, h, b: (b, 0)) for a in operands[3:])]


def _row_specs(rows: list[jax.Array], static: _Static) -> list[Any]:
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


def _out_spec(static: _Static) -> Any:
    from jax.experimental import pallas as pl

    shape = (None, static.tokens, None, static.group, _padded(static.value_parts))
    return pl.BlockSpec(shape, lambda i, h, b: (b, 0, h, 0, 0))


def _sink_specs(logits: list[jax.Array]) -> list[Any]:
    from jax.experimental import pallas as pl

    return [pl.BlockSpec((None, a.shape[1]), lambda i, h, b: (h, 0)) for a in logits]


def _out_shape(rows: jax.Array, static: _Static) -> Any:
    batch, tokens, kv_heads, group, _ = rows.shape
    return jax.ShapeDtypeStruct((batch, tokens, kv_heads, group, static.value_parts[-1].end), jnp.float32)


def _parameters(tile: Tile) -> Any:
    from jax.experimental.pallas import triton

    return triton.CompilerParams(num_warps=tile.warps, num_stages=tile.stages)


def _whole(
    operands: list[jax.Array], rows: list[jax.Array], logits: list[jax.Array], static: _Static, interpret: bool
) -> jax.Array:
    """All parts and their merging in one kernel -> [B, T, kv_heads, group, value_dim]."""
    from jax.experimental import pallas as pl

    batch, _, kv_heads = rows[0].shape[:3]
    count = _cdiv(static.rows, static.tile.rows)
    return pl.pallas_call(
        functools.partial(_whole_kernel, static=static, count=count),
        grid=(count, kv_heads, batch),
        in_specs=_operand_specs(operands) + _row_specs(rows, static) + _sink_specs(logits),
        out_specs=_out_spec(static),
        out_shape=_out_shape(rows[0], static),
        compiler_params=_parameters(static.tile),
        interpret=interpret,
        name="paged_attention_whole",
    )(*operands, *rows, *logits)


def _whole_kernel(*refs: Any, static: _Static, count: int) -> None:
    from jax.experimental import pallas as pl

    *inputs, out_ref = refs
    logits_ref = inputs.pop() if static.sinks else None
    row = (count - 1 - pl.program_id(0)) * static.tile.rows  # the tiles with the most to do begin first
    rows = row + jnp.arange(static.tile.rows)
    span = _span(inputs, rows, static)
    step = _step(inputs, rows, span, static)

    def turn(index: Any, carry: tuple[_Part, tuple[Any, _Part]]) -> tuple[_Part, tuple[Any, _Part]]:
        whole, (page, part) = carry
        first = lax.rem(index, PART_PAGES) == 0
        whole, part = lax.cond(first, lambda a, b: (_merged(a, b), _start(static)), lambda a, b: (a, b), whole, part)
        return whole, step(index, (page, part))

    carry = (_start(static), (_page(inputs, span.begin), _start(static)))
    whole, (_, part) = lax.fori_loop(span.begin, span.end, turn, carry)
    _finish(_merged(whole, part), rows, logits_ref, out_ref, static)


def _split(
    operands: list[jax.Array], rows: list[jax.Array], static: _Static, busy: int, interpret: bool
) -> list[jax.Array]:
    """The parts: tops and totals [B, kv_heads, parts, T * group], values [B, kv_heads, parts, T * group, value_dim].

    Parts that a row sees nothing of are not all written.
    """
    from jax.experimental import pallas as pl

    batch, _, kv_heads = rows[0].shape[:3]
    count = _cdiv(static.rows, static.tile.rows)
    parts = _cdiv(operands[3].shape[1], PART_PAGES)
    # A program takes every lanes-th part: a long table costs no programs that find nothing to do.
    lanes = min(parts, _cdiv(2 * busy, count * kv_heads * batch))
    shape = (batch, kv_heads, parts, static.rows)
    spec = pl.BlockSpec((None, None, parts, static.rows), lambda i, h, b: (b, h, 0, 0))
    dims = (parts, static.rows, _padded(static.value_parts))
    return pl.pallas_call(
        functools.partial(_split_kernel, static=static, count=count, lanes=lanes),
        grid=(count * lanes, kv_heads, batch),
        in_specs=_operand_specs(operands) + _row_specs(rows, static),
        out_specs=[spec, spec, pl.BlockSpec((None, None, *dims), lambda i, h, b: (b, h, 0, 0, 0))],
        out_shape=[
            jax.ShapeDtypeStruct(shape, jnp.float32),
            jax.ShapeDtypeStruct(shape, jnp.float32),
            jax.ShapeDtypeStruct((*shape, static.value_parts[-1].end), jnp.float32),
        ],
        compiler_params=_parameters(static.tile),
        interpret=interpret,
        name="paged_attention_split",
    )(*operands, *rows)


def _split_kernel(*refs: Any, static: _Static, count: int, lanes: int) -> None:
    from jax.experimental import pallas as pl
    from jax.experimental.pallas import triton

    *inputs, top_ref, total_ref, mixed_ref = refs
    row = lax.rem(pl.program_id(0), count) * static.tile.rows
    rows = row + jnp.arange(static.tile.rows)
    inside = rows < static.rows
    span = _span(inputs, rows, static)
    step = _step(inputs, rows, span, static)
    first = lax.div(span.begin, PART_PAGES) + lax.div(pl.program_id(0), count)
    end = lax.div(span.end + PART_PAGES - 1, PART_PAGES)

    def one(i: Any, _: None) -> None:
        number = first + i * lanes
        begin = jnp.maximum(number * PART_PAGES, span.begin)
        carry = _page(inputs, begin), _start(static)
        _, part = lax.fori_loop(begin, jnp.minimum((number + 1) * PART_PAGES, span.end), step, carry)
        triton.store(top_ref.at[number, rows], part.top, mask=inside)
        triton.store(total_ref.at[number, rows], part.total.max(1), mask=inside)
        for columns, values in zip(static.value_parts, part.mixed):
            triton.store(mixed_ref.at[number, rows[:, None], columns.index()], values, mask=columns.mask(inside))

    lax.fori_loop(0, lax.div(jnp.maximum(end - first, 0) + lanes - 1, lanes), one, None)


def _merge(
    operands: list[jax.Array], logits: list[jax.Array], parts: list[jax.Array], static: _Static, interpret: bool
) -> jax.Array:
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
        functools.partial(_merge_kernel, static=static, count=count),
        grid=(_cdiv(rows, _MERGE_ROWS), kv_heads, batch),
        in_specs=[*specs, spec, spec, values, *_sink_specs(logits)],
        out_specs=_out_spec(static),
        out_shape=jax.ShapeDtypeStruct(shape, jnp.float32),
        compiler_params=_parameters(Tile(_MERGE_ROWS, 4, 1)),
        interpret=interpret,
        name="paged_attention_merge",
    )(*operands, *parts, *logits)


def _merge_kernel(
    blocks_ref: Any,
    window_ref: Any,
    positions_ref: Any,
    top_ref: Any,
    total_ref: Any,
    mixed_ref: Any,
    *refs: Any,
    static: _Static,
    count: int,
) -> None:
    from jax.experimental import pallas as pl
    from jax.experimental.pallas import triton

    *logits_ref, out_ref = refs
    rows = pl.program_id(0) * _MERGE_ROWS + jnp.arange(_MERGE_ROWS)
    inside = rows < static.rows
    token = lax.div(rows, static.group)
    position = triton.load(positions_ref.at[token], mask=inside, other=-1)
    reach = lookback(window_ref[0])
    pages = PART_PAGES * PAGE_SIZE
    first = lax.div(jnp.maximum(position - reach + 1, 0), pages)  # [rows]
    last = jnp.minimum(position, blocks_ref[0] * (BLOCK_PAGES * PAGE_SIZE) - 1)
    end = jnp.where(last >= 0, lax.div(jnp.maximum(last, 0), pages) + 1, 0)

    def read(number: Any) -> _Part:
        known = inside & (number >= first) & (number < end)
        at = jnp.minimum(number, count - 1)
        top = triton.load(top_ref.at[at, rows], mask=known, other=START)
        total = triton.load(total_ref.at[at, rows], mask=known, other=0.0)
        mixed = [
            triton.load(mixed_ref.at[at, rows[:, None], columns.index()], mask=columns.mask(known), other=0.0)
            for columns in static.value_parts
        ]
        return _Part(top, jnp.broadcast_to(total[:, None], (_MERGE_ROWS, 1)), tuple(mixed))

    def some(i: Any, whole: _Part) -> _Part:
        parts = [read(i * _MERGE_UNROLL + j) for j in range(_MERGE_UNROLL)]  # loads that do not wait for each other
        return functools.reduce(_merged, parts, whole)

    begin = lax.div(jnp.where(position >= 0, first, count).min(), _MERGE_UNROLL)
    chunks = lax.div(end.max() + _MERGE_UNROLL - 1, _MERGE_UNROLL)
    whole = lax.fori_loop(begin, chunks, some, _start(static, _MERGE_ROWS, 1))
    _finish(whole, rows, logits_ref[0] if logits_ref else None, out_ref, static)


def _start(static: _Static, rows: int = 0, sums: int = _ONES) -> _Part:
    """Sums over no positions."""
    rows = rows or static.tile.rows
    zeros = tuple(jnp.zeros((rows, columns.size), jnp.float32) for columns in static.value_parts)
    return _Part(jnp.full((rows,), START, jnp.float32), jnp.zeros((rows, sums), jnp.float32), zeros)


def _merged(a: _Part, b: _Part) -> _Part:
    """Sums over both. One over nothing changes no bit of the other."""
    top = jnp.maximum(a.top, b.top)
    keep, add = power(a.top - top)[:, None], power(b.top - top)[:, None]
    mixed = tuple(x * keep + y * add for x, y in zip(a.mixed, b.mixed))
    return _Part(top, a.total * keep + b.total * add, mixed)


def _span(refs: Any, rows: Any, static: _Static) -> _Span:
    from jax.experimental.pallas import triton

    _, blocks_ref, window_ref, _, positions_ref = refs[:5]
    reach = lookback(window_ref[0])
    position = triton.load(positions_ref.at[lax.div(rows, static.group)], mask=rows < static.rows, other=-1)
    high = position.max()
    low = jnp.maximum(jnp.where(position >= 0, position, high).min() - reach + 1, 0)
    end = jnp.minimum(lax.div(high + PAGE_SIZE, PAGE_SIZE), blocks_ref[0] * BLOCK_PAGES)  # 0 pages for a high of -1
    return _Span(position, position - reach, low, high, lax.div(low, PAGE_SIZE), end)


def _page(refs: Any, index: Any) -> Any:
    """Where page ``index`` of the sequence lies, or any page if it has none of that number."""
    table_ref = refs[3]
    return table_ref[jnp.minimum(index, table_ref.shape[0] - 1)]


def _step(refs: Any, rows: Any, span: _Span, static: _Static) -> Any:
    """(index of a page of the sequence, (where it lies, sums)) -> the same of the next one, with its positions summed.

    Where the next page lies is read a turn ahead, for else Triton waits for it before it asks for keys and values, and
    for those before it asks for the next.
    """
    from jax.experimental.pallas import triton

    layer_ref, _, _, _, _, q_ref, k_ref, *rest = refs
    v_ref = k_ref if static.latent else rest.pop(0)
    scale_refs = rest[:2]  # of keys, of values; one where values are a part of the keys
    layer = layer_ref[0]
    token, head = lax.div(rows, static.group), lax.rem(rows, static.group)
    score_type, weight_type = _types(k_ref.dtype)
    queries = []
    for columns in static.key_parts:
        at = q_ref.at[token[:, None], head[:, None], columns.index()]
        q = triton.load(at, mask=columns.mask(rows < static.rows), other=0.0)
        queries.append(terms(q * static.query_factor, score_type))
    ones = jnp.ones((PAGE_SIZE, _ONES), weight_type)
    dot = functools.partial(triton.dot, precision=static.precision)

    def load(ref: Any, page: Any, columns: _Columns, used: Any) -> Any:
        row = jnp.arange(PAGE_SIZE)[:, None]
        return triton.load(ref.at[layer, page, row, columns.index()], mask=columns.mask(used), other=0)

    def scale(ref: Any, page: Any, used: Any) -> Any:
        return triton.load(ref.at[layer, page, jnp.arange(PAGE_SIZE)], mask=used, other=0.0)[None, :]

    def step(index: Any, turn: tuple[Any, _Part]) -> tuple[Any, _Part]:
        page, carry = turn
        next_page = _page(refs, index + 1)
        at = index * PAGE_SIZE + jnp.arange(PAGE_SIZE)
        used = (at >= span.low) & (at <= span.high)  # other rows may hold anything, NaN too
        keys = [load(k_ref, page, columns, used) for columns in static.key_parts]
        products = [dot(q, k.astype(score_type).T) for qs, k in zip(queries, keys) for q in qs]
        scores = functools.reduce(jnp.add, products)  # [rows, PAGE_SIZE]
        if static.quantized:
            scores = scores * scale(scale_refs[0], page, used)
        scores = exponents(scores, static.softcap)
        seen = (at[None, :] <= span.position[:, None]) & (at[None, :] > span.floor[:, None])
        scores = jnp.where(seen, scores, MASKED)
        top = jnp.maximum(carry.top, jnp.ceil(scores.max(1)))
        weights = jnp.exp2(scores - top[:, None])
        keep = power(carry.top - top)[:, None]
        total = carry.total * keep + dot(weights.astype(weight_type), ones)
        if static.latent:
            values = keys[: len(static.value_parts)]
        else:
            values = [load(v_ref, page, columns, used) for columns in static.value_parts]
        if static.quantized:
            weights = weights * scale(scale_refs[-1], page, used)
        weights = weights.astype(weight_type)
        mixed = [m * keep + dot(weights, v.astype(weight_type)) for m, v in zip(carry.mixed, values)]
        return next_page, _Part(top, total, tuple(mixed))

    return step


def _types(pages: Any) -> tuple[Any, Any]:
    """Of the products with keys and with values. Weights times the scales of int8 values need bfloat16's range."""
    if pages == jnp.int8:
        return np.dtype(jnp.float16), np.dtype(jnp.bfloat16)
    return np.dtype(pages), np.dtype(pages)


def _finish(whole: _Part, rows: Any, logits_ref: Any, out_ref: Any, static: _Static) -> None:
    """Takes the sinks in, normalises and writes."""
    from jax.experimental.pallas import triton

    inside = rows < static.rows
    token, head = lax.div(rows, static.group), lax.rem(rows, static.group)
    total = whole.total.max(1)
    factor = jnp.ones_like(total)
    if logits_ref is not None:  # a position of its own whose value is zero
        sink = triton.load(logits_ref.at[head], mask=inside, other=0.0) * LOG2_E
        top = jnp.maximum(whole.top, jnp.ceil(sink))
        factor = power(whole.top - top)
        total = total * factor + jnp.exp2(sink - top)
    total = jnp.where(total > 0.0, total, 1.0)
    for columns, values in zip(static.value_parts, whole.mixed):
        at = out_ref.at[token[:, None], head[:, None], columns.index()]
        triton.store(at, values * factor[:, None] / total[:, None], mask=columns.mask(inside))
