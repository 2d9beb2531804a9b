"""Where sliding windows lie and how they are mirrored, without torch: what every way of running a network shares."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

Window = tuple[slice, ...]


@dataclass(frozen=True)
class Sides:
    """What changes places in copies mirrored along an axis that goes from left to right, as it did in training.

    Parameters
    ----------
    axis : of the image's shape.
    channels : the output channel that takes the place of each.
    classes : the class that takes the place of each in the last input channel, if that holds classes.
    """

    axis: int
    channels: tuple[int, ...]
    classes: tuple[int, ...] | None = None


def window_starts(size: int, patch: int, step: float) -> list[int]:
    """First voxels of the windows along one axis: evenly spaced, at most `step * patch` apart, the last at the end."""
    if size <= patch:
        return [0]
    n = min(math.ceil((size - patch) / (patch * step)), size - patch) + 1
    return [round(i * (size - patch) / (n - 1)) for i in range(n)]


def windows(shape: Sequence[int], patch: Sequence[int], step: float) -> list[Window]:
    """All windows of an image, in order along the first axis."""
    starts = (window_starts(s, p, step) for s, p in zip(shape, patch, strict=True))
    return [tuple(slice(c, c + p) for c, p in zip(corner, patch, strict=True)) for corner in itertools.product(*starts)]


def mirrorings(axes: Sequence[int]) -> list[tuple[int, ...]]:
    """All combinations of axes to flip, the unflipped one first."""
    return [flips for n in range(len(axes) + 1) for flips in itertools.combinations(axes, n)]


def gaussian_weight(patch: Sequence[int]) -> np.ndarray:
    """Weight of each voxel of a window, float32: a Gaussian with a standard deviation of an eighth of the patch.

    Voxels near the rim, where the network lacks context, count less. The weight is at most 1 and never zero.
    """
    weight = np.ones(())
    for size in patch:
        offset = (np.arange(size) - size // 2) / (size / 8)
        weight = weight[..., None] * np.exp(-0.5 * offset**2)
    return weight.clip(weight[weight > 0].min()).astype(np.float32)


def padding(shape: Sequence[int], patch: Sequence[int]) -> tuple[tuple[int, int], ...]:
    """Zeros before and after each axis of an image that is smaller than the patch; none along the other axes."""
    missing = (max(0, p - s) for p, s in zip(patch, shape, strict=True))
    return tuple((m // 2, m - m // 2) for m in missing)
