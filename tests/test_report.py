"""The report: it shows what the files contain, at every stage of a dataset, and escapes all that it shows."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import SimpleITK
from PIL import Image

import nnunet_lite
from nnunet_lite.data.geometry import Geometry
from nnunet_lite.data.labels import Labels
from nnunet_lite.errors import UserError
from nnunet_lite.evaluation.scores import Scores
from nnunet_lite.files import read_json, write_json
from nnunet_lite.planning.schema import Plan
from nnunet_lite.reporting import material
from nnunet_lite.reporting.material import Units
from nnunet_lite.workspace import planned_paths

Ended = tuple[int, str, str]


class Page(HTMLParser):
    """The elements and text of a page, its data, and the cells (text, exact value) of its tables by caption."""

    def __init__(self, file: Path) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.tables: dict[str, list[list[tuple[str, str | None]]]] = {}
        self.text, self._data, self._tag, self._caption = "", "", "", ""
        self.feed(file.read_text(encoding="utf-8"))
        self.data: dict[str, Any] = json.loads(self._data)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        attributes = dict(attrs)
        self.elements.append((tag, attributes))
        self._tag = str(attributes.get("id")) if tag == "script" else tag
        if tag == "caption":
            self._caption = ""
        elif tag == "tr":
            self.tables.setdefault(self._caption, []).append([])
        elif tag in ("td", "th"):
            self.tables[self._caption][-1].append(("", attributes.get("data-value") or attributes.get("data-order")))

    def handle_endtag(self, tag: str) -> None:
        self._caption = "" if tag == "table" else self._caption
        self._tag = ""

    def handle_data(self, data: str) -> None:
        if self._tag == "report-data":
            self._data += data
        elif self._tag not in ("None", "style"):
            self.text += data
        if self._tag == "caption":
            self._caption += data
        elif row := self.tables.get(self._caption, [[]])[-1]:
            row[-1] = row[-1][0] + data.strip(), row[-1][1]

    def all(self, tag: str, **attributes: str) -> list[dict[str, str | None]]:
        return [a for t, a in self.elements if t == tag and all(a.get(k) == v for k, v in attributes.items())]


def report(workspace: Path, output: Path) -> Page:
    return Page(nnunet_lite.report(output, workspace=workspace))


@pytest.fixture
def trained(tiny_model: Path, tmp_path: Path) -> Path:
    """A copy of the dataset's folder with a scored model, which a test may change."""
    root = tmp_path / "workspace" / "Task04_Hippocampus"
    shutil.copytree(tiny_model.parents[1], root, ignore=shutil.ignore_patterns("preprocessed", "models"))
    shutil.copytree(tiny_model, root / "models" / "tiny", ignore=shutil.ignore_patterns("checkpoint*"))
    shutil.copy(tiny_model.parents[2] / "current.json", root.parent)
    return root


def test_every_case_and_score_is_that_of_the_summary(tiny_model: Path, tiny_report: Path) -> None:
    page = Page(tiny_report)
    summary = read_json(tiny_model / "fold_0" / "validation" / "summary.json")
    shown = page.data["models"]["tiny"]
    assert set(shown["scores"]) == {entry["case"] for entry in summary["metric_per_case"]}
    assert "2 held-out cases of fold 0." in page.text
    head, *rows = page.tables["Held-out cases of tiny, worst first"]
    surfaces = ["mean NSD at 1 mm", "mean HD95 (mm)"]
    assert [name for name, _ in head] == ["Case", "fold", "mean Dice", *surfaces, "Anterior", "Posterior"]
    cells = {row[0][0]: row for row in rows}
    for entry in summary["metric_per_case"]:
        metrics = [entry["metrics"][key] for key in ("1", "2")]
        keys = ("Dice", "IoU", "reference_ml", "prediction_ml", "volume_error", "NSD", "HD95_mm", "lesion_F1",
                "TP", "FP", "FN")  # fmt: skip
        assert shown["scores"][entry["case"]] == [[m[key] for key in keys] for m in metrics]
        dice = [m["Dice"] for m in metrics]
        assert [float(value) for _, value in cells[entry["case"]][5:]] == dice
        for cell, key in zip(cells[entry["case"]][2:5], ("Dice", "NSD", "HD95_mm"), strict=True):
            known = [m[key] for m in metrics if m[key] is not None]
            assert cell[0] == "n/a" if not known else float(cell[1]) == pytest.approx(np.mean(known))
        assert cells[entry["case"]][1][0] == "0"
    means = [float(row[2][1]) for row in rows]
    assert means == sorted(means)
    head, *_, overall = page.tables["Scores of held-out cases, by label"]
    found = dict(zip([name for name, _ in head], [value for _, value in overall], strict=True))
    for heading, key in (("Dice", "Dice"), ("NSD at 1 mm", "NSD"), ("HD95 (mm)", "HD95_mm")):
        for what in ("mean", "median"):
            value = summary["statistics"]["foreground"][key][what]
            assert found.get(f"{what} {heading}") is None if value is None else (
                float(found[f"{what} {heading}"]) == pytest.approx(value)
            )  # fmt: skip


def test_pictures_are_three_planes_through_the_largest_error(tiny_model: Path, tiny_report: Path) -> None:
    page = Page(tiny_report)
    shown = page.data["models"]["tiny"]["pictures"]
    summary = read_json(tiny_model / "fold_0" / "validation" / "summary.json")
    assert set(shown) == {entry["case"] for entry in summary["metric_per_case"]}
    for entry in summary["metric_per_case"]:
        found, truth = (
            SimpleITK.GetArrayFromImage(SimpleITK.ReadImage(str(entry[key])))
            for key in ("prediction_file", "reference_file")
        )
        planes = shown[entry["case"]]
        assert [plane["name"] for plane in planes] == ["axial", "coronal", "sagittal"]
        for axis, plane in enumerate(planes):
            wrong = (found != truth).sum(axis=tuple(a for a in range(3) if a != axis))
            assert plane["axis"] == "zyx"[axis] and wrong[plane["slice"]] == wrong.max()
            assert plane["of"] == truth.shape[axis]
            caption = f"{plane['name']}, slice {plane['slice'] + 1} of {plane['of']} along {plane['axis']}"
            assert caption in page.text, "counted from 1, so not written as a coordinate"
            assert len(plane["errors"]) == 3 and any(plane["errors"])


def test_the_page_uses_no_network(tiny_report: Path) -> None:
    page = Page(tiny_report)
    addresses = [v for _, attributes in page.elements for k, v in attributes.items() if k in ("src", "href") and v]
    assert addresses and all(address.startswith(("data:", "#")) for address in addresses)
    (policy,) = page.all("meta", **{"http-equiv": "Content-Security-Policy"})
    assert policy["content"] and policy["content"].startswith("default-src 'none'; img-src data:")
    assert "url(" not in tiny_report.read_text() and "@import" not in tiny_report.read_text()


def test_settings_versions_and_costs_are_those_of_the_run(tiny_model: Path, tiny_report: Path) -> None:
    page = Page(tiny_report)
    run = read_json(tiny_model / "run.json")
    assert str(run["seed"]) in page.text and run["versions"]["torch"] in page.text
    (costs,) = page.tables["Time and memory of each fold"][1:]
    rows = [json.loads(line) for line in (tiny_model / "fold_0" / "metrics.jsonl").read_text().splitlines()]
    assert costs[2] == (str(rows[-1]["epoch"]), str(float(rows[-1]["epoch"])))
    assert float(costs[7][1] or 0) == max(row["memory_gb"] for row in rows)
    curves = [json.loads(a["data-curves"] or "") for a in page.all("svg", **{"class": "plot"}) if "data-curves" in a]
    losses, dice, by_label, learning_rate = (c["series"] for c in curves if c["label"] == "epoch")
    keys = ("train_loss", "validation_loss", "mean_dice", "lr")
    for series, key in zip((*losses, *dice, *learning_rate), keys, strict=True):
        assert series["name"].startswith("fold 0") and series["y"] == [row[key] for row in rows]
    for series, label in zip(by_label, ("Anterior", "Posterior"), strict=True):
        assert series["name"] == label and series["y"] == [row["dice"][label] for row in rows]


def test_what_the_page_says_about_a_model(tiny_model: Path, tiny_report: Path) -> None:
    """The verdict, the command for each case, and the paragraph for a paper, with the numbers of the run."""
    page, run, plan = Page(tiny_report), read_json(tiny_model / "run.json"), Plan.read(tiny_model / "plans.json")
    assert "tiny fold 0: finished, 2 epochs of 2; too few to see a trend." in page.text
    assert "nnlite train 3d_fullres 1 --epochs 2" in page.text and "--name tiny" in page.text
    for case in page.data["models"]["tiny"]["scores"]:
        assert page.data["models"]["tiny"]["view"][case] == f"nnlite view {case} -m tiny -w {tiny_model.parents[2]}"
    summary = read_json(tiny_model / "fold_0" / "validation" / "summary.json")["statistics"]["foreground"]
    for said in (
        f"nnunet_lite {run['versions']['nnunet_lite']} (PyTorch {run['versions']['torch']}",
        "The dataset has 10 cases with 1 channel (MRI) and references of Anterior and Posterior.",
        "a 3D U-Net with 3 resolution stages of 4-8-8 feature maps",
        f"batches of {plan.configuration('3d_fullres').batch_size}",
        "patches of 24 × 32 × 24 voxels",
        "for 2 epochs of 3 steps",
        f"Dice {summary['Dice']['mean']:.3g}",
        "doi:10.1038/s41592-020-01008-z",
    ):
        assert said in " ".join(page.text.split()), said


def test_what_the_paper_says_about_settings(tiny_model: Path, tmp_path: Path) -> None:
    shutil.copytree(tiny_model.parents[2], tmp_path / "w", ignore=shutil.ignore_patterns("preprocessed"))
    folder = planned_paths(tmp_path / "w").models / "tiny"
    run, plan = read_json(folder / "run.json"), read_json(folder / "plans.json")
    run["settings"]["optimizer"]["name"] = "muon"
    run["settings"]["schedule"] |= {"name": "constant", "cooldown": 0.2}
    run["settings"]["loss"] |= {"component_dice": 0.5, "distillation": 0.3}
    run["settings"]["training"] |= {"patch_growth": 0.4, "teachers": ["large"]}
    plan["configurations"]["3d_fullres"]["network"] |= {"kind": "mednext_s", "activation": "gelu"}
    plan["labels"] |= {"names": {"whole": [1, 2], "tail": [2]}, "region_order": [1, 2], "ignore": 9}
    plan["configurations"]["coarse"] = {**plan["configurations"]["3d_fullres"], "spacing": [4, 2, 2]}
    plan["configurations"]["3d_fullres"] |= {"spacing": [3, 1, 1], "previous_stage": "coarse"}
    plan["axis_order"] = [2, 0, 1]
    fingerprint = read_json(planned_paths(tmp_path / "w").fingerprint)
    fingerprint["spacings"] = [[1, 1, 3]] * len(fingerprint["spacings"])
    write_json(planned_paths(tmp_path / "w").fingerprint, fingerprint)
    write_json(folder / "run.json", run)
    write_json(folder / "plans.json", plan)
    nnunet_lite.report(workspace=tmp_path / "w", output=tmp_path / "report.html")
    text = " ".join(Page(tmp_path / "report.html").text.split())
    for said in (
        "The network is a 3D MedNeXt (Roy et al. 2023, arXiv:2303.09975) with 3 resolution stages",
        "instance normalisation and GELU.",
        "All images have a spacing of 3 × 1 × 1 mm and were not resampled.",
        "the segmentation by coarse, which sees images at 4 × 2 × 2 mm.",
        "after smaller ones in the first 40 % of the run",
        "The loss was the sum of binary cross-entropy, soft Dice and 0.5 times soft Dice of each connected component "
        "of each region in annotated voxels, with deep supervision.",
        "divergence from the probabilities of large had a share of 0.3 in it.",
        "It was minimised by Muon, with AdamW for all but the convolution kernels, with an initial learning rate of",
        "no decay and a linear fall to zero in the last 20 % of the run and a weight decay of",
    ):
        assert said in text, said


def test_a_planned_dataset(copy_dataset: Callable[..., Path], command: Callable[..., Ended], tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no dataset is planned"):
        nnunet_lite.report(workspace=tmp_path)
    nnunet_lite.plan(copy_dataset(4, "planned"), workspace=tmp_path / "nnlite_workspace", workers=0)
    code, out, _ = command("report", "--json", cwd=tmp_path)
    written = Path(json.loads(out)["path"])
    assert code == 0 and written == tmp_path / "nnlite_workspace" / "planned" / "report.html"
    page = Page(written)
    assert len(page.all("figure", **{"class": "plane"})) == 4
    assert "nnlite train 3d_fullres all" in page.text
    for missing in ("No fold is trained yet.", "No held-out case is scored yet.", "There is nothing to compare yet."):
        assert missing in page.text
    code, out, _ = command("report", "-o", tmp_path, cwd=tmp_path)
    assert code == 0 and out.strip() == str(tmp_path / "report.html")
    (tmp_path / "scan.nii.gz").write_text("an image")
    code, _, err = command("report", "-o", "scan.nii.gz", cwd=tmp_path)
    assert code == 2 and "scan.nii.gz: a page is written as .html" in err
    assert (tmp_path / "scan.nii.gz").read_text() == "an image"


def test_sizes_and_volumes_of_hostile_regions(copy_nnunet: Callable[..., Path], tmp_path: Path) -> None:
    """Numbers are those of the files, and names that look like HTML are text."""
    evil, picture = "<script>alert(1)</script>", '"><img src=x onerror=alert(2)>'
    labels = {"background": 0, evil: [1, 2], picture: 2}
    channels = (f"T1{evil}", "T2")
    root = copy_nnunet(3, channels, "<b onclick=alert(3)>", labels=labels, regions_class_order=[1, 2])
    nnunet_lite.plan(root, workspace=tmp_path / "ws", workers=0)
    page = report(tmp_path / "ws", tmp_path / "page.html")
    assert len(page.all("script")) == 2 and not page.all("img")
    assert not [k for _, attributes in page.elements for k in attributes if k.startswith("on")]
    assert page.data["labels"] == [evil, picture] and page.data["channels"] == list(channels)
    assert evil in page.text and picture in page.text and "<b onclick=alert(3)>" in page.text
    assert evil not in (tmp_path / "page.html").read_text()
    head, *rows = page.tables["All 3 cases"]
    columns = ["Case", "size (z, y, x)", "spacing (mm)", f"{evil} (ml)", f"{picture} (ml)"]
    assert [name for name, _ in head] == columns and len(rows) == 3
    for (case, _), (size, _), _, *volumes in rows:
        label = SimpleITK.GetArrayFromImage(SimpleITK.ReadImage(str(root / "labelsTr" / f"{case}.nii.gz")))
        assert size == " × ".join(map(str, label.shape))
        counts = (label > 0).sum(), (label == 2).sum()
        assert [float(value or 0) for _, value in volumes] == pytest.approx([n / 1000 for n in counts])
    assert [row[0][0] for row in page.tables["Intensities of all voxels that are not background"][1:]] == list(channels)
    drawn = [a for a in page.all("svg", **{"class": "plot"}) if (a["aria-label"] or "").startswith("Intensities, ")]
    assert len(drawn) == 2


def test_sizes_of_images_in_several_orientations_are_along_the_same_axes(tmp_path: Path) -> None:
    """As the plan turns them: a slice of 5 mm is along z in every case."""
    label = np.zeros((6, 16, 20), np.uint8)
    label[2:4, 4:9, 5:9] = 1
    for i, code in enumerate(("LPS", "LPS", "PIR", "SAL", "LPS")):
        for folder, array in (("images", np.random.default_rng(i).normal(100, 9, label.shape)), ("labels", label)):
            image = SimpleITK.GetImageFromArray(array)
            image.SetSpacing((0.5, 0.5, 5.0))
            (tmp_path / "raw" / folder).mkdir(parents=True, exist_ok=True)
            oriented = SimpleITK.DICOMOrient(image, code)
            SimpleITK.WriteImage(oriented, str(tmp_path / "raw" / folder / f"c{i}.nii.gz"))
    nnunet_lite.plan(tmp_path / "raw", workspace=tmp_path / "w", workers=0)
    page = report(tmp_path / "w", tmp_path / "page.html")
    assert {row[1][0] for row in page.tables["All 5 cases"][1:]} == {"6 × 16 × 20"}
    assert {row[2][0] for row in page.tables["All 5 cases"][1:]} == {"5 × 0.5 × 0.5"}
    assert "Spacing along z5 mm in every case" in page.text


def test_colour_pictures(tmp_path: Path) -> None:
    root, draws = tmp_path / "cells", np.random.default_rng(0)
    for folder in ("images", "labels"):
        (root / folder).mkdir(parents=True)
    for i in range(3):
        image = draws.integers(0, 255, (48, 64, 3), dtype=np.uint8)
        label = np.zeros((48, 64), np.uint8)
        label[10:20, 10 : 30 + i] = 255
        Image.fromarray(image).save(root / "images" / f"{i}.png")
        Image.fromarray(label).save(root / "labels" / f"{i}.png")
    nnunet_lite.plan(root, workspace=tmp_path / "ws", workers=0)
    page = report(tmp_path / "ws", tmp_path / "page.html")
    assert len(page.all("figure", **{"class": "plane"})) == 3
    head, *rows = page.tables["All 3 cases"]
    assert [name for name, _ in head] == ["Case", "size (y, x)", "label_1 (pixels)"]
    assert [row[2] for row in rows] == [(str(10 * (20 + i)),) * 2 for i in range(3)]
    assert [row[1][0] for row in rows] == ["48 × 64"] * 3


def test_microscopy_is_measured_in_micrometres(tmp_path: Path) -> None:
    geometry = Geometry((1, 40, 60), (0.5, 5e-4, 5e-4), dimensions=2)
    units = Units.of([geometry])
    assert (units.length, units.volume, units.size) == ("µm", "µm²", "Area")
    assert units.volume_of(200, geometry) == pytest.approx(50) and units.per_mm * 5e-4 == pytest.approx(0.5)
    stack = Geometry((5, 40, 60), (2e-3, 5e-4, 5e-4))
    assert Units.of([stack]).volume_of(8, stack) == pytest.approx(4) and Units.of([stack]).volume == "µm³"
    scan = Geometry((5, 40, 60), (2.0, 1.0, 1.0))
    assert Units.of([scan]).volume_of(500, scan) == pytest.approx(1) and Units.of([scan]).volume == "ml"
    unknown = Geometry((1, 40, 60), (999.0, 1.0, 1.0), dimensions=2, calibrated=False)
    assert Units.of([unknown]).volume_of(7, unknown) == 7 and Units.of([unknown]).volume == "pixels"


def test_selected_models(trained: Path, tmp_path: Path) -> None:
    """The winner, here an ensemble, comes first and with its cases; the margin and the postprocessing are shown."""
    shutil.copytree(trained / "models" / "tiny", trained / "models" / "other")
    ensemble = trained / "ensembles" / "other+tiny" / "fold_0"
    shutil.copytree(trained / "models" / "tiny" / "fold_0" / "validation", ensemble / "validation")
    winner = {"models": ["other", "tiny"], "n_cases": 2, "dice": 0.81, "low": 0.7, "high": 0.9,
              "by_label": {"Anterior": 0.8, "Posterior": 0.82}, "margin": {"mean": 0, "low": 0, "high": 0}}  # fmt: skip
    second = {**winner, "models": ["tiny"], "dice": 0.75, "margin": {"mean": 0.06, "low": -0.01, "high": 0.11}}
    write_json(trained / "inference.json", {
        "format": "nnlite-inference-1", "models": ["other", "tiny"], "folds": ["0"], "made": "2026-11-26",
        "postprocessing": {"Posterior": {"largest_component": True, "min_size_mm3": 12.5}},
        "candidates": [winner, second],
        "postprocessing_gain": {"Posterior": {"before": 0.8, "after": 0.82}}, "version": "0.1.0",
    })  # fmt: skip
    page = report(trained.parent, tmp_path / "page.html")
    assert list(page.data["models"]) == ["other+tiny", "other", "tiny"]
    rows = page.tables["Candidates of nnlite select, the best first"]
    assert [cell for cell, _ in rows[1]][:4] == ["other + tiny", "2", "0.810", "0.700 to 0.900"]
    assert rows[2][5][0] == "+0.0600 (-0.0100 to +0.1100)"
    steps = page.tables["Postprocessing of the predictions"][1]
    assert steps[1][0] == "the largest component, from 12.5 mm3"
    assert [float(value or 0) for _, value in steps[2:4]] == [0.8, 0.82] and steps[4][0] == "n/a"  # an older version
    assert page.tables["Held-out cases of other + tiny, worst first"]
    paper = " ".join(page.text.split())
    assert "The model tiny was trained" in paper and "The model other was trained" in paper
    assert "other + tiny reached on 2 held-out cases" in paper
    assert "Postprocessing keeps the largest component, from 12.5 mm3 of Posterior; the scores are before it." in paper
    assert not re.search(r"[.;,][A-Z]| [.,;]", paper[paper.index("The model other") : paper.index("[1] Isensee")])


def test_an_incomplete_workspace(trained: Path, tmp_path: Path) -> None:
    """A fold that trains, with a line that is half written, and a case whose image is missing."""
    finished, fold = (trained / "models" / "tiny" / name for name in ("fold_0", "fold_1"))
    fold.mkdir()
    lines = (finished / "metrics.jsonl").read_text()
    (fold / "metrics.jsonl").write_text(lines + lines[:40])
    missing = read_json(finished / "validation" / "summary.json")["metric_per_case"][0]["case"]
    dataset = read_json(trained / "dataset.json")
    case = next(entry for entry in dataset["dataset"] if entry["id"] == missing)
    case["images"] = [str(tmp_path / "missing.nii.gz")]
    write_json(trained / "dataset.json", dataset)
    page = report(trained.parent, tmp_path / "page.html")
    assert "fold 1 (not finished)" in page.text and "2 so far" in page.text
    assert "1 of 10 cases could not be shown" in page.text and "missing.nii.gz" in page.text
    model = page.data["models"]["tiny"]
    assert missing in model["scores"] and missing not in model["pictures"]


def test_pictures_of_the_best_cases_are_left_out_first(
    trained: Path, tiny_report: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = Page(tiny_report)
    worst = whole.tables["Held-out cases of tiny, worst first"][1][0][0]
    planes = whole.data["models"]["tiny"]["pictures"][worst]
    monkeypatch.setattr(material, "PAGE_BYTES", int(1.3 * len(json.dumps(planes))))
    monkeypatch.setattr(material, "TILES", 3)
    page = report(trained.parent, tmp_path / "page.html")
    assert list(page.data["models"]["tiny"]["pictures"]) == [worst]
    assert "tiny: pictures of 1 of 2 cases, first the worst, the best and the median" in page.text
    assert "the montage and the intensities are those of 3 of 10 cases" in page.text


def test_a_fold_that_trains_changes_no_mean_and_no_method(trained: Path, tmp_path: Path) -> None:
    finished, fold = (trained / "models" / "tiny" / name for name in ("fold_0", "fold_1"))
    fold.mkdir()
    lines = (finished / "metrics.jsonl").read_text().splitlines(keepends=True)
    before = report(trained.parent, tmp_path / "before.html").text
    (fold / "metrics.jsonl").write_text(lines[0])
    text = report(trained.parent, tmp_path / "page.html").text
    epochs = re.search(r"for (\d+ epochs?) of", text)
    assert epochs and epochs[0] in before and epochs[1] == f"{len(lines)} epoch{'s' * (len(lines) > 1)}"
    assert (
        "tiny: 1 of 5, 1 not finished" in text and "Comparison" not in text and not re.search(r"mean of \d folds", text)
    )
    assert "Only 1 of 5 folds are scored" in text and "1000 bootstrap resamples" in text
    assert "All images have a spacing of 1 × 1 × 1 mm and were not resampled" in text


@pytest.mark.parametrize("text", ['{"predictions": 3}', '{"predictions": {"a": {}}}', "{"])
def test_only_the_times_of_a_damaged_record_are_left_out(trained: Path, text: str) -> None:
    model = trained / "models" / "tiny"
    (model / "fold_0" / "validation" / "predictions.json").write_text(text)
    notes: list[str] = []
    found = material.read_results(model, notes)
    assert found.scores.rows and found.folds[0].rows and not found.folds[0].prediction_seconds
    assert "predictions.json: " in notes[0]


def test_a_mean_over_other_cases_says_over_how_many(trained: Path, tmp_path: Path) -> None:
    """HD95 leaves out a label that is missed: without their number, a mean of few cases looks like one of all."""
    file = trained / "models" / "tiny" / "fold_0" / "validation" / "summary.json"
    summary = read_json(file)
    for entry, distance in zip(summary["metric_per_case"], (None, 2.0), strict=True):
        for values in entry["metrics"].values():
            values |= {"Dice": 0.5, "absolute_volume_error": 0.1, "lesion_F1": 0.1, "HD95_mm": distance}
    write_json(file, summary)
    page = report(trained.parent, tmp_path / "page.html")
    head, *rows = page.tables["Scores of held-out cases, by label"]
    names = [name for name, _ in head]
    assert [name for name in names if name.startswith("cases")] == ["cases", "cases with HD95"]
    assert [row[names.index("cases with HD95")][0] for row in rows] == ["1", "1", "1"]
    assert "HD95 2 mm (1 case, median 2 mm)" in " ".join(page.text.split())


def test_scores_for_other_labels_are_left_out(trained: Path, tmp_path: Path) -> None:
    file = trained / "models" / "tiny" / "fold_0" / "validation" / "summary.json"
    file.write_text(file.read_text().replace('"2": {', '"3": {'))
    page = report(trained.parent, tmp_path / "page.html")
    assert "scores are left out" in page.text and not page.data["models"]


def test_names_are_text_in_a_notebook(tiny_model: Path) -> None:
    evil = "<script>alert(1)</script>"
    plan = Plan.read(tiny_model / "plans.json").model_copy(update={"dataset": evil})
    for shown in (plan, Scores((), Labels(names={"background": 0, evil: 1}))):
        text = shown._repr_html_()
        assert text.startswith("<table>") and "<script" not in text and "&lt;script&gt;" in text


@pytest.mark.parametrize("lacking", ["settings", "configuration", "format"])
def test_a_model_with_a_damaged_run_is_left_out(tiny_workspace: Path, tmp_path: Path, lacking: str) -> None:
    shutil.copytree(tiny_workspace, tmp_path / "w", ignore=shutil.ignore_patterns("preprocessed"))
    paths = planned_paths(tmp_path / "w")
    run = read_json(paths.models / "tiny" / "run.json")
    write_json(paths.models / "tiny" / "run.json", {key: value for key, value in run.items() if key != lacking})
    found = material.read_material(paths)
    assert not found.models and "model tiny is left out" in found.notes[0] and lacking in found.notes[0]
