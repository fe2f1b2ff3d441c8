"""Model files of real shapes and random weights, to time engines on types that no small real model comes in."""

import sys
from pathlib import Path

import gguf
import numpy as np
from gguf import GGMLQuantizationType

from .environment import ROOT
from .shapes import Shape, type_of

sys.path.append(str(ROOT / "tests"))

from random_blocks import RandomBits, random_blocks  # of tests/, put on the path above

_BYTES = [f"<0x{b:02X}>" for b in range(256)]
_TEMPLATE_ROWS = 1024  # random rows of a type and a width; matrices draw theirs from them


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
