"""Realm, as bench_peer asks it: LLM() with its defaults, through its public methods."""

import argparse
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from .engines import answer_questions, pin
from .machine import peak_memory

PROMPT = 16  # tokens in front of what is decoded


class Realm:
    """A loaded model; prompts are random token ids, the same for a given length and number."""

    def __init__(self, path: Path):
        import jax

        from realm_jax import LLM, SamplingParams
        from realm_jax.gguf import open_gguf

        self._params = SamplingParams
        with open_gguf(path) as file:
            matrices = {name: t for name, t in file.tensors.items() if len(t.shape) > 1}
            if "output.weight" in matrices:
                matrices.pop("token_embd.weight")  # rows of it are looked up; it is not read through
            weights = sum(t.nbytes for t in matrices.values())
            elements = sum(_product(t.shape) for t in matrices.values())
            file_bytes = file.nbytes
        self._live = lambda: sum(array.nbytes for array in jax.live_arrays())
        before = self._live()
        begun = time.perf_counter()
        self._llm = LLM(path)
        self.facts: dict[str, Any] = {
            "load_seconds": time.perf_counter() - begun,
            "file_bytes": file_bytes,
            "weight_bytes": weights,
            "weight_elements": elements,
            "resident_bytes": self._live() - before,
            "context_length": self._llm.context_length,
            "device": jax.devices()[0].device_kind,
            "jax": jax.__version__,
        }
        self._stream: Iterator[Any] = iter(())

    def prefill(self, tokens: int) -> dict[str, Any]:
        """Seconds from submitting a prompt to its first token."""
        result: Any = self._llm.generate(self._prompt(tokens, 0), self._params(max_tokens=1, ignore_eos=True))
        return {"seconds": result.timing.time_to_first_token}

    def decode(self, batch: int, steps: int) -> dict[str, Any]:
        """Seconds of so many steps of so many requests together, from their first tokens to their last."""
        prompts = [self._prompt(PROMPT, number) for number in range(batch)]
        results: Any = self._llm.generate(prompts, self._params(max_tokens=steps + 1, ignore_eos=True))
        return {"seconds": max(result.timing.decode for result in results)}

    def open_context(self, tokens: int, room: int) -> dict[str, Any]:
        """A request of so many tokens of context, with room for more; waits for its first token."""
        self.close_context()
        wanted = self._params(max_tokens=room, ignore_eos=True)
        self._stream = self._llm.stream(self._prompt(tokens, 0), wanted)
        begun = time.perf_counter()
        self._advance(1)
        return {"seconds": time.perf_counter() - begun}

    def steps(self, count: int) -> dict[str, Any]:
        """Seconds of so many more tokens of the open request."""
        begun = time.perf_counter()
        self._advance(count)
        return {"seconds": time.perf_counter() - begun}

    def close_context(self) -> dict[str, Any]:
        """Ends the open request."""
        if hasattr(self._stream, "close"):
            self._stream.close()
        self._stream = iter(())
        return {}

    def memory(self) -> dict[str, Any]:
        """Most bytes the process has had, and what its arrays beside the weights take: the cache, once it is there."""
        return {"peak_bytes": peak_memory(), "cache_bytes": self._live() - self.facts["resident_bytes"]}

    def _advance(self, count: int) -> None:
        while count > 0:
            count -= len(next(self._stream).tokens)

    def _prompt(self, length: int, number: int) -> Any:
        import numpy as np

        return np.random.default_rng([length, number]).integers(0, self._llm.config.vocab_size, length, dtype=np.int32)


def _product(shape: tuple[int, ...]) -> int:
    result = 1
    for size in shape:
        result *= size
    return result


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("path", type=Path)
    parser.add_argument("--threads", type=int, required=True)
    arguments = parser.parse_args()
    pin(arguments.threads)
    answer_questions(lambda: Realm(arguments.path))


if __name__ == "__main__":
    main()
