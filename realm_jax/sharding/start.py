"""Joining a job: jax.distributed, and the check that all its processes run the same thing."""

import json
import logging
import os
import platform
import re
import socket
import sys
import time
import zlib
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from realm_jax.errors import ClusterError
from realm_jax.sharding.cluster import LOCAL, Cluster

HEARTBEAT = 5  # seconds without a sign of life after which the coordination service gives a process up
LEAVING = 5  # seconds that processes which end wait for each other

# What decides which programs are compiled, and so must be the same everywhere.
_SETTINGS = ("JAX_PLATFORMS", "XLA_FLAGS", "JAX_ENABLE_X64", "JAX_DEFAULT_MATMUL_PRECISION", "REALM_NATIVE_ISA")


def start(
    cluster: Cluster,
    same: Mapping[str, str],
    *,
    cpu_devices: int | None = None,
    heartbeat: int = HEARTBEAT,
    timeout: float = 120,
) -> None:
    """Joins the job and returns when all its processes have, and are found to be alike. Before any use of jax.

    Args:
      same: what else must be the same in every process, by name.
      cpu_devices: virtual devices that this process makes of its CPU, where jax runs on that; None: one.
      heartbeat: seconds.
      timeout: seconds until all must be there.

    Raises:
      ClusterError: in every process that can be reached, if the processes differ; the coordinator's port is in use, it
        does not answer, or other processes do not come in time.
    """
    import jax

    deadline = time.monotonic() + timeout
    if cpu_devices is not None:
        jax.config.update("jax_num_cpu_devices", cpu_devices)
    if cluster.processes == 1:
        if cluster.local_devices is not None:
            jax.config.update("jax_cuda_visible_devices", ",".join(map(str, cluster.local_devices)))
        return
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    _avoid_proxy(_address(cluster.coordinator)[0])
    if cluster.rank == 0:
        _check_port(cluster.coordinator)
    else:
        _await_coordinator(cluster.coordinator, deadline, timeout)
    try:
        jax.distributed.initialize(
            cluster.coordinator,
            cluster.processes,
            cluster.rank,
            local_device_ids=cluster.local_devices,
            cluster_detection_method="deactivate",  # `cluster` has done that
            initialization_timeout=max(1, round(deadline - time.monotonic())),
            heartbeat_timeout_seconds=heartbeat,
            shutdown_timeout_seconds=LEAVING,
            # Nobody outside is let in where all processes are on this machine.
            coordinator_bind_address=cluster.coordinator if _host(cluster.coordinator) in LOCAL else None,
        )
    except Exception as error:  # jax raises RuntimeError, ValueError and its own, by version
        raise _explained(cluster, error, timeout) from error
    try:
        _agree(cluster, "environment", _environment() | dict(same), deadline)
        _agree(cluster, "devices", _devices(), deadline)
    except ClusterError:
        raise
    except Exception as error:
        raise _explained(cluster, error, timeout) from error


def coordination() -> Any:
    """The client of the job's coordination service, which keeps keys and values; None outside a job."""
    from jax._src import distributed  # jax.distributed has no name for it

    return distributed.global_state.client


def difference(facts: list[Mapping[str, str]]) -> str | None:
    """What the first rank that is not like rank 0 has otherwise, in a line; None: they are alike."""
    for rank, mine in enumerate(facts):
        names = [name for name, value in facts[0].items() if mine.get(name) != value]
        if names:
            theirs = ", ".join(f"{name} {mine.get(name, 'unknown')}" for name in names)
            ours = ", ".join(f"{name} {facts[0][name]}" for name in names)
            return f"rank {rank} has {theirs}, and rank 0 has {ours}; accepted: the same in all processes of a job"
    return None


def _agree(cluster: Cluster, subject: str, facts: Mapping[str, str], deadline: float) -> None:
    """Rank 0 compares the facts of all ranks and tells all what it found."""
    client = coordination()

    def read(key: str) -> str:
        return str(client.blocking_key_value_get(key, max(1, round(1000 * (deadline - time.monotonic())))))

    client.key_value_set(f"realm/{subject}/{cluster.rank}", json.dumps(facts))
    if cluster.rank == 0:
        found = difference([json.loads(read(f"realm/{subject}/{rank}")) for rank in range(cluster.processes)])
        client.key_value_set(f"realm/{subject}", found or "alike")
    verdict = read(f"realm/{subject}")
    if verdict != "alike":
        raise ClusterError(verdict)


def _environment() -> dict[str, str]:
    import jax
    import jaxlib

    settings = {name: os.environ.get(name, "") or "unset" for name in _SETTINGS}
    return {
        "Python": f"{sys.version_info.major}.{sys.version_info.minor}",
        "jax": jax.__version__,
        "jaxlib": jaxlib.__version__,
        "realm-jax": _realm_version(),
        "processor": platform.machine(),
    } | settings


def _realm_version() -> str:
    """With a sum of the sources: checkouts of one version differ."""
    total = 0
    for package in ("realm_jax", "pallas_kernels"):
        spec = find_spec(package)
        for folder in (spec and spec.submodule_search_locations) or []:
            for path in sorted(Path(folder).rglob("*.py")):
                total = zlib.crc32(path.read_bytes(), total)
    try:
        released = version("realm-jax")
    except PackageNotFoundError:
        released = "not installed"
    return f"{released} ({total:08x})"


def _devices() -> dict[str, str]:
    import jax

    devices = jax.local_devices()
    return {
        "platform": devices[0].platform,
        "device kind": devices[0].device_kind,
        "number of devices": str(len(devices)),
    }


def _avoid_proxy(host: str) -> None:
    """gRPC would ask a proxy that the environment names for the way to the coordinator, and jax warns of it."""
    direct = [os.environ[name] for name in ("no_grpc_proxy", "no_proxy") if os.environ.get(name)][:1]
    os.environ["no_grpc_proxy"] = ",".join([*direct, host])  # noqa: SIM112  (gRPC's own name)
    logging.getLogger("jax._src.distributed").setLevel(logging.ERROR)


def _host(coordinator: str) -> str:
    return coordinator.rpartition(":")[0]


def _address(coordinator: str) -> tuple[str, int]:
    host, _, port = coordinator.rpartition(":")
    return host.strip("[]"), int(port)


def _check_port(coordinator: str) -> None:
    """The service itself would share a port that is in use: gRPC sets SO_REUSEPORT."""
    host, port = _address(coordinator)
    family, address = (socket.AF_INET6, "::") if socket.has_dualstack_ipv6() else (socket.AF_INET, "0.0.0.0")
    if _host(coordinator) in LOCAL:
        family, _, _, _, found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        address = str(found[0])
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((address, port))
            probe.listen(1)
        except OSError as error:
            raise ClusterError(
                f"port {port}, where rank 0 is to coordinate the job, cannot be used: {error.strerror}; accepted: a "
                "free one in --coordinator HOST:PORT"
            ) from error


def _await_coordinator(coordinator: str, deadline: float, timeout: float) -> None:
    """Until something listens there. Before gRPC tries, which says less about why it could not."""
    reason = "no answer"
    while time.monotonic() < deadline:
        try:
            with socket.create_connection(_address(coordinator), timeout=max(0.1, min(5, deadline - time.monotonic()))):
                return
        except OSError as error:
            reason = error.strerror or str(error)
            time.sleep(0.1)
    raise ClusterError(
        f"the coordinator, rank 0 at {coordinator}, did not come within {timeout:.0f} seconds: {reason}; accepted: the "
        "address of a machine that runs rank 0"
    )


def _explained(cluster: Cluster, error: Exception, timeout: float) -> ClusterError:
    text = " ".join(str(error).split())
    missing = sorted({int(rank) for rank in re.findall(r"/task:([0-9]+)", text)} - {cluster.rank})
    if "DEADLINE_EXCEEDED" in text or "timed out" in text.lower():
        who = f"rank {', '.join(map(str, missing))}" if missing else "another process"
        return ClusterError(f"{who} of {cluster.processes} did not come within {timeout:.0f} seconds")
    return ClusterError(f"rank {cluster.rank} could not join the job at {cluster.coordinator}: {text[:300]}")
