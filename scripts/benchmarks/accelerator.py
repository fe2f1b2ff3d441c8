"""What an accelerator can do at most, measured through JAX, and how it is called."""

from typing import Any

import jax
import jax.numpy as jnp

from .kernels import timed
from .machine import Peaks


def describe() -> dict[str, Any]:
    """The device JAX computes on."""
    device = jax.devices()[0]
    found: dict[str, Any] = {"platform": device.platform, "kind": device.device_kind, "count": jax.device_count()}
    for name in ("compute_capability", "core_count"):
        value = getattr(device, name, None)
        if value is not None:
            found[name] = value
    stats = device.memory_stats() or {}
    if "bytes_limit" in stats:
        found["memory_bytes"] = stats["bytes_limit"]
    return found


def copy_bandwidth(bytes: int, seconds: float) -> float:
    """1e9 bytes a second, read and written together, of an array of so many bytes."""
    words = jax.random.bits(jax.random.key(0), (bytes // 4,), jnp.uint32)
    best = min(timed(jax.jit(lambda a: a + jnp.uint32(1)), words, seconds=seconds, inner=8))
    return 2 * words.nbytes / best * 1e-9


def matmul_rate(size: int, seconds: float) -> float:
    """1e9 operations a second of a square bfloat16 product of random numbers, the vendor's library's."""
    a, b = (jax.random.normal(jax.random.key(i), (size, size), jnp.bfloat16) for i in (0, 1))
    best = min(timed(jax.jit(jnp.matmul), a, b, seconds=seconds, inner=8))
    return 2 * size**3 / best * 1e-9


def peaks(tiny: bool = False) -> Peaks:
    """Bandwidth of the device's memory, and its matrix units' rate, which stands for 8-bit and float32 work alike."""
    if tiny:
        return Peaks(copy_bandwidth(1 << 20, 0.0), *[matmul_rate(128, 0.0)] * 2)
    return Peaks(copy_bandwidth(2 << 30, 0.3), *[matmul_rate(8192, 0.5)] * 2)
