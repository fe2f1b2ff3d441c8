"""The Pallas kernels for NVIDIA cards of compute capability 8.0 and above, through Triton.

Two kernels, each for all linears of the call. A program takes ROWS neighbouring rows and one of the slots that occur
among them, found by comparing their slots in registers: nothing is sorted, gathered or scattered, and a decode batch is
one block of rows, a prompt's rows are blocks of one slot. A program that finds no slot ends at once.

* shrink: A x over PART columns, [parts, M, R]; the parts are programs of their own, so that few rows fill the card.
* expand: the parts added in order, times the scale, times B, added to base, which is the result's own buffer. Rows
  without an adapter are not touched.

Products are three TF32 products (better than float32's NMSE of 1e-6). Tiles of rows have one size, and the order of
every sum is fixed by K and R, so a row's bits do not depend on the other rows, as far as the tensor cores treat the
rows of a tile alike. Not yet run on a GPU.
"""

import functools
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from ..devices import cuda_capability
from .case import Adapters, Case

MIN_CAPABILITY = 80
ROWS = 16  # of a tile, the fewest the tensor cores take
PART = 1024  # columns of x that one program sums
_STEPS = {16: 256, 32: 128, 64: 64, 128: 32, 256: 32}  # columns it loads at a time, by padded rank: 34 KB at most
MAX_RANK = 256
WARPS, STAGES = 4, 3
_COLUMNS = {16: 128, 32: 128, 64: 64, 128: 64, 256: 32}  # outputs of a program of expand, by padded rank

Rows = tuple[jax.Array, ...]


def unsupported(case: Case) -> str | None:
    """Why the kernels do not take the case; None when they do."""
    capability = cuda_capability()
    if capability is not None and capability < MIN_CAPABILITY:
        return f"the card has compute capability {capability / 10}, and Triton's kernels need 8.0"
    for linear in case.linears:
        if linear.rank > MAX_RANK:
            return f"rank {linear.rank} is above {MAX_RANK}"
    return None


@dataclass(frozen=True)
class _Work:
    """What is static of a call."""

    rows: int
    columns: int
    slots: int
    candidates: int  # slots that a tile of rows may have
    ranks: tuple[int, ...]
    outputs: tuple[int, ...]
    interpret: bool

    @property
    def linears(self) -> range:
        return range(len(self.ranks))

    @property
    def tiles(self) -> int:
        return -(-self.rows // ROWS) * self.candidates

    @property
    def parts(self) -> int:
        return -(-self.columns // PART)

    def first_program(self, linear: int) -> int:
        """Of expand, along the outputs of all linears."""
        return sum(-(-self.outputs[i] // _COLUMNS[_padded(self.ranks[i])]) for i in range(linear))

    def dot(self, a: Any, b: Any) -> Any:
        """a [m, k] times b [k, n], float32."""
        from jax.experimental.pallas import triton

        precision = lax.Precision.HIGHEST if self.interpret else lax.DotAlgorithmPreset.TF32_TF32_F32_X3
        return triton.dot(a, b, precision=precision)


def add_deltas(
    x: jax.Array, slots: jax.Array, bases: Rows, adapters: tuple[Adapters, ...], layer: jax.Array, *, interpret: bool
) -> Rows:
    """As xla.add_deltas."""
    from jax.experimental import pallas as pl
    from jax.experimental.pallas import triton

    m, k = x.shape
    count = adapters[0].scales.shape[0]
    work = _Work(
        rows=m,
        columns=k,
        slots=count,
        candidates=min(ROWS, count, m),
        ranks=tuple(one.a.shape[2] for one in adapters),
        outputs=tuple(one.b.shape[2] for one in adapters),
        interpret=interpret,
    )
    parameters = triton.CompilerParams(num_warps=WARPS, num_stages=STAGES)
    layer = layer.reshape(1)
    shrunk = pl.pallas_call(
        functools.partial(_shrink, work=work),
        grid=(work.tiles, work.parts, len(adapters)),
        in_specs=_whole(layer, slots, x) + [_padded_spec(one.a.shape, 2) for one in adapters],
        out_specs=[_padded_spec((work.parts, m, rank), 2) for rank in work.ranks],
        out_shape=[jax.ShapeDtypeStruct((work.parts, m, rank), jnp.float32) for rank in work.ranks],
        compiler_params=parameters,
        interpret=interpret,
        name="grouped_lora_shrink",
    )(layer, slots, x, *(one.a for one in adapters))
    scales = [one.scales for one in adapters]
    operands = [layer, slots, *shrunk, *(one.b for one in adapters), *scales]
    out = pl.pallas_call(
        functools.partial(_expand, work=work),
        grid=(work.tiles, work.first_program(len(adapters))),
        in_specs=[
            *_whole(layer, slots),
            *(_padded_spec(t.shape, 2) for t in shrunk),
            *(_padded_spec(one.b.shape, 3) for one in adapters),
            *_whole(*scales, *bases),
        ],
        out_specs=_whole(*bases),
        out_shape=[jax.ShapeDtypeStruct(base.shape, jnp.float32) for base in bases],
        input_output_aliases={len(operands) + i: i for i in work.linears},
        compiler_params=parameters,
        interpret=interpret,
        name="grouped_lora_expand",
    )(*operands, *bases)
    return tuple(out)


def _shrink(layer_ref: Any, slots_ref: Any, x_ref: Any, *refs: Any, work: _Work) -> None:
    from jax.experimental import pallas as pl
    from jax.experimental.pallas import triton

    a_refs, t_refs = refs[: len(work.ranks)], refs[len(work.ranks) :]
    first, slot, mine = _tile(slots_ref, work)
    part = pl.program_id(1)
    begin = part * PART

    def product(a_ref: Any, t_ref: Any, rank: int) -> None:
        layer, padded = layer_ref[0], _padded(rank)
        exists = first + jnp.arange(ROWS) < work.rows
        ranks = jnp.arange(padded) < rank
        step_columns = _STEPS[padded]
        steps = lax.div(jnp.minimum(PART, work.columns - begin) + (step_columns - 1), step_columns)

        def step(j, total):
            column = begin + j * step_columns
            columns = column + jnp.arange(step_columns) < work.columns
            x = triton.load(
                x_ref.at[pl.ds(first, ROWS), pl.ds(column, step_columns)],
                mask=exists[:, None] & columns[None, :],
                other=0.0,
            )
            a = triton.load(
                a_ref.at[layer, slot, pl.ds(0, padded), pl.ds(column, step_columns)],
                mask=ranks[:, None] & columns[None, :],
                other=0.0,
            )
            return total + work.dot(x, a.astype(jnp.float32).T)

        total = lax.fori_loop(0, steps, step, jnp.zeros((ROWS, padded), jnp.float32))
        target = t_ref.at[part, pl.ds(first, ROWS), pl.ds(0, padded)]
        triton.store(target, total, mask=mine[:, None] & ranks[None, :])

    for i in work.linears:
        use = (slot >= 0) & (pl.program_id(2) == i)
        pl.when(use)(functools.partial(product, a_refs[i], t_refs[i], work.ranks[i]))


def _expand(layer_ref: Any, slots_ref: Any, *refs: Any, work: _Work) -> None:
    from jax.experimental import pallas as pl
    from jax.experimental.pallas import triton

    n = len(work.ranks)
    t_refs, b_refs, scale_refs, base_refs, y_refs = (refs[n * i : n * (i + 1)] for i in range(5))
    first, slot, mine = _tile(slots_ref, work)
    program = pl.program_id(1)

    def product(i: int) -> None:
        padded = _padded(work.ranks[i])
        width = _COLUMNS[padded]
        column = (program - work.first_program(i)) * width
        ranks = jnp.arange(padded) < work.ranks[i]
        columns = column + jnp.arange(width) < work.outputs[i]

        def add(part, total):
            at = t_refs[i].at[part, pl.ds(first, ROWS), pl.ds(0, padded)]
            return total + triton.load(at, mask=mine[:, None] & ranks[None, :], other=0.0)

        t = lax.fori_loop(0, work.parts, add, jnp.zeros((ROWS, padded), jnp.float32))
        b = triton.load(
            b_refs[i].at[layer_ref[0], slot, pl.ds(column, width), pl.ds(0, padded)],
            mask=columns[:, None] & ranks[None, :],
            other=0.0,
        )
        delta = work.dot(t * scale_refs[i][slot], b.astype(jnp.float32).T)
        place = (pl.ds(first, ROWS), pl.ds(column, width))
        mask = mine[:, None] & columns[None, :]
        base = triton.load(base_refs[i].at[place], mask=mask, other=0.0)
        triton.store(y_refs[i].at[place], base + delta, mask=mask)

    for i in work.linears:
        use = (slot >= 0) & (program >= work.first_program(i)) & (program < work.first_program(i + 1))
        pl.when(use)(functools.partial(product, i))


def _tile(slots_ref: Any, work: _Work) -> tuple[Any, Any, Any]:
    """First row, slot (-1: none) and rows of that slot, bool [ROWS], of this program.

    A tile of rows has as many programs as it may have slots; they take the slots in the order of their first rows.
    """
    from jax.experimental import pallas as pl
    from jax.experimental.pallas import triton

    first = lax.div(pl.program_id(0), work.candidates) * ROWS
    number = lax.rem(pl.program_id(0), work.candidates)
    index = jnp.arange(ROWS)
    slots = triton.load(slots_ref.at[pl.ds(first, ROWS)], mask=first + index < work.rows, other=-1)
    slots = jnp.where((slots >= 0) & (slots < work.slots), slots, -1)
    before = index[None, :] < index[:, None]
    again = ((slots[:, None] == slots[None, :]) & before).astype(jnp.int32).sum(1) > 0
    new = (slots >= 0) & ~again  # the first row of its slot
    rank = jnp.where(before, new.astype(jnp.int32)[None, :], 0).sum(1)
    slot = jnp.where(new & (rank == number), slots, -1).max()
    return first, slot, (slots == slot) & (slots >= 0)


def _whole(*arrays: jax.Array) -> list[Any]:
    from jax.experimental import pallas as pl

    return [pl.BlockSpec(a.shape, lambda *_, axes=a.ndim: (0,) * axes) for a in arrays]


def _padded_spec(shape: tuple[int, ...], axis: int) -> Any:
    """All of an array, as if its ranks, on ``axis``, were a power of two: kernels mask what is not there."""
    from jax.experimental import pallas as pl

    block = (*shape[:axis], _padded(shape[axis]), *shape[axis + 1 :])
    return pl.BlockSpec(block, lambda *_: (0,) * len(shape))


def _padded(rank: int) -> int:
    """The power of two that holds a rank, 16 at least."""
    return max(16, 1 << (rank - 1).bit_length())
