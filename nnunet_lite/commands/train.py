"""`nnlite train`: train the folds of a configuration, one after the other, and score their held-out cases.

Read `train`, then `train_and_validate` for one fold: preprocess -> first stage of a cascade -> training/loop.py ->
validate. What a fold needs is found in training_run.py.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from nnunet_lite import log, system
from nnunet_lite.commands import options
from nnunet_lite.commands.inventory import describe_training
from nnunet_lite.commands.steps import JOURNAL, Journal, run_steps
from nnunet_lite.commands.training_run import (
    TrainingRun,
    check_earlier_runs,
    plan_runs,
    preprocessing_step,
    training_step,
    warn_of_changes,
)
from nnunet_lite.data.dataset import Dataset, read_dataset, stored_dataset
from nnunet_lite.data.raw_files import known_stamps
from nnunet_lite.errors import UserError
from nnunet_lite.evaluation.cross_validation import validate_fold
from nnunet_lite.evaluation.scores import Scores, four_digits, read_summary
from nnunet_lite.inference.first_stage import FirstStage, predict_first_stage
from nnunet_lite.inference.teachers import Teacher, predict_teachers
from nnunet_lite.inference.windows import window_starts
from nnunet_lite.models import folder as models
from nnunet_lite.networks.devices import release_memory
from nnunet_lite.planning.schema import Plan, configuration_changes
from nnunet_lite.planning.show import length_unit
from nnunet_lite.planning.spacing import warn_of_spacing
from nnunet_lite.planning.swaps import warn_of_lost_swaps
from nnunet_lite.planning.topology import join_by_x
from nnunet_lite.preprocessing.store import open_case, preprocess_dataset
from nnunet_lite.preprocessing.stored_case import open_array
from nnunet_lite.settings import Settings, load_settings, time_text
from nnunet_lite.system import process_age
from nnunet_lite.training.cache import load_cases
from nnunet_lite.training.distributed import from_first, join_group, leave_group, report_lost_peer, wait_for_first
from nnunet_lite.training.job import Job, smaller_patches
from nnunet_lite.training.launch import Ranks, current_ranks
from nnunet_lite.training.limits import ValidationPlan, announce_validation, limit_seconds, validation_step_sizes
from nnunet_lite.training.loop import train_fold
from nnunet_lite.training.preview import draw_preview
from nnunet_lite.training.splits import (
    ALL,
    DEFAULT_RULE,
    FoldRule,
    check_folds,
    read_record,
    read_splits,
    record_cases,
    record_seen,
)
from nnunet_lite.workspace import Paths, select_dataset

_START_SHARE = 0.25  # of a time limit, which start and preprocessing may take of it
# what of a network follows from the sizes that are reported
_FROM_THE_PATCH = ("strides", "kernels", "blocks", "decoder_convolutions", "memory_gb")


@dataclass(frozen=True)
class TrainedFolds:
    """The scores of the folds that were trained, by the name of the fold; none of the fold `all`."""

    scores: dict[str, Scores]

    def to_json(self) -> dict[str, Any]:
        return {fold: scores.to_json() for fold, scores in self.scores.items()}

    def to_text(self) -> str:
        return "\n".join(f"fold {fold}, whole images:\n{scores.to_text()}" for fold, scores in self.scores.items())

    def __repr__(self) -> str:
        dice = [f"fold {fold} {four_digits(scores.foreground().mean)}" for fold, scores in self.scores.items()]
        return f"Dice of held-out cases: {', '.join(dice) or 'there are none'}"

    def finish(self) -> None:
        """Leave the processes that trained together; the command ends here."""
        leave_group()


def train(
    configuration: Annotated[
        str | None, typer.Argument(metavar="CONFIGURATION", help="2d, 3d_fullres, ...", show_default="list them all")
    ] = None,
    fold: Annotated[
        int | str | Sequence[int | str] | None,
        typer.Argument(
            parser=str,
            metavar="FOLD",
            help='0 to 4, or several as in 0,1; "all-folds" for each of them, "all" to train on every case.',
            show_default="list them all",
        ),
    ] = None,
    *,
    recipe: options.Recipe = "default",
    epochs: Annotated[int | None, options.length(help="Number of epochs.", show_default="the recipe's")] = None,
    iterations: Annotated[
        int | None, options.length(help="Training steps per epoch.", show_default="the recipe's")
    ] = None,
    time_limit: options.TimeLimit = None,
    batch_size: Annotated[int | None, options.setting(help="Patches per step.", show_default="the recipe's")] = None,
    patch_size: options.PatchSize = None,
    lr: Annotated[float | None, options.setting(help="Initial learning rate.", show_default="the recipe's")] = None,
    precision: options.Precision = None,
    seed: options.Seed = None,
    workers: Annotated[
        int | None, options.hardware(min=0, help="Threads that prepare batches ahead.", show_default="the recipe's")
    ] = None,
    cache: Annotated[
        str | None, options.hardware(help="Keep cases: auto, device, ram or disk.", show_default="the recipe's")
    ] = None,
    init: Annotated[
        str | Path | None, options.model(help="Model to start from, ours or nnU-Net's: fine-tuning.")
    ] = None,
    freeze: Annotated[str | None, options.model(help="Weights that stay: encoder or all-but-head.")] = None,
    folds: options.Folds = None,
    group_by: options.GroupBy = None,
    stratify: options.Stratify = False,
    stratify_by: options.StratifyBy = None,
    splits: options.Splits = None,
    gpus: Annotated[int, options.hardware(min=1, help="Train on this many GPUs of this machine.")] = 1,
    scheduler: options.Scheduler = None,
    device: options.Device = None,
    name: options.ModelName = None,
    resume: Annotated[bool, options.resuming("--resume", help="Only resume an earlier run; begin none.")] = False,
    force: Annotated[bool, options.resuming("--force", help="Resume although settings were changed.")] = False,
    restart: Annotated[bool, options.resuming("--restart", help="Move the earlier run aside, start again.")] = False,
    preview: Annotated[bool, options.output("--preview", help="Draw augmented samples to preview.png first.")] = False,
    settings: options.SettingOverrides = None,
    callbacks: options.Callbacks = (),
    dataset: options.DatasetName = None,
    workspace: options.Workspace = None,
) -> TrainedFolds | options.About:
    """Train a fold and score its held-out cases. The same command again resumes where it stopped.

    Without a fold, the configurations and folds are listed with their state, and nothing is trained.

    The second stage of a cascade learns from what the first one predicts of cases that it held out: the folds of the
    first stage that this needs are trained before, with the same recipe and settings, where they are missing.

    Parameters
    ----------
    configuration : str, optional
        Of the plan, such as "3d_fullres"; default: list all.
    fold : int, str or sequence of them, optional
        Folds, "all-folds", or "all" to train on every case; nothing is held out then, and there are no scores. Default:
        list all.
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
        Key to value, on top of the recipe, such as {"optimizer.momentum": 0.9}.
    callbacks : sequence of callable
        Each is called after every epoch, when its checkpoint is being written, with a dict of its own: `configuration`,
        `fold`, and the line of metrics.jsonl. What one raises ends the training, which the same call resumes. Of
        processes that train together only the first calls them. Not an option of the command.
    dataset : str, optional
        Planned dataset; default: the only one.
    workspace : str or Path, optional
        The workspace; default: NNLITE_WORKSPACE, otherwise ./nnlite_workspace.

    Returns
    -------
    TrainedFolds or About
        The scores of the held-out cases of each fold; or the list.

    Raises
    ------
    UserError
        A setting is illegal, an earlier run has other settings, or there is nothing to resume.
    Stopped
        A signal ended the run; its checkpoint is written.
    Lost
        Another process of those that torchrun started is gone; the last checkpoint is complete.

    Examples
    --------
    nnlite train 3d_fullres 0
    nnlite train 2d all-folds --recipe cpu --time-limit 30m
    """
    if gpus > 1 and current_ranks().world == 1:  # `nnlite` has started them, see early.py
        fix = f"Start your script with `torchrun --nproc-per-node {gpus}`, or use `nnlite train --gpus {gpus}`."
        raise UserError(f"gpus={gpus} needs one process for each GPU", fix=fix)
    changed = options.overrides_of(
        settings, training__epochs=epochs, training__iterations=iterations, training__time_limit=time_limit,
        training__batch_size=batch_size, training__patch_size=options.patch_of(patch_size), optimizer__lr=lr,
        training__precision=precision, training__seed=seed, training__workers=workers, training__cache=cache,
        training__init=None if init is None else str(init), training__freeze=freeze,
    )  # fmt: skip
    given = options.names_of(fold)
    all_folds = given == ["all-folds"]
    if resume and restart:
        raise UserError("--resume and --restart exclude each other")
    not_on_workers = any((name, restart, resume, force, preview, callbacks, gpus > 1))
    if scheduler is not None and (not all_folds or not_on_workers):
        what = "--scheduler spreads folds: it goes with `all-folds`, and without --gpus, --name, --restart, --resume,"
        raise UserError(f"{what} --force, --preview and callbacks")
    resolved = load_settings(recipe, changed)  # a mistake in it is reported first
    if configuration is None or given is None:
        return describe_training(select_dataset(workspace, dataset, only_reads=True), configuration)
    if configuration.isdecimal():  # the number of a fold or dataset
        order = "nnlite train [DATASET] CONFIGURATION FOLD"
        raise UserError(f"{configuration} is no configuration", fix=f"Give `{order}`; several folds are -f 0 1.")

    rule = FoldRule(folds, group_by, options.strata_of(stratify, stratify_by), splits)
    paths = select_dataset(workspace, dataset)
    names = fold_names(paths, rule) if all_folds else given
    runs = plan_runs(
        paths, resolved, [configuration], names, rule=rule, name=name, device=device, restart=restart,
        lengthen=options.sets_length(changed),
    )  # fmt: skip
    runs = [replace(run, callbacks=tuple(callbacks)) for run in runs]
    own = [run for run in runs if run.configuration == configuration]
    if scheduler is not None:
        return _train_on_cluster(scheduler, runs, own)

    if resume and not any(models.is_begun(run.fold_folder) for run in own):
        raise UserError("there is nothing to resume", own[0].fold_folder, "Leave out --resume to begin.")
    first_stage = _missing_first_stage(runs, own, restart)
    for run in first_stage:
        run.check_resume(force)
    if restart:
        _set_aside(own, all_folds, force)  # which checks them where other folds stay
    else:
        system.restarted = False
        for run in own:
            run.check_resume(force)
        warn_of_changes([*first_stage, *own])
    for run in first_stage:
        train_and_validate(run, force=force)
    return _train_here(own, force, preview, process_age() if not first_stage else 0.0)


def after_train(result: TrainedFolds, *, dataset: Any = None, workspace: Any = None, **given: Any) -> list[list[str]]:
    """Return the commands to type next: to predict, and to look at a case that was held out."""
    cases = [row.case for scores in result.scores.values() for row in scores.rows]
    name = given["name"] or f"{given['configuration']}-{Path(given['recipe']).stem}"
    model = ["-m", name, *options.where(dataset, workspace)]
    views = [["nnlite", "view", case, *model] for case in cases[:1]]
    return [["nnlite", "predict", "-i", "IMAGES", "-o", "SEGMENTATIONS", *model], *views]


def _train_here(runs: Sequence[TrainingRun], force: bool, preview: bool, start: float) -> TrainedFolds:
    """Train folds in this process, which took `start` seconds to begin."""
    scores = {}
    for run in runs:
        found = train_and_validate(run, force=force, preview=preview, start=start)
        start = 0.0
        if found is not None:
            scores[run.split.name] = found
            if len(runs) > 1:  # their tables follow at the end
                log.info(f"fold {run.split.name}: {found!r}")
    return TrainedFolds(scores)


def _train_on_cluster(scheduler: str, runs: Sequence[TrainingRun], own: Sequence[TrainingRun]) -> TrainedFolds:
    """Train folds on the workers of a Dask scheduler, and return the scores of `own`."""
    dataset, root = own[0].dataset, own[0].paths.root
    check_earlier_runs(runs)
    trainings = [training_step(run, train_and_validate) for run in runs]
    with options.cluster_of(scheduler, root.parent) as cluster:
        run_steps([preprocessing_step(runs, None, cluster), *trainings], Journal(root / JOURNAL), cluster)
    files = {run.split.name: run.fold_folder / models.VALIDATION / models.SUMMARY for run in own}
    return TrainedFolds({fold: read_summary(file, dataset.labels) for fold, file in files.items()})


def _missing_first_stage(runs: Sequence[TrainingRun], own: Sequence[TrainingRun], restart: bool) -> list[TrainingRun]:
    """Return the folds of a cascade's first stage that are to be trained before `own`, those of the second stage."""
    first = own[0].first
    if first is None or (not restart and all(models.is_finished(run.fold_folder) for run in own)):
        return []
    missing = [
        run for run in runs if run.configuration == first.configuration and not models.is_finished(run.fold_folder)
    ]
    names = ", ".join(run.split.name for run in missing)
    start = ", from random weights: --init is for the second stage" * (own[0].settings.training.init is not None)
    todo = f"to be trained first: {names}{start}" if missing else "all trained"
    needed = f"fold {', '.join(first.folds)} of {first.folder}"
    log.info(f"the second stage learns from what {first.configuration} predicts: {needed}; {todo}")
    return missing


def _set_aside(own: Sequence[TrainingRun], all_folds: bool, force: bool) -> None:
    """Move the earlier runs of some folds aside: the folds if others of the model stay, otherwise the model folder."""
    folder, folds = own[0].folder, {run.fold_folder.name for run in own}
    whole = all_folds or folds.issuperset(models.other_folds(folder, ""))
    for run in () if whole else own:
        run.check_resume(force, restart=True)
    ranks, _ = join_group(own[0].device)  # from here on no process looks at the old folder
    if ranks.rank == 0:
        for path in [folder] if whole else [run.fold_folder for run in own]:
            system.restarted |= models.set_aside(path) is not None


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


# ------------------------------------------------------------------------------------------------------------ one fold


def train_and_validate(
    run: TrainingRun, *, force: bool = False, preview: bool = False, start: float = 0.0
) -> Scores | None:
    """Train a fold, or resume it, then predict and score its held-out cases.

    Parameters
    ----------
    run : TrainingRun
        See `plan_runs`.
    force, preview : bool
        As in the command `train`.
    start : float
        Seconds that this process took to start, which count as training time.

    Returns
    -------
    Scores or None
        None for the fold "all", and in all processes but the first.
    """
    ranks, device = join_group(run.device)
    if device.type == "cpu" and run.settings.recipe == "default" and run.device is None:
        days = "" if run.settings.training.time_limit else ": a fold may take days, see the estimate that follows"
        log.warn(
            f"there is no GPU, for which the recipe `default` is made{days}; `--recipe cpu` gives a model in minutes"
        )
    with report_lost_peer(), ExitStack() as stack:
        seed = 0
        if ranks.rank == 0:
            stack.enter_context(models.lock_fold(run.fold_folder))
            stack.callback(models.remove_unbegun, run.fold_folder)  # after an error or Ctrl-C
            previous = None if run.first is None else run.first.folder.name
            seed = models.open_run(
                run.folder, run.plan, run.dataset, run.configuration, run.settings,
                fold=run.split.name, force=force, previous=previous,
            )  # fmt: skip
        seed = models.fold_seed(from_first(seed, ranks), run.split.name)
        if models.is_begun(run.fold_folder):
            for name, learned in models.read_cases(run.fold_folder).get(models.LEARNED, {}).items():
                models.warn_of_other_weights(run.fold_folder, run.folder.with_name(name), learned)
        if run.is_trained():
            longer = "" if run.lengthen else f"; {_longer(run.settings)} makes it longer"
            log.info(f"{run.fold_folder}: training is finished{longer}" + "; no preview is drawn" * preview)
        else:
            _preprocess_and_train(run, seed, ranks, device, preview, start)
            if ranks.rank == 0 and models.read_weights_header(run.fold_folder / models.MODEL).get("epochs") == 1:
                log.info(f"only one epoch was trained, for a first look: {_longer(run.settings)} trains longer")
    release_memory(device)  # of the training; the validation plans with what is free
    scores = None if run.split.name == ALL or ranks.rank else _score_held_out(run, device)
    if ranks.rank:
        wait_for_first(run.is_done)
    release_memory(device)
    return scores


def _longer(settings: Settings) -> str:
    """Return an option for a longer run."""
    limit = settings.training.time_limit
    return f"`--epochs {2 * settings.training.epochs}`" if limit is None else f"`--time-limit {time_text(2 * limit)}`"


def _predict_first_stage(run: TrainingRun, case_ids: Sequence[str], device: torch.device) -> dict[str, Path] | None:
    if run.first is None:
        return None
    return predict_first_stage(
        run.first.subset(case_ids), run.dataset, run.plan, run.configuration, run.paths.preprocessed,
        run.settings.training.workers, str(device),
    )  # fmt: skip


def _preprocess_and_train(
    run: TrainingRun, seed: int, ranks: Ranks, device: torch.device, preview: bool, start: float
) -> None:
    """Preprocess and load the cases, and train on them."""
    begin = time.monotonic() - start
    _announce(run)
    split, training = run.split, run.settings.training
    store = run.paths.preprocessed
    preprocess_dataset(run.dataset, run.plan, [run.configuration], store, training.workers)
    stage_maps = _predict_first_stage(run, sorted({*split.training, *split.validation}), device) or {}
    taught = predict_teachers(run.teachers, run.paths, run.dataset, run.plan, run.configuration, split, str(device))
    release_memory(device)  # of the networks that predicted

    def open_stored(case_id: str) -> Any:
        case = open_case(store, run.plan, run.configuration, case_id)
        files = {"previous": stage_maps.get(case_id), "teacher": taught.get(case_id)}
        return replace(case, **{name: open_array(file) for name, file in files.items() if file is not None})

    def load(ids: Sequence[str]) -> Sequence[Any]:
        reserve = run.plan.configuration(run.configuration).memory_gb or 0.0
        return load_cases(ids, open_stored, training.cache, device, reserve, ranks.world)

    loading = time.monotonic()
    cases = load(split.training)
    held_out = cases if split.name == ALL else load(split.validation)
    # a time limit covers the loading, and of what was before as much as leaves time to train
    seconds = time.monotonic() - loading + min(loading - begin, _START_SHARE * limit_seconds(run.settings))
    record = None if split.name == ALL else read_record(run.paths.splits)
    of = f" of {record.splits}" if record is not None and record.splits is not None else ""
    limit = f" for {log.duration(60 * training.time_limit)}" if training.time_limit else ""
    log.info(f"training {run.configuration} fold {split.name}{of} on {len(cases)} cases{limit} in {run.fold_folder}")
    sources: list[Teacher | FirstStage] = [*run.teachers, *filter(None, [run.first])]
    learned = {one.folder.name: {k: models.weights_fingerprint(one.folder, k) for k in one.folds} for one in sources}
    if ranks.rank == 0:
        record_cases(run.fold_folder, split, known_stamps(run.paths), learned)
        for teacher in run.teachers:
            record_seen(run.fold_folder, teacher.folder.name, [teacher.folder / f"fold_{k}" for k in teacher.folds])
    job = Job(
        run.plan, run.configuration, run.settings, seed, run.fold_folder, device, cases, held_out, ranks,
        formats=run.paths.formats if device.type == "cuda" else None, callbacks=run.callbacks,
    )  # fmt: skip
    if run.first is not None:
        job = replace(job, first_stage=learned[run.first.folder.name])
    if split.name != ALL:
        job = replace(job, passes=_count_passes(job))
    if preview and ranks.rank == 0:
        draw_preview(job, job.folder / models.PREVIEW)
    train_fold(job, seconds)


def _announce(run: TrainingRun) -> None:
    """Log how the network differs from the plan, and which folds are not used."""
    name, settings = run.configuration, run.settings
    chosen = settings.plan
    _warn_of_edits(run.dataset)
    if (chosen.preset, chosen.memory, chosen.spacing) != (None, None, None):
        spacing = run.plan.configuration(name).spacing
        lengths = f"{join_by_x(spacing)} {length_unit(run.plan)}"
        log.info(f"planned for the recipe: {run.plan.preset}, {run.plan.memory_gb:g} GB, {lengths}")
        if chosen.spacing is not None:
            warn_of_spacing(run.plan, spacing, run.dataset)
    planned = Plan.read(run.paths.plans).configurations.get(name)
    changes = {} if planned is None else configuration_changes(planned, run.plan.configuration(name))
    changes = {key: values for key, values in changes.items() if key not in _FROM_THE_PATCH} or changes
    words = [_in_words(key, *values) for key, values in changes.items()]
    if settings.network.factory is not None:
        words.append(f"network made by {settings.network.factory}")
    if words:
        by = "the settings" if settings.recipe == "default" else f"recipe {settings.recipe}"
        by += "" if settings.training.init is None else " and the model to start from"
        log.info(f"{name}, {by}: {', '.join(words)}")
    if "distillation" in settings.loss.model_fields_set and not run.teachers:
        log.warn("loss.distillation is set without a model to learn from: `nnlite distill MODEL` gives one")
    if settings.training.patch_growth and not smaller_patches(run.plan.configuration(name)):
        log.warn(f"training.patch_growth has no effect: the patch of {name} cannot be smaller")
    if settings.training.early_stop is not None and (run.split.name == ALL or not run.split.validation):
        effect = "uses the Dice of training cases" if run.split.name == ALL else "has no effect"
        log.warn(f"training.early_stop {effect}: fold {run.split.name} holds out no case")
    for teacher in run.teachers:
        own, theirs = settings.augmentation, Settings.model_validate(teacher.settings).augmentation
        warn_of_lost_swaps(teacher.folder.name, theirs, own, run.plan, run.plan.configuration(name).dimensions)
    if run.split.name != ALL and run.rule == DEFAULT_RULE:
        check_folds(run.paths.splits, run.dataset, run.rule)


def _warn_of_edits(planned: Dataset) -> None:
    """Warn of raw data whose description has changed since they were planned; images are not compared."""
    try:  # without dataset.json all label maps would be read
        now = planned if planned.layout == "plain" else read_dataset(planned.root)
    except (UserError, OSError):  # the raw data may be gone
        return
    before, after = ({case.id for case in cases} for cases in ((*planned.cases, *planned.excluded), now.cases))
    changes = {"labels": now.labels != planned.labels, "channels": now.channels != planned.channels}
    changes["cases"] = before != after
    if words := " and ".join(word for word, is_other in changes.items() if is_other):
        what = f"its {words} are not those of the plan, which are trained"
        log.warn(f"{planned.root}: {what}; `nnlite plan` takes them up")


def _in_words(key: str, before: Any, after: Any) -> str:
    """Return such as "patch 32x32 instead of 64x64"."""
    if key == "patch_size":
        before, after = join_by_x(before), join_by_x(after)
    return f"{key.removesuffix('_size')} {after} instead of {before}"


def _count_passes(job: Job) -> dict[float, int]:
    """Count the network passes of the validation (windows and mirrored copies), by step size."""
    copies = 2 ** len(job.mirror_axes) if job.settings.inference.mirroring else 1

    def count_windows(step: float) -> int:
        axes = (zip(case.label.shape, job.patch, strict=True) for case in job.validation)
        return sum(prod(len(window_starts(size, patch, step)) for size, patch in case) for case in axes)

    return {step: copies * count_windows(step) for step in validation_step_sizes(job.settings)}


def _score_held_out(run: TrainingRun, device: torch.device) -> Scores:
    """Predict and score the held-out cases."""
    held_out = run.split.validation
    planned = models.read_weights_header(run.fold_folder / models.MODEL).get("validation")  # an imported model has none
    step_size = None
    if planned is not None:
        if not (run.fold_folder / models.VALIDATION).is_dir():
            announce_validation(run.settings, ValidationPlan(**planned), len(held_out))
        if planned["step_size"] != run.settings.inference.step_size:
            step_size = planned["step_size"]
    return validate_fold(
        run.folder, run.split.name, run.dataset, held_out, run.device, _predict_first_stage(run, held_out, device),
        step_size,
        trust_code=True,  # `open_run` made sure that the model names the code of these settings and no other
    )  # fmt: skip
