"""Page accounting and scheduling, exact, without a model."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from realm_jax.engine.allocator import PageAllocator
from realm_jax.engine.scheduler import Scheduler, Sequence
from realm_jax.errors import CapacityError

CHUNK, PAGE = 16, 4


def make_scheduler(pages=32, slots=3, budget=2 * CHUNK, table_size=16):
    def padded(tokens):
        return next(size for size in (1, 4, CHUNK) if size >= tokens)

    return Scheduler(
        PageAllocator(pages),
        slots=slots,
        page_size=PAGE,
        table_size=table_size,
        chunk=CHUNK,
        padded=padded,
        prefill_budget=budget,
    )


def make_sequence(prompt, output=4):
    return Sequence(np.arange(prompt, dtype=np.int32), prompt + output)


def run(rows):
    """Plays the device and the sampler: computes the rows, appends a token to those that sample."""
    for row in rows:
        row.sequence.cached = row.stop
        if row.samples and row.sequence.length < row.sequence.limit:
            row.sequence.append(7)


def test_allocator_hands_out_each_page_once():
    pages = PageAllocator(5)
    first, second = pages.allocate(2), pages.allocate(3)
    assert sorted(first + second) == [0, 1, 2, 3, 4]
    assert pages.free == 0
    with pytest.raises(CapacityError, match="1 pages are needed; 0 of 5 are free"):
        pages.allocate(1)
    pages.release(first)
    assert sorted(pages.allocate(2)) == sorted(first)


@pytest.mark.parametrize("wrong", [[4], [0, 0], [99], [-1]])
def test_allocator_refuses_pages_that_are_not_out(wrong):
    pages = PageAllocator(5)
    assert pages.allocate(2) == [0, 1]
    with pytest.raises(ValueError, match="not all handed out"):
        pages.release(wrong)
    assert pages.free == 3


def test_first_come_first_served_even_if_a_later_one_would_fit():
    scheduler = make_scheduler(pages=8, slots=3)
    big, bigger, small = make_sequence(16), make_sequence(20), make_sequence(2)
    for sequence in (big, bigger, small):
        scheduler.submit(sequence)
    assert scheduler.admit() == [big]
    assert scheduler.admit() == []
    scheduler.remove(big)
    assert scheduler.admit() == [bigger, small]


def test_slots_bound_what_runs():
    scheduler = make_scheduler(slots=2)
    sequences = [make_sequence(2) for _ in range(3)]
    for sequence in sequences:
        scheduler.submit(sequence)
    assert scheduler.admit() == sequences[:2]
    assert {sequence.slot for sequence in sequences[:2]} == {0, 1}
    scheduler.remove(sequences[0])
    assert scheduler.admit() == [sequences[2]]
    assert {sequence.slot for sequence in sequences[1:]} == {0, 1}


def test_decoding_goes_on_while_prompts_are_prefilled():
    scheduler = make_scheduler()
    old, new = make_sequence(3, output=10), make_sequence(40)
    scheduler.submit(old)
    scheduler.admit()
    run(scheduler.next_batch())
    scheduler.submit(new)
    scheduler.admit()
    seen = []
    for _ in range(3):
        rows = scheduler.next_batch()
        seen.append({(row.sequence is new, row.start, row.stop, row.samples) for row in rows})
        run(rows)
    assert seen == [
        {(False, 3, 4, True), (True, 0, 16, False)},
        {(False, 4, 5, True), (True, 16, 32, False)},
        {(False, 5, 6, True), (True, 32, 40, True)},
    ]


@pytest.mark.parametrize("length", [1, 2, 15, 16, 17, 31, 32, 33, 48])
def test_how_a_prompt_is_cut_depends_on_it_alone(length):
    def cuts(company):
        scheduler = make_scheduler(pages=200, slots=8, budget=CHUNK)
        sequence = make_sequence(length)
        for size in company:
            scheduler.submit(make_sequence(size))
        scheduler.submit(sequence)
        scheduler.admit()
        found = []
        while sequence.cached < length:
            rows = scheduler.next_batch()
            found += [(row.start, row.stop) for row in rows if row.sequence is sequence]
            run(rows)
            for done in [one for one in scheduler.running if one.length == one.limit]:
                scheduler.remove(done)
        return found

    alone = cuts([])
    assert alone == cuts([5]) == cuts([1, 16, 33, 40, 2]) == cuts([47] * 7)
    assert all(stop - start == CHUNK for start, stop in alone[:-1])


def test_prefill_budget_counts_padded_tokens_and_lets_one_through():
    scheduler = make_scheduler(pages=200, slots=8, budget=2 * CHUNK)
    for size in (16, 16, 16, 3):
        scheduler.submit(make_sequence(size))
    scheduler.admit()
    assert [row.stop for row in scheduler.next_batch()] == [16, 16]
    scheduler = make_scheduler(pages=200, slots=8, budget=1)
    for size in (16, 16):
        scheduler.submit(make_sequence(size))
    scheduler.admit()
    assert [row.stop for row in scheduler.next_batch()] == [16]


def test_what_can_never_run_is_refused_with_both_numbers():
    scheduler = make_scheduler(pages=8)
    scheduler.check(32)
    with pytest.raises(CapacityError, match="33 tokens need 9 pages of the cache; it has 8: 32 tokens"):
        scheduler.check(33)
    with pytest.raises(CapacityError, match="it has 16: 64 tokens"):
        make_scheduler(pages=100).check(65)


def test_tables_list_the_pages_in_order():
    scheduler = make_scheduler()
    sequence = make_sequence(9)  # limit 13: 4 pages
    scheduler.submit(sequence)
    scheduler.admit()
    assert sequence.table[:4].tolist() == sequence.pages
    assert sequence.table.shape == (16,)
    assert sequence.table.dtype == np.int32


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_random_operations_keep_the_books(data):
    """Whatever happens: no page is in two places, nobody starves, and at the end all is free again."""
    slots, total = data.draw(st.integers(1, 4)), data.draw(st.integers(8, 24))
    scheduler = make_scheduler(pages=total, slots=slots, budget=data.draw(st.sampled_from([1, 16, 40])))
    alive = []
    for _ in range(data.draw(st.integers(1, 40))):
        action = data.draw(st.sampled_from(["submit", "cancel", "step", "step"]))
        if action == "submit":
            sequence = make_sequence(data.draw(st.integers(1, 24)), data.draw(st.integers(1, 8)))
            scheduler.check(sequence.limit)
            scheduler.submit(sequence)
            alive.append(sequence)
        elif action == "cancel" and alive:
            scheduler.remove(alive.pop(data.draw(st.integers(0, len(alive) - 1))))
        else:
            step(scheduler, alive)
        held = [page for sequence in scheduler.running for page in sequence.pages]
        assert len(set(held)) == len(held)
        assert len(held) + scheduler.pages.free == total
        assert len({sequence.slot for sequence in scheduler.running}) == len(scheduler.running) <= slots
        assert len(scheduler.running) + len(scheduler.waiting) == len(alive)
    for _ in range(2000):
        if not alive:
            break
        step(scheduler, alive)
    assert not alive
    assert scheduler.pages.free == total


def step(scheduler, alive):
    scheduler.admit()
    rows = scheduler.next_batch()
    assert bool(rows) == bool(alive)  # somebody can always go on
    assert all(row.sequence.cached == row.start < row.stop <= row.sequence.length for row in rows)
    before = {id(row.sequence): row.sequence.length for row in rows}
    run(rows)
    for row in rows:
        if row.samples and before[id(row.sequence)] == row.sequence.limit:
            raise AssertionError("ran past its limit")
        if row.sequence.length == row.sequence.limit:
            scheduler.remove(row.sequence)
            alive.remove(row.sequence)
