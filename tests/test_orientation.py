"""The same scan, stored with its axes in any orientation, is planned, preprocessed and predicted equally."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import nibabel
import numpy as np
import pytest
import SimpleITK
from samples import Command, Copy, first_cases, turn_nifti

import nnunet_lite
from nnunet_lite.data.dataset import read_case, read_dataset
from nnunet_lite.data.geometry import Geometry
from nnunet_lite.data.images import read_image, read_images
from nnunet_lite.errors import UserError
from nnunet_lite.inference import predictor
from nnunet_lite.planning.nnunet import plan_to_nnunet
from nnunet_lite.planning.schema import Plan
from nnunet_lite.preprocessing.pipeline import preprocess_image
from nnunet_lite.preprocessing.store import open_case

NNUNET = Path(__file__).parent / "data" / "nnunet_models" / "plain_3d"
STORED = ("LPI", "SAL", "PIR", "LAS", "RAS")


def turn_all(root: Path, orientations: dict[str, str]) -> None:
    """Turn the images and label maps of some cases of the hippocampus data."""
    for case, orientation in orientations.items():
        for folder in ("imagesTr", "labelsTr"):
            file = root / folder / f"{case}.nii.gz"
            turn_nifti(file, file, orientation)


def arrays(workspace: Path, plan: Plan, case: str) -> tuple[np.ndarray, np.ndarray]:
    stored = open_case(workspace / "Task04_Hippocampus" / "preprocessed", plan, "3d_fullres", case)
    return stored.image[:], stored.label[:]


@pytest.fixture
def mixed(tmp_path: Path) -> Path:
    """Ten cases, of which four are stored in other orientations than RAS."""
    root = first_cases(tmp_path / "raw" / "Task04_Hippocampus", 10)
    cases = [path.name.removesuffix(".nii.gz") for path in sorted((root / "imagesTr").iterdir())]
    turn_all(root, dict(zip(cases[2:6], STORED[:4], strict=True)))
    return root


def test_a_mixed_dataset_is_preprocessed_as_one_of_one_orientation(
    mixed: Path, tmp_path: Path, tiny_workspace: Path
) -> None:
    plan = nnunet_lite.plan(mixed, workspace=tmp_path, workers=0)
    truth = Plan.read(tiny_workspace / "Task04_Hippocampus" / "plans.json")
    assert plan.orientation == truth.orientation == "RAS"
    # statistics differ in what is drawn for them
    assert plan.model_copy(update={"channels": truth.channels}) == truth
    fingerprint = json.loads((tmp_path / "Task04_Hippocampus" / "fingerprint.json").read_text())
    assert fingerprint["orientation"] == "RAS" and fingerprint["orientations"].count("RAS") == 6
    nnunet_lite.preprocess(["3d_fullres"], workspace=tmp_path, workers=0)
    for case in read_dataset(mixed).cases:
        for own, expected in zip(arrays(tmp_path, plan, case.id), arrays(tiny_workspace, truth, case.id), strict=True):
            np.testing.assert_array_equal(own, expected)


def test_check_notes_orientations_that_differ(mixed: Path) -> None:
    report = nnunet_lite.check(mixed)
    noted = [problem for problem in report.problems if problem.kind == "orientation"]
    assert report.ok and not report.count("warning")
    assert [problem.found for problem in noted] == [f"stored as {orientation}" for orientation in STORED[:4]]
    assert {(problem.severity, problem.expected) for problem in noted} == {("notice", "RAS as most")}
    assert noted[0].file.endswith("hippocampus_038.nii.gz")


def test_a_dataset_that_asks_for_ras_gets_it(mixed: Path, tmp_path: Path) -> None:
    """As nnU-Net's NibabelIOWithReorient reads it; most images are stored as PIR."""
    cases = [case.id for case in read_dataset(mixed).cases]
    turn_all(mixed, dict.fromkeys(cases[:9], "PIR"))
    assert nnunet_lite.plan(mixed, workspace=tmp_path / "most", workers=0).orientation == "PIR"
    table = json.loads((mixed / "dataset.json").read_text())
    (mixed / "dataset.json").write_text(json.dumps(table | {"overwrite_image_reader_writer": "NibabelIOWithReorient"}))
    plan = nnunet_lite.plan(mixed, workspace=tmp_path / "asked", workers=0)
    assert plan.orientation == "RAS"
    assert plan_to_nnunet(plan, table)["image_reader_writer"] == "NibabelIOWithReorient"


def test_a_label_map_and_a_channel_are_turned_to_their_image(copy_nnunet: Copy) -> None:
    """They are on one grid, only stored otherwise."""
    root = copy_nnunet(1, channels=("T1", "T2"))
    dataset = read_dataset(root)
    case = dataset.cases[0]
    assert case.label is not None
    image, label = read_case(case, dataset)
    turn_nifti(case.images[1], case.images[1], "PIR")
    turn_nifti(case.label, case.label, "LSA")
    assert nnunet_lite.check(root).ok
    same_image, same_label = read_case(case, dataset)
    np.testing.assert_array_equal(same_image.array, image.array)
    np.testing.assert_array_equal(same_label, label)


def test_predictions_do_not_depend_on_the_orientation(
    tiny_model: Path, hippocampus: Path, tmp_path: Path, command: Command
) -> None:
    source, scans = hippocampus / "imagesTs" / "hippocampus_025.nii.gz", tmp_path / "scans"
    scans.mkdir()
    for orientation in STORED:
        turn_nifti(source, scans / f"{orientation}.nii.gz", orientation)
    maps = ("--save-probabilities", "Anterior", "--save-uncertainty")
    code, _, err = command("predict", "-i", scans, "-o", tmp_path / "out", "-m", tiny_model, *maps, cwd=tmp_path)
    assert code == 0
    assert "turned to RAS, the orientation of the model: 1 image stored as LAS (LAS), " in err
    files = sorted((tmp_path / "out").rglob("RAS*.nii.gz"))
    assert len(files) == 3  # a single fold disagrees with none
    for file in files:
        expected = nibabel.load(file)
        for orientation in STORED[:4]:
            found = nibabel.load(str(file).replace("RAS", orientation))
            assert "".join(nibabel.aff2axcodes(found.affine)) == orientation
            found = nibabel.as_closest_canonical(found)
            np.testing.assert_allclose(found.affine, expected.affine, atol=1e-4)
            np.testing.assert_array_equal(found.get_fdata(), expected.get_fdata())
    assert np.unique(nibabel.load(tmp_path / "out" / "RAS.nii.gz").get_fdata()).size > 1


@pytest.mark.parametrize(("reader", "turned"), [("NibabelIOWithReorient", True), ("SimpleITKIO", False)])
def test_a_model_of_nnunet_is_turned_as_nnunet_does(
    reader: str, turned: bool, hippocampus: Path, tmp_path: Path, command: Command
) -> None:
    """Without a known orientation it predicts what is stored, and `info` says so."""
    shutil.copytree(NNUNET, tmp_path / "theirs")
    plans = json.loads((tmp_path / "theirs" / "plans.json").read_text())
    (tmp_path / "theirs" / "plans.json").write_text(json.dumps(plans | {"image_reader_writer": reader}))
    model = predictor.load(tmp_path / "theirs", device="cpu")
    source = hippocampus / "imagesTs" / "hippocampus_025.nii.gz"
    turn_nifti(source, tmp_path / "PIR.nii.gz", "PIR")
    assert model.plan.orientation == ("RAS" if turned else None)
    of_ras = SimpleITK.GetImageFromArray(model(source))
    of_ras.CopyInformation(SimpleITK.ReadImage(source))
    expected = SimpleITK.GetArrayFromImage(SimpleITK.DICOMOrient(of_ras, "PIR"))
    assert np.array_equal(model(tmp_path / "PIR.nii.gz"), expected) == turned
    code, out, err = command("import", tmp_path / "theirs", "-w", tmp_path / "workspace", cwd=tmp_path)
    assert code == 0, err
    folder = next((tmp_path / "workspace").glob("*/models/*"))
    code, out, _ = command("info", folder, cwd=tmp_path)
    words = "images are reoriented to RAS" if turned else "orientation not known: images are used as they are stored"
    assert code == 0 and words in out


def test_an_old_plan_without_orientation_still_takes_images_as_stored(
    tiny_workspace: Path, hippocampus: Path, tmp_path: Path
) -> None:
    values = json.loads((tiny_workspace / "Task04_Hippocampus" / "plans.json").read_text())
    del values["orientation"]
    (tmp_path / "plans.json").write_text(json.dumps(values))
    plan = Plan.read(tmp_path / "plans.json")
    assert plan.orientation is None
    turn_nifti(hippocampus / "imagesTs" / "hippocampus_025.nii.gz", tmp_path / "PIR.nii.gz", "PIR")
    image = read_image(tmp_path / "PIR.nii.gz")
    place = preprocess_image(image, None, plan, plan.configuration("3d_fullres")).placement
    assert place.turn.order == plan.axis_order and not any(place.turn.reversed)


def test_what_a_user_accepts_is_taken_as_it_is_stored(hippocampus: Path, tmp_path: Path) -> None:
    """Two files of one array whose headers differ in more than a turn: with --accept-geometry nothing is turned."""
    source = nibabel.load(hippocampus / "imagesTr" / "hippocampus_001.nii.gz")
    array = np.asarray(source.dataobj)
    las = np.diag([-1.0, 1.0, 1.0, 1.0])
    las[:3, 3] = 90, -20, 7
    nibabel.save(nibabel.Nifti1Image(array, las), tmp_path / "a_0000.nii.gz")
    nibabel.save(nibabel.Nifti1Image(array, np.eye(4)), tmp_path / "a_0001.nii.gz")
    files = (tmp_path / "a_0000.nii.gz", tmp_path / "a_0001.nii.gz")
    image = read_images(files, accept_geometry=True)
    np.testing.assert_array_equal(image.array[0], image.array[1])
    with pytest.raises(UserError, match="accept it with --accept-geometry"):
        read_images(files)


@pytest.mark.parametrize("degrees", [45, 135, -135])
def test_equal_grids_are_never_turned(tmp_path: Path, degrees: int) -> None:
    """Half way between two axes, rounding decides on the letters of the sform and of the qform."""
    array = np.arange(5 * 6 * 7, dtype=np.uint8).reshape(5, 6, 7)
    c, s = np.cos(np.radians(degrees)), np.sin(np.radians(degrees))
    affine = np.eye(4)
    affine[:2, :2] = [[c, -s], [s, c]]
    for name, form in (("s", "set_sform"), ("q", "set_qform")):
        image = nibabel.Nifti1Image(array, None)
        getattr(image, form)(affine, 1)
        nibabel.save(image, tmp_path / f"{name}.nii.gz")
    first, second = read_image(tmp_path / "s.nii.gz"), read_image(tmp_path / "q.nii.gz")
    np.testing.assert_array_equal(second.aligned(first.geometry).array, first.array)


def test_files_that_state_no_orientation_are_not_turned(tmp_path: Path) -> None:
    array = np.arange(4 * 5 * 6, dtype=np.int16).reshape(4, 5, 6)
    nibabel.save(nibabel.Nifti1Image(array.T, None), tmp_path / "a.nii.gz")  # both codes are 0
    nibabel.save(nibabel.AnalyzeImage(array.T, None), tmp_path / "b.hdr")
    (tmp_path / "c.nrrd").write_bytes(
        b"NRRD0004\ntype: short\ndimension: 3\nsizes: 6 5 4\nspacings: 1 1 1\nendian: little\nencoding: raw\n\n"
        + array.astype("<i2").tobytes()
    )
    SimpleITK.WriteImage(SimpleITK.GetImageFromArray(array), tmp_path / "d.gipl")
    ras = Geometry(array.shape, (1.0, 1.0, 1.0), direction=(-1, 0, 0, 0, -1, 0, 0, 0, 1))
    for name in ("a.nii.gz", "b.hdr", "c.nrrd", "d.gipl"):
        image = read_image(tmp_path / name)
        assert image.geometry.orientation is None and image.aligned(ras) is image, name
        assert image.geometry.differences(ras) == [], name
        np.testing.assert_array_equal(image.array[0], array)


def test_check_notes_files_without_an_orientation(copy_dataset: Copy) -> None:
    root = copy_dataset(5)
    for file in (root / "imagesTr" / "hippocampus_001.nii.gz", root / "labelsTr" / "hippocampus_008.nii.gz"):
        nibabel.save(nibabel.Nifti1Image(np.asarray(nibabel.load(file).dataobj), None), file)
    noted = [problem for problem in nnunet_lite.check(root).problems if problem.kind == "orientation"]
    assert [(problem.file, problem.found) for problem in noted] == [
        ("labelsTr/hippocampus_008.nii.gz", "states no orientation"),
        ("imagesTr/hippocampus_001.nii.gz", "states no orientation"),
    ]
