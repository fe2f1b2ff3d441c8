#!/usr/bin/env python3
"""Prints a table of Realm beside llama.cpp on the same file in the same run: loading, memory, first token, throughput.

    python scripts/compare_speed.py [MODEL] [--threads N]

Needs llama-cpp-python (`pip install -e ".[oracle]"`; without it the table has Realm's column only). Each engine runs in
a process of its own, one after the other, on an otherwise idle machine. Realm runs as `realm bench` does, first with an
empty compile cache ("cold" compiles), then again with the programs on disk. llama.cpp is measured through its low-level
API: llama_decode and llama_synchronize, greedy tokens picked from the logits it returns.
"""

import argparse
import ctypes
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

PREFILLS = (128, 256)
BATCHES = (1, 2, 4, 8)
PROMPT, DECODED, REPEATS = 16, 32, 3  # as realm_jax.bench


def realm(model: str, compiled: str) -> dict[str, Any]:
    """Figures of `realm bench` in a fresh process, and its peak memory."""
    code = (
        "import json, resource, sys; from realm_jax.bench import bench; figures = bench(sys.argv[1]);"
        "figures['peak_bytes'] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024; print(json.dumps(figures))"
    )
    environment = os.environ | {"JAX_COMPILATION_CACHE_DIR": compiled}
    done = subprocess.run([sys.executable, "-c", code, model], env=environment, check=True, stdout=subprocess.PIPE)
    return json.loads(done.stdout)


class LlamaCpp:
    """One model and context of llama.cpp, by its C interface."""

    def __init__(self, path: str, threads: int):
        import llama_cpp

        self.lib = llama_cpp
        log = llama_cpp.llama_log_callback(lambda *_: None)
        self._log = log  # kept: C calls it
        llama_cpp.llama_log_set(log, ctypes.c_void_p(0))
        begun = time.perf_counter()
        self.model = llama_cpp.llama_model_load_from_file(path.encode(), llama_cpp.llama_model_default_params())
        params = llama_cpp.llama_context_default_params()
        params.n_ctx, params.n_batch, params.n_seq_max = 4096, 512, max(BATCHES)
        params.n_threads = params.n_threads_batch = threads
        self.context = llama_cpp.llama_init_from_model(self.model, params)
        self.load_seconds = time.perf_counter() - begun
        self.batch = llama_cpp.llama_batch_init(512, 0, 1)
        self.vocab = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(self.model))

    def clear(self) -> None:
        self.lib.llama_memory_clear(self.lib.llama_get_memory(self.context), True)

    def decode(self, rows: list[tuple[int, int, list[int]]]) -> list[int]:
        """Append (sequence, position, tokens) in one batch; the most likely next token of each."""
        n = 0
        last = []
        for sequence, position, tokens in rows:
            for i, token in enumerate(tokens):
                self.batch.token[n] = token
                self.batch.pos[n] = position + i
                self.batch.n_seq_id[n] = 1
                self.batch.seq_id[n][0] = sequence
                self.batch.logits[n] = i == len(tokens) - 1
                n += 1
            last.append(n - 1)
        self.batch.n_tokens = n
        if self.lib.llama_decode(self.context, self.batch) != 0:
            raise RuntimeError("llama_decode failed")
        self.lib.llama_synchronize(self.context)
        import numpy as np

        logits = [self.lib.llama_get_logits_ith(self.context, i) for i in last]
        return [int(np.ctypeslib.as_array(row, shape=(self.vocab,)).argmax()) for row in logits]


def llama_cpp(path: str, threads: int) -> dict[str, Any]:
    """The same figures for llama.cpp, measured in this process."""
    import resource

    import numpy as np

    engine = LlamaCpp(path, threads)

    def prompt(length: int, number: int) -> list[int]:
        return np.random.default_rng([length, number]).integers(0, engine.vocab, length).tolist()

    def prefill(length: int) -> float:
        engine.clear()
        begun = time.perf_counter()
        engine.decode([(0, 0, prompt(length, 0))])
        return time.perf_counter() - begun

    def decoding(batch: int) -> float:
        engine.clear()
        tokens = engine.decode([(i, 0, prompt(PROMPT, i)) for i in range(batch)])
        begun = time.perf_counter()
        for step in range(DECODED):
            tokens = engine.decode([(i, PROMPT + step, [token]) for i, token in enumerate(tokens)])
        return time.perf_counter() - begun

    figures: dict[str, Any] = {"load_seconds": engine.load_seconds}
    for length in PREFILLS:
        first = prefill(length)
        seconds = statistics.median(prefill(length) for _ in range(REPEATS))
        figures[f"prefill_{length}"] = length / seconds
        if length == PREFILLS[0]:
            figures |= {"first_token_cold_seconds": first, "first_token_warm_seconds": seconds}
    for batch in BATCHES:
        decoding(batch)
        seconds = statistics.median(decoding(batch) for _ in range(REPEATS))
        figures[f"decode_{batch}"] = batch * DECODED / seconds
    figures["peak_bytes"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return figures


def peer(path: str, threads: int) -> dict[str, Any]:
    """`llama_cpp` in a fresh process; empty where llama-cpp-python is not installed."""
    command = [sys.executable, __file__, path, "--threads", str(threads), "--peer"]
    done = subprocess.run(command, capture_output=True, text=True)
    if "No module named 'llama_cpp'" in done.stderr:
        print("llama-cpp-python is not installed: Realm alone", file=sys.stderr)
        return {}
    if done.returncode != 0:
        raise SystemExit(f"error: llama.cpp failed: {done.stderr.strip().splitlines()[-1]}")
    return json.loads(done.stdout)


def table(cold: dict[str, Any], warm: dict[str, Any], other: dict[str, Any]) -> list[tuple[str, str, str]]:
    """Rows of (what, Realm, llama.cpp)."""

    def cell(figures: dict[str, Any], key: str, unit: str, scale: float = 1.0, digits: int = 2) -> str:
        return f"{figures[key] * scale:.{digits}f} {unit}" if key in figures else "-"

    rows = [
        ("load", cell(warm, "load_seconds", "s"), cell(other, "load_seconds", "s")),
        ("tensors in the file", cell(warm, "file_bytes", "MB", 1e-6, 1), "-"),
        ("arrays after loading", cell(warm, "resident_bytes", "MB", 1e-6, 1), "-"),
        ("peak of the process", cell(warm, "peak_bytes", "MB", 1e-6, 0), cell(other, "peak_bytes", "MB", 1e-6, 0)),
        (
            "first token of 128, cold",
            cell(cold, "first_token_cold_seconds", "s"),
            cell(other, "first_token_cold_seconds", "s"),
        ),
        ("first token of 128, programs on disk", cell(warm, "first_token_cold_seconds", "s"), "-"),
        (
            "first token of 128, warm",
            cell(warm, "first_token_warm_seconds", "s"),
            cell(other, "first_token_warm_seconds", "s"),
        ),
    ]
    for key in (*(f"prefill_{n}" for n in PREFILLS), *(f"decode_{n}" for n in BATCHES)):
        rows.append((key.replace("_", " "), *(cell(f, key, "tokens/s", digits=1) for f in (warm, other))))
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("model", nargs="?", help="a model, as for realm bench; left out, the small default model")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="of llama.cpp; default: every core")
    parser.add_argument("--peer", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.peer:
        print(json.dumps(llama_cpp(arguments.model, arguments.threads)))
        return
    from realm_jax.registry import resolve

    path = str(resolve(arguments.model))
    with tempfile.TemporaryDirectory(prefix="realm-compare-") as compiled:
        cold, warm = realm(path, compiled), realm(path, compiled)
    other = peer(path, arguments.threads)
    print(f"{Path(path).name}, {os.cpu_count()} cores, llama.cpp with {arguments.threads} threads\n")
    print("| | Realm | llama.cpp |\n|---|---|---|")
    for row in table(cold, warm, other):
        print("| " + " | ".join(row) + " |")


if __name__ == "__main__":
    main()
