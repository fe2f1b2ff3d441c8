"""The runner: owns the page pool on the device and the compiled programs, and runs batches of sequences."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from realm_jax.cache import BLOCK_PAGES, BLOCK_SIZE, PAGE_SIZE, KVPages, allocate_pages, row_dtype
from realm_jax.engine.buckets import Buckets
from realm_jax.engine.compile_cache import enable_compile_cache
from realm_jax.errors import CapacityError
from realm_jax.model.adapters import RowAdapters, Stack
from realm_jax.model.attention import CacheView
from realm_jax.model.capacity import cache_budget
from realm_jax.model.decoder import forward, logits
from realm_jax.model.params import Model, Params

Wanted = Literal["last", "all", "hidden"]
OneAdapter = tuple[dict[str, Stack], int] | None  # stacks and a slot


class Runner:
    """Runs forwards over a shared page pool.

    Rows of one call are grouped by the chunk size they are padded to, so that a row's numbers depend on nothing but its
    own sequence and how it is cut: not on the batch around it.
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
        self.buckets = Buckets.up_to(max_batch)
        self.chunk = self.buckets.tokens[-1]
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

    def wait(self) -> None:
        """Until what was dispatched is done, however it ended."""
        with suppress(jax.errors.JaxRuntimeError):
            jax.block_until_ready(self._pool)

    def reset(self) -> None:
        """Forgets the pool, which a failed call may have taken with it: what was cached is lost."""
        self._pool = None

    def step(
        self,
        tokens: Sequence[np.ndarray],
        starts: Sequence[int],
        tables: np.ndarray,
        *,
        source: np.ndarray | None = None,
        last_tokens: jax.Array | None = None,
        stacks: dict[str, Stack] | None = None,
        slots: np.ndarray | None = None,
    ) -> jax.Array:
        """Appends tokens to sequences. Waits for nothing: the result is still being computed when it returns.

        Args:
            tokens: per row, int32 [1 .. chunk] tokens to append.
            starts: per row, how many tokens its sequence already has in the cache.
            tables: int32 [rows, max_pages_per_slot]; pages of each sequence, covering the new tokens. Rows of one token
                may share a sequence, at positions that follow each other.
            source: int32 [rows], for rows of one token: where in last_tokens (int32 [max_batch + 1]) it is, -1 for
                the token given. None: those given, everywhere.
            stacks, slots: adapters (see model.adapters) and the slot of each row, int32 [rows], -1 for none.

        Returns:
            float32 [rows bucket, vocab]: logits of the last token of each row; rows past the given ones are padding.
        """
        groups: dict[int, list[int]] = {}
        for i, row in enumerate(tokens):
            groups.setdefault(self.buckets.token_bucket(len(row)), []).append(i)
        outputs = []
        for size, members in sorted(groups.items()):
            out = self._run(
                "last",
                [tokens[i] for i in members],
                [starts[i] for i in members],
                tables[members],
                size,
                previous=None if source is None or last_tokens is None else (source[members], last_tokens),
                adapters=None if stacks is None or slots is None else (stacks, slots[members]),
            )
            outputs.append((members, out))
        if len(outputs) == 1:
            return outputs[0][1]
        back = np.zeros(self.buckets.row_bucket(len(tokens)), np.int32)
        at = 0
        for members, out in outputs:
            back[members] = at + np.arange(len(members))
            at += out.shape[0]
        return _in_order([out for _, out in outputs], back)

    def step_all(self, tokens: np.ndarray, start: int, table: np.ndarray, adapter: OneAdapter = None) -> np.ndarray:
        """Appends tokens to one sequence; float32 [T, vocab] logits at every one of them. adapter: (stacks, slot)."""
        return self._run_all("all", tokens, start, table, adapter)

    def hidden_all(self, tokens: np.ndarray, start: int, table: np.ndarray) -> np.ndarray:
        """Appends tokens to one sequence; float32 [T, hidden] normalised hidden states of the last layer."""
        return self._run_all("hidden", tokens, start, table, None)

    def warm_up(self, stacks: dict[str, Stack] | None = None, verify: bool = False) -> None:
        """Compiles every program that steps may need, those with adapters if there are stacks, for drafts if asked."""
        for size in self.buckets.tokens:
            # More chunks of a prompt than the budget allows come only when they are short; decoding may have drafts.
            for rows in self.buckets.all_rows if size == 1 and verify else self.buckets.rows:
                one = np.zeros(size, np.int32)
                table = np.zeros((rows, self.max_pages_per_slot), np.int32)
                self._run("last", [one] * rows, [0] * rows, table, size, compile_only=True)
                if stacks is not None:
                    none = np.full(rows, -1, np.int32)
                    self._run("last", [one] * rows, [0] * rows, table, size, adapters=(stacks, none), compile_only=True)

    def _run_all(
        self, wanted: Wanted, tokens: np.ndarray, start: int, table: np.ndarray, adapter: OneAdapter
    ) -> np.ndarray:
        c = self.model.config
        result = np.empty((len(tokens), c.hidden_size if wanted == "hidden" else c.vocab_size), np.float32)
        adapters = None if adapter is None else (adapter[0], np.asarray([adapter[1]], np.int32))
        for at in range(0, len(tokens), self.chunk):
            part = tokens[at : at + self.chunk]
            size = self.buckets.token_bucket(len(part))
            out = self._run(wanted, [part], [start + at], table[None], size, adapters=adapters)
            # Cut on the host: a slice of a jax array would be one more program for every length.
            result[at : at + len(part)] = np.asarray(out)[0, : len(part)]
        return result

    def _run(
        self,
        wanted: Wanted,
        tokens: Sequence[np.ndarray],
        starts: Sequence[int],
        tables: np.ndarray,
        size: int,
        *,
        previous: tuple[np.ndarray, jax.Array] | None = None,
        adapters: tuple[dict[str, Stack], np.ndarray] | None = None,
        compile_only: bool = False,
    ) -> jax.Array:
        rows = self.buckets.row_bucket(len(tokens))
        ids = np.zeros((rows, size), np.int32)
        positions = np.full((rows, size), -1, np.int32)
        last = np.zeros(rows, np.int32)
        table = np.zeros((rows, self.max_pages_per_slot), np.int32)
        source = np.full(rows, -1, np.int32)
        for i, (row, start) in enumerate(zip(tokens, starts, strict=True)):
            n = len(row)
            ids[i, :n] = row
            positions[i, :n] = start + np.arange(n)
            last[i] = n - 1
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
    """One batch: tokens and positions int32 [B, T], tables [B, pages], last, source [B] -> (result, pool).

    The result is float32 [B, vocab] at index `last` of each row, or [B, T, vocab], or hidden states [B, T, hidden].
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
        hidden = jnp.take_along_axis(hidden, last[:, None, None], axis=1)[:, 0]  # [B, hidden]
    return logits(params, config, hidden, backend=backend, lora=lora), pool


@jax.jit
def _in_order(groups: list[jax.Array], back: jax.Array) -> jax.Array:
    """Rows `back` of all groups together. One program, over buckets of rows only, whoever is in which group."""
    return jnp.concatenate(groups)[back]
