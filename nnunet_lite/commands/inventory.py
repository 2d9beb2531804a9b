"""`nnlite list` and `nnlite clean`: what a workspace holds, and which of it can be made again; without torch."""

from __future__ import annotations

import shlex
from collections import defaultdict
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from nnunet_lite import log
from nnunet_lite.commands import options
from nnunet_lite.data.dataset import stored_dataset
from nnunet_lite.data.problems import align
from nnunet_lite.errors import UserError
from nnunet_lite.files import is_locked, leftovers, locked, remove, size_of
from nnunet_lite.models import folder as models
from nnunet_lite.models.bundle import is_imported
from nnunet_lite.planning.schema import Plan
from nnunet_lite.settings import time_text
from nnunet_lite.system import has_no_gpu, in_units
from nnunet_lite.training.splits import ALL, N_FOLDS, read_splits
from nnunet_lite.workspace import Paths, datasets_of, planned_paths, workspace_folder

State = Literal["not started", "training", "interrupted", "not scored", "finished"]


@dataclass(frozen=True)
class FoldState:
    """How far a fold is.

    Parameters
    ----------
    configuration : str
        What is trained.
    model : str or None
        Name of the model folder; None if no model of the configuration exists.
    fold : str
        Such as "0" or "all".
    state : {"not started", "training", "interrupted", "not scored", "finished"}
        Training: a process trains it now. Not scored: it is trained, its held-out cases are not scored.
    epoch, epochs : int
        Epochs that are done, and of how many.
    mean_dice : float or None
        Of the held-out cases.
    time_limit : float or None
        In minutes.
    """

    configuration: str
    model: str | None
    fold: str
    state: State = "not started"
    epoch: int = 0
    epochs: int = 0
    mean_dice: float | None = None
    time_limit: float | None = None

    def to_text(self) -> str:
        if self.state in ("training", "interrupted"):
            end = f" of {self.epochs}" if self.time_limit is None else f", time limit {time_text(self.time_limit)}"
            return f"{self.state}, epoch {self.epoch}{end}"
        scores = "" if self.mean_dice is None else f", mean Dice {self.mean_dice:.4f}"
        return f"{self.state}{scores}"


def read_fold_states(folder: Path, folds: Sequence[str] = ()) -> list[FoldState]:
    """Return how far the folds of a model folder are; a folder that cannot be read gives a warning.

    Parameters
    ----------
    folder : Path
        The model folder.
    folds : sequence of str
        Folds to return although they have no folder, unless the model was imported.
    """
    try:
        run = models.read_run(folder)
        own = () if is_imported(folder) else folds
        names = sorted({*own, *(path.name.removeprefix("fold_") for path in folder.glob("fold_*"))})
        return [_read_fold_state(folder, run, name) for name in names]
    except UserError as error:
        log.warn(str(error))
        return []


def _read_fold_state(folder: Path, run: dict[str, Any], fold: str) -> FoldState:
    place = folder / f"fold_{fold}"
    files = (place / models.MODEL, place / models.CHECKPOINT)
    model, checkpoint = (models.read_weights_header(file) if file.is_file() else {} for file in files)
    trained, reached = model.get("epochs") or 0, checkpoint.get("epoch", 0)
    dice, training = models.held_out_dice(folder, [fold]), run["settings"]["training"]
    state: State = "not started"
    if is_locked(place):
        state = "training"
    elif models.is_at_end(place):
        scored = fold == ALL or is_imported(folder) or (place / models.VALIDATION / models.SUMMARY).is_file()
        state = "finished" if scored else "not scored"
    elif checkpoint:
        state = "interrupted"
    length = (max(trained, reached), training["epochs"], dice, training["time_limit"])
    return FoldState(run["configuration"], folder.name, fold, state, *length)


# --------------------------------------------------------------------------------------------------- train without fold


def describe_training(paths: Paths, configuration: str | None) -> options.About:
    """List the folds of a planned dataset with their state, and the command to type next.

    Parameters
    ----------
    paths : Paths
        Of the planned dataset.
    configuration : str, optional
        Only folds of this one.

    Raises
    ------
    UserError
        The plan has no such configuration.
    """
    plan = Plan.read(paths.plans)
    names = list(plan.configurations) if configuration is None else [configuration]
    plan.configuration(names[0])
    folds = [str(fold) for fold in range(N_FOLDS)] if plan.n_cases >= N_FOLDS else [ALL]
    if paths.splits.is_file():
        folds = [split.name for split in read_splits(paths.splits, stored_dataset(paths.dataset))]
    trained = [state for folder in models.model_folders(paths) for state in read_fold_states(folder, folds)]
    states: list[FoldState] = []
    for name in names:
        own = [state for state in trained if state.configuration == name]
        states += own or [FoldState(name, None, fold) for fold in folds]
    command = _next_command(paths, states) + paths.option
    lines = [("configuration", "model", "fold", "state")]
    lines += [(state.configuration, state.model or "-", state.fold, state.to_text()) for state in states]
    values = {"dataset": paths.name, "folds": [asdict(state) for state in states], "next": command}
    return options.About(values, f"{align(lines, left=4)}\nnext: {command}")


def _next_command(paths: Paths, states: Sequence[FoldState]) -> str:
    """Return the command that continues with the model that was trained last."""

    def written(state: FoldState) -> float:
        place = paths.models / str(state.model) / f"fold_{state.fold}"
        return max(
            (f.stat().st_mtime for f in (place / models.MODEL, place / models.CHECKPOINT) if f.is_file()), default=0
        )

    last = max(states, key=written)
    own = [state for state in states if state.model == last.model] if written(last) else list(states)
    todo = [state for state in own if state.state not in ("training", "finished")]
    todo.sort(key=lambda one: (one.model is None, one.state == "not started", one.configuration != "3d_fullres"))
    if todo:
        return _training_command(paths, todo[0])
    held_out = any(state.fold != ALL for state in own)
    to_select = held_out and not paths.inference.is_file()
    return "nnlite select" if to_select else "nnlite predict -i IMAGES -o SEGMENTATIONS"


def _training_command(paths: Paths, state: FoldState) -> str:
    """Return the command that trains a fold, with the settings that its model has."""
    if state.model is None:
        recipe = ("--recipe", "cpu") if has_no_gpu() else ()
        return shlex.join(["nnlite", "train", state.configuration, state.fold, *recipe])
    return models.training_command(paths.models / state.model, state.fold)


# ----------------------------------------------------------------------------------------------------------------- list


def list_workspace(*, dataset: options.OnlyDataset = None, workspace: options.Workspace = None) -> options.About:
    """List the datasets of a workspace, their models, folds and scores.

    Parameters
    ----------
    dataset : str, optional
        Only this dataset.
    workspace : str or Path, optional
        The workspace; default: NNLITE_WORKSPACE, otherwise ./nnlite_workspace.

    Returns
    -------
    About
        The list.

    Raises
    ------
    UserError
        There is no such dataset.

    Examples
    --------
    nnlite list
    nnlite list --json
    """
    place = workspace_folder(workspace)
    values, lines = [], [("dataset", "model", "folds", "mean Dice")]
    for paths in _datasets(place, dataset):
        found = {folder.name: read_fold_states(folder) for folder in models.model_folders(paths)}
        folds = [{"model": model, "folds": [asdict(state) for state in states]} for model, states in found.items()]
        values.append({"dataset": paths.name, "planned": paths.plans.is_file(), "models": folds})
        lines += [(paths.name, model, *_summary(paths.models / model, states)) for model, states in found.items()]
        lines += [] if found else [(paths.name, "no model yet", "", "")]
    text = align(lines, left=3) if values else f"{place}: nothing is planned here"
    return options.About({"workspace": str(place), "datasets": values}, text)


def _datasets(workspace: Path, dataset: str | None) -> list[Paths]:
    """Return the dataset that is given, or all."""
    if dataset is not None:
        return [planned_paths(workspace, dataset, needs_plan=False)]
    return [Paths(workspace / name) for name in datasets_of(workspace)]


def _summary(folder: Path, states: Sequence[FoldState]) -> tuple[str, str]:
    """Return the folds of a model by their state, and the Dice of all held-out cases."""
    by_state = defaultdict(list)
    for state in states:
        by_state[state.state].append(state.fold)
    dice = models.held_out_dice(folder, (state.fold for state in states))
    folds = "; ".join(f"fold{'s' * (len(names) > 1)} {', '.join(names)} {state}" for state, names in by_state.items())
    return folds or "none", "" if dice is None else f"{dice:.4f}"


# ---------------------------------------------------------------------------------------------------------------- clean


def clean(
    *,
    yes: Annotated[bool, options.general("-y", "--yes", help="Delete it, otherwise only list it.")] = False,
    dataset: options.OnlyDataset = None,
    workspace: options.Workspace = None,
) -> options.About:
    """Delete preprocessed cases and leftover temporary files, which can be made again.

    Models, plans, scores, predictions and raw data stay, and so do runs that were moved aside.

    Parameters
    ----------
    yes : bool
        Delete; otherwise list only.
    dataset : str, optional
        Only of this dataset.
    workspace : str or Path, optional
        The workspace; default: NNLITE_WORKSPACE, otherwise ./nnlite_workspace.

    Returns
    -------
    About
        The files and folders, with their sizes.

    Raises
    ------
    Busy
        A process trains or preprocesses one of the datasets; nothing is deleted.

    Examples
    --------
    nnlite clean
    nnlite clean --yes
    """
    place = workspace_folder(workspace)
    datasets = _datasets(place, dataset)
    with ExitStack() as stack:
        for paths in datasets if yes else ():
            for fold in paths.models.glob("*/fold_*"):
                stack.enter_context(models.lock_fold(fold))
            if paths.preprocessed.is_dir():
                stack.enter_context(locked(paths.preprocessed, "deleting what can be made again", wait=False))
        found = [path for paths in datasets for path in _removable(paths)]
        sizes = {path: size_of(path) for path in found}
        for path in found if yes else ():
            remove(path)
    total, did = in_units(sum(sizes.values())), "deleted" if yes else "can be made again; `--yes` deletes them"
    lines = [(str(path.relative_to(place)), in_units(size)) for path, size in sizes.items()]
    values = {"workspace": str(place), "deleted": yes, "files": {str(path): size for path, size in sizes.items()}}
    return options.About(values, f"{align(lines)}\n{total} {did}" if lines else "nothing to delete")


def _removable(paths: Paths) -> list[Path]:
    """Return what can be made again of a dataset."""
    store = paths.preprocessed
    indices = store.glob(f"*-{'[0-9a-f]' * 16}.json")  # see preprocessing/store.py
    arrays = [path for path in (store / "cases", paths.teachers, store / "raw.json", *indices) if path.exists()]
    return arrays + [path for path in leftovers(paths.root, "**/.tmp*") if not {*arrays} & {*path.parents}]
