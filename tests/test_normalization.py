"""Each scheme on numbers worked out by hand or by numpy in double precision."""

from __future__ import annotations

from collections.abc import Callable
from typing import get_args

import numpy as np
import pytest

from nnunet_lite.errors import UserError
from nnunet_lite.planning.schema import Channel, Scheme, Statistics
from nnunet_lite.preprocessing.normalization import SCHEMES, moments, normalize

STATISTICS = Statistics(mean=40, median=45, std=20, min=-900, max=900, percentile_00_5=-10, percentile_99_5=120)


def channel(scheme: str, use_mask: bool = False) -> Channel:
    return Channel.model_validate(
        {"name": "c", "normalization": scheme, "use_mask": use_mask, "statistics": STATISTICS.model_dump()}
    )


def image(low: float = -200, high: float = 400) -> np.ndarray:
    return np.linspace(low, high, 4 * 5 * 6, dtype=np.float32).reshape(1, 4, 5, 6)


@pytest.mark.parametrize(
    ("scheme", "low", "high", "rule"),
    [
        ("ct", -200, 400, lambda x: (x.clip(-10, 120) - 40) / 20),
        ("zscore", -200, 400, lambda x: (x - x.mean()) / x.std()),
        ("none", -200, 400, lambda x: x),
        ("rescale_0_1", -200, 400, lambda x: (x + 200) / 600),
        ("rgb_0_1", 0, 255, lambda x: x / 255),
    ],
)
def test_each_scheme(scheme: str, low: float, high: float, rule: Callable[[np.ndarray], np.ndarray]) -> None:
    got = image(low, high)
    normalize(got, (channel(scheme),), None)
    assert np.allclose(got, rule(image(low, high).astype(float)), atol=1e-6)
    assert set(SCHEMES) == set(get_args(Scheme))


def test_zscore_inside_the_mask_leaves_the_rest_and_other_channels_do_not_use_it() -> None:
    inside = np.zeros((4, 5, 6), bool)
    inside[1:3, 1:4, 2:5] = True
    both = np.concatenate([image(), np.where(inside, image(), 0)])
    voxels = image()[0][inside].astype(float)
    normalize(both, (channel("zscore"), channel("zscore", use_mask=True)), inside)
    assert abs(both[0].mean()) < 1e-5 and (both[1][~inside] == 0).all()
    assert np.allclose(both[1][inside], (voxels - voxels.mean()) / voxels.std(), atol=1e-6)


def test_constant_image_and_empty_mask_do_not_divide_by_zero() -> None:
    got = np.full((1, 2, 3, 4), 7, np.float32)
    normalize(got, (channel("zscore"),), None)
    assert (got == 0).all()
    normalize(got, (channel("zscore", use_mask=True),), np.zeros((2, 3, 4), bool))
    assert np.isfinite(got).all()


@pytest.mark.parametrize(
    ("schemes", "message"),
    [
        (("rgb_0_1",), r"takes the image for RGB of 0 to 255, but its values are -200 to 400\."),
        (("none", "none"), "the image has 1 channels, the plan 2"),
    ],
)
def test_an_image_that_does_not_fit_the_plan_is_refused(schemes: tuple[str, ...], message: str) -> None:
    with pytest.raises(UserError, match=message):
        normalize(image(), tuple(channel(scheme) for scheme in schemes), None)


def test_moments_are_exact_for_large_values() -> None:
    array = (np.random.default_rng(0).normal(size=(9, 200, 700)) + 1e5).astype(np.float32)  # more than one slab
    mean, std = moments(array)
    assert abs(mean - array.astype(float).mean()) < 1e-6 and abs(std - array.astype(float).std()) < 1e-6


def test_percentile_clipping_comes_before_the_scheme() -> None:
    rng = np.random.default_rng(0)
    raw = rng.normal(100, 10, (1, 6, 7, 8)).astype(np.float32)
    raw[0, 0, 0, 0] = 1e6  # a hot voxel
    channel = Channel(name="MRI", normalization="zscore", clip_percentiles=(1, 99), statistics=STATISTICS)
    image = raw.copy()
    normalize(image, (channel,), None)
    clipped = np.clip(raw, *np.percentile(raw, (1, 99)))
    np.testing.assert_allclose(image, (clipped - clipped.mean()) / clipped.std(), atol=1e-4)
    inside = rng.random((6, 7, 8)) < 0.5
    masked = raw * inside  # outside of the mask there are zeros, which stay
    normalize(masked, (channel.model_copy(update={"use_mask": True}),), inside)
    clipped = np.clip(raw[0], *np.percentile(raw[0][inside], (1, 99)))[inside]
    np.testing.assert_allclose(masked[0][inside], (clipped - clipped.mean()) / clipped.std(), atol=1e-4)
    assert not masked[0][~inside].any()
    empty = np.zeros((1, 4, 5, 6), np.float32)  # an image without a voxel inside its mask
    normalize(empty, (channel.model_copy(update={"use_mask": True}),), np.zeros((4, 5, 6), bool))
    assert not empty.any()
