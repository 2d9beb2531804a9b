"""Patches lie where they should, show what they were drawn for, and depend on nothing but seed, epoch and iteration."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from nnunet_lite.data.labels import Labels
from nnunet_lite.inference.windows import pad_to_patch
from nnunet_lite.preprocess.stored import sampled_voxels
from nnunet_lite.settings import AugmentationSettings
from nnunet_lite.training.run import LoadedCase
from nnunet_lite.training.sampler import (
    draw_batch,
    draw_corner,
    forced_foreground,
    read_padded,
    read_sample,
    rng_for,
    source_shape,
)

LABELS = Labels(names={"background": 0, "a": 1, "b": 2})


def make_case(shape: tuple[int, int, int], labels: Labels = LABELS, case_id: str = "case") -> LoadedCase:
    """Noise, with one voxel of class 2 in a corner and a block of class 1."""
    rng = np.random.default_rng(sum(shape))
    label = np.zeros(shape, np.uint8)
    label[shape[0] // 2 :, :2, :3] = 1
    label[0, -1, -1] = 2
    voxels = dict(sampled_voxels(label, labels))
    return LoadedCase(case_id, rng.normal(size=(2, *shape)).astype(np.float16), label, voxels, None)


@pytest.mark.parametrize(("n", "forced"), [(1, 0), (2, 1), (3, 1), (4, 1), (5, 2), (7, 2), (9, 3), (12, 4)])
def test_a_third_of_a_batch_is_forced_as_nnunet_rounds(n: int, forced: int) -> None:
    chosen = forced_foreground(n, 0.33)
    assert chosen == [False] * (n - forced) + [True] * forced


def test_forced_patches_show_their_class_and_lie_inside() -> None:
    case, patch, rng = make_case((20, 24, 28)), (8, 10, 12), rng_for(1, 0, 0)
    seen: list[set[int]] = []
    for _ in range(200):
        corner = draw_corner(case, patch, True, rng)
        assert all(0 <= c <= n - p for c, n, p in zip(corner, case.label.shape, patch, strict=True))
        seen.append(set(np.unique(read_padded(case.label, corner, patch))) - {0})
    assert all(seen)
    share = np.mean([2 in classes for classes in seen])  # classes are drawn alike, however few voxels one has
    assert 0.35 < share < 0.65


def test_unforced_patches_reach_every_place() -> None:
    case, rng = make_case((5, 6, 7)), rng_for(1, 0, 0)
    corners = {draw_corner(case, (4, 4, 4), False, rng) for _ in range(500)}
    assert corners == {(z, y, x) for z in range(2) for y in range(3) for x in range(4)}


@pytest.mark.parametrize("shape", [(5, 30, 30), (6, 9, 31), (4, 4, 4), (7, 16, 3)])
def test_an_image_smaller_than_the_patch_lies_as_in_the_sliding_window(shape: tuple[int, int, int]) -> None:
    case, patch = make_case(shape), (12, 16, 16)
    _, inside = pad_to_patch(torch.zeros(1, *shape), patch)
    for forced in (False, True):
        corner = draw_corner(case, patch, forced, rng_for(0, 0, 0))
        for c, size, p, place in zip(corner, shape, patch, inside, strict=True):
            if size <= p:
                assert -c == place.start


def test_patches_of_partly_annotated_cases_are_centred_on_annotated_voxels() -> None:
    labels = Labels(names={"background": 0, "a": 1}, ignore=9)
    label = np.full((20, 20, 20), labels.ignore_class, np.uint8)
    label[3:6, 10, 10] = 0
    voxels = dict(sampled_voxels(label, labels))
    case = LoadedCase("case", np.zeros((1, 20, 20, 20), np.float16), label, {}, voxels[-1])
    for i in range(30):
        corner = draw_corner(case, (4, 4, 4), i % 2 == 0, rng_for(0, 0, i))
        assert (read_padded(label, corner, (4, 4, 4)) == 0).any()


def test_reading_outside_the_image_equals_padding_with_zeros() -> None:
    array = np.random.default_rng(0).normal(size=(2, 5, 6, 7)).astype(np.float32)
    padded = np.pad(array, ((0, 0), (9, 9), (9, 9), (9, 9)))
    for corner in [(-3, -2, -1), (0, 0, 0), (2, 3, 4), (4, -4, 6), (-2, 5, -6), (-1, -1, -1)]:
        for shape in [(4, 4, 4), (9, 9, 9), (1, 2, 3)]:
            z, y, x = (c + 9 for c in corner)
            expected = padded[:, z : z + shape[0], y : y + shape[1], x : x + shape[2]]
            np.testing.assert_array_equal(read_padded(array, corner, shape), expected)
            np.testing.assert_array_equal(read_padded(array[0], corner, shape), expected[0])


def test_stored_cases_are_read_like_arrays(tiny_cases: list[Any]) -> None:
    stored = tiny_cases[0]
    image, label = stored.image[:], stored.label[:]
    for corner in [(-3, 4, 20), (10, 10, 10), (30, -2, -2)]:
        np.testing.assert_array_equal(
            read_padded(stored.image, corner, (12, 12, 12)), read_padded(image, corner, (12,) * 3)
        )
        np.testing.assert_array_equal(
            read_padded(stored.label, corner, (12, 12, 12)), read_padded(label, corner, (12,) * 3)
        )


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


def test_a_sample_with_a_matrix_is_centred_on_its_patch() -> None:
    case, corner, patch = make_case((30, 30, 30)), (5, 9, 3), (8, 9, 10)
    plain = read_sample(case, corner, patch, None)
    wide = read_sample(case, corner, patch, 1.3 * np.eye(3))
    margin = [(w - p) // 2 for w, p in zip(wide.label.shape, patch, strict=True)]
    inner = tuple(slice(m, m + p) for m, p in zip(margin, patch, strict=True))
    np.testing.assert_array_equal(wide.label[inner], plain.label)
    np.testing.assert_array_equal(wide.image[(slice(None), *inner)], plain.image)


def test_a_batch_depends_on_its_numbers_alone() -> None:
    cases = [make_case((20, 24, 28), case_id=f"case_{i}") for i in range(4)]

    def batch(seed: int, epoch: int, iteration: int) -> list[Any]:
        return draw_batch(cases, (8, 8, 8), 5, 0.33, AugmentationSettings(), False, rng_for(seed, epoch, iteration))

    first = batch(1, 2, 3)
    batch(1, 2, 2)
    np.random.default_rng(0).random(5)
    again = batch(1, 2, 3)
    for a, b in zip(first, again, strict=True):
        assert a.case_id == b.case_id
        np.testing.assert_array_equal(a.image, b.image)
        np.testing.assert_array_equal(a.label, b.label)
    for other in [(2, 2, 3), (1, 3, 3), (1, 2, 4), (1, 3, 2)]:
        pairs = zip(first, batch(*other), strict=True)
        assert any(a.image.shape != b.image.shape or (a.image != b.image).any() for a, b in pairs)


def test_cases_are_drawn_with_replacement_and_all_of_them(tmp_path: Path) -> None:
    cases = [make_case((8, 8, 8), case_id=str(i)) for i in range(5)]
    ids = [[s.case_id for s in draw_batch(cases, (4, 4, 4), 4, 0.0, None, False, rng_for(0, 0, i))] for i in range(60)]
    assert {case_id for batch in ids for case_id in batch} == set("01234")
    assert any(len(set(batch)) < len(batch) for batch in ids)
