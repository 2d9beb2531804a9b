"""Pictures are oriented as a radiologist expects, with exact outlines of labels and errors."""

from __future__ import annotations

import base64
import io
import re

import numpy as np
import pytest
import SimpleITK
from PIL import Image
from samples import sample_plan

from nnunet_lite.data.geometry import Geometry
from nnunet_lite.data.geometry import Image as ScanImage
from nnunet_lite.data.labels import Labels
from nnunet_lite.reporting import pictures
from nnunet_lite.reporting.pictures import outline_path, planes_of, slice_of


@pytest.mark.parametrize("code", ["LPS", "RAS", "LAS", "SPL", "AIR", "PSR", "ILA"])
def test_any_orientation_becomes_that_of_the_patient(code: str) -> None:
    """As ITK reorients it: to the head, to the back, to the left."""
    expected = np.arange(4 * 5 * 6, dtype=np.int16).reshape(4, 5, 6)
    image = SimpleITK.GetImageFromArray(expected)
    image.SetSpacing((1.0, 2.0, 3.0))
    oriented = SimpleITK.DICOMOrient(image, code)
    array = SimpleITK.GetArrayFromImage(oriented)
    geometry = Geometry(array.shape, oriented.GetSpacing()[::-1], oriented.GetOrigin(), oriented.GetDirection())
    turn, _ = planes_of(geometry)
    np.testing.assert_array_equal(turn.apply(array), expected)
    assert geometry.turned(turn).spacing == (3.0, 2.0, 1.0)


def test_planes() -> None:
    """The head is at the top of coronal and sagittal planes, the front at the top of axial ones."""
    array = np.arange(4 * 5 * 6).reshape(4, 5, 6)  # to the head, to the back, to the left
    whole = ((0, 4), (0, 5), (0, 6))
    axial, coronal, sagittal = planes_of(Geometry(array.shape, (1.0, 1.0, 1.0)))[1]
    np.testing.assert_array_equal(slice_of(array, axial, 2, whole), array[2])
    np.testing.assert_array_equal(slice_of(array, coronal, 3, whole), array[::-1, 3])
    np.testing.assert_array_equal(slice_of(array, sagittal, 1, whole), array[::-1, :, 1])
    assert (axial.sides, coronal.sides, sagittal.sides) == ("RLAP", "RLSI", "APSI")
    turn, planes = planes_of(Geometry((1, 4, 5), (999.0, 1.0, 1.0), dimensions=2))
    assert [plane.name for plane in planes] == ["xy"] and turn.order == (0, 1, 2)
    _, planes = planes_of(Geometry((3, 4, 5), (1.0, 1.0, 1.0), oriented=False))
    assert [plane.name for plane in planes] == ["xy", "xz", "yz"] and not any(plane.upwards for plane in planes)


def fill(path: str, shape: tuple[int, int]) -> np.ndarray:
    """The pixels whose centre an SVG path encloses, by the even-odd rule."""
    inside = np.zeros(shape, bool)
    x = y = start_y = 0
    for command, numbers in re.findall(r"([Mhvz])([-\d ]*)", path):
        if command == "M":
            x, y = (int(n) for n in numbers.split())
            start_y = y
        elif command == "h":
            x += int(numbers)
        else:
            end = start_y if command == "z" else y + int(numbers)
            inside[min(y, end) : max(y, end), x:] ^= True
            y = end
    return inside


def test_outlines_enclose_exactly_the_mask() -> None:
    draws = np.random.default_rng(0)
    for share in (0.1, 0.5, 0.9, 1.0):
        for _ in range(10):
            mask = draws.random((9, 13)) < share
            np.testing.assert_array_equal(fill(outline_path(mask), mask.shape), mask)
    assert outline_path(np.zeros((3, 3), bool)) == ""
    assert outline_path(np.ones((2, 3), bool)) == "M0 0h3v2h-3z"
    label = np.zeros((40, 60), np.uint8)
    label[10:20, 30:60] = 1
    coarse, step = pictures.thin_out(label, 10)
    assert coarse.shape == (10, 10) and step == (4, 6)
    assert outline_path(coarse == 1, step) == "M30 8h30v12h-30z", "in voxels of the picture"


def test_errors_are_missed_added_or_of_another_label() -> None:
    reference, prediction = np.array([[0, 1, 1, 2, 2, 0]]), np.array([[0, 1, 0, 1, 2, 2]])
    assert pictures.find_errors(reference, prediction).tolist() == [[0, 0, 1, 3, 0, 2]]
    assert list(pictures.ERROR_COLOURS) == ["missed", "added", "another label"]
    plan = sample_plan(Labels(names={"a": 1, "b": 2}, ignore=3))
    draws = np.random.default_rng(0)
    labels = draws.integers(0, 4, (1, 30, 40)), draws.integers(0, 3, (1, 30, 40))
    image = ScanImage(np.zeros((1, 1, 30, 40), np.float32), Geometry((1, 30, 40), (999.0, 1.0, 1.0), dimensions=2))
    oriented = pictures.OrientedImage(image, plan)
    whole = ((0, 1), (0, 30), (0, 40))
    drawn = oriented.draw(oriented.planes[0], (0, 15, 20), whole, 64, *labels)
    kinds = np.where(labels[0] == 3, 0, pictures.find_errors(*labels))[0]
    for kind, path in enumerate(drawn["errors"], 1):
        np.testing.assert_array_equal(fill(path, (30, 40)), kinds == kind)


def test_a_picture_shows_what_is_annotated() -> None:
    """Of a case with few annotated slices, the one with most labels, and not one that is ignored."""
    labels = Labels(names={"a": 1, "b": 2}, ignore=3)
    image = ScanImage(np.zeros((1, 6, 90, 90), np.float32), Geometry((6, 90, 90), (1.0, 1.0, 1.0)))
    reference = np.full((6, 90, 90), 3, np.uint8)
    reference[2], reference[4] = 0, 0
    reference[2, 40:45, 40:45], reference[4, 40:50, 40:45] = 1, 2
    oriented = pictures.OrientedImage(image, sample_plan(labels))
    tile = oriented.tile(reference)
    assert tile["slice"] == 4 and [number for number, _ in tile["reference"]] == [1]
    np.testing.assert_array_equal(oriented.foreground_of(reference), (reference == 1) | (reference == 2))


def test_the_box_contains_the_mask_with_a_margin() -> None:
    mask = np.zeros((300, 40, 300), bool)
    mask[100:200, 10:20, 290:300] = True
    assert pictures.box_around(mask) == ((70, 230), (0, 40), (204, 300))
    assert pictures.box_around(np.zeros((3, 4, 5), bool)) == ((0, 3), (0, 4), (0, 5))


def test_grey_levels_ignore_the_background() -> None:
    (channel,) = sample_plan(Labels(names={"a": 1})).channels
    image = np.zeros((10, 100, 100), np.float32)
    image[5:] = np.linspace(100, 200, 5 * 100 * 100).reshape(5, 100, 100)
    low, high = pictures.grey_levels(image, channel)
    assert low == pytest.approx(101, abs=1) and high == pytest.approx(199.5, abs=1)
    image[0, 0, 0], image[0, 0, 1] = np.nan, np.inf
    shown = pictures.to_bytes(image[0], (low, high))
    assert shown.dtype == np.uint8 and shown[0, 0] == 0 and shown[0, 1] == 255
    assert pictures.grey_levels(np.full((4, 4), 7.0), channel) == (0.0, 1.0)


def test_webp_is_shrunk_to_the_longest_side() -> None:
    picture = np.tile(np.arange(200, dtype=np.uint8), (50, 1))
    image = Image.open(io.BytesIO(base64.b64decode(pictures.webp(picture, 100))))
    assert image.format == "WEBP" and image.size == (100, 50)
    found = np.asarray(image.convert("L")).astype(int)
    assert abs(found[25, 10] - 20) < 8 and abs(found[25, 90] - 180) < 8
