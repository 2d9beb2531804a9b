"""Choose the best model that is trained, and read what a model is, without torch."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from nnunet_lite import log
from nnunet_lite.errors import UserError
from nnunet_lite.files import hash_of, read_json, understood
from nnunet_lite.models.folder import (
    MODEL,
    Checkpoint,
    add_weights,
    first_training,
    held_out_dice,
    is_finished,
    model_folders,
    other_folds,
    read_run,
    read_weights_header,
    trained_folds,
    weight_files,
    why_not_held_out,
)
from nnunet_lite.planning.schema import Plan
from nnunet_lite.workspace import Paths


def read_model(folder: Path) -> tuple[Plan, dict[str, Any]]:
    """Read plans.json and run.json of a model folder.

    Raises
    ------
    UserError
        It is no model folder, or one of its files is not as nnlite writes it.
    """
    run = read_run(folder)
    return Plan.read(folder / "plans.json"), run


def read_headers(folder: Path, plan: Plan, configuration: str, folds: Iterable[str]) -> dict[str, dict[str, Any]]:
    """Return the header of the weights of each fold, and refuse weights that were trained with another plan.

    Parameters
    ----------
    folder : Path
        The model folder.
    plan, configuration : Plan, str
        Of the model.
    folds : iterable of str
        Names of folds.

    Raises
    ------
    UserError
        A fold was trained with another spacing, orientation or normalisation, as one of another model folder, or it is
        of another configuration; or its weights cannot be read.
    """
    headers = {fold: read_weights_header(folder / f"fold_{fold}" / MODEL) for fold in folds}
    now = plan.input_values(configuration)
    for fold, header in headers.items():
        if (of := header.get("configuration", configuration)) != configuration:
            what = f"was trained for {of}, and the model is of {configuration}"
            raise UserError(what, folder / f"fold_{fold}", "Put it back into the model folder that it comes from.")
        before = header.get("inputs", {})  # older weights and those of nnU-Net have none
        both = [key for key in before if key in now]
        if changed := [f"{key} = {before[key]}, not {now[key]}" for key in both if before[key] != now[key]]:
            fix = "Undo the edit of plans.json, or put the fold back into the model folder that it comes from."
            raise UserError(f"was trained with another plan: {'; '.join(changed)}", folder / f"fold_{fold}", fix)
    return headers


def model_fingerprint(folder: Path, folds: Iterable[str], checkpoint: Checkpoint = "final") -> str:
    """Hash the plan of a model, and of the weights of each fold the size and first megabytes: 16 hexadecimal digits.

    Raises
    ------
    UserError
        The weights of a fold are gone.
    """
    files, digest = weight_files(folder, checkpoint), hashlib.sha256(hash_of(read_json(folder / "plans.json")).encode())
    for fold in folds:
        if fold not in files:
            raise UserError(f"the weights of fold {fold} are gone", folder, "Train it again.")
        add_weights(digest, files[fold])
    return digest.hexdigest()[:16]


def describe_folder(folder: Path) -> dict[str, Any]:
    """Return what a model folder contains, as values for JSON: its plan, its settings, and each finished fold.

    Raises
    ------
    UserError
        As `read_model`; or a file of weights or scores cannot be read.
    """
    plan, run = read_model(folder)
    planned, folds = plan.configuration(run["configuration"]), {}
    for fold, state in read_headers(folder, plan, run["configuration"], trained_folds(folder)).items():
        with understood(folder / f"fold_{fold}" / MODEL):
            folds[fold] = {"epochs": state["epochs"], "seconds": float(state["seconds"]), **state}
        folds[fold] |= {"mean_dice": held_out_dice(folder, [fold]), "note": why_not_held_out(folder / f"fold_{fold}")}
    return {
        "dataset": plan.dataset,
        "configuration": run["configuration"],
        "first_stage": run.get("previous"),
        "recipe": run["settings"]["recipe"],
        "channels": [channel.name for channel in plan.channels],
        "labels": plan.labels.to_json(),
        "orientation": plan.orientation,
        "spacing": planned.spacing,
        "patch_size": planned.patch_size,
        "batch_size": planned.batch_size,
        "network": planned.network.model_dump(),
        "folds": folds,
        "unfinished_folds": [
            name.removeprefix("fold_") for name in other_folds(folder, "") if not is_finished(folder / name)
        ],
        **{key: run[key] for key in ("seed", "versions", "settings")},
    }


def choose_model(paths: Paths, configuration: str | None = None) -> Path:
    """Choose the trained model with the most folds, and among equals the one with the best validation Dice.

    Models whose files cannot be read are left out, with a warning. The first stage of a cascade whose second stage is
    trained is chosen only if `configuration` names it.

    Parameters
    ----------
    paths : Paths
        The files of a dataset in the workspace.
    configuration : str, optional
        A configuration such as "3d_fullres", or the name of a model.

    Raises
    ------
    UserError
        No model (of that configuration) is trained.
    """
    runs, dice_of = dict[Path, dict[str, Any]](), dict[Path, float]()
    for folder in model_folders(paths):
        try:
            if folds := trained_folds(folder):
                dice_of[folder] = held_out_dice(folder, folds) or 0.0
                runs[folder] = read_run(folder)
        except UserError as error:
            log.warn(f"model {folder.name} is left out: {error}")
    first_stages = {run.get("previous") for run in runs.values()} if configuration is None else set()
    found = [
        (len(trained_folds(folder)), dice_of[folder], folder)
        for folder, run in runs.items()
        if configuration in (None, folder.name, run["configuration"]) and folder.name not in first_stages
    ]
    if not found:
        of = f" {configuration}" if configuration else ""
        have = [f"{folder.name} ({run['configuration']})" for folder, run in runs.items()]
        fix = f"Trained: {', '.join(have)}."
        if paths.plans.is_file() and (not have or configuration in Plan.read(paths.plans).configurations):
            fix = f"Run `{first_training(paths, configuration)}`."
        raise UserError(f"no{of} model of {paths.name} is trained", paths.models, fix)
    n_folds, dice, best = max(found)
    if len(found) > 1:
        why = f"most folds ({n_folds})" + (f", then best Dice on held-out cases ({dice:.3f})" if dice else "")
        log.info(f"{len(found)} models are trained; {best.name} is used: {why}. -m chooses another one")
    return best


def first_common_fold(folders: Sequence[Path], checkpoint: Checkpoint = "final") -> list[str] | None:
    """Return the first fold that all of these models have trained; None for a zip, whose folds are not known yet."""
    have = [trained_folds(folder, checkpoint) for folder in folders]
    common = [fold for fold in have[0] if all(fold in others for others in have)]
    return common[:1] or None
