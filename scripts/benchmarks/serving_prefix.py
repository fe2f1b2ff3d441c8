"""A long prefix that two requests share: how much sooner the second one's first token comes."""

from collections.abc import Iterator

from realm_jax import Request

from .machine import median
from .report import Row, note
from .serving import Plan, Serving, at_least, ignoring_eos, timed

SHARED, OWN = 1500, 32  # tokens of a prompt
SOONER = 5.0  # times, at least


def run(plan: Plan) -> Iterator[Row]:
    """Rows for every model."""
    for name, path in plan.models:
        label = f"prefix, {name}: "
        with Serving(path, max_batch=2) as serving:
            yield from _measure(plan, label, serving)


def _measure(plan: Plan, label: str, serving: Serving) -> Iterator[Row]:
    first: list[float] = []
    second: list[float] = []
    reused = 0
    for turn in range(plan.repeats):
        note(f"{label}turn {turn + 1} of {plan.repeats}")
        prefix = serving.random_tokens(SHARED)
        for samples in (first, second):
            [answer], _ = serving.together([Request(prefix + serving.random_tokens(OWN), ignoring_eos(1))])
            samples.append(answer.first_token)
        reused = answer.last.usage.cached_tokens
    yield timed(
        f"{label}first token after {SHARED} shared tokens",
        [1e3 * seconds for seconds in second],
        "ms",
        peer=1e3 * median(first),
        peer_name="the first to send them",
        peer_samples=[1e3 * seconds for seconds in first],
        higher=False,
        rate=f"{reused} of {SHARED + OWN} tokens reused",
    )
    yield at_least(f"{label}sooner than the first", median(first) / median(second), SOONER)
