"""The main job as a person does it: real commands, real data, and nothing but a folder to work in.

Each command runs in a process of its own once, `plan` and `predict` in one that imports all itself, and then in that of
the tests, which spares the imports.
The networks are tiny and trained for seconds; what they segment is nonsense, but its form must be right.
"""

from __future__ import annotations

import csv
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import SimpleITK
from samples import Command, first_cases, in_a_fork

from nnunet_lite.commands.predict import Predictions, after_predict
from nnunet_lite.data.labels import Labels

TINY = (
    *("--epochs", 2, "--iterations", 2, "--batch-size", 2, "--device", "cpu", "--precision", "fp32"),
    *("--set", "training.validation_iterations=1", "--set", "inference.mirroring=false"),
    *("--set", "network.features_base=4", "--set", "network.features_max=8", "--set", "inference.step_size=1.0"),
)
TRAIN_3D = ("train", "3d_fullres", 0, "--recipe", "cpu", *TINY, "--patch-size", "32x32x32")
TRAIN_2D = ("train", "2d", 0, *TINY, "--patch-size", "32x32", "--set", "optimizer.lr=0.001")
EXACT = ("--device", "cpu", "--precision", "fp32")  # "auto" takes what is fastest at that moment


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory, hippocampus: Path) -> Path:
    """A person's folder: the dataset (8 cases to train on) in ./data, and what is to be predicted in ./in."""
    home = tmp_path_factory.mktemp("home")
    first_cases(home / "data" / "Task04_Hippocampus", 8)
    (home / "in").mkdir()
    for path, suffix in zip(sorted((hippocampus / "imagesTs").iterdir()), (".nii.gz", ".nrrd", ".mha"), strict=False):
        write_oblique(path, home / "in" / (path.name.removesuffix(".nii.gz") + suffix))
    return home


def write_oblique(path: Path, target: Path) -> None:
    """An image on a grid with unequal spacing, turned and far from the origin, as scanners make them."""
    image = SimpleITK.ReadImage(str(path))
    turn = SimpleITK.Euler3DTransform()
    turn.SetRotation(0.1, -0.2, 0.3)
    image.SetDirection(turn.GetMatrix())
    image.SetSpacing((0.9, 1.1, 1.25))
    image.SetOrigin((-11.5, 123.25, 7.75))
    SimpleITK.WriteImage(image, str(target))


@pytest.fixture(scope="module")
def trained(home: Path, nnlite: Command) -> Path:
    """plan -> preprocess -> train 3d_fullres 0 -> train 2d 0, in the default workspace."""
    code, out, err = nnlite("plan", "Task04", cwd=home)
    assert code == 0 and "3d_fullres" in out and "8 cases, 0 errors" in err
    code, out, err = in_a_fork("preprocess", cwd=home)
    assert code == 0 and "8 arrays made, 0 kept" in out, "2d and 3d_fullres share their arrays"
    assert "dataset Task04_Hippocampus (workspace " in err
    for arguments in (TRAIN_3D, TRAIN_2D):
        code, out, err = in_a_fork(*arguments, cwd=home)
        assert code == 0, err
        assert "epoch    2" in err and "fold 0, whole images:" in out and "foreground mean" in out
    return home


@pytest.fixture(scope="module")
def predicted(trained: Path, nnlite: Command) -> Path:
    """predict -> the folder ./out, with the 3D model by name."""
    code, out, err = nnlite("predict", "-i", "in", "-o", "out", *EXACT, "-c", "3d_fullres", cwd=trained)
    assert code == 0 and out == "3 label maps in out\n" and "3d_fullres-cpu (fold 0)" in err
    return trained / "out"


def models(home: Path) -> Path:
    return home / "nnlite_workspace" / "Task04_Hippocampus" / "models"


def header(path: Path) -> list[float]:
    """Size, spacing, origin and direction, as ITK reads them."""
    reader = SimpleITK.ImageFileReader()
    reader.SetFileName(str(path))
    reader.ReadImageInformation()
    return [*reader.GetSize(), *reader.GetSpacing(), *reader.GetOrigin(), *reader.GetDirection()]


def files(folder: Path) -> dict[str, int]:
    return {str(p.relative_to(folder)): p.stat().st_mtime_ns for p in folder.rglob("*") if p.is_file()}


def test_what_training_leaves(trained: Path) -> None:
    assert {p.name for p in models(trained).iterdir()} == {"3d_fullres-cpu", "2d-default"}
    fold = models(trained) / "3d_fullres-cpu" / "fold_0"
    rows = [json.loads(line) for line in (fold / "metrics.jsonl").read_text().splitlines()]
    assert [row["epoch"] for row in rows] == [1, 2] and all(np.isfinite(row["train_loss"]) for row in rows)
    assert (fold / "progress.png").read_bytes().startswith(b"\x89PNG")
    splits = json.loads((models(trained).parent / "splits.json").read_text())
    held_out = splits[0]["val"]
    summary = json.loads((fold / "validation" / "summary.json").read_text())
    assert [Path(c["prediction_file"]).name for c in summary["metric_per_case"]] == [f"{i}.nii.gz" for i in held_out]
    with (fold / "validation" / "summary.csv").open() as file:
        assert {row["case"] for row in csv.DictReader(file)} == set(held_out)
    run = json.loads((fold.parent / "run.json").read_text())
    assert run["settings"]["training"]["epochs"] == 2 and run["settings"]["recipe"] == "cpu"
    assert not list(trained.rglob(".tmp-*")) and not list(trained.rglob("*.pkl"))
    assert {p.name for p in trained.iterdir()} >= {"data", "in", "nnlite_workspace"}


def test_the_same_training_again_is_finished(trained: Path, command: Command) -> None:
    before = files(models(trained) / "3d_fullres-cpu" / "fold_0")
    code, out, err = command(*TRAIN_3D, "--json", cwd=trained)
    assert code == 0 and "training is finished" in err and "epoch" not in err
    assert 0 <= json.loads(out)["0"]["foreground_mean"]["Dice"] <= 1
    after = files(models(trained) / "3d_fullres-cpu" / "fold_0")
    written_again = ("summary", ".lock")  # the scores, and the process that wrote them
    changed = {name for name in before.keys() | after.keys() if before.get(name) != after.get(name)}
    assert all(any(part in name for part in written_again) for name in changed), changed


def test_other_settings_are_refused_with_the_differences(trained: Path, command: Command) -> None:
    before = files(trained)
    code, out, err = command(*TRAIN_3D, "--epochs", 3, "--lr", 0.5, cwd=trained)
    assert (code, out) == (2, "")
    message = err.splitlines()[-1]
    assert message.startswith(f"error: {models(trained) / '3d_fullres-cpu'}: was trained with other settings: ")
    assert "training.epochs: 2 -> 3; optimizer.lr: 0.002 -> 0.5." in message and "--restart" in message
    assert files(trained) == before
    code, _, err = command(*TRAIN_3D, "--patch-size", "32x32x40", cwd=trained)
    assert code == 2 and "training.patch_size: [32, 32, 32] -> [32, 32, 40]" in err
    code, _, err = command(*TRAIN_3D, "--name", "odd", "--patch-size", "33x32x32", cwd=trained)
    assert code == 2 and "nearest" in err
    assert files(trained) == before


def test_predict_any_mix_of_formats(trained: Path, predicted: Path) -> None:
    """Label maps have the format, grid and header of their image, and values of the dataset."""
    names = sorted(path.name for path in (trained / "in").iterdir())
    assert sorted(path.name for path in predicted.iterdir()) == sorted([*names, "predictions.json"])
    assert [Path(name).suffix for name in names] == [".gz", ".nrrd", ".mha"]
    for name in names:
        image, label = trained / "in" / name, predicted / name
        assert header(label) == pytest.approx(header(image), abs=1e-5)
        written = SimpleITK.ReadImage(str(label))
        assert written.GetPixelID() == SimpleITK.sitkUInt8
        assert set(np.unique(SimpleITK.GetArrayFromImage(written))) <= {0, 1, 2}


def test_predict_resumes_where_it_stopped(trained: Path, predicted: Path, command: Command) -> None:
    shutil.copytree(trained / "in", trained / "in2")
    shutil.copytree(predicted, trained / "out2")
    first, *_ = sorted((trained / "out2").iterdir())
    first.unlink()
    before = files(trained / "out2")
    given = ("predict", "-i", "in2", "-o", "out2", "-m", models(trained) / "3d_fullres-cpu", *EXACT)
    code, out, _ = command(*given, "--continue", "--json", cwd=trained)
    assert code == 0 and [Path(file).name for file in json.loads(out)["files"]] == sorted(files(trained / "in2"))
    after = files(trained / "out2")
    changed = {first.name, "predictions.json"}
    assert after.keys() == before.keys() | changed and {n for n in after if after[n] != before.get(n)} == changed
    assert first.read_bytes() == (predicted / first.name).read_bytes()


def test_one_broken_input_does_not_stop_the_others(trained: Path, command: Command) -> None:
    folder = trained / "in3"
    shutil.copytree(trained / "in", folder)
    whole = next(folder.glob("*.nii.gz"))
    (folder / "cut.nii.gz").write_bytes(whole.read_bytes()[:5000])
    colour = SimpleITK.GetImageFromArray(np.zeros((8, 8, 8, 3), np.uint8), isVector=True)
    SimpleITK.WriteImage(colour, str(folder / "wide.nrrd"))
    (folder / "notes.txt").write_text("not an image")
    code, out, err = command("predict", "-i", "in3", "-o", "out3", "--no-mirroring", "-c", "2d", "-q", cwd=trained)
    assert code == 1 and out == "3 label maps in out3\n"
    failed = err.splitlines()
    assert len(failed) == 2 and failed[0].startswith("failed: cut: ") and "truncated" in failed[0]
    assert "in3/cut.nii.gz" in failed[0]
    assert failed[1].startswith("failed: wide: ") and "3 channels, the model expects 1 (MRI)" in failed[1]
    names = {path.name for path in (trained / "out3").iterdir()}
    record = json.loads((trained / "out3" / "predictions.json").read_text())["predictions"]
    names -= {"predictions.json"}
    assert names == {path.name for path in (trained / "in").iterdir()}, "and nothing of the broken ones"
    assert {name for name, one in record.items() if one["result"] == "written"} == names
    assert record["cut.nii.gz"]["result"].startswith("failed: ") and "truncated" in record["cut.nii.gz"]["result"]


def test_the_next_commands_name_the_image_of_the_label_map(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    images = {name: Path(f"in/{name}.nrrd") for name in ("a", "a.b")}

    def following(output: str, file: str, images: dict[str, Path]) -> list[list[str]]:
        labels = Labels(names={"background": 0, "liver": 1})
        return after_predict(Predictions(Path(output), (Path(file),), {}, (), (), labels, images=images))

    with_dot = tmp_path / "out" / "a.b.nrrd"
    assert following("out", str(with_dot), images)[0] == ["nnlite", "view", "in/a.b.nrrd", str(with_dot)]
    assert following("out", str(with_dot), images)[1] == ["nnlite", "evaluate", "out", "REFERENCES"]
    file = str(tmp_path / "seg.nii.gz")  # workers know no relative paths
    assert following("seg.nii.gz", file, {"a": images["a"]}) == [["nnlite", "view", "in/a.nrrd", file]]


def test_evaluate(trained: Path, command: Command) -> None:
    """A dataset's own labels against themselves are perfect; the table, the JSON and the CSV say so."""
    labels = trained / "data" / "Task04_Hippocampus" / "labelsTr"
    code, out, err = in_a_fork("evaluate", labels, labels, "--output", "scores.csv", cwd=trained)
    assert code == 0, err
    mean = next(line for line in out.splitlines() if line.startswith("foreground mean")).split()
    assert mean[2:4] == ["8", "1.0000"]
    with (trained / "scores.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 16 and {row["Dice"] for row in rows} == {"1.0"}
    shutil.copytree(labels, trained / "alone" / "labels")
    code, out, _ = command("evaluate", "alone/labels", "alone/labels", cwd=trained)
    assert code == 0 and out.endswith("the labels are those of the planned dataset, Anterior, Posterior\n")
    predicted = models(trained) / "3d_fullres-cpu" / "fold_0" / "validation"
    code, out, err = command("evaluate", predicted, labels, "--json", "--no-surface", cwd=trained)
    printed, own = json.loads(out), json.loads((predicted / "summary.json").read_text())
    assert code == 0 and printed["foreground_mean"]["Dice"] == own["foreground_mean"]["Dice"]


def test_info(trained: Path, command: Command) -> None:
    code, out, _ = in_a_fork("info", cwd=trained)
    assert code == 0 and "3d_fullres-cpu" in out and "2d-default" in out and "no model" not in out
    code, out, err = command("info", models(trained) / "2d-default", "--json", cwd=trained)
    about = json.loads(out)
    assert (code, err) == (0, "")
    assert (about["configuration"], about["patch_size"], about["channels"]) == ("2d", [32, 32], ["MRI"])
    assert about["folds"]["0"]["epochs"] == 2 and 0 <= about["folds"]["0"]["mean_dice"] <= 1


def test_a_model_folder_may_move(trained: Path, predicted: Path, command: Command, tmp_path: Path) -> None:
    """It needs neither the workspace nor the data: predictions elsewhere are the same to the byte."""
    shutil.copytree(models(trained) / "3d_fullres-cpu", tmp_path / "model", ignore=shutil.ignore_patterns("valid*"))
    image = sorted((trained / "in").iterdir())[0]
    code, out, err = command("predict", "-i", image, "-o", "out", "-m", "model", *EXACT, cwd=tmp_path)
    assert (code, out) == (0, "1 label map in out\n"), err
    assert (tmp_path / "out" / image.name).read_bytes() == (predicted / image.name).read_bytes()
    assert not (tmp_path / "nnlite_workspace").exists()
