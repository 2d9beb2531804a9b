"""When two images share a grid, what commands do where they do not, and that turning moves voxels and computes none."""

from __future__ import annotations

import json
from dataclasses import replace
from itertools import permutations, product
from pathlib import Path

import nibabel
import numpy as np
import pytest
import SimpleITK
from bad_inputs import Command
from nibabel.orientations import axcodes2ornt, io_orientation, ornt_transform
from samples import Copy, move_nifti
from scipy.ndimage import binary_fill_holes

import nnunet_lite
from nnunet_lite.data.dataset import read_case, stored_dataset
from nnunet_lite.data.geometry import (
    Geometry,
    Turn,
    bounding_box,
    common_orientation,
    nonzero_box,
    nonzero_mask,
    slices,
    turn_between,
)
from nnunet_lite.data.images import read_image, read_images
from nnunet_lite.data.nifti import ras_affine
from nnunet_lite.errors import UserError

PLACE = Geometry((40, 50, 60), (1.0, 0.5, 0.5), (-300.0, 120.0, 80.0))
ALL = ["".join(letters) for order in permutations(("LR", "PA", "SI")) for letters in product(*order)]


def kinds(one: Geometry, other: Geometry) -> list[str]:
    found = [what for what, _, _ in one.differences(other)]
    assert found == [what for what, _, _ in other.differences(one)], "the order of the two does not matter"
    return found


@pytest.mark.parametrize("unit", [1e-6, 1e-3, 1.0, 10.0])
def test_tolerances_are_shares_of_a_voxel(unit: float) -> None:
    """From nanometres to centimetres."""
    z, y, x = (s * unit for s in PLACE.spacing)
    place = replace(PLACE, spacing=(z, y, x), origin=(3 * unit, -2 * unit, unit))
    ox, oy, oz = place.origin
    assert kinds(place, replace(place, spacing=(z, y, x * 1.0005), origin=(ox + 0.004 * x, oy, oz))) == []
    assert kinds(place, replace(place, spacing=(z, y, x * 1.002))) == ["spacing"]
    assert kinds(place, replace(place, spacing=(z, y, x * 2))) == ["spacing"]
    assert kinds(place, replace(place, origin=(ox, oy - 0.01 * x, oz))) == ["origin"]
    turned = replace(place, direction=(1.0, -0.001, 0.0, 0.001, 1.0, 0.0, 0.0, 0.0, 1.0))
    assert kinds(place, turned) == ["direction"]
    slightly = replace(place, direction=(1.0, -8e-5, 0.0, 8e-5, 1.0, 0.0, 0.0, 0.0, 1.0))
    assert kinds(place, slightly) == []


def test_rounding_far_from_the_origin_is_none() -> None:
    assert kinds(PLACE, replace(PLACE, origin=(-300.0015, 120.0, 80.0))) == []
    tiny = replace(PLACE, spacing=(0.0004, 0.0004, 0.0004), origin=(50.0, 0.0, 0.0))
    rounded = replace(tiny, origin=(float(np.nextafter(np.float32(50), np.float32(51))), 0.0, 0.0))
    assert kinds(tiny, rounded) == []


def test_one_slice_and_a_flat_image_are_one_grid() -> None:
    flat = Geometry((1, 50, 60), (999 * 0.8, 0.7, 0.8), (5.0, 6.0, 0.0), dimensions=2)
    one = Geometry((1, 50, 60), (5.0, 0.7, 0.8), (5.0, 6.0, 77.0))
    assert kinds(flat, one) == []
    assert kinds(flat, replace(one, spacing=(5.0, 0.7, 0.9))) == ["spacing"]
    assert kinds(one, replace(one, origin=(5.0, 6.0, 0.0))) == ["origin"], "two volumes of one slice have a depth"
    assert kinds(flat, replace(one, shape=(2, 50, 60))) == ["shape"]
    for text in (flat.describe(), *flat.differences(replace(flat, spacing=(999 * 0.8, 0.7, 0.9)))[0]):
        assert "799" not in text, "the depth of a flat image is invented"


def test_what_states_no_spacing_is_compared_by_shape_alone() -> None:
    bare = Geometry(PLACE.shape, (1.0, 1.0, 1.0), calibrated=False)
    assert kinds(PLACE, bare) == [] and kinds(PLACE, replace(bare, shape=(40, 50, 61))) == ["shape"]


def test_check_plan_and_preprocess_take_what_is_accepted(copy_nnunet: Copy, command: Command, tmp_path: Path) -> None:
    """A channel and a label map whose origins are 2 and 3 mm off: warnings that stop a plan until they are accepted."""
    root = copy_nnunet(5, ("T1", "T2"), "data")
    move_nifti(root / "imagesTr" / "hippocampus_001_0001.nii.gz", shift=2)
    move_nifti(root / "labelsTr" / "hippocampus_008.nii.gz", shift=3)
    code, out, _ = command("check", "data", cwd=tmp_path)
    assert code == 0 and "0 errors, 2 warnings" in out and out.count("--accept-geometry") == 2
    assert "warning: imagesTr/hippocampus_001_0001.nii.gz: origin (-3, -1, 1), expected (-1, -1, 1) as" in out
    code, out, err = command("plan", "data", cwd=tmp_path)
    assert code == 2 and "Correct the headers, or plan with --accept-geometry." in err
    assert not (tmp_path / "nnlite_workspace" / "data").exists()
    assert "2 warnings" in command("check", "data", "--accept", "direction", cwd=tmp_path)[1]
    for accept in (("--accept-geometry",), ("--accept", "origin")):
        code, out, _ = command("check", "data", *accept, cwd=tmp_path)
        assert code == 0 and "0 errors, 0 warnings" in out and out.count("notice: ") == 2
    code, out, err = command("plan", "data", "--accept-geometry", cwd=tmp_path)
    assert code == 0, err
    code, out, err = command("preprocess", "3d_fullres", cwd=tmp_path)
    assert code == 0, err
    dataset = stored_dataset(tmp_path / "nnlite_workspace" / "data" / "dataset.json")
    assert dataset.accept_geometry
    image, _ = read_case(dataset.cases[0], dataset)
    assert image.geometry == read_image(dataset.cases[0].images[0]).geometry, "the first file's"
    with pytest.raises(UserError, match=r"origin .* differs .* accept it with --accept-geometry"):
        read_images(dataset.cases[0].images)


def test_spacing_and_shape_are_never_accepted(copy_nnunet: Copy, command: Command, tmp_path: Path) -> None:
    root = copy_nnunet(5, ("T1", "T2"), "data")
    move_nifti(root / "imagesTr" / "hippocampus_001_0001.nii.gz", scale=1.01)
    move_nifti(root / "labelsTr" / "hippocampus_008.nii.gz", scale=1.01)
    for words in (("check", "data"), ("check", "data", "--accept-geometry")):
        code, out, _ = command(*words, cwd=tmp_path)
        assert code == 2 and "2 errors" in out and "--accept-geometry" not in out
    assert command("plan", "data", "--accept-geometry", cwd=tmp_path)[0] == 2


def test_evaluate(hippocampus: Path, command: Command, tmp_path: Path) -> None:
    """The same label map has a Dice of 1 where it may be compared at all."""
    reference = hippocampus / "labelsTr" / "hippocampus_001.nii.gz"
    prediction = tmp_path / reference.name
    prediction.write_bytes(reference.read_bytes())
    move_nifti(prediction, shift=0.0015)
    assert command("evaluate", prediction, reference, "--no-surface", cwd=tmp_path)[0] == 0
    move_nifti(prediction, shift=5)
    code, out, err = command("evaluate", prediction, reference, "--no-surface", cwd=tmp_path)
    assert (code, out) == (2, "") and "If the voxels do match, --accept-geometry compares them as they are." in err
    code, out, _ = command(
        "evaluate", prediction, reference, "--no-surface", "--accept-geometry", "--json", cwd=tmp_path
    )
    assert code == 0 and json.loads(out)["foreground_mean"]["Dice"] == 1
    assert "another origin than the reference, accepted (hippocampus_001.nii.gz)" in json.loads(out)["notes"]
    move_nifti(prediction, scale=2)
    code, _, err = command("evaluate", prediction, reference, "--accept-geometry", cwd=tmp_path)
    assert code == 2 and "--accept-geometry" not in err


@pytest.mark.parametrize("flat", ["images", "labels"])
def test_flat_images_with_label_maps_of_one_slice(tmp_path: Path, flat: str) -> None:
    """And `(x, y, 1)` images with 2D label maps: they are planned, preprocessed and scored."""
    rng = np.random.default_rng(0)
    for folder in ("images", "labels"):
        (tmp_path / "data" / folder).mkdir(parents=True)
    for i in range(6):
        image, label = rng.normal(size=(30, 40)).astype(np.float32), np.zeros((30, 40), np.uint8)
        label[5:15, 8:20] = 1
        for folder, array in (("images", image), ("labels", label)):
            stored, depth = (array, 1.0) if folder == flat else (array[..., None], 5.0)
            file = tmp_path / "data" / folder / f"c{i}.nii.gz"
            nibabel.save(nibabel.Nifti1Image(stored, np.diag([0.8, 0.7, depth, 1])), file)
            if folder == "labels":
                (tmp_path / "other").mkdir(exist_ok=True)
                turned = label if folder != flat else label[..., None]
                nibabel.save(nibabel.Nifti1Image(turned, np.diag([0.8, 0.7, 5.0, 1])), tmp_path / "other" / file.name)
    assert [problem.kind for problem in nnunet_lite.check(tmp_path / "data").problems] == ["understood"]
    planned = nnunet_lite.plan(tmp_path / "data", workspace=tmp_path / "w")
    assert list(planned.configurations) == ["2d"]
    assert nnunet_lite.preprocess(workspace=tmp_path / "w").cases == {"2d": 6}
    scores = nnunet_lite.evaluate(tmp_path / "other", tmp_path / "data" / "labels", surface=False)
    assert scores.foreground().mean == 1


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
        voxel = (1, 0, 2)
        assert turn.apply(array)[turn.apply_to_voxel(voxel, array.shape)] == array[voxel]
        back = turn_between(target, orientation)
        np.testing.assert_array_equal(back.apply(turned), array)
        source = nibabel.Nifti1Image(array.transpose(2, 1, 0), ras_affine(geometry))
        change = ornt_transform(io_orientation(source.affine), axcodes2ornt(target))
        theirs = source.as_reoriented(change)
        np.testing.assert_array_equal(np.asarray(theirs.dataobj).transpose(2, 1, 0), turned)
        np.testing.assert_allclose(theirs.affine, ras_affine(place), atol=1e-5)


def test_an_oblique_orientation_is_that_of_nibabel() -> None:
    rng = np.random.default_rng(5)
    for shear in (0, 0, 0.2):
        for _ in range(50):
            matrix = np.linalg.qr(rng.normal(size=(3, 3)))[0] + shear * rng.normal(size=(3, 3))
            geometry = replace(PLACE, direction=tuple(matrix.ravel().tolist()))
            assert geometry.orientation == "".join(nibabel.aff2axcodes(ras_affine(geometry)))


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


# --------------------------------------------------------------------------------------------------------------- boxes


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
