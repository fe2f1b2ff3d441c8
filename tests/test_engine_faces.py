"""The Engine in the hands of careless users: streams and engines that are dropped, other event loops, forks, exits."""

import asyncio
import gc
import subprocess
import sys
import threading
import time
import weakref

import pytest
from tiny_models import tiny_spec, write_spec

from realm_jax import Engine, Request, SamplingParams, Tenant
from realm_jax.errors import InvalidRequestError, RealmError

CONTEXT = 512
ENDLESS = SamplingParams(max_tokens=None, ignore_eos=True)
HUGE = 10**5000  # more digits than Python prints


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    target = tmp_path_factory.mktemp("engine") / "tiny.gguf"
    write_spec(tiny_spec("llama"), target, label="llama")
    return target


@pytest.fixture(scope="module")
def engine(path):
    engine = Engine(path, context_length=CONTEXT, max_batch=2)
    step = engine._core.runner.parts

    def slowly(*args, **options):  # so that what fills the context takes five seconds
        time.sleep(0.01)
        return step(*args, **options)

    engine._core.runner.parts = slowly
    yield engine
    engine.close()


def idle(engine, seconds=2.0):
    """Whether nothing runs or waits soon: sooner than what is endless takes."""
    until = time.perf_counter() + seconds
    while time.perf_counter() < until:
        stats = engine.stats()
        if not stats.running and not stats.waiting:
            return True
        time.sleep(0.01)
    return False


def test_a_stream_that_is_dropped_is_cancelled(engine):
    async def main():
        stream = engine.submit(Request("the cat", ENDLESS))
        await anext(stream)
        dropped = weakref.ref(stream)
        del stream
        gc.collect()
        assert dropped() is None
        return await asyncio.to_thread(idle, engine)

    assert asyncio.run(main())
    assert not engine._live


def test_an_engine_that_is_dropped_is_closed(path, tmp_path):
    engine = Engine(path, context_length=CONTEXT, max_batch=2, ledger=tmp_path / "ledger")

    async def main(engine):
        async for _ in engine.submit(Request("the cat", SamplingParams(max_tokens=2, ignore_eos=True))):
            pass

    asyncio.run(main(engine))
    thread, runner = engine._thread, weakref.ref(engine._core.runner)
    assert thread.is_alive()
    del engine
    for _ in range(200):  # its thread may be at the end of a step, and hold the request until then
        gc.collect()
        thread.join(timeout=0.1)
        if not thread.is_alive():
            break
    assert not thread.is_alive()
    gc.collect()
    assert runner() is None


LEFT = """
import asyncio, sys
from realm_jax import Engine, Request, SamplingParams
engine = Engine(sys.argv[1], context_length=512, max_batch=2)
async def main():
    await anext(engine.submit(Request("the cat", SamplingParams(max_tokens=None, ignore_eos=True))))
asyncio.run(main())
print("left")
"""


def test_a_process_may_end_while_its_engine_runs(path):
    done = subprocess.run([sys.executable, "-c", LEFT, path], capture_output=True, text=True, timeout=120, check=False)
    assert (done.returncode, done.stdout) == (0, "left\n"), done.stderr


def test_submitting_outside_a_coroutine(engine):
    with pytest.raises(InvalidRequestError, match="accepted: from a coroutine"):
        engine.submit(Request("the cat"))
    assert idle(engine)


def test_a_stream_belongs_to_its_event_loop(engine):
    """In another it would wait for ever: what wakes it up is called in the first."""

    async def start():
        return engine.submit(Request("the cat", ENDLESS))

    async def go_on(stream):
        await anext(stream)

    stream = asyncio.run(start())
    with pytest.raises(InvalidRequestError, match="another event loop"):
        asyncio.run(asyncio.wait_for(go_on(stream), 20))
    del stream
    gc.collect()
    assert idle(engine)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"deadline": 10**400}, "deadline is 1000"),
        ({"deadline": HUGE}, "deadline is a value of type int"),
        ({"adapter_scale": HUGE}, "scale is a value of type int"),
        ({"adapter": "x" * 10**6}, "there is no adapter 'xxx"),
        ({"prompt": [HUGE]}, "holds a value of type int"),
        ({"params": SamplingParams(stop_token_ids=[HUGE])}, "stop_token_ids names token a value of type int"),
        ({"params": SamplingParams(logit_bias={HUGE: 1.0})}, "logit_bias names token a value of type int"),
    ],
)
def test_values_that_cannot_be(engine, fields, message):
    async def main():
        engine.submit(Request(**{"prompt": "the cat"} | fields))

    with pytest.raises(RealmError, match=message) as caught:
        asyncio.run(main())
    assert len(str(caught.value)) < 300
    assert idle(engine)


@pytest.mark.parametrize("options", [{"weight": HUGE}, {"tokens_per_minute": 10**400}, {"requests_per_minute": 5e-324}])
def test_tenants_out_of_all_range(options):
    with pytest.raises(InvalidRequestError, match="accepted: a number above 0"):
        Tenant("a", **options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tenants": 5}, "tenants is 5"),
        ({"ledger": 5}, "ledger is 5"),
        ({"ledger": "a\0b"}, "ledger is"),
        ({"progress": 5}, "progress is 5"),
        ({"foo": 1}, "unknown option 'foo'"),
    ],
)
def test_options_that_cannot_be(path, tmp_path, monkeypatch, options, message):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InvalidRequestError, match=message):
        Engine(path, **options)
    assert not list(tmp_path.iterdir())


def test_after_close(path, tmp_path):
    engine = Engine(path, context_length=256, ledger=tmp_path / "ledger")
    engine.close()
    for use in (engine.stats, lambda: engine.usage("default"), engine.warm_up, lambda: engine.publish_prefix("a")):
        with pytest.raises(RealmError, match="closed"):
            use()
    assert engine.cancel("unknown") is False
    engine.close()


def test_a_ledger_that_cannot_be_written_at_the_end(path, tmp_path, monkeypatch):
    engine = Engine(path, context_length=256, ledger=tmp_path / "ledger")

    def fail():
        raise RealmError("the ledger cannot be written: disk full")

    with monkeypatch.context() as patch:
        patch.setattr(engine._core.loop.ledger, "close", fail)
        with pytest.raises(RealmError, match="disk full"):
            engine.close()
        assert engine._core.runner is None
    engine.close()


def test_a_fork_leaves_the_engine_to_its_parent(path, tmp_path, monkeypatch):
    engine = Engine(path, context_length=256, ledger=tmp_path / "ledger")
    with monkeypatch.context() as patch:
        patch.setattr(engine._core, "_process", -1)  # as a child sees it
        engine._core.loop.ledger._pending["default"] = engine.usage("default")
        engine.close()
    assert engine._core.loop.ledger._open
    engine.close()
    assert not engine._core.loop.ledger._open


def test_many_threads_and_event_loops(engine):
    """Submitting, cancelling, dropping and timing out, each in an event loop of its own."""
    failures = []

    async def play(seed):
        params = SamplingParams(max_tokens=6, ignore_eos=True, temperature=1.0, seed=1)
        expected = [token async for event in engine.submit(Request("the cat", params)) for token in event.tokens]
        for i in range(8):
            stream = engine.submit(Request("the cat", params if i % 4 == 0 else ENDLESS))
            if i % 4 == 0:
                assert [token async for event in stream for token in event.tokens] == expected
            elif i % 4 == 1:
                await anext(stream)
                engine.cancel(stream.request_id)
                assert [event async for event in stream][-1].finish_reason == "cancelled"
            elif i % 4 == 2:
                del stream
            else:
                with pytest.raises(asyncio.TimeoutError):
                    await asyncio.wait_for(asyncio.gather(collect(stream)), 0.02)

    async def collect(stream):
        return [event async for event in stream]

    def work(seed):
        try:
            asyncio.run(play(seed))
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=(seed,), daemon=True) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=60)
    assert not failures
    assert not any(thread.is_alive() for thread in threads)
    gc.collect()
    assert idle(engine)
    assert not engine._live
