"""One sequence of tokens in the engine: what it holds, where its keys and values are, and who it belongs to."""

import secrets

import numpy as np

from realm_jax.engine.prefix import first_key


class Sequence:
    """The tokens of one request and where their keys and values are.

    Attributes:
      tokens: int32 [limit], filled up to `length`: the prompt, then what was generated.
      drawn: tokens after those that the device has drawn but the host has not read yet: 0 or 1.
      cached: how many of them have keys and values in the cache, or will have once what was dispatched is done.
      served: how many were counted as their tenant's service: what is computed again is not counted again.
      limit: most tokens it may come to hold.
      slot: its place in the batch, None unless running.
      region: of the pool, where its pages are, or were when it last ran.
      pages: its pages in order; `table` is the same as an int32 row for the runner, padded with zeros.
      tenant: name of the account it belongs to.
      priority: higher ones of a tenant start first, and are the last to be preempted.
      first_key: where the chain of its pages' keys starts; None: it neither uses nor fills the prefix cache.
      keys, public_keys: of its full pages, as far as they are known.
      reused: tokens found in the prefix cache when it last started.
    """

    def __init__(
        self,
        prompt: np.ndarray,
        limit: int,
        *,
        tenant: str = "default",
        priority: int = 0,
        cache: bool = True,
        adapter_key: bytes = b"",
    ):
        self.tokens = np.zeros(limit, np.int32)
        self.tokens[: len(prompt)] = prompt
        self.length = len(prompt)
        self.prompt_length = len(prompt)
        self.drawn = 0
        self.cached = 0
        self.served = 0
        self.limit = limit
        self.slot: int | None = None
        self.region = 0
        self.pages: list[int] = []
        self.table = np.zeros(0, np.int32)
        self.tenant = tenant
        self.priority = priority
        self.first_key = first_key(adapter_key) if cache else None
        self.keys: list[bytes] = []
        self.public_keys: list[bytes] = []
        self.published = 0  # full pages that were offered to the prefix cache
        self.reused = 0
        self.id = secrets.token_hex(8)

    @property
    def total(self) -> int:
        """Tokens it has, the one that the host does not know yet included."""
        return self.length + self.drawn

    @property
    def generated(self) -> int:
        return self.length - self.prompt_length

    def append(self, token: int) -> None:
        self.tokens[self.length] = token
        self.length += 1
