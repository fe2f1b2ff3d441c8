"""Checking what callers of the public API pass: each mistake is one line that says what would be accepted."""

from collections.abc import Iterator, Mapping
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


def adapters_for(adapter: Any, count: int, batch: bool) -> list[str | None]:
    """One adapter's name, or None, for each of `count` prompts, of which there may be several if `batch`."""
    if adapter is None or isinstance(adapter, str):
        return [adapter] * count
    accepted = "a name or None" + (", or one of these for each of a list of prompts" if batch else "")
    if not batch or not isinstance(adapter, (list, tuple)):
        raise InvalidRequestError(f"adapter is {brief(adapter)}; accepted: {accepted}")
    if len(adapter) != count:
        raise InvalidRequestError(f"{len(adapter)} adapters are given for {count} prompts; accepted: as many, or one")
    for i, one in enumerate(adapter):
        if one is not None and not isinstance(one, str):
            raise InvalidRequestError(f"adapter[{i}] is {brief(one)}; accepted: {accepted}")
    return list(adapter)


def refuse_options(options: Mapping[str, Any], known: str) -> None:
    """Refuses options that are not known."""
    for name in options:
        raise InvalidRequestError(f"unknown option {shown(name)}; accepted: {known}")


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
