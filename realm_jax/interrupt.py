"""Ctrl-C in the middle of a step."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType


@contextmanager
def interrupt_deferred() -> Iterator[None]:
    """Within the block a first Ctrl-C waits for its end, where the handler in force before is called.

    So a step of the engine is never torn: buffers given to the device come back, and counts stay exact. A second Ctrl-C
    is delivered at once. Outside the main thread, where Python delivers no signals, this does nothing.
    """
    handler = signal.getsignal(signal.SIGINT)
    if threading.current_thread() is not threading.main_thread() or not callable(handler):
        yield
        return
    arrived: list[tuple[int, FrameType | None]] = []

    def note(number: int, frame: FrameType | None) -> None:
        if arrived:
            handler(number, frame)
        arrived.append((number, frame))

    signal.signal(signal.SIGINT, note)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, handler)
        if arrived:
            handler(*arrived[0])
