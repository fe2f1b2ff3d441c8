"""The sizes programs are compiled for. The only place that knows them."""

from dataclasses import dataclass

# Tokens of a row in one forward, for kernels whose numbers depend on it: a text is cut into rows of the largest, its
# end is padded to the next; decoding is 1.
CHUNK_SIZES = (1, 16, 128)
# For kernels that give a token the same bits in a row of any size: short rows need little padding.
PACKED_SIZES = (1, 16)
# Tokens of prompts in one forward, padded: more keeps the device busier, fewer lets those that decode go on sooner.
PREFILL_TOKENS = 512


@dataclass(frozen=True)
class Buckets:
    """Rows in a batch, and tokens of each, that a forward is compiled for.

    Attributes:
      rows: of one token, numbers of them.
      tokens: of a row.
      verify: numbers of rows of one token above the largest of `rows`, for batches in which drafts are rows, too.
      prefill: numbers of rows of several tokens.
      packed: the end of a text may be a row of any size, so it has the size of the others.
    """

    rows: tuple[int, ...]
    tokens: tuple[int, ...] = CHUNK_SIZES
    verify: tuple[int, ...] = ()
    prefill: tuple[int, ...] = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32)
    packed: bool = False

    @classmethod
    def up_to(cls, max_batch: int, packed: bool = False) -> "Buckets":
        """Powers of two below max_batch, max_batch itself, and for drafts up to eight times as many by half octaves."""
        rows = [1]
        while rows[-1] * 2 < max_batch:
            rows.append(rows[-1] * 2)
        if max_batch > 1:
            rows.append(max_batch)
        verify = {-(-max_batch * halves // 2) for halves in (3, 4, 6, 8, 12, 16)}
        tokens = PACKED_SIZES if packed else CHUNK_SIZES
        return cls(rows=tuple(rows), tokens=tokens, verify=tuple(sorted(verify)), packed=packed)

    @property
    def chunk(self) -> int:
        """Tokens of the largest row: texts are cut at multiples of it, counted from their first token."""
        return self.tokens[-1]

    @property
    def all_rows(self) -> tuple[int, ...]:
        """Of one token."""
        return self.rows + self.verify

    def rows_of(self, size: int, verify: bool = False) -> tuple[int, ...]:
        """Numbers of rows of so many tokens that requests may need."""
        if size == 1:
            return self.all_rows if verify else self.rows
        # Rows shorter than a chunk are ends of texts: one of each sequence.
        most = PREFILL_TOKENS // size if size == self.chunk else self.rows[-1]
        return tuple(n for n in self.prefill if n <= most) or self.prefill[:1]

    def row_bucket(self, n: int, size: int = 1) -> int:
        """The number that n rows of so many tokens are padded to."""
        return next(count for count in (self.all_rows if size == 1 else self.prefill) if count >= n)

    def cut(self, n: int) -> list[int]:
        """The tokens of the rows that n tokens, which begin at a multiple of `chunk`, are cut into, the last padded."""
        whole, rest = divmod(n, self.chunk)
        if n == 1:
            return [1]
        if not rest:
            return [self.chunk] * whole
        return [self.chunk] * whole + [self.chunk if self.packed else self.token_bucket(rest)]

    def padded(self, n: int) -> int:
        """Tokens that n tokens cost to run."""
        return sum(self.cut(n))

    def token_bucket(self, n: int) -> int:
        return next(size for size in self.tokens if size >= n)
