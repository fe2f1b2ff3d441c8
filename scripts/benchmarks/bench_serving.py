"""bench_serving: Realm's engine serving several requests, tenants and adapters; each section by name."""

import argparse
import os
import sys
import tempfile
import time
from contextlib import ExitStack
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING

from . import machine, report
from .bench_peer import model_file
from .engines import pin
from .environment import fail
from .report import Row, note

if TYPE_CHECKING:
    from .serving import Plan

SECTIONS = ("batch", "adapters", "prefix", "speculation", "fairness")

DESCRIPTION = """\
Times the engine, Engine() with its defaults and everything compiled beforehand, in turns with what it stands beside.

SECTION is one or several of these; left out, all:

  batch         64 requests of mixed length over 8 slots: against one by one, and llama.cpp's server and library
  adapters      four adapters of rank 16 in a batch of 8, against none
  prefix        the first token of a request that shares 1,500 tokens with the one before it
  speculation   n-gram lookup and draft models, against none and against the formula
  fairness      two floods, and a light tenant under one: in the simulator and in the engine

The first three take both models, the others the small one. Bars are in the column "limit"; MISSED where one is.
"""


def main(argv: list[str] | None = None) -> int:
    arguments = _arguments(argv)
    pin(arguments.threads)  # before JAX makes its threads
    from .serving import Plan

    rows: list[Row] = []
    about = machine.describe()
    begun = time.perf_counter()
    with ExitStack() as stack:
        folder = arguments.files
        if folder is None:
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="realm-bench-")))
        models = [("small", stack.enter_context(model_file(arguments.small, None, folder)))]
        if arguments.large != "none":
            models.append(("large", stack.enter_context(model_file(arguments.large, None, folder))))
        plan = Plan(
            models=tuple(models),
            folder=folder,
            repeats=arguments.repeats,
            quick=arguments.quick,
            threads=arguments.threads,
            peer_python=None if arguments.no_peers else arguments.peer_python,
        )
        meter = stack.enter_context(machine.Meter(arguments.threads, 256))
        settings = {
            "sections": arguments.section,
            "models": {name: path.name for name, path in plan.models},
            "repeats": plan.repeats,
            "quick": plan.quick,
            "threads": plan.threads,
        }
        for section in arguments.section:
            meter.measure()
            rows += _section(section, plan)
            report.write(arguments.json, "bench_serving", rows, about | {"busy": meter.busy}, settings)
        about |= {"peaks": vars(meter.measure()), "busy": meter.busy}
        report.write(arguments.json, "bench_serving", rows, about, settings)
    seconds = time.perf_counter() - begun
    print(", ".join(f"{name}: {path.name}" for name, path in plan.models))
    print(f"{about['cpu']}, {arguments.threads} threads; medians of {plan.repeats}; {seconds:.0f} s in all")
    report.warn_if_busy(meter.busy)
    print("\n" + report.table(rows))
    return 1 if any(row.figure is None and not row.ok for row in rows) else 0


def _section(name: str, plan: "Plan") -> list[Row]:
    """Its rows; where it fails, those it had and one that says why."""
    rows: list[Row] = []
    try:
        run = import_module(f".serving_{name}", __package__).run
        for row in run(plan):
            rows.append(row)
            note(report.table([row]).splitlines()[-1])
    except Exception as error:
        if os.environ.get("REALM_DEBUG"):
            raise
        text = str(error).strip().partition("\n")[0]
        rows.append(Row(f"{name} ended early", None, "", problem=f"{type(error).__name__}: {text}"[:300], ok=False))
    return rows


def _arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="bench_serving", description=DESCRIPTION, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("section", nargs="*", help=", ".join(SECTIONS))
    parser.add_argument("--small", help="model as `realm bench` takes it (default: the small default model)")
    parser.add_argument("--large", help="another, or a shape and a type (default: 1b:Q4_K; with --quick, none)")
    parser.add_argument("--quick", action="store_true", help="fewer and shorter requests, one turn, no large model")
    parser.add_argument("--repeats", type=int, help="turns of every timing (default: 3; with --quick, 1)")
    parser.add_argument(
        "--threads", type=int, default=machine.threads(), help="of all engines (default: all there are)"
    )
    parser.add_argument("--peer-python", default=sys.executable, help="a Python that has xllamacpp (default: this one)")
    parser.add_argument(
        "--no-peers", action="store_true", help="without llama.cpp, which a busy machine slows down most"
    )
    parser.add_argument("--files", type=Path, help="folder that keeps the files that are made; else they are removed")
    parser.add_argument("--json", type=Path, help="also write the report to this file")
    arguments = parser.parse_args(argv)
    unknown = [name for name in arguments.section if name not in SECTIONS]
    if unknown:
        fail(f"there is no section {', '.join(unknown)}; accepted: {', '.join(SECTIONS)}")
    arguments.section = arguments.section or list(SECTIONS)
    if arguments.repeats is None:
        arguments.repeats = 1 if arguments.quick else 3
    if arguments.repeats < 1:
        fail(f"--repeats is {arguments.repeats}; accepted: 1 or more")
    if arguments.large is None:
        arguments.large = "none" if arguments.quick else "1b:Q4_K"
    if not 1 <= arguments.threads <= machine.threads():
        fail(f"--threads is {arguments.threads}; accepted: 1 to {machine.threads()}")
    if arguments.files is not None:
        arguments.files.mkdir(parents=True, exist_ok=True)
    return arguments
