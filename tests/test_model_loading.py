"""Loading: logical axes of every tensor, bytes held, and the peak of the process."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import tiny_models

from realm_jax.gguf import open_gguf
from realm_jax.model import check_model, load_model

LOAD = """
import json, sys
import jax
from realm_jax.model import load_model
model = load_model(sys.argv[1])
# Not getrusage: its ru_maxrss counts what the process that started this one held.
with open("/proc/self/status") as status:
    peak = next(int(line.split()[1]) * 1024 for line in status if line.startswith("VmHWM:"))
print(json.dumps({"live": sum(a.nbytes for a in jax.live_arrays()), "peak": peak}))
"""


@pytest.mark.parametrize("case", [c for c in tiny_models.CASES if c != "deepseek2-legacy"])
def test_every_tensor_has_logical_axes(case: str, tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    tiny_models.write_tiny_model(case, path)
    with open_gguf(path) as file:
        _, specs = check_model(file)
    assert specs
    for spec in specs:
        assert len(spec.axes) == len(spec.shape), spec.name


def test_progress_counts_the_tensors_bytes(tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    tiny_models.write_tiny_model("llama", path)
    seen: list[tuple[int, int]] = []
    load_model(path, progress=lambda what, done, total: seen.append((done, total)))
    with open_gguf(path) as file:
        total = sum(tensor.nbytes for tensor in file.tensors.values())
    assert [done for done, _ in seen] == sorted({done for done, _ in seen})
    assert seen[-1] == (total, total)


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads the peak from Linux's /proc")
def test_weights_stay_packed_and_the_peak_is_about_the_file(smollm2_path: Path) -> None:
    out = subprocess.run([sys.executable, "-c", LOAD, str(smollm2_path)], capture_output=True, text=True, check=True)
    measured = json.loads(out.stdout)
    with open_gguf(smollm2_path) as file:
        tensors = sum(tensor.nbytes for tensor in file.tensors.values())
    assert measured["live"] <= 1.25 * tensors
    assert measured["peak"] <= smollm2_path.stat().st_size + 500 * 2**20
