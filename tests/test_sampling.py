"""The device sampler against numpy, against the exact distribution, and against itself in other company."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import chi2

from realm_jax import sampling
from realm_jax.sampling import BAD_LOGITS, History, RowParams

truncated = jax.jit(sampling.truncated)
gumbel_noise = jax.jit(sampling.gumbel_noise, static_argnums=2)
VOCAB = 1009  # odd: nothing lines up with a vector register


def make_rows(batch, **given_):
    values = {
        "seed": np.zeros((batch, 2), np.uint32),
        "position": np.arange(batch, dtype=np.int32),
        "temperature": np.ones(batch, np.float32),
        "top_k": np.zeros(batch, np.int32),
        "top_p": np.ones(batch, np.float32),
        "min_p": np.zeros(batch, np.float32),
        "typical_p": np.ones(batch, np.float32),
        "repetition": np.ones(batch, np.float32),
        "frequency": np.zeros(batch, np.float32),
        "presence": np.zeros(batch, np.float32),
        "slot": np.arange(batch, dtype=np.int32),
    }
    for name, value in given_.items():
        values[name] = np.broadcast_to(np.asarray(value, values[name].dtype), values[name].shape).copy()
    return RowParams(**values)


ALL = np.uint32(0xFFFFFFFF)


def shaped(logits, rows, history, drafts=(), masks=None, count=True):
    """sampling.sample_shaped without drafts or masks where none are given."""
    batch, vocab = logits.shape
    padded = np.full((batch, sampling.MAX_DRAFTS), -1, np.int32)
    for row, given_ in zip(padded, drafts):
        row[: len(given_)] = given_
    if masks is None:
        masks = np.full((batch, sampling.mask_words(vocab)), ALL)
    return sampling.sample_shaped(logits, rows, history, padded, masks, np.bool_(count))


def take(rows, index):
    return RowParams(**{name: getattr(rows, name)[index] for name in RowParams.__dataclass_fields__})


def random_logits(batch, vocab=VOCAB, seed=0, scale=3.0):
    return np.random.default_rng(seed).normal(scale=scale, size=(batch, vocab)).astype(np.float32)


def softmax(x):
    e = np.exp(x.astype(np.float64) - np.max(x))
    return e / e.sum()


# A plain reading of each truncation, with sorts, one row at a time, in float64.


def smallest_set(order, mass, target):
    cumulative = np.cumsum(mass[order])
    needed = int(np.searchsorted(cumulative, target)) + 1
    return set(order[:needed].tolist())


def numpy_top_k(z, kept, k):
    order = np.argsort(-z, kind="stable")
    return {int(i) for i in [i for i in order if i in kept][:k]}


def numpy_top_p(z, kept, p):
    members = np.array(sorted(kept))
    probability = softmax(z[members])
    order = np.argsort(-z[members], kind="stable")
    return {int(members[i]) for i in smallest_set(order, probability, p)}


def numpy_typical(z, kept, p):
    members = np.array(sorted(kept))
    probability = softmax(z[members])
    surprise = -np.log(probability)
    entropy = np.sum(probability * surprise)
    order = np.argsort(np.abs(surprise - entropy), kind="stable")
    return {int(members[i]) for i in smallest_set(order, probability, p)}


def numpy_min_p(z, kept, p):
    best = max(z[i] for i in kept)
    return {i for i in kept if np.exp(np.float64(z[i]) - best) >= p}


def numpy_truncated(z, top_k=0, typical_p=1.0, top_p=1.0, min_p=0.0):
    kept = set(range(len(z)))
    if top_k:
        kept = numpy_top_k(z, kept, top_k)
    if typical_p < 1:
        kept = numpy_typical(z, kept, typical_p)
    if top_p < 1:
        kept = numpy_top_p(z, kept, top_p)
    return numpy_min_p(z, kept, min_p)


def device_truncated(z, **given_):
    rows = make_rows(len(z), **given_)
    return [set(np.flatnonzero(row).tolist()) for row in np.asarray(truncated(jnp.asarray(z), rows))]


@pytest.mark.parametrize(
    "options",
    [
        {"top_k": 1},
        {"top_k": 40},
        {"top_k": VOCAB + 5},
        {"top_p": 0.1},
        {"top_p": 0.9},
        {"top_p": 0.999},
        {"min_p": 0.05},
        {"min_p": 1.0},
        {"typical_p": 0.2},
        {"typical_p": 0.95},
        {"top_k": 50, "top_p": 0.8, "min_p": 0.02, "typical_p": 0.9},
    ],
    ids=str,
)
def test_truncation_equals_numpy(options):
    z = random_logits(16)
    z -= z.max(axis=-1, keepdims=True)
    for row, kept in zip(z, device_truncated(z, **options)):
        assert kept == numpy_truncated(row, **options)


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 2**31), st.integers(0, 8), st.floats(0.05, 1.0), st.floats(0.0, 0.9), st.floats(0.05, 1.0))
def test_truncation_of_random_small_vocabularies(seed, top_k, top_p, min_p, typical_p):
    z = np.round(np.random.default_rng(seed).normal(scale=2, size=(4, 12)), 1).astype(np.float32)  # with ties
    z -= z.max(axis=-1, keepdims=True)
    options = {"top_k": top_k, "top_p": top_p, "min_p": min_p, "typical_p": typical_p}
    for row, kept in zip(z, device_truncated(z, **options)):
        # float32 sums may differ from float64 ones where a cumulative probability meets the bound exactly
        nearby = [
            numpy_truncated(row, top_k, typical_p * a, min(1.0, top_p * b), min_p * c)
            for a in (1 - 1e-5, 1, 1 + 1e-5)
            for b in (1 - 1e-5, 1, 1 + 1e-5)
            for c in (1 - 1e-5, 1, 1 + 1e-5)
        ]
        assert kept in nearby
        assert kept


def test_equal_logits_are_kept_by_lowest_id():
    z = np.zeros((1, 8), np.float32)
    z[0, 6] = -0.0
    assert device_truncated(z, top_k=3) == [{0, 1, 2}]
    assert device_truncated(z, top_p=0.5) == [{0, 1, 2, 3}]
    z[0, 5] = 1.0
    assert device_truncated(z - 1, top_k=3) == [{0, 1, 5}]


@pytest.mark.parametrize(
    "options", [{"top_p": 1e-45}, {"typical_p": 1e-45}, {"top_p": 1e-30, "typical_p": 1e-30}], ids=str
)
def test_the_smallest_bounds_keep_one_token(options):
    z = random_logits(4, 50, scale=20)
    assert [len(kept) for kept in device_truncated(z - z.max(-1, keepdims=True), **options)] == [1] * 4


def test_threefry_known_answers():
    """The known-answer vectors published with Random123."""
    cases = [
        ((0, 0), (0, 0), (0x6B200159, 0x99BA4EFE)),
        ((0xFFFFFFFF, 0xFFFFFFFF), (0xFFFFFFFF, 0xFFFFFFFF), (0x1CB996FC, 0xBB002BE7)),
        ((0x13198A2E, 0x03707344), (0x243F6A88, 0x85A308D3), (0xC4923A9C, 0x483DF7A0)),
    ]
    for key, counter, expected in cases:
        words = [jnp.asarray([w], jnp.uint32) for w in (*key, *counter)]
        assert tuple(int(w[0]) for w in sampling.threefry2x32(*words)) == expected


def chi_square_passes(draws, probability):
    """At the 1e-6 level, rare tokens pooled; draws outside the support fail."""
    counts = np.bincount(draws, minlength=len(probability))
    assert counts[probability == 0].sum() == 0
    expected = probability * len(draws)
    common = expected >= 10
    observed = np.append(counts[common], counts[~common].sum())
    expected = np.append(expected[common], expected[~common].sum())
    observed, expected = observed[expected > 0], expected[expected > 0]
    statistic = np.sum((observed - expected) ** 2 / expected)
    return statistic < chi2.ppf(1 - 1e-6, df=max(len(observed) - 1, 1))


@pytest.mark.parametrize("by", ["position", "seed"])
@pytest.mark.parametrize(
    ("temperature", "options"),
    [(1.0, {}), (0.3, {}), (2.5, {}), (1.0, {"top_p": 0.7}), (1.5, {"top_p": 0.9, "top_k": 20}), (0.7, {"min_p": 0.1})],
    ids=str,
)
def test_draws_follow_the_exact_distribution(temperature, options, by):
    batch, vocab = 20_000, 61
    row = random_logits(1, vocab, seed=5, scale=1.5)[0]
    z = row / np.float32(temperature)
    probability = np.zeros(vocab)
    kept = sorted(numpy_truncated(z, **options))
    probability[kept] = softmax(z[kept])
    rows = make_rows(batch, temperature=temperature, **options)
    if by == "seed":
        rows = rows.replace(
            position=np.full(batch, 17, np.int32),
            seed=np.stack([np.zeros(batch), np.arange(batch)], -1).astype(np.uint32),
        )
    logits = jnp.broadcast_to(jnp.asarray(row), (batch, vocab))
    draws = np.asarray(sampling.sample(logits, rows, truncate=bool(options)))
    assert chi_square_passes(draws, probability)
    # the test has the power to notice a distribution that is slightly off
    sharper = probability**1.15
    assert not chi_square_passes(draws, sharper / sharper.sum())


def test_noise_has_the_moments_of_gumbel_and_its_tail():
    noise = np.asarray(gumbel_noise(np.array([[3, 4]], np.uint32), np.array([7], np.int32), 1 << 20)[0])
    assert np.isfinite(noise).all()
    assert abs(noise.mean() - 0.5772157) < 0.006
    assert abs(noise.var() - np.pi**2 / 6) < 0.012
    assert 9.5 < noise.max() < 23  # the largest of 2**20 lies near ln 2**20 = 13.9
    assert abs(np.mean(noise > 8) * 2**20 - np.exp(-8) * 2**20) < 5 * np.sqrt(np.exp(-8) * 2**20)


MODES = [
    ("plain", {}),
    ("truncated", {"top_k": 30, "top_p": 0.9, "min_p": 0.01, "typical_p": 0.95}),
]


@pytest.mark.parametrize(("name", "options"), MODES, ids=[m[0] for m in MODES])
def test_a_row_depends_on_itself_alone(name, options):
    """Alone, in batches of every size, in another place of the batch and with other neighbours: the same token."""
    batch, truncate = 8, bool(options)
    logits = random_logits(batch, seed=1, scale=0.5)
    rng = np.random.default_rng(2)
    rows = make_rows(batch, temperature=rng.uniform(0.2, 2.0, batch), **options)
    rows = rows.replace(seed=rng.integers(0, 2**32, (batch, 2), dtype=np.uint32))
    whole = np.asarray(sampling.sample(logits, rows, truncate))
    assert len(set(whole.tolist())) > 4
    for size in (1, 3):
        for start in range(0, batch - size + 1):
            part = slice(start, start + size)
            np.testing.assert_array_equal(sampling.sample(logits[part], take(rows, part), truncate), whole[part])
    order = rng.permutation(batch)
    np.testing.assert_array_equal(sampling.sample(logits[order], take(rows, order), truncate), whole[order])


def test_scores_are_bitwise_the_same_in_every_batch_size():
    logits = random_logits(8, seed=3)
    rows = make_rows(8, temperature=0.7, top_p=0.9, typical_p=0.9)
    kept = np.asarray(truncated(jnp.asarray(logits), rows))
    noise = np.asarray(gumbel_noise(rows.seed, rows.position, VOCAB))
    chosen, _, values = sampling.token_logprobs(logits, np.arange(8, dtype=np.int32))
    for size in (1, 4):
        part = slice(8 - size, 8)
        np.testing.assert_array_equal(truncated(jnp.asarray(logits[part]), take(rows, part)), kept[part])
        np.testing.assert_array_equal(gumbel_noise(rows.seed[part], rows.position[part], VOCAB), noise[part])
        fewer_chosen, _, fewer = sampling.token_logprobs(logits[part], np.arange(8 - size, 8, dtype=np.int32))
        np.testing.assert_array_equal(fewer, values[part])
        np.testing.assert_array_equal(fewer_chosen, chosen[part])


def test_every_program_gives_a_plain_request_the_same_token():
    """A neighbour with top_p or penalties moves the batch to another program; that must not show."""
    logits = random_logits(64, seed=8, scale=0.3)
    rows = make_rows(64, temperature=np.where(np.arange(64) % 4 == 0, 0.0, 0.9))
    plain = np.asarray(sampling.sample(logits, rows, truncate=False))
    np.testing.assert_array_equal(sampling.sample(logits, rows, truncate=True), plain)
    penalized, _ = shaped(logits, rows, History.empty(64, VOCAB))
    np.testing.assert_array_equal(penalized, plain)
    np.testing.assert_array_equal(np.asarray(sampling.sample_greedy(logits))[::4], plain[::4])


def test_greedy_takes_the_lowest_id_of_equals():
    logits = random_logits(3, seed=4)
    logits[0, [17, 300]] = 40
    logits[1, -1] = 40
    logits[2] = 0
    assert sampling.sample_greedy(logits).tolist() == [17, VOCAB - 1, 0]
    assert sampling.sample(logits, make_rows(3, temperature=0), False).tolist() == [17, VOCAB - 1, 0]


@pytest.mark.parametrize("temperature", [1e-3, 1e-4, 1e-6, 1e-38, 1e-45])
def test_tiny_temperatures_are_greedy_and_finite(temperature):
    logits = random_logits(8, scale=30)
    drawn = sampling.sample(logits, make_rows(8, temperature=temperature, top_p=0.9), True)
    np.testing.assert_array_equal(drawn, logits.argmax(-1))


def test_huge_temperature_is_uniform():
    draws = np.asarray(
        sampling.sample(
            jnp.broadcast_to(random_logits(1, 20), (20_000, 20)), make_rows(20_000, temperature=1e30), False
        )
    )
    assert chi_square_passes(draws, np.full(20, 1 / 20))


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_a_row_that_is_not_finite_is_flagged_alone(bad):
    logits = random_logits(4)
    broken = logits.copy()
    broken[2, 5] = bad
    rows = make_rows(4, top_p=0.9, frequency=0.5)
    good = np.asarray(sampling.sample(logits, rows, True))
    expected = np.where(np.arange(4) == 2, BAD_LOGITS, good)
    np.testing.assert_array_equal(sampling.sample(broken, rows, True), expected)
    tokens, history = shaped(broken, rows, History.empty(4, VOCAB))
    np.testing.assert_array_equal(tokens, expected)
    assert np.asarray(history.count).sum(-1).tolist() == [1, 1, 0, 1]
    assert sampling.sample_greedy(broken)[2] == BAD_LOGITS


def numpy_penalized(logits, in_prompt, count, bias, repetition, frequency, presence):
    x = logits.astype(np.float64)
    for token in range(len(x)):
        if in_prompt[token] or count[token]:
            x[token] = x[token] / repetition if x[token] > 0 else x[token] * repetition
        x[token] -= frequency * count[token] + (presence if count[token] else 0)
    return x + bias


def test_penalties_and_bias_equal_numpy():
    rng = np.random.default_rng(6)
    logits = random_logits(3)
    in_prompt = rng.random((3, VOCAB)) < 0.2
    count = rng.integers(0, 3, (3, VOCAB)).astype(np.int32)
    bias = np.where(rng.random((3, VOCAB)) < 0.1, 5.0, 0.0).astype(np.float32)
    rows = make_rows(
        3, repetition=[1.3, 1.0, 0.8], frequency=[0.5, -0.5, 0.0], presence=[0.0, 1.5, -1.0], slot=[2, 0, 1]
    )
    history = History(jnp.asarray(in_prompt), jnp.asarray(count), jnp.asarray(bias))
    none = np.full((3, sampling.MAX_DRAFTS), -1, np.int32)
    got = np.asarray(sampling._penalized(jnp.asarray(logits), rows, history, none))
    for i, slot in enumerate([2, 0, 1]):
        penalties = rows.repetition[i], rows.frequency[i], rows.presence[i]
        expected = numpy_penalized(logits[i], in_prompt[slot], count[slot], bias[slot], *penalties)
        np.testing.assert_allclose(got[i], expected, rtol=1e-5, atol=1e-5)


def test_sampled_tokens_are_counted_in_their_slots():
    """Greedy with a frequency penalty walks through tokens of nearly equal logits instead of repeating the best."""
    logits = np.tile(np.array([0.0, 1.0, 0.9, 0.8], np.float32), (2, 1))
    history = History.empty(3, 4)
    rows = make_rows(2, temperature=0, frequency=[0.25, 0.0], slot=[2, 0])
    walked = []
    for _ in range(4):
        tokens, history = shaped(logits, rows, history)
        walked.append(tokens.tolist())
    assert walked == [[1, 1], [2, 1], [3, 1], [1, 1]]
    assert np.asarray(history.count).tolist() == [[0, 4, 0, 0], [0, 0, 0, 0], [0, 2, 1, 1]]


def test_padding_rows_leave_no_trace():
    rows = make_rows(4, temperature=0, slot=[0, 99, 99, 99])
    _, history = shaped(random_logits(4), rows, History.empty(2, VOCAB))
    assert np.asarray(history.count).sum(-1).tolist() == [1, 0]


def test_write_history_replaces_one_row():
    history = History.empty(2, 4)
    _, history = shaped(random_logits(2, 4), make_rows(2), history)
    seen, count, bias = np.array([True, False, True, False]), np.arange(4, dtype=np.int32), np.ones(4, np.float32)
    history = sampling.write_history(history, 1, seen, count, bias)
    np.testing.assert_array_equal(history.in_prompt[1], seen)
    np.testing.assert_array_equal(history.count[1], count)
    np.testing.assert_array_equal(history.bias[1], bias)
    assert int(np.asarray(history.count)[0].sum()) == 1


def test_logprobs_are_the_log_softmax_of_the_raw_logits():
    logits = random_logits(5)
    tokens = np.array([0, 5, 77, 1008, 3], np.int32)
    chosen, ids, values = sampling.token_logprobs(logits, tokens)
    expected = np.log(np.stack([softmax(row) for row in logits]))
    np.testing.assert_allclose(chosen, expected[np.arange(5), tokens], atol=1e-5)
    np.testing.assert_array_equal(ids, np.argsort(-logits, axis=-1, kind="stable")[:, :20])
    np.testing.assert_allclose(values, np.take_along_axis(expected, np.asarray(ids), -1), atol=1e-5)
    assert sampling.token_logprobs(logits[:, :7], np.zeros(5, np.int32))[1].shape == (5, 7)
