"""Transforms equal scipy's or formulas; draws have the shares and ranges of the settings and change only their rows."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy import ndimage
from torch import Tensor

from nnunet_lite.planning.swaps import ClassSwap
from nnunet_lite.preprocessing.stored_case import CaseArrays
from nnunet_lite.settings import AugmentationSettings
from nnunet_lite.training.augmentation import (
    Intensity,
    apply_intensity,
    apply_mirror,
    blur,
    contrast,
    copy_parameters,
    draw_intensity,
    draw_matrix,
    draw_mirror,
    gamma,
    is_in_plane,
    low_resolution,
    select_samples,
    source_shape,
    vote,
    warp,
    warp_samples,
)
from nnunet_lite.training.dataloader import Location, read_patches, rng_for

CPU = torch.device("cpu")


def smooth(shape: tuple[int, ...], sigma: float = 2.0, seed: int = 0) -> np.ndarray:
    noise = ndimage.gaussian_filter(np.random.default_rng(seed).normal(size=shape), sigma)
    return (noise / noise.std()).astype(np.float32)


def turned(image: np.ndarray, label: np.ndarray, corner: Any, patch: Any, matrix: Any) -> tuple[Tensor, Tensor]:
    case = CaseArrays("case", image[None], label, {}, None)
    images, classes = read_patches([case], [Location(0, corner, matrix)], patch, CPU)
    images, classes = warp_samples(images, classes, *copy_parameters([matrix[None]], CPU), patch)
    return images[0, 0], classes[0, 0]


def no_change(batch: int, channels: int, **changes: Any) -> Intensity:
    nan = np.full((batch, channels), np.nan)
    none = dict.fromkeys(("noise", "brightness", "contrast", "low_resolution", "gamma_inverted", "gamma"), nan)
    same = {"blur": nan[..., None].repeat(3, -1), "seed": np.arange(batch)}
    return Intensity(**{**none, **same, **changes})


def applied(images: Tensor, draw: Intensity) -> Tensor:
    return apply_intensity(images.clone(), draw)


@pytest.mark.parametrize("in_plane", [False, True])
def test_image_and_label_stay_aligned(in_plane: bool) -> None:
    label = (smooth((40, 40, 40), 3) > 0.3).astype(np.uint8)
    settings, patch = AugmentationSettings(p_rotation=1, p_scaling=1), (5, 18, 20) if in_plane else (16, 18, 20)
    for i in range(8):
        rng = rng_for(0, 0, i)
        matrix = draw_matrix(rng, settings, patch)
        image, moved = turned(label.astype(np.float32), label, (10, 11, 12), patch, matrix)
        images, labels = image[None, None], moved[None, None]
        apply_mirror(images, labels, rng.random((1, 3)) < 0.5)
        assert torch.equal(images[0, 0] > 0.5, labels[0, 0] == 1)


def test_anisotropic_and_flat_patches_are_transformed_in_plane() -> None:
    assert is_in_plane((1, 56, 40))
    assert is_in_plane((16, 64, 32))
    assert not is_in_plane((16, 48, 32))
    assert not is_in_plane((40, 56, 40))


def test_drawn_angles_and_factors_are_in_their_ranges() -> None:
    rotate, scale = AugmentationSettings(p_rotation=1, p_scaling=0), AugmentationSettings(p_rotation=0, p_scaling=1)

    def angles(patch: tuple[int, int, int], settings: AugmentationSettings = rotate) -> np.ndarray:
        drawn = [draw_matrix(rng_for(0, 0, i), settings, patch) for i in range(300)]
        return np.array([np.degrees(np.arctan2(m[2, 1], m[1, 1])) for m in drawn if m is not None])

    assert 150 < np.abs(angles((4, 64, 64))).max() <= 180
    assert 12 < np.abs(angles((1, 64, 32))).max() <= 15
    little = AugmentationSettings(p_rotation=1, p_scaling=0, rotation_in_plane=5)
    assert all(4 < np.abs(angles(patch, little)).max() <= 5 for patch in ((4, 64, 64), (1, 64, 64), (1, 64, 32)))
    for i in range(50):
        matrix = draw_matrix(rng_for(0, 0, i), rotate, (32, 32, 32))
        assert matrix is not None
        np.testing.assert_allclose(matrix @ matrix.T, np.eye(3), atol=1e-12)
    factors = np.array([draw_matrix(rng_for(0, 1, i), scale, (8, 8, 8))[0, 0] for i in range(600)])  # type: ignore[index]
    assert factors.min() >= 0.7
    assert factors.max() <= 1.4
    assert (factors < 1).mean() == pytest.approx(3 / 7, abs=0.06)  # uniform, as nnU-Net 2.8.1 draws them


def test_shares_that_are_drawn_are_those_of_the_settings() -> None:
    settings, n = AugmentationSettings(), 6000
    draw = draw_intensity(np.random.default_rng(0), settings, n, 2)
    table = {
        "noise": (settings.p_noise, settings.noise_std),
        "blur": (settings.p_blur / 2, settings.blur_sigma),
        "brightness": (settings.p_brightness, settings.brightness),
        "contrast": (settings.p_contrast, settings.contrast),
        "low_resolution": (settings.p_low_resolution / 2, settings.low_resolution),
        "gamma_inverted": (settings.p_gamma_inverted, settings.gamma),
        "gamma": (settings.p_gamma, settings.gamma),
    }
    for name, (p_channel, (low, high)) in table.items():
        values = getattr(draw, name)
        assert np.mean(~np.isnan(values)) == pytest.approx(p_channel, abs=0.02), name
        assert np.nanmin(values) >= low, name
        assert np.nanmax(values) <= high, name
        assert np.nanmax(values) - np.nanmin(values) > 0.9 * (high - low), name
    for name in ("brightness", "contrast", "gamma", "gamma_inverted"):  # below and above one equally often
        assert np.mean(getattr(draw, name)[~np.isnan(getattr(draw, name))] < 1) == pytest.approx(0.5, abs=0.03), name
    shares = draw_mirror(np.random.default_rng(0), settings, n, (0, 2)).mean(0)
    assert shares[[0, 2]] == pytest.approx(0.5, abs=0.02)
    assert shares[1] == 0
    matrices = [draw_matrix(rng_for(3, 0, i), settings, (8, 8, 8)) for i in range(2000)]
    assert np.mean([m is not None for m in matrices]) == pytest.approx(1 - 0.8 * 0.8, abs=0.04)


@pytest.mark.parametrize("limits", [(0.5, 0.8), (1.2, 1.5), (1.0, 1.0), (0.5, 1.5)])
def test_factors_are_drawn_from_ranges_on_either_side_of_one(limits: tuple[float, float]) -> None:
    settings = AugmentationSettings(p_gamma=1, gamma=limits)
    found = draw_intensity(np.random.default_rng(0), settings, 500, 1).gamma
    assert limits[0] <= found.min() <= found.max() <= limits[1]
    assert found.max() - found.min() > 0.9 * (limits[1] - limits[0]) - 1e-9


def test_each_transform_touches_only_the_rows_it_was_drawn_for() -> None:
    images = torch.rand(2, 2, 6, 7, 8) + 1
    assert torch.equal(applied(images, no_change(2, 2)), images)
    values = dict(brightness=1.2, contrast=0.8, gamma=1.4, gamma_inverted=1.4, low_resolution=0.5, blur=1.0)  # noqa: C408
    for name, value in values.items():
        drawn = np.full((2, 2), np.nan)
        drawn[1, 0] = value
        drawn = drawn[..., None].repeat(3, -1) if name == "blur" else drawn
        changed = (applied(images, no_change(2, 2, **{name: drawn})) != images).flatten(2).any(2)
        assert changed.tolist() == [[False, False], [True, False]], name
    brighter = no_change(2, 2, brightness=np.full((2, 2), 1.2))
    torch.testing.assert_close(applied(images, brighter), 1.2 * images)


def test_noise_has_its_spread_and_depends_on_the_sample_alone() -> None:
    images = torch.zeros(3, 2, 20, 20, 20)
    draw = no_change(3, 2, noise=np.array([[0.1] * 2, [np.nan] * 2, [0.1] * 2]), seed=np.array([7, 8, 9]))
    noisy = applied(images, draw)
    assert float(noisy[0].std()) == pytest.approx(0.1, rel=0.05)
    assert not noisy[1].any()
    assert torch.equal(applied(images[2:], select_samples(draw, slice(2, 3)))[0], noisy[2])
    fields = np.corrcoef(noisy[[0, 2]].flatten(0, 1).flatten(1))  # of two channels in two samples
    assert np.abs(fields - np.eye(4)).max() < 0.05, "every channel and sample has a field of its own"


def test_labels_are_swapped_where_left_and_right_are() -> None:
    classes = torch.randint(0, 5, (4, 2, 3, 4, 5), dtype=torch.uint8)
    flips = np.array([[False, False, True], [True, True, False], [False, False, False], [True, False, True]])
    table = (0, 2, 1, 3, 4)
    found = classes.clone()
    images = torch.stack([classes[:, 0] == c for c in (3, 1, 2, 3)], 1).float()  # one channel, and three of teachers
    apply_mirror(images, found, flips, ClassSwap(2, table, table[:4]), n_taught=3)
    other = torch.tensor(table, dtype=torch.uint8)[classes.long()]
    assert found.dtype == torch.uint8
    assert torch.equal(found[0], other[0].flip(3))
    assert torch.equal(found[1], classes[1].flip(1, 2))
    assert torch.equal(found[2], classes[2])
    assert torch.equal(found[3], other[3].flip(1, 3))
    for channel, value in enumerate((3, 1, 2, 3)):
        assert torch.equal(images[:, channel], (found[:, 0] == value).float()), "probabilities follow the labels"


def blobs(shape: tuple[int, ...], n_classes: int, seed: int = 0) -> np.ndarray:
    return np.stack([smooth(shape, 2, seed * 100 + i) for i in range(n_classes)]).argmax(0).astype(np.uint8)


def drawn_matrix(seed: int, patch: Any) -> np.ndarray:
    settings = AugmentationSettings(p_rotation=1, p_scaling=1)
    matrix = draw_matrix(rng_for(seed, 0, 0), settings, patch)
    assert matrix is not None
    return matrix


def warp_one(image: np.ndarray, classes: np.ndarray, matrix: np.ndarray, patch: Any) -> tuple[Tensor, Tensor]:
    matrices = torch.from_numpy(matrix[None].astype(np.float32))
    inputs = (torch.from_numpy(array)[None, None] for array in (image, classes))
    images, labels = warp_samples(*inputs, matrices, patch)
    return images[0, 0], labels[0, 0]


@pytest.mark.parametrize("patch", [(12, 16, 14), (11, 13, 15), (4, 16, 14)])  # the last one in plane
@pytest.mark.parametrize("seed", range(3))
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
    x, factors = torch.from_numpy(smooth((6, *shape), 0.6)), torch.tensor([[0.5, 0.613, 0.77, 0.9, 1.0, 0.02]]).T
    found = low_resolution(x, factors, (0, 1, 2))
    for row, factor, y in zip(x, factors[:, 0].tolist(), found, strict=True):
        small = [max(1, round(n * factor)) for n in shape]
        down = F.interpolate(row[None, None], size=small, mode="nearest-exact")
        torch.testing.assert_close(y, F.interpolate(down, size=shape, mode="trilinear")[0, 0], atol=1e-5, rtol=0)
