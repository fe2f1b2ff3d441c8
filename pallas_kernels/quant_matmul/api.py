"""The public operations on packed weights: matmul, matmul by one expert per row, row lookup.

custom_vjp lies outside (gradients with respect to x; weights are constants), custom_vmap inside it (a vmap over requests
becomes one matmul over all their rows), the backend innermost.
"""

from collections.abc import Callable
from functools import cache
from typing import Any

import jax
import jax.numpy as jnp

from . import xla
from .formats import Format
from .reference import dequantize

Arrays = dict[str, Any]


class UnsupportedError(ValueError):
    """The backend asked for by name does not exist or does not support the case."""


BACKENDS = ("auto", "xla")
_RESOLVED = {"auto": "xla", "xla": "xla"}  # "auto" -> the first backend that serves every case


def resolve(backend: str) -> str:
    """The backend a name stands for; UnsupportedError when there is none."""
    if backend not in _RESOLVED:
        raise UnsupportedError(f"backend {backend!r} is not available for quant_matmul; accepted: {', '.join(BACKENDS)}")
    return _RESOLVED[backend]


def quant_matmul(
    x: jax.Array, arrays: Arrays, fmt: Format, *, layer: Any = None, backend: str = "auto"
) -> jax.Array:
    """x [..., K] times a packed weight [N, K] -> float32 [..., N].

    arrays: as Format.spec((N, K)), or of a stack (L, N, K) with ``layer`` an int32 scalar, traced or not. A row's bits do
    not depend on the other rows of the call. Differentiable in x. Raises UnsupportedError for an unknown backend and
    ValueError for shapes that do not fit.
    """
    resolve(backend)
    _check(x, arrays, fmt, 2 if layer is None else 3)
    lead = () if layer is None else (jnp.asarray(layer, jnp.int32),)
    return _matmul(fmt)(x.astype(jnp.float32), arrays, lead)


def take_rows(arrays: Arrays, fmt: Format, ids: jax.Array) -> jax.Array:
    """Rows ``ids`` [...] int32 of a packed weight [N, K] -> float32 [..., K]. Ids outside 0..N-1 are clamped."""
    return dequantize({name: a.at[ids].get(mode="clip") for name, a in arrays.items()}, fmt)


def _check(x: Any, arrays: Arrays, fmt: Format, ndim: int) -> None:
    first = next(iter(arrays.values()))
    if first.ndim != ndim:
        raise ValueError(f"weight arrays have {first.ndim} axes, expected {ndim}")
    if x.shape[-1] != fmt.columns(arrays):
        raise ValueError(f"x has {x.shape[-1]} columns, the weight {fmt.columns(arrays)}")


@cache
def _matmul(fmt: Format) -> Callable[..., jax.Array]:
    """The differentiable, vmappable (x, arrays, lead) -> y of one format."""
    forward = _rowwise(lambda x, arrays, lead: xla.matmul(x, arrays, fmt, lead))
    backward = _rowwise(lambda g, arrays, lead: xla.matmul_transposed(g, arrays, fmt, lead))

    @jax.custom_vjp
    def matmul(x, arrays, lead):
        return forward(x, arrays, lead)

    matmul.defvjp(
        lambda x, arrays, lead: (forward(x, arrays, lead), (arrays, lead)),
        lambda saved, g: (backward(g, *saved), None, None),
    )
    return matmul


def _rowwise(run: Callable[..., jax.Array]) -> Callable[..., jax.Array]:
    """``run`` on rows [M, K], as a function of x [..., K] whose vmap only adds rows."""

    @jax.custom_batching.custom_vmap
    def rows(x, arrays, lead):
        y = run(x.reshape(-1, x.shape[-1]), arrays, lead)
        return y.reshape(*x.shape[:-1], y.shape[-1])

    @rows.def_vmap
    def _batched(axis_size, in_batched, x, arrays, lead):
        x_batched, weight_batched = in_batched[0], in_batched[1:]
        if not any(jax.tree.leaves(weight_batched)):
            return rows(x, arrays, lead), True
        # Another weight for every element: nothing to share, so one at a time.
        def one(i):
            pick = lambda a, batched: a[i] if batched else a  # noqa: E731
            return rows(*jax.tree.map(pick, (x, arrays, lead), (x_batched, *weight_batched)))

        return jax.lax.map(one, jnp.arange(axis_size)), True

    return rows
