"""What ends a run before its last epoch: a time limit, early stopping, a signal, or too little GPU memory.

A time limit (`training.time_limit`) covers the timing of number formats, the training and, on request, the validation
of the held-out cases in whole images, whose windows are then further apart if it would take too long.
"""

from __future__ import annotations

import math
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from nnunet_lite import log, system
from nnunet_lite.data.problems import plural
from nnunet_lite.errors import Stopped, UserError
from nnunet_lite.models.folder import CHECKPOINT, read_weights_header, remove_unbegun
from nnunet_lite.networks.devices import is_out_of_memory
from nnunet_lite.planning.planner import limit_sizes, override_sizes
from nnunet_lite.planning.schema import Plan
from nnunet_lite.planning.topology import join_by_x
from nnunet_lite.settings import Settings
from nnunet_lite.system import GB, calling_on_signal, in_units, peak_memory, stop_at_once

if TYPE_CHECKING:
    from nnunet_lite.training.job import Job

TIMING_SHARE = 0.05  # of the limit, which the timing of number formats may take
PSEUDO_VALIDATION_SHARE = 0.25  # of an epoch's training time, which its pseudo-validation may take under a limit
_VALIDATION_SHARE = 0.5  # of the limit, which a covered validation may take
_STEP_SIZES = (0.5, 0.75, 1.0)  # that a covered validation chooses from


# ------------------------------------------------------------------------------------------------------ time limit


@dataclass(frozen=True)
class ValidationPlan:
    """How the held-out cases are predicted whole, after the training.

    Parameters
    ----------
    step_size : float
        Distance of two windows, as a share of the patch.
    passes : int
        Windows and their mirrored copies, over all cases.
    seconds : float
        Estimated duration.
    """

    step_size: float
    passes: int
    seconds: float


def limit_seconds(settings: Settings) -> float:
    """Return the time limit of a run in seconds; infinite without one."""
    limit = settings.training.time_limit
    return math.inf if limit is None else 60 * limit


def validation_step_sizes(settings: Settings) -> list[float]:
    """Return the window step sizes that the validation chooses from: the run's own, and larger ones to keep a limit."""
    own, training = settings.inference.step_size, settings.training
    covered = training.limit_validation and training.time_limit is not None
    return [own, *(step for step in _STEP_SIZES if covered and step > own)]


def plan_validation(job: Job, pass_seconds: float) -> ValidationPlan | None:
    """Return how the held-out cases are predicted, or None if there are none.

    If the limit covers the validation, the first step size is taken that needs at most half of the limit.

    Parameters
    ----------
    job : Job
        What is trained.
    pass_seconds : float
        Time that the network takes for one window.
    """
    plans = [ValidationPlan(step, number, number * pass_seconds) for step, number in job.passes.items()]
    allowed = _VALIDATION_SHARE * limit_seconds(job.settings)
    return next((plan for plan in plans if plan.seconds <= allowed), plans[-1] if plans else None)


def training_seconds(job: Job, pass_seconds: float) -> float:
    """Return how long the training may take: the limit without the validation that it covers; infinite without a limit.

    Parameters
    ----------
    job : Job
        What is trained.
    pass_seconds : float
        Time that the network takes for one window.
    """
    limit = limit_seconds(job.settings)
    validation = plan_validation(job, pass_seconds) if job.settings.training.limit_validation else None
    if validation is None or math.isinf(limit):
        return limit
    return limit - min(_VALIDATION_SHARE * limit, validation.seconds)


def estimate_pass_seconds(job: Job, step_seconds: float) -> float:
    """Return about how long the network takes for one window, from the duration of a training step (in seconds)."""
    forward_share = 1 / 4 if job.device.type == "cpu" else 1 / 3  # of a training step
    return forward_share * step_seconds / (job.planned.batch_size * job.settings.training.accumulate)


def announce_validation(settings: Settings, validation: ValidationPlan, n_cases: int) -> None:
    """Log how long the validation of some held-out cases takes, and whether the limit covers it."""
    cases, n = plural(n_cases, "held-out case"), validation.passes
    passes = f"{n:,} pass{'es' * (n != 1)} through the network"
    takes = f"validation of {cases} in whole images: {passes}, about {log.duration(validation.seconds)}"
    limit = limit_seconds(settings)
    if math.isinf(limit) or not settings.training.limit_validation:
        log.info(takes + ("" if math.isinf(limit) else ", which the time limit does not cover"))
        return
    wider = validation.step_size > settings.inference.step_size
    apart = f"; windows are {validation.step_size:.0%} of a patch apart, to keep to it" if wider else ""
    if validation.seconds <= _VALIDATION_SHARE * limit:
        log.info(f"{takes} of the time limit{apart}")
    else:
        log.warn(f"{takes}, more than half of the time limit, which the run will exceed{apart}")


# ---------------------------------------------------------------------------------------- progress of a fold on disk


def fold_progress(fold_folder: Path, settings: Settings) -> float:
    """Return how much of a fold's training its last checkpoint has done, from 0 to 1."""
    file = fold_folder / CHECKPOINT
    state = read_weights_header(file) if file.is_file() else {}
    by_epochs = float(state.get("epoch", 0)) / settings.training.epochs
    return min(1.0, max(by_epochs, float(state.get("seconds", 0.0)) / limit_seconds(settings)))


def estimate_fold_seconds(fold_folder: Path, settings: Settings) -> float | None:
    """Return how long a fold takes to train, or None where nothing is known.

    By the pace of what is trained of this fold or another one, or the time limit, whichever is shorter.
    """
    limit = limit_seconds(settings)
    for folder in (fold_folder, *sorted(fold_folder.parent.glob("fold_*"))):
        if progress := fold_progress(folder, settings):
            return min(float(read_weights_header(folder / CHECKPOINT)["seconds"]) / progress, limit)
    return None if math.isinf(limit) else limit


# ------------------------------------------------------------------------------------------------- early stopping


@dataclass(frozen=True)
class EarlyStopping:
    """Moving average of the held-out Dice, and for how many epochs it has not improved (`training.early_stop`)."""

    average: float | None = None
    best: float = 0.0
    since: int = 0

    def update(self, dice: float | None) -> EarlyStopping:
        """Return the state after an epoch; an epoch without a Dice changes nothing."""
        if dice is None:
            return self
        average = dice if self.average is None else 0.9 * self.average + 0.1 * dice
        return EarlyStopping(average, max(self.best, average), 0 if average > self.best else self.since + 1)


# --------------------------------------------------------------------------------------------------------- signals


@dataclass
class StopRequest:
    """Whether a signal requested the run to stop, and which one (its number).

    While `starting`, there is nothing to save, and a signal ends the process at once.
    """

    signal: int | None = None
    starting: bool = True

    def check(self, where: str) -> None:
        """End the run, whose checkpoint is written, if a stop was requested.

        Raises
        ------
        Stopped
            A signal arrived.
        """
        if self.signal is not None:
            name = signal.Signals(self.signal).name
            raise Stopped(f"stopped by {name} {where}; {system.how_to_resume('there')}", self.signal)


_requests: list[StopRequest] = []  # of the runs of this process


def stop_threads() -> None:
    """Request the runs of this process to stop, as SIGTERM would: those in threads receive no signal."""
    for request in _requests:
        request.signal = signal.SIGTERM


@contextmanager
def stop_on_signal(folder: Path | None = None) -> Iterator[StopRequest]:
    """Turn the first SIGINT or SIGTERM into a request to stop after the step; the second one ends the process at once.

    So does the first one while the run is `starting`.
    Only the main thread receives signals. A run in another thread is stopped with `stop_threads`.

    Parameters
    ----------
    folder : Path, optional
        Of the fold, which is deleted if nothing was trained in it.
    """
    request, in_main = StopRequest(), threading.current_thread() is threading.main_thread()
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM) if in_main}
    received: list[int] = []

    def react(number: int) -> None:
        if number not in handlers:
            return
        if request.starting or received:
            if folder is not None:
                remove_unbegun(folder)
            stop_at_once(number)
        received.append(number)
        log.info(f"{signal.Signals(number).name}: stopping after this step; press again to stop now")

    def restore() -> None:
        for number, handler in handlers.items():
            signal.signal(number, handler)

    def handle(number: int, _: object) -> None:
        restore()
        if request.starting:
            signal.raise_signal(number)
        request.signal = number
        if not system.is_command:
            log.info(f"{signal.Signals(number).name}: stopping after this step; once more stops now")

    for number in handlers:
        signal.signal(number, handle)
    _requests.append(request)
    try:
        with calling_on_signal(react) if in_main and system.is_command else nullcontext():
            yield request
    finally:
        _requests.remove(request)
        restore()


# ------------------------------------------------------------------------------------------------------ GPU memory


def memory_peak(device: torch.device) -> float:
    """Return the peak memory in GB (1e9 bytes): of the GPU since the run began, otherwise of this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    return peak_memory() / GB


@contextmanager
def explain_out_of_memory(job: Job) -> Iterator[None]:
    """Name what was too large for a GPU, and what would fit.

    Raises
    ------
    UserError
        The memory of the GPU is too small.
    """
    if job.device.type != "cuda":
        yield
        return
    cases = torch.cuda.memory_allocated(job.device)
    try:
        yield
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        planned = job.planned
        free, total = torch.cuda.mem_get_info(job.device)
        usable = free + torch.cuda.memory_reserved(job.device) - cases
        patches = f"{planned.batch_size} patches of {join_by_x(planned.patch_size)}"
        available, need = f"{in_units(usable)} of {in_units(total)} usable", in_units((planned.memory_gb or 0) * GB)
        what = f"the GPU's memory ({available}) is too small for {patches} (about {need})"
        smaller = suggest_smaller(job.plan, job.configuration, 0.9 * usable / GB)
        raise UserError(what, fix=f"{smaller} would fit." if smaller else "Plan with a smaller --memory.") from None


def suggest_smaller(plan: Plan, configuration: str, memory: float) -> str:
    """Return the options of a smaller batch and of a smaller patch that fit into `memory` GB; "" if none does."""
    planned, options = plan.configuration(configuration), []
    for batch in range(planned.batch_size - 1, 0, -1):
        smaller = override_sizes(plan, configuration, None, batch).configuration(configuration)
        if (smaller.memory_gb or math.inf) <= memory:
            options.append(f"--batch-size {batch} (about {in_units((smaller.memory_gb or 0) * GB)})")
            break
    voxels = math.prod(planned.patch_size)
    while voxels > 64:
        voxels = voxels * 9 // 10
        smaller = limit_sizes(plan, configuration, voxels).configuration(configuration)
        if smaller.patch_size != planned.patch_size and (smaller.memory_gb or math.inf) <= memory:
            options.append(
                f"--patch-size {join_by_x(smaller.patch_size)} (about {in_units((smaller.memory_gb or 0) * GB)})"
            )
            break
    return " or ".join(options)
