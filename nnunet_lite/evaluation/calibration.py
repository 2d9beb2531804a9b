"""Calibrate what `nnlite predict` says about the quality of its predictions, on held-out cases.

`calibrate_quality` takes the rows of calibration_rows.py, and writes a `Quality` into the folders of the selected
models. Whatever it says of a row in the report comes from parts that were fitted without its case.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
from sklearn.covariance import LedoitWolf
from sklearn.ensemble import ExtraTreesRegressor
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import GroupKFold

from nnunet_lite import log
from nnunet_lite.data.dataset import Dataset
from nnunet_lite.data.problems import few, plural
from nnunet_lite.evaluation.calibration_rows import Row, TrainingRanges, predict_rows, training_ranges, write_rows
from nnunet_lite.evaluation.comparison import HeldOut, Team, weights_of
from nnunet_lite.evaluation.members import find_members
from nnunet_lite.evaluation.selection import Selection
from nnunet_lite.files import write_json
from nnunet_lite.inference.features import CaseFeatures
from nnunet_lite.inference.quality import (
    N_MONOTONE,
    USUAL_SHARE,
    Quality,
    Tree,
    Usual,
    case_vector,
    label_vector,
    mahalanobis,
    scaled_error,
    suspicion_vector,
)
from nnunet_lite.models.folder import QUALITY
from nnunet_lite.training.splits import read_split
from nnunet_lite.workspace import Paths

MIN_CASES = 10  # from fewer held-out cases nothing is said

_PARTS = 5  # of the cases, in turn left out of what is fitted
_FALSE_ALARMS = 0.03  # share of the clean cases that may be called unusual
_COVERED = 0.9  # share of the cases whose Dice is in its interval
_TREES, _LEAVES = 100, 48
_PENALTY = 0.05  # of the logistic regression, sklearn's C
_FEWEST_ERRORS = 20  # from which percentiles of errors are taken
_SPREAD = 0.02  # smallest robust standard deviation of a feature


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
        None if labels are found in fewer than 10 held-out cases, or too few copies can be predicted; then quality.json
        is deleted.

    Raises
    ------
    UserError
        A case cannot be predicted.
    """
    held_out, team = find_held_out(paths, dataset, selection, device, workers)
    quality = _calibrate(held_out, team)
    for member in team:
        if quality is None:
            (member.folder / QUALITY).unlink(missing_ok=True)
        else:
            write_json(member.folder / QUALITY, quality.model_dump(mode="json"))
    return quality


def _calibrate(held_out: HeldOut, team: Team) -> Quality | None:
    """Predict the held-out cases, store what is said of each, and fit a quality; None if there are too few cases."""
    n_cases = len(held_out.fold_of)
    if n_cases < MIN_CASES:
        log.info(f"{plural(n_cases, 'held-out case')}: too few to say how good predictions are ({MIN_CASES} needed)")
        return None
    rows = predict_rows(held_out, team)
    if what := _what_lacks(rows):
        log.info(f"{what}: nothing is said about the quality")
        return None
    ranges, weights = training_ranges(held_out, team[0].plan), weights_of(team, held_out.folds)
    fit = partial(fit_quality, ranges=ranges, weights=weights, channels=held_out.dataset.channels)
    judged = list(rows)
    for train, test in split_by_case(rows):
        of_others = fit([rows[i] for i in train])
        for i in test:
            judged[i] = rows[i].judged_by(of_others)
    write_rows(held_out, team, judged)
    quality = fit(rows)
    if missed := [name for name, share in ranges.presence.items() if share >= USUAL_SHARE and not quality.finds(name)]:
        log.warn(f"{few(missed, 5)}: often missed in held-out cases, so no flag says that it is missing")
    return quality


def _what_lacks(rows: Sequence[Row]) -> str | None:
    """Return why rows are too few, as a whole or without one of the parts of cases; None if they are enough."""
    cases, copied = {row.case for row in rows}, {row.case for row in rows if row.kind != "clean"}
    if 2 * len(copied) < len(cases):
        return f"degraded copies of {len(copied)} of {plural(len(cases), 'held-out case')} only can be predicted"
    found = {row.case for row in rows if row.kind == "clean" and row.judged_labels}
    rest = min(len(found - {rows[i].case for i in test}) for _, test in split_by_case(rows))
    if len(found) < MIN_CASES or rest < _PARTS:
        return f"labels are found in {plural(len(found), 'held-out case')} only"
    return None


def find_held_out(
    paths: Paths, dataset: Dataset, selection: Selection, device: str | None, workers: int | None
) -> tuple[HeldOut, Team]:
    """Return the held-out cases of a selection, and its models.

    Parameters
    ----------
    paths : Paths
        The workspace of the dataset.
    dataset : Dataset
        The planned dataset.
    selection : Selection
        The models and folds.
    device : str or None
        Where to predict.
    workers : int or None
        Threads that read; None for all CPUs.
    """
    members = {member.name: member for member in find_members(paths, dataset, selection.models)[0]}
    splits = tuple(read_split(paths.splits, dataset, fold) for fold in selection.folds)
    return HeldOut(paths, dataset, splits, device, workers), tuple(members[name] for name in selection.models)


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
    clean = [row.features for row in rows if row.kind == "clean"]
    image, labels = _usual_values(clean)
    cases = np.array([case_vector(image, labels, row.features) for row in rows])
    is_clean = np.array([row.kind == "clean" for row in rows])
    suspicion = _fit_suspicion(cases, is_clean, rows)
    scores = np.empty((len(rows), 2))  # distance and score, by what was fitted without the case
    for train, test in split_by_case(rows):
        others = [rows[i] for i in train]
        usual = _usual_values([row.features for row in others if row.kind == "clean"])
        by_others = np.array([case_vector(*usual, row.features) for row in rows])
        held_out = _fit_suspicion(by_others[train], is_clean[train], others)
        scores[test] = [held_out.score(by_others[i]) for i in test]
    threshold = _upper_percentile(scores[is_clean, 1], 1 - _FALSE_ALARMS)
    x, dice, of = _label_table(rows, labels, cases, scores)
    expected = np.empty(len(dice))
    for train, test in split_by_case([rows[i] for i in of]):
        expected[test] = _fit_forest(x[train], dice[train], is_clean[of[train]]).predict(x[test])
    errors, unusual = scaled_error(dice, expected), scores[of, 1] >= threshold
    of_usual = is_clean[of] & ~unusual
    of_unusual = unusual if unusual.sum() >= _FEWEST_ERRORS else ~is_clean[of]
    return Quality(
        weights=weights, n_cases=int(is_clean.sum()), n_degraded=int((~is_clean).sum()), channels=channels,
        image=image, labels=labels, volumes=_with_predicted(ranges.volumes, clean), presence=ranges.presence,
        found={name: float(np.mean([bool(one.labels[name]) for one in clean])) for name in labels}, empty=ranges.empty,
        spacing=ranges.spacing,
        location=tuple(suspicion.location.tolist()), precision=tuple(map(tuple, suspicion.precision.tolist())),
        coefficients=tuple(suspicion.coefficients.tolist()), intercept=suspicion.intercept, threshold=threshold,
        lowest=min(expected[of == i].mean() for i in np.unique(of[is_clean[of]])),
        forest=_as_trees(_fit_forest(x, dice, is_clean[of])),
        errors={"usual": _central_range(errors, of_usual), "unusual": _central_range(errors, of_unusual)},
    )  # fmt: skip


def _with_predicted(
    volumes: dict[str, tuple[float, float]], clean: Sequence[CaseFeatures]
) -> dict[str, tuple[float, float]]:
    """Widen the ranges of volumes by those that the networks usually predict: too large or small in many cases."""
    widened = {}
    for label, (low, high) in volumes.items():
        own = [one.labels[label]["volume"] for one in clean if one.labels[label]]
        usually = np.percentile(own, (5, 95)) if own else (low, high)
        widened[label] = (min(low, float(usually[0])), max(high, float(usually[1])))
    return widened


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


def split_by_case(rows: Sequence[Row]) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yield the numbers of rows to fit, and of the rows of other cases: each row is once among the latter.

    Parameters
    ----------
    rows : sequence of Row
        Held-out cases and their copies.
    """
    yield from GroupKFold(_PARTS).split(np.zeros(len(rows)), groups=[row.case for row in rows])


def _fit_suspicion(cases: np.ndarray, is_clean: np.ndarray, rows: Sequence[Row]) -> _Suspicion:
    """Fit the distance from clean cases, and the regression that separates degraded copies from them.

    The regression gets the distances of cases that did not fit them, as it will later.
    """
    normal = LedoitWolf().fit(cases[is_clean])
    distances = np.empty(len(cases))
    for train, test in split_by_case(rows):
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
        (label_vector(labels[name], row.features.labels[name], cases[i], *scores[i]), row.dice[name], i)
        for i, row in enumerate(rows)
        for name in row.judged_labels
    ]
    x, dice, of = zip(*table, strict=True)
    return np.array(x), np.array(dice), np.array(of)


def _fit_forest(x: np.ndarray, dice: np.ndarray, is_clean: np.ndarray) -> ExtraTreesRegressor:
    """Fit Dice, as often to clean cases as to degraded ones; what is unsure or unusual only lowers it."""
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


def _central_range(errors: np.ndarray, chosen: np.ndarray) -> tuple[float, float]:
    """Return the range in which the errors of future cases like the chosen ones are with a probability of 90 %."""
    share, like = (1 + _COVERED) / 2, errors[chosen] if chosen.any() else errors
    return -_upper_percentile(-like, share), _upper_percentile(like, share)
