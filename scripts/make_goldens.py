#!/usr/bin/env python3
"""Compute llama.cpp's logits for every tiny model and write them to tests/golden/logits/<case>.npz.

Needs llama-cpp-python (the oracle; no part of realm_jax needs it), gguf and numpy:

    pip install llama-cpp-python==0.3.36 gguf==0.19.0
    python scripts/make_goldens.py              # all cases
    python scripts/make_goldens.py llama gemma2 # some
    python scripts/make_goldens.py --quantized  # llama.cpp's distance from the reference on packed weights
    python scripts/make_goldens.py --perplexity SmolLM2-135M-Instruct.Q4_1.gguf  # and divergence, on the file LICENSE

llama.cpp runs with flash attention off and a float32 key/value cache, so that with float32 weights its logits differ
from exact arithmetic only by rounding (and, for gemma, its half-precision GELU table). Each file holds the token ids,
the positions kept (every fourth, to keep the repository small), the logits there (float32 [positions, vocab]), and a
digest of the model's tensors, which tells a change of the models from an error of the forward.

With packed weights llama.cpp rounds activations to 8 bits, which small random models amplify; its distance from a float
forward on the same dequantized weights goes to tests/golden/packed_distances.json, for the tests to print beside ours.
"""

import argparse
import ctypes
import json
import sys
import tempfile
from pathlib import Path

import numpy as np

REPOSITORY = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(REPOSITORY / "tests"))

import tiny_models  # noqa: E402  (lives in tests/, put on the path above)

GOLDENS = REPOSITORY / "tests" / "golden" / "logits"
DISTANCES = REPOSITORY / "tests" / "golden" / "packed_distances.json"
PERPLEXITY = REPOSITORY / "tests" / "golden" / "perplexity.json"
EVERY = 4
DIVERGENCE_CHUNKS, DIVERGENCE_TOKENS = 8, 256


def llama_cpp_logits(
    path: Path, tokens: list[int], context: int, adapter: Path | None = None, scale: float = 1.0
) -> np.ndarray:
    """float32 [T, vocab]: llama.cpp's logits at every position, the whole sequence in one batch, with an adapter."""
    import llama_cpp

    model_params = llama_cpp.llama_model_default_params()
    model_params.n_gpu_layers = 0
    model_params.use_mmap = False
    model = llama_cpp.llama_model_load_from_file(str(path).encode(), model_params)
    if not model:
        raise SystemExit(f"llama.cpp does not load {path.name}")
    context_params = llama_cpp.llama_context_default_params()
    context_params.n_ctx = context
    context_params.n_batch = context_params.n_ubatch = len(tokens)
    context_params.n_threads = context_params.n_threads_batch = 2
    context_params.flash_attn_type = llama_cpp.LLAMA_FLASH_ATTN_TYPE_DISABLED
    context_params.type_k = context_params.type_v = llama_cpp.GGML_TYPE_F32
    handle = llama_cpp.llama_init_from_model(model, context_params)
    if not handle:
        raise SystemExit(f"llama.cpp makes no context for {path.name}")
    if adapter is not None:
        lora = llama_cpp.llama_adapter_lora_init(model, str(adapter).encode())
        if not lora:
            raise SystemExit(f"llama.cpp does not load {adapter.name}")
        loras = (llama_cpp.llama_adapter_lora_p_ctypes * 1)(lora)
        if llama_cpp.llama_set_adapters_lora(handle, loras, 1, (ctypes.c_float * 1)(scale)) != 0:
            raise SystemExit(f"llama.cpp does not use {adapter.name}")
    batch = llama_cpp.llama_batch_init(len(tokens), 0, 1)
    try:
        batch.n_tokens = len(tokens)
        for i, token in enumerate(tokens):
            batch.token[i], batch.pos[i], batch.n_seq_id[i], batch.logits[i] = token, i, 1, 1
            batch.seq_id[i][0] = 0
        status = llama_cpp.llama_decode(handle, batch)
        if status != 0:
            raise SystemExit(f"llama_decode returned {status} for {path.name}")
        vocabulary = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(model))
        rows = [
            np.ctypeslib.as_array(llama_cpp.llama_get_logits_ith(handle, i), (vocabulary,)) for i in range(len(tokens))
        ]
        return np.array(rows, np.float32)
    finally:
        llama_cpp.llama_batch_free(batch)
        llama_cpp.llama_free(handle)
        llama_cpp.llama_model_free(model)


def llama_cpp_perplexity(path: Path, text: str, context: int = 512) -> tuple[float, int]:
    """llama.cpp's perplexity and its number of chunks: chunks do not overlap, and the second half of each is scored."""
    import llama_cpp

    vocabulary = llama_cpp.Llama(str(path), vocab_only=True, verbose=False)
    add_bos = bool(llama_cpp.llama_vocab_get_add_bos(vocabulary._model.vocab))
    tokens = vocabulary.tokenize(text.encode(), add_bos=add_bos)
    losses = []
    for at in range(0, len(tokens) - context + 1, context):
        chunk = tokens[at : at + context]
        if add_bos:
            chunk[0] = vocabulary.token_bos()
        logits = llama_cpp_logits(path, chunk, context)[context // 2 : -1].astype(np.float64)
        logits -= logits.max(1, keepdims=True)
        wanted = np.array(chunk[context // 2 + 1 :])[:, None]
        losses.append(np.log(np.exp(logits).sum(1)) - np.take_along_axis(logits, wanted, 1)[:, 0])
    return float(np.exp(np.concatenate(losses).mean())), len(losses)


@ctypes.CFUNCTYPE(None, ctypes.c_int, ctypes.c_char_p, ctypes.c_void_p)
def _log_errors(level: int, text: bytes, _: ctypes.c_void_p) -> None:
    if level == 4:  # GGML_LOG_LEVEL_ERROR
        sys.stderr.write(text.decode(errors="replace"))


def nmse(reference: np.ndarray, other: np.ndarray) -> float:
    """sum((a - b)^2) / sum(a^2)."""
    a, b = reference.astype(np.float64), other.astype(np.float64)
    return float(((a - b) ** 2).sum() / (a**2).sum())


def divergence(reference: np.ndarray, other: np.ndarray) -> float:
    """Mean over positions of the Kullback-Leibler divergence of other's softmax from the reference's, in nats."""
    p, q = (x.astype(np.float64) - x.max(1, keepdims=True) for x in (reference, other))
    p, q = (x - np.log(np.exp(x).sum(1, keepdims=True)) for x in (p, q))
    return float((np.exp(p) * (p - q)).sum(1).mean())


def llama_cpp_divergence(path: Path, text: str) -> float:
    """llama.cpp's divergence from Realm's float32 path, which tests hold to the reference, over chunks of a text."""
    from realm_jax import LLM

    with LLM(str(path), backend="xla") as exact:
        tokens = exact.tokenize(text)
        chunks = [tokens[i * DIVERGENCE_TOKENS :][:DIVERGENCE_TOKENS] for i in range(DIVERGENCE_CHUNKS)]
        each = [divergence(exact.logits(c), llama_cpp_logits(path, c, DIVERGENCE_TOKENS)) for c in chunks]
    return float(np.mean(each))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cases", nargs="*", help="cases of tests/tiny_models.py (default: all)")
    parser.add_argument("--quantized", action="store_true", help="packed models, distances only")
    parser.add_argument("--perplexity", metavar="MODEL", type=Path, help="only this: llama.cpp's perplexity on LICENSE")
    arguments = parser.parse_args()
    table = tiny_models.QUANTIZED_CASES if arguments.quantized else tiny_models.CASES
    unknown = [case for case in arguments.cases if case not in table]
    if unknown:
        parser.error(f"unknown cases {unknown}; there are {list(table)}")

    import llama_cpp
    import reference_model

    llama_cpp.llama_log_set(_log_errors, ctypes.c_void_p(0))
    llama_cpp.llama_backend_init()
    if arguments.perplexity:
        value, chunks = llama_cpp_perplexity(arguments.perplexity, (REPOSITORY / "LICENSE").read_text())
        print(f"perplexity {value:.4f} over {chunks} chunks of 512 tokens")
        kl = llama_cpp_divergence(arguments.perplexity, (REPOSITORY / "LICENSE").read_text())
        print(f"divergence from float32 {kl:.3e} over {DIVERGENCE_CHUNKS} chunks of {DIVERGENCE_TOKENS} tokens")
        record = {
            "text": "LICENSE",
            "context_length": 512,
            "chunks": chunks,
            "llama.cpp": round(value, 4),
            "divergence_chunks": DIVERGENCE_CHUNKS,
            "divergence_tokens": DIVERGENCE_TOKENS,
            "llama.cpp divergence": float(f"{kl:.4e}"),
        }
        PERPLEXITY.write_text(json.dumps(record, indent=1) + "\n")
        return
    tokens = tiny_models.token_ids()
    GOLDENS.mkdir(parents=True, exist_ok=True)
    distances = {}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.gguf"
        for case in arguments.cases or table:
            spec = tiny_models.tiny_spec(case)
            context = int(str(spec.metadata[f"{spec.architecture}.context_length"]))
            digest = tiny_models.write_tiny_model(case, path)
            logits = llama_cpp_logits(path, tokens, context)
            distance = nmse(reference_model.reference_logits(path, tokens, context_length=context), logits)
            print(
                f"{case:28s} NMSE from the reference {distance:8.1e}   spread of logits {logits.std():.2f}", flush=True
            )
            distances[case] = float(f"{distance:.2g}")
            if not arguments.quantized:
                positions = np.arange(EVERY - 1, len(tokens), EVERY)
                np.savez_compressed(
                    GOLDENS / f"{case}.npz",
                    tokens=np.array(tokens, np.int32),
                    positions=positions.astype(np.int32),
                    logits=logits[positions],
                    digest=np.array(digest),
                )
    if arguments.quantized:
        known = json.loads(DISTANCES.read_text()) if DISTANCES.exists() else {}
        kept = {case: value for case, value in (known | distances).items() if case in table}
        DISTANCES.write_text(json.dumps(kept, indent=1, sort_keys=True) + "\n")


if __name__ == "__main__":
    main()
