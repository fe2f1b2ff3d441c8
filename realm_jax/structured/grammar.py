"""Grammars as masks over the next token, through llguidance; no JAX.

Everything here fails closed: what cannot be compiled is refused before the request runs, and what goes wrong later is
an error of that request. No token is ever drawn without its mask.
"""

import threading
from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

import numpy as np

from realm_jax.errors import InvalidRequestError, RealmError
from realm_jax.sampling_params import SamplingParams
from realm_jax.structured.check import GrammarChecker
from realm_jax.structured.worker import LIMITS
from realm_jax.text import Tokenizer

# Whitespace between a JSON document's parts: free, but not without end, which small models like to fall into.
_WHITESPACE = r"[\x20\x0A\x0D\x09]{1,32}"
_REMEMBERED = 256  # grammars that need no check any more


class GrammarTokenizer:
    """A model's vocabulary as grammars see it. Any thread may use it."""

    def __init__(self, tokenizer: Tokenizer, vocab_size: int | None = None):
        """
        Args:
          tokenizer: of the model.
          vocab_size: columns of its logits, where they are more than the tokenizer's tokens; those are never allowed.

        Raises:
          InvalidRequestError: the vocabulary has no token that ends a generation, or does not spell texts byte by byte.
        """
        if tokenizer.kind == "wpm":
            raise InvalidRequestError("grammars are not supported with a WordPiece vocabulary, which alters texts")
        if not tokenizer.eog_ids:
            raise InvalidRequestError("grammars need a vocabulary with a token that ends a generation; it has none")
        self._tokenizer = tokenizer
        self.vocab_size = tokenizer.vocab_size if vocab_size is None else vocab_size
        self.eog_ids = sorted(tokenizer.eog_ids)
        known = range(tokenizer.vocab_size)
        special = [token for token in known if tokenizer.is_special(token) or token in tokenizer.eog_ids]
        self.tokens = [tokenizer.token_bytes(token) for token in known]
        self.tokens += [b""] * (self.vocab_size - len(self.tokens))
        # What llguidance's TokenizerWrapper asks for.
        self.eos_token_id, self.bos_token_id, self.special_token_ids = self.eog_ids[0], tokenizer.bos_id, special
        hidden = set(special)
        self._ids: dict[bytes, int] = {}
        for token, piece in enumerate(self.tokens):
            if token not in hidden and piece:
                self._ids.setdefault(piece, token)
        self.checker = GrammarChecker(self.tokens, self.eog_ids, special)
        self._lock = threading.Lock()
        self._native: Any = None
        self._checked: OrderedDict[str, None] = OrderedDict()  # texts, the last used at the end

    def start(self, params: SamplingParams) -> "GrammarState":
        """The state of a new completion under the grammar or schema of its parameters, one of which is given.

        Raises:
          InvalidRequestError: it is malformed, uses what llguidance does not implement, allows nothing, or takes too
            much time or memory.
          RealmError: llguidance is not installed, or the process that checks grammars does not start.
        """
        if params.grammar is None and params.json_schema is None:
            raise ValueError("neither grammar nor json_schema is given")
        try:
            from llguidance import LLMatcher, LLParserLimits
        except ImportError as error:
            raise RealmError(f"grammars and JSON schemas need the package llguidance: {error}") from None
        text = _grammar_text(params)
        with self._lock:
            known = text in self._checked
        if not known:
            self.checker.check(text)
        # Compiled for each state: copies of a matcher share its lexer, and so its limits and failures.
        matcher = LLMatcher(self._llguidance(), text, log_level=0, limits=LLParserLimits(**LIMITS))
        state = GrammarState(self, matcher)
        try:
            nothing = not state.mask().any()
        except RealmError as error:
            raise InvalidRequestError(f"the grammar cannot be used: {error}") from None
        if nothing:
            raise InvalidRequestError("the grammar allows no text at all; accepted: one that allows some")
        with self._lock:
            self._checked[text] = None
            self._checked.move_to_end(text)
            while len(self._checked) > _REMEMBERED:
                self._checked.popitem(last=False)
        return state

    def __call__(self, text: bytes | str) -> list[int]:
        """The tokens that spell exactly these bytes, as the tokenizer would: for where a grammar leaves no choice."""
        data = text.encode() if isinstance(text, str) else bytes(text)
        tokens = self._tokenizer.encode(data.decode("utf-8", "ignore"), add_special=False)
        if not tokens:
            return self._spelled(data)
        spelled = b"".join(self.tokens[token] for token in tokens)
        if spelled == b" " + data:  # SentencePiece puts a space before a text
            first = self.tokens[tokens[0]][1:]
            return self._spelled(first) + tokens[1:]
        return tokens if spelled == data else self._spelled(data)

    def _spelled(self, data: bytes) -> list[int]:
        """Tokens of the data, the longest first; bytes that no token begins with are left out."""
        tokens, longest = [], max(map(len, self._ids))
        while data:
            size = next((n for n in range(min(longest, len(data)), 0, -1) if data[:n] in self._ids), 0)
            if size:
                tokens.append(self._ids[data[:size]])
            data = data[size or 1 :]
        return tokens

    def _llguidance(self) -> Any:
        from llguidance import LLTokenizer, TokenizerWrapper

        with self._lock:
            if self._native is None:
                self._native = LLTokenizer(TokenizerWrapper(self), eos_token=self.eog_ids)
            return self._native


class GrammarState:
    """Where one completion is in its grammar."""

    def __init__(self, tokenizer: GrammarTokenizer, matcher: Any):
        self._matcher = matcher
        self._eog_ids = frozenset(tokenizer.eog_ids)
        self._vocab = tokenizer.vocab_size
        self._words = -(-tokenizer.vocab_size // 32)
        self._ended = False
        self._ahead: tuple[tuple[int, ...], list[np.ndarray]] = ((), [])  # the last drafts and their masks
        self._only_end = np.zeros(self._words, np.uint32)
        for token in self._eog_ids:
            self._only_end[token // 32] |= np.uint32(1 << token % 32)

    @property
    def finished(self) -> bool:
        """Nothing can follow but a token that ends a generation, or one has come."""
        return self._ended or (self._matcher.is_stopped() and not self._matcher.is_error())

    def mask(self) -> np.ndarray:
        """uint32 [ceil(vocab / 32)]: bit i % 32 of word i // 32 says whether token i may come next.

        Tokens that end a generation may come exactly where the grammar may end.

        Raises:
          RealmError: llguidance gave up, for example because the text became too ambiguous.
        """
        if self.finished:
            return self._only_end
        words = np.frombuffer(self._matcher.compute_bitmask(), np.uint32)
        self._check()
        if len(words) < self._words:
            raise RealmError(f"the grammar's mask has {len(words)} words; {self._words} are needed")
        return words[: self._words]  # llguidance has one to spare

    def advance(self, token: int) -> None:
        """Takes the token that was drawn.

        Raises:
          RealmError: the grammar does not allow it.
        """
        self._ahead = ((), [])
        if token in self._eog_ids:
            if not self.finished and not self._matcher.is_accepting():
                raise RealmError(f"the grammar does not allow the end (token {token}) here")
            self._ended = True
        elif self.finished or not self._matcher.consume_token(token):
            self._check()
            raise RealmError(f"the grammar does not allow token {token} here")

    def masks(self, drafts: Sequence[int]) -> list[np.ndarray]:
        """The mask of the next token, and those after each of the drafts, as far as these are allowed.

        1 + valid(drafts) masks; the state stays where it is. None follow a token that ends a generation but one mask.
        Errors as of mask.
        """
        drafts = tuple(drafts)
        known, masks = self._ahead
        if masks and known[: len(drafts)] == drafts:
            return masks[: 1 + len(drafts)]
        masks, taken = [self.mask()], 0
        try:
            for token in drafts:
                if not 0 <= token < self._vocab or not masks[-1][token // 32] >> np.uint32(token % 32) & 1:
                    break
                if token in self._eog_ids:
                    masks.append(self._only_end)
                    break
                if not self._matcher.consume_token(token):
                    self._check()
                taken += 1
                masks.append(self.mask())
        finally:
            if taken and not self._matcher.rollback(taken):
                self._check()
        self._ahead = (drafts, masks)
        return masks

    def valid(self, drafts: Sequence[int]) -> int:
        """How many of the drafts the grammar allows, one after another, up to a token that ends a generation."""
        return len(self.masks(drafts)) - 1

    def _check(self) -> None:
        if self._matcher.is_error():
            problem = " ".join(self._matcher.get_error().split())[:300]
            raise RealmError(f"the grammar failed: {problem}")


def _grammar_text(params: SamplingParams) -> str:
    """What llguidance compiles."""
    from llguidance import LLMatcher

    if isinstance(params.json_schema, str):  # SamplingParams keeps schemas as text
        # Not lenient, whatever the schema says: a keyword that is not implemented is an error, and not ignored.
        options: Any = {"whitespace_pattern": _WHITESPACE}, {"lenient": False}
        return LLMatcher.grammar_from_json_schema(params.json_schema, *options)
    if isinstance(params.grammar, str):
        return LLMatcher.grammar_from_lark(params.grammar)
    assert params.grammar is not None
    return LLMatcher.grammar_from_regex(params.grammar["regex"])
