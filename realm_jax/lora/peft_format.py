"""Adapters in PEFT folders: adapter_config.json beside adapter_model.safetensors.

Module names and row orders are Hugging Face's; they are converted as llama.cpp's converter does a model's own weights.
"""

import json
import math
import os
import re
import stat
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from realm_jax.errors import AdapterError
from realm_jax.gguf.file import display_path
from realm_jax.gguf.header import quote
from realm_jax.lora.adapter import FLOAT32_MAX, Adapter, Builder, Place, name_of, permuted_rows
from realm_jax.model.adapters import EMBEDDING, HEAD
from realm_jax.model.config import ModelConfig

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
MAX_CONFIG_BYTES = 1 << 20
_TYPES = ("F32", "F16", "BF16")

# A layer's modules -> roles. What is not here has no single matrix in a GGUF file, or is no linear layer.
_LAYER_MODULES = {
    "self_attn.q_proj": "attn_q.weight",
    "self_attn.k_proj": "attn_k.weight",
    "self_attn.v_proj": "attn_v.weight",
    "self_attn.o_proj": "attn_output.weight",
    "self_attn.qkv_proj": "attn_qkv.weight",
    "self_attn.q_a_proj": "attn_q_a.weight",
    "self_attn.q_b_proj": "attn_q_b.weight",
    "self_attn.kv_a_proj_with_mqa": "attn_kv_a_mqa.weight",
    "mlp.gate_proj": "ffn_gate.weight",
    "mlp.up_proj": "ffn_up.weight",
    "mlp.gate_up_proj": "ffn_up.weight",
    "mlp.down_proj": "ffn_down.weight",
    "mlp.gate": "ffn_gate_inp.weight",
    "mlp.router": "ffn_gate_inp.weight",
    "block_sparse_moe.gate": "ffn_gate_inp.weight",
    "block_sparse_moe.router.layer": "ffn_gate_inp.weight",
    "mlp.shared_expert.gate_proj": "ffn_gate_shexp.weight",
    "mlp.shared_expert.up_proj": "ffn_up_shexp.weight",
    "mlp.shared_expert.down_proj": "ffn_down_shexp.weight",
    "mlp.shared_experts.gate_proj": "ffn_gate_shexp.weight",
    "mlp.shared_experts.up_proj": "ffn_up_shexp.weight",
    "mlp.shared_experts.down_proj": "ffn_down_shexp.weight",
    "shared_mlp.output_linear": "ffn_down_shexp.weight",
}
_MODULES = {"embed_tokens": EMBEDDING, "lm_head": HEAD}
_TENSOR = re.compile(r"base_model\.model\.(.+?)\.(?:lora_([AB])\.weight|lora_embedding_([AB]))")
_MODULE = re.compile(r"(?:model\.|language_model\.model\.|model\.language_model\.)?(?:layers\.([0-9]{1,5})\.)?(.+)")

# Keys of the config that change what is computed, with the values that change nothing.
_PLAIN: dict[str, tuple[Any, ...]] = {
    "use_dora": (False, None),
    "bias": ("none", None),
    "lora_bias": (False, None),
    "fan_in_fan_out": (False, None),
    "modules_to_save": (None, []),
    "trainable_token_indices": (None, [], {}),
    "layer_replication": (None, []),
    "alora_invocation_tokens": (None, []),
    "target_parameters": (None, []),
    "use_qalora": (False, None),
    "megatron_config": (None,),
    "init_lora_weights": (True, False, None, "gaussian", "eva", "orthogonal"),  # others change the base's weights
}
# What a pattern may consist of: a regular expression from a file must not be able to take forever.
_PATTERN = re.compile(r"\^?(?:[A-Za-z0-9_.|()]|\\\.|\\d\+?|\[[0-9-]+\])+\$?")


def read_peft(folder: str | os.PathLike[str], config: ModelConfig, shapes: Mapping[Place, tuple[int, ...]]) -> Adapter:
    """The adapter in a PEFT folder. AdapterError for whatever is wrong with it."""
    folder = Path(folder)
    builder = Builder(display_path(folder), config.architecture, shapes)
    for name in (CONFIG, WEIGHTS):
        try:
            regular = stat.S_ISREG(os.stat(folder / name).st_mode)
        except (OSError, ValueError):
            raise builder.fail(f"there is no {name} in it; a folder that PEFT has saved holds both") from None
        if not regular:
            raise builder.fail(f"{name} is no regular file")
    scaling = _Scaling(builder, _read_config(folder / CONFIG, builder))
    try:
        with safe_open(folder / WEIGHTS, framework="numpy") as file:
            return _read(file, scaling, config, builder)
    except (SafetensorError, OSError) as error:
        raise builder.fail(f"{WEIGHTS} cannot be read: {error}") from error


def _read_config(path: Path, builder: Builder) -> dict[str, Any]:
    with open(path, "rb") as file:
        raw = file.read(MAX_CONFIG_BYTES + 1)
    if len(raw) > MAX_CONFIG_BYTES:
        raise builder.fail(f"{CONFIG} is longer than the {MAX_CONFIG_BYTES} bytes that are accepted")
    try:
        values = json.loads(raw)
    except (ValueError, RecursionError) as error:
        raise builder.fail(f"{CONFIG} is not JSON: {error}") from error
    if not isinstance(values, dict):
        raise builder.fail(f"{CONFIG} is not a JSON object")
    if values.get("peft_type") != "LORA":
        raise builder.fail(f"{CONFIG}: peft_type is {_shown(values.get('peft_type'))}; 'LORA' is accepted")
    for key, accepted in _PLAIN.items():
        if key in values and not any(values[key] == a and type(values[key]) is type(a) for a in accepted):
            texts = ", ".join(json.dumps(a) for a in accepted)
            raise builder.fail(f"{CONFIG}: {key} is {_shown(values[key])}, which is not supported; accepted: {texts}")
    return values


def _shown(value: Any) -> str:
    return quote(value) if isinstance(value, str) else json.dumps(value)[:60]


class _Scaling:
    """Ranks and scales of modules, as the config gives them."""

    def __init__(self, builder: Builder, values: dict[str, Any]) -> None:
        self._builder = builder
        self.rank = self._integer("r", values.get("r"))
        self.alpha = self._number("lora_alpha", values.get("lora_alpha"))
        rooted = values.get("use_rslora") or False
        if not isinstance(rooted, bool):
            raise builder.fail(f"{CONFIG}: use_rslora is {_shown(rooted)}; true or false are accepted")
        self._rooted = rooted
        self._ranks = [(p, self._integer(f"rank_pattern {p!r}", v)) for p, v in self._pattern(values, "rank_pattern")]
        self._alphas = [(p, self._number(f"alpha_pattern {p!r}", v)) for p, v in self._pattern(values, "alpha_pattern")]

    def scale(self, module: str, rank: int) -> float:
        """Of a module whose matrices have this rank."""
        wanted = self._find(self._ranks, module, self.rank)
        if rank != wanted:
            raise self._builder.fail(f"{module}: the matrices have rank {rank}, but {CONFIG} says {wanted}")
        alpha = self._find(self._alphas, module, self.alpha)
        return alpha / (math.sqrt(rank) if self._rooted else rank)

    def _find(self, table: list[tuple[str, Any]], module: str, otherwise: Any) -> Any:
        """As PEFT does: the first pattern that is the module's name, or its end after a dot."""
        for pattern, value in table:
            if re.match(rf"(.*\.)?({pattern})$", module):
                return value
        return otherwise

    def _pattern(self, values: dict[str, Any], key: str) -> list[tuple[str, Any]]:
        table = values.get(key) or {}
        if not isinstance(table, dict) or len(table) > 4096:
            raise self._builder.fail(f"{CONFIG}: {key} is no object of at most 4096 entries")
        for pattern in table:
            try:
                known = len(pattern) <= 256 and _PATTERN.fullmatch(pattern) and re.compile(pattern)
            except re.error:
                known = None
            if not known:
                raise self._builder.fail(
                    f"{CONFIG}: {key} has the pattern {quote(pattern)}; names of modules, with \\d+, [0-9] and | for "
                    "layers, are accepted"
                )
        return list(table.items())

    def _integer(self, name: str, value: Any) -> int:
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise self._builder.fail(f"{CONFIG}: {name} is {_shown(value)}; a rank of at least 1 is accepted")
        return value

    def _number(self, name: str, value: Any) -> float:
        good = isinstance(value, (int, float)) and not isinstance(value, bool)
        if not good or abs(value) > FLOAT32_MAX or not math.isfinite(value):
            raise self._builder.fail(f"{CONFIG}: {name} is {_shown(value)}; a finite number is accepted")
        return float(np.float32(value))  # as a GGUF file of the same adapter holds it


def _read(file: Any, scaling: _Scaling, config: ModelConfig, builder: Builder) -> Adapter:
    halves: dict[Place, dict[str, str]] = {}
    modules: dict[Place, str] = {}
    for name in file.keys():  # noqa: SIM118  (no mapping)
        match = _TENSOR.fullmatch(name)
        if match is None:
            raise builder.fail(
                f"tensor {quote(name)} is no part of a plain LoRA adapter; base_model.model.<module>.lora_A.weight and "
                ".lora_B.weight are accepted"
            )
        module, linear, embedding = match.groups()
        place = _place(module, builder)
        if (place[0] == EMBEDDING) != bool(embedding):
            raise builder.fail(f"tensor {quote(name)}: lora_embedding_A and _B are for embed_tokens, and for it alone")
        builder.check_place(place, f"module {quote(module)}")
        if modules.setdefault(place, module) != module:
            raise builder.fail(f"modules {quote(module)} and {quote(modules[place])} are both {name_of(place)}")
        halves.setdefault(place, {})[(linear or embedding).lower()] = name
    for place, pair in halves.items():
        for half in "ab":
            if half not in pair:
                raise builder.fail(f"module {modules[place]}: there is no {half.upper()}; both matrices are needed")
        slices = {half: file.get_slice(name) for half, name in pair.items()}
        for half, part in slices.items():
            if part.get_dtype() not in _TYPES:
                raise builder.fail(
                    f"tensor {quote(pair[half])} is of type {part.get_dtype()}; accepted: {', '.join(_TYPES)}"
                )
        a, b = (tuple(slices[half].get_shape()) for half in "ab")
        embedding = place[0] == EMBEDDING
        rank = builder.check_pair(place, a[::-1] if embedding else a, b)
        heads = _rotated_heads(place[0], config)

        def read_a(name: str = pair["a"], transposed: bool = embedding) -> np.ndarray:
            values = file.get_tensor(name)
            return np.ascontiguousarray(values.T) if transposed else values

        def read_b(name: str = pair["b"], heads: int = heads) -> np.ndarray:
            values = file.get_tensor(name)
            return permuted_rows(values, heads) if heads else values

        builder.add(place, scaling.scale(modules[place], rank), read_a, read_b)
    return builder.build()


def _place(module: str, builder: Builder) -> Place:
    match = _MODULE.fullmatch(module)
    layer, name = match.groups() if match else (None, module)
    table = _MODULES if layer is None else _LAYER_MODULES
    if name not in table:
        raise builder.fail(
            f"module {quote(module)} is not one Realm applies adapters to; accepted: {', '.join(_MODULES)}, and of "
            f"layers.N: {', '.join(_LAYER_MODULES)}"
        )
    return table[name], None if layer is None else int(layer)


def _rotated_heads(role: str, config: ModelConfig) -> int:
    """Heads of a projection whose rows llama.cpp's converter permutes; 0 for others."""
    if config.spec.rope != "norm" or config.latent is not None:
        return 0
    return {"attn_q.weight": config.num_heads, "attn_k.weight": config.num_kv_heads}.get(role, 0)


def write_peft(
    adapter: Adapter, config: ModelConfig, folder: str | os.PathLike[str], *, dtype: Any = np.float16
) -> None:
    """Writes an adapter as PEFT does. Raises AdapterError when its pairs differ in rank or scale."""
    folder = Path(folder)
    ranks = {(pair.rank, pair.scale) for pair in adapter.pairs.values()}
    if len(ranks) != 1:
        raise AdapterError(f"the pairs have {len(ranks)} ranks and scales; one for all is accepted")
    [(rank, scale)] = ranks
    fused = {"attn_qkv.weight": "self_attn.qkv_proj", "ffn_up.weight": "mlp.gate_up_proj"}
    names = {role: module for module, role in reversed(_LAYER_MODULES.items())}
    if config.spec.fused_gate_up:
        names |= fused
    tensors, targets = {}, set()
    for (role, layer), pair in adapter.pairs.items():
        module = {EMBEDDING: "model.embed_tokens", HEAD: "lm_head"}.get(role) or f"model.layers.{layer}.{names[role]}"
        a, b, heads = pair.a, pair.b, _rotated_heads(role, config)
        if heads:
            b = permuted_rows(b, heads, undo=True)
        embedding = role == EMBEDDING
        if embedding:
            a = a.T
        for half, matrix in (("A", a), ("B", b)):
            suffix = f"lora_embedding_{half}" if embedding else f"lora_{half}.weight"
            tensors[f"base_model.model.{module}.{suffix}"] = np.ascontiguousarray(matrix, dtype)
        targets.add(module.rpartition(".")[2])
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / WEIGHTS)
    values = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": None,
        "r": rank,
        "lora_alpha": scale * rank,
        "target_modules": sorted(targets),
        "bias": "none",
        "use_dora": False,
        "use_rslora": False,
        "fan_in_fan_out": False,
        "modules_to_save": None,
        "inference_mode": True,
    }
    (folder / CONFIG).write_text(json.dumps(values, indent=1) + "\n")
