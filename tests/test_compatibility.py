"""A workspace that the nnlite of November 2026 (commit 3bd07d7) wrote is read, used and continued."""

from __future__ import annotations

import json
import shutil
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import SimpleITK
from safetensors.numpy import load_file
from samples import HIPPOCAMPUS, TINIEST, Command, as_options, first_cases

STORED = Path(__file__).parent / "data" / "workspace_of_3bd07d7.zip"
# Fold 0 of 3d_fullres with one epoch more: a random projection of each tensor, since CPUs round sums differently
LONGER = Path(__file__).parent / "data" / "weights_of_3bd07d7.json"
SETTINGS = TINIEST | {"training.epochs": 3, "training.iterations": 2, "training.patch_size": [16, 16, 16]}


@pytest.fixture
def old_workspace(tmp_path: Path) -> Path:
    """The workspace, with the raw files that it was made of."""
    with zipfile.ZipFile(STORED) as stored:
        stored.extractall(tmp_path)
    workspace, raw = tmp_path / "workspace", first_cases(tmp_path / "Task04_Hippocampus", 6)
    for file in workspace.rglob("*.json"):
        text = file.read_text().replace("@RAW@", str(raw)).replace("@WORKSPACE@", str(workspace))
        file.write_text(text)
    return workspace


def test_its_model_predicts_the_same_label_map(old_workspace: Path, command: Command) -> None:
    scan = HIPPOCAMPUS / "imagesTs" / "hippocampus_025.nii.gz"
    out = old_workspace.parent / "out"
    code, _, err = command("predict", "-i", scan, "-o", out, "-w", old_workspace, "--device", "cpu", cwd=out.parent)
    assert code == 0, err
    expected = SimpleITK.ReadImage(old_workspace.parent / "expected" / scan.name)
    made = SimpleITK.ReadImage(out / scan.name)
    assert np.array_equal(SimpleITK.GetArrayFromImage(made), SimpleITK.GetArrayFromImage(expected))
    assert made.GetOrigin() == expected.GetOrigin() and made.GetDirection() == expected.GetDirection()


@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize("threads", [1], indirect=True)  # others round sums differently
def test_its_training_is_extended_to_the_same_weights(old_workspace: Path, command: Command) -> None:
    words = ["train", "3d_fullres", "0", "--folds", "2", *as_options(SETTINGS), "-w", old_workspace, "--device", "cpu"]
    code, _, err = command(*words, cwd=old_workspace.parent)
    assert code == 0, err
    fold = old_workspace / "Task04_Hippocampus" / "models" / "3d_fullres-default" / "fold_0"
    weights = load_file(fold / "model.safetensors")
    random, found = np.random.default_rng(0), {}
    for name in sorted(weights):
        found[name] = float(weights[name].ravel().astype(float) @ random.standard_normal(weights[name].size))
    assert found == pytest.approx(json.loads(LONGER.read_text()), rel=1e-5, abs=1e-5)


def test_its_results_are_shown(old_workspace: Path, command: Command) -> None:
    root = old_workspace.parent
    code, out, err = command("info", "-w", old_workspace, cwd=root)
    assert code == 0, err
    assert "2d-default" in out and "3d_fullres-default" in out
    page = root / "report.html"
    code, _, err = command("report", "-o", page, "-w", old_workspace, cwd=root)
    assert code == 0, err
    assert "3d_fullres-default" in page.read_text()
    code, out, err = command("select", "--json", "-w", old_workspace, "--device", "cpu", cwd=root)
    assert code == 0, err
    assert {name for each in json.loads(out)["candidates"] for name in each["models"]} == {
        "2d-default",
        "3d_fullres-default",
    }


def test_its_plan_is_kept(old_workspace: Path, command: Command) -> None:
    plan = old_workspace / "Task04_Hippocampus" / "plans.json"

    def read() -> dict[str, Any]:
        """The plan without its predictions of memory, which count more than they did, and its reasons in words."""
        value = json.loads(plan.read_text())
        others = {"memory_gb": 0, "reasons": []}
        return {**value, "configurations": {k: {**v, **others} for k, v in value["configurations"].items()}}

    before = read()
    shutil.copy(plan, old_workspace.parent)
    raw = old_workspace.parent / "Task04_Hippocampus"
    code, _, err = command("plan", raw, "-w", old_workspace, cwd=raw.parent)
    assert code == 0, err
    assert read() == before
    assert not plan.with_name("plans_1.json").exists()
