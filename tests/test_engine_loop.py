"""The host loop over the fake runner: company does not matter, books balance, failures stay where they are."""

import os
import signal
import threading
import time

import numpy as np
import pytest
from fake_engine import CHUNK, EOS, VOCAB, FakeAdapters, FakeRunner, expected_greedy, fake_logits, make_request
from hypothesis import given, settings
from hypothesis import strategies as st

from realm_jax import sampling
from realm_jax.engine.loop import HostLoop
from realm_jax.engine.request import collect
from realm_jax.engine.tenants import Tenant
from realm_jax.errors import CapacityError, InvalidRequestError, RealmError
from realm_jax.results import Piece


@pytest.fixture
def runner():
    return FakeRunner()


@pytest.fixture
def loop(runner):
    loop = HostLoop(runner)
    yield loop
    scheduler = loop.scheduler
    assert not scheduler.waiting
    assert not scheduler.running
    assert scheduler.available == scheduler.pages.total == runner.num_pages
    with loop._changed:
        assert not loop._driving


def run(loop, requests):
    loop.submit(requests)
    return [collect(loop.pieces(request)) for request in requests]


def prompt(index, size):
    return bytes(np.random.default_rng(index).integers(97, 123, size, dtype=np.uint8))


def various_requests():
    """Fresh requests of every kind: greedy, seeded, truncated, penalised, biased, with logprobs; many lengths."""
    return [
        make_request(prompt(0, 3), max_tokens=9),
        make_request(prompt(1, 20), max_tokens=12, temperature=1.0, seed=7),
        make_request(prompt(2, 1), max_tokens=1),
        make_request(prompt(3, 33), max_tokens=20, temperature=0.8, top_p=0.9, top_k=20, seed=7),
        make_request(prompt(4, 16), max_tokens=15, temperature=1.2, frequency_penalty=1.0, seed=3),
        make_request(prompt(5, 17), max_tokens=10, logit_bias={113: 100.0}),
        make_request(
            prompt(6, 5), max_tokens=14, temperature=1.0, repetition_penalty=1.5, presence_penalty=0.5, seed=4
        ),
        make_request(prompt(7, 8), max_tokens=14, temperature=1.0, seed=2**64 - 1, logprobs=3),
        make_request(prompt(8, 40), max_tokens=None, temperature=1.0, min_p=0.1, typical_p=0.9, seed=9),
    ]


@pytest.mark.parametrize("size", [1, 2, CHUNK - 1, CHUNK, CHUNK + 1, 3 * CHUNK])
def test_greedy_equals_a_plain_loop(loop, size):
    [result] = run(loop, [make_request(prompt(size, size), max_tokens=12)])
    assert result.tokens == expected_greedy(prompt(size, size), 12)
    assert result.text == bytes(result.tokens).decode()
    assert result.finish_reason == "length"


def test_the_same_tokens_alone_together_and_in_another_order(loop):
    alone = [run(loop, [request])[0] for request in various_requests()]
    together = run(loop, various_requests())
    reverse = run(loop, various_requests()[::-1])[::-1]
    for one, many, back in zip(alone, together, reverse):
        assert one.tokens == many.tokens == back.tokens
        assert one.logprobs == many.logprobs == back.logprobs
        assert one.text == many.text == back.text


@pytest.mark.parametrize(("max_batch", "num_pages"), [(1, 16), (2, 17), (8, 128)])
def test_the_same_tokens_in_every_engine(loop, max_batch, num_pages):
    expected = [result.tokens for result in run(loop, various_requests())]
    other = HostLoop(FakeRunner(max_batch=max_batch, num_pages=num_pages))
    assert [result.tokens for result in run(other, various_requests())] == expected


def test_seeds_matter_and_repeat(loop):
    def draw(seed):
        return run(loop, [make_request(b"abc", max_tokens=16, temperature=1.0, seed=seed)])[0].tokens

    assert draw(1) == draw(1)
    assert draw(1) != draw(2)
    assert draw(2**63) != draw(2**31)


def test_draws_are_those_of_the_exact_distribution_at_each_position(loop):
    """The loop gives the sampler the right position: each token equals a draw made from scratch."""
    [result] = run(loop, [make_request(b"abc", max_tokens=8, temperature=0.9, seed=5)])
    known = list(b"abc")
    for token in result.tokens:
        noise = np.asarray(
            sampling.gumbel_noise(np.array([[0, 5]], np.uint32), np.array([len(known)], np.int32), VOCAB)
        )
        logits = fake_logits(known)
        assert token == int(np.argmax(logits / np.float32(0.9) + noise[0]))
        known.append(token)


def test_penalties_see_prompt_and_output(loop):
    """A bias makes one letter certain, until the penalty on its repetitions outweighs it."""
    bias = {ord("q"): 20.0}
    [free] = run(loop, [make_request(b"abc", max_tokens=12, logit_bias=bias)])
    assert free.text == "q" * 12
    [held] = run(loop, [make_request(b"abc", max_tokens=12, logit_bias={ord("q"): 8.0}, frequency_penalty=2.0)])
    assert 1 <= held.text.count("q") < 8
    [clean] = run(loop, [make_request(prompt(0, 3), max_tokens=9)])  # the slot's next request is free of both
    assert clean.tokens == expected_greedy(prompt(0, 3), 9)


def test_logprobs_are_of_the_raw_distribution(loop):
    [result] = run(loop, [make_request(b"abc", max_tokens=4, temperature=1.5, top_k=3, seed=1, logprobs=2)])
    known = list(b"abc")
    for entry in result.logprobs:
        logits = fake_logits(known).astype(np.float64)
        expected = logits - np.log(np.sum(np.exp(logits)))
        assert entry.logprob == pytest.approx(expected[entry.token], abs=1e-4)
        assert [token for token, _ in entry.top] == np.argsort(-expected)[:2].tolist()
        known.append(entry.token)
    [none] = run(loop, [make_request(b"abc", max_tokens=1, logprobs=0)])
    assert none.logprobs[0].top == ()


def test_many_more_requests_than_slots_and_pages(loop, runner):
    requests = [make_request(prompt(i, 1 + i % 30), max_tokens=1 + i % 17) for i in range(40)]
    for i, result in enumerate(run(loop, requests)):
        assert result.tokens == expected_greedy(prompt(i, 1 + i % 30), 1 + i % 17)
    assert max(len(step) for step in runner.steps) == runner.max_batch


def test_decoding_never_waits_for_a_prompt(loop, runner):
    """Once a request decodes, every further step brings it one token, whatever prompts arrive."""
    first = make_request(b"ab", max_tokens=12)
    loop.submit([first])
    stream = loop.pieces(first)
    next(stream)
    loop.submit(others := [make_request(prompt(i, 48), max_tokens=2) for i in range(3)])
    before = len(runner.steps)
    assert len(list(stream)) == 11
    decoding = [step[0] for step in runner.steps[before:]]
    assert decoding[:10] == [(3 + i, 1) for i in range(10)]  # two were on their way before
    assert [collect(loop.pieces(other)).finish_reason for other in others] == ["length"] * 3


ACTIONS = ["submit", "submit", "submit", "read", "read", "cancel", "finish", "exclusive", "load", "unload", "expire"]


def random_operations(data):
    """Submitting, streaming, cancelling, deadlines, adapters that come and go, exclusive work, tenants that preempt
    each other, too few pages: tokens as if alone, and nothing leaks."""
    adapters = FakeAdapters()
    tenants = [Tenant("a", weight=2.0), Tenant("b", max_pages=17), Tenant("c", min_pages=1)]
    regions = data.draw(st.sampled_from([1, 1, 2]))
    slots, pages = data.draw(st.integers(1, 4)), data.draw(st.integers(17, 40))
    runner = FakeRunner(max_batch=slots * regions, num_pages=pages * regions, regions=regions)
    loop = HostLoop(runner, tenants=tenants, adapters=adapters)
    streams = []

    def finish(entry):
        request, stream, expected, seen = entry
        seen += [token for piece in stream for token in piece.tokens]
        assert seen == expected[: len(seen)]
        assert request.finish_reason in ("cancelled", "deadline") or seen == expected

    for _ in range(data.draw(st.integers(1, 30))):
        action = data.draw(st.sampled_from(ACTIONS))
        if action == "submit":
            text = prompt(data.draw(st.integers(0, 3)), data.draw(st.integers(1, 40)))
            count = data.draw(st.integers(1, 20))
            name = data.draw(st.sampled_from([None, *adapters.names]))
            options = {
                "tenant": data.draw(st.sampled_from("abc")),
                "priority": data.draw(st.integers(0, 1)),
                "cache": data.draw(st.booleans()),
                "adapter": name,
                "deadline": data.draw(st.sampled_from([None, None, None, 1e-6])),
            }
            content = 0 if name is None else adapters.get(name).content
            request = make_request(text, max_tokens=count, options=options)
            loop.submit([request])
            streams.append((request, loop.pieces(request), expected_greedy(text, count, content), []))
        elif action == "exclusive":
            assert loop.exclusively(data.draw(st.integers(1, 64)), lambda table: "done") == "done"
        elif action == "load":
            loop.load_adapter(data.draw(st.sampled_from("xyz")), data.draw(st.integers(1, 9)))
        elif action == "unload" and adapters.names:
            loop.unload_adapter(data.draw(st.sampled_from(adapters.names)))
        elif streams and action in ("read", "cancel", "finish", "expire"):
            at = data.draw(st.integers(0, len(streams) - 1))
            if action == "read":
                streams[at][3].extend(next(streams[at][1], Piece("", [])).tokens)
            elif action == "cancel":
                loop.cancel([streams[at][0]])
            elif action == "expire" and streams[at][0].expires is not None:
                streams[at][0].expires = 0.0
            else:
                finish(streams.pop(at))
    for entry in streams:
        finish(entry)
    assert loop.scheduler.available == loop.scheduler.pages.total
    loop.scheduler.cache.forget()
    assert loop.scheduler.pages.free == loop.scheduler.pages.total
    assert sorted(loop.scheduler._free_slots) == list(range(runner.max_batch))
    assert not loop.scheduler.running
    assert not loop.scheduler.waiting
    assert not loop.scheduler._arrived
    assert all(account.open == 0 for account in loop.scheduler.accounts.values())
    assert loop._open == 0
    assert not adapters.unnamed
    assert all(resident.holders == 0 for resident in adapters.named.values())


@settings(max_examples=30, deadline=None)
@given(st.data())
def test_random_operations_keep_tokens_and_books(data):
    random_operations(data)


@pytest.mark.slow
@settings(max_examples=700, deadline=None)
@given(st.data())
def test_ten_thousand_random_operations(data):
    random_operations(data)


def test_streaming_gives_a_piece_per_step_and_the_host_is_one_step_behind(loop, runner):
    request = make_request(b"abc", max_tokens=5)
    loop.submit([request])
    seen = []
    for piece in loop.pieces(request):
        seen += piece.tokens
        assert len(runner.steps) == min(len(seen) + 1, 5)
    assert seen == expected_greedy(b"abc", 5)


def test_end_token_ends_and_frees(loop, runner):
    logits = np.zeros(VOCAB, np.float32)
    logits[EOS] = 9
    first = expected_greedy(b"abc", 1)
    runner.overrides[np.array([*b"abc", *first], np.int32).tobytes()] = logits
    [result] = run(loop, [make_request(b"abc")])
    assert (result.tokens, result.finish_reason) == ([*first, EOS], "stop")


@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize("params", [{}, {"temperature": 1.0, "presence_penalty": 0.5}, {"logprobs": 2}], ids=str)
def test_logits_that_are_not_finite_end_that_request_alone(loop, runner, bad, params):
    victim_prompt = prompt(90, 9)
    broken = fake_logits(list(victim_prompt))
    broken[5] = bad
    runner.overrides[np.frombuffer(victim_prompt, np.uint8).astype(np.int32).tobytes()] = broken
    requests = various_requests()[:3]
    victim = make_request(victim_prompt, **params)
    loop.submit([*requests, victim])
    with pytest.raises(RealmError, match="logits at position 9 are not finite"):
        list(loop.pieces(victim))
    expected = [result.tokens for result in run(HostLoop(FakeRunner()), various_requests()[:3])]
    assert [collect(loop.pieces(request)).tokens for request in requests] == expected


def test_cancel_frees_at_once_and_disturbs_nobody(loop):
    stays, goes = make_request(prompt(1, 20), max_tokens=12), make_request(prompt(2, 20), max_tokens=30)
    waits = make_request(prompt(3, 4), max_tokens=5)
    loop.submit([stays, goes, waits])
    stream = loop.pieces(goes)
    next(stream)
    free = loop.scheduler.pages.free
    loop.cancel([goes, waits])
    assert loop.scheduler.pages.free > free
    assert list(stream)[-1].finish_reason == "cancelled"
    assert collect(loop.pieces(waits)).finish_reason == "cancelled"
    assert collect(loop.pieces(stays)).tokens == expected_greedy(prompt(1, 20), 12)
    loop.cancel([stays, goes])  # what has ended stays as it is
    assert stays.finish_reason == "length"


def test_cancelled_during_the_last_step(loop, runner):
    """Nobody drives after it: what was cancelled meanwhile must be free all the same."""
    first, second = make_request(b"abc", max_tokens=1), make_request(b"def")
    loop.submit([first, second])
    runner.before_step = lambda tokens, starts: loop.cancel([second])
    assert collect(loop.pieces(first)).tokens == expected_greedy(b"abc", 1)
    assert second.finish_reason == "cancelled"
    assert loop.scheduler.available == loop.scheduler.pages.total


def test_cancelling_within_a_cancellation(loop):
    """As when the garbage collector closes one stream while another is being closed."""
    first, second = make_request(b"abc"), make_request(b"def")
    loop.submit([first, second])
    end = first.cancel

    def nested():
        loop.cancel([second])
        end()

    first.cancel = nested
    loop.cancel([first])
    assert first.finish_reason == second.finish_reason == "cancelled"


def test_cancel_before_the_first_step(loop, runner):
    request = make_request(b"abc")
    loop.submit([request])
    loop.cancel([request])
    assert collect(loop.pieces(request)).usage.completion_tokens == 0
    assert not runner.steps


def test_a_failing_step_ends_what_ran_and_the_engine_goes_on(loop, runner):
    def fail(tokens, starts):
        if len(runner.steps) == 2:
            runner.before_step = None
            raise MemoryError("device is full")

    runner.before_step = fail
    requests = [make_request(prompt(i, 5), max_tokens=6, presence_penalty=1.0) for i in range(6)]
    loop.submit(requests)
    for request in requests[:4]:
        with pytest.raises(MemoryError, match="device is full"):
            list(loop.pieces(request))
    [fifth, sixth] = [collect(loop.pieces(request)) for request in requests[4:]]
    expected = run(loop, [make_request(prompt(4, 5), max_tokens=6, presence_penalty=1.0)])
    assert fifth.tokens == expected[0].tokens
    assert sixth.finish_reason == "length"


def test_a_request_that_fails_by_itself_leaves_its_neighbours(loop):
    victim, other = make_request(b"abc"), make_request(b"def", max_tokens=4)

    def explode(token):
        raise RuntimeError("no text for this token")

    victim._detokenizer.push = explode
    loop.submit([victim, other])
    with pytest.raises(RuntimeError, match="no text"):
        list(loop.pieces(victim))
    assert collect(loop.pieces(other)).tokens == expected_greedy(b"def", 4)


def test_ctrl_c_during_a_step_waits_for_its_end(loop, runner):
    """The signal comes while the device works: the step is completed, then KeyboardInterrupt, and all goes on after."""
    request = make_request(b"abc", max_tokens=8)

    def interrupt(tokens, starts):
        if len(runner.steps) == 3:
            os.kill(os.getpid(), signal.SIGINT)

    runner.before_step = interrupt
    loop.submit([request])
    pieces = []
    with pytest.raises(KeyboardInterrupt):
        pieces.extend(loop.pieces(request))
    runner.before_step = None
    assert len(runner.steps) == 4
    assert request.generated == 3  # the fourth is read in the next step
    assert collect([*pieces, *loop.pieces(request)]).tokens[-5:] == expected_greedy(b"abc", 8)[-5:]
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_a_second_ctrl_c_breaks_the_step_and_the_engine_recovers(loop, runner):
    def interrupt(tokens, starts):
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(0.01)

    runner.before_step = interrupt
    request = make_request(b"abc")
    loop.submit([request])
    with pytest.raises(KeyboardInterrupt):
        list(loop.pieces(request))
    runner.before_step = None
    with pytest.raises(RealmError, match="interrupted"):
        list(loop.pieces(request))
    assert run(loop, [make_request(b"abc", max_tokens=3)])[0].tokens == expected_greedy(b"abc", 3)


def test_threads_share_the_batch(loop, runner):
    runner.before_step = lambda tokens, starts: time.sleep(0.001)
    results: dict[int, list] = {}

    def work(which):
        requests = [make_request(prompt(10 * which + i, 5 + i), max_tokens=8) for i in range(5)]
        results[which] = [result.tokens for result in run(loop, requests)]

    threads = [threading.Thread(target=work, args=(which,)) for which in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=60)
        assert not thread.is_alive()
    for which in range(4):
        assert results[which] == [expected_greedy(prompt(10 * which + i, 5 + i), 8) for i in range(5)]
    assert max(len(step) for step in runner.steps) == runner.max_batch


def test_exclusive_work_has_pages_of_its_own(loop, runner):
    request = make_request(b"abc", max_tokens=10)
    loop.submit([request])
    stream = loop.pieces(request)
    next(stream)

    def work(table):
        pages = set(table[:5].tolist())
        assert not pages & set(request.pages)
        runner.pool[sorted(pages)] = 77
        return len(pages)

    assert loop.exclusively(17, work) == 5
    assert [*b"".join(bytes(piece.tokens) for piece in stream)] == expected_greedy(b"abc", 10)[1:]


def test_exclusive_work_waits_for_pages_and_comes_before_those_that_wait(loop, runner):
    requests = [make_request(prompt(i, 52), max_tokens=4) for i in range(8)]  # 13 or 14 pages each, of 64
    loop.submit(requests)
    stream = loop.pieces(requests[0])
    next(stream)
    assert loop.scheduler.available < 15
    done = loop.exclusively(60, lambda table: [request.done for request in requests])
    assert done == [True] * 4 + [False] * 4
    assert all(collect(loop.pieces(request)).finish_reason == "length" for request in requests[1:])
    list(stream)


def test_exclusive_work_from_another_thread_while_one_streams(loop, runner):
    """It is announced during the sixth step, and has its turn right after it."""
    request = make_request(b"abc", max_tokens=40)
    order = []
    thread = threading.Thread(target=lambda: order.append(loop.exclusively(4, lambda table: len(runner.steps))))

    def announce(tokens, starts):
        if len(runner.steps) == 5:
            thread.start()
            while not loop._exclusive:
                time.sleep(0.001)

    runner.before_step = announce
    loop.submit([request])
    assert collect(loop.pieces(request)).tokens == expected_greedy(b"abc", 40)
    thread.join(timeout=30)
    assert order == [6]


def test_failing_exclusive_work(loop):
    request = make_request(b"abc")
    loop.submit([request])
    next(loop.pieces(request))

    def fail(table):
        raise MemoryError("device is full")

    with pytest.raises(MemoryError):
        loop.exclusively(4, fail)
    with pytest.raises(MemoryError):  # the call may have taken the cache with it
        list(loop.pieces(request))
    assert loop.exclusively(4, lambda table: "fine") == "fine"


def test_what_can_never_run_is_refused(loop):
    request = make_request(b"a" * 60, context_length=200, max_tokens=5)
    with pytest.raises(CapacityError, match="65 tokens need 17 pages of the cache; it has 16: 64 tokens"):
        loop.submit([make_request(b"ab"), request])
    with pytest.raises(CapacityError):
        loop.exclusively(65, lambda table: None)


def test_close_cancels_and_refuses(loop):
    request, waiting = make_request(b"abc"), make_request(b"def")
    loop.submit([request, waiting])
    stream = loop.pieces(request)
    next(stream)
    loop.close()
    assert list(stream)[-1].finish_reason == "cancelled"
    assert collect(loop.pieces(waiting)).finish_reason == "cancelled"
    with pytest.raises(InvalidRequestError, match="closed"):
        loop.submit([make_request(b"abc")])
    with pytest.raises(InvalidRequestError, match="closed"):
        loop.exclusively(4, lambda table: None)
    loop.close()


def test_a_request_that_was_refused_can_be_cancelled(loop):
    """As the caller does whose submit() failed: there is nothing to take out of the books."""
    stays, refused = make_request(b"abc", max_tokens=3), make_request(b"a" * 60, context_length=200, max_tokens=5)
    with pytest.raises(CapacityError):
        loop.submit([stays, refused])
    loop.cancel([stays, refused])
    assert refused.finish_reason == stays.finish_reason == "cancelled"
    assert run(loop, [make_request(b"abc", max_tokens=3)])[0].tokens == expected_greedy(b"abc", 3)


def test_ctrl_c_while_exclusive_work_is_announced(loop):
    """It comes as the lock is given back, before anything runs: the loop must not wait for that work for ever."""

    class Interrupted(threading.Condition):
        armed = True

        def __exit__(self, *args):
            super().__exit__(*args)
            if self.armed:
                self.armed = False
                raise KeyboardInterrupt

    loop._changed = Interrupted()
    with pytest.raises(KeyboardInterrupt):
        loop.exclusively(4, lambda table: None)
    assert not loop._changed.armed
    request = make_request(b"abc", max_tokens=3)
    loop.submit([request])
    outcome = []
    thread = threading.Thread(target=lambda: outcome.append(collect(loop.pieces(request))), daemon=True)
    thread.start()
    thread.join(timeout=30)
    assert [result.tokens for result in outcome] == [expected_greedy(b"abc", 3)]


def test_close_while_another_thread_runs(loop, runner):
    runner.before_step = lambda tokens, starts: time.sleep(0.002)
    requests = [make_request(prompt(i, 5), max_tokens=40) for i in range(6)]
    results = []
    thread = threading.Thread(target=lambda: results.extend(run(loop, requests)))
    thread.start()
    while not runner.steps:
        time.sleep(0.001)
    loop.close()
    thread.join(timeout=30)
    assert not thread.is_alive()
    assert {result.finish_reason for result in results} == {"cancelled"}


def test_nothing_is_traced_again_after_warm_up(loop):
    """Six programs per batch size, and two per engine; any mix of requests then runs without a new one."""
    programs = (
        sampling.sample_greedy,
        sampling.sample,
        sampling.sample_shaped,
        sampling.token_logprobs,
        sampling.write_last,
        sampling.write_history,
    )

    def traced():
        return sum(program._cache_size() for program in programs)

    for program in programs:
        program.clear_cache()
    kinds = [{}, {"temperature": 1.0}, {"temperature": 1.0, "top_p": 0.5}, {"presence_penalty": 1.0, "logprobs": 1}]
    for size in (1, 2, 4):
        for kind in kinds:
            run(loop, [make_request(b"abc", max_tokens=2, **kind) for _ in range(size)])
    assert traced() == 3 * 6 + 1
    run(loop, various_requests())
    run(loop, [make_request(prompt(50 + i, 3 + i), max_tokens=5 + i, temperature=0.1 * i, seed=i) for i in range(9)])
    run(loop, various_requests()[::-1])
    assert traced() == 3 * 6 + 1
