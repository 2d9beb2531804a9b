"""What is known from the arguments of a command before its module, and with it torch, is imported, which takes seconds.

The functions in commands/ do not rely on it: Python calls them without this.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from nnunet_lite.commands import options
from nnunet_lite.commands.inventory import describe_training
from nnunet_lite.data.dataset import stored_dataset
from nnunet_lite.errors import UserError
from nnunet_lite.models.argument import find_models
from nnunet_lite.models.folder import model_folders, trained_folds
from nnunet_lite.models.lookup import choose_model
from nnunet_lite.planning.schema import Plan
from nnunet_lite.settings import load_settings
from nnunet_lite.training.splits import ALL, read_splits
from nnunet_lite.workspace import Paths, find_raw, planned_paths, select_dataset, workspace_folder

_LENGTHS = ("epochs", "iterations", "time_limit", "batch_size", "precision", "cache", "freeze")


def answer_early(command: str, given: dict[str, Any]) -> options.About | None:
    """Refuse a call whose arguments alone show that it cannot work, or answer one that only lists folds.

    Parameters
    ----------
    command : str
        Name of the subcommand.
    given : dict
        Its arguments.

    Returns
    -------
    About or None
        The list of folds, if `train` is to list them.

    Raises
    ------
    UserError
        There is no such recipe, setting, dataset, configuration, fold, model or image, or nothing is planned.
    """
    place, dataset = workspace_folder(given.get("workspace")), given.get("dataset")
    if command in ("train", "run"):
        changed = {f"training__{name}": given.get(name) for name in _LENGTHS}
        load_settings(given.get("recipe") or "default", options.overrides_of(given.get("settings"), **changed))
    if command == "run":
        find_raw(str(given.get("data")), place)
    elif command == "train" and (given.get("configuration") is None or given.get("fold") is None):
        paths = select_dataset(given.get("workspace"), dataset, only_reads=True)
        return describe_training(paths, given.get("configuration"), given.get("workspace"))
    elif command == "train":
        _check_folds(planned_paths(place, dataset), given)
    elif command == "predict":
        _check_prediction(place, dataset, given)
    elif command in ("select", "report", "preprocess"):
        planned_paths(place, dataset, only_reads=command == "report")
    return None


def _check_folds(paths: Paths, given: dict[str, Any]) -> None:
    """Refuse a configuration or a fold that does not exist; splits.json may not be written yet."""
    if not given["configuration"].isdecimal():
        Plan.read(paths.plans).configuration(given["configuration"])
    if paths.splits.is_file():
        for fold in set(options.names_of(given.get("fold")) or ()) - {ALL, "all-folds"}:
            read_splits(paths.splits, stored_dataset(paths.dataset), fold=fold)


def _check_prediction(place: Path, dataset: str | None, given: dict[str, Any]) -> None:
    """Refuse images or models that do not exist."""
    if missing := next((Path(path) for path in given.get("input", ()) if not Path(path).exists()), None):
        raise UserError("there is no such file or folder", missing)
    models = given.get("model", ())
    for model in models:
        find_models(model, place, dataset)
    if not models:
        paths = planned_paths(place, dataset, needs_plan=False)
        if not any(map(trained_folds, model_folders(paths))):
            choose_model(paths)
