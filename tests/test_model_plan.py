"""How layers are cut into segments for the scan."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from realm_jax.model.plan import find_segments, plan_layers


def expand(signatures: list, segments: tuple) -> list:
    return [signatures[s.start + i % s.period] for s in segments for i in range(s.period * s.repeats)]


def more_bits(layer: int, layers: int) -> bool:
    """llama.cpp's rule for the tensors that Q4_K_M keeps in Q6_K."""
    return layer < layers // 8 or layer >= 7 * layers // 8 or (layer - layers // 8) % 3 == 2


@pytest.mark.parametrize(
    ("signatures", "bodies"),
    [
        ("AAAA", 1),
        ("A" * 64, 1),
        ("AB" * 16, 2),
        ("ABC", 3),
        ("AAAB" * 8, 2 + 2),  # one A scanned three times costs less than a period of four only when it stands alone
        ("BBBB" + "AAB" * 8 + "BBBB", 5),
        ("".join("B" if more_bits(i, 32) else "A" for i in range(32)), 5),
        ("".join("B" if more_bits(i, 80) else "A" for i in range(80)), 5),
    ],
)
def test_bodies_are_few(signatures: str, bodies: int) -> None:
    segments = find_segments(signatures)
    assert expand(list(signatures), segments) == list(signatures)
    assert sum(s.period for s in segments) <= bodies


@given(st.lists(st.sampled_from("ABC"), min_size=1, max_size=40))
def test_segments_cover_every_layer_in_order(signatures: list[str]) -> None:
    segments = find_segments(signatures)
    assert expand(signatures, segments) == signatures
    assert [s.start for s in segments] == [
        sum(t.period * t.repeats for t in segments[:i]) for i in range(len(segments))
    ]
    assert sum(s.period for s in segments) <= len(signatures)


def test_places_in_stacks_count_up_in_the_order_of_layers() -> None:
    plan = plan_layers([{"q": "q:A", "n": "n"}, {"q": "q:B", "n": "n"}, {"q": "q:A", "n": "n"}])
    assert plan.layers == (
        (("n", "n", 0), ("q", "q:A", 0)),
        (("n", "n", 1), ("q", "q:B", 0)),
        (("n", "n", 2), ("q", "q:A", 1)),
    )
