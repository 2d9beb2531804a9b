"""Resampling against scikit-image's resize, which nnU-Net uses, slice by slice for anisotropic images."""

from __future__ import annotations

import tracemalloc
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
import torch
from scipy.ndimage import gaussian_filter, zoom
from skimage.transform import resize
from threadpoolctl import threadpool_info

from nnunet_lite.data.geometry import Shape, triple
from nnunet_lite.preprocessing.resampling import (
    coarse_axis,
    nearest,
    operator,
    operators,
    resample_image,
    resample_labels,
    resampled_rows,
)

ISOTROPIC = (1.0, 1.0, 1.0)


def smooth(shape: tuple[int, ...], seed: int = 0) -> np.ndarray:
    noise = np.random.default_rng(seed).normal(size=shape)
    image = gaussian_filter(noise, 1.0).astype(np.float32) * 300
    image[2:6, 3:9, 3:9] += 1000  # a step edge: splines overshoot, the clip matters
    return image


def by_slices(image: np.ndarray, new: tuple[int, int, int], axis: int, order: int = 3) -> np.ndarray:
    """The anisotropic mode: each slice on its own, then the nearest slice."""
    slices = np.moveaxis(image, axis, 0).astype(float)
    plane = [n for a, n in enumerate(new) if a != axis]
    done = np.stack([resize(s, plane, order, mode="edge", anti_aliasing=False) for s in slices])
    positions = (np.arange(new[axis]) + 0.5) * image.shape[axis] / new[axis] - 0.5
    index = np.clip(np.floor(positions + 0.5), 0, image.shape[axis] - 1).astype(int)
    return np.moveaxis(done[index], 0, axis)


@pytest.mark.parametrize("new", [(20, 31, 40), (40, 23, 17), (24, 64, 30), (1, 5, 90)])
@pytest.mark.parametrize("order", [1, 3])
def test_image_equals_scikit_image(new: tuple[int, int, int], order: int) -> None:
    image = smooth((24, 41, 30))
    want = resize(image.astype(float), new, order, mode="edge", anti_aliasing=False)
    got = resample_image(image[None], new, ISOTROPIC, ISOTROPIC, order)[0]
    assert got.dtype == np.float32 and got.shape == new
    assert np.abs(got - want).max() < 1e-6 * np.ptp(image)


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_anisotropic_image_goes_slice_by_slice(axis: int) -> None:
    image = smooth((14, 26, 20))
    new = tuple(9 if a == axis else n + 11 for a, n in enumerate(image.shape))
    spacing = tuple(5.0 if a == axis else 1.0 for a in range(3))
    got = resample_image(image[None], new, spacing, ISOTROPIC)[0]
    assert np.abs(got - by_slices(image, new, axis)).max() < 1e-6 * np.ptp(image)
    same = resample_image(
        image[None], tuple(n if a == axis else 47 for a, n in enumerate(image.shape)), spacing, spacing
    )[0]
    for before, after in zip(np.moveaxis(image, axis, 0), np.moveaxis(same, axis, 0), strict=True):
        assert before.min() <= after.min() and after.max() <= before.max(), "each slice is clipped to its own range"


def test_order_between_slices() -> None:
    image = smooth((10, 20, 18))
    got = resample_image(image[None], (19, 25, 22), (5.0, 1.0, 1.0), ISOTROPIC, order=3, order_z=1)[0]
    planes = by_slices(image, (10, 25, 22), 0)
    want = resize(planes, (19, 25, 22), 1, mode="edge", anti_aliasing=False)
    assert np.abs(got - want).max() < 1e-6 * np.ptp(image)


def test_separate_axis_rule() -> None:
    assert coarse_axis((5.0, 1.0, 1.0), ISOTROPIC) == 0
    assert coarse_axis(ISOTROPIC, (1.0, 1.0, 3.5)) == 2  # the new one decides where the old is isotropic
    assert coarse_axis((3.0, 1.0, 1.0), ISOTROPIC) is None  # exactly three is not more than three
    assert coarse_axis((5.0, 5.0, 1.0), (4.0, 1.0, 1.0)) is None  # two coarse axes: no slices
    assert coarse_axis((999.0, 1.0, 1.0), (999.0, 1.2, 1.2)) == 0  # a picture


def test_same_shape_is_returned_as_it_is() -> None:
    image = smooth((8, 12, 12))[None]
    labels = (image[0] > 0).astype(np.uint8)
    assert resample_image(image, (8, 12, 12), ISOTROPIC, (1.01, 1.0, 1.0)) is image
    assert resample_labels(labels, (8, 12, 12), ISOTROPIC, (1.01, 1.0, 1.0)) is labels


def decided(shares: list[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """The label of the largest share of each voxel, and where that is clear."""
    ranked = np.sort(shares, axis=0)
    return np.argmax(shares, axis=0), ranked[-1] - ranked[-2] > 1e-4


@pytest.mark.parametrize("new", [(20, 31, 47), (41, 23, 17), (24, 80, 30)])
def test_labels_take_the_largest_share(new: tuple[int, int, int]) -> None:
    rng = np.random.default_rng(1)
    labels = (gaussian_filter(rng.normal(size=(24, 41, 30)), 1.5) * 25).clip(0, 5).round().astype(np.uint8)
    shares = [resize((labels == c).astype(float), new, 1, mode="edge", anti_aliasing=False) for c in range(6)]
    largest, clear = decided(shares)
    got = resample_labels(labels, new, ISOTROPIC, ISOTROPIC)
    assert got.dtype == labels.dtype and len(np.unique(labels)) == 6
    assert (got == largest)[clear].all()


@pytest.mark.parametrize("values", [(1, 2), (2, 1), (0, 3), (3, 0)])
def test_nearest_label_wins_a_tie(values: tuple[int, int]) -> None:
    labels = np.repeat(np.array(values, np.uint8), 2)[:, None, None] * np.ones((1, 4, 4), np.uint8)
    got = resample_labels(labels, (3, 4, 4), ISOTROPIC, ISOTROPIC)  # the middle lies exactly between the two
    assert got[:, 0, 0].tolist() == [values[0], values[1], values[1]]


def test_anisotropic_labels_go_slice_by_slice() -> None:
    rng = np.random.default_rng(2)
    labels = (gaussian_filter(rng.normal(size=(12, 40, 36)), (0, 2, 2)) * 20).clip(0, 2).round().astype(np.int16)
    got = resample_labels(labels, (7, 51, 29), (5.0, 1.0, 1.0), ISOTROPIC)
    largest, clear = decided([by_slices((labels == c).astype(float), (7, 51, 29), 0, 1) for c in range(3)])
    assert (got == largest)[clear].all()


def test_a_label_between_the_slices_taken_is_lost_not_an_error() -> None:
    labels = np.zeros((12, 8, 8), np.uint8)
    labels[1] = 3
    got = resample_labels(labels, (2, 9, 9), (5.0, 1.0, 1.0), (30.0, 1.0, 1.0))
    assert got.max() == 0


def test_many_labels_and_wide_types() -> None:
    labels = np.zeros((10, 30, 30), np.int32)
    labels[2:8, 5:15, 5:15], labels[2:8, 18:28, 18:28] = 117, 40_000
    got = resample_labels(labels, (20, 60, 60), ISOTROPIC, (0.5, 0.5, 0.5))
    assert np.unique(got).tolist() == [0, 117, 40_000] and got[10, 20, 20] == 117


def resample_rows(data: Any, shape: Shape, orders: Sequence[int], size: int = 16) -> np.ndarray:
    """Resample (channels, z, y, x) piece by piece, as the way back from logits does."""
    rows_first = data.swapaxes(0, 1)
    parts, y, x = operators(rows_first, triple(data.shape[1:]), shape, orders, size)
    out = np.full((len(data), *shape), np.nan, np.float32)
    for part in parts:
        for slices, rows, piece in resampled_rows(rows_first, part, y, x):
            out[:, slices, rows] = piece
    return out


def test_slabs_of_all_channels_equal_the_whole_for_arrays_and_tensors() -> None:
    logits = np.stack([smooth((9, 20, 18), seed) for seed in range(3)])
    whole = resample_image(logits, (33, 41, 25), ISOTROPIC, ISOTROPIC, order=1)
    for data in (logits.astype(np.float64), torch.from_numpy(logits)):
        joined = resample_rows(data, (33, 41, 25), (1, 1, 1), size=4)
        assert np.abs(joined - whole).max() < 1e-5 * np.ptp(logits)
    mixed = [resample_rows(data, (17, 15, 33), (1, 3, 0)) for data in (logits, torch.from_numpy(logits))]
    assert np.abs(mixed[0] - mixed[1]).max() < 1e-5 * np.ptp(logits)


def test_number_of_threads_changes_no_bit() -> None:
    image = np.stack([smooth((40, 41, 30)), smooth((40, 41, 30), 1)])
    labels = (image[0] / 100).clip(0, 4).astype(np.uint8)
    one = resample_image(image, (61, 33, 47), ISOTROPIC, ISOTROPIC, threads=1)
    ones = resample_labels(labels, (61, 33, 47), ISOTROPIC, ISOTROPIC, threads=1)
    for threads in (2, 4, None):
        assert np.array_equal(resample_image(image, (61, 33, 47), ISOTROPIC, ISOTROPIC, threads=threads), one)
        assert np.array_equal(resample_labels(labels, (61, 33, 47), ISOTROPIC, ISOTROPIC, threads=threads), ones)


def test_operator_keeps_a_constant_and_holds_no_denormals() -> None:
    matrix = operator(300, 211, 3)
    assert np.allclose(matrix.sum(axis=1), 1, atol=1e-5)
    smallest = np.abs(matrix[matrix != 0]).min()
    assert smallest > 1e-9 and np.count_nonzero(matrix, axis=1).max() < 40
    assert np.array_equal(operator(7, 3, 0).argmax(axis=1), nearest(7, 3))


@pytest.mark.parametrize("order", [1, 2, 3, 4, 5])
@pytest.mark.parametrize(("old", "new"), [(1, 3), (5, 1), (2, 5), (20, 7), (300, 211), (130, 400)])
def test_operator_is_what_zoom_makes_of_the_identity(old: int, new: int, order: int) -> None:
    expected = zoom(np.eye(old), (new / old, 1), order=order, mode="nearest", grid_mode=True).astype(np.float32)
    expected[np.abs(expected) < 1e-8] = 0
    assert np.array_equal(operator(old, new, order), expected)


def test_operator_of_a_large_picture_takes_no_memory_besides_the_matrix() -> None:
    tracemalloc.start()
    matrix = operator(2100, 1700, 3)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 1.5 * matrix.nbytes


def test_the_threads_of_blas_are_given_back_by_callers_in_several_threads() -> None:
    """The limit is the process's: a caller that puts back what it found may put back the limit of another one."""

    def threads() -> list[int]:
        return sorted(info["num_threads"] for info in threadpool_info() if info["user_api"] == "blas")

    image = np.zeros((1, 30, 30, 30), np.float32)
    resample_image(image, (40, 40, 40), (1, 1, 1), (1, 1, 1))  # loads scipy's BLAS too
    before = threads()
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(lambda n: resample_image(image, (40 + n, 40, 40), (1, 1, 1), (1, 1, 1)), range(60)))
    assert threads() == before
