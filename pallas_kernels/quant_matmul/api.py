"""The public operations on packed weights: matmul, matmul by one expert per row, row lookup.

custom_vjp lies outside (gradients with respect to x; weights are constants), custom_vmap inside it (a vmap over
requests becomes one matmul over all their rows), the backend innermost.
"""

from collections.abc import Callable
from functools import cache
from typing import Any

import jax
import jax.numpy as jnp

from ..errors import UnsupportedError
from . import xla
from .experts import for_each_expert
from .formats import Format
from .reference import dequantize

Arrays = dict[str, Any]


BACKENDS = ("auto", "xla")
_RESOLVED = {"auto": "xla", "xla": "xla"}  # "auto" -> the first backend that serves every case


def resolve(backend: str) -> str:
    """The backend a name stands for; UnsupportedError when there is none."""
    if backend not in _RESOLVED:
        raise UnsupportedError(
            f"backend {backend!r} is not available for quant_matmul; accepted: {', '.join(BACKENDS)}"
        )
    return _RESOLVED[backend]


def quant_matmul(x: jax.Array, arrays: Arrays, fmt: Format, *, layer: Any = None, backend: str = "auto") -> jax.Array:
    """x [..., K] times a packed weight [N, K] -> float32 [..., N].

    arrays: as Format.spec((N, K)), or of a stack (L, N, K) with ``layer`` an int32 scalar, traced or not. A row's bits
    do not depend on the other rows of the call. Differentiable in x, not in the weight. Raises UnsupportedError for an
    unknown backend and ValueError for shapes that do not fit.
    """
    resolve(backend)
    _check(x, arrays, fmt, 2 if layer is None else 3)
    return _dense(fmt)(x.astype(jnp.float32), None, arrays, _lead(layer))


def expert_matmul(
    x: jax.Array, expert_ids: jax.Array, arrays: Arrays, fmt: Format, *, layer: Any = None, backend: str = "auto"
) -> jax.Array:
    """Row i of x [..., K] times expert ``expert_ids[i]`` (int32 [...]) of packed weights [E, N, K] -> float32 [..., N].

    arrays may be a stack [L, E, N, K] with ``layer``. Bits, gradients and errors as in quant_matmul; ids are clamped.
    """
    resolve(backend)
    _check(x, arrays, fmt, 3 if layer is None else 4)
    if expert_ids.shape != x.shape[:-1]:
        raise ValueError(f"expert_ids has shape {expert_ids.shape}, expected {x.shape[:-1]}")
    return _experts(fmt)(x.astype(jnp.float32), expert_ids.astype(jnp.int32), arrays, _lead(layer))


def take_rows(arrays: Arrays, fmt: Format, ids: jax.Array) -> jax.Array:
    """Rows ``ids`` [...] int32 of a packed weight [N, K] -> float32 [..., K]. Ids outside 0..N-1 are clamped."""
    ids = jnp.clip(ids, 0, next(iter(arrays.values())).shape[0] - 1)
    return dequantize({name: a[ids] for name, a in arrays.items()}, fmt)


def _check(x: Any, arrays: Arrays, fmt: Format, ndim: int) -> None:
    first = next(iter(arrays.values()))
    if first.ndim != ndim:
        raise ValueError(f"weight arrays have {first.ndim} axes, expected {ndim}")
    if x.shape[-1] != fmt.columns(arrays):
        raise ValueError(f"x has {x.shape[-1]} columns, the weight {fmt.columns(arrays)}")


def _lead(layer: Any) -> tuple[jax.Array, ...]:
    return () if layer is None else (jnp.asarray(layer, jnp.int32),)


@cache
def _dense(fmt: Format) -> Callable[..., jax.Array]:
    """The differentiable, vmappable (x, None, arrays, lead) -> y of one format."""
    return _operation(
        lambda x, _, arrays, lead: xla.matmul(x, arrays, fmt, lead),
        lambda g, _, arrays, lead: xla.matmul_transposed(g, arrays, fmt, lead),
    )


@cache
def _experts(fmt: Format) -> Callable[..., jax.Array]:
    """The same for (x, expert_ids, arrays, lead)."""

    def forward(x, ids, arrays, lead):
        experts, n = next(iter(arrays.values())).shape[len(lead) :][:2]
        return for_each_expert(x, ids, experts, n, lambda rows, e: xla.matmul(rows, arrays, fmt, (*lead, e)))

    def backward(g, ids, arrays, lead):
        experts, k = next(iter(arrays.values())).shape[len(lead)], fmt.columns(arrays)
        return for_each_expert(g, ids, experts, k, lambda rows, e: xla.matmul_transposed(rows, arrays, fmt, (*lead, e)))

    return _operation(forward, backward)


def _operation(forward: Callable[..., jax.Array], backward: Callable[..., jax.Array]) -> Callable[..., jax.Array]:
    forward, backward = _rowwise(forward), _rowwise(backward)

    @jax.custom_vjp
    def operation(x, ids, arrays, lead):
        return forward(x, ids, arrays, lead)

    operation.defvjp(
        lambda x, *weight: (forward(x, *weight), weight),
        lambda weight, g: (backward(g, *weight), None, None, None),
    )
    return operation


def _rowwise(run: Callable[..., jax.Array]) -> Callable[..., jax.Array]:
    """``run`` on rows (x [M, K], ids [M] or None), as a function of x [..., K], ids [...] whose vmap only adds rows."""

    @jax.custom_batching.custom_vmap
    def rows(x, ids, arrays, lead):
        y = run(x.reshape(-1, x.shape[-1]), None if ids is None else ids.reshape(-1), arrays, lead)
        return y.reshape(*x.shape[:-1], y.shape[-1])

    @rows.def_vmap
    def _batched(axis_size, in_batched, x, ids, arrays, lead):
        x_batched, ids_batched, *weight_batched = in_batched
        if not any(jax.tree.leaves(weight_batched)):
            if not x_batched:
                x = jnp.broadcast_to(x, (axis_size, *x.shape))
            if ids is not None and not ids_batched:
                ids = jnp.broadcast_to(ids, (axis_size, *ids.shape))
            return rows(x, ids, arrays, lead), True

        def one(i):  # another weight for every element: nothing to share, so one at a time
            args = (x, ids, arrays, lead)
            return rows(*jax.tree.map(lambda a, batched: a[i] if batched else a, args, tuple(in_batched)))

        return jax.lax.map(one, jnp.arange(axis_size)), True

    return rows
