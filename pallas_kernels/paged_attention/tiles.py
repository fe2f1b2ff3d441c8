"""Tile sizes of the Pallas kernels: data, per device.

The numbers come from what fits: registers and shared memory of a Triton build for sm80, sm89 and sm90, the vector memory
of a TPU. None has been timed on a card yet.
"""

from dataclasses import dataclass

from .pages import PAGE_SIZE

MAX_HEAD = 256
MIN_CAPABILITY = 80
PART_PAGES = 4  # pages that make one partial result on a GPU; another number gives results with other bits


@dataclass(frozen=True)
class Tile:
    """Of one program: rows (queries times the heads that share a key/value head), warps, stages of pipelined loads."""

    rows: int
    warps: int
    stages: int


@dataclass(frozen=True)
class Card:
    """Of one compute capability.

    few, many: rows and warps of a program when there are at most few's rows, and when there are more. Tensor cores are
    used with an instruction that is chosen by the rows of a program: from 64 on, with 4 warps, sm90 and sm100 take
    another one than below. Both tiles have to be on one side of that, else the bits of a result depend on its chunk.
    shared: bytes of shared memory for pipelined pages.
    programs: that keep the card busy.
    """

    few: tuple[int, int]
    many: tuple[int, int]
    shared: int
    programs: int


# By 10 * major + minor of the compute capability: the first one not above the card's.
_CARDS = {
    80: Card((16, 4), (64, 4), 128 << 10, 216),
    86: Card((16, 4), (64, 4), 64 << 10, 168),
    90: Card((64, 4), (128, 8), 128 << 10, 264),
    100: Card((64, 4), (128, 8), 128 << 10, 296),
    120: Card((16, 4), (64, 4), 64 << 10, 340),
}


def card(capability: int | None) -> Card:
    """For 10 * major + minor; the oldest supported card where it is not known."""
    known = max(capability or MIN_CAPABILITY, MIN_CAPABILITY)
    return _CARDS[max(c for c in _CARDS if c <= known)]


def tile(card: Card, rows: int, row_bytes: int) -> Tile:
    """For ``rows`` rows of queries over pages whose rows of keys and values have ``row_bytes`` bytes."""
    count, warps = card.few if rows <= card.few[0] else card.many
    stages = max(2, min(4, card.shared // (PAGE_SIZE * row_bytes)))
    return Tile(count, warps, stages)
