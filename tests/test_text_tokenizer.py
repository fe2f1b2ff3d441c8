"""Tokenizers: round trips, streaming, special tokens, agreement with plain algorithms, speed on nasty inputs."""

import itertools
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import gguf_writer
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from text_corpus import corpus
from text_vocabularies import vocabulary

from realm_jax.errors import InvalidRequestError, TokenizerError
from realm_jax.gguf import open_gguf
from realm_jax.text import StreamDetokenizer, Tokenizer, load_tokenizer, word_cache

UNICODE = st.text(st.characters(exclude_categories=["Cs"]), max_size=40)
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)
BYTES = [f"<0x{byte:02X}>" for byte in range(256)]


@pytest.fixture(scope="module")
def bpe() -> Tokenizer:
    return load_tokenizer(vocabulary("byte_level", pre="gpt-2"))


@pytest.fixture(scope="module")
def spm() -> Tokenizer:
    return load_tokenizer(vocabulary("spm"))


@pytest.fixture(scope="module")
def raw() -> Tokenizer:
    return load_tokenizer(vocabulary("raw", pre="gemma4"))


def spm_metadata(pieces: dict[str, float], user_defined: tuple[str, ...] = (), **changes: Any) -> dict[str, Any]:
    """A SentencePiece vocabulary of the given pieces and all bytes."""
    tokens = ["<unk>", "<s>", "</s>", *BYTES, *user_defined, *pieces]
    types = [UNKNOWN, CONTROL, CONTROL, *[BYTE] * 256, *[USER_DEFINED] * len(user_defined), *[NORMAL] * len(pieces)]
    scores = [0.0] * (259 + len(user_defined)) + list(pieces.values())
    metadata = {"model": "llama", "tokens": tokens, "token_type": types, "scores": scores} | changes
    return {f"tokenizer.ggml.{key}": value for key, value in metadata.items()}


# Round trips


@given(UNICODE)
def test_byte_level_round_trip(bpe: Tokenizer, text: str) -> None:
    assert bpe.decode(bpe.encode(text)) == text


@given(UNICODE)
def test_spm_round_trip(spm: Tokenizer, text: str) -> None:
    # U+2581 stands for a space in these vocabularies and cannot come back.
    assert spm.decode(spm.encode(text), skip_special=True) == text.replace("▁", " ")


@given(UNICODE)
def test_raw_bpe_round_trip(raw: Tokenizer, text: str) -> None:
    assert raw.decode(raw.encode(text), skip_special=True) == text.replace("▁", " ")


@pytest.mark.parametrize("text", corpus()[:60])
def test_special_texts_survive_as_text(bpe: Tokenizer, text: str) -> None:
    assert bpe.decode(bpe.encode(text, parse_special=True)) == text


def test_leading_space_is_kept_for_continuations(spm: Tokenizer) -> None:
    ids = spm.encode("Hello world", add_special=False)
    assert spm.decode(ids) == "Hello world"
    assert spm.decode(ids, keep_leading_space=True) == " Hello world"


def test_clean_up_spaces_is_asked_for(bpe: Tokenizer) -> None:
    ids = bpe.encode("Well , he ' s it 's , we 're . no !", add_special=False)
    assert bpe.decode(ids) == "Well , he ' s it 's , we 're . no !"
    assert bpe.decode(ids, clean_up_spaces=True) == "Well, he's it's, we're. no!"


# Streaming


@given(st.lists(st.integers(0, 800), max_size=30), st.booleans(), st.booleans())
def test_stream_equals_decode(spm: Tokenizer, ids: list[int], skip: bool, keep: bool) -> None:
    stream = StreamDetokenizer(spm, skip_special=skip, keep_leading_space=keep)
    pieces = [*map(stream.push, ids), stream.finish()]
    assert "".join(pieces) == spm.decode(ids, skip_special=skip, keep_leading_space=keep)


@given(UNICODE)
def test_stream_never_emits_half_a_character(bpe: Tokenizer, text: str) -> None:
    stream = StreamDetokenizer(bpe)
    pieces = list(map(stream.push, bpe.encode(text)))
    assert "".join(pieces) == text
    assert stream.finish() == ""


def test_stream_replaces_what_is_not_utf8(spm: Tokenizer) -> None:
    first = spm.token_id("<0x00>")
    assert first is not None
    for data in (b"\xff", b"\xe2\x82", b"\xf0\x9f\x98a", b"\xc0\x80", b"\xed\xa0\x80", b"\xe2\x28\xa1"):
        stream = StreamDetokenizer(spm)
        text = "".join([*(stream.push(first + byte) for byte in data), stream.finish()])
        assert text == data.decode("utf-8", "replace")


# Special tokens


def test_control_tokens_need_parse_special(bpe: Tokenizer) -> None:
    start = bpe.token_id("<|im_start|>")
    assert start in bpe.encode("<|im_start|>user", parse_special=True)
    assert start not in bpe.encode("<|im_start|>user")


def test_user_defined_tokens_are_always_matched(bpe: Tokenizer) -> None:
    tool = bpe.token_id("<tool>")
    assert bpe.encode("a<tool>b").count(tool) == bpe.encode("a<tool>b", parse_special=True).count(tool) == 1


def plain_split(text: str, tokens: dict[str, int]) -> list[str | int]:
    """The rule as it is stated: for each token, the longest first, cut every piece of text at each occurrence."""
    fragments: list[str | int] = [text] if text else []
    for token in sorted(tokens, key=lambda token: -len(token)):
        cut: list[str | int] = []
        for fragment in fragments:
            if isinstance(fragment, str):
                parts: list[str | int] = [tokens[token]] * (2 * fragment.count(token) + 1)
                parts[::2] = fragment.split(token)
                cut += [part for part in parts if part != ""]
            else:
                cut.append(fragment)
        fragments = cut
    return fragments


@settings(max_examples=300)
@given(st.text("ab<> ", max_size=30))
def test_overlapping_special_tokens(text: str) -> None:
    # Lengths differ, so that the order is defined.
    special = ["<", "ab", "<a>", "a<ab", "b>  <", "abab<a", "aaaaaaa"]
    tokenizer = load_tokenizer(spm_metadata({" ": 0.0}, tuple(special)))
    tokens = {token: tokenizer.token_id(token) or 0 for token in special}
    assert tokenizer._splitter.split(text, parse_special=False) == plain_split(text, tokens)


@pytest.mark.parametrize(
    ("name", "text", "expected"),
    [
        ("Phi-3-mini", "a <|end|>  \n b", ["a ", "<|end|>", "b"]),
        ("Phi-3-mini", "<|end|>   ", ["<|end|>"]),
        ("Phi-3-mini", "<s>  b", ["<s>", "  b"]),
        ("other", "a <|end|>  b", ["a ", "<|end|>", "  b"]),
    ],
)
def test_white_space_after_special_tokens(name: str, text: str, expected: list[str]) -> None:
    metadata = spm_metadata({"a": 0.0}, ("<|end|>",)) | {"general.name": name}
    tokenizer = load_tokenizer(metadata)
    fragments = tokenizer._splitter.split(text, parse_special=True)
    assert [tokenizer.token_text(part) if isinstance(part, int) else part for part in fragments] == expected


# Agreement with plain algorithms


@settings(max_examples=300)
@given(
    st.dictionaries(st.text("ab▁", min_size=1, max_size=4), st.sampled_from([-3.0, -2.0, -1.0, 0.0]), max_size=12),
    st.text("ab ", max_size=14),
)
def test_spm_merges_the_best_leftmost_pair(pieces: dict[str, float], text: str) -> None:
    tokenizer = load_tokenizer(spm_metadata(pieces, add_space_prefix=False))
    symbols = list(text.replace(" ", "▁"))
    while True:
        pairs = [(-pieces[a + b], i) for i, (a, b) in enumerate(itertools.pairwise(symbols)) if a + b in pieces]
        if not pairs:
            break
        at = min(pairs)[1]
        symbols[at : at + 2] = [symbols[at] + symbols[at + 1]]
    expected: list[str] = []
    for symbol in symbols:
        expected += [symbol] if symbol in pieces else [f"<0x{byte:02X}>" for byte in symbol.encode()]
    assert [tokenizer.token_text(id) for id in tokenizer.encode(text, add_special=False)] == expected


@settings(max_examples=300)
@given(
    st.dictionaries(st.text("ab▁", min_size=1, max_size=3), st.sampled_from([-4.0, -2.5, -1.0]), max_size=12),
    st.text("ab ", min_size=1, max_size=8),
)
def test_unigram_finds_the_best_sum(pieces: dict[str, float], text: str) -> None:
    tokens = ["<pad>", "</s>", "<unk>", *pieces]
    metadata = {
        "tokenizer.ggml.model": "t5",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [CONTROL, CONTROL, UNKNOWN] + [NORMAL] * len(pieces),
        "tokenizer.ggml.scores": [0.0, 0.0, 0.0, *pieces.values()],
    }
    tokenizer = load_tokenizer(metadata)
    marked = text.replace(" ", "▁")
    unknown = min(pieces.values(), default=0.0) - 10

    def score(parts: list[str]) -> float:
        # A character that is no token by itself may stand as unknown.
        return sum(pieces.get(part, unknown) for part in parts)

    def segmentations(rest: str) -> list[list[str]]:
        if not rest:
            return [[]]
        heads = {rest[:size] for size in range(1, 4) if rest[:size] in pieces} | {rest[:1]}
        return [[head, *tail] for head in heads for tail in segmentations(rest[len(head) :])]

    best = max(map(score, segmentations(marked)))
    ids = tokenizer.encode(text, add_special=False)
    # Unknown characters in a row are one token: the rest of the text tells how many characters it stands for.
    known = [tokenizer.token_text(id) for id in ids if id != 2]
    missing = len(marked) - len("".join(known))
    assert sum(map(pieces.__getitem__, known)) + missing * unknown == pytest.approx(best)


# Bad input


def test_lone_surrogate_is_refused(bpe: Tokenizer) -> None:
    with pytest.raises(InvalidRequestError, match=r"U\+D800 at character 2"):
        bpe.encode("ab\ud800")


@pytest.mark.parametrize("text", [b"bytes", None, 5, ["a"]])
def test_only_strings_are_encoded(bpe: Tokenizer, text: Any) -> None:
    with pytest.raises(InvalidRequestError, match="is not a string"):
        bpe.encode(text)


@pytest.mark.parametrize("id", [-1, 10**6])
def test_ids_outside_the_vocabulary_are_refused(bpe: Tokenizer, id: int) -> None:
    with pytest.raises(InvalidRequestError, match=f"{id} is outside the vocabulary of {bpe.vocab_size}"):
        bpe.decode([id])
    with pytest.raises(InvalidRequestError):
        StreamDetokenizer(bpe).push(id)


@pytest.mark.parametrize("id", ["a", 1.0, None])
def test_ids_are_integers(bpe: Tokenizer, id: Any) -> None:
    with pytest.raises(InvalidRequestError, match="is not an integer"):
        bpe.decode([id])


def test_missing_byte_tokens_are_named() -> None:
    metadata = spm_metadata({"a": 0.0})
    metadata["tokenizer.ggml.tokens"][3 + 0xC3] = "x"
    metadata["tokenizer.ggml.token_type"][3 + 0xC3] = NORMAL
    with pytest.raises(TokenizerError, match="no token <0xC3>"):
        load_tokenizer(metadata).encode("é")


# Files and cost


def test_loads_from_a_file_and_from_an_open_file(tmp_path: Path) -> None:
    w = gguf_writer
    metadata = vocabulary("spm")
    path = tmp_path / "vocabulary.gguf"
    keys = [
        w.key("general.architecture", w.STRING, "llama"),
        w.key("tokenizer.ggml.model", w.STRING, "llama"),
        w.array("tokenizer.ggml.tokens", w.STRING, metadata["tokenizer.ggml.tokens"]),
        w.array("tokenizer.ggml.token_type", w.I32, metadata["tokenizer.ggml.token_type"]),
        w.array("tokenizer.ggml.scores", w.F32, metadata["tokenizer.ggml.scores"]),
    ]
    path.write_bytes(w.gguf(keys))
    expected = load_tokenizer(metadata).encode("Hello world")
    assert load_tokenizer(path).encode("Hello world") == expected
    with open_gguf(path) as file:
        assert load_tokenizer(file).encode("Hello world") == expected


def test_needs_no_jax() -> None:
    code = "import sys, realm_jax.text; sys.exit('jax' in sys.modules or 'jinja2' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


LONG = {
    "letter": "a" * 10**6,
    "spaces": " " * 10**6,
    "spaces then letter": " " * 10**6 + "x",
    "spaces then digit": " " * 10**6 + "1",
    "line feeds": "\n" * 10**6,
    "digits": "1" * 10**6,
    "signs": "<" * 10**6,
    "user-defined tokens": "<tool>" * 10**5,
    "overlapping tokens": "<tool_bo" * 10**5,
    "marks": "a\u0301" * 3 * 10**5,
    "controls": "\x01" * 10**6,
    "apostrophes": "'" * 10**6,
}
LONG_CASES = {
    "spm": vocabulary("spm"),
    "wpm": vocabulary("wpm"),
    "ugm": vocabulary("ugm"),
    **{
        pre: vocabulary("byte_level", pre=pre)
        for pre in ("default", "llama-bpe", "deepseek-llm", "tekken", "gpt-4o", "superbpe", "exaone-moe", "jais-2")
    },
}


@pytest.mark.slow
@pytest.mark.parametrize("text", LONG.values(), ids=LONG)
@pytest.mark.parametrize("metadata", LONG_CASES.values(), ids=LONG_CASES)
def test_a_megabyte_of_anything_is_encoded_in_seconds(metadata: dict[str, Any], text: str) -> None:
    tokenizer = load_tokenizer(metadata)
    start = time.process_time()
    tokenizer.encode(text)
    assert time.process_time() - start < 20


@pytest.mark.parametrize("metadata", LONG_CASES.values(), ids=LONG_CASES)
def test_time_grows_with_length_only(metadata: dict[str, Any]) -> None:
    tokenizer = load_tokenizer(metadata)
    for name, text in LONG.items():
        start = time.process_time()
        tokenizer.encode(text[:40_000])
        # Quadratic algorithms need 10**9 steps here.
        assert time.process_time() - start < 3, name


def test_words_seen_are_kept_up_to_a_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(word_cache, "_WORDS", 3)
    asked: list[str] = []

    def encode(word: str) -> list[int]:
        asked.append(word)
        return [len(word)]

    words = word_cache.WordCache(encode)
    long = "x" * 65
    assert [words[word] for word in ("a", "bb", "a", "ccc", long, long)] == [[1], [2], [1], [3], [65], [65]]
    assert asked == ["a", "bb", "ccc", long, long]  # a long word is not worth a place
    assert words["dddd"] == [4]
    assert list(words) == ["dddd"]
