"""Checking what callers of the public API pass: each mistake is one line that says what would be accepted."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np

from realm_jax.errors import InvalidRequestError
from realm_jax.sampling_params import SamplingParams, shown

_PROMPTS = "accepted: a string, a list of token ids, or a list of these"


def is_batch(prompts: Any) -> bool:
    """Whether this is a list of prompts and not one prompt. An empty list is an empty prompt, and refused as such."""
    if isinstance(prompts, (list, tuple)):
        return bool(prompts) and isinstance(prompts[0], (str, list, tuple, np.ndarray, range))
    if not isinstance(prompts, (str, np.ndarray, range)):
        raise InvalidRequestError(f"prompts is {brief(prompts)}; {_PROMPTS}")
    return False


def params_for(params: Any, count: int, batch: bool) -> list[SamplingParams]:
    """One SamplingParams for each of `count` prompts, of which there may be several if `batch`."""
    if params is None:
        params = SamplingParams()
    if isinstance(params, SamplingParams):
        return [params] * count
    accepted = "a SamplingParams, or one for each of a list of prompts" if batch else "a SamplingParams"
    if not batch or not isinstance(params, (list, tuple)):
        raise InvalidRequestError(f"params is {brief(params)}; accepted: {accepted}")
    if len(params) != count:
        raise InvalidRequestError(f"{len(params)} params are given for {count} prompts; accepted: as many, or one")
    for i, one in enumerate(params):
        if not isinstance(one, SamplingParams):
            raise InvalidRequestError(f"params[{i}] is {brief(one)}; accepted: {accepted}")
    return list(params)


def check_token_ids(tokens: Any, what: str, vocab_size: int, empty_ok: bool = False) -> np.ndarray:
    """int32 [T] from a list or array of ids below vocab_size; `what` names it in messages."""
    accepted = f"integers from 0 to {vocab_size - 1}"
    if isinstance(tokens, np.ndarray):
        if tokens.ndim != 1 or tokens.dtype.kind not in "iu":
            raise InvalidRequestError(
                f"{what} is an array of {tokens.dtype} of shape {tokens.shape}; accepted: one dimension, {accepted}"
            )
    elif not isinstance(tokens, (list, tuple, range)):
        raise InvalidRequestError(f"{what} is {brief(tokens)}; {_PROMPTS}")
    for token in tokens:
        if isinstance(token, bool) or not isinstance(token, (int, np.integer)) or not 0 <= token < vocab_size:
            raise InvalidRequestError(f"{what} holds {brief(token)}; accepted: token ids, {accepted}")
    if not len(tokens) and not empty_ok:
        raise InvalidRequestError(f"the {what} is empty; accepted: at least one token")
    return np.asarray(tokens, np.int32)


def check_context_length(value: Any) -> None:
    if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
        raise InvalidRequestError(f"context_length is {brief(value)}; accepted: an integer >= 1, or None")


def refuse_request_options(options: dict[str, Any]) -> None:
    """Refuses what generate, stream and chat are given beyond their arguments."""
    if options.get("speculate") is False:
        options = {name: value for name, value in options.items() if name != "speculate"}
    refuse_options(options, later=("adapter", "speculate"), known="params")


def refuse_options(options: Mapping[str, Any], later: Sequence[str], known: str) -> None:
    """Refuses unknown options, and those of later versions (`later`) that are given."""
    for name, value in options.items():
        if name not in later:
            raise InvalidRequestError(f"unknown option {name!r}; accepted: {known}")
        if value is not None:
            raise InvalidRequestError(f"{name} is not supported in this version; accepted: None")


@contextmanager
def naming(place: str) -> Iterator[None]:
    """Puts the place of a mistake in front of its message."""
    try:
        yield
    except InvalidRequestError as error:
        if not place:
            raise
        raise InvalidRequestError(f"{place}{error}") from None


def brief(value: Any) -> str:
    """A value and its type, for a message."""
    return f"{shown(value)} ({type(value).__name__})"
