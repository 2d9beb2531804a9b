"""The files that say what the folds are.

splits.json        [{"train": [ids], "val": [ids]}, ...], as nnU-Net's splits_final.json; may be edited
splits_made.json   how it was made: options, groups, strata; void once splits.json is edited
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nnunet_lite import log
from nnunet_lite.data.problems import plural
from nnunet_lite.errors import UserError
from nnunet_lite.files import read_json, write_json
from nnunet_lite.training.grouping import is_table, read_column

Splits = list[dict[str, list[str]]]


@dataclass(frozen=True)
class Fold:
    name: str
    training: tuple[str, ...]
    validation: tuple[str, ...]


def load_splits(file: Path) -> Splits:
    """The content of a splits.json.

    Raises
    ------
    UserError : it is not of that form.
    """
    try:
        folds = [{side: entry[side] for side in ("train", "val")} for entry in read_json(file)]
    except (KeyError, TypeError):
        folds = []
    sides = [side for entry in folds for side in entry.values()]
    if not sides or not all(isinstance(side, list) and all(isinstance(i, str) for i in side) for side in sides):
        raise UserError('must be a list of {"train": [ids], "val": [ids]}', file)
    return folds


def given_splits(file: Path, ids: Sequence[str]) -> Splits:
    """The folds of a file of the user's: splits.json, nnU-Net's splits_final.json, or a table of case and fold.

    Raises
    ------
    UserError : it is none of these, or one of its folds cannot be trained.
    """
    if not is_table(file):
        folds = load_splits(file)
    else:
        column = read_column(file, ids, "fold")
        names = [str(i) for i in range(len(set(column.values())))]
        if set(names) != set(column.values()):
            raise UserError(f"folds are {', '.join(sorted(set(column.values())))}", file, "Number them 0, 1, 2 ...")
        folds = splits_of(ids, ([case_id for case_id in ids if column[case_id] == name] for name in names))
    checked_folds(folds, ids, file)
    return folds


def checked_folds(folds: Splits, ids: Sequence[str], file: Path) -> list[Fold]:
    """All folds, if they can be trained; see `checked_fold`."""
    return [checked_fold(entry, str(i), ids, file) for i, entry in enumerate(folds)]


def checked_fold(entry: Mapping[str, Sequence[str]], name: str, ids: Sequence[str], file: Path) -> Fold:
    """A fold, if it can be trained.

    Raises
    ------
    UserError : it names unknown cases, one of them twice, or none to train on; `file` is what the message names.
    """
    fold = Fold(name, tuple(entry["train"]), tuple(entry["val"]))
    listed = [*fold.training, *fold.validation]
    if unknown := sorted(set(listed) - set(ids)):
        what = f"fold {name} names unknown cases: {', '.join(unknown[:5])}"
        raise UserError(what, file, "Delete it to make it anew." if file.name == "splits.json" else "")
    twice = sorted(case_id for case_id, n in Counter(listed).items() if n > 1)
    if both := [case_id for case_id in twice if case_id in fold.training and case_id in fold.validation]:
        raise UserError(f"fold {name} has {both[0]} on both sides", file)
    if twice or not fold.training:
        raise UserError(f"fold {name} {f'names {twice[0]} twice' if twice else 'has no training case'}", file)
    return fold


def write_splits(splits: Path, folds: Splits, made: Mapping[str, Any]) -> None:
    """Write splits.json and its record, and say what it holds."""
    write_json(_record(splits), made)  # first: whoever finds splits.json finds this too
    write_json(splits, folds)
    held_out = ", ".join(str(len(fold["val"])) for fold in folds)
    log.info(f"{splits.name}: {summary(folds, made)}; held out: {held_out}")


def how_made(splits: Path, folds: Splits) -> dict[str, Any]:
    """The record of how folds were made; empty where nnlite did not make them so."""
    made = read_json(_record(splits)) if _record(splits).is_file() else {}
    return made if made.get("sha256") == digest(folds) else {}


def _record(splits: Path) -> Path:
    return splits.with_name(f"{splits.stem}_made.json")


def summary(folds: Splits, made: Mapping[str, Any]) -> str:
    """5 folds of 32 cases in 8 groups by ..., stratified by ..."""
    parts = [f"{plural(len(folds), 'fold')} of {plural(len(named_cases(folds)), 'case')}"]
    if not made:
        parts.append("(given or edited)")
    if "splits" in made:
        parts.append(f"(from {made['splits']})")
    if made.get("groups"):
        parts.append(f"in {plural(len(set(made['groups'].values())), 'group')} by {made['group_by']}")
    return " ".join(parts) + (f", stratified by {made['stratify']}" if made.get("stratify") else "")


def splits_of(ids: Sequence[str], held_out: Iterable[Collection[str]]) -> Splits:
    """Folds from the cases that each holds out."""
    return [
        {"train": [i for i in ids if i not in val], "val": [i for i in ids if i in val]} for val in map(set, held_out)
    ]


def named_cases(folds: Splits) -> set[str]:
    """Every case that occurs in a fold."""
    return {case_id for fold in folds for side in fold.values() for case_id in side}


def digest(value: Any) -> str:
    """A short hash of lists of case ids."""
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()[:16]
