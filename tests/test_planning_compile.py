"""Compiling the sharded decode step for devices that are not here, from shapes."""

import dataclasses
import importlib.util
import json
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
import tiny_models

from realm_jax.cli.app import run
from realm_jax.errors import BackendError
from realm_jax.model import load_model
from realm_jax.model.partition import WHOLE
from realm_jax.planning import SHAPES, Outline, Topology, plan, read_outline, render
from realm_jax.planning.compiling import abstract_model, compile_plan
from realm_jax.planning.outline import metadata_outline
from realm_jax.planning.plan import Compiled

NO_LIBTPU = importlib.util.find_spec("libtpu") is None

# 2048 wide, 32 heads of 128: it divides by eight, and a cached row fills the lanes of a TPU.
WIDE = SHAPES["llama-1b"] | {
    "llama.block_count": 4,
    "llama.attention.key_length": 128,
    "llama.attention.value_length": 128,
}


@pytest.mark.parametrize("case", ["llama", "llama-tied", "llama-moe", "llama-Q4_K_M", "gpt-oss", "deepseek2"])
def test_an_abstract_model_is_the_loaded_one(case: str, tmp_path: Path) -> None:
    """The same tree, shapes, dtypes and structure of layers, without the weights."""
    path = tmp_path / "model.gguf"
    tiny_models.write_tiny_model(case, path)
    model = load_model(path, backend="xla")
    abstract = abstract_model(read_outline(path), WHOLE, None, "xla")
    assert (abstract.config, abstract.plan) == (model.config, model.plan)
    seen = [jax.tree.map(lambda a: (a.shape, np.dtype(a.dtype)), one.params) for one in (abstract, model)]
    assert jax.tree.structure(abstract.params) == jax.tree.structure(model.params)
    assert seen[0] == seen[1]


def compiled(outline: Outline, topology: str, mesh: str | None = None, batch: int = 8) -> Compiled:
    devices = Topology.parse(topology)
    return compile_plan(plan(outline, devices, mesh, batch=batch), outline, devices)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize(
    ("topology", "mesh", "backend", "gathers"),
    [("h100:8", "tensor=4,data=2", "gpu", 2), ("cpu:8", "tensor=8", "xla", 1)],
)
def test_lowers_for_what_cannot_be_compiled_here(topology: str, mesh: str, backend: str, gathers: int) -> None:
    """Seven matmuls and the head, attention, and two sums in the loop over layers."""
    out = compiled(metadata_outline("wide", WIDE, "Q4_K", 512), topology, mesh)
    assert (out.backend, out.argument_bytes) == (backend, None)
    assert out.kernels.get("quant_matmul", 0) == (8 if backend == "gpu" else 0)
    # The tokens of the step before and the embedding, then two a layer.
    assert out.collectives == {"all_gather": gathers, "all_reduce": 2 + 2}


@pytest.mark.skipif(not NO_LIBTPU, reason="libtpu is installed")
def test_what_is_missing_is_said(capfd: pytest.CaptureFixture[str]) -> None:
    assert run(["plan", "llama-8b", "--topology", "v5e:2x2", "--compile"]) == 2
    out, err = capfd.readouterr()
    assert (out, err) == (
        "",
        "error: compiling for v5e:2x2 needs libtpu, which is not installed; pip install libtpu\n",
    )


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_the_command_shows_it(capfd: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    path = tmp_path / "model.json"
    path.write_text(json.dumps(WIDE))
    command = ["plan", f"{path}:Q8_0", "--topology", "h100:2", "--context", "256", "--compile"]
    assert run([*command, "--json"]) == 0
    shown = json.loads(capfd.readouterr().out)
    assert shown["compiled"]["collectives"] == {"all_gather": 1, "all_reduce": 4}
    planned = plan(f"{path}:Q8_0", "h100:2", context=256)
    text = render(dataclasses.replace(planned, compiled=Compiled(**shown["compiled"])))
    assert "The decode step of 8 requests, lowered for NVIDIA H100" in text
    assert "4 all_reduce" in text


@pytest.mark.slow
@pytest.mark.skipif(NO_LIBTPU, reason="needs libtpu")
@pytest.mark.parametrize(
    ("metadata", "type", "topology", "mesh"),
    [
        (WIDE, "Q4_K", "v5e:2x2", "tensor=4"),
        (WIDE, "Q8_0", "v5e:2x4", "tensor=4,data=2"),
        (SHAPES["llama-8b"], "Q4_K", "v5e:2x2", "tensor=4"),
        (SHAPES["llama-70b"], "Q4_K", "v5e:2x4", "tensor=8"),
    ],
)
def test_compiles_for_tpus(metadata: dict[str, Any], type: str, topology: str, mesh: str) -> None:
    """The arguments are the weights and the cache that the plan says; what is temporary is no second copy of them."""
    outline = metadata_outline("model", metadata, type, 1024)
    planned = plan(outline, topology, mesh)
    out = compiled(outline, topology, mesh)
    memory = planned.memory
    print(f"{topology} {mesh}: {out}, planned {memory}")
    assert out.backend == "tpu"
    assert out.kernels["quant_matmul"] == 8
    assert out.argument_bytes is not None
    assert out.temporary_bytes is not None
    expected = memory.weights_divided + memory.weights_replicated + memory.cache
    assert out.argument_bytes == pytest.approx(expected, rel=0.05)
    assert out.aliased_bytes == memory.cache
    assert out.temporary_bytes < 0.6 * expected
    assert out.argument_bytes + out.temporary_bytes < memory.usable


@pytest.mark.slow
@pytest.mark.skipif(NO_LIBTPU, reason="needs libtpu")
def test_what_does_not_fit_a_tpu_is_said(capfd: pytest.CaptureFixture[str]) -> None:
    assert not plan("llama-70b:Q8_0", "v5e:2x2", context=1024).memory.fits
    assert run(["plan", "llama-70b:Q8_0", "--topology", "v5e:2x2", "--context", "1024", "--compile"]) == 2
    error = capfd.readouterr().err.splitlines()[-1]
    assert error.startswith("error: v5e:2x2 has not the memory for it: RESOURCE_EXHAUSTED")
    assert "exceeds available HBM (15.75G)" in error


@pytest.mark.slow
@pytest.mark.skipif(NO_LIBTPU, reason="needs libtpu")
def test_a_shape_that_no_slice_has_is_refused() -> None:
    with pytest.raises(BackendError, match="libtpu has no topology v5e:3x3"):
        compiled(metadata_outline("wide", WIDE, "Q4_K", 512), "v5e:3x3", "data=9")
