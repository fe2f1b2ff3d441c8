"""The key/value cache: one pool of pages for all sequences, and a page table per sequence.

Protocol. A pool holds, for every layer, pages of PAGE_SIZE token rows. A sequence's token at position p lives in page
table[p // PAGE_SIZE], row p % PAGE_SIZE; a contiguous cache is the table 0, 1, 2, ... The forward reads the pool and
returns the new rows; `append` writes them, outside of any vmap, in one scatter for all layers and sequences. Rows a
table does not cover yet are never read: masks go by position.
"""

from typing import Any

import flax.struct
import jax
import jax.numpy as jnp

PAGE_SIZE = 64  # tokens
BLOCK_PAGES = 2  # attention reduces over blocks of this many pages, so that sums do not depend on chunks or buckets
BLOCK_SIZE = PAGE_SIZE * BLOCK_PAGES

# Logical axes of the pool's arrays and of new rows; sharding maps them to mesh axes.
POOL_AXES = ("layers", "pages", "kv_heads", "page", "head_dim")
ROWS_AXES = ("layers", "tokens", "kv_heads", "head_dim")


@flax.struct.dataclass
class KVPool:
    """Cached rows of all sequences.

    keys: [layers, pages, kv_heads, PAGE_SIZE, head_dim], the rows of one head together, as attention multiplies them.
    values: the same with value_dim, which is 0 where values are a part of the keys (latent attention).
    """

    keys: jax.Array
    values: jax.Array

    @property
    def num_pages(self) -> int:
        return self.keys.shape[1]


@flax.struct.dataclass
class KVRows:
    """Rows of the tokens of one forward: keys [layers, T, kv_heads, head_dim], values likewise."""

    keys: jax.Array
    values: jax.Array


@flax.struct.dataclass
class CacheView:
    """What one sequence sees of the cache.

    pool: shared by all sequences (not batched under vmap).
    table: int32 [pages a sequence may have], a multiple of BLOCK_PAGES; entries past its pages are never used.
    length: int32 scalar, tokens already in the cache.
    blocks: int32 scalar, blocks of BLOCK_SIZE tokens to attend over; at least ceil((length + T) / BLOCK_SIZE) of every
        sequence in the batch, and not batched under vmap. More than needed changes no bit of the result.
    """

    pool: KVPool
    table: jax.Array
    length: jax.Array
    blocks: jax.Array


def allocate_pool(
    num_layers: int, num_pages: int, kv_heads: int, head_dim: int, value_dim: int, dtype: Any = jnp.float32
) -> KVPool:
    """A pool of zeros. Its bytes: num_layers * num_pages * PAGE_SIZE * kv_heads * (head_dim + value_dim) * itemsize."""
    shape = (num_layers, num_pages, kv_heads, PAGE_SIZE)
    return KVPool(keys=jnp.zeros((*shape, head_dim), dtype), values=jnp.zeros((*shape, value_dim), dtype))


def append(pool: KVPool, rows: KVRows, tables: jax.Array, positions: jax.Array) -> KVPool:
    """Writes the rows of a batch of sequences into the pool; the caller donates the pool.

    Args:
        pool: the pool.
        rows: keys and values [layers, B, T, kv_heads, dim].
        tables: int32 [B, pages].
        positions: int32 [B, T]; rows at negative positions are dropped.
    """
    slot = jnp.maximum(positions, 0)
    page = jnp.take_along_axis(tables, slot // PAGE_SIZE, axis=1)
    page = jnp.where(positions >= 0, page, pool.num_pages).reshape(-1)  # out of range, hence dropped
    offset = (slot % PAGE_SIZE).reshape(-1)

    def write(cached: jax.Array, new: jax.Array) -> jax.Array:
        if not cached.shape[-1]:
            return cached
        flat = new.reshape(new.shape[0], -1, *new.shape[3:]).swapaxes(0, 1)  # [B * T, layers, kv_heads, dim]
        return cached.at[:, page, :, offset].set(flat.astype(cached.dtype), mode="drop")

    return KVPool(keys=write(pool.keys, rows.keys), values=write(pool.values, rows.values))
