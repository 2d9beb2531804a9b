"""Data sets in every layout that people have."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk
from PIL import Image as Pillow

from nnunet_lite.data.cases import find_cases
from nnunet_lite.data.dataset import dataset_from_json, dataset_to_json, read_case, read_dataset
from nnunet_lite.data.images import read_image
from nnunet_lite.errors import UserError

Copy = Callable[..., Path]


def edit(root: Path, **changes: object) -> None:
    """Set entries of dataset.json; None removes one."""
    path = root / "dataset.json"
    table = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({key: value for key, value in table.items() if value is not None}))


def save_pictures(root: Path, n: int = 3, values: tuple[int, int] = (0, 255)) -> None:
    """images/ with RGB pictures and labels/ with masks of two values."""
    rng = np.random.default_rng(0)
    for folder in ("images", "labels"):
        (root / folder).mkdir(parents=True)
    for i in range(n):
        Pillow.fromarray(rng.integers(0, 256, (16, 20, 3)).astype(np.uint8)).save(root / "images" / f"p{i}.png")
        mask = np.where(rng.random((16, 20)) < 0.5, *values).astype(np.uint8)
        Pillow.fromarray(mask).save(root / "labels" / f"p{i}.png")


def test_msd_layout(hippocampus: Path) -> None:
    dataset = read_dataset(hippocampus)
    assert (dataset.layout, dataset.name, dataset.channels) == ("msd", "Task04_Hippocampus", ("MRI",))
    assert len(dataset.cases) == 32, "only the training cases"
    assert [case.id for case in dataset.cases] == sorted(case.id for case in dataset.cases)
    assert dataset.labels.names == {"background": 0, "Anterior": 1, "Posterior": 2}
    assert all(path.is_file() for case in dataset.cases for path in (*case.images, case.label) if path)
    image, label = read_case(dataset.cases[0], dataset)
    assert label is not None and image.array.shape[1:] == label.shape
    assert set(np.unique(label)) == {0, 1, 2}


def test_nnunet_v1_layout(copy_dataset: Copy) -> None:
    root = copy_dataset(3)
    for path in (root / "imagesTr").iterdir():
        path.rename(path.with_name(path.name.replace(".nii.gz", "_0000.nii.gz")))
    dataset = read_dataset(root)
    assert dataset.layout == "nnunet_v1"
    assert [case.images[0].name for case in dataset.cases] == [f"{case.id}_0000.nii.gz" for case in dataset.cases]
    assert all(path.is_file() for case in dataset.cases for path in case.images)


@pytest.mark.parametrize("channels", [("T1",), ("T1", "T2", "FLAIR")])
def test_lists_whose_entries_are_first_channels(copy_nnunet: Copy, channels: tuple[str, ...]) -> None:
    """An entry x_0000 is the case x with its other channels; with a single channel it is what it says."""
    root = copy_nnunet(3, channels)
    names = [path.name.removesuffix(".nii.gz") for path in sorted((root / "labelsTr").iterdir())]
    entries = [{"image": f"./imagesTr/{name}_0000.nii.gz", "label": f"./labelsTr/{name}.nii.gz"} for name in names]
    edit(root, training=entries)
    dataset = read_dataset(root)
    assert [case.id for case in dataset.cases] == [name if channels[1:] else f"{name}_0000" for name in names]
    for case, name in zip(dataset.cases, names, strict=True):
        assert [path.name for path in case.images] == [f"{name}_{i:04d}.nii.gz" for i in range(len(channels))]
        assert read_case(case, dataset)[0].array.shape[0] == len(channels)
    assert dataset.layout == ("nnunet_v1" if channels[1:] else "msd")


def test_listed_cases_that_are_numbered_are_no_channels(copy_nnunet: Copy) -> None:
    """case_0000 and case_0001 in the list, each of which holds all channels."""
    root = copy_nnunet(3, ("T1", "T2"))
    entries = []
    for i, path in enumerate(sorted((root / "imagesTr").glob("*_0000.nii.gz"))):
        image, name = sitk.ReadImage(path), path.name.replace("_0000", "")
        sitk.WriteImage(sitk.JoinSeries([image, image]), root / "imagesTr" / f"case_{i:04d}.nii.gz")
        entries.append({"image": f"imagesTr/case_{i:04d}.nii.gz", "label": f"labelsTr/{name}"})
    edit(root, training=entries)
    dataset = read_dataset(root)
    assert [case.id for case in dataset.cases] == ["case_0000", "case_0001", "case_0002"]
    assert all(len(case.images) == 1 for case in dataset.cases) and dataset.layout == "msd"


@pytest.mark.parametrize("channels", [("T1",), ("T1", "T2", "FLAIR")])
def test_nnunet_v2_layout(copy_nnunet: Copy, channels: tuple[str, ...]) -> None:
    dataset = read_dataset(copy_nnunet(4, channels))
    assert (dataset.layout, dataset.channels, len(dataset.cases)) == ("nnunet_v2", channels, 4)
    assert dataset.file_ending == ".nii.gz"
    for case in dataset.cases:
        assert [path.name for path in case.images] == [f"{case.id}_{i:04d}.nii.gz" for i in range(len(channels))]
        assert read_case(case, dataset)[0].array.shape[0] == len(channels)


def test_channel_number_is_optional_for_a_single_channel(copy_nnunet: Copy) -> None:
    root = copy_nnunet(3)
    paths = sorted((root / "imagesTr").iterdir())
    paths[0].rename(paths[0].with_name(paths[0].name.replace("_0000", "")))
    dataset = read_dataset(root)
    assert len(dataset.cases) == 3
    assert all(case.images[0].is_file() and case.label and case.label.is_file() for case in dataset.cases)


def test_names_that_end_in_four_digits_are_no_channels(copy_nnunet: Copy) -> None:
    root = copy_nnunet(3)
    for folder in ("imagesTr", "labelsTr"):
        for i, path in enumerate(sorted((root / folder).iterdir())):
            path.rename(path.with_name(f"scan_{i:04d}.nii.gz"))
    assert [case.id for case in read_dataset(root).cases] == ["scan_0000", "scan_0001", "scan_0002"]


def test_the_case_of_an_ending_does_not_matter(copy_nnunet: Copy) -> None:
    root = copy_nnunet(3)
    for path in (root / "imagesTr").iterdir():
        path.rename(path.with_name(path.name.replace(".nii.gz", ".NII.GZ")))
    dataset = read_dataset(root)
    assert len(dataset.cases) == 3 and all(path.is_file() for case in dataset.cases for path in case.images)


def test_explicit_paths(copy_nnunet: Copy) -> None:
    root = copy_nnunet(2)
    image = next((root / "imagesTr").iterdir())
    elsewhere = root.parent / "elsewhere.nii.gz"
    shutil.move(image, elsewhere)
    label = root / "labelsTr" / image.name.replace("_0000", "")
    entry = {"images": ["../elsewhere.nii.gz"], "label": f"labelsTr/{label.name}"}
    edit(root, dataset={"mine": entry})
    assert read_dataset(root).layout == "explicit"
    (case,) = read_dataset(root).cases
    assert case.id == "mine" and case.label == label
    assert case.images[0].resolve() == elsewhere.resolve()
    edit(root, dataset={"mine": {"label": "x"}})
    with pytest.raises(UserError, match=r"dataset\.mine is not"):
        read_dataset(root)


def test_explicit_paths_with_variables(copy_nnunet: Copy, monkeypatch: pytest.MonkeyPatch) -> None:
    root = copy_nnunet(2)
    monkeypatch.setenv("NNLITE_TEST_DATA", str(root / "imagesTr"))
    edit(root, dataset={"mine": {"images": ["$NNLITE_TEST_DATA/a.nii.gz"]}})
    assert read_dataset(root).cases[0].images == (root / "imagesTr" / "a.nii.gz",)


def test_a_data_set_is_called_as_its_folder(copy_dataset: Copy, monkeypatch: pytest.MonkeyPatch) -> None:
    root = copy_dataset(2, "Task01_A")
    monkeypatch.chdir(root / "imagesTr")
    dataset = read_dataset(Path(".."))
    assert (dataset.name, dataset.root) == ("Task01_A", root)


def test_4d_images_are_channels(copy_nnunet: Copy) -> None:
    root = copy_nnunet(3, ("T1", "T2"))
    for path in sorted((root / "imagesTr").glob("*_0000.nii.gz")):
        image = sitk.ReadImage(path)
        sitk.WriteImage(sitk.JoinSeries([image, image + 1]), path.with_name(path.name.replace("_0000", "")))
        path.unlink()
        path.with_name(path.name.replace("_0000", "_0001")).unlink()
    dataset = read_dataset(root)
    array = read_case(dataset.cases[0], dataset)[0].array
    assert np.array_equal(array[0] + 1, array[1])


def test_plain_folder_of_pictures_and_0_255_masks(tmp_path: Path) -> None:
    save_pictures(tmp_path / "nuclei")
    dataset = read_dataset(tmp_path / "nuclei")
    assert (dataset.layout, dataset.channels, dataset.file_ending) == ("plain", ("R", "G", "B"), ".png")
    assert dataset.labels.names == {"background": 0, "label_1": 1}
    assert dataset.label_map == {255: 1}
    assert dataset.notes[1] == "label maps hold 0 and 255: 255 is read as 1"
    image, label = read_case(dataset.cases[0], dataset)
    assert image.array.shape == (3, 1, 16, 20)
    assert label is not None and set(np.unique(label)) == {0, 1}


def test_plain_folder_of_volumes_with_any_label_values(copy_nnunet: Copy) -> None:
    root = copy_nnunet(3, ("a", "b"))
    (root / "dataset.json").unlink()
    (root / "imagesTr").rename(root / "images")
    (root / "labelsTr").rename(root / "labels")
    for path in (root / "labels").iterdir():
        label = sitk.ReadImage(path)
        sitk.WriteImage(sitk.Cast(label, sitk.sitkInt16) * 7, path)
    dataset = read_dataset(root)
    assert dataset.channels == ("channel_0", "channel_1")
    assert dataset.labels.values == (0, 7, 14)
    assert dataset.label_map is None


def test_masks_of_0_and_255_under_labels_0_and_1(tmp_path: Path) -> None:
    root = tmp_path / "nuclei"
    save_pictures(root)
    table = {"channel_names": {"0": "R", "1": "G", "2": "B"}, "labels": {"background": 0, "nucleus": 1}}
    (root / "dataset.json").write_text(json.dumps(table))
    dataset = read_dataset(root)
    assert dataset.label_map == {255: 1} and "255 is read as 1" in dataset.notes[0]
    label = read_case(dataset.cases[0], dataset)[1]
    assert label is not None and set(np.unique(label)) == {0, 1}


def test_masks_of_0_and_255_are_found_beside_empty_ones(tmp_path: Path) -> None:
    root = tmp_path / "nuclei"
    save_pictures(root, n=7)
    for i in (0, 3, 6):
        Pillow.fromarray(np.zeros((16, 20), np.uint8)).save(root / "labels" / f"p{i}.png")
    table = {"channel_names": {"0": "R", "1": "G", "2": "B"}, "labels": {"background": 0, "nucleus": 1}}
    (root / "dataset.json").write_text(json.dumps(table))
    assert read_dataset(root).label_map == {255: 1}


def test_regions_and_ignore(copy_nnunet: Copy) -> None:
    labels = {"background": 0, "whole": [1, 2], "posterior": 2, "ignore": 3}
    dataset = read_dataset(copy_nnunet(2, labels=labels, regions_class_order=[1, 2]))
    assert dataset.labels.has_regions and dataset.labels.ignore == 3
    assert dataset_from_json(dataset_to_json(dataset)) == dataset


def test_hidden_files_are_not_seen(copy_nnunet: Copy) -> None:
    root = copy_nnunet(2)
    for folder in ("imagesTr", "labelsTr"):
        (root / folder / ".DS_Store").write_bytes(b"x")
        (root / folder / "._hippocampus_001_0000.nii.gz").write_bytes(b"x")
    assert len(read_dataset(root).cases) == 2


def test_json_round_trip(hippocampus: Path, tmp_path: Path) -> None:
    dataset = replace(read_dataset(hippocampus), label_map={255: 1}, notes=("a note",))
    text = json.dumps(dataset_to_json(dataset))
    assert dataset_from_json(json.loads(text)) == dataset


def test_invalid_json_gives_line_and_column(copy_dataset: Copy) -> None:
    root = copy_dataset(2)
    (root / "dataset.json").write_text('{\n "labels": {,}\n}')
    with pytest.raises(UserError, match=r"dataset\.json: invalid JSON at line 2, column 13"):
        read_dataset(root)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"modality": None}, "has no channel_names"),
        ({"modality": {"1": "MRI"}}, r"channel_names has the keys \['1'\]"),
        ({"labels": None}, "has no labels"),
        ({"labels": {"background": 0}}, "labels: there is no foreground label"),
        ({"labels": {"background": 0, "a": 1, "b": 1}}, "two labels share one value"),
        ({"labels": {"background": 0, "a": "x"}}, "are not names with integers"),
        ({"labels": {"background": 0, "a": [1, 2]}}, "regions_class_order must give one value"),
        ({"labels": {"background": 0, "a": 1.5}}, "are not names with integers"),
        ({"training": [{"label": "x"}]}, r"training\[0\] is not"),
        ({"training": [{"image": "x", "label": ["x"]}]}, r"training\[0\] has the label \['x'\]"),
        ({"file_ending": [".nii.gz"]}, r"file_ending is \['\.nii\.gz'\]"),
        ({"dataset": {"a": {"images": [1]}}}, r"dataset\.a has something else than file names"),
        ({"dataset": {"a/b": {"images": ["x"]}}}, "the id 'a/b' holds a /"),
    ],
)
def test_what_dataset_json_may_lack(copy_dataset: Copy, changes: dict[str, object], message: str) -> None:
    root = copy_dataset(2)
    edit(root, **changes)
    with pytest.raises(UserError, match=rf"dataset\.json: .*{message}"):
        read_dataset(root)


def test_no_data_set(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="there is no such folder"):
        read_dataset(tmp_path / "absent")
    with pytest.raises(UserError, match=r"is no dataset. It needs dataset\.json, or the folders images/ and labels/"):
        read_dataset(tmp_path)
    save_pictures(tmp_path / "empty", values=(0, 0))
    with pytest.raises(UserError, match="no label map with anything but zeros"):
        read_dataset(tmp_path / "empty")


def test_find_cases_in_any_mix_of_files(tmp_path: Path, hippocampus: Path) -> None:
    source = next((hippocampus / "imagesTs").iterdir())
    shutil.copy(source, tmp_path / "a_0000.nii.gz")
    shutil.copy(source, tmp_path / "b.nii.gz")
    sitk.WriteImage(sitk.ReadImage(source), tmp_path / "c.nrrd")
    sitk.WriteImage(sitk.ReadImage(source), tmp_path / "scan_0017.mha")
    (tmp_path / ".DS_Store").write_bytes(b"x")
    (tmp_path / "notes.txt").write_text("x")
    cases = find_cases(tmp_path, 1)
    assert [case.id for case in cases] == ["a", "b", "c", "scan_0017"]
    assert all(case.label is None and len(case.images) == 1 for case in cases)
    arrays = [read_image(case.images[0]).array for case in cases]
    assert all(np.array_equal(arrays[0], array) for array in arrays)
    assert find_cases(tmp_path / "a_0000.nii.gz", 1)[0].id == "a"
    shutil.copy(source, tmp_path / "a.nii")
    with pytest.raises(UserError, match="are the same case 'a'"):
        find_cases(tmp_path, 1)


def test_find_cases_with_channels_apart_and_one_missing(tmp_path: Path, hippocampus: Path) -> None:
    source = next((hippocampus / "imagesTs").iterdir())
    for name in ("a_0000", "a_0001", "b_0000"):
        shutil.copy(source, tmp_path / f"{name}.nii.gz")
    a, b = find_cases(tmp_path, 2)
    assert [path.name for path in a.images] == ["a_0000.nii.gz", "a_0001.nii.gz"]
    assert find_cases(tmp_path / "a_0000.nii.gz", 2) == [a]
    assert b.images[1] == tmp_path / "b_0001.nii.gz", "listed, so that reading it says what is missing"
    (tmp_path / "empty" / "patient_1").mkdir(parents=True)
    with pytest.raises(UserError, match=r"holds no image of a supported format; nor do the folders inside it\. "):
        find_cases(tmp_path / "empty", 2)
    (tmp_path / "scan.dcm").write_bytes(b"x")
    with pytest.raises(UserError, match=r"scan\.dcm: is of no supported format\. Supported are \.nii\.gz "):
        find_cases(tmp_path / "scan.dcm", 2)


@pytest.mark.parametrize("channels", [1, 3])
def test_numbered_files_that_each_hold_all_channels_are_cases(tmp_path: Path, channels: int) -> None:
    picture = np.zeros((16, 20) if channels == 1 else (16, 20, 3), np.uint8)
    for i in range(5):
        Pillow.fromarray(picture).save(tmp_path / f"img_{i:04d}.png")
    cases = find_cases(tmp_path, channels)
    assert [case.id for case in cases] == [f"img_{i:04d}" for i in range(5)]
    assert [case for path in sorted(tmp_path.iterdir()) for case in find_cases(path, channels)] == cases


@pytest.mark.parametrize(
    ("names", "channels", "warned"),
    [
        (["case_0000", "case_0001"], 1, True),
        (["a_0000", "a_0001", "a_0002", "b_0000"], 1, True),
        (["case_0000", "case_0001"], 2, False),
        (["case_0001", "case_0002"], 1, False),
        (["case_0000", "scan_0001"], 1, False),
        ([f"frame_{i:04d}" for i in range(12)], 1, False),
    ],
)
def test_channels_that_would_be_predicted_as_cases(
    tmp_path: Path, hippocampus: Path, capfd: pytest.CaptureFixture[str], names: list[str], channels: int, warned: bool
) -> None:
    source = next((hippocampus / "imagesTs").iterdir())
    for name in names:
        shutil.copy(source, tmp_path / f"{name}.nii.gz")
    find_cases(tmp_path, channels)
    lines = capfd.readouterr().err.splitlines()
    assert len(lines) == warned
    if warned:
        first, second = (f"{name}.nii.gz" for name in names[:2])
        assert f"{first} and {second} are predicted as two cases, because the model has one channel" in lines[0]


def test_one_channel_is_known_by_its_label_map(copy_nnunet: Copy) -> None:
    """x_0001 beside x_0000 and the label map x is a channel that dataset.json does not name, and no case."""
    root = copy_nnunet(3, ("T1",))
    image = sorted((root / "imagesTr").iterdir())[0]
    shutil.copy(image, image.with_name(image.name.replace("_0000", "_0001")))
    assert len(read_dataset(root).cases) == 3
    image.unlink()
    (missing,) = (path for case in read_dataset(root).cases for path in case.images if not path.exists())
    assert missing == image, "channel 1 is not taken in its place"


def test_a_file_that_is_a_channel_too_many(tmp_path: Path, hippocampus: Path) -> None:
    source = next((hippocampus / "imagesTr").glob("*.nii.gz"))
    for i in range(3):
        shutil.copy(source, tmp_path / f"a_{i:04d}.nii.gz")
    with pytest.raises(UserError, match=r"a_0002\.nii\.gz: would be channel 2 of a, and the model has 2"):
        find_cases(tmp_path / "a_0002.nii.gz", 2)


def test_one_image_of_all_channels_beside_another_of_one_file_each(copy_nnunet: Copy, tmp_path: Path) -> None:
    source = next(copy_nnunet(1).glob("imagesTr/*"))
    image = sitk.ReadImage(source)
    (tmp_path / "in").mkdir()
    sitk.WriteImage(sitk.JoinSeries([image, image]), tmp_path / "in" / "a.nii.gz")
    for i in range(2):
        shutil.copy(source, tmp_path / "in" / f"b_{i:04d}.nii.gz")
    assert [(case.id, len(case.images)) for case in find_cases(tmp_path / "in", 2)] == [("a", 1), ("b", 2)]
