"""Each kind of problem in a dataset: the line of `check`, its exit code, and that `plan` refuses errors with it.

More bad inputs through the same commands: test_bad_files.py, test_bad_layouts.py.
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
from bad_inputs import contents, edit, setting
from PIL import Image as Pillow
from samples import Command, Copy, described, move_nifti, rewrite_nifti

from nnunet_lite.commands.plan import check
from nnunet_lite.data.check import broken_dataset, check_dataset
from nnunet_lite.data.dataset import read_case, read_dataset, stored_dataset
from nnunet_lite.data.geometry import ACCEPTABLE
from nnunet_lite.data.problems import ACCEPTED_KINDS, KINDS, Problem, Report, by_severity, read_problems
from nnunet_lite.errors import UserError
from nnunet_lite.training.splits import Split, read_splits

Make = Callable[[Path], object]
IMAGE, LABEL = "imagesTr/hippocampus_001.nii.gz", "labelsTr/hippocampus_001.nii.gz"
T1, T2 = "imagesTr/hippocampus_001_0000.nii.gz", "imagesTr/hippocampus_001_0001.nii.gz"


def report_of(root: Path) -> Report:
    return check_dataset(read_dataset(root), workers=2)


def voxel(value: float, kind: type) -> Callable[[np.ndarray], np.ndarray]:
    """Another value in one voxel."""

    def change(array: np.ndarray) -> np.ndarray:
        array = array.astype(kind)
        array[3, 4, 5] = value
        return array

    return change


def cut(root: Path) -> None:
    (root / IMAGE).write_bytes((root / IMAGE).read_bytes()[:5000])


def copy(*pairs: tuple[str, str]) -> Make:
    return lambda root: [shutil.copy(root / source, root / target) for source, target in pairs]


def flat(root: Path) -> None:
    for path in (IMAGE, LABEL):
        rewrite_nifti(root / path, lambda a: a[:, :, a.shape[2] // 2])


def shifted_qform(root: Path) -> None:
    image = nibabel.load(root / IMAGE)
    image.set_qform(image.affine + np.array([[0, 0, 0, 30], *np.zeros((3, 4))]))
    nibabel.save(image, root / IMAGE)


def without_foreground(root: Path) -> None:
    for path in (root / "labelsTr").iterdir():
        rewrite_nifti(path, np.zeros_like)


def inverted(root: Path) -> None:
    """In all cases but one: 0 is the label that was outlined first, 1 is all around."""
    for path in sorted((root / "labelsTr").iterdir())[1:]:
        rewrite_nifti(path, lambda a: np.choose(a, (1, 0, 2)).astype(np.uint8))


def ignored(root: Path, file: str) -> None:
    table(labels={"background": 0, "Anterior": 1, "Posterior": 2, "ignore": 9})(root)
    rewrite_nifti(root / file, lambda a: np.full_like(a, 9))


def without_labels(root: Path) -> None:
    for path in (root / "labelsTr").iterdir():
        ignored(root, f"labelsTr/{path.name}")
        rewrite_nifti(path, voxel(0, np.uint8))


def sheared(root: Path) -> None:
    """Slices that are 15 degrees from a right angle to the patient's axis."""
    affine = np.array([[1, 0, 0, 0], [0, 1, np.tan(np.radians(15)), 0], [0, 0, 1, 0], [0, 0, 0, 1]], float)
    for file in (IMAGE, LABEL):
        rewrite_nifti(root / file, affine=affine)


def sheared_sform(root: Path) -> None:
    """The qform, which cannot state a tilt, is used: to copy it to the sform would only hide the tilt."""
    image = nibabel.load(root / IMAGE)
    affine = image.affine.copy()
    image.set_qform(affine, 1)
    affine[1, 2] = np.tan(np.radians(15))
    image.set_sform(affine, 1)
    nibabel.save(image, root / IMAGE)


def hounsfield(root: Path) -> None:
    for path in (root / "imagesTr").iterdir():
        rewrite_nifti(path, lambda a: (a * (2000.0 / a.max()) - 1000).astype(np.int16))


def table(**values: object) -> Make:
    return lambda root: edit(root / "dataset.json", setting(**values))


def voxels(file: str, change: Callable[[np.ndarray], np.ndarray]) -> Make:
    return lambda root: rewrite_nifti(root / file, change)


def moved(**how: float) -> Make:
    return lambda root: move_nifti(root / LABEL, **how)


@dataclass(frozen=True)
class Bad:
    """How to make a kind of problem, the file to blame, and words of the line.

    The dataset is in MSD layout, or in that of nnU-Net with a number of channels.
    """

    kind: str
    make: Make
    file: str
    says: tuple[str, ...]
    channels: int = 0


OTHER, NRRD = "imagesTr/other.nii.gz", T1.replace("nii.gz", "nrrd")
TAIL = {"0": "background", "1": "Anterior", "2": "Posterior", "3": "Tail"}
PROBLEMS = [
    Bad("extra_image", copy((IMAGE, OTHER)), OTHER, ("is not in the dataset",)),
    Bad("extra_image", copy((IMAGE, OTHER), (LABEL, "labelsTr/other.nii.gz")), OTHER, ("is not in the dataset",)),
    Bad("extra_image", copy((T1, "imagesTr/a_0000.nrrd")), "imagesTr/a_0000.nrrd", ("does not end with .nii.gz",), 1),
    Bad("extra_image", copy((T1, NRRD)), NRRD, ("does not end with .nii.gz, and is left out",), 1),
    Bad("extra_label", copy((LABEL, "labelsTr/other.nii.gz")), "labelsTr/other.nii.gz",
        ("a label map without an image",)),
    Bad("unreadable", cut, IMAGE, ("is truncated: the compressed data end after", "Copy or export it again")),
    Bad("dimensions", voxels(LABEL, lambda a: np.stack([a, a + 1], axis=-1)), LABEL,
        ("is not a label map: it has a fourth dimension (2 different channels)",)),
    Bad("dimensions", flat, IMAGE, ("2 dimensions, expected 3 as most",)),
    Bad("channels", voxels(IMAGE, lambda a: np.stack([a, a + 1], axis=-1)), IMAGE, ("2 channels, expected 1 (MRI)",)),
    Bad("shape", voxels(LABEL, lambda a: a[:-1]), LABEL, ("shape (35, 51, 34)", "(35, 51, 35) as its image")),
    Bad("spacing", moved(scale=1.01), LABEL, ("1.01", "copy the image's header")),
    Bad("origin", moved(shift=0.01), LABEL, ("header", "--accept-geometry")),
    Bad("direction", moved(angle=0.01), LABEL, ("header", "--accept-geometry")),
    Bad("grid", voxels(T2, lambda a: a[:, 1:]), T2, ("as hippocampus_001_0000.nii.gz", "grid, that of its label"), 2),
    Bad("forms", shifted_qform, IMAGE, ("its qform places it up to 30 mm from where its other fields do",)),
    Bad("forms", sheared_sform, IMAGE, ("its sform, sheared as by a tilted gantry, places it", "tilt of the gantry")),
    Bad("sheared", sheared, IMAGE, ("two axes are 15.0 degrees from a right angle", "tilt of the gantry")),
    Bad("nan", voxels(IMAGE, voxel(np.nan, np.float32)), IMAGE, ("1 voxel of channel MRI NaN or infinite",)),
    Bad("nan", voxels(IMAGE, voxel(np.inf, np.float32)), IMAGE, ("1 voxel of channel MRI",)),
    Bad("label_value", voxels(LABEL, voxel(7, np.uint8)), LABEL, ("value 7 (1 voxel), expected one of 0, 1, 2",)),
    Bad("label_fraction", voxels(LABEL, voxel(0.5, np.float32)), LABEL,
        ("not whole numbers (0.5 and so on in 1 of 62475 voxels)", "nearest neighbour")),
    Bad("no_foreground", without_foreground, "dataset.json", ("no label map holds anything but background",)),
    Bad("no_foreground", without_labels, "dataset.json", ("no label map holds anything but background",)),
    Bad("not_annotated", lambda root: ignored(root, LABEL), LABEL,
        ("holds only 9, the ignore value", "nothing is learnt")),
    Bad("n_cases", table(numTraining=10), "dataset.json", ("numTraining is 10, and there are 5 cases",)),
    Bad("label_absent", table(labels=TAIL), "dataset.json", ("label Tail (3) has no voxel in any case",)),
    Bad("region_order", table(labels={"background": 0, "A": [1], "whole": [1, 2]}, regions_class_order=[1, 2]),
        "dataset.json", ("writes 2 into predictions where label maps hold 1: wrong for A", "List large regions")),
    Bad("region_order", table(labels={"background": 0, "A": [1, 2], "B": [2, 3]}, regions_class_order=[1, 3]),
        "dataset.json", ("writes 3 into predictions where label maps hold 2: wrong for A", "the overlap as a third")),
    Bad("region_order", table(labels={"background": 0, "whole": [1, 2], "P": [2]}, regions_class_order=[1, 1]),
        "dataset.json", ("writes 1 into predictions where label maps hold 2: wrong for P",)),
    Bad("label_outside", voxels(IMAGE, lambda a: a * (np.arange(a.shape[2]) < 17)), LABEL,
        ("labelled voxels (", "outside of the box in which the image is not zero", "do they show the same place?")),
    Bad("constant", voxels(IMAGE, np.ones_like), IMAGE, ("every voxel of channel MRI is 1",)),
    Bad("inverted", inverted, "dataset.json", ("label Anterior surrounds the background (0) in 4 of 5 label maps",
        "exchange the two values in the files")),
    Bad("looks_like_ct", hounsfield, "dataset.json",
        ("values from -1000 to 1000", "call the channel CT in dataset.json")),
    Bad("not_ct", table(modality={"0": "CT"}), "dataset.json", ("channel CT holds values from 0", "air is -1000")),
    Bad("duplicate_case", copy(*((path, path.replace("001", "008")) for path in (IMAGE, LABEL))),
        "imagesTr/hippocampus_008.nii.gz", ("holds the same image as case hippocampus_001",)),
]  # fmt: skip


@pytest.mark.parametrize("bad", PROBLEMS, ids=lambda bad: f"{bad.kind}-{bad.says[0]}")
def test_problem(command: Command, copy_dataset: Copy, copy_nnunet: Copy, tmp_path: Path, bad: Bad) -> None:
    """`check` has one line for it. `plan` refuses an error with the same line. Neither writes anything."""
    root = copy_nnunet(5, ("T1", "T2")[: bad.channels]) if bad.channels else copy_dataset(5)
    bad.make(root)
    before = contents(tmp_path)
    code, out, err = command("check", "broken", cwd=tmp_path)
    severity = KINDS[bad.kind]
    assert (code, err) == (2 if severity == "error" else 0, "")
    head, *lines, hint = out.splitlines()
    accept = f"; --accept KIND accepts {bad.kind}" if bad.kind in ACCEPTED_KINDS else ""
    assert hint == f"hint: --exclude CASE leaves out a case{accept}"
    (found,) = (line for line in lines if not line.startswith("notice: "))
    assert head.startswith("broken: ") and (", 1 error, " if severity == "error" else ", 0 errors, 1 warning") in head
    assert found.startswith(f"{severity}: {bad.file}: ") and found.endswith(f". [{bad.kind}]"), out
    assert all(word in found for word in bad.says), found
    assert report_of(root).can_be_planned == (severity != "error" and bad.kind not in ACCEPTABLE)
    if severity == "error":
        code, out, err = command("plan", "broken", cwd=tmp_path)
        assert (code, out) == (2, "") and found in err.splitlines(), "plan reports what check reports"
        assert err.splitlines()[-1].startswith("error: ") and "1 error must be corrected before planning" in err
        assert not (tmp_path / "nnlite_workspace").exists()
    code, out, err = command("check", "broken", "--accept", bad.kind, cwd=tmp_path)
    if bad.kind in ACCEPTED_KINDS:
        assert (code, err) == (0, "") and ", 0 errors, 0 warnings" in out and f"notice: {bad.file}: " in out
    else:
        assert (code, out) == (2, "") and f"error: --accept {bad.kind}: such cases cannot be trained on" in err
    assert contents(tmp_path) == before, "a check changes nothing"


def test_ignored_voxels_may_be_outside_of_the_image(copy_dataset: Copy) -> None:
    """In sparse annotations they are everywhere; labels outside are reported."""
    root = copy_dataset(5)
    voxels(IMAGE, lambda a: a * (np.arange(a.shape[2]) < 17))(root)
    assert [problem.kind for problem in report_of(root).problems] == ["label_outside"]
    table(labels={"0": "background", "1": "Anterior", "2": "Posterior", "3": "ignore"})(root)
    voxels(LABEL, lambda a: np.where(np.arange(a.shape[2]) < 17, a, 3))(root)
    assert report_of(root).problems == ()


def test_valid_data_has_no_problem(hippocampus: Path, copy_dataset: Copy) -> None:
    """Also with an origin that differs within the tolerance."""
    report = report_of(hippocampus)
    assert report.problems == ()
    assert report.to_text() == "Task04_Hippocampus: 32 cases, 0 errors, 0 warnings"
    root = copy_dataset()
    move_nifti(root / LABEL, shift=0.0005)
    assert report_of(root).problems == ()


def test_fewer_cases_than_folds(command: Command, copy_dataset: Copy, tmp_path: Path) -> None:
    """A warning for `check` and `plan`; `train` refuses the fold, and says which training is possible."""
    copy_dataset(3)
    code, out, _ = command("check", "broken", cwd=tmp_path)
    assert code == 0 and "3 cases, expected at least 5" in out and "[few_cases]" in out
    assert command("plan", "broken", cwd=tmp_path)[0] == 0
    before = contents(tmp_path)
    code, out, err = command("train", "3d_fullres", 0, cwd=tmp_path)
    assert (code, out) == (2, "")
    assert "error: 3 cases cannot be split into 5 folds. Train on every case: " in err
    assert contents(tmp_path) == before


def test_every_problem_is_in_one_report(command: Command, copy_dataset: Copy, tmp_path: Path) -> None:
    """Files with the same problem share a line, many problems of a kind are cut short; JSON has an entry for each."""
    root = copy_dataset(20)
    images, labels = sorted((root / "imagesTr").iterdir()), sorted((root / "labelsTr").iterdir())
    images[0].unlink()
    images[1].write_bytes(b"")
    labels[2].unlink()
    for path in labels[3:10]:
        rewrite_nifti(path, voxel(7, np.uint8))
    for n, path in enumerate(labels[10:16]):
        rewrite_nifti(path, voxel(8 + n, np.uint8))
    code, out, err = command("check", "broken", cwd=tmp_path)
    text = out.splitlines()
    assert (code, err, len(text)) == (2, "", 9) and text[0] == "broken: 20 cases, 16 errors, 0 warnings"
    line = next(line for line in text if "label value 7" in line)
    assert line.startswith(f"error: labelsTr/{labels[3].name}, labelsTr/{labels[4].name}, ") and "and 4 more" in line
    assert text[-1] == "hint: --exclude CASE leaves out a case"
    assert text[-2] == "... and 4 more problems of the kind label_value; --json shows all"
    code, out, err = command("check", "broken", "--json", cwd=tmp_path)
    report = json.loads(out)
    assert (code, err, report["ok"], len(report["problems"])) == (2, "", False, 16)
    assert {p["kind"] for p in report["problems"]} == {"missing_image", "unreadable", "missing_label", "label_value"}
    assert all(p["severity"] == "error" and p["file"] and p["found"] and p["fix"] for p in report["problems"])
    assert set(report["problems"][0]) == {"severity", "kind", "file", "found", "expected", "fix", "accepted"}


def test_excluded_cases(command: Command, copy_dataset: Copy, tmp_path: Path) -> None:
    """A case that cannot be read is left out of the plan, the folds and later calls, until "" includes it."""
    root = copy_dataset(7)
    first, *others = [case.id for case in read_dataset(root).cases]
    workspace = tmp_path / "nnlite_workspace" / "broken"
    text = (root / LABEL).read_bytes()
    (root / "splits_final.json").write_text(json.dumps([{"train": [first, *others[:-1]], "val": others[-1:]}]))
    assert command("plan", "broken", cwd=tmp_path)[0] == 0
    (root / LABEL).write_bytes(b"")
    code, _, err = command("plan", "broken", cwd=tmp_path)
    assert code == 2 and "hint: --exclude CASE leaves out a case" in err
    for words in (("--exclude", "hippocampus_001"), ()):
        code, _, err = command("plan", "broken", *words, cwd=tmp_path)
        assert code == 0 and "broken: 6 cases (1 left out), 0 errors, 0 warnings" in err, err
        dataset = stored_dataset(workspace / "dataset.json")
        assert [case.id for case in dataset.excluded] == [first] and [case.id for case in dataset.cases] == others
    assert json.loads((workspace / "splits.json").read_text()) == [{"train": [first, *others[:-1]], "val": others[-1:]}]
    assert read_splits(workspace / "splits.json", dataset) == [Split("0", tuple(others[:-1]), tuple(others[-1:]))]
    code, _, err = command("plan", "broken", "--exclude", others[-1], cwd=tmp_path)
    assert code == 2 and f"error: --exclude leaves fold 0 no case to hold out: case {others[-1]}. Exclude fewer" in err
    assert command("preprocess", "3d_fullres", cwd=tmp_path)[0] == 0
    (root / LABEL).write_bytes(text)
    code, _, err = command("plan", "broken", "--exclude", "", cwd=tmp_path)
    assert code == 0 and "broken: 7 cases, 0 errors" in err and not stored_dataset(workspace / "dataset.json").excluded
    assert first in read_splits(workspace / "splits.json", stored_dataset(workspace / "dataset.json"))[0].training
    assert command("plan", "broken", "--exclude", first, cwd=tmp_path)[0] == 0
    for file in (root / LABEL, root / IMAGE):
        file.unlink()
    assert command("plan", "broken", cwd=tmp_path)[0] == 0
    read_splits(workspace / "splits.json", stored_dataset(workspace / "dataset.json"))  # it may be deleted then


def test_a_case_with_a_comma_is_excluded(copy_dataset: Copy) -> None:
    root = copy_dataset(5)
    ids = [case.id for case in read_dataset(root).cases]
    for file in root.rglob(f"{ids[0]}*"):
        file.rename(file.with_name(file.name.replace(ids[0], "a,b")))
    settings = json.loads((root / "dataset.json").read_text())
    (root / "dataset.json").write_text(json.dumps(settings).replace(ids[0], "a,b"))
    for exclude in (["a,b", ids[1]], f"{ids[1]},{ids[2]}", [f"{ids[1]},{ids[2]}"]):
        assert len(check(root, exclude=exclude).excluded) == 2
    assert check(root, exclude="a,b").excluded == ("a,b",)


def test_cases_and_kinds_that_do_not_exist(command: Command, copy_dataset: Copy, tmp_path: Path) -> None:
    """One line with the nearest name; nothing is written."""
    root = copy_dataset(5)
    cases = ",".join(case.id for case in read_dataset(root).cases)
    for words, says in (
        (("--exclude", "hippocampus_001.nii.gz"), "_001.nii.gz' is no case. Did you mean 'hippocampus_001'?"),
        (("--exclude", "x"), "--exclude 'x' is no case. There are: hippocampus_001, hippocampus_008, "),
        (("--exclude", cases), "--exclude leaves out every case"),
        (("--accept", "orign"), "--accept 'orign' is no kind of problem. Did you mean 'origin'?"),
        (("--accept", "?"), "--accept '?' is no kind of problem. There are: extra_image, "),
    ):  # fmt: skip
        for name in ("check", "plan"):
            code, out, err = command(name, "broken", *words, cwd=tmp_path)
            assert (code, out, err.count("\n")) == (2, "", 1) and says in err, err
    assert not (tmp_path / "nnlite_workspace").exists()


def test_threads_or_none_give_the_same_report(copy_dataset: Copy) -> None:
    root = copy_dataset(6)
    (root / IMAGE).unlink()
    dataset = read_dataset(root)
    assert check_dataset(dataset, workers=0) == check_dataset(dataset, workers=3)


# --------------------------------------------------------------------------------------------------------- dataset.json


INVALID: list[tuple[dict[str, object] | None, str]] = [  # what is set in dataset.json; None: text that is no JSON
    (None, "invalid JSON at line 2, column 29"),
    ({"labels": {"background": 0, "a": "one"}}, "are not names with integers"),
    ({"labels": None}, "has no labels"),
    ({"modality": {}}, "has no channel_names"),
    ({"modality": {"1": "MRI"}}, "Number the channels"),
    ({"labels": {"background": 0}}, "labels: there is no foreground label"),
    ({"labels": {"background": 0, "a": 1.5}}, "are not names with integers"),
    ({"training": [{"label": "x"}]}, "training[0] is not"),
    ({"training": [{"image": "x", "label": ["x"]}]}, "'label': ['x']}"),
    ({"file_ending": [".nii.gz"]}, "file_ending is ['.nii.gz']"),
    ({"dataset": {"mine": {"label": "x"}}}, "dataset.mine is not"),
    ({"dataset": {"a": {"images": [1]}}}, 'dataset.a is not {"images": [file, ...], "label": file}'),
    ({"dataset": {"a/b": {"images": ["x"]}}}, "the id 'a/b' holds a /"),
]


@pytest.mark.parametrize(("changes", "says"), INVALID)
def test_what_dataset_json_must_contain(
    command: Command, copy_dataset: Copy, tmp_path: Path, changes: dict[str, object] | None, says: str
) -> None:
    root = copy_dataset(5)
    if changes is None:
        (root / "dataset.json").write_text('{\n "labels": {"background": 0 "a": 1}\n}')
    else:
        table(**changes)(root)
    before = contents(tmp_path)
    for name in ("check", "plan"):
        code, out, err = command(name, "broken", cwd=tmp_path)
        assert code == 2 and "dataset.json: " in out + err and says in out + err, out + err
    assert len(err.splitlines()) == 1 and contents(tmp_path) == before
    with pytest.raises(UserError) as caught:
        read_dataset(root)
    (problem,) = broken_dataset(root, caught.value).problems
    assert problem.kind == ("invalid_dataset" if changes else "invalid_json")


def test_wrong_paths(command: Command, copy_dataset: Copy, tmp_path: Path) -> None:
    """A dataset that is no folder, a workspace that is a file or inside one, an input that does not exist."""
    root = copy_dataset(5)
    (tmp_path / "file").write_text("x")
    before = contents(tmp_path)
    file = root / "dataset.json"
    for arguments, says in (
        (["plan", "broke"], "there is no dataset 'broke'"),
        (["plan", "some/where"], "there is no dataset 'some/where'"),
        (["plan", file], f"{file}: is a file; a dataset is a folder"),
        (["plan", tmp_path / "broken" / "imagesTr"], "imagesTr: is no dataset"),
        (["plan", "broken", "-w", "file"], "file"),
        (["plan", "broken", "-w", "file/below"], "file"),
        (["plan", "broken", "--output", "file/below"], "file"),
        (["evaluate", "broken/labelsTr", "nowhere"], "nowhere: there is no such file or folder"),
        (["evaluate", "broken", "broken", "--tolerance", "2", "--no-surface"], "--no-surface leaves out"),
        (["evaluate", file, "broken/labelsTr"], "dataset.json"),
    ):
        code, out, err = command(*arguments, cwd=tmp_path)
        assert (code, out) == (2, ""), (arguments, out, err)
        assert err.splitlines()[-1].startswith("error: ") and says in err.splitlines()[-1], (arguments, err)
        left = contents(tmp_path)
        shutil.rmtree(tmp_path / "nnlite_workspace", ignore_errors=True)
        assert {k: v for k, v in left.items() if not k.startswith("nnlite_workspace/")} == before


def test_endings_in_upper_case_find_their_label_maps(copy_nnunet: Copy) -> None:
    root = copy_nnunet(5, ("T1", "T2"))
    for path in [*(root / "imagesTr").iterdir(), *(root / "labelsTr").iterdir()]:
        path.rename(path.with_name(path.name.removesuffix(".nii.gz") + ".Nii.GZ"))
    assert report_of(root).problems == ()
    sorted((root / "imagesTr").iterdir())[0].unlink()
    (problem,) = report_of(root).problems
    assert (problem.kind, problem.file) == ("missing_image", "imagesTr/hippocampus_001_0000.Nii.GZ")


# ------------------------------------------------------------------------------------------------------------- pictures


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    """Six grey pictures with label maps of 0 and 1 in the plain layout."""
    rng = np.random.default_rng(0)
    label = np.zeros((40, 48), np.uint8)
    label[5:20, 8:30] = 1
    for folder in ("images", "labels"):
        (tmp_path / "data" / folder).mkdir(parents=True)
    for i in range(6):
        save(tmp_path / "data" / "images" / f"c{i}.png", rng.integers(0, 255, (40, 48)))
        save(tmp_path / "data" / "labels" / f"c{i}.png", label)
    return tmp_path / "data"


def save(path: Path, array: np.ndarray) -> None:
    Pillow.fromarray(array.astype(np.uint8)).save(path)


def test_each_bad_picture_is_named_and_stops_no_report(pictures: Path) -> None:
    """In the plain layout, where channels and labels follow from the files."""
    images, labels = pictures / "images", pictures / "labels"
    (images / "c0.png").write_bytes((images / "c0.png").read_bytes()[:500])
    save(images / "c3.png", np.full((40, 48), 7))
    (labels / "c2.png").write_bytes(b"no picture")
    save(labels / "c1.png", np.random.default_rng(0).integers(0, 256, (40, 48, 3)))
    (labels / "c4.png").unlink()
    save(labels / "c4.jpg", np.eye(40, 48) * 255)
    (labels / "c5.png").rename(labels / "c5.gif")
    found = {p.file: (p.kind, p.found) for p in report_of(pictures).problems if p.severity != "notice"}
    assert found.pop("labels/c2.png")[0] == "unreadable"
    assert found == {
        "images/c0.png": ("unreadable", "is truncated: it ends after 500 bytes"),
        "images/c3.png": ("constant", "every voxel of channel channel_0 is 7"),
        "labels/c1.png": ("label_channels", "is a colour picture (3 different channels)"),
        "labels/c4.jpg": ("label_lossy", "a label map as JPEG, which changes values"),
        "labels/c5.png": ("missing_label", "no label map for case c5, but 1 .gif file"),
    }


@pytest.mark.parametrize("folder", ["images", "labels"])
def test_a_folder_of_unreadable_files_names_each(pictures: Path, folder: str) -> None:
    for path in (pictures / folder).iterdir():
        path.write_bytes(b"")
    found = [(p.kind, p.file) for p in report_of(pictures).problems if p.severity != "notice"]
    assert found == [("unreadable", f"{folder}/c{i}.png") for i in range(6)]


@pytest.mark.parametrize(("channels", "note"), [(3, "alpha channel dropped although it varies"), (4, "")])
def test_alpha_as_declared(pictures: Path, channels: int, note: str) -> None:
    rng = np.random.default_rng(0)
    for path in (pictures / "images").iterdir():
        save(path, rng.integers(0, 255, (40, 48, 4)))
    (pictures / "dataset.json").write_text(json.dumps(described(*"RGBA"[:channels], file_ending=".png")))
    report = report_of(pictures)
    assert report.ok, report.to_text()
    assert ({p.found for p in report.problems} >= {note}) == bool(note)
    dataset = read_dataset(pictures)
    assert read_case(dataset.cases[0], dataset)[0].array.shape == (channels, 1, 40, 48)


def test_problems_are_read_back_as_they_were_written(tmp_path: Path) -> None:
    problems = (
        Problem("constant", "b.nii.gz", "has one value"),
        Problem("nan", "a.nii.gz", "has 3 NaN", "numbers", "Write 0."),
        Problem("nan", "c.nii.gz", "has 3 NaN", "numbers", "Write 0.", accepted=True),
    )
    file = tmp_path / "check.json"
    file.write_text(json.dumps(Report("D", 3, ("CT",), problems).to_json()))
    assert read_problems(file) == problems
    assert [(p.severity, files) for p, files in by_severity(problems)] == [
        ("error", ["a.nii.gz"]), ("warning", ["b.nii.gz"]), ("notice", ["c.nii.gz"]),
    ]  # fmt: skip
    file.write_text('{"problems": [{"found": "x"}]}')
    with pytest.raises(UserError, match="is not as nnlite writes it"):
        read_problems(file)
