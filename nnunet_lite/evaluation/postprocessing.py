"""Remove components of labels by rules, and choose the rules that the cross-validation confirms.

A rule keeps the largest component of a label, or removes the components below a size. `apply_rules` applies rules to a
label map, and `choose_rules` finds those that help. Some of the held-out cases choose the best rule of each label from
a few candidates: its largest component, and sizes below the smallest component of all references. The other cases
confirm it, and the reported gain is theirs. No rule is tried

- if fewer than 10 held-out cases have the label, too few to choose and to confirm;
- if the mean Dice of the label is below 0.5: the components of such a model say little about the organ.

No rule is kept that removes more than 10 % of the label from any reference of the training set, or more than 10 % of
what is right in a held-out case, or that lowers the mean Dice of another label. A rule is confirmed if its mean gain in
Dice is above zero in a sign-flip test at 2.5 % for all labels together (Bonferroni).
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import zip_longest
from math import floor, log10
from typing import Annotated, Literal, NamedTuple

import cc3d
import numpy as np
from pydantic import BaseModel, Field

from nnunet_lite.data.geometry import Spacing, bounding_box, slices
from nnunet_lite.data.labels import Labels
from nnunet_lite.data.problems import plural
from nnunet_lite.evaluation.masks import count_overlap, disjoint_regions, is_picture, number_masks
from nnunet_lite.evaluation.statistics import mean_of_labels, p_of_gain
from nnunet_lite.log import map_in_threads
from nnunet_lite.system import pairs_at_once

LEAST_CASES = 10
LEAST_DICE = 0.5
MOST_REMOVED = 0.1  # of a label in a reference
_FALSE_ACCEPTANCE = 0.025  # of all labels together
_LEAST_GAIN = 1e-4  # of the mean Dice: less is not worth a rule
_SHARES = (0.1, 0.25, 0.5, 0.9)  # of the smallest component of all references: the sizes that are tried
_ROUNDING = 1e-9
SizeUnit = Literal["mm3", "mm2", "voxels", "px"]
_NEEDED = f"{LEAST_CASES} are needed to choose a rule and to confirm it"

# ------------------------------------------------------------------------------------------------------ applying rules


class Rule(BaseModel, frozen=True, extra="forbid", strict=True):
    """Which components of a label remain.

    Parameters
    ----------
    largest_component : bool
        Only the largest one, the first of equals.
    min_size_mm3 : float or None
        None that is smaller: mm3, mm2 for two-dimensional images, voxels or pixels if no spacing is known.
    unit : {"mm3", "mm2", "voxels", "px"}
        The unit of the size.
    """

    largest_component: bool = False
    min_size_mm3: Annotated[float, Field(ge=0, allow_inf_nan=False)] | None = None
    unit: SizeUnit = "mm3"

    def __str__(self) -> str:
        size = "" if self.min_size_mm3 is None else f"{self.min_size_mm3:g} {self.unit}"
        if not self.largest_component:
            return f"no component below {size}" if size else "all components"
        return "the largest component" + (f", from {size}" if size else "")


class Components(NamedTuple):
    """The components of some masks that do not overlap.

    Parameters
    ----------
    box : tuple of slice
        Where the masks are in the image.
    numbers : ndarray, shape of the box
        The component of each voxel from 1, 0 outside of all masks.
    sizes, mask_of : ndarray, shape (components + 1,)
        Voxels of each component, and its mask from 1; the first entry is the outside.
    """

    box: tuple[slice, slice, slice]
    numbers: np.ndarray
    sizes: np.ndarray
    mask_of: np.ndarray


def find_components(segmentation: np.ndarray, masks: Sequence[tuple[int, ...]]) -> Components:
    """Find the components of masks.

    Parameters
    ----------
    segmentation : ndarray, shape (z, y, x)
        Label values.
    masks : sequence of tuple of int
        The label values of each mask; no value belongs to two masks.
    """
    numbered = number_masks(segmentation, masks)
    box = slices(bounding_box(numbered != 0))
    # numbers differ between masks, so their voxels do not connect; those of a mask do over faces, edges and corners
    numbers, n = cc3d.connected_components(numbered[box], connectivity=26, return_N=True)
    sizes, mask_of = np.zeros(n + 1, np.intp), np.zeros(n + 1, np.intp)
    for plane, mask in zip(numbers, numbered[box], strict=True):  # by slices: a copy of all as int64 would be large
        sizes += np.bincount(plane.ravel(), minlength=n + 1)
        mask_of[plane] = mask
    return Components(box, numbers, sizes, mask_of)


def removed_components(components: Components, rules: Sequence[Rule | None], voxel: float) -> np.ndarray:
    """Return which components rules remove.

    Parameters
    ----------
    components : Components
        From `find_components`.
    rules : sequence of Rule or None
        The rule of each mask.
    voxel : float
        The size of a voxel, in the unit of the rules.

    Returns
    -------
    ndarray of bool, shape (components + 1,)
    """
    removed = np.zeros(len(components.sizes), bool)
    for mask, rule in enumerate(rules, 1):
        own = np.flatnonzero(components.mask_of == mask)
        if rule is not None and rule.largest_component and len(own):
            removed[own] = own != own[components.sizes[own].argmax()]
        if rule is not None and rule.min_size_mm3 is not None:
            removed[own] |= components.sizes[own] * voxel < rule.min_size_mm3
    return removed


def apply_rules(segmentation: np.ndarray, spacing: Spacing, labels: Labels, rules: Mapping[str, Rule]) -> np.ndarray:
    """Remove components from a label map. Rules apply one after the other, in the order of `labels.region_names`.

    What is removed from a region (a set of labels that overlaps others) becomes the innermost region around it that
    remains, or background.

    Parameters
    ----------
    segmentation : ndarray, shape (z, y, x)
        Label values. It is not changed, and returned itself if nothing is removed.
    spacing : tuple of float
        Voxel size (z, y, x) in mm.
    labels : Labels
        Labels of the dataset.
    rules : dict
        Name of a label or region -> rule.
    """
    out, voxel = segmentation, voxel_size(segmentation.shape, spacing)
    for group in disjoint_regions(labels):
        regions = [i for i in group if labels.region_names[i] in rules]
        if not regions:
            continue
        masks = [labels.region_values[i] for i in regions]
        components = find_components(out, masks)
        removed = removed_components(components, [rules[labels.region_names[i]] for i in regions], voxel)
        if removed.any():
            out = segmentation.copy() if out is segmentation else out
            part, selected = out[components.box], removed[components.numbers]
            part[selected] = _replaced(part[selected], labels, masks)
    return out


def _replaced(values: np.ndarray, labels: Labels, masks: Sequence[tuple[int, ...]]) -> np.ndarray:
    """Return what values of removed masks become: the innermost region around each mask, or background."""
    out = np.full_like(values, labels.background)
    for members in masks:
        for others, written in zip(labels.region_values, labels.region_order or (), strict=False):
            if written in others and written not in members:
                inside = np.isin(values, members) & np.isin(values, others)
                out[inside] = written
    return out


def voxel_size(shape: tuple[int, ...], spacing: Spacing) -> float:
    """Compute the size of a voxel in mm3, for a two-dimensional image in mm2.

    Parameters
    ----------
    shape : tuple of int
        Of the image (z, y, x).
    spacing : tuple of float
        Voxel size (z, y, x) in mm.
    """
    return float(np.prod(spacing[1:] if is_picture(shape, spacing) else spacing))


# ------------------------------------------------------------------------------------------------------ choosing rules


class CasePair(NamedTuple):
    """A prediction and its reference.

    Parameters
    ----------
    prediction, reference : ndarray, shape (z, y, x)
        Label values of the dataset.
    spacing : tuple of float
        Voxel size (z, y, x) in mm.
    """

    prediction: np.ndarray
    reference: np.ndarray
    spacing: Spacing


class Gain(BaseModel, frozen=True, extra="forbid", strict=True):
    """The mean Dice of a label without and with postprocessing.

    Parameters
    ----------
    before, after : float
        Mean Dice on cases that did not choose the rule.
    n : int or None
        Number of these cases. None in an inference.json of a version that measured the gain on the cases that chose.
    """

    before: float
    after: float
    n: int | None = None

    def __str__(self) -> str:
        where = "the cases that chose it" if self.n is None else f"{plural(self.n, 'case')} that did not choose it"
        return f"Dice {self.before:.4f} -> {self.after:.4f} on {where}"


@dataclass(frozen=True)
class Decision:
    """The postprocessing that is chosen.

    Parameters
    ----------
    rules, gains : dict
        Label or region -> rule, and its gain.
    notes : tuple of str
        Why other labels have none.
    """

    rules: dict[str, Rule]
    gains: dict[str, Gain]
    notes: tuple[str, ...]


def choose_rules(
    cases: Sequence[Callable[[], CasePair]],
    folds: Sequence[str],
    references: Sequence[Callable[[], tuple[np.ndarray, Spacing]]],
    labels: Labels,
    unit: SizeUnit = "mm3",
    workers: int | None = None,
) -> Decision:
    """Choose a rule for each label on some held-out cases, and keep it if the other cases confirm it.

    Parameters
    ----------
    cases : sequence of callables
        Each reads a held-out case. It is called in threads, once, or once for each region.
    folds : sequence of str
        The fold that holds out each case. The cases of a single fold are divided.
    references : sequence of callables
        Each reads a reference and its spacing; of all cases of the training set.
    labels : Labels
        Labels of the dataset.
    unit : str
        The unit of sizes.
    workers : int or None
        Number of threads; None for all CPUs, 0 or 1 for one.
    """
    if len(cases) < LEAST_CASES:
        return Decision({}, {}, (f"no postprocessing: {plural(len(cases), 'case')} held out, {_NEEDED}",))
    groups, chooses = disjoint_regions(labels), choosing_cases(folds)
    decision = Decision({}, {}, ())
    threads = pairs_at_once(len(cases), workers)
    sizes = map_in_threads(partial(_reference_sizes, labels=labels), references, threads, "references")
    for group in groups:  # regions overlap: each is decided on what the rules before it leave
        candidates = {i: candidate_rules([case[i] for case in sizes], unit) for i in group}
        count = partial(_try_rules, labels=labels, rules=decision.rules, candidates=candidates)
        overlap = np.stack(map_in_threads(count, cases, threads, "components"))
        decision = _confirm_rules(overlap, candidates, chooses, _FALSE_ACCEPTANCE / len(groups), labels, decision)
    return decision


def choosing_cases(folds: Sequence[str]) -> np.ndarray:
    """Return which cases choose: those of two folds in five, or of a single fold two cases in five.

    Parameters
    ----------
    folds : sequence of str
        The fold of each case.

    Returns
    -------
    ndarray of bool, shape (cases,)
    """
    names = sorted(set(folds))
    places = np.array([names.index(fold) for fold in folds]) if len(names) > 1 else np.arange(len(folds))
    return np.isin(places % 5, (1, 3))


def candidate_rules(sizes: Sequence[np.ndarray], unit: SizeUnit = "mm3") -> list[Rule]:
    """List the rules to try, gentle ones first, for references whose components have these sizes, by case.

    A size removes no component of any reference. The largest component is a candidate if no reference loses more than
    10 % by it.

    Parameters
    ----------
    sizes : sequence of ndarray, shape (components,)
        The sizes of the components of each reference.
    unit : {"mm3", "mm2", "voxels", "px"}
        Their unit.
    """
    present = [components for components in sizes if len(components)]
    if not present:
        return []
    smallest = float(min(components.min() for components in present))
    single = all(components.max() >= (1 - MOST_REMOVED) * components.sum() for components in present)
    limits = dict.fromkeys(_rounded_down(share * smallest) for share in _SHARES)
    rules = [Rule(min_size_mm3=limit, unit=unit) for limit in limits]
    return [*rules, Rule(largest_component=True, unit=unit)] if single else rules


def _rounded_down(value: float) -> float:
    """Round a positive number down to two digits."""
    step = 10.0 ** (floor(log10(value)) - 1)
    return float(f"{floor(value / step + _ROUNDING) * step:.2g}")


def _reference_sizes(read: Callable[[], tuple[np.ndarray, Spacing]], labels: Labels) -> list[np.ndarray]:
    """Measure the components of each region in a reference."""
    array, spacing = read()
    sizes = [np.zeros(0)] * len(labels.region_names)
    for group in disjoint_regions(labels):
        components = find_components(array, [labels.region_values[i] for i in group])
        for mask, i in enumerate(group, 1):
            sizes[i] = components.sizes[components.mask_of == mask] * voxel_size(array.shape, spacing)
    return sizes


def _try_rules(
    read: Callable[[], CasePair], labels: Labels, rules: Mapping[str, Rule], candidates: Mapping[int, Sequence[Rule]]
) -> np.ndarray:
    """Count the overlap of a case (1 + candidates, regions, 3): without a rule, then with the k-th candidates.

    The regions with candidates are disjoint, so that their candidates do not affect each other. `rules`, those of the
    regions before them, apply first.
    """
    prediction, reference, spacing = read()
    prediction = apply_rules(prediction, spacing, labels, rules)
    overlap, masks = count_overlap(prediction, reference, labels), [labels.region_values[i] for i in candidates]
    components, voxel = find_components(prediction, masks), voxel_size(prediction.shape, spacing)
    removed = [removed_components(components, kth, voxel) for kth in zip_longest(*candidates.values())]
    if not np.any(removed):
        return np.stack([overlap] * (1 + len(removed)))
    # candidates change few voxels: only these are counted again
    changed = np.any(removed, axis=0)[components.numbers]
    component, before, true = (
        a[changed][None, None] for a in (components.numbers, prediction[components.box], reference[components.box])
    )
    after, unchanged = _replaced(before, labels, masks), overlap - count_overlap(before, true, labels)
    with_rules = [unchanged + count_overlap(np.where(one[component], after, before), true, labels) for one in removed]
    return np.stack([overlap, *with_rules])


def _confirm_rules(
    overlap: np.ndarray,
    candidates: Mapping[int, Sequence[Rule]],
    chooses: np.ndarray,
    level: float,
    labels: Labels,
    earlier: Decision,
) -> Decision:
    """Add to a decision the rules that are best in the cases that choose, and confirmed by the others.

    Parameters
    ----------
    overlap : ndarray, shape (cases, 1 + candidates, regions, 3)
        From `_try_rules`.
    level : float
        Of significance, for all regions with candidates.
    """
    dice = _dice(overlap)
    rules, gains, names = dict(earlier.rules), dict(earlier.gains), labels.region_names
    regions_of_note = defaultdict[str, list[str]](list)
    chosen: dict[int, int] = {}
    for i in candidates:
        n = _count_known(dice[:, 0, i])
        if n < LEAST_CASES:
            regions_of_note[f"it is in {plural(n, 'held-out case')}, {_NEEDED}"].append(names[i])
        elif mean_of_labels(dice[:, 0, i, None]) < LEAST_DICE:
            regions_of_note[f"a mean Dice below {LEAST_DICE:g} is too low to decide"].append(names[i])
        elif best := _best_candidate(overlap, dice, i, candidates, chooses):
            chosen[i] = best
    for i, best in chosen.items():
        rule, before, after = candidates[i][best - 1], dice[~chooses, 0, i], dice[~chooses, best, i]
        n, differences = _count_known(before), _differences(before, after)
        if differences.sum() / max(1, n) >= _LEAST_GAIN and p_of_gain(differences) <= level / len(chosen):
            rules[names[i]] = rule
            gains[names[i]] = Gain(before=mean_of_labels(before[:, None]), after=mean_of_labels(after[:, None]), n=n)
        else:
            note = f'"{rule}" is not confirmed by the {plural(n, "case")} that did not choose it'
            regions_of_note[note].append(names[i])
    notes = [f"no postprocessing of {', '.join(regions)}: {note}" for note, regions in regions_of_note.items()]
    return Decision(rules, gains, (*earlier.notes, *notes))


def _best_candidate(
    overlap: np.ndarray, dice: np.ndarray, region: int, candidates: Mapping[int, Sequence[Rule]], chooses: np.ndarray
) -> int:
    """Find the candidate that raises the Dice of a region most in the cases that choose, the first of equals.

    It takes little of what is right from any case, and nothing from the mean of another region. 0 if none helps.
    """
    best, most = 0, _LEAST_GAIN
    tp, in_reference = overlap[:, :, region, 0], overlap[:, 0, region, 0] + overlap[:, 0, region, 2]
    means = [
        [mean_of_labels(one[:, [j]]) for j in range(dice.shape[2]) if j not in candidates]
        for one in dice.swapaxes(0, 1)
    ]
    for k in range(1, len(candidates[region]) + 1):
        differences = _differences(dice[chooses, 0, region], dice[chooses, k, region])
        gain = differences.sum() / max(1, _count_known(dice[chooses, 0, region]))
        spares = (tp[:, 0] - tp[:, k] <= MOST_REMOVED * in_reference).all()
        worse = any(after < before - _ROUNDING for before, after in zip(means[0], means[k], strict=True))
        if gain >= most and spares and not worse:
            best, most = k, gain + _ROUNDING
    return best


def _dice(overlap: np.ndarray) -> np.ndarray:
    """Compute Dice from true positive, false positive and false negative voxels; NaN if a region is absent."""
    tp, fp, fn = np.moveaxis(overlap, -1, 0)
    with np.errstate(invalid="ignore"):
        return 2.0 * tp / (2 * tp + fp + fn)


def _differences(before: np.ndarray, after: np.ndarray) -> np.ndarray:
    """Compute gains in Dice (cases,); a label that is neither present nor predicted is right, which counts 1."""
    return np.nan_to_num(after, nan=1.0) - np.nan_to_num(before, nan=1.0)


def _count_known(dice: np.ndarray) -> int:
    return int(np.isfinite(dice).sum())
