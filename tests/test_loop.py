"""Training learns, can be killed and resumed bit by bit, and names the images that spoil it. On real images."""

from __future__ import annotations

import json
import math
import re
import shutil
import signal
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from samples import Command, Forked, as_options, read_metrics, wait_until

from nnunet_lite import log
from nnunet_lite.data.labels import Labels
from nnunet_lite.errors import UserError
from nnunet_lite.models.folder import CHECKPOINT, MODEL, is_complete, is_finished, read_weights_header
from nnunet_lite.networks.precision import ComputeFormat
from nnunet_lite.planning.schema import Plan
from nnunet_lite.preprocessing.stored_case import CaseArrays, sample_voxels
from nnunet_lite.settings import Settings, with_changes
from nnunet_lite.training import learner as learning
from nnunet_lite.training import loop
from nnunet_lite.training.cache import load_case
from nnunet_lite.training.job import Job, configure_plan
from nnunet_lite.training.launch import Ranks
from nnunet_lite.training.limits import StopRequest
from nnunet_lite.training.loop import State, _describe_progress, _pace, _seconds_left, train_fold
from nnunet_lite.training.metrics import METRICS, PICTURE, TABLE, Metrics

CLOCK = {"seconds", "samples_per_second", "waiting", "memory_gb"}  # what differs between two equal runs
SMALL = {"training.patch_size": [16, 16, 16]}
LEARNS = {"training__iterations": 12, "optimizer__name": "adamw", "optimizer__lr": 0.01}

MakeJob = Callable[..., Job]


def dotted(changes: dict[str, Any]) -> dict[str, Any]:
    return {key.replace("__", "."): value for key, value in changes.items()}


@pytest.fixture
def job(tmp_path: Path, tiny_plan: Plan, tiny_cases: list[Any], tiny_settings: dict[str, Any]) -> MakeJob:
    """A fold to train: job("name", configuration=..., labels=..., cases=..., optimizer__lr=0.1)."""

    def make(
        name: str = "fold_0",
        configuration: str = "3d_fullres",
        labels: Labels | None = None,
        cases: list[Any] = tiny_cases,
        **changes: Any,
    ) -> Job:
        settings = with_changes(Settings(), tiny_settings | SMALL | dotted(changes))
        plan = tiny_plan.model_copy(update={"labels": labels or tiny_plan.labels})
        plan = configure_plan(plan, configuration, settings)
        (tmp_path / name).mkdir()
        return Job(plan, configuration, settings, 5, tmp_path / name, torch.device("cpu"), cases[:7], cases[7:])

    return make


def changed(run: Job, **changes: Any) -> Job:
    return replace(run, settings=with_changes(run.settings, dotted(changes)))


def train(run: Job) -> list[Metrics]:
    train_fold(run)
    return read_metrics(run.folder)


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / MODEL)


def same_weights(one: Path, other: Path) -> bool:
    a, b = weights(one), weights(other)
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


def without_clock(folder: Path) -> list[Metrics]:
    return [{key: value for key, value in row.items() if key not in CLOCK} for row in read_metrics(folder)]


def assert_same_run(one: Path, other: Path) -> None:
    assert same_weights(one, other) and without_clock(one) == without_clock(other)


def relabelled(cases: list[Any], labels: Labels, change: Callable[[np.ndarray], None]) -> list[CaseArrays]:
    """The cases with other classes, and the voxels that belong to them."""

    def relabel(case: CaseArrays) -> CaseArrays:
        label = case.label.copy()
        change(label)
        voxels = dict(sample_voxels(label, labels))
        return CaseArrays(case.case_id, case.image, label, voxels, voxels.pop(-1, None))

    return [relabel(load_case(case)) for case in cases]


def spoiled(case: Any) -> CaseArrays:
    loaded = load_case(case)
    image = np.full_like(loaded.image, math.nan)
    return CaseArrays("spoiled", image, loaded.label, loaded.foreground, loaded.annotated)


def raise_after_an_epoch(metrics: Metrics) -> None:
    raise AssertionError("the first epoch")


# --------------------------------------------------------------------------------------------------------- learning


def test_the_loss_goes_down_and_a_run_leaves_its_files(job: MakeJob) -> None:
    run = job(training__epochs=3, **LEARNS)
    assert not is_finished(run.folder)
    table = train(run)
    assert is_finished(run.folder)
    assert {p.name for p in run.folder.glob("[!.]*")} == {CHECKPOINT, MODEL, METRICS, TABLE, PICTURE}
    assert [row["epoch"] for row in table] == [1, 2, 3]
    assert table[-1]["train_loss"] < table[0]["train_loss"] - 0.2
    assert table[-1]["validation_loss"] < table[0]["validation_loss"]
    assert table[0]["dice"].keys() == {"Anterior", "Posterior"}
    assert table[-1]["lr"] < table[1]["lr"] < 0.01
    header = read_weights_header(run.folder / MODEL)
    assert (header["configuration"], header["epochs"]) == ("3d_fullres", 3)


def test_the_duration_of_a_fold_is_announced_within_the_first_epoch(
    job: MakeJob, capfd: pytest.CaptureFixture[str]
) -> None:
    train(job("short", training__epochs=3, training__iterations=8))
    lines = [line for line in capfd.readouterr().err.splitlines() if "a fold" in line or line.startswith("epoch")]
    assert re.fullmatch(r"about \d+(\.\d)? s a fold on this CPU", lines[0]) and len(lines) == 4
    for recipe, option in (("default", "--recipe cpu"), ("cpu", "--time-limit 30")):
        run = job(recipe, training__epochs=10**7, training__iterations=8)
        settings = run.settings.model_copy(update={"recipe": recipe})
        with pytest.raises(AssertionError, match="the first epoch"):
            train_fold(replace(run, settings=settings, callbacks=(raise_after_an_epoch,)))
        said = capfd.readouterr().err
        assert re.search(rf"about [\d,.]+ days a fold on this CPU; `{option}` gives a model in minutes\n", said)


def test_the_time_left_is_that_of_steps_held_out_patches_and_windows(job: MakeJob) -> None:
    """Each kind as it was measured; before that, the forward pass takes a quarter of a step."""
    run = job(training__epochs=3, training__iterations=10, training__validation_iterations=2)
    run = replace(run, passes={0.5: 12})
    batch = run.planned.batch_size
    state = State(compute=ComputeFormat(), epoch=1, iteration=4, pace=6.0)
    assert _seconds_left(run, state) == pytest.approx(16 * 6 + 2 * 2 * 1.5 + 12 * 1.5 / batch)
    state = state.model_copy(update={"pseudo_seconds": 5.0, "pass_seconds": 0.1})
    assert _seconds_left(run, state) == pytest.approx(16 * 6 + 2 * 5 + 12 * 0.1)
    assert _seconds_left(run, state.model_copy(update={"pass_seconds": 9.0})) == pytest.approx(106 + 12 * 1.5 / batch)
    assert [_pace(n, 9.0, 5.0) for n in (0, 1, 3)] == [0.0, 9.0, 2.0]  # the first of several steps does not count
    assert _describe_progress(run, state) == "step 4/10, 1:47 min left"


def test_seconds_of_loading_count_as_training(job: MakeJob) -> None:
    run = job(training__epochs=50, training__time_limit=100 / 60)
    train_fold(run, seconds=99.999)
    assert len(read_metrics(run.folder)) == 1
    assert read_weights_header(run.folder / MODEL)["seconds"] > 99.999


def test_one_seed_gives_one_result_with_and_without_a_thread(job: MakeJob) -> None:
    one, same, threaded = job("one"), job("same"), job("threaded", training__workers=1)
    other = replace(job("other"), seed=6)
    for run in (one, same, threaded, other):
        train(run)
    assert_same_run(one.folder, same.folder)
    assert same_weights(one.folder, threaded.folder)
    assert not same_weights(one.folder, other.folder)


def test_two_dimensional_networks_train(job: MakeJob) -> None:
    sizes = {"training__patch_size": [32, 24], "training__batch_size": 6, "training__iterations": 12}
    run = job(configuration="2d", **sizes, optimizer__name="adamw")
    table = train(run)
    assert table[-1]["train_loss"] < table[0]["train_loss"]
    assert weights(run.folder)["encoder.0.0.0.weight"].ndim == 4


def test_regions_train(job: MakeJob, tiny_cases: list[Any]) -> None:
    labels = Labels(names={"background": 0, "whole": (1, 2), "posterior": 2}, region_order=(1, 2))
    run = job(labels=labels, cases=relabelled(tiny_cases, labels, lambda label: None), **LEARNS)
    table = train(run)
    assert table[-1]["dice"].keys() == {"whole", "posterior"}
    assert table[-1]["train_loss"] < table[0]["train_loss"] - 0.05
    assert weights(run.folder)["heads.0.weight"].shape[0] == 2


def test_ignored_voxels_decide_nothing(job: MakeJob, tiny_cases: list[Any]) -> None:
    labels = Labels(names={"background": 0, "Anterior": 1, "Posterior": 2}, ignore=7)
    assert labels.ignore_class == 3
    sparse = np.random.default_rng(0)

    def ignore(label: np.ndarray) -> None:
        label[sparse.random(label.shape) < 0.7] = 3

    run = job(labels=labels, cases=relabelled(tiny_cases, labels, ignore), **LEARNS)
    table = train(run)
    assert table[-1]["train_loss"] < table[0]["train_loss"] - 0.1
    assert weights(run.folder)["heads.0.weight"].shape[0] == 3

    nothing = relabelled(tiny_cases, labels, lambda label: label.fill(3))
    inside = {"augmentation__p_rotation": 0, "augmentation__p_scaling": 0, "optimizer__weight_decay": 0}
    short, long = (job(f"{n}", labels=labels, cases=nothing, **inside, training__epochs=n) for n in (1, 3))
    train(short)
    table = train(long)
    assert same_weights(short.folder, long.folder)
    assert [row["train_loss"] for row in table] == [-1, -1, -1] and table[-1]["mean_dice"] is None


def test_settings_reach_the_run(job: MakeJob) -> None:
    deep = {"training__patch_size": [32, 32, 32], "training__iterations": 2, "training__epochs": 1}
    plain = job("plain", **deep)
    train(plain)
    for number, changes in enumerate(
        (
            {"training__deep_supervision": False}, {"augmentation__enabled": False}, {"training__gradient_clip": 0.1},
            {"loss__dice": 0}, {"loss__cross_entropy": 0, "network__activation": "relu"},
            {"augmentation__mirror_axes": []}, {"training__accumulate": 2},
        )
    ):  # fmt: skip
        other = job(str(number), **deep, **changes)
        (row,) = train(other)
        assert math.isfinite(row["train_loss"]) and row["samples_per_second"] > 0
        assert not same_weights(plain.folder, other.folder), changes


def test_batch_norm_statistics_are_saved_and_count_real_steps_alone(job: MakeJob) -> None:
    run = job(network__norm="batch", training__precision="auto", training__channels_last="auto")
    train(run)
    model = weights(run.folder)
    assert {int(value) for key, value in model.items() if key.endswith("num_batches_tracked")} == {2 * 3}
    means = [value for key, value in model.items() if key.endswith("running_mean")]
    assert means and all(value.abs().sum() > 0 for value in means)


def test_the_moving_average_becomes_the_model(job: MakeJob) -> None:
    plain, averaged = job("plain"), job("averaged", optimizer__ema=0.5)
    for run in (plain, averaged):
        train(run)
    trained, model, name = load_file(averaged.folder / CHECKPOINT), weights(averaged.folder), "encoder.0.0.0.weight"
    assert torch.equal(trained[f"network.{name}"], weights(plain.folder)[name])  # it does not change the training
    assert torch.equal(model[name], trained[f"average.{name}"])
    assert not torch.equal(model[name], trained[f"network.{name}"])


def test_a_users_network_draws_the_same_random_numbers_after_resuming(
    job: MakeJob, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "dropping.py").write_text(
        "from torch import nn\n"
        "def make(planned, inputs, outputs):\n"
        "    layers = nn.Conv3d(inputs, 8, 3, padding=1), nn.ReLU(), nn.Dropout(0.5), nn.Conv3d(8, outputs, 1)\n"
        "    return nn.Sequential(*layers)\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    parts, whole = (job(name, network__factory="dropping:make", schedule__name="constant") for name in ("a", "b"))
    train(changed(parts, training__epochs=1))
    for run in (parts, whole):
        train(run)
    assert weights(whole.folder)["0.weight"].shape[0] == 8
    assert_same_run(parts.folder, whole.folder)


# --------------------------------------------------------------------------------------------------------- bad data


def test_images_that_are_not_finite_end_the_run_with_their_name(job: MakeJob, tiny_cases: list[Any]) -> None:
    run = job(cases=[spoiled(tiny_cases[0])], training__max_bad_steps=4, training__iterations=10)
    with pytest.raises(UserError, match=r"not finite in 4 steps.*spoiled.*nnlite check"):
        train(run)
    assert not is_finished(run.folder)


def test_a_few_bad_steps_are_skipped_and_counted(job: MakeJob, tiny_cases: list[Any]) -> None:
    """They change neither weights, nor their average, nor the statistics of batch norm."""
    mixed = [spoiled(tiny_cases[0]), *tiny_cases[1:7]]
    run = job(cases=mixed, training__iterations=8, network__norm="batch", optimizer__ema=0.5)
    table = train(run)
    bad = sum(row["bad_steps"] for row in table)
    assert 1 <= bad < 16
    assert all(math.isfinite(row["train_loss"]) for row in table)
    assert all(torch.isfinite(weight).all() for weight in weights(run.folder).values())
    trained = load_file(run.folder / CHECKPOINT)
    counts = {int(value) for name, value in trained.items() if name.startswith("network.") and "num_batches" in name}
    assert counts == {16 - bad}


def test_held_out_logits_that_are_not_finite_have_no_dice(
    job: MakeJob, tiny_cases: list[Any], capfd: pytest.CaptureFixture[str]
) -> None:
    """They would count as background: a Dice of 0 for a network that may be a good one."""
    for row in train(job(cases=[*tiny_cases[:7], spoiled(tiny_cases[7])], training__iterations=1)):
        assert row["validation_loss"] is None and row["mean_dice"] is None and set(row["dice"].values()) == {None}
    assert "held-out loss not finite" in capfd.readouterr().err


def test_runs_with_other_seeds_have_the_same_held_out_patches(job: MakeJob) -> None:
    run = job(training__validation_iterations=2)
    state = State(compute=ComputeFormat())
    learner = learning.make_learner(run, learning.make_network(run), state.compute)
    first, second = (loop._pseudo_validate(replace(run, seed=seed), learner, state, math.inf) for seed in (5, 6))
    assert first["mean_dice"] is not None and first == second


# -------------------------------------------------------------------------------------------------- the end of a run


def test_a_time_limit_ends_the_run_with_an_annealed_rate(job: MakeJob, capfd: pytest.CaptureFixture[str]) -> None:
    run, start = job(training__epochs=1000, training__time_limit=0.1, training__iterations=10), time.monotonic()
    table = train(run)  # the first training of a process takes seconds to begin, which count
    assert 2 < time.monotonic() - start < 20
    assert len(table) < 1000 and table[-1]["lr"] < 0.7 * 0.01
    assert is_finished(run.folder)
    capfd.readouterr()
    assert len(train(changed(run, training__epochs=2000))) == len(table)
    assert "the 6.0 s of training.time_limit are over; --time-limit gives it more" in capfd.readouterr().err


def test_a_time_limit_holds_within_an_epoch_and_for_its_pseudo_validation(
    job: MakeJob, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of 100 000 steps and as many validation batches to an epoch, as of slow ones on a CPU; the progress says so."""
    monkeypatch.setattr(log, "_SECONDS_BETWEEN_LINES", 0)
    monkeypatch.setattr(log, "_SECONDS_BETWEEN_SIGNS", 0.02)
    many = {"training__iterations": 100_000, "training__validation_iterations": 100_000}
    start = time.monotonic()
    (row,) = train(job(**many, training__time_limit=0.03, schedule__name="constant"))
    assert time.monotonic() - start < 15
    assert 0 < row["validation_loss"] < 3 and row["seconds"] < 3
    shown = re.findall(r"epoch 1: (\S+) s of 1\.8 s\n", capfd.readouterr().err)
    assert len(shown) > 3 and shown == sorted(shown)


def test_a_run_makes_one_step_however_short_its_time(job: MakeJob) -> None:
    (row,) = train(job(training__time_limit=1e-6, training__iterations=10, training__seed=None))
    assert row["train_loss"] is not None and row["lr"] > 0


def test_the_plateau_rule_ends_the_run(job: MakeJob) -> None:
    rule = {"schedule__name": "plateau", "schedule__patience": 1, "optimizer__lr": 2e-6, "training__epochs": 50}
    table = train(job(**rule, training__validation_iterations=0, training__iterations=1))
    assert 3 <= len(table) < 50 and "dice" not in table[0]


def test_no_better_dice_ends_the_run_early(job: MakeJob) -> None:
    run = job(training__epochs=50, training__early_stop=2, optimizer__lr=1e-9, training__iterations=1)
    n_epochs = len(train(run))
    assert 3 <= n_epochs < 50
    assert is_finished(run.folder)
    assert len(train(changed(run, training__epochs=60))) > n_epochs  # a longer run is as patient again


def test_an_error_of_the_thread_that_writes_a_checkpoint_ends_the_run(job: MakeJob) -> None:
    run = job(training__epochs=3)
    (run.folder / CHECKPOINT).mkdir()  # a file cannot take its place
    with pytest.raises(OSError, match=re.escape(CHECKPOINT)):
        train(run)
    assert len(read_metrics(run.folder)) in (1, 2) and not is_finished(run.folder)


# --------------------------------------------------------------------------------------------------------- resuming


def test_metrics_without_a_checkpoint_are_dropped(job: MakeJob) -> None:
    run = job()
    train(run)
    before = without_clock(run.folder)
    (run.folder / MODEL).unlink()
    with (run.folder / METRICS).open("a") as file:
        file.write(json.dumps(read_metrics(run.folder)[-1] | {"epoch": 3}) + '\n{"epoch": 4, "dice": {"Anterior": 0.5}')
    train(run)  # all epochs are trained: only the model is written
    assert without_clock(run.folder) == before
    assert is_finished(run.folder)


def test_a_finished_run_can_be_made_longer(job: MakeJob) -> None:
    run = job()
    first = train(run)
    stale = run.folder / "validation" / "summary.json"
    stale.parent.mkdir()
    stale.write_text("{}")
    longer = changed(run, training__epochs=4)
    assert is_complete(run.folder, run.settings) and not is_complete(run.folder, longer.settings)
    table = train(longer)
    assert is_complete(run.folder, longer.settings)
    assert [row["epoch"] for row in table] == [1, 2, 3, 4] and table[:2] == first
    assert not stale.exists()


def test_patches_grow_and_keep_their_size_when_the_run_is_made_longer(job: MakeJob) -> None:
    run = job(training__patch_growth=0.5, training__epochs=16, training__iterations=1)
    rows, last = train(run), len(run.stages) - 1
    assert last == 6 and read_weights_header(run.folder / CHECKPOINT)["stage"] == last
    patches = [row["samples_per_second"] * row["seconds"] for row in rows]  # a batch keeps its voxels
    assert patches[0] > 2 * patches[-1]
    longer = changed(run, training__epochs=64)
    assert longer.stage_at(16 / 64) < last
    train_fold(longer)
    assert read_weights_header(run.folder / CHECKPOINT)["stage"] == last


def test_other_settings_reach_a_resumed_run(job: MakeJob) -> None:
    run = job(schedule__name="constant")
    train(run)
    changes = {"training__epochs": 4, "optimizer__lr": 1e-5, "optimizer__name": "adamw"}
    table = train(changed(run, **changes, training__precision="bf16", training__validation_iterations=0))
    assert [row["lr"] for row in table] == [0.01, 0.01, 1e-5, 1e-5]
    assert "dice" in table[1] and "dice" not in table[2]
    assert read_weights_header(run.folder / MODEL)["arithmetic"]["precision"] == "bf16"


ADAMW = {"optimizer.name": "adamw", "network.norm": "batch"}
MUON = {"optimizer.name": "muon", "optimizer.lr": 1e-3, "training.patch_growth": 0.8}
BF16 = {"training.precision": "bf16", "training.channels_last": True}
PLATEAU = {
    "schedule.name": "plateau",
    "schedule.patience": 1,
    "optimizer.lr": 1e-5,
    "schedule.min_lr": 1e-9,
}  # drops twice


@pytest.mark.slow
def test_adamw_batch_norm_bf16_and_the_plateau_rule_resume_bit_by_bit(job: MakeJob) -> None:
    changes = {key.replace(".", "__"): value for key, value in (ADAMW | BF16 | PLATEAU).items()}
    parts, whole = (job(name, **changes | {"training__epochs": 6}) for name in ("parts", "whole"))
    train(changed(parts, training__epochs=2))
    for run in (parts, whole):
        train(run)
    assert len({row["lr"] for row in read_metrics(whole.folder)}) > 1
    assert_same_run(parts.folder, whole.folder)


@pytest.mark.parametrize(
    ("number", "more"),
    [
        (signal.SIGKILL, {}),
        pytest.param(signal.SIGKILL, ADAMW | BF16 | PLATEAU, marks=pytest.mark.slow),
        pytest.param(signal.SIGKILL, MUON, marks=pytest.mark.slow),
        (signal.SIGTERM, MUON | {"optimizer.ema": 0.9, "training.validation_iterations": 0}),  # as clusters send it
    ],
    ids=["SIGKILL-sgd", "SIGKILL-adamw-bf16-plateau-batch-norm", "SIGKILL-muon-growth", "SIGTERM-muon-growth-ema"],
)
def test_a_run_that_was_stopped_resumes_bit_by_bit(
    tmp_path: Path, tiny_workspace: Path, tiny_settings: dict[str, Any], command: Command,
    number: signal.Signals, more: dict[str, Any],
) -> None:  # fmt: skip
    """After a kill from the last epoch, after a signal from the last step; for Ctrl-C see test_distributed.py."""
    killed = number == signal.SIGKILL
    length = {"training.epochs": 6, "training.iterations": 3} if killed else {"training.iterations": 20}
    settings = as_options(tiny_settings | SMALL | {"training.epochs": 3} | length | more)
    workspace = shutil.copytree(tiny_workspace, tmp_path / "workspace")
    arguments = ["train", "3d_fullres", "all", "-w", str(workspace), "--device", "cpu", *settings]
    stopped, whole = (workspace / "Task04_Hippocampus" / "models" / name / "fold_all" for name in ("stopped", "whole"))

    process, checkpoint = Forked(*arguments, "--name", "stopped"), stopped / CHECKPOINT
    n_epochs = 2 if killed else 0
    wait_until(lambda: checkpoint.is_file() and read_weights_header(checkpoint)["epoch"] >= n_epochs, process)
    time.sleep(0 if killed else 0.3)
    process.send_signal(number)
    _, errors = process.communicate(timeout=60)
    assert not is_finished(stopped)
    assert process.returncode == (-number if killed else 128 + number), errors
    if not killed:
        assert "stopped by SIGTERM in epoch" in errors and "Traceback" not in errors
        assert read_weights_header(checkpoint)["iteration"] > 0

    for name in ("stopped", "whole"):
        code, _, errors = command(*arguments, "--name", name, cwd=tmp_path)
        assert code == 0, errors
        expected = r"resuming from epoch \d of 6\n" if killed else r"resuming in epoch \d of 3 after step \d+\n"
        assert (re.search(expected, errors) is not None) == (name == "stopped")
    assert_same_run(stopped, whole)
    assert [row["epoch"] for row in read_metrics(stopped)] == list(range(1, 7 if killed else 4))


def test_a_signal_that_arrives_while_processes_compare_is_kept(job: MakeJob, monkeypatch: pytest.MonkeyPatch) -> None:
    stop = StopRequest()

    def compare(value: int, ranks: Ranks) -> int:
        stop.signal = signal.SIGTERM
        return value

    run = job()
    monkeypatch.setattr(loop, "max_over_ranks", compare)
    assert not loop._agree_to_stop(run, stop)  # the others do not know of it
    assert loop._agree_to_stop(run, stop)
    assert stop.signal == signal.SIGTERM
