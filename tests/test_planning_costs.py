"""The plan's counts against XLA's: of a float model at two depths, its layers unrolled, on shapes alone.

XLA counts the body of a loop once and nothing of a custom call: hence float weights, which its own dot multiplies, and
a plan of the layers in which none repeats. What one layer costs is what two cost more than one.
"""

import dataclasses
import math
import re
from typing import Any

import jax
import pytest

from pallas_kernels.quant_matmul import xla
from realm_jax.model import Model, decoder
from realm_jax.model.partition import WHOLE, Partition, partition_model
from realm_jax.model.plan import LayerPlan, Segment
from realm_jax.planning import SHAPES, Outline, costs
from realm_jax.planning.compiling import abstract_mesh, abstract_model, lower_decode
from realm_jax.planning.outline import metadata_outline
from realm_jax.quant import QuantizedTensor
from realm_jax.sharding.mesh import MeshShape

ROWS = 8  # of one token; never one row, which XLA computes twice
CONTEXT = 128  # one block, as attention loops over blocks
SMALL = SHAPES["llama-8b"] | {
    "llama.vocab_size": 1024,
    "llama.embedding_length": 1024,
    "llama.feed_forward_length": 3584,
    "llama.attention.head_count": 16,
}
REAL = [
    pytest.param(SHAPES[name], 8, id=name, marks=pytest.mark.slow) for name in ("llama-8b", "llama-70b", "llama-405b")
]


def shortened(metadata: dict[str, Any], layers: int) -> Outline:
    return metadata_outline("shape", metadata | {"llama.block_count": layers}, "F32", CONTEXT)


def unrolled(model: Model) -> Model:
    """The same with a stack for each layer's matrix, and no two layers in one loop."""
    layers, stacks = [], {}
    for row in model.plan.layers:
        places = []
        for role, stack, index in row:
            if stack not in model.params.stacks:
                places.append((role, stack, index))
                continue
            name = f"{stack}@{index}"
            weight = model.params.stacks[stack]
            arrays = {
                key: jax.ShapeDtypeStruct((1, *a.shape[1:]), a.dtype, sharding=a.sharding)
                for key, a in weight.arrays.items()
            }
            stacks[name] = QuantizedTensor(arrays=arrays, format=weight.format)
            places.append((role, name, 0))
        layers.append(tuple(places))
    plan = LayerPlan(segments=tuple(Segment(i, 1, 1) for i in range(len(layers))), layers=tuple(layers))
    return model.replace(params=model.params.replace(stacks=stacks), plan=plan)


def local(outline: Outline, partition: Partition) -> Outline:
    """One device's part, as a model of its own."""
    specs = tuple(dataclasses.replace(spec, shape=partition.local_shape(spec)) for spec in outline.specs)
    return Outline(outline.name, partition.local_config(outline.config), specs, outline.types)


def parted(outline: Outline, tensor: int) -> Partition:
    return partition_model(outline.config, outline.specs, outline.blocks, MeshShape(tensor=tensor))


def counted(outline: Outline, partition: Partition, rows: int, attends: bool) -> tuple[float, float]:
    """Operations and bytes of one device's step as XLA counts them, with attention or with none in its place."""
    model = unrolled(abstract_model(local(outline, partition), WHOLE, None, "xla"))
    if attends:
        lowered = lower_decode(model, rows, "cpu")
    else:

        def nothing(q: jax.Array, k: jax.Array, v: jax.Array, pool: Any, **_: Any) -> tuple[jax.Array, Any]:
            # Of keys and values as little as makes XLA compute them.
            return q + (k.sum() + v.sum()), pool

        def step(params: Any, ids: jax.Array) -> jax.Array:
            def one(tokens: jax.Array, positions: jax.Array) -> jax.Array:
                run = (params, model.config, model.plan, tokens, positions, (), nothing)
                return decoder.run_layers(*run, backend="xla")[0]

            return decoder.logits(params, model.config, jax.vmap(one)(ids, ids), backend="xla")

        lowered = jax.jit(step).lower(model.params, jax.ShapeDtypeStruct((rows, 1), "int32"))
    cost = lowered.compile().cost_analysis()
    return cost["flops"], cost["bytes accessed"]


def of_a_layer(counts: list[tuple[float, float]]) -> tuple[float, float]:
    """Of two layers less that of one."""
    (a, b), (c, d) = counts
    return c - a, d - b


@pytest.fixture
def one_dot_a_matrix(monkeypatch: pytest.MonkeyPatch) -> None:
    """And no loop over tiles of it."""
    monkeypatch.setattr(xla, "TILE_BYTES", 1 << 50)


@pytest.mark.usefixtures("one_dot_a_matrix")
@pytest.mark.parametrize(("metadata", "tensor"), [pytest.param(SMALL, 4, id="small"), *REAL])
def test_a_layer_costs_what_xla_counts(metadata: dict[str, Any], tensor: int) -> None:
    """Operations of its matrices, and bytes that are read of them, on one device."""
    seen, planned = [], []
    for layers in (1, 2):
        outline = shortened(metadata, layers)
        partition = parted(outline, tensor)
        seen.append(counted(outline, partition, rows=2, attends=False))
        work = costs.operations(outline, partition, rows=2, drawn=2, context=0)
        planned.append((work, costs.weights_read(outline, partition, rows=2)))
    (work, read), (flops, size) = of_a_layer(planned), of_a_layer(seen)
    print(f"of a layer: {flops:.5g} operations, planned {work:.5g}; {size:.5g} bytes, planned {read:.5g}")
    close = 0.03 if metadata is SMALL else 0.01  # what is not a matrix weighs less in a large model
    assert flops == pytest.approx(work, rel=close)
    assert size == pytest.approx(read, rel=close)


@pytest.mark.slow
@pytest.mark.usefixtures("one_dot_a_matrix")
@pytest.mark.parametrize(("metadata", "tensor"), [pytest.param(SMALL, 4, id="small"), *REAL])
def test_a_layer_with_attention_costs_what_xla_counts(metadata: dict[str, Any], tensor: int) -> None:
    """Bytes are those of the weights and so much for each row, of which XLA's attention copies what it reads."""
    seen: dict[int, tuple[float, float]] = {}
    for rows in (2, ROWS):
        outlines = [shortened(metadata, layers) for layers in (1, 2)]
        partition = parted(outlines[0], tensor)
        seen[rows] = of_a_layer([counted(outline, partition, rows, attends=True) for outline in outlines])
        work = of_a_layer([(costs.operations(o, partition, rows, rows, CONTEXT), 0.0) for o in outlines])[0]
        print(f"{rows} rows: {seen[rows][0]:.5g} operations, planned {work:.5g}")
        assert seen[rows][0] == pytest.approx(work, rel=0.03 if metadata is SMALL else 0.005)
    one, two = outlines
    row = (seen[ROWS][1] - seen[2][1]) / (ROWS - 2)
    whole = seen[2][1] - 2 * row
    weights = costs.weights_read(two, partition, 1) - costs.weights_read(one, partition, 1)
    cache = costs.cache_read(two, partition, CONTEXT, 4) - costs.cache_read(one, partition, CONTEXT, 4)
    print(f"whatever the rows {whole:.5g} bytes, planned {weights:.5g}; a row {row:.5g}, planned {cache:.5g}")
    assert whole == pytest.approx(weights, rel=0.005)
    assert row >= cache


def moved(text: str, mesh: MeshShape) -> list[tuple[str, int, int]]:
    """Of each collective of a lowered program: operation, devices, bytes of its result; integers left out."""
    found = []
    for operation, body in re.findall(r'"stablehlo\.(all_reduce|all_gather)"(.*?-> tensor<[^>]*>)', text, re.DOTALL):
        groups = re.search(r"replica_groups = dense<.*?> : tensor<\d+x(\d+)xi64>", body, re.DOTALL)
        axes = re.findall(r'axis_ref<name = "(\w+)">', body)  # from jax 0.12 on
        devices = int(groups[1]) if groups is not None else math.prod(mesh.sizes[axis] for axis in axes)
        shape = re.search(r"-> tensor<(?:([0-9x]*)x)?(\w+)>$", body)
        assert shape is not None
        if shape[2] == "f32":
            found.append((operation, devices, 4 * math.prod(map(int, shape[1].split("x")))))
    return found


@pytest.mark.parametrize(
    ("metadata", "mesh"),
    [
        pytest.param(SMALL, {"tensor": 4}, id="small"),
        pytest.param(SMALL, {"tensor": 4, "data": 2}, id="small, data"),
        pytest.param(SMALL, {"tensor": 16}, id="small, attention whole"),
        pytest.param(SHAPES["mixtral-8x7b"], {"tensor": 2, "expert": 4}, id="mixtral"),
        pytest.param(SHAPES["llama-8b"], {"tensor": 8}, id="llama-8b"),
        pytest.param(SHAPES["llama-70b"], {"tensor": 8}, id="llama-70b", marks=pytest.mark.slow),
        pytest.param(SHAPES["llama-405b"], {"tensor": 8}, id="llama-405b", marks=pytest.mark.slow),
    ],
)
def test_collectives_are_those_of_the_lowered_program(metadata: dict[str, Any], mesh: dict[str, int]) -> None:
    """Count, devices and bytes, exactly, at two depths."""
    shape = MeshShape(**mesh)
    devices = abstract_mesh(shape, "cpu", "cpu")
    for layers in (1, 2):
        outline = shortened(metadata, layers)
        partition = partition_model(outline.config, outline.specs, outline.blocks, shape)
        text = lower_decode(unrolled(abstract_model(outline, partition, devices, "xla")), ROWS, "cpu").as_text()
        rows = ROWS // shape.data
        expected = [
            (one.operation.replace("-", "_"), one.devices, one.token_bytes * rows)
            for one in costs.collectives(outline, partition)
            if one.what != "last tokens"
            for _ in range(one.count)
        ]
        found = moved(text, shape)
        assert sorted(found) == sorted(expected)
        ring = {"all_reduce": 2, "all_gather": 1}
        sent = sum(ring[operation] * (n - 1) / n * size for operation, n, size in found)
        planned = sum(one.moved for one in costs.collectives(outline, partition) if one.what != "last tokens")
        assert sent == pytest.approx(rows * planned)
