"""What a request asks of the sampler: one frozen, validated dataclass. Importing it does not import jax."""

import difflib
import json
import math
import numbers
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

from realm_jax.errors import InvalidRequestError

MAX_LOGPROBS = 20
MAX_SEED = 2**64 - 1
MAX_CHOICES = 256
MAX_GRAMMAR = 1 << 16  # bytes
MAX_STOPS = 256


@dataclass(frozen=True)
class SamplingParams:
    """How the tokens of one request are chosen and when it ends.

    The order in which the fields act is documented in `realm_jax.sampling`.

    Attributes:
      max_tokens: generate at most this many tokens (>= 1). None: until the context is full.
      temperature: 0 is greedy (the lowest id wins a tie); else logits are divided by it. Below 1e-5 counts as 0.
      top_k: keep the k most likely tokens; 0 turns it off.
      top_p: keep the smallest set of most likely tokens whose probability reaches top_p; 1 turns it off.
      min_p: drop tokens less likely than min_p times the most likely one; 0 turns it off.
      typical_p: locally typical sampling (Meister et al., 2022): keep the smallest set of tokens whose surprise is
        nearest to the entropy and whose probability reaches typical_p; 1 turns it off.
      repetition_penalty: positive logits of tokens seen in prompt or output are divided by it, negative ones
        multiplied (Keskar et al., 2019); 1 turns it off.
      frequency_penalty, presence_penalty: subtracted from a token's logit per occurrence in the output, or once if it
        occurred there (-2 to 2); 0 turns them off.
      logit_bias: {token id: number added to its logit}.
      stop: a string or several (at most 256); generation ends where one appears, and the text ends before it.
      stop_token_ids: generation ends when one of these tokens is sampled; its text is left out. None: no such ids, as
        for stop.
      ignore_eos: go on after the model's own end-of-generation tokens.
      seed: 0 to 2**64 - 1: the same seed and prompt give the same tokens, whatever else is in the batch. None: a fresh
        random seed for every request.
      n: number of independent completions of the prompt.
      logprobs: None, or how many of the most likely tokens (0 to 20) to report at each position beside the chosen one.
      grammar: None, or what the text must be: a Lark grammar in llguidance's dialect, or {"regex": pattern} in that of
        Rust's regex crate. End-of-generation tokens can come only where the grammar may end, and then nothing else.
      json_schema: None, or the JSON schema that the text must satisfy: a dict, its JSON text, or True for any JSON
        value; kept as text. Keywords that llguidance does not implement are refused. At most one of the two may be
        given, of at most 65536 bytes. A text that max_tokens cuts off may be no whole one.

    Raises:
      InvalidRequestError: unknown field, wrong type, or value out of range; one line that says what is accepted.
    """

    max_tokens: int | None = 128
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    typical_p: float = 1.0
    repetition_penalty: float = 1.0
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    logit_bias: Mapping[int, float] | None = None
    stop: str | Sequence[str] | None = ()
    stop_token_ids: Sequence[int] | None = ()
    ignore_eos: bool = False
    seed: int | None = None
    n: int = 1
    logprobs: int | None = None
    grammar: str | Mapping[str, str] | None = None
    json_schema: Mapping[str, Any] | str | bool | None = None

    def __new__(cls, *args: Any, **options: Any) -> "SamplingParams":
        # The generated __init__ answers a wrong name with a TypeError; a request's mistake is ours to explain.
        names = [field.name for field in fields(cls)]
        for name in options:
            if name not in names:
                close = difflib.get_close_matches(name, names, n=1)
                hint = f"did you mean {close[0]!r}? " if close else ""
                raise InvalidRequestError(
                    f"unknown sampling parameter {shown(name)}; {hint}accepted: {', '.join(names)}"
                )
        if len(args) > len(names):
            raise InvalidRequestError(f"{len(args)} sampling parameters given; accepted: at most {len(names)}")
        return super().__new__(cls)

    def __post_init__(self) -> None:
        def put(name: str, value: Any) -> None:
            object.__setattr__(self, name, value)

        put("grammar", _grammar(self.grammar))
        put("json_schema", _schema(self.json_schema))
        if self.grammar is not None and self.json_schema is not None:
            raise InvalidRequestError("grammar and json_schema are both given; accepted: one of them")
        put("max_tokens", _integer("max_tokens", self.max_tokens, low=1, none_ok=True))
        put("temperature", _number("temperature", self.temperature, low=0.0))
        put("top_k", _integer("top_k", self.top_k, low=0))
        put("top_p", _number("top_p", self.top_p, low=0.0, high=1.0, above_low=True))
        put("min_p", _number("min_p", self.min_p, low=0.0, high=1.0))
        put("typical_p", _number("typical_p", self.typical_p, low=0.0, high=1.0, above_low=True))
        put("repetition_penalty", _number("repetition_penalty", self.repetition_penalty, low=0.0, above_low=True))
        put("frequency_penalty", _number("frequency_penalty", self.frequency_penalty, low=-2.0, high=2.0))
        put("presence_penalty", _number("presence_penalty", self.presence_penalty, low=-2.0, high=2.0))
        put("logit_bias", _bias(self.logit_bias))
        put("stop", _strings("stop", self.stop))
        put("stop_token_ids", _ids("stop_token_ids", self.stop_token_ids))
        put("ignore_eos", _boolean("ignore_eos", self.ignore_eos))
        put("seed", _integer("seed", self.seed, low=0, high=MAX_SEED, none_ok=True))
        put("n", _integer("n", self.n, low=1, high=MAX_CHOICES))
        put("logprobs", _integer("logprobs", self.logprobs, low=0, high=MAX_LOGPROBS, none_ok=True))

    def check_vocabulary(self, vocab_size: int) -> None:
        """Raises InvalidRequestError when a token id named here is not below vocab_size."""
        named = [("logit_bias", token) for token in self.logit_bias or {}]
        named += [("stop_token_ids", token) for token in self.stop_token_ids or ()]
        for field, token in named:
            if token >= vocab_size:
                raise InvalidRequestError(f"{field} names token {shown(token)}; accepted: 0 to {vocab_size - 1}")


def shown(value: Any) -> str:
    """A value for a message: its repr on one line and of bounded length."""
    try:
        text = " ".join(repr(value).split())
    except Exception:  # an integer of more digits than Python will print, or a repr of the caller's that fails
        text = f"a value of type {type(value).__name__} that cannot be shown"
    return text if len(text) <= 80 else text[:77] + "..."


def _refuse(field: str, value: Any, accepted: str) -> InvalidRequestError:
    return InvalidRequestError(f"{field} is {shown(value)}; accepted: {accepted}")


def _is_integer(value: Any) -> bool:
    return isinstance(value, numbers.Integral) and not isinstance(value, bool)


def _integer(field: str, value: Any, *, low: int, high: int | None = None, none_ok: bool = False) -> int | None:
    accepted = f"an integer >= {low}" if high is None else f"an integer from {low} to {high}"
    if none_ok:
        accepted += ", or None"
        if value is None:
            return None
    if not _is_integer(value) or value < low or (high is not None and value > high):
        raise _refuse(field, value, accepted)
    return int(value)


def _number(
    field: str, value: Any, *, low: float | None = None, high: float | None = None, above_low: bool = False
) -> float:
    if low is None:
        accepted = "a finite number"
    elif high is None:
        accepted = f"a finite number {'>' if above_low else '>='} {low:g}"
    elif above_low:
        accepted = f"a number above {low:g}, at most {high:g}"
    else:
        accepted = f"a number from {low:g} to {high:g}"
    if not isinstance(value, numbers.Real) or isinstance(value, bool):
        raise _refuse(field, value, accepted)
    try:
        number = float(value)
    except OverflowError:
        raise _refuse(field, value, accepted) from None
    too_low = low is not None and (number < low or (above_low and number == low))
    if not math.isfinite(number) or too_low or (high is not None and number > high):
        raise _refuse(field, value, accepted)
    return number


def _boolean(field: str, value: Any) -> bool:
    # numpy's bool is no subclass of bool, and jax or numpy must not be needed to recognise it.
    if not isinstance(value, bool) and type(value).__name__ not in ("bool", "bool_"):
        raise _refuse(field, value, "True or False")
    return bool(value)


def _strings(field: str, value: Any) -> tuple[str, ...]:
    accepted = "a non-empty string, or a list of them"
    if value is None:
        return ()
    items = (value,) if isinstance(value, str) else value
    if not isinstance(items, (list, tuple)):
        raise _refuse(field, value, accepted)
    if len(items) > MAX_STOPS:  # each is looked for after every token, while others wait
        raise InvalidRequestError(f"{len(items)} {field} strings are given; accepted: at most {MAX_STOPS}")
    for item in items:
        if not isinstance(item, str) or not item:
            raise _refuse(field, value, accepted)
        if any("\ud800" <= char <= "\udfff" for char in item):
            raise _refuse(field, item, "text without lone surrogates")
    return tuple(items)


def _grammar(value: Any) -> str | dict[str, str] | None:
    accepted = 'a Lark grammar (a non-empty string), {"regex": a string}, or None'
    if value is None:
        return None
    text = value
    if isinstance(value, Mapping):
        if list(value) != ["regex"]:
            raise _refuse("grammar", value, accepted)
        text = value["regex"]
    if not isinstance(text, str) or not text.strip() or (text is value and text.lstrip().startswith("{")):
        raise _refuse("grammar", value, accepted)
    _check_size("grammar", text)
    return text if text is value else {"regex": text}


def _schema(value: Any) -> str | None:
    accepted = "a JSON schema (a dict, or its JSON text), True for any JSON value, or None"
    if value is None:
        return None
    if value is True:
        return "{}"
    if not isinstance(value, (str, Mapping)):
        raise _refuse("json_schema", value, accepted)
    try:
        if isinstance(value, str):
            _check_size("json_schema", value)
            value = json.loads(value, parse_constant=_no_constant)
        if value is True:
            return "{}"
        if not isinstance(value, Mapping):
            raise _refuse("json_schema", value, accepted)
        text = json.dumps(dict(value), allow_nan=False, ensure_ascii=False)
    except (TypeError, ValueError, RecursionError) as error:
        if isinstance(error, InvalidRequestError):
            raise
        raise InvalidRequestError(f"json_schema is no JSON: {shown(str(error))}; accepted: {accepted}") from None
    _check_size("json_schema", text)
    return text


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name} is not a number of JSON")


def _check_size(field: str, text: str) -> None:
    try:
        size = len(text.encode())
    except UnicodeEncodeError:
        raise _refuse(field, text, "text without lone surrogates") from None
    if size > MAX_GRAMMAR:
        raise InvalidRequestError(f"{field} has {size} bytes; accepted: at most {MAX_GRAMMAR}")


def _ids(field: str, value: Any) -> tuple[int, ...]:
    accepted = "a list of token ids (integers >= 0)"
    if value is None:
        return ()
    if isinstance(value, (str, bytes, Mapping)):
        raise _refuse(field, value, accepted)
    try:
        items = list(value)
    except TypeError:
        raise _refuse(field, value, accepted) from None
    for item in items:
        if not _is_integer(item) or item < 0:
            raise _refuse(field, item, accepted)
    return tuple(int(item) for item in items)


def _bias(value: Any) -> dict[int, float] | None:
    accepted = "a dict of token id (integer >= 0) to a finite number"
    if value is None:
        return None
    if not isinstance(value, Mapping):
        raise _refuse("logit_bias", value, accepted)
    for token in value:
        if not _is_integer(token) or token < 0:
            raise _refuse("logit_bias", token, accepted)
    return {
        int(token): _number(f"logit_bias[{shown(token)}]", bias, low=-1e4, high=1e4) for token, bias in value.items()
    }
