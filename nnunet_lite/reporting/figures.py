"""The tables and charts of the report as data: templates/tables.html.j2 and charts.html.j2 write them as HTML and SVG.

Colours are classes of report.css, so a chart follows the page's light or dark theme. A chart takes a few kilobytes and
a millisecond. (matplotlib takes half a second to import and 30 ms for each chart, and its SVG has fixed colours.)
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np

COLOURS = 10  # of the palette in report.css
_MAX_POINTS = 400  # of a curve, about one per pixel
_MIN_RANGE = 1e-9  # of the values; smaller differences are rounding
_ROW_HEIGHT = 26  # of charts with one row for each label or model
_LETTER_WIDTH = 6.6  # of the names of the rows

Value = str | float | tuple[str, float | None] | None  # of a cell; (text, value to sort by)
Interval = tuple[str, float | None, float | None, float | None]  # name, mean, low, high


# ---------------------------------------------------------------------------------------------------------- tables


class Column(NamedTuple):
    """A column of a table: its name and the format of its numbers, "" for texts; a bar shows a share of one."""

    name: str
    form: str = ""
    unit: str = ""
    bar: bool = False


@dataclass(frozen=True)
class Table:
    """A table that a reader can sort by each column.

    Parameters
    ----------
    rows : sequence
        Values in the order of the columns; None is shown as "n/a". The first one is a name.
    sorted_by : int or None
        The column by which the rows are sorted.
    model : str
        If given, a row opens the pictures of the case in its first cell.
    first_is_best : bool
        Whether the first row is highlighted.
    """

    caption: str
    columns: Sequence[Column]
    rows: Sequence[Sequence[Value]]
    sorted_by: int | None = None
    model: str = ""
    first_is_best: bool = False

    def cells(self) -> Iterator[list[tuple[str, float | None, float | None]]]:
        """Each row as (text, value to sort by, length of the bar)."""
        for row in self.rows:
            yield [_cell(value, column) for value, column in zip(row, self.columns, strict=True)]


def _cell(value: Value, column: Column) -> tuple[str, float | None, float | None]:
    if value is None:
        return "n/a", None, None
    if isinstance(value, str):
        return value, None, None
    if isinstance(value, tuple):
        return *value, None
    bar = min(max(float(value), 0.0), 1.0) if column.bar else None
    return f"{value:{column.form}}{column.unit}", float(value), bar


def share_column(name: str) -> Column:
    return Column(name, ".3f", bar=True)


# ---------------------------------------------------------------------------------------------------------- charts


@dataclass(frozen=True)
class Axis:
    """An axis: the values at its ends, the pixels where they are drawn, and about how many ticks to draw."""

    values: tuple[float, float]
    pixels: tuple[float, float]
    label: str = ""
    n_ticks: int = 0
    only_integers: bool = False

    def pixel(self, value: float) -> float:
        """The pixel of a value; values beyond the axis are drawn at its end."""
        (low, high), (start, end) = self.values, self.pixels
        share = (min(max(value, low), high) - low) / (high - low)
        return round(start + share * (end - start), 1)

    @cached_property
    def ticks(self) -> list[tuple[float, str]]:
        """(pixel, text) of each tick; the texts have enough digits to differ."""
        values = tick_values(*self.values, self.n_ticks, self.only_integers) if self.n_ticks else []
        texts = [f"{value:.4g}" for value in values]
        digits = 5
        while len(set(texts)) < len(texts) and digits < 13:
            texts, digits = [f"{value:.{digits}g}" for value in values], digits + 1
        return [(self.pixel(value), text) for value, text in zip(values, texts, strict=True)]


@dataclass(frozen=True)
class Curve:
    """A curve over (x, y); y is None at a gap. `colour` is a number of the palette, `style` is "solid" or "dashed"."""

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
    content : Any
        What this macro draws.
    readout : dict or None
        What report.js shows while a pointer moves over the curves.
    """

    kind: str
    title: str
    x: Axis
    y: Axis
    content: Any
    width: int = 680
    note: str = ""
    readout: dict[str, Any] | None = None


def plot_curves(
    title: str,
    curves: Sequence[Curve],
    x_label: str,
    y_label: str = "",
    y_range: tuple[float | None, float | None] = (None, None),
    note: str = "",
) -> Chart | None:
    """Draw curves over a common axis.

    Parameters
    ----------
    y_range : tuple of float or None
        The ends of the y axis; None follows from the values.

    Returns
    -------
    Chart or None
        None if no value is finite.
    """
    curves = [Curve(curve.name, _clean(curve.points), curve.colour, curve.style) for curve in curves]
    known = [(x, y) for curve in curves for x, y in curve.points if y is not None]
    if not known:
        return None
    xs, ys = zip(*known, strict=True)
    low, high = (given if given is not None else end for given, end in zip(y_range, _with_margin(ys), strict=True))
    x = Axis(_not_empty(min(xs), max(xs)), (52, 438), x_label, 6, only_integers=x_label == "epoch")
    series = [dict(zip(("name", "x", "y"), (c.name, *zip(*c.points, strict=True)), strict=True)) for c in curves]
    readout = {"x": [*x.values, *x.pixels], "label": x_label, "series": series}
    return Chart("curves", title, x, Axis((low, high), (196, 10), y_label, 4), curves, 460, note, readout)


def plot_histogram(title: str, values: Sequence[float], unit: str, note: str = "") -> Chart | None:
    """Draw how often values occur, in at most 20 bins, with a line at the median; None if no value is finite."""
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
    """Draw a row for each label: a dot from 0 to 1 for each case, which report.js opens, and a tick at the mean."""
    known = [(name, [(case, value) for case, value in cases if value is not None]) for name, cases in rows]
    means = [np.mean([value for _, value in cases]) if cases else None for _, cases in known]
    x, y = _row_axes([name for name, _ in known], (0, 1), "Dice")
    content = {"rows": [(*row, mean) for row, mean in zip(known, means, strict=True)], "model": model}
    return Chart("dots", title, x, y, content)


def plot_intervals(title: str, rows: Sequence[Interval], label: str) -> Chart | None:
    """Draw a mean with its 95 % interval for each row that has a mean; the first one is highlighted."""
    known = [row for row in rows if row[1] is not None]
    if not known:
        return None
    values = [value for _, *numbers in known for value in numbers if value is not None]
    x, y = _row_axes([name for name, *_ in known], _with_margin(values), label)
    return Chart("intervals", title, x, y, known)


def _row_axes(names: list[str], values: tuple[float, float], label: str) -> tuple[Axis, Axis]:
    """The axes of a chart with one row for each name, which is at the left."""
    left = 16 + _LETTER_WIDTH * min(44, max(map(len, names)))
    return Axis(values, (left, 658), label, 6), Axis((0, len(names)), (10, 10 + _ROW_HEIGHT * len(names)))


def _clean(points: Sequence[tuple[float, float | None]]) -> list[tuple[float, float | None]]:
    """Every n-th point of a long curve and its last one; values that are not finite become gaps."""
    step, last = max(1, -(-len(points) // _MAX_POINTS)), len(points) - 1
    kept = [point for i, point in enumerate(points) if i % step == 0 or i == last]
    return [(x, y if y is not None and math.isfinite(y) else None) for x, y in kept]


def tick_values(low: float, high: float, about: int, only_integers: bool = False) -> list[float]:
    """Round numbers in a range: multiples of 1, 2 or 5 times a power of ten."""
    rough = (high - low) / about
    power = 10 ** math.floor(math.log10(rough))
    step = next(m * power for m in (1, 2, 5, 10) if m * power >= rough * 0.999)
    step = max(1, step) if only_integers else step
    first = math.ceil(low / step - 1e-9)
    return [float(f"{i * step:.12g}") for i in range(first, math.floor(high / step + 1e-9) + 1)]


def _not_empty(low: float, high: float) -> tuple[float, float]:
    """A range of some size; a constant value gets a range of its own order of magnitude."""
    size = max(abs(low), abs(high))
    if high - low > _MIN_RANGE * size:
        return low, high
    margin = size / 2 or 0.5
    return low - margin, high + margin


def _with_margin(values: Sequence[float]) -> tuple[float, float]:
    low, high = _not_empty(min(values), max(values))
    return low - 0.05 * (high - low), high + 0.05 * (high - low)
