"""The Pallas kernel for Hopper cards (H100, H200), through Mosaic GPU: forward. Backward is that of gpu_backward.py.

Two warpgroups compute 64 queries each, a third copies blocks of keys and values into shared memory ahead of them. The
two take turns at the tensor cores: one multiplies while the other takes its softmax (FlashAttention-3, Shah et al.
2024, arXiv:2407.08608). Both visit the same blocks of keys, those that any of the 128 queries sees.

The kernel has been lowered and simulated, races looked for; it has not run on a card yet, so only a caller who names it
gets it. JAX's own kernel of this kind refuses causal masks with CUDA 12.8.0 to 12.9.0, whose ptxas miscompiles it.
"""

import functools
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.devices import cuda_capability

from .blocks import HopperBlocks, hopper_blocks
from .case import LOG2_E, NOTHING, Options, block_span, key_span, visible
from .gpu_backward import backward

__all__ = ["backward", "forward", "unsupported"]
_ROWS = 64  # queries of a warpgroup
_TILE = 2 * _ROWS


def unsupported(q: Any, k: Any, v: Any, options: Options, interpreted: bool) -> str | None:
    """Why the kernel does not take this case, or None."""
    capability = cuda_capability()
    if capability is not None and capability != 90 and not interpreted:
        return f"the card has compute capability {capability / 10}, and this kernel is for 9.0"
    if q.dtype == jnp.float32:
        return "float32 is not supported, only bfloat16 and float16"
    for dim in (q.shape[3], v.shape[3]):
        if dim % 64 or dim > 256:
            return f"a head size of {dim} is no multiple of 64 up to 256"
    return None


def forward(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    bounds: jax.Array,
    sinks: jax.Array | None,
    options: Options,
    *,
    interpret: Any = None,
    blocks: HopperBlocks | None = None,
) -> tuple[jax.Array, jax.Array]:
    """As ``xla.forward``. interpret: None or plgpu.InterpretGPUParams; blocks: other sizes than the table's."""
    from jax.experimental.pallas import mosaic_gpu as plgpu

    batch, length, heads, dim = q.shape
    kv_heads, value_dim = v.shape[2:]
    blocks = blocks or hopper_blocks(max(dim, value_dim))
    if options.ragged:  # weights of 0 do not hide a NaN
        v = jnp.where((jnp.arange(v.shape[1]) < bounds[:, 1:2])[..., None, None], v, jnp.zeros_like(v))
    q, k, v = _padded(q, _TILE), _padded(k, blocks.keys), _padded(v, blocks.keys)
    rows = q.shape[1]
    sink = jnp.zeros((batch, heads), jnp.float32) if sinks is None else sinks
    out, lse = plgpu.kernel(
        functools.partial(
            _kernel,
            options=options,
            blocks=blocks,
            group=heads // kv_heads,
            with_sinks=sinks is not None,
            tiles=rows // _TILE,
            simulated=interpret is not None,
        ),
        out_type=[
            jax.ShapeDtypeStruct((batch, rows, heads, value_dim), q.dtype),
            jax.ShapeDtypeStruct((batch, heads, rows), jnp.float32),
        ],
        grid=(rows // _TILE, heads, batch),
        grid_names=("tile", "head", "batch"),
        num_threads=3,
        thread_name="warpgroup",
        compiler_params=plgpu.CompilerParams(approx_math=True),
        **({} if interpret is None else {"interpret": interpret}),
    )(bounds, sink, q, k, v)
    return out[:, :length], lse[:, :, :length]


class _Shared(NamedTuple):
    """What the warpgroups of a block share: tiles in shared memory, and barriers that say they are filled or used."""

    q: Any  # [warpgroup, rows, D]; the results, too, where there is no ``out``
    out: Any
    k: Any  # [stage, keys, D]
    v: Any
    lse: Any
    weights: Any  # in simulations
    q_here: Any
    k_here: Any
    v_here: Any
    k_used: Any
    v_used: Any
    turn: Any


def _padded(a: jax.Array, block: int) -> jax.Array:
    return jnp.pad(a, ((0, 0), (0, -a.shape[1] % block), (0, 0), (0, 0)))


def _kernel(
    bounds_ref: Any,
    sinks_ref: Any,
    q_ref: Any,
    k_ref: Any,
    v_ref: Any,
    out_ref: Any,
    lse_ref: Any,
    *,
    options: Options,
    blocks: HopperBlocks,
    group: int,
    tiles: int,
    with_sinks: bool,
    simulated: bool,
) -> None:
    """Allocates what a block's warpgroups share."""
    from jax.experimental import pallas as pl
    from jax.experimental.pallas import mosaic_gpu as plgpu

    dim, value_dim, dtype, stages = q_ref.shape[3], v_ref.shape[3], q_ref.dtype, blocks.stages

    def tile(*shape):
        # jax 0.12 declares these abstract for a method that has a body in name only.
        tiling, swizzle = cast(Any, plgpu).TilingTransform((8, 64)), cast(Any, plgpu).SwizzleTransform(128)
        return plgpu.SMEM(shape, dtype, transforms=(tiling, swizzle))

    def barriers(count, arrivals=1):
        return plgpu.Barrier(num_arrivals=arrivals, num_barriers=count)

    shared = _Shared(
        q=tile(2, _ROWS, dim),
        out=None if dim == value_dim else tile(2, _ROWS, value_dim),
        k=tile(stages, blocks.keys, dim),
        v=tile(stages, blocks.keys, value_dim),
        lse=plgpu.SMEM((2, _ROWS), jnp.float32),
        weights=tile(2, _ROWS, blocks.keys) if simulated else None,
        q_here=barriers(2),
        k_here=barriers(stages),
        v_here=barriers(stages),
        k_used=barriers(stages, 2),
        v_used=barriers(stages, 2),
        turn=barriers(1, 2),
    )
    refs = (bounds_ref, sinks_ref, q_ref, k_ref, v_ref, out_ref, lse_ref)
    run = functools.partial(
        _warpgroups, refs, options=options, blocks=blocks, group=group, tiles=tiles, with_sinks=with_sinks
    )
    pl.run_scoped(run, shared, collective_axes="warpgroup")


def _warpgroups(
    refs: tuple[Any, ...],
    shared: _Shared,
    *,
    options: Options,
    blocks: HopperBlocks,
    group: int,
    tiles: int,
    with_sinks: bool,
) -> None:
    from jax.experimental import pallas as pl
    from jax.experimental.pallas import mosaic_gpu as plgpu

    bounds_ref, sinks_ref, q_ref, k_ref, v_ref, out_ref, lse_ref = refs
    me, batch, head = lax.axis_index("warpgroup"), lax.axis_index("batch"), lax.axis_index("head")
    row = (tiles - 1 - lax.axis_index("tile")) * _TILE  # tiles with the most keys first
    start, keys, queries = bounds_ref[batch, 0], bounds_ref[batch, 1], bounds_ref[batch, 2]
    span = key_span(start + row, start + jnp.minimum(row + _TILE, queries) - 1, keys, options)
    low, all_low, all_high, high = block_span(span, blocks.keys)
    high = jnp.where(row < queries, high, low)
    all_low, all_high = jnp.minimum(all_low, high), jnp.minimum(all_high, high)

    def slot_of(j):
        return lax.rem(j - low, jnp.int32(blocks.stages))

    @pl.when(me == 2)
    def _copy():
        plgpu.set_max_registers(40, action="decrease")
        kv_head = lax.div(head, jnp.int32(group))

        def fetch(j):
            slot = slot_of(j)
            block = (batch, pl.ds(j * blocks.keys, blocks.keys), kv_head)
            plgpu.copy_gmem_to_smem(k_ref.at[block], shared.k.at[slot], shared.k_here.at[slot])
            plgpu.copy_gmem_to_smem(v_ref.at[block], shared.v.at[slot], shared.v_here.at[slot])

        def first(j, _):
            fetch(j)

        def after_use(j, _):
            slot = slot_of(j)
            plgpu.barrier_wait(shared.k_used.at[slot])
            plgpu.barrier_wait(shared.v_used.at[slot])
            pl.when(j + blocks.stages < high)(lambda: fetch(j + blocks.stages))

        lax.fori_loop(low, jnp.minimum(high, low + blocks.stages), first, None)
        lax.fori_loop(low, high, after_use, None)

    @pl.when(me < 2)
    def _compute():
        plgpu.set_max_registers(blocks.registers, action="increase")
        at = row + me * _ROWS
        own, value_dim = (batch, pl.ds(at, _ROWS), head), v_ref.shape[3]
        q_tile, out_tile = shared.q.at[me], (shared.q if shared.out is None else shared.out).at[me]
        plgpu.copy_gmem_to_smem(q_ref.at[own], q_tile, shared.q_here.at[me])
        plgpu.barrier_wait(shared.q_here.at[me])
        factor = LOG2_E * (options.scale if options.scale > 0 and not options.softcap else 1.0)

        def rows_of(value):
            return plgpu.layout_cast(jnp.full((_ROWS,), value, jnp.float32), plgpu.Layout.WGMMA.reduce(1))

        def across(values, like):
            return lax.broadcast_in_dim(values, like.shape, (0,))

        def take_turn():
            plgpu.barrier_arrive(shared.turn)
            plgpu.barrier_wait(shared.turn)

        def step(masked, j, carry):
            top, total, acc = carry
            slot = slot_of(j)
            plgpu.barrier_wait(shared.k_here.at[slot])

            def multiply(acc_ref):
                plgpu.wgmma(acc_ref, q_tile, transposed(shared.k.at[slot]))
                take_turn()  # the other warpgroup's products come next
                return acc_ref[...]

            scores = pl.run_scoped(multiply, plgpu.ACC((_ROWS, blocks.keys), jnp.float32))
            plgpu.barrier_arrive(shared.k_used.at[slot])
            if options.softcap:
                power = jnp.exp2(scores * (2.0 * options.scale / options.softcap * LOG2_E))
                scores = (1.0 - 2.0 / (1.0 + power)) * options.softcap
            elif options.scale <= 0:
                scores = scores * options.scale
            if masked:

                def iota(axis):
                    return plgpu.broadcasted_iota(jnp.int32, scores.shape, axis, layout=plgpu.Layout.WGMMA)

                key = j * blocks.keys + iota(1)
                scores = jnp.where(visible(start + at + iota(0), key, options) & (key < keys), scores, NOTHING)
            new_top = jnp.maximum(top, scores.max(axis=1) * factor)
            base = new_top
            if masked:  # where a query has seen nothing yet, NOTHING less NOTHING might be rounded to anything
                base = jnp.where(new_top > 0.1 * NOTHING * factor, new_top, 0.0)
            weights = jnp.exp2(scores * factor - across(base, scores))
            keep = jnp.exp2(top - new_top)
            total = total * keep + weights.sum(axis=1)
            weights = weights.astype(q_ref.dtype)
            plgpu.barrier_arrive(shared.turn)
            plgpu.barrier_wait(shared.v_here.at[slot])
            plgpu.barrier_wait(shared.turn)

            left = weights
            if shared.weights is not None:  # the simulator multiplies shared memory only
                left = shared.weights.at[me]
                left[...] = weights
                plgpu.commit_smem()

            def add(acc_ref):
                plgpu.wgmma(acc_ref, left, shared.v.at[slot])

            if value_dim <= 128 or shared.weights is not None:
                product = pl.run_scoped(lambda ref: (add(ref), ref[...])[1], plgpu.ACC((_ROWS, value_dim), jnp.float32))
                acc = acc * across(keep, acc) + product
            else:  # there are registers for one of them
                acc = pl.run_state(add)(plgpu.ACC.init(acc * across(keep, acc)))
            plgpu.barrier_arrive(shared.v_used.at[slot])
            return new_top, total, acc

        # The second warpgroup begins one turn later than the first, and the first ends one turn later.
        pl.when(me == 1)(take_turn)
        acc = jnp.zeros((_ROWS, value_dim), jnp.float32)
        carry = (rows_of(NOTHING * factor), rows_of(0.0), plgpu.layout_cast(acc, plgpu.Layout.WGMMA))
        if options.window:
            carry = lax.fori_loop(low, all_low, functools.partial(step, True), carry)
        carry = lax.fori_loop(all_low, all_high, functools.partial(step, False), carry)
        top, total, acc = lax.fori_loop(all_high, high, functools.partial(step, True), carry)
        pl.when(me == 0)(take_turn)

        position = at + plgpu.broadcasted_iota(jnp.int32, (_ROWS,), 0, layout=plgpu.Layout.WGMMA.reduce(1))
        some = (top > 0.1 * NOTHING * factor) & (position < queries)
        if with_sinks:  # a key of its own whose value is zero
            sink = sinks_ref[batch, head] * LOG2_E
            new_top = jnp.maximum(top, sink)
            keep = jnp.exp2(top - new_top)
            total = total * keep + jnp.exp2(sink - new_top)
            top, acc = new_top, acc * across(keep, acc)
        total = jnp.where(some, total, 1.0)
        keep = across(jnp.where(some, 1.0 / total, 0.0), acc)
        acc = jnp.where(keep > 0.0, acc * keep, 0.0)  # a query that is padding may be NaN
        out_tile[...] = acc.astype(out_ref.dtype)
        shared.lse[me] = jnp.where(some, (top + jnp.log(total) * LOG2_E) * (1 / LOG2_E), -jnp.inf)
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(out_tile, out_ref.at[own])
        plgpu.copy_smem_to_gmem(shared.lse.at[me], lse_ref.at[batch, head, pl.ds(at, _ROWS)])
        plgpu.wait_smem_to_gmem(0)


def transposed(ref: Any) -> Any:
    """A view of a matrix in shared memory; jax 0.10 has a function where 0.12 has a method."""
    from jax.experimental.pallas import mosaic_gpu as plgpu

    return ref.transpose((1, 0)) if jax.__version_info__ >= (0, 12) else plgpu.transpose_ref(ref, (1, 0))
