"""The sampler's host side: rows of drafts and rows under masks give what plain steps give."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from fake_engine import VOCAB, make_request
from hypothesis import given, settings
from hypothesis import strategies as st
from test_sampling import chi_square_passes, make_rows, softmax

from realm_jax import sampling
from realm_jax.engine.sampler import DrawRow, Sampler
from realm_jax.engine.speculation import accepted
from realm_jax.sampling import BAD_LOGITS, MAX_DRAFTS, NO_TOKEN

SLOTS = 3
KINDS = {
    "greedy": {},
    "plain": {"temperature": 0.9},
    "truncated": {"temperature": 1.2, "top_p": 0.8, "top_k": 40},
    "penalised": {"temperature": 0.8, "frequency_penalty": 1.5, "repetition_penalty": 1.3, "presence_penalty": 0.5},
    "biased": {"logit_bias": {5: 3.0, 299: 4.0}, "frequency_penalty": 2.0},
}


def bound(sampler, slot=1, prompt=b"abcab", output=(), **params):
    request = make_request(prompt, seed=11, **params)
    for token in output:
        request.append(token)
    request.slot = slot
    sampler.bind(request)
    return request


def logits_at(position, rows=4):
    """float32 [rows, VOCAB] that are the same in every row."""
    row = np.random.default_rng(position).normal(scale=2, size=VOCAB).astype(np.float32)
    return np.tile(row, (rows, 1))


def some_mask(seed, share=0.3):
    """A mask as words, and as bool [VOCAB]."""
    allowed = np.random.default_rng(seed).random(VOCAB) < share
    bits = np.zeros(sampling.mask_words(VOCAB) * 32, bool)
    bits[:VOCAB] = allowed
    return np.packbits(bits, bitorder="little").view(np.uint32), allowed


def one_by_one(params, count, masks=None):
    """Tokens of a request that is never verified, drawn step by step."""
    sampler = Sampler(SLOTS, VOCAB)
    request = bound(sampler, **params)
    for i in range(count):
        row = DrawRow(request, request.length, mask=None if masks is None else masks[i])
        [(token, _)] = sampler.dispatch(jnp.asarray(logits_at(request.length, 1)), [row], count=True).collect()
        request.append(token)
    return request.tokens[request.prompt_length : request.length].tolist()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("masked", [False, True], ids=["free", "masked"])
def test_rows_of_drafts_draw_what_single_steps_draw(kind, masked):
    """Right drafts and wrong ones, rounds of every length: the output is that of plain decoding."""
    count = 14
    masks = [some_mask(i)[0] for i in range(count)] if masked else None
    expected = one_by_one(KINDS[kind], count, masks)
    rng = np.random.default_rng(3)
    sampler = Sampler(SLOTS, VOCAB)
    request = bound(sampler, **KINDS[kind])
    while request.generated < count:
        done = request.generated
        k = int(rng.integers(0, min(4, count - done)))
        drafts = [t if rng.random() < 0.7 else int(rng.integers(0, VOCAB)) for t in expected[done : done + k]]
        rows = [
            DrawRow(request, request.length + i, tuple(drafts[:i]), masks[done + i] if masks else None)
            for i in range(k + 1)
        ]
        logits = np.concatenate([logits_at(row.position, 1) for row in rows] + [logits_at(0, 4 - len(rows))])
        drawn = [token for token, _ in sampler.dispatch(jnp.asarray(logits), rows, count=False).collect()]
        new = drawn[: accepted(drafts, drawn) + 1]
        sampler.accept([(request.slot, token) for token in new])
        for token in new:
            request.append(token)
    assert request.tokens[request.prompt_length : request.length].tolist() == expected


@pytest.mark.parametrize("kind", KINDS)
def test_a_request_that_comes_back_goes_on_as_it_was(kind):
    """After preemption it is bound again, in another slot, with its output so far."""
    expected = one_by_one(KINDS[kind], 10)
    sampler = Sampler(SLOTS, VOCAB)
    bound(sampler, slot=2, prompt=b"zz", frequency_penalty=2.0, logit_bias={3: 50.0})  # the slot's last request
    request = bound(sampler, slot=2, output=expected[:6], **KINDS[kind])
    for _ in range(4):
        logits = jnp.asarray(logits_at(request.length))
        drawn = sampler.dispatch(logits, [None, DrawRow(request, request.length)], count=True).collect()
        request.append(drawn[1][0])
    assert request.tokens[request.prompt_length : request.length].tolist() == expected


@pytest.mark.parametrize("kind", KINDS)
def test_a_mask_leaves_the_best_or_the_draw_among_what_it_allows(kind):
    sampler = Sampler(SLOTS, VOCAB)
    request = bound(sampler, **KINDS[kind])
    free = np.full(sampling.mask_words(VOCAB), 0xFFFFFFFF, np.uint32)
    for seed in range(5):
        mask, allowed = some_mask(seed, share=0.05)
        logits = logits_at(seed)
        rows = [DrawRow(request, 9), DrawRow(request, 9, mask=mask), DrawRow(request, 9, mask=free)]
        plain, masked, unmasked = (t for t, _ in sampler.dispatch(jnp.asarray(logits), rows, False).collect())
        assert plain == unmasked
        assert allowed[masked]
        assert not allowed[plain] or "top_p" in KINDS[kind] or plain == masked
        if kind == "greedy":
            assert masked == np.flatnonzero(allowed)[np.argmax(logits[0][allowed])]


def test_masked_draws_follow_the_softmax_over_what_is_allowed():
    mask, allowed = some_mask(1, share=0.1)
    logits = logits_at(2, 1)
    probability = np.zeros(VOCAB)
    probability[allowed] = softmax(logits[0][allowed] / np.float32(0.7))
    sampler = Sampler(1, VOCAB)
    request = bound(sampler, slot=0, temperature=0.7)
    batch = jnp.asarray(np.tile(logits, (4000, 1)))
    rows = [DrawRow(request, position, mask=mask) for position in range(4000)]
    draws = np.array([token for token, _ in sampler.dispatch(batch, rows, count=False).collect()])
    assert chi_square_passes(draws, probability)


@pytest.mark.parametrize("kind", KINDS)
def test_a_mask_that_allows_nothing_gives_no_token(kind):
    sampler = Sampler(SLOTS, VOCAB)
    request = bound(sampler, **KINDS[kind])
    nothing = np.zeros(sampling.mask_words(VOCAB), np.uint32)
    padding = nothing.copy()
    padding[-1] = 0xFFFFFFFF << (VOCAB % 32) & 0xFFFFFFFF  # only bits past the vocabulary
    logits = logits_at(4)
    logits[2, 7] = np.nan
    rows = [DrawRow(request, 9, mask=mask) for mask in (nothing, padding, nothing, some_mask(1)[0])]
    tokens = [token for token, _ in sampler.dispatch(jnp.asarray(logits), rows, count=False).collect()]
    assert tokens[:3] == [NO_TOKEN, NO_TOKEN, BAD_LOGITS]
    assert tokens[3] >= 0


def test_last_tokens_hold_each_slots_draw():
    sampler = Sampler(SLOTS, VOCAB)
    first, second = bound(sampler, slot=2), bound(sampler, slot=0, temperature=1.0)
    logits = logits_at(1)
    logits[2] = np.nan
    rows = [DrawRow(first, 5), None, DrawRow(second, 5)]
    drawn = sampler.dispatch(jnp.asarray(logits), rows, count=True)
    last = np.asarray(sampler.last_tokens)
    assert last[2] == drawn.collect()[0][0] == logits[0].argmax()
    assert last[0] == 0  # its logits were not finite; the code for that is no token to embed
    sampler.dispatch(jnp.asarray(logits_at(9)), rows, count=False)
    np.testing.assert_array_equal(sampler.last_tokens, last)


def test_logprobs_of_a_masked_row_are_of_the_raw_logits():
    sampler = Sampler(SLOTS, VOCAB)
    request = bound(sampler, logprobs=2, temperature=1.0)
    mask, allowed = some_mask(3, share=0.05)
    logits = logits_at(3)
    [(token, entry)] = sampler.dispatch(jnp.asarray(logits), [DrawRow(request, 7, mask=mask)], count=True).collect()
    assert allowed[token]
    assert entry.token == token
    assert entry.logprob == pytest.approx(np.log(softmax(logits[0]))[token], abs=1e-4)
    assert [t for t, _ in entry.top] == np.argsort(-logits[0])[:2].tolist()


def test_nothing_retraces_with_rows_drafts_or_masks():
    sampler = Sampler(SLOTS, VOCAB)
    penalised, greedy = bound(sampler, slot=0, **KINDS["penalised"]), bound(sampler, slot=1)
    mask = some_mask(1)[0]
    logits = jnp.asarray(logits_at(5))

    def use(rows, count):
        sampler.dispatch(logits, rows, count).collect()
        sampler.accept([(row.request.slot, 7) for row in rows if row is not None])

    use([DrawRow(penalised, 7)], True)
    use([DrawRow(greedy, 7)], True)
    use([DrawRow(greedy, 7, mask=mask)], True)
    programs = (sampling.sample_shaped, sampling.sample_greedy, sampling.sample_greedy_masked, sampling.count_tokens)
    before = [program._cache_size() for program in programs] + [sampling.write_last._cache_size()]
    use([DrawRow(penalised, 7), DrawRow(penalised, 8, (4,)), DrawRow(penalised, 9, (4, 5))], False)
    use([None, DrawRow(penalised, 7, tuple(range(MAX_DRAFTS)), mask), DrawRow(greedy, 3, (1,))], True)
    use([DrawRow(greedy, 7), DrawRow(greedy, 8, (3,)), None, DrawRow(greedy, 9, (3, 4))], True)
    use([DrawRow(greedy, 7), DrawRow(greedy, 8, (3,), mask)], False)
    assert [program._cache_size() for program in programs] + [sampling.write_last._cache_size()] == before


def test_a_lost_history_is_an_error_and_not_a_draw_without_penalties():
    sampler = Sampler(SLOTS, VOCAB)
    request = bound(sampler, **KINDS["penalised"])
    sampler.reset()
    with pytest.raises(RuntimeError, match="history was lost"):
        sampler.dispatch(jnp.asarray(logits_at(1)), [DrawRow(request, 5)], count=True)
    with pytest.raises(RuntimeError, match="history was lost"):
        sampler.accept([(request.slot, 5)])
    sampler.bind(request)
    assert sampler.dispatch(jnp.asarray(logits_at(1)), [DrawRow(request, 5)], count=True).collect()[0][0] >= 0


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 2**31), st.floats(0.1, 2.0), st.sampled_from([1.0, 0.9, 0.5]), st.floats(0.0, 1.0))
def test_acceptance_by_equality_gives_the_tokens_of_plain_sampling(seed, temperature, top_p, likeness):
    """A draft of any quality that draws with the same noise changes no token, and the closer it is the more is kept."""
    params = {"temperature": temperature, "top_p": top_p}
    target, draft = Sampler(SLOTS, VOCAB), Sampler(SLOTS, VOCAB)
    request = bound(target, **params, max_tokens=30)
    request.seed = seed
    target.bind(request)
    draft.bind(request)

    def token_of(sampler, position, drafts=(), other=0.0):
        logits = logits_at(position + seed, 1) + other * logits_at(position + 10**6 + seed, 1)
        row = DrawRow(request, position, drafts)
        return sampler.dispatch(jnp.asarray(logits), [row], count=False).collect()[0][0]

    start, end = request.length, request.length + 12
    plain = [token_of(target, position) for position in range(start, end)]
    while request.length < end:
        drafts = [token_of(draft, request.length + i, other=1 - likeness) for i in range(3)]
        drawn = [token_of(target, request.length + i, tuple(drafts[:i])) for i in range(4)]
        kept = accepted(drafts, drawn)
        assert likeness < 1 or kept == 3
        for token in drawn[: kept + 1]:
            request.append(token)
    assert request.tokens[start:end].tolist() == plain


@pytest.mark.parametrize(("temperature", "options"), [(0.5, {}), (1.0, {}), (1.6, {}), (1.0, {"top_p": 0.7})], ids=str)
def test_tokens_of_speculation_follow_the_targets_own_distribution(temperature, options):
    """Rounds of three drafts from another distribution, over many seeds: each position is distributed as the target."""
    vocab, seeds, k = 40, 6000, 3
    rng = np.random.default_rng(8)
    target = rng.normal(scale=1.5, size=(k + 1, vocab)).astype(np.float32)  # by position
    draft = target + rng.normal(scale=0.7, size=target.shape).astype(np.float32)
    draw = jax.jit(sampling.sample, static_argnames="truncate")

    def tokens(logits, position):
        rows = make_rows(seeds, temperature=temperature, position=position, **options).replace(
            seed=np.stack([np.zeros(seeds), np.arange(seeds)], -1).astype(np.uint32)
        )
        return np.asarray(draw(jnp.asarray(np.tile(logits[position], (seeds, 1))), rows, truncate=bool(options)))

    drafts = np.stack([tokens(draft, i) for i in range(k)], 1)
    drawn = np.stack([tokens(target, i) for i in range(k + 1)], 1)
    kept = np.array([accepted(list(d), list(t)) for d, t in zip(drafts, drawn)])
    assert 0.2 < kept.mean() / k < 0.95
    for position in range(k + 1):
        # The rounds that got so far; that they did depends on earlier positions' noise alone.
        emitted = drawn[kept >= position, position]
        z = target[position] / np.float32(temperature)
        probability = softmax(z)
        if options:
            order = np.argsort(-probability)
            keep = order[: int(np.searchsorted(np.cumsum(probability[order]), options["top_p"])) + 1]
            probability = np.where(np.isin(np.arange(vocab), keep), probability, 0)
            probability /= probability.sum()
        assert chi_square_passes(emitted, probability)
        sharper = probability**1.4
        assert not chi_square_passes(emitted, sharper / sharper.sum())
