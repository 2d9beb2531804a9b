"""Take the fingerprint of a dataset: spacings, shapes after cropping, and the intensities of the foreground.

The intensities are those of nnU-Net 2.8.1, drawn from the same random numbers: 1e8 voxels in all, an equal share from
each case, with replacement, from the voxels that are not background. Most cases have fewer foreground voxels than their
share, so each distinct value is kept with the number of times it was drawn, not 1e8 numbers.

Read `check_and_fingerprint` first, then `fingerprint_case` and `Collector`. `RandomBlocks` at the end counts
nnU-Net's draws.
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from threading import Lock
from typing import Any

import numpy as np
from pydantic import BaseModel, model_validator

from nnunet_lite.data.check import check_dataset
from nnunet_lite.data.dataset import Dataset
from nnunet_lite.data.geometry import (
    Geometry,
    Shape,
    Spacing,
    common_orientation,
    nonzero_box,
    slices,
    triple,
    turn_between,
)
from nnunet_lite.data.problems import Report
from nnunet_lite.errors import UserError, naming
from nnunet_lite.files import read_json, validated
from nnunet_lite.planning.schema import Statistics

SAMPLES = 100_000_000  # foreground voxels per channel over the whole dataset
_MANY = 1 << 22  # distinct values of one channel above which they are rounded: bounds the memory

SEED = 1234
BLOCK = 1 << 18  # random numbers generated at a time
_BITS = 16  # counted of each number; 4 numbers to a count on average, so a count fits into a byte
_KEPT = 16  # blocks that are kept (16 MB): enough for datasets of a hundred cases; later ones are generated again


class Fingerprint(BaseModel, frozen=True):
    """The content of fingerprint.json, which is nnU-Net's dataset_fingerprint.json and three fields more.

    Parameters
    ----------
    spacings : tuple of tuple of float
        mm (z, y, x) of each case, turned to `orientation`.
    shapes_after_crop : tuple of tuple of int
        Voxels (z, y, x) of the box around what is not zero in every channel, of each case, turned too.
    median_relative_size_after_cropping : float
        Median share of the voxels that this box has.
    foreground_intensity_properties_per_channel : dict of str to Statistics
        By channel number, over the foreground voxels of all cases.
    case_ids : tuple of str
        In the order of the above; empty for a fingerprint of nnU-Net.
    orientation : str or None
        The orientation that images are turned to, as in `Geometry`; None where no case has a known one.
    orientations : tuple of str or None
        Of each case, as in its file; empty for a fingerprint of nnU-Net.
    """

    spacings: tuple[Spacing, ...]
    shapes_after_crop: tuple[Shape, ...]
    median_relative_size_after_cropping: float
    foreground_intensity_properties_per_channel: dict[str, Statistics]
    case_ids: tuple[str, ...] = ()
    orientation: str | None = None
    orientations: tuple[str | None, ...] = ()

    @model_validator(mode="after")
    def _agrees(self) -> Fingerprint:
        channels = self.foreground_intensity_properties_per_channel
        if sorted(channels) != sorted(map(str, range(len(channels)))):
            raise ValueError("the channels must be numbered from 0")
        if len(self.spacings) != len(self.shapes_after_crop):
            raise ValueError(f"{len(self.spacings)} spacings for {len(self.shapes_after_crop)} shapes")
        return self

    @property
    def intensities(self) -> tuple[Statistics, ...]:
        """The statistics of each channel in order."""
        channels = self.foreground_intensity_properties_per_channel
        return tuple(channels[str(number)] for number in range(len(channels)))

    @classmethod
    def read(cls, path: Path) -> Fingerprint:
        """Read a fingerprint.json, ours or nnU-Net's.

        Raises
        ------
        UserError
            There is no such file, or it is not a fingerprint.
        """
        with validated(path, "is no fingerprint: {}"):
            return cls.model_validate(read_json(path))


@dataclass(frozen=True)
class ValueCounts:
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
    foreground: tuple[ValueCounts, ...]


def check_and_fingerprint(dataset: Dataset, workers: int | None = None) -> tuple[Report, Fingerprint | None]:
    """Check a dataset and take its fingerprint in a single pass: each raw file is read once.

    Parameters
    ----------
    dataset : Dataset
        The raw cases.
    workers : int, optional
        Threads; None for one per CPU this process may use, 0 for none.

    Returns
    -------
    tuple of Report and Fingerprint
        The fingerprint is None where the report has errors or a geometry that is not accepted.

    Raises
    ------
    UserError
        No image shows anything where it is labelled.
    """
    collector = Collector(len(dataset.channels))
    visit = partial(fingerprint_case, samples=SAMPLES // max(1, len(dataset.cases)), random=RandomBlocks())
    report = check_dataset(dataset, visit, collector.add, workers)
    with naming(dataset.root):
        return report, collector.fingerprint(dataset.orientation) if report.can_be_planned else None


def fingerprint_case(
    channels: Sequence[np.ndarray], geometry: Geometry, foreground: np.ndarray, samples: int, random: RandomBlocks
) -> CaseFingerprint:
    """Take what one case adds to the fingerprint.

    Parameters
    ----------
    channels : sequence of ndarray, shape (z, y, x)
        Intensities.
    geometry : Geometry
        Their grid.
    foreground : ndarray of bool, shape (z, y, x)
        Voxels that are not background.
    samples : int
        Number of voxels to draw.
    random : RandomBlocks
        Random numbers of the dataset.

    Returns
    -------
    CaseFingerprint
        Shape, spacing and drawn intensities.
    """
    box = nonzero_box(channels)
    shape, inside = triple(high - low for low, high in box), slices(box)
    mask = foreground[inside]
    drawn, position = [], 0
    for channel in channels:
        values = channel[inside][mask].astype(np.float32)
        counts, position = random.draw(values.size, samples, position)
        drawn.append(_bound(_distinct(values, counts)))
    relative = float(np.prod(shape) / np.prod(geometry.shape))
    return CaseFingerprint(geometry.orientation, geometry.spacing, shape, relative, tuple(drawn))


class Collector:
    """Collects what the cases add to the fingerprint; its memory does not grow with their number."""

    def __init__(self, channels: int) -> None:
        self._cases: dict[str, CaseFingerprint] = {}
        self._merged = [ValueCounts(np.zeros(0, np.float32), np.zeros(0, np.int64))] * channels
        self._pending: list[tuple[ValueCounts, ...]] = []
        self._pending_values = 0

    def add(self, case_id: str, case: CaseFingerprint) -> None:
        self._cases[case_id] = replace(case, foreground=())
        self._pending.append(case.foreground)
        self._pending_values += case.foreground[0].values.size
        if self._pending_values > _MANY:
            self._merge()

    def _merge(self) -> None:
        self._merged = [_join(parts) for parts in zip(self._merged, *self._pending, strict=True)]
        self._pending, self._pending_values = [], 0

    def fingerprint(self, orientation: str | None = None) -> Fingerprint:
        """Return the fingerprint of all cases, turned to an orientation (default: the one that most cases have)."""
        self._merge()
        if not self._merged[0].values.size:
            fix = "Open an image with its label map: do they show the same place?"
            raise UserError("every label is outside of the box in which its image is not zero", fix=fix)
        cases = list(self._cases.values())
        orientation = orientation or common_orientation(case.orientation for case in cases)
        turned = [(case, turn_between(case.orientation, orientation).order) for case in cases]
        return Fingerprint.model_validate(
            {
                "spacings": [[case.spacing[axis] for axis in order] for case, order in turned],
                "shapes_after_crop": [[case.shape_after_crop[axis] for axis in order] for case, order in turned],
                "median_relative_size_after_cropping": float(np.median([case.relative_size for case in cases])),
                "foreground_intensity_properties_per_channel": {
                    str(number): _statistics(drawn) for number, drawn in enumerate(self._merged)
                },
                "case_ids": list(self._cases),
                "orientation": orientation,
                "orientations": [case.orientation for case in cases],
            }
        )


def _distinct(values: np.ndarray, counts: np.ndarray) -> ValueCounts:
    """Sort, and add up the counts of equal values."""
    order = np.argsort(values)
    values, counts = values[order], counts[order]
    if values.size:
        first = np.flatnonzero(np.concatenate(([True], values[1:] != values[:-1])))
        values, counts = values[first], np.add.reduceat(counts, first)
    drawn = counts > 0
    return ValueCounts(values[drawn], counts[drawn])


def _bound(drawn: ValueCounts) -> ValueCounts:
    """Round many distinct values to 17 significant bits (a part in 2e5), of which there are far fewer."""
    if drawn.values.size <= _MANY:
        return drawn
    bits = drawn.values.view(np.uint32) + np.uint32(0x40) & np.uint32(0xFFFFFF80)
    return _distinct(bits.view(np.float32), drawn.counts)


def _join(parts: Sequence[ValueCounts]) -> ValueCounts:
    return _bound(_distinct(np.concatenate([p.values for p in parts]), np.concatenate([p.counts for p in parts])))


def _statistics(drawn: ValueCounts) -> Statistics:
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


# ------------------------------------------------------------------------------------------- nnU-Net's random numbers
# nnU-Net draws np.random.RandomState(1234).randint(0, size, samples). numpy takes the low bits of each 32-bit random
# number where they are < size, and otherwise the next number. Every case draws from the same numbers, so they are
# generated, and their low 16 bits counted, once, block by block. The counts of fewer low bits are sums of these, so
# what a case draws from a whole block is known without reading its numbers.


class RandomBlocks:
    """The 32-bit numbers of np.random.RandomState(SEED) in blocks, for all cases of a dataset; threads may share it.

    Its memory grows by a quarter of a byte for each number that a case of up to 65 536 voxels draws: some 50 MB per
    channel for a single case, less for more cases.
    """

    def __init__(self) -> None:
        self._states: list[Any] = [np.random.RandomState(SEED).get_state()]  # at the start of each block
        self._numbers: list[np.ndarray] = []
        self._counts: list[np.ndarray] = []
        self._ahead: Future[np.ndarray] | None = None
        self._pool = ThreadPoolExecutor(1, "random")
        self._storing, self._counting = Lock(), Lock()

    def numbers(self, block: int) -> np.ndarray:
        """Return all numbers of a block, uint32; of one that was generated before, or the next."""
        if block < len(self._numbers):
            return self._numbers[block]
        random = np.random.RandomState()
        random.set_state(self._states[block])
        numbers = random.randint(0, 1 << 32, BLOCK, dtype=np.uint32)
        with self._storing:
            if len(self._states) == block + 1:
                self._states.append(random.get_state())
                self._numbers += [numbers] if block < _KEPT else []
        return numbers

    def counts(self, block: int, bits: int) -> np.ndarray:
        """Count each value of the low bits (at most 16) in a block; meanwhile the next block is generated."""
        with self._counting:
            while len(self._counts) <= block:
                numbers = self._ahead.result() if self._ahead else self.numbers(0)
                self._ahead = self._pool.submit(self.numbers, len(self._counts) + 1)
                counts = np.bincount(numbers.astype(np.uint16), minlength=1 << _BITS)  # keeps the low bits
                self._counts.append(counts.astype(np.uint8))
        return self._counts[block].reshape(-1, 1 << bits).sum(axis=0, dtype=np.uint32)

    def draw(self, size: int, samples: int, position: int) -> tuple[np.ndarray, int]:
        """Draw from range(size); return how often each was drawn, and the position of the next random number."""
        bits = (size - 1).bit_length()
        counts = np.zeros(1 << bits, np.int64)
        left = samples if size else 0
        while left > 0:
            block, start = divmod(position, BLOCK)
            if bits <= _BITS and start == 0:
                in_block = self.counts(block, bits)
                if (drawn := int(in_block[:size].sum())) <= left:
                    counts += in_block
                    left -= drawn
                    position += BLOCK
                    continue
            values = self.numbers(block)[start:] & np.uint32((1 << bits) - 1)
            drawn = int(np.count_nonzero(values < size))
            if drawn > left:  # the last one is among these
                values = values[: np.flatnonzero(values < size)[left - 1] + 1]
                drawn = left
            np.add.at(counts, values, 1)
            left -= drawn
            position += values.size
        return counts[:size], position
