"""Jobs of several processes serve what one process serves: batched, with adapters and drafts; and end when one dies."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import tiny_models
from random_adapters import random_adapter
from test_launch import Launched

from realm_jax.lora import weight_shapes
from realm_jax.lora.gguf_format import write_gguf
from realm_jax.model import load_model

ROOT = Path(__file__).parent.parent
LAUNCH = "import sys; from realm_jax.cli.launching import main; raise SystemExit(main(sys.argv[1:]))"


@pytest.fixture(scope="module")
def wanted(tmp_path_factory):
    folder = tmp_path_factory.mktemp("job")
    model, draft = folder / "model.gguf", folder / "draft.gguf"
    spec = tiny_models._llama(layers=2, width=128, heads=4, kv_heads=4, hidden=256)
    tiny_models.write_spec(spec, model, label="job")
    tiny_models.write_spec(tiny_models._llama(layers=1, width=64), draft, label="job-draft")
    adapters = {}
    for seed, name in enumerate("ab"):
        adapters[name] = str(folder / f"{name}.gguf")
        write_gguf(random_adapter(weight_shapes(load_model(model, 128)), 4, seed=seed), adapters[name], 8.0)
    options = {"context_length": 256, "max_batch": 8}
    return {"model": str(model), "draft": str(draft), "adapters": adapters, "options": options, "mesh": None}


def alone(wanted):
    return [sys.executable, str(ROOT / "tests/served_job.py"), json.dumps(wanted)]


@pytest.fixture(scope="module")
def expected(wanted):
    return answers(alone(wanted))


def answers(command):
    environment = os.environ | {"PYTHONPATH": f"{ROOT}:{ROOT}/tests"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


def launch(processes, devices, wanted):
    flags = ["--processes", str(processes), "--devices-per-process", str(devices)]
    return [sys.executable, "-c", LAUNCH, *flags, "python", str(ROOT / "tests/served_job.py"), json.dumps(wanted)]


def test_two_processes_in_short(wanted):
    wanted = wanted | {"draft": "ngram"}
    got = answers(launch(2, 1, wanted | {"mesh": "tensor=2"}))
    assert len(got["mixed"]) == 4
    assert got == answers(alone(wanted))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("processes", "devices", "mesh"),
    [(2, 1, "tensor=2"), (4, 1, "tensor=4"), (4, 1, "data=2,tensor=2"), (2, 2, "data=2,tensor=2")],
)
def test_the_tokens_of_one_process(wanted, expected, processes, devices, mesh):
    got = answers(launch(processes, devices, wanted | {"mesh": mesh}))
    assert got["drafted"] > 0
    for kind in ("plain", "drafts", "adapters", "again"):
        assert got[kind] == expected[kind], kind
    assert expected["drafts"] == expected["plain"] != expected["adapters"]


@pytest.mark.slow
@pytest.mark.parametrize("rank", range(4))
def test_death_in_the_midst_of_serving_ends_all(wanted, rank):
    job = Launched(launch(4, 1, wanted | {"mesh": "tensor=4", "endless": True}))
    job.await_line("ready")
    time.sleep(1)  # in the midst of steps
    since = time.monotonic()
    os.kill(job.children[rank], signal.SIGKILL)
    code, lines = job.end(since)
    assert code == 1
    assert [line for line in lines if line.startswith("error: ")] == [
        f"error: rank {rank} was killed (SIGKILL); the job has ended"
    ]


# What only process 0 can read: a file that it has open.
UNREADABLE = """
import json, os, sys
from realm_jax import LLM, SamplingParams
from realm_jax.errors import AdapterError
wanted = json.loads(sys.argv[1])
own = lambda path: f"/proc/self/fd/{os.open(path, os.O_RDONLY)}"
params = SamplingParams(max_tokens=4, ignore_eos=True)
with LLM(wanted["model"], mesh="tensor=2", **wanted["options"]) as llm:
    before = llm.generate("the cat", params).tokens
    try:
        llm.load_adapter("a", own(wanted["adapters"]["a"]))
    except AdapterError as error:
        print("adapter:", error)
    llm.load_adapter("a", wanted["adapters"]["a"])
    with_it = llm.generate("the cat", params, adapter="a").tokens
    assert llm.generate("the cat", params).tokens == before != with_it
    llm._core.runner.executor.run = None  # fails after the others were told
    for _ in range(2):
        try:
            llm.generate("the cat", params)
        except Exception as error:
            print(type(error).__name__, error)
"""


@pytest.mark.slow
def test_what_a_follower_cannot_read_is_said_and_the_job_goes_on(wanted, tmp_path):
    script = tmp_path / "job.py"
    script.write_text(UNREADABLE)
    command = [sys.executable, "-c", LAUNCH, "--processes", "2", "python", str(script), json.dumps(wanted)]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=200)
    lines = done.stdout.splitlines()
    assert lines[0].startswith("adapter: rank 1: adapter /proc/self/fd/"), done.stdout + done.stderr
    assert lines[1].startswith("TypeError")
    assert lines[2].startswith("ClusterError process 0 failed in a step that the others ran")
    assert done.returncode == 0
