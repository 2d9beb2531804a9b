"""The record of a run: lines of JSON, a CSV with one column per label, a picture drawn beside the training."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest
from PIL import Image

from nnunet_lite.errors import UserError
from nnunet_lite.training.metrics import METRICS, PICTURE, TABLE, Metrics, record_metrics, to_csv


def row(epoch: int, dice: float | None = 0.5) -> Metrics:
    return {"epoch": epoch, "train_loss": -0.1 * epoch, "lr": 0.01, "validation_loss": -0.2, "seconds": 1.0,
            "dice": {"liver": dice, "a, b": 0.25}, "mean_dice": dice}  # fmt: skip


def test_rows_become_json_csv_and_a_picture(tmp_path: Path) -> None:
    with record_metrics(tmp_path, 0, tensorboard=False) as record:
        record.add(row(1))
        record.add(row(2, None))
        assert len((tmp_path / METRICS).read_text().splitlines()) == 2  # at once, not at the end
    table = list(csv.DictReader((tmp_path / TABLE).open()))
    assert [line["epoch"] for line in table] == ["1", "2"]
    assert table[0]["dice/a, b"] == "0.25"
    assert table[1]["dice/liver"] == ""
    assert Image.open(tmp_path / PICTURE).size == (900, 700)


def test_going_on_keeps_the_epochs_that_the_checkpoint_has(tmp_path: Path) -> None:
    with record_metrics(tmp_path, 0, tensorboard=False) as record:
        for epoch in (1, 2, 3):
            record.add(row(epoch))
    with (tmp_path / METRICS).open("a") as file:
        file.write('{"epoch": 4, "dice')
    with record_metrics(tmp_path, 2, tensorboard=False) as record:
        assert [r["epoch"] for r in record.epochs] == [1, 2]
        record.add(row(3))
    assert [json.loads(line)["epoch"] for line in (tmp_path / METRICS).read_text().splitlines()] == [1, 2, 3]
    assert len(list(csv.DictReader((tmp_path / TABLE).open()))) == 3


def test_a_column_that_comes_later_is_empty_before() -> None:
    lines = to_csv([{"epoch": 1}, {"epoch": 2, "mean_dice": 0.5}]).splitlines()
    assert lines == ["epoch,mean_dice", "1,", "2,0.5"]


def test_tensorboard_is_written_or_asked_for(tmp_path: Path) -> None:
    try:
        import tensorboard  # noqa: F401
    except ImportError:
        with pytest.raises(UserError, match=r"TensorBoard is not installed.*track"), record_metrics(tmp_path, 0, True):
            pass
        return
    with record_metrics(tmp_path, 0, tensorboard=True) as record:
        record.add(row(1))
    assert list((tmp_path / "tensorboard").glob("events*"))


def test_a_picture_that_cannot_be_drawn_costs_nothing_else(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    (tmp_path / PICTURE).mkdir()
    with record_metrics(tmp_path, 0, tensorboard=False) as record:
        record.add(row(1))
    assert len((tmp_path / METRICS).read_text().splitlines()) == 1
    assert f"{PICTURE} could not be drawn: " in capfd.readouterr().err
