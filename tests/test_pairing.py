"""Folders and names that are understood, with the notice that says so, and the pairs that are proposed."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from samples import blocks, save_arrays, scan

from nnunet_lite.data.check import check_dataset
from nnunet_lite.data.dataset import Dataset, dataset_from_json, dataset_to_json, read_dataset
from nnunet_lite.data.pairing import label_base
from nnunet_lite.data.problems import Report


def report_of(dataset: Dataset) -> Report:
    return check_dataset(dataset, workers=0)


def notices(root: Path) -> list[str]:
    """What the report on a sound dataset understood, besides that there is no dataset.json."""
    report = report_of(read_dataset(root))
    assert report.ok and report.count("warning") == 0, report.to_text()
    found = [problem.found for problem in report.problems]
    assert all(f": {text}. [understood]" in report.to_text() for text in found), "none is hidden"
    return [text for text in found if not text.startswith("no dataset.json")]


@pytest.mark.parametrize(
    ("image", "label"),
    [
        ("images/cell{}.tif", "labels/cell{}_mask.tif"),
        ("images/case_{}.nrrd", "labels/case_{}.seg.nrrd"),
        ("images/P{}.nii.gz", "labels/P{}_seg.nii.gz"),
        ("images/P{}.nii.gz", "labels/P{}-label.nii.gz"),
        ("images/P{}.nii.gz", "labels/P{}_labels.nii.gz"),
        ("images/P{}.nii.gz", "labels/P{}_Segmentation.nii.gz"),
        ("images/ISIC_000000{}.png", "labels/ISIC_000000{}_segmentation.png"),
        ("images/benign ({}).png", "labels/benign ({})_mask.png"),
        ("images/P{}.nii.gz", "labels/P{} GT.nii.gz"),
        ("images/P{}_0000.nii.gz", "labels/P{}_seg.nii.gz"),
    ],
)
def test_words_at_the_end_of_label_maps(tmp_path: Path, image: str, label: str) -> None:
    for i in range(5):
        save_arrays(tmp_path, {image.format(i): scan(i), label.format(i): blocks((1,))})
    dataset = read_dataset(tmp_path)
    assert [case.label for case in dataset.cases] == [tmp_path / label.format(i) for i in range(5)]
    assert [case.images for case in dataset.cases] == [(tmp_path / image.format(i),) for i in range(5)]
    pair = f"{Path(label.format(0)).name} taken as the label map of {Path(image.format(0)).name}"
    assert notices(tmp_path) == [f"{pair}, and 4 more in the same way"]
    assert dataset_from_json(dataset_to_json(dataset)) == dataset


def test_a_word_at_the_end_of_one_label_map(tmp_path: Path) -> None:
    for i in range(5):
        label = "labels/c3_mask.png" if i == 3 else f"labels/c{i}.png"
        save_arrays(tmp_path, {f"images/c{i}.png": scan(i), label: blocks((1,))})
    assert notices(tmp_path) == ["c3_mask.png taken as the label map of c3.png"]


def test_the_exact_name_comes_first(tmp_path: Path) -> None:
    """Also where images themselves end in such a word; another label map of the case is pointed out."""
    for i in range(5):
        save_arrays(tmp_path, {f"images/c{i}_mask.png": scan(i), f"labels/c{i}_mask.png": blocks((1,))})
    assert notices(tmp_path) == []
    save_arrays(tmp_path, {"images/c0.png": scan(9), "labels/c0.png": blocks((1,)), "labels/c0_seg.png": blocks((1,))})
    dataset = read_dataset(tmp_path)
    assert [case.label.name for case in dataset.cases if case.label][:2] == ["c0.png", "c0_mask.png"]
    (problem,) = (problem for problem in report_of(dataset).problems if problem.severity != "notice")
    assert (problem.kind, problem.severity, problem.file) == ("extra_label", "warning", "labels/c0_seg.png")
    assert problem.found == "is not used: c0.png is the label map of case c0"
    entries = [{"image": f"images/c{i}_mask.png", "label": f"labels/c{i}_mask.png"} for i in range(5)]
    entries.append({"image": "images/c0.png", "label": "labels/c0_seg.png"})
    table = {"channel_names": {"0": "grey"}, "labels": {"background": 0, "a": 1}, "training": entries}
    (tmp_path / "dataset.json").write_text(json.dumps(table))
    report = report_of(read_dataset(tmp_path))
    assert report.ok and [(p.kind, p.file) for p in report.problems] == [("extra_label", "labels/c0.png")], "as listed"


@pytest.mark.parametrize(
    ("images", "labels", "taken"),
    [
        ("images", "masks", True),
        ("Images", "Labels", False),
        ("IMAGES", "LABELS", False),
        ("imagesTr", "labelstr", False),
        ("image", "label", True),
        ("Image", "mask", True),
        ("images", "Segmentations", True),
        ("images", "segmentation", True),
    ],
)
def test_folders(tmp_path: Path, images: str, labels: str, taken: bool) -> None:
    """An empty folder of another usual name does no harm."""
    for i in range(5):
        save_arrays(tmp_path, {f"{images}/c{i}.png": scan(i), f"{labels}/c{i}.png": blocks((1,))})
    (tmp_path / ("masks" if labels != "masks" else "labels")).mkdir()
    texts = notices(tmp_path)
    assert (f"{labels}/ taken as the folder of the label maps" in texts) == taken
    assert len(read_dataset(tmp_path).cases) == 5


def test_folders_of_nnunet_come_first(tmp_path: Path) -> None:
    for i in range(5):
        for folder in ("imagesTr", "labelsTr", "images", "masks"):
            save_arrays(tmp_path, {f"{folder}/c{i}.png": scan(i) if folder.startswith("im") else blocks((1,))})
    dataset = read_dataset(tmp_path)
    assert {path.parent.name for case in dataset.cases for path in (*case.images, case.label) if path} == {
        "imagesTr",
        "labelsTr",
    }


def test_folders_and_words_with_dataset_json(tmp_path: Path) -> None:
    for i in range(5):
        arrays = {f"Images/c{i}_000{c}.nii.gz": scan(2 * i + c) for c in range(2)}
        save_arrays(tmp_path, arrays | {f"masks/c{i}_seg.nii.gz": blocks((1,))})
    table = {"channel_names": {"0": "A", "1": "B"}, "labels": {"background": 0, "a": 1}}
    (tmp_path / "dataset.json").write_text(json.dumps(table | {"file_ending": "nii.gz"}))
    dataset = read_dataset(tmp_path)
    assert [len(case.images) for case in dataset.cases] == [2] * 5 and dataset.file_ending == ".nii.gz"
    assert notices(tmp_path) == [
        "masks/ taken as the folder of the label maps",
        "c0_seg.nii.gz taken as the label map of c0_0000.nii.gz, and 4 more in the same way",
    ]


def test_label_maps_that_are_called_as_the_first_channel(tmp_path: Path) -> None:
    for i in range(5):
        arrays = {f"images/c{i}_000{c}.nii.gz": scan(2 * i + c) for c in range(2)}
        save_arrays(tmp_path, arrays | {f"labels/c{i}_0000.nii.gz": blocks((1,))})
    assert notices(tmp_path) == ["c0_0000.nii.gz taken as the label map of c0, and 4 more in the same way"]
    assert [len(case.images) for case in read_dataset(tmp_path).cases] == [2] * 5


def test_a_numbered_image_without_label_map_is_no_channel(tmp_path: Path) -> None:
    for i in range(1, 7):
        save_arrays(tmp_path, {f"images/scan_000{i}.png": scan(i)})
        if i < 6:
            save_arrays(tmp_path, {f"labels/scan_000{i}.png": blocks((1,))})
    dataset = read_dataset(tmp_path)
    assert len(dataset.channels) == 1 and len(dataset.cases) == 6
    (problem,) = (problem for problem in report_of(dataset).problems if problem.severity == "error")
    assert (problem.kind, problem.file) == ("missing_label", "labels/scan_0006.png")


def test_numbered_cases_of_one_channel_are_pointed_out(tmp_path: Path) -> None:
    for i in range(6):
        name = f"c{i // 2}_000{i % 2}.png"
        save_arrays(tmp_path, {f"images/{name}": scan(i), f"labels/{name}": blocks((1,))})
    assert notices(tmp_path) == [
        "c0_0000.png and c0_0001.png are two cases and not two channels, since each has a label map"
    ]


def test_words() -> None:
    assert [label_base(name) for name in ("a_mask", "a.seg", "a-GT", "a_labels")] == ["a"] * 4
    assert [label_base(name) for name in ("mask", "amask", "_mask", "a_mask_2", "label_7")] == [
        "mask", "amask", "_mask", "a_mask_2", "label_7",
    ]  # fmt: skip


def test_references_with_a_word_at_the_end(command: Callable[..., tuple[int, str, str]], tmp_path: Path) -> None:
    """Predictions carry the names of images, so `evaluate` finds the label maps that training found."""
    for i in range(3):
        save_arrays(tmp_path, {f"out/c{i}.nii.gz": blocks((1,)), f"labels/c{i}_mask.nii.gz": blocks((1,))})
    code, out, err = command("evaluate", "out", "labels", "--no-surface", cwd=tmp_path)
    assert code == 0, err
    assert "3 references found by a word at the end of their names: c0_mask.nii.gz of c0 and 2 more" in out
    save_arrays(tmp_path, {"labels/c0_seg.nii.gz": blocks((1,))})
    _, out, _ = command("evaluate", "out", "labels", "--no-surface", cwd=tmp_path)
    assert "2 without a prediction, not scored: c0_mask, c0_seg" in out, "which of the two is not guessed"
