"""scripts/ablation.py: trains the base and an ablation, prints their table, and resumes where it stopped."""

from __future__ import annotations

import re
import runpy
import shutil
import sys
from pathlib import Path

import pytest
from samples import TINIEST

LENGTH = ("training.epochs", "training.iterations")
SCRIPT = Path(__file__).parent.parent / "scripts" / "ablation.py"


def test_table_of_an_ablation(
    tiny_workspace: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    workspace, table = tmp_path / "workspace", tmp_path / "table.md"
    shutil.copytree(tiny_workspace, workspace, ignore=shutil.ignore_patterns("models"))  # other tests train there
    settings = TINIEST | {"training.patch_size": [16, 16, 16]}
    changes = [f"--set={key}={str(value).lower()}" for key, value in settings.items() if key not in LENGTH]
    options = ["--recipe", "cpu", "--iterations", "4", "--device", "cpu", "-w", str(workspace), "--output", str(table)]

    def run(*more: str) -> str:
        monkeypatch.setattr(sys, "argv", [str(SCRIPT), str(tmp_path / "Task04_Hippocampus"), *options, *changes, *more])
        runpy.run_path(str(SCRIPT), run_name="__main__")
        return capfd.readouterr().err

    monkeypatch.syspath_prepend(SCRIPT.parent)

    run("--only", "relu")
    again = run("--only", "relu")
    assert again.count("training is finished") == 2
    head, _, base, relu = table.read_text().splitlines()[2:]
    assert head == "| cpu, 4 steps | Anterior | Posterior | mean | 95 % interval |"
    assert base.startswith("| base | 0.") and re.match(r"\| relu \| 0\.\d{4} \(([+-].*%|n/a)\) \|", relu)
    models = {path.name for path in workspace.glob("*/models/*")}
    assert models == {"cpu-base", "cpu-relu"}
