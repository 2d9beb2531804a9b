"""The nonzero mask and its box."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.ndimage import binary_fill_holes

from nnunet_lite.data.geometry import bounding_box, nonzero_box, nonzero_mask, slices


@pytest.mark.parametrize("seed", range(4))
def test_mask_equals_that_of_scipy(seed: int) -> None:
    rng = np.random.default_rng(seed)
    array = np.zeros((3, 20, 24, 28), np.float32)
    array[:, 3:15, 2:20, 5:27] = rng.random((3, 12, 18, 22)) > 0.6
    mask = nonzero_mask(array)
    assert np.array_equal(mask, binary_fill_holes((array != 0).any(axis=0)))
    assert mask.sum() > (array != 0).any(axis=0).sum(), "there were holes to fill"
    assert nonzero_box(array) == bounding_box(mask)


def test_box_is_half_open_and_in_the_order_of_the_axes() -> None:
    mask = np.zeros((5, 6, 7), bool)
    mask[1:3, 2, 4:7] = True
    assert bounding_box(mask) == ((1, 3), (2, 3), (4, 7))
    assert mask[slices(bounding_box(mask))].all()


def test_full_and_empty_arrays_are_not_cropped() -> None:
    assert nonzero_box(np.ones((1, 2, 3, 4))) == nonzero_box(np.zeros((1, 2, 3, 4))) == ((0, 2), (0, 3), (0, 4))
    assert nonzero_mask(np.ones((1, 2, 3, 4))).all()
    assert not nonzero_mask(np.zeros((1, 2, 3, 4))).any()
