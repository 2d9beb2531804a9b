"""The predictions of a cascade's first stage as input channels of the second stage, and their augmentation.

The second stage learns on predictions of cases that the first one did not train on. They are damaged further, as in
nnU-Net, so that the second stage does not simply copy them. Parameters are drawn first (`draw_cascade`) and applied
later (`append_previous`). The distributions were measured on nnU-Net 2.8.1. Its balls are made by a Fourier transform
and are up to a voxel off; ours are exact.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from scipy import ndimage
from torch import Tensor

from nnunet_lite.data.geometry import bounding_box
from nnunet_lite.networks.unet import one_hot
from nnunet_lite.settings import AugmentationSettings
from nnunet_lite.training.augmentation import copy_to_device

P_LABEL = 0.5  # probability of a label to change, in a sample that is changed
LARGEST_RADIUS = 7  # voxels
LARGEST_REMOVED = 0.15  # share of the patch; components from this size on are never removed
# a step grows the label by a ball (True), or what is not the label (False)
OPERATIONS = ((True,), (False,), (True, False), (False, True))  # dilate, erode, close, open


@dataclass(frozen=True)
class CascadeDraw:
    """Changes of the previous stage's labels in a batch; column i is class i + 1.

    Parameters
    ----------
    order : ndarray of int, shape (batch, labels)
        Classes in the order in which they are changed: a later one overwrites.
    operation : ndarray of int, shape (batch, labels)
        Index into OPERATIONS, -1 for none.
    radius : ndarray of int, shape (batch, labels)
        Radius of the ball in voxels.
    removed : ndarray of float, shape (batch, labels)
        Which component is removed, as a fraction of their number; NaN for none.
    """

    order: np.ndarray
    operation: np.ndarray
    radius: np.ndarray
    removed: np.ndarray

    @property
    def n_classes(self) -> int:
        return self.order.shape[1] + 1


def draw_cascade(
    rng: np.random.Generator, settings: AugmentationSettings | None, batch: int, n_classes: int
) -> CascadeDraw:
    """Draw the changes of a batch; without settings there are none."""
    size = (batch, n_classes - 1)

    def choose(p: float) -> np.ndarray:
        return (rng.random((batch, 1)) < p) & (rng.random(size) < P_LABEL)

    change = choose(0.0 if settings is None else settings.p_cascade_morphology)
    remove = choose(0.0 if settings is None else settings.p_cascade_removal)
    return CascadeDraw(
        order=rng.permuted(np.tile(np.arange(1, n_classes), (batch, 1)), axis=1),
        operation=np.where(change, rng.integers(len(OPERATIONS), size=size), -1),
        radius=rng.integers(1, LARGEST_RADIUS + 1, size=size),
        removed=np.where(remove, rng.random(size), np.nan),
    )


def append_previous(images: Tensor, previous: Tensor, draw: CascadeDraw) -> Tensor:
    """Append a channel to images for each foreground class of the previous stage's prediction.

    Parameters
    ----------
    images : Tensor, shape (batch, channels, z, y, x)
        Intensities.
    previous : Tensor, shape (batch, z, y, x)
        Predicted classes, on the same device.
    draw : CascadeDraw
        Changes of the predicted classes.

    Returns
    -------
    Tensor, shape (batch, channels + n_classes - 1, z, y, x)
        Type of the images.
    """
    changed = torch.stack([_change_labels(sample, draw, i) for i, sample in enumerate(previous)])
    return torch.cat([images, one_hot(changed, draw.n_classes).to(images.dtype)], 1)


def _change_labels(classes: Tensor, draw: CascadeDraw, sample: int) -> Tensor:
    """Change the label map (z, y, x) of one sample as drawn."""
    for label in draw.order[sample].tolist():
        operation = int(draw.operation[sample, label - 1])
        if operation >= 0:
            classes = _change_shape(classes, label, OPERATIONS[operation], int(draw.radius[sample, label - 1]))
    if np.isnan(draw.removed[sample]).all():
        return classes
    # components are found on the host; one sample in five waits for it
    changed = _remove_components(classes.cpu().numpy().copy(), draw.removed[sample])
    return copy_to_device(torch.from_numpy(changed), classes.device)


def _change_shape(classes: Tensor, label: int, steps: Sequence[bool], radius: int) -> Tensor:
    """Dilate, erode, close or open one label of a map by a ball; other labels lose the voxels that it gains."""
    box = _find_box(classes == label, radius * len(steps))
    if box is None:
        return classes
    part = classes[box]
    before = part == label
    after = before
    for grow in steps:
        after = dilate(after, radius) if grow else ~dilate(~after, radius)
    out = classes.clone()
    out[box] = torch.where(after, label, torch.where(before, 0, part)).to(part.dtype)
    return out


def _find_box(mask: Tensor, margin: int) -> tuple[slice, ...] | None:
    """The bounding box of a mask (z, y, x) with a margin, None if empty; on a GPU the whole map, without a wait."""
    if mask.device.type != "cpu":
        return (slice(None),) * mask.ndim
    if not mask.any():
        return None
    return tuple(slice(max(0, low - margin), high + margin) for low, high in bounding_box(mask.numpy()))


def dilate(mask: Tensor, radius: int) -> Tensor:
    """Dilate a mask (z, y, x) by a ball: return the voxels at most `radius` away from it.

    Exact squared distances are computed axis by axis (Felzenszwalb and Huttenlocher, "Distance transforms of sampled
    functions", 2012), in a few dozen passes instead of one for each of a ball's thousands of voxels. The border of the
    patch does not count as background, so erosion does not start there.
    """
    limit = radius * radius  # 2 * limit + 1 fits a byte up to a radius of 11
    distance = torch.where(mask, 0, limit + 1).to(torch.uint8)
    for axis, size in enumerate(mask.shape):
        before, distance = distance, distance.clone()
        for step in range(1, min(radius, size - 1) + 1):
            low, high = distance.narrow(axis, 0, size - step), distance.narrow(axis, step, size - step)
            low.copy_(torch.minimum(low, before.narrow(axis, step, size - step) + step * step))
            high.copy_(torch.minimum(high, before.narrow(axis, 0, size - step) + step * step))
    return distance <= limit


def _remove_components(classes: np.ndarray, removed: np.ndarray) -> np.ndarray:
    """Set one small component of each chosen label of a map (z, y, x) to background, in place."""
    boxes = ndimage.find_objects(classes, len(removed))
    for number in np.flatnonzero(~np.isnan(removed)):
        if boxes[number] is None:
            continue
        part = classes[boxes[number]]
        components, _ = ndimage.label(part == number + 1, np.ones((3,) * part.ndim))  # touching at a corner counts
        small = np.flatnonzero(np.bincount(components.ravel())[1:] < LARGEST_REMOVED * classes.size) + 1
        if len(small):
            part[components == small[int(removed[number] * len(small))]] = 0
    return classes
