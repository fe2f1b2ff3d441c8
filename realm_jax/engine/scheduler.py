"""Which sequences run in the next forward, and with which tokens. Pure host logic: it needs no model to be tested."""

import bisect
import secrets
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Generic, TypeVar

import numpy as np

from realm_jax.engine.allocator import PageAllocator
from realm_jax.engine.prefix import PrefixCache, next_key
from realm_jax.engine.sequence import Sequence
from realm_jax.engine.tenants import DECODE_COST, DEFAULT_TENANT, PREFILL_COST, Account, Tenant
from realm_jax.errors import CapacityError, InvalidRequestError
from realm_jax.sampling_params import shown

S = TypeVar("S", bound=Sequence)

# A waiting tenant that is behind a running one by more than this many virtual tokens takes a slot from it; less than
# all that the cache holds.
QUANTUM = 512.0


@dataclass(frozen=True)
class Row(Generic[S]):
    """Rows of one sequence in a batch: run tokens start .. stop-1, and then `drafts`.

    samples: they are the last it has, so that the next is drawn from what they give.
    unread: the token at `start` is on the device, and the host does not know it yet.
    drafts: tokens that may follow; each is a row of its own that samples, too.
    """

    sequence: S
    start: int
    stop: int
    samples: bool
    unread: bool = False
    drafts: tuple[int, ...] = ()

    @property
    def tokens(self) -> np.ndarray:
        return self.sequence.tokens[self.start : self.stop]


class Scheduler(Generic[S]):
    """Fair between tenants, in turn within one.

    Who starts: while a slot and pages are free, the first in line of the tenant with the smallest virtual token counter
    (see tenants.Account). A tenant that has nothing running takes a slot from one that has several, unless it is
    QUANTUM ahead of it; and one that is QUANTUM behind takes one from whoever is ahead. A sequence that loses its slot
    keeps its tokens, waits at the head of its line, and goes on where it was: its keys and values come from the prefix
    cache or are computed again.

    Pages are taken as tokens come. When there are none, the least recently used of the prefix cache give way, then
    the sequence that started last, of the tenant that had most.

    Where the pool has regions, so have the slots, and a sequence runs in one of them: where most of its prefix is
    cached, or else where most pages are to be had. What is cached in one region is not found from another.

    Each batch holds one token of every sequence that is decoding, so that none of them waits for a prompt, and parts
    of prompts up to a budget, tenants taking turns. They end at multiples of `chunk` counted from a sequence's first
    token.
    """

    def __init__(
        self,
        pages: PageAllocator,
        *,
        slots: int,
        page_size: int,
        table_size: int,
        chunk: int,
        padded: Callable[[int], int],
        prefill_budget: int,
        tenants: Iterable[Tenant] = (),
        fair: bool = True,
    ):
        """
        Args:
          pages: the allocator.
          slots: most sequences running at once; a multiple of the regions of the pages.
          page_size: tokens per page.
          table_size: most pages per sequence.
          chunk: texts are cut at multiples of it.
          padded: from a number of tokens to the number it costs to run.
          prefill_budget: padded tokens of prompts in one batch; a single chunk always fits.
          tenants: who may submit; none: one tenant of name "default".
          fair: False: first come, first served, without preemption for fairness (to compare with).
        """
        self.pages = pages
        self.cache = PrefixCache(pages)
        self.accounts: dict[str, Account[S]] = {}
        for tenant in tenants or (Tenant(DEFAULT_TENANT),):
            if tenant.name in self.accounts:
                raise InvalidRequestError(f"tenant {tenant.name!r} is given twice; accepted: names of their own")
            self.accounts[tenant.name] = Account(tenant)
            if tenant.min_pages:
                self.cache.floors[tenant.name] = tenant.min_pages
        if (floors := sum(self.cache.floors.values())) >= pages.region_size:
            raise InvalidRequestError(
                f"min_pages of all tenants make {floors}; "
                f"accepted: less than the {pages.region_size} pages of {'a region of ' * (pages.regions > 1)}the cache"
            )
        self.running: list[S] = []  # in order of admission
        self.preemptions = 0
        self.longest_prompt = 0
        self._salts = {name: a.tenant.salt or secrets.token_bytes(32) for name, a in self.accounts.items()}
        self._slots_of_region = slots // pages.regions
        self._free_slots = list(range(slots - 1, -1, -1))
        self.page_size = page_size
        self._quantum = min(QUANTUM, float(pages.total * page_size))  # well within the bound of the gap
        self._table_size = table_size
        self.chunk = chunk
        self._padded = padded
        self._prefill_budget = prefill_budget
        self._fair = fair
        self._served_last: Account[S] | None = None  # whose line became empty last
        self._arrivals = 0
        self._arrived: dict[str, int] = {}  # by sequence id, to keep the order of those that wait again

    # -- who is here

    @property
    def waiting(self) -> list[S]:
        """All that wait, tenant by tenant."""
        return [sequence for account in self.accounts.values() for sequence in account.waiting]

    @property
    def available(self) -> int:
        """Pages that are free or that the prefix cache would give up."""
        return sum(map(self._available, range(self.pages.regions)))

    def __contains__(self, sequence: S) -> bool:
        """Whether it waits or runs here."""
        return sequence.id in self._arrived

    def account(self, name: str) -> Account[S]:
        """InvalidRequestError for a tenant that is not known."""
        if name not in self.accounts:
            known = ", ".join(sorted(self.accounts)[:20])
            raise InvalidRequestError(f"unknown tenant {shown(name)}; accepted: {known}")
        return self.accounts[name]

    def pages_for(self, tokens: int) -> int:
        return -(-tokens // self.page_size)

    def check(self, limit: int, tenant: str | None = None) -> None:
        """Raises CapacityError when a sequence of `limit` tokens could never run, however empty the cache is."""
        needed, most, whose = self.pages_for(limit), min(self.pages.region_size, self._table_size), "it"
        if tenant is not None:
            ceiling = self.account(tenant).tenant.max_pages
            if ceiling is not None and ceiling < most:
                most, whose = ceiling, f"tenant {tenant!r}"
            reserved = sum(floor for name, floor in self.cache.floors.items() if name != tenant)
            most = min(most, self.pages.region_size - reserved)
        if needed > most:
            raise CapacityError(
                f"{limit} tokens need {needed} pages of the cache; {whose} has {most}: {most * self.page_size} tokens"
            )

    # -- fairness

    def gap(self) -> float:
        """The largest difference of virtual tokens between two tenants that both wait for service now."""
        counters = [account.counter for account in self.accounts.values() if account.waiting]
        return max(counters) - min(counters) if counters else 0.0

    def gap_bound(self) -> float:
        """What the gap never exceeds, whatever tenants send: VTC's 2 max(cost of the longest prompt, cost of all tokens
        that the cache holds), over the smallest weight."""
        held = self.pages.total * self.page_size
        lightest = min(account.tenant.weight for account in self.accounts.values())
        return 2 * max(PREFILL_COST * self.longest_prompt, DECODE_COST * held) / lightest

    # -- coming and going

    def submit(self, sequence: S) -> None:
        """Puts it in its tenant's line."""
        self.longest_prompt = max(self.longest_prompt, sequence.prompt_length)
        self._arrived[sequence.id] = self._arrivals
        self._arrivals += 1
        self._wait(self.accounts[sequence.tenant], sequence)

    def admit(self) -> list[S]:
        """Starts those that wait while they fit, in place of others where that is fair; returns those that now run."""
        admitted: list[S] = []
        swaps = 1  # a tenant that is behind catches up step by step: a long prompt of another's is no reason for more
        while (start := self._startable(admitted, swaps)) is not None:
            sequence, victim, behind, region = start
            if victim is not None:
                swaps -= behind
                self.preempt(victim)
            account = self.accounts[sequence.tenant]
            self._leave_line(account, sequence)
            sequence.slot = next(s for s in reversed(self._free_slots) if s // self._slots_of_region == region)
            self._free_slots.remove(sequence.slot)
            sequence.region = region
            sequence.table = np.zeros(self._table_size, np.int32)
            self._reuse(sequence)
            self.running.append(sequence)
            account.running.append(sequence)
            admitted.append(sequence)
        return admitted

    def remove(self, sequence: S) -> None:
        """Takes a sequence out for good, waiting or running; its slot and pages are free at once."""
        account = self.accounts[sequence.tenant]
        if sequence.slot is None:
            self._leave_line(account, sequence)
        else:
            self._stop(sequence)
        del self._arrived[sequence.id]

    def preempt(self, sequence: S) -> None:
        """Takes its slot and pages; it waits at the head of its line."""
        self._stop(sequence)
        self.preemptions += 1
        self._wait(self.accounts[sequence.tenant], sequence)

    def forget(self, sequence: S) -> None:
        """Takes what a sequence has computed out of the prefix cache; what it found there stays."""
        self.cache.forget(self._cache_keys(sequence)[sequence.reused // self.page_size :])

    def reservable(self, tokens: int) -> bool:
        """Whether `reserve` gets pages for that many tokens."""
        return self.pages_for(tokens) <= max(map(self._available, range(self.pages.regions)))

    def reserve(self, tokens: int) -> tuple[list[int], np.ndarray]:
        """Pages for that many tokens, and their table row int32 [table_size]. CapacityError when they are not free."""
        needed, region = self.pages_for(tokens), max(range(self.pages.regions), key=self._available)
        if needed > (free := self.pages.free_in(region)):
            self.cache.evict(needed - free, None, region=region)
        pages = self.pages.allocate(needed, region)
        table = np.zeros(self._table_size, np.int32)
        table[: len(pages)] = pages
        return pages, table

    # -- batches

    def next_batch(self, drafts: Callable[[list[S]], dict[str, tuple[int, ...]]] | None = None) -> list[Row[S]]:
        """The rows of the next forward, pages for them taken; at most one Row per running sequence.

        Empty only when none is running, or all that run wait for their last token to be read. `drafts` proposes, for
        the sequences that decode, tokens by sequence id.
        """
        decoding, chunks = self._parts()
        proposed = drafts([row.sequence for row in decoding]) if drafts is not None and decoding else {}
        rows: list[Row[S]] = []
        for row in decoding:
            s = row.sequence
            more = proposed.get(s.id, ())[: s.limit - s.length - 1]
            if s.slot is None:  # preempted for one before it
                continue
            if self._cover(s, row.stop + len(more)):
                rows.append(Row(s, row.start, row.stop, row.samples, row.unread, more))
        for row in chunks:
            if row.sequence.slot is not None and self._cover(row.sequence, row.stop):
                rows.append(row)
        return [row for row in rows if row.sequence.slot is not None]

    def dispatched(self, row: Row[S]) -> int:
        """Notes that a row is on its way: its tokens count as cached, and as its tenant's service. Returns how many of
        them are of its prompt and are computed for the first time."""
        s = row.sequence
        s.cached = row.stop
        if row.samples:
            s.drawn += 1
        new = max(0, min(row.stop, s.prompt_length) - s.served)
        s.served = max(s.served, row.stop)
        self.accounts[s.tenant].serve(new, 0)
        self._publish(s)
        return new

    def generated(self, sequence: S, tokens: int) -> None:
        """Notes that a sequence came by new tokens, as its tenant's service."""
        account = self.accounts[sequence.tenant]
        account.serve(0, tokens)
        sequence.served = max(sequence.served, sequence.length)

    # -- the rest is private

    def _parts(self) -> tuple[list[Row[S]], list[Row[S]]]:
        """Rows of one token each, then parts of prompts within the budget: of each a share, then more as long as there
        is room."""
        decoding: list[Row[S]] = []
        lines: dict[str, list[S]] = {}
        for s in self.running:
            if s.total == s.cached or (s.drawn and s.total == s.limit):
                continue  # its last token is on its way
            if s.total - s.cached == 1:
                decoding.append(Row(s, s.cached, s.total, samples=True, unread=s.total > s.length))
            else:
                lines.setdefault(s.tenant, []).append(s)
        order = sorted(lines, key=lambda name: self.accounts[name].counter) if self._fair else list(lines)
        line = [lines[name] for name in order]
        turns = list(_in_turns(line)) if self._fair else [s for one in line for s in one]
        stops: dict[str, int] = {}
        budget = self._prefill_budget
        for share in (max(self.chunk, self._prefill_budget // 4), self._prefill_budget):
            for s in turns:
                at = stops.get(s.id, s.cached)
                stop = self._end_of_part(s, at, share if s.id not in stops else budget, budget, bool(stops))
                if stop > at:
                    budget -= self._padded(stop - s.cached) - (self._padded(at - s.cached) if at > s.cached else 0)
                    stops[s.id] = stop
        chunks = [Row(s, s.cached, stops[s.id], samples=stops[s.id] == s.total) for s in turns if s.id in stops]
        return decoding, chunks

    def _end_of_part(self, sequence: S, at: int, share: int, budget: int, others: bool) -> int:
        """How far a prompt may be computed from `at` on with so many padded tokens; a chunk if there are no others."""
        left = min(share, budget)
        if self._padded(sequence.total - at) <= left:
            return sequence.total
        stop = (at + max(left, 0)) // self.chunk * self.chunk
        if stop <= at:
            return at if others else min(sequence.total, (at // self.chunk + 1) * self.chunk)
        return min(stop, sequence.total)

    def _wait(self, account: Account[S], sequence: S) -> None:
        if not account.waiting:
            self._lift(account)
        bisect.insort(account.waiting, sequence, key=lambda s: (-s.priority, self._arrived[s.id]))

    def _leave_line(self, account: Account[S], sequence: S) -> None:
        account.waiting.remove(sequence)
        if not account.waiting:
            self._served_last = account

    def _lift(self, account: Account[S]) -> None:
        """Nothing is saved up while one has no use for it, or a tenant could come back and have everything to itself:
        its counter starts at the least of those that wait or, if none does, where the last of them is."""
        others = [other.counter for other in self.accounts.values() if other.waiting and other is not account]
        last = account if self._served_last is None else self._served_last
        account.counter = max(account.counter, min(others, default=last.counter))

    def _startable(self, admitted: list[S], swaps: int) -> tuple[S, S | None, bool, int] | None:
        """Who can start now: the first in line of a tenant, of the one that was served least if it can. With it, whom
        it takes the place of if it must, whether because its tenant is behind, and the region it starts in.

        One that has a slot but no pages holds up those after it: they would take what it waits for.
        """
        # One whose last token is on its way must be read first.
        lines = [a for a in self.accounts.values() if a.waiting and not a.waiting[0].drawn]
        order = sorted(lines, key=lambda a: (a.counter if self._fair else 0, self._arrived[a.waiting[0].id]))
        for account in order:
            sequence = account.waiting[0]
            if not self._below_ceiling(account, sequence):
                self._lift(account)  # it is not the others who keep it waiting
                continue
            if (region := self._free_region(sequence)) is not None:
                return sequence, None, False, region
            victim, behind = self._victim(account, admitted, swaps) if self._fair else (None, False)
            if victim is not None and self._affordable(sequence, victim.region, len(victim.pages)):
                return sequence, victim, behind, victim.region
            if self._free_slots or not self._fair:
                return None
        return None

    def _available(self, region: int) -> int:
        return self.pages.free_in(region) + self.cache.evictable_in(region)

    def _free_region(self, sequence: S) -> int | None:
        """Of those with a free slot and pages for it, the region where it is to start."""
        free = {slot // self._slots_of_region for slot in self._free_slots}
        regions = [region for region in sorted(free) if self._affordable(sequence, region)]
        if len(regions) < 2:
            return regions[0] if regions else None

        def cached(region: int) -> int:
            return self.cache.held(self._cache_keys(sequence, region))

        if sequence.first_key is not None:
            self._extend_keys(sequence)
        return max(regions, key=lambda region: (cached(region), self._available(region), -self._running_in(region)))

    def _running_in(self, region: int) -> int:
        return sum(s.region == region for s in self.running)

    def _affordable(self, sequence: S, region: int, returned: int = 0) -> bool:
        """Whether pages for what it has, and one for each that runs there to go on with, could be had now."""
        running = [s for s in self.running if s.region == region]
        if not running:
            return True  # and what runs alone gets all
        promised = sum(max(0, self.pages_for(s.total) - len(s.pages)) for s in running)
        needed = self.pages_for(sequence.length) + promised + len(running)
        return needed <= self._available(region) + returned

    def _below_ceiling(self, account: Account[S], sequence: S) -> bool:
        """The same of the pages that its tenant may have."""
        ceiling = account.tenant.max_pages
        if ceiling is None or not account.running:
            return True
        held = sum(max(self.pages_for(s.total), len(s.pages)) for s in account.running)
        return held + len(account.running) + self.pages_for(sequence.length) <= ceiling

    def _victim(self, account: Account[S], spared: list[S], swaps: int) -> tuple[S | None, bool]:
        """The sequence, none of `spared`, that fairness takes a slot from in favour of a tenant, and whether it does
        because that tenant is behind, which happens `swaps` times."""
        others = [a for a in self.accounts.values() if a is not account and any(s not in spared for s in a.running)]
        if not others:
            return None, False
        # One that had more than those it would take from is not short of service.
        several = [a for a in others if len(a.running) > 1 and account.counter - a.counter <= self._quantum]
        if several and not account.running:
            crowded = max(several, key=lambda a: (len(a.running) / a.tenant.weight, a.counter))
            return self._last(crowded, spared), False
        ahead = max(others, key=lambda a: a.counter)
        share, mine = len(ahead.running) / ahead.tenant.weight, len(account.running) / account.tenant.weight
        if swaps and ahead.counter - account.counter > self._quantum and share >= mine:
            return self._last(ahead, spared), True
        return None, False

    def _last(self, account: Account[S], spared: list[S]) -> S:
        """Of the least priority, the one that came last."""
        return min((s for s in account.running if s not in spared), key=lambda s: (s.priority, -self._arrived[s.id]))

    def _stop(self, sequence: S) -> None:
        assert sequence.slot is not None
        self.running.remove(sequence)
        self.accounts[sequence.tenant].running.remove(sequence)
        self._free_slots.append(sequence.slot)
        self.cache.touch(self._cache_keys(sequence))
        self.pages.release(sequence.pages)
        sequence.slot, sequence.pages, sequence.cached, sequence.published = None, [], 0, 0

    def _cover(self, sequence: S, tokens: int) -> bool:
        """Gets the pages that a sequence needs for that many tokens; if need be from others. False if it had to go."""
        needed = self.pages_for(tokens) - len(sequence.pages)
        if needed <= 0:
            return True
        account = self.accounts[sequence.tenant]
        ceiling = account.tenant.max_pages
        if ceiling is not None:
            while (over := len(self._charged(account)) + needed - ceiling) > 0:
                if self.cache.evict(over, sequence.tenant, own_only=True):
                    continue
                victim = self._last(account, [])
                self.preempt(victim)
                if victim is sequence:
                    return False
        region = sequence.region
        while needed > (free := self.pages.free_in(region)):
            if self.cache.evict(needed - free, sequence.tenant, region=region):
                continue
            victim = self._poorest(region)
            self.preempt(victim)
            if victim is sequence:
                return False
        for page in self.pages.allocate(needed, region):
            sequence.table[len(sequence.pages)] = page
            sequence.pages.append(page)
        return True

    def _poorest(self, region: int) -> S:
        """Who gives up its pages of a region: the last to come, of the tenant that had most of those with several
        sequences."""
        there = [s for s in self.running if s.region == region]
        if not self._fair:
            return max(there, key=lambda s: self._arrived[s.id])
        accounts = [self.accounts[name] for name in dict.fromkeys(s.tenant for s in there)]
        several = [a for a in accounts if len(a.running) > 1]
        elsewhere = [s for s in self.running if s.region != region]
        return self._last(max(several or accounts, key=lambda a: a.counter), elsewhere)

    def _charged(self, account: Account[S]) -> set[int]:
        """Pages that count against a tenant's ceiling."""
        return self.cache.owned(account.name).union(*(s.pages for s in account.running))

    def _reuse(self, sequence: S) -> None:
        """Starts a sequence with the pages of its tokens that the prefix cache has; at least one token is computed."""
        if sequence.first_key is None:
            return
        self._extend_keys(sequence)
        most = (sequence.length - 1) // self.page_size
        sequence.pages = pages = self.cache.match(self._cache_keys(sequence)[:most])
        sequence.table[: len(pages)] = pages
        sequence.cached = sequence.reused = len(pages) * self.page_size
        sequence.served = max(sequence.served, sequence.cached)

    def _publish(self, sequence: S) -> None:
        """Offers the full pages of a sequence to the prefix cache."""
        if sequence.first_key is None:
            return
        full = min(sequence.cached, sequence.length) // self.page_size
        if full <= sequence.published:
            return
        self._extend_keys(sequence)
        keys, public = self._cache_keys(sequence), len(sequence.public_keys)
        for i in range(sequence.published, full):
            self.cache.put(keys[i], sequence.pages[i], None if i < public else sequence.tenant)
        sequence.published = full

    def _cache_keys(self, sequence: S, region: int | None = None) -> list[bytes]:
        """What its full pages are found under, in its region or another: the public keys as far as its prefix is
        public, then the tenant's."""
        keys = sequence.public_keys + sequence.keys[len(sequence.public_keys) :]
        if self.pages.regions == 1:
            return keys
        where = (sequence.region if region is None else region).to_bytes(4, "big")
        return [key + where for key in keys]

    def _extend_keys(self, sequence: S) -> None:
        """Computes the keys of full pages of known tokens, under the tenant's salt, and under the public one as far as
        the prefix is public."""
        size = self.page_size
        salt = self._salts[sequence.tenant]
        assert sequence.first_key is not None
        key = sequence.keys[-1] if sequence.keys else sequence.first_key
        for at in range(len(sequence.keys) * size, sequence.length - size + 1, size):
            key = next_key(key, sequence.tokens[at : at + size], salt)
            sequence.keys.append(key)
        public = sequence.public_keys
        if not self.cache.public:
            return
        while (at := len(public) * size) + size <= sequence.length:
            before = public[-1] if public else sequence.first_key
            key = next_key(before, sequence.tokens[at : at + size], self.cache.public_salt)
            if key not in self.cache.public:
                break
            public.append(key)


def _in_turns(lines: list[list[S]]) -> Iterator[S]:
    """The first of each line, then the second of each, and so on."""
    for i in range(max(map(len, lines), default=0)):
        yield from (line[i] for line in lines if i < len(line))
