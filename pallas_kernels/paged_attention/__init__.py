"""Attention over key/value rows that live in pages of a shared pool."""

from ..errors import UnsupportedError
from .api import BACKENDS, append_rows, paged_attention, resolve
from .pages import BLOCK_PAGES, BLOCK_SIZE, PAGE_SIZE, SUPER_BLOCKS, Case, KVPages, allocate_pages

__all__ = [
    "BACKENDS",
    "BLOCK_PAGES",
    "BLOCK_SIZE",
    "PAGE_SIZE",
    "SUPER_BLOCKS",
    "Case",
    "KVPages",
    "UnsupportedError",
    "allocate_pages",
    "append_rows",
    "paged_attention",
    "resolve",
]
