"""scripts/bench_peer, bench_kernels and gpu_check at sizes that take no time. What they measure is not asserted."""

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parent.parent / "scripts"))

from benchmarks import bench_kernels, bench_peer, gpu_check, machine, model_files, report, shapes
from benchmarks.engines import Engine, EngineError
from benchmarks.machine import Peaks
from benchmarks.report import Row

from realm_jax.gguf import open_gguf
from realm_jax.model import check_model

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def tiny_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("models") / "tiny.gguf"
    model_files.write_model(path, shapes.SHAPES["tiny"], "Q4_K_M")
    return path


# The report


@pytest.mark.parametrize(
    ("row", "ratio", "of_limit"),
    [
        (Row("rate", 50.0, "tokens/s", limit=100.0, peer=25.0), 2.0, 0.5),
        (Row("time", 50.0, "us", limit=25.0, peer=100.0, higher=False), 2.0, 0.5),
        (Row("alone", 50.0, "us"), None, None),
        (Row("failed", None, "us", limit=1.0, peer=2.0, problem="no"), None, None),
    ],
)
def test_ratios_above_one_are_better_than_the_peer(row: Row, ratio: float | None, of_limit: float | None) -> None:
    assert (row.ratio, row.of_limit) == (ratio, of_limit)


def test_a_table_has_a_line_a_row_and_says_what_failed() -> None:
    rows = [
        Row("decode 1", 61.5, "tokens/s", limit=123.0, peer=41.0, peer_name="llama.cpp"),
        Row("decode 8", None, "tokens/s", problem="it does not load this file"),
        Row("memory", 2000.0, "MB", limit=1000.0, higher=False, ok=False),
    ]
    lines = [[cell.strip() for cell in line.strip("|").split("|")] for line in report.table(rows).splitlines()]
    assert lines[0] == ["", "figure", "limit", "of limit", "peer", "ratio", ""]
    assert lines[2] == ["decode 1", "61.5 tokens/s", "123", "50%", "41.0 llama.cpp", "1.50", ""]
    assert lines[3] == ["decode 8", "-", "", "", "", "", "it does not load this file"]
    assert lines[4] == ["memory", "2000 MB", "1000", "50%", "", "", "MISSED"]
    assert len({len(line) for line in report.table(rows).splitlines()}) == 1


def test_the_json_says_when_where_and_with_what(tmp_path: Path) -> None:
    row = Row("decode 1", 61.5, "tokens/s", limit=123.0, samples=[61.0, 61.5, 62.0])
    report.write(tmp_path / "report.json", "bench_peer", [row], {"cpu": "Z80"}, {"threads": 2})
    written = json.loads((tmp_path / "report.json").read_text())
    assert written["script"] == "bench_peer"
    assert (written["machine"], written["settings"]) == ({"cpu": "Z80"}, {"threads": 2})
    assert written["date"][:2] == "20"
    assert {"python", "jax", "numpy"} <= written["versions"].keys()
    assert written["rows"][0]["of_limit"] == 0.5
    assert report.row_from(written["rows"][0]) == row


# The machine


def test_the_limit_is_the_longest_part_of_the_work() -> None:
    peaks = Peaks(read=10.0, int8=1000.0, float32=None)
    assert peaks.seconds(20e9, int8=1000e9) == pytest.approx(2.0)
    assert peaks.seconds(20e9, int8=5000e9, float32=1e15) == pytest.approx(5.0)
    assert Peaks(None).seconds(1e9) is None
    assert peaks.best(Peaks(read=9.0, float32=3.0)) == Peaks(10.0, 1000.0, 3.0)


def test_peaks_are_measured_with_a_compiler_and_without(monkeypatch: pytest.MonkeyPatch) -> None:
    with machine.Meter(1, 8) as meter:
        assert meter.measure().read > 0  # type: ignore[operator]
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setattr(machine.shutil, "which", lambda _: None)
    with machine.Meter(2, 8) as meter:
        found = meter.measure()
        assert found.read > 0  # type: ignore[operator]
        assert found.int8 is None


# Shaped files


def test_q4_k_m_keeps_half_of_two_matrices_wider() -> None:
    kinds = [shapes.type_of("Q4_K_M", "ffn_down", layer, 32) for layer in range(32)]
    assert kinds.count("Q6_K") == 16
    assert kinds[:4] == kinds[-4:] == ["Q6_K"] * 4
    assert {shapes.type_of("Q4_K_M", "ffn_up", layer, 32) for layer in range(32)} == {"Q4_K"}
    assert shapes.type_of("Q8_0", "token_embd", 0, 32) == "Q8_0"
    assert shapes.type_of("IQ3_S", "token_embd", 0, 32) == "Q6_K"


@pytest.mark.parametrize("mixture", ["Q4_0", "IQ2_XS", "TQ1_0"])
def test_a_shaped_file_is_a_model_with_finite_weights(mixture: str, tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    shape = shapes.with_layers(shapes.SHAPES["tiny"], 1)
    model_files.write_model(path, shape, mixture)
    assert [p.name for p in tmp_path.iterdir()] == ["model.gguf"]
    with open_gguf(path) as file:
        config, specs = check_model(file)
        assert (config.num_layers, config.hidden_size, config.vocab_size) == (1, shape.hidden, shape.vocabulary)
        assert file.tensors["blk.0.ffn_up.weight"].type.name == mixture
        assert len(specs) == len(file.tensors) == 2 + 9


# Engines


def test_realm_answers_what_it_is_asked(tiny_file: Path) -> None:
    with Engine("Realm", "realm_engine", str(tiny_file), threads=1) as realm:
        facts = realm.loaded()
        assert facts["context_length"] == 1024
        assert facts["weight_bytes"] < facts["file_bytes"] == tiny_file.stat().st_size
        assert realm.ask("prefill", tokens=20)["seconds"] > 0
        assert realm.ask("decode", batch=2, steps=3)["seconds"] > 0
        assert realm.ask("open_context", tokens=20, room=6)["seconds"] > 0
        assert realm.ask("steps", count=3)["seconds"] > 0
        assert realm.ask("close_context") == {}
        memory = realm.ask("memory")
        assert memory["peak_bytes"] > memory["cache_bytes"] > 0


def test_an_engine_that_fails_says_why_in_one_line(tmp_path: Path) -> None:
    with Engine("Realm", "realm_engine", str(tmp_path / "none.gguf"), threads=1) as realm:
        with pytest.raises(EngineError, match=r"^Realm: \w+Error: .*none\.gguf"):
            realm.loaded()
        with pytest.raises(EngineError, match="Realm ended with code 1"):
            realm.ask("memory")
    with (
        Engine("nobody", "no_such_module", threads=1) as nobody,
        pytest.raises(EngineError, match=r"nobody ended with code 1: .*no_such_module"),
    ):
        nobody.loaded()


@pytest.mark.oracle
def test_both_engines_in_turns(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "peer.json"
    options = ["--quick", "--context", "--json", str(out), "--files", str(tmp_path)]
    assert bench_peer.main(["tiny:Q4_K", *options]) == 0
    rows = {row["name"]: row for row in json.loads(out.read_text())["rows"]}
    assert rows.keys() >= {"prefill 256", "decode 1", "decode 1, weights read", "decode 8", "peak memory", "loading"}
    for row in rows.values():
        assert row["figure"] > 0
        assert row["peer"] > 0
    assert "decode 1 at 128 of context" in rows
    assert "| decode 8" in capsys.readouterr().out
    assert (tmp_path / "tiny-2-Q4_K.gguf").exists()


# The commands


def refusal(main: Any, capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """The one line a command refuses these arguments with."""
    with pytest.raises(SystemExit) as ended:
        main(list(arguments))
    assert ended.value.code == 2
    [line] = capsys.readouterr().err.splitlines()
    return line


def test_bench_peer_needs_the_peer(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(bench_peer.importlib.util, "find_spec", lambda _: None)
    assert refusal(bench_peer.main, capsys) == (
        "error: llama-cpp-python is not installed; in the environment of this Python: pip install -e '.[oracle]'"
    )


@pytest.mark.parametrize(
    ("main", "arguments", "said"),
    [
        (bench_peer.main, ["--threads", "0"], "--threads is 0; accepted: 1 to"),
        (bench_peer.main, ["--layers", "0"], "--layers is 0; accepted: 1 or more"),
        (bench_kernels.main, ["--types", "Q4_K,Q9"], "--types names Q9; accepted: Q4_0, "),
        (bench_kernels.main, ["--only", "matmul"], "--only names matmul; accepted: quant_matmul, "),
        (bench_kernels.main, ["--rows", "1,x"], "--rows is 1,x; accepted: numbers"),
        (bench_kernels.main, ["--rows", "0"], "--rows is [0]; accepted: 1 and more"),
        (gpu_check.main, ["--steps", "info,magic"], "--steps names magic; accepted: info, "),
        (gpu_check.main, ["--wheels", "/nowhere"], "--wheels is /nowhere, where there are no wheels"),
    ],
)
def test_options_that_are_refused(
    main: Any, arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert refusal(main, capsys, *arguments).startswith(f"error: {said}")


@pytest.mark.parametrize("name", ["bench_peer", "bench_kernels", "bench_serving", "gpu_check"])
def test_the_commands_start_anywhere(name: str, tmp_path: Path) -> None:
    command = [sys.executable, str(ROOT / "scripts" / name), "--help"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, timeout=60)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith(f"usage: {name}")


@pytest.mark.slow
def test_bench_kernels_times_every_operation(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "kernels.json"
    assert bench_kernels.main(["--tiny", "--types", "Q6_K", "--rows", "1,3", "--json", str(out)]) == 0
    rows = json.loads(out.read_text())["rows"]
    operations = [row["name"].partition(" ")[0].rstrip(",") for row in rows]
    assert operations == [
        *["quant_matmul"] * 2,
        *["paged_attention"] * 2,
        *["flash_attention"] * 2,
        *["grouped_lora"] * 2,
    ]
    assert [row["problem"] for row in rows] == [""] * 8
    assert all(row["figure"] > 0 for row in rows)
    assert "| grouped_lora" in capsys.readouterr().out


# gpu_check, dry


def test_a_dry_run_measures_then_checks(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "gpu.json"
    steps = "info,ceilings,prefill,transformers"
    assert gpu_check.main(["--dry-run", "--steps", steps, "--json", str(out)]) == 0
    written = json.loads(out.read_text())
    assert written["machine"]["device"]["platform"] == "cpu"
    assert written["machine"]["peaks"]["read"] > 0
    assert written["settings"]["steps"] == steps.split(",")
    matmuls = [row for row in written["rows"] if row["name"].startswith("quant_matmul")]
    assert [row["problem"] for row in matmuls] == [""] * 3
    assert all(row["limit"] > 0 and row["peer"] > 0 for row in matmuls)  # peaks went from one step to the next
    assert "figures mean nothing" in capsys.readouterr().out


@pytest.mark.slow
def test_every_step_of_a_dry_run(tmp_path: Path) -> None:
    out = tmp_path / "gpu.json"
    assert gpu_check.main(["--dry-run", "--seconds", "900", "--json", str(out)]) == 0
    rows = json.loads(out.read_text())["rows"]
    assert [row["name"] for row in rows if row["unit"] == "NMSE" and not row["ok"]] == []
    names = {row["name"] for row in rows}
    assert {"least Q4_K_M: decode 1", "least Q8_0: prefill 16", "launch_sharded.py, tiny Q4_K: decode_8"} <= names


def test_a_step_that_hangs_is_stopped_and_its_figures_kept() -> None:
    code = "import json, time; print(json.dumps({'row': 1}), flush=True); print('{\"row\"', flush=True); time.sleep(60)"
    begun = time.monotonic()
    entries, problem = gpu_check._run([sys.executable, "-c", code], {}, 2.0)
    assert time.monotonic() - begun < 30
    assert (entries, problem) == ([{"row": 1}], "stopped after 2 s")


def test_a_step_that_fails_says_why() -> None:
    entries, problem = gpu_check._run([sys.executable, "-c", "raise ValueError('out of luck')"], {}, 20.0)
    assert (entries, problem) == ([], "ended with code 1: ValueError: out of luck")


def test_no_step_starts_without_time(tmp_path: Path) -> None:
    out = tmp_path / "gpu.json"
    assert gpu_check.main(["--dry-run", "--steps", "flash", "--seconds", "1", "--json", str(out)]) == 1
    [row] = json.loads(out.read_text())["rows"]
    assert (row["name"], row["figure"], row["problem"]) == ("flash", None, "no time was left")


def test_transformers_stand_beside_the_same_work() -> None:
    rows = [
        Row("8B Q4_K_M: decode 1", 400.0, "tokens/s"),
        Row("8B Q4_K_M: prefill 1024", None, "tokens/s", problem="no"),
        Row("transformers bf16: decode 1", 40.0, "tokens/s"),
    ]
    gpu_check._add_transformers(rows)
    assert [row.ratio for row in rows] == [10.0, None, None]


def test_checks_see_what_is_wrong() -> None:
    from benchmarks import checks

    right = np.arange(6.0)
    assert checks.nmse(right, right) == 0
    assert checks.nmse(right * 1.01, right) == pytest.approx(1e-4)
    assert not checks._row("nan", lambda: checks.nmse(right * np.nan, right)).ok
    failed = checks._row("raises", lambda: 1 / 0)
    assert (failed.ok, failed.figure, failed.problem) == (False, None, "ZeroDivisionError: division by zero")
