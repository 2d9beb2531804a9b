"""Windows cover an image evenly, and each slice is finished, used and dropped in time."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy.ndimage import gaussian_filter

from nnunet_lite.inference.sliding_window import cut_window, mirror_window
from nnunet_lite.inference.windows import (
    LabelSwap,
    gaussian_weight,
    mirrorings,
    padding,
    schedule,
    slice_spans,
    spans,
    tile,
    window_slices,
    window_starts,
)
from nnunet_lite.preprocessing.resampling import blocks


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
    places = window_slices((20, 10, 9), (8, 6, 9), 0.5)
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
    expected /= expected.max()
    found = gaussian_weight(patch)
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-9)
    half = gaussian_weight(patch, half=True)
    assert (half == half.astype(np.float16)).all()
    np.testing.assert_allclose(half, (10 * expected).clip(6e-8).astype(np.float16), rtol=1e-3, atol=6e-8)


@pytest.mark.parametrize("patch", [(1, 64, 64), (320, 320), (192, 192, 192)])
def test_the_weight_is_never_zero(patch: tuple[int, ...]) -> None:
    assert gaussian_weight(patch).min() > 0
    assert gaussian_weight(patch, half=True).astype(np.float16).min() > 0


def test_mirrorings_are_all_combinations() -> None:
    assert mirrorings(()) == [()]
    assert mirrorings((0, 2)) == [(), (0,), (2,), (0, 2)]
    assert len(mirrorings((0, 1, 2))) == 8


def test_an_image_smaller_than_the_patch_lies_in_the_middle() -> None:
    image = torch.rand(2, 5, 20, 8)
    assert padding(image.shape[1:], (8, 8, 8)) == ((1, 2), (0, 0), (0, 0))
    (first,) = spans(5, 8, 0.5)
    window = cut_window(image, (first, spans(20, 8, 0.5)[1], spans(8, 8, 0.5)[0]))
    assert window.shape == (2, 8, 8, 8)
    assert torch.equal(window[:, 1:6], image[:, :, 4:12])
    assert not window[:, 0].any() and not window[:, 6:].any()
    assert torch.equal(window[:, first.within], image[:, :, 4:12])


def test_spans_are_the_windows() -> None:
    for size in (3, 8, 9, 40):
        found = [(span.start, span.start + span.size) for span in spans(size, 8, 0.5)]
        ((before, after),) = padding((size,), (8,))
        assert found == [
            (p[0].start - before, p[0].stop - before) for p in window_slices((size + before + after,), (8,), 0.5)
        ]
        seen = np.zeros(size, int)
        for span in spans(size, 8, 0.5):
            seen[span.inside] += 1
            assert len(range(*span.within.indices(8))) == span.inside.stop - span.inside.start
        assert seen.min() >= 1


@pytest.mark.parametrize(("size", "at_once"), [(7, 3), (7, 7), (1, 1), (8, 4)])
def test_slices_of_two_dimensional_networks_are_seen_once(size: int, at_once: int) -> None:
    found = slice_spans(size, at_once)
    assert [i for span in found for i in range(size)[span.inside]] == list(range(size))
    assert max(span.size for span in found) == at_once
    tiling = tile((size, 20, 9), (8, 16), 0.5, mirrorings((1, 2)), at_once)
    assert tiling.axes[0] == found and [len(axis) for axis in tiling.axes[1:]] == [4, 1] and len(tiling.flips) == 4


@pytest.mark.parametrize("order", [0, 1, 3])
@pytest.mark.parametrize(("size", "target"), [(100, 100), (100, 170), (100, 23), (9, 20), (40, 3), (1, 1)])
def test_slices_are_held_until_they_are_used(size: int, target: int, order: int) -> None:
    for along in (spans(size, 32, 0.5), spans(size, 32, 1.0), slice_spans(size, 5)):
        parts = blocks(size, target, order, 4)
        rows, depth = schedule(along, parts)
        first, made = 0, []
        for row in rows:
            assert row.span.inside.start >= first, "nothing is added to what was dropped"
            assert first + depth >= row.span.inside.stop
            assert all(first <= part.low and part.high <= row.finished for part in row.parts)
            made += row.parts
            first = row.needed
        assert made == list(parts)


def test_what_is_held_does_not_grow_with_the_image() -> None:
    depths = {schedule(spans(n, 32, 0.5), blocks(n, round(1.7 * n), 1, 4))[1] for n in (100, 200, 1600)}
    assert max(depths) <= 32 + 6


def test_classes_of_a_mirrored_window_change_sides() -> None:
    window = torch.stack([torch.rand(4, 4, 4), torch.randint(0, 3, (4, 4, 4)).float()])
    sides = LabelSwap(2, (0, 2, 1), (0, 2, 1))
    there = mirror_window(window, (0, 2), sides)
    assert torch.equal(there[0], window[0].flip((0, 2)))
    assert torch.equal(there[1] == 1, window[1].flip((0, 2)) == 2)
    assert torch.equal(mirror_window(window, (0,), sides), window.flip(1))
