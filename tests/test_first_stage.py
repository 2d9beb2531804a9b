"""A cascade trained and predicted: the first stage is made where it is missing, and the second one uses it."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from random_models import Function, predict_preprocessed
from safetensors.torch import load_file, save_file
from samples import Command, Counts, Forked, wait_until
from scipy.ndimage import zoom

import nnunet_lite
from nnunet_lite.commands.train import _missing_first_stage
from nnunet_lite.commands.training_run import plan_runs
from nnunet_lite.data.geometry import Geometry, Turn
from nnunet_lite.data.images import read_image, read_label
from nnunet_lite.data.labels import Labels
from nnunet_lite.errors import UserError
from nnunet_lite.files import read_json, write_json
from nnunet_lite.inference.cases import as_classes
from nnunet_lite.inference.first_stage import predict_on_grid, stage_map_file
from nnunet_lite.inference.predictor import Predictor, load
from nnunet_lite.models.folder import read_weights_header
from nnunet_lite.planning.schema import Plan
from nnunet_lite.preprocessing.pipeline import Placement, Preprocessed, preprocess_image, restore_segmentation
from nnunet_lite.preprocessing.store import open_case
from nnunet_lite.preprocessing.stored_case import open_array
from nnunet_lite.settings import Settings, load_settings, with_changes
from nnunet_lite.training.job import Job, configure_plan
from nnunet_lite.training.loop import train_fold
from nnunet_lite.workspace import Paths

SECOND, FIRST = "3d_cascade_fullres", "3d_lowres"


@pytest.fixture(scope="module")
def changes(tiny_settings: dict[str, Any]) -> dict[str, Any]:
    fast = {"training.epochs": 1, "training.iterations": 2, "training.patch_size": [16, 24, 16]}
    return {**tiny_settings, **fast, "inference.mirroring": False, "inference.step_size": 1.0}


@pytest.fixture(scope="module")
def workspace(tiny_workspace: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny workspace with a cascade in its plan, by hand: the images are too small for one by the rule."""
    workspace = tmp_path_factory.mktemp("cascade") / "workspace"
    shutil.copytree(tiny_workspace, workspace, ignore=shutil.ignore_patterns("models", "splits*.json"))
    plans = Paths(workspace / "Task04_Hippocampus").plans
    plan = read_json(plans)
    half = [n / 2 for n in plan["configurations"]["3d_fullres"]["median_shape"]]
    plan["configurations"] |= {
        FIRST: {"inherits_from": "3d_fullres", "spacing": [2.0, 2.0, 2.0], "median_shape": half},
        SECOND: {"inherits_from": "3d_fullres", "previous_stage": FIRST},
    }
    write_json(plans, plan)
    return workspace


@pytest.fixture(scope="module")
def paths(workspace: Path) -> Paths:
    return Paths(workspace / "Task04_Hippocampus")


@pytest.fixture(scope="module")
def train_second(workspace: Path, changes: dict[str, Any]) -> Callable[..., Any]:
    """Trains a fold of the cascade: train_second("all", {"optimizer.lr": 0.5})."""

    def train(fold: int | str, more: dict[str, Any] | None = None) -> Any:
        options: dict[str, Any] = {"workspace": workspace, "device": "cpu", "folds": None if fold == "all" else 3}
        return nnunet_lite.train(SECOND, fold, settings=changes | (more or {}), name="tiny", **options).scores

    return train


@pytest.fixture(scope="module")
def trained(paths: Paths, train_second: Callable[..., Any]) -> Path:
    """Folds 0 to 2 of 3d_lowres and fold 0 of the cascade, made by one call."""
    train_second(0)
    return paths.models


def maps(models: Path) -> dict[str, Path]:
    return {file.stem: file for file in sorted(models.glob(f"{FIRST}-tiny/fold_*/next_stage/{SECOND}/*.b2nd"))}


def times(models: Path) -> dict[str, int]:
    return {str(file): file.stat().st_mtime_ns for file in [*models.rglob("*.b2nd"), *models.rglob("*.safetensors")]}


@contextmanager
def other_weights(trained: Path, write: Callable[[Path], Any]) -> Iterator[Path]:
    """Change the weights of fold 2 of the first stage, and undo that and fold 1 of the second stage at the end."""
    weights = trained / f"{FIRST}-tiny" / "fold_2" / "model.safetensors"
    old = weights.read_bytes()
    write(weights)
    try:
        yield weights
    finally:
        weights.write_bytes(old)
        shutil.rmtree(trained / "tiny" / "fold_1", ignore_errors=True)


def test_the_first_stage_is_trained_before_the_second(trained: Path, paths: Paths) -> None:
    assert {folder.name for folder in trained.iterdir()} == {f"{FIRST}-tiny", "tiny"}
    assert read_json(trained / "tiny" / "run.json")["previous"] == f"{FIRST}-tiny"
    assert set(Plan.read(trained / "tiny" / "plans.json").configurations) == {FIRST, SECOND}
    splits, found = read_json(paths.splits), maps(trained)
    assert len(found) == 10
    for case_id, file in found.items():
        fold = int(file.parents[2].name.removeprefix("fold_"))
        assert case_id in splits[fold]["val"] and case_id not in splits[fold]["train"]


def test_predictions_for_the_second_stage_are_those_of_the_fold(trained: Path, paths: Paths) -> None:
    plan = Plan.read(trained / "tiny" / "plans.json")
    *_, (case_id, file) = maps(trained).items()  # of the last fold
    first, second = (open_case(paths.preprocessed, plan, name, case_id) for name in (FIRST, SECOND))
    model = load(trained / f"{FIRST}-tiny", [file.parents[2].name.removeprefix("fold_")], "cpu")
    logits = predict_preprocessed(model, first.image[:])
    assert first.image.shape[1:] == tuple(round(n / 2) for n in second.label.shape)
    factors = [n / m for n, m in zip(second.label.shape, first.label.shape, strict=True)]
    fine = np.stack([zoom(x.double().numpy(), factors, order=1, mode="nearest", grid_mode=True) for x in logits])
    stored = open_array(file)
    assert stored.shape == second.label.shape and stored.dtype == np.uint8
    assert (stored[:] != fine.argmax(0)).mean() < 1e-3
    assert len(np.unique(stored[:])) > 1, "or this would say nothing"


def test_the_code_of_a_first_stage_is_not_run(trained: Path, workspace: Path, tmp_path: Path) -> None:
    """Neither where both stages are copies elsewhere, nor where the first one is a link that leads there."""
    mark, out = tmp_path / "was_run", tmp_path / "elsewhere"
    (tmp_path / "own_net.py").write_text(f"import pathlib; pathlib.Path({str(mark)!r}).touch()\n")
    shutil.copytree(trained, out)
    run = read_json(out / f"{FIRST}-tiny" / "run.json")
    run["settings"]["network"]["factory"] = f"{tmp_path / 'own_net.py'}:make"
    write_json(out / f"{FIRST}-tiny" / "run.json", run)
    linked = tmp_path / "workspace" / "Task04_Hippocampus" / "models"
    shutil.copytree(trained / "tiny", linked / "tiny")
    (linked / f"{FIRST}-tiny").symlink_to(out / f"{FIRST}-tiny")
    for folder, place in ((out, workspace), (linked, tmp_path / "workspace")):
        with pytest.raises(UserError, match=rf"{folder}/{FIRST}-tiny: names code to run"):
            nnunet_lite.load(folder / "tiny", device="cpu", workspace=place)
    assert not mark.exists()


def test_a_first_stage_whose_logits_are_not_finite_names_the_case(
    trained: Path, train_second: Callable[..., Any], paths: Paths, counts: Counts
) -> None:
    counts("bad inputs refused in one line")

    def spoil(weights: Path) -> None:
        tensors, about = load_file(weights), read_weights_header(weights)
        tensors["heads.1.weight"].fill_(3e38)
        save_file(tensors, weights, {"state": json.dumps(about)})

    with other_weights(trained, spoil):
        before = times(trained)
        with pytest.raises(UserError, match=r"NaN or infinite") as error:
            train_second(1)
        assert str(error.value).startswith(f"{read_json(paths.splits)[2]['val'][0]}: ") and "\n" not in str(error.value)
        assert before.items() <= times(trained).items()


def test_nothing_is_made_twice(trained: Path, train_second: Callable[..., Any]) -> None:
    before = times(trained)
    assert len(train_second(0)["0"].rows) == 4
    with pytest.raises(UserError, match=r"tiny: was trained with other settings: optimizer\.lr"):
        train_second(2, {"optimizer.lr": 0.5})  # before anything of the first stage is trained
    assert times(trained) == before


def test_a_first_stage_that_changed_predicts_again(
    trained: Path, train_second: Callable[..., Any], capfd: pytest.CaptureFixture[str]
) -> None:
    """Another fold of the second stage finds what it needs, but for what was predicted by other weights."""
    before, other = times(trained), trained / f"{FIRST}-tiny" / "fold_1" / "model.safetensors"
    with other_weights(trained, lambda weights: weights.write_bytes(other.read_bytes())) as weights:
        train_second(1)
        changed = {file for file, time in times(trained).items() if before.get(file, time) != time}
        assert changed == {str(weights), *(str(f) for f in maps(trained).values() if f.parents[2].name == "fold_2")}
        capfd.readouterr()
        load(trained / "tiny", device="cpu")
        said = "fold 0 of tiny learned from other weights of 3d_lowres-tiny, its first stage (fold 2)"
        assert said in (warned := capfd.readouterr().err) and "fold 1 of tiny" not in warned
    load(trained / "tiny", device="cpu")
    assert not capfd.readouterr().err


def test_a_first_stage_that_was_edited_after_its_training_is_refused(
    trained: Path, paths: Paths, changes: dict[str, Any], workspace: Path, tmp_path: Path
) -> None:
    """The new second stage would say that it refines a spacing which its first stage does not have."""
    shutil.copytree(workspace, tmp_path / "ws")
    copy = Paths(tmp_path / "ws" / paths.root.name)
    (copy.models / f"{FIRST}-tiny").rename(copy.models / f"{FIRST}-default")
    plan = read_json(copy.plans)
    plan["configurations"][FIRST]["spacing"] = [3.0, 2.0, 2.0]
    write_json(copy.plans, plan)
    said = re.escape("before its plan was changed (spacing: [2.0, 2.0, 2.0] -> [3.0, 2.0, 2.0])")
    with pytest.raises(UserError, match=said) as refused:
        nnunet_lite.train(SECOND, 1, settings=changes, name="new", workspace=tmp_path / "ws", device="cpu")
    assert refused.value.file == copy.models / f"{FIRST}-default" and not (copy.models / "new").exists()


def test_prediction_is_one_stage_after_the_other(trained: Path, hippocampus: Path) -> None:
    scan = sorted((hippocampus / "imagesTs").iterdir())[0]
    image = read_image(scan)
    found = load(trained / "tiny", device="cpu")(scan)
    first = load(trained / f"{FIRST}-tiny", device="cpu")
    second = load(trained / "tiny", device="cpu", first_stage=False)
    assert first.folds == ("0", "1", "2") and second.first_stage is None
    before = first(image)
    prepared = preprocess_image(image, before.astype(np.uint8), second.plan, second.configuration)
    assert prepared.classes is not None and prepared.classes.any()
    logits = predict_preprocessed(second, prepared.image, prepared.classes)
    expected = restore_segmentation(logits, prepared.placement, second.plan.labels, second.configuration.resampling)
    np.testing.assert_array_equal(found, expected)
    blind = predict_preprocessed(second, prepared.image, np.zeros_like(prepared.classes))
    assert not torch.equal(blind, logits), "the second stage sees the first"


def test_the_commands_know_both_stages_wherever_they_are(
    trained: Path, hippocampus: Path, command: Command, tmp_path: Path
) -> None:
    scan = sorted((hippocampus / "imagesTs").iterdir())[0]
    ignore = shutil.ignore_patterns("next_stage", "validation")
    moved = Path(shutil.copytree(trained, tmp_path / "moved", ignore=ignore))
    code, out, err = command("predict", "-i", scan, "-o", "out", "-m", moved / "tiny", "--device", "cpu", cwd=tmp_path)
    assert (code, out) == (0, "1 label map in out\n")
    assert f"with {moved / f'{FIRST}-tiny'} (fold 0, 1, 2), then {moved / 'tiny'} (fold 0) on cpu" in err
    found = read_image(tmp_path / "out" / scan.name).array[0]
    np.testing.assert_array_equal(found, load(trained / "tiny", device="cpu")(scan))
    code, out, _ = command("info", trained / "tiny", cwd=tmp_path)
    assert code == 0 and f"{SECOND} of Task04_Hippocampus" in out


def test_validation_uses_what_the_held_out_fold_predicts(trained: Path, paths: Paths) -> None:
    model = load(trained / "tiny", [0], "cpu", first_stage=False)
    case_id = read_json(paths.splits)[0]["val"][0]
    image = read_image(Path(read_json(paths.dataset)["root"]) / "imagesTr" / f"{case_id}.nii.gz")
    prepared = preprocess_image(image, None, model.plan, model.configuration)
    logits = predict_preprocessed(model, prepared.image, open_array(maps(trained)[case_id])[:])
    expected = restore_segmentation(logits, prepared.placement, model.plan.labels, model.configuration.resampling)
    written = read_image(trained / "tiny" / "fold_0" / "validation" / f"{case_id}.nii.gz").array[0]
    np.testing.assert_array_equal(written, expected)


def test_both_stages_and_the_pair_are_compared(trained: Path, workspace: Path, tmp_path: Path) -> None:
    """What is missing of a cascade is predicted from what the first stage's same fold says, as training does it."""
    paths = Paths(Path(shutil.copytree(workspace, tmp_path / "workspace")) / "Task04_Hippocampus")
    out = paths.models / "tiny" / "fold_0" / "validation"
    before = {path.name: read_label(path)[0] for path in out.glob("*.nii.gz")}
    shutil.rmtree(out)
    found = nnunet_lite.select(workspace=tmp_path / "workspace", device="cpu", workers=1)
    assert {one.models for one in found.candidates} == {("tiny",), (f"{FIRST}-tiny",), (f"{FIRST}-tiny", "tiny")}
    assert {one.n_cases for one in found.candidates} == {len(before)}
    for name, array in before.items():
        assert (read_label(out / name)[0] == array).mean() > 0.999
    pair = paths.ensembles / f"{FIRST}-tiny+tiny" / "fold_0" / "validation"
    assert {path.name for path in pair.glob("*.nii.gz")} == set(before)


def test_only_the_second_stage_starts_from_a_model(
    trained: Path, paths: Paths, changes: dict[str, Any], capfd: pytest.CaptureFixture[str]
) -> None:
    """A model fits one of the two networks; whoever gives it reads that the other starts random."""
    settings = with_changes(
        Settings(), {**changes, "training.init": str(trained / "tiny"), "network.features_base": None}
    )
    *first, second = plan_runs(paths, settings, [SECOND], ["0"], name="fresh", device="cpu")
    assert {run.settings.training.init for run in first} == {None} and second.settings.training.init
    capfd.readouterr()
    assert _missing_first_stage([*first, second], [second], restart=False) == first
    assert "to be trained first: 0, 1, 2, from random weights: --init is for the second stage" in capfd.readouterr().err


@pytest.mark.slow  # one kill of a training is in test_loop.py
def test_a_killed_cascade_resumes(trained: Path, workspace: Path, changes: dict[str, Any], command: Command) -> None:
    """kill -9 while the first stage is trained: the same command finishes the rest, and nothing that was there."""
    options = [f"--set={key}={value}" for key, value in changes.items()]
    given = ("train", SECOND, 0, "--name", "killed", "--folds", 3, "--device", "cpu", "-w", workspace, *options)
    first, usual = trained / f"{FIRST}-killed", trained / f"{FIRST}-default"
    assert not usual.exists(), "or it would be used"
    process = Forked(*given)
    wait_until((first / "fold_1" / "model.safetensors").is_file, process)
    process.kill()
    _, errors = process.communicate()
    assert f"what {FIRST} predicts: fold 0, 1, 2 of {first}; to be trained first: 0, 1, 2" in errors
    before = times(first)
    assert before and not (trained / "killed").exists()
    leftover = stage_map_file(first / "fold_0", SECOND, ".tmp-left")
    leftover.parent.mkdir(parents=True)
    leftover.touch()
    code, out, err = command(*given, cwd=workspace)
    assert code == 0 and "foreground mean" in out
    assert "to be trained first: " in err and "to be trained first: 0" not in err
    after = times(first)
    assert {file: after[file] for file in before if file.endswith("model.safetensors")}.items() <= before.items()
    assert not leftover.exists() and len(list(first.glob(f"fold_*/next_stage/{SECOND}/*.b2nd"))) == 10
    shutil.rmtree(trained / "killed")
    shutil.rmtree(first)


def test_the_fold_of_all_cases(trained: Path, train_second: Callable[..., Any]) -> None:
    train_second("all")
    found = trained / f"{FIRST}-tiny" / "fold_all"
    assert len(list(found.glob(f"next_stage/{SECOND}/*.b2nd"))) == 10
    assert load(trained / "tiny", ["all"], "cpu").first_stage is not None
    shutil.rmtree(found)
    shutil.rmtree(trained / "tiny" / "fold_all")


def test_a_first_stage_that_is_missing_is_named(trained: Path, tmp_path: Path) -> None:
    shutil.copytree(trained / "tiny", tmp_path / "models" / "tiny")

    def refused(message: str) -> None:
        with pytest.raises(UserError, match=message):
            load(tmp_path / "models" / "tiny")

    refused(rf"models/{FIRST}-tiny: contains no trained model\. It is the first stage of tiny")
    shutil.copytree(trained / "tiny", tmp_path / "models" / f"{FIRST}-tiny")
    refused(rf"{FIRST}-tiny: is no model of {FIRST} for the labels of tiny")
    run = tmp_path / "models" / "tiny" / "run.json"
    write_json(run, {key: value for key, value in read_json(run).items() if key != "previous"})
    refused(rf"run\.json: does not name its first stage, a model of {FIRST}")


@pytest.mark.slow
def test_the_second_stage_learns_to_use_the_first(
    paths: Paths, tiny_cases: list[Any], changes: dict[str, Any], tmp_path: Path
) -> None:
    """Given a perfect first stage, a network is near its answer after steps in which it learns little without one."""
    more = {"training.iterations": 60, "training.validation_iterations": 4, "optimizer.name": "adam"}
    more |= {"network.features_base": 8, "network.features_max": 16, "optimizer.lr": 0.01}
    settings = load_settings("default", {**changes, **more})
    plan = configure_plan(Plan.read(paths.plans), SECOND, settings)

    def dice(perfect: bool) -> list[float]:
        folder = tmp_path / str(perfect)
        folder.mkdir()
        cases = [replace(case, previous=case.label[:] * perfect) for case in tiny_cases]
        train_fold(Job(plan, SECOND, settings, 1, folder, torch.device("cpu"), cases[2:], cases[:2]))
        return list(json.loads((folder / "metrics.jsonl").read_text())["dice"].values())

    with_first, without = dice(True), dice(False)
    assert min(with_first) > 0.75 and max(without) < 0.5


# nnU-Net's order of steps, in float64 by scipy: logits to the grid of the second stage, then the decision
@pytest.mark.parametrize("regions", [False, True])
def test_logits_are_decided_on_the_grid_of_the_second_stage(model: Predictor, regions: bool) -> None:
    named = Labels(names={"background": 0, "whole": (1, 2), "core": 2}, region_order=(1, 2))
    labels = named if regions else model.plan.labels
    coarse, fine = (15, 20, 13), (29, 41, 26)
    logits = np.random.default_rng(0).normal(size=(labels.n_channels, *coarse)).astype(np.float32)
    geometry, box = Geometry((60, 60, 60), (1.0, 1.0, 1.0)), ((3, 32), (0, 41), (10, 36))
    first = Placement(geometry, Turn((2, 0, 1)), box, (1.0, 1.0, 1.0), (2.0, 2.0, 2.0), coarse)
    second = Placement(geometry, Turn((2, 0, 1)), box, (1.0, 1.0, 1.0), (1.0, 1.0, 1.0), fine)
    stages = {"3d_lowres": model.configuration.model_copy(update={"patch_size": coarse})}
    plan = model.plan.model_copy(update={"labels": labels, "configurations": stages})
    network = Function(lambda x: torch.from_numpy(logits)[None])
    stage = replace(model, plan=plan, configuration_name="3d_lowres", networks=(network,))
    found = predict_on_grid(stage, Preprocessed(np.ones((1, *coarse), np.float32), None, first), second)
    factors = [n / m for n, m in zip(fine, coarse, strict=True)]
    fine_logits = np.stack([zoom(x.astype(float), factors, order=1, mode="nearest", grid_mode=True) for x in logits])
    expected = fine_logits.argmax(0)
    if regions:
        expected = np.where(fine_logits[1] > 0, 2, np.where(fine_logits[0] > 0, 1, 0))
    assert (found != expected).mean() < 1e-3 and found.shape == fine


def test_values_that_only_the_region_order_writes_are_background() -> None:
    labels = Labels(names={"background": 0, "whole": (1, 4), "core": 4}, region_order=(7, 4))
    np.testing.assert_array_equal(as_classes(np.array([0, 7, 4]), labels), [0, 0, 2])
