"""Whole models on the native kernels: one numerics class for every batch, chunk and order, and close to float32."""

from pathlib import Path

import numpy as np
import pytest
from test_quant_matmul import nmse
from tiny_models import token_ids, write_tiny_model

from pallas_kernels import native
from realm_jax import LLM, SamplingParams
from realm_jax.engine.runner import Runner
from realm_jax.model import load_model
from realm_jax.model.backend import resolve_backend

pytestmark = pytest.mark.skipif(not native.available(), reason=native.why_not())

CASES = [  # architecture, type of its matrices
    ("llama", "Q4_0"),
    ("llama", "Q8_0"),
    ("qwen3", "Q5_1"),
    ("gemma3", "Q4_1"),
    ("gpt-oss", "MXFP4"),
    ("deepseek2", "Q8_0"),
    ("qwen2moe", "Q8_0"),
]


def runner(path: Path, backend: str = "native", context: int = 320) -> Runner:
    return Runner(load_model(path, context, backend=backend), max_batch=8)


def table(r: Runner, row: int) -> np.ndarray:
    return row * r.max_pages_per_slot + np.arange(r.max_pages_per_slot, dtype=np.int32)


def cached(r: Runner, row: int, tokens: int) -> list[np.ndarray]:
    """The first `tokens` cached rows of a sequence, of every layer, as bytes."""
    assert r.executor.pool is not None
    pages = table(r, row)[: -(-tokens // r.page_size)]
    out = []
    for a in (r.executor.pool.keys, r.executor.pool.values):
        if not a.shape[-1]:  # latent attention has no values of its own
            continue
        rows = np.asarray(a)[:, pages].swapaxes(1, 2)  # [layers, kv_heads, pages, page, dim]
        out.append(rows.reshape(*rows.shape[:2], -1, rows.shape[-1])[:, :, :tokens].copy().view(np.uint8))
    return out


def fed(r: Runner, row: int, tokens: np.ndarray, cuts: list[int]) -> tuple[np.ndarray, list[np.ndarray]]:
    """Logits after the last token and cached rows, the tokens fed in pieces that end at `cuts`."""
    start = 0
    for end in [*cuts, len(tokens)]:
        logits = np.asarray(r.step([tokens[start:end]], [start], table(r, row)[None]))[0]
        start = end
    return logits.view(np.uint32), cached(r, row, len(tokens))


def same(got, want, what: str) -> None:
    np.testing.assert_array_equal(got[0], want[0], err_msg=f"logits, {what}")
    for a, b in zip(got[1], want[1]):
        np.testing.assert_array_equal(a, b, err_msg=f"cached rows, {what}")


@pytest.mark.parametrize(("case", "type"), CASES)
def test_neither_cut_nor_company_changes_a_bit(case, type, tmp_path):
    write_tiny_model(case, tmp_path / "tiny.gguf", weight_type=type)
    r = runner(tmp_path / "tiny.gguf")
    tokens = np.random.default_rng(0).integers(0, 200, 260).astype(np.int32)
    want = fed(r, 0, tokens, [128, 256])
    same(fed(r, 1, tokens, [*range(16, 260, 16)]), want, "chunks of 16")
    same(fed(r, 2, tokens, [1, 2, 7, 100, 228, 259]), want, "odd chunks")
    for rows in (2, 5, 8):  # the last token again, with company of other lengths
        others = [tokens[: 3 + i] for i in range(rows - 1)]
        tables = np.stack([table(r, 2), *(table(r, 3 + i % 5) for i in range(rows - 1))])
        got = np.asarray(r.step([tokens[259:], *others], [259] + [0] * (rows - 1), tables))[0]
        same((got.view(np.uint32), cached(r, 2, 260)), want, f"{rows} rows")


def test_token_by_token_is_the_prompt_at_once(tmp_path):
    write_tiny_model("llama", tmp_path / "tiny.gguf", weight_type="Q8_0")
    r = runner(tmp_path / "tiny.gguf")
    tokens = np.random.default_rng(1).integers(0, 200, 140).astype(np.int32)
    same(fed(r, 1, tokens, list(range(1, 140))), fed(r, 0, tokens, [128]), "one by one")
    everything = r.step_all(tokens, 0, table(r, 2))
    np.testing.assert_array_equal(everything[-1].view(np.uint32), fed(r, 3, tokens, [128])[0])


@pytest.mark.parametrize(("case", "type"), CASES)
def test_logits_are_close_to_the_exact_ones(case, type, tmp_path):
    write_tiny_model(case, tmp_path / "tiny.gguf", weight_type=type)
    tokens = np.asarray(token_ids(), np.int32)
    got, want = (runner(tmp_path / "tiny.gguf", b).step_all(tokens, 0, np.arange(6)) for b in ("native", "xla"))
    mixture = case in ("gpt-oss", "deepseek2", "qwen2moe")  # where a close call of the router picks another expert
    assert 0 < nmse(got, want) < (3e-2 if mixture else 3e-3)


def test_it_is_the_default_here(tmp_path):
    write_tiny_model("llama", tmp_path / "tiny.gguf", weight_type="Q8_0")
    assert resolve_backend("auto") == "native"
    params = SamplingParams(max_tokens=6, ignore_eos=True)
    with LLM(tmp_path / "tiny.gguf") as auto, LLM(tmp_path / "tiny.gguf", backend="native") as named:
        assert auto.generate([1, 2, 3], params).tokens == named.generate([1, 2, 3], params).tokens


def test_a_machine_without_the_library_is_told_once(monkeypatch, caplog):
    monkeypatch.setattr(native, "available", lambda: False)
    monkeypatch.setattr(native, "why_not", lambda: "the native CPU kernels were not built")
    assert resolve_backend("auto") == resolve_backend("auto") == "xla"
    assert [r.message for r in caplog.records] == [
        "the native CPU kernels were not built; until then XLA serves, at a fraction of the speed"
    ]
