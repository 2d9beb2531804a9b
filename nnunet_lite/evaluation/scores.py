"""The scores of many cases: match predictions with references, score each case, sum up, and print tables.

`score_files` scores two folders of label maps. `Scores` holds the result, sums it up and writes it; a
summary.json has the keys of nnU-Net's, and `read_summary` reads it back. Sums are those of nnU-Net: the mean of a
label is over the cases to which the metric applies, and the foreground mean is the mean of these means.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np

from nnunet_lite.data.cases import folders_in, image_files, label_base, label_maps, unsupported_files
from nnunet_lite.data.dataset import labels_of, map_labels
from nnunet_lite.data.discovery import cases_by_name, files_below
from nnunet_lite.data.geometry import ACCEPTABLE, Geometry
from nnunet_lite.data.images import read_label
from nnunet_lite.data.labels import Labels, contradiction
from nnunet_lite.data.names import case_of, has_label_word, stem
from nnunet_lite.data.problems import align, few, html_table, plural
from nnunet_lite.errors import UserError, no_such_file
from nnunet_lite.evaluation.metrics import COARSE, METRICS, Metric, MetricValues, is_coarse, score_case
from nnunet_lite.evaluation.statistics import Statistic, mean_of_known, summarize
from nnunet_lite.files import read_json, to_csv
from nnunet_lite.log import map_in_threads
from nnunet_lite.models.folder import RECORD, SUMMARY, VALIDATION, why_not_held_out
from nnunet_lite.system import cpus, pairs_at_once

_NO_SPACING = "no spacing is known, 1 mm taken for a pixel"
_CASES_SHOWN, _WORST_SHOWN = 10, 5  # with this number of cases or fewer, each is shown
_MOST_LABELS = 1000  # more different values than this are an image, not a label map


@dataclass(frozen=True)
class CaseScore:
    """The metrics of one case.

    Parameters
    ----------
    case : str
        Case id.
    prediction_file, reference_file : str, Path or None
        None if the arrays never were files.
    metrics : dict
        Name of label or region -> metric -> value, as from `score_case`.
    has_spacing : bool
        Whether the spacing is known. If not, lengths are in pixels.
    """

    case: str
    prediction_file: str | Path | None
    reference_file: str | Path | None
    metrics: dict[str, MetricValues]
    has_spacing: bool = True

    @property
    def mean_dice(self) -> float | None:
        """The mean over the labels that are in the case or in its prediction; None if there are none."""
        return mean_of_known(values["Dice"] for values in self.metrics.values())

    def __repr__(self) -> str:
        by_label = few([f"{name} {four_digits(values['Dice'])}" for name, values in self.metrics.items()], 8)
        return f"{self.case}: Dice {four_digits(self.mean_dice)} ({by_label})"


@dataclass(frozen=True)
class Scores:
    """The metrics of all cases.

    Parameters
    ----------
    rows : tuple of CaseScore
        One per case.
    labels : Labels
        What is scored.
    tolerance : float
        The tolerance of NSD, in `unit`.
    notes : tuple of str
        What was left out or read in a special way.
    exit_code : int
        Of the command: 1 if a case could not be predicted.
    """

    rows: tuple[CaseScore, ...]
    labels: Labels
    tolerance: float = 1.0
    notes: tuple[str, ...] = ()
    exit_code: int = 0

    @property
    def unit(self) -> str:
        """The unit of lengths: "mm", or "px" if no image has a spacing."""
        return "px" if self.rows and not any(row.has_spacing for row in self.rows) else "mm"

    def values(self, metric: str = "Dice") -> np.ndarray:
        """Values of a metric (cases, labels); NaN where it does not apply.

        Parameters
        ----------
        metric : str
            A name of `METRICS`.
        """
        names = self.labels.region_names
        table = [[row.metrics[name][metric] for name in names] for row in self.rows]
        return np.array(table, dtype=float).reshape(len(self.rows), len(names))

    def by_label(self, metric: str = "Dice") -> dict[str, Statistic]:
        """A metric over cases, for each label.

        Parameters
        ----------
        metric : str
            A name of `METRICS`.
        """
        columns = zip(self.labels.region_names, self.values(metric).T, strict=True)
        return {name: summarize(column[:, None]) for name, column in columns}

    def foreground(self, metric: str = "Dice") -> Statistic:
        """A metric over cases and labels, as nnU-Net averages it: the mean of the means of the labels.

        Parameters
        ----------
        metric : str
            A name of `METRICS`.
        """
        return summarize(self.values(metric))

    def to_json(self) -> dict[str, Any]:
        """The content of summary.json: that of nnU-Net's, with more metrics. A metric that does not apply is null."""
        names = label_keys(self.labels)
        keys = {metric.file_key(self.unit): name for name, metric in METRICS.items()}
        by_label = {key: self.by_label(metric) for key, metric in keys.items()}
        statistics = {"foreground": {key: self.foreground(metric) for key, metric in keys.items()}}
        statistics |= {names[name]: {key: by_label[key][name] for key in keys} for name in names}
        means = {of: {key: one.mean for key, one in values.items()} for of, values in statistics.items()}
        return {
            "foreground_mean": means.pop("foreground"),
            "mean": means,
            "metric_per_case": [
                {
                    "metrics": {
                        names[name]: {key: values[metric] for key, metric in keys.items()}
                        for name, values in row.metrics.items()
                    },
                    "prediction_file": None if row.prediction_file is None else str(row.prediction_file),
                    "reference_file": None if row.reference_file is None else str(row.reference_file),
                    "case": row.case,
                }
                for row in self.rows
            ],
            "statistics": {
                of: {key: vars(one) for key, one in values.items() if METRICS[keys[key]].better}
                for of, values in statistics.items()
            },
            "labels": {label_key: name for name, label_key in names.items()},
            "length_unit": self.unit,
            f"nsd_tolerance_{self.unit}": self.tolerance,
            "notes": list(self.notes),
        }

    def to_csv(self) -> str:
        """One line per case and label; a metric that does not apply is empty."""
        return to_csv(self._table())

    def to_dataframe(self) -> Any:
        """The table of `to_csv` as a DataFrame of pandas; a metric that does not apply is NaN.

        Raises
        ------
        UserError
            pandas is not installed.
        """
        try:
            import pandas  # not needed by the commands
        except ImportError:
            raise UserError("pandas is not installed", fix="pip install pandas.") from None
        head, *rows = self._table()
        return pandas.DataFrame([[np.nan if cell is None else cell for cell in row] for row in rows], columns=head)

    def _table(self) -> list[list[Any]]:
        """The headings, then a line per case and label."""
        keys = label_keys(self.labels)
        head = ["case", "label", "value", *(metric.file_key(self.unit) for metric in METRICS.values())]
        return [head] + [
            [row.case, name, keys[name], *(values[metric] for metric in METRICS)]
            for row in self.rows
            for name, values in row.metrics.items()
        ]

    def lines(self) -> list[tuple[str, ...]]:
        """The cells of a table: the headings, a line per label, then the foreground mean.

        A mean over other cases than those of Dice says over how many: HD95 needs both masks. A metric that no case has
        is no column.
        """
        metrics = [
            metric for name, metric in METRICS.items()
            if name == "Dice" or (metric.better in ("higher", "lower") and np.isfinite(self.values(name)).any())
        ]  # fmt: skip
        columns = [{**self.by_label(m.name), "foreground mean": self.foreground(m.name)} for m in metrics]
        suffixes = {"NSD": f" ({self.tolerance:g} {self.unit})", "HD95": f" ({self.unit})"}
        headings = [metric.heading + suffixes.get(metric.name, "") for metric in metrics]
        head = ("label", "n", "Dice", "95 % interval", "median", *headings[1:])
        return [head, *((name, *_cells([column[name] for column in columns], metrics)) for name in columns[0])]

    def to_text(self) -> str:
        """`lines` as plain text, then each case, of many the worst, and the notes."""
        cases = list(map(repr, self.rows)) if 1 < len(self.rows) <= _CASES_SHOWN else []
        if len(self.rows) > _CASES_SHOWN:
            worst = sorted(self.rows, key=lambda row: 1.0 if row.mean_dice is None else row.mean_dice)
            cases = [f"worst of {len(worst)} cases:", *map(repr, worst[:_WORST_SHOWN])]
        return "\n".join([align(self.lines()), *cases, *(f"note: {note}" for note in self.notes)])

    def __repr__(self) -> str:
        by_label = few([f"{name} {four_digits(dice.mean)}" for name, dice in self.by_label().items()], 8)
        return f"Scores of {plural(len(self.rows), 'case')}: Dice {four_digits(self.foreground().mean)} ({by_label})"

    def _repr_html_(self) -> str:
        return html_table(self.lines(), self.notes)


def label_keys(labels: Labels) -> dict[str, str]:
    """The name of each region in nnU-Net's summary.json: "1" for a value, "(1, 2)" for several.

    Parameters
    ----------
    labels : Labels
        Labels of the dataset.
    """
    return {name: str(labels.names[name]) for name in labels.region_names}


def four_digits(value: float | None) -> str:
    """A number of a table.

    Parameters
    ----------
    value : float or None
        None is written as "n/a".
    """
    return "n/a" if value is None else f"{value:.4f}"


def _cells(statistics: Sequence[Statistic], metrics: Sequence[Metric]) -> list[str]:
    """A line of the table from the statistics of Dice and of the other metrics."""
    dice, others = statistics[0], zip(statistics[1:], metrics[1:], strict=True)
    interval = "n/a" if dice.low is None else f"{four_digits(dice.low)}-{four_digits(dice.high)}"
    cells = [
        ("n/a" if one.mean is None else format(one.mean, metric.number_format))
        + ("" if one.n in (0, dice.n) else f" (n={one.n})")
        for one, metric in others
    ]
    return [str(dice.n), four_digits(dice.mean), interval, four_digits(dice.median), *cells]


def read_summary(file: Path, labels: Labels) -> Scores:
    """Read the scores of all cases in a summary.json.

    The predictions are expected in the same folder as the summary, since a workspace may have been moved.

    Parameters
    ----------
    file : Path
        The summary.
    labels : Labels
        What it scores.

    Raises
    ------
    UserError
        The file is no summary, or one for other labels.
    """
    names = {key: name for name, key in label_keys(labels).items()}
    rows = []
    summary = read_json(file)
    try:
        unit = summary.get("length_unit", "mm")
        for entry in summary["metric_per_case"]:
            metrics = {
                name: {metric: entry["metrics"][key][METRICS[metric].file_key(unit)] for metric in METRICS}
                for key, name in names.items()
            }
            prediction = entry["prediction_file"] and file.parent / Path(entry["prediction_file"]).name
            rows.append(CaseScore(entry["case"], prediction, entry["reference_file"], metrics, unit == "mm"))
    except (KeyError, TypeError, AttributeError) as error:
        what = f"is not a summary for the labels {', '.join(names.values())} ({type(error).__name__}: {error})"
        raise UserError(what, file, "Validate the fold again: delete its folder `validation` and train.") from None
    return Scores(tuple(rows), labels)


def read_fold_scores(folder: Path, labels: Labels, notes: list[str]) -> tuple[Scores, dict[str, str]]:
    """Read the scores of all validated folds of a model, and the fold of each case.

    Parameters
    ----------
    folder : Path
        The model folder.
    labels : Labels
        What is scored.
    notes : list of str
        Gets the reasons why scores are left out.
    """
    rows: list[CaseScore] = []
    fold_of: dict[str, str] = {}
    for file in sorted(folder.glob(f"fold_*/{VALIDATION}/{SUMMARY}")):
        if why := why_not_held_out(file.parent.parent):
            notes.append(f"scores of {folder.name} are left out: {why}")
            continue
        try:
            validated = read_summary(file, labels).rows
        except UserError as error:
            notes.append(f"scores are left out: {error}")
            continue
        rows += [row for row in validated if row.case not in fold_of]
        fold = file.parent.parent.name.removeprefix("fold_")
        fold_of = {row.case: fold for row in validated} | fold_of
    by_id = sorted(rows, key=lambda row: row.case)  # intervals depend on the order, and `select` has this one
    return Scores(tuple(by_id), labels), fold_of


# ------------------------------------------------------------------------------------------------ folders of label maps


def score_files(
    prediction: Path,
    reference: Path,
    labels: Labels | None = None,
    tolerance: float = 1.0,
    surface: bool = True,
    workers: int | None = None,
    accept_geometry: bool = False,
    default: Labels | None = None,
) -> Scores:
    """Score label maps against their references.

    Parameters
    ----------
    prediction, reference : Path
        Two folders, whose files are matched by name, or two files.
    labels : Labels or None
        By default those of a dataset.json in the reference folder, its parent, or the prediction folder; else
        `default`; else the values in the files.
    tolerance : float
        Distance up to which surfaces agree for NSD; in pixels if no file has a spacing.
    surface : bool
        Whether to compute NSD and HD95.
    workers : int or None
        Number of threads; None for all CPUs, 0 or 1 for one.
    accept_geometry : bool
        Compare voxel by voxel where the origin or direction of a pair differs, with a note.
    default : Labels or None
        Taken without a dataset.json if they have all values in the files.

    Raises
    ------
    UserError
        Nothing matches; a pair is on two grids; a file cannot be read.
    """
    prediction, reference = Path(prediction), Path(reference)
    pairs, notes = _match(prediction, reference)
    at_once = pairs_at_once(len(pairs), workers)
    threads = max(1, cpus() if workers is None else workers) // at_once
    looked, described = described_labels(prediction, reference)
    labels = labels or described
    if labels is None:
        files = [path for pair in pairs.values() for path in pair]
        values = map_in_threads(_values_of_file, files, at_once, "labels")
        labels, whose = _found_labels(values, reference), "the values found"
        if default is not None and set().union(*values) <= {0, *default.values, default.ignore}:
            labels, whose = default, "those of the planned dataset"
        notes = [*notes, f"no {looked}: the labels are {whose}, {', '.join(labels.region_names)}"]
    known = labels

    failed: dict[str, UserError] = {}

    def score(case: str) -> tuple[CaseScore, list[_Remark]] | None:
        try:
            predicted, true, geometry, remarks = _read_pair(*pairs[case], known, accept_geometry)
        except UserError as error:
            failed[case] = error
        if failed:  # the other pairs are read, so that the error names each that is wrong
            return None
        spacing = geometry.spacing if geometry.calibrated else None
        if surface and is_coarse(tolerance, geometry.spacing):
            remarks.append(
                (f"{COARSE} voxels are less than the tolerance of NSD, {tolerance:g}: it says nothing", case)
            )
        metrics = score_case(predicted, true, known, spacing, tolerance, surface, threads)
        return CaseScore(case, *pairs[case], metrics, geometry.calibrated), remarks

    found = map_in_threads(score, pairs, at_once, "evaluate")
    if failed:
        raise _describe_failed({case: failed[case] for case in pairs if case in failed}, len(pairs))
    results = [one for one in found if one is not None]
    scores = Scores(tuple(row for row, _ in results), labels, tolerance)
    files_of: dict[str, list[str]] = defaultdict(list)
    for row, remarks in results:
        assumed = [(_NO_SPACING, row.case)] if scores.unit == "mm" and not row.has_spacing else []
        for remark, file in remarks + assumed:
            files_of[remark].append(file)
    return replace(scores, notes=(*notes, *(f"{remark} ({few(files)})" for remark, files in files_of.items())))


def _describe_failed(failed: dict[str, UserError], n_pairs: int) -> UserError:
    """Return the error of a pair; of several, one that has a line for each."""
    first = next(iter(failed.values()))
    if len(failed) == 1:
        return first
    lines = "".join(f"\n  {error.file or case}: {error.what}" for case, error in failed.items())
    fixes = dict.fromkeys(error.fix for error in failed.values() if error.fix)
    shown = [fix for fix in fixes if not any(other != fix and other.startswith(fix) for other in fixes)]
    return UserError(f"{' '.join([f'{len(failed)} of {n_pairs} pairs cannot be compared.', *shown])}{lines}")


_Remark = tuple[str, str]  # what is special about a file, and its name


def _match(prediction: Path, reference: Path) -> tuple[dict[str, tuple[Path, Path]], list[str]]:
    """Match predictions with references: case -> (prediction, reference), and notes on files that match nothing."""
    for path in (prediction, reference):
        if not path.exists():
            raise no_such_file(path)
    if prediction.is_dir() != reference.is_dir():
        raise UserError(f"one of this and {reference} is a folder", prediction, "Give two folders, or two files.")
    if reference.is_file():
        return {stem(reference): (prediction, reference)}, []
    predicted, found = _by_name(prediction, case_of), {}
    if not image_files(reference) and folders_in(reference):  # as `nnlite init` reads it, such as one for each patient
        found = _label_maps_below(reference)
    references = found or _by_name(reference, stem)
    images = {label_base(name) for name in references if label_base(name) != name}  # x beside x_mask
    references = {name: path for name, path in references.items() if name not in images}
    maps = {case: [path] for case, path in found.items() if case in predicted}
    if not maps:  # `predict` names a case by its folders: sub-01, or sub-01_ses-1, for sub-01/ses-1/anat/T1w.nii.gz
        inside = defaultdict[str, list[Path]](list)
        for path in found.values():
            folders = path.relative_to(reference).parts[:-1]
            for name in {"_".join(some) for n in range(1, 5) for some in combinations(folders, n)}:
                inside[name].append(path)
        maps = {case: inside[case] for case in predicted if case in inside}
    maps = maps or label_maps(references.values(), predicted)  # a name may end in a word, as case_0_mask
    pairs = {case: (predicted[case], maps[case][0]) for case in sorted(maps) if len(maps[case]) == 1}
    if not pairs:
        names = f"predictions {few(sorted(predicted), 10)}, references {few(sorted(references), 10)}"
        what = f"no prediction has the name of a reference in {reference}: {names}"
        raise UserError(what, prediction, "Give both the same names; endings may differ.")
    used = {path for _, path in pairs.values()}
    missing = sorted(name for name, path in references.items() if path not in used)
    extra = sorted(predicted.keys() - pairs.keys())
    by_word = [f"{path.name} of {case}" for case, (_, path) in pairs.items() if stem(path) != case and not found]
    notes = [
        f"{len(missing)} without a prediction, not scored: {few(missing, 10)}" if missing else "",
        f"{len(extra)} without a reference, not scored: {few(extra, 10)}" if extra else "",
        f"{len(by_word)} references found by a word at the end of their names: {few(by_word, 1)}" if by_word else "",
    ]
    return pairs, [note for note in notes if note]


def _label_maps_below(folder: Path) -> dict[str, Path]:
    files = files_below(folder)
    paths = {path.relative_to(folder): path for path in files.images}
    if all(map(has_label_word, paths)):  # masks without images, as in derivatives/ of BIDS
        return {path.as_posix(): paths[path] for path in paths}
    try:
        return {case.id: case.label for case in cases_by_name(files).cases if case.label}
    except UserError as error:  # which says what to do about `nnlite init`
        fix = "Give a folder of label maps that have the names of the predictions."
        raise UserError(error.what, folder, fix) from None


def _by_name(folder: Path, name_of: Callable[[Path], str]) -> dict[str, Path]:
    files: dict[str, Path] = {}
    for path in image_files(folder):
        if (other := files.setdefault(name_of(path), path)) != path:
            raise UserError(f"{other.name} and {path.name} are the same case", folder, "Remove one.")
    if not files:
        what, fix = unsupported_files(folder), "Of DICOM masks, `nnlite init` writes label maps, with their series."
        raise UserError(f"contains no label map of a supported format{what}", folder, fix if ".dcm" in what else "")
    return files


def described_labels(prediction: Path, reference: Path) -> tuple[str, Labels | None]:
    """Return where labels may be described, and those of the nearest dataset.json or of the record of predictions.

    Parameters
    ----------
    prediction, reference : Path
        Label maps, or folders of them.

    Raises
    ------
    UserError
        The description is broken, or two of them give a label different numbers.
    """
    ours, theirs = (path if path.is_dir() else path.parent for path in (prediction.absolute(), reference.absolute()))
    places = [folder / "dataset.json" for folder in dict.fromkeys((theirs, theirs.parent, ours))] + [ours / RECORD]
    described: list[tuple[Path, Labels]] = []
    for file in (file for file in places if file.is_file()):
        content = read_json(file)
        if file.name == RECORD:
            content = content["runs"][-1] if isinstance(content, dict) and content.get("runs") else {}
        content = content if isinstance(content, dict) else {}
        if "labels" in content or not (described or file.name == RECORD):
            described.append((file, labels_of(content, file)))
    for file, other in described[1:]:
        for name, numbers in described[0][1].segments.items():
            if {*other.segments.get(name, numbers)} != {*numbers}:
                here, there = (few(list(map(str, found))) for found in (numbers, other.segments[name]))
                fix = "Give label maps in which numbers mean the same."
                raise UserError(f"{name} is {here} here, and {there} in {file}", described[0][0], fix)
    looked = f"dataset.json in {', '.join(str(file.parent) for file in places[:-1])}"
    return looked, described[0][1] if described else None


def _found_labels(values_by_file: Sequence[set[int]], folder: Path) -> Labels:
    """Name each value in the files by itself. If some masks are 0 and 1 and others 0 and 255, these are one label."""
    values = set().union(*values_by_file)
    if values <= {0, 1, 255} and not any({1, 255} <= found for found in values_by_file) and 1 in values:
        values -= {255}
    if not values - {0}:
        raise UserError("neither references nor predictions contain anything but zeros", folder)
    names = {"background": 0, **{str(value): value for value in sorted(values - {0})}}
    return labels_of({"labels": names}, folder)


def _values_of_file(path: Path) -> set[int]:
    values = _distinct_values(read_label(path)[0])
    if len(values) > _MOST_LABELS:
        raise UserError(
            f"contains {len(values)} different values", path, "Is it an image? Only label maps can be compared."
        )
    return values


def _distinct_values(array: np.ndarray) -> set[int]:
    """Find the different values of an integer array, without sorting where the type allows it."""
    if array.dtype.itemsize > 2:
        return set(np.unique(array).tolist())
    found = np.zeros(1 << 16, bool)
    for part in array:
        found[part] = True  # a negative value counts from the end, and comes back as itself
    return set(np.flatnonzero(found).astype(array.dtype).tolist())


def _read_pair(
    prediction: Path, reference: Path, labels: Labels, accept_geometry: bool
) -> tuple[np.ndarray, np.ndarray, Geometry, list[_Remark]]:
    """Read a prediction and its reference (z, y, x), the better known of their geometries, and remarks."""
    predicted, grid, remarks = _read(prediction, labels)
    true, true_grid, more = _read(reference, labels, grid)
    if differences := grid.differences(true_grid):
        differing = [what for what, _, _ in differences]
        acceptable = set(differing) <= set(ACCEPTABLE)
        if not (acceptable and accept_geometry):
            accept = " If the voxels do match, --accept-geometry compares them as they are." if acceptable else ""
            numbers = ", ".join(f"{what} {own}, the reference {what} {true}" for what, own, true in differences)
            fix = f"Resample one to the grid of the other, with nearest neighbour.{accept}"
            raise UserError(f"is on another grid than {reference}: {numbers}", prediction, fix)
        more = [*more, (f"another {' and '.join(differing)} than the reference, accepted", prediction.name)]
    geometry = grid if grid.calibrated and not true_grid.calibrated else true_grid
    return predicted, true, geometry, remarks + more


def _read(path: Path, labels: Labels, like: Geometry | None = None) -> tuple[np.ndarray, Geometry, list[_Remark]]:
    """Read a label map with the values of `labels`, aligned with the geometry `like`, its geometry, and remarks."""
    array, geometry, notes = read_label(path, like)
    if wrong := next(filter(None, (contradiction(note, labels) for note in notes)), None):
        raise UserError(wrong, path, "Export it from 3D Slicer with a colour table of these numbers.")
    remarks = [(note, path.name) for note in notes]
    values = _distinct_values(array)
    label_values = {*labels.values, *(() if labels.ignore is None else (labels.ignore,))}
    if label_values == {0, 1} and 255 in values and 1 not in values:
        return map_labels(array, {255: 1}), geometry, [*remarks, ("255 read as 1", path.name)]
    if values - label_values:
        unknown = few([str(value) for value in sorted(values - label_values)], 10)
        remarks.append((f"no label has the value {unknown}, counted as background", path.name))
    return array, geometry, remarks
