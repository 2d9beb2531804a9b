"""Rules for components do what they say, and those that are kept are those that a search by brute force keeps."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from scipy import ndimage

from nnunet_lite.data.images import read_label
from nnunet_lite.data.labels import Labels
from nnunet_lite.evaluation.metrics import score_case
from nnunet_lite.evaluation.postprocess import Pair, Rule, apply_rules, candidates, decide, thresholds_between
from nnunet_lite.evaluation.statistics import mean_of, paired

TWO = Labels(names={"background": 0, "Anterior": 1, "Posterior": 2})
TUMOUR = Labels(names={"background": 0, "whole": (1, 2, 3), "core": (2, 3), "enhancing": (3,)}, region_order=(1, 2, 3))
SPACING = (2.0, 1.0, 0.5)  # a voxel is one mm3
EVERYWHERE = np.ones((3, 3, 3))


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
def real(hippocampus: Path) -> list[Pair]:
    """Four references, and predictions with up to eight specks."""
    files = sorted((hippocampus / "labelsTr").glob("*.nii.gz"))[:4]
    references = [read_label(path)[0] for path in files]
    return [Pair(speckled(r, i, 2 + i, 3, (1, 2)), r, SPACING) for i, r in enumerate(references)]


def by_scipy(array: np.ndarray, members: tuple[int, ...], rule: Rule, voxel: float) -> np.ndarray:
    """Which voxels of a region go, one component after the other."""
    numbers, count = ndimage.label(np.isin(array, members), EVERYWHERE)
    sizes = [int((numbers == i).sum()) * voxel for i in range(1, count + 1)]
    gone = np.zeros(array.shape, bool)
    for i, size in enumerate(sizes, 1):
        smaller = rule.min_size_mm3 is not None and size < rule.min_size_mm3
        if smaller or (rule.largest_component and i - 1 != sizes.index(max(sizes))):
            gone |= numbers == i
    return gone


# ------------------------------------------------------------------------------------------------------ applying rules


@pytest.mark.parametrize("rule", [Rule(True), Rule(False, 25.0), Rule(True, 30.0), Rule(False, 1e6)], ids=str)
def test_what_a_rule_removes(real: list[Pair], rule: Rule) -> None:
    removed = 0
    for pair in real:
        before = pair.prediction.copy()
        found = apply_rules(pair.prediction, SPACING, TWO, {"Posterior": rule})
        gone = by_scipy(before, (2,), rule, 1.0)
        assert np.array_equal(found, np.where(gone, 0, before))
        assert np.array_equal(pair.prediction, before), "what was given stays as it is"
        removed += int(gone.sum())
    assert removed > 5


def test_nothing_to_remove() -> None:
    there = blank()
    there[2:4, 3:6, 3:9] = 1
    for array, rules in ((there, {"Anterior": Rule(True, 3.0)}), (blank(), {"Anterior": Rule(True)}), (there, {})):
        assert apply_rules(array, SPACING, TWO, rules) is array


def test_of_equals_the_first_is_the_largest_and_corners_join() -> None:
    array = blank()
    array[1, 1, 1] = array[2, 2, 2] = 1  # one component, by a corner
    array[4, 8, 8:10] = 1
    kept = apply_rules(array, SPACING, TWO, {"Anterior": Rule(True)})
    assert set(zip(*map(np.ndarray.tolist, np.nonzero(kept)), strict=True)) == {(1, 1, 1), (2, 2, 2)}


def test_a_picture_is_measured_in_its_plane() -> None:
    picture = np.zeros((1, 12, 20), np.uint8)
    picture[0, 1:3, 1:3], picture[0, 6:9, 6:9] = 1, 1
    found = apply_rules(picture, (999.0, 1.0, 1.0), TWO, {"Anterior": Rule(min_size_mm3=5)})
    assert found.sum() == 9 and not found[0, :4].any()


def test_what_is_removed_of_a_region_becomes_the_one_around_it() -> None:
    array = blank()
    array[1:5, 2:10, 2:18] = 1
    array[2:4, 3:6, 3:8], array[3, 4, 5] = 2, 3  # a core with something in it
    array[2, 8, 15], array[2, 8, 16] = 2, 3  # a small core: back to the whole
    array[5, 11, 19] = 3  # all of it is small
    core = apply_rules(array, SPACING, TUMOUR, {"core": Rule(True)})
    assert core[2, 8, 15] == core[2, 8, 16] == 1 and core[3, 4, 5] == 3 and core[5, 11, 19] == 1
    whole = apply_rules(array, SPACING, TUMOUR, {"whole": Rule(True)})
    assert whole[5, 11, 19] == 0 and np.array_equal(whole[:5], array[:5])
    inner = apply_rules(array, SPACING, TUMOUR, {"enhancing": Rule(min_size_mm3=2)})
    assert not (inner == 3).any() and np.array_equal(inner > 1, array > 1)


def test_values_of_any_kind() -> None:
    labels = Labels(names={"background": -5, "a": 7, "b": 300})
    array = np.full((4, 8, 8), -5, np.int16)
    array[1:3, 1:4, 1:4], array[0, 7, 7], array[3, 5, 5] = 300, 300, 7
    found = apply_rules(array, (1.0, 1.0, 1.0), labels, {"b": Rule(True)})
    assert found.dtype == np.int16 and found[0, 7, 7] == -5 and found[3, 5, 5] == 7 and (found == 300).sum() == 18


# --------------------------------------------------------------------------------------------------------- the decision


def dice_of(arrays: list[np.ndarray], pairs: list[Pair], labels: Labels) -> np.ndarray:
    """Dice (cases, labels) by scoring whole volumes."""
    rows = [score_case(array, pair.reference, labels, pair.spacing, surface=False)
            for array, pair in zip(arrays, pairs, strict=True)]  # fmt: skip
    return np.array([[row[name].dice for name in labels.region_names] for row in rows], float)


def by_brute_force(pairs: list[Pair], labels: Labels) -> dict[str, Rule]:
    """Every rule is applied to every volume, which is scored anew; one region after the other."""
    arrays, rules = [pair.prediction for pair in pairs], {}
    for i, (name, members) in enumerate(zip(labels.region_names, labels.region_values, strict=True)):
        sizes = []
        for array, pair in zip(arrays, pairs, strict=True):
            numbers, _ = ndimage.label(np.isin(array, members), EVERYWHERE)
            sizes.append(np.bincount(numbers.ravel())[1:] * np.prod(pair.spacing))
        before, found = dice_of(arrays, pairs, labels), []
        for order, rule in enumerate(candidates(sizes)):
            cleaned = [apply_rules(a, p.spacing, labels, {name: rule}) for a, p in zip(arrays, pairs, strict=True)]
            after = dice_of(cleaned, pairs, labels)
            gains = [paired(after[:, [j]], before[:, [j]]) for j in range(len(labels.region_names))]
            helps = gains[i].mean is not None and gains[i].mean >= 1e-4 and gains[i].low >= -1e-9
            if helps and all(gain.mean is None or gain.mean > -1e-9 for gain in gains):
                found.append((-round(gains[i].mean, 9), order, rule, cleaned))
        if found:
            _, _, rules[name], arrays = min(found, key=lambda entry: entry[:2])
    return rules


def readers(pairs: list[Pair]) -> list[Callable[[], Pair]]:
    return [partial(lambda pair: pair, pair) for pair in pairs]


def test_equals_brute_force(real: list[Pair]) -> None:
    rules, gains = decide(readers(real), TWO, workers=2)
    assert rules == by_brute_force(real, TWO)
    assert set(rules) == {"Anterior", "Posterior"}
    arrays = [pair.prediction for pair in real]
    before = dice_of(arrays, real, TWO)
    after = dice_of([apply_rules(a, SPACING, TWO, rules) for a in arrays], real, TWO)
    for i, name in enumerate(TWO.region_names):
        assert (gains[name].before, gains[name].after) == pytest.approx((before[:, i].mean(), after[:, i].mean()))
        assert gains[name].after > gains[name].before + 0.003
    assert decide(readers(real), TWO, workers=0) == (rules, gains)


def test_regions_equal_brute_force(real: list[Pair]) -> None:
    """Nested regions with specks; a whole that shrinks takes its core along."""
    pairs = []
    for i, pair in enumerate(real):
        reference = pair.reference + ndimage.binary_erosion(pair.reference == 2)
        prediction = speckled(reference, 50 + i, 4, 3, (1, 2, 3))
        inside = ndimage.distance_transform_edt(prediction == 1)
        at = tuple(slice(c, c + 2) for c in np.unravel_index(inside.argmax(), inside.shape))
        prediction[at] = 2 + i % 2  # a small core deep in the rest of the whole
        pairs.append(Pair(prediction, reference, SPACING))
    rules, gains = decide(readers(pairs), TUMOUR)
    assert rules == by_brute_force(pairs, TUMOUR) and len(rules) >= 2
    arrays = [pair.prediction for pair in pairs]
    after = dice_of([apply_rules(a, SPACING, TUMOUR, rules) for a in arrays], pairs, TUMOUR)
    for i, name in enumerate(TUMOUR.region_names):
        if name in rules:
            assert gains[name].before == pytest.approx(mean_of(dice_of(arrays, pairs, TUMOUR)[:, [i]]))
            assert gains[name].after == pytest.approx(mean_of(after[:, [i]]))


def lesions(sizes: list[int], true: list[bool]) -> Pair:
    """Cubes in a row, true ones in the reference too."""
    prediction, reference = np.zeros((8, 8, 80), np.uint8), np.zeros((8, 8, 80), np.uint8)
    for i, (side, right) in enumerate(zip(sizes, true, strict=True)):
        box = (slice(0, side), slice(0, side), slice(10 * i, 10 * i + side))
        prediction[box] = 1
        reference[box] = int(right)
    return Pair(prediction, reference, (1.0, 1.0, 1.0))


LESION = Labels(names={"background": 0, "lesion": 1})


def test_many_true_lesions_are_not_reduced_to_the_largest() -> None:
    pairs = [lesions([5, 6, 4, 2], [True, True, True, False]), lesions([7, 5, 1], [True, True, False])]
    rules, gains = decide(readers(pairs), LESION)
    assert rules == {"lesion": Rule(min_size_mm3=20.0)}
    assert gains["lesion"].after == 1.0


def test_a_label_that_is_not_there_may_vanish() -> None:
    """Removing all of a false prediction makes its Dice n/a instead of 0, as everywhere."""
    pairs = [lesions([2], [False]), lesions([6, 2], [True, False]), lesions([7], [True])]
    rules, gains = decide(readers(pairs), LESION)
    assert list(rules) == ["lesion"] and rules["lesion"].min_size_mm3 is not None
    assert 8 < rules["lesion"].min_size_mm3 <= 216
    assert gains["lesion"].before == pytest.approx((0 + 432 / 440 + 1) / 3) and gains["lesion"].after == 1.0


@pytest.mark.parametrize(
    "pairs",
    [
        [lesions([6], [True]), lesions([5], [True])],  # nothing to remove
        [lesions([2], [False]), lesions([2], [False])],  # never there: no mean to raise
        [lesions([6, 2], [True, False])],  # one case tells nothing
        [lesions([6, 3], [True, False]), lesions([6, 3], [True, True]), lesions([6, 3], [True, True])],  # harms more
        [lesions([7, 2], [True, False]), lesions([2, 2], [True, True])],  # helps one case and harms another
    ],
)
def test_where_no_rule_helps(pairs: list[Pair]) -> None:
    assert decide(readers(pairs), LESION) == ({}, {})


def test_ignored_voxels_count_as_size_only() -> None:
    labels = Labels(names={"background": 0, "lesion": 1}, ignore=9)
    pairs = [lesions([6, 2], [True, False]), lesions([5, 3], [True, False])]
    assert list(decide(readers(pairs), labels)[0]) == ["lesion"]
    for pair in pairs:
        pair.reference[:, :, 8:] = 9  # nobody knows whether the small ones are there
    assert decide(readers(pairs), labels) == ({}, {})


def test_rules_never_take_from_other_labels() -> None:
    """Cleaning the whole would remove a right core: two of three cases gain, and the core's mean falls."""
    labels = Labels(names={"background": 0, "whole": (1, 2), "core": (2,)}, region_order=(1, 2))
    pairs = []
    for core in (False, False, True):
        prediction = np.zeros((8, 8, 30), np.uint8)
        prediction[:6, :6, :6] = 1
        reference = prediction.copy()
        prediction[:3, :3, 20:23] = 1
        if core:
            prediction[:3, :3, 20:23] = 2
            reference[1, 1, 20:23] = 2
        pairs.append(Pair(prediction, reference, (1.0, 1.0, 1.0)))
    rules, _ = decide(readers(pairs), labels)
    assert rules == by_brute_force(pairs, labels) == {}


def test_sizes_that_are_tried() -> None:
    assert thresholds_between(np.array([3.0, 5.0, 137.0, 1003.7])) == [4.0, 30.0, 400.0]
    assert thresholds_between(np.array([4.0])) == thresholds_between(np.zeros(0)) == []
    many = np.unique(np.random.default_rng(0).lognormal(4, 3, 5000))
    tried = thresholds_between(many)
    assert 100 < len(tried) <= 200 and tried == sorted(tried)
    places = np.searchsorted(many, tried)
    assert places[0] <= 2 and places[-1] == len(many) - 1 and len(set(places)) == len(tried)


def test_how_rules_read() -> None:
    both, size, largest = Rule(True, 12.5), Rule(False, 8), Rule(True)
    words = [str(rule) for rule in (largest, size, both)]
    assert words == ["the largest component", "no component below 8 mm3", "the largest component, from 12.5 mm3"]
