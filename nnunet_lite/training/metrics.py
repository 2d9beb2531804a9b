"""The metrics of a run: metrics.jsonl and metrics.csv, a picture, warnings about labels."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from nnunet_lite import log
from nnunet_lite.errors import describe
from nnunet_lite.files import append, atomic, table_of, to_csv, write_text
from nnunet_lite.preprocessing.stored_case import SAMPLES, CaseArrays

METRICS, TABLE, PICTURE = "metrics.jsonl", "metrics.csv", "progress.png"
_SECONDS_BETWEEN_PICTURES = 20.0
_ZERO_EPOCHS = 10  # with a Dice of 0, after which a label is reported
_ZERO_SHARE = 0.05  # of the run, likewise
_LEGEND = 12  # most labels that the picture names

Metrics = dict[str, Any]  # of one epoch


# -------------------------------------------------------------------------------------------------------- recording


@contextmanager
def record_metrics(folder: Path, n_epochs: int) -> Iterator[Callable[[Metrics], None]]:
    """Give a function that writes the metrics of an epoch; a thread draws the picture, since matplotlib takes its time.

    Parameters
    ----------
    folder : Path
        The fold's folder.
    n_epochs : int
        Epochs that the checkpoint has. Metrics of later ones, after which no checkpoint was written, are dropped.
    """
    epochs, drawn = _keep_epochs(folder, n_epochs), time.monotonic()
    drawing: Future[None] | None = None
    with ThreadPoolExecutor(1, "progress picture") as painter:

        def draw() -> Future[None]:
            return painter.submit(draw_metrics, list(epochs), folder / PICTURE)

        def record(metrics: Metrics) -> None:
            nonlocal drawing, drawn
            epochs.append(metrics)
            append(folder / METRICS, json.dumps(metrics))
            write_text(folder / TABLE, _as_csv(epochs))
            if (drawing is None or drawing.done()) and time.monotonic() - drawn > _SECONDS_BETWEEN_PICTURES:
                drawing, drawn = draw(), time.monotonic()

        try:
            yield record
        finally:
            drawing = draw()
    if (problem := drawing.exception()) is not None:
        log.warn(f"{folder / PICTURE} could not be drawn: {describe(problem)}")  # the model does not depend on it


def _as_csv(epochs: list[Metrics]) -> str:
    """Return metrics as CSV; a value that an epoch does not have is empty."""
    return to_csv(table_of([flatten_metrics(metrics) for metrics in epochs]))


def flatten_metrics(metrics: Metrics) -> Metrics:
    """Return the metrics of an epoch with the Dice of each label as a value of its own, "dice/liver"."""
    dice = metrics.get("dice") or {}
    return {k: v for k, v in metrics.items() if k != "dice"} | {f"dice/{name}": value for name, value in dice.items()}


def read_epochs(folder: Path) -> list[Metrics]:
    """Return the metrics of the epochs that a fold has run; none before the first.

    Parameters
    ----------
    folder : Path
        The fold's folder.
    """
    path = folder / METRICS
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True) if path.is_file() else []
    return [json.loads(line) for line in lines if line.endswith("\n")]  # the last line may be cut off


def _keep_epochs(folder: Path, n_epochs: int) -> list[Metrics]:
    """Drop the metrics of epochs after the first n from the files."""
    epochs = [metrics for metrics in read_epochs(folder) if metrics["epoch"] <= n_epochs]
    write_text(folder / METRICS, "".join(json.dumps(metrics) + "\n" for metrics in epochs))
    write_text(folder / TABLE, _as_csv(epochs))
    return epochs


def draw_metrics(epochs: list[Metrics], path: Path) -> None:
    """Draw loss, Dice and learning rate over the epochs to a PNG."""
    if not epochs:
        return
    figure = Figure(figsize=(9, 7))
    FigureCanvasAgg(figure)
    losses, scores, rates = figure.subplots(3, 1, sharex=True, height_ratios=(3, 3, 1))
    figure.subplots_adjust(0.09, 0.07, 0.99, 0.98, hspace=0.06)
    x = [metrics["epoch"] for metrics in epochs]

    def column(name: str) -> list[float]:
        values = (flatten_metrics(metrics).get(name) for metrics in epochs)
        return [float("nan") if value is None else value for value in values]

    losses.plot(x, column("train_loss"), label="training")
    if "validation_loss" in epochs[-1]:
        losses.plot(x, column("validation_loss"), label="held-out patches")
        labels = epochs[-1]["dice"]
        for name in labels:
            scores.plot(x, column(f"dice/{name}"), lw=1, label=name)
        scores.plot(x, column("mean_dice"), color="black", label="mean")
        if len(labels) <= _LEGEND:
            scores.legend(fontsize="small", ncols=2)
    losses.set_ylabel("loss")
    losses.legend(fontsize="small")
    scores.set(ylabel="Dice of patches", ylim=(0, 1))
    rates.plot(x, column("lr"), color="grey")
    rates.set(ylabel="learning rate", xlabel="epoch")
    for axes in (losses, scores, rates):
        axes.grid(alpha=0.3)
    with atomic(path) as temporary:
        figure.savefig(temporary, dpi=100)


# ---------------------------------------------------------------------------------------- labels that are not learnt


@dataclass
class LabelStatistics:
    """In how many epochs the Dice of each label (or region) was 0.

    Parameters
    ----------
    stuck : list of int
        Epochs with a Dice of 0 from the first on; -1 for a label whose Dice was once above.
    reported : list of str
        Labels that a warning named.
    """

    stuck: list[int] = field(default_factory=list)
    reported: list[str] = field(default_factory=list)

    def warn_of_zero_dice(
        self, dice: Mapping[str, float | None], progress: float, cases: Sequence[CaseArrays], share: float
    ) -> None:
        """Warn of a label whose Dice has always been 0.

        Parameters
        ----------
        dice : mapping of str to float or None
            Of each label in the last epoch; empty if it had no pseudo-validation.
        progress : float
            Share of the run that is done, from 0 to 1.
        cases : sequence of CaseArrays
            Training cases.
        share : float
            Of the patches that are centred on a voxel of a label.
        """
        if not dice:
            return
        before = self.stuck or [0] * len(dice)
        self.stuck = [
            n if n < 0 or d is None else (n + 1 if d == 0 else -1) for n, d in zip(before, dice.values(), strict=True)
        ]
        for number, (name, epochs) in enumerate(zip(dice, self.stuck, strict=True), 1):
            if epochs >= _ZERO_EPOCHS and progress >= _ZERO_SHARE and name not in self.reported:
                self.reported.append(name)
                log.warn(
                    f"{name} has had a Dice of 0 in all of {epochs} epochs. It is in "
                    f"{describe_sampling(cases, number, share)}. Raise training.foreground, the patch size or "
                    "loss.class_weights, or check its labels"
                )


def warn_of_absent(names: Sequence[str], cases: Sequence[CaseArrays]) -> None:
    """Warn of labels (or regions, in their order) that no training case has."""
    absent = [n for i, n in enumerate(names, 1) if not any(len(case.foreground.get(i, ())) for case in cases)]
    if absent:
        log.warn(
            f"no training case of this fold has {', '.join(absent)}, which the network cannot learn. Check the labels, "
            "or choose other folds: --stratify spreads rare labels"
        )


def describe_sampling(cases: Sequence[CaseArrays], number: int, share: float) -> str:
    """Return in words how rare a class is, and how often a patch is centred on it.

    Parameters
    ----------
    cases : sequence of CaseArrays
        Training cases.
    number : int
        The class, or the region counted from 1.
    share : float
        Of the patches that are centred on a voxel of any class.
    """
    having = [case for case in cases if len(case.foreground.get(number, ()))]
    counts = [len(case.foreground[number]) for case in having]
    volume = sum(counts) / sum(math.prod(case.label.shape) for case in cases)
    least = "at least " * (max(counts, default=0) >= SAMPLES)  # more voxels are not kept
    chosen = sum(1 / sum(len(voxels) > 0 for voxels in case.foreground.values()) for case in having) / len(cases)
    return (
        f"{len(having)} of {len(cases)} training cases, {least}{100 * volume:.2g} % of their voxels, and "
        f"{100 * share * chosen:.2g} % of the patches are centred on it"
    )
