"""A decode step with adapters as exported for the devices the Pallas kernels are for."""

import re
from collections import Counter
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_models
from adapted_forward import run
from jax.sharding import AbstractDevice, AbstractMesh
from random_adapters import random_adapter

from realm_jax.lora import AdapterStore, weight_shapes
from realm_jax.lora import stacks as stacks_module
from realm_jax.model import load_model

TRITON = "__gpu$xla.gpu.triton"


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize(
    ("backend", "platform", "card"), [("gpu", "cuda", "NVIDIA H100 80GB HBM3"), ("tpu", "tpu", "TPU v5 lite")]
)
def test_adapters_lower_to_the_kernels(backend: str, platform: str, card: str, tmp_path: Path, monkeypatch) -> None:
    """On the embedding, the head, and once for each group of linear layers that share their input."""
    tiny_models.write_tiny_model("llama", tmp_path / "model.gguf", weight_type="Q8_0")
    model = load_model(tmp_path / "model.gguf", backend=backend)
    monkeypatch.setattr(
        stacks_module, "stack_dtype", lambda: np.dtype(jnp.bfloat16 if backend == "tpu" else np.float16)
    )
    store = AdapterStore(model, device_slots=2)
    store.add("one", random_adapter(weight_shapes(model), 8))
    tokens: Any = jax.ShapeDtypeStruct((4, 1), np.int32)
    slots = jax.ShapeDtypeStruct((4,), np.int32)
    device = AbstractDevice(device_kind=card, num_cores=None, platform="tpu" if platform == "tpu" else "gpu")
    with jax.sharding.use_abstract_mesh(AbstractMesh((1,), ("x",), abstract_device=device)):
        program = partial(run.__wrapped__, config=model.config, plan=model.plan, backend=backend)
        allowed = [jax.export.DisabledSafetyCheck.custom_call(TRITON)]
        exported = jax.export.export(jax.jit(program), platforms=[platform], disabled_checks=allowed)
        module = exported(model.params, tokens, store.stacks, slots).mlir_module()
    pattern = r'name = "(\w+)", num_stages' if backend == "gpu" else r'kernel_name = "(\w+)"'
    calls = Counter(name for name in re.findall(pattern, module) if "lora" in name)
    groups, linears = 6, 9  # embedding; q, k, v; output; gate, up; down; head
    assert calls.total() == 2 * (groups if backend == "gpu" else linears)
