"""The parent of the processes of a job on one machine: starts them, and ends all when one ends or dies.

What their C++ writes to stderr is read here and kept back: the death of one process makes all others write pages.
REALM_DEBUG=1 shows it.
"""

import contextlib
import json
import os
import re
import selectors
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from realm_jax.sharding.cluster import Cluster
from realm_jax.sharding.rank import Assignment
from realm_jax.sharding.start import HEARTBEAT

_ORDERLY = 8.0  # seconds that the processes have to end after the command has
_INTERRUPTED = 5.0  # seconds that the command has after Ctrl-C
_TOLD = 1.0  # seconds for telling other machines why the job has ended
_LATE = 5.0  # seconds after the time limit for starting, in which the processes say themselves what they wait for
_REACHED = 0.5  # seconds within which a Ctrl-C on the terminal has reached the command too
_TWICE = 3.0  # seconds within which a second Ctrl-C ends what goes on after one
_ROOT = str(Path(__file__).resolve().parents[2])  # where the ranks find this package
_TAIL = 1 << 14  # bytes kept of what a process wrote
# Where all processes have this one parent, nothing depends on it, and a busy machine may be late.
_LOCAL_HEARTBEAT = 60


@dataclass(frozen=True)
class Job:
    """What to run.

    ranks: those of this machine, with one parent.
    command: of rank 0, follower: of the others; see Assignment.
    same: what must be the same in all processes, by name.
    interactive: the command goes on after a Ctrl-C, which ends a part of it; a second one ends it.
    timeout: seconds until all processes of the job must be there.
    """

    ranks: Sequence[Cluster]
    command: Sequence[str]
    follower: Sequence[str]
    same: Mapping[str, str] = field(default_factory=dict)
    cpu_devices: int | None = None
    interactive: bool = False
    timeout: float = 120


def supervise(job: Job) -> int:
    """Runs a job's processes of this machine to their end and returns the exit code: the command's own; 130 after
    Ctrl-C, 143 after SIGTERM; 2 where a process could not join or was refused; 1 when one died.

    Writes one line to stderr where the job ended otherwise than by its command's end. Only from the main thread, and
    with the three standard streams open.
    """
    return _Supervisor(job).run()


@dataclass(eq=False)
class _Child:
    cluster: Cluster
    process: "subprocess.Popen[bytes]"
    lifeline: int
    pipes: Mapping[int, Callable[["_Child", bytes], None]]  # from it, and who reads them
    unread: bytes = b""  # of the report: a line that is not whole
    unshown: bytes = b""  # of its output
    tail: bytes = b""  # of its errors
    joined: bool = False
    interrupted: float = -1e9  # when it was last reached by a Ctrl-C
    end: dict[str, Any] | None = None

    @property
    def name(self) -> str:
        return f"rank {self.cluster.rank}"

    @property
    def alive(self) -> bool:
        return self.process.returncode is None


class _Supervisor:
    """
    code, error: the verdict, once there is one; it is never changed.
    """

    def __init__(self, job: Job):
        self.job = job
        self.children: list[_Child] = []
        self.name = f"rank {job.ranks[0].rank}"
        self.elsewhere = len(job.ranks) < job.ranks[0].processes
        self.debug = os.environ.get("REALM_DEBUG") == "1"
        self.code: int | None = None
        self.error: str | None = None
        self.kill_at: float | None = None
        self.pass_on_at: float | None = None
        self.interrupts: list[float] = []
        self.start_by = time.monotonic() + job.timeout + _LATE
        self.selector = selectors.DefaultSelector()

    def run(self) -> int:
        terminal = _Terminal()
        wake, notify = os.pipe()
        os.set_blocking(notify, False)
        handled = [signal.SIGCHLD, signal.SIGTERM, signal.SIGHUP]
        if signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:  # a shell's background job
            handled.append(signal.SIGINT)
        before = {number: signal.signal(number, lambda *_: None) for number in handled}
        woken = signal.set_wakeup_fd(notify, warn_on_full_buffer=False)
        self.selector.register(wake, selectors.EVENT_READ, lambda: self._signalled(wake))
        try:
            for cluster in self.job.ranks:
                self._start(cluster)
            while any(child.alive for child in self.children):
                for key, _ in self.selector.select(self._wait()):
                    key.data()
                for child in self.children:
                    self._look_at(child)
                self._keep_time()
        finally:
            self._kill()
            signal.set_wakeup_fd(woken)
            for handled_signal, handler in before.items():
                signal.signal(handled_signal, handler)
            self.selector.close()
            for number in (wake, notify, *(n for child in self.children for n in (child.lifeline, *child.pipes))):
                os.close(number)
        terminal.restore(self.error is not None)
        if self.error is not None:
            print(f"error: {self.error}", file=sys.stderr, flush=True)
        assert self.code is not None
        return self.code

    def _start(self, cluster: Cluster) -> None:
        lifeline, hold = os.pipe()
        report, reported = os.pipe()
        noise, noised = os.pipe()
        leads = cluster.rank == 0
        output, put_out = os.pipe() if leads else (-1, noised)
        assignment = Assignment(
            cluster,
            list(self.job.command if leads else self.job.follower),
            dict(self.job.same),
            self.job.cpu_devices,
            HEARTBEAT if self.elsewhere else _LOCAL_HEARTBEAT,
            self.job.timeout,
            os.getpid(),
            lifeline,
            reported,
            os.dup(1),
            os.dup(2),
            first=cluster == self.job.ranks[0],
        )
        given = [lifeline, reported, assignment.output, assignment.errors]
        process = subprocess.Popen(
            [sys.executable, "-P", "-m", "realm_jax.sharding.rank", assignment.text()],
            stdin=None if leads else subprocess.DEVNULL,
            stdout=put_out,
            stderr=noised,
            env=os.environ | {"PYTHONPATH": os.pathsep.join([_ROOT, *filter(None, [os.environ.get("PYTHONPATH")])])},
            pass_fds=given,
            # Rank 0 must be where the terminal is read from; a Ctrl-C there is its own affair.
            process_group=None if leads else 0,
        )
        for number in {*given, noised, put_out}:
            os.close(number)
        pipes = {report: self._heard, noise: self._sift_errors}
        if leads:
            pipes[output] = self._sift_output
        child = _Child(cluster, process, hold, pipes)
        self.children.append(child)
        for number in pipes:
            os.set_blocking(number, False)
            self.selector.register(number, selectors.EVENT_READ, lambda number=number: self._read(child, number))

    # What happens

    def _read(self, child: _Child, number: int) -> None:
        try:
            data = os.read(number, 1 << 16)
        except BlockingIOError:
            return
        if data:
            child.pipes[number](child, data)
        else:
            self.selector.unregister(number)

    def _heard(self, child: _Child, data: bytes) -> None:
        if bytes([signal.SIGINT]) in data:
            child.interrupted = time.monotonic()
        *lines, child.unread = (child.unread + data).split(b"\n")
        for line in lines:
            _, brace, rest = line.partition(b"{")  # what comes before are numbers of signals
            if not brace:
                continue
            message = json.loads(brace + rest)
            if "joined" in message:
                child.joined = True
            elif child.end is None:
                child.end = message

    def _sift_errors(self, child: _Child, data: bytes) -> None:
        child.tail = (child.tail + data)[-_TAIL:]
        text = data.decode(errors="replace")
        if self.debug:
            sys.stderr.write("".join(f"[{child.name}] {line}\n" for line in text.splitlines()))
        elif child.cluster.rank == 0 and child.joined and self.code is None:
            sys.stderr.write(without_noise(text))
        sys.stderr.flush()

    def _sift_output(self, child: _Child, data: bytes) -> None:
        shown, child.unshown = without_chatter(child.unshown + data)
        sys.stdout.buffer.write(shown)
        sys.stdout.buffer.flush()

    def _signalled(self, wake: int) -> None:
        for number in os.read(wake, 512):
            if number == signal.SIGINT:
                self._interrupted()
            elif number != signal.SIGCHLD:
                cause = signal.Signals(number).name
                self._decide(128 + number, f"the launcher of {self.name} was ended ({cause}); the job has ended")

    def _interrupted(self) -> None:
        now = time.monotonic()
        leaders = [child for child in self.children if child.cluster.rank == 0 and child.alive and child.joined]
        again = bool(self.interrupts) and now - self.interrupts[-1] < _TWICE
        self.interrupts.append(now)
        if not leaders or again:
            self._decide(130, "stopped with Ctrl-C; the job has ended")
        else:
            self.pass_on_at = now + _REACHED

    def _keep_time(self) -> None:
        now = time.monotonic()
        if self.pass_on_at is not None and now >= self.pass_on_at:
            self.pass_on_at = None
            for child in self.children:
                if child.cluster.rank == 0 and child.alive and child.interrupted < self.interrupts[-1] - _REACHED:
                    child.process.send_signal(signal.SIGINT)
        if self.interrupts and not self.job.interactive and now >= self.interrupts[-1] + _INTERRUPTED:
            self._decide(130, "stopped with Ctrl-C; the job has ended")
        if now >= self.start_by and not all(child.joined for child in self.children):
            processes, limit = self.job.ranks[0].processes, f"{self.job.timeout:.0f} seconds"
            self._decide(2, f"not all {processes} processes of the job came within {limit}, and were ready")
        if self.kill_at is not None and now >= self.kill_at:
            self._kill()

    def _wait(self) -> float | None:
        moments = [self.pass_on_at, self.kill_at]
        if self.interrupts and not self.job.interactive and self.code is None:
            moments.append(self.interrupts[-1] + _INTERRUPTED)
        if self.code is None and not all(child.joined for child in self.children):
            moments.append(self.start_by)
        left = [moment - time.monotonic() for moment in moments if moment is not None]
        return max(0.0, min(left)) if left else None

    def _look_at(self, child: _Child) -> None:
        """Judges an end that was announced, or a death."""
        died = child.alive and child.process.poll() is not None
        if died:
            for number in child.pipes:
                if number in self.selector.get_map():
                    self._read(child, number)
            if not child.unshown.startswith(_CHATTER):
                sys.stdout.buffer.write(child.unshown)
                sys.stdout.buffer.flush()
        if child.end is not None:
            self._decide(**child.end, orderly=self.elsewhere or child.end["error"] is None)
        elif died:
            code = child.process.returncode
            if child.cluster.rank == 0 and code == -signal.SIGINT:
                self._decide(130, "stopped with Ctrl-C; the job has ended")
            else:
                self._decide(1, f"{death(child.name, code, child.tail.decode(errors='replace'))}; the job has ended")

    # What to do about it

    def _decide(self, code: int, error: str | None, orderly: bool = False) -> None:
        """The first verdict stands. orderly: the processes know it, and end by themselves."""
        if self.code is not None:
            return
        if code == 130 and error is None:
            error = "stopped with Ctrl-C; the job has ended"
        self.code, self.error = code, error
        if orderly:
            self.kill_at = time.monotonic() + _ORDERLY
            return
        alive = [child for child in self.children if child.alive and child.joined]
        if not self.elsewhere or not alive:
            self._kill()
            return
        told = json.dumps({"code": code, "error": error}).encode() + b"\n"
        with contextlib.suppress(BrokenPipeError):  # it has died as well
            os.write(alive[0].lifeline, told)
        self.kill_at = time.monotonic() + _TOLD

    def _kill(self) -> None:
        for child in self.children:
            if child.alive:
                child.process.kill()
        for child in self.children:
            child.process.wait()


class _Terminal:
    """A program that is killed leaves the terminal as it was using it: without an echo, or without a cursor."""

    def __init__(self) -> None:
        self.settings: list[Any] | None = None
        try:
            import termios

            if os.isatty(0):
                self.settings = termios.tcgetattr(0)
        except (ImportError, OSError):
            pass  # there is no terminal

    def restore(self, interrupted: bool) -> None:
        if self.settings is not None and os.tcgetpgrp(0) == os.getpgrp():
            import termios

            termios.tcsetattr(0, termios.TCSADRAIN, self.settings)
        if interrupted and sys.stderr.isatty():
            sys.stderr.write("\n\033[?25h")


# What the processes write


def death(name: str, code: int, written: str) -> str:
    """Which process of a job died, and of what: one that ended with this code (negative: a signal) after writing this.

    jax ends a process whose coordination service has lost another one; it was the other, then, that died."""
    lost = _lost(written)
    if lost is not None:
        return lost
    hint = "" if os.environ.get("REALM_DEBUG") == "1" or code == -signal.SIGKILL else " (REALM_DEBUG=1 shows more)"
    if code >= 0:
        return f"{name} ended unexpectedly, with exit code {code}{hint}"
    try:
        cause = signal.Signals(-code).name
    except ValueError:
        cause = f"signal {-code}"
    return f"{name} was killed ({cause}){hint}"


def _lost(written: str) -> str | None:
    """Which ranks jax has lost, by what it wrote before it ended the process."""
    _, fatal, text = written.rpartition("JAX distributed service detected fatal errors")
    if not fatal:
        return None
    listed = re.search(r"stopped sending heartbeats\):([0-9,\s]+)", text)
    ranks = sorted({int(rank) for rank in re.findall(r"[0-9]+", listed[1])}) if listed else []
    if len(ranks) > 1:
        return f"ranks {', '.join(map(str, ranks))} stopped answering: their processes or machines have died"
    who = f"rank {ranks[0]}" if ranks else "rank 0, the coordinator,"
    return f"{who} stopped answering: its process or its machine has died"


_CHATTER = b"[Gloo] "
# A line of absl's or glog's log, and the first of the pages they write when a process aborts.
_NOISE = re.compile(
    r"^(WARNING: All log messages before absl|[IWEF][0-9]{4} [0-9:.]+ |[0-9]{4}-[0-9-]+ [0-9:.]+: [IWEF] |"
    r"\*\*\* (Check failure|SIG[A-Z]+ )|Fatal Python error|terminate called)",
    re.MULTILINE,
)


def without_noise(text: str) -> str:
    """What comes before the first line of jaxlib's own log in a piece of text that was written at once."""
    match = _NOISE.search(text)
    return text if match is None else text[: match.start()]


def without_chatter(data: bytes) -> tuple[bytes, bytes]:
    """Without the lines that gloo writes to stdout, in pieces, when processes connect; and the begin of one, to be put
    before what comes next."""
    rest = data.rpartition(b"\n")[2]
    held = rest if rest and _CHATTER.startswith(rest[: len(_CHATTER)]) else b""
    shown = data[: len(data) - len(held)]
    return b"".join(line for line in shown.splitlines(keepends=True) if not line.startswith(_CHATTER)), held
