"""The host loop: admits requests, runs batches, hands out what they produce.

It has no thread of its own. Whoever waits for a request drives the loop, one step at a time, and a step serves every
request there is; with several threads, one drives while the others wait for the end of its step. An Engine lends it a
thread that drives for all (`serve`).

The host is one step behind the device: a step is dispatched before the tokens of the one before it are read, whose
drawn tokens it takes from the device. What was computed for a request that turns out to have ended is dropped. Requests
whose next step depends on the last token in ways that only the host knows (a grammar, drafts) are read first.
"""

import logging
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

import jax
import numpy as np

from realm_jax.engine.adapters import RequestAdapters
from realm_jax.engine.allocator import PageAllocator
from realm_jax.engine.buckets import PREFILL_TOKENS, Buckets
from realm_jax.engine.ledger import Ledger, Spent
from realm_jax.engine.prefix import chain, first_key
from realm_jax.engine.request import Request
from realm_jax.engine.sampler import Drawn, DrawRow, Sampler
from realm_jax.engine.scheduler import Row, Scheduler
from realm_jax.engine.speculation import accepted
from realm_jax.engine.speculator import Speculator
from realm_jax.engine.stats import LoopStats
from realm_jax.engine.tenants import Tenant
from realm_jax.errors import CapacityError, InvalidRequestError, RealmError
from realm_jax.interrupt import interrupt_deferred
from realm_jax.lora import AdapterStore
from realm_jax.results import Piece
from realm_jax.sampling import BAD_LOGITS, NO_TOKEN

_log = logging.getLogger(__name__)
T = TypeVar("T")


class Batches(Protocol):
    """What the loop needs of a runner; see realm_jax.engine.runner."""

    max_batch: int
    chunk: int
    page_size: int
    num_pages: int
    regions: int
    max_pages_per_slot: int
    vocab_size: int
    buckets: Buckets

    @property
    def compiled(self) -> int: ...

    def parts(
        self,
        tokens: Sequence[np.ndarray],
        starts: Sequence[int],
        tables: np.ndarray,
        *,
        source: np.ndarray | None = None,
        last_tokens: jax.Array | None = None,
        stacks: Any = None,
        slots: np.ndarray | None = None,
    ) -> list[tuple[list[int], jax.Array]]: ...

    def reset(self) -> None: ...


@dataclass
class Flight:
    """A batch on its way.

    rows: of the batch; at: where among the runner's rows each begins. drawn: for which of those, and what. counted: the
    sampler has counted what was drawn, and the next step can take it from the device. began: when it was dispatched.
    timed: it is a step of decoding alone and compiled nothing, so that its time tells what such a step costs.
    """

    rows: list[Row[Request]]
    at: list[int]
    drawn: list[tuple[list[int], Drawn]]
    counted: bool
    began: float
    timed: bool


class HostLoop:
    """Runs requests over one runner. All methods may be called from any thread."""

    def __init__(
        self,
        runner: Batches,
        *,
        tenants: Iterable[Tenant] = (),
        queue_limit: int | None = None,
        adapters: AdapterStore | None = None,
        speculator: Speculator | None = None,
        ledger: Ledger | None = None,
    ):
        """
        Args:
          runner: runs the batches.
          tenants: see Scheduler.
          queue_limit: most requests that may wait, except that each tenant may always have its equal share of them;
            None: no bound.
          adapters: None: no adapters.
          speculator: proposes drafts for requests that want them; None: nobody does.
          ledger: None: one in memory.
        """
        self._runner: Batches | None = runner
        self._sampler = Sampler(runner.max_batch, runner.vocab_size)
        self._queue_limit = queue_limit
        self.adapters = RequestAdapters(adapters)
        self._speculator = speculator
        self.ledger = ledger if ledger is not None else Ledger()
        self.scheduler: Scheduler[Request] = Scheduler(
            PageAllocator(runner.num_pages, runner.regions),
            slots=runner.max_batch,
            page_size=runner.page_size,
            table_size=runner.max_pages_per_slot,
            chunk=runner.chunk,
            padded=runner.buckets.padded,
            prefill_budget=PREFILL_TOKENS,
            tenants=tenants,
        )
        # Guards the fields below; notified at the end of every step. The scheduler, the sampler and the flight belong
        # to whoever drives, or, while nobody does, to whoever holds this.
        self._changed = threading.Condition()
        self._driving = False
        self._closed = False
        self._abandoned = False
        self._submitted: list[Request] = []
        self._cancelled: list[Request] = []
        self._open = 0  # requests that were submitted and have not ended
        self._exclusive = 0  # threads in `exclusively`: until they are through, only they drive, and nobody is admitted
        self._flight: Flight | None = None
        self._deadlines: list[Request] = []
        self._ledger_fails = False
        self._landed = 0.0  # when the last flight was read
        self._steps = 0
        self._totals = Spent()
        self._drafted = self._accepted = 0

    def submit(self, requests: list[Request]) -> None:
        """Queues requests, in this order.

        Raises:
          CapacityError: one of them could never run, its tenant is over its quota, or the queue is full.
          InvalidRequestError: the loop is closed, or a tenant is not known.
          AdapterError: an adapter is not loaded, or not for this tenant.
          None is queued then.
        """
        for request in requests:
            self.scheduler.check(request.limit, request.tenant)
        wanted = Counter(request.tenant for request in requests)
        with interrupt_deferred():  # an adapter that is taken must be given back
            try:
                for request in requests:
                    if request.adapter_name is not None:
                        self.adapters.pin(request, self.scheduler.account(request.tenant).tenant)
                with self._changed:
                    self._check_open()
                    for tenant, count in wanted.items():
                        self.scheduler.account(tenant).check_quota(count)
                    self._check_queue(wanted)
                    for tenant, count in wanted.items():
                        self.scheduler.account(tenant).opened(count)
                    for request in requests:
                        request.submitted()
                    self._open += len(requests)
                    self._submitted.extend(requests)
                    self._changed.notify_all()
            except BaseException:
                for request in requests:
                    if request.adapter is not None:
                        self.adapters.unpin(request)
                raise

    def pieces(self, request: Request) -> Iterator[Piece]:
        """The request's output as it comes, to the last piece; raises what ended it instead.

        Leaving the iterator early does not cancel the request.
        """
        while True:
            self._drive(self._step, until=lambda: request.ready)
            while request.pieces:
                yield request.pieces.popleft()
            if request.error is not None:
                raise request.error
            if request.done and not request.pieces:
                return

    def cancel(self, requests: list[Request]) -> None:
        """Ends those of the requests that go on. Their pages are free now or, if a step is running, after it."""
        with interrupt_deferred():
            with self._changed:
                self._cancelled.extend(requests)
                if self._driving:
                    return
                # A garbage collection in here may close another stream, and so cancel again: it must find us driving.
                self._driving = True
            self._stop_driving()

    def close(self, error: Exception | None = None) -> None:
        """Cancels everything, or fails it with an error, and lets go of the runner; after that the loop refuses
        requests. RealmError when the ledger cannot be written."""
        with interrupt_deferred():
            with self._changed:
                self._closed = True
                self._changed.notify_all()
                while self._driving:
                    self._changed.wait()
                self._driving = True
            try:
                self._take_in()
                for request in [*self.scheduler.waiting, *self.scheduler.running]:
                    request.cancel() if error is None else request.fail(error)
                    self._ended(request)
                self._runner = self._flight = None
                self.scheduler.cache.forget()
                try:
                    self._sampler.reset()
                finally:
                    self.ledger.close()
            finally:
                self._stop_driving()

    def serve(self) -> None:
        """Drives for everybody, until the loop is closed. If it cannot go on, everybody is told, and it is closed."""
        try:
            while not (self._closed or self._abandoned):
                self._drive(self._step, until=lambda: self._closed or self._abandoned or not self._busy())
                with self._changed:
                    while not (self._closed or self._abandoned or self._busy()):
                        self._changed.wait()
            if self._abandoned:
                self.close()
        except BaseException as error:
            _log.critical("the engine cannot go on, and is closed", exc_info=error)
            self.close(error if isinstance(error, Exception) else RealmError(f"the engine ended: {error!r}"))

    def abandon(self) -> None:
        """Lets the thread in `serve` close the loop; waits for nothing, and may be called within anything."""
        with self._changed:
            self._abandoned = True
            self._changed.notify_all()

    def exclusively(self, tokens: int, work: Callable[[np.ndarray], T]) -> T:
        """work(table) between two steps, with pages for that many tokens; table is int32 [max_pages_per_slot].

        Raises:
          CapacityError: the cache never has so many.
          InvalidRequestError: the loop is closed.
        """
        self.scheduler.check(tokens)
        done: list[T] = []

        def turn() -> None:
            if not self.scheduler.reservable(tokens):
                self._step()  # those that run will end and give back theirs
                return
            pages, table = self.scheduler.reserve(tokens)
            try:
                done.append(work(table))
            except BaseException as error:
                if not isinstance(error, RealmError):  # that is a refusal, before anything was done on the device
                    self._fail_running(error)
                raise
            finally:
                self.scheduler.pages.release(pages)

        counted = False  # Ctrl-C may come before the count or after it, and a count too many stops everybody else
        try:
            with self._changed:
                self._check_open()
                self._exclusive += 1
                counted = True
            self._drive(turn, until=lambda: bool(done), exclusive=True)
        finally:
            with self._changed:
                self._exclusive -= counted
                self._changed.notify_all()
        return done[0]

    def load_adapter(self, name: str, path: Any, scale: float = 1.0) -> None:
        """Loads or replaces an adapter, also while requests run: those keep what they started with. AdapterError."""
        self.adapters.load(name, path, scale, self._check_open)

    def unload_adapter(self, name: str) -> None:
        """Requests that use it run to their end. AdapterError for one that is not loaded."""
        self.adapters.unload(name)

    def swap_model(self, change: Callable[[], T]) -> T:
        """change() while nothing runs or waits, and then nothing is cached any more: what was, was another model's.

        Raises InvalidRequestError where something does: those requests would end with another model than they began.
        """

        def work(table: np.ndarray) -> T:
            with self._changed:
                if self._open:
                    raise InvalidRequestError(f"{self._open} requests run or wait; accepted: none during a merge")
            done = change()
            self._flight = None
            self.scheduler.cache.forget()
            return done

        return self.exclusively(1, work)

    def publish_prefix(self, tokens: np.ndarray, adapter: str | None = None) -> int:
        """Lets all tenants share the cached pages of a prefix, int32 [T]; returns how many tokens its full pages hold.

        Whoever computes them first fills them.
        """
        content = b""
        if adapter is not None:
            with self.adapters.held(adapter) as handle:
                content = handle.cache_key()
        cache, size = self.scheduler.cache, self.scheduler.page_size
        keys = chain(first_key(content), tokens, size, cache.public_salt)
        with self._changed:
            cache.public |= set(keys)
        return len(keys) * size

    def stats(self) -> LoopStats:
        """A snapshot; taken between two steps, or a step old."""
        scheduler = self.scheduler
        names = self.adapters.names
        with self._changed:
            running = len(scheduler.running)
            return LoopStats(
                steps=self._steps,
                preemptions=scheduler.preemptions,
                running=running,
                waiting=self._open - running,
                pages_total=scheduler.pages.total,
                pages_free=scheduler.pages.free,
                pages_cached=len(scheduler.cache),
                prompt_tokens=self._totals.prompt_tokens,
                reused_tokens=self._totals.reused_tokens,
                generated_tokens=self._totals.completion_tokens,
                drafted=self._drafted,
                accepted=self._accepted,
                fairness_gap=scheduler.gap(),
                fairness_bound=scheduler.gap_bound(),
                adapters=names,
            )

    # -- driving

    def _drive(self, turn: Callable[[], None], until: Callable[[], bool], exclusive: bool = False) -> None:
        """Calls `turn`, whenever no other thread drives, or lets others drive, until `until()`."""
        while True:
            with self._changed:
                if until():
                    return
                if exclusive:
                    self._check_open()
                if self._driving or self._closed or (self._exclusive and not exclusive):
                    self._changed.wait()
                    continue
            with interrupt_deferred():
                with self._changed:
                    if self._driving:
                        continue
                    self._driving = True
                try:
                    self._take_in()
                    turn()
                finally:
                    self._stop_driving()

    def _stop_driving(self) -> None:
        try:
            while not self._stopped():  # cancelled during the step; nobody may come to do it later
                self._take_in()
        except BaseException:
            with self._changed:
                self._driving = False
                self._changed.notify_all()
            raise

    def _stopped(self) -> bool:
        """Lets others drive, unless there is something to cancel. What has ended lets go of its adapter, and who loads
        one may cancel: so that is not to be done while this holds the lock."""
        with self._changed:
            if self._cancelled:
                return False
            self._driving = False
            self._changed.notify_all()
            return True

    def _busy(self) -> bool:
        return self._open > 0 or bool(self._cancelled)

    def _check_queue(self, wanted: Mapping[str, int]) -> None:
        """CapacityError when so many more of each tenant are too many: a full queue has room for a tenant's share."""
        count, waiting = sum(wanted.values()), self._open - len(self.scheduler.running)
        if self._queue_limit is None or waiting + count <= self._queue_limit:
            return
        share = self._queue_limit // len(self.scheduler.accounts)
        accounts = {name: self.scheduler.account(name) for name in wanted}
        if any(a.open - len(a.running) + wanted[name] > share for name, a in accounts.items()):
            raise CapacityError(
                f"{waiting} requests wait and {count} more come; accepted: {self._queue_limit} in all, "
                f"or {share} of one tenant"
            )

    def _check_open(self) -> None:
        if self._closed:
            raise InvalidRequestError("the model was closed; load it again")

    def _take_in(self) -> None:
        """Queues what was submitted and removes what was cancelled since the last step."""
        with self._changed:
            submitted, self._submitted = self._submitted, []
            cancelled, self._cancelled = self._cancelled, []
        for request in submitted:
            self.scheduler.submit(request)
            if request.expires is not None:
                self._deadlines.append(request)
        for request in cancelled:
            if request.done:
                continue
            request.cancel()
            if request in self.scheduler:  # not where submitting it was refused or interrupted
                self._ended(request)

    def _ended(self, request: Request) -> None:
        """Takes a request that is done, and was submitted, out of the books."""
        self.scheduler.remove(request)
        if request.adapter is not None:
            self.adapters.unpin(request)
        if self._speculator is not None:
            self._speculator.release(request)
        with self._changed:
            self._open -= 1
            self.scheduler.account(request.tenant).open -= 1
        request.tell()

    # -- a step

    def _step(self) -> None:
        """Dispatches a batch and reads the one before it. What fails ends the requests that run, not the loop."""
        try:
            self._expire()
            if self._flight is not None and (
                not self._flight.counted or any(request.read_first for request in self.scheduler.running)
            ):
                self._land()
            if not self._exclusive:
                for request in self.scheduler.admit():
                    if request.admitted():
                        self._spend(request, reused=request.reused, requests=1)
                    self._sampler.bind(request)
            if not self.scheduler.running:
                self._land()
                return
            rows = self.scheduler.next_batch(self._drafts)
            flight = self._launch(rows) if rows else None
            self._land()
            self._flight = flight
        except Exception as error:
            self._fail_running(error)
        except BaseException as error:
            self._fail_running(error)
            raise

    def _expire(self) -> None:
        """Ends the requests whose time is up, with what they have."""
        if not self._deadlines:
            return
        now = time.perf_counter()
        for request in self._deadlines:
            if not request.done and request.expires is not None and request.expires <= now:
                request.expire()
                self._ended(request)
        self._deadlines = [request for request in self._deadlines if not request.done]

    def _drafts(self, decoding: list[Request]) -> dict[str, tuple[int, ...]]:
        wanting: list[Request] = []
        for request in decoding:
            if request.speculation is not None and request.drawn:  # the host runs ahead of it
                request.speculation.rest()
            elif request.speculation is not None:
                wanting.append(request)
        if self._speculator is None or not wanting:
            return {}
        return self._speculator.propose(wanting, len(decoding))

    def _masked(self, rows: list[Row[Request]]) -> list[tuple[Row[Request], list[np.ndarray | None]]]:
        """Rows with the masks of what they sample. A request whose grammar fails ends, and its neighbours go on."""
        masked = []
        for row in rows:
            request = row.sequence
            masks: list[np.ndarray | None] = [None]
            if row.samples and not request.done:  # a grammar that failed on drafts
                try:
                    masks = request.masks(row.drafts)
                except Exception as error:
                    request.fail(error)
            if request.done:
                self._ended(request)
            else:
                masked.append((row, masks))
        return masked

    def _launch(self, rows: list[Row[Request]]) -> Flight | None:
        """Dispatches one forward and the draws from it; None if no row is left of it."""
        assert self._runner is not None  # nothing runs in a closed loop
        masked = self._masked(rows)
        if not masked:
            return None
        rows = [row for row, _ in masked]
        began, compiled = time.perf_counter(), self._runner.compiled
        tokens: list[np.ndarray] = []
        starts: list[int] = []
        tables: list[np.ndarray] = []
        source: list[int] = []
        draws: list[DrawRow | None] = []
        owners: list[Request] = []
        at: list[int] = []
        for row, masks in masked:
            request = row.sequence
            at.append(len(tokens))
            for i in range(1 + len(row.drafts)):
                if i == 0:
                    tokens.append(np.zeros(1, np.int32) if row.unread else row.tokens)
                    source.append(request.slot if row.unread and request.slot is not None else -1)
                else:
                    tokens.append(np.asarray([row.drafts[i - 1]], np.int32))
                    source.append(-1)
                starts.append(row.start if i == 0 else row.stop + i - 1)
                tables.append(request.table)
                owners.append(request)
                draws.append(DrawRow(request, row.stop + i, row.drafts[:i], masks[i]) if row.samples else None)
        with self.adapters.placed(owners) as (stacks, slots):
            parts = self._runner.parts(
                tokens,
                starts,
                np.stack(tables),
                source=np.asarray(source, np.int32),
                last_tokens=self._sampler.last_tokens,
                stacks=stacks,
                slots=slots,
            )
        counted = not any(row.drafts for row in rows)
        drawn = []
        for members, logits in parts:
            wanted = [draws[i] if i >= 0 else None for i in members]
            if any(wanted):
                drawn.append((members, self._sampler.dispatch(logits, wanted, count=counted)))
        for row in rows:
            self._spend(row.sequence, prompt=self.scheduler.dispatched(row))
        self._steps += 1
        timed = self._runner.compiled == compiled and all(row.samples and len(row.tokens) <= 1 for row in rows)
        return Flight(rows, at, drawn, counted, began, timed)

    def _land(self) -> None:
        """Reads what the flight has drawn and gives it to the requests."""
        flight, self._flight = self._flight, None
        if flight is None or not flight.drawn:
            return
        drawn = {i: one for members, draws in flight.drawn for i, one in zip(members, draws.collect())}
        now = time.perf_counter()
        if self._speculator is not None and flight.timed:
            self._speculator.costs.observe(len(drawn), now - max(flight.began, self._landed))
        self._landed = now
        counts: list[tuple[int, int]] = []
        for row, at in zip(flight.rows, flight.at):
            request = row.sequence
            if not row.samples or request.done:  # a request may have ended while this was computed
                continue
            request.drawn -= 1
            results = [drawn[at + i] for i in range(1 + len(row.drafts))]
            good = accepted(row.drafts, [token for token, _ in results])
            before = request.length
            if row.drafts and request.speculation is not None:
                self._drafted += len(row.drafts)
                self._accepted += good
                if request.slot is not None:
                    request.cached = row.stop + good
                request.speculation.observe(len(row.drafts), good)
            for token, logprob in results[: good + 1]:
                self._accept(request, token, logprob)
                if request.done:
                    break
            taken = request.length - before
            if not flight.counted and request.slot is not None:
                counts += [(request.slot, int(token)) for token in request.tokens[before : request.length]]
            self.scheduler.generated(request, taken)
            self._spend(request, completion=taken)
        self._flush_ledger()
        if counts:
            self._sampler.accept(counts)
        for row in flight.rows:
            request = row.sequence
            if not request.done and (error := request.tell()) is not None:
                request.fail(error)
            if request.done and request in self.scheduler:
                self._ended(request)

    def _accept(self, request: Request, token: int, logprob: Any) -> None:
        """Gives a request its next token."""
        if token == BAD_LOGITS:
            request.fail(RealmError(f"the model's logits at position {request.length} are not finite numbers"))
            self.scheduler.forget(request)  # its keys and values may be as bad
            return
        if token == NO_TOKEN:
            request.fail(RealmError(f"the grammar allows no token at position {request.length}"))
            return
        try:
            request.accept(token, logprob)
        except Exception as error:  # of its own making: its neighbours go on
            request.fail(error)

    def _spend(
        self, request: Request, prompt: int = 0, completion: int = 0, reused: int = 0, requests: int = 0
    ) -> None:
        if not (prompt or completion or reused or requests):
            return
        with self._changed:  # others may be reading the quota
            self.scheduler.account(request.tenant).spend(prompt + completion)
        spent = Spent(prompt, reused, completion, requests)
        self._totals += spent
        self.ledger.add(request.tenant, spent)

    def _flush_ledger(self) -> None:
        """What cannot be written now is kept, and written as soon as it can."""
        try:
            self.ledger.flush()
            self._ledger_fails = False
        except RealmError as error:
            if not self._ledger_fails:
                _log.warning("%s; what is used is counted in memory until it can be", error)
            self._ledger_fails = True

    def _fail_running(self, error: BaseException) -> None:
        """Ends what runs: a failed call may have taken the cache with it. What waits starts afresh."""
        if not isinstance(error, Exception):
            error = RealmError(f"another thread was interrupted while this request ran: {type(error).__name__}")
        self._flight = None
        for request in list(self.scheduler.running):
            request.fail(error)
            self._ended(request)
        for request in self.scheduler.waiting:
            request.drawn = 0  # what was on its way is lost, and will be drawn again, the same
        self.scheduler.cache.forget()
        self._sampler.reset()
        if self._speculator is not None:
            self._speculator.reset()
        if self._runner is not None:
            self._runner.reset()
