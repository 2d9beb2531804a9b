"""Sliding windows: where they lie, how they are weighted, and the logits of a whole image."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

Window = tuple[slice, ...]
Forward = Callable[[Tensor], Tensor]


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


def gaussian(patch: Sequence[int]) -> Tensor:
    """Weight of each voxel of a window: a Gaussian with a standard deviation of an eighth of the patch, at most 1.

    Voxels near the rim, where the network lacks context, count less. The weight is never zero.
    """
    weight = torch.ones(())
    for size in patch:
        offset = (torch.arange(size, dtype=torch.float64) - size // 2) / (size / 8)
        weight = weight[..., None] * torch.exp(-0.5 * offset**2)
    return weight.clamp_min(float(weight[weight > 0].min())).float()


def mirrorings(axes: Sequence[int]) -> list[tuple[int, ...]]:
    """All combinations of axes to flip, the unflipped one first."""
    return [flips for n in range(len(axes) + 1) for flips in itertools.combinations(axes, n)]


def mirrored(tile: Tensor, flip: Sequence[int], sides: Sides | None) -> Tensor:
    """A window (channels, *patch) flipped along some axes."""
    out = tile.flip([axis + 1 for axis in flip])
    if sides is not None and sides.classes is not None and sides.axis in flip:
        out[-1] = torch.tensor(sides.classes, dtype=out.dtype)[out[-1].long()]
    return out


def unmirrored(output: Tensor, flip: Sequence[int], sides: Sides | None) -> Tensor:
    """The logits (channels, *patch) of a flipped window as those of the window itself."""
    out = output.flip([axis + 1 for axis in flip])
    return out[list(sides.channels)] if sides is not None and sides.axis in flip else out


def pad_to_patch(image: Tensor, patch: Sequence[int]) -> tuple[Tensor, Window]:
    """Zeros around an image (channels, *shape) that is smaller than the patch, and where the image lies in it."""
    missing = [max(0, p - s) for p, s in zip(patch, image.shape[1:], strict=True)]
    inside = tuple(slice(m // 2, m // 2 + s) for m, s in zip(missing, image.shape[1:], strict=True))
    if not any(missing):
        return image, inside
    return F.pad(image, [n for m in reversed(missing) for n in (m // 2, m - m // 2)]), inside


def predict_logits(
    forward: Forward,
    image: Tensor,
    patch: Sequence[int],
    n_channels: int,
    *,
    step: float = 0.5,
    mirror_axes: Sequence[int] = (),
    batch_size: int = 1,
    device: torch.device | None = None,
    sides: Sides | None = None,
) -> Tensor:
    """Logits of a whole image, the weighted mean over overlapping windows and mirrored copies.

    Parameters
    ----------
    forward : (batch, channels, *patch) -> logits (batch, n_channels, *patch) on `device`.
    image : (channels, *shape), preprocessed; smaller ones are padded to the patch.
    mirror_axes : axes of the patch to mirror.
    batch_size : how many windows and mirrored copies are computed at once.
    sides : labels that change places in mirrored copies.

    Returns
    -------
    (n_channels, *shape) float32 on the CPU.
    """
    device = device or image.device
    padded, inside = pad_to_patch(image, patch)
    weight = gaussian(patch)
    total = torch.zeros((n_channels, *padded.shape[1:]))
    weights = torch.zeros(padded.shape[1:])
    flips = mirrorings(mirror_axes)
    places = windows(padded.shape[1:], patch, step)
    for place in places:
        weights[place] += weight
    for batch in _chunks(itertools.product(places, flips), batch_size):
        tiles = torch.stack([mirrored(padded[(slice(None), *place)], flip, sides) for place, flip in batch])
        outputs = forward(tiles.to(device)).float().cpu()
        for (place, flip), output in zip(batch, outputs, strict=True):
            total[(slice(None), *place)] += unmirrored(output, flip, sides) * (weight / len(flips))
    total /= weights  # in place: a second copy may not fit
    return total[(slice(None), *inside)]


def _chunks(items: itertools.product[tuple[Window, tuple[int, ...]]], size: int) -> Iterator[list]:
    while chunk := list(itertools.islice(items, size)):
        yield chunk


def as_tensor(image: np.ndarray) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(image, np.float32))
