"""Token ids equal llama.cpp's, for every kind of vocabulary and every pre-tokenizer name (goldens from llama.cpp)."""

from pathlib import Path

import pytest
from text_corpus import corpus
from text_vocabularies import Case, cases, metadata, read_golden

from realm_jax.text import load_tokenizer

TEXTS = corpus()
CASES = {case.name: case for case in cases()}


@pytest.fixture(scope="module")
def goldens() -> dict[str, dict]:
    return {name: entry for entry in read_golden("ids.json.xz") for name in entry["cases"]}


def assert_same_ids(tokenizer, expected: dict[str, list[list[int]]]) -> None:
    for call, rows in expected.items():
        add_special, parse_special = call[0] == "1", call[1] == "1"
        ours = [tokenizer.encode(text, add_special, parse_special) for text in TEXTS]
        wrong = [(text, got, want) for text, got, want in zip(TEXTS, ours, rows, strict=True) if got != want]
        assert not wrong, f"{len(wrong)} of {len(rows)} texts differ with call {call}; the first: {wrong[0]}"


def test_goldens_cover_every_case(goldens: dict[str, dict]) -> None:
    assert sorted(goldens) == sorted(CASES)


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_ids_equal_llama_cpp(case: Case, goldens: dict[str, dict]) -> None:
    tokenizer = load_tokenizer(metadata(case))
    assert_same_ids(tokenizer, goldens[case.name]["ids"])
    assert sorted(tokenizer.eog_ids) == goldens[case.name]["ends"]


# llama.cpp reads the plain UTF-8 of the "whitespace" model as stand-ins for bytes: no reference.
DECODED = [case for case in CASES.values() if case.detailed and "whitespace" not in case.name]


@pytest.mark.parametrize("case", DECODED, ids=lambda case: case.name)
def test_pieces_and_text_equal_llama_cpp(case: Case, goldens: dict[str, dict]) -> None:
    tokenizer = load_tokenizer(metadata(case))
    golden = goldens[case.name]
    assert [tokenizer.token_bytes(id).hex() for id in range(tokenizer.vocab_size)] == golden["pieces"]
    for ids, data in zip(golden["ids"]["00"], golden["decoded"], strict=True):
        assert tokenizer.decode(ids, clean_up_spaces=True) == bytes.fromhex(data).decode("utf-8", "replace")


def test_real_model_equals_llama_cpp(smollm2_path: Path) -> None:
    tokenizer = load_tokenizer(smollm2_path)
    golden = read_golden("smollm2.json.xz")
    assert_same_ids(tokenizer, golden["ids"])
    assert sorted(tokenizer.eog_ids) == golden["ends"]
