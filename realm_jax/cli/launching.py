"""scripts/launch_sharded.py: a command of realm, or a Python file, over several processes."""

import argparse
import os
import re
import shlex
import shutil
import socket
import subprocess
import sys
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

import typer
from typer.main import get_command

from realm_jax.cli import open_standard_streams
from realm_jax.cli.app import app, explain
from realm_jax.cli.options import given
from realm_jax.cli.output import one_line
from realm_jax.errors import InvalidRequestError
from realm_jax.sharding.cluster import Cluster, find_cluster, first_devices, local_cluster, refuse_contradiction
from realm_jax.sharding.mesh import MAX_DEVICES, MeshShape
from realm_jax.sharding.supervisor import Job, supervise

_SHOWN = 160  # characters of a command in messages
_DESCRIPTION = """\
Runs a model on the devices of several processes: rank 0 runs COMMAND, the others follow it.

COMMAND is one of realm's (generate MODEL -p TEXT, chat MODEL, ...), or python FILE.py, which makes its LLM or Engine
with mesh=... itself.
"""
_EPILOG = """\
One of these says which processes there are, the first that is there:
  --processes N             starts all N here
  --processes N --rank R --coordinator HOST:PORT
                            this is rank R of N; rank 0 is on HOST, where PORT is free; once for each rank
  torchrun and the like     RANK, WORLD_SIZE, MASTER_ADDR, MASTER_PORT, LOCAL_RANK
  Open MPI                  OMPI_COMM_WORLD_RANK, OMPI_COMM_WORLD_SIZE, OMPI_COMM_WORLD_LOCAL_RANK
  SLURM (srun)              SLURM_PROCID, SLURM_NTASKS, SLURM_JOB_ID, SLURM_STEP_NODELIST, SLURM_LOCALID
  Kubernetes                an indexed Job with a headless service: JOB_COMPLETION_INDEX and HOSTNAME, which it sets;
                            REALM_PROCESSES: completions; REALM_SERVICE: the service, if not named like the Job
  none of them              one process
With a scheduler, --coordinator names another address of rank 0 and JAX_COORDINATOR_PORT another port.

When a process ends or dies, all end, with one line that says which and why (REALM_DEBUG=1: everything that they wrote).
The exit code is COMMAND's; 130 after Ctrl-C, 143 after SIGTERM, 2 where the job could not start, 1 when a process died.

examples:
  scripts/launch_sharded.py --processes 4 --mesh tensor=4 generate MODEL -p "The capital of France is"
  scripts/launch_sharded.py --devices-per-process 8 --mesh tensor=4,data=2 chat MODEL     # 8 virtual devices of a CPU
  srun -N 2 --ntasks-per-node 8 scripts/launch_sharded.py --mesh tensor=16 chat MODEL
  scripts/launch_sharded.py --dry-run --processes 8 --mesh tensor=8 generate MODEL -p x
"""


def main(arguments: Sequence[str]) -> int:
    """Runs one command line and returns the exit code. An error of the user's is one line on stderr."""
    open_standard_streams()
    try:
        return _launch(_parser().parse_args(arguments))
    except typer.Exit as end:
        return end.exit_code
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:  # the reader of a plan went away
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except Exception as error:
        if os.environ.get("REALM_DEBUG") == "1":
            raise
        message, code = explain(error)
        print(f"error: {one_line(message)}", file=sys.stderr)
        return code


def _launch(options: argparse.Namespace) -> int:
    ranks = _ranks(options)
    each = options.devices_per_process
    several = ranks[0].processes > 1 or (each or 1) > 1
    command, asked = _command(options.command, options.mesh, "auto" if several else None)
    if options.dry_run:
        _plan(asked, ranks[0].processes, each, options.topology)
        return 0
    if options.topology is not None:
        raise InvalidRequestError("--topology needs --dry-run: a job runs on the devices that there are")
    return supervise(
        Job(
            ranks,
            command,
            ["follow", "realm_jax.engine.follower"],
            same={"command": _shown(command)},
            cpu_devices=each,
            interactive=command[:2] == ["realm", "chat"],
            timeout=options.start_timeout,
        )
    )


def _ranks(options: argparse.Namespace) -> list[Cluster]:
    """Those that this process is to start."""
    each = options.devices_per_process
    if options.processes is not None and options.rank is None and options.coordinator is None:
        refuse_contradiction(os.environ, options.processes, None)
        if options.processes != 1:
            return local_cluster(options.processes, f"127.0.0.1:{_free_port()}", each)
        return [Cluster("", 1, 0, first_devices(each), "flags")]
    cluster = find_cluster(
        os.environ,
        processes=options.processes,
        rank=options.rank,
        coordinator=options.coordinator,
        devices_per_process=each,
    )
    return [cluster]


def _command(words: Sequence[str], mesh: str | None, default: str | None) -> tuple[list[str], dict[str, Any]]:
    """The command line of rank 0, with its mesh, and the options that realm's command has understood."""
    for optional in ("--", "realm"):
        words = words[1:] if words[:1] == [optional] else words
    if not words:
        raise InvalidRequestError("COMMAND is missing, such as: generate MODEL -p TEXT, or python FILE.py")
    name, *rest = words
    if mesh is not None and mesh != "auto":
        MeshShape.parse(mesh)
    if name == "python":
        if mesh is not None:
            raise InvalidRequestError("--mesh is for realm's commands; a Python file gives mesh= to its LLM or Engine")
        if not rest or rest[0].startswith("-") or not Path(rest[0]).is_file():
            shown = repr(rest[0]) if rest else "missing"
            raise InvalidRequestError(f"the file of `python FILE.py` is {shown}; accepted: a file that is there")
        return ["python", *rest], {}
    commands = {
        command.name: command
        for command in get_command(app).commands.values()  # type: ignore[attr-defined]  # app has several
        if any(parameter.name == "mesh" for parameter in command.params) and command.name != "plan"
    }
    if name not in commands:
        raise InvalidRequestError(f"COMMAND is {name!r}; accepted: {', '.join(sorted(commands))}, or python FILE.py")
    with commands[name].make_context(f"realm {name}", list(rest)) as context:  # a mistake is found before all start
        asked = dict(context.params)
    if mesh is not None and asked["mesh"] not in (None, mesh):
        raise InvalidRequestError(
            f"--mesh is {mesh!r} before and {asked['mesh']!r} after {name}; accepted: one of them"
        )
    chosen = mesh or default
    if asked["mesh"] is None and chosen is not None:
        asked["mesh"] = chosen
        rest = ["--mesh", chosen, *rest]
    return ["realm", name, *rest], asked


def _shown(command: Sequence[str]) -> str:
    """A command line, shortened so that others look otherwise."""
    text = shlex.join(command)
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}... ({zlib.crc32(text.encode()):08x})"


def _plan(asked: dict[str, Any], processes: int, each: int | None, topology: str | None) -> None:
    """Prints what the job would need and could reach."""
    from realm_jax import planning, registry

    if not asked:
        raise InvalidRequestError(
            "--dry-run plans realm's commands; what a Python file does is not known before it runs"
        )
    if topology is None:
        cards = graphics_cards()
        kind = topology_kind(cards) if cards else "cpu"
        topology = f"{kind}:{processes * (each or (len(cards) if cards and processes == 1 else 1))}"
    model = asked["model"] or registry.default_name()
    plan = planning.plan(model, topology, asked.get("mesh"), **given(context=asked.get("context_length")))
    print(f"{processes} process{'es' * (processes > 1)}, {plan.devices} devices\n")
    print(planning.render(plan))


def graphics_cards() -> list[str]:
    """Names of this machine's NVIDIA GPUs, as its driver gives them."""
    program = shutil.which("nvidia-smi")
    if program is None:
        return []
    query = [program, "--query-gpu=name", "--format=csv,noheader"]
    return subprocess.run(query, capture_output=True, text=True, timeout=20).stdout.splitlines()


def topology_kind(cards: Sequence[str]) -> str:
    """The name that `realm plan` has for GPUs of which the driver gives these names."""
    from realm_jax.planning import DEVICES

    for kind, device in DEVICES.items():
        words = [word for word in device.name.split() if word not in ("NVIDIA", "GB")]
        if device.platform == "gpu" and all(re.search(rf"\b{word}(?![0-9])", cards[0]) for word in words):
            return kind
    raise InvalidRequestError(f"no figures are known of {cards[0]!r}; accepted: --topology KIND:N, such as h100:8")


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise InvalidRequestError(f"{message} ({self.prog} --help shows what is accepted)")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        "launch_sharded.py",
        usage="launch_sharded.py [OPTIONS] COMMAND ...",
        description=_DESCRIPTION,
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--processes", type=int, metavar="N", help="processes of the job")
    parser.add_argument("--rank", type=int, metavar="R", help="which of them this is, from 0")
    parser.add_argument("--coordinator", metavar="HOST:PORT", help="where rank 0 coordinates the job")
    parser.add_argument("--mesh", help="devices to spread over, such as tensor=4,data=2 (default: auto)")
    parser.add_argument(
        "--devices-per-process",
        type=_positive,
        metavar="K",
        help="GPUs of each process (default: 1 where a machine has several processes, else all), or virtual devices "
        "made of a CPU (default: 1)",
    )
    parser.add_argument(
        "--start-timeout",
        type=_positive,
        default=120,
        metavar="S",
        help="seconds in which all must come (default: 120)",
    )
    parser.add_argument(
        "--dry-run",
        action="store_true",
        help="start nothing; print the mesh, bytes per device, collectives and limits in tokens per second",
    )
    parser.add_argument(
        "--topology", metavar="KIND:N", help="with --dry-run: other devices than this machine's, such as h100:8"
    )
    parser.add_argument("command", nargs=argparse.REMAINDER, metavar="COMMAND", help=argparse.SUPPRESS)
    return parser


def _positive(text: str) -> int:
    value = int(text)
    if not 1 <= value <= MAX_DEVICES:
        raise argparse.ArgumentTypeError(f"{value} is not in 1 to {MAX_DEVICES}")
    return value
