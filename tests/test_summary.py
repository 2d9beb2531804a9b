"""Scores that are read back from summary.json are those that were written."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest

from nnunet_lite.data.labels import Labels
from nnunet_lite.errors import UserError
from nnunet_lite.evaluation.metrics import score_case
from nnunet_lite.evaluation.scores import CaseScore, Scores, read_summaries
from nnunet_lite.files import write_json

LABELS = Labels(names={"background": 0, "whole": (1, 2), "core": 2}, region_order=(1, 2))


@pytest.fixture
def scores() -> Scores:
    draws = np.random.default_rng(0)
    pairs = [*draws.integers(0, 3, (3, 2, 5, 6, 7)), np.zeros((2, 5, 6, 7), int)]  # the last: nothing there
    rows = [
        CaseScore(f"case_{i}", f"/before/case_{i}.nii.gz", f"/raw/case_{i}.nii.gz",
                  score_case(*pair, LABELS, (1.0, 1.0, 2.0), surface=False))
        for i, pair in enumerate(pairs)
    ]  # fmt: skip
    return Scores(tuple(rows), LABELS)


def test_what_is_read_is_what_was_written(scores: Scores, tmp_path: Path) -> None:
    write_json(tmp_path / "fold_0" / "summary.json", Scores(scores.rows[:2], LABELS).to_json())
    write_json(tmp_path / "fold_1" / "summary.json", Scores(scores.rows[2:], LABELS).to_json())
    shutil.move(tmp_path / "fold_0", tmp_path / "moved")
    files = [tmp_path / "moved" / "summary.json", tmp_path / "fold_1" / "summary.json"]
    found = read_summaries(files, LABELS)
    assert [(row.case, row.metrics) for row in found.rows] == [(row.case, row.metrics) for row in scores.rows]
    assert found.rows[0].prediction_file == tmp_path / "moved" / "case_0.nii.gz"
    assert found.foreground() == scores.foreground() and found.by_label("IoU") == scores.by_label("IoU")


def test_a_summary_for_other_labels_is_refused(scores: Scores, tmp_path: Path) -> None:
    write_json(tmp_path / "summary.json", scores.to_json())
    with pytest.raises(UserError, match=r"summary\.json: is not a summary for the labels whole, rim"):
        read_summaries([tmp_path / "summary.json"], Labels(names={"background": 0, "whole": (1, 2), "rim": 1},
                                                           region_order=(2, 1)))  # fmt: skip
    write_json(tmp_path / "summary.json", {"something": 1})
    with pytest.raises(UserError, match="is not a summary"):
        read_summaries([tmp_path / "summary.json"], LABELS)
