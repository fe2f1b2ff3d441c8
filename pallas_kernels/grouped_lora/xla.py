"""The XLA backend: for each slot in use, two float32 dots over all rows of a block, kept for the rows of that slot.

A block is up to BLOCK_ROWS neighbouring rows. Rows of one request are neighbours, so that a block of a prompt uses one
slot, and the whole of a decode batch is one block that uses a few. Nothing is read of slots that no row uses. As in
quant_matmul's XLA backend a row's bits do not depend on the number of rows, because XLA's CPU dots of two or more rows
and of MIN_WIDTH or more columns do not; a single row is computed as two.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from .case import Adapters, Case

BLOCK_ROWS = 128
MIN_WIDTH = 16  # columns of a dot; below it XLA's choice of code depends on the number of rows

Rows = tuple[jax.Array, ...]


def unsupported(case: Case) -> str | None:
    """Why this backend does not take the case: it takes every one."""
    return None


def add_deltas(
    x: jax.Array, slots: jax.Array, bases: Rows, adapters: tuple[Adapters, ...], layer: jax.Array, *, interpret: bool
) -> Rows:
    """x float32 [M, K], slots int32 [M], bases float32 [M, N] of each linear -> bases + deltas of each linear."""

    def products(slot, x):
        out = []
        for one in adapters:
            a, b, scale = _of_slot(one, layer, slot)
            out.append(_dot(_dot(x, a, 1) * scale, b, 1))
        return out

    return for_each_slot(products, slots, adapters[0].scales.shape[0], (x,), bases)


def transposed(
    gradients: Rows, slots: jax.Array, adapters: tuple[Adapters, ...], layer: jax.Array
) -> tuple[jax.Array, ...]:
    """Gradients float32 [M, N] of each linear's result -> that of x [M, K], then B^T g [M, R] of each linear."""

    def products(slot, *gradients):
        by_x, hidden = jnp.float32(0), []
        for g, one in zip(gradients, adapters, strict=True):
            a, b, scale = _of_slot(one, layer, slot)
            hidden.append(_dot(g, b, 0))
            by_x = by_x + _dot(hidden[-1] * scale, a, 0)
        return by_x, *hidden

    m = slots.shape[0]
    widths = (adapters[0].a.shape[3], *(one.a.shape[2] for one in adapters))
    zeros = tuple(jnp.zeros((m, width), jnp.float32) for width in widths)
    return for_each_slot(products, slots, adapters[0].scales.shape[0], gradients, zeros)


def shrunk(x: jax.Array, slots: jax.Array, adapters: tuple[Adapters, ...], layer: jax.Array) -> Rows:
    """x float32 [M, K] -> A x, float32 [M, R] of each linear; zeros for rows without an adapter."""

    def products(slot, x):
        return [_dot(x, _of_slot(one, layer, slot)[0], 1) for one in adapters]

    zeros = tuple(jnp.zeros((slots.shape[0], one.a.shape[2]), jnp.float32) for one in adapters)
    return for_each_slot(products, slots, adapters[0].scales.shape[0], (x,), zeros)


def for_each_slot(
    products: Callable[..., Any], slots: jax.Array, count: int, inputs: Rows, totals: Rows
) -> tuple[jax.Array, ...]:
    """totals [M, *] plus products(slot, *rows of inputs [M, *]) for the rows of each slot in 0..count-1.

    ``products`` is called on blocks of rows, some of which belong to other slots: their results are not used. When no
    row has a slot nothing runs.
    """
    m = slots.shape[0]
    block = min(max(m, 2), BLOCK_ROWS)
    blocks = -(-m // block)
    padding = blocks * block - m

    def run(inputs, totals):
        inputs, totals = jax.tree.map(lambda r: jnp.pad(r, ((0, padding), (0, 0))), (inputs, totals))
        ids = jnp.pad(slots, (0, padding), constant_values=-1).reshape(blocks, block)
        used = (ids[:, :, None] == jnp.arange(count)).any(1)  # [blocks, S]
        most = min(blocks * count, m)  # pairs of a block and a slot that occurs in it
        pairs = jnp.nonzero(used.reshape(-1), size=most, fill_value=0)[0].astype(jnp.int32)

        def step(i, totals):
            at, slot = pairs[i] // count, pairs[i] % count
            start = at * block

            def cut(r):
                return r if blocks == 1 else lax.dynamic_slice_in_dim(r, start, block)

            mine = ids[at][:, None] == slot
            out = []
            for total, product in zip(totals, products(slot, *map(cut, inputs)), strict=True):
                old = cut(total)
                new = jnp.where(mine, old + product, old)
                out.append(new if blocks == 1 else lax.dynamic_update_slice_in_dim(total, new, start, 0))
            return tuple(out)

        return jax.tree.map(lambda r: r[:m], lax.fori_loop(0, used.sum(dtype=jnp.int32), step, totals))

    active = ((slots >= 0) & (slots < count)).any()
    return lax.cond(active, run, lambda inputs, totals: totals, inputs, totals)


def _of_slot(one: Adapters, layer: jax.Array, slot: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """A [R, K], B [N, R] and the scale of one slot, float32."""
    return _matrix(one.a, layer, slot), _matrix(one.b, layer, slot), one.scales[slot]


def _matrix(stack: jax.Array, layer: jax.Array, slot: jax.Array) -> jax.Array:
    """stack[layer, slot] as float32."""
    bfloat16 = stack.dtype == jnp.bfloat16
    if bfloat16:
        # As integers: XLA's CPU backend would make float32 of the whole stack to take a slice of it. The barrier
        # keeps that view inside the loop over slots, where it is fused with the slice; outside it would be a copy.
        stack = lax.bitcast_convert_type(lax.optimization_barrier((stack, slot))[0], jnp.uint16)
    w = lax.dynamic_slice(stack, (layer, slot, 0, 0), (1, 1, *stack.shape[2:])).reshape(stack.shape[2:])
    if bfloat16:
        return lax.bitcast_convert_type(w.astype(jnp.uint32) << 16, jnp.float32)
    return w.astype(jnp.float32)


def _dot(x: jax.Array, weight: jax.Array, axis: int) -> jax.Array:
    """x [M, *] times a weight contracted along its ``axis``."""
    width = weight.shape[1 - axis]
    if width < MIN_WIDTH:
        pads = [(0, 0), (0, 0)]
        pads[1 - axis] = (0, MIN_WIDTH - width)
        weight = jnp.pad(weight, pads)
    return lax.dot_general(x, weight, (((1,), (axis,)), ((), ())), precision=lax.Precision.HIGHEST)[:, :width]
