"""The asynchronous face: many tenants' requests on one model, each an async iterator of events."""

import asyncio
import atexit
import numbers
import secrets
import threading
import weakref
from collections.abc import AsyncIterator, Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any, Literal

import numpy as np

from realm_jax.arguments import brief, refuse_options
from realm_jax.engine.core import Core, Progress
from realm_jax.engine.ledger import Spent
from realm_jax.engine.loop import HostLoop
from realm_jax.engine.request import Request as Running
from realm_jax.engine.stats import LoopStats
from realm_jax.engine.tenants import DEFAULT_TENANT, Tenant
from realm_jax.errors import InvalidRequestError
from realm_jax.lora import check_scale
from realm_jax.results import Piece
from realm_jax.sampling_params import SamplingParams, shown


@dataclass(frozen=True)
class Request:
    """One completion that a tenant asks for.

    Attributes:
      prompt: a string, or a list or array of token ids.
      params: see SamplingParams; n must be 1.
      tenant: whose it is.
      adapter: name of a loaded adapter; None: the model as it is.
      adapter_scale: times the scale that the adapter was loaded with.
      priority: among this tenant's requests, higher ones start first and are the last to be preempted.
      deadline: seconds from submission after which it ends with finish_reason "deadline" and what it has; None: never.
      cache: whether its prefix may be found in, and kept in, the prefix cache.
      speculate: True or a number: drafts, that many at most; False: none; None: as the engine was made.
      parse_special: recognise special tokens written in the prompt; for prompts that hold what strangers wrote, False.
    """

    prompt: str | Sequence[int] | np.ndarray
    params: SamplingParams | None = None
    tenant: str = DEFAULT_TENANT
    adapter: str | None = None
    adapter_scale: float = 1.0
    priority: int = 0
    deadline: float | None = None
    cache: bool = True
    speculate: bool | int | None = None
    parse_special: bool = True


@dataclass(frozen=True, kw_only=True)
class Event(Piece):
    """What a request has produced since its last event, as realm_jax.results.Piece says, and the request's id."""

    request_id: str


@dataclass(frozen=True)
class TenantStats:
    """One tenant now: requests that run and wait, virtual tokens served so far, and what it has used in all."""

    running: int
    waiting: int
    served: float
    usage: Spent


@dataclass(frozen=True)
class EngineStats(LoopStats):
    """LoopStats, and those of each tenant by name."""

    tenants: Mapping[str, TenantStats]


class Stream:
    """The events of one request, in order: an async iterator for the event loop that it was submitted in. Closing it
    early, or leaving it to be collected, cancels the request.

    A consumer that does not read holds up nobody; what it has not read is kept for it.
    """

    def __init__(self, engine: "Engine", request: Running, request_id: str):
        self.request_id = request_id
        self._engine = engine
        self._request = request
        self._wake = asyncio.Event()
        self._ended = False
        self._home = asyncio.get_running_loop()
        request.notify = _notifier(engine, request_id, weakref.ref(self), self._home)

    def __aiter__(self) -> AsyncIterator[Event]:
        return self

    async def __anext__(self) -> Event:
        if asyncio.get_running_loop() is not self._home:  # which is the one that is woken up
            raise InvalidRequestError("a stream is read in another event loop; accepted: the one it was submitted in")
        request = self._request
        while not self._ended:
            if request.pieces:
                return self._event(request.pieces.popleft())
            if request.error is not None:
                self._ended = True
                raise request.error
            if request.done and not request.pieces:
                break
            self._wake.clear()
            if not request.ready:
                try:
                    await self._wake.wait()
                except asyncio.CancelledError:
                    await self.aclose()
                    raise
        self._ended = True
        raise StopAsyncIteration

    async def aclose(self) -> None:
        """Cancels the request unless it has ended."""
        self._ended = True
        self._engine.cancel(self.request_id)

    def __del__(self) -> None:
        if not self._ended and not self._request.done:
            self._engine.cancel(self.request_id)

    def wake(self) -> None:
        """There is something to read."""
        self._wake.set()

    def _event(self, piece: Piece) -> Event:
        if piece.finish_reason is not None:
            self._ended = True
        return Event(**vars(piece), request_id=self.request_id)


def _notifier(
    engine: "Engine", request_id: str, stream: "weakref.ref[Stream]", home: asyncio.AbstractEventLoop
) -> Callable[[Running], None]:
    """Tells a request's stream, which it does not keep alive: one that nobody has any more is to cancel the request."""

    def wake() -> None:
        if (waiting := stream()) is not None:
            waiting.wake()

    def notify(request: Running) -> None:  # called by the thread that drives
        if request.done:
            engine.forget(request_id)
        if not home.is_closed():
            home.call_soon_threadsafe(wake)
        elif not request.done:
            raise RuntimeError("the event loop of this request's consumer is closed")

    return notify


class Engine:
    """A model that serves many tenants at once, from an event loop.

        engine = Engine("model.gguf", tenants=[Tenant("acme", weight=2.0), Tenant("zeta")])
        async with engine:
            async for event in engine.submit(Request("Hello", tenant="acme")):
                print(event.text, end="")

    A thread of its own drives the device. All methods may be called from any thread, `submit` from a coroutine. An
    engine that is left to be collected, or to the end of the process, is closed.
    """

    def __init__(
        self,
        model: str | Path,
        context_length: int | None = None,
        max_batch: int = 8,
        backend: Literal["auto", "xla", "native", "pallas"] = "auto",
        *,
        tenants: Iterable[Tenant] | None = None,
        mesh: str | None = None,
        draft: str | Path | None = None,
        adapters: Mapping[str, str | Path] | None = None,
        cache_bytes: int | None = None,
        queue_limit: int | None = 4096,
        ledger: str | Path | None = None,
        progress: Progress | None = None,
        **options: Any,
    ):
        """Loads a model.

        Args:
          model, context_length, max_batch, backend, mesh, draft, adapters, cache_bytes, progress: see realm_jax.LLM.
          tenants: who may submit; None: one tenant, "default", without bounds.
          queue_limit: most requests that may wait, except that each tenant may always have its equal share of them;
            None: no bound.
          ledger: a file, made if need be, that keeps what each tenant has used; None: counted in memory.

        Raises: as LLM; RealmError when the ledger cannot be used.
        """
        refuse_options(
            options,
            "model, context_length, max_batch, backend, tenants, mesh, draft, adapters, cache_bytes, queue_limit, "
            "ledger, progress",
        )
        known: tuple[Any, ...] = (Tenant(DEFAULT_TENANT),)
        if tenants is not None:
            known = tuple(tenants) if isinstance(tenants, Iterable) else ()
        if not known or not all(isinstance(tenant, Tenant) for tenant in known):
            raise InvalidRequestError(f"tenants is {brief(tenants)}; accepted: a list of Tenant, or None")
        self._core = Core(
            model,
            context_length=context_length,
            max_batch=max_batch,
            backend=backend,
            mesh=mesh,
            draft=draft,
            adapters=adapters,
            cache_bytes=cache_bytes,
            tenants=known,
            queue_limit=queue_limit,
            ledger=ledger,
            progress=progress,
        )
        self._live: dict[str, Running] = {}
        self._thread: threading.Thread | None = None
        self._starting = threading.Lock()
        # JAX must not be taken down while the thread runs.
        self._at_exit = atexit.register(partial(_close, weakref.ref(self)))
        self._dropped = weakref.finalize(self, _abandon, self._core.loop, self._at_exit)
        self._dropped.atexit = False

    @property
    def context_length(self) -> int:
        """Most tokens that the prompt and output of one request may have together."""
        return self._core.context_length

    @property
    def alive(self) -> bool:
        """False once it was closed, or has ended because it could not go on: it takes no requests then."""
        return self._core.runner is not None and (self._thread is None or self._thread.is_alive())

    def submit(self, request: Request) -> Stream:
        """Queues a request and returns its events. What is wrong with it is raised here, not by the first event.

        Raises:
          InvalidRequestError: a mistake in the request, or an unknown tenant.
          AdapterError: the adapter is not loaded, or not for this tenant.
          QuotaError, CapacityError: the tenant's quota, the queue or the cache has no room for it.
          RealmError, by the events: the model's logits were not finite, the device failed.
        """
        core = self._core
        core.check_open()
        try:
            asyncio.get_running_loop()
        except RuntimeError:
            raise InvalidRequestError("submit is called without an event loop; accepted: from a coroutine") from None
        if not isinstance(request, Request):
            raise InvalidRequestError(f"request is {brief(request)}; accepted: a Request")
        params = _checked(request)
        core.loop.scheduler.account(request.tenant)  # before the prompt is tokenized
        [running] = core.requests(
            core.tokens(request.prompt, "prompt", parse_special=request.parse_special),
            params,
            tenant=request.tenant,
            adapter=request.adapter,
            adapter_scale=float(request.adapter_scale),
            speculate=request.speculate,
            priority=request.priority,
            deadline=request.deadline,
            cache=request.cache,
        )
        stream = Stream(self, running, secrets.token_hex(8))
        self._live[stream.request_id] = running
        try:
            core.loop.submit([running])
        except BaseException:
            stream._ended = True
            self._live.pop(stream.request_id, None)
            raise
        self._start()
        return stream

    def cancel(self, request_id: str) -> bool:
        """Ends a request where it is, its last event with finish_reason "cancelled"; False if it had ended."""
        running = self._live.pop(request_id, None)
        if running is None or running.done:
            return False
        self._core.loop.cancel([running])
        return True

    def load_adapter(self, name: str, path: str | Path, scale: float = 1.0) -> None:
        """Loads an adapter, or replaces the one of that name; requests that run keep what they started with.

        AdapterError when it cannot be used, after which everything is as before.
        """
        self._core.check_open()
        self._core.loop.load_adapter(name, path, scale)

    def unload_adapter(self, name: str) -> None:
        """Takes an adapter's name away; requests that use it run to their end. AdapterError for an unknown one."""
        self._core.check_open()
        self._core.loop.unload_adapter(name)

    def publish_prefix(self, prompt: str | Sequence[int] | np.ndarray, adapter: str | None = None) -> int:
        """Lets all tenants share the cached keys and values of a prefix, such as a common system prompt.

        Of what a tenant sends, others then can tell by time whether it was this prefix, and nothing else. Returns how
        many tokens are shared: full pages.
        """
        self._core.check_open()
        return self._core.loop.publish_prefix(self._core.tokens(prompt, "prompt"), adapter)

    def warm_up(self) -> None:
        """Compiles every program that requests may need; without it, the first that needs one waits for it."""
        self._core.warm_up()

    def stats(self) -> EngineStats:
        """What the engine holds and has done."""
        loop = self._core.loop
        stats = loop.stats()
        tenants = {
            name: TenantStats(len(a.running), a.open - len(a.running), a.counter, loop.ledger.usage(name))
            for name, a in loop.scheduler.accounts.items()
        }
        return EngineStats(**vars(stats), tenants=tenants)

    def usage(self, tenant: str) -> Spent:
        """What a tenant has used, over all processes that kept this ledger."""
        self._core.loop.scheduler.account(tenant)
        return self._core.loop.ledger.usage(tenant)

    def close(self) -> None:
        """Cancels what runs and lets go of the weights. Any other use afterwards is refused."""
        self._dropped.detach()
        atexit.unregister(self._at_exit)
        try:
            self._core.close()
        finally:
            if self._thread is not None:
                self._thread.join()

    async def __aenter__(self) -> "Engine":
        self._core.check_open()
        self._start()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await asyncio.to_thread(self.close)  # it waits for the step that runs

    def forget(self, request_id: str) -> None:
        """For Stream: the request has ended."""
        self._live.pop(request_id, None)

    def _start(self) -> None:
        with self._starting:
            if self._thread is None:
                self._thread = threading.Thread(target=self._core.loop.serve, name="realm-engine", daemon=True)
                self._thread.start()


def _close(engine: "weakref.ref[Engine]") -> None:
    """At the end of the process."""
    if (left := engine()) is not None:
        left.close()


def _abandon(loop: HostLoop, at_exit: Any) -> None:
    """Of an engine that was collected, in whatever thread that was."""
    atexit.unregister(at_exit)
    loop.abandon()


def _checked(request: Request) -> SamplingParams:
    """InvalidRequestError for a field that cannot be; returns the params."""

    def refuse(name: str, accepted: str) -> InvalidRequestError:
        return InvalidRequestError(f"{name} is {shown(getattr(request, name))}; accepted: {accepted}")

    params = SamplingParams() if request.params is None else request.params
    if not isinstance(params, SamplingParams):
        raise refuse("params", "a SamplingParams, or None")
    if params.n != 1:
        raise InvalidRequestError(f"n is {params.n}; accepted: 1: submit a request for each completion")
    if not isinstance(request.tenant, str):
        raise refuse("tenant", "a tenant's name")
    if request.adapter is not None and not isinstance(request.adapter, str):
        raise refuse("adapter", "an adapter's name, or None")
    check_scale(request.adapter_scale)
    if isinstance(request.priority, bool) or not isinstance(request.priority, int):
        raise refuse("priority", "an integer")
    d = request.deadline
    number = isinstance(d, numbers.Real) and not isinstance(d, bool)
    if d is not None and not (number and 0 < d <= 1e15):
        raise refuse("deadline", "a number of seconds above 0, or None")
    for name in ("cache", "parse_special"):
        if not isinstance(getattr(request, name), bool):
            raise refuse(name, "True or False")
    return params


__all__: Any = ["Engine", "EngineStats", "Event", "Request", "Stream", "TenantStats"]
