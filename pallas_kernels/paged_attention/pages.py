"""The pool of pages that key and value rows live in."""

from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

PAGE_SIZE = 64  # positions
BLOCK_PAGES = 2  # sums run over blocks of this many pages, whatever the chunk, the bucket or the batch
BLOCK_SIZE = PAGE_SIZE * BLOCK_PAGES
SUPER_BLOCKS = 4  # blocks that make one partial result; partial results are merged in order
DTYPES = ("float32", "float16", "bfloat16", "int8")
FLOAT16_MAX = 65504.0


class KVPages(NamedTuple):
    """Key and value rows of all sequences and layers.

    keys: [layers, pages, kv_heads, PAGE_SIZE, head_dim], the rows of one head together, as attention multiplies them.
    values: the same with value_dim; 0 where values are the first elements of the keys (latent attention).
    key_scales, value_scales: float32 [layers, pages, kv_heads, PAGE_SIZE], one per row, for int8 pages; else None.

    A token at position p of a sequence with page table t lives in page t[p // PAGE_SIZE], row p % PAGE_SIZE.
    """

    keys: jax.Array
    values: jax.Array
    key_scales: jax.Array | None = None
    value_scales: jax.Array | None = None

    @property
    def num_pages(self) -> int:
        return self.keys.shape[1]

    @property
    def latent(self) -> bool:
        """Whether values are the first elements of the keys."""
        return self.values.shape[-1] == 0


@dataclass(frozen=True)
class Case:
    """What a backend is asked for, all of it known at trace time."""

    batch: int
    tokens: int  # a sequence
    heads: int
    kv_heads: int
    head_dim: int
    value_dim: int  # of the result
    latent: bool
    dtype: np.dtype  # of the pages
    softcap: float = 0.0
    sinks: bool = False


def allocate_pages(
    layers: int, pages: int, kv_heads: int, head_dim: int, value_dim: int, dtype: Any = jnp.float32
) -> KVPages:
    """A pool of zeros. ValueError for a dtype other than those of DTYPES."""
    dtype = np.dtype(dtype)
    if dtype.name not in DTYPES:
        raise ValueError(f"dtype of the pages is {dtype.name}; accepted: {', '.join(DTYPES)}")
    shape = (layers, pages, kv_heads, PAGE_SIZE)
    scales = (jnp.zeros(shape, jnp.float32), jnp.zeros(shape, jnp.float32)) if dtype.name == "int8" else (None, None)
    return KVPages(jnp.zeros((*shape, head_dim), dtype), jnp.zeros((*shape, value_dim), dtype), *scales)
