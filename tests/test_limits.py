"""A time limit with the validation that it covers, early stopping, signals, and what would fit a GPU."""

from __future__ import annotations

import math
import os
import shutil
import signal
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from samples import TINIEST

import nnunet_lite
from nnunet_lite.errors import Stopped
from nnunet_lite.files import read_json
from nnunet_lite.models.folder import MODEL, read_weights_header
from nnunet_lite.planning.planner import override_sizes
from nnunet_lite.planning.schema import Plan
from nnunet_lite.settings import Settings, load_settings, with_changes
from nnunet_lite.training.job import Job, configure_plan
from nnunet_lite.training.limits import (
    EarlyStopping,
    StopRequest,
    ValidationPlan,
    announce_validation,
    estimate_pass_seconds,
    plan_validation,
    stop_on_signal,
    suggest_smaller,
    training_seconds,
    validation_step_sizes,
)

COVERED = {"training.time_limit": 10, "training.limit_validation": True}
PASSES = {0.5: 1331, 0.75: 512, 1.0: 216}  # of an image of 11, 8 and 6 windows along each axis


@pytest.fixture
def job(tiny_plan: Plan, tmp_path: Path) -> Job:
    settings = with_changes(Settings(), COVERED | {"training.batch_size": 4, "training.accumulate": 2})
    plan = configure_plan(tiny_plan, "3d_fullres", settings)
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
    assert plan_validation(job, pass_seconds) == ValidationPlan(step, PASSES[step], PASSES[step] * pass_seconds)
    assert training_seconds(job, pass_seconds) == pytest.approx(training)


def test_a_validation_that_the_limit_does_not_cover_is_as_set(job: Job) -> None:
    uncovered = replace(job, settings=with_changes(job.settings, {"training.limit_validation": False}))
    assert training_seconds(uncovered, 5.0) == 600
    endless = replace(job, settings=with_changes(job.settings, {"training.time_limit": None}), passes={0.5: 1331})
    assert training_seconds(endless, 5.0) == math.inf
    assert plan_validation(endless, 5.0) == ValidationPlan(0.5, 1331, 6655.0)
    assert plan_validation(replace(job, passes={}), 5.0) is None
    for own in (uncovered, endless):
        assert validation_step_sizes(own.settings) == [0.5]
    assert validation_step_sizes(load_settings("cpu")) == [0.5, 0.75, 1.0]
    assert validation_step_sizes(load_settings("cpu", {"inference.step_size": 0.75})) == [0.75, 1.0]


def test_a_pass_is_estimated_from_a_training_step(job: Job) -> None:
    assert estimate_pass_seconds(job, 24.0) == pytest.approx(0.75)  # of eight samples, a quarter on a CPU


def test_the_duration_of_the_validation_is_announced(job: Job, capfd: pytest.CaptureFixture[str]) -> None:
    lines = []
    for seconds in (0.1, 0.3, 5.0):
        planned = plan_validation(job, seconds)
        assert planned is not None
        announce_validation(job.settings, planned, 1)
        lines.append(capfd.readouterr().err)
    takes = "validation of 1 held-out case in whole images: "
    assert lines[0] == f"{takes}1,331 passes through the network, about 2:13 min of the time limit\n"
    assert lines[1].endswith("about 2:34 min of the time limit; windows are 75% of a patch apart, to keep to it\n")
    announce_validation(job.settings, replace(planned, passes=1), 1)
    assert "1 pass through the network" in capfd.readouterr().err
    assert lines[2].startswith(f"warning: {takes}") and "more than half of the time limit, which the run" in lines[2]
    uncovered = with_changes(job.settings, {"training.limit_validation": False})
    announce_validation(uncovered, ValidationPlan(0.5, 8, 20.0), 3)
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
    planned = read_weights_header(fold / MODEL)["validation"]
    assert planned["step_size"] > 0.5
    note = f"windows {planned['step_size']:.0%} of a patch apart, to keep to the time limit"
    assert read_json(fold / "validation" / "summary.json")["notes"] == [note]
    assert "held-out cases in whole images" in capfd.readouterr().err
    shutil.rmtree(fold / "validation")
    nnunet_lite.train("3d_fullres", 0, settings=changes, device="cpu", workspace=workspace)  # validates again, equally
    assert read_json(fold / "validation" / "summary.json")["notes"] == [note]


def test_early_stopping_counts_epochs_without_a_better_average() -> None:
    state = EarlyStopping()
    for dice in (0.5, 0.6, 0.7):
        state = state.update(dice)
    assert state.since == 0
    assert state.average == pytest.approx(0.9 * (0.9 * 0.5 + 0.1 * 0.6) + 0.1 * 0.7)
    worse = state.update(0.1).update(None).update(0.1)
    assert (worse.since, worse.best) == (2, state.average)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_the_first_signal_requests_a_stop_and_the_second_ends(
    number: signal.Signals, capfd: pytest.CaptureFixture[str]
) -> None:
    before = signal.getsignal(number)
    with stop_on_signal():
        assert signal.getsignal(number) != before
    assert signal.getsignal(number) == before
    with stop_on_signal() as stop:
        assert stop.signal is None
        stop.starting = False
        os.kill(os.getpid(), number)
        assert stop.signal == number and signal.getsignal(number) == before  # the next one does what it always did
    assert number.name in capfd.readouterr().err
    with pytest.raises(Stopped, match=f"{number.name} after epoch 3") as end:
        stop.check("after epoch 3")
    assert end.value.number == number


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_a_run_that_starts(number: signal.Signals, capfd: pytest.CaptureFixture[str]) -> None:
    def end(*_: object) -> None:
        raise InterruptedError

    before = signal.signal(number, end)
    try:
        with pytest.raises(InterruptedError), stop_on_signal():
            os.kill(os.getpid(), number)
        assert signal.getsignal(number) == end and "checkpoint" not in capfd.readouterr().err
    finally:
        signal.signal(number, before)


def test_other_threads_change_no_handlers() -> None:
    before, found = signal.getsignal(signal.SIGTERM), []

    def inside() -> None:
        with stop_on_signal() as stop:
            found.append((stop, signal.getsignal(signal.SIGTERM)))

    thread = threading.Thread(target=inside)
    thread.start()
    thread.join()
    assert found == [(StopRequest(), before)]


def test_a_batch_and_a_patch_that_fit_are_suggested(tiny_plan: Plan) -> None:
    plan = override_sizes(tiny_plan, "3d_fullres", None, 20)
    planned = plan.configuration("3d_fullres")
    assert planned.memory_gb is not None
    text = suggest_smaller(plan, "3d_fullres", 0.7 * planned.memory_gb)
    batch = int(text.split("--batch-size ")[1].split()[0])
    assert 1 <= batch < planned.batch_size
    patch = [int(n) for n in text.split("--patch-size ")[1].split()[0].split("x")]
    for size, number in ((patch, None), (None, batch)):
        fits = override_sizes(plan, "3d_fullres", size, number).configuration("3d_fullres")
        assert (fits.memory_gb or 9) <= 0.7 * planned.memory_gb
    assert suggest_smaller(plan, "3d_fullres", 0.001) == ""
