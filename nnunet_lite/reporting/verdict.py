"""How a training went, in a sentence, and the command to type next."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from nnunet_lite import log
from nnunet_lite.data.problems import plural
from nnunet_lite.models.folder import CHECKPOINT, training_command
from nnunet_lite.reporting.material import FoldHistory, ModelResults
from nnunet_lite.settings import Settings, TrainingSettings

_LEAST_EPOCHS = 6  # from which a trend can be seen
_PART = 5  # means over a fifth of the epochs are compared
_LEAST_PART = 3  # epochs, the shortest part over which a loss is compared
_FALLS = 0.05  # of the range of a loss: by how much its last mean is below the one before
_LEVEL = 0.005  # of that range: falls up to this are noise
_RISES = 0.1  # of the range of the held-out loss: by how much its last mean is above its lowest one


class Verdict(NamedTuple):
    """How the training of a model went.

    Parameters
    ----------
    model : str
        The model folder.
    text : str
        A sentence for the folds that went the same way.
    command : str
        The next one; empty if there is none.
    """

    model: str
    text: str
    command: str


class _FoldVerdict(NamedTuple):
    text: str
    continued_by: str = ""  # "resume" it, make it "longer", or nothing


def judge_training(model: ModelResults, folds: Sequence[str]) -> Verdict:
    """Say how far the folds of a model are, whether their loss still falls, and what to do next.

    Parameters
    ----------
    model : ModelResults
        A model with folds.
    folds : sequence of str
        All folds of the dataset.
    """
    training = Settings.model_validate(model.run["settings"]).training
    groups: dict[_FoldVerdict, list[str]] = defaultdict(list)
    for fold in model.begun:
        groups[_judge_fold(fold, training)].append(fold.name)
    text = "; ".join(f"{'fold' if len(names) == 1 else 'folds'} {', '.join(names)}: {verdict.text}"
                     for verdict, names in groups.items())  # fmt: skip
    todo: dict[str, list[str]] = defaultdict(list)
    for verdict, names in groups.items():
        todo[verdict.continued_by] += names
    command = _next_command(model, training, folds, todo)
    return Verdict(model.name, text, command and command + model.where)


def _next_command(
    model: ModelResults, training: TrainingSettings, folds: Sequence[str], todo: dict[str, list[str]]
) -> str:
    """Return the command that resumes a fold, makes the folds longer, or trains the next one."""
    folder = model.folder
    if "resume" in todo:
        return training_command(folder, todo["resume"][0])
    longer = [name for name in todo.get("longer", ()) if (folder / f"fold_{name}" / CHECKPOINT).is_file()]
    if longer:
        limit = training.time_limit
        changes = {"training.time_limit": 2 * limit} if limit else {"training.epochs": 2 * training.epochs}
        return training_command(folder, longer[0] if len(longer) == 1 else "all-folds", changes)
    trained = {"all", *folds} if model.folds[0].name == "all" else {fold.name for fold in model.folds}
    rest = [name for name in folds if name not in trained]
    return training_command(folder, rest[0]) if rest else ""


def _judge_fold(fold: FoldHistory, training: TrainingSettings) -> _FoldVerdict:
    """Say how the training of a fold ended, and how its losses moved over its last epochs."""
    done, patience = fold.rows[-1]["epoch"], training.early_stop
    is_finished = bool(fold.state) and fold.state.get("epochs", done) >= done  # otherwise it was made longer since
    planned = training.model_dump() | (fold.state.get("length", {}) if is_finished else {})
    is_limited, epochs = planned["time_limit"] is not None, planned["epochs"]
    length = f"{plural(done, 'epoch')} {f'in {log.duration(fold.seconds)}' if is_limited else f'of {epochs}'}"
    if not is_finished:
        return _FoldVerdict(f"not finished, {length}", "resume")
    if not is_limited and done < epochs:
        why = f"no better held-out Dice in {patience} epochs" if patience else "the learning rate fell below its limit"
        return _FoldVerdict(f"stopped early after {length}: {why}")
    keys = ("train_loss", "validation_loss", "mean_dice")
    train, held_out, dice = (_means([row.get(key) for row in fold.rows]) for key in keys)
    name, loss = ("held-out", held_out) if len(held_out) else ("training", train)
    if done < _LEAST_EPOCHS or not len(loss):
        return _FoldVerdict(f"finished, {length}; too few to see a trend")
    lowest = int(held_out.argmin()) if len(train) == len(held_out) == len(dice) else -1
    has_risen = held_out[-1] - held_out[lowest] > _RISES * np.ptp(held_out) if lowest >= 0 else False
    if has_risen and train[-1] < train[lowest] and dice[-1] <= dice[lowest]:
        return _FoldVerdict(
            f"overfits, {length}: since epoch {lowest + 1} the held-out loss rises and the training loss falls; "
            "more cases, more augmentation or a shorter run may help"
        )
    last = max(_LEAST_PART, done // _PART)
    fall, is_best_past = loss[-1 - last] - loss[-1], loss.argmin() < done - last
    by = f"by {fall:.2g} over the last {last} epochs"
    if fall > _FALLS * np.ptp(loss):
        return _FoldVerdict(f"finished, {length}: the {name} loss still falls, {by}", "longer")
    if is_best_past or fall <= _LEVEL * np.ptp(loss):
        return _FoldVerdict(f"finished, {length}: the {name} loss no longer falls")
    return _FoldVerdict(f"finished, {length}: the {name} loss falls slowly, {by}")


def _means(values: Sequence[float | None]) -> np.ndarray:
    """Return the means over the fifth of the epochs that ends at each epoch; empty if a value is missing."""
    known = [value for value in values if value is not None]
    n = max(2, len(known) // _PART)
    return np.array([np.mean(known[max(0, i + 1 - n) : i + 1]) for i in range(len(known))] if known == values else [])
