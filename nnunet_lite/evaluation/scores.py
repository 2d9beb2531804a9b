"""From label maps on disk to scores: match predictions with references, score each case, and sum up.

The sums are as nnU-Net makes them: a label's mean is over the cases where it applies, and the foreground mean is the
mean of the labels' means. Confidence intervals are bootstrap percentiles over cases.
"""

from __future__ import annotations

import csv
import io
from collections import defaultdict
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

import numpy as np

from nnunet_lite.data.cases import image_files
from nnunet_lite.data.dataset import labels_of, map_labels
from nnunet_lite.data.geometry import ACCEPTABLE, Geometry
from nnunet_lite.data.images import read_label
from nnunet_lite.data.labels import Labels
from nnunet_lite.data.names import stem
from nnunet_lite.data.pairing import label_maps
from nnunet_lite.data.problems import few
from nnunet_lite.errors import UserError
from nnunet_lite.evaluation.metrics import Measures, distinct_values, score_case
from nnunet_lite.evaluation.statistics import Statistic, summarize
from nnunet_lite.files import read_json
from nnunet_lite.log import progress
from nnunet_lite.system import cpus, pairs_at_once

_UNSCALED = "no spacing is known, 1 mm taken for a pixel"
_MOST_LABELS = 1000  # more different values than this are an image, not a label map

# How each measure is called in files: first nnU-Net's own, then ours.
KEYS = {
    "Dice": "dice",
    "IoU": "iou",
    "TP": "tp",
    "FP": "fp",
    "FN": "fn",
    "TN": "tn",
    "n_pred": "n_prediction",
    "n_ref": "n_reference",
    "NSD": "nsd",
    "HD95_mm": "hd95_mm",
    "prediction_ml": "prediction_ml",
    "reference_ml": "reference_ml",
    "volume_error": "volume_error",
    "absolute_volume_error": "absolute_volume_error",
    "lesion_TP": "lesion_tp",
    "lesion_FP": "lesion_fp",
    "lesion_FN": "lesion_fn",
    "lesion_F1": "lesion_f1",
}
_SURFACE = ("NSD", "HD95_mm")
_COLUMNS = ("Dice", "IoU", *_SURFACE, "absolute_volume_error", "lesion_F1")  # of the table
_SUMMED_UP = (*_COLUMNS, "volume_error")  # with n, interval and median


@dataclass(frozen=True)
class CaseScore:
    """The measures of one case by region name; files are None where the arrays never were files."""

    case: str
    prediction_file: str | Path | None
    reference_file: str | Path | None
    measures: dict[str, Measures]


@dataclass(frozen=True)
class Scores:
    """The scores of all cases and labels.

    Parameters
    ----------
    rows : one per case.
    tolerance_mm : of NSD, in `unit`.
    unit : of distances: "mm", or "px" where no spacing is known.
    notes : what had to be understood or was left out.
    """

    rows: tuple[CaseScore, ...]
    labels: Labels
    tolerance_mm: float = 1.0
    notes: tuple[str, ...] = ()
    unit: str = "mm"

    @classmethod
    def of(cls, rows: Iterable[CaseScore], labels: Labels) -> Scores:
        return cls(tuple(rows), labels)

    @property
    def keys(self) -> dict[str, str]:
        """How each measure is called in files -> field or property of `Measures`."""
        return {in_unit(key, self.unit): field for key, field in KEYS.items()}

    def values(self, measure: str = "dice") -> np.ndarray:
        """A measure (a field of `Measures`) of each case and label (cases, labels); NaN where it is n/a."""
        names = self.labels.region_names
        table = [[getattr(row.measures[name], measure) for name in names] for row in self.rows]
        return np.array(table, dtype=float).reshape(len(self.rows), len(names))

    def by_label(self, measure: str = "dice") -> dict[str, Statistic]:
        """A measure summed up over cases, for each label."""
        columns = self.values(measure).T
        return {
            name: summarize(column[:, None]) for name, column in zip(self.labels.region_names, columns, strict=True)
        }

    def foreground(self, measure: str = "dice") -> Statistic:
        """A measure averaged over labels, then cases as nnU-Net does it: the mean of the labels' means."""
        return summarize(self.values(measure))

    def to_json(self) -> dict[str, Any]:
        """What nnU-Net's summary.json holds, with more measures; n/a is null."""
        keys = label_keys(self.labels)
        overall = {key: self.foreground(field) for key, field in self.keys.items()}
        by_key: dict[str, dict[str, Statistic]] = {of: {} for of in keys.values()}
        for key, field in self.keys.items():
            for name, statistic in self.by_label(field).items():
                by_key[keys[name]][key] = statistic
        return {
            "foreground_mean": _means(overall),
            "mean": {of: _means(statistics) for of, statistics in by_key.items()},
            "metric_per_case": [
                {
                    "metrics": {
                        keys[name]: {key: getattr(measures, field) for key, field in self.keys.items()}
                        for name, measures in row.measures.items()
                    },
                    "prediction_file": None if row.prediction_file is None else str(row.prediction_file),
                    "reference_file": None if row.reference_file is None else str(row.reference_file),
                    "case": row.case,
                }
                for row in self.rows
            ],
            "statistics": {
                of: {key: vars(statistics[key]) for key in (in_unit(key, self.unit) for key in _SUMMED_UP)}
                for of, statistics in {"foreground": overall, **by_key}.items()
            },
            "labels": {of: name for name, of in keys.items()},
            "length_unit": self.unit,
            f"nsd_tolerance_{self.unit}": self.tolerance_mm,
            "notes": list(self.notes),
        }

    def to_csv(self) -> str:
        """One line per case and label; n/a is empty."""
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        writer.writerow(["case", "label", "value", *self.keys])
        keys = label_keys(self.labels)
        for row in self.rows:
            for name, measures in row.measures.items():
                writer.writerow(
                    [row.case, name, keys[name], *(getattr(measures, field) for field in self.keys.values())]
                )
        return text.getvalue()

    def to_text(self) -> str:
        """`lines` as plain text, then the notes."""
        widths = [max(map(len, column)) for column in zip(*self.lines(), strict=True)]
        text = [
            "  ".join([first.ljust(widths[0]), *(c.rjust(w) for c, w in zip(rest, widths[1:], strict=True))])
            for first, *rest in self.lines()
        ]
        return "\n".join([*text, *(f"note: {note}" for note in self.notes)])

    def lines(self) -> list[tuple[str, ...]]:
        """The cells of a table: its head, one line per label, then the foreground mean.

        A mean over other cases than Dice's says how many; an HD95 exists only where both masks are there. Surface
        measures that were not computed have no columns.
        """
        measured = np.isfinite(self.values("nsd")).any()
        shown = [key for key in _COLUMNS if measured or key not in _SURFACE]
        columns = [{**self.by_label(KEYS[key]), "foreground mean": self.foreground(KEYS[key])} for key in shown]
        titles = {"NSD": f"NSD {self.tolerance_mm:g} {self.unit}", "HD95_mm": f"HD95 {self.unit}",
                  "absolute_volume_error": "abs. volume error", "lesion_F1": "lesion F1"}  # fmt: skip
        head = "label", "n", "Dice", "95 % interval", "median", *(titles.get(key, key) for key in shown[1:])
        return [head, *((name, *_cells([column[name] for column in columns])) for name in columns[0])]

    def _repr_html_(self) -> str:
        """The table as text, for a notebook."""
        return f"<pre>{escape(self.to_text())}</pre>"


def in_unit(key: str, unit: str) -> str:
    """The name of a measure in files: HD95_px where no spacing is known."""
    return f"{key.removesuffix('_mm')}_{unit}" if key.endswith("_mm") else key


def _means(statistics: dict[str, Statistic]) -> dict[str, float | None]:
    return {key: statistic.mean for key, statistic in statistics.items()}


def _cells(statistics: list[Statistic]) -> list[str]:
    """A line of the table from the statistics of Dice and the others."""

    def cell(statistic: Statistic) -> str:
        other = f" (n={statistic.n})" if statistic.n not in (0, dice.n) else ""
        return _number(statistic.mean) + other

    dice, *others = statistics
    interval = "n/a" if dice.low is None else f"{_number(dice.low)}-{_number(dice.high)}"
    return [str(dice.n), _number(dice.mean), interval, _number(dice.median), *map(cell, others)]


def label_keys(labels: Labels) -> dict[str, str]:
    """How nnU-Net's summary.json calls each region: "1" for a value, "(1, 2)" for several."""
    return {name: str(labels.names[name]) for name in labels.region_names}


def _number(value: float | None) -> str:
    return "n/a" if value is None else f"{value:.4f}"


# -------------------------------------------------------------------------------------------------------------- on disk


def score_files(
    prediction: Path,
    reference: Path,
    labels: Labels | None = None,
    tolerance_mm: float = 1.0,
    surface: bool = True,
    workers: int | None = None,
    accept_geometry: bool = False,
) -> Scores:
    """Score label maps against their references: two folders, whose files are matched by name, or two files.

    Parameters
    ----------
    labels : else those of a dataset.json in the reference folder, its parent, or the prediction folder; else the values
        that the files hold.
    tolerance_mm : how far apart surfaces may be for NSD; pixels where no file has a spacing.
    surface : whether to measure NSD and HD95.
    workers : threads, all cores where None; 0 or 1 for one.
    accept_geometry : compare voxel by voxel where origin or direction of a pair differ, with a note.

    Raises
    ------
    UserError : nothing matches; a pair is on two grids; a file cannot be read.
    """
    prediction, reference = Path(prediction), Path(reference)
    pairs, notes = _match(prediction, reference)
    at_once = pairs_at_once(len(pairs), workers)
    threads = max(1, cpus() if workers is None else workers) // at_once
    with ThreadPoolExecutor(at_once) as pool:
        if labels is None:
            labels = _described_labels(prediction, reference)
        if labels is None:
            files = [path for pair in pairs.values() for path in pair]
            labels = _found_labels(pool.map(_values_of_file, files), reference)
            notes = [*notes, f"no dataset.json: the labels are the values found, {', '.join(labels.region_names)}"]
        known = labels

        def score(case: str) -> tuple[CaseScore, list[tuple[str, str]], bool]:
            arrays, spacing, scaled, remarks = _read_pair(*pairs[case], known, accept_geometry)
            measures = score_case(*arrays, known, spacing, tolerance_mm, surface, threads, scaled)
            return CaseScore(case, *pairs[case], measures), remarks, scaled

        results = list(progress(pool.map(score, pairs), len(pairs), "evaluate"))
    rows, each, scaled = zip(*results, strict=True)
    remarks = [remark for some in each for remark in some]
    if any(scaled):
        remarks += [(_UNSCALED, row.case) for row, known_size in zip(rows, scaled, strict=True) if not known_size]
    unit = "mm" if any(scaled) else "px"
    return Scores(rows, labels, tolerance_mm, (*notes, *_gather(remarks)), unit)


def _match(prediction: Path, reference: Path) -> tuple[dict[str, tuple[Path, Path]], list[str]]:
    """Case -> (prediction, reference), and what is left over."""
    for path in (prediction, reference):
        if not path.exists():
            raise UserError("there is no such file or folder", path)
    if prediction.is_dir() != reference.is_dir():
        raise UserError(f"one of this and {reference} is a folder", prediction, "Give two folders, or two files.")
    if reference.is_file():
        return {stem(reference): (prediction, reference)}, []
    predicted, wanted = _by_stem(prediction), _by_stem(reference)
    by_word = {
        name: maps[0]
        for name, maps in label_maps(wanted.values(), predicted).items()
        if name not in wanted and len(maps) == 1
    }
    wanted = {name: path for name, path in wanted.items() if path not in by_word.values()} | by_word
    pairs = {case: (predicted[case], wanted[case]) for case in sorted(predicted.keys() & wanted.keys())}
    if not pairs:
        raise UserError(
            f"no prediction has the name of a reference in {reference}: predictions {few(sorted(predicted), 10)}, "
            f"references {few(sorted(wanted), 10)}",
            prediction,
            "Name both alike; endings may differ.",
        )
    notes = [
        f"{len(alone)} {what} {few(alone, 10)}"
        for alone, what in (
            (sorted(wanted.keys() - predicted.keys()), "without a prediction, not scored:"),
            (sorted(predicted.keys() - wanted.keys()), "without a reference, not scored:"),
        )
        if alone
    ]
    if by_word:
        references = [f"{path.name} of {name}" for name, path in by_word.items()]
        notes.append(f"{len(by_word)} references found by a word at the end of their names: {few(references, 1)}")
    return pairs, notes


def _by_stem(folder: Path) -> dict[str, Path]:
    files: dict[str, Path] = {}
    for path in image_files(folder):
        if stem(path) in files:
            raise UserError(f"{files[stem(path)].name} and {path.name} are the same case", folder, "Remove one.")
        files[stem(path)] = path
    if not files:
        raise UserError("holds no label map of a supported format", folder)
    return files


def _described_labels(prediction: Path, reference: Path) -> Labels | None:
    """The labels of the nearest dataset.json."""
    ours, theirs = (path if path.is_dir() else path.parent for path in (prediction.absolute(), reference.absolute()))
    table = next((f / "dataset.json" for f in (theirs, theirs.parent, ours) if (f / "dataset.json").is_file()), None)
    if table is None:
        return None
    told = read_json(table)
    return labels_of(told if isinstance(told, dict) else {}, table)


def _found_labels(values_by_file: Iterable[set[int]], where: Path) -> Labels:
    """The values found, each named by itself. Where masks of 0 and 1 meet masks of 0 and 255, these are one label."""
    each = list(values_by_file)
    values = set().union(*each)
    if values <= {0, 1, 255} and not any({1, 255} <= found for found in each) and 1 in values:
        values -= {255}
    if not values - {0}:
        raise UserError("neither references nor predictions hold anything but zeros", where)
    return Labels(names={"background": 0, **{str(value): value for value in sorted(values - {0})}})


def _values_of_file(path: Path) -> set[int]:
    values = distinct_values(read_label(path)[0])
    if len(values) > _MOST_LABELS:
        raise UserError(f"holds {len(values)} different values", path, "Is it an image? Label maps are compared here.")
    return values


def _read_pair(
    prediction: Path, reference: Path, labels: Labels, accept_geometry: bool
) -> tuple[tuple[np.ndarray, np.ndarray], tuple[float, float, float], bool, list[tuple[str, str]]]:
    """Both arrays (z, y, x), the spacing, whether a file states it, and remarks as (remark, file)."""
    predicted, grid, remarks = _read(prediction, labels)
    truth, true_grid, more = _read(reference, labels, grid)
    if differing := [what for what, _, _ in grid.differences(true_grid)]:
        acceptable = set(differing) <= set(ACCEPTABLE)
        if not (acceptable and accept_geometry):
            accept = " If the voxels do match, --accept-geometry compares them as they are." if acceptable else ""
            raise UserError(
                f"is on another grid than {reference}: {grid.describe()}, the reference {true_grid.describe()}",
                prediction,
                f"Resample one to the grid of the other, with nearest neighbour.{accept}",
            )
        more = [*more, (f"another {' and '.join(differing)} than the reference, accepted", prediction.name)]
    known = grid if grid.calibrated and not true_grid.calibrated else true_grid
    return (predicted, truth), known.spacing, known.calibrated, remarks + more


def _read(
    path: Path, labels: Labels, like: Geometry | None = None
) -> tuple[np.ndarray, Geometry, list[tuple[str, str]]]:
    """A label map with the values of `labels`, aligned with another, its geometry, and remarks."""
    array, geometry, notes = read_label(path, like)
    remarks = [(note, path.name) for note in notes]
    found, known = distinct_values(array), {*labels.values, *(() if labels.ignore is None else (labels.ignore,))}
    if known == {0, 1} and 255 in found and 1 not in found:
        return map_labels(array, {255: 1}), geometry, [*remarks, ("255 read as 1", path.name)]
    if found - known:
        unknown = few([str(value) for value in sorted(found - known)], 10)
        remarks.append((f"no label has the value {unknown}, counted as background", path.name))
    return array, geometry, remarks


def _gather(remarks: Iterable[tuple[str, str]]) -> list[str]:
    """One note per remark, with the files it is about."""
    files: dict[str, list[str]] = defaultdict(list)
    for remark, file in remarks:
        files[remark].append(file)
    return [f"{remark} ({few(names)})" for remark, names in files.items()]
