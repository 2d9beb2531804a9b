"""Metrics of real label maps against SimpleITK, and of small ones against results worked out by hand."""

from __future__ import annotations

import time
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk
from samples import HIPPOCAMPUS, displaced

from nnunet_lite.data.images import read_label
from nnunet_lite.data.labels import Labels
from nnunet_lite.evaluation.metrics import METRICS, MetricValues, score_case

REFERENCES = sorted((HIPPOCAMPUS / "labelsTs").glob("*.nii.gz"))
TWO = Labels(names={"background": 0, "Anterior": 1, "Posterior": 2})


def compare(prediction: np.ndarray, reference: np.ndarray, spacing=(1.0, 1.0, 1.0), **options) -> MetricValues:  # type: ignore[no-untyped-def]
    return score_case(prediction, reference, Labels(names={"lesion": 1}), spacing, **options)["lesion"]


def values(metrics: MetricValues, *names: str) -> tuple[float | None, ...]:
    return tuple(metrics[name] for name in names)


def blank() -> np.ndarray:
    return np.zeros((6, 12, 20), np.uint8)


def by_simpleitk(prediction: np.ndarray, reference: np.ndarray, spacing: tuple[float, ...], tolerance: float) -> dict:
    """The metrics of two masks with SimpleITK's filters alone."""
    images = []
    for mask in (prediction, reference):
        image = sitk.GetImageFromArray(mask.astype(np.uint8))
        image.SetSpacing(spacing[::-1])
        images.append(sitk.ConstantPad(image, (1, 1, 1), (1, 1, 1), 0))
    overlap = sitk.LabelOverlapMeasuresImageFilter()
    overlap.Execute(*images)
    contours = [sitk.BinaryContour(image, False) for image in images]
    directed = []
    for own, other in (contours, contours[::-1]):
        distance = sitk.Abs(sitk.SignedMaurerDistanceMap(other, squaredDistance=False, useImageSpacing=True))
        directed.append(sitk.GetArrayFromImage(distance)[sitk.GetArrayFromImage(own) > 0])
    shape = sitk.LabelShapeStatisticsImageFilter()
    shape.Execute(images[1])
    return {
        "Dice": overlap.GetDiceCoefficient(),
        "IoU": overlap.GetJaccardCoefficient(),
        "HD95": max(np.percentile(d, 95) for d in directed),
        "NSD": np.mean(np.concatenate(directed) <= tolerance + 1e-4),
        "reference_ml": shape.GetPhysicalSize(1) / 1000,
    }


@pytest.mark.parametrize("path", REFERENCES[:4], ids=lambda path: path.name)
@pytest.mark.parametrize("spacing", [(1.0, 1.0, 1.0), (2.5, 0.7, 1.1)])
def test_equals_simpleitk(path: Path, spacing: tuple[float, float, float]) -> None:
    reference = read_label(path)[0]
    prediction = displaced(reference)
    measured = score_case(prediction, reference, TWO, spacing, tolerance=1.2)
    for value, name in ((1, "Anterior"), (2, "Posterior")):
        expected = by_simpleitk(prediction == value, reference == value, spacing, 1.2)
        found = {key: measured[name][key] for key in expected}
        assert found == pytest.approx(expected, abs=1e-3)
        assert 0.2 < found["Dice"] < 0.95 and found["HD95"] > 1  # the test has something to find


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


@pytest.mark.slow
def test_a_large_case_takes_three_seconds() -> None:
    """512 x 512 x 300, ten labels of 0.1 to 3 million voxels, with surfaces a few voxels apart."""
    reference, prediction = np.zeros((300, 512, 512), np.uint8), np.zeros((300, 512, 512), np.uint8)
    z, y, x = np.ogrid[:300, :512, :512]
    rng = np.random.default_rng(0)
    for value in range(1, 11):
        centre, radius = rng.uniform(0.2, 0.8, 3) * reference.shape, rng.uniform(0.06, 0.22, 3) * reference.shape
        for array, by in ((reference, 0.0), (prediction, 3.0)):
            c, r = centre + by, radius + by / 3
            array[((z - c[0]) / r[0]) ** 2 + ((y - c[1]) / r[1]) ** 2 + ((x - c[2]) / r[2]) ** 2 < 1] = value
    labels = Labels(names={str(value): value for value in range(1, 11)})
    start = time.process_time()  # of all threads: other work on the machine does not count
    found = score_case(prediction, reference, labels, (1.5, 0.8, 0.8), threads=2)
    assert time.process_time() - start < 4.5  # what two cores do in 3 s when a quarter is lost to waiting
    assert all(0.5 < metrics["Dice"] < 0.99 for metrics in found.values() if metrics["Dice"] is not None)
