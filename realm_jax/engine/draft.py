"""A small model that drafts for a large one: it continues each request as the target would, with the same noise."""

import logging
import statistics
import time
from collections import deque
from collections.abc import Sequence
from functools import partial
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np

from realm_jax.engine.allocator import PageAllocator
from realm_jax.engine.buckets import PREFILL_TOKENS
from realm_jax.engine.request import Request
from realm_jax.engine.sampler import Drawn, DrawRow, Sampler
from realm_jax.errors import CapacityError, InvalidRequestError
from realm_jax.sampling import MAX_DRAFTS
from realm_jax.text import Tokenizer

_log = logging.getLogger(__name__)

# Parts of texts that it has not seen, in one call of `propose`: more would hold up those that are decoding.
_CATCH_UP = 4
# Tokens it may be behind and still draft in this call: each is a row of the first step.
_AT_ONCE = 2


_REMEMBERED = 60.0  # seconds that a measured round counts


class _Follower:
    """What the draft model holds of one request.

    Attributes:
      cached: tokens of the request with keys and values in the draft's cache.
      fed: drafts that were run after those: cached, too, as far as they turn out right.
      counted: tokens of the request that the sampler's penalties know.
    """

    def __init__(self, request: Request, table_size: int):
        self.request = request
        self.pages: list[int] = []
        self.table = np.zeros(table_size, np.int32)
        self.cached = 0
        self.fed: list[int] = []
        self.counted = 0

    @property
    def behind(self) -> int:
        return self.request.length - self.cached

    def catch_up_on_drafts(self) -> None:
        """Keeps what was cached of the last drafts up to the first wrong one; the rest will be written over."""
        for draft in self.fed:
            if self.cached >= self.request.length or self.request.tokens[self.cached] != draft:
                break
            self.cached += 1
        self.fed = []
        # The last token is run again if need be: what follows it is what is wanted.
        self.cached = min(self.cached, self.request.length - 1)


class DraftModel:
    """Proposes tokens for requests of a target model.

    It has a runner with a page pool of its own, and a sampler with the requests' own parameters and seeds: as the noise
    depends on seed and position alone, it draws what the target draws wherever the two models nearly agree. The tokens
    of a round stay on the device until all of it is dispatched, except for requests with penalties.

    """

    def __init__(self, model: Any, runner: Any, vocab_size: int | None = None):
        """
        Args:
          model: the draft model.
          runner: its engine.runner.Runner, for as many requests at once as the target's.
          vocab_size: columns of the target's logits, if they may differ in number from the draft's: the noise depends
            on it.
        """
        self._runner = runner
        self._context = model.config.context_length
        self._vocab = runner.vocab_size if vocab_size is None else vocab_size
        self._sampler = Sampler(runner.max_batch, self._vocab)
        self._bound: dict[int, _Follower] = {}  # slot -> whose parameters the sampler has there
        self._followers: dict[str, _Follower] = {}
        self._took: deque[tuple[float, float]] = deque(maxlen=15)  # when, and seconds of a drafted token
        self.pages = PageAllocator(runner.num_pages)

    @staticmethod
    def check_vocabulary(target: Tokenizer, draft: Tokenizer) -> None:
        """Raises InvalidRequestError unless the ids of both stand for the same tokens.

        One may have more of them than the other if those are padding: control tokens, or ones without a text.
        """
        shared = min(target.vocab_size, draft.vocab_size)
        for token in range(shared):
            mine, yours = target.token_bytes(token), draft.token_bytes(token)
            if mine != yours:
                raise InvalidRequestError(
                    f"the draft model has another vocabulary: token {token} is {yours[:40]!r}, the target's is "
                    f"{mine[:40]!r}; accepted: a model with the target's tokens"
                )
        longer = target if target.vocab_size > shared else draft
        for token in range(shared, longer.vocab_size):
            if longer.token_bytes(token) and not longer.is_special(token):
                raise InvalidRequestError(
                    f"the draft model has {draft.vocab_size} tokens, the target {target.vocab_size}, and token {token} "
                    f"({longer.token_bytes(token)[:40]!r}) is no padding; accepted: a model with the target's tokens"
                )

    @property
    def seconds(self) -> float | None:
        """What one drafted token takes: the median of the last rounds; None if the last minute saw fewer than three.

        Then it is to be measured: what seemed too dear, when the machine was busy, may be worth it now.
        """
        since = time.perf_counter() - _REMEMBERED
        recent = [taken for at, taken in self._took if at >= since]
        return statistics.median(recent) if len(recent) >= 3 else None

    def warm_up(self) -> None:
        """Compiles every program that drafting may need; the sampler's are the target's, if the vocabularies agree."""
        self._runner.warm_up(verify=True)

    def propose(self, wanted: Sequence[tuple[Request, int]]) -> list[list[int]]:
        """Up to so many tokens for each request, each with a slot, to follow those it has.

        Fewer, or none, where it has not caught up with a long text yet, where its cache is full or the context at its
        end. A failure resets it and is raised.
        """
        try:
            return self._propose(wanted)
        except BaseException:
            self.reset()
            raise

    def release(self, request: Request) -> None:
        """Forgets a request; nothing happens if it does not know it."""
        follower = self._followers.pop(request.id, None)
        if follower is not None:
            self.pages.release(follower.pages)
            self._bound = {slot: other for slot, other in self._bound.items() if other is not follower}

    def reset(self) -> None:
        """Forgets all requests, and what is on the device."""
        for follower in list(self._followers.values()):
            self.release(follower.request)
        self._sampler.reset()
        self._runner.reset()

    def _propose(self, wanted: Sequence[tuple[Request, int]]) -> list[list[int]]:
        began, compiled = time.perf_counter(), self._runner.compiled
        proposals: list[list[int]] = [[] for _ in wanted]
        lanes: dict[int, tuple[_Follower, int]] = {}  # by index in `wanted`: who, how many drafts
        for i, (request, k) in enumerate(wanted):
            k = min(k, MAX_DRAFTS, request.limit - request.length - 1, self._context - request.length)
            # The last draft is not run.
            follower = self._follow(request, request.length + k - 1) if k > 0 else None
            if follower is not None:
                follower.catch_up_on_drafts()
                lanes[i] = follower, k
        behind = self._catch_up([follower for follower, _ in lanes.values()])
        lanes = {i: lane for i, lane in lanes.items() if lane[0].behind <= _AT_ONCE}
        for follower, _ in lanes.values():
            self._bind(follower)
        for i, drafts in self._draft(lanes).items():
            proposals[i] = drafts
        total = sum(map(len, proposals))
        if total and not behind and self._runner.compiled == compiled:
            now = time.perf_counter()
            self._took.append((now, (now - began) / total))
        return proposals

    def _follow(self, request: Request, tokens: int) -> _Follower | None:
        """The request's follower, with pages for so many tokens; None if there are none left."""
        follower = self._followers.get(request.id)
        if follower is None:
            follower = self._followers[request.id] = _Follower(request, self._runner.max_pages_per_slot)
        missing = -(-tokens // self._runner.page_size) - len(follower.pages)
        if missing <= 0:
            return follower
        if missing > self.pages.free:
            for other in list(self._followers.values()):
                if other.request.slot is None:  # preempted: it does not need them now
                    self.release(other.request)
        try:
            pages = self.pages.allocate(missing)
        except CapacityError as error:
            _log.debug("no drafts for request %s: %s", request.id, error)
            return None
        follower.table[len(follower.pages) : len(follower.pages) + missing] = pages
        follower.pages += pages
        return follower

    def _catch_up(self, followers: list[_Follower]) -> bool:
        """Runs texts that the draft has not seen, as far as one call may; whether there were any."""
        budget = _CATCH_UP
        share = max(self._runner.chunk, PREFILL_TOKENS // _CATCH_UP)
        while late := [follower for follower in followers if follower.behind > _AT_ONCE][:budget]:
            chunks: list[np.ndarray] = []
            starts = [follower.cached for follower in late]
            for follower in late:
                # All but the last token, cut where the target's own prompts are cut.
                ends = follower.cached // self._runner.chunk * self._runner.chunk + share
                stop = min(ends, follower.request.length - 1)
                chunks.append(follower.request.tokens[follower.cached : stop])
                follower.cached = stop
            self._runner.step(chunks, starts, np.stack([follower.table for follower in late]))
            budget -= len(late)
        return budget < _CATCH_UP

    def _bind(self, follower: _Follower) -> None:
        """Sees to it that the sampler has the request's parameters and history in its slot."""
        request = follower.request
        slot = cast(int, request.slot)
        new = request.tokens[follower.counted : request.length].tolist()
        if self._bound.get(slot) is not follower or len(new) > MAX_DRAFTS:
            self._bound = {at: other for at, other in self._bound.items() if other is not follower}
            self._sampler.bind(request)
            self._bound[slot] = follower
        else:
            self._sampler.accept([(slot, token) for token in new])
        follower.counted = request.length

    def _draft(self, lanes: dict[int, tuple[_Follower, int]]) -> dict[int, list[int]]:
        """Draws the drafts, one step of the model for each of the longest; tokens by key of lanes."""
        drafts: dict[int, list[int]] = {i: [] for i in lanes}
        # Penalties count drafts, which the host must know then; and counting them on the device could not be undone.
        on_device = not any(self._sampler.counts(cast(int, f.request.slot)) for f, _ in lanes.values())
        dispatched = []
        for step in range(max((k for _, k in lanes.values()), default=0)):
            tokens: list[np.ndarray] = []
            starts: list[int] = []
            tables: list[np.ndarray] = []
            source: list[int] = []
            rows: list[DrawRow | None] = []
            owners: list[int | None] = []
            for i, (follower, k) in lanes.items():
                request = follower.request
                if step >= k or (not on_device and len(drafts[i]) < step):
                    continue
                if step == 0:
                    for at in range(follower.cached, request.length - 1):
                        _add(tokens, starts, tables, source, request.tokens[at], at, follower.table, -1)
                        rows.append(None)
                        owners.append(None)
                at = request.length - 1 + step
                token = request.tokens[at] if step == 0 else (0 if on_device else drafts[i][-1])
                slot = cast(int, request.slot) if step and on_device else -1
                _add(tokens, starts, tables, source, token, at, follower.table, slot)
                rows.append(DrawRow(request, at + 1, tuple(drafts[i])))
                owners.append(i)
            if not rows:
                break
            last = self._sampler.last_tokens
            where = np.asarray(source, np.int32)
            logits = self._runner.step(tokens, starts, np.stack(tables), source=where, last_tokens=last)
            if logits.shape[-1] != self._vocab:
                logits = _fitted(logits, self._vocab)
            drawn = self._sampler.dispatch(logits, rows, count=on_device)
            if on_device:
                dispatched.append((owners, drawn))
            else:
                _take(drafts, owners, drawn, step)
        for step, (owners, drawn) in enumerate(dispatched):
            _take(drafts, owners, drawn, step)
        for i, (follower, k) in lanes.items():
            follower.cached = follower.request.length
            follower.fed = drafts[i][: k - 1]
        return drafts


def _add(
    tokens: list[np.ndarray],
    starts: list[int],
    tables: list[np.ndarray],
    source: list[int],
    token: int,
    at: int,
    table: np.ndarray,
    slot: int,
) -> None:
    tokens.append(np.asarray([token], np.int32))
    starts.append(at)
    tables.append(table)
    source.append(slot)


def _take(drafts: dict[int, list[int]], owners: list[int | None], drawn: Drawn, step: int) -> None:
    """Adds each token that was drawn in a step to its owner's drafts; they end where no token could be drawn."""
    for owner, (token, _) in zip(owners, drawn.collect()):
        if owner is not None and token >= 0 and len(drafts[owner]) == step:
            drafts[owner].append(token)


@partial(jax.jit, static_argnames="vocab")
def _fitted(logits: jax.Array, vocab: int) -> jax.Array:
    """float32 [B, vocab]: cut to, or padded with what is never drawn."""
    missing = vocab - logits.shape[-1]
    if missing <= 0:
        return logits[:, :vocab]
    return jnp.pad(logits, ((0, 0), (0, missing)), constant_values=-1e30)
