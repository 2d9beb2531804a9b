"""One test per kind of bad input: what the report says of it, and that it says nothing else."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import nibabel
import numpy as np
import pytest
from PIL import Image as Pillow

from nnunet_lite.data.check import broken_dataset, check_dataset
from nnunet_lite.data.dataset import read_case, read_dataset
from nnunet_lite.data.problems import KINDS, TO_ACCEPT, Problem, Report
from nnunet_lite.errors import UserError

Copy = Callable[..., Path]


def run(root: Path) -> Report:
    return check_dataset(read_dataset(root), workers=2)


def only(report: Report, kind: str) -> Problem:
    """The one problem of the report (apart from what tests with few cases always give)."""
    problems = [p for p in report.problems if p.kind != "few_cases"]
    assert [p.kind for p in problems] == [kind], report.to_text()
    assert report.ok == (KINDS[kind] != "error")
    assert report.can_be_planned == (report.ok and kind not in TO_ACCEPT)
    return problems[0]


def rewrite(path: Path, change: Callable[[np.ndarray], np.ndarray], affine: np.ndarray | None = None) -> None:
    """Change the voxels (x, y, z) of a NIfTI file, or its affine."""
    image = nibabel.load(path)
    array = change(np.asarray(image.dataobj).copy())
    nibabel.save(nibabel.Nifti1Image(array, image.affine if affine is None else affine), path)


def first(root: Path, folder: str) -> Path:
    return sorted((root / folder).iterdir())[0]


def set_voxel(value: float, kind: type) -> Callable[[np.ndarray], np.ndarray]:
    def change(array: np.ndarray) -> np.ndarray:
        array = array.astype(kind)
        array[3, 4, 5] = value
        return array

    return change


def test_sound_data_has_no_problem(hippocampus: Path) -> None:
    report = run(hippocampus)
    assert report.problems == ()
    assert report.to_text() == "Task04_Hippocampus: 32 cases, 0 errors, 0 warnings"


def test_missing_image(copy_dataset: Copy) -> None:
    root = copy_dataset()
    first(root, "imagesTr").unlink()
    problem = only(run(root), "missing_image")
    assert problem.file == "imagesTr/hippocampus_001.nii.gz"
    assert problem.found == "no file for image of case hippocampus_001"


def test_missing_channel(copy_nnunet: Copy) -> None:
    root = copy_nnunet(5, ("T1", "T2"))
    (root / "imagesTr" / "hippocampus_001_0001.nii.gz").unlink()
    problem = only(run(root), "missing_image")
    assert problem.file == "imagesTr/hippocampus_001_0001.nii.gz"
    assert problem.found == "no file for T2 of case hippocampus_001"


def test_extra_channel(copy_nnunet: Copy) -> None:
    root = copy_nnunet(5, ("T1", "T2"))
    extra = root / "imagesTr" / "hippocampus_001_0002.nii.gz"
    shutil.copy(first(root, "imagesTr"), extra)
    problem = only(run(root), "extra_channel")
    assert (problem.file, problem.expected) == (f"imagesTr/{extra.name}", "2 channels (T1, T2)")


def test_invalid_json(copy_dataset: Copy) -> None:
    root = copy_dataset()
    (root / "dataset.json").write_text('{\n "labels": {,}\n}')
    with pytest.raises(UserError) as caught:
        read_dataset(root)
    report = broken_dataset(root, caught.value)
    problem = only(report, "invalid_json")
    assert problem.file == "dataset.json"
    assert problem.found.startswith("invalid JSON at line 2, column 13")
    (root / "dataset.json").write_text("{}")
    with pytest.raises(UserError) as caught:
        read_dataset(root)
    problem = only(broken_dataset(root, caught.value), "invalid_dataset")
    assert (problem.found, problem.fix) == ("has no channel_names", 'Add, for example, "channel_names": {"0": "CT"}.')


def test_extra_image_and_label(copy_dataset: Copy) -> None:
    root = copy_dataset()
    shutil.copy(first(root, "imagesTr"), root / "imagesTr" / "other.nii.gz")
    assert only(run(root), "extra_image").file == "imagesTr/other.nii.gz"
    (root / "imagesTr" / "other.nii.gz").unlink()
    shutil.copy(first(root, "labelsTr"), root / "labelsTr" / "other.nii.gz")
    problem = only(run(root), "extra_label")
    shutil.copy(first(root, "imagesTr"), root / "imagesTr" / "other.nii.gz")
    only(run(root), "extra_image")  # with its label it is a case that was left out, and no error
    assert (problem.file, problem.found) == ("labelsTr/other.nii.gz", "a label map without an image")


@pytest.mark.parametrize("name", ["other_0000.nrrd", "hippocampus_001_0000.nrrd"])
def test_an_image_with_another_ending_than_dataset_json_says(copy_nnunet: Copy, name: str) -> None:
    root = copy_nnunet(5)
    shutil.copy(first(root, "imagesTr"), root / "imagesTr" / name)
    problem = only(run(root), "extra_image")
    assert (problem.file, problem.found) == (f"imagesTr/{name}", "does not end with .nii.gz, and is left out")


def test_missing_label(copy_dataset: Copy) -> None:
    root = copy_dataset()
    first(root, "labelsTr").unlink()
    problem = only(run(root), "missing_label")
    assert problem.file == "labelsTr/hippocampus_001.nii.gz"
    assert problem.found == "no label map for case hippocampus_001"


@pytest.mark.parametrize("folder", ["imagesTr", "labelsTr"])
def test_truncated_file(copy_dataset: Copy, folder: str) -> None:
    root = copy_dataset()
    path = first(root, folder)
    half = path.stat().st_size // 2
    path.write_bytes(path.read_bytes()[:half])
    problem = only(run(root), "unreadable")
    assert problem.file == f"{folder}/{path.name}"
    assert problem.found == f"is truncated: the compressed data end after {half} bytes"
    assert problem.fix == "Copy or export it again."


def test_file_that_is_no_image(copy_dataset: Copy) -> None:
    root = copy_dataset()
    first(root, "imagesTr").write_text("404 not found")
    assert only(run(root), "unreadable").found == "is not gzip-compressed or is damaged"


def test_wrong_number_of_dimensions(copy_dataset: Copy) -> None:
    root = copy_dataset()
    rewrite(first(root, "labelsTr"), lambda a: np.stack([a, a + 1], axis=-1))
    problem = only(run(root), "dimensions")
    assert problem.found == "is no label map: it has a fourth dimension (2 different channels)"
    shutil.rmtree(root)
    copy_dataset()
    for folder in ("imagesTr", "labelsTr"):
        rewrite(first(root, folder), lambda a: a[:, :, a.shape[2] // 2])
    problem = only(run(root), "dimensions")
    assert (problem.found, problem.expected) == ("2 dimensions", "3 as most")


def test_wrong_number_of_channels(copy_dataset: Copy) -> None:
    root = copy_dataset()
    rewrite(first(root, "imagesTr"), lambda a: np.stack([a, a + 1], axis=-1))
    report = run(root)
    problem = next(p for p in report.problems if p.severity == "error")
    assert (problem.kind, problem.found, problem.expected) == ("channels", "2 channels", "1 (MRI)")


def test_shape_mismatch(copy_dataset: Copy) -> None:
    root = copy_dataset()
    rewrite(first(root, "labelsTr"), lambda a: a[:-1])
    problem = only(run(root), "shape")
    assert problem.file == "labelsTr/hippocampus_001.nii.gz"
    assert problem.found.startswith("shape (35, 51, 34)") and problem.expected == "(35, 51, 35) as its image"


@pytest.mark.parametrize("kind", ["spacing", "origin", "direction"])
def test_geometry_mismatch(copy_dataset: Copy, kind: str) -> None:
    root = copy_dataset()
    path = first(root, "labelsTr")
    affine = np.asarray(nibabel.load(path).affine).copy()
    if kind == "spacing":
        affine[:3, :3] *= 1.01
    elif kind == "origin":
        affine[:3, 3] += 0.01
    else:
        turn = np.array([[np.cos(0.01), -np.sin(0.01), 0], [np.sin(0.01), np.cos(0.01), 0], [0, 0, 1]])
        affine[:3, :3] = turn @ affine[:3, :3]
    rewrite(path, lambda a: a, affine)
    problem = only(run(root), kind)
    assert problem.found.startswith(kind) and "copy the image's header" in problem.fix


def test_geometry_within_tolerance(copy_dataset: Copy) -> None:
    root = copy_dataset()
    path = first(root, "labelsTr")
    affine = np.asarray(nibabel.load(path).affine).copy()
    affine[:3, 3] += 0.0005
    rewrite(path, lambda a: a, affine)
    assert run(root).problems == ()


def test_channels_on_different_grids(copy_nnunet: Copy) -> None:
    root = copy_nnunet(5, ("T1", "T2"))
    rewrite(root / "imagesTr" / "hippocampus_001_0001.nii.gz", lambda a: a[:, 1:])
    problem = only(run(root), "grid")
    assert problem.file == "imagesTr/hippocampus_001_0001.nii.gz"
    assert problem.expected.endswith("as hippocampus_001_0000.nii.gz")


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_nan_and_infinity(copy_dataset: Copy, value: float) -> None:
    root = copy_dataset()
    rewrite(first(root, "imagesTr"), set_voxel(value, np.float32))
    problem = only(run(root), "nan")
    assert problem.found == "1 voxel of channel MRI NaN or infinite"


def test_unknown_label_value(copy_dataset: Copy) -> None:
    root = copy_dataset()
    rewrite(first(root, "labelsTr"), set_voxel(7, np.uint8))
    problem = only(run(root), "label_value")
    assert (problem.found, problem.expected) == ("label value 7 (1 voxel)", "one of 0, 1, 2")


def test_fractional_label(copy_dataset: Copy) -> None:
    root = copy_dataset()
    rewrite(first(root, "labelsTr"), set_voxel(0.5, np.float32))
    problem = only(run(root), "label_fraction")
    assert problem.found == "label values are not whole numbers (0.5 and so on in 1 of 62475 voxels)"
    assert "nearest neighbour" in problem.fix


def test_labels_in_colour(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    for folder in ("images", "labels"):
        (tmp_path / folder).mkdir()
    for i in range(5):
        Pillow.fromarray(rng.integers(0, 256, (16, 20)).astype(np.uint8)).save(tmp_path / "images" / f"{i}.png")
        Pillow.fromarray(rng.integers(0, 3, (16, 20)).astype(np.uint8)).save(tmp_path / "labels" / f"{i}.png")
    Pillow.fromarray(rng.integers(0, 256, (16, 20, 3)).astype(np.uint8)).save(tmp_path / "labels" / "0.png")
    problems = [p for p in run(tmp_path).problems if p.kind != "understood"]
    assert [(p.kind, p.file) for p in problems] == [("label_channels", "labels/0.png")]
    assert problems[0].found == "is a colour picture (3 different channels)"


def test_label_without_any_voxel(copy_dataset: Copy) -> None:
    root = copy_dataset()
    table = json.loads((root / "dataset.json").read_text())
    table["labels"]["3"] = "Tail"
    (root / "dataset.json").write_text(json.dumps(table))
    problem = only(run(root), "label_absent")
    assert (problem.file, problem.found) == ("dataset.json", "label Tail (3) has no voxel in any case")


def test_no_foreground_at_all(copy_dataset: Copy) -> None:
    root = copy_dataset()
    for path in (root / "labelsTr").iterdir():
        rewrite(path, np.zeros_like)
    assert only(run(root), "no_foreground").found == "no label map holds anything but background"


def test_constant_image(copy_dataset: Copy) -> None:
    root = copy_dataset()
    rewrite(first(root, "imagesTr"), np.ones_like)
    assert only(run(root), "constant").found == "every voxel of channel MRI is 1"


def test_duplicate_case(copy_dataset: Copy) -> None:
    root = copy_dataset()
    paths = sorted((root / "imagesTr").iterdir())
    for folder in ("imagesTr", "labelsTr"):
        shutil.copy(root / folder / paths[0].name, root / folder / paths[1].name)
    problem = only(run(root), "duplicate_case")
    assert problem.file == f"imagesTr/{paths[1].name}"
    assert problem.found == "holds the same image as case hippocampus_001"


def test_the_same_id_twice(copy_dataset: Copy) -> None:
    root = copy_dataset()
    table = json.loads((root / "dataset.json").read_text())
    table["training"].append(table["training"][0])
    (root / "dataset.json").write_text(json.dumps(table))
    problems = run(root).problems
    assert [(p.kind, p.found) for p in problems] == [
        ("n_cases", "numTraining is 5, and there are 6 cases"),
        ("duplicate_id", "2 cases have the id hippocampus_001 (hippocampus_001.nii.gz)"),
        ("duplicate_case", "holds the same image as case hippocampus_001"),
    ]


def test_fewer_cases_than_folds(copy_dataset: Copy) -> None:
    report = run(copy_dataset(3))
    assert [(p.kind, p.found) for p in report.problems] == [("few_cases", "3 cases")]
    assert report.ok


def test_hounsfield_units_and_channel_names(copy_dataset: Copy) -> None:
    root = copy_dataset()
    table = json.loads((root / "dataset.json").read_text())
    (root / "dataset.json").write_text(json.dumps(table | {"modality": {"0": "CT"}}))
    assert "do not look like Hounsfield units" in only(run(root), "not_ct").found
    for path in (root / "imagesTr").iterdir():
        rewrite(path, lambda a: (a.astype(np.float64) / a.max() * 2000 - 1024).astype(np.int16))
    assert run(root).problems == ()
    (root / "dataset.json").write_text(json.dumps(table))
    problem = only(run(root), "looks_like_ct")
    assert "channel MRI holds values -1024 .. 976" in problem.found and "name the channel CT" in problem.fix


def test_masks_of_0_and_255_are_a_notice(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    for folder in ("images", "labels"):
        (tmp_path / folder).mkdir()
    for i in range(5):
        Pillow.fromarray(rng.integers(0, 256, (16, 20, 3)).astype(np.uint8)).save(tmp_path / "images" / f"{i}.png")
        Pillow.fromarray(np.eye(16, 20, dtype=np.uint8) * 255).save(tmp_path / "labels" / f"{i}.png")
    report = run(tmp_path)
    assert report.ok and report.count("warning") == 0
    found = {p.found for p in report.problems if p.severity == "notice"}
    assert "label maps hold 0 and 255: 255 is read as 1" in found and "RGB picture read as 3 channels" in found


def test_all_problems_are_in_one_report(copy_dataset: Copy) -> None:
    root = copy_dataset(12)
    images, labels = sorted((root / "imagesTr").iterdir()), sorted((root / "labelsTr").iterdir())
    images[0].unlink()
    images[1].write_bytes(b"")
    labels[2].unlink()
    for path in labels[3:10]:
        rewrite(path, set_voxel(7, np.uint8))
    report = run(root)
    assert {p.kind for p in report.problems} == {"missing_image", "unreadable", "missing_label", "label_value"}
    assert len(report.problems) == 10
    text = report.to_text().splitlines()
    assert text[0] == "broken: 12 cases, 10 errors, 0 warnings"
    assert len(text) == 5, "seven files with the same problem share a line"
    line = next(line for line in text if "label value 7" in line)
    assert line.startswith(f"error: labelsTr/{labels[3].name}, labelsTr/{labels[4].name}, ") and "and 4 more" in line
    stored = json.loads(json.dumps(report.to_json()))
    assert len(stored["problems"]) == 10 and stored["ok"] is False
    assert set(stored["problems"][0]) == {"severity", "kind", "file", "found", "expected", "fix"}


def test_many_different_problems_of_a_kind_are_cut_short(copy_dataset: Copy) -> None:
    root = copy_dataset(8)
    for n, path in enumerate(sorted((root / "labelsTr").iterdir())):
        rewrite(path, set_voxel(7 + n, np.uint8))
    text = run(root).to_text().splitlines()
    assert len(text) == 5
    assert text[-1] == "... and 5 more problems of the kind label_value; --json shows all"


def test_threads_or_none_give_the_same_report(copy_dataset: Copy) -> None:
    root = copy_dataset(6)
    first(root, "imagesTr").unlink()
    dataset = read_dataset(root)
    seen = []

    def progress(items, total, what):  # type: ignore[no-untyped-def]
        for item in items:
            seen.append((total, what))
            yield item

    assert check_dataset(dataset, workers=0, progress=progress) == check_dataset(dataset, workers=3)
    assert seen == [(6, "check")] * 6


def test_a_label_map_as_jpeg_is_an_error(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    for folder in ("images", "labels"):
        (tmp_path / folder).mkdir()
    for i in range(5):
        image, mask = rng.integers(0, 255, (32, 32), np.uint8), np.zeros((32, 32), np.uint8)
        mask[8:20, 8:20] = 255
        Pillow.fromarray(image).save(tmp_path / "images" / f"c{i}.png")
        suffix = ".jpg" if i == 3 else ".png"
        Pillow.fromarray(mask).save(tmp_path / "labels" / f"c{i}{suffix}")
    (problem,) = (p for p in check_dataset(read_dataset(tmp_path)).problems if p.kind == "label_lossy")
    assert (problem.severity, problem.file) == ("error", "labels/c3.jpg")


def pictures(root: Path, n: int = 6) -> Path:
    """Pictures with label maps in the plain layout."""
    rng = np.random.default_rng(0)
    for folder in ("images", "labels"):
        (root / folder).mkdir(parents=True)
    for i in range(n):
        Pillow.fromarray(rng.integers(0, 255, (40, 48)).astype(np.uint8)).save(root / "images" / f"c{i}.png")
        label = np.zeros((40, 48), np.uint8)
        label[5:20, 8:30] = 1
        Pillow.fromarray(label).save(root / "labels" / f"c{i}.png")
    return root


def test_unreadable_files_are_named_and_stop_no_report(tmp_path: Path) -> None:
    """In the plain layout, where channels and labels follow from the files."""
    root = pictures(tmp_path / "data")
    (root / "images" / "c0.png").write_bytes((root / "images" / "c0.png").read_bytes()[:500])
    (root / "images" / "c1.png").write_bytes(b"")
    (root / "labels" / "c2.png").write_bytes(b"no picture")
    Pillow.fromarray(np.full((40, 48), 7, np.uint8)).save(root / "images" / "c3.png")
    report = run(root)
    errors = {p.file: p.found for p in report.problems if p.severity == "error"}
    assert set(errors) == {"images/c0.png", "images/c1.png", "labels/c2.png"}
    assert errors["images/c0.png"] == "is truncated: it ends after 500 bytes"
    assert [p.file for p in report.problems if p.kind == "constant"] == ["images/c3.png"], "the others are checked"


@pytest.mark.parametrize("folder", ["images", "labels"])
def test_a_folder_of_unreadable_files_names_each(tmp_path: Path, folder: str) -> None:
    root = pictures(tmp_path / "data")
    for path in (root / folder).iterdir():
        path.write_bytes(b"")
    report = run(root)
    problems = [(p.kind, p.file) for p in report.problems if p.severity != "notice"]
    assert problems == [("unreadable", f"{folder}/c{i}.png") for i in range(6)]


def test_label_maps_of_an_unsupported_format_are_named(tmp_path: Path) -> None:
    root = pictures(tmp_path / "data")
    labels = sorted((root / "labels").iterdir())
    Pillow.open(labels[3]).save(labels[3].with_suffix(".gif"))
    labels[3].unlink()
    problem = next(p for p in run(root).problems if p.severity == "error")
    assert problem.found == "no label map for case c3, but 1 .gif file"
    for path in (*labels[:3], *labels[4:]):
        path.rename(path.with_suffix(".gif"))
    with pytest.raises(UserError, match=r"labels: holds no label map of a supported format, but 6 \.gif files"):
        read_dataset(root)
    for path in (root / "images").iterdir():
        path.rename(path.with_suffix(".webp"))
    with pytest.raises(UserError, match=r"images: holds no image of a supported format, but 6 \.webp files"):
        read_dataset(root)


@pytest.mark.parametrize(("channels", "kept"), [(3, "alpha channel dropped although it varies"), (4, "")])
def test_alpha_as_declared(tmp_path: Path, channels: int, kept: str) -> None:
    root = pictures(tmp_path / "data")
    rng = np.random.default_rng(0)
    for path in (root / "images").iterdir():
        Pillow.fromarray(rng.integers(0, 255, (40, 48, 4)).astype(np.uint8)).save(path)
    names = {str(i): f"c{i}" for i in range(channels)}
    table = {"channel_names": names, "labels": {"background": 0, "a": 1}, "file_ending": ".png"}
    (root / "dataset.json").write_text(json.dumps(table))
    report = run(root)
    assert report.ok, report.to_text()
    assert ({p.found for p in report.problems} >= {kept}) == bool(kept)
    dataset = read_dataset(root)
    assert read_case(dataset.cases[0], dataset)[0].array.shape == (channels, 1, 40, 48)


def test_forms_that_do_not_agree(copy_dataset: Copy) -> None:
    root = copy_dataset()
    path = first(root, "imagesTr")
    image = nibabel.load(path)
    image.set_qform(image.affine + np.array([[0, 0, 0, 30], *np.zeros((3, 4))]))
    nibabel.save(image, path)
    rewritten = nibabel.load(path)
    problem = next(p for p in run(root).problems if p.kind == "forms")
    assert problem.severity == "warning" and problem.file == f"imagesTr/{path.name}"
    assert problem.found == "its qform and its sform place it up to 30 mm apart; the sform is used"
    assert np.abs(rewritten.get_qform() - rewritten.get_sform()).max() == 30


@pytest.mark.parametrize("ending", [".NII.GZ", ".Nii.gz"])
def test_endings_in_upper_case_find_their_label_maps(copy_nnunet: Copy, ending: str) -> None:
    root = copy_nnunet(5, ("T1", "T2"))
    for path in [*(root / "imagesTr").iterdir(), *(root / "labelsTr").iterdir()]:
        path.rename(path.with_name(path.name.removesuffix(".nii.gz") + ending))
    assert run(root).problems == ()
    first(root, "imagesTr").rename(root / "gone")
    problem = only(run(root), "missing_image")
    assert problem.file == f"imagesTr/hippocampus_001_0000{ending}"
