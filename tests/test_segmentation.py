"""What `model(image)` returns is an array with a geometry, probabilities and files; and the files of any label map."""

from __future__ import annotations

import pickle
import shutil
from copy import copy, deepcopy
from dataclasses import replace
from pathlib import Path

import nibabel
import numpy as np
import pytest
import torch

from nnunet_lite.data.cases import find_cases
from nnunet_lite.data.geometry import PICTURE_SPACING, Geometry
from nnunet_lite.data.images import read_image, read_label
from nnunet_lite.data.labels import Labels
from nnunet_lite.errors import UserError
from nnunet_lite.inference.cases import check_output
from nnunet_lite.inference.folder import Outputs, predict_cases
from nnunet_lite.inference.predictor import Predictor
from nnunet_lite.inference.segmentation import Segmentation, label_file, measure_labels, write_segmentation

LABELS = Labels(names={"background": 0, "Leber": 1, "Tumör": 7, "never found": 300})
REGIONS = Labels(names={"background": 0, "whole": (1, 2), "core": 2, "other": 1}, region_order=(1, 2, 1))
GRID = Geometry((6, 7, 8), (2.5, 0.7, 0.8))


@pytest.fixture(scope="module")
def segmentation(model: Predictor, scans: list[Path]) -> Segmentation:
    return model(scans[0])


def test_it_is_an_array(segmentation: Segmentation) -> None:
    """Scripts that took the array go on: numbers are numbers, and what is computed is a plain array."""
    plain = segmentation.array
    assert isinstance(segmentation, np.ndarray) and type(plain) is np.ndarray
    assert np.array_equal(np.asarray(segmentation), plain) and torch.from_numpy(segmentation).shape == plain.shape
    assert type(segmentation == 1) is np.ndarray and type(segmentation + 1) is np.ndarray
    assert {int(plain.max()): "found"}[segmentation.max()] == "found", "a number is a key"
    assert segmentation.sum() == plain.sum() and isinstance(segmentation[0, 0, 0], np.uint8)
    assert np.array_equal(np.unique(segmentation), np.unique(plain))
    assert segmentation[2:, ..., 0].shape == plain[2:, ..., 0].shape
    assert str(segmentation) == str(plain) and repr(segmentation[0, 0]) == repr(plain[0, 0])


def test_it_is_saved_as_the_command_writes_it(
    model: Predictor, segmentation: Segmentation, scans: list[Path], tmp_path: Path
) -> None:
    files, _ = predict_cases(model, find_cases([scans[0]], 1), tmp_path)
    segmentation.save(tmp_path / "saved.nii.gz")
    assert (tmp_path / "saved.nii.gz").read_bytes() == files[0].read_bytes()
    assert segmentation.geometry == read_image(scans[0]).geometry
    segmentation.save(tmp_path / "saved.nrrd")
    assert np.array_equal(read_label(tmp_path / "saved.nrrd")[0], segmentation)
    with pytest.raises(UserError, match=r"saved\.xyz: label maps cannot be written as \.xyz"):
        segmentation.save(tmp_path / "saved.xyz")
    segmentation.save(tmp_path / "saved.seg.nrrd")
    array, geometry, _ = read_label(tmp_path / "saved.seg.nrrd", segmentation.geometry)
    assert np.array_equal(array, segmentation) and not geometry.differences(segmentation.geometry)
    assert b"Segment1_Name:=Posterior" in (tmp_path / "saved.seg.nrrd").read_bytes()
    with pytest.raises(UserError, match=r"is no DICOM series, so it can have no DICOM-SEG or RTSTRUCT"):
        segmentation.save(tmp_path / "saved.dcm")
    with pytest.raises(UserError, match=r"the image is no DICOM series"):
        model(read_image(scans[0])).save(tmp_path / "saved.rtstruct.dcm")


def test_it_is_changed_in_place(model: Predictor, scans: list[Path], tmp_path: Path) -> None:
    changed = model(scans[0])
    changed[changed == changed.max()] = 0
    changed |= 4
    changed.save(tmp_path / "changed.nii.gz")
    assert isinstance(changed, Segmentation)
    assert np.array_equal(read_label(tmp_path / "changed.nii.gz")[0], changed) and changed.min() == 4
    for copied in (changed.copy(), copy(changed), deepcopy(changed)):
        assert copied.geometry == changed.geometry and not np.shares_memory(copied, changed)
    for derived in (changed[::-1], changed.T, changed[::-1].copy()):
        with pytest.raises(UserError, match="computed or cut out of a segmentation has no geometry"):
            derived.save(tmp_path / "derived.nii.gz")
    assert not (tmp_path / "derived.nii.gz").exists()


def test_the_geometry_of_an_array_is_its_spacing(model: Predictor, scans: list[Path]) -> None:
    array = read_image(scans[0]).array[0]
    segmentation = model(array, (3, 2, 1))
    assert segmentation.geometry.spacing == (3, 2, 1) and segmentation.geometry.shape == array.shape
    assert repr(segmentation).startswith("Segmentation: uint8, shape (") and "spacing (3, 2, 1)" in repr(segmentation)


def test_probabilities_are_predicted_when_they_are_asked_for(
    model: Predictor, segmentation: Segmentation, scans: list[Path], tmp_path: Path
) -> None:
    later = segmentation.probabilities()
    assert list(later) == ["background", "Anterior", "Posterior"]
    assert {share.dtype for share in later.values()} == {np.dtype("float32")}
    assert np.allclose(sum(later.values()), 1, atol=1.5 / 255)
    at_once = model(scans[0], probabilities="Anterior")
    assert np.array_equal(at_once, segmentation) and list(at_once.probabilities()) == ["Anterior"]
    image = read_image(scans[0])
    for given in (image, image.array):
        before, array = model(given), image.array.copy()
        expected = model(given, probabilities="all").probabilities()
        image.array[:] = image.array[:, ::-1].copy()
        for name, share in before.probabilities().items():
            assert np.array_equal(share, expected[name]), "the array was changed since"
        image.array[:] = array
    assert np.array_equal(at_once.probabilities()["Anterior"], later["Anterior"])
    with pytest.raises(UserError, match=r"'Liver' is no label of the model\. Its labels are: background, Anterior"):
        model(scans[0], probabilities="Liver")
    shutil.copy(scans[0], tmp_path / "moved.nii.gz")
    moved = model(tmp_path / "moved.nii.gz")
    (tmp_path / "moved.nii.gz").unlink()
    with pytest.raises(UserError, match=r"moved\.nii\.gz"):
        moved.probabilities()


def test_another_process_gets_it_without_the_model(model: Predictor, scans: list[Path], tmp_path: Path) -> None:
    segmentation = model(scans[0])
    content = pickle.dumps(segmentation)
    assert len(content) < 1.1 * segmentation.nbytes + 2000, "no network travels"
    copy = pickle.loads(content)
    assert np.array_equal(copy, segmentation) and copy.geometry == segmentation.geometry
    segmentation.save(tmp_path / "a.nii.gz")
    copy.save(tmp_path / "b.nii.gz")
    copy.save(tmp_path / "b.seg.nrrd")
    assert np.array_equal(read_label(tmp_path / "b.seg.nrrd", copy.geometry)[0], copy)
    assert (tmp_path / "a.nii.gz").read_bytes() == (tmp_path / "b.nii.gz").read_bytes()
    with pytest.raises(UserError, match="without the model that predicts probabilities"):
        copy.probabilities()


# ---------------------------------------------------------------------------------------------------------- its files


def renamed(model: Predictor, *names: str) -> Predictor:
    """A model whose labels 1, 2, ... have other names."""
    labels = Labels(names={"background": 0, **{name: value for value, name in enumerate(names, 1)}})
    return replace(model, plan=model.plan.model_copy(update={"labels": labels}))


def test_a_file_for_each_label(model: Predictor, scans: list[Path], tmp_path: Path) -> None:
    other = renamed(model, "Hippocampus: vorn/Ä", "hinten")
    cases = find_cases(scans[:2], 1)
    files, failed = predict_cases(other, cases, tmp_path, Outputs(per_label=True))
    assert len(files) == 2 and not failed
    for case, file in zip(cases, files, strict=True):
        label_map = nibabel.load(file)
        folder = tmp_path / "segmentations" / case.id
        names = ["Hippocampus__vorn_Ä.nii.gz", "hinten.nii.gz"]
        assert sorted(path.name for path in folder.iterdir()) == names
        for value, name in enumerate(names, 1):
            mask = nibabel.load(folder / name)
            np.testing.assert_array_equal(mask.get_fdata(), label_map.get_fdata() == value)
            np.testing.assert_array_equal(mask.affine, label_map.affine)
            assert mask.get_data_dtype() == np.uint8
    kept = files[0].stat().st_mtime_ns
    (tmp_path / "segmentations" / cases[1].id / names[0]).unlink()
    predict_cases(other, cases, tmp_path, Outputs(per_label=True, skip_existing=True))
    assert (tmp_path / "segmentations" / cases[1].id / names[0]).is_file(), "a case is complete if all its files exist"
    assert files[0].stat().st_mtime_ns == kept
    assert label_file(Path("out/a.seg.nrrd"), "x", Path("a.png")) == Path("out/segmentations/a/x.png")
    assert label_file(Path("out/a.rtstruct.dcm"), "x", Path("a")) == Path("out/segmentations/a/x.nii.gz")


def test_two_labels_never_share_a_file(model: Predictor, scans: list[Path], tmp_path: Path) -> None:
    other = renamed(model, "left/lung", "left lung")
    with pytest.raises(UserError, match=r"left_lung\.nii\.gz: would be written twice, for two cases or labels"):
        predict_cases(other, find_cases(scans[:1], 1), tmp_path / "out", Outputs(per_label=True))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("labels", [LABELS, REGIONS])
def test_sizes_and_mean_intensities(labels: Labels) -> None:
    random = np.random.default_rng(0)
    label_map = random.choice([0, *({1, 7} if labels is LABELS else {1, 2})], GRID.shape).astype(np.int16)
    image = random.normal(100, 20, (2, *GRID.shape)).astype(np.float32)
    found = measure_labels(label_map, image, GRID, labels, ["CT", "PET"])
    assert list(found) == list(labels.segments)
    for name, values in labels.segments.items():
        mask, row = np.isin(label_map, values), found[name]
        assert row["voxels"] == mask.sum() and row["volume_ml"] == pytest.approx(mask.sum() * 1.4e-3, rel=1e-5)
        for channel, values_in in zip(("CT", "PET"), image, strict=True):
            expected = values_in[mask].mean(dtype=np.float64) if mask.any() else None
            assert row[f"mean_{channel}"] == (None if expected is None else pytest.approx(expected, rel=1e-5))
    if labels is LABELS:
        empty = {"voxels": 0, "volume_ml": 0.0, "mean_CT": None, "mean_PET": None}
        assert found["never found"] == empty


def test_sizes_of_pictures_and_without_a_spacing() -> None:
    label_map, image = np.ones((1, 4, 5), np.uint8), np.full((3, 1, 4, 5), 7, np.uint8)
    picture = Geometry((1, 4, 5), PICTURE_SPACING, dimensions=2, calibrated=False)
    rows = [
        measure_labels(label_map, image, geometry, Labels(names={"cell": 1}), ["noNorm"] * 3)["cell"]
        for geometry in (picture, replace(picture, spacing=(999.0, 0.5, 0.2), calibrated=True))
    ]
    means = {"mean_noNorm_0000": 7.0, "mean_noNorm_0001": 7.0, "mean_noNorm_0002": 7.0}
    assert rows == [{"pixels": 20, "area_mm2": None, **means}, {"pixels": 20, "area_mm2": 2.0, **means}]
    stack = Geometry((1, 4, 5), (1.0, 1.0, 1.0), calibrated=False)
    assert measure_labels(label_map, image, stack, Labels(names={"cell": 1}), "RGB")["cell"]["volume_ml"] is None


def test_values_below_zero_are_measured() -> None:
    label_map = np.full((2, 3, 4), -5, np.int16)
    found = measure_labels(label_map, np.ones((1, 2, 3, 4)), replace(GRID, shape=(2, 3, 4)), Labels(
        names={"background": 0, "a": -5, "b": 3}), ["x"])  # fmt: skip
    assert [found[name]["voxels"] for name in "ab"] == [24, 0]


def test_dicom_of_what_is_no_series(scans: list[Path], tmp_path: Path) -> None:
    image = read_image(scans[0])
    for source, says in ((scans[0], f"{scans[0]}: is no DICOM series"), (None, "the image is no DICOM series")):
        for name in ("a.dcm", "a.rtstruct.dcm"):
            with pytest.raises(UserError, match=says):
                write_segmentation(tmp_path / name, image.array[0], image.geometry, LABELS, source)
    (case,) = find_cases(scans[:1], 1)
    with pytest.raises(UserError, match="is no DICOM series, so it can have no DICOM-SEG or RTSTRUCT"):
        check_output(scans[:1], [case], tmp_path / "out", LABELS, "rtstruct")
    check_output(scans[:1], [case], tmp_path / "out", LABELS, "seg.nrrd")
    check_output(scans[:1], [case], tmp_path / "a.nii", LABELS, "nifti")
    assert not list(tmp_path.iterdir())


def test_values_that_a_region_writes() -> None:
    """A region whose value is one of its own covers all of its values; otherwise it covers the value alone."""
    assert REGIONS.segments == {"whole": (1, 2), "core": (2,), "other": (1,)}
    apart = Labels(names={"background": 0, "whole": (1, 2), "core": 2}, region_order=(3, 5))
    assert apart.segments == {"whole": (3,), "core": (5,)}
    assert LABELS.segments == {"Leber": (1,), "Tumör": (7,), "never found": (300,)}
