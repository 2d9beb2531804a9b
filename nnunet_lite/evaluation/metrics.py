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

from nnunet_lite.data.labels import Labels
from nnunet_lite.evaluation.components import lesion_counts
from nnunet_lite.evaluation.joint import counts_of, is_picture, join
from nnunet_lite.evaluation.surfaces import outline, surface_scores


@dataclass(frozen=True)
class Measures:
    """The agreement of two masks. None is "not applicable": nothing to compare, or not measured.

    A label that is absent in both masks has no overlap, surface or lesion score; absent in one, its Dice, IoU, NSD and
    lesion F1 are 0 and HD95 is n/a.

    Parameters
    ----------
    tp, fp, fn, tn : voxels, those with the ignore label left out.
    nsd : normalised surface Dice at the tolerance.
    hd95_mm : 95th percentile of the Hausdorff distance, mm, or pixels without a spacing.
    prediction_ml, reference_ml : volumes; n/a without a spacing, and for pictures, which have no thickness.
    volume_error : (prediction - reference) / reference; its mean is the bias, in which errors cancel.
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
    def absolute_volume_error(self) -> float | None:
        return None if self.volume_error is None else abs(self.volume_error)

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
    scaled: bool = True,
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
    scaled : whether the spacing is known; else it is 1 for each axis and means pixels.
    """
    if prediction.shape != reference.shape:
        raise ValueError(f"prediction of shape {prediction.shape}, reference of shape {reference.shape}")
    joint = join(prediction, reference, labels, threads)
    where = outline(joint, threads) if surface else None
    total = int(joint.histogram[~joint.ignored].sum())
    voxel_ml = _voxel_ml(reference.shape, spacing) if scaled else None

    def measure(members: tuple[int, ...]) -> Measures:
        masks = joint.members(members)
        counts = tp, fp, fn = counts_of(joint.histogram, *masks)
        lesions = lesion_counts(joint.runs, reference.shape, *masks)
        distances: tuple[float | None, float | None] = None, None
        if where and tp + fp + fn:
            both = tp + fp and tp + fn
            distances = surface_scores(where, *masks, joint.ignored, spacing, tolerance_mm) if both else (0.0, None)
        return _measures(counts, total, lesions, distances, voxel_ml)

    with ThreadPoolExecutor(max(1, threads)) as pool:
        return dict(zip(labels.region_names, pool.map(measure, labels.region_values), strict=True))


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


def _voxel_ml(shape: tuple[int, ...], spacing: tuple[float, float, float]) -> float | None:
    """Volume of a voxel; None for a picture, whose third spacing is a mark (see `Geometry`) and not a thickness."""
    return None if is_picture(shape, spacing) else float(np.prod(spacing)) / 1000


def distinct_values(array: np.ndarray) -> set[int]:
    """The different values of an integer array, without sorting where the type allows it."""
    if array.dtype.itemsize > 2:
        return set(np.unique(array).tolist())
    seen = np.zeros(1 << 16, bool)
    for part in array:
        seen[part] = True  # a negative value counts from the end, and comes back as itself
    return set(np.flatnonzero(seen).astype(array.dtype).tolist())
