"""What a time limit covers, and how the validation keeps to it."""

from __future__ import annotations

import math
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from samples import TINIEST

import nnunet_lite
from nnunet_lite.files import read_json
from nnunet_lite.models.checkpoint import read_state
from nnunet_lite.models.folder import MODEL
from nnunet_lite.planning.schema import Plan
from nnunet_lite.settings import Settings, load_settings, with_changes
from nnunet_lite.training.configured import configured
from nnunet_lite.training.job import Job
from nnunet_lite.training.limit import Validation, announce, forward_seconds, planned_validation, step_sizes
from nnunet_lite.training.limit import training_seconds as of_training
from nnunet_lite.workspace import planned_paths

COVERED = {"training.time_limit": 10, "training.limit_validation": True}
PASSES = {0.5: 1331, 0.75: 512, 1.0: 216}  # of an image of 11, 8 and 6 windows along each axis


@pytest.fixture
def job(tiny_workspace: Path, tmp_path: Path) -> Job:
    settings = with_changes(Settings(), COVERED | {"training.batch_size": 4, "training.accumulate": 2})
    plan = configured(Plan.read(planned_paths(tiny_workspace).plans), "3d_fullres", settings)
    torch = pytest.importorskip("torch")
    return Job(plan, "3d_fullres", settings, 1, tmp_path, torch.device("cpu"), [], [], passes=PASSES)


@pytest.mark.parametrize(
    ("pass_seconds", "step", "training"),
    [
        (0.1, 0.5, 600 - 133.1),
        (0.225, 0.5, 600 - 1331 * 0.225),
        (0.3, 0.75, 600 - 512 * 0.3),
        (1.0, 1.0, 600 - 216.0),
        (5.0, 1.0, 300.0),  # it takes longer than the limit: training has half of that nevertheless
    ],
)
def test_a_covered_validation_takes_half_of_the_limit_at_most(
    job: Job, pass_seconds: float, step: float, training: float
) -> None:
    assert planned_validation(job, pass_seconds) == Validation(step, PASSES[step], PASSES[step] * pass_seconds)
    assert of_training(job, pass_seconds) == pytest.approx(training)


def test_a_validation_that_the_limit_does_not_cover_is_as_set(job: Job) -> None:
    alone = replace(job, settings=with_changes(job.settings, {"training.limit_validation": False}))
    assert step_sizes(alone.settings) == [0.5]
    assert of_training(alone, 5.0) == 600
    endless = replace(job, settings=with_changes(job.settings, {"training.time_limit": None}), passes={0.5: 1331})
    assert step_sizes(endless.settings) == [0.5] and of_training(endless, 5.0) == math.inf
    assert planned_validation(endless, 5.0) == Validation(0.5, 1331, 6655.0)
    assert planned_validation(replace(job, passes={}), 5.0) is None


def test_larger_distances_are_for_covered_validations_alone() -> None:
    assert step_sizes(load_settings("cpu")) == [0.5, 0.75, 1.0]
    assert step_sizes(load_settings("cpu", {"inference.step_size": 0.75})) == [0.75, 1.0]
    assert step_sizes(load_settings("default", {"training.time_limit": 60})) == [0.5]


def test_a_pass_is_estimated_from_a_training_step(job: Job) -> None:
    assert forward_seconds(job, 24.0) == pytest.approx(1.0)  # of eight samples, a third of it forwards


def test_what_the_validation_takes_is_announced(job: Job, capfd: pytest.CaptureFixture[str]) -> None:
    said = []
    for seconds in (0.1, 0.3, 5.0):
        planned = planned_validation(job, seconds)
        assert planned is not None
        announce(job.settings, planned, 1)
        said.append(capfd.readouterr().err)
    takes = "validation of 1 held-out case in whole images: "
    assert said[0] == f"{takes}1,331 passes through the network, about 2:13 min of the time limit\n"
    assert said[1].endswith("about 2:34 min of the time limit; windows are 0.75 of the patch apart, to keep to it\n")
    assert said[2].startswith(f"warning: {takes}") and "more than half of the time limit, which the run" in said[2]
    announce(with_changes(job.settings, {"training.limit_validation": False}), Validation(0.5, 8, 20.0), 3)
    assert capfd.readouterr().err.endswith("about 20 s, which the time limit does not cover\n")


def test_a_run_validates_with_windows_further_apart_and_notes_it(
    tiny_workspace: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    workspace = tmp_path / "workspace"
    shutil.copytree(tiny_workspace, workspace, ignore=shutil.ignore_patterns("models"))
    changes: dict[str, Any] = {**TINIEST, "training.patch_size": [8, 8, 8], "training.limit_validation": True,
                               "training.time_limit": 0.004, "inference.step_size": 0.5}  # fmt: skip
    nnunet_lite.train("3d_fullres", 0, settings=changes, device="cpu", workspace=workspace)
    (fold,) = workspace.glob("*/models/*/fold_0")
    planned = read_state(fold / MODEL)["validation"]
    assert planned["step_size"] > 0.5
    note = f"windows {planned['step_size']:g} of the patch apart, to keep to the time limit"
    assert read_json(fold / "validation" / "summary.json")["notes"] == [note]
    assert "held-out cases in whole images" in capfd.readouterr().err
    shutil.rmtree(fold / "validation")
    nnunet_lite.train("3d_fullres", 0, settings=changes, device="cpu", workspace=workspace)  # validates again, equally
    assert read_json(fold / "validation" / "summary.json")["notes"] == [note]
