"""The notebooks run from top to bottom and are saved with their outputs."""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import nbformat
import pytest
from nbclient import NotebookClient

ROOT = Path(__file__).parents[1]
NOTEBOOKS = sorted(ROOT.glob("docs/notebooks/*.ipynb"))


def text(cell: Any) -> str:
    """The text output of a cell, without progress bars."""
    kept = [out for out in cell.outputs if out.get("name") != "stderr"]
    return "".join(out.get("text") or out.get("data", {}).get("text/plain", "") for out in kept)


def code_cells(notebook: Any) -> list[Any]:
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


@pytest.mark.slow
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_runs(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "docs" / "notebooks"
    folder.mkdir(parents=True)
    (tmp_path / "config").symlink_to(ROOT / "config")
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    saved = nbformat.read(path, as_version=4)
    nbformat.validate(saved)
    fresh = nbformat.read(path, as_version=4)
    for cell in code_cells(fresh):
        cell.outputs = []
    NotebookClient(fresh, timeout=250, resources={"metadata": {"path": str(folder)}}).execute()
    for before, after in zip(code_cells(saved), code_cells(fresh), strict=True):
        assert before.execution_count is not None
        assert bool(text(before)) == bool(text(after)), before.source
    shown = [text(cell) for cell in code_cells(saved)]
    assert not any(str(Path.home()) in one for one in shown)
    assert "Did you mean 'trainor.batch_size'?" in text(code_cells(fresh)[2])
    assert "ConVIRT of ckpt/first-steps/" in text(code_cells(fresh)[4])


def test_the_first_cell_clones_the_repository_only_on_colab(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    [path] = NOTEBOOKS
    source = code_cells(nbformat.read(path, as_version=4))[0].source
    called: list[list[str]] = []
    monkeypatch.setattr("subprocess.run", lambda words, check: called.append(words))
    monkeypatch.setattr("os.chdir", lambda folder: called.append([folder]))
    monkeypatch.setattr(sys, "path", [*sys.path])
    exec(source, {})
    assert called == []
    monkeypatch.setitem(sys.modules, "google.colab", ModuleType("google.colab"))
    exec(source, {})
    clone, install, folder = called
    assert clone[:2] == ["git", "clone"]
    assert install == [sys.executable, "-m", "pip", "install", "--quiet", "-e", clone[-1]]
    assert folder == [f"{clone[-1]}/docs/notebooks"]
    assert sys.path[0] == clone[-1]


def test_notebooks_exist() -> None:
    assert [path.name for path in NOTEBOOKS] == ["first-steps.ipynb"]
