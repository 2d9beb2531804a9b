"""Windows cover an image evenly, and what the networks compute of them is averaged, slice after slice."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from random_models import Function, Shape, noise, planned, predict_logits, random_networks, sliding
from scipy.ndimage import gaussian_filter
from torch import Tensor

from nnunet_lite.inference import onnx_runner
from nnunet_lite.inference.predictor import load
from nnunet_lite.inference.sliding_window import SlidingWindow, _cut_window
from nnunet_lite.inference.windows import gaussian_weight, mirrorings, schedule, spans, tile, window_starts
from nnunet_lite.planning.swaps import ClassSwap
from nnunet_lite.preprocessing.resampling import blocks

# ------------------------------------------------------------------------------------------------------------- windows


@pytest.mark.parametrize("step", [0.25, 0.5, 0.75, 1.0])
def test_windows_cover_every_voxel_with_at_most_the_step(step: float) -> None:
    for patch in (1, 8, 13, 40):
        for size in range(1, 130):
            starts = window_starts(size, patch, step)
            assert starts[0] == 0 and starts[-1] == max(0, size - patch)
            gaps = np.diff(starts)
            assert (gaps > 0).all() and (gaps <= math.ceil(patch * step)).all()
            most = math.ceil((size - patch) / (patch * step)) + 1
            assert len(starts) == max(1, min(most, size - patch + 1))


def cut(image: np.ndarray, place: Any, flip: tuple[int, ...] = (), swap: ClassSwap | None = None) -> np.ndarray:
    """A window, which is the same of tensors and, for ONNX, of numpy arrays."""
    table = torch.tensor(swap.table).float() if swap is not None and swap.axis in flip else None
    window = _cut_window(torch.from_numpy(image[:, place[0].inside]), place, flip, table).numpy()
    np.testing.assert_array_equal(onnx_runner._cut_window(image, place, flip, swap), window)
    return window


def test_spans_cover_an_image_that_may_be_smaller_than_the_patch() -> None:
    for size in (3, 8, 9, 40):
        count = np.zeros(size, int)
        for span in spans(size, 8, 0.5):
            count[span.inside] += 1
            assert len(range(*span.within.indices(8))) == span.inside.stop - span.inside.start
        assert count.min() >= 1
    image = noise((5, 20, 8), channels=2)
    (first,) = spans(5, 8, 0.5)
    assert first.outside == (1, 2)
    window = cut(image, (first, spans(20, 8, 0.5)[1], spans(8, 8, 0.5)[0]))
    assert window.shape == (2, 8, 8, 8)
    np.testing.assert_array_equal(window[:, first.within], image[:, :, 4:12])
    assert first.within == slice(1, 6) and not window[:, 0].any() and not window[:, 6:].any()


@pytest.mark.parametrize("patch", [(16, 24, 40), (28, 28, 20), (7, 9, 16), (64, 48)])
def test_the_weight_is_a_gaussian_of_an_eighth_of_the_patch(patch: tuple[int, ...]) -> None:
    delta = np.zeros(patch)
    delta[tuple(n // 2 for n in patch)] = 1
    expected = gaussian_filter(delta, [n / 8 for n in patch], mode="constant", truncate=20)
    expected /= expected.max()
    np.testing.assert_allclose(gaussian_weight(patch), expected, rtol=1e-4, atol=1e-9)
    half = gaussian_weight(patch, half=True)
    assert (half == half.astype(np.float16)).all()
    np.testing.assert_allclose(half, (10 * expected).clip(6e-8).astype(np.float16), rtol=1e-3, atol=6e-8)


@pytest.mark.parametrize("patch", [(1, 64, 64), (320, 320), (192, 192, 192)])
def test_the_weight_is_never_zero(patch: tuple[int, ...]) -> None:
    assert gaussian_weight(patch).min() > 0 and gaussian_weight(patch, half=True).astype(np.float16).min() > 0


def test_mirrored_windows() -> None:
    assert mirrorings(()) == [()] and mirrorings((0, 2)) == [(), (0,), (2,), (0, 2)]
    assert len(mirrorings((0, 1, 2))) == 8
    image = noise((4, 4, 4), channels=2)
    image[1] = np.random.default_rng(1).integers(0, 3, (4, 4, 4))
    place, swap = [spans(4, 4, 0.5)[0]] * 3, ClassSwap(2, (0, 2, 1), (0, 2, 1))
    mirrored = cut(image, place, (0, 2), swap)
    np.testing.assert_array_equal(mirrored[0], np.flip(image[0], (0, 2)))
    np.testing.assert_array_equal(mirrored[1] == 1, np.flip(image[1], (0, 2)) == 2)
    np.testing.assert_array_equal(cut(image, place, (0,), swap), np.flip(image, 1))


@pytest.mark.parametrize(("size", "at_once"), [(7, 3), (7, 7), (1, 1), (8, 4)])
def test_two_dimensional_networks_compute_each_slice_once(size: int, at_once: int) -> None:
    along, *plane = tile((size, 20, 9), (8, 16), 0.5, at_once)
    assert [i for span in along for i in range(size)[span.inside]] == list(range(size))
    assert max(span.size for span in along) == at_once and [len(axis) for axis in plane] == [4, 1]


@pytest.mark.parametrize("order", [0, 1, 3])
@pytest.mark.parametrize(("size", "target"), [(100, 100), (100, 170), (100, 23), (9, 20), (40, 3), (1, 1)])
def test_slices_are_kept_until_they_are_used(size: int, target: int, order: int) -> None:
    for along in (spans(size, 32, 0.5), spans(size, 32, 1.0), tile((size, 8, 8), (8, 8), 1.0, 5)[0]):
        parts = blocks(size, target, order, 4)
        rows, depth = schedule(along, parts)
        first, used = 0, []
        for row in rows:
            assert row.span.inside.start >= first, "nothing is added to slices that were dropped"
            assert first + depth >= row.span.inside.stop
            assert all(first <= part.low and part.high <= row.finished for part in row.parts)
            used += row.parts
            first = row.needed
        assert used == list(parts)
    depths = {schedule(spans(n, 32, 0.5), blocks(n, round(1.7 * n), 1, 4))[1] for n in (100, 200, 1600)}
    assert max(depths) <= 32 + 6, "what is kept does not grow with the image"


# ---------------------------------------------------------------------------------------------------- averaged windows


def of_function(function: Callable[[Tensor], Tensor], n_logits: int, **options: Any) -> SlidingWindow:
    return sliding([Function(function)], planned((8, 8, 8)), n_logits, **options)


@pytest.mark.parametrize("shape", [(20, 21, 22), (5, 20, 9), (8, 8, 8)])
@pytest.mark.parametrize(("options", "step"), [({}, 0.5), ({"mirror_axes": (0, 1, 2)}, 0.5), ({}, 1.0), ({}, 0.3)])
def test_the_identity_returns_the_image(shape: Shape, options: dict[str, Any], step: float) -> None:
    image = noise(shape, channels=3)
    found = predict_logits(of_function(lambda x: x, 3, **options), image, step)
    torch.testing.assert_close(found, torch.from_numpy(image), atol=1e-5, rtol=1e-5)


def of_position(x: Tensor) -> Tensor:
    """A network that depends on the place of a voxel in its window, hence on every weight and flip."""
    ramp = torch.arange(x.shape[2], dtype=torch.float32).reshape(-1, 1, 1)
    return torch.cat([x.cumsum(2), x * ramp], 1)


def average_at_once(image: Tensor, flips: Sequence[tuple[int, ...]], half: bool) -> Tensor:
    """The weighted mean over windows of 8^3 without streaming: in float64, or in float16 as in nnU-Net."""
    kind = torch.float16 if half else torch.float64
    weight = torch.from_numpy(gaussian_weight((8, 8, 8), half)).to(kind)
    total, weights = torch.zeros(2, *image.shape[1:], dtype=kind), torch.zeros(image.shape[1:], dtype=kind)
    for corner in itertools.product(*(window_starts(size, 8, 0.5) for size in image.shape[1:])):
        place = tuple(slice(c, c + 8) for c in corner)
        window, output = image[None, :, *place], torch.zeros(2, 8, 8, 8)
        for flip in flips:
            axes = [axis + 2 for axis in flip]
            output += of_position(window.flip(axes)).flip(axes)[0]
        total[:, *place] += output / len(flips) * weight
        weights[place] += weight
    return (total / weights).float()


@pytest.mark.parametrize("at_once", [1, 3, 7, 1000])
@pytest.mark.parametrize("axes", [(), (0, 2)])
def test_overlapping_windows_and_copies_are_averaged(
    at_once: int, axes: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(SlidingWindow, "at_once", at_once)
    image = noise((20, 10, 9))
    for half in (False, True):
        sums = torch.float16 if half else torch.float32
        found = predict_logits(of_function(of_position, 2, mirror_axes=axes, sums=sums), image)
        expected = average_at_once(torch.from_numpy(image), mirrorings(axes), half)
        torch.testing.assert_close(found, expected, atol=0 if half else 1e-4, rtol=0 if half else 1e-5)


def test_features_are_summed_if_there_are_more_classes() -> None:
    configuration = planned((16, 16, 16))
    for n_classes, folds, swap, channels in [
        (7, 1, None, 8),
        (8, 1, None, 7),
        (20, 3, None, 19),
        (20, 2, ClassSwap(2, (1,), (1,)), 21),
    ]:
        networks = random_networks(configuration, n_classes, folds)
        window = sliding(networks, configuration, n_classes, mirror_axes=(2,), swap=swap)
        assert window.channels == channels


@pytest.mark.slow
def test_compiled_networks_predict_the_same(tiny_model: Path) -> None:
    settings = {"inference.mirroring": False, "inference.step_size": 1.0, "inference.precision": "fp32"}
    plain, compiled = (
        load(tiny_model, device="cpu", settings={**settings, "inference.compile": flag}) for flag in (False, True)
    )
    image = noise(plain.configuration.patch_size)[0]
    assert (plain(image, (1, 1, 1)) == compiled(image, (1, 1, 1))).mean() > 0.9999
