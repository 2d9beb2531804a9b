"""The verdict on a training: curves whose course is known get the sentence and the command that fit them."""

from __future__ import annotations

import re
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from nnunet_lite.evaluation.scores import Scores
from nnunet_lite.files import read_json, write_json
from nnunet_lite.models.folder import CHECKPOINT
from nnunet_lite.planning.schema import Plan
from nnunet_lite.reporting.material import FoldHistory, ModelResults
from nnunet_lite.reporting.verdict import judge_training
from nnunet_lite.workspace import planned_paths

FALLING = np.exp(-np.arange(50) / 40)
LEVEL = np.exp(-np.arange(50) / 4)
RISING = LEVEL + np.maximum(0, np.arange(50) - 20) / 60


def history(
    train: np.ndarray, held_out: np.ndarray | None, dice: np.ndarray | None = None, **state: Any
) -> FoldHistory:
    """A fold with some noise in its losses."""
    draws = np.random.default_rng(0)
    rows = []
    for i, loss in enumerate(train):
        row = {"epoch": i + 1, "train_loss": loss + 0.003 * draws.normal(), "seconds": 2.0}
        if held_out is not None:
            row |= {
                "validation_loss": held_out[i] + 0.003 * draws.normal(),
                "mean_dice": 0.8 if dice is None else dice[i],
            }
        rows.append(row)
    return FoldHistory("0", tuple(rows), state)


@pytest.fixture
def verdict(tiny_workspace: Path, tiny_model: Path, tmp_path: Path) -> Any:
    """Judge a fold of a model with changes to the settings of its training."""
    workspace = tmp_path / "w"
    shutil.copytree(tiny_workspace, workspace, ignore=shutil.ignore_patterns("preprocessed"))
    paths = planned_paths(workspace)

    def judge(
        fold: FoldHistory, folds: tuple[str, ...] = ("0",), *more: FoldHistory, **training: Any
    ) -> tuple[str, str]:
        run = read_json(tiny_model / "run.json")
        run["settings"]["training"] |= {"epochs": 50, **training}
        write_json(paths.models / "tiny" / "run.json", run)
        plan, scores = Plan.read(paths.plans), Scores((), Plan.read(paths.plans).labels)
        model = ModelResults(paths.models / "tiny", "tiny", run, plan, (fold, *more), scores, {})
        _, text, command = judge_training(model, folds)
        return text, command

    return judge


def test_each_course_has_its_verdict(verdict: Any) -> None:
    done = {"epochs": 50}
    text, command = verdict(history(FALLING, FALLING, **done))
    assert text == "fold 0: finished, 50 epochs of 50: the held-out loss still falls, by 0.093 over the last 10 epochs"
    assert command.startswith("nnlite train 3d_fullres 0 --epochs 100 ") and " --name tiny -w " in command
    text, command = verdict(history(LEVEL, LEVEL, **done))
    assert text == "fold 0: finished, 50 epochs of 50: the held-out loss no longer falls" and command == ""
    assert verdict(history(LEVEL, LEVEL, **done), ("0", "1"))[1].startswith("nnlite train 3d_fullres 1 --epochs 50 ")
    text, command = verdict(history(FALLING, RISING, **done))
    assert text.startswith("fold 0: overfits, 50 epochs of 50: since epoch ") and command == ""
    assert 15 <= int(text.split("since epoch ")[1].split()[0]) <= 30
    text, _ = verdict(history(FALLING, RISING, np.linspace(0.5, 0.9, 50), **done))
    assert "overfits" not in text, "the Dice still rises"
    text, _ = verdict(history(FALLING, None, **done))
    assert "50 epochs of 50: the training loss still falls, by " in text


def test_how_a_training_ended(verdict: Any) -> None:
    text, command = verdict(history(FALLING[:9], FALLING[:9]))
    assert text == "fold 0: not finished, 9 epochs of 50" and command.startswith(
        "nnlite train 3d_fullres 0 --epochs 50 "
    )
    text, _ = verdict(history(LEVEL[:30], LEVEL[:30], epochs=30), early_stop=10)
    assert text == "fold 0: stopped early after 30 epochs of 50: no better held-out Dice in 10 epochs"
    text, command = verdict(history(FALLING, FALLING, epochs=50, seconds=120.0), epochs=1000, time_limit=2.0)
    assert "finished, 50 epochs in 2:00 min: the held-out loss still falls, by " in text
    assert "--time-limit 4m" in command
    text, command = verdict(history(FALLING[:12], FALLING[:12], epochs=8, length={"epochs": 8, "time_limit": None}))
    assert text == "fold 0: not finished, 12 epochs of 50" and " --epochs 50 " in command, "a run that was made longer"
    text, _ = verdict(history(LEVEL[:20], LEVEL[:20], epochs=20, length={"epochs": 20, "time_limit": None}))
    assert (
        text == "fold 0: finished, 20 epochs of 20: the held-out loss falls slowly, by 0.02 over the last 4 epochs"
    ), "another is longer"
    slow = -np.array([0.1, 0.4, 0.6, 0.7, 0.73, 0.7436, 0.7506, 0.7583, 0.7652, 0.7682])  # it falls to the end
    text, command = verdict(history(slow, slow, epochs=10), epochs=10)
    assert re.search("the held-out loss falls slowly, by 0.018 over the last 3 epochs$", text) and command == ""
    text, _ = verdict(history(FALLING[:3], FALLING[:3], epochs=3), epochs=3)
    assert text == "fold 0: finished, 3 epochs of 3; too few to see a trend"


def test_folds_of_different_lengths_are_all_made_longer(verdict: Any, tmp_path: Path) -> None:
    three = [replace(history(FALLING[:n], FALLING[:n], epochs=n), name=str(i)) for i, n in enumerate((50, 40, 30))]
    for fold in three:
        folder = planned_paths(tmp_path / "w").models / "tiny" / f"fold_{fold.name}"
        folder.mkdir(exist_ok=True)
        (folder / CHECKPOINT).touch()
    text, command = verdict(three[0], ("0", "1", "2"), *three[1:], epochs=1000, time_limit=2.0)
    assert text.count("still falls") == 3 and command.startswith("nnlite train 3d_fullres all-folds ")
