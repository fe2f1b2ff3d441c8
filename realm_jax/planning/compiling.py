"""Compiles the sharded decode step for devices that are not here, from shapes alone."""

import importlib.util
import math
import os
import re
import time
from collections import Counter
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AbstractDevice, AbstractMesh, AxisType, Mesh

from realm_jax.cache import BLOCK_PAGES, BLOCK_SIZE, allocate_pages
from realm_jax.engine.programs import batch_program, on_mesh, params_spec, pool_spec
from realm_jax.errors import BackendError, CapacityError
from realm_jax.model.params import Model, Params
from realm_jax.model.partition import Partition, partition_model
from realm_jax.model.plan import plan_layers
from realm_jax.model.rope import rotation_tables
from realm_jax.model.tensors import group_by_stack
from realm_jax.planning.outline import Outline
from realm_jax.planning.plan import Compiled, Plan
from realm_jax.planning.topology import Topology
from realm_jax.quant import QuantizedTensor, packed_spec
from realm_jax.sharding.mesh import MESH_AXES, MeshShape

# libtpu asks the machine it runs on what TPU it has; where there is none, the answers are these.
_NO_TPU_HERE = {
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_ACCELERATOR_TYPE": "v5litepod-4",
    "TPU_WORKER_HOSTNAMES": "localhost",
}


def compile_plan(plan: Plan, outline: Outline, topology: Topology) -> Compiled:
    """Compiles the decode step of a plan's batch for its topology; lowers it, for GPUs.

    Raises:
        BackendError: what is needed for it is not installed, or cannot compile it.
        CapacityError: the compiler says that it does not fit.
    """
    shape = MeshShape(**plan.mesh)
    partition = partition_model(outline.config, outline.specs, outline.blocks, shape)
    kind = topology.device.platform
    mesh = _tpu_mesh(topology, shape) if kind == "tpu" else abstract_mesh(shape, topology.device.name, kind)
    start = time.perf_counter()
    tried = ["tpu"] if kind == "tpu" else ["gpu"] if kind == "gpu" else []
    lowered, backend = None, "xla"
    for name in [*tried, "xla"]:
        model = abstract_model(outline, partition, mesh, name)
        try:
            lowered, backend = lower_decode(model, plan.batch, "cuda" if kind == "gpu" else kind), name
            break
        except BackendError:
            if name == "xla":
                raise
    assert lowered is not None
    text = lowered.as_text()
    found: dict[str, Any] = {"kernels": _kernels(text), "collectives": count_collectives(text)}
    if kind != "tpu":
        seconds = time.perf_counter() - start
        return Compiled(f"lowered for {topology.device.name} by jax {jax.__version__}", backend, seconds, **found)
    try:
        memory = lowered.compile().memory_analysis()
    except jax.errors.JaxRuntimeError as error:
        first = str(error).partition("\n")[0]
        if "RESOURCE_EXHAUSTED" in str(error):
            raise CapacityError(f"{topology} has not the memory for it: {first}") from error
        raise BackendError(f"libtpu cannot compile it for {topology}: {first}") from error
    return Compiled(
        f"compiled for {topology.device.name} by libtpu",
        backend,
        time.perf_counter() - start,
        **found,
        argument_bytes=memory.argument_size_in_bytes,
        output_bytes=memory.output_size_in_bytes,
        aliased_bytes=memory.alias_size_in_bytes,
        temporary_bytes=memory.temp_size_in_bytes,
    )


def abstract_model(outline: Outline, partition: Partition, mesh: Any, backend: str) -> Model:
    """The model that load_model would make of a file, as shapes of the whole arrays; mesh None: of one device."""
    specs = [spec for spec in outline.specs if not spec.role.startswith("rope_")]
    groups, layer_stacks = group_by_stack(specs, lambda spec: outline.types[spec.name])
    stacks: dict[str, Any] = {}
    vectors: dict[str, Any] = {}
    tables: dict[str, Any] = {}
    for stack, members in groups.items():
        first = members[0]
        shape = first.shape if first.layer is None else (len(members), *first.shape)
        value = _abstract_matrix(shape, outline.types[first.name]) if first.is_matrix else _floats(shape)
        if first.layer is None:
            tables[first.role] = value
        else:
            (stacks if first.is_matrix else vectors)[stack] = value
    c = outline.config
    rope = jax.tree.map(lambda a: _floats(a.shape), rotation_tables(c.ropes, c.context_length))
    params = Params(stacks=stacks, vectors=vectors, tables=tables, rope=rope)
    plan = plan_layers(layer_stacks)
    model = Model(params=params, config=c, plan=plan, backend=backend, partition=partition, mesh=mesh)
    if mesh is None:
        return model
    return model.replace(params=_placed(params, params_spec(model), mesh))  # type: ignore[attr-defined]


def lower_decode(model: Model, batch: int, platform: str, context: int | None = None) -> Any:
    """Lowers the step that decodes one token of each request of a batch, for a platform of JAX's.

    model: as abstract_model makes it. context: tokens that each request's cache has room for; None: all that it may.
    """
    c, data = model.config, model.partition.mesh.data
    rows = -(-batch // data) * data
    pages = -(-(context or c.context_length) // BLOCK_SIZE) * BLOCK_PAGES
    dtype = {"tpu": jnp.bfloat16, "gpu": jnp.float16}.get(model.backend, jnp.float32)
    pool = jax.eval_shape(
        lambda: allocate_pages(c.num_layers, pages * rows, c.num_kv_heads, c.head_dim, c.value_dim, dtype)
    )
    slots = (rows + 1,) if model.mesh is None else (math.prod(model.partition.mesh.sizes.values()), rows + 1)
    shapes = [(rows, 1), (rows, 1), (rows, pages), (rows,), (), (rows,), slots]
    numbers = [jax.ShapeDtypeStruct(shape, np.int32) for shape in shapes]
    if model.mesh is not None:
        pool = _placed(pool, jax.tree.map(lambda _: pool_spec(model.partition), pool), model.mesh)
    program = batch_program(model, "last", None)
    return program.trace(model.params, pool, *numbers, None).lower(lowering_platforms=(platform,))


def count_collectives(text: str) -> dict[str, int]:
    """Of a lowered program, by operation."""
    found = Counter(
        re.findall(r"stablehlo\.(all_reduce|all_gather|reduce_scatter|all_to_all|collective_permute)\b", text)
    )
    return dict(sorted(found.items()))


def _kernels(text: str) -> dict[str, int]:
    """Calls of Pallas kernels in a lowered program."""
    names = re.findall(r'name = "(\w+)", num_stages', text) + re.findall(r'kernel_name = "(\w+)"', text)
    return dict(sorted(Counter(names).items()))


def _tpu_mesh(topology: Topology, shape: MeshShape) -> Mesh:
    if importlib.util.find_spec("libtpu") is None:
        raise BackendError(f"compiling for {topology} needs libtpu, which is not installed; pip install libtpu")
    from jax.experimental import topologies

    for variable, value in _NO_TPU_HERE.items():
        os.environ.setdefault(variable, value)
    name = str(topology) + "x1" * (topology.kind in ("v4", "v5p") and len(topology.shape) == 2)
    try:
        devices = topologies.get_topology_desc(name, platform="tpu").devices
    except Exception as error:
        raise BackendError(f"libtpu has no topology {name}: {str(error).partition(chr(10))[0]}") from error
    return Mesh(np.asarray(devices[: shape.devices]).reshape(tuple(shape.sizes.values())), MESH_AXES)


def abstract_mesh(shape: MeshShape, name: str, platform: str) -> AbstractMesh:
    """A mesh of devices that are not there, known by their name ("NVIDIA H100") and platform ("gpu")."""
    device = AbstractDevice(device_kind=name, num_cores=None, platform=platform)
    auto = (AxisType.Auto,) * len(MESH_AXES)  # of explicit axes shard_map refuses other specs
    return AbstractMesh(tuple(shape.sizes.values()), MESH_AXES, axis_types=auto, abstract_device=device)


def _abstract_matrix(shape: tuple[int, ...], type: str) -> QuantizedTensor:
    arrays = {name: jax.ShapeDtypeStruct(s, dtype) for name, (s, dtype) in packed_spec(shape, type).items()}
    return QuantizedTensor(arrays=arrays, format=type)


def _floats(shape: tuple[int, ...]) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, np.float32)


def _placed(values: Any, specs: Any, mesh: Any) -> Any:
    """Shapes with the shardings that they have on a mesh."""
    return jax.tree.map(
        lambda value, place: jax.ShapeDtypeStruct(value.shape, value.dtype, sharding=place),
        values,
        on_mesh(specs, mesh),
    )
