"""The public operation: low-rank adapters, one per row, added to the results of linear layers.

custom_vjp lies outside, custom_vmap inside it (a vmap over requests becomes one call over all their rows), the backend
innermost. Gradients are computed by XLA on every platform.
"""

import logging
from collections.abc import Callable, Sequence
from functools import cache
from importlib import import_module
from math import prod
from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp

from ..errors import UnsupportedError
from . import xla
from .case import DTYPES, Adapters, Case, case_of

_log = logging.getLogger(__name__)

# Who serves: the module of each backend, and whether its kernel is interpreted. A module has add_deltas (see xla.py)
# and unsupported(case), the reason why it does not take a case, or None.
_MODULES = {
    "xla": ("xla", False),
    "native": ("native", False),
    "gpu": ("gpu", False),
    "tpu": ("tpu", False),
    "interpret": ("gpu", True),
    "interpret_tpu": ("tpu", True),
}
_KERNELS = {"cpu": "native", "gpu": "gpu", "tpu": "tpu"}  # what "auto" takes by platform, XLA where that does not serve
BACKENDS = ("auto", *_MODULES)


def resolve(backend: str, case: Case) -> str:
    """The backend that serves a case: the one named, or for "auto" the kernel of JAX's default platform where it takes
    the case, else "xla", with a line in the log that says why.

    Raises UnsupportedError when there is none of that name or it does not take the case, with the reason.
    """
    if backend == "auto":
        name = _KERNELS.get(jax.default_backend(), "xla")
        reason = _module(name).unsupported(case)
        if reason is not None:
            _say_once(f"grouped_lora is served by XLA: {reason}")
        return "xla" if reason is not None else name
    if backend not in _MODULES:
        raise UnsupportedError(
            f"backend {backend!r} is not available for grouped_lora; accepted: {', '.join(BACKENDS)}"
        )
    reason = _module(backend).unsupported(case)
    if reason is not None:
        raise UnsupportedError(f"grouped_lora, backend {backend!r}: {reason}")
    return backend


def grouped_lora(
    x: jax.Array,
    slots: jax.Array,
    a: jax.Array,
    b: jax.Array,
    scales: jax.Array,
    *,
    layer: Any = None,
    base: jax.Array | None = None,
    backend: str = "auto",
) -> jax.Array:
    """base + scales[slot] * B[slot] (A[slot] x) for every row x, each with the adapter in its own slot.

    Rows of one adapter are computed together, and a row's bits do not depend on the other rows. A row without an
    adapter keeps its base bit for bit; adapters that no row uses are not read, and when no row has one nothing is.
    Differentiable in x, base, a, b and scales.

    Args:
        x: float32 [..., K]; other floating types are converted.
        slots: int32 [...], the adapter of each row in 0..S-1; any other number, such as -1, means none.
        a: float32, bfloat16 or float16 [S, R, K], or with ``layer`` [L, S, R, K].
        b: the same types, [S, N, R], or with ``layer`` [L, S, N, R].
        scales: float32 [S].
        layer: int32 scalar, traced or not: the layer of the stacks to use, which are not copied.
        base: float32 [..., N], the linear layer's own result; None for zeros.
        backend: "auto" or one of BACKENDS.

    Returns:
        float32 [..., N].

    Raises:
        UnsupportedError: the backend is not available or does not take the case.
        ValueError: shapes or dtypes that do not fit.

    Source: LoRA (Hu et al. 2021); rows grouped by adapter as in Punica (Chen et al. 2023).
    """
    bases = None if base is None else (base,)
    return grouped_lora_many(x, slots, [(a, b, scales)], layer=layer, bases=bases, backend=backend)[0]


def grouped_lora_many(
    x: jax.Array,
    slots: jax.Array,
    adapters: Sequence[tuple[jax.Array, jax.Array, jax.Array]],
    *,
    layer: Any = None,
    bases: Sequence[jax.Array] | None = None,
    backend: str = "auto",
) -> list[jax.Array]:
    """grouped_lora for several linear layers that share x and slots (q, k and v; gate and up), in one call.

    adapters: (a, b, scales) of each linear; N, R and dtypes may differ. bases: one per linear, or None. A linear's
    result has the bits that grouped_lora gives alone.
    """
    x, slots = jnp.asarray(x), jnp.asarray(slots)
    _check(x, slots, adapters, stacked=layer is not None)
    linears = tuple(
        Adapters(*((a, b) if layer is not None else (a[None], b[None])), scales) for a, b, scales in adapters
    )
    *lead, k = x.shape
    case = case_of(prod(lead), linears)
    backend = resolve(backend, case)
    if bases is None:
        bases = [jnp.zeros((*lead, linear.outputs), jnp.float32) for linear in case.linears]
    if len(bases) != len(linears):
        raise ValueError(f"there are {len(bases)} bases for {len(linears)} linears")
    for base, linear in zip(bases, case.linears, strict=True):
        _check_shape("base", base, (*lead, linear.outputs))
    bases = tuple(jnp.asarray(base).astype(jnp.float32) for base in bases)
    if not (case.rows and k and case.slots and all(linear.rank and linear.outputs for linear in case.linears)):
        return list(bases)
    layer = jnp.asarray(0 if layer is None else layer, jnp.int32)
    return list(_operation(backend)(x.astype(jnp.float32), slots.astype(jnp.int32), bases, linears, layer))


def _check(x: jax.Array, slots: jax.Array, adapters: Sequence[Any], stacked: bool) -> None:
    if not x.ndim or not jnp.issubdtype(x.dtype, jnp.floating):
        raise ValueError(f"x is {x.dtype} {x.shape}, expected float32 [..., K]")
    _check_shape("slots", slots, x.shape[:-1])
    if not jnp.issubdtype(slots.dtype, jnp.integer):
        raise ValueError(f"slots is {slots.dtype}, expected int32")
    if not adapters:
        raise ValueError("there are no linears")
    *lead, _, _ = adapters[0][0].shape  # [S] or [L, S]
    for a, b, scales in adapters:
        for name, w in (("a", a), ("b", b)):
            if w.ndim != 3 + stacked:
                raise ValueError(f"{name} has shape {w.shape}, expected {3 + stacked} axes")
            if w.dtype.name not in DTYPES:
                raise UnsupportedError(f"{name} is {w.dtype}; accepted: {', '.join(DTYPES)}")
        rank, outputs = a.shape[-2], b.shape[-2]
        _check_shape("a", a, (*lead, rank, x.shape[-1]))
        _check_shape("b", b, (*lead, outputs, rank))
        _check_shape("scales", scales, (lead[-1],))
        if scales.dtype != jnp.float32:
            raise ValueError(f"scales is {scales.dtype}, expected float32")


def _check_shape(name: str, array: Any, expected: tuple[int, ...]) -> None:
    if array.shape != tuple(expected):
        raise ValueError(f"{name} has shape {array.shape}, expected {tuple(expected)}")


def _module(backend: str) -> ModuleType:
    return import_module(f".{_MODULES[backend][0]}", __package__)


@cache
def _say_once(line: str) -> None:
    _log.info(line)


@cache
def _operation(backend: str) -> Callable[..., tuple[jax.Array, ...]]:
    """The differentiable, vmappable (x, slots, bases, linears, layer) -> results of one backend."""
    module, interpret = _module(backend), _MODULES[backend][1]

    def run(rows, slots, linears, layer):
        x, bases = rows
        return module.add_deltas(x, slots, bases, linears, layer, interpret=interpret)

    forward = _rowwise(run)

    @jax.custom_vjp
    def operation(x, slots, bases, linears, layer):
        return forward((x, bases), slots, linears, layer)

    def backward(kept, gradients):
        x, slots, linears, layer = kept
        by_x, *hidden = _transposed()(gradients, slots, linears, layer)  # hidden: B^T g of each linear
        shrunk = _shrunk()(x, slots, linears, layer)
        by_linears = tuple(
            _by_adapters(x, slots, g, u, t, one, layer)
            for g, u, t, one in zip(gradients, hidden, shrunk, linears, strict=True)
        )
        return by_x, None, gradients, by_linears, None

    operation.defvjp(
        lambda x, slots, bases, *rest: (operation(x, slots, bases, *rest), (x, slots, *rest)),
        backward,
    )
    return operation


@cache
def _transposed() -> Callable[..., tuple[jax.Array, ...]]:
    return _rowwise(xla.transposed)


@cache
def _shrunk() -> Callable[..., tuple[jax.Array, ...]]:
    return _rowwise(xla.shrunk)


def _by_adapters(
    x: jax.Array, slots: jax.Array, g: jax.Array, hidden: jax.Array, shrunk: jax.Array, one: Adapters, layer: jax.Array
) -> Adapters:
    """The gradients of one linear's adapters from x [..., K], g [..., N], hidden = B^T g and shrunk = A x [..., R]."""
    _, count, rank, k = one.a.shape
    x, g, hidden, shrunk = (r.reshape(-1, r.shape[-1]) for r in (x, g, hidden, shrunk))
    mine = slots.reshape(-1, 1) == jnp.arange(count)  # [M, S]
    weight = jnp.where(mine, one.scales, 0.0)[:, :, None]

    def per_slot(r):  # [M, R] -> [S * R, M]: each row in the place of its slot
        return (weight * r[:, None, :]).reshape(-1, count * rank).T

    by_a = jnp.matmul(per_slot(hidden), x, precision="highest").reshape(count, rank, k)
    by_b = jnp.matmul(per_slot(shrunk), g, precision="highest").reshape(count, rank, -1).swapaxes(1, 2)
    by_scales = (mine * (hidden * shrunk).sum(-1, keepdims=True)).sum(0)

    def stacked(gradient, w):
        return jnp.zeros_like(w).at[layer].set(gradient.astype(w.dtype))

    return Adapters(stacked(by_a, one.a), stacked(by_b, one.b), by_scales)


def _rowwise(run: Callable[..., Any]) -> Callable[..., Any]:
    """``run`` on (rows [M, *] in a pytree, slots [M], linears, layer) -> rows, for any leading axes; vmap adds rows."""

    @jax.custom_batching.custom_vmap
    def operation(rows, slots, linears, layer):
        flat = jax.tree.map(lambda r: r.reshape(-1, r.shape[-1]), rows)
        out = run(flat, slots.reshape(-1), linears, layer)
        return jax.tree.map(lambda r: r.reshape(*slots.shape, r.shape[-1]), out)

    @operation.def_vmap
    def _batched(size, in_batched, *args):
        if not any(jax.tree.leaves(in_batched[2:])):
            rows, slots = (
                jax.tree.map(lambda r, batched: r if batched else jnp.broadcast_to(r, (size, *r.shape)), arg, batched)
                for arg, batched in zip(args[:2], in_batched[:2], strict=True)
            )
            out = operation(rows, slots, *args[2:])
        else:  # other adapters for every element: nothing to share, so one at a time

            def one(i):
                return operation(*jax.tree.map(lambda r, batched: r[i] if batched else r, args, tuple(in_batched)))

            out = jax.lax.map(one, jnp.arange(size))
        return out, jax.tree.map(lambda _: True, out)

    return operation
