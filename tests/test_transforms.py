"""Every transform does what it says, row by row, against scipy and against what is written out by hand."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy import ndimage
from torch import Tensor

from nnunet_lite.settings import AugmentationSettings
from nnunet_lite.training.augmentation import (
    blur,
    contrast,
    draw_matrix,
    gamma,
    low_resolution,
    mirror,
    source_shape,
    vote,
    warp,
)
from nnunet_lite.training.dataloader import rng_for


def smooth(shape: tuple[int, ...], sigma: float = 2.0, seed: int = 0) -> np.ndarray:
    noise = ndimage.gaussian_filter(np.random.default_rng(seed).normal(size=shape), sigma)
    return (noise / noise.std()).astype(np.float32)


def blobs(shape: tuple[int, ...], n_classes: int, seed: int = 0) -> np.ndarray:
    return np.stack([smooth(shape, 2, seed * 100 + i) for i in range(n_classes)]).argmax(0).astype(np.uint8)


def drawn_matrix(seed: int, patch: Any) -> np.ndarray:
    settings = AugmentationSettings(p_rotation=1, p_scaling=1)
    matrix = draw_matrix(rng_for(seed, 0, 0), settings, patch)
    assert matrix is not None
    return matrix


def warp_one(image: np.ndarray, classes: np.ndarray, matrix: np.ndarray, patch: Any) -> tuple[Tensor, Tensor]:
    matrices = torch.from_numpy(matrix[None].astype(np.float32))
    images, labels = warp(torch.from_numpy(image)[None, None], torch.from_numpy(classes)[None, None], matrices, patch)
    return images[0, 0], labels[0, 0]


@pytest.mark.parametrize("patch", [(12, 16, 14), (11, 13, 15)])
@pytest.mark.parametrize("seed", range(4))
def test_rotation_and_scaling_equal_scipys_affine_transform(patch: tuple[int, int, int], seed: int) -> None:
    matrix = drawn_matrix(seed, patch)
    source = source_shape(matrix, patch)
    image, classes = smooth(source), blobs(source, 5)
    found, labels = warp_one(image, classes, matrix, patch)
    offset = (np.array(source) - 1) / 2 - matrix @ ((np.array(patch) - 1) / 2)
    arguments: dict[str, Any] = {"offset": offset, "output_shape": patch, "order": 1}
    np.testing.assert_allclose(found, ndimage.affine_transform(image, matrix, **arguments), atol=2e-4)
    each = np.stack([ndimage.affine_transform((classes == c) * 1.0, matrix, **arguments) for c in range(5)])
    clear = np.diff(np.sort(each, 0)[-2:], axis=0)[0] > 1e-4  # of a tie either may win
    assert clear.mean() > 0.99
    np.testing.assert_array_equal(labels.numpy()[clear], each.argmax(0)[clear])


def test_two_axes_are_warped_like_a_slice() -> None:
    patch = (1, 14, 18)
    matrix = drawn_matrix(0, patch)
    source = source_shape(matrix, patch)
    image, classes = smooth(source), blobs(source, 4)
    thick = warp_one(image, classes, matrix, patch)
    flat = warp_one(image[0], classes[0], matrix[1:, 1:], patch[1:])
    torch.testing.assert_close(flat[0], thick[0][0], atol=1e-5, rtol=0)
    assert torch.equal(flat[1], thick[1][0])


def test_several_maps_and_samples_are_warped_each_by_itself() -> None:
    patch = (6, 7, 8)
    matrices = [drawn_matrix(seed, patch) for seed in range(3)]
    source = tuple(np.max([source_shape(m, patch) for m in matrices], axis=0))
    image, classes = smooth((3, 2, *source)), blobs((3, 2, *source), 3)
    both = warp(
        torch.from_numpy(image), torch.from_numpy(classes), torch.tensor(np.array(matrices), dtype=torch.float32), patch
    )
    for i, matrix in enumerate(matrices):
        for j in range(2):
            one = warp_one(image[i, j], classes[i, j], matrix, patch)
            torch.testing.assert_close(both[0][i, j], one[0])
            assert torch.equal(both[1][i, j], one[1])


@pytest.mark.parametrize("shape", [(9, 10, 11), (20, 21)])
def test_looking_everywhere_finds_the_same_as_looking_between_classes(shape: tuple[int, ...]) -> None:
    classes = torch.from_numpy(blobs((2, 2, *shape), 6))
    positions = [torch.rand(2, 500) * (n - 1) for n in shape]
    everywhere = vote(classes, positions, everywhere=True)
    assert torch.equal(everywhere, vote(classes, positions, everywhere=False))
    nearest = [p.round().long() for p in positions]
    for i in range(2):
        share = (everywhere[i] == classes[(i, slice(None), *(p[i] for p in nearest))]).float().mean()
        assert 0.7 < share < 1


def test_the_identity_changes_nothing() -> None:
    for shape in [(8, 12, 10), (7, 9, 11), (1, 6, 5)]:
        image, classes = smooth(shape), blobs(shape, 3)
        found, labels = warp_one(image, classes, np.eye(3), shape)
        torch.testing.assert_close(found, torch.from_numpy(image), atol=1e-5, rtol=0)
        assert torch.equal(labels, torch.from_numpy(classes))


def test_blur_equals_scipys() -> None:
    images = np.stack([smooth((9, 12, 11), 0.5, seed) for seed in range(3)])
    sigmas = np.random.default_rng(0).uniform(0.5, 2.0, (3, 3)).astype(np.float32)
    found = blur(torch.from_numpy(images), torch.from_numpy(sigmas), float(sigmas.max()))
    for image, sigma, blurred in zip(images, sigmas, found, strict=True):
        radius = [int(3 * s) for s in sigma]  # nnU-Net's
        np.testing.assert_allclose(
            blurred, ndimage.gaussian_filter(image, sigma, mode="mirror", radius=radius), atol=1e-5
        )


def test_blur_wider_than_the_patch_and_of_flat_ones() -> None:
    image = smooth((1, 3, 11), 0.5)
    found = blur(torch.from_numpy(image[None]), torch.full((1, 3), 2.0), 2.0)
    np.testing.assert_allclose(found[0, 0], ndimage.gaussian_filter(image[0], 2.0, mode="mirror", radius=6), atol=1e-5)


def test_gamma_keeps_mean_and_spread_and_changes_the_rest() -> None:
    x = torch.from_numpy(np.stack([smooth((8, 9, 10), 1, s) + s for s in range(3)]))
    y = gamma(x, torch.tensor([[0.7], [1.0], [1.5]]))
    torch.testing.assert_close(y.mean((1, 2, 3)), x.mean((1, 2, 3)), atol=1e-5, rtol=0)
    torch.testing.assert_close(y.std((1, 2, 3)), x.std((1, 2, 3)), atol=1e-5, rtol=0)
    torch.testing.assert_close(y[1], x[1], atol=1e-5, rtol=0)
    assert (y[0] - x[0]).abs().max() > 0.05
    order = x[2].flatten().argsort()
    assert (y[2].flatten()[order].diff() >= -1e-5).all()  # brighter stays brighter


def test_gamma_and_contrast_of_a_constant_image_stay_finite() -> None:
    x, factor = torch.full((1, 4, 4, 4), 2.5), torch.full((1, 1), 1.5)
    torch.testing.assert_close(gamma(x, factor), x)
    torch.testing.assert_close(contrast(x, factor), x)


def test_contrast_scales_around_the_mean_within_the_range() -> None:
    x = torch.from_numpy(smooth((8, 9, 10), 1)[None])
    weaker, stronger = (contrast(x, torch.full((1, 1), f)) for f in (0.75, 1.25))
    torch.testing.assert_close(weaker - x.mean(), 0.75 * (x - x.mean()))
    assert stronger.min() == x.min()
    assert stronger.max() == x.max()
    assert stronger.std() > x.std()


@pytest.mark.parametrize("shape", [(16, 17, 18), (5, 40, 9), (1, 30, 31)])
def test_low_resolution_equals_interpolating_down_and_up(shape: tuple[int, int, int]) -> None:
    x, factors = (
        torch.from_numpy(smooth((6, *shape), 0.6)),
        torch.tensor([[0.5], [0.613], [0.77], [0.9], [1.0], [0.02]]),
    )
    found = low_resolution(x, factors, (0, 1, 2))
    for row, factor, y in zip(x, factors[:, 0].tolist(), found, strict=True):
        small = [max(1, round(n * factor)) for n in shape]
        down = F.interpolate(row[None, None], size=small, mode="nearest-exact")
        torch.testing.assert_close(y, F.interpolate(down, size=shape, mode="trilinear")[0, 0], atol=1e-5, rtol=0)


def test_low_resolution_leaves_other_axes_alone() -> None:
    x = torch.arange(4.0)[None, :, None, None].expand(1, 4, 16, 16).contiguous()
    torch.testing.assert_close(low_resolution(x, torch.tensor([[0.5]]), (1, 2)), x)


def test_mirroring_flips_the_samples_drawn() -> None:
    images = torch.rand(3, 2, 4, 5, 6)
    moved = images.clone()
    mirror(moved, [torch.tensor([0]), torch.tensor([], dtype=torch.long), torch.tensor([0, 2])])
    assert torch.equal(moved[0], images[0].flip(1, 3))
    assert torch.equal(moved[1], images[1])
    assert torch.equal(moved[2], images[2].flip(3))
