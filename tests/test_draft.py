"""The draft model over a fake runner: it proposes what its model would draw, whatever became of its last drafts."""

import time
from types import SimpleNamespace

import jax.numpy as jnp
import numpy as np
import pytest
from fake_engine import PAGE, VOCAB, FakeRunner, fake_logits, make_request
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_models import write_tiny_model
from tiny_vocabularies import bpe_vocabulary, spm_vocabulary

from realm_jax.engine import draft as draft_module
from realm_jax.engine.draft import DraftModel
from realm_jax.engine.runner import Runner
from realm_jax.engine.sampler import DrawRow, Sampler
from realm_jax.errors import InvalidRequestError
from realm_jax.gguf import open_gguf
from realm_jax.model import load_model
from realm_jax.sampling import MAX_DRAFTS
from realm_jax.text import load_tokenizer

KINDS = [
    {},
    {"temperature": 1.0},
    {"temperature": 0.9, "top_p": 0.8},
    {"temperature": 0.8, "frequency_penalty": 1.0, "repetition_penalty": 1.2},
    {"logit_bias": {100: 6.0}, "presence_penalty": 1.0},
]


def make_draft(context=64, **options):
    return DraftModel(SimpleNamespace(config=SimpleNamespace(context_length=context)), FakeRunner(**options))


def running(slot, index, size, kind=0, seed=5):
    prompt = np.random.default_rng(index).integers(97, 123, size).astype(np.int32)
    request = make_request(prompt, seed=seed, max_tokens=None, **KINDS[kind])
    request.slot = slot
    return request


def drawn_alone(request, k):
    """What a model with fake_logits draws for the request's next k tokens, each from scratch."""
    tokens = request.tokens[: request.length].tolist()
    out = []
    for _ in range(k):
        sampler = Sampler(4, VOCAB)  # as many slots as the draft: programs are shared
        clone = make_request(tokens[: request.prompt_length], context_length=256, max_tokens=None)
        clone.params, clone.seed, clone.slot = request.params, request.seed, 0
        for token in tokens[request.prompt_length :]:
            clone.append(token)
        sampler.bind(clone)
        logits = jnp.asarray(fake_logits(tokens)[None])
        [(token, _)] = sampler.dispatch(logits, [DrawRow(clone, len(tokens))], count=False).collect()
        tokens.append(token)
        out.append(token)
    return out


@pytest.mark.parametrize("kind", range(len(KINDS)))
def test_it_drafts_what_its_model_would_draw(kind, monkeypatch):
    draft = make_draft()
    assert draft.seconds is None
    request = running(2, 1, 11, kind)
    for kept in (4, 0, 2, 4, 3, 4, 1):  # all drafts right, none, some
        [proposal] = draft.propose([(request, 4)])
        assert proposal == drawn_alone(request, 4)
        for token in [*proposal[:kept], 120 if kept < 4 else 121]:
            request.append(token)
    assert draft.seconds > 0
    later = time.perf_counter() + 61
    monkeypatch.setattr(draft_module.time, "perf_counter", lambda: later)
    assert draft.seconds is None


@pytest.mark.parametrize("kinds", [(0, 1, 2), (0, 3, 4)])
def test_requests_of_a_batch_do_not_mix(kinds):
    draft = make_draft()
    requests = [running(slot, slot, 5 + 3 * slot, kind) for slot, kind in enumerate(kinds)]
    for _ in range(3):
        proposals = draft.propose([(requests[0], 1), (requests[1], 5), (requests[2], 3)])
        assert [len(p) for p in proposals] == [1, 5, 3]
        for request, proposal in zip(requests, proposals):
            assert proposal == drawn_alone(request, len(proposal))
            for token in proposal[:2]:
                request.append(token)


def test_a_round_is_one_step_a_draft_and_reads_nothing_in_between(monkeypatch):
    draft = make_draft()
    request = running(0, 1, 6)
    draft.propose([(request, 2)])
    order, steps = [], len(draft._runner.steps)
    step, take = draft._runner.step, draft_module._take
    monkeypatch.setattr(draft._runner, "step", lambda *a, **k: (order.append("step"), step(*a, **k))[1])
    monkeypatch.setattr(draft_module, "_take", lambda *a: (order.append("read"), take(*a))[1])
    for token in draft.propose([(request, 5)])[0]:
        request.append(token)
    request.append(100)
    assert order == ["step"] * 5 + ["read"] * 5
    draft.propose([(request, 3)])
    assert [len(s) for s in draft._runner.steps[steps:]] == [1] * 5 + [2, 1, 1]  # the last draft was not run before


def test_a_long_text_is_caught_up_with_over_several_calls(monkeypatch):
    monkeypatch.setattr(draft_module, "PREFILL_TOKENS", 128)
    draft = make_draft(context=256, max_pages_per_slot=64)
    prompt = np.random.default_rng(0).integers(97, 123, 220).astype(np.int32)
    request = make_request(prompt, context_length=256, max_tokens=None)
    request.slot = 0
    chunks = []
    while not (proposal := draft.propose([(request, 2)])[0]):
        chunks.append(draft._runner.steps[-1])
        assert len(chunks) < 5
    assert proposal == drawn_alone(request, 2)
    assert max(n for s in draft._runner.steps for _, n in s) == 128 // 4
    assert chunks


def test_at_the_end_of_the_request_or_the_context_it_drafts_less():
    draft = make_draft(context=20)
    request = running(0, 3, 17)
    assert len(draft.propose([(request, 9)])[0]) == 3
    for _ in range(3):
        request.append(100)
    assert draft.propose([(request, 9)]) == [[]]
    short = make_request(b"abcdef", max_tokens=3)
    short.slot = 1
    assert len(draft.propose([(short, 9)])[0]) == 2  # a round makes one token more than its drafts
    assert len(make_draft().propose([(running(0, 1, 4), 99)])[0]) == MAX_DRAFTS


def test_without_pages_it_proposes_nothing_and_takes_back_those_of_who_waits():
    draft = make_draft(num_pages=6)
    first, second = running(0, 1, 3 * PAGE), running(1, 2, 3 * PAGE)
    assert draft.propose([(first, 3), (second, 3)])[1] == []
    first.slot = None  # preempted
    assert draft.propose([(second, 3)]) == [drawn_alone(second, 3)]
    first.slot, second.slot = 1, None  # and back, in another slot
    assert draft.propose([(first, 3)]) == [drawn_alone(first, 3)]
    draft.release(first)
    draft.release(second)
    draft.release(second)
    assert draft.pages.free == draft.pages.total


@pytest.mark.parametrize("kind", [1, 3])
def test_logits_that_are_not_finite_end_the_drafts_of_that_request(kind):
    draft = make_draft()
    request, other = running(0, 1, 6, kind), running(1, 2, 6, kind)
    expected = drawn_alone(request, 4)
    bad = np.array([*request.tokens[:6], *expected[:2]], np.int32)
    draft._runner.overrides[bad.tobytes()] = np.full(VOCAB, np.nan, np.float32)
    assert draft.propose([(request, 4), (other, 4)]) == [expected[:2], drawn_alone(other, 4)]


def test_a_failure_resets_it():
    draft = make_draft()
    request = running(0, 1, 6, 3)
    draft.propose([(request, 3)])

    def fail(*_):
        raise RuntimeError("device lost")

    draft._runner.before_step = fail
    with pytest.raises(RuntimeError, match="device lost"):
        draft.propose([(request, 3)])
    assert draft.pages.free == draft.pages.total
    draft._runner.before_step = None
    assert draft.propose([(request, 3)]) == [drawn_alone(request, 3)]


@pytest.mark.parametrize("vocab", [VOCAB - 40, VOCAB + 30])
def test_a_draft_of_another_width_draws_with_the_targets_noise(vocab):
    """Its logits are cut or padded to the target's, on which the noise depends."""
    config = SimpleNamespace(config=SimpleNamespace(context_length=64))
    draft = DraftModel(config, FakeRunner(), vocab_size=vocab)
    request = running(0, 1, 8, 1)
    tokens, expected = request.tokens[:8].tolist(), []
    sampler = Sampler(1, vocab)
    sampler.bind(request)
    for _ in range(3):
        row = np.pad(fake_logits(tokens), (0, max(vocab - VOCAB, 0)), constant_values=-1e30)[:vocab]
        [(token, _)] = sampler.dispatch(jnp.asarray(row[None]), [DrawRow(request, len(tokens))], False).collect()
        tokens.append(token)
        expected.append(token)
    assert draft.propose([(request, 3)]) == [expected]


@settings(max_examples=20, deadline=None)
@given(st.data())
def test_random_operations_keep_drafts_right_and_pages_balanced(data):
    """Requests join, leave, are preempted and come back elsewhere, with few pages; what is proposed is right."""
    draft = make_draft(num_pages=data.draw(st.integers(8, 40)))
    slots, waiting, count = dict.fromkeys(range(4)), [], 0
    for _ in range(data.draw(st.integers(1, 12))):
        free = [slot for slot, request in slots.items() if request is None]
        busy = [request for request in slots.values() if request is not None]
        action = data.draw(st.sampled_from(["join", "propose", "propose", "propose", "leave", "preempt", "return"]))
        if action == "join" and free:
            count += 1
            slot = data.draw(st.sampled_from(free))
            slots[slot] = running(slot, count, data.draw(st.integers(1, 40)), data.draw(st.integers(0, 4)), seed=count)
        elif action == "return" and free and waiting:
            request = waiting.pop(0)
            request.slot = data.draw(st.sampled_from(free))
            slots[request.slot] = request
        elif action in ("leave", "preempt") and busy:
            request = data.draw(st.sampled_from(busy))
            slots[request.slot] = None
            if action == "leave":
                draft.release(request)
            else:
                request.slot = None
                waiting.append(request)
        elif action == "propose" and busy:
            wanted = [(request, data.draw(st.integers(0, 4))) for request in busy]
            for (request, k), proposal in zip(wanted, draft.propose(wanted)):
                assert len(proposal) <= k
                assert proposal == drawn_alone(request, len(proposal))
                kept = data.draw(st.integers(0, len(proposal)))
                for token in [*proposal[:kept], 90 + kept][: request.limit - request.length - 1]:
                    request.append(token)
        held = [page for follower in draft._followers.values() for page in follower.pages]
        assert len(held) == len(set(held)) == draft.pages.total - draft.pages.free
    for request in [*slots.values(), *waiting]:
        if request is not None:
            draft.release(request)
    assert draft.pages.free == draft.pages.total
    assert not draft._followers
    assert not draft._bound


def test_vocabularies_are_compared_token_by_token():
    target = bpe_vocabulary()
    DraftModel.check_vocabulary(load_tokenizer(target), load_tokenizer(bpe_vocabulary()))
    other = bpe_vocabulary()
    other["tokenizer.ggml.tokens"][7] = "ĠĠĠ"
    with pytest.raises(InvalidRequestError, match=r"token 7 is b'   ', the target's is b'\\x07';"):
        DraftModel.check_vocabulary(load_tokenizer(target), load_tokenizer(other))
    with pytest.raises(InvalidRequestError, match="token 0 is b'<unk>'"):
        DraftModel.check_vocabulary(load_tokenizer(target), load_tokenizer(spm_vocabulary()))

    def longer(kind):
        more = bpe_vocabulary()
        more["tokenizer.ggml.tokens"] += ["<pad1>", "zzz"]
        more["tokenizer.ggml.token_type"] += [3, kind]
        return load_tokenizer(more)

    for a, b in ((longer(3), load_tokenizer(target)), (load_tokenizer(target), longer(5))):
        DraftModel.check_vocabulary(a, b)
    with pytest.raises(InvalidRequestError, match=r"token 289 \(b'zzz'\) is no padding"):
        DraftModel.check_vocabulary(load_tokenizer(target), longer(1))


def test_a_real_model_drafts_for_itself(tmp_path):
    """Through the real runner, with tokens that stay on the device: what greedy decoding gives."""
    write_tiny_model("llama", tmp_path / "tiny.gguf")
    with open_gguf(tmp_path / "tiny.gguf") as file:
        model = load_model(file, 256, None, backend="xla")
    runner = Runner(model, max_batch=2)
    prompt = np.random.default_rng(1).integers(0, runner.vocab_size, 19).astype(np.int32)
    table = np.arange(runner.max_pages_per_slot, dtype=np.int32)
    known = prompt.tolist()
    start = 0
    for _ in range(9):
        logits = runner.step_all(np.asarray(known[start:], np.int32), start, table)
        start = len(known)
        known.append(int(logits[-1].argmax()))
    draft = DraftModel(model, Runner(model, max_batch=2))
    request = make_request(prompt, context_length=256, max_tokens=None)
    request.slot = 0
    got = []
    for k, kept in ((3, 3), (2, 1), (2, 2)):
        proposal = draft.propose([(request, k)])[0]
        assert proposal == known[request.length : request.length + k]
        got += proposal
        for token in known[request.length : request.length + kept + 1]:
            request.append(token)
    assert len(set(got)) > 1
