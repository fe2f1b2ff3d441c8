"""Four adapters side by side in one batch: what they cost, and that those which nobody uses cost nothing."""

import sys
import time
from collections.abc import Iterator
from pathlib import Path

from realm_jax import Request
from realm_jax.lora import weight_shapes
from realm_jax.lora.gguf_format import write_gguf

from .environment import ROOT
from .machine import median
from .report import Row, note
from .serving import Plan, Serving, at_least, differing, ignoring_eos, rate, timed

sys.path.append(str(ROOT / "tests"))

from random_adapters import random_adapter  # of tests/, put on the path above

BATCH, ADAPTERS, RANK, ALPHA = 8, 4, 16, 16.0
PROMPT, STEPS = 16, 128  # tokens of each request, and of its output
UNUSED = 0.97  # of the throughput without adapters, at least: nothing, but for the machine's noise
SMALL_BAR, BAR = 0.7, 0.8  # with adapters, of the throughput without: of the small model, where they weigh more


def run(plan: Plan) -> Iterator[Row]:
    """Rows for every model."""
    for name, path in plan.models:
        bar = SMALL_BAR if path == plan.small[1] else BAR
        with Serving(path, max_batch=BATCH) as serving:
            files = _files(serving, plan.folder, path.stem)
            yield from _measure(plan, f"adapters, {name}: ", serving, files, bar)


def _files(serving: Serving, folder: Path, model: str) -> list[Path]:
    """Random adapters of every linear layer, written once."""
    shapes = weight_shapes(serving.core.runner.model)
    paths = [folder / f"{model}-rank{RANK}-{i}.lora.gguf" for i in range(ADAPTERS)]
    for i, path in enumerate(paths):
        if not path.exists():
            note(f"writing {path}")
            adapter = random_adapter(
                shapes, RANK, alpha=ALPHA, seed=i, architecture=serving.core.config.architecture, takes=_in_a_layer
            )
            partial = path.with_name(path.name + ".part")
            write_gguf(adapter, partial, ALPHA)
            partial.replace(path)
    return paths


def _in_a_layer(place: tuple[str, int | None]) -> bool:
    return place[1] is not None


def _measure(plan: Plan, label: str, serving: Serving, files: list[Path], bar: float) -> Iterator[Row]:
    steps = STEPS // 4 if plan.quick else STEPS
    prompts = [serving.random_tokens(PROMPT, i) for i in range(BATCH)]
    names = [f"adapter {i}" for i in range(ADAPTERS)]
    plain = [Request(prompt, ignoring_eos(steps), cache=False) for prompt in prompts]
    adapted = [
        Request(prompt, ignoring_eos(steps), cache=False, adapter=names[i % ADAPTERS])
        for i, prompt in enumerate(prompts)
    ]
    rates: dict[str, list[float]] = {"none": [], "unused": [], "used": []}
    loads: list[float] = []
    other = 0
    for turn in range(-1, plan.repeats):  # the first turn compiles
        note(f"{label}turn {turn + 1} of {plan.repeats}")
        without, _ = serving.together(plain)
        begun = time.perf_counter()
        for name, file in zip(names, files, strict=True):
            serving.engine.load_adapter(name, file)
        seconds = (time.perf_counter() - begun) / len(files)
        unused, _ = serving.together(plain)
        used, _ = serving.together(adapted)
        for name in names:
            serving.engine.unload_adapter(name)
        if turn >= 0:
            loads.append(seconds)
            for samples, answers in zip(rates.values(), (without, unused, used)):
                samples.append(rate(answers))
        if differing(without, unused):
            raise RuntimeError("loaded adapters changed the answers of requests that do not use them")
        other = differing(without, used)
    none, idle, busy = (median(samples) for samples in rates.values())
    yield timed(
        f"{label}decode {BATCH} with {ADAPTERS} adapters of rank {RANK}",
        rates["used"],
        "tokens/s",
        peer=none,
        peer_name="without",
        peer_samples=rates["none"],
        rate=f"{other} of {BATCH} answer differently",
        problem="" if other else "the adapters change nothing",
    )
    yield at_least(f"{label}throughput with adapters over without", busy / none, bar)
    yield at_least(f"{label}throughput with adapters loaded and unused over without", idle / none, UNUSED)
    mebibytes = files[0].stat().st_size / (1 << 20)
    yield timed(f"{label}load_adapter", [1e3 * s for s in loads], "ms", higher=False, rate=f"{mebibytes:.1f} MiB")
