"""`nnlite list`, `nnlite clean`, and `nnlite train` without a fold: what a workspace holds."""

from __future__ import annotations

import json
import os
import shlex
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from samples import TINIEST, Command

import nnunet_lite
from nnunet_lite.commands.inventory import clean, list_workspace, read_fold_states
from nnunet_lite.errors import Busy, UserError
from nnunet_lite.models.folder import lock_fold


@pytest.fixture
def workspace(tiny_workspace: Path, tiny_model: Path, tmp_path: Path) -> Path:
    """A copy of a workspace with a dataset, and a model of it with one fold."""
    return Path(shutil.copytree(tiny_workspace, tmp_path / "nnlite_workspace"))


@pytest.fixture
def models(workspace: Path) -> Path:
    root = workspace / "Task04_Hippocampus" / "models"
    for folder in root.iterdir():
        if folder.name != "tiny":  # of another test
            shutil.rmtree(folder)
    return root


def test_train_without_a_fold_lists_them_and_the_next_command_trains_one(command: Command, models: Path) -> None:
    here = models.parents[2]
    code, out, _ = command("train", cwd=here)
    assert code == 0 and len(out.splitlines()) == 1 + 5 + 5 + 1
    assert out.splitlines()[1].split() == ["2d", "-", "0", "not", "started"]
    assert "3d_fullres     tiny   0     finished, mean Dice 0." in out
    code, out, _ = command("train", 4, "3d_fullres", "--json", cwd=here)
    about = json.loads(out)
    assert code == 0 and [fold["state"] for fold in about["folds"]] == ["finished", *["not started"] * 4]
    next_command = shlex.split(about["next"])
    assert next_command[:4] == ["nnlite", "train", "3d_fullres", "1"] and "--name" in next_command
    code, _, err = command(*next_command[1:], "--device", "cpu", cwd=here)
    assert code == 0, err
    assert "\nnext: nnlite predict -i IMAGES -o SEGMENTATIONS -m tiny; or nnlite view hippocampus_" in err
    assert (models / "tiny" / "fold_1" / "model.safetensors").is_file(), "the settings are those of the model"


def test_a_first_fold_is_named_where_nothing_is_trained(command: Command, workspace: Path) -> None:
    shutil.rmtree(workspace / "Task04_Hippocampus" / "models")
    code, out, _ = command("train", cwd=workspace.parent)
    recipe = "" if torch.cuda.is_available() else " --recipe cpu"
    assert code == 0 and out.splitlines()[-1] == f"next: nnlite train 3d_fullres 0{recipe}"
    assert command("train", "2d", cwd=workspace.parent)[1].splitlines()[-1] == f"next: nnlite train 2d 0{recipe}"
    assert f"Run `nnlite train 3d_fullres 0{recipe}`." in command("select", cwd=workspace.parent)[2]
    code, out, err = command("train", "3d_lowres", cwd=workspace.parent)
    assert (code, out) == (2, "") and "has no configuration '3d_lowres'. It has: 2d, 3d_fullres." in err


def test_a_label_that_a_fold_lacks_counts_once(command: Command, models: Path) -> None:
    """The Dice of a model is that of `select` and the report, not a mean of folds of which one has no such label."""
    for fold, dice in enumerate(((0.5, 0.9), (0.7, None), (float("nan"), None))):
        validation = models / "tiny" / f"fold_{fold}" / "validation"
        validation.mkdir(parents=True, exist_ok=True)
        metrics = {label: {"Dice": value} for label, value in zip("12", dice, strict=True)}
        means = {"foreground_mean": {"Dice": sum(filter(None, dice))}}
        scored = {"prediction_file": f"/elsewhere/c{fold}.nii.gz", "metrics": metrics}
        (validation / "summary.json").write_text(json.dumps(means | {"metric_per_case": [scored]}))
    code, out, _ = command("list", cwd=models.parents[2])
    assert code == 0 and out.splitlines()[1].split()[-1] == "0.7500"


def test_the_states_of_a_fold(models: Path, capfd: pytest.CaptureFixture[str]) -> None:
    fold = models / "tiny" / "fold_0"

    def state() -> str:
        return read_fold_states(models / "tiny")[0].to_text()

    assert state().startswith("finished, mean Dice 0.")
    with lock_fold(fold):
        assert state() == "training, epoch 2 of 2"
    shutil.rmtree(fold / "validation")
    assert state() == "not scored"
    (fold / "model.safetensors").unlink()
    assert state() == "interrupted, epoch 2 of 2"
    (fold / "checkpoint.safetensors").write_bytes(b"cut off")
    capfd.readouterr()
    assert read_fold_states(models / "tiny") == []
    assert "warning" in capfd.readouterr().err
    (fold / "checkpoint.safetensors").unlink()
    assert state() == "not started"


def test_an_interrupted_fold_comes_first(models: Path) -> None:
    (models / "tiny" / "fold_0" / "model.safetensors").unlink()
    about = nnunet_lite.train(workspace=models.parents[1])
    assert about.values["next"].startswith("nnlite train 3d_fullres 0 --epochs 2 --iterations 3 ")
    with lock_fold(models / "tiny" / "fold_0"):
        about = nnunet_lite.train(workspace=models.parents[1])
    assert about.values["next"].startswith("nnlite train 3d_fullres 1 "), "a running fold is not to be trained"


def test_the_model_that_was_trained_last_comes_first(models: Path) -> None:
    """An older run that was abandoned is not named, and a time limit is written as it is typed."""
    workspace, run = models.parents[1], json.loads((models / "tiny" / "run.json").read_text())
    shutil.copytree(models / "tiny", models / "3d_fullres-default")
    (models / "3d_fullres-default" / "fold_0" / "model.safetensors").unlink()
    os.utime(models / "3d_fullres-default" / "fold_0" / "checkpoint.safetensors", (1, 1))
    run["settings"]["training"]["time_limit"] = 3.0
    (models / "tiny" / "run.json").write_text(json.dumps(run))
    about = nnunet_lite.train(workspace=workspace)
    assert about.values["next"].startswith("nnlite train 3d_fullres 1 ") and " --time-limit 3m " in about.values["next"]
    for fold in "1234":
        shutil.copytree(models / "tiny" / "fold_0", models / "tiny" / f"fold_{fold}")
    assert nnunet_lite.train(workspace=workspace).values["next"].startswith("nnlite select")
    (models.parent / "inference.json").write_text("{}")
    assert nnunet_lite.train(workspace=workspace).values["next"].startswith("nnlite predict -i IMAGES -o SEGMENTATIONS")


def test_a_finished_fold_stays_finished_without_a_length(workspace: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """It is made longer only by a length that is given; until it has that, it is interrupted."""
    shorter = {key: value for key, value in TINIEST.items() if key != "training.epochs"}
    shorter["training.patch_size"] = [16, 16, 16]

    def train(**more: Any) -> str:
        capfd.readouterr()
        nnunet_lite.train("3d_fullres", "0", name="short", settings=shorter, device="cpu", workspace=workspace, **more)
        return capfd.readouterr().err

    train(epochs=1)
    fold = workspace / "Task04_Hippocampus" / "models" / "short" / "fold_0"
    before = (fold / "model.safetensors").read_bytes()
    assert "short/fold_0: training is finished; `--epochs 2` makes it longer" in train()
    assert (fold / "model.safetensors").read_bytes() == before
    train(epochs=2)
    (fold / "model.safetensors").write_bytes(before)  # as if the second epoch had been stopped at its end
    assert read_fold_states(fold.parent)[0].to_text() == "interrupted, epoch 2 of 2"
    assert "resuming from epoch 2 of 2" in train(epochs=2)


@pytest.mark.parametrize("of_nnunet", [True, False])
def test_an_imported_model_is_finished(models: Path, of_nnunet: bool) -> None:
    """Of nnU-Net or of a zip, which leaves its manifest."""
    run = json.loads((models / "tiny" / "run.json").read_text())
    if of_nnunet:
        (models / "tiny" / "run.json").write_text(json.dumps(run | {"imported_from": "nnU-Net"}))
    else:
        (models / "tiny" / "manifest.json").write_text("{}")
    shutil.rmtree(models / "tiny" / "fold_0" / "validation")
    assert [state.to_text() for state in read_fold_states(models / "tiny", ["0", "1"])] == ["finished"]


def test_list(command: Command, models: Path) -> None:
    code, out, err = command("list", cwd=models.parents[2])
    assert (code, err) == (0, "") and "tiny   fold 0 finished" in out
    (models / "tiny" / "run.json").write_text("{")
    code, out, err = command("list", "--json", cwd=models.parents[2])
    assert code == 0 and "run.json: invalid JSON" in err
    assert json.loads(out)["datasets"][0]["models"] == [{"model": "tiny", "folds": []}]
    shutil.rmtree(models)
    assert "no model yet" in list_workspace(workspace=models.parents[1], dataset="4").text
    assert "nothing is planned" in list_workspace(workspace=models / "nowhere").text
    assert not (models / "nowhere").exists()


def test_clean_deletes_only_what_can_be_made_again(command: Command, models: Path) -> None:
    root = models.parent
    (models / "old_tiny_1").mkdir()
    (models / "tiny" / ".tmp-0123abcd-model.safetensors").write_bytes(b"1234")
    (root / "preprocessed" / "my-notes.json").write_text("of the user")
    everything = {path for path in root.rglob("*") if path.is_file()}
    code, out, err = command("clean", cwd=models.parents[2])
    assert (code, err) == (0, "") and "Task04_Hippocampus/preprocessed/cases" in out and "`--yes` deletes" in out
    assert {path for path in root.rglob("*") if path.is_file()} == everything, "nothing is deleted without --yes"

    with lock_fold(models / "tiny" / "fold_0"), pytest.raises(Busy, match="another process is training here"):
        clean(yes=True, workspace=models.parents[1])
    assert everything <= {path for path in root.rglob("*") if path.is_file()}
    code, out, err = command("clean", "--yes", "--json", cwd=models.parents[2])
    about = json.loads(out)
    assert (code, about["deleted"]) == (0, True) and min(about["files"].values()) > 0
    gone = everything - {path for path in root.rglob("*") if path.is_file()}
    store = root / "preprocessed"
    assert {p for p in gone if store not in p.parents} == {models / "tiny" / ".tmp-0123abcd-model.safetensors"}
    assert {path.name for path in store.iterdir()} == {".lock", "my-notes.json"} and (models / "old_tiny_1").is_dir()
    assert command("clean", "--yes", cwd=models.parents[2])[1] == "nothing to delete\n"
    assert nnunet_lite.preprocess("2d", workspace=models.parents[1], workers=0).made == 10
    with pytest.raises(UserError, match="no planned dataset"):
        clean(dataset="5", workspace=models.parents[1])


def test_info_of_a_dataset_leaves_out_models_that_cannot_be_read(command: Command, models: Path) -> None:
    broken = Path(shutil.copytree(models / "tiny", models / "broken"))
    (broken / "plans.json").write_text("{}")
    code, out, err = command("info", cwd=models.parents[2])
    assert code == 0 and f"{models / 'tiny'}: 3d_fullres" in out
    assert "warning: model broken is left out: " in err and str(broken / "plans.json") in err
