"""Many requests of mixed length over eight slots: against one by one, what it should take, and llama.cpp."""

import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import numpy as np

from realm_jax import Request

from .engines import Engine, EngineError
from .machine import median
from .report import Row, note
from .serving import Plan, Serving, at_least, at_most, differing, ignoring_eos, none_of, rate, timed

SLOTS = 8
FASTER = 2.0  # than one by one, at least
OVERHEAD = 1.15  # of what prompts and decoding take by themselves, at most
PAUSE = 0.2  # seconds after a peer's turn: its threads spin for a while after their work
PREFILL, STEPS = 256, 64  # tokens of the prompt that is timed, and steps of decoding


def mixed_lengths(quick: bool) -> list[tuple[int, int]]:
    """Tokens of the prompt and of the output of each request: 64 of them, 16 if quick."""
    rng = np.random.default_rng(4)
    count, prompts, outputs = (16, (16, 100), (8, 40)) if quick else (64, (16, 256), (32, 160))
    low, high = np.log(prompts)
    lengths = np.exp(rng.uniform(low, high, count)).round().astype(int)
    return list(zip(lengths.tolist(), rng.integers(outputs[0], outputs[1] + 1, count).tolist()))


def run(plan: Plan) -> Iterator[Row]:
    """Rows for every model."""
    for name, path in plan.models:
        label = f"batch, {name}: "
        with ExitStack() as stack:
            peers = []
            for peer in _peers(plan, path):
                stack.enter_context(peer)
                try:
                    peer.loaded()
                    peers.append(peer)
                except EngineError as error:
                    yield Row(f"{label}{peer.name}", None, "s", problem=str(error))
            serving = stack.enter_context(Serving(path, max_batch=SLOTS))
            yield from _measure(plan, label, serving, peers)


def _measure(plan: Plan, label: str, serving: Serving, peers: list[Engine]) -> Iterator[Row]:
    lengths = mixed_lengths(plan.quick)
    prompts = [serving.random_tokens(prompt, [prompt, i]) for i, (prompt, _) in enumerate(lengths)]
    requests = [
        Request(prompt, ignoring_eos(output), cache=False) for prompt, (_, output) in zip(prompts, lengths, strict=True)
    ]
    trace = [(prompt, output) for prompt, (_, output) in zip(prompts, lengths, strict=True)]
    total: list[float] = []
    prefill: list[float] = []
    decode: list[float] = []
    theirs: list[list[float]] = [[] for _ in peers]
    problems = [""] * len(peers)
    for turn in range(plan.repeats):
        note(f"{label}turn {turn + 1} of {plan.repeats}")
        prefill.append(_prefill_rate(serving))
        decode.append(_decode_rate(serving))
        batched, seconds = serving.together(requests)
        total.append(seconds)
        for i, peer in enumerate(peers):
            try:
                theirs[i].append(peer.ask("trace", requests=trace)["seconds"])
            except EngineError as error:
                problems[i] = problems[i] or str(error)
            time.sleep(PAUSE)
    note(f"{label}one by one")
    alone, alone_seconds = serving.one_by_one(requests)
    rates = median(prefill), median(decode)
    prompt_tokens, output_tokens = (sum(part) for part in zip(*lengths))
    expected = prompt_tokens / rates[0] + output_tokens / rates[1]
    what = f"{len(requests)} requests over {SLOTS} slots"
    if not peers:
        yield timed(f"{label}{what}", total, "s", higher=False)
    for peer, samples, problem in zip(peers, theirs, problems):
        beside = {"peer": median(samples), "peer_samples": samples} if samples else {}
        yield timed(f"{label}{what}", total, "s", higher=False, peer_name=peer.name, problem=problem, **beside)
    yield at_least(
        f"{label}faster than one by one",
        alone_seconds / median(total),
        FASTER,
        rate=f"{alone_seconds:.1f} s one by one",
    )
    yield at_most(
        f"{label}over prompts / prefill rate + output / decode rate",
        median(total) / expected,
        OVERHEAD,
        rate=f"{prompt_tokens} / {rates[0]:.0f} + {output_tokens} / {rates[1]:.0f} = {expected:.1f} s; "
        f"prompts are padded to {_padded(serving, lengths)} tokens",
    )
    yield none_of(f"{label}greedy answers that are not as if alone", differing(batched, alone), len(requests))


def _padded(serving: Serving, lengths: list[tuple[int, int]]) -> int:
    """Tokens that the prompts' chunks are padded to."""
    runner = serving.core.runner
    return sum(runner.buckets.padded(prompt) for prompt, _ in lengths)


def _prefill_rate(serving: Serving) -> float:
    [answer], _ = serving.together([Request(serving.random_tokens(PREFILL), ignoring_eos(1), cache=False)])
    return PREFILL / answer.first_token


def _decode_rate(serving: Serving) -> float:
    request = [Request(serving.random_tokens(16), ignoring_eos(STEPS), cache=False) for _ in range(SLOTS)]
    return rate(serving.together(request)[0])


def _peers(plan: Plan, path: Path) -> Iterator[Engine]:
    """llama.cpp's server, and its library batched in the same way.

    The server comes from xllamacpp's wheels, which are built for AVX2; the library may be built for this machine.
    """
    if plan.peer_python is None:
        return
    slots, threads = ("--slots", str(SLOTS)), plan.threads
    yield Engine("llama.cpp's server", "llama_server", str(path), *slots, threads=threads, python=plan.peer_python)
    yield Engine("llama.cpp", "llama_engine", str(path), threads=threads)
