#!/usr/bin/env python3
"""Run notebooks from scratch and keep what they print and draw in their files.

    scripts/run_notebooks.py                              # all of notebooks/
    scripts/run_notebooks.py notebooks/quickstart.ipynb

Needs pip install -e ".[test]". Run it after a change to a notebook, on a machine with nothing else to do.
"""

import argparse
import time
from pathlib import Path

import nbformat
from nbclient import NotebookClient

FOLDER = Path(__file__).resolve().parent.parent / "notebooks"
CELL_SECONDS = 600


def run(path: Path) -> nbformat.NotebookNode:
    """The notebook with the outputs of a fresh kernel in its own folder. nbclient's CellExecutionError if one fails."""
    notebook = nbformat.read(path, as_version=4)
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.outputs, cell.execution_count = [], None
    NotebookClient(
        notebook,
        timeout=CELL_SECONDS,
        kernel_name="python3",
        coalesce_streams=True,
        resources={"metadata": {"path": str(path.parent)}},
    ).execute()
    for cell in notebook.cells:  # what differs from run to run and says nothing
        cell.metadata.pop("execution", None)
    notebook.metadata["language_info"] = {"name": "python"}
    return notebook


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("notebooks", nargs="*", type=Path, default=sorted(FOLDER.glob("*.ipynb")))
    for path in parser.parse_args().notebooks:
        started = time.perf_counter()
        notebook = run(path)
        nbformat.write(notebook, path)
        print(f"{path.name}: {time.perf_counter() - started:.0f} s, {path.stat().st_size / 1000:.0f} kB", flush=True)


if __name__ == "__main__":
    main()
