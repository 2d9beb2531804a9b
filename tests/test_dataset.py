"""Datasets in every layout, and cases to predict in any folder."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk
from bad_inputs import edit, setting
from PIL import Image as Pillow
from samples import Copy, described

from nnunet_lite.data.cases import find_cases
from nnunet_lite.data.dataset import dataset_from_json, dataset_to_json, read_case, read_dataset
from nnunet_lite.data.images import read_image
from nnunet_lite.errors import UserError


def update(root: Path, **changes: object) -> None:
    edit(root / "dataset.json", setting(**changes))


def copies(source: Path, folder: Path, *names: str) -> None:
    """Copies of a NIfTI file under other names."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in names:
        shutil.copy(source, folder / f"{name}.nii.gz")


@pytest.fixture
def scan(hippocampus: Path) -> Path:
    return min((hippocampus / "imagesTs").iterdir())


# ------------------------------------------------------------------------------------------------------------- layouts


def test_msd_layout(hippocampus: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(hippocampus / "imagesTr")
    dataset = read_dataset(Path(".."))
    assert (dataset.layout, dataset.name, dataset.channels) == ("msd", "Task04_Hippocampus", ("MRI",))
    assert len(dataset.cases) == 32, "only the training cases"
    assert [case.id for case in dataset.cases] == sorted(case.id for case in dataset.cases)
    assert dataset.labels.names == {"background": 0, "Anterior": 1, "Posterior": 2}
    assert all(path.is_file() for case in dataset.cases for path in (*case.images, case.label) if path)
    image, label = read_case(dataset.cases[0], dataset)
    assert label is not None and image.array.shape[1:] == label.shape
    assert set(np.unique(label)) == {0, 1, 2}
    with pytest.raises(UserError, match="there is no such folder"):
        read_dataset(hippocampus / "absent")


def test_nnunet_v1_layout(copy_dataset: Copy) -> None:
    root = copy_dataset(3)
    for path in (root / "imagesTr").iterdir():
        path.rename(path.with_name(path.name.replace(".nii.gz", "_0000.nii.gz")))
    dataset = read_dataset(root)
    assert dataset.layout == "nnunet_v1"
    assert [case.images[0].name for case in dataset.cases] == [f"{case.id}_0000.nii.gz" for case in dataset.cases]


@pytest.mark.parametrize("channels", [("T1",), ("T1", "T2", "FLAIR")])
@pytest.mark.parametrize("listed", [False, True])
def test_nnunet_v2_layout(copy_nnunet: Copy, channels: tuple[str, ...], listed: bool) -> None:
    """A listed x_0000 is the case x with its other channels; with a single channel its name is x_0000."""
    root = copy_nnunet(3, channels)
    names = [path.name.removesuffix(".nii.gz") for path in sorted((root / "labelsTr").iterdir())]
    if listed:
        entries = [{"image": f"./imagesTr/{name}_0000.nii.gz", "label": f"./labelsTr/{name}.nii.gz"} for name in names]
        update(root, training=entries)
    dataset = read_dataset(root)
    ids = [f"{name}_0000" if listed and not channels[1:] else name for name in names]
    assert ([case.id for case in dataset.cases], dataset.channels, dataset.file_ending) == (ids, channels, ".nii.gz")
    assert dataset.layout == (("nnunet_v1" if channels[1:] else "msd") if listed else "nnunet_v2")
    for case, name in zip(dataset.cases, names, strict=True):
        assert [path.name for path in case.images] == [f"{name}_{i:04d}.nii.gz" for i in range(len(channels))]
        assert read_case(case, dataset)[0].array.shape[0] == len(channels)


@pytest.mark.parametrize("listed", [False, True])
def test_files_that_each_contain_all_channels(copy_nnunet: Copy, listed: bool) -> None:
    """If they are listed, case_0000 and case_0001 are two cases."""
    root = copy_nnunet(3, ("T1", "T2"))
    entries = []
    for i, path in enumerate(sorted((root / "imagesTr").glob("*_0000.nii.gz"))):
        image, name = sitk.ReadImage(path), path.name.replace("_0000", "")
        new = path.with_name(f"case_{i:04d}.nii.gz" if listed else name)
        sitk.WriteImage(sitk.JoinSeries([image, image + 1]), new)
        entries.append({"image": f"imagesTr/{new.name}", "label": f"labelsTr/{name}"})
        path.unlink()
        path.with_name(path.name.replace("_0000", "_0001")).unlink()
    if listed:
        update(root, training=entries)
    dataset = read_dataset(root)
    assert dataset.layout == ("msd" if listed else "nnunet_v2")
    assert [case.images for case in dataset.cases] == [(path,) for path in sorted((root / "imagesTr").iterdir())]
    array = read_case(dataset.cases[0], dataset)[0].array
    assert np.array_equal(array[0] + 1, array[1])


@pytest.mark.parametrize(
    ("old", "new"), [("_0000.nii.gz", ".nii.gz"), (".nii.gz", ".NII.GZ")], ids=["no number", "upper case"]
)
def test_names_of_a_single_channel(copy_nnunet: Copy, old: str, new: str) -> None:
    root = copy_nnunet(3)
    for path in sorted((root / "imagesTr").iterdir())[:2]:
        path.rename(path.with_name(path.name.replace(old, new)))
    for folder in ("imagesTr", "labelsTr"):  # hidden files do not count
        (root / folder / ".DS_Store").write_bytes(b"x")
        (root / folder / "._hippocampus_001_0000.nii.gz").write_bytes(b"x")
    dataset = read_dataset(root)
    assert len(dataset.cases) == 3
    assert all(case.images[0].is_file() and case.label and case.label.is_file() for case in dataset.cases)


def test_names_that_end_in_four_digits_are_no_channels(copy_nnunet: Copy) -> None:
    root = copy_nnunet(3)
    for folder in ("imagesTr", "labelsTr"):
        for i, path in enumerate(sorted((root / folder).iterdir())):
            path.rename(path.with_name(f"scan_{i:04d}.nii.gz"))
    assert [case.id for case in read_dataset(root).cases] == ["scan_0000", "scan_0001", "scan_0002"]


def test_explicit_paths(copy_nnunet: Copy, monkeypatch: pytest.MonkeyPatch) -> None:
    root = copy_nnunet(2)
    update(root, dataset={"mine": {"images": ["../elsewhere.nii.gz"], "label": "labelsTr/hippocampus_001.nii.gz"}})
    dataset = read_dataset(root)
    (case,) = dataset.cases
    assert (dataset.layout, case.id, case.label) == ("explicit", "mine", root / "labelsTr" / "hippocampus_001.nii.gz")
    assert case.images[0].resolve() == root.parent / "elsewhere.nii.gz"
    monkeypatch.setenv("NNLITE_TEST_DATA", str(root / "imagesTr"))
    update(root, dataset={"mine": {"images": ["$NNLITE_TEST_DATA/a.nii.gz"]}})
    assert read_dataset(root).cases[0].images == (root / "imagesTr" / "a.nii.gz",)


@pytest.mark.parametrize("with_table", [False, True])
@pytest.mark.parametrize("empty", [(), (0, 3, 6)])
def test_pictures_with_masks_of_0_and_255(tmp_path: Path, with_table: bool, empty: tuple[int, ...]) -> None:
    """In the plain layout and with dataset.json; also if the first masks are empty."""
    rng = np.random.default_rng(0)
    for folder in ("images", "labels"):
        (tmp_path / folder).mkdir()
    for i in range(7):
        mask = np.zeros((16, 20)) if i in empty else 255 * rng.integers(0, 2, (16, 20))
        Pillow.fromarray(rng.integers(0, 256, (16, 20, 3)).astype(np.uint8)).save(tmp_path / f"images/p{i}.png")
        Pillow.fromarray(mask.astype(np.uint8)).save(tmp_path / f"labels/p{i}.png")
    if with_table:
        (tmp_path / "dataset.json").write_text(json.dumps(described("R", "G", "B", file_ending=None)))
    dataset = read_dataset(tmp_path)
    assert (dataset.channels, dataset.file_ending, dataset.value_map) == (("R", "G", "B"), ".png", {255: 1})
    assert dataset.labels.names == ({"background": 0, "a" if with_table else "label_1": 1})
    assert dataset.notes[-1] == "label maps hold 0 and 255: 255 is read as 1, and predictions hold 1"
    image, label = read_case(dataset.cases[1], dataset)
    assert image.array.shape == (3, 1, 16, 20)
    assert label is not None and set(np.unique(label)) == {0, 1}


def test_json_round_trip(hippocampus: Path, copy_nnunet: Copy) -> None:
    labels = {"background": 0, "whole": [1, 2], "posterior": 2, "ignore": 3}
    regions = read_dataset(copy_nnunet(2, labels=labels, regions_class_order=[1, 2]))
    assert regions.labels.has_regions and regions.labels.ignore == 3
    mapped = replace(read_dataset(hippocampus), value_map={255: 1}, notes=("a note",))
    for dataset in (regions, mapped, replace(mapped, orientation="RAS", accept=("origin",), excluded=mapped.cases[:1])):
        assert dataset_from_json(json.loads(json.dumps(dataset_to_json(dataset)))) == dataset


def test_a_channel_is_recognised_by_its_label_map(copy_nnunet: Copy) -> None:
    """x_0001 beside x_0000 and the label map x is a channel that dataset.json does not name, and no case."""
    root = copy_nnunet(3, ("T1",))
    image = sorted((root / "imagesTr").iterdir())[0]
    shutil.copy(image, image.with_name(image.name.replace("_0000", "_0001")))
    assert len(read_dataset(root).cases) == 3
    image.unlink()
    (missing,) = (path for case in read_dataset(root).cases for path in case.images if not path.exists())
    assert missing == image, "channel 1 does not replace it"


# ----------------------------------------------------------------------------------------------------- cases to predict


def test_find_cases_in_any_mix_of_files(tmp_path: Path, scan: Path) -> None:
    copies(scan, tmp_path, "a_0000", "b")
    for name in ("c.nrrd", "scan_0017.mha"):
        sitk.WriteImage(sitk.ReadImage(scan), tmp_path / name)
    for name in (".DS_Store", "notes.txt"):
        (tmp_path / name).write_text("x")
    cases = find_cases([tmp_path], 1)
    assert [case.id for case in cases] == ["a", "b", "c", "scan_0017"]
    assert all(case.label is None and len(case.images) == 1 for case in cases)
    arrays = [read_image(case.images[0]).array for case in cases]
    assert all(np.array_equal(arrays[0], array) for array in arrays)
    assert find_cases([tmp_path / "a_0000.nii.gz"], 1)[0].id == "a"
    shutil.copy(scan, tmp_path / "a.nii")
    with pytest.raises(UserError, match="are the same case 'a'"):
        find_cases([tmp_path], 1)


def test_find_cases_of_several_files(tmp_path: Path, scan: Path) -> None:
    """One channel is missing, one is not of the model, and one file contains both."""
    copies(scan, tmp_path / "in", "a_0000", "a_0001", "b_0000")
    a, b = find_cases([tmp_path / "in"], 2)
    assert [path.name for path in a.images] == ["a_0000.nii.gz", "a_0001.nii.gz"]
    assert find_cases([tmp_path / "in" / "a_0000.nii.gz"], 2) == [a]
    assert b.images[1] == tmp_path / "in" / "b_0001.nii.gz", "listed, so that reading it says what is missing"
    image = sitk.ReadImage(scan)
    sitk.WriteImage(sitk.JoinSeries([image, image]), tmp_path / "in" / "c.nii.gz")
    assert [(case.id, len(case.images)) for case in find_cases([tmp_path / "in"], 2)] == [("a", 2), ("b", 2), ("c", 1)]
    copies(scan, tmp_path / "in", "a_0002")
    (tmp_path / "empty" / "patient_1").mkdir(parents=True)
    (tmp_path / "scan.dcm").write_bytes(b"x")
    for name, says in (
        ("in/a_0002.nii.gz", r"a_0002\.nii\.gz: would be channel 2 of a, and the model has 2"),
        ("empty", r"holds no image of a supported format; nor do the folders inside it\. "),
        ("scan.dcm", r"scan\.dcm: is of no supported format\. Supported are \.nii\.gz "),
    ):
        with pytest.raises(UserError, match=says):
            find_cases([tmp_path / name], 2)


def test_case_folders_whose_files_have_the_names_of_channels(tmp_path: Path, scan: Path) -> None:
    """As `nnlite init` finds them for training: a model of t1 and FLAIR needs no other names for new patients."""
    copies(scan, tmp_path / "in" / "P1", "flair", "t1", "mask")
    copies(scan, tmp_path / "in" / "P2", "P2_T1", "P2-FLAIR", "P2_t1ce")
    cases = find_cases([tmp_path / "in"], 2, ["t1", "FLAIR"])
    names = [(case.id, *(path.name for path in case.images)) for case in cases]
    assert names == [("P1", "t1.nii.gz", "flair.nii.gz"), ("P2", "P2_T1.nii.gz", "P2-FLAIR.nii.gz")]
    assert [case.images[0].name for case in find_cases([tmp_path / "in"], 1, ["t1"])] == ["t1.nii.gz", "P2_T1.nii.gz"]
    copies(scan, tmp_path / "in" / "P2", "old_t1")
    with pytest.raises(
        UserError, match=r"hold one case: 2 files of channel t1\. .* for each channel of the model: \*t1\.\*"
    ):
        find_cases([tmp_path / "in"], 2, ["t1", "FLAIR"])
    copies(scan, tmp_path / "one" / "P3", "t1", "flair_on_t1")
    (case,) = find_cases([tmp_path / "one"], 2, ["flair_on_t1", "t1"])
    assert [path.name for path in case.images] == ["flair_on_t1.nii.gz", "t1.nii.gz"]


def test_images_deeper_in_case_folders(tmp_path: Path, scan: Path) -> None:
    """As in BIDS: the case has the name of the patient, with the visit if there are several; masks are no images."""
    copies(scan, tmp_path / "in" / "sub-01" / "anat", "sub-01_T1w", "sub-01_FLAIR")
    copies(scan, tmp_path / "in" / "sub-01" / "masks", "lesion")
    copies(scan, tmp_path / "in" / "sub-02" / "v1" / "anat", "T1w", "FLAIR")
    copies(scan, tmp_path / "in" / "sub-02" / "v2" / "anat", "T1w", "FLAIR")
    copies(scan, tmp_path / "in" / "derivatives" / "sub-01", "T1w_seg")
    cases = find_cases([tmp_path / "in"], 2, ["T1w", "FLAIR"])
    names = [(case.id, [path.parent.name for path in case.images]) for case in cases]
    assert names == [(case, ["anat"] * 2) for case in ("sub-01", "sub-02_v1", "sub-02_v2")]


def test_the_folder_of_one_patient_names_the_case(tmp_path: Path, scan: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its folders would give all patients one name, such as anat, and a cohort of one patient is no patient."""
    copies(scan, tmp_path / "P1" / "sub-01" / "anat", "T1w")
    copies(scan, tmp_path / "in" / "sub-02" / "ses-1" / "anat", "T1w")
    copies(scan, tmp_path / "in" / "sub-02" / "ses-2" / "anat", "T1w")
    copies(scan, tmp_path / "in" / "sub-03" / "DICOM", "scan")
    sources = [tmp_path / "P1" / "sub-01", *sorted((tmp_path / "in").iterdir())]
    names = ["sub-01", "sub-02_ses-1", "sub-02_ses-2", "sub-03"]
    assert [case.id for case in find_cases(sources, 1)] == names
    assert [case.id for case in find_cases([tmp_path / "P1", tmp_path / "in"], 1)] == names
    monkeypatch.chdir(tmp_path / "P1" / "sub-01")
    assert [case.id for case in find_cases([Path()], 1)] == ["sub-01"]
    copies(scan, tmp_path / "sub-04" / "anat" / "a" / "b" / "c" / "d", "T1w")  # found there in folders of any names
    assert [case.id for case in find_cases([tmp_path / "sub-04"], 1)] == ["sub-04"]


@pytest.mark.parametrize("channels", [1, 3])
def test_numbered_files_that_each_contain_all_channels_are_cases(tmp_path: Path, channels: int) -> None:
    picture = np.zeros((16, 20) if channels == 1 else (16, 20, 3), np.uint8)
    for i in range(5):
        Pillow.fromarray(picture).save(tmp_path / f"img_{i:04d}.png")
    cases = find_cases([tmp_path], channels)
    assert [case.id for case in cases] == [f"img_{i:04d}" for i in range(5)]
    assert [case for path in sorted(tmp_path.iterdir()) for case in find_cases([path], channels)] == cases


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
    tmp_path: Path, scan: Path, capfd: pytest.CaptureFixture[str], names: list[str], channels: int, warned: bool
) -> None:
    copies(scan, tmp_path, *names)
    find_cases([tmp_path], channels)
    lines = capfd.readouterr().err.splitlines()
    assert len(lines) == warned
    if warned:
        first, second = (f"{name}.nii.gz" for name in names[:2])
        assert f"{first} and {second} are predicted as two cases, because the model has one channel" in lines[0]
