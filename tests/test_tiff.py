"""TIFF files of every layout and origin are read with their axes and spacing, or refused with a cause."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import SimpleITK as sitk
import tifffile
from bad_inputs import BadData, refuse_dataset
from PIL import Image as Pillow
from samples import Command, described, save_arrays, save_cases

import nnunet_lite
from nnunet_lite.data.cases import Case
from nnunet_lite.data.dataset import read_dataset
from nnunet_lite.data.images import label_suffix, read_geometry, read_image, read_images, read_label, write_label
from nnunet_lite.data.names import suffix_of
from nnunet_lite.data.raw_files import scan_raw_cases

UM = 1e-3  # mm
GREY: dict[str, Any] = {"photometric": "minisblack"}


def numbers(shape: tuple[int, ...], kind: str = "u2") -> np.ndarray:
    """Numbers that all differ, so that no two axes can be swapped unseen."""
    return np.arange(np.prod(shape)).reshape(shape).astype(kind)


def save(path: Path, array: np.ndarray, axes: str | None = None, **how: Any) -> Path:
    metadata = how.pop("metadata", {}) if axes is None else {"axes": axes} | how.pop("metadata", {})
    tifffile.imwrite(path, array, metadata=metadata or None, **GREY | how)
    return path


@pytest.mark.parametrize("kind", ["f2", "f4", "f8", "u1", "u2", "u4", "u8", "i1", "i2", "i4", "i8"])
def test_numbers_of_every_format(tmp_path: Path, kind: str) -> None:
    volume = numbers((3, 5, 7), kind) - np.array(0 if kind[0] == "u" else 40, kind)
    image = read_image(save(tmp_path / "a.tif", volume))
    assert np.array_equal(image.array[0], volume) and image.array.dtype == ("f4" if kind == "f2" else kind)
    assert read_geometry(tmp_path / "a.tif") == (image.geometry, 1)


LAYOUTS: list[dict[str, Any]] = [
    {"tile": (32, 32)},
    {"bigtiff": True},
    {"byteorder": ">"},
    {"rowsperstrip": 1},
    {"tile": (32, 32), "compression": "deflate", "predictor": True},
    *({"compression": c} for c in ("lzw", "deflate", "zstd", "packbits", "lzma", "jpeg2000", "lerc", "jpegxl")),
]


@pytest.mark.parametrize("how", LAYOUTS, ids=str)
def test_layouts_of_pixels(tmp_path: Path, how: dict[str, Any]) -> None:
    image = read_image(save(tmp_path / "a.tif", numbers((2, 60, 90)), **how))
    assert np.array_equal(image.array[0], numbers((2, 60, 90))) and image.array.dtype.isnative


def test_a_jpeg_inside_is_rgb(tmp_path: Path) -> None:
    colours = np.full((64, 64, 3), (200, 30, 90), np.uint8)
    tifffile.imwrite(tmp_path / "a.tif", colours, photometric="rgb", compression="jpeg")
    image = read_image(tmp_path / "a.tif")
    assert np.abs(image.array.reshape(3, -1).T - np.array([200.0, 30, 90])).max() <= 4
    assert image.notes == ("3 channels in one file",)


@pytest.mark.parametrize("kind", ["imagej", "ome", "shaped"])
@pytest.mark.parametrize(
    ("axes", "shape"),
    [("ZCYX", (5, 2, 6, 7)), ("CYX", (2, 6, 7)), ("ZYX", (5, 6, 7)), ("YX", (6, 7)), ("TZCYX", (1, 5, 2, 6, 7))],
)
def test_axes_and_spacing(tmp_path: Path, kind: str, axes: str, shape: tuple[int, ...]) -> None:
    """Channels are channels and not slices, and micrometres are mm, whoever wrote the file."""
    array = numbers(shape, "f4")
    how: dict[str, Any] = {
        "imagej": {"imagej": True, "metadata": {"spacing": 2.0, "unit": "um"}, "resolution": (4, 2)},
        "ome": {"ome": True, "metadata": {"PhysicalSizeX": 0.25, "PhysicalSizeY": 0.5, "PhysicalSizeZ": 2.0}},
        "shaped": {},
    }[kind]
    image = read_image(save(tmp_path / "a.tif", array, axes, **how))
    slices, channels = dict(zip(axes, shape, strict=True)).get("Z", 1), dict(zip(axes, shape, strict=True)).get("C", 1)
    expected = array.reshape(slices, channels, 6, 7).swapaxes(0, 1)
    assert np.array_equal(image.array, expected)
    assert read_geometry(tmp_path / "a.tif") == (image.geometry, channels)
    assert any(f"{channels} channels in one file" in note for note in image.notes) == (channels > 1)
    known = kind != "shaped"
    assert image.geometry.calibrated == known and image.geometry.dimensions == (3 if slices > 1 else 2)
    assert ("no spacing known, 1x1x1 mm taken" in image.notes) == (not known and slices > 1)
    plane, depth = ((0.5 * UM, 0.25 * UM), 2 * UM) if known else ((1.0, 1.0), 1.0)
    depth = depth if slices > 1 else 999 * max(plane)
    assert image.geometry.spacing == pytest.approx((depth, *plane), rel=1e-6)


def test_channels_first_and_colour_stacks(tmp_path: Path) -> None:
    array = numbers((2, 5, 6, 7))
    assert np.array_equal(read_image(save(tmp_path / "a.tif", array, "CZYX")).array, array)
    colours = numbers((5, 6, 7, 3), "u1")
    tifffile.imwrite(tmp_path / "b.tif", colours, photometric="rgb")
    assert np.array_equal(read_image(tmp_path / "b.tif").array, colours.transpose(3, 0, 1, 2))
    planar = numbers((3, 6, 7), "u1")
    tifffile.imwrite(tmp_path / "c.tif", planar, photometric="rgb", planarconfig="separate")
    assert np.array_equal(read_image(tmp_path / "c.tif").array[:, 0], planar)


@pytest.mark.parametrize(
    ("unit", "mm"),
    [("um", UM), ("micron", UM), ("\\u00B5m", UM), ("nm", UM**2), ("mm", 1), ("cm", 10), ("inch", 25.4), ("m", 1000)],
)
def test_units_of_imagej(tmp_path: Path, unit: str, mm: float) -> None:
    how: dict[str, Any] = {"imagej": True, "resolution": (4, 4)}
    path = save(tmp_path / "a.tif", numbers((5, 6, 7)), "ZYX", metadata={"spacing": 2, "unit": unit}, **how)
    assert read_geometry(path)[0].spacing == pytest.approx((2 * mm, mm / 4, mm / 4), rel=1e-6)
    save(path, numbers((5, 6, 7)), "ZYX", metadata={"unit": unit}, **how)  # ImageJ leaves a spacing of 1 out
    assert read_geometry(path)[0].spacing == pytest.approx((mm, mm / 4, mm / 4), rel=1e-6)


@pytest.mark.parametrize(("unit", "mm"), [("nm", UM**2), ("µm", UM), ("mm", 1), ("Å", UM**2 / 10), ("in", 25.4)])
def test_units_of_ome(tmp_path: Path, unit: str, mm: float) -> None:
    sizes: dict[str, Any] = {}
    for axis, size in zip("ZYX", (2, 0.25, 0.5), strict=True):
        sizes |= {f"PhysicalSize{axis}": size, f"PhysicalSize{axis}Unit": unit}
    path = save(tmp_path / "a.tif", numbers((5, 6, 7)), "ZYX", ome=True, metadata=sizes)
    assert read_geometry(path)[0].spacing == pytest.approx((2 * mm, mm / 4, mm / 2), rel=1e-6)


def test_numbers_without_a_unit_and_numbers_that_are_no_spacing(tmp_path: Path) -> None:
    path = tmp_path / "a.tif"
    volume = numbers((5, 6, 7))
    image = read_image(save(path, volume, "ZYX", imagej=True, metadata={"spacing": 2.0}, resolution=(2, 2)))
    assert image.geometry.spacing == (2.0, 0.5, 0.5)
    assert image.notes == ("spacing (2, 0.5, 0.5) without a unit, taken as mm",)
    for how in (
        {"imagej": True},
        {"resolution": (72, 72), "resolutionunit": "inch"},
        {"resolution": (300, 300), "resolutionunit": "inch"},
        {"imagej": True, "resolution": (72, 72), "resolutionunit": "inch"},
    ):
        image = read_image(save(path, volume, "ZYX", **how))
        assert image.geometry.spacing == (1.0, 1.0, 1.0) and not image.geometry.calibrated, how
        assert image.notes == ("no spacing known, 1x1x1 mm taken",), how
    sizes = {"PhysicalSizeX": 0.5, "PhysicalSizeY": 0.5}
    image = read_image(save(path, volume, "ZYX", ome=True, metadata=sizes))
    assert image.geometry.spacing == pytest.approx((0.5 * UM,) * 3)
    assert image.notes == ("no spacing of the slices known, that of the other axes taken",)
    image = read_image(save(path, volume, "ZYX", ome=True, metadata={"PhysicalSizeZ": 2.0}))
    assert image.notes == ("no spacing of the rows and columns known, that of the other axes taken",)


def test_a_sidecar_goes_before_what_the_file_says(tmp_path: Path) -> None:
    path = save(tmp_path / "a_0000.tif", numbers((5, 6, 7)), "ZYX", imagej=True, metadata={"spacing": 2, "unit": "um"})
    (tmp_path / "a.json").write_text(json.dumps({"spacing": [3.0, 0.7, 0.8]}))
    assert read_geometry(path)[0].spacing == (3.0, 0.7, 0.8)
    (tmp_path / "a_0000.json").write_text(json.dumps({"spacing": [4.0, 0.7, 0.8]}))
    assert read_geometry(path)[0].spacing == (4.0, 0.7, 0.8)
    flat = save(tmp_path / "b.tif", numbers((6, 7)))
    (tmp_path / "b.json").write_text(json.dumps({"spacing": [1.0, 0.7, 0.8]}))
    assert read_geometry(flat)[0].spacing == pytest.approx((999 * 0.8, 0.7, 0.8))


@pytest.mark.parametrize("orientation", range(1, 9))
def test_orientation_tags(tmp_path: Path, orientation: int) -> None:
    """As Pillow turns a picture to show it."""
    from PIL import Image, ImageOps

    array = numbers((4, 5), "u1")
    tag = [(274, "H", 1, orientation, True)]
    path = save(tmp_path / "a.tif", array, extratags=tag, resolution=(4, 2), imagej=False)
    image = read_image(path)
    picture = Image.fromarray(array)
    picture.getexif()[274] = orientation
    shown = np.asarray(ImageOps.exif_transpose(picture))
    assert np.array_equal(image.array[0, 0], shown) and image.geometry.shape[1:] == shown.shape
    assert read_geometry(path) == (image.geometry, 1)
    assert image.notes == ((f"turned as its orientation tag ({orientation}) says",) if orientation > 1 else ())


def test_alpha_is_a_channel_where_it_is_declared(tmp_path: Path) -> None:
    colours = numbers((60, 70, 4), "u1")
    rgba, grey = tmp_path / "rgba.tif", tmp_path / "grey.tif"
    tifffile.imwrite(rgba, colours, photometric="rgb", extrasamples=["unassalpha"])
    tifffile.imwrite(grey, numbers((60, 70, 2)), planarconfig="contig", extrasamples=["unassalpha"], **GREY)
    image = read_image(rgba)
    assert np.array_equal(image.array[:, 0], colours[..., :3].transpose(2, 0, 1)) and read_geometry(rgba)[1] == 3
    assert image.notes == ("alpha channel dropped although it varies", "3 channels in one file")
    assert np.array_equal(read_images([rgba], 4).array[:, 0], colours.transpose(2, 0, 1))
    assert read_geometry(rgba, 4)[1] == 4 and read_images([rgba], 3).array.shape[0] == 3
    assert read_image(grey).array.shape == (1, 1, 60, 70) and read_image(grey).array.dtype == np.uint16
    assert np.array_equal(read_image(grey, 2).array[1, 0], numbers((60, 70, 2))[..., 1])


def test_pyramids_are_read_at_full_resolution(tmp_path: Path) -> None:
    whole = numbers((256, 256))
    with tifffile.TiffWriter(tmp_path / "a.tif") as writer:
        writer.write(whole, subifds=1, tile=(64, 64), **GREY)
        writer.write(whole[::2, ::2], subfiletype=1, tile=(64, 64), **GREY)
    with tifffile.TiffWriter(tmp_path / "b.tif") as writer:
        writer.write(whole, tile=(64, 64), metadata=None, **GREY)
        writer.write(whole[::2, ::2], subfiletype=1, tile=(64, 64), metadata=None, **GREY)
    for name in ("a.tif", "b.tif"):
        assert np.array_equal(read_image(tmp_path / name).array[0, 0], whole)


def test_a_label_map_keeps_the_spacing(tmp_path: Path) -> None:
    """Also where only the image states it; and one slice of a volume is a picture."""
    for shape, axes in (((5, 6, 7), "ZYX"), ((6, 7), "YX")):
        path = save(tmp_path / "a.tif", numbers(shape), axes, imagej=True, metadata={"unit": "um"}, resolution=(3, 3))
        image = read_image(path)
        labels = (image.array[0] % 3).astype(np.uint8)
        write_label(tmp_path / "out.tif", labels, image.geometry)
        back, geometry, notes = read_label(tmp_path / "out.tif")
        assert np.array_equal(back, labels) and geometry == image.geometry and geometry.calibrated and notes == ()
        (tmp_path / "out.json").unlink()
        bare = read_label(tmp_path / "out.tif")[1]
        assert bare.calibrated and bare.differences(image.geometry) == image.geometry.differences(bare) == []
        with tifffile.TiffFile(tmp_path / "out.tif") as tif:
            stated = tif.imagej_metadata or {}
        assert (stated["unit"], stated.get("spacing")) == ("um", None if len(axes) == 2 else pytest.approx(1))


def test_a_changed_sidecar_or_file_of_voxels_is_a_changed_case(tmp_path: Path) -> None:
    """Preprocessing looks for what changed: the spacing of a TIFF file, and the voxels that a header names."""
    path = save(tmp_path / "a.tif", numbers((5, 6, 7)))
    (tmp_path / "a.json").write_text(json.dumps({"spacing": [3.0, 0.7, 0.8]}))
    sitk.WriteImage(sitk.GetImageFromArray(numbers((5, 6, 7))), tmp_path / "b.mhd")
    cases = [Case("a", (path,)), Case("b", (tmp_path / "b.mhd",))]
    before, _ = scan_raw_cases(cases, {}, 0)
    assert scan_raw_cases(cases, before, 0) == (before, {})
    (tmp_path / "a.json").write_text(json.dumps({"spacing": [4.0, 0.7, 0.8]}))
    (tmp_path / "b.raw").write_bytes(bytes(2 * 5 * 6 * 7))
    after, _ = scan_raw_cases(cases, before, 0)
    assert after["a"].spacing == (4.0, 0.7, 0.8)
    assert after["b"] != before["b"]


def cut(path: Path, array: np.ndarray, share: float, axes: str | None = None, **how: Any) -> None:
    data = save(path, array, axes, **how).read_bytes()
    path.write_bytes(data[: int(len(data) * share)])


def two_images(path: Path) -> None:
    with tifffile.TiffWriter(path) as writer:
        writer.write(numbers((60, 70)), metadata=None, **GREY)
        writer.write(numbers((60, 71)), metadata=None, **GREY)


def inked(path: Path, colours: str, channels: int) -> None:
    tifffile.imwrite(path, numbers((60, 70, channels), "u1"), photometric=colours)


def other_file(path: Path) -> None:
    """An OME file whose second slice is in a file that is not there."""
    save(path, numbers((2, 60, 70)), "ZYX", ome=True)
    data = path.read_bytes()
    old = b'<TiffData IFD="0" PlaneCount="2"/>'
    assert old in data
    here = re.search(rb'UUID="(urn:uuid:[^"]*)"', data)
    assert here
    new = b'<TiffData IFD="0" FirstZ="0" PlaneCount="1"><UUID>%s</UUID></TiffData>' % here[1]
    new += b'<TiffData IFD="0" FirstZ="1" PlaneCount="1"><UUID FileName="b.tif">urn:uuid:1</UUID></TiffData>'
    page = tifffile.TiffFile(path).pages[0]
    text = page.description.encode().replace(old, new)
    tifffile.imwrite(path, numbers((60, 70)), description=text, metadata=None, **GREY)


BAD: dict[str, tuple[Callable[[Path], object], str]] = {
    "time points": (lambda p: save(p, numbers((4, 6, 7)), "TYX", imagej=True), "4 time points (axes TYX"),
    "time points of OME": (lambda p: save(p, numbers((3, 5, 6, 7)), "TZYX", ome=True), "3 time points (axes TZYX"),
    "axes without a name": (lambda p: tifffile.imwrite(p, numbers((2, 5, 6, 7)), **GREY), "has axes QQYX"),
    "images of two sizes": (two_images, "holds 2 images (60 x 70, 60 x 71)"),
    "colours for print": (lambda p: inked(p, "separated", 4), "stores its colours as CMYK"),
    "colours of Lab": (lambda p: inked(p, "cielab", 3), "stores its colours as CIELab"),
    "brightness and two colours": (lambda p: inked(p, "ycbcr", 3), "stores its colours as YCbCr"),
    "complex numbers": (lambda p: save(p, numbers((5, 6, 7), "c8")), "holds complex numbers"),
    "cut in its pixels": (lambda p: cut(p, numbers((5, 60, 70)), 0.5), "is truncated"),
    "cut in an ImageJ stack": (lambda p: cut(p, numbers((5, 60, 70)), 0.9, "ZYX", imagej=True), "is truncated"),
    "cut in the description of OME": (lambda p: cut(p, numbers((5, 6, 7)), 0.95, "ZYX", ome=True), "is truncated"),
    "cut between compressed pages": (lambda p: cut(p, numbers((5, 60, 70)), 0.6, compression="lzw"), "is truncated"),
    "pages in another file": (other_file, "names other files for some of its pages"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_tiff(command: Command, tmp_path: Path, counts: Callable[[str], object], name: str) -> None:
    counts("bad inputs refused in one line")
    make, says = BAD[name]
    root = tmp_path / "data"
    save_cases(root, ["imagesTr/c{}_0000.tif"], ["labelsTr/c{}.tif"], table=described("T1", file_ending=".tif"))
    file = "imagesTr/c2_0000.tif"
    refuse_dataset(BadData(lambda folder: make(folder / file), file, (says,)), command, root)


def test_plain_pages_are_what_nnunet_reads(tmp_path: Path) -> None:
    """nnU-Net's Tiff3DIO is tifffile.imread: pages are slices, whatever their resolution tags say."""
    path = save(tmp_path / "a.tif", numbers((5, 6, 7), "u1"), resolution=(300, 300), resolutionunit="inch")
    assert np.array_equal(read_image(path).array[0], tifffile.imread(path))


def test_masks_of_true_and_false_mean_what_tifffile_was_given(tmp_path: Path) -> None:
    mask = np.zeros((20, 24), bool)
    mask[3:6, 4:7] = True
    tifffile.imwrite(tmp_path / "mask.tif", mask)
    np.testing.assert_array_equal(read_label(tmp_path / "mask.tif")[0][0] != 0, mask)


def test_check_warns_of_an_orientation_tag_of_the_image_alone(tmp_path: Path) -> None:
    """Programs that ignore the tag, as most do, draw the label map in the order of the stored pixels."""
    save_cases(tmp_path, ["images/c{}.tif"], ["labels/c{}.tif"])
    for path in (tmp_path / "images").iterdir():
        tifffile.imwrite(path, tifffile.imread(path), extratags=[(274, "H", 1, 3, True)])
    found = [problem for problem in nnunet_lite.check(tmp_path).problems if problem.kind == "orientation_tag"]
    assert len(found) == 5 and (found[0].found, found[0].severity) == ("orientation tag 1", "warning")


def test_check_warns_of_a_jpeg_that_programs_turn(tmp_path: Path) -> None:
    """Its pixels are read as stored; the label map was perhaps drawn on the turned picture."""
    save_cases(tmp_path, ["images/c{}.tif"], ["labels/c{}.tif"])
    exif = Pillow.Exif()
    exif[274] = 3
    for path in (tmp_path / "images").iterdir():
        Pillow.fromarray(tifffile.imread(path).astype(np.uint8)).save(path.with_suffix(".jpg"), exif=exif)
        path.unlink()
    found = nnunet_lite.check(tmp_path).problems
    assert sum(problem.kind == "orientation_tag" for problem in found) == 5
    assert any("read as stored: its orientation tag (3)" in problem.found for problem in found)
    path = path.with_suffix(".jpg")
    path.write_bytes(path.read_bytes().replace(b"Exif\0\0", b"Exif\0\0\1\2", 1))  # damaged tags are no tags
    assert read_image(path).orientation_tag == 1


def test_ome_tif_is_the_ending_of_a_name(tmp_path: Path) -> None:
    """The masks of x.ome.tif and its channels are found by x, and its label map is no OME file."""
    for number in range(2):
        for name in (f"images/c{number}_0000.ome.tif", f"images/c{number}_0001.OME.TIFF"):
            (tmp_path / name).parent.mkdir(exist_ok=True)
            tifffile.imwrite(tmp_path / name, np.arange(63, dtype=np.uint16).reshape(7, 9), ome=True)
        save_arrays(tmp_path, {f"masks/c{number}_mask.png": np.eye(7, 9, dtype=np.uint8)[None]})
    found = {case.id: ([path.name for path in case.images], case.label) for case in read_dataset(tmp_path).cases}
    assert found["c1"] == (["c1_0000.ome.tif", "c1_0001.OME.TIFF"], tmp_path / "masks" / "c1_mask.png")
    assert read_image(tmp_path / "images" / "c1_0000.ome.tif").array.shape == (1, 1, 7, 9)
    assert label_suffix(suffix_of(Path("c1.ome.tif"))) == ".tif"
