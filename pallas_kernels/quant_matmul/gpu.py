"""The Pallas kernel for NVIDIA cards of compute capability 8.0 and above, through Triton.

A program owns a tile of the weight's rows and a block of rows of x. It reads a step of 256 columns of the packed
weight, unpacks it in registers and multiplies it by x on the tensor cores; the weight is the left factor, so that few
rows of x cost no more than the memory traffic. Nothing dequantized is ever written to memory, and the stack is read in
place.

Numerics: x bfloat16 rounds the dequantized weight to bfloat16 as well (NMSE about 5e-6); x float32 multiplies in three
TF32 products (better than 1e-6). Sums are float32: over the steps of a segment of at most 1,024 columns, then over the
segments, in their order. That holds for any number of rows: with few, segments are programs of their own and added up
afterwards; with many, one program after another; the bits are the same. So there is one class for each dtype of x, as
far as the card's matrix instructions give a column of their result the same bits whatever its neighbours and their
number; the tests can show that for the interpreter only.
"""

import functools
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from pallas_kernels.devices import cuda_capability

from .blocks import MIN_CAPABILITY, GpuBlocks, gpu_blocks
from .formats import Format
from .reference import Groups
from .sorting import sort_by_expert
from .unpack import ONE, delta_of, fraction, scales, weigher

STEP, BYTES_STEP = 256, 128  # columns read, unpacked and multiplied at a time; of formats with a byte to a code
SEGMENT = 1024  # columns, at most, of a sum that is finished before it is added to the others
CELL = 32  # columns that a thread unpacks together: a whole number of words of every plane
CELLS = STEP // CELL
RUN = 8  # columns of a cell in one product
SPLIT_PROGRAMS = 512  # with fewer programs than that, segments are programs of their own

Arrays = dict[str, Any]


def unsupported(fmt: Format, arrays: Arrays, interpreted: bool = False) -> str | None:
    """Why the kernel does not take this weight, or None."""
    if fmt.dense:
        return f"{fmt.name} is not packed, and XLA's own dot multiplies it"
    capability = cuda_capability()
    if capability is not None and capability < MIN_CAPABILITY and not interpreted:
        return f"the card has compute capability {capability / 10}, and Triton's kernels need 8.0"
    for name, a in arrays.items():
        if a.size >= 2**31 and a.size * np.dtype(a.dtype).itemsize <= 2**32:
            return f"{name} has {a.size} elements in at most 4 GiB, where Pallas counts with 32 bits with a sign"
    return None


def matmul(x: jax.Array, arrays: Arrays, fmt: Format, lead: tuple[Any, ...], *, interpret: bool = False) -> jax.Array:
    """x [M, K] float32 or bfloat16 times weight ``lead`` (an index a leading axis) of a stack [..., N, K].

    Returns float32 [M, N].
    """
    m = x.shape[0]
    blocks = gpu_blocks(m, x.dtype == jnp.float32, cuda_capability())
    return _call(x, arrays, fmt, lead, None, None, -(-m // blocks.rows), blocks, interpret)


def expert_matmul(
    x: jax.Array, ids: jax.Array, arrays: Arrays, fmt: Format, lead: tuple[Any, ...], *, interpret: bool = False
) -> jax.Array:
    """Row i of x [M, K] times expert ids[i] (int32 [M]) of weight ``lead`` of a stack [..., E, N, K] -> float32 [M, N].

    Rows are sorted by expert; a block holds rows of one. Bits as ``matmul``'s; ids are clamped.
    """
    m, experts = x.shape[0], next(iter(arrays.values())).shape[-3]
    blocks = gpu_blocks(2 * -(-m // experts), x.dtype == jnp.float32, cuda_capability())
    expert, rows = sort_by_expert(ids, experts, blocks.rows)
    return _call(x, arrays, fmt, lead, expert, rows, expert.shape[0], blocks, interpret)


@dataclass(frozen=True)
class _Work:
    """What is static of a call: rows of x, of the weight, columns; whether segments are programs; axes in front."""

    fmt: Format
    m: int
    n: int
    k: int
    lead: int
    blocks: GpuBlocks
    split: bool
    experts: int  # 0: every row meets the same weight
    interpret: bool

    @property
    def step(self) -> int:
        return BYTES_STEP if self.fmt.planes == (8,) else STEP

    @property
    def steps(self) -> int:
        return -(-self.k // self.step)

    @property
    def segments(self) -> int:
        return -(-self.k // SEGMENT)

    @property
    def segment_steps(self) -> int:
        """Of every segment but the last, which may have fewer: as even as can be."""
        return -(-self.steps // self.segments)


def _call(
    x: jax.Array,
    arrays: Arrays,
    fmt: Format,
    lead: tuple[Any, ...],
    expert: jax.Array | None,
    rows: jax.Array | None,
    row_blocks: int,
    blocks: GpuBlocks,
    interpret: bool,
) -> jax.Array:
    from jax.experimental import pallas as pl
    from jax.experimental.pallas import triton

    m, k = x.shape
    experts = 0 if expert is None else next(iter(arrays.values())).shape[-3]
    n = next(iter(arrays.values())).shape[-2]
    columns = pl.cdiv(n, blocks.columns)
    work = _Work(fmt, m, n, k, len(lead), blocks, row_blocks * columns < SPLIT_PROGRAMS, experts, interpret)
    if m == 0 or n == 0:
        return jnp.zeros((m, n), jnp.float32)
    split = work.split and work.segments > 1
    numbers = jnp.stack([jnp.int32(ONE), *(jnp.asarray(i, jnp.int32) for i in lead)])
    groups = [] if expert is None else [expert, rows]
    out = pl.pallas_call(
        functools.partial(_kernel, work=work, names=tuple(arrays)),
        grid=(row_blocks, columns, work.segments if split else 1),
        out_shape=jax.ShapeDtypeStruct((work.segments if split else 1, m, n), jnp.float32),
        compiler_params=triton.CompilerParams(num_warps=blocks.warps, num_stages=blocks.stages),
        interpret=interpret,
        name="quant_matmul",
    )(numbers, *groups, _arranged(x, work), *arrays.values())
    return functools.reduce(jnp.add, [out[i] for i in range(out.shape[0])])


def _arranged(x: jax.Array, work: _Work) -> jax.Array:
    """x [M, K] with columns in the order in which the kernel multiplies them, and zeros up to a whole step."""
    x = jnp.pad(x, ((0, 0), (0, work.steps * work.step - work.k)))
    if work.step == STEP:
        runs = x.reshape(work.m, work.steps, CELLS, CELL // RUN, RUN)
        x = runs.swapaxes(2, 3).reshape(x.shape)
    return x


def _kernel(numbers_ref: Any, *refs: Any, work: _Work, names: tuple[str, ...]) -> None:
    from jax.experimental import pallas as pl
    from jax.experimental.pallas import triton

    *groups, x_ref = refs[: 3 if work.experts else 1]
    *weight_refs, out_ref = refs[len(groups) + 1 :]
    blocks, segments = work.blocks, work.segments
    one = lax.bitcast_convert_type(numbers_ref[0], jnp.uint32)
    lead = tuple(numbers_ref[1 + i] for i in range(work.lead))
    at = pl.program_id(0) * blocks.rows + jnp.arange(blocks.rows)
    used: Any = True
    if groups:
        expert = groups[0][pl.program_id(0)]
        used = expert < work.experts
        lead = (*lead, jnp.minimum(expert, work.experts - 1))
        at = triton.load(groups[1].at[at])  # rows of x; M for none
    n = pl.program_id(1) * blocks.columns + jnp.arange(blocks.columns)
    part = pl.program_id(2)
    tile = _Tile(work, dict(zip(names, weight_refs)), x_ref, lead, jnp.minimum(at, work.m - 1), n, one)

    def segment(i: Any) -> Any:  # float32 [columns, rows]
        start = i * work.segment_steps
        stop = start + work.segment_steps
        if work.steps % work.segment_steps:
            stop = jnp.minimum(stop, work.steps)
        acc = jnp.zeros((blocks.columns, blocks.rows), jnp.float32)
        return lax.fori_loop(start, stop, tile.step, acc)

    @pl.when(used)
    def _() -> None:
        if work.split or segments == 1:
            total = segment(part)
        else:
            zero = jnp.zeros((blocks.columns, blocks.rows), jnp.float32)
            total = lax.fori_loop(0, segments, lambda i, total: total + segment(i), zero)
        mask = (at < work.m)[None, :] & (n < work.n)[:, None]
        triton.store(out_ref.at[part, at[None, :], n[:, None]], total, mask=mask)


class _Tile:
    """Rows ``n`` of the weight times rows ``m`` of x, a step at a time."""

    def __init__(self, work: _Work, arrays: dict[str, Any], x: Any, lead: Any, m: Any, n: Any, one: Any):
        self.work, self.fmt, self.arrays, self.x, self.lead, self.m, self.one = work, work.fmt, arrays, x, lead, m, one
        self.n = jnp.minimum(n, work.n - 1)
        self.ragged = work.k % work.step != 0

    def step(self, i: Any, acc: Any) -> Any:
        """acc [columns, rows] plus the products of step i."""
        return self._bytes(i, acc) if self.fmt.planes == (8,) else self._codes(i, acc)

    def _codes(self, i: Any, acc: Any) -> Any:
        cell = i * CELLS + jnp.arange(CELLS)
        columns = self.n.shape[0]
        planes = [self._words(name, bits, i) for name, bits in zip(("codes", "high"), self.fmt.planes)]
        weighers = self._weighers(i, cell)
        for run in range(CELL // RUN):
            values = []
            for e in range(run * RUN, (run + 1) * RUN):
                words = [(w[e * b // 32], e * b % 32) for w, b in zip(planes, self.fmt.planes)]
                values.append(weighers[run](fraction(words, self.fmt, self.one)))
            weight = _interleave(values).reshape(columns, CELLS * RUN)
            acc = acc + self._dot(weight, self._columns_of_x(i * STEP + run * (CELLS * RUN), CELLS * RUN))
        return acc

    def _bytes(self, i: Any, acc: Any) -> Any:
        group = min(self.fmt.group, BYTES_STEP)
        k = i * BYTES_STEP + jnp.arange(BYTES_STEP)
        groups = i * (BYTES_STEP // group) + jnp.arange(BYTES_STEP // group)
        index, cell = (*self.lead, self.n[:, None]), groups * (group // CELL)
        codes = self._load(self.arrays["codes"], (*index, k[None, :]), (k // CELL)[None, :])
        scale = self._load(
            self.arrays["scales"], (*index, (groups // (self.fmt.group // group))[None, :]), cell[None, :]
        )
        values = codes.astype(jnp.float32).reshape(-1, BYTES_STEP // group, group)
        weight = scale.astype(jnp.float32)[:, :, None] * values
        return acc + self._dot(weight.reshape(-1, BYTES_STEP), self._columns_of_x(i * BYTES_STEP, BYTES_STEP))

    def _columns_of_x(self, first: Any, count: int) -> Any:
        """[rows, count] of x as arranged."""
        from jax.experimental.pallas import triton

        return triton.load(self.x.at[self.m[:, None], (first + jnp.arange(count))[None, :]])

    def _words(self, name: str, bits: int, i: Any) -> list[Any]:
        """The words of a plane, uint32 [columns, CELLS] each: ``bits`` words of 32 / bits codes to a cell."""
        at = i * (CELLS * bits) + jnp.arange(CELLS * bits)
        words = self._load(self.arrays[name], (*self.lead, self.n[:, None], at[None, :]), (at // bits)[None, :])
        if bits == 1:
            return [words]
        parts = jnp.split(words.reshape(-1, CELLS, bits), bits, axis=2)
        return [part.reshape(-1, CELLS) for part in parts]

    def _weighers(self, i: Any, cell: Any) -> list[Any]:
        """For each run of a cell, the function from codes to weights."""
        fmt = self.fmt
        stored = self._stored("scales", fmt.scale, cell)
        factors = [scales(s, fmt.scale, fmt) for s in stored]
        offsets: list[Any] = [None] * len(factors)
        if fmt.has_super:
            factors = [self._per_step("super", i) * f for f in factors]
        if fmt.mins == "f16":
            offsets = [s.astype(jnp.float32) for s in self._stored("mins", fmt.mins, cell)]
        elif fmt.mins is not None:
            mins = [s.astype(jnp.int32).astype(jnp.float32) for s in self._stored("mins", fmt.mins, cell)]
            offsets = [-(self._per_step("super_mins", i) * s) for s in mins]
        out = []
        for run in range(CELL // RUN):
            part = run * len(factors) // (CELL // RUN)
            delta = None
            if fmt.scale == "iq1s":
                delta = delta_of(stored[part], 3)
            elif fmt.scale == "iq1m":  # a sign for each run
                delta = delta_of(stored[part], 3 + run % 2)
            out.append(weigher(Groups(factors[part], offsets[part], delta), fmt))
        return out

    def _stored(self, name: str, kind: str, cell: Any) -> list[Any]:
        """The stored numbers of the groups of a cell, [columns, CELLS] each: one, or two for groups of 16."""
        parts = max(1, CELL // self.fmt.group)
        index, mask = (*self.lead, self.n[:, None]), cell[None, :]
        out = []
        for part in range(parts):
            group = cell * parts + part if parts > 1 else cell // (self.fmt.group // CELL)
            if kind == "u4":
                pair = self._load(self.arrays[name], (*index, (group // 2)[None, :]), mask).astype(jnp.uint32)
                shift = (group % 2 * 4).astype(jnp.uint32)
                out.append((pair >> shift[None, :]) & jnp.uint32(15))
            else:
                value = self._load(self.arrays[name], (*index, group[None, :]), mask)
                out.append(value.astype(jnp.uint32) if value.dtype == jnp.uint8 else value)
        return out

    def _per_step(self, name: str, i: Any) -> Any:
        """The float16 of a block of 256, which is a step: float32 [columns, 1]."""
        from jax.experimental.pallas import triton

        index = (*self.lead, self.n[:, None], jnp.full((1, 1), i, jnp.int32))
        return triton.load(self.arrays[name].at[index]).astype(jnp.float32)

    def _load(self, ref: Any, index: tuple[Any, ...], cell: Any) -> Any:
        """ref[index], zero in cells behind the end of the row."""
        from jax.experimental.pallas import triton

        if not self.ragged:
            return triton.load(ref.at[index])
        return triton.load(ref.at[index], mask=cell < self.work.k // CELL, other=0)

    def _dot(self, weight: Any, x: Any) -> Any:
        """float32 weight [columns, k] times x [rows, k] transposed -> float32 [columns, rows]."""
        from jax.experimental.pallas import triton

        if x.dtype == jnp.bfloat16:
            return triton.dot(weight.astype(jnp.bfloat16), x.T)
        exact = lax.Precision.HIGHEST if self.work.interpret else lax.DotAlgorithmPreset.TF32_TF32_F32_X3
        return triton.dot(weight, x.T, precision=exact)


def _interleave(parts: list[Any]) -> Any:
    """A power of two of arrays [..., n] -> [..., n, 2, 2, ...]: the part is the fastest index."""
    while len(parts) > 1:
        half = len(parts) // 2
        parts = [jnp.stack([parts[i], parts[i + half]], axis=-1) for i in range(half)]
    return parts[0]
