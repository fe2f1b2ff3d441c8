"""Traces of requests through the real Scheduler, without a model: for tests, and to size a machine before it is there.

    trace = [Arrival(at=0.1 * i, tenant="acme", prompt=400, output=100) for i in range(500)]
    found = simulate(trace, [Tenant("acme"), Tenant("zeta")], slots=8, pages=512)
    print(found.tenants["acme"].first_token_p95, found.most_pages, found.worst_gap)

Only time is made up: a step lasts what StepModel says. Who runs, what is computed, reused and preempted is decided by
the code that serves, driven as HostLoop drives it: the host forms a batch before it reads the one that runs.
"""

import hashlib
import math
import statistics
from bisect import bisect_right
from collections import deque
from collections.abc import Iterable, Mapping
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass, replace

import numpy as np

from realm_jax.engine.allocator import PageAllocator
from realm_jax.engine.buckets import PACKED_SIZES, PREFILL_TOKENS, Buckets
from realm_jax.engine.scheduler import Row, Scheduler
from realm_jax.engine.sequence import Sequence
from realm_jax.engine.tenants import DECODE_COST, DEFAULT_TENANT, PREFILL_COST, Account, Tenant
from realm_jax.errors import InvalidRequestError, QuotaError

_TOKEN = 0  # what is generated: only how many tokens there are matters


@dataclass(frozen=True)
class Arrival:
    """A request of a trace.

    Attributes:
      at: seconds from the start.
      tenant: name of one of the tenants.
      prompt: token ids, or how many: other ones for every request, but for a prefix.
      output: tokens it generates; it never stops earlier.
      priority: among its tenant's requests.
      prefix: names what its prompt begins with: requests of a tenant with the same name begin with the same tokens.
      prefix_tokens: how many those are.
      cache: whether it may use the prefix cache.
    """

    at: float = 0.0
    tenant: str = DEFAULT_TENANT
    prompt: int | SequenceOf[int] = 128
    output: int = 128
    priority: int = 0
    prefix: str | None = None
    prefix_tokens: int = 0
    cache: bool = True


@dataclass(frozen=True)
class StepModel:
    """Seconds of a step: decoding rows are one program and chunks of prompts another, so that their times add up.

    The defaults were measured with a 1B shape in Q4_K on two cores of a server's processor.

    Attributes:
      decode_1, decode_8: a step that decodes 1 request, and 8; linear between and beyond.
      prefill: tokens of prompts a second, padding included.
      overhead: added to every step.
    """

    decode_1: float = 0.021
    decode_8: float = 0.052
    prefill: float = 270.0
    overhead: float = 0.0

    def seconds(self, decode_rows: int, prefill_tokens: int) -> float:
        """Of a step with so many rows of one token, and so many tokens of prompts, padded."""
        decode = self.decode_1 + (decode_rows - 1) * (self.decode_8 - self.decode_1) / 7 if decode_rows else 0.0
        return self.overhead + decode + prefill_tokens / self.prefill


@dataclass(frozen=True)
class Outcome:
    """What became of a request. Seconds are from the start of the trace; None: it did not come to that.

    Attributes:
      started: when it was first given a slot. first_token, ended: when the host had its first and its last token.
      waited: steps that began after it came and before the first one that computed something of it.
      prefilled: steps from that one to the one its first token came of, both counted.
      reused: tokens of its prompt found in the prefix cache.
      refused: why its tenant's quota did not let it in; "" if it did.
    """

    arrival: Arrival
    started: float | None = None
    first_token: float | None = None
    ended: float | None = None
    waited: int | None = None
    prefilled: int | None = None
    reused: int = 0
    refused: str = ""

    @property
    def queue(self) -> float | None:
        return None if self.started is None else self.started - self.arrival.at

    @property
    def time_to_first_token(self) -> float | None:
        return None if self.first_token is None else self.first_token - self.arrival.at


@dataclass(frozen=True)
class TenantOutcome:
    """What a tenant got.

    Attributes:
      requests, ended, refused: how many it sent, and of those, how many came to their end or were not let in.
      prompt_tokens, reused_tokens, generated_tokens: computed, taken from the prefix cache, and generated.
      service: prompt and generated tokens with the costs of VTC, not divided by its weight.
      first_token_p50, first_token_p95: seconds from arrival to the first token; None where there were none.
      tokens_per_second: generated, from its first arrival to its last token.
    """

    requests: int
    ended: int
    refused: int
    prompt_tokens: int
    reused_tokens: int
    generated_tokens: int
    service: float
    first_token_p50: float | None
    first_token_p95: float | None
    tokens_per_second: float


@dataclass(frozen=True)
class Simulation:
    """What a trace came to.

    Attributes:
      requests: one Outcome for each arrival, in the trace's order. tenants: by name.
      seconds: until the last token. busy: of those, the device was.
      steps: batches run. preemptions: requests that lost their slot for a while.
      worst_gap, gap_bound: of virtual tokens between tenants that wait (see Scheduler.gap), at the worst moment.
      most_pages: most pages of the cache that running requests held at once. pages: there were.
    """

    requests: tuple[Outcome, ...]
    tenants: Mapping[str, TenantOutcome]
    seconds: float
    busy: float
    steps: int
    preemptions: int
    worst_gap: float
    gap_bound: float
    most_pages: int
    pages: int


def simulate(
    trace: SequenceOf[Arrival],
    tenants: Iterable[Tenant] = (),
    *,
    slots: int = 8,
    pages: int = 512,
    costs: StepModel | None = None,
    page_size: int = 64,
    chunk: int = PACKED_SIZES[-1],
    prefill_budget: int = PREFILL_TOKENS,
    context_length: int | None = None,
    fair: bool = True,
    until: float = math.inf,
) -> Simulation:
    """Runs a trace: the same arguments, the same result.

    Args:
      trace: in any order; of those that come at the same time, the first in the trace is the first in line.
      tenants: who sends them; none: one tenant, "default". Quotas count in the trace's own time.
      slots: most requests running at once. pages: of the cache, of `page_size` tokens each.
      costs: None: StepModel().
      chunk: texts are cut at, and padded to, multiples of it. prefill_budget: most tokens of prompts in a step.
      context_length: most tokens of a request; None: what the pages hold.
      fair: False: first come, first served.
      until: seconds after which to stop, with what there is then.

    Raises:
      InvalidRequestError: an arrival that cannot be, or of an unknown tenant. CapacityError: one that never fits.
    """
    for name, value in (("slots", slots), ("pages", pages), ("page_size", page_size), ("chunk", chunk)):
        if value < 1:
            raise InvalidRequestError(f"{name} is {value}; accepted: an integer >= 1")
    buckets = replace(Buckets.up_to(slots, packed=True), tokens=(1, chunk))
    longest = pages * page_size if context_length is None else context_length
    scheduler: Scheduler[_Simulated] = Scheduler(
        PageAllocator(pages),
        slots=slots,
        page_size=page_size,
        table_size=-(-longest // page_size),
        chunk=chunk,
        padded=buckets.padded,
        prefill_budget=prefill_budget,
        tenants=tenants,
        fair=fair,
    )
    return _Run(scheduler, trace, StepModel() if costs is None else costs, buckets, until).result()


class _Simulated(Sequence):
    """A request on its way, and when what happened to it."""

    def __init__(self, arrival: Arrival, prompt: np.ndarray):
        super().__init__(
            prompt, len(prompt) + arrival.output, tenant=arrival.tenant, priority=arrival.priority, cache=arrival.cache
        )
        self.came_after = 0  # steps that had begun when it came
        self.started: float | None = None
        self.first_reused = 0
        self.first_row: int | None = None  # the step that computed something of it first
        self.last_row: int | None = None  # the one its first token came of
        self.first_token: float | None = None
        self.ended: float | None = None
        self.refused = ""


@dataclass
class _Step:
    """A batch on its way, and when it ends."""

    rows: list[Row[_Simulated]]
    ends: float


class _Run:
    """One simulation: HostLoop's steps with a clock of its own."""

    def __init__(
        self,
        scheduler: Scheduler[_Simulated],
        trace: SequenceOf[Arrival],
        costs: StepModel,
        buckets: Buckets,
        until: float,
    ):
        self._scheduler = scheduler
        self._costs = costs
        self._buckets = buckets
        self._until = until
        self._now = 0.0
        self._trace = trace
        self._requests = [self._checked(arrival, i) for i, arrival in enumerate(trace)]
        self._coming = deque(sorted(range(len(trace)), key=lambda i: trace[i].at))
        for account in scheduler.accounts.values():  # their quotas in the trace's time
            scheduler.accounts[account.name] = Account(account.tenant, lambda: self._now)
        self._spent = {name: [0, 0, 0] for name in scheduler.accounts}  # prompt, reused, generated tokens
        self._flight: _Step | None = None
        self._begun: list[float] = []  # when each step began
        self._device_free = self._busy = self._last = 0.0
        self._worst_gap = 0.0
        self._most_pages = 0

    def result(self) -> Simulation:
        while self._now < self._until:
            self._take_in()
            if not self._step():
                if not self._coming:
                    assert not self._scheduler.waiting
                    break
                self._now = max(self._now, self._trace[self._coming[0]].at)
        s = self._scheduler
        outcomes = tuple(map(self._outcome, self._trace, self._requests))
        return Simulation(
            requests=outcomes,
            tenants={name: self._of_tenant(name, outcomes) for name in s.accounts},
            seconds=self._last,
            busy=self._busy,
            steps=len(self._begun),
            preemptions=s.preemptions,
            worst_gap=self._worst_gap,
            gap_bound=s.gap_bound(),
            most_pages=self._most_pages,
            pages=s.pages.total,
        )

    def _checked(self, arrival: Arrival, number: int) -> _Simulated:
        a = arrival
        count = a.prompt if isinstance(a.prompt, int) else len(a.prompt)
        shared = a.prefix_tokens if a.prefix is not None else 0
        for name, value, low, high in (
            ("at", a.at, 0, math.inf),
            ("prompt", count, 1, math.inf),
            ("output", a.output, 1, math.inf),
            ("prefix_tokens", shared, 0, count),
        ):
            if not low <= value <= high:
                raise InvalidRequestError(f"arrival {number}: {name} is {value}; accepted: {low} to {high}")
        self._scheduler.check(count + a.output, a.tenant)
        prompt = _tokens(f"request {number}", count) if isinstance(a.prompt, int) else np.array(a.prompt, np.int32)
        if shared:
            prompt[:shared] = _tokens(f"prefix {a.prefix}", shared)
        return _Simulated(a, prompt)

    # -- as HostLoop does

    def _take_in(self) -> None:
        while self._coming and self._trace[self._coming[0]].at <= self._now:
            i = self._coming.popleft()
            request, account = self._requests[i], self._scheduler.accounts[self._trace[i].tenant]
            request.came_after = bisect_right(self._begun, self._trace[i].at)
            try:
                account.check_quota(1)
            except QuotaError as error:
                request.refused = str(error)
                continue
            account.opened(1)
            self._scheduler.submit(request)

    def _step(self) -> bool:
        """Dispatches a batch and reads the one before it; False when there is nothing to do."""
        scheduler = self._scheduler
        for request in scheduler.admit():
            if request.started is None:
                request.started = self._now
                request.first_reused = request.reused
                self._spent[request.tenant][1] += request.reused
        self._worst_gap = max(self._worst_gap, scheduler.gap())
        rows = scheduler.next_batch() if scheduler.running else []
        if not rows and self._flight is None:
            return False
        flight = self._dispatch(rows) if rows else None
        self._read()
        self._flight = flight
        return True

    def _dispatch(self, rows: list[Row[_Simulated]]) -> _Step:
        number = len(self._begun)
        lengths = [row.stop - row.start for row in rows]
        prefill = sum(self._buckets.padded(n) for n in lengths if n > 1)
        seconds = self._costs.seconds(lengths.count(1), prefill)
        begins = max(self._now, self._device_free)
        self._device_free = begins + seconds
        self._busy += seconds
        self._begun.append(begins)
        held: set[int] = set().union(*(s.pages for s in self._scheduler.running))
        self._most_pages = max(self._most_pages, len(held))
        for row in rows:
            s = row.sequence
            s.first_row = number if s.first_row is None else s.first_row
            if row.samples and s.last_row is None:
                s.last_row = number
            new = self._scheduler.dispatched(row)
            self._spent[s.tenant][0] += new
            self._scheduler.accounts[s.tenant].spend(new)
        return _Step(rows, self._device_free)

    def _read(self) -> None:
        """Waits for the batch that runs and takes its tokens."""
        step, self._flight = self._flight, None
        if step is None:
            return
        self._now = self._last = step.ends
        for row in step.rows:
            request = row.sequence
            if not row.samples:
                continue
            request.drawn -= 1
            request.append(_TOKEN)
            self._scheduler.generated(request, 1)
            self._spent[request.tenant][2] += 1
            account = self._scheduler.accounts[request.tenant]
            account.spend(1)
            if request.first_token is None:
                request.first_token = self._now
            if request.length == request.limit:
                request.ended = self._now
                account.open -= 1
                self._scheduler.remove(request)

    # -- what came of it

    def _outcome(self, arrival: Arrival, request: _Simulated) -> Outcome:
        waited = prefilled = None
        if request.first_row is not None:
            waited = request.first_row - request.came_after
            prefilled = None if request.last_row is None else request.last_row - request.first_row + 1
        return Outcome(
            arrival=arrival,
            started=request.started,
            first_token=request.first_token,
            ended=request.ended,
            waited=waited,
            prefilled=prefilled,
            reused=request.first_reused,
            refused=request.refused,
        )

    def _of_tenant(self, name: str, outcomes: tuple[Outcome, ...]) -> TenantOutcome:
        mine = [one for one in outcomes if one.arrival.tenant == name]
        prompt, reused, generated = self._spent[name]
        firsts = sorted(one.time_to_first_token for one in mine if one.time_to_first_token is not None)
        ends = [self._last if one.ended is None else one.ended for one in mine if one.started is not None]
        span = max(ends) - min(one.arrival.at for one in mine) if ends else 0.0
        return TenantOutcome(
            requests=len(mine),
            ended=sum(one.ended is not None for one in mine),
            refused=sum(bool(one.refused) for one in mine),
            prompt_tokens=prompt,
            reused_tokens=reused,
            generated_tokens=generated,
            service=PREFILL_COST * prompt + DECODE_COST * generated,
            first_token_p50=statistics.median(firsts) if firsts else None,
            first_token_p95=firsts[math.ceil(0.95 * len(firsts)) - 1] if firsts else None,
            tokens_per_second=generated / span if span > 0 else 0.0,
        )


def _tokens(name: str, count: int) -> np.ndarray:
    """int32 [count], other ones for every name, and always the same."""
    seed = int.from_bytes(hashlib.blake2b(name.encode(), digest_size=8).digest(), "little")
    return np.random.default_rng(seed).integers(0, 1 << 31, count, np.int64).astype(np.int32)
