"""What a folder of predictions says about itself: predictions.json, quality.json, and the sizes of the labels if asked.

A case is added to all before its label map is written. In large folders, where this takes long, cases wait for each
other for some seconds, and a process that is killed loses the entries of these.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from filecmp import cmp
from pathlib import Path
from typing import Any, TypeVar

import torch

from nnunet_lite.data.cases import Case
from nnunet_lite.data.names import case_of
from nnunet_lite.errors import UserError
from nnunet_lite.files import locked, must_be_known, read_json, table_of, to_csv, understood, write_json, write_text
from nnunet_lite.inference.cases import identify
from nnunet_lite.inference.predictor import Predictor
from nnunet_lite.inference.quality import QUALITY_TABLE, CaseQuality, quality_table, worst_first
from nnunet_lite.models.folder import QUALITY, RECORD

T = TypeVar("T")

FORMAT = "nnlite-predictions-1"
STATISTICS, TABLE = "statistics.json", "statistics.csv"
QUALITY_FORMAT = "nnlite-case-quality-1"
_FIX = "Move it elsewhere."
KEPT = "kept"  # the result of a case whose label map existed
_LONG = 0.1  # seconds to write the files, from which on they are not written for each case
_PAUSE = 20  # times that, until they are written again


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
        "written", `KEPT`, or the reason why it failed.
    seconds : float, optional
        From the preprocessed image to the label map.
    statistics : dict, optional
        As from `measure_labels`.
    quality : CaseQuality, optional
        What is expected of it.
    """

    file: Path
    case: Case
    result: str
    seconds: float | None = None
    statistics: dict[str, dict[str, Any]] | None = None
    quality: CaseQuality | None = None


@dataclass
class PredictionRecord:
    """The record of a folder, which one call of `predict` extends; a context, whose end writes what waits.

    Parameters
    ----------
    folder : Path
        The folder of the label maps.
    statistics : bool
        Whether cases are added with statistics.
    begins : bool
        Whether to begin a record in a folder that has none of ours.
    quality : bool
        Whether cases may be added with what is expected of them.
    judged : dict
        Case -> what is expected of it, also of those that the folder had before.

    Raises
    ------
    UserError
        The folder has a file of that name that is no such record.
    """

    folder: Path
    statistics: bool = False
    begins: bool = True
    quality: bool = False
    judged: dict[str, CaseQuality] = field(default_factory=dict, init=False)
    _waiting: list[tuple[CaseResult, Mapping[str, Any]]] = field(default_factory=list, init=False)
    _due: float = field(default=0.0, init=False)

    def __post_init__(self) -> None:
        try:
            self.begins |= bool(self._read()["runs"])
        except UserError:  # of another program
            if self.begins:
                raise
        if self.statistics:
            read_statistics(self.folder)
        if self.begins and self.quality:
            self.judged = read_case_qualities(self.folder)

    def refuse_other_images(self, cases: Mapping[Path, Case]) -> None:
        """Refuse cases whose label map would be kept or replaced although it is that of another image.

        Parameters
        ----------
        cases : mapping
            The label map that each case is to have -> the case.

        Raises
        ------
        UserError
            There is a label map of another image of the same name, which still exists.
        """
        recorded = self._read()["predictions"] if self.begins else {}
        for file, case in cases.items():
            with understood(self.folder / RECORD, _FIX):
                other = Path(recorded[file.name]["images"][0]) if file.name in recorded else case.images[0]
            if file.is_file() and other.exists() and not _is_same_image(other, case.images[0]):
                what = f"is the label map of {other}, and that of {case.images[0]} has the same name"
                raise UserError(what, file, "Choose another --output, or delete it.")

    def __enter__(self) -> PredictionRecord:
        return self

    def __exit__(self, *_: object) -> None:
        self._write()

    def add(self, result: CaseResult, run: Mapping[str, Any]) -> None:
        """Add a case. The files are replaced as a whole: at once, or if that takes long, every few seconds.

        Parameters
        ----------
        result : CaseResult
            The case.
        run : mapping
            What the call was given, when, and what predicted the case, from `describe_predictor`.
        """
        _replace_quality(self.judged, result)
        self._waiting.append((result, run))
        if (began := time.monotonic()) >= self._due:
            self._write()
            took = time.monotonic() - began
            self._due = time.monotonic() + _PAUSE * took if took > _LONG else 0.0

    def _write(self) -> None:
        may_change = self.begins or self.statistics or (self.folder / STATISTICS).is_file()
        if not self._waiting or not may_change:  # a single label map beside files of others
            return
        with locked(self.folder, f"writing {RECORD}", leave=False):
            content = self._read() if self.begins else {}
            statistics = self._read_own(read_statistics, self.statistics)
            judged = self._read_own(read_case_qualities, self.quality) if self.begins else {}
            before, judged_before = dict(statistics), dict(judged)
            for result, run in self._waiting:
                if self.begins and result.result != KEPT:
                    _add_entry(content, result, run)
                statistics.pop(case_of(result.file), None)  # those of an older label map
                _replace_quality(judged, result)
                if result.statistics is not None:
                    statistics[case_of(result.file)] = result.statistics
            if self.begins:
                write_json(self.folder / RECORD, content)
            if statistics != before:
                write_json(self.folder / STATISTICS, statistics)
                rows = [{"case": case, "label": label, **row} for case, of in statistics.items()
                        for label, row in of.items()]  # fmt: skip
                write_text(self.folder / TABLE, to_csv(table_of(rows)))
            if self.begins and judged != judged_before:
                cases = {case: one.to_json() for case, one in worst_first(judged)}
                write_json(self.folder / QUALITY, {"format": QUALITY_FORMAT, "cases": cases})
                write_text(self.folder / QUALITY_TABLE, quality_table(judged))
            self._waiting.clear()

    def _read_own(self, read: Callable[[Path], dict[str, T]], is_needed: bool) -> dict[str, T]:
        """Read a file of the folder; that of another program is empty, unless it would be extended."""
        try:
            return read(self.folder)
        except UserError:
            if is_needed:
                raise
            return {}

    def _read(self) -> dict[str, Any]:
        file = self.folder / RECORD
        if not file.is_file():
            return {"format": FORMAT, "runs": [], "predictions": {}}
        with understood(file, _FIX):
            content = dict(read_json(file))
            must_be_known(content["format"], FORMAT, file)
            return {**content, "runs": list(content["runs"]), "predictions": dict(content["predictions"])}


def _replace_quality(judged: dict[str, CaseQuality], result: CaseResult) -> None:
    """Put what is expected of a case in the place of what was expected of an older label map."""
    if result.result != KEPT:
        judged.pop(case_of(result.file), None)
    if result.quality is not None:
        judged[case_of(result.file)] = result.quality


def _add_entry(content: dict[str, Any], result: CaseResult, run: Mapping[str, Any]) -> None:
    if run not in content["runs"]:
        content["runs"].append(run)
    content["predictions"][result.file.name] = {
        "run": content["runs"].index(run), "case": result.case.id,
        "images": [str(path.absolute()) for path in result.case.images],
        "result": result.result, "seconds": result.seconds,
    }  # fmt: skip


def read_statistics(folder: Path) -> dict[str, dict[str, dict[str, Any]]]:
    """Return the statistics of a folder of predictions: case -> label -> values. There may be none.

    Raises
    ------
    UserError
        The file is not as nnlite writes it.
    """
    file = folder / STATISTICS
    if not file.is_file():
        return _nothing_beside(folder / TABLE)
    with understood(file, _FIX):
        return {case: {label: dict(row) for label, row in rows.items()} for case, rows in read_json(file).items()}


def read_case_qualities(folder: Path) -> dict[str, CaseQuality]:
    """Return what is expected of the predictions in a folder, by case. There may be none.

    Raises
    ------
    UserError
        The file is not as nnlite writes it.
    """
    file = folder / QUALITY
    if not file.is_file():
        return _nothing_beside(folder / QUALITY_TABLE)
    with understood(file, _FIX):
        content = dict(read_json(file))
        must_be_known(content["format"], QUALITY_FORMAT, file)
        return {case: CaseQuality.from_json(value) for case, value in content["cases"].items()}


def _nothing_beside(table: Path) -> dict[str, Any]:
    """Return no entries; refuse a table of another program that would be replaced."""
    if table.is_file() and not table.read_bytes().startswith(b"case,label,"):
        raise UserError("is not of nnlite, which writes a file of this name", table, _FIX)
    return {}


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


def _is_same_image(one: Path, other: Path) -> bool:
    """Return whether two paths lead to the same image, or to a copy of it."""
    if identify(one) == identify(other):
        return True
    pairs = [(one, other)]
    if one.is_dir() and other.is_dir():  # DICOM series
        names = [{path.name for path in folder.iterdir()} for folder in (one, other)]
        if names[0] != names[1]:
            return False
        pairs = [(one / name, other / name) for name in names[0]]
    return all(a.is_file() and b.is_file() and cmp(a, b, shallow=False) for a, b in pairs)
