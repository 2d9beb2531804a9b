"""Components of masks, joined over faces, edges and corners: of arrays, and of the runs of two joined label maps."""

from __future__ import annotations

import numpy as np

from nnunet_lite.evaluation.joint import Runs

_ROWS_BEFORE = ((0, 0), (0, -1), (-1, -1), (-1, 0), (-1, 1))  # (z, y): the row itself, and half of those around it


def components(mask: np.ndarray) -> tuple[np.ndarray, int]:
    """Components of a mask (z, y, x): (numbers from 1, how many)."""
    import SimpleITK as sitk

    filtered = sitk.ConnectedComponentImageFilter()
    filtered.SetFullyConnected(True)
    result = filtered.Execute(sitk.GetImageFromArray(np.ascontiguousarray(mask).view(np.uint8)))
    return sitk.GetArrayFromImage(result), int(filtered.GetObjectCount())


def components_of_runs(start: np.ndarray, stop: np.ndarray, shape: tuple[int, ...]) -> tuple[np.ndarray, int]:
    """Components of runs along x (He, Chao and Suzuki, IEEE TIP 2008): (the number of each run from 0, how many).

    Parameters
    ----------
    start, stop : (n,) flat indices in an array of this shape (z, y, x), ascending; each run lies in one row.
    """
    from scipy.sparse import coo_array
    from scipy.sparse.csgraph import connected_components

    _, height, width = shape
    row, left = np.divmod(start, width)
    low = np.maximum(left - 1, 0)
    high = np.minimum(left + (stop - start) + 1, width)
    z, y = np.divmod(row, height)
    ends = []
    for dz, dy in _ROWS_BEFORE:
        there = np.flatnonzero((z + dz >= 0) & (y + dy >= 0) & (y + dy < height))
        base = (row[there] + dz * height + dy) * width
        first = np.searchsorted(stop, base + low[there], side="right")
        number = np.searchsorted(start, base + high[there], side="left") - first
        behind = number.cumsum()
        one = np.repeat(there, number)
        other = np.arange(len(one)) + np.repeat(first - (behind - number), number)
        ends.append((one, other))
    one, other = (np.concatenate(each) for each in zip(*ends, strict=True))
    graph = coo_array((np.ones(len(one), bool), (one, other)), shape=(len(start), len(start)))
    count, numbers = connected_components(graph, directed=False)
    return numbers, int(count)


def lesion_counts(
    runs: Runs, shape: tuple[int, ...], in_prediction: np.ndarray, in_reference: np.ndarray
) -> tuple[int, int, int]:
    """Reference lesions found, predicted lesions where there is none, reference lesions missed.

    Parameters
    ----------
    in_prediction, in_reference : (pairs,) whether a pair lies in the mask.
    """

    def touched(mask: np.ndarray, by: np.ndarray) -> tuple[int, int]:
        own = np.flatnonzero(mask[runs.pair])
        if not len(own):
            return 0, 0
        numbers, count = components_of_runs(runs.start[own], runs.stop[own], shape)
        return int(np.count_nonzero(np.bincount(numbers[by[runs.pair[own]]]))), count

    found, number_in_reference = touched(in_reference, in_prediction)
    true, number_in_prediction = touched(in_prediction, in_reference)
    return found, number_in_prediction - true, number_in_reference - found
