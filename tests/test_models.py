"""Models are chosen, loaded and brought together; those that cannot vote together are refused."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pytest
from bad_inputs import edit, setting
from samples import FAST, TINY, Command, Counts, forget_plan
from torch import nn

import nnunet_lite
from nnunet_lite.data.dataset import stored_dataset
from nnunet_lite.errors import UserError
from nnunet_lite.evaluation.cross_validation import validate_fold
from nnunet_lite.models.checkpoint import save_weights
from nnunet_lite.models.folder import read_weights_header
from nnunet_lite.models.lookup import choose_model, first_common_fold, read_model
from nnunet_lite.training.finetune import open_source
from nnunet_lite.workspace import Paths, planned_paths


@pytest.fixture
def other(tiny_model: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_model, tmp_path / "other"))


def test_several_models_are_one(tiny_model: Path, other: Path, scans: list[Path]) -> None:
    both = nnunet_lite.load([tiny_model, other], device="cpu", settings=FAST)
    alone = nnunet_lite.load(tiny_model, device="cpu", settings=FAST)
    assert str(both) == f"{tiny_model} (fold 0) and {other} (fold 0)"
    assert (both(scans[0]) == alone(str(scans[0]))).mean() > 0.9999


def test_models_of_other_labels_or_axes_cannot_vote(tiny_model: Path, other: Path) -> None:
    labels = read_model(other)[0].labels.model_dump(mode="json")
    forget_plan(other)
    for change, what in (
        (setting(labels=labels | {"names": {"background": 0, "left": 1, "right": 3}}), "labels"),
        (setting(labels=labels | {"names": {"background": 0, "left": 1, "right": 2}}, dataset="Other"), "labels"),
        (setting(labels=labels, axis_order=[1, 0, 2]), "axis order"),
    ):
        edit(other / "plans.json", change)
        with pytest.raises(UserError, match=rf"{other}: has other {what} than {tiny_model}"):
            nnunet_lite.load([tiny_model, other], device="cpu")


def test_first_fold(tiny_model: Path, other: Path) -> None:
    (other / "fold_0").rename(other / "fold_2")
    assert first_common_fold([tiny_model]) == ["0"]
    assert first_common_fold([other]) == ["2"]
    assert first_common_fold([tiny_model, other]) is None


def test_a_configuration_without_a_model_is_the_one_to_train(tiny_model: Path) -> None:
    paths = planned_paths(tiny_model.parents[2])
    for configuration, fix in (("2d", "Run `nnlite train 2d 0"), ("3d_lowres", "Trained: tiny (3d_fullres).")):
        with pytest.raises(UserError, match=re.escape(f"is trained. {fix}")):
            choose_model(paths, configuration)


def test_one_lucky_fold_does_not_make_the_best_model(tiny_model: Path, tmp_path: Path) -> None:
    paths = Paths(tmp_path / "Task04_Hippocampus")
    for name, scores in {"steady": (0.8, 0.8), "lucky": (0.9, 0.4)}.items():
        for fold, dice in enumerate(scores):
            place = shutil.copytree(tiny_model / "fold_0", paths.models / name / f"fold_{fold}")
            edit(place / "validation" / "summary.json", partial(score, f"{name}{fold}", dice))
        for file in ("run.json", "plans.json"):
            shutil.copy(tiny_model / file, paths.models / name)
    assert choose_model(paths).name == "steady"


def score(case: str, dice: float, summary: dict[str, Any]) -> None:
    """Let a fold have one held-out case with this Dice."""
    values = {"prediction_file": f"{case}.nii.gz", "metrics": {"1": {"Dice": dice}, "2": {"Dice": dice}}}
    summary.update(metric_per_case=[values], foreground_mean={"Dice": dice})


OWN = """
import pathlib
from torch import nn

pathlib.Path({mark!r}).touch()

def make(planned, inputs, outputs):
    return nn.Conv3d(inputs, outputs, 1)
"""


@pytest.fixture
def coded(tiny_model: Path, tmp_path: Path) -> Path:
    """A model in a workspace whose network is made by code next to its weights; that makes the file `was_run`."""
    model = tmp_path / "w" / "Task04_Hippocampus" / "models" / "coded"
    shutil.copytree(tiny_model, model, ignore=shutil.ignore_patterns("validation", ".lock"))
    about = read_weights_header(model / "fold_0" / "model.safetensors")
    save_weights(model / "fold_0" / "model.safetensors", nn.Conv3d(1, 3, 1), about)
    (model / "own_net.py").write_text(OWN.format(mark=str(tmp_path / "was_run")))
    names_code(model, f"{model / 'own_net.py'}:make")
    return model


def names_code(model: Path, factory: str) -> None:
    edit(model / "run.json", lambda run: run["settings"]["network"].update(factory=factory))


def test_a_model_of_the_workspace_runs_its_code(coded: Path, scans: list[Path], tmp_path: Path) -> None:
    model = nnunet_lite.load(coded, device="cpu", settings=FAST, workspace=tmp_path / "w")
    assert (tmp_path / "was_run").is_file() and model(scans[0]).max() <= 2
    (tmp_path / "link").symlink_to(tmp_path / "w")  # the same workspace by another name
    assert nnunet_lite.load("coded", device="cpu", workspace=tmp_path / "link").folds == ("0",)


def elsewhere(model: Path) -> Path:
    return Path(shutil.copytree(model, model.parents[3] / "elsewhere"))


def link_in_workspace(model: Path) -> Path:
    """A link among the models of the workspace to a folder that is not."""
    there = elsewhere(model)
    shutil.rmtree(model)
    model.symlink_to(there)
    return model


def link_to_the_run(model: Path) -> Path:
    """A model folder whose run.json is a link to another place."""
    (model / "run.json").rename(model.parents[3] / "run.json")
    (model / "run.json").symlink_to(model.parents[3] / "run.json")
    return model


def through_dots(model: Path) -> Path:
    """A path that begins in the workspace and leads out of it."""
    return model.parent / ".." / ".." / ".." / elsewhere(model).name


def deeper(model: Path) -> Path:
    """A model that was unpacked in the workspace, but is none of its models."""
    return Path(shutil.copytree(model, model.parents[2] / "downloads" / "more" / "models" / "coded"))


def code_here(factory: str) -> Callable[[Path], Path]:
    """Code that is named as a module, or by a path that does not exist; the current folder has a file of that name."""

    def move(model: Path) -> Path:
        folder = elsewhere(model)
        (folder / "own_net.py").rename(folder.parent / "own_net.py")
        names_code(folder, factory)
        return folder

    return move


PLACES = {
    **{move.__name__: move for move in (elsewhere, link_in_workspace, link_to_the_run, through_dots, deeper)},
    "module": code_here("own_net:make"),
    "file": code_here("/not/there/own_net.py:make"),
}


@pytest.mark.parametrize("where", PLACES)
def test_code_of_other_models_is_not_run(
    where: str, coded: Path, tmp_path: Path, command: Command, scans: list[Path], monkeypatch: pytest.MonkeyPatch,
    counts: Counts,
) -> None:  # fmt: skip
    """Neither loading nor any command runs it, in one line; the flag does."""
    counts("bad inputs refused in one line")
    scan, model, mark = scans[0], PLACES[where](coded), tmp_path / "was_run"
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=r"names code to run .* not run\. .*--trust-code \(Python: trust_code=True\)"):
        nnunet_lite.load(model, device="cpu", workspace=tmp_path / "w")
    predict = ("predict", "-i", scan, "-o", "out", "-m", model, "-w", "w", "--device", "cpu")
    export = ("export", model, "-w", "w")
    for arguments in (predict, (*export, "onnx", "--format", "onnx")):
        code, out, err = command(*arguments, cwd=tmp_path)
        assert (code, out) == (2, "") and "names code to run" in err and err.count("\n") == 1, err
    for arguments in ((*export, "m.zip"), (*export, "theirs", "--format", "nnunet")):
        assert command(*arguments, cwd=tmp_path)[0] == 2
    assert command("info", model, "-w", "w", cwd=tmp_path)[0] == 0
    with open_source(str(model), tmp_path / "w", read_model(coded)[0], "0", "3d_fullres"):
        pass
    assert not mark.exists() and not (tmp_path / "out").exists()
    assert command(*predict, "--trust-code", cwd=tmp_path)[0] == 0
    assert mark.is_file() and (tmp_path / "out" / scan.name).is_file()


@pytest.mark.parametrize("linked", [False, True], ids=["folder", "link"])
def test_what_is_trained_in_the_workspace_needs_no_flag(
    tiny_workspace: Path, scans: list[Path], tmp_path: Path, linked: bool
) -> None:
    """Training validates with the code of its own request, wherever the links of a workspace lead."""
    workspace = tmp_path / "w"
    shutil.copytree(tiny_workspace, workspace, ignore=shutil.ignore_patterns("models"))
    models = workspace / "Task04_Hippocampus" / "models"
    if linked:
        (tmp_path / "large_disk").mkdir()
        models.symlink_to(tmp_path / "large_disk")
    (tmp_path / "own_net.py").write_text(OWN.format(mark=str(tmp_path / "was_run")))
    changes = {key: value for key, value in TINY.items() if not key.startswith("network.")}
    changes |= {"training.epochs": 1, "network.factory": f"{tmp_path / 'own_net.py'}:make"}
    scores = nnunet_lite.train("3d_fullres", 0, settings=changes, workspace=workspace, name="own", device="cpu")
    assert scores.scores
    predict = partial(nnunet_lite.predict, scans[0], tmp_path / "out", workspace=workspace, device="cpu")
    if linked:
        with pytest.raises(UserError, match="names code to run"):
            predict()
    predict(trust_code=linked)
    assert (tmp_path / "out" / scans[0].name).is_file()


def test_select_does_not_run_the_code_that_a_link_leads_to(coded: Path, tiny_workspace: Path, tmp_path: Path) -> None:
    dataset = stored_dataset(tiny_workspace / "Task04_Hippocampus" / "dataset.json")
    with pytest.raises(UserError, match="names code to run"):
        validate_fold(link_in_workspace(coded), "0", dataset, [], "cpu")
    assert not (tmp_path / "was_run").exists()


def test_predict_with_all_options(
    tiny_model: Path, other: Path, scans: list[Path], tmp_path: Path, command: Command
) -> None:
    (tmp_path / "in").mkdir()
    shutil.copy(scans[0], tmp_path / "in")
    predict = ("predict", "-m", tiny_model, "-i", tmp_path / "in")
    common = ("-i", scans[1], "--device", "cpu", "--precision", "fp32", "--speed", "fast", "--max-memory")
    maps = ("-m", other, "-o", tmp_path / "out", "--save-uncertainty", "--save-probabilities")
    code, _, err = command(*predict, *common, "4", *maps, cwd=tmp_path)
    assert code == 0, err
    names = [scan.name.removesuffix(".nii.gz") for scan in scans[:2]]
    kinds = [f"probabilities/{{}}_{label}" for label in ("background", "Anterior", "Posterior")]
    kinds += ["uncertainty/{}_entropy", "uncertainty/{}_disagreement", "{}"]
    image, out = min(tmp_path / "in" / scans[0].name, scans[1], key=lambda path: path.name), tmp_path / "out"
    assert err.endswith(f"next: nnlite view {image} {out / image.name}; or nnlite evaluate {out} REFERENCES\n")
    written = {str(path.relative_to(tmp_path / "out")) for path in (tmp_path / "out").rglob("*") if path.is_file()}
    assert written == {"predictions.json", *(f"{kind.format(name)}.nii.gz" for kind in kinds for name in names)}
    *shares, label = (
        np.asarray(nibabel.load(tmp_path / "out" / f"{kind.format(names[0])}.nii.gz").dataobj)
        for kind in (*kinds[:3], "{}")
    )
    assert np.abs(sum(shares) - 1).max() < 2 / 255
    certain = np.max(shares, axis=0) > 0.51
    assert np.array_equal(np.argmax(shares, axis=0)[certain], label[certain])

    (tmp_path / "more").mkdir()
    shutil.copy(scans[2], tmp_path / "more" / scans[0].name)
    code, _, err = command(*predict, "-i", tmp_path / "more", "-o", tmp_path / "o", cwd=tmp_path)
    assert code == 2 and f"are the same case '{names[0]}'" in err
    code, _, err = command(*predict, *common, "0.0001", "-o", tmp_path / "o2", cwd=tmp_path)
    assert code == 2 and "B of memory at least, 100 kB may be used. Raise --max-memory" in err
    assert [path.name for path in (tmp_path / "o2").iterdir()] == ["predictions.json"], "it says why it failed"
