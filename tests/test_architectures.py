"""Every architecture against llama.cpp (golden logits), and packed weights against a float reference on the same ones.

The bar for float weights is NMSE 1e-4 from llama.cpp, for packed weights with float activations 1e-5 from the
reference on the dequantized weights.
scripts/make_goldens.py writes the goldens, and with --quantized prints llama.cpp's own distance on the packed models.
"""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import reference_model
import tiny_models
from tiny_models import ModelSpec, TensorSpec

from realm_jax import LLM
from realm_jax.errors import GGUFError, RealmError, UnsupportedModelError

GOLDENS = Path(__file__).parent / "golden" / "logits"

# Files llama.cpp reads and Realm refuses, each by name.
REFUSED = {
    "deepseek2-legacy": (UnsupportedModelError, "attention.key_length_mla"),
}
SUPPORTED = [case for case in tiny_models.CASES if case not in REFUSED]

LLAMA_CPP_DISTANCES = json.loads((GOLDENS.parent / "packed_distances.json").read_text())
# Five types, two signatures of layers, experts, a fused matrix, latent attention. All other types, and every
# architecture in the five types, run with -m slow.
DEFAULT_QUANTIZED = {
    *("llama-Q8_0", "llama-Q4_K", "llama-Q6_K", "llama-IQ4_XS", "llama-IQ3_S", "llama-Q4_K_M"),
    *("gpt-oss-MXFP4", "llama-moe-Q4_K", "phi3-Q6_K", "deepseek2-IQ4_XS"),
}


def nmse(reference: np.ndarray, other: np.ndarray) -> float:
    a, b = reference.astype(np.float64), other.astype(np.float64)
    return float(((a - b) ** 2).sum() / (a**2).sum())


def golden(case: str) -> dict[str, np.ndarray]:
    with np.load(GOLDENS / f"{case}.npz", allow_pickle=False) as stored:
        return dict(stored)


def realm_logits(path: Path, tokens: np.ndarray | list[int]) -> np.ndarray:
    with LLM(str(path), backend="xla") as llm:
        return np.asarray(llm.logits([int(t) for t in tokens]))


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "model.gguf"


def test_every_case_has_a_golden() -> None:
    assert {file.stem for file in GOLDENS.glob("*.npz")} == set(tiny_models.CASES)


@pytest.mark.parametrize("case", tiny_models.CASES)
def test_tiny_model_is_the_one_scored(case: str, path: Path) -> None:
    assert tiny_models.write_tiny_model(case, path) == str(golden(case)["digest"])


@pytest.mark.parametrize("case", tiny_models.CASES)
def test_reference_agrees_with_llama_cpp(case: str, path: Path) -> None:
    tiny_models.write_tiny_model(case, path)
    expected = golden(case)
    logits = reference_model.reference_logits(path, expected["tokens"])
    # gemma's goldens carry llama.cpp's f16 table of the GELU: 1e-7; without it rounding alone leaves 1e-11
    assert nmse(expected["logits"], logits[expected["positions"]]) <= 1e-6


@pytest.mark.parametrize("case", SUPPORTED)
def test_realm_agrees_with_llama_cpp(case: str, path: Path) -> None:
    tiny_models.write_tiny_model(case, path)
    expected = golden(case)
    logits = realm_logits(path, expected["tokens"])
    assert logits.dtype == np.float32
    assert logits.shape == (len(expected["tokens"]), tiny_models.VOCABULARY_SIZE)
    assert nmse(expected["logits"], logits[expected["positions"]]) <= 1e-4


@pytest.mark.parametrize(
    "case",
    [
        pytest.param(case, marks=[] if case in DEFAULT_QUANTIZED else pytest.mark.slow)
        for case in tiny_models.QUANTIZED_CASES
    ],
)
def test_packed_weights_agree_with_the_reference(case: str, path: Path) -> None:
    tiny_models.write_tiny_model(case, path)
    tokens = tiny_models.token_ids()
    distance = nmse(reference_model.reference_logits(path, tokens), realm_logits(path, tokens))
    print(f"{case}: NMSE from the float reference {distance:.1e}; llama.cpp's own {LLAMA_CPP_DISTANCES[case]:.1e}")
    assert distance <= 1e-5


def test_constants_converters_copy_change_nothing(path: Path) -> None:
    """gpt-oss and deepseek2 files carry YaRN's usual betas, OLMo 3 its usual magnitude."""
    spec = tiny_models.tiny_spec("gpt-oss-yarn")
    spec.metadata |= {
        "gpt-oss.rope.scaling.yarn_beta_fast": 32.0,
        "gpt-oss.rope.scaling.yarn_beta_slow": 1.0,
        "gpt-oss.rope.scaling.yarn_ext_factor": 1.0,
        "gpt-oss.rope.scaling.yarn_attn_factor": 1.3465736,  # 1 + 0.1 ln 32
    }
    tiny_models.write_spec(spec, path, label="gpt-oss-yarn")
    expected = golden("gpt-oss-yarn")
    assert nmse(expected["logits"], realm_logits(path, expected["tokens"])[expected["positions"]]) <= 1e-4


# Refusals


@pytest.mark.parametrize("case", REFUSED)
def test_case_is_refused_by_name(case: str, path: Path) -> None:
    error, name = REFUSED[case]
    tiny_models.write_tiny_model(case, path)
    with pytest.raises(error, match=name):
        LLM(str(path))


def _rename_architecture(spec: ModelSpec) -> None:
    spec.architecture = "mamba"


def _set(key: str, value: object) -> Callable[[ModelSpec], None]:
    def change(spec: ModelSpec) -> None:
        spec.metadata[key] = value

    return change


def _unset(key: str) -> Callable[[ModelSpec], None]:
    def change(spec: ModelSpec) -> None:
        del spec.metadata[key]

    return change


def _add_tensor(name: str, *shape: int) -> Callable[[ModelSpec], None]:
    def change(spec: ModelSpec) -> None:
        spec.tensors[name] = TensorSpec(shape, "linear" if len(shape) > 1 else "norm")

    return change


def _drop_tensor(name: str) -> Callable[[ModelSpec], None]:
    def change(spec: ModelSpec) -> None:
        del spec.tensors[name]

    return change


@pytest.mark.parametrize(
    ("case", "change", "error", "named"),
    [
        ("llama", _rename_architecture, UnsupportedModelError, "mamba"),
        ("llama", _set("llama.rope.scaling.type", "dynamic"), UnsupportedModelError, "dynamic"),
        ("llama", _set("llama.rope.scaling.type", 3), GGUFError, "llama.rope.scaling.type"),
        ("llama", _set("llama.mystery", 7), UnsupportedModelError, "llama.mystery"),
        ("llama", _set("llama.attention.causal", False), UnsupportedModelError, "attention.causal"),
        ("llama", _set("llama.attention.head_count_kv", 3), GGUFError, "4 attention heads do not share 3"),
        (
            "llama",
            _set("llama.attention.head_count_kv", [2, 4, 2]),
            UnsupportedModelError,
            "head_count_kv is .2, 4, 2.; Realm needs the same",
        ),
        ("llama", _set("llama.rope.dimension_count", 7), GGUFError, "rope.dimension_count"),
        ("llama", _set("llama.block_count", 0), GGUFError, "llama.block_count"),
        ("llama", _set("llama.block_count", 4), GGUFError, "blk.3.attn_norm.weight"),
        ("llama", _set("llama.block_count", 2), UnsupportedModelError, "blk.2.attn_norm.weight"),
        ("llama", _unset("llama.attention.layer_norm_rms_epsilon"), GGUFError, "layer_norm_rms_epsilon is missing"),
        ("llama", _unset("llama.feed_forward_length"), GGUFError, "llama.feed_forward_length"),
        ("llama", _drop_tensor("blk.1.ffn_up.weight"), GGUFError, "blk.1.ffn_up.weight is missing"),
        ("llama", _drop_tensor("token_embd.weight"), GGUFError, "token_embd.weight is missing"),
        ("llama", _add_tensor("blk.0.mystery.weight", 8, 8), UnsupportedModelError, "blk.0.mystery.weight"),
        ("llama", _add_tensor("blk.2.attn_k.weight", 32, 32), GGUFError, r"blk.2.attn_k.weight has shape \(32, 32\)"),
        ("llama", _add_tensor("rope_freqs.weight", 9), GGUFError, "rope_freqs.weight"),
        ("llama", _add_tensor("token_embd.weight", 287, 64), GGUFError, "token_embd.weight has 287 rows"),
        ("llama-yarn", _set("llama.rope.scaling.yarn_beta_fast", 4.0), UnsupportedModelError, "yarn_beta_fast is 4"),
        ("llama-yarn", _set("llama.rope.scaling.yarn_log_multiplier", 0.1), UnsupportedModelError, "yarn_log_mult"),
        ("llama-moe", _set("llama.expert_used_count", 6), GGUFError, "expert_used_count is 6"),
        ("llama-moe", _drop_tensor("blk.0.ffn_gate_inp.weight"), GGUFError, "blk.0.ffn_gate_inp.weight is missing"),
        ("qwen2", _add_tensor("rope_freqs.weight", 8), UnsupportedModelError, "rope_freqs.weight"),
        ("qwen2moe", _drop_tensor("output.weight"), GGUFError, "output.weight is missing"),
        ("qwen3", _drop_tensor("blk.0.attn_q_norm.weight"), GGUFError, "blk.0.attn_q_norm.weight is missing"),
        ("gemma2", _add_tensor("output.weight", 288, 64), UnsupportedModelError, "output.weight"),
        ("granite", _unset("granite.logit_scale"), GGUFError, "granite.logit_scale"),
        ("granite", _set("granite.logit_scale", 0.0), GGUFError, "granite.logit_scale"),
        ("gpt-oss", _drop_tensor("blk.3.attn_sinks.weight"), GGUFError, "blk.3.attn_sinks.weight is missing"),
        ("gpt-oss", _unset("gpt-oss.attention.sliding_window"), GGUFError, "attention.sliding_window is missing"),
        ("deepseek2", _set("deepseek2.expert_gating_func", 3), UnsupportedModelError, "expert_gating_func is 3"),
    ],
)
def test_defect_is_refused_by_name(
    case: str, change: Callable[[ModelSpec], None], error: type[RealmError], named: str, path: Path
) -> None:
    spec = tiny_models.tiny_spec(case)
    change(spec)
    tiny_models.write_spec(spec, path, label=case)
    with pytest.raises(error, match=named) as caught:
        LLM(str(path))
    assert "\n" not in str(caught.value)
