"""llama.cpp, as bench_peer asks it: llama_decode and llama_synchronize of its C interface, no logits taken to Python.

Tokens are drawn beforehand, so neither sampling nor a look at the logits is in its figures; both are in Realm's.
"""

import argparse
import ctypes
import time
from pathlib import Path
from typing import Any

from .engines import answer_questions, pin
from .machine import peak_memory

PROMPT = 16  # tokens in front of what is decoded
SEQUENCES = 8
BATCH = 512  # tokens of one call, llama.cpp's own default


class LlamaCpp:
    """A loaded model with one context for eight sequences, and one for a single long one when that is asked for."""

    def __init__(self, path: Path, threads: int):
        import llama_cpp

        self._lib = llama_cpp
        self._threads = threads
        self._log = llama_cpp.llama_log_callback(lambda *_: None)  # kept: C calls it
        llama_cpp.llama_log_set(self._log, ctypes.c_void_p(0))
        begun = time.perf_counter()
        params = llama_cpp.llama_model_default_params()
        params.n_gpu_layers = 0
        self._model = llama_cpp.llama_model_load_from_file(str(path).encode(), params)
        if not self._model:
            raise RuntimeError("it does not load this file")
        self._vocabulary = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(self._model))
        self._batch = llama_cpp.llama_batch_init(BATCH, 0, 1)
        self._short = self._context(SEQUENCES * 512, SEQUENCES)
        self._long: Any = None
        self._position = 0
        self.facts = {"load_seconds": time.perf_counter() - begun, "llama_cpp_python": llama_cpp.__version__}

    def prefill(self, tokens: int) -> dict[str, Any]:
        self._clear(self._short)
        prompt = self._tokens(tokens, 0)
        begun = time.perf_counter()
        self._append(self._short, [(0, 0, prompt)])
        return {"seconds": time.perf_counter() - begun}

    def decode(self, batch: int, steps: int) -> dict[str, Any]:
        self._clear(self._short)
        self._append(self._short, [(i, 0, self._tokens(PROMPT, i)) for i in range(batch)])
        drawn = [self._tokens(steps, i) for i in range(batch)]
        begun = time.perf_counter()
        for step in range(steps):
            self._append(self._short, [(i, PROMPT + step, drawn[i][step : step + 1]) for i in range(batch)])
        return {"seconds": time.perf_counter() - begun}

    def trace(self, requests: list[tuple[list[int], int]]) -> dict[str, Any]:
        """Seconds of requests (token ids, how many to generate) that all come at once, greedy, over eight slots.

        Batched as llama.cpp's server does: a token of every slot that decodes, then as much of the prompts as fits.
        """
        import numpy as np

        self._clear(self._short)
        memory = self._lib.llama_get_memory(self._short)
        waiting = list(reversed(requests))
        slots: list[dict[str, Any] | None] = [None] * SEQUENCES
        begun = time.perf_counter()
        while waiting or any(slots):
            rows: list[tuple[int, int, list[int]]] = []
            room = BATCH
            for i, slot in enumerate(slots):
                if slot is None and waiting:
                    prompt, count = waiting.pop()
                    slots[i] = {"next": list(prompt), "at": 0, "left": count}
            # Those with one token to go first: that they are decoding is all there is to see of it.
            order = sorted((len(slot["next"]) > 1, i) for i, slot in enumerate(slots) if slot is not None)
            for _, i in order:
                slot = slots[i]
                assert slot is not None
                if part := slot["next"][:room]:
                    rows.append((i, slot["at"], part))
                    room -= len(part)
            self._append(self._short, rows)
            last = -1
            for i, position, part in rows:
                slot = slots[i]
                assert slot is not None
                last += len(part)
                slot["at"], slot["next"] = position + len(part), slot["next"][len(part) :]
                if slot["next"]:
                    continue
                logits = self._lib.llama_get_logits_ith(self._short, last)
                slot["next"] = [int(np.ctypeslib.as_array(logits, (self._vocabulary,)).argmax())]
                slot["left"] -= 1
                if not slot["left"]:
                    self._lib.llama_memory_seq_rm(memory, i, -1, -1)
                    slots[i] = None
        return {"seconds": time.perf_counter() - begun}

    def open_context(self, tokens: int, room: int) -> dict[str, Any]:
        self.close_context()
        self._long = self._context((tokens + room + 255) // 256 * 256, 1)
        prompt = self._tokens(tokens, 0)
        begun = time.perf_counter()
        for at in range(0, tokens, BATCH):
            self._append(self._long, [(0, at, prompt[at : at + BATCH])])
        self._position = tokens
        return {"seconds": time.perf_counter() - begun}

    def steps(self, count: int) -> dict[str, Any]:
        drawn = self._tokens(count, self._position)
        begun = time.perf_counter()
        for token in drawn:
            self._append(self._long, [(0, self._position, [token])])
            self._position += 1
        return {"seconds": time.perf_counter() - begun}

    def close_context(self) -> dict[str, Any]:
        if self._long is not None:
            self._lib.llama_free(self._long)
        self._long = None
        return {}

    def memory(self) -> dict[str, Any]:
        return {"peak_bytes": peak_memory()}

    def _context(self, size: int, sequences: int) -> Any:
        params = self._lib.llama_context_default_params()
        params.n_ctx, params.n_batch, params.n_seq_max = size, BATCH, sequences
        params.n_threads = params.n_threads_batch = self._threads
        context = self._lib.llama_init_from_model(self._model, params)
        if not context:
            raise RuntimeError(f"it makes no context of {size} tokens")
        return context

    def _clear(self, context: Any) -> None:
        self._lib.llama_memory_clear(self._lib.llama_get_memory(context), True)

    def _append(self, context: Any, rows: list[tuple[int, int, list[int]]]) -> None:
        """(sequence, position, tokens) each; logits of every row's last token are computed."""
        n = 0
        for sequence, position, tokens in rows:
            for i, token in enumerate(tokens):
                self._batch.token[n] = token
                self._batch.pos[n] = position + i
                self._batch.n_seq_id[n] = 1
                self._batch.seq_id[n][0] = sequence
                self._batch.logits[n] = i == len(tokens) - 1
                n += 1
        self._batch.n_tokens = n
        if self._lib.llama_decode(context, self._batch) != 0:
            raise RuntimeError("llama_decode failed")
        self._lib.llama_synchronize(context)

    def _tokens(self, length: int, number: int) -> list[int]:
        import numpy as np

        return np.random.default_rng([length, number]).integers(0, self._vocabulary, length).tolist()


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("path", type=Path)
    parser.add_argument("--threads", type=int, required=True)
    arguments = parser.parse_args()
    pin(arguments.threads)
    answer_questions(lambda: LlamaCpp(arguments.path, arguments.threads))


if __name__ == "__main__":
    main()
