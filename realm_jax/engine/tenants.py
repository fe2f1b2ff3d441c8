"""Who may use the engine, how much, and what each has had of it."""

import math
import numbers
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

from realm_jax.errors import AdapterError, InvalidRequestError, QuotaError
from realm_jax.sampling_params import shown

DEFAULT_TENANT = "default"
MAX_NAME = 128

# What a token costs: one that is generated takes a step of its own, those of a prompt share one (VTC's own weights).
PREFILL_COST = 1.0
DECODE_COST = 2.0

S = TypeVar("S")


@dataclass(frozen=True)
class Tenant:
    """One that shares the engine.

    Attributes:
      name: not empty, at most 128 characters.
      weight: its share of the device beside the others' (> 0).
      tokens_per_minute: most tokens, of prompts and generated, in any minute on average; None: no bound. A request is
        taken while any of them are left, and runs to its end.
      requests_per_minute: most requests submitted in any minute on average.
      concurrent: most requests that wait or run at once.
      adapters: names of the adapters it may use; None: all.
      max_pages: most pages of the cache that its requests and its cached prefixes may take together.
      min_pages: cached prefixes of this many pages stay although others need room.
      salt: keys its cached prefixes; None: a random one. Tenants of the same salt share prefixes.

    Raises:
      InvalidRequestError: a value out of range.
    """

    name: str
    weight: float = 1.0
    tokens_per_minute: float | None = None
    requests_per_minute: float | None = None
    concurrent: int | None = None
    adapters: Sequence[str] | None = None
    max_pages: int | None = None
    min_pages: int = 0
    salt: bytes | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        def refuse(name: str, accepted: str) -> InvalidRequestError:
            where = "" if name == "name" else f"tenant {shown(self.name)}: "
            return InvalidRequestError(f"{where}{name} is {shown(getattr(self, name))}; accepted: {accepted}")

        if not isinstance(self.name, str) or not 0 < len(self.name) <= MAX_NAME or not self.name.isprintable():
            raise refuse("name", f"a string of 1 to {MAX_NAME} printable characters")
        if not _positive(self.weight):
            raise refuse("weight", "a number above 0")
        for name in ("tokens_per_minute", "requests_per_minute"):
            if getattr(self, name) is not None and not _positive(getattr(self, name)):
                raise refuse(name, "a number above 0, or None")
        for name in ("concurrent", "max_pages"):
            if getattr(self, name) is not None and not _integer(getattr(self, name), 1):
                raise refuse(name, "an integer >= 1, or None")
        if not _integer(self.min_pages, 0) or (self.max_pages is not None and self.min_pages > self.max_pages):
            raise refuse("min_pages", "an integer from 0 to max_pages")
        if self.adapters is not None:
            names = self.adapters
            if isinstance(names, str) or not isinstance(names, (list, tuple, set, frozenset)):
                raise refuse("adapters", "a list of names, or None")
            if not all(isinstance(one, str) for one in names):
                raise refuse("adapters", "a list of names, or None")
            object.__setattr__(self, "adapters", tuple(names))
        if self.salt is not None and (not isinstance(self.salt, bytes) or not 0 < len(self.salt) <= 64):
            raise refuse("salt", "1 to 64 bytes, or None")

    def check_adapter(self, name: str) -> None:
        """AdapterError when the tenant may not use this adapter."""
        if self.adapters is not None and name not in self.adapters:
            allowed = ", ".join(map(repr, self.adapters)) or "none"
            raise AdapterError(f"tenant {self.name!r} may not use adapter {shown(name)}; accepted: {allowed}")


class Allowance:
    """A bucket that fills by `per_minute` a minute, up to one minute's worth, or to 1 if that is less."""

    def __init__(self, per_minute: float, clock: Callable[[], float] = time.monotonic):
        self.per_minute = per_minute
        self._most = max(per_minute, 1.0)
        self._clock = clock
        self._left = self._most
        self._at = clock()

    @property
    def left(self) -> float:
        now = self._clock()
        self._left = min(self._most, self._left + (now - self._at) * self.per_minute / 60)
        self._at = now
        return self._left

    def take(self, amount: float) -> None:
        """Takes that much, below zero if need be."""
        self._left = self.left - amount

    def wait(self, amount: float) -> float:
        """Seconds until `amount` is there."""
        return max(0.0, (min(amount, self._most) - self.left) * 60 / self.per_minute)


class Account(Generic[S]):
    """A tenant in the scheduler: what waits, what runs, and how much service it has had.

    Attributes:
      counter: its virtual tokens: service over weight (Sheng et al., "Fairness in serving large language models",
        OSDI 2024). The tenant with the smallest one is served next.
      waiting: in the order in which they start: by priority, then as they came.
      open: requests that were submitted and have not ended.
    """

    def __init__(self, tenant: Tenant, clock: Callable[[], float] = time.monotonic):
        self.tenant = tenant
        self.counter = 0.0
        self.waiting: list[S] = []
        self.running: list[S] = []
        self.open = 0
        self._requests = None if tenant.requests_per_minute is None else Allowance(tenant.requests_per_minute, clock)
        self._tokens = None if tenant.tokens_per_minute is None else Allowance(tenant.tokens_per_minute, clock)

    @property
    def name(self) -> str:
        return self.tenant.name

    @property
    def active(self) -> bool:
        return bool(self.waiting or self.running)

    def check_quota(self, requests: int) -> None:
        """QuotaError when that many requests more are not allowed now."""
        t = self.tenant
        if t.concurrent is not None and self.open + requests > t.concurrent:
            raise QuotaError(
                f"tenant {self.name!r} has {self.open} requests and sends {requests} more; "
                f"accepted: {t.concurrent} at once"
            )
        if self._requests is not None and self._requests.left < requests:
            raise QuotaError(
                f"tenant {self.name!r} is over {t.requests_per_minute:g} requests a minute; "
                f"accepted again in {math.ceil(self._requests.wait(requests))} s"
            )
        if self._tokens is not None and self._tokens.left <= 0:
            raise QuotaError(
                f"tenant {self.name!r} is over {t.tokens_per_minute:g} tokens a minute; "
                f"accepted again in {math.ceil(self._tokens.wait(1))} s"
            )

    def opened(self, requests: int) -> None:
        self.open += requests
        if self._requests is not None:
            self._requests.take(requests)

    def serve(self, prefilled: int, decoded: int) -> None:
        """Counts service: tokens of prompts computed, tokens generated."""
        self.counter += (PREFILL_COST * prefilled + DECODE_COST * decoded) / self.tenant.weight

    def spend(self, tokens: int) -> None:
        """Counts tokens against tokens_per_minute."""
        if self._tokens is not None:
            self._tokens.take(tokens)


def _positive(value: Any) -> bool:
    """Whether it is a number above 0 that one can divide by, and be divided by."""
    number = isinstance(value, numbers.Real) and not isinstance(value, bool)
    return number and bool(1e-100 <= value <= 1e100)


def _integer(value: Any, low: int) -> bool:
    return isinstance(value, numbers.Integral) and not isinstance(value, bool) and int(value) >= low
