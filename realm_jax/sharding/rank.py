"""The process of one rank: `python -m realm_jax.sharding.rank`, which a supervisor starts. It joins the job; rank 0
runs the command, the others follow; and it ends with its supervisor, whatever that died of.

Whoever ends first puts why under one key of the job's coordination service, where all others wait for it.
"""

import atexit
import builtins
import contextlib
import ctypes
import dataclasses
import io
import json
import os
import re
import runpy
import signal
import sys
import threading
import time
import traceback
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import import_module
from typing import Any, NoReturn

from realm_jax.errors import RealmError
from realm_jax.sharding.cluster import Cluster
from realm_jax.sharding.start import HEARTBEAT, coordination, start

_END = "realm/end"
_PR_SET_PDEATHSIG = 1
# An error of this kind is what the others see of a process that has died: who that was is known a little later.
_LOST = re.compile(
    r"the job's coordinator is lost|(JaxRuntimeError|XlaRuntimeError).*"
    r"(gloo|nccl|connection|broken pipe|socket|unavailable|deadline_exceeded|cancelled)",
    re.IGNORECASE | re.DOTALL,
)
_PATIENCE = HEARTBEAT + 3  # seconds
_builtin_input = input


@dataclass(frozen=True)
class Assignment:
    """What a supervisor tells the process of a rank.

    command: what it runs: ["realm", ARGUMENTS...], ["python", FILE, ARGUMENTS...], or ["follow", MODULE], which calls
      the module's follow() until rank 0 has ended.
    same: what must be the same in every process, by name.
    supervisor: its process id.
    lifeline, report, output, errors: numbers of open files: a pipe from the supervisor, which ends when it dies, and
      one to it; its own standard output and error.
    first: of the ranks of this supervisor, the one that speaks for it after its death.
    """

    cluster: Cluster
    command: list[str]
    same: dict[str, str]
    cpu_devices: int | None
    heartbeat: int
    timeout: float
    supervisor: int
    lifeline: int
    report: int
    output: int
    errors: int
    first: bool

    def text(self) -> str:
        return json.dumps(dataclasses.asdict(self), ensure_ascii=False)  # an argument's length is limited

    @classmethod
    def parse(cls, text: str) -> "Assignment":
        fields = json.loads(text)
        devices = fields["cluster"]["local_devices"]
        cluster = Cluster(**fields["cluster"] | {"local_devices": None if devices is None else tuple(devices)})
        return cls(**fields | {"cluster": cluster})


class _Errors(io.TextIOWrapper):
    """sys.stderr of the command. Keeps an error that may come of another's death until that is known."""

    def __init__(self, number: int):
        super().__init__(os.fdopen(number, "wb"), sys.stderr.encoding, "backslashreplace", line_buffering=True)
        self.kept = ""

    def write(self, text: str) -> int:
        if not (text.startswith("error: ") and _LOST.search(text)):
            return super().write(text)
        self.keep(text)
        return len(text)

    def keep(self, text: str) -> None:
        self.kept += text
        timer = threading.Timer(_PATIENCE, self.release)
        timer.daemon = True
        timer.start()

    def release(self) -> None:
        kept, self.kept = self.kept, ""
        super().write(kept)


class _Rank:
    """What the threads of this process share."""

    def __init__(self, assignment: Assignment):
        self.assignment = assignment
        self.lock = threading.Lock()
        self.joined = False
        self.ending = False  # once one thread has begun to end the process, no other does
        self.code = 1

    @property
    def name(self) -> str:
        return f"rank {self.assignment.cluster.rank}"

    def say(self, **message: Any) -> None:
        """To the supervisor."""
        with contextlib.suppress(BrokenPipeError):  # it has died, and the lifeline ends this process
            os.write(self.assignment.report, json.dumps(message).encode() + b"\n")

    def claim_end(self) -> bool:
        """Whether this thread is the one to end the process."""
        with self.lock:
            first, self.ending = not self.ending, True
            return first

    def announce(self, code: int, error: str | None, died: bool) -> None:
        """Tells all processes of the job why it ends: the first to do so is heard. died: one of them has."""
        if not self.joined or self.assignment.cluster.processes == 1:
            return
        try:
            coordination().key_value_set(_END, json.dumps({"code": code, "error": error, "died": died}))
        except Exception as failure:  # jaxlib's own: somebody was first, or the service has gone with rank 0
            if os.environ.get("REALM_DEBUG") == "1":
                print(f"announcing the end: {failure}", file=sys.stderr)

    def await_end(self) -> None:
        """A thread: ends this process when another has announced the end of the job."""
        while True:
            try:
                end = json.loads(coordination().blocking_key_value_get(_END, 3_600_000))
                break
            except Exception:  # jaxlib's own: the hour is over, or the service has gone, which ends this process
                time.sleep(1)
        if self.claim_end():
            self.say(code=end["code"], error=end["error"])
            self.leave(end["died"])
            os._exit(end["code"] & 0xFF)

    def leave(self, died: bool = False) -> bool:
        """Leaves the job, together with the others if they are all alive. Whether they did."""
        if not self.joined or self.assignment.cluster.processes == 1:
            return True
        if died:
            if self.assignment.cluster.rank == 0:
                time.sleep(1)  # the others hear of it from here
            return False
        import jax

        try:
            jax.distributed.shutdown()
        except Exception:  # jaxlib's own: somebody does not leave, and the supervisors know it
            return False
        return True

    def fail(self, code: int, error: str) -> NoReturn:
        """Ends this process, and the job, with an error."""
        if self.claim_end():
            self.say(code=code, error=error)
            self.announce(code, error, died=False)
            self.leave()
            os._exit(code)
        while True:  # another thread is about to
            time.sleep(1)

    def watch_supervisor(self) -> None:
        """A thread: hears why the job has ended, and ends this process when its supervisor dies."""
        with os.fdopen(self.assignment.lifeline, "rb") as lifeline:
            for line in lifeline:
                self.announce(**json.loads(line), died=True)
        error = f"the launcher of {self.name} was killed; the job has ended"
        if self.assignment.first and self.claim_end():
            with contextlib.suppress(OSError):  # nobody reads it any more
                os.write(self.assignment.errors, f"error: {error}\n".encode())
            threading.Timer(2, os.kill, (os.getpid(), signal.SIGKILL)).start()
            self.announce(1, error, died=True)
            self.leave(died=True)
        os.kill(os.getpid(), signal.SIGKILL)

    def end_command(self) -> None:
        """After everything that the command has left for the end of the interpreter."""
        if isinstance(sys.stderr, _Errors) and sys.stderr.kept:
            time.sleep(_PATIENCE)  # for whoever knows better to end this process
            sys.stderr.release()
        if not self.claim_end():
            while True:
                time.sleep(1)
        shown = {0: None, 130: f"{self.name} was stopped with Ctrl-C; the job has ended"}
        code = self.code & 0xFF
        self.say(code=code, error=None)  # first: the others' supervisors say more, having seen less
        error = shown.get(code, f"{self.name} ended with exit code {code}; the job has ended")
        self.announce(code, error, died=False)
        if not self.leave():
            sys.stdout.flush()
            os._exit(code)  # jax would try again, and say more about it


def main(arguments: Sequence[str]) -> int:
    """Runs what the assignment says and returns the exit code."""
    assignment = Assignment.parse(arguments[0])
    for number in (assignment.lifeline, assignment.report, assignment.output, assignment.errors):
        os.set_inheritable(number, False)  # by processes that the command starts
    rank = _Rank(assignment)
    _end_with_supervisor(rank)
    if assignment.cluster.rank == 0:
        _take_streams(assignment)
    try:
        start(
            assignment.cluster,
            assignment.same,
            cpu_devices=assignment.cpu_devices,
            heartbeat=assignment.heartbeat,
            timeout=assignment.timeout,
        )
    except (RealmError, KeyboardInterrupt) as error:
        rank.joined = coordination() is not None
        if isinstance(error, KeyboardInterrupt):
            rank.fail(130, f"{rank.name} was stopped with Ctrl-C; the job has ended")
        rank.fail(2, str(error))
    rank.joined = True
    if assignment.cluster.processes > 1:
        threading.Thread(target=rank.await_end, daemon=True).start()
    rank.say(joined=True)
    if assignment.command[0] == "follow":
        _follow(rank, assignment.command[1])
    atexit.register(rank.end_command)  # after jax's own handler, and so called before it
    rank.code = _run(assignment.command)
    return rank.code


def _end_with_supervisor(rank: _Rank) -> None:
    assignment = rank.assignment
    if sys.platform == "linux" and not assignment.first:  # the first says first why
        libc = ctypes.CDLL(None, use_errno=True)
        if libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0):
            raise OSError(ctypes.get_errno(), "prctl")
        if os.getppid() != assignment.supervisor:
            os.kill(os.getpid(), signal.SIGKILL)  # it died before this
    threading.Thread(target=rank.watch_supervisor, daemon=True).start()


def _take_streams(assignment: Assignment) -> None:
    """What Python writes goes to the user; what C++ writes, to stdout as well, the supervisor sifts."""
    buffer = os.fdopen(os.dup(assignment.output), "wb")
    line = buffer.isatty()
    sys.stdout = io.TextIOWrapper(buffer, sys.stdout.encoding, sys.stdout.errors, line_buffering=line)
    sys.stderr = _Errors(os.dup(assignment.errors))
    if line and sys.stdin.isatty():
        builtins.input = _input
    # A Ctrl-C on a terminal reaches all processes in its foreground, one that is sent to the supervisor only that: it
    # is told of signals here, so as to pass on what did not arrive.
    os.set_blocking(assignment.report, False)
    signal.set_wakeup_fd(assignment.report, warn_on_full_buffer=False)


def _input(prompt: object = "", /) -> str:
    """input(), which edits lines only where it finds the terminal as file 1."""
    sifted, ours = os.dup(1), sys.stdout
    os.dup2(ours.fileno(), 1)
    try:
        sys.stdout = sys.__stdout__
        return _builtin_input(prompt)
    finally:
        sys.stdout = ours
        os.dup2(sifted, 1)
        os.close(sifted)


def _follow(rank: _Rank, module: str) -> NoReturn:
    try:
        follow = import_module(module).follow
        while True:  # it may return after one of several models; the end of rank 0 ends this
            follow()
    except KeyboardInterrupt:
        rank.fail(130, f"{rank.name} was stopped with Ctrl-C; the job has ended")
    except Exception as error:
        if _LOST.search(f"{type(error).__name__}: {error}"):
            time.sleep(_PATIENCE)  # for whoever knows better to end this process
        if os.environ.get("REALM_DEBUG") == "1":
            traceback.print_exc()
        known = isinstance(error, RealmError)
        shown = str(error) if known else f"internal error, please report it: {type(error).__name__}: {error}"
        rank.fail(2 if known else 1, f"{rank.name}: {shown}")


def _run(command: Sequence[str]) -> int:
    """Runs a command in this interpreter, as if it had been started with it. Returns its exit code."""
    program, *rest = command
    try:
        if program == "python":
            sys.argv = rest
            sys.path.insert(0, os.path.dirname(os.path.abspath(rest[0])))
            runpy.run_path(rest[0], run_name="__main__")
        else:
            sys.argv = [program, *rest]
            runpy.run_module("realm_jax.cli", run_name="__main__", alter_sys=True)
    except SystemExit as end:
        if end.code is None or isinstance(end.code, int):
            return end.code or 0
        print(end.code, file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    except Exception as error:
        trace = error.__traceback__
        while trace is not None and trace.tb_frame.f_code.co_filename != rest[0]:
            trace = trace.tb_next  # what lies above the user's own file
        text = "".join(traceback.format_exception(type(error), error, trace))
        if isinstance(sys.stderr, _Errors) and _LOST.search(text):
            sys.stderr.keep(text)
        else:
            sys.stderr.write(text)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
