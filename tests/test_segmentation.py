"""What `model(image)` returns is the array that it was before, and more: geometry, probabilities, a file."""

from __future__ import annotations

import pickle
import shutil
from copy import copy, deepcopy
from pathlib import Path

import numpy as np
import pytest
import torch

from nnunet_lite.data.cases import find_cases
from nnunet_lite.data.images import read_image, read_label
from nnunet_lite.errors import UserError
from nnunet_lite.inference.folder import predict_cases
from nnunet_lite.inference.predictor import Predictor
from nnunet_lite.inference.segmentation import Segmentation


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
