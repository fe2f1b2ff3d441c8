"""How one model lies on a mesh: which logical axes are divided, and which part of a tensor a device holds. No jax here.

A tensor is divided where all that has to divide does: attention by whole key/value heads, and matrices that are summed
over the divided axis by whole blocks of their packed type. What does not divide is whole on every device, which is said
in `notes`.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from math import prod
from typing import Any

from realm_jax.errors import InvalidRequestError
from realm_jax.model.config import ModelConfig
from realm_jax.model.tensors import AXES, TensorSpec
from realm_jax.sharding.mesh import MeshShape
from realm_jax.sharding.rules import RULES

Range = tuple[int, int]  # start, size
DEFAULT_BATCH = 8

# Logical axes that are divided together or not at all, with what they are called in notes.
_GROUPS = {
    "attention": ("heads", "kv_heads", "qkv"),
    "the feed-forward block": ("ffn",),
    "the experts' inner axis": ("expert_ffn",),
    "the shared expert": ("shared_ffn",),
    "the vocabulary": ("vocab",),
}


@dataclass(frozen=True)
class Partition:
    """Of one model on one mesh; hashable, so compiled functions specialise on it.

    mesh: the mesh's shape. divided: (logical axis, mesh axis) of those that are divided. notes: what is not, and why.
    """

    mesh: MeshShape = field(default_factory=MeshShape)
    divided: tuple[tuple[str, str], ...] = ()
    notes: tuple[str, ...] = ()

    def axis(self, logical: str) -> str | None:
        """The mesh axis that divides a logical axis; None where it is whole."""
        return dict(self.divided).get(logical)

    def parts(self, logical: str) -> int:
        """Into how many a logical axis is divided."""
        axis = self.axis(logical)
        return 1 if axis is None else self.mesh.sizes[axis]

    def axes(self, role: str) -> tuple[str | None, ...]:
        """The mesh axis of each axis of a role's tensor."""
        return tuple(self.axis(logical) for logical in AXES[role])

    def reduced(self, name: str) -> str | None:
        """The mesh axis over which results of a linear layer ("attn_output") are partial sums, if there is one."""
        return self.axis(AXES[f"{name}.weight"][-1])

    def local_shape(self, spec: TensorSpec) -> tuple[int, ...]:
        """Of a device's part of a tensor."""
        return tuple(n // self.parts(logical) for n, logical in zip(spec.shape, spec.axes))

    def local_config(self, config: ModelConfig) -> ModelConfig:
        """The config that one device's part of the model has."""
        experts = config.experts
        if experts is not None:
            experts = replace(
                experts,
                ffn_size=experts.ffn_size // self.parts("expert_ffn"),
                shared_size=experts.shared_size // self.parts("shared_ffn"),
            )
        return replace(
            config,
            num_heads=config.num_heads // self.parts("heads"),
            num_kv_heads=config.num_kv_heads // self.parts("kv_heads"),
            ffn_size=config.ffn_size // self.parts("ffn"),
            experts=experts,
        )

    def ranges(self, spec: TensorSpec, config: ModelConfig, place: Mapping[str, int]) -> list[list[Range]]:
        """For each axis of a tensor, the ranges that the device at a place of the mesh (by mesh axis) holds."""
        out = []
        for i, (n, logical) in enumerate(zip(spec.shape, spec.axes)):
            parts, axis = self.parts(logical), self.axis(logical)
            at = 0 if axis is None else place[axis]
            if parts == 1:
                out.append([(0, n)])
                continue
            ranges, start = [], 0
            for size in segments(spec.role, config) if i == 0 and n > 1 else (n,):
                ranges.append((start + at * (size // parts), size // parts))
                start += size
            out.append(ranges)
        return out


def segments(role: str, config: ModelConfig) -> tuple[int, ...]:
    """Rows of the tensors that were fused into a role's, outermost axis; most are of one."""
    c, name = config, role.rpartition(".")[0]
    if name == "attn_qkv":
        return (c.num_heads * c.head_dim, c.num_kv_heads * c.head_dim, c.num_kv_heads * c.value_dim)
    if role == "ffn_up.weight" and c.spec.fused_gate_up:
        return (c.ffn_size, c.ffn_size)
    sizes = {
        "vocab": c.vocab_size,
        "ffn": c.ffn_size,
        "heads": c.num_heads * (c.latent.key_dim if c.latent is not None else c.head_dim),
        "kv_heads": c.num_kv_heads * (c.head_dim if name == "attn_k" else c.value_dim),
    }
    if role in ("attn_k_b.weight", "attn_v_b.weight", "attn_sinks.weight"):
        return (c.num_heads,)
    if c.experts is not None:
        sizes |= {"experts": c.experts.count, "shared_ffn": c.experts.shared_size}
    return (sizes[AXES[role][0]],)


def partition_model(
    config: ModelConfig, specs: Iterable[TensorSpec], blocks: Mapping[str, int], mesh: MeshShape
) -> Partition:
    """Decides what is divided.

    Args:
        config: of the whole model.
        specs: its tensors.
        blocks: by tensor name, elements of a block of the tensor's packed type, along its last axis.
        mesh: to put it on.

    Raises:
        InvalidRequestError: experts that do not divide, or a mesh axis that divides nothing of the model.
    """
    if mesh.expert > 1:
        count = 0 if config.experts is None else config.experts.count
        if not count or count % mesh.expert:
            raise InvalidRequestError(
                f"mesh {mesh}: the model has {count} experts, which do not divide by {mesh.expert}; "
                "accepted: an expert axis that divides them"
            )
    divided: dict[str, str] = {"experts": "expert"} if mesh.expert > 1 else {}
    notes: list[str] = []
    specs = list(specs)
    present = {logical for spec in specs for logical in spec.axes}
    for what, logical in _GROUPS.items():
        axes = [axis for axis in logical if axis in present]
        if mesh.tensor == 1 or not axes:
            continue
        reason = _undivided(config, specs, blocks, axes, mesh.tensor)
        if reason is None:
            shared = ("kv_heads",) if config.latent is not None else ()  # one cached row serves all heads
            divided |= {axis: RULES[axis] for axis in logical if axis not in shared}
        else:
            notes.append(f"{what} is whole on each of {mesh.tensor} devices: {reason}")
    if mesh.tensor > 1 and not any(axis == "tensor" for axis in divided.values()):
        raise InvalidRequestError(
            f"mesh {mesh}: nothing of the model divides by {mesh.tensor} "
            f"({config.num_heads} heads, {config.num_kv_heads} key/value heads, feed-forward {config.ffn_size}, "
            f"vocabulary {config.vocab_size})"
        )
    if mesh.data > 1:
        divided |= {"rows": "data", "pages": "data"}
    return Partition(mesh, tuple(sorted(divided.items())), tuple(notes))


def auto_mesh(
    config: ModelConfig,
    specs: Iterable[TensorSpec],
    blocks: Mapping[str, int],
    devices: int,
    *,
    max_batch: int = DEFAULT_BATCH,
    all_of_them: bool = False,
) -> MeshShape:
    """The mesh that "auto" stands for: the one on which a device holds least of the model, of those the one with most
    devices. Its data axis divides max_batch. all_of_them: it has to have as many as there are devices, as in a job.

    Raises InvalidRequestError where there is none.
    """
    specs = list(specs)
    found: list[tuple[int, int, MeshShape]] = []
    for tensor in range(1, devices + 1):
        for data in range(1, devices // tensor + 1):
            mesh = MeshShape(tensor=tensor, data=data)
            if max_batch % data or (all_of_them and mesh.devices != devices):
                continue
            try:
                partition = partition_model(config, specs, blocks, mesh)
            except InvalidRequestError:  # it divides nothing
                continue
            found.append((sum(prod(partition.local_shape(spec)) for spec in specs), -mesh.devices, mesh))
    if not found:
        raise InvalidRequestError(
            f"mesh 'auto': {config.num_heads} heads, feed-forward {config.ffn_size}, vocabulary {config.vocab_size} "
            f"and a batch of {max_batch} divide over no mesh of {devices} devices"
        )
    return min(found, key=lambda one: one[:2])[2]


def _undivided(
    config: ModelConfig, specs: list[TensorSpec], blocks: Mapping[str, int], axes: list[str], parts: int
) -> str | None:
    """Why a group of logical axes does not divide into so many parts; None when it does."""
    if "heads" in axes or "qkv" in axes:
        heads, shared = config.num_heads, config.latent is not None
        if heads % parts or (config.num_kv_heads % parts and not shared):
            return f"{heads} heads and {config.num_kv_heads} key/value heads do not divide by {parts}"
        if config.spec.qk_norm == "full":
            return "its queries are normalised over all heads together"
    for spec in specs:
        for i, (n, logical) in enumerate(zip(spec.shape, spec.axes)):
            if logical not in axes:
                continue
            if any(size % parts for size in (segments(spec.role, config) if i == 0 else (n,))):
                return f"{spec.name} has {n} elements there, which do not divide by {parts}"
            block = blocks[spec.name] if spec.is_matrix and i == len(spec.shape) - 1 else 1
            if n // parts % block:
                return f"{spec.name} would have {n // parts} elements there, no whole blocks of {block}"
    return None


def tensor_blocks(tensors: Mapping[str, Any], specs: Iterable[TensorSpec]) -> dict[str, int]:
    """By name, elements of a block of each tensor's type; tensors: of a GGUFFile."""
    return {spec.name: tensors[spec.name].type.block_size for spec in specs}


WHOLE = Partition()
