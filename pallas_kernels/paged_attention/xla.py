"""The XLA backend: an online softmax over blocks of positions gathered from the pool."""

import jax
import jax.numpy as jnp
from jax import lax

from ..numerics import exp, row_sum, tanh
from .pages import BLOCK_PAGES, BLOCK_SIZE, PAGE_SIZE, SUPER_BLOCKS, Case, KVPages
from .reference import quantize_rows

# XLA's CPU dots sum in an order that does not depend on the number of rows, from two rows on, when the columns are a
# multiple of WIDTH and at most WIDEST. tests/test_paged_attention.py holds them to it.
WIDTH, WIDEST = 64, 256
_MASKED = -1e30  # finite, so that a block with nothing to see adds exact zeros rather than NaN


def unsupported(case: Case) -> str | None:
    """This backend takes every case."""
    return None


def append_rows(
    pool: KVPages, k: jax.Array, v: jax.Array, tables: jax.Array, positions: jax.Array, *, layer: jax.Array
) -> KVPages:
    """As api.append_rows, batch form: one scatter of single rows, which XLA does in place."""
    slot = jnp.maximum(positions, 0)
    page = jnp.take_along_axis(tables, slot // PAGE_SIZE, axis=1, mode="fill", fill_value=-1)
    valid = (positions >= 0) & (page >= 0) & (page < pool.num_pages)
    layers = pool.keys.shape[0]
    at = jnp.where(valid, layer * pool.num_pages + page, layers * pool.num_pages).reshape(-1)  # out of range: dropped
    offset = (slot % PAGE_SIZE).reshape(-1)
    # XLA turns the scatter of a lone row into a select over the whole pool: a second row, dropped, keeps it in place.
    spare = [(0, 1)] if at.size == 1 else [(0, 0)]
    at, offset = jnp.pad(at, spare, constant_values=layers * pool.num_pages), jnp.pad(offset, spare)

    def scatter(pages: jax.Array, rows: jax.Array) -> jax.Array:
        rows = jnp.pad(rows, spare + [(0, 0)] * (rows.ndim - 1))
        return _flat(pages).at[at, :, offset].set(rows, mode="drop").reshape(pages.shape)

    def write(pages: jax.Array, scales: jax.Array | None, new: jax.Array) -> tuple[jax.Array, jax.Array | None]:
        if not pages.shape[-1]:
            return pages, scales
        rows, factors = quantize_rows(new.reshape(-1, *new.shape[2:]), pages.dtype)  # [B * T, kv_heads, D]
        return scatter(pages, rows), None if scales is None or factors is None else scatter(scales, factors)

    keys, key_scales = write(pool.keys, pool.key_scales, k)
    values, value_scales = write(pool.values, pool.value_scales, v)
    return KVPages(keys, values, key_scales, value_scales)


def paged_attention(
    q: jax.Array,
    pool: KVPages,
    tables: jax.Array,
    positions: jax.Array,
    *,
    layer: jax.Array,
    blocks: jax.Array,
    scale: float,
    window: jax.Array,
    softcap: float,
    sinks: jax.Array | None,
    value_dim: int,
) -> jax.Array:
    """As api.paged_attention, batch form: online softmax (Milakov and Gimelshein 2018, arXiv:1805.02867)."""
    tokens, heads, head_dim = q.shape[1:]
    kv_heads = pool.keys.shape[2]
    group = heads // kv_heads
    flat = jax.tree.map(_flat, pool)
    width = -(-value_dim // WIDTH) * WIDTH
    lookback = jnp.where(window > 0, window, jnp.iinfo(jnp.int32).max)

    def one(q: jax.Array, table: jax.Array, positions: jax.Array) -> jax.Array:
        # The queries that share a key/value head, of all tokens, are the rows of one product.
        grouped = (q * scale).reshape(tokens, kv_heads, group, head_dim).transpose(1, 0, 2, 3)
        grouped = grouped.reshape(kv_heads, tokens * group, head_dim)
        row_position = jnp.repeat(positions, group)  # [rows]
        if tokens * group == 1:  # a lone row would take XLA's matrix-vector code, which sums in another order
            grouped, row_position = jnp.repeat(grouped, 2, axis=1), jnp.repeat(row_position, 2)
        last = positions.max()
        first = jnp.where(positions >= 0, positions, last).min() - lookback + 1

        def rows(pages: jax.Array, scales: jax.Array | None, at: jax.Array) -> jax.Array:
            """float32 [kv_heads, BLOCK_SIZE, dim] of a block."""
            taken = pages[at].astype(jnp.float32)
            if scales is not None:
                taken = taken * scales[at][..., None]
            return taken.transpose(1, 0, 2, 3).reshape(kv_heads, BLOCK_SIZE, pages.shape[-1])

        def step(block: jax.Array, carry: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
            top, total, mixed = carry  # largest score, sum of weights [kv_heads, rows]; weighted values [.., value_dim]
            pages = layer * pool.num_pages + lax.dynamic_slice(table, (block * BLOCK_PAGES,), (BLOCK_PAGES,))
            at_position = block * BLOCK_SIZE + jnp.arange(BLOCK_SIZE)
            k = rows(flat.keys, flat.key_scales, pages)
            v = k[..., :value_dim] if pool.latent else rows(flat.values, flat.value_scales, pages)
            used = (at_position >= first) & (at_position <= last)  # other rows may hold anything, NaN too
            v = jnp.pad(jnp.where(used[None, :, None], v, 0.0), ((0, 0), (0, 0), (0, width - value_dim)))
            scores = _product(grouped, k, (2, 2))  # [kv_heads, T * group, BLOCK_SIZE]
            if softcap:
                scores = softcap * tanh(scores * (1.0 / softcap))
            distance = row_position[:, None] - at_position[None, :]
            seen = (distance >= 0) & (distance < lookback)
            scores = jnp.where(seen, scores, _MASKED)
            new_top = jnp.maximum(top, scores.max(-1))
            weights = jnp.where(seen, exp(scores - new_top[..., None]), 0.0)
            keep = exp(top - new_top)
            return (
                new_top,
                total * keep + row_sum(weights)[..., 0],
                mixed * keep[..., None] + _mix(weights, v),
            )

        def part(number: jax.Array, carry: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
            begin = number * SUPER_BLOCKS
            return _merge(carry, lax.fori_loop(begin, jnp.minimum(begin + SUPER_BLOCKS, blocks), step, start))

        shape = grouped.shape[:2]
        start = (jnp.full(shape, _MASKED), jnp.zeros(shape), jnp.zeros((*shape, width)))
        top, total, mixed = lax.fori_loop(0, -(-blocks // SUPER_BLOCKS), part, start)
        if sinks is not None:
            # The sink joins the normalisation as a row of its own whose value is zero.
            sink = jnp.tile(sinks.reshape(kv_heads, group), shape[1] // group)
            new_top = jnp.maximum(top, sink)
            keep = exp(top - new_top)
            total = total * keep + exp(sink - new_top)
            mixed = mixed * keep[..., None]
        out = (mixed[..., :value_dim] / jnp.maximum(total, 1e-30)[..., None])[:, : tokens * group]
        return out.reshape(kv_heads, tokens, group, value_dim).transpose(1, 0, 2, 3).reshape(tokens, heads, value_dim)

    return jax.vmap(one)(q, tables, positions)


def _flat(pages: jax.Array) -> jax.Array:
    """[layers, pages, ...] -> [layers * pages, ...]"""
    return pages.reshape(pages.shape[0] * pages.shape[1], *pages.shape[2:])


def _merge(a: tuple[jax.Array, ...], b: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
    """Partial results over two sets of positions -> over both. One that saw nothing changes no bit of the other."""
    top = jnp.maximum(a[0], b[0])
    keep_a, keep_b = exp(a[0] - top), exp(b[0] - top)
    return top, a[1] * keep_a + b[1] * keep_b, a[2] * keep_a[..., None] + b[2] * keep_b[..., None]


def _mix(weights: jax.Array, v: jax.Array) -> jax.Array:
    """weights [kv_heads, rows, BLOCK_SIZE] times v [kv_heads, BLOCK_SIZE, width]."""
    parts = [_product(weights, v[..., i : i + WIDEST], (2, 1)) for i in range(0, v.shape[-1], WIDEST)]
    return jnp.concatenate(parts, axis=-1) if len(parts) > 1 else parts[0]


def _product(a: jax.Array, b: jax.Array, contracted: tuple[int, int]) -> jax.Array:
    """One matrix product a key/value head, the leading axis of both."""
    numbers = (((contracted[0],), (contracted[1],)), ((0,), (0,)))
    return lax.dot_general(a, b, numbers, precision=lax.Precision.HIGHEST)
