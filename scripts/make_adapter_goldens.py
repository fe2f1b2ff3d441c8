#!/usr/bin/env python3
"""Compute llama.cpp's logits of tiny models with LoRA adapters and write them to tests/golden/adapters/<case>.npz.

Needs llama-cpp-python, gguf and numpy, as make_goldens.py does, and realm_jax to write the adapter's file:

    python scripts/make_adapter_goldens.py

Each file holds the adapter (a GGUF file, float16), the scale it is used at, token ids, the positions kept, and their
logits. The adapters take every matrix of the model; of tied models not the embedding, for which llama.cpp fails.
"""

import ctypes
import tempfile
from pathlib import Path

import make_goldens
import numpy as np
import random_adapters
import tiny_models

from realm_jax.lora import weight_shapes
from realm_jax.lora.gguf_format import write_gguf
from realm_jax.model import load_model
from realm_jax.model.adapters import EMBEDDING, HEAD

GOLDENS = make_goldens.REPOSITORY / "tests" / "golden" / "adapters"
CASES = {"llama": 5, "qwen2": 8, "gemma3": 4}  # and the adapters' ranks
ALPHA, SCALE = 6.0, 1.5


def main() -> None:
    import llama_cpp

    llama_cpp.llama_log_set(make_goldens._log_errors, ctypes.c_void_p(0))
    llama_cpp.llama_backend_init()
    GOLDENS.mkdir(parents=True, exist_ok=True)
    tokens = tiny_models.token_ids(24)
    with tempfile.TemporaryDirectory() as folder:
        path, adapter_path = Path(folder) / "model.gguf", Path(folder) / "adapter.gguf"
        for case, rank in CASES.items():
            tiny_models.write_tiny_model(case, path)
            model = load_model(path)
            tied = HEAD not in model.params.tables
            adapter = random_adapters.random_adapter(
                weight_shapes(model),
                rank,
                architecture=model.config.architecture,
                alpha=ALPHA,
                takes=lambda place, tied=tied: not tied or place[0] not in (EMBEDDING, HEAD),
            )
            write_gguf(adapter, adapter_path, ALPHA)
            plain = make_goldens.llama_cpp_logits(path, tokens, 512)
            logits = make_goldens.llama_cpp_logits(path, tokens, 512, adapter_path, SCALE)
            positions = np.arange(5, len(tokens), 6)
            print(f"{case:10s} NMSE of the plain model {random_adapters.nmse(logits, plain):.1e}")
            np.savez_compressed(
                GOLDENS / f"{case}.npz",
                adapter=np.frombuffer(adapter_path.read_bytes(), np.uint8),
                scale=np.float32(SCALE),
                tokens=np.array(tokens, np.int32),
                positions=positions.astype(np.int32),
                logits=logits[positions],
            )


if __name__ == "__main__":
    main()
