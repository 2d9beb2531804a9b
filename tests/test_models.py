"""Models are chosen, loaded and brought together; those that cannot vote together are refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import nnunet_lite
from nnunet_lite.data.dataset import stored_dataset
from nnunet_lite.errors import UserError
from nnunet_lite.evaluation.cross_validation import validate_fold
from nnunet_lite.models.folder import read_weights_header
from nnunet_lite.models.lookup import first_common_fold, read_model
from nnunet_lite.training.finetune import find_source

QUICK = {"inference.mirroring": False, "inference.step_size": 1.0, "inference.precision": "fp32"}


@pytest.fixture
def other(tiny_model: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_model, tmp_path / "other"))


def change(folder: Path, **values: Any) -> None:
    plan = json.loads((folder / "plans.json").read_text())
    (folder / "plans.json").write_text(json.dumps({**plan, **values}))


def test_several_models_are_one(tiny_model: Path, other: Path, hippocampus: Path) -> None:
    scan = sorted((hippocampus / "imagesTs").glob("*.nii.gz"))[0]
    both = nnunet_lite.load([tiny_model, other], device="cpu", settings=QUICK)
    alone = nnunet_lite.load(tiny_model, device="cpu", settings=QUICK)
    assert str(both) == f"{tiny_model} (fold 0) and {other} (fold 0)"
    assert (both(scan) == alone(str(scan))).mean() > 0.9999


def test_models_of_other_labels_or_axes_cannot_vote(tiny_model: Path, other: Path) -> None:
    plan = read_model(other)[0]
    labels = plan.labels.model_dump(mode="json")
    change(other, labels={**labels, "names": {"background": 0, "left": 1, "right": 2}})
    with pytest.raises(UserError, match=rf"{other}: has other labels than {tiny_model}"):
        nnunet_lite.load([tiny_model, other], device="cpu")
    change(other, labels=labels, axis_order=[1, 0, 2])
    with pytest.raises(UserError, match="has other axis order than"):
        nnunet_lite.load([tiny_model, other], device="cpu")


def test_first_fold(tiny_model: Path, other: Path) -> None:
    (other / "fold_0").rename(other / "fold_2")
    assert first_common_fold([tiny_model]) == ["0"]
    assert first_common_fold([other]) == ["2"]
    assert first_common_fold([tiny_model, other]) is None


OWN = """
import pathlib
from torch import nn

pathlib.Path({mark!r}).touch()

def make(planned, inputs, outputs):
    return nn.Conv3d(inputs, outputs, 1)
"""


@pytest.fixture
def coded(tiny_model: Path, tmp_path: Path) -> Path:
    """A model in a workspace whose network is made by code beside its weights; `was_run` says that it was run."""
    from torch import nn

    from nnunet_lite.models.checkpoint import save_weights

    model = tmp_path / "w" / "Task04_Hippocampus" / "models" / "coded"
    shutil.copytree(tiny_model, model, ignore=shutil.ignore_patterns("validation", ".lock"))
    about = read_weights_header(model / "fold_0" / "model.safetensors")
    save_weights(model / "fold_0" / "model.safetensors", nn.Conv3d(1, 3, 1), about)
    (model / "own_net.py").write_text(OWN.format(mark=str(tmp_path / "was_run")))
    names_code(model, f"{model / 'own_net.py'}:make")
    return model


def names_code(model: Path, factory: str) -> None:
    run = json.loads((model / "run.json").read_text())
    run["settings"]["network"]["factory"] = factory
    (model / "run.json").write_text(json.dumps(run))


def test_a_model_of_the_workspace_runs_its_code(coded: Path, hippocampus: Path, tmp_path: Path) -> None:
    scan = sorted((hippocampus / "imagesTs").glob("*.nii.gz"))[0]
    model = nnunet_lite.load(coded, device="cpu", settings=QUICK, workspace=tmp_path / "w")
    assert (tmp_path / "was_run").is_file() and model(scan).max() <= 2
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


def module_here(model: Path) -> Path:
    """Code that is named as a module of the current folder, as `python -m nnunet_lite` finds it."""
    there = elsewhere(model)
    (there / "own_net.py").rename(there.parent / "own_module.py")
    names_code(there, "own_module:make")
    return there


def file_here(model: Path) -> Path:
    """A path that is not there, of a file with the name of one in the current folder."""
    there = elsewhere(model)
    (there / "own_net.py").rename(there.parent / "own_net.py")
    names_code(there, "/not/there/own_net.py:make")
    return there


PLACES = (elsewhere, link_in_workspace, link_to_the_run, through_dots, deeper, module_here, file_here)


@pytest.mark.parametrize("place", PLACES, ids=lambda place: place.__name__)
def test_code_of_other_models_is_not_run(
    place: Any, coded: Path, tmp_path: Path, command: Any, hippocampus: Path, monkeypatch: pytest.MonkeyPatch,
    counts: Any,
) -> None:  # fmt: skip
    """Neither loading nor any command runs it, in one line; the flag does."""
    counts("bad inputs refused in one line")
    scan = sorted((hippocampus / "imagesTs").glob("*.nii.gz"))[0]
    model, mark = place(coded), tmp_path / "was_run"
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=r"names code to run .* not run\. .*--trust-code \(Python: trust_code=True\)"):
        nnunet_lite.load(model, device="cpu", workspace=tmp_path / "w")
    predict = ("predict", "-i", scan, "-o", "out", "-m", model, "-w", "w", "--device", "cpu")
    for arguments in (predict, ("export", model, "onnx", "--format", "onnx", "-w", "w")):
        code, out, err = command(*arguments, cwd=tmp_path)
        assert (code, out) == (2, "") and "names code to run" in err and err.count("\n") == 1, err
    for arguments, code in (
        (("info", model, "-w", "w"), 0),
        (("export", model, "m.zip", "-w", "w"), 2),
        (("export", model, "theirs", "--format", "nnunet", "-w", "w"), 2),
    ):
        assert command(*arguments, cwd=tmp_path)[0] == code
    find_source(model, "Other", "0")
    assert not mark.exists() and not (tmp_path / "out").exists()
    assert command(*predict, "--trust-code", cwd=tmp_path)[0] == 0
    assert mark.is_file() and (tmp_path / "out" / scan.name).is_file()


@pytest.mark.parametrize("linked", [False, True], ids=["folder", "link"])
def test_what_is_trained_in_the_workspace_needs_no_flag(
    tiny_workspace: Path, tiny_settings: dict[str, Any], hippocampus: Path, tmp_path: Path, linked: bool
) -> None:
    """Training validates with the code of its own request, wherever the links of a workspace lead."""
    workspace = tmp_path / "w"
    shutil.copytree(tiny_workspace, workspace, ignore=shutil.ignore_patterns("models"))
    models = workspace / "Task04_Hippocampus" / "models"
    if linked:
        (tmp_path / "large_disk").mkdir()
        models.symlink_to(tmp_path / "large_disk")
    (tmp_path / "own_net.py").write_text(OWN.format(mark=str(tmp_path / "was_run")))
    changes = {key: value for key, value in tiny_settings.items() if not key.startswith("network.")} | QUICK
    changes |= {"training.epochs": 1, "network.factory": f"{tmp_path / 'own_net.py'}:make"}
    scores = nnunet_lite.train("3d_fullres", 0, settings=changes, workspace=workspace, name="own", device="cpu")
    assert scores.scores
    scan = sorted((hippocampus / "imagesTs").glob("*.nii.gz"))[0]
    if linked:
        with pytest.raises(UserError, match="names code to run"):
            nnunet_lite.predict(scan, tmp_path / "out", workspace=workspace, device="cpu")
        nnunet_lite.predict(scan, tmp_path / "out", workspace=workspace, device="cpu", trust_code=True)
    else:
        nnunet_lite.predict(scan, tmp_path / "out", workspace=workspace, device="cpu")
    assert (tmp_path / "out" / scan.name).is_file()


def test_select_does_not_run_the_code_that_a_link_leads_to(coded: Path, tiny_workspace: Path, tmp_path: Path) -> None:
    dataset = stored_dataset(tiny_workspace / "Task04_Hippocampus" / "dataset.json")
    with pytest.raises(UserError, match="names code to run"):
        validate_fold(link_in_workspace(coded), "0", dataset, [], "cpu")
    assert not (tmp_path / "was_run").exists()


def test_predict_with_all_options(
    tiny_model: Path, other: Path, hippocampus: Path, tmp_path: Path, command: Any
) -> None:
    import nibabel

    scans = sorted((hippocampus / "imagesTs").glob("*.nii.gz"))
    (tmp_path / "in").mkdir()
    shutil.copy(scans[0], tmp_path / "in")
    source = ["-i", tmp_path / "in", "-i", scans[1]]
    common = [*source, "--device", "cpu", "--precision", "fp32", "--speed", "fast", "--max-memory", "4"]
    code, _, err = command(
        "predict", "-m", tiny_model, "-m", other, *common, "-o", tmp_path / "out", "--save-uncertainty",
        "--save-probabilities", cwd=tmp_path,
    )  # fmt: skip
    assert code == 0, err
    names = [scan.name.removesuffix(".nii.gz") for scan in scans[:2]]
    written = {str(path.relative_to(tmp_path / "out")) for path in (tmp_path / "out").rglob("*") if path.is_file()}
    kinds = [f"probabilities/{{}}_{label}" for label in ("background", "Anterior", "Posterior")]
    kinds += ["uncertainty/{}_entropy", "uncertainty/{}_disagreement", "{}"]
    assert written == {f"{kind.format(name)}.nii.gz" for kind in kinds for name in names}
    shares = [
        nibabel.load(tmp_path / "out" / f"{kind.format(names[0])}.nii.gz").get_fdata()  # type: ignore[attr-defined]
        for kind in kinds[:3]
    ]
    assert np.abs(sum(shares) - 1).max() < 2 / 255
    label = nibabel.load(tmp_path / "out" / f"{names[0]}.nii.gz")
    certain = np.max(shares, axis=0) > 0.51
    assert np.array_equal(np.argmax(shares, axis=0)[certain], np.asarray(label.dataobj)[certain])  # type: ignore[attr-defined]
    image = nibabel.load(scans[0])
    assert np.allclose(image.affine, label.affine)  # type: ignore[attr-defined]

    code, _, err = command("predict", "-m", tiny_model, *common, "-o", tmp_path / "o", "--dicom-seg", cwd=tmp_path)
    assert code == 2 and "is no DICOM series" in err
    (tmp_path / "more").mkdir()
    shutil.copy(scans[2], tmp_path / "more" / scans[0].name)
    twice = ["-i", tmp_path / "in", "-i", tmp_path / "more", "-o", tmp_path / "o", "-m", tiny_model]
    code, _, err = command("predict", *twice, cwd=tmp_path)
    assert code == 2 and f"holds case '{names[0]}', and so does" in err
    code, _, err = command("predict", "-m", tiny_model, *common[:-1], "0.0001", "-o", tmp_path / "o2", cwd=tmp_path)
    assert code == 2 and "B of memory at least, 100 kB may be used. Raise --max-memory" in err
    assert not any((tmp_path / "o2").iterdir())
