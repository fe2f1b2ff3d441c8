"""A plan: what a model takes of each device's memory on a topology, what fits, how fast it can be. No jax in here."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from realm_jax.engine.buckets import CHUNK_SIZES, PREFILL_TOKENS
from realm_jax.errors import InvalidRequestError
from realm_jax.model.config import ModelConfig
from realm_jax.model.partition import Partition, auto_mesh, partition_model
from realm_jax.planning import costs
from realm_jax.planning.costs import Collective
from realm_jax.planning.outline import Outline, read_outline
from realm_jax.planning.topology import Topology
from realm_jax.sharding.mesh import MeshShape

# As the engine has them, in modules that import jax; tests hold these to those.
BLOCK_SIZE = 128  # positions that a sequence's cache grows by
CACHE_ITEMSIZE = 2  # bytes of a cached number: float16, or bfloat16 on TPUs
CACHE_SHARE = 0.85  # of the memory that weights leave; the rest is for what is computed
BATCHES = (1, 8, 32)  # that the limits of decoding are given for
DEFAULT_BATCH = 8
MAX_BATCH = 1 << 16
TPU_LANES = 128  # elements that the last axis of an array is stored in multiples of

Bound = Literal["memory", "compute", "interconnect"]


@dataclass(frozen=True)
class Memory:
    """Bytes of one device.

    total: it has. usable: of it, as JAX gives a process. weights_divided, weights_replicated: of its part of what is
    divided, and of what every device has. cache: of its part of the batch, at the whole context. workspace: an estimate
    of what a step needs besides. fits: whether that is all there.
    """

    total: int
    usable: int
    weights_divided: int
    weights_replicated: int
    cache: int
    workspace: int
    fits: bool


@dataclass(frozen=True)
class Step:
    """The limit of one step of the program, per device.

    batch: requests that decode, or tokens of prompts in a prefill. bytes_read: weights and cache. operations: multiply
    and add count as two. The three times are bytes over bandwidth, operations over the peak, and that of collectives;
    a step takes the longer of the first two, and the third. bound: the longest. tokens_per_second: of all devices.
    """

    batch: int
    bytes_read: int
    operations: int
    bytes_moved: int
    memory_seconds: float
    compute_seconds: float
    interconnect_seconds: float
    seconds: float
    tokens_per_second: float
    bound: Bound


@dataclass(frozen=True)
class Compiled:
    """What a compiler made of one decode step, for each device.

    target: what it was compiled for, and by what. backend: of the kernels. seconds: it took. kernels: calls of Pallas
    kernels by name; those in the body of the loop over layers count once. collectives: in the program, by operation, in
    the same way. argument_bytes, output_bytes, temporary_bytes: as the compiler reports; None where it only lowered.
    aliased_bytes: of the outputs, in arguments' place.
    """

    target: str
    backend: str
    seconds: float
    kernels: dict[str, int]
    collectives: dict[str, int]
    argument_bytes: int | None = None
    output_bytes: int | None = None
    aliased_bytes: int | None = None
    temporary_bytes: int | None = None


@dataclass(frozen=True)
class Plan:
    """All that `realm plan` prints; bytes and times are of one device.

    mesh: devices along each axis. context: tokens of a request. batch: requests. moved_per_token: bytes a device sends
    for each token of its own requests. largest_context: at one request, 0 where nothing fits. largest_batch: at this
    context. decode: for several batches. prefill: of one step of the engine. compiled: where that was asked for.
    """

    model: str
    architecture: str
    parameters: int
    types: tuple[str, ...]
    topology: str
    device: str
    devices: int
    mesh: dict[str, int]
    notes: tuple[str, ...]
    context: int
    batch: int
    memory: Memory
    largest_context: int
    largest_batch: int
    collectives: tuple[Collective, ...]
    moved_per_token: float
    decode: tuple[Step, ...]
    prefill: Step
    compiled: Compiled | None = None


def plan(
    model: str | Path | Outline,
    topology: str | Topology,
    mesh: str | MeshShape | None = None,
    context: int | None = None,
    batch: int = DEFAULT_BATCH,
) -> Plan:
    """Plans a model for a topology; needs neither its weights nor the devices.

    Args:
        model: see planning.outline.read_outline; or an outline, read for this context.
        topology: "h100:8", "v5e:4x4", "cpu:2": see planning.topology.
        mesh: how to use the devices, "tensor=4,data=2"; None or "auto": as LLM(mesh="auto") does.
        context: tokens that a request may hold; None: as LLM's default.
        batch: requests at once.

    Raises:
        InvalidRequestError: a topology, mesh, context or batch that there cannot be, or that does not suit the model.
        ModelNotFoundError, GGUFError, UnsupportedModelError: see read_outline.
    """
    if isinstance(batch, bool) or not isinstance(batch, int) or not 1 <= batch <= MAX_BATCH:
        raise InvalidRequestError(f"batch is {batch!r}; accepted: an integer from 1 to {MAX_BATCH:,}")
    if isinstance(mesh, str):
        mesh = None if mesh == "auto" else MeshShape.parse(mesh)
    if isinstance(topology, str):
        topology = Topology.parse(topology)
    if mesh is not None and mesh.devices > topology.devices:
        raise InvalidRequestError(
            f"mesh {mesh} needs {mesh.devices} devices, and topology {topology} has {topology.devices}"
        )
    outline = model if isinstance(model, Outline) else read_outline(model, context)
    c = outline.config
    shape = auto_mesh(c, outline.specs, outline.blocks, topology.devices, all_of_them=True) if mesh is None else mesh
    partition = partition_model(c, outline.specs, outline.blocks, shape)
    planner = _Planner(outline, partition, topology)
    decode = tuple(planner.decode(n, c.context_length) for n in sorted({*BATCHES, batch}))
    return Plan(
        model=outline.name,
        architecture=c.architecture,
        parameters=outline.parameters,
        types=outline.matrix_types,
        topology=str(topology),
        device=topology.device.name,
        devices=shape.devices,
        mesh=shape.sizes,
        notes=(*_unused(topology, shape), *partition.notes, *_padded(topology, c)),
        context=c.context_length,
        batch=batch,
        memory=planner.memory(batch),
        largest_context=planner.largest_context(),
        largest_batch=planner.largest_batch(),
        collectives=planner.collectives,
        moved_per_token=sum(one.moved for one in planner.collectives),
        decode=decode,
        prefill=planner.prefill(batch),
    )


def _unused(topology: Topology, mesh: MeshShape) -> tuple[str, ...]:
    if mesh.devices == topology.devices:
        return ()
    return (f"{mesh.devices} of the {topology.devices} devices are used",)


def _padded(topology: Topology, config: ModelConfig) -> tuple[str, ...]:
    if topology.device.platform != "tpu" or config.head_dim % TPU_LANES == 0:
        return ()
    lanes = -(-config.head_dim // TPU_LANES) * TPU_LANES
    return (f"a TPU may store cached rows of {config.head_dim} elements as {lanes}: the cache may take more",)


class _Planner:
    """One model on one mesh of one topology."""

    def __init__(self, outline: Outline, partition: Partition, topology: Topology):
        self._outline = outline
        self._partition = partition
        self._topology = topology
        self._data = partition.mesh.data
        self._itemsize = CACHE_ITEMSIZE
        self._weights = costs.weight_bytes(outline, partition)
        self._token_bytes = costs.cache_token_bytes(outline.config, partition, self._itemsize)
        self._free = topology.device.usable - sum(self._weights)
        self.collectives = costs.collectives(outline, partition)

    def memory(self, batch: int) -> Memory:
        cache, workspace = self._cache(batch, self._outline.config.context_length), self._workspace(batch)
        return Memory(
            self._topology.device.memory,
            self._topology.device.usable,
            *self._weights,
            cache,
            workspace,
            fits=cache <= self._for_cache(batch),
        )

    def largest_context(self) -> int:
        """Tokens of one request, up to what the model was trained on."""
        blocks = max(0, self._for_cache(1)) // (self._token_bytes * BLOCK_SIZE)
        return min(blocks * BLOCK_SIZE, self._outline.config.trained_context)

    def largest_batch(self) -> int:
        """Requests of the whole context."""
        context = self._outline.config.context_length
        low, high = 0, MAX_BATCH
        while low < high:  # more requests need more workspace, too
            middle = (low + high + 1) // 2
            if self._cache(middle, context) <= self._for_cache(middle):
                low = middle
            else:
                high = middle - 1
        return low

    def decode(self, batch: int, context: int) -> Step:
        """One token for each of a batch of requests that have so many."""
        rows = self._rows(batch)
        read = costs.weights_read(self._outline, self._partition, rows)
        read += rows * costs.cache_read(self._outline, self._partition, context, self._itemsize)
        work = costs.operations(self._outline, self._partition, rows, rows, context)
        return self._step(batch, rows, rows, read, work)

    def prefill(self, batch: int) -> Step:
        """As many tokens as the engine takes at once, the first of a prompt."""
        rows, drawn = self._prefill_rows(batch)
        read = costs.weights_read(self._outline, self._partition, rows)
        work = costs.operations(self._outline, self._partition, rows, drawn, rows / 2)
        return self._step(PREFILL_TOKENS, rows, drawn, read, work)

    def _step(self, batch: int, rows: int, drawn: int, read: float, work: float) -> Step:
        device = self._topology.device
        memory, compute = read / device.bandwidth, work / device.flops
        moved = interconnect = 0.0
        for one in self.collectives:
            sent = one.moved * (drawn if one.what == costs.LOGITS else rows)
            moved += sent
            interconnect += one.count * (device.launch + one.steps * device.hop)
            interconnect += sent / self._topology.link(one.devices, one.apart)
        times: dict[Bound, float] = {"memory": memory, "compute": compute, "interconnect": interconnect}
        seconds = max(memory, compute) + interconnect
        return Step(
            batch,
            round(read),
            round(work),
            round(moved),
            memory,
            compute,
            interconnect,
            seconds,
            batch / seconds,
            max(times, key=lambda name: times[name]),
        )

    def _rows(self, batch: int) -> int:
        """Of a batch, what one device of the data axis has."""
        return -(-batch // self._data)

    def _prefill_rows(self, batch: int) -> tuple[int, int]:
        """Of one prefill: tokens that a device has, and how many of them it computes logits of."""
        return max(1, PREFILL_TOKENS // self._data), min(batch, PREFILL_TOKENS // CHUNK_SIZES[1])

    def _cache(self, batch: int, context: int) -> int:
        return self._rows(batch) * -(-context // BLOCK_SIZE) * BLOCK_SIZE * self._token_bytes

    def _workspace(self, batch: int) -> int:
        rows = self._rows(batch)
        decode = costs.activations(self._outline, self._partition, rows, rows)
        return max(decode, costs.activations(self._outline, self._partition, *self._prefill_rows(batch)))

    def _for_cache(self, batch: int) -> int:
        """Bytes that the cache may have beside the workspace of such a batch; negative when weights do not fit."""
        return min(int(self._free * CACHE_SHARE), self._free - self._workspace(batch))
