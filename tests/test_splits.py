"""splits.json as it is edited, nnU-Net's splits_final.json, and tables of folds: read, or refused with the reason."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from nnunet_lite.errors import UserError
from nnunet_lite.files import read_json, write_json
from nnunet_lite.training.folds import make_folds, read_fold
from nnunet_lite.training.splits import given_splits, how_made, summary, write_splits

IDS = [f"case_{i:03d}" for i in range(1, 13)]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([{"train": ["case_001", "nobody"], "val": ["case_002"]}], "unknown cases: nobody"),
        ([{"train": ["case_001", "case_002"], "val": ["case_002"]}], "case_002 on both sides"),
        ([{"train": [], "val": ["case_002"]}], "no training case"),
        ([{"training": ["case_001"]}], "must be a list of"),
        ([{"train": ["case_001", "case_001"], "val": []}], "fold 0 names case_001 twice"),
        ([{"train": "case_001", "val": ["case_002"]}], "must be a list of"),
        ([{"train": ["case_001"], "val": [2]}], "must be a list of"),
        ([], "must be a list of"),
        ([3], "must be a list of"),
        (3, "must be a list of"),
        ({"train": ["case_001"]}, "must be a list of"),
    ],
)
def test_a_wrong_splits_file_is_named(tmp_path: Path, content: Any, message: str) -> None:
    write_json(tmp_path / "splits.json", content)
    for read in (lambda file: read_fold(file, IDS, "0"), lambda file: given_splits(file, IDS)):
        with pytest.raises(UserError, match=rf"splits\.json: .*{message}"):
            read(tmp_path / "splits.json")


def test_a_table_of_folds_holds_each_case_out_once(tmp_path: Path) -> None:
    table = tmp_path / "folds.csv"
    table.write_text("case,fold\n" + "".join(f"{case_id},{i % 3}\n" for i, case_id in enumerate(IDS)))
    folds = given_splits(table, IDS)
    assert [fold["val"] for fold in folds] == [IDS[i::3] for i in range(3)]
    assert all(sorted(fold["train"] + fold["val"]) == IDS for fold in folds)


@pytest.mark.parametrize(
    ("numbers", "message"),
    [
        ("123", r"folds are 1, 2, 3\. Number them 0, 1, 2"),
        ("ab", r"folds are a, b\."),
        ("0", r"fold 0 has no training case"),
    ],
)
def test_a_table_of_folds_that_are_none(tmp_path: Path, numbers: str, message: str) -> None:
    table = tmp_path / "folds.csv"
    table.write_text("".join(f"{case_id},{numbers[i % len(numbers)]}\n" for i, case_id in enumerate(IDS)))
    with pytest.raises(UserError, match=rf"folds\.csv: {message}"):
        given_splits(table, IDS)


def test_every_fold_of_a_given_file_is_checked(tmp_path: Path) -> None:
    folds = make_folds(IDS)
    folds[3]["val"].append(folds[3]["train"][0])
    write_json(tmp_path / "splits_final.json", folds)
    with pytest.raises(UserError, match=r"splits_final\.json: fold 3 has case_00\d on both sides\.$"):
        given_splits(tmp_path / "splits_final.json", IDS)


def test_the_record_holds_for_what_was_written_only(tmp_path: Path) -> None:
    splits, folds = tmp_path / "splits.json", make_folds(IDS)
    assert how_made(splits, folds) == {}
    write_splits(splits, folds, {"splits": "mine.csv", "sha256": "0"})
    assert how_made(splits, folds) == {} and summary(folds, {}) == "5 folds of 12 cases (given or edited)"
    assert read_json(splits) == folds
