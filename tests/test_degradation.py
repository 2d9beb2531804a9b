"""Degraded copies of real images stay on one grid with their references, and differ from them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from nnunet_lite.data.images import Image, read_image, read_label
from nnunet_lite.evaluation.degradation import DEGRADATIONS, Labelled


@pytest.fixture(scope="module")
def pair(hippocampus: Path) -> Labelled:
    image = read_image(hippocampus / "imagesTr" / "hippocampus_001.nii.gz", 1)
    return Labelled(image, read_label(hippocampus / "labelsTr" / "hippocampus_001.nii.gz")[0])


@pytest.fixture(scope="module")
def picture(pair: Labelled) -> Labelled:
    """A slice of it, as a picture of three channels."""
    array, geometry = np.repeat(pair.image.array[:, 10:11], 3, axis=0), pair.image.geometry
    flat = replace(geometry, shape=(1, *geometry.shape[1:]), dimensions=2)
    return Labelled(Image(array, flat), pair.reference[10:11])


@pytest.mark.parametrize("kind", DEGRADATIONS)
@pytest.mark.parametrize("of", ["pair", "picture"])
def test_degraded_images_fit_their_references(kind: str, of: str, request: pytest.FixtureRequest) -> None:
    given: Labelled = request.getfixturevalue(of)
    before = given.image.array.copy()
    for strength in (0.0, 1.0):
        made = DEGRADATIONS[kind](given, strength, np.random.default_rng(1))
        shape = made.reference.shape
        assert made.image.array.shape[1:] == shape == made.image.geometry.shape and np.isfinite(made.image.array).all()
        assert shape != before.shape[1:] or not np.array_equal(made.image.array, before)
        same = DEGRADATIONS[kind](given, strength, np.random.default_rng(1))
        np.testing.assert_array_equal(same.image.array, made.image.array)
    np.testing.assert_array_equal(given.image.array, before)


def test_thick_slices_have_their_spacing(pair: Labelled) -> None:
    made = DEGRADATIONS["thick slices"](pair, 0.5, np.random.default_rng(0)).image.geometry
    axis = int(np.argmax(made.spacing))
    assert made.spacing[axis] == 4 and made.shape[axis] == pair.image.geometry.shape[axis] // 4


def test_a_flip_turns_image_and_reference(pair: Labelled) -> None:
    made = DEGRADATIONS["flipped"](pair, 0.5, np.random.default_rng(0))
    inside = pair.image.array[0][pair.reference > 0]
    assert made.image.array[0][made.reference > 0].mean() == pytest.approx(inside.mean())
