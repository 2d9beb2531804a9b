"""Training one fold: read this file from top to bottom.

fold folder: checkpoint.safetensors (every epoch), metrics.jsonl and metrics.csv (a line an epoch), progress.png,
             and at the end model.safetensors, which marks the fold as finished
"""

from __future__ import annotations

import math
import shutil
import time
from collections.abc import Iterator
from contextlib import closing, nullcontext
from dataclasses import asdict, dataclass, field, fields, replace
from functools import partial
from itertools import islice
from typing import Any

import numpy as np
import torch
from torch import Tensor

from nnunet_lite import log
from nnunet_lite.errors import UserError
from nnunet_lite.files import sweep, understood
from nnunet_lite.models.checkpoint import CHECKPOINT, load_checkpoint, read_state, save_checkpoint, save_weights
from nnunet_lite.models.folder import MODEL, VALIDATION, exclusive, length
from nnunet_lite.networks.precision import Arithmetic, candidates, keep_freed_memory, use_allowed_cpus
from nnunet_lite.system import GB, in_units
from nnunet_lite.training.batches import Batch, check_augmentation, make_batch, training_batches
from nnunet_lite.training.distributed import ALONE, LOOK_EVERY, Clock, any_rank, from_first, sum_over_ranks
from nnunet_lite.training.initial import freeze, start_from
from nnunet_lite.training.job import Job
from nnunet_lite.training.limit import (
    PSEUDO_VALIDATED,
    Validation,
    announce,
    forward_seconds,
    planned_validation,
    training_seconds,
)
from nnunet_lite.training.loss import check_weights, pseudo_dice_counts
from nnunet_lite.training.optim import Plateau, learning_rate
from nnunet_lite.training.prefetch import prefetch
from nnunet_lite.training.record import Row, recording
from nnunet_lite.training.step import (
    Learner,
    averaged,
    choose_arithmetic,
    loss_of,
    make_learner,
    make_network,
    parallel,
    train_step,
)
from nnunet_lite.training.watch import (
    Seen,
    Stop,
    Trend,
    memory_peak,
    names_of,
    out_of_memory,
    stoppable,
    voxels_per_class,
)

_VALIDATION_STREAM = 2**31  # keeps the validation patches apart from every training epoch


@dataclass
class State:
    """Where a run stands; stored with every checkpoint.

    `iteration` and `losses` are those of an epoch that a signal broke off.
    """

    plateau: Plateau
    arithmetic: Arithmetic
    epoch: int = 0
    iteration: int = 0
    losses: list[float] = field(default_factory=list)
    scale: float = 2.0**16  # of the loss, for fp16
    seconds: float = 0.0  # that training took, with timing of number formats and pseudo-validation
    pace: float = 0.0  # seconds per step of the last epoch
    pass_seconds: float = 0.0  # that the network took for a patch in the last pseudo-validation
    bad_steps: int = 0
    trend: Trend = field(default_factory=Trend)
    seen: Seen = field(default_factory=Seen)

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> State:
        kinds = {"plateau": Plateau, "arithmetic": Arithmetic, "trend": Trend, "seen": Seen}
        known = {each.name for each in fields(cls)}
        return cls(**{k: kinds[k](**v) if k in kinds else v for k, v in values.items() if k in known})


def train_fold(job: Job) -> None:
    """Train a fold, from its last checkpoint if there is one, and write its model.

    Raises
    ------
    UserError : another process trains it; the loss is not finite too often; the GPU's memory is too small for the plan.
    Stopped : a signal asked for it; the checkpoint is written.
    """
    check_weights(job.settings.loss, job.plan.labels)
    check_augmentation(job)
    with exclusive(job.folder) if job.ranks.rank == 0 else nullcontext(), stoppable() as stop:
        if job.ranks.rank == 0:
            sweep(job.folder, alone=True)
        taken = torch.cuda.memory_allocated(job.device) if job.device.type == "cuda" else 0
        try:
            _train_fold(job, stop)
        except torch.OutOfMemoryError:
            what, fix = out_of_memory(job.plan, job.configuration, job.device, taken)
            raise UserError(what, fix=fix) from None


def _train_fold(job: Job, stop: Stop) -> None:
    use_allowed_cpus()
    if job.device.type == "cpu":
        keep_freed_memory()
    torch.backends.cudnn.benchmark = True  # all batches have one shape
    start = time.monotonic()
    learner, state = _begin(job)
    state.seconds += from_first(time.monotonic() - start, job.ranks)
    log.info(f"{job.device}, {state.arithmetic.precision}, channels-last {state.arithmetic.channels_last}: "
             f"{state.arithmetic.reason}")  # fmt: skip
    first = state.iteration * job.settings.training.accumulate
    with closing(
        prefetch(training_batches(job, state.epoch, first), job.device, job.settings.training.workers)
    ) as made:
        _run_epochs(job, learner, made, state, stop)
    if job.ranks.rank == 0:
        about = {"configuration": job.configuration, "epochs": state.epoch, "seconds": round(state.seconds, 1),
                 "length": length(job.settings), "device": job.device.type,
                 "validation": None if (planned := _validation(job, state)) is None else asdict(planned),
                 "arithmetic": state.arithmetic.to_json()}  # fmt: skip
        shutil.rmtree(job.folder / VALIDATION, ignore_errors=True)  # of a shorter run that was extended
        with averaged(learner):
            save_weights(job.folder / MODEL, learner.network, about)


def _begin(job: Job) -> tuple[Learner, State]:
    """The network as the last checkpoint left it, else as it starts.

    How it is trained on is what the settings say by now, down to the number format.
    """
    network, checkpoint = make_network(job), job.folder / CHECKPOINT
    if checkpoint.is_file():
        with understood(checkpoint, "Use --restart."):
            state = State.from_json(read_state(checkpoint))
        if not from_first(_is_candidate(job, state.arithmetic), job.ranks):
            state.arithmetic = choose_arithmetic(job, network)
        patience = job.settings.training.early_stop
        if patience is not None and state.trend.since >= patience and (job.folder / MODEL).is_file():
            state.trend = replace(state.trend, since=0)  # it had stopped early, and is asked for more
        freeze(network, job.settings.training.freeze)
        learner = make_learner(job, network, state.arithmetic, state.scale)
        load_checkpoint(checkpoint, network, learner.optimizer, learner.average)
        log.info(f"going on from epoch {state.epoch} of {job.settings.training.epochs}")
        limit = job.settings.training.time_limit
        if limit is not None and _progress(job, state, since=state.pace / 2) >= 1:
            log.info(f"the {limit:g} minutes of training.time_limit are over; --time-limit gives it more")
    else:
        start_from(network, job)
        freeze(network, job.settings.training.freeze)
        state = State(Plateau(), choose_arithmetic(job, network))
        learner = make_learner(job, network, state.arithmetic, state.scale)
    return parallel(job, learner), state


def _is_candidate(job: Job, arithmetic: Arithmetic) -> bool:
    """Whether the settings, on this machine, still allow what a run was begun with."""
    training = job.settings.training
    allowed = candidates(job.device, training.precision, training.channels_last)
    return any((a.precision, a.channels_last) == (arithmetic.precision, arithmetic.channels_last) for a in allowed)


def _run_epochs(job: Job, learner: Learner, batches: Iterator[Batch], state: State, stop: Stop) -> None:
    """Train to the end of the run, with a line of metrics and a checkpoint after every epoch."""
    writes = job.ranks.rank == 0
    with recording(job.folder, state.epoch, job.settings.training.tensorboard) if writes else nullcontext() as record:
        while not _is_over(job, state):
            start = time.monotonic()
            row = _epoch(job, learner, batches, state, stop)
            if row is None:
                state.seconds += time.monotonic() - start
                _save(job, learner, state)
                stop.raise_if_asked(f"in epoch {state.epoch + 1} after step {state.iteration}")
                continue
            limited = job.settings.training.time_limit is not None
            with averaged(learner):
                row |= _validate(job, learner, state, PSEUDO_VALIDATED * row["seconds"] if limited else math.inf)
            state.seconds += from_first(time.monotonic() - start, job.ranks)
            state.trend = state.trend.after_epoch(row.get("mean_dice"))
            state.seen.after_epoch(row.get("dice", {}), _progress(job, state))
            if record is not None:
                record.add(row)
                log.info(_line(job, row, state))
                if row["epoch"] == 1 and (planned := _validation(job, state)) is not None:
                    announce(job.settings, planned, len(job.validation))
            _save(job, learner, state)
            if _agreed(job, stop):
                stop.raise_if_asked(f"after epoch {state.epoch}")


def _save(job: Job, learner: Learner, state: State) -> None:
    if job.ranks.rank == 0:
        state.scale = learner.scaler.get_scale() if learner.scaler.is_enabled() else state.scale
        save_checkpoint(job.folder / CHECKPOINT, learner.network, learner.optimizer, asdict(state), learner.average)


def _progress(job: Job, state: State, iteration: int = 0, since: float = 0.0, pace: float = 0.0) -> float:
    """How much of the run is done: by iterations, or by time where there is a limit and it comes first.

    `iteration` is that of an epoch that began `since` seconds ago, with `pace` seconds per step.
    """
    training = job.settings.training
    done = (state.epoch + iteration / training.iterations) / training.epochs
    whole = training_seconds(job, state.pass_seconds or forward_seconds(job, pace or state.pace))
    return max(done, (state.seconds + since) / whole)


def _validation(job: Job, state: State) -> Validation | None:
    """How the held-out cases will be predicted whole."""
    return planned_validation(job, state.pass_seconds or forward_seconds(job, state.pace))


def _is_over(job: Job, state: State) -> bool:
    schedule, patience = job.settings.schedule, job.settings.training.early_stop
    if schedule.name == "plateau" and job.settings.optimizer.lr * state.plateau.factor < schedule.min_lr:
        log.info(f"the learning rate has fallen below schedule.min_lr = {schedule.min_lr:g}, which ends the run")
        return True
    if patience is not None and state.trend.since >= patience:
        log.info(f"stopping early: the held-out Dice has not risen for {state.trend.since} epochs")
        return True
    return state.epoch > 0 and _progress(job, state, since=state.pace / 2) >= 1  # as within an epoch


def _epoch(job: Job, learner: Learner, batches: Iterator[Batch], state: State, stop: Stop) -> Row | None:
    """Train one epoch and return its row of metrics, or None where a signal broke it off; `state` moves on.

    A GPU is not waited for before the end: losses and what was skipped stay on the device.
    """
    training, start, waited = job.settings.training, time.monotonic(), 0.0
    learner.network.train()
    before, losses, taken, seen = state.losses, [], [], []
    rate, case_ids, first, broken_off = 0.0, [], state.iteration, False
    clock = Clock(job.ranks if training.time_limit else ALONE, state.pace)  # only a limit makes time count
    for iteration in range(first, training.iterations):
        since = clock.after(iteration - first)
        pace = since / (iteration - first) if iteration > first else state.pace
        if iteration > first and _progress(job, state, iteration, since + pace / 2, pace) >= 1:
            break  # the limit is nearer now than after another step
        progress = _progress(job, state, iteration, since, pace) if state.epoch or iteration else 0.0
        rate = learning_rate(job.settings.optimizer.lr * state.plateau.factor, job.settings.schedule, progress)
        asked = time.monotonic()
        step_batches = list(islice(batches, training.accumulate))
        waited += time.monotonic() - asked
        number = state.epoch * training.iterations + iteration
        torch.manual_seed(job.seed + number)  # for a network of the user's that draws random numbers
        loss, done = train_step(job, learner, step_batches, rate, number)
        losses.append(loss)
        taken.append(done | torch.isfinite(loss) if learner.scaler.is_enabled() else done)  # fp16's scale adapts
        case_ids.append([case for _, _, ids in step_batches for case in ids])
        if state.epoch == 0:
            n = job.plan.labels.n_classes + (job.plan.labels.ignore_class is not None)
            seen += [voxels_per_class(classes, n) for _, classes, _ in step_batches]
        if job.device.type == "cpu":
            _refuse_bad_steps(job, state, taken, case_ids)
        state.iteration = iteration + 1
        if (job.ranks.world == 1 or (iteration + 1) % LOOK_EVERY == 0) and _agreed(job, stop):
            broken_off = state.iteration < training.iterations
            break
    state.losses = before + (torch.stack(losses).tolist() if losses else [])
    _refuse_bad_steps(job, state, taken, case_ids)
    state.bad_steps += len(taken) - int(torch.stack(taken).sum()) if taken else 0
    if seen:
        state.seen.count(torch.cat(seen), job.plan.labels, job.ranks)
    if broken_off:
        return None
    seconds = time.monotonic() - start
    if state.epoch == 0:
        state.seen.report_unseen(job.plan.labels)
    row = {
        "epoch": state.epoch + 1,
        "train_loss": _finite(_mean(state.losses)),
        "lr": rate,
        "seconds": round(seconds, 2),
        "samples_per_second": round(len(losses) * training.accumulate * job.planned.batch_size / max(seconds, 1e-9), 2),
        "waiting": round(waited / max(seconds, 1e-9), 3),
        "memory_gb": round(memory_peak(job.device), 2),
        "bad_steps": state.bad_steps,
    }
    _end_epoch(job, state, seconds / max(len(losses), 1))
    return row


def _end_epoch(job: Job, state: State, pace: float) -> None:
    """Move `state` to the beginning of the next epoch; `pace` is in seconds per step."""
    loss = _mean(state.losses)
    if job.settings.schedule.name == "plateau" and math.isfinite(loss):
        state.plateau = state.plateau.after_epoch(loss, job.settings.schedule)
    state.epoch, state.iteration, state.losses = state.epoch + 1, 0, []
    state.pace = from_first(pace, job.ranks)


def _agreed(job: Job, stop: Stop) -> bool:
    """Whether a signal had come to any rank: all of them stop at the same step.

    One that comes while they ask each other stays, for the next time.
    """
    asked = any_rank(stop.asked or 0, job.ranks)
    stop.asked = stop.asked or asked or None
    return asked > 0


def _refuse_bad_steps(job: Job, state: State, taken: list[Tensor], case_ids: list[list[str]]) -> None:
    """End a run in which too many steps had a loss or gradient that is not finite.

    Raises
    ------
    UserError : that is so; names the cases of these steps.
    """
    if not taken or (job.device.type == "cpu" and bool(taken[-1])):
        return
    bad = [i for i, done in enumerate(torch.stack(taken).tolist()) if not done]
    if state.bad_steps + len(bad) >= job.settings.training.max_bad_steps:
        raise UserError(
            f"the loss was not finite in {state.bad_steps + len(bad)} steps, with the cases {names_of(case_ids, bad)}",
            fix="Look at these images with `nnlite check`; else lower --lr"
            + (" or use --precision fp32." if state.arithmetic.precision != "fp32" else "."),
        )


@torch.inference_mode()
def _validate(job: Job, learner: Learner, state: State, allowed: float) -> Row:
    """Loss and pseudo-Dice on fixed patches of the held-out cases; Dice is None for a label that they do not show.

    When `allowed` seconds are over, on those patches that were seen until then.
    """
    n_batches = job.settings.training.validation_iterations
    if not n_batches or not job.validation:
        return {}
    learner.network.eval()
    labels = job.plan.labels
    regions = labels.region_classes if labels.has_regions else None
    total = torch.zeros((), device=job.device)
    counts = torch.zeros(3, len(labels.region_names), device=job.device, dtype=torch.float64)
    makers = (partial(make_batch, job, job.validation, _VALIDATION_STREAM, i, augment=False) for i in range(n_batches))
    start, done = time.monotonic(), 0
    with closing(prefetch(makers, job.device, job.settings.training.workers)) as made:
        for batch in made:
            loss, outputs = loss_of(job, learner, batch)
            finest = outputs[0] if isinstance(outputs, list) else outputs
            total += loss
            found = pseudo_dice_counts(finest, batch[1], regions, labels.ignore_class)
            counts += found.where(loss.isfinite(), math.nan)  # logits that are not finite would count as background
            done += 1
            if math.isfinite(allowed) and from_first(time.monotonic() - start > allowed, job.ranks):
                break
    if job.ranks.world > 1:
        counts = sum_over_ranks(counts)
    tp, fp, fn = counts.cpu().numpy()
    dice = [_finite(float(2 * t / (2 * t + p + n)), 4) if t + n else None for t, p, n in zip(tp, fp, fn, strict=True)]
    known = [d for d in dice if d is not None]
    state.pass_seconds = from_first((time.monotonic() - start) / (done * job.planned.batch_size), job.ranks)
    return {
        "validation_loss": _finite(float(total) / done),
        "dice": dict(zip(labels.region_names, dice, strict=True)),
        "mean_dice": round(float(np.mean(known)), 4) if known else None,
    }


def _mean(losses: list[float]) -> float:
    """Of the steps whose loss was finite."""
    finite = [loss for loss in losses if math.isfinite(loss)]
    return float(np.mean(finite)) if finite else math.nan


def _finite(value: float, digits: int = 5) -> float | None:
    """Rounded for metrics.jsonl; JSON has no NaN."""
    return round(value, digits) if math.isfinite(value) else None


def _line(job: Job, row: Row, state: State) -> str:
    """One epoch for a person to read."""
    done, validation = max(_progress(job, state), 1e-9), _validation(job, state)
    left = state.seconds / done * max(0.0, 1 - done) + (0.0 if validation is None else validation.seconds)
    dice = row.get("mean_dice")
    each = " ".join("-" if d is None else f"{d:.3f}" for d in list(row.get("dice", {}).values())[:8])
    loss = "not finite" if row["train_loss"] is None else f"{row['train_loss']:+.4f}"
    score = f"  Dice {dice:.3f} ({each})" if dice is not None else ""
    if row.get("validation_loss", 0.0) is None:
        score = "  held-out loss not finite"
    speed = (
        f"{row['samples_per_second']:.3g} samples/s, {row['waiting']:.0%} waiting, {in_units(row['memory_gb'] * GB)}"
    )
    return (
        f"epoch {row['epoch']:>4}  loss {loss}{score}  lr {row['lr']:.1e}  "
        f"{log.duration(row['seconds'])} ({speed}), {log.duration(left)} left"
    )
