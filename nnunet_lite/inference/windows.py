"""Sliding windows: where they lie, how they are weighted, and the logits of a whole image."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from nnunet_lite.inference.tiles import Sides, Window, gaussian_weight, mirrorings, padding, windows

Forward = Callable[[Tensor], Tensor]


def gaussian(patch: Sequence[int]) -> Tensor:
    """Weight of each voxel of a window, see `gaussian_weight`."""
    return torch.from_numpy(gaussian_weight(patch))


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
    around = padding(image.shape[1:], patch)
    inside = tuple(slice(before, before + size) for (before, _), size in zip(around, image.shape[1:], strict=True))
    if not any(map(any, around)):
        return image, inside
    return F.pad(image, [n for pair in reversed(around) for n in pair]), inside


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
