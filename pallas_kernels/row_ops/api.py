"""Normalization and gated activations of rows; which backend serves is one table."""

from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.devices import platform
from pallas_kernels.errors import UnsupportedError
from pallas_kernels.native import available, why_not

from . import native, xla

ACTIVATIONS = ("silu", "gelu_tanh", "swiglu_oai")
_MODULES: dict[str, Any] = {"native": native, "xla": xla}
BACKENDS = ("auto", *_MODULES)


def rms_norm(
    x: jax.Array, weight: jax.Array, eps: float, *, layer: jax.Array | int | None = None, backend: str = "auto"
) -> jax.Array:
    """x [..., K] over the root of its mean square plus eps, times weight -> float32 [..., K].

    Zhang and Sennrich 2019, arXiv:1910.07467. weight: float32 [K], or [L, K] with layer, an int32 scalar. A row's bits
    do not depend on the others. Raises ValueError for shapes that do not fit, UnsupportedError for a backend that is
    not there.
    """
    stack = weight[None] if layer is None else weight
    if stack.ndim != 2 or x.shape[-1:] != stack.shape[-1:]:
        raise ValueError(f"x {x.shape} and weight {weight.shape} do not fit together")
    number = jnp.asarray(0 if layer is None else layer, jnp.int32)
    return _module(backend).rms_norm(x.astype(jnp.float32), stack, number, float(eps))


def gated(gate: jax.Array, up: jax.Array, activation: str, *, backend: str = "auto") -> jax.Array:
    """activation(gate) * up, of one shape -> float32 of it: the gated activation of the feed-forward blocks.

    activation: one of ACTIVATIONS; "swiglu_oai" is gpt-oss's clamped variant. Errors as of rms_norm.
    """
    if activation not in ACTIVATIONS:
        raise UnsupportedError(f"activation {activation!r} is not known; accepted: {', '.join(ACTIVATIONS)}")
    if gate.shape != up.shape:
        raise ValueError(f"gate {gate.shape} and up {up.shape} differ")
    return _module(backend).gated(gate.astype(jnp.float32), up.astype(jnp.float32), activation)


def argmax(x: jax.Array, *, backend: str = "auto") -> tuple[jax.Array, jax.Array]:
    """x float32 [..., K] -> the lowest index of each row's maximum, int32 [...], and whether all of it is finite, bool.

    The index of a row that holds a NaN means nothing. The same on every backend. Errors as of rms_norm.
    """
    if x.ndim == 0 or x.shape[-1] == 0:
        raise ValueError(f"x {x.shape} has no elements to choose from")
    return _module(backend).argmax(x.astype(jnp.float32))


def top_mask(score: jax.Array, mass: jax.Array, target: jax.Array, *, backend: str = "auto") -> jax.Array:
    """The smallest set of best-scored entries of a row whose mass reaches the target, as bool [B, K].

    score: float32 [B, K], not NaN; equal scores count in order of index. mass: float32 >= 0 [B, K]. target: float32
    [B]; of 0 it takes one entry that has mass, and one that is not reached takes all. Backends add masses in another
    order, so a set whose mass is the target but for rounding may differ by an entry. Errors as of rms_norm.
    """
    if score.ndim != 2 or score.shape != mass.shape or target.shape != score.shape[:1]:
        raise ValueError(f"score {score.shape}, mass {mass.shape} and target {target.shape} do not fit together")
    return _module(backend).top_mask(score, mass, target)


def _module(backend: str) -> Any:
    if backend == "auto":
        backend = "native" if platform() == "cpu" and available() else "xla"
    if backend not in _MODULES:
        raise UnsupportedError(f"backend {backend!r} is not available for row_ops; accepted: {', '.join(BACKENDS)}")
    if backend == "native" and not available():
        raise UnsupportedError(f"backend 'native' is not available for row_ops: {why_not()}")
    return _MODULES[backend]
