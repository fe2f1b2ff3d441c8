"""Grammars as masks: whatever is drawn through them is of the language, and what cannot be bounded is refused."""

import json
import re
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_vocabularies import VOCABULARY_SIZE, bpe_vocabulary, spm_vocabulary

from realm_jax import SamplingParams
from realm_jax.errors import InvalidRequestError, RealmError
from realm_jax.structured import GrammarTokenizer, check
from realm_jax.text import load_tokenizer

PADDED = VOCABULARY_SIZE + 20  # columns of logits that no token has
SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 6},
        "age": {"type": "integer", "minimum": 0, "maximum": 120},
        "tags": {"type": "array", "items": {"enum": ["red", "green", None, 1.5]}, "maxItems": 3},
        "where": {"anyOf": [{"type": "null"}, {"$ref": "#/$defs/place"}]},
    },
    "required": ["name", "age", "tags"],
    "additionalProperties": False,
    "$defs": {"place": {"type": "string", "pattern": "^[A-Z]{2,3}-[0-9]+$", "maxLength": 9}},
}


@pytest.fixture(scope="module", params=[bpe_vocabulary, spm_vocabulary], ids=["bpe", "spm"])
def grammars(request):
    return GrammarTokenizer(load_tokenizer(request.param()), PADDED)


@pytest.fixture(scope="module")
def bpe():
    return GrammarTokenizer(load_tokenizer(bpe_vocabulary()), PADDED)


def allowed(mask):
    assert mask.dtype == np.uint32
    assert mask.shape == (-(-PADDED // 32),)
    tokens = np.flatnonzero(np.unpackbits(mask.view(np.uint8), bitorder="little"))
    assert not tokens.size or tokens.max() < VOCABULARY_SIZE
    return tokens.tolist()


def walk(grammars, state, rng, most=800):
    """A text drawn at random through the masks, to its end."""
    tokens = []
    for _ in range(most):
        choices = allowed(state.mask())
        ends = [token for token in choices if token in grammars.eog_ids]
        if ends and (len(ends) == len(choices) or rng.random() < 0.3):
            state.advance(ends[0])
            assert state.finished
            return b"".join(grammars.tokens[token] for token in tokens)
        # Documents end sooner with fewer spaces and escapes in them.
        plain = [t for t in choices if t not in ends and grammars.tokens[t].strip().isalnum()]
        pool = plain if plain and rng.random() < 0.5 else [t for t in choices if t not in ends]
        tokens.append(token := int(rng.choice(pool)))
        assert not state.finished
        state.advance(token)
    raise AssertionError("no end")


def spelled(grammars, text):
    """Tokens of single characters."""
    return [grammars._ids[bytes([byte])] for byte in text.encode()]


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 2**31))
def test_random_walks_satisfy_the_schema(grammars, seed):
    state = grammars.start(SamplingParams(json_schema=SCHEMA))
    value = json.loads(walk(grammars, state, np.random.default_rng(seed)))
    assert {"name", "age", "tags"} <= value.keys() <= {"name", "age", "tags", "where"}
    assert isinstance(value["name"], str)
    assert len(value["name"]) <= 6
    assert isinstance(value["age"], int)
    assert 0 <= value["age"] <= 120
    assert len(value["tags"]) <= 3
    assert all(tag in ("red", "green", None, 1.5) for tag in value["tags"])
    where = value.get("where")
    assert where is None or re.fullmatch("[A-Z]{2,3}-[0-9]+", where)


@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 2**31))
def test_random_walks_match_regex_and_grammar(grammars, seed):
    rng = np.random.default_rng(seed)
    text = walk(grammars, grammars.start(SamplingParams(grammar={"regex": r"[a-c]{2,5}(, the [0-9]{1,3})*"})), rng)
    assert re.fullmatch(r"[a-c]{2,5}(, the [0-9]{1,3})*", text.decode())
    lark = 'start: item (" and " item)*\nitem: "(" start ")" | WORD\nWORD: /[a-z]{1,4}/'
    text = walk(grammars, grammars.start(SamplingParams(grammar=lark)), rng).decode()
    depth = np.cumsum([(c == "(") - (c == ")") for c in text])
    assert depth[-1] == 0
    assert depth.min() >= 0
    assert re.fullmatch(r"[a-z() ]+", text)


def test_any_json_is_any_json(bpe):
    for text in ("[1, 2.5e3, null]", '"x"', '{"a": {"b": []}}', "-0"):
        state = bpe.start(SamplingParams(json_schema=True))
        for token in spelled(bpe, text):
            state.advance(token)
        assert set(bpe.eog_ids) <= set(allowed(state.mask()))


def test_the_end_comes_exactly_where_the_grammar_may_end(grammars):
    state = grammars.start(SamplingParams(grammar={"regex": "ab?c?"}))
    ends = set(grammars.eog_ids)
    assert not ends & set(allowed(state.mask()))
    with pytest.raises(RealmError, match="does not allow the end"):
        grammars.start(SamplingParams(grammar={"regex": "ab"})).advance(grammars.eog_ids[0])
    a, b, c = spelled(grammars, "abc")
    state.advance(a)
    assert ends < set(allowed(state.mask()))
    assert not state.finished
    state.advance(b)
    state.advance(c)
    assert state.finished
    assert set(allowed(state.mask())) == ends
    with pytest.raises(RealmError, match="does not allow token"):
        state.advance(a)
    state.advance(grammars.eog_ids[0])
    assert set(allowed(state.mask())) == ends


def test_an_end_that_was_drawn_is_the_end(bpe):
    """Also where more could follow, as a request that ignores end-of-generation tokens must not go on."""
    state = bpe.start(SamplingParams(grammar={"regex": "a+"}))
    state.advance(*spelled(bpe, "a"))
    assert not state.finished
    state.advance(bpe.eog_ids[0])
    assert state.finished
    assert set(allowed(state.mask())) == set(bpe.eog_ids)


@pytest.mark.parametrize("vocab_size", [None, VOCABULARY_SIZE + 1, VOCABULARY_SIZE + 32])
def test_masks_have_a_bit_for_each_column_of_the_logits(vocab_size):
    grammars = GrammarTokenizer(load_tokenizer(bpe_vocabulary()), vocab_size)
    mask = grammars.start(SamplingParams(grammar={"regex": "[ab]"})).mask()
    assert mask.shape == (-(-(vocab_size or VOCABULARY_SIZE) // 32),)
    tokens = np.flatnonzero(np.unpackbits(mask.view(np.uint8), bitorder="little"))
    assert tokens.tolist() == spelled(grammars, "ab")


def test_a_token_that_is_not_allowed_is_an_error(grammars):
    state = grammars.start(SamplingParams(grammar={"regex": "a+"}))
    with pytest.raises(RealmError, match=r"grammar failed|does not allow"):
        state.advance(*spelled(grammars, "z"))
    with pytest.raises(RealmError, match="grammar failed"):  # and the state does not go on without a mask
        state.mask()


@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_masks_after_drafts_are_those_of_going_there(bpe, data):
    """Right drafts, wrong ones, and ends among them; nothing moves, however often it is asked."""
    params = SamplingParams(grammar={"regex": "(ab|ac)*d?"})
    alphabet = [*spelled(bpe, "abcd"), bpe.eog_ids[0]]
    state, walked = bpe.start(params), []
    for _ in range(data.draw(st.integers(1, 6))):
        drafts = data.draw(st.lists(st.sampled_from([*alphabet, VOCABULARY_SIZE + 3, 10**6]), max_size=6))
        valid, masks = state.valid(drafts), state.masks(drafts)
        assert len(masks) == valid + 1
        fresh = bpe.start(params)
        for token in walked:
            fresh.advance(token)
        for i, mask in enumerate(masks):
            np.testing.assert_array_equal(mask, fresh.mask())
            if i < valid:
                fresh.advance(drafts[i])
        if valid < len(drafts):
            assert drafts[valid] not in allowed(masks[-1]) or drafts[valid - 1] in bpe.eog_ids
        choices = [token for token in alphabet if token in allowed(state.mask())]
        token = data.draw(st.sampled_from(choices))
        state.advance(token)
        walked.append(token)
        if state.finished:
            return


def test_states_of_one_grammar_are_independent(bpe):
    params = SamplingParams(grammar={"regex": "ab|cd"})
    first, second = bpe.start(params), bpe.start(params)
    a, b, c, _ = spelled(bpe, "abcd")
    first.advance(a)
    second.advance(c)
    assert b in allowed(first.mask())
    assert b not in allowed(second.mask())


def test_special_tokens_are_never_text(bpe):
    state = bpe.start(SamplingParams(grammar={"regex": "(.|\n)+"}))
    hidden = {VOCABULARY_SIZE - 3, VOCABULARY_SIZE - 1}  # bos and pad; their texts would match
    assert not hidden & set(allowed(state.mask()))


@pytest.mark.parametrize("text", ["the cat", " the", "that's <|bos|> it", "é\n"])
def test_texts_without_a_choice_are_spelled_exactly(grammars, text):
    tokens = grammars(text.encode())
    assert b"".join(grammars.tokens[token] for token in tokens) == text.encode()
    assert grammars(b"ab\xff\xfe") != []


def chain(rules):
    return "start: q0\n" + "".join(f"q{i}: q{i + 1}\n" for i in range(rules)) + f'q{rules}: "a"\n'


def refuse(grammars, match, **params):
    with pytest.raises(InvalidRequestError, match=match) as error:
        grammars.start(SamplingParams(**params))
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < 500


@pytest.mark.parametrize(
    ("match", "params"),
    [
        ("Unimplemented keys", {"json_schema": {"not": {"type": "integer"}}}),
        ("Unimplemented keys", {"json_schema": {"uniqueItems": True, "x-guidance": {"lenient": True}}}),
        ("Unsatisfiable schema", {"json_schema": {"type": "integer", "minimum": 5, "maximum": 3}}),
        ("cannot be used", {"json_schema": {"$ref": "#"}}),
        ("not present in a registry", {"json_schema": {"$ref": "http://example.org/schema"}}),
        ("schema too large", {"json_schema": {"allOf": [{"anyOf": [{"const": i}] * 30} for i in range(30)]}}),
        ("unknown name", {"grammar": "start: foo"}),
        ("cannot be used", {"grammar": "start"}),
        ("too deeply nested", {"grammar": "start: " + "(" * 3000 + '"a"' + ")" * 3000}),
        ("invalid regex", {"grammar": {"regex": "("}}),
        ("cannot be used", {"grammar": {"regex": "[a&&b]"}}),
        (
            "too big",
            {"grammar": "start: A30\n" + "".join(f"A{i}: A{i - 1} A{i - 1}\n" for i in range(1, 31)) + "A0: /a?/"},
        ),
        ("needs too much memory or nests too deep", {"grammar": chain(5000)}),
    ],
    ids=lambda value: str(value)[:40],
)
def test_what_cannot_be_used_is_refused(bpe, match, params):
    refuse(bpe, match, **params)


def test_a_grammar_that_takes_too_long_is_refused_and_the_next_is_served(bpe, monkeypatch):
    monkeypatch.setattr(check, "TIME_LIMIT", 0.3)
    both = " & ".join(f"/.*{i}.*/" for i in range(300))
    refuse(bpe, "longer than 0.3 s", grammar=f"start: A\nA: {both}\n")
    monkeypatch.undo()
    state = bpe.start(SamplingParams(grammar={"regex": "x[0-9]"}))
    assert allowed(state.mask()) == spelled(bpe, "x")


def test_a_text_that_outgrows_the_parser_ends_in_an_error_and_not_in_a_long_wait(bpe):
    """Nor does it touch another text of the same grammar."""
    params = SamplingParams(grammar="start: start start | /[ab]/ | start start start")
    state, other = bpe.start(params), bpe.start(params)
    slowest = 0.0

    def go_on():
        nonlocal slowest
        for _ in range(3000):
            began = time.perf_counter()
            state.mask()
            slowest = max(slowest, time.perf_counter() - began)
            state.advance(*spelled(bpe, "a"))

    with pytest.raises(RealmError, match=r"grammar failed: .*max is 500"):
        go_on()
    assert slowest < 0.5
    with pytest.raises(RealmError, match="grammar failed"):
        state.masks(spelled(bpe, "a"))
    for unharmed in (other, bpe.start(params)):
        assert len(unharmed.masks(spelled(bpe, "ab"))) == 3


def test_vocabularies_that_cannot_serve_are_refused():
    without_end = bpe_vocabulary()
    without_end["tokenizer.ggml.tokens"][286] = "<|other|>"
    del without_end["tokenizer.ggml.eos_token_id"]
    tokenizer = load_tokenizer(without_end)
    tokenizer.eog_ids = frozenset()
    with pytest.raises(InvalidRequestError, match="ends a generation"):
        GrammarTokenizer(tokenizer)
    tokenizer.kind = "wpm"
    with pytest.raises(InvalidRequestError, match="WordPiece"):
        GrammarTokenizer(tokenizer)
