"""Block sizes of the Pallas kernels: data, per device and size of head.

Those of the Triton kernels come from compiling them with Triton for sm80 and sm90: shared memory that fits, tensor-core
instructions used (wgmma on sm90), few or no registers spilled. They have not been timed yet. Those for Hopper come from
the sizes of shared memory and registers, and those for TPUs from what libtpu compiles. Blocks of keys divide
``case.KEY_BLOCK`` or are multiples of it.
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
class HopperBlocks:
    """Of the Mosaic GPU kernel: keys per step, blocks in flight, registers of a computing thread."""

    keys: int
    stages: int
    registers: int


@dataclass(frozen=True)
class TpuBlocks:
    """Rows of queries and of keys per step, forward and backward."""

    queries: int
    keys: int
    backward_queries: int
    backward_keys: int


_HALF_90 = {
    "forward": {64: GpuBlocks(128, 64, 4, 3), 128: GpuBlocks(128, 128, 8, 2), 256: GpuBlocks(128, 64, 8, 2)},
    "dq": {64: GpuBlocks(128, 64, 8, 3), 128: GpuBlocks(128, 64, 8, 3), 256: GpuBlocks(128, 32, 8, 2)},
    "dkv": {64: GpuBlocks(64, 128, 8, 3), 128: GpuBlocks(64, 128, 8, 2), 256: GpuBlocks(32, 64, 8, 2)},
}
_HALF_80 = {
    "forward": {64: GpuBlocks(128, 64, 4, 3), 128: GpuBlocks(128, 64, 8, 3), 256: GpuBlocks(128, 32, 8, 2)},
    "dq": {64: GpuBlocks(128, 32, 4, 3), 128: GpuBlocks(64, 32, 4, 2), 256: GpuBlocks(64, 32, 8, 1)},
    "dkv": {64: GpuBlocks(64, 64, 4, 2), 128: GpuBlocks(32, 64, 4, 2), 256: GpuBlocks(32, 64, 8, 1)},
}
_HALF_SMALL = {  # cards with 100 KB of shared memory
    "forward": {64: GpuBlocks(128, 64, 4, 3), 128: GpuBlocks(128, 32, 4, 3), 256: GpuBlocks(64, 32, 4, 2)},
    "dq": {64: GpuBlocks(128, 32, 4, 3), 128: GpuBlocks(64, 32, 4, 2), 256: GpuBlocks(64, 16, 4, 1)},
    "dkv": {64: GpuBlocks(64, 64, 4, 2), 128: GpuBlocks(32, 64, 4, 2), 256: GpuBlocks(16, 64, 4, 1)},
}
# By compute capability: the first not above the card's. Then by kernel and the larger head size: the first not below.
_HALF = {120: _HALF_SMALL, 90: _HALF_90, 86: _HALF_SMALL, 80: _HALF_80}
_FLOAT32 = {  # products are three TF32 products of twice the bytes, on every card
    "forward": {64: GpuBlocks(64, 32, 4, 2), 128: GpuBlocks(64, 32, 4, 1), 256: GpuBlocks(32, 16, 4, 1)},
    "dq": {64: GpuBlocks(32, 32, 4, 1), 128: GpuBlocks(32, 32, 4, 1), 256: GpuBlocks(16, 16, 4, 1)},
    "dkv": {64: GpuBlocks(32, 32, 4, 1), 128: GpuBlocks(32, 32, 4, 1), 256: GpuBlocks(16, 16, 4, 1)},
}
# Shared memory in bytes: 256 D (and 256 DV where they differ) for queries and results, 2 (D + DV) * keys a stage;
# 227 KB at most.
_HOPPER = {
    64: HopperBlocks(128, 4, 232),
    128: HopperBlocks(128, 2, 232),
    192: HopperBlocks(64, 3, 232),
    256: HopperBlocks(64, 2, 232),
}
_TPU = {128: TpuBlocks(512, 512, 512, 512), 256: TpuBlocks(512, 512, 256, 256)}
MAX_HEAD = 256
MIN_CAPABILITY = 80


def gpu_blocks(kernel: str, head: int, float32: bool, capability: int) -> GpuBlocks:
    """For ``kernel`` (forward, dq, dkv), the larger head size of keys and values, and 10 * major + minor capability."""
    table = _FLOAT32 if float32 else _HALF[max(known for known in _HALF if known <= capability)]
    return _at_least(table[kernel], head)


def hopper_blocks(head: int) -> HopperBlocks:
    return _at_least(_HOPPER, head)


def tpu_blocks(head: int) -> TpuBlocks:
    return _at_least(_TPU, head)


def _at_least(table: dict[int, Blocks], head: int) -> Blocks:
    return table[min(size for size in table if size >= head)]
