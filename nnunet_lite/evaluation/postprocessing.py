"""Which rules for components the cross-validation confirms.

`decide` tries a few rules for each label: its largest component, and sizes below the smallest component of all
references. Some of the held-out cases choose the best rule and the others confirm it; the gain is that of the cases
that confirm. No rule is tried

- with fewer than 10 held-out cases of the label, which cannot choose and confirm;
- where the mean Dice of the label is below 0.5: the components of such a model say little about the organ.

No rule is kept that removes more than 10 % of the label in any reference of the training set, or more than 10 % of what
is there in a held-out case, or that lowers the mean Dice of another label. To confirm, the mean gain in Dice must be
above zero in a sign-flip test at 2.5 % for all labels together (Bonferroni).
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from math import floor, log10
from typing import NamedTuple

import numpy as np

from nnunet_lite.data.labels import Labels
from nnunet_lite.data.problems import plural
from nnunet_lite.evaluation.components import components
from nnunet_lite.evaluation.joint import Box, Joint, counts_of, hull, join
from nnunet_lite.evaluation.rules import Rule, apply_rules, instead_of, removed_by, voxel_size
from nnunet_lite.evaluation.statistics import mean_of, p_of_gain
from nnunet_lite.log import progress
from nnunet_lite.system import pairs_at_once

LEAST_CASES = 10
LEAST_DICE = 0.5
MOST_REMOVED = 0.1  # of a label in a reference
_FALSE_ACCEPTANCE = 0.025  # of all labels together
_LEAST_GAIN = 1e-4  # of the mean Dice: less is not worth a rule
_SHARES = (0.1, 0.25, 0.5, 0.9)  # of the smallest component of all references: the sizes that are tried
_ROUNDING = 1e-9
_NEEDED = f"{LEAST_CASES} are needed to choose a rule and to confirm it"


class Pair(NamedTuple):
    """A prediction and its reference (z, y, x), values of the dataset, and the spacing in mm (z, y, x)."""

    prediction: np.ndarray
    reference: np.ndarray
    spacing: tuple[float, float, float]


class Reference(NamedTuple):
    """A reference (z, y, x), values of the dataset, and the spacing in mm (z, y, x)."""

    array: np.ndarray
    spacing: tuple[float, float, float]


class Gain(NamedTuple):
    """The mean Dice of a label without and with postprocessing, on `n` cases that did not choose the rule.

    `n` is None in an inference.json of a version that measured the gain on the cases that chose.
    """

    before: float
    after: float
    n: int | None = None

    def checked(self) -> Gain:
        """Itself, as it may come from a file; raises ValueError where it holds anything but numbers."""
        if any(type(value) not in (int, float) for value in (self.before, self.after, self.n or 0)):
            raise ValueError(f"the gain is {tuple(self)}")
        return self

    def __str__(self) -> str:
        where = "the cases that chose it" if self.n is None else f"{plural(self.n, 'case')} that did not choose it"
        return f"Dice {self.before:.4f} -> {self.after:.4f} on {where}"


@dataclass(frozen=True)
class Decision:
    """The rules by label or region, what each gains, and why there is no rule for others."""

    rules: dict[str, Rule]
    gains: dict[str, Gain]
    notes: tuple[str, ...]


def decide(
    cases: Sequence[Callable[[], Pair]],
    folds: Sequence[str],
    references: Sequence[Callable[[], Reference]],
    labels: Labels,
    unit: str = "mm3",
    workers: int | None = None,
) -> Decision:
    """The rules that the held-out cases choose and confirm.

    Parameters
    ----------
    cases : each reads a held-out case; called in threads, once, or for regions once for each.
    folds : which fold holds out each of the cases. With one fold, its cases are divided.
    references : each reads a reference; of all cases of the training set, those that are not held out too.
    unit : what the sizes of the rules are called.
    workers : threads; None for all CPUs, 0 or 1 for one.
    """
    if len(cases) < LEAST_CASES:
        return Decision({}, {}, (f"no postprocessing: {plural(len(cases), 'case')} held out, {_NEEDED}",))
    # regions overlap, so that each is decided on what those before it leave
    regions = range(len(labels.region_names))
    rounds = [[region] for region in regions] if labels.has_regions else [list(regions)]
    confirms = ~choosing(folds)
    decision = Decision({}, {}, ())
    with ThreadPoolExecutor(pairs_at_once(len(cases), workers)) as pool:
        found = pool.map(partial(_reference_sizes, labels=labels), references)
        sizes = list(progress(found, len(references), "references"))
        tried = [candidates([case[region] for case in sizes], unit) for region in regions]
        for together in rounds:
            measure = partial(_measured, labels=labels, rules=decision.rules, regions=together)
            measured = list(progress(pool.map(measure, cases), len(cases), "components"))
            level = _FALSE_ACCEPTANCE / len(rounds)
            decision = _decide(
                measured, {region: tried[region] for region in together}, confirms, level, labels, decision
            )
    return decision


def choosing(folds: Sequence[str]) -> np.ndarray:
    """Which cases choose, from the fold of each: of two folds in five; of a single fold two cases in five."""
    names = sorted(set(folds))
    places = np.array([names.index(fold) for fold in folds]) if len(names) > 1 else np.arange(len(folds))
    return np.isin(places % 5, (1, 3))


def candidates(sizes: Sequence[np.ndarray], unit: str = "mm3") -> list[Rule]:
    """The rules to try, gentle ones first, for references whose components have these sizes, by case.

    No rule removes more than 10 % of a reference, and a size no component of any.
    """
    there = [each for each in sizes if len(each)]
    if not there:
        return []
    smallest = float(min(each.min() for each in there))
    single = all(each.max() >= (1 - MOST_REMOVED) * each.sum() for each in there)
    limits = dict.fromkeys(_rounded_down(share * smallest) for share in _SHARES)
    return [*(Rule(min_size_mm3=limit, unit=unit) for limit in limits), *([Rule(True, unit=unit)] if single else [])]


def _rounded_down(value: float) -> float:
    """A positive number with two digits."""
    step = 10.0 ** (floor(log10(value)) - 1)
    return float(f"{floor(value / step + _ROUNDING) * step:.2g}")


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
    boxes, voxel = joint.boxes(), voxel_size(prediction.shape, spacing)
    return _Measured(np.array(counts), {region: _parts(joint, labels, region, boxes, voxel) for region in regions})


def _parts(joint: Joint, labels: Labels, region: int, boxes: Sequence[Box | None], voxel: float) -> _Parts:
    """The components of a region in the prediction."""
    tables = _change_tables(joint, labels, region)
    owner, pair = _voxels(joint, joint.predicted(labels.region_values[region]).ravel(), boxes)

    def summed(table: np.ndarray) -> np.ndarray:
        return np.bincount(owner, table[pair])[1:]

    changes = {other: np.stack([summed(table) for table in both], axis=1) for other, both in tables.items()}
    return _Parts(np.bincount(owner)[1:] * voxel, changes)


def _reference_sizes(read: Callable[[], Reference], labels: Labels) -> list[np.ndarray]:
    """The sizes of the components of each region of a reference, in mm3."""
    array, spacing = read()
    joint, voxel = join(array, array, labels, 1), voxel_size(array.shape, spacing)
    boxes = joint.boxes()
    owners = (_voxels(joint, joint.predicted(members).ravel(), boxes)[0] for members in labels.region_values)
    return [np.bincount(owner)[1:] * voxel for owner in owners]


def _voxels(joint: Joint, inside: np.ndarray, boxes: Sequence[Box | None]) -> tuple[np.ndarray, np.ndarray]:
    """The voxels whose pair is inside a mask (pairs,): the component of each, from 1, and its pair."""
    box = hull([b for b, known in zip(boxes, inside, strict=True) if b and known])
    if box is None:
        return np.zeros(0, int), np.zeros(0, int)
    pairs = joint.pairs[box]
    numbers, _ = components(inside[pairs])
    where = np.flatnonzero(numbers)
    return numbers.ravel()[where], pairs.ravel()[where]


def _change_tables(joint: Joint, labels: Labels, region: int) -> dict[int, tuple[np.ndarray, np.ndarray]]:
    """For each region that changes with this one: by pair of values, whether its prediction gains (-1: loses) a voxel,
    and whether that voxel is its own in the reference too.
    """
    instead = instead_of(labels, labels.region_values[region])
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


# ----------------------------------------------------------------------------------------------------- which rule helps


def _decide(
    cases: Sequence[_Measured],
    tried: Mapping[int, Sequence[Rule]],
    confirms: np.ndarray,
    level: float,
    labels: Labels,
    before: Decision,
) -> Decision:
    """A decision with the rules for some regions that are chosen, and confirmed at a level of significance."""
    now = np.array([[_dice(*counts) for counts in case.counts] for case in cases])
    rules, gains, why = dict(before.rules), dict(before.gains), defaultdict[str, list[str]](list)
    chosen: dict[int, Rule] = {}
    for region, candidates_ in tried.items():
        if reason := _unfit(now[:, region]):
            why[reason].append(labels.region_names[region])
        elif rule := _best(cases, region, now, candidates_, ~confirms):
            chosen[region] = rule
    for region, rule in chosen.items():
        name, after = labels.region_names[region], _with_rule(cases, region, rule, now)
        ours, theirs = now[confirms, region], after[confirms, region]
        if _mean_gain(ours, theirs) >= _LEAST_GAIN and p_of_gain(_differences(ours, theirs)) <= level / len(chosen):
            rules[name], gains[name] = rule, Gain(mean_of(ours[:, None]), mean_of(theirs[:, None]), _known(ours))
        else:
            why[f'"{rule}" is not confirmed by the {plural(_known(ours), "case")} that did not choose it'].append(name)
    notes = [f"no postprocessing of {', '.join(names)}: {reason}" for reason, names in why.items()]
    return Decision(rules, gains, (*before.notes, *notes))


def _unfit(dice: np.ndarray) -> str | None:
    """Why no rule is tried for a region with this Dice (cases,)."""
    if (n := _known(dice)) < LEAST_CASES:
        return f"it is in {plural(n, 'held-out case')}, {_NEEDED}"
    if mean_of(dice[:, None]) < LEAST_DICE:
        return f"a mean Dice below {LEAST_DICE:g} is too low to decide"
    return None


def _best(
    cases: Sequence[_Measured], region: int, now: np.ndarray, rules: Iterable[Rule], chooses: np.ndarray
) -> Rule | None:
    """The rule that raises a region's Dice most in the cases that choose, the first of equals; None where none does.

    It takes little from any case that is right, and nothing from the mean of another region.
    """
    best, most = None, _LEAST_GAIN
    for rule in rules:
        after = _with_rule(cases, region, rule, now)
        gain = _mean_gain(now[chooses, region], after[chooses, region])
        others = cases[0].parts[region].changes.keys() - {region}
        worse = any(mean_of(after[:, [i]]) < mean_of(now[:, [i]]) - _ROUNDING for i in others)
        if gain >= most and not worse and all(_spares(case, region, rule) for case in cases):
            best, most = rule, gain + _ROUNDING
    return best


def _differences(before: np.ndarray, after: np.ndarray) -> np.ndarray:
    """Gains in Dice (cases,); a label that is neither there nor predicted is right, which counts 1."""
    return np.nan_to_num(after, nan=1.0) - np.nan_to_num(before, nan=1.0)


def _mean_gain(before: np.ndarray, after: np.ndarray) -> float:
    return float(_differences(before, after).sum()) / max(1, _known(before))


def _known(dice: np.ndarray) -> int:
    return int(np.isfinite(dice).sum())


def _spares(case: _Measured, region: int, rule: Rule) -> bool:
    """Whether a rule leaves nearly all that is right in a prediction."""
    parts = case.parts[region]
    lost = -parts.changes[region][removed_by(parts.sizes, rule), 1].sum()
    return bool(lost <= MOST_REMOVED * case.counts[region, 2])


def _with_rule(cases: Sequence[_Measured], region: int, rule: Rule, now: np.ndarray) -> np.ndarray:
    """Dice (cases, regions) with a rule for a region."""
    after = now.copy()
    for row, case in zip(after, cases, strict=True):
        parts = case.parts[region]
        removed = removed_by(parts.sizes, rule)
        if removed.any():
            for other, changes in parts.changes.items():
                predicted, both, reference = case.counts[other]
                gained, right = changes[removed].sum(axis=0)
                row[other] = _dice(predicted + gained, both + right, reference)
    return after


def _dice(predicted: float, both: float, reference: float) -> float:
    """Dice from voxels in the prediction, in both, and in the reference; NaN where a label is in neither."""
    return float(2 * both / (predicted + reference)) if predicted + reference else np.nan
