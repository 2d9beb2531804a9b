"""The record of a run: metrics.jsonl and metrics.csv, a live picture, and TensorBoard's files where they are wanted."""

from __future__ import annotations

import csv
import io
import json
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from nnunet_lite import log
from nnunet_lite.errors import UserError, describe
from nnunet_lite.files import append, write_text
from nnunet_lite.training.progress import draw_progress

METRICS, TABLE, PICTURE = "metrics.jsonl", "metrics.csv", "progress.png"
_SECONDS_BETWEEN_PICTURES = 20.0

Row = dict[str, Any]  # of one epoch


@dataclass
class Record:
    """The rows of all epochs so far, and where they go."""

    folder: Path
    rows: list[Row]
    painter: ThreadPoolExecutor  # matplotlib takes a good part of a second: the training does not wait for it
    tensorboard: Any = None
    drawing: Future[None] | None = None
    drawn: float = field(default_factory=time.monotonic)

    def add(self, row: Row) -> None:
        """Write an epoch's row."""
        self.rows.append(row)
        append(self.folder / METRICS, json.dumps(row))
        write_text(self.folder / TABLE, to_csv(self.rows))
        if self.tensorboard is not None:
            for name, value in flat(row).items():
                if value is not None and name != "epoch":
                    self.tensorboard.add_scalar(name, value, row["epoch"])
        idle = self.drawing is None or self.drawing.done()
        if idle and time.monotonic() - self.drawn > _SECONDS_BETWEEN_PICTURES:
            self.draw()

    def draw(self) -> None:
        self.drawn = time.monotonic()
        self.drawing = self.painter.submit(draw_progress, list(self.rows), self.folder / PICTURE)


@contextmanager
def recording(folder: Path, epochs: int, tensorboard: bool) -> Iterator[Record]:
    """The record of a run that has come through `epochs` epochs; the last picture is drawn at the end.

    Raises
    ------
    UserError : TensorBoard is wanted and not installed.
    """
    writer = _tensorboard(folder, epochs) if tensorboard else None
    with ThreadPoolExecutor(1, "progress picture") as painter:
        record = Record(folder, _kept(folder, epochs), painter, writer)
        try:
            yield record
        finally:
            record.draw()
            if writer is not None:
                writer.close()
    problem = None if record.drawing is None else record.drawing.exception()
    if problem is not None:
        log.warn(f"{folder / PICTURE} could not be drawn: {describe(problem)}")  # the model does not depend on it


def flat(row: Row) -> Row:
    """A row with its Dice per label in columns of their own."""
    dice = row.get("dice") or {}
    return {k: v for k, v in row.items() if k != "dice"} | {f"dice/{name}": value for name, value in dice.items()}


def to_csv(rows: list[Row]) -> str:
    """Rows as CSV; a value that an epoch does not have is empty."""
    table = [flat(row) for row in rows]
    columns = list(dict.fromkeys(name for row in table for name in row))
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows(table)
    return text.getvalue()


def _kept(folder: Path, epochs: int) -> list[Row]:
    """The rows of the epochs that the checkpoint has seen; later ones (killed before the checkpoint) are dropped."""
    path = folder / METRICS
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True) if path.is_file() else []
    rows = [json.loads(line) for line in lines if line.endswith("\n")]  # the last may be cut off
    kept = [row for row in rows if row["epoch"] <= epochs]
    write_text(path, "".join(json.dumps(row) + "\n" for row in kept))
    write_text(folder / TABLE, to_csv(kept))
    return kept


def _tensorboard(folder: Path, epochs: int) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        fix = "`pip install 'nnunet-lite[track]'`, or leave training.tensorboard out."
        raise UserError("TensorBoard is not installed", fix=fix) from None
    return SummaryWriter(folder / "tensorboard", purge_step=epochs + 1)
