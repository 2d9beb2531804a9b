"""One fold from its plan to its scores: preprocess -> first stage of a cascade -> training/loop.py -> validate.

Read it from top to bottom; `train_and_validate` does it, training_run.py says what is trained.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import replace
from math import prod
from pathlib import Path
from typing import Any, Literal

import torch

from nnunet_lite import log
from nnunet_lite.commands.training_run import TrainingRun, prepare_run
from nnunet_lite.errors import UserError
from nnunet_lite.evaluation.cross_validation import validate_fold
from nnunet_lite.evaluation.scores import Scores
from nnunet_lite.inference.first_stage import FirstStage, predict_first_stage, read_stage_map
from nnunet_lite.inference.windows import window_starts
from nnunet_lite.models.folder import (
    MODEL,
    VALIDATION,
    fold_seed,
    is_begun,
    is_complete,
    is_finished,
    lock_fold,
    open_run,
    other_folds,
    read_weights_header,
    set_aside,
)
from nnunet_lite.networks.precision import pick_device
from nnunet_lite.networks.unet import build_network, mixes_samples
from nnunet_lite.planning.schema import Plan, configuration_changes
from nnunet_lite.preprocessing.store import open_case, preprocess_dataset
from nnunet_lite.settings import with_changes
from nnunet_lite.training.cache import load_cases
from nnunet_lite.training.dataloader import check_augmentation
from nnunet_lite.training.distributed import (
    Ranks,
    current_ranks,
    from_first,
    join_group,
    rank_device,
    report_lost_peer,
)
from nnunet_lite.training.job import Job
from nnunet_lite.training.limits import ValidationPlan, announce_validation, validation_step_sizes
from nnunet_lite.training.loop import train_fold
from nnunet_lite.training.loss import check_weights
from nnunet_lite.training.preview import draw_preview
from nnunet_lite.training.splits import (
    ALL,
    DEFAULT_RULE,
    check_folds,
    read_record,
    record_cases,
    refuse_other_cases,
)


def train_and_validate(
    run: TrainingRun,
    *,
    restart: bool | Literal["model"] = False,
    resume: bool = False,
    force: bool = False,
    preview: bool = False,
) -> Scores | None:
    """Train a fold, or resume it, then predict and score its held-out cases.

    Parameters
    ----------
    run : TrainingRun
        See `prepare_run`.
    restart, resume, force, preview
        As in the command `train`.

    Returns
    -------
    Scores or None
        None for the fold "all", and in all processes but the first.
    """
    ranks = current_ranks()
    device = rank_device(ranks, pick_device(run.device))
    join_group(ranks, device)
    if device.type == "cpu" and run.settings.recipe == "default" and run.device is None:
        log.warn("there is no GPU, for which the recipe `default` is made; `--recipe cpu` gives a model in minutes")
    with report_lost_peer():
        _check_trainable(run, ranks, device)
        _check_earlier_run(run, ranks, restart, resume, force)
        if run.first is not None and not is_finished(run.fold_folder):
            _train_first_stage(run, run.first, force)
        with lock_fold(run.fold_folder) if ranks.rank == 0 else nullcontext():
            seed = 0
            if ranks.rank == 0:
                previous = None if run.first is None else run.first.folder.name
                seed = open_run(
                    run.folder, run.plan, run.dataset, run.configuration, run.settings,
                    fold=run.split.name, force=force, previous=previous,
                )  # fmt: skip
            seed = fold_seed(from_first(seed, ranks), run.split.name)
            if is_complete(run.fold_folder, run.settings):
                log.info(f"{run.fold_folder}: training is finished" + "; no preview is drawn" * preview)
            else:
                _preprocess_and_train(run, seed, ranks, device, preview)
    return None if run.split.name == ALL or ranks.rank else _score_held_out(run, device)


def _check_trainable(run: TrainingRun, ranks: Ranks, device: torch.device) -> None:
    """Refuse settings that the loss, the augmentation or the network cannot use.

    Raises
    ------
    UserError
        Class weights or swaps of other labels, no such transform, a network that cannot be built, or one that
        normalizes each process's part of a batch alone.
    """
    check_weights(run.settings.loss, run.plan.labels)
    check_augmentation(Job(run.plan, run.configuration, run.settings, 0, run.fold_folder, device, [], [], ranks))
    on_cpus = ranks.world > 1 and device.type != "cuda"
    factory = run.settings.network.factory
    if factory is not None or on_cpus:
        network = build_network(run.plan, run.configuration, factory, run.settings.training.deep_supervision)
        if on_cpus and mixes_samples(network):
            what = "batch normalisation over several processes needs GPUs"
            raise UserError(what, fix="Train in one process, or with --set network.norm=instance.")


def _check_earlier_run(
    run: TrainingRun, ranks: Ranks, restart: bool | Literal["model"], resume: bool, force: bool
) -> None:
    """Refuse an earlier run that may not be resumed, or set it aside on request.

    Raises
    ------
    UserError
        The earlier run has other settings or cases, or there is none to resume.
    """
    if resume and restart:
        raise UserError("--resume and --restart exclude each other")
    if resume and not is_begun(run.fold_folder):
        raise UserError("there is nothing to resume", run.fold_folder, "Leave out --resume to begin.")
    whole = restart == "model" or not other_folds(run.folder, run.split.name)
    if not (restart and whole):
        run.check_resume(force, restart=bool(restart))
    if restart and ranks.rank == 0:
        set_aside(run.folder if whole else run.fold_folder)
    from_first(None, ranks)  # the others wait until the folder is moved


def _train_first_stage(run: TrainingRun, first: FirstStage, force: bool) -> None:
    """Train the folds of the first stage that are missing, with the same recipe and settings."""
    refuse_other_cases(first.folder, run.split, run.paths.splits)
    todo = f"to be trained first: {', '.join(first.missing)}" if first.missing else "all trained"
    needed = f"fold {', '.join(first.folds)} of {first.folder}"
    log.info(f"the second stage learns from what {first.configuration} predicts: {needed}; {todo}")
    # a model to start from fits only one of the two networks
    settings = with_changes(run.settings, {"training.init": None, "training.freeze": None})
    for fold in first.missing:
        stage = prepare_run(
            run.paths, first.configuration, fold, settings, rule=run.rule, name=first.folder.name, device=run.device
        )
        train_and_validate(stage, force=force)


def _predict_first_stage(run: TrainingRun, case_ids: Sequence[str], device: torch.device) -> dict[str, Path] | None:
    if run.first is None:
        return None
    return predict_first_stage(
        run.first.subset(case_ids), run.dataset, run.plan, run.configuration, run.paths.preprocessed,
        run.settings.training.workers, str(device),
    )  # fmt: skip


def _preprocess_and_train(run: TrainingRun, seed: int, ranks: Ranks, device: torch.device, preview: bool) -> None:
    """Preprocess and load the cases, and train on them."""
    _announce(run)
    split, training = run.split, run.settings.training
    store = run.paths.preprocessed
    preprocess_dataset(run.dataset, run.plan, [run.configuration], store, training.workers)
    stage_maps = _predict_first_stage(run, sorted({*split.training, *split.validation}), device)

    def open_stored(case_id: str) -> Any:
        case = open_case(store, run.plan, run.configuration, case_id)
        return case if stage_maps is None else replace(case, previous=read_stage_map(stage_maps[case_id]))

    def load(ids: Sequence[str]) -> list[Any]:
        reserve = run.plan.configuration(run.configuration).memory_gb or 0.0
        return load_cases(ids, open_stored, training.cache, device, reserve, ranks.world)

    cases = load(split.training)
    held_out = cases if split.name == ALL else load(split.validation)
    record = None if split.name == ALL else read_record(run.paths.splits)
    of = f" of {record.splits}" if record is not None and record.splits is not None else ""
    log.info(f"training {run.configuration} fold {split.name}{of} on {len(cases)} cases in {run.fold_folder}")
    record_cases(run.fold_folder, split)
    job = Job(run.plan, run.configuration, run.settings, seed, run.fold_folder, device, cases, held_out, ranks)
    if split.name != ALL:
        job = replace(job, passes=_count_passes(job))
    if preview and ranks.rank == 0:
        draw_preview(job, job.folder / "preview.png")
    train_fold(job)


def _announce(run: TrainingRun) -> None:
    """Log how the network differs from the plan, and which folds are not used."""
    name, settings = run.configuration, run.settings
    if settings.plan.preset is not None or settings.plan.memory is not None:
        log.info(f"planned for the recipe: {run.plan.preset}, {run.plan.memory_gb:g} GB")
    planned = Plan.read(run.paths.plans).configurations.get(name)
    changes = [] if planned is None else configuration_changes(planned, run.plan.configuration(name))
    if settings.network.factory is not None:
        changes.append(f"network made by {settings.network.factory}")
    if changes:
        by = "the settings" if settings.training.init is None else "the settings and the model to start from"
        log.info(f"{name}, changed against the plan by {by}: {'; '.join(changes)}")
    if run.split.name != ALL and run.rule == DEFAULT_RULE:
        check_folds(run.paths.splits, run.dataset, run.rule)


def _count_passes(job: Job) -> dict[float, int]:
    """Count the network passes of the validation (windows and mirrored copies), by step size."""
    augmentation, inference = job.settings.augmentation, job.settings.inference
    mirrored = inference.mirroring and augmentation.enabled and augmentation.p_mirror > 0
    copies = 2 ** len(job.mirror_axes) if mirrored else 1

    def count_windows(step: float) -> int:
        axes = (zip(case.label.shape, job.patch, strict=True) for case in job.validation)
        return sum(prod(len(window_starts(size, patch, step)) for size, patch in case) for case in axes)

    return {step: copies * count_windows(step) for step in validation_step_sizes(job.settings)}


def _score_held_out(run: TrainingRun, device: torch.device) -> Scores:
    """Predict and score the held-out cases."""
    held_out = run.split.validation
    planned = read_weights_header(run.fold_folder / MODEL).get("validation")  # an imported model has none
    step_size = None
    if planned is not None:
        if not (run.fold_folder / VALIDATION).is_dir():
            announce_validation(run.settings, ValidationPlan(**planned), len(held_out))
        if planned["step_size"] != run.settings.inference.step_size:
            step_size = planned["step_size"]
    return validate_fold(
        run.folder, run.split.name, run.dataset, held_out, run.device, _predict_first_stage(run, held_out, device),
        step_size,
        trust_code=True,  # `open_run` made sure that the model names the code of these settings and no other
    )  # fmt: skip
