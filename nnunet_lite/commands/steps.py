"""The steps of `nnlite run` and `nnlite train --scheduler`, in this process or on the workers of a cluster.

`plan_runs` lists what has to be trained; `preprocessing_step` and `training_step` are the steps of it.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING

from nnunet_lite import log
from nnunet_lite.commands.options import cluster_of
from nnunet_lite.commands.training_run import TrainingRun, plan_for_settings, prepare_run, train_and_validate
from nnunet_lite.commands.workflow import Journal, Step, run_steps
from nnunet_lite.data.dataset import Dataset, stored_dataset
from nnunet_lite.errors import UserError
from nnunet_lite.evaluation.scores import Scores, read_summaries
from nnunet_lite.models.folder import SUMMARY, VALIDATION, run_length
from nnunet_lite.planning.schema import Plan
from nnunet_lite.preprocessing.store import is_preprocessed, preprocess_dataset
from nnunet_lite.settings import Settings
from nnunet_lite.training.limits import estimate_fold_seconds, fold_progress
from nnunet_lite.workspace import Paths

if TYPE_CHECKING:
    from nnunet_lite.cluster import Cluster

JOURNAL = "steps.jsonl"


def train_on_cluster(
    scheduler: str,
    paths: Paths,
    configuration: str,
    folds: Sequence[str],
    settings: Settings,
    device: str | None,
) -> dict[str, Scores]:
    """Train all folds of a configuration, and what it needs before, on the workers of a Dask scheduler."""
    runs = plan_runs(paths, settings, [configuration], folds, device)
    refuse_changed_settings(runs)
    dataset = stored_dataset(paths.dataset)
    with cluster_of(scheduler, paths.root.parent) as cluster:
        steps = [preprocessing_step(runs, dataset, paths, None, cluster), *map(training_step, runs)]
        run_steps(steps, Journal(paths.root / JOURNAL), cluster)
    scored = [run for run in runs if run.configuration == configuration]
    files = {run.split.name: run.fold_folder / VALIDATION / SUMMARY for run in scored}
    return {fold: read_summaries([file], dataset.labels) for fold, file in files.items()}


def plan_runs(
    paths: Paths,
    settings: Settings,
    configurations: Sequence[str] | None,
    folds: Sequence[str],
    device: str | None,
) -> list[TrainingRun]:
    """Return what has to be trained, first stages of cascades before the second, each checked for mistakes."""
    runs: dict[tuple[str, str], TrainingRun] = {}

    def add(configuration: str, fold: str) -> None:
        if (configuration, fold) in runs:
            return
        run = prepare_run(paths, configuration, fold, settings, device=device)
        if run.first is not None:
            for first_fold in run.first.folds:
                add(run.first.configuration, first_fold)
        runs[configuration, fold] = run

    for configuration in configurations or _worth_training(plan_for_settings(paths, settings)):
        for fold in folds:
            add(configuration, fold)
    return list(runs.values())


def refuse_changed_settings(runs: Sequence[TrainingRun]) -> None:
    """Make sure, before anything is done, that models with earlier runs have the same settings.

    Raises
    ------
    UserError
        The settings of one differ.
    """
    for run in runs:
        try:
            run.check_resume()
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


def training_step(run: TrainingRun) -> Step:
    """Return the step that trains and validates a fold."""
    of = f"{run.configuration} fold {run.split.name}"
    needs = ["preprocess"]
    if run.first is not None:
        needs += [f"train {run.first.configuration} fold {fold}" for fold in run.first.folds]
    where = (run.fold_folder, run.settings)
    return Step(
        f"train {of}", f"train {run.configuration} {run_length(run.settings)}", run.is_done,
        partial(train_and_validate, run), tuple(needs), anywhere=True,
        progress=partial(fold_progress, *where), seconds=partial(estimate_fold_seconds, *where),
    )  # fmt: skip


def preprocessing_step(
    runs: Sequence[TrainingRun], dataset: Dataset, paths: Paths, workers: int | None, cluster: Cluster | None
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


def _merged_plans(runs: Sequence[TrainingRun]) -> list[Plan]:
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
