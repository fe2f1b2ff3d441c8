"""Page accounting and scheduling, exact, without a model."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from realm_jax.engine.allocator import PageAllocator
from realm_jax.engine.prefix import chain, first_key
from realm_jax.engine.scheduler import QUANTUM, Scheduler
from realm_jax.engine.sequence import Sequence
from realm_jax.engine.tenants import Tenant
from realm_jax.errors import CapacityError, InvalidRequestError

CHUNK, PAGE = 16, 4


def make_scheduler(pages=32, slots=3, budget=2 * CHUNK, table_size=16, tenants=(), fair=True, regions=1):
    def padded(tokens):
        whole, rest = divmod(tokens, CHUNK)
        return whole * CHUNK + (next(size for size in (1, 4, CHUNK) if size >= rest) if rest else 0)

    return Scheduler(
        PageAllocator(pages, regions),
        slots=slots,
        page_size=PAGE,
        table_size=table_size,
        chunk=CHUNK,
        padded=padded,
        prefill_budget=budget,
        tenants=tenants,
        fair=fair,
    )


def make_sequence(prompt, output=4, **options):
    tokens = np.arange(prompt, dtype=np.int32) if isinstance(prompt, int) else np.asarray(prompt, np.int32)
    return Sequence(tokens, len(tokens) + output, **{"cache": False} | options)


def run(scheduler, rows):
    """Plays the device and the sampler: computes the rows, appends a token to those that sample."""
    for row in rows:
        scheduler.dispatched(row)
        if row.samples:
            row.sequence.drawn -= 1
            row.sequence.append(7)
            scheduler.generated(row.sequence, 1)


def finish(scheduler):
    """Takes out what has all its tokens; returns it."""
    done = [one for one in scheduler.running if one.length == one.limit]
    for one in done:
        scheduler.remove(one)
    return done


def drain(scheduler, steps=2000):
    """Runs all that is there to its end; returns the steps it took."""
    for count in range(steps):
        scheduler.admit()
        rows = scheduler.next_batch()
        if not rows:
            assert not scheduler.running
            assert not scheduler.waiting
            return count
        run(scheduler, rows)
        finish(scheduler)
    raise AssertionError("it does not end")


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


def test_first_in_line_first_served_even_if_a_later_one_would_fit():
    scheduler = make_scheduler(pages=8, slots=3)
    big, bigger, small = make_sequence(20), make_sequence(24), make_sequence(2)
    for sequence in (big, bigger, small):
        scheduler.submit(sequence)
    assert scheduler.admit() == [big]
    assert scheduler.admit() == []
    scheduler.remove(big)
    assert scheduler.admit() == [bigger, small]


def test_priorities_order_a_tenants_line():
    scheduler = make_scheduler(slots=1)
    low, high, next_high = make_sequence(2), make_sequence(2, priority=5), make_sequence(2, priority=5)
    for sequence in (low, high, next_high):
        scheduler.submit(sequence)
    order = []
    while scheduler.waiting or scheduler.running:
        order += scheduler.admit()
        run(scheduler, scheduler.next_batch())
        finish(scheduler)
    assert order == [high, next_high, low]


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
    old, new = make_sequence(3, output=10), make_sequence(60)
    scheduler.submit(old)
    scheduler.admit()
    run(scheduler, scheduler.next_batch())
    scheduler.submit(new)
    scheduler.admit()
    seen = []
    for _ in range(2):
        rows = scheduler.next_batch()
        seen.append({(row.sequence is new, row.start, row.stop, row.samples) for row in rows})
        run(scheduler, rows)
    assert seen == [
        {(False, 3, 4, True), (True, 0, 32, False)},
        {(False, 4, 5, True), (True, 32, 60, True)},
    ]


@pytest.mark.parametrize("length", [1, 2, 15, 16, 17, 31, 32, 33, 48])
@pytest.mark.parametrize("company", [(), (5,), (1, 16, 33, 40, 2), (47,) * 7], ids=str)
@pytest.mark.parametrize("budget", [1, CHUNK, 3 * CHUNK])
def test_prompts_are_cut_at_multiples_of_a_chunk(length, company, budget):
    scheduler = make_scheduler(pages=200, slots=8, budget=budget)
    sequence = make_sequence(length)
    for size in company:
        scheduler.submit(make_sequence(size))
    scheduler.submit(sequence)
    scheduler.admit()
    found = [0]
    while sequence.cached < length:
        rows = scheduler.next_batch()
        for row in rows:
            if row.sequence is sequence:
                assert row.start == found[-1]
                found.append(row.stop)
        run(scheduler, rows)
        finish(scheduler)
        scheduler.admit()
    assert found[-1] == length
    assert all(stop % CHUNK == 0 for stop in found[:-1])


def test_a_prompt_takes_what_the_others_leave_of_a_step():
    scheduler = make_scheduler(pages=200, slots=8, budget=4 * CHUNK)
    for size in (60, 20, 20):
        scheduler.submit(make_sequence(size))
    scheduler.admit()
    # A quarter each, and what is left to the first.
    assert [(row.start, row.stop) for row in scheduler.next_batch()] == [(0, 32), (0, 16), (0, 16)]
    scheduler = make_scheduler(pages=200, slots=8, budget=4 * CHUNK)
    scheduler.submit(make_sequence(60))
    scheduler.admit()
    assert [(row.start, row.stop) for row in scheduler.next_batch()] == [(0, 60)]


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


def test_tables_list_the_pages_in_order_as_they_are_needed():
    scheduler = make_scheduler()
    sequence = make_sequence(9)  # limit 13: 4 pages
    scheduler.submit(sequence)
    scheduler.admit()
    run(scheduler, scheduler.next_batch())
    assert len(sequence.pages) == 3
    assert sequence.table[:3].tolist() == sequence.pages
    assert sequence.table.shape == (16,)
    assert sequence.table.dtype == np.int32


def test_rows_of_drafts_have_pages_and_stay_below_the_limit():
    scheduler = make_scheduler()
    sequence = make_sequence(3, output=4)
    scheduler.submit(sequence)
    scheduler.admit()
    run(scheduler, scheduler.next_batch())
    [row] = scheduler.next_batch(lambda decoding: {one.id: (7, 8, 9, 10, 11) for one in decoding})
    assert (row.start, row.stop, row.drafts) == (3, 4, (7, 8))  # 4 known, 7 at most, and the row itself brings one
    assert len(sequence.pages) == 2


def test_a_token_that_is_not_read_yet_is_taken_from_the_device():
    scheduler = make_scheduler()
    sequence = make_sequence(3, output=3)
    scheduler.submit(sequence)
    scheduler.admit()
    seen = []
    for _ in range(3):
        [row] = scheduler.next_batch()
        scheduler.dispatched(row)
        seen.append((row.start, row.stop, row.unread))
        if sequence.drawn == 2:  # the host reads one step behind
            sequence.drawn -= 1
            sequence.append(7)
    assert seen == [(0, 3, False), (3, 4, True), (4, 5, True)]
    assert scheduler.next_batch() == []  # the last token is on its way


def test_when_pages_run_out_the_last_to_come_makes_room_and_loses_nothing():
    scheduler = make_scheduler(pages=6, slots=3)
    first, second = make_sequence(8, output=12), make_sequence(8, output=12)
    scheduler.submit(first)
    scheduler.submit(second)
    for _ in range(40):
        scheduler.admit()
        run(scheduler, scheduler.next_batch())
        finish(scheduler)
    assert scheduler.preemptions >= 1
    assert first.length == second.length == 20
    assert scheduler.pages.free == 6


def prefix_tokens(count, seed=0):
    return np.random.default_rng(seed).integers(0, 99, count).astype(np.int32)


def test_a_prefix_is_found_again_within_a_tenant_only():
    scheduler = make_scheduler(tenants=[Tenant("a"), Tenant("b")], slots=1)
    tokens = prefix_tokens(18)

    def reused(tenant, tokens, **options):
        sequence = make_sequence(tokens, cache=True, tenant=tenant, **options)
        scheduler.submit(sequence)
        drain(scheduler)
        return sequence.reused

    assert reused("a", tokens) == 0
    assert reused("a", tokens) == 16
    assert reused("b", tokens) == 0
    assert reused("a", tokens, adapter_key=b"another") == 0
    assert reused("a", tokens[:16]) == 12  # at least one token is computed
    assert reused("a", np.append(tokens[:8], 1)) == 8
    assert make_sequence(tokens, cache=False).first_key is None
    assert scheduler.available == scheduler.pages.total


def test_a_tenant_cannot_tell_anothers_cache_from_an_empty_one():
    """Pages hit, tokens prefilled and steps run are those of a cold cache, whatever the other tenant had cached."""

    def trace(warm):
        scheduler = make_scheduler(tenants=[Tenant("a"), Tenant("b")], slots=2, pages=64)
        if warm:
            for count in (40, 24, 17):
                scheduler.submit(make_sequence(prefix_tokens(count), cache=True, tenant="a"))
                drain(scheduler)
        seen = []
        for count in (40, 24, 24, 17):
            sequence = make_sequence(prefix_tokens(count), cache=True, tenant="b")
            scheduler.submit(sequence)
            scheduler.admit()
            computed = []
            while scheduler.running:
                rows = scheduler.next_batch()
                computed += [(row.start, row.stop) for row in rows]
                run(scheduler, rows)
                finish(scheduler)
            seen.append((sequence.reused, computed))
        return seen

    assert trace(warm=True) == trace(warm=False)


def test_a_public_prefix_is_shared_by_all():
    scheduler = make_scheduler(tenants=[Tenant("a"), Tenant("b")], slots=1)
    tokens = prefix_tokens(18)
    scheduler.cache.public |= set(chain(first_key(), tokens[:8], PAGE, scheduler.cache.public_salt))
    seen = []
    for tenant in "abab":
        sequence = make_sequence(tokens, cache=True, tenant=tenant)
        scheduler.submit(sequence)
        drain(scheduler)
        seen.append(sequence.reused)
    assert seen == [0, 8, 16, 16]


def test_what_is_least_recently_used_goes_first_and_floors_stay():
    scheduler = make_scheduler(pages=8, slots=1, tenants=[Tenant("a", min_pages=2), Tenant("b")])

    def use(tenant, seed, count=9):
        sequence = make_sequence(prefix_tokens(count, seed), cache=True, tenant=tenant, output=1)
        scheduler.submit(sequence)
        drain(scheduler)
        return sequence.reused

    assert [use("a", 1), use("b", 2), use("b", 3), use("b", 2)] == [0, 0, 0, 8]
    assert use("b", 4) == 0  # takes room of the oldest that may go: 3, not the floor of a
    assert use("b", 2) == 8
    assert use("b", 3) == 4  # the end of a prefix goes before its beginning
    assert use("a", 1) == 8


def test_ceilings_bound_what_a_tenant_holds():
    scheduler = make_scheduler(pages=40, slots=3, tenants=[Tenant("a", max_pages=6), Tenant("b")])
    with pytest.raises(CapacityError, match="28 tokens need 7 pages of the cache; tenant 'a' has 6: 24 tokens"):
        scheduler.check(28, "a")
    for seed in range(4):
        scheduler.submit(make_sequence(prefix_tokens(12, seed), cache=True, tenant="a"))
    account = scheduler.account("a")
    for _ in range(200):
        scheduler.admit()
        rows = scheduler.next_batch()
        assert len(scheduler._charged(account)) <= 6
        if not rows:
            break
        run(scheduler, rows)
        finish(scheduler)
    assert not account.active


FLOOD = 400


def flooded(fair, steps=600, weights=(1.0, 1.0), lengths=(40, 12), outputs=(6, 16)):
    """Tenant a fills the queue first, then b does; returns the scheduler, the worst gap and the service of each."""
    tenants = [Tenant(name, weight=weight) for name, weight in zip("ab", weights)]
    scheduler = make_scheduler(pages=64, slots=4, tenants=tenants, fair=fair, budget=4 * CHUNK)
    for name, length, output in zip("ab", lengths, outputs):
        for _ in range(FLOOD):
            scheduler.submit(make_sequence(length, output=output, tenant=name))
    worst = 0.0
    for _ in range(steps):
        scheduler.admit()
        worst = max(worst, scheduler.gap())
        run(scheduler, scheduler.next_batch())
        finish(scheduler)
    return scheduler, worst, [account.counter * account.tenant.weight for account in scheduler.accounts.values()]


def test_two_floods_share_within_the_bound_and_far_better_than_in_order_of_arrival():
    fair, gap, served = flooded(fair=True)
    _, other_gap, _ = flooded(fair=False)
    assert gap <= fair.gap_bound()
    assert other_gap >= 10 * gap
    assert served[0] == pytest.approx(served[1], rel=0.2)


def test_weights_are_shares():
    _, _, served = flooded(fair=True, weights=(3.0, 1.0), lengths=(12, 12), outputs=(8, 8))
    assert served[0] / served[1] == pytest.approx(3.0, rel=0.15)


@pytest.mark.parametrize("length", [5, CHUNK, 3 * CHUNK])
def test_a_light_tenant_waits_for_a_step_and_its_own_prefill(length):
    scheduler, _, _ = flooded(fair=True, steps=50)
    scheduler = make_scheduler(pages=64, slots=4, tenants=[Tenant("flood"), Tenant("light")], budget=4 * CHUNK)
    for _ in range(50):
        scheduler.submit(make_sequence(40, output=16, tenant="flood"))
    for _ in range(20):
        scheduler.admit()
        run(scheduler, scheduler.next_batch())
        finish(scheduler)
    light = make_sequence(length, tenant="light")
    scheduler.submit(light)  # while a step runs
    steps = 0
    while light.length == light.prompt_length:
        scheduler.admit()
        run(scheduler, scheduler.next_batch())
        finish(scheduler)
        steps += 1
    assert steps <= -(-length // CHUNK)


def test_nothing_is_saved_up_while_idle():
    scheduler = make_scheduler(tenants=[Tenant("busy"), Tenant("idle")], slots=2, pages=64)
    for _ in range(60):
        scheduler.submit(make_sequence(10, tenant="busy"))
    for _ in range(100):
        scheduler.admit()
        run(scheduler, scheduler.next_batch())
        finish(scheduler)
    busy, idle = scheduler.account("busy"), scheduler.account("idle")
    assert busy.counter > QUANTUM / 4 > idle.counter
    scheduler.submit(make_sequence(4, tenant="idle"))
    assert idle.counter == busy.counter


def test_tenants_are_known_by_name():
    scheduler = make_scheduler(tenants=[Tenant("a")])
    with pytest.raises(InvalidRequestError, match="unknown tenant 'b'; accepted: a"):
        scheduler.account("b")
    with pytest.raises(InvalidRequestError, match="tenant 'a' is given twice"):
        make_scheduler(tenants=[Tenant("a"), Tenant("a")])


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_random_operations_keep_the_books(data):
    """Whatever happens: no page is in two places, nobody starves, and at the end all is free again."""
    regions = data.draw(st.sampled_from([1, 1, 2]))
    slots, total = regions * data.draw(st.integers(1, 4)), regions * data.draw(st.integers(8, 24))
    tenants = [Tenant("a", weight=2.0, min_pages=1), Tenant("b", max_pages=8), Tenant("c")]
    budget = data.draw(st.sampled_from([1, 16, 40]))
    scheduler = make_scheduler(pages=total, slots=slots, budget=budget, tenants=tenants, regions=regions)
    alive = []
    for _ in range(data.draw(st.integers(1, 60))):
        action = data.draw(st.sampled_from(["submit", "submit", "cancel", "step", "step", "step"]))
        if action == "submit":
            tokens = prefix_tokens(data.draw(st.integers(1, 20)), seed=data.draw(st.integers(0, 1)))
            options = {"tenant": data.draw(st.sampled_from("abc")), "cache": data.draw(st.booleans())}
            sequence = make_sequence(tokens, data.draw(st.integers(1, 8)), **options)
            scheduler.check(sequence.limit, sequence.tenant)
            scheduler.submit(sequence)
            alive.append(sequence)
        elif action == "cancel" and alive:
            scheduler.remove(alive.pop(data.draw(st.integers(0, len(alive) - 1))))
        else:
            step(scheduler, alive)
        check_books(scheduler, alive, slots)
    for _ in range(3000):
        if not alive:
            break
        step(scheduler, alive)
        assert scheduler.gap() <= scheduler.gap_bound()
    assert not alive
    assert scheduler.available == total
    scheduler.cache.forget()
    assert scheduler.pages.free == total


def check_books(scheduler, alive, slots):
    holders = {}
    for sequence in scheduler.running:
        assert sequence.table[: len(sequence.pages)].tolist() == sequence.pages
        region = sequence.slot // (slots // scheduler.pages.regions)
        assert {scheduler.pages.region_of(page) for page in sequence.pages} <= {region}
        for page in sequence.pages:
            holders[page] = holders.get(page, 0) + 1
    for entry in scheduler.cache._entries.values():
        holders[entry.page] = holders.get(entry.page, 0) + 1
    assert {page: scheduler.pages.holders(page) for page in holders} == holders
    assert len(holders) + scheduler.pages.free == scheduler.pages.total
    assert len({sequence.slot for sequence in scheduler.running}) == len(scheduler.running) <= slots
    assert len(scheduler.running) + len(scheduler.waiting) == len(alive)
    assert set(scheduler._arrived) == {sequence.id for sequence in alive}


def step(scheduler, alive):
    scheduler.admit()
    rows = scheduler.next_batch()
    assert bool(rows) == bool(alive)  # somebody can always go on
    assert all(row.sequence.cached == row.start < row.stop <= row.sequence.length for row in rows)
    written = [page for row in rows for page in row.sequence.pages[row.start // PAGE : -(-row.stop // PAGE)]]
    assert len(set(written)) == len(written)  # what is shared is not written
    run(scheduler, rows)
    for sequence in finish(scheduler):
        alive.remove(sequence)


# Regions, of a mesh's data axis


def test_sequences_spread_over_regions():
    scheduler = make_scheduler(slots=4, regions=2)
    for _ in range(4):
        scheduler.submit(make_sequence(8))
    assert [sequence.region for sequence in scheduler.admit()] in ([0, 1, 0, 1], [1, 0, 1, 0])


def test_a_prefix_draws_its_sequences_to_its_region():
    scheduler = make_scheduler(slots=4, regions=2)
    first = make_sequence(prefix_tokens(20), cache=True)
    scheduler.submit(first)
    while not first.generated:
        scheduler.admit()
        run(scheduler, scheduler.next_batch())
    scheduler.remove(first)
    for _ in range(2):
        again = make_sequence(prefix_tokens(20), cache=True)
        scheduler.submit(again)
        [started] = scheduler.admit()
        assert (started.region, started.reused) == (first.region, 16)
    third = make_sequence(prefix_tokens(20), cache=True)  # its region has no slot left
    scheduler.submit(third)
    [started] = scheduler.admit()
    assert (started.region, started.reused) == (1 - first.region, 0)


def test_a_full_region_takes_pages_from_its_own_alone():
    scheduler = make_scheduler(pages=16, slots=4, regions=2, table_size=8)
    long, other = make_sequence(24, output=8), make_sequence(4, output=20)
    for sequence in (long, other):
        scheduler.submit(sequence)
    scheduler.admit()
    assert {long.region, other.region} == {0, 1}
    late = make_sequence(4, output=20)
    scheduler.submit(late)
    scheduler.admit()
    for _ in range(12):
        scheduler.admit()
        run(scheduler, scheduler.next_batch())
        finish(scheduler)
        assert other.slot is not None or other.length == other.limit  # never preempted for the other region


def test_what_one_request_may_hold_is_of_one_region():
    scheduler = make_scheduler(pages=16, slots=2, regions=2, table_size=16)
    scheduler.check(32)
    with pytest.raises(CapacityError, match="33 tokens need 9 pages of the cache; it has 8"):
        scheduler.check(33)
    pages, _ = scheduler.reserve(32)
    assert len({scheduler.pages.region_of(page) for page in pages}) == 1
    assert scheduler.reservable(32)
    scheduler.reserve(32)
    assert not scheduler.reservable(1)
