"""Progress bars for downloads, loading and compiling: on stderr, and only where that is a terminal."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from realm_jax.cli.output import line_is_open

if TYPE_CHECKING:
    from rich.progress import Progress


class Bars:
    """A callback progress(what, done, total) that shows one bar at a time, until `hide` or the end."""

    def __init__(self) -> None:
        self._progress: Progress | None = None
        self._what = ""

    def __call__(self, what: str, done: int, total: int) -> None:
        """Show how far `what` is; a total of 0 is one that is not known. Not on a line that holds an answer's begin."""
        if line_is_open():
            return  # a bar takes its whole line, and would wipe the text off it
        if self._progress is None:
            from rich.console import Console
            from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

            columns = (TextColumn("{task.description}", markup=False), BarColumn(), TaskProgressColumn())
            self._progress = Progress(*columns, TimeRemainingColumn(), console=Console(stderr=True), transient=True)
            self._progress.start()
            self._what = ""
        if what != self._what:
            for task in self._progress.task_ids:
                self._progress.remove_task(task)
            self._progress.add_task(what, total=total or None)
            self._what = what
        self._progress.update(self._progress.task_ids[0], completed=done, total=total or None)

    def hide(self) -> None:
        """Take the bar away, as before writing something else to the terminal."""
        if self._progress is not None:
            self._progress.stop()
            self._progress = None


@contextmanager
def progress_bars() -> Iterator[Bars | None]:
    """Bars that are gone when the block ends; None where stderr is no terminal."""
    if not sys.stderr.isatty():
        yield None
        return
    bars = Bars()
    try:
        yield bars
    finally:
        bars.hide()
