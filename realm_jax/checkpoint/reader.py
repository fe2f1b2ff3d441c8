"""From a checkpoint to arrays on devices: each restores its parts, and nothing else is read."""

import math
from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from realm_jax.checkpoint.arrays import Specs, check_sums, restore_host, restore_sharded
from realm_jax.checkpoint.file import CheckpointFile
from realm_jax.checkpoint.layout import VECTORS, Segment, item_of, segments_of
from realm_jax.errors import InvalidRequestError
from realm_jax.interrupt import interrupt_deferred
from realm_jax.model.reading import ALIGNMENT, Layout, Part, Progress, aligned, cut, part_shape
from realm_jax.model.tensors import TensorSpec, group_by_stack, stack_of
from realm_jax.quant import QuantizedTensor, format_of, packed_spec, tile
from realm_jax.sharding.devices import Place, local_places


class CheckpointReader:
    """Reads weights out of one checkpoint and reports how far it is: what a GGUFReader does of a file."""

    def __init__(self, file: CheckpointFile, specs: Iterable[TensorSpec], layout: Layout, progress: Progress | None):
        self._file = file
        self._layout = layout
        self._progress = progress
        self._stacks, _ = group_by_stack(specs, lambda spec: file.tensors[spec.name].type.name)
        self._total = sum(file.tensors[s.name].nbytes for members in self._stacks.values() for s in members)
        self._done = 0
        self._vectors: dict[str, np.ndarray] | None = None  # all of them, by role
        self._scratch = _Scratch()

    def matrix(self, members: list[TensorSpec], stacked: bool) -> QuantizedTensor:
        """Tensors of one role and type as a weight: a stack [members, ...] of them, or the only one."""
        first, layout = members[0], self._layout
        fmt = format_of(self._file.tensors[first.name].type)
        tiled = layout.tiled and not fmt.dense
        with interrupt_deferred():
            parts = self._restore(members)
            if tiled:
                for part in parts:
                    parts[part] = _tiled(parts[part], part, members, stacked, fmt.name)
            names = next(iter(parts.values()))
            arrays = {name: layout.put(first, {part: a[name] for part, a in parts.items()}, stacked) for name in names}
        self._finish(members)
        rows = part_shape(next(iter(parts)))[-2]
        return QuantizedTensor(arrays=arrays, format=fmt.name, rows=rows if tiled else None)

    def vectors(self, members: list[TensorSpec], stacked: bool) -> jax.Array:
        """float32 [members, ...] of one role, or the only one's [...]."""
        first = members[0]
        whole = self._vector(first.role)
        lead = (((0, len(members)),),) * stacked
        parts = {part: cut(whole, lead + part) for part in self._layout.parts(first)}
        self._finish(members)
        return self._layout.put(first, parts, stacked)

    def floats(self, spec: TensorSpec) -> np.ndarray:
        """A whole tensor as float32, on the host."""
        self._finish([spec])
        return self._vector(spec.role)

    def _vector(self, role: str) -> np.ndarray:
        if self._vectors is None:
            float32 = np.dtype(np.float32)
            specs = {
                stack: ((len(members),) * (members[0].layer is not None) + members[0].shape, float32)
                for stack, members in self._stacks.items()
                if not members[0].is_matrix
            }
            arrays = restore_host(self._file.manifest, VECTORS, specs)
            for name, array in arrays.items():
                check_sums(self._file.manifest, VECTORS, name, array.shape, array, ())
            self._vectors = arrays
        return self._vectors[role]

    def _restore(self, members: list[TensorSpec]) -> dict[Part, dict[str, Any]]:
        """The rows of a stack: of each part that devices of this process hold, its arrays by name."""
        manifest, layout, first = self._file.manifest, self._layout, members[0]
        type = self._file.tensors[first.name].type
        item = item_of(stack_of(first, type.name))
        segments = segments_of(members, format_of(type), layout.config)
        specs = {
            s.key(name): (s.cut_shape(shape), dtype) for s in segments for name, (shape, dtype) in s.arrays.items()
        }
        arrays: dict[str, Any]
        if layout.mesh is None:
            tiled = layout.tiled and not format_of(type).dense  # then the rows are read and no longer needed
            arrays = dict(restore_host(manifest, item, specs, self._scratch.start(specs) if tiled else aligned))
        else:
            self._check_divides(item, segments)
            shardings = {
                s.key(name): NamedSharding(layout.mesh, P(*s.axes(layout.partition)))
                for s in segments
                for name in s.arrays
            }
            arrays = dict(restore_sharded(manifest, item, specs, shardings))
        parts: dict[Part, dict[str, Any]] = {}
        for segment in segments:
            for name in segment.arrays:
                key = segment.key(name)
                check_sums(manifest, item, key, specs[key][0], arrays[key], segment.part_axes)
        for name in segments[0].arrays:
            held = [self._held(first, s, arrays.pop(s.key(name))) for s in segments]
            for part in held[0]:
                pieces = [of_segment[part] for of_segment in held]
                join = np.concatenate if isinstance(pieces[0], np.ndarray) else jnp.concatenate
                whole = pieces[0] if len(pieces) == 1 else join(pieces, axis=int(segments[0].stacked))
                parts.setdefault(part, {})[name] = whole
        return parts

    def _held(self, spec: TensorSpec, segment: Segment, array: Any) -> dict[Part, Any]:
        """Of each part of a tensor what a segment's array has of it: on the host where devices compute there."""
        layout = self._layout
        if layout.mesh is None:
            return {layout.part(spec, {}): array.reshape(segment.joined_shape(array.shape))}
        places: dict[jax.Device, Place] = dict(local_places(layout.mesh))
        out: dict[Part, Any] = {}
        for shard in array.addressable_shards:
            part = layout.part(spec, places[shard.device])
            if part not in out:
                data = np.asarray(shard.data) if shard.device.platform == "cpu" else shard.data
                out[part] = data.reshape(segment.joined_shape(data.shape))
        return out

    def _check_divides(self, item: str, segments: list[Segment]) -> None:
        for c in (c for segment in segments for c in segment.cuts if c.logical is not None):
            wanted = self._layout.partition.parts(str(c.logical))
            if c.parts % wanted:
                raise InvalidRequestError(
                    f"mesh {self._layout.partition.mesh}: {item} of the checkpoint is cut into {c.parts} parts, which "
                    f"do not divide by {wanted}; accepted: a mesh that divides them, or the GGUF file, on any mesh"
                )

    def _finish(self, members: list[TensorSpec]) -> None:
        self._done += sum(self._file.tensors[spec.name].nbytes for spec in members)
        if self._progress is not None:
            self._progress("loading weights", self._done, self._total)


class _Scratch:
    """Memory for the arrays of one stack after another: new pages for each would take longer than the reading."""

    def __init__(self) -> None:
        self._bytes = np.empty(0, np.uint8)
        self._used = 0

    def start(self, specs: Specs) -> Callable[[tuple[int, ...], np.dtype], np.ndarray]:
        """What makes arrays of these shapes and dtypes. Those made before are overwritten."""
        needed = sum(math.prod(shape) * dtype.itemsize + ALIGNMENT for shape, dtype in specs.values())
        if needed > len(self._bytes):
            self._bytes = aligned((needed,), np.dtype(np.uint8))
        self._used = 0
        return self._array

    def _array(self, shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
        start, size = self._used, math.prod(shape) * dtype.itemsize
        self._used += -(-size // ALIGNMENT) * ALIGNMENT
        return self._bytes[start : start + size].view(dtype).reshape(shape)


def _tiled(
    rows: dict[str, np.ndarray], part: Part, members: list[TensorSpec], stacked: bool, format: str
) -> dict[str, np.ndarray]:
    shape = (len(members),) * stacked + part_shape(part)
    out = {name: aligned(s, dtype) for name, (s, dtype) in packed_spec(shape, format, tiled=True).items()}
    return tile(rows, shape, format, out)
