"""The held-out cases of a fold are predicted once and scored on their own grid."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from nnunet_lite.data.dataset import Dataset, dataset_from_json
from nnunet_lite.data.images import read_label
from nnunet_lite.errors import UserError
from nnunet_lite.evaluation.cross_validation import validate_fold
from nnunet_lite.files import read_json
from nnunet_lite.training.splits import read_split
from nnunet_lite.workspace import planned_paths


@pytest.fixture(scope="module")
def dataset(tiny_workspace: Path) -> Dataset:
    return dataset_from_json(read_json(planned_paths(tiny_workspace).dataset))


@pytest.fixture
def held_out(tiny_workspace: Path, dataset: Dataset) -> tuple[str, ...]:
    return read_split(planned_paths(tiny_workspace).splits, dataset, "0").validation


def test_held_out_cases_are_predicted_once_and_scored(
    model_copy: Path, dataset: Dataset, held_out: tuple[str, ...]
) -> None:
    out = model_copy / "fold_0" / "validation"
    assert {p.name for p in out.glob("*.nii.gz")} == {f"{case_id}.nii.gz" for case_id in held_out}
    first, second = (out / f"{case_id}.nii.gz" for case_id in held_out)
    before, content = first.stat().st_mtime_ns, read_label(second)[0]
    second.unlink()
    scores = validate_fold(model_copy, "0", dataset, held_out, "cpu")
    assert first.stat().st_mtime_ns == before
    np.testing.assert_array_equal(read_label(second)[0], content)
    assert [row.case for row in scores.rows] == sorted(held_out)
    for row in scores.rows:
        found, truth = read_label(Path(row.prediction_file))[0], read_label(Path(row.reference_file))[0]
        for value, name in enumerate(("Anterior", "Posterior"), 1):
            hits = int(((found == value) & (truth == value)).sum())
            size = int((found == value).sum() + (truth == value).sum())
            assert row.metrics[name]["TP"] == hits
            assert row.metrics[name]["Dice"] == pytest.approx(2 * hits / size)
            assert row.metrics[name]["NSD"] is not None
            assert (row.metrics[name]["HD95"] is None) == (not (found == value).any())
    assert [entry["case"] for entry in read_json(out / "summary.json")["metric_per_case"]] == sorted(held_out)
    assert all(case_id in (out / "summary.csv").read_text() for case_id in held_out)


def test_a_case_that_cannot_be_predicted_is_named(
    model_copy: Path, dataset: Dataset, held_out: tuple[str, ...], tmp_path: Path
) -> None:
    bad = tmp_path / "bad.nii.gz"
    bad.write_bytes(b"no image")
    shutil.rmtree(model_copy / "fold_0" / "validation")
    cases = tuple(replace(case, images=(bad,)) if case.id == held_out[0] else case for case in dataset.cases)
    broken = replace(dataset, cases=cases)
    with pytest.raises(UserError, match=rf"1 of 2 cases could not be predicted; {held_out[0]}: .*bad\.nii\.gz"):
        validate_fold(model_copy, "0", broken, held_out, "cpu")
