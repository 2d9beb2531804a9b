"""How far a fold has come and how long it will train, from what lies in its folder and beside it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from nnunet_lite.models.folder import MODEL, is_finished, length
from nnunet_lite.settings import Settings


def share_done(fold_folder: Path, settings: Settings) -> float:
    """How much of a fold's training is done, 0 to 1, as its last checkpoint says."""
    return _share(_checkpoint(fold_folder), settings)


def seconds_of_training(fold_folder: Path, settings: Settings) -> float | None:
    """Seconds that a fold takes in all: as folds of the same model did, with the validation; else at the pace of what
    is done of it or of them, else the time limit; None where nothing is known."""
    from nnunet_lite.models.checkpoint import read_state

    others = sorted(folder for folder in fold_folder.parent.glob("fold_*") if folder != fold_folder)
    finished = [read_state(folder / MODEL) for folder in others if is_finished(folder)]
    equal = [_whole(state) for state in finished if state.get("length") == length(settings)]
    if equal:
        return sum(equal) / len(equal)
    limit = settings.training.time_limit
    whole = None if limit is None else 60 * limit
    pace = next(_paces((fold_folder, *others), settings), None)
    return min((each for each in (pace, whole) if each is not None), default=None)


def _whole(state: dict[str, Any]) -> float:
    """Seconds of a finished fold: of its training, and of the validation as it was estimated."""
    validation = state.get("validation") or {"seconds": 0.0}
    return float(state["seconds"]) + float(validation["seconds"])


def _paces(folders: Iterable[Path], settings: Settings) -> Iterator[float]:
    """Seconds that a whole run takes by the checkpoints of folds; nothing of those that have only begun."""
    for state in map(_checkpoint, folders):
        if (share := _share(state, settings)) > 0:
            yield float(state["seconds"]) / share


def _checkpoint(fold_folder: Path) -> dict[str, Any]:
    from nnunet_lite.models.checkpoint import CHECKPOINT, read_state

    file = fold_folder / CHECKPOINT
    return read_state(file) if file.is_file() else {}


def _share(state: dict[str, Any], settings: Settings) -> float:
    training = settings.training
    done = float(state.get("epoch", 0)) / training.epochs
    by_time = 0.0 if training.time_limit is None else float(state.get("seconds", 0.0)) / (60 * training.time_limit)
    return min(1.0, max(done, by_time))
