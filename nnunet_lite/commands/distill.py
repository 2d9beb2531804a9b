"""`nnlite distill`: train one small network that predicts as trained models do together.

The models are the `training.teachers` of an ordinary training, see inference/teachers.py and `distillation_loss`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated

import typer

from nnunet_lite.commands import options
from nnunet_lite.commands.train import TrainedFolds, train
from nnunet_lite.errors import UserError
from nnunet_lite.models.argument import find_model
from nnunet_lite.models.folder import read_run
from nnunet_lite.workspace import planned_paths, workspace_folder


def distill(
    models: Annotated[str | Sequence[str], typer.Argument(metavar="MODEL", help="Trained models of the dataset.")],
    *,
    configuration: Annotated[
        str | None,
        options.model("-c", "--configuration", help="2d, 3d_fullres, ... to train.", show_default="the first model's"),
    ] = None,
    fold: Annotated[
        int | str | Sequence[int | str],
        options.model(
            "-f",
            "--fold",
            parser=str,
            help='"all" learns from all folds of the models; fold 0 from their fold 0 alone.',
        ),
    ] = "all",
    recipe: options.Recipe = "distill",
    epochs: Annotated[int | None, options.length(help="Number of epochs.", show_default="the recipe's")] = None,
    time_limit: options.TimeLimit = None,
    seed: options.Seed = None,
    device: options.Device = None,
    name: options.ModelName = None,
    restart: Annotated[bool, options.resuming("--restart", help="Move the earlier run aside, start again.")] = False,
    settings: options.SettingOverrides = None,
    dataset: options.DatasetName = None,
    workspace: options.Workspace = None,
) -> TrainedFolds:
    """Train a small network that predicts as trained models do together. The same command again resumes.

    The models predict every training case once, with all of their folds and with mirrored copies. The network learns
    from their probabilities and from the labels. It becomes a model like any other.

    Parameters
    ----------
    models : str or sequence of str
        Names of trained models of the dataset, which predict together.
    configuration : str, optional
        Of the new network, such as "3d_fullres"; default: that of the first model.
    fold : int, str or sequence of them
        "all" trains on every case and learns from all folds of the models; nothing is held out then. Fold k learns
        from fold k of each model alone: the others have learned from the cases that fold k holds out, whose scores
        would not be honest.
    recipe : str
        Name of a recipe, or a TOML file.
    epochs : int, optional
        Length of the run.
    time_limit : str or float, optional
        Minutes, or a text such as "8h".
    seed : int, optional
        Makes two runs identical on the CPU.
    device : str, optional
        Such as "cpu" or "cuda:1"; default: a GPU if there is one.
    name : str, optional
        Of the model folder; default: CONFIGURATION-RECIPE.
    restart : bool
        Start again; the earlier run is moved aside.
    settings : mapping, optional
        Key to value, on top of the recipe, such as {"loss.distillation": 0.8}.
    dataset : str, optional
        Planned dataset; default: the only one.
    workspace : str or Path, optional
        The workspace; default: NNLITE_WORKSPACE, otherwise ./nnlite_workspace.

    Returns
    -------
    TrainedFolds
        The scores of the held-out cases of each fold; none of the fold "all".

    Raises
    ------
    UserError
        A model is not one of the dataset, lacks a fold, or has other labels; or as `train`.

    Examples
    --------
    nnlite distill 3d_fullres-default
    nnlite distill 3d_fullres-default 2d-default --time-limit 2h --name small
    """
    if "training.teachers" in dict(settings or {}):
        raise UserError("--set training.teachers is what the models are", fix="Give each of them as a MODEL.")
    paths = planned_paths(workspace_folder(workspace), dataset)
    folders = [find_model(model, paths.root.parent, paths.name) for model in options.names_of(models) or ()]
    if not folders:
        raise UserError("no model is given to learn from")
    for folder in folders:
        if folder.parent.resolve() != paths.models.resolve():
            raise UserError(f"is no model of {paths.name} in {paths.root.parent}", folder, "See `nnlite import`.")
    changed = {**dict(settings or {}), "training.teachers": [folder.name for folder in folders]}
    trained = train(
        configuration or read_run(folders[0])["configuration"], fold, recipe=recipe, epochs=epochs,
        time_limit=time_limit, seed=seed, device=device, name=name, restart=restart, settings=changed,
        dataset=paths.name, workspace=paths.root.parent,
    )  # fmt: skip
    assert isinstance(trained, TrainedFolds)  # a list only without a fold
    return trained
