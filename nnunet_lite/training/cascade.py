"""What the first stage of a cascade predicted, as further input channels of the second, and its augmentation.

The second stage learns on predictions for cases that the first one had not seen, damaged further as nnU-Net damages
them, so that it neither trusts the first stage blindly nor does the work anew. Parameters are drawn apart from being
applied. The distributions were measured on nnU-Net 2.8.1; its balls are made by a Fourier transform and are up to a
voxel off, ours are exact.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from nnunet_lite.settings import AugmentationSettings

P_LABEL = 0.5  # of a sample that is changed, each label is with this probability
LARGEST_RADIUS = 7  # voxels
LARGEST_REMOVED = 0.15  # share of the patch; components from this size on are never removed
# a step grows the label by a ball (True), or what is not the label (False)
OPERATIONS = ((True,), (False,), (True, False), (False, True))  # dilate, erode, close, open


@dataclass(frozen=True)
class CascadeDraw:
    """What happens to the previous stage's labels in a batch; column i stands for class i + 1."""

    order: np.ndarray  # (batch, labels) the classes in the order in which they are changed: a later one overwrites
    operation: np.ndarray  # (batch, labels) index into OPERATIONS, -1 for none
    radius: np.ndarray  # (batch, labels) of the ball, voxels
    removed: np.ndarray  # (batch, labels) which component goes, as a share of their number; NaN for none

    @property
    def n_classes(self) -> int:
        return self.order.shape[1] + 1


def draw_cascade(
    rng: np.random.Generator, settings: AugmentationSettings | None, batch: int, n_classes: int
) -> CascadeDraw:
    """Draw the parameters of a batch; without settings nothing is changed."""
    size = (batch, n_classes - 1)

    def chosen(p: float) -> np.ndarray:
        return (rng.random((batch, 1)) < p) & (rng.random(size) < P_LABEL)

    change = chosen(0.0 if settings is None else settings.p_cascade_morphology)
    remove = chosen(0.0 if settings is None else settings.p_cascade_removal)
    return CascadeDraw(
        order=rng.permuted(np.tile(np.arange(1, n_classes), (batch, 1)), axis=1),
        operation=np.where(change, rng.integers(len(OPERATIONS), size=size), -1),
        radius=rng.integers(1, LARGEST_RADIUS + 1, size=size),
        removed=np.where(remove, rng.random(size), np.nan),
    )


def append_previous(images: Tensor, previous: Tensor, drawn: CascadeDraw) -> Tensor:
    """Images with one more channel for each foreground class of the previous stage's prediction.

    Parameters
    ----------
    images : (batch, channels, z, y, x).
    previous : (batch, z, y, x) classes, on the same device.

    Returns
    -------
    (batch, channels + n_classes - 1, z, y, x), type of the images.
    """
    changed = torch.stack([_changed(sample, drawn, i) for i, sample in enumerate(previous)])
    return torch.cat([images, one_hot(changed, drawn.n_classes).to(images.dtype)], 1)


def one_hot(classes: Tensor, n_classes: int) -> Tensor:
    """Classes (batch, *shape) -> bool (batch, n_classes - 1, *shape): a channel for each class but the background."""
    foreground = torch.arange(1, n_classes, device=classes.device, dtype=classes.dtype)  # bytes are compared as bytes
    return classes[:, None] == foreground.view(-1, *[1] * (classes.ndim - 1))


def _changed(classes: Tensor, drawn: CascadeDraw, sample: int) -> Tensor:
    """The map of one sample (z, y, x), damaged as drawn; the map itself where nothing was drawn."""
    for label in drawn.order[sample].tolist():
        operation = int(drawn.operation[sample, label - 1])
        if operation >= 0:
            classes = _morphed(classes, label, OPERATIONS[operation], int(drawn.radius[sample, label - 1]))
    if np.isnan(drawn.removed[sample]).all():
        return classes
    # finding components needs the host; one sample in five waits for it
    return torch.from_numpy(_without_components(classes.cpu().numpy().copy(), drawn.removed[sample])).to(classes.device)


def _morphed(classes: Tensor, label: int, steps: Sequence[bool], radius: int) -> Tensor:
    """The map with one label dilated, eroded, closed or opened by a ball; what it gains, the others lose."""
    box = _box_around(classes == label, radius * len(steps))
    if box is None:
        return classes
    part = classes[box]
    before = part == label
    after = before
    for grow in steps:
        after = grown(after, radius) if grow else ~grown(~after, radius)
    out = classes.clone()
    out[box] = torch.where(after, label, torch.where(before, 0, part)).to(part.dtype)
    return out


def _box_around(mask: Tensor, margin: int) -> tuple[slice, ...] | None:
    """Where a mask (z, y, x) is, with a margin; None for an empty one. On a GPU all of it: finding out has to wait."""
    if mask.device.type != "cpu":
        return (slice(None),) * mask.ndim
    spans = [torch.nonzero(mask.any(dim=tuple(a for a in range(mask.ndim) if a != axis))) for axis in range(mask.ndim)]
    if not len(spans[0]):
        return None
    return tuple(slice(max(0, int(span[0]) - margin), int(span[-1]) + 1 + margin) for span in spans)


def grown(mask: Tensor, radius: int) -> Tensor:
    """A mask (z, y, x) dilated by a ball: the voxels at most `radius` away from it.

    Squared distances, exact, are made axis by axis (Felzenszwalb and Huttenlocher, "Distance transforms of sampled
    functions", 2012), which takes a few dozen passes instead of one for each of a ball's thousands of voxels.
    Nothing comes in from outside, hence erosion does not start at the rim of the patch.
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


def _without_components(classes: np.ndarray, removed: np.ndarray) -> np.ndarray:
    """The map (z, y, x), in place, with one small component of each chosen label set to background."""
    from scipy.ndimage import find_objects, label

    boxes = find_objects(classes, len(removed))
    for number in np.flatnonzero(~np.isnan(removed)):
        if boxes[number] is None:
            continue
        part = classes[boxes[number]]
        components, _ = label(part == number + 1, np.ones((3,) * part.ndim))  # also those that touch at a corner
        small = np.flatnonzero(np.bincount(components.ravel())[1:] < LARGEST_REMOVED * classes.size) + 1
        if len(small):
            part[components == small[int(removed[number] * len(small))]] = 0
    return classes
