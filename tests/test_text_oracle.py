"""Random texts against llama.cpp itself (the goldens hold a fixed corpus)."""

import importlib.util
import random
from pathlib import Path
from types import ModuleType

import pytest
from text_corpus import corpus
from text_vocabularies import Case, cases, charsmap, metadata

from realm_jax.text import load_tokenizer

pytestmark = pytest.mark.oracle
TEXTS_PER_CASE = 300


@pytest.fixture(scope="module")
def goldens_script() -> ModuleType:
    pytest.importorskip("llama_cpp")
    path = Path(__file__).parent.parent / "scripts" / "make_tokenizer_goldens.py"
    spec = importlib.util.spec_from_file_location("make_tokenizer_goldens", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    module.silence()
    return module


def random_texts(seed: int) -> list[str]:
    """Mixtures of characters from everywhere, short words, and runs of one character."""
    choose = random.Random(seed)
    known = sorted(set("".join(corpus())))
    words = sorted({word for text in corpus() for word in text.split()})
    planes = [(1, 0x7F), (0x80, 0x24F), (0x300, 0x36F), (0x370, 0x1FFF), (0x2000, 0xD7FF), (0xE000, 0x323AF)]

    def part() -> str:
        kind = choose.random()
        if kind < 0.3:
            return choose.choice(words)
        if kind < 0.5:
            return choose.choice(known)
        if kind < 0.7:
            return " "
        if kind < 0.85:
            return chr(choose.randint(*choose.choice(planes)))
        return choose.choice([*" \n\t\r1aA'", "\u00a0", "\u3000"]) * choose.randint(1, 9)

    return ["".join(part() for _ in range(choose.randint(1, 25))) for _ in range(TEXTS_PER_CASE)]


@pytest.mark.parametrize("case", cases(), ids=lambda case: case.name)
def test_random_texts_equal_llama_cpp(case: Case, goldens_script: ModuleType, tmp_path: Path) -> None:
    keys = metadata(case)
    tokenizer = load_tokenizer(keys)
    path = tmp_path / "vocabulary.gguf"
    if case.charsmap:
        keys["tokenizer.ggml.precompiled_charsmap"] = charsmap()
    goldens_script.write_vocabulary(path, keys)
    reference = goldens_script.LlamaTokenizer(path)
    for text in random_texts(len(case.name)):
        for parse_special in (False, True):
            assert tokenizer.encode(text, True, parse_special) == reference.encode(text, True, parse_special), text
    reference.close()


def test_random_texts_equal_llama_cpp_on_a_real_model(smollm2_path: Path, goldens_script: ModuleType) -> None:
    tokenizer = load_tokenizer(smollm2_path)
    reference = goldens_script.LlamaTokenizer(smollm2_path)
    for seed in range(10):
        for text in random_texts(seed):
            assert tokenizer.encode(text) == reference.encode(text, True, False), text
    assert [tokenizer.token_bytes(id) for id in range(tokenizer.vocab_size)] == [
        reference.piece(id) for id in range(reference.size)
    ]
    reference.close()
