"""scripts/bench_serving: its arithmetic, the files it makes, and each section on a tiny model (slow)."""

import json
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parent.parent / "scripts"))

from benchmarks import bench_serving, model_edits, model_files, serving, serving_batch, serving_fairness, shapes
from benchmarks.engines import Engine
from benchmarks.llama_server import SLOT_TOKENS
from benchmarks.serving import Answer
from benchmarks.serving_speculation import expected_speedup

from realm_jax.engine.speculator import Speculator
from realm_jax.gguf import open_gguf
from realm_jax.model import check_model


@pytest.fixture(scope="module")
def tiny_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("models") / "tiny.gguf"
    model_files.write_model(path, shapes.SHAPES["tiny"], "Q4_1")
    return path


def answer(sent, times):
    return Answer(sent, [7] * len(times), times)


def test_a_rate_counts_what_all_were_decoding_in():
    answers = [answer(0.0, [1.0, 2.0, 3.0, 4.0, 5.0]), answer(0.0, [2.0, 2.5, 3.0, 3.5, 4.0])]
    assert serving.rate(answers) == (2 + 4) / 2.0
    assert answers[1].first_token == 2.0
    with pytest.raises(RuntimeError, match="no time in which all"):
        serving.rate([answer(0.0, [1.0, 2.0]), answer(0.0, [2.0, 3.0])])


def test_answers_that_differ_are_counted():
    one, other = answer(0.0, [1.0, 2.0]), answer(0.0, [1.0])
    assert serving.differing([one, one], [one, other]) == 1
    with pytest.raises(ValueError):
        serving.differing([one], [])


def test_bars():
    assert [serving.at_least("", x, 2.0).ok for x in (1.9, 2.0)] == [False, True]
    assert [serving.at_most("", x, 2.0).ok for x in (2.0, 2.1)] == [True, False]
    assert [serving.none_of("", x, 9).ok for x in (0, 1)] == [True, False]
    assert serving.timed("", [1.0, 9.0, 2.0], "s").figure == 2.0


def test_the_formula_of_speculation():
    assert expected_speedup(1.0, 3, 0.25, 1.25) == 2.0
    assert expected_speedup(0.0, 3, 0.25, 1.25) == 0.5
    a, k, c, v = 0.7, 5, 0.1, 1.4
    assert expected_speedup(a, k, c, v) == pytest.approx((1 - a ** (k + 1)) / ((1 - a) * (k * c + v)))


def test_fixed_drafts_do_not_adapt_and_can_be_undone():
    speculator = Speculator(lambda rows: rows, 64)
    undo = serving.fix_drafts(speculator)
    request = speculator.start(5)
    for _ in range(40):
        assert request.choose(0, 100.0) == 5
        assert request.active
        request.observe(5, 0)
    assert request.result().drafted == 200
    undo()
    assert not isinstance(speculator.start(5), serving.FixedDrafts)


def test_lengths_are_mixed_and_fit_the_peers_slots():
    lengths = serving_batch.mixed_lengths(quick=False)
    assert len(lengths) == 64
    assert lengths == serving_batch.mixed_lengths(quick=False)
    assert max(prompt + output for prompt, output in lengths) <= SLOT_TOKENS
    assert len({prompt for prompt, _ in lengths}) > 30
    assert len(serving_batch.mixed_lengths(quick=True)) == 16


def test_the_simulators_figures_keep_their_bars():
    rows = list(serving_fairness.simulated())
    assert len(rows) == 4
    assert all(row.ok and row.figure > 0 for row in rows)


def test_steps_before_a_tenants_own_are_counted_from_the_log():
    loop = SimpleNamespace(_launch=lambda rows: len(rows))
    launch = loop._launch
    with serving_fairness.StepLog(SimpleNamespace(core=SimpleNamespace(loop=loop))) as log:
        row = SimpleNamespace(sequence=SimpleNamespace(tenant="flood"), samples=True)
        assert loop._launch([row]) == 1
    assert [rows for _, rows in log.steps] == [[("flood", True)]]
    assert loop._launch is launch
    log.steps = [
        (1.0, [("light", True)]),
        (2.0, [("flood", True)]),
        (3.0, [("flood", True), ("light", False)]),
        (4.0, [("light", True)]),
    ]
    assert log.first_of("light", since=1.5) == (1, 2)


def test_models_of_another_ones_layers(tiny_file, tmp_path):
    count = model_edits.layer_count(tiny_file)
    assert count == 2
    deep, short = tmp_path / "deep.gguf", tmp_path / "short.gguf"
    model_edits.write_layers(tiny_file, deep, model_edits.deepened(count, 5))
    model_edits.write_layers(tiny_file, short, model_edits.without(count, [0]))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["deep.gguf", "short.gguf"]
    with open_gguf(tiny_file) as old, open_gguf(deep) as file, open_gguf(short) as less:
        assert check_model(file)[0].num_layers == 5
        assert check_model(less)[0].num_layers == 1
        for name in ("token_embd.weight", "blk.1.ffn_down.weight"):
            np.testing.assert_array_equal(file.data(name), old.data(name))
        for name, source in (("blk.4.ffn_up", "blk.0.ffn_up"), ("blk.3.attn_q", "blk.1.attn_q")):
            np.testing.assert_array_equal(file.data(f"{name}.weight"), old.data(f"{source}.weight"))
        for name in ("blk.2.attn_output", "blk.4.ffn_down"):
            assert not file.data(f"{name}.weight").any()
        np.testing.assert_array_equal(less.data("blk.0.attn_k.weight"), old.data("blk.1.attn_k.weight"))
        assert less.metadata["tokenizer.ggml.tokens"] == old.metadata["tokenizer.ggml.tokens"]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["batch", "magic"], "there is no section magic; accepted: batch, adapters, "),
        (["--repeats", "0"], "--repeats is 0; accepted: 1 or more"),
        (["--threads", "0"], "--threads is 0; accepted: 1 to"),
        (["--small", "no-such-model"], "no-such-model"),
    ],
)
def test_options_that_are_refused(arguments, said, capsys):
    with pytest.raises(SystemExit) as ended:
        bench_serving.main(arguments)
    assert ended.value.code == 2
    [line] = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ")
    assert said in line


def test_a_section_that_fails_keeps_its_rows_and_says_why(monkeypatch, capsys):
    def run(plan):
        yield serving.at_least("first", 3.0, 2.0)
        raise ValueError("out of luck\nand more")

    monkeypatch.setattr(serving_fairness, "run", run)
    first, last = bench_serving._section("fairness", None)
    assert (first.name, first.ok) == ("first", True)
    assert (last.figure, last.ok, last.problem) == (None, False, "ValueError: out of luck")


@pytest.mark.oracle
def test_llama_cpp_serves_a_trace(tiny_file):
    trace = [([5, 6, 7] * (1 + i), 3 + i % 4) for i in range(11)]
    with Engine("llama.cpp", "llama_engine", str(tiny_file), threads=1) as llama:
        llama.loaded()
        assert llama.ask("trace", requests=trace)["seconds"] > 0


@pytest.mark.slow
def test_sections_on_a_tiny_model(tmp_path, capsys):
    out = tmp_path / "serving.json"
    options = ["--quick", "--no-peers", "--small", "tiny:Q4_1", "--files", str(tmp_path), "--json", str(out)]
    assert bench_serving.main(["batch", "adapters", "fairness", *options]) == 0
    rows = {row["name"]: row for row in json.loads(out.read_text())["rows"]}
    assert rows["batch, small: greedy answers that are not as if alone"]["figure"] == 0
    assert rows["adapters, small: decode 8 with 4 adapters of rank 16"]["problem"] == ""
    assert rows["fairness, small: steps dispatched before a light tenant's own"]["ok"]
    assert "| adapters, small" in capsys.readouterr().out
