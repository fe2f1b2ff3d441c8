"""Attention over a pool of pages: every backend against the reference, the same bits however a prompt is cut."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pallas_kernels.paged_attention import PAGE_SIZE, allocate_pages, append_rows

BACKENDS = ["xla"]
LAYERS, PAGES, HEADS, DIM = 2, 7, 2, 3


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_append_writes_the_rows_of_every_sequence_and_nothing_else(backend: str, dtype: str) -> None:
    append = jax.jit(append_rows, static_argnames="backend")

    @settings(max_examples=15, deadline=None)
    @given(st.data())
    def check(data: st.DataObject) -> None:
        rng = np.random.default_rng(data.draw(st.integers(0, 1 << 30)))
        shape = (LAYERS, PAGES, HEADS, PAGE_SIZE, DIM)
        before = np.asarray(jnp.asarray(rng.standard_normal(shape), dtype))
        pool = allocate_pages(LAYERS, PAGES, HEADS, DIM, DIM, dtype)._replace(
            keys=jnp.asarray(before), values=jnp.asarray(before)
        )
        order = rng.permutation(PAGES)
        tables = np.stack([order[:2], order[2:4]]).astype(np.int32)  # two sequences, up to two pages each
        size = 16
        starts = [data.draw(st.integers(0, 2 * PAGE_SIZE - size)) for _ in tables]
        counts = [data.draw(st.integers(0, size)) for _ in tables]
        layer = data.draw(st.integers(0, LAYERS - 1))
        new = rng.standard_normal((2, size, HEADS, DIM)).astype(np.float32)
        positions = np.full((2, size), -1, np.int32)
        keys, values = before.copy(), before.copy()
        for i, (start, count) in enumerate(zip(starts, counts, strict=True)):
            positions[i, :count] = start + np.arange(count)
            for t in range(count):
                page, row = divmod(start + t, PAGE_SIZE)
                keys[layer, tables[i, page], :, row] = new[i, t].astype(before.dtype)
                values[layer, tables[i, page], :, row] = -new[i, t].astype(before.dtype)
        after = append(pool, jnp.asarray(new), jnp.asarray(-new), tables, positions, layer=layer, backend=backend)
        np.testing.assert_array_equal(np.asarray(after.keys), keys)
        np.testing.assert_array_equal(np.asarray(after.values), values)

    check()
