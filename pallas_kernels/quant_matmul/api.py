"""The public operations on packed weights: matmul, matmul by one expert per row, row lookup.

custom_vjp lies outside (gradients with respect to x; weights are constants), custom_vmap inside it (a vmap over
requests becomes one matmul over all their rows), the backend innermost.

A weight's arrays come in one of two layouts: rows, as formats.py describes, which any platform reads; or tiles, which
`native.tile` makes of them and the native CPU kernels read. Which backend serves which is the table BACKENDS.

The Pallas kernels multiply in bfloat16, as JAX's own dots do by default on the devices they are for;
jax.default_matmul_precision("float32"), or "highest", makes them multiply in float32.
"""

from collections.abc import Callable, Sequence
from functools import cache, partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from ..devices import platform
from ..errors import UnsupportedError
from . import gpu, native, tpu, xla
from .experts import for_each_expert
from .formats import Format
from .reference import dequantize

Arrays = dict[str, Any]


class Weight(NamedTuple):
    """A packed weight [N, K], or a stack [..., N, K]. n: N, which tiled arrays do not tell; None for rows."""

    arrays: Arrays
    fmt: Format
    n: int | None = None

    @property
    def tiled(self) -> bool:
        return "tiles" in self.arrays

    @property
    def shape(self) -> tuple[int, ...]:
        """The logical shape [..., N, K]."""
        first = next(iter(self.arrays.values()))
        if not self.tiled:
            return (*first.shape[:-1], self.fmt.columns(self.arrays))
        if self.n is None:
            raise ValueError("a tiled weight needs n, its number of rows")
        return (*first.shape[:-2], self.n, native.columns(self.arrays, self.fmt))


def _xla_unsupported(weight: Weight) -> str | None:
    return "it reads weights as rows, and these are tiles" if weight.tiled else None


def _native_unsupported(weight: Weight) -> str | None:
    return native.unsupported(weight.fmt) or (None if weight.tiled else "it reads weights as tiles, and these are rows")


# The Pallas kernels: the module of each backend, and whether its kernel is interpreted, on any device, for tests.
_PALLAS: dict[str, tuple[Any, bool]] = {
    "gpu": (gpu, False),
    "tpu": (tpu, False),
    "interpret": (gpu, True),
    "interpret_tpu": (tpu, True),
}


def _pallas_unsupported(name: str, weight: Weight) -> str | None:
    module, interpreted = _PALLAS[name]
    return _xla_unsupported(weight) or module.unsupported(weight.fmt, weight.arrays, interpreted)


# Name -> why it cannot take a weight, or None.
BACKENDS: dict[str, Callable[[Weight], str | None]] = {
    "native": _native_unsupported,
    **{name: partial(_pallas_unsupported, name) for name in _PALLAS},
    "xla": _xla_unsupported,
}
# What "auto" asks, in this order, by the platform that programs are compiled for.
_ORDER = {"gpu": ("gpu", "xla"), "tpu": ("tpu", "xla")}


def resolve(backend: str, weight: Weight) -> str:
    """The backend that a name stands for with this weight; UnsupportedError, with the reason, when there is none."""
    if backend == "auto":
        reasons = {name: BACKENDS[name](weight) for name in _ORDER.get(platform(), ("native", "xla"))}
        for name, reason in reasons.items():
            if reason is None:
                return name
        text = "; ".join(f"{name}: {reason}" for name, reason in reasons.items())
        raise UnsupportedError(f"no backend of quant_matmul takes this {weight.fmt.name} weight: {text}")
    if backend not in BACKENDS:
        raise UnsupportedError(
            f"backend {backend!r} is not available for quant_matmul; accepted: auto, {', '.join(BACKENDS)}"
        )
    reason = BACKENDS[backend](weight)
    if reason is not None:
        raise UnsupportedError(f"backend {backend!r} does not take this {weight.fmt.name} weight: {reason}")
    return backend


def quant_matmul(
    x: jax.Array, arrays: Arrays, fmt: Format, *, n: int | None = None, layer: Any = None, backend: str = "auto"
) -> jax.Array:
    """x [..., K] times a packed weight [N, K] -> float32 [..., N].

    arrays: rows as Format.spec((N, K)), or tiles, with n = N; or of a stack (L, N, K) with ``layer`` an int32 scalar,
    traced or not. A row's bits do not depend on the other rows of the call. Differentiable in x, not in the weight.
    Raises UnsupportedError for a backend that does not take the case and ValueError for shapes that do not fit.
    """
    return quant_matmuls(x, [Weight(arrays, fmt, n)], layers=None if layer is None else [layer], backend=backend)[0]


def quant_matmuls(
    x: jax.Array, weights: Sequence[Weight], *, layers: Sequence[Any] | None = None, backend: str = "auto"
) -> list[jax.Array]:
    """x [..., K] times several weights -> float32 [..., N] each: one call where a backend has one, for what shares x.

    layers: an index into each weight's stack. Bits, gradients and errors as in quant_matmul.
    """
    for weight in weights:
        _check(x, weight, 2 if layers is None else 3)
    names = tuple(resolve(backend, weight) for weight in weights)
    if len(set(names)) > 1:
        single = [layers and layers[i : i + 1] for i in range(len(weights))]
        return [quant_matmuls(x, [w], layers=one, backend=b)[0] for w, one, b in zip(weights, single, names)]
    lead = () if layers is None else tuple(jnp.asarray(layer, jnp.int32) for layer in layers)
    operation = _dense(tuple((w.fmt, w.n) for w in weights), names[0])
    return list(operation(x.astype(jnp.float32), None, tuple(w.arrays for w in weights), lead))


def expert_matmul(
    x: jax.Array,
    expert_ids: jax.Array,
    arrays: Arrays,
    fmt: Format,
    *,
    n: int | None = None,
    layer: Any = None,
    backend: str = "auto",
) -> jax.Array:
    """Row i of x [..., K] times expert ``expert_ids[i]`` (int32 [...]) of packed weights [E, N, K] -> float32 [..., N].

    arrays may be a stack [L, E, N, K] with ``layer``. Bits, gradients and errors as in quant_matmul; ids are clamped.
    """
    weight = Weight(arrays, fmt, n)
    name = resolve(backend, weight)
    _check(x, weight, 3 if layer is None else 4)
    if expert_ids.shape != x.shape[:-1]:
        raise ValueError(f"expert_ids has shape {expert_ids.shape}, expected {x.shape[:-1]}")
    lead = () if layer is None else (jnp.asarray(layer, jnp.int32),)
    operation = _experts((fmt, n), name)
    return operation(x.astype(jnp.float32), expert_ids.astype(jnp.int32), (arrays,), lead)[0]


def take_rows(arrays: Arrays, fmt: Format, ids: jax.Array, n: int | None = None) -> jax.Array:
    """Rows ``ids`` [...] int32 of a packed weight [N, K] -> float32 [..., K]. Ids outside 0..N-1 are clamped."""
    weight = Weight(arrays, fmt, n)
    if weight.tiled:
        resolve("native", weight)
        return _tiled_rows(fmt, n)(ids.astype(jnp.int32), arrays)
    ids = jnp.clip(ids, 0, weight.shape[-2] - 1)
    return dequantize({name: a[ids] for name, a in arrays.items()}, fmt)


def _check(x: Any, weight: Weight, ndim: int) -> None:
    shape = weight.shape
    if len(shape) != ndim:
        raise ValueError(f"weight arrays are of shape {shape}, expected {ndim} axes")
    if x.shape[-1] != shape[-1]:
        raise ValueError(f"x has {x.shape[-1]} columns, the weight {shape[-1]}")


@cache
def _dense(specs: tuple[tuple[Format, Any], ...], backend: str) -> Callable[..., tuple[jax.Array, ...]]:
    """The differentiable, vmappable (x, None, arrays, lead) -> ys of weights of these formats and n."""
    if backend == "native":

        def forward(xs, _, arrays, lead):
            return tuple(native.matmul(xs[0], [(a, *spec) for a, spec in zip(arrays, specs)], lead))

        def backward(gs, _, arrays, lead):
            index = lead or (None,) * len(specs)
            parts = [native.matmul_transposed(g, (a, *s), i) for g, a, s, i in zip(gs, arrays, specs, index)]
            return (sum(parts[1:], start=parts[0]),)

    else:
        matmul, _ = _rows_kernels(backend)

        def each(matmul, xs, arrays, lead):
            places: list[Any] = [(i,) for i in lead] or [()] * len(specs)
            return [matmul(x, a, fmt, i) for x, a, (fmt, _), i in zip(xs, arrays, specs, places)]

        def forward(xs, _, arrays, lead):
            return tuple(each(matmul, xs * len(specs), arrays, lead))

        def backward(gs, _, arrays, lead):
            parts = each(xla.matmul_transposed, gs, arrays, lead)
            return (sum(parts[1:], start=parts[0]),)

    return _operation(forward, backward)


@cache
def _experts(spec: tuple[Format, Any], backend: str) -> Callable[..., tuple[jax.Array, ...]]:
    """The same for (x, expert_ids, (arrays,), lead)."""
    fmt, n = spec

    def forward(xs, ids, arrays, lead):
        [x], [arrays] = xs, arrays
        if backend == "native":
            return (native.expert_matmul(x, ids, (arrays, fmt, n), lead),)
        return (_rows_kernels(backend)[1](x, ids, arrays, fmt, lead),)

    def backward(gs, ids, arrays, lead):
        [g], [arrays] = gs, arrays
        *_, experts, _, k = Weight(arrays, fmt, n).shape

        def matmul(rows, e):
            if backend == "native":
                return native.matmul_transposed(rows, (arrays, fmt, n), e + (lead[0] * experts if lead else 0))
            return xla.matmul_transposed(rows, arrays, fmt, (*lead, e))

        return (for_each_expert(g, ids, experts, k, matmul),)

    return _operation(forward, backward)


def _rows_kernels(backend: str) -> tuple[Callable[..., jax.Array], Callable[..., jax.Array]]:
    """matmul(x, arrays, fmt, lead) and expert_matmul(x, ids, arrays, fmt, lead) of a backend that reads rows."""
    if backend == "xla":
        return xla.matmul, _xla_experts
    module, interpret = _PALLAS[backend]

    def rounded(x: jax.Array) -> jax.Array:
        exact = jax.config.jax_default_matmul_precision in ("float32", "highest")  # type: ignore[attr-defined]
        return x if exact else x.astype(jnp.bfloat16)

    return (
        lambda x, *weight: module.matmul(rounded(x), *weight, interpret=interpret),
        lambda x, *weight: module.expert_matmul(rounded(x), *weight, interpret=interpret),
    )


def _xla_experts(x: jax.Array, ids: jax.Array, arrays: Arrays, fmt: Format, lead: tuple[Any, ...]) -> jax.Array:
    *_, experts, width, _ = Weight(arrays, fmt).shape
    return for_each_expert(x, ids, experts, width, lambda rows, e: xla.matmul(rows, arrays, fmt, (*lead, e)))


@cache
def _tiled_rows(fmt: Format, n: int) -> Callable[..., jax.Array]:
    def run(_, ids, arrays, lead):
        return (native.rows(ids, (arrays[0], fmt, n)),)

    rows = _rowwise(run)
    return lambda ids, arrays: rows((), ids, (arrays,), ())[0]


def _operation(forward: Callable[..., Any], backward: Callable[..., Any]) -> Callable[..., Any]:
    """forward((x,), ids, arrays, lead) -> ys, made differentiable in x: backward(gs, ids, arrays, lead) -> (dx,)."""
    forward, backward = _rowwise(forward), _rowwise(backward)

    @jax.custom_vjp
    def operation(x, ids, arrays, lead):
        return forward((x,), ids, arrays, lead)

    operation.defvjp(
        lambda x, *weight: (forward((x,), *weight), weight),
        lambda weight, gs: (backward(tuple(gs), *weight)[0], None, None, None),
    )
    return operation


def _rowwise(run: Callable[..., Any]) -> Callable[..., Any]:
    """``run`` on rows (xs [M, K] each, ids [M] or None), as a function of [..., K], [...] whose vmap only adds rows."""

    @jax.custom_batching.custom_vmap
    def rows(xs, ids, arrays, lead):
        shape = xs[0].shape[:-1] if xs else ids.shape
        flat = tuple(x.reshape(-1, x.shape[-1]) for x in xs)
        ys = run(flat, None if ids is None else ids.reshape(-1), arrays, lead)
        return tuple(y.reshape(*shape, y.shape[-1]) for y in ys)

    @rows.def_vmap
    def _batched(axis_size, in_batched, xs, ids, arrays, lead):
        xs_batched, ids_batched, *weight_batched = in_batched
        if not any(jax.tree.leaves(weight_batched)):

            def spread(a, batched):
                return a if batched else jnp.broadcast_to(a, (axis_size, *a.shape))

            xs = tuple(spread(x, b) for x, b in zip(xs, xs_batched))
            ys = rows(xs, None if ids is None else spread(ids, ids_batched), arrays, lead)
            return ys, tuple(True for _ in ys)

        def one(i):  # another weight for every element: nothing to share, so one at a time
            args = (xs, ids, arrays, lead)
            return rows(*jax.tree.map(lambda a, batched: a[i] if batched else a, args, tuple(in_batched)))

        ys = jax.lax.map(one, jnp.arange(axis_size))
        return ys, tuple(True for _ in ys)

    return rows
