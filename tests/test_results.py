"""A label map as files of any format, a file for each label, and how large the labels are."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import nibabel
import numpy as np
import pytest

from nnunet_lite.data.cases import find_cases
from nnunet_lite.data.geometry import PICTURE_SPACING, Geometry
from nnunet_lite.data.images import read_image
from nnunet_lite.data.labels import Labels
from nnunet_lite.errors import UserError
from nnunet_lite.inference.cases import check_output
from nnunet_lite.inference.folder import Outputs, predict_cases
from nnunet_lite.inference.predictor import Predictor
from nnunet_lite.inference.results import label_file, measure_labels, write_segmentation

LABELS = Labels(names={"background": 0, "Leber": 1, "Tumör": 7, "never found": 300})
REGIONS = Labels(names={"background": 0, "whole": (1, 2), "core": 2, "other": 1}, region_order=(1, 2, 1))
GRID = Geometry((6, 7, 8), (2.5, 0.7, 0.8))


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
