"""The tables and charts of the report as data; templates/tables.html.j2 and charts.html.j2 write them.

The colours of charts are classes of report.css, so a chart follows the page's light or dark theme. A chart takes a few
kilobytes and a millisecond. (matplotlib only chooses the ticks: it takes 30 ms for a chart, and its SVG has fixed
colours.)
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
from matplotlib.ticker import Locator, LogLocator, MaxNLocator

_MAX_POINTS = 400  # of a curve, about one per pixel
_MIN_RANGE = 1e-9  # of the values; smaller differences are rounding
_MARGIN = 0.05  # of the range of values, on each side of it
_LOG_SHARE = 20  # positive values whose median is below this part of the largest are drawn on a logarithmic axis
_LIMITS = 1.96  # standard deviations: 95 % of normally distributed differences are within
_ROW_HEIGHT = 26  # of charts with one row for each label or model
_LETTER_WIDTH = 8  # of texts beside an axis

Value = str | float | tuple[str, float | None] | None  # of a cell; (text, value to sort by)
Interval = tuple[str, float | None, float | None, float | None]  # name, mean, low, high


# ---------------------------------------------------------------------------------------------------------- tables


class Column(NamedTuple):
    """A column of a table.

    Parameters
    ----------
    name : str
        Its heading.
    values : sequence
        Its cells from the top; None is shown as "n/a".
    number_format : str
        How its numbers are written; "" for texts.
    unit : str
        What follows each number.
    bar : bool
        Whether a bar shows each number, a share of one.
    """

    name: str
    values: Sequence[Value]
    number_format: str = ""
    unit: str = ""
    bar: bool = False


@dataclass(frozen=True)
class Table:
    """A table that a reader can sort by each column.

    Parameters
    ----------
    caption : str
        Its title.
    columns : sequence of Column
        Its columns; the first one has names.
    sorted_by : int or None
        The column by which the rows are sorted.
    model : str
        If given, a row opens the pictures of the case in its first cell.
    first_is_best : bool
        Whether the first row is highlighted.
    """

    caption: str
    columns: Sequence[Column]
    sorted_by: int | None = None
    model: str = ""
    first_is_best: bool = False

    @property
    def rows(self) -> list[tuple[Value, ...]]:
        """The values of each row, in the order of the columns."""
        return list(zip(*(column.values for column in self.columns), strict=True))

    def cells(self) -> Iterator[list[Cell]]:
        """Yield each row."""
        for row in self.rows:
            yield [_cell(value, column) for value, column in zip(row, self.columns, strict=True)]


class Cell(NamedTuple):
    """What a cell shows.

    Parameters
    ----------
    text : str
        Its text.
    value : float or None
        The exact number that the text is of.
    order : float or None
        What a text is sorted by.
    bar : float or None
        The length of its bar, 0 to 1.
    """

    text: str
    value: float | None = None
    order: float | None = None
    bar: float | None = None


def _cell(value: Value, column: Column) -> Cell:
    if value is None:
        return Cell("n/a")
    if isinstance(value, str):
        return Cell(value)
    if isinstance(value, tuple):
        return Cell(value[0], order=value[1])
    bar = min(max(float(value), 0.0), 1.0) if column.bar else None
    exact = int(value) if float(value).is_integer() else float(value)
    return Cell(f"{value:{column.number_format}}{column.unit}", exact, bar=bar)


def share_column(name: str, values: Sequence[Value]) -> Column:
    """Return a column of shares of one, such as Dice, with bars."""
    return Column(name, values, ".3f", bar=True)


# ---------------------------------------------------------------------------------------------------------- charts


@dataclass(frozen=True)
class Axis:
    """An axis of a chart.

    Parameters
    ----------
    values, pixels : tuple of float
        The values at its ends, and the pixels where they are drawn.
    label : str
        Its name.
    n_ticks : int
        About how many ticks are drawn.
    only_integers : bool
        Whether ticks are integers.
    logarithmic : bool
        Whether equal distances are equal ratios.
    """

    values: tuple[float, float]
    pixels: tuple[float, float]
    label: str = ""
    n_ticks: int = 0
    only_integers: bool = False
    logarithmic: bool = False

    def pixel(self, value: float) -> float:
        """Return the pixel of a value; values beyond the axis are drawn at its end."""
        (low, high), (start, end) = self.values, self.pixels
        value = min(max(value, low), high)
        if self.logarithmic:
            low, high, value = math.log(low), math.log(high), math.log(value)
        return round(start + (value - low) / (high - low) * (end - start), 1)

    @cached_property
    def ticks(self) -> list[tuple[float, str]]:
        """(pixel, text) of each tick; the texts have enough digits to differ."""
        low, high = self.values
        locator: Locator = MaxNLocator(
            self.n_ticks or 1, integer=self.only_integers, steps=[1, 2, 5, 10], min_n_ticks=1
        )
        if self.logarithmic:
            locator = LogLocator(subs=(1, 2, 5) if high < 100 * low else (1,))
        rounding = 1e-9 * (high - low)
        found = locator.tick_values(low, high) if self.n_ticks else []
        values = [float(f"{value:.12g}") for value in found if low - rounding <= value <= high + rounding]
        texts: list[str] = []
        for digits in range(6, 13):
            texts = [f"{value:.{digits}g}" for value in values]
            if len(set(texts)) == len(texts):
                break
        return [(self.pixel(value), text) for value, text in zip(values, texts, strict=True)]


@dataclass(frozen=True)
class Curve:
    """A curve of a chart.

    Parameters
    ----------
    name : str
        What it shows.
    points : sequence of (x, y)
        y is None at a gap.
    colour : int
        A number of the palette in report.css.
    style : {"solid", "dashed"}
        How it is drawn.
    """

    name: str
    points: Sequence[tuple[float, float | None]]
    colour: int = 0
    style: str = "solid"


@dataclass(frozen=True)
class Chart:
    """A chart with a heading and a note next to it.

    Parameters
    ----------
    kind : str
        The macro of charts.html.j2 that draws it.
    title : str
        Its heading.
    x, y : Axis
        Its axes.
    content : Any
        What this macro draws.
    width : int
        In pixels.
    note : str
        What stands next to the heading.
    readout : dict or None
        What report.js shows while a pointer moves over the curves.
    legend : sequence of str
        Names of the first colours of the palette.
    """

    kind: str
    title: str
    x: Axis
    y: Axis
    content: Any
    width: int = 680
    note: str = ""
    readout: dict[str, Any] | None = None
    legend: Sequence[str] = ()


def plot_curves(
    title: str,
    curves: Sequence[Curve],
    x_label: str,
    y_label: str = "",
    y_range: tuple[float | None, float | None] = (None, None),
    note: str = "",
    legend: Sequence[str] = (),
) -> Chart | None:
    """Draw curves over a common axis; it is logarithmic where a linear one would squeeze most values at its bottom.

    Parameters
    ----------
    title : str
        The heading.
    curves : sequence of Curve
        The curves.
    x_label, y_label : str
        The names of the axes.
    y_range : tuple of float or None
        The ends of the y axis; None follows from the values.
    note : str
        What stands next to the heading.
    legend : sequence of str
        Names of the first colours of the palette.

    Returns
    -------
    Chart or None
        None if no value is finite.
    """
    curves = [Curve(curve.name, _clean(curve.points), curve.colour, curve.style) for curve in curves]
    points = [(x, y) for curve in curves for x, y in curve.points if y is not None]
    if not points:
        return None
    xs, ys = zip(*points, strict=True)
    logarithmic = y_range[1] is None and min(ys) > 0 and float(np.median(ys)) < max(ys) / _LOG_SHARE
    low, high = (given if given is not None else end for given, end in zip(y_range, _range(ys, _MARGIN), strict=True))
    if logarithmic:
        low, high = (10**end for end in _range([math.log10(min(ys)), math.log10(max(ys))], _MARGIN))
    x = Axis(_range(xs), (52, 438), x_label, 6, only_integers=x_label == "epoch")
    series = [dict(zip(("name", "x", "y"), (c.name, *zip(*c.points, strict=True)), strict=True)) for c in curves]
    readout = {"x": [*x.values, *x.pixels], "label": x_label, "series": series}
    y = Axis((low, high), (196, 10), y_label, 4, logarithmic=logarithmic)
    return Chart("curves", title, x, y, curves, 460, note, readout, legend)


def plot_histogram(title: str, values: Sequence[float], unit: str, note: str = "") -> Chart | None:
    """Draw how often values occur, in at most 20 bins, with a line at the median.

    Parameters
    ----------
    title : str
        The heading.
    values : sequence of float
        The values.
    unit : str
        Their unit.
    note : str
        What stands next to the heading.

    Returns
    -------
    Chart or None
        None if no value is finite.
    """
    values = [value for value in values if math.isfinite(value)]
    if not values:
        return None
    counts, edges = np.histogram(values, bins=min(20, max(4, math.ceil(math.sqrt(len(values))) * 2)))
    bins = zip(edges[:-1].tolist(), edges[1:].tolist(), counts.tolist(), strict=True)
    x = Axis((float(edges[0]), float(edges[-1])), (34, 238), unit, 6)
    y = Axis((0, float(counts.max())), (98, 10), "", 4, only_integers=True)
    content = {"bins": [entry for entry in bins if entry[2]], "median": float(np.median(values))}
    return Chart("histogram", title, x, y, content, 260, note)


def plot_dots(title: str, rows: Sequence[tuple[str, Sequence[tuple[str, float | None]]]], model: str) -> Chart:
    """Draw a row for each label: a dot from 0 to 1 for each case, which report.js opens, and a tick at the mean.

    Parameters
    ----------
    title : str
        The heading.
    rows : sequence of (str, sequence of (str, float or None))
        The name of each label, and the value of each case.
    model : str
        Whose cases they are.
    """
    labels = [(name, [(case, value) for case, value in cases if value is not None]) for name, cases in rows]
    means = [np.mean([value for _, value in cases]) if cases else None for _, cases in labels]
    x, y = _row_axes([name for name, _ in labels], (0, 1), "Dice")
    content = {"rows": [(*row, mean) for row, mean in zip(labels, means, strict=True)], "model": model}
    return Chart("dots", title, x, y, content)


def plot_intervals(title: str, rows: Sequence[Interval], label: str, *, has_zero: bool = False) -> Chart | None:
    """Draw a mean with its 95 % interval for each row that has a mean; the first one is highlighted.

    Parameters
    ----------
    title : str
        The heading.
    rows : sequence of (str, float or None, float or None, float or None)
        Name, mean, and the ends of the interval.
    label : str
        The name of the x axis.
    has_zero : bool
        Whether the axis includes zero.

    Returns
    -------
    Chart or None
        None if no row has a mean.
    """
    intervals = [row for row in rows if row[1] is not None]
    if not intervals:
        return None
    values = [value for _, *numbers in intervals for value in numbers if value is not None]
    values += [0.0] if has_zero else []
    x, y = _row_axes([name for name, *_ in intervals], _range(values, _MARGIN), label)
    return Chart("intervals", title, x, y, intervals)


def plot_agreement(
    title: str,
    volumes: Mapping[str, tuple[float, float]],
    unit: str,
    model: str,
    names: tuple[str, str] = ("prediction", "reference"),
) -> Chart | None:
    """Draw the difference of two volumes of each case over their mean, with the bias and its 95 % limits of agreement.

    Source: Bland and Altman, Lancet 1986.

    Parameters
    ----------
    title : str
        The heading.
    volumes : mapping of str to (float, float)
        Case -> volume in the reference and in the prediction. A case without both is left out.
    unit : str
        Their unit.
    model : str
        Whose cases they are.
    names : tuple of str
        What is compared: the second of each pair, and the first.

    Returns
    -------
    Chart or None
        None below two cases.
    """
    known = {case: pair for case, pair in volumes.items() if any(pair)}
    if len(known) < 2:
        return None
    points = [(case, (ours + theirs) / 2, ours - theirs) for case, (theirs, ours) in known.items()]
    differences = [difference for *_, difference in points]
    bias, spread = float(np.mean(differences)), _LIMITS * float(np.std(differences, ddof=1))
    lines = [("no difference", 0.0), ("bias", bias), ("lower limit", bias - spread), ("upper limit", bias + spread)]
    heights = _range([*differences, *(height for _, height in lines)], _MARGIN)
    y = Axis(heights, (196, 10), f"{names[0]} - {names[1]} ({unit})", 4)
    left = 30 + _LETTER_WIDTH * max(len(text) for _, text in y.ticks)
    x = Axis(_range([mean for _, mean, _ in points], _MARGIN), (left, 438), f"mean of both ({unit})", 5)
    center, low, high = (f"{rounded(value, 3):+g}" for value in (bias, bias - spread, bias + spread))
    note = f"bias {center} {unit}, 95 % limits {low} to {high}, {len(points)} cases"
    return Chart("agreement", title, x, y, {"points": points, "lines": lines, "model": model}, 460, note)


def rounded(value: float, digits: int) -> float:
    """Return a number with some significant digits.

    Parameters
    ----------
    value : float
        The number.
    digits : int
        How many.
    """
    return float(f"{value:.{digits}g}")


def _row_axes(names: list[str], values: tuple[float, float], label: str) -> tuple[Axis, Axis]:
    """Return the axes of a chart with one row for each name, which is at the left."""
    left = 16 + _LETTER_WIDTH * min(44, max(map(len, names)))
    return Axis(values, (left, 658), label, 6), Axis((0, len(names)), (10, 10 + _ROW_HEIGHT * len(names)))


def _clean(points: Sequence[tuple[float, float | None]]) -> list[tuple[float, float | None]]:
    """Keep every n-th point of a long curve and its last one; values that are not finite become gaps."""
    step, last = max(1, -(-len(points) // _MAX_POINTS)), len(points) - 1
    kept = [point for i, point in enumerate(points) if i % step == 0 or i == last]
    return [(x, y if y is not None and math.isfinite(y) else None) for x, y in kept]


def _range(values: Sequence[float], margin: float = 0.0) -> tuple[float, float]:
    """Return the range of values with a margin, a share of it; a constant gets a range of its order of magnitude."""
    low, high = min(values), max(values)
    size = max(abs(low), abs(high))
    if size == 0:
        return 0.0, 1.0
    if high - low <= _MIN_RANGE * size:
        low, high = low - size / 2, high + size / 2
    return low - margin * (high - low), high + margin * (high - low)
