"""The programs a runner compiles: one batch through the model, on one device or spread over a mesh."""

from functools import partial
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from realm_jax.cache import POOL_AXES, KVPages
from realm_jax.model.adapters import RowAdapters, stack_axes
from realm_jax.model.attention import CacheView
from realm_jax.model.decoder import forward, logits
from realm_jax.model.params import Model, Params
from realm_jax.model.partition import Partition
from realm_jax.sharding.mesh import MESH_AXES

Wanted = Literal["last", "all", "hidden"]


def batch_program(model: Model, wanted: Wanted, lora: RowAdapters | None) -> Any:
    """The jitted run_batch of a model; the pool (argument 1) is donated. lora: adapters as it will be called with.

    On a mesh it is one shard_map around everything: each device runs the same program on its part of the model and of
    the requests, and the collectives are those that the decoder names.
    """
    fixed: dict[str, Any] = {"plan": model.plan, "backend": model.backend, "wanted": wanted}
    if model.mesh is None:
        return jax.jit(partial(run_batch, config=model.config, **fixed), donate_argnums=1)
    local = model.partition.local_config(model.config)
    run = partial(run_batch, config=local, partition=model.partition, **fixed)
    pool, rows = pool_spec(model.partition), P("data")
    adapters = None
    if lora is not None:
        stacks = {role: tuple(P(*axes) for axes in stack_axes(role, model.partition)) for role in lora.stacks}
        adapters = RowAdapters(stacks, rows)  # type: ignore[arg-type]
    inputs = (params_spec(model), pool, rows, rows, rows, rows, P(), rows, P(MESH_AXES), adapters)
    sharded = jax.shard_map(run, mesh=model.mesh, in_specs=inputs, out_specs=(P(), pool), check_vma=False)
    place = partial(on_mesh, mesh=model.mesh)
    return jax.jit(sharded, donate_argnums=1, in_shardings=place(inputs), out_shardings=place((P(), pool)))


def on_mesh(specs: Any, mesh: Mesh) -> Any:
    """A pytree of PartitionSpecs as NamedShardings."""
    return jax.tree.map(lambda spec: NamedSharding(mesh, spec), specs, is_leaf=lambda x: isinstance(x, P))


def pool_spec(partition: Partition) -> Any:
    """Of the page pool's arrays; those of scales have an axis less."""
    return P(*(partition.axis(axis) for axis in POOL_AXES))


def params_spec(model: Model) -> Params:
    """The PartitionSpec of every weight. Packed arrays have as many axes as their tensor."""
    axes, params = model.partition.axes, model.params

    def spec(role: str, value: Any, lead: tuple[None, ...]) -> Any:
        return jax.tree.map(lambda _: P(*lead, *axes(role)), value)

    return Params(
        stacks={name: spec(name.partition(":")[0], value, (None,)) for name, value in params.stacks.items()},
        vectors={role: spec(role, value, (None,)) for role, value in params.vectors.items()},
        tables={role: spec(role, value, ()) for role, value in params.tables.items()},
        rope=jax.tree.map(lambda _: P(), params.rope),
    )


def run_batch(
    params: Params,
    pool: KVPages,
    tokens: jax.Array,
    positions: jax.Array,
    tables: jax.Array,
    last: jax.Array,
    blocks: jax.Array,
    source: jax.Array,
    last_tokens: jax.Array,
    lora: RowAdapters | None,
    *,
    config: Any,
    plan: Any,
    backend: str,
    wanted: Wanted,
    partition: Partition | None = None,
) -> tuple[jax.Array, KVPages]:
    """One batch: tokens and positions int32 [B, T], tables [B, pages], source [B], last [N] -> (result, pool).

    The result is float32 [N, vocab] at the tokens `last` of all B * T, [B, T, vocab], or hidden states [B, T, hidden].

    With a partition this is one device's part of it: rows, and the tables' pages, are those of its place on the data
    axis; last_tokens is [1, slots + 1], the first device's of the mesh; the result is that of all rows of all devices.
    """
    shared: dict[str, Any] = {"backend": backend}
    if partition is not None:
        shared["partition"] = partition
        last_tokens = lax.psum(last_tokens[0], MESH_AXES)  # all others are zero
    if tokens.shape[1] == 1:
        tokens = jnp.where(source >= 0, last_tokens[source], tokens[:, 0])[:, None]

    def one(tokens: jax.Array, positions: jax.Array, table: jax.Array, lora: RowAdapters | None):
        view = CacheView(table, blocks)
        return forward(params, config, plan, tokens, positions, pool, view, lora=lora, **shared)

    by_row = None if lora is None else RowAdapters(None, 0)  # type: ignore[arg-type]  # axes: only slots are batched
    hidden, pool = jax.vmap(one, in_axes=(0, 0, 0, by_row), out_axes=(0, None))(tokens, positions, tables, lora)
    if wanted == "last":
        hidden = hidden.reshape(-1, hidden.shape[-1])[last]  # [N, hidden]
        if lora is not None:
            lora = RowAdapters(lora.stacks, lora.slot[last // tokens.shape[1]])
    out = hidden if wanted == "hidden" else logits(params, config, hidden, lora=lora, **shared)
    axis = None if partition is None else partition.axis("rows")
    if axis is not None:
        out = lax.all_gather(out, axis, axis=0, tiled=True)
    return out, pool
