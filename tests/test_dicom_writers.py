"""Label maps come back voxel by voxel from DICOM segmentations and from contours, by readers that are not ours too."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk
from highdicom.seg import segread
from pydicom import Dataset, dcmread
from skimage.draw import polygon
from test_dicom import GRID, OBLIQUE, change, save_series

from nnunet_lite.data.dicom import is_series, series_geometry, series_slices
from nnunet_lite.data.dicom_masks import convert_masks
from nnunet_lite.data.dicom_writers import outlines, write_dicom_seg, write_rtstruct
from nnunet_lite.data.discovery import files_below
from nnunet_lite.data.images import read_label
from nnunet_lite.data.labels import Labels, label_colours
from nnunet_lite.errors import UserError

REGIONS = Labels(names={"background": 0, "whole": (1, 2, 4), "core": (2, 4), "Rand": 1}, region_order=(1, 2, 1))


@pytest.fixture
def series(tmp_path: Path) -> Path:
    """Eight oblique slices of voxels of 2.5 x 0.7 x 0.8 mm."""
    return save_series(tmp_path / "data" / "patient", np.random.default_rng(0).integers(0, 2000, GRID.shape))


def shapes() -> np.ndarray:
    """What is hard to outline: holes, an island in a hole, walls of one voxel, a voxel alone, diagonals, the border."""
    label_map = np.zeros(GRID.shape, np.uint16)
    y, x = np.mgrid[:50, :35]
    radius = np.hypot(y - 25, x - 17)
    label_map[2, (radius < 15) & (radius > 8)] = 1
    label_map[2, radius < 4] = 1
    label_map[3, 2:40:2, 3:30:2] = 1
    label_map[3, 20:40, 10:30] = 1
    label_map[3, 22:38:4, 12:28:4] = 0
    label_map[3, 30, 20] = 7
    label_map[4] = np.random.default_rng(1).choice([0, 1, 7], (50, 35))
    label_map[5, :3] = label_map[5, :, -2:] = 7
    label_map[6, 25, 17] = label_map[7, 0, 0] = 7
    return label_map


LABELS = Labels(names={"background": 0, "Anterior": 1, "Tumör 肝": 7, "never found": 300})


def read_segmentation(path: Path) -> tuple[np.ndarray, np.ndarray, dict[int, str]]:
    """The label map of a DICOM segmentation, as highdicom reads it, the first voxel in LPS mm, and value -> name."""
    file = segread(path)
    values = {
        int(s.SegmentNumber): int(s.SegmentDescription.removeprefix("label value ")) for s in file.SegmentSequence
    }
    names = {values[int(s.SegmentNumber)]: str(s.SegmentLabel) for s in file.SegmentSequence}
    volume = file.get_volume(combine_segments=True)
    numbers = volume.array[::-1]  # highdicom counts slices against the normal
    origin = volume.affine[:3] @ [len(numbers) - 1, 0, 0, 1]
    return np.select([numbers == number for number in values], list(values.values())), origin, names


@pytest.mark.parametrize("where", [slice(2, 6), slice(4, 5), slice(0, 0)])
def test_segmentations_come_back(series: Path, tmp_path: Path, where: slice) -> None:
    path, random = tmp_path / "out" / "seg.dcm", np.random.default_rng(0)
    segmentation = np.zeros(GRID.shape, np.uint16)
    segmentation[where] = random.choice([0, 1, 7], segmentation[where].shape)
    write_dicom_seg(path, segmentation, series, LABELS)
    back, origin, names = read_segmentation(path)
    if segmentation.any():
        np.testing.assert_array_equal(back, segmentation[where])
        np.testing.assert_allclose(origin, np.add(GRID.origin, where.start * 2.5 * OBLIQUE[:, 2]), atol=1e-6)
        assert names == {1: "Anterior", 7: "Tumör 肝", 300: "never found"}
    else:
        assert not back.any() and names == {1: "Anterior"}


def test_a_segmentation_refers_to_its_series(series: Path, tmp_path: Path) -> None:
    segmentation = np.ones(GRID.shape, np.uint8)
    write_dicom_seg(tmp_path / "seg.dcm", segmentation, series, LABELS)
    d, source = dcmread(tmp_path / "seg.dcm"), [dcmread(s.path) for s in series_slices(series)]
    for name in ("PatientID", "PatientName", "StudyInstanceUID", "FrameOfReferenceUID"):
        assert d[name].value == source[0][name].value
    assert d.Modality == "SEG" and d.SeriesInstanceUID != source[0].SeriesInstanceUID
    referred = d.ReferencedSeriesSequence[0]
    assert referred.SeriesInstanceUID == source[0].SeriesInstanceUID
    uids = {item.ReferencedSOPInstanceUID for item in referred.ReferencedInstanceSequence}
    assert uids == {image.SOPInstanceUID for image in source}
    assert [s.SegmentLabel for s in d.SegmentSequence] == list(LABELS.segments)
    assert not is_series(tmp_path / "seg.dcm"), "no image to predict"
    with pytest.raises(UserError, match=r"label values \[2\] are not among"):
        write_dicom_seg(tmp_path / "seg.dcm", segmentation * 2, series, LABELS)
    with pytest.raises(ValueError, match=r"shape \(3, 50, 35\) for a series of shape \(8, 50, 35\)"):
        write_dicom_seg(tmp_path / "seg.dcm", segmentation[:3], series, LABELS)


def test_a_series_whose_uids_were_emptied(series: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def anonymise(i: int, d: Dataset) -> None:
        for name in ("SOPClassUID", "SOPInstanceUID", "StudyInstanceUID", "SeriesInstanceUID", "PatientID"):
            setattr(d, name, "")

    instances = [s.path for s in series_slices(series)]
    change(series, anonymise)
    studies = set()
    for name in ("a.dcm", "b.dcm"):
        write_dicom_seg(tmp_path / name, np.ones(GRID.shape, np.uint8), series, LABELS)
        d = dcmread(tmp_path / name)
        studies.add(d.StudyInstanceUID)
        assert len(d.ReferencedSeriesSequence[0].ReferencedInstanceSequence) == len(instances)
    assert len(studies) == 1 and "" not in studies
    assert "has no StudyInstanceUID, SeriesInstanceUID; viewers may not" in capsys.readouterr().err


def test_regions_overlap_in_a_segmentation(series: Path, tmp_path: Path) -> None:
    label_map = np.random.default_rng(0).choice([0, 1, 2, 4], GRID.shape).astype(np.uint8)
    write_dicom_seg(tmp_path / "seg.dcm", label_map, series, REGIONS)
    file = segread(tmp_path / "seg.dcm")
    array = file.get_volume().array[::-1]
    assert [s.SegmentLabel for s in file.SegmentSequence] == ["whole", "core", "Rand"]
    for segment, values in enumerate(((1, 2, 4), (2, 4), (1,))):
        np.testing.assert_array_equal(array[..., segment], np.isin(label_map, values))
    colours = [s.RecommendedDisplayCIELabValue for s in file.SegmentSequence]
    assert len({tuple(colour) for colour in colours}) == 3


# ------------------------------------------------------------------------------------------------------------- contours


def fill(file: Path, series: Path, union: bool) -> dict[str, np.ndarray]:
    """The masks of an RTSTRUCT file, with the geometry of ITK and the polygons of scikit-image: no code of ours.

    Contours of a slice are united, as the standard has it, or combined by even-odd, as many programs do.
    """
    header = dcmread(file)
    image = sitk.ReadImage(sitk.ImageSeriesReader.GetGDCMSeriesFileNames(str(series)))
    shape = image.GetSize()[::-1]
    names = {roi.ROINumber: roi.ROIName for roi in header.StructureSetROISequence}
    masks = {name: np.zeros(shape, bool) for name in names.values()}
    slices = [dcmread(s.path).SOPInstanceUID for s in series_slices(series)]
    for roi in header.ROIContourSequence:
        for contour in roi.get("ContourSequence", []):
            assert contour.ContourGeometricType == "CLOSED_PLANAR"
            points = np.reshape(np.asarray(contour.ContourData, float), (-1, 3))
            assert len(points) == contour.NumberOfContourPoints
            x, y, z = np.array([image.TransformPhysicalPointToContinuousIndex(point.tolist()) for point in points]).T
            n = round(z.mean())
            assert np.abs(z - n).max() < 1e-3, "planar"
            assert contour.ContourImageSequence[0].ReferencedSOPInstanceUID == slices[n]
            inside = np.zeros(shape[1:], bool)
            inside[polygon(y, x, inside.shape)] = True
            mask = masks[names[roi.ReferencedROINumber]][n]
            mask[:] = mask | inside if union else mask ^ inside
    return masks


@pytest.mark.parametrize("union", [True, False])
def test_contours_come_back(series: Path, tmp_path: Path, union: bool) -> None:
    label_map = shapes()
    write_rtstruct(tmp_path / "rt.dcm", label_map, series_geometry(series), series, LABELS)
    masks = fill(tmp_path / "rt.dcm", series, union)
    assert list(masks) == ["Anterior", "Tumör 肝", "never found"] and not masks["never found"].any()
    for name, values in LABELS.segments.items():
        np.testing.assert_array_equal(masks[name], np.isin(label_map, values))


def test_contours_come_back_by_the_reader_of_init(series: Path, tmp_path: Path) -> None:
    label_map = shapes()
    write_rtstruct(series.parent / "rt.dcm", label_map, series_geometry(series), series, LABELS)
    found, values, notes = convert_masks(files_below(series.parent), tmp_path / "labels")
    assert values == {"background": 0, "Anterior": 1, "Tumör 肝": 2} and not notes, "no structures overlap"
    (case,) = found.cases
    assert case.label is not None
    np.testing.assert_array_equal(read_label(case.label)[0], np.select([label_map == 1, label_map == 7], [1, 2]))


def test_regions_overlap_in_contours(series: Path, tmp_path: Path) -> None:
    label_map = np.random.default_rng(0).choice([0, 1, 2, 4], GRID.shape).astype(np.uint8)
    label_map[4:] = 0
    write_rtstruct(tmp_path / "rt.dcm", label_map, series_geometry(series), series, REGIONS)
    masks = fill(tmp_path / "rt.dcm", series, union=False)
    for name, values in REGIONS.segments.items():
        np.testing.assert_array_equal(masks[name], np.isin(label_map, values))


def test_outlines_of_any_mask() -> None:
    """An outline is half a pixel smaller than its pixels, and a hole as much larger: volumes stay."""
    random, n_outlines = np.random.default_rng(0), 0
    for share in (0.05, 0.3, 0.5, 0.7, 0.95) * 8:
        mask = random.random((13, 17)) < share
        back, area = np.zeros(mask.shape, bool), 0.0
        for outline in outlines(mask):
            x, y = outline.T
            back[polygon(y, x, mask.shape)] = True
            area += abs(np.sum(x * np.roll(y, -1) - y * np.roll(x, -1))) / 2
            n_outlines += 1
        np.testing.assert_array_equal(back, mask)
        assert abs(area - mask.sum()) <= mask.size / 4
    assert n_outlines > 500
    (square,) = outlines(np.pad(np.ones((20, 30), bool), 2))
    assert len(square) == 8, "only the points where it turns"


def test_a_structure_set_refers_to_its_series(series: Path, tmp_path: Path) -> None:
    write_rtstruct(tmp_path / "rt.dcm", shapes(), series_geometry(series), series, LABELS)
    d, source = dcmread(tmp_path / "rt.dcm"), [dcmread(s.path) for s in series_slices(series)]
    for name in ("PatientID", "PatientName", "StudyInstanceUID", "FrameOfReferenceUID"):
        assert d[name].value == source[0][name].value
    assert d.Modality == "RTSTRUCT" and d.SeriesInstanceUID != source[0].SeriesInstanceUID
    (frame,) = d.ReferencedFrameOfReferenceSequence
    of_series = frame.RTReferencedStudySequence[0].RTReferencedSeriesSequence[0]
    assert frame.FrameOfReferenceUID == source[0].FrameOfReferenceUID
    assert of_series.SeriesInstanceUID == source[0].SeriesInstanceUID
    uids = [item.ReferencedSOPInstanceUID for item in of_series.ContourImageSequence]
    assert uids == [image.SOPInstanceUID for image in source]
    assert [tuple(roi.ROIDisplayColor) for roi in d.ROIContourSequence] == label_colours(3)
    assert [item.ReferencedROINumber for item in d.RTROIObservationsSequence] == [1, 2, 3]
    assert not is_series(tmp_path / "rt.dcm"), "no image to predict"
    with pytest.raises(ValueError, match=r"shape \(3, 50, 35\) for a series of shape \(8, 50, 35\)"):
        write_rtstruct(tmp_path / "rt.dcm", shapes()[:3], GRID, series, LABELS)


def test_one_slice_and_long_names(tmp_path: Path) -> None:
    grid = replace(GRID, shape=(1, 50, 35))
    series = save_series(tmp_path / "one", np.ones(grid.shape), grid)
    labels = Labels(names={"background": 0, "Ü" * 100: 1})
    write_rtstruct(tmp_path / "rt.dcm", shapes()[2:3], series_geometry(series), series, labels)
    write_dicom_seg(tmp_path / "seg.dcm", shapes()[2:3], series, labels)
    assert dcmread(tmp_path / "rt.dcm").StructureSetROISequence[0].ROIName == "Ü" * 64
    assert fill(tmp_path / "rt.dcm", series, union=True)["Ü" * 64].sum() == (shapes()[2] == 1).sum()
