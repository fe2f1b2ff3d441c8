"""From a GGUF file to arrays on devices: each part of a tensor is packed once and goes to the devices that hold it."""

import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from realm_jax.gguf import GGUFFile
from realm_jax.interrupt import interrupt_deferred
from realm_jax.model.config import ModelConfig
from realm_jax.model.partition import Partition, Range
from realm_jax.model.tensors import TensorSpec
from realm_jax.quant import QuantizedTensor, format_of, pack, packed_spec
from realm_jax.sharding.devices import Place, assemble, local_places

Progress = Callable[[str, int, int], None]  # what is being done, bytes done, bytes in all

ALIGNMENT = 64  # bytes; XLA:CPU takes host memory aligned so without a copy

Part = tuple[tuple[Range, ...], ...]  # ranges of each axis of a tensor


class Layout:
    """Where the parts of a model's tensors go: to one device (mesh None), or over a mesh as its partition says.

    tiled: matrices are for the native kernels.
    """

    def __init__(self, config: ModelConfig, partition: Partition, mesh: Mesh | None, *, tiled: bool):
        self.config = config
        self.partition = partition
        self.mesh = mesh
        self.tiled = tiled
        self._places: list[Place] = [{}] if mesh is None else [place for _, place in local_places(mesh)]

    def part(self, spec: TensorSpec, place: Place) -> Part:
        """What the device at a place holds of a tensor."""
        if self.mesh is None:
            return tuple(((0, n),) for n in spec.shape)
        return tuple(tuple(ranges) for ranges in self.partition.ranges(spec, self.config, place))

    def parts(self, spec: TensorSpec) -> list[Part]:
        """What the devices of this process hold of a tensor, each different part once."""
        return list(dict.fromkeys(self.part(spec, place) for place in self._places))

    def put(self, spec: TensorSpec, parts: Mapping[Part, Any], stacked: bool) -> jax.Array:
        """An array on the devices; parts: of each part its array, with an axis in front when stacked.

        Packed arrays have as many axes as their tensor, each divided as the tensor's.
        """
        if self.mesh is None:
            return jax.device_put(parts[self.part(spec, {})])
        axes = (None,) * stacked + self.partition.axes(spec.role)
        return assemble(lambda place: parts[self.part(spec, place)], self.mesh, axes)


class GGUFReader:
    """Reads weights out of one file and reports how far it is."""

    def __init__(self, file: GGUFFile, specs: Iterable[TensorSpec], layout: Layout, progress: Progress | None):
        self._file = file
        self._layout = layout
        self._progress = progress
        self._total = sum(file.tensors[spec.name].nbytes for spec in specs)
        self._done = 0

    def matrix(self, members: list[TensorSpec], stacked: bool) -> QuantizedTensor:
        """Tensors of one role and type as a weight: a stack [members, ...] of them, or the only one."""
        first, layout = members[0], self._layout
        fmt = format_of(self._file.tensors[first.name].type)
        tiled = layout.tiled and not fmt.dense
        lead = (len(members),) * stacked
        packed: dict[Part, dict[str, np.ndarray]] = {}
        for part in layout.parts(first):
            shape = lead + part_shape(part)
            packed[part] = {key: aligned(s, d) for key, (s, d) in packed_spec(shape, fmt.name, tiled=tiled).items()}
        for i, spec in enumerate(members):
            for part, arrays in packed.items():
                out = {key: a[i] for key, a in arrays.items()} if stacked else arrays
                with interrupt_deferred():  # JAX's hook into garbage collection would swallow a Ctrl-C
                    pack(self._part(spec, part), part_shape(part), fmt.name, out=out, tiled=tiled)
            self._finish(spec)
        names = next(iter(packed.values()))
        placed = {key: layout.put(first, {part: a[key] for part, a in packed.items()}, stacked) for key in names}
        rows = part_shape(next(iter(packed)))[-2]
        return QuantizedTensor(arrays=placed, format=fmt.name, rows=rows if tiled else None)

    def vectors(self, members: list[TensorSpec], stacked: bool) -> jax.Array:
        """float32 [members, ...] of one role, or the only one's [...]."""
        first, layout = members[0], self._layout
        lead = (len(members),) * stacked
        values = {part: aligned(lead + part_shape(part), np.dtype(np.float32)) for part in layout.parts(first)}
        for i, spec in enumerate(members):
            whole = self.floats(spec)
            for part, out in values.items():
                (out[i] if stacked else out)[...] = cut(whole, part)
        return layout.put(first, values, stacked)

    def floats(self, spec: TensorSpec) -> np.ndarray:
        """A whole tensor as float32, on the host."""
        fmt = format_of(self._file.tensors[spec.name].type)
        packed = pack(self._file.data(spec.name), spec.shape, fmt.name)
        values = np.asarray(QuantizedTensor(arrays=packed, format=fmt.name).dequantize())
        self._finish(spec)
        return values

    def _part(self, spec: TensorSpec, part: Part) -> np.ndarray:
        """The bytes of a part of a tensor, uint8 [nbytes]: a view of the file where they lie together."""
        type = self._file.tensors[spec.name].type
        blocks = self._file.data(spec.name).reshape(*spec.shape[:-1], spec.shape[-1] // type.block_size, -1)
        along = tuple((start // type.block_size, size // type.block_size) for start, size in part[-1])
        return np.ascontiguousarray(cut(blocks, (*part[:-1], along))).reshape(-1)

    def _finish(self, spec: TensorSpec) -> None:
        self._file.release(spec.name)
        self._done += self._file.tensors[spec.name].nbytes
        if self._progress is not None:
            self._progress("loading weights", self._done, self._total)


def part_shape(part: Part) -> tuple[int, ...]:
    """Of the array that holds a part of a tensor."""
    return tuple(sum(size for _, size in ranges) for ranges in part)


def cut(values: np.ndarray, part: Part) -> np.ndarray:
    """The part of an array, a view unless an axis has several ranges."""
    for axis, ranges in enumerate(part):
        pieces = [values[(slice(None),) * axis + (slice(start, start + size),)] for start, size in ranges]
        values = pieces[0] if len(pieces) == 1 else np.concatenate(pieces, axis)
    return values


def aligned(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """An uninitialised array that XLA:CPU can take over without copying it."""
    nbytes = math.prod(shape) * dtype.itemsize
    raw = np.empty(nbytes + ALIGNMENT, np.uint8)
    skip = -raw.ctypes.data % ALIGNMENT
    return raw[skip : skip + nbytes].view(dtype).reshape(shape)
