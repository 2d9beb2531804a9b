"""A list of steps that lead from raw data to a report: what is done of them, what is left, and doing it.

A step is done when its files say so, not because a list says it was: hence a run may be stopped or killed anywhere,
steps may be done by hand in between, and the same command does what is left. `execute` does the steps one after the
other in this process; cluster_steps.py does the same steps on many machines.

steps.jsonl     in the data set's folder: a line for each step that was done, with its seconds; for estimates only
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

from nnunet_lite import log
from nnunet_lite.files import append

_LITTLE = 0.05  # of a step: from less than that its length is not told


@dataclass(frozen=True)
class Step:
    """One step.

    Parameters
    ----------
    name : for a person, such as "train 2d fold 0". kind : steps of one kind take about equally long.
    is_done : whether its results are there, whole, and made with the settings of now.
    run : does it, or what is left of it.
    needs : names of steps that must be done before.
    anywhere : it may be done on another machine that sees the workspace; `run` can then be pickled.
    progress : how much of it is done, 0 to 1; seconds : all that it takes, as far as that can be told beforehand.
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
class Ended:
    """What became of a step; `seconds` are those of this run."""

    step: str
    state: Literal["done", "kept"]
    seconds: float = 0.0


@dataclass(frozen=True)
class Journal:
    """How long the steps of a data set took."""

    file: Path

    def add(self, step: Step, seconds: float, share: float) -> None:
        """Write down a step that was done; `share` is how much of it was left when it began."""
        when = datetime.now(UTC).isoformat(timespec="seconds")
        row = {"step": step.name, "kind": step.kind, "seconds": round(seconds, 2), "share": round(share, 4)}
        append(self.file, json.dumps({**row, "when": when}))

    def usual(self) -> dict[str, float]:
        """Seconds of a whole step, by kind."""
        sums: dict[str, tuple[float, float]] = {}
        lines = self.file.read_text(encoding="utf-8").splitlines() if self.file.is_file() else []
        for line in lines:
            try:
                row = json.loads(line)
                seconds, share = sums.get(row["kind"], (0.0, 0.0))
                sums[row["kind"]] = seconds + row["seconds"], share + row["share"]
            except (ValueError, KeyError, TypeError):
                continue  # a line that a kill cut off, and the one that was written behind it
        return {kind: seconds / share for kind, (seconds, share) in sums.items() if share >= _LITTLE}


@dataclass(frozen=True)
class Left:
    """A step that is to be done: how much of it is done already, and the seconds left; None: nobody knows yet."""

    step: Step
    progress: float
    seconds: float | None


def what_is_left(steps: Sequence[Step], journal: Journal) -> dict[str, Left]:
    """The steps that are not done, by name."""
    usual = journal.usual()
    left = {}
    for step in steps:
        if not step.is_done():
            whole, progress = usual.get(step.kind), min(1.0, step.progress())
            whole = step.seconds() if whole is None else whole
            left[step.name] = Left(step, progress, None if whole is None else (1 - progress) * whole)
    return left


def overview(title: str, steps: Sequence[Step], left: Mapping[str, Left]) -> str:
    """A line for all, and one for each step."""
    width = max(len(step.name) for step in steps)
    lines = [f"{title}: {len(steps) - len(left)} of {len(steps)} steps done; left: {time_left(left)}"]
    for step in steps:
        todo = left.get(step.name)
        if todo is None:
            lines.append(f"  done  {step.name}")
            continue
        begun = f", {todo.progress:.0%} done" if todo.progress else ""
        lines.append(f"  left  {step.name:{width}}  {_about(todo.seconds)}{begun}")
    return "\n".join(lines)


def time_left(left: Mapping[str, Left]) -> str:
    """What all steps that are left take together, one after the other, and for which of them that is not known."""
    if not left:
        return "nothing"
    known = sum(each.seconds or 0.0 for each in left.values())
    unknown = [each.step.name for each in left.values() if each.seconds is None]
    if not unknown:
        return _about(known)
    names = ", ".join(unknown[:3]) + (f" and {len(unknown) - 3} more" if len(unknown) > 3 else "")
    return f"{_about(known)}, and {names}, of which that is unknown yet" if known else f"time unknown yet ({names})"


def execute(steps: Sequence[Step], journal: Journal) -> list[Ended]:
    """Do the steps that are not done, in order, in this process.

    Raises
    ------
    Whatever a step raises; the steps before it are done.
    """
    ended = []
    for number, step in enumerate(steps, 1):
        if step.is_done():
            ended.append(Ended(step.name, "kept"))
            continue
        log.info(f"step {number} of {len(steps)}: {step.name}" if len(steps) > 1 else step.name)
        share, begin = 1 - min(1.0, step.progress()), time.monotonic()
        step.run()
        seconds = time.monotonic() - begin
        journal.add(step, seconds, share)
        after = f"; left: {time_left(what_is_left(steps[number:], journal))}" if steps[number:] else ""
        log.info(f"{step.name}: done in {log.duration(seconds)}{after}")
        ended.append(Ended(step.name, "done", round(seconds, 2)))
    return ended


def _about(seconds: float | None) -> str:
    return "time unknown yet" if seconds is None else f"about {log.duration(seconds)}"
