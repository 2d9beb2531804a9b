"""Do a list of steps, such as those from raw data to a report, in this process or on a cluster.

A step is done if its files exist, not because a list says so. A run may be stopped or killed at any point, steps may be
done by hand in between, and the same command does what remains. Read `Step`, then `run_steps`.

steps.jsonl     in the folder of the dataset: a line for each step that was done, with its seconds; for estimates only
"""

from __future__ import annotations

import json
import signal
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from nnunet_lite import log
from nnunet_lite.data.problems import few
from nnunet_lite.errors import Stopped, UserError, WorkersDied, describe
from nnunet_lite.files import append
from nnunet_lite.system import stop_slowly
from nnunet_lite.training.limits import stop_threads

if TYPE_CHECKING:
    from nnunet_lite.cluster import Cluster, Future

JOURNAL = "steps.jsonl"
_LITTLE = 0.05  # of a step: its length does not follow from less
_BETWEEN_LINES = 30.0  # seconds between two lines about running steps


@dataclass(frozen=True)
class Step:
    """One step.

    Parameters
    ----------
    name : str
        Such as "train 2d fold 0".
    kind : str
        Steps of one kind take about equally long.
    is_done : callable
        Whether its results are complete, and made with the present settings.
    do : callable
        Does the step, or what remains of it.
    needs : tuple of str
        Names of steps that must be done before.
    anywhere : bool
        Whether another machine with the same workspace may do it; `do` can then be pickled.
    progress : callable
        The share that is done, 0 to 1.
    seconds : callable
        The length of the whole step if it is known beforehand, otherwise None.
    """

    name: str
    kind: str
    is_done: Callable[[], bool]
    do: Callable[[], Any]
    needs: tuple[str, ...] = ()
    anywhere: bool = False
    progress: Callable[[], float] = lambda: 0.0
    seconds: Callable[[], float | None] = lambda: None


@dataclass(frozen=True)
class StepResult:
    """The end of a step.

    Parameters
    ----------
    step : str
        Its name.
    state : {"done", "kept"}
        Kept: it was done before.
    seconds : float
        Its time in this run.
    """

    step: str
    state: Literal["done", "kept"]
    seconds: float = 0.0


# ---------------------------------------------------------------------------------------------------- how long it takes


@dataclass(frozen=True)
class Journal:
    """How long the steps of a dataset took.

    Parameters
    ----------
    file : Path
        steps.jsonl in the folder of the dataset.
    """

    file: Path

    def add(self, step: Step, seconds: float, share: float) -> None:
        """Record a step that was done.

        Parameters
        ----------
        step : Step
            The step.
        seconds : float
            Its time.
        share : float
            How much of it remained when it began, 0 to 1.
        """
        when = datetime.now(UTC).isoformat(timespec="seconds")
        row = {"step": step.name, "kind": step.kind, "seconds": round(seconds, 2), "share": round(share, 4)}
        append(self.file, json.dumps({**row, "when": when}))

    def typical_seconds(self) -> dict[str, float]:
        """Return the mean length of a whole step, by kind."""
        sums: dict[str, tuple[float, float]] = {}
        for line in self.file.read_text(encoding="utf-8").splitlines() if self.file.is_file() else []:
            try:
                row = json.loads(line)
                seconds, share = sums.get(row["kind"], (0.0, 0.0))
                sums[row["kind"]] = seconds + row["seconds"], share + row["share"]
            except (ValueError, KeyError, TypeError):
                continue  # a line that a kill cut off, and the one that was written after it
        return {kind: seconds / share for kind, (seconds, share) in sums.items() if share >= _LITTLE}

    def seconds_left(self, steps: Sequence[Step]) -> dict[str, float | None]:
        """Return how long each step that is not done will take, by name; None if that is unknown.

        Parameters
        ----------
        steps : sequence of Step
            The steps.
        """
        typical, left = self.typical_seconds(), {}
        for step in steps:
            if not step.is_done():
                whole = typical[step.kind] if step.kind in typical else step.seconds()
                left[step.name] = None if whole is None else (1 - min(1.0, step.progress())) * whole
        return left


def overview(title: str, steps: Sequence[Step], left: dict[str, float | None]) -> str:
    """Write a line for all steps, and one for each.

    Parameters
    ----------
    title : str
        The beginning of the first line.
    steps : sequence of Step
        All steps.
    left : dict of str to float or None
        From `Journal.seconds_left`.
    """
    width = max(len(step.name) for step in steps)
    lines = [f"{title}: {len(steps) - len(left)} of {len(steps)} steps done; left: {time_left(left)}"]
    for step in steps:
        if step.name not in left:
            lines.append(f"  done  {step.name}")
        else:
            begun = f", {step.progress():.0%} done" if step.progress() else ""
            lines.append(f"  left  {step.name:{width}}  {_about(left[step.name])}{begun}")
    return "\n".join(lines)


def time_left(left: dict[str, float | None]) -> str:
    """Write how long steps take one after the other, and for which of them that is unknown.

    Parameters
    ----------
    left : dict of str to float or None
        From `Journal.seconds_left`.
    """
    if not left:
        return "nothing"
    known, unknown = sum(filter(None, left.values())), [name for name, seconds in left.items() if seconds is None]
    if not unknown:
        return _about(known)
    return f"{_about(known)} without {few(unknown)}" if known else f"time unknown yet ({few(unknown)})"


def _about(seconds: float | None) -> str:
    return "time unknown yet" if seconds is None else f"about {log.duration(seconds)}"


# ------------------------------------------------------------------------------------------------------------ doing it


@dataclass(frozen=True)
class _RunningStep:
    """A step that began; `progress` is the share that was done before."""

    step: Step
    progress: float
    start: float


def run_steps(steps: Sequence[Step], journal: Journal, cluster: Cluster | None = None) -> list[StepResult]:
    """Do the steps that are not done: in order in this process, or on a cluster as many at once as it takes.

    If the workers of a step died, it is given out again as long as it progresses. A step that fails on a worker stops
    those that need it, not others.

    Parameters
    ----------
    steps : sequence of Step
        Each after those that it needs.
    journal : Journal
        Where their seconds are recorded.
    cluster : Cluster, optional
        Its workers do the steps that may be done anywhere.

    Raises
    ------
    Exception
        What the first step raised that failed.
    Stopped
        After Ctrl-C while workers train, when their folds have written a checkpoint.
    """
    waiting, results = list(steps), {}
    running: dict[Future, _RunningStep] = {}
    errors: dict[str, Exception] = {}
    try:
        while waiting or running:
            missing = {*errors, *(step.name for step in waiting), *(begun.step.name for begun in running.values())}
            step = next((step for step in waiting if missing.isdisjoint(step.needs)), None)
            if step is not None:
                waiting.remove(step)
                if step.is_done():
                    results[step.name] = StepResult(step.name, "kept")
                elif cluster is not None and step.anywhere:
                    log.info(f"{step.name}: given to the workers")
                    running[cluster.submit(step.do, step.name)] = _begin(step)
                else:
                    number = f"step {steps.index(step) + 1} of {len(steps)}: " if len(steps) > 1 else ""
                    log.info(f"{number}{step.name}")
                    begun = _begin(step)
                    step.do()
                    results[step.name] = _finish(begun, journal)
                    if cluster is None and waiting:
                        log.info(f"left: {time_left(journal.seconds_left(waiting))}")
            elif cluster is not None and running:
                _collect(cluster, running, results, errors, journal)
            else:
                break  # what remains needs a step that failed
    except KeyboardInterrupt:
        if cluster is None or not running:
            raise
        log.info(f"asking {len(running)} folds to write a checkpoint and stop")
        stop_slowly()
        cluster.stop(list(running), stop_threads)
        raise Stopped("stopped by SIGINT; the same command resumes from here", signal.SIGINT) from None
    if errors:
        raise next(iter(errors.values()))
    return [results[step.name] for step in steps]


def _begin(step: Step) -> _RunningStep:
    return _RunningStep(step, min(1.0, step.progress()), time.monotonic())


def _finish(begun: _RunningStep, journal: Journal) -> StepResult:
    name, seconds = begun.step.name, time.monotonic() - begun.start
    journal.add(begun.step, seconds, 1 - begun.progress)
    log.info(f"{name}: done in {log.duration(seconds)}")
    return StepResult(name, "done", round(seconds, 2))


def _collect(
    cluster: Cluster,
    running: dict[Future, _RunningStep],
    results: dict[str, StepResult],
    errors: dict[str, Exception],
    journal: Journal,
) -> None:
    """Wait a while for running steps, and move those that ended to `results` or `errors`."""
    ended = cluster.wait(list(running), _BETWEEN_LINES)
    if not ended:
        cluster.warn_without_workers()
        log.info(f"running: {', '.join(f'{b.step.name} {b.step.progress():.0%}' for b in running.values())}")
    for future in ended:
        begun = running.pop(future)
        step, error = begun.step, cluster.error_of(future)
        if error is None:
            results[step.name] = _finish(begun, journal)
            continue
        if isinstance(error, WorkersDied):
            if step.progress() > begun.progress:  # as when a queue ends a job
                running[cluster.submit(step.do, step.name)] = _begin(step)
                continue
            error = UserError(f"{step.name}: {error.what}", fix=error.fix)
        errors[step.name] = error
        log.error(f"failed: {step.name}: {describe(error)}")
