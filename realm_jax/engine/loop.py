"""The host loop: admits requests, runs batches, hands out what they produce.

There is no thread of its own. Whoever waits for a request drives the loop, one step at a time, and a step serves every
request there is; with several threads, one drives while the others wait for the end of its step.
"""

import threading
from collections.abc import Callable, Iterator
from typing import Protocol, TypeVar

import jax
import numpy as np

from realm_jax.engine.allocator import PageAllocator
from realm_jax.engine.buckets import Buckets
from realm_jax.engine.request import Request
from realm_jax.engine.sampler import DrawRow, Sampler
from realm_jax.engine.scheduler import Row, Scheduler
from realm_jax.errors import InvalidRequestError, RealmError
from realm_jax.interrupt import interrupt_deferred
from realm_jax.results import Piece, TokenLogprob
from realm_jax.sampling import BAD_LOGITS

T = TypeVar("T")

# Chunks of prompts in one batch: more keeps the device busier, fewer lets those that are decoding go on sooner.
PREFILL_CHUNKS = 4


class Batches(Protocol):
    """What the loop needs of a runner; see realm_jax.engine.runner."""

    max_batch: int
    chunk: int
    page_size: int
    num_pages: int
    max_pages_per_slot: int
    vocab_size: int
    buckets: Buckets

    def step(self, tokens: list[np.ndarray], starts: list[int], tables: np.ndarray) -> jax.Array: ...


class HostLoop:
    """Runs requests over one runner. All methods may be called from any thread."""

    def __init__(self, runner: Batches):
        self._runner: Batches | None = runner
        self._sampler = Sampler(runner.max_batch, runner.vocab_size)
        self.scheduler: Scheduler[Request] = Scheduler(
            PageAllocator(runner.num_pages),
            slots=runner.max_batch,
            page_size=runner.page_size,
            table_size=runner.max_pages_per_slot,
            chunk=runner.chunk,
            padded=runner.buckets.token_bucket,
            prefill_budget=PREFILL_CHUNKS * runner.chunk,
        )
        # Guards the fields below; notified at the end of every step. The scheduler and the sampler belong to whoever
        # drives, or, while nobody does, to whoever holds this.
        self._changed = threading.Condition()
        self._driving = False
        self._closed = False
        self._submitted: list[Request] = []
        self._cancelled: list[Request] = []
        self._exclusive = 0  # threads in `exclusively`: until they are through, only they drive, and nobody is admitted

    def submit(self, requests: list[Request]) -> None:
        """Queues requests, in this order.

        Raises:
          CapacityError: one of them could never run; none is queued.
          InvalidRequestError: the loop is closed.
        """
        for request in requests:
            self.scheduler.check(request.limit)
        with self._changed:
            self._check_open()
            for request in requests:
                request.submitted()
            self._submitted.extend(requests)

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
        with interrupt_deferred(), self._changed:
            self._cancelled.extend(requests)
            if self._driving:
                return
            # A garbage collection in here may close another stream, and so cancel again: it must find us driving.
            self._driving = True
            self._stop_driving()

    def close(self) -> None:
        """Cancels everything and lets go of the runner; after that the loop refuses requests."""
        with interrupt_deferred(), self._changed:
            self._closed = True
            while self._driving:
                self._changed.wait()
            self._driving = True
            try:
                self._take_in()
                for request in [*self.scheduler.waiting, *self.scheduler.running]:
                    self.scheduler.remove(request)
                    request.cancel()
                self._runner = None
                self._sampler.reset()
            finally:
                self._stop_driving()

    def exclusively(self, tokens: int, work: Callable[[np.ndarray], T]) -> T:
        """work(table) between two steps, with pages for that many tokens; table is int32 [max_pages_per_slot].

        Raises:
          CapacityError: the cache never has so many.
          InvalidRequestError: the loop is closed.
        """
        self.scheduler.check(tokens)
        done: list[T] = []

        def turn() -> None:
            if self.scheduler.pages_for(tokens) > self.scheduler.pages.free:
                self._step()  # those that run will end and give back theirs
                return
            pages, table = self.scheduler.reserve(tokens)
            try:
                done.append(work(table))
            except BaseException as error:
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
        with self._changed:
            try:
                while self._cancelled:  # during the step; nobody may come to do it later
                    self._take_in()
            finally:
                self._driving = False
                self._changed.notify_all()

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
        for request in cancelled:
            if request.done:
                continue
            if request in self.scheduler:  # not where submitting it was refused or interrupted
                self.scheduler.remove(request)
            request.cancel()

    def _step(self) -> None:
        """One batch. What fails in it ends the requests that run, not the loop."""
        try:
            if not self._exclusive:
                for request in self.scheduler.admit():
                    request.admitted()
                    self._sampler.bind(request)
            rows = self.scheduler.next_batch()
            if rows:
                self._run(rows)
        except Exception as error:
            self._fail_running(error)
        except BaseException as error:
            self._fail_running(error)
            raise

    def _run(self, rows: list[Row[Request]]) -> None:
        assert self._runner is not None  # nothing runs in a closed loop
        tables = np.stack([row.sequence.table for row in rows])
        logits = self._runner.step([row.tokens for row in rows], [row.start for row in rows], tables)
        drawing = [row.sequence if row.samples else None for row in rows]
        drawn: list[tuple[int, TokenLogprob | None]] = [(0, None)] * len(rows)
        if any(drawing):
            to_draw = [None if request is None else DrawRow(request, request.length) for request in drawing]
            drawn = self._sampler.dispatch(logits, to_draw, count=True).collect()
        for row, request, (token, logprob) in zip(rows, drawing, drawn):
            row.sequence.cached = row.stop
            if request is None:
                continue
            if token == BAD_LOGITS:
                self.scheduler.remove(request)
                request.fail(RealmError(f"the model's logits at position {request.length} are not finite numbers"))
                continue
            try:
                request.accept(token, logprob)
            except Exception as error:  # of its own making: its neighbours go on
                request.fail(error)
            if request.done:
                self.scheduler.remove(request)

    def _fail_running(self, error: BaseException) -> None:
        """Ends what runs: a failed call may have taken the cache with it. What waits starts afresh."""
        if not isinstance(error, Exception):
            error = RealmError(f"another thread was interrupted while this request ran: {type(error).__name__}")
        for request in list(self.scheduler.running):
            self.scheduler.remove(request)
            request.fail(error)
        self._sampler.reset()
