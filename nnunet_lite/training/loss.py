"""Cross-entropy + soft Dice with deep supervision.

Dice: Drozdzal et al. 2016 (arXiv:1608.04117) in the form of nnU-Net: mean over the foreground channels of
(2 tp + s) / (sum p + sum y + s), s = 1e-5, over each sample, or over the whole batch (`batch_dice`). Both terms work on
class indices: no one-hot copy of the target is made.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from nnunet_lite.plan.schema import Plan
from nnunet_lite.settings import LossSettings

SMOOTH = 1e-5


def deep_supervision_weights(n_outputs: int) -> list[float]:
    """1, 1/2, 1/4 ... normalised, the coarsest output left out."""
    weights = [0.5**i for i in range(n_outputs)]
    if n_outputs > 1:
        weights[-1] = 0.0
    return [w / sum(weights) for w in weights]


def soft_dice(probabilities: Tensor, target: Tensor, valid: Tensor, batch_dice: bool) -> Tensor:
    """Mean soft Dice of the foreground classes.

    Parameters
    ----------
    probabilities : (batch, classes, *patch), softmax.
    target : (batch, *patch) class indices, all of them legal (0 where not valid).
    valid : (batch, *patch) 1 where the voxel counts, 0 where it is ignored.
    """
    batch, classes = probabilities.shape[:2]
    p = probabilities.flatten(2)
    y = target.reshape(batch, 1, -1)
    w = valid.reshape(batch, 1, -1).to(p.dtype)
    # millions of voxels are added one by one: in float32 the sums would be off by percents
    base = p.new_zeros(batch, classes, dtype=torch.float64)
    overlap = base.scatter_add(1, y[:, 0], (p.gather(1, y) * w)[:, 0].double())
    n_target = base.scatter_add(1, y[:, 0], w[:, 0].double())
    n_predicted = (p * w).sum(2, dtype=torch.float64)
    if batch_dice:
        overlap, n_target, n_predicted = overlap.sum(0), n_target.sum(0), n_predicted.sum(0)
    dice = (2 * overlap + SMOOTH) / (n_target + n_predicted + SMOOTH).clamp_min(1e-8)
    return dice[..., 1:].mean().to(p.dtype)


def region_dice(probabilities: Tensor, target: Tensor, valid: Tensor, batch_dice: bool) -> Tensor:
    """Mean soft Dice of overlapping regions; `target` is (batch, regions, *patch) of 0/1."""
    p, y = probabilities.flatten(2), target.flatten(2).to(probabilities.dtype)
    w = valid.flatten(1)[:, None].to(p.dtype)
    axes = (0, 2) if batch_dice else (2,)
    overlap = (p * y * w).sum(axes, dtype=torch.float64)
    total = (p * w).sum(axes, dtype=torch.float64) + (y * w).sum(axes, dtype=torch.float64)
    return ((2 * overlap + SMOOTH) / (total + SMOOTH).clamp_min(1e-8)).mean().to(p.dtype)


def segmentation_loss(
    logits: Tensor,
    classes: Tensor,
    *,
    batch_dice: bool,
    cross_entropy: float = 1.0,
    dice: float = 1.0,
    ignore_class: int | None = None,
    regions: Sequence[Sequence[int]] | None = None,
) -> Tensor:
    """cross_entropy * CE - dice * Dice of one output.

    Parameters
    ----------
    logits : (batch, channels, *patch).
    classes : (batch, *patch) class indices; `ignore_class` marks voxels that are not annotated.
    regions : the classes that make up each output channel, for region-based training (sigmoid, BCE + Dice).
    """
    logits = logits.float()
    classes = classes.long()
    valid = classes != ignore_class if ignore_class is not None else torch.ones_like(classes, dtype=torch.bool)
    known = torch.where(valid, classes, 0) if ignore_class is not None else classes
    n_valid = valid.sum().clamp_min(1)
    if regions is not None:
        target = torch.stack([torch.isin(known, known.new_tensor(list(r))) for r in regions], 1).to(logits.dtype)
        bce = F.binary_cross_entropy_with_logits(logits, target, reduction="none")
        ce = (bce * valid[:, None]).sum() / (n_valid * len(regions))
        overlap = region_dice(logits.sigmoid(), target, valid, batch_dice) if dice else logits.new_zeros(())
        return cross_entropy * ce - dice * overlap
    log_probabilities = logits.log_softmax(1)
    ce = -(log_probabilities.gather(1, known[:, None])[:, 0] * valid).sum() / n_valid
    overlap = soft_dice(log_probabilities.exp(), known, valid, batch_dice) if dice else logits.new_zeros(())
    return cross_entropy * ce - dice * overlap


def deep_supervision_loss(
    outputs: Tensor | list[Tensor], classes: Tensor, plan: Plan, configuration: str, weights: LossSettings
) -> Tensor:
    """Weighted sum of the losses of all outputs of a network, finest first; classes: (batch, *patch)."""
    outputs = outputs if isinstance(outputs, list) else [outputs]
    labels = plan.labels
    total = outputs[0].new_zeros((), dtype=torch.float32)
    for output, share in zip(outputs, deep_supervision_weights(len(outputs)), strict=True):
        if share:
            total = total + share * segmentation_loss(
                output,
                downsample_classes(classes, output.shape[2:]),
                batch_dice=plan.configuration(configuration).batch_dice,
                cross_entropy=weights.cross_entropy,
                dice=weights.dice,
                ignore_class=labels.ignore_class,
                regions=labels.region_classes if labels.has_regions else None,
            )
    return total


def downsample_classes(classes: Tensor, shape: Sequence[int]) -> Tensor:
    """Nearest-neighbour copy of (batch, *patch) class indices at the size of a deep-supervision output."""
    if tuple(classes.shape[1:]) == tuple(shape):
        return classes
    return F.interpolate(classes[:, None].float(), size=tuple(shape), mode="nearest-exact")[:, 0].to(classes.dtype)


def pseudo_dice_counts(
    logits: Tensor, classes: Tensor, regions: Sequence[Sequence[int]] | None, ignore_class: int | None = None
) -> Tensor:
    """Hard true positives, false positives and false negatives per scored channel: (3, foreground channels)."""
    if regions is None:
        predicted = logits.argmax(1)
        channels = range(1, logits.shape[1])
        hits = torch.stack([predicted == c for c in channels], 1)
        truth = torch.stack([classes == c for c in channels], 1)
    else:
        hits = logits > 0
        truth = torch.stack([torch.isin(classes, classes.new_tensor(list(r))) for r in regions], 1)
    if ignore_class is not None:
        hits = hits & (classes != ignore_class)[:, None]
    axes = (0, *range(2, hits.ndim))
    return torch.stack([(hits & truth).sum(axes), (hits & ~truth).sum(axes), (~hits & truth).sum(axes)])
