"""The table of tensors a config expects: names, shapes and logical axes. No jax in here.

Names are the file's own, with the layer number taken out: `blk.7.attn_q.weight` is role `attn_q.weight` of layer 7.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from realm_jax.errors import GGUFError, UnsupportedModelError
from realm_jax.gguf import GGMLType
from realm_jax.model.config import ModelConfig, read_config

Axes = tuple[str, ...]

_INTEGERS = (GGMLType.I8, GGMLType.I16, GGMLType.I32, GGMLType.I64)  # types of indices, not of weights

# Logical axes of each role, outermost first; sharding maps them to mesh axes. "embed" is the residual stream, "rank"
# the small inner size of a factored projection, "router" the experts a router scores, which no device has a part of.
AXES: dict[str, Axes] = {
    "output_norm.weight": ("embed",),
    "rope_freqs.weight": ("head_dim",),
    "rope_factors_long.weight": ("head_dim",),
    "rope_factors_short.weight": ("head_dim",),
    "attn_norm.weight": ("embed",),
    "post_attention_norm.weight": ("embed",),
    "ffn_norm.weight": ("embed",),
    "post_ffw_norm.weight": ("embed",),
    "attn_q_norm.weight": ("head_dim",),
    "attn_k_norm.weight": ("head_dim",),
    "attn_q_a_norm.weight": ("rank",),
    "attn_kv_a_norm.weight": ("rank",),
    "attn_output.bias": ("embed",),
    "ffn_down.bias": ("embed",),
    "ffn_gate_inp_shexp.weight": ("embed",),
    "token_embd.weight": ("vocab", "embed"),
    "output.weight": ("vocab", "embed"),
    "output.bias": ("vocab",),
    "attn_q.weight": ("heads", "embed"),
    "attn_k.weight": ("kv_heads", "embed"),
    "attn_v.weight": ("kv_heads", "embed"),
    "attn_qkv.weight": ("qkv", "embed"),
    "attn_q.bias": ("heads",),
    "attn_k.bias": ("kv_heads",),
    "attn_v.bias": ("kv_heads",),
    "attn_qkv.bias": ("qkv",),
    "attn_output.weight": ("embed", "heads"),
    "attn_q_a.weight": ("rank", "embed"),
    "attn_q_b.weight": ("heads", "rank"),
    "attn_kv_a_mqa.weight": ("rank", "embed"),
    "attn_k_b.weight": ("heads", "rank", "head_dim"),
    "attn_v_b.weight": ("heads", "head_dim", "rank"),
    "attn_sinks.weight": ("heads",),
    "ffn_gate.weight": ("ffn", "embed"),
    "ffn_up.weight": ("ffn", "embed"),
    "ffn_down.weight": ("embed", "ffn"),
    "ffn_gate.bias": ("ffn",),
    "ffn_up.bias": ("ffn",),
    "ffn_gate_inp.weight": ("router", "embed"),
    "ffn_gate_inp.bias": ("router",),
    "exp_probs_b.bias": ("router",),
    "ffn_gate_exps.weight": ("experts", "expert_ffn", "embed"),
    "ffn_up_exps.weight": ("experts", "expert_ffn", "embed"),
    "ffn_down_exps.weight": ("experts", "embed", "expert_ffn"),
    "ffn_gate_exps.bias": ("experts", "expert_ffn"),
    "ffn_up_exps.bias": ("experts", "expert_ffn"),
    "ffn_down_exps.bias": ("experts", "embed"),
    "ffn_gate_shexp.weight": ("shared_ffn", "embed"),
    "ffn_up_shexp.weight": ("shared_ffn", "embed"),
    "ffn_down_shexp.weight": ("embed", "shared_ffn"),
}


@dataclass(frozen=True)
class TensorSpec:
    """One tensor that a file must, or may, hold."""

    role: str  # the name without its layer
    shape: tuple[int, ...]  # outermost first
    layer: int | None = None  # None: one for the whole model
    required: bool = True

    @property
    def name(self) -> str:
        return self.role if self.layer is None else f"blk.{self.layer}.{self.role}"

    @property
    def axes(self) -> Axes:
        """Logical axes, as many as shape has."""
        return AXES[self.role]

    @property
    def is_matrix(self) -> bool:
        """Whether the tensor is multiplied with activations, and so stays packed; vectors are kept in float32."""
        return len(self.shape) >= 2 and not self.role.endswith(".bias")


def stack_of(spec: TensorSpec, type: str) -> str:
    """The stack that a tensor of this ggml type belongs to: "attn_q.weight:Q4_K", or the role of a vector."""
    return f"{spec.role}:{type}" if spec.is_matrix else spec.role


def group_by_stack(
    specs: Iterable[TensorSpec], type_of: Callable[[TensorSpec], str]
) -> tuple[dict[str, list[TensorSpec]], list[dict[str, str]]]:
    """The tensors of a model by stack, in their order; and of each of its layers the stack of every role."""
    groups: dict[str, list[TensorSpec]] = {}
    of_layers: dict[int, dict[str, str]] = {}
    for spec in specs:
        stack = stack_of(spec, type_of(spec))
        if spec.layer is not None:
            of_layers.setdefault(spec.layer, {})[spec.role] = stack
        groups.setdefault(stack, []).append(spec)
    return groups, [of_layers[layer] for layer in sorted(of_layers)]


def expected_tensors(config: ModelConfig, present: Mapping[str, Any]) -> list[TensorSpec]:
    """The tensors of a model, in the order of its layers.

    Args:
        config: of the model.
        present: the file's tensors by name, to choose between the layouts a converter may use (fused or separate).
    """
    spec, c = config.spec, config
    table = [
        TensorSpec("token_embd.weight", (c.vocab_size, c.hidden_size)),
        TensorSpec("output_norm.weight", (c.hidden_size,)),
    ]
    if spec.tied != "always":
        table.append(TensorSpec("output.weight", (c.vocab_size, c.hidden_size), required=spec.tied == "never"))
    if spec.head_bias:
        table.append(TensorSpec("output.bias", (c.vocab_size,), required=False))
    if spec.rope_freqs:
        half = (c.ropes[0].dim // 2,)
        if c.ropes[0].scaling == "longrope" or c.architecture == "phi3":
            pair = ("rope_factors_long.weight", "rope_factors_short.weight")
            needed = c.ropes[0].scaling == "longrope" or any(name in present for name in pair)
            table += [TensorSpec(name, half, required=needed) for name in pair]
        else:
            table.append(TensorSpec("rope_freqs.weight", half, required=False))
    for layer in range(c.num_layers):
        table += _attention(config, layer, present)
        table += _feed_forward(config, layer)
    return table


def _attention(c: ModelConfig, layer: int, present: Mapping[str, Any]) -> list[TensorSpec]:
    spec, d = c.spec, c.hidden_size
    rows: list[TensorSpec] = []

    def add(role: str, *shape: int, required: bool = True) -> None:
        rows.append(TensorSpec(role, shape, layer, required))

    if spec.pre_norm:
        add("attn_norm.weight", d)
    if c.latent is not None:
        m, rotated = c.latent, c.ropes[0].dim
        if m.query_rank:
            add("attn_q_a.weight", m.query_rank, d)
            add("attn_q_a_norm.weight", m.query_rank)
            add("attn_q_b.weight", c.num_heads * m.key_dim, m.query_rank)
        else:
            add("attn_q.weight", c.num_heads * m.key_dim, d)
        add("attn_kv_a_mqa.weight", m.rank + rotated, d)
        add("attn_kv_a_norm.weight", m.rank)
        add("attn_k_b.weight", c.num_heads, m.rank, m.key_dim - rotated)
        add("attn_v_b.weight", c.num_heads, m.value_dim, m.rank)
        add("attn_output.weight", d, c.num_heads * m.value_dim)
        return rows
    q, k, v = c.num_heads * c.head_dim, c.num_kv_heads * c.head_dim, c.num_kv_heads * c.value_dim
    if f"blk.{layer}.attn_qkv.weight" in present:
        add("attn_qkv.weight", q + k + v, d)
        add("attn_qkv.bias", q + k + v, required=False)
    else:
        add("attn_q.weight", q, d)
        add("attn_k.weight", k, d)
        add("attn_v.weight", v, d)
    if f"blk.{layer}.attn_qkv.bias" not in present:
        add("attn_q.bias", q, required=False)
        add("attn_k.bias", k, required=False)
        add("attn_v.bias", v, required=False)
    if spec.qk_norm != "none":
        add("attn_q_norm.weight", c.head_dim if spec.qk_norm == "head" else q)
        add("attn_k_norm.weight", c.head_dim if spec.qk_norm == "head" else k)
    if spec.sinks:
        add("attn_sinks.weight", c.num_heads)
    add("attn_output.weight", d, c.num_heads * c.value_dim)
    if spec.output_bias != "none":
        add("attn_output.bias", d, required=spec.output_bias == "required")
    if spec.post_norm:
        add("post_attention_norm.weight", d)
    return rows


def _feed_forward(c: ModelConfig, layer: int) -> list[TensorSpec]:
    spec, d = c.spec, c.hidden_size
    rows: list[TensorSpec] = []

    def add(role: str, *shape: int, required: bool = True) -> None:
        rows.append(TensorSpec(role, shape, layer, required))

    if spec.pre_norm:
        add(f"{spec.ffn_norm}.weight", d)
    e = c.experts
    if e is None or layer < e.dense_layers:
        if c.ffn_size < 1:
            raise GGUFError(f"metadata key {c.architecture}.feed_forward_length is missing or 0")
        if spec.fused_gate_up:
            add("ffn_up.weight", 2 * c.ffn_size, d)
        else:
            add("ffn_gate.weight", c.ffn_size, d)
            add("ffn_up.weight", c.ffn_size, d)
        add("ffn_down.weight", d, c.ffn_size)
        if spec.ffn_bias:
            add("ffn_gate.bias", c.ffn_size, required=False)
            add("ffn_up.bias", c.ffn_size, required=False)
            add("ffn_down.bias", d, required=False)
    else:
        add("ffn_gate_inp.weight", e.count, d)
        if spec.router == "key":
            add("exp_probs_b.bias", e.count, required=False)
        add("ffn_gate_exps.weight", e.count, e.ffn_size, d)
        add("ffn_up_exps.weight", e.count, e.ffn_size, d)
        add("ffn_down_exps.weight", e.count, d, e.ffn_size)
        if spec.expert_bias:
            add("ffn_gate_inp.bias", e.count)
            add("ffn_gate_exps.bias", e.count, e.ffn_size)
            add("ffn_up_exps.bias", e.count, e.ffn_size)
            add("ffn_down_exps.bias", e.count, d)
        if e.shared_size:
            add("ffn_gate_shexp.weight", e.shared_size, d)
            add("ffn_up_shexp.weight", e.shared_size, d)
            add("ffn_down_shexp.weight", d, e.shared_size)
            if e.shared_gated:
                add("ffn_gate_inp_shexp.weight", d)
    if spec.post_norm:
        add("post_ffw_norm.weight", d)
    return rows


def check_model(file: Any, context_length: int | None = None) -> tuple[ModelConfig, list[TensorSpec]]:
    """The config of an opened file and the tensors to load from it: all checks that need no weights.

    Args:
        file: a realm_jax.gguf.GGUFFile.
        context_length: as for read_config.

    Returns:
        The config, and the specs of the tensors the file holds.

    Raises:
        UnsupportedModelError: the file holds something Realm does not implement, by name.
        GGUFError: a tensor is missing or of the wrong shape.
        InvalidRequestError: see read_config.
    """
    tensors = file.tensors
    embedding = tensors.get("token_embd.weight")
    architecture = file.metadata.get("general.architecture")
    # The architecture comes first: a file of another kind should be told so, not that a tensor is missing.
    config = read_config(file.metadata, embedding.shape[0] if embedding is not None else 0, context_length)
    if embedding is None:
        raise GGUFError(f"tensor token_embd.weight is missing; architecture {architecture} requires it")
    vocabulary = file.metadata.get("tokenizer.ggml.tokens")
    if isinstance(vocabulary, list) and len(vocabulary) != config.vocab_size:
        raise GGUFError(
            f"tensor token_embd.weight has {config.vocab_size} rows, and the vocabulary has {len(vocabulary)} tokens"
        )
    held: list[TensorSpec] = []
    expected: set[str] = set()
    for spec in expected_tensors(config, tensors):
        expected.add(spec.name)
        info = tensors.get(spec.name)
        if info is None:
            if spec.required:
                raise GGUFError(f"tensor {spec.name} is missing; architecture {architecture} requires it")
            continue
        if tuple(info.shape) != spec.shape and not _same_vector(tuple(info.shape), spec.shape):
            raise GGUFError(f"tensor {spec.name} has shape {tuple(info.shape)}; the metadata asks for {spec.shape}")
        if info.type in _INTEGERS:
            raise UnsupportedModelError(
                f"tensor {spec.name} is of type {info.type.name}; weights of a float or quantized type are accepted"
            )
        held.append(spec)
    for name in tensors:
        if name not in expected:
            raise UnsupportedModelError(
                f"tensor {name} is not one Realm knows for architecture {architecture}; "
                "ignoring it could change the model's output"
            )
    return config, held


def _same_vector(actual: tuple[int, ...], wanted: tuple[int, ...]) -> bool:
    """Some writers keep a vector as a matrix of one row."""
    return len(wanted) == 1 and len(actual) > 1 and actual[-1] == wanted[0] and all(n == 1 for n in actual[:-1])
