"""Every transform does what it says, image and label stay together, and the drawn shares are those of the settings."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from scipy import ndimage
from torch import Tensor

from nnunet_lite.settings import AugmentationSettings
from nnunet_lite.training.augment import (
    Intensity,
    apply_intensity,
    blur,
    collate,
    contrast,
    draw_intensity,
    draw_matrix,
    gamma,
    is_in_plane,
    low_resolution,
    mirror,
)
from nnunet_lite.training.run import LoadedCase
from nnunet_lite.training.sampler import Sample, draw_batch, read_sample, rng_for

CPU = torch.device("cpu")


def smooth(shape: tuple[int, ...], sigma: float = 2.0, seed: int = 0) -> np.ndarray:
    noise = ndimage.gaussian_filter(np.random.default_rng(seed).normal(size=shape), sigma)
    return (noise / noise.std()).astype(np.float32)


def collated(image: np.ndarray, label: np.ndarray, corner: Any, patch: Any, matrix: Any) -> tuple[Tensor, Tensor]:
    case = LoadedCase("case", image[None], label, {}, None)
    images, labels = collate([read_sample(case, corner, patch, matrix)], patch, CPU)
    return images[0, 0], labels[0]


def rotation(axis: int, degrees: float) -> np.ndarray:
    i, j = [a for a in range(3) if a != axis]
    turn, angle = np.eye(3), np.deg2rad(degrees)
    turn[i, i] = turn[j, j] = np.cos(angle)
    turn[i, j], turn[j, i] = -np.sin(angle), np.sin(angle)
    return turn


def no_change(batch: int, channels: int, **changes: Any) -> Intensity:
    nan = np.full((batch, channels), np.nan)
    none = dict.fromkeys(("noise", "brightness", "contrast", "low_resolution", "gamma_inverted", "gamma"), nan)
    mirrored = np.zeros((batch, 3), bool)
    return Intensity(**{**none, "blur": nan[..., None].repeat(3, -1), "mirror": mirrored, "noise_seed": 1, **changes})


@pytest.mark.parametrize("patch", [(8, 12, 10), (7, 9, 11), (1, 12, 13)])
def test_the_identity_leaves_a_patch_as_it_was(patch: tuple[int, int, int]) -> None:
    image, label = smooth((20, 20, 20)), np.random.default_rng(0).integers(0, 3, (20, 20, 20)).astype(np.uint8)
    for corner in [(4, 5, 6), (-2, 10, 0)]:
        plain_image, plain_label = collated(image, label, corner, patch, None)
        same_image, same_label = collated(image, label, corner, patch, np.eye(3))
        torch.testing.assert_close(same_image, plain_image, atol=1e-5, rtol=0)
        assert torch.equal(same_label, plain_label)
        assert same_label.dtype == torch.uint8


@pytest.mark.parametrize("patch", [(12, 16, 14), (11, 13, 15)])
@pytest.mark.parametrize("seed", range(4))
def test_rotation_and_scaling_equal_scipys_affine_transform(patch: tuple[int, int, int], seed: int) -> None:
    image, corner = smooth((40, 40, 40)), (14, 12, 13)
    settings = AugmentationSettings(p_rotation=1, p_scaling=1, scaling=(0.7, 1.2))
    matrix = draw_matrix(rng_for(seed, 0, 0), settings, patch, False)
    assert matrix is not None
    found, _ = collated(image, np.zeros(image.shape, np.uint8), corner, patch, matrix)
    half = (np.array(patch) - 1) / 2
    offset = np.array(corner) + half - matrix @ half
    expected = ndimage.affine_transform(image, matrix, offset, output_shape=patch, order=1)
    np.testing.assert_allclose(found, expected, atol=2e-4)


@pytest.mark.parametrize("in_plane", [False, True])
def test_image_and_label_stay_aligned(in_plane: bool) -> None:
    label = (smooth((40, 40, 40), 3) > 0.3).astype(np.uint8)
    settings = AugmentationSettings(p_rotation=1, p_scaling=1)
    for i in range(8):
        rng, patch = rng_for(0, 0, i), (16, 18, 20)
        matrix = draw_matrix(rng, settings, patch, in_plane)
        image, moved = collated(label.astype(np.float32), label, (10, 11, 12), patch, matrix)
        images, labels = mirror(image[None, None], moved[None], rng.random((1, 3)) < 0.5)
        hits, truth = images[0, 0] > 0.5, labels[0] == 1
        dice = 2 * float((hits & truth).sum()) / float(hits.sum() + truth.sum())
        assert dice > 0.97


def test_in_plane_transforms_leave_the_first_axis_alone() -> None:
    image = np.arange(12, dtype=np.float32)[:, None, None].repeat(40, 1).repeat(40, 2)
    settings, patch = AugmentationSettings(p_rotation=1, p_scaling=1, scaling=(0.7, 0.9)), (4, 16, 16)
    for i in range(5):
        matrix = draw_matrix(rng_for(1, 0, i), settings, patch, True)
        assert matrix is not None
        np.testing.assert_array_equal(matrix[0], [1, 0, 0])
        np.testing.assert_array_equal(matrix[:, 0], [1, 0, 0])
        found, labels = collated(image, image.astype(np.uint8), (3, 12, 12), patch, matrix)
        expected = torch.arange(3.0, 7.0)[:, None, None].expand(patch)
        torch.testing.assert_close(found, expected, atol=1e-4, rtol=0)
        assert torch.equal(labels, expected.to(torch.uint8))


def test_anisotropic_and_flat_patches_are_transformed_in_plane() -> None:
    assert is_in_plane((1, 56, 40))
    assert is_in_plane((16, 64, 32))
    assert not is_in_plane((16, 48, 32))
    assert not is_in_plane((40, 56, 40))


def test_drawn_angles_and_factors_are_in_their_ranges() -> None:
    rotate, scale = AugmentationSettings(p_rotation=1, p_scaling=0), AugmentationSettings(p_rotation=0, p_scaling=1)

    def angles(patch: tuple[int, int, int]) -> np.ndarray:
        drawn = [draw_matrix(rng_for(0, 0, i), rotate, patch, True) for i in range(300)]
        return np.array([np.degrees(np.arctan2(m[2, 1], m[1, 1])) for m in drawn if m is not None])

    assert 150 < np.abs(angles((4, 64, 64))).max() <= 180
    assert 12 < np.abs(angles((1, 64, 32))).max() <= 15
    for i in range(50):
        matrix = draw_matrix(rng_for(0, 0, i), rotate, (32, 32, 32), False)
        assert matrix is not None
        np.testing.assert_allclose(matrix @ matrix.T, np.eye(3), atol=1e-12)
    factors = np.array([draw_matrix(rng_for(0, 1, i), scale, (8, 8, 8), False)[0, 0] for i in range(600)])  # type: ignore[index]
    assert factors.min() >= 0.7
    assert factors.max() <= 1.4
    assert 0.42 < (factors < 1).mean() < 0.58  # shrinks and grows alike, though 0.7-1.4 is not symmetric


def test_shares_that_are_drawn_are_those_of_the_settings() -> None:
    settings, n = AugmentationSettings(), 6000
    draw = draw_intensity(np.random.default_rng(0), settings, n, 2, (0, 2))
    per_channel = {
        "noise": settings.p_noise,
        "blur": settings.p_blur / 2,
        "brightness": settings.p_brightness,
        "contrast": settings.p_contrast,
        "low_resolution": settings.p_low_resolution / 2,
        "gamma_inverted": settings.p_gamma_inverted,
        "gamma": settings.p_gamma,
    }
    limits = {
        "noise": settings.noise_std,
        "blur": settings.blur_sigma,
        "brightness": settings.brightness,
        "contrast": settings.contrast,
        "low_resolution": settings.low_resolution,
        "gamma_inverted": settings.gamma,
        "gamma": settings.gamma,
    }
    for name, p in per_channel.items():
        values = getattr(draw, name)
        assert np.mean(~np.isnan(values)) == pytest.approx(p, abs=0.02), name
        low, high = limits[name]
        assert np.nanmin(values) >= low, name
        assert np.nanmax(values) <= high, name
        assert np.nanmax(values) - np.nanmin(values) > 0.9 * (high - low), name
    shares = draw.mirror.mean(0)
    assert shares[[0, 2]] == pytest.approx(0.5, abs=0.02)
    assert shares[1] == 0
    matrices = [draw_matrix(rng_for(3, 0, i), settings, (8, 8, 8), False) for i in range(2000)]
    assert np.mean([m is not None for m in matrices]) == pytest.approx(1 - 0.8 * 0.8, abs=0.04)


def test_blur_equals_scipys() -> None:
    images = np.stack([smooth((9, 12, 11), 0.5, seed) for seed in range(3)])
    sigmas = np.random.default_rng(0).uniform(0.5, 1.0, (3, 3))
    found = blur(torch.from_numpy(images), torch.from_numpy(sigmas.astype(np.float32)).reshape(3, 3, 1, 1, 1))
    for image, sigma, blurred in zip(images, sigmas, found, strict=True):
        expected = ndimage.gaussian_filter(image, sigma, mode="nearest", radius=3)
        np.testing.assert_allclose(blurred, expected, atol=1e-5)


def test_blur_of_a_flat_patch_is_in_plane() -> None:
    image = smooth((1, 12, 11), 0.5)
    found = blur(torch.from_numpy(image[None]), torch.full((1, 3, 1, 1, 1), 0.8))
    np.testing.assert_allclose(found[0, 0], ndimage.gaussian_filter(image[0], 0.8, mode="nearest", radius=3), atol=1e-5)


def test_gamma_keeps_mean_and_spread_and_changes_the_rest() -> None:
    x = torch.from_numpy(np.stack([smooth((8, 9, 10), 1, s) + s for s in range(3)]))
    y = gamma(x, torch.tensor([0.7, 1.0, 1.5]).reshape(3, 1, 1, 1))
    torch.testing.assert_close(y.mean((1, 2, 3)), x.mean((1, 2, 3)), atol=1e-5, rtol=0)
    torch.testing.assert_close(y.std((1, 2, 3)), x.std((1, 2, 3)), atol=1e-5, rtol=0)
    torch.testing.assert_close(y[1], x[1], atol=1e-5, rtol=0)
    assert (y[0] - x[0]).abs().max() > 0.05
    order = x[2].flatten().argsort()
    assert (y[2].flatten()[order].diff() >= -1e-5).all()  # brighter stays brighter


def test_gamma_and_contrast_of_a_constant_image_stay_finite() -> None:
    x = torch.full((1, 4, 4, 4), 2.5)
    factor = torch.full((1, 1, 1, 1), 1.5)
    torch.testing.assert_close(gamma(x, factor), x)
    torch.testing.assert_close(contrast(x, factor), x)


def test_contrast_scales_around_the_mean_within_the_range() -> None:
    x = torch.from_numpy(smooth((8, 9, 10), 1)[None])
    weaker, stronger = (contrast(x, torch.full((1, 1, 1, 1), f)) for f in (0.75, 1.25))
    torch.testing.assert_close(weaker - x.mean(), 0.75 * (x - x.mean()))
    assert stronger.min() == x.min()
    assert stronger.max() == x.max()
    assert stronger.std() > x.std()


def test_low_resolution_keeps_shape_and_loses_detail() -> None:
    x = torch.from_numpy(np.stack([smooth((16, 17, 18), 0.6, 0), smooth((16, 17, 18), 0.6, 1)]))
    y = low_resolution(x, torch.tensor([0.5, 1.0]))
    assert y.shape == x.shape
    torch.testing.assert_close(y[1], x[1])
    rough = lambda a: a.diff(dim=-1).square().mean()  # noqa: E731
    assert rough(y[0]) < 0.5 * rough(x[0])


def test_low_resolution_of_an_anisotropic_patch_leaves_the_first_axis_alone() -> None:
    x = torch.arange(4.0)[None, :, None, None].expand(1, 4, 16, 16).contiguous()
    torch.testing.assert_close(low_resolution(x, torch.tensor([0.5])), x)


def test_mirroring_flips_image_and_label_of_the_samples_drawn() -> None:
    images, labels = torch.rand(3, 2, 4, 5, 6), torch.randint(0, 3, (3, 4, 5, 6))
    flips = np.array([[True, False, True], [False, False, False], [False, True, False]])
    moved, classes = mirror(images, labels, flips)
    assert torch.equal(moved[0], images[0].flip(1, 3))
    assert torch.equal(classes[0], labels[0].flip(0, 2))
    assert torch.equal(moved[1], images[1])
    assert torch.equal(moved[2], images[2].flip(2))
    assert torch.equal(classes[2], labels[2].flip(1))


def test_each_transform_touches_only_the_rows_it_was_drawn_for() -> None:
    images, labels = torch.rand(2, 2, 6, 7, 8) + 1, torch.zeros(2, 6, 7, 8, dtype=torch.uint8)
    same, _ = apply_intensity(images, labels, no_change(2, 2))
    assert torch.equal(same, images)
    for name, value in [
        ("brightness", 1.2),
        ("contrast", 0.8),
        ("gamma", 1.4),
        ("low_resolution", 0.5),
    ]:
        drawn = np.full((2, 2), np.nan)
        drawn[1, 0] = value
        moved, _ = apply_intensity(images, labels, no_change(2, 2, **{name: drawn}))
        changed = (moved != images).flatten(2).any(2)
        assert changed.tolist() == [[False, False], [True, False]], name
    torch.testing.assert_close(
        apply_intensity(images, labels, no_change(2, 2, brightness=np.full((2, 2), 1.2)))[0], 1.2 * images
    )


def test_noise_has_its_spread_and_depends_on_its_seed() -> None:
    images, labels = torch.zeros(1, 1, 20, 20, 20), torch.zeros(1, 20, 20, 20)
    noisy = [
        apply_intensity(images, labels, no_change(1, 1, noise=np.full((1, 1), 0.1), noise_seed=seed))[0]
        for seed in (1, 1, 2)
    ]
    assert float(noisy[0].std()) == pytest.approx(0.1, rel=0.05)
    assert torch.equal(noisy[0], noisy[1])
    assert not torch.equal(noisy[0], noisy[2])


def test_augmented_patches_of_real_images_stay_sane(tiny_cases: list[Any]) -> None:
    everything = {name: 1.0 for name in AugmentationSettings.model_fields if name.startswith("p_")}
    for i, settings in enumerate([AugmentationSettings(), AugmentationSettings(**everything)]):
        means, spreads = [], []
        for iteration in range(6):
            rng = rng_for(5, i, iteration)
            samples = draw_batch(tiny_cases, (24, 32, 24), 3, 0.33, settings, False, rng)
            images, labels = collate(samples, (24, 32, 24), CPU)
            before = images.clone()
            moved, classes = apply_intensity(images, labels, draw_intensity(rng, settings, 3, 1, (0, 1, 2)))
            assert torch.equal(images, before)  # the input is left as it was
            assert (moved.shape, moved.dtype, classes.dtype) == ((3, 1, 24, 32, 24), torch.float32, torch.uint8)
            assert torch.isfinite(moved).all()
            assert set(classes.unique().tolist()) <= {0, 1, 2}
            means.append(float(moved.mean()))
            spreads.append(float(moved.std()))
        assert abs(np.mean(means)) < 1
        assert 0.3 < np.mean(spreads) < 2


def test_collate_puts_classes_and_images_where_the_device_is() -> None:
    sample = Sample("case", np.ones((1, 4, 4, 4), np.float16), np.ones((4, 4, 4), np.uint16), None)
    images, labels = collate([sample, sample], (4, 4, 4), CPU)
    assert (images.dtype, images.device.type, images.shape) == (torch.float32, "cpu", (2, 1, 4, 4, 4))
    assert labels.shape == (2, 4, 4, 4)


def test_noise_is_one_field_for_all_channels_of_a_sample() -> None:
    images, labels = torch.rand(2, 2, 6, 7, 8) + 1, torch.zeros(2, 6, 7, 8, dtype=torch.uint8)
    moved, _ = apply_intensity(images, labels, no_change(2, 2, noise=np.array([[np.nan], [0.1]])))
    assert torch.equal(moved[0], images[0])
    field = moved[1] - images[1]
    torch.testing.assert_close(field[0], field[1])
    assert float(field.std()) == pytest.approx(0.1, rel=0.2)


def test_outside_the_mask_a_masked_channel_stays_zero() -> None:
    images, labels = torch.rand(1, 2, 6, 7, 8) + 1, torch.zeros(1, 6, 7, 8, dtype=torch.uint8)
    images[:, :, :3] = 0
    flip = np.array([[True, False, False]])
    noise = {"noise": np.array([[0.5]]), "mirror": flip}
    moved, _ = apply_intensity(images, labels, no_change(1, 2, **noise), masked=[1])
    assert float(moved[:, 1, 3:].abs().max()) == 0, "mirrored with the image"
    assert float(moved[:, 0, 3:].abs().max()) > 0 and float(moved[:, 1, :3].min()) != 0
