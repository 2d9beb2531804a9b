"""Metrics equal those of whole-array filters on random and real label maps, and results worked out by hand."""

from __future__ import annotations

import numpy as np
import pytest
from samples import HIPPOCAMPUS, displaced
from scipy import ndimage

from nnunet_lite.data.images import read_label
from nnunet_lite.data.labels import Labels
from nnunet_lite.evaluation.masks import measure_distances
from nnunet_lite.evaluation.metrics import METRICS, MetricValues, score_case

SPACING = (2.5, 0.7, 1.1)
LABELS = {
    "labels": Labels(names={"background": 0, "a": 1, "b": 2, "c": 3}),
    "ignore": Labels(names={"background": 0, "a": 1, "b": 2}, ignore=3),
    "regions": Labels(names={"background": 0, "whole": (1, 2, 3), "core": (2, 3), "c": (3,)}, region_order=(1, 2, 3)),
    "absent": Labels(names={"background": 0, "b": 2, "nowhere": 300}),
}


def compare(prediction: np.ndarray, reference: np.ndarray, spacing=(1.0, 1.0, 1.0), **options) -> MetricValues:  # type: ignore[no-untyped-def]
    return score_case(prediction, reference, Labels(names={"lesion": 1}), spacing, **options)["lesion"]


def values(metrics: MetricValues, *names: str) -> tuple[float | None, ...]:
    return tuple(metrics[name] for name in names)


def blank() -> np.ndarray:
    return np.zeros((6, 12, 20), np.uint8)


# --------------------------------------------------------------------------------------- equal to whole-array filters


def eroded_away(mask: np.ndarray, ignored: np.ndarray) -> np.ndarray:
    """The surface of a mask by erosion; the end of the image is outside, an axis of one voxel is no axis."""
    cross = ndimage.generate_binary_structure(3, 1)
    for axis in np.flatnonzero(np.array(mask.shape) == 1):
        cross &= np.moveaxis(np.array([False, True, False])[:, None, None], 0, axis)
    return mask & ~ndimage.binary_erosion(mask | ignored, cross)


def by_arrays(prediction: np.ndarray, reference: np.ndarray, ignored: np.ndarray, tolerance: float) -> MetricValues:
    """The metrics of two masks from arrays of full size."""
    full = np.ones((3, 3, 3))
    lesions = []
    for mask, by in ((reference, prediction), (prediction, reference)):
        numbers, count = ndimage.label(mask, full)
        lesions.append((len(set(numbers[mask & by].tolist())), count))
    (found, actual), (true, predicted) = lesions
    surfaces = [eroded_away(mask, ignored) for mask in (prediction, reference)]
    if not prediction.any() or not reference.any():
        nsd, hd95 = 0.0 if prediction.any() or reference.any() else None, None
    elif not surfaces[0].any() or not surfaces[1].any():
        nsd, hd95 = None, None
    else:
        apart = [ndimage.distance_transform_edt(~b, SPACING)[a] for a, b in (surfaces, surfaces[::-1])]
        nsd = np.mean(np.concatenate(apart) <= tolerance + 1e-5)
        hd95 = max(np.percentile(d, 95) for d in apart)
    tp, n_pred, n_ref = (np.count_nonzero(mask) for mask in (prediction & reference, prediction, reference))
    return {
        "TP": tp, "n_pred": n_pred, "n_ref": n_ref, "NSD": nsd, "HD95": hd95, "lesion_TP": found,
        "lesion_FP": predicted - true, "lesion_FN": actual - found, "reference_ml": n_ref * np.prod(SPACING) / 1000,
        "Dice": 2 * tp / (n_pred + n_ref) if n_pred + n_ref else None,
        "IoU": tp / (n_pred + n_ref - tp) if n_pred + n_ref else None,
    }  # fmt: skip


def volumes(rng: np.random.Generator, blobs: float) -> tuple[np.ndarray, np.ndarray]:
    """Two label maps of noise or of blobs, up to the border; some of a single slice, row or column."""
    shape = tuple(int(length) for length in rng.integers(1, 30, 3))
    field = rng.random((4, *shape))
    if blobs:
        field = np.stack([ndimage.gaussian_filter(part, blobs) for part in field])
        field /= field.std() + 1e-9
    field[0] += field.std() * rng.uniform(0, 2)
    reference = field.argmax(0).astype(np.uint8)
    moved = np.roll(reference, rng.integers(-3, 4, 3), (0, 1, 2))
    noise = rng.random(shape) < 0.01
    return np.where(noise, rng.integers(0, 4, shape), moved).astype(np.int16), reference


@pytest.mark.parametrize("labels", LABELS.values(), ids=LABELS)
def test_equals_filters_on_arrays(labels: Labels) -> None:
    pairs = [volumes(np.random.default_rng(seed), blobs) for seed in range(8) for blobs in (0, 1, 3)]
    real = [read_label(path)[0] for path in sorted((HIPPOCAMPUS / "labelsTs").glob("*.nii.gz"))[:2]]
    for i, (prediction, reference) in enumerate([*pairs, *((displaced(array), array) for array in real)]):
        ignored = reference == (-1 if labels.ignore is None else labels.ignore)
        found = score_case(prediction, reference, labels, SPACING, tolerance=1.3, threads=1 + i % 3)
        for name, members in zip(labels.region_names, labels.region_values, strict=True):
            expected = by_arrays(
                *(np.isin(array, members) & ~ignored for array in (prediction, reference)), ignored, 1.3
            )
            assert {key: found[name][key] for key in expected} == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize("far", [0.0, 4.0, 80.0])
@pytest.mark.parametrize("tolerance", [0.0, 1.0, 81.0])
def test_bounded_distances_equal_brute_force(far: float, tolerance: float) -> None:
    """Enough points that cells bound most distances, near, far, and on either side of the tolerance."""
    rng = np.random.default_rng(5)
    source, target = rng.integers(0, 40, (3000, 3)) * np.array(SPACING), rng.integers(0, 40, (400, 3)) * SPACING
    source[:, 0] += far
    expected = np.sqrt(np.min([((source - point) ** 2).sum(1) for point in target], axis=0))
    near, percentile = measure_distances(source, target, tolerance, max(SPACING))
    assert near == np.count_nonzero(expected <= tolerance + 1e-5)
    assert percentile == pytest.approx(np.percentile(expected, 95))


# ------------------------------------------------------------------------------------------------- worked out by hand


def test_labels_that_are_absent() -> None:
    box = blank()
    box[2:4, 3:6, 3:9] = 1
    both, missed, invented = compare(blank(), blank()), compare(blank(), box), compare(box, blank())
    assert values(both, "Dice", "IoU", "NSD", "HD95", "volume_error", "lesion_F1") == (None,) * 6
    assert values(both, "TN", "TP", "prediction_ml") == (box.size, 0, 0.0)
    assert values(missed, "Dice", "NSD", "HD95", "volume_error") == (0.0, 0.0, None, -1.0)
    assert values(invented, "Dice", "NSD", "HD95", "volume_error") == (0.0, 0.0, None, None)
    assert (missed["lesion_FN"], invented["lesion_FP"], missed["lesion_F1"]) == (1, 1, 0.0)


def test_a_shifted_box() -> None:
    reference, prediction = blank(), blank()
    reference[1:4, 2:6, 2:8] = 1
    prediction[1:4, 2:6, 4:10] = 1  # two voxels of 0.5 mm further
    found = compare(prediction, reference, (3.0, 1.0, 0.5), tolerance=0.5)
    assert found["Dice"] == pytest.approx(2 * 48 / 144)
    assert values(found, "TP", "FP", "FN", "HD95", "reference_ml") == (48, 24, 24, 1.0, pytest.approx(0.108))
    # Of the 64 surface voxels of the reference, its face (12) and the middle of its far face (2) are 1 mm away; so are,
    # mirrored, those of the prediction.
    assert found["NSD"] == 50 / 64
    assert compare(prediction, reference, (3.0, 1.0, 0.5), tolerance=1.0)["NSD"] == 1.0  # the tolerance is within


def test_ignored_voxels_are_left_out() -> None:
    labels = Labels(names={"background": 0, "lesion": 1}, ignore=9)
    reference, prediction = blank(), blank()
    reference[1:5, 2:8, 2:12] = prediction[1:5, 2:8, 2:12] = 1
    reference[:, :, 7:] = 9  # from the middle of the lesion on
    prediction[:, 9:, 10:] = 1  # wrong, but not annotated
    found = score_case(prediction, reference, labels, (1.0, 1.0, 1.0))["lesion"]
    assert values(found, "Dice", "NSD", "HD95", "lesion_FP") == (1.0, 1.0, 0.0, 0)
    assert sum(values(found, "TP", "FP", "FN", "TN")) == np.count_nonzero(reference != 9)  # type: ignore[arg-type]
    prediction[:, :, 6:7] = 0  # now it ends a voxel before the ignored voxels
    cut = score_case(prediction, reference, labels, (1.0, 1.0, 1.0), tolerance=0.5)["lesion"]
    # the middle of the cut face (8 of 80 surface voxels) is a surface of the prediction alone; the reference continues
    # into the ignored voxels, with a rim (16 of 88) that the prediction lacks
    assert values(cut, "FN", "NSD", "HD95") == (24, 144 / 168, 1.0)


def test_a_slice_is_all_surface_but_a_picture_is_not() -> None:
    mask = np.zeros((5, 20, 20), np.uint8)
    mask[2, 5:15, 5:15] = 1
    hole = mask.copy()
    hole[2, 9:11, 9:11] = 0
    assert compare(hole, mask, (5.0, 1.0, 1.0), tolerance=0.5)["NSD"] == pytest.approx(192 / 196)
    picture = compare(hole[2:3], mask[2:3], (999.0, 1.0, 1.0), tolerance=0.5)
    # a ring of 36 in both; around the hole a ring of 8 (its corners touch by edges only), 3 mm or more inside
    assert values(picture, "NSD", "volume_error") == pytest.approx((72 / 80, -0.04))
    assert values(picture, "prediction_ml", "reference_ml") == (None, None)


def test_lesions() -> None:
    reference, prediction = blank(), blank()
    reference[1:3, 1:4, 1:4] = reference[1, 8, 8] = reference[2, 9, 9] = 1  # the last two touch at a corner: one lesion
    reference[4, 2, 15] = 1
    prediction[2:4, 3:5, 3:5] = prediction[2, 9, 9:11] = 1  # two found, one missed
    prediction[5, 11, 0] = prediction[5, 11, 19] = 1  # two false ones
    found = compare(prediction, reference)
    assert values(found, "lesion_TP", "lesion_FP", "lesion_FN", "lesion_F1") == (2, 2, 1, pytest.approx(4 / 7))


def test_values_and_types_of_any_kind() -> None:
    """Values far apart, negative or no label at all; wide and signed types; two arrays of different types."""
    labels = Labels(names={"background": 0, "a": -3, "b": 40000})
    reference = np.zeros((4, 6, 6), np.int32)
    reference[1:3, 1:3, 1:3], reference[1:3, 3:5, 3:5] = -3, 40000
    prediction = reference.astype(np.int64)
    prediction[0, 0, :3] = (7, -100, 1 << 40)  # no labels: background
    found = score_case(prediction, reference, labels, (1.0, 1.0, 1.0))
    assert [found[name]["Dice"] for name in "ab"] == [1.0, 1.0]
    mask = (reference == 40000).astype(np.uint8)
    for kind in (np.int8, np.uint16, np.int32, np.uint64, np.float32):
        assert compare(mask.astype(kind), mask)["Dice"] == 1.0
    with pytest.raises(ValueError, match="shape"):
        score_case(prediction[1:], reference, labels, (1.0, 1.0, 1.0))


def test_the_table_of_metrics_is_complete() -> None:
    box = np.ones((2, 2, 2), np.uint8)
    assert list(compare(box, box)) == list(METRICS) and all(name == METRICS[name].name for name in METRICS)
    assert METRICS["HD95"].file_key("px") == "HD95_px" and METRICS["Dice"].file_key("px") == "Dice"
