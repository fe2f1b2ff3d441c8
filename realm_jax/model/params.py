"""Loading: from an opened file to the pytree of weights that the decoder reads.

Matrices stay packed, stacked by role and type over the layers that have them; vectors are float32, stacked by role. One
stack is read at a time, its pages of the file given back at once, so that the peak is about the file's size.
"""

import math
import os
from collections.abc import Callable, Iterable
from typing import Any

import flax.struct
import jax
import numpy as np

from realm_jax.gguf import GGUFFile, open_gguf
from realm_jax.interrupt import interrupt_deferred
from realm_jax.model.capacity import check_fits
from realm_jax.model.config import ModelConfig
from realm_jax.model.plan import LayerPlan, plan_layers
from realm_jax.model.rope import rotation_tables
from realm_jax.model.tensors import TensorSpec, check_model
from realm_jax.quant import QuantizedTensor, format_of, pack, packed_spec

Progress = Callable[[str, int, int], None]  # what is being done, bytes done, bytes in all

_ALIGNMENT = 64  # bytes; XLA:CPU takes host memory aligned so without a copy


@flax.struct.dataclass
class Params:
    """The weights of one model.

    stacks: matrices [layers that have it, N, K] by stack name ("attn_q.weight:Q4_K"), packed.
    vectors: float32 [layers that have it, ...] by role.
    tables: what is not per layer: token_embd.weight and output.weight packed, output_norm.weight float32 [hidden], ...
    rope: the coarse and the fine table of rope.rotation_tables.
    """

    stacks: dict[str, QuantizedTensor]
    vectors: dict[str, jax.Array]
    tables: dict[str, Any]
    rope: tuple[jax.Array, jax.Array]


@flax.struct.dataclass
class Model:
    """A loaded model: arrays, and the static description that compiled functions specialise on."""

    params: Params
    config: ModelConfig = flax.struct.field(pytree_node=False)
    plan: LayerPlan = flax.struct.field(pytree_node=False)
    backend: str = flax.struct.field(pytree_node=False, default="xla")  # whose layout the weights have

    @property
    def nbytes(self) -> int:
        """Bytes of all arrays on the device."""
        return sum(a.nbytes for a in jax.tree.leaves(self.params))


def load_model(
    source: str | os.PathLike[str] | GGUFFile,
    context_length: int | None = None,
    progress: Progress | None = None,
    *,
    backend: str = "xla",
) -> Model:
    """Loads a GGUF file, weights packed.

    Args:
        source: a path, or an opened file, which stays open.
        context_length: tokens a request may hold; None means as trained, at most 4096.
        progress: called as weights are read.
        backend: of the kernels that will read the weights, as resolve_backend names them.

    Raises:
        GGUFError, UnsupportedModelError, InvalidRequestError: see check_model.
        CapacityError: the weights and one sequence of that length do not fit in memory.
    """
    if not isinstance(source, GGUFFile):
        with open_gguf(source) as file:
            return load_model(file, context_length, progress, backend=backend)
    config, specs = check_model(source, context_length)
    check_fits(config, sum(source.tensors[spec.name].nbytes for spec in specs), backend)
    reader = _Reader(source, specs, progress, tiled=backend == "native")
    groups: dict[str, list[TensorSpec]] = {}
    layer_stacks: list[dict[str, str]] = [{} for _ in range(config.num_layers)]
    for spec in specs:
        stack = f"{spec.role}:{source.tensors[spec.name].type.name}" if spec.is_matrix else spec.role
        if spec.layer is not None:
            layer_stacks[spec.layer][spec.role] = stack
        groups.setdefault(stack, []).append(spec)

    stacks: dict[str, QuantizedTensor] = {}
    vectors: dict[str, jax.Array] = {}
    tables: dict[str, Any] = {}
    for stack, members in groups.items():
        first = members[0]
        if first.layer is None:
            tables[first.role] = reader.matrix(first) if first.is_matrix else reader.vectors([first])[0]
        elif first.is_matrix:
            stacks[stack] = reader.stack(members)
        else:
            vectors[stack] = jax.device_put(reader.vectors(members))
    rope = rotation_tables(config.ropes, config.context_length, _rope_factors(config, tables))
    params = Params(
        stacks=stacks,
        vectors=vectors,
        tables={role: jax.device_put(value) for role, value in tables.items()},
        rope=jax.device_put(rope),
    )
    jax.block_until_ready(params)
    return Model(params=params, config=config, plan=plan_layers(layer_stacks), backend=backend)


def _rope_factors(config: ModelConfig, tables: dict[str, Any]) -> np.ndarray | None:
    """Takes the frequency divisors out of the tables: under longrope, those for the context in use."""
    short = tables.pop("rope_factors_short.weight", None)
    long = tables.pop("rope_factors_long.weight", None)
    plain = tables.pop("rope_freqs.weight", None)
    if plain is not None:
        return plain
    return long if config.context_length > config.ropes[0].original_context else short


class _Reader:
    """Packs tensors out of one file and reports how far it is."""

    def __init__(self, file: GGUFFile, specs: Iterable[TensorSpec], progress: Progress | None, *, tiled: bool):
        self._file = file
        self._tiled = tiled
        self._progress = progress
        self._total = sum(file.tensors[s.name].nbytes for s in specs)
        self._done = 0

    def _finish(self, spec: TensorSpec) -> None:
        self._file.release(spec.name)
        self._done += self._file.tensors[spec.name].nbytes
        if self._progress is not None:
            self._progress("loading weights", self._done, self._total)

    def matrix(self, spec: TensorSpec) -> QuantizedTensor:
        return self._read([spec], spec.shape)

    def stack(self, members: list[TensorSpec]) -> QuantizedTensor:
        return self._read(members, (len(members), *members[0].shape))

    def _read(self, members: list[TensorSpec], shape: tuple[int, ...]) -> QuantizedTensor:
        """Tensors of one type as a weight of this shape: a stack of them, or the only one."""
        fmt = format_of(self._file.tensors[members[0].name].type)
        tiled = self._tiled and not fmt.dense
        arrays = {key: _aligned(s, d) for key, (s, d) in packed_spec(shape, fmt.name, tiled=tiled).items()}
        for i, spec in enumerate(members):
            out = arrays if shape == spec.shape else {key: a[i] for key, a in arrays.items()}
            with interrupt_deferred():  # JAX's hook into garbage collection would swallow a Ctrl-C
                pack(self._file.data(spec.name), spec.shape, fmt.name, out=out, tiled=tiled)
            self._finish(spec)
        return QuantizedTensor(arrays=jax.device_put(arrays), format=fmt.name, rows=shape[-2] if tiled else None)

    def vectors(self, members: list[TensorSpec]) -> np.ndarray:
        """float32 [members, ...]."""
        out = _aligned((len(members), *members[0].shape), np.dtype(np.float32))
        for i, spec in enumerate(members):
            type = self._file.tensors[spec.name].type
            packed = pack(self._file.data(spec.name), spec.shape, type)
            out[i] = np.asarray(QuantizedTensor(arrays=packed, format=format_of(type).name).dequantize())
            self._finish(spec)
        return out


def _aligned(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """An uninitialised array that XLA:CPU can take over without copying it."""
    nbytes = math.prod(shape) * dtype.itemsize
    raw = np.empty(nbytes + _ALIGNMENT, np.uint8)
    skip = -raw.ctypes.data % _ALIGNMENT
    return raw[skip : skip + nbytes].view(dtype).reshape(shape)
