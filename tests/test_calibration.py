"""The quality that predict states is calibrated on held-out cases, travels with the model, and holds for it alone."""

from __future__ import annotations

import csv
import json
import re
import shutil
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pytest
import torch
from pydantic import ValidationError
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from samples import TINY, Command, Copy, first_cases, forget_plan, rewrite_nifti
from scipy.stats import spearmanr

import nnunet_lite
from nnunet_lite.commands.predict import _predict_on_worker
from nnunet_lite.data.cases import find_cases
from nnunet_lite.data.dataset import stored_dataset
from nnunet_lite.data.geometry import Geometry
from nnunet_lite.data.images import read_image
from nnunet_lite.errors import UserError
from nnunet_lite.evaluation import calibration, calibration_rows
from nnunet_lite.evaluation.calibration import MIN_CASES, _what_lacks, find_held_out, fit_quality, split_by_case
from nnunet_lite.evaluation.calibration_rows import (
    Row,
    TrainingRanges,
    predict_rows,
    read_rows,
    training_ranges,
    write_rows,
)
from nnunet_lite.evaluation.comparison import HeldOut, load_team
from nnunet_lite.evaluation.degradation import DEGRADATIONS
from nnunet_lite.evaluation.members import find_members
from nnunet_lite.evaluation.selection import read_selection
from nnunet_lite.files import read_json, write_json
from nnunet_lite.inference.features import CaseFeatures, describe_image, describe_prediction
from nnunet_lite.inference.folder import Outputs
from nnunet_lite.inference.outputs import ExtraMaps
from nnunet_lite.inference.predictor import load, prepare_image, segment
from nnunet_lite.inference.quality import CaseQuality, Expected, Quality, Tree, judge, worst_first
from nnunet_lite.models.bundle import pack
from nnunet_lite.models.folder import weights_fingerprint
from nnunet_lite.planning.schema import Plan
from nnunet_lite.reporting.material import CasePictures, read_material
from nnunet_lite.reporting.page import _quality_section
from nnunet_lite.workspace import Paths

SHORT = {**TINY, "training.epochs": 1, "training.iterations": 50, "training.batch_size": 1,
         "training.patch_size": [40, 56, 40], "network.features_base": 4, "network.features_max": 16,
         "optimizer.name": "muon", "optimizer.lr": 5e-3, "schedule.name": "constant",
         "training.validation_iterations": 0}  # fmt: skip


@pytest.fixture(scope="module", autouse=True)
def few_trees() -> Iterator[None]:
    """A small forest: scikit-learn takes as long to begin a tree as to grow it."""
    with pytest.MonkeyPatch.context() as changed:
        changed.setattr(calibration, "_TREES", 20)
        yield


@pytest.fixture(scope="module")
def selected(tmp_path_factory: pytest.TempPathFactory) -> Paths:
    """A workspace whose only model holds out 12 of 24 cases, calibrated in one round. Not to be written to."""
    raw, workspace = tmp_path_factory.mktemp("raw") / "Task04_Hippocampus", tmp_path_factory.mktemp("workspace")
    first_cases(raw, 24)
    nnunet_lite.plan(raw, workspace=workspace, workers=0)
    paths = Paths(workspace / raw.name)
    cases = sorted(file.name.removesuffix(".nii.gz") for file in (raw / "imagesTr").iterdir())
    write_json(paths.splits, [{"train": cases[12:], "val": cases[:12]}])
    nnunet_lite.train("3d_fullres", 0, settings=SHORT, workspace=workspace, name="short", device="cpu")
    with pytest.MonkeyPatch.context() as changed:
        changed.setattr(calibration_rows, "_MINUTES", 0)
        nnunet_lite.select(workspace=workspace, device="cpu", workers=1)
    return paths


@pytest.fixture
def images(selected: Paths, hippocampus: Path, tmp_path: Path) -> Path:
    """Two images that no fold has seen."""
    folder = tmp_path / "images"
    folder.mkdir()
    for file in sorted((hippocampus / "imagesTs").glob("*.nii.gz"))[:2]:
        shutil.copy(file, folder)
    return folder


def predict(paths: Paths, images: Path, out: Path, **options: Any) -> Any:
    return nnunet_lite.predict(images, out, workspace=paths.root.parent, device="cpu", **options)


# ------------------------------------------------------------------------------------------- from select to predictions


def test_select_predicts_each_held_out_case_and_degraded_copies_of_it(selected: Paths) -> None:
    rows = read_rows(selected.calibration_of("short"))
    held_out = read_json(selected.splits)[0]["val"]
    assert [row.case for row in rows if row.kind == "clean"] == held_out
    assert {row.kind for row in rows} == {"clean", *DEGRADATIONS}
    scores = read_json(selected.models / "short" / "fold_0" / "validation" / "summary.json")["metric_per_case"]
    validated = {one["case"]: one["metrics"]["1"]["Dice"] for one in scores}
    assert {row.case: row.dice["Anterior"] for row in rows if row.kind == "clean"} == pytest.approx(validated)


def test_predict_states_the_expected_dice_of_each_label(selected: Paths, images: Path, tmp_path: Path) -> None:
    made = predict(selected, images, tmp_path / "out")
    table = list(csv.DictReader((tmp_path / "out" / "quality.csv").open()))
    stored = read_json(tmp_path / "out" / "quality.json")["cases"]
    assert {row["case"] for row in table} == set(stored) == set(made.quality) == {f.name[:15] for f in made.files}
    assert {row["label"] for row in table} == {"Anterior", "Posterior"}
    for row in table:
        assert 0 <= float(row["low"]) <= float(row["expected_dice"]) <= float(row["high"]) <= 1
    means = [one["expected_mean"] for one in stored.values()]
    assert means == sorted(means)  # the worst first
    assert CaseQuality.from_json(stored[table[0]["case"]]).expected["Anterior"] is not None
    assert "expected quality, worst first" in made.to_text()


def test_label_maps_are_the_same_without(selected: Paths, images: Path, tmp_path: Path) -> None:
    first = predict(selected, images, tmp_path / "with")
    second = predict(selected, images, tmp_path / "without", quality=False)
    assert not second.quality and not (tmp_path / "without" / "quality.csv").exists()
    for one, other in zip(first.files, second.files, strict=True):
        assert one.read_bytes() == other.read_bytes()
    assert not (tmp_path / "with" / "uncertainty").exists()


def test_a_removed_label_map_and_its_quality_are_made_again(
    selected: Paths, images: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    first = predict(selected, images, tmp_path / "out")
    before = read_json(tmp_path / "out" / "quality.json")
    first.files[0].unlink()
    made = predict(selected, images, tmp_path / "out", skip_existing=True)
    assert read_json(tmp_path / "out" / "quality.json") == before
    assert made.quality == first.quality, "the terminal shows those that were kept, too"
    (tmp_path / "out" / "quality.json").unlink()
    capfd.readouterr()
    assert not predict(selected, images, tmp_path / "out", skip_existing=True).quality
    assert "nothing is known about the quality of 2 label maps kept by --continue" in capfd.readouterr().err


def test_the_zip_of_a_model_contains_its_quality(selected: Paths, images: Path, tmp_path: Path) -> None:
    pack(selected.models / "short", tmp_path / "model.zip")
    from_zip = predict(selected, images, tmp_path / "zip", model=tmp_path / "model.zip")
    assert from_zip.quality == predict(selected, images, tmp_path / "out").quality != {}
    text = (selected.models / "short" / "quality.json").read_text()
    assert not any(case in text for case in read_json(selected.splits)[0]["val"])  # a zip names no case


def test_other_weights_have_no_quality(selected: Paths, tmp_path: Path, capfd: Any) -> None:
    folder = Path(shutil.copytree(selected.models / "short", tmp_path / "models" / "short"))
    before = read_json(folder / "quality.json")
    for change in ({"weights": {"short": {"0": "0" * 16}}}, {"features": before["features"] + 1}):
        write_json(folder / "quality.json", before | change)
        assert load(folder, device="cpu", judging=True).quality is None
        assert "is of other weights, labels or features" in capfd.readouterr().err
    (folder / "fold_0").rename(folder / "fold_all")
    assert load(folder, device="cpu", judging=True).quality is None
    assert "fold all holds out none" in capfd.readouterr().err


@pytest.fixture
def pair(selected: Paths, tmp_path: Path) -> list[Path]:
    """Two models of two folds with different weights and spacings, calibrated together."""
    folders = [tmp_path / "models" / name for name in ("b", "a")]
    quality = read_json(selected.models / "short" / "quality.json") | {"weights": {}}
    for number, folder in enumerate(folders):
        shutil.copytree(selected.models / "short", folder)
        shutil.copytree(folder / "fold_0", folder / "fold_1")
        forget_plan(folder)
        for weights in sorted(folder.glob("fold_*/model.safetensors")):
            with safe_open(weights, "pt") as file:
                about = {key: value for key, value in file.metadata().items() if key != "checksum"}
            tensors = load_file(weights).items()
            save_file({name: x + 0.02 * x.std() * torch.randn_like(x) for name, x in tensors}, weights, about)
        plan = read_json(folder / "plans.json")
        for configuration in plan["configurations"].values():
            configuration["spacing"] = [s * (1 + 0.3 * number) for s in configuration["spacing"]]
        write_json(folder / "plans.json", plan)
        quality["weights"][folder.name] = {fold: weights_fingerprint(folder, fold) for fold in "01"}
    for folder in folders:
        write_json(folder / "quality.json", quality)
    return folders


def test_an_ensemble_is_judged_as_it_was_calibrated(pair: list[Path], images: Path) -> None:
    """Whatever maps are written too, and in whichever order the models are named."""
    image = read_image(sorted(images.iterdir())[0])
    found = []
    for models, maps in (
        (pair, ExtraMaps()),
        (pair, ExtraMaps(uncertainty=True)),
        (pair[::-1], ExtraMaps(("Anterior",))),
    ):
        model = load(models, device="cpu", judging=True)
        assert model.quality is not None and [one.folder for one in (model, *model.partners)] == pair
        prepared = prepare_image(model, image)
        label_map, made = segment(model, prepared, maps=model.add_quality_maps(maps))
        assert set(maps.names) <= set(made)
        found.append(describe_prediction(prepared.arrays[0], label_map, made, model.plan.labels))
    expected = found[0]
    assert any(values.get("disagreement", 0) > 0.01 for values in expected.labels.values())
    for other in found[1:]:
        assert other.image == expected.image
        for label, values in expected.labels.items():
            assert other.labels[label] == pytest.approx(values, abs=2e-3)


def test_a_quality_of_two_models_is_not_that_of_one_of_them(pair: list[Path], capfd: Any) -> None:
    assert load(pair[0], device="cpu", judging=True).quality is None
    assert "quality.json is of b and a, not of what predicts now, so unused" in capfd.readouterr().err
    assert load(pair[0], device="cpu").labels and "quality" not in capfd.readouterr().err, "nothing is judged"
    twin = Path(shutil.copytree(pair[0], pair[0].with_name("twin")))
    assert load([pair[0], twin], device="cpu", judging=True).quality is None


def test_a_worker_reads_a_quality_that_was_calibrated_again(selected: Paths, images: Path, tmp_path: Path) -> None:
    """In a folder and in a zip: the weights are the same, and the worker keeps its model otherwise."""
    folder, zipped = Path(shutil.copytree(selected.models / "short", tmp_path / "short")), tmp_path / "short.zip"
    case = find_cases([images], 1)[0]

    def predict_on_worker(model: Path) -> CaseQuality | None:
        loader, outputs = partial(load, [model], None, "cpu", {}, judging=True), Outputs(quality=True)
        return _predict_on_worker(case, loader, tmp_path / "out", outputs, accept_geometry=False)[2][0].quality

    pack(folder, zipped)
    before = predict_on_worker(zipped)
    assert before == predict_on_worker(folder) is not None
    write_json(folder / "quality.json", read_json(folder / "quality.json") | {"lowest": 2.0})
    zipped.unlink()
    pack(folder, zipped)
    assert predict_on_worker(folder) == predict_on_worker(zipped) != before


def test_a_broken_quality_file_is_refused(selected: Paths, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(selected.models / "short", tmp_path / "models" / "short"))
    write_json(folder / "quality.json", {**read_json(folder / "quality.json"), "threshold": "high"})
    with pytest.raises(UserError, match=r"no calibrated quality.*threshold"):
        load(folder, device="cpu", judging=True)


def test_an_output_with_another_quality_file_is_refused(
    selected: Paths, images: Path, tmp_path: Path, command: Command
) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "quality.json").write_text("[]")
    where = ["-w", selected.root.parent, "--device", "cpu"]
    code, _, err = command("predict", "-i", images, "-o", tmp_path / "out", *where, cwd=tmp_path)
    assert code == 2 and "quality.json" in err and "Move it elsewhere" in err
    assert command("predict", "-i", images, "-o", tmp_path / "out", "--no-quality", *where, cwd=tmp_path)[0] == 0
    assert (tmp_path / "out" / "quality.json").read_text() == "[]"


def test_a_calibration_is_resumed(selected: Paths, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(calibration_rows, "_MINUTES", 0)
    workspace = Path(shutil.copytree(selected.root.parent, tmp_path / "workspace"))
    paths = Paths(workspace / selected.name)
    quality, text = (paths.models / "short" / "quality.json").read_text(), paths.calibration_of("short").read_text()
    head, *rows = text.splitlines()
    rows = [json.dumps(json.loads(row) | {"quality": None}) for row in rows]  # a killed run has judged nothing
    paths.calibration_of("short").write_text("\n".join([head, *rows[:-1], rows[-1][:40]]))
    nnunet_lite.select(workspace=workspace, device="cpu", workers=1)
    assert paths.calibration_of("short").read_text() == text
    assert (paths.models / "short" / "quality.json").read_text() == quality


def test_each_selection_keeps_its_calibration(selected: Paths, tmp_path: Path) -> None:
    """Another selection is calibrated beside it, and the report shows that of the selected model."""
    paths = Paths(Path(shutil.copytree(selected.root, tmp_path / selected.name)))
    shutil.copytree(paths.models / "short", paths.models / "other")
    selection = read_selection(paths)
    assert selection is not None
    held_out, team = find_held_out(paths, stored_dataset(paths.dataset), selection, None, None)
    other = (replace(team[0], folder=paths.models / "other"),)
    rows = predict_rows(held_out, team)
    write_rows(held_out, other, rows[:3])
    assert predict_rows(held_out, other) == rows[:3]
    assert predict_rows(held_out, team) == rows == list(read_material(paths).calibration)


@pytest.mark.parametrize("n", [10, 19, 40, 200, 450])
def test_each_round_has_all_kinds_equally_often(n: int) -> None:
    rounds = list(calibration_rows._plan_rounds([f"{number:03d}" for number in range(n)]))
    pairs = [pair for one in rounds for pair in one]
    assert len(set(pairs)) == len(pairs) and sum(kind == "clean" for _, kind in rounds[0]) >= MIN_CASES
    assert len(pairs) - sum(kind == "clean" for _, kind in pairs) >= min(240, 8 * n)
    for one in rounds:
        numbers = Counter(kind for _, kind in one if kind != "clean")
        assert set(numbers) == set(DEGRADATIONS) and max(numbers.values()) - min(numbers.values()) <= 2


@pytest.mark.slow
def test_a_slow_calibration_ends_after_a_round_and_is_kept(selected: Paths, tmp_path: Path) -> None:
    rows = read_rows(selected.calibration_of("short"))
    numbers = Counter(row.kind for row in rows)
    assert numbers.pop("clean") == 12 and set(numbers.values()) <= {4, 5} and len(numbers) == len(DEGRADATIONS)
    workspace = Path(shutil.copytree(selected.root.parent, tmp_path / "workspace"))
    nnunet_lite.select(workspace=workspace, device="cpu", workers=1)
    assert read_rows(Paths(workspace / selected.name).calibration_of("short")) == rows


def test_ignored_voxels_hide_how_large_a_label_is(copy_nnunet: Copy, tmp_path: Path) -> None:
    labels = {"background": 0, "Anterior": 1, "Posterior": 2, "ignore": 3}
    raw = copy_nnunet(6, labels=labels)
    files = sorted((raw / "labelsTr").iterdir())
    rewrite_nifti(files[5], np.zeros_like)
    rewrite_nifti(files[0], lambda array: np.where(array == 1, 3, array))  # the label may be there
    rewrite_nifti(files[1], lambda array: np.where(array == 1, 0, array))
    rewrite_nifti(files[2], lambda array: np.where(np.arange(len(array))[:, None, None] > 20, 3, array))
    nnunet_lite.plan(raw, workspace=tmp_path / "workspace", workers=0)
    paths = Paths(tmp_path / "workspace" / raw.name)
    held_out = HeldOut(paths, stored_dataset(paths.dataset), (), None, 1)
    ranges = training_ranges(held_out, Plan.read(paths.plans))
    sizes = [np.log((nibabel.load(file).get_fdata() == 2).sum()) for file in (files[1], *files[3:5])]
    assert ranges.presence == {"Anterior": 3 / 5, "Posterior": 5 / 6} and ranges.empty == 1 / 6
    assert ranges.volumes["Posterior"] == pytest.approx((min(sizes), max(sizes)), abs=1e-3)


def test_few_held_out_cases_say_nothing(tiny_workspace: Path, tiny_model: Path, tmp_path: Path, capfd: Any) -> None:
    workspace = tmp_path / "workspace"
    shutil.copytree(tiny_workspace, workspace, ignore=shutil.ignore_patterns("models", "preprocessed"))
    folder = Path(shutil.copytree(tiny_model, workspace / "Task04_Hippocampus" / "models" / "tiny"))
    earlier = fit_quality(made_up_rows(12), RANGES, {"tiny": {"0": "0" * 16}}, ("MRI",))
    write_json(folder / "quality.json", earlier.model_dump(mode="json"))
    next((folder / "fold_0" / "validation").glob("*.nii.gz")).unlink()
    paths = Paths(workspace / "Task04_Hippocampus")
    dataset = stored_dataset(paths.dataset)
    load_team(HeldOut(paths, dataset, (), "cpu", 1), tuple(find_members(paths, dataset, None)[0]), "0")
    nnunet_lite.select(workspace=workspace, device="cpu", workers=1, postprocess=False)
    said = capfd.readouterr().err
    assert f"too few to say how good predictions are ({MIN_CASES} needed)" in said
    assert "predicting fold 0 of tiny: 1 case" in said and "of other weights" not in said  # it is replaced
    assert not (folder / "quality.json").exists()


def test_the_report_compares_expected_and_real_dice(selected: Paths, tmp_path: Path) -> None:
    page = nnunet_lite.report(tmp_path / "page.html", workspace=selected.root.parent).read_text()
    assert "Expected quality" in page and "thick slices" in page
    first = page.split("<caption>Cases to look at first: less like the reference than expected")[1].split("</table>")[0]
    values = [float(value) for value in re.findall(r'data-value="([^"]*)"', first)]
    lacking = [expected - real for expected, real in zip(values[::2], values[1::2], strict=True)]
    assert 0 < len(lacking) < 12 and lacking == sorted(lacking, reverse=True) and min(lacking) > 0
    workspace = Path(shutil.copytree(selected.root.parent, tmp_path / "workspace"))
    quality = workspace / selected.name / "models" / "short" / "quality.json"
    write_json(quality, read_json(quality) | {"weights": {"short": {"0": "before more training"}}})
    assert "Expected quality" not in nnunet_lite.report(tmp_path / "page.html", workspace=workspace).read_text()


def test_labels_may_be_renamed_after_the_training(
    selected: Paths, images: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    workspace = Path(shutil.copytree(selected.root.parent, tmp_path / "workspace"))
    paths = Paths(workspace / selected.name)
    folder = paths.models / "short"
    for file in (paths.dataset, paths.plans):
        file.write_text(file.read_text().replace('"Anterior"', '"Head"'))
    nnunet_lite.select(workspace=workspace, device="cpu", workers=1)
    judged = next(iter(predict(paths, images, tmp_path / "as_trained").quality.values()))
    assert list(judged.expected) == ["Anterior", "Posterior"]
    assert "Expected quality" in nnunet_lite.report(tmp_path / "page.html", workspace=workspace).read_text()
    plans = folder / "plans.json"
    plans.write_text(plans.read_text().replace('"Anterior"', '"Head"'))  # as the training of another fold does
    made = predict(paths, images, tmp_path / "renamed")
    assert not made.failed and not made.quality
    assert "is of other weights, labels or features" in capfd.readouterr().err
    (folder / "quality.json").unlink()
    assert "Expected quality" not in nnunet_lite.report(tmp_path / "page.html", workspace=workspace).read_text()


@pytest.mark.parametrize("content", ["garbage", "[]", "\udcff"])
def test_a_broken_calibration_is_named(selected: Paths, tmp_path: Path, content: str) -> None:
    file = tmp_path / "calibration.jsonl"
    file.write_bytes(content.encode(errors="surrogateescape"))
    with pytest.raises(UserError, match=r"is not as nnlite writes it.*") as error:
        read_rows(file)
    assert error.value.file == file and "Delete it" in str(error.value)


# ------------------------------------------------------------------------------------------------------------- the fit


def made_up_rows(n_cases: int, seed: int = 0) -> list[Row]:
    """Cases whose Dice falls with the error that the networks state, and copies with a sharper image."""
    random = np.random.default_rng(seed)
    rows = []
    for case in range(n_cases):
        for kind, error, step in (("clean", 0.08, -2.0), ("noise", 0.1, -1.0), ("blur", 0.3, -3.0)):
            error = error * random.uniform(0.5, 1.5)
            dice = float(np.clip(1 - 1.2 * error + random.normal(0, 0.01), 0, 1))
            shape = {f"{what}/{axis}": random.normal() for what in ("position", "length") for axis in "zyx"}
            found = {"voxels": 500.0, "volume": random.normal(6, 0.1), "compactness": random.normal(2, 0.1),
                     "parts": 0.0, "scattered": 0.0, "edge": 0.0, "disagreement": 0.0, "error": error,
                     "inner": error / 3, **shape}  # fmt: skip
            image = {"spacing/z": 0.0, "spacing/y": 0.0, "spacing/x": 0.0, "0/step/z": random.normal(step, 0.1)}
            features = CaseFeatures(image, {"liver": found})
            rows.append(Row(case=f"case_{case}", kind=kind, features=features, dice={"liver": dice}))
    return rows


RANGES = TrainingRanges({"liver": (5.5, 6.5)}, {"liver": 1.0}, ((1.0, 1.0, 1.0), (1.0, 1.0, 1.0)))


def test_expected_dice_intervals_and_flags_hold_for_other_cases() -> None:
    rows, others = made_up_rows(80), made_up_rows(100, seed=1)
    quality = fit_quality(rows, RANGES, {"model": {"0": "f"}}, ("CT",))
    judged = [judge(quality, row.features) for row in others]
    real = np.array([row.dice["liver"] for row in others], float)
    expected = [one.expected["liver"] for one in judged]
    assert all(one is not None for one in expected)
    dice, low, high = np.array([(one.dice, one.low, one.high) for one in expected if one]).T
    assert np.abs(dice - real).mean() < 0.03 and spearmanr(dice, real)[0] > 0.9
    clean = np.array([row.kind == "clean" for row in others])
    assert 0.82 < np.mean((low <= real) & (real <= high), where=clean) <= 1
    flagged = np.array([bool(one.flags) for one in judged])
    assert flagged[clean].mean() < 0.1 and flagged[~clean].mean() > 0.95
    blurred = next(one for row, one in zip(others, judged, strict=True) if row.kind == "blur")
    assert any("blurred" in flag for flag in blurred.flags)


def test_few_held_out_cases_do_not_make_usual_ones_unusual() -> None:
    """What is usual in a handful of cases fits these better than others, so the threshold comes from others."""
    alarms = []
    for seed in range(5):
        quality = fit_quality(made_up_rows(12, seed), RANGES, {"model": {"0": "f"}}, ("CT",))
        usual = [row for row in made_up_rows(60, seed + 100) if row.kind == "clean"]
        alarms += [judge(quality, row.features).unusual >= 0.5 for row in usual]
    assert np.mean(alarms) < 0.05


def test_the_report_has_other_words_for_copies_of_pictures(tiny_workspace: Path) -> None:
    rows, kinds = made_up_rows(12), {"noise": "bias field", "blur": "thick slices"}
    quality = fit_quality(rows, RANGES, {"model": {"0": "f"}}, ("RGB",))
    renamed = (row.model_copy(update={"kind": kinds.get(row.kind, row.kind)}) for row in rows)
    material = read_material(Paths(tiny_workspace / "Task04_Hippocampus"))
    material = replace(material, calibration=tuple(row.judged_by(quality) for row in renamed))
    for dimensions, names in ((3, ["bias field", "thick slices"]), (2, ["uneven light", "coarse along an axis"])):
        geometry = Geometry((1, 40, 40), (1.0, 1.0, 1.0), dimensions=dimensions)
        shown = _quality_section(replace(material, pictures={"a": CasePictures("a", geometry)}))
        assert shown["by_kind"].columns[0].values == ["clean", *names]


def test_more_doubt_never_raises_the_expected_dice() -> None:
    rows = made_up_rows(30)
    quality = fit_quality(rows, RANGES, {"model": {"0": "f"}}, ("CT",))
    features = rows[0].features
    dice = []
    for error in np.linspace(0, 0.6, 30):
        found = features.labels["liver"] | {"error": float(error)}
        one = judge(quality, CaseFeatures(features.image, {"liver": found})).expected["liver"]
        dice.append(one.dice if one else 0.0)
    assert np.all(np.diff(dice) <= 0) and dice[0] > dice[-1] + 0.1


def test_flags_say_in_words_what_is_unusual() -> None:
    rows = made_up_rows(30)
    quality = fit_quality(rows, RANGES, {"model": {"0": "f"}}, ("CT",))
    clean = rows[0].features
    for factor, shown in ((3.04, "3"), (1440, "1400")):
        small = clean.labels["liver"] | {"volume": RANGES.volumes["liver"][0] - np.log(factor)}
        words = f"liver is {shown} times smaller than in any training case"
        assert words in judge(quality, CaseFeatures(clean.image, {"liver": small})).flags
    thick = CaseFeatures({**clean.image, "spacing/z": float(np.log(5))}, clean.labels)
    assert "spacing 5 mm along z, trained on 1 mm" in judge(quality, thick).flags
    turned = CaseFeatures(thick.image, clean.labels, axes=("y", "z", "x"))
    assert "spacing 5 mm along y, trained on 1 mm" in judge(quality, turned).flags  # as the image is stored
    coarse = CaseFeatures(clean.image | {f"spacing/{axis}": float(np.log(5)) for axis in "zyx"}, clean.labels)
    assert "spacing 5 mm along z, y, x, trained on 1 mm" in judge(quality, coarse).flags
    nothing = judge(quality, CaseFeatures(clean.image, {"liver": {}}))
    assert "no foreground found" in nothing.flags and nothing.mean == 0
    assert nothing.expected["liver"] == Expected(0, 0, 0), "no other Dice is possible"
    assert not any("less sure" in flag for flag in nothing.flags)
    features = [CaseFeatures(row.features.image, row.features.labels | {"nodule": {}}) for row in rows]
    rows = [row.model_copy(update={"features": f}) for row, f in zip(rows, features, strict=True)]
    ranges = replace(RANGES, presence=RANGES.presence | {"nodule": 1.0})
    never = fit_quality(rows, ranges, {"model": {"0": "f"}}, ("CT",))
    judged = [judge(never, row.features) for row in rows if row.kind == "clean"]
    assert not any("nodule" in flag for one in judged for flag in one.flags)
    assert sum(one.unusual >= 0.5 for one in judged) <= 3 and all(one.expected["nodule"].dice == 0 for one in judged)
    found = never.model_copy(
        update={"labels": never.labels | {"nodule": never.labels["liver"]}, "found": {"nodule": 1.0}}
    )
    assert "no nodule found" in judge(found, features[0]).flags


def test_what_the_networks_often_do_wrong_is_no_flag() -> None:
    """A label that they miss in a fifth of the held-out cases, and one that they always make too large."""
    rows = []
    for number, row in enumerate(made_up_rows(30)):
        found = row.features.labels["liver"]
        missed = number // 3 % 5 == 0
        labels = {"liver": found | {"volume": found["volume"] + 2}, "nodule": {} if missed else found}
        dice = {"liver": row.dice["liver"], "nodule": 0.0 if missed else row.dice["liver"]}
        rows.append(row.model_copy(update={"features": CaseFeatures(row.features.image, labels), "dice": dice}))
    ranges = replace(
        RANGES, presence={"liver": 1.0, "nodule": 1.0}, volumes=dict.fromkeys(("liver", "nodule"), (5.5, 6.5))
    )
    quality = fit_quality(rows, ranges, {"model": {"0": "f"}}, ("CT",))
    flags = [flag for row in rows if row.kind == "clean" for flag in judge(quality, row.features).flags]
    assert not any("found" in flag or "larger" in flag for flag in flags)
    features = rows[3].features
    larger = features.labels | {"liver": features.labels["liver"] | {"volume": 9.5}}
    assert any("liver is" in flag for flag in judge(quality, CaseFeatures(features.image, larger)).flags)


def test_an_image_without_foreground_is_usual_where_many_are() -> None:
    rows = made_up_rows(30)
    rows += [
        Row(
            case=f"healthy_{i}",
            kind="clean",
            features=CaseFeatures(rows[i].features.image, {"liver": {}}),
            dice={"liver": None},
        )
        for i in range(0, 60, 3)
    ]
    ranges = replace(RANGES, presence={"liver": 0.6}, empty=0.4)
    quality = fit_quality(rows, ranges, {"model": {"0": "f"}}, ("CT",))
    healthy, ill = judge(quality, rows[-1].features), judge(quality, rows[0].features)
    assert healthy.expected["liver"] is None and not healthy.flags and healthy.unusual < 0.5
    assert [case for case, _ in worst_first({"healthy": healthy, "ill": ill})] == ["ill", "healthy"]
    lost = judge(quality.model_copy(update={"empty": 0.0}), rows[-1].features)
    assert lost.flags == ("no foreground found",)
    assert [case for case, _ in worst_first({"ill": ill, "lost": lost})] == ["lost", "ill"]


def test_flags_of_a_picture_have_no_slices_and_no_z() -> None:
    """A picture with pixels of 5 µm, of a model trained on 1 µm, whose spacing along z is 999 times as large."""
    rows = made_up_rows(12)
    image = describe_image(np.ones((1, 1, 40, 40)), Geometry((1, 40, 40), (4.995, 0.005, 0.005), dimensions=2))
    usual = dict.fromkeys(image, 0.0) | {"spacing/y": np.log(0.001), "spacing/x": np.log(0.001)}
    rows = [row.model_copy(update={"features": CaseFeatures(usual, row.features.labels)}) for row in rows]
    ranges = replace(RANGES, spacing=((0.999, 0.001, 0.001), (0.999, 0.001, 0.001)))
    quality = fit_quality(rows, ranges, {"model": {"0": "f"}}, ("R", "G")).model_copy(update={"threshold": -1e9})
    odd = usual | {name: image[name] for name in image if name.startswith("spacing")}
    flags = judge(quality, CaseFeatures(odd | {"0/step/y": -3.0}, rows[0].features.labels)).flags
    assert "spacing 0.005 mm along y, x, trained on 0.001 mm" in flags and "blurred along y" in flags
    assert not any("slices" in flag or " z" in flag for flag in flags)
    contrast = judge(quality, CaseFeatures(odd | {"0/intensity/50": 3.0}, rows[0].features.labels)).flags
    assert "intensities are unlike those of the training (R, G): another stain or exposure?" in contrast


def test_an_axis_is_not_called_blurred_and_noisy() -> None:
    """As interpolated thick slices are by their features; the one that deviates more is named."""
    rows = made_up_rows(12)
    axes = {f"0/{what}/{axis}": -2.0 for what in ("step", "noise") for axis in "zyx"}
    rows = [
        row.model_copy(update={"features": CaseFeatures(row.features.image | axes, row.features.labels)})
        for row in rows
    ]
    quality = fit_quality(rows, RANGES, {"model": {"0": "f"}}, ("CT",)).model_copy(update={"threshold": -1e9})
    clean = rows[0].features
    image = clean.image | {"0/step/x": -3.0, "0/step/y": -2.1, "0/noise/y": -1.0, "0/step/z": -3.0, "0/noise/z": -1.9}
    flags = judge(quality, CaseFeatures(image, clean.labels)).flags
    assert "blurred, or of thick slices, along z, x" in flags and "noisier or sharper along y" in flags


def test_a_tree_without_an_end_is_refused() -> None:
    nodes: dict[str, Any] = {
        "threshold": (0.5, 0, 0),
        "left": (1, -1, -1),
        "right": (2, -1, -1),
        "value": (0, 0.1, 0.9),
    }
    assert Tree(feature=(0, -2, -2), **nodes).predict(np.array([0.7])) == 0.9
    for changed in ({"left": (0, -1, -1)}, {"right": (9, -1, -1)}, {"value": (0.1,)}):
        with pytest.raises(ValidationError, match="tree"):
            Tree(feature=(0, -2, -2), **{**nodes, **changed})


def test_a_case_is_never_in_both_parts() -> None:
    rows = made_up_rows(11)
    tested = []
    for train, test in split_by_case(rows):
        assert not {rows[i].case for i in train} & {rows[i].case for i in test}
        tested += list(test)
    assert sorted(tested) == list(range(len(rows)))


def test_networks_that_find_nothing_say_nothing(selected: Paths, tmp_path: Path, capfd: Any) -> None:
    workspace = Path(shutil.copytree(selected.root.parent, tmp_path / "workspace"))
    paths = Paths(workspace / selected.name)
    first, *lines = paths.calibration_of("short").read_text().splitlines()
    rows = [Row.model_validate_json(line) for line in lines]
    empty = [row.model_copy(update={"features": CaseFeatures(row.features.image, {"Anterior": {}})}) for row in rows]
    paths.calibration_of("short").write_text("\n".join([first, *(row.model_dump_json() for row in empty)]) + "\n")
    nnunet_lite.select(workspace=workspace, device="cpu", workers=1)
    assert "labels are found in 0 held-out cases only" in capfd.readouterr().err
    assert not (paths.models / "short" / "quality.json").exists()


def test_too_few_rows_say_nothing_and_why() -> None:
    rows = made_up_rows(12)
    few = [row for row in rows if row.kind == "clean" or row.case in ("case_1", "case_2")]
    ignored = [row.model_copy(update={"dice": {"liver": None}}) for row in rows]
    assert _what_lacks(rows) is None
    assert _what_lacks(few) == "degraded copies of 2 of 12 held-out cases only can be predicted"
    assert _what_lacks(ignored) == "labels are found in 0 held-out cases only"


def test_rows_that_say_little_are_fitted() -> None:
    """All clean cases look the same; one label is found once, another never, a third only where it is ignored."""
    rows, made = made_up_rows(12), []
    for number, row in enumerate(rows):
        labels = {**row.features.labels, "once": row.features.labels["liver"] if number == 0 else {}, "never": {}}
        features = CaseFeatures(row.features.image, {**labels, "ignored": row.features.labels["liver"]})
        dice = {"liver": row.dice["liver"], "once": 0.3 if number == 0 else 0.0, "never": None, "ignored": None}
        made.append(Row(case=row.case, kind=row.kind, features=features, dice=dice))
    same = [row.model_copy(update={"features": made[1].features}) if row.kind == "clean" else row for row in made]
    names = ("liver", "once", "never", "ignored")
    ranges = TrainingRanges({"liver": (5.5, 6.5)}, dict.fromkeys(names, 0.5), RANGES.spacing)
    for some in (made, same):
        quality = fit_quality(some, ranges, {"model": {"0": "f"}}, ("CT",))
        judged = judge(Quality.model_validate_json(quality.model_dump_json()), made[1].features)
        assert judged.expected["liver"] is not None and judged.expected["never"] is None
