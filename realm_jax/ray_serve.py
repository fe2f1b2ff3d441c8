"""Replicas of one model behind Ray Serve: each an Engine in a process of its own. Needs the extra "ray".

    from ray import serve
    from realm_jax import Request, Tenant
    from realm_jax.ray_serve import Client, application

    app = application("model.gguf", replicas=2, tenants=[Tenant("acme")], adapters={"support": "support.gguf"})
    client = Client(serve.run(app))
    async for event in client.submit(Request("Hello", tenant="acme", adapter="support")):
        print(event.text, end="")

Replicas share nothing but the files they read. What an Engine keeps, each keeps for itself: its cache, its tenants'
shares and quotas (two replicas let a tenant do twice as much), its adapters. A replica loads an adapter when the first
request for it comes, and Ray sends later ones to a replica that has it; the least recently used goes when there are too
many. Serve's own queue is kept out of the way, since only an engine's knows of tenants.
"""

import asyncio
import time
from collections.abc import AsyncGenerator, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from realm_jax.arguments import brief, refuse_options
from realm_jax.engine.engine import Engine, EngineStats, Event, Request
from realm_jax.engine.tenants import DEFAULT_TENANT, Tenant
from realm_jax.errors import AdapterError, InvalidRequestError, MissingPackageError, RealmError
from realm_jax.sampling_params import shown

if TYPE_CHECKING:
    from ray.serve import Application
    from ray.serve.handle import DeploymentHandle

_ENGINE_OPTIONS = "context_length, backend, mesh, draft, cache_bytes, ledger"
_NO_BOUND = 1 << 30


class StallWatch:
    """Notices an engine that has requests and makes no step."""

    def __init__(self, seconds: float):
        """seconds: how long a step may take; the first of its kind compiles a program."""
        self._seconds = seconds
        self._steps = -1
        self._since = time.monotonic()

    def check(self, stats: EngineStats) -> None:
        """RealmError when there were requests and no step for too long, as far as the calls of this saw it."""
        now = time.monotonic()
        if stats.steps != self._steps or not (stats.running or stats.waiting):
            self._steps, self._since = stats.steps, now
        elif now - self._since > self._seconds:
            raise RealmError(
                f"the engine has made no step for {now - self._since:.0f} s, with {stats.running} requests running "
                f"and {stats.waiting} waiting; accepted: {self._seconds:g} s"
            )


class LoadedAdapter:
    """What Serve's cache of adapters holds. Serve calls __del__ when it drops one; requests that run keep theirs."""

    def __init__(self, engine: Engine, name: str):
        self._engine: Engine | None = engine
        self._name = name

    def __del__(self) -> None:
        engine, self._engine = self._engine, None  # Serve calls it, and then the garbage collector does
        if engine is not None and engine.alive:
            engine.unload_adapter(self._name)


@dataclass(frozen=True)
class ReplicaStats:
    """What one replica's engine holds and has done; replica: the name of its actor, in Ray's namespace "serve"."""

    replica: str
    engine: EngineStats


class Replica:
    """One engine, as Serve calls it; `application` makes a deployment of it."""

    def __init__(
        self,
        model: str | Path,
        tenants: Iterable[Tenant] | None = None,
        adapters: Mapping[str, str | Path] | None = None,
        stall_seconds: float = 600.0,
        engine_options: Mapping[str, Any] | None = None,
    ):
        listed = None if tenants is None else list(tenants)
        self._tenants = {tenant.name: tenant for tenant in listed or (Tenant(DEFAULT_TENANT),)}
        self._adapters = dict(adapters or {})
        self._watch = StallWatch(stall_seconds)
        self._engine = Engine(model, tenants=listed, **(engine_options or {}))

    async def generate(self, request: Request) -> AsyncGenerator[Event, None]:
        """The events of a request; errors as Engine.submit has them. Closing it early cancels the request."""
        if not isinstance(request, Request):
            raise InvalidRequestError(f"request is {brief(request)}; accepted: a realm_jax.Request")
        tenant = self._tenants.get(request.tenant) if isinstance(request.tenant, str) else None
        if tenant is not None and isinstance(request.adapter, str):  # what else they are, the engine refuses
            self._check_adapter(request.adapter, tenant)
            await self.loaded(request.adapter)
        # No await between the two: nothing unloads the adapter before the request holds it.
        stream = self._engine.submit(request)
        try:
            async for event in stream:
                yield event
        finally:
            await stream.aclose()

    async def loaded(self, name: str) -> LoadedAdapter:
        """Loads one of the adapters; `application` puts Serve's cache in front of this."""
        await asyncio.to_thread(self._engine.load_adapter, name, self._adapters[name])
        return LoadedAdapter(self._engine, name)

    def check_health(self) -> None:
        """Serve calls it, and replaces a replica where it raises: the engine has ended, or stands still."""
        if not self._engine.alive:
            raise RealmError("the engine has ended; the replica's log says why")
        self._watch.check(self._engine.stats())

    async def stats(self) -> ReplicaStats:
        """Of this replica, which Serve chose."""
        from ray import serve

        return ReplicaStats(serve.get_replica_context().replica_id.to_full_id_str(), self._engine.stats())

    def _check_adapter(self, name: str, tenant: Tenant) -> None:
        # Before anything is loaded: a request that will be refused must not push another adapter out.
        tenant.check_adapter(name)
        if name not in self._adapters:
            known = ", ".join(map(repr, sorted(self._adapters))) or "none"
            raise AdapterError(f"no adapter {shown(name)} in this deployment; accepted: {known}")


class Client:
    """Requests to a deployment, and Realm's own errors back."""

    def __init__(self, handle: "DeploymentHandle"):
        """handle: of the application, as serve.run and serve.get_app_handle return it. MissingPackageError."""
        _check_ray()
        self._handle = handle

    async def submit(self, request: Request) -> AsyncGenerator[Event, None]:
        """The events of a request, run by the replica that Serve chooses. Closing it early cancels the request.

        Raises, with the first event:
          RealmError: whatever Engine.submit and its events raise.
          ray.exceptions.RayError: the replica died. Nothing is tried again: somebody may have seen its first tokens.
        """
        from ray.exceptions import RayTaskError

        if not isinstance(request, Request):
            raise InvalidRequestError(f"request is {brief(request)}; accepted: a realm_jax.Request")
        adapter = request.adapter if isinstance(request.adapter, str) else ""  # what else it is, the engine refuses
        method = self._handle.options(method_name="generate", stream=True, multiplexed_model_id=adapter)
        events: Any = method.remote(request)
        try:
            async for event in events:
                yield event
        except RayTaskError as error:
            if isinstance(error.cause, RealmError):
                raise error.cause from None  # without the replica's traceback, which Ray puts into the message
            raise
        finally:
            events.cancel()

    async def stats(self) -> ReplicaStats:
        """Of one replica, whichever Serve chooses."""
        stats: ReplicaStats = await self._handle.options(method_name="stats").remote()
        return stats


def application(
    model: str | Path,
    *,
    replicas: int = 1,
    tenants: Iterable[Tenant] | None = None,
    adapters: Mapping[str, str | Path] | None = None,
    adapters_per_replica: int = 16,
    max_batch: int = 8,
    queue_limit: int | None = 4096,
    stall_seconds: float = 600.0,
    ray_actor_options: Mapping[str, Any] | None = None,
    **engine_options: Any,
) -> "Application":
    """What serve.run takes: replicas of a model.

    Args:
      model: as for Engine; every node must find it, and the adapters' files, under the name given here.
      replicas: how many, each with a copy of the weights.
      tenants: as for Engine; shares and quotas hold within each replica.
      adapters: all that requests may name, and their files; loaded when they are first asked for.
      adapters_per_replica: most that a replica keeps loaded.
      max_batch, queue_limit, engine_options (context_length, backend, mesh, draft, cache_bytes, ledger): see Engine.
      stall_seconds: a replica that has requests and made no step for so long is replaced.
      ray_actor_options: what a replica needs, such as {"num_gpus": 1}; see Ray.

    Raises:
      InvalidRequestError: an option is unknown or out of range.
      MissingPackageError: Ray Serve is not installed.
      What is wrong with the model shows when replicas start: serve.run raises a RuntimeError, and serve.status() tells
      the replicas' last error.
    """
    _check_ray()
    from ray import serve

    unknown = {name: value for name, value in engine_options.items() if name not in _ENGINE_OPTIONS.split(", ")}
    refuse_options(
        unknown,
        "model, replicas, tenants, adapters, adapters_per_replica, max_batch, queue_limit, stall_seconds, "
        f"ray_actor_options, {_ENGINE_OPTIONS}",
    )
    for name, value in (("replicas", replicas), ("adapters_per_replica", adapters_per_replica)):
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise InvalidRequestError(f"{name} is {shown(value)}; accepted: an integer >= 1")
    if adapters is not None and not isinstance(adapters, Mapping):
        raise InvalidRequestError(f"adapters is {brief(adapters)}; accepted: a dict of names and paths, or None")

    class RealmReplica(Replica):
        @serve.multiplexed(max_num_models_per_replica=adapters_per_replica)
        async def loaded(self, name: str) -> LoadedAdapter:
            return await Replica.loaded(self, name)

    deployment: Any = serve.deployment(
        RealmReplica,
        name="realm",
        num_replicas=replicas,
        # All that an engine's queue takes: to what waits in Serve's, no tenant's share applies.
        max_ongoing_requests=_NO_BOUND if queue_limit is None else queue_limit + max_batch,
        ray_actor_options=dict(ray_actor_options or {}),
    )
    options = {"max_batch": max_batch, "queue_limit": queue_limit, **engine_options}
    listed = None if tenants is None else list(tenants)
    bound: Application = deployment.bind(model, listed, dict(adapters or {}), stall_seconds, options)
    return bound


def _check_ray() -> None:
    """MissingPackageError where Ray Serve cannot be imported."""
    try:
        import ray.serve  # noqa: F401
    except ImportError as error:
        raise MissingPackageError(
            f"realm_jax.ray_serve needs Ray Serve ({error}); pip install 'realm-jax[ray]' installs it"
        ) from error
