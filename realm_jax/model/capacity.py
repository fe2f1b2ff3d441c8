"""Whether a model fits in memory: asked before anything is allocated, as running out may end the whole process."""

import contextlib
import os
from pathlib import Path

import jax

from realm_jax.cache import BLOCK_SIZE, row_dtype
from realm_jax.errors import CapacityError
from realm_jax.model.config import ModelConfig

CPU_CACHE_BYTES = 512 << 20
ACCELERATOR_SHARE = 0.85  # the rest is for what is computed meanwhile
_MEMORY_INFO = Path("/proc/meminfo")
_CGROUP_USED = Path("/sys/fs/cgroup/memory.current")
_CGROUP_LIMIT = Path("/sys/fs/cgroup/memory.max")  # of a container, in bytes, or "max"


def memory_limit() -> int | None:
    """Bytes of memory that the first device has in all; None where that cannot be known."""
    stats = jax.local_devices()[0].memory_stats()
    if stats is not None and "bytes_limit" in stats:
        return int(stats["bytes_limit"])
    limits = []
    if "SC_PHYS_PAGES" in getattr(os, "sysconf_names", {}):
        limits.append(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
    with contextlib.suppress(OSError, ValueError):  # no container, or no limit
        limits.append(int(_CGROUP_LIMIT.read_text()))
    return min(limits, default=None)


def free_memory() -> int | None:
    """Bytes of memory that the first device has left; None where that cannot be known."""
    stats = jax.local_devices()[0].memory_stats()
    if stats is not None and "bytes_limit" in stats:
        return int(stats["bytes_limit"]) - int(stats.get("bytes_in_use", 0))
    left = []
    with contextlib.suppress(OSError, ValueError, StopIteration):
        lines = _MEMORY_INFO.read_text().splitlines()
        left.append(1024 * int(next(line for line in lines if line.startswith("MemAvailable:")).split()[1]))
    with contextlib.suppress(OSError, ValueError):
        left.append(int(_CGROUP_LIMIT.read_text()) - int(_CGROUP_USED.read_text()))
    return min(left, default=None)


def cache_budget() -> int:
    """Bytes for the key/value cache when nobody says how many: of what is free now, nearly all of an accelerator's.

    On a CPU at most CPU_CACHE_BYTES, and a quarter of what is free: others use that memory, too, and zeroing more would
    delay the first token.
    """
    free = free_memory()
    if jax.default_backend() != "cpu" and free is not None:
        return int(free * ACCELERATOR_SHARE)
    return CPU_CACHE_BYTES if free is None else min(CPU_CACHE_BYTES, free // 4)


def check_fits(config: ModelConfig, weights: int, backend: str) -> None:
    """CapacityError when `weights` bytes and the cache of one sequence of the full context are more than there is."""
    limit = memory_limit()
    tokens = -(-config.context_length // BLOCK_SIZE) * BLOCK_SIZE
    cache = tokens * config.cache_values_per_token * row_dtype(backend).itemsize
    if limit is not None and weights + cache > limit:
        raise CapacityError(
            f"the weights need {weights:,} bytes and the cache {cache:,} for a context of {config.context_length} "
            f"tokens; there are {limit:,} bytes of memory in all: a smaller context_length or model needs less"
        )
