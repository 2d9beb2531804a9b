"""Scores of real label maps, against SimpleITK, brute force, nnU-Net's own figures, and cases worked out by hand."""

from __future__ import annotations

import csv
import io
import json
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk
from scipy.stats import bootstrap

from nnunet_lite.data.geometry import Geometry
from nnunet_lite.data.images import read_label, write_label
from nnunet_lite.data.labels import Labels
from nnunet_lite.errors import UserError
from nnunet_lite.evaluation.metrics import MetricValues, score_case
from nnunet_lite.evaluation.scores import CaseScore, Scores, score_files

DATA = Path(__file__).parent / "data" / "Task04_Hippocampus"
REFERENCES = sorted((DATA / "labelsTs").glob("*.nii.gz"))
TWO = Labels(names={"background": 0, "Anterior": 1, "Posterior": 2})
ANISOTROPIC = (2.5, 0.7, 1.1)

NNUNET_FOREGROUND = {
    "Dice": 0.736201830726275,
    "FN": 432.1875,
    "FP": 432.1875,
    "IoU": 0.5849572655778204,
    "TN": 62575.125,
    "TP": 1228.5,
    "n_pred": 1660.6875,
    "n_ref": 1660.6875,
}
NNUNET_POSTERIOR = {
    "Dice": 0.690395003597299,
    "FN": 490.375,
    "FP": 486.75,
    "IoU": 0.5275703698734755,
    "TN": 62588.875,
    "TP": 1102.0,
    "n_pred": 1588.75,
    "n_ref": 1592.375,
}
NNUNET_FIRST = {
    "Dice": 0.7658677903608112,
    "FN": 442,
    "FP": 447,
    "IoU": 0.6205719163465643,
    "TN": 56457,
    "TP": 1454,
    "n_pred": 1901,
    "n_ref": 1896,
}


def flawed(array: np.ndarray) -> np.ndarray:
    """A prediction with plausible faults: two voxels off in x, one in y, the last slice with label 2 wrong."""
    moved = np.roll(array, (0, 1, 2), (0, 1, 2))
    slices = np.flatnonzero((moved == 2).any((1, 2)))
    moved[slices[-1:]] = np.where(moved[slices[-1:]] == 2, 1, moved[slices[-1:]])
    return moved


@pytest.fixture
def folders(tmp_path: Path) -> tuple[Path, Path]:
    """Predictions and references, eight of each, without a dataset.json nearby."""
    predictions, references = tmp_path / "predictions", tmp_path / "references" / "labels"
    for path in REFERENCES:
        array, geometry, _ = read_label(path)
        write_label(references / path.name, array, geometry)
        write_label(predictions / path.name, flawed(array), geometry)
    return predictions, references


def one(prediction: np.ndarray, reference: np.ndarray, spacing=(1.0, 1.0, 1.0), **options) -> MetricValues:  # type: ignore[no-untyped-def]
    return score_case(prediction, reference, Labels(names={"lesion": 1}), spacing, **options)["lesion"]


def blank() -> np.ndarray:
    return np.zeros((6, 12, 20), np.uint8)


# ---------------------------------------------------------------------------------------- independent implementations


def by_simpleitk(prediction: np.ndarray, reference: np.ndarray, spacing: tuple[float, ...], tolerance: float) -> dict:
    """The measures of two masks with SimpleITK's filters alone."""
    images = []
    for mask in (prediction, reference):
        image = sitk.GetImageFromArray(mask.astype(np.uint8))
        image.SetSpacing(spacing[::-1])
        images.append(sitk.ConstantPad(image, (1, 1, 1), (1, 1, 1), 0))
    overlap = sitk.LabelOverlapMeasuresImageFilter()
    overlap.Execute(*images)
    contours = [sitk.BinaryContour(image, False) for image in images]
    directed = []
    for own, other in (contours, contours[::-1]):
        distance = sitk.Abs(sitk.SignedMaurerDistanceMap(other, squaredDistance=False, useImageSpacing=True))
        directed.append(sitk.GetArrayFromImage(distance)[sitk.GetArrayFromImage(own) > 0])
    shape = sitk.LabelShapeStatisticsImageFilter()
    shape.Execute(images[1])
    return {
        "Dice": overlap.GetDiceCoefficient(),
        "IoU": overlap.GetJaccardCoefficient(),
        "HD95": max(np.percentile(d, 95) for d in directed),
        "NSD": np.mean(np.concatenate(directed) <= tolerance + 1e-4),
        "reference_ml": shape.GetPhysicalSize(1) / 1000,
    }


@pytest.mark.parametrize("path", REFERENCES, ids=lambda path: path.name)
@pytest.mark.parametrize("spacing", [(1.0, 1.0, 1.0), ANISOTROPIC])
def test_equals_simpleitk(path: Path, spacing: tuple[float, float, float]) -> None:
    reference = read_label(path)[0]
    prediction = flawed(reference)
    measured = score_case(prediction, reference, TWO, spacing, tolerance_mm=1.2)
    for value, name in ((1, "Anterior"), (2, "Posterior")):
        expected = by_simpleitk(prediction == value, reference == value, spacing, 1.2)
        found = {key: measured[name][key] for key in expected}
        assert found == pytest.approx(expected, abs=1e-3)
        assert 0.2 < found["Dice"] < 0.95 and found["HD95"] > 1  # the test has something to find


def test_equals_nnunet(folders: tuple[Path, Path]) -> None:
    """Figures that nnUNetv2_evaluate_folder 2.8.1 gives for the same files."""
    summary = score_files(*folders, TWO).to_json()
    for found, expected in ((summary["foreground_mean"], NNUNET_FOREGROUND), (summary["mean"]["2"], NNUNET_POSTERIOR)):
        assert {key: found[key] for key in expected} == pytest.approx(expected, abs=1e-9)
    first = summary["metric_per_case"][0]
    assert {key: first["metrics"]["1"][key] for key in NNUNET_FIRST} == pytest.approx(NNUNET_FIRST, abs=1e-9)
    assert first["reference_file"].endswith("labels/hippocampus_025.nii.gz")


# ------------------------------------------------------------------------------------------------- worked out by hand


def test_absent_labels() -> None:
    there = blank()
    there[2:4, 3:6, 3:9] = 1
    both = one(blank(), blank())
    assert (both["Dice"], both["IoU"], both["NSD"], both["HD95"], both["volume_error"], both["lesion_F1"]) == (
        None,
    ) * 6
    assert (both["TN"], both["TP"], both["prediction_ml"]) == (there.size, 0, 0.0)
    missed, invented = one(blank(), there), one(there, blank())
    assert (missed["Dice"], missed["NSD"], missed["HD95"], missed["volume_error"]) == (0.0, 0.0, None, -1.0)
    assert (invented["Dice"], invented["NSD"], invented["HD95"], invented["volume_error"]) == (0.0, 0.0, None, None)
    assert (missed["lesion_FN"], invented["lesion_FP"], missed["lesion_F1"]) == (1, 1, 0.0)


def test_shifted_box() -> None:
    reference, prediction = blank(), blank()
    reference[1:4, 2:6, 2:8] = 1
    prediction[1:4, 2:6, 4:10] = 1  # two voxels of 0.5 mm further
    found = one(prediction, reference, (3.0, 1.0, 0.5), tolerance_mm=0.5)
    assert found["Dice"] == pytest.approx(2 * 48 / 144)
    assert (found["TP"], found["FP"], found["FN"], found["HD95"]) == (48, 24, 24, 1.0)
    assert found["reference_ml"] == pytest.approx(72 * 1.5 / 1000)
    # Of its 64 surface voxels the reference's face (12) and the middle of its far face (2) are 1 mm away; so, mirrored,
    # are those of the prediction.
    assert found["NSD"] == 50 / 64
    assert one(prediction, reference, (3.0, 1.0, 0.5), tolerance_mm=1.0)["NSD"] == 1.0  # at the tolerance is within


def test_regions_overlap() -> None:
    labels = Labels(names={"background": 0, "whole": (1, 2), "core": (2,)}, region_order=(1, 2))
    reference, prediction = blank(), blank()
    reference[2:5, 2:8, 2:12], reference[3, 4:6, 4:8] = 1, 2
    prediction[reference > 0] = 1
    found = score_case(prediction, reference, labels, (1.0, 1.0, 1.0))
    assert (found["whole"]["Dice"], found["whole"]["HD95"]) == (1.0, 0.0)
    assert (found["core"]["Dice"], found["core"]["FN"]) == (0.0, 8)
    scores = Scores((CaseScore("a", None, None, found),), labels)
    assert list(scores.to_json()["mean"]) == ["(1, 2)", "(2,)"]  # nnU-Net's names for them


def test_ignored_voxels_are_left_out() -> None:
    labels = Labels(names={"background": 0, "lesion": 1}, ignore=9)
    reference, prediction = blank(), blank()
    reference[1:5, 2:8, 2:12] = 1
    prediction[1:5, 2:8, 2:12] = 1
    reference[:, :, 7:] = 9  # from the middle of the lesion on
    prediction[:, 9:, 10:] = 1  # wrong, but nobody knows
    found = score_case(prediction, reference, labels, (1.0, 1.0, 1.0))["lesion"]
    assert (found["Dice"], found["NSD"], found["HD95"], found["lesion_FP"]) == (1.0, 1.0, 0.0, 0)
    assert found["TP"] + found["FP"] + found["FN"] + found["TN"] == np.count_nonzero(reference != 9)
    prediction[:, :, 6:7] = 0  # now it ends a voxel before the unknown
    cut = score_case(prediction, reference, labels, (1.0, 1.0, 1.0), tolerance_mm=0.5)["lesion"]
    # the middle of the cut face (8 of 80 surface voxels) is a surface of the prediction alone; the reference goes on
    # into the unknown, with a rim (16 of 88) that the prediction lacks
    assert (cut["FN"], cut["NSD"], cut["HD95"]) == (24, 144 / 168, 1.0)


def test_one_slice_is_all_surface_but_a_picture_is_not() -> None:
    mask = np.zeros((5, 20, 20), np.uint8)
    mask[2, 5:15, 5:15] = 1
    hole = mask.copy()
    hole[2, 9:11, 9:11] = 0
    assert one(hole, mask, (5.0, 1.0, 1.0), tolerance_mm=0.5)["NSD"] == pytest.approx(192 / 196)
    picture = one(hole[2:3], mask[2:3], (999.0, 1.0, 1.0), tolerance_mm=0.5)
    # a ring of 36 in both; around the hole a ring of 8 (its corners touch by edges only), 3 mm or more inside
    assert picture["NSD"] == pytest.approx(72 / 80)
    assert (picture["prediction_ml"], picture["reference_ml"]) == (None, None)
    assert picture["volume_error"] == pytest.approx(-0.04)


def test_lesions() -> None:
    reference, prediction = blank(), blank()
    reference[1:3, 1:4, 1:4] = reference[1, 8, 8] = reference[2, 9, 9] = 1  # the last two touch at a corner: one lesion
    reference[4, 2, 15] = 1
    prediction[2:4, 3:5, 3:5] = prediction[2, 9, 9:11] = 1  # two found, one missed
    prediction[5, 11, 0] = prediction[5, 11, 19] = 1  # two that are not there
    found = one(prediction, reference)
    assert (found["lesion_TP"], found["lesion_FP"], found["lesion_FN"]) == (2, 2, 1)
    assert found["lesion_F1"] == pytest.approx(4 / 7)


def test_any_values_and_types() -> None:
    """Values far apart, negative or no label at all; wide and signed types; the two arrays of different types."""
    labels = Labels(names={"background": 0, "a": -3, "b": 40000})
    reference = np.zeros((4, 6, 6), np.int32)
    reference[1:3, 1:3, 1:3], reference[1:3, 3:5, 3:5] = -3, 40000
    prediction = reference.astype(np.float32).astype(np.int64)
    prediction[0, 0, :3] = (7, -100, 1 << 40)  # no labels: background
    found = score_case(prediction, reference, labels, (1.0, 1.0, 1.0))
    assert [found[name]["Dice"] for name in "ab"] == [1.0, 1.0]
    with pytest.raises(ValueError, match="shape"):
        score_case(prediction[1:], reference, labels, (1.0, 1.0, 1.0))


# -------------------------------------------------------------------------------------------------------- many cases


def made_up(values: list[float | None]) -> Scores:
    whole = one(np.ones((2, 2, 2), np.uint8), np.ones((2, 2, 2), np.uint8))
    return Scores(
        tuple(CaseScore(f"case{i}", None, None, {"lesion": {**whole, "Dice": v}}) for i, v in enumerate(values)),
        Labels(names={"lesion": 1}),
    )


def test_interval_equals_scipys() -> None:
    values = np.random.default_rng(1).beta(8, 2, 40)
    found = made_up([*values.tolist(), None]).by_label()["lesion"]
    expected = bootstrap((values,), np.mean, n_resamples=20000, method="percentile", rng=0).confidence_interval
    assert (found.n, found.mean, found.median) == (40, pytest.approx(values.mean()), pytest.approx(np.median(values)))
    assert (found.low, found.high) == pytest.approx((expected.low, expected.high), abs=0.006)
    assert found == made_up([*values.tolist(), None]).by_label()["lesion"]  # seeded


def test_nothing_to_sum_up() -> None:
    nothing, single = made_up([None, None]).foreground(), made_up([0.5, None]).foreground()
    assert (nothing.n, nothing.mean, nothing.low) == (0, None, None)
    assert (single.n, single.mean, single.low) == (1, 0.5, None)
    summary = made_up([None]).to_json()
    assert summary["foreground_mean"]["Dice"] is None
    json.dumps(summary, allow_nan=False)
    assert "n/a" in made_up([None]).to_text()


def test_csv_and_table(folders: tuple[Path, Path]) -> None:
    scores = score_files(*folders, TWO, tolerance_mm=2)
    lines = list(csv.DictReader(io.StringIO(scores.to_csv())))
    assert [(line["case"], line["label"], line["value"]) for line in lines[:2]] == [
        ("hippocampus_025", "Anterior", "1"),
        ("hippocampus_025", "Posterior", "2"),
    ]
    assert len(lines) == 16 and float(lines[0]["Dice"]) == scores.values("Dice")[0, 0]
    head, anterior, _, foreground = scores.to_text().splitlines()
    assert "NSD 2 mm" in head and len(head) == len(foreground)
    assert anterior.split()[:3] == ["Anterior", "8", f"{np.mean(scores.values()[:, 0]):.4f}"]
    assert f"{scores.foreground().mean:.4f}" in foreground
    text = json.dumps(scores.to_json(), allow_nan=False)
    assert json.loads(text)["statistics"]["foreground"]["Dice"]["n"] == 8


def test_what_was_not_measured_has_no_column(folders: tuple[Path, Path]) -> None:
    without, with_surface = (score_files(*folders, TWO, surface=surface) for surface in (False, True))
    assert "NSD" not in without.to_text() and "HD95" not in without.to_text() and "n/a" not in without.to_text()
    assert without.lines()[1] == tuple(cell for i, cell in enumerate(with_surface.lines()[1]) if i not in (6, 7))
    assert with_surface.lines()[0][6:8] == ("NSD 1 mm", "HD95 mm")


def test_volume_errors_do_not_cancel() -> None:
    """One volume of a half too much and one of a half too little: an error of a half, not of nothing."""
    reference = np.zeros((1, 4, 8), np.uint8)
    reference[0, 0, :4] = 1
    rows = []
    for i, n in enumerate((2, 6)):
        prediction = np.zeros_like(reference)
        prediction[0, 0, :n] = 1
        rows.append(CaseScore(str(i), None, None, {"lesion": one(prediction, reference)}))
    scores = Scores(tuple(rows), Labels(names={"lesion": 1}))
    cells = dict(zip(scores.lines()[0], scores.lines()[1], strict=True))
    assert cells["abs. volume error"] == "0.5000" and "volume error" not in cells
    mean = scores.to_json()["mean"]["1"]
    assert (mean["absolute_volume_error"], mean["volume_error"]) == (0.5, 0.0), "the second is the bias"
    assert scores.to_json()["statistics"]["1"]["absolute_volume_error"]["median"] == 0.5


# --------------------------------------------------------------------------------------------------------- on disk


def test_labels_come_from_dataset_json_or_the_files(folders: tuple[Path, Path]) -> None:
    predictions, references = folders
    found = score_files(*folders)
    assert found.labels.region_names == ("1", "2") and "no dataset.json" in found.notes[0]
    described = {"labels": {"background": 0, "both": [1, 2], "tail": [2]}, "regions_class_order": [1, 2]}
    (predictions / "dataset.json").write_text(json.dumps({"labels": {"background": 0, "front": 1}}))
    one_label = score_files(*folders)
    assert one_label.labels.region_names == ("front",) and "value 2, counted as background" in one_label.notes[0]
    (references.parent / "dataset.json").write_text(json.dumps(described))
    assert score_files(*folders).labels.region_names == ("both", "tail")
    (references / "dataset.json").write_text('{"labels": {"a": "b"}}')
    with pytest.raises(UserError, match=r"references/labels/dataset\.json: labels"):
        score_files(*folders)


def test_missing_cases_are_noted(folders: tuple[Path, Path]) -> None:
    predictions, references = folders
    (predictions / "hippocampus_025.nii.gz").unlink()
    (references / "hippocampus_367.nii.gz").unlink()
    (predictions / ".hidden.nii.gz").write_bytes(b"")
    scores = score_files(*folders, TWO, surface=False)
    assert len(scores.rows) == 6 and np.isnan(scores.values("NSD")).all()
    assert [note[-15:] for note in scores.notes] == ["hippocampus_025", "hippocampus_367"]
    for path in [*predictions.glob("h*_0*"), *predictions.glob("h*_[1-3]*")]:
        path.rename(path.with_name("other_" + path.name))
    with pytest.raises(UserError, match=r"other_hippocampus_074.*hippocampus_025"):
        score_files(*folders, TWO)


def test_two_files_mixed_formats_and_masks(folders: tuple[Path, Path], tmp_path: Path) -> None:
    """A 0/255 mask in NRRD against 0/1 in NIfTI: one label, whether it is described or found."""
    array, geometry, _ = read_label(REFERENCES[0])
    reference, prediction = tmp_path / "truth.nii.gz", tmp_path / "guess.nrrd"
    mask = (array > 0).astype(np.uint8)
    write_label(reference, mask, geometry)
    write_label(prediction, mask * 255, geometry)
    for labels in (Labels(names={"it": 1}), None):
        scores = score_files(prediction, reference, labels)
        assert scores.foreground().mean == 1.0 and scores.rows[0].case == "truth"
        assert "255 read as 1 (guess.nrrd)" in scores.notes
    with pytest.raises(UserError, match="two folders, or two files"):
        score_files(prediction, folders[1])
    with pytest.raises(UserError, match="no such file"):
        score_files(tmp_path / "nowhere", folders[1])


def test_pictures(tmp_path: Path) -> None:
    """Two PNG, and a PNG against a 2D slice in NIfTI, which has real spacing."""
    array = read_label(REFERENCES[2])[0][15:16]
    flat = Geometry(array.shape, (999.0, 1.0, 1.0), dimensions=2)
    write_label(tmp_path / "p.png", flawed(array), flat)
    write_label(tmp_path / "r.png", array, flat)
    write_label(tmp_path / "r.nii.gz", array, replace(flat, spacing=(999 * 0.5, 0.5, 0.5)))
    pixels, mm = (score_files(tmp_path / "p.png", tmp_path / name, TWO) for name in ("r.png", "r.nii.gz"))
    assert pixels.foreground().mean == mm.foreground().mean and 0 < pixels.foreground().mean < 1
    assert mm.values("HD95") == pytest.approx(pixels.values("HD95") / 2, nan_ok=True)
    assert (pixels.unit, mm.unit) == ("px", "mm")
    assert {"HD95", "NSD"} <= set(pixels.to_text().split()) and "mm" not in pixels.to_text()
    assert "1 px" in pixels.to_text()
    assert "HD95 mm" in mm.to_text() and "HD95_mm" in mm.to_csv() and "nsd_tolerance_mm" in mm.to_json()
    content = json.dumps(pixels.to_json()) + pixels.to_csv()
    assert "HD95_px" in content and "nsd_tolerance_px" in content and "_mm" not in content


@pytest.mark.parametrize("spacing", [(1.0, 1.0, 1.0), (2.0, 0.5, 0.5)])
def test_volumes_need_a_spacing(tmp_path: Path, spacing: tuple[float, float, float]) -> None:
    """The pages of a TIFF are a volume of unknown size, unless a file says their spacing."""
    array = read_label(REFERENCES[2])[0]
    known = spacing != (1.0, 1.0, 1.0)
    for name in ("p.tif", "r.tif", "r.nii.gz"):
        write_label(tmp_path / name, array, Geometry(array.shape, spacing, calibrated=known))
    stack = score_files(tmp_path / "p.tif", tmp_path / "r.tif", TWO)
    assert stack.unit == ("mm" if known else "px")
    ml = (array == 1).sum() * np.prod(spacing) / 1000
    assert stack.rows[0].metrics["Anterior"]["reference_ml"] == (pytest.approx(ml) if known else None)
    against_nifti = score_files(tmp_path / "p.tif", tmp_path / "r.nii.gz", TWO)
    assert against_nifti.unit == "mm" and against_nifti.rows[0].metrics["Anterior"]["reference_ml"] == pytest.approx(ml)


def test_files_without_a_spacing_among_others_are_noted(folders: tuple[Path, Path]) -> None:
    for folder in folders:
        array = np.zeros((1, 8, 9), np.uint8)
        array[0, 2:5, 2:5] = 1
        write_label(folder / "picture.png", array, Geometry(array.shape, (999.0, 1.0, 1.0), dimensions=2))
    scores = score_files(*folders, TWO, surface=False)
    assert scores.unit == "mm" and scores.notes == ("no spacing is known, 1 mm taken for a pixel (picture)",)


def test_another_grid_is_refused(folders: tuple[Path, Path]) -> None:
    path = folders[0] / "hippocampus_074.nii.gz"
    array, geometry, _ = read_label(path)
    write_label(path, array, replace(geometry, spacing=(1.0, 1.0, 1.25)))
    with pytest.raises(UserError) as error:
        score_files(*folders, TWO)
    for part in (str(path), str(folders[1] / path.name), "spacing (1, 1, 1.25)", "spacing (1, 1, 1)"):
        assert part in str(error.value)
    write_label(path, array[:-1], replace(geometry, shape=array[:-1].shape))
    with pytest.raises(UserError, match="shape"):
        score_files(*folders, TWO)


def test_an_image_is_no_label_map(tmp_path: Path) -> None:
    array = np.arange(4 * 40 * 40, dtype=np.int16).reshape(4, 40, 40)
    for name in ("a.nii.gz", "b.nii.gz"):
        write_label(tmp_path / name, array, Geometry(array.shape, (1.0, 1.0, 1.0)))
    with pytest.raises(UserError, match="6400 different values"):
        score_files(tmp_path / "a.nii.gz", tmp_path / "b.nii.gz")


def test_threads_change_nothing(folders: tuple[Path, Path]) -> None:
    assert score_files(*folders, TWO, workers=0) == score_files(*folders, TWO, workers=3)


@pytest.mark.slow
def test_large_case_takes_three_seconds() -> None:
    """512 x 512 x 300, ten labels of 0.1 to 3 million voxels, with surfaces a few voxels apart."""
    reference, prediction = np.zeros((300, 512, 512), np.uint8), np.zeros((300, 512, 512), np.uint8)
    z, y, x = np.ogrid[:300, :512, :512]
    rng = np.random.default_rng(0)
    for value in range(1, 11):
        centre, radius = rng.uniform(0.2, 0.8, 3) * reference.shape, rng.uniform(0.06, 0.22, 3) * reference.shape
        for array, by in ((reference, 0.0), (prediction, 3.0)):
            c, r = centre + by, radius + by / 3
            array[((z - c[0]) / r[0]) ** 2 + ((y - c[1]) / r[1]) ** 2 + ((x - c[2]) / r[2]) ** 2 < 1] = value
    labels = Labels(names={str(value): value for value in range(1, 11)})
    start = time.process_time()  # of all threads: other work on the machine does not count
    found = score_case(prediction, reference, labels, (1.5, 0.8, 0.8), threads=2)
    assert time.process_time() - start < 4.5  # what two cores do in 3 s when a quarter is lost to waiting
    assert all(0.5 < measures["Dice"] < 0.99 for measures in found.values() if measures["Dice"] is not None)
