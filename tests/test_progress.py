"""The picture of a run can be drawn from whatever rows there are."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from nnunet_lite.training.metrics import draw_metrics


def row(epoch: int, **more: Any) -> dict[str, Any]:
    return {"epoch": epoch, "train_loss": -0.1 * epoch, "lr": 0.01, **more}


SCORED: dict[str, Any] = {"validation_loss": 0.3, "dice": {"a": 0.5, "b": None}, "mean_dice": 0.5}


@pytest.mark.parametrize(
    "rows",
    [
        [row(1), row(2)],
        [row(1, **SCORED)],
        [row(1), row(2, **SCORED), row(3, **(SCORED | {"mean_dice": None}))],
        [row(1) | {"train_loss": math.nan}, row(2)],
        [row(1, **(SCORED | {"dice": {f"label {i}": 0.1 for i in range(30)}}))],
    ],
)
def test_rows_become_a_picture(tmp_path: Path, rows: list[dict[str, Any]]) -> None:
    path = tmp_path / "progress.png"
    draw_metrics(rows, path)
    with Image.open(path) as image:
        assert image.size == (900, 700)
        assert len(image.convert("RGB").getcolors(1 << 20) or []) > 10
    assert [p.name for p in tmp_path.iterdir()] == ["progress.png"]


def test_no_rows_make_no_picture(tmp_path: Path) -> None:
    draw_metrics([], tmp_path / "progress.png")
    assert not list(tmp_path.iterdir())
