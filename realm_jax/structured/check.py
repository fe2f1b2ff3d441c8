"""Tries grammars out in a process of their own, before they are compiled in this one."""

import threading

from realm_jax.errors import InvalidRequestError, RealmError
from realm_jax.structured import worker
from realm_jax.text.worker_process import WorkerProcess

TIME_LIMIT = 5.0  # seconds to compile a grammar


class GrammarChecker:
    """Keeps one such process for one vocabulary, started when the first grammar comes. Any thread may use it."""

    def __init__(self, tokens: list[bytes], eos: list[int], special: list[int]):
        vocabulary = {"tokens": [piece.decode("latin-1") for piece in tokens], "eos": eos, "special": special}
        self._lock = threading.Lock()
        self._worker = WorkerProcess(
            worker.__file__,
            ("llguidance",),
            serves="grammars and JSON schemas",
            does="checks grammars",
            error=RealmError,
            first=vocabulary,
        )

    def check(self, grammar: str) -> None:
        """Raises InvalidRequestError for a grammar that does not compile in TIME_LIMIT, the stack and the memory."""
        with self._lock:
            answer, expired = self._worker.ask({"grammar": grammar}, TIME_LIMIT)
        if answer is None:
            problem = (
                f"it took longer than {TIME_LIMIT:g} s" if expired else "it needs too much memory or nests too deep"
            )
            raise InvalidRequestError(f"the grammar is too complex: {problem}; accepted: a smaller one")
        if answer["error"]:
            raise InvalidRequestError(f"the grammar cannot be used: {' '.join(answer['error'].split())[:300]}")
