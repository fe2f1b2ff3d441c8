"""What this machine's processor can do, measured in half a second. No jax in here."""

import contextlib
import os
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np

_READ_BYTES = 128 << 20  # more than caches hold
_SIZE = 1024  # of the matrices that are multiplied
_TURNS = 3


@dataclass(frozen=True)
class Machine:
    """memory: bytes. bandwidth: bytes a second that all threads read. flops: float32 operations a second in matmul."""

    memory: int
    bandwidth: float
    flops: float


@cache
def this_machine() -> Machine:
    """Measures this machine, once a process."""
    threads = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    parts = np.array_split(np.ones(_READ_BYTES // 8), threads)
    with ThreadPoolExecutor(threads) as pool:
        reading = _least_seconds(lambda: list(pool.map(np.max, parts)))  # numpy reads without the GIL
    a = np.ones((_SIZE, _SIZE), np.float32)
    multiplying = _least_seconds(lambda: a @ a)
    return Machine(_memory(), _READ_BYTES / reading, 2 * _SIZE**3 / multiplying)


def _least_seconds(run: Callable[[], object]) -> float:
    seconds = []
    for _ in range(_TURNS):
        start = time.perf_counter()
        run()
        seconds.append(time.perf_counter() - start)
    return min(seconds)


def _memory() -> int:
    """Bytes that this machine, or the container it is, has."""
    limits = [os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")]
    with contextlib.suppress(OSError, ValueError):  # no container, or no limit
        limits.append(int(Path("/sys/fs/cgroup/memory.max").read_text()))
    return min(limits)
