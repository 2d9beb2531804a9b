"""What a network sees of an image, and the exact way back."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from samples import sample_plan

from nnunet_lite.data.dataset import read_case, read_dataset
from nnunet_lite.data.geometry import Geometry, slices
from nnunet_lite.data.images import Image
from nnunet_lite.data.labels import Labels
from nnunet_lite.errors import UserError
from nnunet_lite.planning.schema import Resampling
from nnunet_lite.preprocessing import pipeline
from nnunet_lite.preprocessing.pipeline import Placement, Preprocessed, preprocess_image
from nnunet_lite.preprocessing.resampling import resample_labels

LABELS = Labels(names={"background": 0, "anterior": 1, "posterior": 2})
CUBIC = sample_plan(LABELS).configuration("3d_fullres")
REGIONS = Labels(names={"background": 0, "whole": (1, 4, 7), "core": (4, 7), "tip": (7,)}, region_order=(1, 4, 7))


def blob(shape: tuple[int, int, int], spacing: tuple[float, float, float]) -> tuple[Image, np.ndarray]:
    """An ellipsoid of noise in a frame of zeros, its upper half labelled 2, its lower half 1."""
    axes = np.meshgrid(*(np.linspace(-1.4, 1.4, n) for n in shape), indexing="ij")
    body = sum(a**2 for a in axes) < 1
    noise = np.random.default_rng(0).normal(100, 20, shape).astype(np.float32)
    values = np.where(body, np.where(axes[0] > 0, 2, 1), 0).astype(np.uint8)
    return Image(np.where(body, noise, 0)[None], Geometry(shape, spacing)), values


def one_hot(case: Preprocessed, n: int = 3) -> np.ndarray:
    """Logits for the classes of a case."""
    assert case.classes is not None
    return np.stack([(case.classes == c) for c in range(n)]).astype(np.float32) * 8 - 4


def back(logits: Any, case: Preprocessed, labels: Labels = LABELS) -> np.ndarray:
    return pipeline.restore_segmentation(logits, case.placement, labels, Resampling())


def test_crop_normalise_and_keep_where_spacing_is_equal() -> None:
    image, values = blob((30, 40, 20), (1.0, 1.0, 1.0))
    got = preprocess_image(image, values, sample_plan(LABELS), CUBIC)
    box = slices(got.placement.box)
    inside = image.array[0][box].astype(float)
    assert got.image.dtype == np.float32 and got.image.shape == (1, *got.placement.shape) != (1, 30, 40, 20)
    assert np.allclose(got.image[0], (inside - inside.mean()) / inside.std(), atol=1e-5)
    assert got.classes is not None and np.array_equal(got.classes, values[box])
    assert image.array.max() > 100  # the caller's array is left alone


def test_mask_counts_annotated_voxels_even_where_zero() -> None:
    image, values = blob((30, 40, 20), (1.0, 1.0, 1.0))
    values[15, 20, 10], image.array[0, 15, 20, 10] = 2, 0  # a hole, which the mask fills anyway
    corner = tuple(int(n) for n in np.argwhere(image.array[0]).min(axis=0))
    values[corner] = 1
    got = preprocess_image(image, values, sample_plan(LABELS, use_mask=True), CUBIC)
    start = [low for low, _ in got.placement.box]
    body = image.array[0] != 0
    body[15, 20, 10] = body[corner] = True
    voxels = image.array[0][body].astype(float)
    assert got.image[0][tuple(np.subtract(corner, start))] == pytest.approx(
        (image.array[0][corner] - voxels.mean()) / voxels.std(), abs=1e-4
    )
    assert (got.image[0] == 0).sum() == got.image[0].size - body.sum()


@pytest.mark.parametrize("spacing", [(1.0, 1.0, 1.0), (0.8, 1.3, 1.1), (4.0, 1.0, 1.0)])
def test_what_lies_outside_the_mask_of_all_channels_is_a_class_of_its_own(spacing: tuple[float, float, float]) -> None:
    """The mask is nnU-Net's: of all channels, be they normalised inside it or not; resampled as any other label."""
    image, values = blob((30, 40, 20), (1.0, 1.0, 1.0))
    second = np.where(np.arange(40)[:, None] < 15, 7, 0) * np.ones((30, 1, 20), np.float32)
    image = Image(np.concatenate([image.array, second[None]]), image.geometry)
    values[:, :, :9] = 0
    plan = sample_plan(LABELS, use_mask=True, channels=2)
    plan = plan.model_copy(update={"channels": (plan.channels[0], sample_plan(LABELS).channels[0])})
    got = preprocess_image(image, values, plan, sample_plan(LABELS, spacing).configuration("3d_fullres"))
    box = slices(got.placement.box)
    outside = ~image.array.any(0) & (values == 0)
    marked = np.where(outside, 3, values)[box].astype(np.uint8)
    assert outside[box].any() and (~outside & (values == 0))[box].any()
    wanted = resample_labels(marked, got.placement.shape, (1.0, 1.0, 1.0), spacing)
    assert got.classes is not None and np.array_equal(got.classes, wanted)
    unmasked = pipeline.prepare(image, values, sample_plan(LABELS, channels=2))
    assert unmasked.classes is not None and unmasked.classes.max() == 2


@pytest.mark.parametrize("axis_order", [(0, 1, 2), (2, 0, 1), (1, 2, 0)])
@pytest.mark.parametrize("spacing", [(1.0, 1.0, 1.0), (0.8, 1.3, 1.1), (4.0, 1.0, 1.0)])
def test_the_way_back_ends_on_the_image_grid(
    axis_order: tuple[int, int, int], spacing: tuple[float, float, float]
) -> None:
    image, values = blob((30, 44, 36), (1.5, 0.9, 1.2))
    plan = sample_plan(LABELS, spacing, axis_order=axis_order)
    got = preprocess_image(image, values, plan, plan.configuration("3d_fullres"))
    restored = back(one_hot(got), got)
    assert restored.shape == values.shape and restored.dtype == np.uint8
    overlap = 2 * ((restored == values) & (values > 0)).sum() / ((restored > 0).sum() + (values > 0).sum())
    assert overlap > (0.93 if max(spacing) < 2 else 0.8)
    before = [image.geometry.spacing[a] for a in axis_order]
    cropped = [high - low for low, high in got.placement.box]
    assert got.placement.shape == tuple(round(n * s / t) for n, s, t in zip(cropped, before, spacing, strict=True))


def test_without_resampling_the_way_back_is_exact(hippocampus: Path) -> None:
    dataset = read_dataset(hippocampus)
    plan = sample_plan(dataset.labels, axis_order=(1, 2, 0))
    for case in dataset.cases[:4]:
        image, values = read_case(case, dataset)
        assert values is not None
        got = preprocess_image(image, dataset.labels.encode(values), plan, plan.configuration("3d_fullres"))
        restored = back(one_hot(got), got, dataset.labels)
        assert np.array_equal(restored, values)


def test_regions_are_written_in_their_order_with_their_values() -> None:
    image, _ = blob((20, 24, 22), (1.0, 1.0, 1.0))
    got = preprocess_image(image, None, sample_plan(REGIONS), CUBIC)
    assert got.classes is None
    logits = np.full((3, *got.placement.shape), -3, np.float32)
    logits[0, 2:12, 2:12, 2:12], logits[1, 4:10, 4:10, 4:10], logits[2, 5:6, 5:6, 5:6] = 2, 2, 2
    restored = back(logits, got, REGIONS)
    z, y, x = (low for low, _ in got.placement.box)
    assert [int((restored == v).sum()) for v in (1, 4, 7)] == [10**3 - 6**3, 6**3 - 1, 1]
    assert restored[z + 5, y + 5, x + 5] == 7 and restored[0, 0, 0] == 0


def test_values_of_the_dataset_come_back() -> None:
    labels = Labels(names={"background": 5, "a": 300, "b": -2})
    image, classes = blob((20, 24, 22), (1.0, 1.0, 1.0))
    got = preprocess_image(image, classes, sample_plan(labels), CUBIC)
    restored = back(one_hot(got), got, labels)
    assert restored.dtype == np.int16 and np.array_equal(restored, labels.decode(classes))


def test_logits_of_torch_and_of_half_precision_give_the_same() -> None:
    image, values = blob((20, 24, 22), (1.5, 1.1, 0.7))
    for labels in (LABELS, REGIONS):
        got = preprocess_image(image, values, sample_plan(labels), CUBIC)
        logits = one_hot(got)
        want = back(logits, got, labels)
        assert len(np.unique(want)) == labels.n_classes
        for kind in (torch.float32, torch.float16, torch.bfloat16):
            tensor = torch.from_numpy(logits).to(kind)
            assert (back(tensor, got, labels) == want).mean() > 0.9999
        half = back(logits.astype(np.float16), got, labels)
        assert np.array_equal(half, want)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_logits_that_are_not_finite_are_refused(value: float) -> None:
    image, values = blob((20, 24, 22), (1.0, 1.0, 1.0))
    for labels in (LABELS, REGIONS):
        got = preprocess_image(image, values, sample_plan(labels), CUBIC)
        logits = one_hot(got)
        logits[1, 3, 4, 5] = value
        for broken in (logits, logits.astype(np.float16), torch.from_numpy(logits), torch.from_numpy(logits).half()):
            with pytest.raises(UserError, match=rf"^1 of {logits.size} values .* NaN or infinite"):
                back(broken, got, labels)
    pipeline.require_finite(np.full((3, 8, 8, 8), 3e38, np.float32), "")  # only their sum is infinite
    pipeline.require_finite(np.full((3, 8, 8, 8), 6e4, np.float16), "")


def test_spacing_and_shape_after_resampling() -> None:
    """A 2d configuration keeps the first spacing; the shape is rounded half to even and has at least one voxel."""
    plan = sample_plan(LABELS, (1.0, 0.5, 0.5))
    flat, deep = plan.configuration("2d"), plan.configuration("3d_fullres")
    assert pipeline.resampled_spacing(flat, (3.0, 0.7, 0.5)) == (3.0, 0.5, 0.5)
    assert pipeline.resampled_spacing(deep, (3.0, 0.7, 0.5)) == (1.0, 0.5, 0.5)
    rounding = float(np.float32(0.5) + np.float32(1e-7))
    assert pipeline.resampled_spacing(flat, (3.0, rounding, 0.5)) == (3.0, rounding, 0.5)
    assert pipeline.resampled_shape((5, 7, 10), (1.0, 1.0, 1.0), (2.0, 2.0, 4.0)) == (2, 4, 2)
    assert pipeline.resampled_shape((1, 9, 9), (1.0, 1.0, 1.0), (3.0, 1.0, 1.0))[0] == 1


def test_all_zero_image_is_not_cropped() -> None:
    image = Image(np.zeros((1, 6, 7, 8), np.float32), Geometry((6, 7, 8), (1.0, 1.0, 1.0)))
    got = preprocess_image(image, None, sample_plan(LABELS), CUBIC)
    assert got.image.shape == (1, 6, 7, 8) and (got.image == 0).all()


def test_placement_survives_json() -> None:
    image, _ = blob((20, 24, 22), (1.5, 1.1, 0.7))
    place = preprocess_image(image, None, sample_plan(LABELS, axis_order=(2, 0, 1)), CUBIC).placement
    written = json.loads(json.dumps(asdict(place)))
    assert Placement.from_json(written) == place
    turn = written.pop("turn")  # as an earlier nnlite wrote it
    assert Placement.from_json(written | {"axis_order": turn["order"], "reversed": turn["reversed"]}) == place
