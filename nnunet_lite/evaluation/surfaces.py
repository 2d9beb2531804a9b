"""Surfaces of the masks in two joined label maps, and how far apart they are: NSD and HD95.

A voxel on a surface has a neighbour with another pair of values. So these voxels are found once for all labels and
regions, with the pairs around them, and each mask looks up its own among them.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np

from nnunet_lite.evaluation.joint import Joint

_ROUNDING = 1e-5  # mm: a distance that equals the tolerance is within it
_PERCENTILE = 95
_CELLS = (8, 2.5)  # sizes of the cells that bound distances, in voxels
_FEW = 1000  # distances that are measured without bounds

Spacing = tuple[float, float, float]


@dataclass(frozen=True)
class Outline:
    """The voxels that have another pair (or the end of the image) beside them.

    Parameters
    ----------
    voxels : (n,) flat indices in an array of `shape` (z, y, x), ascending.
    pair : (n,) the pair of each.
    beside : (neighbours, n) the pairs of its face neighbours; the number of pairs stands for outside of the image.
    """

    shape: tuple[int, ...]
    voxels: np.ndarray
    pair: np.ndarray
    beside: np.ndarray

    def surface(self, mask: np.ndarray, ignored: np.ndarray) -> np.ndarray:
        """The flat indices (n,) of the voxels of a mask with a face neighbour outside; ignored voxels are no outside.

        Both arguments tell by pair.
        """
        outside = np.append(~(mask | ignored), True)
        own = np.flatnonzero(mask[self.pair])
        found = np.zeros(len(own), bool)
        for beside in self.beside:
            found |= outside[beside[own]]
        return self.voxels[own[found]]

    def positions(self, voxels: np.ndarray, spacing: Spacing) -> np.ndarray:
        """Where voxels lie, mm (n, 3)."""
        indices = np.unravel_index(voxels, self.shape)
        return np.stack([index * step for index, step in zip(indices, spacing, strict=True)], axis=1)


def outline(joint: Joint, threads: int = 1) -> Outline:
    """Find the voxels where pairs change, slice by slice; pair 0, which lies in no mask, is left out.

    An axis of one voxel, as a picture has, counts as no axis.
    """
    pairs = joint.pairs
    axes = tuple(axis for axis, length in enumerate(pairs.shape) if length > 1)
    outside = pairs.dtype.type(len(joint.histogram))

    def one(z: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        found = np.flatnonzero(_changes(pairs, z, axes))
        at = found + z * pairs[z].size
        return at, pairs[z].ravel()[found], _beside(pairs, at, axes, outside)

    with ThreadPoolExecutor(max(1, threads)) as pool:
        voxels, own, beside = zip(*pool.map(one, range(len(pairs))), strict=True)
    return Outline(pairs.shape, np.concatenate(voxels), np.concatenate(own), np.concatenate(beside, axis=1))


def _changes(pairs: np.ndarray, z: int, axes: tuple[int, ...]) -> np.ndarray:
    """Which voxels of a slice (y, x) have another pair beside them, or nothing."""
    here = pairs[z]
    change = np.zeros(here.shape, bool)
    if 0 in axes:
        if z in (0, len(pairs) - 1):
            change[:] = True
        else:
            np.not_equal(here, pairs[z - 1], out=change)
            change |= here != pairs[z + 1]
    for axis in (1, 2):
        if axis in axes:
            toward, values = np.moveaxis(change, axis - 1, 0), np.moveaxis(here, axis - 1, 0)
            step = values[1:] != values[:-1]
            toward[1:] |= step
            toward[:-1] |= step
            toward[[0, -1]] = True
    change &= here != 0
    return change


def _beside(pairs: np.ndarray, at: np.ndarray, axes: tuple[int, ...], outside: np.integer) -> np.ndarray:
    """The pairs (neighbours, n) beside voxels of these flat indices."""
    flat, indices = pairs.ravel(), np.unravel_index(at, pairs.shape)
    found = []
    for axis in axes:
        stride = int(np.prod(pairs.shape[axis + 1 :]))
        for step, last in ((-stride, 0), (stride, pairs.shape[axis] - 1)):
            beside = flat.take(at + step, mode="clip")
            beside[indices[axis] == last] = outside
            found.append(beside)
    return np.stack(found) if found else np.zeros((0, len(at)), pairs.dtype)


def surface_scores(
    where: Outline,
    in_prediction: np.ndarray,
    in_reference: np.ndarray,
    ignored: np.ndarray,
    spacing: Spacing,
    tolerance_mm: float,
) -> tuple[float | None, float | None]:
    """NSD and HD95 (mm) of two masks, given by pair, none of them empty."""
    surfaces = [where.surface(mask, ignored) for mask in (in_prediction, in_reference)]
    if not all(map(len, surfaces)):  # all of it faces voxels that are not annotated
        return None, None
    own, other = (where.positions(surface, spacing) for surface in surfaces)
    step = max(step for step, length in zip(spacing, where.shape, strict=True) if length > 1)
    (near, far), (near_back, far_back) = (
        near_and_far(source, target, tolerance_mm, step) for source, target in ((own, other), (other, own))
    )
    return (near + near_back) / (len(own) + len(other)), max(far, far_back)


def near_and_far(source: np.ndarray, target: np.ndarray, tolerance: float, step: float) -> tuple[int, float]:
    """How many points lie within the tolerance of the nearest target, and the 95th percentile of their distances.

    Both are exact, but most distances need not be: that of a point differs from that of another point by no more than
    the two are apart. So one point of each cell is measured, and then, in smaller and smaller cells, only those that
    may lie on either side of the tolerance or the percentile. Far away, where a search takes longest, these are few.

    Parameters
    ----------
    source, target : (n, 3) and (m, 3), none empty.
    tolerance, step : mm; `step` is the unit of the cells.
    """
    from scipy.spatial import cKDTree

    # splitting in the middle suits a grid: no sorting, and no slow search among many equal distances
    tree = cKDTree(target, leafsize=32, balanced_tree=False, compact_nodes=False)
    limit = tolerance + _ROUNDING
    low, high = np.zeros(len(source)), np.full(len(source), np.inf)
    unknown = np.arange(len(source))
    for size in _CELLS:
        if len(unknown) < _FEW:
            break
        points = source[unknown]
        first, cell = _cells(points, size * step)
        measured = tree.query(points[first])[0][cell]
        apart = np.sqrt(((points - points[first[cell]]) ** 2).sum(1))
        low[unknown] = np.maximum(low[unknown], measured - apart)
        high[unknown] = np.minimum(high[unknown], measured + apart)
        unknown = _undecided(low, high, limit)
    low[unknown] = high[unknown] = tree.query(source[unknown])[0]
    # a point left between bounds lies on the side of the percentile and of the limit on which both bounds are
    return int(np.count_nonzero(high <= limit)), float(np.percentile(low, _PERCENTILE))


def _undecided(low: np.ndarray, high: np.ndarray, limit: float) -> np.ndarray:
    """Which points (n,) the percentile or the number within the limit may depend on."""
    rank = _PERCENTILE / 100 * (len(low) - 1)
    below, above = int(np.floor(rank)), int(np.ceil(rank))
    lowest, highest = np.partition(low, below)[below], np.partition(high, above)[above]
    around = (low <= highest) & (high >= lowest)
    around |= (low <= limit) & (high > limit)
    return np.flatnonzero(around & (low < high))


def _cells(points: np.ndarray, size: float) -> tuple[np.ndarray, np.ndarray]:
    """The first point of each cube with points in it, and the cube of each point."""
    index = (points / size).astype(np.int64)
    extent = index.max(0) + 1
    key = (index[:, 0] * extent[1] + index[:, 1]) * extent[2] + index[:, 2]
    _, first, cell = np.unique(key, return_index=True, return_inverse=True)
    return first, cell
