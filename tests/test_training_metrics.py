"""The metrics of a run: lines of JSON, a CSV with a column per label, a picture; warnings about labels."""

from __future__ import annotations

import csv
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from nnunet_lite.data.labels import Labels
from nnunet_lite.errors import UserError
from nnunet_lite.training.distributed import ALONE
from nnunet_lite.training.metrics import (
    METRICS,
    PICTURE,
    TABLE,
    LabelStatistics,
    Metrics,
    count_voxels,
    draw_metrics,
    record_metrics,
    to_csv,
)

LABELS = Labels(names={"background": 0, "liver": 1, "tumour": 2})


def metrics(epoch: int, dice: float | None = 0.5) -> Metrics:
    return {"epoch": epoch, "train_loss": -0.1 * epoch, "lr": 0.01, "validation_loss": -0.2, "seconds": 1.0,
            "dice": {"liver": dice, "a, b": 0.25}, "mean_dice": dice}  # fmt: skip


def test_metrics_become_json_csv_and_a_picture(tmp_path: Path) -> None:
    with record_metrics(tmp_path, 0, tensorboard=False) as recorder:
        recorder.add(metrics(1))
        recorder.add(metrics(2, None))
        assert len((tmp_path / METRICS).read_text().splitlines()) == 2  # at once, not at the end
    table = list(csv.DictReader((tmp_path / TABLE).open()))
    assert [line["epoch"] for line in table] == ["1", "2"]
    assert table[0]["dice/a, b"] == "0.25"
    assert table[1]["dice/liver"] == ""
    assert Image.open(tmp_path / PICTURE).size == (900, 700)


def test_resuming_keeps_the_epochs_that_the_checkpoint_has(tmp_path: Path) -> None:
    with record_metrics(tmp_path, 0, tensorboard=False) as recorder:
        for epoch in (1, 2, 3):
            recorder.add(metrics(epoch))
    with (tmp_path / METRICS).open("a") as file:
        file.write('{"epoch": 4, "dice')
    with record_metrics(tmp_path, 2, tensorboard=False) as recorder:
        assert [m["epoch"] for m in recorder.epochs] == [1, 2]
        recorder.add(metrics(3))
    assert [json.loads(line)["epoch"] for line in (tmp_path / METRICS).read_text().splitlines()] == [1, 2, 3]
    assert len(list(csv.DictReader((tmp_path / TABLE).open()))) == 3


def test_a_column_that_comes_later_is_empty_before() -> None:
    lines = to_csv([{"epoch": 1}, {"epoch": 2, "mean_dice": 0.5}]).splitlines()
    assert lines == ["epoch,mean_dice", "1,", "2,0.5"]


def test_tensorboard_is_written_or_named_as_missing(tmp_path: Path) -> None:
    try:
        import tensorboard  # noqa: F401
    except ImportError:
        with pytest.raises(UserError, match=r"TensorBoard is not installed.*track"), record_metrics(tmp_path, 0, True):
            pass
        return
    with record_metrics(tmp_path, 0, tensorboard=True) as recorder:
        recorder.add(metrics(1))
    assert list((tmp_path / "tensorboard").glob("events*"))


def test_a_picture_that_cannot_be_drawn_costs_nothing_else(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    (tmp_path / PICTURE).mkdir()
    with record_metrics(tmp_path, 0, tensorboard=False) as recorder:
        recorder.add(metrics(1))
    assert len((tmp_path / METRICS).read_text().splitlines()) == 1
    assert f"{PICTURE} could not be drawn: " in capfd.readouterr().err


SHORT: Metrics = {"epoch": 1, "train_loss": -0.1, "lr": 0.01}  # without a pseudo-validation
MANY = {"dice": {f"label {i}": 0.1 for i in range(30)}}


@pytest.mark.parametrize(
    "epochs",
    [
        [SHORT, SHORT | {"epoch": 2}],
        [metrics(1)],
        [SHORT, metrics(2), metrics(3, None)],
        [SHORT | {"train_loss": math.nan}, SHORT | {"epoch": 2, "train_loss": None}],
        [metrics(1) | MANY],
    ],
)
def test_any_metrics_become_a_picture(tmp_path: Path, epochs: list[dict[str, Any]]) -> None:
    draw_metrics(epochs, tmp_path / "progress.png")
    with Image.open(tmp_path / "progress.png") as image:
        assert image.size == (900, 700)
        assert len(image.convert("RGB").getcolors(1 << 20) or []) > 10
    assert [p.name for p in tmp_path.iterdir()] == ["progress.png"]


def test_no_metrics_make_no_picture(tmp_path: Path) -> None:
    draw_metrics([], tmp_path / "progress.png")
    assert not list(tmp_path.iterdir())


def test_voxels_are_counted_per_patch_and_class() -> None:
    classes = torch.tensor([[[0, 1], [1, 3]], [[2, 2], [0, 0]]], dtype=torch.uint8)
    assert count_voxels(classes, 4).tolist() == [[1, 2, 0, 1], [2, 0, 2, 0]]
    many = torch.randint(0, 119, (3, 20, 20, 20), generator=torch.Generator().manual_seed(0))
    expected = torch.stack([torch.bincount(patch.flatten(), minlength=119) for patch in many])
    assert torch.equal(count_voxels(many, 119).long(), expected)


def test_a_label_that_no_patch_shows_is_reported_once(capfd: pytest.CaptureFixture[str]) -> None:
    labels = LabelStatistics()
    labels.count(torch.tensor([[90.0, 10.0, 0.0]]), LABELS, ALONE)
    labels.count(torch.tensor([[100.0, 0.0, 0.0]]), LABELS, ALONE)  # as after a signal in the middle of the epoch
    assert labels.patches == [1, 0, 2]
    assert capfd.readouterr().err == ""
    labels.warn_of_missing(LABELS)
    warning = capfd.readouterr().err
    assert "tumour was in none of the 2 patches" in warning and "liver" not in warning
    for _ in range(30):
        labels.warn_of_zero_dice({"liver": 0.3, "tumour": 0.0}, 1.0)
    assert capfd.readouterr().err == ""


def test_a_label_whose_dice_stays_zero_is_reported(capfd: pytest.CaptureFixture[str]) -> None:
    labels = LabelStatistics()
    labels.count(torch.tensor([[899.0, 100.0, 1.0], [1000.0, 0.0, 0.0]]), LABELS, ALONE)
    for epoch in range(1, 10):
        labels.warn_of_zero_dice({"liver": 0.0 if epoch < 9 else 0.1, "tumour": 0.0 if epoch != 4 else None}, 0.5)
    labels.warn_of_zero_dice({}, 0.5)  # an epoch without a validation does not count
    assert capfd.readouterr().err == ""
    for _ in range(3):
        labels.warn_of_zero_dice({"liver": 0.0, "tumour": 0.0}, 0.5)
    warning = capfd.readouterr().err
    assert warning.count("warning") == 1
    assert "tumour has had a Dice of 0 in all of 10 epochs; it is in 50% of the patches" in warning


def test_early_in_a_long_run_a_dice_of_zero_is_not_reported(capfd: pytest.CaptureFixture[str]) -> None:
    labels = LabelStatistics()
    for _ in range(20):
        labels.warn_of_zero_dice({"liver": 0.0}, 0.02)
    assert capfd.readouterr().err == ""
