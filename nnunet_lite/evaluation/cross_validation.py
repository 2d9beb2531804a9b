"""Validate trained folds on whole images: predict the held-out cases, and score them on their own grid."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path

import numpy as np

from nnunet_lite import log
from nnunet_lite.data.cases import Case
from nnunet_lite.data.dataset import Dataset, read_annotation
from nnunet_lite.data.geometry import Spacing
from nnunet_lite.data.images import read_geometry, read_label
from nnunet_lite.data.names import PICTURES, suffix_of
from nnunet_lite.errors import UserError
from nnunet_lite.evaluation.metrics import score_case
from nnunet_lite.evaluation.postprocessing import CasePair
from nnunet_lite.evaluation.scores import CaseScore, Scores, read_summary
from nnunet_lite.files import write_json, write_text
from nnunet_lite.inference.cases import output_file
from nnunet_lite.inference.folder import Outputs, predict_cases
from nnunet_lite.inference.predictor import Predictor, load
from nnunet_lite.inference.record import PredictionRecord, describe_predictor
from nnunet_lite.models.folder import SUMMARY, VALIDATION, now_as_text, versions_in_use
from nnunet_lite.preprocessing.stored_case import open_array
from nnunet_lite.system import pairs_at_once


def validate_fold(
    folder: Path,
    fold: str,
    dataset: Dataset,
    case_ids: Sequence[str],
    device: str | None,
    stage_maps: Mapping[str, Path] | None = None,
    step_size: float | None = None,
    *,
    trust_code: bool = False,
) -> Scores:
    """Predict the held-out cases of a fold from their raw images and score them.

    Writes fold_k/validation/: a label map per case, summary.json (as nnU-Net's), summary.csv and
    predictions.json, with the time of each case. Cases that were predicted before are not predicted again.

    Parameters
    ----------
    folder : Path
        The model folder.
    fold : str
        Name of the fold.
    dataset : Dataset
        The dataset it was trained on.
    case_ids : sequence of str
        The held-out cases.
    device : str or None
        Where to predict; None for a GPU if there is one.
    stage_maps : mapping or None
        For the second stage of a cascade: case id -> the file that the first stage predicted.
    step_size : float or None
        Distance of two windows, as a share of the patch; None for that of the settings. Another one is noted in
        summary.json.
    trust_code : bool
        Run the code that the model names; otherwise it runs only if `folder` is in a workspace and no link.

    Raises
    ------
    UserError
        A case cannot be predicted.
    """
    changes = None if step_size is None else {"inference.step_size": step_size}
    workspace = folder.absolute().parents[2]
    model = load(
        folder, [fold], device, changes, first_stage=stage_maps is None, trust_code=trust_code, workspace=workspace
    )
    stage_classes = None if stage_maps is None else lambda case_id: open_array(stage_maps[case_id])[:]
    notes = [] if step_size is None else [f"windows {step_size:.0%} of a patch apart, to keep to the time limit"]
    return validate_cases(model, folder / f"fold_{fold}" / VALIDATION, dataset, case_ids, stage_classes, notes)


def validate_cases(
    model: Predictor,
    out: Path,
    dataset: Dataset,
    case_ids: Sequence[str],
    stage_classes: Callable[[str], np.ndarray] | None = None,
    notes: Sequence[str] = (),
) -> Scores:
    """Predict cases of a dataset into a folder, unless their label maps exist, and score them; see `validate_fold`.

    Parameters
    ----------
    model : Predictor
        The networks.
    out : Path
        The folder.
    dataset : Dataset
        The dataset of the cases.
    case_ids : sequence of str
        The cases.
    stage_classes : callable or None
        For the second stage of a cascade: case id -> the classes (z, y, x) that the first stage predicted.
    notes : sequence of str
        What summary.json notes about how the cases are predicted.
    """
    cases = _cases(dataset, case_ids)
    run = {"date": now_as_text(), "versions": versions_in_use(), **describe_predictor(model)}
    with PredictionRecord(out) as record:
        _, failed = predict_cases(
            model, cases, out, Outputs(skip_existing=True), report=partial(record.add, run=run),
            stage_classes=stage_classes, accept_geometry=dataset.accept_geometry,
        )  # fmt: skip
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
    out : Path
        The folder.
    dataset : Dataset
        The dataset of the cases.
    case_ids : sequence of str
        The cases.
    workers : int or None
        Number of threads; None for all CPUs, 0 or 1 for one.
    notes : sequence of str
        What summary.json notes about how the cases were predicted.
    """
    cases = _cases(dataset, case_ids)

    def score(case: Case) -> CaseScore:
        prediction, reference, spacing = read_pair(case, out, dataset)
        has_spacing = read_geometry(case.images[0])[0].calibrated
        metrics = score_case(prediction, reference, dataset.labels, spacing if has_spacing else None)
        return CaseScore(case.id, str(output_file(case, out)), str(case.label), metrics, has_spacing)

    rows = log.map_in_threads(score, cases, pairs_at_once(len(cases), workers), "score")
    scores = Scores(tuple(rows), dataset.labels, notes=tuple(notes))
    write_json(out / SUMMARY, scores.to_json())
    write_text(out / "summary.csv", scores.to_csv())
    return scores


def missing_cases(out: Path, dataset: Dataset, case_ids: Sequence[str]) -> list[str]:
    """Return the cases whose label maps are not in a folder.

    Parameters
    ----------
    out : Path
        The folder.
    dataset : Dataset
        The dataset of the cases.
    case_ids : sequence of str
        The cases.
    """
    return [case.id for case in _cases(dataset, case_ids) if not output_file(case, out).is_file()]


def read_scores(out: Path, dataset: Dataset, case_ids: Sequence[str]) -> Scores | None:
    """Read the summary.json of a folder; None if there is none, or if it is not one of exactly these cases.

    Parameters
    ----------
    out : Path
        The folder.
    dataset : Dataset
        The dataset of the cases.
    case_ids : sequence of str
        The cases.
    """
    try:
        scores = read_summary(out / SUMMARY, dataset.labels)
    except UserError:
        return None  # it is written again
    return scores if {row.case for row in scores.rows} == set(case_ids) else None


def read_pair(case: Case, out: Path, dataset: Dataset) -> CasePair:
    """Read the label map of a case in a folder, and its reference.

    Parameters
    ----------
    case : Case
        A case with a reference.
    out : Path
        The folder.
    dataset : Dataset
        The dataset of the case.
    """
    segmentation, geometry, _ = read_label(output_file(case, out))
    return CasePair(segmentation, read_annotation(case, dataset, geometry)[0], geometry.spacing)


def read_reference(case: Case, dataset: Dataset) -> tuple[np.ndarray, Spacing]:
    """Read the reference of a case, and the spacing of its image.

    Parameters
    ----------
    case : Case
        A case with a reference.
    dataset : Dataset
        The dataset of the case.
    """
    array, geometry = read_annotation(case, dataset)
    if case.label and suffix_of(case.label) in PICTURES:  # its image may be of a format with a spacing
        geometry, _ = read_geometry(case.images[0])
    return array, geometry.spacing


def _cases(dataset: Dataset, case_ids: Sequence[str]) -> list[Case]:
    chosen = set(case_ids)
    return [case for case in dataset.cases if case.id in chosen]
