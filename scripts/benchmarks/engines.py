"""Realm and llama.cpp as two child processes that answer the same questions, so that they can be asked in turns.

A child reads one JSON object a line from its standard input and answers each with one on its standard output; its
standard error is kept for messages of failures. The first answer says what was loaded.
"""

import contextlib
import json
import os
import select
import signal
import subprocess
import sys
import tempfile
import time
from typing import Any

from .environment import child_environment

ANSWER_SECONDS = 600  # for one question, loading and compiling included


class EngineError(Exception):
    """An engine that does not do what it was asked, in one line."""


class Engine:
    """One engine in a process of its own. A context manager that ends it."""

    def __init__(self, name: str, module: str, *arguments: str, threads: int, python: str = sys.executable):
        """Starts it; `loaded` waits for the model. The process may run on the first `threads` processors only."""
        self.name = name
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115 (closed in __exit__)
        self._process = subprocess.Popen(
            [python, "-m", f"benchmarks.{module}", *arguments, "--threads", str(threads)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            env=child_environment(PYTHONUNBUFFERED="1"),
            start_new_session=True,
        )
        self._pending = b""
        self.facts: dict[str, Any] = {}

    def __enter__(self) -> "Engine":
        return self

    def __exit__(self, *_: object) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        for stream in (self._process.stdin, self._process.stdout):
            if stream is not None:
                with contextlib.suppress(BrokenPipeError):
                    stream.close()
        self._errors.close()

    def loaded(self) -> dict[str, Any]:
        """What it says of the model it has loaded."""
        self.facts = self._answer()
        return self.facts

    def ask(self, what: str, **details: Any) -> dict[str, Any]:
        """One question and its answer. EngineError when it fails, dies or takes too long."""
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps({"what": what, **details}).encode() + b"\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            raise EngineError(self._died()) from None
        return self._answer()

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        until = time.monotonic() + ANSWER_SECONDS
        while b"\n" not in self._pending:
            left = until - time.monotonic()
            if left <= 0 or not select.select([self._process.stdout], [], [], left)[0]:
                raise EngineError(f"{self.name} gave no answer in {ANSWER_SECONDS} s")
            part = os.read(self._process.stdout.fileno(), 1 << 16)
            if not part:
                raise EngineError(self._died())
            self._pending += part
        line, _, self._pending = self._pending.partition(b"\n")
        answer = json.loads(line)
        if "error" in answer:
            raise EngineError(f"{self.name}: {answer['error']}")
        return answer

    def _died(self) -> str:
        code = self._process.wait()
        self._errors.seek(0)
        lines = self._errors.read().decode(errors="replace").strip().splitlines()
        return f"{self.name} ended with code {code}: {lines[-1] if lines else 'no message'}"


def answer_questions(load: Any) -> None:
    """A child's whole life: load() gives an object whose methods are the questions, and its `facts`."""
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever else prints, prints elsewhere

    def say(answer: dict[str, Any]) -> None:
        out.write(json.dumps(answer) + "\n")
        out.flush()

    try:
        engine = load()
        say(engine.facts)
        for line in sys.stdin:
            question = json.loads(line)
            say(getattr(engine, question.pop("what"))(**question))
    except Exception as error:
        if os.environ.get("REALM_DEBUG"):
            raise
        text = str(error).strip().partition("\n")[0]
        say({"error": f"{type(error).__name__}: {text}"})
        raise SystemExit(1) from error


def pin(threads: int) -> None:
    """This process, and every thread it makes, on so many processors."""
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:threads])
