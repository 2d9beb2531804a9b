"""Images of every format are read with every oddity and written back, or refused."""

from __future__ import annotations

import gzip
import json
import re
import struct
from pathlib import Path

import nibabel
import nrrd
import numpy as np
import pytest
import SimpleITK as sitk
from PIL import Image as Pillow

from nnunet_lite.data.cases import find_cases
from nnunet_lite.data.geometry import Geometry
from nnunet_lite.data.images import label_suffix, read_geometry, read_image, read_images, read_label, write_label
from nnunet_lite.data.names import ending_of, stem
from nnunet_lite.errors import UserError

CASE = "hippocampus_001.nii.gz"
ANGLE = 0.3
OBLIQUE = (np.cos(ANGLE), -np.sin(ANGLE), 0.0, np.sin(ANGLE), np.cos(ANGLE), 0.0, 0.0, 0.0, 1.0)
VOLUME = Geometry((5, 6, 7), (3.0, 0.7, 0.8), (-12.5, 30.25, 7.0), OBLIQUE)
STRAIGHT = Geometry((5, 6, 7), (3.0, 0.7, 0.8), (1.0, 2.0, 3.0))
PICTURE = Geometry((1, 6, 7), (999.0, 1.0, 1.0), dimensions=2)
COUNT = np.arange(60, dtype=np.int16).reshape(3, 4, 5)


def integers(shape: tuple[int, ...], top: int = 3, kind: type = np.uint8) -> np.ndarray:
    return np.random.default_rng(0).integers(0, top + 1, shape).astype(kind)


def save_nifti(path: Path, array: np.ndarray, affine: np.ndarray | None = None) -> Path:
    """Array in nibabel's axis order (x, y, z, ...)."""
    nibabel.save(nibabel.Nifti1Image(array, np.eye(4) if affine is None else affine), path)
    return path


def save(path: Path, array: np.ndarray, mode: str | None = None) -> Path:
    Pillow.fromarray(array, mode=mode).save(path)
    return path


# -------------------------------------------------------------------------------------------------------------- volumes


ROUND_TRIPS = [
    *((suffix, VOLUME) for suffix in (".nii.gz", ".nii", ".nrrd", ".NRRD", ".mha", ".Mha", ".mgz", ".MGZ")),
    *((suffix, STRAIGHT) for suffix in (".gipl", ".gipl.gz", ".GIPL", ".Tif", ".TIFF")),
    *((suffix, PICTURE) for suffix in (".png", ".PNG", ".tif", ".bmp", ".BMP")),
]


@pytest.mark.parametrize("top", [3, 300])
@pytest.mark.parametrize(("suffix", "grid"), ROUND_TRIPS)
def test_label_round_trip_keeps_geometry(tmp_path: Path, suffix: str, grid: Geometry, top: int) -> None:
    """With an ending in any case."""
    path, top = tmp_path / f"case{suffix}", min(top, 255) if suffix.lower() == ".bmp" else top
    array = integers(grid.shape, top, np.int64)
    write_label(path, array, grid)
    back, geometry, notes = read_label(path)
    assert np.array_equal(back, array) and notes == ()
    kind = np.uint8 if top < 256 else np.int16 if path.suffix.lower() == ".mgz" else np.uint16  # MGH has no uint16
    assert back.dtype == kind and geometry.differences(grid) == []
    assert geometry.spacing == pytest.approx(grid.spacing, abs=1e-6)
    assert read_geometry(path) == (geometry, 1)
    assert {p.name for p in tmp_path.iterdir()} <= {path.name, "case.json"}, "no temporary file is left"


@pytest.mark.parametrize("suffix", [".nii.gz", ".nii"])
def test_written_nifti_has_the_affine_of_its_image(tmp_path: Path, suffix: str, hippocampus: Path) -> None:
    affine = np.array([[-0.9, 0.1, 0, 40.5], [0.1, 0.9, 0.05, -20.25], [0, -0.05, 2.5, 3.125], [0, 0, 0, 1.0]])
    lengths = np.linalg.norm(affine[:3, :3], axis=0)
    affine[:3, :3] = np.linalg.qr(affine[:3, :3])[0] * lengths
    image = save_nifti(tmp_path / "image.nii.gz", np.float32(COUNT), affine)
    for source in (image, hippocampus / "imagesTr" / CASE):
        geometry, _ = read_geometry(source)
        write_label(tmp_path / f"out{suffix}", integers(geometry.shape), geometry)
        written = nibabel.load(tmp_path / f"out{suffix}")
        assert np.abs(written.affine - nibabel.load(source).affine).max() < 1e-5
        assert written.get_data_dtype() == np.uint8


def test_sheared_nifti_is_read_and_written_back(tmp_path: Path) -> None:
    affine = np.array([[1, 0, 0.4, 5], [0, 1, 0, 6], [0, 0, 2, 7], [0, 0, 0, 1.0]])
    image = nibabel.Nifti1Image(COUNT, affine)
    image.set_qform(None)
    nibabel.save(image, tmp_path / "sheared.nii.gz")
    read = read_image(tmp_path / "sheared.nii.gz")
    assert np.array_equal(read.array[0], COUNT.T)
    assert read.geometry.spacing == pytest.approx((np.hypot(2, 0.4), 1, 1))
    write_label(tmp_path / "out.nii.gz", integers(read.geometry.shape), read.geometry)
    assert np.abs(nibabel.load(tmp_path / "out.nii.gz").affine - affine).max() < 1e-5


def test_4d_nifti_is_channels_and_2d_nifti_is_flat(tmp_path: Path) -> None:
    array = np.random.default_rng(0).normal(size=(4, 5, 6, 2)).astype(np.float32)
    image = read_image(save_nifti(tmp_path / "a.nii.gz", array))
    assert np.array_equal(image.array, array.transpose(3, 2, 1, 0)) and image.geometry.shape == (6, 5, 4)
    assert read_geometry(tmp_path / "a.nii.gz") == (image.geometry, 2)
    colours = np.zeros((4, 5, 6), [("R", "u1"), ("G", "u1"), ("B", "u1")])
    save_nifti(tmp_path / "rgb.nii.gz", colours)
    assert read_geometry(tmp_path / "rgb.nii.gz")[1] == read_image(tmp_path / "rgb.nii.gz").array.shape[0] == 3
    image = read_image(save_nifti(tmp_path / "flat.nii.gz", COUNT[0], np.diag([0.5, 0.7, 1, 1])))
    assert image.array.shape == (1, 1, 5, 4) and image.geometry.dimensions == 2
    assert image.geometry.spacing == pytest.approx((999 * 0.7, 0.7, 0.5))
    write_label(tmp_path / "out.nii.gz", integers(image.geometry.shape), image.geometry)
    assert nibabel.load(tmp_path / "out.nii.gz").shape == (4, 5)
    assert read_label(tmp_path / "out.nii.gz")[1].differences(image.geometry) == []


def test_nifti2_and_scaled_values(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    nibabel.save(nibabel.Nifti2Image(COUNT, np.eye(4)), tmp_path / "two.nii.gz")
    assert np.array_equal(read_image(tmp_path / "two.nii.gz").array[0], COUNT.T)
    assert capfd.readouterr().err == ""
    scaled = nibabel.Nifti1Image(COUNT, np.eye(4))
    scaled.header.set_slope_inter(2.0, -1000.0)
    nibabel.save(scaled, tmp_path / "a.nii.gz")
    array = read_image(tmp_path / "a.nii.gz").array
    assert array.dtype == np.float32 and array.min() == -1000


def test_headers_that_state_no_spacing(tmp_path: Path) -> None:
    nrrd.write(str(tmp_path / "a.nrrd"), COUNT)
    (tmp_path / "a.mha").write_bytes(
        b"NDims = 3\nDimSize = 3 4 5\nElementType = MET_UCHAR\nElementDataFile = LOCAL\n" + bytes(120)
    )
    for name in ("a.nrrd", "a.mha"):
        image = read_image(tmp_path / name)
        assert not image.geometry.calibrated and image.notes == ("no spacing known, 1x1x1 mm taken",)
        assert not read_geometry(tmp_path / name)[0].calibrated
    nrrd.write(str(tmp_path / "b.nrrd"), COUNT, {"spacings": [1, 1, 1]})
    sitk.WriteImage(sitk.GetImageFromArray(COUNT), str(tmp_path / "c.nrrd"))
    sitk.WriteImage(sitk.GetImageFromArray(COUNT), str(tmp_path / "b.mha"))
    assert all(read_image(tmp_path / name).geometry.calibrated for name in ("b.nrrd", "c.nrrd", "b.mha"))


@pytest.mark.parametrize(("unit", "said"), [("mm", ()), ("um", ("lengths are read as mm, as by ITK",))])
def test_the_unit_of_an_nrrd_is_mm(tmp_path: Path, unit: str, said: tuple[str, ...]) -> None:
    """Its label map, which ITK writes without a unit, has the same numbers."""
    header = {"space": "LPS", "space directions": np.eye(3) * 2, "space units": [unit] * 3, "kinds": ["domain"] * 3}
    nrrd.write(str(tmp_path / "a.nrrd"), integers((5, 4, 3), 9), header)
    image = read_image(tmp_path / "a.nrrd")
    assert image.geometry.spacing == (2, 2, 2)
    assert [note.startswith(start) for note, start in zip(image.notes, said, strict=True)] == [True] * len(said)


@pytest.mark.parametrize("ending", ["MHD", "Mhd", "NHDR", "Nhdr"])
def test_headers_whose_endings_are_in_any_case(tmp_path: Path, ending: str) -> None:
    """The voxels are found by the name in the header."""
    sitk.WriteImage(sitk.GetImageFromArray(COUNT), tmp_path / f"a.{ending.lower()}")
    (tmp_path / f"a.{ending.lower()}").rename(tmp_path / f"a.{ending}")
    image = read_image(tmp_path / f"a.{ending}")
    assert np.array_equal(image.array[0], COUNT) and read_geometry(tmp_path / f"a.{ending}")[0] == image.geometry


@pytest.mark.parametrize("kind", [nibabel.Nifti1Pair, nibabel.Spm2AnalyzeImage])
def test_pairs_of_header_and_voxels(tmp_path: Path, kind: type) -> None:
    """Either file of the two, compressed or not; a folder of them contains one image."""
    nibabel.save(kind(COUNT, np.diag([0.7, 0.8, 2.5, 1])), tmp_path / "a.img")
    for half in (".hdr", ".img"):
        (tmp_path / f"b{half}.gz").write_bytes(gzip.compress((tmp_path / f"a{half}").read_bytes()))
        (tmp_path / f"C{half.upper()}").write_bytes((tmp_path / f"a{half}").read_bytes())
    names = ("a.hdr", "a.img", "b.hdr.gz", "b.img.gz", "C.HDR", "C.IMG")
    for name in names:
        image = read_image(tmp_path / name)
        assert np.array_equal(image.array[0], COUNT.T) and image.geometry.spacing == pytest.approx((2.5, 0.8, 0.7))
    assert [case.id for case in find_cases([tmp_path], 1)] == ["C", "a", "b"]
    (case,) = find_cases([tmp_path / "a.img"], 1)
    assert (case.id, case.images[0].name) == ("a", "a.hdr")
    assert {label_suffix(ending_of(tmp_path / name)) for name in names[:4]} == {".nii.gz"}
    (tmp_path / "b.hdr.gz").unlink()
    (tmp_path / "a.hdr").rename(tmp_path / "b.hdr")
    with pytest.raises(UserError, match=r"b.img.gz is compressed. Compress both"):
        read_image(tmp_path / "b.hdr")


@pytest.mark.parametrize("codes", [(1, 1), (0, 4), (2, 0)])
def test_the_header_of_a_nifti_is_copied(tmp_path: Path, codes: tuple[int, int]) -> None:
    image = nibabel.Nifti1Image(np.arange(4 * 5 * 6 * 2, dtype=np.int16).reshape(4, 5, 6, 2), None)
    affine = np.array([[0, -1.5, 0, 7], [0.9, 0, 0, -3], [0, 0, 2.5, 11], [0, 0, 0, 1]], float)
    image.header.set_xyzt_units("mm", "sec")
    image.header.set_slope_inter(0.5, -3)
    image.set_qform(affine if codes[0] else None, codes[0])
    image.set_sform(affine if codes[1] else None, codes[1])
    nibabel.save(image, tmp_path / "image.nii.gz")
    read = read_image(tmp_path / "image.nii.gz")
    labels = (read.array[0] % 3 == 0).astype(np.uint8)
    write_label(tmp_path / "label.nii.gz", labels, read.geometry, like=tmp_path / "image.nii.gz")
    written = nibabel.load(tmp_path / "label.nii.gz")
    assert (int(written.header["qform_code"]), int(written.header["sform_code"])) == codes
    np.testing.assert_allclose(written.affine, affine, atol=1e-5)
    assert written.shape == (4, 5, 6) and written.get_data_dtype() == np.uint8
    assert written.header.get_xyzt_units()[0] == "mm"
    np.testing.assert_array_equal(np.asarray(written.dataobj), labels.T)
    back, geometry, _ = read_label(tmp_path / "label.nii.gz")
    assert np.array_equal(back, labels) and geometry == read.geometry


# ------------------------------------------------------------------------------------------------------------- pictures


def test_rgb_rgba_and_palette_pictures(tmp_path: Path) -> None:
    colours = integers((8, 9, 3), 255)
    image = read_image(save(tmp_path / "rgb.png", colours))
    assert np.array_equal(image.array[:, 0], colours.transpose(2, 0, 1))
    assert image.notes == ("3 channels in one file",)
    assert image.geometry == Geometry((1, 8, 9), (999.0, 1.0, 1.0), dimensions=2)
    for alpha, note in ((np.full((8, 9), 200), "dropped"), (np.arange(72).reshape(8, 9), "dropped although it varies")):
        path = save(tmp_path / "rgba.png", np.dstack([colours, alpha.astype(np.uint8)]))
        image = read_image(path)
        assert image.array.shape == (3, 1, 8, 9) and image.notes[0] == f"alpha channel {note}"
        assert read_geometry(path) == (image.geometry, 3)
    for suffix in ("png", "bmp", "tif"):
        picture = Pillow.fromarray(integers((8, 9), 2), mode="P")
        picture.putpalette([10, 20, 30, 250, 0, 0, 0, 250, 0])
        picture.save(tmp_path / f"palette.{suffix}")
        image = read_image(tmp_path / f"palette.{suffix}")
        assert np.array_equal(image.array[:, 0], np.asarray(picture.convert("RGB")).transpose(2, 0, 1)), suffix
        assert image.notes == ("3 channels in one file",)
        label, _, notes = read_label(tmp_path / f"palette.{suffix}")
        assert np.array_equal(label[0], np.asarray(picture))
        first = "0 is #0a141e, 1 is #fa0000, 2 is #00fa00"
        assert notes == (f"palette picture read as the numbers of its colours: {first}",)


def test_grey_pictures(tmp_path: Path) -> None:
    grey = np.linspace(0, 255, 72).reshape(8, 9).astype(np.uint8)
    for suffix, tolerance in ((".bmp", 0), (".jpg", 3), (".tiff", 0)):
        array = read_image(save(tmp_path / f"a{suffix}", grey)).array
        assert array.shape == (1, 1, 8, 9) and np.abs(array[0, 0].astype(int) - grey).max() <= tolerance
    assert read_image(save(tmp_path / "deep.png", grey.astype(np.uint16) * 200)).array.max() == 51000
    for deep in (grey, grey.astype(np.uint16) * 200):
        Pillow.fromarray(deep).save(tmp_path / "transparent.png", transparency=0)
        assert np.array_equal(read_image(tmp_path / "transparent.png").array[0, 0], deep)
        assert read_geometry(tmp_path / "transparent.png")[1] == 1
    white = integers((8, 9), 1).astype(bool)
    for suffix in ("png", "bmp", "tif"):
        label, _, notes = read_label(save(tmp_path / f"bw.{suffix}", white))
        assert np.array_equal(label[0], white * 255) and notes == (), suffix


def test_alpha_is_a_channel_only_if_expected(tmp_path: Path) -> None:
    colours = integers((8, 9, 4), 255)
    path = save(tmp_path / "a.png", colours)
    assert np.array_equal(read_images([path], 4).array[:, 0], colours.transpose(2, 0, 1))
    assert read_images([path], 3).array.shape[0] == 3
    assert [read_geometry(path, n)[1] for n in (None, 3, 4)] == [3, 3, 4]
    path = save(tmp_path / "b.png", colours[..., :2], "LA")
    assert [read_images([path], n).array.shape[0] for n in (None, 1, 2)] == [1, 1, 2]
    image = read_image(path)
    assert np.array_equal(image.array[0, 0], colours[..., 0])
    assert image.notes == ("alpha channel dropped although it varies",)


def interleaved_tiff(samples: int) -> bytes:
    """A TIFF of 2 x 2 pixels, grey, with several values per pixel and nothing that says what they are."""
    data = bytes(range(4 * samples))
    tags = [(256, 2), (257, 2), (258, 8), (259, 1), (262, 1), (273, 8), (277, samples), (278, 2), (279, len(data))]
    directory = b"".join(struct.pack("<HHII", tag, 4 if tag in (273, 279) else 3, 1, value) for tag, value in tags)
    head = struct.pack("<2sHI", b"II", 42, 8 + len(data))
    return head + data + struct.pack("<H", len(tags)) + directory + struct.pack("<I", 0)


def test_tiff_with_channels_that_itk_would_lose(tmp_path: Path) -> None:
    for samples in (1, 5):
        (tmp_path / "a.tif").write_bytes(interleaved_tiff(samples))
        image = read_image(tmp_path / "a.tif")
        assert image.array.reshape(samples, 4).T.ravel().tolist() == list(range(4 * samples))
    assert image.notes == ("5 channels in one file",) and read_geometry(tmp_path / "a.tif")[1] == 5


def test_tiff_pages_are_a_volume_with_a_spacing_beside_it(tmp_path: Path) -> None:
    volume = integers((5, 6, 7), 200)
    for name in ("a_0000.tif", "b_0000.tif"):
        sitk.WriteImage(sitk.GetImageFromArray(volume), tmp_path / name)
    (tmp_path / "a.json").write_text(json.dumps({"spacing": [2.5, 0.5, 0.5]}))
    image = read_image(tmp_path / "a_0000.tif")
    assert np.array_equal(image.array[0], volume) and image.geometry.spacing == (2.5, 0.5, 0.5)
    assert read_image(tmp_path / "b_0000.tif").geometry.spacing == (1.0, 1.0, 1.0)
    write_label(tmp_path / "out.tif", volume, image.geometry)
    label, geometry, _ = read_label(tmp_path / "out.tif")
    assert np.array_equal(label, volume) and geometry == image.geometry
    for spacing in ([2.5, 0.5], ["a", 1, 1], [None, 1, 1], [0, 1, 1]):
        (tmp_path / "a.json").write_text(json.dumps({"spacing": spacing}))
        with pytest.raises(UserError, match=rf"a\.json: spacing is {re.escape(str(spacing))}"):
            read_image(tmp_path / "a_0000.tif")
    for other in ([1, 2], {"patient": "x"}):  # a file of another program
        (tmp_path / "a.json").write_text(json.dumps(other))
        assert read_image(tmp_path / "a_0000.tif").geometry.spacing == (1.0, 1.0, 1.0)


def test_labels_as_grey_rgb_and_as_floats(tmp_path: Path) -> None:
    mask = integers((8, 9), 1) * np.uint8(255)
    label, _, notes = read_label(save(tmp_path / "mask.png", np.dstack([mask] * 3)))
    assert np.array_equal(label[0], mask) and notes == ("label map with 3 equal channels read as one",)
    noisy = (integers((3, 4, 5)) + 4e-4).astype(np.float32)
    label = read_label(save_nifti(tmp_path / "noisy.nii.gz", noisy))[0]
    assert label.dtype == np.uint8 and np.array_equal(label, np.rint(noisy).T)


@pytest.mark.parametrize("colour", [0, 255])
def test_a_mask_in_the_alpha_channel_is_no_empty_or_full_one(tmp_path: Path, colour: int) -> None:
    mask = integers((8, 9), 1) * np.uint8(255)
    path = save(tmp_path / "mask.png", np.dstack([np.full_like(mask, colour)] * 3 + [mask]))
    with pytest.raises(UserError, match=r"the mask is in its alpha channel\. Save"):
        read_label(path)


# ----------------------------------------------------------------------------------------------------------- bad files


def test_truncated_files_name_the_cause(tmp_path: Path) -> None:
    volume = integers((20, 30, 40), 200)
    for suffix in (".nii", ".nii.gz", ".nrrd", ".mha", ".tif"):
        sitk.WriteImage(sitk.GetImageFromArray(volume), tmp_path / f"volume{suffix}")
    nibabel.save(nibabel.MGHImage(volume, np.eye(4)), tmp_path / "volume.mgz")
    for suffix in (".png", ".bmp", ".jpg"):
        save(tmp_path / f"picture{suffix}", integers((64, 64, 3), 255))
    for path in sorted(tmp_path.iterdir()):
        read_image(path)
        path.write_bytes(path.read_bytes()[: path.stat().st_size * 2 // 3])
        with pytest.raises(UserError) as caught:
            read_image(path)
        text = str(caught.value)
        assert text.startswith(f"{path}: ") and "\n" not in text and "ITK" not in text
        assert path.suffix in (".nrrd", ".mha") or "is truncated" in text
    with pytest.raises(UserError, match="there is no such file"):
        read_image(tmp_path / "absent.nii.gz")


def test_channels_on_different_grids(tmp_path: Path) -> None:
    paths = [save_nifti(tmp_path / f"{c}.nii.gz", np.full((3, 4, 5), c, np.int16)) for c in range(2)]
    assert read_images(paths).array.shape == (2, 5, 4, 3)
    save_nifti(paths[1], np.zeros((3, 4, 6), np.int16))
    with pytest.raises(UserError, match=r"1\.nii\.gz: shape \(6, 4, 3\) differs from that of 0\.nii\.gz, \(5, 4, 3\)"):
        read_images(paths)


@pytest.mark.parametrize(
    ("name", "array", "geometry", "message"),
    [
        ("a.gipl", integers(VOLUME.shape), VOLUME, r"GIPL cannot store directions.* Use \.nii\.gz"),
        ("a.jpg", integers(PICTURE.shape), PICTURE, r"cannot be written as \.jpg\. Use \.png"),
        ("a.png", integers(PICTURE.shape, kind=np.int8) - 1, PICTURE, r"label values -1\.\.2 do not fit"),
        ("a.bmp", integers(PICTURE.shape, 300, np.uint16), PICTURE, "do not fit"),
        ("a.png", integers(VOLUME.shape), VOLUME, "a volume of shape"),
    ],
)
def test_labels_that_a_format_cannot_store(
    tmp_path: Path, name: str, array: np.ndarray, geometry: Geometry, message: str
) -> None:
    with pytest.raises(UserError, match=message):
        write_label(tmp_path / name, array, geometry)
    assert list(tmp_path.iterdir()) == []


def test_names() -> None:
    assert stem(Path("a.b_0000.nii.gz")) == "a.b_0000"
    assert stem(Path("x.PNG")) == "x"
    assert [label_suffix(s) for s in (".jpg", ".mhd", ".nii.gz", ".png")] == [".png", ".mha", ".nii.gz", ".png"]
