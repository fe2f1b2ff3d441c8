"""SmolLM2-135M-Instruct: greedy tokens on ten prompts against the float reference, perplexity against llama.cpp's."""

import json
from pathlib import Path

import numpy as np
import pytest
from reference_model import ReferenceModel

from pallas_kernels import native
from realm_jax import LLM, SamplingParams

PROMPTS = [
    "The capital of France is",
    "Once upon a time, in a small village by the sea,",
    "def fibonacci(n):\n",
    "Water boils at a temperature of",
    "1, 2, 3, 5, 8, 13,",
    "The three primary colours are",
    "Dear Sir or Madam,\n\nI am writing to",
    "Q: What is photosynthesis?\nA:",
    "Die Hauptstadt von Deutschland ist",
    "In 1969, humans first",
]
TOKENS = 64
# Where the reference itself can hardly tell its first two choices apart, either is right.
TIE = 1e-3


@pytest.fixture(scope="module")
def llm(smollm2_path: Path):
    with LLM(str(smollm2_path), backend="xla") as llm:
        yield llm


@pytest.fixture(scope="module")
def reference(smollm2_path: Path) -> ReferenceModel:
    return ReferenceModel(smollm2_path, dtype=np.float32)


@pytest.mark.parametrize("prompt", PROMPTS)
def test_greedy_tokens_are_the_references(prompt: str, llm: LLM, reference: ReferenceModel) -> None:
    tokens = llm.tokenize(prompt)
    out = llm.generate(prompt, SamplingParams(temperature=0, max_tokens=TOKENS, ignore_eos=True))
    assert len(out.tokens) == TOKENS
    # One forward over prompt and answer says at every step what the reference would have chosen there.
    logits = reference.logits([*tokens, *out.tokens])[len(tokens) - 1 : -1]
    chosen = np.take_along_axis(logits, np.array(out.tokens)[:, None], 1)[:, 0]
    behind = logits.max(1) - chosen
    assert behind.max() <= TIE, f"step {behind.argmax()} differs by {behind.max():.2g}"


def test_logits_are_the_references(llm: LLM, reference: ReferenceModel) -> None:
    tokens = llm.tokenize("The quick brown fox jumps over the lazy dog, and the dog sleeps on in the warm sun.")
    expected = reference.logits(tokens).astype(np.float64)
    error = ((llm.logits(tokens) - expected) ** 2).sum() / (expected**2).sum()
    assert error <= 1e-6


def test_perplexity_is_llama_cpps(llm: LLM) -> None:
    golden = json.loads((Path(__file__).parent / "golden" / "perplexity.json").read_text())
    text = (Path(__file__).parent.parent / golden["text"]).read_text()
    ours = llm.perplexity(text, golden["context_length"])
    print(f"perplexity {ours:.4f}; llama.cpp {golden['llama.cpp']}")
    assert ours == pytest.approx(golden["llama.cpp"], rel=0.01)


@pytest.mark.skipif(not native.available(), reason=native.why_not())
def test_native_is_as_close_to_float32_as_llama_cpp(smollm2_path: Path, llm: LLM) -> None:
    golden = json.loads((Path(__file__).parent / "golden" / "perplexity.json").read_text())
    text = (Path(__file__).parent.parent / golden["text"]).read_text()
    tokens, size = llm.tokenize(text), golden["divergence_tokens"]
    chunks = [tokens[i * size :][:size] for i in range(golden["divergence_chunks"])]
    with LLM(str(smollm2_path), backend="native") as quantized:
        ours = float(np.mean([divergence(llm.logits(chunk), quantized.logits(chunk)) for chunk in chunks]))
        perplexity = quantized.perplexity(text, golden["context_length"])
    print(f"divergence {ours:.3e}; llama.cpp's {golden['llama.cpp divergence']:.3e}; perplexity {perplexity:.4f}")
    assert ours <= 1.1 * golden["llama.cpp divergence"]
    assert perplexity == pytest.approx(golden["llama.cpp"], rel=0.01)


def divergence(reference: np.ndarray, other: np.ndarray) -> float:
    """Mean over positions of the Kullback-Leibler divergence of other's softmax from the reference's, in nats."""
    p, q = (x.astype(np.float64) - x.max(1, keepdims=True) for x in (reference, other))
    p, q = (x - np.log(np.exp(x).sum(1, keepdims=True)) for x in (p, q))
    return float((np.exp(p) * (p - q)).sum(1).mean())
