"""ModelConfig: everything about a model that is not a weight, as one frozen value. No jax in here."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

from realm_jax.errors import GGUFError, InvalidRequestError, UnsupportedModelError
from realm_jax.gguf.header import quote
from realm_jax.model.architectures import ARCHITECTURES, ArchitectureSpec
from realm_jax.model.metadata import MetadataReader
from realm_jax.model.rope import BETA_FAST, BETA_SLOW, RopeConfig

MAX_LAYERS = 1024
DEFAULT_CONTEXT = 4096

# Written by converters for people and tools; none of these changes what a decoder computes.
_INFORMATIONAL = (
    "vocab_size",
    "tensor_data_layout",
    "expert_chunk_feed_forward_length",
    "attention.layer_norm_epsilon",  # of layer norms; ours are RMS norms
)


@dataclass(frozen=True)
class ExpertConfig:
    """A mixture of experts in place of the dense feed-forward block."""

    count: int
    used: int
    ffn_size: int
    router: Literal["softmax", "softmax_topk", "sigmoid"]
    normalise: bool
    scale: float
    shared_size: int  # width of the expert every token takes; 0: none
    shared_gated: bool
    groups: int  # experts are chosen among the best groups only (DeepSeek-V3); 1: no groups
    groups_used: int
    dense_layers: int  # leading layers with a dense block instead


@dataclass(frozen=True)
class LatentConfig:
    """Multi-head latent attention (DeepSeek-V2, arXiv:2405.04434) in its absorbed form."""

    query_rank: int  # 0: queries are projected directly
    rank: int
    key_dim: int  # of one head, after decompression, rotation included
    value_dim: int


@dataclass(frozen=True)
class ModelConfig:
    """Shape and constants of one model. Hashable, so it can be a static argument of a jitted function."""

    architecture: str
    name: str
    num_layers: int
    hidden_size: int
    vocab_size: int
    trained_context: int
    context_length: int
    num_heads: int
    num_kv_heads: int  # rows of the key/value cache per token
    head_dim: int  # of a cached key
    value_dim: int  # of a cached value; 0 where values are a part of the keys (latent attention)
    ffn_size: int
    norm_eps: float
    attention_scale: float
    ropes: tuple[RopeConfig, ...]  # kinds of rotation; a layer names one of them, or len(ropes) for none
    layer_rope: tuple[int, ...]  # [num_layers]
    layer_window: tuple[int, ...]  # [num_layers] positions a query looks back on, itself included; 0: all
    attention_softcap: float = 0.0
    final_softcap: float = 0.0
    embedding_scale: float = 1.0
    residual_scale: float = 1.0
    logit_scale: float = 1.0
    experts: ExpertConfig | None = None
    latent: LatentConfig | None = None
    pooling: Literal["mean", "cls", "last"] = "mean"

    @property
    def spec(self) -> ArchitectureSpec:
        return ARCHITECTURES[self.architecture]

    @property
    def cache_values_per_token(self) -> int:
        """Numbers that a token adds to the key/value cache."""
        return self.num_layers * self.num_kv_heads * (self.head_dim + self.value_dim)


def read_config(metadata: Mapping[str, Any], vocab_size: int, context_length: int | None = None) -> ModelConfig:
    """Builds the config from a file's metadata.

    Args:
        metadata: of the whole file.
        vocab_size: rows of the embedding matrix.
        context_length: tokens a request may hold in all; None means what the model was trained on, at most 4096.

    Raises:
        UnsupportedModelError: an architecture, key or value Realm does not implement, by name.
        GGUFError: a missing or malformed key.
        InvalidRequestError: a context length the model cannot have.
    """
    architecture = metadata.get("general.architecture")
    if not isinstance(architecture, str):
        raise GGUFError("metadata key general.architecture is missing; this file does not hold a language model")
    if architecture not in ARCHITECTURES:
        raise UnsupportedModelError(
            f"architecture {quote(architecture)} is not supported; supported are {', '.join(sorted(ARCHITECTURES))}"
        )
    spec = ARCHITECTURES[architecture]
    read = MetadataReader(metadata, architecture)
    for key in _INFORMATIONAL:
        read.raw(key)

    layers = read.integer("block_count", low=1, high=MAX_LAYERS)
    hidden = read.integer("embedding_length", low=1, high=1 << 20)
    trained = read.integer("context_length", low=1)
    heads = read.per_layer("attention.head_count", layers, low=1, high=1 << 16)
    kv_heads = read.per_layer("attention.head_count_kv", layers, heads, low=1, high=1 << 16)
    if heads % kv_heads:
        raise GGUFError(f"{heads} attention heads do not share {kv_heads} key/value heads evenly")
    if hidden % heads and read.raw("attention.key_length") is None:
        raise GGUFError(f"embedding length {hidden} is no multiple of {heads} heads, and no head size is given")
    head_dim = read.integer("attention.key_length", hidden // heads, low=2, high=8192)
    value_dim = read.integer("attention.value_length", hidden // heads, low=1, high=8192)
    ffn = read.per_layer("feed_forward_length", layers, 0, high=1 << 24)
    eps = read.number("attention.layer_norm_rms_epsilon", low=0.0, high=1.0)
    if not read.flag("attention.causal", True):
        raise UnsupportedModelError(f"{architecture}.attention.causal is false; Realm runs causal decoders only")
    if read.integer("nextn_predict_layers", 0):
        raise UnsupportedModelError(f"{architecture}.nextn_predict_layers is set; prediction layers are not supported")
    context = _context(context_length, trained)

    latent = _latent(read) if spec.mla else None
    rotated = read.integer("rope.dimension_count", head_dim, low=2, high=head_dim)
    if rotated % 2:
        raise GGUFError(f"metadata key {architecture}.rope.dimension_count is {rotated}; it must be even")
    if latent is not None:
        scale_dim = latent.key_dim
        kv_heads, head_dim, value_dim = 1, latent.rank + rotated, 0
        if rotated >= latent.key_dim:
            raise GGUFError(f"rope.dimension_count {rotated} leaves nothing of a key of {latent.key_dim}")
    else:
        scale_dim = head_dim

    windows = _windows(read, spec, layers)
    ropes, temperature = _ropes(read, spec, rotated, trained)
    if not any(windows) or ropes[0] == ropes[-1]:
        ropes = ropes[:1]
    rotates = read.flag("rope.scaling.finetuned", True) or not spec.granite_scales  # granite's switch for rotation
    layer_rope = tuple(
        len(ropes)
        if not rotates or (spec.no_rope_period and (i + 1) % spec.no_rope_period == 0)
        else (len(ropes) - 1 if windows[i] else 0)
        for i in range(layers)
    )

    scale = 1.0 / math.sqrt(scale_dim)
    if spec.wide_head_layers and layers == spec.wide_head_layers:
        scale = 1.0 / math.sqrt(hidden // heads)
    if spec.granite_scales:
        scale = read.number("attention.scale", 0.0) or scale
    if latent is not None:
        scale *= temperature**2

    residual = embedding = logit = 1.0
    if spec.scale_embedding:
        embedding = math.sqrt(hidden)
    if spec.granite_scales:
        embedding = read.number("embedding_scale", 0.0) or 1.0
        residual = read.number("residual_scale", 0.0) or 1.0
        divisor = read.number("logit_scale")
        if divisor == 0.0:
            raise GGUFError(f"metadata key {architecture}.logit_scale is 0; logits are divided by it")
        logit = 1.0 / divisor
    attention_softcap = read.number("attn_logit_softcapping", 0.0, low=0.0) if spec.softcaps else 0.0
    if spec.window_default and attention_softcap == 0.0:  # gemma2 files may leave its constants out
        attention_softcap = 50.0
    final_softcap = read.number("final_logit_softcapping", 0.0, low=0.0) if spec.softcaps else 0.0
    if spec.window_default and final_softcap == 0.0:
        final_softcap = 30.0

    config = ModelConfig(
        architecture=architecture,
        name=str(metadata.get("general.name", architecture)),
        num_layers=layers,
        hidden_size=hidden,
        vocab_size=vocab_size,
        trained_context=trained,
        context_length=context,
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=head_dim,
        value_dim=value_dim,
        ffn_size=ffn,
        norm_eps=eps,
        attention_scale=scale,
        ropes=ropes,
        layer_rope=layer_rope,
        layer_window=windows,
        attention_softcap=attention_softcap,
        final_softcap=final_softcap,
        embedding_scale=embedding,
        residual_scale=residual,
        logit_scale=logit,
        experts=_experts(read, spec, layers, ffn),
        latent=latent,
        pooling=_pooling(read),
    )
    read.refuse_unread()
    return config


def _context(requested: int | None, trained: int) -> int:
    if requested is None:
        return min(trained, DEFAULT_CONTEXT)
    if isinstance(requested, bool) or not isinstance(requested, int) or not 1 <= requested <= trained:
        raise InvalidRequestError(
            f"context_length is {requested!r}; it must be from 1 to the {trained} tokens this model was trained on"
        )
    return requested


def _windows(read: MetadataReader, spec: ArchitectureSpec, layers: int) -> tuple[int, ...]:
    """Per layer, how far back a query looks; 0 for all the way."""
    if spec.window_ignored:
        read.raw("attention.sliding_window")
        return (0,) * layers
    if not spec.window_period:
        if read.integer("attention.sliding_window", 0):
            raise UnsupportedModelError(
                "attention.sliding_window is set, and this architecture defines no window pattern"
            )
        return (0,) * layers
    if spec.window_key_required:
        size = read.integer("attention.sliding_window", low=1)
    else:
        size = read.integer("attention.sliding_window", spec.window_default)
    pattern = read.raw("attention.sliding_window_pattern")
    if not size:
        return (0,) * layers
    if pattern is None or (isinstance(pattern, int) and not isinstance(pattern, bool)):
        period = spec.window_period if pattern is None else pattern
        if not 0 <= period <= MAX_LAYERS:
            raise GGUFError(f"attention.sliding_window_pattern is {period}; it must be from 0 to {MAX_LAYERS}")
        return tuple(size if period == 0 or i % period < period - 1 else 0 for i in range(layers))
    if not hasattr(pattern, "__len__") or isinstance(pattern, str) or len(pattern) < layers:
        raise GGUFError(
            f"attention.sliding_window_pattern must be a number or hold one flag for each of {layers} layers"
        )
    return tuple(size if bool(flag) else 0 for flag in list(pattern)[:layers])


def _ropes(
    read: MetadataReader, spec: ArchitectureSpec, dim: int, trained: int
) -> tuple[tuple[RopeConfig, ...], float]:
    """The rotation of global layers, that of windowed layers, and latent attention's softmax temperature."""
    base = read.number("rope.freq_base", 10000.0, low=2.0, high=1e12)  # YaRN divides by its logarithm
    scaling: Any = read.string("rope.scaling.type", "linear")
    if scaling not in ("none", "linear", "yarn", "longrope"):
        raise UnsupportedModelError(
            f"rope scaling type {quote(scaling)} is not supported; supported are none, linear, yarn, longrope"
        )
    if scaling == "longrope" and not spec.rope_freqs:
        raise UnsupportedModelError("rope scaling type longrope is not supported for this architecture")
    legacy = read.number("rope.scale_linear", 0.0, low=0.0, high=1e6)
    factor = read.number("rope.scaling.factor", legacy, low=0.0, high=1e6) or 1.0
    if scaling == "none":
        factor = 1.0
    original = read.integer("rope.scaling.original_context_length", trained, low=1)
    magnitude = read.number("rope.scaling.attn_factor", 1.0, low=1e-6, high=1e6)
    # Stored as 0.1 times the multiplier of the published formula.
    log_multiplier = read.number("rope.scaling.yarn_log_multiplier", 0.0) / 0.1
    gain = 1.0 + 0.1 * math.log(factor)
    temperature = magnitude * (1.0 + 0.1 * log_multiplier * math.log(factor))
    yarn = scaling == "yarn"
    # Converters copy these from a model's own config. llama.cpp ignores them for our architectures, so only the values
    # that mean what is computed anyway can be right.
    for key, usual in (("beta_fast", BETA_FAST), ("beta_slow", BETA_SLOW), ("ext_factor", 1.0), ("attn_factor", gain)):
        value = read.number(f"rope.scaling.yarn_{key}", usual)
        if yarn and not math.isclose(value, usual, rel_tol=1e-3):
            raise UnsupportedModelError(f"rope.scaling.yarn_{key} is {value:g}; only {usual:g} is supported")
    if log_multiplier and not spec.mla:
        raise UnsupportedModelError(
            "rope.scaling.yarn_log_multiplier is set; it is supported for latent attention only"
        )
    if log_multiplier == 0.0:
        temperature *= gain
        if yarn and factor > 1.0:
            magnitude *= gain

    rope = RopeConfig(
        pairs=spec.rope,
        dim=dim,
        base=base,
        factor=factor,
        scaling=scaling,
        original_context=original,
        magnitude=magnitude,
        extrapolation=1.0 if yarn else 0.0,
    )
    local_base = read.number("rope.freq_base_swa", spec.local_rope_base or base, low=2.0, high=1e12)
    if spec.local_rope == "same":
        local = replace(rope, base=local_base)
    elif spec.local_rope == "unscaled":
        local = replace(rope, base=local_base, factor=1.0, magnitude=1.0 if yarn else magnitude)
    else:
        local = RopeConfig(pairs=spec.rope, dim=dim, base=base)
    return (rope, local), temperature


def _experts(read: MetadataReader, spec: ArchitectureSpec, layers: int, ffn: int) -> ExpertConfig | None:
    count = read.integer("expert_count", 0, high=1 << 16)
    used = read.per_layer("expert_used_count", layers, 0, high=1 << 16)
    if spec.experts == "none" and count:
        raise UnsupportedModelError(f"expert_count is {count}, and this architecture is supported without experts only")
    if spec.experts == "always" and not count:
        raise GGUFError("expert_count is missing or 0; this architecture is a mixture of experts")
    if not count:
        return None
    if not 1 <= used <= count:
        raise GGUFError(f"expert_used_count is {used}; it must be from 1 to the {count} experts")
    groups = read.integer("expert_group_count", 0) or 1
    groups_used = read.integer("expert_group_used_count", 0) or 1
    if count % groups or (groups > 1 and not (groups_used < groups and used <= count // groups * groups_used)):
        raise GGUFError(
            f"expert_group_count {groups} with {groups_used} used does not suit {count} experts with {used} used"
        )
    if groups > 1 and count // groups < 2:
        raise GGUFError(f"expert_group_count {groups} leaves one expert a group; a group is scored by its best two")
    gating = read.integer("expert_gating_func", 0)
    router: Literal["softmax", "softmax_topk", "sigmoid"] = "softmax"
    if spec.router == "key":
        if gating not in (0, 1, 2):
            raise UnsupportedModelError(f"expert_gating_func is {gating}; supported are 1 (softmax) and 2 (sigmoid)")
        router = "sigmoid" if gating == 2 else "softmax"
    elif spec.router == "softmax_topk":
        router = "softmax_topk"
    size = read.per_layer("expert_feed_forward_length", layers, 0) or ffn
    if spec.shared_expert == "gated":
        size = size if read.raw("expert_feed_forward_length") is not None else ffn // used
        shared = read.integer("expert_shared_feed_forward_length", 0) or ffn
    elif spec.shared_expert == "sized":
        shared = read.integer("expert_shared_feed_forward_length", 0)
    elif spec.shared_expert == "counted":
        shared = size * read.integer("expert_shared_count", low=1, high=1024)
    else:
        shared = 0
    normalise = read.flag("expert_weights_norm", False) if spec.router == "key" else spec.router_normalise
    return ExpertConfig(
        count=count,
        used=used,
        ffn_size=size,
        router=router,
        normalise=normalise,
        scale=read.number("expert_weights_scale", 0.0) or 1.0,
        shared_size=shared,
        shared_gated=spec.shared_expert == "gated",
        groups=groups,
        groups_used=groups_used,
        dense_layers=read.integer("leading_dense_block_count", 0, high=layers) if spec.router == "key" else 0,
    )


def _latent(read: MetadataReader) -> LatentConfig:
    key = read.integer("attention.key_length_mla", 0, high=8192)
    value = read.integer("attention.value_length_mla", 0, high=8192)
    if not key or not value:
        raise UnsupportedModelError(
            "attention.key_length_mla is missing; this is an early deepseek2 file, convert it again with a newer tool"
        )
    return LatentConfig(
        query_rank=read.integer("attention.q_lora_rank", 0, high=1 << 20),
        rank=read.integer("attention.kv_lora_rank", low=1, high=1 << 20),
        key_dim=key,
        value_dim=value,
    )


def _pooling(read: MetadataReader) -> Literal["mean", "cls", "last"]:
    kind = read.integer("pooling_type", 1)
    if kind in (0, 1):
        return "mean"
    if kind == 2:
        return "cls"
    if kind == 3:
        return "last"
    raise UnsupportedModelError(
        f"pooling_type is {kind}; supported are 0 (none), 1 (mean), 2 (first token), 3 (last token)"
    )
