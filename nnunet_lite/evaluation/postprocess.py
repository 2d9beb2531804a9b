"""Removing components of a label from predictions: rules, and which of them the cross-validation bears out.

A rule keeps a label's largest component, or those of a size, or both. Of a region (a set of labels that overlaps
others) what is removed becomes the innermost region around it that is left, or background. Rules apply one after the
other, in the order of `labels.region_names`.

A rule is kept where it raises the mean Dice of its label over all cases, where the 95 % interval of the paired
difference is not below zero (so that it harms no case, or clearly helps more than it harms), and where no other label
loses. The Dice that a rule would give follows from the size of each component and its overlap with the reference; each
label map is read once, or once for each region.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import numpy as np

from nnunet_lite.budget import pairs_at_once
from nnunet_lite.data.labels import Labels
from nnunet_lite.evaluation.components import components
from nnunet_lite.evaluation.joint import Box, Joint, counts_of, hull, is_picture, join
from nnunet_lite.evaluation.statistics import mean_of, paired
from nnunet_lite.log import progress

_LEAST_GAIN = 1e-4  # of the mean Dice: less is not worth a rule
_ROUNDING = 1e-9
_MOST_SIZES = 200  # that are tried


@dataclass(frozen=True)
class Rule:
    """What stays of a label: its largest component (the first one of equals), and none below a size in mm3.

    A picture, which has no thickness, is measured in mm2.
    """

    largest_component: bool = False
    min_size_mm3: float | None = None

    def __str__(self) -> str:
        size = "" if self.min_size_mm3 is None else f"{self.min_size_mm3:g} mm3"
        if not self.largest_component:
            return f"no component below {size}" if size else "all components"
        return "the largest component" + (f", from {size}" if size else "")


class Pair(NamedTuple):
    """A prediction and its reference (z, y, x), values of the data set, and the spacing in mm (z, y, x)."""

    prediction: np.ndarray
    reference: np.ndarray
    spacing: tuple[float, float, float]


class Gain(NamedTuple):
    """The mean Dice of a label without and with postprocessing."""

    before: float
    after: float


def apply_rules(
    segmentation: np.ndarray, spacing: tuple[float, float, float], labels: Labels, rules: Mapping[str, Rule]
) -> np.ndarray:
    """A label map (z, y, x) without the components that the rules (by name of label or region) remove.

    The array that was given is left as it is, and returned where nothing is removed.
    """
    out, voxel = segmentation, _voxel_size(segmentation.shape, spacing)
    for name, members in zip(labels.region_names, labels.region_values, strict=True):
        if name not in rules:
            continue
        mask = out == members[0] if len(members) == 1 else np.isin(out, members)
        box = _box_of(mask)
        if box is None:
            continue
        numbers, count = components(mask[box])
        removed = _removed(np.bincount(numbers.ravel(), minlength=count + 1)[1:] * voxel, rules[name])
        if removed.any():
            out = segmentation.copy() if out is segmentation else out
            part, gone = out[box], np.concatenate([[False], removed])[numbers]
            before = part[gone]
            for value, instead in _instead(labels, members).items():
                part[gone] = np.where(before == value, np.asarray(instead, out.dtype), part[gone])
    return out


def decide(
    cases: Sequence[Callable[[], Pair]], labels: Labels, workers: int | None = None
) -> tuple[dict[str, Rule], dict[str, Gain]]:
    """The rules that help, by label or region, and by how much.

    Parameters
    ----------
    cases : each reads one; called in threads, once, or for regions once for each.
    workers : threads; None for all CPUs, 0 or 1 for one.
    """
    names = labels.region_names
    # regions overlap, so that each is decided on what those before it leave
    rounds: list[tuple[int, ...]] = (
        [(i,) for i in range(len(names))] if labels.has_regions else [tuple(range(len(names)))]
    )
    rules: dict[str, Rule] = {}
    first = now = np.zeros((0, 0))
    with ThreadPoolExecutor(pairs_at_once(len(cases), workers)) as pool:
        for regions in rounds:
            measure = partial(_measured, labels=labels, rules=dict(rules), regions=regions)
            found = list(progress(pool.map(measure, cases), len(cases), "components"))
            if not first.size:
                first = now = np.array([_dice(case.counts) for case in found])
            for region in regions:
                if (best := _best(found, region, now)) is not None:
                    rules[names[region]], now = best
    gains = {name: Gain(mean_of(first[:, [i]]), mean_of(now[:, [i]])) for i, name in enumerate(names) if name in rules}
    return rules, gains


# ----------------------------------------------------------------------------------------------- what is in a label map


@dataclass(frozen=True)
class _Parts:
    """The components of one region of a case: sizes in mm3 (components,), and what removing each one changes.

    `changes` : region -> (components, 2), how many voxels its prediction gains, and how many of these are right.
    """

    sizes: np.ndarray
    changes: dict[int, np.ndarray]


@dataclass(frozen=True)
class _Measured:
    """A case: voxels (regions, 3) in prediction, in both, in reference; and the components of some regions."""

    counts: np.ndarray
    parts: dict[int, _Parts]


def _measured(read: Callable[[], Pair], labels: Labels, rules: Mapping[str, Rule], regions: Iterable[int]) -> _Measured:
    """Count one case, after the rules that are decided already."""
    prediction, reference, spacing = read()
    joint = join(apply_rules(prediction, spacing, labels, rules), reference, labels, 1)
    members = [joint.members(region) for region in labels.region_values]
    counts = []
    for inside in members:
        both, wrong, missed = counts_of(joint.histogram, *inside)
        counts.append((both + wrong, both, both + missed))
    boxes, voxel = joint.boxes(), _voxel_size(prediction.shape, spacing)
    parts = {region: _parts(joint, labels, region, boxes, voxel) for region in regions}
    return _Measured(np.array(counts), parts)


def _parts(
    joint: Joint, labels: Labels, region: int, boxes: Sequence[tuple[slice, ...] | None], voxel: float
) -> _Parts:
    """The components of a region."""
    predicted = joint.predicted(labels.region_values[region]).ravel()
    box = hull([b for b, inside in zip(boxes, predicted, strict=True) if b and inside])
    tables = _change_tables(joint, labels, region)
    if box is None:
        return _Parts(np.zeros(0), {other: np.zeros((0, 2)) for other in tables})
    pairs = joint.pairs[box]
    numbers, count = components(predicted[pairs])
    where = np.flatnonzero(numbers)
    owner, pair = numbers.ravel()[where], pairs.ravel()[where]

    def summed(table: np.ndarray) -> np.ndarray:
        return np.bincount(owner, table[pair], minlength=count + 1)[1:]

    changes = {other: np.stack([summed(table) for table in both], axis=1) for other, both in tables.items()}
    return _Parts(np.bincount(owner, minlength=count + 1)[1:] * voxel, changes)


def _change_tables(joint: Joint, labels: Labels, region: int) -> dict[int, tuple[np.ndarray, np.ndarray]]:
    """For each region that changes with this one: by pair of values, whether its prediction gains (-1: loses) a voxel,
    and whether that voxel is its own in the reference too.
    """
    instead = _instead(labels, labels.region_values[region])
    index = {value: i for i, value in enumerate(joint.values, 1)}
    becomes = np.arange(len(index) + 1)
    for value, replacement in instead.items():
        becomes[index[value]] = index.get(replacement, 0)
    known = ~joint.ignored.reshape(len(becomes), -1)
    tables = {}
    for other, members in enumerate(labels.region_values):
        inside = joint.predicted(members)
        gained = (inside[:, becomes].astype(np.int8) - inside) * known
        if gained.any():
            tables[other] = gained.ravel(), (gained * inside.T).ravel()
    return tables


def _instead(labels: Labels, members: tuple[int, ...]) -> dict[int, int]:
    """What each value of a region becomes where the region is removed: the innermost other region, or background."""
    found = dict.fromkeys(members, labels.background)
    for others, written in zip(labels.region_values, labels.region_order or (), strict=False):
        if written in others and written not in members:
            found |= {value: written for value in members if value in others}
    return found


def _voxel_size(shape: tuple[int, ...], spacing: tuple[float, float, float]) -> float:
    return float(np.prod(spacing[1:] if is_picture(shape, spacing) else spacing))


def _box_of(mask: np.ndarray) -> Box | None:
    """The box around the set voxels of a mask (z, y, x)."""
    slices = np.flatnonzero(mask.any(axis=(1, 2)))
    if not len(slices):
        return None
    z = slice(slices[0], slices[-1] + 1)
    y, x = (np.flatnonzero(mask[z].any(axis=(0, axis))) for axis in (2, 1))
    return z, slice(y[0], y[-1] + 1), slice(x[0], x[-1] + 1)


def _removed(sizes: np.ndarray, rule: Rule) -> np.ndarray:
    """Which components of these sizes (mm3) a rule removes."""
    removed = np.zeros(len(sizes), bool)
    if rule.largest_component and len(sizes):
        removed[:] = True
        removed[sizes.argmax()] = False
    return removed if rule.min_size_mm3 is None else removed | (sizes < rule.min_size_mm3)


# ----------------------------------------------------------------------------------------------------- which rule helps


def _best(cases: Sequence[_Measured], region: int, now: np.ndarray) -> tuple[Rule, np.ndarray] | None:
    """The rule that helps a region most, and the Dice (cases, regions) with it; None where no rule helps."""
    rules = candidates([case.parts[region].sizes for case in cases])
    if not rules:
        return None
    after = {other: np.array([_dice_after(case, region, other, rules) for case in cases])
             for other in cases[0].parts[region].changes}  # fmt: skip
    gain = np.array([mean_of(column[:, None]) for column in after[region].T]) - mean_of(now[:, [region]])
    for i in np.argsort(-np.nan_to_num(gain).round(9), kind="stable"):  # of equals the first, which is the simplest
        if not gain[i] >= _LEAST_GAIN:
            break
        changed = now.copy()
        for other, table in after.items():
            changed[:, other] = table[:, i]
        if _helps(now, changed, region, after):
            return rules[i], changed
    return None


def _helps(before: np.ndarray, after: np.ndarray, region: int, changed: Iterable[int]) -> bool:
    """Whether a region is better off for all that the cases can tell, and no other one worse."""
    margins = {other: paired(after[:, [other]], before[:, [other]]) for other in changed}
    low = margins.pop(region).low
    worse = any(margin.mean is not None and margin.mean < -_ROUNDING for margin in margins.values())
    return low is not None and low >= -_ROUNDING and not worse


def candidates(sizes: Sequence[np.ndarray]) -> list[Rule]:
    """The rules to try for components of these sizes, by case: simple ones first, then the gentler ones."""
    thresholds = thresholds_between(np.unique(np.concatenate(sizes))) if len(sizes) else []
    several = any(len(each) > 1 for each in sizes)
    return [
        *(Rule(min_size_mm3=size) for size in thresholds),
        *([Rule(largest_component=True)] if several else []),
        *(Rule(True, size) for size in thresholds if several),
    ]


def thresholds_between(sizes: np.ndarray) -> list[float]:
    """Numbers that tell ascending sizes apart, as round as can be; of very many sizes 200, evenly on a log scale."""
    if len(sizes) < 2:
        return []
    gaps = np.arange(1, len(sizes))
    if len(gaps) > _MOST_SIZES:
        marks = np.geomspace(sizes[1], sizes[-1], _MOST_SIZES)
        gaps = np.unique(np.searchsorted(sizes, marks * (1 - _ROUNDING)).clip(1, len(sizes) - 1))
    return [_roundest(float(sizes[gap - 1]), float(sizes[gap])) for gap in gaps]


def _roundest(low: float, high: float) -> float:
    """The number near the geometric middle of two that needs the fewest digits."""
    middle = (low * high) ** 0.5
    for digits in range(1, 17):
        found = float(f"{middle:.{digits}g}")
        if low < found < high:
            return found
    return middle


def _dice_after(case: _Measured, region: int, other: int, rules: Sequence[Rule]) -> np.ndarray:
    """Dice of `other` in a case with each of the rules for `region`."""
    sizes, changes = case.parts[region].sizes, case.parts[region].changes[other]
    order = np.argsort(sizes, kind="stable")
    smaller = np.concatenate([np.zeros((1, 2)), changes[order].cumsum(axis=0)])  # when so many of the smallest go
    total, largest = smaller[-1], changes[sizes.argmax()] if len(sizes) else np.zeros(2)
    limits = np.array([rule.min_size_mm3 or 0.0 for rule in rules])
    only = np.array([rule.largest_component for rule in rules])[:, None]
    too_small = (sizes.max(initial=0.0) < limits)[:, None]
    change = np.where(only, np.where(too_small, total, total - largest), smaller[np.searchsorted(sizes[order], limits)])
    predicted, both, reference = case.counts[other]
    return _dice(np.stack([predicted + change[:, 0], both + change[:, 1], np.full(len(rules), reference)], axis=1))


def _dice(counts: np.ndarray) -> np.ndarray:
    """Dice of (n, 3) voxels in prediction, both and reference; NaN where a label is in neither."""
    predicted, both, reference = counts.T.astype(float)
    with np.errstate(invalid="ignore"):
        return 2 * both / (predicted + reference)
