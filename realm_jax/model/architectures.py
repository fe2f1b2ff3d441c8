"""What distinguishes one architecture from another, as data.

One decoder serves every entry; a new architecture is a new row here (and, where it brings a truly new operation, one
more field that the decoder reads). Semantics follow the files llama.cpp's converter writes for each architecture.
"""

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class ArchitectureSpec:
    """Structure that the metadata of a file does not spell out."""

    rope: Literal["norm", "neox"]  # which pairs a rotation mixes: (2i, 2i+1), or (i, i + dim/2)
    activation: Literal["silu", "gelu_tanh", "swiglu_oai"] = "silu"
    qk_norm: Literal["none", "head", "full"] = (
        "none"  # RMS norm of queries and keys: per head, or over all heads at once
    )
    pre_norm: bool = True  # attn_norm and ffn_norm in front of the two blocks
    post_norm: bool = False  # post_attention_norm and post_ffw_norm behind them
    ffn_norm: str = "ffn_norm"  # the name under which files keep the norm in front of the feed-forward block
    fused_gate_up: bool = False  # ffn_up holds gate and up, one below the other
    sinks: bool = False  # one learned logit per head that takes part in the softmax and in nothing else
    scale_embedding: bool = False  # embeddings times sqrt(embedding length)
    softcaps: bool = False  # reads the two soft-capping keys
    granite_scales: bool = False  # reads the embedding, residual, attention and logit scale keys
    wide_head_layers: int = (
        0  # at this many layers queries are scaled by embedding length / heads, not by the head size
    )
    window_period: int = 0  # default period of the local/global pattern; 0: no sliding windows
    window_default: int = 0  # default size of the window where the key is missing
    window_key_required: bool = False
    window_ignored: bool = False  # the key may be present and means nothing, as in llama.cpp, which scores our files
    local_rope_base: float | None = None  # default base in windowed layers; None: the same as elsewhere
    local_rope: Literal["same", "unscaled", "plain"] = (
        "same"  # windowed layers: without the factor, or without any scaling
    )
    no_rope_period: int = 0  # every n-th layer applies no rotation
    rope_freqs: bool = False  # may carry rope_freqs.weight, or the long and short factors under longrope
    tied: Literal["always", "optional", "never"] = "optional"  # the output head is the embedding
    experts: Literal["none", "optional", "always"] = "none"
    router: Literal["softmax", "softmax_topk", "key"] = "softmax"  # softmax over all, over the chosen, or by metadata
    router_normalise: bool = True  # the chosen weights are divided by their sum
    shared_expert: Literal["none", "gated", "counted", "sized"] = "none"  # gated by a sigmoid, or added as it is
    expert_bias: bool = False
    output_bias: Literal["none", "optional", "required"] = "none"  # bias of attn_output
    ffn_bias: bool = False  # optional biases of the dense feed-forward block
    head_bias: bool = False  # optional output.bias
    mla: bool = False  # multi-head latent attention: the cache holds one latent row per token


_GRANITE = ArchitectureSpec(
    rope="norm",
    granite_scales=True,
    rope_freqs=True,
    experts="optional",
    shared_expert="sized",
    output_bias="optional",
    ffn_bias=True,
)

ARCHITECTURES: dict[str, ArchitectureSpec] = {
    "llama": ArchitectureSpec(
        rope="norm",
        rope_freqs=True,
        experts="optional",
        window_ignored=True,
        output_bias="optional",
        ffn_bias=True,
    ),
    "qwen2": ArchitectureSpec(rope="neox", head_bias=True),
    "qwen2moe": ArchitectureSpec(
        rope="neox", experts="always", router_normalise=False, shared_expert="gated", tied="never"
    ),
    "qwen3": ArchitectureSpec(rope="neox", qk_norm="head"),
    "qwen3moe": ArchitectureSpec(rope="neox", qk_norm="head", experts="always"),
    "gemma2": ArchitectureSpec(
        rope="neox",
        activation="gelu_tanh",
        post_norm=True,
        scale_embedding=True,
        softcaps=True,
        wide_head_layers=46,
        window_period=2,
        window_default=4096,
        tied="always",
    ),
    "gemma3": ArchitectureSpec(
        rope="neox",
        activation="gelu_tanh",
        qk_norm="head",
        post_norm=True,
        scale_embedding=True,
        softcaps=True,
        wide_head_layers=62,
        window_period=6,
        local_rope_base=10000.0,
        local_rope="unscaled",
    ),
    "phi3": ArchitectureSpec(
        rope="neox", fused_gate_up=True, rope_freqs=True, window_ignored=True, output_bias="optional", head_bias=True
    ),
    "smollm3": ArchitectureSpec(rope="norm", no_rope_period=4),
    "olmo2": ArchitectureSpec(
        rope="neox", qk_norm="full", pre_norm=False, post_norm=True, window_period=4, local_rope="plain", tied="never"
    ),
    "granite": _GRANITE,
    "granitemoe": _GRANITE,
    "gpt-oss": ArchitectureSpec(
        rope="neox",
        activation="swiglu_oai",
        ffn_norm="post_attention_norm",
        sinks=True,
        window_period=2,
        window_key_required=True,
        tied="never",
        experts="always",
        router="softmax_topk",
        router_normalise=False,
        expert_bias=True,
        output_bias="required",
    ),
    "deepseek2": ArchitectureSpec(rope="norm", experts="always", router="key", shared_expert="counted", mla=True),
}
