"""Folders and names that are understood, with the notice that says so, and the pairs that are proposed."""

from __future__ import annotations

import json
from pathlib import Path
from unicodedata import normalize

import pytest
from samples import Command, blocks, described, save_arrays, save_cases, scan

from nnunet_lite.data.cases import label_base
from nnunet_lite.data.check import check_dataset
from nnunet_lite.data.dataset import Dataset, dataset_from_json, dataset_to_json, read_dataset
from nnunet_lite.data.problems import Problem


def notices(root: Path) -> list[str]:
    """What the report on a sound dataset understood, besides that there is no dataset.json."""
    report = check_dataset(read_dataset(root), workers=0)
    assert report.ok and report.count("warning") == 0, report.to_text()
    found = [problem.found for problem in report.problems]
    assert all(f": {text}. [understood]" in report.to_text() for text in found), "none is hidden"
    return [text for text in found if not text.startswith("no dataset.json")]


def only_problem(dataset: Dataset) -> Problem:
    (problem,) = (p for p in check_dataset(dataset, workers=0).problems if p.severity != "notice")
    return problem


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
    save_cases(tmp_path, [image], [label])
    dataset = read_dataset(tmp_path)
    assert [case.label for case in dataset.cases] == [tmp_path / label.format(i) for i in range(5)]
    assert [case.images for case in dataset.cases] == [(tmp_path / image.format(i),) for i in range(5)]
    pair = f"{Path(label.format(0)).name} taken as the label map of {Path(image.format(0)).name}"
    assert notices(tmp_path) == [f"{pair}, and 4 more in the same way"]
    assert dataset_from_json(dataset_to_json(dataset)) == dataset


def test_words_that_stay() -> None:
    for name in ("mask", "amask", "_mask", "a_mask_2", "label_7"):
        assert label_base(name) == name


def test_letters_that_macos_writes_as_two_characters(tmp_path: Path) -> None:
    name = "M\u00fcller{}"
    save_cases(tmp_path, [f"images/{name}.nii.gz"], [f"labels/{normalize('NFD', name)}.nii.gz"])
    dataset = read_dataset(tmp_path)
    assert [case.id for case in dataset.cases] == [name.format(i) for i in range(len(dataset.cases))]
    assert check_dataset(dataset, workers=0).ok


def test_the_exact_name_comes_first(tmp_path: Path) -> None:
    """Also where images themselves end in such a word; another label map of the case is pointed out."""
    save_cases(tmp_path, ["images/c{}_mask.png"], ["labels/c{}_mask.png"])
    assert notices(tmp_path) == []
    save_arrays(tmp_path, {"images/c0.png": scan(9), "labels/c0.png": blocks((1,)), "labels/c0_seg.png": blocks((1,))})
    dataset = read_dataset(tmp_path)
    assert [case.label.name for case in dataset.cases if case.label][:2] == ["c0.png", "c0_mask.png"]
    problem = only_problem(dataset)
    assert (problem.kind, problem.severity, problem.file) == ("extra_label", "warning", "labels/c0_seg.png")
    assert problem.found == "is not used: c0.png is the label map of case c0"
    entries = [{"image": f"images/c{i}_mask.png", "label": f"labels/c{i}_mask.png"} for i in range(5)]
    entries.append({"image": "images/c0.png", "label": "labels/c0_seg.png"})
    (tmp_path / "dataset.json").write_text(json.dumps(described("grey", training=entries)))
    problem = only_problem(read_dataset(tmp_path))
    assert (problem.kind, problem.file) == ("extra_label", "labels/c0.png"), "as listed"


@pytest.mark.parametrize(
    ("images", "labels", "notice"),
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
def test_folders(tmp_path: Path, images: str, labels: str, notice: bool) -> None:
    """An empty folder of another usual name does no harm, and the folders of nnU-Net come before all others."""
    save_cases(tmp_path, [f"{images}/c{{}}.png"], [f"{labels}/c{{}}.png"])
    (tmp_path / ("masks" if labels != "masks" else "labels")).mkdir()
    assert (f"{labels}/ taken as the folder of the label maps" in notices(tmp_path)) == notice
    assert len(read_dataset(tmp_path).cases) == 5
    save_cases(tmp_path, ["imagesTr/c{}.png"], ["labelsTr/c{}.png"])
    files = [path for case in read_dataset(tmp_path).cases for path in (*case.images, case.label) if path]
    assert {path.parent.name for path in files} == {"imagesTr", "labelsTr"}


def test_folders_and_words_with_dataset_json(tmp_path: Path) -> None:
    table = described("A", "B", file_ending="nii.gz")
    save_cases(tmp_path, ["Images/c{}_0000.nii.gz", "Images/c{}_0001.nii.gz"], ["masks/c{}_seg.nii.gz"], table=table)
    dataset = read_dataset(tmp_path)
    assert [len(case.images) for case in dataset.cases] == [2] * 5 and dataset.file_ending == ".nii.gz"
    assert notices(tmp_path) == [
        "masks/ taken as the folder of the label maps",
        "c0_seg.nii.gz taken as the label map of c0_0000.nii.gz, and 4 more in the same way",
    ]


def test_label_maps_that_are_called_as_the_first_channel(tmp_path: Path) -> None:
    """And label maps of any values, without dataset.json."""
    images = ["images/c{}_0000.nii.gz", "images/c{}_0001.nii.gz"]
    save_cases(tmp_path, images, ["labels/c{}_0000.nii.gz"], values=(7, 14))
    assert notices(tmp_path) == ["c0_0000.nii.gz taken as the label map of c0, and 4 more in the same way"]
    dataset = read_dataset(tmp_path)
    assert [len(case.images) for case in dataset.cases] == [2] * 5
    assert (dataset.channels, dataset.labels.values) == (("channel_0", "channel_1"), (0, 7, 14))


def test_a_numbered_image_without_label_map_is_no_channel(tmp_path: Path) -> None:
    save_cases(tmp_path, ["images/scan_000{}.png"], ["labels/scan_000{}.png"], numbers=range(1, 7))
    (tmp_path / "labels/scan_0006.png").unlink()
    dataset = read_dataset(tmp_path)
    assert len(dataset.channels) == 1 and len(dataset.cases) == 6
    problem = only_problem(dataset)
    assert (problem.kind, problem.file) == ("missing_label", "labels/scan_0006.png")


def test_an_image_and_a_label_map_whose_names_differ_are_proposed_as_a_pair(tmp_path: Path) -> None:
    """Where others match; of two label maps for one image, none is proposed."""
    save_cases(tmp_path, ["images/P{}.png"], ["labels/P{}.png"])
    save_arrays(tmp_path, {"images/P7_T1.png": scan(7), "images/P8_T1.png": scan(8), "images/P9.png": scan(9)})
    save_arrays(tmp_path, {f"labels/{name}.png": blocks((1,)) for name in ("P7_manual", "P9_a", "P9_b")})
    problems = check_dataset(read_dataset(tmp_path), workers=0).problems
    fixes = {problem.file: problem.fix for problem in problems if problem.kind == "extra_label"}
    assert fixes["labels/P7_manual.png"].startswith("Is it that of P7_T1.png?")
    assert "Is it" not in fixes["labels/P9_a.png"] + fixes["labels/P9_b.png"]


def test_numbered_cases_of_one_channel_are_pointed_out(tmp_path: Path) -> None:
    names = [f"c{i // 2}_000{i % 2}.png" for i in range(6)]
    save_arrays(tmp_path, {f"images/{name}": scan(i) for i, name in enumerate(names)})
    save_arrays(tmp_path, {f"labels/{name}": blocks((1,)) for name in names})
    assert notices(tmp_path) == [
        "c0_0000.png and c0_0001.png are two cases and not two channels, since each has a label map"
    ]


def test_references_with_a_word_at_the_end(command: Command, tmp_path: Path) -> None:
    """Predictions carry the names of images, so `evaluate` finds the label maps that training found."""
    save_cases(tmp_path, [], ["out/c{}.nii.gz", "labels/c{}_mask.nii.gz"], numbers=range(3))
    code, out, err = command("evaluate", "out", "labels", "--no-surface", cwd=tmp_path)
    assert code == 0, err
    assert "3 references found by a word at the end of their names: c0_mask.nii.gz of c0 and 2 more" in out
    save_arrays(tmp_path, {"labels/c0_seg.nii.gz": blocks((1,))})
    _, out, _ = command("evaluate", "out", "labels", "--no-surface", cwd=tmp_path)
    assert "2 without a prediction, not scored: c0_mask, c0_seg" in out, "which of the two is not guessed"
