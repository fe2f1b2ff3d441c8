"""The Triton kernels of paged attention, and what they are specialised by. gpu.py calls them."""

import functools
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import lax

from .pages import BLOCK_PAGES, PAGE_SIZE
from .softmax import LOG2_E, MASKED, START, exponents, lookback, power, terms
from .tiles import MAX_HEAD, PART_PAGES, Tile

MERGE_ROWS, _MERGE_PARTS = 4, 8  # of a program of the merging kernel, and of a turn of its loop
_ONES = 16  # columns of the product that sums weights, the fewest there can be


@dataclass(frozen=True)
class Columns:
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
class Static:
    """What the kernels are specialised by."""

    tile: Tile
    tokens: int
    group: int  # heads that share a key/value head
    key_parts: tuple[Columns, ...]
    value_parts: tuple[Columns, ...]
    latent: bool
    quantized: bool
    sinks: bool
    query_factor: float
    softcap: float
    float32: bool  # the pages
    interpret: bool

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


def parts_of(first: int, end: int, most: int = MAX_HEAD) -> tuple[Columns, ...]:
    """Elements first..end-1 of a head in powers of two, 16..most, large ones first; the last may reach over end."""
    parts = []
    while first < end:
        size = 16
        while first + 2 * size <= end and size < most:
            size *= 2
        parts.append(Columns(first, size, end))
        first += size
    return tuple(parts)


def whole_kernel(*refs: Any, static: Static, count: int) -> None:
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


def split_kernel(*refs: Any, static: Static, count: int, lanes: int) -> None:
    from jax.experimental import pallas as pl
    from jax.experimental.pallas import triton

    *inputs, top_ref, total_ref, mixed_ref = refs
    row = lax.rem(pl.program_id(0), count) * static.tile.rows
    rows = row + jnp.arange(static.tile.rows)
    inside = rows < static.rows
    span = _span(inputs, rows, static)
    step = _step(inputs, rows, span, static)
    # The parts that the tile sees are shared out evenly, neighbours to one program, which never stops loading pages.
    first, end = lax.div(span.begin, PART_PAGES), lax.div(span.end + PART_PAGES - 1, PART_PAGES)
    share = lax.div(jnp.maximum(end - first, 0) + lanes - 1, lanes)
    first = first + lax.div(pl.program_id(0), count) * share
    begin = jnp.maximum(first * PART_PAGES, span.begin)
    end = jnp.minimum(jnp.minimum(first + share, end) * PART_PAGES, span.end)

    def write(number: Any, part: _Part) -> None:
        triton.store(top_ref.at[number, rows], part.top, mask=inside)
        triton.store(total_ref.at[number, rows], part.total.max(1), mask=inside)
        for columns, values in zip(static.value_parts, part.mixed):
            triton.store(mixed_ref.at[number, rows[:, None], columns.index()], values, mask=columns.mask(inside))

    def finished(index: Any, part: _Part) -> _Part:
        write(lax.div(index, PART_PAGES) - 1, part)
        return _start(static)

    def turn(index: Any, carry: tuple[Any, _Part]) -> tuple[Any, _Part]:
        page, part = carry
        starts = (lax.rem(index, PART_PAGES) == 0) & (index > begin)
        part = lax.cond(starts, finished, lambda _, part: part, index, part)
        return step(index, (page, part))

    _, part = lax.fori_loop(begin, end, turn, (_page(inputs, begin), _start(static)))

    @pl.when(end > begin)
    def _last_part() -> None:
        write(lax.div(end - 1, PART_PAGES), part)


def merge_kernel(
    blocks_ref: Any,
    window_ref: Any,
    positions_ref: Any,
    top_ref: Any,
    total_ref: Any,
    mixed_ref: Any,
    *refs: Any,
    static: Static,
    count: int,
) -> None:
    from jax.experimental import pallas as pl
    from jax.experimental.pallas import triton

    *logits_ref, out_ref = refs
    rows = pl.program_id(0) * MERGE_ROWS + jnp.arange(MERGE_ROWS)
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
        return _Part(top, jnp.broadcast_to(total[:, None], (MERGE_ROWS, 1)), tuple(mixed))

    turn = 1 if static.interpret else _MERGE_PARTS

    def some(i: Any, whole: _Part) -> _Part:
        parts = [read(i * turn + j) for j in range(turn)]  # loads that do not wait for each other
        return functools.reduce(_merged, parts, whole)

    begin = lax.div(jnp.where(position >= 0, first, count).min(), turn)
    chunks = lax.div(end.max() + turn - 1, turn)
    whole = lax.fori_loop(begin, chunks, some, _start(static, MERGE_ROWS, 1))
    _finish(whole, rows, logits_ref[0] if logits_ref else None, out_ref, static)


def _start(static: Static, rows: int = 0, sums: int = _ONES) -> _Part:
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


def _span(refs: Any, rows: Any, static: Static) -> _Span:
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


def _step(refs: Any, rows: Any, span: _Span, static: Static) -> Any:
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
    dot = functools.partial(_dot, static=static)

    def load(ref: Any, page: Any, columns: Columns, used: Any) -> Any:
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


def _dot(a: Any, b: Any, *, static: Static) -> Any:
    """a [m, k] times b [k, n] -> float32. Of float32 as three TF32 products."""
    from jax.experimental.pallas import triton

    if static.interpret:  # a CPU has no TF32 and is slow at short floats
        return triton.dot(a.astype(jnp.float32), b.astype(jnp.float32), precision=lax.Precision.HIGHEST)
    return triton.dot(a, b, precision=lax.DotAlgorithmPreset.TF32_TF32_F32_X3 if static.float32 else None)


def _types(pages: Any) -> tuple[Any, Any]:
    """Of the products with keys and with values. Weights times the scales of int8 values need bfloat16's range."""
    if pages == jnp.int8:
        return np.dtype(jnp.float16), np.dtype(jnp.bfloat16)
    return np.dtype(pages), np.dtype(pages)


def _finish(whole: _Part, rows: Any, logits_ref: Any, out_ref: Any, static: Static) -> None:
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
