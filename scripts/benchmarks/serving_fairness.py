"""Tenants that flood the engine and one that does not: in the simulator, and in the engine itself."""

import threading
import time
from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import Any

from realm_jax import Request, Tenant
from realm_jax.engine.simulator import Arrival, simulate

from .machine import median
from .report import Row, note
from .serving import Plan, Serving, at_least, at_most, ignoring_eos, timed

SMALLER = 10.0  # times, the worst gap than in order of arrival, at least
WAIT = 1  # steps that may begin before a light tenant's own, at most
SLOTS = 8
FLOOD, FLOOD_PROMPT, FLOOD_OUTPUT = 48, 200, 120
LIGHT_PROMPT, LIGHT_OUTPUT = 100, 8


def run(plan: Plan) -> Iterator[Row]:
    """The simulator's rows, then those of the small model."""
    yield from simulated()
    name, path = plan.small
    tenants = [Tenant("flood"), Tenant("light")]
    with Serving(path, max_batch=SLOTS, tenants=tenants) as serving:
        yield from _measured(plan, f"fairness, {name}: ", serving)


def simulated() -> Iterator[Row]:
    """Two floods, and a light tenant under one, in made-up time on the 1B shape."""
    label = "fairness, simulated: "
    tenants = [Tenant("a"), Tenant("b")]
    trace = [Arrival(0.0, "a", 300, 40)] * 400 + [Arrival(0.0, "b", 100, 60)] * 400
    fair, other = (simulate(trace, tenants, slots=SLOTS, fair=fair, until=300.0) for fair in (True, False))
    yield at_most(f"{label}worst gap of two floods", fair.worst_gap, fair.gap_bound, "virtual tokens")
    yield at_least(f"{label}worst gap in order of arrival over that", other.worst_gap / fair.worst_gap, SMALLER)
    lights = [Arrival(3.0 + 8.17 * i, "b", LIGHT_PROMPT, LIGHT_OUTPUT) for i in range(25)]  # one at a time
    trace = [*lights, *[Arrival(0.0, "a", FLOOD_PROMPT, FLOOD_OUTPUT)] * 200]
    fair, other = (simulate(trace, tenants, slots=SLOTS, fair=fair) for fair in (True, False))
    quick, slow = fair.requests[: len(lights)], other.requests[: len(lights)]
    yield at_most(f"{label}steps before a light tenant's own", max(one.waited or 0 for one in quick), WAIT, "steps")
    yield timed(
        f"{label}first token of a light tenant",
        [1e3 * (one.time_to_first_token or 0.0) for one in quick],
        "ms",
        peer=1e3 * median([one.time_to_first_token or 0.0 for one in slow]),
        peer_name="in order of arrival",
        higher=False,
    )


class StepLog:
    """Notes, for every step that an engine dispatches, when and for which tenants' requests it computes what."""

    def __init__(self, serving: Serving):
        self.steps: list[tuple[float, list[tuple[str, bool]]]] = []  # when; tenant and whether a token is drawn
        self._loop: Any = serving.core.loop
        self._launch = self._loop._launch
        self._lock = threading.Lock()

    def __enter__(self) -> "StepLog":
        self._loop._launch = self._noting
        return self

    def __exit__(self, *_: object) -> None:
        self._loop._launch = self._launch

    def _noting(self, rows: Sequence[Any]) -> Any:
        with self._lock:
            self.steps.append((time.perf_counter(), [(row.sequence.tenant, row.samples) for row in rows]))
        return self._launch(rows)

    def first_of(self, tenant: str, since: float) -> tuple[int, int]:
        """Steps dispatched since a time and before the first with a tenant's rows; and from that one to the first that
        drew a token for it, both counted."""
        after = [rows for at, rows in self.steps if at >= since]
        first = next(i for i, rows in enumerate(after) if any(name == tenant for name, _ in rows))
        drew = next(i for i, rows in enumerate(after) if (tenant, True) in rows)
        return first, drew - first + 1


def _measured(plan: Plan, label: str, serving: Serving) -> Iterator[Row]:
    waits: list[int] = []
    own: list[int] = []
    seconds: list[float] = []
    steps: list[float] = []
    turns = 2 if plan.quick else 4 * plan.repeats
    flood = [
        Request(serving.random_tokens(FLOOD_PROMPT), ignoring_eos(FLOOD_OUTPUT), "flood", cache=False)
        for _ in range(FLOOD)
    ]
    for turn in range(turns):
        note(f"{label}turn {turn + 1} of {turns}")
        light = Request(serving.random_tokens(LIGHT_PROMPT), ignoring_eos(LIGHT_OUTPUT), "light", cache=False)
        with StepLog(serving) as log:
            _, answer = serving.later(flood, 40 + 17 * turn, light)
        waited, mine = log.first_of("light", answer.sent)
        waits.append(waited)
        own.append(mine)
        seconds.append(answer.first_token)
        times = [at for at, _ in log.steps if at < answer.sent]
        steps.append(median([b - a for a, b in pairwise(times[-30:])]))
    said = f"{max(own)} of its own; a step under the flood takes {1e3 * median(steps):.1f} ms"
    yield at_most(f"{label}steps dispatched before a light tenant's own", max(waits), WAIT, "steps", rate=said)
    yield timed(f"{label}first token of a light tenant", [1e3 * s for s in seconds], "ms", higher=False)
