"""`nnlite report --compare`: two models on one page, with their scores paired by case."""

import shutil
from pathlib import Path

import pytest
from test_report import Page

import nnunet_lite
from nnunet_lite.data.dataset import stored_dataset
from nnunet_lite.errors import UserError
from nnunet_lite.evaluation.cross_validation import score_predictions
from nnunet_lite.evaluation.scores import read_summary
from nnunet_lite.files import read_json, write_json
from nnunet_lite.inference.cases import output_file
from nnunet_lite.workspace import Paths


@pytest.fixture
def models(tiny_model: Path, tmp_path: Path) -> tuple[Path, Path]:
    """The tiny model, and a copy of other settings that predicts one case as its reference is."""
    root = tmp_path / "workspace" / "Task04_Hippocampus"
    shutil.copytree(tiny_model.parents[1], root, ignore=shutil.ignore_patterns("preprocessed", "models"))
    first, second = root / "models" / "tiny", root / "models" / "better"
    for folder in (first, second):
        shutil.copytree(tiny_model, folder)
    run = read_json(second / "run.json")
    run["settings"]["optimizer"]["lr"] = 0.5
    write_json(second / "run.json", run)
    out = second / "fold_0" / "validation"
    dataset = stored_dataset(Paths(root).dataset)
    cases = [entry["case"] for entry in read_json(out / "summary.json")["metric_per_case"]]
    case = next(case for case in dataset.cases if case.id == cases[0])
    assert case.label is not None
    shutil.copy(case.label, output_file(case, out))
    score_predictions(out, dataset, cases)
    return first, second


def compare(first: object, second: object, **options: object) -> Page:
    return Page(nnunet_lite.report(compare=(str(first), str(second)), **options))  # type: ignore[arg-type]


def test_scores_are_paired_by_case(models: tuple[Path, Path]) -> None:
    workspace = models[0].parents[2]
    page = compare("tiny", "better", workspace=workspace)
    labels = stored_dataset(Paths(models[0].parents[1]).dataset).labels
    first, second = (
        read_summary(model / "fold_0" / "validation" / "summary.json", labels).values() for model in models
    )
    _, overall, *rows = page.tables["Dice of the same cases"]
    for i, row in enumerate(rows):
        name, n, mean, other, margin, n_better, n_worse, _ = row
        assert name[0] == labels.region_names[i] and int(n[0]) == 2
        assert float(mean[1] or 0) == pytest.approx(first[:, i].mean())
        assert float(other[1] or 0) == pytest.approx(second[:, i].mean())
        assert margin[0].startswith(f"{second[:, i].mean() - first[:, i].mean():+.4f} (")
        assert int(n_better[0]) == (second[:, i] > first[:, i]).sum()
        assert int(n_worse[0]) == (second[:, i] < first[:, i]).sum()
    assert [overall[i][0] for i in (5, 6, 7)] == ["1", "0", "1"], "the other case has equal predictions"
    assert {"NSD at 1 mm of the same cases", "HD95 (mm) of the same cases"} <= set(page.tables)
    (difference,) = page.tables["Settings and plan, where they differ"][1:]
    rate = read_json(models[0] / "run.json")["settings"]["optimizer"]["lr"]
    assert [text for text, _ in difference] == ["optimizer.lr", str(rate), "0.5"]
    pictures = {name: model["pictures"] for name, model in page.data["models"].items()}
    (case,) = pictures["better"]
    planes = [pictures[name][case] for name in ("tiny", "better")]
    assert [plane["slice"] for plane in planes[0]] == [plane["slice"] for plane in planes[1]]
    assert planes[0][0]["reference"] == planes[1][0]["reference"]
    assert planes[0] != planes[1]
    assert len(page.tables["Cases of both models, the largest loss first"]) == 3
    costs = page.tables["Time and memory of each fold"]
    assert [row[0][0] for row in costs[1:]] == ["tiny", "better"]
    assert all(float(row[9][1] or 0) > 0 for row in costs[1:]), "the seconds to predict a case"


def test_labels_that_one_model_alone_finds_are_noted(models: tuple[Path, Path]) -> None:
    """Their Dice of 0 has no counterpart; the Dice of a case is that of the labels that both models have."""
    for model, dice in zip(models, (0.0, None), strict=True):
        file = model / "fold_0" / "validation" / "summary.json"
        summary = read_json(file)
        for entry in summary["metric_per_case"]:
            entry["metrics"]["2"] |= {"Dice": dice, "NSD": dice, "HD95_mm": None, "n_ref": 0}
        write_json(file, summary)
        one = summary["metric_per_case"][1]
    page = compare("tiny", "better", workspace=models[0].parents[2])
    assert "tiny finds a label where neither the reference nor better has it, 2 times" in page.text
    assert "better finds a label where" not in page.text
    for name in ("Dice of the same cases", "NSD at 1 mm of the same cases"):
        assert [text for text, _ in page.tables[name][3]] == ["Posterior", "0", "n/a", "n/a", "n/a", "0", "0", "n/a"]
    rows = {
        row[0][0]: [text for text, _ in row[1:]] for row in page.tables["Cases of both models, the largest loss first"]
    }
    equal = f"{one['metrics']['1']['Dice']:.3f}"
    assert rows[one["case"]] == [equal, equal, "+0.000"]


def test_a_model_of_another_workspace(models: tuple[Path, Path], tiny_model: Path, tmp_path: Path) -> None:
    page = compare(models[0], tiny_model, output=tmp_path)
    name = page.all("tr", **{"class": "opens"})[0]["data-model"] or ""
    assert name.endswith("tiny") and len(page.data["models"]) == 2 and (tmp_path / "comparison.html").is_file()
    commands = [next(iter(model["view"].values())) for model in page.data["models"].values()]
    assert commands[0].endswith(f"-m tiny -w {models[0].parents[2]}") and commands[1].endswith(
        f"-w {tiny_model.parents[2]}"
    )
    assert "Settings and plans are equal." in page.text
    assert [row[5][0] + row[6][0] for row in page.tables["Dice of the same cases"][1:]] == ["00"] * 3


def test_an_imported_model_has_no_curves(models: tuple[Path, Path]) -> None:
    for name in ("metrics.jsonl", "metrics.csv", "cases.json"):
        (models[1] / "fold_0" / name).unlink()
    page = compare(*models)
    assert len(page.tables["Dice of the same cases"]) == 4 and "Loss" in page.text


def test_models_without_a_common_case(models: tuple[Path, Path]) -> None:
    """A case of the same name with another reference is another case."""
    file = models[1] / "fold_0" / "validation" / "summary.json"
    summary = read_json(file)
    for entry in summary["metric_per_case"]:
        entry["metrics"]["1"]["n_ref"] += 1
    write_json(file, summary)
    page = compare(*models)
    assert "The models share no case" in page.text and "There is no case of both models." in page.text
    assert page.tables["Held-out cases of tiny"][0][0][0] == "label" and "Dice of the same cases" not in page.tables
    shutil.rmtree(file.parent)
    assert "The models share no case" in compare(*models).text


def test_what_cannot_be_compared(models: tuple[Path, Path], tmp_path: Path) -> None:
    alone = [Path(shutil.copytree(models[0], tmp_path / name)) for name in ("a", "b")]
    archive = nnunet_lite.export_model("tiny", output=tmp_path / "m.zip", workspace=models[0].parents[2])
    for first, second, match in (
        (models[0], models[0], "compared with itself"),
        (*alone, "in no workspace"),
        (models[0], archive, "no scores to compare"),
        (models[0], tmp_path / "nowhere", "no model folder"),
    ):
        with pytest.raises(UserError, match=match):
            compare(first, second)
    assert not (models[0].parents[1] / "comparison.html").exists()
