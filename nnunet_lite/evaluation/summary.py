"""The scores of a cross-validation, read back from the summary.json of its folds."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import fields
from pathlib import Path
from typing import Any

from nnunet_lite.data.labels import Labels
from nnunet_lite.errors import UserError
from nnunet_lite.evaluation.metrics import Measures
from nnunet_lite.evaluation.scores import KEYS, CaseScore, Scores, in_unit, label_keys
from nnunet_lite.files import read_json

_FIELDS = {key: field for key, field in KEYS.items() if field in {known.name for known in fields(Measures)}}


def read_summaries(files: Iterable[Path], labels: Labels) -> Scores:
    """The scores of all cases in some summary.json, which were written for the same labels.

    Predictions are looked for beside the summary, since a workspace may have been moved.

    Raises
    ------
    UserError : a file is no summary, or one for other labels.
    """
    names = {key: name for name, key in label_keys(labels).items()}
    rows, unit = [], "mm"
    for file in files:
        summary = read_json(file)
        try:
            unit = summary.get("length_unit", "mm")
            rows += [_row(entry, names, file.parent, unit) for entry in summary["metric_per_case"]]
        except (KeyError, TypeError, AttributeError) as error:
            what = f"is not a summary for the labels {', '.join(names.values())} ({type(error).__name__}: {error})"
            raise UserError(what, file, "Validate the fold again: delete its folder `validation` and train.") from None
    return Scores(tuple(rows), labels, unit=unit)


def _row(entry: dict[str, Any], names: dict[str, str], folder: Path, unit: str) -> CaseScore:
    measures = {
        name: Measures(**{field: entry["metrics"][key][in_unit(shown, unit)] for shown, field in _FIELDS.items()})
        for key, name in names.items()
    }
    prediction = folder / Path(entry["prediction_file"]).name if entry["prediction_file"] else None
    return CaseScore(entry["case"], prediction, entry["reference_file"], measures)
