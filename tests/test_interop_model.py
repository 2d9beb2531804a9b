"""Which checkpoints of nnU-Net are taken, and that an imported model needs nothing else."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import nnunet_lite
from nnunet_lite.data.images import read_label
from nnunet_lite.errors import UserError
from nnunet_lite.files import read_json, write_json
from nnunet_lite.models.nnunet import native

MODELS = Path(__file__).parent / "data" / "nnunet_models"
CHECKPOINT = "fold_0/checkpoint_final.pth"
Command = Callable[..., tuple[int, str, str]]


@pytest.fixture
def theirs(tmp_path: Path) -> Callable[[str], Path]:
    """A copy that a test may change."""

    def copy(name: str = "plain_3d") -> Path:
        return Path(shutil.copytree(MODELS / name, tmp_path / "theirs" / name))

    return copy


@pytest.fixture
def three_folds(theirs: Callable[[str], Path]) -> Path:
    """Fold 0 ended, fold 1 is still in training, of fold 2 both checkpoints are there; fold 3 has not begun."""
    folder = theirs("plain_3d")
    for fold in ("fold_1", "fold_2"):
        shutil.copytree(folder / "fold_0", folder / fold)
    (folder / "fold_1" / "checkpoint_final.pth").rename(folder / "fold_1" / "checkpoint_best.pth")
    shutil.copy(folder / CHECKPOINT, folder / "fold_2" / "checkpoint_best.pth")
    (folder / "fold_3").mkdir()
    return folder


def test_folds_without_a_final_checkpoint_are_left_out(three_folds: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert nnunet_lite.load(three_folds, device="cpu").folds == ("0", "2")
    said = [line for line in capfd.readouterr().err.splitlines() if "fold" in line]
    assert said == [
        f"warning: {three_folds}: fold 0, 2 used (checkpoint_final.pth), fold 1 left out (no checkpoint_final.pth). "
        "--checkpoint best takes checkpoint_best.pth, which fold 1 has."
    ]
    best = nnunet_lite.load(three_folds, device="cpu", checkpoint="best")
    assert best.folds == ("1", "2")
    assert "fold 1, 2 used (checkpoint_best.pth), fold 0 left out" in capfd.readouterr().err
    assert nnunet_lite.load(three_folds, 2, "cpu").folds == ("2",)
    assert "left out" not in capfd.readouterr().err, "who asks for a fold knows"
    with native(three_folds, [1], "best") as ours:
        assert [path.name for path in ours.glob("fold_*")] == ["fold_1"]
        assert ours != three_folds
    assert not ours.exists()


def test_the_checkpoint_that_is_asked_for_is_read(three_folds: Path) -> None:
    """The best one of fold 2 has other weights here."""
    best = three_folds / "fold_2" / "checkpoint_best.pth"
    checkpoint = torch.load(best, weights_only=False)  # one of our own files
    checkpoint["network_weights"] = {k: v + 1 for k, v in checkpoint["network_weights"].items()}
    torch.save(checkpoint, best)
    one = nnunet_lite.load(three_folds, 2, "cpu").networks[0].state_dict()
    other = nnunet_lite.load(three_folds, 2, "cpu", checkpoint="best").networks[0].state_dict()
    assert all(torch.equal(other[name], one[name] + 1) for name in one)


@pytest.mark.parametrize(
    ("folds", "checkpoint", "says"),
    [
        ([1], "final", r"fold 1 has no checkpoint_final\.pth\. --checkpoint best takes .* which fold 1 has"),
        ([0], "best", r"fold 0 has no checkpoint_best\.pth\. --checkpoint final takes"),
        ([3], "final", r"has no trained fold 3\. Trained folds: 0, 2"),
        ([], "final", r"no fold of it is asked for\. Trained folds: 0, 2"),
        (None, "latest", r"there is no checkpoint 'latest'\. Give \"final\" or \"best\""),
        (["zero"], "best", r"has no trained fold zero\. Trained folds: 1, 2"),
    ],
)
def test_folds_that_are_not_there(three_folds: Path, folds: Any, checkpoint: Any, says: str) -> None:
    with pytest.raises(UserError, match=says):
        nnunet_lite.load(three_folds, folds, "cpu", checkpoint=checkpoint)


def test_a_model_without_any_final_checkpoint_needs_the_option(
    three_folds: Path, command: Command, hippocampus: Path, tmp_path: Path
) -> None:
    for fold in ("fold_0", "fold_2"):
        shutil.rmtree(three_folds / fold)
    scan = sorted((hippocampus / "imagesTs").glob("*.nii.gz"))[0]
    predict = ("predict", "-i", scan, "-o", "out", "--device", "cpu", "--no-mirroring", "-m")
    for arguments in ((*predict, three_folds), ("import", three_folds, "-o", "new"), ("info", three_folds),
                      ("export", three_folds, "model.zip")):  # fmt: skip
        code, out, err = command(*arguments, cwd=tmp_path)
        assert (code, out) == (2, "") and err.count("\n") == 1 and "no fold has a checkpoint_final.pth" in err, err
        assert "--checkpoint best takes checkpoint_best.pth, which fold 1 has" in err
    for arguments in ((*predict, three_folds, "-chk", "best"), ("import", three_folds, "-o", "new", "-chk", "best"),
                      ("info", three_folds, "--checkpoint", "best"),
                      ("export", three_folds, "model.zip", "-chk", "best")):  # fmt: skip
        assert command(*arguments, cwd=tmp_path)[0] == 0
    assert {"out", "new", "model.zip"} <= {path.name for path in tmp_path.iterdir()}
    for ours in ("new", "model.zip"):
        code, _, err = command("info", ours, "-chk", "best", cwd=tmp_path)
        says = f"error: {ours}: has no best checkpoint: it is no model of nnU-Net. Leave out --checkpoint.\n"
        assert (code, err) == (2, says)


def test_an_imported_model_is_all_that_info_and_predict_need(
    command: Command, theirs: Callable[[str], Path], hippocampus: Path, tmp_path: Path
) -> None:
    """In a workspace of which no dataset is planned; a second dataset has to be chosen from."""
    folder = theirs("plain_3d")
    folder = folder.rename(folder.with_name("model"))
    scan = sorted((hippocampus / "imagesTs").glob("*.nii.gz"))[0]
    assert command("import", folder, cwd=tmp_path)[0] == 0
    place = tmp_path / "nnlite_workspace" / "Dataset004_Hippocampus"
    name = "nnUNetTrainer__nnUNetPlans__3d_fullres"
    code, out, _ = command("info", "--json", cwd=tmp_path)
    about = json.loads(out)
    assert code == 0 and about["dataset"] == place.name
    assert [model["model"] for model in about["models"]] == [str(place / "models" / name)]
    code, out, _ = command("info", cwd=tmp_path)
    assert code == 0 and out.startswith(f"{place.name}: only models") and "3d_fullres of Dataset004_Hippocampus" in out
    flags = ("--no-mirroring", "--device", "cpu", "--precision", "fp32")
    code, out, err = command("predict", "-i", scan, "-o", "out", *flags, cwd=tmp_path)
    assert code == 0 and out == "1 label map in out\n", err
    alone = read_label(tmp_path / "out" / scan.name)[0]
    code, _, _ = command("predict", "-i", scan, "-o", "by_name", "-m", name, *flags, cwd=tmp_path)
    assert code == 0 and np.array_equal(read_label(tmp_path / "by_name" / scan.name)[0], alone)
    assert command("export", "model.zip", cwd=tmp_path)[0] == 0
    code, _, err = command("predict", "-i", scan, "-o", "out", "-c", "2d", cwd=tmp_path)
    assert code == 2 and f"no 2d model of {place.name} is trained. There is: {name} (3d_fullres)." in err
    for step in (("train", "3d_fullres", "0"), ("select",), ("report",)):  # which need the dataset itself
        code, _, err = command(*step, cwd=tmp_path)
        assert code == 2 and "no dataset is planned" in err and err.count("\n") == 1

    other = theirs("residual_2d")
    write_json(other / "plans.json", read_json(other / "plans.json") | {"dataset_name": "Dataset005_Other"})
    assert command("import", other, cwd=tmp_path)[0] == 0
    for step in (("info",), ("predict", "-i", scan, "-o", "out")):
        code, _, err = command(*step, cwd=tmp_path)
        assert code == 2 and "models of several datasets. Choose with -d: Dataset004_Hippocampus, Dataset005" in err, (
            err
        )
    code, out, _ = command("info", "-d", "Dataset004", cwd=tmp_path)
    assert code == 0 and place.name in out


@pytest.mark.parametrize("how", ["argument", "option", "name"])
def test_info_of_a_model(command: Command, tmp_path: Path, how: str) -> None:
    """Of nnU-Net's folder, of a zip made of it, and of what was imported."""
    folder = MODELS / "residual_2d"
    assert command("export", folder, "net.zip", cwd=tmp_path)[0] == 0
    assert command("import", "net.zip", cwd=tmp_path)[0] == 0
    name = "residual_2d"
    given: Any = {"argument": [folder], "option": ["-m", "net.zip"], "name": [name]}[how]
    code, out, err = command("info", *given, "--json", cwd=tmp_path)
    about = json.loads(out)
    assert code == 0 and about["channels"] == ["T1", "FLAIR"] and list(about["folds"]) == ["0"], err
    assert about["model"] == (str(folder) if how == "argument" else "net.zip" if how == "option" else about["model"])
    assert command("info", folder, "-m", folder, cwd=tmp_path)[0] == 2


def test_the_name_of_a_model_is_no_place_to_write_to(tiny_model: Path, tmp_path: Path, command: Any) -> None:
    """`nnlite export NAME` asks for the target; it wrote another model into a folder of that name."""
    place = ("-w", tiny_model.parents[2], "--format", "nnunet")
    code, _, err = command("export", "tiny", *place, cwd=tmp_path)
    assert code == 2 and "where to write it is not given" in err and not (tmp_path / "tiny").exists()
    code, _, err = command("export", "tiny", "out", *place, cwd=tmp_path)
    assert code == 0 and (tmp_path / "out" / "plans.json").is_file(), err
