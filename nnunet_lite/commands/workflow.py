"""Run a list of steps, such as those from raw data to a report, in this process or on a cluster.

A step is done if its files exist, not because a list says so. So a run may be stopped or killed at any point, steps may
be done by hand in between, and the same command does what remains. `run_steps` does it; `overview` and `time_left` tell
what remains and how long it takes.

steps.jsonl     in the folder of the dataset: a line for each step that was done, with its seconds; for estimates only
"""

from __future__ import annotations

import json
import signal
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from nnunet_lite import log
from nnunet_lite.data.problems import few
from nnunet_lite.errors import Stopped, UserError, describe
from nnunet_lite.files import append
from nnunet_lite.training.limits import stop_threads

if TYPE_CHECKING:
    from nnunet_lite.cluster import Cluster, Future

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
    run : callable
        Does the step, or what remains of it.
    needs : tuple of str
        Names of steps that must be done before.
    anywhere : bool
        Whether another machine with the same workspace may do it; `run` can then be pickled.
    progress : callable
        The share that is done, 0 to 1.
    seconds : callable
        The length of the whole step if it is known beforehand, else None.
    """

    name: str
    kind: str
    is_done: Callable[[], bool]
    run: Callable[[], Any]
    needs: tuple[str, ...] = ()
    anywhere: bool = False
    progress: Callable[[], float] = lambda: 0.0
    seconds: Callable[[], float | None] = lambda: None


@dataclass(frozen=True)
class StepResult:
    """A step that was done, or that was kept because it was done before; `seconds` are those of this run."""

    step: str
    state: Literal["done", "kept"]
    seconds: float = 0.0


@dataclass(frozen=True)
class Journal:
    """How long the steps of a dataset took."""

    file: Path

    def add(self, step: Step, seconds: float, share: float) -> None:
        """Record a step; `share` is how much of it remained when it began."""
        when = datetime.now(UTC).isoformat(timespec="seconds")
        row = {"step": step.name, "kind": step.kind, "seconds": round(seconds, 2), "share": round(share, 4)}
        append(self.file, json.dumps({**row, "when": when}))

    def typical_seconds(self) -> dict[str, float]:
        """Return the mean length of a whole step, by kind."""
        sums: dict[str, tuple[float, float]] = {}
        lines = self.file.read_text(encoding="utf-8").splitlines() if self.file.is_file() else []
        for line in lines:
            try:
                row = json.loads(line)
                seconds, share = sums.get(row["kind"], (0.0, 0.0))
                sums[row["kind"]] = seconds + row["seconds"], share + row["share"]
            except (ValueError, KeyError, TypeError):
                continue  # a line that a kill cut off, and the one that was written after it
        return {kind: seconds / share for kind, (seconds, share) in sums.items() if share >= _LITTLE}


# ------------------------------------------------------------------------------------------------------ what remains


@dataclass(frozen=True)
class RemainingStep:
    """A step to do, the share of it that is done already, and the seconds that remain; None if they are unknown."""

    step: Step
    progress: float
    seconds: float | None


def find_remaining(steps: Sequence[Step], journal: Journal) -> dict[str, RemainingStep]:
    """Return the steps that are not done, by name."""
    typical = journal.typical_seconds()
    remaining = {}
    for step in steps:
        if not step.is_done():
            whole, progress = typical.get(step.kind), min(1.0, step.progress())
            whole = step.seconds() if whole is None else whole
            remaining[step.name] = RemainingStep(step, progress, None if whole is None else (1 - progress) * whole)
    return remaining


def overview(title: str, steps: Sequence[Step], remaining: Mapping[str, RemainingStep]) -> str:
    """Write a line for all steps, and one for each."""
    width = max(len(step.name) for step in steps)
    n_done = len(steps) - len(remaining)
    lines = [f"{title}: {n_done} of {len(steps)} steps done; left: {time_left(remaining)}"]
    for step in steps:
        todo = remaining.get(step.name)
        if todo is None:
            lines.append(f"  done  {step.name}")
        else:
            begun = f", {todo.progress:.0%} done" if todo.progress else ""
            lines.append(f"  left  {step.name:{width}}  {_about(todo.seconds)}{begun}")
    return "\n".join(lines)


def time_left(remaining: Mapping[str, RemainingStep]) -> str:
    """Write how long the remaining steps take one after the other, and for which of them that is unknown."""
    if not remaining:
        return "nothing"
    known = sum(todo.seconds or 0.0 for todo in remaining.values())
    unknown = [todo.step.name for todo in remaining.values() if todo.seconds is None]
    if not unknown:
        return _about(known)
    return f"{_about(known)} without {few(unknown)}" if known else f"time unknown yet ({few(unknown)})"


def _about(seconds: float | None) -> str:
    return "time unknown yet" if seconds is None else f"about {log.duration(seconds)}"


# ------------------------------------------------------------------------------------------------------ doing it


def run_steps(steps: Sequence[Step], journal: Journal, cluster: Cluster | None = None) -> list[StepResult]:
    """Do the steps that are not done: in order in this process, or on a cluster as many at once as it takes.

    Raises
    ------
    Exception
        What a step raises. The steps before it are done, on a cluster also those that do not need it.
    """
    if cluster is not None:
        return _run_on_cluster(cluster, steps, journal)
    results = []
    for number, step in enumerate(steps, 1):
        if step.is_done():
            results.append(StepResult(step.name, "kept"))
            continue
        log.info(f"step {number} of {len(steps)}: {step.name}" if len(steps) > 1 else step.name)
        results.append(_run_here(step, journal))
        if following := steps[number:]:
            log.info(f"left: {time_left(find_remaining(following, journal))}")
    return results


def _run_here(step: Step, journal: Journal) -> StepResult:
    share, start = 1 - min(1.0, step.progress()), time.monotonic()
    step.run()
    return _record(step, time.monotonic() - start, share, journal)


def _record(step: Step, seconds: float, share: float, journal: Journal) -> StepResult:
    journal.add(step, seconds, share)
    log.info(f"{step.name}: done in {log.duration(seconds)}")
    return StepResult(step.name, "done", round(seconds, 2))


@dataclass(frozen=True)
class _RunningStep:
    """A step that a worker does; `progress` is the share that was done before."""

    step: Step
    progress: float
    start: float


def _run_on_cluster(cluster: Cluster, steps: Sequence[Step], journal: Journal) -> list[StepResult]:
    """Do the steps that may be done anywhere on the workers, the others here.

    If the workers of a step died, it is given out again as long as it progresses. A step that fails stops those that
    need it, not others.

    Raises
    ------
    Exception
        What the first step raised that failed.
    Stopped
        After Ctrl-C, when the folds have written their checkpoints.
    """
    todo = {step.name: step for step in steps if not step.is_done()}
    results = {step.name: StepResult(step.name, "kept") for step in steps if step.name not in todo}
    running: dict[Future, _RunningStep] = {}
    errors: dict[str, Exception] = {}
    try:
        while todo or running:
            unfinished = {*todo, *errors, *(task.step.name for task in running.values())}
            ready = [step for step in todo.values() if unfinished.isdisjoint(step.needs)]
            for step in ready:
                if step.anywhere:
                    log.info(f"{step.name}: given to the workers")
                    running[cluster.submit(step.run, step.name)] = _begin(todo.pop(step.name))
            here = [step for step in ready if not step.anywhere]
            if running:
                _collect(cluster, running, results, errors, journal)
            elif here:
                results[here[0].name] = _run_here(todo.pop(here[0].name), journal)
            else:
                break  # what remains needs a step that failed
    except KeyboardInterrupt:
        if running:
            log.info(f"asking {len(running)} folds to write a checkpoint and stop")
            cluster.stop(list(running), stop_threads)
        raise Stopped("stopped by SIGINT; the same command resumes from here", signal.SIGINT) from None
    if errors:
        raise next(iter(errors.values()))
    return [results[step.name] for step in steps]


def _begin(step: Step) -> _RunningStep:
    return _RunningStep(step, step.progress(), time.monotonic())


def _collect(
    cluster: Cluster,
    running: dict[Future, _RunningStep],
    results: dict[str, StepResult],
    errors: dict[str, Exception],
    journal: Journal,
) -> None:
    """Wait a while for running steps, and move those that ended to `results` or `errors`."""
    from nnunet_lite.cluster import WorkersDied  # an optional extra

    ended = cluster.wait(list(running), _BETWEEN_LINES)
    if not ended:
        shares = (f"{task.step.name} {task.step.progress():.0%}" for task in running.values())
        log.info(f"running: {', '.join(shares)}")
    for future in ended:
        task = running.pop(future)
        step, error = task.step, cluster.error_of(future)
        if error is None:
            results[step.name] = _record(step, time.monotonic() - task.start, 1 - task.progress, journal)
        elif isinstance(error, WorkersDied) and step.progress() > task.progress:  # as when a queue ends a job
            running[cluster.submit(step.run, step.name)] = _begin(step)
        else:
            errors[step.name] = error
            if isinstance(error, WorkersDied):
                errors[step.name] = UserError(f"{step.name}: {error.what}", fix=error.fix)
            log.info(f"{step.name}: failed: {describe(error)}")
