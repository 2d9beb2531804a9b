"""Labels that change places when left and right do: in training, and in mirrored copies when predicting.

Where a left and a right organ are two labels, a mirrored image shows the right one on the left side. Without a swap,
mirroring that axis teaches the network that the two are one.
"""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from dataclasses import dataclass

from nnunet_lite.data.labels import Labels
from nnunet_lite.errors import UserError
from nnunet_lite.planning.schema import Plan
from nnunet_lite.settings import AugmentationSettings

Pairs = Sequence[tuple[str, str]]
_KEY = "augmentation.mirror_swap"


@dataclass(frozen=True)
class Swap:
    """Samples mirrored along an axis of (z, y, x) get the classes that `table` gives for theirs."""

    axis: int
    table: tuple[int, ...]


def swap_table(labels: Labels, pairs: Pairs) -> tuple[int, ...]:
    """The class that each class becomes, the ignore class included.

    Of regions, those classes change places that belong to swapped regions; into which others follows from the regions
    that they are in.

    Raises
    ------
    UserError : a name is no label, or is in two pairs; it does not follow from the regions what a class becomes.
    """
    partner = _partners(labels, pairs)
    known = dict(zip(labels.region_names, labels.region_classes, strict=True))
    inside = [frozenset(name for name, members in known.items() if c in members) for c in range(labels.n_classes)]
    table = list(range(labels.n_classes + (labels.ignore is not None)))
    for number, names in enumerate(inside):
        wanted = frozenset(partner.get(name, name) for name in names)
        if wanted == names:
            continue
        others = [c for c, found in enumerate(inside) if found == wanted]
        if len(others) != 1 or inside.count(names) != 1:
            value, choice = labels.values[number], [labels.values[c] for c in others]
            raise UserError(
                f"{_KEY}: the value {value} (in {', '.join(sorted(names))}) could become any of {choice}"
                if others
                else f"{_KEY}: no value is in {', '.join(sorted(wanted))} alone, which the value {value} would become",
                fix="Swap only regions that have one value each, or that others tell apart.",
            )
        table[number] = others[0]
    return tuple(table)


def channel_swap(labels: Labels, pairs: Pairs) -> tuple[int, ...]:
    """For each output channel of the network, the one that takes its place: `logits[list(channel_swap(...))]`."""
    if not labels.has_regions:
        return swap_table(labels, pairs)[: labels.n_classes]
    partner, names = _partners(labels, pairs), list(labels.region_names)
    return tuple(names.index(partner.get(name, name)) for name in names)


def check_swaps(labels: Labels, settings: AugmentationSettings, dimensions: int) -> None:
    """Make sure before training that labels can be swapped as the settings say.

    Raises
    ------
    UserError : unknown names, names in two pairs, ambiguous regions, or an axis that the patch does not have.
    """
    swap_table(labels, settings.mirror_swap)
    axis = settings.mirror_swap_axis
    if axis is not None and axis >= dimensions:
        raise UserError(
            f"{_KEY}_axis = {axis} is no axis of a patch with {dimensions}", fix=f"Give 0 to {dimensions - 1}."
        )


def swap_of(plan: Plan, settings: AugmentationSettings, dimensions: int) -> Swap | None:
    """How a configuration's labels are swapped; None if they are not, or no mirrored axis goes from left to right.

    By default that is the axis from left to right, wherever the plan puts it, or the image's x axis where the plan has
    no orientation; two-dimensional patches may not have it.
    """
    if not settings.mirror_swap:
        return None
    offset = 3 - dimensions
    if settings.mirror_swap_axis is not None:
        axis = settings.mirror_swap_axis + offset
    else:
        sideways = next(i for i, letter in enumerate(plan.orientation or "LAS") if letter in "LR")
        axis = plan.axis_order.index(2 - sideways)
    return Swap(axis, swap_table(plan.labels, settings.mirror_swap)) if axis >= offset else None


def _partners(labels: Labels, pairs: Pairs) -> dict[str, str]:
    """The name that each swapped name is swapped with."""
    partner: dict[str, str] = {}
    for one, other in pairs:
        for name, its in ((one, other), (other, one)):
            if name not in labels.region_names:
                near = difflib.get_close_matches(name, labels.region_names, 1)
                hint = f"Did you mean {near[0]!r}?" if near else f"There are: {', '.join(labels.region_names)}."
                raise UserError(f"{_KEY}: there is no label {name!r}", fix=hint)
            if name in partner or one == other:
                raise UserError(f"{_KEY}: {name!r} is named twice", fix="A label has one partner.")
            partner[name] = its
    return partner
