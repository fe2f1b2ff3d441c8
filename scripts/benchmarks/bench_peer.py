"""bench_peer: a whole model in Realm and in llama.cpp, in turns, with the same threads; medians."""

import argparse
import importlib.util
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from . import machine, report
from .engines import Engine, EngineError
from .environment import fail
from .machine import Peaks, median
from .report import Row, note

PAUSE = 0.2  # seconds between two turns: llama.cpp's threads spin for a while after their work
MEMORY_ALLOWANCE = 600e6  # bytes beside the file and the cache
CONTEXTS = (128, 4096)
CONTEXT_LIMIT = 1.5  # times as long for a token at the longer context as at the shorter one
WINDOW = 8  # most steps of one turn with a long context
SECONDS = 8  # for one figure of both engines, and so many more for every 1e9 bytes of the file
SECONDS_A_GIGABYTE = 10

DESCRIPTION = """\
Times a model in Realm, LLM() with its defaults, and in llama.cpp (llama-cpp-python), one after the other in turns.

MODEL is what `realm bench` takes, or a shape and a type, whose file is made of random blocks:

  scripts/bench_peer                              the small default model
  scripts/bench_peer model.gguf                   a file
  scripts/bench_peer 1b:Q4_K 1b:Q4_K_M 1b:Q8_0    2048 wide, 16 layers, feed-forward 8192, 32/8 heads, vocabulary 49152
  scripts/bench_peer --types all --layers 4       every K-quant, legacy, IQ and ternary type at that shape, four layers
"""


@dataclass(frozen=True)
class Plan:
    """What is measured and how often."""

    batches: tuple[int, ...] = (1, 2, 4, 8)
    prefills: tuple[int, ...] = (256,)
    steps: int = 32
    repeats: int = 5
    contexts: tuple[int, ...] = ()
    memory: bool = True


def main(argv: list[str] | None = None) -> int:
    arguments = _arguments(argv)
    if importlib.util.find_spec("llama_cpp") is None:
        fail("llama-cpp-python is not installed; in the environment of this Python: pip install -e '.[oracle]'")
    plan = Plan(contexts=CONTEXTS if arguments.context else ())
    if arguments.quick:
        plan = Plan(batches=(1, 8), steps=16, repeats=2, contexts=plan.contexts)
    sweep = _sweep(arguments.types)
    names = [*arguments.model, *(f"{arguments.shape}:{name}" for name in sweep)] or [None]
    if sweep:
        plan = Plan((1,), plan.prefills, plan.steps, min(plan.repeats, 3), plan.contexts, memory=False)
    rows: list[Row] = []
    facts: dict[str, Any] = {}
    about = machine.describe()
    settings = {"threads": arguments.threads, "layers": arguments.layers} | vars(plan)
    begun = time.perf_counter()
    cache = 4 * machine.last_level_cache() >> 20
    with machine.Meter(arguments.threads, max(256, min(cache, 1024))) as meter:
        meter.measure()
        for name in names:
            label = "" if len(names) == 1 else f"{name or 'default'}: "
            try:
                with model_file(name, arguments.layers, arguments.files) as path:
                    facts[name or "default"] = {"file": path.name}
                    found, more = _compare(path, arguments.threads, plan, meter, label)
                    rows += found
                    facts[name or "default"] |= more
            except EngineError as error:
                rows.append(Row(f"{label}not measured", None, "", problem=str(error)))
            report.write(arguments.json, "bench_peer", rows, about, settings | {"models": facts})
        peaks = meter.measure()
    about |= {"peaks": vars(peaks), "busy": meter.busy}
    report.write(arguments.json, "bench_peer", rows, about, settings | {"models": facts})
    print(f"{about['cpu']}, {arguments.threads} threads, {', '.join(str(f['file']) for f in facts.values())}")
    peak = ", ".join(f"{name} {report.number(value)}" for name, value in vars(peaks).items())
    seconds = time.perf_counter() - begun
    print(f"measured here, 1e9 a second: {peak}; medians of up to {plan.repeats}; {seconds:.0f} s in all")
    report.warn_if_busy(meter.busy)
    print("\n" + report.table(rows))
    return 0 if any(row.figure is not None for row in rows) else 1


def _arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="bench_peer", description=DESCRIPTION, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", nargs="*", help="left out, the small default model")
    parser.add_argument("--types", help="all, or types with commas between: one file each, decode of 1 and prefill")
    parser.add_argument("--shape", default="1b", help="of --types: 1b (default) or tiny")
    parser.add_argument("--layers", type=int, help="of shaped models, in place of the shape's own")
    parser.add_argument("--context", action="store_true", help="also decode at 128 and at 4096 tokens of context")
    parser.add_argument("--quick", action="store_true", help="fewer batches, steps and repeats")
    parser.add_argument(
        "--threads", type=int, default=machine.threads(), help="of both engines (default: all there are)"
    )
    parser.add_argument("--files", type=Path, help="folder that keeps the shaped files; else they are removed")
    parser.add_argument("--json", type=Path, help="also write the report to this file")
    arguments = parser.parse_args(argv)
    if not 1 <= arguments.threads <= machine.threads():
        fail(f"--threads is {arguments.threads}; accepted: 1 to {machine.threads()}")
    if arguments.layers is not None and arguments.layers < 1:
        fail(f"--layers is {arguments.layers}; accepted: 1 or more")
    return arguments


def _sweep(types: str | None) -> list[str]:
    if types is None:
        return []
    from .shapes import ALL_TYPES, MIXTURES

    names = list(ALL_TYPES) if types == "all" else types.split(",")
    unknown = [name for name in names if name not in (*ALL_TYPES, *MIXTURES)]
    if unknown:
        fail(f"--types names {', '.join(unknown)}; accepted: all, {', '.join((*ALL_TYPES, *MIXTURES))}")
    return names


@contextmanager
def model_file(name: str | None, layers: int | None, folder: Path | None) -> Iterator[Path]:
    """The file of a model's name; a shaped one is written, and removed again unless a folder keeps it."""
    from .model_files import write_model
    from .shapes import ALL_TYPES, MIXTURES, SHAPES, with_layers

    shape, _, mixture = (name or "").partition(":")
    if shape not in SHAPES or mixture not in (*ALL_TYPES, *MIXTURES):
        from realm_jax import RealmError
        from realm_jax.registry import resolve

        try:
            path = Path(resolve(name))
        except RealmError as error:
            fail(str(error))
        yield path
        return
    wanted = with_layers(SHAPES[shape], layers)
    with ExitStack() as stack:
        if folder is None:
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="realm-bench-")))
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / f"{shape}-{wanted.layers}-{mixture}.gguf"
        if not path.exists():
            note(f"writing {path}")
            write_model(path, wanted, mixture)
        yield path


def _compare(
    path: Path, threads: int, plan: Plan, meter: machine.Meter, label: str
) -> tuple[list[Row], dict[str, Any]]:
    """The rows of one file, and what the engines said of it."""
    with (
        Engine("Realm", "realm_engine", str(path), threads=threads) as realm,
        Engine("llama.cpp", "llama_engine", str(path), threads=threads) as llama,
    ):
        engines = (realm, llama)
        for engine in engines:
            note(f"{label}loading in {engine.name}")
            engine.loaded()
        work = _Work(realm.facts["weight_bytes"], realm.facts["weight_elements"])
        seconds = SECONDS + SECONDS_A_GIGABYTE * realm.facts["file_bytes"] * 1e-9
        timed: list[tuple[str, int, Samples, int]] = []  # what, tokens of a step, seconds, steps
        for tokens in plan.prefills:
            note(f"{label}prefill {tokens}")
            for engine in engines:
                engine.ask("prefill", tokens=tokens)
            samples = _in_turns(engines, plan.repeats, seconds, "prefill", tokens=tokens)
            timed.append((f"prefill {tokens}", tokens, samples, 1))
        for batch in plan.batches:
            note(f"{label}decode {batch}")
            samples, steps = _timed_steps(engines, plan.steps, plan.repeats, seconds, "decode", "steps", batch=batch)
            timed.append((f"decode {batch}", batch, samples, steps))
            meter.measure(alone=False)
        rows: list[Row] = []
        for what, tokens, samples, steps in timed:
            limit = work.seconds(meter.peaks, tokens)
            rows.append(_rate(label + what, tokens, samples, limit, engines, steps))
            if what == "decode 1":
                rows.append(_bandwidth(rows[-1], work, meter.peaks))
        rows += _contexts(engines, plan, seconds, label, realm.facts["context_length"])
        if plan.memory:
            rows += _memory(engines, label)
        return rows, {engine.name: engine.facts for engine in engines}


@dataclass(frozen=True)
class _Work:
    """What a forward of one token has to read and to multiply."""

    weight_bytes: int
    weight_elements: int

    def seconds(self, peaks: Peaks, tokens: int) -> float | None:
        """Least time of a forward of so many tokens: weights read once, 8-bit products."""
        return peaks.seconds(self.weight_bytes, int8=2.0 * self.weight_elements * tokens)


Samples = tuple[list[float], list[float]]  # seconds: Realm's, llama.cpp's


def _in_turns(engines: tuple[Engine, Engine], repeats: int, seconds: float, what: str, **details: Any) -> Samples:
    """Asks in turns, each of them first as often as the other, until it was often enough or the seconds are over."""
    samples: Samples = ([], [])
    until = time.monotonic() + seconds
    for turn in range(repeats):
        for i in (0, 1) if turn % 2 == 0 else (1, 0):
            samples[i].append(engines[i].ask(what, **details)["seconds"])
            time.sleep(PAUSE)
        if time.monotonic() > until:
            break
    return samples


def _timed_steps(
    engines: tuple[Engine, Engine], most: int, repeats: int, seconds: float, what: str, count: str, **details: Any
) -> tuple[Samples, int]:
    """`_in_turns` of a question about several steps, the argument `count`: as many as there is time for, up to `most`.

    On a busy machine a step of llama.cpp, whose threads wait for each other hundreds of times in it, can take a hundred
    times as long as on an idle one.
    """
    both = 0.0
    for engine in engines:
        engine.ask(what, **details, **{count: 2})  # Realm compiles
        both += engine.ask(what, **details, **{count: 2})["seconds"] / 2
        time.sleep(PAUSE)
    steps = max(2, min(most, int(seconds / repeats / both)))
    return _in_turns(engines, repeats, seconds, what, **details, **{count: steps}), steps


def _rate(
    name: str, tokens: int, samples: Samples, limit: float | None, engines: tuple[Engine, Engine], steps: int = 1
) -> Row:
    """Tokens a second, from seconds of `steps` steps of `tokens` tokens each."""
    mine, theirs = ([tokens * steps / seconds for seconds in part] for part in samples)
    return Row(
        name,
        median(mine),
        "tokens/s",
        limit=None if limit is None else tokens / limit,
        peer=median(theirs),
        peer_name=engines[1].name,
        samples=mine,
        peer_samples=theirs,
    )


def _bandwidth(row: Row, work: _Work, peaks: Peaks) -> Row:
    """What a row of decoding one request says about reading the weights."""
    scale = work.weight_bytes * 1e-9
    assert row.figure is not None
    assert row.peer is not None
    return Row(
        f"{row.name}, weights read",
        row.figure * scale,
        "GB/s",
        limit=peaks.read,
        peer=row.peer * scale,
        peer_name=row.peer_name,
    )


def _contexts(engines: tuple[Engine, Engine], plan: Plan, seconds: float, label: str, most: int) -> list[Row]:
    """Decoding one request, its context filled up to each length, and the longest's time over the shortest's."""
    rows: list[Row] = []
    room = 8 + WINDOW * plan.repeats
    for context in plan.contexts:
        tokens = min(context, most - room)
        note(f"{label}decode at {tokens} tokens of context")
        for engine in engines:
            engine.ask("open_context", tokens=tokens, room=room)
        samples, steps = _timed_steps(engines, WINDOW, plan.repeats, seconds, "steps", "count")
        for engine in engines:
            engine.ask("close_context")
        rows.append(_rate(f"{label}decode 1 at {tokens} of context", 1, samples, None, engines, steps))
    if len(rows) > 1:
        first, last = rows[0], rows[-1]
        slower = [a / b for a, b in ((first.figure, last.figure), (first.peer, last.peer)) if a and b]
        name = f"{label}time of a token, longest context over shortest"
        rows.append(
            Row(
                name,
                slower[0],
                "times",
                limit=CONTEXT_LIMIT,
                peer=slower[1],
                peer_name=engines[1].name,
                higher=False,
                ok=slower[0] <= CONTEXT_LIMIT,
            )
        )
    return rows


def _memory(engines: tuple[Engine, Engine], label: str) -> list[Row]:
    """Peak of each process over everything it was asked, and the seconds of loading."""
    mine, theirs = (engine.ask("memory") for engine in engines)
    limit = engines[0].facts["file_bytes"] + mine["cache_bytes"] + MEMORY_ALLOWANCE
    return [
        Row(
            f"{label}peak memory",
            mine["peak_bytes"] * 1e-6,
            "MB",
            limit=limit * 1e-6,
            peer=theirs["peak_bytes"] * 1e-6,
            peer_name=engines[1].name,
            higher=False,
            rate=f"the limit is the file, {mine['cache_bytes'] * 1e-6:.0f} MB of cache and 600 MB",
            ok=mine["peak_bytes"] <= limit,
        ),
        Row(
            f"{label}loading",
            engines[0].facts["load_seconds"],
            "s",
            peer=engines[1].facts["load_seconds"],
            peer_name=engines[1].name,
            higher=False,
        ),
    ]
