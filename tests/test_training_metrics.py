"""The metrics of a run: lines of JSON, a CSV with a column per label, a picture; warnings about labels."""

from __future__ import annotations

import csv
import math
from dataclasses import replace
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
    warn_of_absent,
)


def metrics(epoch: int, dice: float | None = 0.5) -> Metrics:
    return {"epoch": epoch, "train_loss": -0.1 * epoch, "lr": 0.01, "validation_loss": -0.2, "seconds": 1.0,
            "dice": {"liver": dice, "a, b": 0.25}, "mean_dice": dice}  # fmt: skip


def test_metrics_become_json_csv_and_a_picture(tmp_path: Path) -> None:
    with record_metrics(tmp_path, 0) as record:
        record(metrics(1))
        record(metrics(2, None))
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
    with record_metrics(tmp_path, 0) as record:
        record(metrics(1))
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


def test_a_label_whose_dice_stays_zero_is_reported_once(
    tiny_cases: list[Any], capfd: pytest.CaptureFixture[str]
) -> None:
    """With how rare it is, and how often patches are centred on it."""
    anterior = {1: tiny_cases[0].foreground[1]}
    cases = [*tiny_cases[:2], *(replace(case, foreground=anterior) for case in tiny_cases[2:])]
    labels = LabelStatistics()
    for _ in range(20):
        labels.warn_of_zero_dice({"liver": 0.0}, 0.02, cases, 0.33)  # early in a long run
    labels = LabelStatistics()
    for epoch in range(1, 10):
        dice = {"liver": 0.0 if epoch < 9 else 0.1, "tumour": 0.0 if epoch != 4 else None}
        labels.warn_of_zero_dice(dice, 0.5, cases, 0.33)
    labels.warn_of_zero_dice({}, 0.5, cases, 0.33)  # an epoch without a validation does not count
    assert capfd.readouterr().err == ""
    for _ in range(3):
        labels.warn_of_zero_dice({"liver": 0.0, "tumour": 0.0}, 0.5, cases, 0.33)
    warning = capfd.readouterr().err
    assert warning.count("warning") == 1 and "tumour has had a Dice of 0 in all of 10 epochs" in warning
    share = sum((case.label[:] == 2).sum() for case in cases[:2]) / sum(case.label[:].size for case in cases)
    assert f"It is in 2 of 10 training cases, {100 * share:.2g} % of their voxels" in warning
    assert "3.3 % of the patches are centred on it" in warning, "a third, in two of ten cases, of two labels"


def test_a_label_of_no_training_case_is_reported(tiny_cases: list[Any], capfd: pytest.CaptureFixture[str]) -> None:
    names = ("Anterior", "Posterior")
    warn_of_absent(names, tiny_cases)
    assert capfd.readouterr().err == ""
    warn_of_absent(names, [replace(case, foreground={1: case.foreground[1]}) for case in tiny_cases])
    assert "warning: no training case of this fold has Posterior, which the network" in capfd.readouterr().err
