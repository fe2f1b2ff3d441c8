"""What one step of the sharded program costs each device: bytes read, operations, collectives. No jax in here.

Counts follow the program (model.decoder under the shard_map of engine.programs): a device has `rows` tokens of its own
requests, and all counts are of one device. tests/test_planning_costs.py holds them to what XLA counts.
"""

import math
from dataclasses import dataclass

from realm_jax.model.config import ModelConfig
from realm_jax.model.partition import Partition
from realm_jax.model.rope import FINE_POSITIONS
from realm_jax.planning.outline import Outline

FLOAT_BYTES = 4  # activations, and what collectives carry, are float32
LOGITS = "logits"  # of these alone a step needs fewer than it has tokens


@dataclass(frozen=True)
class Collective:
    """One kind of collective of a step.

    count: a step has. devices: take part in each. apart: from one of them to the next, in devices. token_bytes: that
    each adds up or gathers, for each token of a device's own. moved: bytes that each device sends for each token, in
    all of them, around a ring.
    """

    operation: str
    what: str
    axes: tuple[str, ...]
    count: int
    devices: int
    apart: int
    token_bytes: int
    moved: float

    @property
    def steps(self) -> int:
        """Around the ring, of one of them."""
        return (2 if self.operation == "all-reduce" else 1) * (self.devices - 1)


def weight_bytes(outline: Outline, partition: Partition) -> tuple[int, int]:
    """Of one device: bytes of tensors that are divided, and of what every device has, tables of rotation included."""
    c = outline.config
    divided = replicated = 0
    for spec in outline.specs:
        if spec.role.startswith("rope_"):
            continue  # they go into the tables
        size = outline.local_bytes(spec, partition)
        if any(partition.axes(spec.role)):
            divided += size
        else:
            replicated += size
    positions = -(-c.context_length // FINE_POSITIONS) + FINE_POSITIONS
    return divided, replicated + (len(c.ropes) + 1) * positions * c.ropes[0].dim * FLOAT_BYTES


def cache_token_bytes(config: ModelConfig, partition: Partition, itemsize: int) -> int:
    """That one token adds to the cache of a device that has its request."""
    return partition.local_config(config).cache_values_per_token * itemsize


def weights_read(outline: Outline, partition: Partition, rows: int) -> float:
    """Bytes of weights that a step of `rows` tokens reads: all but the embedding's, and the experts that are hit.

    Tokens are taken to choose experts evenly and on their own.
    """
    e = outline.config.experts
    hit = 1.0 if e is None else 1.0 - (1.0 - e.used / e.count) ** rows
    total = 0.0
    for spec in outline.specs:
        size = outline.local_bytes(spec, partition)
        if spec.role == _head(outline) or spec.role != "token_embd.weight":
            total += size * (hit if spec.is_matrix and spec.axes[0] == "experts" else 1.0)
    return total


def cache_read(outline: Outline, partition: Partition, context: int, itemsize: int) -> int:
    """Bytes that attention reads for one token at the end of so many."""
    c = outline.config
    values = partition.local_config(c).cache_values_per_token // c.num_layers  # of a layer
    return sum(_seen(window, context) for window in c.layer_window) * values * itemsize


def operations(outline: Outline, partition: Partition, rows: int, drawn: int, context: float) -> float:
    """Multiplications and additions of a step of `rows` tokens.

    drawn: rows that go through the output head. context: positions that a token attends over, on average. A device
    computes every chosen expert of a token, as the program does: with rows of another's experts it multiplies its own.
    """
    c = outline.config
    local = partition.local_config(c)
    total = 0.0
    for spec in outline.specs:
        if not spec.is_matrix:
            continue
        size = math.prod(partition.local_shape(spec))
        if spec.role == _head(outline):
            total += 2 * size * drawn
        elif spec.axes[0] == "experts":
            assert c.experts is not None
            total += 2 * size // partition.local_shape(spec)[0] * c.experts.used * rows
        elif spec.role != "token_embd.weight":
            total += 2 * size * rows
    value_dim = c.value_dim or (c.latent.rank if c.latent is not None else 0)
    positions = sum(min(context, window) if window else context for window in c.layer_window)
    return total + 2 * local.num_heads * (c.head_dim + value_dim) * positions * rows


def collectives(outline: Outline, partition: Partition) -> tuple[Collective, ...]:
    """All of a step, in the order of the program."""
    c, out = outline.config, []
    vocab, data = partition.axis("vocab"), partition.mesh.data
    everywhere = tuple(axis for axis, size in partition.mesh.sizes.items() if size > 1)
    if everywhere:  # int32: the tokens of all slots, of which only the first device knows
        out.append(_collective("all-reduce", "last tokens", everywhere, 1, data, partition))
    if vocab is not None:
        out.append(_collective("all-reduce", "embedding", (vocab,), 1, c.hidden_size, partition))
    roles: dict[str, int] = {}
    for spec in outline.specs:
        if spec.layer is not None:
            roles[spec.role] = roles.get(spec.role, 0) + 1
    for role, what in _REDUCED.items():
        axes = [axis for axis in (partition.axis("experts"),) if role == "ffn_down_exps.weight" and axis is not None]
        axes += [axis for axis in (partition.reduced(role.removesuffix(".weight")),) if axis is not None]
        if axes and roles.get(role):
            out.append(_collective("all-reduce", what, tuple(axes), roles[role], c.hidden_size, partition))
    if vocab is not None:
        out.append(_collective("all-gather", LOGITS, (vocab,), 1, c.vocab_size, partition))
    rows = partition.axis("rows")
    if rows is not None:
        out.append(_collective("all-gather", LOGITS, (rows,), 1, c.vocab_size * data, partition))
    return tuple(out)


def activations(outline: Outline, partition: Partition, rows: int, drawn: int) -> int:
    """An estimate of the bytes a step needs besides weights and cache: what a layer computes, and logits."""
    c = outline.config
    local = partition.local_config(c)
    attention = local.num_heads * (c.head_dim + (c.value_dim or c.head_dim))
    attention += local.num_kv_heads * (c.head_dim + c.value_dim)
    widths = [3 * local.ffn_size]
    if local.experts is not None:
        widths.append(local.experts.used * (3 * local.experts.ffn_size + 2 * c.hidden_size))
    # Residual stream, its norm, what a block adds to it.
    layer = 3 * c.hidden_size + max(attention, *widths)
    # Logits of this device's part of the vocabulary, and of all of it.
    return FLOAT_BYTES * (rows * layer + drawn * (c.vocab_size + c.vocab_size // partition.parts("vocab")))


_REDUCED = {
    "attn_output.weight": "attention",
    "ffn_down.weight": "feed-forward",
    "ffn_down_exps.weight": "experts",
    "ffn_down_shexp.weight": "shared expert",
}


def _collective(
    operation: str, what: str, axes: tuple[str, ...], count: int, width: int, partition: Partition
) -> Collective:
    """Over some of a mesh's axes, of `width` numbers a token."""
    sizes = partition.mesh.sizes
    devices = math.prod(sizes[axis] for axis in axes)
    order = list(sizes)  # outermost first
    inner = order[max(order.index(axis) for axis in axes) + 1 :]
    ring = (2 if operation == "all-reduce" else 1) * (devices - 1) / devices
    token_bytes = width * FLOAT_BYTES
    return Collective(
        operation,
        what,
        axes,
        count,
        devices,
        math.prod(sizes[axis] for axis in inner),
        token_bytes,
        ring * token_bytes * count,
    )


def _head(outline: Outline) -> str:
    """The role of the matrix that gives logits."""
    untied = any(spec.role == "output.weight" for spec in outline.specs)
    return "output.weight" if untied else "token_embd.weight"


def _seen(window: int, context: int) -> int:
    return min(window, context) if window else context
