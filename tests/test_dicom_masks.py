"""Label maps are made of DICOM segmentations and contours, voxel by voxel as they are meant."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from highdicom.seg import Segmentation, SegmentDescription
from pydicom import Dataset, dcmread
from pydicom.dataset import FileMetaDataset
from pydicom.sr.codedict import codes
from pydicom.uid import ExplicitVRLittleEndian, RTStructureSetStorage, generate_uid
from test_dicom import GRID, save_series

from nnunet_lite.data.dicom_masks import convert_masks
from nnunet_lite.data.dicom_writers import _source_images, write_dicom_seg
from nnunet_lite.data.discovery import files_below
from nnunet_lite.data.images import read_geometry, read_image, read_label
from nnunet_lite.data.labels import Labels
from nnunet_lite.errors import UserError

SMALL = replace(GRID, shape=(4, 12, 10))  # oblique
LABELS = Labels(names={"background": 0, "Anterior": 1, "Posterior": 2})
Outlines = dict[str, list[list[tuple[float, float, float]]]]  # structure -> contours -> points (x, y, z) in voxels


def patient(root: Path, number: int = 1, modality: str = "CT") -> Path:
    """A series of one patient; its folder."""
    pixels = np.random.default_rng(number).integers(0, 2000, SMALL.shape)
    folder = save_series(root / f"patient{number}" / "scan", pixels, SMALL, f"7.{number}")
    for path in folder.iterdir():
        header = dcmread(path)
        header.PatientID, header.Modality = f"P {number}", modality
        header.save_as(path)
    return folder


def save_contours(path: Path, series: Path, outlines: Outlines, kind: str = "CLOSED_PLANAR") -> None:
    """An RTSTRUCT file with contours on the grid `SMALL`."""
    scan = dcmread(next(series.iterdir()), stop_before_pixels=True)
    d, of_series, study, frame = Dataset(), Dataset(), Dataset(), Dataset()
    d.file_meta = FileMetaDataset()
    d.file_meta.MediaStorageSOPClassUID = d.SOPClassUID = RTStructureSetStorage
    d.file_meta.MediaStorageSOPInstanceUID = d.SOPInstanceUID = generate_uid()
    d.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    d.SeriesInstanceUID, d.Modality = generate_uid(), "RTSTRUCT"
    of_series.SeriesInstanceUID = scan.SeriesInstanceUID
    study.RTReferencedSeriesSequence, frame.RTReferencedStudySequence = [of_series], [study]
    d.ReferencedFrameOfReferenceSequence, d.StructureSetROISequence, d.ROIContourSequence = [frame], [], []
    cosines, (sz, sy, sx) = np.reshape(SMALL.direction, (3, 3)), SMALL.spacing
    for number, (name, contours) in enumerate(outlines.items(), 1):
        structure, shape = Dataset(), Dataset()
        structure.ROINumber = shape.ReferencedROINumber = number
        structure.ROIName, shape.ContourSequence = name, []
        for points in contours:
            contour = Dataset()
            contour.ContourGeometricType, contour.NumberOfContourPoints = kind, len(points)
            places = np.asarray(SMALL.origin) + (np.asarray(points) * (sx, sy, sz)) @ cosines.T
            contour.ContourData = [f"{value:.8f}"[:16] for value in places.ravel()]
            shape.ContourSequence.append(contour)
        d.StructureSetROISequence.append(structure)
        d.ROIContourSequence.append(shape)
    d.save_as(path, enforce_file_format=True)


def box(x: tuple[float, float], y: tuple[float, float], z: float, turn: int = 1) -> list[tuple[float, float, float]]:
    """The outline of a rectangle in a slice."""
    return [(x[0], y[0], z), (x[1], y[0], z), (x[1], y[1], z), (x[0], y[1], z)][::turn]


def convert(root: Path, *patterns: str) -> tuple[list[np.ndarray], dict[str, int], list[str], dict[str, list[str]]]:
    """The label maps in the order of the cases, labels, notes, and what is left out."""
    found, labels, notes = convert_masks(files_below(root), root.parent / "labels", patterns)
    maps = []
    for case in found.cases:
        assert case.label is not None
        array, geometry, _ = read_label(case.label, read_geometry(case.images[0])[0])
        assert geometry.differences(SMALL) == [] and read_image(case.images[0]).array[0].shape == array.shape
        maps.append(array)
    return maps, labels, notes, found.left_out


@pytest.fixture
def truth() -> np.ndarray:
    label = np.zeros(SMALL.shape, np.uint8)
    label[1:3, 2:7, 3:6], label[2, 7:10, 1:9] = 1, 2
    return label


def test_a_segmentation_becomes_the_label_map_that_it_was(tmp_path: Path, truth: np.ndarray) -> None:
    for number in (1, 2):
        series = patient(tmp_path / "data", number)
        write_dicom_seg(series.parent / "masks.dcm", np.roll(truth, number, axis=1), series, LABELS)
    maps, labels, notes, left_out = convert(tmp_path / "data")
    assert labels == {"background": 0, "Anterior": 1, "Posterior": 2} and not notes and not left_out
    np.testing.assert_array_equal(maps, [np.roll(truth, 1, axis=1), np.roll(truth, 2, axis=1)])
    assert sorted(path.name for path in (tmp_path / "labels").iterdir()) == ["P_1.nii.gz", "P_2.nii.gz"]


@pytest.mark.parametrize("kind", ["LABELMAP", "FRACTIONAL"])
def test_segmentations_of_other_programs(tmp_path: Path, truth: np.ndarray, kind: str) -> None:
    """A label map has the background as a segment too; half a voxel and more is inside."""
    series = patient(tmp_path / "data")
    segments = [
        SegmentDescription(number, name, codes.SCT.Organ, codes.SCT.Liver, "MANUAL")
        for number, name in enumerate("AB", 1)
    ]
    shares = np.stack([truth == 1, truth == 2], -1) * 0.6 + 0.2
    file = Segmentation(
        _source_images(series, SMALL.shape), truth if kind == "LABELMAP" else shares, kind, segments,
        generate_uid(), 1, generate_uid(), 1, "maker", "model", "1", "1",
    )  # fmt: skip
    file.save_as(series.parent / "masks.dcm")
    maps, labels, _, _ = convert(tmp_path / "data")
    assert labels == {"background": 0, "A": 1, "B": 2}
    np.testing.assert_array_equal(maps[0], truth)


@pytest.mark.parametrize("turn", [1, -1])
def test_a_voxel_is_inside_a_contour_if_its_centre_is(tmp_path: Path, turn: int) -> None:
    """Also on the contour; contours in one slice are combined by even-odd; one off its slice goes to the nearest."""
    outlines: Outlines = {
        "organ": [box((1.6, 7.4), (2.0, 8.0), 1, turn), box((3.5, 5.5), (4.5, 6.5), 1, -turn)],
        "lesion": [box((0, 1), (0, 3), 2.3, turn), box((8, 30), (9, 40), 3, turn)],
    }
    series = patient(tmp_path / "data")
    save_contours(series.parent / "rt.dcm", series, outlines)
    expected = np.zeros(SMALL.shape, np.uint8)
    expected[1, 2:9, 2:8] = 2
    expected[1, 5:7, 4:6] = 0
    expected[2, 0:4, 0:2] = expected[3, 9:12, 8:10] = 1
    maps, labels, _, _ = convert(tmp_path / "data")
    assert labels == {"background": 0, "lesion": 1, "organ": 2}
    np.testing.assert_array_equal(maps[0], expected)


def test_a_disc_has_the_voxels_within_its_radius(tmp_path: Path) -> None:
    angles = np.linspace(0, 2 * np.pi, 400, endpoint=False)
    disc = [(4.3 + 3.7 * np.cos(a), 5.2 + 3.7 * np.sin(a), 2) for a in angles]
    series = patient(tmp_path / "data")
    save_contours(series.parent / "rt.dcm", series, {"disc": [disc]})
    y, x = np.mgrid[:12, :10]
    maps, _, _, _ = convert(tmp_path / "data")
    np.testing.assert_array_equal(maps[0][2], np.hypot(x - 4.3, y - 5.2) < 3.7)
    assert not maps[0][[0, 1, 3]].any()


def test_the_smaller_of_two_structures_is_taken(tmp_path: Path) -> None:
    series, other = patient(tmp_path / "data"), patient(tmp_path / "data", 2)
    inner, outer = [box((4, 5), (4, 5), 1)], [box((1, 8), (1, 8), 1)]
    save_contours(series.parent / "rt.dcm", series, {"tumour": inner, "liver": outer, "Background": outer, "empty": []})
    save_contours(other.parent / "rt.dcm", other, {"liver": outer})
    maps, labels, notes, _ = convert(tmp_path / "data")
    assert labels == {"background": 0, "liver": 1, "tumour": 2}
    assert (maps[0] == 2).sum() == 4 and (maps[0] == 1).sum() == 60 and (maps[1] == 1).sum() == 64
    assert notes == ["tumour is in 1 of 2 cases", "in larger structures too, and taken from them: 4 voxels of tumour"]


def test_structures_of_one_name_are_one_label(tmp_path: Path, truth: np.ndarray) -> None:
    series, other = patient(tmp_path / "data"), patient(tmp_path / "data", 2)
    overlapping: Outlines = {"Lesion": [box((2, 6), (2, 6), 1)], "Lesion ": [box((4, 8), (2, 6), 1)]}
    save_contours(series.parent / "rt.dcm", series, overlapping)
    write_dicom_seg(other.parent / "seg.dcm", truth, other, Labels(names={"background": 0, "Lesion": 1, "Lesion ": 2}))
    maps, labels, _, _ = convert(tmp_path / "data")
    assert labels == {"background": 0, "Lesion": 1}
    assert maps[0][1, 2:7, 2:9].all() and maps[0].sum() == 5 * 7
    np.testing.assert_array_equal(maps[1], truth > 0)


def test_structures_are_chosen_by_name_or_file(tmp_path: Path) -> None:
    series = patient(tmp_path / "data")
    for rater in (1, 2):
        shapes: Outlines = {"GTV": [box((1, 2), (1, 2), rater)], "BODY": [box((0, 9), (0, 11), 0)]}
        save_contours(series.parent / f"rater{rater}.dcm", series, shapes)
    with pytest.raises(UserError, match=r"rater1\.dcm.*rater2\.dcm have the same structures.*--label"):
        convert(tmp_path / "data")
    maps, labels, _, _ = convert(tmp_path / "data", "rater2.dcm")
    assert set(labels) == {"background", "BODY", "GTV"} and maps[0][2].sum() == 8
    for path in (tmp_path / "labels").iterdir():
        path.unlink()
    (tmp_path / "labels").rmdir()
    (series.parent / "rater2.dcm").unlink()
    _, labels, _, left_out = convert(tmp_path / "data", "GTV*")
    assert labels == {"background": 0, "GTV": 1} and left_out == {"structures that were not chosen": ["BODY"]}
    with pytest.raises(UserError, match="exists already"):
        convert(tmp_path / "data", "GTV*")


def test_two_series_of_a_patient_in_one_folder(tmp_path: Path, truth: np.ndarray) -> None:
    folders = [patient(tmp_path / "apart", number) for number in (1, 2)]
    for number, series in enumerate(folders, 1):
        write_dicom_seg(tmp_path / f"{number}.dcm", truth * (number == 1) + truth * 1, series, Labels(
            names={"background": 0, "a": 1, "b": 2, "c": 4}))  # fmt: skip
    (tmp_path / "data").mkdir()
    for number, series in enumerate(folders, 1):
        for path in series.iterdir():
            header = dcmread(path)
            header.PatientID = "same"
            header.save_as(tmp_path / "data" / f"{number}_{path.name}")
        (tmp_path / f"{number}.dcm").rename(tmp_path / "data" / f"{number}.dcm")
    maps, _, _, _ = convert(tmp_path / "data")
    assert len(maps) == 2 and sorted(path.name for path in (tmp_path / "labels").iterdir()) == [
        "same.nii.gz", "same_2.nii.gz"
    ]  # fmt: skip


def refused(root: Path, says: str, *patterns: str) -> None:
    with pytest.raises(UserError, match=says):
        convert(root, *patterns)
    assert not [path for path in root.parent.iterdir() if path.name != root.name], "nothing is left"


def test_what_is_refused(tmp_path: Path, truth: np.ndarray) -> None:
    root = tmp_path / "data"
    series = patient(root)
    mask = series.parent / "mask.dcm"
    save_contours(mask, series, {"organ": [box((1, 5), (1, 5), 9)]})
    refused(root, r"mask\.dcm: a contour of organ is outside of the slices of its series")
    save_contours(mask, series, {"organ": [[(1, 1, 0), (5, 1, 0), (5, 5, 3)]]})
    refused(root, "a contour of organ is outside of the slices")
    save_contours(mask, series, {"organ": [box((1, 5), (1, 5), 1)]}, "POINT")
    refused(root, "has no mask that can be used")
    save_contours(mask, series, {"organ": [box((1, 5), (1, 5), 1)]})
    refused(root, r"has no mask that can be used: structures that were not chosen \(organ\)", "liver")
    save_contours(mask, series, {"ignore": [box((1, 5), (1, 5), 1)]})
    refused(root, "labels: there is no foreground label")
    write_dicom_seg(mask, truth, series, LABELS)
    mask.write_bytes(mask.read_bytes()[:3000])
    refused(root, r"mask\.dcm: cannot be used as masks of its series")
    write_dicom_seg(mask, truth, series, LABELS)
    for path in series.iterdir():
        path.unlink()
    save_series(series, np.zeros((4, 16, 10)), replace(SMALL, shape=(4, 16, 10), spacing=(2.5, 0.5, 0.8)), "7.1")
    refused(root, r"mask\.dcm: cannot be used as masks of its series")
    other = patient(root, 2, "MR")
    write_dicom_seg(other.parent / "seg.dcm", truth, other, LABELS)
    mask.unlink()
    save_contours(mask, series, {"organ": [box((1, 5), (1, 5), 1)]})
    refused(root, "has masks of CT and MR.*--label")


def test_a_mask_of_another_series(tmp_path: Path) -> None:
    series, other = patient(tmp_path / "data"), patient(tmp_path / "elsewhere", 2)
    save_contours(series.parent / "own.dcm", series, {"organ": [box((1, 5), (1, 5), 1)]})
    save_contours(series.parent / "lost.dcm", other, {"organ": [box((1, 5), (1, 5), 1)]})
    patient(tmp_path / "data", 3)
    _, _, _, left_out = convert(tmp_path / "data")
    assert left_out == {
        "masks that refer to 0 series of the folder": ["patient1/lost.dcm"],
        "series without masks": ["patient3/scan"],
    }
