"""One request inside the engine: its sequence, its sampling parameters, and the pieces of output it has produced."""

import hashlib
import time
from collections import deque
from collections.abc import Callable, Iterable
from collections.abc import Sequence as SequenceOf
from typing import TYPE_CHECKING

import numpy as np

from realm_jax.engine.prefix import first_key
from realm_jax.engine.sequence import Sequence
from realm_jax.engine.speculator import RequestSpeculation
from realm_jax.engine.stop_text import StopText
from realm_jax.engine.tenants import DEFAULT_TENANT
from realm_jax.errors import InvalidRequestError
from realm_jax.lora import Resident
from realm_jax.results import FinishReason, Piece, Result, Timing, TokenLogprob, Usage
from realm_jax.sampling_params import SamplingParams, shown
from realm_jax.text import StreamDetokenizer, Tokenizer

if TYPE_CHECKING:
    from realm_jax.structured import GrammarState


class Request(Sequence):
    """Host state of one completion.

    Attributes:
      params, seed: how to sample; the seed is settled here even where the user left it open.
      pieces: output that its consumer has not taken yet.
      finish_reason: None while it goes on.
      error: what ended it, when something failed; it has no finish reason then.
      adapter_name, adapter_scale: of the adapter it wants; None: the model as it is.
      adapter: the adapter, held from submission to the end.
      speculation: None: no drafts.
      grammar: None: any token may come.
      expires: time.perf_counter() of its deadline; None: it has none.
      notify: called with it after each step that brought it something, and at its end.
    """

    def __init__(
        self,
        prompt: np.ndarray,
        params: SamplingParams,
        *,
        seed: int,
        tokenizer: Tokenizer,
        context_length: int,
        tenant: str = DEFAULT_TENANT,
        priority: int = 0,
        cache: bool = True,
        adapter: str | None = None,
        adapter_scale: float = 1.0,
        speculation: RequestSpeculation | None = None,
        grammar: "GrammarState | None" = None,
        deadline: float | None = None,
    ):
        """
        Args:
          prompt: int32 [T] token ids, T >= 1.
          context_length: most tokens prompt and output may have together.
          deadline: seconds from submission.

        Raises:
          InvalidRequestError: they do not fit.
        """
        limit = _limit(len(prompt), params.max_tokens, context_length)
        super().__init__(prompt, limit, tenant=tenant, priority=priority, cache=cache)
        self.params = params
        self.seed = seed
        self.pieces: deque[Piece] = deque()
        self.finish_reason: FinishReason | None = None
        self.error: Exception | None = None
        self.adapter_name = adapter
        self.adapter_scale = adapter_scale
        self.adapter: Resident | None = None
        self.speculation = speculation
        self.grammar = grammar
        self.expires: float | None = None
        self.notify: Callable[[Request], None] | None = None
        self._deadline = deadline
        self._ending = set(params.stop_token_ids or ())
        if not params.ignore_eos:
            self._ending |= tokenizer.eog_ids
        self._detokenizer = StreamDetokenizer(tokenizer, keep_leading_space=True)
        self._stop_text = StopText(params.stop or ())
        self._submitted = time.perf_counter()
        self._admitted: float | None = None
        self._reused = 0
        self._first: float | None = None

    @property
    def done(self) -> bool:
        return self.finish_reason is not None or self.error is not None

    @property
    def ready(self) -> bool:
        """There is something for its consumer: a piece, the end, or an error."""
        return bool(self.pieces) or self.done

    @property
    def read_first(self) -> bool:
        """Its next step depends on its last token in ways that only the host knows."""
        return self.grammar is not None or (self.speculation is not None and self.speculation.active)

    def submitted(self) -> None:
        """Starts the clock."""
        self._submitted = time.perf_counter()
        if self._deadline is not None:
            self.expires = self._submitted + self._deadline

    def admitted(self) -> bool:
        """Notes that it runs; whether it is the first time."""
        if self._admitted is not None:
            return False
        self._admitted = time.perf_counter()
        self._reused = self.reused
        return True

    def use_adapter(self, adapter: Resident) -> None:
        """What it holds in the cache is of this adapter from now on."""
        self.adapter = adapter
        if self.first_key is not None:
            self.first_key = first_key(adapter.cache_key(self.adapter_scale))

    def masks(self, drafts: SequenceOf[int]) -> list[np.ndarray | None]:
        """Of the tokens allowed next, and after each of the drafts; None for any."""
        if self.grammar is None:
            return [None] * (1 + len(drafts))
        return list(self.grammar.masks(drafts))

    def tell(self) -> Exception | None:
        """Calls `notify`; returns what it raised."""
        if self.notify is not None and self.ready:
            try:
                self.notify(self)
            except Exception as error:
                return error
        return None

    def accept(self, token: int, logprob: TokenLogprob | None) -> None:
        """Takes the next sampled token; adds a piece, the last one if the request ends with it."""
        self.append(token)
        if self._first is None:
            self._first = time.perf_counter()
        reason: FinishReason | None = None
        if self.grammar is not None:
            self.grammar.advance(token)
        if token in self._ending or (self.grammar is not None and self.grammar.finished):
            reason, text = "stop", ""
            if token not in self._ending:
                text = self._stop_text.push(self._detokenizer.push(token))[0]
        else:
            text, found = self._stop_text.push(self._detokenizer.push(token))
            if found:
                self._end("stop", text, [token], logprob)
                return
            if self.length == self.limit:
                reason = "length"
        if reason is None:
            self.pieces.append(Piece(text, [token], None if logprob is None else [logprob]))
            return
        rest, found = self._stop_text.push(self._detokenizer.finish())
        text += rest if found else rest + self._stop_text.finish()
        self._end("stop" if found else reason, text, [token], logprob)

    def cancel(self) -> None:
        """Ends it where it is; text that was held back is dropped."""
        self._end("cancelled", "", [], None)

    def expire(self) -> None:
        """Ends it at its deadline, as cancel does."""
        self._end("deadline", "", [], None)

    def fail(self, error: Exception) -> None:
        self.error = error

    def _end(self, reason: FinishReason, text: str, tokens: list[int], logprob: TokenLogprob | None) -> None:
        logprobs = None if self.params.logprobs is None else ([] if logprob is None else [logprob])
        usage = Usage(self.prompt_length, self.generated, self.length, self._reused)
        speculation = None if self.speculation is None else self.speculation.result()
        self.pieces.append(Piece(text, tokens, logprobs, reason, usage, self._timing(), speculation))
        self.finish_reason = reason

    def _timing(self) -> Timing:
        now = time.perf_counter()
        admitted = now if self._admitted is None else self._admitted
        first = now if self._first is None else self._first
        decode, more = now - first, self.generated - 1
        return Timing(
            queue=admitted - self._submitted,
            prefill=first - admitted,
            time_to_first_token=first - self._submitted,
            decode=decode,
            total=now - self._submitted,
            decode_tokens_per_second=more / decode if more > 0 and decode > 0 else None,
        )


def collect(pieces: Iterable[Piece]) -> Result:
    """The whole of a request from all of its pieces."""
    pieces = list(pieces)
    last = pieces[-1]
    if last.finish_reason is None or last.usage is None or last.timing is None:
        raise ValueError("the last piece is missing")
    logprobs = None
    if last.logprobs is not None:
        logprobs = [entry for piece in pieces for entry in piece.logprobs or []]
    return Result(
        text="".join(piece.text for piece in pieces),
        tokens=[token for piece in pieces for token in piece.tokens],
        finish_reason=last.finish_reason,
        logprobs=logprobs,
        usage=last.usage,
        timing=last.timing,
        speculation=last.speculation,
    )


def choice_seed(seed: int, choice: int) -> int:
    """The seed of the choice-th completion of one request: its own for the first, independent ones for the others."""
    if choice == 0:
        return seed
    digest = hashlib.blake2b(seed.to_bytes(8, "little") + choice.to_bytes(8, "little"), digest_size=8).digest()
    return int.from_bytes(digest, "little")


def _limit(prompt: int, max_tokens: int | None, context_length: int) -> int:
    if prompt >= context_length:
        raise InvalidRequestError(
            f"the prompt has {prompt} tokens; accepted: at most {context_length - 1}, "
            f"as the context holds {context_length} tokens"
        )
    if max_tokens is None:
        return context_length
    if prompt + max_tokens > context_length:
        raise InvalidRequestError(
            f"a prompt of {prompt} tokens and max_tokens {shown(max_tokens)} make {shown(prompt + max_tokens)}; "
            f"the context holds {context_length} tokens; accepted: max_tokens up to {context_length - prompt}"
        )
    return prompt + max_tokens
