"""What is known from the arguments of a command before its module, and with it torch, is imported, which takes seconds.

The functions in commands/ do not rely on it: Python calls them without this.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from nnunet_lite.commands import options
from nnunet_lite.commands.inventory import describe_training
from nnunet_lite.data.dataset import stored_dataset
from nnunet_lite.errors import no_such_file
from nnunet_lite.models.argument import find_models
from nnunet_lite.models.folder import model_folders, trained_folds
from nnunet_lite.models.lookup import choose_model
from nnunet_lite.planning.schema import Plan
from nnunet_lite.settings import load_settings
from nnunet_lite.training.launch import launch
from nnunet_lite.training.splits import ALL, N_FOLDS, read_splits
from nnunet_lite.workspace import Paths, find_raw, planned_paths, select_dataset, workspace_folder

_OPTIONS = ("epochs", "iterations", "time_limit", "batch_size", "precision", "cache", "freeze")


def answer_early(command: str, given: dict[str, Any]) -> options.About | None:
    """Refuse a call whose arguments alone show that it cannot work, or answer one that only lists folds.

    With --gpus, the processes that train are started, and this one ends with them.

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
    if command in ("train", "distill", "run"):
        changed = {f"training__{name}": given.get(name) for name in _OPTIONS}
        changed |= {"training__patch_size": options.patch_of(given.get("patch_size"))}
        changed |= {"training__init": str(given["init"])} if given.get("init") else {}
        overrides = options.overrides_of(given.get("settings"), optimizer__lr=given.get("lr"), **changed)
        load_settings(given.get("recipe") or "default", overrides)
    if command == "run" and not Path(given["data"]).exists():
        find_raw(str(given.get("data")), place)
    elif command == "train" and (given.get("configuration") is None or given.get("fold") is None):
        paths = select_dataset(given.get("workspace"), dataset, only_reads=True)
        return describe_training(paths, given.get("configuration"))
    elif command == "train" and not given["configuration"].isdecimal():  # otherwise the words are in another order
        _check_folds(planned_paths(place, dataset), given)
    elif command == "distill":
        for model in options.names_of(given["models"]) or ():
            find_models(model, place, dataset)
    elif command == "predict":
        _check_prediction(place, dataset, given)
    elif command in ("select", "report"):
        planned_paths(place, dataset, only_reads=command == "report")
    if command == "train" and given["gpus"] > 1:
        launch(given["gpus"])
    return None


def _check_folds(paths: Paths, given: dict[str, Any]) -> None:
    """Refuse a configuration or a fold that does not exist."""
    Plan.read(paths.plans).configuration(given["configuration"])
    other_folds = given.get("folds") or given.get("splits")
    for fold in set(options.names_of(given["fold"]) or ()) - {ALL, "all-folds"}:
        is_usual = fold in map(str, range(N_FOLDS))
        if not other_folds and (paths.splits.is_file() or not is_usual):  # it is written when a fold begins
            read_splits(paths.splits, stored_dataset(paths.dataset), fold=fold)


def _check_prediction(place: Path, dataset: str | None, given: dict[str, Any]) -> None:
    """Refuse models or images that do not exist."""
    models = given.get("model") or ()
    for model in models:
        find_models(model, place, dataset)
    if not models:
        paths = planned_paths(place, dataset, needs_plan=False)
        if not any(map(trained_folds, model_folders(paths))):
            choose_model(paths)
    if missing := next((Path(path) for path in given["input"] if not Path(path).exists()), None):
        raise no_such_file(missing)
