"""Calibrate what `nnlite predict` says about the quality of its predictions, on held-out cases.

`calibrate_quality` predicts the held-out cases of a selection, and degraded copies of them, each with the networks that
have not seen it, and stores a row of features and Dice for each in calibration.jsonl. `fit_quality` makes a `Quality`
of the rows. Whatever is said of a row comes from parts that were fitted without its case.
"""

from __future__ import annotations

import json
import zlib
from collections import defaultdict
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import BaseModel, ConfigDict, ValidationError
from sklearn.covariance import LedoitWolf
from sklearn.ensemble import ExtraTreesRegressor
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import GroupKFold

from nnunet_lite import log
from nnunet_lite.data.cases import Case
from nnunet_lite.data.dataset import Dataset, map_labels
from nnunet_lite.data.geometry import triple
from nnunet_lite.data.images import read_label
from nnunet_lite.data.labels import Labels
from nnunet_lite.data.problems import plural
from nnunet_lite.errors import UserError
from nnunet_lite.evaluation.comparison import HeldOut, Team, find_members, load_team
from nnunet_lite.evaluation.cross_validation import read_reference
from nnunet_lite.evaluation.degradation import DEGRADATIONS, Labelled
from nnunet_lite.evaluation.selection import Selection
from nnunet_lite.files import append, hash_of, write_json, write_text
from nnunet_lite.inference.cases import read_case_image
from nnunet_lite.inference.features import CaseFeatures, describe_prediction
from nnunet_lite.inference.predictor import Predictor, prepare_image, segment
from nnunet_lite.inference.quality import (
    N_MONOTONE,
    Quality,
    Tree,
    Usual,
    case_vector,
    judge,
    label_vector,
    mahalanobis,
    scaled_error,
    suspicion_vector,
)
from nnunet_lite.models.folder import QUALITY, weights_fingerprint
from nnunet_lite.planning.fingerprint import Fingerprint
from nnunet_lite.planning.schema import Plan
from nnunet_lite.system import pairs_at_once
from nnunet_lite.training.splits import read_split
from nnunet_lite.workspace import Paths

MIN_CASES = 10  # from fewer held-out cases nothing is said

_MOST_CASES = 200  # predicted again
_COPIES = 160  # degraded copies to predict at least, up to _MOST_COPIES of each case
_MOST_COPIES = 8
_PARTS = 5  # of the cases, in turn left out of what is fitted
_FALSE_ALARMS = 0.03  # share of the clean cases that may be called unusual
_COVERED = 0.9  # share of the cases whose Dice is in its interval
_TREES, _LEAVES = 100, 48
_PENALTY = 0.05  # of the logistic regression, sklearn's C
_FEWEST_ERRORS = 20  # from which percentiles of errors are taken
_SPREAD = 0.02  # smallest robust standard deviation of a feature


class Row(BaseModel):
    """A held-out case or a degraded copy of it, as it was predicted.

    Parameters
    ----------
    case : str
        Case id.
    kind : str
        "clean", or a key of `DEGRADATIONS`.
    features : CaseFeatures
        Of the prediction.
    dice : dict
        Label -> Dice; None for a label that is neither predicted nor in the reference.
    quality : dict, optional
        What is said of it by a `Quality` that was fitted without its case, as from `CaseQuality.to_json`.
    """

    model_config = ConfigDict(frozen=True)

    case: str
    kind: str
    features: CaseFeatures
    dice: dict[str, float | None]
    quality: dict[str, Any] | None = None

    def judged_by(self, quality: Quality) -> Row:
        """Return the row with what a quality says of it."""
        return self.model_copy(update={"quality": judge(quality, self.features).to_json()})


@dataclass(frozen=True)
class TrainingRanges:
    """What the training cases have.

    Parameters
    ----------
    volumes : dict
        Label -> logarithms of the smallest and the largest volume, mm3.
    presence : dict
        Label -> share of the cases that have it.
    spacing : tuple
        Smallest and largest spacing (z, y, x), mm.
    """

    volumes: dict[str, tuple[float, float]]
    presence: dict[str, float]
    spacing: tuple[tuple[float, float, float], tuple[float, float, float]]


def calibrate_quality(
    paths: Paths, dataset: Dataset, selection: Selection, device: str | None, workers: int | None
) -> Quality | None:
    """Calibrate the quality of the predictions of a selection, and write quality.json into its model folders.

    Rows that were predicted before are kept in calibration.jsonl, unless a model has other weights since.

    Parameters
    ----------
    paths : Paths
        The workspace of the dataset.
    dataset : Dataset
        The planned dataset.
    selection : Selection
        The models and folds that predict later.
    device : str or None
        Where to predict.
    workers : int or None
        Threads that read; None for all CPUs.

    Returns
    -------
    Quality or None
        None if fewer than 10 cases are held out; then quality.json is deleted.

    Raises
    ------
    UserError
        A case cannot be predicted.
    """
    members = {member.name: member for member in find_members(paths, dataset, selection.models)[0]}
    team = tuple(members[name] for name in selection.models)
    splits = tuple(read_split(paths.splits, dataset, fold) for fold in selection.folds)
    held_out = HeldOut(paths, dataset, splits, device, workers)
    for member in team:
        (member.folder / QUALITY).unlink(missing_ok=True)  # it may be of other weights
    cases = list(held_out.fold_of)
    if len(cases) < MIN_CASES:
        log.info(f"{plural(len(cases), 'held-out case')}: too few to say how good predictions are ({MIN_CASES} needed)")
        return None
    weights = {
        member.name: {split.name: weights_fingerprint(member.folder, split.name) for split in held_out.splits}
        for member in team
    }
    key = hash_of([weights, cases])
    rows = _predict_rows(held_out, team, key)
    ranges = _training_ranges(held_out, team[0].plan)
    fit = partial(fit_quality, ranges=ranges, weights=weights, channels=held_out.dataset.channels)
    judged: list[Row] = []
    for train, test in _parts(rows):
        of_others = fit([rows[i] for i in train])
        judged += [rows[i].judged_by(of_others) for i in test]
    _write_rows(held_out.paths.calibration, key, judged)
    quality = fit(rows)
    for member in team:
        write_json(member.folder / QUALITY, quality.model_dump(mode="json"))
    return quality


# ---------------------------------------------------------------------------------------------------------------- rows


def read_rows(file: Path, key: str | None = None) -> list[Row]:
    """Read the rows of calibration.jsonl; none if there is no such file, or if it is of something else than `key`.

    A last line that was not written completely is left out.
    """
    lines = file.read_text(encoding="utf-8").splitlines() if file.is_file() else []
    if not lines or key not in (None, json.loads(lines[0])["of"]):
        return []
    rows = []
    for number, line in enumerate(lines[1:], start=2):
        try:
            rows.append(Row.model_validate_json(line))
        except ValidationError:
            if number == len(lines):  # of a killed run
                break
            what = f"line {number} is no row of a calibration"
            raise UserError(what, file, "Delete it, and run `nnlite select` again.") from None
    return rows


def _write_rows(file: Path, key: str, rows: Sequence[Row]) -> None:
    lines = [json.dumps({"of": key}), *(row.model_dump_json() for row in rows)]
    write_text(file, "\n".join(lines) + "\n")


def _predict_rows(held_out: HeldOut, team: Team, key: str) -> list[Row]:
    """Predict held-out cases and degraded copies of them; those in calibration.jsonl are not predicted again."""
    file = held_out.paths.calibration
    rows = read_rows(file, key)
    _write_rows(file, key, rows)
    made = {(row.case, row.kind): row for row in rows}
    names = list(held_out.fold_of)
    names = names[:: -(-len(names) // _MOST_CASES)]
    wanted = list(_choose_copies(names))
    missing = [pair for pair in wanted if pair not in made]
    cases = {case.id: case for case in held_out.dataset.cases}
    missing.sort(key=lambda pair: held_out.fold_of[pair[0]].name)
    log.info(f"calibrating the quality of predictions: {len(missing)} held-out images and degraded copies")
    loaded: dict[str, Predictor] = {}
    for name, kind in log.progress(missing, len(missing), "calibrate"):
        fold = held_out.fold_of[name].name
        if fold not in loaded:
            loaded = {fold: load_team(held_out, team, fold)}
        row = _predict_row(loaded[fold], cases[name], kind, held_out.dataset)
        append(file, row.model_dump_json())
        made[name, kind] = row
    return [made[pair] for pair in wanted]


def _choose_copies(cases: Sequence[str]) -> Iterator[tuple[str, str]]:
    """Yield case and kind of each image to predict: all kinds equally often."""
    kinds = list(DEGRADATIONS)
    each = min(_MOST_COPIES, max(1, -(-_COPIES // len(cases))))
    for number, case in enumerate(cases):
        yield case, "clean"
        for copy in range(each):
            yield case, kinds[(number * each + copy) % len(kinds)]


def _predict_row(predictor: Predictor, case: Case, kind: str, dataset: Dataset) -> Row:
    image = read_case_image(predictor.plan, case, dataset.accept_geometry)
    assert case.label is not None  # every case of a planned dataset has one
    reference = map_labels(read_label(case.label, image.geometry)[0], dataset.value_map)
    pair = Labelled(image, reference)
    if kind != "clean":
        random = np.random.default_rng(zlib.crc32(f"{case.id} {kind}".encode()))  # the same in every run
        pair = DEGRADATIONS[kind](pair, random.random(), random)
    prepared = prepare_image(predictor, pair.image)
    label_map, maps = segment(predictor, prepared, maps=predictor.quality_maps)
    features = describe_prediction(prepared.arrays[0], label_map, maps, predictor.plan.labels)
    return Row(case=case.id, kind=kind, features=features, dice=_dice(label_map, pair.reference, dataset.labels))


def _dice(label_map: np.ndarray, reference: np.ndarray, labels: Labels) -> dict[str, float | None]:
    known = reference != labels.ignore if labels.ignore is not None else np.ones(reference.shape, bool)
    dice: dict[str, float | None] = {}
    for (name, written), values in zip(labels.segments.items(), labels.region_values, strict=True):
        predicted, expected = np.isin(label_map, written) & known, np.isin(reference, values)
        total = int(predicted.sum() + expected.sum())
        dice[name] = 2 * int((predicted & expected).sum()) / total if total else None
    return dice


def _training_ranges(held_out: HeldOut, plan: Plan) -> TrainingRanges:
    """Read how large each label is in the references of all cases, and the spacings in the fingerprint."""
    labels, found = held_out.dataset.labels, defaultdict[str, list[float]](list)
    segments = dict(zip(labels.region_names, labels.region_values, strict=True))

    def measure(case: Case) -> dict[str, float]:
        reference, spacing = read_reference(case, held_out.dataset)
        values, counts = np.unique(reference, return_counts=True)
        return {name: counts[np.isin(values, of)].sum() * np.prod(spacing) for name, of in segments.items()}

    with ThreadPoolExecutor(pairs_at_once(len(held_out.dataset.cases), held_out.workers)) as pool:
        for volumes in pool.map(measure, held_out.dataset.cases):
            for name, volume in volumes.items():
                found[name] += [float(np.log(volume))] if volume else []
    spacings = np.array(Fingerprint.read(held_out.paths.fingerprint).spacings)[:, list(plan.axis_order)]
    n_cases = len(held_out.dataset.cases)
    return TrainingRanges(
        {name: (min(logs), max(logs)) for name, logs in found.items() if logs},
        {name: len(found[name]) / n_cases for name in segments},
        (triple(spacings.min(axis=0).tolist()), triple(spacings.max(axis=0).tolist())),
    )


# ------------------------------------------------------------------------------------------------------------- fitting


@dataclass(frozen=True)
class _Suspicion:
    """The parts of a `Quality` that say how unusual a case is."""

    location: np.ndarray
    precision: np.ndarray
    coefficients: np.ndarray
    intercept: float

    def score(self, case: np.ndarray) -> tuple[float, float]:
        """Return the distance and the score of a case."""
        distance = mahalanobis(case, self.location, self.precision)
        return distance, float(self.coefficients @ suspicion_vector(case, distance) + self.intercept)


def fit_quality(
    rows: Sequence[Row], ranges: TrainingRanges, weights: dict[str, dict[str, str]], channels: tuple[str, ...]
) -> Quality:
    """Fit a `Quality` to held-out cases and degraded copies of them.

    Parameters
    ----------
    rows : sequence of Row
        The predictions.
    ranges : TrainingRanges
        What the training cases have.
    weights : dict
        Model -> fold -> fingerprint of its weights.
    channels : tuple of str
        Names of the channels.
    """
    image, labels = _usual_values([row.features for row in rows if row.kind == "clean"])
    cases = np.array([case_vector(image, labels, row.features) for row in rows])
    is_clean = np.array([row.kind == "clean" for row in rows])
    suspicion = _fit_suspicion(cases, is_clean, rows)
    scores = np.empty((len(rows), 2))  # distance and score, by what was fitted without the case
    for train, test in _parts(rows):
        held_out = _fit_suspicion(cases[train], is_clean[train], [rows[i] for i in train])
        scores[test] = [held_out.score(cases[i]) for i in test]
    threshold = _upper_percentile(scores[is_clean, 1], 1 - _FALSE_ALARMS)
    x, dice, of = _label_table(rows, labels, cases, scores)
    expected = np.empty(len(dice))
    for train, test in _parts([rows[i] for i in of]):
        expected[test] = _fit_forest(x[train], dice[train], is_clean[of[train]]).predict(x[test])
    errors, unusual = scaled_error(dice, expected), scores[of, 1] >= threshold
    usual_errors = errors[is_clean[of] & ~unusual]
    unusual_errors = errors[unusual] if unusual.sum() >= _FEWEST_ERRORS else errors[~is_clean[of]]
    return Quality(
        weights=weights, n_cases=int(is_clean.sum()), n_degraded=int((~is_clean).sum()), channels=channels,
        image=image, labels=labels, volumes=ranges.volumes, presence=ranges.presence, spacing=ranges.spacing,
        location=tuple(suspicion.location.tolist()), precision=tuple(map(tuple, suspicion.precision.tolist())),
        coefficients=tuple(suspicion.coefficients.tolist()), intercept=suspicion.intercept, threshold=threshold,
        forest=_as_trees(_fit_forest(x, dice, is_clean[of])),
        errors={"usual": _central_range(usual_errors), "unusual": _central_range(unusual_errors)},
    )  # fmt: skip


def _usual_values(clean: Sequence[CaseFeatures]) -> tuple[dict[str, Usual], dict[str, dict[str, Usual]]]:
    """Return the usual values of each feature of the image, and of each label."""
    image = defaultdict[str, list[float]](list)
    labels = defaultdict[str, dict[str, list[float]]](lambda: defaultdict(list))
    for features in clean:
        for name, value in features.image.items():
            image[name].append(value)
        for label, found in features.labels.items():
            for name, value in found.items():
                labels[label][name].append(value)

    def usual(values: Sequence[float]) -> Usual:
        low, middle, high = np.percentile(values, (16, 50, 84))
        spread = max(_SPREAD, float(high - low) / 2)
        return Usual(middle=float(middle), spread=spread, low=min(values), high=max(values))

    by_label = {label: {name: usual(values) for name, values in labels[label].items()} for label in clean[0].labels}
    return {name: usual(values) for name, values in image.items()}, by_label


def _parts(rows: Sequence[Row]) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yield the rows to fit, and the rows of other cases: each row is once among the latter."""
    yield from GroupKFold(_PARTS).split(np.zeros(len(rows)), groups=[row.case for row in rows])


def _fit_suspicion(cases: np.ndarray, is_clean: np.ndarray, rows: Sequence[Row]) -> _Suspicion:
    """Fit the distance from clean cases, and the regression that tells degraded copies from them.

    The regression gets the distances of cases that did not fit them, as it will later.
    """
    normal = LedoitWolf().fit(cases[is_clean])
    distances = np.empty(len(cases))
    for train, test in _parts(rows):
        other = LedoitWolf().fit(cases[train][is_clean[train]])
        distances[test] = [mahalanobis(case, other.location_, other.precision_) for case in cases[test]]
    x = np.array([suspicion_vector(*pair) for pair in zip(cases, distances, strict=True)])
    model = LogisticRegression(C=_PENALTY, class_weight="balanced", max_iter=5000).fit(x, ~is_clean)
    return _Suspicion(normal.location_, normal.precision_, model.coef_[0], float(model.intercept_[0]))


def _label_table(
    rows: Sequence[Row], labels: dict[str, dict[str, Usual]], cases: np.ndarray, scores: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return the vector and the Dice of each predicted label, and the number of its row."""
    table = [
        (label_vector(labels[name], found, cases[i], *scores[i]), row.dice[name], i)
        for i, row in enumerate(rows)
        for name, found in row.features.labels.items()
        if found and row.dice[name] is not None
    ]
    x, dice, of = zip(*table, strict=True)
    return np.array(x), np.array(dice), np.array(of)


def _fit_forest(x: np.ndarray, dice: np.ndarray, is_clean: np.ndarray) -> ExtraTreesRegressor:
    """Fit Dice, as often to clean cases as to degraded ones; doubts and deviations only lower it."""
    monotone = np.where(np.arange(x.shape[1]) < N_MONOTONE, -1, 0)
    forest = ExtraTreesRegressor(
        _TREES, max_leaf_nodes=_LEAVES, min_samples_leaf=2, monotonic_cst=monotone, random_state=0
    )
    share = is_clean.mean().clip(0.01, 0.99)
    return forest.fit(x, dice, sample_weight=np.where(is_clean, (1 - share) / share, 1).clip(1, 4))


def _as_trees(forest: ExtraTreesRegressor) -> tuple[Tree, ...]:
    trees = [estimator.tree_ for estimator in forest.estimators_]
    return tuple(
        Tree(
            feature=tuple(tree.feature.tolist()), threshold=tuple(tree.threshold.tolist()),
            left=tuple(tree.children_left.tolist()), right=tuple(tree.children_right.tolist()),
            value=tuple(np.round(tree.value[:, 0, 0], 5).tolist()),
        )
        for tree in trees
    )  # fmt: skip


def _upper_percentile(values: np.ndarray, share: float) -> float:
    """Return what a share of future values stays below: a value of those given, or their largest if they are few."""
    rank = int(np.ceil(share * (len(values) + 1)))
    return float(np.sort(values)[min(rank, len(values)) - 1])


def _central_range(errors: np.ndarray) -> tuple[float, float]:
    """Return the range in which the errors of future cases are with a probability of 90 %."""
    share = (1 + _COVERED) / 2
    return -_upper_percentile(-errors, share), _upper_percentile(errors, share)
