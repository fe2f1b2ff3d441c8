"""gpu_check: what a GPU machine can tell about Realm, in one command of less than eight minutes.

Standard library only: it finds, or makes, the Python that the steps then run under.
"""

import argparse
import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from . import report
from .environment import NEEDED, ROOT, child_environment, fail
from .report import Row, note

TOTAL = 460  # seconds
INSTALLING = 150  # of which an installation may take
LEAST = 15  # seconds left under which no step is started
DESCRIPTION = """\
Checks and times Realm's Pallas kernels and an 8B-shaped model on the GPU of this machine, beside cuBLAS, cuDNN and
transformers. Every step has a time limit of its own; what fails is recorded and the next step runs.
"""
_PROBE = """
import importlib.util, json, sys
missing = [name for name in sys.argv[1].split(",") if importlib.util.find_spec(name) is None]
platform = ""
if "jax" not in missing:
    import jax
    platform = jax.default_backend()
print(json.dumps({"missing": missing, "platform": platform}))
"""


def main(argv: list[str] | None = None) -> int:
    from .gpu_steps import STEPS

    arguments = _arguments(argv, list(STEPS))
    begun = time.monotonic()
    deadline = begun + arguments.seconds
    rows: list[Row] = []
    about: dict[str, Any] = {}
    peaks = "{}"
    with tempfile.TemporaryDirectory(prefix="realm-gpu-check-") as scratch:
        environment = child_environment(**_wheels(arguments.wheels, Path(scratch)))
        if arguments.dry_run:
            environment["JAX_PLATFORMS"] = "cpu"
        python, said = _python(environment, arguments.dry_run, deadline)
        about["python"] = python
        for problem in said:
            rows.append(Row("environment", None, "", problem=problem))
        for name in arguments.steps:
            limit = min(STEPS[name][1], deadline - time.monotonic())
            if limit < LEAST:
                rows.append(Row(name, None, "", problem="no time was left", ok=False))
                continue
            note(f"{name} ({deadline - time.monotonic():.0f} s left)")
            command = [python, "-m", "benchmarks.gpu_steps", name, "--peaks", peaks]
            entries, problem = _run([*command, *(["--dry-run"] if arguments.dry_run else [])], environment, limit)
            for entry in entries:
                if "row" in entry:
                    rows.append(report.row_from(entry["row"]))
                elif "peaks" in entry:
                    peaks = json.dumps(entry["peaks"])
                    about |= entry
                else:
                    about |= entry["machine"]
            if problem:
                rows.append(Row(name, None, "", problem=problem, ok=False))
            _write(arguments, rows, about)
    _add_transformers(rows)
    _write(arguments, rows, about)
    device = about.get("device", {})
    print(f"{device.get('kind', 'no device')}, {about.get('nvidia_smi', '')}; {about.get('versions', {})}")
    remark = "; a dry run: figures mean nothing" if arguments.dry_run else ""
    print(f"{time.monotonic() - begun:.0f} s in all{remark}\n")
    print(report.table(rows))
    return 1 if any(_wrong(row) for row in rows) else 0


def _wrong(row: Row) -> bool:
    """A result that is wrong or a step that failed; not a bar that was missed."""
    return not row.ok and (row.figure is None or row.unit in ("NMSE", "passed"))


def _arguments(argv: list[str] | None, steps: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="gpu_check", description=DESCRIPTION, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--dry-run", action="store_true", help="every step on the CPU, kernels interpreted, all tiny")
    parser.add_argument("--steps", help=f"some only, with commas between: {', '.join(steps)}")
    parser.add_argument("--seconds", type=int, default=TOTAL, help=f"for everything; default: {TOTAL}")
    parser.add_argument("--wheels", type=Path, help="folder of wheels to use, on a machine without a package index")
    parser.add_argument("--json", type=Path, default=Path("bench-gpu.json"), help="default: bench-gpu.json")
    arguments = parser.parse_args(argv)
    wanted = arguments.steps.split(",") if arguments.steps else steps
    unknown = [name for name in wanted if name not in steps]
    if unknown:
        fail(f"--steps names {', '.join(unknown)}; accepted: {', '.join(steps)}")
    arguments.steps = wanted
    return arguments


def _write(arguments: argparse.Namespace, rows: list[Row], about: dict[str, Any]) -> None:
    settings = {"dry_run": arguments.dry_run, "steps": arguments.steps, "seconds": arguments.seconds}
    report.write(arguments.json, "gpu_check", rows, about, settings)


def _wheels(folder: Path | None, scratch: Path) -> dict[str, str]:
    """Unpacks wheels for the steps' Python to find; what it sets in their environment."""
    if folder is None:
        return {}
    files = sorted(str(path) for path in folder.glob("*.whl"))
    if not files:
        fail(f"--wheels is {folder}, where there are no wheels")
    site = scratch / "site"
    options = ["--no-index", "--no-deps", "--no-compile", "--disable-pip-version-check", "--target", str(site)]
    command = [sys.executable, "-m", "pip", "install", "-q", *options, *files]
    done = subprocess.run(command, capture_output=True, text=True, timeout=INSTALLING)
    if done.returncode:
        fail(f"the wheels could not be installed: {(done.stderr.strip().splitlines() or ['no message'])[-1]}")
    return {"PYTHONPATH": os.pathsep.join([child_environment()["PYTHONPATH"], str(site)])}


def _python(environment: dict[str, str], dry: bool, deadline: float) -> tuple[str, list[str]]:
    """A Python whose JAX sees the GPU: REALM_VENV's, the repository's .venv's, this one, or one made now.

    Returns it and what there is to say: packages that are missing, a GPU that JAX does not see.
    """
    named = os.environ.get("REALM_VENV")
    folders = [Path(named)] if named else [ROOT / ".venv"]
    candidates = [str(folder / "bin" / "python") for folder in folders if (folder / "bin" / "python").exists()]
    candidates.append(sys.executable)
    found = {python: _probe(python, environment) for python in candidates}
    for python, answer in found.items():
        if answer["platform"] == "gpu" or (dry and answer["platform"]):
            return python, _lacking(answer)
    if not dry and shutil.which("nvidia-smi"):
        python, problem = _installed(environment, min(INSTALLING, deadline - time.monotonic()))
        if not problem:
            return python, []
        said = [f"no JAX here sees the GPU, and jax[cuda12] could not be installed: {problem}"]
    else:
        said = ["there is no GPU here that JAX sees"]
    for python, answer in found.items():
        if answer["platform"]:
            return python, said + _lacking(answer)
    fail(f"no Python here has JAX: looked at {', '.join(candidates)}; REALM_VENV names an environment")


def _lacking(answer: dict[str, Any]) -> list[str]:
    missing = answer["missing"]
    return [f"not installed: {', '.join(missing)}; steps that need them fail (--wheels)"] if missing else []


def _probe(python: str, environment: dict[str, str]) -> dict[str, Any]:
    nothing = {"missing": list(NEEDED), "platform": ""}
    try:
        done = subprocess.run(
            [python, "-c", _PROBE, ",".join(NEEDED)], env=environment, capture_output=True, text=True, timeout=60
        )
    except (OSError, subprocess.TimeoutExpired):
        return nothing
    lines = done.stdout.strip().splitlines()
    return json.loads(lines[-1]) if done.returncode == 0 and lines else nothing


def _installed(environment: dict[str, str], seconds: float) -> tuple[str, str]:
    """A new environment with Realm and jax[cuda12]: its Python, and what went wrong in one line."""
    folder = Path(os.environ.get("REALM_VENV", ROOT / ".venv-gpu"))
    python = str(folder / "bin" / "python")
    until = time.monotonic() + seconds
    note(f"making an environment in {folder}")
    pip = [python, "-m", "pip", "--disable-pip-version-check", "--timeout", "10", "--retries", "1"]
    commands = [
        [sys.executable, "-m", "venv", str(folder)],
        [*pip, "install", "-q", "--only-binary=:all:", "jax[cuda12]>=0.10.2,<0.13"],
        [*pip, "install", "-q", "-e", f"{ROOT}[test]"],
    ]
    for command in commands:
        try:
            left = max(1.0, until - time.monotonic())
            done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=left)
        except (OSError, subprocess.TimeoutExpired) as error:
            return python, str(error)[:200]
        if done.returncode:
            lines = (done.stderr + done.stdout).strip().splitlines()
            return python, next((line for line in lines if "ERROR" in line), (lines or ["no message"])[-1])[:200]
    answer = _probe(python, environment)
    return python, "" if answer["platform"] == "gpu" else "it is installed and sees no GPU"


def _run(command: list[str], environment: dict[str, str], seconds: float) -> tuple[list[dict[str, Any]], str]:
    """What a step said, whatever became of it, and what went wrong in one line."""
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as errors:
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=out, stderr=errors, env=environment, start_new_session=True
        )
        problem = ""
        try:
            code = process.wait(seconds)
        except subprocess.TimeoutExpired:
            problem = f"stopped after {seconds:.0f} s"
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        out.seek(0)
        lines = out.read().decode(errors="replace").splitlines()
        entries = []
        for line in lines:
            with contextlib.suppress(json.JSONDecodeError):  # the last one may have been cut short
                entries.append(json.loads(line))
        if not problem and code:
            errors.seek(0)
            text = errors.read().decode(errors="replace").strip().splitlines()
            problem = f"ended with code {code}: {(text or ['no message'])[-1]}"[:400]
        return entries, problem


def _add_transformers(rows: list[Row]) -> None:
    """Puts transformers' figures beside Realm's of the same work."""
    theirs = {row.name.partition(": ")[2]: row for row in rows if row.name.startswith("transformers bf16: ")}
    for row in rows:
        peer = theirs.get(row.name.partition(": ")[2])
        if peer is not None and peer is not row and row.unit == peer.unit:
            row.peer, row.peer_name, row.peer_samples = peer.figure, "transformers bf16", peer.samples
