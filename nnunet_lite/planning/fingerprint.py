"""What planning knows of a data set: spacings, shapes after cropping, and the intensities of the foreground.

The intensities are those of nnU-Net 2.8.1, drawn from the same random numbers: 1e8 voxels in all, an equal share from
each case, with replacement, from the voxels that are not background. Since most cases have fewer foreground voxels than
their share, what is kept is each distinct value with the number of times it was drawn, not 1e8 numbers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import ValidationError

from nnunet_lite.data.check import check_dataset
from nnunet_lite.data.dataset import Dataset
from nnunet_lite.data.geometry import Geometry, common_orientation, nonzero_box, slices, turn_between
from nnunet_lite.data.problems import Report
from nnunet_lite.errors import UserError
from nnunet_lite.files import read_json
from nnunet_lite.planning.draws import Draws, Stream
from nnunet_lite.planning.schema import Statistics

SAMPLES = 100_000_000  # foreground voxels per channel over the whole data set
_MANY = 1 << 22  # distinct values of one channel above which they are rounded: bounds the memory

Shape = tuple[int, int, int]
Spacing = tuple[float, float, float]


@dataclass(frozen=True)
class Fingerprint:
    """The content of nnU-Net's dataset_fingerprint.json.

    Parameters
    ----------
    spacings : of each case, mm (z, y, x), turned to `orientation`.
    shapes_after_crop : of each case, voxels (z, y, x) of the box around what is not zero in every channel, turned too.
    relative_size_after_crop : median share of the voxels that this box holds.
    intensities : of each channel, over the foreground voxels of all cases.
    case_ids : in the order of the above; empty for a fingerprint that nnU-Net wrote.
    orientation : that images are turned to, as in `Geometry`; None where no case has a known one.
    orientations : of each case, as in its file; empty for a fingerprint that nnU-Net wrote.
    """

    spacings: tuple[Spacing, ...]
    shapes_after_crop: tuple[Shape, ...]
    relative_size_after_crop: float
    intensities: tuple[Statistics, ...]
    case_ids: tuple[str, ...] = ()
    orientation: str | None = None
    orientations: tuple[str | None, ...] = ()

    def to_nnunet(self) -> dict[str, Any]:
        """As nnU-Net's dataset_fingerprint.json, with case ids and orientations added."""
        return {
            "spacings": [list(s) for s in self.spacings],
            "shapes_after_crop": [list(s) for s in self.shapes_after_crop],
            "median_relative_size_after_cropping": self.relative_size_after_crop,
            "foreground_intensity_properties_per_channel": {
                str(i): s.model_dump() for i, s in enumerate(self.intensities)
            },
            "case_ids": list(self.case_ids),
            "orientation": self.orientation,
            "orientations": list(self.orientations),
        }

    @classmethod
    def from_nnunet(cls, value: dict[str, Any]) -> Fingerprint:
        """From the content of a dataset_fingerprint.json.

        Raises
        ------
        UserError : something is missing or of the wrong kind.
        """
        try:
            per_channel = value["foreground_intensity_properties_per_channel"]
            return cls(
                spacings=tuple((float(z), float(y), float(x)) for z, y, x in value["spacings"]),
                shapes_after_crop=tuple((int(z), int(y), int(x)) for z, y, x in value["shapes_after_crop"]),
                relative_size_after_crop=float(value["median_relative_size_after_cropping"]),
                intensities=tuple(Statistics(**per_channel[str(i)]) for i in range(len(per_channel))),
                case_ids=tuple(value.get("case_ids", ())),
                orientation=value.get("orientation"),
                orientations=tuple(value.get("orientations", ())),
            )
        except (KeyError, TypeError, ValueError, AttributeError, ValidationError) as error:
            reason = " ".join(str(error).split())
            raise UserError(f"is no fingerprint ({type(error).__name__}: {reason:.120})") from None

    @classmethod
    def read(cls, path: Path) -> Fingerprint:
        """Read a fingerprint.json, ours or nnU-Net's.

        Raises
        ------
        UserError : no such file, no JSON, or not a fingerprint.
        """
        try:
            return cls.from_nnunet(read_json(path))
        except UserError as error:
            raise error if error.file else UserError(error.what, path) from None


@dataclass(frozen=True)
class Values:
    """Distinct values in ascending order, float32, and how often each occurs."""

    values: np.ndarray
    counts: np.ndarray


@dataclass(frozen=True)
class CaseFingerprint:
    """What one case adds to the fingerprint; its axes are those of the file."""

    orientation: str | None
    spacing: Spacing
    shape_after_crop: Shape
    relative_size: float
    foreground: tuple[Values, ...]


def check_and_fingerprint(
    dataset: Dataset,
    workers: int | None = None,
    progress: Callable[[Iterable[Any], int, str], Iterable[Any]] | None = None,
) -> tuple[Report, Fingerprint | None]:
    """Check a data set and take its fingerprint in a single pass: each raw file is read once.

    Parameters
    ----------
    workers : threads; None for one per CPU this process may use, 0 for none.
    progress : such as `nnunet_lite.log.progress`.

    Returns
    -------
    the report, and the fingerprint, None where the report has errors or a geometry that is not accepted.
    """
    share = SAMPLES // max(1, len(dataset.cases))
    collected = Collector(len(dataset.channels))
    stream = Stream()

    def visit(image: np.ndarray, geometry: Geometry, foreground: np.ndarray) -> CaseFingerprint:
        return case_fingerprint(image, geometry, foreground, share, Draws(stream))

    report = check_dataset(dataset, visit, collected.add, workers, progress)
    return report, collected.fingerprint(dataset.orientation) if report.can_be_planned else None


def case_fingerprint(
    image: np.ndarray, geometry: Geometry, foreground: np.ndarray, samples: int, draws: Draws
) -> CaseFingerprint:
    """One case's share: image (channels, z, y, x), foreground mask (z, y, x), number of voxels to draw."""
    box = nonzero_box(image)
    shape = tuple(high - low for low, high in box)
    inside = slices(box)
    mask = foreground[inside]
    drawn = tuple(_draw(channel[inside][mask].astype(np.float32), samples, draws) for channel in image)
    relative = float(np.prod(shape) / np.prod(geometry.shape))
    return CaseFingerprint(geometry.orientation, geometry.spacing, shape, relative, drawn)  # type: ignore[arg-type]


class Collector:
    """Takes one case after the other; what it holds does not grow with their number."""

    def __init__(self, channels: int) -> None:
        self._cases: dict[str, CaseFingerprint] = {}
        self._merged = [Values(np.zeros(0, np.float32), np.zeros(0, np.int64))] * channels
        self._pending: list[tuple[Values, ...]] = []

    def add(self, case_id: str, case: CaseFingerprint) -> None:
        self._cases[case_id] = replace(case, foreground=())
        self._pending.append(case.foreground)
        if sum(values.values.size for values, *_ in self._pending) > _MANY:
            self._merge()

    def _merge(self) -> None:
        self._merged = [_joined(parts) for parts in zip(self._merged, *self._pending, strict=True)]
        self._pending = []

    def fingerprint(self, orientation: str | None = None) -> Fingerprint:
        """The fingerprint of all cases, turned to an orientation (default: the one that most cases have)."""
        self._merge()
        cases = list(self._cases.values())
        orientation = orientation or common_orientation(case.orientation for case in cases)
        orders = [turn_between(case.orientation, orientation).order for case in cases]
        pairs = list(zip(cases, orders, strict=True))
        return Fingerprint(
            spacings=tuple((c.spacing[a], c.spacing[b], c.spacing[d]) for c, (a, b, d) in pairs),
            shapes_after_crop=tuple(
                (c.shape_after_crop[a], c.shape_after_crop[b], c.shape_after_crop[d]) for c, (a, b, d) in pairs
            ),
            relative_size_after_crop=float(np.median([case.relative_size for case in cases])),
            intensities=tuple(_statistics(values) for values in self._merged),
            case_ids=tuple(self._cases),
            orientation=orientation,
            orientations=tuple(case.orientation for case in cases),
        )


def _draw(values: np.ndarray, samples: int, draws: Draws) -> Values:
    """Draw with replacement, and count."""
    if values.size == 0:
        return Values(values, np.zeros(0, np.int64))
    return _bounded(_distinct(values, draws.counts(values.size, samples)))


def _distinct(values: np.ndarray, counts: np.ndarray) -> Values:
    """Sort, and add up the counts of equal values."""
    order = np.argsort(values)
    values, counts = values[order], counts[order]
    if values.size:
        first = np.flatnonzero(np.concatenate(([True], values[1:] != values[:-1])))
        values, counts = values[first], np.add.reduceat(counts, first)
    drawn = counts > 0
    return Values(values[drawn], counts[drawn])


def _bounded(drawn: Values) -> Values:
    """Many distinct values rounded to 17 significant bits (a part in 2e5), of which there are far fewer."""
    if drawn.values.size <= _MANY:
        return drawn
    bits = drawn.values.view(np.uint32) + np.uint32(0x40) & np.uint32(0xFFFFFF80)
    return _distinct(bits.view(np.float32), drawn.counts)


def _joined(parts: Sequence[Values]) -> Values:
    return _bounded(_distinct(np.concatenate([p.values for p in parts]), np.concatenate([p.counts for p in parts])))


def _statistics(drawn: Values) -> Statistics:
    values, counts = drawn.values.astype(np.float64), drawn.counts
    mean = float(np.average(values, weights=counts))
    low, median, high = _percentiles(values, counts, (0.5, 50.0, 99.5))
    return Statistics(
        mean=mean,
        median=median,
        std=float(np.sqrt(np.average((values - mean) ** 2, weights=counts))),
        min=float(values[0]),
        max=float(values[-1]),
        percentile_00_5=low,
        percentile_99_5=high,
    )


def _percentiles(values: np.ndarray, counts: np.ndarray, percents: tuple[float, ...]) -> list[float]:
    """Percentiles with linear interpolation, as np.percentile gives them for each value repeated `counts` times."""
    ends = np.cumsum(counts)
    out = []
    for percent in percents:
        position = percent / 100 * (int(ends[-1]) - 1)
        below = int(position)
        a, b = values[np.searchsorted(ends, [below, min(below + 1, int(ends[-1]) - 1)], side="right")]
        out.append(float(a + (b - a) * (position - below)))
    return out
