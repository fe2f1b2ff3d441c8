"""Adapters in the forward: every row with its own, side by side, against the dense merged model and llama.cpp."""

from pathlib import Path

import numpy as np
import pytest
import tiny_models
from adapted_forward import outputs
from random_adapters import nmse, random_adapter

from pallas_kernels import native
from realm_jax.errors import AdapterError, InvalidRequestError
from realm_jax.lora import AdapterStore, merge, read_adapter, weight_shapes
from realm_jax.model import load_model
from realm_jax.model.adapters import EMBEDDING, HEAD
from realm_jax.model.params import Model

GOLDENS = Path(__file__).parent / "golden" / "adapters"
RANKS = (3, 8, 16, 40)  # of four adapters in one batch
BASES = {"llama-Q4_K": "llama"}
MORE_BASES = {
    "phi3": "phi3",  # which has fused matrices
    **{f"llama-{t}": "llama" for t in ("F16", "Q8_0", "Q6_K", "IQ4_XS", "IQ3_S", "Q4_K_M", "TQ1_0", "Q5_1")},
    "qwen3-Q8_0": "qwen3",
    "gemma2-Q6_K": "gemma2",
    "gpt-oss-MXFP4": "gpt-oss",
    "granite": "granite",
    "deepseek2": "deepseek2",  # latent attention, a router and shared experts
}


def loaded(case: str, folder: Path, backend: str = "xla") -> Model:
    path = folder / f"{case}.gguf"
    tiny_models.write_tiny_model(case, path)
    return load_model(path, backend=backend)


def prompts(rows: int, length: int = 12) -> np.ndarray:
    return np.random.default_rng(3).integers(0, 250, (rows, length))


def check_merged(case: str, architecture: str, folder: Path) -> None:
    model = loaded(case, folder)
    shapes = weight_shapes(model)
    store = AdapterStore(model, device_slots=5)
    adapters = [
        random_adapter(
            shapes, rank, architecture=architecture, seed=rank, dtype=np.float32 if rank == 8 else np.float16
        )
        for rank in RANKS
    ]
    handles = [store.add(f"rank {a.rank}", a, scale=1.0 + 0.25 * i) for i, a in enumerate(adapters)]
    tokens = prompts(6)
    slots = store.place([None, *((h, 0.5) for h in handles), (handles[0], -1.0)])
    assert len(set(slots)) == 6
    got = outputs(model, tokens, store.stacks, slots)
    plain = outputs(model, tokens)
    np.testing.assert_array_equal(got[0], plain[0])
    for row, (adapter, scale) in enumerate(
        [*((a, 0.5 * (1.0 + 0.25 * i)) for i, a in enumerate(adapters)), (adapters[0], -1.0)], start=1
    ):
        merged, _ = merge(model, adapter, "F32", scale)
        want = outputs(merged, tokens)[row]
        assert nmse(plain[row], want) > 1e-3  # the adapter does change what is said
        assert nmse(want, got[row]) <= 1e-5, f"rank {adapter.rank}"


@pytest.mark.parametrize("case", BASES)
def test_each_row_is_the_merged_model(case: str, tmp_path: Path) -> None:
    check_merged(case, BASES[case], tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("case", MORE_BASES)
def test_each_row_is_the_merged_model_on_more_bases(case: str, tmp_path: Path) -> None:
    check_merged(case, MORE_BASES[case], tmp_path)


@pytest.mark.parametrize(
    "backend",
    [
        pytest.param("xla", marks=pytest.mark.slow),
        pytest.param("native", marks=pytest.mark.skipif(not native.available(), reason="not built")),
    ],
)
def test_a_row_has_the_same_bits_in_any_company(backend: str, tmp_path: Path) -> None:
    model = loaded("llama-Q4_K", tmp_path, backend)
    store = AdapterStore(model, device_slots=4)
    handles = [store.add(str(r), random_adapter(weight_shapes(model), r, seed=r)) for r in (4, 8)]
    tokens = prompts(4)
    rows = [(handles[0], 1.0), None, (handles[1], 1.0), (handles[0], 0.5)]
    together = outputs(model, tokens, store.stacks, store.place(rows))
    np.testing.assert_array_equal(together[1], outputs(model, tokens)[1])
    for order in ([2], [1], [3, 0], [0, 1, 2, 3][::-1]):
        mine = outputs(model, tokens[order], store.stacks, store.place([rows[i] for i in order]))
        np.testing.assert_array_equal(mine, together[order])
    if backend == "native":  # where sums go over the ranks in order, the stacks' rank does not matter either
        store.add("40", random_adapter(weight_shapes(model), 40))
        slots = store.place(rows)
        np.testing.assert_array_equal(outputs(model, tokens, store.stacks, slots), together)


@pytest.mark.parametrize("role", [EMBEDDING, HEAD])
def test_a_tied_models_embedding_and_head_are_adapted_apart(role: str, tmp_path: Path) -> None:
    model = loaded("granite", tmp_path)  # whose embeddings are scaled as well
    adapter = random_adapter(weight_shapes(model), 4, architecture="granite", takes=lambda place: place[0] == role)
    store = AdapterStore(model, device_slots=1)
    tokens = prompts(1)
    slots = store.place([(store.add("one", adapter), 1.0)])
    got = outputs(model, tokens, store.stacks, slots)
    merged, report = merge(model, adapter, "F32")
    assert nmse(outputs(merged, tokens), got) <= 1e-9
    assert list(report.errors) == [role]
    other = {EMBEDDING: HEAD, HEAD: EMBEDDING}[role]
    assert merged.params.tables[other] is model.params.tables[EMBEDDING]


def test_merging_says_its_error_and_shares_what_it_does_not_touch(tmp_path: Path) -> None:
    """Some layers of two roles: one signature of layers becomes two."""
    model = loaded("llama", tmp_path)
    shapes = weight_shapes(model)
    taken = {("attn_v.weight", 0), ("attn_v.weight", 1), ("ffn_down.weight", 0), ("ffn_down.weight", 1)}
    adapter = random_adapter(shapes, 8, takes=lambda place: place in taken)
    store = AdapterStore(model, device_slots=1)
    tokens = prompts(1)
    slots = store.place([(store.add("one", adapter), 1.0)])
    want = outputs(model, tokens, store.stacks, slots)
    reports = {}
    for form, bound in (("F32", 1e-7), ("BF16", 1e-4), ("Q8_0", 1e-3)):
        merged, reports[form] = merge(model, adapter, form)
        assert nmse(want, outputs(merged, tokens)) <= bound, form
        for role in ("attn_q.weight:F32", "ffn_down.weight:F32"):
            assert merged.params.stacks[role] is model.params.stacks[role]
        assert merged.params.stacks[f"attn_v.weight:{form}:merged"].shape == (2, *shapes["attn_v.weight", 0])
        assert set(reports[form].errors) == {f"blk.{layer}.{role}" for role, layer in taken}
        assert merged.plan.bodies == 2
        assert reports[form].bytes_after == merged.nbytes
    assert reports["F32"].worst == 0
    assert 1e-7 < reports["BF16"].worst < 1e-5  # eight bits of mantissa
    assert 1e-6 < reports["Q8_0"].worst < 1e-4
    assert model.plan.bodies == 1


@pytest.mark.skipif(not native.available(), reason="not built")
@pytest.mark.parametrize("form", ["BF16", "Q8_0"])
def test_native_layouts_are_merged_too(form: str, tmp_path: Path) -> None:
    tokens = prompts(1)
    results = {}
    for backend in ("native", "xla"):
        model = loaded("llama-Q8_0", tmp_path, backend)
        merged, report = merge(model, random_adapter(weight_shapes(model), 8, gain=0.1), form)
        results[backend] = outputs(merged, tokens), report.errors
    assert results["native"][1] == results["xla"][1]
    assert nmse(results["xla"][0], results["native"][0]) < 0.05  # of activations in int8, which small models amplify


def test_merging_refuses_what_it_cannot_store(tmp_path: Path) -> None:
    model = loaded("llama", tmp_path)
    adapter = random_adapter(weight_shapes(model), 2)
    with pytest.raises(InvalidRequestError, match="'Q4_K'; accepted: BF16, Q8_0, F32"):
        merge(model, adapter, "Q4_K")  # type: ignore[arg-type]
    odd = loaded("qwen3", tmp_path)  # the heads are 24 wide: 96 elements, and a wider file's do not fit
    with pytest.raises(AdapterError, match=r"blk\.0\.attn_k\.weight: the adapter was made for another model"):
        merge(odd, adapter)


@pytest.mark.parametrize("case", ["llama", "qwen2", "gemma3"])
def test_llama_cpp_computes_the_same(case: str, tmp_path: Path) -> None:
    """Written by scripts/make_adapter_goldens.py; both hold the adapter in float16."""
    with np.load(GOLDENS / f"{case}.npz", allow_pickle=False) as stored:
        golden = dict(stored)
    model = loaded(case, tmp_path)
    path = tmp_path / "adapter.gguf"
    path.write_bytes(golden["adapter"].tobytes())
    adapter = read_adapter(path, model.config, weight_shapes(model))
    store = AdapterStore(model, device_slots=1)
    slots = store.place([(store.add("one", adapter), float(golden["scale"]))])
    got = outputs(model, golden["tokens"][None], store.stacks, slots)[0, golden["positions"]]
    error = nmse(golden["logits"], got)
    print(f"{case}: NMSE {error:.1e}")
    assert error <= 1e-4
    assert nmse(golden["logits"], outputs(model, golden["tokens"][None])[0, golden["positions"]]) > 1e-2
