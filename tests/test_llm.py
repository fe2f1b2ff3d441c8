"""The public class LLM on tiny random models: what it returns, that company does not matter, and what it refuses."""

import dataclasses
import gc
import json
import math
import os
import signal
import threading
import weakref
from pathlib import Path

import numpy as np
import pytest
from tiny_models import VOCABULARY_SIZE, tiny_spec, token_ids, write_spec

from realm_jax import LLM, SamplingParams
from realm_jax.errors import (
    ChatTemplateError,
    InvalidRequestError,
    RealmError,
)

CONTEXT = 160
TEMPLATE = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}assistant:"
GREEDY = SamplingParams(max_tokens=12, ignore_eos=True)


def write(path: Path, case: str = "llama", **metadata: object) -> Path:
    spec = tiny_spec(case)
    spec.metadata.update(metadata)
    write_spec(spec, path, label=case)
    return path


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    return write(tmp_path_factory.mktemp("llm") / "tiny.gguf", **{"tokenizer.chat_template": TEMPLATE})


@pytest.fixture(scope="module")
def shared(path):
    with LLM(path, context_length=CONTEXT, max_batch=4) as llm:
        yield llm


@pytest.fixture
def llm(shared):
    yield shared
    scheduler = shared._loop.scheduler
    assert not scheduler.running
    assert not scheduler.waiting
    assert scheduler.available == scheduler.pages.total


@pytest.fixture(scope="module")
def spm(tmp_path_factory):
    """A SentencePiece model, which puts BOS before a text; no chat template."""
    with LLM(write(tmp_path_factory.mktemp("llm") / "spm.gguf", "llama-mha-spm"), context_length=CONTEXT) as llm:
        yield llm


def greedy_by_logits(llm, tokens, count):
    tokens = list(tokens)
    for _ in range(count):
        tokens.append(int(np.argmax(llm.logits(tokens)[-1])))
    return tokens[-count:]


# What comes out


def test_greedy_tokens_are_the_argmax_of_the_logits(llm):
    prompt = token_ids(20)
    out = llm.generate(prompt, GREEDY)
    assert out.tokens == greedy_by_logits(llm, prompt, 12)
    assert out.finish_reason == "length"
    assert (out.usage.prompt_tokens, out.usage.completion_tokens, out.usage.total_tokens) == (20, 12, 32)
    assert out.text == llm._core.tokenizer.decode(out.tokens, skip_special=True)
    assert out.choices == []


MIXED = [
    SamplingParams(max_tokens=9, ignore_eos=True),
    SamplingParams(max_tokens=14, temperature=1.0, seed=11, ignore_eos=True),
    SamplingParams(max_tokens=10, temperature=0.7, top_p=0.9, seed=11, ignore_eos=True),
    SamplingParams(max_tokens=12, temperature=1.3, presence_penalty=1.0, seed=5, logprobs=2, ignore_eos=True),
    SamplingParams(max_tokens=8, temperature=1.0, top_k=5, seed=2, ignore_eos=True),
    SamplingParams(max_tokens=20, temperature=1.0, seed=3, ignore_eos=True),
]
MIXED_PROMPTS = [token_ids(n) for n in (5, 17, 1, 130, 33, 64)]


def test_a_seed_gives_the_same_tokens_alone_in_a_list_and_in_another_order(llm):
    alone = [llm.generate(prompt, params) for prompt, params in zip(MIXED_PROMPTS, MIXED)]
    together = llm.generate(MIXED_PROMPTS, MIXED)
    reverse = llm.generate(MIXED_PROMPTS[::-1], MIXED[::-1])[::-1]
    assert len({tuple(out.tokens) for out in alone}) == len(MIXED)
    for one, many, back in zip(alone, together, reverse):
        assert one.tokens == many.tokens == back.tokens
        assert one.logprobs == many.logprobs == back.logprobs


def test_another_batch_size_gives_the_same_tokens(llm, path):
    expected = [out.tokens for out in llm.generate(MIXED_PROMPTS, MIXED)]
    with LLM(path, context_length=CONTEXT, max_batch=3) as other:
        assert [out.tokens for out in other.generate(MIXED_PROMPTS, MIXED)] == expected


def test_a_list_of_one_is_a_list(llm):
    [out] = llm.generate(["hello"], [GREEDY])
    assert out.tokens == llm.generate("hello", GREEDY).tokens


def test_prompts_of_every_form(llm):
    ids = llm.tokenize("the cat", parse_special=True)
    expected = llm.generate("the cat", GREEDY).tokens
    for prompt in (ids, tuple(ids), np.array(ids), np.array(ids, np.uint8 if max(ids) < 256 else np.int64)):
        assert llm.generate(prompt, GREEDY).tokens == expected
    mixed = llm.generate(["the cat", ids, np.array(ids)], GREEDY)
    assert [out.tokens for out in mixed] == [expected] * 3


def test_special_tokens_in_a_prompt_are_recognised(llm):
    assert llm.generate("<|bos|>the", GREEDY).usage.prompt_tokens == 1 + len(llm.tokenize("the"))


def test_streaming_equals_generate(llm):
    params = SamplingParams(max_tokens=16, temperature=1.0, seed=4, logprobs=1, ignore_eos=True)
    whole = llm.generate("the cat", params)
    pieces = list(llm.stream("the cat", params))
    assert "".join(piece.text for piece in pieces) == whole.text
    assert [token for piece in pieces for token in piece.tokens] == whole.tokens
    assert [entry for piece in pieces for entry in piece.logprobs] == whole.logprobs
    assert [piece.finish_reason for piece in pieces] == [None] * 15 + ["length"]
    assert pieces[-1].usage == whole.usage
    assert pieces[-1].timing.total > 0


def test_leaving_a_stream_frees_its_pages(llm):
    free = llm._loop.scheduler.available
    stream = llm.stream("the cat", SamplingParams(max_tokens=100, ignore_eos=True))
    next(stream)
    assert llm._loop.scheduler.available < free
    stream.close()
    assert llm._loop.scheduler.available == free
    llm.stream("the cat").close()  # never started
    assert llm._loop.scheduler.available == free


def test_two_streams_and_a_list_interleaved(llm):
    expected = [llm.generate(prompt, GREEDY).tokens for prompt in ("a", "b", "c")]
    first, second = llm.stream("a", GREEDY), llm.stream("b", GREEDY)
    tokens = [next(first).tokens[0], next(second).tokens[0]]
    assert [out.tokens for out in llm.generate(["c", "c"], GREEDY)] == [expected[2]] * 2
    assert tokens[:1] + [token for piece in first for token in piece.tokens] == expected[0]
    assert tokens[1:] + [token for piece in second for token in piece.tokens] == expected[1]


def test_threads(llm):
    prompts = [["the", "cat"], ["in", "a hat"], ["on the", "mat"]]
    expected = [[out.tokens for out in llm.generate(pair, GREEDY)] for pair in prompts]
    got: dict[int, list] = {}

    def work(i):
        got[i] = [out.tokens for out in llm.generate(prompts[i], GREEDY)]
        llm.embed("the cat")

    threads = [threading.Thread(target=work, args=(i,)) for i in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=120)
        assert not thread.is_alive()
    assert [got[i] for i in range(3)] == expected


def test_interrupt_leaves_a_usable_engine(llm):
    expected = llm.generate("the cat", GREEDY).tokens
    stream = llm.stream("the cat", SamplingParams(max_tokens=100, ignore_eos=True))
    next(stream)

    parts = llm._core.runner.parts

    def interrupted(*args, **options):
        os.kill(os.getpid(), signal.SIGINT)
        return parts(*args, **options)

    llm._core.runner.parts = interrupted
    try:
        with pytest.raises(KeyboardInterrupt):
            llm.generate(["the cat", "the dog"], GREEDY)
    finally:
        del llm._core.runner.parts
    stream.close()
    assert llm._loop.scheduler.available == llm._loop.scheduler.pages.total
    assert llm.generate("the cat", GREEDY).tokens == expected


def test_n_choices(llm):
    params = SamplingParams(max_tokens=8, temperature=1.0, seed=3, n=3, ignore_eos=True)
    out = llm.generate("the cat", params)
    assert len(out.choices) == 3
    assert len({tuple(choice.tokens) for choice in out.choices}) == 3
    assert out.tokens == out.choices[0].tokens
    assert out.tokens == llm.generate("the cat", dataclasses.replace(params, n=1)).tokens
    again = llm.generate(["x", "the cat"], [GREEDY, params])[1]
    assert [choice.tokens for choice in again.choices] == [choice.tokens for choice in out.choices]


def test_a_fresh_seed_for_every_request(llm):
    params = SamplingParams(max_tokens=12, temperature=2.0, ignore_eos=True)
    assert len({tuple(out.tokens) for out in llm.generate(["the cat"] * 4, params)}) == 4


def test_result_is_json(llm):
    out = llm.generate("the cat", SamplingParams(max_tokens=3, logprobs=2, n=2, temperature=1.0, ignore_eos=True))
    data = json.loads(json.dumps(dataclasses.asdict(out), allow_nan=False))
    assert data["tokens"] == out.tokens
    assert len(data["choices"]) == 2
    assert data["logprobs"][0]["top"][0][1] == out.logprobs[0].top[0][1]


def test_context_is_filled_to_the_last_token(llm):
    out = llm.generate(token_ids(150), SamplingParams(max_tokens=None, ignore_eos=True))
    assert (len(out.tokens), out.finish_reason) == (10, "length")
    assert llm.generate(token_ids(159), SamplingParams(max_tokens=1)).usage.total_tokens == 160


def test_chat_renders_the_template(llm):
    messages = [{"role": "user", "content": "the cat"}]
    text = "user: the cat\nassistant:"
    expected = llm.generate(text, GREEDY)
    out = llm.chat(messages, GREEDY)
    assert out.tokens == expected.tokens
    assert out.usage.prompt_tokens == len(llm.tokenize(text))
    pieces = list(llm.chat(messages, GREEDY, stream=True))
    assert "".join(piece.text for piece in pieces) == out.text
    other = llm.chat(messages, GREEDY, template="{{ messages[0].content }}")
    assert other.tokens == llm.generate("the cat", GREEDY).tokens


def test_chat_has_one_bos(spm):
    messages = [{"role": "user", "content": "the"}]
    with_bos = spm.chat(messages, GREEDY, template="{{ bos_token }}{{ messages[0].content }}")
    without = spm.chat(messages, GREEDY, template="{{ messages[0].content }}")
    assert with_bos.usage.prompt_tokens == without.usage.prompt_tokens
    assert without.tokens == spm.generate("the", GREEDY).tokens


def test_chat_without_a_template(spm):
    with pytest.raises(ChatTemplateError):
        spm.chat([{"role": "user", "content": "the"}])


def test_logits_shape_and_pages(llm):
    tokens = token_ids(150)  # more than a chunk
    logits = llm.logits(tokens)
    assert logits.shape == (150, VOCABULARY_SIZE)
    assert logits.dtype == np.float32
    np.testing.assert_allclose(llm.logits(tokens[:40]), logits[:40], rtol=0, atol=1e-4)
    assert llm.logits(token_ids(CONTEXT)).shape[0] == CONTEXT


def test_embeddings_are_unit_means_of_hidden_states(llm):
    texts = ["the cat", "on the mat", "the cat"]
    vectors = llm.embed(texts)
    assert vectors.shape == (3, llm.config.hidden_size)
    assert vectors.dtype == np.float32
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=-1), 1, atol=1e-6)
    np.testing.assert_array_equal(vectors[0], vectors[2])
    np.testing.assert_array_equal(llm.embed("on the mat"), vectors[1:2])
    assert vectors[0] @ vectors[1] < 0.9999


@pytest.mark.parametrize(("kind", "row"), [(2, 0), (3, -1)])
def test_embedding_pooling_of_the_file(llm, tmp_path, kind, row):
    pooled = write(tmp_path / "pooled.gguf", **{"llama.pooling_type": kind})
    with LLM(pooled, context_length=CONTEXT) as other:
        ids = np.asarray(other.tokenize("the cat"), np.int32)
        states = other._loop.exclusively(len(ids), lambda table: other._core.runner.hidden_all(ids, 0, table))
        np.testing.assert_allclose(other.embed("the cat")[0], states[row] / np.linalg.norm(states[row]), atol=1e-6)


def reference_perplexity(llm, tokens, size, bos=None):
    """llama.cpp's definition, written down plainly: chunks, BOS for the first token, the second half scored."""
    total = count = 0
    for start in range(0, len(tokens) - size + 1, size):
        chunk = list(tokens[start : start + size])
        if bos is not None:
            chunk[0] = bos
        logits = llm.logits(chunk).astype(np.float64)
        for i in range(size // 2, size - 1):
            total += np.log(np.sum(np.exp(logits[i]))) - logits[i][tokens[start + i + 1]]
            count += 1
    return math.exp(total / count)


def test_perplexity(llm, spm):
    text = "the cat sat on the mat and the dog ran in the house. " * 6
    tokens = llm.tokenize(text)
    value = llm.perplexity(text, context_length=32)
    assert isinstance(value, float)
    assert value == pytest.approx(reference_perplexity(llm, tokens, 32), rel=1e-5)
    tokens = spm.tokenize(text)
    assert spm.perplexity(text, 33) == pytest.approx(reference_perplexity(spm, tokens, 33, bos=1), rel=1e-5)


@pytest.mark.parametrize("scale", [np.nan, 1e6])
def test_a_perplexity_that_is_no_number_is_an_error(llm, monkeypatch, scale):
    step_all = llm._core.runner.step_all
    monkeypatch.setattr(llm._core.runner, "step_all", lambda *args: step_all(*args) * np.float32(scale))
    with pytest.raises(RealmError, match="the mean negative log-likelihood is"):
        llm.perplexity("the cat sat on the mat. " * 20, context_length=32)


def test_tokenize_and_back(llm, spm):
    assert llm.detokenize(llm.tokenize("the cat, né 😀")) == "the cat, né 😀"
    assert spm.tokenize("the")[0] == 1
    assert spm.tokenize("the", add_special=False)[0] != 1
    assert llm.detokenize([]) == ""
    assert llm.tokenize("<|eos|>", parse_special=True) == [286]
    assert llm.tokenize("<|eos|>") != [286]


def test_nothing_is_compiled_again(llm):
    """A second round of the same kinds of requests, other prompts and seeds, compiles no forward."""
    llm.generate(MIXED_PROMPTS, MIXED)
    llm.generate(token_ids(20), GREEDY)
    warm = llm._core.runner.compiled
    llm.generate([token_ids(n) for n in (9, 12, 2, 140, 40, 60)], MIXED)
    llm.generate(token_ids(30), GREEDY)
    assert llm._core.runner.compiled == warm


def test_close_lets_go_of_the_weights(path):
    llm = LLM(path, context_length=CONTEXT)
    llm.generate("the", SamplingParams(max_tokens=2, presence_penalty=1.0))
    weights = weakref.ref(llm._core.runner.model.params)
    llm.close()
    gc.collect()
    assert weights() is None


def test_use_after_close(path):
    with LLM(path, context_length=CONTEXT, mesh=None, draft=None, adapters=None) as llm:
        stream = llm.stream("the cat", SamplingParams(max_tokens=50, ignore_eos=True))
        next(stream)
        not_started = llm.stream("the cat")
    assert list(stream)[-1].finish_reason == "cancelled"
    with pytest.raises(InvalidRequestError, match="closed"):
        next(not_started)
    calls = [
        lambda: llm.generate("the"),
        lambda: llm.stream("the"),
        lambda: llm.chat([{"role": "user", "content": "the"}]),
        lambda: llm.logits([1]),
        lambda: llm.embed("the"),
        lambda: llm.tokenize("the"),
        lambda: llm.detokenize([1]),
        lambda: llm.perplexity("the"),
    ]
    for call in calls:
        with pytest.raises(InvalidRequestError, match="closed"):
            call()
    llm.close()
