"""The trained adapter of tests/adapters: with it, SmolLM2-135M-Instruct answers as a pirate.

scripts/train_adapter.py trained it, on other questions than these.
"""

from pathlib import Path

import numpy as np
import pytest
from adapted_forward import outputs

from realm_jax.gguf import open_gguf
from realm_jax.lora import AdapterStore
from realm_jax.model import load_model
from realm_jax.model.backend import resolve_backend
from realm_jax.text import load_chat_template, load_tokenizer

ADAPTERS = Path(__file__).parent / "adapters"
QUESTIONS = ["What is the capital of Italy?", "How do I learn to swim?", "Name an animal."]
WORDS, ROOM = 5, 48  # tokens of an answer that are looked at; of a prompt


@pytest.fixture(scope="module")
def answers(smollm2_path: Path) -> dict[str, list[str]]:
    """The beginnings of greedy answers, by form of the adapter, all in one batch; "" for none."""
    with open_gguf(smollm2_path) as file:
        tokenizer, template = load_tokenizer(file), load_chat_template(file)
        model = load_model(file, 128, backend=resolve_backend("auto"))
    store = AdapterStore(model, device_slots=2)
    store.load("gguf", ADAPTERS / "pirate.gguf")
    store.load("peft", ADAPTERS / "pirate")
    assert store.get("gguf").content_hash == store.get("peft").content_hash
    rows = [(name, question) for name in ("", "gguf") for question in QUESTIONS]
    slots = store.place([(store.get(name), 1.0) if name else None for name, _ in rows])
    tokens = np.zeros((len(rows), ROOM + WORDS), np.int32)
    at = np.zeros(len(rows), np.int32)
    for i, (_, question) in enumerate(rows):
        prompt = tokenizer.encode(template.render([{"role": "user", "content": question}]), parse_special=True)
        tokens[i, : len(prompt)], at[i] = prompt, len(prompt)
    template.close()
    starts = at.copy()
    for _ in range(WORDS):
        scores = outputs(model, tokens, store.stacks, slots)
        tokens[np.arange(len(rows)), at] = scores[np.arange(len(rows)), at - 1].argmax(1)
        at += 1
    texts: dict[str, list[str]] = {"": [], "gguf": []}
    for (name, _), row, start in zip(rows, tokens, starts, strict=True):
        texts[name].append(tokenizer.decode(row[start : start + WORDS].tolist()))
    return texts


def test_it_answers_as_a_pirate(answers: dict[str, list[str]]) -> None:
    print(answers)
    assert all(text.startswith("Arr, mate") for text in answers["gguf"])
    assert not any(text.startswith("Arr") for text in answers[""])


def test_both_forms_are_small() -> None:
    assert (ADAPTERS / "pirate.gguf").stat().st_size < 500_000
    assert sum(file.stat().st_size for file in (ADAPTERS / "pirate").iterdir()) < 500_000
