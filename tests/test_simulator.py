"""Traces through the scheduler: what it does to tenants, in made-up time."""

import subprocess
import sys

import pytest

from realm_jax.engine.simulator import Arrival, StepModel, simulate
from realm_jax.engine.tenants import Tenant
from realm_jax.errors import CapacityError, InvalidRequestError

AB = [Tenant("a"), Tenant("b")]


def flood(tenant, count, at=0.0, prompt=100, output=60, **options):
    return [Arrival(at, tenant, prompt, output, **options) for _ in range(count)]


def test_the_time_of_one_request_is_that_of_its_steps():
    costs = StepModel(decode_1=1.0, decode_8=8.0, prefill=16.0)
    found = simulate([Arrival(2.0, prompt=130, output=3)], costs=costs)
    [one] = found.requests
    # 130 tokens padded to 144; a step for each token after the first.
    assert (one.started, one.first_token, one.ended) == (2.0, 2.0 + 9.0, 13.0)
    assert (one.queue, one.time_to_first_token, one.waited, one.prefilled) == (0.0, 9.0, 0, 1)
    assert (found.seconds, found.busy, found.steps, found.most_pages, found.worst_gap) == (13.0, 11.0, 3, 3, 0.0)
    tenant = found.tenants["default"]
    assert (tenant.prompt_tokens, tenant.generated_tokens, tenant.service) == (130, 3, 136.0)
    assert (tenant.first_token_p50, tenant.first_token_p95, tenant.tokens_per_second) == (9.0, 9.0, 3 / 11)


def test_steps_cost_what_rows_and_prompts_cost():
    costs = StepModel(decode_1=1.0, decode_8=8.0, prefill=10.0, overhead=0.5)
    assert [costs.seconds(n, 0) for n in (0, 1, 3, 8)] == [0.5, 1.5, 3.5, 8.5]
    assert costs.seconds(2, 100) == 12.5
    found = simulate([Arrival(prompt=1, output=20) for _ in range(8)], costs=costs)
    assert found.seconds == pytest.approx(20 * 8.5)


def test_everything_ends_and_is_counted():
    trace = [Arrival(0.4 * i, "ab"[i % 2], 10 + 37 * (i % 7), 5 + 11 * (i % 5)) for i in range(60)]
    found = simulate(trace, AB, slots=4, pages=24)
    assert all(one.ended >= one.first_token >= one.started >= one.arrival.at for one in found.requests)
    for name, tenant in found.tenants.items():
        mine = [arrival for arrival in trace if arrival.tenant == name]
        assert (tenant.requests, tenant.ended, tenant.refused) == (30, 30, 0)
        assert tenant.prompt_tokens == sum(arrival.prompt for arrival in mine)
        assert tenant.generated_tokens == sum(arrival.output for arrival in mine)
        assert tenant.first_token_p50 <= tenant.first_token_p95
    assert 0 < found.most_pages <= found.pages == 24
    assert found.busy <= found.seconds


def test_the_same_trace_gives_the_same_result():
    trace = flood("a", 20) + flood("b", 20, at=1.0, prefix="manual", prefix_tokens=90)
    assert simulate(trace, AB, pages=40) == simulate(trace, AB, pages=40)
    assert simulate(trace, AB, pages=40) != simulate(trace, AB, pages=40, fair=False)


def two_floods(fair):
    trace = flood("a", 200, prompt=300, output=40) + flood("b", 200, at=0.01)
    return simulate(trace, AB, pages=200, fair=fair, until=200.0)


def test_two_floods_share_within_the_bound_and_far_better_than_in_order_of_arrival():
    fair, unfair = two_floods(True), two_floods(False)
    assert 0 < fair.worst_gap <= fair.gap_bound
    assert unfair.worst_gap >= 10 * fair.worst_gap
    a, b = (fair.tenants[name].service for name in "ab")
    assert a == pytest.approx(b, rel=0.1)
    assert unfair.tenants["b"].service == 0


def test_weights_are_shares():
    tenants = [Tenant("a", weight=3.0), Tenant("b")]
    found = simulate(flood("a", 300) + flood("b", 300), tenants, until=100.0)
    assert found.tenants["a"].service / found.tenants["b"].service == pytest.approx(3.0, rel=0.1)


@pytest.mark.parametrize("prompt", [5, 128, 1000])
@pytest.mark.parametrize("at", [3.0, 3.02, 3.1, 4.567])
def test_a_light_tenant_waits_for_a_step_and_its_own_prefill(prompt, at):
    """At every moment of a step: the one that the host has dispatched ahead is all that it waits for."""
    trace = [*flood("a", 60), Arrival(at, "b", prompt, 10)]
    found = simulate(trace, AB)
    light = found.requests[-1]
    assert light.waited <= 1
    assert light.prefilled <= -(-prompt // 128)  # a quarter of each step at least
    assert found.preemptions >= 1
    slow = simulate(trace, AB, fair=False).requests[-1]
    assert slow.waited > 10 * (light.waited + light.prefilled)
    assert slow.time_to_first_token > 5 * light.time_to_first_token


def test_a_shared_prefix_is_computed_once_for_each_tenant():
    def arrival(at, tenant, **options):
        return Arrival(at, tenant, 1532, 4, prefix="manual", prefix_tokens=1500, **options)

    trace = [arrival(0.0, "a"), arrival(20.0, "a"), arrival(40.0, "b"), arrival(60.0, "a", cache=False)]
    found = simulate(trace, AB)
    assert [one.reused for one in found.requests] == [0, 1472, 0, 0]
    first, second, other, none = (one.time_to_first_token for one in found.requests)
    assert first == pytest.approx(other)
    assert first == pytest.approx(none)
    assert first >= 5 * second
    assert found.tenants["a"].reused_tokens == 1472
    assert found.tenants["a"].prompt_tokens == 1532 + 60 + 1532


def test_token_ids_are_a_prompt_too():
    tokens = list(range(100))
    trace = [Arrival(0.0, prompt=tokens, output=1), Arrival(9.0, prompt=tokens, output=1)]
    assert [one.reused for one in simulate(trace).requests] == [0, 64]


def test_priorities_and_scarce_pages():
    trace = [*flood("a", 6, prompt=60, output=200), Arrival(0.0, "a", 10, 10, priority=1)]
    found = simulate(trace, AB, pages=8)
    assert found.requests[-1].started == 0.0
    assert found.preemptions > 0
    assert found.most_pages == 8
    assert all(one.ended is not None for one in found.requests)


def test_quotas_count_in_the_time_of_the_trace():
    tenants = [Tenant("a", requests_per_minute=2), Tenant("b", concurrent=1)]
    trace = [Arrival(at, "a", 8, 1) for at in (0, 1, 2, 40, 41)] + [Arrival(at, "b", 8, 1) for at in (0, 0, 50)]
    found = simulate(trace, tenants)
    assert [bool(one.refused) for one in found.requests] == [False, False, True, False, True, False, True, False]
    assert found.requests[2].refused == "tenant 'a' is over 2 requests a minute; accepted again in 28 s"
    assert found.requests[2].ended is None
    assert found.tenants["a"].refused == 2


@pytest.mark.parametrize(
    ("arrival", "error", "message"),
    [
        (Arrival(tenant="c"), InvalidRequestError, "unknown tenant 'c'"),
        (Arrival(-1.0, "a"), InvalidRequestError, "arrival 0: at is -1.0; accepted: 0 to inf"),
        (Arrival(0.0, "a", prompt=0), InvalidRequestError, "prompt is 0; accepted: 1 to inf"),
        (Arrival(0.0, "a", output=0), InvalidRequestError, "output is 0"),
        (Arrival(0.0, "a", 9, prefix="p", prefix_tokens=10), InvalidRequestError, "prefix_tokens is 10"),
        (Arrival(0.0, "a", prompt=64 * 512), CapacityError, "need 514 pages"),
    ],
    ids=str,
)
def test_arrivals_that_cannot_be(arrival, error, message):
    with pytest.raises(error, match=message):
        simulate([arrival], AB)


def test_it_needs_no_jax_and_checks_its_numbers():
    code = "import sys, realm_jax.engine.simulator; raise SystemExit('jax' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
    with pytest.raises(InvalidRequestError, match="slots is 0; accepted: an integer >= 1"):
        simulate([], slots=0)
