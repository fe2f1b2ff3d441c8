"""Seeds on the small real model, whose packed weights and long vocabulary the tiny ones do not have."""

from realm_jax import LLM, SamplingParams

PROMPTS = [
    "The capital of France is",
    "Once upon a time",
    "def main():",
    "In the year 1969, " * 12,
    "A",
    "Water boils at",
]
PARAMS = [
    SamplingParams(max_tokens=24, temperature=1.0, seed=1),
    SamplingParams(max_tokens=24, temperature=0.8, top_p=0.9, seed=2),
    SamplingParams(max_tokens=24),
    SamplingParams(max_tokens=24, temperature=1.2, top_k=50, min_p=0.02, seed=3, logprobs=3),
    SamplingParams(max_tokens=24, temperature=1.0, frequency_penalty=0.5, repetition_penalty=1.1, seed=4),
    SamplingParams(max_tokens=24, temperature=0.9, typical_p=0.9, seed=5),
]


def test_a_seed_gives_the_same_tokens_alone_in_a_list_and_in_another_order(smollm2_path):
    with LLM(smollm2_path, max_batch=4) as llm:
        alone = [llm.generate(prompt, params) for prompt, params in zip(PROMPTS, PARAMS)]
        together = llm.generate(PROMPTS, PARAMS)
        reverse = llm.generate(PROMPTS[::-1], PARAMS[::-1])[::-1]
    for one, many, back in zip(alone, together, reverse):
        assert one.tokens == many.tokens == back.tokens
        assert one.logprobs == many.logprobs == back.logprobs
