"""The decoder: pure functions of one sequence, the same for every architecture. jax.vmap gives the batch.

What differs between architectures is data: ModelConfig, and which tensors a layer has.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from pallas_kernels import row_ops
from pallas_kernels.paged_attention import KVPages
from realm_jax.model.adapters import HEAD, RowAdapters
from realm_jax.model.attention import CacheView, attend
from realm_jax.model.config import ModelConfig
from realm_jax.model.experts import mixture
from realm_jax.model.ops import rotate, softcap
from realm_jax.model.params import Params
from realm_jax.model.partition import WHOLE, Partition
from realm_jax.model.plan import LayerPlan, Segment
from realm_jax.model.rope import FINE_POSITIONS
from realm_jax.model.weights import LayerWeights, row_backend


def forward(
    params: Params,
    config: ModelConfig,
    plan: LayerPlan,
    tokens: jax.Array,
    positions: jax.Array,
    pool: KVPages,
    view: CacheView,
    *,
    lora: RowAdapters | None = None,
    partition: Partition = WHOLE,
    backend: str = "auto",
) -> tuple[jax.Array, KVPages]:
    """One sequence through all layers.

    Args:
        params, config, plan: of the model, or of a device's part of it (partition.local_config); config and plan are
            static.
        tokens: int32 [T].
        positions: int32 [T], consecutive from the sequence's cached tokens on; -1 marks padding at the end.
        pool: the cache of all sequences, not batched under vmap; donate it, and its rows are written in place.
        view: which of its pages are the sequence's.
        lora: adapters, with the sequence's slot; None for a model without any, whose program is then the plain one.
        partition: which part that is, static; the call is then within a shard_map over its mesh.
        backend: of the kernels, static.

    Returns:
        Hidden states float32 [T, hidden], normalised, ready for `logits`; and the pool with the new rows in it, for all
        sequences of a vmap together (out_axes None).
    """
    mix = partial(attend, view=view, positions=positions, backend=backend)
    return run_layers(
        params, config, plan, tokens, positions, pool, mix, lora=lora, partition=partition, backend=backend
    )


def run_layers(
    params: Params,
    config: ModelConfig,
    plan: LayerPlan,
    tokens: jax.Array,
    positions: jax.Array,
    pool: Any,
    mix: Callable[..., tuple[jax.Array, Any]],
    *,
    lora: RowAdapters | None = None,
    partition: Partition = WHOLE,
    backend: str = "auto",
) -> tuple[jax.Array, Any]:
    """`forward` with any attention: mix(q, k, v, pool, layer=, window=, scale=, ...) -> (mixed, pool), as attend."""
    with jax.named_scope("embedding"):
        x = _embed(params, tokens, partition)
        if lora is not None:
            x = lora.add_embedding(x, tokens, backend)
        x = x * config.embedding_scale
    with jax.named_scope("rope"):
        turns = _rotations(params.rope, positions)

    def layer(x, pool, weights: LayerWeights, rope: jax.Array, window: jax.Array):
        cos_sin = (turns[0][rope], turns[1][rope])
        return _layer(x, pool, weights, config, cos_sin, partial(mix, layer=weights.number, window=window))

    for segment in plan.segments:
        x, pool = _run_segment(x, pool, params, config, plan, segment, layer, lora, partition, backend)
    with jax.named_scope("output_norm"):
        weight = params.tables["output_norm.weight"]
        return row_ops.rms_norm(x, weight, config.norm_eps, backend=row_backend(backend)), pool


def logits(
    params: Params,
    config: ModelConfig,
    hidden: jax.Array,
    *,
    lora: RowAdapters | None = None,
    partition: Partition = WHOLE,
    backend: str = "auto",
) -> jax.Array:
    """Hidden states float32 [..., hidden] -> float32 [..., vocab]. The slots of `lora` have hidden's leading axes, or
    the first of them. partition: as for `forward`; every device gets all of the vocabulary."""
    with jax.named_scope("head"):
        head = params.tables.get("output.weight", params.tables["token_embd.weight"])
        out = head.matmul(hidden, backend=backend)
        if lora is not None:
            [out] = lora.add(hidden, [HEAD], [out], 0, backend)
        if "output.bias" in params.tables:
            out = out + params.tables["output.bias"]
        if config.logit_scale != 1.0:
            out = out * config.logit_scale
        out = softcap(out, config.final_softcap)
        axis = partition.axis("vocab")
        return out if axis is None else lax.all_gather(out, axis, axis=out.ndim - 1, tiled=True)


def _embed(params: Params, tokens: jax.Array, partition: Partition) -> jax.Array:
    """float32 [T, hidden]."""
    table, axis = params.tables["token_embd.weight"], partition.axis("vocab")
    if axis is None:
        return table.take_rows(tokens)
    rows = table.shape[-2]  # of this device
    local = tokens - lax.axis_index(axis) * rows
    found = (local >= 0) & (local < rows)
    return lax.psum(jnp.where(found[:, None], table.take_rows(jnp.where(found, local, 0)), 0.0), axis)


def _run_segment(
    x: jax.Array,
    pool: KVPages,
    params: Params,
    config: ModelConfig,
    plan: LayerPlan,
    segment: Segment,
    layer: Callable[..., tuple[jax.Array, KVPages]],
    lora: RowAdapters | None,
    partition: Partition,
    backend: str,
) -> tuple[jax.Array, KVPages]:
    """Scans over the repeats of a segment, the layers of its period unrolled in the body."""

    def table(values: Callable[[int], int]) -> np.ndarray:
        """int32 [repeats, period] of a value per layer."""
        numbers = [values(segment.start + i) for i in range(segment.period * segment.repeats)]
        return np.asarray(numbers, np.int32).reshape(segment.repeats, segment.period)

    data = {
        "number": table(lambda i: i),
        "rope": table(lambda i: config.layer_rope[i]),
        "window": table(lambda i: config.layer_window[i]),
    }
    signature = [plan.layers[segment.start + j] for j in range(segment.period)]
    places = [
        {
            role: np.asarray(
                [plan.layers[segment.start + r * segment.period + j][n][2] for r in range(segment.repeats)], np.int32
            )
            for n, (role, _, _) in enumerate(row)
        }
        for j, row in enumerate(signature)
    ]

    def body(carry: tuple[jax.Array, KVPages], scanned: tuple) -> tuple[tuple[jax.Array, KVPages], None]:
        x, pool = carry
        data, places = scanned
        for j, row in enumerate(signature):
            at = {role: (stack, places[j][role]) for role, stack, _ in row}
            weights = LayerWeights(params, at, backend, data["number"][j], lora, partition)
            x, pool = layer(x, pool, weights, data["rope"][j], data["window"][j])
        return (x, pool), None

    carry, _ = lax.scan(body, (x, pool), (data, places))
    return carry


def _layer(
    x: jax.Array,
    pool: KVPages,
    w: LayerWeights,
    c: ModelConfig,
    cos_sin: tuple[jax.Array, jax.Array],
    mix: Callable[..., tuple[jax.Array, KVPages]],
) -> tuple[jax.Array, KVPages]:
    """One decoder layer: float32 [T, hidden] -> the same, and the pool. `mix` is `attend` at this place of it."""
    with jax.named_scope("attention"):
        h = w.norm(x, "attn_norm.weight", c.norm_eps) if "attn_norm.weight" in w else x
        attention = _latent_attention if c.latent is not None else _attention
        h, pool = attention(h, pool, w, c, cos_sin, mix)
        if c.spec.post_norm:
            h = w.norm(h, "post_attention_norm.weight", c.norm_eps)
        x = x + (h * c.residual_scale if c.residual_scale != 1.0 else h)
    with jax.named_scope("feed_forward"):
        norm = f"{c.spec.ffn_norm}.weight"
        h = w.norm(x, norm, c.norm_eps) if c.spec.pre_norm else x
        h = mixture(h, w, c) if "ffn_gate_inp.weight" in w else _feed_forward(h, w, c)
        if c.spec.post_norm:
            h = w.norm(h, "post_ffw_norm.weight", c.norm_eps)
        x = x + (h * c.residual_scale if c.residual_scale != 1.0 else h)
    return x, pool


def _attention(h, pool, w, c, cos_sin, mix) -> tuple[jax.Array, KVPages]:
    """Grouped-query attention: float32 [T, hidden] -> the same, and the pool."""
    tokens = h.shape[0]
    sizes = (c.num_heads * c.head_dim, c.num_kv_heads * c.head_dim, c.num_kv_heads * c.value_dim)
    if "attn_qkv.weight" in w:
        q, k, v = jnp.split(w.linear(h, "attn_qkv"), np.cumsum(sizes)[:2], axis=-1)
        q, k, v = (
            x + w.vector(f"{name}.bias") if f"{name}.bias" in w else x
            for name, x in (("attn_q", q), ("attn_k", k), ("attn_v", v))
        )
    else:
        q, k, v = w.linears(h, "attn_q", "attn_k", "attn_v")
    if c.spec.qk_norm == "full":
        q, k = (
            w.norm(q, "attn_q_norm.weight", c.norm_eps),
            w.norm(k, "attn_k_norm.weight", c.norm_eps),
        )
    q = q.reshape(tokens, c.num_heads, c.head_dim)
    k = k.reshape(tokens, c.num_kv_heads, c.head_dim)
    v = v.reshape(tokens, c.num_kv_heads, c.value_dim)
    if c.spec.qk_norm == "head":
        q, k = (
            w.norm(q, "attn_q_norm.weight", c.norm_eps),
            w.norm(k, "attn_k_norm.weight", c.norm_eps),
        )
    q, k = rotate(q, cos_sin, c.spec.rope), rotate(k, cos_sin, c.spec.rope)
    mixed, pool = mix(
        q,
        k,
        v,
        pool,
        scale=c.attention_scale,
        softcap=c.attention_softcap,
        sinks=w.vector("attn_sinks.weight") if c.spec.sinks else None,
        value_dim=c.value_dim,
    )
    return w.linear(mixed.reshape(tokens, -1), "attn_output"), pool


def _latent_attention(h, pool, w, c, cos_sin, mix) -> tuple[jax.Array, KVPages]:
    """Multi-head latent attention, decompression absorbed into queries and output: one cached row serves all heads."""
    tokens, m = h.shape[0], c.latent
    rotated = c.ropes[0].dim
    if m.query_rank:
        q = w.linear(w.norm(w.linear(h, "attn_q_a"), "attn_q_a_norm.weight", c.norm_eps), "attn_q_b")
    else:
        q = w.linear(h, "attn_q")
    q = q.reshape(tokens, c.num_heads, m.key_dim)
    q_plain, q_rotated = q[..., : m.key_dim - rotated], rotate(q[..., m.key_dim - rotated :], cos_sin, c.spec.rope)
    head = jnp.tile(jnp.arange(c.num_heads), tokens)  # each head has matrices of its own, as experts have
    q_latent = w.expert_linear(q_plain.reshape(head.size, -1), head, "attn_k_b").reshape(tokens, c.num_heads, m.rank)
    compressed = w.linear(h, "attn_kv_a_mqa")  # [T, rank + rotated]
    latent = w.norm(compressed[:, : m.rank], "attn_kv_a_norm.weight", c.norm_eps)
    k_rotated = rotate(compressed[:, None, m.rank :], cos_sin, c.spec.rope)
    keys = jnp.concatenate([latent[:, None, :], k_rotated], axis=-1)  # [T, 1, rank + rotated]
    values = jnp.zeros((tokens, 1, 0), jnp.float32)
    q = jnp.concatenate([q_latent, q_rotated], axis=-1)
    mixed, pool = mix(q, keys, values, pool, scale=c.attention_scale, value_dim=m.rank)
    v = w.expert_linear(mixed.reshape(head.size, -1), head, "attn_v_b")
    return w.linear(v.reshape(tokens, -1), "attn_output"), pool


def _feed_forward(h: jax.Array, w: LayerWeights, c: ModelConfig) -> jax.Array:
    if c.spec.fused_gate_up:
        gate, up = jnp.split(w.linear(h, "ffn_up"), 2, axis=-1)
    else:
        gate, up = w.linears(h, "ffn_gate", "ffn_up")
    return w.linear(w.gated(gate, up, c.spec.activation), "ffn_down")


def _rotations(tables: tuple[jax.Array, jax.Array], positions: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Cosines and sines of positions [T], float32 [kinds, T, pairs]."""
    position = jnp.maximum(positions, 0)
    coarse, fine = tables[0][:, position // FINE_POSITIONS], tables[1][:, position % FINE_POSITIONS]
    (a, b), (c, d) = (coarse[:, :, 0], coarse[:, :, 1]), (fine[:, :, 0], fine[:, :, 1])
    return a * c - b * d, b * c + a * d
