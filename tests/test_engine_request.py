"""One request: stop strings, end tokens, limits, pieces that are never half a character."""

import numpy as np
import pytest
from fake_engine import EOS, SPECIAL, make_request
from hypothesis import given
from hypothesis import strategies as st

from realm_jax.engine.request import choice_seed, collect
from realm_jax.engine.stop_text import StopText
from realm_jax.errors import InvalidRequestError
from realm_jax.results import TokenLogprob


def feed(request, tokens):
    """Feeds tokens until the request ends; returns its pieces."""
    for token in tokens:
        request.accept(token, None)
        if request.done:
            break
    return list(request.pieces)


@pytest.mark.parametrize(
    ("stops", "pieces", "emitted", "found"),
    [
        ([], ["ab", "c"], ["ab", "c"], False),
        (["cd"], ["ab", "c", "de"], ["ab", "", ""], True),
        (["cd"], ["abc", "e"], ["ab", "ce"], False),
        (["cd"], ["abcdef"], ["ab"], True),
        (["aab"], ["a", "a", "a", "b"], ["", "", "a", ""], True),
        (["xyz", "yq"], ["xy", "q"], ["", "x"], True),
        (["END", "N"], ["EN"], ["E"], True),
        (["\n\n"], ["a\n", "\n"], ["a", ""], True),
        (["\n\n"], ["a\n", "b"], ["a", "\nb"], False),
    ],
)
def test_stop_text(stops, pieces, emitted, found):
    stop = StopText(stops)
    seen = []
    for piece in pieces:
        text, hit = stop.push(piece)
        seen.append(text)
        if hit:
            break
    assert (seen, hit) == (emitted, found)


@given(st.text("ab", max_size=30), st.lists(st.text("ab", min_size=1, max_size=4), max_size=3), st.data())
def test_stop_text_equals_a_search_in_the_whole(text, stops, data):
    stop = StopText(stops)
    out, hit, at = "", False, 0
    while at < len(text) and not hit:
        size = data.draw(st.integers(1, 5))
        piece, hit = stop.push(text[at : at + size])
        out += piece
        at += size
        assert text.startswith(out)
    if not hit:
        out += stop.finish()
    first = [text.find(s) for s in stops if s in text]
    # a piece may bring several stop strings at once: then the earliest counts, else the one completed first
    assert hit == bool(first)
    if not hit:
        assert out == text
    else:
        assert any(text.startswith(s, len(out)) for s in stops)


def test_max_tokens_ends_with_length():
    request = make_request(b"ab", max_tokens=3)
    pieces = feed(request, b"xyz!")
    result = collect(pieces)
    assert (result.text, result.tokens, result.finish_reason) == ("xyz", list(b"xyz"), "length")
    assert (result.usage.prompt_tokens, result.usage.completion_tokens, result.usage.total_tokens) == (2, 3, 5)
    assert [piece.finish_reason for piece in pieces] == [None, None, "length"]


def test_end_token_is_counted_but_not_shown():
    result = collect(feed(make_request(b"ab"), [*b"hi", EOS, *b"no"]))
    assert (result.text, result.tokens, result.finish_reason) == ("hi", [*b"hi", EOS], "stop")


def test_ignore_eos_goes_on():
    result = collect(feed(make_request(b"ab", ignore_eos=True, max_tokens=4), [*b"h", EOS, *b"i!"]))
    assert (result.text, result.finish_reason) == ("hi!", "length")


def test_stop_token_ids():
    result = collect(feed(make_request(b"ab", stop_token_ids=[ord("c")]), b"abcd"))
    assert (result.text, result.tokens, result.finish_reason) == ("ab", list(b"abc"), "stop")


def test_stop_token_id_counts_even_when_eos_is_ignored():
    request = make_request(b"ab", ignore_eos=True, stop_token_ids=[EOS])
    assert collect(feed(request, [*b"a", EOS])).finish_reason == "stop"


def test_stop_string_across_tokens_holds_text_back():
    request = make_request(b"ab", stop=["STOP"])
    pieces = feed(request, b"go STOP now")
    assert [piece.text for piece in pieces] == ["g", "o", " ", "", "", "", ""]
    result = collect(pieces)
    assert (result.text, result.tokens, result.finish_reason) == ("go ", list(b"go STOP"), "stop")


def test_text_held_back_comes_out_at_the_end():
    assert collect(feed(make_request(b"ab", stop="STOP", max_tokens=3), b"aSTx")).text == "aST"
    assert collect(feed(make_request(b"ab", stop="STOP"), [*b"aST", EOS])).text == "aST"


def test_stop_string_completed_by_the_last_token():
    assert collect(feed(make_request(b"ab", stop="st", max_tokens=3), b"ast")).finish_reason == "stop"


def test_characters_are_never_halved():
    data = "né😀!".encode()
    request = make_request(b"ab", max_tokens=len(data))
    pieces = feed(request, data)
    assert [piece.text for piece in pieces] == ["n", "", "é", "", "", "", "😀", "!"]


def test_half_a_character_at_the_end_is_replaced():
    assert collect(feed(make_request(b"ab", max_tokens=3), "a😀".encode())).text == "a\ufffd"


def test_special_tokens_have_no_text():
    assert collect(feed(make_request(b"ab", max_tokens=3), [ord("a"), SPECIAL, ord("b")])).text == "ab"


def test_cancelled_keeps_what_there_was():
    request = make_request(b"ab", stop="cd")
    feed(request, b"abc")
    request.cancel()
    result = collect(request.pieces)
    assert (result.text, result.finish_reason, result.usage.completion_tokens) == ("ab", "cancelled", 3)


def test_logprobs_go_with_their_tokens():
    request = make_request(b"ab", logprobs=1, stop="b")
    for token in b"ab":
        request.accept(token, TokenLogprob(token, -0.5, ((token, -0.5),)))
    result = collect(request.pieces)
    assert [entry.token for entry in result.logprobs] == list(b"ab") == result.tokens


def test_timing_adds_up():
    timing = collect(feed(make_request(b"ab", max_tokens=3), b"xyz")).timing
    assert timing.time_to_first_token == pytest.approx(timing.queue + timing.prefill)
    assert timing.total == pytest.approx(timing.time_to_first_token + timing.decode)
    assert timing.decode_tokens_per_second == pytest.approx(2 / timing.decode)
    assert collect(feed(make_request(b"ab", max_tokens=1), b"x")).timing.decode_tokens_per_second is None


def test_context_overflow_is_refused_with_both_numbers():
    assert make_request(b"a" * 60, max_tokens=4).limit == 64
    with pytest.raises(InvalidRequestError, match="60 tokens and max_tokens 5 make 65; the context holds 64"):
        make_request(b"a" * 60, max_tokens=5)
    with pytest.raises(InvalidRequestError, match=r"the prompt has 64 tokens.*context holds 64"):
        make_request(b"a" * 64, max_tokens=1)
    with pytest.raises(InvalidRequestError, match=r"the prompt has 64 tokens.*context holds 64"):
        make_request(b"a" * 64, max_tokens=None)


def test_no_max_tokens_fills_the_context():
    result = collect(feed(make_request(b"a" * 60, max_tokens=None), b"bcdefgh"))
    assert (result.text, result.finish_reason) == ("bcde", "length")


def test_choice_seeds_differ_and_the_first_is_the_seed():
    seeds = [choice_seed(5, i) for i in range(50)]
    assert seeds[0] == 5
    assert len(set(seeds)) == 50
    assert all(0 <= seed < 2**64 for seed in seeds)
    assert choice_seed(6, 1) != choice_seed(5, 1)


def test_the_prompt_is_copied():
    prompt = np.arange(3, dtype=np.int32)
    request = make_request(prompt)
    prompt[:] = 9
    assert request.tokens[:3].tolist() == [0, 1, 2]
