"""A model folder goes on only with the plan and the settings that it was begun with."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from nnunet_lite.data.dataset import Dataset, dataset_from_json
from nnunet_lite.errors import UserError
from nnunet_lite.files import read_json
from nnunet_lite.models.checkpoint import save_weights
from nnunet_lite.models.folder import (
    MODEL,
    exclusive,
    fold_seed,
    length,
    open_run,
    other_folds,
    require_begun,
    set_aside,
    told_lengths,
)
from nnunet_lite.planning.schema import Plan
from nnunet_lite.settings import Settings, with_changes
from nnunet_lite.training.configured import configured
from nnunet_lite.workspace import planned_paths


@pytest.fixture(scope="module")
def plan(tiny_workspace: Path) -> Plan:
    return Plan.read(planned_paths(tiny_workspace).plans)


@pytest.fixture(scope="module")
def dataset(tiny_workspace: Path) -> Dataset:
    return dataset_from_json(read_json(planned_paths(tiny_workspace).dataset))


def test_settings_change_the_planned_network(plan: Plan) -> None:
    changes = {
        "network.features_base": 6,
        "network.features_max": 20,
        "network.norm": "batch",
        "training.batch_size": 3,
    }
    made = configured(plan, "3d_fullres", with_changes(Settings(), changes)).configuration("3d_fullres")
    assert made.network.features == (6, 12, 20, 20)[: len(made.network.features)]
    assert (made.network.norm, made.network.activation, made.batch_size) == ("batch", "leaky_relu", 3)
    planned = plan.configuration("3d_fullres")
    assert made.patch_size == planned.patch_size
    assert made.memory_gb is not None
    assert planned.memory_gb is not None
    assert made.memory_gb < planned.memory_gb


def test_without_changes_the_plan_is_trained_as_it_is(plan: Plan) -> None:
    made = configured(plan, "3d_fullres", Settings())
    assert made.configurations == {"3d_fullres": plan.configuration("3d_fullres")}
    assert made.model_copy(update={"configurations": plan.configurations, "options": plan.options}) == plan


def test_the_same_call_goes_on_with_the_same_seed(tmp_path: Path, plan: Plan, dataset: Dataset) -> None:
    made = configured(plan, "3d_fullres", Settings())
    seed = open_run(tmp_path, made, dataset, "3d_fullres", Settings())
    assert open_run(tmp_path, made, dataset, "3d_fullres", Settings()) == seed
    assert open_run(tmp_path / "other", made, dataset, "3d_fullres", Settings()) != seed
    run = read_json(tmp_path / "run.json")
    assert Settings.model_validate(run["settings"]) == Settings()
    assert {"torch", "nnunet_lite"} <= set(run["versions"])
    assert Plan.read(tmp_path / "plans.json") == made


def test_a_model_folder_tells_no_paths_and_no_case_ids(tmp_path: Path, plan: Plan, dataset: Dataset) -> None:
    open_run(tmp_path, configured(plan, "3d_fullres", Settings()), dataset, "3d_fullres", Settings())
    text = "".join(path.read_text() for path in tmp_path.iterdir())
    assert str(dataset.root) not in text
    assert not any(case.id in text for case in dataset.cases)


def test_other_settings_are_refused_with_the_list(tmp_path: Path, plan: Plan, dataset: Dataset) -> None:
    made = configured(plan, "3d_fullres", Settings())
    open_run(tmp_path, made, dataset, "3d_fullres", Settings())
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    changed = with_changes(Settings(), {"training.epochs": 3, "optimizer.lr": 0.5})
    with pytest.raises(UserError, match=r"training\.epochs: 1000 -> 3; optimizer\.lr: 0\.01 -> 0\.5.*--restart"):
        open_run(tmp_path, made, dataset, "3d_fullres", changed)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_incidental_settings_may_change(tmp_path: Path, plan: Plan, dataset: Dataset) -> None:
    made = configured(plan, "3d_fullres", Settings())
    open_run(tmp_path, made, dataset, "3d_fullres", Settings())
    changes: dict[str, Any] = {"training.workers": 2, "training.cache": "ram", "inference.step_size": 0.7}
    open_run(tmp_path, made, dataset, "3d_fullres", with_changes(Settings(), changes))


def test_another_plan_is_refused(tmp_path: Path, plan: Plan, dataset: Dataset) -> None:
    made = configured(plan, "3d_fullres", Settings())
    open_run(tmp_path, made, dataset, "3d_fullres", Settings())
    planned = made.configuration("3d_fullres").model_copy(update={"batch_dice": True})
    channel = made.channels[0].model_copy(update={"normalization": "none"})
    for change in ({"configurations": {"3d_fullres": planned}}, {"channels": (channel,)}):
        with pytest.raises(UserError, match="other settings: the plan"):
            open_run(tmp_path, made.model_copy(update=change), dataset, "3d_fullres", Settings())


def test_setting_aside_deletes_nothing(tmp_path: Path) -> None:
    folder = tmp_path / "fold_0"
    assert set_aside(folder) is None
    for content in ("first", "second"):
        folder.mkdir()
        (folder / "file").write_text(content)
        moved = set_aside(folder)
        assert moved is not None
        assert (moved / "file").read_text() == content
        assert not folder.exists()
    assert len(list(tmp_path.iterdir())) == 2
    assert other_folds(tmp_path, "1") == []  # what was set aside is no fold any more


def test_each_fold_has_a_seed_of_its_own() -> None:
    seeds = [fold_seed(7, fold) for fold in ("0", "1", "2", "3", "4", "all")]
    assert len(set(seeds)) == 6
    assert fold_seed(7, "0") == seeds[0] != fold_seed(8, "0")


def test_a_folder_is_one_process_at_a_time(tmp_path: Path) -> None:
    with exclusive(tmp_path), pytest.raises(UserError, match="another process is training here"), exclusive(tmp_path):
        raise AssertionError("the lock was given twice")
    with exclusive(tmp_path):
        assert (tmp_path / ".lock").is_file()


def test_a_second_stage_keeps_the_plan_of_its_first(plan: Plan) -> None:
    planned = plan.configuration("3d_fullres")
    stages = {"3d_lowres": planned, "3d_cascade_fullres": planned.model_copy(update={"previous_stage": "3d_lowres"})}
    both = plan.model_copy(update={"configurations": {**plan.configurations, **stages}})
    made = configured(both, "3d_cascade_fullres", with_changes(Settings(), {"training.batch_size": 3}))
    assert list(made.configurations) == ["3d_cascade_fullres", "3d_lowres"]
    assert made.configuration("3d_cascade_fullres").batch_size == 3
    assert made.n_inputs("3d_cascade_fullres") == made.n_inputs("3d_lowres") + 2


def begun(folder: Path, plan: Plan, dataset: Dataset, **changes: Any) -> Settings:
    settings = with_changes(Settings(), changes)
    open_run(
        folder,
        configured(plan, "3d_fullres", settings),
        dataset,
        "3d_fullres",
        settings,
        lengthen=told_lengths(changes),
    )
    return settings


def test_a_run_may_be_made_longer_but_not_shorter(tmp_path: Path, plan: Plan, dataset: Dataset) -> None:
    begun(tmp_path, plan, dataset, **{"training.epochs": 10})
    begun(tmp_path, plan, dataset, **{"training.epochs": 20})
    run = read_json(tmp_path / "run.json")
    assert run["settings"]["training"]["epochs"] == 20
    assert run["changed"][0]["changes"] == ["training.epochs: 10 -> 20"]
    with pytest.raises(UserError, match=r"training.epochs: 20 -> 10"):
        begun(tmp_path, plan, dataset, **{"training.epochs": 10})
    with pytest.raises(UserError, match="time_limit"):
        begun(tmp_path, plan, dataset, **{"training.epochs": 20, "training.time_limit": 60})
    with pytest.raises(UserError, match=r"optimizer\.lr"):  # what else changes needs --force as before
        begun(tmp_path, plan, dataset, **{"training.epochs": 30, "optimizer.lr": 0.1})
    assert read_json(tmp_path / "run.json") == run


def test_force_takes_other_settings_over_but_not_another_network(tmp_path: Path, plan: Plan, dataset: Dataset) -> None:
    begun(tmp_path, plan, dataset)
    seed = read_json(tmp_path / "run.json")["seed"]
    other = with_changes(Settings(), {"optimizer.name": "adam", "training.batch_size": 3})
    made = configured(plan, "3d_fullres", other)
    assert open_run(tmp_path, made, dataset, "3d_fullres", other, force=True) == seed
    assert Settings.model_validate(read_json(tmp_path / "run.json")["settings"]) == other
    assert Plan.read(tmp_path / "plans.json") == made
    wider = with_changes(other, {"network.features_base": 8})
    with pytest.raises(UserError, match="another network"):
        open_run(tmp_path, configured(plan, "3d_fullres", wider), dataset, "3d_fullres", wider, force=True)
    assert Plan.read(tmp_path / "plans.json") == made


def test_another_seed_is_another_one(tmp_path: Path, plan: Plan, dataset: Dataset) -> None:
    begun(tmp_path, plan, dataset)
    other = with_changes(Settings(), {"training.seed": 77})
    made = configured(plan, "3d_fullres", other)
    assert open_run(tmp_path, made, dataset, "3d_fullres", other, force=True) == 77
    assert open_run(tmp_path, made, dataset, "3d_fullres", other) == 77


def test_there_must_be_something_to_resume(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"nothing to resume.*Leave out --resume"):
        require_begun(tmp_path / "fold_0", restart=False)
    (tmp_path / "fold_0").mkdir()
    (tmp_path / "fold_0" / "checkpoint.safetensors").touch()
    require_begun(tmp_path / "fold_0", restart=False)
    with pytest.raises(UserError, match="exclude each other"):
        require_begun(tmp_path / "fold_0", restart=True)


def test_a_run_is_made_longer_only_where_its_length_is_told(tmp_path: Path, plan: Plan, dataset: Dataset) -> None:
    short = with_changes(Settings(), {"training.time_limit": 60})
    made = configured(plan, "3d_fullres", short)
    open_run(tmp_path, made, dataset, "3d_fullres", short)
    with pytest.raises(UserError, match=r"training\.time_limit: 60\.0 -> None"):  # the flag was forgotten
        open_run(tmp_path, made, dataset, "3d_fullres", Settings())
    longer = {"training.epochs": 2000}
    assert told_lengths({**longer, "optimizer.lr": 1}) == {"training.epochs"}
    with pytest.raises(UserError, match=r"training\.time_limit: 60\.0 -> None"):
        open_run(tmp_path, made, dataset, "3d_fullres", with_changes(Settings(), longer), lengthen=told_lengths(longer))
    both = {**longer, "training.time_limit": 90}
    open_run(tmp_path, made, dataset, "3d_fullres", with_changes(Settings(), both), lengthen=told_lengths(both))


def test_a_finished_fold_keeps_the_settings_it_was_trained_with(tmp_path: Path, plan: Plan, dataset: Dataset) -> None:
    begun(tmp_path, plan, dataset)
    run = read_json(tmp_path / "run.json")
    before = Settings.model_validate(run["settings"])
    save_weights(tmp_path / "fold_0" / MODEL, torch.nn.Linear(2, 2), {"length": length(before)})
    other = with_changes(before, {"training.batch_size": 3, "augmentation.mirror_axes": [0]})
    made = configured(plan, "3d_fullres", other)
    shorter, longer = (with_changes(other, {"training.epochs": before.training.epochs + n}) for n in (-1, 1))
    for settings in (other, shorter, longer):  # the last one lacks a checkpoint to go on from
        with pytest.raises(UserError, match=r"has finished folds \(fold_0\).*batch_size: None -> 3.*Make them longer"):
            open_run(tmp_path, made, dataset, "3d_fullres", settings, force=True)
    assert read_json(tmp_path / "run.json") == run
    (tmp_path / "fold_0" / "checkpoint.safetensors").touch()
    open_run(tmp_path, made, dataset, "3d_fullres", longer, force=True)  # it goes on, with the new ones
    assert Settings.model_validate(read_json(tmp_path / "run.json")["settings"]) == longer
