"""What the Triton kernels share: heads in parts that are powers of two, masked loads and stores, scores, precision."""

import functools
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.devices import cuda_capability

from .blocks import MIN_CAPABILITY, GpuBlocks, gpu_blocks
from .case import LOG2_E, Options

Part = tuple[int, int]  # first element of a head and their number, a power of two from 16 on


@dataclass(frozen=True)
class Arithmetic:
    """How a kernel multiplies matrices of ``dtype`` and takes powers of two: on a card, or interpreted elsewhere."""

    dtype: Any
    interpret: bool

    def dot(self, a: Any, b: Any) -> Any:
        """[m, k] times [k, n] -> float32 [m, n]; float32 as three TF32 products on a card."""
        from jax.experimental.pallas import triton

        if self.dtype != jnp.float32:
            return triton.dot(a, b)
        return triton.dot(
            a, b, precision=lax.Precision.HIGHEST if self.interpret else lax.DotAlgorithmPreset.TF32_TF32_F32_X3
        )

    def product(self, a: list[Any], b: list[Any]) -> Any:
        """a [m, dim] times b [n, dim] transposed, both in parts -> float32 [m, n]."""
        return functools.reduce(jnp.add, [self.dot(x, y.T) for x, y in zip(a, b)])

    def exp2(self, x: Any) -> Any:
        """2^x of a float32 array by the card's own instruction, 2 ulp; the library's handles denormal numbers too."""
        from jax.experimental.pallas import triton

        if self.interpret:
            return jnp.exp2(x)
        [power] = triton.elementwise_inline_asm(
            "ex2.approx.ftz.f32 $0, $1;",
            args=[x],
            constraints="=f,f",
            pack=1,
            result_shape_dtypes=[jax.ShapeDtypeStruct(x.shape, x.dtype)],
        )
        return power


def parts_of(dim: int) -> list[Part]:
    """A head of ``dim`` elements as powers of two, large ones first; the last may reach over the end."""
    parts, first = [], 0
    while first < dim:
        size = 16
        while first + 2 * size <= dim:
            size *= 2
        parts.append((first, size))
        first += size
    return parts


def padded(dim: int) -> int:
    return sum(size for _, size in parts_of(dim))


def load(ref: Any, at: Any, parts: list[Part], dim: int, rows: Any, head: Any = None) -> list[Any]:
    """The parts of rows ``at`` (None: all) of ref [rows, dim] ([rows, heads, dim] with ``head``), zero where ``rows``
    [rows] is false (None: nowhere) and behind a head's end."""
    from jax.experimental import pallas as pl
    from jax.experimental.pallas import triton

    out = []
    for first, size in parts:
        index = (slice(None) if at is None else at, *(() if head is None else (head,)), pl.ds(first, size))
        mask = None if rows is None else rows[:, None]
        if first + size > dim:
            columns = (first + jnp.arange(size) < dim)[None, :]
            mask = columns if mask is None else mask & columns
        if mask is None:
            out.append(triton.load(ref.at[index]))
        else:
            count = ref.shape[0] if at is None else at.size
            out.append(triton.load(ref.at[index], mask=jnp.broadcast_to(mask, (count, size)), other=0.0))
    return out


def store(ref: Any, values: list[Any], parts: list[Part], dim: int, rows: Any) -> None:
    """The parts of float32 values [rows, dim] into ref, of its type, where ``rows`` [rows] is true."""
    from jax.experimental import pallas as pl
    from jax.experimental.pallas import triton

    for (first, size), value in zip(parts, values):
        mask = jnp.broadcast_to(rows[:, None], value.shape)
        if first + size > dim:
            mask = mask & (first + jnp.arange(size) < dim)[None, :]
        triton.store(ref.at[:, pl.ds(first, size)], value.astype(ref.dtype), mask=mask)


def capped(scores: Any, options: Options, unit: Arithmetic) -> tuple[Any, Any]:
    """Products of queries and keys as scores, up to ``log2_factor``; and their soft-cap's derivative (1.0: none)."""
    if options.softcap:
        # tanh(x) = 1 - 2 / (1 + e^2x) with a power of two; the hardware's own tanh has 11 bits.
        power = unit.exp2(scores * (2.0 * options.scale / options.softcap * LOG2_E))
        squashed = 1.0 - 2.0 / (1.0 + power)
        return squashed * options.softcap, 1.0 - squashed * squashed
    return (scores, 1.0) if options.scale > 0 else (scores * options.scale, 1.0)


def log2_factor(options: Options) -> float:
    """What turns ``capped`` scores into exponents of two."""
    return LOG2_E * (options.scale if options.scale > 0 and not options.softcap else 1.0)


def blocks_for(kernel: str, q: jax.Array, v: jax.Array) -> GpuBlocks:
    """The block sizes of the card that is compiled for; of the oldest supported one where it is not known."""
    capability = max(cuda_capability() or MIN_CAPABILITY, MIN_CAPABILITY)
    return gpu_blocks(kernel, max(q.shape[3], v.shape[3]), q.dtype == jnp.float32, capability)
