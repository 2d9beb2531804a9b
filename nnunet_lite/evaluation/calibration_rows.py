"""Held-out cases and degraded copies of them, as the networks that have not seen them predict them.

`predict_rows` makes a row of features and Dice of each, and keeps them in the folder of the model or ensemble.
From the rows calibration.py learns how good predictions are; the report shows them.
"""

from __future__ import annotations

import json
import time
import zlib
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from pydantic import BaseModel, ConfigDict, ValidationError

from nnunet_lite import log
from nnunet_lite.data.cases import Case
from nnunet_lite.data.dataset import Dataset, read_case
from nnunet_lite.data.geometry import triple
from nnunet_lite.errors import UserError, describe
from nnunet_lite.evaluation.comparison import HeldOut, Team, load_team, team_name, weights_of
from nnunet_lite.evaluation.cross_validation import read_reference
from nnunet_lite.evaluation.degradation import DEGRADATIONS, Labelled
from nnunet_lite.evaluation.masks import count_overlap
from nnunet_lite.evaluation.statistics import mean_of_known
from nnunet_lite.files import append, hash_of, understood, write_text
from nnunet_lite.inference.cases import use_trained_unit
from nnunet_lite.inference.features import FEATURES, CaseFeatures, describe_prediction
from nnunet_lite.inference.predictor import Predictor, prepare_image, segment
from nnunet_lite.inference.quality import CaseQuality, Quality, judge
from nnunet_lite.planning.fingerprint import Fingerprint
from nnunet_lite.planning.schema import Plan
from nnunet_lite.system import pairs_at_once

_MOST_CASES = 200  # predicted again
_COPIES = 240  # degraded copies to predict at least, up to _MOST_COPIES of each case
_MOST_COPIES = 8
_MINUTES = 30  # after which no further round begins
_ROUND = 10  # fewest cases of a round
_COPIES_OF_ROUND = 3  # of each case; no divisor of the number of kinds


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
    quality : CaseQuality, optional
        What is said of it by a `Quality` that was fitted without its case.
    """

    model_config = ConfigDict(frozen=True)

    case: str
    kind: str
    features: CaseFeatures
    dice: dict[str, float | None]
    quality: CaseQuality | None = None

    @property
    def mean_dice(self) -> float | None:
        """The mean over the labels that are in the case or in its prediction; None if there are none."""
        return mean_of_known(self.dice.values())

    @property
    def judged_labels(self) -> list[str]:
        """The labels that are predicted and have a Dice."""
        return [name for name, found in self.features.labels.items() if found and self.dice[name] is not None]

    def judged_by(self, quality: Quality) -> Row:
        """Return the row with what a quality says of it.

        Parameters
        ----------
        quality : Quality
            Fitted without its case.
        """
        return self.model_copy(update={"quality": judge(quality, self.features)})


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
    empty : float
        Share of the cases that have no label.
    """

    volumes: dict[str, tuple[float, float]]
    presence: dict[str, float]
    spacing: tuple[tuple[float, float, float], tuple[float, float, float]]
    empty: float = 0.0


def read_rows(file: Path, key: str | None = None) -> list[Row]:
    """Read the rows of calibration.jsonl; none if there is no such file, or if it is of something else than `key`.

    A last line that was not written completely is left out.

    Parameters
    ----------
    file : Path
        The file.
    key : str or None
        What the rows must be of; None for anything.

    Raises
    ------
    UserError
        The file is not as nnlite writes it.
    """
    rows: list[Row] = []
    with understood(file, "Delete it, and run `nnlite select` again."):
        lines = file.read_text(encoding="utf-8").splitlines() if file.is_file() else []
        if not lines or key not in (None, json.loads(lines[0])["of"]):
            return []
        for number, line in enumerate(lines[1:], start=2):
            try:
                rows.append(Row.model_validate_json(line))
            except ValidationError:
                if number < len(lines):  # the last line may be of a killed run
                    raise ValueError(f"line {number} is no row of a calibration") from None
    return rows


def write_rows(held_out: HeldOut, team: Team, rows: Sequence[Row]) -> None:
    """Replace calibration.jsonl.

    Parameters
    ----------
    held_out : HeldOut
        The cases.
    team : tuple of Member
        The models that predicted them.
    rows : sequence of Row
        The predictions.
    """
    lines = [json.dumps({"of": _key(held_out, team)}), *(row.model_dump_json() for row in rows)]
    write_text(held_out.paths.calibration_of(team_name(team)), "\n".join(lines) + "\n")


def _key(held_out: HeldOut, team: Team) -> str:
    labels = team[0].plan.labels.region_names  # as the model calls them; the dataset may have renamed them since
    return hash_of([weights_of(team, held_out.folds), list(held_out.fold_of), labels, FEATURES])


def predict_rows(held_out: HeldOut, team: Team) -> list[Row]:
    """Predict held-out cases and degraded copies of them; those in calibration.jsonl are not predicted again.

    It ends after half an hour, but not before ten cases and two or three copies of each are predicted. A calibration
    that ended is not continued.

    Parameters
    ----------
    held_out : HeldOut
        The cases.
    team : tuple of Member
        The models.
    """
    file = held_out.paths.calibration_of(team_name(team))
    rows = read_rows(file, _key(held_out, team))
    if rows and all(row.quality for row in rows):
        log.info("the quality was calibrated before")
        return rows
    write_rows(held_out, team, rows)
    made = {(row.case, row.kind): row for row in rows}
    cases = {case.id: case for case in held_out.dataset.cases}
    rounds = [[pair for pair in pairs if pair not in made] for pairs in _plan_rounds(list(held_out.fold_of))]
    n_missing, began = sum(map(len, rounds)), time.monotonic()
    what = f"calibrating the quality of predictions: {n_missing} held-out images and degraded copies to predict"
    log.info(f"{what}, fewer if this takes more than {_MINUTES} minutes; `nnlite select --no-quality` does without")
    loaded: dict[str, Predictor] = {}
    with log.working("calibrate", n_missing) as advance:
        for pairs in rounds:
            if pairs is not rounds[0] and time.monotonic() - began > 60 * _MINUTES:
                log.info(f"{_MINUTES} minutes are over: the quality is calibrated on {len(made)} images")
                break
            for name, kind in pairs:
                fold = held_out.fold_of[name].name
                if fold not in loaded:
                    loaded[fold] = load_team(held_out, team, fold)
                if row := _predict_row(loaded[fold], cases[name], kind, held_out.dataset):
                    append(file, row.model_dump_json())
                    made[name, kind] = row
                advance(1)
    return sorted(made.values(), key=lambda row: row.case)


def _plan_rounds(cases: Sequence[str]) -> Iterator[list[tuple[str, str]]]:
    """Yield case and kind of the images to predict, in rounds in which all kinds are equally frequent."""
    kinds = list(DEGRADATIONS)
    cases = cases[:: -(-len(cases) // _MOST_CASES)]
    n_parts, copies = max(1, len(cases) // _ROUND), min(_MOST_COPIES, -(-_COPIES // len(cases)))
    for first in range(0, copies, _COPIES_OF_ROUND):
        numbers = range(first, min(first + _COPIES_OF_ROUND, copies))
        for part in (cases[start::n_parts] for start in range(n_parts)):
            clean = [(case, "clean") for case in part] if first == 0 else []
            shifts = range(0, _COPIES_OF_ROUND * len(part), _COPIES_OF_ROUND)
            yield clean + [
                (case, kinds[(shift + number) % len(kinds)])
                for case, shift in zip(part, shifts, strict=True)
                for number in numbers
            ]


def _predict_row(predictor: Predictor, case: Case, kind: str, dataset: Dataset) -> Row | None:
    """Predict a case or a degraded copy; None if the copy cannot be predicted."""
    pair = read_labelled(predictor, case, dataset)
    if kind == "clean":
        return predict_pair(predictor, pair, case.id, kind)
    random = np.random.default_rng(zlib.crc32(f"{case.id} {kind}".encode()))  # the same in every run
    try:
        return predict_pair(predictor, DEGRADATIONS[kind](pair, random.random(), random), case.id, kind)
    except UserError as error:  # such as a cut image that is too small to normalise
        log.detail(f"{case.id}, {kind}: {describe(error)}")
        return None


def read_labelled(predictor: Predictor, case: Case, dataset: Dataset) -> Labelled:
    """Read a case of a dataset for a model: its image, in the unit of the training, and its reference.

    Parameters
    ----------
    predictor : Predictor
        The model.
    case : Case
        A case with a reference.
    dataset : Dataset
        The dataset of the case.
    """
    image, reference = read_case(case, dataset)
    return Labelled(use_trained_unit(predictor.plan, image, case.images[0], of_training=True), reference)


def predict_pair(predictor: Predictor, pair: Labelled, case: str, kind: str) -> Row:
    """Predict an image, and compare it with its reference.

    Parameters
    ----------
    predictor : Predictor
        The networks.
    pair : Labelled
        The image and its reference.
    case, kind : str
        What the row is of.
    """
    labels = predictor.plan.labels
    prepared = prepare_image(predictor, pair.image)
    label_map, maps = segment(predictor, prepared, maps=predictor.add_quality_maps())
    features = describe_prediction(prepared.arrays[0], label_map, maps, labels)
    overlap = count_overlap(label_map, pair.reference, labels).tolist()
    dice = {
        name: 2 * tp / (2 * tp + fp + fn) if tp + fp + fn else None
        for name, (tp, fp, fn) in zip(labels.region_names, overlap, strict=True)
    }
    return Row(case=case, kind=kind, features=features, dice=dice)


def training_ranges(held_out: HeldOut, plan: Plan) -> TrainingRanges:
    """Read how large each label is in the references of all cases, and the spacings in the fingerprint.

    Where voxels are ignored, neither the size of a label is known, nor that it is absent.

    Parameters
    ----------
    held_out : HeldOut
        The dataset.
    plan : Plan
        The plan of the model, which orders the axes.
    """
    found, present, known = defaultdict[str, list[float]](list), Counter[str](), Counter[str]()

    def measure(case: Case) -> tuple[bool, dict[str, float]]:
        reference, spacing = read_reference(case, held_out.dataset)
        partly = plan.labels.ignore is not None and bool((reference == plan.labels.ignore).any())
        return partly, {name: float(n * np.prod(spacing)) for name, n in plan.labels.count_voxels(reference).items()}

    cases = held_out.dataset.cases
    threads, n_empty = pairs_at_once(len(cases), held_out.workers), 0
    for partly, volumes in log.map_in_threads(measure, cases, threads, "references"):
        n_empty += not partly and not any(volumes.values())
        for name, volume in volumes.items():
            present[name] += volume > 0
            known[name] += volume > 0 or not partly
            found[name] += [float(np.log(volume))] if volume and not partly else []
    spacings = np.array(Fingerprint.read(held_out.paths.fingerprint).spacings)[:, list(plan.axis_order)]
    return TrainingRanges(
        {name: (min(logs), max(logs)) for name, logs in found.items() if logs},
        {name: present[name] / max(1, known[name]) for name in plan.labels.regions},
        (triple(spacings.min(axis=0).tolist()), triple(spacings.max(axis=0).tolist())),
        n_empty / len(cases),
    )
