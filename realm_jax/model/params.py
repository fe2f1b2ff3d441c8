"""Loading: from an opened file to the pytree of weights that the decoder reads.

Matrices stay packed, stacked by role and type over the layers that have them; vectors are float32, stacked by role. One
stack is read at a time, its pages of the file given back at once, so that the peak is about the file's size.
"""

import logging
import math
import os
from functools import partial
from typing import Any

import flax.struct
import jax
import numpy as np
from jax.sharding import Mesh

from realm_jax.gguf import GGUFFile, open_gguf
from realm_jax.model.capacity import check_fits
from realm_jax.model.config import ModelConfig
from realm_jax.model.partition import WHOLE, Partition, partition_model, tensor_blocks
from realm_jax.model.plan import LayerPlan, plan_layers
from realm_jax.model.reading import GGUFReader, Layout, Progress
from realm_jax.model.rope import rotation_tables
from realm_jax.model.tensors import AXES, check_model, group_by_stack
from realm_jax.quant import QuantizedTensor
from realm_jax.sharding.devices import make_mesh, replicate
from realm_jax.sharding.mesh import MeshShape

_log = logging.getLogger(__name__)


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
    partition: Partition = flax.struct.field(pytree_node=False, default=WHOLE)
    mesh: Mesh | None = flax.struct.field(pytree_node=False, default=None)  # None: of one device

    @property
    def nbytes(self) -> int:
        """Bytes of all arrays, those that several devices have counted once."""
        return sum(a.nbytes for a in jax.tree.leaves(self.params))

    def whole_shape(self, role: str, weight: QuantizedTensor) -> tuple[int, ...]:
        """The shape of a role's weight, or stack, over all devices; a tiled one tells what one device has."""
        shape = weight.shape
        if weight.rows is None:
            return shape
        return (*shape[:-2], shape[-2] * self.partition.parts(AXES[role][-2]), shape[-1])


def load_model(
    source: str | os.PathLike[str] | GGUFFile | Any,
    context_length: int | None = None,
    progress: Progress | None = None,
    *,
    backend: str = "xla",
    mesh: MeshShape | None = None,
) -> Model:
    """Loads a GGUF file, weights packed.

    Args:
        source: a path, or an opened file, which stays open: a GGUFFile, or what has a reader of its own, as a
            CheckpointFile.
        context_length: tokens a request may hold; None means as trained, at most 4096.
        progress: called as weights are read.
        backend: of the kernels that will read the weights, as resolve_backend names them.
        mesh: of devices to spread the model over, each of which then reads its own part of the file; None: all of it
            goes to one.

    Raises:
        GGUFError, UnsupportedModelError, InvalidRequestError: see check_model; a mesh may also be larger than there are
            devices, or divide nothing.
        CapacityError: the weights and one sequence of that length do not fit in memory.
    """
    if isinstance(source, (str, os.PathLike)):
        with open_gguf(source) as file:
            return load_model(file, context_length, progress, backend=backend, mesh=mesh)
    config, specs = check_model(source, context_length)
    partition, devices = WHOLE, None
    if mesh is not None:
        partition = partition_model(config, specs, tensor_blocks(source.tensors, specs), mesh)
        devices = make_mesh(mesh)
        for note in partition.notes:
            _log.warning("%s", note)
    on_each, weights = config, sum(source.tensors[spec.name].nbytes for spec in specs)
    if devices is not None and devices.devices.flat[0].platform != "cpu":  # those of a CPU share its memory
        on_each = partition.local_config(config)
        weights = sum(source.tensors[s.name].type.nbytes(math.prod(partition.local_shape(s))) for s in specs)
    check_fits(on_each, weights, backend)
    layout = Layout(config, partition, devices, tiled=backend == "native")
    reader = getattr(source, "reader", partial(GGUFReader, source))(specs, layout, progress)
    groups, layer_stacks = group_by_stack(specs, lambda spec: source.tensors[spec.name].type.name)
    stacks: dict[str, QuantizedTensor] = {}
    vectors: dict[str, jax.Array] = {}
    tables: dict[str, Any] = {}
    factors: dict[str, np.ndarray] = {}
    for stack, members in groups.items():
        first = members[0]
        if first.role.startswith("rope_"):
            factors[first.role] = reader.floats(first)
        elif first.layer is None:
            tables[first.role] = (reader.matrix if first.is_matrix else reader.vectors)(members, stacked=False)
        elif first.is_matrix:
            stacks[stack] = reader.matrix(members, stacked=True)
        else:
            vectors[stack] = reader.vectors(members, stacked=True)
    rope = rotation_tables(config.ropes, config.context_length, _rope_factors(config, factors))
    params = Params(stacks=stacks, vectors=vectors, tables=tables, rope=replicate(rope, devices))
    jax.block_until_ready(params)
    plan = plan_layers(layer_stacks)
    return Model(params=params, config=config, plan=plan, backend=backend, partition=partition, mesh=devices)


def _rope_factors(config: ModelConfig, factors: dict[str, np.ndarray]) -> np.ndarray | None:
    """The frequency divisors, if there are any: under longrope, those for the context in use."""
    short = factors.get("rope_factors_short.weight")
    long = factors.get("rope_factors_long.weight")
    plain = factors.get("rope_freqs.weight")
    if plain is not None:
        return plain
    return long if config.context_length > config.ropes[0].original_context else short
