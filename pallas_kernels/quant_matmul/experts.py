"""Matmul by one expert per row: rows are grouped by expert, which is then dequantized once for a block of rows."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

MIN_BLOCK, MAX_BLOCK = 8, 128  # rows


def for_each_expert(
    x: jax.Array, expert_ids: jax.Array, experts: int, width: int, matmul: Callable[[jax.Array, Any], jax.Array]
) -> jax.Array:
    """x [M, K], expert_ids [M] int32 in 0..experts-1 -> [M, width] float32: row i is matmul(x[i:i+1], expert_ids[i]).

    matmul(rows [R, K], expert) is called on blocks of rows of one expert; unused experts are never touched. One scheme
    for one row and for thousands, so that a row's bits do not depend on the others.
    """
    m = x.shape[0]
    # About twice an expert's fair share: few experts are dequantized twice, and few rows of a block are padding.
    block = min(m, MAX_BLOCK, max(MIN_BLOCK, 2 * -(-m // experts)))
    ids = jnp.clip(expert_ids, 0, experts - 1)
    order = jnp.argsort(ids, stable=True)  # [M] rows, grouped by expert
    counts = jnp.zeros(experts, jnp.int32).at[ids].add(1)
    first = jnp.cumsum(counts) - counts  # [E] where an expert's rows begin in ``order``
    blocks = -(-counts // block)  # [E] blocks of rows
    ends = jnp.cumsum(blocks)

    def step(b, out):
        expert = jnp.searchsorted(ends, b, side="right").astype(jnp.int32)
        at = (b - (ends[expert] - blocks[expert])) * block + jnp.arange(block)  # among this expert's rows
        rows = order[jnp.clip(first[expert] + at, 0, m - 1)]
        y = matmul(x[rows], expert)
        return out.at[jnp.where(at < counts[expert], rows, m)].set(y, mode="drop")

    return lax.fori_loop(0, ends[-1], step, jnp.zeros((m, width), jnp.float32))
