"""Labels that change places when left and right do: in training, and in mirrored copies when predicting.

Where a left and a right organ are two labels, a mirrored image shows the right one on the left side. Without a swap,
mirroring that axis teaches the network that the two are one. `swap_of` reads the settings; the tables follow.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass

from nnunet_lite import log
from nnunet_lite.data.labels import Labels
from nnunet_lite.errors import UserError, suggest
from nnunet_lite.planning.schema import Plan
from nnunet_lite.settings import AugmentationSettings

Pairs = Sequence[tuple[str, str]]
_KEY = "augmentation.mirror_swap"


@dataclass(frozen=True)
class ClassSwap:
    """A change of classes in samples that are mirrored along one axis.

    Parameters
    ----------
    axis : int
        Axis of (z, y, x).
    table : tuple of int
        The class that each class becomes, see `make_swap_table`.
    channels : tuple of int
        For each output channel, the one that takes its place, see `swap_channels`.
    """

    axis: int
    table: tuple[int, ...]
    channels: tuple[int, ...]


def swap_of(plan: Plan, settings: AugmentationSettings, dimensions: int) -> ClassSwap | None:
    """Return how a configuration's labels are swapped.

    Parameters
    ----------
    plan : Plan
        Plan with the labels and the axis order.
    settings : AugmentationSettings
        `mirror_swap` has pairs of label names, `mirror_swap_axis` an axis of the patch. By default it is the axis from
        left to right in the plan's orientation, or the image's x axis where the plan has none.
    dimensions : int
        2 or 3; a two-dimensional patch may not have that axis.

    Returns
    -------
    ClassSwap or None
        None without pairs, or where the patch does not have the axis.
    """
    if not settings.mirror_swap or (axis := _find_axis(plan, settings, dimensions)) < 3 - dimensions:
        return None
    pairs = settings.mirror_swap
    return ClassSwap(axis, make_swap_table(plan.labels, pairs), swap_channels(plan.labels, pairs))


def _find_axis(plan: Plan, settings: AugmentationSettings, dimensions: int) -> int:
    """Return the axis of (z, y, x) from left to right."""
    if settings.mirror_swap_axis is not None:
        return settings.mirror_swap_axis + 3 - dimensions
    sideways = next(i for i, letter in enumerate(plan.orientation or "LAS") if letter in "LR")
    return plan.axis_order.index(2 - sideways)


def warn_of_lost_swaps(
    model: str, earlier: AugmentationSettings, own: AugmentationSettings, plan: Plan, dimensions: int
) -> None:
    """Warn if a run mirrors from left to right without swapping labels that an earlier model swaps.

    Parameters
    ----------
    model : str
        The model to start or to learn from.
    earlier, own : AugmentationSettings
        Its settings, and those of the run.
    plan, dimensions : Plan, int
        Of the run, as for `swap_of`.
    """
    mirrored = [axis + 3 - dimensions for axis in own.mirrored_axes(dimensions)]
    known = {name for pair in earlier.mirror_swap for name in pair} <= set(plan.labels.region_names)
    if earlier.mirror_swap and known and not own.mirror_swap and _find_axis(plan, earlier, dimensions) in mirrored:
        pairs = json.dumps(earlier.mirror_swap)
        log.warn(f"{model} swaps labels where it mirrors from left to right; this run mirrors without that, and would "
                 f"confuse them: --set '{_KEY}={pairs}' swaps them")  # fmt: skip


def check_swaps(labels: Labels, settings: AugmentationSettings, dimensions: int) -> None:
    """Make sure before training that labels can be swapped as the settings say.

    Raises
    ------
    UserError
        Unknown names, names in two pairs, ambiguous regions, or an axis that the patch does not have.
    """
    make_swap_table(labels, settings.mirror_swap)
    axis = settings.mirror_swap_axis
    if axis is not None and axis >= dimensions:
        fix = f"Give 0 to {dimensions - 1}."
        raise UserError(f"{_KEY}_axis = {axis} is not an axis of a patch with {dimensions}", fix=fix)


def make_swap_table(labels: Labels, pairs: Pairs) -> tuple[int, ...]:
    """Return the class that each class becomes, the ignore and the outside class included.

    Where labels are regions, the classes of swapped regions change places; a class becomes the one that is in the
    swapped regions.

    Raises
    ------
    UserError
        A name is not a label or is in two pairs, or the regions do not determine what a class becomes.
    """
    partner = _partners(labels, pairs)
    members = dict(zip(labels.region_names, labels.region_classes, strict=True))
    regions = [frozenset(name for name, inside in members.items() if c in inside) for c in range(labels.n_classes)]
    table = list(range(labels.outside_class + 1))
    for number, names in enumerate(regions):
        swapped = frozenset(partner.get(name, name) for name in names)
        if swapped == names:
            continue
        others = [c for c, found in enumerate(regions) if found == swapped]
        if len(others) != 1 or regions.count(names) != 1:
            value, choice = labels.values[number], [labels.values[c] for c in others]
            what = f"no value is in {', '.join(sorted(swapped))} alone, which the value {value} would become"
            if others:
                what = f"the value {value} (in {', '.join(sorted(names))}) could become any of {choice}"
            fix = "Swap only regions that have one value each, or that other regions distinguish."
            raise UserError(f"{_KEY}: {what}", fix=fix)
        table[number] = others[0]
    return tuple(table)


def swap_channels(labels: Labels, pairs: Pairs) -> tuple[int, ...]:
    """Return, for each output channel, the one that takes its place: `logits[list(swap_channels(...))]`."""
    if not labels.has_regions:
        return make_swap_table(labels, pairs)[: labels.n_classes]
    partner, names = _partners(labels, pairs), list(labels.region_names)
    return tuple(names.index(partner.get(name, name)) for name in names)


def _partners(labels: Labels, pairs: Pairs) -> dict[str, str]:
    """Return the partner of each swapped name."""
    partner: dict[str, str] = {}
    for left, right in pairs:
        for name, other in ((left, right), (right, left)):
            if name not in labels.region_names:
                raise UserError(f"{_KEY}: there is no label {name!r}", fix=suggest(name, labels.region_names))
            if name in partner or left == right:
                raise UserError(f"{_KEY}: {name!r} is named twice", fix="A label has one partner.")
            partner[name] = other
    return partner
