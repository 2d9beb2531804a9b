"""Rules for components do what they say, and the rules that are kept are those that a search by brute force keeps."""

from __future__ import annotations

from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy import ndimage

from nnunet_lite.data.images import read_label
from nnunet_lite.data.labels import Labels
from nnunet_lite.evaluation.metrics import score_case
from nnunet_lite.evaluation.postprocessing import (
    CasePair,
    Decision,
    Rule,
    apply_rules,
    candidate_rules,
    choose_rules,
    choosing_cases,
)

TWO = Labels(names={"background": 0, "Anterior": 1, "Posterior": 2})
TUMOUR = Labels(names={"background": 0, "whole": (1, 2, 3), "core": (2, 3), "enhancing": (3,)}, region_order=(1, 2, 3))
LESION = Labels(names={"background": 0, "lesion": 1})
SPACING = (2.0, 1.0, 0.5)  # a voxel is one mm3
UNIT = (1.0, 1.0, 1.0)
EVERYWHERE = np.ones((3, 3, 3))
LARGEST = Rule(largest_component=True)


def rule(size: float, largest: bool = False) -> Rule:
    return Rule(largest_component=largest, min_size_mm3=size)


def blank() -> np.ndarray:
    return np.zeros((6, 12, 20), np.uint8)


def speckled(reference: np.ndarray, seed: int, specks: int, largest: int, values: tuple[int, ...]) -> np.ndarray:
    """A prediction as bad networks make it: pieces of a label off its place, and holes that cut it apart."""
    rng = np.random.default_rng(seed)
    out = np.roll(reference, 1, axis=2)
    for _ in range(specks):
        at = [int(rng.integers(0, length)) for length in out.shape]
        side = int(rng.integers(1, largest + 1))
        box = tuple(slice(start, start + side) for start in at)
        out[box] = np.where(out[box] == 0, rng.choice(values), 0 if rng.random() < 0.3 else out[box])
    return out


@pytest.fixture(scope="module")
def real(hippocampus: Path) -> list[CasePair]:
    """Four references, and four predictions of each with up to eleven specks."""
    files = sorted((hippocampus / "labelsTr").glob("*.nii.gz"))[:4]
    references = 4 * [read_label(path)[0] for path in files]
    return [CasePair(speckled(r, i, 4 + i // 2, 3, (1, 2)), r, SPACING) for i, r in enumerate(references)]


def removed_by_scipy(array: np.ndarray, members: tuple[int, ...], rule: Rule) -> np.ndarray:
    """Which voxels of a region are removed, one component after the other."""
    numbers, count = ndimage.label(np.isin(array, members), EVERYWHERE)
    sizes = [int((numbers == i).sum()) for i in range(1, count + 1)]
    removed = np.zeros(array.shape, bool)
    for i, size in enumerate(sizes, 1):
        smaller = rule.min_size_mm3 is not None and size < rule.min_size_mm3
        if smaller or (rule.largest_component and i - 1 != sizes.index(max(sizes))):
            removed |= numbers == i
    return removed


# ------------------------------------------------------------------------------------------------------ applying rules


@pytest.mark.parametrize("applied", [LARGEST, rule(25.0), rule(30.0, True), rule(1e6)], ids=str)
def test_what_a_rule_removes(real: list[CasePair], applied: Rule) -> None:
    total = 0
    for pair in real:
        before = pair.prediction.copy()
        found = apply_rules(pair.prediction, SPACING, TWO, {"Posterior": applied})
        removed = removed_by_scipy(before, (2,), applied)
        assert np.array_equal(found, np.where(removed, 0, before))
        assert np.array_equal(pair.prediction, before), "the given array stays as it is"
        total += int(removed.sum())
    assert total > 5


def test_nothing_to_remove() -> None:
    box = blank()
    box[2:4, 3:6, 3:9] = 1
    for array, rules in ((box, {"Anterior": rule(3.0, True)}), (blank(), {"Anterior": LARGEST}), (box, {})):
        assert apply_rules(array, SPACING, TWO, rules) is array


def test_of_equals_the_first_is_the_largest_and_corners_join() -> None:
    array = blank()
    array[1, 1, 1] = array[2, 2, 2] = 1  # one component, by a corner
    array[4, 8, 8:10] = 1
    kept = apply_rules(array, SPACING, TWO, {"Anterior": LARGEST})
    assert np.argwhere(kept).tolist() == [[1, 1, 1], [2, 2, 2]]


def test_a_picture_is_measured_in_its_plane() -> None:
    picture = np.zeros((1, 12, 20), np.uint8)
    picture[0, 1:3, 1:3] = picture[0, 6:9, 6:9] = 1
    found = apply_rules(picture, (999.0, 1.0, 1.0), TWO, {"Anterior": rule(5)})
    assert found.sum() == 9 and not found[0, :4].any()


def test_what_is_removed_of_a_region_becomes_the_one_around_it() -> None:
    array = blank()
    array[1:5, 2:10, 2:18] = 1
    array[2:4, 3:6, 3:8], array[3, 4, 5] = 2, 3  # a core with something in it
    array[2, 8, 15], array[2, 8, 16] = 2, 3  # a small core: back to the whole
    array[5, 11, 19] = 3  # all of it is small
    core = apply_rules(array, SPACING, TUMOUR, {"core": LARGEST})
    assert core[2, 8, 15] == core[2, 8, 16] == 1 and core[3, 4, 5] == 3 and core[5, 11, 19] == 1
    whole = apply_rules(array, SPACING, TUMOUR, {"whole": LARGEST})
    assert whole[5, 11, 19] == 0 and np.array_equal(whole[:5], array[:5])
    inner = apply_rules(array, SPACING, TUMOUR, {"enhancing": rule(2)})
    assert not (inner == 3).any() and np.array_equal(inner > 1, array > 1)


def test_values_of_any_kind() -> None:
    labels = Labels(names={"background": -5, "a": 7, "b": 300})
    array = np.full((4, 8, 8), -5, np.int16)
    array[1:3, 1:4, 1:4], array[0, 7, 7], array[3, 5, 5] = 300, 300, 7
    found = apply_rules(array, UNIT, labels, {"b": LARGEST})
    assert found.dtype == np.int16 and found[0, 7, 7] == -5 and found[3, 5, 5] == 7 and (found == 300).sum() == 18


# --------------------------------------------------------------------------------------------------------- the decision


def dice_of(arrays: list[np.ndarray], pairs: list[CasePair], labels: Labels) -> np.ndarray:
    """Dice (cases, labels) by scoring whole volumes."""
    cases = zip(arrays, pairs, strict=True)
    rows = [score_case(array, pair.reference, labels, pair.spacing, surface=False) for array, pair in cases]
    return np.array([[row[name]["Dice"] for name in labels.region_names] for row in rows], float)


def sizes_of(pair: CasePair, members: tuple[int, ...]) -> np.ndarray:
    numbers, _ = ndimage.label(np.isin(pair.reference, members), EVERYWHERE)
    return np.bincount(numbers.ravel())[1:] * np.prod(pair.spacing)


def is_above_zero(differences: np.ndarray, level: float) -> bool:
    """Whether at most a share of all ways to flip the signs of the differences has as high a sum."""
    flipped = [np.dot(signs, differences) for signs in product((1, -1), repeat=len(differences))]
    return float(np.mean(np.array(flipped) >= differences.sum() - 1e-12)) <= level


def by_brute_force(pairs: list[CasePair], labels: Labels) -> tuple[dict[str, Rule], dict[str, dict[str, float]]]:
    """Every rule is applied to every volume, which is scored again; folds are those of `decided`."""
    choose = np.arange(len(pairs)) % 5 % 2 == 1
    arrays, rules, gains = [pair.prediction for pair in pairs], {}, {}
    names, values = labels.region_names, labels.region_values
    rounds = [[i] for i in range(len(names))] if labels.has_regions else [list(range(len(names)))]
    for regions in rounds:
        before, chosen = dice_of(arrays, pairs, labels), {}
        for i in regions:
            tries = []
            for tried in candidate_rules([sizes_of(pair, values[i]) for pair in pairs]):
                cleaned = [
                    apply_rules(a, p.spacing, labels, {names[i]: tried}) for a, p in zip(arrays, pairs, strict=True)
                ]
                after = dice_of(cleaned, pairs, labels)
                gain, lost = (after - before)[choose, i].mean(), 0.0
                for old, new, pair in zip(arrays, cleaned, pairs, strict=True):
                    inside = np.isin(pair.reference, values[i])
                    removed = inside & np.isin(old, values[i]) & ~np.isin(new, values[i])
                    lost = max(lost, removed.sum() / max(1, inside.sum()))
                others = np.delete(after - before, i, axis=1).mean(axis=0)
                if gain >= 1e-4 and lost <= 0.1 and (others > -1e-9).all():
                    tries.append((-round(gain, 9), len(tries), tried, after))
            if tries:
                chosen[i] = min(tries, key=lambda entry: entry[:2])
        for i, (_, _, tried, after) in chosen.items():
            ours, theirs = before[~choose, i], after[~choose, i]
            level = 0.025 / len(rounds) / len(chosen)
            if (theirs - ours).mean() >= 1e-4 and is_above_zero(theirs - ours, level):
                rules[names[i]] = tried
                gains[names[i]] = {"before": ours.mean(), "after": theirs.mean(), "n": len(ours)}
        arrays = [apply_rules(p.prediction, p.spacing, labels, rules) for p in pairs]
    return rules, gains


def decided(
    pairs: list[CasePair], labels: Labels, folds: int = 5, more: list[CasePair] | None = None, **options: Any
) -> Decision:
    """The decision if fold k holds out every k-th case; `more` cases belong to no trained fold."""
    return choose_rules(
        [partial(lambda pair: pair, pair) for pair in pairs],
        [str(i % folds) for i in range(len(pairs))],
        [partial(lambda pair: (pair.reference, pair.spacing), pair) for pair in (*pairs, *(more or ()))],
        labels, **options,
    )  # fmt: skip


def nested(i: int, pair: CasePair) -> CasePair:
    """Nested regions with specks, and a small core deep in the rest of the whole."""
    reference = pair.reference + ndimage.binary_erosion(pair.reference == 2)
    prediction = speckled(reference, 50 + i, 6, 3, (1, 2, 3))
    inside = ndimage.distance_transform_edt(prediction == 1)
    prediction[tuple(slice(c, c + 2) for c in np.unravel_index(inside.argmax(), inside.shape))] = 2 + i % 2
    return CasePair(prediction, reference, SPACING)


@pytest.mark.parametrize("labels", [TWO, TUMOUR], ids=["labels", "regions"])
def test_equals_brute_force(real: list[CasePair], labels: Labels) -> None:
    pairs = real if labels is TWO else [nested(i, pair) for i, pair in enumerate(real)]
    found, (rules, gains) = decided(pairs, labels, workers=2), by_brute_force(pairs, labels)
    assert found.rules == rules and len(rules) >= 2
    assert {name: gain.model_dump() for name, gain in found.gains.items()} == {
        name: pytest.approx(gain) for name, gain in gains.items()
    }
    assert decided(pairs, labels, workers=0) == found


def lesions(sizes: list[int], true: list[bool]) -> CasePair:
    """Cubes in a row, true ones in the reference too."""
    prediction, reference = np.zeros((2, 8, 8, 80), np.uint8)
    for i, (side, right) in enumerate(zip(sizes, true, strict=True)):
        box = (slice(0, side), slice(0, side), slice(10 * i, 10 * i + side))
        prediction[box], reference[box] = 1, right
    return CasePair(prediction, reference, UNIT)


RIGHT, SPECK = lesions([6], [True]), lesions([6, 2], [True, False])


def test_many_true_lesions_are_not_reduced_to_the_largest() -> None:
    pairs = 10 * [lesions([5, 6, 4, 2], [True, True, True, False]), lesions([7, 5, 1], [True, True, False])]
    found = decided(pairs, LESION)
    assert found.rules == {"lesion": rule(16.0)}, "a quarter of the smallest"
    assert found.gains["lesion"].after == 1.0 and found.gains["lesion"].n == 12


def test_a_false_label_may_vanish() -> None:
    """Removing all of a false prediction makes its Dice n/a instead of 0, as everywhere."""
    found = decided(10 * [lesions([2], [False]), SPECK, lesions([7], [True])], LESION)
    assert found.rules == {"lesion": rule(21.0)}, "a tenth of the smallest"
    assert found.gains["lesion"].after == 1.0 and found.gains["lesion"].before == pytest.approx((0 + 432 / 440 + 1) / 3)


@pytest.mark.parametrize(
    ("pairs", "why"),
    [
        (20 * [RIGHT], ""),  # nothing to remove
        (20 * [lesions([2], [False])], "a mean Dice below 0.5"),  # never in the reference
        (9 * [SPECK], "9 cases held out, 10 are needed"),
        (9 * [SPECK] + 9 * [lesions([], [])], "it is in 9 held-out cases, 10 are needed"),
        (20 * [lesions([5, 6, 5], [True, False, False])], "a mean Dice below 0.5"),  # a weak model
        (10 * [SPECK, lesions([6, 2], [True, True])], ""),  # the second component is real in half of the cases
        ([SPECK, *(19 * [RIGHT])], ""),  # helps one case that does not choose
        # of the cases that did not choose, it helps one or two
        (16 * [RIGHT] + 2 * [SPECK] + 2 * [RIGHT], '21 mm3" is not confirmed by the 12 cases'),
        (17 * [RIGHT] + 3 * [SPECK], '21 mm3" is not confirmed by the 12 cases'),
    ],
)
def test_where_no_rule_is_kept(pairs: list[CasePair], why: str) -> None:
    found = decided(pairs, LESION)
    assert (found.rules, found.gains) == ({}, {})
    assert (why in " ".join(found.notes)) if why else not found.notes


def test_a_rule_deletes_no_structure_of_any_reference() -> None:
    """Organs of 12 to 23 voxels, and false pieces: what is larger than an organ stays, though to remove it would help.

    The same if the small organs are in the folds that were not trained.
    """
    rng = np.random.default_rng(0)
    pairs = []
    for i in range(20):
        organ, false = np.zeros((2, 8, 8, 40), np.uint8)
        organ[:1, :3, : 4 + i % 4] = 1
        false[0, 5:7, 20 : 20 + rng.integers(8, 16)] = 1  # of 16 to 30 voxels
        pairs.append(CasePair(np.maximum(organ, false) if i % 2 else organ, organ, UNIT))
    small = lesions([2], [True])  # 8 voxels
    for more in ([], [small]):
        rules = decided(pairs, LESION, more=more).rules
        for pair in (*pairs, *more):
            assert np.array_equal(apply_rules(pair.reference, pair.spacing, LESION, rules), pair.reference)
    specks, two = 20 * [lesions([5, 3], [True, False])], lesions([5, 3], [True, True])
    assert decided(specks, LESION).rules == {"lesion": rule(31.0)}, "a quarter of 125 mm3"
    assert decided(specks, LESION, more=[small]).rules == {"lesion": LARGEST}, "27 mm3 is more than an organ has"
    assert decided(specks, LESION, more=[small, two]).rules == {}, "a second one is real"
    nearly = lesions([6, 2], [True, True])  # 8 of 224 voxels
    assert decided(specks, LESION, more=[small, nearly]).rules == {"lesion": LARGEST}
    organs = [*(19 * [SPECK]), lesions([6, 6, 2], [True, True, False])]
    assert decided(organs, LESION).rules == {"lesion": rule(21.0)}, "two organs in one case: the largest is not tried"


@pytest.mark.parametrize("folds", [1, 5])
def test_chance_is_hardly_ever_kept_and_an_effect_is(folds: int) -> None:
    """Specks that are right in half of the cases (so that no rule has an effect), or never."""

    def keeps(seed: int, wrong: float) -> bool:
        rng, pairs = np.random.default_rng(seed), []
        for _ in range(20):
            reference = np.zeros((1, 16, 40), np.uint8)
            reference[0, 2:14, 2:18] = 1
            prediction = reference.copy()
            for row in range(0, 15, 5):
                side = int(rng.integers(0, 4))
                box = slice(None), slice(row, row + side), slice(30, 30 + side)
                prediction[box], reference[box] = 1, rng.random() >= wrong
            pairs.append(CasePair(prediction, reference, (999.0, 1.0, 1.0)))
        return bool(decided(pairs, LESION, folds, workers=0).rules)

    assert sum(keeps(seed, 0.5) for seed in range(40)) <= 2
    assert sum(keeps(seed, 1.0) for seed in range(5)) == 5


def test_the_more_labels_the_more_certain_a_rule_must_be() -> None:
    """Seven of seven cases that confirm are few enough to be chance where six labels are tried."""
    many = Labels(names={"background": 0, **{str(value): value for value in range(1, 7)}})
    helped, right = (
        CasePair(*(np.concatenate([array * value for value in range(1, 7)]) for array in pair[:2]), UNIT)
        for pair in (SPECK, RIGHT)
    )
    assert list(decided([SPECK if i < 11 else RIGHT for i in range(20)], LESION).rules) == ["lesion"]
    assert not decided([helped if i < 11 else right for i in range(20)], many).rules
    assert len(decided([helped if i < 16 else right for i in range(20)], many).rules) == 6


def test_which_cases_choose() -> None:
    assert choosing_cases(list("0123401234")).tolist() == 2 * [False, True, False, True, False]
    assert choosing_cases(10 * ["2"]).tolist() == 2 * [False, True, False, True, False], "a single fold is divided"
    assert choosing_cases(["3", "0", "3", "0"]).tolist() == [True, False, True, False]


def test_ignored_voxels_count_as_size_only() -> None:
    labels = Labels(names={"background": 0, "lesion": 1}, ignore=9)
    pairs = [lesions([6, 2], [True, False]) for _ in range(20)]
    assert list(decided(pairs, labels).rules) == ["lesion"]
    for pair in pairs:
        pair.reference[:, :, 8:] = 9  # it is unknown whether the small ones are real
    assert decided(pairs, labels) == Decision({}, {}, ())


def test_rules_never_take_from_other_labels() -> None:
    """Cleaning the whole would remove a right core: most cases gain, and the core's mean falls."""
    labels = Labels(names={"background": 0, "whole": (1, 2), "core": (2,)}, region_order=(1, 2))
    pairs = []
    for i in range(20):
        prediction = np.zeros((8, 8, 30), np.uint8)
        prediction[:6, :6, :6] = 1
        reference = prediction.copy()
        prediction[:2, :2, 20:22] = 1
        if i % 5 == 0:  # the core is small, and apart
            prediction[0, 0, 20:22] = reference[0, 0, 20:22] = 2
        pairs.append(CasePair(prediction, reference, UNIT))
    assert list(decided(pairs, LESION).rules) == ["lesion"], "without the core"
    found = decided(pairs, labels)
    assert found.rules == by_brute_force(pairs, labels)[0] == {}
    assert found.notes == (
        "no postprocessing of core: it is in 4 held-out cases, 10 are needed to choose a rule and to confirm it",
    )


def test_the_candidates() -> None:
    tried = [str(rule) for rule in candidate_rules([np.array([900.0, 200.0]), np.array([]), np.array([64.0])], "px")]
    assert tried == [f"no component below {size} px" for size in ("6.4", "16", "32", "57")]
    *sizes, last = candidate_rules([np.array([1234.0, 100.0])])
    assert last == LARGEST and sizes == [rule(10), rule(25), rule(50), rule(90)]
    assert candidate_rules([np.array([1234.0, 200.0])])[-1] == rule(180), "14 % of a reference would be removed"
    assert candidate_rules([]) == candidate_rules([np.zeros(0)]) == []


def test_how_rules_read() -> None:
    rules = {"the largest component": LARGEST, "no component below 8 mm3": rule(8),
             "the largest component, from 12.5 mm3": rule(12.5, True)}  # fmt: skip
    assert {str(rule): rule for rule in rules.values()} == rules
