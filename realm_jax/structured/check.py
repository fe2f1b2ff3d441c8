"""Tries grammars out in a process of their own, before they are compiled in this one."""

import importlib.util
import os
import subprocess
import sys
import threading
import weakref
from pathlib import Path
from typing import Any

from realm_jax.errors import InvalidRequestError, RealmError
from realm_jax.structured import worker
from realm_jax.text import template_worker
from realm_jax.text.template_worker import read_frame, write_frame

TIME_LIMIT = 5.0  # seconds to compile a grammar
_START_LIMIT = 60.0
# What an interpreter may need to start, and no secrets.
_KEPT_ENVIRONMENT = ("PATH", "LD_LIBRARY_PATH", "DYLD_LIBRARY_PATH", "SYSTEMROOT", "LANG", "LC_ALL")


class GrammarChecker:
    """Keeps one such process for one vocabulary, started when the first grammar comes. Any thread may use it."""

    def __init__(self, tokens: list[bytes], eos: list[int], special: list[int]):
        self._vocabulary = {"tokens": [piece.decode("latin-1") for piece in tokens], "eos": eos, "special": special}
        self._lock = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None
        self._owner = 0

    def check(self, grammar: str) -> None:
        """Raises InvalidRequestError for a grammar that does not compile in TIME_LIMIT, the stack and the memory."""
        with self._lock:
            process = self._running()
            answer, expired = _ask(process, {"grammar": grammar}, TIME_LIMIT)
        if answer is None:
            problem = (
                f"it took longer than {TIME_LIMIT:g} s" if expired else "it needs too much memory or nests too deep"
            )
            raise InvalidRequestError(f"the grammar is too complex: {problem}; accepted: a smaller one")
        if answer["error"]:
            raise InvalidRequestError(f"the grammar cannot be used: {' '.join(answer['error'].split())[:300]}")

    def _running(self) -> "subprocess.Popen[bytes]":
        if self._process is not None and self._owner == os.getpid() and self._process.poll() is None:
            return self._process
        directories = [_directory("llguidance"), str(Path(template_worker.__file__).parent)]
        try:
            process = subprocess.Popen(
                [sys.executable, "-I", "-S", worker.__file__, *directories],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                env={key: os.environ[key] for key in _KEPT_ENVIRONMENT if key in os.environ},
            )
        except OSError as error:
            raise RealmError(f"cannot start the process that checks grammars: {error}") from None
        weakref.finalize(self, _end, process, os.getpid())
        if _ask(process, self._vocabulary, _START_LIMIT)[0] is None:
            raise RealmError("cannot start the process that checks grammars: it ended at once")
        self._process, self._owner = process, os.getpid()
        return process


def _ask(process: "subprocess.Popen[bytes]", request: dict[str, Any], limit: float) -> tuple[Any, bool]:
    """The answer, None if the process ended, and whether it was ended for taking too long."""
    assert process.stdin is not None
    assert process.stdout is not None
    expired = threading.Event()

    def expire() -> None:
        expired.set()
        process.kill()

    timer = threading.Timer(limit, expire)
    timer.daemon = True
    timer.start()
    answer = None
    try:
        write_frame(process.stdin, request)
        answer = read_frame(process.stdout)
    except OSError:
        pass  # it ended while it was written to: there is no answer
    finally:
        timer.cancel()
        if answer is None:
            process.kill()
            process.wait()
    return answer, expired.is_set()


def _end(process: "subprocess.Popen[bytes]", owner: int) -> None:
    if owner != os.getpid():
        return  # a fork of the process that started it
    process.kill()
    process.wait()
    for pipe in (process.stdin, process.stdout):
        if pipe is not None:
            pipe.close()


def _directory(name: str) -> str:
    spec = importlib.util.find_spec(name)
    if spec is None or spec.origin is None:
        raise RealmError(f"grammars and JSON schemas need the package {name}, which is not installed")
    return str(Path(spec.origin).parent.parent)
