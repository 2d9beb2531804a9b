"""Charts have axes on which the values can be read: constant, tiny, missing, single, or not numbers."""

from __future__ import annotations

import json
import re
from html import unescape

import numpy as np
import pytest

from nnunet_lite.reporting.plots import Series, curves, dots, histogram, intervals, ticks


def y_axis(svg: str) -> list[tuple[float, str]]:
    """The ticks of the y axis: (height in pixels, text)."""
    return [(float(y), text) for y, text in re.findall(r'y="([\d.]+)" text-anchor="end">([^<]+)</text>', svg)]


def heights(svg: str) -> list[float]:
    """The heights of a curve's points, in pixels."""
    path = re.findall(r'<path class="line[^"]*" d="([^"]+)"', svg)
    return [float(y) for _, y in re.findall(r"[ML]([\d.]+) ([\d.]+)", path[0])]


@pytest.mark.parametrize("value", [0.01, 3e-7, 1e-13, -2.5, 4e6])
def test_a_constant_is_read_off_its_axis(value: float) -> None:
    svg = str(curves("lr", [Series("fold 0", [1, 2, 3], [value] * 3)], "epoch", ""))
    (y, *others), marks = heights(svg), y_axis(svg)
    assert others == [y, y] and len(marks) >= 2
    assert len({text for _, text in marks}) == len(marks), "no two ticks have the same text"
    (low, at_low), (high, at_high) = ((float(text), height - 4) for height, text in (marks[0], marks[-1]))
    assert low + (y - at_low) / (at_high - at_low) * (high - low) == pytest.approx(value, rel=0.02)


def test_a_learning_rate_begins_at_zero() -> None:
    falling = [Series("fold 0", list(range(1, 9)), [1e-3 * 0.5**i for i in range(8)])]
    marks = y_axis(str(curves("lr", falling, "epoch", "", (0.0, None))))
    assert marks[0][1] == "0" and float(marks[-1][1]) == 1e-3
    nothing = y_axis(str(curves("lr", [Series("fold 0", [1, 2], [0.0, 0.0])], "epoch", "", (0.0, None))))
    assert nothing[0][1] == "0" and 0 < float(nothing[-1][1]) <= 1


def test_neighbouring_ticks_differ() -> None:
    """A loss that changes in the seventh digit."""
    marks = y_axis(str(curves("loss", [Series("f", [1, 2], [1.0000001, 1.0000004])], "epoch", "")))
    assert len({text for _, text in marks}) == len(marks) >= 3
    assert ticks(0, 4e-14, 4) == pytest.approx([0, 1e-14, 2e-14, 3e-14, 4e-14], rel=1e-9)
    rounding = y_axis(str(curves("loss", [Series("f", [1, 2], [0.3, 0.1 + 0.2])], "epoch", "")))
    assert len(rounding) >= 3, "0.3 and 0.30000000000000004 are one value"


def test_what_is_no_number_is_a_gap() -> None:
    values = [0.5, float("nan"), 0.4, float("inf"), None, 0.3]
    svg = str(curves("loss", [Series("f", list(range(6)), values)], "epoch", ""))
    data = json.loads(unescape(re.findall('data-curves="([^"]+)"', svg)[0]), parse_constant=pytest.fail)
    assert data["series"][0]["y"] == [0.5, None, 0.4, None, None, 0.3]
    assert svg.count("M", svg.index('class="line')) >= 3 and "nan" not in svg and "inf" not in svg
    assert not curves("loss", [Series("f", [1, 2], [float("nan"), None])], "epoch", "")


def test_one_epoch_is_a_dot_inside_the_frame() -> None:
    svg = str(curves("loss", [Series("f", [1], [0.7])], "epoch", ""))
    ((x, y),) = re.findall(r'<circle class="line[^"]*" cx="([\d.]+)" cy="([\d.]+)"', svg)
    assert 52 < float(x) < 438 and 10 < float(y) < 196


def test_histograms() -> None:
    tiny = 6.4e-14 * np.arange(1, 30)  # ml, of voxels of 0.4 um
    svg = str(histogram("Volume", tiny.tolist(), "ml"))
    x = re.findall(r'text-anchor="middle">([^<]+)</text>', svg)
    assert len(set(x)) == len(x) >= 4 and svg.count("<rect") >= 5
    assert str(histogram("Volume", [1.0, float("nan"), 2.0, float("inf")], "ml")).count("<rect") == 2
    assert not histogram("Volume", [float("nan")], "ml")


def test_models_without_a_score_have_no_interval() -> None:
    svg = str(intervals("Dice", [("a", 0.8, 0.7, 0.9), ("b", None, None, None), ("c", 0.8, None, None)], "Dice"))
    assert svg.count("<circle") == 2 and ">b</text>" not in svg
    assert not intervals("Dice", [("b", None, None, None)], "Dice")
    same = str(intervals("Dice", [("a", 0.8, None, None), ("b", 0.8, None, None)], "Dice"))
    assert len(set(re.findall(r'cx="([\d.]+)"', same))) == 1
    assert str(dots("Dice", [("a", [("case", None)])], "model")).count("<circle") == 0
