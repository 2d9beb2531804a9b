"""Signals stop a run softly, labels that are not learnt are reported, and what would fit a GPU is told."""

from __future__ import annotations

import os
import signal
import threading
from pathlib import Path

import pytest
import torch

from nnunet_lite.data.labels import Labels
from nnunet_lite.errors import Stopped
from nnunet_lite.planning.override import override_sizes
from nnunet_lite.planning.schema import Plan
from nnunet_lite.training.distributed import ALONE
from nnunet_lite.training.watch import Seen, Stop, Trend, names_of, stoppable, voxels_per_class, what_fits
from nnunet_lite.workspace import planned_paths

LABELS = Labels(names={"background": 0, "liver": 1, "tumour": 2})


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_the_first_signal_asks_and_the_second_ends(number: signal.Signals, capfd: pytest.CaptureFixture[str]) -> None:
    before = signal.getsignal(number)
    with stoppable() as stop:
        assert stop.asked is None
        os.kill(os.getpid(), number)
        assert stop.asked == number
        assert signal.getsignal(number) == before  # the next one does what it always did
    assert number.name in capfd.readouterr().err
    with pytest.raises(Stopped, match=f"{number.name} after epoch 3") as end:
        stop.raise_if_asked("after epoch 3")
    assert end.value.number == number


def test_handlers_are_restored_and_other_threads_are_left_alone() -> None:
    before = signal.getsignal(signal.SIGTERM)
    with stoppable():
        assert signal.getsignal(signal.SIGTERM) != before
    assert signal.getsignal(signal.SIGTERM) == before
    seen = []

    def inside() -> None:
        with stoppable() as stop:
            seen.append((stop, signal.getsignal(signal.SIGTERM)))

    thread = threading.Thread(target=inside)
    thread.start()
    thread.join()
    assert seen == [(Stop(), before)]


def test_voxels_are_counted_per_patch_and_class() -> None:
    classes = torch.tensor([[[0, 1], [1, 3]], [[2, 2], [0, 0]]], dtype=torch.uint8)
    assert voxels_per_class(classes, 4).tolist() == [[1, 2, 0, 1], [2, 0, 2, 0]]
    many = torch.randint(0, 119, (3, 20, 20, 20), generator=torch.Generator().manual_seed(0))
    expected = torch.stack([torch.bincount(patch.flatten(), minlength=119) for patch in many])
    assert torch.equal(voxels_per_class(many, 119).long(), expected)


def test_a_label_that_no_patch_shows_is_reported_once(capfd: pytest.CaptureFixture[str]) -> None:
    seen = Seen()
    seen.count(torch.tensor([[90.0, 10.0, 0.0]]), LABELS, ALONE)
    seen.count(torch.tensor([[100.0, 0.0, 0.0]]), LABELS, ALONE)  # as after a signal in the middle of the epoch
    assert (seen.voxels, seen.patches) == ([10, 0, 200], [1, 0, 2])
    assert capfd.readouterr().err == ""
    seen.report_unseen(LABELS)
    told = capfd.readouterr().err
    assert "tumour was in none of the 2 patches" in told
    assert "liver" not in told
    for _ in range(30):
        seen.after_epoch({"liver": 0.3, "tumour": 0.0}, 1.0)
    assert capfd.readouterr().err == ""


def test_a_label_that_stays_at_zero_is_reported_with_its_share(capfd: pytest.CaptureFixture[str]) -> None:
    seen = Seen()
    seen.count(torch.tensor([[899.0, 100.0, 1.0], [1000.0, 0.0, 0.0]]), LABELS, ALONE)
    for epoch in range(1, 10):
        seen.after_epoch({"liver": 0.0 if epoch < 9 else 0.1, "tumour": 0.0 if epoch != 4 else None}, 0.5)
    assert capfd.readouterr().err == ""
    for _ in range(3):
        seen.after_epoch({"liver": 0.0, "tumour": 0.0}, 0.5)
    told = capfd.readouterr().err
    assert told.count("warning") == 1
    assert "tumour has had a Dice of 0 in all of 10 epochs; 0.05% of the voxels, in 50% of the patches" in told


def test_early_in_a_long_run_nothing_is_said_to_be_stuck(capfd: pytest.CaptureFixture[str]) -> None:
    seen = Seen()
    for _ in range(20):
        seen.after_epoch({"liver": 0.0}, 0.02)
    assert capfd.readouterr().err == ""


def test_the_trend_counts_epochs_without_a_better_average() -> None:
    trend = Trend()
    for dice in (0.5, 0.6, 0.7):
        trend = trend.after_epoch(dice)
    assert trend.since == 0
    assert trend.average == pytest.approx(0.9 * (0.9 * 0.5 + 0.1 * 0.6) + 0.1 * 0.7)
    worse = trend.after_epoch(0.1).after_epoch(None).after_epoch(0.1)
    assert worse.since == 2
    assert worse.best == trend.average


def test_what_fits_names_a_batch_and_a_patch_that_do(tiny_workspace: Path) -> None:
    plan = override_sizes(Plan.read(planned_paths(tiny_workspace).plans), "3d_fullres", None, 20)
    planned = plan.configuration("3d_fullres")
    assert planned.memory_gb is not None
    told = what_fits(plan, "3d_fullres", 0.7 * planned.memory_gb)
    batch = int(told.split("--batch-size ")[1].split()[0])
    assert 1 <= batch < planned.batch_size
    patch = [int(n) for n in told.split("--patch-size ")[1].split()[0].split("x")]
    for size, number in ((patch, None), (None, batch)):
        fits = override_sizes(plan, "3d_fullres", size, number).configuration("3d_fullres")
        assert (fits.memory_gb or 9) <= 0.7 * planned.memory_gb
    assert what_fits(plan, "3d_fullres", 0.001) == ""


def test_cases_of_bad_steps_are_named_once() -> None:
    assert names_of([["a", "b"], ["c"], ["b", "d"]], [0, 2]) == "a, b, d"


def test_epochs_without_a_validation_tell_nothing() -> None:
    seen = Seen()
    seen.after_epoch({"liver": 0.0, "tumour": 0.5}, 0.5)
    before = list(seen.stuck)
    seen.after_epoch({}, 0.6)
    assert seen.stuck == before
