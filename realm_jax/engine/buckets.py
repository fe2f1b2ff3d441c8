"""The sizes programs are compiled for. The only place that knows them."""

from dataclasses import dataclass

# Tokens of one sequence in one forward. A prompt's last chunk is padded to the next of these, decoding is 1.
CHUNK_SIZES = (1, 16, 128)


@dataclass(frozen=True)
class Buckets:
    """Rows (sequences in a batch) and tokens (of each) that a forward is compiled for.

    verify: numbers of rows above the largest of `rows`, for batches in which drafts are rows, too.
    """

    rows: tuple[int, ...]
    tokens: tuple[int, ...] = CHUNK_SIZES
    verify: tuple[int, ...] = ()

    @classmethod
    def up_to(cls, max_batch: int) -> "Buckets":
        """Powers of two below max_batch, max_batch itself, and for drafts up to eight times as many by half octaves."""
        rows = [1]
        while rows[-1] * 2 < max_batch:
            rows.append(rows[-1] * 2)
        if max_batch > 1:
            rows.append(max_batch)
        verify = {-(-max_batch * halves // 2) for halves in (3, 4, 6, 8, 12, 16)}
        return cls(rows=tuple(rows), verify=tuple(sorted(verify)))

    @property
    def all_rows(self) -> tuple[int, ...]:
        return self.rows + self.verify

    def row_bucket(self, n: int) -> int:
        return next(size for size in self.all_rows if size >= n)

    def token_bucket(self, n: int) -> int:
        return next(size for size in self.tokens if size >= n)
