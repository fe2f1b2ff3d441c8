"""Whole models on the Pallas kernels: interpreted on this machine, and as exported for the devices they are for."""

import re
from collections import Counter
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
import tiny_models
from jax.sharding import AbstractDevice, AbstractMesh
from test_quant_matmul import nmse

from realm_jax.cache import allocate_pages
from realm_jax.engine.programs import run_batch
from realm_jax.engine.runner import Runner
from realm_jax.model import load_model

TRITON = "__gpu$xla.gpu.triton"
SLOW = pytest.mark.slow
LAYERS = 3  # of the period of llama-Q4_K_M's layers, two with one mix of types and one with another


def loaded(case: str, folder: Path, backend: str) -> Any:
    path = folder / f"{case}.gguf"
    tiny_models.write_tiny_model(case, path, weight_type="Q8_0")
    return load_model(path, backend=backend)


@pytest.mark.parametrize(
    ("case", "precision", "limit"),
    [
        ("llama-moe", "float32", 1e-5),  # what remains is the float16 of the cache
        *(pytest.param(c, "float32", 1e-5, marks=SLOW) for c in ("llama-Q4_K_M", "gemma2", "gpt-oss", "deepseek2")),
        *(pytest.param(c, "bfloat16", 1e-3, marks=SLOW) for c in ("llama-Q4_K_M", "llama-moe", "gemma2")),
    ],
)
def test_a_model_runs_on_the_interpreted_kernels(case: str, precision: str, limit: float, tmp_path: Path) -> None:
    """A prompt, then a token: the logits are XLA's."""
    ids, out = np.random.default_rng(0).integers(0, 250, 11).astype(np.int32), {}
    for backend in ("xla", "interpret"):
        runner = Runner(loaded(case, tmp_path, backend), max_batch=1)
        table = np.arange(runner.max_pages_per_slot)
        with jax.default_matmul_precision(precision):
            prompt = runner.step_all(ids[:10], 0, table)
            out[backend] = np.concatenate([prompt, np.asarray(runner.step([ids[10:]], [10], table[None]))[:1]])
    assert nmse(out["interpret"], out["xla"]) <= limit


def exported(model: Any, backend: str, platform: str, card: str, rows: int, size: int) -> tuple[str, int]:
    """The program that runs ``size`` tokens of each of ``rows`` sequences, for a device; the size of its pool."""
    runner, c = Runner(model, max_batch=rows), model.config
    dtype = "bfloat16" if backend == "tpu" else "float16"
    pool = jax.eval_shape(
        lambda: allocate_pages(c.num_layers, runner.num_pages, c.num_kv_heads, c.head_dim, c.value_dim, np.dtype(dtype))
    )
    shapes = [(rows, size), (rows, size), (rows, runner.max_pages_per_slot), (rows,), (), (rows,), (rows + 1,)]
    numbers = [jax.ShapeDtypeStruct(shape, np.int32) for shape in shapes]
    run = partial(run_batch, config=c, plan=model.plan, backend=backend, wanted="last")
    device = AbstractDevice(device_kind=card, num_cores=None, platform="tpu" if platform == "tpu" else "gpu")
    device_of = AbstractMesh((1,), ("x",), abstract_device=device)
    with jax.sharding.use_abstract_mesh(device_of):
        allowed = [jax.export.DisabledSafetyCheck.custom_call(TRITON)]
        program = jax.export.export(jax.jit(run), platforms=[platform], disabled_checks=allowed)
        return program(model.params, pool, *numbers, None).mlir_module(), pool.keys.size


def largest_float(module: str, besides: int) -> int:
    """Elements of the largest float32 or bfloat16 array that a program makes, besides those with one number of them."""
    made = [line.rpartition("->")[2] for line in module.splitlines() if "func.func" not in line]
    found = {s for text in made for s in re.findall(r"tensor<((?:\d+x)+)(?:bf16|f32)>", text)}
    return max({int(np.prod([int(d) for d in shape.split("x")[:-1]])) for shape in found} - {besides})


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize(("rows", "backend"), [(1, "gpu"), (8, "gpu"), (1, "tpu")])
def test_a_decode_step_is_one_call_for_each_matmul(rows: int, backend: str, tmp_path: Path) -> None:
    """Exported: one kernel call for each quantized weight and each attention, and no dequantized weight."""
    model = loaded("llama-Q4_K_M", tmp_path, backend)
    if backend == "gpu":
        module, pool = exported(model, "gpu", "cuda", "NVIDIA H100 80GB HBM3", rows, 1)
        calls = Counter(re.findall(r'name = "(\w+)", num_stages', module))
        attention = {"paged_attention_split": LAYERS, "paged_attention_merge": LAYERS}
    else:
        module, pool = exported(model, "tpu", "tpu", "TPU v5 lite", rows, 1)
        calls = Counter(re.findall(r'kernel_name = "(\w+)"', module))
        attention = {"paged_attention": LAYERS}
    # q, k, v, output, gate, up, down of the layers of a period, which are the body of one loop; and the head.
    assert calls == {"quant_matmul": 7 * LAYERS + 1, **attention}
    assert module.count(f"@{TRITON}(") + module.count("@tpu_custom_call(") == calls.total()
    smallest = min(
        np.prod(stack.shape[-2:]) for stack in model.params.stacks.values() if stack.format in ("Q4_K", "Q6_K")
    )
    assert largest_float(module, besides=pool) < smallest
