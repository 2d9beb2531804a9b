"""Charts as inline SVG: a few kilobytes each, crisp at any size, in the colours of the page's light or dark theme.

A chart is plain drawing: colours are classes that report.css fills in, and report.js adds what a pointer reads off.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from markupsafe import Markup, escape

_MOST_POINTS = 400  # of a curve, about one per pixel; longer ones are thinned
_COLOURS = 10
_LEAST_RANGE = 1e-9  # of the values: less is rounding


@dataclass(frozen=True)
class Series:
    """A curve: None is a gap. `colour` counts through the palette; `kind` is "solid" or "dashed"."""

    name: str
    xs: Sequence[float]
    ys: Sequence[float | None]
    colour: int = 0
    kind: str = "solid"


@dataclass(frozen=True)
class _Frame:
    """The drawing area in pixels, and the ranges it shows."""

    width: float
    height: float
    x: tuple[float, float]
    y: tuple[float, float]
    left: float = 52
    right: float = 22
    top: float = 10
    bottom: float = 34

    def at_x(self, value: float) -> float:
        low, high = self.x
        return self.left + (value - low) / (high - low) * (self.width - self.left - self.right)

    def at_y(self, value: float) -> float:
        low, high = self.y
        return self.height - self.bottom - (value - low) / (high - low) * (self.height - self.top - self.bottom)


def curves(
    title: str,
    series: Sequence[Series],
    x_label: str,
    y_label: str,
    y_range: tuple[float | None, float | None] = (None, None),
) -> Markup:
    """Curves over a common axis, with a legend of the distinct names; empty where there is nothing to draw.

    `y_range` : ends of the axis; None for one that follows from the values.
    """
    series = [_finite(thinned(s)) for s in series]
    known = [(x, y) for s in series for x, y in zip(s.xs, s.ys, strict=True) if y is not None]
    if not known:
        return Markup("")
    xs, ys = zip(*known, strict=True)
    low, high = (end if given is None else given for end, given in zip(_padded(min(ys), max(ys)), y_range, strict=True))
    frame = _Frame(460, 230, _widened(min(xs), max(xs)), (low, high))
    lines = [_line(s, frame) for s in series]
    data = {
        "x": [frame.x[0], frame.x[1], frame.left, frame.width - frame.right],
        "label": x_label,
        "series": [{"name": s.name, "x": list(s.xs), "y": list(s.ys)} for s in series],
    }
    readout = f'data-curves="{escape(json.dumps(data, separators=(",", ":")))}"'
    return _svg(title, frame, _axes(frame, x_label, y_label), *lines, attributes=readout)


def thinned(series: Series) -> Series:
    """Every n-th point of a long curve, the last one always."""
    step = -(-len(series.xs) // _MOST_POINTS)
    if step <= 1:
        return series
    kept = sorted({*range(0, len(series.xs), step), len(series.xs) - 1})
    return replace(series, xs=[series.xs[i] for i in kept], ys=[series.ys[i] for i in kept])


def _finite(series: Series) -> Series:
    """A curve whose values that are no numbers are gaps."""
    return replace(series, ys=[y if y is not None and math.isfinite(y) else None for y in series.ys])


def histogram(title: str, values: Sequence[float], unit: str) -> Markup:
    """How often values occur, in at most 20 bins; the median is a line. Empty where there is nothing to draw."""
    values = [value for value in values if math.isfinite(value)]
    if not values:
        return Markup("")
    counts, edges = np.histogram(values, bins=min(20, max(4, math.ceil(math.sqrt(len(values))) * 2)))
    frame = _Frame(260, 130, (float(edges[0]), float(edges[-1])), (0, float(counts.max())), left=34, bottom=32)
    bars = []
    for count, low, high in zip(counts.tolist(), edges[:-1].tolist(), edges[1:].tolist(), strict=True):
        if count:
            x, y = frame.at_x(low), frame.at_y(count)
            name = f"{low:.4g} to {high:.4g} {unit}: {count}"
            bars.append(f'<rect class="bar" x="{x + 0.5:.1f}" y="{y:.1f}" width="{frame.at_x(high) - x - 1:.1f}" '
                        f'height="{frame.at_y(0) - y:.1f}"><title>{escape(name)}</title></rect>')  # fmt: skip
    x = frame.at_x(float(np.median(values)))
    median = f'<path class="median" d="M{x:.1f} {frame.top}V{frame.height - frame.bottom}"/>'
    return _svg(title, frame, _axes(frame, unit, "", whole=True), *bars, median)


def dots(title: str, rows: Sequence[tuple[str, Sequence[tuple[str, float | None]]]], model: str) -> Markup:
    """A row of dots for each label, from 0 to 1: a dot for each case, which report.js opens; a tick at the mean."""
    height = 26.0
    names = [_short(name, 22) for name, _ in rows]
    left = 16 + 6.6 * max(map(len, names))
    frame = _Frame(680, 44 + height * len(rows), (0, 1), (0, len(rows)), left=left)
    parts = [_x_axis(frame, "Dice")]
    for i, (name, (_, cases)) in enumerate(zip(names, rows, strict=True)):
        middle = frame.top + height * (i + 0.5)
        parts.append(
            f'<text class="name" x="{left - 8:.0f}" y="{middle + 4:.1f}" text-anchor="end">{escape(name)}</text>'
        )
        known = [(case, value) for case, value in cases if value is not None]
        for j, (case, value) in enumerate(known):
            y = middle + (j * 7 % 11 - 5) * 1.5  # spread out, always the same way
            parts.append(
                f'<circle class="dot c{i % _COLOURS}" cx="{frame.at_x(value):.1f}" cy="{y:.1f}" r="3" '
                f'data-open="{escape(case)}" data-model="{escape(model)}">'
                f"<title>{escape(case)}: {value:.3f}</title></circle>"
            )
        if known:
            x = frame.at_x(float(np.mean([value for _, value in known])))
            parts.append(f'<path class="mean" d="M{x:.1f} {middle - 11:.1f}v22"><title>mean</title></path>')
    return _svg(title, frame, *parts)


def intervals(title: str, rows: Sequence[tuple[str, float | None, float | None, float | None]], label: str) -> Markup:
    """A mean with its 95 % interval for each row that has one, the first row marked."""
    height = 26.0
    known = [(name, mean, low, high) for name, mean, low, high in rows if mean is not None]
    if not known:
        return Markup("")
    names = [_short(name, 44) for name, *_ in known]
    ends = [v for _, *values in known for v in values if v is not None]
    left = 16 + 6.6 * max(map(len, names))
    frame = _Frame(680, 44 + height * len(known), _padded(min(ends), max(ends)), (0, len(known)), left=left)
    parts = [_x_axis(frame, label)]
    for i, (name, (_, mean, low, high)) in enumerate(zip(names, known, strict=True)):
        y = frame.top + height * (i + 0.5)
        kind = "first" if i == 0 else "other"
        parts.append(f'<text class="name" x="{left - 8:.0f}" y="{y + 4:.1f}" text-anchor="end">{escape(name)}</text>')
        if low is not None and high is not None:
            parts.append(f'<path class="interval {kind}" d="M{frame.at_x(low):.1f} {y:.1f}H{frame.at_x(high):.1f}"/>')
        parts.append(f'<circle class="estimate {kind}" cx="{frame.at_x(mean):.1f}" cy="{y:.1f}" r="4.5">'
                     f"<title>{escape(name)}: {mean:.4f}</title></circle>")  # fmt: skip
    return _svg(title, frame, *parts)


def _svg(title: str, frame: _Frame, *parts: str, attributes: str = "") -> Markup:
    return Markup(
        f'<svg class="plot" role="img" aria-label="{escape(title)}" viewBox="0 0 {frame.width:g} {frame.height:g}" '
        f'width="{frame.width:g}" height="{frame.height:g}" {attributes}>{"".join(parts)}</svg>'
    )


def _line(series: Series, frame: _Frame) -> str:
    """A curve in which a missing value is a gap; values beyond the frame are drawn at its edge, a lone one as a dot."""
    look, parts, pen = f"line {series.kind} c{series.colour % _COLOURS}", [], "M"
    for x, y in zip(series.xs, series.ys, strict=True):
        if y is None:
            pen = "M"
            continue
        at = frame.at_x(x), frame.at_y(min(max(y, frame.y[0]), frame.y[1]))
        parts.append(f"{pen}{at[0]:.1f} {at[1]:.1f}")
        pen = "L"
    title = f"<title>{escape(series.name)}</title>"
    if len(parts) == 1:
        return f'<circle class="{look}" cx="{at[0]:.1f}" cy="{at[1]:.1f}" r="4">{title}</circle>'
    return f'<path class="{look}" d="{"".join(parts)}">{title}</path>'


def _axes(frame: _Frame, x_label: str, y_label: str, whole: bool = False) -> str:
    parts = [_x_axis(frame, x_label, x_label == "epoch")]
    for value, text in _marks(frame.y, 4, whole):
        y = frame.at_y(value)
        parts.append(f'<path class="grid" d="M{frame.left:g} {y:.1f}H{frame.width - frame.right:g}"/>'
                     f'<text x="{frame.left - 6:g}" y="{y + 4:.1f}" text-anchor="end">{text}</text>')  # fmt: skip
    if y_label:
        middle = (frame.top + frame.height - frame.bottom) / 2
        parts.append(f'<text class="label" transform="translate(11 {middle:.0f}) rotate(-90)" '
                     f'text-anchor="middle">{escape(y_label)}</text>')  # fmt: skip
    return "".join(parts)


def _x_axis(frame: _Frame, label: str, whole: bool = False) -> str:
    low = frame.height - frame.bottom
    parts = []
    for value, text in _marks(frame.x, 6, whole):
        x = frame.at_x(value)
        parts.append(f'<path class="grid" d="M{x:.1f} {frame.top:g}V{low:g}"/>'
                     f'<text x="{x:.1f}" y="{low + 14:g}" text-anchor="middle">{text}</text>')  # fmt: skip
    middle = (frame.left + frame.width - frame.right) / 2
    parts.append(
        f'<text class="label" x="{middle:.0f}" y="{frame.height - 4:g}" text-anchor="middle">{escape(label)}</text>'
    )
    return "".join(parts)


def ticks(low: float, high: float, about: int, whole: bool = False) -> list[float]:
    """Round numbers within a range: multiples of 1, 2 or 5 times a power of ten."""
    rough = (high - low) / about
    power = 10 ** math.floor(math.log10(rough))
    step = next(m * power for m in (1, 2, 5, 10) if m * power >= rough * 0.999)
    step = max(1, step) if whole else step
    first = math.ceil(low / step - 1e-9)
    return [float(f"{i * step:.12g}") for i in range(first, math.floor(high / step + 1e-9) + 1)]


def _marks(limits: tuple[float, float], about: int, whole: bool) -> list[tuple[float, str]]:
    """Ticks with their texts, which have as many digits as tell neighbours apart."""
    values = ticks(*limits, about, whole)
    for digits in range(4, 13):
        texts = [f"{value:.{digits}g}" for value in values]
        if len(set(texts)) == len(texts):
            break
    return list(zip(values, texts, strict=True))


def _widened(low: float, high: float) -> tuple[float, float]:
    """A range that is not empty, about a value that does not change, in its own order of magnitude."""
    size = max(abs(low), abs(high))
    if high - low > _LEAST_RANGE * size:
        return low, high
    margin = size / 2 or 0.5
    return low - margin, high + margin


def _padded(low: float, high: float) -> tuple[float, float]:
    low, high = _widened(low, high)
    return low - 0.05 * (high - low), high + 0.05 * (high - low)


def _short(name: str, most: int) -> str:
    return name if len(name) <= most else name[: most - 1] + "…"
