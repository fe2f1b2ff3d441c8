"""Batches of whole sequences through the decoder, each row with its adapter: no engine, no cache between calls."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from realm_jax.cache import BLOCK_PAGES, allocate_pages, row_dtype
from realm_jax.model import forward, logits
from realm_jax.model.adapters import RowAdapters
from realm_jax.model.attention import CacheView
from realm_jax.model.params import Model


@partial(jax.jit, static_argnames=("config", "plan", "backend"))
def run(params, tokens, stacks, slots, *, config, plan, backend):
    """tokens int32 [B, T] -> logits float32 [B, T, vocab], in one batch; stacks None for the program without."""
    rows, length = tokens.shape
    pages = BLOCK_PAGES
    shape = (config.num_layers, rows * pages, config.num_kv_heads, config.head_dim, config.value_dim)
    pool = allocate_pages(*shape, row_dtype(backend))
    tables = jnp.arange(rows * pages, dtype=jnp.int32).reshape(rows, pages)
    positions = jnp.arange(length, dtype=jnp.int32)

    def one(tokens, table, slot):
        lora = None if stacks is None else RowAdapters(stacks, slot)
        view = CacheView(table, jnp.int32(1))
        return forward(params, config, plan, tokens, positions, pool, view, lora=lora, backend=backend)

    hidden, _ = jax.vmap(one, out_axes=(0, None))(tokens, tables, slots)
    lora = None if stacks is None else RowAdapters(stacks, slots)
    return logits(params, config, hidden, lora=lora, backend=backend)


def outputs(model: Model, tokens: np.ndarray, stacks: Any = None, slots: np.ndarray | None = None) -> np.ndarray:
    """`run` of a model; slots int32 [B], by default none."""
    slots = np.full(len(tokens), -1, np.int32) if slots is None else slots
    tokens = tokens.astype(np.int32)
    return np.asarray(
        run(model.params, tokens, stacks, slots, config=model.config, plan=model.plan, backend=model.backend)
    )
