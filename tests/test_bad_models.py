"""Models, checkpoints, zips and images to predict that are broken, through the commands that meet them: one line each.

What a hostile zip may try is in test_bundle.py in full; here it meets the command.
"""

from __future__ import annotations

import json
import os
import pickle
import shutil
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pytest
import torch
from bad_inputs import Bad, Evil, contents, copies_of_scan, edit, refuse, setting
from safetensors import safe_open
from safetensors.numpy import load_file, save_file
from samples import NNUNET_MODELS, Command, Counts

from nnunet_lite.models.folder import MODEL, read_weights_header

PREDICT = "predict -i scan.nii.gz -o out -m model"
FOLDER = "predict -i in -o out -m model"
IMPORT = "import model.zip -o new"
WEIGHTS = "model/fold_0/model.safetensors"
NNUNET = NNUNET_MODELS / "plain_3d"
CIRCLE = {"inherits_from": "3d_fullres"}


def given(command: str, *says: str) -> Bad:
    """A command that is wrong itself."""
    return Bad(lambda place: None, command, says)


def file(name: str, content: bytes | str, command: str, *says: str) -> Bad:
    """A file with this content."""

    def make(place: Path) -> None:
        (place / name).parent.mkdir(exist_ok=True)
        (place / name).write_bytes(content if isinstance(content, bytes) else content.encode())

    return Bad(make, command, says or (Path(name).name,))


def missing(name: str, *says: str) -> Bad:
    """A model without one of its files."""
    return Bad(lambda place: (place / "model" / name).unlink(), PREDICT, says or (name,))


def run_with(change: Callable[[Any], Any], *says: str, name: str = "run.json") -> Bad:
    return Bad(lambda place: edit(place / "model" / "run.json", change), PREDICT, (name, *says))


def weights(change: Callable[[dict[str, Any]], object], *says: str, keep: str = "state", command: str = PREDICT) -> Bad:
    """Other tensors in the model file, which remains a safetensors file; `keep` names the header's entries."""

    def make(place: Path) -> None:
        with safe_open(place / WEIGHTS, "np") as opened:
            about = {key: value for key, value in opened.metadata().items() if key in keep.split()}
        tensors = load_file(place / WEIGHTS)
        change(tensors)
        save_file(tensors, place / WEIGHTS, about or None)

    return Bad(make, command, says)


def bytes_of_weights(change: Callable[[bytes], bytes]) -> Bad:
    def make(place: Path) -> None:
        (place / WEIGHTS).write_bytes(change((place / WEIGHTS).read_bytes()))

    return Bad(make, PREDICT, ("model.safetensors",))


def first(tensors: dict[str, Any]) -> str:
    return sorted(tensors)[0]


def overflow(tensors: dict[str, Any]) -> None:
    """Weights that are finite, and logits that are not."""
    for name in tensors:
        if name.startswith("heads."):
            tensors[name] = np.full_like(tensors[name], 3e38)


def zipped(entries: dict[str, bytes], *says: str) -> Bad:
    def make(place: Path) -> None:
        with zipfile.ZipFile(place / "model.zip", "w") as archive:
            for name, content in entries.items():
                archive.writestr(name, content)

    return Bad(make, IMPORT, ("model.zip", *says))


def theirs(change: Callable[[Path], object], *says: str, command: str = "import theirs -o new") -> Bad:
    """A model of nnU-Net with a change."""
    return Bad(lambda place: change(Path(shutil.copytree(NNUNET, place / "theirs"))), command, says)


def checkpoint_of(folder: Path) -> Path:
    return folder / "fold_0" / "checkpoint_final.pth"


def two_models(folder: Path) -> Path:
    """nnU-Net's folder of a dataset with two models."""
    results = folder.with_name("Dataset004")
    for name in ("a__b__2d", "a__b__3d"):
        shutil.copytree(folder, results / name)
    return results


def with_code(folder: Path) -> None:
    torch.save({"network_weights": Evil()}, checkpoint_of(folder))


def rename_configuration(place: Path) -> None:
    """The fold says what it was trained for."""
    folder = place / "model"
    edit(folder / "plans.json", lambda plan: plan["configurations"].update(b=plan["configurations"]["3d_fullres"]))
    edit(folder / "run.json", setting(configuration="b"))


def with_fold(place: Path, **other: Any) -> None:
    """A fold that was trained with a plan of other values."""
    fold = shutil.copytree(place / "model" / "fold_0", place / "model" / "fold_1")
    about, tensors = read_weights_header(fold / MODEL), load_file(fold / MODEL)
    save_file(tensors, fold / MODEL, {"state": json.dumps({**about, "inputs": {**about["inputs"], **other}})})


def image(array: np.ndarray, *says: str, name: str = "scan", command: str = PREDICT) -> Bad:
    return Bad(
        lambda place: nibabel.save(nibabel.Nifti1Image(array, np.eye(4)), place / f"{name}.nii.gz"), command, says
    )


REFUSED = {
    # a model folder
    "no model there": given("predict -i scan.nii.gz -o out -m nowhere", "nowhere: is no model folder (it does"),
    "a file for the model": given("predict -i scan.nii.gz -o out -m scan.nii.gz", "scan.nii.gz"),
    "no run.json": missing("run.json"),
    "ONNX": file("onnx/onnx.json", "{}", "predict -i scan.nii.gz -o out -m onnx", "one as ONNX", "load_onnx"),
    "an empty run.json": file("model/run.json", "", PREDICT),
    "run.json is a list": file("model/run.json", "[1]", PREDICT),
    "run.json is nothing": file("model/run.json", "{}", PREDICT, "run.json", "format"),
    "run.json of a later format": run_with(setting(format="nnlite-model-2"), "newer", "Update"),
    "run.json of an unknown format": run_with(setting(format="other"), "unknown format"),
    "run.json with an unknown setting": run_with(lambda run: run["settings"]["training"].update(magic=1), "magic"),
    "run.json with an illegal setting": run_with(lambda run: run["settings"]["inference"].update(step_size=-1)),
    "run.json without settings": run_with(lambda run: run.pop("settings") and None, "settings"),
    "run.json with settings of text": run_with(setting(settings="default")),
    "run.json with a seed of text": run_with(setting(seed="one")),
    "run.json of no configuration": run_with(lambda run: run.pop("configuration") and None, "configuration"),
    "a configuration that the plan has not": run_with(setting(configuration="4d"), "'4d'", name=""),
    "no plans.json": missing("plans.json"),
    "plans.json cut off": file("model/plans.json", '{"format"', PREDICT),
    "plans.json of a later format": Bad(
        lambda place: edit(place / "model" / "plans.json", setting(format="nnlite-plan-2")), "info model",
        ("plans.json",),
    ),
    "no weights": missing("fold_0/model.safetensors", "fold"),
    "weights of no byte": file(WEIGHTS, b"", PREDICT),
    "weights of text": file(WEIGHTS, "not weights", PREDICT),
    "a pickle for weights": file(WEIGHTS, pickle.dumps({"a": Evil()}), PREDICT),
    "weights cut off": bytes_of_weights(lambda data: data[: len(data) // 2]),
    "weights cut by a byte": bytes_of_weights(lambda data: data[:-1]),
    "weights with bytes too many": bytes_of_weights(lambda data: data + b"more"),
    "a header of 10^18 bytes": bytes_of_weights(lambda data: struct.pack("<Q", 10**18) + data[8:]),
    "a header that is no JSON": bytes_of_weights(lambda data: data[:8] + b"?" + data[9:]),
    "a folder for weights": Bad(
        lambda place: ((place / WEIGHTS).unlink(), (place / WEIGHTS).mkdir()), PREDICT, ("fold",)
    ),
    "a fold of another configuration": Bad(rename_configuration, PREDICT, ("fold_0", "was trained for 3d_fullres")),
    "a fold of another spacing": Bad(
        lambda place: with_fold(place, spacing=[2.0, 1.0, 1.0]), "info model",
        ("fold_1: was trained with another plan: spacing = [2.0, 1.0, 1.0], not [1.0, 1.0, 1.0]",),
    ),
    "a fold of another orientation": Bad(
        lambda place: with_fold(place, orientation="LPS"), "export model model.zip", ("fold_1", "orientation = LPS"),
    ),
    "a normalisation that was edited after the training": Bad(
        lambda place: edit(place / "model" / "plans.json", lambda plan: plan["channels"][0].update(normalization="ct")),
        PREDICT, ("fold_0", "another plan: channels.0.normalization = zscore, not ct. Undo the edit of plans.json"),
    ),
    "weights of another shape": weights(lambda t: t.update({first(t): np.zeros(3, np.float32)}), "another network"),
    "a weight too few": weights(lambda t: t.pop(first(t)), "another network"),
    "a weight too many": weights(lambda t: t.update(extra=np.zeros(3, np.float32)), "another network"),
    "weights of NaN": weights(lambda t: t.update({first(t): np.full_like(t[first(t)], np.nan)}), "finite"),
    "weights that were changed": weights(
        lambda t: t.update({first(t): 2 * t[first(t)]}), "damaged", keep="state checksum"
    ),
    "weights without their header": weights(dict, "model.safetensors", keep="", command="info model"),
    # options of `nnlite predict`
    "no such fold": given(f"{PREDICT} -f 3", "fold 3", "Trained folds: 0"),
    "a fold of text": given(f"{PREDICT} -f zero", "zero"),
    "no such setting of inference": given(f"{PREDICT} --set inference.steps=1", "inference.step_size"),
    "windows of an option and of --set": given(
        f"{PREDICT} --step-size 0.5 --set inference.step_size=1", "--step-size is 0.5, and --set inference.step_size=1"
    ),
    "a setting of training": given(f"{PREDICT} --set training.epochs=1", "training.epochs"),
    "steps of nothing": given(f"{PREDICT} --step-size 0", "step_size"),
    "negative memory": given(f"{PREDICT} --max-memory -1", "max_memory"),
    "no such device": given(f"{PREDICT} --device warp", "warp"),
    "probabilities of a label that is not there": given(f"{PREDICT} --save-probabilities Tail", "Tail"),
    "DICOM of what is none": given(f"{PREDICT} --format dicom-seg", "scan.nii.gz"),
    # zips
    "no zip": file("model.zip", "PK no", IMPORT),
    "no zip to predict with": file("model.zip", "x", f"{PREDICT}.zip"),
    "an empty zip": zipped({}, "manifest"),
    "a zip of something": zipped({"readme.txt": b"hello"}),
    "a path out of the folder": zipped({"../../evil.txt": b"x"}, "no manifest.json"),
    "an absolute path": zipped({"/tmp/evil.txt": b"x"}, "no manifest.json"),
    "a path of Windows": zipped({"C:\\evil.txt": b"x"}, "no manifest.json"),
    "a manifest that is no JSON": zipped({"manifest.json": b"{"}, "manifest.json"),
    "a manifest of a later format": zipped({"manifest.json": b'{"format": "nnlite-bundle-9"}'}, "newer"),
    "a manifest that is a list": zipped({"manifest.json": b"[]"}, "manifest.json"),
    # models of nnU-Net
    "a pickle with code": theirs(with_code, "posix.mknod", "was not run"),
    "a pickle with code, to predict": theirs(
        with_code, "posix.mknod", "was not run", command="predict -i scan.nii.gz -o out -m theirs"
    ),
    "a checkpoint cut off": theirs(lambda f: os.truncate(checkpoint_of(f), 5000)),
    "a checkpoint of text": theirs(lambda f: checkpoint_of(f).write_text("x")),
    "a checkpoint of zeros": theirs(lambda f: checkpoint_of(f).write_bytes(bytes(1000))),
    "nnU-Net's plans are a list": theirs(lambda f: (f / "plans.json").write_text("[]"), "plans.json"),
    "nnU-Net's plans are nothing": theirs(lambda f: (f / "plans.json").write_text("{}"), "plan"),
    "nnU-Net's configurations go in a circle": theirs(
        lambda f: edit(f / "plans.json", lambda plans: plans["configurations"].update({"3d_fullres": CIRCLE})), "circle"
    ),
    "nnU-Net's dataset.json is a list": theirs(lambda f: (f / "dataset.json").write_text("[]"), "dataset.json"),
    "nnU-Net's dataset.json is missing": theirs(lambda f: (f / "dataset.json").unlink(), "dataset.json"),
    "a model over another": theirs(lambda f: shutil.copytree(f, f.with_name("new")), "new"),
    "an import of one checkpoint": theirs(
        lambda f: None, "checkpoint_final.pth", command="import theirs/fold_0/checkpoint_final.pth"
    ),
    "an import of two models to one place": theirs(
        lambda f: two_models(f), "Dataset004", "2 models", "Dataset004/a__b__3d", command="import Dataset004 -o new"
    ),
    "a folder of two models": theirs(
        lambda f: two_models(f),
        *("Dataset004", "2 models", "Dataset004/a__b__2d"),
        command="predict -i scan.nii.gz -o out -m Dataset004",
    ),
    "a configuration that no model has": theirs(
        lambda f: two_models(f),
        "no model of 3d_lowres",
        command="predict -i scan.nii.gz -o out -m Dataset004 -c 3d_lowres",
    ),
    "a zip of two models": theirs(
        lambda f: shutil.make_archive(str(f.parent / "model"), "zip", two_models(f)), "model.zip/a__b__3d",
        command=f"{PREDICT}.zip",
    ),
    "a model that is not in the zip": theirs(
        lambda f: shutil.make_archive(str(f.parent / "model"), "zip", two_models(f)), "model.zip/c", "plans.json",
        command=f"{PREDICT}.zip/c",
    ),
    "a zip of what is in a fold": theirs(
        lambda f: shutil.make_archive(str(f.with_name("model")), "zip", f / "fold_0"),
        "contains 'checkpoint_final.pth'", command=IMPORT,
    ),
    "a zip of nnU-Net without plans": theirs(
        lambda f: ((f / "plans.json").unlink(),
                   shutil.make_archive(str(f.with_name("model")), "zip", f.parent, f.name)),
        "no plans.json next to", command=IMPORT,
    ),
    "a zip of nnU-Net with damaged weights": theirs(
        lambda f: (os.truncate(checkpoint_of(f), 5000),
                   shutil.make_archive(str(f.with_name("model")), "zip", f.parent, f.name)),
        "error: model.zip/theirs/fold_0/checkpoint_final.pth", command="info model.zip",
    ),
    "a folder with nothing but a checkpoint": theirs(
        lambda f: (f.with_name("alone").mkdir(), checkpoint_of(f).rename(f.with_name("alone") / "checkpoint_best.pth")),
        "alone", "no plans.json in it", command="predict -i scan.nii.gz -o out -m alone",
    ),
    "a checkpoint for a model": theirs(
        lambda f: None, "theirs, the model folder", command=f"{FOLDER[:-5]}theirs/fold_0/checkpoint_final.pth"
    ),
    "images and a model without references": given("evaluate scan.nii.gz nowhere -m model", "nowhere"),
    "a model that is none, to evaluate": given("evaluate scan.nii.gz scan.nii.gz -m scan.nii.gz", "it is a file"),
    "an empty folder for a model": Bad(lambda place: (place / "none").mkdir(), "info none", ("none: ", "plans.json")),
    "no best checkpoint": theirs(
        lambda f: None, "checkpoint_best.pth", "--checkpoint final", command="import theirs -o new -chk best"
    ),
    "no final checkpoint": theirs(
        lambda f: checkpoint_of(f).rename(f / "fold_0" / "checkpoint_best.pth"),
        "checkpoint_final.pth", "--checkpoint best", command="predict -i scan.nii.gz -o out -m theirs",
    ),
    "nothing but the checkpoint of a run that continues": theirs(
        lambda f: checkpoint_of(f).rename(f / "fold_0" / "checkpoint_latest.pth"),
        "checkpoint_final.pth", "fold 0", command="info theirs",
    ),
    "the best checkpoint of a model of ours": given(f"{PREDICT} -chk best", "model: ", "--checkpoint"),
    "an unknown checkpoint": given(f"{PREDICT} -chk latest", "latest"),
    # `nnlite import` and `nnlite export`
    "nothing to import": given("import nowhere.zip -o new", "nowhere.zip"),
    "a folder that is no model": Bad(lambda place: (place / "theirs").mkdir(), "import theirs -o new", ("theirs",)),
    "an import of a model of ours": given("import model", "model: ", "is a model folder of nnlite already", "-m"),
    "an import of a fold": given("import model/fold_0", "fold_0", "model folder"),
    "an export to nowhere": given("export -m model", "nnlite export"),
    "an export to nowhere, of an argument": given("export model", "model: where to write", "FILE.zip"),
    "an export of an argument to no zip": given("export model -o exp", "exp: ", "--format nnunet"),
    "an export of two models": given("export model -m model -o exp.zip", "2 models"),
    "an export to two places": given("export model a.zip -o b.zip", "a.zip and b.zip"),
    "an export of too much": given("export model a.zip b.zip", "2 places", "nnlite export"),
    "an export of a format to a zip": given("export model exp.zip --format nnunet", "exp.zip", "nnunet"),
    "an export of an unknown format": given("export model exp --format keras", "keras"),
    "an export of a model that is not there": given("export nowhere --format nnunet -o exp", "nowhere"),
    "an export over a file": given("export model scan.nii.gz --format nnunet", "scan.nii.gz", "already"),
    "an export that is no zip": given("export model.tar -m model", "zip"),
    "an export of no model": given("export model.zip -m nowhere", "nowhere"),
    # what is predicted, evaluated, described
    "no such image": given("predict -i gone.nii.gz -o out -m model", "gone.nii.gz"),
    "an empty folder": Bad(lambda place: (place / "in").mkdir(), FOLDER, ("in",)),
    "a folder of text": file("in/a.txt", "x", FOLDER, "supported"),
    "text for an image": file("a.txt", "x", "predict -i a.txt -o out -m model"),
    "one case in two formats": Bad(copies_of_scan("in/a.nii.gz", "in/a.nii"), FOLDER, ("same case",)),
    "its own output": given("predict -i scan.nii.gz -o . -m model", "overwritten"),
    "a file for the output": file("out", "x", PREDICT),
    "nothing to evaluate": given("evaluate nowhere model", "nowhere"),
    "no references": Bad(lambda place: (place / "refs").mkdir(), "evaluate scan.nii.gz refs"),
    "a reference of another shape": image(
        np.zeros((3, 4, 5), np.uint8), name="ref", command="evaluate scan.nii.gz ref.nii.gz"
    ),
    "info of nothing": given("info nowhere", "nowhere: is no model folder (it does not exist)"),
    "info of an image": given("info scan.nii.gz", "scan.nii.gz"),
    "info of a fold": given("info model/fold_0", "model/fold_0", "model, the model folder"),
    "info of two models": given("info model model", "unexpected"),
}  # fmt: skip

IMAGES = {
    "an empty image": file("scan.nii.gz", "", PREDICT, "scan.nii.gz", "empty"),
    "an image cut off": file("scan.nii.gz", b"\x1f\x8b\x08\x00\x00", PREDICT),
    "a web page for an image": file("scan.nii.gz", "<!DOCTYPE html>", PREDICT),
    "three channels for one": image(np.zeros((8, 8, 8, 3), np.uint8), "3 channels", "expects 1"),
    "complex numbers": image(np.zeros((8, 8, 8), np.complex64), "complex"),
    "five dimensions": image(np.zeros((4, 4, 4, 2, 2), np.uint8), "dimensions"),
    "logits that are infinite": weights(
        overflow, "--precision fp32", command=f"{PREDICT} --precision bf16 --no-mirroring"
    ),
    "an image of NaN": image(np.full((8, 8, 8), np.nan, np.float32), "scan"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_bad_model_or_command(command: Command, place: Path, counts: Counts, name: str) -> None:
    counts("bad inputs refused in one line")
    refuse(REFUSED[name], command, place)
    assert not (place / "was_run").exists()


@pytest.mark.parametrize("name", IMAGES)
def test_image(command: Command, place: Path, counts: Counts, name: str) -> None:
    """The image is named on a line of its own, for other images are predicted nevertheless; here there is none."""
    counts("bad inputs refused in one line")
    bad = IMAGES[name]
    bad.make(place)
    before = contents(place)
    code, out, err = command(*bad.command.split(), cwd=place)
    failed = [line for line in err.splitlines() if line.startswith("failed: ")]
    assert (code, out) == (2, "0 label maps in out\n") and len(failed) == 1, (code, out, err)
    assert err.splitlines()[-1] == failed[0] and failed[0].startswith("failed: scan: ")
    assert all(word in failed[0] for word in bad.says), failed
    left = contents(place)
    assert left.pop("out/predictions.json") and left == before, "nothing but the record of the run"


def test_verbose_shows_where_a_case_failed(command: Command, place: Path) -> None:
    (place / "scan.nii.gz").write_bytes(b"no image")
    code, _, err = command(*PREDICT.split(), "-v", cwd=place)
    shown, _, failed = err.partition("failed: scan: ")
    assert code == 2 and failed and "Traceback" in shown and 'nifti.py", line ' in shown
