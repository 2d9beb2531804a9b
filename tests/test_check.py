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
from bad_inputs import Command, contents, edit, setting
from PIL import Image as Pillow
from samples import move_nifti, rewrite_nifti

from nnunet_lite.data.check import broken_dataset, check_dataset
from nnunet_lite.data.dataset import read_case, read_dataset
from nnunet_lite.data.problems import KINDS, TO_ACCEPT, Problem, Report
from nnunet_lite.errors import UserError

Copy = Callable[..., Path]
IMAGE, LABEL = "imagesTr/hippocampus_001.nii.gz", "labelsTr/hippocampus_001.nii.gz"
T1, T2 = "imagesTr/hippocampus_001_0000.nii.gz", "imagesTr/hippocampus_001_0001.nii.gz"
EXTRA = "imagesTr/hippocampus_001_0002.nii.gz"


def report_of(root: Path) -> Report:
    return check_dataset(read_dataset(root), workers=2)


def voxel(value: float, kind: type) -> Callable[[np.ndarray], np.ndarray]:
    """Another value in one voxel."""

    def change(array: np.ndarray) -> np.ndarray:
        array = array.astype(kind)
        array[3, 4, 5] = value
        return array

    return change


def pair(array: np.ndarray) -> np.ndarray:
    return np.stack([array, array + 1], axis=-1)


def rewrite_all(folder: Path, change: Callable[[np.ndarray], np.ndarray]) -> None:
    for path in folder.iterdir():
        rewrite_nifti(path, change)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def copy(root: Path, source: str, target: str) -> None:
    shutil.copy(root / source, root / target)


def duplicate(root: Path) -> None:
    for path in (IMAGE, LABEL):
        copy(root, path, path.replace("001", "008"))


def flat(root: Path) -> None:
    for path in (IMAGE, LABEL):
        rewrite_nifti(root / path, lambda a: a[:, :, a.shape[2] // 2])


def shifted_qform(path: Path) -> None:
    image = nibabel.load(path)
    image.set_qform(image.affine + np.array([[0, 0, 0, 30], *np.zeros((3, 4))]))
    nibabel.save(image, path)


def table(**values: object) -> Callable[[Path], None]:
    return lambda root: edit(root / "dataset.json", setting(**values))


def voxels(file: str, change: Callable[[np.ndarray], np.ndarray]) -> Callable[[Path], None]:
    return lambda root: rewrite_nifti(root / file, change)


@dataclass(frozen=True)
class Bad:
    """A kind of problem, how to make it, the file to blame, and words of the line.

    The dataset is in MSD layout, or in that of nnU-Net with a number of channels.
    """

    kind: str
    make: Callable[[Path], object]
    file: str
    says: tuple[str, ...]
    channels: int = 0


TAIL = {"0": "background", "1": "Anterior", "2": "Posterior", "3": "Tail"}
PROBLEMS = {
    "missing channel": Bad("missing_image", lambda r: (r / T2).unlink(), T2,
                           ("no file for T2 of case hippocampus_001",), 2),
    "missing image": Bad("missing_image", lambda r: (r / IMAGE).unlink(), IMAGE,
                         ("no file for image of case hippocampus_001", "Add the file")),
    "extra channel": Bad("extra_channel", lambda r: copy(r, T1, EXTRA), EXTRA,
                         ("channel 2", "expected 2 channels (T1, T2)"), 2),
    "extra image": Bad("extra_image", lambda r: copy(r, IMAGE, "imagesTr/other.nii.gz"), "imagesTr/other.nii.gz",
                       ("is not in the dataset",)),
    "extra image and label": Bad(
        "extra_image", lambda r: [copy(r, p, p.replace("hippocampus_001", "other")) for p in (IMAGE, LABEL)],
        "imagesTr/other.nii.gz", ("is not in the dataset",)),
    "extra image of another format": Bad("extra_image", lambda r: copy(r, T1, "imagesTr/other_0000.nrrd"),
                                         "imagesTr/other_0000.nrrd", ("does not end with .nii.gz",), 1),
    "case of another format": Bad("extra_image", lambda r: copy(r, T1, T1.replace("nii.gz", "nrrd")),
                                  T1.replace("nii.gz", "nrrd"), ("does not end with .nii.gz, and is left out",), 1),
    "missing label": Bad("missing_label", lambda r: (r / LABEL).unlink(), LABEL,
                         ("no label map for case hippocampus_001",)),
    "no image at all": Bad("unreadable", lambda r: (r / IMAGE).write_text("404 not found"), IMAGE,
                           ("is not gzip-compressed or is damaged", "Copy or export it again")),
    "empty file": Bad("unreadable", lambda r: (r / IMAGE).write_bytes(b""), IMAGE, ("is empty (0 bytes)",)),
    "truncated image": Bad("unreadable", lambda r: cut(r / IMAGE), IMAGE,
                           ("is truncated: the compressed data end after", "Copy or export it again")),
    "truncated label": Bad("unreadable", lambda r: cut(r / LABEL), LABEL, ("truncated",)),
    "dimensions of a label map": Bad("dimensions", voxels(LABEL, pair), LABEL,
                                     ("is not a label map: it has a fourth dimension (2 different channels)",)),
    "one flat image": Bad("dimensions", flat, IMAGE, ("2 dimensions, expected 3 as most",)),
    "channels in a file": Bad("channels", voxels(IMAGE, pair), IMAGE, ("2 channels, expected 1 (MRI)",)),
    "shape": Bad("shape", voxels(LABEL, lambda a: a[:-1]), LABEL, ("shape (35, 51, 34)", "(35, 51, 35) as its image")),
    "spacing": Bad("spacing", lambda r: move_nifti(r / LABEL, scale=1.01), LABEL, ("1.01", "copy the image's header")),
    "origin": Bad("origin", lambda r: move_nifti(r / LABEL, shift=0.01), LABEL, ("header", "--accept-geometry")),
    "direction": Bad("direction", lambda r: move_nifti(r / LABEL, angle=0.01), LABEL, ("header", "--accept-geometry")),
    "channels on two grids": Bad("grid", voxels(T2, lambda a: a[:, 1:]), T2,
                                 ("as hippocampus_001_0000.nii.gz", "one grid"), 2),
    "forms": Bad("forms", lambda r: shifted_qform(r / IMAGE), IMAGE,
                 ("its qform places it up to 30 mm from where its other fields do",)),
    "NaN": Bad("nan", voxels(IMAGE, voxel(np.nan, np.float32)), IMAGE, ("1 voxel of channel MRI NaN or infinite",)),
    "infinity": Bad("nan", voxels(IMAGE, voxel(np.inf, np.float32)), IMAGE, ("1 voxel of channel MRI",)),
    "unknown label value": Bad("label_value", voxels(LABEL, voxel(7, np.uint8)), LABEL,
                               ("label value 7 (1 voxel), expected one of 0, 1, 2",)),
    "fractional label": Bad("label_fraction", voxels(LABEL, voxel(0.5, np.float32)), LABEL,
                            ("not whole numbers (0.5 and so on in 1 of 62475 voxels)", "nearest neighbour")),
    "no foreground": Bad("no_foreground", lambda r: rewrite_all(r / "labelsTr", np.zeros_like), "dataset.json",
                         ("no label map holds anything but background",)),
    "one id twice": Bad(
        "duplicate_id", lambda r: edit(r / "dataset.json", lambda t: t["training"].append(t["training"][0])),
        IMAGE, ("2 cases have the id hippocampus_001 (hippocampus_001.nii.gz)",)),
    "label map without an image": Bad("extra_label", lambda r: copy(r, LABEL, "labelsTr/other.nii.gz"),
                                      "labelsTr/other.nii.gz", ("a label map without an image",)),
    "fewer cases than counted": Bad("n_cases", table(numTraining=10), "dataset.json",
                                    ("numTraining is 10, and there are 5 cases",)),
    "label without any voxel": Bad("label_absent", table(labels=TAIL), "dataset.json",
                                   ("label Tail (3) has no voxel in any case",)),
    "constant image": Bad("constant", voxels(IMAGE, np.ones_like), IMAGE, ("every voxel of channel MRI is 1",)),
    "duplicate case": Bad("duplicate_case", duplicate, "imagesTr/hippocampus_008.nii.gz",
                          ("holds the same image as case hippocampus_001",)),
}  # fmt: skip
ALSO = {"one id twice": ("[duplicate_case]", "[n_cases]")}  # problems that follow from the first


@pytest.mark.parametrize("name", PROBLEMS)
def test_problem(command: Command, copy_dataset: Copy, copy_nnunet: Copy, tmp_path: Path, name: str) -> None:
    """`check` has one line for it. `plan` refuses an error with the same line. Neither writes anything."""
    bad = PROBLEMS[name]
    root = copy_nnunet(5, ("T1", "T2")[: bad.channels]) if bad.channels else copy_dataset(5)
    if bad.channels == 2:  # otherwise the channels of a case are equal
        for path in (root / "imagesTr").glob("*_0001.nii.gz"):
            rewrite_nifti(path, lambda a: a.max() - a)
    bad.make(root)
    before = contents(tmp_path)
    code, out, err = command("check", "broken", cwd=tmp_path)
    severity = KINDS[bad.kind]
    assert (code, err) == (2 if severity == "error" else 0, "")
    head, *lines = out.splitlines()
    found = [line for line in lines if not line.startswith("notice: ") and not line.endswith(ALSO.get(name, "?"))]
    assert head.startswith("broken: ") and (", 1 error, " if severity == "error" else ", 0 errors, 1 warning") in head
    assert len(found) == 1 and found[0].startswith(f"{severity}: {bad.file}: "), out
    assert found[0].endswith(f". [{bad.kind}]") and all(word in found[0] for word in bad.says), found
    assert contents(tmp_path) == before, "a check changes nothing"
    report = report_of(root)
    assert report.can_be_planned == (severity != "error" and bad.kind not in TO_ACCEPT)
    if severity == "error":
        code, out, err = command("plan", "broken", cwd=tmp_path)
        assert (code, out) == (2, "") and found[0] in err.splitlines(), "plan reports what check reports"
        assert err.splitlines()[-1].startswith("error: ") and "1 error must be corrected before planning" in err
        assert contents(tmp_path) == before and not (tmp_path / "nnlite_workspace").exists()


def test_valid_data_has_no_problem(hippocampus: Path, copy_dataset: Copy) -> None:
    """Also with an origin that differs within the tolerance."""
    report = report_of(hippocampus)
    assert report.problems == ()
    assert report.to_text() == "Task04_Hippocampus: 32 cases, 0 errors, 0 warnings"
    root = copy_dataset()
    move_nifti(root / LABEL, shift=0.0005)
    assert report_of(root).problems == ()


def test_fewer_cases_than_folds(nnlite: Command, copy_dataset: Copy, tmp_path: Path) -> None:
    """A warning for `check` and `plan`; `train` refuses the fold, and says which training is possible."""
    report = report_of(copy_dataset(3))
    assert [(p.kind, p.found) for p in report.problems] == [("few_cases", "3 cases")] and report.ok
    code, out, _ = nnlite("check", "broken", cwd=tmp_path)
    assert code == 0 and "3 cases, expected at least 5" in out and "[few_cases]" in out
    assert nnlite("plan", "broken", cwd=tmp_path)[0] == 0
    before = contents(tmp_path)
    code, out, err = nnlite("train", "3d_fullres", 0, cwd=tmp_path)
    assert (code, out) == (2, "")
    assert "error: 3 cases cannot be split into 5 folds. Train on every case: " in err
    assert contents(tmp_path) == before


def test_every_problem_is_in_one_report(nnlite: Command, copy_dataset: Copy, tmp_path: Path) -> None:
    """Files with the same problem share a line; JSON has an entry for each."""
    root = copy_dataset(12)
    images, labels = sorted((root / "imagesTr").iterdir()), sorted((root / "labelsTr").iterdir())
    images[0].unlink()
    images[1].write_bytes(b"")
    labels[2].unlink()
    for path in labels[3:10]:
        rewrite_nifti(path, voxel(7, np.uint8))
    code, out, err = nnlite("check", "broken", cwd=tmp_path)
    text = out.splitlines()
    assert (code, err, len(text)) == (2, "", 5) and text[0] == "broken: 12 cases, 10 errors, 0 warnings"
    line = next(line for line in text if "label value 7" in line)
    assert line.startswith(f"error: labelsTr/{labels[3].name}, labelsTr/{labels[4].name}, ") and "and 4 more" in line
    code, out, err = nnlite("check", "broken", "--json", cwd=tmp_path)
    report = json.loads(out)
    assert (code, err, report["ok"], len(report["problems"])) == (2, "", False, 10)
    assert {p["kind"] for p in report["problems"]} == {"missing_image", "unreadable", "missing_label", "label_value"}
    assert all(p["severity"] == "error" and p["file"] and p["found"] and p["fix"] for p in report["problems"])
    assert set(report["problems"][0]) == {"severity", "kind", "file", "found", "expected", "fix"}


def test_many_different_problems_of_a_kind_are_cut_short(copy_dataset: Copy) -> None:
    root = copy_dataset(8)
    for n, path in enumerate(sorted((root / "labelsTr").iterdir())):
        rewrite_nifti(path, voxel(7 + n, np.uint8))
    text = report_of(root).to_text().splitlines()
    assert len(text) == 5
    assert text[-1] == "... and 5 more problems of the kind label_value; --json shows all"


def test_threads_or_none_give_the_same_report(copy_dataset: Copy) -> None:
    root = copy_dataset(6)
    (root / IMAGE).unlink()
    dataset = read_dataset(root)
    steps = []

    def progress(items, total, what):  # type: ignore[no-untyped-def]
        for item in items:
            steps.append((total, what))
            yield item

    assert check_dataset(dataset, workers=0, progress=progress) == check_dataset(dataset, workers=3)
    assert steps == [(6, "check")] * 6


# --------------------------------------------------------------------------------------------------------- dataset.json


def test_invalid_json_with_line_and_column(nnlite: Command, copy_dataset: Copy, tmp_path: Path) -> None:
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
        ({"labels": {"background": 0, "a": "one"}}, "are not names with integers"),
        ({"labels": None}, "has no labels"),
        ({"modality": {}}, "has no channel_names"),
        ({"modality": {"1": "MRI"}}, "Number the channels"),
        ({"labels": {"background": 0}}, "labels: there is no foreground label"),
        ({"labels": {"background": 0, "a": 1.5}}, "are not names with integers"),
        ({"training": [{"label": "x"}]}, "training[0] is not"),
        ({"training": [{"image": "x", "label": ["x"]}]}, "training[0] has the label ['x']"),
        ({"file_ending": [".nii.gz"]}, "file_ending is ['.nii.gz']"),
        ({"dataset": {"mine": {"label": "x"}}}, "dataset.mine is not"),
        ({"dataset": {"a": {"images": [1]}}}, "dataset.a has something else than file names"),
        ({"dataset": {"a/b": {"images": ["x"]}}}, "the id 'a/b' holds a /"),
    ],
)
def test_what_dataset_json_must_contain(
    command: Command, copy_dataset: Copy, tmp_path: Path, changes: dict[str, object], says: str
) -> None:
    root = copy_dataset(5)
    table(**changes)(root)
    before = contents(tmp_path)
    for name in ("check", "plan"):
        code, out, err = command(name, "broken", cwd=tmp_path)
        assert code == 2 and "dataset.json: " in out + err and says in out + err, out + err
    assert len(err.splitlines()) == 1 and contents(tmp_path) == before
    with pytest.raises(UserError) as caught:
        read_dataset(root)
    assert [p.kind for p in broken_dataset(root, caught.value).problems] == ["invalid_dataset"]


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
        (["evaluate", file, "broken/labelsTr"], "dataset.json"),
    ):
        code, out, err = command(*arguments, cwd=tmp_path)
        assert (code, out) == (2, ""), (arguments, out, err)
        assert err.splitlines()[-1].startswith("error: ") and says in err.splitlines()[-1], (arguments, err)
        left = contents(tmp_path)
        shutil.rmtree(tmp_path / "nnlite_workspace", ignore_errors=True)
        assert {k: v for k, v in left.items() if not k.startswith("nnlite_workspace/")} == before


@pytest.mark.parametrize("ending", [".NII.GZ", ".Nii.gz"])
def test_endings_in_upper_case_find_their_label_maps(copy_nnunet: Copy, ending: str) -> None:
    root = copy_nnunet(5, ("T1", "T2"))
    for path in [*(root / "imagesTr").iterdir(), *(root / "labelsTr").iterdir()]:
        path.rename(path.with_name(path.name.removesuffix(".nii.gz") + ending))
    assert report_of(root).problems == ()
    sorted((root / "imagesTr").iterdir())[0].unlink()
    (problem,) = report_of(root).problems
    assert (problem.kind, problem.file) == ("missing_image", f"imagesTr/hippocampus_001_0000{ending}")


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


def problems(root: Path, severity: str) -> list[Problem]:
    return [problem for problem in report_of(root).problems if problem.severity == severity]


def test_label_maps_in_colour_and_as_jpeg(pictures: Path) -> None:
    rng = np.random.default_rng(0)
    save(pictures / "labels" / "c0.png", rng.integers(0, 256, (40, 48, 3)))
    (pictures / "labels" / "c3.png").unlink()
    save(pictures / "labels" / "c3.jpg", np.eye(40, 48) * 255)
    found = {p.file: (p.kind, p.found) for p in problems(pictures, "error")}
    assert found["labels/c0.png"] == ("label_channels", "is a colour picture (3 different channels)")
    assert found["labels/c3.jpg"] == ("label_lossy", "a label map as JPEG, which changes values")


def test_masks_of_0_and_255_are_a_notice(pictures: Path) -> None:
    rng = np.random.default_rng(0)
    for i in range(6):
        save(pictures / "images" / f"c{i}.png", rng.integers(0, 256, (16, 20, 3)))
        save(pictures / "labels" / f"c{i}.png", np.eye(16, 20) * 255)
    report = report_of(pictures)
    assert report.ok and report.count("warning") == 0
    found = {p.found for p in report.problems}
    assert "label maps hold 0 and 255: 255 is read as 1" in found and "3 channels in one file" in found


def test_unreadable_files_are_named_and_stop_no_report(pictures: Path) -> None:
    """In the plain layout, where channels and labels follow from the files."""
    (pictures / "images" / "c0.png").write_bytes((pictures / "images" / "c0.png").read_bytes()[:500])
    (pictures / "images" / "c1.png").write_bytes(b"")
    (pictures / "labels" / "c2.png").write_bytes(b"no picture")
    save(pictures / "images" / "c3.png", np.full((40, 48), 7))
    errors = {p.file: p.found for p in problems(pictures, "error")}
    assert set(errors) == {"images/c0.png", "images/c1.png", "labels/c2.png"}
    assert errors["images/c0.png"] == "is truncated: it ends after 500 bytes"
    assert [(p.kind, p.file) for p in problems(pictures, "warning")] == [("constant", "images/c3.png")]


@pytest.mark.parametrize("folder", ["images", "labels"])
def test_a_folder_of_unreadable_files_names_each(pictures: Path, folder: str) -> None:
    for path in (pictures / folder).iterdir():
        path.write_bytes(b"")
    found = [(p.kind, p.file) for p in report_of(pictures).problems if p.severity != "notice"]
    assert found == [("unreadable", f"{folder}/c{i}.png") for i in range(6)]


def test_label_maps_of_an_unsupported_format_are_named(pictures: Path) -> None:
    labels = sorted((pictures / "labels").iterdir())
    labels[3].rename(labels[3].with_suffix(".gif"))
    assert problems(pictures, "error")[0].found == "no label map for case c3, but 1 .gif file"


@pytest.mark.parametrize(("channels", "note"), [(3, "alpha channel dropped although it varies"), (4, "")])
def test_alpha_as_declared(pictures: Path, channels: int, note: str) -> None:
    rng = np.random.default_rng(0)
    for path in (pictures / "images").iterdir():
        save(path, rng.integers(0, 255, (40, 48, 4)))
    names = {str(i): f"c{i}" for i in range(channels)}
    content = {"channel_names": names, "labels": {"background": 0, "a": 1}, "file_ending": ".png"}
    (pictures / "dataset.json").write_text(json.dumps(content))
    report = report_of(pictures)
    assert report.ok, report.to_text()
    assert ({p.found for p in report.problems} >= {note}) == bool(note)
    dataset = read_dataset(pictures)
    assert read_case(dataset.cases[0], dataset)[0].array.shape == (channels, 1, 40, 48)
