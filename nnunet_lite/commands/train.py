"""`nnlite train`: train folds of a configuration, and score their held-out cases.

`train` is the command. `planned_runs` lists what has to be trained, and `preprocessing_step` and `training_step` are
the steps of it; `run` uses them too. The steps run in this process, or on the workers of a cluster.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Annotated, Any

import typer

from nnunet_lite import log, start
from nnunet_lite.commands.options import (
    DatasetName,
    Device,
    FilePath,
    Folds,
    GroupBy,
    Precision,
    Recipe,
    Scheduler,
    Seed,
    SettingOverrides,
    Splits,
    Stratify,
    StratifyBy,
    Workspace,
    cluster_of,
    overrides_of,
    sizes_of,
)
from nnunet_lite.data.dataset import Dataset, stored_dataset
from nnunet_lite.errors import UserError
from nnunet_lite.evaluation.cross_validation import SUMMARY
from nnunet_lite.evaluation.scores import Scores
from nnunet_lite.evaluation.summary import read_summaries
from nnunet_lite.fold import Request, Run, examined, planned_for, train_and_validate
from nnunet_lite.models.folder import VALIDATION, length, told_lengths
from nnunet_lite.planning.schema import Plan
from nnunet_lite.preprocessing.store import is_preprocessed, preprocess_dataset
from nnunet_lite.settings import Settings, load_settings
from nnunet_lite.training.remaining import seconds_of_training, share_done
from nnunet_lite.training.splits import DEFAULT_RULE, FoldRule, read_splits
from nnunet_lite.workflow import Ended, Journal, Step, execute
from nnunet_lite.workspace import Paths, select_dataset

if TYPE_CHECKING:
    from nnunet_lite.cluster import Cluster

JOURNAL = "steps.jsonl"


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
        from nnunet_lite.training.distributed import leave  # torch is loaded already

        leave()


def train(
    configuration: Annotated[str, typer.Argument(help="2d, 3d_fullres, ...")],
    fold: Annotated[
        int | str, typer.Argument(help='0 to 4, "all-folds" for each of them, "all" to train on every case.')
    ],
    *,
    recipe: Recipe = "default",
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
    precision: Precision = None,
    seed: Seed = None,
    workers: Annotated[int | None, typer.Option(min=0, help="Threads that prepare batches ahead; 0: none.")] = None,
    cache: Annotated[str | None, typer.Option(help="Where cases are kept: auto, device, ram or disk.")] = None,
    init: Annotated[FilePath | None, typer.Option(help="Model to start from, ours or nnU-Net's: fine-tuning.")] = None,
    freeze: Annotated[str | None, typer.Option(help="Weights that stay: encoder or all-but-head.")] = None,
    folds: Folds = None,
    group_by: GroupBy = None,
    stratify: Stratify = False,
    stratify_by: StratifyBy = None,
    splits: Splits = None,
    gpus: Annotated[int, typer.Option(min=1, help="Train on this many GPUs of this machine.")] = 1,
    scheduler: Scheduler = None,
    device: Device = None,
    name: Annotated[str | None, typer.Option(help="Of the model folder [CONFIGURATION-RECIPE].")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Only resume; an error if there is no earlier run.")] = False,
    force: Annotated[bool, typer.Option("--force", help="Resume although settings were changed.")] = False,
    restart: Annotated[bool, typer.Option("--restart", help="Start again; the earlier run is moved aside.")] = False,
    preview: Annotated[bool, typer.Option("--preview", help="Draw augmented samples to preview.png first.")] = False,
    settings: SettingOverrides = None,
    dataset: DatasetName = None,
    workspace: Workspace = None,
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
    settings : mapping
        Key to value, on top of the recipe and the other options, such as {"optimizer.momentum": 0.9}.

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
        launch_on_gpus(gpus)
    changed = overrides_of(
        settings, training__epochs=epochs, training__iterations=iterations, training__time_limit=time_limit,
        training__batch_size=batch_size,
        training__patch_size=None if patch_size is None else sizes_of(patch_size, "--patch-size"), optimizer__lr=lr,
        training__precision=precision, training__seed=seed, training__workers=workers, training__cache=cache,
        training__init=None if init is None else str(init), training__freeze=freeze,
    )  # fmt: skip
    all_folds = fold == "all-folds"
    if scheduler is not None and (not all_folds or name or restart or resume or force or preview or gpus > 1):
        what = "--scheduler spreads folds: it goes with `all-folds`, and without --gpus, --name, --restart, --resume,"
        raise UserError(f"{what} --force and --preview")
    resolved = load_settings(recipe, changed)  # a mistake in it is reported first
    rule = FoldRule(folds, group_by, stratify_by or stratify, splits)
    paths = select_dataset(workspace, dataset)
    if scheduler is not None:
        names = fold_names(paths, rule)
        return _train_on_cluster(scheduler, paths, configuration, names, resolved, device, told_lengths(changed))
    names = fold_names(paths, rule) if all_folds else [str(fold)]
    scores = {}
    for i, one in enumerate(names):
        request = Request(
            configuration, one, resolved, rule, name=name, device=device, force=force, preview=preview,
            restart=restart and i == 0 and ("model" if len(names) > 1 else True),  # the first fold sets all aside
            resume=resume and i == 0,  # later folds may not have an earlier run
            lengthen=told_lengths(changed),
        )  # fmt: skip
        scored = train_and_validate(request, paths)
        if scored is not None:
            scores[one] = scored
            if len(names) > 1:
                log.info(f"fold {one}, whole images:\n{scored.to_text()}")
    return TrainedFolds(scores)


def launch_on_gpus(gpus: int) -> None:
    """Run this command once for each GPU, and exit; in one of these processes, do nothing.

    Raises
    ------
    UserError
        This process is not `nnlite`: its command line cannot be repeated.
    """
    from nnunet_lite.training.distributed import current, launch  # torch is loaded already

    if current().world > 1:
        return
    if not start.IS_COMMAND:
        fix = f"Start your script with `torchrun --nproc-per-node {gpus}`, or use `nnlite train --gpus {gpus}`."
        raise UserError(f"gpus={gpus} needs one process for each GPU", fix=fix)
    raise SystemExit(launch(gpus, sys.argv[1:]))


def fold_names(paths: Paths, rule: FoldRule = DEFAULT_RULE) -> list[str]:
    """Return the folds of a planned dataset, "0" and up; splits.json is written if it does not exist."""
    return [split.name for split in read_splits(paths.splits, stored_dataset(paths.dataset), rule)]


# ----------------------------------------------------------------------------------------------- as steps of a workflow


def _train_on_cluster(
    scheduler: str,
    paths: Paths,
    configuration: str,
    folds: Sequence[str],
    settings: Settings,
    device: str | None,
    lengthen: frozenset[str],
) -> TrainedFolds:
    """Train all folds of a configuration, and what it needs before, on the workers of a Dask scheduler."""
    runs = planned_runs(paths, settings, [configuration], folds, device, lengthen)
    refuse_changed_settings(runs)
    dataset = stored_dataset(paths.dataset)
    with cluster_of(scheduler, paths.root.parent) as cluster:
        steps = [preprocessing_step(runs, dataset, paths, None, cluster), *map(training_step, runs)]
        execute_steps(steps, Journal(paths.root / JOURNAL), cluster)
    scored = [run for run in runs if run.configuration == configuration]
    files = {run.split.name: run.fold_folder / VALIDATION / SUMMARY for run in scored}
    return TrainedFolds({fold: read_summaries([file], dataset.labels) for fold, file in files.items()})


def execute_steps(steps: Sequence[Step], journal: Journal, cluster: Cluster | None) -> list[Ended]:
    """Run the steps that are not done, in this process or on a cluster."""
    if cluster is None:
        return execute(steps, journal)
    from nnunet_lite.cluster_steps import execute as execute_on_cluster  # an optional extra

    return execute_on_cluster(cluster, steps, journal)


def planned_runs(
    paths: Paths,
    settings: Settings,
    configurations: Sequence[str] | None,
    folds: Sequence[str],
    device: str | None,
    lengthen: frozenset[str],
) -> list[Run]:
    """Return what has to be trained, first stages of cascades before the second, each checked for mistakes."""
    runs: dict[tuple[str, str], Run] = {}

    def add(configuration: str, fold: str) -> None:
        if (configuration, fold) in runs:
            return
        found = examined(Request(configuration, fold, settings, device=device, lengthen=lengthen), paths)
        if found.first is not None:
            for needed in found.first.folds:
                add(found.first.configuration, needed)
        runs[configuration, fold] = found

    for configuration in configurations or _worth_training(planned_for(paths, settings)):
        for fold in folds:
            add(configuration, fold)
    return list(runs.values())


def refuse_changed_settings(runs: Sequence[Run]) -> None:
    """Make sure, before anything is done, that models with earlier runs have the same settings.

    Raises
    ------
    UserError
        The settings of one differ.
    """
    for run in runs:
        try:
            run.refuse_changes()
        except UserError as error:
            fix = "Repeat the old settings, or use a recipe file of your own, whose name the new models get."
            raise UserError(error.what, error.file, fix) from None


def _worth_training(plan: Plan) -> list[str]:
    """Return the configurations of a plan whose images are large enough for a U-Net.

    Raises
    ------
    UserError
        There is none.
    """
    names = [name for name, configuration in plan.configurations.items() if len(configuration.network.features) > 1]
    if left_out := [name for name in plan.configurations if name not in names]:
        log.warn(f"left out, because the images are too small for a U-Net: {', '.join(left_out)}")
    if not names:
        raise UserError("the images are too small for a U-Net: there is nothing to train")
    return names


def training_step(run: Run) -> Step:
    """Return the step that trains and validates a fold."""
    of = f"{run.configuration} fold {run.split.name}"
    needs = ["preprocess"]
    if run.first is not None:
        needs += [f"train {run.first.configuration} fold {fold}" for fold in run.first.folds]
    where = (run.fold_folder, run.settings)
    return Step(
        f"train {of}", f"train {run.configuration} {length(run.settings)}", run.is_done,
        partial(train_and_validate, run.request, run.paths), tuple(needs), anywhere=True,
        progress=partial(share_done, *where), seconds=partial(seconds_of_training, *where),
    )  # fmt: skip


def preprocessing_step(
    runs: Sequence[Run], dataset: Dataset, paths: Paths, workers: int | None, cluster: Cluster | None
) -> Step:
    """Return the step that preprocesses every case for all that is trained; trained folds need no arrays."""
    plans = _merged_plans(runs)

    def is_done() -> bool:
        complete = all(is_preprocessed(dataset, plan, list(plan.configurations), paths.preprocessed) for plan in plans)
        return complete or all(run.is_done() for run in runs)

    def preprocess() -> None:
        for plan in plans:
            names = list(plan.configurations)
            spread = None if cluster is None else cluster.spread
            preprocess_dataset(dataset, plan, names, paths.preprocessed, workers, log.progress, spread=spread)

    return Step("preprocess", f"preprocess {len(dataset.cases)} cases", is_done, preprocess)


def _merged_plans(runs: Sequence[Run]) -> list[Plan]:
    """Return the plans of runs; one for all configurations that agree in the rest, so that cases are read once."""
    plans: list[Plan] = []
    for run in runs:
        for i, plan in enumerate(plans):
            both = {**run.plan.configurations, **plan.configurations}
            if plan.model_copy(update={"configurations": both}) == run.plan.model_copy(update={"configurations": both}):
                plans[i] = plan.model_copy(update={"configurations": both})
                break
        else:
            plans.append(run.plan)
    return plans
