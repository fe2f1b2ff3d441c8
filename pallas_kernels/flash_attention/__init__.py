"""Attention over contiguous keys and values, forward and backward, without a buffer of queries times keys."""

from pallas_kernels.errors import UnsupportedError

from .api import BACKENDS, flash_attention, unsupported

__all__ = ["BACKENDS", "UnsupportedError", "flash_attention", "unsupported"]
