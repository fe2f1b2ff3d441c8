"""Block sizes of the Pallas kernels: data, per device.

The numbers for GPUs come from compiling the kernel with Triton for sm80 and sm90 and reading what it made: wgmma on
sm90, few registers spilled, shared memory that fits. They have not been timed yet. Those for TPUs are a guess.
"""

from dataclasses import dataclass

MIN_CAPABILITY = 80


@dataclass(frozen=True)
class GpuBlocks:
    """Rows of x and of the weight ("columns" of the result) of a program, its warps, stages of its pipelined loads."""

    rows: int
    columns: int
    warps: int
    stages: int


_BF16_90 = (GpuBlocks(16, 64, 4, 3), GpuBlocks(32, 64, 4, 3), GpuBlocks(64, 128, 8, 2), GpuBlocks(128, 128, 8, 2))
_BF16_80 = (GpuBlocks(16, 64, 4, 3), GpuBlocks(32, 64, 4, 2), GpuBlocks(64, 64, 4, 2))
_F32 = (GpuBlocks(16, 64, 4, 2), GpuBlocks(32, 64, 4, 1))
# By compute capability, the first one not above the card's; then the first with as many rows as x, or the largest.
_BF16 = {90: _BF16_90, 80: _BF16_80}


def gpu_blocks(rows: int, float32: bool, capability: int | None) -> GpuBlocks:
    """For ``rows`` rows of x and 10 * major + minor capability; None (no CUDA card, or one unknown) counts as 8.0."""
    known = capability if capability is not None and capability >= MIN_CAPABILITY else MIN_CAPABILITY
    table = _F32 if float32 else _BF16[max(c for c in _BF16 if c <= known)]
    return next((blocks for blocks in table if blocks.rows >= rows), table[-1])


def tpu_rows(rows: int, k: int) -> int:
    """Rows of x in a program: all, of at most 256 and 4 MiB as float32, in multiples of 16."""
    return min(max(16, min(256, (1 << 20) // k // 16 * 16)), -(-rows // 16) * 16)
