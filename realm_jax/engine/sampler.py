"""The host's side of sampling: parameters of the running requests by slot, and which compiled program a batch needs."""

from collections.abc import Sequence
from typing import cast

import jax
import numpy as np

from realm_jax import sampling
from realm_jax.engine.request import Request
from realm_jax.results import TokenLogprob
from realm_jax.sampling import GREEDY_BELOW, History, RowParams
from realm_jax.sampling_params import SamplingParams

_NEUTRAL = SamplingParams()


class Sampler:
    """Draws tokens for batches of rows that belong to slots.

    Four programs per batch size: greedy, plain temperature, with truncation, with penalties or bias; a batch runs the
    least of them that serves all of its rows, and a row gets the same token from each that serves it. A fifth reports
    log probabilities.
    """

    def __init__(self, slots: int, vocab_size: int):
        self._slots = slots
        self._vocab = vocab_size
        self._history: History | None = None  # made when the first request needs it
        # One row more than slots: what padding and rows that draw nothing are given.
        self._params = _allocate(slots + 1)
        self._shaped = np.zeros(slots + 1, bool)
        self._truncates = np.zeros(slots + 1, bool)
        for slot in range(slots + 1):
            self._write_params(slot, _NEUTRAL, 0)

    def bind(self, request: Request) -> None:
        """Gives a slot's parameters and history to the request that now runs in it."""
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
            self._history = sampling.write_history(self._history, np.int32(slot), in_prompt, count, bias)

    def draw(self, logits: jax.Array, requests: Sequence[Request | None]) -> list[tuple[int, TokenLogprob | None]]:
        """A token for each request, from its row of logits float32 [at least len(requests), vocab].

        None in place of a request: its row draws nothing and its token here means nothing. BAD_LOGITS where a row is
        not finite.
        """
        slots = np.full(logits.shape[0], self._slots, np.int32)
        for i, request in enumerate(requests):
            if request is not None:
                slots[i] = cast(int, request.slot)
        drawn = self._run(logits, slots, requests)
        entries: list[TokenLogprob | None] = [None] * len(requests)
        if any(r is not None and r.params.logprobs is not None for r in requests):
            entries = self._logprobs(logits, drawn, requests)
        return list(zip(np.asarray(drawn).tolist(), entries))

    def reset(self) -> None:
        """Forgets the device's state, which a failed call may have consumed; no slot may be in use."""
        self._history = None

    def _run(self, logits: jax.Array, slots: np.ndarray, requests: Sequence[Request | None]) -> jax.Array:
        shaped, truncates = self._shaped[slots].any(), self._truncates[slots].any()
        if not shaped and (self._params["temperature"][slots] < GREEDY_BELOW).all():
            return sampling.sample_greedy(logits)
        position = np.zeros(len(slots), np.int32)
        for i, request in enumerate(requests):
            if request is not None:
                position[i] = request.length
        picked = {name: values[slots] for name, values in self._params.items()}
        rows = RowParams(position=position, slot=slots, **picked)  # type: ignore[arg-type]
        history, self._history = self._history, None  # donated where it is used: lost if the call fails
        if not shaped or history is None:
            self._history = history
            return sampling.sample(logits, rows, truncate=bool(truncates))
        tokens, self._history = sampling.sample_penalized(logits, rows, history)
        return tokens

    def _logprobs(
        self, logits: jax.Array, drawn: jax.Array, requests: Sequence[Request | None]
    ) -> list[TokenLogprob | None]:
        tokens, chosen, ids, values = map(np.asarray, (drawn, *sampling.token_logprobs(logits, drawn)))
        entries: list[TokenLogprob | None] = []
        for i, request in enumerate(requests):
            wanted = None if request is None else request.params.logprobs
            if wanted is None:
                entries.append(None)
            else:
                top = tuple(zip(ids[i, :wanted].tolist(), values[i, :wanted].tolist()))
                entries.append(TokenLogprob(int(tokens[i]), float(chosen[i]), top))
        return entries

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
