"""Cross-entropy, soft Dice, top-k, binary cross-entropy and component Dice with deep supervision.

Dice: Drozdzal et al. 2016 (arXiv:1608.04117) in the form of nnU-Net: mean over the foreground channels of
(2 tp + s) / (sum p + sum y + s), s = 1e-5, over each sample, or over the whole batch (`batch_dice`). Top-k: Wu et al.
2016 (arXiv:1605.06885). Component Dice: Bouteille et al. 2025 (arXiv:2511.17146), of every lesion alone. All other
terms work on class indices, without a one-hot copy of the target.

Every sum that enters a ratio goes through `reduce`. Where that sums over the ranks of a data-parallel run
(`distributed.sum_over_ranks`), each rank has the loss of the whole batch, even if it is split unequally. Read
`segmentation_loss` first; to add a term, add its weight to `LossSettings` and the term there.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any

import cc3d
import numpy as np
import torch
import torch.nn.functional as F
from scipy.ndimage import distance_transform_edt
from torch import Tensor

from nnunet_lite.data.labels import Labels
from nnunet_lite.errors import UserError
from nnunet_lite.networks.unet import one_hot
from nnunet_lite.planning.schema import Plan
from nnunet_lite.settings import LossSettings

SMOOTH = 1e-5

Reduce = Callable[[Tensor], Tensor]
Regions = tuple[tuple[int, ...], ...]


def alone(sums: Tensor) -> Tensor:
    """Return the sums of a single process: they are those of the whole batch."""
    return sums


def check_weights(settings: LossSettings, labels: Labels) -> None:
    """Refuse class weights that do not fit the labels.

    Raises
    ------
    UserError
        Not one weight per class (background first) or region, or none left for the Dice term.
    """
    weights = settings.class_weights
    if weights is None:
        return
    names = labels.region_names if labels.has_regions else ("background", *labels.region_names)
    if len(weights) != len(names):
        what = f"loss.class_weights has {len(weights)} numbers, not {len(names)}"
        raise UserError(what, fix=f"Give one for each of: {', '.join(names)}.")
    if settings.dice and not labels.has_regions and not any(weights[1:]):
        raise UserError("loss.class_weights has none for the foreground", fix="Give it one, or set loss.dice to 0.")


def deep_supervision_loss(
    outputs: Tensor | list[Tensor],
    classes: Tensor,
    plan: Plan,
    configuration: str,
    settings: LossSettings,
    teacher: Tensor | None = None,
    reduce: Reduce = alone,
) -> Tensor:
    """Return the weighted sum of the losses of all outputs of a network.

    Parameters
    ----------
    outputs : Tensor or list of Tensor
        Logits (batch, channels, *patch), finest first.
    classes : Tensor, shape (batch, *patch)
        Class indices.
    plan, configuration : Plan, str
        Labels and batch Dice.
    settings : LossSettings
        Weights of the terms.
    teacher : Tensor, shape (batch, foreground channels, *patch), optional
        Probabilities that other models predict, of each class but the background, or of each region.
    reduce : callable
        Sums over ranks, see the module.
    """
    outputs = outputs if isinstance(outputs, list) else [outputs]
    labels = plan.labels
    total = outputs[0].new_zeros((), dtype=torch.float32)
    for output, weight in zip(outputs, deep_supervision_weights(len(outputs)), strict=True):
        loss = segmentation_loss(
            output,
            downsample_classes(classes, output.shape[2:]),
            settings,
            batch_dice=plan.configuration(configuration).batch_dice,
            ignore_class=labels.ignore_class,
            regions=labels.region_classes if labels.has_regions else None,
            reduce=reduce,
        )
        if teacher is not None:
            flat = downsample_classes(teacher.flatten(0, 1), output.shape[2:])
            divergence = distillation_loss(output, flat.unflatten(0, teacher.shape[:2]), labels.has_regions, reduce)
            loss = (1 - settings.distillation) * loss + settings.distillation * divergence
        total = total + weight * loss
    return total


def deep_supervision_weights(n_outputs: int) -> list[float]:
    """Return 1, 1/2, 1/4 ... normalized."""
    weights = [0.5**i for i in range(n_outputs)]
    return [w / sum(weights) for w in weights]


def segmentation_loss(
    logits: Tensor,
    classes: Tensor,
    settings: LossSettings,
    *,
    batch_dice: bool,
    ignore_class: int | None = None,
    regions: Regions | None = None,
    reduce: Reduce = alone,
) -> Tensor:
    """Return the weighted terms of one output: CE + top-k + BCE - Dice - component Dice.

    Parameters
    ----------
    logits : Tensor, shape (batch, channels, *patch)
        Output of the network.
    classes : Tensor, shape (batch, *patch)
        Class indices.
    settings : LossSettings
        Weights of the terms and of the classes.
    batch_dice : bool
        Whether Dice is that of the whole batch, not the mean over samples.
    ignore_class : int, optional
        Marks voxels that are not annotated.
    regions : tuple of tuple of int, optional
        Classes of each output channel, for region-based training: sigmoid instead of softmax, and binary cross-entropy
        instead of cross-entropy.
    reduce : callable
        Sums a tensor over all processes that hold a part of the batch, with gradient.
    """
    logits, classes = logits.float(), classes.long()
    valid = None if ignore_class is None else classes != ignore_class
    classes = classes if valid is None else torch.where(valid, classes, 0)
    weights = None if settings.class_weights is None else _constant(settings.class_weights, logits.device)
    ce, bce = settings.cross_entropy, settings.bce
    if regions is None:
        log_probabilities = logits.log_softmax(1)
    else:  # overlapping regions are binary problems
        target = _membership(regions, logits.device)[:, classes].transpose(0, 1)
        ce, bce = ce + bce, 0.0
    loss = logits.new_zeros(())
    if ce or settings.top_k:
        if regions is None:
            entropy = -log_probabilities.gather(1, classes[:, None])[:, 0]
            factor = torch.ones_like(entropy) if weights is None else weights[classes]
            annotated, n_counts = valid, 1
        else:
            entropy = F.binary_cross_entropy_with_logits(logits, target, reduction="none")
            factor = torch.ones_like(entropy) * (1.0 if weights is None else _over_positions(weights, logits))
            # nnU-Net divides by the voxels, not by voxels and regions, where a dataset has an ignore label
            annotated, n_counts = (None, 1) if valid is None else (valid[:, None], len(regions))
        entropy, counted = entropy * factor, factor
        if annotated is not None:
            entropy, counted = entropy * annotated, factor * annotated / n_counts
        loss = loss + ce * _ratio(entropy, counted, reduce)
        if settings.top_k:
            loss = loss + settings.top_k * _top_k(entropy, factor, settings.top_k_share, reduce)
    if bce:
        loss = loss + bce * _binary_of_classes(logits, classes, valid, weights, reduce)
    if regions is None:  # Dice is that of the foreground
        weights = None if weights is None else weights[1:]
    if settings.dice:
        if regions is None:
            overlap, total = (sums[:, 1:] for sums in class_sums(log_probabilities.exp(), classes, valid))
        else:
            overlap, total = region_sums(logits.sigmoid(), target, valid)
        loss = loss - settings.dice * _dice(overlap, total, weights, batch_dice, reduce)
    if settings.component_dice:
        if regions is None:
            p, y = log_probabilities.exp()[:, 1:], one_hot(classes, logits.shape[1])
        else:
            p, y = logits.sigmoid(), target
        p = p if valid is None else p * valid[:, None]
        loss = loss - settings.component_dice * _component_dice(p, y.to(p.dtype), weights, reduce)
    return loss


def distillation_loss(logits: Tensor, teacher: Tensor, regions: bool = False, reduce: Reduce = alone) -> Tensor:
    """Return the mean Kullback-Leibler divergence of a network's probabilities from those of other models.

    Source: Hinton, Vinyals and Dean 2015 (arXiv:1503.02531), at a temperature of 1. Every voxel counts, those that are
    not annotated too: there the teacher is the annotator.

    Parameters
    ----------
    logits : Tensor, shape (batch, channels, *patch)
        Output of the network.
    teacher : Tensor, shape (batch, foreground channels, *patch)
        Probabilities of each class but the background, or of each region.
    regions : bool
        Whether channels are regions, each of which is a binary problem; the mean over them counts.
    reduce : callable
        Sums over ranks, see the module.
    """
    logits, teacher = logits.float(), teacher.clamp(0, 1)  # interpolation rounds up, and the logarithm of -1e-7 is nan
    if regions:
        log_probabilities = torch.cat([F.logsigmoid(logits), F.logsigmoid(-logits)], 1)
        target = torch.cat([teacher, 1 - teacher], 1)
    else:
        log_probabilities = logits.log_softmax(1)
        target = torch.cat([(1 - teacher.sum(1, keepdim=True)).clamp_min(0), teacher], 1)
    divergence = F.kl_div(log_probabilities, target, reduction="none").sum(1) / (logits.shape[1] if regions else 1)
    return _ratio(divergence, torch.ones_like(divergence), reduce)


def _over_positions(weights: Tensor, logits: Tensor) -> Tensor:
    """Weights (channels,) so that they broadcast over (batch, channels, *patch)."""
    return weights.reshape(1, -1, *(1 for _ in logits.shape[2:]))


def _ratio(numerator: Tensor, denominator: Tensor, reduce: Reduce) -> Tensor:
    """Quotient of the sums of two tensors over the whole batch; 0 where nothing counts."""
    above, below = reduce(torch.stack([x.sum(dtype=sum_dtype(x.device)) for x in (numerator, denominator)]))
    return (above / below.clamp_min(1e-8)).float()


def class_sums(probabilities: Tensor, classes: Tensor, valid: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Return the sums of Dice per sample and class: sum(p y) and sum(p) + sum(y), each (batch, classes) in float64.

    Parameters
    ----------
    probabilities : Tensor, shape (batch, classes, *patch)
        Softmax of the logits.
    classes : Tensor, shape (batch, *patch)
        Class indices, all of them legal.
    valid : Tensor, shape (batch, *patch), optional
        True where the voxel counts; None for everywhere.
    """
    p, y = probabilities.flatten(2), classes.flatten(1)
    at_y = p.gather(1, y[:, None])[:, 0]
    ones = torch.ones_like(at_y)
    if valid is not None:
        ones = valid.flatten(1).to(p.dtype)
        p, at_y = p * ones[:, None], at_y * ones
    overlap, n_target = (_sum_by_class(values, y, p.shape[1]) for values in (at_y, ones))
    return overlap, n_target + p.sum(2, dtype=sum_dtype(p.device))


def _sum_by_class(values: Tensor, classes: Tensor, n_classes: int) -> Tensor:
    """Sums of values (batch, voxels) over the voxels of each class: (batch, classes)."""
    if values.device.type == "cpu":
        # voxels are added one by one: in float32 the sums of millions would be off by percents
        base = values.new_zeros((len(values), n_classes), dtype=torch.float64)
        return base.scatter_add(1, classes, values.double())
    return SumByClass.apply(values, classes, n_classes)


class SumByClass(torch.autograd.Function):
    """The sums of `_sum_by_class` on a GPU.

    There a scatter of millions of voxels to a few sums waits at each of them. Products with `classes == c` do not,
    and need the memory of one class at a time. The backward pass keeps nothing but the classes.
    """

    @staticmethod
    def forward(context: Any, values: Tensor, classes: Tensor, n_classes: int) -> Tensor:
        context.save_for_backward(classes)
        narrow, dtype = classes.to(torch.uint8 if n_classes <= 256 else torch.int32), sum_dtype(values.device)
        return torch.stack([(values * (narrow == c)).sum(1, dtype=dtype) for c in range(n_classes)], 1)

    @staticmethod
    def backward(context: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        (classes,) = context.saved_tensors
        return gradient.float().gather(1, classes), None, None


def sum_dtype(device: torch.device) -> torch.dtype:
    """Return the type of large sums: float64, but on MPS, which has none and adds float32 in pairs."""
    return torch.float32 if device.type == "mps" else torch.float64


def region_sums(probabilities: Tensor, target: Tensor, valid: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Return the sums of Dice for overlapping regions; `target` is (batch, regions, *patch) of 0 and 1."""
    p, y = probabilities.flatten(2), target.flatten(2)
    if valid is not None:
        ones = valid.flatten(1)[:, None].to(p.dtype)
        p, y = p * ones, y * ones
    return (p * y).sum(2, dtype=sum_dtype(p.device)), (p + y).sum(2, dtype=sum_dtype(p.device))


def _dice(overlap: Tensor, total: Tensor, weights: Tensor | None, batch_dice: bool, reduce: Reduce) -> Tensor:
    """Mean Dice over channels, and over samples unless `batch_dice`, from their sums (batch, channels)."""
    if batch_dice:
        overlap, total = reduce(torch.stack((overlap.sum(0), total.sum(0))))
    dice = (2 * overlap + SMOOTH) / (total + SMOOTH).clamp_min(1e-8)
    of_sample = dice.mean(-1) if weights is None else (dice * weights).sum(-1) / weights.sum()
    if batch_dice:
        return of_sample.float()
    return _ratio(of_sample, torch.ones_like(of_sample), reduce)


def _component_dice(p: Tensor, y: Tensor, weights: Tensor | None, reduce: Reduce) -> Tensor:
    """Mean Dice over the components of all samples and channels (batch, channels, *patch), each in its own region."""
    above, below = 0 * p.sum(), p.new_zeros(())  # without a component the gradient is 0
    for sample, channel in y.flatten(2).any(2).nonzero().tolist():
        nearest, n = nearest_components(y[sample, channel])
        one_p, one_y = (values[sample, channel].reshape(1, -1) for values in (p, y))
        overlap, total = (_sum_by_class(values, nearest.reshape(1, -1), n) for values in (one_p * one_y, one_p + one_y))
        weight = p.new_ones(()) if weights is None else weights[channel]
        above = above + weight * ((2 * overlap + SMOOTH) / (total + SMOOTH)).sum()
        below = below + weight * n
    return _ratio(above, below, reduce)


def nearest_components(mask: Tensor) -> tuple[Tensor, int]:
    """Return which connected component is nearest to each voxel, by distance in voxels, and how many there are.

    Parameters
    ----------
    mask : Tensor, shape (z, y, x) or (y, x)
        Not 0 in at least one voxel. On a GPU it is copied to the CPU and back.

    Returns
    -------
    tuple of Tensor and int
        Numbers from 0, of the shape of the mask, and their count.
    """
    inside = mask.bool().cpu().numpy()
    numbers, n = cc3d.connected_components(inside, connectivity=26 if mask.ndim == 3 else 8, return_N=True)
    nearest = distance_transform_edt(~inside, return_distances=False, return_indices=True)
    return torch.from_numpy(numbers[tuple(nearest)].astype(np.int64) - 1).to(mask.device), n


def _top_k(entropy: Tensor, weights: Tensor, share: float, reduce: Reduce) -> Tensor:
    """Mean of the largest `share` of all values of the batch, ignored voxels counted as 0 as nnU-Net counts them."""
    values = entropy.flatten()
    n_values = reduce(values.new_full((), values.numel(), dtype=sum_dtype(values.device)))
    k = (n_values * share + 1e-6).floor().clamp_min(1)
    least = _kth_largest(values, k, reduce)
    above, equal = values > least, values == least
    n_above, n_equal = reduce(torch.stack((above.sum(), equal.sum())))
    chosen = above + equal * ((k - n_above) / n_equal).float()  # equal values share the remaining places
    return _ratio(chosen * values, chosen * weights.flatten(), reduce)


def _kth_largest(values: Tensor, k: Tensor, reduce: Reduce) -> Tensor:
    """The k-th largest of the non-negative values of all ranks, without a gradient.

    The bit patterns of such floats have the order of the floats, so it is found bit by bit, by counting.
    """
    bits = values.detach().view(torch.int32)
    found = bits.new_zeros(())
    for bit in range(30, -1, -1):
        higher = found + (1 << bit)
        found = torch.where(reduce((bits >= higher).sum()) >= k, higher, found)
    return found.view(torch.float32)


def _binary_of_classes(
    logits: Tensor, classes: Tensor, valid: Tensor | None, weights: Tensor | None, reduce: Reduce
) -> Tensor:
    """Mean binary cross-entropy of each class against the rest: sum over classes of softplus(x) - x y."""
    of_class = logits.new_ones(logits.shape[1]) if weights is None else weights
    every = _over_positions(of_class, logits)
    entropy = (F.softplus(logits) * every).sum(1) - logits.gather(1, classes[:, None])[:, 0] * of_class[classes]
    counted = torch.ones_like(entropy) if valid is None else valid.float()
    return _ratio(entropy * counted, counted.sum(dtype=sum_dtype(logits.device)) * of_class.sum(), reduce)


@lru_cache(maxsize=16)
def _constant(values: tuple[float, ...], device: torch.device) -> Tensor:
    """A tensor that is made once: copying one to a GPU in every step would wait for it."""
    return torch.tensor(values, device=device)


@lru_cache(maxsize=16)
def _membership(regions: Regions, device: torch.device) -> Tensor:
    """1.0 where a class belongs to a region: (regions, classes)."""
    n_classes = 1 + max(max(region) for region in regions)
    return torch.tensor([[float(c in region) for c in range(n_classes)] for region in regions], device=device)


def downsample_classes(classes: Tensor, shape: Sequence[int]) -> Tensor:
    """Return class indices (batch, *patch), to the nearest voxel, at the size of a deep-supervision output."""
    steps = [size // n for size, n in zip(classes.shape[1:], shape, strict=True)]
    if all(n * step == size for n, step, size in zip(shape, steps, classes.shape[1:], strict=True)):
        return classes[(slice(None), *(slice(step // 2, None, step) for step in steps))]
    return F.interpolate(classes[:, None].float(), size=tuple(shape), mode="nearest-exact")[:, 0].to(classes.dtype)


def pseudo_dice_counts(logits: Tensor, classes: Tensor, labels: Labels) -> Tensor:
    """Return true positives, false positives and false negatives of hard labels: (3, foreground channels)."""
    hits = logits > 0 if labels.has_regions else one_hot(logits.argmax(1), logits.shape[1])
    members = [torch.stack([classes == c for c in region]).any(0) for region in labels.region_classes]
    truth = torch.stack(members, 1)
    if labels.ignore_class is not None:
        hits = hits & (classes != labels.ignore_class)[:, None]
    axes = (0, *range(2, hits.ndim))
    return torch.stack([(hits & truth).sum(axes), (hits & ~truth).sum(axes), (~hits & truth).sum(axes)])
