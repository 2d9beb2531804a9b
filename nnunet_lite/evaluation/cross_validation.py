"""Whole-image validation of trained folds: predict the held-out cases, score them on their own grid."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from nnunet_lite import log
from nnunet_lite.data.cases import Case
from nnunet_lite.data.dataset import Dataset, map_labels
from nnunet_lite.data.images import read_geometry, read_label
from nnunet_lite.data.names import PICTURES, suffix_of
from nnunet_lite.errors import UserError
from nnunet_lite.evaluation.metrics import score_case
from nnunet_lite.evaluation.postprocessing import Pair, Reference
from nnunet_lite.evaluation.scores import CaseScore, Scores
from nnunet_lite.evaluation.summary import read_summaries
from nnunet_lite.files import read_json, understood, write_json, write_text
from nnunet_lite.inference.first_stage import read_stage_map
from nnunet_lite.inference.folder import output_file, predict_cases
from nnunet_lite.inference.predictor import load
from nnunet_lite.models.folder import VALIDATION
from nnunet_lite.system import pairs_at_once

if TYPE_CHECKING:
    from nnunet_lite.inference.predictor import Model

SUMMARY = "summary.json"


def validate_fold(
    folder: Path,
    fold: str,
    dataset: Dataset,
    case_ids: Sequence[str],
    device: str | None,
    previous: Mapping[str, Path] | None = None,
    step_size: float | None = None,
    *,
    trust_code: bool = False,
) -> Scores:
    """Predict the held-out cases of a fold from their raw images and score them.

    Writes fold_k/validation/: a label map per case, summary.json (as nnU-Net's) and summary.csv. Cases that were
    predicted before are not predicted again.

    Parameters
    ----------
    previous : for the second stage of a cascade, what the first one predicts of each case: that of the same fold, which
        held the case out too.
    step_size : float or None
        Distance of two windows, as a share of the patch; None for that of the settings. Another one is noted in
        summary.json.
    trust_code : run the code that the model names; without it only where `folder` is in a workspace and no link.

    Raises
    ------
    UserError : a case cannot be predicted.
    """
    changes = None if step_size is None else {"inference.step_size": step_size}
    workspace = folder.absolute().parents[2]
    alone = previous is not None
    model = load(folder, [fold], device, changes, alone=alone, trust_code=trust_code, workspace=workspace)
    before = None if previous is None else lambda case_id: read_stage_map(previous[case_id])[:]
    notes = [] if step_size is None else [f"windows {step_size:g} of the patch apart, to keep to the time limit"]
    return validate(model, folder / f"fold_{fold}" / VALIDATION, dataset, case_ids, before, notes)


def validate(
    model: Model,
    out: Path,
    dataset: Dataset,
    case_ids: Sequence[str],
    previous: Callable[[str], np.ndarray] | None = None,
    notes: Sequence[str] = (),
) -> Scores:
    """Predict cases of a data set into a folder, those that are not there yet, and score them; as `validate_fold`."""
    cases = _chosen(dataset, case_ids)
    _, failed = predict_cases(model, cases, out, skip_existing=True, show=log.progress, previous=previous,
                              accept_geometry=dataset.accept_geometry)  # fmt: skip
    if failed:
        case_id, why = next(iter(failed.items()))
        raise UserError(
            f"{len(failed)} of {len(cases)} cases could not be predicted; {case_id}: {why.rstrip('.')}", out
        )
    return score_predictions(out, dataset, case_ids, notes=notes)


def score_predictions(
    out: Path, dataset: Dataset, case_ids: Sequence[str], workers: int | None = None, notes: Sequence[str] = ()
) -> Scores:
    """Score the label maps of cases in a folder, and write summary.json and summary.csv there.

    Parameters
    ----------
    workers : threads; None for all CPUs, 0 or 1 for one.
    notes : Sequence[str]
        What summary.json notes about how the cases were predicted.
    """
    cases = _chosen(dataset, case_ids)
    with ThreadPoolExecutor(pairs_at_once(len(cases), workers)) as pool:
        found = pool.map(partial(_score, out=out, dataset=dataset), cases)
        scored = list(log.progress(found, len(cases), "score"))
    unit = "px" if scored and not any(scaled for _, scaled in scored) else "mm"
    scores = Scores(tuple(row for row, _ in scored), dataset.labels, notes=tuple(notes), unit=unit)
    write_json(out / SUMMARY, scores.to_json())
    write_text(out / "summary.csv", scores.to_csv())
    return scores


def predicted_cases(out: Path, dataset: Dataset, case_ids: Sequence[str]) -> set[str]:
    """Those of the cases whose label maps are in a folder."""
    return {case.id for case in _chosen(dataset, case_ids) if output_file(case, out).is_file()}


def summed_up(out: Path, dataset: Dataset, case_ids: Sequence[str]) -> dict[str, list[float | None]] | None:
    """Dice of each case by label from the summary.json of a folder; None where it is not one of just these cases."""
    if not (out / SUMMARY).is_file():
        return None
    try:
        scores = read_summaries([out / SUMMARY], dataset.labels)
    except UserError:
        return None  # it is made anew
    if {row.case for row in scores.rows} != set(case_ids):
        return None
    return {row.case: line.tolist() for row, line in zip(scores.rows, scores.values(), strict=True)}


def read_pair(case: Case, out: Path, dataset: Dataset) -> Pair:
    """The label map of a case in a folder, and its reference."""
    assert case.label is not None  # every case of a planned data set has one
    segmentation, geometry, _ = read_label(output_file(case, out))
    reference, _, _ = read_label(case.label, geometry)
    return Pair(segmentation, map_labels(reference, dataset.label_map), geometry.spacing)


def read_reference(case: Case, dataset: Dataset) -> Reference:
    """The reference of a case, with the spacing of its image."""
    assert case.label is not None  # every case of a planned dataset has one
    array, geometry, _ = read_label(case.label)
    if suffix_of(case.label) in PICTURES:  # its image may be of a format with a spacing
        geometry, _ = read_geometry(case.images[0])
    return Reference(map_labels(array, dataset.label_map), geometry.spacing)


def mean_dice(folder: Path, fold: str) -> float | None:
    """Foreground Dice of the held-out cases of a fold; None where it was not validated."""
    file = folder / f"fold_{fold}" / VALIDATION / SUMMARY
    if not file.is_file():
        return None
    with understood(file, "Delete it: `nnlite train` makes it again."):
        return read_json(file)["foreground_mean"]["Dice"]


def _chosen(dataset: Dataset, case_ids: Sequence[str]) -> list[Case]:
    chosen = set(case_ids)
    return [case for case in dataset.cases if case.id in chosen]


def _score(case: Case, out: Path, dataset: Dataset) -> tuple[CaseScore, bool]:
    """The scores of a case, and whether its spacing is known."""
    prediction, reference, spacing = read_pair(case, out, dataset)
    scaled = read_geometry(case.images[0])[0].calibrated
    measures = score_case(prediction, reference, dataset.labels, spacing, surface=False, scaled=scaled)
    return CaseScore(case.id, str(output_file(case, out)), str(case.label), measures), scaled
