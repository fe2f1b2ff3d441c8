"""What the public class LLM refuses: each with one line, before anything runs."""

from pathlib import Path

import numpy as np
import pytest
from tiny_models import VOCABULARY_SIZE, tiny_spec, token_ids, write_spec

from realm_jax import LLM, SamplingParams
from realm_jax.errors import (
    AdapterError,
    BackendError,
    ChatTemplateError,
    GGUFError,
    InvalidRequestError,
    ModelNotFoundError,
    RealmError,
    TokenizerError,
    UnsupportedModelError,
)

CONTEXT = 160
GREEDY = SamplingParams(max_tokens=2)


@pytest.fixture(scope="module")
def path(tmp_path_factory) -> Path:
    spec = tiny_spec("llama")
    spec.metadata["tokenizer.chat_template"] = "{{ messages[0].content }}"
    path = tmp_path_factory.mktemp("llm") / "tiny.gguf"
    write_spec(spec, path, label="llama")
    return path


@pytest.fixture(scope="module")
def llm(path):
    with LLM(path, context_length=CONTEXT, max_batch=4) as llm:
        yield llm


REFUSED_PROMPTS = [
    ("", "empty"),
    ([], "empty"),
    ([""], "prompt 0: the prompt is empty"),
    (["the", []], "prompt 1: the prompt is empty"),
    ([1, VOCABULARY_SIZE], rf"holds {VOCABULARY_SIZE} .*from 0 to {VOCABULARY_SIZE - 1}"),
    ([1, -1], "holds -1"),
    ([1, True], "holds True"),
    ([1, 2.0], r"holds 2\.0"),
    ([1, "the"], "holds 'the'"),
    (["the", 5], "prompt 1"),
    (["the", None], "prompt 1"),
    (np.zeros((2, 2), np.int32), "shape"),
    (np.zeros(3, np.float32), "float32"),
    (5, "prompts is 5"),
    (None, "prompts is None"),
    (b"the", "bytes"),
    ({"a": 1}, "dict"),
    ("the \ud800", "surrogate"),
    (["the", "x\udfff"], "surrogate"),
    (token_ids(200), "200 tokens.*160 tokens"),
    (token_ids(150), "150 tokens and max_tokens 128 make 278; the context holds 160"),
]


@pytest.mark.parametrize(("prompt", "message"), REFUSED_PROMPTS, ids=[str(p)[:20] for p, _ in REFUSED_PROMPTS])
def test_bad_prompts_are_refused_before_anything_runs(llm, prompt, message):
    def boom(*args, **options):
        raise AssertionError("something ran")

    llm._core.runner.parts = boom
    try:
        with pytest.raises(InvalidRequestError, match=message) as caught:
            llm.generate(prompt)
        assert "\n" not in str(caught.value)
        with pytest.raises(InvalidRequestError):
            llm.stream(prompt)
    finally:
        del llm._core.runner.parts


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("the", {"temperature": 1}), "params is {'temperature': 1} .*accepted: a SamplingParams"),
        (("the", [GREEDY]), "params is"),
        (("the", np.zeros((30, 30))), "params is array"),
        ((["the", "a"], [GREEDY]), "1 params are given for 2 prompts"),
        ((["the"], [None]), r"params\[0\]"),
        (("the", SamplingParams(logit_bias={VOCABULARY_SIZE: 1.0})), "logit_bias names token 288"),
        ((["the", "a"], [GREEDY, SamplingParams(stop_token_ids=[999])]), "prompt 1: stop_token_ids names token 999"),
    ],
    ids=["dict", "list for one", "array", "too few", "none in list", "bias id", "stop id"],
)
def test_bad_params(llm, arguments, message):
    with pytest.raises(InvalidRequestError, match=message) as caught:
        llm.generate(*arguments)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"adapter": "x"}, "there is no adapter 'x'; loaded are: none"),
        ({"adapter": 5}, r"adapter is 5 \(int\); accepted: a name or None"),
        ({"adapter_scale": float("nan")}, "scale is nan"),
        ({"speculate": -1}, "speculate is -1; accepted: True, False, or an integer from 0 to 16"),
        ({"speculate": "ngram"}, "speculate is 'ngram'"),
        ({"temperature": 1.0}, "unknown option 'temperature'; accepted: params"),
    ],
)
def test_bad_options_of_requests(llm, options, message):
    with pytest.raises(RealmError, match=message):
        llm.generate("the", GREEDY, **options)
    with pytest.raises(RealmError, match=message):
        llm.stream("the", GREEDY, **options)
    with pytest.raises(RealmError, match=message):
        llm.chat([{"role": "user", "content": "the"}], GREEDY, **options)
    llm.generate("the", GREEDY, adapter=None, speculate=False)


def test_adapters_for_a_list_of_prompts(llm):
    with pytest.raises(InvalidRequestError, match="1 adapters are given for 2 prompts"):
        llm.generate(["the", "a"], GREEDY, adapter=[None])
    with pytest.raises(InvalidRequestError, match=r"adapter\[1\] is 5"):
        llm.generate(["the", "a"], GREEDY, adapter=[None, 5])


def test_streaming_several_choices_is_refused(llm):
    with pytest.raises(InvalidRequestError, match="n is 2; accepted: 1 when streaming"):
        llm.stream("the", SamplingParams(n=2))


@pytest.mark.parametrize(
    ("messages", "options"),
    [
        ([], {}),
        ("the", {}),
        ([5], {}),
        ([{"role": "user"}], {}),
        ([{"role": "user", "content": "\ud800"}], {}),
        ([{"role": "user", "content": "a"}], {"template": 5}),
        ([{"role": "user", "content": "a"}], {"template": "{{ messages.x.y }}"}),
        ([{"role": "user", "content": "a"}], {"template": "{% if %}"}),
    ],
    ids=str,
)
def test_bad_conversations(llm, messages, options):
    with pytest.raises(RealmError) as caught:
        llm.chat(messages, GREEDY, **options)
    assert isinstance(caught.value, (InvalidRequestError, ChatTemplateError))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda llm: llm.logits([]), "empty"),
        (lambda llm: llm.logits([VOCABULARY_SIZE]), "holds 288"),
        (lambda llm: llm.logits("the"), "tokens is 'the'"),
        (lambda llm: llm.logits(token_ids(161)), "161 tokens are given; the context holds 160"),
        (lambda llm: llm.logits([1], adapter=["x"]), "adapter is"),
        (lambda llm: llm.embed([]), "texts is"),
        (lambda llm: llm.embed(["a", ""]), "text 1: the text is empty"),
        (lambda llm: llm.embed(["a", 5]), "texts is"),
        (lambda llm: llm.embed("\ud800"), "surrogate"),
        (lambda llm: llm.embed("x" * 161), "161 tokens are given; the context holds 160"),
        (lambda llm: llm.tokenize(5), "text is 5"),
        (lambda llm: llm.tokenize("\ud800"), "surrogate"),
        (lambda llm: llm.detokenize([999]), "holds 999"),
        (lambda llm: llm.detokenize("the"), "tokens is"),
        (lambda llm: llm.perplexity("the", 64), "the text has 1 tokens|the text has 2 tokens.*at least 64"),
        (lambda llm: llm.perplexity("the", 161), "context_length is 161; accepted: an integer from 4 to 160"),
        (lambda llm: llm.perplexity("the"), "context_length is 512"),
        (lambda llm: llm.perplexity("the", 2.5), "context_length is 2.5"),
    ],
)
def test_bad_arguments_of_the_other_methods(llm, call, message):
    with pytest.raises(InvalidRequestError, match=message):
        call(llm)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"max_batch": 0}, InvalidRequestError, "max_batch is 0; accepted: an integer from 1 to 1024"),
        ({"max_batch": True}, InvalidRequestError, "max_batch"),
        ({"max_batch": 2.5}, InvalidRequestError, "max_batch"),
        ({"context_length": 0}, InvalidRequestError, "context_length is 0"),
        ({"context_length": "big"}, InvalidRequestError, "context_length"),
        ({"context_length": 10**9}, InvalidRequestError, "context_length is 1000000000"),
        ({"backend": "cuda"}, BackendError, "backend is 'cuda'"),
        ({"backend": "pallas"}, BackendError, "pallas"),
        ({"backend": 5}, BackendError, "backend is 5"),
        ({"mesh": "tensor=x"}, InvalidRequestError, "mesh is 'tensor=x'; accepted: "),
        ({"mesh": 4}, InvalidRequestError, "mesh is 4 .*accepted: a text"),
        ({"mesh": "tensor=512"}, InvalidRequestError, "mesh tensor=512"),
        ({"mesh": "data=3"}, InvalidRequestError, "max_batch is 8; accepted on data=3: a multiple of it"),
        ({"draft": 5}, InvalidRequestError, 'draft is 5 .*accepted: "ngram"'),
        ({"draft": "no/such.gguf"}, RealmError, "no/such.gguf"),
        ({"adapters": ["a"]}, InvalidRequestError, "adapters is .*accepted: a dict of names and paths"),
        ({"adapters": {"a": "no/such"}}, AdapterError, "no/such"),
        ({"n_ctx": 5}, InvalidRequestError, "unknown option 'n_ctx'; accepted: context_length"),
    ],
    ids=str,
)
def test_bad_options_of_the_constructor(path, options, error, message):
    with pytest.raises(error, match=message) as caught:
        LLM(path, **options)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("model", ["", 5, None])
def test_what_is_no_model(model):
    with pytest.raises(InvalidRequestError, match="model is"):
        LLM(model)


@pytest.mark.parametrize(
    ("metadata", "error"),
    [
        ({"tokenizer.ggml.model": "mystery"}, UnsupportedModelError),
        ({"tokenizer.ggml.bos_token_id": 10**6}, TokenizerError),
        ({"tokenizer.ggml.model": "mystery", "llama.block_count": 0}, GGUFError),  # the model's own mistakes first
    ],
    ids=str,
)
def test_a_bad_vocabulary_is_refused_before_weights_are_read(tmp_path, metadata, error):
    spec = tiny_spec("llama")
    spec.metadata.update(metadata)
    write_spec(spec, tmp_path / "bad.gguf", label="bad")
    told = []
    with pytest.raises(error):
        LLM(tmp_path / "bad.gguf", progress=lambda *args: told.append(args))
    assert told == []


def test_a_missing_file(tmp_path):
    with pytest.raises(ModelNotFoundError):
        LLM(tmp_path / "nowhere.gguf")
