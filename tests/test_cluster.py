"""Who is in a job: from flags, and from what schedulers put into the environment."""

import zlib
from typing import Any

import pytest

from realm_jax.errors import ClusterError
from realm_jax.sharding.cluster import Cluster, find_cluster, first_node, local_cluster, refuse_contradiction

SLURM = {
    "SLURM_PROCID": "3",
    "SLURM_NTASKS": "4",
    "SLURM_JOB_ID": "5000",
    "SLURM_STEP_ID": "0",
    "SLURM_JOB_NODELIST": "other",
    "SLURM_STEP_NODELIST": "gpu[03-04,9],login",
    "SLURM_LOCALID": "1",
    "SLURM_STEP_TASKS_PER_NODE": "2(x2)",
}
SLURM_PORT = 61440 + 5000 % 4096
OPEN_MPI = {
    "OMPI_COMM_WORLD_RANK": "1",
    "OMPI_COMM_WORLD_SIZE": "4",
    "OMPI_COMM_WORLD_LOCAL_RANK": "1",
    "OMPI_COMM_WORLD_LOCAL_SIZE": "2",
    "OMPI_MCA_orte_hnp_uri": "1531576320.0;tcp://10.96.0.1,10.148.0.1:34911",
}
MPI_PORT = 61440 + zlib.crc32(OPEN_MPI["OMPI_MCA_orte_hnp_uri"].encode()) % 4096
TORCHRUN = {
    "RANK": "5",
    "WORLD_SIZE": "8",
    "LOCAL_RANK": "1",
    "LOCAL_WORLD_SIZE": "4",
    "MASTER_ADDR": "node7",
    "MASTER_PORT": "29500",
}
KUBERNETES = {"JOB_COMPLETION_INDEX": "2", "REALM_PROCESSES": "4", "HOSTNAME": "my-job-2"}


def without(environment: dict[str, str], *names: str) -> dict[str, str]:
    return {name: value for name, value in environment.items() if name not in names}


@pytest.mark.parametrize(
    ("environment", "flags", "expected"),
    [
        ({}, {}, Cluster("", 1, 0, None, "one process")),
        ({}, {"processes": 4, "rank": 3, "coordinator": "a:1"}, Cluster("a:1", 4, 3, None, "flags")),
        ({}, {"processes": 1, "rank": 0, "coordinator": "a:1"}, Cluster("", 1, 0, None, "flags")),
        (
            {},
            {"processes": 2, "rank": 1, "coordinator": "[fe80::1]:8000", "devices_per_process": 2},
            Cluster("[fe80::1]:8000", 2, 1, (0, 1), "flags"),
        ),
        # SLURM: rank 0 is on the step's first node; two tasks on a node have a GPU each, one has them all.
        (SLURM, {}, Cluster(f"gpu03:{SLURM_PORT}", 4, 3, (1,), "SLURM")),
        (SLURM, {"devices_per_process": 2}, Cluster(f"gpu03:{SLURM_PORT}", 4, 3, (2, 3), "SLURM")),
        (SLURM, {"coordinator": "ib0:99"}, Cluster("ib0:99", 4, 3, (1,), "SLURM")),
        (SLURM | {"SLURM_STEP_ID": "2"}, {}, Cluster(f"gpu03:{SLURM_PORT + 2}", 4, 3, (1,), "SLURM")),
        (SLURM | {"JAX_COORDINATOR_PORT": "7000"}, {}, Cluster("gpu03:7000", 4, 3, (1,), "SLURM")),
        (without(SLURM, "SLURM_STEP_NODELIST"), {}, Cluster(f"other:{SLURM_PORT}", 4, 3, (1,), "SLURM")),
        (
            SLURM | {"SLURM_STEP_TASKS_PER_NODE": "1(x4)", "SLURM_LOCALID": "0"},
            {},
            Cluster(f"gpu03:{SLURM_PORT}", 4, 3, None, "SLURM"),
        ),
        (SLURM | {"CUDA_VISIBLE_DEVICES": "5"}, {}, Cluster(f"gpu03:{SLURM_PORT}", 4, 3, None, "SLURM")),
        (SLURM | {"CUDA_VISIBLE_DEVICES": "5,6"}, {}, Cluster(f"gpu03:{SLURM_PORT}", 4, 3, (1,), "SLURM")),
        (SLURM | {"SLURM_NTASKS": "1", "SLURM_PROCID": "0"}, {}, Cluster("", 1, 0, (1,), "SLURM")),
        # Open MPI says where mpirun is, before version 5; a job on one machine needs no more.
        (OPEN_MPI, {}, Cluster(f"10.96.0.1:{MPI_PORT}", 4, 1, (1,), "Open MPI")),
        (
            OPEN_MPI | {"OMPI_MCA_orte_hnp_uri": "13.0;tcp6://[fe80::b9b,2620::2]:43370", "JAX_COORDINATOR_PORT": "9"},
            {},
            Cluster("[fe80::b9b]:9", 4, 1, (1,), "Open MPI"),
        ),
        (
            OPEN_MPI | {"OMPI_COMM_WORLD_LOCAL_SIZE": "4", "JAX_COORDINATOR_PORT": "9"},
            {},
            Cluster("127.0.0.1:9", 4, 1, (1,), "Open MPI"),
        ),
        (without(OPEN_MPI, "OMPI_MCA_orte_hnp_uri"), {"coordinator": "a:1"}, Cluster("a:1", 4, 1, (1,), "Open MPI")),
        # torchrun's own store has the port that it names.
        (TORCHRUN, {}, Cluster("node7:29500", 8, 5, (1,), "torchrun")),
        (TORCHRUN | {"TORCHELASTIC_USE_AGENT_STORE": "True"}, {}, Cluster("node7:29501", 8, 5, (1,), "torchrun")),
        (TORCHRUN | {"MASTER_ADDR": "fe80::1"}, {}, Cluster("[fe80::1]:29500", 8, 5, (1,), "torchrun")),
        (without(TORCHRUN, "LOCAL_RANK", "LOCAL_WORLD_SIZE"), {}, Cluster("node7:29500", 8, 5, None, "torchrun")),
        (KUBERNETES, {}, Cluster("my-job-0.my-job:61439", 4, 2, None, "Kubernetes")),
        (KUBERNETES | {"REALM_SERVICE": "pods"}, {}, Cluster("my-job-0.pods:61439", 4, 2, None, "Kubernetes")),
        # The innermost counts.
        (SLURM | OPEN_MPI, {}, Cluster(f"10.96.0.1:{MPI_PORT}", 4, 1, (1,), "Open MPI")),
        (SLURM | KUBERNETES | TORCHRUN, {}, Cluster("node7:29500", 8, 5, (1,), "torchrun")),
        # Flags that say what the scheduler says are no contradiction, and complete ones need no complete environment.
        (TORCHRUN, {"processes": 8, "rank": 5, "coordinator": "a:1"}, Cluster("a:1", 8, 5, None, "flags")),
        ({"RANK": "0"}, {"processes": 8, "rank": 5, "coordinator": "a:1"}, Cluster("a:1", 8, 5, None, "flags")),
    ],
)
def test_finds_its_place(environment: dict[str, str], flags: dict[str, Any], expected: Cluster) -> None:
    assert find_cluster(environment, **flags) == expected


@pytest.mark.parametrize(
    ("environment", "flags", "message"),
    [
        ({}, {"rank": 1}, "--rank needs --processes and --coordinator too"),
        ({}, {"processes": 4, "rank": 1}, "--processes and --rank needs --coordinator too"),
        ({}, {"processes": 4, "coordinator": "a:1"}, "--processes and --coordinator needs --rank too"),
        ({}, {"coordinator": "a:1"}, "--coordinator needs --processes and --rank, or a scheduler"),
        (
            {},
            {"processes": 4, "rank": 4, "coordinator": "a:1"},
            "--rank is 4; accepted in a job of 4 processes: 0 to 3",
        ),
        ({}, {"processes": 0, "rank": 0, "coordinator": "a:1"}, "--processes is 0; accepted: 1 to 65,536"),
        ({}, {"processes": 4, "rank": -1, "coordinator": "a:1"}, "--rank is -1"),
        ({}, {"devices_per_process": 0}, "--devices-per-process is 0"),
        *(
            ({}, {"processes": 2, "rank": 0, "coordinator": bad}, "accepted: HOST:PORT")
            for bad in ("host", "host:", ":80", "host:0", "host:65536", "a b:80", "host:80x", "::1:80", "")
        ),
        (TORCHRUN, {"processes": 4, "rank": 1, "coordinator": "a:1"}, "--processes 4 --rank 1 contradicts torchrun"),
        ({"RANK": "0"}, {}, "WORLD_SIZE is not set, and torchrun needs it (set: RANK)"),
        ({"WORLD_SIZE": "2"}, {}, "RANK is not set, and torchrun needs it"),
        (without(TORCHRUN, "MASTER_ADDR"), {}, "MASTER_ADDR is not set"),
        (TORCHRUN | {"MASTER_PORT": "65536"}, {}, "MASTER_ADDR with its port is 'node7:65536'"),
        (TORCHRUN | {"RANK": "8"}, {}, "RANK is 8, but WORLD_SIZE is 8; accepted: 0 to 7"),
        (TORCHRUN | {"RANK": "-1"}, {}, "RANK is '-1'; accepted: a whole number"),
        (TORCHRUN | {"WORLD_SIZE": "0"}, {}, "WORLD_SIZE is 0"),
        (TORCHRUN | {"WORLD_SIZE": "9" * 30}, {}, "WORLD_SIZE is '9999"),
        (without(SLURM, "SLURM_NTASKS"), {}, "SLURM_NTASKS is not set, and SLURM needs it"),
        (without(SLURM, "SLURM_JOB_ID"), {}, "SLURM_JOB_ID is not set"),
        (without(SLURM, "SLURM_JOB_NODELIST", "SLURM_STEP_NODELIST"), {}, "SLURM_JOB_NODELIST is not set"),
        (SLURM | {"SLURM_STEP_NODELIST": "gpu[1-"}, {}, "SLURM_STEP_NODELIST is 'gpu[1-'; accepted: host names"),
        (without(OPEN_MPI, "OMPI_COMM_WORLD_SIZE"), {}, "OMPI_COMM_WORLD_SIZE is not set, and Open MPI needs it"),
        (without(OPEN_MPI, "OMPI_MCA_orte_hnp_uri"), {}, "PMIX_NAMESPACE is not set; accepted: --coordinator"),
        (
            without(OPEN_MPI, "OMPI_MCA_orte_hnp_uri") | {"PMIX_NAMESPACE": "prterun-a-1@1"},
            {},
            "Open MPI does not say on which machine rank 0 is; accepted: --coordinator",
        ),
        (without(KUBERNETES, "REALM_PROCESSES"), {}, "REALM_PROCESSES is not set, and Kubernetes needs it"),
        (without(KUBERNETES, "HOSTNAME"), {}, "HOSTNAME is not set"),
        (KUBERNETES | {"HOSTNAME": "my-job-3"}, {}, "HOSTNAME is 'my-job-3'; accepted for JOB_COMPLETION_INDEX 2"),
        (KUBERNETES | {"JAX_COORDINATOR_PORT": "70000"}, {}, "JAX_COORDINATOR_PORT is 70000"),
        (KUBERNETES | {"REALM_SERVICE": "a/b"}, {}, "REALM_SERVICE is 'my-job-0.a/b:61439'"),
    ],
)
def test_refuses_what_is_incomplete_or_contradictory(
    environment: dict[str, str], flags: dict[str, Any], message: str
) -> None:
    with pytest.raises(ClusterError) as refused:
        find_cluster(environment, **flags)
    assert message in str(refused.value)
    assert "\n" not in str(refused.value)


def test_all_ranks_here() -> None:
    assert local_cluster(2, "127.0.0.1:80", None) == [
        Cluster("127.0.0.1:80", 2, 0, (0,), "flags"),
        Cluster("127.0.0.1:80", 2, 1, (1,), "flags"),
    ]
    assert [cluster.local_devices for cluster in local_cluster(2, "127.0.0.1:80", 2)] == [(0, 1), (2, 3)]
    with pytest.raises(ClusterError, match="--processes is 0"):
        local_cluster(0, "127.0.0.1:80", None)


def test_a_scheduler_s_process_does_not_start_all() -> None:
    with pytest.raises(ClusterError, match="--processes 4 contradicts SLURM, which has started 4 processes"):
        refuse_contradiction(SLURM, 4, None)
    refuse_contradiction(SLURM | {"SLURM_NTASKS": "1", "SLURM_PROCID": "0"}, 4, None)
    refuse_contradiction({}, 4, None)


@pytest.mark.parametrize(
    ("nodes", "first"),
    [
        ("node1", "node1"),
        ("node1,node2", "node1"),
        ("node[001-015]", "node001"),
        ("node[7,001-015],other", "node7"),
        ("rack[2-3]-node[09,11].site,a", "rack2-node09.site"),
        ("n[0-999999999999]", "n0"),
    ],
)
def test_first_node_of_a_list(nodes: str, first: str) -> None:
    assert first_node("NODES", nodes) == first


@pytest.mark.parametrize(
    "nodes", ["", ",", "a,", "a[", "a[]", "a[1", "a[1-]", "a[x]", "a]1[", "a[[1]]", "a b", "a[1,,2]"]
)
def test_what_is_no_list_of_nodes(nodes: str) -> None:
    with pytest.raises(ClusterError, match="NODES is"):
        first_node("NODES", nodes)
