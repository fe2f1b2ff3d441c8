"""Block sizes of the Pallas kernels: data, per device and size of head.

The numbers for GPUs come from what fits: shared memory and registers of a Triton build for sm80, sm89 and sm90
(scripts/bench_kernels times them). Blocks of keys divide ``case.KEY_BLOCK`` or are multiples of it.
"""

from dataclasses import dataclass
from typing import TypeVar

Blocks = TypeVar("Blocks")


@dataclass(frozen=True)
class GpuBlocks:
    """Of one kernel: rows of queries and of keys per step, warps of a program, stages of the pipelined loads."""

    queries: int
    keys: int
    warps: int
    stages: int


@dataclass(frozen=True)
class TpuBlocks:
    """Rows of queries and of keys per step, forward and backward."""

    queries: int
    keys: int
    backward_queries: int
    backward_keys: int


# By compute capability (the first one not above the card's), then by the larger head size (the first one not below).
_GPU: dict[str, dict[int, dict[int, GpuBlocks]]] = {
    "forward": {
        90: {64: GpuBlocks(128, 128, 4, 3), 128: GpuBlocks(128, 128, 8, 2), 256: GpuBlocks(128, 64, 8, 2)},
        86: {64: GpuBlocks(128, 64, 4, 3), 128: GpuBlocks(128, 32, 4, 2), 256: GpuBlocks(64, 32, 4, 2)},
        80: {64: GpuBlocks(128, 64, 4, 3), 128: GpuBlocks(128, 64, 4, 3), 256: GpuBlocks(128, 32, 8, 2)},
    },
    "dq": {
        90: {64: GpuBlocks(128, 64, 4, 3), 128: GpuBlocks(128, 64, 8, 2), 256: GpuBlocks(64, 32, 4, 2)},
        80: {64: GpuBlocks(128, 32, 4, 3), 128: GpuBlocks(64, 32, 4, 2), 256: GpuBlocks(64, 16, 4, 1)},
    },
    "dkv": {
        90: {64: GpuBlocks(64, 128, 4, 3), 128: GpuBlocks(64, 128, 8, 2), 256: GpuBlocks(32, 64, 4, 2)},
        80: {64: GpuBlocks(32, 128, 4, 3), 128: GpuBlocks(32, 64, 4, 2), 256: GpuBlocks(16, 64, 4, 1)},
    },
}
# float32 products are three TF32 products: half the rows fit.
_GPU_FLOAT32 = {
    "forward": {64: GpuBlocks(64, 32, 4, 2), 128: GpuBlocks(64, 32, 4, 2), 256: GpuBlocks(32, 16, 4, 1)},
    "dq": {64: GpuBlocks(32, 32, 4, 1), 128: GpuBlocks(32, 32, 4, 1), 256: GpuBlocks(16, 16, 4, 1)},
    "dkv": {64: GpuBlocks(32, 32, 4, 1), 128: GpuBlocks(32, 32, 4, 1), 256: GpuBlocks(16, 16, 4, 1)},
}
_TPU = {128: TpuBlocks(512, 512, 512, 512), 256: TpuBlocks(512, 512, 256, 256)}
MAX_HEAD = 256
MIN_CAPABILITY = 80


def gpu_blocks(kernel: str, head: int, float32: bool, capability: int) -> GpuBlocks:
    """For ``kernel`` (forward, dq, dkv), the larger head size of keys and values, and 10 * major + minor capability."""
    if float32:
        return _at_least(_GPU_FLOAT32[kernel], head)
    return _at_least(_GPU[kernel][max(c for c in _GPU[kernel] if c <= capability)], head)


def tpu_blocks(head: int) -> TpuBlocks:
    return _at_least(_TPU, head)


def _at_least(table: dict[int, Blocks], head: int) -> Blocks:
    return table[min(size for size in table if size >= head)]
