"""Progress bars for downloads, loading and compiling: on stderr, and only where that is a terminal."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.progress import Progress

    from realm_jax.registry import Progress as Callback


@contextmanager
def progress_bars() -> "Iterator[Callback | None]":
    """A callback progress(what, done, total) that shows one bar at a time, gone at the end; None without a terminal."""
    if not sys.stderr.isatty():
        yield None
        return
    bars = _Bars()
    try:
        yield bars
    finally:
        bars.close()


class _Bars:
    def __init__(self) -> None:
        self._progress: Progress | None = None
        self._what = ""

    def __call__(self, what: str, done: int, total: int) -> None:
        if self._progress is None:
            from rich.console import Console
            from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

            columns = (TextColumn("{task.description}", markup=False), BarColumn(), TaskProgressColumn())
            self._progress = Progress(*columns, TimeRemainingColumn(), console=Console(stderr=True), transient=True)
            self._progress.start()
        if what != self._what:
            for task in self._progress.task_ids:
                self._progress.remove_task(task)
            self._progress.add_task(what, total=total or None)
            self._what = what
        self._progress.update(self._progress.task_ids[0], completed=done, total=total or None)

    def close(self) -> None:
        if self._progress is not None:
            self._progress.stop()
