"""`nnlite run`: which steps are done, which remain, and a run that is killed; the steps have tests of their own."""

from __future__ import annotations

import json
import shutil
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file
from samples import TINIEST, Command, Forked, as_options, first_cases, wait_until

import nnunet_lite
from nnunet_lite.commands.run import RunResult, _begun
from nnunet_lite.commands.steps import Journal, Step, StepResult, overview, run_steps, time_left
from nnunet_lite.errors import UserError
from nnunet_lite.workspace import Paths

TINY = {**TINIEST, "training.epochs": 3, "training.iterations": 2, "training.patch_voxels": 16384}
STEPS = ["check and plan", "preprocess", "train 2d fold 0", "train 2d fold 1", "train 3d_fullres fold 0",
         "train 3d_fullres fold 1", "select", "report"]  # fmt: skip


# ---------------------------------------------------------------------------------------- steps that only write a file


def a_step(folder: Path, name: str, kind: str = "", **more: Any) -> Step:
    file = folder / name
    return Step(name, kind or name, file.is_file, partial(file.write_text, name), **more)


def test_steps_that_are_done_are_kept(tmp_path: Path) -> None:
    steps = [a_step(tmp_path, name) for name in ("one", "two", "three")]
    (tmp_path / "two").write_text("mine")
    journal = Journal(tmp_path / "new" / "steps.jsonl")
    states = {result.step: result.state for result in run_steps(steps, journal)}
    assert states == {"one": "done", "two": "kept", "three": "done"}
    assert (tmp_path / "two").read_text() == "mine"
    assert run_steps(steps, journal) == [StepResult(name, "kept") for name in ("one", "two", "three")]


def test_a_step_that_fails_ends_the_run_and_the_next_run_begins_there(tmp_path: Path) -> None:
    def fail() -> None:
        raise UserError("the disk is full")

    first, last = a_step(tmp_path, "first"), a_step(tmp_path, "last")
    journal = Journal(tmp_path / "steps.jsonl")
    with pytest.raises(UserError, match="the disk is full"):
        run_steps([first, Step("bad", "bad", lambda: False, fail), last], journal)
    assert (tmp_path / "first").is_file()
    assert not (tmp_path / "last").is_file()
    assert [e.state for e in run_steps([first, last], journal)] == ["kept", "done"]


def test_the_time_left_is_unknown_until_a_step_was_timed(tmp_path: Path) -> None:
    steps = [
        a_step(tmp_path, "fold 0", "train"),
        a_step(tmp_path, "fold 1", "train", progress=lambda: 0.75),
        a_step(tmp_path, "fold 2", "train", seconds=lambda: 1000.0),
        a_step(tmp_path, "select"),
    ]
    journal = Journal(tmp_path / "steps.jsonl")
    left = journal.seconds_left(steps)
    assert list(left.values()) == [None, None, 1000.0, None]
    assert time_left(left) == "about 16:40 min without fold 0, fold 1, select"
    assert time_left({"select": left["select"]}) == "time unknown yet (select)"

    steps[0].do()
    journal.add(steps[0], 60.0, share=0.5)  # the half of a fold took a minute
    left = journal.seconds_left(steps)
    assert left == {"fold 1": 30.0, "fold 2": 120.0, "select": None}
    assert overview("data", steps, left).splitlines() == [
        "data: 1 of 4 steps done; left: about 2:30 min without select",
        "  done  fold 0",
        "  left  fold 1  about 30 s, 75% done",
        "  left  fold 2  about 2:00 min",
        "  left  select  time unknown yet",
    ]
    assert time_left({}) == "nothing"


def test_a_journal_with_a_line_cut_off_is_read(tmp_path: Path) -> None:
    step, journal = a_step(tmp_path, "one"), Journal(tmp_path / "steps.jsonl")
    journal.add(step, 10.0, 1.0)
    with journal.file.open("a") as file:
        file.write('{"step": "one", "kind": "o')
    journal.add(step, 30.0, 1.0)  # its line is lost with the one that was cut off
    journal.add(step, 20.0, 1.0)
    assert journal.typical_seconds() == {"one": 15.0}


# ------------------------------------------------------------------------------------------------ from data to a report


@pytest.fixture(scope="module")
def raw(tmp_path_factory: pytest.TempPathFactory, hippocampus: Path) -> Path:
    """Six cases of the bundled data."""
    return first_cases(tmp_path_factory.mktemp("raw") / "Task04_Hippocampus", 6)


def run(raw: Path, workspace: Path, **more: Any) -> RunResult:
    options: dict[str, Any] = {"recipe": "default", "settings": TINY, "folds": 2, "device": "cpu", "workers": 0, **more}
    return nnunet_lite.run(raw, configurations=["2d", "3d_fullres"], workspace=workspace, **options)


@pytest.fixture(scope="module")
def finished(raw: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, RunResult]:
    """A workspace in which all was done without a disturbance. Not to be written to."""
    import torch

    torch.set_num_threads(1)
    workspace = tmp_path_factory.mktemp("finished")
    return workspace, run(raw, workspace)


def weights(workspace: Path) -> dict[str, Any]:
    models = (workspace / "Task04_Hippocampus" / "models").glob("*/fold_*/model.safetensors")
    return {str(file.relative_to(workspace)): load_file(file) for file in models}


def test_from_data_to_a_report_and_what_comes_next(finished: tuple[Path, RunResult]) -> None:
    workspace, done = finished
    assert [(step.step, step.state) for step in done.steps] == [(name, "done") for name in STEPS]
    assert done.report is not None
    assert done.report.read_text().lstrip().lower().startswith("<!doctype html")
    assert [folder.name for folder in done.models] == ["2d-default", "3d_fullres-default"]
    selected = json.loads((workspace / "Task04_Hippocampus" / "inference.json").read_text())
    assert {name for candidate in selected["candidates"] for name in candidate["models"]} == {
        "2d-default", "3d_fullres-default",
    }  # fmt: skip
    assert sum(step.seconds for step in done.steps) <= done.seconds + 0.01 * len(done.steps)


def test_the_commands_it_ends_with_are_commands(
    finished: tuple[Path, RunResult], command: Command, hippocampus: Path, tmp_path: Path
) -> None:
    workspace, done = finished
    predict, info = done.to_text().splitlines()[-2:]
    assert predict == f"  nnlite predict -i IMAGES -o SEGMENTATIONS -w {workspace}"
    scan = sorted((hippocampus / "imagesTs").iterdir())[0]
    words = predict.replace("IMAGES", str(scan)).replace("SEGMENTATIONS", "out").split()
    code, _, err = command(*words[1:], "--device", "cpu", cwd=tmp_path)
    assert code == 0, err
    assert (tmp_path / "out" / scan.name).is_file()
    code, out, _ = command(*info.split()[1:], cwd=tmp_path)
    assert code == 0
    assert "3d_fullres-default" in out


def test_again_nothing_is_left(raw: Path, finished: tuple[Path, RunResult], capfd: pytest.CaptureFixture[str]) -> None:
    workspace, _ = finished
    before = weights(workspace)
    again = run(raw, workspace, fold="all-folds")  # which are all that there are
    said = capfd.readouterr().err
    assert [(step.step, step.state) for step in again.steps] == [(name, "kept") for name in STEPS]
    assert "8 of 8 steps done; left: nothing" in said
    assert ": 0 of 8 steps done in " in repr(again) and ", the others before\n" in repr(again)
    assert "epoch" not in said
    assert weights(workspace).keys() == before.keys()


def test_on_a_cpu_the_recipe_is_cpu_unless_a_model_of_default_was_begun(
    raw: Path, finished: tuple[Path, RunResult], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    lasts_short = {**TINY, "training.time_limit": 0.02, "training.iterations": 2, "training.epochs": 1}
    new = nnunet_lite.run(
        raw, configurations="2d", fold=0, folds=2, workspace=tmp_path, device="cpu", settings=lasts_short
    )
    assert "recipe `cpu`" in (said := capfd.readouterr().err) and "--recipe default" in said
    assert "1 of 5 steps done" in said and "step 2 of 5: preprocess" in said and "step 5 of 5: report" in said
    assert repr(new).startswith("Task04_Hippocampus: 5 of 5 steps done in ")
    assert [folder.name for folder in new.models] == ["2d-cpu"]
    paths = Paths(tmp_path / new.dataset)
    shutil.copytree(finished[1].models[0], paths.models / "old_2d-default_1")
    nnunet_lite.export_model([finished[1].models[0], tmp_path / "theirs.zip"])
    nnunet_lite.import_model(tmp_path / "theirs.zip", workspace=tmp_path)
    assert not _begun(paths, "default") and _begun(paths, "cpu"), "a model that was set aside or imported"
    capfd.readouterr()
    resumed = run(raw, finished[0], recipe=None)
    assert {step.state for step in resumed.steps} == {"kept"} and "recipe" not in capfd.readouterr().err


def test_other_settings_are_refused_before_anything_is_done(raw: Path, finished: tuple[Path, RunResult]) -> None:
    workspace, _ = finished
    with pytest.raises(UserError, match=r"other settings: optimizer\.lr: 0\.01 -> 0\.5.*recipe file.* old_2d-default"):
        run(raw, workspace, settings={**TINY, "optimizer.lr": 0.5})
    with pytest.raises(UserError, match="3d_lowres"):
        nnunet_lite.run(raw, configurations=["3d_lowres"], workspace=workspace, settings=TINY)
    with pytest.raises(UserError, match="there is no fold '7'"):
        run(raw, workspace, fold=[7], folds=None)


@pytest.mark.slow  # one kill of a training is in test_loop.py
def test_killed_in_the_middle_it_goes_on_to_the_same_networks(
    raw: Path, finished: tuple[Path, RunResult], tmp_path: Path
) -> None:
    """SIGKILL while the second fold trains; the networks are to the bit those of the run that nothing disturbed."""
    options = as_options(TINY)
    more = ["--folds", "2", "--device", "cpu", "--workers", "0", "-c", "2d,3d_fullres", "-w", str(tmp_path)]
    second = tmp_path / "Task04_Hippocampus" / "models" / "2d-default" / "fold_1"
    process = Forked("run", raw, "--recipe", "default", *options, *more)
    wait_until((second / "checkpoint.safetensors").is_file, process)
    process.kill()
    _, said = process.communicate(timeout=60)
    assert "left  train 3d_fullres fold 1  time unknown yet" in said
    assert not (tmp_path / "Task04_Hippocampus" / "inference.json").exists()
    done = run(raw, tmp_path)
    states = {step.step: step.state for step in done.steps}
    assert [states[name] for name in STEPS[:3]] == ["kept"] * 3
    assert [states[name] for name in STEPS[4:]] == ["done"] * 4
    expected, got = weights(finished[0]), weights(tmp_path)
    assert got.keys() == expected.keys()
    assert len(got) == 4
    for name, tensors in expected.items():
        assert all(tensor.equal(got[name][key]) for key, tensor in tensors.items()), name
