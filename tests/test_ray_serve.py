"""Realm behind Ray Serve: a replica by itself, and two of them on this machine (slow; needs the extra "ray")."""

import asyncio
import contextlib
import importlib.util
import sys
import time
from collections.abc import Iterator
from dataclasses import replace

import pytest
from random_adapters import random_adapter
from tiny_models import tiny_spec, token_ids, write_spec

from realm_jax import LLM, Request, SamplingParams, Tenant
from realm_jax.engine.engine import EngineStats
from realm_jax.errors import AdapterError, InvalidRequestError, MissingPackageError, QuotaError, RealmError
from realm_jax.lora import weight_shapes
from realm_jax.lora.gguf_format import write_gguf
from realm_jax.model import load_model
from realm_jax.ray_serve import Client, Replica, StallWatch, application

CONTEXT = 256
GREEDY = SamplingParams(max_tokens=8, ignore_eos=True)
LONG = SamplingParams(max_tokens=200, ignore_eos=True)
TENANTS = [Tenant("acme", adapters=["a", "b"]), Tenant("zeta", adapters=[]), Tenant("busy", concurrent=1)]

needs_ray = pytest.mark.skipif(
    importlib.util.find_spec("ray") is None, reason="Ray is not installed: pip install 'realm-jax[ray]'"
)


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A tiny model, and adapters by name."""
    folder = tmp_path_factory.mktemp("ray")
    write_spec(tiny_spec("llama"), folder / "tiny.gguf", label="llama")
    shapes = weight_shapes(load_model(folder / "tiny.gguf"))
    adapters = {}
    for seed, name in enumerate("abc"):
        adapters[name] = folder / f"{name}.gguf"
        write_gguf(random_adapter(shapes, 4, seed=seed), adapters[name], 8.0)
    return folder / "tiny.gguf", adapters


@pytest.fixture(scope="module")
def llm(files):
    path, adapters = files
    with LLM(path, context_length=CONTEXT, max_batch=4, adapters=adapters) as llm:
        yield llm


async def tokens_of(events):
    return [token async for event in events for token in event.tokens]


# Without Ray


class Keeping(Replica):
    """With a cache of adapters in place of Serve's."""

    def __init__(self, *args, **options):
        super().__init__(*args, **options)
        self.kept = {}

    async def loaded(self, name):
        if name not in self.kept:
            self.kept[name] = asyncio.create_task(super().loaded(name))
        return await self.kept[name]


@pytest.fixture(scope="module")
def replica(files):
    path, adapters = files
    options = {"context_length": CONTEXT, "max_batch": 4}
    replica = Keeping(path, TENANTS, adapters, engine_options=options)
    yield replica
    replica._engine.close()


def test_a_replica_serves_tenants_and_adapters(replica, llm):
    prompt = token_ids(20)
    requests = [Request(prompt, GREEDY, "acme", name) for name in ("a", None, "b", "a")]

    async def main():
        return await asyncio.gather(*(tokens_of(replica.generate(request)) for request in requests))

    expected = [llm.generate(prompt, GREEDY, adapter=request.adapter).tokens for request in requests]
    assert asyncio.run(main()) == expected
    assert len({tuple(tokens) for tokens in expected}) == 3
    replica.check_health()


REFUSED = [
    (Request("the cat", tenant="nobody"), InvalidRequestError, "unknown tenant 'nobody'"),
    (Request("the cat", tenant="nobody", adapter="c"), InvalidRequestError, "unknown tenant 'nobody'; accepted: acme"),
    (Request("the cat", tenant="acme", adapter="d"), AdapterError, "tenant 'acme' may not use adapter 'd'"),
    (
        Request("the cat", tenant="busy", adapter="d"),
        AdapterError,
        "no adapter 'd' in this deployment; accepted: 'a', ",
    ),
    (Request("the cat", tenant="zeta", adapter="a"), AdapterError, "tenant 'zeta' may not use adapter 'a'"),
    (Request("the cat", tenant="acme", adapter=5), InvalidRequestError, "adapter is 5; accepted: an adapter's name"),
    (Request("", tenant="acme"), InvalidRequestError, "the prompt is empty"),
    ("the cat", InvalidRequestError, r"request is 'the cat' .*; accepted: a realm_jax.Request"),
]


@pytest.mark.parametrize(("request_", "kind", "message"), REFUSED, ids=[message[:30] for _, _, message in REFUSED])
def test_what_is_refused_loads_nothing(replica, request_, kind, message):
    before = replica._engine.stats().adapters
    with pytest.raises(kind, match=message):
        asyncio.run(tokens_of(replica.generate(request_)))
    assert replica._engine.stats().adapters == before


def test_a_stream_that_is_closed_cancels_its_request(replica):
    async def main():
        events = replica.generate(Request("the cat", LONG, "busy"))
        await anext(events)
        await events.aclose()
        while replica._engine.stats().running:  # to the end of the step
            await asyncio.sleep(0.01)
        return await tokens_of(replica.generate(Request("the cat", GREEDY, "busy")))  # which has room again

    assert len(asyncio.run(main())) == 8


def test_an_adapter_that_is_dropped_is_unloaded_once(replica):
    loaded = asyncio.run(Replica.loaded(replica, "c"))
    assert "c" in replica._engine.stats().adapters
    loaded.__del__()  # as Serve does
    assert "c" not in replica._engine.stats().adapters
    replica._engine.load_adapter("c", replica._adapters["c"])
    del loaded
    assert "c" in replica._engine.stats().adapters
    replica._engine.unload_adapter("c")


def test_health_notices_an_engine_that_has_ended(files):
    replica = Replica(files[0], engine_options={"context_length": CONTEXT, "max_batch": 1})
    replica.check_health()
    engine = replica._engine

    def broken():
        raise OSError("no device any more")

    async def main():
        engine._core.loop._busy = broken  # the thread that drives cannot go on
        with contextlib.suppress(OSError):  # unless it ends before this comes
            await tokens_of(replica.generate(Request("the cat", GREEDY)))
        engine._thread.join(timeout=30)

    asyncio.run(main())
    with pytest.raises(RealmError, match="the engine has ended"):
        replica.check_health()


def test_health_notices_an_engine_that_stands_still(replica, monkeypatch):
    idle = replica._engine.stats()
    now = 1000.0
    monkeypatch.setattr(time, "monotonic", lambda: now)

    def at(seconds: float, **changes: int) -> EngineStats:
        nonlocal now
        now = 1000.0 + seconds
        return replace(idle, **changes)

    watch = StallWatch(60.0)
    watch.check(at(0, steps=5))
    watch.check(at(1000, steps=5))  # nothing to do
    watch.check(at(1050, steps=5, running=1))
    watch.check(at(1100, steps=6, running=1))
    watch.check(at(1159, steps=6, running=1))
    with pytest.raises(RealmError, match="no step for 61 s, with 1 requests running and 3 waiting; accepted: 60 s"):
        watch.check(at(1161, steps=6, running=1, waiting=3))


def test_without_ray_it_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    for make in (lambda: application("model.gguf"), lambda: Client(None)):
        with pytest.raises(MissingPackageError, match=r"needs Ray Serve .*; pip install 'realm-jax\[ray\]'"):
            make()
    assert issubclass(MissingPackageError, ImportError)


# With Ray


@needs_ray
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"replicas": 0}, "replicas is 0; accepted: an integer >= 1"),
        ({"adapters_per_replica": True}, "adapters_per_replica is True; accepted: an integer >= 1"),
        ({"max_btach": 3}, "max_btach"),
        ({"adapters": ["a.gguf"]}, "adapters is .*; accepted: a dict of names and paths"),
    ],
)
def test_options_are_checked_before_anything_starts(options, message):
    with pytest.raises(InvalidRequestError, match=message):
        application("model.gguf", **options)


@pytest.fixture(scope="module")
def serve() -> Iterator[object]:
    """Ray on this machine, without its dashboard and without HTTP."""
    ray = pytest.importorskip("ray", reason="Ray is not installed")
    from ray import serve

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        ray.init(num_cpus=4, include_dashboard=False, log_to_driver=False)
        serve.start(http_options={"location": "NoServer"})
        yield serve
        serve.shutdown()
        ray.shutdown()


@pytest.fixture(scope="module")
def client(serve, files):
    path, adapters = files
    app = application(
        path,
        replicas=2,
        tenants=TENANTS,
        adapters=adapters,
        adapters_per_replica=2,
        max_batch=4,
        context_length=CONTEXT,
    )
    return Client(serve.run(app, name="two", route_prefix=None))


async def both(client):
    """The stats of both replicas by name, asked for until both have answered."""
    found = {}
    for _ in range(200):
        stats = await client.stats()
        found[stats.replica] = stats.engine
        if len(found) == 2:
            return found
        await asyncio.sleep(0.05)
    raise AssertionError(f"only {list(found)} answered")


async def until(check, seconds=60.0):
    deadline = time.monotonic() + seconds
    while not await check():
        assert time.monotonic() < deadline
        await asyncio.sleep(0.2)


@needs_ray
@pytest.mark.slow
def test_two_replicas_share_the_work_and_give_the_tokens_of_one(client, llm):
    requests = [
        Request(token_ids(10 + i), replace(GREEDY, temperature=0.8 * (i % 2), seed=i), "acme", ["a", "b", None][i % 3])
        for i in range(24)
    ]

    async def main():
        answers = await asyncio.gather(*(tokens_of(client.submit(request)) for request in requests))
        return answers, await both(client)

    answers, stats = asyncio.run(main())
    assert answers == [llm.generate(r.prompt, r.params, adapter=r.adapter).tokens for r in requests]
    assert all(one.generated_tokens > 0 for one in stats.values())
    assert sum(one.tenants["acme"].usage.requests for one in stats.values()) == 24


@needs_ray
@pytest.mark.slow
def test_requests_for_an_adapter_go_where_it_is_loaded(client, llm):
    prompt = token_ids(20)

    async def main():
        before = await both(client)
        await tokens_of(client.submit(Request(prompt, GREEDY, "busy", "c")))
        await asyncio.sleep(2)  # Ray lets the routers know
        for _ in range(9):
            assert await tokens_of(client.submit(Request(prompt, GREEDY, "busy", "c"))) == expected
        return before, await both(client)

    expected = llm.generate(prompt, GREEDY, adapter="c").tokens
    before, after = asyncio.run(main())
    served = {
        name: after[name].tenants["busy"].usage.requests - before[name].tenants["busy"].usage.requests for name in after
    }
    assert sorted(served.values()) == [0, 10]
    assert {name for name in after if "c" in after[name].adapters} == {name for name in served if served[name]}
    assert all(len(one.adapters) <= 2 for one in after.values())


@needs_ray
@pytest.mark.slow
@pytest.mark.parametrize(("request_", "kind", "message"), REFUSED, ids=[message[:30] for _, _, message in REFUSED])
def test_errors_reach_the_client_as_they_are(client, request_, kind, message):
    with pytest.raises(kind, match=f"^(?:{message})") as caught:
        asyncio.run(tokens_of(client.submit(request_)))
    assert type(caught.value) is kind
    assert "\n" not in str(caught.value)


@needs_ray
@pytest.mark.slow
def test_closing_a_stream_cancels_the_request_in_its_replica(client):
    async def main():
        before = sum(one.generated_tokens for one in (await both(client)).values())
        streams = [client.submit(Request("the cat", LONG, "acme", cache=False)) for _ in range(4)]
        for stream in streams:
            await anext(stream)
            await stream.aclose()

        async def idle():
            return all(one.running == one.waiting == 0 for one in (await both(client)).values())

        await until(idle)
        return sum(one.generated_tokens for one in (await both(client)).values()) - before

    assert asyncio.run(main()) < 4 * 200


@needs_ray
@pytest.mark.slow
def test_a_quota_is_the_replicas_own(client):
    async def main():
        streams = [client.submit(Request("the cat", LONG, "busy")) for _ in range(8)]
        found = await asyncio.gather(*(tokens_of(stream) for stream in streams), return_exceptions=True)
        return [one if isinstance(one, BaseException) else len(one) for one in found]

    found = asyncio.run(main())
    refused = [one for one in found if one != 200]
    assert 0 < len(refused) < len(found)
    assert all(type(one) is QuotaError and "accepted: 1 at once" in str(one) for one in refused)


@needs_ray
@pytest.mark.slow
def test_a_replica_that_is_killed_is_replaced(client, llm):
    import ray

    async def main():
        before = await both(client)
        victim = sorted(before)[0]
        ray.kill(ray.get_actor(victim, namespace="serve"))

        async def replaced():
            with contextlib.suppress(ray.exceptions.RayError):
                now = await both(client)
                return victim not in now
            return False

        await until(replaced, 120)
        return await asyncio.gather(*(tokens_of(client.submit(Request("the cat", GREEDY, "acme"))) for _ in range(6)))

    assert asyncio.run(main()) == [llm.generate("the cat", GREEDY).tokens] * 6


@needs_ray
@pytest.mark.slow
def test_a_replica_whose_engine_has_ended_is_replaced(serve, files, llm):
    class Wreckable(Replica):
        async def wreck(self) -> None:
            self._engine.close()

    deployment = serve.deployment(Wreckable, name="wreckable", num_replicas=1, health_check_period_s=1)
    app = deployment.bind(files[0], engine_options={"context_length": CONTEXT, "max_batch": 1})
    handle = serve.run(app, name="wreck", route_prefix=None)
    client = Client(handle)

    async def main():
        first = (await client.stats()).replica
        await handle.wreck.remote()

        async def replaced():
            import ray

            with contextlib.suppress(ray.exceptions.RayError):
                return (await client.stats()).replica != first
            return False

        await until(replaced, 120)
        return await tokens_of(client.submit(Request("the cat", GREEDY)))

    assert asyncio.run(main()) == llm.generate("the cat", GREEDY).tokens
    serve.delete("wreck")


@needs_ray
@pytest.mark.slow
def test_a_model_that_is_not_there_says_so(serve, tmp_path):
    app = application(tmp_path / "nothing.gguf")
    with pytest.raises(RuntimeError, match="missing failed"):
        serve.run(app, name="missing", route_prefix=None)
    told = serve.status().applications["missing"].deployments["realm"].message
    assert "ModelNotFoundError" in told
    assert "nothing.gguf" in told
    serve.delete("missing")
