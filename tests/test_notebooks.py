"""The notebooks of the documentation run from the first cell to the last, one after the other in one folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import nbformat
import pytest
from nbclient import NotebookClient
from samples import HIPPOCAMPUS

ROOT = Path(__file__).parents[1]
SHORT = 'TIME_LIMIT = "1s"'  # instead of minutes


def outputs_of(notebook: Any) -> str:
    """All texts of a notebook's outputs; a figure is the word image/png."""
    shown = [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]
    return "\n".join(
        str(output.get("text", "")) + "\n".join(f"{kind} {text if 'text' in kind else ''}" for kind, text in
        output.get("data", {}).items()) for output in shown
    )  # fmt: skip


@pytest.mark.slow  # the pages of test_docs.py call the same functions
def test_the_notebooks_run_in_their_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("IPYTHONDIR", str(tmp_path / "ipython"))
    (tmp_path / "tests").symlink_to(HIPPOCAMPUS.parents[1])
    shows = {"1_train": ["3d_fullres", "image/png"], "2_scores": ["hippocampus_025", "report"], "3_model": ["Anterior"]}
    for file in sorted((ROOT / "docs/notebooks").glob("*.ipynb")):
        notebook: Any = nbformat.read(file, 4)
        for cell in notebook.cells:
            cell.source = cell.source.replace('TIME_LIMIT = "3m"', SHORT)
        NotebookClient(notebook, timeout=200, resources={"metadata": {"path": str(tmp_path)}}).execute()
        words = shows.pop("_".join(file.stem.split("_")[:2]))
        assert all(word in outputs_of(notebook) for word in words), outputs_of(notebook)
    assert shows == {} and (tmp_path / "whole_hippocampus.nii.gz").is_file()
