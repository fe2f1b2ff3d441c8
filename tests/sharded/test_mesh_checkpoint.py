"""A checkpoint on a mesh: every device gets the bytes that it gets of the GGUF file, and restores no others."""

import jax
import numpy as np
import pytest
import tensorstore
import tiny_models

from realm_jax.checkpoint import convert, open_model
from realm_jax.errors import CheckpointError, InvalidRequestError
from realm_jax.model import load_model
from realm_jax.model.backend import resolve_backend
from realm_jax.sharding.mesh import MeshShape

NATIVE = pytest.mark.skipif(resolve_backend("auto") != "native", reason="the native kernels are not built")


def load(path, mesh, backend):
    with open_model(path) as file:
        return load_model(file, 64, backend=backend, mesh=MeshShape.parse(mesh))


def write(case, path):
    if case == "wide":
        spec = tiny_models._llama(layers=2, width=256, heads=8, kv_heads=4, hidden=512)
        tiny_models.write_spec(spec, path, label=case, type_of=lambda name: "Q8_0")
    else:
        tiny_models.write_tiny_model(case, path, weight_type="Q8_0")


@pytest.mark.parametrize(
    ("case", "mesh", "backend"),
    [
        ("wide", "tensor=4,data=2", "xla"),
        pytest.param("wide", "tensor=4", "native", marks=NATIVE),
        ("phi3-longrope-long", "tensor=2", "xla"),  # fused projections: two or three ranges of each
        pytest.param("phi3-longrope-long", "tensor=2", "native", marks=NATIVE),
        ("gpt-oss-MXFP4", "expert=2", "xla"),
        ("qwen3moe", "expert=2,tensor=2", "xla"),
    ],
)
def test_devices_hold_what_they_hold_of_the_file(case, mesh, backend, tmp_path):
    write(case, tmp_path / "model.gguf")
    convert(tmp_path / "model.gguf", tmp_path / "model")
    expected, found = load(tmp_path / "model.gguf", mesh, backend), load(tmp_path / "model", mesh, backend)
    assert jax.tree.structure(expected) == jax.tree.structure(found)
    for (name, a), b in zip(jax.tree_util.tree_leaves_with_path(expected), jax.tree.leaves(found)):
        assert a.sharding.is_equivalent_to(b.sharding, a.ndim), name
        for mine, theirs in zip(a.addressable_shards, b.addressable_shards):
            assert np.asarray(mine.data).tobytes() == np.asarray(theirs.data).tobytes(), name


def test_a_mesh_that_does_not_divide_the_parts(tmp_path):
    spec = tiny_models._llama(layers=1, width=160, heads=5, kv_heads=5, hidden=320)
    tiny_models.write_spec(spec, tmp_path / "model.gguf", label="five", type_of=lambda name: "Q8_0")
    convert(tmp_path / "model.gguf", tmp_path / "model")
    load(tmp_path / "model.gguf", "tensor=5", "xla")
    with pytest.raises(InvalidRequestError, match=r"mesh tensor=5: .* is cut into \d+ parts, which do not divide by 5"):
        load(tmp_path / "model", "tensor=5", "xla")


def test_damage_in_one_devices_part_is_found(tmp_path):
    write("wide", tmp_path / "model.gguf")
    convert(tmp_path / "model.gguf", tmp_path / "model")
    data = max((tmp_path / "model" / "weights" / "ffn_up.weight-Q8_0").glob("**/d/*"), key=lambda p: p.stat().st_size)
    raw = bytearray(data.read_bytes())
    for at in range(500, len(raw), 4096):
        raw[at] ^= 64
    data.write_bytes(raw)
    with pytest.raises(CheckpointError, match="ffn_up"):
        load(tmp_path / "model", "tensor=4", "xla")


def test_nothing_is_read_twice(tmp_path):
    write("wide", tmp_path / "model.gguf")
    convert(tmp_path / "model.gguf", tmp_path / "model")
    before = bytes_read()
    load(tmp_path / "model", "tensor=4,data=2", "xla")
    read = bytes_read() - before
    with open_model(tmp_path / "model") as file:
        assert read <= 1.1 * file.nbytes


def bytes_read():
    [metric] = tensorstore.experimental_collect_matching_metrics("/tensorstore/kvstore/file/bytes_read")
    return metric["values"][0]["value"]
