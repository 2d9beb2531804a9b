"""Judge predictions without a reference: the Dice to expect of each label, and in words what is unusual.

`nnlite select` calibrates a `Quality` on held-out cases and degraded copies of them (evaluation/calibration.py), and
stores it as quality.json in the model folder. `judge` applies it to the features of a prediction (features.py):

1. Features are compared with those of the clean held-out cases, in robust standard deviations.
2. Their Mahalanobis distance, and a logistic regression of degraded copies against clean cases, say how unusual
   the case is. More than 97 % of the clean cases are less unusual than what is flagged.
3. A forest of small trees gives the Dice of each label. It is monotone: where the networks are less sure, or the case
   is more unusual, it is never higher.
4. Its errors on cases that did not fit it give an interval (split conformal prediction, Lei et al. 2018,
   arXiv:1604.04173), one for usual and one for unusual cases.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, model_validator

from nnunet_lite.data.problems import few
from nnunet_lite.files import read_validated, to_csv
from nnunet_lite.inference.features import AXES, FEATURES, CaseFeatures, Values
from nnunet_lite.models.folder import QUALITY

QUALITY_TABLE = "quality.csv"

_FARTHEST = 8.0  # standard deviations; whatever is further is as far
_BENDING = 0.02  # added to the expected loss of Dice, by which errors are scaled
# groups of features of a label, of which the largest deviation counts
_SHAPE = {
    "volume": ("volume",),
    "compactness": ("compactness",),
    "parts": ("parts",),
    "edge": ("edge",),
    "length": tuple(f"length/{axis}" for axis in AXES),
    "position": tuple(f"position/{axis}" for axis in AXES),
}
_LABEL_WORDS = {  # by group of features
    "position": "unusual place of {where}",
    "length": "unusual length of {where}",
    "compactness": "unusual shape of {where}",
    "edge": "at the edge of the image, cut off?: {where}",
}
_BLURRED, _NOISY = "blurred, or of thick slices, along {where}", "noisier or sharper along {where}"
_SHARPNESS = {_BLURRED: _NOISY, _NOISY: _BLURRED}  # thick slices that were interpolated are both by the numbers
_TREND = "brightness changes over the image in an unusual way: a bias field, or another position?"
_CONTRAST = "intensities are unlike those of the training ({channels}): another sequence or modality?"
_OF_PICTURES = {  # instead
    _BLURRED: "blurred along {where}",
    _TREND: "brightness changes over the image in an unusual way: uneven light?",
    _CONTRAST: "intensities are unlike those of the training ({channels}): another stain or exposure?",
}
_IMAGE_WORDS = {  # by feature, and whether it is larger than usual
    ("extent", True): "the image is longer than usual along {where}",
    ("extent", False): "the image is shorter than usual along {where}",
    ("step", True): _NOISY, ("noise", True): _NOISY, ("step", False): _BLURRED, ("noise", False): _BLURRED,
    ("trend", True): _TREND, ("trend", False): _TREND, ("comb", True): "ghosts along {where}?",
    ("intensity", True): _CONTRAST, ("intensity", False): _CONTRAST,
}  # fmt: skip
_DOUBTS = ("inner", "scattered", "edge", "disagreement")  # further features of a label
N_MONOTONE = 3  # the first entries of a `label_vector`
USUAL_SHARE = 0.95  # a label that is in more of the training cases is expected in all
_FOUND_SHARE = 0.9  # a label that is found in fewer of the held-out cases is not missed in others
_LARGER = 1.25  # times the training's range: from there on a size is reported
_MOST_REASONS = 3
_NOTABLE = 3.0  # standard deviations, from which a feature explains why a case is unusual


class _Stored(BaseModel):
    model_config = ConfigDict(frozen=True)


class Usual(_Stored):
    """A feature over the clean held-out cases: median, robust standard deviation, and range."""

    middle: float
    spread: float
    low: float
    high: float

    def deviation(self, value: float) -> float:
        """Return how many standard deviations a value is from the median, at most 8."""
        return float(np.clip((value - self.middle) / self.spread, -_FARTHEST, _FARTHEST))


class Tree(_Stored):
    """A regression tree, node by node; `feature` is negative in a leaf."""

    feature: tuple[int, ...]
    threshold: tuple[float, ...]
    left: tuple[int, ...]
    right: tuple[int, ...]
    value: tuple[float, ...]

    @model_validator(mode="after")
    def _ends(self) -> Tree:
        """Refuse a tree, of a zip from anywhere, whose branches do not lead to later nodes and so to a leaf."""
        n = len(self.feature)
        if not n or any(len(values) != n for values in (self.threshold, self.left, self.right, self.value)):
            raise ValueError("a tree has not as many thresholds, branches and values as nodes")
        for number, feature in enumerate(self.feature):
            if feature >= 0 and not (number < self.left[number] < n and number < self.right[number] < n):
                raise ValueError(f"node {number} of a tree leads to no later node")
        return self

    def predict(self, x: np.ndarray) -> float:
        """Return the value of the leaf of a vector."""
        node = 0
        while self.feature[node] >= 0:
            node = (self.left if x[self.feature[node]] <= self.threshold[node] else self.right)[node]
        return self.value[node]


class Quality(_Stored):
    """What held-out cases say about predictions: the content of quality.json in a model folder.

    Parameters
    ----------
    format : str
        The format of the file.
    features : int
        The version of the features that it was fitted to.
    weights : dict
        Model -> fold -> fingerprint of its weights: which networks it holds for.
    n_cases, n_degraded : int
        How many held-out cases, and degraded copies of them, it was fitted on.
    channels : tuple of str
        Names of the channels of the training's images.
    image : dict
        Feature of the image -> its usual values.
    labels : dict
        Label -> feature -> its usual values in predictions.
    volumes : dict
        Label -> logarithms of the smallest and largest volume (mm3; of pictures mm2 or pixels) in the training, or
        usually predicted.
    presence : dict
        Label -> share of the training cases that have it.
    found : dict
        Label -> share of the held-out cases in which it is found.
    empty : float
        Share of the training cases that have no label.
    spacing : tuple
        Smallest and largest spacing (z, y, x) in the training, mm.
    location, precision : tuple
        Of the Mahalanobis distance: the mean, and the inverse of the covariance.
    coefficients, intercept, threshold : tuple, float, float
        Of the logistic regression; a case is unusual from the threshold on.
    lowest : float
        Lowest expected mean Dice of a clean held-out case; a case is unusual below it, too.
    forest : tuple of Tree
        Their mean is the expected Dice.
    errors : dict
        "usual" and "unusual" -> 5th and 95th percentile of (Dice - expected) / (1.02 - expected).
    """

    format: Literal["nnlite-quality-1"] = "nnlite-quality-1"
    features: int = FEATURES
    weights: dict[str, dict[str, str]]
    n_cases: int
    n_degraded: int
    channels: tuple[str, ...]
    image: dict[str, Usual]
    labels: dict[str, dict[str, Usual]]
    volumes: dict[str, tuple[float, float]]
    presence: dict[str, float]
    found: dict[str, float] = {}
    empty: float = 0.0
    spacing: tuple[tuple[float, float, float], tuple[float, float, float]]
    location: tuple[float, ...]
    precision: tuple[tuple[float, ...], ...]
    coefficients: tuple[float, ...]
    intercept: float
    threshold: float
    lowest: float
    forest: tuple[Tree, ...] = Field(min_length=1)
    errors: dict[Literal["usual", "unusual"], tuple[float, float]]

    def finds(self, label: str) -> bool:
        """Whether the networks usually find a label."""
        return bool(self.labels[label]) and self.found.get(label, 1.0) >= _FOUND_SHARE


@dataclass(frozen=True)
class Expected:
    """The Dice to expect of a label, with its 90 % interval."""

    dice: float
    low: float
    high: float


@dataclass(frozen=True)
class CaseQuality:
    """What is expected of a prediction.

    Parameters
    ----------
    expected : dict
        Label -> its Dice; None for a label that is not predicted and need not be there.
    unusual : float
        From 0 to 1; from 0.5 on the case is flagged as unlike the training.
    flags : tuple of str
        In words what is unusual; empty for a usual case.
    """

    expected: dict[str, Expected | None]
    unusual: float
    flags: tuple[str, ...]

    @property
    def mean(self) -> float | None:
        """The mean over labels of the expected Dice; None if no label is predicted."""
        values = [one.dice for one in self.expected.values() if one is not None]
        return sum(values) / len(values) if values else None

    def in_cells(self) -> tuple[str, str, str]:
        """Return the cells of a table: means over labels of the Dice and of the ends of its interval; flags."""
        intervals = [one for one in self.expected.values() if one is not None]
        if self.mean is None:
            return "none", "", "; ".join(self.flags)
        ends = (sum(one.low for one in intervals), sum(one.high for one in intervals))
        low, high = (f"{end / len(intervals):.2f}" for end in ends)
        return f"{self.mean:.2f}", f"{low} to {high}", "; ".join(self.flags)

    def to_json(self) -> dict[str, Any]:
        mean = None if self.mean is None else round(self.mean, 4)
        return {"expected_mean": mean, **asdict(self)}

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> CaseQuality:
        """Read what `to_json` wrote."""
        expected = {name: None if one is None else Expected(**one) for name, one in value["expected"].items()}
        return cls(expected, float(value["unusual"]), tuple(value["flags"]))


def read_quality(folder: Path) -> Quality | None:
    """Read the quality.json of a model folder; None if there is none.

    Raises
    ------
    UserError
        The file is not as nnlite writes it.
    """
    fix = "Delete it, or run `nnlite select` again."
    return read_validated(folder / QUALITY, Quality, "is no calibrated quality", fix)


def quality_table(cases: Mapping[str, CaseQuality]) -> str:
    """Return a CSV table with a row for each case and label, the lowest expected mean first."""
    rows: list[tuple[str, ...]] = [("case", "label", "expected_dice", "low", "high", "case_mean", "unusual", "flags")]
    for case, quality in worst_first(cases):
        about = ("" if quality.mean is None else f"{quality.mean:.4f}", f"{quality.unusual:.4f}")
        for label, one in quality.expected.items():
            dice = ("", "", "") if one is None else tuple(f"{value:.4f}" for value in (one.dice, one.low, one.high))
            rows.append((case, label, *dice, *about, "; ".join(quality.flags)))
    return to_csv(rows)


def worst_first(cases: Mapping[str, CaseQuality]) -> list[tuple[str, CaseQuality]]:
    """Sort cases by their expected mean, the lowest first; without one, flagged cases come first and others last."""

    def rank(item: tuple[str, CaseQuality]) -> float:
        quality = item[1]
        return quality.mean if quality.mean is not None else -1.0 if quality.flags else 2.0

    return sorted(cases.items(), key=rank)


# ------------------------------------------------------------------------------------------------------------- vectors


def case_vector(
    image: Mapping[str, Usual], labels: Mapping[str, Mapping[str, Usual]], features: CaseFeatures
) -> np.ndarray:
    """Return the deviations of an image, then the largest ones of its labels in volume, shape and position.

    Parameters
    ----------
    image : mapping
        Feature of the image -> its usual values. A feature that the image lacks is usual.
    labels : mapping
        Label -> feature -> its usual values.
    features : CaseFeatures
        Of the case.
    """
    shapes = [_shape_vector(labels[name], found) for name, found in features.labels.items() if found and labels[name]]
    worst = np.max(shapes, axis=0) if shapes else np.full(len(_SHAPE), _FARTHEST)
    found = features.image
    own = [usual.deviation(found[name]) if name in found else 0.0 for name, usual in image.items()]
    return np.concatenate([own, worst])


def suspicion_vector(case: np.ndarray, distance: float) -> np.ndarray:
    """Return what the logistic regression takes: deviations, their sizes, and the logarithm of the distance.

    Parameters
    ----------
    case : ndarray
        From `case_vector`.
    distance : float
        From `mahalanobis`.
    """
    return np.concatenate([case, np.abs(case), [3 * np.log(distance + 1e-6)]])


def label_vector(
    usual: Mapping[str, Usual], found: Values, case: np.ndarray, distance: float, suspicion: float
) -> np.ndarray:
    """Return what the forest takes of a label that is predicted; the first `N_MONOTONE` entries only lower the Dice.

    Parameters
    ----------
    usual : mapping
        Feature of the label -> its usual values.
    found : dict of str to float
        Features of the label.
    case : ndarray
        From `case_vector`.
    distance : float
        From `mahalanobis`.
    suspicion : float
        The score of the logistic regression.
    """
    names = [name for group in _SHAPE.values() for name in group]
    own = [usual[name].deviation(found[name]) if name in usual else _FARTHEST for name in names]
    doubts = [found["error"], distance, suspicion, *(found[name] for name in _DOUBTS)]
    return np.concatenate([doubts, _shape_vector(usual, found), case, own])


def _shape_vector(usual: Mapping[str, Usual], found: Values) -> np.ndarray:
    """Return the largest deviation in each group of features of a label."""

    def size(name: str) -> float:
        return abs(usual[name].deviation(found[name])) if name in usual else _FARTHEST

    return np.array([max(map(size, names)) for names in _SHAPE.values()])


def mahalanobis(case: np.ndarray, location: np.ndarray, precision: np.ndarray) -> float:
    """Return the distance of a vector from the mean of the clean held-out cases, for each of its entries.

    Parameters
    ----------
    case : ndarray, shape (n,)
        From `case_vector`.
    location : ndarray, shape (n,)
        The mean.
    precision : ndarray, shape (n, n)
        The inverse of the covariance.
    """
    offset = case - location
    return float(np.sqrt(max(0.0, offset @ precision @ offset) / len(offset)))


# ------------------------------------------------------------------------------------------------------------- judging


def judge(quality: Quality, features: CaseFeatures) -> CaseQuality:
    """Return the Dice to expect of each label of a prediction, and what is unusual about the case.

    Parameters
    ----------
    quality : Quality
        Of the model that predicted.
    features : CaseFeatures
        Of the prediction.
    """
    case = case_vector(quality.image, quality.labels, features)
    distance = mahalanobis(case, np.array(quality.location), np.array(quality.precision))
    score = float(np.dot(quality.coefficients, suspicion_vector(case, distance)) + quality.intercept)
    dice: dict[str, float | None] = {}
    for name, found in features.labels.items():
        dice[name] = 0.0 if quality.presence[name] >= USUAL_SHARE else None
        if found:
            vector = label_vector(quality.labels[name], found, case, distance, score)
            dice[name] = float(np.mean([tree.predict(vector) for tree in quality.forest]))
    # a label that the networks often miss is not among the lowest of these
    known = [
        value for name, value in dice.items() if value is not None and (features.labels[name] or quality.finds(name))
    ]
    mean = float(np.mean(known)) if known else quality.lowest
    suspicion = max(score - quality.threshold, (quality.lowest - mean) / _BENDING - 1)
    errors = quality.errors["unusual" if suspicion >= 0 else "usual"]
    surely = (0.0, 0.0)  # of a label that is there and was not found the Dice is 0 for sure
    expected = {
        name: None if value is None else _interval(value, errors if features.labels[name] else surely)
        for name, value in dice.items()
    }
    flags = [*_spacing_flags(quality, features), *_label_flags(quality, features)]
    flags += _unusual_flags(quality, features) if suspicion >= 0 else []
    predicted = [value for name, value in dice.items() if value is not None and features.labels[name]]
    if predicted and np.mean(predicted) < quality.lowest - _BENDING:
        flags.append("the networks are less sure than of any held-out case")
    if suspicion >= 0 and not flags:
        flags.append("image and labels are combined as in no held-out case")
    return CaseQuality(expected, round(float(1 / (1 + np.exp(-suspicion))), 6), tuple(flags))


def _interval(dice: float, errors: tuple[float, float]) -> Expected:
    ends = np.clip([dice + error * (1 + _BENDING - dice) for error in errors], 0, 1)
    return Expected(*(round(float(value), 4) for value in (dice, *ends)))


def scaled_error(dice: np.ndarray, expected: np.ndarray) -> np.ndarray:
    """Return the errors of expected Dice on the scale on which they are spread equally: the expected loss."""
    return (dice - expected) / (1 + _BENDING - expected)


def _spacing_flags(quality: Quality, features: CaseFeatures) -> list[str]:
    axes = defaultdict[tuple[str, str], list[str]](list)
    for name, axis, low, high in zip(AXES, features.axes, *quality.spacing, strict=True):
        if f"spacing/{name}" not in features.image:
            continue  # a picture has no z
        own = float(np.exp(features.image[f"spacing/{name}"]))
        if own > _LARGER * high or own * _LARGER < low:
            trained = f"{low:.3g}" if high < 1.01 * low else f"{low:.3g} to {high:.3g}"
            axes[f"{own:.3g}", trained].append(axis)
    return [f"spacing {own} mm along {few(of, 3)}, trained on {trained} mm" for (own, trained), of in axes.items()]


def _label_flags(quality: Quality, features: CaseFeatures) -> list[str]:
    if not any(features.labels.values()):
        return ["no foreground found"] if quality.empty <= 1 - USUAL_SHARE else []
    flags = []
    for name, found in features.labels.items():
        if not found:  # a label that the networks often miss would be a flag of many predictions
            is_missed = quality.presence[name] >= USUAL_SHARE and quality.finds(name)
            flags += [f"no {name} found"] if is_missed else []
        elif name in quality.volumes:
            low, high = (float(np.exp(found["volume"] - end)) for end in quality.volumes[name])
            if max(1 / low, high) > _LARGER:
                factor, how = (1 / low, "smaller") if low < 1 else (high, "larger")
                flags.append(f"{name} is {float(f'{factor:.2g}'):g} times {how} than in any training case")
    return flags


def _unusual_flags(quality: Quality, features: CaseFeatures) -> list[str]:
    """Return in words what deviates most, the largest deviation first; an axis is blurred or noisy, not both."""
    strength, axes = defaultdict[str, float](float), defaultdict[str, list[str]](list)
    values = {name: features.image.get(name, usual.middle) for name, usual in quality.image.items()}
    deviations = {name: usual.deviation(values[name]) for name, usual in quality.image.items()}
    for name in sorted(deviations, key=lambda name: -abs(deviations[name])):
        usual, value, deviation = quality.image[name], values[name], deviations[name]
        words = _IMAGE_WORDS.get((name.split("/")[-2], deviation > 0), "")
        if words and abs(deviation) >= _NOTABLE and not usual.low <= value <= usual.high:
            called = [axis for own, axis in zip(AXES, features.axes, strict=True) if own == name[-1]]
            if words in _SHARPNESS and called[0] in axes[_SHARPNESS[words]]:
                continue
            strength[words] = max(strength[words], abs(deviation))
            axes[words] = [axis for axis in AXES if axis in (*axes[words], *called)]
    for group, words in _LABEL_WORDS.items():
        for label, found in features.labels.items():
            usual_values = quality.labels[label]
            if found and usual_values:
                far = max(abs(usual_values[name].deviation(found[name])) for name in _SHAPE[group])
                if far > _NOTABLE:
                    strength[words] = max(strength[words], far)
                    axes[words].append(label)
    ranked = sorted(strength, key=lambda words: -strength[words])[:_MOST_REASONS]
    shown = {} if "spacing/z" in features.image else _OF_PICTURES
    channels = ", ".join(quality.channels)
    return [shown.get(words, words).format(where=few(axes[words], 3), channels=channels) for words in ranked]
