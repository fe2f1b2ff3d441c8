"""The Engine on a tiny model: tenants side by side, events, quotas, faults that stay with the request that has them."""

import asyncio
import sqlite3
import subprocess
import sys
import time

import numpy as np
import pytest
from random_adapters import random_adapter
from tiny_models import tiny_spec, token_ids, write_spec

from realm_jax import LLM, Engine, Request, SamplingParams, Tenant
from realm_jax.engine.speculator import RequestSpeculation
from realm_jax.errors import AdapterError, CapacityError, InvalidRequestError, QuotaError, RealmError
from realm_jax.lora import weight_shapes
from realm_jax.lora.gguf_format import write_gguf
from realm_jax.model import load_model

CONTEXT = 512
GREEDY = SamplingParams(max_tokens=8, ignore_eos=True)
TENANTS = [
    Tenant("acme", weight=2.0, adapters=["support"]),
    Tenant("zeta", concurrent=2),
    Tenant("small", requests_per_minute=3),
    Tenant("tiny", tokens_per_minute=20),
]


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    target = tmp_path_factory.mktemp("engine") / "tiny.gguf"
    write_spec(tiny_spec("llama"), target, label="llama")
    return target


@pytest.fixture(scope="module")
def adapter_paths(path, tmp_path_factory):
    shapes = weight_shapes(load_model(path))
    paths = []
    for seed in range(3):
        paths.append(tmp_path_factory.mktemp("adapters") / f"{seed}.gguf")
        write_gguf(random_adapter(shapes, 4 + 8 * seed, seed=seed), paths[-1], 8.0)
    return paths


@pytest.fixture(scope="module")
def llm(path, adapter_paths):
    adapters = {"support": adapter_paths[0], "sales": adapter_paths[1]}
    with LLM(path, context_length=CONTEXT, max_batch=4, adapters=adapters) as llm:
        yield llm


def make(path, adapter_paths, max_batch):
    adapters = {"support": adapter_paths[0], "sales": adapter_paths[1]}
    return Engine(path, context_length=CONTEXT, max_batch=max_batch, tenants=TENANTS, adapters=adapters, queue_limit=20)


def check_books(engine):
    stats = engine.stats()
    assert stats.running == stats.waiting == 0
    assert stats.pages_free + stats.pages_cached == stats.pages_total
    assert not engine._live
    store = engine._core.loop.adapters._store
    assert all(resident.holders == 0 for resident in store._named.values())
    assert not store._unnamed


@pytest.fixture(scope="module")
def shared(path, adapter_paths):
    engine = make(path, adapter_paths, 4)
    yield engine
    engine.close()


@pytest.fixture
def engine(shared):
    yield shared
    check_books(shared)


@pytest.fixture
def fresh(path, adapter_paths):
    """An engine of the test's own: nothing is cached, nothing was used."""
    engine = make(path, adapter_paths, 1)
    yield engine
    check_books(engine)
    engine.close()


def within(engine, coroutine):
    """Runs a coroutine of the engine's user to its end."""

    async def main():
        result = await asyncio.wait_for(coroutine, timeout=120)
        for _ in range(200):  # what was cancelled ends with the step that runs
            if not engine.stats().running and not engine.stats().waiting:
                break
            await asyncio.sleep(0.01)
        return result

    return asyncio.run(main())


async def collect(stream):
    events = [event async for event in stream]
    assert [event.finish_reason is None for event in events] == [True] * (len(events) - 1) + [False]
    assert {event.request_id for event in events} == {stream.request_id}
    return [token for event in events for token in event.tokens], "".join(event.text for event in events), events[-1]


async def tokens_of(stream):
    return (await collect(stream))[0]


def test_events_are_the_tokens_one_by_one(engine, llm):
    async def main():
        stream = engine.submit(Request("the cat", SamplingParams(max_tokens=8, ignore_eos=True, logprobs=2), "acme"))
        return await collect(stream), [event async for event in stream]

    (tokens, text, last), rest = within(engine, main())
    expected = llm.generate("the cat", SamplingParams(max_tokens=8, ignore_eos=True, logprobs=2))
    assert (tokens, text, last.finish_reason) == (expected.tokens, expected.text, "length")
    assert last.usage.completion_tokens == 8
    assert rest == []


def test_many_tenants_adapters_and_seeds_in_one_batch_are_as_if_alone(engine, llm):
    def cases():
        for i in range(12):
            params = SamplingParams(
                max_tokens=6 + i, ignore_eos=True, temperature=0.7 * (i % 3), seed=i, top_p=0.9 if i % 2 else 1.0
            )
            yield token_ids(3 + 17 * i + 1)[1:], params, ["acme", "small", "tiny"][i % 3], [None, "support"][i % 2]

    async def main():
        streams = [
            engine.submit(Request(prompt, params, tenant="acme" if adapter else tenant, adapter=adapter))
            for prompt, params, tenant, adapter in cases()
            if tenant == "acme" or adapter
        ]
        return await asyncio.gather(*map(tokens_of, streams))

    found = within(engine, main())
    expected = [
        llm.generate(prompt, params, adapter=adapter).tokens
        for prompt, params, tenant, adapter in cases()
        if tenant == "acme" or adapter
    ]
    assert found == expected


def test_adapters_change_the_answer_and_scale_per_request(llm):
    prompt = token_ids(20)
    plain, support, sales = (llm.generate(prompt, GREEDY, adapter=name).tokens for name in (None, "support", "sales"))
    assert len({tuple(plain), tuple(support), tuple(sales)}) == 3
    assert llm.generate(prompt, GREEDY, adapter="support", adapter_scale=0.0).tokens == plain
    together = llm.generate([prompt] * 3, GREEDY, adapter=[None, "support", "sales"])
    assert [one.tokens for one in together] == [plain, support, sales]
    assert not np.array_equal(llm.logits(prompt, adapter="support"), llm.logits(prompt))
    assert llm.logits(prompt, adapter="support").argmax(-1)[-1] == support[0]


def test_adapters_come_and_go_while_requests_run(fresh, llm, adapter_paths):
    prompt, long = token_ids(20), SamplingParams(max_tokens=60, ignore_eos=True)

    async def main():
        old = fresh.submit(Request(prompt, long, "acme", "support"))
        await anext(old)
        fresh.load_adapter("support", adapter_paths[2])  # the same name, new content
        new = fresh.submit(Request(prompt, long, "acme", "support"))
        await anext(new)
        fresh.unload_adapter("support")
        with pytest.raises(AdapterError, match="no adapter 'support' now; loaded for 'acme' are: none"):
            fresh.submit(Request(prompt, long, "acme", "support"))
        return await asyncio.gather(*map(tokens_of, (old, new)))

    old, new = within(fresh, main())
    assert llm.generate(prompt, long, adapter="support").tokens[1:] == old
    llm.load_adapter("third", adapter_paths[2])
    assert llm.generate(prompt, long, adapter="third").tokens[1:] == new
    llm.unload_adapter("third")


def test_an_adapter_that_cannot_be_used_changes_nothing(engine, llm, tmp_path, adapter_paths):
    broken = tmp_path / "broken.gguf"
    broken.write_bytes(adapter_paths[0].read_bytes()[:-100])
    with pytest.raises(AdapterError, match=r"broken\.gguf"):
        engine.load_adapter("support", broken)

    async def main():
        return await tokens_of(engine.submit(Request("the cat", GREEDY, "acme", "support")))

    assert within(engine, main()) == llm.generate("the cat", GREEDY, adapter="support").tokens


REFUSED = [
    ({"tenant": "nobody"}, InvalidRequestError, "unknown tenant 'nobody'; accepted: acme, small, tiny, zeta"),
    ({"tenant": 5}, InvalidRequestError, "tenant is 5"),
    ({"adapter": "other"}, AdapterError, "tenant 'acme' may not use adapter 'other'; accepted: 'support'"),
    ({"adapter": "sales"}, AdapterError, "may not use adapter 'sales'"),
    ({"adapter": "other", "tenant": "zeta"}, AdapterError, "no adapter 'other'; loaded are: 'sales', 'support'"),
    ({"adapter_scale": float("inf")}, InvalidRequestError, "scale is inf"),
    ({"deadline": 0}, InvalidRequestError, "deadline is 0; accepted: a number of seconds above 0"),
    ({"priority": "high"}, InvalidRequestError, "priority is 'high'"),
    ({"cache": 1}, InvalidRequestError, "cache is 1"),
    ({"speculate": 99}, InvalidRequestError, "speculate is 99"),
    ({"params": SamplingParams(n=2)}, InvalidRequestError, "n is 2"),
    ({"params": 5}, InvalidRequestError, "params is 5"),
    ({"prompt": ""}, InvalidRequestError, "empty"),
    ({"prompt": [10**6]}, InvalidRequestError, "prompt holds 1000000"),
    ({"prompt": [1] * CONTEXT}, InvalidRequestError, f"{CONTEXT} tokens; accepted: at most {CONTEXT - 1}"),
]


@pytest.mark.parametrize(("changes", "error", "message"), REFUSED, ids=[str(case[0])[:40] for case in REFUSED])
def test_what_is_refused_is_refused_at_once(engine, changes, error, message):
    async def main():
        with pytest.raises(error, match=message) as caught:
            engine.submit(Request(**{"prompt": "the cat", "tenant": "acme"} | changes))
        assert "\n" not in str(caught.value)

    asyncio.run(main())
    assert engine.stats().waiting == 0
    assert not engine._live


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"name": ""}, "name is ''"),
        ({"name": "a", "weight": 0}, "tenant 'a': weight is 0; accepted: a number above 0"),
        ({"name": "a", "weight": float("nan")}, "weight is nan"),
        ({"name": "a", "tokens_per_minute": -1}, "tokens_per_minute is -1"),
        ({"name": "a", "concurrent": 0}, "concurrent is 0"),
        ({"name": "a", "adapters": "support"}, "adapters is 'support'; accepted: a list of names"),
        ({"name": "a", "max_pages": 2, "min_pages": 3}, "min_pages is 3"),
        ({"name": "a", "salt": "text"}, "salt is 'text'"),
    ],
    ids=str,
)
def test_tenants_that_cannot_be(options, message):
    with pytest.raises(InvalidRequestError, match=message):
        Tenant(**options)


def test_quotas(fresh):
    long = SamplingParams(max_tokens=100, ignore_eos=True)

    async def main():
        streams = [fresh.submit(Request("the cat", long, "zeta")) for _ in range(2)]
        with pytest.raises(QuotaError, match="tenant 'zeta' has 2 requests and sends 1 more; accepted: 2 at once"):
            fresh.submit(Request("the cat", GREEDY, "zeta"))
        for _ in range(3):
            await tokens_of(fresh.submit(Request("the cat", GREEDY, "small")))
        with pytest.raises(QuotaError, match=r"'small' is over 3 requests a minute; accepted again in 1[0-9]|20 s"):
            fresh.submit(Request("the cat", GREEDY, "small"))
        await tokens_of(fresh.submit(Request(token_ids(15), GREEDY, "tiny")))
        with pytest.raises(QuotaError, match=r"'tiny' is over 20 tokens a minute; accepted again in \d+ s"):
            fresh.submit(Request("the cat", GREEDY, "tiny"))
        assert all([len(await tokens_of(stream)) == 100 for stream in streams])
        return await tokens_of(fresh.submit(Request("the cat", GREEDY, "zeta")))

    assert len(within(fresh, main())) == 8


def test_a_full_queue(engine):
    streams = []

    def fill():
        for _ in range(30):
            streams.append(engine.submit(Request("the cat", GREEDY, "acme")))

    async def main():
        with pytest.raises(CapacityError, match="20 requests wait and 1 more come; accepted: 20 in all"):
            fill()
        return await asyncio.gather(*map(tokens_of, streams))

    assert len({tuple(tokens) for tokens in within(engine, main())}) == 1


def test_cancel_deadline_and_leaving(engine):
    endless = SamplingParams(max_tokens=None, ignore_eos=True)

    async def main():
        cancelled = engine.submit(Request("the cat", endless, "acme"))
        first = await anext(cancelled)
        assert engine.cancel(cancelled.request_id) is True
        rest = [event async for event in cancelled]
        assert rest[-1].finish_reason == "cancelled"
        assert engine.cancel(cancelled.request_id) is False
        assert engine.cancel("unknown") is False

        late = await collect(engine.submit(Request("the cat", endless, "acme", deadline=0.05)))
        assert late[2].finish_reason == "deadline"
        waited = await collect(engine.submit(Request("the cat", endless, "acme", deadline=1e-9)))
        assert (waited[0], waited[2].finish_reason) == ([], "deadline")

        left = engine.submit(Request("the cat", endless, "acme"))
        async for event in left:
            assert event.tokens == first.tokens
            break
        del left

        task = asyncio.create_task(collect(engine.submit(Request("the cat", endless, "acme"))))
        await asyncio.sleep(0.02)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    within(engine, main())


def test_a_consumer_that_never_reads_holds_up_nobody(engine, llm):
    async def main():
        silent = engine.submit(Request("the cat", GREEDY, "acme"))
        others = [engine.submit(Request("the cat", GREEDY, "acme")) for _ in range(5)]
        expected = llm.generate("the cat", GREEDY).tokens
        assert [await tokens_of(stream) for stream in others] == [expected] * 5
        return await tokens_of(silent) == expected

    assert within(engine, main())


def test_a_consumer_whose_event_loop_is_gone(engine, llm):
    endless = SamplingParams(max_tokens=None, ignore_eos=True)

    async def leave():
        return engine.submit(Request("the cat", endless, "acme"))

    stream = asyncio.run(leave())

    async def main():
        return await tokens_of(engine.submit(Request("the cat", GREEDY, "acme")))

    assert within(engine, main()) == llm.generate("the cat", GREEDY).tokens
    assert stream._request.done


def test_logits_that_are_not_finite_end_one_request(engine, llm, monkeypatch):
    runner = engine._core.runner
    parts = runner.parts
    poisoned = token_ids(9)[2:]

    def poison(tokens, starts, tables, **options):
        bad = [i for i, row in enumerate(tokens) if list(row) == list(poisoned)]
        return [
            (rows, logits.at[np.array([at for at, i in enumerate(rows) if i in bad], int)].set(np.nan))
            for rows, logits in parts(tokens, starts, tables, **options)
        ]

    async def main():
        other = engine.submit(Request("the cat", GREEDY, "acme"))
        with pytest.raises(RealmError, match="logits at position 7 are not finite"):
            await tokens_of(engine.submit(Request(poisoned, GREEDY, "acme")))
        return await tokens_of(other)

    monkeypatch.setattr(runner, "parts", poison)
    assert within(engine, main()) == llm.generate("the cat", GREEDY).tokens


def test_a_failing_device_ends_what_runs_and_the_engine_goes_on(engine, llm, monkeypatch):
    runner = engine._core.runner
    parts, count = runner.parts, iter(range(10**6))

    def fail(*args, **options):
        if next(count) == 3:
            raise MemoryError("device is full")
        return parts(*args, **options)

    async def main():
        first = engine.submit(Request("the cat", SamplingParams(max_tokens=50, ignore_eos=True), "acme"))
        with pytest.raises(MemoryError, match="device is full"):
            await tokens_of(first)
        return await tokens_of(engine.submit(Request("the cat", GREEDY, "acme")))

    monkeypatch.setattr(runner, "parts", fail)
    assert within(engine, main()) == llm.generate("the cat", GREEDY).tokens


def test_a_shared_prefix_is_computed_once_and_changes_nothing(fresh, llm):
    prompt = token_ids(300)

    async def main():
        results = []
        for tenant, cache in [("acme", True), ("acme", True), ("zeta", True), ("acme", False)]:
            results.append(await collect(fresh.submit(Request(prompt, GREEDY, tenant, cache=cache))))
        return results

    results = within(fresh, main())
    assert [last.usage.cached_tokens for _, _, last in results] == [0, 256, 0, 0]
    assert {tuple(tokens) for tokens, _, _ in results} == {tuple(results[0][0])}
    assert fresh.usage("acme").reused_tokens == 256
    assert fresh.usage("acme").prompt_tokens == 300 + 44 + 300
    assert results[0][0] == llm.generate(prompt, GREEDY).tokens


def test_the_cache_of_an_adapter_is_its_own(fresh):
    prompt = token_ids(200)

    async def main():
        found = []
        for adapter, scale in [("support", 1.0), ("support", 1.0), (None, 1.0), ("support", 0.5)]:
            request = Request(prompt, GREEDY, "acme", adapter, scale)
            found.append((await collect(fresh.submit(request)))[2].usage.cached_tokens)
        return found

    assert within(fresh, main()) == [0, 192, 0, 0]


def test_public_prefixes_are_shared(fresh):
    prompt = token_ids(200)
    assert fresh.publish_prefix(prompt[:150]) == 128

    async def main():
        return [
            (await collect(fresh.submit(Request(prompt, GREEDY, tenant))))[2].usage.cached_tokens
            for tenant in ("acme", "zeta", "acme")
        ]

    assert within(fresh, main()) == [0, 128, 192]


def test_preempted_requests_go_on_with_the_same_tokens(path, llm):
    """One slot, two tenants: the one that waits takes the slot over and over, and nothing of it shows."""
    params = [SamplingParams(max_tokens=400, ignore_eos=True, temperature=t, seed=3) for t in (0.0, 1.0)]
    params.append(SamplingParams(max_tokens=400, ignore_eos=True, temperature=1.0, seed=4, frequency_penalty=0.5))
    prompt = token_ids(40)
    engine = Engine(path, context_length=CONTEXT, max_batch=1, tenants=[Tenant(name) for name in "abc"])

    async def main():
        streams = [engine.submit(Request(prompt, p, tenant)) for p, tenant in zip(params, "abc")]
        return await asyncio.gather(*map(tokens_of, streams))

    found = within(engine, main())
    assert engine.stats().preemptions > 0
    assert found == [llm.generate(prompt, p).tokens for p in params]
    engine.close()


def test_stats_and_usage_add_up(fresh):
    async def main():
        await asyncio.gather(*(tokens_of(fresh.submit(Request("the cat", GREEDY, "acme"))) for _ in range(5)))

    within(fresh, main())
    stats, usage = fresh.stats(), fresh.usage("acme")
    assert stats.generated_tokens == usage.completion_tokens == 5 * 8
    assert (usage.requests, stats.tenants["acme"].running, stats.tenants["zeta"].served) == (5, 0, 0.0)
    assert stats.prompt_tokens == usage.prompt_tokens > 0
    assert stats.adapters == ("sales", "support")
    assert stats.fairness_gap == 0 < stats.fairness_bound
    with pytest.raises(InvalidRequestError, match="unknown tenant"):
        fresh.usage("nobody")


@pytest.fixture(scope="module")
def drafting(path, adapter_paths):
    """An engine whose draft is the model itself: without an adapter it is always right."""
    engine = Engine(path, context_length=CONTEXT, max_batch=2, draft=path, adapters={"support": adapter_paths[0]})
    yield engine
    engine.close()


MIXED = [
    (SamplingParams(max_tokens=30, ignore_eos=True), None, True),
    (SamplingParams(max_tokens=25, ignore_eos=True, temperature=0.9, seed=3), "support", 3),
    (SamplingParams(max_tokens=20, ignore_eos=True, temperature=1.1, seed=4, presence_penalty=0.5), "support", 2),
    (SamplingParams(max_tokens=22, ignore_eos=True, logprobs=2), "support", False),
    (SamplingParams(max_tokens=40, json_schema={"type": "array", "items": {"enum": ["a", "b"]}}), None, 4),
]


def test_drafts_adapters_grammars_and_penalties_in_one_batch_change_nothing(drafting, llm, monkeypatch):
    # As many drafts as may be: what pays on a tiny model is another matter.
    monkeypatch.setattr(RequestSpeculation, "choose", lambda self, others, seconds: self._adaptive._max)
    monkeypatch.setattr(RequestSpeculation, "observe", lambda self, *counts: self.stats.add(*counts))

    async def main():
        streams = [
            drafting.submit(Request(token_ids(30 + i), params, adapter=adapter, speculate=speculate))
            for i, (params, adapter, speculate) in enumerate(MIXED)
        ]
        return await asyncio.gather(*map(collect, streams))

    found = within(drafting, main())
    for i, ((params, adapter, _), (tokens, text, last)) in enumerate(zip(MIXED, found)):
        alone = llm.generate(token_ids(30 + i), params, adapter=adapter, speculate=False)
        assert (tokens, text, last.finish_reason) == (alone.tokens, alone.text, alone.finish_reason)
    assert found[0][2].speculation.accepted > 0
    assert found[3][2].speculation is None
    stats = drafting.stats()
    assert stats.drafted >= stats.accepted > 0
    pages = drafting._core.speculator._draft.pages
    assert pages.free == pages.total


def test_a_draft_of_another_vocabulary_is_refused(path, tmp_path):
    other = tmp_path / "other.gguf"
    write_spec(tiny_spec("llama-mha-spm"), other, label="llama-mha-spm")
    with pytest.raises(InvalidRequestError, match="the draft model has another vocabulary: token"):
        Engine(path, context_length=CONTEXT, draft=other)


def test_grammars_fail_before_anything_runs(engine):
    async def main():
        for options in ({"grammar": "start: ("}, {"json_schema": {"type": "nonsense"}}):
            with pytest.raises(InvalidRequestError):
                engine.submit(Request("the cat", SamplingParams(**options), "acme"))

    asyncio.run(main())


@pytest.mark.parametrize(
    ("form", "bound"), [pytest.param("F32", 1e-10, marks=pytest.mark.slow), ("BF16", 1e-5), ("Q8_0", 1e-3)]
)
def test_a_merged_adapter_answers_as_the_applied_one(path, adapter_paths, form, bound):
    prompt = token_ids(40)
    with LLM(path, context_length=CONTEXT, backend="xla", adapters={"a": adapter_paths[0]}) as llm:
        applied = llm.logits(prompt, adapter="a")
        report = llm.merge_adapter("a", form)
        merged = llm.logits(prompt)
        assert llm.generate(prompt, GREEDY).finish_reason == "length"
        stream = llm.stream(prompt, GREEDY)
        next(stream)
        with pytest.raises(InvalidRequestError, match="1 requests run or wait"):
            llm.merge_adapter("a", form)
    assert report.format == form
    assert report.worst < bound
    assert ((merged - applied) ** 2).sum() / (applied**2).sum() < 30 * bound


LEDGER_PROGRAM = """
import asyncio, sys
from realm_jax import Engine, Request, SamplingParams

async def main():
    async with Engine(sys.argv[1], context_length=512, max_batch=2, ledger=sys.argv[2]) as engine:
        params = SamplingParams(max_tokens=None, ignore_eos=True)
        async for event in engine.submit(Request(list(range(100, 110)), params)):
            print(len(event.tokens), flush=True)
            if engine.usage("default").completion_tokens >= 400:
                await asyncio.sleep(60)

asyncio.run(main())
"""


def test_the_ledger_survives_a_kill(path, tmp_path):
    ledger = tmp_path / "usage.db"
    total = 0
    for kills in (1, 2):
        process = subprocess.Popen(
            [sys.executable, "-c", LEDGER_PROGRAM, str(path), str(ledger)], stdout=subprocess.PIPE, text=True
        )
        for _ in range(5):
            assert process.stdout.readline() == "1\n"
        process.kill()
        process.wait()
        seen = 5 + len(process.stdout.read().split())
        process.stdout.close()
        file = sqlite3.connect(ledger)
        [(prompt, completion, requests)] = file.execute(
            "SELECT prompt_tokens, completion_tokens, requests FROM usage WHERE tenant = 'default'"
        ).fetchall()
        file.close()
        assert (prompt, requests) == (10 * kills, kills)
        assert seen <= completion - total <= 502
        total = completion
    engine = Engine(path, context_length=CONTEXT, ledger=ledger)
    assert engine.usage("default").completion_tokens == total
    engine.close()


def test_ledgers_that_cannot_be_used(path, tmp_path):
    not_one = tmp_path / "text.db"
    not_one.write_text("no database at all, " * 100)
    for file in (not_one, tmp_path / "no" / "folder.db"):
        with pytest.raises(RealmError, match=r"the ledger .* cannot be used"):
            Engine(path, context_length=CONTEXT, ledger=file)


def test_warm_up_compiles_all_and_nothing_is_compiled_after(path, adapter_paths):
    engine = Engine(path, context_length=CONTEXT, max_batch=2, adapters={"a": adapter_paths[0]})
    engine.warm_up()
    warm = engine._core.runner.compiled
    assert engine.stats().generated_tokens == 0

    async def main():
        streams = []
        for i in range(12):
            params = SamplingParams(max_tokens=5 + i, temperature=0.5 * (i % 3), seed=i, ignore_eos=True)
            streams.append(engine.submit(Request(token_ids(1 + 23 * i), params, adapter=["a", None][i % 2])))
        return await asyncio.gather(*map(tokens_of, streams))

    within(engine, main())
    assert engine._core.runner.compiled == warm
    engine.close()


def test_a_closed_engine_refuses(path):
    engine = Engine(path, context_length=CONTEXT)

    async def main():
        async with engine:
            stream = engine.submit(Request("the cat", SamplingParams(max_tokens=None, ignore_eos=True)))
            await anext(stream)
        assert [event async for event in stream][-1].finish_reason == "cancelled"
        with pytest.raises(InvalidRequestError, match="closed"):
            engine.submit(Request("the cat"))

    started = time.perf_counter()
    asyncio.run(main())
    engine.close()
    assert time.perf_counter() - started < 60
