"""Where sliding windows are, how they are weighted, and when slices are finished; without torch.

`tile` places windows on an image, `gaussian_weight` weighs their voxels, and `schedule` orders them: windows come in
rows along the first axis, and slices that no later row reaches are finished and can be dropped.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from nnunet_lite.preprocessing.resampling import Block

Flip = tuple[int, ...]  # the axes (of three) along which a copy is mirrored
Place = Sequence["Span"]  # of a window, along (z, y, x)

_HALF_SCALE = 10  # the largest weight in float16; with 1, most weights are too small for it


@dataclass(frozen=True)
class Span:
    """One window along one axis.

    Parameters
    ----------
    start : int
        Its first voxel; below zero if the image is smaller than the window.
    size : int
        Its number of voxels.
    inside : slice
        The voxels of the image that it covers.
    """

    start: int
    size: int
    inside: slice

    @property
    def within(self) -> slice:
        """The voxels of the window that are inside the image."""
        return slice(self.inside.start - self.start, self.inside.stop - self.start)

    @property
    def outside(self) -> tuple[int, int]:
        """How many voxels of the window are before and after the image."""
        return self.inside.start - self.start, self.start + self.size - self.inside.stop


@dataclass(frozen=True)
class WindowRow:
    """The windows with the same span along the first axis.

    Parameters
    ----------
    span : Span
        Their span along the first axis.
    finished : int
        The slices before this one are finished after this row.
    parts : tuple of Block
        The blocks of output slices that can be computed then.
    needed : int
        The slices before this one can be dropped then.
    """

    span: Span
    finished: int
    parts: tuple[Block, ...]
    needed: int


def tile(shape: Sequence[int], patch: Sequence[int], step: float, slices: int = 1) -> tuple[tuple[Span, ...], ...]:
    """Place overlapping windows on an image: all combinations of the spans along (z, y, x).

    Parameters
    ----------
    shape : sequence of int
        Of the image (z, y, x).
    patch : sequence of int
        Of three axes, or of two: then windows are `slices` slices thick, and contain each slice once.
    step : float
        Largest distance of two windows, as a share of the patch.
    slices : int
        How many slices a two-dimensional network computes at once.
    """
    plane = [spans(size, p, step) for size, p in zip(shape[-len(patch) :], patch, strict=True)]
    if len(patch) == 3:
        return tuple(plane)
    inside = [slice(start, min(start + slices, shape[0])) for start in range(0, shape[0], slices)]
    return tuple(Span(part.start, part.stop - part.start, part) for part in inside), *plane


def spans(size: int, patch: int, step: float) -> tuple[Span, ...]:
    """Return the windows along one axis; an image that is smaller than the patch is in its middle."""
    missing = max(0, patch - size)
    starts = [start - missing // 2 for start in window_starts(size + missing, patch, step)]
    return tuple(Span(start, patch, slice(max(0, start), min(size, start + patch))) for start in starts)


def window_starts(size: int, patch: int, step: float) -> list[int]:
    """Return the first voxels of the windows along one axis.

    Windows are evenly spaced, at most `step * patch` apart, and the last one ends with the image.
    """
    if size <= patch:
        return [0]
    n = min(math.ceil((size - patch) / (patch * step)), size - patch) + 1
    return [round(i * (size - patch) / (n - 1)) for i in range(n)]


def mirrorings(axes: Sequence[int]) -> list[Flip]:
    """Return all combinations of axes to flip, the unflipped one first."""
    return [flips for n in range(len(axes) + 1) for flips in itertools.combinations(axes, n)]


def gaussian_weight(patch: Sequence[int], half: bool = False) -> np.ndarray:
    """Return the weight of each voxel of a window: a Gaussian with a standard deviation of an eighth of the patch.

    Voxels near the border, where the network lacks context, count less. No weight is zero.

    Parameters
    ----------
    patch : sequence of int
        Size of the window.
    half : bool
        Return the weights of nnU-Net, which are rounded to float16 and at most 10; otherwise they are at most 1.

    Returns
    -------
    ndarray
        float32, with the shape of the patch.
    """
    exact = np.ones(())
    for size in patch:
        offset = (np.arange(size) - size // 2) / (size / 8)
        exact = exact[..., None] * np.exp(-0.5 * offset**2)
    weight = exact.clip(exact[exact > 0].min()).astype(np.float32)
    if half:
        weight = (np.float32(_HALF_SCALE) * weight).astype(np.float16)
    return weight.clip(weight[weight > 0].min()).astype(np.float32)


def schedule(along: Sequence[Span], parts: Sequence[Block]) -> tuple[tuple[WindowRow, ...], int]:
    """Return the rows of windows in order, and the largest number of slices that are in memory at once.

    Parameters
    ----------
    along : sequence of Span
        The windows along the first axis; those before the slices that the first part needs are left out.
    parts : sequence of Block
        Blocks of output slices, in order; each contains the range of input slices that it needs.
    """
    along = [span for span in along if span.inside.stop > parts[0].low]
    rows, left, first, depth = [], list(parts), along[0].inside.start, 0
    for number, span in enumerate(along):
        finished = along[number + 1].inside.start if number + 1 < len(along) else span.inside.stop
        n_parts = sum(part.high <= finished for part in left)
        depth = max(depth, span.inside.stop - first)
        first = min(finished, left[n_parts].low) if n_parts < len(left) else finished
        rows.append(WindowRow(span, finished, tuple(left[:n_parts]), first))
        del left[:n_parts]
    return tuple(rows), depth
