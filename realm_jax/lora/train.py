"""Training a small adapter: gradients with respect to A and B alone, through the packed weights of the base."""

import hashlib
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from realm_jax.checkpoint.manifest import TRAINING, is_checkpoint
from realm_jax.errors import InvalidRequestError
from realm_jax.lora.adapter import Adapter, Pair, Place, name_of, weight_shapes
from realm_jax.model.adapters import RowAdapters
from realm_jax.model.decoder import logits, run_layers
from realm_jax.model.params import Model

Matrices = dict[str, tuple[jax.Array, jax.Array]]  # by role: a float32 [L, 1, R, K], b [L, 1, N, R]
State = tuple[Matrices, Matrices, Matrices]  # the matrices, and Adam's means and squares of their gradients

_PARTS = ("values", "means", "squares")  # of a State


@dataclass(frozen=True)
class Example:
    """Token ids, of which those from index `answer` on are learned."""

    tokens: tuple[int, ...]
    answer: int


def train(
    model: Model,
    examples: Sequence[Example],
    *,
    roles: Sequence[str] = ("attn_q.weight", "attn_v.weight"),
    rank: int = 4,
    alpha: float = 8.0,
    steps: int = 200,
    batch: int = 4,
    learning_rate: float = 2e-3,
    seed: int = 0,
    state: str | os.PathLike[str] | None = None,
    save_every: int = 20,
    progress: Callable[[int, float], None] | None = None,
) -> tuple[Adapter, list[float]]:
    """Trains an adapter by Adam (arXiv:1412.6980), the learning rate falling to a tenth along a cosine.

    Args:
        model: the base, loaded for backend "xla": its weights stay packed and as they are.
        examples: drawn at random in every order, `batch` a step.
        roles: matrices of the layers to adapt; every layer has them.
        rank, alpha: of the adapter. steps, batch, learning_rate, seed: of the training.
        state: a folder that the training is saved to every `save_every` steps and at its end; one that is found there
            goes on where it was saved, and ends with the same bits as if it had not been interrupted.
        progress: called after each step with its number, from 1, and its loss.

    Returns:
        The adapter, float16, and the mean negative log-likelihood of the learned tokens at each step, in nats.

    Raises:
        InvalidRequestError: no examples, one with nothing to learn, a role that not every layer has, or the training
            in `state` is another one.
        CheckpointError: what is in `state` is damaged or no training, or it cannot be written.
    """
    for example in examples:
        if not 1 <= example.answer < len(example.tokens):
            raise InvalidRequestError(
                f"an example of {len(example.tokens)} tokens has its answer at {example.answer}; from 1 to the last "
                "token is accepted"
            )
    if save_every < 1:
        raise InvalidRequestError(f"save_every is {save_every}; at least 1 is accepted")
    if not examples:
        raise InvalidRequestError("there are no examples; at least one is accepted")
    matrices = _initial(model, roles, rank, seed)
    length = max(len(example.tokens) for example in examples)
    tokens = np.zeros((len(examples), length), np.int32)
    learned = np.zeros((len(examples), length), np.float32)
    for i, example in enumerate(examples):
        tokens[i, : len(example.tokens)] = example.tokens
        learned[i, example.answer : len(example.tokens)] = 1

    step = jax.jit(partial(_step, scale=alpha / rank), donate_argnums=0)
    zeros = jax.tree.map(jnp.zeros_like, matrices)
    at: State = (matrices, zeros, jax.tree.map(jnp.zeros_like, matrices))
    settings = {
        "architecture": model.config.architecture,
        "roles": list(roles),
        "rank": rank,
        "alpha": alpha,
        "steps": steps,
        "batch": batch,
        "learning_rate": learning_rate,
        "seed": seed,
        "examples": hashlib.sha256(tokens.tobytes() + learned.tobytes()).hexdigest(),
    }
    losses: list[float] = []
    if state is not None:
        from realm_jax.checkpoint import save_state  # imports Orbax, which takes a second or two
    if state is not None and is_checkpoint(Path(state)):
        at, losses = _resumed(state, at, settings)
    rng = np.random.default_rng(seed)
    order: list[int] = []
    for number in range(1, steps + 1):
        while len(order) < batch:
            order.extend(rng.permutation(len(examples)))
        chosen, order = order[:batch], order[batch:]
        if number <= len(losses):  # before it was saved
            continue
        rate = learning_rate * (0.55 + 0.45 * np.cos(np.pi * (number - 1) / steps))
        at, loss = step(at, model, tokens[chosen], learned[chosen], np.float32(number), np.float32(rate))
        losses.append(float(loss))
        if progress is not None:
            progress(number, losses[-1])
        if state is not None and (number % save_every == 0 or number == steps):
            save_state(state, TRAINING, _named(at), {"settings": settings, "losses": losses}, force=True)
    return _adapter(model, at[0], alpha / rank), losses


def _named(state: State) -> dict[str, jax.Array]:
    """The arrays of a training by name."""
    return {
        f"{which}.{role}.{half}": array
        for which, matrices in zip(_PARTS, state)
        for role, pair in matrices.items()
        for half, array in zip("ab", pair)
    }


def _resumed(folder: str | os.PathLike[str], fresh: State, settings: dict[str, Any]) -> tuple[State, list[float]]:
    """The training saved in a folder, and its losses so far."""
    from realm_jax.checkpoint import load_state

    arrays, facts = load_state(folder, TRAINING)
    saved, losses = facts.get("settings"), facts.get("losses")
    if (
        not isinstance(saved, dict)
        or not isinstance(losses, list)
        or not all(isinstance(loss, float) for loss in losses)
        or len(losses) > settings["steps"]
    ):
        raise InvalidRequestError(
            f"the training in {folder} does not say how far it is; accepted: one that train saved"
        )
    for name, value in settings.items():
        if saved.get(name) != value:
            raise InvalidRequestError(
                f"the training in {folder} has {name} {str(saved.get(name))[:60]}, and {str(value)[:60]} was asked "
                "for; accepted: the same settings, or another folder"
            )
    wanted = {name: (array.shape, array.dtype) for name, array in _named(fresh).items()}
    if {name: (array.shape, array.dtype) for name, array in arrays.items()} != wanted:
        raise InvalidRequestError(f"the training in {folder} is of matrices of another model's shapes")

    def restored(which: str, matrices: Matrices) -> Matrices:
        halves = {role: (arrays[f"{which}.{role}.a"], arrays[f"{which}.{role}.b"]) for role in matrices}
        return {role: (jnp.array(a), jnp.array(b)) for role, (a, b) in halves.items()}

    values, means, squares = (restored(which, matrices) for which, matrices in zip(_PARTS, fresh))
    return (values, means, squares), losses


def scores_of(model: Model, tokens: jax.Array, lora: RowAdapters | None = None) -> jax.Array:
    """Logits float32 [T, vocab] of one sequence int32 [T], without a cache; differentiable in the adapters."""
    positions = jnp.arange(len(tokens), dtype=jnp.int32)
    mix = partial(_attend, positions=positions)
    params, config = model.params, model.config
    hidden, _ = run_layers(params, config, model.plan, tokens, positions, (), mix, lora=lora, backend=model.backend)
    return logits(params, config, hidden, lora=lora, backend=model.backend)


def loss_of(model: Model, matrices: Matrices, scale: float, tokens: jax.Array, learned: jax.Array) -> jax.Array:
    """Mean negative log-likelihood, in nats, of the tokens int32 [B, T] where learned float32 [B, T] is 1."""
    lora = RowAdapters(
        {role: (a, b, jnp.full(1, scale, jnp.float32)) for role, (a, b) in matrices.items()}, jnp.int32(0)
    )
    scores = jax.vmap(lambda tokens: scores_of(model, tokens, lora))(tokens)[:, :-1]
    chosen = jnp.take_along_axis(jax.nn.log_softmax(scores), tokens[:, 1:, None], axis=-1)[..., 0]
    return -(chosen * learned[:, 1:]).sum() / learned[:, 1:].sum()


def _step(
    state: State,
    model: Model,
    tokens: jax.Array,
    learned: jax.Array,
    number: jax.Array,
    rate: jax.Array,
    *,
    scale: float,
) -> tuple[State, jax.Array]:
    matrices, means, squares = state
    loss, gradients = jax.value_and_grad(lambda m: loss_of(model, m, scale, tokens, learned))(matrices)
    means = jax.tree.map(lambda m, g: 0.9 * m + 0.1 * g, means, gradients)
    squares = jax.tree.map(lambda s, g: 0.99 * s + 0.01 * g * g, squares, gradients)

    def moved(x: jax.Array, mean: jax.Array, square: jax.Array) -> jax.Array:
        return x - rate * (mean / (1 - 0.9**number)) / (jnp.sqrt(square / (1 - 0.99**number)) + 1e-8)

    return (jax.tree.map(moved, matrices, means, squares), means, squares), loss


def _attend(
    q: jax.Array,
    keys: jax.Array,
    values: jax.Array,
    pool: Any,
    *,
    positions: jax.Array,
    layer: jax.Array,
    window: jax.Array,
    scale: float,
    softcap: float = 0.0,
    sinks: jax.Array | None = None,
    value_dim: int,
) -> tuple[jax.Array, Any]:
    """As model.attention.attend, over the sequence's own rows alone, in differentiable terms."""
    tokens, heads, _ = q.shape
    if not values.shape[-1]:
        values = keys[..., :value_dim]
    q = q.reshape(tokens, keys.shape[1], heads // keys.shape[1], -1) * scale
    scores = jnp.einsum("tkgd,skd->kgts", q, keys, precision=lax.Precision.HIGHEST)
    if softcap:
        scores = softcap * jnp.tanh(scores / softcap)
    distance = positions[:, None] - positions
    scores = jnp.where((distance >= 0) & ((distance < window) | (window == 0)), scores, -jnp.inf)
    if sinks is not None:
        sink = jnp.broadcast_to(sinks.reshape(keys.shape[1], -1, 1, 1), (*scores.shape[:-1], 1))
        scores = jnp.concatenate([scores, sink], axis=-1)
    weights = jax.nn.softmax(scores)[..., :tokens]
    mixed = jnp.einsum("kgts,skd->tkgd", weights, values, precision=lax.Precision.HIGHEST)
    return mixed.reshape(tokens, heads, -1), pool


def _initial(model: Model, roles: Sequence[str], rank: int, seed: int) -> Matrices:
    """A at random, B zero: at first nothing is added."""
    shapes, layers = weight_shapes(model), model.config.num_layers
    rng = np.random.default_rng(seed)
    matrices = {}
    for role in roles:
        if any(len(shapes.get((role, layer), ())) != 2 for layer in range(layers)):
            held = sorted({r for r, layer in shapes if layer is not None and len(shapes[r, layer]) == 2})
            raise InvalidRequestError(f"not every layer has a matrix {role!r}; there are: {', '.join(held)}")
        n, k = shapes[role, 0]
        a = rng.standard_normal((layers, 1, rank, k)) * k**-0.5
        matrices[role] = (jnp.asarray(a, jnp.float32), jnp.zeros((layers, 1, n, rank), jnp.float32))
    return matrices


def _adapter(model: Model, matrices: Matrices, scale: float) -> Adapter:
    pairs: dict[Place, Pair] = {
        (role, layer): Pair(np.asarray(a[layer, 0], np.float16), np.asarray(b[layer, 0], np.float16), scale)
        for role, (a, b) in matrices.items()
        for layer in range(model.config.num_layers)
    }
    ordered = dict(sorted(pairs.items(), key=lambda item: name_of(item[0])))
    return Adapter(model.config.architecture, MappingProxyType(ordered))
