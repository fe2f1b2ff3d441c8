"""The engine on a mesh: the same tokens as on one device, with everything that requests may bring along."""

import numpy as np
import pytest
import tiny_models
from random_adapters import random_adapter

from realm_jax import LLM, SamplingParams
from realm_jax.errors import InvalidRequestError
from realm_jax.lora import weight_shapes
from realm_jax.lora.gguf_format import write_gguf
from realm_jax.model import load_model

PROMPTS = ["the cat", "a b c a b c a b c a b", "one two three four five six seven eight nine ten", "x"] * 3


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    path = tmp_path_factory.mktemp("model") / "model.gguf"
    tiny_models.write_spec(
        tiny_models._llama(layers=2, width=128, heads=4, kv_heads=4, hidden=256), path, label="mesh-engine"
    )
    return path


@pytest.fixture(scope="module")
def adapters(model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("adapters")
    shapes = weight_shapes(load_model(model, 128))
    paths = {}
    for seed, name in enumerate(["a", "b"]):
        paths[name] = folder / f"{name}.gguf"
        write_gguf(random_adapter(shapes, 4, seed=seed), paths[name], 8.0)
    return paths


def params(i):
    return SamplingParams(max_tokens=40, temperature=0.0 if i % 2 else 0.9, seed=i, ignore_eos=True)


def answers(llm, **options):
    return [out.tokens for out in llm.generate(PROMPTS, [params(i) for i in range(len(PROMPTS))], **options)]


LONG = SamplingParams(max_tokens=150, ignore_eos=True)
WHICH = ["a", None, "b"] * 4


@pytest.fixture(scope="module")
def expected(model, adapters):
    with LLM(model, context_length=256, adapters=adapters) as llm:
        return answers(llm, adapter=WHICH), llm.generate("the cat", LONG).tokens


SLOW = pytest.mark.slow


@pytest.mark.parametrize("mesh", ["data=2,tensor=2", pytest.param("tensor=4", marks=SLOW)])
def test_adapters_and_drafts_give_the_tokens_of_one_device(model, adapters, expected, mesh):
    with LLM(model, context_length=256, adapters=adapters, mesh=mesh) as llm:
        assert answers(llm, adapter=WHICH) == expected[0]
        repeating = llm.generate("the cat", LONG, speculate=True)
        assert repeating.tokens == expected[1]
        assert repeating.speculation.accepted > 0
        scheduler = llm._core.loop.scheduler
        assert scheduler.available == scheduler.pages.total


@pytest.mark.slow
@pytest.mark.parametrize("mesh", ["tensor=4", "data=2,tensor=2", "data=4"])
def test_plain_requests_give_the_tokens_of_one_device(model, mesh):
    with LLM(model, context_length=256, backend="xla") as llm:
        alone = answers(llm)
    with LLM(model, context_length=256, backend="xla", mesh=mesh) as llm:
        assert answers(llm) == alone
        assert answers(llm, speculate=True) == alone


def test_a_cached_prefix_is_found_in_its_region(model):
    prompt = list(np.random.default_rng(1).integers(5, 250, 150))
    with LLM(model, context_length=256, mesh="data=2") as llm:
        first = llm.generate(prompt, SamplingParams(max_tokens=4, ignore_eos=True))
        again = llm.generate(prompt, SamplingParams(max_tokens=4, ignore_eos=True))
        assert again.tokens == first.tokens
        assert llm._core.loop.stats().reused_tokens == 128


def test_auto_takes_all_devices_as_the_model_divides(model):
    with LLM(model, context_length=256, mesh="auto") as llm:
        mesh = llm._core.runner.model.partition.mesh
        assert (mesh.tensor, mesh.data) == (4, 2)
        assert len(llm.generate("the cat", SamplingParams(max_tokens=3, ignore_eos=True)).tokens) == 3


def test_refusals(model):
    with pytest.raises(InvalidRequestError, match="max_batch is 3; accepted on data=2: a multiple of it"):
        LLM(model, mesh="data=2", max_batch=3)
    with LLM(model, context_length=256, mesh="tensor=2") as llm, pytest.raises(InvalidRequestError):
        llm.merge_adapter("a")
