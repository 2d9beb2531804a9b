"""What `training.time_limit` covers: timing number formats, training, and by choice the validation in whole images."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from nnunet_lite import log
from nnunet_lite.data.problems import plural
from nnunet_lite.settings import Settings

if TYPE_CHECKING:
    from nnunet_lite.training.job import Job

PROBED = 0.05  # share of the limit that timing number formats may take
PSEUDO_VALIDATED = 0.25  # of the time of an epoch's steps, that its pseudo-validation may take under a limit
_VALIDATED = 0.5  # share of the limit that the validation may take, where the limit covers it
_STEPS = (0.5, 0.75, 1.0)  # distances of two windows, as shares of the patch, that a covered validation chooses from
_FORWARD = 1 / 3  # of a training step is its forward pass, about


@dataclass(frozen=True)
class Validation:
    """How the held-out cases are predicted whole.

    Parameters
    ----------
    step_size : float
        Distance of two windows, as a share of the patch.
    passes : int
        Windows and their mirrored copies, over all cases.
    seconds : float
        That they take, estimated.
    """

    step_size: float
    passes: int
    seconds: float


def step_sizes(settings: Settings) -> list[float]:
    """The distances of two windows that the validation chooses from: the run's own, and larger ones to keep a limit.

    Parameters
    ----------
    settings : Settings
        Of the run.
    """
    own, training = settings.inference.step_size, settings.training
    covered = training.limit_validation and training.time_limit is not None
    return [own, *(step for step in _STEPS if covered and step > own)]


def planned_validation(job: Job, pass_seconds: float) -> Validation | None:
    """How the held-out cases are predicted, or None where there are none.

    Where the limit covers the validation, windows are further apart if it would take more than half of the limit.

    Parameters
    ----------
    job : Job
        What is trained.
    pass_seconds : float
        That the network takes for one window.
    """
    whole, found = _seconds(job.settings), None
    for step, number in job.passes.items():
        found = Validation(step, number, number * pass_seconds)
        if whole is None or found.seconds <= _VALIDATED * whole:
            break
    return found


def training_seconds(job: Job, pass_seconds: float) -> float:
    """How long the training may take: the limit, less what it covers of the validation; infinite without a limit.

    Parameters
    ----------
    job : Job
        What is trained.
    pass_seconds : float
        That the network takes for one window.
    """
    whole = _seconds(job.settings)
    if whole is None:
        return math.inf
    validation = planned_validation(job, pass_seconds) if job.settings.training.limit_validation else None
    return whole - min(_VALIDATED * whole, 0.0 if validation is None else validation.seconds)


def forward_seconds(job: Job, step_seconds: float) -> float:
    """About how many seconds the network takes for one window.

    Parameters
    ----------
    job : Job
        What is trained.
    step_seconds : float
        That a training step takes.
    """
    return _FORWARD * step_seconds / (job.planned.batch_size * job.settings.training.accumulate)


def announce(settings: Settings, validation: Validation, n_cases: int) -> None:
    """Report how long the validation will take, and what of it the limit does not cover.

    Parameters
    ----------
    settings : Settings
        Of the run.
    validation : Validation
        As `planned_validation` gives it.
    n_cases : int
        How many cases are held out.
    """
    cases, passes = plural(n_cases, "held-out case"), f"{validation.passes:,} passes through the network"
    takes = f"validation of {cases} in whole images: {passes}, about {log.duration(validation.seconds)}"
    whole = _seconds(settings)
    if whole is None or not settings.training.limit_validation:
        log.info(f"{takes}" + (", which the time limit does not cover" if whole is not None else ""))
        return
    apart = f"; windows are {validation.step_size:g} of the patch apart, to keep to it"
    apart = apart if validation.step_size > settings.inference.step_size else ""
    if validation.seconds <= _VALIDATED * whole:
        log.info(f"{takes} of the time limit{apart}")
    else:
        log.warn(f"{takes}, more than half of the time limit, which the run will exceed{apart}")


def _seconds(settings: Settings) -> float | None:
    limit = settings.training.time_limit
    return None if limit is None else 60 * limit
