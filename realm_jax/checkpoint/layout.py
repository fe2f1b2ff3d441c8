"""How the packed arrays of a stack lie in a checkpoint: cut so that a device restores its part, and no more. No jax.

Each axis that a mesh may divide is two: [parts, size / parts]. Array files are cut between parts, so a mesh that
divides the parts restores whole pieces of files with a plain sharding, and the two axes become one again without moving
a byte. Tensors that were fused of several (queries, keys and values) are kept apart, as a device has a range of each.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from math import gcd

import numpy as np

from pallas_kernels.quant_matmul import Format
from realm_jax.model.config import ModelConfig
from realm_jax.model.partition import Partition, segments
from realm_jax.model.tensors import AXES, TensorSpec
from realm_jax.sharding.rules import RULES

MOST_PARTS = 48  # of an axis: divides by 2, 3, 4, 6, 8, 12, 16, 24
VECTORS = "weights/vectors"  # the item of all tensors that are no matrices: float32, by role


@dataclass(frozen=True)
class Cut:
    """One axis of a tensor: its logical name, or None where no mesh divides it, and into how many parts it is cut."""

    logical: str | None
    parts: int


@dataclass(frozen=True)
class Segment:
    """The arrays of one of the tensors that a stack's were fused of; most stacks have one.

    number: among them. arrays: shape and dtype by name. start, rows: of the whole tensor's first axis. cuts: of the
    tensor's axes. stacked: whether the arrays have an axis of layers in front.
    """

    number: int
    arrays: Mapping[str, tuple[tuple[int, ...], np.dtype]]
    start: int
    rows: int
    cuts: tuple[Cut, ...]
    stacked: bool

    def key(self, name: str) -> str:
        """The name of an array in the checkpoint."""
        return f"{self.number}.{name}"

    def take(self, array: np.ndarray) -> np.ndarray:
        """Of an array of the whole stack what is this segment's, its divided axes as two; a view."""
        rows = slice(self.start, self.start + self.rows)
        own = array[:, rows] if self.stacked else array[rows]
        return own.reshape(self.cut_shape(own.shape))

    @property
    def part_axes(self) -> tuple[int, ...]:
        """Of an array the axes that count parts."""
        axes, at = [], int(self.stacked)
        for cut in self.cuts:
            if cut.logical is not None:
                axes.append(at)
            at += 1 + (cut.logical is not None)
        return tuple(axes)

    def cut_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """The shape of an array, or of what a device holds of one, with its divided axes as two."""
        out, lead = list(shape[: self.stacked]), int(self.stacked)
        for n, cut in zip(shape[lead:], self.cuts, strict=True):
            out += [n] if cut.logical is None else [cut.parts, n // cut.parts]
        return tuple(out)

    def joined_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """The reverse of cut_shape, of any number of parts."""
        out, at = list(shape[: self.stacked]), int(self.stacked)
        for cut in self.cuts:
            out.append(shape[at] if cut.logical is None else shape[at] * shape[at + 1])
            at += 1 + (cut.logical is not None)
        return tuple(out)

    def axes(self, partition: Partition) -> tuple[str | None, ...]:
        """The mesh axis that divides each axis of an array."""
        out: list[str | None] = [None] * self.stacked
        for cut in self.cuts:
            out += [None] if cut.logical is None else [partition.axis(cut.logical), None]
        return tuple(out)


def item_of(stack: str) -> str:
    """The folder of a stack's arrays: "attn_q.weight:Q4_K" -> "weights/attn_q.weight-Q4_K"."""
    return f"weights/{stack.replace(':', '-')}"


def segments_of(members: list[TensorSpec], fmt: Format, config: ModelConfig) -> list[Segment]:
    """How a stack of matrices is kept."""
    first, stacked = members[0], members[0].layer is not None
    logical = [axis if axis in RULES else None for axis in AXES[first.role]]
    rows = segments(first.role, config) if logical[0] is not None else first.shape[:1]
    out, start = [], 0
    for number, n in enumerate(rows):
        shape = (n, *first.shape[1:])
        units = [*shape[:-1], shape[-1] // fmt.block]
        cuts = tuple(Cut(axis, 1 if axis is None else gcd(count, MOST_PARTS)) for axis, count in zip(logical, units))
        arrays = fmt.spec((len(members), *shape) if stacked else shape)
        out.append(Segment(number, arrays, start, n, cuts, stacked))
        start += n
    return out
