"""Speculation in the host loop, over the fake runner: nothing of it shows in the output, and the books balance."""

import numpy as np
import pytest
from fake_engine import VOCAB, FakeRunner, expected_greedy, fake_logits, make_request
from hypothesis import given, settings
from hypothesis import strategies as st

from realm_jax.engine.loop import HostLoop
from realm_jax.engine.request import collect
from realm_jax.engine.speculation import StepCosts
from realm_jax.engine.speculator import RequestSpeculation, Speculator
from realm_jax.results import Piece


class Guesses:
    """Drafts as a model would, right with a given chance: greedy guesses of the fake model, some of them spoiled."""

    seconds = 0.0

    def __init__(self, chance, seed=0):
        self.chance = chance
        self.random = np.random.default_rng(seed)
        self.released = []

    def propose(self, wanted):
        proposals = []
        for request, k in wanted:
            assert request.drawn == 0  # drafts follow tokens that the host knows
            known = list(request.tokens[: request.length])
            for _ in range(k):
                right = self.random.random() < self.chance
                known.append(int(fake_logits(known).argmax()) if right else int(self.random.integers(97, 123)))
            proposals.append(known[request.length :])
        return proposals

    def release(self, request):
        self.released.append(request.id)

    def reset(self):
        pass


class Eager(RequestSpeculation):
    """Always as many drafts as may be."""

    def __init__(self, k):
        super().__init__(k, StepCosts(lambda rows: rows))
        self.k = k

    def choose(self, others, draft_seconds):
        return self.k

    def observe(self, drafted, accepted):
        self.stats.add(drafted, accepted)


def make_loop(chance=0.7, max_batch=4, num_pages=64, **options):
    runner = FakeRunner(max_batch=max_batch, num_pages=num_pages)
    guesses = Guesses(chance)
    speculator = Speculator(runner.buckets.row_bucket, runner.buckets.all_rows[-1], guesses)
    loop = HostLoop(runner, speculator=speculator, **options)
    return loop, runner, guesses


def run(loop, requests):
    loop.submit(requests)
    return [collect(loop.pieces(request)) for request in requests]


def prompt(index, size):
    return bytes(np.random.default_rng(index).integers(97, 123, size, dtype=np.uint8))


def request(index, k, **params):
    options = {"speculation": Eager(k)} if k else None
    return make_request(prompt(index, 3 + 7 * index), options=options, **params)


KINDS = [
    {},
    {"temperature": 1.0, "seed": 7},
    {"temperature": 0.8, "top_p": 0.9, "top_k": 20, "seed": 8},
    {"temperature": 1.2, "frequency_penalty": 1.0, "seed": 3},
    {"logit_bias": {113: 5.0}, "repetition_penalty": 1.3},
    {"temperature": 1.0, "seed": 5, "logprobs": 3},
]


@pytest.mark.parametrize("chance", [0.0, 0.6, 1.0])
@pytest.mark.parametrize("k", [1, 3, 7])
def test_the_same_tokens_and_logprobs_with_and_without(k, chance):
    plain, _, _ = make_loop()
    expected = run(plain, [request(i, 0, max_tokens=12 + i, **kind) for i, kind in enumerate(KINDS)])
    loop, _, guesses = make_loop(chance)
    found = run(loop, [request(i, k, max_tokens=12 + i, **kind) for i, kind in enumerate(KINDS)])
    for one, other in zip(expected, found):
        assert (one.tokens, one.text, one.finish_reason) == (other.tokens, other.text, other.finish_reason)
        assert one.logprobs == other.logprobs
        assert one.usage == other.usage
    greedy = found[0].speculation
    assert greedy.drafted >= greedy.accepted
    if chance == 1.0:
        assert greedy.accepted == greedy.drafted > 0
        assert greedy.rounds == -(-10 // (k + 1))  # all but the first token, and a last one that needs no draft
    assert loop.stats().drafted == sum(result.speculation.drafted for result in found)
    assert loop.scheduler.available == loop.scheduler.pages.total
    assert len(guesses.released) == len(KINDS)


def test_rows_that_speculate_and_rows_that_do_not_share_a_batch():
    plain, _, _ = make_loop()
    expected = [result.tokens for result in run(plain, [request(i, 0, max_tokens=20) for i in range(4)])]
    loop, _, _ = make_loop()
    found = run(loop, [request(i, [0, 3, 0, 7][i], max_tokens=20) for i in range(4)])
    assert [result.tokens for result in found] == expected
    assert [result.speculation is None for result in found] == [True, False, True, False]


def test_stop_strings_and_limits_cut_within_a_round():
    tokens = expected_greedy(prompt(0, 3), 12)
    stop = bytes(tokens[4:6]).decode()
    loop, _, _ = make_loop(1.0)
    [stopped] = run(loop, [request(0, 7, max_tokens=12, stop=stop)])
    assert stopped.tokens == tokens[: stopped.usage.completion_tokens]
    assert (stopped.text, stopped.finish_reason) == (bytes(tokens[:4]).decode(), "stop")
    [ended] = run(loop, [request(0, 7, max_tokens=12, stop_token_ids=[tokens[6]])])
    assert ended.tokens == tokens[: tokens.index(tokens[6]) + 1]
    for count in range(1, 10):
        [limited] = run(loop, [request(0, 7, max_tokens=count)])
        assert (limited.tokens, limited.finish_reason) == (tokens[:count], "length")


def test_logits_of_a_draft_that_are_not_finite():
    """A wrong draft may lead anywhere; only what is on the way counts."""
    loop, runner, _ = make_loop(0.0)
    tokens = expected_greedy(prompt(0, 3), 10)
    known = np.array([*prompt(0, 3), *tokens[:4]], np.int32)
    broken = fake_logits(known)
    broken[:] = np.nan
    runner.overrides[known.tobytes()] = broken
    failing = request(0, 3, max_tokens=10)
    loop.submit([failing])
    with pytest.raises(Exception, match="logits at position 7 are not finite"):
        list(loop.pieces(failing))
    assert failing.generated == 4


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_random_operations_with_drafts(data):
    """Submitting, reading and cancelling in any order, pages short, tenants preempted: tokens as if alone."""
    loop, _, _ = make_loop(
        data.draw(st.sampled_from([0.0, 0.5, 0.9])),
        max_batch=data.draw(st.integers(1, 4)),
        num_pages=data.draw(st.integers(16, 30)),
    )
    streams = []

    def finish(entry):
        one, stream, expected, seen = entry
        seen += [token for piece in stream for token in piece.tokens]
        assert seen == expected[: len(seen)]
        assert one.finish_reason == "cancelled" or seen == expected

    for _ in range(data.draw(st.integers(1, 25))):
        action = data.draw(st.sampled_from(["submit", "submit", "read", "cancel", "finish"]))
        if action == "submit":
            text, count = (
                prompt(data.draw(st.integers(0, 5)), data.draw(st.integers(1, 40))),
                data.draw(st.integers(1, 20)),
            )
            k = data.draw(st.sampled_from([0, 1, 4, 7]))
            one = make_request(text, max_tokens=count, options={"speculation": Eager(k)} if k else None)
            loop.submit([one])
            streams.append((one, loop.pieces(one), expected_greedy(text, count), []))
        elif streams:
            at = data.draw(st.integers(0, len(streams) - 1))
            if action == "read":
                streams[at][3].extend(next(streams[at][1], Piece("", [])).tokens)
            elif action == "cancel":
                loop.cancel([streams[at][0]])
            else:
                finish(streams.pop(at))
    for entry in streams:
        finish(entry)
    assert loop.scheduler.available == loop.scheduler.pages.total
    assert not loop.scheduler.running
    assert not loop.scheduler.waiting
    assert loop._open == 0


def test_lookup_finds_what_repeats():
    """Without a draft model: a request that says what its prompt says is verified several tokens at a time."""
    runner = FakeRunner(max_pages_per_slot=64, num_pages=256)
    loop = HostLoop(runner, speculator=Speculator(runner.buckets.row_bucket, runner.buckets.all_rows[-1]))
    text = (b"the quick brown fox " * 4)[:70]
    known = list(np.frombuffer(text, np.uint8))
    target = list((b"the quick brown fox " * 12)[70:130])
    for token in target:  # the fake model repeats itself
        logits = np.zeros(VOCAB, np.float32)
        logits[token] = 9
        runner.overrides[np.array(known, np.int32).tobytes()] = logits
        known.append(token)
    [result] = run(loop, [make_request(text, 256, max_tokens=60, options={"speculation": Eager(7)})])
    assert result.tokens == target
    assert result.speculation.accepted == result.speculation.drafted >= 45
    assert len(runner.steps) < 20


def test_where_nothing_repeats_the_host_runs_ahead_and_looks_again_now_and_then():
    speculation = RequestSpeculation(4, StepCosts(lambda rows: rows))
    read_first = 0
    for _ in range(200):
        if speculation.active:
            read_first += 1
            speculation.looked_up(False)
        else:
            speculation.rest()
    assert read_first <= 8 + 200 // 9 + 1
    while not speculation.active:
        speculation.rest()
    speculation.looked_up(True)
    assert all(speculation.active for _ in range(7) if speculation.looked_up(False) is None)
