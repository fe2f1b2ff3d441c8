"""The native backend, on CPUs: one call where XLA makes five, which at the size of one token cost more than their work.

A row's bits depend on the row alone. Gradients are the XLA backend's.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.native import isa, register

from . import xla


@partial(jax.custom_vjp, nondiff_argnums=(3,))
def rms_norm(x: jax.Array, weight: jax.Array, layer: jax.Array, eps: float) -> jax.Array:
    """As xla.rms_norm; the weights of all layers are one operand, never copied."""
    call = _call("realm_rms_norm", x)
    return call(x, weight, layer.reshape(1), eps=np.float32(eps), isa=np.int64(isa()))


@partial(jax.custom_vjp, nondiff_argnums=(2,))
def gated(gate: jax.Array, up: jax.Array, activation: str) -> jax.Array:
    """As xla.gated."""
    number = ("silu", "gelu_tanh", "swiglu_oai").index(activation)  # as native/row_ops.h numbers them
    return _call("realm_gated", gate)(gate, up, activation=np.int64(number), isa=np.int64(isa()))


def argmax(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """As xla.argmax."""
    outs = (jax.ShapeDtypeStruct(x.shape[:-1], jnp.int32), jax.ShapeDtypeStruct(x.shape[:-1], jnp.bool_))
    index, finite = jax.ffi.ffi_call(register("realm_argmax"), outs, vmap_method="expand_dims")(x, isa=np.int64(isa()))
    return index, finite


def top_mask(score: jax.Array, mass: jax.Array, target: jax.Array) -> jax.Array:
    """As xla.top_mask, with sums in float64."""
    out = jax.ShapeDtypeStruct(score.shape, jnp.bool_)
    return jax.ffi.ffi_call(register("realm_top_mask"), out, vmap_method="broadcast_all")(score, mass, target)


def _call(name: str, like: jax.Array) -> Any:
    # What is not mapped gets an axis of 1 and is read once.
    return jax.ffi.ffi_call(register(name), jax.ShapeDtypeStruct(like.shape, jnp.float32), vmap_method="expand_dims")


def _rms_norm_forward(x, weight, layer, eps):
    return rms_norm(x, weight, layer, eps), (x, weight, layer)


def _rms_norm_backward(eps, kept, arriving):
    x, weight, layer = kept
    _, pull = jax.vjp(lambda x, weight: xla.rms_norm(x, weight, layer, eps), x, weight)
    return (*pull(arriving), None)


def _gated_forward(gate, up, activation):
    return gated(gate, up, activation), (gate, up)


def _gated_backward(activation, kept, arriving):
    return jax.vjp(lambda gate, up: xla.gated(gate, up, activation), *kept)[1](arriving)


rms_norm.defvjp(_rms_norm_forward, _rms_norm_backward)
gated.defvjp(_gated_forward, _gated_backward)
