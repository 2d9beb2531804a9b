"""After each epoch its metrics go to callbacks, and to TensorBoard, W&B or MLflow; a resumed run continues its log."""

from __future__ import annotations

import inspect
import os
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from samples import TINIEST, read_metrics, wait_until

import nnunet_lite
from nnunet_lite.cli import command_of
from nnunet_lite.errors import UserError, how_to_install
from nnunet_lite.models.folder import CHECKPOINT, MODEL, read_weights_header
from nnunet_lite.training import callbacks
from nnunet_lite.training.callbacks import follow_epochs, require_logger
from nnunet_lite.training.launch import Ranks
from nnunet_lite.training.loop import train_fold
from nnunet_lite.training.metrics import Metrics

SMALL = {"training.patch_size": [16, 16, 16]}
ROW: Metrics = {"train_loss": -0.5, "lr": 0.01, "mean_dice": None, "dice": {"liver": 0.25, "Läsion (a, b)": None}}


@pytest.fixture
def log_epochs(job: Callable[..., Any]) -> Callable[..., Path]:
    """Hand epochs to a logger, as a training does, and return the fold's folder."""

    def run(logger: str, *epochs: int) -> Path:
        of = job(**{"training.logger": logger})
        folder = of.folder / "models" / "tiny" / "fold_0"
        folder.mkdir(parents=True, exist_ok=True)
        with follow_epochs(replace(of, folder=folder)) as follow:
            for epoch in epochs:
                follow({"epoch": epoch} | ROW | {"dice": {"liver": epoch / 10, "Läsion (a, b)": 0.5}})
        return folder

    return run


# ----------------------------------------------------------------------------------------------------------- callbacks


def test_a_callback_gets_each_line_of_the_metrics(tiny_workspace: Path, job: Callable[..., Any]) -> None:
    found: list[Metrics] = []

    def spoil(metrics: Metrics) -> None:
        metrics["dice"].clear()

    one = replace(job(**SMALL), callbacks=(spoil, found.append))
    train_fold(one)
    expected = [{"configuration": "3d_fullres", "fold": one.folder.name, **row} for row in read_metrics(one.folder)]
    assert found == expected and [row["epoch"] for row in found] == [1, 2] and found[0]["dice"]


def test_what_a_callback_raises_ends_the_training_and_the_checkpoint_stays(job: Callable[..., Any]) -> None:
    def stop(metrics: Metrics) -> None:
        raise RuntimeError("enough")

    one = job(**SMALL)
    with pytest.raises(RuntimeError, match="enough"):
        train_fold(replace(one, callbacks=(stop,)))
    assert read_weights_header(one.folder / CHECKPOINT)["epoch"] == 1 and not (one.folder / MODEL).exists()
    found: list[int] = []
    train_fold(replace(one, callbacks=(lambda metrics: found.append(metrics["epoch"]),)))
    assert found == [2] and (one.folder / MODEL).is_file()
    assert [row["epoch"] for row in read_metrics(one.folder)] == [1, 2]


def test_only_the_first_process_calls_them(job: Callable[..., Any]) -> None:
    found: list[Metrics] = []
    for rank in (0, 1):
        with follow_epochs(replace(job(), callbacks=(found.append,), ranks=Ranks(rank, 2, rank))) as follow:
            follow({"epoch": rank})
    assert [metrics["epoch"] for metrics in found] == [0]


def test_they_come_from_python_and_not_with_a_cluster(tiny_workspace: Path) -> None:
    with pytest.raises(UserError, match=r"without --gpus, .* and callbacks"):
        nnunet_lite.train("2d", "all-folds", callbacks=[print], scheduler="tcp://x:1", workspace=tiny_workspace)
    options = {parameter.name for parameter in command_of("train").params}
    assert {*inspect.signature(nnunet_lite.train).parameters} - options == {"callbacks"}


# ------------------------------------------------------------------------------------------------------------- loggers


def test_a_missing_package_is_refused_before_anything_is_written(
    tiny_workspace: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    require_logger("none")
    missing = next((name for name in ("mlflow", "wandb", "tensorboard") if find_spec(name) is None), None)
    if missing is None:
        pytest.skip("all are installed")
    (tmp_path / missing).mkdir()  # a folder of that name, as wandb makes one, is no package
    monkeypatch.syspath_prepend(tmp_path)
    settings, models = {**TINIEST, "training.logger": missing}, tiny_workspace / "Task04_Hippocampus" / "models"
    with pytest.raises(UserError) as raised:
        nnunet_lite.train("3d_fullres", 0, settings=settings, workspace=tiny_workspace, name="logged")
    assert str(raised.value) == f"training.logger needs the package {missing}. {how_to_install(missing)}"
    assert not (models / "logged").exists()


def test_tensorboard_continues_after_the_checkpoint(log_epochs: Callable[..., Path]) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    log_epochs("tensorboard", 1, 2, 3)
    time.sleep(1.1)  # the name of an event file has the second
    folder = log_epochs("tensorboard", 3, 4)  # epoch 3 had no checkpoint
    events = EventAccumulator(str(folder / "tensorboard")).Reload()
    assert [(one.step, round(one.value, 3)) for one in events.Scalars("dice/liver")] == [
        (1, 0.1), (2, 0.2), (3, 0.3), (4, 0.4)
    ]  # fmt: skip
    assert set(events.Tags()["scalars"]) == {"train_loss", "lr", "dice/liver", "dice/Läsion (a, b)"}


def test_wandb_continues_the_same_run_offline(log_epochs: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("wandb")
    for name in [name for name in os.environ if name.startswith("WANDB")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("WANDB_MODE", "offline")
    log_epochs("wandb", 1, 2)
    folder = log_epochs("wandb", 3)
    runs = sorted((folder / "wandb").glob("offline-run-*/*.wandb"))
    assert [run.stem for run in runs] == 2 * [f"run-{(folder / 'wandb_run.txt').read_text()}"]
    wait_until(lambda: all(b"train_loss" in run.read_bytes() for run in runs))


def test_mlflow_continues_the_same_run(log_epochs: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    mlflow = pytest.importorskip("mlflow")
    for name in [name for name in os.environ if name.startswith("MLFLOW")]:
        monkeypatch.delenv(name)
    log_epochs("mlflow", 1, 2)
    folder = log_epochs("mlflow", 3)
    client = mlflow.MlflowClient(f"sqlite:///{folder.parents[1] / 'mlflow.db'}")
    (run,) = client.search_runs([client.get_experiment_by_name("Task04_Hippocampus").experiment_id])
    assert run.info.run_name == "tiny fold_0" and run.info.status == "FINISHED"
    assert run.data.params["training.epochs"] == "2" and "dice/Läsion _a_ b_" in run.data.metrics
    history = client.get_metric_history(run.info.run_id, "dice/liver")
    assert [(one.step, one.value) for one in history] == [(1, 0.1), (2, 0.2), (3, 0.3)]


def test_a_logger_that_fails_or_hangs_ends_no_training(
    log_epochs: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("tensorboard")
    folder = log_epochs("tensorboard")
    (folder / "tensorboard").write_text("")  # where a folder must be
    log_epochs("tensorboard", 1, 2)
    assert capfd.readouterr().err.count("warning: tensorboard gets no more metrics of this training: ") == 1

    release = threading.Event()
    package = callbacks._LOGGERS["tensorboard"][0]
    monkeypatch.setitem(callbacks._LOGGERS, "tensorboard", (package, lambda *_: release.wait()))
    monkeypatch.setattr(callbacks, "_PATIENCE", 1.2)
    monkeypatch.setattr(callbacks.log, "_SECONDS_BETWEEN_LINES", 0.2)
    begin = time.monotonic()
    log_epochs("tensorboard", 1, 2)
    assert time.monotonic() - begin < 5
    messages = capfd.readouterr().err
    assert "waiting for tensorboard: " in messages and "tensorboard has not answered for 1.2 s" in messages
    release.set()
