"""Charts have axes on which values can be read; pictures are oriented as a radiologist expects, with exact outlines."""

from __future__ import annotations

import base64
import io
import json
import re

import numpy as np
import pytest
import SimpleITK
from PIL import Image
from samples import sample_plan

from nnunet_lite.data.geometry import Geometry
from nnunet_lite.data.geometry import Image as ScanImage
from nnunet_lite.data.labels import Labels
from nnunet_lite.reporting import figures
from nnunet_lite.reporting.figures import Curve, outline_path, planes_of, plot_curves, slice_of


def curve(*values: float | None) -> list[Curve]:
    return [Curve("fold 0", list(enumerate(values, 1)))]


@pytest.mark.parametrize("value", [0.01, 3e-7, 1e-13, -2.5, 4e6])
def test_a_constant_can_be_read_off_its_axis(value: float) -> None:
    y = plot_curves("lr", curve(value, value, value), "epoch").y
    assert len({text for _, text in y.ticks}) == len(y.ticks) >= 2
    (at_low, low), (at_high, high) = ((pixel, float(text)) for pixel, text in (y.ticks[0], y.ticks[-1]))
    read = low + (y.pixel(value) - at_low) / (at_high - at_low) * (high - low)
    assert read == pytest.approx(value, rel=0.02)


def test_ticks() -> None:
    falling = plot_curves("lr", curve(*(1e-3 * 0.5**i for i in range(8))), "epoch", "", (0.0, None)).y.ticks
    assert falling[0][1] == "0" and float(falling[-1][1]) == 1e-3
    zero = plot_curves("lr", curve(0.0, 0.0), "epoch", "", (0.0, None)).y.ticks
    assert [zero[0][1], zero[-1][1]] == ["0", "1"]
    assert plot_curves("lr", curve(0.0, 0.0), "epoch").y.values[0] == 0, "not -0.5"
    close = [text for _, text in plot_curves("loss", curve(1.0000001, 1.0000004), "epoch").y.ticks]
    assert len(set(close)) == len(close) >= 3, "a loss that changes in the seventh digit"
    assert len(plot_curves("loss", curve(0.3, 0.1 + 0.2), "epoch").y.ticks) >= 3, "they differ by rounding"
    assert figures.tick_values(0, 4e-14, 4) == pytest.approx([0, 1e-14, 2e-14, 3e-14, 4e-14], rel=1e-9)


def test_a_logarithmic_axis() -> None:
    """Where most values are small parts of the largest one, as of a rate that is reduced on plateaus."""
    rates = [1e-2] * 5 + [2e-3] * 5 + [4e-4] * 10 + [8e-5] * 10
    y = plot_curves("lr", curve(*rates), "epoch", "", (0.0, None)).y
    assert y.logarithmic and [text for _, text in y.ticks] == ["0.0001", "0.001", "0.01"]
    assert y.pixel(1e-2) - y.pixel(2e-3) == pytest.approx(y.pixel(2e-3) - y.pixel(4e-4), abs=0.2)
    assert y.pixels[1] < y.pixel(1e-2) < y.pixel(8e-5) < y.pixels[0]
    for rates in ([0.01 * (1 - i / 100) ** 0.9 for i in range(100)], [0.01, *[1e-5] * 9, -1.0], [0.01, *[0.0] * 9]):
        assert not plot_curves("lr", curve(*rates), "epoch", "", (0.0, None)).y.logarithmic
    assert not plot_curves("Dice", curve(1.0, *[1e-3] * 9), "epoch", "", (0, 1)).y.logarithmic
    assert figures.log_tick_values(0.003, 0.06) == [0.005, 0.01, 0.02, 0.05]


def test_agreement_of_volumes() -> None:
    """Differences of 1, 2, 3: a bias of 2 with limits 1.96 standard deviations of 1 around it."""
    volumes = {"a": (10.0, 11.0), "b": (20.0, 22.0), "c": (30.0, 33.0), "in neither": (0.0, 0.0)}
    chart = figures.plot_agreement("Volume", volumes, "ml", "model")
    assert chart.content["points"] == [("a", 10.5, 1.0), ("b", 21.0, 2.0), ("c", 31.5, 3.0)]
    assert dict(chart.content["lines"]) == pytest.approx(
        {"no difference": 0, "bias": 2, "lower limit": 2 - 1.96, "upper limit": 2 + 1.96}
    )
    assert chart.note == "bias +2 ml, 95 % limits +0.04 to +3.96, 3 cases"
    assert chart.y.values[0] < 0 and chart.y.values[1] > 3.96
    assert figures.plot_agreement("Volume", {"a": (1.0, 2.0), "b": (0.0, 0.0)}, "ml", "model") is None


def test_values_that_are_not_finite_are_gaps() -> None:
    chart = plot_curves("loss", curve(0.5, float("nan"), 0.4, float("inf"), None, 0.3), "epoch")
    data = json.loads(json.dumps(chart.readout), parse_constant=pytest.fail)
    assert data["series"][0]["y"] == [0.5, None, 0.4, None, None, 0.3]
    assert plot_curves("loss", curve(float("nan"), None), "epoch") is None
    points = plot_curves("loss", curve(*range(1000)), "epoch").content[0].points
    assert len(points) <= 401 and points[-1] == (1000, 999)


def test_a_single_epoch_is_inside_the_axes() -> None:
    chart = plot_curves("loss", curve(0.7), "epoch")
    assert 52 < chart.x.pixel(1) < 438 and 10 < chart.y.pixel(0.7) < 196


def test_histograms() -> None:
    chart = figures.plot_histogram("Volume", (6.4e-14 * np.arange(1, 30)).tolist(), "ml")  # of voxels of 0.4 um
    assert len({text for _, text in chart.x.ticks}) == len(chart.x.ticks) >= 3
    assert len(chart.content["bins"]) >= 5 and sum(n for _, _, n in chart.content["bins"]) == 29
    assert len(figures.plot_histogram("Volume", [1.0, float("nan"), 2.0, float("inf")], "ml").content["bins"]) == 2
    assert figures.plot_histogram("Volume", [float("nan")], "ml") is None


def test_rows_without_a_score() -> None:
    rows = [("a", 0.8, 0.7, 0.9), ("b", None, None, None), ("c", 0.8, None, None)]
    chart = figures.plot_intervals("Dice", rows, "Dice")
    assert [name for name, *_ in chart.content] == ["a", "c"] and chart.y.values == (0, 2)
    assert figures.plot_intervals("Dice", [("b", None, None, None)], "Dice") is None
    same = figures.plot_intervals("Dice", [("a", 0.8, None, None), ("b", 0.8, None, None)], "Dice").x
    assert same.pixels[0] < same.pixel(0.8) < same.pixels[1]
    assert figures.plot_dots("Dice", [("a", [("case", None)])], "model").content["rows"] == [("a", [], None)]


# ------------------------------------------------------------------------------------------------------------ pictures


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
    coarse, step = figures.thin_out(label, 10)
    assert coarse.shape == (10, 10) and step == (4, 6)
    assert outline_path(coarse == 1, step) == "M30 8h30v12h-30z", "in voxels of the picture"


def test_errors_are_missed_added_or_of_another_label() -> None:
    reference, prediction = np.array([[0, 1, 1, 2, 2, 0]]), np.array([[0, 1, 0, 1, 2, 2]])
    assert figures.find_errors(reference, prediction).tolist() == [[0, 0, 1, 3, 0, 2]]
    assert list(figures.ERROR_COLOURS) == ["missed", "added", "another label"]
    plan = sample_plan(Labels(names={"a": 1, "b": 2}, ignore=3))
    draws = np.random.default_rng(0)
    labels = draws.integers(0, 4, (1, 30, 40)), draws.integers(0, 3, (1, 30, 40))
    image = ScanImage(np.zeros((1, 1, 30, 40), np.float32), Geometry((1, 30, 40), (999.0, 1.0, 1.0), dimensions=2))
    oriented = figures.OrientedImage(image, plan)
    whole = ((0, 1), (0, 30), (0, 40))
    drawn = oriented.draw(oriented.planes[0], (0, 15, 20), whole, 64, *labels)
    kinds = np.where(labels[0] == 3, 0, figures.find_errors(*labels))[0]
    for kind, path in enumerate(drawn["errors"], 1):
        np.testing.assert_array_equal(fill(path, (30, 40)), kinds == kind)


def test_the_box_contains_the_mask_with_a_margin() -> None:
    mask = np.zeros((300, 40, 300), bool)
    mask[100:200, 10:20, 290:300] = True
    assert figures.box_around(mask) == ((70, 230), (0, 40), (204, 300))
    assert figures.box_around(np.zeros((3, 4, 5), bool)) == ((0, 3), (0, 4), (0, 5))


def test_grey_levels_ignore_the_background() -> None:
    (channel,) = sample_plan(Labels(names={"a": 1})).channels
    image = np.zeros((10, 100, 100), np.float32)
    image[5:] = np.linspace(100, 200, 5 * 100 * 100).reshape(5, 100, 100)
    low, high = figures.grey_levels(image, channel)
    assert low == pytest.approx(101, abs=1) and high == pytest.approx(199.5, abs=1)
    image[0, 0, 0], image[0, 0, 1] = np.nan, np.inf
    shown = figures.to_bytes(image[0], (low, high))
    assert shown.dtype == np.uint8 and shown[0, 0] == 0 and shown[0, 1] == 255
    assert figures.grey_levels(np.full((4, 4), 7.0), channel) == (0.0, 1.0)


def test_webp_is_shrunk_to_the_longest_side() -> None:
    picture = np.tile(np.arange(200, dtype=np.uint8), (50, 1))
    image = Image.open(io.BytesIO(base64.b64decode(figures.webp(picture, 100))))
    assert image.format == "WEBP" and image.size == (100, 50)
    found = np.asarray(image.convert("L")).astype(int)
    assert abs(found[25, 10] - 20) < 8 and abs(found[25, 90] - 180) < 8
