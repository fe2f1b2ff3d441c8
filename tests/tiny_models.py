"""Tiny random models: one GGUF file per architecture variant, written in milliseconds and the same on every machine.

`CASES` names the float variants (one or more per architecture), `QUANTIZED_CASES` models whose weights are random valid
blocks of a quantized type. `tiny_spec(case)` gives the metadata and the table of tensors, so that a test can change one
thing before writing; `write_tiny_model(case, path)` writes the file.

Numbers come from PCG64's raw 64-bit stream (which numpy guarantees), keyed by seed, case and tensor name, so a file
does not depend on numpy's version, and a new tensor does not change the others. Shapes are numpy order, outermost
first: a linear map is (out, in).
"""

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import gguf
import numpy as np
from gguf import GGMLQuantizationType
from random_blocks import RandomBits, random_blocks
from tiny_vocabularies import VOCABULARY_SIZE, bpe_vocabulary, spm_vocabulary

WINDOW = 12  # sliding window, in tokens: several times shorter than the token sequences of the tests
TEST_TOKENS = 48


@dataclass(frozen=True)
class TensorSpec:
    """One tensor: its shape, what its values look like, and whether a quantized `weight_type` may replace its F32."""

    shape: tuple[int, ...]
    kind: str  # linear: std gain/sqrt(in); embedding, bias: std gain; norm: 1 +- 0.4; fixed: `values`
    gain: float = 1.0
    values: tuple[float, ...] = ()
    ggml_type: str | None = None  # a type of its own, whatever the file's weight type

    @property
    def quantizable(self) -> bool:
        return self.kind in ("linear", "embedding") and len(self.shape) >= 2


@dataclass
class ModelSpec:
    """A whole file: the architecture's name, its metadata (keys in full) and its tensors."""

    architecture: str
    metadata: dict[str, object]
    tensors: dict[str, TensorSpec] = field(default_factory=dict)


def token_ids(count: int = TEST_TOKENS) -> list[int]:
    """The token sequence that goldens are computed for: no control tokens, some repetition."""
    return [(37 * i * i + 11 * i + 5) % 257 + (i % 7) for i in range(count)]


# Builders


def _spec(arch: str, *, layers: int, width: int, context: int = 512, spm: bool = False, **keys: object) -> ModelSpec:
    """Metadata all architectures share. A keyword a__b becomes the key "<arch>.a.b"."""
    metadata: dict[str, object] = {
        "general.name": "tiny random model",  # llama.cpp keys tokenizer quirks to some names
        f"{arch}.context_length": context,
        f"{arch}.embedding_length": width,
        f"{arch}.block_count": layers,
        f"{arch}.vocab_size": VOCABULARY_SIZE,
        f"{arch}.attention.layer_norm_rms_epsilon": 1e-5,
    }
    metadata |= {f"{arch}.{key.replace('__', '.')}": value for key, value in keys.items()}
    metadata |= spm_vocabulary() if spm else bpe_vocabulary()
    return ModelSpec(arch, metadata)


def _embeddings(spec: ModelSpec, width: int, *, tied: bool, gain: float | None = None) -> None:
    embedding_gain = gain if gain is not None else (2.0 / width**0.5 if tied else 1.0)
    spec.tensors["token_embd.weight"] = TensorSpec((VOCABULARY_SIZE, width), "embedding", embedding_gain)
    spec.tensors["output_norm.weight"] = TensorSpec((width,), "norm")
    if not tied:
        spec.tensors["output.weight"] = TensorSpec((VOCABULARY_SIZE, width), "linear", 2.0)


def _attention(
    spec: ModelSpec,
    layer: int,
    width: int,
    heads: int,
    kv_heads: int,
    head_dim: int,
    *,
    bias: str = "",
    fused: bool = False,
    gain: float = 1.4,
) -> None:
    """q, k, v and output projections; `bias` lists which of "qkvo" have one."""
    sizes = {"q": heads * head_dim, "k": kv_heads * head_dim, "v": kv_heads * head_dim}
    blk = f"blk.{layer}."
    if fused:
        spec.tensors[blk + "attn_qkv.weight"] = TensorSpec((sum(sizes.values()), width), "linear", gain)
        if bias:
            spec.tensors[blk + "attn_qkv.bias"] = TensorSpec((sum(sizes.values()),), "bias", 0.3)
    else:
        for name, size in sizes.items():
            spec.tensors[f"{blk}attn_{name}.weight"] = TensorSpec((size, width), "linear", gain)
            if name in bias:
                spec.tensors[f"{blk}attn_{name}.bias"] = TensorSpec((size,), "bias", 0.3)
    spec.tensors[blk + "attn_output.weight"] = TensorSpec((width, heads * head_dim), "linear", 1.0)
    if "o" in bias:
        spec.tensors[blk + "attn_output.bias"] = TensorSpec((width,), "bias", 0.3)


def _ffn(
    spec: ModelSpec, layer: int, width: int, hidden: int, *, suffix: str = "", bias: bool = False, gain: float = 1.4
) -> None:
    for name, shape in (("gate", (hidden, width)), ("up", (hidden, width)), ("down", (width, hidden))):
        spec.tensors[f"blk.{layer}.ffn_{name}{suffix}.weight"] = TensorSpec(shape, "linear", gain)
        if bias:
            spec.tensors[f"blk.{layer}.ffn_{name}{suffix}.bias"] = TensorSpec(shape[:1], "bias", 0.3)


def _experts(
    spec: ModelSpec,
    layer: int,
    width: int,
    hidden: int,
    experts: int,
    *,
    bias: bool = False,
    ggml_type: str | None = None,
) -> None:
    blk = f"blk.{layer}.ffn_"
    # A wide spread of the router's scores, so that rounding never changes which experts are chosen.
    spec.tensors[blk + "gate_inp.weight"] = TensorSpec((experts, width), "linear", 2.0, ggml_type="F32")
    if bias:
        spec.tensors[blk + "gate_inp.bias"] = TensorSpec((experts,), "bias", 0.3)
    for name, shape in (("gate", (hidden, width)), ("up", (hidden, width)), ("down", (width, hidden))):
        spec.tensors[f"{blk}{name}_exps.weight"] = TensorSpec((experts, *shape), "linear", 1.4, ggml_type=ggml_type)
        if bias:
            spec.tensors[f"{blk}{name}_exps.bias"] = TensorSpec((experts, shape[0]), "bias", 0.3)


def _norms(spec: ModelSpec, layer: int, width: int, *names: str) -> None:
    for name in names:
        spec.tensors[f"blk.{layer}.{name}.weight"] = TensorSpec((width,), "norm")


def _llama(
    arch: str = "llama",
    *,
    layers: int = 3,
    width: int = 64,
    heads: int = 4,
    kv_heads: int = 2,
    head_dim: int | None = None,
    hidden: int = 96,
    experts: int = 0,
    bias: str = "",
    fused: bool = False,
    ffn_bias: bool = False,
    tied: bool = False,
    qk_norm: bool = False,
    spm: bool = False,
    **keys: object,
) -> ModelSpec:
    """The pre-norm block of llama, qwen2, qwen3, smollm3 and granite."""
    dim = head_dim or width // heads
    keys = {
        "feed_forward_length": hidden,
        "attention__head_count": heads,
        "attention__head_count_kv": kv_heads,
        "rope__dimension_count": dim,
        "rope__freq_base": 10000.0,
    } | keys
    if head_dim is not None:
        keys |= {"attention__key_length": dim, "attention__value_length": dim}
    if experts:
        keys |= {"expert_count": experts, "expert_used_count": 2}
    spec = _spec(arch, layers=layers, width=width, spm=spm, **keys)
    _embeddings(spec, width, tied=tied)
    for layer in range(layers):
        _norms(spec, layer, width, "attn_norm", "ffn_norm")
        _attention(spec, layer, width, heads, kv_heads, dim, bias=bias, fused=fused)
        if qk_norm:
            _norms(spec, layer, dim, "attn_q_norm", "attn_k_norm")
        if experts:
            expert_hidden = keys.get("expert_feed_forward_length", hidden)
            _experts(spec, layer, width, int(str(expert_hidden)), experts)
        else:
            _ffn(spec, layer, width, hidden, bias=ffn_bias)
    return spec


def _with(spec: ModelSpec, **tensors: tuple[float, ...]) -> ModelSpec:
    """Adds file-wide F32 vectors, such as rope_freqs."""
    for name, values in tensors.items():
        spec.tensors[f"{name}.weight"] = TensorSpec((len(values),), "fixed", values=values)
    return spec


def _qwen2moe(*, width: int = 64, hidden: int = 32, shared: int = 80) -> ModelSpec:
    spec = _llama(
        "qwen2moe",
        width=width,
        experts=6,
        bias="qkv",
        expert_feed_forward_length=hidden,
        expert_shared_feed_forward_length=shared,
    )
    for layer in range(3):
        _ffn(spec, layer, width, shared, suffix="_shexp")
        spec.tensors[f"blk.{layer}.ffn_gate_inp_shexp.weight"] = TensorSpec((width,), "bias", 1.6 / width**0.5)
    return spec


def _gemma(
    arch: str, layers: int, *, qk_norm: bool, width: int = 64, dim: int = 24, hidden: int = 96, **keys: object
) -> ModelSpec:
    """Norms on both sides of attention and feed-forward; head size apart from width / heads."""
    heads, kv_heads = 4, 2
    spec = _spec(
        arch,
        layers=layers,
        width=width,
        spm=True,
        feed_forward_length=hidden,
        attention__head_count=heads,
        attention__head_count_kv=kv_heads,
        attention__key_length=dim,
        attention__value_length=dim,
        **keys,
    )
    _embeddings(spec, width, tied=True)
    for layer in range(layers):
        _norms(spec, layer, width, "attn_norm", "post_attention_norm", "ffn_norm", "post_ffw_norm")
        # gemma2's caps must bite: scores of a few units against a cap of 5
        _attention(spec, layer, width, heads, kv_heads, dim, gain=1.4 if qk_norm else 2.2)
        if qk_norm:
            _norms(spec, layer, dim, "attn_q_norm", "attn_k_norm")
        _ffn(spec, layer, width, hidden)
    return spec


def _phi3(*, context: int = 512, width: int = 64, rotated: int = 16, hidden: int = 96, **keys: object) -> ModelSpec:
    heads, kv_heads, layers = 4, 2, 3
    spec = _spec(
        "phi3",
        layers=layers,
        width=width,
        context=context,
        feed_forward_length=hidden,
        attention__head_count=heads,
        attention__head_count_kv=kv_heads,
        rope__dimension_count=rotated,
        rope__freq_base=10000.0,
        **keys,
    )
    _embeddings(spec, width, tied=False)
    for layer in range(layers):
        _norms(spec, layer, width, "attn_norm", "ffn_norm")
        _attention(spec, layer, width, heads, kv_heads, width // heads, fused=True)
        spec.tensors[f"blk.{layer}.ffn_up.weight"] = TensorSpec((2 * hidden, width), "linear", 1.4)
        spec.tensors[f"blk.{layer}.ffn_down.weight"] = TensorSpec((width, hidden), "linear", 1.4)
    return spec


def _longrope(context: int, original: int) -> ModelSpec:
    spec = _phi3(
        context=context,
        rope__scaling__type="longrope",
        rope__scaling__original_context_length=original,
        rope__scaling__attn_factor=1.19,
    )
    return _with_longrope_factors(spec)


def _with_longrope_factors(spec: ModelSpec) -> ModelSpec:
    short = tuple(1.0 + 0.05 * j for j in range(8))
    return _with(spec, rope_factors_long=tuple(1.5 + 0.9 * j for j in range(8)), rope_factors_short=short)


def _olmo2(*, width: int = 64, hidden: int = 96, **keys: object) -> ModelSpec:
    heads, kv_heads, layers = 4, 2, 5
    spec = _spec(
        "olmo2",
        layers=layers,
        width=width,
        feed_forward_length=hidden,
        attention__head_count=heads,
        attention__head_count_kv=kv_heads,
        rope__freq_base=10000.0,
        **keys,
    )
    _embeddings(spec, width, tied=False)
    for layer in range(layers):
        _attention(spec, layer, width, heads, kv_heads, width // heads)
        _norms(spec, layer, width, "attn_q_norm", "post_attention_norm", "post_ffw_norm")
        _norms(spec, layer, width * kv_heads // heads, "attn_k_norm")
        _ffn(spec, layer, width, hidden)
    return spec


def _granite(
    arch: str = "granite", *, width: int = 64, hidden: int = 96, experts: int = 0, shared: int = 0, **keys: object
) -> ModelSpec:
    keys = {"embedding_scale": 3.0, "residual_scale": 0.6, "logit_scale": 1.7, "attention__scale": 0.4} | keys
    if shared:
        keys["expert_shared_feed_forward_length"] = shared
    spec = _llama(arch, tied=True, width=width, hidden=hidden, experts=experts, **keys)
    if shared:
        for layer in range(3):
            _ffn(spec, layer, width, shared, suffix="_shexp")
    return spec


def _gpt_oss(
    *, width: int = 64, dim: int = 24, hidden: int = 96, expert_type: str | None = None, **keys: object
) -> ModelSpec:
    heads, kv_heads, experts, layers = 4, 2, 6, 4
    spec = _spec(
        "gpt-oss",
        layers=layers,
        width=width,
        feed_forward_length=hidden,
        expert_feed_forward_length=hidden,
        expert_count=experts,
        expert_used_count=3,
        attention__head_count=heads,
        attention__head_count_kv=kv_heads,
        attention__key_length=dim,
        attention__value_length=dim,
        attention__sliding_window=WINDOW,
        rope__dimension_count=dim,
        rope__freq_base=150000.0,
        **keys,
    )
    _embeddings(spec, width, tied=False)
    for layer in range(layers):
        _norms(spec, layer, width, "attn_norm", "post_attention_norm")
        _attention(spec, layer, width, heads, kv_heads, dim, bias="qkvo")
        spec.tensors[f"blk.{layer}.attn_sinks.weight"] = TensorSpec((heads,), "bias", 1.5)
        _experts(spec, layer, width, hidden, experts, bias=True, ggml_type=expert_type)
    return spec


def _deepseek2(
    *,
    q_rank: int | None,
    width: int = 64,
    kv_rank: int = 32,
    value_dim: int = 20,
    hidden: int = 32,
    legacy: bool = False,
    groups: bool = False,
    sigmoid: bool = False,
    **keys: object,
) -> ModelSpec:
    """MLA, one dense layer, then experts with shared ones. Without q_rank llama.cpp wants a "lite" depth: 26 layers."""
    layers = 3 if q_rank else 26
    heads, nope, rotated, dv, experts, dense_hidden = 4, 16, 8, value_dim, 8, 3 * hidden
    head = nope + rotated
    keys |= {
        "feed_forward_length": dense_hidden,
        "leading_dense_block_count": 1,
        "attention__head_count": heads,
        "attention__head_count_kv": heads if legacy else 1,
        "attention__kv_lora_rank": kv_rank,
        "attention__key_length": head if legacy else kv_rank + rotated,
        "attention__value_length": dv if legacy else kv_rank,
        "expert_count": experts,
        "expert_used_count": 3,
        "expert_shared_count": 2,
        "expert_feed_forward_length": hidden,
        "expert_weights_scale": 1.8,
        "expert_weights_norm": sigmoid,
        "expert_gating_func": 2 if sigmoid else 1,
        "rope__dimension_count": rotated,
        "rope__freq_base": 10000.0,
    }
    if not legacy:
        keys |= {"attention__key_length_mla": head, "attention__value_length_mla": dv}
    if q_rank:
        keys["attention__q_lora_rank"] = q_rank
    if groups:
        keys |= {"expert_group_count": 4, "expert_group_used_count": 2}
    spec = _spec("deepseek2", layers=layers, width=width, **keys)
    _embeddings(spec, width, tied=False)
    for layer in range(layers):
        blk = f"blk.{layer}."
        _norms(spec, layer, width, "attn_norm", "ffn_norm")
        _norms(spec, layer, kv_rank, "attn_kv_a_norm")
        linear = {"attn_kv_a_mqa": (kv_rank + rotated, width), "attn_output": (width, heads * dv)}
        if q_rank:
            _norms(spec, layer, q_rank, "attn_q_a_norm")
            linear |= {"attn_q_a": (q_rank, width), "attn_q_b": (heads * head, q_rank)}
        else:
            linear["attn_q"] = (heads * head, width)
        if legacy:
            linear["attn_kv_b"] = (heads * (nope + dv), kv_rank)
        else:
            linear |= {"attn_k_b": (heads, kv_rank, nope), "attn_v_b": (heads, dv, kv_rank)}
        for name, shape in linear.items():
            spec.tensors[f"{blk}{name}.weight"] = TensorSpec(shape, "linear", 1.2)
        if layer == 0:
            _ffn(spec, layer, width, dense_hidden)
        else:
            _experts(spec, layer, width, hidden, experts)
            _ffn(spec, layer, width, 2 * hidden, suffix="_shexp")
            if sigmoid:
                spec.tensors[blk + "exp_probs_b.bias"] = TensorSpec((experts,), "bias", 0.1)
    return spec


def _scaling(kind: str, factor: float, original: int) -> dict[str, object]:
    return {
        "rope__scaling__type": kind,
        "rope__scaling__factor": factor,
        "rope__scaling__original_context_length": original,
    }


_YARN = _scaling("yarn", 8.0, 64)
_GEMMA2_KEYS: dict[str, object] = {
    "attention__sliding_window": WINDOW,
    "attn_logit_softcapping": 5.0,
    "final_logit_softcapping": 4.0,
}
_GEMMA3_KEYS = {"attention__sliding_window": WINDOW, "rope__freq_base": 1000000.0, **_scaling("linear", 8.0, 64)}
_LLAMA3_FACTORS = (1.0, 1.0, 1.3, 2.0, 4.5, 8.0, 8.0, 8.0)

CASES: Mapping[str, Callable[[], ModelSpec]] = {
    "llama": lambda: _llama(),
    "llama-mha-spm": lambda: _llama(kv_heads=4, spm=True),
    "llama-tied": lambda: _llama(tied=True),
    "llama-bias": lambda: _llama(bias="qkvo", ffn_bias=True),
    "llama-head-dim": lambda: _llama(head_dim=24),
    "llama-fused-qkv": lambda: _llama(bias="qkvo", fused=True),
    "llama-rope-freqs": lambda: _with(_llama(), rope_freqs=_LLAMA3_FACTORS),
    "llama-linear": lambda: _llama(**_scaling("linear", 4.0, 128)),
    "llama-yarn": lambda: _llama(**_YARN),
    "llama-yarn-attn-factor": lambda: _llama(**_YARN, rope__scaling__attn_factor=0.8),
    "llama-longrope": lambda: _with_longrope_factors(
        _llama(
            rope__scaling__type="longrope", rope__scaling__original_context_length=64, rope__scaling__attn_factor=1.19
        )
    ),
    "llama-moe": lambda: _llama(experts=5),
    "qwen2": lambda: _llama("qwen2", bias="qkv"),
    "qwen2-tied": lambda: _llama("qwen2", bias="qkv", tied=True),
    "qwen2moe": _qwen2moe,
    "qwen3": lambda: _llama("qwen3", head_dim=24, qk_norm=True),
    "qwen3-tied": lambda: _llama("qwen3", head_dim=24, qk_norm=True, tied=True),
    "qwen3moe": lambda: _llama("qwen3moe", head_dim=24, qk_norm=True, experts=6, expert_feed_forward_length=32),
    "gemma2": lambda: _gemma("gemma2", 4, qk_norm=False, **_GEMMA2_KEYS),
    "gemma2-defaults": lambda: _gemma("gemma2", 4, qk_norm=False),
    "gemma3": lambda: _gemma("gemma3", 8, qk_norm=True, **_GEMMA3_KEYS),
    "gemma3-pattern-softcap": lambda: _gemma(
        "gemma3",
        5,
        qk_norm=True,
        attention__sliding_window=WINDOW,
        attention__sliding_window_pattern=[True, False, False, True, True],
        rope__freq_base=1000000.0,
        rope__freq_base_swa=30000.0,
        final_logit_softcapping=4.0,
    ),
    "gemma3-no-window": lambda: _gemma("gemma3", 3, qk_norm=True, rope__freq_base=10000.0),
    "phi3": lambda: _phi3(),
    "phi3-partial-rotary": lambda: _phi3(rotated=12),
    "phi3-longrope-long": lambda: _longrope(512, 64),
    "phi3-longrope-short": lambda: _longrope(256, 256),
    "smollm3": lambda: _llama("smollm3", layers=5, tied=True),
    "olmo2": lambda: _olmo2(),
    "olmo2-window": lambda: _olmo2(attention__sliding_window=WINDOW, **_YARN),
    "granite": lambda: _granite(),
    "granite-no-rope": lambda: _granite(rope__scaling__finetuned=False),
    "granitemoe": lambda: _granite("granitemoe", experts=5, shared=48),
    "gpt-oss": lambda: _gpt_oss(),
    "gpt-oss-yarn": lambda: _gpt_oss(**_scaling("yarn", 32.0, 64)),
    "deepseek2-lite": lambda: _deepseek2(q_rank=None),
    "deepseek2": lambda: _deepseek2(q_rank=24, sigmoid=True, groups=True),
    "deepseek2-yarn": lambda: _deepseek2(q_rank=24, **_YARN, rope__scaling__yarn_log_multiplier=0.0707),
    "deepseek2-legacy": lambda: _deepseek2(q_rank=24, legacy=True),
}


# Quantized variants


def _wide_llama() -> ModelSpec:
    """Rows of 256 and 512 elements, as the K-quants need, and six layers: room for a period of layer signatures."""
    return _llama(layers=6, width=256, hidden=512)


def _q4_k_m(name: str) -> str:
    """Two interleaved layer signatures, as in Q4_K_M files: some layers keep attn_v and ffn_down in Q6_K."""
    if name == "output.weight":
        return "Q6_K"
    layer = int(name.split(".")[1]) if name.startswith("blk.") else 0
    return "Q6_K" if layer % 3 == 0 and ("attn_v" in name or "ffn_down" in name) else "Q4_K"


@dataclass(frozen=True)
class QuantizedCase:
    build: Callable[[], ModelSpec]
    type_of: Callable[[str], str]  # tensor name -> ggml type's name


def _all(ggml_type: str) -> Callable[[str], str]:
    return lambda name: ggml_type


_F32 = _all("F32")


QUANTIZED_TYPES = (
    *("F16", "BF16", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K"),
    *("IQ1_S", "IQ1_M", "IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ3_XXS", "IQ3_S", "IQ4_NL", "IQ4_XS"),
    *("TQ1_0", "TQ2_0", "MXFP4", "NVFP4"),
)

# One model of each architecture with rows of 256 elements or more, so that every type can hold its matrices.
WIDE: Mapping[str, Callable[[], ModelSpec]] = {
    "llama": _wide_llama,
    "llama-moe": lambda: _llama(width=256, hidden=256, experts=4),
    "qwen2": lambda: _llama("qwen2", width=256, hidden=256, bias="qkv"),
    "qwen2moe": lambda: _qwen2moe(width=256, hidden=256, shared=256),
    "qwen3": lambda: _llama("qwen3", width=256, hidden=256, head_dim=128, qk_norm=True, tied=True),
    "qwen3moe": lambda: _llama(
        "qwen3moe", width=256, head_dim=64, qk_norm=True, experts=4, expert_feed_forward_length=256
    ),
    "gemma2": lambda: _gemma("gemma2", 4, qk_norm=False, width=256, dim=64, hidden=256, **_GEMMA2_KEYS),
    "gemma3": lambda: _gemma("gemma3", 8, qk_norm=True, width=256, dim=64, hidden=256, **_GEMMA3_KEYS),
    "phi3": lambda: _phi3(width=256, rotated=48, hidden=256),
    "smollm3": lambda: _llama("smollm3", layers=5, width=256, hidden=256, tied=True),
    "olmo2": lambda: _olmo2(width=256, hidden=256, attention__sliding_window=WINDOW),
    "granite": lambda: _granite(width=256, hidden=256),
    "granitemoe": lambda: _granite("granitemoe", width=256, hidden=256, experts=4, shared=256),
    "gpt-oss": lambda: _gpt_oss(width=256, dim=64, hidden=256),
    "deepseek2": lambda: _deepseek2(
        q_rank=256, width=256, kv_rank=256, value_dim=64, hidden=256, sigmoid=True, groups=True
    ),
}

QUANTIZED_CASES: Mapping[str, QuantizedCase] = {
    **{f"llama-{t}": QuantizedCase(_wide_llama, _all(t)) for t in QUANTIZED_TYPES},
    **{
        f"{architecture}-{t}": QuantizedCase(build, _all(t))
        for architecture, build in WIDE.items()
        for t in ("Q8_0", "Q4_K", "Q6_K", "IQ4_XS", "IQ3_S")
    },
    "llama-Q4_K_M": QuantizedCase(_wide_llama, _q4_k_m),
    "gpt-oss-MXFP4": QuantizedCase(lambda: _gpt_oss(expert_type="MXFP4"), _all("F32")),
}

# Writing


def _values(tensor: TensorSpec, bits: RandomBits) -> np.ndarray:
    """The tensor's float32 values."""
    if tensor.kind == "fixed":
        return np.array(tensor.values, np.float32).reshape(tensor.shape)
    unit = (2 * bits.uniform(int(np.prod(tensor.shape))) - 1).reshape(tensor.shape)
    if tensor.kind == "norm":
        return (1 + 0.4 * unit).astype(np.float32)
    return (3**0.5 * _deviation(tensor) * unit).astype(np.float32)


def _deviation(tensor: TensorSpec) -> float:
    return tensor.gain / tensor.shape[-1] ** 0.5 if tensor.kind == "linear" else tensor.gain


def tiny_spec(case: str) -> ModelSpec:
    """A fresh spec of any case in CASES or QUANTIZED_CASES, free to be changed."""
    return CASES[case]() if case in CASES else QUANTIZED_CASES[case].build()


def _add_metadata(writer: gguf.GGUFWriter, key: str, value: object) -> None:
    if isinstance(value, bool):
        writer.add_bool(key, value)
    elif isinstance(value, int):
        writer.add_uint32(key, value)
    elif isinstance(value, float):
        writer.add_float32(key, value)
    elif isinstance(value, str):
        writer.add_string(key, value)
    elif isinstance(value, list):
        writer.add_array(key, value)
    else:
        raise TypeError(f"metadata {key} has a value of type {type(value).__name__}")


def write_spec(
    spec: ModelSpec, path: str | Path, *, label: str, seed: int = 0, type_of: Callable[[str], str] = _F32
) -> str:
    """Writes a GGUF file and returns a digest of its tensors. `type_of` gives each matrix's ggml type by its name."""
    writer = gguf.GGUFWriter(str(path), spec.architecture)
    for key, value in spec.metadata.items():
        _add_metadata(writer, key, value)
    digest = hashlib.sha256()
    for name, tensor in spec.tensors.items():
        bits = RandomBits(seed, f"{label}/{name}")
        ggml_type = tensor.ggml_type or (type_of(name) if tensor.quantizable else "F32")
        if tensor.shape[-1] % gguf.GGML_QUANT_SIZES[GGMLQuantizationType[ggml_type]][0]:
            ggml_type = "F16"  # quantizers leave such rows wider, too
        if ggml_type in ("F32", "F16", "BF16"):
            values = _values(tensor, bits)
            data = values if ggml_type == "F32" else gguf.quants.quantize(values, GGMLQuantizationType[ggml_type])
        else:
            data = random_blocks(ggml_type, tensor.shape, _deviation(tensor), bits)
        writer.add_tensor(name, data, raw_dtype=GGMLQuantizationType[ggml_type])
        digest.update(name.encode() + data.tobytes())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return digest.hexdigest()


def write_tiny_model(arch_case: str, path: str | Path, *, seed: int = 0, weight_type: str = "F32") -> str:
    """Writes the GGUF file of a case and returns a digest of its tensors.

    `weight_type` (a ggml type's name) applies to the matrices of a case in CASES; those in QUANTIZED_CASES know theirs.
    """
    if arch_case in QUANTIZED_CASES:
        case = QUANTIZED_CASES[arch_case]
        return write_spec(case.build(), path, label=arch_case, seed=seed, type_of=case.type_of)
    return write_spec(tiny_spec(arch_case), path, label=arch_case, seed=seed, type_of=_all(weight_type))
