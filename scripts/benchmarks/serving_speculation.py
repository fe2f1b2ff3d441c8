"""Speculation: n-gram lookup and draft models against none, and against what acceptance and costs say they bring."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from realm_jax import Request, SamplingParams

from .machine import median
from .model_edits import Layer, deepened, layer_count, without, write_layers
from .report import Row, note
from .serving import Answer, Plan, Serving, at_least, differing, fix_drafts, none_of, rate, timed

NGRAM_BAR, CEILING_BAR = 1.8, 2.0  # times the tokens a second without speculation, at least
FORMULA = 0.15  # most that the measured speedup is off
UNSUITED = 0.95  # of the tokens a second without, at least, where drafts do not fit
UNSUITED_TURNS = 4  # for each of the others: 5 % are to be seen
DEPTH = 360  # layers of the ceiling's target
DROPPED = range(12, 16)  # layers, of SmolLM2's 30, that the draft lacks
CEILING_DRAFTS, PAIR_DRAFTS = 7, 3
ACCEPTANCE = (0.2, 0.9)

# What n-gram lookup is for: a text to be edited, and one to be copied.
_CODE = """\
def read_settings(path):
    values = {}
    with open(path, encoding="utf-8") as file:
        for number, line in enumerate(file, start=1):
            line = line.strip()
            if not line or line.startswith("#"):
                continue
            if "=" not in line:
                raise ValueError(f"{path}, line {number}: there is no equals sign in {line!r}")
            key, value = line.split("=", 1)
            values[key.strip()] = value.strip()
    return values
"""
_TEXT = (
    "The lighthouse keeper wrote in his book every evening. On Monday he saw two ships and a storm. On Tuesday the sea "
    "was calm, and he painted the door. On Wednesday a boat brought flour, oil and three letters from his sister in "
    "Bergen. On Thursday the lamp went out twice, and he lit it again with a candle. On Friday it rained from morning "
    "to night. On Saturday he mended the roof and slept badly. On Sunday nobody came.\n"
)
TASKS = {
    "editing": f"# Before: the variable is called values\n{_CODE}\n# After: the variable is called settings\n",
    "copying": f"Text:\n{_TEXT}\nThe same text, word for word:\n",
}
# Free text, for drafts that are often right and often wrong.
PROSE = "The history of the steam engine begins in the first century, when"


def run(plan: Plan) -> Iterator[Row]:
    """Rows of the small model."""
    name, path = plan.small
    label = f"speculation, {name}: "
    yield from _lookup(plan, label, path)
    count = layer_count(path)
    pair = _written(plan.folder, path, "without", without(count, DROPPED))
    yield from _pair(plan, f"{label}draft without {len(DROPPED)} layers, ", path, pair, PAIR_DRAFTS, None)
    depth = DEPTH // 2 if plan.quick else DEPTH
    target = _written(plan.folder, path, "deep", deepened(count, depth))
    what = f"{label}MECHANISM'S CEILING, target with {depth - count} layers that add nothing, "
    yield from _pair(plan, what, target, path, CEILING_DRAFTS, CEILING_BAR)


def _written(folder: Path, source: Path, what: str, layers: Sequence[Layer]) -> Path:
    path = folder / f"{source.stem}-{what}-{len(layers)}.gguf"
    if not path.exists():
        note(f"writing {path}")
        write_layers(source, path, layers)
    return path


@dataclass
class _Runs:
    """Of one request with and without drafts, in turns.

    plain, drafted: tokens a second. costs: seconds of a verifying step and of a draft, as the engine measured them in
    each turn; None without a draft model. without, with_drafts: the last answers.
    """

    plain: list[float]
    drafted: list[float]
    costs: list[tuple[float | None, float | None]]
    without: Answer
    with_drafts: Answer

    @property
    def speedup(self) -> float:
        return median(self.drafted) / median(self.plain)


def _in_turns(plan: Plan, serving: Serving, prompt: str, params: SamplingParams, speculate: bool | int) -> _Runs:
    """The first turn, which compiles and measures costs, does not count."""
    requests = [Request(prompt, params, cache=False, speculate=wanted) for wanted in (False, speculate)]
    rates: tuple[list[float], list[float]] = ([], [])
    costs: list[tuple[float | None, float | None]] = []
    speculator: Any = serving.core.speculator
    answers: list[Answer] = []
    for turn in range(-1, plan.repeats):
        order = (0, 1) if turn % 2 == 0 else (1, 0)
        found = {}
        for i in order:
            found[i] = serving.together([requests[i]])[0][0]
            if i == 1 and turn >= 0:
                draft = None if speculator._draft is None else speculator._draft.seconds
                costs.append((speculator.costs.seconds(1 + int(speculate)), draft))
        answers = [found[0], found[1]]
        if turn >= 0:
            for samples, answer in zip(rates, answers):
                samples.append(rate([answer]))
    return _Runs(*rates, costs, *answers)


def _params(plan: Plan, **options: Any) -> SamplingParams:
    return SamplingParams(max_tokens=64 if plan.quick else 192, ignore_eos=True, **options)


def _said(answer: Answer) -> str:
    """What a request's speculation came to."""
    s = answer.last.speculation
    if not s.drafted:
        return "no drafts"
    return f"{s.accepted} of {s.drafted} drafts in {s.rounds} rounds, acceptance {s.acceptance:.2f}"


def _faster(name: str, runs: _Runs, bar: float | None) -> Iterator[Row]:
    yield timed(
        f"{name}decode 1",
        runs.drafted,
        "tokens/s",
        peer=median(runs.plain),
        peer_name="without drafts",
        peer_samples=runs.plain,
        rate=_said(runs.with_drafts),
    )
    if bar is not None:
        yield at_least(f"{name}speedup", runs.speedup, bar)


def _lookup(plan: Plan, label: str, path: Path) -> Iterator[Row]:
    with Serving(path, max_batch=8, draft="ngram") as serving:
        note(f"{label}n-gram lookup")
        found = []
        for task, prompt in TASKS.items():
            found.append(_in_turns(plan, serving, prompt, _params(plan), True))
            yield from _faster(f"{label}n-grams, {task}, ", found[-1], NGRAM_BAR)
        seeded = _params(plan, temperature=0.8, seed=11)
        found.append(_in_turns(_turns(plan, 1), serving, TASKS["copying"], seeded, True))
        free = _in_turns(_turns(plan, UNSUITED_TURNS), serving, PROSE, _params(plan, temperature=1.0, seed=5), True)
        yield _unsuited(f"{label}n-grams, free text, ", free)
        yield _same(f"{label}n-grams, ", [*found, free])


def _pair(plan: Plan, label: str, target: Path, draft: Path, drafts: int, bar: float | None) -> Iterator[Row]:
    with Serving(target, max_batch=8, draft=draft) as serving:
        note(label)
        undo = fix_drafts(serving.core.speculator)
        fixed = _in_turns(plan, serving, PROSE, _params(plan), drafts)
        yield from _faster(f"{label}{drafts} drafts a round, ", fixed, bar)
        yield from _formula(f"{label}{drafts} drafts a round, ", fixed, drafts, bar is None)
        seeded = _in_turns(_turns(plan, 1), serving, PROSE, _params(plan, temperature=0.8, seed=11), drafts)
        undo()
        turns = UNSUITED_TURNS if bar is None else 1
        adaptive = _in_turns(_turns(plan, turns), serving, PROSE, _params(plan, temperature=1.0, seed=5), True)
        if bar is None:
            yield _unsuited(f"{label}adapting, ", adaptive)
        else:
            yield from _faster(f"{label}adapting, ", adaptive, None)
        yield _same(label, [fixed, seeded, adaptive])


def _turns(plan: Plan, times: int) -> Plan:
    """As the plan, with so many turns for each of its own; a single one if that is 1."""
    return replace(plan, repeats=1 if times == 1 else times * plan.repeats)


def expected_speedup(acceptance: float, drafts: int, draft_cost: float, verify_cost: float) -> float:
    """(1 - a^(k+1)) / ((1 - a) (k c + v)): of k drafts a round, c and v in plain steps of the target.

    Leviathan et al., 2023 (arXiv:2211.17192), where v is 1.
    """
    tokens = sum(acceptance**i for i in range(drafts + 1))
    return tokens / (drafts * draft_cost + verify_cost)


def _formula(label: str, runs: _Runs, drafts: int, both_ways: bool) -> Iterator[Row]:
    """The measured speedup over the formula's, and the acceptance where the pair is to show that it varies.

    Of each turn, as the costs of another minute are others.
    """
    acceptance = runs.with_drafts.last.speculation.acceptance
    ratios: list[float] = []
    said = ""
    for plain, drafted, (verify, draft) in zip(runs.plain, runs.drafted, runs.costs, strict=True):
        if verify is None or draft is None:
            raise RuntimeError("the engine has not measured what drafts cost")
        expected = expected_speedup(acceptance, drafts, draft * plain, verify * plain)
        ratios.append(drafted / plain / expected)
        said = f"last: {drafted / plain:.2f} over {expected:.2f}, c {draft * plain:.2f}, v {verify * plain:.2f}"
    off = median(ratios)
    yield Row(
        f"{label}speedup over the formula's",
        off,
        "times",
        limit=1.0,
        rate=f"{said}, a {acceptance:.3f}; within {FORMULA:.0%} accepted",
        ok=abs(off - 1) <= FORMULA,
        samples=ratios,
    )
    if both_ways:
        low, high = ACCEPTANCE
        said = f"{low:.0%} to {high:.0%} accepted"
        yield Row(f"{label}acceptance", acceptance, "", rate=said, ok=low <= acceptance <= high)


def _unsuited(label: str, runs: _Runs) -> Row:
    return at_least(f"{label}tokens/s over those without", runs.speedup, UNSUITED, rate=_said(runs.with_drafts))


def _same(label: str, runs: list[_Runs]) -> Row:
    wrong = sum(differing([one.without], [one.with_drafts]) for one in runs)
    return none_of(f"{label}greedy and seeded answers that drafts changed", wrong, len(runs))
