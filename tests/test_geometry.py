"""Turning arrays and their geometry moves voxels and computes none."""

from __future__ import annotations

from itertools import permutations, product

import nibabel
import numpy as np
import pytest
import SimpleITK
from nibabel.orientations import axcodes2ornt, io_orientation, ornt_transform

from nnunet_lite.data.formats import ras_affine
from nnunet_lite.data.geometry import Geometry, Turn, common_orientation, turn_between

ALL = ["".join(letters) for order in permutations(("LR", "PA", "SI")) for letters in product(*order)]


def image(orientation: str, tilt: float = 0.0) -> tuple[np.ndarray, Geometry]:
    """An array (4, 5, 6) with a different number in each voxel, and its geometry."""
    itk = SimpleITK.GetImageFromArray(np.arange(4 * 5 * 6, dtype=np.int16).reshape(4, 5, 6))
    itk.SetSpacing((1.0, 2.0, 3.0))
    itk.SetOrigin((10.0, -20.0, 30.0))
    oblique = SimpleITK.Euler3DTransform((0, 0, 0), tilt, tilt / 2, -tilt)
    itk.SetDirection(oblique.GetMatrix())
    itk = SimpleITK.DICOMOrient(itk, orientation)
    array = SimpleITK.GetArrayFromImage(itk)
    return array, Geometry(array.shape, itk.GetSpacing()[::-1], itk.GetOrigin(), itk.GetDirection())


@pytest.mark.parametrize("tilt", [0.0, 0.3])
@pytest.mark.parametrize("orientation", ALL)
def test_a_turn_is_that_of_itk_and_of_nibabel(orientation: str, tilt: float) -> None:
    array, geometry = image(orientation, tilt)
    assert geometry.orientation == orientation
    for target in ("LPS", "RAS", "AIR"):
        turn = turn_between(orientation, target)
        turned, place = turn.apply(array), geometry.turned(turn)
        expected, its_place = image(target, tilt)
        np.testing.assert_array_equal(turned, expected)
        assert (place.shape, place.spacing) == (its_place.shape, its_place.spacing)
        np.testing.assert_allclose(place.origin, its_place.origin, atol=1e-9)
        np.testing.assert_allclose(place.direction, its_place.direction, atol=1e-12)
        back = turn_between(target, orientation)
        np.testing.assert_array_equal(back.apply(turned), array)
        source = nibabel.Nifti1Image(array.transpose(2, 1, 0), ras_affine(geometry))
        change = ornt_transform(io_orientation(source.affine), axcodes2ornt(target))
        theirs = source.as_reoriented(change)
        np.testing.assert_array_equal(np.asarray(theirs.dataobj).transpose(2, 1, 0), turned)
        np.testing.assert_allclose(theirs.affine, ras_affine(place), atol=1e-5)


def test_a_turn_keeps_channels_and_can_be_followed_by_a_transposition() -> None:
    array = np.arange(2 * 4 * 5 * 6).reshape(2, 4, 5, 6)
    turn = turn_between("PIR", "LAS")
    both = turn.then((2, 0, 1))
    np.testing.assert_array_equal(both.apply(array), turn.apply(array).transpose(0, 3, 1, 2))
    assert both.apply(array).base is not None  # a view


def test_nothing_is_turned_where_an_orientation_is_not_known() -> None:
    assert turn_between(None, "RAS") == turn_between("RAS", None) == turn_between("LAS", "LAS") == Turn()
    assert Geometry((1, 4, 5), (999.0, 1.0, 1.0), dimensions=2).orientation is None
    assert Geometry((3, 4, 5), (1.0, 1.0, 1.0), oriented=False).orientation is None


def test_the_orientation_of_most_cases_counts() -> None:
    assert common_orientation(["RAS", "LAS", "LAS", None, None, None]) == "LAS"
    assert common_orientation(["RAS", "LAS"]) == "RAS"
    assert common_orientation([None]) is None
