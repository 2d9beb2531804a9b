"""Charts have axes on which values can be read."""

from __future__ import annotations

import json

import numpy as np
import pytest

from nnunet_lite.reporting import figures
from nnunet_lite.reporting.figures import Curve, plot_curves


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
    tiny = figures.Axis((0, 4e-14), (0, 100), n_ticks=4).ticks
    assert [float(text) for _, text in tiny] == pytest.approx([0, 1e-14, 2e-14, 3e-14, 4e-14], rel=1e-9)
    assert figures.Axis((0, 3e4), (0, 100), n_ticks=3).ticks[-1] == (100, "30000")


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
    narrow = figures.Axis((0.003, 0.06), (0, 100), n_ticks=4, logarithmic=True)
    assert [text for _, text in narrow.ticks] == ["0.005", "0.01", "0.02", "0.05"]


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
