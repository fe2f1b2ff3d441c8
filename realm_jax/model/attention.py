"""Attention of one sequence: its new rows go into the page pool, then its queries read the pool alone."""

import flax.struct
import jax

from pallas_kernels.paged_attention import KVPages, append_rows, paged_attention


@flax.struct.dataclass
class CacheView:
    """Where one sequence lies in the pool.

    table: int32 [pages a sequence may have], a multiple of BLOCK_PAGES; entries past its pages are never used.
    blocks: int32 scalar, blocks of BLOCK_SIZE positions to attend over, enough for every sequence in the batch, and not
        batched under vmap. More than needed changes no bit of the result.
    """

    table: jax.Array
    blocks: jax.Array


def attend(
    q: jax.Array,
    keys: jax.Array,
    values: jax.Array,
    pool: KVPages,
    *,
    view: CacheView,
    positions: jax.Array,
    layer: jax.Array,
    window: jax.Array,
    scale: float,
    softcap: float = 0.0,
    sinks: jax.Array | None = None,
    value_dim: int,
    backend: str,
) -> tuple[jax.Array, KVPages]:
    """Appends a layer's new rows and attends over all.

    Args:
        q: float32 [T, heads, head_dim].
        keys: new rows [T, kv_heads, head_dim].
        values: new rows [T, kv_heads, dim]; dim 0 means that values are the first value_dim elements of the keys.
        pool: of all sequences and layers.
        view: the sequence's place in it.
        positions: int32 [T], consecutive; -1 marks padding at the end, whose result is meaningless.
        layer: int32 scalar.
        window: int32 scalar, how many positions a query sees, itself included; 0 for all.
        scale, softcap, sinks, value_dim, backend: see pallas_kernels.paged_attention.

    Returns:
        float32 [T, heads, value_dim], and the pool.
    """
    pool = append_rows(pool, keys, values, view.table, positions, layer=layer, backend=backend)
    mixed = paged_attention(
        q,
        pool,
        view.table,
        positions,
        layer=layer,
        blocks=view.blocks,
        scale=scale,
        window=window,
        softcap=softcap,
        sinks=sinks,
        value_dim=value_dim,
        backend=backend,
    )
    return mixed, pool
