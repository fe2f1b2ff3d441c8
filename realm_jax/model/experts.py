"""The mixture of experts: routing, the chosen experts, the shared one."""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.numerics import row_sum, sigmoid, softmax
from realm_jax.model.config import ExpertConfig, ModelConfig
from realm_jax.model.weights import LayerWeights


def mixture(h: jax.Array, w: LayerWeights, c: ModelConfig) -> jax.Array:
    """The feed-forward block of a mixture layer: float32 [T, hidden] -> the same."""
    e = c.experts
    assert e is not None
    tokens = h.shape[0]
    bias = w.vector("exp_probs_b.bias") if "exp_probs_b.bias" in w else None
    ids, weights = route(w.linear(h, "ffn_gate_inp"), e, bias)
    divided = w.partition.axis("experts")
    local = ids
    if divided is not None:  # the others' experts are not ours: their rows add nothing here
        first = lax.axis_index(divided) * (e.count // w.partition.parts("experts"))
        local = ids - first
        ours = (local >= 0) & (local < e.count // w.partition.parts("experts"))
        local, weights = jnp.where(ours, local, 0), jnp.where(ours, weights, 0.0)
    rows = jnp.repeat(h, e.used, axis=0)  # [T * used, hidden]
    flat = local.reshape(-1)
    hidden = w.gated(
        w.expert_linear(rows, flat, "ffn_gate_exps"), w.expert_linear(rows, flat, "ffn_up_exps"), c.spec.activation
    )
    each = w.expert_linear(hidden, flat, "ffn_down_exps").reshape(tokens, e.used, -1)
    out: Any = sum(each[:, i] * weights[:, i, None] for i in range(e.used))  # in a fixed order, unlike XLA's own sums
    axes = tuple(axis for axis in (divided, w.partition.reduced("ffn_down_exps")) if axis is not None)
    if axes:
        out = lax.psum(out, axes)
    if e.shared_size:
        shared = w.gated(w.linear(h, "ffn_gate_shexp"), w.linear(h, "ffn_up_shexp"), c.spec.activation)
        shared = w.linear(shared, "ffn_down_shexp")
        if e.shared_gated:
            shared = shared * sigmoid(row_sum(h * w.vector("ffn_gate_inp_shexp.weight")))
        out = out + shared
    return out


def route(scores: jax.Array, e: ExpertConfig, bias: jax.Array | None = None) -> tuple[jax.Array, jax.Array]:
    """Chooses experts.

    Args:
        scores: float32 [T, experts], the router's outputs.
        e: the mixture.
        bias: float32 [experts], added for the choice and not for the weights (DeepSeek-V3, arXiv:2412.19437).

    Returns:
        int32 ids and float32 weights, both [T, used].
    """
    if e.router == "softmax":
        probabilities = softmax(scores)
    elif e.router == "sigmoid":
        probabilities = sigmoid(scores)
    else:
        probabilities = scores
    choice = probabilities if bias is None else probabilities + bias
    if e.groups > 1:
        grouped = choice.reshape(*choice.shape[:-1], e.groups, -1)
        _, best = lax.top_k(lax.top_k(grouped, 2)[0].sum(-1), e.groups_used)
        kept = (best[..., None] == jnp.arange(e.groups)).any(axis=-2)  # [T, groups]
        choice = jnp.where(kept[..., None], grouped, -jnp.inf).reshape(choice.shape)
    _, ids = lax.top_k(choice, e.used)
    weights = jnp.take_along_axis(probabilities, ids, axis=-1)
    if e.router == "softmax_topk":
        weights = softmax(weights)
    if e.normalise:
        weights = weights / jnp.maximum(row_sum(weights), 6.103515625e-5)  # the least normal float16
    return ids, weights * e.scale if e.scale != 1.0 else weights
