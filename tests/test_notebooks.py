"""The notebooks run from scratch: no cell fails (each asserts what it claims), nothing lands on stderr, in time.

As committed they have the outputs of such a run, made by scripts/run_notebooks.py.
"""

import sys
import time
from pathlib import Path

import nbformat
import pytest

sys.path.insert(0, str(Path(__file__).parent.parent / "scripts"))

from run_notebooks import FOLDER, run

ROOT = Path(__file__).parent.parent
NOTEBOOKS = sorted(path.stem for path in FOLDER.glob("*.ipynb"))
SECONDS = 180
BYTES = 500_000


def outputs(notebook: nbformat.NotebookNode) -> list[nbformat.NotebookNode]:
    return [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]


def pictures(notebook: nbformat.NotebookNode) -> int:
    return sum("image/png" in output.get("data", {}) for output in outputs(notebook))


def texts(notebook: nbformat.NotebookNode) -> str:
    return "".join(output.get("text", "") for output in outputs(notebook))


def test_there_are_notebooks() -> None:
    assert {"quickstart", "tenants", "speculation", "inside_a_quantized_model", "sharded"} <= set(NOTEBOOKS)


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_it_is_committed_with_its_outputs(name: str) -> None:
    path = FOLDER / f"{name}.ipynb"
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    first, last = notebook.cells[0], notebook.cells[-1]
    assert first.cell_type == last.cell_type == "markdown"
    assert first.source.startswith("# ")
    assert last.source.startswith("## On other hardware")
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1)), "run scripts/run_notebooks.py"
    assert pictures(notebook) >= 2
    assert path.stat().st_size < BYTES
    assert not [output for output in outputs(notebook) if output.output_type == "error"]
    said = texts(notebook)
    assert len(said.splitlines()) < 150
    assert "/tmp" not in said
    assert "/home" not in said
    assert str(ROOT) not in said


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[] if name == "quickstart" else pytest.mark.slow) for name in NOTEBOOKS]
)
def test_it_runs_from_scratch(name: str, smollm2_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("REALM_TEST_MODEL", str(smollm2_path))
    path = FOLDER / f"{name}.ipynb"
    committed = nbformat.read(path, as_version=4)
    started = time.perf_counter()
    notebook = run(path)
    seconds = time.perf_counter() - started
    print(f"{name}: {seconds:.1f} s")
    assert seconds < SECONDS
    assert pictures(notebook) == pictures(committed)
    assert [output.text for output in outputs(notebook) if output.get("name") == "stderr"] == []
