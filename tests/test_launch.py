"""Jobs of several processes: how they begin, and that all of one ends when any process does. The devices are CPUs'."""

import json
import os
import pty
import select
import signal
import socket
import subprocess
import sys
import termios
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from realm_jax.sharding.start import difference
from realm_jax.sharding.supervisor import death, without_chatter, without_noise

ROOT = Path(__file__).parent.parent
LIMIT = 10.0  # seconds that all have to end in
# A crowded machine starts four processes in a minute.
START = 100.0


def free_address() -> str:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return f"127.0.0.1:{probe.getsockname()[1]}"


class Launched:
    """A launcher, and what it has started."""

    def __init__(self, command: list[str], **environment: str):
        self.process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env=os.environ | {"PYTHONPATH": f"{ROOT}:{ROOT}/tests"} | environment,
            text=True,
            start_new_session=True,
        )
        assert self.process.stdout is not None
        self.stdout = self.process.stdout
        self.children: dict[int, int] = {}  # rank -> process

    def await_line(self, begins: str) -> str:
        """The first line of the command's that begins so. Notes which processes there are then."""
        for line in self.stdout:
            if line.startswith(begins):
                self.children = children(self.process.pid)
                return line
        raise AssertionError(f"ended before {begins!r}: {self.process.communicate()[1]}")

    def end(self, since: float) -> tuple[int, list[str]]:
        """The exit code and the lines of stderr, of a launcher that ends in time with all its processes."""
        _, errors = self.process.communicate(timeout=max(0.1, since + LIMIT - time.monotonic()))
        await_death(list(self.children.values()), since)
        return self.process.returncode, errors.splitlines()


def children(parent: int) -> dict[int, int]:
    found = {}
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            words = (entry / "cmdline").read_bytes().split(b"\0")
            if int((entry / "stat").read_text().rpartition(")")[2].split()[1]) == parent and b"-m" in words:
                found[json.loads(words[words.index(b"-m") + 2])["cluster"]["rank"]] = int(entry.name)
        except (OSError, ValueError):
            continue  # it has just ended
    return found


def await_death(processes: list[int], since: float) -> None:
    while alive := [pid for pid in processes if is_alive(pid)]:
        assert time.monotonic() < since + LIMIT, f"still there: {alive}"
        time.sleep(0.05)


def is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


@pytest.fixture
def job() -> Iterator[Callable[..., Launched]]:
    launched = []

    def start(environment: dict[str, str] | None = None, python: str = sys.executable, **wanted: Any) -> Launched:
        wanted = {"coordinator": free_address()} | wanted
        one = Launched([python, str(ROOT / "tests/sharded_job.py"), json.dumps(wanted)], **environment or {})
        launched.append(one)
        return one

    yield start
    for one in launched:
        for pid in [one.process.pid, *one.children.values()]:
            if is_alive(pid):
                os.kill(pid, signal.SIGKILL)
        one.process.wait()


Start = Callable[..., Launched]


def test_starts_and_ends(job: Start) -> None:
    done = job(steps=3, cpu_devices=2, then="write")
    assert done.process.wait(START) == 0
    assert done.stdout.read() == "step 1: 10\nstep 2: 20\nstep 3: 30\n"  # (1 + 2 + 3 + 4) * step
    assert done.process.stderr is not None
    assert sorted(done.process.stderr.read().splitlines()) == ["of a program it started", "of its own"]


@pytest.mark.parametrize(
    ("processes", "rank"),
    [(2, 1)] + [pytest.param(n, r, marks=pytest.mark.slow) for n, r in [(2, 0), *((4, r) for r in range(4))]],
)
def test_death_of_a_rank_ends_all(job: Start, processes: int, rank: int) -> None:
    running = job(processes=processes)
    running.await_line("step 5:")
    assert set(running.children) == set(range(processes))
    os.kill(running.children[rank], signal.SIGKILL)
    assert running.end(time.monotonic()) == (1, [f"error: rank {rank} was killed (SIGKILL); the job has ended"])


@pytest.mark.slow
def test_death_of_the_launcher_ends_all(job: Start) -> None:
    running = job(processes=3)
    running.await_line("step 5:")
    running.process.kill()
    assert running.end(time.monotonic()) == (
        -signal.SIGKILL,
        ["error: the launcher of rank 0 was killed; the job has ended"],
    )


@pytest.mark.slow
@pytest.mark.parametrize("group", [False, True])  # as a terminal does, and as `kill` does
@pytest.mark.parametrize("then", ["wait", "refuse Ctrl-C"])
def test_interrupt_ends_all(job: Start, group: bool, then: str) -> None:
    running = job(steps=2, then=then)
    running.await_line("step 2:")
    if group:
        os.killpg(running.process.pid, signal.SIGINT)
    else:
        running.process.send_signal(signal.SIGINT)
    assert running.end(time.monotonic()) == (130, ["error: stopped with Ctrl-C; the job has ended"])


@pytest.mark.slow
def test_interrupt_in_the_midst_of_steps(job: Start) -> None:
    running = job()
    running.await_line("step 50:")
    running.process.send_signal(signal.SIGINT)
    assert running.end(time.monotonic()) == (130, ["error: stopped with Ctrl-C; the job has ended"])


@pytest.mark.slow
def test_interrupt_while_it_starts(job: Start) -> None:
    running = job()
    while len(children(running.process.pid)) < 2:
        time.sleep(0.01)
    running.process.send_signal(signal.SIGINT)
    assert running.end(time.monotonic()) == (130, ["error: stopped with Ctrl-C; the job has ended"])


@pytest.mark.slow
def test_one_interrupt_ends_a_part_of_what_is_interactive_and_two_end_it(job: Start) -> None:
    running = job(steps=2, then="refuse Ctrl-C", interactive=True)
    running.await_line("step 2:")
    running.process.send_signal(signal.SIGINT)
    running.await_line("not yet")
    time.sleep(6)
    assert running.process.poll() is None
    running.process.send_signal(signal.SIGINT)
    time.sleep(0.5)
    running.process.send_signal(signal.SIGINT)
    assert running.end(time.monotonic()) == (130, ["error: stopped with Ctrl-C; the job has ended"])


@pytest.mark.slow
def test_sigterm_ends_all(job: Start) -> None:
    running = job()
    running.await_line("step 5:")
    running.process.terminate()
    assert running.end(time.monotonic()) == (
        143,
        ["error: the launcher of rank 0 was ended (SIGTERM); the job has ended"],
    )


@pytest.mark.slow
@pytest.mark.parametrize(("then", "code"), [("3", 3), ("2", 2), ("raise", 1)])
def test_the_code_is_that_of_the_command(job: Start, then: str, code: int) -> None:
    done = job(steps=1, then=then)
    done.await_line("step 1:")
    found, errors = done.end(time.monotonic())
    assert found == code
    if then == "raise":
        assert errors[0] == "Traceback (most recent call last):"
        assert "sharded_job.py" in errors[1]  # and nothing of Realm's own above it
        assert errors[-1] == "ValueError: a mistake of the user's"
    else:
        assert errors == []


@pytest.mark.slow
def test_the_terminal_is_the_command_s_and_is_left_as_it_was() -> None:
    wanted = {"coordinator": free_address(), "steps": 1, "then": "ask"}
    launcher, terminal = pty.fork()
    if launcher == 0:
        os.environ["PYTHONPATH"] = f"{ROOT}:{ROOT}/tests"
        os.execv(sys.executable, [sys.executable, str(ROOT / "tests/sharded_job.py"), json.dumps(wanted)])
    before = termios.tcgetattr(terminal)
    seen = b""

    def read_until(text: bytes) -> None:
        nonlocal seen
        deadline = time.monotonic() + START
        while text not in seen:
            assert select.select([terminal], [], [], deadline - time.monotonic())[0], seen
            seen += os.read(terminal, 4096)
        seen = seen.partition(text)[2]

    read_until(b"question: ")
    os.write(terminal, b"ac\x02b\r")  # Ctrl-B goes one back
    read_until(b"answer: abc")
    read_until(b"question: ")
    while termios.tcgetattr(terminal) == before:  # until readline has taken the terminal
        time.sleep(0.05)
    os.kill(children(launcher)[1], signal.SIGKILL)
    read_until(b"error: rank 1 was killed (SIGKILL); the job has ended")
    assert os.waitpid(launcher, 0)[1] == 1 << 8
    assert termios.tcgetattr(terminal) == before


# Two launchers of one rank each know of each other no more than if they were on two machines.


@pytest.fixture
def pair(job: Start) -> Callable[..., tuple[Launched, Launched]]:
    def start(*others: dict[str, Any], **wanted: Any) -> tuple[Launched, Launched]:
        wanted = {"coordinator": free_address(), "processes": 2} | wanted
        first, second = (job(**wanted | {"rank": r} | (others[r] if others else {})) for r in range(2))
        return first, second

    return start


Pair = Callable[..., tuple[Launched, Launched]]
STOPPED = "stopped answering: its process or its machine has died; the job has ended"


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("then", ["", "wait"])  # in the midst of a collective, and between them
def test_death_on_one_machine_ends_the_others(pair: Pair, rank: int, then: str) -> None:
    both = pair(steps=5 if then else 1_000_000, then=then)
    both[0].await_line("step 5:")
    both[1].children = children(both[1].process.pid)
    began = time.monotonic()
    os.kill(both[rank].children[rank], signal.SIGKILL)
    assert both[rank].end(began) == (1, [f"error: rank {rank} was killed (SIGKILL); the job has ended"])
    code, [line] = both[1 - rank].end(began)
    assert code == 1
    assert line == (f"error: rank 1 {STOPPED}" if rank else f"error: rank 0, the coordinator, {STOPPED}")


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 1])
def test_death_of_a_launcher_is_told_to_the_others(pair: Pair, rank: int) -> None:
    both = pair()
    both[0].await_line("step 5:")
    both[1].children = children(both[1].process.pid)
    began = time.monotonic()
    both[rank].process.kill()
    line = f"error: the launcher of rank {rank} was killed; the job has ended"
    assert both[rank].end(began) == (-signal.SIGKILL, [line])
    assert both[1 - rank].end(began) == (1, [line])


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 1])
def test_interrupt_on_one_machine_ends_the_others(pair: Pair, rank: int) -> None:
    both = pair(steps=5, then="wait")
    both[0].await_line("step 5:")
    both[1].children = children(both[1].process.pid)
    began = time.monotonic()
    both[rank].process.send_signal(signal.SIGINT)
    line = "stopped with Ctrl-C; the job has ended"
    assert both[rank].end(began) == (130, [f"error: {line}"])
    assert both[1 - rank].end(began) == (130, [f"error: {'rank 0 was ' if rank == 0 else ''}{line}"])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("then", "code", "errors"),
    [("", 0, []), ("3", 3, ["error: rank 0 ended with exit code 3; the job has ended"])],
)
def test_end_on_the_first_machine_ends_the_others(pair: Pair, then: str, code: int, errors: list[str]) -> None:
    first, second = pair(steps=2, then=then)
    first.await_line("step 2:")
    began = time.monotonic()
    assert first.end(began) == (code, [])
    assert second.end(began) == (code, errors)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("second", "difference"),
    [
        ({"same": {"mesh": "tensor=4"}}, "mesh tensor=4, and rank 0 has mesh tensor=2"),
        ({"cpu_devices": 2}, "number of devices 2, and rank 0 has number of devices 1"),
        (
            {"environment": {"XLA_FLAGS": "--xla_cpu_enable_fast_math=true"}},
            "XLA_FLAGS --xla_cpu_enable_fast_math=true, and rank 0 has XLA_FLAGS unset",
        ),
    ],
)
def test_processes_that_differ_are_refused_everywhere(pair: Pair, second: dict[str, Any], difference: str) -> None:
    common = {"same": {"mesh": "tensor=2"}, "environment": {"XLA_FLAGS": ""}}
    both = pair(common, common | second)
    codes, lines = zip(*((one.process.wait(START), one.process.communicate()[1]) for one in both))
    assert codes == (2, 2)
    assert lines[0] == lines[1]
    assert lines[0].startswith(f"error: rank 1 has {difference}")
    assert lines[0].endswith("accepted: the same in all processes of a job\n")
    assert lines[0].count("\n") == 1


@pytest.mark.slow
@pytest.mark.parametrize(
    ("rank", "message"),
    [
        (0, "not all 2 processes of the job came within 5 seconds"),
        (1, "the coordinator, rank 0 at {address}, did not come within 5 seconds: Connection refused; accepted: "),
    ],
)
def test_who_does_not_come_is_waited_for_a_while(job: Start, rank: int, message: str) -> None:
    address = free_address()
    waiting = job(rank=rank, coordinator=address, timeout=5)
    assert waiting.process.wait(START) == 2
    error = waiting.process.communicate()[1]
    assert error.startswith(f"error: {message.format(address=address)}")
    assert error.count("\n") == 1


def test_port_in_use_is_refused(job: Start) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        refused = job(coordinator=f"127.0.0.1:{port}")
        assert refused.process.wait(START) == 2
    error = refused.process.communicate()[1]
    assert error.startswith(f"error: port {port}, where rank 0 is to coordinate the job, cannot be used: ")
    assert error.count("\n") == 1


def test_what_differs_is_named() -> None:
    facts = [{"jax": "1", "mesh": "a"}, {"jax": "1", "mesh": "a"}, {"jax": "2", "mesh": "b"}]
    accepted = "; accepted: the same in all processes of a job"
    assert difference(facts[:2]) is None
    assert difference(facts) == "rank 2 has jax 2, mesh b, and rank 0 has jax 1, mesh a" + accepted
    assert difference([{"jax": "1"}, {}]) == "rank 1 has jax unknown, and rank 0 has jax 1" + accepted


FATAL = (
    "F1121 21:02:37.3 10546 client.h:80] Terminating process because the JAX distributed service detected fatal errors"
)


@pytest.mark.parametrize(
    ("code", "written", "said"),
    [
        (-9, "", "rank 3 was killed (SIGKILL)"),
        (-11, "Fatal Python error", "rank 3 was killed (SIGSEGV) (REALM_DEBUG=1 shows more)"),
        (-64, "", "rank 3 was killed (SIGRTMAX) (REALM_DEBUG=1 shows more)"),
        (7, "", "rank 3 ended unexpectedly, with exit code 7 (REALM_DEBUG=1 shows more)"),
        (
            -6,
            FATAL
            + "absl::Status: UNAVAILABLE: The following tasks are unhealthy (stopped sending heartbeats):\n1\n2\nThe",
            "ranks 1, 2 stopped answering: their processes or machines have died",
        ),
        (
            -6,
            FATAL + "absl::Status: UNAVAILABLE: failed to connect to all addresses 127.0.0.1:80",
            "rank 0, the coordinator, stopped answering: its process or its machine has died",
        ),
    ],
)
def test_what_a_death_is_called(monkeypatch: pytest.MonkeyPatch, code: int, written: str, said: str) -> None:
    monkeypatch.delenv("REALM_DEBUG", raising=False)
    assert death("rank 3", code, written) == said


def test_the_noise_of_libraries_is_kept_from_the_user() -> None:
    log = "E1121 21:02:37.343252   10535 coordination_service.cc:1549] Use error polling:\n1\nThe tasks have crashed.\n"
    assert without_noise(log) == ""
    assert without_noise("ls: no such file\n" + log) == "ls: no such file\n"
    assert without_noise("*** Check failure stack trace: ***\n    @ 0x7f") == ""
    assert without_noise("*** see below ***\n") == "*** see below ***\n"
    assert without_noise("E1121 is a room\n") == "E1121 is a room\n"


@pytest.mark.parametrize("size", [1, 3, 1000])
def test_the_chatter_of_gloo_is_not_the_command_s_output(size: int) -> None:
    text = b"one\n[Gloo] Rank 0 is connected to 1 peer ranks. \n[two\n\n[Gloo three\xff"
    shown, held = b"", b""
    for start in range(0, len(text), size):
        more, held = without_chatter(held + text[start : start + size])
        shown += more
    assert (shown, held) == (b"one\n[two\n\n[Gloo three\xff", b"")
    assert without_chatter(b"a\n[Glo") == (b"a\n", b"[Glo")
