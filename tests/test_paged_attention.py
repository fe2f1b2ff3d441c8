"""Attention over a pool of pages: every backend against the reference, the same bits however a prompt is cut."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pallas_kernels.native import available, why_not
from pallas_kernels.paged_attention import (
    BLOCK_SIZE,
    PAGE_SIZE,
    KVPages,
    UnsupportedError,
    allocate_pages,
    append_rows,
    paged_attention,
    reference,
)

slow = pytest.mark.slow
needs_native = pytest.mark.skipif(not available(), reason=why_not())
BACKENDS = ["xla", pytest.param("native", marks=needs_native)]
DTYPES = ["float32", "float16", "bfloat16", "int8"]
LAYERS, LAYER = 2, 1

# heads, key/value heads, head_dim, value_dim of the pool (0: latent), of the result; softcap, sinks, window
CASES: dict[str, tuple[int, int, int, int, int, float, bool, int]] = {
    "grouped": (8, 2, 64, 64, 64, 0.0, False, 0),
    "multi-head": (3, 3, 32, 32, 32, 0.0, False, 0),
    "multi-query": (7, 1, 40, 40, 40, 0.0, False, 0),
    "odd": (6, 2, 21, 13, 13, 0.0, False, 0),
    "window": (4, 2, 64, 64, 64, 0.0, False, 150),
    "gemma2": (4, 2, 24, 24, 24, 5.0, False, 70),
    "gpt-oss": (8, 1, 64, 64, 64, 0.0, True, 128),
    "latent": (16, 1, 72, 0, 56, 0.0, False, 0),
    "wide": (4, 2, 256, 256, 256, 0.0, False, 0),
}


class Problem:
    """A batch of sequences of `length` positions each, over a pool whose other rows are NaN."""

    def __init__(self, case: str, dtype: str = "float32", batch: int = 2, length: int = 300, seed: int = 0):
        self.heads, self.kv_heads, self.dim, self.pool_dim, self.value_dim, cap, sinks, self.window = CASES[case]
        rng = np.random.default_rng(seed)
        pages = -(-length // BLOCK_SIZE) * 2
        self.length, self.batch, count = length, batch, batch * pages + 3
        self.tables = rng.permutation(count)[: batch * pages].reshape(batch, pages).astype(np.int32)
        self.q, self.k, self.v = (
            rng.standard_normal((batch, length, heads, dim)).astype(np.float32)
            for heads, dim in (
                (self.heads, self.dim),
                (self.kv_heads, self.dim),
                (self.kv_heads, self.pool_dim),
            )
        )
        pool = allocate_pages(LAYERS, count, self.kv_heads, self.dim, self.pool_dim, dtype)
        self.pool: KVPages = jax.tree.map(lambda a: jnp.full_like(a, 99 if a.dtype == jnp.int8 else jnp.nan), pool)
        self.options: dict[str, Any] = {
            "layer": LAYER,
            "scale": self.dim**-0.5 * 2,
            "softcap": cap,
            "sinks": rng.standard_normal(self.heads).astype(np.float32) if sinks else None,
            "value_dim": self.value_dim,
        }

    def run(self, backend: str, sizes: list[int], blocks: int | None = None) -> np.ndarray:
        """The sequences in chunks of `sizes`, the last one padded by a token: [B, length, heads, value_dim]."""
        step = jax.jit(partial(append_and_attend, backend=backend, **self.options))
        pool, outputs, at = self.pool, [], 0
        for size in sizes:
            part, positions = slice(at, at + size), np.tile(np.arange(at, at + size, dtype=np.int32), (self.batch, 1))
            q, k, v = self.q[:, part], self.k[:, part], self.v[:, part]
            if at + size == self.length and size > 1:
                q, k, v = (np.pad(a, [(0, 0), (0, 1), (0, 0), (0, 0)], constant_values=np.nan) for a in (q, k, v))
                positions = np.pad(positions, [(0, 0), (0, 1)], constant_values=-1)
            visited = np.int32(blocks or -(-(at + size) // BLOCK_SIZE))
            out, pool = step(pool, q, k, v, self.tables, positions, visited, np.int32(self.window))
            outputs.append(np.asarray(out)[:, :size])
            at += size
        assert at == self.length
        self.after = pool
        return np.concatenate(outputs, axis=1)

    def expected(self) -> np.ndarray:
        """By the reference, from the rows that `run` left in the pool."""
        positions = np.tile(np.arange(self.length, dtype=np.int32), (self.batch, 1))
        out = reference.paged_attention(self.q, self.after, self.tables, positions, window=self.window, **self.options)
        return np.asarray(out)


def append_and_attend(pool, q, k, v, tables, positions, blocks, window, *, layer, backend, **options):
    pool = append_rows(pool, k, v, tables, positions, layer=layer, backend=backend)
    run = partial(paged_attention, layer=layer, blocks=blocks, window=window, backend=backend, **options)
    return run(q, pool, tables, positions), pool


def nmse(ours: np.ndarray, exact: np.ndarray) -> float:
    return float(((ours - exact) ** 2).sum() / (exact**2).sum())


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("case", CASES)
def test_agrees_with_the_reference(backend: str, case: str) -> None:
    problem = Problem(case, length=200)
    ours = problem.run(backend, [199, 1])
    assert nmse(ours, problem.expected()) < 1e-12


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES[1:])
@pytest.mark.parametrize("case", ["odd", pytest.param("grouped", marks=slow), pytest.param("latent", marks=slow)])
def test_short_rows(backend: str, dtype: str, case: str) -> None:
    """Exact on the rows as they are cached; and against float32 rows, their own error and no more."""
    problem = Problem(case, dtype)
    ours = problem.run(backend, [299, 1])
    assert nmse(ours, problem.expected()) < 1e-12
    exact = Problem(case)
    positions = np.tile(np.arange(exact.length, dtype=np.int32), (exact.batch, 1))
    exact.after = reference.append_rows(exact.pool, exact.k, exact.v, exact.tables, positions, layer=LAYER)
    # A row's relative error is 2^-12 or 2^-9 at most, or half of 1/127 of its largest element.
    assert nmse(ours, exact.expected()) < {"float16": 1e-6, "bfloat16": 2e-5, "int8": 5e-4}[dtype]


@pytest.mark.parametrize(
    ("backend", "case", "dtype"),
    [
        pytest.param(
            backend,
            case,
            dtype,
            marks=[needs_native]
            if backend == "native"
            else [slow]
            if (case, dtype) != ("multi-head", "float16")
            else [],
        )
        for backend in ("xla", "native")
        for case in ("grouped", "multi-head", "gemma2", "gpt-oss", "latent")
        for dtype in ("float32", "float16")
    ],
)
def test_bits_do_not_depend_on_chunks_batch_or_blocks(backend: str, case: str, dtype: str) -> None:
    length = 650  # six blocks, two partial results
    problem = Problem(case, dtype, batch=3, length=length)
    whole = problem.run(backend, [length])
    kept = jax.tree.map(np.asarray, problem.after)
    cuts = [[128] * 5 + [10], [500, 1, 2, 5, 8, 128, 6], [16] * 40 + [10], [600] + [1] * 50]
    if backend == "xla":  # every size is compiled, in seconds
        cuts = [[128] * 5 + [10], [640, 1, 2, 7]]
    for cut in cuts:
        np.testing.assert_array_equal(problem.run(backend, cut), whole, err_msg=str(cut))
        jax.tree.map(np.testing.assert_array_equal, jax.tree.map(np.asarray, problem.after), kept)
    for rows in (1,) if backend == "xla" else (1, 2):
        part = Problem(case, dtype, batch=3, length=length)
        part.batch, part.tables = rows, part.tables[:rows]
        part.q, part.k, part.v = part.q[:rows], part.k[:rows], part.v[:rows]
        np.testing.assert_array_equal(part.run(backend, [640, 10]), whole[:rows])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("window", [0, 100])
def test_bits_do_not_depend_on_the_blocks_visited(backend: str, window: int) -> None:
    problem = Problem("grouped", batch=2, length=1100)
    problem.window = window
    problem.length = 200
    whole = problem.run(backend, [199, 1])
    for blocks in (3, 4, 5, 8):
        np.testing.assert_array_equal(problem.run(backend, [199, 1], blocks), whole)


@pytest.mark.parametrize("backend", BACKENDS)
def test_pages_behind_a_window_may_be_someone_elses(backend: str) -> None:
    problem = Problem("window", length=700)
    whole = problem.run(backend, [700])
    poisoned = jax.tree.map(np.array, problem.after)
    behind = (690 - problem.window) // PAGE_SIZE  # pages that the last ten queries do not reach
    for a in (poisoned.keys, poisoned.values):
        a[:, problem.tables[:, :behind]] = np.nan
    positions = np.tile(np.arange(690, 700, dtype=np.int32), (2, 1))
    out = paged_attention(
        problem.q[:, 690:],
        jax.tree.map(jnp.asarray, poisoned),
        problem.tables,
        positions,
        blocks=6,
        window=problem.window,
        backend=backend,
        **problem.options,
    )
    np.testing.assert_array_equal(np.asarray(out), whole[:, 690:])


@pytest.mark.parametrize("backend", BACKENDS)
def test_sequences_of_different_lengths_and_none(backend: str) -> None:
    problem = Problem("grouped", length=300)
    whole = problem.run(backend, [300])
    positions = np.full((2, 4), -1, np.int32)
    positions[0, :3] = (7, 8, 9)
    run = partial(paged_attention, window=0, backend=backend, **problem.options)
    q = np.full((2, 4, *problem.q.shape[2:]), np.nan, np.float32)
    q[0, :3] = problem.q[0, 7:10]
    out = np.asarray(run(q, problem.after, problem.tables, positions, blocks=1))
    np.testing.assert_array_equal(out[0, :3], whole[0, 7:10])


@pytest.mark.parametrize("backend", BACKENDS)
def test_vmap_adds_sequences_to_one_pool(backend: str) -> None:
    problem = Problem("gpt-oss", batch=4, length=130)
    whole = problem.run(backend, [130])
    positions = jnp.arange(130, dtype=jnp.int32)

    def one(q, k, v, table, blocks):
        return append_and_attend(
            problem.pool, q, k, v, table, positions, blocks, problem.window, backend=backend, **problem.options
        )

    args = (problem.q, problem.k, problem.v, problem.tables)
    out, pool = jax.jit(jax.vmap(one, in_axes=(0, 0, 0, 0, None), out_axes=(0, None)))(*args, 2)
    np.testing.assert_array_equal(out, whole)
    jax.tree.map(np.testing.assert_array_equal, pool, problem.after)
    twice = jax.vmap(jax.vmap(one, (0, 0, 0, 0, None), (0, None)), (0, 0, 0, 0, None), (0, None))
    out, pool = jax.jit(twice)(*(a.reshape(2, 2, *a.shape[1:]) for a in args), 2)
    np.testing.assert_array_equal(out.reshape(whole.shape), whole)
    jax.tree.map(np.testing.assert_array_equal, pool, problem.after)
    alone, _ = one(*(a[2] for a in args), 2)
    np.testing.assert_array_equal(alone, whole[2])


def test_vmap_over_windows_and_pools() -> None:
    problem = Problem("grouped", batch=1, length=200)
    problem.run("xla", [200])
    positions = np.arange(190, 200, dtype=np.int32)[None]
    run = partial(paged_attention, problem.q[:, 190:], tables=problem.tables, positions=positions, blocks=2)
    run = partial(run, backend="xla", **problem.options)
    windows = jnp.array([0, 3, 64])
    together = jax.vmap(lambda w: run(pool=problem.after, window=w))(windows)
    np.testing.assert_array_equal(together, jnp.stack([run(pool=problem.after, window=w) for w in windows]))
    pools = jax.tree.map(lambda a: jnp.stack([a, 2 * a]), problem.after)
    together = jax.vmap(lambda pool: run(pool=pool, window=0))(pools)
    np.testing.assert_array_equal(together[1], run(pool=jax.tree.map(lambda a: 2 * a, problem.after), window=0))
    new = problem.k[:, 190:]
    with pytest.raises(UnsupportedError, match="one pool"):
        jax.vmap(lambda p: append_rows(p, new, new, problem.tables, positions, layer=0))(pools)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", ["float32", "float16", "int8"])
@pytest.mark.parametrize(("batch", "size"), [(1, 1), pytest.param(2, 1, marks=slow), pytest.param(1, 16, marks=slow)])
def test_a_donated_pool_is_written_in_place(backend: str, dtype: str, batch: int, size: int) -> None:
    """Carried through a loop over layers, too: a copy of the pool would be seen in the temporaries."""
    pool = allocate_pages(LAYERS, 512, 2, 32, 32, dtype)
    tables, positions = np.zeros((batch, 2), np.int32), np.tile(np.arange(size, dtype=np.int32), (batch, 1))

    def layers(pool, x):
        def layer(carry, number):
            pool, x = carry
            kv = x[:, :, :2]
            out, pool = append_and_attend(
                pool, x, kv, kv, tables, positions, 1, 0, layer=number, scale=1.0, value_dim=32, backend=backend
            )
            return (pool, out), None

        return jax.lax.scan(layer, (pool, x), jnp.arange(LAYERS))[0]

    x = jnp.ones((batch, size, 4, 32))
    compiled = jax.jit(layers, donate_argnums=0).lower(pool, x).compile()
    memory = compiled.memory_analysis()
    size = sum(a.nbytes for a in jax.tree.leaves(pool))
    assert memory.alias_size_in_bytes == size
    assert memory.temp_size_in_bytes < size / 8
    places = [a.unsafe_buffer_pointer() for a in jax.tree.leaves(pool)]
    after, _ = compiled(pool, x)
    assert [a.unsafe_buffer_pointer() for a in jax.tree.leaves(after)] == places


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_append_writes_the_rows_of_every_sequence_and_nothing_else(backend: str, dtype: str) -> None:
    append = jax.jit(append_rows, static_argnames="backend")
    pages, heads, dim, size = 7, 2, 3, 16

    @settings(max_examples=8, deadline=None)
    @given(st.data())
    def check(data: st.DataObject) -> None:
        rng = np.random.default_rng(data.draw(st.integers(0, 1 << 30)))
        empty = allocate_pages(LAYERS, pages, heads, dim, dim, dtype)
        pool = jax.tree.map(lambda a: jnp.asarray(10 * rng.standard_normal(a.shape), a.dtype), empty)
        order = rng.permutation(pages)
        tables = np.stack([order[:2], order[2:4]]).astype(np.int32)  # two sequences, up to two pages each
        starts = [data.draw(st.integers(0, 2 * PAGE_SIZE - size)) for _ in tables]
        counts = [data.draw(st.integers(0, size)) for _ in tables]
        layer = data.draw(st.integers(0, LAYERS - 1))
        new = rng.standard_normal((2, size, heads, dim)).astype(np.float32)
        positions = np.full((2, size), -1, np.int32)
        expected = jax.tree.map(np.array, pool)
        codes, scales = map(np.asarray, reference.quantize_rows(jnp.asarray(new), empty.keys.dtype))
        for i, (start, count) in enumerate(zip(starts, counts, strict=True)):
            positions[i, :count] = start + np.arange(count)
            for t in range(count):
                page, row = divmod(start + t, PAGE_SIZE)
                at = (layer, tables[i, page], slice(None), row)
                expected.keys[at], expected.values[at] = codes[i, t], -codes[i, t]
                if dtype == "int8":
                    expected.key_scales[at] = expected.value_scales[at] = scales[i, t]
        after = append(pool, new, -new, tables, positions, layer=layer, backend=backend)
        jax.tree.map(np.testing.assert_array_equal, jax.tree.map(np.asarray, after), expected)

    check()


@pytest.mark.parametrize("backend", BACKENDS)
def test_rows_out_of_range_saturate(backend: str) -> None:
    pool = allocate_pages(1, 2, 1, 4, 4, "float16")
    k = np.array([1e6, -1e6, 65504, 65519], np.float32).reshape(1, 1, 1, 4)
    tables, positions = np.array([[0, 1]], np.int32), np.zeros((1, 1), np.int32)
    after = append_rows(pool, k, k, tables, positions, layer=0, backend=backend)
    np.testing.assert_array_equal(after.keys[0, 0, 0, 0], np.array([65504, -65504, 65504, 65504], np.float16))


def test_what_does_not_fit_is_refused_by_name() -> None:
    pool = allocate_pages(1, 4, 2, 16, 16)
    x, table, at = np.zeros((1, 3, 2, 16), np.float32), np.zeros((1, 2), np.int32), np.zeros((1, 3), np.int32)
    options = {"layer": 0, "blocks": 1, "scale": 1.0, "value_dim": 16}
    refused = [
        (lambda: append_rows(pool, x[..., :8], x, table, at, layer=0), r"k has shape \(1, 3, 2, 8\)"),
        (lambda: append_rows(pool, x, x[..., :8], table, at, layer=0), r"v has shape \(1, 3, 2, 8\)"),
        (lambda: append_rows(pool, x, x, table, at[:, :2], layer=0), r"positions has shape \(1, 2\)"),
        (lambda: append_rows(pool, x, x, table[:, :1], at, layer=0), "tables have 1 pages"),
        (lambda: append_rows(pool, x, x, table, at.astype(np.int16), layer=0), "positions is int16"),
        (lambda: paged_attention(x[..., :8], pool, table, at, **options), r"q has shape \(1, 3, 2, 8\)"),
        (lambda: paged_attention(np.zeros((1, 3, 3, 16)), pool, table, at, **options), "3 heads"),
        (lambda: paged_attention(x, pool, table, at, **options | {"value_dim": 8}), "value_dim is 8"),
        (lambda: paged_attention(x, pool, table, at, sinks=np.zeros(3), **options), r"sinks has shape \(3,\)"),
        (lambda: paged_attention(x, pool, table, at, backend="cuda", **options), "'cuda' is not available"),
        (lambda: allocate_pages(1, 4, 2, 16, 16, "float64"), "float64"),
        (lambda: append_rows(pool._replace(values=pool.values.astype("float16")), x, x, table, at, layer=0), "alike"),
        (lambda: append_rows(pool._replace(key_scales=x), x, x, table, at, layer=0), "key_scales belongs to int8"),
    ]
    for call, message in refused:
        with pytest.raises(ValueError, match=message):
            call()
