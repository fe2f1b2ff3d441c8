"""Per-sequence state on the device: the paged key/value cache."""

from pallas_kernels.paged_attention import BLOCK_PAGES, BLOCK_SIZE, PAGE_SIZE, KVPages, allocate_pages
from realm_jax.cache.pages import POOL_AXES, row_dtype

__all__ = ["BLOCK_PAGES", "BLOCK_SIZE", "PAGE_SIZE", "POOL_AXES", "KVPages", "allocate_pages", "row_dtype"]
