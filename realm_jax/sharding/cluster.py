"""Who is in a job of several processes: said by flags, or by a scheduler in the environment. No jax in here."""

import re
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from realm_jax.errors import ClusterError

MAX_PROCESSES = 1 << 16
_MAX_LOCAL = 256  # of them on one machine
LOCAL = ("localhost", "127.0.0.1", "[::1]")

# Where a scheduler names no port, all ranks count one out of the job's id: the upper end of the ephemeral ports.
_FIRST_PORT = 61440
_PORTS = 4096
_KUBERNETES_PORT = 61439
_HOST_PORT = re.compile(r"(\[[0-9A-Fa-f:.]+\]|[A-Za-z0-9_.-]+):([0-9]{1,5})")

Environment = Mapping[str, str]


@dataclass(frozen=True)
class Cluster:
    """One process's place in a job.

    coordinator: "host:port" where rank 0 serves the job's coordination; "" for a job of one process.
    local_devices: of the GPUs of this machine, those that this process uses; None: all it sees.
    source: where all this was said: "flags", "SLURM", "Open MPI", "torchrun", "Kubernetes" or "one process".
    """

    coordinator: str
    processes: int
    rank: int
    local_devices: tuple[int, ...] | None
    source: str


def local_cluster(processes: int, coordinator: str, devices_per_process: int | None) -> list[Cluster]:
    """All ranks of a job on this machine, each with its own GPUs where there are any."""
    check_count("--processes", processes, _MAX_LOCAL)
    each = devices_per_process or 1
    return [
        Cluster(coordinator, processes, rank, tuple(range(rank * each, (rank + 1) * each)), "flags")
        for rank in range(processes)
    ]


def find_cluster(
    environment: Environment,
    *,
    processes: int | None = None,
    rank: int | None = None,
    coordinator: str | None = None,
    devices_per_process: int | None = None,
) -> Cluster:
    """This process's place, from the flags if all three are given, else from the environment (--coordinator then names
    another address), else a job of one process.

    The innermost starter counts: torchrun, then Open MPI, SLURM, Kubernetes.

    Raises:
      ClusterError: what is said is incomplete, out of range, or contradicts itself; the message names the variables.
    """
    if devices_per_process is not None:
        check_count("--devices-per-process", devices_per_process, MAX_PROCESSES)
    if coordinator is not None:
        check_coordinator("--coordinator", coordinator)
    if processes is not None or rank is not None:
        return _from_flags(environment, processes, rank, coordinator, devices_per_process)
    found = from_environment(environment, coordinator, devices_per_process)
    if found is None:
        if coordinator is not None:
            raise ClusterError("--coordinator needs --processes and --rank, or a scheduler that names them")
        return Cluster("", 1, 0, first_devices(devices_per_process), "one process")
    return found


def from_environment(
    environment: Environment, coordinator: str | None = None, devices_per_process: int | None = None
) -> Cluster | None:
    """What a scheduler says, or None if there is none. ClusterError where it says only part of it."""
    for is_there, read in _SCHEDULERS:
        if is_there(environment):
            cluster = read(environment, coordinator, devices_per_process)
            return cluster if cluster.processes > 1 else Cluster("", 1, 0, cluster.local_devices, cluster.source)
    return None


def check_count(name: str, value: int, most: int) -> None:
    if not 1 <= value <= most:
        raise ClusterError(f"{name} is {value}; accepted: 1 to {most:,}")


def check_coordinator(name: str, address: str) -> None:
    match = _HOST_PORT.fullmatch(address)
    if match is None or not 0 < int(match[2]) < 1 << 16:
        raise ClusterError(f"{name} is {address!r}; accepted: HOST:PORT, such as node1:{_KUBERNETES_PORT}")


def _from_flags(
    environment: Environment, processes: int | None, rank: int | None, coordinator: str | None, devices: int | None
) -> Cluster:
    flags = {"--processes": processes, "--rank": rank, "--coordinator": coordinator}
    if processes is None or rank is None or coordinator is None:
        missing = " and ".join(name for name, value in flags.items() if value is None)
        given = " and ".join(name for name, value in flags.items() if value is not None)
        raise ClusterError(f"{given} needs {missing} too; accepted: --processes N alone starts all N here")
    check_count("--processes", processes, MAX_PROCESSES)
    check_rank("--rank", rank, processes)
    refuse_contradiction(environment, processes, rank)
    return Cluster(coordinator if processes > 1 else "", processes, rank, first_devices(devices), "flags")


def first_devices(count: int | None) -> tuple[int, ...] | None:
    return None if count is None else tuple(range(count))


def check_rank(name: str, rank: int, processes: int) -> None:
    if not 0 <= rank < processes:
        raise ClusterError(f"{name} is {rank}; accepted in a job of {processes} processes: 0 to {processes - 1}")


def refuse_contradiction(environment: Environment, processes: int, rank: int | None) -> None:
    """Refuses flags for another job than the one that a scheduler has started.

    rank: None where all ranks are to start here, which a process that a scheduler has started must not do.
    """
    try:
        found = from_environment(environment)
    except ClusterError:
        return  # the flags say it all
    if found is not None and found.processes > 1 and (found.processes, found.rank) != (processes, rank):
        flags = f"--processes {processes}" + ("" if rank is None else f" --rank {rank}")
        raise ClusterError(
            f"{flags} contradicts {found.source}, which has started {found.processes} processes, this one being rank "
            f"{found.rank}; accepted: leave the flags out, or start the command outside {found.source}"
        )


# Schedulers


def _torchrun(environment: Environment, coordinator: str | None, devices: int | None) -> Cluster:
    read = _Variables("torchrun", environment)
    processes, rank = read.place("WORLD_SIZE", "RANK")
    if coordinator is None and processes > 1:
        # torchrun itself listens on MASTER_PORT, on the machine of rank 0.
        port = read.integer("MASTER_PORT") + (environment.get("TORCHELASTIC_USE_AGENT_STORE") == "True")
        coordinator = read.address("MASTER_ADDR", port)
    local_rank, local_size = read.optional("LOCAL_RANK"), read.optional("LOCAL_WORLD_SIZE")
    return Cluster(
        coordinator or "", processes, rank, _devices(environment, local_rank, local_size, devices), read.source
    )


def _open_mpi(environment: Environment, coordinator: str | None, devices: int | None) -> Cluster:
    read = _Variables("Open MPI", environment)
    processes, rank = read.place("OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_RANK")
    local_rank = read.optional("OMPI_COMM_WORLD_LOCAL_RANK")
    local_size = read.optional("OMPI_COMM_WORLD_LOCAL_SIZE")
    if coordinator is None and processes > 1:
        coordinator = _open_mpi_coordinator(environment, local_size == processes)
    return Cluster(
        coordinator or "", processes, rank, _devices(environment, local_rank, local_size, devices), read.source
    )


def _open_mpi_coordinator(environment: Environment, all_here: bool) -> str:
    uri = environment.get("OMPI_MCA_orte_hnp_uri", "")
    job = environment.get("PMIX_NAMESPACE") or uri
    if not job:
        raise ClusterError("Open MPI's PMIX_NAMESPACE is not set; accepted: --coordinator HOST:PORT")
    port = _port(environment, zlib.crc32(job.encode()))
    if all_here:
        return f"127.0.0.1:{port}"
    # Only before Open MPI 5: the addresses of mpirun, where rank 0 is unless a host file says otherwise.
    match = re.search(r"tcp://([^,:]+)|tcp6://\[([^],]+)", uri)
    if match is None:
        raise ClusterError("Open MPI does not say on which machine rank 0 is; accepted: --coordinator HOST:PORT")
    return f"{match[1]}:{port}" if match[1] else f"[{match[2]}]:{port}"


def _slurm(environment: Environment, coordinator: str | None, devices: int | None) -> Cluster:
    read = _Variables("SLURM", environment)
    count = "SLURM_STEP_NUM_TASKS" if "SLURM_STEP_NUM_TASKS" in environment else "SLURM_NTASKS"
    processes, rank = read.place(count, "SLURM_PROCID")
    if coordinator is None and processes > 1:
        nodes = "SLURM_STEP_NODELIST" if "SLURM_STEP_NODELIST" in environment else "SLURM_JOB_NODELIST"
        job, step = read.integer("SLURM_JOB_ID"), read.optional("SLURM_STEP_ID") or 0
        coordinator = f"{first_node(nodes, read.text(nodes))}:{_port(environment, job + step)}"
    here = environment.get("SLURM_STEP_TASKS_PER_NODE", environment.get("SLURM_TASKS_PER_NODE", ""))
    each = [int(size) for size in re.findall(r"(?:^|,)([0-9]{1,6})", here)]  # "2(x3),1"
    local_rank = read.optional("SLURM_LOCALID")
    return Cluster(
        coordinator or "",
        processes,
        rank,
        _devices(environment, local_rank, max(each, default=None), devices),
        read.source,
    )


def _kubernetes(environment: Environment, coordinator: str | None, devices: int | None) -> Cluster:
    """An indexed Job whose pods find each other through a headless service. Kubernetes tells a pod its index and its
    name (JOB-INDEX), but neither how many there are nor the service: REALM_PROCESSES and REALM_SERVICE (default: the
    job's name) do."""
    read = _Variables("Kubernetes", environment)
    processes, rank = read.place("REALM_PROCESSES", "JOB_COMPLETION_INDEX")
    if coordinator is None and processes > 1:
        job, dash, index = read.text("HOSTNAME").rpartition("-")
        if not dash or not job or index != str(rank):
            raise ClusterError(
                f"HOSTNAME is {environment['HOSTNAME']!r}; accepted for JOB_COMPLETION_INDEX {rank} of an indexed Job: "
                f"JOB-{rank} (or --coordinator HOST:PORT)"
            )
        coordinator = f"{job}-0.{environment.get('REALM_SERVICE') or job}:{_port(environment, None)}"
        check_coordinator("the coordinator from HOSTNAME and REALM_SERVICE", coordinator)
    return Cluster(coordinator or "", processes, rank, _devices(environment, None, None, devices), read.source)


_SCHEDULERS: list[tuple[Callable[[Environment], bool], Callable[[Environment, str | None, int | None], Cluster]]] = [
    (lambda env: "WORLD_SIZE" in env or "RANK" in env, _torchrun),
    (lambda env: "OMPI_COMM_WORLD_RANK" in env or "OMPI_COMM_WORLD_SIZE" in env, _open_mpi),
    (lambda env: "SLURM_PROCID" in env, _slurm),
    (lambda env: "JOB_COMPLETION_INDEX" in env, _kubernetes),
]


def _devices(
    environment: Environment, local_rank: int | None, local_size: int | None, each: int | None
) -> tuple[int, ...] | None:
    """The GPUs of a rank: one, or so many as --devices-per-process says, where a machine has several ranks that all see
    the same GPUs; else all that it sees."""
    visible = environment.get("CUDA_VISIBLE_DEVICES", environment.get("ROCR_VISIBLE_DEVICES"))
    several = (local_size or 1) > 1 or (local_size is None and (local_rank or 0) > 0)
    bound = visible is not None and len(visible.split(",")) <= (each or 1)  # by the scheduler, to this rank
    if local_rank is None or not several or bound:
        return None if bound else first_devices(each)
    return tuple(range(local_rank * (each or 1), (local_rank + 1) * (each or 1)))


def _port(environment: Environment, number: int | None) -> int:
    """JAX_COORDINATOR_PORT, or one out of a job's number, which is another for most jobs."""
    if "JAX_COORDINATOR_PORT" in environment:
        port = _Variables("the environment", environment).integer("JAX_COORDINATOR_PORT")
        check_count("JAX_COORDINATOR_PORT", port, (1 << 16) - 1)
        return port
    return _KUBERNETES_PORT if number is None else _FIRST_PORT + number % _PORTS


@dataclass(frozen=True)
class _Variables:
    """Reads what one scheduler says; what is missing or malformed is refused by its name."""

    source: str
    environment: Environment

    def text(self, name: str) -> str:
        value = self.environment.get(name, "").strip()
        if not value:
            others = ", ".join(sorted(key for key in self.environment if key in _NAMES[self.source])) or "nothing else"
            raise ClusterError(
                f"{name} is not set, and {self.source} needs it (set: {others}); accepted: set it, unset the others, "
                "or --processes, --rank and --coordinator"
            )
        return value

    def integer(self, name: str) -> int:
        value = self.text(name)
        if re.fullmatch("[0-9]{1,10}", value) is None:
            raise ClusterError(f"{name} is {value!r}; accepted: a whole number")
        return int(value)

    def optional(self, name: str) -> int | None:
        return self.integer(name) if self.environment.get(name, "").strip() else None

    def place(self, count: str, index: str) -> tuple[int, int]:
        """Processes and rank."""
        rank, processes = self.integer(index), self.integer(count)
        check_count(count, processes, MAX_PROCESSES)
        if rank >= processes:
            raise ClusterError(f"{index} is {rank}, but {count} is {processes}; accepted: 0 to {processes - 1}")
        return processes, rank

    def address(self, name: str, port: int) -> str:
        host = self.text(name)
        address = f"[{host}]:{port}" if ":" in host and not host.startswith("[") else f"{host}:{port}"
        check_coordinator(f"{name} with its port", address)
        return address


_NAMES = {
    "torchrun": {"RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"},
    "Open MPI": {"OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_RANK"},
    "SLURM": {"SLURM_PROCID", "SLURM_NTASKS", "SLURM_JOB_ID", "SLURM_JOB_NODELIST", "SLURM_STEP_NODELIST"},
    "Kubernetes": {"JOB_COMPLETION_INDEX", "REALM_PROCESSES", "HOSTNAME"},
    "the environment": set(),
}


def first_node(name: str, text: str) -> str:
    """The first host of a SLURM node list, such as "gpu[01-03,7]-a,login". ClusterError, naming the variable it came
    from, where it is none."""
    entry = r"(?:[A-Za-z0-9_.-]|\[[0-9]+(?:-[0-9]+)?(?:,[0-9]+(?:-[0-9]+)?)*\])+"
    if re.fullmatch(f"{entry}(?:,{entry})*", text) is None:
        raise ClusterError(f"{name} is {text!r}; accepted: host names such as gpu[01-03,7],login")
    first = re.match(entry, text)
    assert first is not None
    return re.sub(r"\[([0-9]+)[^\]]*\]", r"\1", first[0])
