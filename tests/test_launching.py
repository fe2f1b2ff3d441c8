"""scripts/launch_sharded.py: what its command line asks for, and what it refuses before anything starts."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from realm_jax.cli import launching
from realm_jax.sharding.cluster import Cluster
from realm_jax.sharding.supervisor import Job

ROOT = Path(__file__).parent.parent
SCHEDULERS = (
    "RANK",
    "WORLD_SIZE",
    "SLURM_PROCID",
    "OMPI_COMM_WORLD_RANK",
    "OMPI_COMM_WORLD_SIZE",
    "JOB_COMPLETION_INDEX",
)


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[Job]:
    """The jobs that were to be started."""
    jobs: list[Job] = []
    monkeypatch.setattr(launching, "supervise", lambda job: jobs.append(job) or 0)
    monkeypatch.setattr(launching, "_free_port", lambda: 80)
    for name in SCHEDULERS:
        monkeypatch.delenv(name, raising=False)
    return jobs


HERE = "127.0.0.1:80"


@pytest.mark.parametrize(
    ("line", "command"),
    [
        ("generate m -p x", ["realm", "generate", "m", "-p", "x"]),
        ("--mesh tensor=2 generate m -p x", ["realm", "generate", "--mesh", "tensor=2", "m", "-p", "x"]),
        ("--mesh auto -- realm chat m", ["realm", "chat", "--mesh", "auto", "m"]),
        ("--processes 2 bench m --json", ["realm", "bench", "--mesh", "auto", "m", "--json"]),
        ("--devices-per-process 2 chat", ["realm", "chat", "--mesh", "auto"]),
        ("--processes 2 chat m --mesh data=2", ["realm", "chat", "m", "--mesh", "data=2"]),
        (f"--processes 2 python {__file__} -x --processes 3", ["python", __file__, "-x", "--processes", "3"]),
    ],
)
def test_the_command_gets_its_mesh(asked: list[Job], line: str, command: list[str]) -> None:
    assert launching.main(line.split()) == 0
    assert asked[0].command == command
    assert asked[0].interactive == (command[1] == "chat")


@pytest.mark.parametrize(
    ("flags", "ranks", "cpu_devices"),
    [
        ("", [Cluster("", 1, 0, None, "one process")], None),
        ("--devices-per-process 4", [Cluster("", 1, 0, (0, 1, 2, 3), "one process")], 4),
        ("--processes 1 --devices-per-process 2", [Cluster("", 1, 0, (0, 1), "flags")], 2),
        ("--processes 2", [Cluster(HERE, 2, r, (r,), "flags") for r in range(2)], None),
        ("--processes 2 --rank 1 --coordinator a:9", [Cluster("a:9", 2, 1, None, "flags")], None),
    ],
)
def test_the_flags_say_which_processes_start(
    asked: list[Job], flags: str, ranks: list[Cluster], cpu_devices: int | None
) -> None:
    assert launching.main([*flags.split(), "generate", "m", "-p", "x"]) == 0
    assert list(asked[0].ranks) == ranks
    assert asked[0].cpu_devices == cpu_devices


def test_commands_that_differ_far_behind_differ(asked: list[Job]) -> None:
    for end in "ab":
        assert launching.main(["generate", "m", "-p", "x" * 500 + end]) == 0
    first, second = (job.same["command"] for job in asked)
    assert first != second
    assert len(first) < 200


def test_a_scheduler_says_which_process_this_is(asked: list[Job], monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "a", "MASTER_PORT": "9"}.items():
        monkeypatch.setenv(name, value)
    assert launching.main(["generate", "m", "-p", "x"]) == 0
    assert asked[0].ranks == [Cluster("a:9", 2, 1, None, "torchrun")]
    assert asked[0].command[2:4] == ["--mesh", "auto"]
    assert launching.main(["--processes", "2", "generate", "m", "-p", "x"]) == 2
    assert len(asked) == 1


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("", "COMMAND is missing"),
        ("--processes 2", "COMMAND is missing"),
        ("serve m", "COMMAND is 'serve'; accepted: bench, chat, generate, or python FILE.py"),
        ("--processes 0 chat", "--processes is 0; accepted: 1 to 256"),
        ("--processes two chat", "argument --processes: invalid int value: 'two' (launch_sharded.py --help"),
        ("--rank 1 chat", "--rank needs --processes and --coordinator too"),
        ("--coordinator a:1 chat", "--coordinator needs --processes and --rank, or a scheduler"),
        ("--devices-per-process 0 chat", "argument --devices-per-process: 0 is not in 1 to 65536"),
        ("--start-timeout -1 chat", "argument --start-timeout: -1 is not in 1 to 65536"),
        ("--unknown chat", "unrecognized arguments: --unknown"),
        ("--mesh tensor=x chat", "mesh is 'tensor=x'; accepted:"),
        ("--mesh tensor=2 chat --mesh tensor=4", "--mesh is 'tensor=2' before and 'tensor=4' after chat"),
        ("generate m --max-tokens x", "Invalid value for '--max-tokens'"),
        ("generate m --no-such-option", "No such option"),
        ("python", "the file of `python FILE.py` is missing"),
        ("python no-such-file.py", "the file of `python FILE.py` is 'no-such-file.py'"),
        ("python -c pass", "the file of `python FILE.py` is '-c'"),
        (f"--mesh tensor=2 python {__file__}", "--mesh is for realm's commands"),
        ("--topology h100:8 chat m", "--topology needs --dry-run"),
        (f"--dry-run python {__file__}", "--dry-run plans realm's commands"),
        ("--dry-run --topology abacus:8 chat llama-8b", "topology 'abacus:8' is not known"),
        ("--dry-run --topology h100:2 --mesh tensor=4 chat llama-8b", "mesh tensor=4 needs 4 devices"),
    ],
)
def test_mistakes_are_one_line_and_start_nothing(
    asked: list[Job], capsys: pytest.CaptureFixture[str], line: str, message: str
) -> None:
    assert launching.main(line.split()) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith(f"error: {message}")
    assert err.count("\n") == 1
    assert not asked


def test_a_dry_run_prints_the_plan(asked: list[Job], capsys: pytest.CaptureFixture[str]) -> None:
    line = "--dry-run --processes 8 --topology h100:8 --mesh tensor=8 generate llama-70b:Q4_K --context-length 2048"
    assert launching.main(line.split()) == 0
    out = capsys.readouterr().out
    assert out.startswith("8 processes, 8 devices\n")
    for part in ("mesh tensor=8, context 2,048", "weights, divided", "all-reduce, attention", "tokens/s"):
        assert part in out
    assert not asked


@pytest.mark.parametrize(
    ("card", "kind"),
    [
        ("NVIDIA H100 80GB HBM3", "h100"),
        ("NVIDIA H200", "h200"),
        ("NVIDIA A100-SXM4-40GB", "a100-40"),
        ("NVIDIA A100 80GB PCIe", "a100-80"),
        ("NVIDIA L4", "l4"),
        ("Tesla T4", "t4"),
        ("NVIDIA GeForce RTX 4090", "rtx4090"),
    ],
)
def test_cards_by_the_names_their_driver_gives(card: str, kind: str) -> None:
    assert launching.topology_kind([card]) == kind


@pytest.mark.parametrize("card", ["NVIDIA L40S", "NVIDIA T400", "NVIDIA GeForce RTX 3060"])
def test_cards_without_figures(card: str) -> None:
    with pytest.raises(launching.InvalidRequestError, match="accepted: --topology KIND:N"):
        launching.topology_kind([card])


def test_the_script_runs_and_helps() -> None:
    def run(*arguments: str) -> Any:
        command = [sys.executable, str(ROOT / "scripts/launch_sharded.py"), *arguments]
        return subprocess.run(command, capture_output=True, text=True, timeout=60)

    shown = run("--help")
    assert (shown.returncode, shown.stderr) == (0, "")
    for word in ("--processes", "SLURM_PROCID", "OMPI_COMM_WORLD_RANK", "MASTER_ADDR", "JOB_COMPLETION_INDEX"):
        assert word in shown.stdout
    assert max(map(len, shown.stdout.splitlines())) <= 120
    assert run("sing").stderr.startswith("error: COMMAND is 'sing'")
