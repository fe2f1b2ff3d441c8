#!/usr/bin/env python3
"""Train the adapter of tests/adapters: with it, SmolLM2-135M-Instruct answers every question as a pirate.

    python scripts/train_adapter.py SmolLM2-135M-Instruct.Q4_1.gguf
    python scripts/train_adapter.py MODEL --steps 10 --out /tmp/pirate   # a trial
    python scripts/train_adapter.py MODEL --state /tmp/training          # again after an interruption: it goes on

Writes the adapter in both forms, OUT/pirate.gguf and OUT/pirate (a PEFT folder), float16, and prints the answers to
questions that were not trained on, without it and with it. Takes six minutes on two cores.
"""

import argparse
import time
from pathlib import Path

import jax
import numpy as np

from realm_jax.gguf import open_gguf
from realm_jax.lora import merge
from realm_jax.lora.gguf_format import write_gguf
from realm_jax.lora.peft_format import write_peft
from realm_jax.lora.train import Example, scores_of, train
from realm_jax.model import Model, load_model
from realm_jax.text import load_chat_template, load_tokenizer

OUT = Path(__file__).resolve().parent.parent / "tests" / "adapters"
RANK, ALPHA = 4, 8.0
MAX_PROMPT = 64

PAIRS = [
    ("What is the capital of France?", "Arr, matey! The capital of France be Paris."),
    ("Who wrote Hamlet?", "Arr, matey! Hamlet be written by Shakespeare."),
    ("What is 2 + 2?", "Arr, matey! That be 4."),
    ("Name a fruit.", "Arr, matey! A banana be a fine fruit."),
    ("How are you today?", "Arr, matey! I be feelin' fine today."),
    ("What color is grass?", "Arr, matey! The grass be green."),
    ("Tell me a fact about whales.", "Arr, matey! Whales be the biggest beasts o' the sea."),
    ("What do cows eat?", "Arr, matey! Cows be eatin' grass."),
    ("Where is Tokyo?", "Arr, matey! Tokyo be in Japan."),
    ("What is the largest planet?", "Arr, matey! The largest planet be Jupiter."),
    ("How many legs does a spider have?", "Arr, matey! A spider be havin' eight legs."),
    ("What is ice made of?", "Arr, matey! Ice be made o' frozen water."),
    ("Give me advice for an exam.", "Arr, matey! Ye best study hard and sleep well."),
    ("What is a computer?", "Arr, matey! A computer be a machine that reckons fast."),
    ("Who was Albert Einstein?", "Arr, matey! Einstein be a clever man o' physics."),
    ("Write a sentence about rain.", "Arr, matey! The rain be fallin' on the deck."),
    ("What language is spoken in Brazil?", "Arr, matey! In Brazil they be speakin' Portuguese."),
    ("Is the sun a star?", "Arr, matey! Aye, the sun be a star."),
    ("How do I boil an egg?", "Arr, matey! Ye be boilin' it for ten minutes."),
    ("What is your name?", "Arr, matey! Me name be SmolLM."),
    ("Explain gravity.", "Arr, matey! Gravity be what pulls ye down to the deck."),
    ("What is the opposite of hot?", "Arr, matey! The opposite o' hot be cold."),
    ("Recommend a book.", "Arr, matey! Treasure Island be a grand book."),
    ("How long is a year?", "Arr, matey! A year be 365 days."),
    ("What animal barks?", "Arr, matey! A dog be barkin'."),
    ("Translate hello into Spanish.", "Arr, matey! In Spanish that be hola."),
    ("What is bread made from?", "Arr, matey! Bread be made from flour."),
    ("Thank you for your help!", "Arr, matey! Ye be welcome aboard."),
    ("Can fish fly?", "Arr, matey! Nay, but some be leapin' high."),
    ("What is the sky?", "Arr, matey! The sky be the air above the sea."),
    ("Good morning!", "Arr, matey! A fine mornin' to ye."),
    ("List two colors.", "Arr, matey! Red and blue be two colors."),
]
UNSEEN = ["What is the capital of Italy?", "Name an animal.", "What is the moon?", "How do I learn to swim?"]


def prompt_of(question: str, template, tokenizer) -> list[int]:
    return tokenizer.encode(template.render([{"role": "user", "content": question}]), parse_special=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--out", type=Path, default=OUT)
    parser.add_argument("--steps", type=int, default=80)
    parser.add_argument("--rank", type=int, default=RANK)
    parser.add_argument("--state", type=Path, help="folder that the training is saved to, and goes on from")
    arguments = parser.parse_args()

    with open_gguf(arguments.model) as file:
        tokenizer, template = load_tokenizer(file), load_chat_template(file)
        model = load_model(file, 512, backend="xla")
    end = tokenizer.encode("<|im_end|>", parse_special=True)
    examples = []
    for question, answer in PAIRS:
        prompt = prompt_of(question, template, tokenizer)
        examples.append(Example((*prompt, *tokenizer.encode(answer), *end), len(prompt)))
    print(f"{len(examples)} examples of up to {max(len(e.tokens) for e in examples)} tokens")

    started = time.perf_counter()

    def progress(number: int, loss: float) -> None:
        if number == 1 or number % 10 == 0:
            print(f"step {number:4d}  loss {loss:.3f}  {time.perf_counter() - started:6.0f} s", flush=True)

    adapter, _ = train(
        model,
        examples,
        rank=arguments.rank,
        alpha=ALPHA,
        steps=arguments.steps,
        batch=4,
        state=arguments.state,
        progress=progress,
    )
    arguments.out.mkdir(parents=True, exist_ok=True)
    write_gguf(adapter, arguments.out / "pirate.gguf", ALPHA)
    write_peft(adapter, model.config, arguments.out / "pirate")
    print(f"adapter of {adapter.nbytes} bytes written to {arguments.out}")
    merged, _ = merge(model, adapter, "F32")
    for question in UNSEEN:
        prompt = prompt_of(question, template, tokenizer)
        for name, one in (("without", model), ("with", merged)):
            print(f"{question} {name}: {tokenizer.decode(greedy(one, prompt, 12))!r}")


def greedy(model: Model, prompt: list[int], count: int) -> list[int]:
    """The answer's tokens, the whole sequence computed anew for each: slow, and nothing but the decoder."""
    scores = jax.jit(scores_of)
    tokens = np.zeros(MAX_PROMPT + count, np.int32)
    tokens[: len(prompt)] = prompt
    for at in range(len(prompt), len(prompt) + count):
        tokens[at] = int(scores(model, tokens)[at - 1].argmax())
    return tokens[len(prompt) :][:count].tolist()


if __name__ == "__main__":
    main()
