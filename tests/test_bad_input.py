"""One kind of bad input at a time, through the real commands: the message, the exit code, and nothing left behind.

What the report says in full is asserted in test_check.py; here it is what a person sees who types the command.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import nibabel
import numpy as np
import pytest

Run = Callable[..., tuple[int, str, str]]
Copy = Callable[..., Path]
IMAGE, LABEL = "imagesTr/hippocampus_001.nii.gz", "labelsTr/hippocampus_001.nii.gz"
T1, T2 = "imagesTr/hippocampus_001_0000.nii.gz", "imagesTr/hippocampus_001_0001.nii.gz"


def rewrite(path: Path, change: Callable[[np.ndarray], np.ndarray]) -> None:
    """Change the voxels (x, y, z) of a NIfTI file."""
    image = nibabel.load(path)
    nibabel.save(nibabel.Nifti1Image(change(np.asarray(image.dataobj).copy()), image.affine), path)


def rewrite_all(folder: Path, change: Callable[[np.ndarray], np.ndarray]) -> None:
    for path in folder.iterdir():
        rewrite(path, change)


def move(path: Path, shift: float = 0.0, scale: float = 1.0, angle: float = 0.0) -> None:
    """Shift, stretch and turn the grid of a NIfTI file about its origin."""
    image = nibabel.load(path)
    turn = np.array([[np.cos(angle), -np.sin(angle), 0], [np.sin(angle), np.cos(angle), 0], [0, 0, 1]])
    affine = image.affine.copy()
    affine[:3, :3] = scale * turn @ affine[:3, :3]
    affine[:3, 3] += shift
    nibabel.save(nibabel.Nifti1Image(np.asarray(image.dataobj).copy(), affine), path)


def with_voxel(value: float, kind: type) -> Callable[[np.ndarray], np.ndarray]:
    """Another value in one voxel."""

    def change(array: np.ndarray) -> np.ndarray:
        array = array.astype(kind)
        array[3, 4, 5] = value
        return array

    return change


def pair(array: np.ndarray) -> np.ndarray:
    return np.stack([array, array + 1], axis=-1)


def hounsfield(array: np.ndarray) -> np.ndarray:
    return (array.astype(np.float64) / array.max() * 2000 - 1024).astype(np.int16)


def edit(root: Path, **changes: object) -> None:
    table = root / "dataset.json"
    table.write_text(json.dumps(json.loads(table.read_text()) | changes))


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def twice(root: Path) -> None:
    table = json.loads((root / "dataset.json").read_text())
    edit(root, training=[*table["training"], table["training"][0]], numTraining=6)


@dataclass(frozen=True)
class Bad:
    """A kind of problem, how to make it, the file to blame, and words that the line must hold."""

    kind: str
    make: Callable[[Path], object]
    file: str
    says: tuple[str, ...]
    channels: int = 1


ERRORS = {
    "missing channel": Bad("missing_image", lambda r: (r / T2).unlink(), T2, ("no file for T2",), 2),
    "missing image": Bad("missing_image", lambda r: (r / IMAGE).unlink(), IMAGE, ("Add the file",)),
    "extra channel": Bad(
        "extra_channel",
        lambda r: shutil.copy(r / T1, r / "imagesTr/hippocampus_001_0002.nii.gz"),
        "imagesTr/hippocampus_001_0002.nii.gz",
        ("channel 2", "expected 2 channels (T1, T2)"),
        2,
    ),
    "missing label": Bad("missing_label", lambda r: (r / LABEL).unlink(), LABEL, ("no label map for case",)),
    "no image at all": Bad("unreadable", lambda r: (r / IMAGE).write_text("404 not found"), IMAGE, ("Copy or export",)),
    "empty file": Bad("unreadable", lambda r: (r / IMAGE).write_bytes(b""), IMAGE, ("empty",)),
    "truncated image": Bad("unreadable", lambda r: cut(r / IMAGE), IMAGE, ("truncated",)),
    "truncated label": Bad("unreadable", lambda r: cut(r / LABEL), LABEL, ("truncated",)),
    "dimensions": Bad("dimensions", lambda r: rewrite(r / LABEL, pair), LABEL, ("fourth dimension",)),
    "channels in a file": Bad("channels", lambda r: rewrite(r / IMAGE, pair), IMAGE, ("2 channels, expected 1 (MRI)",)),
    "shape": Bad("shape", lambda r: rewrite(r / LABEL, lambda a: a[:-1]), LABEL, ("(35, 51, 34)", "(35, 51, 35)")),
    "spacing": Bad("spacing", lambda r: move(r / LABEL, scale=1.01), LABEL, ("1.01",)),
    "channels on two grids": Bad(
        "grid", lambda r: rewrite(r / T2, lambda a: a[:, 1:]), T2, ("hippocampus_001_0000.nii.gz", "one grid"), 2
    ),
    "NaN": Bad("nan", lambda r: rewrite(r / IMAGE, with_voxel(np.nan, np.float32)), IMAGE, ("1 voxel", "MRI")),
    "infinity": Bad("nan", lambda r: rewrite(r / IMAGE, with_voxel(np.inf, np.float32)), IMAGE, ("1 voxel", "MRI")),
    "unknown label value": Bad(
        "label_value", lambda r: rewrite(r / LABEL, with_voxel(7, np.uint8)), LABEL, ("value 7", "one of 0, 1, 2")
    ),
    "fractional label": Bad(
        "label_fraction", lambda r: rewrite(r / LABEL, with_voxel(0.5, np.float32)), LABEL, ("0.5", "nearest neighbour")
    ),
    "no foreground": Bad(
        "no_foreground",
        lambda r: rewrite_all(r / "labelsTr", np.zeros_like),
        "dataset.json",
        ("background",),
    ),
    "one id twice": Bad("duplicate_id", twice, IMAGE, ("2 cases have the id hippocampus_001",)),
}

WARNINGS = {
    "label map without an image": Bad(
        "extra_label",
        lambda r: shutil.copy(r / LABEL, r / "labelsTr/other.nii.gz"),
        "labelsTr/other.nii.gz",
        ("without an image",),
    ),
    "fewer cases than counted": Bad(
        "n_cases", lambda r: edit(r, numTraining=10), "dataset.json", ("numTraining is 10", "there are 5 cases")
    ),
    "origin": Bad("origin", lambda r: move(r / LABEL, shift=0.01), LABEL, ("header", "--accept-geometry")),
    "direction": Bad("direction", lambda r: move(r / LABEL, angle=0.01), LABEL, ("header", "--accept-geometry")),
    "label without any voxel": Bad(
        "label_absent",
        lambda r: edit(r, labels={"0": "background", "1": "Anterior", "2": "Posterior", "3": "Tail"}),
        "dataset.json",
        ("Tail (3)",),
    ),
    "constant image": Bad("constant", lambda r: rewrite(r / IMAGE, np.ones_like), IMAGE, ("every voxel", "is 1")),
    "duplicate case": Bad(
        "duplicate_case",
        lambda r: [shutil.copy(r / path, r / path.replace("001", "008")) for path in (IMAGE, LABEL)],
        "imagesTr/hippocampus_008.nii.gz",
        ("same image as case hippocampus_001",),
    ),
    "not CT": Bad("not_ct", lambda r: edit(r, modality={"0": "CT"}), "dataset.json", ("Hounsfield", "another name")),
    "looks like CT": Bad(
        "looks_like_ct",
        lambda r: rewrite_all(r / "imagesTr", hounsfield),
        "dataset.json",
        ("Hounsfield", "name the channel CT"),
    ),
}


def contents(folder: Path) -> dict[str, tuple[int, bytes]]:
    """Every file below a folder with its time and bytes."""
    files = (path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): (path.stat().st_mtime_ns, path.read_bytes()) for path in files}


def broken(bad: Bad, copy_dataset: Copy, copy_nnunet: Copy) -> Path:
    root = copy_nnunet(5, ("T1", "T2")) if bad.channels == 2 else copy_dataset(5)
    if bad.channels == 2:  # two channels of one image would be a duplicate of nothing, but equal to each other
        for path in (root / "imagesTr").glob("*_0001.nii.gz"):
            rewrite(path, lambda a: a.max() - a)
    bad.make(root)
    return root


@pytest.mark.parametrize("name", ERRORS)
def test_error(nnlite: Run, command: Run, copy_dataset: Copy, copy_nnunet: Copy, tmp_path: Path, name: str) -> None:
    bad = ERRORS[name]
    broken(bad, copy_dataset, copy_nnunet)
    before = contents(tmp_path)
    code, out, err = nnlite("check", "broken", cwd=tmp_path)
    assert (code, err) == (2, "")
    head, *lines = out.splitlines()
    assert head.startswith("broken: ") and ", 1 error, " in head
    line = next(line for line in lines if line.startswith("error: "))
    assert line.startswith(f"error: {bad.file}: ") and line.endswith(f". [{bad.kind}]"), line
    assert all(word in line for word in bad.says), line
    assert contents(tmp_path) == before, "a check changes nothing"

    code, out, err = command("plan", "broken", cwd=tmp_path)
    assert (code, out) == (2, "")
    assert line in err.splitlines(), "plan reports what check reports"
    assert err.splitlines()[-1].startswith("error: ") and "1 error must be corrected before planning" in err
    assert contents(tmp_path) == before and not (tmp_path / "nnlite_workspace").exists()


@pytest.mark.parametrize("name", WARNINGS)
def test_warning(nnlite: Run, copy_dataset: Copy, copy_nnunet: Copy, tmp_path: Path, name: str) -> None:
    """Worth knowing, but no reason not to go on: exit code 0."""
    bad = WARNINGS[name]
    broken(bad, copy_dataset, copy_nnunet)
    before = contents(tmp_path)
    code, out, err = nnlite("check", "broken", cwd=tmp_path)
    assert (code, err) == (0, "")
    head, line = out.splitlines()
    assert head == "broken: 5 cases, 0 errors, 1 warning"
    assert line.startswith(f"warning: {bad.file}: ") and line.endswith(f". [{bad.kind}]"), line
    assert all(word in line for word in bad.says), line
    assert contents(tmp_path) == before


def test_fewer_cases_than_folds(nnlite: Run, copy_dataset: Copy, tmp_path: Path) -> None:
    """A warning for `check` and `plan`; `train` refuses the fold, and says which training is possible."""
    copy_dataset(3)
    code, out, _ = nnlite("check", "broken", cwd=tmp_path)
    assert code == 0 and "3 cases, expected at least 5" in out and "[few_cases]" in out
    assert nnlite("plan", "broken", cwd=tmp_path)[0] == 0
    before = contents(tmp_path)
    code, out, err = nnlite("train", "3d_fullres", 0, cwd=tmp_path)
    assert (code, out) == (2, "")
    assert "error: 3 cases cannot be split into 5 folds. Train on every case: " in err
    assert contents(tmp_path) == before


def test_every_problem_is_in_one_report(nnlite: Run, copy_dataset: Copy, tmp_path: Path) -> None:
    root = copy_dataset(5)
    (root / IMAGE).unlink()
    cut(root / LABEL.replace("001", "008"))
    rewrite(root / LABEL.replace("001", "038"), with_voxel(7, np.uint8))
    code, out, err = nnlite("check", "broken", "--json", cwd=tmp_path)
    report = json.loads(out)
    assert (code, err, report["ok"]) == (2, "", False)
    assert {p["kind"] for p in report["problems"]} == {"missing_image", "unreadable", "label_value"}
    assert all(p["severity"] == "error" and p["file"] and p["found"] and p["fix"] for p in report["problems"])


def test_invalid_json_with_line_and_column(nnlite: Run, copy_dataset: Copy, tmp_path: Path) -> None:
    root = copy_dataset(5)
    (root / "dataset.json").write_text('{\n "labels": {"background": 0,}\n}')
    before = contents(tmp_path)
    code, out, err = nnlite("check", "broken", cwd=tmp_path)
    assert code == 2 and "dataset.json: invalid JSON at line 2, column 29" in out + err
    code, out, err = nnlite("check", "broken", "--json", cwd=tmp_path)
    assert (code, err) == (2, "")
    assert [p["kind"] for p in json.loads(out)["problems"]] == ["invalid_json"]
    code, out, err = nnlite("plan", "broken", cwd=tmp_path)
    assert (code, out) == (2, "") and "dataset.json: invalid JSON at line 2, column 29" in err
    assert len(err.splitlines()) == 1 and contents(tmp_path) == before


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"labels": {"background": 0, "a": "one"}}, "labels"),
        ({"labels": None}, "has no labels"),
        ({"modality": {}}, "has no channel_names"),
        ({"modality": {"1": "MRI"}}, "Number the channels"),
        ({"training": [{"label": "x"}]}, "training[0]"),
    ],
)
def test_what_dataset_json_must_say(
    command: Run, copy_dataset: Copy, tmp_path: Path, changes: dict[str, object], says: str
) -> None:
    edit(copy_dataset(5), **changes)
    before = contents(tmp_path)
    for name in ("check", "plan"):
        code, out, err = command(name, "broken", cwd=tmp_path)
        assert code == 2 and "dataset.json: " in out + err and says in out + err, out + err
    assert len(err.splitlines()) == 1 and contents(tmp_path) == before


def test_places_that_are_not_what_they_should_be(command: Run, copy_dataset: Copy, tmp_path: Path) -> None:
    """A data set that is no folder, a workspace that is a file or lies below one, an input that is not there."""
    root = copy_dataset(5)
    (tmp_path / "file").write_text("x")
    before = contents(tmp_path)
    table = root / "dataset.json"
    for arguments, says in (
        (["plan", "broke"], "there is no dataset 'broke'"),
        (["plan", "some/where"], "there is no dataset 'some/where'"),
        (["plan", table], f"{table}: is a file; a dataset is a folder"),
        (["plan", tmp_path / "broken" / "imagesTr"], "imagesTr: is no dataset"),
        (["plan", "broken", "-w", "file"], "file"),
        (["plan", "broken", "-w", "file/below"], "file"),
        (["plan", "broken", "--output", "file/below"], "file"),
        (["evaluate", "broken/labelsTr", "nowhere"], "nowhere: there is no such file or folder"),
        (["evaluate", table, "broken/labelsTr"], "dataset.json"),
    ):
        code, out, err = command(*arguments, cwd=tmp_path)
        assert (code, out) == (2, ""), (arguments, out, err)
        assert err.splitlines()[-1].startswith("error: ") and says in err.splitlines()[-1], (arguments, err)
        left = contents(tmp_path)
        shutil.rmtree(tmp_path / "nnlite_workspace", ignore_errors=True)
        assert {k: v for k, v in left.items() if not k.startswith("nnlite_workspace/")} == before
