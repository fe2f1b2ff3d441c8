"""Which Python a script runs under. Standard library only."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path
from typing import NoReturn

SCRIPTS = Path(__file__).resolve().parent.parent
ROOT = SCRIPTS.parent
NEEDED = ("jax", "flax", "gguf", "platformdirs")
_ENTERED = "REALM_BENCHMARK_ENTERED"


def fail(message: str) -> NoReturn:
    """One line on stderr, exit code 2."""
    print(f"error: {message}", file=sys.stderr)
    raise SystemExit(2)


def missing() -> list[str]:
    """Packages Realm needs that this Python lacks."""
    return [name for name in NEEDED if importlib.util.find_spec(name) is None]


def child_environment(**more: str) -> dict[str, str]:
    """For children of this script: they find the benchmarks and the repository."""
    paths = [str(SCRIPTS), str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    return os.environ | {"PYTHONPATH": os.pathsep.join(paths)} | more


def enter() -> None:
    """Starts the script again with the private environment of scripts/run when this Python cannot run Realm.

    REALM_VENV names that environment, as for scripts/run; it is made where there is none.
    """
    lacking = missing()
    if not lacking:
        return
    if os.environ.get(_ENTERED):
        fail(f"{sys.executable} lacks {', '.join(lacking)}; remove the environment and start again")
    make = '. "$1/scripts/environment.sh"; realm_environment "$1" "" >&2; printf %s "$venv"'
    made = subprocess.run(["sh", "-euc", make, "sh", str(ROOT)], stdout=subprocess.PIPE, text=True)
    if made.returncode:
        raise SystemExit(made.returncode)
    python = f"{made.stdout}/bin/python"
    os.execve(python, [python, *sys.argv], os.environ | {_ENTERED: "1"})
