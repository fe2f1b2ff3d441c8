"""The host's side of sampling: parameters of the running requests by slot, and which compiled program a batch needs."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

import jax
import jax.numpy as jnp
import numpy as np

from realm_jax import sampling
from realm_jax.engine.request import Request
from realm_jax.results import TokenLogprob
from realm_jax.sampling import GREEDY_BELOW, MAX_DRAFTS, History, RowParams
from realm_jax.sampling_params import SamplingParams

_NEUTRAL = SamplingParams()


@dataclass(frozen=True)
class DrawRow:
    """One row of logits that a token is drawn from.

    Attributes:
      request: whose token; it has a slot.
      position: index in its sequence of the token drawn.
      drafts: proposed tokens at positions position - len(drafts) .. position - 1, which the request does not have yet;
        at most MAX_DRAFTS.
      mask: uint32 [mask_words(vocab)], the tokens allowed (realm_jax.sampling.unpack_masks); None: all of them.
    """

    request: Request
    position: int
    drafts: tuple[int, ...] = ()
    mask: np.ndarray | None = None


class Drawn:
    """Tokens on their way from the device. tokens: int32 [rows bucket], still being computed perhaps."""

    def __init__(self, tokens: jax.Array, logprobs: tuple[jax.Array, ...] | None, rows: Sequence[DrawRow | None]):
        self.tokens = tokens
        self._logprobs = logprobs
        self._wanted = [None if row is None else row.request.params.logprobs for row in rows]

    def collect(self) -> list[tuple[int, TokenLogprob | None]]:
        """Waits for the device: of each row its token, or BAD_LOGITS or NO_TOKEN, and its log probability if wanted.

        What stands where a row was None means nothing.
        """
        tokens = np.asarray(self.tokens)[: len(self._wanted)].tolist()
        entries: list[TokenLogprob | None] = [None] * len(tokens)
        if self._logprobs is not None:
            chosen, ids, values = map(np.asarray, self._logprobs)
            for i, wanted in enumerate(self._wanted):
                if wanted is not None:
                    top = tuple(zip(ids[i, :wanted].tolist(), values[i, :wanted].tolist()))
                    entries[i] = TokenLogprob(tokens[i], float(chosen[i]), top)
        return list(zip(tokens, entries))


class Sampler:
    """Draws tokens for batches of rows that belong to slots.

    Five programs per batch size: greedy, greedy under masks, plain temperature, with truncation, and the one that can
    do everything, for penalties, bias, and masks at a temperature. A batch runs the least of them that serves all of
    its rows, and a row gets the same token from each that serves it. A sixth reports log probabilities.

    Attributes:
      last_tokens: int32 [slots + 1] on the device, of each slot the token that the last counting dispatch drew for it.
    """

    def __init__(self, slots: int, vocab_size: int):
        self._slots = slots
        self._vocab = vocab_size
        # One row more than slots: what padding and rows that draw nothing are given.
        self._params = _allocate(slots + 1)
        self._shaped = np.zeros(slots + 1, bool)
        self._truncates = np.zeros(slots + 1, bool)
        for slot in range(slots + 1):
            self._write_params(slot, _NEUTRAL, 0)
        self._history: History | None = None  # made when the first request needs it
        self.reset()

    def reset(self) -> None:
        """Forgets the device's state, which a failed call may have consumed; no slot may be in use."""
        self._history = None
        self.last_tokens = jnp.zeros(self._slots + 1, jnp.int32)

    def bind(self, request: Request) -> None:
        """Gives a slot's parameters and history to the request that now runs in it, with what it has generated."""
        slot, params = cast(int, request.slot), request.params
        self._write_params(slot, params, request.seed)
        if self._shaped[slot] and self._history is None:
            self._history = History.empty(self._slots, self._vocab)
        if self._history is not None:
            # Even for a request without penalties: the bias of the slot's last request must not stay.
            in_prompt = np.zeros(self._vocab, bool)
            in_prompt[request.tokens[: request.prompt_length]] = True
            output = request.tokens[request.prompt_length : request.length]
            count = np.bincount(output, minlength=self._vocab).astype(np.int32)
            bias = np.zeros(self._vocab, np.float32)
            for token, value in (params.logit_bias or {}).items():
                bias[token] = value
            history, self._history = self._history, None  # donated: lost if the call fails
            self._history = sampling.write_history(history, np.int32(slot), in_prompt, count, bias)

    def counts(self, slot: int) -> bool:
        """Whether what the slot's request draws depends on a history of its tokens."""
        return bool(self._shaped[slot])

    def dispatch(self, logits: jax.Array, rows: Sequence[DrawRow | None], count: bool) -> Drawn:
        """Starts drawing a token for each row from its row of logits float32 [at least len(rows), vocab].

        Waits for nothing. None in place of a row: its token means nothing.

        Args:
          count: the tokens drawn become output: penalties count them, `last_tokens` has them. Without it nothing is
            remembered, and `accept` counts what was accepted. A slot has at most one row in a counting dispatch.
        """
        slots = np.full(logits.shape[0], self._slots, np.int32)
        for i, row in enumerate(rows):
            if row is not None:
                slots[i] = cast(int, row.request.slot)
        tokens = self._run(logits, slots, rows, count)
        if count:
            self.last_tokens = sampling.write_last(self.last_tokens, slots, tokens)
        logprobs = None
        if any(row is not None and row.request.params.logprobs is not None for row in rows):
            logprobs = sampling.token_logprobs(logits, tokens)
        return Drawn(tokens, logprobs, rows)

    def accept(self, slots_and_tokens: Sequence[tuple[int, int]]) -> None:
        """Counts tokens that became output after a dispatch without `count`; at most MAX_DRAFTS + 1 per slot."""
        counted = [(slot, token) for slot, token in slots_and_tokens if self._shaped[slot]]
        if not counted:
            return
        # Of one size, so that there is one program.
        slots = np.full(self._slots * (MAX_DRAFTS + 1), self._slots, np.int32)
        tokens = np.full(len(slots), -1, np.int32)
        slots[: len(counted)], tokens[: len(counted)] = zip(*counted)
        history, self._history = self._taken_history(), None
        self._history = sampling.count_tokens(history, slots, tokens)

    def _run(self, logits: jax.Array, slots: np.ndarray, rows: Sequence[DrawRow | None], count: bool) -> jax.Array:
        masked = any(row is not None and row.mask is not None for row in rows)
        shaped, truncates = self._shaped[slots].any(), self._truncates[slots].any()
        if not shaped and (self._params["temperature"][slots] < GREEDY_BELOW).all():
            if masked:
                return sampling.sample_greedy_masked(logits, self._masks(len(slots), rows))
            return sampling.sample_greedy(logits)
        position = np.zeros(len(slots), np.int32)
        for i, row in enumerate(rows):
            if row is not None:
                position[i] = row.position
        picked = {name: values[slots] for name, values in self._params.items()}
        params = RowParams(position=position, slot=slots, **picked)  # type: ignore[arg-type]
        if not shaped and not masked:
            return sampling.sample(logits, params, truncate=bool(truncates))
        if self._history is None and not shaped:  # a mask alone: no row of it is read, nor need be right
            self._history = History.empty(self._slots, self._vocab)
        drafts = np.full((len(slots), MAX_DRAFTS), -1, np.int32)
        for i, row in enumerate(rows):
            if row is not None:
                drafts[i, : len(row.drafts)] = row.drafts
        masks = self._masks(len(slots), rows)
        history, self._history = self._taken_history(), None  # donated: lost if the call fails
        tokens, self._history = sampling.sample_shaped(logits, params, history, drafts, masks, np.bool_(count))
        return tokens

    def _masks(self, size: int, rows: Sequence[DrawRow | None]) -> np.ndarray:
        masks = np.full((size, sampling.mask_words(self._vocab)), 0xFFFFFFFF, np.uint32)
        for i, row in enumerate(rows):
            if row is not None and row.mask is not None:
                masks[i] = row.mask
        return masks

    def _taken_history(self) -> History:
        if self._history is None:  # without it penalties would silently not act
            raise RuntimeError("the sampler's history was lost in a failed call; reset it and bind its requests again")
        return self._history

    def _write_params(self, slot: int, params: SamplingParams, seed: int) -> None:
        row = self._params
        row["seed"][slot] = seed >> 32, seed & 0xFFFFFFFF
        row["temperature"][slot] = min(params.temperature, 1e30)  # what float32 holds
        row["top_k"][slot] = min(params.top_k, self._vocab)
        row["top_p"][slot] = params.top_p
        row["min_p"][slot] = params.min_p
        row["typical_p"][slot] = params.typical_p
        row["repetition"][slot] = np.clip(params.repetition_penalty, 1e-30, 1e30)
        row["frequency"][slot] = params.frequency_penalty
        row["presence"][slot] = params.presence_penalty
        self._truncates[slot] = params.top_k > 0 or params.min_p > 0 or min(params.top_p, params.typical_p) < 1
        self._shaped[slot] = (
            bool(params.logit_bias)
            or params.repetition_penalty != 1
            or params.frequency_penalty != 0
            or params.presence_penalty != 0
        )


def _allocate(rows: int) -> dict[str, np.ndarray]:
    arrays = {"seed": np.zeros((rows, 2), np.uint32), "top_k": np.zeros(rows, np.int32)}
    for name in ("temperature", "top_p", "min_p", "typical_p", "repetition", "frequency", "presence"):
        arrays[name] = np.zeros(rows, np.float32)
    return arrays
