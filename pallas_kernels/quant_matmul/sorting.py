"""Rows by expert, in blocks that hold rows of one expert each."""

import jax
import jax.numpy as jnp


def sort_by_expert(ids: jax.Array, experts: int, block: int) -> tuple[jax.Array, jax.Array]:
    """ids int32 [M] (clamped) -> the expert of each block [blocks], ``experts`` for a block without rows; and the rows
    in the blocks, [blocks * block], M for none. There are as many blocks as M rows can ever need.
    """
    m = ids.shape[0]
    ids = jnp.clip(ids, 0, experts - 1)
    order = jnp.argsort(ids, stable=True)  # [M] rows, grouped by expert
    counts = jnp.zeros(experts, jnp.int32).at[ids].add(1)
    first = jnp.cumsum(counts) - counts  # [E] where an expert's rows begin in ``order``
    blocks = -(-counts // block)  # [E] of blocks
    ends = jnp.cumsum(blocks)
    number = jnp.arange(min(m, experts + m // block))
    expert = jnp.searchsorted(ends, number, side="right").astype(jnp.int32)
    known = jnp.minimum(expert, experts - 1)
    at = (number - (ends - blocks)[known])[:, None] * block + jnp.arange(block)  # among the expert's rows
    valid = (expert < experts)[:, None] & (at < counts[known][:, None])
    rows = jnp.where(valid, order[jnp.clip(first[known][:, None] + at, 0, max(m - 1, 0))], m)
    return expert, rows.reshape(-1).astype(jnp.int32)
