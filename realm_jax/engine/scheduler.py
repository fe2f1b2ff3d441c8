"""Which sequences run in the next forward, and with which tokens. Pure host logic: it needs no model to be tested."""

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Generic, TypeVar

import numpy as np

from realm_jax.engine.allocator import PageAllocator
from realm_jax.errors import CapacityError


class Sequence:
    """The tokens of one request and where their keys and values are.

    Attributes:
      tokens: int32 [limit], filled up to `length`: the prompt, then what was generated.
      cached: how many of them have keys and values in the cache.
      limit: most tokens it may come to hold.
      slot: its place in the batch, None unless running.
      pages: its pages in order; `table` is the same as an int32 row for the runner, padded with zeros.
    """

    def __init__(self, prompt: np.ndarray, limit: int):
        self.tokens = np.zeros(limit, np.int32)
        self.tokens[: len(prompt)] = prompt
        self.length = len(prompt)
        self.prompt_length = len(prompt)
        self.cached = 0
        self.limit = limit
        self.slot: int | None = None
        self.pages: list[int] = []
        self.table = np.zeros(0, np.int32)

    def append(self, token: int) -> None:
        self.tokens[self.length] = token
        self.length += 1


S = TypeVar("S", bound=Sequence)


@dataclass(frozen=True)
class Row(Generic[S]):
    """One row of a batch: run tokens start .. stop-1 of a sequence.

    `samples`: they are the last it has, so that the next is drawn from what they give.
    """

    sequence: S
    start: int
    stop: int
    samples: bool

    @property
    def tokens(self) -> np.ndarray:
        return self.sequence.tokens[self.start : self.stop]


class Scheduler(Generic[S]):
    """First come, first served: a sequence starts when a slot and pages for all it may ever hold are free.

    Each batch holds one token of every sequence that is decoding, so that none of them waits for a prompt, and chunks
    of prompts, oldest first, up to a budget. Chunks end at multiples of `chunk` counted from a sequence's first token:
    how a prompt is cut depends on nothing but the prompt.
    """

    def __init__(
        self,
        pages: PageAllocator,
        *,
        slots: int,
        page_size: int,
        table_size: int,
        chunk: int,
        padded: Callable[[int], int],
        prefill_budget: int,
    ):
        """
        Args:
          pages: the allocator.
          slots: most sequences running at once.
          page_size: tokens per page.
          table_size: most pages per sequence.
          chunk: most tokens of one sequence in one batch.
          padded: from a row's number of tokens to the number it costs to run.
          prefill_budget: padded tokens of prompts in one batch; a single chunk always fits.
        """
        self.pages = pages
        self.running: list[S] = []  # in order of admission
        self.waiting: deque[S] = deque()
        self._free_slots = list(range(slots - 1, -1, -1))
        self._page_size = page_size
        self._table_size = table_size
        self._chunk = chunk
        self._padded = padded
        self._prefill_budget = prefill_budget

    def pages_for(self, tokens: int) -> int:
        return -(-tokens // self._page_size)

    def check(self, limit: int) -> None:
        """Raises CapacityError when a sequence of `limit` tokens could never run, however empty the cache is."""
        needed, most = self.pages_for(limit), min(self.pages.total, self._table_size)
        if needed > most:
            raise CapacityError(
                f"{limit} tokens need {needed} pages of the cache; it has {most}: {most * self._page_size} tokens"
            )

    def __contains__(self, sequence: S) -> bool:
        """Whether it waits or runs here."""
        return sequence.slot is not None or sequence in self.waiting

    def submit(self, sequence: S) -> None:
        self.waiting.append(sequence)

    def admit(self) -> list[S]:
        """Moves sequences from waiting to running while the first in line fits; returns those."""
        admitted = []
        while self.waiting and self._free_slots:
            if self.pages_for(self.waiting[0].limit) > self.pages.free:
                break
            sequence = self.waiting.popleft()
            sequence.pages, sequence.table = self.reserve(sequence.limit)
            sequence.slot = self._free_slots.pop()
            self.running.append(sequence)
            admitted.append(sequence)
        return admitted

    def reserve(self, tokens: int) -> tuple[list[int], np.ndarray]:
        """Pages for that many tokens, and their table row int32 [table_size]. CapacityError when they are not free."""
        pages = self.pages.allocate(self.pages_for(tokens))
        table = np.zeros(self._table_size, np.int32)
        table[: len(pages)] = pages
        return pages, table

    def next_batch(self) -> list[Row[S]]:
        """At most one row per running sequence; empty only when none is running."""
        decoding: list[Row[S]] = []
        prefilling: list[Row[S]] = []
        budget = self._prefill_budget
        for sequence in self.running:
            start = sequence.cached
            stop = min(sequence.length, (start // self._chunk + 1) * self._chunk)
            row = Row(sequence, start, stop, samples=stop == sequence.length)
            if stop - start == 1:
                decoding.append(row)
                continue
            cost = self._padded(stop - start)
            if cost <= budget or not prefilling:
                prefilling.append(row)
                budget -= cost
        return decoding + prefilling

    def remove(self, sequence: S) -> None:
        """Takes a sequence out, waiting or running; its slot and pages are free at once."""
        if sequence.slot is None:
            self.waiting.remove(sequence)
            return
        self.running.remove(sequence)
        self._free_slots.append(sequence.slot)
        self.pages.release(sequence.pages)
        sequence.slot, sequence.pages = None, []
