"""Tile sizes of the Pallas kernels: data, per device, type of the pages and head size.

The numbers for GPUs come from what fits: registers and shared memory of a Triton build for sm80, sm89 and sm90. None
has been timed on a card yet.
"""

from dataclasses import dataclass

MAX_HEAD = 256
MIN_CAPABILITY = 80
PART_PAGES = 4  # pages that make one partial result on a GPU; another number gives results with other bits


@dataclass(frozen=True)
class Tile:
    """Of one program: rows (queries times the heads that share a key/value head), warps, stages of pipelined loads."""

    rows: int
    warps: int
    stages: int


# By 10 * major + minor of the compute capability, the first one not above the card's; then by the larger head size, the
# first one not below: the tile for calls that have no more rows than it, and the one for others. The instruction of the
# tensor cores goes by the rows of a tile: from 64 on, sm90 and sm100 take another one than below. Both tiles have to be
# on one side of that, else the bits of a result depend on its chunk.
_TILES = {
    80: {
        64: (Tile(16, 4, 4), Tile(64, 4, 3)),
        128: (Tile(16, 4, 3), Tile(64, 4, 3)),
        256: (Tile(16, 4, 3), Tile(32, 4, 2)),
    },
    86: {
        64: (Tile(16, 4, 4), Tile(64, 4, 3)),
        128: (Tile(16, 4, 3), Tile(64, 4, 2)),
        256: (Tile(16, 4, 2), Tile(32, 4, 1)),
    },
    90: {
        64: (Tile(64, 4, 4), Tile(128, 8, 4)),
        128: (Tile(64, 4, 4), Tile(128, 8, 3)),
        256: (Tile(64, 8, 2), Tile(64, 8, 2)),
    },
    120: {
        64: (Tile(16, 4, 4), Tile(64, 4, 3)),
        128: (Tile(16, 4, 3), Tile(64, 4, 2)),
        256: (Tile(16, 4, 2), Tile(32, 4, 1)),
    },
}
# float32 pages, both tiles alike; a product is three TF32 products. Heads of 256 do not fit into 99 KB.
_FLOAT32 = {
    80: {64: Tile(16, 4, 2), 128: Tile(16, 4, 2), 256: Tile(16, 8, 1)},
    86: {64: Tile(16, 4, 2), 128: Tile(16, 4, 1)},
    90: {64: Tile(16, 4, 3), 128: Tile(16, 4, 2), 256: Tile(16, 8, 1)},
    120: {64: Tile(16, 4, 2), 128: Tile(16, 4, 1)},
}
_PROGRAMS = {80: 216, 86: 168, 90: 264, 120: 340}  # that keep a card busy


def tiles(capability: int | None, head: int, float32: bool) -> tuple[Tile, Tile] | None:
    """For few rows and for many; None where a head does not fit. head: the larger head size; the oldest card is taken
    where it is not known."""
    card = _card(capability)
    sizes = {size: (tile, tile) for size, tile in _FLOAT32[card].items()} if float32 else _TILES[card]
    return next((sizes[size] for size in sorted(sizes) if size >= head), None)


def programs(capability: int | None) -> int:
    """How many programs keep the card busy."""
    return _PROGRAMS[_card(capability)]


def _card(capability: int | None) -> int:
    known = max(capability or MIN_CAPABILITY, MIN_CAPABILITY)
    return max(c for c in _TILES if c <= known)


@dataclass(frozen=True)
class TpuSizes:
    """rows of a tile at most; bytes of its queries in float32; blocks of positions a step, and bytes of them."""

    rows: int
    tile_bytes: int
    step_blocks: int
    step_bytes: int


TPU = TpuSizes(rows=128, tile_bytes=1 << 20, step_blocks=4, step_bytes=2 << 20)
