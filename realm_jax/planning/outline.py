"""What a plan has to know of a model: its config, and shape and type of every tensor; no weights. No jax in here."""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pallas_kernels.quant_matmul.formats import FORMATS
from realm_jax import registry
from realm_jax.checkpoint import open_model
from realm_jax.errors import GGUFError, InvalidRequestError, ModelNotFoundError
from realm_jax.gguf.header import quote
from realm_jax.model.config import ModelConfig, read_config
from realm_jax.model.partition import Partition
from realm_jax.model.tensors import TensorSpec, check_model, expected_tensors

MAX_CONFIG_BYTES = 1 << 20
MAX_VOCABULARY = 1 << 24
DEFAULT_TYPE = "BF16"  # as models are published
_TYPES = tuple(name for name, fmt in FORMATS.items() if fmt.dtype != "i32")
_TIED = "tie_word_embeddings"
_ROUTER = "ffn_gate_inp.weight"  # small, and float32 in files


def _llama(layers: int, hidden: int, heads: int, ffn: int, **more: Any) -> dict[str, Any]:
    """Metadata as of Llama 3.1's files."""
    return {
        "general.architecture": "llama",
        "llama.vocab_size": 128_256,
        "llama.context_length": 131_072,
        "llama.block_count": layers,
        "llama.embedding_length": hidden,
        "llama.feed_forward_length": ffn,
        "llama.attention.head_count": heads,
        "llama.attention.head_count_kv": 8,
        "llama.attention.layer_norm_rms_epsilon": 1e-5,
        "llama.rope.freq_base": 500_000.0,
    } | more


# Configs that need no file, each as its publisher's config.json has it: Llama 3.2 1B, Llama 3.1 8B, 70B and 405B,
# Mixtral 8x7B.
SHAPES: dict[str, dict[str, Any]] = {
    "llama-1b": _llama(16, 2048, 32, 8192, **{_TIED: True}),
    "llama-8b": _llama(32, 4096, 32, 14_336),
    "llama-70b": _llama(80, 8192, 64, 28_672),
    "llama-405b": _llama(126, 16_384, 128, 53_248),
    "mixtral-8x7b": _llama(32, 4096, 32, 14_336)
    | {
        "llama.vocab_size": 32_000,
        "llama.context_length": 32_768,
        "llama.rope.freq_base": 1e6,
        "llama.expert_count": 8,
        "llama.expert_used_count": 2,
    },
}


@dataclass(frozen=True)
class Outline:
    """A model without its weights.

    name: as the user named it. types: by tensor name, of a file's tensors. parameters: elements of all of them.
    """

    name: str
    config: ModelConfig
    specs: tuple[TensorSpec, ...]
    types: Mapping[str, str]

    @property
    def parameters(self) -> int:
        return sum(math.prod(spec.shape) for spec in self.specs)

    @property
    def blocks(self) -> dict[str, int]:
        """By tensor name, elements of a block of its packed type."""
        return {spec.name: FORMATS[self.types[spec.name]].block for spec in self.specs}

    @property
    def matrix_types(self) -> tuple[str, ...]:
        """Types of the matrices, the one that holds most elements first."""
        held: dict[str, int] = {}
        for spec in self.specs:
            if spec.is_matrix:
                held[self.types[spec.name]] = held.get(self.types[spec.name], 0) + math.prod(spec.shape)
        return tuple(sorted(held, key=lambda name: -held[name]))

    def local_bytes(self, spec: TensorSpec, partition: Partition) -> int:
        """Of what one device holds of a tensor, as it is loaded: matrices packed in rows, vectors in float32."""
        shape = partition.local_shape(spec)
        if not spec.is_matrix:
            return 4 * math.prod(shape)
        return packed_bytes(shape, self.types[spec.name])


def packed_bytes(shape: tuple[int, ...], type: str) -> int:
    """Of a matrix [..., K] of a ggml type in memory. ValueError when K is no multiple of the type's block."""
    return sum(math.prod(s) * dtype.itemsize for s, dtype in FORMATS[type].spec(shape).values())


def read_outline(model: str | Path, context_length: int | None = None) -> Outline:
    """Reads what there is to know.

    Args:
        model: a name of SHAPES, a JSON file of GGUF metadata (see metadata_outline), either with ":TYPE" behind it for
            the type of its matrices; or the path of a GGUF file or checkpoint, or a name of the registry that is
            downloaded: its header is read.
        context_length: as for read_config.

    Raises:
        ModelNotFoundError: none of these. GGUFError, UnsupportedModelError, InvalidRequestError: see check_model; and
            metadata or a type that cannot be planned for.
    """
    text = str(model)
    name, colon, type = text.rpartition(":")
    if not colon or not (name in SHAPES or name.endswith(".json")):
        name, type = text, DEFAULT_TYPE
    if name in SHAPES:
        return metadata_outline(text, SHAPES[name], _known(type), context_length)
    if name.endswith(".json"):
        return metadata_outline(text, _read_json(name), _known(type), context_length)
    try:
        path = registry.find(model)
    except ModelNotFoundError as error:
        if "/" in text or text.endswith(".gguf"):
            raise
        raise ModelNotFoundError(f"{error}; nor a shape to plan for: {', '.join(SHAPES)}") from None
    with open_model(path) as file:
        config, specs = check_model(file, context_length)
        types = {spec.name: file.tensors[spec.name].type.name for spec in specs}
    return Outline(text, config, tuple(specs), types)


def metadata_outline(
    name: str, metadata: Mapping[str, Any], type: str = DEFAULT_TYPE, context_length: int | None = None
) -> Outline:
    """A model of which there is only a config.

    Every matrix is of one type; vectors, and the router of a mixture, are float32, as llama.cpp keeps them. Optional
    tensors other than the output head are left out: they are small.

    Args:
        name: for messages.
        metadata: keys and values as in a GGUF file. "general.architecture" and that architecture's "vocab_size" must be
            there; "tie_word_embeddings" (false when left out) says that the output head is the embedding.
        type: a ggml type.
        context_length: as for read_config.
    """
    keys = {key: _checked(name, key, value) for key, value in metadata.items()}
    tied = keys.pop(_TIED, False)
    if not isinstance(tied, bool):
        raise InvalidRequestError(f"{name}: {_TIED} must be true or false")
    size = keys.get(f"{keys.get('general.architecture')}.vocab_size")
    if isinstance(size, bool) or not isinstance(size, int) or not 1 <= size <= MAX_VOCABULARY:
        # A missing or unknown architecture is said first.
        read_config(keys, 1, context_length)
        raise InvalidRequestError(
            f"{name}: {keys['general.architecture']}.vocab_size must be an integer from 1 to {MAX_VOCABULARY:,}"
        )
    config = read_config(keys, size, context_length)
    # Converters of architectures with a fused feed-forward block fuse these, too.
    fused = [f"blk.{i}.attn_qkv.weight" for i in range(config.num_layers) if config.spec.fused_gate_up]
    specs = tuple(
        spec
        for spec in expected_tensors(config, dict.fromkeys(fused))
        if spec.required or (spec.role == "output.weight" and not tied)
    )
    types = {spec.name: type if spec.is_matrix and spec.role != _ROUTER else "F32" for spec in specs}
    for spec in specs:
        try:
            packed_bytes(spec.shape, types[spec.name])
        except ValueError as error:
            raise InvalidRequestError(f"{name}: {spec.name}: {error}; accepted: another type") from None
    return Outline(name, config, specs, types)


def _checked(name: str, key: str, value: Any) -> Any:
    """A value as a file could hold it: a scalar, or an array of one kind."""
    kinds = {type(one) for one in value} if isinstance(value, list) else {type(value)}
    if len(kinds) == 1 and kinds <= {str, bool, int, float}:
        return value
    raise GGUFError(f"{name}: metadata key {quote(key)} is no number, text, flag or list of one of these")


def _known(type: str) -> str:
    if type.upper() not in _TYPES:
        raise InvalidRequestError(f"tensor type {quote(type)} is not known; accepted: {', '.join(_TYPES)}")
    return type.upper()


def _read_json(path: str) -> dict[str, Any]:
    """A JSON object of metadata."""
    try:
        with open(path, "rb") as file:
            data = file.read(MAX_CONFIG_BYTES + 1)
    except (OSError, ValueError) as error:
        reason = (error.strerror if isinstance(error, OSError) else None) or error
        raise ModelNotFoundError(f"cannot read {quote(path)}: {reason}") from error
    accepted = "accepted: one JSON object of GGUF metadata"
    if len(data) > MAX_CONFIG_BYTES:
        raise GGUFError(f"{quote(path)} has more than {MAX_CONFIG_BYTES:,} bytes; {accepted}")
    try:
        value = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise GGUFError(f"{quote(path)} is no JSON ({error}); {accepted}") from None
    if not isinstance(value, dict):
        raise GGUFError(f"{quote(path)} holds a {type(value).__name__}; {accepted}")
    return value
