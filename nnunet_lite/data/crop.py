"""Cropping to the nonzero region: what lies outside the body (exact zeros in every channel) need not be seen."""

from __future__ import annotations

import numpy as np

Box = tuple[tuple[int, int], tuple[int, int], tuple[int, int]]


def bounding_box(mask: np.ndarray) -> Box:
    """The half-open box ((z0, z1), (y0, y1), (x0, x1)) around the true voxels of a mask (z, y, x); all, if none."""
    plane = np.any(mask, axis=2)
    lines = (np.any(plane, axis=1), np.any(plane, axis=0), np.any(mask, axis=(0, 1)))
    box = []
    for line, size in zip(lines, mask.shape, strict=True):
        inside = np.flatnonzero(line)
        box.append((int(inside[0]), int(inside[-1]) + 1) if inside.size else (0, size))
    return box[0], box[1], box[2]


def slices(box: Box) -> tuple[slice, slice, slice]:
    """The box as an index."""
    return slice(*box[0]), slice(*box[1]), slice(*box[2])


def nonzero_box(array: np.ndarray) -> Box:
    """The box around the voxels of a (channels, z, y, x) array that are not zero in every channel."""
    return bounding_box(_any_nonzero(array))


def nonzero_mask(array: np.ndarray) -> np.ndarray:
    """Which voxels (z, y, x) of a (channels, z, y, x) array are not zero in every channel, with holes filled.

    A hole is background that no path of faces connects to the outside (6-neighbourhood), as in nnU-Net. Labelling the
    background's components finds them several times faster than scipy's binary_fill_holes, with the same result; a hole
    lies inside the mask's bounding box, so only that is looked at.
    """
    mask = _any_nonzero(array)
    inside = slices(bounding_box(mask))
    part = mask[inside]
    if not part.all():
        from scipy.ndimage import label

        components, _ = label(np.pad(~part, 1, constant_values=True))
        mask[inside] = (components != components[0, 0, 0])[1:-1, 1:-1, 1:-1]
    return mask


def _any_nonzero(array: np.ndarray) -> np.ndarray:
    mask = array[0] != 0
    for channel in array[1:]:
        if mask.all():
            break
        np.logical_or(mask, channel != 0, out=mask)
    return mask
