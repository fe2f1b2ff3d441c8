"""Four processes restore one checkpoint: each reads its part, and all together the whole about once."""

import json
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import tiny_models

from realm_jax.checkpoint import convert

RANK = """
import json, sys
import jax
path, address, rank = sys.argv[1], sys.argv[2], int(sys.argv[3])
jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_cpu_collectives_implementation", "gloo")
jax.distributed.initialize(address, 4, rank)
import numpy as np
import tensorstore
from realm_jax.checkpoint import open_model
from realm_jax.model import load_model
from realm_jax.sharding.mesh import MeshShape

def load(name):
    with open_model(f"{path}/{name}") as file:
        return load_model(file, 64, backend=sys.argv[4], mesh=MeshShape(tensor=4))

restored = load("model")
[metric] = tensorstore.experimental_collect_matching_metrics("/tensorstore/kvstore/file/bytes_read")
expected = load("model.gguf")
same = all(
    np.array_equal(np.asarray(a.addressable_data(0)), np.asarray(b.addressable_data(0)))
    for a, b in zip(jax.tree.leaves(restored), jax.tree.leaves(expected), strict=True)
)
print(json.dumps({"read": metric["values"][0]["value"], "same": same}), flush=True)
"""


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["xla", "native"])
def test_four_processes_read_it_once(backend: str, tmp_path: Path) -> None:
    spec = tiny_models._llama(layers=2, width=1024, heads=16, kv_heads=8, hidden=2816)
    tiny_models.write_spec(spec, tmp_path / "model.gguf", label="processes", type_of=lambda _: "Q8_0")
    size = convert(tmp_path / "model.gguf", tmp_path / "model").size
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = f"127.0.0.1:{server.getsockname()[1]}"
    command = [sys.executable, "-c", RANK, str(tmp_path), address]
    ranks = [subprocess.Popen([*command, str(i), backend], stdout=subprocess.PIPE, text=True) for i in range(4)]
    try:
        found = [json.loads(rank.communicate(timeout=240)[0].splitlines()[-1]) for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
    assert [one["same"] for one in found] == [True] * 4
    assert size <= sum(one["read"] for one in found) <= 1.3 * size
