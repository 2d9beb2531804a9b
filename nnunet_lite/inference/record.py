"""What a folder of predictions says about itself: predictions.json, and with --statistics the sizes of the labels.

A case is added to both before its label map is written. So every label map has an entry, whatever ends the process.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from nnunet_lite.data.cases import Case
from nnunet_lite.data.names import case_of
from nnunet_lite.files import locked, must_be_known, read_json, understood, write_json, write_text
from nnunet_lite.inference.predictor import Predictor

FORMAT = "nnlite-predictions-1"
RECORD, STATISTICS, TABLE = "predictions.json", "statistics.json", "statistics.csv"
_FIX = "Move it elsewhere, or choose another --output."


@dataclass(frozen=True)
class CaseResult:
    """What became of a case.

    Parameters
    ----------
    file : Path
        Its label map.
    case : Case
        The case.
    result : str
        "written", or the reason why it failed.
    seconds : float, optional
        From the preprocessed image to the label map.
    statistics : dict, optional
        As from `measure_labels`.
    """

    file: Path
    case: Case
    result: str
    seconds: float | None = None
    statistics: dict[str, dict[str, Any]] | None = None


@dataclass(frozen=True)
class PredictionRecord:
    """The record of a folder, which one call of `predict` extends.

    Parameters
    ----------
    folder : Path
        The folder of the label maps.
    run : dict
        What the call was given, and when.
    shared : bool
        Whether other calls write into the same folder at the same time.

    Raises
    ------
    UserError
        The folder has a file of that name that is no such record.
    """

    folder: Path
    run: Mapping[str, Any]
    shared: bool = False

    def __post_init__(self) -> None:
        self._read()
        read_statistics(self.folder)

    def add(self, result: CaseResult, how: Mapping[str, Any]) -> None:
        """Add a case to the files, which are replaced as a whole.

        Parameters
        ----------
        result : CaseResult
            The case.
        how : mapping
            What predicted it, from `describe_predictor`.
        """
        with locked(self.folder, f"writing {RECORD}") if self.shared else nullcontext():
            content, run = self._read(), {**self.run, **how}
            if run not in content["runs"]:
                content["runs"].append(run)
            content["predictions"][result.file.name] = {
                "run": content["runs"].index(run), "case": result.case.id,
                "images": [str(path.absolute()) for path in result.case.images],
                "result": result.result, "seconds": result.seconds,
            }  # fmt: skip
            write_json(self.folder / RECORD, content)
            if result.statistics is not None:
                statistics = {**read_statistics(self.folder), case_of(result.file): result.statistics}
                write_json(self.folder / STATISTICS, statistics)
                write_text(self.folder / TABLE, _as_csv(statistics))

    def _read(self) -> dict[str, Any]:
        file = self.folder / RECORD
        if not file.is_file():
            return {"format": FORMAT, "runs": [], "predictions": {}}
        with understood(file, _FIX):
            content = dict(read_json(file))
            must_be_known(content["format"], FORMAT, file)
            return {**content, "runs": list(content["runs"]), "predictions": dict(content["predictions"])}


def read_statistics(folder: Path) -> dict[str, dict[str, dict[str, Any]]]:
    """Return the statistics of a folder of predictions: case -> label -> values. There may be none.

    Raises
    ------
    UserError
        The file is not as nnlite writes it.
    """
    file = folder / STATISTICS
    if not file.is_file():
        return {}
    with understood(file, _FIX):
        return {case: {label: dict(row) for label, row in rows.items()} for case, rows in read_json(file).items()}


def _as_csv(statistics: Mapping[str, Mapping[str, Mapping[str, Any]]]) -> str:
    rows = [{"case": case, "label": label, **row} for case, of in statistics.items() for label, row in of.items()]
    table = io.StringIO()
    writer = csv.DictWriter(table, dict.fromkeys(name for row in rows for name in row), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return table.getvalue()


def describe_predictor(predictor: Predictor) -> dict[str, Any]:
    """Return what a prediction depends on, for the record: models and their hashes, device, precision, settings."""
    device = predictor.device
    return {
        "models": [_describe_model(model) for model in (predictor, *predictor.partners)],
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "precision": predictor.arithmetic.precision,
        "settings": predictor.settings.model_dump(mode="json"),
    }


def _describe_model(model: Predictor) -> dict[str, Any]:
    about = {
        "name": model.folder.name, "path": str(model.folder.absolute()), "hash": model.fingerprint,
        "dataset": model.plan.dataset, "configuration": model.configuration_name, "folds": list(model.folds),
    }  # fmt: skip
    return about if model.first_stage is None else {**about, "first_stage": _describe_model(model.first_stage)}
