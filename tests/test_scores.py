"""Scores of folders of label maps: matching, labels, geometry, sums, tables, and reading a summary.json again."""

from __future__ import annotations

import csv
import io
import json
import shutil
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from samples import HIPPOCAMPUS, Command, displaced, move_nifti, save_arrays
from scipy.stats import bootstrap

from nnunet_lite.data.geometry import Geometry
from nnunet_lite.data.images import read_label, write_label
from nnunet_lite.data.labels import Labels
from nnunet_lite.errors import UserError
from nnunet_lite.evaluation.metrics import score_case
from nnunet_lite.evaluation.scores import CaseScore, Scores, read_fold_scores, read_summary, score_files
from nnunet_lite.evaluation.statistics import Margin, compare_paired, mean_of_labels, p_of_gain, summarize
from nnunet_lite.files import write_json

REFERENCES = sorted((HIPPOCAMPUS / "labelsTs").glob("*.nii.gz"))
TWO = Labels(names={"background": 0, "Anterior": 1, "Posterior": 2})
REGIONS = Labels(names={"background": 0, "whole": (1, 2), "core": 2}, region_order=(1, 2))
N = np.nan

# what nnUNetv2_evaluate_folder 2.8.1 gives for `folders`
NNUNET = {
    "foreground": {"Dice": 0.736201830726275, "FN": 432.1875, "FP": 432.1875, "IoU": 0.5849572655778204,
                   "TN": 62575.125, "TP": 1228.5, "n_pred": 1660.6875, "n_ref": 1660.6875},
    "posterior": {"Dice": 0.690395003597299, "FN": 490.375, "FP": 486.75, "IoU": 0.5275703698734755,
                  "TN": 62588.875, "TP": 1102.0, "n_pred": 1588.75, "n_ref": 1592.375},
    "first": {"Dice": 0.7658677903608112, "FN": 442, "FP": 447, "IoU": 0.6205719163465643,
              "TN": 56457, "TP": 1454, "n_pred": 1901, "n_ref": 1896},
}  # fmt: skip


@pytest.fixture
def folders(tmp_path: Path) -> tuple[Path, Path]:
    """Predictions and references, eight of each, without a dataset.json nearby."""
    predictions, references = tmp_path / "predictions", tmp_path / "references" / "labels"
    for path in REFERENCES:
        array, geometry, _ = read_label(path)
        write_label(references / path.name, array, geometry)
        write_label(predictions / path.name, displaced(array), geometry)
    return predictions, references


def scores_of(pairs: list[tuple[np.ndarray, np.ndarray]], labels: Labels, **options: bool) -> Scores:
    rows = [
        CaseScore(f"case_{i}", f"/before/case_{i}.nii.gz", f"/raw/case_{i}.nii.gz",
                  score_case(*pair, labels, (1.0, 1.0, 2.0), **options))  # type: ignore[arg-type]
        for i, pair in enumerate(pairs)
    ]  # fmt: skip
    return Scores(tuple(rows), labels)


def with_dice(values: list[float | None]) -> Scores:
    """Scores of one label with these values of Dice."""
    box = np.ones((2, 2, 2), np.uint8)
    scores = scores_of([(box, box)] * len(values), Labels(names={"lesion": 1}))
    for row, value in zip(scores.rows, values, strict=True):
        row.metrics["lesion"]["Dice"] = value
    return scores


# ---------------------------------------------------------------------------------------------------------- statistics


def test_means_are_over_cases_first() -> None:
    table = np.array([[1.0, 0.2], [0.5, N], [N, N]])
    assert mean_of_labels(table) == summarize(table).mean == pytest.approx((0.75 + 0.2) / 2)
    assert summarize(table).n == 2 and np.isnan(mean_of_labels(np.full((3, 2), N)))


def test_intervals_equal_scipys() -> None:
    rng = np.random.default_rng(0)
    hard = rng.uniform(0.2, 0.9, 60)
    ours, others = hard + rng.normal(0.02, 0.02, 60), hard + rng.normal(0, 0.02, 60)
    found, margin = summarize(np.append(ours, N)[:, None]), compare_paired(ours[:, None], others[:, None])
    for values, interval, tolerance in ((ours, found, 6e-3), (ours - others, margin, 1e-3)):
        expected = bootstrap((values,), np.mean, n_resamples=20000, method="percentile", rng=0).confidence_interval
        assert interval.mean == pytest.approx(values.mean())
        assert (interval.low, interval.high) == pytest.approx((expected.low, expected.high), abs=tolerance)
    assert (found.n, found.median) == (60, pytest.approx(np.median(ours)))
    assert margin.low is not None and margin.low > 0, "although the cases differ far more than the two"
    back = compare_paired(others[:, None], ours[:, None])
    assert (back.low, back.high) == (pytest.approx(-margin.high), pytest.approx(-margin.low))  # type: ignore[operator]


def test_paired_comparison_with_gaps() -> None:
    """One predicts nothing of an absent label, and the other something (0)."""
    none, some = np.array([[0.8], [N], [0.7]]), np.array([[0.8], [0.0], [0.7]])
    margin = compare_paired(none, some)
    assert margin.mean == pytest.approx(0.25) and margin.low is not None and margin.low >= 0
    assert compare_paired(np.array([[N], [N]]), np.array([[0.0], [N]])) == Margin(None)
    assert compare_paired(np.array([[0.5]]), np.array([[0.25]])) == Margin(0.25)
    assert compare_paired(some, some) == Margin(0, 0, 0)


def test_intervals_are_of_the_same_labels_as_the_mean() -> None:
    """A label of one case in ten is in two resamples of three; without it, the others would have another mean."""
    table = np.full((10, 2), N)
    table[:, 0], table[0, 1] = np.linspace(0.8, 0.9, 10), 0.0
    common, both = summarize(table[:, :1]), summarize(table)
    assert both.mean == pytest.approx(0.425)
    assert (both.low, both.high) == pytest.approx((common.low / 2, common.high / 2))  # type: ignore[operator]
    better = compare_paired(np.where(table == 0, 0.5, table), table)
    assert (better.mean, better.low, better.high) == pytest.approx((0.25, 0.25, 0.25))


def test_a_sign_flip_test_by_hand() -> None:
    assert p_of_gain(np.array([0.1, 0.0, 0.2, 0.3])) == 1 / 8 and p_of_gain(np.zeros(4)) == 1.0
    assert [p_of_gain(np.array([0.0, value])) for value in (0.3, -0.3)] == [1 / 2, 1.0]
    assert p_of_gain(np.array([0.1, -0.2])) == 3 / 4 and p_of_gain(np.full(40, 0.01)) == 1e-4


# ------------------------------------------------------------------------------------------------- sums and tables


def test_equals_nnunet_and_threads_change_nothing(folders: tuple[Path, Path]) -> None:
    scores = score_files(*folders, TWO, workers=3)
    summary = scores.to_json()
    first = summary["metric_per_case"][0]
    found = {
        "foreground": summary["foreground_mean"],
        "posterior": summary["mean"]["2"],
        "first": first["metrics"]["1"],
    }
    for name, expected in NNUNET.items():
        assert {key: found[name][key] for key in expected} == pytest.approx(expected, abs=1e-9)
    assert first["reference_file"].endswith("labels/hippocampus_025.nii.gz")
    assert score_files(*folders, TWO, workers=0) == scores


def test_nothing_to_sum_up() -> None:
    nothing, single = with_dice([None, None]).foreground(), with_dice([0.5, None]).foreground()
    assert (nothing.n, nothing.mean, nothing.low) == (0, None, None)
    assert (single.n, single.mean, single.low) == (1, 0.5, None)
    assert '"Dice": null' in json.dumps(with_dice([None]).to_json(), allow_nan=False)
    assert "n/a" in with_dice([None]).to_text()


def test_csv_and_table(folders: tuple[Path, Path]) -> None:
    scores, without = (score_files(*folders, TWO, tolerance=2, surface=surface) for surface in (True, False))
    lines = list(csv.DictReader(io.StringIO(scores.to_csv())))
    assert [(line["case"][-3:], line["label"], line["value"]) for line in lines[:2]] == [
        ("025", "Anterior", "1"), ("025", "Posterior", "2"),
    ]  # fmt: skip
    assert len(lines) == 16 and float(lines[0]["Dice"]) == scores.values("Dice")[0, 0]
    head, anterior, _, foreground = scores.to_text().splitlines()[:4]
    assert len(head) == len(foreground) and scores.lines()[0][6:8] == ("NSD (2 mm)", "HD95 (mm)")
    assert anterior.split()[:3] == ["Anterior", "8", f"{np.mean(scores.values()[:, 0]):.4f}"]
    assert f"{scores.foreground().mean:.4f}" in foreground
    text = json.dumps(scores.to_json(), allow_nan=False)
    assert json.loads(text)["statistics"]["foreground"]["Dice"]["n"] == 8
    # what was not measured has no column
    assert without.lines()[1] == tuple(cell for i, cell in enumerate(scores.lines()[1]) if i not in (6, 7))


def test_a_dataframe_is_the_csv(folders: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    pandas = pytest.importorskip("pandas")
    scores = score_files(*folders, TWO, surface=False)
    table, written = scores.to_dataframe(), pandas.read_csv(io.StringIO(scores.to_csv()), dtype={"value": str})
    assert list(table.columns) == list(written.columns) and list(table["case"]) == list(written["case"])
    assert table.groupby("label")["Dice"].mean()["Anterior"] == pytest.approx(scores.by_label()["Anterior"].mean)
    assert table["HD95_mm"].isna().all() and table["HD95_mm"].dtype.kind == "f"
    monkeypatch.setitem(sys.modules, "pandas", None)
    with pytest.raises(UserError, match=r"pandas is not installed\. pip install pandas\.$"):
        scores.to_dataframe()


def test_references_of_bids_without_images(tmp_path: Path) -> None:
    """Masks in derivatives/, of patients with one visit or several, as `predict` names their label maps."""
    mask = np.zeros((4, 8, 8), np.uint8)
    mask[1:3, 2:6, 2:6] = 1
    names = {"sub-01": "sub-01", "sub-02_ses-1": "sub-02/ses-1", "sub-02_ses-2": "sub-02/ses-2"}
    for shift, (case, folders) in enumerate(names.items()):
        moved = np.roll(mask, shift, 2)
        file = f"masks/derivatives/manual/{folders}/anat/{folders.replace('/', '_')}_desc-tumour_mask.nii.gz"
        save_arrays(tmp_path, {f"out/{case}.nii.gz": mask, file: moved})
    scores = score_files(tmp_path / "out", tmp_path / "masks", surface=False, workers=0)
    assert [(row.case, row.mean_dice) for row in scores.rows] == list(zip(names, (1, 0.75, 0.5), strict=True))


def test_labels_have_the_names_in_the_record_beside_predictions_and_cases_a_line_each(tmp_path: Path) -> None:
    mask = np.zeros((4, 8, 8), np.uint8)
    mask[1:3, 2:6, 2:6] = 1
    for number in range(12):
        empty = mask * np.uint8(number != 7)
        save_arrays(tmp_path, {f"out/c{number}.nii.gz": empty, f"references/c{number}.nii.gz": mask})
    unnamed = score_files(tmp_path / "out", tmp_path / "references", surface=False, workers=0)
    assert unnamed.notes == (f"no dataset.json in {tmp_path / 'references'}, {tmp_path}, {tmp_path / 'out'}: "
                             "the labels are the values found, 1",)  # fmt: skip
    record = {"runs": [{"labels": {"background": 0, "liver": 1}}]}
    (tmp_path / "out" / "predictions.json").write_text(json.dumps(record))
    table = tmp_path / "references" / "dataset.json"  # as `nnlite init` numbers the masks of a folder that lacks some
    table.write_text(json.dumps({"labels": {"background": 0, "kidney": 1, "liver": 2}}))
    with pytest.raises(UserError, match=r"liver is 2 here, and 1 in .*predictions.json. Give label maps in which"):
        score_files(tmp_path / "out", tmp_path / "references", surface=False, workers=0)
    table.unlink()
    (tmp_path / "out" / "dataset.json").write_text('{"citation": "of another program"}')
    table.write_text(json.dumps(record["runs"][0]))
    assert score_files(tmp_path / "out", tmp_path / "references", surface=False, workers=0).labels.values == (0, 1)
    regions = {"labels": {"background": 0, "all": [1, 2], "core": 2}, "regions_class_order": [1, 2]}
    table.write_text(json.dumps(regions))
    regions["labels"] = {"background": 0, "all": [2, 1], "core": 2}
    (tmp_path / "out" / "dataset.json").write_text(json.dumps(regions))
    (tmp_path / "out" / "predictions.json").unlink()
    assert score_files(tmp_path / "out", tmp_path / "references", surface=False, workers=0).labels.has_regions
    table.unlink()
    (tmp_path / "out" / "dataset.json").unlink()
    (tmp_path / "out" / "predictions.json").write_text(json.dumps(record))
    named = score_files(tmp_path / "out", tmp_path / "references", surface=False, workers=0)
    assert named.labels.region_names == ("liver",) and named.notes == ()
    lines = named.to_text().splitlines()
    assert lines[3:5] == ["worst of 12 cases:", "c7: Dice 0.0000 (liver 0.0000)"] and len(lines) == 9
    few_cases = replace(named, rows=named.rows[:3]).to_text().splitlines()
    assert few_cases[3:] == [f"{case}: Dice 1.0000 (liver 1.0000)" for case in ("c0", "c1", "c10")]


def test_predictions_for_slicer_are_matched(tmp_path: Path) -> None:
    mask = np.zeros((4, 8, 8), np.uint8)
    mask[1:3, 2:6, 2:6] = 1
    save_arrays(tmp_path, {"out/c0.seg.nrrd": mask, "references/c0.nii.gz": mask})
    scores = score_files(tmp_path / "out", tmp_path / "references", workers=0)
    assert [(row.case, row.mean_dice) for row in scores.rows] == [("c0", 1.0)]
    save_arrays(tmp_path, {"same/c0.seg.nrrd": mask})
    assert score_files(tmp_path / "out", tmp_path / "same", workers=0).foreground().mean == 1.0


def test_volume_errors_do_not_cancel() -> None:
    """One volume of a half too much and one of a half too little: an error of a half, not of nothing."""
    reference, small, large = np.zeros((3, 1, 4, 8), np.uint8)
    reference[0, 0, :4] = small[0, 0, :2] = large[0, 0, :6] = 1
    scores = scores_of([(small, reference), (large, reference)], Labels(names={"lesion": 1}))
    cells = dict(zip(scores.lines()[0], scores.lines()[1], strict=True))
    assert cells["abs. volume error"] == "50.0%" and "volume error" not in cells
    summary = scores.to_json()
    mean = summary["mean"]["1"]
    assert (mean["absolute_volume_error"], mean["volume_error"]) == (0.5, 0.0), "the second is the bias"
    assert summary["statistics"]["1"]["absolute_volume_error"]["median"] == 0.5


def test_a_summary_is_read_as_it_was_written(tmp_path: Path) -> None:
    draws = np.random.default_rng(0)
    pairs = [*draws.integers(0, 3, (3, 2, 5, 6, 7)), np.zeros((2, 5, 6, 7), int)]  # the last: no label at all
    scores = scores_of(pairs, REGIONS, surface=False)
    assert list(scores.to_json()["mean"]) == ["(1, 2)", "2"], "nnU-Net's names of regions"
    write_json(tmp_path / "fold_0" / "summary.json", Scores(scores.rows[:2], REGIONS).to_json())
    write_json(tmp_path / "fold_1" / "summary.json", Scores(scores.rows[2:], REGIONS).to_json())
    shutil.move(tmp_path / "fold_0", tmp_path / "moved")
    files = [tmp_path / "moved" / "summary.json", tmp_path / "fold_1" / "summary.json"]
    found = Scores(tuple(row for file in files for row in read_summary(file, REGIONS).rows), REGIONS)
    assert [(row.case, row.metrics) for row in found.rows] == [(row.case, row.metrics) for row in scores.rows]
    assert found.rows[0].prediction_file == tmp_path / "moved" / "case_0.nii.gz"
    assert found.foreground() == scores.foreground()
    rim = Labels(names={"background": 0, "whole": (1, 2), "rim": 1}, region_order=(2, 1))
    with pytest.raises(UserError, match=r"summary\.json: is not a summary for the labels whole, rim"):
        read_summary(files[0], rim)
    write_json(files[0], {"something": 1})
    with pytest.raises(UserError, match="is not a summary"):
        read_summary(files[0], REGIONS)


def test_the_interval_of_all_folds_does_not_depend_on_which_fold_has_a_case(tmp_path: Path) -> None:
    """The report shows the one that `nnlite select` shows, which sorts cases by their names."""
    draws = np.random.default_rng(0)
    scores = scores_of([*draws.integers(0, 3, (6, 2, 5, 6, 7))], REGIONS, surface=False)
    for fold, rows in enumerate((scores.rows[1::2], scores.rows[::2])):
        folder = tmp_path / f"fold_{fold}" / "validation"
        write_json(folder / "summary.json", Scores(rows, REGIONS).to_json())
    found, fold_of = read_fold_scores(tmp_path, REGIONS, [])
    assert found.foreground() == scores.foreground() and fold_of["case_0"] == "1" and fold_of["case_1"] == "0"


# --------------------------------------------------------------------------------------------------------- on disk


def test_labels_come_from_dataset_json_or_the_files(folders: tuple[Path, Path]) -> None:
    predictions, references = folders
    found = score_files(*folders)
    assert found.labels.region_names == ("1", "2") and "no dataset.json" in found.notes[0]
    for planned in (TWO, Labels(names={"front": 1}, ignore=2)):
        assert score_files(*folders, default=planned).labels == planned
    assert score_files(*folders, default=Labels(names={"front": 1})).labels == found.labels
    (predictions / "dataset.json").write_text(json.dumps({"labels": {"background": 0, "front": 1}}))
    one_label = score_files(*folders)
    assert one_label.labels.region_names == ("front",) and "value 2, counted as background" in one_label.notes[0]
    described = {"labels": {"background": 0, "both": [1, 2], "tail": [2]}, "regions_class_order": [1, 2]}
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
    for path in predictions.glob("h*"):
        path.rename(path.with_name("other_" + path.name))
    with pytest.raises(UserError, match=r"other_hippocampus_074.*hippocampus_025"):
        score_files(*folders, TWO)


def test_images_are_predicted_and_scored(tiny_model: Path, scans: list[Path], command: Command, tmp_path: Path) -> None:
    """The labels are those of the model; what cannot be predicted is reported by the exit code."""
    for path, reference in zip(scans, REFERENCES, strict=False):
        for file, folder in ((path, "images"), (reference, "references")):
            (tmp_path / folder).mkdir(exist_ok=True)
            shutil.copy(file, tmp_path / folder)
    arguments = ("evaluate", "images", "references", "-m", tiny_model, "--device", "cpu", "--json")
    cut = tmp_path / "images" / scans[0].name
    cut.write_bytes(cut.read_bytes()[:1000])
    code, out, err = command(*arguments, cwd=tmp_path)
    assert code == 1 and f"failed: {scans[0].name.partition('.')[0]}" in err, err
    scores = json.loads(out)
    assert list(scores["labels"].values()) == ["Anterior", "Posterior"]
    assert [row["prediction_file"] for row in scores["metric_per_case"]] == [None, None]
    array, geometry, _ = read_label(REFERENCES[1])
    write_label(tmp_path / "references" / REFERENCES[1].name, array[1:], replace(geometry, shape=array[1:].shape))
    code, _, err = command(*arguments, cwd=tmp_path)
    assert code == 2 and f"error: images/{scans[1].name}: its prediction is on another grid than references/" in err
    for path in (tmp_path / "images").iterdir():
        path.write_bytes(b"")
    code, _, err = command(*arguments, cwd=tmp_path)
    assert code == 2 and err.endswith("error: images: no image could be predicted.\n")


def test_all_pairs_on_other_grids_are_named(folders: tuple[Path, Path], command: Command, tmp_path: Path) -> None:
    predictions, references = folders
    first, second, third, *_ = sorted(predictions.iterdir())
    array, geometry, _ = read_label(first)
    write_label(first, array[1:], replace(geometry, shape=array[1:].shape))
    move_nifti(second, shift=3)
    third.write_bytes(third.read_bytes()[:500])
    (predictions / "dataset.json").write_text(json.dumps({"labels": {"background": 0, "front": 1}}))
    code, out, err = command("evaluate", predictions, references, "--no-surface", cwd=tmp_path)
    assert code == 2 and not out
    head, *lines, _ = err[err.index("error: ") :].split("\n")
    assert head.startswith(f"error: 3 of {len(REFERENCES)} pairs cannot be compared. ")
    for line, file in zip(lines, (first, second, third), strict=True):
        assert line.startswith(f"  {file}: ")
    assert f": shape {array[1:].shape}, the reference shape {array.shape}" in lines[0]
    assert "origin" in lines[1] and "shape" not in lines[1], "only what differs is shown"
    assert head.count("nearest neighbour") == 1 and "--accept-geometry" in head


def test_two_files_mixed_formats_and_masks(folders: tuple[Path, Path], tmp_path: Path) -> None:
    """A 0/255 mask in NRRD against 0/1 in NIfTI: one label, whether it is described or found; not a planned one."""
    array, geometry, _ = read_label(REFERENCES[0])
    reference, prediction = tmp_path / "truth.nii.gz", tmp_path / "guess.nrrd"
    mask = (array > 0).astype(np.uint8)
    write_label(reference, mask, geometry)
    write_label(prediction, mask * 255, geometry)
    for labels in (Labels(names={"it": 1}), None):
        scores = score_files(prediction, reference, labels, default=TWO)
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
    write_label(tmp_path / "p.png", displaced(array), flat)
    write_label(tmp_path / "r.png", array, flat)
    write_label(tmp_path / "r.nii.gz", array, replace(flat, spacing=(999 * 0.5, 0.5, 0.5)))
    pixels, mm = (score_files(tmp_path / "p.png", tmp_path / name, TWO) for name in ("r.png", "r.nii.gz"))
    assert pixels.foreground().mean == mm.foreground().mean and 0 < pixels.foreground().mean < 1
    assert mm.values("HD95") == pytest.approx(pixels.values("HD95") / 2, nan_ok=True)
    assert (pixels.unit, mm.unit) == ("px", "mm") and not mm.notes
    coarse = score_files(tmp_path / "p.png", tmp_path / "r.nii.gz", TWO, tolerance=60)
    assert coarse.notes == ("100 voxels are less than the tolerance of NSD, 60: it says nothing (r)",)
    assert "NSD" not in coarse.to_text().splitlines()[0] and "HD95 (mm)" in coarse.to_text()
    assert {"HD95", "NSD"} <= set(pixels.to_text().split()) and "mm" not in pixels.to_text()
    assert "HD95 (mm)" in mm.to_text() and "HD95_mm" in mm.to_csv() and "nsd_tolerance_mm" in mm.to_json()
    content = json.dumps(pixels.to_json()) + pixels.to_csv()
    assert "HD95_px" in content and "nsd_tolerance_px" in content and "_mm" not in content


@pytest.mark.parametrize("spacing", [(1.0, 1.0, 1.0), (2.0, 0.5, 0.5)])
def test_volumes_need_a_spacing(tmp_path: Path, spacing: tuple[float, float, float]) -> None:
    """The pages of a TIFF are a volume of unknown size, unless a file has their spacing."""
    array = read_label(REFERENCES[2])[0]
    known = spacing != (1.0, 1.0, 1.0)
    for name in ("p.tif", "r.tif", "r.nii.gz"):
        write_label(tmp_path / name, array, Geometry(array.shape, spacing, calibrated=known))
    ml = pytest.approx((array == 1).sum() * np.prod(spacing) / 1000)
    for name, calibrated in (("r.tif", known), ("r.nii.gz", True)):
        scores = score_files(tmp_path / "p.tif", tmp_path / name, TWO)
        assert scores.unit == ("mm" if calibrated else "px")
        assert scores.rows[0].metrics["Anterior"]["reference_ml"] == (ml if calibrated else None)


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
