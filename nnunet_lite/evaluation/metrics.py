"""How well a label map agrees with its reference: overlap, surfaces, volume and lesions of each label or region.

The definitions are those of Metrics Reloaded (Maier-Hein and Reinke et al., Nature Methods 2024), with

- surface: the voxels of a mask that have a face neighbour outside of it (beyond the image is outside; an axis of one
  voxel, as a picture has, counts as no axis). Distances run between voxel centres in mm, exact and spacing-aware.
- HD95: the larger of the two directed 95th percentiles (linear interpolation), as in MONAI, not the percentile of the
  pooled distances, as in MedPy.
- NSD (Nikolov et al. 2018, arXiv:1809.04430): the share of both surfaces' voxels within the tolerance of the other one.
- lesions: components joined over faces, edges and corners. A reference lesion is found where the prediction touches
  it at all; a predicted one is false where it touches none.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np

from nnunet_lite.data.labels import Labels, smallest_dtype
from nnunet_lite.errors import UserError

_ROUNDING = 1e-5  # mm: a distance that equals the tolerance is within it
_MANY_QUERIES = 1 / 50  # of the box: from here on one distance map is faster than a tree, and its time has a bound
_LARGEST_SPAN = 1 << 20  # label values farther apart than this are a mistake, and a table would not hold them

Box = tuple[slice, ...]


@dataclass(frozen=True)
class Measures:
    """The agreement of two masks. None is "not applicable": nothing to compare, or not measured.

    A label that is absent in both masks has no overlap, surface or lesion score; absent in one, its Dice, IoU, NSD and
    lesion F1 are 0 and HD95 is n/a.

    Parameters
    ----------
    tp, fp, fn, tn : voxels, those with the ignore label left out.
    nsd : normalised surface Dice at the tolerance.
    hd95_mm : 95th percentile of the Hausdorff distance, mm.
    prediction_ml, reference_ml : volumes; n/a for pictures, which have no thickness.
    volume_error : (prediction - reference) / reference.
    lesion_tp, lesion_fn : reference lesions found and missed.
    lesion_fp : predicted lesions where there is none.
    """

    tp: int
    fp: int
    fn: int
    tn: int
    dice: float | None
    iou: float | None
    nsd: float | None
    hd95_mm: float | None
    prediction_ml: float | None
    reference_ml: float | None
    volume_error: float | None
    lesion_tp: int
    lesion_fp: int
    lesion_fn: int
    lesion_f1: float | None

    @property
    def n_prediction(self) -> int:
        return self.tp + self.fp

    @property
    def n_reference(self) -> int:
        return self.tp + self.fn


def score_case(
    prediction: np.ndarray,
    reference: np.ndarray,
    labels: Labels,
    spacing: tuple[float, float, float],
    tolerance_mm: float = 1.0,
    surface: bool = True,
    threads: int = 1,
) -> dict[str, Measures]:
    """Score one case: region name (`labels.region_names`) -> measures.

    Voxels whose reference is the ignore label are left out of everything; values that are no label are background.

    Parameters
    ----------
    prediction, reference : integers (z, y, x), values of the data set.
    spacing : mm (z, y, x).
    tolerance_mm : how far apart surfaces may be for NSD.
    surface : whether to measure NSD and HD95.
    threads : how many work at the same time: on slices for the counts, then on labels.
    """
    if prediction.shape != reference.shape:
        raise ValueError(f"prediction of shape {prediction.shape}, reference of shape {reference.shape}")
    joint = join(prediction, reference, labels, threads)
    boxes = joint.boxes()
    total = int(joint.histogram[~joint.ignored].sum())
    voxel_ml = _voxel_ml(reference.shape, spacing)
    axes = tuple(axis for axis, length in enumerate(reference.shape) if length > 1)

    def measure(members: tuple[int, ...]) -> Measures:
        in_prediction, in_reference = joint.members(members)
        counts = counts_of(joint.histogram, in_prediction, in_reference)
        lesions = 0, 0, 0
        distances: tuple[float | None, float | None] = None, None
        box = hull([b for b, inside in zip(boxes, in_prediction | in_reference, strict=True) if b and inside])
        if box:
            pairs = joint.pairs[_grown(box)]
            masks = in_prediction[pairs], in_reference[pairs]
            lesions = _lesions(*masks)
            if surface:
                ignored = joint.ignored[pairs] if labels.ignore is not None else None
                distances = _surface_scores(*masks, ignored, axes, spacing, tolerance_mm)
        return _measures(counts, total, lesions, distances, voxel_ml)

    with ThreadPoolExecutor(max(1, threads)) as pool:
        return dict(zip(labels.region_names, pool.map(measure, labels.region_values), strict=True))


# ----------------------------------------------------------------------------------------------------- one pass: counts


@dataclass(frozen=True)
class Joint:
    """Both label maps as one: the number of the pair (reference, prediction) of each voxel, and how often it occurs."""

    values: tuple[int, ...]  # the value of index 1, 2, ...; index 0 is any other value
    pairs: np.ndarray  # (z, y, x): index of the reference * size + index of the prediction
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
    """Count all pairs of values in one pass, slice by slice so that it stays in the cache."""
    scored = {value for members in labels.region_values for value in members}
    values = tuple(sorted(scored if labels.ignore is None else scored | {labels.ignore}))
    if values[-1] - values[0] > _LARGEST_SPAN:
        raise UserError(f"label values {values[0]}..{values[-1]} are too far apart")
    low, size = values[0] - 1, len(values) + 1
    table = np.zeros(values[-1] - low + 2, smallest_dtype(0, size * size))  # one entry more at either end: other values
    table[np.asarray(values) - low] = np.arange(1, size)
    rows = table * table.dtype.type(size)
    pairs = np.empty(reference.shape, table.dtype)

    def count(slices: np.ndarray) -> np.ndarray:
        histogram = np.zeros(size * size, np.int64)
        for z in slices:
            pair = rows.take(reference[z].astype(np.intp) - low, mode="clip")
            pair += table.take(prediction[z].astype(np.intp) - low, mode="clip")
            histogram += np.bincount(pair.ravel(), minlength=size * size)
            pairs[z] = pair
        return histogram

    parts = np.array_split(np.arange(len(pairs)), max(1, threads))
    with ThreadPoolExecutor(len(parts)) as pool:
        histogram = np.sum(list(pool.map(count, parts)), axis=0)
    ignored = np.zeros(size * size, bool)
    if labels.ignore is not None:
        row = values.index(labels.ignore) + 1
        ignored[row * size : (row + 1) * size] = True
    return Joint(values, pairs, histogram, ignored)


def counts_of(histogram: np.ndarray, in_prediction: np.ndarray, in_reference: np.ndarray) -> tuple[int, int, int]:
    both = int(histogram[in_prediction & in_reference].sum())
    return both, int(histogram[in_prediction].sum()) - both, int(histogram[in_reference].sum()) - both


def hull(boxes: list[Box]) -> Box | None:
    """The smallest box around some boxes."""
    if not boxes:
        return None
    return tuple(slice(min(s.start for s in axis), max(s.stop for s in axis)) for axis in zip(*boxes, strict=True))


def _grown(box: Box) -> Box:
    """With a margin of one voxel, which shows whether what is beside a mask is ignored."""
    return tuple(slice(max(0, s.start - 1), s.stop + 1) for s in box)


def _voxel_ml(shape: tuple[int, ...], spacing: tuple[float, float, float]) -> float | None:
    """Volume of a voxel; None for a picture, whose third spacing is a mark (see `Geometry`) and not a thickness."""
    return None if is_picture(shape, spacing) else float(np.prod(spacing)) / 1000


def is_picture(shape: tuple[int, ...], spacing: tuple[float, float, float]) -> bool:
    """Whether there is but one slice and no thickness."""
    return shape[0] == 1 and spacing[0] >= 999 * max(spacing[1:])


def distinct_values(array: np.ndarray) -> set[int]:
    """The different values of an integer array, without sorting where the type allows it."""
    if array.dtype.itemsize > 2:
        return set(np.unique(array).tolist())
    seen = np.zeros(1 << 16, bool)
    for part in array:
        seen[part] = True  # a negative value counts from the end, and comes back as itself
    return set(np.flatnonzero(seen).astype(array.dtype).tolist())


# ------------------------------------------------------------------------------------------------------------- surfaces


def surface_voxels(
    mask: np.ndarray, axes: tuple[int, ...] = (0, 1, 2), ignored: np.ndarray | None = None
) -> np.ndarray:
    """The voxels of a mask (z, y, x) with a face neighbour along `axes` outside; ignored voxels are no outside."""
    solid = mask if ignored is None else mask | ignored
    inner = mask.copy()
    for axis in axes:
        toward, beside = np.moveaxis(inner, axis, 0), np.moveaxis(solid, axis, 0)
        toward[1:] &= beside[:-1]
        toward[:-1] &= beside[1:]
        toward[[0, -1]] = False
    return mask & ~inner


def surface_distances(source: np.ndarray, target: np.ndarray, spacing: tuple[float, float, float]) -> np.ndarray:
    """Distance in mm of each voxel set in `source` to the nearest one set in `target`, both (z, y, x), none empty."""
    apart = source & ~target
    queries = np.count_nonzero(apart)
    distances = np.zeros(np.count_nonzero(source))
    if queries > _MANY_QUERIES * source.size:
        distances[:queries] = _distance_map(target, spacing)[apart]
    elif queries:
        from scipy.spatial import cKDTree

        # splitting in the middle suits a grid: no sorting, and no slow search among many equal distances
        tree = cKDTree(_positions(target, spacing), leafsize=32, balanced_tree=False, compact_nodes=False)
        distances[:queries] = tree.query(_positions(apart, spacing))[0]
    return distances


def _positions(mask: np.ndarray, spacing: tuple[float, float, float]) -> np.ndarray:
    """Where the set voxels lie, mm (n, 3)."""
    indices = np.unravel_index(np.flatnonzero(mask), mask.shape)  # ten times as fast as nonzero
    return np.stack([index * step for index, step in zip(indices, spacing, strict=True)], axis=1)


def _distance_map(target: np.ndarray, spacing: tuple[float, float, float]) -> np.ndarray:
    """Distance to the nearest set voxel (Maurer et al., IEEE TPAMI 2003), for voxels that are not set; linear time."""
    import SimpleITK as sitk

    image = sitk.GetImageFromArray(target.view(np.uint8))
    image.SetSpacing([float(s) for s in reversed(spacing)])
    result = sitk.SignedMaurerDistanceMap(image, insideIsPositive=False, squaredDistance=False, useImageSpacing=True)
    return sitk.GetArrayFromImage(result)


def _surface_scores(
    prediction: np.ndarray,
    reference: np.ndarray,
    ignored: np.ndarray | None,
    axes: tuple[int, ...],
    spacing: tuple[float, float, float],
    tolerance_mm: float,
) -> tuple[float | None, float | None]:
    """NSD and HD95 (mm) of two masks, at least one of them not empty."""
    if not prediction.any() or not reference.any():
        return 0.0, None
    of_prediction, of_reference = (surface_voxels(mask, axes, ignored) for mask in (prediction, reference))
    if not of_prediction.any() or not of_reference.any():  # all of it faces voxels that are not annotated
        return None, None
    directed = (
        surface_distances(of_prediction, of_reference, spacing),
        surface_distances(of_reference, of_prediction, spacing),
    )
    near = sum(int(np.count_nonzero(distances <= tolerance_mm + _ROUNDING)) for distances in directed)
    hd95 = max(float(np.percentile(distances, 95)) for distances in directed)
    return near / sum(map(len, directed)), hd95


# -------------------------------------------------------------------------------------------------------------- lesions


def components(mask: np.ndarray) -> tuple[np.ndarray, int]:
    """Components of a mask (z, y, x), joined over faces, edges and corners: (numbers from 1, how many)."""
    import SimpleITK as sitk

    filtered = sitk.ConnectedComponentImageFilter()
    filtered.SetFullyConnected(True)
    result = filtered.Execute(sitk.GetImageFromArray(np.ascontiguousarray(mask).view(np.uint8)))
    return sitk.GetArrayFromImage(result), int(filtered.GetObjectCount())


def _lesions(prediction: np.ndarray, reference: np.ndarray) -> tuple[int, int, int]:
    """Reference lesions found, predicted lesions where there is none, reference lesions missed."""

    def touched(mask: np.ndarray, by: np.ndarray) -> tuple[int, int]:
        numbers, count = components(mask)
        return int(np.count_nonzero(np.bincount(numbers.ravel()[np.flatnonzero(mask & by)]))), count

    found, in_reference = touched(reference, prediction)
    true, in_prediction = touched(prediction, reference)
    return found, in_prediction - true, in_reference - found


def _measures(
    counts: tuple[int, int, int],
    total: int,
    lesions: tuple[int, int, int],
    surface: tuple[float | None, float | None],
    voxel_ml: float | None,
) -> Measures:
    tp, fp, fn = counts
    lesion_tp, lesion_fp, lesion_fn = lesions
    return Measures(
        tp=tp,
        fp=fp,
        fn=fn,
        tn=total - tp - fp - fn,
        dice=_ratio(2 * tp, 2 * tp + fp + fn),
        iou=_ratio(tp, tp + fp + fn),
        nsd=surface[0],
        hd95_mm=surface[1],
        prediction_ml=None if voxel_ml is None else (tp + fp) * voxel_ml,
        reference_ml=None if voxel_ml is None else (tp + fn) * voxel_ml,
        volume_error=_ratio(fp - fn, tp + fn),
        lesion_tp=lesion_tp,
        lesion_fp=lesion_fp,
        lesion_fn=lesion_fn,
        lesion_f1=_ratio(2 * lesion_tp, 2 * lesion_tp + lesion_fp + lesion_fn),
    )


def _ratio(part: int, whole: int) -> float | None:
    return part / whole if whole else None
