"""Per-sequence state on the device: the paged key/value cache."""

from realm_jax.cache.pages import (
    BLOCK_PAGES,
    BLOCK_SIZE,
    PAGE_SIZE,
    POOL_AXES,
    ROWS_AXES,
    CacheView,
    KVPool,
    KVRows,
    allocate_pool,
    append,
)

__all__ = [
    "BLOCK_PAGES",
    "BLOCK_SIZE",
    "PAGE_SIZE",
    "POOL_AXES",
    "ROWS_AXES",
    "CacheView",
    "KVPool",
    "KVRows",
    "allocate_pool",
    "append",
]
