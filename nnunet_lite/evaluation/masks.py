"""Compare the masks of two label maps: shared voxels, lesions, surfaces and the distances between surfaces.

`pair_masks` draws masks that do not overlap into one array for the prediction and one for the reference. The other
functions work on these arrays, so that their time does not depend on the number of labels.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import cc3d
import numpy as np

from nnunet_lite.data.geometry import Spacing, bounding_box, slices
from nnunet_lite.data.labels import Labels, smallest_dtype

Map = Callable[..., Iterable[Any]]  # `map`, or the `map` of a thread pool

_PERCENTILE = 95
_ROUNDING = 1e-5  # mm: a distance that equals the tolerance is within it
_CELLS = (6.0, 2.0)  # voxels: sizes of the cells that share one measured distance, one after the other
_FEW = 1000  # points: so few are measured one by one
_SAMPLE = 16  # points that show how far the others are


@dataclass(frozen=True)
class MaskPair:
    """Masks that do not overlap, in a prediction and in its reference.

    Parameters
    ----------
    prediction, reference : ndarray, shape (z, y, x)
        The number of the mask of each voxel from 1, 0 outside of all masks, and `ignored` where the reference is not
        annotated. Cropped to the box around all voxels that are not 0.
    n : int
        Number of masks.
    counts : ndarray, shape (n + 2, n + 2)
        Voxels of the whole image by number in the reference and in the prediction.
    """

    prediction: np.ndarray
    reference: np.ndarray
    n: int
    counts: np.ndarray

    @property
    def ignored(self) -> int:
        """The number of voxels that are not annotated."""
        return self.n + 1

    @property
    def annotated(self) -> int:
        """Number of annotated voxels in the image."""
        return int(self.counts.sum() - self.counts[self.ignored].sum())

    def overlap(self) -> np.ndarray:
        """Count true positive, false positive and false negative voxels.

        Returns
        -------
        ndarray, shape (n, 3)
        """
        inside = slice(1, self.n + 1)
        tp = self.counts.diagonal()[inside]
        return np.stack([tp, self.counts.sum(0)[inside] - tp, self.counts.sum(1)[inside] - tp], axis=1)


def pair_masks(
    prediction: np.ndarray,
    reference: np.ndarray,
    masks: Sequence[Sequence[int]],
    ignore: int | None = None,
    mapper: Map = map,
) -> MaskPair:
    """Number the masks of a prediction and its reference, and count the voxels of each pair of numbers.

    Parameters
    ----------
    prediction, reference : ndarray, shape (z, y, x)
        Label values.
    masks : sequence of sequences of int
        The label values of each mask; no value belongs to two masks.
    ignore : int or None
        The value of voxels that are not annotated in the reference.
    mapper : callable
        Processes one slice per call.
    """
    n = len(masks)
    predicted = number_masks(prediction, masks, mapper)
    true = number_masks(reference, masks if ignore is None else [*masks, (ignore,)], mapper)
    if ignore is not None:
        predicted[true == n + 1] = n + 1
    box = slices(bounding_box(predicted | true))
    predicted, true = (np.ascontiguousarray(array[box]) for array in (predicted, true))

    def find_runs(z: int) -> np.ndarray:  # along x, of voxels that have the same pair of numbers
        starts = np.ones(true.shape[1:], bool)
        starts[:, 1:] = (predicted[z, :, 1:] != predicted[z, :, :-1]) | (true[z, :, 1:] != true[z, :, :-1])
        return np.flatnonzero(starts) + z * starts.size

    start = np.concatenate(list(mapper(find_runs, range(len(true)))))
    pairs = true.ravel()[start] * np.intp(n + 2) + predicted.ravel()[start]
    counts = np.bincount(pairs, np.diff(start, append=true.size), (n + 2) ** 2).astype(np.int64)
    counts[0] += reference.size - true.size
    return MaskPair(predicted, true, n, counts.reshape(n + 2, n + 2))


def number_masks(array: np.ndarray, masks: Sequence[Sequence[int]], mapper: Map = map) -> np.ndarray:
    """Replace label values by the number of their mask, from 1; all other values by 0.

    Parameters
    ----------
    array : ndarray, shape (z, y, x)
        Label values.
    masks : sequence of sequences of int
        The label values of each mask; no value belongs to two masks.
    mapper : callable
        Processes one slice per call.
    """
    numbers = {value: k for k, members in enumerate(masks, 1) for value in members}
    # small unsigned integers are indices of the table as they are; others first lose the value of its first entry
    direct = array.dtype.kind == "u" and array.dtype.itemsize < 8
    low = 0 if direct else min(numbers) - 1
    out = np.empty(array.shape, smallest_dtype(0, len(masks) + 1))
    table = np.zeros(max(0, *numbers) - low + 2, out.dtype)  # with an entry for higher values
    for value, number in numbers.items():
        if value >= low:
            table[value - low] = number

    def fill(z: int) -> None:
        out[z] = table.take(array[z] if direct else array[z].astype(np.intp) - low, mode="clip")

    list(mapper(fill, range(len(array))))
    return out


def disjoint_regions(labels: Labels) -> list[list[int]]:
    """Group the indices of regions so that the regions of a group share no value.

    Parameters
    ----------
    labels : Labels
        Labels of the dataset.

    Returns
    -------
    list of list of int
        Indices of `labels.region_names`.
    """
    regions = range(len(labels.region_names))
    return [[i] for i in regions] if labels.has_regions else [list(regions)]


def count_overlap(prediction: np.ndarray, reference: np.ndarray, labels: Labels) -> np.ndarray:
    """Count true positive, false positive and false negative voxels of each label or region.

    Parameters
    ----------
    prediction, reference : ndarray, shape (z, y, x)
        Label values.
    labels : Labels
        Labels of the dataset.

    Returns
    -------
    ndarray, shape (regions, 3)
        In the order of `labels.region_names`.
    """
    groups = [[labels.region_values[i] for i in group] for group in disjoint_regions(labels)]
    return np.concatenate([pair_masks(prediction, reference, masks, labels.ignore).overlap() for masks in groups])


def is_picture(shape: tuple[int, ...], spacing: Spacing) -> bool:
    """Return whether an array is a slice without a thickness; its spacing[0] is a mark (see `Geometry`), no length.

    Parameters
    ----------
    shape : tuple of int
        Its shape (z, y, x).
    spacing : tuple of float
        Voxel size (z, y, x) in mm.
    """
    return shape[0] == 1 and spacing[0] >= 999 * max(spacing[1:])


# ------------------------------------------------------------------------------------------------------------- lesions


def count_lesions(masks: MaskPair, mapper: Map = map) -> np.ndarray:
    """Count the components of each mask by whether they touch the same mask of the other label map.

    Parameters
    ----------
    masks : MaskPair
        The masks of both label maps.
    mapper : callable
        Processes one label map per call.

    Returns
    -------
    ndarray, shape (n, 3)
        Reference lesions that the prediction touches, predicted lesions that touch none, missed reference lesions.
    """
    agree = masks.prediction == masks.reference

    def count(array: np.ndarray) -> np.ndarray:
        numbers, n = cc3d.connected_components(array * (array <= masks.n), connectivity=26, return_N=True)
        inside = np.flatnonzero(numbers > 0)
        component, mask, touches = numbers.ravel()[inside], np.zeros(n + 1, np.intp), np.zeros(n + 1, bool)
        mask[component] = array.ravel()[inside]
        touches[component[agree.ravel()[inside]]] = True
        return np.stack([np.bincount(mask[touches == t], minlength=masks.n + 1)[1:] for t in (True, False)], axis=1)

    predicted, reference = mapper(count, (masks.prediction, masks.reference))
    return np.column_stack([reference[:, 0], predicted[:, 1], reference[:, 1]])


# ------------------------------------------------------------------------------------------------------------ surfaces


def surface_points(
    masks: np.ndarray, ignored: int | None, axes: Sequence[int], spacing: Spacing, mapper: Map = map
) -> tuple[np.ndarray, np.ndarray]:
    """Find the voxels of each mask that have a face neighbour outside of it.

    Parameters
    ----------
    masks : ndarray, shape (z, y, x)
        Numbers of masks. What is beyond the array is outside; voxels that are not annotated are not outside.
    ignored : int or None
        The number of voxels that are not annotated; None if all are.
    axes : sequence of int
        The axes along which neighbours count; a picture has no neighbours along z.
    spacing : tuple of float
        Voxel size (z, y, x) in mm.
    mapper : callable
        Processes one slice per call.

    Returns
    -------
    points : ndarray, shape (points, 3)
        Positions in mm.
    numbers : ndarray, shape (points,)
        The mask of each point.
    """
    padded = np.pad(masks, 1)
    values, (_, height, width) = padded.ravel(), padded.shape
    steps = [(height * width, width, 1)[axis] for axis in axes]

    def find(z: int) -> np.ndarray:
        start, stop = (z * height + 1) * width, (z * height + height - 1) * width  # a slice without its padded rows
        own = values[start:stop]
        surface = np.zeros(own.shape, bool)
        for step in (*steps, *(-step for step in steps)):
            neighbour = values[start + step : stop + step]
            differs = neighbour != own
            surface |= differs if ignored is None else differs & (neighbour != ignored)
        found = np.flatnonzero(surface)
        return found[own[found] != 0] + start

    found = np.concatenate(list(mapper(find, range(1, len(masks) + 1))))
    indices = np.unravel_index(found, padded.shape)
    return np.stack([(index - 1) * size for index, size in zip(indices, spacing, strict=True)], axis=1), values[found]


def compare_surfaces(own: np.ndarray, other: np.ndarray, tolerance: float, step: float) -> tuple[float, float]:
    """Compute the normalised surface Dice and the 95th percentile of the Hausdorff distance of two surfaces.

    Parameters
    ----------
    own, other : ndarray, shape (points, 3)
        Positions in mm; neither is empty.
    tolerance : float
        Distance in mm up to which points count as agreeing.
    step : float
        The largest voxel size in mm.
    """
    near, far = measure_distances(own, other, tolerance, step)
    near_back, far_back = measure_distances(other, own, tolerance, step)
    return (near + near_back) / (len(own) + len(other)), max(far, far_back)


def measure_distances(source: np.ndarray, target: np.ndarray, tolerance: float, step: float) -> tuple[int, float]:
    """Count the points within a tolerance of their nearest target, and take the 95th percentile of the distances.

    Both results are exact, but far points are only bounded: by the triangle inequality, the distances of two points
    differ by no more than the points are apart. So one point of each cell of 6 voxels is measured, and then one of each
    cell of 2 voxels. The others get bounds, and are measured only where a result depends on them.

    Parameters
    ----------
    source, target : ndarray, shape (points, 3)
        Positions in mm; neither is empty.
    tolerance, step : float
        As in `compare_surfaces`.
    """
    from scipy.spatial import cKDTree  # as slow to load

    # splitting in the middle suits points of a grid: no sorting, and no slow search among many equal distances
    tree = cKDTree(target, leafsize=48, balanced_tree=False, compact_nodes=False)
    limit = tolerance + _ROUNDING
    low, high = np.zeros(len(source)), np.full(len(source), np.inf)
    unknown = np.arange(len(source))
    for size in _CELLS:
        sample = source[unknown[:: 1 + len(unknown) // _SAMPLE]]
        if len(unknown) < _FEW or np.median(tree.query(sample)[0]) < size * step:
            break  # near points are faster to measure than to bound
        points = source[unknown]
        first, cell = _cells(points, size * step)
        measured = tree.query(points[first])[0][cell]
        apart = np.sqrt(((points - points[first[cell]]) ** 2).sum(1))
        low[unknown] = np.maximum(low[unknown], measured - apart)
        high[unknown] = np.minimum(high[unknown], measured + apart)
        unknown = _undecided(low, high, limit)
    low[unknown] = high[unknown] = tree.query(source[unknown])[0]
    # both bounds of a point that was not measured are on the same side of the limit and of the percentile
    return int(np.count_nonzero(high <= limit)), float(np.percentile(low, _PERCENTILE))


def _undecided(low: np.ndarray, high: np.ndarray, limit: float) -> np.ndarray:
    """Find the points whose exact distance may change the percentile or the number within the limit."""
    rank = _PERCENTILE / 100 * (len(low) - 1)
    below, above = int(np.floor(rank)), int(np.ceil(rank))
    lowest, highest = np.partition(low, below)[below], np.partition(high, above)[above]
    around = (low <= highest) & (high >= lowest)
    around |= (low <= limit) & (high > limit)
    return np.flatnonzero(around & (low < high))


def _cells(points: np.ndarray, size: float) -> tuple[np.ndarray, np.ndarray]:
    """Sort points into cubes: the first point of each cube that has any, and the cube of each point."""
    index = (points / size).astype(np.int64)
    extent = index.max(0) + 1
    key = (index[:, 0] * extent[1] + index[:, 1]) * extent[2] + index[:, 2]
    _, first, cell = np.unique(key, return_index=True, return_inverse=True)
    return first, cell
