"""The prefix cache: full pages, found again by what they hold.

A page's key is a keyed hash of its tokens and of the key before it, so that it names the whole sequence up to the end
of the page. The first key of a chain is made of the adapter's content; the hash is keyed by the tenant's salt, so that
tenants never meet, unless an operator marks a prefix public: its pages are keyed by a salt of the process instead.
"""

import hashlib
import secrets
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from realm_jax.engine.allocator import PageAllocator

_KEY_BYTES = 16


def first_key(adapter: bytes = b"") -> bytes:
    """Where the chain of a sequence begins: what its keys and values depend on beside its tokens."""
    return hashlib.blake2b(adapter, digest_size=_KEY_BYTES).digest()


def next_key(key: bytes, tokens: np.ndarray, salt: bytes) -> bytes:
    """The key of a full page of `tokens` (int32 [page size]) after the page of `key`. salt: at most 64 bytes."""
    return hashlib.blake2b(key + tokens.tobytes(), digest_size=_KEY_BYTES, key=salt).digest()


def chain(first: bytes, tokens: np.ndarray, page_size: int, salt: bytes) -> list[bytes]:
    """The keys of all full pages of a sequence of tokens (int32 [T])."""
    keys, key = [], first
    for start in range(0, len(tokens) - page_size + 1, page_size):
        key = next_key(key, tokens[start : start + page_size], salt)
        keys.append(key)
    return keys


@dataclass
class _Entry:
    page: int
    owner: str | None  # the tenant it is charged to; None for public ones


class PrefixCache:
    """Holds pages after their sequences let go of them, until somebody needs the room; least recently used first."""

    def __init__(self, pages: PageAllocator):
        self._pages = pages
        self._entries: OrderedDict[bytes, _Entry] = OrderedDict()  # the least recently used one first
        self._by_owner: dict[str | None, set[int]] = {}
        self.public_salt = secrets.token_bytes(32)
        self.public: set[bytes] = set()  # keys, under public_salt, of the pages that anybody may share
        self.floors: dict[str, int] = {}  # pages of a tenant that others cannot push out

    def __len__(self) -> int:
        return len(self._entries)

    def owned(self, owner: str | None) -> set[int]:
        """Pages cached for a tenant."""
        return self._by_owner.get(owner, set())

    def match(self, keys: Sequence[bytes]) -> list[int]:
        """Pages of the longest run of keys, from the first one, that are here; the caller holds them from now on."""
        found = keys[: self.held(keys)]
        self.touch(found)
        pages = [self._entries[key].page for key in found]
        self._pages.retain(pages)
        return pages

    def touch(self, keys: Sequence[bytes]) -> None:
        """Notes that these are in use: a page before the ones that follow it, as those are of no use without it."""
        for key in reversed(keys):
            if key in self._entries:
                self._entries.move_to_end(key)

    def put(self, key: bytes, page: int, owner: str | None) -> None:
        """Keeps a page, which the caller holds, under its key; one that is here already stays."""
        if key in self._entries:
            return
        self._pages.retain([page])
        self._entries[key] = _Entry(page, owner)
        self._by_owner.setdefault(owner, set()).add(page)

    def held(self, keys: Sequence[bytes]) -> int:
        """How many of the keys, from the first one on, are here."""
        return next((i for i, key in enumerate(keys) if key not in self._entries), len(keys))

    def evictable_in(self, region: int) -> int:
        """Pages of a region that only the cache holds."""
        if self._pages.regions == 1:
            return sum(self._pages.holders(entry.page) == 1 for entry in self._entries.values())
        pages = (entry.page for entry in self._entries.values())
        return sum(self._pages.region_of(page) == region and self._pages.holders(page) == 1 for page in pages)

    def evict(self, count: int, tenant: str | None, own_only: bool = False, region: int | None = None) -> int:
        """Gives up to `count` pages back that nobody else holds, for a tenant's sake; returns how many.

        Other tenants keep their floors; with `own_only` they keep everything. For None, the operator's sake, nobody
        keeps anything. region: of the pages; None: all.
        """
        freed = 0
        for key, entry in list(self._entries.items()):
            if freed == count:
                break
            if self._pages.holders(entry.page) != 1 or region not in (None, self._pages.region_of(entry.page)):
                continue
            if tenant is not None and entry.owner != tenant:
                floor = self.floors.get(entry.owner, 0) if entry.owner is not None else 0
                if own_only or len(self.owned(entry.owner)) <= floor:
                    continue
            self._drop(key)
            freed += 1
        return freed

    def forget(self, keys: Iterable[bytes] | None = None) -> None:
        """Drops these keys, or everything: their pages are free when nobody else holds them."""
        for key in list(self._entries if keys is None else keys):
            if key in self._entries:
                self._drop(key)

    def _drop(self, key: bytes) -> None:
        entry = self._entries.pop(key)
        self._by_owner[entry.owner].discard(entry.page)
        self._pages.release([entry.page])
