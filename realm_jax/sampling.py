"""Choosing the next token on the device, for a batch of requests at once.

The order in which a request's parameters act:

1. repetition penalty over the tokens of prompt and output; then frequency and presence penalties over the output;
2. logit bias;
3. the mask of a grammar: what it does not allow has logit -inf from here on;
4. temperature;
5. top_k, typical_p, top_p, min_p, each on what the one before it left, with probabilities renormalised over that;
6. a draw by Gumbel-max: argmax of logits plus noise. Temperature 0 takes the argmax of step 3 instead.

Temperature before truncation is the order of Hugging Face transformers and vLLM; the order of the truncations among
themselves is llama.cpp's. Among tokens of equal logit the lowest id counts as the more likely one, everywhere.

The noise of a request is a counter-based function of (seed, position, token id) and nothing else (Salmon et al., 2011,
"Parallel random numbers: as easy as 1, 2, 3"), so that a seed gives the same tokens alone, in any batch, in any slot,
and when a position is computed again. Nothing here mixes rows, and pallas_kernels.numerics keeps XLA from computing a
row differently beside others: each row's result depends on that row alone. A row that verifies a draft is a row like
any other: its penalties count the drafts before it as if they were output already.

Truncation needs no sort: the smallest best-scored set that reaches a given mass is found by bisecting the bits of the
scores, which costs a fixed number of passes over the vocabulary.
"""

from collections.abc import Callable
from functools import partial

import flax.struct
import jax
import jax.numpy as jnp
from jax import Array

from pallas_kernels.numerics import exp, log, row_sum
from pallas_kernels.row_ops import argmax, top_mask
from realm_jax.sampling_params import MAX_LOGPROBS

# A temperature below this divides logits out of float32's useful range; the draw is the argmax then anyway.
GREEDY_BELOW = 1e-5
# Codes in place of a token: the row's logits are not all finite; its mask allows no token.
BAD_LOGITS = -1
NO_TOKEN = -2
# Most drafts that may precede a row in its batch.
MAX_DRAFTS = 16


@flax.struct.dataclass
class RowParams:
    """What the sampler needs to know of each row of a batch; arrays of [B] (numpy ones will do) unless noted.

    Attributes:
      seed: uint32 [B, 2], the 64-bit seed as (high, low) words.
      position: int32, the index in its sequence of the token to be sampled.
      temperature, top_p, min_p, typical_p: float32.
      top_k: int32.
      repetition, frequency, presence: float32 penalties.
      slot: int32, the row of History that belongs to this request; out of range for padding.
    """

    seed: Array
    position: Array
    temperature: Array
    top_k: Array
    top_p: Array
    min_p: Array
    typical_p: Array
    repetition: Array
    frequency: Array
    presence: Array
    slot: Array


@flax.struct.dataclass
class History:
    """What penalties and bias depend on, kept on the device; one row per slot of the batch.

    Attributes:
      in_prompt: bool [slots, vocab], tokens that occur in the prompt.
      count: int32 [slots, vocab], occurrences in the output so far.
      bias: float32 [slots, vocab].
    """

    in_prompt: Array
    count: Array
    bias: Array

    @classmethod
    def empty(cls, slots: int, vocab: int) -> "History":
        shape = (slots, vocab)
        return cls(jnp.zeros(shape, bool), jnp.zeros(shape, jnp.int32), jnp.zeros(shape, jnp.float32))


@partial(jax.jit, donate_argnums=0)
def write_history(history: History, slot: Array, in_prompt: Array, count: Array, bias: Array) -> History:
    """Replaces the row of one slot (int32 scalar) by the given rows of [vocab]."""
    return History(
        history.in_prompt.at[slot].set(in_prompt),
        history.count.at[slot].set(count),
        history.bias.at[slot].set(bias),
    )


@jax.jit
def sample_greedy(logits: Array) -> Array:
    """int32 [B] from float32 [B, vocab]: the most likely token, BAD_LOGITS for a row that is not finite."""
    tokens, finite = argmax(logits)
    return jnp.where(finite, tokens, BAD_LOGITS)


@jax.jit
def sample_greedy_masked(logits: Array, masks: Array) -> Array:
    """As `sample_greedy`, among the tokens that masks uint32 [B, mask_words(vocab)] allow; NO_TOKEN where none is."""
    allowed = unpack_masks(masks, logits.shape[-1])
    tokens = argmax(jnp.where(allowed, logits, -jnp.inf))[0]
    return _checked(logits, tokens, allowed)


@partial(jax.jit, static_argnames="truncate")
def sample(logits: Array, rows: RowParams, truncate: bool) -> Array:
    """int32 [B] from float32 [B, vocab]: one draw per row, BAD_LOGITS for a row that is not finite.

    With `truncate` false, top_k, top_p, min_p and typical_p must be off in every row; the tokens are the same.
    """
    return _checked(logits, _draw(logits, rows, truncate))


@partial(jax.jit, donate_argnums=2)
def sample_shaped(
    logits: Array, rows: RowParams, history: History, drafts: Array, masks: Array, count: Array
) -> tuple[Array, History]:
    """As `sample`, with penalties, bias and masks.

    Args:
      drafts: int32 [B, MAX_DRAFTS], tokens that precede the row and are not in `history`; -1 is none.
      masks: uint32 [B, mask_words(vocab)]; NO_TOKEN for a row whose mask allows no token.
      count: bool scalar: count the sampled tokens in the rows of `history` that were used.
    """
    allowed = unpack_masks(masks, logits.shape[-1])
    x = jnp.where(allowed, _penalized(logits, rows, history, drafts), -jnp.inf)
    tokens = _checked(logits, _draw(x, rows, truncate=True), allowed)
    return tokens, _counted(history, rows.slot, jnp.where(count, tokens, -1))


@partial(jax.jit, donate_argnums=0)
def count_tokens(history: History, slots: Array, tokens: Array) -> History:
    """Counts tokens int32 [N] as output of slots int32 [N]; a negative token or a slot out of range is none."""
    return _counted(history, slots, tokens)


@jax.jit
def write_last(last: Array, slots: Array, tokens: Array) -> Array:
    """int32 [slots + 1] with last[slots[i]] = tokens[i], or 0 for a code, as only tokens can be embedded."""
    return last.at[slots].set(jnp.maximum(tokens, 0))


def mask_words(vocab: int) -> int:
    """uint32 words of a mask: token i is allowed where bit i % 32 of word i // 32 is set."""
    return -(-vocab // 32)


def unpack_masks(masks: Array, vocab: int) -> Array:
    """bool [B, vocab] from uint32 [B, mask_words(vocab)]."""
    bits = (masks[:, :, None] >> jnp.arange(32, dtype=jnp.uint32)) & 1
    return bits.reshape(masks.shape[0], -1)[:, :vocab].astype(bool)


@jax.jit
def token_logprobs(logits: Array, tokens: Array) -> tuple[Array, Array, Array]:
    """Log probabilities under softmax(logits) of the chosen tokens and of the most likely ones.

    Args: logits float32 [B, vocab]; tokens int32 [B].
    Returns: chosen float32 [B]; ids int32 and values float32 [B, min(20, vocab)], best first.
    """
    best = jnp.max(logits, axis=-1)
    total = best + log(row_sum(exp(logits - best[:, None])))[:, 0]
    chosen = jnp.take_along_axis(logits, jnp.maximum(tokens, 0)[:, None], axis=-1)[:, 0]
    values, ids = jax.lax.top_k(logits, min(MAX_LOGPROBS, logits.shape[-1]))
    return chosen - total, ids, values - total[:, None]


def _checked(logits: Array, tokens: Array, allowed: Array | None = None) -> Array:
    if allowed is not None:
        tokens = jnp.where(jnp.any(allowed, axis=-1), tokens, NO_TOKEN)
    return jnp.where(jnp.all(jnp.isfinite(logits), axis=-1), tokens, BAD_LOGITS)


def _counted(history: History, slots: Array, tokens: Array) -> History:
    # A negative index would count from the end; past the end it is dropped.
    counted = jnp.where(tokens < 0, history.count.shape[-1], tokens)
    count = history.count.at[slots, counted].add(1, mode="drop")
    return History(history.in_prompt, count, history.bias)


def _penalized(logits: Array, rows: RowParams, history: History, drafts: Array) -> Array:
    slot, vocab = rows.slot, logits.shape[-1]
    in_prompt = history.in_prompt.at[slot].get(mode="clip")  # [B, vocab]
    count = history.count.at[slot].get(mode="clip")
    row = jnp.arange(logits.shape[0])[:, None]
    count = count.at[row, jnp.where(drafts < 0, vocab, drafts)].add(1, mode="drop")
    bias = history.bias.at[slot].get(mode="clip")
    occurred = count > 0
    repetition = rows.repetition[:, None]
    scaled = jnp.where(logits > 0, logits / repetition, logits * repetition)
    x = jnp.where(in_prompt | occurred, scaled, logits)
    x = x - rows.frequency[:, None] * count - jnp.where(occurred, rows.presence[:, None], 0.0)
    return x + bias


def _draw(x: Array, rows: RowParams, truncate: bool) -> Array:
    greedy = rows.temperature < GREEDY_BELOW
    temperature = jnp.where(greedy, 1.0, rows.temperature)[:, None]
    # From the maximum, so that a small temperature can only underflow: the best tokens stay finite.
    z = (x - jnp.max(x, axis=-1, keepdims=True)) / temperature
    noise = gumbel_noise(rows.seed, rows.position, x.shape[-1])
    scores = jnp.where(truncated(z, rows), z, -jnp.inf) if truncate else z
    # XLA's, which becomes one with the passes before it.
    chosen, drawn = argmax(x, backend="xla")[0], argmax(scores + noise, backend="xla")[0]
    return jnp.where(greedy, chosen, drawn)


def truncated(z: Array, rows: RowParams) -> Array:
    """bool [B, vocab]: the tokens that top_k, typical_p, top_p and min_p leave, given logits after temperature."""
    everything = jnp.ones(z.shape, bool)
    possible = z > -jnp.inf  # not masked, nor divided out of float32's range

    def where_used(used: Array, kept: Callable[[], Array]) -> Array:
        # A truncation that no row uses is skipped on the device: each costs some fifty passes over the vocabulary.
        return jax.lax.cond(jnp.any(used), lambda: ~used[:, None] | kept(), lambda: everything)

    kept = possible & where_used(rows.top_k > 0, lambda: top_mask(z, jnp.ones_like(z), rows.top_k.astype(jnp.float32)))

    def typical() -> Array:
        weight = jnp.where(kept, exp(z), 0.0)  # unnormalised probabilities
        total = row_sum(weight)
        surprise = log(total) - z
        entropy = row_sum(weight * jnp.where(kept, surprise, 0.0)) / total
        nearness = jnp.where(kept, -jnp.abs(surprise - entropy), -jnp.inf)
        return top_mask(nearness, weight, rows.typical_p * total[:, 0])

    kept &= where_used(rows.typical_p < 1.0, typical)

    def nucleus() -> Array:
        weight = jnp.where(kept, exp(z), 0.0)
        return top_mask(jnp.where(kept, z, -jnp.inf), weight, rows.top_p * row_sum(weight)[:, 0])

    kept &= where_used(rows.top_p < 1.0, nucleus)

    best = jnp.max(jnp.where(kept, z, -jnp.inf), axis=-1, keepdims=True)
    floor = jnp.where(rows.min_p > 0.0, log(rows.min_p), -jnp.inf)
    return kept & (z >= best + floor[:, None])


def gumbel_noise(seed: Array, position: Array, vocab: int) -> Array:
    """Standard Gumbel noise float32 [B, vocab] that depends on (seed, position, token id) alone.

    seed uint32 [B, 2], position int32 [B]. Threefry2x32 with 20 rounds, keyed by the seed, counts (position, token id);
    each block gives the noise of two tokens. 32 bits resolve the upper tail, where the draw is decided, up to 22.9.
    """
    half = (vocab + 1) // 2
    counter = jnp.arange(half, dtype=jnp.uint32)[None]
    position = position.astype(jnp.uint32)[:, None]
    low, high = threefry2x32(seed[:, :1], seed[:, 1:], position, counter)
    bits = jnp.concatenate([low, high], axis=-1)[:, :vocab]
    tail = jnp.minimum((bits.astype(jnp.float32) + 0.5) * 2.0**-32, 1.0 - 2.0**-24)  # uniform in (0, 1)
    rest = 1.0 - tail
    # -log1p(-tail): what rounding took from the logarithm's argument is put back by the quotient.
    surprise = jnp.where(rest == 1.0, tail, -log(rest) * (tail / jnp.where(rest == 1.0, 1.0, 1.0 - rest)))
    return -log(surprise)


def threefry2x32(key0: Array, key1: Array, x0: Array, x1: Array) -> tuple[Array, Array]:
    """The Threefry2x32 block function with 20 rounds (Salmon et al., 2011); uint32 arrays that broadcast together."""
    keys = (key0, key1, key0 ^ key1 ^ jnp.uint32(0x1BD11BDA))
    rotations = ((13, 15, 26, 6), (17, 29, 16, 24))
    x0, x1 = x0 + key0, x1 + key1
    for group in range(5):
        for r in rotations[group % 2]:
            x0 = x0 + x1
            x1 = ((x1 << r) | (x1 >> (32 - r))) ^ x0
        x0 = x0 + keys[(group + 1) % 3]
        x1 = x1 + keys[(group + 2) % 3] + jnp.uint32(group + 1)
    return x0, x1
