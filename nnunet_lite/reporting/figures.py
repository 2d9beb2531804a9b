"""The tables, charts and pictures of the report as data; templates/tables.html.j2 and charts.html.j2 write them.

Charts: colours are classes of report.css, so a chart follows the page's light or dark theme. A chart takes a few
kilobytes and a millisecond. (matplotlib takes half a second to import and 30 ms for each chart, and its SVG has fixed
colours.)

Pictures: slices as WebP with the outlines of their labels. Axial ones have the patient's right on the left and the
front at the top; coronal ones the right on the left and sagittal ones the front on the left, both with the head at the
top. Files such as PNG are shown as stored.
"""

from __future__ import annotations

import base64
import io
import math
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image as PillowImage

from nnunet_lite.data.geometry import Box, Geometry, Image, Turn, bounding_box, slices, triple, turn_between
from nnunet_lite.data.images import read_label
from nnunet_lite.errors import UserError
from nnunet_lite.planning.schema import Channel, Plan

_MAX_POINTS = 400  # of a curve, about one per pixel
_MIN_RANGE = 1e-9  # of the values; smaller differences are rounding
_MARGIN = 0.05  # of the range of values, on each side of it
_LOG_SHARE = 20  # positive values whose median is below this part of the largest are drawn on a logarithmic axis
_LIMITS = 1.96  # standard deviations: 95 % of normally distributed differences are within
_ROW_HEIGHT = 26  # of charts with one row for each label or model
_LETTER_WIDTH = 6.6  # of the names of the rows
MAX_CHANNELS = 4  # of a case that are shown
_TILE_SIZE = 224  # pixels along the longer side of a picture of the montage
_QUALITY, _METHOD = 75, 4  # of WebP; method 0 is fast, 6 is small
_LEVEL_SAMPLES = 200_000  # voxels for the grey levels of an image
_CT_MARGIN = 0.25  # by which a CT's grey levels exceed the intensities of the foreground

# On pictures, which are dark in both themes: the palette of Okabe and Ito, brightened for outlines.
LABEL_COLOURS = (
    "#56b4e9", "#ff9d4d", "#34d3a2", "#ff8fcf", "#f0e442", "#8fd0ff", "#b69bf0", "#d6a196", "#b4e05a", "#e5e7eb",
)  # fmt: skip
# Of the voxels that a prediction has wrong, as `find_errors` numbers them from 1.
ERROR_COLOURS = {"missed": "#d55e00", "added": "#0072b2", "another label": "#ffd700"}

Value = str | float | tuple[str, float | None] | None  # of a cell; (text, value to sort by)
Interval = tuple[str, float | None, float | None, float | None]  # name, mean, low, high
Thinned = tuple[np.ndarray, tuple[int, int]]  # a slice of a label map with fewer voxels, see `thin_out`
Picture = dict[str, Any]  # a plane as tables.html.j2 and report.js draw it, see `OrientedImage.draw`


# ---------------------------------------------------------------------------------------------------------- tables


class Column(NamedTuple):
    """A column of a table.

    Parameters
    ----------
    name : str
        Its heading.
    number_format : str
        How its numbers are written; "" for texts.
    unit : str
        What follows each number.
    bar : bool
        Whether a bar shows each number, a share of one.
    """

    name: str
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
        Its columns.
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
    return Cell(f"{value:{column.number_format}}{column.unit}", float(value), bar=bar)


def share_column(name: str) -> Column:
    """Return a column of shares of one, such as Dice, with bars."""
    return Column(name, ".3f", bar=True)


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
        values: list[float] = []
        if self.logarithmic:
            values = log_tick_values(*self.values)
        elif self.n_ticks:
            values = tick_values(*self.values, self.n_ticks, self.only_integers)
        texts: list[str] = []
        for digits in range(4, 13):
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


def plot_intervals(title: str, rows: Sequence[Interval], label: str) -> Chart | None:
    """Draw a mean with its 95 % interval for each row that has a mean; the first one is highlighted.

    Parameters
    ----------
    title : str
        The heading.
    rows : sequence of (str, float or None, float or None, float or None)
        Name, mean, and the ends of the interval.
    label : str
        The name of the x axis.

    Returns
    -------
    Chart or None
        None if no row has a mean.
    """
    intervals = [row for row in rows if row[1] is not None]
    if not intervals:
        return None
    values = [value for _, *numbers in intervals for value in numbers if value is not None]
    x, y = _row_axes([name for name, *_ in intervals], _range(values, _MARGIN), label)
    return Chart("intervals", title, x, y, intervals)


def plot_agreement(title: str, volumes: Mapping[str, tuple[float, float]], unit: str, model: str) -> Chart | None:
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
    x = Axis(_range([mean for _, mean, _ in points], _MARGIN), (52, 438), f"mean of both ({unit})", 6)
    heights = _range([*differences, *(height for _, height in lines)], _MARGIN)
    y = Axis(heights, (196, 10), f"prediction - reference ({unit})", 4)
    note = f"bias {bias:+.3g} {unit}, 95 % limits {bias - spread:+.3g} to {bias + spread:+.3g}, {len(points)} cases"
    return Chart("agreement", title, x, y, {"points": points, "lines": lines, "model": model}, 460, note)


def _row_axes(names: list[str], values: tuple[float, float], label: str) -> tuple[Axis, Axis]:
    """Return the axes of a chart with one row for each name, which is at the left."""
    left = 16 + _LETTER_WIDTH * min(44, max(map(len, names)))
    return Axis(values, (left, 658), label, 6), Axis((0, len(names)), (10, 10 + _ROW_HEIGHT * len(names)))


def _clean(points: Sequence[tuple[float, float | None]]) -> list[tuple[float, float | None]]:
    """Keep every n-th point of a long curve and its last one; values that are not finite become gaps."""
    step, last = max(1, -(-len(points) // _MAX_POINTS)), len(points) - 1
    kept = [point for i, point in enumerate(points) if i % step == 0 or i == last]
    return [(x, y if y is not None and math.isfinite(y) else None) for x, y in kept]


def tick_values(low: float, high: float, about: int, only_integers: bool = False) -> list[float]:
    """Return round numbers in a range: multiples of 1, 2 or 5 times a power of ten.

    Parameters
    ----------
    low, high : float
        The ends of the range.
    about : int
        How many numbers, about.
    only_integers : bool
        Whether only integers are allowed.
    """
    rough = (high - low) / about
    power = 10 ** math.floor(math.log10(rough))
    step = next(m * power for m in (1, 2, 5, 10) if m * power >= rough * 0.999)
    step = max(1, step) if only_integers else step
    first = math.ceil(low / step - 1e-9)
    return [float(f"{i * step:.12g}") for i in range(first, math.floor(high / step + 1e-9) + 1)]


def log_tick_values(low: float, high: float) -> list[float]:
    """Return the powers of ten in a range of positive numbers; in a narrow one also their 2 and 5 times.

    Parameters
    ----------
    low, high : float
        The ends of the range.
    """
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    values = [float(f"{step}e{power}") for power in powers for step in ((1, 2, 5) if high < 100 * low else (1,))]
    return [value for value in values if low <= value <= high]


def _range(values: Sequence[float], margin: float = 0.0) -> tuple[float, float]:
    """Return the range of values with a margin, a share of it; a constant gets a range of its order of magnitude."""
    low, high = min(values), max(values)
    size = max(abs(low), abs(high))
    if size == 0:
        return 0.0, 1.0
    if high - low <= _MIN_RANGE * size:
        low, high = low - size / 2, high + size / 2
    return low - margin * (high - low), high + margin * (high - low)


# ---------------------------------------------------------------------------------------------------------- pictures


class Plane(NamedTuple):
    """A plane of a turned array.

    Parameters
    ----------
    name : str
        Such as "axial".
    normal, rows, columns : int
        Axes (0, 1, 2) of the array.
    upwards : bool
        Whether the first row is at the bottom.
    sides : str
        The letters at the left, right, top and bottom.
    """

    name: str
    normal: int
    rows: int
    columns: int
    upwards: bool = False
    sides: str = ""


_PATIENT_PLANES = (
    Plane("axial", 0, 1, 2, sides="RLAP"),
    Plane("coronal", 1, 0, 2, upwards=True, sides="RLSI"),
    Plane("sagittal", 2, 0, 1, upwards=True, sides="APSI"),
)
_STORED_PLANES = (Plane("xy", 0, 1, 2), Plane("xz", 1, 0, 2), Plane("yz", 2, 0, 1))


def planes_of(geometry: Geometry) -> tuple[Turn, tuple[Plane, ...]]:
    """Return how to turn an array (z, y, x) to the patient's head, back and left, and the planes to show.

    An image without a known orientation is shown as it is stored, a picture in its one plane.

    Parameters
    ----------
    geometry : Geometry
        Of the image.

    Returns
    -------
    Turn
        The transposition and flips.
    tuple of Plane
        The planes.
    """
    if geometry.orientation is None or geometry.shape[0] == 1:
        return Turn(), _STORED_PLANES[: 1 if geometry.shape[0] == 1 else 3]
    return turn_between(geometry.orientation, "LPS"), _PATIENT_PLANES


class OrientedImage:
    """An image turned to the patient's axes, with its planes and the grey levels of its channels.

    Parameters
    ----------
    image : Image
        The image as it is stored.
    plan : Plan
        Its labels and the statistics of its channels.
    """

    def __init__(self, image: Image, plan: Plan) -> None:
        self.turn, self.planes = planes_of(image.geometry)
        self.geometry, self.labels, self.colour = image.geometry, plan.labels, image.is_colour
        self.array, self.spacing = self.turn.apply(image.array), self.geometry.turned(self.turn).spacing
        channels = zip(image.array[:MAX_CHANNELS], plan.channels, strict=False)
        self.levels = [(0.0, 255.0) if self.colour else grey_levels(values, about) for values, about in channels]

    def tile(self, reference: np.ndarray | None) -> Picture:
        """Draw the first plane, through most of the labels, in the first channel or in colour.

        Parameters
        ----------
        reference : ndarray or None, shape (z, y, x)
            The turned label map.
        """
        shape = self.array.shape[1:]
        at = tuple(n // 2 for n in shape)
        if reference is not None:
            at = fullest_slices(reference != self.labels.background)
        whole = (0, shape[0]), (0, shape[1]), (0, shape[2])
        return self.draw(self.planes[0], at, whole, _TILE_SIZE, reference, None, channels=3 if self.colour else 1)

    def overlay(self, reference: np.ndarray | None, file: Path, size: int) -> list[Picture]:
        """Draw the planes through the slices with most errors of a prediction.

        Parameters
        ----------
        reference : ndarray or None, shape (z, y, x)
            The turned label map.
        file : Path
            The prediction.
        size : int
            Pixels along the longer side.

        Raises
        ------
        UserError
            The prediction cannot be read, or has another shape than its image.
        """
        stored, geometry, _ = read_label(file, self.geometry)
        if geometry.shape != self.geometry.shape:
            raise UserError(f"has shape {geometry.shape}, its image {self.geometry.shape}", file)
        prediction, labels = self.turn.apply(stored), self.labels
        reference = np.zeros_like(prediction) if reference is None else reference
        wrong = prediction != reference
        if labels.ignore is not None:
            wrong &= reference != labels.ignore
        foreground = (reference != labels.background) | (prediction != labels.background)
        at, box = fullest_slices(wrong if wrong.any() else foreground), box_around(foreground)
        return [self.draw(plane, at, box, size, reference, prediction) for plane in self.planes]

    def draw(
        self,
        plane: Plane,
        at: tuple[int, ...],
        box: Box,
        size: int,
        reference: np.ndarray | None,
        prediction: np.ndarray | None,
        channels: int = MAX_CHANNELS,
    ) -> Picture:
        """Draw one plane for the page.

        Parameters
        ----------
        plane : Plane
            Which one.
        at : tuple of int
            The slice along each axis.
        box : Box
            The part of the image to show.
        size : int
            Pixels along the longer side.
        reference, prediction : ndarray or None, shape (z, y, x)
            Turned label maps to outline.
        channels : int
            How many of them are shown.

        Returns
        -------
        dict
            WebP of each channel, outlines in voxels, size in voxels and mm, and the slice as it is stored; "errors" are
            the outlines of each kind of error.
        """
        index, n = at[plane.normal], self.array.shape[1 + plane.normal]
        visible = zip(self.array[:channels], self.levels, strict=False)
        pixels = [to_bytes(slice_of(channel, plane, index, box), levels) for channel, levels in visible]
        pictures = [np.stack(pixels, axis=-1)] if self.colour else pixels
        height, width = pixels[0].shape
        label_slices = [
            None if label is None else thin_out(slice_of(label, plane, index, box), size)
            for label in (reference, prediction)
        ]
        outlines = [None if label is None else self._outlines(*label) for label in label_slices]
        return {
            "name": plane.name,
            "sides": plane.sides,
            "size": [width, height],
            "mm": [round(width * self.spacing[plane.columns], 3), round(height * self.spacing[plane.rows], 3)],
            "slice": n - 1 - index if self.turn.reversed[plane.normal] else index,
            "of": n,
            "axis": "zyx"[self.turn.order[plane.normal]],
            "cropped": any(high - low < n for (low, high), n in zip(box, self.array.shape[1:], strict=True)),
            "images": [webp(picture, size) for picture in pictures],
            "reference": outlines[0] or [],
            "prediction": outlines[1],
            "errors": self._errors(*label_slices),
        }

    def _errors(self, reference: Thinned | None, prediction: Thinned | None) -> list[str]:
        """Outline each kind of error in a slice (SVG paths in the order of `ERROR_COLOURS`)."""
        if reference is None or prediction is None:
            return []
        wrong = find_errors(reference[0], prediction[0], self.labels.background)
        if self.labels.ignore is not None:
            wrong[reference[0] == self.labels.ignore] = 0
        return [outline_path(wrong == kind, reference[1]) for kind in range(1, len(ERROR_COLOURS) + 1)]

    def _outlines(self, label: np.ndarray, step: tuple[int, int]) -> list[tuple[int, str]]:
        """Outline the regions in a slice: (number of the region, SVG path)."""
        masks = (np.isin(label, members) for members in self.labels.region_values)
        return [(i, outline_path(mask, step)) for i, mask in enumerate(masks) if mask.any()]


def find_errors(reference: np.ndarray, prediction: np.ndarray, background: int = 0) -> np.ndarray:
    """Number the voxels where two label maps differ: 1 missed, 2 added, 3 another label; 0 where they are equal.

    Parameters
    ----------
    reference, prediction : ndarray of int
        Label maps of one shape.
    background : int
        Its value in both.

    Returns
    -------
    ndarray of uint8
        The keys of `ERROR_COLOURS`, from 1.
    """
    wrong = np.where(prediction == background, np.uint8(1), np.where(reference == background, np.uint8(2), np.uint8(3)))
    wrong[prediction == reference] = 0
    return wrong


def fullest_slices(mask: np.ndarray) -> tuple[int, ...]:
    """Return the slice along each axis that has most of a mask; the middle one if the mask is empty.

    Parameters
    ----------
    mask : ndarray of bool, shape (z, y, x)
    """
    if not mask.any():
        return tuple(n // 2 for n in mask.shape)
    by_row = mask.sum(axis=2, dtype=np.int64)
    counts = by_row.sum(axis=1), by_row.sum(axis=0), mask.sum(axis=(0, 1), dtype=np.int64)
    return tuple(int(count.argmax()) for count in counts)


def box_around(mask: np.ndarray, margin: float = 0.3, smallest: int = 96) -> Box:
    """Return the box of a mask with a margin; the whole array if the mask is empty.

    Parameters
    ----------
    mask : ndarray of bool, shape (z, y, x)
    margin : float
        On each side, as a share of the size of the mask.
    smallest : int
        The least size of the box in voxels, where the array is that large.
    """
    box = []
    for (low, high), n in zip(bounding_box(mask), mask.shape, strict=True):
        size = max(high - low + 2 * int(np.ceil(margin * (high - low))), smallest)
        low = max(0, min((low + high - size) // 2, n - size))
        box.append((low, min(n, low + size)))
    return triple(box)


def slice_of(array: np.ndarray, plane: Plane, index: int, box: Box) -> np.ndarray:
    """Return a slice (rows, columns) of a turned array, with the rows as they are drawn.

    Parameters
    ----------
    array : ndarray, shape (z, y, x)
        The turned array.
    plane : Plane
        Which plane.
    index : int
        Which slice along its normal.
    box : Box
        The part to show.
    """
    where: list[slice | int] = [*slices(box)]
    where[plane.normal] = index
    picture = array[tuple(where)]
    return picture[::-1] if plane.upwards else picture


def grey_levels(values: np.ndarray, channel: Channel) -> tuple[float, float]:
    """Return the intensities of black and white.

    CT: those of the foreground with a margin. Others: the 1st and 99.5th percentile of all but the darkest value.

    Parameters
    ----------
    values : ndarray, shape (z, y, x)
        A channel of the image.
    channel : Channel
        Its normalization and statistics.
    """
    if channel.normalization == "ct":
        low, high = channel.statistics.percentile_00_5, channel.statistics.percentile_99_5
        margin = _CT_MARGIN * max(high - low, 1.0)
        return low - margin, high + margin
    flat = values.reshape(-1)[:: max(1, values.size // _LEVEL_SAMPLES)]
    flat = flat[np.isfinite(flat)]
    inside = flat[flat > flat.min()] if flat.size else flat
    if not inside.size:
        return 0.0, 1.0
    low, high = (float(v) for v in np.percentile(inside, (1, 99.5)))
    return (low, high) if high > low else (low, low + 1)


def to_bytes(picture: np.ndarray, levels: tuple[float, float]) -> np.ndarray:
    """Convert intensities to grey levels 0 to 255; values that are not finite are black or white.

    Parameters
    ----------
    picture : ndarray, shape (y, x)
        Intensities.
    levels : tuple of float
        Those of black and white.
    """
    low, high = levels
    grey = (np.nan_to_num(picture.astype(np.float32), nan=low, posinf=high, neginf=low) - low) * (255 / (high - low))
    return np.clip(np.rint(grey), 0, 255).astype(np.uint8)


def webp(picture: np.ndarray, size: int) -> str:
    """Write a picture as a WebP file in base64.

    Parameters
    ----------
    picture : ndarray of uint8, shape (y, x) or (y, x, 3)
    size : int
        The most pixels along an axis; a larger picture shrinks.
    """
    image = PillowImage.fromarray(np.ascontiguousarray(picture))
    page_size = min(image.width, size), min(image.height, size)
    if page_size != image.size:
        image = image.resize(page_size, PillowImage.Resampling.BOX)
    file = io.BytesIO()
    image.save(file, "WEBP", quality=_QUALITY, method=_METHOD)
    return base64.b64encode(file.getvalue()).decode("ascii")


def thin_out(label: np.ndarray, size: int) -> Thinned:
    """Take every n-th voxel of a label map, so that at most about `size` remain along an axis; also returns n (y, x).

    Parameters
    ----------
    label : ndarray, shape (y, x)
    size : int
    """
    down, across = (max(1, -(-n // size)) for n in label.shape)
    return label[down // 2 :: down, across // 2 :: across], (down, across)


def outline_path(mask: np.ndarray, step: tuple[int, int] = (1, 1)) -> str:
    """Draw the closed outlines of a mask (y, x) along the edges of its voxels, as an SVG path.

    Holes run the other way round, so that both fill rules leave them empty.

    Parameters
    ----------
    mask : ndarray of bool, shape (y, x)
    step : tuple of int
        Size (y, x) of a pixel of the mask in the picture.
    """
    padded = np.zeros((mask.shape[0] + 2, mask.shape[1] + 2), np.int8)
    padded[1:-1, 1:-1] = mask
    across, down = defaultdict(list), defaultdict(list)  # start (y, x) -> ends of the runs that begin there
    # the mask is to the right of the path: its upper edges run to the right, its left edges up
    for y, first, last, sign in _runs(np.diff(padded, axis=0)):
        start, end = (first, last) if sign > 0 else (last, first)
        across[y, start].append((y, end))
    for x, first, last, sign in _runs(np.diff(padded, axis=1).T):
        start, end = (last, first) if sign > 0 else (first, last)
        down[start, x].append((end, x))
    paths = []
    for y, x in list(across):
        while across[y, x]:
            parts, at = [f"M{x * step[1]} {y * step[0]}"], (y, x)
            while True:
                corner = across[at].pop()
                parts.append(f"h{(corner[1] - at[1]) * step[1]}")
                at = down[corner].pop()
                if at == (y, x):  # z draws the last run
                    break
                parts.append(f"v{(at[0] - corner[0]) * step[0]}")
            paths.append("".join([*parts, "z"]))
    return "".join(paths)


def _runs(edges: np.ndarray) -> list[tuple[int, int, int, int]]:
    """Find runs of equal nonzero numbers along the rows: (row, first edge, last edge, number), with 0 at both ends."""
    rows, bounds = np.nonzero(np.diff(edges, axis=1))
    same_row = rows[1:] == rows[:-1]  # two bounds of a row enclose a run, which may be one of zeros
    rows, first, last = rows[:-1][same_row], bounds[:-1][same_row], bounds[1:][same_row]
    numbers = edges[rows, first + 1]
    runs = (array[numbers != 0].tolist() for array in (rows, first, last, numbers))
    return list(zip(*runs, strict=True))
