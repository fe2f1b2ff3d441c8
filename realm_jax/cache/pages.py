"""What a model's key/value cache is made of: a pool of pages for all sequences (pallas_kernels.paged_attention).

A sequence's token at position p lives in page table[p // PAGE_SIZE], row p % PAGE_SIZE; a contiguous cache is the table
0, 1, 2, ... Rows are written, and then read, by the attention of each layer; what a table does not cover yet is never
read, as masks go by position.
"""

import jax
import jax.numpy as jnp
import numpy as np

# Logical axes of the pool's arrays; sharding maps them to mesh axes.
POOL_AXES = ("layers", "pages", "kv_heads", "page", "head_dim")


def row_dtype(backend: str) -> np.dtype:
    """Of cached rows, as a backend reads them best.

    The kernels widen rows while they read them, half as many bytes as float32; XLA would write a widened copy of every
    block. TPUs have no float16.
    """
    if backend == "xla":
        return np.dtype(np.float32)
    on_tpu = backend == "tpu" or (backend == "auto" and jax.default_backend() == "tpu")
    return np.dtype(jnp.bfloat16 if on_tpu else np.float16)
