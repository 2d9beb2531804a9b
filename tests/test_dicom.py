"""DICOM series are read as ITK reads them, others refused with the numbers, and segmentations are read back."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import SimpleITK as sitk
from PIL import Image
from pydicom import Dataset, dcmread
from pydicom.dataset import FileMetaDataset
from pydicom.filebase import DicomBytesIO
from pydicom.filewriter import write_dataset
from pydicom.uid import CTImageStorage, ExplicitVRLittleEndian, MRImageStorage, generate_uid

import nnunet_lite
from nnunet_lite.data.cases import Case, find_cases
from nnunet_lite.data.dicom import is_series, require_dicom, series_geometry, series_slices
from nnunet_lite.data.dicom_masks import convert_masks
from nnunet_lite.data.discovery import files_below
from nnunet_lite.data.geometry import Geometry
from nnunet_lite.data.images import read_geometry, read_image, read_images, read_label
from nnunet_lite.data.raw_files import scan_raw_cases
from nnunet_lite.errors import UserError

CASE = "hippocampus_001.nii.gz"
A, B = 0.3, -0.2  # radians
OBLIQUE = np.array([[np.cos(A), -np.sin(A), 0.0], [np.sin(A), np.cos(A), 0.0], [0.0, 0.0, 1.0]]) @ np.array(
    [[1.0, 0.0, 0.0], [0.0, np.cos(B), -np.sin(B)], [0.0, np.sin(B), np.cos(B)]]
)
GRID = Geometry((8, 50, 35), (2.5, 0.7, 0.8), (-12.5, 30.25, 7.0), tuple(OBLIQUE.ravel().tolist()))
Change = Callable[[int, Dataset], object]


def save_slice(path: Path, pixels: np.ndarray, position: Iterable[float], grid: Geometry, series: str) -> None:
    """One file of a CT whose values are the stored pixels - 1024."""
    cosines = np.reshape(grid.direction, (3, 3))
    d = Dataset()
    d.file_meta = FileMetaDataset()
    d.file_meta.MediaStorageSOPClassUID = d.SOPClassUID = CTImageStorage
    d.file_meta.MediaStorageSOPInstanceUID = d.SOPInstanceUID = generate_uid()
    d.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    d.SpecificCharacterSet, d.PatientName, d.PatientID = "ISO_IR 100", "Müller^Änne", "p 17"
    d.PatientBirthDate = d.PatientSex = d.StudyDate = d.StudyTime = d.AccessionNumber = d.StudyID = ""
    d.ReferringPhysicianName = ""
    d.StudyInstanceUID, d.FrameOfReferenceUID, d.SeriesInstanceUID = "1.2.840.1", "1.2.840.2", f"1.2.840.{series}"
    d.Modality, d.SeriesNumber, d.SeriesDescription = "CT", 4, f"Schädel {series}"
    d.ImagePositionPatient = [f"{v:.8f}"[:16] for v in position]
    d.ImageOrientationPatient = [f"{v:.12f}" for v in cosines.T[:2].ravel()]
    d.PixelSpacing, d.SliceThickness = list(grid.spacing[1:]), grid.spacing[0]
    d.Rows, d.Columns = pixels.shape
    d.SamplesPerPixel, d.PhotometricInterpretation, d.PixelRepresentation = 1, "MONOCHROME2", 0
    d.BitsAllocated, d.BitsStored, d.HighBit = 16, 12, 11
    d.RescaleSlope, d.RescaleIntercept = 1, -1024
    d.PixelData = pixels.astype("<u2").tobytes()
    d.save_as(path, enforce_file_format=True)


def save_series(folder: Path, array: np.ndarray, grid: Geometry = GRID, series: str = "1.2.3") -> Path:
    """Files whose names do not tell the order."""
    folder.mkdir(parents=True, exist_ok=True)
    step = np.reshape(grid.direction, (3, 3))[:, 2] * grid.spacing[0]
    order = np.random.default_rng(0).permutation(len(array))
    for i, plane in enumerate(array):
        save_slice(folder / f"IM{order[i]:04d}", plane, np.asarray(grid.origin) + i * step, grid, series)
    return folder


def change(folder: Path, how: Change) -> None:
    """Edit the files in the order of the slices."""
    for i, path in enumerate([s.path for s in series_slices(folder)]):
        d = dcmread(path)
        how(i, d)
        d.save_as(path)


@pytest.fixture
def pixels(hippocampus: Path) -> np.ndarray:
    """Eight slices of a real image, as stored in DICOM."""
    array = read_image(hippocampus / "imagesTr" / CASE).array[0]
    return np.rint(array[10:18, :50, :35] / array.max() * 4000).astype(np.uint16)


@pytest.fixture
def series(tmp_path: Path, pixels: np.ndarray) -> Path:
    return save_series(tmp_path / "patient", pixels)


def test_a_series_is_what_itk_reads(series: Path, pixels: np.ndarray) -> None:
    image = read_image(series)
    assert image.array.dtype == np.int16
    np.testing.assert_array_equal(image.array[0], pixels.astype(int) - 1024)
    names = sitk.ImageSeriesReader.GetGDCMSeriesFileNames(str(series))
    assert [s.path for s in series_slices(series)] == [Path(name) for name in names]
    reader = sitk.ImageSeriesReader()
    reader.SetFileNames(names)
    whole = reader.Execute()
    np.testing.assert_array_equal(image.array[0], sitk.GetArrayFromImage(whole))
    geometry = image.geometry
    assert geometry.spacing == pytest.approx(whole.GetSpacing()[::-1], abs=1e-12)
    assert geometry.origin == pytest.approx(whole.GetOrigin(), abs=1e-12)
    assert geometry.direction == pytest.approx(whole.GetDirection(), abs=1e-9)
    assert geometry.differences(GRID) == []
    assert read_geometry(series) == (geometry, 1)
    assert image.notes == ("DICOM series of 8 slices",)


def test_each_file_has_its_own_slope_and_class(series: Path, pixels: np.ndarray) -> None:
    def slope(i: int, d: Dataset) -> None:
        d.file_meta.MediaStorageSOPClassUID = d.SOPClassUID = MRImageStorage
        d.Modality, d.RescaleSlope, d.RescaleIntercept = "MR", 1 if i == 0 else 0.5 * i, 3

    change(series, slope)
    array = read_image(series).array[0]
    slopes = np.array([1, *(0.5 * i for i in range(1, 8))])[:, None, None]
    assert array.dtype == np.float32
    np.testing.assert_array_equal(array, pixels * slopes + 3)


@pytest.mark.parametrize("given", ["folder of the patient", "folder", "file"])
def test_a_change_of_any_slice_is_noticed_and_a_hidden_file_is_none(tmp_path: Path, series: Path, given: str) -> None:
    """Raw files are stamped, so that a planned dataset is planned again where one of them has changed."""
    inside = shutil.move(series, tmp_path / "patients" / "p1" / "study")
    first, *_, last = sorted(Path(inside).iterdir())
    case = Case("p1", ({"folder of the patient": first.parents[1], "folder": first.parent, "file": first}[given],))
    stamps, _ = scan_raw_cases([case], {}, 0)
    (first.parent / ".DS_Store").write_bytes(b"of macOS")
    assert scan_raw_cases([case], stamps, 0) == (stamps, {})
    last.write_bytes(last.read_bytes()[:-2] + b"\1\1")
    assert scan_raw_cases([case], stamps, 0)[0] != stamps


def test_a_single_slice_is_as_thick_as_it_says(tmp_path: Path, pixels: np.ndarray) -> None:
    folder = save_series(tmp_path / "one", pixels[:1], GRID)
    assert series_geometry(folder).differences(replace(GRID, shape=(1, *pixels.shape[1:]))) == []
    change(folder, lambda i, d: d.__delattr__("SliceThickness"))
    with pytest.raises(UserError, match="is one slice, of unknown thickness"):
        read_image(folder)


def shifted(mm: float, slices: Iterable[int], axis: int = 2) -> Change:
    """Slices moved along an axis of the image: 0 along a row, 1 along a column, 2 in depth."""

    def how(i: int, d: Dataset) -> None:
        if i in slices:
            place = np.array([float(v) for v in d.ImagePositionPatient]) + mm * OBLIQUE[:, axis]
            d.ImagePositionPatient = [f"{v:.8f}"[:16] for v in place]

    return how


def tilted(i: int, d: Dataset) -> None:
    shifted(2.5 * i * np.tan(np.radians(12)), [i], axis=1)(i, d)


def repeated(i: int, d: Dataset) -> None:
    shifted(-2.5, [i], 2)(i, d) if i % 2 else None
    d.EchoTime = 2.4 + 2.4 * (i % 2)


def only(expected: int, **values: object) -> Change:
    """Set elements of one slice; None removes one."""

    def how(i: int, d: Dataset) -> None:
        for name, value in values.items() if i == expected else ():
            delattr(d, name) if value is None else setattr(d, name, value)

    return how


CROPPED = {"Rows": 20, "Columns": 10, "PixelData": bytes(400)}
COLOURS = {"SamplesPerPixel": 3, "PhotometricInterpretation": "RGB", "PlanarConfiguration": 0, "BitsAllocated": 8}
COLOURS |= {"BitsStored": 8, "HighBit": 7, "PixelData": bytes(50 * 35 * 3 + 50 * 35 * 3 % 2)}


NO_VOLUME: list[tuple[Change, str]] = [
    (tilted, r"patient: gantry tilt: the stack of slices leans by 12 degrees, 3\.72 mm from first"),
    (shifted(0.9, [5], 0), r"IM\d+ is 0\.9 mm off the line of the others"),
    (shifted(0.5, [3]), r"missing slices, or uneven gaps of 2 to 3 mm \(median 2\.5 mm\); the widest follows IM"),
    (shifted(5.0, range(4, 8)), r"missing slices, or uneven gaps of 2\.5 to 7\.5 mm \(median 2\.5 mm\)"),
    (repeated, r"4 of 8 slices have the position .* such as IM\d+ and IM\d+ at \(-12\.5, .* echo time \(2\.4, 4\.8\)"),
    (only(2, **CROPPED), r"differ in rows and columns: \(50, 35\) in IM\d+, \(20, 10\) in IM\d+ \(1 of 8 differ"),
    (only(2, PixelSpacing=[0.7, 0.9]), r"differ in pixel spacing in mm: .*\(0\.7, 0\.9\)"),
    (only(2, ImageOrientationPatient=[0, 1, 0, 0, 0, -1]), r"differ in orientation: .*\(0, 1, 0, 0, 0, -1\)"),
    (only(2, ImageOrientationPatient=[0, 2, 0, 0, 0, -1]), r"has the orientation \(0, 2, 0, 0, 0, -1\) and"),
    (only(2, NumberOfFrames=2, PixelData=bytes(7000)), r"IM\d+: is a multi-frame file of 2 frames"),
    (only(2, **COLOURS), r"IM\d+: holds RGB values, 3 per pixel, not MONOCHROME2"),
    (only(2, ImageType=["ORIGINAL", "PRIMARY", "M", "MOSAIC"]), r"is a mosaic: many slices in one picture"),
    (only(2, ImagePositionPatient=None), r"has no place in space: its position is not there"),
    (only(2, PixelSpacing="0.7"), r"has no place in space: its spacing is '0\.7'"),
    (only(2, PixelData=None), r"IM\d+: is damaged or truncated, or holds no image"),
]


@pytest.mark.parametrize("how, message", NO_VOLUME)
def test_what_is_no_volume_is_refused_with_the_numbers(series: Path, how: Change, message: str) -> None:
    change(series, how)
    with pytest.raises(UserError, match=message) as error:
        read_image(series)
    assert "\n" not in str(error.value)


def test_rounded_positions_are_even(series: Path) -> None:
    change(series, lambda i, d: setattr(d, "ImagePositionPatient", [f"{v:.2f}" for v in d.ImagePositionPatient]))
    assert series_geometry(series).spacing[0] == pytest.approx(2.5, abs=0.005)


def test_a_truncated_file_and_one_that_is_no_dicom(series: Path) -> None:
    path = series / "IM0003"
    path.write_bytes(path.read_bytes()[:-200])
    with pytest.raises(UserError, match="IM0003: is damaged or truncated"):
        read_image(series)
    path.rename(path.with_suffix(".dcm")).write_bytes(b"")
    with pytest.raises(UserError, match=r"IM0003\.dcm: is not a DICOM file, or a damaged one"):
        read_image(series)


def test_other_files_of_a_series_are_ignored(series: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Reports and localizers with and without a preamble, bytes that begin as DICOM, and files without an ending."""
    expected = read_image(series)
    report = dcmread(next(series.iterdir()))
    report.file_meta.MediaStorageSOPClassUID = report.SOPClassUID = "1.2.840.10008.5.1.4.1.1.88.22"
    report.SeriesInstanceUID = "1.9"
    del report.PixelData
    report.save_as(series / "SR0001")
    (series / "SR0002").write_bytes((series / "SR0001").read_bytes()[132:])
    save_slice(series / "scout", np.zeros((9, 9)), (0, 0, 0), Geometry((1, 9, 9), (1.0, 1.0, 1.0)), "1.8")
    scout = dcmread(series / "scout")
    scout.ImageType = ["ORIGINAL", "PRIMARY", "LOCALIZER"]
    scout.save_as(series / "scout")
    (series / "scout2").write_bytes((series / "scout").read_bytes()[132:])
    (series / "raw.txt").write_bytes(b"\x08\0\x05\0" * 300)
    for name in ("notes.txt", ".DS_Store", "LOCKFILE"):
        (series / name).write_text("x")
    capsys.readouterr()
    np.testing.assert_array_equal(read_image(series).array, expected.array)
    assert capsys.readouterr().err == f"warning: {series}: ignored, since it is not DICOM: LOCKFILE\n"
    (series.parent / "study").mkdir()
    shutil.move(series, series.parent / "study" / "thorax")
    shutil.copytree(series.parent / "study" / "thorax", series.parent / "study" / "scouts")
    for path in (series.parent / "study" / "scouts").glob("IM*"):
        path.unlink()
    (case,) = find_cases([series.parent], 1)
    assert case.id == "study", "one series besides its localizer is the only case of a patient"
    with pytest.raises(UserError, match="localizers, masks and reports are none"):
        find_cases([series.parent / "study" / "scouts" / "scout"], 1)


def test_one_of_several_series_is_chosen_by_a_file(series: Path, pixels: np.ndarray) -> None:
    for i, plane in enumerate(pixels[:3]):
        save_slice(series / f"other{i}.dcm", plane, (0, 0, i), Geometry(GRID.shape, (1.0, 1.0, 1.0)), "9.9")
    named = r"holds 2 series: Sch.del 1\.2\.3 \(number 4, 8 files, such as IM0000\); Sch.del 9\.9 \(number 4, 3 files"
    with pytest.raises(UserError, match=named) as error:
        read_image(series)
    assert str(error.value).encode(), "letters of ISO 8859-1 are no UTF-8, and can be printed"
    assert read_image(series / "other1.dcm").array.shape[1] == 3
    assert read_image(series / "IM0005").array.shape[1] == 8
    (case,) = find_cases([series / "other1.dcm"], 1)
    assert (case.id, case.images) == ("other1", (series / "other1.dcm",))


def test_find_cases_in_series_and_case_folders(
    series: Path, pixels: np.ndarray, hippocampus: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (case,) = find_cases([series], 1)
    assert (case.id, case.images) == ("patient", (series,)) and is_series(series)
    root = series.parent
    for name in ("b_0000", "b_0001"):
        save_series(root / name, pixels[:3])
    for n in range(2):
        path = root / "a" / f"scan_{n:04d}.nii.gz"
        path.parent.mkdir(exist_ok=True)
        path.write_bytes((hippocampus / "imagesTr" / CASE).read_bytes())
    (root / "logs").mkdir()
    found = {case.id: case.images for case in find_cases([root], 2)}
    assert found == {
        "a": tuple(root / "a" / f"scan_{n:04d}.nii.gz" for n in range(2)),
        "b": (root / "b_0000", root / "b_0001"),
        "patient": (series,),
    }
    assert read_images(found["b"]).array.shape[:2] == (2, 3)
    assert "folders without an image are ignored: logs" in capsys.readouterr().err
    with pytest.raises(UserError, match=r"a: holds 2 images \(scan_0000.nii.gz, scan_0001.nii.gz\) where"):
        find_cases([root], 1)
    (root / CASE).write_bytes((hippocampus / "imagesTr" / CASE).read_bytes())
    assert [case.id for case in find_cases([root], 1)] == ["hippocampus_001"]
    assert "the DICOM series in b_0000, b_0001, patient are not read" in capsys.readouterr().err


def test_pictures_beside_a_series_are_no_images(
    series: Path, hippocampus: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    Image.new("L", (35, 50)).save(series / "preview.jpg")
    for source in (series, series.parent):
        (case,) = find_cases([source], 1)
        assert (case.id, case.images) == ("patient", (series,))
        assert "holds DICOM files and other images; left out: preview.jpg" in capsys.readouterr().err
    shutil.copy(hippocampus / "imagesTr" / CASE, series)
    assert [case.id for case in find_cases([series], 1)] == ["hippocampus_001", "preview"]
    assert "holds DICOM files and other images; left out: the DICOM files" in capsys.readouterr().err


@pytest.mark.parametrize("kind", ["no preamble", "no meta header, explicit", "no meta header, implicit", "no class"])
def test_files_without_the_preamble(series: Path, kind: str) -> None:
    expected = read_image(series)
    for path in list(series.iterdir()):
        if kind == "no preamble":
            path.write_bytes(path.read_bytes()[132:])
            continue
        d = dcmread(path)
        plain = Dataset()
        plain.update(d)
        if kind == "no class":  # anonymised
            plain.SOPClassUID = ""
        buffer = DicomBytesIO()
        buffer.is_little_endian, buffer.is_implicit_VR = True, kind.endswith("implicit")
        write_dataset(buffer, plain)
        path.write_bytes(buffer.getvalue())
    image = read_image(series)
    np.testing.assert_array_equal(image.array, expected.array)
    assert image.geometry == expected.geometry
    assert [case.id for case in find_cases([series], 1)] == ["patient"]


def test_patient_study_and_series_folders(series: Path, pixels: np.ndarray, tmp_path: Path) -> None:
    root = tmp_path / "export"
    save_series(root / "p1" / "study" / "series", pixels)
    save_series(root / "p2" / "study" / "a", pixels)
    save_series(root / "p2" / "study" / "b", pixels[:3], series="9.9")
    save_series(root / "p3", pixels[:4])
    directory = b"\x02\0\x02\0UI\x14\x001.2.840.10008.1.3.10\0"  # the class of a DICOMDIR
    (root / "DICOMDIR").write_bytes(bytes(128) + b"DICM" + directory + bytes(100))
    found = {case.id: case.images[0] for case in find_cases([root], 1)}
    assert found == {
        "p1": root / "p1",
        "p2_study_a": root / "p2" / "study" / "a",
        "p2_study_b": root / "p2" / "study" / "b",
        "p3": root / "p3",
    }
    assert [read_image(path).array.shape[1] for path in found.values()] == [8, 8, 3, 4]
    assert read_geometry(root / "p1")[0] == read_image(root / "p1").geometry
    with pytest.raises(UserError, match=r"p2: holds 2 series: .*such as study/a/IM.*such as study/b/IM"):
        read_image(root / "p2")


def test_the_extra_is_needed_for_segmentations_only(series: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("pydicom", "highdicom"):
        monkeypatch.setitem(sys.modules, name, None)
    assert read_image(series).array.shape[1] == 8
    with pytest.raises(UserError, match=r"RTSTRUCT need the extra \[dicom\] .* pip install -e '\.\[dicom\]'"):
        require_dicom()


def test_prediction_of_a_series_equals_that_of_its_nifti(tiny_model: Path, hippocampus: Path, tmp_path: Path) -> None:
    image = sitk.ReadImage(str(hippocampus / "imagesTr" / CASE))[:, :, 14:22]
    stored = np.rint(sitk.GetArrayFromImage(image)).astype(np.uint16)
    grid = Geometry(stored.shape, image.GetSpacing()[::-1], image.GetOrigin(), image.GetDirection())
    save_series(tmp_path / "in" / "visit", stored, grid)
    rescaled = sitk.GetImageFromArray(stored.astype(np.int16) - 1024)
    rescaled.CopyInformation(image)
    (tmp_path / "nifti").mkdir()
    sitk.WriteImage(rescaled, str(tmp_path / "nifti" / "visit.nii.gz"))
    options: dict[str, Any] = {"model": tiny_model, "device": "cpu", "settings": {"inference.mirroring": False}}
    (of_series,) = nnunet_lite.predict(tmp_path / "in", tmp_path / "a", **options).files
    (of_nifti,) = nnunet_lite.predict(tmp_path / "nifti", tmp_path / "b", **options).files
    for ending, form in ((".dcm", "dicom-seg"), (".rtstruct.dcm", "rtstruct"), (".seg.nrrd", "seg.nrrd")):
        (file,) = nnunet_lite.predict(tmp_path / "in", tmp_path / "a", format=form, **options).files
        assert file == tmp_path / "a" / f"visit{ending}"
    model = nnunet_lite.load(tiny_model, device="cpu", settings={"inference.mirroring": False})
    for name in ("one.dcm", "one.rtstruct.dcm"):
        model(tmp_path / "in" / "visit").save(tmp_path / name)
    for folder, masks in (("a", "visit.dcm"), ("a", "visit.rtstruct.dcm"), ("", "one.dcm"), ("", "one.rtstruct.dcm")):
        shutil.copy(tmp_path / folder / masks, tmp_path / "in" / "masks.dcm")
        found, values, _ = convert_masks(files_below(tmp_path / "in"), tmp_path / f"labels of {masks}")
        assert list(values) == ["background", "Anterior", "Posterior"]
        np.testing.assert_array_equal(read_label(found.cases[0].label)[0], read_label(of_nifti)[0])
    assert of_series.name == "visit.nii.gz"
    array, geometry, _ = read_label(of_series)
    expected, grid_of_nifti, _ = read_label(of_nifti)
    np.testing.assert_array_equal(array, expected)
    assert geometry.differences(grid_of_nifti) == []
