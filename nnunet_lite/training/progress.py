"""The picture of a run: loss and Dice over the epochs, and the learning rate."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from nnunet_lite.files import atomic


def draw_progress(rows: list[dict[str, Any]], path: Path) -> None:
    """Draw rows of metrics.jsonl to a PNG."""
    if not rows:
        return
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 7), layout="constrained")
    FigureCanvasAgg(figure)
    losses, scores, rates = figure.subplots(3, 1, sharex=True, height_ratios=(3, 3, 1))
    epochs = [row["epoch"] for row in rows]
    losses.plot(epochs, [_number(row["train_loss"]) for row in rows], label="training")
    if "validation_loss" in rows[-1]:
        losses.plot(epochs, [_number(row.get("validation_loss")) for row in rows], label="held-out patches")
        for name in rows[-1]["dice"]:
            scores.plot(epochs, [_number(row.get("dice", {}).get(name)) for row in rows], lw=1, label=name)
        scores.plot(epochs, [_number(row.get("mean_dice")) for row in rows], color="black", label="mean")
        if len(rows[-1]["dice"]) <= 12:
            scores.legend(fontsize="small", ncols=2)
    losses.set_ylabel("loss")
    losses.legend(fontsize="small")
    scores.set(ylabel="Dice of patches", ylim=(0, 1))
    rates.plot(epochs, [row["lr"] for row in rows], color="grey")
    rates.set(ylabel="learning rate", xlabel="epoch")
    for axes in (losses, scores, rates):
        axes.grid(alpha=0.3)
    with atomic(path) as temporary:
        figure.savefig(temporary, dpi=100)


def _number(value: float | None) -> float:
    return float("nan") if value is None else value
