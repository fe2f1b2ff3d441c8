"""The Pallas kernel for TPUs.

A program owns a tile of the weight's rows, all their columns, and a block of rows of x. It turns the packed words so
that rows of the weight lie along the lanes and cells of 32 columns along the sublanes: then a group's scale lies where
its codes are, and element e of all cells is one matrix [cells, rows], which the matrix unit multiplies with the columns
e, 32 + e, ... of x. Nothing dequantized is written to memory, and the stack is read in place: the layer and the expert
are prefetched scalars that place the blocks.

Numerics: x bfloat16 rounds the dequantized weight to bfloat16 as well (NMSE about 5e-6); x float32 multiplies in
float32. Products are added in one order for any number of rows: one class for each dtype of x.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from .blocks import tpu_rows
from .formats import Format
from .reference import Groups
from .sorting import sort_by_expert
from .unpack import ONE, delta_of, fraction, scales, weigher

CELL = 32  # columns: a whole number of words of every plane
COLUMNS = 128  # rows of the weight in a program: the lanes, as strided access wants them
VMEM_BYTES = 64 << 20
RUN = 8  # columns that share a delta, a divisor of every group

Arrays = dict[str, Any]


def unsupported(fmt: Format, arrays: Arrays, interpreted: bool = False) -> str | None:
    """Why the kernel does not take this weight, or None."""
    return f"{fmt.name} is not packed, and XLA's own dot multiplies it" if fmt.dense else None


def matmul(x: jax.Array, arrays: Arrays, fmt: Format, lead: tuple[Any, ...], *, interpret: bool = False) -> jax.Array:
    """x [M, K] float32 or bfloat16 times weight ``lead`` (an index a leading axis) of a stack [..., N, K].

    Returns float32 [M, N].
    """
    rows = tpu_rows(*x.shape)
    return _call(x, arrays, fmt, lead, None, rows, interpret)


def expert_matmul(
    x: jax.Array, ids: jax.Array, arrays: Arrays, fmt: Format, lead: tuple[Any, ...], *, interpret: bool = False
) -> jax.Array:
    """Row i of x [M, K] times expert ids[i] (int32 [M]) of weight ``lead`` of a stack [..., E, N, K] -> float32 [M, N].

    Rows are sorted by expert; a block holds rows of one. Bits as ``matmul``'s; ids are clamped.
    """
    m, experts = x.shape[0], next(iter(arrays.values())).shape[-3]
    rows = tpu_rows(2 * -(-m // experts), x.shape[1])
    expert, order = sort_by_expert(ids, experts, rows)
    out = _call(x[jnp.minimum(order, m - 1)], arrays, fmt, lead, expert, rows, interpret)
    return jnp.zeros((m, out.shape[1]), jnp.float32).at[order].set(out, mode="drop", unique_indices=False)


def _call(
    x: jax.Array, arrays: Arrays, fmt: Format, lead: tuple[Any, ...], expert: Any, rows: int, interpret: bool
) -> jax.Array:
    """x [M, K], of whose blocks of ``rows`` rows each meets one expert (int32 [blocks]), or none that is an expert."""
    from jax.experimental import pallas as pl
    from jax.experimental.pallas import tpu as pltpu

    m, k = x.shape
    first = next(iter(arrays.values()))
    n = first.shape[-2]
    if m == 0 or n == 0:
        return jnp.zeros((m, n), jnp.float32)
    cells, experts = k // CELL, 0 if expert is None else first.shape[-3]
    numbers = jnp.stack([jnp.int32(ONE), *(jnp.asarray(i, jnp.int32) for i in lead)])
    scalars = [numbers] if expert is None else [numbers, expert]
    # TPUs do not know float16.
    arrays = {q: lax.bitcast_convert_type(a, jnp.uint16) if a.dtype == jnp.float16 else a for q, a in arrays.items()}

    def place(i, j, numbers_ref, *expert_ref):
        index = [numbers_ref[1 + axis] for axis in range(len(lead))]
        if expert_ref:
            index.append(jnp.minimum(expert_ref[0][i], experts - 1))
        return (*index, j, 0)

    if fmt.planes == (8,):
        x_spec = pl.BlockSpec((rows, k), lambda i, j, *_: (i, 0))
    else:  # element e of every cell: [32, M, cells]
        x = x.reshape(m, cells, CELL).transpose(2, 0, 1)
        x_spec = pl.BlockSpec((CELL, rows, cells), lambda i, j, *_: (0, i, 0))
    weight_specs = [pl.BlockSpec((*(1,) * (a.ndim - 2), COLUMNS, a.shape[-1]), place) for a in arrays.values()]
    return pl.pallas_call(
        functools.partial(_kernel, fmt=fmt, names=tuple(arrays), experts=experts),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=len(scalars),
            grid=(pl.cdiv(m, rows), pl.cdiv(n, COLUMNS)),
            in_specs=[x_spec, *weight_specs],
            out_specs=pl.BlockSpec((rows, COLUMNS), lambda i, j, *_: (i, j)),
            scratch_shapes=[pltpu.VMEM((cells * max(max(fmt.planes), 4), COLUMNS), jnp.uint32)],
        ),
        out_shape=jax.ShapeDtypeStruct((m, n), jnp.float32),
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "parallel"), vmem_limit_bytes=VMEM_BYTES),
        interpret=interpret,
        name="quant_matmul",
    )(*scalars, x, *arrays.values())


def _kernel(numbers_ref: Any, *refs: Any, fmt: Format, names: tuple[str, ...], experts: int) -> None:
    from jax.experimental import pallas as pl

    expert_ref, refs = (refs[0], refs[1:]) if experts else (None, refs)
    x_ref, *weight_refs, out_ref, scratch_ref = refs
    one = lax.bitcast_convert_type(numbers_ref[0], jnp.uint32)
    tile = _Tile(fmt, dict(zip(names, weight_refs)), x_ref, scratch_ref, one)

    def run() -> None:
        out_ref[...] = tile.bytes() if fmt.planes == (8,) else tile.codes()

    if expert_ref is None:
        run()
    else:
        pl.when(expert_ref[pl.program_id(0)] < experts)(run)


class _Tile:
    """Rows of the weight, all their columns, times a block of rows of x."""

    def __init__(self, fmt: Format, arrays: dict[str, Any], x: Any, scratch: Any, one: Any):
        self.fmt, self.arrays, self.x, self.scratch, self.one = fmt, arrays, x, scratch, one

    def codes(self) -> Any:
        """float32 [rows, columns]."""
        fmt, cells = self.fmt, self.x.shape[2]
        planes = [self._apart(self._read(name).T, bits, cells) for name, bits in zip(("codes", "high"), fmt.planes)]
        weighers = self._weighers(cells)
        acc = None
        for e in range(CELL):
            words = [(w[e * b // 32], e * b % 32) for w, b in zip(planes, fmt.planes)]
            weight = weighers[e // RUN](fraction(words, fmt, self.one))  # [cells, columns]
            product = self._dot(self.x[e], weight)
            acc = product if acc is None else acc + product
        return acc

    def bytes(self) -> Any:
        """The same for codes of a byte."""
        codes = self._read("codes").T  # [K, columns]
        k, columns = codes.shape
        scale = self._read("scales").T  # [groups, columns]
        weight = scale[:, None, :] * codes.reshape(k // self.fmt.group, self.fmt.group, columns)
        return self._dot(self.x[...], weight.reshape(k, columns))

    def _weighers(self, cells: int) -> list[Any]:
        """For each run of a cell, the function from codes to weights."""
        fmt = self.fmt
        stored = self._stored("scales", fmt.scale, cells)
        factors = [scales(s, fmt.scale, fmt) for s in stored]
        offsets: list[Any] = [None] * len(factors)
        if fmt.has_super:
            block = self._repeated(self._read("super").T, cells)
            factors = [block * f for f in factors]
        if fmt.mins == "f16":
            offsets = self._stored("mins", fmt.mins, cells)
        elif fmt.mins is not None:
            block = self._repeated(self._read("super_mins").T, cells)
            mins = self._stored("mins", fmt.mins, cells)
            offsets = [-(block * s.astype(jnp.int32).astype(jnp.float32)) for s in mins]
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

    def _stored(self, name: str, kind: str, cells: int) -> list[Any]:
        """The stored numbers of the groups of a cell, [cells, columns] each: one, or two for groups of 16."""
        parts = max(1, CELL // self.fmt.group)
        values = self._read(name).T  # [groups, columns], or pairs of them
        if kind != "u4":
            return self._apart(values, parts, cells) if parts > 1 else [self._repeated(values, cells)]
        nibbles = [values & jnp.uint32(15), values >> jnp.uint32(4)]
        return nibbles if parts == 2 else [self._together(nibbles)]

    def _read(self, name: str) -> Any:
        """An array [columns, *] as float32, or as uint32 where it is unsigned."""
        ref = self.arrays[name]
        here = (0,) * (len(ref.shape) - 2)
        if ref.dtype == jnp.uint16:
            return _half(ref[here].astype(jnp.uint32))
        return ref[here].astype(jnp.uint32 if ref.dtype in (jnp.uint8, jnp.uint32) else jnp.float32)

    def _apart(self, values: Any, count: int, cells: int) -> list[Any]:
        """Every ``count``-th row of values [cells * count, columns], from the first, the second, ... one."""
        from jax.experimental import pallas as pl

        if count == 1:
            return [values]
        self.scratch[: cells * count] = lax.bitcast_convert_type(values, jnp.uint32)
        parts = [self.scratch[pl.ds(i, cells, stride=count)] for i in range(count)]
        return [lax.bitcast_convert_type(part, values.dtype) for part in parts]

    def _together(self, parts: list[Any]) -> Any:
        """The inverse of ``_apart``."""
        from jax.experimental import pallas as pl

        rows, count = parts[0].shape[0], len(parts)
        for i, part in enumerate(parts):
            self.scratch[pl.ds(i, rows, stride=count)] = lax.bitcast_convert_type(part, jnp.uint32)
        return lax.bitcast_convert_type(self.scratch[: rows * count], parts[0].dtype)

    def _repeated(self, values: Any, cells: int) -> Any:
        """Rows of [groups, columns] as often as there are cells to a group."""
        times = cells // values.shape[0]
        return values if times == 1 else self._together([values] * times)

    def _dot(self, x: Any, weight: Any) -> Any:
        """x [rows, k] times weight [k, columns] -> float32."""
        exact = x.dtype == jnp.float32
        return lax.dot_general(
            x,
            weight if exact else weight.astype(x.dtype),
            (((1,), (0,)), ((), ())),
            precision=lax.Precision.HIGHEST if exact else None,
            preferred_element_type=jnp.float32,
        )


def _half(bits: Any) -> Any:
    """The float16 of 16 bits in uint32, as float32, by integer arithmetic."""
    exponent, mantissa = (bits >> jnp.uint32(10)) & jnp.uint32(31), bits & jnp.uint32(1023)
    widened = (bits & jnp.uint32(0x7FFF)) << jnp.uint32(13)
    bias = jnp.where(exponent == 31, jnp.uint32(224 << 23), jnp.uint32(112 << 23))
    normal = lax.bitcast_convert_type(widened + bias, jnp.float32)
    small = mantissa.astype(jnp.int32).astype(jnp.float32) * jnp.float32(2.0**-24)
    magnitude = jnp.where(exponent == 0, small, normal)
    return jnp.where(bits >> jnp.uint32(15) != 0, -magnitude, magnitude)
