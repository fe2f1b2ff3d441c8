"""The policy of speculation, without a model: guesses from the text, their acceptance, how many are worth making."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from realm_jax.engine.speculation import Adaptive, NGram, SpeculationStats, StepCosts, accepted

BUCKETS = (1, 2, 4, 8, 12, 16, 24, 32)
tokens_ = st.lists(st.integers(0, 4), max_size=60)


def bucket(rows):
    return next(size for size in BUCKETS if size >= rows)


@given(tokens_, tokens_)
def test_accepted_is_the_longest_common_prefix(drafts, drawn):
    n = accepted(drafts, drawn)
    assert drafts[:n] == drawn[:n]
    assert n == min(len(drafts), len(drawn)) or drafts[n] != drawn[n]


@given(tokens_, st.integers(0, 9), st.integers(1, 3), st.integers(0, 2), st.data())
def test_a_proposal_continues_the_last_occurrence_of_the_longest_ngram(tokens, k, min_n, more, data):
    text = np.array(tokens, np.int32)
    lookup = NGram(min_n + more, min_n)
    for stop in sorted(data.draw(st.lists(st.integers(0, len(text)), max_size=5))):
        lookup.update(text[:stop])  # in whatever pieces it came
    proposal = lookup.propose(text, k)
    expected = []
    for n in range(min_n + more, min_n - 1, -1):  # a scan of the whole text
        ends = [end for end in range(n, len(tokens)) if tokens[end - n : end] == tokens[len(tokens) - n :]]
        if ends:
            whole = list(tokens)
            for i in range(k):
                whole.append(whole[ends[-1] + i])
            expected = whole[len(tokens) :]
            break
    assert proposal == expected


def test_lookup_of_a_long_text_is_bounded_and_finds_what_is_near():
    text = np.arange(40_000, dtype=np.int32)
    near, far = np.append(text, [30_000, 30_001]).astype(np.int32), np.append(text, [3, 4]).astype(np.int32)
    assert NGram().propose(near, 3) == [30_002, 30_003, 30_004]
    assert NGram().propose(far, 3) == []
    with pytest.raises(ValueError, match="accepted: 1 <= min_n <= max_n"):
        NGram(1, 2)


def test_step_costs_are_medians_between_which_is_interpolated():
    costs = StepCosts(bucket)
    assert costs.seconds(3) is None
    for _ in range(3):
        assert not costs.measured(1)
        costs.observe(1, 1.0)
    assert costs.measured(1)
    assert costs.seconds(32) == 1.0  # unknown: worth trying
    for seconds in (900.0, 3.0):
        costs.observe(7, seconds)
    assert not costs.measured(8)  # one of two may have been held up
    costs.observe(7, 3.0)
    assert costs.seconds(5) == costs.seconds(8) == 3.0
    assert costs.seconds(2) == pytest.approx(1 + 1 / 7 * 2)
    assert costs.seconds(9) == 3.0
    for _ in range(2000):
        costs.observe(1, 1.0)
    assert costs.seconds(8) == 1.0  # too long ago


def test_a_hiccup_while_measuring_does_not_turn_it_off_for_good():
    costs = measured(1.0, 0.05)
    for _ in range(15):
        costs.observe(8, 1000.0)
    policy = Adaptive(7, costs)
    chosen = []
    for _ in range(3000):
        chosen.append(k := policy.choose(0))
        costs.observe(1 + k, 1.0 + 0.05 * bucket(1 + k))
        policy.observe(k, k)
    assert chosen[100] < 4
    assert chosen[-1] == 7


def test_nothing_is_drafted_before_plain_steps_are_measured_and_one_while_the_draft_is_not():
    costs = StepCosts(bucket)
    policy = Adaptive(7, costs)
    for _ in range(3):
        assert policy.choose(0) == 0
        costs.observe(1, 1.0)
    assert policy.choose(0, None) == 1
    assert policy.choose(0, 0.01) == 7
    assert policy.choose(3) == 0  # another size of batch


def measured(fixed, per_row):
    costs = StepCosts(bucket)
    for size in BUCKETS * 3:
        costs.observe(size, fixed + per_row * size)
    return costs


def simulate(choose, observe, acceptance, costs, others, draft, count=400, seed=0):
    """Seconds for `count` tokens, each draft right with a chance that depends on how many tokens there are."""
    rng = np.random.default_rng(seed)
    seconds, made = 0.0, 0
    while made < count:
        k = min(choose(others, draft), count - made - 1)
        right = rng.random(k) < acceptance(made)
        kept = k if right.all() else int(np.argmin(right))
        seconds += costs.seconds(others + 1 + k) + k * draft
        observe(k, kept)
        made += kept + 1
    return seconds


def adaptive_seconds(acceptance, costs, others=0, draft=0.0, max_drafts=7, count=400, seed=0):
    policy = Adaptive(max_drafts, costs)
    return simulate(policy.choose, policy.observe, acceptance, costs, others, draft, count, seed)


def fixed_seconds(k, acceptance, costs, others=0, draft=0.0, seed=0):
    return np.mean(
        [simulate(lambda *_: k, lambda *_: None, acceptance, costs, others, draft, seed=s) for s in range(6)]
    )


COSTS = {"flat": (1.0, 0.01), "sloped": (1.0, 0.15), "steep": (1.0, 0.7)}


@pytest.mark.parametrize("curve", COSTS)
@pytest.mark.parametrize("acceptance", [0.0, 0.2, 0.5, 0.8, 0.95, 1.0])
@pytest.mark.parametrize("draft", [0.0, 0.3])
def test_adaptation_never_costs_much_and_comes_near_the_best_fixed_number(curve, acceptance, draft):
    costs = measured(*COSTS[curve])
    fixed = [fixed_seconds(k, lambda _: acceptance, costs, draft=draft) for k in range(8)]
    adaptive = np.mean([adaptive_seconds(lambda _: acceptance, costs, draft=draft, seed=s) for s in range(6)])
    assert adaptive <= 1.05 * fixed[0]
    assert adaptive <= 1.12 * min(fixed)


@settings(max_examples=100, deadline=None)
@given(
    st.floats(0.0, 3.0),
    st.integers(0, 20),
    st.floats(0.0, 1.0),
    st.lists(st.floats(0.0, 1.0), min_size=1, max_size=8),
    st.integers(0, 99),
)
def test_no_acceptance_however_it_changes_costs_more_than_the_account_allows(per_row, others, draft, phases, seed):
    """Also when the text turns against what was learnt. In tokens: what the batch makes in the time of a plain step."""
    costs, steps, rng = measured(1.0, per_row), 300, np.random.default_rng(seed)
    plain = costs.seconds(others + 1)
    policy, lost = Adaptive(7, costs), 0.0
    for step in range(steps):
        k = policy.choose(others, draft)
        right = rng.random(k) < phases[step * len(phases) // steps]
        kept = k if right.all() else int(np.argmin(right))
        policy.observe(k, kept)
        lost += (costs.seconds(others + 1 + k) + k * draft - plain) / plain * (others + 1) - kept
        assert lost <= 2.0 + 0.02 * (step + 1) + 1e-6


@given(st.integers(0, 9), st.integers(0, 31), st.floats(0, 2), st.lists(st.integers(0, 9), max_size=40))
def test_choices_are_in_range_and_repeat(max_drafts, others, draft, kept):
    costs = measured(1.0, 0.1) if others < 20 else StepCosts(bucket)
    others = min(others, 32 - 1 - max_drafts)

    def choices():
        policy = Adaptive(max_drafts, costs)
        made = []
        for n in kept:
            made.append(k := policy.choose(others, draft))
            assert 0 <= k <= max_drafts
            policy.observe(k, min(n, k))
            assert 0 <= policy.acceptance <= 1
        return made

    assert choices() == choices()


def settled(acceptance, costs, others=0, draft=0.0, steps=60):
    """The choices of the last steps of many, each draft accepted or none."""
    policy = Adaptive(7, costs)
    made = []
    for _ in range(steps):
        made.append(k := policy.choose(others, draft))
        policy.observe(k, k if acceptance else 0)
    return made[-20:]


def test_it_goes_off_when_nothing_is_accepted_and_on_when_all_is():
    costs = measured(1.0, 0.15)
    probes = settled(0, costs)  # a second row costs 13 % of a step, so 2 % are a probe in 6.5 steps
    assert 1 <= sum(probes) <= 3
    assert settled(1, costs) == [7] * 20
    assert settled(1, measured(1.0, 100.0)) == [0] * 20  # every row costs a step: nothing to gain
    assert settled(1, costs, draft=5.0) == [0] * 20  # nor with a draft dearer than the target


def test_it_comes_back_when_the_text_turns():
    costs = measured(1.0, 0.15)
    policy = Adaptive(7, costs)
    for _ in range(200):
        policy.observe(policy.choose(0), 0)
    waited = 0
    while (k := policy.choose(0)) < 7:
        policy.observe(k, k)
        waited += 1
    assert 5 < waited < 40


def test_rows_that_the_bucket_has_anyway_are_filled():
    """Nine rows run as twelve: three drafts are free, a fourth is not."""
    costs = StepCosts(bucket)
    for size in BUCKETS * 3:
        costs.observe(size, float(size))
    policy = Adaptive(7, costs)
    assert policy.choose(8) == 3


def test_load_turns_it_off():
    """With memory's bandwidth to spare drafts are nearly free; with the arithmetic busy they are not."""
    costs = StepCosts(bucket)
    for size in BUCKETS * 3:
        costs.observe(size, max(1.0, size / 8))
    assert Adaptive(7, costs).choose(0) == 7
    busy = Adaptive(7, costs)
    assert sum(busy.choose(15) for _ in range(20)) == 0


def test_stats():
    stats = SpeculationStats()
    assert stats.acceptance_rate is None
    assert stats.acceptance is None
    for drafted, kept in ((4, 4), (4, 1), (0, 0), (2, 0)):
        stats.add(drafted, kept)
    assert stats == SpeculationStats(rounds=3, drafted=10, accepted=5, tried=7)
    assert stats.acceptance_rate == 0.5
    assert stats.acceptance == pytest.approx(5 / 7)
