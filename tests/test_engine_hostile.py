"""Tenants that mean harm, and faults at the worst moment: nobody else is hurt, and the books are right afterwards."""

import os
import random
import signal
import sqlite3
import threading
import time

import numpy as np
import pytest
from fake_engine import FakeAdapters, FakeRunner, expected_greedy, make_request
from test_engine_scheduler import finish, make_scheduler, make_sequence, run

from realm_jax.engine.ledger import Ledger, Spent
from realm_jax.engine.loop import HostLoop
from realm_jax.engine.request import collect
from realm_jax.engine.tenants import Account, Tenant
from realm_jax.errors import AdapterError, CapacityError, InvalidRequestError, QuotaError, RealmError

SOON = 20  # seconds after which something hangs


@pytest.fixture
def runner():
    return FakeRunner()


def make_loop(runner, **options):
    adapters = FakeAdapters()
    adapters.add("a", 1, 1.0)
    adapters.add("secret", 2, 1.0)
    return HostLoop(runner, adapters=adapters, **options)


@pytest.fixture
def loop(runner):
    loop = make_loop(runner)
    yield loop
    check_books(loop)


def check_books(loop):
    scheduler = loop.scheduler
    assert not scheduler.waiting
    assert not scheduler.running
    assert scheduler.available == scheduler.pages.total
    assert loop._open == 0
    assert {account.open for account in scheduler.accounts.values()} == {0}
    assert {resident.holders for resident in loop.adapters._store.named.values()} <= {0}
    assert not loop._driving


def joined(thread):
    thread.join(timeout=SOON)
    assert not thread.is_alive()


def step(scheduler):
    scheduler.admit()
    run(scheduler, scheduler.next_batch())
    finish(scheduler)


# -- fairness


def trickle_then_flood(trickle):
    """Tenant b floods; a has what `trickle` makes of it, then floods, too. Returns the scheduler and the worst gap."""
    scheduler = make_scheduler(pages=64, slots=4, tenants=[Tenant("a"), Tenant("b")], budget=4 * 16)
    for _ in range(600):
        scheduler.submit(make_sequence(12, output=16, tenant="b"))
    trickle(scheduler)
    for _ in range(50):
        scheduler.submit(make_sequence(12, output=16, tenant="a"))
    worst = 0.0
    for _ in range(50):
        step(scheduler)
        worst = max(worst, scheduler.gap())
    return scheduler, worst


def test_nothing_is_saved_up_by_a_request_that_runs_all_the_time():
    """One that is never without a request, but asks for less than its share, has no claim to the rest later."""

    def trickle(scheduler):
        one = make_sequence(4, output=50, tenant="a")
        scheduler.submit(one)
        for _ in range(800):
            if one.limit - one.length < 3:
                one = make_sequence(4, output=50, tenant="a")
                scheduler.submit(one)
            step(scheduler)

    scheduler, worst = trickle_then_flood(trickle)
    assert worst <= scheduler.gap_bound()


def test_who_had_the_engine_alone_is_not_made_to_pay_for_it():
    scheduler = make_scheduler(pages=64, slots=4, tenants=[Tenant("early"), Tenant("late")], budget=4 * 16)
    for _ in range(100):
        scheduler.submit(make_sequence(12, output=16, tenant="early"))
        step(scheduler)
    while scheduler.running or scheduler.waiting:
        step(scheduler)
    for _ in range(50):
        for name in ("late", "early"):
            scheduler.submit(make_sequence(12, output=16, tenant=name))
    worst = 0.0
    for _ in range(50):
        step(scheduler)
        worst = max(worst, scheduler.gap())
    assert worst <= scheduler.gap_bound()


def test_nothing_is_saved_up_at_a_ceiling_of_ones_own():
    tenants = [Tenant("a", max_pages=7), Tenant("b")]
    scheduler = make_scheduler(pages=64, slots=4, tenants=tenants, budget=4 * 16)
    worst = 0.0
    for _step in range(1500):
        for name in "ab":
            for _ in range(2):
                scheduler.submit(make_sequence(12, output=16, tenant=name))
        step(scheduler)
        worst = max(worst, scheduler.gap())
    assert worst <= scheduler.gap_bound()


# What a tenant may send: tokens of the prompt and of the output.
STYLES = {
    "flood": (12, 16),
    "tiny": (1, 1),
    "huge": (40, 20),
    "cancel": (30, 20),  # and takes back before the end
    "priority": (10, 10),
    "burst": (20, 8),  # from time to time, much
    "cached": (24, 12),
    "trickle": (4, 40),  # always one, never two
}


def play(rng, steps):
    """Tenants of random styles, weights and page quotas; returns the gap over its bound at its worst."""
    floors = rng.random() < 0.3
    tenants = [
        Tenant(
            name,
            weight=rng.choice([0.5, 1, 1, 2]),
            max_pages=rng.choice([None, None, None, 16, 18]),
            min_pages=rng.choice([0, 2]) if floors else 0,
        )
        for name in "abcd"[: rng.choice([2, 3, 4])]
    ]
    regions = rng.choice([1, 1, 2])
    pages, slots = rng.choice([20, 24, 32, 64]), rng.choice([1, 2, 4, 8])
    scheduler = make_scheduler(
        pages=pages * regions, slots=slots * regions, budget=4 * 16, tenants=tenants, regions=regions
    )
    styles = {tenant.name: rng.choice(list(STYLES)) for tenant in tenants}
    worst = 0.0

    def submit(name):
        length, output = STYLES[styles[name]]
        floors = sum(n for other, n in scheduler.cache.floors.items() if other != name)
        most = min(16, scheduler.pages.region_size - floors)
        one = make_sequence(
            min(length, 4 * most - output - 1),
            output=output,
            tenant=name,
            cache=styles[name] in ("cached", "burst") or rng.random() < 0.3,
            priority=rng.randrange(5) if styles[name] == "priority" else 0,
        )
        scheduler.check(one.limit, name)
        scheduler.submit(one)

    for count in range(steps):
        for name, style in styles.items():
            account = scheduler.account(name)
            mine = account.waiting + account.running
            if style == "trickle":
                if not mine or (len(mine) == 1 and mine[0].limit - mine[0].length < 3):
                    submit(name)
            elif style == "burst":
                for _ in range(20 if count % 50 == 0 else 0):
                    submit(name)
            elif len(account.waiting) < 6:
                submit(name)
            if style == "cancel":
                for one in mine:
                    if rng.random() < 0.2:
                        scheduler.remove(one)
        scheduler.admit()
        rows = scheduler.next_batch()
        assert rows or not (scheduler.running or scheduler.waiting)  # every step makes progress
        run(scheduler, rows)
        finish(scheduler)
        worst = max(worst, scheduler.gap() / scheduler.gap_bound())
    return worst


@pytest.mark.parametrize("seed", range(20))
def test_whatever_tenants_send_the_gap_is_bounded_and_all_go_on(seed):
    assert play(random.Random(seed), 300) <= 1


def test_cancelling_and_sending_again_gains_nothing():
    """One prefills and cancels all the time, which is dear and soon over; the other is served as much."""
    scheduler = make_scheduler(pages=64, slots=2, tenants=[Tenant("honest"), Tenant("restless")], budget=4 * 16)
    for count in range(600):
        for account in scheduler.accounts.values():
            while len(account.waiting) < 4:
                scheduler.submit(make_sequence(30, output=20, tenant=account.name))
        if count % 4 == 0:
            for one in list(scheduler.account("restless").running):
                scheduler.remove(one)
        step(scheduler)
    honest, restless = (scheduler.account(name).counter for name in ("honest", "restless"))
    assert restless <= 1.2 * honest


def test_a_small_weight_with_one_slot_does_not_shield_a_flood():
    tenants = [Tenant("feather", weight=0.1), Tenant("flood"), Tenant("light")]
    scheduler = make_scheduler(pages=64, slots=4, tenants=tenants, budget=4 * 16)
    scheduler.submit(make_sequence(4, output=40, tenant="feather"))
    for _ in range(10):
        scheduler.submit(make_sequence(4, output=40, tenant="flood"))
    step(scheduler)
    light = make_sequence(4, tenant="light")
    scheduler.submit(light)
    scheduler.admit()
    assert light.slot is not None


def test_a_full_queue_has_room_for_each_tenants_share(runner):
    loop = make_loop(runner, queue_limit=10, tenants=[Tenant("flood"), Tenant("light")])
    flood = [make_request(b"abc", max_tokens=2, options={"tenant": "flood"}) for _ in range(11)]
    loop.submit(flood[:10])
    with pytest.raises(CapacityError, match="10 requests wait and 1 more come"):
        loop.submit(flood[10:])
    light = [make_request(b"abc", max_tokens=2, options={"tenant": "light"}) for _ in range(6)]
    for request in light[:5]:
        loop.submit([request])
    with pytest.raises(CapacityError, match="15 requests wait and 1 more come"):
        loop.submit(light[5:])
    for request in flood[:10] + light[:5]:
        assert collect(loop.pieces(request)).tokens == expected_greedy(b"abc", 2)
    check_books(loop)


def test_a_long_line_costs_each_newcomer_little():
    class Counting(int):  # compared
        count = 0

        def __neg__(self):
            Counting.count += 1
            return -int(self)

    scheduler = make_scheduler()
    for _ in range(500):
        sequence = make_sequence(4)
        sequence.priority = Counting(1)
        scheduler.submit(sequence)
    assert Counting.count < 500 * 20
    assert scheduler.account("default").waiting == sorted(scheduler.waiting, key=lambda s: scheduler._arrived[s.id])


# -- quotas


def test_less_than_one_request_a_minute():
    now = [0.0]
    account = Account(Tenant("rare", requests_per_minute=0.5), clock=lambda: now[0])
    account.check_quota(1)
    account.opened(1)
    with pytest.raises(QuotaError, match=r"over 0.5 requests a minute; accepted again in 120 s"):
        account.check_quota(1)
    now[0] = 121.0
    account.check_quota(1)


def test_what_is_spent_while_a_quota_is_read_is_not_lost(runner):
    """The thread that drives spends while others submit."""
    loop = make_loop(runner, tenants=[Tenant("default", tokens_per_minute=1000)])
    request = make_request(b"abc", max_tokens=1)
    thread = threading.Thread(target=lambda: loop._spend(request, prompt=100))

    class Now(float):
        def __sub__(self, other):  # in the middle of reading what is left
            if threading.current_thread() is threading.main_thread() and thread.ident is None:
                thread.start()
                thread.join(0.2)
            return 0.0

    allowance = loop.scheduler.account("default")._tokens
    allowance._clock = lambda: Now(0.0)
    loop.submit([request])
    joined(thread)
    assert allowance._left == 900.0
    loop.cancel([request])
    check_books(loop)


def test_floors_that_leave_nothing():
    with pytest.raises(InvalidRequestError, match="min_pages of all tenants make 32; accepted: less than the 32 pages"):
        make_scheduler(pages=32, tenants=[Tenant("a", min_pages=16), Tenant("b", min_pages=16)])


# -- isolation


def test_refusals_do_not_name_adapters_of_others(runner):
    loop = make_loop(runner, tenants=[Tenant("mine", adapters=["a", "gone"]), Tenant("other")])
    for name in ("gone", "secret"):
        with pytest.raises(AdapterError) as caught:
            loop.submit([make_request(b"abc", options={"tenant": "mine", "adapter": name})])
        assert "'a'" in str(caught.value)
        assert ("secret" in str(caught.value)) == (name == "secret")
    check_books(loop)


def test_what_was_computed_with_bad_numbers_is_not_kept(loop, runner):
    """Its keys and values may be as bad as its logits were; and it may have been the device's fault."""
    prompt = bytes(range(97, 109))
    runner.overrides[np.frombuffer(prompt, np.uint8).astype(np.int32).tobytes()] = np.full(300, np.nan, np.float32)
    request = make_request(prompt, max_tokens=3)
    loop.submit([request])
    with pytest.raises(RealmError, match="not finite"):
        list(loop.pieces(request))
    runner.overrides.clear()
    request = make_request(prompt, max_tokens=3)
    loop.submit([request])
    result = collect(loop.pieces(request))
    assert (result.tokens, result.usage.cached_tokens) == (expected_greedy(prompt, 3), 0)


# -- faults


def test_refused_exclusive_work_disturbs_nobody(loop):
    request = make_request(b"abc", max_tokens=6)
    loop.submit([request])
    pieces = loop.pieces(request)
    first = next(pieces)
    with pytest.raises(AdapterError, match="no adapter 'nope'"):
        loop.exclusively(4, lambda table: loop.adapters.with_placed("nope", lambda placed: None))
    with pytest.raises(InvalidRequestError, match="1 requests run or wait"):
        loop.swap_model(lambda: None)
    assert collect([first, *pieces]).tokens == expected_greedy(b"abc", 6)


class Broken:
    """A grammar that allows everything, until it fails."""

    finished = False

    def __init__(self, fails):
        self.fails = fails
        self.calls = 0

    def masks(self, drafts):
        self.calls += 1
        if self.calls == 3 and self.fails == "masks":
            raise RuntimeError("no mask of the tenant's secret grammar")
        return [None] * (1 + len(drafts))

    def valid(self, drafts):
        raise RuntimeError("no validation of the tenant's secret grammar")

    def advance(self, token):
        pass


def test_a_grammar_that_fails_ends_its_own_request(loop):
    victim, other = make_request(b"abc"), make_request(b"def", max_tokens=8)
    victim.grammar = Broken("masks")
    loop.submit([victim, other])
    with pytest.raises(RuntimeError, match="no mask"):
        list(loop.pieces(victim))
    assert collect(loop.pieces(other)).tokens == expected_greedy(b"def", 8)


def test_a_thread_that_cannot_go_on_says_so_to_all(runner):
    """The device is gone for good: even starting afresh fails."""
    loop = make_loop(runner)
    requests = [make_request(b"abc"), *(make_request(b"def") for _ in range(6))]

    def fail(*args):
        raise RuntimeError("the device is gone")

    runner.before_step, runner.reset = fail, fail
    loop.submit(requests)
    thread = threading.Thread(target=loop.serve, daemon=True)
    thread.start()
    for request in requests:
        outcome = []
        waiting = threading.Thread(target=lambda r=request, o=outcome: o.append(ended(loop, r)), daemon=True)
        waiting.start()
        joined(waiting)
        assert "the device is gone" in str(outcome[0])
    joined(thread)
    with pytest.raises(InvalidRequestError, match="closed"):
        loop.submit([make_request(b"abc")])
    check_books(loop)


def ended(loop, request):
    try:
        return collect(loop.pieces(request)).finish_reason
    except Exception as error:
        return error


def test_cancelling_while_an_adapter_loads(loop):
    """A stream that is collected in the middle of it cancels, in the thread that loads."""
    adapted, plain = make_request(b"abc", options={"adapter": "a"}), make_request(b"def")
    loop.submit([adapted, plain])
    loading, other = threading.Event(), threading.Thread(target=lambda: loop.cancel([adapted]), daemon=True)

    def load():
        with loop.adapters._lock:
            other.start()
            loading.wait(0.2)
            loop.cancel([plain])

    thread = threading.Thread(target=load, daemon=True)
    thread.start()
    joined(thread)
    joined(other)
    assert adapted.finish_reason == plain.finish_reason == "cancelled"


def test_ctrl_c_while_an_adapter_is_taken(loop, monkeypatch):
    acquire = loop.adapters._store.acquire

    def interrupted(name):
        resident = acquire(name)
        os.kill(os.getpid(), signal.SIGINT)
        return resident

    monkeypatch.setattr(loop.adapters._store, "acquire", interrupted)
    request = make_request(b"abc", options={"adapter": "a"})
    try:
        with pytest.raises(KeyboardInterrupt):
            loop.submit([request])
    finally:
        loop.cancel([request])
    assert request.finish_reason == "cancelled"


# -- the ledger


def test_a_closed_ledger_can_be_asked(tmp_path):
    ledger = Ledger(tmp_path / "ledger")
    ledger.add("a", Spent(1, 2, 3, 4))
    ledger.close()
    with pytest.raises(RealmError, match="closed"):
        ledger.usage("a")
    ledger.close()


def test_a_ledger_that_others_write_holds_up_no_step(tmp_path):
    ledger = Ledger(tmp_path / "ledger")
    other = sqlite3.connect(tmp_path / "ledger")
    other.execute("BEGIN IMMEDIATE")
    ledger.add("a", Spent(1, 2, 3, 4))
    started = time.perf_counter()
    with pytest.raises(RealmError, match="locked"):
        ledger.flush()
    assert time.perf_counter() - started < 2
    other.rollback()
    ledger.flush()
    assert ledger.usage("a") == Spent(1, 2, 3, 4)
    ledger.close()


def test_what_the_ledger_cannot_read_is_a_typed_error(tmp_path):
    ledger = Ledger(tmp_path / "ledger")
    ledger.add("a", Spent(1, 2, 3, 4))
    ledger.flush()
    with sqlite3.connect(tmp_path / "ledger") as other:
        other.execute("DROP TABLE usage")
    with pytest.raises(RealmError, match="cannot be read"):
        ledger.usage("a")
    ledger.close()


@pytest.mark.parametrize("path", [7, "", b"ledger", "a\0b"])
def test_paths_that_are_none(path, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(RealmError, match="ledger"):
        Ledger(path)
    assert not list(tmp_path.iterdir())


def test_closing_with_a_ledger_that_cannot_be_written(runner, tmp_path):
    loop = make_loop(runner, ledger=Ledger(tmp_path / "ledger"))
    request = make_request(b"abc", max_tokens=3)
    loop.submit([request])
    assert collect(loop.pieces(request)).tokens == expected_greedy(b"abc", 3)
    with sqlite3.connect(tmp_path / "ledger") as other:
        other.execute("DROP TABLE usage")
    loop.ledger.add("default", Spent(1))
    with pytest.raises(RealmError, match="cannot be written"):
        loop.close()
    assert loop._runner is None
    check_books(loop)
