"""What a model's key/value cache is made of: a pool of pages for all sequences (pallas_kernels.paged_attention).

A sequence's token at position p lives in page table[p // PAGE_SIZE], row p % PAGE_SIZE; a contiguous cache is the table
0, 1, 2, ... Rows are written, and then read, by the attention of each layer; what a table does not cover yet is never
read, as masks go by position.
"""

import numpy as np

# Logical axes of the pool's arrays; sharding maps them to mesh axes.
POOL_AXES = ("layers", "pages", "kv_heads", "page", "head_dim")


def row_dtype(backend: str) -> np.dtype:
    """Of cached rows. The native kernels read half as much as float16; XLA would convert every block it reads."""
    return np.dtype(np.float16 if backend == "native" else np.float32)
