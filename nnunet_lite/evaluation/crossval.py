"""Whole-image validation of a trained fold: predict the held-out cases, score them on their own grid."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from nnunet_lite import log
from nnunet_lite.data.dataset import Case, Dataset, map_labels
from nnunet_lite.data.images import read_label
from nnunet_lite.errors import UserError
from nnunet_lite.evaluation.metrics import score_case
from nnunet_lite.evaluation.scores import CaseScore, Scores
from nnunet_lite.inference.folder import output_file, predict_cases
from nnunet_lite.inference.predictor import load
from nnunet_lite.training.previous import read_map
from nnunet_lite.workspace import read_json, understood, write_json, write_text

SUMMARY = "summary.json"


def validate_fold(
    folder: Path,
    fold: str,
    dataset: Dataset,
    case_ids: Sequence[str],
    device: str | None,
    previous: Mapping[str, Path] | None = None,
) -> Scores:
    """Predict the held-out cases of a fold from their raw images and score them.

    Writes fold_k/validation/: a label map per case, summary.json (as nnU-Net's) and summary.csv. Cases that were
    predicted before are not predicted again.

    Parameters
    ----------
    previous : for the second stage of a cascade, what the first one predicts of each case: that of the same fold, which
        held the case out too.

    Raises
    ------
    UserError : a case cannot be predicted.
    """
    out = folder / f"fold_{fold}" / "validation"
    chosen = set(case_ids)
    cases = [case for case in dataset.cases if case.id in chosen]
    model = load(folder, [fold], device, alone=previous is not None)
    before = None if previous is None else lambda case_id: read_map(previous[case_id])[:]
    _, failed = predict_cases(model, cases, out, skip_existing=True, show=log.progress, previous=before)
    if failed:
        case_id, why = next(iter(failed.items()))
        raise UserError(
            f"{len(failed)} of {len(cases)} cases could not be predicted; {case_id}: {why.rstrip('.')}", out
        )
    scores = Scores.of([_score(case, output_file(case, out), dataset) for case in cases], dataset.labels)
    write_json(out / SUMMARY, scores.to_json())
    write_text(out / "summary.csv", scores.to_csv())
    return scores


def mean_dice(folder: Path, fold: str) -> float | None:
    """Foreground Dice of the held-out cases of a fold; None where it was not validated."""
    file = folder / f"fold_{fold}" / "validation" / SUMMARY
    if not file.is_file():
        return None
    with understood(file, "Delete it: `nnlite train` makes it again."):
        return read_json(file)["foreground_mean"]["Dice"]


def _score(case: Case, prediction: Path, dataset: Dataset) -> CaseScore:
    assert case.label is not None  # every case of a planned data set has one
    segmentation, geometry, _ = read_label(prediction)
    reference = map_labels(read_label(case.label)[0], dataset.label_map)
    measures = score_case(segmentation, reference, dataset.labels, geometry.spacing, surface=False)
    return CaseScore(case.id, str(prediction), str(case.label), measures)
