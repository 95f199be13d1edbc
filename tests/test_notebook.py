"""Runs the notebook in examples/ from top to bottom, as a reader would, in a process of its own.

`python tests/test_notebook.py` runs it too, and saves what it printed and showed in the notebook.
"""

from __future__ import annotations

from pathlib import Path

import nbformat
from nbclient import NotebookClient


NOTEBOOK = Path(__file__).resolve().parents[1] / "examples" / "tour.ipynb"


def run() -> nbformat.NotebookNode:
    """The notebook with the outputs of this run, without progress bars and times. Raises the error of a cell."""
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    nbformat.validate(notebook)
    NotebookClient(notebook, timeout=None, resources={"metadata": {"path": str(NOTEBOOK.parent)}}).execute()
    for cell in notebook.cells:
        cell.metadata.pop("execution", None)
        if cell.cell_type == "code":
            cell.outputs = [output for output in cell.outputs if output.get("name") != "stderr"]
    return notebook


def test_the_notebook_runs():
    outputs = [output for cell in run().cells if cell.cell_type == "code" for output in cell.outputs]
    printed = "".join(output.text for output in outputs if output.output_type == "stream")
    assert "a quarter, not trained after" in printed and "embeddings included" in printed
    pictures = [output for output in outputs if "image/png" in output.get("data", {})]
    assert len(pictures) == 2


if __name__ == "__main__":
    nbformat.write(run(), NOTEBOOK)
