"""The page pool: what is appended is what a contiguous cache would hold, and nothing else changes."""

import jax.numpy as jnp
import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from realm_jax.cache import PAGE_SIZE, KVPool, KVRows, append

LAYERS, PAGES, HEADS, DIM = 2, 7, 2, 3


@settings(max_examples=30, deadline=None)
@given(st.data())
def test_append_writes_the_rows_of_every_sequence_and_nothing_else(data: st.DataObject) -> None:
    rng = np.random.default_rng(data.draw(st.integers(0, 1 << 30)))
    before = rng.standard_normal((LAYERS, PAGES, HEADS, PAGE_SIZE, DIM)).astype(np.float32)
    order = rng.permutation(PAGES)
    tables = np.stack([order[:3], order[3:6]]).astype(np.int32)  # two sequences, up to three pages each
    size = 16
    starts = [data.draw(st.integers(0, 3 * PAGE_SIZE - size)) for _ in tables]
    counts = [data.draw(st.integers(0, size)) for _ in tables]
    new = rng.standard_normal((LAYERS, 2, size, HEADS, DIM)).astype(np.float32)
    positions = np.full((2, size), -1, np.int32)
    expected = before.copy()
    for i, (start, count) in enumerate(zip(starts, counts, strict=True)):
        positions[i, :count] = start + np.arange(count)
        for t in range(count):
            page, row = divmod(start + t, PAGE_SIZE)
            expected[:, tables[i, page], :, row] = new[:, i, t]
    pool = append(
        KVPool(keys=jnp.asarray(before), values=jnp.asarray(before)),
        KVRows(keys=jnp.asarray(new), values=jnp.asarray(-new)),
        jnp.asarray(tables),
        jnp.asarray(positions),
    )
    np.testing.assert_array_equal(pool.keys, expected)
    changed = expected != before
    np.testing.assert_array_equal(pool.values, np.where(changed, -expected, before))
