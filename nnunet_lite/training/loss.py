"""Cross-entropy, soft Dice, top-k and binary cross-entropy with deep supervision, for classes and for regions.

Dice: Drozdzal et al. 2016 (arXiv:1608.04117) in the form of nnU-Net: mean over the foreground channels of
(2 tp + s) / (sum p + sum y + s), s = 1e-5, over each sample, or over the whole batch (`batch_dice`). Top-k: Wu et al.
2016 (arXiv:1605.06885). All terms work on class indices: no one-hot copy of the target is made.

Every sum that enters a ratio goes through `reduce`. Where it sums over the ranks of a data-parallel run
(`distributed.sum_over_ranks`), each rank has the loss of the whole batch, however unequally it is split.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor

from nnunet_lite.data.labels import Labels
from nnunet_lite.errors import UserError
from nnunet_lite.planning.schema import Plan
from nnunet_lite.settings import LossSettings

SMOOTH = 1e-5

Reduce = Callable[[Tensor], Tensor]
Regions = tuple[tuple[int, ...], ...]


def alone(sums: Tensor) -> Tensor:
    """The `reduce` of a single process: its sums are those of the whole batch."""
    return sums


def check_weights(settings: LossSettings, labels: Labels) -> None:
    """Refuse class weights that do not fit the labels.

    Raises
    ------
    UserError : not one weight per class (background first) or region, or none left for the Dice term.
    """
    weights = settings.class_weights
    if weights is None:
        return
    names = labels.region_names if labels.has_regions else ("background", *labels.region_names)
    if len(weights) != len(names):
        kind = "regions" if labels.has_regions else "classes"
        what = f"loss.class_weights has {len(weights)} numbers for {len(names)} {kind}"
        raise UserError(what, fix=f"Give one for each of: {', '.join(names)}.")
    if settings.dice and not labels.has_regions and not any(weights[1:]):
        what = "loss.class_weights leaves the Dice term without a class, for it has none of the background"
        raise UserError(what, fix="Give a foreground class a weight, or set loss.dice to 0.")


def deep_supervision_weights(n_outputs: int) -> list[float]:
    """1, 1/2, 1/4 ... normalised, the coarsest output left out."""
    weights = [0.5**i for i in range(n_outputs)]
    if n_outputs > 1:
        weights[-1] = 0.0
    return [w / sum(weights) for w in weights]


def deep_supervision_loss(
    outputs: Tensor | list[Tensor],
    classes: Tensor,
    plan: Plan,
    configuration: str,
    settings: LossSettings,
    reduce: Reduce = alone,
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
                settings,
                batch_dice=plan.configuration(configuration).batch_dice,
                ignore_class=labels.ignore_class,
                regions=labels.region_classes if labels.has_regions else None,
                reduce=reduce,
            )
    return total


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
    """The weighted terms of one output: CE + top-k + BCE - Dice.

    Parameters
    ----------
    logits : (batch, channels, *patch).
    classes : (batch, *patch) class indices; `ignore_class` marks voxels that are not annotated.
    regions : the classes that make up each output channel, for region-based training: sigmoid instead of softmax, and
        binary cross-entropy instead of cross-entropy.
    reduce : sums a tensor over all processes that hold a part of the batch, with gradient.
    """
    logits, classes = logits.float(), classes.long()
    valid = None
    if ignore_class is not None:
        valid = classes != ignore_class
        classes = torch.where(valid, classes, 0)
    given = settings.class_weights
    weights = None if given is None else _constant(given, logits.device)
    of = _region_loss if regions is not None else _class_loss
    return of(logits, classes, valid, weights, settings, batch_dice, regions or (), reduce)


def _class_loss(
    logits: Tensor,
    classes: Tensor,
    valid: Tensor | None,
    weights: Tensor | None,
    settings: LossSettings,
    batch_dice: bool,
    _: Regions,
    reduce: Reduce,
) -> Tensor:
    """Of exclusive classes; all of `classes` are legal (0 where not valid)."""
    log_probabilities = logits.log_softmax(1)
    loss = logits.new_zeros(())
    if settings.cross_entropy or settings.top_k:
        entropy = -log_probabilities.gather(1, classes[:, None])[:, 0]
        of_class = torch.ones_like(entropy) if weights is None else weights[classes]
        entropy, counted = entropy * of_class, of_class
        if valid is not None:
            entropy, counted = entropy * valid, of_class * valid
        loss = loss + settings.cross_entropy * _ratio(
            entropy.sum(dtype=torch.float64), counted.sum(dtype=torch.float64), reduce
        )
        if settings.top_k:
            loss = loss + settings.top_k * _top_k(entropy, of_class, settings.top_k_share, reduce)
    if settings.bce:
        loss = loss + settings.bce * _binary_of_classes(logits, classes, valid, weights, reduce)
    if settings.dice:
        overlap, total = class_sums(log_probabilities.exp(), classes, valid)
        loss = loss - settings.dice * _dice(overlap[:, 1:], total[:, 1:], _foreground(weights), batch_dice, reduce)
    return loss


def _region_loss(
    logits: Tensor,
    classes: Tensor,
    valid: Tensor | None,
    weights: Tensor | None,
    settings: LossSettings,
    batch_dice: bool,
    regions: Regions,
    reduce: Reduce,
) -> Tensor:
    """Of overlapping regions, each a binary problem."""
    target = _membership(regions, logits.device)[:, classes].transpose(0, 1)
    binary = settings.cross_entropy + settings.bce
    loss = logits.new_zeros(())
    if binary or settings.top_k:
        entropy = F.binary_cross_entropy_with_logits(logits, target, reduction="none")
        of_region = torch.ones_like(entropy)
        if weights is not None:
            of_region = of_region * weights.reshape(1, -1, *(1 for _ in logits.shape[2:]))
        entropy, counted = entropy * of_region, of_region
        if valid is not None:
            # nnU-Net divides by the voxels, not by voxels and regions, where a data set has an ignore label
            entropy, counted = entropy * valid[:, None], of_region * valid[:, None] / len(regions)
        loss = loss + binary * _ratio(entropy.sum(dtype=torch.float64), counted.sum(dtype=torch.float64), reduce)
        if settings.top_k:
            loss = loss + settings.top_k * _top_k(entropy, of_region, settings.top_k_share, reduce)
    if settings.dice:
        overlap, total = region_sums(logits.sigmoid(), target, valid)
        loss = loss - settings.dice * _dice(overlap, total, weights, batch_dice, reduce)
    return loss


def _foreground(weights: Tensor | None) -> Tensor | None:
    return None if weights is None else weights[1:]


def _ratio(numerator: Tensor, denominator: Tensor, reduce: Reduce) -> Tensor:
    """Quotient of two sums over the whole batch; 0 where nothing was counted."""
    above, below = reduce(torch.stack((numerator, denominator)))
    return (above / below.clamp_min(1e-8)).float()


def class_sums(probabilities: Tensor, classes: Tensor, valid: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """What Dice is made of, per sample and class: sum(p y) and sum(p) + sum(y), each (batch, classes) in float64.

    Parameters
    ----------
    probabilities : (batch, classes, *patch).
    classes : (batch, *patch) class indices, all of them legal.
    valid : (batch, *patch) True where the voxel counts; None: everywhere.
    """
    p, y = probabilities.flatten(2), classes.flatten(1)
    at_y = p.gather(1, y[:, None])[:, 0]
    ones = torch.ones_like(at_y)
    if valid is not None:
        ones = valid.flatten(1).to(p.dtype)
        p, at_y = p * ones[:, None], at_y * ones
    # millions of voxels are added one by one: in float32 the sums would be off by percents
    base = p.new_zeros(p.shape[:2], dtype=torch.float64)
    overlap = base.scatter_add(1, y, at_y.double())
    n_target = base.scatter_add(1, y, ones.double())
    return overlap, n_target + p.sum(2, dtype=torch.float64)


def region_sums(probabilities: Tensor, target: Tensor, valid: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """The same for overlapping regions; `target` is (batch, regions, *patch) of 0/1."""
    p, y = probabilities.flatten(2), target.flatten(2)
    if valid is not None:
        ones = valid.flatten(1)[:, None].to(p.dtype)
        p, y = p * ones, y * ones
    return (p * y).sum(2, dtype=torch.float64), (p + y).sum(2, dtype=torch.float64)


def _dice(overlap: Tensor, total: Tensor, weights: Tensor | None, batch_dice: bool, reduce: Reduce) -> Tensor:
    """Mean Dice over channels, and over samples unless `batch_dice`, from their sums (batch, channels)."""
    if batch_dice:
        overlap, total = reduce(torch.stack((overlap.sum(0), total.sum(0))))
    dice = (2 * overlap + SMOOTH) / (total + SMOOTH).clamp_min(1e-8)
    of_sample = dice.mean(-1) if weights is None else (dice * weights).sum(-1) / weights.sum()
    if batch_dice:
        return of_sample.float()
    return _ratio(of_sample.sum(), of_sample.new_full((), len(of_sample)), reduce)


def _top_k(entropy: Tensor, weights: Tensor, share: float, reduce: Reduce) -> Tensor:
    """Mean of the largest `share` of all values of the batch, ignored voxels counted as 0 as nnU-Net counts them."""
    values = entropy.flatten()
    k = (reduce(values.new_full((), values.numel(), dtype=torch.float64)) * share + 1e-6).floor().clamp_min(1)
    least = _kth_largest(values, k, reduce)
    above, equal = values > least, values == least
    n_above, n_equal = reduce(torch.stack((above.sum(), equal.sum())))
    chosen = above + equal * ((k - n_above) / n_equal).float()  # what is equal shares the places that are left
    return _ratio(
        (chosen * values).sum(dtype=torch.float64), (chosen * weights.flatten()).sum(dtype=torch.float64), reduce
    )


def _kth_largest(values: Tensor, k: Tensor, reduce: Reduce) -> Tensor:
    """The k-th largest of the values of all ranks, none of which is negative, without a gradient.

    The bit patterns of such floats are ordered as they are: the one looked for is found bit by bit, by counting.
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
    every = of_class.reshape(1, -1, *(1 for _ in logits.shape[2:]))
    entropy = (F.softplus(logits) * every).sum(1) - logits.gather(1, classes[:, None])[:, 0] * of_class[classes]
    counted = torch.ones_like(entropy) if valid is None else valid.float()
    total = (entropy * counted).sum(dtype=torch.float64)
    return _ratio(total, counted.sum(dtype=torch.float64) * of_class.sum(), reduce)


@lru_cache(maxsize=16)
def _constant(values: tuple[float, ...], device: torch.device) -> Tensor:
    """A tensor made once: copying one to a GPU in every step would wait for it."""
    return torch.tensor(values, device=device)


@lru_cache(maxsize=16)
def _membership(regions: Regions, device: torch.device) -> Tensor:
    """1.0 where a class belongs to a region: (regions, classes)."""
    n_classes = 1 + max(max(region) for region in regions)
    return torch.tensor([[float(c in region) for c in range(n_classes)] for region in regions], device=device)


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
