"""The runner: owns the page pool on the device and the compiled programs, and runs batches of sequences."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from realm_jax.cache import BLOCK_PAGES, BLOCK_SIZE, PAGE_SIZE, KVPages, allocate_pages, row_dtype
from realm_jax.engine.buckets import Buckets
from realm_jax.engine.compile_cache import enable_compile_cache
from realm_jax.errors import CapacityError
from realm_jax.model.attention import CacheView
from realm_jax.model.decoder import forward, logits
from realm_jax.model.params import Model, Params

Wanted = Literal["last", "all", "hidden"]
POOL_BYTES = 512 << 20  # of cached rows, or one whole context where that is more; zeroing more delays the first token


class Runner:
    """Runs forwards over a shared page pool.

    Rows of one call are grouped by the chunk size they are padded to, so that a row's numbers depend on nothing but its
    own sequence and how it is cut: not on the batch around it.
    """

    def __init__(self, model: Model, *, max_batch: int = 8):
        """Allocates nothing on the device until the first step.

        Args:
            model: the model; the kernels are of the backend it was loaded for.
            max_batch: most sequences in one call.
        """
        self.model = model
        self.max_batch = max_batch
        self.buckets = Buckets.up_to(max_batch)
        self.chunk = self.buckets.tokens[-1]
        self.page_size = PAGE_SIZE
        blocks = -(-model.config.context_length // BLOCK_SIZE)
        self.max_pages_per_slot = blocks * BLOCK_PAGES
        self.row_dtype = row_dtype(model.backend)
        page_bytes = model.config.cache_values_per_token * self.row_dtype.itemsize * PAGE_SIZE
        affordable = max(self.max_pages_per_slot, POOL_BYTES // page_bytes)
        self.num_pages = min(self.max_pages_per_slot * max_batch, affordable)
        self.vocab_size = model.config.vocab_size
        self._pool: KVPages | None = None
        self._programs: dict[tuple[Wanted, int, int], Callable[..., Any]] = {}
        self.on_compile: Callable[[str], None] | None = None
        enable_compile_cache()

    @property
    def compiled(self) -> int:
        """Programs compiled so far."""
        return len(self._programs)

    def step(self, tokens: Sequence[np.ndarray], starts: Sequence[int], tables: np.ndarray) -> jax.Array:
        """Appends tokens to sequences.

        Args:
            tokens: per row, int32 [1 .. chunk] tokens to append.
            starts: per row, how many tokens its sequence already has in the cache.
            tables: int32 [rows, max_pages_per_slot]; pages of each sequence, covering the new tokens.

        Returns:
            float32 [rows bucket, vocab]: logits of the last token of each row; rows past the given ones are padding.
        """
        groups: dict[int, list[int]] = {}
        for i, row in enumerate(tokens):
            groups.setdefault(self.buckets.token_bucket(len(row)), []).append(i)
        outputs = []
        for size, members in sorted(groups.items()):
            out = self._run("last", [tokens[i] for i in members], [starts[i] for i in members], tables[members], size)
            outputs.append((members, out))
        if len(outputs) == 1:
            return outputs[0][1]
        back = np.zeros(self.buckets.row_bucket(len(tokens)), np.int32)
        at = 0
        for members, out in outputs:
            back[members] = at + np.arange(len(members))
            at += out.shape[0]
        return _in_order([out for _, out in outputs], back)

    def step_all(self, tokens: np.ndarray, start: int, table: np.ndarray) -> np.ndarray:
        """Appends tokens to one sequence; float32 [T, vocab] logits at every one of them."""
        return self._run_all("all", tokens, start, table)

    def hidden_all(self, tokens: np.ndarray, start: int, table: np.ndarray) -> np.ndarray:
        """Appends tokens to one sequence; float32 [T, hidden] normalised hidden states of the last layer."""
        return self._run_all("hidden", tokens, start, table)

    def _run_all(self, wanted: Wanted, tokens: np.ndarray, start: int, table: np.ndarray) -> np.ndarray:
        c = self.model.config
        result = np.empty((len(tokens), c.hidden_size if wanted == "hidden" else c.vocab_size), np.float32)
        for at in range(0, len(tokens), self.chunk):
            part = tokens[at : at + self.chunk]
            out = self._run(wanted, [part], [start + at], table[None], self.buckets.token_bucket(len(part)))
            # Cut on the host: a slice of a jax array would be one more program for every length.
            result[at : at + len(part)] = np.asarray(out)[0, : len(part)]
        return result

    def _run(
        self, wanted: Wanted, tokens: Sequence[np.ndarray], starts: Sequence[int], tables: np.ndarray, size: int
    ) -> jax.Array:
        rows = self.buckets.row_bucket(len(tokens))
        ids = np.zeros((rows, size), np.int32)
        positions = np.full((rows, size), -1, np.int32)
        last = np.zeros(rows, np.int32)
        table = np.zeros((rows, self.max_pages_per_slot), np.int32)
        for i, (row, start) in enumerate(zip(tokens, starts, strict=True)):
            n = len(row)
            ids[i, :n] = row
            positions[i, :n] = start + np.arange(n)
            last[i] = n - 1
        table[: len(tokens)] = tables
        blocks = np.int32(-(-(int(positions.max()) + 1) // BLOCK_SIZE))
        with _naming_lack_of_memory():
            if self._pool is None:
                c = self.model.config
                shape = (c.num_layers, self.num_pages, c.num_kv_heads, c.head_dim, c.value_dim)
                self._pool = allocate_pages(*shape, self.row_dtype)
            args = (self.model.params, self._pool, ids, positions, table, last, blocks)
            program = self._program(wanted, rows, size, args)
            self._pool = None  # donated: if the call fails, what was cached is lost; the next call makes a fresh pool
            out, self._pool = program(*args)
        return out

    def _program(self, wanted: Wanted, rows: int, size: int, args: tuple) -> Callable[..., Any]:
        key = (wanted, rows, size)
        if key not in self._programs:
            if self.on_compile is not None:
                self.on_compile(f"{rows} x {size} tokens")
            m = self.model
            run = partial(_run_batch, config=m.config, plan=m.plan, backend=m.backend, wanted=wanted)
            self._programs[key] = jax.jit(run, donate_argnums=1).lower(*args).compile()
        return self._programs[key]


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
    *,
    config: Any,
    plan: Any,
    backend: str,
    wanted: Wanted,
) -> tuple[jax.Array, KVPages]:
    """One batch: tokens and positions int32 [B, T], tables [B, pages], last [B] -> (result, pool).

    The result is float32 [B, vocab] at index `last` of each row, or [B, T, vocab], or hidden states [B, T, hidden].
    """

    def one(tokens: jax.Array, positions: jax.Array, table: jax.Array):
        return forward(params, config, plan, tokens, positions, pool, CacheView(table, blocks), backend=backend)

    hidden, pool = jax.vmap(one, out_axes=(0, None))(tokens, positions, tables)
    if wanted == "hidden":
        return hidden, pool
    if wanted == "last":
        hidden = jnp.take_along_axis(hidden, last[:, None, None], axis=1)[:, 0]  # [B, hidden]
    return logits(params, config, hidden, backend=backend), pool


@jax.jit
def _in_order(groups: list[jax.Array], back: jax.Array) -> jax.Array:
    """Rows `back` of all groups together. One program, over buckets of rows only, whoever is in which group."""
    return jnp.concatenate(groups)[back]
