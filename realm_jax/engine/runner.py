"""The runner: cuts what is appended to sequences into rows and batches of a few sizes, and has them executed."""

from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from realm_jax.cache import BLOCK_PAGES, BLOCK_SIZE, PAGE_SIZE, row_dtype
from realm_jax.engine.buckets import PREFILL_TOKENS, Buckets
from realm_jax.engine.compile_cache import enable_compile_cache
from realm_jax.engine.executor import Batch, Executor, as_message
from realm_jax.engine.follower import Leader
from realm_jax.engine.programs import Wanted
from realm_jax.model.adapters import Stack
from realm_jax.model.capacity import cache_budget
from realm_jax.model.params import Model

_LOGITS_TOKENS = 128  # of one text, whose logits are brought to the host together
OneAdapter = tuple[dict[str, Stack], int] | None  # stacks and a slot


class Runner:
    """Runs forwards over a shared page pool.

    What is appended to a sequence is cut into rows of a few sizes (engine.buckets), and rows of one size run together,
    so that a token's numbers depend on nothing but its own sequence: not on the batch around it. Rows of one sequence
    may be in one batch, as every layer writes all keys and values before it attends.
    """

    def __init__(
        self,
        model: Model,
        *,
        max_batch: int = 8,
        cache_bytes: int | None = None,
        leader: Leader | None = None,
    ):
        """Allocates nothing on the device until the first step.

        Args:
            model: the model; the kernels are of the backend it was loaded for.
            max_batch: most sequences in one call; a multiple of the mesh's data axis.
            cache_bytes: of the page pool on one device; None: by the memory that is free. Each region holds one
                sequence of the whole context at least, and all its slots' at most.
            leader: tells the executors of a job's other processes what to do, before this one's does it.
        """
        self.max_batch = max_batch
        self.regions = model.partition.mesh.data
        # The native kernels give a token the same bits in a row of any size.
        self.buckets = Buckets.up_to(max_batch, packed=model.backend == "native")
        self.chunk = self.buckets.chunk
        self._drawing = min(max_batch, PREFILL_TOKENS // self.buckets.tokens[1])  # texts that may end in one prefill
        self.page_size = PAGE_SIZE
        blocks = -(-model.config.context_length // BLOCK_SIZE)
        self.max_pages_per_slot = blocks * BLOCK_PAGES
        budget = cache_budget() if cache_bytes is None else cache_bytes
        affordable = max(self.max_pages_per_slot, budget // page_bytes(model))
        self._region_pages = min(self.max_pages_per_slot * (max_batch // self.regions), affordable)
        self.num_pages = self._region_pages * self.regions
        self.vocab_size = model.config.vocab_size
        meet = None if leader is None else leader.meet
        self.executor = Executor(model, max_batch=max_batch, num_pages=self.num_pages, meet=meet)
        self._leader = leader
        if leader is not None:
            leader.tell("serve", max_batch=max_batch, num_pages=self.num_pages)
        enable_compile_cache()

    @property
    def model(self) -> Model:
        return self.executor.model

    @property
    def compiled(self) -> int:
        """Programs compiled so far."""
        return self.executor.compiled

    def swap(self, model: Model) -> None:
        """Runs another model of the same config from now on; nothing of the old one's cache may be used."""
        self.executor.swap(model)

    def reset(self) -> None:
        """Forgets the pool, which a failed call may have taken with it: what was cached is lost."""
        if self._leader is not None:
            self._leader.reset()
        self.executor.pool = None

    def step(
        self, tokens: Sequence[np.ndarray], starts: Sequence[int], tables: np.ndarray, **options: Any
    ) -> jax.Array:
        """As `parts`, in one array: float32 [rows bucket, vocab], rows in order; those past the given are padding."""
        parts = self.parts(tokens, starts, tables, **options)
        if len(parts) == 1 and parts[0][0] == list(range(len(tokens))) and len(tokens[0]) == 1:
            return parts[0][1]
        back = np.zeros(self.buckets.row_bucket(len(tokens)), np.int32)
        first = 0
        for members, out in parts:
            for at, row in enumerate(members):
                if row >= 0:
                    back[row] = first + at
            first += out.shape[0]
        return _in_order([out for _, out in parts], back)

    def logit_rows(self, verify: bool = False) -> tuple[int, ...]:
        """How many rows of logits steps of decoding may give; verify: with drafts, too."""
        return tuple(n * self.regions for n in (self.buckets.all_rows if verify else self.buckets.rows))

    def parts(
        self,
        tokens: Sequence[np.ndarray],
        starts: Sequence[int],
        tables: np.ndarray,
        *,
        source: np.ndarray | None = None,
        last_tokens: jax.Array | None = None,
        stacks: dict[str, Stack] | None = None,
        slots: np.ndarray | None = None,
    ) -> list[tuple[list[int], jax.Array]]:
        """Appends tokens to sequences. Waits for nothing: the results are still being computed when it returns.

        Args:
            tokens: per row, int32 [1 .. PREFILL_TOKENS] tokens to append.
            starts: per row, how many tokens its sequence already has in the cache; a multiple of `chunk` for rows of
                several tokens, or the rows are cut elsewhere than they would be.
            tables: int32 [rows, max_pages_per_slot]; pages of each sequence, covering the new tokens. Rows of one token
                may share a sequence, at positions that follow each other.
            source: int32 [rows], for rows of one token: where in last_tokens (int32 [max_batch + 1]) it is, -1 for
                the token given. None: those given, everywhere.
            stacks, slots: adapters (see model.adapters) and the slot of each row, int32 [rows], -1 for none.

        Returns:
            Rows, -1 for padding among them, and float32 [at least as many, vocab] logits of the last token of each.
        """
        # By size: of each piece its row, where in it it begins, its tokens, and whether it is the row's last.
        groups: dict[int, list[tuple[int, int, int, bool]]] = {}
        for i, row in enumerate(tokens):
            at = 0
            for size in self.buckets.cut(len(row)):
                n = min(size, len(row) - at)
                groups.setdefault(size, []).append((i, at, n, at + n == len(row)))
                at += n
        outputs = []
        for size in sorted(groups, reverse=True):  # the end of a text comes after what is before it
            pieces = groups[size]
            rows = [i for i, *_ in pieces]
            ends = [at for at, (_, _, _, end) in enumerate(pieces) if end]
            if size > 1 and len(ends) > self._drawing:
                raise ValueError(f"{len(ends)} texts end in one prefill; accepted: {self._drawing}")
            out, at_row = self._run(
                "last",
                [tokens[i][at : at + n] for i, at, n, _ in pieces],
                [starts[i] + at for i, at, _, _ in pieces],
                tables[rows],
                size,
                ends=ends,
                previous=None if source is None or last_tokens is None else (source[rows], last_tokens),
                adapters=None if stacks is None or slots is None else (stacks, slots[rows]),
            )
            if ends:
                members = [-1] * (max(at_row) + 1)
                for end, at in zip(ends, at_row):
                    members[at] = rows[end]
                outputs.append((members, out))
        return outputs

    def step_all(self, tokens: np.ndarray, start: int, table: np.ndarray, adapter: OneAdapter = None) -> np.ndarray:
        """Appends tokens to one sequence; float32 [T, vocab] logits at every one of them. adapter: (stacks, slot)."""
        return self._run_all("all", tokens, start, table, adapter)

    def hidden_all(self, tokens: np.ndarray, start: int, table: np.ndarray) -> np.ndarray:
        """Appends tokens to one sequence; float32 [T, hidden] normalised hidden states of the last layer."""
        return self._run_all("hidden", tokens, start, table, None)

    def warm_up(self, stacks: dict[str, Stack] | None = None, verify: bool = False) -> None:
        """Compiles every program that steps may need, those with adapters if there are stacks, for drafts if asked."""
        for size in self.buckets.tokens:
            for rows in self.buckets.rows_of(size, verify):
                one = np.zeros(size, np.int32)
                table = np.zeros((rows, self.max_pages_per_slot), np.int32)
                for adapters in [None] if stacks is None else [None, (stacks, np.full(rows, -1, np.int32))]:
                    self._run("last", [one] * rows, [0] * rows, table, size, adapters=adapters, compile_only=True)

    def _run_all(
        self, wanted: Wanted, tokens: np.ndarray, start: int, table: np.ndarray, adapter: OneAdapter
    ) -> np.ndarray:
        c = self.executor.model.config
        result = np.empty((len(tokens), c.hidden_size if wanted == "hidden" else c.vocab_size), np.float32)
        for at in range(0, len(tokens), _LOGITS_TOKENS):
            part = tokens[at : at + _LOGITS_TOKENS]
            sizes = self.buckets.cut(len(part))
            for size in sorted(set(sizes), reverse=True):
                begins = [i * self.chunk for i, one in enumerate(sizes) if one == size]
                pieces = [part[begin : begin + size] for begin in begins]
                starts = [start + at + begin for begin in begins]
                rows = np.repeat(table[None], len(pieces), axis=0)
                lora = None if adapter is None else (adapter[0], np.full(len(pieces), adapter[1], np.int32))
                # Cut on the host: a slice of a jax array would be one more program for every length.
                out, at_row = self._run(wanted, pieces, starts, rows, size, adapters=lora)
                values = np.asarray(out)
                for begin, piece, i in zip(begins, pieces, at_row):
                    result[at + begin : at + begin + len(piece)] = values[i, : len(piece)]
        return result

    def _run(
        self,
        wanted: Wanted,
        tokens: Sequence[np.ndarray],
        starts: Sequence[int],
        tables: np.ndarray,
        size: int,
        *,
        ends: Sequence[int] = (),
        previous: tuple[np.ndarray, jax.Array] | None = None,
        adapters: tuple[dict[str, Stack], np.ndarray] | None = None,
        compile_only: bool = False,
    ) -> tuple[jax.Array, list[int]]:
        """Runs rows of one size; the result, and where in it each row, or for "last" each of `ends`, is."""
        per_region, at = self._places(tables, size)
        rows = per_region * self.regions
        ids = np.zeros((rows, size), np.int32)
        positions = np.full((rows, size), -1, np.int32)
        last = np.tile(np.arange(per_region, dtype=np.int32), self.regions)
        table = np.zeros((rows, self.max_pages_per_slot), np.int32)
        source = np.full(rows, -1, np.int32)
        for i, row, start in zip(at, tokens, starts, strict=True):
            n = len(row)
            ids[i, :n] = row
            positions[i, :n] = start + np.arange(n)
        if size > 1:
            last = np.zeros(self._drawing * self.regions, np.int32)
            found = [0] * self.regions
            ends_at = []
            for i in ends:
                region, local = divmod(at[i], per_region)
                ends_at.append(region * self._drawing + found[region])
                last[ends_at[-1]] = local * size + len(tokens[i]) - 1
                found[region] += 1
        table[at] = tables % self._region_pages
        if previous is not None:
            source[at] = previous[0]
        slots = None
        if adapters is not None:
            slots = np.full(rows, -1, np.int32)
            slots[at] = adapters[1]
        blocks = np.asarray(-(-(int(positions.max()) + 1) // BLOCK_SIZE), np.int32)
        batch = Batch(ids, positions, table, last, blocks, source, slots)
        stacks = None if adapters is None else adapters[0]
        kind = "compile" if compile_only else "run"
        leader = self._leader
        with nullcontext() if leader is None else leader.told(kind, wanted=wanted, batch=as_message(batch)):
            if compile_only:
                self.executor.compile(wanted, batch, stacks)
                return jnp.zeros(0), []
            out = self.executor.run(wanted, batch, None if previous is None else previous[1], stacks)
        return out, ends_at if wanted == "last" and size > 1 else at

    def _places(self, tables: np.ndarray, size: int) -> tuple[int, list[int]]:
        """Rows that each region is given, padding included, and where among those of all each row goes."""
        regions = tables[:, 0] // self._region_pages
        counts = np.zeros(self.regions, int)
        order = []
        for region in regions:
            order.append(int(counts[region]))
            counts[region] += 1
        per_region = self.buckets.row_bucket(int(counts.max()), size)
        return per_region, [int(region) * per_region + i for region, i in zip(regions, order)]


def page_bytes(model: Model) -> int:
    """Of one page of a model's pool, on one device."""
    local = model.partition.local_config(model.config)
    return local.cache_values_per_token * row_dtype(model.backend).itemsize * PAGE_SIZE


@jax.jit
def _in_order(groups: list[jax.Array], back: jax.Array) -> jax.Array:
    """Rows `back` of all groups together. One program, over buckets of rows only, whoever is in which group."""
    return jnp.concatenate(groups)[back]
