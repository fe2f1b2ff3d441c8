"""The machine a benchmark runs on, and what it can do at most: the limits that figures stand beside."""

import json
import os
import platform
import shutil
import statistics
import subprocess
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

_SOURCE = Path(__file__).with_name("peaks.c")
_FLAGS = ["-O3", "-march=native", "-pthread"]


@dataclass
class Peaks:
    """Most the processor does with all its threads, in 1e9 a second. None: not measured.

    read: bytes read from memory. int8: operations of 8-bit dot products. float32: operations of multiply-adds.
    """

    read: float | None
    int8: float | None = None
    float32: float | None = None

    def seconds(self, bytes: float, int8: float = 0.0, float32: float = 0.0) -> float | None:
        """The least time that work can take: the longest of its parts, as they overlap. None where nothing is known."""
        parts = [(bytes, self.read), (int8, self.int8), (float32, self.float32)]
        known = [amount / rate * 1e-9 for amount, rate in parts if amount and rate]
        return max(known) if known else None

    def best(self, other: "Peaks") -> "Peaks":
        """The higher of two measurements, each for itself: noise only ever lowers them."""

        def most(a: float | None, b: float | None) -> float | None:
            return max((x for x in (a, b) if x is not None), default=None)

        return Peaks(most(self.read, other.read), most(self.int8, other.int8), most(self.float32, other.float32))


class Meter:
    """Measures the peaks whenever asked and keeps the best seen. Use as a context manager."""

    def __init__(self, threads: int, mebibytes: int = 512):
        """
        Args:
          threads: to use at once.
          mebibytes: read in each round; several times the last-level cache.
        """
        self.threads, self.mebibytes = threads, mebibytes
        self.peaks = Peaks(None)
        self.busy = 0.0  # most of the machine's time that others took, as seen before each measurement
        self._folder = tempfile.TemporaryDirectory(prefix="realm-peaks-")
        self._program = _compiled(Path(self._folder.name))

    def __enter__(self) -> "Meter":
        return self

    def __exit__(self, *_: object) -> None:
        self._folder.cleanup()

    def measure(self, alone: bool = True) -> Peaks:
        """Takes a second or two; returns the best of all measurements so far.

        alone: nothing of this script is at work, nor still spinning after work, so that `busy` can be told.
        """
        if alone:
            self.busy = max(self.busy, _busy_share())
        if self._program is None:
            now = Peaks(_numpy_bandwidth(self.threads, self.mebibytes))
        else:
            command = [str(self._program), str(self.threads), str(self.mebibytes)]
            done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=120)
            found = json.loads(done.stdout)
            now = Peaks(found["read_gbs"], found["int8_gops"], found["float32_gflops"])
        self.peaks = self.peaks.best(now)
        return self.peaks


def _compiled(folder: Path) -> Path | None:
    """peaks.c as a program; None without a C compiler."""
    compiler = os.environ.get("CC") or shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
    if compiler is None:
        return None
    features = _cpu_flags()
    vector = 64 if "avx512f" in features else 32 if "avx2" in features else 16
    program = folder / "peaks"
    command = [compiler, *_FLAGS, f"-DREALM_VECTOR={vector}", str(_SOURCE), "-o", str(program)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    return program if done.returncode == 0 else None


def _busy_share(seconds: float = 0.3) -> float:
    """Which part of all processors' time is used, while this process sleeps. 0 where the system does not tell."""

    def counts() -> tuple[int, int]:
        try:
            fields = [int(x) for x in Path("/proc/stat").read_text().splitlines()[0].split()[1:9]]
        except OSError:
            return 0, 0
        return sum(fields), fields[3] + fields[4]  # all, idle

    before = counts()
    time.sleep(seconds)
    total, idle = (b - a for a, b in zip(before, counts()))
    return 1 - idle / total if total else 0.0


def _numpy_bandwidth(threads: int, mebibytes: int) -> float:
    """1e9 bytes a second read by numpy's sums, which let go of the interpreter lock. A little below a C loop's."""
    import numpy as np

    parts = np.array_split(np.ones((mebibytes << 20) // 8, np.uint64), threads)
    with ThreadPoolExecutor(threads) as pool:

        def turn() -> float:
            begun = time.perf_counter()
            list(pool.map(np.add.reduce, parts))
            return time.perf_counter() - begun

        seconds = min(turn() for _ in range(5))
    return sum(part.nbytes for part in parts) / seconds * 1e-9


def threads() -> int:
    """Processors this process may run on, which is how many threads XLA takes."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def last_level_cache() -> int:
    """Bytes of the largest cache of the first processor; 32 MiB where the system does not tell."""
    sizes = [0]
    for file in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size"):
        text = file.read_text().strip()
        sizes.append(int(text.rstrip("KMG")) << {"K": 10, "M": 20, "G": 30}.get(text[-1:], 0))
    return max(sizes) or 32 << 20


def describe() -> dict[str, Any]:
    """Processor, memory and load, for the report."""
    found: dict[str, Any] = {"system": platform.platform(), "cpu": _cpu_name(), "threads": threads()}
    flags = _cpu_flags()
    found["cpu_features"] = [name for name in ("avx2", "fma", "avx512f", "avx512_vnni", "avx512_bf16") if name in flags]
    found["last_level_cache_bytes"] = last_level_cache()
    return found


def _cpu_flags() -> set[str]:
    return set(_cpu_field("flags").split())


def _cpu_name() -> str:
    return _cpu_field("model name") or platform.processor() or platform.machine()


def _cpu_field(name: str) -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return ""
    return next((line.partition(":")[2].strip() for line in lines if line.partition(":")[0].strip() == name), "")


def peak_memory() -> int:
    """Most bytes this process has had in memory at once.

    Linux's VmHWM where there is one: ru_maxrss starts with what the parent had when it made this process.
    """
    try:
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    import resource
    import sys

    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most if sys.platform == "darwin" else most * 1024


def median(values: list[float]) -> float:
    return statistics.median(values)
