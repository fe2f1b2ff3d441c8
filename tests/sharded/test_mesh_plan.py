"""What `realm plan` says each device holds is what it holds when the model is loaded."""

import jax
import pytest
import tiny_models

from realm_jax.engine.runner import Runner, page_bytes
from realm_jax.model import load_model
from realm_jax.planning import plan, read_outline
from realm_jax.planning.plan import CACHE_ITEMSIZE
from realm_jax.sharding.mesh import MeshShape


@pytest.mark.parametrize(
    ("case", "mesh"),
    [
        ("llama", "tensor=2"),
        ("llama", "tensor=2,data=4"),
        ("llama", "tensor=4"),
        ("llama-Q8_0", "tensor=2"),
        ("llama-rope-freqs", "tensor=2"),
        ("qwen3moe", "expert=2,tensor=2"),
        ("gpt-oss", "tensor=2"),
        ("deepseek2", "tensor=2"),
        ("phi3", "tensor=2"),
    ],
)
def test_bytes_of_each_device(case, mesh, tmp_path):
    path = tmp_path / "model.gguf"
    tiny_models.write_tiny_model(case, path)
    shape = MeshShape.parse(mesh)
    model = load_model(path, backend="xla", mesh=shape)
    outline = read_outline(path)
    planned = plan(outline, "h100:8", shape, batch=4).memory
    held = dict.fromkeys(model.mesh.devices.flat, 0)
    for array in jax.tree.leaves(model.params):
        for shard in array.addressable_shards:
            held[shard.device] += shard.data.nbytes
    assert set(held.values()) == {planned.weights_divided + planned.weights_replicated}
    runner = Runner(model, max_batch=4, cache_bytes=1 << 30)
    cache = runner.num_pages // shape.data * page_bytes(model)
    assert cache * CACHE_ITEMSIZE == planned.cache * 4  # the XLA backend's rows are float32
