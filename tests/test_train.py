"""An earlier run is refused, resumed or set aside whole."""

from __future__ import annotations

import gc
import shutil
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from samples import TINIEST, Copy, rewrite_nifti

import nnunet_lite
from nnunet_lite.commands import train as commands
from nnunet_lite.commands.train import _warn_of_edits, fold_names
from nnunet_lite.commands.training_run import check_earlier_runs, plan_for_settings, plan_runs
from nnunet_lite.data.dataset import stored_dataset
from nnunet_lite.errors import Busy, Stopped, UserError
from nnunet_lite.evaluation.scores import Scores
from nnunet_lite.files import read_json, write_json
from nnunet_lite.models.folder import CHECKPOINT, lock_fold, read_weights_header
from nnunet_lite.networks.unet import UNet
from nnunet_lite.planning.schema import Plan
from nnunet_lite.settings import load_settings, with_changes
from nnunet_lite.training.limits import stop_threads
from nnunet_lite.workspace import planned_paths

SETTINGS = TINIEST | {"training.patch_size": [16, 16, 16], "training.epochs": 1, "training.iterations": 1}


def train(workspace: Path, fold: int | str = 0, **options: Any) -> None:
    changes = SETTINGS | options.pop("settings", {})
    nnunet_lite.train("3d_fullres", fold, settings=changes, device="cpu", workspace=workspace, **options)


def files(folder: Path) -> dict[str, bytes]:
    found = (path for path in folder.rglob("*") if path.is_file() and path.name != ".lock")
    return {str(path.relative_to(folder)): path.read_bytes() for path in found}


@pytest.fixture(scope="module")
def two_folds(tiny_workspace: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A workspace with two trained folds. Not to be written to."""
    workspace = tmp_path_factory.mktemp("folds") / "workspace"
    shutil.copytree(tiny_workspace, workspace, ignore=shutil.ignore_patterns("models"))  # other tests train there
    train(workspace, 0)
    train(workspace, 1)
    return workspace


@pytest.fixture
def workspace(two_folds: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(two_folds, tmp_path / "workspace"))


@pytest.fixture
def models(workspace: Path) -> Path:
    return workspace / "Task04_Hippocampus" / "models"


def test_nothing_is_set_aside_under_a_running_training(workspace: Path, models: Path) -> None:
    before = files(models)
    with lock_fold(models / "3d_fullres-default" / "fold_1"):
        with pytest.raises(Busy, match=r"fold_1: another process is training here"):
            train(workspace, "all-folds", restart=True)
        with pytest.raises(Busy, match=r"fold_1: another process is training here"):
            train(workspace, 1, restart=True)
    assert files(models) == before


def test_one_fold_of_several_does_not_restart_with_other_settings(workspace: Path, models: Path) -> None:
    before = files(models)
    with pytest.raises(UserError, match=r"optimizer\.lr: 0\.01 -> 0\.5.*`all-folds --restart` to begin again"):
        train(workspace, 0, restart=True, settings={"optimizer.lr": 0.5})
    assert files(models) == before
    train(workspace, 0, restart=True)
    assert (models / "3d_fullres-default" / "old_fold_0_1" / "model.safetensors").is_file()


def test_a_fold_that_is_alone_restarts_with_its_model_folder(workspace: Path, models: Path) -> None:
    other = {"training.seed": None, "optimizer.lr": 0.5}
    shutil.rmtree(models / "3d_fullres-default" / "fold_1")
    before = (models / "3d_fullres-default" / "fold_0" / "model.safetensors").read_bytes()
    train(workspace, 0, restart=True, settings=other)
    assert (models / "old_3d_fullres-default_1" / "fold_0" / "model.safetensors").read_bytes() == before
    assert (models / "3d_fullres-default" / "fold_0" / "model.safetensors").read_bytes() != before


def test_a_restarted_training_that_was_stopped_is_resumed_without_restart(workspace: Path, models: Path) -> None:
    """Typed again, --restart would move aside what was trained since."""
    stop: dict[str, Any] = {"callbacks": [lambda _: stop_threads()], "settings": {"training.epochs": 100}}
    with pytest.raises(Stopped, match="; the same command without --restart resumes from there"):
        train(workspace, 0, restart=True, **stop)
    with pytest.raises(Stopped, match="; the same command resumes from there"):
        train(workspace, 0, **stop)
    assert (models / "3d_fullres-default" / "old_fold_0_1" / "model.safetensors").is_file()


def test_several_folds_are_trained_and_restarted(workspace: Path, models: Path) -> None:
    folder = models / "3d_fullres-default"
    result = nnunet_lite.train("3d_fullres", [1, 2], settings=SETTINGS, device="cpu", workspace=workspace)
    assert list(result.scores) == ["1", "2"] and (folder / "fold_2" / "model.safetensors").is_file()
    train(workspace, "1,2", restart=True)
    assert [path.name for path in sorted(folder.glob("old_*"))] == ["old_fold_1_1", "old_fold_2_1"]
    train(workspace, "0,1,2", restart=True)
    assert (models / "old_3d_fullres-default_1" / "old_fold_1_1").is_dir(), "no other fold stays"


def test_a_run_that_trained_nothing_does_not_bind_the_next_one(workspace: Path, models: Path) -> None:
    with pytest.raises(
        UserError, match=r"^training: --freeze encoder would keep random weights; give a model with --init\.$"
    ):
        train(workspace, name="new", settings={"training.freeze": "encoder"})
    with pytest.raises(UserError, match=r"otherwise lower --lr\.$"):
        train(workspace, name="new", settings={"optimizer.lr": 1e30, "training.iterations": 50})
    train(workspace, name="new")
    assert (models / "new" / "fold_0" / "model.safetensors").is_file()


def test_an_extension_that_cannot_be_changes_nothing(workspace: Path, models: Path) -> None:
    (models / "3d_fullres-default" / "fold_0" / "checkpoint.safetensors").unlink()
    before = files(models)
    longer = {"training.epochs": 3}
    with pytest.raises(UserError, match="its checkpoint is gone"):
        train(workspace, settings=longer)
    with pytest.raises(UserError, match=r"was trained with other settings: training\.iterations: 1 -> 2"):
        train(workspace, settings={"training.iterations": 2})
    assert files(models) == before


def test_a_fold_that_restarts_binds_nothing(workspace: Path, models: Path) -> None:
    (models / "3d_fullres-default" / "fold_1" / "model.safetensors").unlink()
    train(workspace, restart=True, force=True, settings={"optimizer.lr": 0.5})
    run = read_json(models / "3d_fullres-default" / "run.json")
    assert run["settings"]["optimizer"]["lr"] == 0.5


def test_ignored_settings_of_inference_are_reported(workspace: Path, capfd: pytest.CaptureFixture[str]) -> None:
    train(workspace, settings={"inference.step_size": 0.5})
    assert "without inference.step_size: 1.0 -> 0.5; give them to `nnlite predict`" in capfd.readouterr().err


def test_nothing_of_the_training_is_in_memory_when_the_validation_begins(
    workspace: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a GPU, the validation plans with the memory that is free."""
    earlier = [found for found in gc.get_objects() if issubclass(type(found), UNet)]  # of other tests
    networks: list[int] = []
    validate = commands.validate_fold

    def count(*arguments: Any, **options: Any) -> Scores:
        networks.append(sum(issubclass(type(found), UNet) for found in gc.get_objects()) - len(earlier))
        return validate(*arguments, **options)

    monkeypatch.setattr(commands, "validate_fold", count)
    gc.collect()
    gc.disable()
    try:
        train(workspace, name="new")
    finally:
        gc.enable()
    assert networks == [0]


def test_all_folds_are_looked_at_before_the_first_is_trained(workspace: Path) -> None:
    splits = workspace / "Task04_Hippocampus" / "splits.json"
    folds = read_json(splits)
    folds[3]["val"].append("nobody")
    write_json(splits, folds)
    with pytest.raises(UserError, match="fold 3 names unknown cases: nobody"):
        fold_names(planned_paths(workspace))


def test_what_the_settings_change_of_the_plan_is_reported(workspace: Path, capfd: pytest.CaptureFixture[str]) -> None:
    train(workspace, 0, name="changed", settings={"training.batch_size": 3, "network.norm": "batch"})
    changes = (
        "3d_fullres, the settings: patch 16x16x16 instead of 40x56x40, batch 3 instead of 2, "
        "features [2, 4, 4] instead of [32, 64, 128, 256], norm batch instead of instance\n"
    )
    assert changes in capfd.readouterr().err


@pytest.mark.parametrize(("size", "warns"), [(8, True), (16, False)])
def test_patches_that_cannot_grow_warn(tiny_workspace: Path, capfd: Any, size: int, warns: bool) -> None:
    changes = {"training.patch_size": [size] * 3, "training.patch_growth": 0.5}
    settings = with_changes(load_settings("default"), changes)
    (run,) = plan_runs(planned_paths(tiny_workspace), settings, ["3d_fullres"], ["all"])
    commands._announce(run)
    assert ("warning: training.patch_growth has no effect" in capfd.readouterr().err) == warns


def test_an_early_stop_without_a_held_out_case_warns(tiny_workspace: Path, capfd: Any) -> None:
    settings = with_changes(load_settings("default"), {"training.early_stop": 3})
    (run,) = plan_runs(planned_paths(tiny_workspace), settings, ["3d_fullres"], ["0"])
    for validation, warns in ((run.split.validation, False), ((), True)):
        commands._announce(replace(run, split=replace(run.split, validation=validation)))
        assert ("training.early_stop has no effect: fold 0 holds out no case" in capfd.readouterr().err) == warns
    (run,) = plan_runs(planned_paths(tiny_workspace), settings, ["3d_fullres"], ["all"])
    commands._announce(run)
    said = "training.early_stop uses the Dice of training cases: fold all holds out no case"
    assert said in capfd.readouterr().err


def test_a_users_network_that_cannot_grow_with_its_patches_is_refused(tiny_workspace: Path, tmp_path: Path) -> None:
    (tmp_path / "rigid.py").write_text(
        "from torch import nn, zeros\n\n\nclass Rigid(nn.Conv3d):\n    def forward(self, x):\n"
        "        return super().forward(x + zeros(16, 16, 16))\n\n\n"
        "def make(planned, inputs, outputs):\n    return Rigid(inputs, outputs, 1)\n"
    )
    changes = {"training.patch_size": [16] * 3, "network.factory": f"{tmp_path / 'rigid.py'}:make"}
    settings = with_changes(load_settings("default"), changes)
    plan_runs(planned_paths(tiny_workspace), settings, ["3d_fullres"], ["all"])
    with pytest.raises(UserError, match=r"fails on a batch of shape \(1, 1, .*8.*\)"):
        growing = with_changes(settings, {"training.patch_growth": 0.5})
        plan_runs(planned_paths(tiny_workspace), growing, ["3d_fullres"], ["all"])


def test_a_spacing_of_the_recipe_plans_again_and_keeps_the_other_options_of_the_plan(workspace: Path) -> None:
    paths = planned_paths(workspace)
    content = read_json(paths.plans)
    content["memory_gb"] = 6
    write_json(paths.plans, content)
    (run,) = plan_runs(paths, load_settings("cpu_body"), ["3d_fullres"], ["0"])
    assert run.folder.name == "3d_fullres-cpu_body" and run.plan.memory_gb == 6
    assert run.plan.configuration("3d_fullres").spacing == (2.5, 2.5, 2.5)
    content["options"]["spacing"] = [2, 2, 2]
    write_json(paths.plans, content)
    for recipe, spacing in (("resenc_m", 2), ("cpu_body", 2.5)):
        assert plan_for_settings(paths, load_settings(recipe)).configuration("3d_fullres").spacing == (spacing,) * 3


def test_a_recipe_that_plans_again_keeps_what_still_fits_and_names_the_edits_that_it_drops(
    tiny_workspace: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    paths = planned_paths(
        Path(shutil.copytree(tiny_workspace, tmp_path / "w", ignore=shutil.ignore_patterns("models")))
    )
    options = {"workspace": paths.root.parent, "workers": 0}
    nnunet_lite.plan(stored_dataset(paths.dataset).root, batch_size=4, patch_size="24x32x24", **options)
    content = read_json(paths.plans)
    content["configurations"]["2d"]["batch_size"] = 7
    content["configurations"]["mine"] = {"inherits_from": "3d_fullres", "batch_size": 3}
    content["channels"][0]["clip_percentiles"] = [1, 99]
    write_json(paths.plans, content)
    capfd.readouterr()
    runs = plan_runs(paths, load_settings("resenc_m"), ["3d_fullres", "2d", "mine"], ["0", "1"])
    full, flat, mine = (run.plan.configuration(run.configuration) for run in runs[::2])
    assert {c.network.kind for c in (full, flat, mine)} == {"residual"}
    assert [c.batch_size for c in (full, mine)] == [4, 3] and full.patch_size == mine.patch_size == (24, 32, 24)
    assert runs[0].plan.channels[0].clip_percentiles == (1, 99)
    err = capfd.readouterr().err
    assert flat.batch_size != 7 and err.count("without these edits") == 1 and "2d (batch_size 15 -> 7)" in err
    assert "clip" not in err and "mine" not in err

    nnunet_lite.plan(stored_dataset(paths.dataset).root, spacing=2, **options)
    content = read_json(paths.plans)
    content["configurations"]["2d"]["batch_size"] = 7
    write_json(paths.plans, content)
    same = load_settings("default", {"plan.spacing": [2, 2, 2]})
    assert plan_for_settings(paths, same) == Plan.read(paths.plans), "one length is three equal ones"


def test_a_model_that_starts_from_itself_is_not_moved_aside(workspace: Path, models: Path) -> None:
    before = files(models)
    for changes in ({"training.init": "3d_fullres-default"}, {"training.teachers": ["3d_fullres-default"]}):
        with pytest.raises(UserError, match="Give the new one another --name"):
            train(workspace, "0,1", restart=True, settings=changes)
    with pytest.raises(UserError, match="there is no model gone"):
        train(workspace, "0,1", restart=True, settings={"training.teachers": ["gone"]})
    assert files(models) == before


def test_a_run_resumes_where_only_the_explanations_of_the_plan_changed(workspace: Path, models: Path) -> None:
    plans = models / "3d_fullres-default" / "plans.json"
    assert "options" not in read_json(plans), "they may name files of this machine"
    paths, weights = planned_paths(workspace), models / "3d_fullres-default" / "fold_0" / "model.safetensors"
    before = (plans.read_bytes(), weights.read_bytes())
    planned = read_json(paths.plans)
    planned["configurations"]["3d_fullres"] |= {"reasons": ["in other words"], "memory_gb": 99.0}
    planned.pop("options")
    write_json(paths.plans, planned)
    train(workspace, 0)
    assert (plans.read_bytes(), weights.read_bytes()) == before
    planned["configurations"]["3d_fullres"]["batch_dice"] = True
    write_json(paths.plans, planned)
    difference = r"the plan \(configurations\.3d_fullres\.batch_dice: False -> True\)\. Repeat"
    with pytest.raises(UserError, match=f"trained with other settings: {difference}"):
        train(workspace, 0)


def test_a_model_gets_further_folds_after_a_label_map_was_corrected(
    workspace: Path, models: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """It changes statistics of the foreground, which only CT is normalised with; a plan of CT is another one then."""
    planned = workspace / "Task04_Hippocampus" / "plans.json"
    before = Plan.read(planned)
    raw = shutil.copytree(stored_dataset(planned.with_name("dataset.json")).root, tmp_path / "Task04_Hippocampus")
    nnunet_lite.plan(raw, workspace=workspace, workers=0)  # the same files in another place
    file = min((raw / "labelsTr").iterdir())
    rewrite_nifti(file, lambda array: np.where(np.arange(len(array))[:, None, None] < 15, 0, array))
    capfd.readouterr()
    nnunet_lite.plan(raw, workspace=workspace, workers=0)
    err, after = capfd.readouterr().err, Plan.read(planned)
    assert f"have seen the former files of case {file.name.removesuffix('.nii.gz')}: 3d_fullres-default" in err
    assert before.channels != after.channels and before.trains_as(after) and "former plan" not in err
    train(workspace, 2)
    assert (models / "3d_fullres-default" / "fold_2" / "model.safetensors").is_file()
    said = {}
    for fold in (0, 1, 2):  # finished; the last one was trained on the corrected file
        capfd.readouterr()
        train(workspace, fold)
        said[fold] = " was trained on former files of case" in (err := capfd.readouterr().err)
        assert not said[fold] or (f"`nnlite train 3d_fullres {fold} " in err and "--restart` trains it" in err)
    case, folds = file.name.removesuffix(".nii.gz"), read_json(planned.with_name("splits.json"))
    assert said == {0: case in folds[0]["train"], 1: case in folds[1]["train"], 2: False} and any(said.values())
    fold = next(fold for fold in (0, 1) if said[fold])
    capfd.readouterr()
    longer = {"training.epochs": 2}
    train(workspace, fold, settings=longer)
    resolved = load_settings("default", SETTINGS | longer)
    check_earlier_runs(plan_runs(planned_paths(workspace), resolved, ["3d_fullres"], str(fold)))  # as `run` does
    assert capfd.readouterr().err.count(f"fold_{fold} was trained on former files") == 2, "its first epoch was"
    train(workspace, fold, settings=longer, restart=True)
    train(workspace, fold, settings=longer)
    assert "former files" not in capfd.readouterr().err
    as_ct = [
        plan.model_copy(update={"channels": (plan.channels[0].model_copy(update={"normalization": "ct"}),)})
        for plan in (before, after)
    ]
    assert not as_ct[0].trains_as(as_ct[1])


def test_labels_are_renamed_under_models(
    workspace: Path, models: Path, hippocampus: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """Names are not the plan's arithmetic: folds, selection and prediction with the models that exist go on."""
    paths, nnlite = planned_paths(workspace), {"workspace": workspace, "device": "cpu"}
    assert nnunet_lite.select(**nnlite).models == ("3d_fullres-default",)
    selected = read_json(paths.inference)
    gain = {"before": 0.5, "after": 0.6, "n": 2}
    write_json(
        paths.inference, selected | {"postprocessing": {"Anterior": {}}, "postprocessing_gain": {"Anterior": gain}}
    )
    for file in (paths.plans, paths.dataset, paths.inference):
        file.write_text(file.read_text().replace("Anterior", "front"))
    image = hippocampus / "imagesTr" / "hippocampus_001.nii.gz"
    first = nnunet_lite.predict(image, tmp_path / "a", **nnlite)
    assert first.labels.region_names == ("Anterior", "Posterior") and list(first.postprocessing) == ["Anterior"]
    record = read_json(tmp_path / "a" / "predictions.json")["runs"]
    assert [run["labels"] for run in record] == [{"background": 0, "Anterior": 1, "Posterior": 2}]
    nnunet_lite.predict(image, tmp_path / "a", **nnlite)
    assert "1 label map will be replaced; --continue keeps them\n" in capfd.readouterr().err
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "a.txt").touch()
    with pytest.raises(UserError, match=r"holds no image .* This model was trained on \.nii\.gz\. Supported"):
        nnunet_lite.predict(tmp_path / "notes", tmp_path / "b", **nnlite)
    train(workspace, 2)
    plan = Plan.read(models / "3d_fullres-default" / "plans.json")
    assert plan.labels.region_names == ("front", "Posterior")
    assert nnunet_lite.select(**nnlite).folds == ("0", "1", "2")


def test_raw_data_that_were_edited_are_reported(
    copy_dataset: Copy, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """Labels, channels and cases count only after `plan`; other voxels of a planned case are trained on."""
    raw, workspace = copy_dataset(6), tmp_path / "workspace"
    nnunet_lite.plan(raw, workspace=workspace, exclude=["hippocampus_001"], workers=0)
    train_all = partial(train, workspace, "all", settings={"training.workers": 0})
    train_all(restart=True)
    assert "warning:" not in capfd.readouterr().err
    table = read_json(raw / "dataset.json")
    table["labels"] = {"0": "background", "1": "Posterior", "2": "Anterior"}
    (raw / table["training"].pop()["label"]).unlink()
    write_json(raw / "dataset.json", table)
    label = raw / table["training"][1]["label"]
    rewrite_nifti(label, lambda array: array[::-1])
    with pytest.raises(UserError, match="does not exist any more"):
        train_all(restart=True)
    err = capfd.readouterr().err
    assert "its labels and cases are not those of the plan, which are trained; `nnlite plan` takes them up" in err
    assert f"the raw files of case {label.name.removesuffix('.nii.gz')} have changed, and are preprocessed again" in err


def test_raw_data_that_cannot_be_read_stop_no_training(workspace: Path) -> None:
    planned = stored_dataset(planned_paths(workspace).dataset)
    _warn_of_edits(replace(planned, root=Path("/" + 300 * "x")))  # OSError, as a network drive that is gone


def test_the_start_of_the_process_counts_as_time_but_leaves_some_to_train(
    workspace: Path, models: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    paths = planned_paths(workspace)
    changes = {**SETTINGS, "training.epochs": 1000, "training.time_limit": 0.1, "training.limit_validation": False}
    (run,) = plan_runs(paths, load_settings("default", changes), ["3d_fullres"], ["2"], name="timed", device="cpu")
    commands.train_and_validate(run, start=1e6)
    state = read_weights_header(models / "timed" / "fold_2" / CHECKPOINT)
    assert state["seconds"] == pytest.approx(6, rel=0.5) and 0 < state["epoch"] < 1000
    assert " cases for 6.0 s in " in capfd.readouterr().err


def test_a_fold_that_ends_before_its_first_step_leaves_no_folder(workspace: Path, models: Path) -> None:
    def interrupt(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    for fold, name in ((2, "3d_fullres-default"), (0, "new")):
        with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(commands, "preprocess_dataset", interrupt)
            train(workspace, fold, name=name)
        assert not (models / name / f"fold_{fold}").exists()
    assert sorted(path.name for path in models.iterdir()) == ["3d_fullres-default"]
    assert sorted(path.name for path in (models / "3d_fullres-default").glob("fold_*")) == ["fold_0", "fold_1"]
