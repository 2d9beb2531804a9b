"""Which cases a fold trains on and which it holds out.

splits.json        [{"train": [ids], "val": [ids]}, ...], as nnU-Net's splits_final.json; users may edit it
splits_made.json   the options, groups and strata that it was made with; ignored once splits.json is edited
fold_k/cases.json  in a model folder: how many cases the fold was trained on, and a hash of their ids

`FoldRule` holds the options of the command line. Training calls `read_split`; planning calls `needs_splits` and
`make_splits`. The files follow. grouping.py divides
the cases.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, NamedTuple

from pydantic import BaseModel, Field, TypeAdapter, ValidationError

from nnunet_lite import log
from nnunet_lite.data.dataset import Dataset
from nnunet_lite.data.problems import few, name_cases, plural
from nnunet_lite.errors import UserError
from nnunet_lite.files import read_json, write_json
from nnunet_lite.training.grouping import (
    N_FOLDS,
    SEED,
    divide,
    is_table,
    read_column,
    read_groups,
    require_enough,
    stratify_by_labels,
)

ALL = "all"  # the fold that trains on every case
_BY_LABELS = "labels"  # the recorded name of the strata of `--stratify`
_CASES = "cases.json"
_SPLITS_FINAL = "splits_final.json"  # nnU-Net's


@dataclass(frozen=True)
class FoldRule:
    """The options that divide the cases into folds; without any, the folds are nnU-Net's five.

    Parameters
    ----------
    folds : int, optional
        Number of folds.
    group_by : str or Path, optional
        Regular expression or table of groups, such as patients, see `read_groups`. A group is never on both sides.
    stratify : bool or str or Path
        True spreads labels and volumes evenly over the folds, see `stratify_by_labels`. A path names a table with the
        columns case and stratum.
    splits : str or Path, optional
        File to take the folds from: splits.json, splits_final.json, or a table with the columns case and fold.
    """

    folds: int | None = None
    group_by: str | Path | None = None
    stratify: bool | str | Path = False
    splits: str | Path | None = None


DEFAULT_RULE = FoldRule()


@dataclass(frozen=True)
class Split:
    """The cases of one fold.

    Parameters
    ----------
    name : str
        "0", "1", ... or "all".
    training, validation : tuple of str
        Ids of the cases that the fold trains on, and of those that it holds out.
    """

    name: str
    training: tuple[str, ...]
    validation: tuple[str, ...]


class _Sources(NamedTuple):
    """The files and expressions of a rule, read: folds, the group of each case, the stratum of each case."""

    splits: list[Split] | None = None
    groups: dict[str, str] | None = None
    strata: dict[str, str] | None = None


def check_rule(rule: FoldRule, dataset: Dataset) -> _Sources:
    """Report mistakes in the options before any image or label map is read.

    Raises
    ------
    UserError
        Fewer than two folds, a wrong table, expression or file, or `splits` together with another option.
    """
    ids = _ids(dataset)
    if rule.splits is not None:
        if rule != FoldRule(splits=rule.splits):
            raise UserError("--splits names the folds: --folds, --group-by and --stratify cannot change them")
        return _Sources(read_given_splits(Path(rule.splits), ids))
    if rule.folds is not None and rule.folds < 2:
        fix = "Take 2 or more, or train on every case: fold `all`."
        raise UserError(f"--folds {rule.folds} is not a number of folds", fix=fix)
    table = None if isinstance(rule.stratify, bool) else Path(rule.stratify)
    return _Sources(
        groups=None if rule.group_by is None else read_groups(ids, str(rule.group_by)),
        strata=None if table is None else read_column(table, ids, "stratum"),
    )


def read_split(file: Path, dataset: Dataset, fold: str, rule: FoldRule = DEFAULT_RULE) -> Split:
    """Return the cases of one fold; write splits.json if it does not exist.

    Parameters
    ----------
    file : Path
        splits.json of the workspace.
    dataset : Dataset
        Dataset whose cases are divided.
    fold : str
        "0", "1", ... or "all".
    rule : FoldRule
        Options of this call. An existing splits.json must agree with them.

    Returns
    -------
    Split
        Cases of the fold; "all" trains on every case and validates on the same.

    Raises
    ------
    UserError
        There is no such fold, splits.json names an unknown case, or `read_splits` fails.
    """
    ids = _ids(dataset)
    if fold == ALL:
        if rule != DEFAULT_RULE:
            fix = "Omit the options for folds, or train each fold: `all-folds`."
            raise UserError("fold `all` trains on every case, whatever the folds are", fix=fix)
        return Split(ALL, tuple(ids), tuple(ids))
    splits = read_splits(file, dataset, rule, fold)
    split = splits[int(fold)]
    if left_out := sorted(set(ids) - {*split.training, *split.validation}):
        log.warn(f"{file}: fold {fold} leaves out {name_cases(left_out)}; delete the file to make it again")
    return split


def read_splits(file: Path, dataset: Dataset, rule: FoldRule = DEFAULT_RULE, fold: str = "0") -> list[Split]:
    """Return all folds; write splits.json if it does not exist and `fold` is one of them.

    Raises
    ------
    UserError
        splits.json is malformed or differs from what the options ask for, there is no such fold, or `make_splits`
        fails.
    """
    exists = file.is_file()
    splits, record = (load_splits(file, _ids(dataset)), {}) if exists else make_splits(dataset, rule)
    if fold not in map(str, range(len(splits))):
        fix = f'Folds are 0 to {len(splits) - 1}, "all-folds" and "all".'
        raise UserError(f"there is no fold {fold!r}", fix=fix)
    if not exists:
        write_splits(file, splits, record)
    elif difference := _difference(file, splits, dataset, rule):
        fix = "Omit the options for folds to continue with these, or delete the file to make them again."
        raise UserError(difference, file, fix)
    return splits


def needs_splits(file: Path, dataset: Dataset, rule: FoldRule, trained: Sequence[str] = ()) -> bool:
    """Return whether planning has to write splits.json, since an option or a splits_final.json asks for new folds.

    Parameters
    ----------
    trained : sequence of str
        Names of the models that are trained on the existing folds.

    Raises
    ------
    UserError
        An option is wrong, asks for more folds than there are cases, or for other folds than models are trained on.
    """
    if rule == DEFAULT_RULE:
        return not file.is_file() and check_rule(_rule_of(dataset), dataset).splits is not None
    sources = check_rule(rule, dataset)
    difference = _difference(file, load_splits(file), dataset, rule) if file.is_file() else None
    if difference and trained:
        what = f"{difference}, and {', '.join(trained)} {'is' if len(trained) == 1 else 'are'} trained on them"
        fix = "Scores on different folds cannot be compared: use another --workspace, or delete the file."
        raise UserError(what, file, fix)
    if file.is_file() and not difference:
        return False
    if sources.splits is None:  # reported before the check of the dataset, which takes minutes
        require_enough(_ids(dataset), rule.folds or N_FOLDS, sources.groups)
    return True


def warn_of_unused_splits(file: Path, dataset: Dataset) -> None:
    """Warn where an existing splits.json has other folds than the splits_final.json of the dataset."""
    rule = _rule_of(dataset)
    if rule == DEFAULT_RULE or not file.is_file():
        return
    with suppress(UserError):  # a broken one is not used either
        if not _difference(file, load_splits(file), dataset, rule):
            return
    log.warn(
        f"{rule.splits} is not used: {file} exists, and its folds stay. `nnlite plan --splits {rule.splits}` replaces "
        "them where nothing is trained yet"
    )


def _rule_of(dataset: Dataset) -> FoldRule:
    """The rule where no option is given: the dataset's own splits_final.json, else nnU-Net's folds."""
    preprocessed = os.environ.get("nnUNet_preprocessed")  # noqa: SIM112 - the name that nnU-Net gave it
    folders = [dataset.root, *([Path(preprocessed) / dataset.name] if preprocessed else [])]
    file = next((folder / _SPLITS_FINAL for folder in folders if (folder / _SPLITS_FINAL).is_file()), None)
    return FoldRule(splits=file)


def make_splits(dataset: Dataset, rule: FoldRule = DEFAULT_RULE) -> tuple[list[Split], dict[str, Any]]:
    """Divide the cases into folds.

    Returns
    -------
    list of Split
        The folds.
    dict
        Record of how they were made, for splits_made.json.

    Raises
    ------
    UserError
        An option is wrong, see `check_rule`; `divide` fails; or a label map cannot be read.
    """
    rule = _rule_of(dataset) if rule == DEFAULT_RULE else rule
    ids, sources = _ids(dataset), check_rule(rule, dataset)
    if sources.splits is not None:
        if left_out := sorted(set(ids) - _cases_of(sources.splits)):
            log.warn(f"{rule.splits}: no fold has {name_cases(left_out)}; only the fold `all` trains on them")
        return sources.splits, {"splits": str(rule.splits)}
    n_folds = rule.folds or N_FOLDS
    strata = stratify_by_labels(dataset, n_folds) if rule.stratify is True else sources.strata
    record = {
        "folds": n_folds,
        "seed": SEED,
        "group_by": None if rule.group_by is None else str(rule.group_by),
        "stratify": _BY_LABELS if rule.stratify is True else str(rule.stratify) if rule.stratify else None,
        "groups": sources.groups,
        "strata": strata,
    }
    return hold_out(ids, divide(ids, n_folds, sources.groups, strata)), record


def hold_out(ids: Sequence[str], parts: Sequence[Collection[str]]) -> list[Split]:
    """Return a fold for each part of the cases, which it holds out."""
    return [
        Split(str(k), tuple(i for i in ids if i not in part), tuple(i for i in ids if i in part))
        for k, part in enumerate(map(set, parts))
    ]


# ------------------------------------------------------------------------------------------------ files


class _FoldEntry(BaseModel):
    train: list[str]
    val: list[str]


_ENTRIES = TypeAdapter(Annotated[list[_FoldEntry], Field(min_length=1)])


def load_splits(file: Path, ids: Collection[str] | None = None) -> list[Split]:
    """Read a splits.json or splits_final.json.

    Parameters
    ----------
    ids : collection of str, optional
        The cases of the dataset; None if they are not known.

    Raises
    ------
    UserError
        It has another form, or a fold names an unknown case, a case twice, or none to train on.
    """
    try:
        entries = _ENTRIES.validate_python(read_json(file), strict=True)
    except ValidationError:
        raise UserError('must be a list of {"train": [ids], "val": [ids]}', file) from None
    splits = [Split(str(k), tuple(entry.train), tuple(entry.val)) for k, entry in enumerate(entries)]
    _check_splits(splits, file, ids)
    return splits


def _check_splits(splits: Sequence[Split], file: Path, ids: Collection[str] | None) -> None:
    for split in splits:
        cases = Counter([*split.training, *split.validation])
        if both := sorted({*split.training} & {*split.validation}):
            raise UserError(f"fold {split.name} has {both[0]} on both sides", file)
        if twice := sorted(case_id for case_id, n in cases.items() if n > 1):
            raise UserError(f"fold {split.name} names {twice[0]} twice", file)
        if not split.training:
            raise UserError(f"fold {split.name} has no training case", file)
        if unknown := [] if ids is None else sorted(set(cases) - set(ids)):
            fix = "Delete it to make it again." if file.name == "splits.json" else ""
            raise UserError(f"fold {split.name} names unknown cases: {few(unknown, 5)}", file, fix)


def read_given_splits(file: Path, ids: Sequence[str]) -> list[Split]:
    """Read the folds of a user's file: splits.json, nnU-Net's splits_final.json, or a table of case and fold.

    Raises
    ------
    UserError
        It is none of these, or one of its folds cannot be trained.
    """
    if is_table(file):
        column = read_column(file, ids, "fold")
        numbers = sorted(set(column.values()))
        if set(numbers) != {str(k) for k in range(len(numbers))}:
            raise UserError(f"folds are {', '.join(numbers)}", file, "Number them 0, 1, 2 ...")
        splits = hold_out(ids, [[i for i in ids if column[i] == str(k)] for k in range(len(numbers))])
        _check_splits(splits, file, ids)
        return splits
    try:
        return load_splits(file, ids)
    except UserError as error:
        if file.name != _SPLITS_FINAL:  # nnU-Net's is read without an option
            raise
        fix = "Correct or remove it, or give --folds, --group-by, --stratify or --splits."
        raise UserError(error.what, error.file, f"{error.fix} {fix}".strip()) from None


def write_splits(file: Path, splits: Sequence[Split], record: Mapping[str, Any]) -> None:
    """Write splits.json and its record, and log what it holds."""
    write_json(_record_file(file), {**record, "sha256": _hash(_to_json(splits))})  # before splits.json, which needs it
    write_json(file, _to_json(splits))
    held_out = ", ".join(str(len(split.validation)) for split in splits)
    log.info(f"{file.name}: {summarize_splits(splits, record)}; held out: {held_out}")


def read_record(file: Path, splits: Sequence[Split]) -> dict[str, Any]:
    """Return how nnlite made the folds of splits.json; empty where a user wrote or edited them."""
    record = read_json(_record_file(file)) if _record_file(file).is_file() else {}
    return record if record.get("sha256") == _hash(_to_json(splits)) else {}


def summarize_splits(splits: Sequence[Split], record: Mapping[str, Any]) -> str:
    """5 folds of 32 cases in 8 groups by ..., stratified by ..."""
    text = f"{plural(len(splits), 'fold')} of {plural(len(_cases_of(splits)), 'case')}"
    text += "" if record else " (given or edited)"
    text += f" (from {record['splits']})" if "splits" in record else ""
    if record.get("groups"):
        text += f" in {plural(len(set(record['groups'].values())), 'group')} by {record['group_by']}"
    return text + (f", stratified by {record['stratify']}" if record.get("stratify") else "")


def _difference(file: Path, splits: Sequence[Split], dataset: Dataset, rule: FoldRule) -> str | None:
    """Return what splits.json holds and how it differs from what the options ask for; None where it agrees."""
    if rule == DEFAULT_RULE:
        return None
    n_cases, sources, record = len(dataset.cases), check_rule(rule, dataset), read_record(file, splits)
    if sources.splits is not None:
        same = [_fingerprint(split) for split in splits] == [_fingerprint(split) for split in sources.splits]
        checks = [(same, f"not those of {rule.splits}")]
    else:
        by_labels = rule.stratify is True  # the label maps are not read again
        stratified = record.get("stratify") == _BY_LABELS if by_labels else record.get("strata") == sources.strata
        checks = [
            (_cases_of(splits) == set(_ids(dataset)), f"not of the {n_cases} that the dataset has"),
            (rule.folds in (None, len(splits)), f"not {rule.folds}"),
            (rule.group_by is None or record.get("groups") == sources.groups, f"not in groups by {rule.group_by}"),
            (not rule.stratify or stratified, f"not stratified by {_BY_LABELS if by_labels else rule.stratify}"),
        ]
    return next((f"holds {summarize_splits(splits, record)}, {what}" for agrees, what in checks if not agrees), None)


def refuse_other_cases(folder: Path, split: Split, file: Path, restart: bool = False) -> None:
    """Make sure that the folds of a model were trained on the cases that splits.json lists now.

    Parameters
    ----------
    folder : Path
        Folder of the model.
    split : Split
        Fold that is to be trained or used.
    file : Path
        splits.json of the workspace.
    restart : bool
        Whether this fold starts again, so that only the others matter.

    Raises
    ------
    UserError
        The cases of a fold changed: to resume it, or to average it with others, would mix training and validation.
    """
    splits = [split] if split.name == ALL else load_splits(file)
    expected = {one.name: _fingerprint(one) for one in splits}
    for cases_file in sorted(folder.glob(f"fold_*/{_CASES}")):
        name = cases_file.parent.name.removeprefix("fold_")
        if (name == ALL) != (split.name == ALL) or (restart and name == split.name):
            continue
        if read_json(cases_file) != expected.get(name):
            source, command = ("the dataset", "--restart") if name == ALL else (file.name, "`all-folds --restart`")
            fix = f"Train under another --name, restore {source}, or train again with {command}."
            raise UserError(f"fold {name} was trained on other cases than {source} has now", folder, fix)


def record_cases(fold_folder: Path, split: Split) -> None:
    """Write which cases a fold is trained on, for `refuse_other_cases`."""
    write_json(fold_folder / _CASES, _fingerprint(split))


def _fingerprint(split: Split) -> dict[str, Any]:
    """Numbers of cases and a hash of their ids; a model that is passed on does not contain the ids."""
    sides = [sorted(split.training), sorted(split.validation)]
    return {"training": len(sides[0]), "validation": len(sides[1]), "sha256": _hash(sides)}


def _hash(value: Any) -> str:
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()[:16]


def _to_json(splits: Iterable[Split]) -> list[dict[str, list[str]]]:
    return [{"train": list(split.training), "val": list(split.validation)} for split in splits]


def _record_file(file: Path) -> Path:
    return file.with_name(f"{file.stem}_made.json")


def _ids(dataset: Dataset) -> list[str]:
    return sorted(case.id for case in dataset.cases)


def _cases_of(splits: Iterable[Split]) -> set[str]:
    return {case_id for split in splits for case_id in (*split.training, *split.validation)}
