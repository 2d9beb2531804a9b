"""The metrics of a run: lines of JSON, a CSV with a column per label, a picture; warnings about labels."""

from __future__ import annotations

import csv
import math
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from nnunet_lite.files import table_of, to_csv
from nnunet_lite.training.metrics import (
    METRICS,
    PICTURE,
    TABLE,
    LabelStatistics,
    Metrics,
    draw_metrics,
    record_metrics,
)


def metrics(epoch: int, dice: float | None = 0.5) -> Metrics:
    return {"epoch": epoch, "train_loss": -0.1 * epoch, "lr": 0.01, "validation_loss": -0.2, "seconds": 1.0,
            "dice": {"liver": dice, "a, b": 0.25}, "mean_dice": dice}  # fmt: skip


def test_metrics_become_json_csv_and_a_picture(tmp_path: Path) -> None:
    with record_metrics(tmp_path, 0) as recorder:
        recorder.add(metrics(1))
        recorder.add(metrics(2, None))
        assert len((tmp_path / METRICS).read_text().splitlines()) == 2  # at once, not at the end
    table = list(csv.DictReader((tmp_path / TABLE).open()))
    assert [line["epoch"] for line in table] == ["1", "2"]
    assert table[0]["dice/a, b"] == "0.25"
    assert table[1]["dice/liver"] == ""
    assert Image.open(tmp_path / PICTURE).size == (900, 700)


def test_a_column_that_comes_later_is_empty_before() -> None:
    lines = to_csv(table_of([{"epoch": 1}, {"epoch": 2, "mean_dice": 0.5}])).splitlines()
    assert lines == ["epoch,mean_dice", "1,", "2,0.5"]


def test_a_picture_that_cannot_be_drawn_costs_nothing_else(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    (tmp_path / PICTURE).mkdir()
    with record_metrics(tmp_path, 0) as recorder:
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
    draw_metrics([], tmp_path / "nothing.png")
    draw_metrics(epochs, tmp_path / "progress.png")
    with Image.open(tmp_path / "progress.png") as image:
        assert image.size == (900, 700)
        assert len(image.convert("RGB").getcolors(1 << 20) or []) > 10
    assert [p.name for p in tmp_path.iterdir()] == ["progress.png"]


def test_a_label_whose_dice_stays_zero_is_reported_once(capfd: pytest.CaptureFixture[str]) -> None:
    labels = LabelStatistics()
    for _ in range(20):
        labels.warn_of_zero_dice({"liver": 0.0}, 0.02)  # early in a long run
    labels = LabelStatistics()
    for epoch in range(1, 10):
        labels.warn_of_zero_dice({"liver": 0.0 if epoch < 9 else 0.1, "tumour": 0.0 if epoch != 4 else None}, 0.5)
    labels.warn_of_zero_dice({}, 0.5)  # an epoch without a validation does not count
    assert capfd.readouterr().err == ""
    for _ in range(3):
        labels.warn_of_zero_dice({"liver": 0.0, "tumour": 0.0}, 0.5)
    warning = capfd.readouterr().err
    assert warning.count("warning") == 1 and "tumour has had a Dice of 0 in all of 10 epochs" in warning
