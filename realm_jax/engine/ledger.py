"""What each tenant has used, kept in SQLite so that it survives the process, kill -9 included."""

import sqlite3
import threading
from dataclasses import astuple, dataclass
from pathlib import Path

from realm_jax.arguments import brief
from realm_jax.errors import InvalidRequestError, RealmError

_PATIENCE = 0.05  # seconds to wait for another process that writes the file


@dataclass
class Spent:
    """Tokens of one tenant: of prompts computed, of prompts found in the prefix cache, generated; and its requests."""

    prompt_tokens: int = 0
    reused_tokens: int = 0
    completion_tokens: int = 0
    requests: int = 0

    def __add__(self, other: "Spent") -> "Spent":
        return Spent(*(a + b for a, b in zip(astuple(self), astuple(other))))


class Ledger:
    """Adds up what tenants use. With a path, every step's counts are in the file before anybody sees its tokens, each
    once: a process that is killed loses nothing and counts nothing twice. Methods may be called from any thread."""

    def __init__(self, path: str | Path | None = None):
        """RealmError when the file cannot be opened, or is no ledger; InvalidRequestError for what is no path."""
        self._lock = threading.Lock()
        self._path = path
        self._open = True
        self._pending: dict[str, Spent] = {}
        if path is not None and (not isinstance(path, (str, Path)) or not str(path) or "\0" in str(path)):
            raise InvalidRequestError(f"ledger is {brief(path)}; accepted: a path, or None")
        try:
            # Who else writes it must not hold up a step: what cannot be written at once is with the next flush.
            self._file = sqlite3.connect(
                ":memory:" if path is None else str(path), timeout=_PATIENCE, check_same_thread=False
            )
            # A commit is a write to the log, without waiting for the disk: a killed process loses nothing by it.
            self._file.execute("PRAGMA journal_mode=WAL")
            self._file.execute("PRAGMA synchronous=NORMAL")
            self._file.execute(
                "CREATE TABLE IF NOT EXISTS usage (tenant TEXT PRIMARY KEY, prompt_tokens INTEGER NOT NULL, "
                "reused_tokens INTEGER NOT NULL, completion_tokens INTEGER NOT NULL, requests INTEGER NOT NULL)"
            )
            self._file.execute("SELECT prompt_tokens, reused_tokens, completion_tokens, requests FROM usage LIMIT 1")
            self._file.commit()
        except sqlite3.Error as error:
            raise RealmError(f"the ledger {path} cannot be used: {error}") from error

    def add(self, tenant: str, spent: Spent) -> None:
        """Counts, in memory until the next flush."""
        with self._lock:
            self._pending[tenant] = self._pending.get(tenant, Spent()) + spent

    def flush(self) -> None:
        """Writes what was added. RealmError when the file takes it no more, such as on a full disk; nothing is lost
        then: it is written with the next flush."""
        with self._lock:
            if self._pending:
                self._write()

    def usage(self, tenant: str) -> Spent:
        """All that a tenant has used, over all processes that kept this ledger. RealmError when it cannot be read."""
        with self._lock:
            if not self._open:
                raise RealmError(f"the ledger {self._path} was closed")
            try:
                row = self._file.execute(
                    "SELECT prompt_tokens, reused_tokens, completion_tokens, requests FROM usage WHERE tenant = ?",
                    (tenant,),
                ).fetchone()
            except sqlite3.Error as error:
                raise RealmError(f"the ledger {self._path} cannot be read: {error}") from error
            return (Spent() if row is None else Spent(*row)) + self._pending.get(tenant, Spent())

    def close(self) -> None:
        """Writes what is left and closes the file."""
        with self._lock:
            if not self._open or self._path is None:
                return  # one in memory can be asked to the end
            if self._pending:
                self._write()
            self._open = False
            self._file.close()

    def _write(self) -> None:
        rows = [(tenant, *astuple(spent)) for tenant, spent in self._pending.items()]
        try:
            with self._file:
                self._file.executemany(
                    "INSERT INTO usage VALUES (?, ?, ?, ?, ?) ON CONFLICT (tenant) DO UPDATE SET "
                    "prompt_tokens = prompt_tokens + excluded.prompt_tokens, "
                    "reused_tokens = reused_tokens + excluded.reused_tokens, "
                    "completion_tokens = completion_tokens + excluded.completion_tokens, "
                    "requests = requests + excluded.requests",
                    rows,
                )
        except sqlite3.Error as error:
            raise RealmError(f"the ledger {self._path} cannot be written: {error}") from error
        self._pending.clear()
