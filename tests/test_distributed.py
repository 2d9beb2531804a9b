"""Several processes train one network as one process does; the death of one of them ends the run with its cause."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import torch
from safetensors.torch import load_file
from samples import fold_of

from nnunet_lite.errors import UserError
from nnunet_lite.models.folder import CHECKPOINT, read_header
from nnunet_lite.models.folder import MODEL
from nnunet_lite.training import distributed
from nnunet_lite.training.distributed import (
    ALONE,
    LOOK_EVERY,
    Clock,
    Ranks,
    any_rank,
    current,
    device_of,
    from_first,
    share,
)
from nnunet_lite.training.record import METRICS

ONE_THREAD = {**os.environ, "OMP_NUM_THREADS": "1"}


@pytest.mark.parametrize(("batch", "world"), [(7, 2), (2, 2), (9, 4), (5, 1)])
def test_shares_cover_a_batch_and_differ_by_one_at_most(batch: int, world: int) -> None:
    shares = [share(batch, Ranks(rank, world, rank)) for rank in range(world)]
    assert [i for part in shares for i in range(batch)[part]] == list(range(batch))
    sizes = [part.stop - part.start for part in shares]
    assert max(sizes) - min(sizes) <= 1
    assert sizes == sorted(sizes, reverse=True)


def test_a_batch_smaller_than_the_processes_is_refused() -> None:
    with pytest.raises(UserError, match=r"batch of 2 cannot be split over 3 processes.*--gpus"):
        share(2, Ranks(0, 3, 0))


def test_alone_unless_somebody_started_several(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    assert current() == ALONE
    assert from_first("x", ALONE) == "x"
    assert any_rank(3, ALONE) == 3
    for name, value in {"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1"}.items():
        monkeypatch.setenv(name, value)
    assert current() == Ranks(5, 8, 1)
    assert device_of(Ranks(5, 8, 1), torch.device("cpu")) == torch.device("cpu")


def ran(command: list[str]) -> str:
    done = subprocess.run(command, env=ONE_THREAD, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_two_processes_learn_what_one_learns(tmp_path: Path, train_three: list[str]) -> None:
    """Started by `nnlite`; for two that torchrun starts see test_nodes.py."""
    more = ["--set", "training.accumulate=2", "--set", "optimizer.ema=0.9"]
    nnlite = [sys.executable, "-m", "nnunet_lite", *train_three, *more]
    ran([*nnlite, "--name", "one"])
    scores = ran([*nnlite, "--gpus", "2", "--name", "two"])
    assert scores.count("fold 0, whole images") == 1  # one process speaks
    one, two = (
        [json.loads(line) for line in (fold_of(tmp_path, name) / METRICS).read_text().splitlines()]
        for name in ("one", "two")
    )
    assert len(one) == len(two) == 2
    for a, b in zip(one, two, strict=True):
        assert a["train_loss"] == pytest.approx(b["train_loss"], abs=2e-5)
        assert a["validation_loss"] == pytest.approx(b["validation_loss"], abs=2e-5)
        assert a["dice"] == pytest.approx(b["dice"], abs=2e-3)
        assert a["lr"] == b["lr"]
    counted = [read_header(fold_of(tmp_path, name) / CHECKPOINT)["seen"] for name in ("one", "two")]
    assert counted[0] == counted[1]
    weights, others = (load_file(fold_of(tmp_path, name) / MODEL) for name in ("one", "two"))
    for name, weight in weights.items():
        assert torch.allclose(weight, others[name], atol=1e-5), name


def test_the_death_of_a_process_is_told_and_the_run_goes_on_later(tmp_path: Path, train_three: list[str]) -> None:
    nnlite = [sys.executable, "-m", "nnunet_lite", *train_three, "--epochs", "400", "--gpus", "2", "--name", "killed"]
    process = subprocess.Popen(nnlite, env=ONE_THREAD, stderr=subprocess.PIPE, text=True)
    until = time.monotonic() + 120
    while (
        not (fold_of(tmp_path, "killed") / METRICS).is_file() or not (fold_of(tmp_path, "killed") / METRICS).read_text()
    ):
        assert process.poll() is None
        assert time.monotonic() < until
        time.sleep(0.05)
    ranks = {int(child.environ()["RANK"]): child for child in psutil.Process(process.pid).children()}
    ranks[1].send_signal(signal.SIGKILL)
    killed = time.monotonic()
    _, said = process.communicate(timeout=60)
    assert time.monotonic() - killed < 30
    assert process.returncode == 1
    assert "process 1 of 2 was killed by SIGKILL" in said
    assert not psutil.pid_exists(ranks[0].pid) or not ranks[0].is_running()
    assert (fold_of(tmp_path, "killed") / "checkpoint.safetensors").is_file()


def test_a_mistake_is_one_line_of_one_process(tmp_path: Path, train_three: list[str]) -> None:
    more = ["--set", "training.batch_size=1", "--gpus", "2", "--name", "split"]
    nnlite = [sys.executable, "-m", "nnunet_lite", *train_three, *more]
    done = subprocess.run(nnlite, env=ONE_THREAD, capture_output=True, text=True, timeout=240)
    assert done.returncode == 2
    assert done.stderr.count("a batch of 1 cannot be split over 2 processes") == 1
    assert "Traceback" not in done.stderr


def test_a_signal_to_the_command_alone_stops_all_softly(tmp_path: Path, train_three: list[str]) -> None:
    more = ["--epochs", "400", "--gpus", "2", "--name", "stopped"]
    process = subprocess.Popen(
        [sys.executable, "-m", "nnunet_lite", *train_three, *more], env=ONE_THREAD, stderr=subprocess.PIPE, text=True
    )
    until = time.monotonic() + 120
    while not (fold_of(tmp_path, "stopped") / METRICS).is_file():
        assert process.poll() is None
        assert time.monotonic() < until
        time.sleep(0.05)
    children = psutil.Process(process.pid).children()
    for child in children:
        assert os.getpgid(child.pid) == child.pid  # Ctrl-C comes to the command alone
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 128 + signal.SIGINT, said
    assert said.count("stopped by SIGINT") == 1
    assert not any(child.is_running() for child in children)
    assert (fold_of(tmp_path, "stopped") / CHECKPOINT).is_file()


def test_batch_norm_over_processes_needs_gpus(tmp_path: Path, train_three: list[str]) -> None:
    more = ["--set", "network.norm=batch", "--gpus", "2", "--name", "batch_norm"]
    nnlite = [sys.executable, "-m", "nnunet_lite", *train_three, *more]
    done = subprocess.run(nnlite, env=ONE_THREAD, capture_output=True, text=True, timeout=240)
    assert done.returncode == 2
    assert "batch normalisation over several processes needs GPUs" in done.stderr
    assert not fold_of(tmp_path, "batch_norm").exists()


def test_the_clock_of_several_is_the_first_ones_and_goes_by_the_pace_in_between(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert 0 <= Clock(ALONE, 99.0).after(5) < 5
    monkeypatch.setattr(distributed, "from_first", lambda value, ranks: 7.0)  # what the first process says
    clock = Clock(Ranks(1, 2, 1), 0.5)
    assert [clock.after(step) for step in (0, 1, LOOK_EVERY - 1)] == [0, 0.5, 0.5 * (LOOK_EVERY - 1)]
    assert [clock.after(step) for step in (LOOK_EVERY, LOOK_EVERY + 2)] == [7, 8]
    assert Clock(Ranks(1, 2, 1), 0.0).after(3) == 0  # in the first epoch, before anybody looked
