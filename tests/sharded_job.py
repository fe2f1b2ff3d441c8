"""Jobs of several processes that add numbers over all devices, step by step, for the tests of launching.

python sharded_job.py '{"processes": 2, "steps": 3}'        starts one: see `main`
"""

import json
import os
import sys
import time

from realm_jax.sharding.cluster import Cluster, local_cluster
from realm_jax.sharding.supervisor import Job, supervise


def step(number: int) -> float:
    """The sum over all devices of (1 + the device's place) * number."""
    import jax
    import jax.numpy as jnp
    import numpy as np
    from jax.sharding import NamedSharding, PartitionSpec

    mesh = jax.sharding.Mesh(np.asarray(jax.devices()), ("all",))
    split = NamedSharding(mesh, PartitionSpec("all"))
    mine = np.asarray([1 + jax.devices().index(d) for d in jax.local_devices()], np.float32)
    numbers = jax.make_array_from_process_local_data(split, mine)
    add = jax.jit(lambda x, y: jnp.sum(x) * y, out_shardings=NamedSharding(mesh, PartitionSpec()))
    return float(add(numbers, np.float32(number)))


def follow() -> None:
    """What ranks above 0 do."""
    for number in range(1, 1_000_000):
        step(number)


def lead(steps: int, then: str) -> None:
    for number in range(1, steps + 1):
        value = step(number)
        print(f"step {number}: {value:g}", flush=True)
    if then == "wait":
        time.sleep(600)
    elif then == "raise":
        raise ValueError("a mistake of the user's")
    elif then == "refuse Ctrl-C":
        while True:
            try:
                time.sleep(600)
            except KeyboardInterrupt:
                print("not yet", flush=True)
    elif then == "ask":
        import readline  # noqa: F401  (line editing for input())

        while True:
            print(f"answer: {input('question: ')}", flush=True)
    elif then == "write":
        os.write(2, b"of a program it started\n")
        print("of its own", file=sys.stderr)
    elif then:
        sys.exit(int(then))


def main(text: str) -> int:
    """rank: None starts all here. then: what rank 0 does after its steps. The others: see Job."""
    wanted = {"processes": 2, "steps": 1_000_000, "then": "", "rank": None, "coordinator": None} | json.loads(text)
    processes, rank = wanted.pop("processes"), wanted.pop("rank")
    coordinator = wanted.pop("coordinator")
    ranks = local_cluster(processes, coordinator, None)
    if rank is not None:
        ranks = [Cluster(coordinator, processes, rank, None, "flags")]
    command = ["python", __file__, "lead", str(wanted.pop("steps")), wanted.pop("then")]
    return supervise(Job(ranks, command, ["follow", "sharded_job"], **wanted))


if __name__ == "__main__":
    if sys.argv[1] == "lead":
        lead(int(sys.argv[2]), sys.argv[3])
    else:
        sys.exit(main(sys.argv[1]))
