"""The two operations on a pool of pages: append the rows of new tokens, attend over the rows of a sequence.

Both are written for any number of leading batch axes, none included, over one pool. Under vmap a batched argument gains
a leading axis and the pool stays one: appending under vmap gives one pool with the rows of every element, not a pool
for each. So a model written for one sequence works on a batch, and a layer loop may carry the pool.
"""

from collections.abc import Callable
from functools import cache
from importlib import import_module
from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp

from ..errors import UnsupportedError
from .pages import BLOCK_PAGES, DTYPES, PAGE_SIZE, Case, KVPages

# Who serves: the module of each backend, and whether its kernel is interpreted. A module has append_rows and
# paged_attention in batch form (see xla.py) and unsupported(case), the reason why it does not take a case, or None.
_MODULES = {
    "xla": ("xla", False),
    "native": ("native", False),
    "gpu": ("gpu", False),
    "tpu": ("tpu", False),
    "interpret": ("gpu", True),
}
_ORDER = {"cpu": ("native", "xla"), "gpu": ("gpu", "xla"), "tpu": ("tpu", "xla")}  # what "auto" tries, by platform
BACKENDS = ("auto", *_MODULES)


def resolve(backend: str, case: Case) -> str:
    """The backend that serves a case: the one named, or for "auto" the first that takes it on JAX's default platform.

    Raises UnsupportedError when there is none of that name or it does not take the case, with the reason.
    """
    if backend == "auto":
        order = [name for name in _ORDER.get(jax.default_backend(), ("xla",)) if name in _MODULES]
        return next(name for name in order if _module(name).unsupported(case) is None)
    if backend not in _MODULES:
        raise UnsupportedError(
            f"backend {backend!r} is not available for paged_attention; accepted: {', '.join(BACKENDS)}"
        )
    reason = _module(backend).unsupported(case)
    if reason is not None:
        raise UnsupportedError(f"paged_attention, backend {backend!r}: {reason}")
    return backend


def append_rows(
    pool: KVPages,
    k: jax.Array,
    v: jax.Array,
    tables: jax.Array,
    positions: jax.Array,
    *,
    layer: Any,
    backend: str = "auto",
) -> KVPages:
    """Writes the rows of new tokens into one layer of the pool, in place where the pool is donated or carried.

    Args:
        pool: the pool. float16 rows saturate; int8 rows get a scale each.
        k: float32 [..., T, kv_heads, head_dim].
        v: float32 [..., T, kv_heads, value_dim of the pool].
        tables: int32 [..., pages], the pages of each sequence; sequences share none that they write.
        positions: int32 [..., T]; rows at negative positions, or beyond the table, are dropped.
        layer: int32 scalar, traced or not.
        backend: "auto" or one of BACKENDS.

    Raises:
        UnsupportedError: the backend is not available or does not take the case.
        ValueError: shapes or dtypes that do not fit.
    """
    *lead, tokens, kv_heads, head_dim = k.shape
    _check_pool(pool)
    _check("k", k.shape, (*lead, tokens, *pool.keys.shape[2:3], pool.keys.shape[4]))
    _check("v", v.shape, (*lead, tokens, kv_heads, pool.values.shape[4]))
    _check_places(tables, positions, lead, tokens)
    value_dim = pool.values.shape[4] or head_dim
    case = _case(pool, lead, tokens, kv_heads, value_dim)
    run = _append(resolve(backend, case))
    return run(pool, k.astype(jnp.float32), v.astype(jnp.float32), tables, positions, jnp.asarray(layer, jnp.int32))


def paged_attention(
    q: jax.Array,
    pool: KVPages,
    tables: jax.Array,
    positions: jax.Array,
    *,
    layer: Any,
    blocks: Any,
    scale: float,
    window: Any = 0,
    softcap: float = 0.0,
    sinks: jax.Array | None = None,
    value_dim: int,
    backend: str = "auto",
) -> jax.Array:
    """Causal attention of queries over the rows of their sequences, their own rows having been appended before.

    A query at position p sees positions max(0, p - window + 1) .. p. Sums run over blocks of BLOCK_SIZE positions from
    position 0 on, SUPER_BLOCKS of which make a partial result, and these are merged in order: a result has the same
    bits however a prompt is cut into calls, whatever else is in the batch and whatever `blocks` is.

    Args:
        q: float32 [..., T, heads, head_dim]; heads is a multiple of the pool's kv_heads, neighbours share one.
        pool: the pool. Rows that no query sees may hold anything, NaN too.
        tables: int32 [..., pages], a multiple of BLOCK_PAGES; entries past a sequence's last page name any page.
        positions: int32 [..., T], consecutive; -1 marks padding at the end, whose result is meaningless.
        layer: int32 scalar, traced or not.
        blocks: int32 scalar, traced or not: blocks to visit, enough for the largest position of the batch.
        scale: of the scores.
        window: int32 scalar, traced or not: positions a query sees, itself included; 0 for all.
        softcap: scores become softcap * tanh(scores / softcap); 0 for none.
        sinks: float32 [heads], a logit per head that only takes part in the normalisation.
        value_dim: of the result; the pool's, or for a latent pool at most head_dim.
        backend: "auto" or one of BACKENDS.

    Returns:
        float32 [..., T, heads, value_dim].

    Raises:
        UnsupportedError: the backend is not available or does not take the case.
        ValueError: shapes or dtypes that do not fit.
    """
    *lead, tokens, heads, _ = q.shape
    _check_pool(pool)
    kv_heads, head_dim = pool.keys.shape[2], pool.keys.shape[4]
    _check("q", q.shape, (*lead, tokens, heads, head_dim))
    if heads % kv_heads:
        raise ValueError(f"{heads} heads of q do not share {kv_heads} key/value heads evenly")
    _check_places(tables, positions, lead, tokens)
    if value_dim != pool.values.shape[4] and not (pool.latent and 0 < value_dim <= head_dim):
        raise ValueError(f"value_dim is {value_dim}; the pool has {pool.values.shape[4]}, keys have {head_dim}")
    if sinks is not None:
        _check("sinks", sinks.shape, (heads,))
        sinks = sinks.astype(jnp.float32)
    case = _case(pool, lead, tokens, heads, value_dim, softcap=float(softcap), sinks=sinks is not None)
    run = _attention(resolve(backend, case), float(scale), float(softcap), value_dim)
    scalars = tuple(jnp.asarray(x, jnp.int32) for x in (layer, blocks, window))
    return run(q.astype(jnp.float32), tables, positions, pool, *scalars, sinks)


def _module(backend: str) -> ModuleType:
    return import_module(f".{_MODULES[backend][0]}", __package__)


def _keywords(backend: str) -> dict[str, Any]:
    return {"interpret": True} if _MODULES[backend][1] else {}


def _case(pool: KVPages, lead: list[int], tokens: int, heads: int, value_dim: int, **rest: Any) -> Case:
    batch = 1
    for size in lead:
        batch *= size
    _, _, kv_heads, _, head_dim = pool.keys.shape
    return Case(batch, tokens, heads, kv_heads, head_dim, value_dim, pool.latent, pool.keys.dtype, **rest)


def _check(name: str, shape: tuple[int, ...], expected: tuple[int, ...]) -> None:
    if tuple(shape) != tuple(expected):
        raise ValueError(f"{name} has shape {tuple(shape)}, expected {tuple(expected)}")


def _check_pool(pool: KVPages) -> None:
    shape, dtype = pool.keys.shape, pool.keys.dtype
    if len(shape) != 5 or shape[3] != PAGE_SIZE:
        raise ValueError(f"keys of the pool have shape {shape}, expected [layers, pages, kv_heads, {PAGE_SIZE}, dim]")
    _check("values of the pool", pool.values.shape[:4], shape[:4])
    if dtype.name not in DTYPES or pool.values.dtype != dtype:
        raise ValueError(f"the pool is {dtype} and {pool.values.dtype}; accepted, both alike: {', '.join(DTYPES)}")
    for name, scales in (("key_scales", pool.key_scales), ("value_scales", pool.value_scales)):
        if (scales is not None) != (dtype == jnp.int8):
            raise ValueError(f"{name} belongs to int8 pages and to no other; the pool is {dtype}")
        if scales is not None:
            _check(name, scales.shape, shape[:4])


def _check_places(tables: jax.Array, positions: jax.Array, lead: list[int], tokens: int) -> None:
    _check("tables", tables.shape, (*lead, tables.shape[-1]))
    _check("positions", positions.shape, (*lead, tokens))
    if tables.shape[-1] % BLOCK_PAGES:
        raise ValueError(f"tables have {tables.shape[-1]} pages, expected a multiple of {BLOCK_PAGES}")
    for name, array in (("tables", tables), ("positions", positions)):
        if array.dtype != jnp.int32:
            raise ValueError(f"{name} is {array.dtype}, expected int32")


@cache
def _append(backend: str) -> Callable[..., KVPages]:
    """(pool, k, v, tables, positions, layer) -> pool, whose vmap adds rows."""

    @jax.custom_batching.custom_vmap
    def rows(pool, k, v, tables, positions, layer):
        k, v, tables, positions = (_flatten(a, keep) for a, keep in ((k, 3), (v, 3), (tables, 1), (positions, 1)))
        return _module(backend).append_rows(pool, k, v, tables, positions, layer=layer)

    @rows.def_vmap
    def _batched(size, in_batched, pool, *args):
        pool_batched, *row_batched, layer_batched = in_batched
        if any(jax.tree.leaves(pool_batched)) or layer_batched:
            raise UnsupportedError("append_rows: under vmap all elements share one pool and one layer")
        *arrays, layer = args
        return rows(pool, *_broadcast(size, row_batched, arrays), layer), jax.tree.map(lambda _: False, pool)

    return rows


@cache
def _attention(backend: str, scale: float, softcap: float, value_dim: int) -> Callable[..., jax.Array]:
    """(q, tables, positions, pool, layer, blocks, window, sinks) -> result, whose vmap adds sequences."""

    @jax.custom_batching.custom_vmap
    def attend(q, tables, positions, pool, layer, blocks, window, sinks):
        lead = q.shape[:-3]
        q, tables, positions = (_flatten(a, keep) for a, keep in ((q, 3), (tables, 1), (positions, 1)))
        out = _module(backend).paged_attention(
            q,
            pool,
            tables,
            positions,
            layer=layer,
            blocks=blocks,
            scale=scale,
            window=window,
            softcap=softcap,
            sinks=sinks,
            value_dim=value_dim,
            **_keywords(backend),
        )
        return out.reshape(*lead, *out.shape[1:])

    @attend.def_vmap
    def _batched(size, in_batched, *args):
        row_batched, shared_batched = in_batched[:3], in_batched[3:]
        if not any(jax.tree.leaves(shared_batched)):
            return attend(*_broadcast(size, row_batched, args[:3]), *args[3:]), True

        def one(i):  # another pool, layer or window for every element: one at a time
            return attend(*jax.tree.map(lambda a, batched: a[i] if batched else a, args, tuple(in_batched)))

        return jax.lax.map(one, jnp.arange(size)), True

    return attend


def _flatten(a: jax.Array, keep: int) -> jax.Array:
    """All axes but the last `keep` as one."""
    lead = a.shape[: a.ndim - keep]
    batch = 1
    for size in lead:
        batch *= size
    return a.reshape(batch, *a.shape[a.ndim - keep :])


def _broadcast(size: int, batched: Any, arrays: Any) -> list[jax.Array]:
    return [a if b else jnp.broadcast_to(a, (size, *a.shape)) for a, b in zip(arrays, batched, strict=True)]
