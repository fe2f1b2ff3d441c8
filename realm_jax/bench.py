"""How fast a model runs here: what `realm bench` prints, measured through the public API as a user would see it."""

import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np

from realm_jax.checkpoint import open_model
from realm_jax.llm import LLM
from realm_jax.registry import resolve
from realm_jax.results import Result
from realm_jax.sampling_params import SamplingParams

PREFILLS = (128, 256)  # tokens
BATCHES = (1, 2, 4, 8)  # requests decoded together
_PROMPT = 16  # tokens of a decoded request's prompt
_DECODED = 32  # tokens timed per request
_REPEATS = 3

Progress = Callable[[str, int, int], None]


def bench(model: str | Path, progress: Progress | None = None, mesh: str | None = None) -> dict[str, Any]:
    """Load a model with LLM's defaults, on a mesh, and time it; medians of three runs after one that compiles.

    Returns:
        prefill_N: prompt tokens per second of one prompt of N tokens, from submission to its first token.
        decode_B: generated tokens per second of B requests together, greedy, from their first token to their last.
        load_seconds; first_token_cold_seconds and first_token_warm_seconds: of the 128-token prompt, with and without
        compiling (programs that an earlier process left in the compile cache are read, not compiled).
        file_bytes: of all tensors in the file; resident_bytes: of all arrays that loading left on the device.
        model, device.

    Raises:
        RealmError: as LLM.
    """
    path = resolve(model, progress)
    with open_model(path) as file:
        file_bytes = sum(tensor.nbytes for tensor in file.tensors.values())
    before = _live_bytes()
    begun = time.perf_counter()
    with LLM(path, progress=progress, mesh=mesh) as llm:
        load_seconds = time.perf_counter() - begun
        resident_bytes = _live_bytes() - before
        measured: dict[str, float] = {}
        cold = warm = 0.0
        for length in PREFILLS:
            first, seconds = _repeated(partial(_prefill_seconds, llm, length))
            measured[f"prefill_{length}"] = length / seconds
            if length == PREFILLS[0]:
                cold, warm = first, seconds
        for batch in BATCHES:
            _, seconds = _repeated(partial(_decode_seconds, llm, batch))
            measured[f"decode_{batch}"] = batch * _DECODED / seconds
        return {
            "model": str(path),
            "device": jax.devices()[0].device_kind,
            **measured,
            "load_seconds": load_seconds,
            "first_token_cold_seconds": cold,
            "first_token_warm_seconds": warm,
            "resident_bytes": resident_bytes,
            "file_bytes": file_bytes,
        }


def _repeated(run: Callable[[], float]) -> tuple[float, float]:
    """Seconds of the first run, and the median of those after it."""
    first = run()
    return first, statistics.median(run() for _ in range(_REPEATS))


def _prompt(llm: LLM, length: int, number: int) -> np.ndarray:
    """int32 [length] token ids, the same in every run, another list for every number."""
    return np.random.default_rng([length, number]).integers(0, llm.config.vocab_size, length, dtype=np.int32)


def _prefill_seconds(llm: LLM, length: int) -> float:
    result: Any = llm.generate(_prompt(llm, length, 0), SamplingParams(max_tokens=1, ignore_eos=True))
    return result.timing.time_to_first_token


def _decode_seconds(llm: LLM, batch: int) -> float:
    """From the first token of the requests, which come in one step, to the last of all."""
    prompts = [_prompt(llm, _PROMPT, number) for number in range(batch)]
    results: list[Result] = llm.generate(prompts, SamplingParams(max_tokens=_DECODED + 1, ignore_eos=True))  # type: ignore
    return max(result.timing.decode for result in results)


def _live_bytes() -> int:
    return sum(array.nbytes for array in jax.live_arrays())
