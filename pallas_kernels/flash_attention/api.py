"""The public operation: attention over contiguous keys and values, differentiable, on every backend.

custom_vjp lies outside, custom_vmap inside it (a mapped axis joins the batch axis), the backend innermost.
"""

import functools
import logging
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.errors import UnsupportedError

from . import gpu, gpu_hopper, native, reference, tpu, xla
from .case import ABSENT, Options, bounds_of

_log = logging.getLogger(__name__)
_TYPES = ("float32", "bfloat16", "float16")

# Which file serves which name. The two interpreted ones run a Pallas kernel step by step on any device: for tests.
_BACKENDS: dict[str, Any] = {
    "native": native,
    "xla": xla,
    "gpu": gpu,
    "hopper": gpu_hopper,
    "tpu": tpu,
    "interpret": gpu,
    "interpret_tpu": tpu,
}
_PLATFORMS = {
    "cpu": "native",
    "cuda": "gpu",
    "tpu": "tpu",
}  # what "auto" picks for the platform a program is lowered for; else "xla"
BACKENDS = ("auto", "reference", *_BACKENDS)


def flash_attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    *,
    lengths: jax.Array | None = None,
    starts: jax.Array | None = None,
    causal: bool = True,
    window: int = 0,
    scale: float | None = None,
    softcap: float = 0.0,
    sinks: jax.Array | None = None,
    backend: str = "auto",
    return_lse: bool = False,
) -> Any:
    """Attention without a buffer of queries times keys, forward and backward.

    Args:
        q: [B, T, heads, D], float32, bfloat16 or float16.
        k: [B, S, kv_heads, D] of q's type; kv_heads divides heads, query head h uses head h // (heads // kv_heads).
        v: [B, S, kv_heads, DV] of q's type.
        lengths: int32 [B], how many of the S keys each sequence has; the rest, and queries at positions from there on,
            are padding: they may hold anything, their outputs and gradients are zero. None: no padding.
        starts: int32 [B], the position among the keys of each sequence's first query; None: 0. Only causal and
            windowed attention and the padding of queries look at positions.
        causal: a query sees no key behind its own position.
        window: static; a query sees keys less than this many positions away, itself included; 0: all.
        scale: of the scores, before the soft-cap; None: 1 / sqrt(D).
        softcap: scores become softcap * tanh(scores / softcap); 0: none.
        sinks: float32 [heads], a logit per head that takes part in the normalisation alone.
        backend: one of ``BACKENDS``. "auto" takes the kernel of the platform the program is lowered for where it
            supports the case, else "xla". "hopper" is another kernel for H100 and H200. "interpret" and
            "interpret_tpu" run the GPU's and the TPU's Pallas kernel in interpret mode, for tests.
        return_lse: also return the logarithm of the sum of the exponentials of a query's scores and its sink, float32
            [B, T, heads]; -inf for a query that sees nothing.

    Returns:
        [B, T, heads, DV] of q's type, zero for a query that sees nothing; with return_lse a pair.

    Sums are float32. Keys are visited in blocks aligned to their positions, so a query's bits depend on neither T nor S
    nor the padding; on "xla" this holds for CPUs. Differentiable in q, k, v and sinks, in reverse mode, once. jax.vmap
    merges the mapped axis with B; what it does not map is repeated.

    Raises UnsupportedError where the backend asked for does not take the case, ValueError for shapes and types that do
    not fit together. Method: Dao 2023, FlashAttention-2, arXiv:2307.08691.
    """
    _check(q, k, v, lengths, starts, window, softcap, sinks)
    factor = q.shape[-1] ** -0.5 if scale is None else float(scale)
    options = Options(causal, window, factor, float(softcap), lengths is not None)
    if not (math.isfinite(options.scale) and math.isfinite(options.softcap)):
        raise ValueError(f"scale {scale} and softcap {softcap} must be finite")
    _refuse(backend, q, k, v, options)
    batch, queries, heads, _ = q.shape
    bounds = bounds_of(lengths, starts, batch, queries, k.shape[1])
    if q.size == 0 or k.size == 0 or v.size == 0:
        out, lse = jnp.zeros((*q.shape[:3], v.shape[3]), q.dtype), jnp.full((batch, heads, queries), -jnp.inf)
    elif backend == "reference":
        out, lse = reference.attention(q, k, v, bounds, sinks, options)
    else:
        if sinks is not None:
            sinks = jnp.broadcast_to(sinks.astype(jnp.float32), (batch, heads))
        out, lse = _operation(backend, options)(q, k, v, sinks, bounds)
    return (out, lse.swapaxes(1, 2)) if return_lse else out


def unsupported(backend: str, q: Any, k: Any, v: Any, options: Options) -> str | None:
    """Why ``backend`` does not take arrays of these shapes and types (q, k, v as in ``flash_attention``), or None."""
    if backend not in BACKENDS:
        return f"there is no such backend; accepted: {', '.join(BACKENDS)}"
    if backend in ("auto", "reference"):
        return None
    interpreted = backend.startswith("interpret")
    return _BACKENDS[backend].unsupported(q, k, v, options, interpreted)


def _refuse(backend: str, q: Any, k: Any, v: Any, options: Options) -> None:
    reason = unsupported(backend, q, k, v, options)
    if reason is not None:
        raise UnsupportedError(f"flash_attention, backend {backend!r}: {reason}")


def _check(q: Any, k: Any, v: Any, lengths: Any, starts: Any, window: int, softcap: float, sinks: Any) -> None:
    shapes = f"q {q.shape}, k {k.shape}, v {v.shape}"
    if not q.ndim == k.ndim == v.ndim == 4:
        raise ValueError(f"flash_attention takes q, k, v of 4 axes, not {shapes}")
    if q.shape[0] != k.shape[0] or k.shape[:3] != v.shape[:3] or q.shape[3] != k.shape[3]:
        raise ValueError(f"these do not fit together: {shapes}")
    if k.shape[2] == 0 or q.shape[2] % k.shape[2]:
        raise ValueError(f"{q.shape[2]} query heads are no multiple of {k.shape[2]} key/value heads")
    if not q.dtype == k.dtype == v.dtype or q.dtype.name not in _TYPES:
        raise ValueError(f"q {q.dtype}, k {k.dtype}, v {v.dtype}: one type for all, of {', '.join(_TYPES)}")
    for name, a, shape in (("lengths", lengths, q.shape[:1]), ("starts", starts, q.shape[:1])):
        if a is not None and (a.shape != shape or not jnp.issubdtype(a.dtype, jnp.integer)):
            raise ValueError(f"{name} has type {a.dtype} and shape {a.shape}, expected integers of {shape}")
    if sinks is not None and (sinks.shape != q.shape[2:3] or not jnp.issubdtype(sinks.dtype, jnp.floating)):
        raise ValueError(f"sinks has type {sinks.dtype} and shape {sinks.shape}, expected floats of {q.shape[2:3]}")
    if window < 0 or softcap < 0:
        raise ValueError(f"window {window} and softcap {softcap} must not be negative")


@functools.cache
def _operation(backend: str, options: Options) -> Callable[..., tuple[jax.Array, jax.Array]]:
    """The differentiable, vmappable (q, k, v, sinks [B, heads] or None, bounds) -> (out, lse [B, heads, T])."""
    forward = _merging_vmap(functools.partial(_forward, backend, options))
    backward = _merging_vmap(functools.partial(_backward, backend, options))

    @jax.custom_vjp
    def attention(q, k, v, sinks, bounds):
        return forward(q, k, v, bounds, sinks)

    def keep(q, k, v, sinks, bounds):
        out, lse = forward(q, k, v, bounds, sinks)
        return (out, lse), (q, k, v, sinks, bounds, out, lse)

    def gradients(kept, arriving):
        q, k, v, sinks, bounds, out, lse = kept
        grad, grad_lse = arriving
        some = lse > -jnp.inf
        weighted = grad.astype(jnp.float32) * out.astype(jnp.float32)
        delta = jnp.where(some, weighted.sum(-1).swapaxes(-1, -2) - grad_lse, 0.0)  # [B, heads, T]
        lse = jnp.where(some, lse, ABSENT)
        dq, dk, dv = backward(q, k, v, bounds, lse, delta, grad)
        if sinks is None:
            return dq, dk, dv, None, None
        return dq, dk, dv, -(jnp.exp(sinks[..., None] - lse) * delta).sum(-1), None

    attention.defvjp(keep, gradients)
    return attention


def _forward(backend: str, options: Options, q: Any, k: Any, v: Any, bounds: Any, sinks: Any) -> Any:
    def run(name):
        return lambda *args: _BACKENDS[name].forward(*args, options, **_how(name))

    return _dispatch(backend, options, run, q, k, v, bounds, sinks)


def _backward(
    backend: str, options: Options, q: Any, k: Any, v: Any, bounds: Any, lse: Any, delta: Any, grad: Any
) -> Any:
    def run(name):
        return lambda *args: _BACKENDS[name].backward(*args, options, **_how(name))

    return _dispatch(backend, options, run, q, k, v, bounds, lse, delta, grad)


def _how(name: str) -> dict[str, bool]:
    return {"interpret": True} if name.startswith("interpret") else {}


def _dispatch(backend: str, options: Options, run: Callable[[str], Callable[..., Any]], *args: Any) -> Any:
    """``run(name)`` on the arguments, for the backend of that name or the one of the platform lowered for."""
    if backend != "auto":
        return run(backend)(*args)
    branches = {}
    for platform, name in _PLATFORMS.items():
        q, k, v = args[:3]
        reason = unsupported(name, q, k, v, options)
        if reason is None:
            branches[platform] = run(name)
        else:
            _say_once(f"flash_attention is served by XLA on {platform}: {reason}")
    return lax.platform_dependent(*args, **branches, default=run("xla"))


@functools.cache
def _say_once(line: str) -> None:
    _log.info(line)


def _merging_vmap(run: Callable[..., Any]) -> Callable[..., Any]:
    """``run``, whose arguments and results begin with the axis B, with a vmap that merges the mapped axis into B."""
    mapped = jax.custom_batching.custom_vmap(lambda *args: run(*args))

    @mapped.def_vmap
    def rule(axis_size, in_batched, *args):
        def merge(a, batched):
            if not batched:
                a = jnp.broadcast_to(a, (axis_size, *a.shape))
            return a.reshape(-1, *a.shape[2:])

        out = mapped(*jax.tree.map(merge, args, tuple(in_batched)))
        out = jax.tree.map(lambda a: a.reshape(axis_size, -1, *a.shape[1:]), out)
        return out, jax.tree.map(lambda _: True, out)

    return mapped
