"""realm plan: topologies, models without their weights, memory, what fits, limits; and its command line."""

import dataclasses
import json
import math
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_models
from hypothesis import given, settings
from hypothesis import strategies as st

from pallas_kernels.quant_matmul import FORMATS
from realm_jax import cache
from realm_jax.cli.app import run
from realm_jax.engine.runner import page_bytes
from realm_jax.errors import InvalidRequestError, RealmError
from realm_jax.model import capacity, load_model
from realm_jax.model.partition import WHOLE, Partition, partition_model
from realm_jax.planning import DEVICES, Outline, Topology, costs, plan, read_outline, render
from realm_jax.planning.machine import this_machine
from realm_jax.planning.outline import metadata_outline, packed_bytes
from realm_jax.planning.plan import BATCHES, BLOCK_SIZE, CACHE_ITEMSIZE, CACHE_SHARE, MAX_BATCH
from realm_jax.quant import packed_spec
from realm_jax.sharding.mesh import MeshShape

GB = 10**9


def partition(outline: Outline, **mesh: int) -> Partition:
    return partition_model(outline.config, outline.specs, outline.blocks, MeshShape(**mesh))


# --- topologies


@pytest.mark.parametrize(
    ("text", "shown", "devices"),
    [
        ("h100:8", "h100:8", 8),
        ("H100", "h100:1", 1),
        ("h100:16", "h100:16", 16),
        ("v5e:4x4", "v5e:4x4", 16),
        ("v5e", "v5e:1x1", 1),
        ("v5p:2x2x4", "v5p:2x2x4", 16),
        ("v4:4x4", "v4:4x4", 16),
    ],
)
def test_topologies(text: str, shown: str, devices: int) -> None:
    topology = Topology.parse(text)
    assert (str(topology), topology.devices) == (shown, devices)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("x100:8", "topology 'x100:8' is not known; accepted: a100-40:N"),
        ("", "topology '' is not known"),
        ("h100:", "accepted: h100:N"),
        ("h100:0", "accepted: h100:N"),
        ("h100:-1", "accepted: h100:N"),
        ("h100:2x2", "accepted: h100:N"),
        ("h100:99999", "accepted: h100:N, up to 65,536"),
        ("h100:\u0663", "accepted: h100:N"),
        ("v5e:16", "accepted: v5e:NxM"),
        ("v5e:2x2x2", "accepted: v5e:NxM"),
        ("v5e:32x32", "up to the 256 that one pod has"),
        ("v5p:4", "accepted: v5p:NxM or NxMxK"),
        ("l4:9", "l4:N, up to the 8 that one machine has"),
        ("cpu:0", "accepted: cpu:N"),
    ],
)
def test_a_topology_nobody_knows_is_refused(text: str, message: str) -> None:
    with pytest.raises(InvalidRequestError) as error:
        Topology.parse(text)
    assert message in str(error.value)


def test_the_processor_of_this_machine_is_divided() -> None:
    one, four = Topology.parse("cpu:1").device, Topology.parse("cpu:4").device
    machine = this_machine()
    assert (one.memory, one.bandwidth, one.flops) == (machine.memory, machine.bandwidth, machine.flops)
    assert 1 * GB < machine.memory == pytest.approx(4 * four.memory, rel=1e-6)
    assert 1e9 < machine.bandwidth == pytest.approx(4 * four.bandwidth)
    assert 1e9 < machine.flops == pytest.approx(4 * four.flops)


def test_a_group_that_spans_nodes_shares_their_network() -> None:
    two_nodes = Topology.parse("h100:16")
    h100 = DEVICES["h100"]
    assert two_nodes.link(8, 1) == h100.link  # neighbours
    assert two_nodes.link(2, 8) == h100.network  # one of each node, each with an adapter of its own
    assert two_nodes.link(4, 4) == 2 * h100.network
    assert two_nodes.link(16, 1) == min(h100.link, 8 * h100.network)


def test_what_jax_takes_of_a_gpu_is_what_its_variable_says(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("XLA_PYTHON_CLIENT_MEM_FRACTION", raising=False)
    assert DEVICES["h100"].usable == int(0.75 * DEVICES["h100"].memory)
    assert DEVICES["v5e"].usable == int(15.75 * (1 << 30))
    monkeypatch.setenv("XLA_PYTHON_CLIENT_MEM_FRACTION", ".9")
    assert DEVICES["h100"].usable == int(0.9 * DEVICES["h100"].memory)


# --- models


@pytest.mark.parametrize(
    ("name", "billions"),
    # As their publishers say: Llama 3.2 1B, Llama 3.1 8B, 70B, 405B, Mixtral 8x7B.
    [("llama-1b", 1.24), ("llama-8b", 8.03), ("llama-70b", 70.6), ("llama-405b", 406), ("mixtral-8x7b", 46.7)],
)
def test_shapes_have_as_many_parameters_as_published(name: str, billions: float) -> None:
    assert read_outline(name).parameters / GB == pytest.approx(billions, rel=0.005)


@pytest.mark.parametrize("type", [name for name, fmt in FORMATS.items() if fmt.dtype != "i32"])
def test_bytes_are_those_that_the_loader_allocates(type: str) -> None:
    shape = (3, 16, 512)
    loaded = sum(math.prod(s) * dtype.itemsize for s, dtype in packed_spec(shape, type).values())
    assert packed_bytes(shape, type) == loaded


@pytest.mark.parametrize("case", ["llama", "llama-tied", "llama-rope-freqs", "llama-Q4_K_M", "gpt-oss", "deepseek2"])
def test_the_memory_of_one_device_is_that_of_the_loaded_model(case: str, tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    tiny_models.write_tiny_model(case, path)
    model = load_model(path, backend="xla")
    outline = read_outline(path)
    assert sum(costs.weight_bytes(outline, WHOLE)) == model.nbytes
    pages = costs.cache_token_bytes(outline.config, WHOLE, itemsize=4) * cache.PAGE_SIZE
    assert pages == page_bytes(model)  # of the XLA backend, whose rows are float32


def test_the_engines_constants_are_these() -> None:
    assert BLOCK_SIZE == cache.BLOCK_SIZE
    assert CACHE_SHARE == capacity.ACCELERATOR_SHARE
    assert {cache.row_dtype(backend).itemsize for backend in ("gpu", "tpu", "native")} == {CACHE_ITEMSIZE}


@pytest.mark.parametrize("case", ["llama", "llama-tied", "llama-moe", "phi3", "gemma2", "deepseek2"])
def test_a_config_alone_gives_the_tensors_of_a_file(case: str, tmp_path: Path) -> None:
    path, alone = tmp_path / "model.gguf", tmp_path / "model.json"
    tiny_models.write_tiny_model(case, path, weight_type="F16")
    held = read_outline(path)
    spec = tiny_models.tiny_spec(case)
    keys = {key: value for key, value in spec.metadata.items() if not key.startswith("tokenizer.")}
    tied = "output.weight" not in spec.tensors
    metadata = keys | {"general.architecture": spec.architecture, "tie_word_embeddings": tied}
    floats = {key: float(np.float32(value)) for key, value in metadata.items() if isinstance(value, float)}
    alone.write_text(json.dumps(metadata | floats, default=lambda value: np.asarray(value).tolist()))
    read = read_outline(f"{alone}:F16")
    assert dataclasses.replace(read.config, name=held.config.name) == held.config
    required = {s.name: s.shape for s in held.specs if s.required or s.role == "output.weight"}
    assert {s.name: s.shape for s in read.specs} == required
    # What a file may keep in another type: routers, and vectors.
    assert {n: t for n, t in read.types.items() if t != "F32"} == {
        n: t for n, t in held.types.items() if t != "F32" and n in required
    }


LLAMA = {
    "general.architecture": "llama",
    "llama.vocab_size": 512,
    "llama.context_length": 1024,
    "llama.block_count": 2,
    "llama.embedding_length": 256,
    "llama.feed_forward_length": 512,
    "llama.attention.head_count": 4,
    "llama.attention.layer_norm_rms_epsilon": 1e-5,
}


@pytest.mark.parametrize(
    ("content", "type", "message"),
    [
        (b"", "", "is no JSON"),
        (b"{", "", "is no JSON"),
        (b"\xff\xfe{}", "", "is no JSON"),
        (b"[" * 100_000, "", "is no JSON"),
        (b"[]", "", "holds a list; accepted: one JSON object of GGUF metadata"),
        (b" " * (1 << 20) + b"{}", "", "has more than 1,048,576 bytes"),
        ({}, "", "general.architecture is missing"),
        ({"general.architecture": ["llama"]}, "", "general.architecture is missing"),
        ({"general.architecture": "nobody"}, "", "architecture 'nobody' is not supported"),
        (LLAMA | {"llama.vocab_size": 0}, "", "llama.vocab_size must be an integer from 1"),
        (LLAMA | {"llama.vocab_size": True}, "", "llama.vocab_size must be an integer from 1"),
        (LLAMA | {"llama.vocab_size": 1 << 60}, "", "llama.vocab_size must be an integer from 1"),
        (LLAMA | {"llama.block_count": 10**9}, "", "llama.block_count is 1000000000; it must be from 1 to 1024"),
        (LLAMA | {"llama.block_count": 2.5}, "", "llama.block_count is 2.5; it must be an integer"),
        (LLAMA | {"llama.embedding_length": None}, "", "'llama.embedding_length' is no number, text, flag or list"),
        (LLAMA | {"llama.feed_forward_length": [[512], [512, 1]]}, "", "'llama.feed_forward_length' is no number"),
        (LLAMA | {"llama.feed_forward_length": {"a": 1}}, "", "'llama.feed_forward_length' is no number"),
        (LLAMA | {"llama.feed_forward_length": [512, 256]}, "", "needs the same integer for all 2 layers"),
        (LLAMA | {"llama.unheard_of": 1}, "", "llama.unheard_of"),
        (LLAMA | {"llama.feed_forward_length": 0}, "", "feed_forward_length is missing or 0"),
        (LLAMA | {"tie_word_embeddings": 1}, "", "tie_word_embeddings must be true or false"),
        (LLAMA | {"llama.embedding_length": 320}, ":Q4_K", "320 elements is not a multiple of the block of 256"),
        (LLAMA, ":Q9_K", "tensor type 'Q9_K' is not known; accepted: F32, F16, BF16"),
        (LLAMA, ":I32", "tensor type 'I32' is not known"),
    ],
)
def test_a_config_that_is_none_is_refused(content: Any, type: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "model.json"
    path.write_bytes(content if isinstance(content, bytes) else json.dumps(content).encode())
    with pytest.raises(RealmError) as error:
        read_outline(f"{path}{type}")
    assert message in str(error.value)
    assert "\n" not in str(error.value)


JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=6,
)


@settings(max_examples=150, deadline=None)
@given(st.dictionaries(st.sampled_from([*LLAMA, "llama.expert_count", "tie_word_embeddings"]), JSON_VALUES, max_size=4))
def test_whatever_a_config_holds_it_is_planned_or_refused(changes: dict[str, Any]) -> None:
    try:
        outline = metadata_outline("x", LLAMA | changes, "Q8_0")
    except RealmError:
        return
    assert outline.parameters > 0


# --- memory and what fits


def test_weights_are_divided() -> None:
    outline = read_outline("llama-70b:Q4_K")
    whole, small = costs.weight_bytes(outline, WHOLE)
    assert (whole, small) == (0, sum(costs.weight_bytes(outline, WHOLE)))
    for tensor in (2, 4, 8):
        divided, replicated = costs.weight_bytes(outline, partition(outline, tensor=tensor))
        assert divided * tensor + replicated == small
        assert replicated < 0.001 * small  # norms, and tables of rotation
    assert costs.weight_bytes(outline, partition(outline, tensor=4, data=2)) == costs.weight_bytes(
        outline, partition(outline, tensor=4)
    )


def test_what_does_not_divide_is_whole_and_said() -> None:
    planned = plan("llama-8b:Q8_0", "v5e:4x4", mesh="tensor=16")
    assert planned.notes == (
        "attention is whole on each of 16 devices: 32 heads and 8 key/value heads do not divide by 16",
    )
    assert planned.memory.weights_replicated > 0.5 * GB
    assert [one.what for one in planned.collectives] == ["last tokens", "embedding", "feed-forward", "logits"]
    assert plan("llama-8b:Q4_K", "v5e:4x4").mesh == {"data": 2, "expert": 1, "tensor": 8}
    [note] = plan("llama-1b", "v5e:2x2").notes
    assert note.startswith("a TPU may store cached rows of 64 elements as 128")
    some = plan("llama-8b:Q4_K", "h100:8", mesh="tensor=2")
    assert (some.devices, some.notes) == (2, ("2 of the 8 devices are used",))


@pytest.mark.parametrize(
    ("model", "topology", "mesh"),
    [
        ("llama-8b:Q4_K", "l4", None),
        ("llama-70b:Q4_K", "h100:4", None),
        ("llama-8b:Q8_0", "v5e:2x4", "tensor=4,data=2"),
    ],
)
def test_the_largest_that_fits(model: str, topology: str, mesh: str | None) -> None:
    planned = plan(model, topology, mesh)
    most = planned.largest_batch
    assert 0 < most < MAX_BATCH
    assert plan(model, topology, mesh, batch=most).memory.fits
    assert not plan(model, topology, mesh, batch=most + 1).memory.fits
    longest = planned.largest_context
    trained = 131_072
    assert plan(model, topology, mesh, context=longest, batch=1).memory.fits
    assert longest == trained or not plan(model, topology, mesh, context=longest + 1, batch=1).memory.fits


def test_what_does_not_fit() -> None:
    planned = plan("llama-405b", "l4")
    assert (planned.memory.fits, planned.largest_context, planned.largest_batch) == (False, 0, 0)


def test_bytes_by_hand() -> None:
    """llama-70b, Q4_K, on eight H100: the figures of the README, from the config."""
    planned = plan("llama-70b:Q4_K", "h100:8", context=4096, batch=8)
    bytes_of_256 = 128 + 8 + 8 + 2 + 2  # codes, scales, minima, and a float16 of each
    layer = 8192 * (8192 + 1024 + 1024 + 8192) + 3 * 8192 * 28_672
    matrices = 80 * layer + 2 * 128_256 * 8192
    assert planned.memory.weights_divided == matrices * bytes_of_256 // 256 // 8
    assert planned.memory.cache == 8 * 4096 * 80 * (8 // 8) * (128 + 128) * 2
    all_reduce = 2 * 7 / 8 * 8192 * 4
    assert planned.moved_per_token == pytest.approx((1 + 80 + 80) * all_reduce + 7 / 8 * 128_256 * 4 + 2 * 7 / 8 * 4)


# --- limits


def test_limits_by_hand() -> None:
    planned = plan("llama-70b:Q4_K", "h100:8", context=4096, batch=8)
    h100 = DEVICES["h100"]
    one = planned.decode[0]
    embedding = 128_256 * 8192 * 148 // 256 // 8
    vectors = (80 * 2 + 1) * 8192 * 4
    weights = planned.memory.weights_divided - embedding + vectors
    assert one.bytes_read == weights + planned.memory.cache // 8
    assert one.memory_seconds == pytest.approx(one.bytes_read / h100.bandwidth)
    steps = 162 * 14 + 7  # all-reduces and one all-gather
    expected = 163 * h100.launch + steps * h100.hop + planned.moved_per_token / h100.link
    assert one.interconnect_seconds == pytest.approx(expected)
    assert one.seconds == pytest.approx(one.memory_seconds + one.interconnect_seconds)
    assert one.tokens_per_second == pytest.approx(1 / one.seconds)
    assert [step.batch for step in planned.decode] == sorted({*BATCHES, 8})


def test_limits_name_what_bounds() -> None:
    assert plan("llama-8b:Q4_K", "h100").decode[0].bound == "memory"
    assert plan("llama-8b:Q4_K", "h100").prefill.bound == "compute"
    assert plan("llama-8b:Q4_K", "h100").collectives == ()
    assert plan("llama-8b:Q4_K", "t4:8").prefill.bound == "interconnect"
    assert plan("llama-8b:Q4_K", "v5e", batch=4096, context=128).decode[-1].bound == "compute"


def test_experts_that_are_hit_are_read() -> None:
    outline = read_outline("mixtral-8x7b:Q4_K")
    experts = 32 * 8 * 3 * 4096 * 14_336 * 148 // 256
    rest = costs.weights_read(outline, WHOLE, 10**6) - experts
    assert 0 < rest < 0.1 * experts
    assert costs.weights_read(outline, WHOLE, 1) == pytest.approx(rest + experts * 2 / 8)
    assert costs.weights_read(outline, WHOLE, 2) == pytest.approx(rest + experts * (1 - (6 / 8) ** 2))
    spread = partition(outline, expert=4, tensor=2)
    assert costs.weights_read(outline, spread, 10**6) < (experts + rest) / 2
    [one] = [c for c in costs.collectives(outline, spread) if c.what == "experts"]
    assert (one.axes, one.devices, one.apart, one.count) == (("expert", "tensor"), 8, 1, 32)


def test_windows_bound_what_attention_reads(tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    tiny_models.write_tiny_model("gemma2", path)  # every other layer sees 12 tokens
    outline = read_outline(path)
    c = outline.config
    assert c.layer_window.count(tiny_models.WINDOW) == c.num_layers // 2
    values = c.num_kv_heads * (c.head_dim + c.value_dim)
    expected = values * 2 * (c.num_layers // 2) * (100 + tiny_models.WINDOW)
    assert costs.cache_read(outline, WHOLE, 100, itemsize=2) == expected


# --- the command line


Realm = Callable[..., tuple[int, str, str]]


@pytest.fixture
def realm(capfd: pytest.CaptureFixture[str]) -> Realm:
    """Runs `realm plan` in this process: exit code, stdout, stderr."""

    def call(*arguments: str | Path) -> tuple[int, str, str]:
        code = run(["plan", *map(str, arguments)])
        return code, *capfd.readouterr()

    return call


def test_the_command_prints_what_the_plan_says(realm: Realm) -> None:
    code, out, err = realm("llama-70b:Q4_K", "--topology", "h100:8", "--json")
    assert (code, err) == (0, "")
    planned = plan("llama-70b:Q4_K", "h100:8")
    assert json.loads(out) == json.loads(json.dumps(dataclasses.asdict(planned)))
    code, out, err = realm("llama-70b:Q4_K", "--topology", "h100:8", "--context", 8192, "--batch", 4)
    assert (code, err) == (0, "")
    assert out == render(plan("llama-70b:Q4_K", "h100:8", context=8192, batch=4)) + "\n"
    for figure in ("70.55 billion parameters", "mesh tensor=8", "5.1 GB", "all-reduce, attention", "decode, 1 request"):
        assert figure in out
    assert max(map(len, out.splitlines())) <= 100


def test_a_file_is_planned_by_its_header(realm: Realm, tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    tiny_models.write_tiny_model("llama", path, weight_type="Q8_0")
    code, out, _ = realm(path, "--topology", "l4:2", "--mesh", "tensor=2", "--json")
    planned = json.loads(out)
    assert (code, planned["mesh"]) == (0, {"data": 1, "expert": 1, "tensor": 2})
    assert planned["parameters"] == sum(math.prod(t.shape) for t in tiny_models.tiny_spec("llama").tensors.values())
    assert planned["types"] == ["Q8_0"]
    cut = tmp_path / "cut.gguf"
    cut.write_bytes(path.read_bytes()[:1000])
    assert realm(cut, "--topology", "l4:2")[0] == 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["llama-8b"], "Missing option '--topology'"),
        (["llama-8b", "--topology", "x1"], "topology 'x1' is not known; accepted: a100-40:N"),
        (["llama-9b", "--topology", "l4"], "a shape to plan for: llama-1b, llama-8b"),
        (["llama-8b:Q9", "--topology", "l4"], "tensor type 'Q9' is not known"),
        (["missing.json", "--topology", "l4"], "cannot read 'missing.json': No such file"),
        (["missing.gguf", "--topology", "l4"], "no such file: 'missing.gguf'"),
        (["llama-8b", "--topology", "l4:2", "--mesh", "tensor=4"], "tensor=4 needs 4 devices, and topology l4:2 has 2"),
        (["llama-8b", "--topology", "l4:8", "--mesh", "tensor=5"], "nothing of the model divides by 5"),
        (["llama-8b", "--topology", "l4:8", "--mesh", "rows=2"], "mesh is 'rows=2'; accepted:"),
        (["llama-8b", "--topology", "l4:8", "--mesh", "expert=2"], "the model has 0 experts"),
        (["mixtral-8x7b", "--topology", "l4:8", "--mesh", "expert=3"], "8 experts, which do not divide by 3"),
        (["llama-8b", "--topology", "l4", "--context", "0"], "context_length is 0; it must be from 1 to the 131072"),
        (["llama-8b", "--topology", "l4", "--context", "131073"], "it must be from 1 to the 131072"),
        (["llama-8b", "--topology", "l4", "--batch", "0"], "batch is 0; accepted: an integer from 1 to 65,536"),
        (["llama-8b", "--topology", "l4", "--batch", "many"], "Invalid value for '--batch'"),
    ],
)
def test_refusals_are_one_line(arguments: list[str], message: str, realm: Realm) -> None:
    code, out, err = realm(*arguments)
    assert (code, out) == (2, "")
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    assert message in err


def test_no_jax_is_needed(tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    tiny_models.write_tiny_model("llama", path)
    script = (
        "import sys; from realm_jax.cli.app import run;"
        "codes = [run(['plan', name, '--topology', 'v5e:2x2']) for name in sys.argv[1:]];"
        "loaded = {name.split('.')[0] for name in sys.modules} & {'jax', 'jaxlib', 'flax'};"
        "print(codes, sorted(loaded), file=sys.stderr)"
    )
    command = [sys.executable, "-c", script, "llama-405b:Q4_K", str(path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, env=dict(os.environ))
    assert done.stderr == "[0, 0] []\n"
