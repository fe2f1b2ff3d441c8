"""Model files of real shapes and random weights, to time engines on types that no small real model comes in."""

import sys
from dataclasses import dataclass, replace
from pathlib import Path

import gguf
import numpy as np
from gguf import GGMLQuantizationType

from .environment import ROOT

sys.path.append(str(ROOT / "tests"))

from random_blocks import RandomBits, random_blocks  # of tests/, put on the path above

LEGACY = ("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0")
K_QUANTS = ("Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K")
IQ_TYPES = ("IQ1_S", "IQ1_M", "IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ3_XXS", "IQ3_S", "IQ4_NL", "IQ4_XS")
OTHERS = ("TQ1_0", "TQ2_0", "MXFP4")
MIXTURES = ("Q4_K_M",)
ALL_TYPES = (*LEGACY, *K_QUANTS, *IQ_TYPES, *OTHERS)

_BYTES = [f"<0x{b:02X}>" for b in range(256)]
_TEMPLATE_ROWS = 1024  # random rows of a type and a width; matrices draw theirs from them


@dataclass(frozen=True)
class Shape:
    """Of a Llama model whose output matrix is its embedding."""

    layers: int
    hidden: int
    ffn: int
    heads: int
    kv_heads: int
    vocabulary: int
    context: int = 8192

    def matrices(self) -> list[tuple[str, int, int]]:
        """(name, N, K) of a layer's."""
        kv = self.hidden // self.heads * self.kv_heads
        return [
            ("attn_q", self.hidden, self.hidden),
            ("attn_k", kv, self.hidden),
            ("attn_v", kv, self.hidden),
            ("attn_output", self.hidden, self.hidden),
            ("ffn_gate", self.ffn, self.hidden),
            ("ffn_up", self.ffn, self.hidden),
            ("ffn_down", self.hidden, self.ffn),
        ]


SHAPES = {
    "1b": Shape(16, 2048, 8192, 32, 8, 49152),
    "8b": Shape(32, 4096, 14336, 32, 8, 128256),
    "tiny": Shape(2, 256, 512, 4, 2, 512, context=1024),
}


def with_layers(shape: Shape, layers: int | None) -> Shape:
    """The shape cut to fewer layers, or as it is."""
    return shape if layers is None else replace(shape, layers=layers)


def type_of(mixture: str, role: str, layer: int, layers: int) -> str:
    """The ggml type of a matrix ("attn_v", "token_embd", ...) in a file of one type or of a mixture of types.

    The output matrix is Q6_K or Q8_0, as llama.cpp's quantizer makes it. Q4_K_M keeps half of attn_v and ffn_down in
    Q6_K: the first and last eighth of the layers and every third between.
    """
    if role in ("token_embd", "output"):
        return "Q8_0" if mixture == "Q8_0" else "Q6_K"
    if mixture != "Q4_K_M":
        return mixture
    edge = layers // 8
    more = layer < edge or layer >= layers - edge or (layer - edge) % 3 == 2
    return "Q6_K" if more and role in ("attn_v", "ffn_down") else "Q4_K"


def write_model(path: Path, shape: Shape, mixture: str) -> None:
    """Writes a GGUF file, a tensor at a time; under another name until it is whole."""
    partial = path.with_name(path.name + ".part")
    writer = gguf.GGUFWriter(str(partial), "llama")
    _add_metadata(writer, shape, mixture)
    tensors: list[tuple[str, str, int, int]] = []  # name, type, N, K; N 0 for a vector
    embedding = type_of(mixture, "token_embd", 0, shape.layers)
    tensors.append(("token_embd.weight", embedding, shape.vocabulary, shape.hidden))
    tensors.append(("output_norm.weight", "F32", 0, shape.hidden))
    for layer in range(shape.layers):
        for norm in ("attn_norm", "ffn_norm"):
            tensors.append((f"blk.{layer}.{norm}.weight", "F32", 0, shape.hidden))
        for role, n, k in shape.matrices():
            kind = type_of(mixture, role, layer, shape.layers)
            tensors.append((f"blk.{layer}.{role}.weight", kind, n, k))
    for name, kind, n, k in tensors:
        block, size = gguf.GGML_QUANT_SIZES[GGMLQuantizationType[kind]]
        if k % block:
            raise ValueError(f"{kind} needs rows of a multiple of {block} elements, not {k}")
        width = k // block * size
        stored = [k] if not n else [n, width]  # gguf-py takes bytes for packed types, elements for the others
        dtype = np.dtype(np.float32 if not n else np.uint8)
        writer.add_tensor_info(name, stored, dtype, max(n, 1) * width, GGMLQuantizationType[kind])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    rng = np.random.default_rng(0)
    templates: dict[tuple[str, int], np.ndarray] = {}
    for _, kind, n, k in tensors:
        if not n:
            writer.write_tensor_data(np.ones(k, np.float32))
            continue
        if (kind, k) not in templates:
            bits = RandomBits(0, f"{kind}/{k}")
            templates[kind, k] = random_blocks(kind, (_TEMPLATE_ROWS, k), k**-0.5, bits)
        rows = rng.integers(0, _TEMPLATE_ROWS, n)
        writer.write_tensor_data(templates[kind, k][rows])
    writer.close()
    partial.replace(path)


def _add_metadata(writer: gguf.GGUFWriter, shape: Shape, mixture: str) -> None:
    writer.add_name(f"random weights, {mixture}")
    writer.add_context_length(shape.context)
    writer.add_embedding_length(shape.hidden)
    writer.add_block_count(shape.layers)
    writer.add_feed_forward_length(shape.ffn)
    writer.add_head_count(shape.heads)
    writer.add_head_count_kv(shape.kv_heads)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(10000.0)
    writer.add_rope_dimension_count(shape.hidden // shape.heads)
    writer.add_vocab_size(shape.vocabulary)
    words = [f"\u2581w{i}" for i in range(shape.vocabulary - 3 - len(_BYTES))]
    writer.add_tokenizer_model("llama")
    writer.add_tokenizer_pre("default")
    writer.add_token_list(["<unk>", "<s>", "</s>", *_BYTES, *words])
    writer.add_token_scores([0.0] * (3 + len(_BYTES)) + [-float(i) for i in range(len(words))])
    writer.add_token_types([2, 3, 3] + [6] * len(_BYTES) + [1] * len(words))
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)
