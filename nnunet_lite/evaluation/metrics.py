"""The metrics of a segmentation, and their values for one case.

`METRICS` declares each metric once: its name in files and tables, its formula, its unit, and which direction is better.
To add a metric, add an entry. `score_case` computes all of them for each label or region of a case.

The definitions are those of Metrics Reloaded (Maier-Hein and Reinke et al., Nature Methods 2024), with these choices:

- Surface: the voxels of a mask that have a face neighbour outside of it. The end of the image is outside. An axis of
  one voxel, as a picture has it, has no neighbours. Distances between voxel centres are exact, in mm.
- HD95: the larger of the two directed 95th percentiles (linear interpolation), as in MONAI, not the percentile of the
  pooled distances, as in MedPy.
- NSD (Nikolov et al. 2018, arXiv:1809.04430): the share of the voxels of both surfaces within the tolerance of the
  other surface.
- Lesions: components whose voxels connect over faces, edges and corners. The prediction finds a reference lesion if it
  touches it. A predicted lesion that touches none is a false positive.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Literal

import numpy as np

from nnunet_lite.data.geometry import Spacing
from nnunet_lite.data.labels import Labels
from nnunet_lite.evaluation import masks
from nnunet_lite.evaluation.masks import Map, MaskPair

COARSE = 100  # voxels: up to a larger tolerance all surfaces agree


@dataclass(frozen=True)
class MaskComparison:
    """Counts and distances of one mask, prediction against reference.

    Parameters
    ----------
    tp, fp, fn, tn : int
        True and false positive and negative voxels; voxels with the ignore label are left out.
    lesion_tp, lesion_fp, lesion_fn : int
        Reference lesions that the prediction touches, predicted lesions that touch none, and missed reference lesions.
    nsd, hd95 : float or None
        Surface metrics; None if they were not measured, or if a mask has no surface.
    voxel_ml : float or None
        Volume of a voxel in ml; None if the spacing is unknown, or for a picture, which has no thickness.
    """

    tp: int
    fp: int
    fn: int
    tn: int
    lesion_tp: int
    lesion_fp: int
    lesion_fn: int
    nsd: float | None
    hd95: float | None
    voxel_ml: float | None


@dataclass(frozen=True)
class Metric:
    """One metric: how it is computed, named and shown.

    Parameters
    ----------
    name : str
        The name in summary.json and summary.csv. Lengths get the unit as a suffix there ("HD95_mm").
    formula : callable
        From a `MaskComparison` to a number, or None where the metric does not apply.
    heading : str
        The name in tables and in the report.
    number_format : str
        How a value is written in the report.
    better : {"higher", "lower", "zero"} or None
        The better direction; None for counts and volumes, which depend on the case. Metrics with a direction get a
        confidence interval, and all but those that should be zero are columns of the table.
    unit : {"", "voxels", "ml", "length"}
        "length" is mm, or pixels if no image has a spacing.
    """

    name: str
    formula: Callable[[MaskComparison], float | None]
    heading: str
    number_format: str
    better: Literal["higher", "lower", "zero"] | None = None
    unit: Literal["", "voxels", "ml", "length"] = ""

    def file_key(self, length_unit: str) -> str:
        """Return the name in files, such as "HD95_mm".

        Parameters
        ----------
        length_unit : {"mm", "px"}
            The unit of lengths.
        """
        return f"{self.name}_{length_unit}" if self.unit == "length" else self.name


def _ratio(part: int, whole: int) -> float | None:
    return part / whole if whole else None


def _volume(voxels: int, mask: MaskComparison) -> float | None:
    return None if mask.voxel_ml is None else voxels * mask.voxel_ml


def _absolute(value: float | None) -> float | None:
    return None if value is None else abs(value)


def _f1(tp: int, fp: int, fn: int) -> float | None:
    return _ratio(2 * tp, 2 * tp + fp + fn)


def _volume_error(mask: MaskComparison) -> float | None:
    return _ratio(mask.fp - mask.fn, mask.tp + mask.fn)


# First the metrics of nnU-Net's summary.json, in its order, then ours. A label that is absent in both masks has no
# overlap, surface or lesion metric. Absent in one of them, its Dice, IoU, NSD and lesion F1 are 0, and HD95 does not
# apply. The volume error is (prediction - reference) / reference: its mean is a bias, in which errors cancel.
METRICS: dict[str, Metric] = {
    metric.name: metric
    for metric in (
        Metric("Dice", lambda m: _f1(m.tp, m.fp, m.fn), "Dice", ".4f", "higher"),
        Metric("IoU", lambda m: _ratio(m.tp, m.tp + m.fp + m.fn), "IoU", ".4f", "higher"),
        Metric("TP", lambda m: m.tp, "TP", "d", unit="voxels"),
        Metric("FP", lambda m: m.fp, "FP", "d", unit="voxels"),
        Metric("FN", lambda m: m.fn, "FN", "d", unit="voxels"),
        Metric("TN", lambda m: m.tn, "TN", "d", unit="voxels"),
        Metric("n_pred", lambda m: m.tp + m.fp, "predicted voxels", "d", unit="voxels"),
        Metric("n_ref", lambda m: m.tp + m.fn, "reference voxels", "d", unit="voxels"),
        Metric("NSD", lambda m: m.nsd, "NSD", ".4f", "higher"),
        Metric("HD95", lambda m: m.hd95, "HD95", ".3g", "lower", "length"),
        Metric("prediction_ml", lambda m: _volume(m.tp + m.fp, m), "prediction (ml)", ".4g", unit="ml"),
        Metric("reference_ml", lambda m: _volume(m.tp + m.fn, m), "reference (ml)", ".4g", unit="ml"),
        Metric("volume_error", _volume_error, "volume error", "+.1%", "zero"),
        Metric("absolute_volume_error", lambda m: _absolute(_volume_error(m)), "abs. volume error", ".1%", "lower"),
        Metric("lesion_TP", lambda m: m.lesion_tp, "lesion TP", "d"),
        Metric("lesion_FP", lambda m: m.lesion_fp, "lesion FP", "d"),
        Metric("lesion_FN", lambda m: m.lesion_fn, "lesion FN", "d"),
        Metric("lesion_F1", lambda m: _f1(m.lesion_tp, m.lesion_fp, m.lesion_fn), "lesion F1", ".3f", "higher"),
    )
}

MetricValues = dict[str, float | None]  # metric -> value, None where it does not apply


def score_case(
    prediction: np.ndarray,
    reference: np.ndarray,
    labels: Labels,
    spacing: Spacing | None,
    tolerance: float = 1.0,
    surface: bool = True,
    threads: int = 1,
) -> dict[str, MetricValues]:
    """Compute the metrics of one case.

    Voxels whose reference is the ignore label are left out of everything. Values that are no label are background.

    Parameters
    ----------
    prediction, reference : ndarray, shape (z, y, x)
        Label values of the dataset.
    labels : Labels
        What to score: its labels, or its regions.
    spacing : tuple of float or None
        Voxel size (z, y, x) in mm. None if it is unknown: then lengths are in pixels, and there are no volumes.
    tolerance : float
        Distance up to which surfaces agree for NSD, in mm or pixels. NSD is left out where this `is_coarse`.
    surface : bool
        Whether to compute NSD and HD95.
    threads : int
        How many slices, then labels, are processed in parallel.

    Returns
    -------
    dict
        Name of label or region (in the order of `labels.region_names`) -> metric -> value.
    """
    if prediction.shape != reference.shape:
        raise ValueError(f"prediction of shape {prediction.shape}, reference of shape {reference.shape}")
    voxel_ml = float(np.prod(spacing)) / 1000 if spacing and not masks.is_picture(reference.shape, spacing) else None
    scores: dict[str, MetricValues] = {}
    with ThreadPoolExecutor(max(1, threads)) as pool:
        for group in masks.disjoint_regions(labels):
            values = [labels.region_values[i] for i in group]
            pair = masks.pair_masks(prediction, reference, values, labels.ignore, pool.map)
            size = spacing or (1.0, 1.0, 1.0)
            surfaces = _score_surfaces(pair, reference.shape, size, tolerance, pool.map) if surface else {}
            lesions = masks.count_lesions(pair, pool.map).tolist()
            for k, (tp, fp, fn) in enumerate(pair.overlap().tolist()):
                tn = pair.annotated - tp - fp - fn
                lesion_tp, lesion_fp, lesion_fn = lesions[k]
                nsd, hd95 = surfaces.get(k, (None, None))
                nsd = None if is_coarse(tolerance, size) else nsd
                mask = MaskComparison(tp, fp, fn, tn, lesion_tp, lesion_fp, lesion_fn, nsd, hd95, voxel_ml)
                scores[labels.region_names[group[k]]] = {name: metric.formula(mask) for name, metric in METRICS.items()}
    return scores


def is_coarse(tolerance: float, spacing: Spacing) -> bool:
    """Whether any two surfaces agree up to a tolerance: it is above 100 voxels, as one of mm in a microscope's image.

    Parameters
    ----------
    tolerance : float
        In mm or pixels.
    spacing : tuple of float
        Voxel size (z, y, x) in the same unit.
    """
    return tolerance > COARSE * min(spacing)


def _score_surfaces(
    pair: MaskPair, shape: Sequence[int], spacing: Spacing, tolerance: float, mapper: Map
) -> dict[int, tuple[float | None, float | None]]:
    """Compute NSD and HD95 of each mask by its index; none for masks that are absent in both label maps."""
    axes = [axis for axis, length in enumerate(shape) if length > 1]
    step = max(spacing[axis] for axis in axes or range(3))
    ignored = pair.ignored if pair.counts[pair.ignored].any() else None
    arrays, overlap = (pair.prediction, pair.reference), pair.overlap()
    surfaces = [masks.surface_points(array, ignored, axes, spacing, mapper) for array in arrays]

    def compare(k: int) -> tuple[float | None, float | None]:
        tp, fp, fn = overlap[k]
        if not (tp + fp and tp + fn):
            return 0.0, None
        own, other = (points[numbers == k + 1] for points, numbers in surfaces)
        if not (len(own) and len(other)):  # no voxel around a mask is annotated
            return None, None
        return masks.compare_surfaces(own, other, tolerance, step)

    present = np.flatnonzero(overlap.sum(1)).tolist()
    return dict(zip(present, mapper(compare, present), strict=True))
