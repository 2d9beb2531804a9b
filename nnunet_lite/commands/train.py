"""`nnlite train`: train the folds of a configuration, one after the other, and score their held-out cases.

What happens to one fold is in fold.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from nnunet_lite import log
from nnunet_lite.commands import options
from nnunet_lite.commands.fold import train_and_validate
from nnunet_lite.commands.steps import JOURNAL, Journal, run_steps
from nnunet_lite.commands.training_run import plan_runs, prepare_run, preprocessing_step, training_step
from nnunet_lite.data.dataset import stored_dataset
from nnunet_lite.errors import UserError
from nnunet_lite.evaluation.scores import Scores, read_summaries
from nnunet_lite.models.folder import SUMMARY, VALIDATION
from nnunet_lite.settings import Settings, load_settings
from nnunet_lite.training.distributed import launch, leave_group
from nnunet_lite.training.splits import DEFAULT_RULE, FoldRule, read_splits
from nnunet_lite.workspace import Paths, select_dataset


@dataclass(frozen=True)
class TrainedFolds:
    """The scores of the folds that were trained, by the name of the fold; none of the fold `all`."""

    scores: dict[str, Scores]

    def to_json(self) -> dict[str, Any]:
        return {fold: scores.to_json() for fold, scores in self.scores.items()}

    def to_text(self) -> str:
        return "\n".join(f"fold {fold}, whole images:\n{scores.to_text()}" for fold, scores in self.scores.items())

    def finish(self) -> None:
        """Leave the processes that trained together; the command ends here."""
        leave_group()


def train(
    configuration: Annotated[str, typer.Argument(help="2d, 3d_fullres, ...")],
    fold: Annotated[
        int | str, typer.Argument(help='0 to 4, "all-folds" for each of them, "all" to train on every case.')
    ],
    *,
    recipe: options.Recipe = "default",
    epochs: Annotated[int | None, typer.Option(help="Length of the run [the recipe's, as all that follows].")] = None,
    iterations: Annotated[int | None, typer.Option(help="Per epoch.")] = None,
    time_limit: Annotated[
        str | float | None,
        typer.Option(help="Such as 8h or 90m (plain: minutes); the schedule fits itself to it."),
    ] = None,
    batch_size: Annotated[int | None, typer.Option(help="Patches per step.")] = None,
    patch_size: Annotated[
        str | Sequence[int] | None, typer.Option(parser=str, metavar="TEXT", help="Such as 40x56x40.")
    ] = None,
    lr: Annotated[float | None, typer.Option(help="Initial learning rate.")] = None,
    precision: options.Precision = None,
    seed: options.Seed = None,
    workers: Annotated[int | None, typer.Option(min=0, help="Threads that prepare batches ahead; 0: none.")] = None,
    cache: Annotated[str | None, typer.Option(help="Where cases are kept: auto, device, ram or disk.")] = None,
    init: Annotated[
        str | Path | None, typer.Option(help="Model to start from, ours or nnU-Net's: fine-tuning.")
    ] = None,
    freeze: Annotated[str | None, typer.Option(help="Weights that stay: encoder or all-but-head.")] = None,
    folds: options.Folds = None,
    group_by: options.GroupBy = None,
    stratify: options.Stratify = False,
    stratify_by: options.StratifyBy = None,
    splits: options.Splits = None,
    gpus: Annotated[int, typer.Option(min=1, help="Train on this many GPUs of this machine.")] = 1,
    scheduler: options.Scheduler = None,
    device: options.Device = None,
    name: Annotated[str | None, typer.Option(help="Of the model folder [CONFIGURATION-RECIPE].")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Only resume; an error if there is no earlier run.")] = False,
    force: Annotated[bool, typer.Option("--force", help="Resume although settings were changed.")] = False,
    restart: Annotated[bool, typer.Option("--restart", help="Start again; the earlier run is moved aside.")] = False,
    preview: Annotated[bool, typer.Option("--preview", help="Draw augmented samples to preview.png first.")] = False,
    settings: options.SettingOverrides = None,
    dataset: options.DatasetName = None,
    workspace: options.Workspace = None,
) -> TrainedFolds:
    """Train a fold and score its held-out cases. The same command again resumes where it stopped.

    The second stage of a cascade learns from what the first one predicts of cases that it held out: the folds of the
    first stage that this needs are trained before, with the same recipe and settings, where they are missing.

    Parameters
    ----------
    configuration : str
        Of the plan, such as "3d_fullres".
    fold : int or str
        A fold, "all-folds", or "all" to train on every case; nothing is held out then, and there are no scores.
    recipe : str
        Name of a recipe, or a TOML file. It has the defaults of all options up to `freeze`.
    epochs, iterations : int, optional
        Length of the run, and of an epoch.
    time_limit : str or float, optional
        Minutes, or a text such as "8h"; the schedule fits itself to it.
    batch_size : int, optional
        Patches per step.
    patch_size : str or sequence of int, optional
        Voxels (z, y, x), such as "40x56x40".
    lr : float, optional
        Initial learning rate.
    precision : {"auto", "fp32", "bf16", "fp16"}, optional
        Number format of the network.
    seed : int, optional
        Makes two runs identical on the CPU.
    workers : int, optional
        Threads that prepare batches ahead, 0 for none.
    cache : {"auto", "device", "ram", "disk"}, optional
        Where cases are kept.
    init : str or Path, optional
        Model to start from, ours or nnU-Net's: fine-tuning.
    freeze : {"encoder", "all-but-head"}, optional
        Weights that are not trained.
    folds : int, optional
        Number of folds; default: 5.
    group_by : str or Path, optional
        Regular expression or CSV with the group of each case, which is never on both sides of a fold.
    stratify : bool
        Folds with equal shares of labels and their volumes.
    stratify_by : str or Path, optional
        CSV with the stratum of each case, for folds with equal shares of strata.
    splits : str or Path, optional
        Folds to use: splits.json, splits_final.json or a CSV.
    gpus : int
        Train on this many GPUs of this machine.
    scheduler : str, optional
        Address of a Dask scheduler, whose workers do it.
    device : str, optional
        Such as "cpu" or "cuda:1"; default: a GPU if there is one.
    name : str, optional
        Of the model folder; default: CONFIGURATION-RECIPE.
    resume : bool
        Only resume; an error if there is no earlier run.
    force : bool
        Resume although settings were changed.
    restart : bool
        Start again; the earlier run is moved aside.
    preview : bool
        Draw augmented samples to preview.png first.
    settings : mapping, optional
        Key to value, on top of the recipe and the other options, such as {"optimizer.momentum": 0.9}.
    dataset : str, optional
        Planned dataset; default: the only one.
    workspace : str or Path, optional
        The workspace; default: NNLITE_WORKSPACE, otherwise ./nnlite_workspace.

    Returns
    -------
    TrainedFolds
        The scores of the held-out cases of each fold.

    Raises
    ------
    UserError
        A setting is illegal, an earlier run has other settings, or there is nothing to resume.
    Stopped
        A signal ended the run; its checkpoint is written.
    Lost
        Another process of those that torchrun started is gone; the last checkpoint is complete.
    """
    if gpus > 1:
        launch(gpus)
    changed = options.overrides_of(
        settings, training__epochs=epochs, training__iterations=iterations, training__time_limit=time_limit,
        training__batch_size=batch_size,
        training__patch_size=None if patch_size is None else options.sizes_of(patch_size, "--patch-size"),
        optimizer__lr=lr, training__precision=precision, training__seed=seed, training__workers=workers,
        training__cache=cache, training__init=None if init is None else str(init), training__freeze=freeze,
    )  # fmt: skip
    all_folds = fold == "all-folds"
    if scheduler is not None and (not all_folds or name or restart or resume or force or preview or gpus > 1):
        what = "--scheduler spreads folds: it goes with `all-folds`, and without --gpus, --name, --restart, --resume,"
        raise UserError(f"{what} --force and --preview")
    resolved = load_settings(recipe, changed)  # a mistake in it is reported first
    rule = FoldRule(folds, group_by, stratify_by or stratify, splits)
    paths = select_dataset(workspace, dataset)
    names = fold_names(paths, rule) if all_folds else [str(fold)]
    if scheduler is not None:
        return _train_on_cluster(scheduler, paths, configuration, names, resolved, device)
    scores = {}
    for fold_name in names:
        run = prepare_run(
            paths, configuration, fold_name, resolved, rule=rule, name=name, device=device, restart=restart
        )
        aside: bool | Literal["model"] = "model" if restart and all_folds else restart
        result = train_and_validate(run, restart=aside, resume=resume, force=force, preview=preview)
        restart = resume = False  # the first fold sets all of them aside; later ones may not have an earlier run
        if result is not None:
            scores[fold_name] = result
            if all_folds:
                log.info(f"fold {fold_name}, whole images:\n{result.to_text()}")
    return TrainedFolds(scores)


def _train_on_cluster(
    scheduler: str, paths: Paths, configuration: str, folds: Sequence[str], settings: Settings, device: str | None
) -> TrainedFolds:
    """Train all folds of a configuration, and what it needs before, on the workers of a Dask scheduler."""
    runs = plan_runs(paths, settings, [configuration], folds, device)
    dataset = stored_dataset(paths.dataset)
    trainings = [training_step(run, train_and_validate) for run in runs]
    with options.cluster_of(scheduler, paths.root.parent) as cluster:
        steps = [preprocessing_step(runs, dataset, paths, None, cluster), *trainings]
        run_steps(steps, Journal(paths.root / JOURNAL), cluster)
    files = {
        run.split.name: run.fold_folder / VALIDATION / SUMMARY for run in runs if run.configuration == configuration
    }
    return TrainedFolds({fold: read_summaries([file], dataset.labels) for fold, file in files.items()})


def fold_names(paths: Paths, rule: FoldRule = DEFAULT_RULE) -> list[str]:
    """Return the folds of a planned dataset, "0" and up; splits.json is written if it does not exist.

    Parameters
    ----------
    paths : Paths
        Of the planned dataset.
    rule : FoldRule
        How splits.json is made if it does not exist.
    """
    return [split.name for split in read_splits(paths.splits, stored_dataset(paths.dataset), rule)]
