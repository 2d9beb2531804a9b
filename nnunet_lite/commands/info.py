"""`nnlite info`: describe a model, or a planned dataset and its models."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from nnunet_lite import log
from nnunet_lite.commands import options
from nnunet_lite.data.dataset import stored_dataset
from nnunet_lite.data.problems import plural
from nnunet_lite.errors import UserError
from nnunet_lite.evaluation.selection import changed_models, describe_rules, packed_rules, read_selection
from nnunet_lite.files import read_json, understood
from nnunet_lite.models.argument import as_model_folder, find_models
from nnunet_lite.models.folder import QUALITY, Checkpoint, first_training, is_model, model_folders
from nnunet_lite.models.lookup import describe_folder, read_model
from nnunet_lite.planning.schema import Plan
from nnunet_lite.planning.show import length_unit, plan_table
from nnunet_lite.planning.topology import join_by_x
from nnunet_lite.system import expand_home
from nnunet_lite.workspace import Paths, select_dataset, workspace_folder


def show_info(
    model: Annotated[
        str | Path | None,
        typer.Argument(help="Model folder, nnU-Net's too, or zip.", show_default="all models of a planned dataset"),
    ] = None,
    *,
    checkpoint: options.WhichCheckpoint = "final",
    dataset: options.DatasetName = None,
    workspace: options.Workspace = None,
) -> options.About:
    """Describe a model, how it was made and how well it scores; or a planned dataset and its models.

    Parameters
    ----------
    model : str or Path, optional
        Model folder, ours or nnU-Net's, zip or name, or a folder of several; default: describe the dataset.
    checkpoint : {"final", "best"}
        Which of nnU-Net's checkpoints to read.
    dataset : str, optional
        Planned dataset; default: the only one.
    workspace : str or Path, optional
        The workspace; default: NNLITE_WORKSPACE, otherwise ./nnlite_workspace.

    Returns
    -------
    About
        The description.

    Raises
    ------
    UserError
        There is no such model, or no dataset is planned.

    Examples
    --------
    nnlite info
    nnlite info model.zip --json
    """
    if model is not None:
        given = expand_home(model)
        if given.is_file() and is_model(folder := given.absolute().parent.parent):  # weights of a fold
            given, checkpoint = folder, "best" if given.name == "checkpoint_best.pth" else checkpoint
        found = find_models(given, workspace_folder(workspace), dataset)
        models = [describe_model(path, checkpoint) for path in found]
        values = models[0].values if len(models) == 1 else {"models": [one.values for one in models]}
        return options.About(values, "\n\n".join(one.text for one in models))
    return describe_dataset(select_dataset(workspace, dataset, only_reads=True, needs_plan=False))


def describe_model(model: Path, checkpoint: Checkpoint = "final") -> options.About:
    """Describe a model folder, ours or nnU-Net's, or an exported zip, without running code that it may contain.

    Parameters
    ----------
    model : Path
        The folder or zip.
    checkpoint : {"final", "best"}
        Which checkpoint of each fold to describe, for a model of nnU-Net.

    Raises
    ------
    UserError
        It is not a model.
    """
    with as_model_folder(model, checkpoint) as folder:
        plan, values = read_model(folder)[0], {"model": str(model), **describe_folder(folder)}
        rules, quality = packed_rules(folder), folder / QUALITY
        with understood(quality):
            calibrated = list(read_json(quality)["weights"]) if quality.is_file() else []
    values |= {"postprocessing": {label: str(rule) for label, rule in rules.items()}, "calibrated": calibrated}
    network = values["network"]
    axes = f"images are reoriented to {plan.orientation}"
    if plan.orientation is None:
        axes = "orientation not known: images are used as they are stored"
    lines = [
        f"{model}: {values['configuration']} of {plan.dataset}, recipe {values['recipe']}",
        f"channels  {', '.join(values['channels'])}",
        f"labels    {', '.join(plan.labels.region_names)}",
        f"axes      {axes}",
        f"spacing   {join_by_x(values['spacing'])} {length_unit(plan)}, patch {join_by_x(values['patch_size'])}",
        f"network   {network['kind']}, features {'-'.join(map(str, network['features']))}, {network['norm']} norm",
    ]
    lines += [f"cascade   after {values['first_stage']}, its first stage"] if values["first_stage"] else []
    for fold, state in values["folds"].items():
        dice = "no scores here" if state["mean_dice"] is None else f"mean Dice {state['mean_dice']:.4f}"
        dice = f"no Dice: {state['note']}" if state["note"] else dice
        lines.append(f"fold {fold}    {plural(state['epochs'], 'epoch')} in {log.duration(state['seconds'])}, {dice}")
    lines += [f"fold {fold}    not finished" for fold in values["unfinished_folds"]]
    lines += [f"postprocessing  {describe_rules(rules)}"] if rules else []
    lines += [f"quality   calibrated for {' and '.join(calibrated)}"] if calibrated else []
    return options.About(values, "\n".join(lines))


def describe_dataset(paths: Paths) -> options.About:
    """Describe a dataset of a workspace: its cases, plan and models; only the models if it is not planned."""
    models = []
    for folder in model_folders(paths):
        try:
            models.append(describe_model(folder))
        except UserError as error:
            log.warn(f"model {folder.name} is left out: {error}")
    if not paths.plans.is_file():
        about = {"dataset": paths.name, "workspace": str(paths.root.parent), "models": [m.values for m in models]}
        head = f"{paths.name}: only models; the dataset is not planned in {paths.root.parent}"
        return options.About(about, "\n\n".join([head, *(model.text for model in models)]))
    plan, dataset = Plan.read(paths.plans), stored_dataset(paths.dataset)
    values = {
        "dataset": paths.name,
        "workspace": str(paths.root.parent),
        "raw": str(dataset.root),
        "layout": dataset.layout,
        "cases": len(dataset.cases),
        "configurations": list(plan.configurations),
        "models": [model.values for model in models],
    }
    selected = []
    if (selection := read_selection(paths)) is not None:
        changed = changed_models(paths, selection)
        values["selection"] = {**selection.to_json(), "changed_since": changed}
        stale = f"; {' and '.join(changed)} changed since: run `nnlite select` again" if changed else ""
        selected = [f"selected  {selection.summary}, on {selection.made}{stale}"]
    left_out = f" ({len(dataset.excluded)} left out)" if dataset.excluded else ""
    head = f"{paths.name}: {values['cases']} cases{left_out} in {dataset.root} ({dataset.layout})"
    texts = [model.text for model in models] or [f"no model yet: {first_training(paths)}"]
    return options.About(values, "\n\n".join([head, plan_table(plan), *texts, *selected]))
