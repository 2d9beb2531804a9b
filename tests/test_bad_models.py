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
from bad_inputs import Bad, Command, contents, edit, refuse, setting
from samples import NNUNET_MODELS

PREDICT = "predict -i scan.nii.gz -o out -m model"
IMPORT = "import model.zip -o new"
INFO = "info model"
WEIGHTS = "model/fold_0/model.safetensors"
NNUNET = NNUNET_MODELS / "plain_3d"


def in_model(file: str, content: bytes | str | None, command: str = PREDICT, *says: str) -> Bad:
    """Another content of a file of the model; None: it is gone."""

    def make(place: Path) -> None:
        path = place / "model" / file
        if content is None:
            path.unlink()
        else:
            path.write_bytes(content if isinstance(content, bytes) else content.encode())

    return Bad(make, command, says or (Path(file).name,))


def run_with(change: Callable[[Any], Any], *says: str) -> Bad:
    return Bad(lambda place: edit(place / "model" / "run.json", change), PREDICT, ("run.json", *says))


def weights(change: Callable[[dict[str, Any]], object], *says: str, without: str = "checksum") -> Bad:
    """Other tensors in the model file, which is a whole safetensors file whose header lacks `without`."""

    def make(place: Path) -> None:
        from safetensors import safe_open
        from safetensors.numpy import load_file, save_file

        with safe_open(place / WEIGHTS, "np") as file:
            about = {key: value for key, value in file.metadata().items() if key != without}
        tensors = load_file(place / WEIGHTS)
        change(tensors)
        save_file(tensors, place / WEIGHTS, about)

    return Bad(make, PREDICT, ("model.safetensors", *says))


def without_header(place: Path) -> None:
    """Weights as another program may have saved them."""
    from safetensors.numpy import load_file, save_file

    save_file(load_file(place / WEIGHTS), place / WEIGHTS)


def bytes_of_weights(change: Callable[[bytes], bytes], *says: str) -> Bad:
    return Bad(
        lambda place: (place / WEIGHTS).write_bytes(change((place / WEIGHTS).read_bytes())),
        PREDICT,
        ("model.safetensors", *says),
    )


def first(tensors: dict[str, Any]) -> str:
    return sorted(tensors)[0]


def zipped(entries: dict[str, bytes], *says: str, command: str = IMPORT) -> Bad:
    def make(place: Path) -> None:
        with zipfile.ZipFile(place / "model.zip", "w") as archive:
            for name, content in entries.items():
                archive.writestr(name, content)

    return Bad(make, command, ("model.zip", *says))


CIRCLE = {"inherits_from": "3d_fullres"}


class Evil:
    """Runs a command where it is unpickled by a careless reader."""

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, ("was_run",)


def hostile_checkpoint(place: Path) -> None:
    """A model of nnU-Net whose checkpoint is a pickle with code."""
    shutil.copytree(NNUNET, place / "theirs")
    archive = next((place / "theirs").glob("fold_0/*.pth"))
    torch.save({"network_weights": Evil()}, archive)


def theirs_with(change: Callable[[Path], object]) -> Callable[[Path], None]:
    def make(place: Path) -> None:
        shutil.copytree(NNUNET, place / "theirs")
        change(place / "theirs")

    return make


def checkpoint_of(folder: Path) -> Path:
    return next(folder.glob("fold_0/*.pth"))


def scan(content: bytes | None, *says: str) -> Bad:
    return Bad(lambda place: (place / "scan.nii.gz").write_bytes(content or b""), PREDICT, ("scan.nii.gz", *says))


def image(array: np.ndarray) -> Callable[[Path], None]:
    return lambda place: nibabel.save(nibabel.Nifti1Image(array, np.eye(4)), place / "scan.nii.gz")


def asked(command: str, *says: str) -> Bad:
    return Bad(lambda place: None, command, says)


def folder_of(*names: str) -> Callable[[Path], None]:
    def make(place: Path) -> None:
        for name in names:
            (place / "in" / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(place / "scan.nii.gz", place / "in" / name)

    return make


def overflowing(place: Path) -> None:
    """Weights that are finite, and logits that are not."""
    from safetensors.numpy import load_file, save_file

    from nnunet_lite.models.folder import read_weights_header

    tensors, about = load_file(place / WEIGHTS), read_weights_header(place / WEIGHTS)
    for name in tensors:
        if name.startswith("heads."):
            tensors[name] = np.full_like(tensors[name], 3e38)
    save_file(tensors, place / WEIGHTS, {"state": json.dumps(about)})


MODELS = {
    "no model there": asked("predict -i scan.nii.gz -o out -m nowhere", "nowhere"),
    "a file for the model": asked("predict -i scan.nii.gz -o out -m scan.nii.gz", "scan.nii.gz"),
    "no run.json": in_model("run.json", None),
    "an empty run.json": in_model("run.json", ""),
    "run.json is a list": in_model("run.json", "[1]"),
    "run.json is nothing": in_model("run.json", "{}", PREDICT, "run.json", "format"),
    "run.json of a later format": run_with(setting(format="nnlite-model-2"), "newer", "Update"),
    "run.json of an unknown format": run_with(setting(format="other"), "unknown format"),
    "run.json with an unknown setting": run_with(lambda run: run["settings"]["training"].update(magic=1), "magic"),
    "run.json with an illegal setting": run_with(lambda run: run["settings"]["inference"].update(step_size=-1)),
    "run.json without settings": run_with(lambda run: run.pop("settings") and None, "settings"),
    "run.json with settings of text": run_with(setting(settings="default")),
    "run.json with a seed of text": run_with(setting(seed="one")),
    "run.json of no configuration": run_with(lambda run: run.pop("configuration") and None, "configuration"),
    "a configuration that the plan has not": Bad(
        lambda place: edit(place / "model" / "run.json", setting(configuration="4d")), PREDICT, ("'4d'",)
    ),
    "no plans.json": in_model("plans.json", None),
    "plans.json cut off": in_model("plans.json", '{"format"'),
    "plans.json of a later format": Bad(
        lambda place: edit(place / "model" / "plans.json", setting(format="nnlite-plan-2")), INFO, ("plans.json",)
    ),
    "no weights": in_model("fold_0/model.safetensors", None, PREDICT, "fold"),
    "weights of no byte": in_model("fold_0/model.safetensors", b""),
    "weights of text": in_model("fold_0/model.safetensors", "not weights"),
    "a pickle for weights": in_model("fold_0/model.safetensors", pickle.dumps({"a": Evil()})),
    "weights cut off": bytes_of_weights(lambda data: data[: len(data) // 2]),
    "weights cut by a byte": bytes_of_weights(lambda data: data[:-1]),
    "weights with bytes too many": bytes_of_weights(lambda data: data + b"more"),
    "a header of 10^18 bytes": bytes_of_weights(lambda data: struct.pack("<Q", 10**18) + data[8:]),
    "a header that is no JSON": bytes_of_weights(lambda data: data[:8] + b"?" + data[9:]),
    "a folder for weights": Bad(
        lambda place: ((place / WEIGHTS).unlink(), (place / WEIGHTS).mkdir()), PREDICT, ("fold",)
    ),
    "weights of another shape": weights(lambda t: t.update({first(t): np.zeros(3, np.float32)}), "another network"),
    "a weight too few": weights(lambda t: t.pop(first(t)), "another network"),
    "a weight too many": weights(lambda t: t.update(extra=np.zeros(3, np.float32)), "another network"),
    "weights of NaN": weights(lambda t: t.update({first(t): np.full_like(t[first(t)], np.nan)}), "finite"),
    "weights that were changed": weights(lambda t: t.update({first(t): 2 * t[first(t)]}), "damaged", without=""),
    "weights without their header": Bad(without_header, INFO, ("model.safetensors",)),
    "no such fold": asked(f"{PREDICT} -f 3", "fold 3", "Trained folds: 0"),
    "a fold of text": asked(f"{PREDICT} -f zero", "zero"),
    "no such setting of inference": asked(f"{PREDICT} --set inference.steps=1", "inference.step_size"),
    "a setting of training": asked(f"{PREDICT} --set training.epochs=1", "training.epochs"),
    "steps of nothing": asked(f"{PREDICT} --step-size 0", "step_size"),
    "negative memory": asked(f"{PREDICT} --max-memory -1", "max_memory"),
    "no such device": asked(f"{PREDICT} --device warp", "warp"),
    "probabilities of a label that is not there": asked(f"{PREDICT} --save-probabilities Tail", "Tail"),
    "DICOM of what is none": asked(f"{PREDICT} --dicom-seg", "scan.nii.gz"),
}  # fmt: skip

ZIPS = {
    "no zip": Bad(lambda place: (place / "model.zip").write_text("PK no"), IMPORT, ("model.zip",)),
    "an empty zip": zipped({}, "manifest"),
    "a zip of something": zipped({"readme.txt": b"hello"}),
    "a path out of the folder": zipped({"../../evil.txt": b"x"}, "out of its folder"),
    "an absolute path": zipped({"/tmp/evil.txt": b"x"}, "out of its folder"),
    "a path of Windows": zipped({"C:\\evil.txt": b"x"}, "out of its folder"),
    "a manifest that is no JSON": zipped({"manifest.json": b"{"}, "manifest.json"),
    "a manifest of a later format": zipped({"manifest.json": b'{"format": "nnlite-bundle-9"}'}, "newer"),
    "a manifest that is a list": zipped({"manifest.json": b"[]"}, "manifest.json"),
    "no zip to predict with": Bad(
        lambda place: (place / "model.zip").write_text("x"), f"{PREDICT}.zip", ("model.zip",)
    ),
    "nothing to import": asked("import nowhere.zip -o new", "nowhere.zip"),
    "a folder that is no model": Bad(lambda place: (place / "theirs").mkdir(), "import theirs -o new", ("theirs",)),
    "a pickle with code": Bad(hostile_checkpoint, "import theirs -o new", ("posix.mkdir", "was not run")),
    "a pickle with code, to predict": Bad(
        hostile_checkpoint, "predict -i scan.nii.gz -o out -m theirs", ("posix.mkdir", "was not run")
    ),
    "a checkpoint cut off": Bad(
        theirs_with(lambda f: os.truncate(checkpoint_of(f), 5000)), "import theirs -o new"
    ),
    "a checkpoint of text": Bad(theirs_with(lambda f: checkpoint_of(f).write_text("x")), "import theirs -o new"),
    "a checkpoint of zeros": Bad(
        theirs_with(lambda f: checkpoint_of(f).write_bytes(bytes(1000))), "import theirs -o new"
    ),
    "nnU-Net's plans are a list": Bad(
        theirs_with(lambda f: (f / "plans.json").write_text("[]")), "import theirs -o new", ("plans.json",)
    ),
    "nnU-Net's plans are nothing": Bad(
        theirs_with(lambda f: (f / "plans.json").write_text("{}")), "import theirs -o new", ("plan",)
    ),
    "nnU-Net's configurations go in a circle": Bad(
        theirs_with(
            lambda f: edit(f / "plans.json", lambda plans: plans["configurations"].update({"3d_fullres": CIRCLE}))
        ),
        "import theirs -o new",
        ("circle",),
    ),
    "nnU-Net's dataset.json is a list": Bad(
        theirs_with(lambda f: (f / "dataset.json").write_text("[]")), "import theirs -o new", ("dataset.json",)
    ),
    "nnU-Net's dataset.json is gone": Bad(
        theirs_with(lambda f: (f / "dataset.json").unlink()), "import theirs -o new", ("dataset.json",)
    ),
    "a model over another": Bad(
        lambda place: (shutil.copytree(NNUNET, place / "theirs"), shutil.copytree(NNUNET, place / "new")),
        "import theirs -o new",
        ("new",),
    ),
    "an export to nowhere": asked("export -m model", "nnlite export"),
    "an export to nowhere, of an argument": asked("export model", "model: where to write", "FILE.zip"),
    "an export of an argument to no zip": asked("export model -o exp", "exp: ", "--format nnunet"),
    "an export of two models": asked("export model -m model -o exp.zip", "two models"),
    "an export to two places": asked("export model a.zip -o b.zip", "a.zip and, with -o, b.zip"),
    "an export of too much": asked("export model a.zip b.zip", "3 arguments", "nnlite export"),
    "an export of a format to a zip": asked("export model exp.zip --format nnunet", "exp.zip", "nnunet"),
    "an export of an unknown format": asked("export model exp --format keras", "keras"),
    "an export of a model that is not there": asked("export nowhere --format nnunet -o exp", "nowhere"),
    "an export over a file": asked("export model scan.nii.gz --format nnunet", "scan.nii.gz", "already"),
    "an import of a model of ours": asked("import model", "model: ", "is a model folder of nnlite already", "-m"),
    "an import of a fold": asked("import model/fold_0", "fold_0", "model folder"),
    "an import of one checkpoint": Bad(
        theirs_with(lambda f: None), "import theirs/fold_0/checkpoint_final.pth", ("checkpoint_final.pth",)
    ),
    "an import of nnU-Net's folder of models": Bad(
        lambda place: shutil.copytree(NNUNET, place / "Dataset004" / "trainer__plans__3d"),
        "import Dataset004", ("Dataset004", "trainer__plans__3d"),
    ),
    "an import of nnU-Net's zip": Bad(
        lambda place: (shutil.make_archive(str(place / "model"), "zip", NNUNET)), IMPORT, ("model.zip", "Unpack it")
    ),
    "the best checkpoint of a model of ours": asked(f"{PREDICT} -chk best", "model: ", "--checkpoint"),
    "an unknown checkpoint": asked(f"{PREDICT} -chk latest", "latest"),
    "no best checkpoint": Bad(
        theirs_with(lambda f: None), "import theirs -o new -chk best", ("checkpoint_best.pth", "--checkpoint final")
    ),
    "no final checkpoint": Bad(
        theirs_with(lambda f: checkpoint_of(f).rename(f / "fold_0" / "checkpoint_best.pth")),
        "predict -i scan.nii.gz -o out -m theirs",
        ("checkpoint_final.pth", "--checkpoint best"),
    ),
    "nothing but the checkpoint of a run that continues": Bad(
        theirs_with(lambda f: checkpoint_of(f).rename(f / "fold_0" / "checkpoint_latest.pth")),
        "info theirs",
        ("checkpoint_final.pth", "fold 0"),
    ),
    "an export that is no zip": asked("export model.tar -m model", "zip"),
    "an export of no model": asked("export model.zip -m nowhere", "nowhere"),
}  # fmt: skip

INPUTS = {
    "no such image": asked("predict -i gone.nii.gz -o out -m model", "gone.nii.gz"),
    "an empty folder": Bad(lambda place: (place / "in").mkdir(), "predict -i in -o out -m model", ("in",)),
    "a folder of text": Bad(
        lambda place: ((place / "in").mkdir(), (place / "in" / "a.txt").write_text("x")),
        "predict -i in -o out -m model",
        ("supported",),
    ),
    "text for an image": Bad(
        lambda place: (place / "a.txt").write_text("x"), "predict -i a.txt -o out -m model", ("a.txt",)
    ),
    "one case in two formats": Bad(folder_of("a.nii.gz", "a.nii"), "predict -i in -o out -m model", ("same case",)),
    "its own output": asked("predict -i scan.nii.gz -o . -m model", "overwritten"),
    "a file for the output": Bad(
        lambda place: (place / "out").write_text("x"), "predict -i scan.nii.gz -o out -m model", ("out",)
    ),
    "nothing to evaluate": asked("evaluate nowhere model", "nowhere"),
    "no references": Bad(lambda place: (place / "refs").mkdir(), "evaluate scan.nii.gz refs"),
    "a reference of another shape": Bad(
        lambda place: nibabel.save(nibabel.Nifti1Image(np.zeros((3, 4, 5), np.uint8), np.eye(4)), place / "ref.nii.gz"),
        "evaluate scan.nii.gz ref.nii.gz",
    ),
    "info of nothing": asked("info nowhere", "nowhere"),
    "info of an image": asked("info scan.nii.gz", "scan.nii.gz"),
    "info of a fold": asked("info model/fold_0", "model/fold_0", "Give model,"),
    "info of two models": asked("info model -m model", "two models"),
    "info of a folder of models": asked("info .", "model"),
}  # fmt: skip

IMAGES = {
    "an empty image": scan(None, "empty"),
    "an image cut off": scan(b"\x1f\x8b\x08\x00\x00"),
    "a web page for an image": scan(b"<!DOCTYPE html>"),
    "three channels for one": Bad(image(np.zeros((8, 8, 8, 3), np.uint8)), PREDICT, ("3 channels", "expects 1")),
    "complex numbers": Bad(image(np.zeros((8, 8, 8), np.complex64)), PREDICT, ("complex",)),
    "five dimensions": Bad(image(np.zeros((4, 4, 4, 2, 2), np.uint8)), PREDICT, ("dimensions",)),
    "logits that are infinite": Bad(overflowing, f"{PREDICT} --precision bf16", ("--precision fp32",)),
    "an image of NaN": Bad(image(np.full((8, 8, 8), np.nan, np.float32)), PREDICT, ("scan",)),
}

RESUMED = "train 3d_fullres 0 --name tiny --device cpu --epochs 3"


@pytest.fixture
def place(tiny_model: Path, hippocampus: Path, tmp_path: Path) -> Path:
    """A trained model and an image to predict."""
    shutil.copytree(tiny_model, tmp_path / "model", ignore=shutil.ignore_patterns(".lock", "validation"))
    shutil.copy(hippocampus / "imagesTr" / "hippocampus_001.nii.gz", tmp_path / "scan.nii.gz")
    return tmp_path


@pytest.mark.parametrize("name", MODELS)
def test_model(command: Command, place: Path, counts: Callable[..., None], name: str) -> None:
    counts("bad inputs refused in one line")
    refuse(MODELS[name], command, place)


@pytest.mark.parametrize("name", ZIPS)
def test_zip(command: Command, place: Path, counts: Callable[..., None], name: str) -> None:
    counts("bad inputs refused in one line")
    refuse(ZIPS[name], command, place)
    assert not (place / "was_run").exists()


@pytest.mark.parametrize("name", INPUTS)
def test_input(command: Command, place: Path, counts: Callable[..., None], name: str) -> None:
    counts("bad inputs refused in one line")
    refuse(INPUTS[name], command, place)


@pytest.mark.parametrize("name", IMAGES)
def test_image(command: Command, place: Path, counts: Callable[..., None], name: str) -> None:
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
    assert contents(place) == before
