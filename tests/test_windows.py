"""Windows cover an image evenly, and what they are put together to is what the network says of each voxel."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from scipy.ndimage import gaussian_filter
from torch import Tensor

from nnunet_lite.inference.tiles import mirrorings, window_starts, windows
from nnunet_lite.inference.windows import gaussian, pad_to_patch, predict_logits


@pytest.mark.parametrize("step", [0.25, 0.5, 0.75, 1.0])
def test_windows_cover_every_voxel_with_at_most_the_step(step: float) -> None:
    for patch in (1, 8, 13, 40):
        for size in range(1, 130):
            starts = window_starts(size, patch, step)
            assert starts[0] == 0
            assert starts[-1] == max(0, size - patch)
            gaps = np.diff(starts)
            assert (gaps > 0).all()
            assert (gaps <= math.ceil(patch * step)).all()
            wanted = math.ceil((size - patch) / (patch * step)) + 1
            assert len(starts) == max(1, min(wanted, size - patch + 1))


def test_windows_come_in_order_along_the_first_axis() -> None:
    places = windows((20, 10, 9), (8, 6, 9), 0.5)
    assert [place[0].start for place in places] == sorted(place[0].start for place in places)
    seen = np.zeros((20, 10, 9), int)
    for place in places:
        seen[place] += 1
    assert seen.min() >= 1


@pytest.mark.parametrize("patch", [(16, 24, 40), (28, 28, 20), (7, 9, 16), (64, 48)])
def test_the_weight_is_a_gaussian_of_an_eighth_of_the_patch(patch: tuple[int, ...]) -> None:
    delta = np.zeros(patch)
    delta[tuple(n // 2 for n in patch)] = 1
    expected = gaussian_filter(delta, [n / 8 for n in patch], mode="constant", truncate=20)
    found = gaussian(patch)
    assert found.dtype == torch.float32
    assert found.max() == 1
    np.testing.assert_allclose(found, expected / expected.max(), rtol=1e-4, atol=1e-9)


@pytest.mark.parametrize("patch", [(1, 64, 64), (320, 320), (192, 192, 192)])
def test_the_weight_is_never_zero(patch: tuple[int, ...]) -> None:
    assert gaussian(patch).min() > 0


def test_mirrorings_are_all_combinations() -> None:
    assert mirrorings(()) == [()]
    assert mirrorings((0, 2)) == [(), (0,), (2,), (0, 2)]
    assert len(mirrorings((0, 1, 2))) == 8


def test_padding_puts_the_image_in_the_middle() -> None:
    image = torch.rand(2, 5, 20, 8)
    padded, inside = pad_to_patch(image, (8, 8, 8))
    assert padded.shape == (2, 8, 20, 8)
    assert inside[0] == slice(1, 6)
    assert torch.equal(padded[(slice(None), *inside)], image)
    assert padded.sum() == pytest.approx(float(image.sum()), rel=1e-5)


SHAPES = [(20, 21, 22), (5, 30, 9), (3, 4, 5), (8, 8, 8), (9, 8, 17)]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("options", [{}, {"mirror_axes": (0, 1, 2)}, {"step": 1.0}, {"step": 0.3, "batch_size": 5}])
def test_the_identity_returns_the_image(shape: tuple[int, int, int], options: dict[str, Any]) -> None:
    image = torch.randn(3, *shape)
    found = predict_logits(lambda x: x, image, (8, 8, 8), 3, **options)
    assert found.shape == image.shape
    torch.testing.assert_close(found, image, atol=1e-5, rtol=1e-5)


def of_position(weight: float) -> Callable[[Tensor], Tensor]:
    """A network that depends on where in its window a voxel is, hence on every weight and flip."""

    def forward(x: Tensor) -> Tensor:
        ramp = torch.arange(x.shape[2], dtype=torch.float32).reshape(-1, 1, 1) * weight
        return torch.cat([x.cumsum(2), x * ramp], 1)

    return forward


@pytest.mark.parametrize("batch_size", [2, 3, 7, 1000])
def test_the_batch_size_changes_nothing(batch_size: int) -> None:
    image = torch.randn(1, 20, 10, 9)
    one, many = (
        predict_logits(of_position(0.1), image, (8, 8, 8), 2, mirror_axes=(0, 2), batch_size=n) for n in (1, batch_size)
    )
    torch.testing.assert_close(one, many)


def test_an_equivariant_network_does_not_change_when_mirrored() -> None:
    torch.manual_seed(0)
    convolution = torch.nn.Conv3d(1, 2, 3, padding=1)
    with torch.no_grad():
        weight = convolution.weight
        for axis in (2, 3, 4):
            weight.copy_((weight + weight.flip(axis)) / 2)
        image = torch.randn(1, 12, 18, 9)
        plain, mirrored = (
            predict_logits(convolution, image, (8, 8, 8), 2, mirror_axes=axes) for axes in ((), (0, 1, 2))
        )
    torch.testing.assert_close(plain, mirrored)


def test_mirroring_averages_flipped_predictions() -> None:
    image = torch.randn(1, 8, 8, 8)
    forward = of_position(1.0)
    expected = (forward(image[None])[0] + forward(image[None].flip(2))[0].flip(1)) / 2
    torch.testing.assert_close(predict_logits(forward, image, (8, 8, 8), 2, mirror_axes=(0,)), expected)


def test_overlapping_windows_are_averaged_with_the_weight() -> None:
    image, patch = torch.randn(1, 12, 8, 8), (8, 8, 8)
    forward, weight = of_position(1.0), gaussian(patch)
    total, weights = torch.zeros(2, 12, 8, 8), torch.zeros(12, 8, 8)
    for start in (0, 4):
        total[:, start : start + 8] += weight * forward(image[None, :, start : start + 8])[0]
        weights[start : start + 8] += weight
    torch.testing.assert_close(predict_logits(forward, image, patch, 2), total / weights)


def test_windows_one_slice_thick_are_predicted_slice_by_slice() -> None:
    image = torch.randn(1, 5, 20, 9)
    convolution = torch.nn.Conv2d(1, 3, 3, padding=1)
    with torch.no_grad():
        found = predict_logits(
            lambda x: convolution(x[:, :, 0])[:, :, None], image, (1, 8, 16), 3, mirror_axes=(1, 2), batch_size=4
        )
        assert found.shape == (3, 5, 20, 9)
        for z in range(5):
            torch.testing.assert_close(
                found[:, z], predict_logits(convolution, image[:, z], (8, 16), 3, mirror_axes=(0, 1))
            )
