"""Metrics of random label maps equal those of whole-array filters: components, erosion, distances to every point."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import ndimage

from nnunet_lite.data.labels import Labels
from nnunet_lite.evaluation.masks import measure_distances
from nnunet_lite.evaluation.metrics import score_case

SPACING = (2.5, 0.7, 1.1)
LABELS = {
    "labels": Labels(names={"background": 0, "a": 1, "b": 2, "c": 3}),
    "ignore": Labels(names={"background": 0, "a": 1, "b": 2}, ignore=3),
    "regions": Labels(names={"background": 0, "whole": (1, 2, 3), "core": (2, 3), "c": (3,)}, region_order=(1, 2, 3)),
    "absent": Labels(names={"background": 0, "b": 2, "nowhere": 300}),
}


def eroded_away(mask: np.ndarray, ignored: np.ndarray) -> np.ndarray:
    """The surface of a mask by erosion; the end of the image is outside, an axis of one voxel is no axis."""
    cross = ndimage.generate_binary_structure(3, 1)
    for axis in np.flatnonzero(np.array(mask.shape) == 1):
        cross &= np.moveaxis(np.array([False, True, False])[:, None, None], 0, axis)
    return mask & ~ndimage.binary_erosion(mask | ignored, cross)


def by_arrays(prediction: np.ndarray, reference: np.ndarray, ignored: np.ndarray, tolerance: float) -> tuple:
    """Lesions and surface scores of two masks from arrays of full size."""
    full = np.ones((3, 3, 3))
    lesions = []
    for mask, by in ((reference, prediction), (prediction, reference)):
        numbers, count = ndimage.label(mask, full)
        lesions.append((len(set(numbers[mask & by].tolist())), count))
    (found, actual), (true, predicted) = lesions
    surfaces = [eroded_away(mask, ignored) for mask in (prediction, reference)]
    if not prediction.any() or not reference.any():
        scores = (0.0 if prediction.any() or reference.any() else None, None)
    elif not surfaces[0].any() or not surfaces[1].any():
        scores = (None, None)
    else:
        apart = [ndimage.distance_transform_edt(~b, SPACING)[a] for a, b in (surfaces, surfaces[::-1])]
        scores = (np.mean(np.concatenate(apart) <= tolerance + 1e-5), max(np.percentile(d, 95) for d in apart))
    return (found, predicted - true, actual - found), scores


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


@pytest.mark.parametrize("blobs", [0, 1, 3])
@pytest.mark.parametrize("labels", LABELS.values(), ids=LABELS)
def test_equals_filters_on_arrays(labels: Labels, blobs: float) -> None:
    for seed in range(8):
        prediction, reference = volumes(np.random.default_rng(seed), blobs)
        ignored = reference == (-1 if labels.ignore is None else labels.ignore)
        found = score_case(prediction, reference, labels, SPACING, tolerance=1.3, threads=1 + seed % 3)
        for name, members in zip(labels.region_names, labels.region_values, strict=True):
            masks = [np.isin(array, members) & ~ignored for array in (prediction, reference)]
            lesions, scores = by_arrays(*masks, ignored, 1.3)
            one = found[name]
            assert tuple(one[f"lesion_{kind}"] for kind in ("TP", "FP", "FN")) == lesions
            assert (one["NSD"], one["HD95"]) == (pytest.approx(scores[0]), pytest.approx(scores[1], abs=1e-4))
            assert (one["TP"], one["n_pred"], one["n_ref"]) == tuple(
                np.count_nonzero(mask) for mask in (masks[0] & masks[1], *masks)
            )


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
