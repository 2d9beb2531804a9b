"""Training one fold. Read this file from top to bottom.

`train_fold` calls `_start` (network, or checkpoint) and `_run_epochs`, which for each epoch calls `_train_epoch`
(`train_step` in learner.py) and `_pseudo_validate`.

fold folder: checkpoint.safetensors (every epoch), metrics.jsonl and metrics.csv (a line per epoch), progress.png,
             and at the end model.safetensors, which marks the fold as finished
"""

from __future__ import annotations

import math
import shutil
import time
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing, contextmanager, nullcontext
from dataclasses import asdict, replace
from functools import partial
from itertools import islice
from statistics import median_low
from typing import Any

import numpy as np
import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor

from nnunet_lite import log
from nnunet_lite.data.problems import few
from nnunet_lite.errors import UserError
from nnunet_lite.files import sweep, understood
from nnunet_lite.models.checkpoint import load_checkpoint, save_weights, snapshot_checkpoint
from nnunet_lite.models.folder import CHECKPOINT, MODEL, VALIDATION, read_weights_header, run_length
from nnunet_lite.networks.cpu import ParallelSamples, keep_freed_memory
from nnunet_lite.networks.devices import use_allowed_cpus
from nnunet_lite.networks.precision import ComputeFormat
from nnunet_lite.networks.winograd import limit_threads
from nnunet_lite.system import GB, in_units
from nnunet_lite.training import learner as learning
from nnunet_lite.training import limits
from nnunet_lite.training.callbacks import follow_epochs
from nnunet_lite.training.dataloader import Batch, count_oversampled, make_batch, prefetch, training_batches
from nnunet_lite.training.distributed import SYNC_EVERY, Clock, from_first, max_over_ranks, sum_over_ranks
from nnunet_lite.training.finetune import freeze, start_from
from nnunet_lite.training.job import Job
from nnunet_lite.training.launch import ALONE
from nnunet_lite.training.learner import Learner
from nnunet_lite.training.loss import pseudo_dice_counts
from nnunet_lite.training.metrics import LabelStatistics, Metrics, record_metrics, warn_of_absent
from nnunet_lite.training.optim import Plateau, learning_rate

_TIMED, _LONG = 5.0, 3600.0  # seconds of steps from which the length of a run follows; a run that is long for a CPU
_VALIDATION_STREAM = 2**31  # the seed stream of validation; training uses the number of the epoch


class State(BaseModel):
    """How far a run is; stored with every checkpoint.

    `iteration`, `losses` and `bad_steps` belong to an epoch that a signal interrupted. Times are in seconds.
    """

    model_config = ConfigDict(populate_by_name=True)  # some names in files differ, for old checkpoints

    compute: ComputeFormat = Field(alias="arithmetic")
    plateau: Plateau = Plateau()
    epoch: int = 0
    iteration: int = 0
    losses: list[float] = []
    scale: float = learning.LOSS_SCALE
    seconds: float = 0.0  # spent on training, with timing of number formats and pseudo-validation
    pace: float = 0.0  # seconds per step
    pass_seconds: float = 0.0  # seconds of the network per patch in the last pseudo-validation, on a CPU their median
    pseudo_seconds: float = 0.0  # of the last pseudo-validation
    bad_steps: int = 0
    stage: int = 0  # of the patches that grow; a run that is made longer keeps its patch
    early_stopping: limits.EarlyStopping = Field(limits.EarlyStopping(), alias="trend")
    labels: LabelStatistics = Field(default_factory=LabelStatistics, alias="seen")


def train_fold(job: Job, seconds: float = 0.0) -> None:
    """Train a fold, from its last checkpoint if there is one, and write its model.

    Parameters
    ----------
    job : Job
        What is trained.
    seconds : float
        What loading of the cases took, which counts as training time.

    Raises
    ------
    UserError
        The loss is not finite too often, or the GPU's memory is too small for the plan.
    Stopped
        A signal requested it; the checkpoint is written.
    """
    use_allowed_cpus()
    if job.device.type == "cpu":
        keep_freed_memory()
    torch.backends.cudnn.benchmark = True  # batches have one shape, or few where patches grow
    if job.ranks.rank == 0:
        sweep(job.folder, alone=True)
    from_first(None, job.ranks)  # the others write nothing that could be swept away
    with limits.explain_out_of_memory(job), limits.stop_on_signal(job.folder if job.ranks.rank == 0 else None) as stop:
        begin = time.monotonic() - seconds
        learner, state = _start(job)
        state.compute = learner.compute  # torch.compile may have failed
        if job.device.type == "cuda":  # candidates of other formats may have needed more
            torch.cuda.reset_peak_memory_stats(job.device)
        state.seconds += from_first(time.monotonic() - begin, job.ranks)
        compute, stop.starting = state.compute, False
        warn_of_absent(job.plan.labels.region_names, job.training)
        log.info(f"computing on {job.device} in {compute}" + f" ({compute.reason})" * bool(compute.reason))
        # Where other programs run too, threads that share short operations (data, loss, optimizer) wait for each other
        # longer than these take.
        parallel = isinstance(learner.forward, ParallelSamples)
        limited = limit_threads(-(-torch.get_num_threads() // 2)) if parallel else nullcontext()
        with limited, closing(_batches(job, state)) as batches:
            _run_epochs(job, learner, batches, state, stop)
        if job.ranks.rank == 0:
            _save_model(job, learner, state)


def _start(job: Job) -> tuple[Learner, State]:
    """Return the network as the last checkpoint left it, otherwise as it starts; settings may have changed since."""
    checkpoint, training = job.folder / CHECKPOINT, job.settings.training
    with log.working("preparing the network"):
        network = learning.make_network(job)
    formats = learning.list_training_formats(job)
    if not checkpoint.is_file():
        start_from(network, job)
        freeze(network, training.freeze)
        state = State(compute=learning.choose_format(job, network, formats))
        return learning.parallelize(job, learning.make_learner(job, network, state.compute)), state

    with understood(checkpoint, "Use --restart."):
        state = State.model_validate(read_weights_header(checkpoint))
    state.stage = min(state.stage, len(job.stages) - 1)  # other settings may have fewer
    if not from_first(state.compute in formats, job.ranks):  # settings and machine may be others now
        state.compute = learning.choose_format(job, network, formats)
    if _stops_early(job, state) and (job.folder / MODEL).is_file():  # the finished run is to be longer
        state.early_stopping = replace(state.early_stopping, since=0)
    freeze(network, training.freeze)
    learner = learning.make_learner(job, network, state.compute, state.scale)
    load_checkpoint(checkpoint, network, learner.optimizer, learner.average)
    of = f" of {training.epochs}" if training.time_limit is None else ""
    within = f"in epoch {state.epoch + 1}{of} after step {state.iteration}"
    log.info(f"resuming {within if state.iteration else f'from epoch {state.epoch}{of}'}")
    if training.time_limit is not None and _progress(job, state, state.pace / 2) >= 1:
        limit = log.duration(60 * training.time_limit)
        log.info(f"the {limit} of training.time_limit are over; --time-limit gives it more")
    return learning.parallelize(job, learner), state


# ----------------------------------------------------------------------------------------------------------- epochs


def _batches(job: Job, state: State) -> Generator[Batch, None, None]:
    """Yield the batches of a run from where it is, with the patch of `state.stage`, which may change between epochs."""
    training = job.settings.training
    while True:
        stage = state.stage
        makers = training_batches(job.stages[stage], state.epoch, state.iteration * training.accumulate)
        with closing(prefetch(makers, job.device, training.workers)) as batches:
            for batch in batches:
                yield batch
                if state.stage != stage:
                    break


def _run_epochs(job: Job, learner: Learner, batches: Iterator[Batch], state: State, stop: limits.StopRequest) -> None:
    """Train to the end of the run, with metrics and a checkpoint after every epoch."""
    training, writes = job.settings.training, job.ranks.rank == 0
    recording = record_metrics(job.folder, state.epoch) if writes else nullcontext()
    with recording as record, follow_epochs(job) as follow, _save_checkpoints(job, learner, state) as save:
        while not _is_over(job, state):
            begin, before = time.monotonic(), state.seconds
            if state.iteration == 0:
                state.stage = max(state.stage, job.stage_at(_progress(job, state) if state.epoch else 0.0))
            name = f"epoch {state.epoch + 1}" + f" of {training.epochs}" * (training.time_limit is None)
            with log.working(name, training.iterations, state.iteration) as advance:
                metrics = _train_epoch(job, learner, batches, state, stop, advance)
            if metrics is None:
                save(True)
                stop.check(f"in epoch {state.epoch + 1} after step {state.iteration}")
                continue
            allowed = math.inf if training.time_limit is None else limits.PSEUDO_VALIDATION_SHARE * metrics["seconds"]
            with learning.averaged_weights(learner):
                metrics |= _pseudo_validate(job, learner, state, allowed)
            state.seconds = before + from_first(time.monotonic() - begin, job.ranks)
            state.pseudo_seconds = max(0.0, state.seconds - before - metrics["seconds"])
            state.early_stopping = state.early_stopping.update(metrics.get("mean_dice"))
            share = count_oversampled(job.planned.batch_size, training.foreground) / job.planned.batch_size
            state.labels.warn_of_zero_dice(metrics.get("dice", {}), _progress(job, state), job.training, share)
            if record is not None:
                record(metrics)
                log.info(_describe_epoch(job, metrics, state))
                validation = _plan_validation(job, state)
                if validation is not None and metrics["epoch"] == 1 and _progress(job, state) < 1:
                    limits.announce_validation(job.settings, validation, len(job.validation))
            stops = _agree_to_stop(job, stop)
            save(stops)
            follow(metrics)
            if stops:
                stop.check(f"after epoch {state.epoch}")


@contextmanager
def _save_checkpoints(job: Job, learner: Learner, state: State) -> Iterator[Callable[[bool], None]]:
    """Give a function that saves a checkpoint: it copies the run at once, and a thread writes the file.

    An error of the thread is raised by the next call, by a call that waits for the file, or at the end of the block.
    """
    written: list[Future[None]] = []

    def wait() -> None:
        while written:
            with nullcontext() if written[-1].done() else log.working("writing the checkpoint"):
                written.pop().result()

    def save(wait_for_file: bool) -> None:
        wait()
        if job.ranks.rank == 0:
            state.scale = learner.scaler.get_scale() if learner.scaler.is_enabled() else state.scale
            run = (learner.network, learner.optimizer, state.model_dump(by_alias=True), learner.average)
            written.append(thread.submit(snapshot_checkpoint(job.folder / CHECKPOINT, *run)))
        if wait_for_file:
            wait()

    with ThreadPoolExecutor(1, "checkpoint") as thread:
        yield save
        wait()


def _save_model(job: Job, learner: Learner, state: State) -> None:
    validation = _plan_validation(job, state)
    header = {
        "configuration": job.configuration,
        "inputs": job.plan.input_values(job.configuration),
        "first_stage": job.first_stage,
        "epochs": state.epoch,
        "seconds": round(state.seconds, 1),
        "length": run_length(job.settings),
        "device": job.device.type,
        "validation": None if validation is None else asdict(validation),
        "arithmetic": asdict(state.compute),
    }
    shutil.rmtree(job.folder / VALIDATION, ignore_errors=True)  # of a shorter run that was resumed
    with learning.averaged_weights(learner):
        save_weights(job.folder / MODEL, learner.network, header)


def _progress(job: Job, state: State, ahead: float = 0.0) -> float:
    """The share of the run that is done `ahead` seconds from now, by iterations, or by time if that comes first."""
    training = job.settings.training
    by_steps = (state.epoch + state.iteration / training.iterations) / training.epochs
    return max(by_steps, (state.seconds + ahead) / limits.training_seconds(job, _pass_seconds(job, state)))


def _pass_seconds(job: Job, state: State) -> float:
    """Return the seconds of the network per window: as in training, or in pseudo-validation where that was faster."""
    in_training = limits.estimate_pass_seconds(job, state.pace)
    return min(state.pass_seconds or in_training, in_training or state.pass_seconds)


def _plan_validation(job: Job, state: State) -> limits.ValidationPlan | None:
    return limits.plan_validation(job, _pass_seconds(job, state))


def _seconds_left(job: Job, state: State) -> float:
    """Return how long the rest of the run takes, with the validation in whole images."""
    training, validation = job.settings.training, _plan_validation(job, state)
    patches = job.planned.batch_size * training.validation_iterations if job.validation else 0
    pseudo_seconds = state.pseudo_seconds or patches * _pass_seconds(job, state)
    epoch = training.iterations * state.pace + pseudo_seconds
    left = (training.epochs - state.epoch) * epoch - state.iteration * state.pace
    limit = limits.training_seconds(job, _pass_seconds(job, state)) - state.seconds
    return max(0.0, min(left, limit)) + (0.0 if validation is None else validation.seconds)


def _describe_progress(job: Job, state: State) -> str:
    """Return how far a run is: by the time that a limit gives it, otherwise by steps, with the time that is left."""
    limit = job.settings.training.time_limit
    if limit is not None:
        return f"{log.duration(state.seconds)} of {log.duration(60 * limit)}"
    left = f", {log.duration(_seconds_left(job, state))} left" if state.pace else ""
    return f"step {state.iteration}/{job.settings.training.iterations}{left}"


def _announce_duration(job: Job, state: State) -> None:
    """Log how long the fold takes, and what takes less on a CPU."""
    seconds, on_cpu = state.seconds + _seconds_left(job, state), job.device.type == "cpu"
    is_long = on_cpu and seconds > _LONG and job.settings.training.time_limit is None
    option = "--time-limit 30" if job.settings.recipe.startswith("cpu") else "--recipe cpu"
    advice = f"; `{option}` gives a model in minutes" if is_long else ""
    log.info(f"about {log.duration(seconds)} a fold on this {'CPU' if on_cpu else 'GPU'}{advice}")


def _stops_early(job: Job, state: State) -> bool:
    patience = job.settings.training.early_stop
    return patience is not None and state.early_stopping.since >= patience


def _is_over(job: Job, state: State) -> bool:
    schedule = job.settings.schedule
    if schedule.name == "plateau" and job.settings.optimizer.lr * state.plateau.factor < schedule.min_lr:
        log.info(f"the learning rate has fallen below schedule.min_lr = {schedule.min_lr:g}, which ends the run")
        return True
    if _stops_early(job, state):
        log.info(f"stopping early: the Dice has not risen for {state.early_stopping.since} epochs")
        return True
    return state.epoch > 0 and _progress(job, state, state.pace / 2) >= 1  # as within an epoch


_Step = tuple[Tensor, Tensor, list[str]]  # loss, and whether it was good, on the device; the cases


def _train_epoch(
    job: Job,
    learner: Learner,
    batches: Iterator[Batch],
    state: State,
    stop: limits.StopRequest,
    advance: Callable[..., object],
) -> Metrics | None:
    """Train one epoch and return its metrics, or None if a signal interrupted it. Updates `state`.

    `advance` is called for each step. The host does not wait for a GPU before the end of the epoch.
    """
    training, begin, before = job.settings.training, time.monotonic(), state.seconds
    learner.network.train()
    steps: list[_Step] = []
    rate, waited, first, interrupted = 0.0, 0.0, 0.0, False
    clock = Clock(job.ranks if training.time_limit else ALONE, state.pace)  # without a limit, time does not matter
    announced = state.epoch > 0
    while state.iteration < training.iterations and not interrupted:
        elapsed = clock.after(len(steps))
        first = elapsed if len(steps) == 1 else first
        state.seconds, state.pace = before + elapsed, _pace(len(steps), elapsed, first) or state.pace
        advance(min(1, len(steps)), _describe_progress(job, state))
        if state.iteration and _progress(job, state, state.pace / 2) >= 1:
            break  # the end of the time is nearer now than after another step
        if not announced and len(steps) > 1 and (elapsed > _TIMED or state.iteration + 1 == training.iterations):
            announced = True
            _announce_duration(job, state)
        progress = _progress(job, state) if state.epoch or state.iteration else 0.0
        rate = learning_rate(job.settings.optimizer.lr * state.plateau.factor, job.settings.schedule, progress)

        wait = time.monotonic()
        step_batches = list(islice(batches, training.accumulate))
        waited += time.monotonic() - wait
        number = state.epoch * training.iterations + state.iteration
        loss, good = learning.train_step(job, learner, step_batches, rate, number)
        steps.append((loss, good, [case for _, _, case_ids in step_batches for case in case_ids]))
        state.iteration += 1
        if job.device.type == "cpu" and not good:
            _count_bad_steps(job, state, steps)
        if state.iteration < training.iterations and (job.ranks.world == 1 or state.iteration % SYNC_EVERY == 0):
            interrupted = _agree_to_stop(job, stop)

    state.losses += torch.stack([loss for loss, _, _ in steps]).tolist() if steps else []
    state.bad_steps = _count_bad_steps(job, state, steps)
    state.seconds = before + time.monotonic() - begin
    state.pace = from_first(_pace(len(steps), state.seconds - before, first) or state.pace, job.ranks)
    return None if interrupted else _finish_epoch(job, state, len(steps), state.seconds - before, waited, rate)


def _finish_epoch(job: Job, state: State, n_steps: int, seconds: float, waited: float, rate: float) -> Metrics:
    """Move `state` to the next epoch, and return the metrics of this one.

    Parameters
    ----------
    job, state : Job, State
        What is trained.
    n_steps : int
        Steps since the epoch began, or was resumed.
    seconds, waited : float
        Their duration, and how much of it was spent on waiting for data.
    rate : float
        The last learning rate.
    """
    samples = n_steps * job.settings.training.accumulate * job.stages[state.stage].planned.batch_size
    finite = [loss for loss in state.losses if math.isfinite(loss)]
    mean_loss = float(np.mean(finite)) if finite else math.nan
    metrics = {
        "epoch": state.epoch + 1,
        "train_loss": _rounded(mean_loss),
        "lr": rate,
        "seconds": round(seconds, 2),
        "samples_per_second": round(samples / max(seconds, 1e-9), 2),
        "waiting": round(waited / max(seconds, 1e-9), 3),
        "memory_gb": round(limits.memory_peak(job.device), 2),
        "bad_steps": state.bad_steps,
    }
    if job.settings.schedule.name == "plateau" and math.isfinite(mean_loss):
        state.plateau = state.plateau.update(mean_loss, job.settings.schedule)
    state.epoch, state.iteration, state.losses, state.bad_steps = state.epoch + 1, 0, [], 0
    return metrics


def _pace(n_steps: int, seconds: float, first: float) -> float:
    """Return the seconds per step of some steps, without the first one if there are others: it is slow."""
    return (seconds - first) / (n_steps - 1) if n_steps > 1 else n_steps * seconds


def _agree_to_stop(job: Job, stop: limits.StopRequest) -> bool:
    """Whether a signal has reached any process: all of them stop at the same step.

    A signal that arrives while they compare is kept for the next time.
    """
    number = max_over_ranks(stop.signal or 0, job.ranks)
    stop.signal = stop.signal or number or None
    return number > 0


def _count_bad_steps(job: Job, state: State, steps: list[_Step]) -> int:
    """Return how many steps of this epoch had a loss or gradient that is not finite.

    Raises
    ------
    UserError
        There are too many; names the cases of these steps.
    """
    good = torch.stack([good for _, good, _ in steps]).tolist() if steps else []
    bad = [case_ids for (_, _, case_ids), is_good in zip(steps, good, strict=True) if not is_good]
    number = state.bad_steps + len(bad)
    if bad and number >= job.settings.training.max_bad_steps:
        cases = ", ".join(dict.fromkeys(case for case_ids in bad for case in case_ids))
        lower = "lower --lr" if state.compute.precision == "fp32" else "lower --lr or use --precision fp32"
        raise UserError(
            f"the loss was not finite in {number} steps, with the cases {cases}",
            fix=f"Look at these images with `nnlite check`; otherwise {lower}.",
        )
    return number


# ----------------------------------------------------------------------------------------------- pseudo-validation


@torch.inference_mode()
def _pseudo_validate(job: Job, learner: Learner, state: State, allowed: float) -> Metrics:
    """Loss and pseudo-Dice on patches of the held-out cases; the Dice of a label that none shows is None.

    The patches are the same after each epoch, and in runs with other seeds, so that their curves can be compared.
    After `allowed` seconds the remaining patches are left out.
    """
    n_batches, labels = job.settings.training.validation_iterations, job.plan.labels
    if not n_batches or not job.validation:
        return {}
    learner.network.eval()
    total = torch.zeros((), device=job.device)
    counts = torch.zeros(3, len(labels.region_names), device=job.device, dtype=torch.int64)
    finite = torch.ones((), device=job.device, dtype=torch.int64)
    seedless = replace(job, seed=0)
    makers: Iterator[Callable[[], Batch]] = (
        partial(make_batch, seedless, job.validation, _VALIDATION_STREAM, i, augment=False) for i in range(n_batches)
    )
    begin, done = time.monotonic(), 0
    times: list[float] = []
    with (
        closing(prefetch(makers, job.device, job.settings.training.workers)) as batches,
        log.working("held-out patches", n_batches if math.isinf(allowed) else None) as advance,
    ):
        for batch in batches:
            start = time.monotonic()
            loss, outputs = learning.compute_loss(job, learner, batch)
            finest = outputs[0] if isinstance(outputs, list) else outputs
            total += loss
            counts += pseudo_dice_counts(finest, batch[1], labels)
            finite &= loss.isfinite()  # other logits count as background
            done += 1
            now = time.monotonic()
            times.append(now - start)
            advance(1)
            # the first batch is slow, and says little about the duration of a pass
            if done > 1 and math.isfinite(allowed) and from_first(now - begin > allowed, job.ranks):
                break
    if job.ranks.world > 1:
        counts = sum_over_ranks(counts)
    dice = [round(2 * tp / (2 * tp + fp + fn), 4) if tp + fn and finite else None for tp, fp, fn in counts.T.tolist()]
    shown = [d for d in dice if d is not None]
    # the host does not wait for a GPU, so that the times of single batches mean nothing there
    seconds = median_low(times) if job.device.type == "cpu" else (time.monotonic() - begin) / done
    state.pass_seconds = from_first(seconds / job.planned.batch_size, job.ranks)
    return {
        "validation_loss": _rounded(float(total) / done),
        "dice": dict(zip(labels.region_names, dice, strict=True)),
        "mean_dice": round(float(np.mean(shown)), 4) if shown else None,
    }


def _rounded(value: float) -> float | None:
    """Return a number for metrics.jsonl; JSON has no NaN."""
    return round(value, 5) if math.isfinite(value) else None


def _describe_epoch(job: Job, metrics: dict[str, Any], state: State) -> str:
    """Write one epoch as a line."""
    mean_dice = metrics.get("mean_dice")
    by_label = metrics.get("dice", {}).items()
    dice = few([f"{name} {'-' if d is None else f'{d:.3f}'}" for name, d in by_label], 8)
    loss = "not finite" if metrics["train_loss"] is None else f"{metrics['train_loss']:+.4f}"
    score = f"  Dice {mean_dice:.3f} ({dice})" if mean_dice is not None else ""
    if metrics.get("validation_loss", 0.0) is None:
        score = "  held-out loss not finite"
    memory = in_units(metrics["memory_gb"] * GB)
    waiting = f"{100 * metrics['waiting']:.0f} % waiting for data"
    speed = f"{metrics['samples_per_second']:.3g} patches/s, {waiting}, {memory} of memory"
    return (
        f"epoch {metrics['epoch']:>4}  loss {loss}{score}  lr {metrics['lr']:.1e}  "
        f"{log.duration(metrics['seconds'])} ({speed}), {log.duration(_seconds_left(job, state))} left"
    )
