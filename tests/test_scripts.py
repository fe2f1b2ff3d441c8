"""scripts/run and scripts/test: the private environment, with stand-ins for python and pip that note their calls.

The real thing (a fresh clone, a real installation) takes minutes and a package index; see README.md.
"""

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
Run = Callable[..., "subprocess.CompletedProcess[str]"]

# Makes an "environment" whose python notes its pip calls and whose realm prints its arguments, one a line.
FAKE_PYTHON = r"""#!/bin/sh
case "$1 $2" in
"-m venv")
    [ -z "$FAIL_VENV" ] || { echo "no luck"; echo "today"; exit 1; }
    mkdir -p "$3/bin"
    : >"$3/pyvenv.cfg"
    cat >"$3/bin/python" <<'END'
#!/bin/sh
echo "$*" >>"$LOG"
[ -z "$SLOW_PIP" ] || sleep "$SLOW_PIP"
exit "${PIP_STATUS:-0}"
END
    printf '#!/bin/sh\nprintf "%%s\\n" "$@"\n' >"$3/bin/realm"
    chmod +x "$3/bin/python" "$3/bin/realm"
    ;;
"-c "*) exec "$REAL_PYTHON" "$@" ;;
*) echo "Python 3.12.0" ;;
esac
"""


@pytest.fixture
def clone(tmp_path: Path) -> Path:
    """A repository with nothing but the scripts and what an installation is made of, in a path with a space."""
    clone = tmp_path / "a clone"
    shutil.copytree(ROOT / "scripts", clone / "scripts")
    for name in ("pyproject.toml", "setup.py", "pallas_kernels/native/a.cc", "pallas_kernels/operation/native/a.h"):
        (clone / name).parent.mkdir(parents=True, exist_ok=True)
        (clone / name).write_text("first")
    return clone


@pytest.fixture
def run(clone: Path, tmp_path: Path) -> Run:
    """Run a script of the clone, with no HOME at all."""
    python = tmp_path / "fake python"
    python.write_text(FAKE_PYTHON)
    python.chmod(0o755)
    environment = {
        "PATH": "/usr/bin:/bin",
        "REALM_PYTHON": str(python),
        "REAL_PYTHON": sys.executable,
        "LOG": str(tmp_path / "log"),
    }

    def run(*arguments: str, script: str = "run", **more: str) -> subprocess.CompletedProcess[str]:
        command = [str(clone / "scripts" / script), *arguments]
        return subprocess.run(command, env=environment | more, capture_output=True, text=True, timeout=100, cwd="/")

    return run


def pip_calls(tmp_path: Path) -> int:
    log = tmp_path / "log"
    return len(log.read_text().splitlines()) if log.exists() else 0


def test_installs_once_then_starts_at_once(run: Run, clone: Path, tmp_path: Path) -> None:
    first = run('The "capital" of', "--max-tokens", "3")
    assert first.stdout == 'generate\n-p\nThe "capital" of\n--max-tokens\n3\n'
    assert "making a private environment" in first.stderr
    assert pip_calls(tmp_path) == 1
    second = run("-5 + 3 =")
    assert (second.returncode, second.stdout, second.stderr) == (0, "generate\n-p\n-5 + 3 =\n", "")
    assert pip_calls(tmp_path) == 1
    left = {path.name for path in clone.iterdir()}
    assert left == {".venv", "pallas_kernels", "pyproject.toml", "scripts", "setup.py"}  # the lock is gone


def test_options_before_the_prompt(run: Run, tmp_path: Path) -> None:
    for slip in (["--json", "x"], ["-p", "x"], ["--max-tokens", "3"]):
        done = run(*slip)
        assert (done.returncode, done.stdout) == (2, "")
        assert done.stderr == f"error: the prompt comes first, its options after it: scripts/run PROMPT {slip[0]}\n"
    assert run("-- a dash and words").stdout == "generate\n-p\n-- a dash and words\n"


def test_changed_requirements_are_installed(run: Run, clone: Path, tmp_path: Path) -> None:
    run("x")
    (clone / "pyproject.toml").write_text("second")
    assert run("x").returncode == 0
    assert pip_calls(tmp_path) == 2


def test_failed_installation_is_taken_up_again(run: Run, tmp_path: Path) -> None:
    failed = run("x", PIP_STATUS="1")
    assert failed.returncode == 2
    assert failed.stderr.splitlines()[-1].startswith("error: pip could not install what Realm needs")
    assert run("x").stdout == "generate\n-p\nx\n"
    assert pip_calls(tmp_path) == 2


def test_killed_while_installing(run: Run, clone: Path, tmp_path: Path) -> None:
    """The environment is half made and the lock is left: the next run clears both up."""
    (clone / ".venv-lock").mkdir()
    dead = subprocess.Popen(["true"])
    dead.wait()
    (clone / ".venv-lock" / "pid").write_text(str(dead.pid))
    (clone / ".venv" / "bin").mkdir(parents=True)
    (clone / ".venv" / ".realm-venv").touch()
    (clone / ".venv" / "bin" / "python").write_text("#!/bin/sh\nexit 1\n")
    (clone / ".venv" / "bin" / "python").chmod(0o755)
    assert run("x").stdout == "generate\n-p\nx\n"
    assert not (clone / ".venv-lock").exists()


def test_two_at_once_install_once(run: Run, clone: Path, tmp_path: Path) -> None:
    command = [str(clone / "scripts" / "run"), "x"]
    environment = {"PATH": "/usr/bin:/bin", "REALM_PYTHON": str(tmp_path / "fake python"), "SLOW_PIP": "2"}
    environment |= {"REAL_PYTHON": sys.executable, "LOG": str(tmp_path / "log")}
    slow = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    while not (tmp_path / "log").exists():
        time.sleep(0.05)
    second = run("y")
    slow.communicate()
    assert slow.returncode == 0
    assert second.stdout == "generate\n-p\ny\n"
    assert "waiting for another installation" in second.stderr
    assert pip_calls(tmp_path) == 1


def test_interrupt_frees_the_lock(run: Run, clone: Path, tmp_path: Path) -> None:
    environment = {"PATH": "/usr/bin:/bin", "REALM_PYTHON": str(tmp_path / "fake python"), "SLOW_PIP": "30"}
    environment |= {"REAL_PYTHON": sys.executable, "LOG": str(tmp_path / "log")}
    slow = subprocess.Popen([str(clone / "scripts" / "run"), "x"], env=environment, start_new_session=True)
    while not (tmp_path / "log").exists():
        time.sleep(0.05)
    os.killpg(slow.pid, 2)  # as a terminal does on Ctrl-C
    assert slow.wait(20) == 130
    assert not (clone / ".venv-lock").exists()
    assert run("x").stdout == "generate\n-p\nx\n"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"REALM_PYTHON": "no-such-python"},
            "Python 3.11, 3.12 or 3.13 with the venv module is needed, and none was found",
        ),
        ({"REALM_PYTHON": "/bin/false"}, "/bin/false does not run"),
        ({"FAIL_VENV": "1"}, "-m venv failed: no luck today"),
        ({"REALM_VENV": "/proc/venv"}, "set REALM_VENV to a place you can write"),
    ],
)
def test_what_is_missing_is_said_in_one_line(run: Run, settings: dict[str, str], message: str) -> None:
    done = run("x", **settings)
    assert done.returncode == 2
    assert message in done.stderr
    assert [line for line in done.stderr.splitlines() if not line.startswith("realm: ")] == done.stderr.splitlines()[
        -1:
    ]


def test_somebody_elses_folder_is_left_alone(run: Run, tmp_path: Path) -> None:
    other = tmp_path / "photos"
    other.mkdir()
    (other / "holiday.jpg").touch()
    done = run("x", REALM_VENV=str(other))
    assert done.returncode == 2
    assert f"{other} exists and is not an environment that can be used" in done.stderr
    assert [p.name for p in other.iterdir()] == ["holiday.jpg"]


def test_python_that_is_too_old_is_named(run: Run, tmp_path: Path) -> None:
    old = tmp_path / "old"
    old.write_text("#!/bin/sh\necho is Python 3.9\n")
    old.chmod(0o755)
    assert f"{old} is Python 3.9" in run("x", REALM_PYTHON=str(old)).stderr


@pytest.mark.parametrize("arguments", [(), ("",)])
def test_a_prompt_is_needed(run: Run, clone: Path, arguments: tuple[str, ...]) -> None:
    done = run(*arguments)
    assert done.returncode == 2
    assert done.stderr.startswith("error: ")
    assert not (clone / ".venv").exists()
