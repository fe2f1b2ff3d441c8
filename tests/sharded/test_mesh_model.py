"""A model spread over a mesh computes what it computes on one device, from its part of the bytes each."""

import re

import jax
import numpy as np
import pytest
import tiny_models
from random_adapters import nmse

from realm_jax.engine.executor import Batch
from realm_jax.engine.programs import batch_program
from realm_jax.engine.runner import Runner
from realm_jax.errors import InvalidRequestError
from realm_jax.model import load_model
from realm_jax.model.backend import resolve_backend
from realm_jax.sharding.mesh import MeshShape

NATIVE = pytest.mark.skipif(resolve_backend("auto") != "native", reason="the native kernels are not built")
TOKENS = np.asarray(tiny_models.token_ids(), np.int32)


def wide_llama():
    """Every logical axis divides by eight, with whole blocks of 32."""
    return tiny_models._llama(layers=2, width=256, heads=8, kv_heads=8, hidden=512)


def large_llama():
    """The shape that sharding is claimed for: 2048 wide, 32 heads of 64, 8 for keys and values."""
    return tiny_models._llama(layers=3, width=2048, heads=32, kv_heads=8, hidden=8192)


def mixture():
    return tiny_models._llama(layers=2, width=256, heads=4, kv_heads=4, hidden=256, experts=8)


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")

    def write(name, spec, type="F32"):
        path = folder / f"{name}-{type}.gguf"
        if not path.exists():
            tiny_models.write_spec(spec, path, label=name, type_of=lambda _: type)
        return path

    return write


def logits(path, mesh, backend="xla"):
    model = load_model(path, 256, backend=backend, mesh=None if mesh is None else MeshShape.parse(mesh))
    runner = Runner(model, max_batch=8)
    table = np.arange(runner.max_pages_per_slot, dtype=np.int32)
    return runner.step_all(TOKENS, 0, table), model


def check(path, meshes, backend="xla", accepted=1e-9):
    expected, _ = logits(path, None, backend)
    for mesh in meshes:
        got, model = logits(path, mesh, backend)
        assert nmse(expected, got) < accepted, mesh
        assert not model.partition.notes, model.partition.notes
        top = np.sort(expected, -1)
        clear = top[:, -1] - top[:, -2] > 4 * np.abs(got - expected).max()
        np.testing.assert_array_equal(got.argmax(-1)[clear], expected.argmax(-1)[clear])
        assert clear.mean() > 0.8


def test_tensor_meshes(files):
    check(files("wide", wide_llama()), ["tensor=2", "tensor=8", "data=2,tensor=4"])


@NATIVE
def test_packed_weights_of_the_native_kernels(files):
    # Activations are rounded to int8 by groups of 32, which no mesh cuts; a sum that rounds otherwise moves a few.
    check(files("wide", wide_llama(), "Q8_0"), ["tensor=4"], "native", accepted=1e-4)


def test_packed_weights_in_rows(files):
    check(files("wide", wide_llama(), "Q4_0"), ["tensor=8"])


def test_experts_on_an_axis_of_their_own(files):
    check(files("mixture", mixture()), ["expert=4", "expert=2,tensor=2"])


@NATIVE
def test_experts_of_the_native_kernels(files):
    check(files("mixture", mixture(), "Q8_0"), ["expert=4"], "native", accepted=1e-4)


SOME = ("llama-fused-qkv", "llama-bias", "qwen2moe")
NOT_DIVIDED = {"olmo2": "attention", "olmo2-window": "attention"}  # queries normalised over all heads


@pytest.mark.parametrize(
    "case",
    [c if c in SOME else pytest.param(c, marks=pytest.mark.slow) for c in tiny_models.CASES if c != "deepseek2-legacy"],
)
def test_every_architecture(case, tmp_path):
    path = tmp_path / "model.gguf"
    tiny_models.write_tiny_model(case, path)
    expected, _ = logits(path, None)
    got, model = logits(path, "tensor=2")
    assert nmse(expected, got) < 1e-9
    for note in model.partition.notes:
        assert note.split(" is whole")[0] in (NOT_DIVIDED.get(case), "the vocabulary"), note


def test_what_does_not_divide_is_whole_everywhere_and_said(files, caplog):
    spec = tiny_models._llama(layers=2, width=96, heads=3, kv_heads=3, hidden=64)
    path = files("three-heads", spec)
    expected, _ = logits(path, None)
    with caplog.at_level("WARNING", "realm_jax"):
        got, model = logits(path, "tensor=2")
    assert nmse(expected, got) < 1e-9
    assert "attention is whole on each of 2 devices: 3 heads and 3 key/value heads do not divide by 2" in caplog.text
    query = model.params.stacks["attn_q.weight:F32"].arrays["values"]
    assert query.addressable_shards[0].data.shape == query.shape
    gate = model.params.stacks["ffn_gate.weight:F32"].arrays["values"]
    assert gate.addressable_shards[1].data.shape == (2, 32, 96)


REFUSED = [
    ("tensor=16", "mesh tensor=16 needs 16 devices, and there are 8"),
    ("expert=2", "0 experts, which do not divide by 2"),
    ("tensor=5", "nothing of the model divides by 5"),
]


@pytest.mark.parametrize(("mesh", "message"), REFUSED)
def test_refused_meshes(files, mesh, message):
    with pytest.raises(InvalidRequestError, match=re.escape(message)):
        load_model(files("wide", wide_llama()), mesh=MeshShape.parse(mesh))


@pytest.mark.parametrize("text", ["", "tensor", "tensor=", "tensor=0", "tensor=-1", "tensor=2,tensor=2", "pipe=2", "x"])
def test_refused_texts(text):
    with pytest.raises(InvalidRequestError, match="mesh is"):
        MeshShape.parse(text)


def compiled_decode(model, rows=8):
    """The compiled decode step, as text."""
    runner = Runner(model, max_batch=rows)
    batch = Batch(
        np.zeros((rows, 1), np.int32),
        np.zeros((rows, 1), np.int32),
        np.zeros((rows, runner.max_pages_per_slot), np.int32),
        np.zeros(rows, np.int32),
        np.asarray(1, np.int32),
        np.full(rows, -1, np.int32),
    )
    args = runner.executor._arguments(batch, None, None)
    return batch_program(model, "last", None).lower(*args).compile().as_text()


def collectives(text):
    """By computation of a compiled program: {"body": {"all-reduce": n}, ...}; "body" is that of the layers' scan."""
    found: dict[str, dict[str, int]] = {}
    bodies = set(re.findall(r"body=%?([\w.\-]+)", text))
    computation = ""
    for line in text.splitlines():
        header = re.match(r"^(?:ENTRY )?%?([\w.\-]+) .*\{$", line)
        if header:
            computation = "body" if header.group(1) in bodies else "rest"
        made = re.search(r"= .*? (all-reduce|all-gather|all-to-all|reduce-scatter|collective-permute)(-start)?\(", line)
        if made:
            counts = found.setdefault(computation, {})
            counts[made.group(1)] = counts.get(made.group(1), 0) + 1
    return found


def test_large_llama(files):
    path = files("large", large_llama(), "Q4_K")
    backend = resolve_backend("auto")
    whole = load_model(path, 256, backend=backend)
    model = load_model(path, 256, backend=backend, mesh=MeshShape(tensor=8))
    assert not [note for note in model.partition.notes if "vocabulary" not in note]
    matrices = jax.tree.leaves(model.params.stacks)
    total = sum(array.nbytes for array in jax.tree.leaves(whole.params.stacks))
    for device in range(8):
        held = sum(array.addressable_shards[device].data.nbytes for array in matrices)
        assert held == pytest.approx(total / 8, rel=0.05)
    counted = collectives(compiled_decode(model))
    assert counted["body"] == {"all-reduce": 2}
    # last_tokens; the embedding's rows and the logits where the vocabulary divides.
    assert sum(counted["rest"].values()) <= 3, counted


@pytest.mark.slow
@pytest.mark.parametrize("mesh", ["tensor=2", "tensor=4", "tensor=8", "data=2,tensor=4"])
def test_logits_of_the_large_llama(files, mesh):
    path = files("large", large_llama(), "Q4_K")
    expected, _ = logits(path, None)
    got, _ = logits(path, mesh)
    assert nmse(expected, got) < 1e-5


@pytest.mark.slow
@pytest.mark.parametrize("mesh", ["tensor=2", "tensor=3", "tensor=4", "tensor=8", "data=2,tensor=4"])
def test_logits_of_smollm2(smollm2_path, mesh):
    expected, _ = logits(smollm2_path, None)
    got, model = logits(smollm2_path, mesh)
    assert nmse(expected, got) < 1e-5
    assert (mesh == "tensor=3") == (not model.partition.notes)
