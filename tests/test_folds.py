"""Folds are nnU-Net's, and an edited splits.json is obeyed or refused with the reason."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from sklearn.model_selection import KFold

from nnunet_lite.errors import UserError
from nnunet_lite.training.folds import make_folds, read_fold
from nnunet_lite.workspace import read_json, write_json

IDS = [f"case_{i:03d}" for i in (7, 3, 11, 1, 2, 9, 30, 4, 5, 6, 8, 10)]


def test_folds_are_those_of_nnunet() -> None:
    ids = np.array(sorted(IDS))
    expected = KFold(n_splits=5, shuffle=True, random_state=12345).split(ids)
    for fold, (train, val) in zip(make_folds(IDS), expected, strict=True):
        assert fold == {"train": ids[train].tolist(), "val": ids[val].tolist()}
    assert sorted(case for fold in make_folds(IDS) for case in fold["val"]) == sorted(IDS)


def test_splits_are_written_once_and_obeyed(tmp_path: Path) -> None:
    splits = tmp_path / "splits.json"
    fold = read_fold(splits, IDS, "3")
    assert read_json(splits) == make_folds(IDS)
    assert (fold.name, list(fold.training), list(fold.validation)) == ("3", *make_folds(IDS)[3].values())
    write_json(splits, [{"train": ["case_001"], "val": ["case_002", "case_003"]}])
    edited = read_fold(splits, IDS, "0")
    assert (edited.training, edited.validation) == (("case_001",), ("case_002", "case_003"))
    with pytest.raises(UserError, match=r"no fold '1'.*Folds are 0 to 0"):
        read_fold(splits, IDS, "1")


def test_all_trains_on_every_case_and_needs_no_splits(tmp_path: Path) -> None:
    fold = read_fold(tmp_path / "splits.json", IDS[:3], "all")
    assert fold.training == tuple(sorted(IDS[:3]))
    assert not list(tmp_path.iterdir())


def test_an_empty_validation_is_allowed(tmp_path: Path) -> None:
    write_json(tmp_path / "splits.json", [{"train": IDS, "val": []}])
    assert read_fold(tmp_path / "splits.json", IDS, "0").validation == ()


@pytest.mark.parametrize("name", ["5", "-1", "a", "", "1.0", "01", "²"])
def test_an_unknown_fold_is_named(tmp_path: Path, name: str) -> None:
    with pytest.raises(UserError, match=f"no fold '{name}'.*Folds are 0 to 4"):
        read_fold(tmp_path / "splits.json", IDS, name)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([{"train": ["case_001", "nobody"], "val": ["case_002"]}], "unknown cases: nobody"),
        ([{"train": ["case_001", "case_002"], "val": ["case_002"]}], "case_002 on both sides"),
        ([{"train": [], "val": ["case_002"]}], "no training case"),
        ([{"training": ["case_001"]}], "must be a list of"),
        ([3], "must be a list of"),
        (3, "must be a list of"),
        ({"train": ["case_001"]}, "must be a list of"),
    ],
)
def test_a_wrong_splits_file_is_named(tmp_path: Path, content: Any, message: str) -> None:
    write_json(tmp_path / "splits.json", content)
    with pytest.raises(UserError, match=rf"splits\.json: .*{message}"):
        read_fold(tmp_path / "splits.json", IDS, "0")


def test_too_few_cases_for_five_folds(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="4 cases cannot be split into 5 folds"):
        read_fold(tmp_path / "splits.json", IDS[:4], "0")


def test_cases_in_no_fold_are_pointed_out(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    ids = [f"case_{i}" for i in range(6)]
    read_fold(tmp_path / "splits.json", ids[:5], "0")
    read_fold(tmp_path / "splits.json", ids, "0")
    assert "leaves out 1 cases (case_5)" in capsys.readouterr().err
