"""The Pallas kernels for TPUs, through Mosaic.

Rows are cut into blocks; a pair is a block and a slot that occurs in it. Pairs are listed in front of the kernels, by
block, and the kernels fetch the adapters of a pair by way of that list.

* shrink: A x of a pair's block, tiles of K one after the other.
* expand: for a tile of N, over the pairs: B times that, added to the block of the result for the rows of the pair's
  slot. The result is base's own buffer; pairs of one block are neighbours, so it stays in VMEM between them.

Pairs that the list has room for but that do not exist repeat the last one, which costs no copy, and compute nothing.
b [.., N, R] has few columns, which TPUs pad to 128 in memory. Not yet run on a TPU.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from .case import Adapters, Case

MAX_ROWS, ROW_STEP = 128, 8  # of a block: a multiple of the second up to the first
TILE_K, TILE_N = 2048, 1024
MAX_RANK = 256

Rows = tuple[jax.Array, ...]


def unsupported(case: Case) -> str | None:
    """Why the kernels do not take the case; None when they do."""
    for linear in case.linears:
        if "float16" in (linear.a_dtype, linear.b_dtype):
            return "TPUs have no float16; accepted: float32, bfloat16"
        if linear.rank > MAX_RANK:
            return f"rank {linear.rank} is above {MAX_RANK}"
    return None


def add_deltas(
    x: jax.Array, slots: jax.Array, bases: Rows, adapters: tuple[Adapters, ...], layer: jax.Array, *, interpret: bool
) -> Rows:
    """As xla.add_deltas."""
    m = x.shape[0]
    block = min(MAX_ROWS, -(-m // ROW_STEP) * ROW_STEP)
    padding = -m % block
    count = adapters[0].scales.shape[0]

    def run(x, bases):
        x, bases = jax.tree.map(lambda r: jnp.pad(r, ((0, padding), (0, 0))), (x, bases))
        ids = jnp.pad(slots, (0, padding), constant_values=-1)
        pairs = _pairs(ids, block, count, min(m, x.shape[0] // block * count))
        out = []
        for base, one in zip(bases, adapters, strict=True):
            shrunk = _shrink(pairs, layer, x, one.a, block, interpret)
            out.append(_expand(pairs, layer, ids[:, None], shrunk, one, base, block, interpret)[:m])
        return tuple(out)

    active = ((slots >= 0) & (slots < count)).any()
    return lax.cond(active, run, lambda x, bases: bases, x, bases)


def _pairs(ids: jax.Array, block: int, count: int, most: int) -> tuple[jax.Array, ...]:
    """The pairs of ids int32 [M]: block, slot, whether it is the first of its block, [most] each; their number [1]."""
    used = (ids.reshape(-1, block)[:, :, None] == jnp.arange(count)).any(1)  # [blocks, S]
    total = used.sum(dtype=jnp.int32)
    flat = jnp.nonzero(used.reshape(-1), size=most, fill_value=0)[0].astype(jnp.int32)
    flat = flat[jnp.minimum(jnp.arange(most), jnp.maximum(total - 1, 0))]
    blocks = flat // count
    first = jnp.concatenate([jnp.ones(1, bool), blocks[1:] != blocks[:-1]])
    return blocks, flat % count, first.astype(jnp.int32), total[None]


def _shrink(
    pairs: tuple[jax.Array, ...], layer: jax.Array, x: jax.Array, a: jax.Array, block: int, interpret: bool
) -> jax.Array:
    """x [M, K] -> A x of every pair, float32 [pairs, block, R]."""
    from jax.experimental import pallas as pl
    from jax.experimental.pallas import tpu as pltpu

    blocks, slots, _, total = pairs
    k, rank = x.shape[1], a.shape[2]
    tile = min(k, TILE_K)

    def kernel(layer_ref, blocks_ref, slots_ref, total_ref, x_ref, a_ref, t_ref):
        i, j = pl.program_id(0), pl.program_id(1)

        @pl.when(j == 0)
        def _start():
            t_ref[...] = jnp.zeros_like(t_ref)

        @pl.when(i < total_ref[0])
        def _add():
            x, a = x_ref[...], a_ref[...].astype(jnp.float32)
            if k % tile:  # what lies behind the last column is anything
                left = k - j * tile
                x = jnp.where(lax.broadcasted_iota(jnp.int32, x.shape, 1) < left, x, 0.0)
                a = jnp.where(lax.broadcasted_iota(jnp.int32, a.shape, 1) < left, a, 0.0)
            t_ref[...] += _times_transposed(x, a)

    def last(i, j, total_ref):  # pairs that do not exist stay at the last tile of the last one
        return jnp.where(i < total_ref[0], j, pl.cdiv(k, tile) - 1)

    return pl.pallas_call(
        kernel,
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=4,
            grid=(blocks.shape[0], pl.cdiv(k, tile)),
            in_specs=[
                pl.BlockSpec((block, tile), lambda i, j, _, blocks, slots, total: (blocks[i], last(i, j, total))),
                pl.BlockSpec(
                    (None, None, rank, tile),
                    lambda i, j, layer, blocks, slots, total: (layer[0], slots[i], 0, last(i, j, total)),
                ),
            ],
            out_specs=pl.BlockSpec((None, block, rank), lambda i, j, *_: (i, 0, 0)),
        ),
        out_shape=jax.ShapeDtypeStruct((blocks.shape[0], block, rank), jnp.float32),
        interpret=interpret,
        name="grouped_lora_shrink",
    )(layer.reshape(1), blocks, slots, total, x, a)


def _expand(
    pairs: tuple[jax.Array, ...],
    layer: jax.Array,
    ids: jax.Array,
    shrunk: jax.Array,
    one: Adapters,
    base: jax.Array,
    block: int,
    interpret: bool,
) -> jax.Array:
    """base [M, N] plus scale * B times ``shrunk`` of each row's slot, ids [M, 1]."""
    from jax.experimental import pallas as pl
    from jax.experimental.pallas import tpu as pltpu

    blocks, slots, first, total = pairs
    n, rank = one.b.shape[2:]
    tile = min(n, TILE_N)

    def kernel(
        layer_ref, blocks_ref, slots_ref, first_ref, total_ref, scales_ref, ids_ref, t_ref, b_ref, base_ref, y_ref
    ):
        i = pl.program_id(1)

        @pl.when(first_ref[i] == 1)
        def _start():
            y_ref[...] = base_ref[...]

        @pl.when(i < total_ref[0])
        def _add():
            slot = slots_ref[i]
            delta = _times_transposed(t_ref[...] * scales_ref[slot], b_ref[...].astype(jnp.float32))
            y_ref[...] = jnp.where(ids_ref[...] == slot, y_ref[...] + delta, y_ref[...])

    def rows(j, i, _, blocks, *rest):
        return blocks[i], 0

    def tile_of_rows(j, i, _, blocks, *rest):
        return blocks[i], j

    scalars = (layer.reshape(1), blocks, slots, first, total, one.scales)
    return pl.pallas_call(
        kernel,
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=len(scalars),
            grid=(pl.cdiv(n, tile), blocks.shape[0]),
            in_specs=[
                pl.BlockSpec((block, 1), rows),
                pl.BlockSpec(
                    (None, block, rank),
                    lambda j, i, layer, blocks, slots, first, total, *_: (
                        jnp.minimum(i, jnp.maximum(total[0] - 1, 0)),
                        0,
                        0,
                    ),
                ),
                pl.BlockSpec(
                    (None, None, tile, rank), lambda j, i, layer, blocks, slots, *_: (layer[0], slots[i], j, 0)
                ),
                pl.BlockSpec((block, tile), tile_of_rows),
            ],
            out_specs=pl.BlockSpec((block, tile), tile_of_rows),
        ),
        out_shape=jax.ShapeDtypeStruct(base.shape, jnp.float32),
        input_output_aliases={len(scalars) + 3: 0},
        interpret=interpret,
        name="grouped_lora_expand",
    )(*scalars, ids, shrunk, one.b, base)


def _times_transposed(a: Any, b: Any) -> Any:
    """a [m, k] times b [n, k] -> [m, n], float32."""
    return lax.dot_general(
        a, b, (((1,), (1,)), ((), ())), precision=lax.Precision.HIGHEST, preferred_element_type=jnp.float32
    )
