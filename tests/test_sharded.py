"""Runs the tests of tests/sharded, which need eight devices: how many there are is settled once a process."""

import subprocess
import sys
from pathlib import Path

import pytest

TESTS = Path(__file__).parent


@pytest.mark.parametrize("marker", ["not slow", pytest.param("slow", marks=pytest.mark.slow)])
def test_on_eight_devices(marker):
    command = [sys.executable, "-m", "pytest", str(TESTS / "sharded"), "-m", f"({marker}) and not oracle"]
    done = subprocess.run(command, cwd=TESTS.parent, capture_output=True, text=True)
    print(done.stdout[-8000:], done.stderr[-2000:])
    assert done.returncode == 0  # 5 where none was run
