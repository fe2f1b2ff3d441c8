"""A process that works on what users send and can be ended: its parent bounds its time, and it its own memory."""

import importlib.util
import os
import subprocess
import sys
import threading
import weakref
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..errors import RealmError
from . import template_worker
from .template_worker import read_frame, write_frame

_START_LIMIT = 60.0  # seconds
# The process gets what an interpreter may need to start and to tell the time, and no secrets.
_KEPT_ENVIRONMENT = ("PATH", "LD_LIBRARY_PATH", "DYLD_LIBRARY_PATH", "SYSTEMROOT", "TZ", "LANG", "LC_ALL")


class WorkerProcess:
    """Runs a script that answers frames (text.template_worker), started when it is first asked and kept for the next.

    It ends with `close`, with this object and with the program; after a fork the child has one of its own. Not for
    several threads at once.

    process: None while it does not run.
    """

    def __init__(
        self,
        script: str,
        packages: Sequence[str],
        *,
        serves: str,
        does: str,
        error: type[RealmError],
        first: Mapping[str, Any] | None = None,
    ):
        """
        Args:
          script: path of the script; it may import template_worker, and the packages that are named, nothing else that
            is installed. Once it is ready it writes a frame.
          serves, does: what it is for, for messages: "chat templates", "renders chat templates".
          error: raised where it cannot be started.
          first: the frame that it is sent when it starts; None: none.
        """
        self._script = script
        self._packages = packages
        self._serves = serves
        self._does = does
        self._error = error
        self._first = first
        self.process: subprocess.Popen[bytes] | None = None
        self._owner = 0
        self._ender: weakref.finalize[..., Any] | None = None

    def ask(self, request: Mapping[str, Any], limit: float) -> tuple[Any, bool]:
        """Its answer within so many seconds, or None and whether it was ended for taking too long: else it died.

        Raises what the request's frame cannot hold (TypeError, ValueError, RecursionError, struct.error), and the error
        of this object where the process cannot be started.
        """
        return self._exchange(self._running(), request, limit)

    def close(self) -> None:
        """Ends the process; the next request starts another."""
        if self._ender is not None:
            self._ender()
        self.process = None

    def _running(self) -> "subprocess.Popen[bytes]":
        if self.process is not None and self._owner == os.getpid() and self.process.poll() is None:
            return self.process
        self.close()
        try:
            process = subprocess.Popen(
                [sys.executable, "-I", "-S", self._script, *self._directories()],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                env={key: os.environ[key] for key in _KEPT_ENVIRONMENT if key in os.environ},
            )
        except OSError as error:
            raise self._error(f"cannot start the process that {self._does}: {error}") from None
        self.process, self._owner = process, os.getpid()
        self._ender = weakref.finalize(self, _end, process, os.getpid())
        if self._exchange(process, self._first, _START_LIMIT)[0] is None:
            raise self._error(f"cannot start the process that {self._does}: it ended at once")
        return process

    def _exchange(
        self, process: "subprocess.Popen[bytes]", request: Mapping[str, Any] | None, limit: float
    ) -> tuple[Any, bool]:
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
            if request is not None:
                write_frame(process.stdin, request)
            answer = read_frame(process.stdout)
        except OSError:
            answer = None  # killed while it was written to
        finally:
            timer.cancel()
            if answer is None:
                self.close()
        return answer, expired.is_set()

    def _directories(self) -> list[str]:
        directories = []
        for name in self._packages:
            spec = importlib.util.find_spec(name)
            if spec is None or spec.origin is None:
                raise self._error(f"{self._serves} need the package {name}, which is not installed")
            directories.append(str(Path(spec.origin).parent.parent))
        directories.append(str(Path(template_worker.__file__).parent))
        return list(dict.fromkeys(directories))


def _end(process: "subprocess.Popen[bytes]", owner: int) -> None:
    if owner != os.getpid():
        return  # a fork of the process that started it
    process.kill()
    process.wait()
    for pipe in (process.stdin, process.stdout):
        if pipe is not None:
            pipe.close()
