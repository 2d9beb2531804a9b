"""Sliding windows over an image: where they lie, what they show, and when the slices that they cover are finished."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from nnunet_lite.inference.tiles import Sides, gaussian_weight, padding, window_starts
from nnunet_lite.preprocessing.resampling import Block

Flip = tuple[int, ...]  # the axes (of three) along which a copy is mirrored

_LARGEST = 10  # weight, or most of them would be too small for float16


@dataclass(frozen=True)
class Span:
    """One window along one axis: its first voxel, below zero where the image is smaller than it, and its size."""

    start: int
    size: int
    inside: slice  # its voxels that are the image's

    @property
    def within(self) -> slice:
        """The voxels of the window that lie in the image."""
        return slice(self.inside.start - self.start, self.inside.stop - self.start)

    @property
    def outside(self) -> tuple[int, int]:
        """How many voxels lie before and after the image."""
        return self.inside.start - self.start, self.start + self.size - self.inside.stop


@dataclass(frozen=True)
class Tiling:
    """The windows of an image, all combinations of those along (z, y, x), and the mirrored copies of each."""

    axes: tuple[tuple[Span, ...], tuple[Span, ...], tuple[Span, ...]]
    flips: tuple[Flip, ...]


@dataclass(frozen=True)
class Row:
    """The windows with one span along the first axis.

    Parameters
    ----------
    finished : after them, the slices before this one.
    parts : blocks of output slices that can be made then. needed : the slices before this one are of no more use then.
    """

    span: Span
    finished: int
    parts: tuple[Block, ...]
    needed: int


def spans(size: int, patch: int, step: float) -> tuple[Span, ...]:
    """The windows along one axis; an image that is smaller than the patch lies in the middle of it."""
    ((before, after),) = padding((size,), (patch,))
    starts = [start - before for start in window_starts(before + size + after, patch, step)]
    return tuple(Span(start, patch, slice(max(0, start), min(size, start + patch))) for start in starts)


def slice_spans(size: int, at_once: int) -> tuple[Span, ...]:
    """The first axis for a two-dimensional network: each slice once, in windows of at most so many slices."""
    inside = [slice(start, min(start + at_once, size)) for start in range(0, size, at_once)]
    return tuple(Span(part.start, part.stop - part.start, part) for part in inside)


def tile(shape: Sequence[int], patch: Sequence[int], step: float, flips: Sequence[Flip], slices: int = 1) -> Tiling:
    """The windows of an image (z, y, x).

    Parameters
    ----------
    patch : of three axes, or of two: such windows are `slices` slices thick, of which the network sees each alone.
    flips : as `mirrorings` gives them.
    """
    first = spans(shape[0], patch[0], step) if len(patch) == 3 else slice_spans(shape[0], slices)
    y, x = (spans(size, p, step) for size, p in zip(shape[1:], patch[-2:], strict=True))
    return Tiling((first, y, x), tuple(flips))


def schedule(along: Sequence[Span], parts: Sequence[Block]) -> tuple[tuple[Row, ...], int]:
    """The rows of windows, and the most slices that are held at once.

    Parameters
    ----------
    along : the windows along the first axis.
    parts : blocks of output slices, in order; each tells which input slices it needs.
    """
    rows, left, first, depth = [], list(parts), 0, 0
    for number, span in enumerate(along):
        finished = along[number + 1].inside.start if number + 1 < len(along) else span.inside.stop
        ready = sum(part.high <= finished for part in left)
        depth = max(depth, span.inside.stop - first)
        first = min(finished, left[ready].low) if ready < len(left) else finished
        rows.append(Row(span, finished, tuple(left[:ready]), first))
        del left[:ready]
    return tuple(rows), depth


def weight_of(patch: Sequence[int], dtype: torch.dtype) -> Tensor:
    """How much each voxel of a window counts: a Gaussian with a deviation of an eighth of the patch, float32.

    For sums in float16 it is nnU-Net's, largest and smallest weights included.
    """
    weight = torch.from_numpy(gaussian_weight(patch))
    if dtype != torch.float16:
        return weight
    rounded = (_LARGEST * weight).half()
    return rounded.clamp_min(float(rounded[rounded > 0].min())).float()


def cut(image: Tensor, place: Sequence[Span]) -> Tensor:
    """A window (channels, z, y, x) of an image, zero outside it."""
    inside = image[(slice(None), *(span.inside for span in place))]
    outside = [n for span in reversed(place) for n in span.outside]
    return F.pad(inside, outside) if any(outside) else inside


def mirrored(window: Tensor, flip: Flip, sides: Sides | None) -> Tensor:
    """A window (channels, z, y, x) flipped along some axes."""
    out = window.flip([axis + 1 for axis in flip])
    if sides is not None and sides.classes is not None and sides.axis in flip:
        out[-1] = torch.tensor(sides.classes, dtype=out.dtype)[out[-1].long()]
    return out
