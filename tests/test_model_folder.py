"""A model folder is resumed only with the plan and the settings that it began with, or with more epochs or time."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from nnunet_lite.data.dataset import Dataset, stored_dataset
from nnunet_lite.errors import UserError
from nnunet_lite.files import read_json
from nnunet_lite.models.checkpoint import save_weights
from nnunet_lite.models.folder import (
    CHECKPOINT,
    MODEL,
    check_resume,
    fold_seed,
    lock_fold,
    open_run,
    other_folds,
    remove_unbegun,
    run_length,
    set_aside,
    training_command,
    why_not_held_out,
)
from nnunet_lite.planning.schema import Plan
from nnunet_lite.settings import Settings, differences, load_settings, with_changes
from nnunet_lite.training.job import configure_plan
from nnunet_lite.workspace import planned_paths

NAME = "3d_fullres"
Begin = Callable[..., int]


@pytest.fixture(scope="module")
def plan(tiny_plan: Plan) -> Plan:
    return configure_plan(tiny_plan, NAME, Settings())


@pytest.fixture(scope="module")
def dataset(tiny_workspace: Path) -> Dataset:
    return stored_dataset(planned_paths(tiny_workspace).dataset)


@pytest.fixture
def begin(tmp_path: Path, plan: Plan, dataset: Dataset) -> Begin:
    """Opens `tmp_path` as a model folder whose fold_0 has a checkpoint: begin({"optimizer.lr": 0.1}, force=True)."""

    def call(changes: dict[str, Any] | None = None, plan: Plan = plan, **options: Any) -> int:
        settings = with_changes(Settings(), changes or {})
        seed = open_run(tmp_path, configure_plan(plan, NAME, settings), dataset, NAME, settings, fold="0", **options)
        (tmp_path / "fold_0").mkdir(exist_ok=True)
        (tmp_path / "fold_0" / CHECKPOINT).touch()
        return seed

    return call


def settings_of(folder: Path) -> Settings:
    return Settings.model_validate(read_json(folder / "run.json")["settings"])


def test_the_same_call_resumes_with_the_same_seed(tmp_path: Path, plan: Plan, dataset: Dataset, begin: Begin) -> None:
    seed = begin()
    assert begin() == seed
    other = tmp_path / "other"
    others = {open_run(other, plan, dataset, NAME, Settings(), fold=fold) for fold in ("0", "1", "2")}
    assert len(others) == 1 and seed not in others  # folds that begin together draw one seed
    assert settings_of(tmp_path) == Settings()
    assert {"torch", "nnunet_lite"} <= set(read_json(tmp_path / "run.json")["versions"])
    assert Plan.read(tmp_path / "plans.json") == plan
    text = "".join(path.read_text() for path in tmp_path.iterdir() if path.is_file())
    assert not any(private in text for private in (str(dataset.root), *(case.id for case in dataset.cases)))


@pytest.mark.parametrize(
    ("before", "after", "differences"),
    [
        ({}, {"training.epochs": 3, "optimizer.lr": 0.5}, r"training\.epochs: 1000 -> 3; optimizer\.lr: 0\.01 -> 0\.5"),
        ({"training.epochs": 20}, {"training.epochs": 10}, r"training\.epochs: 20 -> 10"),
        ({}, {"training.time_limit": 60}, r"training\.time_limit: None -> 1h"),
        ({"training.time_limit": 60}, {}, r"training\.time_limit: 1h -> None"),  # the option was forgotten
        ({"training.time_limit": 60}, {"training.epochs": 2000}, r"time_limit: 1h -> None"),
        ({"training.epochs": 20}, {"training.epochs": 30, "optimizer.lr": 0.1}, r"epochs: 20 -> 30; optimizer\.lr"),
    ],
)
def test_other_settings_are_refused_with_the_list(
    tmp_path: Path, begin: Begin, before: dict[str, Any], after: dict[str, Any], differences: str
) -> None:
    begin(before)
    files = {path.name: path.read_bytes() for path in tmp_path.iterdir() if path.is_file()}
    with pytest.raises(UserError, match=rf"was trained with other settings: .*{differences}.*--restart"):
        begin(after)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir() if path.is_file()} == files


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ({"training.epochs": 10}, {"training.epochs": 20}),
        ({"training.time_limit": 60}, {"training.time_limit": 90}),
        ({"training.time_limit": 60}, {"training.epochs": 2000, "training.time_limit": 90}),
        ({}, {"training.workers": 2, "training.cache": "ram", "inference.step_size": 0.7}),  # these do not matter
    ],
)
def test_a_run_may_be_made_longer(tmp_path: Path, begin: Begin, before: dict[str, Any], after: dict[str, Any]) -> None:
    seed = begin(before)
    assert begin(after) == seed
    longer = after if before else {}
    assert settings_of(tmp_path) == with_changes(Settings(), longer)
    changed = read_json(tmp_path / "run.json").get("changed", [])
    assert [len(entry["changes"]) for entry in changed] == ([len(after)] if before else [])


def test_a_fold_that_has_not_begun_may_have_any_length(
    tmp_path: Path, plan: Plan, dataset: Dataset, begin: Begin
) -> None:
    seed = begin({"training.time_limit": 60})
    for fold, length in (("1", {"training.time_limit": 30}), ("2", {"training.epochs": 7})):
        settings = with_changes(Settings(), length)
        assert open_run(tmp_path, plan, dataset, NAME, settings, fold=fold) == seed
        assert settings_of(tmp_path) == settings


def test_another_plan_is_refused(plan: Plan, begin: Begin) -> None:
    begin()
    planned = plan.configuration(NAME).model_copy(update={"batch_dice": True})
    channel = plan.channels[0].model_copy(update={"normalization": "none"})
    for change in ({"configurations": {NAME: planned}}, {"channels": (channel,)}):
        with pytest.raises(UserError, match="other settings: the plan"):
            begin(plan=plan.model_copy(update=change))


def test_force_accepts_other_settings_but_not_another_network(tmp_path: Path, plan: Plan, begin: Begin) -> None:
    seed = begin()
    other = {"optimizer.name": "adam", "training.batch_size": 3}
    assert begin(other, force=True) == seed
    assert settings_of(tmp_path) == with_changes(Settings(), other)
    assert Plan.read(tmp_path / "plans.json").configuration(NAME).batch_size == 3
    before = (tmp_path / "run.json").read_bytes()
    for network in ({"network.features_base": 8}, {"network.factory": "mine.py:make"}):
        with pytest.raises(UserError, match="another network"):
            begin(other | network, force=True)
    assert (tmp_path / "run.json").read_bytes() == before
    assert begin(other | {"training.seed": 77}, force=True) == begin(other | {"training.seed": 77}) == 77


def test_a_finished_fold_keeps_the_settings_of_its_training(
    tmp_path: Path, plan: Plan, dataset: Dataset, begin: Begin
) -> None:
    begin()
    for fold in ("fold_0", "fold_1"):
        save_weights(tmp_path / fold / MODEL, torch.nn.Linear(2, 2), {"length": run_length(Settings())})
    other = {"training.batch_size": 3, "augmentation.mirror_axes": [0]}
    for more in ({}, {"training.epochs": 999}, {"training.epochs": 1001}):  # fold_1 would not be trained further
        with pytest.raises(UserError, match=r"has finished folds \(.*fold_1\).*batch_size: None -> 3.*Add --epochs"):
            begin(other | more, force=True)
    (tmp_path / "fold_1" / MODEL).unlink()
    (tmp_path / "fold_0" / CHECKPOINT).unlink()
    longer = other | {"training.epochs": 1001}
    with pytest.raises(UserError, match=r"has finished folds \(fold_0\)"):  # without a checkpoint to resume from
        begin(longer, force=True)
    settings = with_changes(Settings(), other)
    check_resume(tmp_path, configure_plan(plan, NAME, settings), NAME, settings, "0", force=True, restart=True)
    (tmp_path / "fold_0" / CHECKPOINT).touch()
    begin(longer, force=True)
    assert settings_of(tmp_path) == with_changes(Settings(), longer)


def test_a_folder_in_which_nothing_was_trained_accepts_anything(tmp_path: Path, plan: Plan, dataset: Dataset) -> None:
    open_run(tmp_path, plan, dataset, NAME, Settings(), fold="0")
    other = with_changes(Settings(), {"optimizer.lr": 0.5})
    with lock_fold(tmp_path / "fold_0"):  # another process trains the first fold, and has no checkpoint yet
        with pytest.raises(UserError, match="was trained with other settings"):
            open_run(tmp_path, plan, dataset, NAME, other, fold="1")
        open_run(tmp_path, plan, dataset, NAME, other, fold="0")  # the lock is its own
    assert settings_of(tmp_path) == other
    open_run(tmp_path, plan, dataset, NAME, Settings(), fold="1")
    assert settings_of(tmp_path) == Settings()


def test_setting_aside_deletes_nothing(tmp_path: Path) -> None:
    folder = tmp_path / "fold_0"
    assert set_aside(folder) is None
    for content in ("first", "second"):
        folder.mkdir()
        (folder / "file").write_text(content)
        moved = set_aside(folder)
        assert moved is not None and (moved / "file").read_text() == content
        assert not folder.exists()
    assert len(list(tmp_path.iterdir())) == 2
    assert other_folds(tmp_path, "1") == []  # what was set aside is no fold


def test_each_fold_has_a_seed_of_its_own() -> None:
    seeds = [fold_seed(7, fold) for fold in ("0", "1", "2", "3", "4", "all")]
    assert len(set(seeds)) == 6
    assert fold_seed(7, "0") == seeds[0] != fold_seed(8, "0")


def test_one_process_at_a_time_trains_in_a_folder(tmp_path: Path) -> None:
    with (
        lock_fold(tmp_path),
        pytest.raises(UserError, match=rf"another process is training here \({os.getpid()} on "),
        lock_fold(tmp_path),
    ):
        raise AssertionError("the lock was given twice")
    with lock_fold(tmp_path):
        assert (tmp_path / ".lock").is_file()


@pytest.mark.parametrize(
    ("length", "options"),
    [
        ({"epochs": 20, "time_limit": 4.0}, "--epochs 20 --time-limit 4m"),
        ({"epochs": 20, "time_limit": None}, "--epochs 20"),
        ({"time_limit": None}, "--time-limit none"),
        ({"time_limit": 60.0}, "--time-limit 1h"),
    ],
)
def test_the_command_that_repeats_a_run_has_its_length(
    tiny_model: Path, tmp_path: Path, length: dict[str, Any], options: str
) -> None:
    """`--epochs` alone would drop the time limit of the recipe."""
    changes = {f"training.{name}": value for name, value in length.items()}
    settings = with_changes(load_settings("cpu"), changes)
    (tmp_path / "3d_fullres-cpu").mkdir()
    run = read_json(tiny_model / "run.json") | {"settings": settings.model_dump(mode="json")}
    (tmp_path / "3d_fullres-cpu" / "run.json").write_text(json.dumps(run))
    command = training_command(tmp_path / "3d_fullres-cpu", "0")
    assert command == f"nnlite train 3d_fullres 0 --recipe cpu {options}"
    kept = dict(pair.split() for pair in re.findall(r"--(?:epochs|time-limit) \S+", command))
    typed = {"training.epochs": kept.get("--epochs"), "training.time_limit": kept.get("--time-limit")}
    again = load_settings("cpu", {key: value for key, value in typed.items() if value is not None})
    assert differences(again, settings) == []


def test_only_what_a_beginning_wrote_is_removed(tmp_path: Path) -> None:
    """A model folder may hold files of the user, and folds of others."""

    def begin(fold: str) -> Path:
        folder = tmp_path / "mine" / fold
        folder.mkdir(parents=True)
        for file in (folder / "cases.json", folder / "metrics.jsonl", folder.parent / "run.json"):
            file.write_text("{}")
        return folder

    remove_unbegun(begin("fold_0"))
    assert not (tmp_path / "mine").exists()
    for kept in ("README.txt", "fold_0/checkpoint_final.pth", "fold_1/model.safetensors"):
        first = begin("fold_0")
        (tmp_path / "mine" / kept).parent.mkdir(exist_ok=True)
        (tmp_path / "mine" / kept).write_text("mine")
        remove_unbegun(first)
        assert (tmp_path / "mine" / kept).read_text() == "mine"
        assert (tmp_path / "mine" / "run.json").is_file()
        assert first.exists() == (kept == "fold_0/checkpoint_final.pth")
        shutil.rmtree(tmp_path / "mine")


def test_the_record_of_what_was_seen(tmp_path: Path) -> None:
    """It comes with a zip of others, too."""
    file = tmp_path / "fold_0" / "cases.json"
    file.parent.mkdir()
    for content in ({}, {"seen": ["a"], "held_out_images": ["b"]}, ["a"]):
        file.write_text(json.dumps(content))
        assert why_not_held_out(file.parent) == ""
    file.write_text(json.dumps({"seen": ["a", "b"], "held_out_images": ["b", "c"]}))
    assert why_not_held_out(file.parent) == "fold 0 holds out 1 case that its initial weights or teachers have seen"
    file.write_text(json.dumps({"seen": 5}))
    with pytest.raises(UserError, match="is not as nnlite writes it"):
        why_not_held_out(file.parent)
