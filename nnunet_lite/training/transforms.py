"""The transforms of augmentation as functions of tensors: all samples or rows at once, each with parameters of its own.

A row is one channel of one sample: (rows, z, y, x), with parameters (rows, n). Nothing here looks at the values of a
tensor on the host, so on a GPU nothing waits.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from functools import reduce

import torch
import torch.nn.functional as F
from torch import Tensor


def warp(images: Tensor, classes: Tensor, matrices: Tensor, patch: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Rotate and scale samples around their centres, with linear interpolation.

    Parameters
    ----------
    images : (n, channels, *source) with two or three axes; `classes` (n, maps, *source) likewise.
    matrices : (n, axes, axes) from offsets in the patch to offsets in the source, in voxels.
    patch : shape of what comes out; the source must hold what the matrices make of it.

    Each class is interpolated by itself and the largest wins, as in nnU-Net.
    """
    moved = [_moved(row, patch) for row in matrices.unbind(1)]
    source = images.shape[2:]
    grid = torch.stack([m / (max(n - 1, 1) / 2) for m, n in zip(moved, source, strict=True)][::-1], -1)
    warped = F.grid_sample(images, grid, mode="bilinear", padding_mode="border", align_corners=True)
    positions = [m + (n - 1) / 2 for m, n in zip(moved, source, strict=True)]
    return warped, vote(classes, positions, everywhere=images.device.type != "cpu")


def _moved(factors: Tensor, patch: Sequence[int]) -> Tensor:
    """Offsets along one axis of the source, (n, *patch), from factors (n, axes) of those along the patch's axes."""
    parts = []
    for axis, size in enumerate(patch):
        shape = [-1 if axis == other else 1 for other in range(len(patch))]
        offsets = torch.arange(size, device=factors.device) - (size - 1) / 2
        parts.append(factors[:, axis].view(-1, *[1] * len(patch)) * offsets.view(shape))
    return reduce(torch.add, parts)


def vote(classes: Tensor, positions: Sequence[Tensor], everywhere: bool) -> Tensor:
    """The class with most weight among the 4 or 8 voxels around each position; (n, maps, *source) -> (n, maps, *patch).

    This is what interpolating each class would give, at a cost that does not depend on their number. Unless told to
    look `everywhere`, only positions between different classes are counted out; a GPU would wait to know how many.
    """
    (n, maps, *source), patch = classes.shape, positions[0].shape[1:]
    flat, strides = classes.flatten(), classes.stride()[2:]
    below = [p.floor().clamp(0, size - 1) for p, size in zip(positions, source, strict=True)]
    lower = reduce(torch.add, [b.to(torch.int32) * stride for b, stride in zip(below, strides, strict=True)])
    starts = torch.arange(0, len(flat), math.prod(source), device=flat.device, dtype=torch.int32).view(n, maps, 1)
    index = (lower.view(n, 1, -1) + starts).flatten()
    found = flat.index_select(0, index)
    close = None if everywhere else _mixed(flat, strides).index_select(0, index).nonzero()[:, 0]
    axes = []  # along each: what leads from the lower neighbour to the upper one, and how much weight that has
    for position, low, size, stride in zip(positions, below, source, strides, strict=True):
        both = (x.view(n, 1, -1).expand(-1, maps, -1).flatten() for x in (position - low, (low < size - 1) * stride))
        part, step = (x if close is None else x.index_select(0, close) for x in both)
        axes.append((part, step.to(torch.int32)))
    if close is None:
        found = _winners(flat, index, axes)
    else:
        found.index_copy_(0, close, _winners(flat, index.index_select(0, close), axes))
    return found.view(n, maps, *patch)


def _winners(flat: Tensor, index: Tensor, axes: Sequence[tuple[Tensor, Tensor]]) -> Tensor:
    """The vote around each index of a flattened map; along each axis (weight of the upper neighbour, step to it)."""
    around = [[(torch.zeros_like(step), 1 - part), (step, part)] for part, step in axes]
    corners = list(itertools.product(*around))
    found = [flat.index_select(0, reduce(torch.add, [step for step, _ in corner], index)) for corner in corners]
    votes = [reduce(torch.mul, [weight for _, weight in corner]) for corner in corners]
    winner, most = found[0], votes[0]
    for i, own in enumerate(found):
        for other, weight in zip(found[i + 1 :], votes[i + 1 :], strict=True):
            votes[i].addcmul_(weight, (own == other).float())  # of equal voxels the first gets all votes
        winner = torch.where(votes[i] > most, own, winner)
        most = torch.maximum(votes[i], most)
    return winner


def _mixed(flat: Tensor, strides: Sequence[int]) -> Tensor:
    """Where a voxel and those one step on along the axes are not all alike; at the borders perhaps where they are."""
    low = high = flat
    for stride in strides:
        low, high = torch.minimum(low[:-stride], low[stride:]), torch.maximum(high[:-stride], high[stride:])
    return F.pad(low != high, (0, len(flat) - len(low)), value=True)


def blur(x: Tensor, sigma: Tensor, widest: float) -> Tensor:
    """Gaussian blur with a sigma per row and axis, (rows, 3) voxels, none above `widest`; cut off at 3 sigma."""
    radius = math.floor(3 * widest)
    taps = torch.arange(-radius, radius + 1, device=x.device)
    for axis, size in enumerate(x.shape[1:]):
        if size == 1:
            continue
        s = sigma[:, axis, None]
        weights = torch.exp(-0.5 * (taps / s) ** 2) * (taps.abs() <= (3 * s).floor())
        # beyond an edge the image goes on mirrored, without its outermost voxel
        period = 2 * (size - 1)
        beyond = (torch.arange(size, device=x.device)[:, None] + taps) % period
        meets = torch.minimum(beyond, period - beyond)[..., None] == torch.arange(size, device=x.device)
        x = _along(x, torch.einsum("rt,itj->rij", weights / weights.sum(1, keepdim=True), meets.float()), axis)
    return x


def low_resolution(x: Tensor, factor: Tensor, axes: Sequence[int]) -> Tensor:
    """Sample some axes down by a factor per row, (rows, 1), to the nearest voxels, and up again linearly.

    Both together are one matrix per axis, so that rows of different factors are done at once.
    """
    for axis in axes:
        size = x.shape[axis + 1]
        grid = torch.arange(size, device=x.device)
        coarse = (size * factor).round().clamp(1, size)  # (rows, 1) voxels
        position = ((grid + 0.5) * coarse / size - 0.5).clamp_min(0)
        below = position.floor()
        part = (position - below)[..., None]
        lower, upper = (
            torch.div((2 * i + 1) * size, 2 * coarse, rounding_mode="floor")[..., None] == grid
            for i in (below, torch.minimum(below + 1, coarse - 1))
        )
        x = _along(x, lower * (1 - part) + upper * part, axis)
    return x


def _along(x: Tensor, operators: Tensor, axis: int) -> Tensor:
    """Apply a matrix per row, (rows, n, n), to one axis of (rows, z, y, x)."""
    if axis == 0:
        return (operators @ x.flatten(2)).view_as(x)
    return operators[:, None] @ x if axis == 1 else x @ operators[:, None].mT


def contrast(x: Tensor, factor: Tensor) -> Tensor:
    """Scale the distance from the mean by a factor per row, (rows, 1), within the range that was there."""
    mean = x.mean((1, 2, 3), keepdim=True)
    low, high = x.amin((1, 2, 3), keepdim=True), x.amax((1, 2, 3), keepdim=True)
    return torch.clamp((x - mean) * factor[..., None, None] + mean, low, high)


def gamma(x: Tensor, exponent: Tensor) -> Tensor:
    """Raise rows, rescaled to 0..1, to a power each, (rows, 1); mean and standard deviation are kept."""
    mean, low = x.mean((1, 2, 3), keepdim=True), x.amin((1, 2, 3), keepdim=True)
    span = (x.amax((1, 2, 3), keepdim=True) - low).clamp_min(1e-7)
    y = ((x - low) / span) ** exponent[..., None, None]
    y = y - y.mean((1, 2, 3), keepdim=True)
    return y * (_rms(x - mean) / _rms(y).clamp_min(1e-7)) + mean


def _rms(x: Tensor) -> Tensor:
    """Root of the mean square of each row; on a CPU several times faster than `std`."""
    return x.square().mean((1, 2, 3), keepdim=True).sqrt()


def mirror(x: Tensor, rows: Sequence[Tensor]) -> None:
    """Flip samples (batch, channels, z, y, x) in place; `rows` are the indices of those flipped along each axis."""
    for axis, index in enumerate(rows, 2):
        if len(index):
            x.index_copy_(0, index, x.index_select(0, index).flip(axis))
