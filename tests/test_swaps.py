"""Left and right labels change places, and what cannot be swapped is refused before training."""

from __future__ import annotations

import pytest

from nnunet_lite.data.labels import Labels
from nnunet_lite.errors import UserError
from nnunet_lite.planning.schema import Plan
from nnunet_lite.planning.swaps import (
    ClassSwap,
    check_swaps,
    make_swap_table,
    swap_channels,
    swap_of,
    warn_of_lost_swaps,
)
from nnunet_lite.settings import AugmentationSettings

KIDNEYS = Labels(names={"background": 0, "kidney_left": 4, "liver": 2, "kidney_right": 7}, ignore=9)
# edema and core are the values 1 and 2 on the left, 3 and 4 on the right; 5 is on both sides
TUMOR = Labels(
    names={
        "background": 0,
        "left": (1, 2),
        "right": (3, 4),
        "left_core": (2,),
        "right_core": (4,),
        "any": (1, 2, 3, 4, 5),
    },
    region_order=(1, 3, 2, 4, 5),
)


def test_classes_change_places_and_ignore_stays() -> None:
    pairs = [("kidney_left", "kidney_right")]
    assert KIDNEYS.values == (0, 2, 4, 7)
    assert make_swap_table(KIDNEYS, pairs) == (0, 1, 3, 2, 4, 5)
    assert swap_channels(KIDNEYS, pairs) == (0, 1, 3, 2)
    assert make_swap_table(KIDNEYS, []) == (0, 1, 2, 3, 4, 5)


def test_classes_of_regions_follow_from_the_regions_they_are_in() -> None:
    pairs = [("left", "right"), ("left_core", "right_core")]
    assert make_swap_table(TUMOR, pairs) == (0, 3, 4, 1, 2, 5, 6)
    names = TUMOR.region_names
    swapped = [names[i] for i in swap_channels(TUMOR, pairs)]
    assert dict(zip(names, swapped, strict=True)) == {
        "left": "right",
        "right": "left",
        "left_core": "right_core",
        "right_core": "left_core",
        "any": "any",
    }


@pytest.mark.parametrize(
    ("labels", "pairs", "message"),
    [
        (KIDNEYS, [("kidney_left", "kidney_rihgt")], "no label 'kidney_rihgt'. Did you mean 'kidney_right'"),
        (KIDNEYS, [("kidney_left", "x")], "There are: liver, kidney_left, kidney_right"),
        (KIDNEYS, [("kidney_left", "kidney_right"), ("liver", "kidney_left")], "'kidney_left' is named twice"),
        (KIDNEYS, [("liver", "liver")], "'liver' is named twice"),
        (KIDNEYS, [("background", "liver")], "no label 'background'"),
        (TUMOR, [("left", "right")], "no value is in .* alone, which the value 2 would become"),
        (
            Labels(names={"background": 0, "l": (1, 2), "r": (3, 4)}, region_order=(1, 3)),
            [("l", "r")],
            r"the value 1 \(in l\) could become any of \[3, 4\]",
        ),
        (
            Labels(names={"background": 0, "l": (1, 2), "r": (3,)}, region_order=(1, 3)),
            [("l", "r")],
            "the value 1 .* could become any of",
        ),
    ],
)
def test_what_cannot_be_swapped_is_refused(labels: Labels, pairs: list[tuple[str, str]], message: str) -> None:
    with pytest.raises(UserError, match=message):
        check_swaps(labels, AugmentationSettings(mirror_swap=tuple(pairs)), 3)


def test_an_axis_that_the_patch_does_not_have_is_refused() -> None:
    check_swaps(KIDNEYS, AugmentationSettings(mirror_swap_axis=1), 2)
    with pytest.raises(UserError, match="axis = 2 is not an axis of a patch with 2"):
        check_swaps(KIDNEYS, AugmentationSettings(mirror_swap_axis=2), 2)


def test_left_and_right_are_found_by_orientation_and_axis_order(tiny_plan: Plan) -> None:
    settings = AugmentationSettings(mirror_swap=(("Anterior", "Posterior"),))
    for order, axis, flat in [((0, 1, 2), 2, 2), ((0, 2, 1), 1, 1), ((2, 0, 1), 0, None)]:
        turned = tiny_plan.model_copy(update={"axis_order": order})
        assert swap_of(turned, settings, 3) == ClassSwap(axis, (0, 2, 1, 3), (0, 2, 1))
        assert swap_of(turned, settings, 2) == (None if flat is None else ClassSwap(flat, (0, 2, 1, 3), (0, 2, 1)))
    for orientation, axis in (("LAS", 2), ("RPI", 2), ("ASL", 0), ("IRA", 1)):
        stored = tiny_plan.model_copy(update={"orientation": orientation, "axis_order": (0, 1, 2)})
        assert swap_of(stored, settings, 3) == ClassSwap(axis, (0, 2, 1, 3), (0, 2, 1))
    given = settings.model_copy(update={"mirror_swap_axis": 0})
    assert swap_of(tiny_plan, given, 3) == ClassSwap(0, (0, 2, 1, 3), (0, 2, 1))
    assert swap_of(tiny_plan, given, 2) == ClassSwap(1, (0, 2, 1, 3), (0, 2, 1))
    assert swap_of(tiny_plan, AugmentationSettings(), 3) is None


def test_a_run_that_mirrors_without_the_swaps_of_an_earlier_model_warns(
    tiny_plan: Plan, capfd: pytest.CaptureFixture[str]
) -> None:
    swapped = AugmentationSettings(mirror_swap=(("Anterior", "Posterior"),))
    unknown = AugmentationSettings(mirror_swap=(("left", "right"),))
    for earlier, own, dimensions, warns in (
        (swapped, AugmentationSettings(), 3, True),
        (swapped, AugmentationSettings(mirror_axes=(1,)), 2, True),
        (swapped, AugmentationSettings(mirror_axes=(0, 1)), 3, False),
        (swapped, swapped, 3, False),
        (AugmentationSettings(), AugmentationSettings(), 3, False),
        (unknown, AugmentationSettings(), 3, False),  # a model of another dataset
    ):
        warn_of_lost_swaps("earlier", earlier, own, tiny_plan, dimensions)
        said = capfd.readouterr().err
        assert ('augmentation.mirror_swap=[["Anterior", "Posterior"]]' in said) == warns, (own, said)
