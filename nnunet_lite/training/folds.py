"""Which cases a fold trains on and which it holds out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from nnunet_lite import log
from nnunet_lite.errors import UserError
from nnunet_lite.workspace import read_json, write_json

SEED = 12345  # the one that nnU-Net has always used, so that folds can be compared
N_FOLDS = 5
ALL = "all"


@dataclass(frozen=True)
class Fold:
    name: str
    training: tuple[str, ...]
    validation: tuple[str, ...]


def make_folds(case_ids: Sequence[str], n_folds: int = N_FOLDS) -> list[dict[str, list[str]]]:
    """nnU-Net's folds: KFold(5, shuffle, seed 12345) over the sorted case ids.

    Raises
    ------
    UserError : fewer cases than folds.
    """
    from sklearn.model_selection import KFold

    ids = sorted(case_ids)
    if len(ids) < n_folds:
        raise UserError(
            f"{len(ids)} cases cannot be split into {n_folds} folds",
            fix="Train on every case: `nnlite train CONFIGURATION all`.",
        )
    parts = KFold(n_folds, shuffle=True, random_state=SEED).split(ids)
    return [{"train": [ids[i] for i in train], "val": [ids[i] for i in val]} for train, val in parts]


def read_splits(splits: Path, case_ids: Sequence[str]) -> list[tuple[tuple[str, ...], tuple[str, ...]]]:
    """(training, validation) of each fold of splits.json, which is made if it is not there.

    Raises
    ------
    UserError : it is malformed, or there are fewer cases than folds.
    """
    if not splits.is_file():
        write_json(splits, make_folds(case_ids))
    try:
        return [(tuple(entry["train"]), tuple(entry["val"])) for entry in read_json(splits)]
    except (KeyError, TypeError):
        raise UserError('must be a list of {"train": [ids], "val": [ids]}', splits) from None


def read_fold(splits: Path, case_ids: Sequence[str], fold: str) -> Fold:
    """The cases of fold "0", "1" ... or "all"; splits.json is made if it is not there and obeyed if it is.

    Raises
    ------
    UserError : no such fold, or splits.json names a case that the data set does not have.
    """
    ids = sorted(case_ids)
    if fold == ALL:
        return Fold(ALL, tuple(ids), tuple(ids))
    sides = read_splits(splits, ids)
    if fold not in map(str, range(len(sides))):
        raise UserError(f"there is no fold {fold!r}", fix=f'Folds are 0 to {len(sides) - 1}, "all-folds" and "all".')
    training, validation = sides[int(fold)]
    left_out = sorted(set(ids) - {*training, *validation})
    if left_out:
        names = f"{', '.join(left_out[:5])}{' ...' if len(left_out) > 5 else ''}"
        log.warn(f"{splits}: fold {fold} leaves out {len(left_out)} cases ({names}); delete the file to make it anew")
    unknown = sorted({*training, *validation} - set(ids))
    if unknown:
        raise UserError(
            f"fold {fold} names unknown cases: {', '.join(unknown[:5])}", splits, "Delete it to make it anew."
        )
    both = sorted(set(training) & set(validation))
    if both or not training:
        what = f"has {both[0]} on both sides" if both else "has no training case"
        raise UserError(f"fold {fold} {what}", splits)
    return Fold(fold, training, validation)
