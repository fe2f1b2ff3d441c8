"""What the sections of bench_serving share: an Engine in this process, and when each token came out of it."""

import asyncio
import secrets
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from realm_jax import Engine, Request, SamplingParams
from realm_jax.engine.speculator import RequestSpeculation, Speculator

from .machine import median
from .report import Row


@dataclass(frozen=True)
class Plan:
    """What the sections are run with.

    models: (label, file) of each, for the sections that take several; the first is the small one, for those that take
    one. folder: for files that are made. repeats: of every timing. quick: fewer and shorter requests. threads: of the
    peers. peer_python: the Python that may have xllamacpp; None: no peers.
    """

    models: tuple[tuple[str, Path], ...]
    folder: Path
    repeats: int
    quick: bool
    threads: int
    peer_python: str | None

    @property
    def small(self) -> tuple[str, Path]:
        return self.models[0]


@dataclass
class Answer:
    """What came of a request: its tokens, and time.perf_counter() when it was sent and when each token came."""

    sent: float
    tokens: list[int] = field(default_factory=list)
    times: list[float] = field(default_factory=list)
    last: Any = None  # its last event

    @property
    def first_token(self) -> float:
        """Seconds from sending it to its first token."""
        return self.times[0] - self.sent


class Serving:
    """An Engine in this process, everything compiled. A context manager that closes it."""

    def __init__(self, path: Path, **options: Any):
        """options: of Engine."""
        self.engine = Engine(path, **options)
        self.core = self.engine._core
        self.vocabulary: int = self.core.config.vocab_size
        self._runner = asyncio.Runner()
        self.engine.warm_up()

    def __enter__(self) -> "Serving":
        return self

    def __exit__(self, *_: object) -> None:
        self.engine.close()
        self._runner.close()

    def together(self, requests: Sequence[Request]) -> tuple[list[Answer], float]:
        """Sends all at once; their answers, in order, and the seconds until the last has ended."""

        async def run() -> tuple[list[Answer], float]:
            begun = time.perf_counter()
            answers = await asyncio.gather(*map(self._answer, requests))
            return list(answers), time.perf_counter() - begun

        return self._runner.run(run())

    def one_by_one(self, requests: Sequence[Request]) -> tuple[list[Answer], float]:
        """Sends each when the one before it has ended."""

        async def run() -> tuple[list[Answer], float]:
            begun = time.perf_counter()
            answers = [await self._answer(request) for request in requests]
            return answers, time.perf_counter() - begun

        return self._runner.run(run())

    def later(self, requests: Sequence[Request], tokens: int, last: Request) -> tuple[list[Answer], Answer]:
        """Sends `last` when the others, sent at once, have so many tokens in all; waits for it and cancels them."""

        async def run() -> tuple[list[Answer], Answer]:
            answers = [Answer(0.0) for _ in requests]
            tasks = [asyncio.create_task(self._answer(r, a)) for r, a in zip(requests, answers)]
            while sum(len(answer.tokens) for answer in answers) < tokens:
                await asyncio.sleep(0.005)
            answer = await self._answer(last)
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            return answers, answer

        return self._runner.run(run())

    async def _answer(self, request: Request, answer: Answer | None = None) -> Answer:
        answer = Answer(0.0) if answer is None else answer
        answer.sent = time.perf_counter()
        async for event in self.engine.submit(request):
            now = time.perf_counter()
            answer.tokens += event.tokens
            answer.times += [now] * len(event.tokens)
            answer.last = event
        return answer

    def random_tokens(self, count: int, seed: Any = None) -> list[int]:
        """Ids of any tokens; other ones on every call, unless there is a seed."""
        rng = np.random.default_rng(secrets.randbits(64) if seed is None else seed)
        return rng.integers(0, self.vocabulary, count).tolist()


def ignoring_eos(tokens: int, **options: Any) -> SamplingParams:
    """Exactly so many tokens."""
    return SamplingParams(max_tokens=tokens, ignore_eos=True, **options)


def rate(answers: Sequence[Answer]) -> float:
    """Tokens a second while all of them were decoding: from the last first token to the first last one."""
    begun, ended = max(a.times[0] for a in answers), min(a.times[-1] for a in answers)
    if ended <= begun:
        raise RuntimeError("there was no time in which all requests were decoding")
    return sum(begun < at <= ended for a in answers for at in a.times) / (ended - begun)


def differing(one: Sequence[Answer], other: Sequence[Answer]) -> int:
    """How many answers have other tokens."""
    return sum(a.tokens != b.tokens for a, b in zip(one, other, strict=True))


class FixedDrafts(RequestSpeculation):
    """Drafts k tokens in every step, whether that pays or not."""

    def __init__(self, drafts: int, speculator: Speculator):
        super().__init__(drafts, speculator.costs)
        self._drafts = drafts

    def choose(self, *_: Any) -> int:
        return self._drafts

    def observe(self, drafted: int, accepted: int) -> None:
        self.stats.add(drafted, accepted)


def fix_drafts(speculator: Speculator) -> Callable[[], None]:
    """From now on requests that ask for k drafts have k in every step; returns what puts adaptation back."""
    speculator.start = lambda drafts: FixedDrafts(drafts, speculator)  # type: ignore[method-assign]

    def undo() -> None:
        del speculator.start

    return undo


def timed(name: str, samples: Sequence[float], unit: str, **more: Any) -> Row:
    """A row of the median of the samples."""
    return Row(name, median(list(samples)), unit, samples=list(samples), **more)


def at_least(name: str, figure: float, bar: float, **more: Any) -> Row:
    """A ratio that should reach a bar."""
    return Row(name, figure, "times", limit=bar, ok=figure >= bar, **more)


def at_most(name: str, figure: float, bar: float, unit: str = "times", **more: Any) -> Row:
    """A figure that should not pass a bar."""
    return Row(name, figure, unit, limit=bar, higher=False, ok=figure <= bar, **more)


def none_of(name: str, figure: int, of: int) -> Row:
    """How many of so many are wrong, where none should be."""
    return Row(name, float(figure), f"of {of}", limit=0.0, higher=False, ok=figure == 0)
