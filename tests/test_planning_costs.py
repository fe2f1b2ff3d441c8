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
from jax.sharding import AbstractDevice, AbstractMesh

from pallas_kernels.quant_matmul import xla
from realm_jax.model import Model
from realm_jax.model.partition import WHOLE, Partition, partition_model
from realm_jax.model.plan import LayerPlan, Segment
from realm_jax.planning import SHAPES, Outline, costs
from realm_jax.planning.compiling import abstract_model, lower_decode
from realm_jax.planning.outline import metadata_outline
from realm_jax.quant import QuantizedTensor
from realm_jax.sharding.mesh import MESH_AXES, MeshShape

ROWS = 8  # of one token: XLA computes a lone row twice
CONTEXT = 128  # one block: attention loops over blocks
SMALL = SHAPES["llama-8b"] | {
    "llama.vocab_size": 1024,
    "llama.embedding_length": 1024,
    "llama.feed_forward_length": 3584,
    "llama.attention.head_count": 16,
}
REAL = [
    pytest.param(SHAPES[name], 8, 0.01, 0.01, id=name, marks=pytest.mark.slow) for name in ("llama-8b", "llama-70b")
]
REAL += [pytest.param(SHAPES["llama-405b"], 8, 0.01, 0.01, id="llama-405b", marks=pytest.mark.slow)]


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


@pytest.mark.parametrize(
    ("metadata", "tensor", "of_operations", "of_bytes"),
    [
        pytest.param(SMALL, 1, 0.02, 0.02, id="small-1"),
        pytest.param(SMALL, 4, 0.02, 0.04, id="small-4"),
        *REAL,
    ],
)
def test_a_layer_costs_what_xla_counts(
    metadata: dict[str, Any], tensor: int, of_operations: float, of_bytes: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Operations, and bytes that are read, of one device."""
    monkeypatch.setattr(xla, "TILE_BYTES", 1 << 50)  # one dot a matrix, and no loop over tiles of it
    counted, expected = [], []
    for layers in (1, 2):
        outline = shortened(metadata, layers)
        partition = parted(outline, tensor)
        model = unrolled(abstract_model(local(outline, partition), WHOLE, None, "xla"))
        cost = lower_decode(model, ROWS, "cpu").compile().cost_analysis()
        counted.append((cost["flops"], cost["bytes accessed"]))
        work = costs.operations(outline, partition, ROWS, ROWS, CONTEXT)
        read = costs.weights_read(outline, partition, ROWS)
        read += ROWS * costs.cache_read(outline, partition, CONTEXT, itemsize=4)
        expected.append((work, read))
    layer, wanted = ([b - a for a, b in zip(*pair)] for pair in (counted, expected))
    print(f"operations {wanted[0]:.4g}, XLA {layer[0]:.4g}; bytes {wanted[1]:.4g}, XLA {layer[1]:.4g}")
    assert layer[0] == pytest.approx(wanted[0], rel=of_operations)
    assert layer[1] == pytest.approx(wanted[1], rel=of_bytes)


def moved(text: str) -> list[tuple[str, int, int]]:
    """Of each collective of a lowered program: operation, devices, bytes of its result; integers left out."""
    found = []
    for operation, body in re.findall(r'"stablehlo\.(all_reduce|all_gather)"(.*?-> tensor<[^>]*>)', text, re.DOTALL):
        groups = re.search(r"replica_groups = dense<.*?> : tensor<\d+x(\d+)xi64>", body, re.DOTALL)
        shape = re.search(r"-> tensor<(?:([0-9x]*)x)?(\w+)>$", body)
        assert groups is not None
        assert shape is not None
        if shape[2] == "f32":
            found.append((operation, int(groups[1]), 4 * math.prod(map(int, shape[1].split("x")))))
    return found


@pytest.mark.parametrize(
    ("metadata", "mesh"),
    [
        pytest.param(SMALL, {"tensor": 4}, id="small"),
        pytest.param(SMALL, {"tensor": 4, "data": 2}, id="small, data"),
        pytest.param(SMALL, {"tensor": 16}, id="small, attention whole"),
        pytest.param(SHAPES["mixtral-8x7b"], {"tensor": 2, "expert": 4}, id="mixtral"),
        *(pytest.param(SHAPES[name], {"tensor": 8}, id=name) for name in ("llama-8b", "llama-70b", "llama-405b")),
    ],
)
def test_collectives_are_those_of_the_lowered_program(metadata: dict[str, Any], mesh: dict[str, int]) -> None:
    """Count, devices and bytes, exactly, at two depths."""
    shape = MeshShape(**mesh)
    device = AbstractDevice(device_kind="cpu", num_cores=None, platform="cpu")
    devices = AbstractMesh(tuple(shape.sizes.values()), MESH_AXES, abstract_device=device)
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
        found = moved(text)
        assert sorted(found) == sorted(expected)
        ring = {"all_reduce": 2, "all_gather": 1}
        sent = sum(ring[operation] * (n - 1) / n * size for operation, n, size in found)
        planned = sum(one.moved for one in costs.collectives(outline, partition) if one.what != "last tokens")
        assert sent == pytest.approx(rows * planned)
