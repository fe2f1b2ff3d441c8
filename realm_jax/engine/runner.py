"""The runner: owns the page pool on the device and the compiled programs, and runs batches of sequences."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from realm_jax.cache import BLOCK_PAGES, BLOCK_SIZE, PAGE_SIZE, KVPages, allocate_pages, row_dtype
from realm_jax.engine.buckets import PREFILL_TOKENS, Buckets
from realm_jax.engine.compile_cache import enable_compile_cache
from realm_jax.errors import CapacityError
from realm_jax.model.adapters import RowAdapters, Stack
from realm_jax.model.attention import CacheView
from realm_jax.model.capacity import cache_budget
from realm_jax.model.decoder import forward, logits
from realm_jax.model.params import Model, Params

Wanted = Literal["last", "all", "hidden"]
_LOGITS_TOKENS = 128  # of one text, whose logits are brought to the host together
OneAdapter = tuple[dict[str, Stack], int] | None  # stacks and a slot


class Runner:
    """Runs forwards over a shared page pool.

    What is appended to a sequence is cut into rows of a few sizes (engine.buckets), and rows of one size run together,
    so that a token's numbers depend on nothing but its own sequence: not on the batch around it. Rows of one sequence
    may be in one batch, as every layer writes all keys and values before it attends.
    """

    def __init__(self, model: Model, *, max_batch: int = 8, cache_bytes: int | None = None):
        """Allocates nothing on the device until the first step.

        Args:
            model: the model; the kernels are of the backend it was loaded for.
            max_batch: most sequences in one call.
            cache_bytes: of the page pool; None: by the memory that is free. It holds one sequence of the whole context
                at least, and max_batch of them at most.
        """
        self.model = model
        self.max_batch = max_batch
        # The native kernels give a token the same bits in a row of any size.
        self.buckets = Buckets.up_to(max_batch, packed=model.backend == "native")
        self.chunk = self.buckets.chunk
        self._drawing = min(max_batch, PREFILL_TOKENS // self.buckets.tokens[1])  # texts that may end in one prefill
        self.page_size = PAGE_SIZE
        blocks = -(-model.config.context_length // BLOCK_SIZE)
        self.max_pages_per_slot = blocks * BLOCK_PAGES
        self.row_dtype = row_dtype(model.backend)
        budget = cache_budget() if cache_bytes is None else cache_bytes
        affordable = max(self.max_pages_per_slot, budget // page_bytes(model))
        self.num_pages = min(self.max_pages_per_slot * max_batch, affordable)
        self.vocab_size = model.config.vocab_size
        self._pool: KVPages | None = None
        self._programs: dict[tuple[Any, ...], Callable[..., Any]] = {}
        self.on_compile: Callable[[str], None] | None = None
        enable_compile_cache()

    @property
    def compiled(self) -> int:
        """Programs compiled so far."""
        return len(self._programs)

    def swap(self, model: Model) -> None:
        """Runs another model of the same config from now on; nothing of the old one's cache may be used."""
        self.model = model
        self._programs.clear()

    def reset(self) -> None:
        """Forgets the pool, which a failed call may have taken with it: what was cached is lost."""
        self._pool = None

    def step(
        self, tokens: Sequence[np.ndarray], starts: Sequence[int], tables: np.ndarray, **options: Any
    ) -> jax.Array:
        """As `parts`, in one array: float32 [rows bucket, vocab], rows in order; those past the given are padding."""
        parts = self.parts(tokens, starts, tables, **options)
        if len(parts) == 1 and parts[0][0] == list(range(len(tokens))) and len(tokens[0]) == 1:
            return parts[0][1]
        back = np.zeros(self.buckets.row_bucket(len(tokens)), np.int32)
        at = 0
        for members, out in parts:
            back[members] = at + np.arange(len(members))
            at += out.shape[0]
        return _in_order([out for _, out in parts], back)

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
            Rows, and float32 [at least as many, vocab] logits of the last token of each.
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
            out = self._run(
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
                outputs.append(([rows[at] for at in ends], out))
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
        c = self.model.config
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
                out = np.asarray(self._run(wanted, pieces, starts, rows, size, adapters=lora))
                for begin, piece, values in zip(begins, pieces, out):
                    result[at + begin : at + begin + len(piece)] = values[: len(piece)]
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
    ) -> jax.Array:
        rows = self.buckets.row_bucket(len(tokens), size)
        ids = np.zeros((rows, size), np.int32)
        positions = np.full((rows, size), -1, np.int32)
        last = np.arange(rows, dtype=np.int32) if size == 1 else np.zeros(self._drawing, np.int32)
        table = np.zeros((rows, self.max_pages_per_slot), np.int32)
        source = np.full(rows, -1, np.int32)
        for i, (row, start) in enumerate(zip(tokens, starts, strict=True)):
            n = len(row)
            ids[i, :n] = row
            positions[i, :n] = start + np.arange(n)
        if size > 1:
            last[: len(ends)] = [i * size + len(tokens[i]) - 1 for i in ends]
        table[: len(tokens)] = tables
        last_tokens: Any = np.zeros(self.max_batch + 1, np.int32)
        if previous is not None:
            source[: len(tokens)], last_tokens = previous
        lora = None
        if adapters is not None:
            slots = np.full(rows, -1, np.int32)
            slots[: len(tokens)] = adapters[1]
            lora = RowAdapters(adapters[0], slots)  # type: ignore[arg-type]  # numpy will do
        blocks = np.int32(-(-(int(positions.max()) + 1) // BLOCK_SIZE))
        with _naming_lack_of_memory():
            if self._pool is None:
                c = self.model.config
                shape = (c.num_layers, self.num_pages, c.num_kv_heads, c.head_dim, c.value_dim)
                self._pool = allocate_pages(*shape, self.row_dtype)
            args = (self.model.params, self._pool, ids, positions, table, last, blocks, source, last_tokens, lora)
            program = self._program(wanted, rows, size, args)
            if compile_only:
                return jnp.zeros(0)
            self._pool = None  # donated: if the call fails, what was cached is lost; the next call makes a fresh pool
            out, self._pool = program(*args)
        return out

    def _program(self, wanted: Wanted, rows: int, size: int, args: tuple) -> Callable[..., Any]:
        lora = args[-1]
        shapes = () if lora is None else tuple((r, *(a.shape for a in s)) for r, s in sorted(lora.stacks.items()))
        key = (wanted, rows, size, shapes)
        if key not in self._programs:
            if self.on_compile is not None:
                self.on_compile(f"{rows} x {size} tokens" + (" with adapters" if shapes else ""))
            m = self.model
            run = partial(_run_batch, config=m.config, plan=m.plan, backend=m.backend, wanted=wanted)
            self._programs[key] = jax.jit(run, donate_argnums=1).lower(*args).compile()
        return self._programs[key]


def page_bytes(model: Model) -> int:
    """Of one page of a model's pool."""
    return model.config.cache_values_per_token * row_dtype(model.backend).itemsize * PAGE_SIZE


@contextmanager
def _naming_lack_of_memory() -> Iterator[None]:
    """Tells what a device's "resource exhausted" means to a user."""
    try:
        yield
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        first = str(error).partition("\n")[0]
        raise CapacityError(f"out of memory ({first}): a smaller context_length or max_batch needs less") from error


def _run_batch(
    params: Params,
    pool: KVPages,
    tokens: jax.Array,
    positions: jax.Array,
    tables: jax.Array,
    last: jax.Array,
    blocks: jax.Array,
    source: jax.Array,
    last_tokens: jax.Array,
    lora: RowAdapters | None,
    *,
    config: Any,
    plan: Any,
    backend: str,
    wanted: Wanted,
) -> tuple[jax.Array, KVPages]:
    """One batch: tokens and positions int32 [B, T], tables [B, pages], source [B], last [N] -> (result, pool).

    The result is float32 [N, vocab] at the tokens `last` of all B * T, [B, T, vocab], or hidden states [B, T, hidden].
    """
    if tokens.shape[1] == 1:
        tokens = jnp.where(source >= 0, last_tokens[source], tokens[:, 0])[:, None]

    def one(tokens: jax.Array, positions: jax.Array, table: jax.Array, lora: RowAdapters | None):
        view = CacheView(table, blocks)
        return forward(params, config, plan, tokens, positions, pool, view, backend=backend, lora=lora)

    by_row = None if lora is None else RowAdapters(None, 0)  # type: ignore[arg-type]  # axes: only slots are batched
    hidden, pool = jax.vmap(one, in_axes=(0, 0, 0, by_row), out_axes=(0, None))(tokens, positions, tables, lora)
    if wanted == "hidden":
        return hidden, pool
    if wanted == "last":
        hidden = hidden.reshape(-1, hidden.shape[-1])[last]  # [N, hidden]
        if lora is not None:
            lora = RowAdapters(lora.stacks, lora.slot[last // tokens.shape[1]])
    return logits(params, config, hidden, backend=backend, lora=lora), pool


@jax.jit
def _in_order(groups: list[jax.Array], back: jax.Array) -> jax.Array:
    """Rows `back` of all groups together. One program, over buckets of rows only, whoever is in which group."""
    return jnp.concatenate(groups)[back]
