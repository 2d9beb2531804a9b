"""Two label maps as one: which pairs of values occur, how often, and where they change.

All that is scored afterwards follows from the runs of equal pairs along x and from the voxels where pairs change, so
that the time depends on the labelled voxels and not on the boxes around them.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np

from nnunet_lite.data.labels import Labels, smallest_dtype
from nnunet_lite.errors import UserError

_LARGEST_SPAN = 1 << 20  # label values farther apart than this are a mistake, and a table would not hold them

Box = tuple[slice, ...]


@dataclass(frozen=True)
class Runs:
    """Voxels of a row (along x) that have the same pair, in the order of the array; pair 0 is left out.

    `start`, `stop` : (n,) flat indices, `stop` one behind the last voxel. `pair` : (n,) its number.
    """

    start: np.ndarray
    stop: np.ndarray
    pair: np.ndarray


@dataclass(frozen=True)
class Joint:
    """Both label maps as one: the number of the pair (reference, prediction) of each voxel, and how often it occurs."""

    values: tuple[int, ...]  # the value of index 1, 2, ...; index 0 is any other value
    pairs: np.ndarray  # (z, y, x): index of the reference * size + index of the prediction
    runs: Runs
    histogram: np.ndarray  # (size * size,)
    ignored: np.ndarray  # (size * size,) whether the reference of a pair is the ignore label

    def members(self, region: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray]:
        """Which pairs lie in a region of the prediction, and of the reference; none where it is not known."""
        inside = self.predicted(region)
        return inside.ravel() & ~self.ignored, inside.T.ravel() & ~self.ignored

    def predicted(self, region: tuple[int, ...]) -> np.ndarray:
        """Whether the prediction lies in a region, for each (reference, prediction)."""
        index = np.isin((np.nan, *self.values), region)
        return np.broadcast_to(index, (len(index), len(index)))

    def boxes(self) -> list[Box | None]:
        """The box around each pair; the first, which lies in no region, has none."""
        from scipy import ndimage

        found = ndimage.find_objects(self.pairs, len(self.histogram) - 1)
        return [None, *found]


def join(prediction: np.ndarray, reference: np.ndarray, labels: Labels, threads: int) -> Joint:
    """Number the pairs of values and find their runs in one pass, slice by slice so that it stays in the cache."""
    scored = {value for members in labels.region_values for value in members}
    values = tuple(sorted(scored if labels.ignore is None else scored | {labels.ignore}))
    if values[-1] - values[0] > _LARGEST_SPAN:
        raise UserError(f"label values {values[0]}..{values[-1]} are too far apart")
    size = len(values) + 1
    of_prediction = _Table.of(values, prediction.dtype, 1)
    of_reference = _Table.of(values, reference.dtype, size)
    pairs = np.empty(reference.shape, of_reference.entries.dtype)

    def fill(z: int) -> Runs:
        np.add(of_reference(reference[z]), of_prediction(prediction[z]), out=pairs[z])
        return _runs(pairs[z], z * pairs[z].size)

    with ThreadPoolExecutor(max(1, threads)) as pool:
        parts = list(pool.map(fill, range(len(pairs))))
    start, stop, pair = (np.concatenate([getattr(part, name) for part in parts]) for name in ("start", "stop", "pair"))
    histogram = np.bincount(pair, stop - start, minlength=size * size).astype(np.int64)  # float64 counts to 2**53
    histogram[0] = pairs.size - histogram.sum()
    ignored = np.zeros(size * size, bool)
    if labels.ignore is not None:
        row = values.index(labels.ignore) + 1
        ignored[row * size : (row + 1) * size] = True
    return Joint(values, pairs, Runs(start, stop, pair), histogram, ignored)


@dataclass(frozen=True)
class _Table:
    """The index of each value, times a factor; `low` is the value of entry 0."""

    entries: np.ndarray
    low: int | None  # None: the entries are those of a byte, and no value can be beside the table

    @classmethod
    def of(cls, values: tuple[int, ...], dtype: np.dtype, factor: int) -> _Table:
        """The table for arrays of a type; its entries hold every pair, and one number more."""
        size = len(values) + 1
        kind = smallest_dtype(0, size * size)
        index = np.arange(1, size) * factor
        if dtype == np.uint8:
            known = np.asarray(values)
            fits = (known >= 0) & (known < 256)
            entries = np.zeros(256, kind)
            entries[known[fits]] = index[fits]
            return cls(entries, None)
        low = values[0] - 1
        entries = np.zeros(values[-1] - low + 2, kind)  # one entry more at either end: other values
        entries[np.asarray(values) - low] = index
        return cls(entries, low)

    def __call__(self, array: np.ndarray) -> np.ndarray:
        if self.low is not None:
            array = array.astype(np.intp) - self.low
        return self.entries.take(array, mode="clip")


def _runs(pair: np.ndarray, offset: int) -> Runs:
    """The runs of one slice (y, x) whose first voxel has a flat index."""
    change = np.ones(pair.shape, bool)
    np.not_equal(pair[:, 1:], pair[:, :-1], out=change[:, 1:])
    start = np.flatnonzero(change)
    value = pair.ravel()[start]
    stop = np.append(start[1:], pair.size)
    kept = np.flatnonzero(value)
    return Runs(start[kept] + offset, stop[kept] + offset, value[kept])


def counts_of(histogram: np.ndarray, in_prediction: np.ndarray, in_reference: np.ndarray) -> tuple[int, int, int]:
    both = int(histogram[in_prediction & in_reference].sum())
    return both, int(histogram[in_prediction].sum()) - both, int(histogram[in_reference].sum()) - both


def hull(boxes: list[Box]) -> Box | None:
    """The smallest box around some boxes."""
    if not boxes:
        return None
    return tuple(slice(min(s.start for s in axis), max(s.stop for s in axis)) for axis in zip(*boxes, strict=True))


def is_picture(shape: tuple[int, ...], spacing: tuple[float, float, float]) -> bool:
    """Whether there is but one slice and no thickness."""
    return shape[0] == 1 and spacing[0] >= 999 * max(spacing[1:])
