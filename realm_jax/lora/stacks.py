"""Adapters on the device: for each role one stack over layers and slots, written in place."""

from collections.abc import Iterable, Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from realm_jax.lora.adapter import MAX_RANK, Adapter, Pair, Place
from realm_jax.model.adapters import EMBEDDING, HEAD, Stack, stack_axes
from realm_jax.model.params import Model
from realm_jax.model.partition import Range
from realm_jax.model.tensors import TensorSpec
from realm_jax.sharding.devices import assemble, replicate

RANKS = (8, 16, 32, 64, 128, 256, 512, MAX_RANK)  # that stacks have; between them programs need not be compiled again

Signature = tuple[int, tuple[str, ...]]  # rank and roles: what stacks of one model and slot count differ in


def rank_bucket(rank: int) -> int:
    """The least of RANKS that holds a rank of at most MAX_RANK."""
    return next(size for size in RANKS if size >= rank)


def stack_dtype() -> np.dtype:
    """Of stacked matrices: float16, which loses nothing of usual adapters, but on TPUs, which have none."""
    return np.dtype(jnp.bfloat16 if jax.default_backend() == "tpu" else np.float16)


class DeviceStacks:
    """The stacks of one signature. A slot's content is what `write` put there last; at first it is zero.

    On a mesh they are divided as the matrices that they adapt.
    """

    def __init__(
        self, slots: int, model: Model, shapes: Mapping[Place, tuple[int, ...]], rank: int, roles: Iterable[str]
    ) -> None:
        """Allocates on the devices.

        slots: how many. model: the base. shapes: of its matrices. rank: one of RANKS. roles: to have stacks for.
        """
        self.rank = rank
        self._config, self._partition, self._mesh = model.config, model.partition, model.mesh
        self._layers = model.config.num_layers
        self._dtype = stack_dtype()
        self._shapes = {role: shape for (role, _), shape in shapes.items()}
        self.stacks: dict[str, Stack] = {}
        for role in sorted(roles):
            a, b = self._matrix_shapes(role)
            self.stacks[role] = self._zeros(role, (a[0], slots, *a[1:]), (b[0], slots, *b[1:]), slots)

    @property
    def signature(self) -> Signature:
        return self.rank, tuple(self.stacks)

    @property
    def nbytes(self) -> int:
        return sum(array.nbytes for stack in self.stacks.values() for array in stack)

    def holds(self, adapter: Adapter) -> bool:
        """Whether there is room for the adapter's roles and rank."""
        return adapter.rank <= self.rank and adapter.roles <= self.stacks.keys()

    def write(self, slot: int, adapter: Adapter, scale: float) -> None:
        """Puts an adapter, times a scale, into a slot: zeros where it has nothing."""
        by_role: dict[str, dict[int, Pair]] = {}
        for (role, layer), pair in adapter.pairs.items():
            by_role.setdefault(role, {})[layer or 0] = pair
        index = np.int32(slot)
        for role, stack in self.stacks.items():
            values = self._values(role, by_role.get(role, {}), scale)
            self.stacks[role] = _write(stack, self._divided(role, *values), index)

    def _zeros(self, role: str, a: tuple[int, ...], b: tuple[int, ...], slots: int) -> Stack:
        made = ((a, self._dtype), (b, self._dtype), ((slots,), np.dtype(np.float32)))
        if self._mesh is None:
            return tuple(jnp.zeros(shape, dtype) for shape, dtype in made)  # type: ignore[return-value]
        sizes = self._partition.mesh.sizes
        out = []
        for (shape, dtype), axes in zip(made, stack_axes(role, self._partition)):
            zeros = np.zeros([n // (sizes[axis] if axis else 1) for n, axis in zip(shape, axes)], dtype)
            out.append(assemble(partial(_same, zeros), self._mesh, axes))
        return tuple(out)  # type: ignore[return-value]

    def _divided(self, role: str, a: np.ndarray, b: np.ndarray, scale: np.float32) -> Any:
        """One slot's values, on a mesh as parts of the devices."""
        if self._mesh is None:
            return a, b, scale
        if role == EMBEDDING:
            return (*replicate((a, b), self._mesh), scale)
        (_, _, *a_axes), (_, _, *b_axes), _ = stack_axes(role, self._partition)

        def ranges(place: dict[str, int]) -> list[list[Range]]:  # of the matrix's rows, and of its columns
            return self._partition.ranges(TensorSpec(role, self._shapes[role]), self._config, place)

        return (
            assemble(lambda place: _cut(a, 2, ranges(place)[1]), self._mesh, (None, *a_axes)),
            assemble(lambda place: _cut(b, 1, ranges(place)[0]), self._mesh, (None, *b_axes)),
            scale,
        )

    def _matrix_shapes(self, role: str) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """[L, R, K] and [L, N, R] of one slot; of the embedding [1, vocab, R] and [1, hidden, R]."""
        n, k = self._shapes[role]
        if role == EMBEDDING:
            return (1, n, self.rank), (1, k, self.rank)
        layers = 1 if role == HEAD else self._layers
        return (layers, self.rank, k), (layers, n, self.rank)

    def _values(self, role: str, pairs: Mapping[int, Pair], scale: float) -> tuple[np.ndarray, np.ndarray, np.float32]:
        """One slot's matrices and scale.

        The largest value of A, and of B, over all layers becomes 0.5 to 1, by a power of two that goes into the scale:
        float16 has 13 binades of full precision below that. Layers share one scale; what differs goes into B.
        """
        a, b = (np.zeros(shape, self._dtype) for shape in self._matrix_shapes(role))
        largest = max((pair.scale for pair in pairs.values()), key=abs, default=0.0)
        if not largest:
            return a, b, np.float32(0)
        factors = {layer: pair.scale / largest for layer, pair in pairs.items()}
        exponent_a = _exponent(_largest(pair.a) for pair in pairs.values())
        exponent_b = _exponent(_largest(pair.b) * abs(factors[layer]) for layer, pair in pairs.items())
        for layer, pair in pairs.items():
            into = a[layer, :, : pair.rank] if role == EMBEDDING else a[layer, : pair.rank]
            into[...] = np.ldexp(pair.a.astype(np.float32), -exponent_a)
            b[layer, :, : pair.rank] = np.ldexp(pair.b.astype(np.float32) * np.float32(factors[layer]), -exponent_b)
        with np.errstate(over="ignore"):
            return a, b, np.float32(np.ldexp(largest * scale, exponent_a + exponent_b))


def _same(value: np.ndarray, place: dict[str, int]) -> np.ndarray:
    return value


def _cut(matrix: np.ndarray, axis: int, ranges: list[Range]) -> np.ndarray:
    return np.concatenate([matrix.take(range(at, at + n), axis) for at, n in ranges], axis)


def _largest(matrix: np.ndarray) -> float:
    return float(np.abs(matrix).max())


def _exponent(values: Iterable[float]) -> int:
    """Of the largest: value = m * 2^exponent with m from 0.5 to 1."""
    return int(np.frexp(max(values))[1])


def _write_slot(stack: Stack, values: Any, slot: jax.Array) -> Stack:
    a, b, scales = stack
    new_a, new_b, scale = values
    return (
        jax.lax.dynamic_update_index_in_dim(a, new_a, slot, 1),
        jax.lax.dynamic_update_index_in_dim(b, new_b, slot, 1),
        jax.lax.dynamic_update_index_in_dim(scales, scale, slot, 0),
    )


_write = jax.jit(_write_slot, donate_argnums=0)
