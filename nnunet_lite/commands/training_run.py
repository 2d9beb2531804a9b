"""What `train` and `run` train: `plan_runs` lists the folds, and refuses mistakes before anything is changed.

`preprocessing_step` and `training_step` make steps of them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from nnunet_lite import log
from nnunet_lite.commands import options
from nnunet_lite.commands.steps import Step
from nnunet_lite.data.dataset import Dataset, stored_dataset
from nnunet_lite.data.problems import name_cases
from nnunet_lite.data.raw_files import known_stamps, scan_raw_cases
from nnunet_lite.errors import UserError
from nnunet_lite.inference.first_stage import FirstStage, find_first_stage
from nnunet_lite.inference.teachers import Teacher, find_teachers
from nnunet_lite.models import folder as models
from nnunet_lite.models.bundle import is_imported
from nnunet_lite.models.lookup import read_model
from nnunet_lite.networks.build import build_network
from nnunet_lite.networks.devices import pick_device
from nnunet_lite.networks.unet import mixes_samples
from nnunet_lite.planning.fingerprint import Fingerprint
from nnunet_lite.planning.planner import memory_budget
from nnunet_lite.planning.replanning import current_plan, read_earlier_plan, replan
from nnunet_lite.planning.schema import Options, Plan, configuration_changes
from nnunet_lite.preprocessing.store import is_preprocessed, preprocess_dataset
from nnunet_lite.settings import Settings, with_changes
from nnunet_lite.training.callbacks import require_logger
from nnunet_lite.training.dataloader import check_augmentation
from nnunet_lite.training.distributed import rank_share
from nnunet_lite.training.finetune import adopt_plan, open_source
from nnunet_lite.training.job import Job, configure_plan
from nnunet_lite.training.launch import current_ranks
from nnunet_lite.training.limits import estimate_fold_seconds, fold_progress
from nnunet_lite.training.loss import check_weights
from nnunet_lite.training.splits import (
    ALL,
    DEFAULT_RULE,
    FoldRule,
    Split,
    changed_since_trained,
    read_split,
    refuse_excluded,
    refuse_other_cases,
)
from nnunet_lite.workspace import Paths

if TYPE_CHECKING:
    from nnunet_lite.cluster import Cluster


@dataclass(frozen=True)
class TrainingRun:
    """One fold of a model: what is trained, on which cases, and where it goes.

    Parameters
    ----------
    paths, dataset : Paths, Dataset
        The planned dataset.
    plan, configuration, settings : Plan, str, Settings
        What is trained; the plan has the settings' batch, patch and network.
    split, rule : Split, FoldRule
        Its cases, and the options for folds.
    folder : Path
        The model folder.
    first : FirstStage or None
        Of a cascade.
    device : str or None
        Where to train.
    teachers : sequence of Teacher
        What it learns from besides the labels; a trained fold has none.
    callbacks : sequence of callable
        Called after each epoch.
    lengthen : bool
        Whether a finished fold is resumed if the settings say a longer run.
    """

    paths: Paths
    dataset: Dataset
    plan: Plan
    configuration: str
    settings: Settings
    split: Split
    rule: FoldRule
    folder: Path
    first: FirstStage | None
    device: str | None
    teachers: Sequence[Teacher] = ()
    callbacks: options.Callbacks = ()
    lengthen: bool = True

    @property
    def fold_folder(self) -> Path:
        return self.folder / f"fold_{self.split.name}"

    def is_trained(self) -> bool:
        """Whether the fold is trained, if it may be lengthened for as long as the settings say."""
        kept = not self.lengthen and models.is_at_end(self.fold_folder)
        return kept or models.is_complete(self.fold_folder, self.settings)

    def is_done(self) -> bool:
        """Whether the fold is trained, and its held-out cases are scored."""
        scored = self.split.name == ALL or (self.fold_folder / models.VALIDATION / models.SUMMARY).is_file()
        return scored and self.is_trained()

    def check_resume(self, force: bool = False, restart: bool = False) -> None:
        """Make sure that the model folder, if it exists, may be resumed with this plan, these settings and these cases.

        Nothing is changed.

        Parameters
        ----------
        force : bool
            Accept other settings.
        restart : bool
            This fold starts again, other folds stay.

        Raises
        ------
        UserError
            It may not.
        """
        refuse_other_cases(self.folder, self.split, self.paths.splits, self.dataset, restart)
        if (self.folder / "run.json").is_file():
            models.check_resume(
                self.folder, self.plan, self.configuration, self.settings, self.split.name, force, restart
            )
        if not restart and not self.is_trained():
            refuse_excluded(self.fold_folder, self.split)


def plan_runs(
    paths: Paths,
    settings: Settings,
    configurations: Sequence[str] | None,
    folds: Sequence[str],
    *,
    rule: FoldRule = DEFAULT_RULE,
    name: str | None = None,
    device: str | None = None,
    restart: bool = False,
    lengthen: bool = True,
) -> list[TrainingRun]:
    """Return what has to be trained, the folds of a cascade's first stage before those of the second.

    Mistakes are refused before anything is changed, except for earlier runs: see `TrainingRun.check_resume`.

    Parameters
    ----------
    paths : Paths
        Of the planned dataset.
    settings : Settings
        Of all runs.
    configurations : sequence of str or None
        Their names, such as "3d_fullres"; None for all of the plan whose images are large enough.
    folds : sequence of str
        Names of folds.
    rule : FoldRule
        For splits.json if that does not exist yet.
    name : str or None
        Of the model folder; default: CONFIGURATION-RECIPE.
    device : str or None
        Where to train.
    restart : bool
        The folds start again.
    lengthen : bool
        Finished folds are resumed if the settings say a longer run; otherwise they keep their length.

    Raises
    ------
    UserError
        There is no such configuration or fold, or the settings do not fit the plan, the labels or the network.
    """
    dataset, base = stored_dataset(paths.dataset), plan_for_settings(paths, settings)
    runs: dict[tuple[str, str], TrainingRun] = {}

    def add(configuration: str, fold: str, settings: Settings, name: str | None, restart: bool) -> None:
        if (configuration, fold) in runs:
            return
        folder = models.model_folder(paths, name or f"{configuration}-{settings.recipe}")
        fold_folder = folder / f"fold_{fold}"
        if not (lengthen or restart) and models.is_at_end(fold_folder):  # a finished fold keeps its length
            trained = Settings.model_validate(models.read_run(folder)["settings"])
            settings = with_changes(settings, {f"training.{key}": n for key, n in models.run_length(trained).items()})
        source_plan = _starting_plan(base, paths, configuration, settings, fold_folder, restart)
        plan = configure_plan(source_plan, configuration, settings)
        split = read_split(paths.splits, dataset, fold, rule)
        first = find_first_stage(paths, plan, configuration, split, folder, settings.recipe, name)
        run = TrainingRun(
            paths, dataset, plan, configuration, settings, split, rule, folder, first, device, lengthen=lengthen
        )
        _check_trainable(run)
        if restart or not run.is_trained():
            names = settings.training.teachers
            if folder.name in names:
                raise UserError("a model cannot learn from itself", folder, "Give the new one another --name.")
            run = replace(run, teachers=find_teachers(paths, dataset, plan, configuration, names, split))
        if first is not None:
            refuse_other_cases(first.folder, split, paths.splits, dataset)
            if restart or not run.is_trained():
                _refuse_edited_stage(paths, first)
            # a model to start from fits only one of the two networks
            own = with_changes(settings, {"training.init": None, "training.freeze": None})
            for first_fold in first.folds:
                add(first.configuration, first_fold, own, first.folder.name, restart=False)
        runs[configuration, fold] = run

    for configuration in configurations or _worth_training(base):
        for fold in folds:
            add(configuration, fold, settings, name, restart)
    return list(runs.values())


def _refuse_edited_stage(paths: Paths, first: FirstStage) -> None:
    """Refuse a first stage whose configuration in plans.json was edited after it was trained.

    Its settings do not count. A model that was imported or has adopted the plan of another one has a plan of its own.
    """
    if not (first.folder / "run.json").is_file() or is_imported(first.folder):
        return
    trained, run = read_model(first.folder)
    settings, name = Settings.model_validate(run["settings"]), first.configuration
    if settings.training.init is not None or run["configuration"] != name:
        return
    now = configure_plan(plan_for_settings(paths, settings), name, settings)
    changes = configuration_changes(trained.configuration(name), now.configuration(name))
    changes.pop("median_shape", None)  # it follows from the cases, and arrays do not depend on it
    if changes and any(map(models.is_finished, first.folder.glob("fold_*"))):
        words = "; ".join(f"{key}: {before} -> {after}" for key, (before, after) in changes.items())
        fix = f"Undo the edit, or train it again: `{models.training_command(first.folder, 'all-folds')} --restart`."
        raise UserError(f"is the first stage, trained before its plan was changed ({words})", first.folder, fix)


def _check_trainable(run: TrainingRun) -> None:
    """Refuse settings that the logger, the loss, the augmentation or the network cannot use.

    Raises
    ------
    UserError
        The logger's package is not installed, class weights or swaps of other labels, no such transform, a network
        that cannot be built, or one that normalizes each process's part of a batch alone; or a batch has fewer samples
        than there are processes.
    """
    settings, cpu = run.settings, torch.device("cpu")
    require_logger(settings.training.logger)
    check_weights(settings.loss, run.plan.labels)
    job = Job(run.plan, run.configuration, settings, 0, run.fold_folder, cpu, [], [])
    check_augmentation(job)
    rank_share(job.planned.batch_size, current_ranks())
    on_cpus = current_ranks().world > 1 and pick_device(run.device).type != "cuda"
    factory = settings.network.factory
    for stage in job.stages if factory is not None or on_cpus else ():  # a user's network may take one size only
        network = build_network(stage.plan, run.configuration, factory, settings.training.deep_supervision)
        if on_cpus and mixes_samples(network):
            what = "batch normalisation over several processes needs GPUs"
            raise UserError(what, fix="Train in one process, or with --set network.norm=instance.")


def check_earlier_runs(runs: Sequence[TrainingRun]) -> None:
    """Make sure that all runs may begin or be resumed, for commands without `--force`, `--restart` and `--name`.

    Raises
    ------
    UserError
        A model has an earlier run with other settings.
    """
    for run in runs:
        try:
            run.check_resume()
        except UserError as error:
            fix = "Repeat the old settings (--exclude leaves out new cases), use a recipe file of your own, whose name "
            fix += f"the new models get, or rename the folder to old_{run.folder.name} to train it again."
            raise UserError(error.what, error.file, fix) from None
    warn_of_changes(runs)


def warn_of_changes(runs: Sequence[TrainingRun]) -> None:
    """Warn of folds that were trained on former files of cases, such as uncorrected label maps."""
    begun = [run for run in runs if models.is_begun(run.fold_folder)]
    raw, _ = scan_raw_cases(runs[0].dataset.cases if begun else (), known_stamps(runs[0].paths))
    for run in begun:
        present = {case_id: raw[case_id] for case_id in run.split.training if case_id in raw}
        if changed := changed_since_trained(run.fold_folder, present):
            again = f"`{models.training_command(run.folder, run.split.name)}{run.paths.option} --restart`"
            what = f"{run.fold_folder} was trained on former files of {name_cases(changed)}"
            log.warn(f"{what}; {again} trains it on the present ones")


def plan_for_settings(paths: Paths, settings: Settings) -> Plan:
    """Return the plan of a dataset, or the one that `nnlite plan` makes with a recipe's preset, memory or spacing.

    Edits of plans.json stay where that plan leaves the entry as it was, and those of channels and storage always; a
    warning names the others.
    """
    plan, chosen = current_plan(paths), settings.plan
    preset = chosen.preset or plan.preset
    memory = chosen.memory or (plan.memory_gb if preset == plan.preset else memory_budget(preset))
    spacing = None if plan.options is None else plan.options.spacing
    same_spacing = chosen.spacing is None or _shorten(chosen.spacing) == _shorten(spacing or ())
    if (preset, memory) == (plan.preset, plan.memory_gb) and same_spacing:
        return plan
    given = Options(preset=chosen.preset, memory_gb=memory, spacing=chosen.spacing)
    dataset, fingerprint = stored_dataset(paths.dataset), Fingerprint.read(paths.fingerprint)
    new = replan(given, read_earlier_plan(paths), fingerprint, dataset)
    # channels and storage stay as they are in plans.json
    if lost := [edit for edit in new.lost if not edit.startswith(("channels.", "stored_as "))]:
        log.warn(f"the recipe's preset, memory or spacing makes another plan, without these edits of {paths.plans}: "
                 f"{'; '.join(lost)}; to edit that plan, give these options to `nnlite plan`")  # fmt: skip
    return new.plan.model_copy(update={"channels": plan.channels, "stored_as": plan.stored_as})


def _shorten(spacing: tuple[float, ...]) -> tuple[float, ...]:
    """Return one length for equal ones: 2, 2, 2 is the spacing 2."""
    return spacing[:1] if len(set(spacing)) == 1 else spacing


def _starting_plan(
    plan: Plan, paths: Paths, configuration: str, settings: Settings, fold_folder: Path, restart: bool
) -> Plan:
    """The plan for the settings, adapted to a model to start from; a resumed fold does not need that model."""
    init = settings.training.init
    if init is None:
        return plan
    try:
        fold = fold_folder.name.removeprefix("fold_")
        with open_source(init, paths.root.parent, plan, fold, configuration) as found:
            source = found
            if restart and found.file.resolve().is_relative_to(fold_folder.resolve()):
                what = "--restart would move aside the model to start from"
                raise UserError(what, fold_folder.parent, "Give the new one another --name.")
    except UserError:
        if restart or not models.is_begun(fold_folder):
            raise
        return Plan.read(fold_folder.parent / "plans.json")
    return adopt_plan(plan, configuration, source, settings) if settings.plan.adopt else plan


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


def training_step(run: TrainingRun, train: Callable[[TrainingRun], Any]) -> Step:
    """Return the step that trains and validates a fold.

    Parameters
    ----------
    run : TrainingRun
        The fold.
    train : callable
        Called with it, on a worker of a cluster if there is one.
    """
    of = f"{run.configuration} fold {run.split.name}"
    needs = ["preprocess"]
    if run.first is not None:
        needs += [f"train {run.first.configuration} fold {fold}" for fold in run.first.folds]
    where = (run.fold_folder, run.settings)
    return Step(
        f"train {of}", f"train {run.configuration} {models.run_length(run.settings)}", run.is_done,
        partial(train, run), tuple(needs), anywhere=True,
        progress=partial(fold_progress, *where), seconds=partial(estimate_fold_seconds, *where),
    )  # fmt: skip


def preprocessing_step(runs: Sequence[TrainingRun], workers: int | None, cluster: Cluster | None) -> Step:
    """Return the step that preprocesses every case for all that is trained; trained folds need no arrays.

    Parameters
    ----------
    runs : sequence of TrainingRun
        What is trained, of one dataset.
    workers : int or None
        Threads; None for as many as fit the machine.
    cluster : Cluster or None
        Its workers preprocess.
    """
    dataset, store, plans = runs[0].dataset, runs[0].paths.preprocessed, _merged_plans(runs)

    def is_done() -> bool:
        complete = all(is_preprocessed(dataset, plan, list(plan.configurations), store) for plan in plans)
        return complete or all(run.is_done() for run in runs)

    def preprocess() -> None:
        spread = None if cluster is None else cluster.spread
        for plan in plans:
            preprocess_dataset(dataset, plan, list(plan.configurations), store, workers, spread)

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
