"""Patches lie where they should, show what they were drawn for, and depend on nothing but seed, epoch and iteration."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch

from nnunet_lite.data.labels import Labels
from nnunet_lite.inference.windows import padding
from nnunet_lite.preprocessing.stored_case import sample_voxels
from nnunet_lite.settings import AugmentationSettings
from nnunet_lite.training.cache import LoadedCase, move_case
from nnunet_lite.training.dataloader import (
    Location,
    Shape,
    draw_corner,
    draw_locations,
    oversample_foreground,
    read_box,
    read_patches,
    rng_for,
    source_shape,
)

LABELS = Labels(names={"background": 0, "a": 1, "b": 2})
CPU = torch.device("cpu")


def make_case(shape: Shape, labels: Labels = LABELS, case_id: str = "case", previous: bool = False) -> LoadedCase:
    """Noise, with one voxel of class 2 in a corner and a block of class 1."""
    rng = np.random.default_rng(sum(shape))
    label = np.zeros(shape, np.uint8)
    label[shape[0] // 2 :, :2, :3] = 1
    label[0, -1, -1] = 2
    voxels = dict(sample_voxels(label, labels))
    before = rng.integers(0, 3, shape).astype(np.uint8) if previous else None
    return LoadedCase(case_id, rng.normal(size=(2, *shape)).astype(np.float16), label, voxels, None, before)


def box(array: Any, corner: Sequence[int], shape: Sequence[int]) -> np.ndarray:
    """As float32, from memory that was not empty before."""
    out = torch.full((*array.shape[: array.ndim - 3], *shape), 99.0)
    read_box(array, corner, out if isinstance(array, torch.Tensor) else out.numpy())
    return out.numpy()


@pytest.mark.parametrize(("n", "forced"), [(2, 1), (3, 1), (4, 1), (5, 2), (7, 2), (9, 3), (12, 4)])
def test_a_third_of_a_batch_is_forced_as_nnunet_rounds(n: int, forced: int) -> None:
    chosen = oversample_foreground(n, 0.33, rng_for(0))
    assert chosen == [False] * (n - forced) + [True] * forced


@pytest.mark.parametrize(("n", "share"), [(1, 0.33), (2, 0.1), (1, 0.0)])
def test_a_share_that_rounds_to_none_is_kept_over_many_batches(n: int, share: float) -> None:
    rng = rng_for(0)
    drawn = np.array([oversample_foreground(n, share, rng) for _ in range(2000)])
    assert drawn.mean() == pytest.approx(share, abs=0.03)
    assert not drawn[:, :-1].any()


def test_forced_patches_show_their_class_of_all_classes_alike() -> None:
    case, patch, rng = make_case((20, 24, 28)), (8, 10, 12), rng_for(1, 0, 0)
    seen = [set(np.unique(box(case.label, draw_corner(case, patch, True, rng), patch))) - {0} for _ in range(200)]
    assert all(seen)
    share = np.mean([2 in classes for classes in seen])  # classes are drawn alike, however few voxels one has
    assert 0.35 < share < 0.65


def test_unforced_patches_reach_every_place_inside() -> None:
    case, rng = make_case((5, 6, 7)), rng_for(1, 0, 0)
    corners = {draw_corner(case, (4, 4, 4), False, rng) for _ in range(500)}
    assert corners == {(z, y, x) for z in range(2) for y in range(3) for x in range(4)}


# lower corners of nnU-Net 2.8.1's nnUNetDataLoader.get_bbox, for patches that are not enlarged for rotation
@pytest.mark.parametrize(
    ("voxel", "shape", "corner"),
    [
        ((0, 0, 0), (5, 6, 20), (-4, -3, 0)),
        ((4, 5, 19), (5, 6, 20), (-2, -1, 13)),
        ((2, 3, 10), (5, 6, 20), (-4, -3, 4)),
        ((0, 0, 0), (20, 20, 20), (0, 0, 0)),
        ((19, 19, 19), (20, 20, 20), (13, 13, 13)),
    ],
)
def test_foreground_patches_lie_where_nnunet_puts_them(voxel: Shape, shape: Shape, corner: Shape) -> None:
    label = np.zeros(shape, np.uint8)
    label[voxel] = 1
    case = LoadedCase("case", label[None].astype(np.float16), label, {1: np.array([voxel])}, None)
    assert draw_corner(case, (12, 12, 12), True, rng_for(0, 0, 0)) == corner


@pytest.mark.parametrize("shape", [(5, 30, 30), (6, 9, 31), (4, 4, 4), (7, 16, 3)])
def test_an_image_smaller_than_the_patch_lies_as_in_the_sliding_window(shape: Shape) -> None:
    case, patch = make_case(shape), (12, 16, 16)
    before = [around[0] for around in padding(shape, patch)]
    corners = np.array([draw_corner(case, patch, False, rng_for(0, 0, i)) for i in range(30)])
    for found, size, p, start in zip(corners.T, shape, patch, before, strict=True):
        if size <= p:  # of two middles both are taken, as nnU-Net does
            assert set(-found) == {start, start + (p - size) % 2}


def test_patches_of_partly_annotated_cases_are_centred_on_annotated_voxels() -> None:
    labels = Labels(names={"background": 0, "a": 1}, ignore=9)
    label = np.full((20, 20, 20), labels.ignore_class, np.uint8)
    label[3:6, 10, 10] = 0
    voxels = dict(sample_voxels(label, labels))
    case = LoadedCase("case", np.zeros((1, 20, 20, 20), np.float16), label, {}, voxels[-1])
    for i in range(30):
        corner = draw_corner(case, (4, 4, 4), i % 2 == 0, rng_for(0, 0, i))
        assert (box(label, corner, (4, 4, 4)) == 0).any()


def test_reading_outside_the_image_equals_padding_with_zeros() -> None:
    array = np.random.default_rng(0).normal(size=(2, 5, 6, 7)).astype(np.float32)
    padded = np.pad(array, ((0, 0), (12, 12), (12, 12), (12, 12)))
    for corner in [(-3, -2, -1), (0, 0, 0), (2, 3, 4), (4, -4, 6), (-2, 5, -6), (-1, -1, -1), (9, 2, 2), (2, -9, 12)]:
        for shape in [(4, 4, 4), (9, 9, 9), (1, 2, 3)]:
            z, y, x = (c + 12 for c in corner)
            expected = padded[:, z : z + shape[0], y : y + shape[1], x : x + shape[2]]
            expected = np.pad(expected, [(0, w - n) for w, n in zip((2, *shape), expected.shape, strict=True)])
            np.testing.assert_array_equal(box(array, corner, shape), expected)
            np.testing.assert_array_equal(box(array[0], corner, shape), expected[0])


def test_stored_cases_are_read_like_arrays_and_tensors(tiny_cases: list[Any]) -> None:
    stored = tiny_cases[0]
    for array in (stored.image, stored.label):
        for corner in [(-3, 4, 20), (10, 10, 10), (30, -2, -2)]:
            expected = box(array[:], corner, (12, 12, 12))
            np.testing.assert_array_equal(box(array, corner, (12, 12, 12)), expected)
            np.testing.assert_array_equal(box(torch.from_numpy(array[:]), corner, (12, 12, 12)), expected)


def test_the_box_of_a_turned_patch_holds_it_and_shares_its_centre() -> None:
    patch = (8, 9, 10)
    assert source_shape(np.eye(3), patch) == patch
    assert source_shape(0.5 * np.eye(3), patch) == (6, 5, 6)
    quarter = np.array([[1.0, 0, 0], [0, 0, -1], [0, 1, 0]])
    wide = source_shape(quarter, patch)
    assert wide == (8, 11, 10)
    rng = np.random.default_rng(0)
    for _ in range(50):
        matrix = rng.normal(size=(3, 3))
        wide = source_shape(matrix, patch)
        corners = np.stack(np.meshgrid(*[[-(p - 1) / 2, (p - 1) / 2] for p in patch]), -1).reshape(-1, 3) @ matrix.T
        assert (np.abs(corners).max(0) <= (np.array(wide) - 1) / 2 + 1e-6).all()
        assert all((w - p) % 2 == 0 for w, p in zip(wide, patch, strict=True))


@pytest.mark.parametrize("resident", [False, True])
def test_boxes_of_several_sizes_lie_in_the_middle_of_one(resident: bool) -> None:
    case, corner, patch = make_case((30, 30, 30), previous=True), (5, 9, 3), (8, 9, 10)
    places = [Location(0, corner, None), Location(0, corner, 1.3 * np.eye(3)), Location(0, (25, 9, 3), 0.6 * np.eye(3))]
    cases = [move_case(case, CPU)] if resident else [case]
    images, classes = read_patches(cases, places, patch, CPU)
    wide = source_shape(1.3 * np.eye(3), patch)
    assert images.shape == (3, 2, *wide)
    assert (images.dtype, classes.dtype) == (torch.float32, torch.uint8)
    for i, place in enumerate(places):
        size = patch if place.matrix is None else source_shape(place.matrix, patch)
        margin = [(w - s) // 2 for w, s in zip(wide, size, strict=True)]
        inner = (slice(None), *(slice(m, m + s) for m, s in zip(margin, size, strict=True)))
        at = [c - (s - p) // 2 for c, s, p in zip(place.corner, size, patch, strict=True)]
        np.testing.assert_array_equal(images[i][inner], box(case.image, at, size))
        np.testing.assert_array_equal(classes[i][inner][0], box(case.label, at, size))
        np.testing.assert_array_equal(classes[i][inner][1], box(case.previous, at, size))
        outside = torch.ones(images.shape[1:], dtype=torch.bool)
        outside[inner] = False
        assert not images[i][outside].any(), "nothing is read that is not needed"


def test_a_case_stored_more_precisely_keeps_its_precision() -> None:
    narrow = make_case((9, 9, 9))
    wide = LoadedCase("wide", np.full((2, 9, 9, 9), 1e6, np.float32), narrow.label, {}, None)
    places = [Location(0, (0, 0, 0), None), Location(1, (0, 0, 0), None)]
    images, _ = read_patches([narrow, wide], places, (9, 9, 9), CPU)
    np.testing.assert_array_equal(images[0], narrow.image)
    assert (images[1] == 1e6).all()


def test_places_depend_on_their_numbers_alone() -> None:
    cases = [make_case((20, 24, 28), case_id=f"case_{i}") for i in range(4)]

    def drawn(*numbers: int) -> list[Any]:
        places = draw_locations(cases, (8, 8, 8), 5, 0.33, AugmentationSettings(), rng_for(*numbers))
        return [(p.case, p.corner, None if p.matrix is None else p.matrix.tolist()) for p in places]

    first = drawn(1, 2, 3)
    drawn(1, 2, 2)
    np.random.default_rng(0).random(5)
    assert drawn(1, 2, 3) == first
    for other in [(2, 2, 3), (1, 3, 3), (1, 2, 4), (1, 3, 2)]:
        assert drawn(*other) != first


def test_cases_are_drawn_with_replacement_and_all_of_them() -> None:
    cases = [make_case((8, 8, 8), case_id=str(i)) for i in range(5)]
    drawn = [[p.case for p in draw_locations(cases, (4, 4, 4), 4, 0, None, rng_for(0, 0, i))] for i in range(60)]
    assert {number for batch in drawn for number in batch} == set(range(5))
    assert any(len(set(batch)) < len(batch) for batch in drawn)
