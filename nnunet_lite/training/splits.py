"""Which cases a fold trains on and which it holds out.

splits.json        [{"train": [ids], "val": [ids]}, ...], as nnU-Net's splits_final.json; users may edit it, and
                   `leave_out` removes the cases of `--exclude` when it is read
splits_made.json   the options, groups and strata that it was made with; ignored once splits.json is edited
fold_k/cases.json  in a model folder: how many cases the fold was trained on, hashes of their ids and files, and of the
                   images that its initial weights and its teachers have seen

`FoldRule` holds the options of the command line. Training calls `read_split`; planning calls `check_folds` and
`make_splits`. An existing splits.json is never replaced: options that differ from it are refused. `divide` makes the
folds, `read_groups` serves `--group-by`, `stratify_by_labels` serves `--stratify`, and the files are at the end.
"""

from __future__ import annotations

import os
import re
import warnings
from collections import Counter, defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import numpy as np
from pydantic import BaseModel, Field, TypeAdapter, ValidationError

from nnunet_lite import log
from nnunet_lite.data.cases import Case
from nnunet_lite.data.dataset import Dataset, read_annotation
from nnunet_lite.data.problems import few, name_cases, plural
from nnunet_lite.data.raw_files import RawCase
from nnunet_lite.errors import UserError
from nnunet_lite.files import hash_of, read_json, read_table, understood, write_json
from nnunet_lite.models.folder import (
    CASES,
    CHECKPOINT,
    HELD_OUT,
    LEARNED,
    SEEN,
    held_out_fingerprint,
    read_cases,
    why_not_held_out,
)
from nnunet_lite.system import cpus

ALL = "all"  # the fold that trains on every case
N_FOLDS = 5
SEED = 12345  # nnU-Net's, so that folds can be compared
_FILES = "files"  # in cases.json: hashes of the files of the training cases
_IMAGES = "images"  # hashes of their first images, which stay when a label map is corrected
_COMPARED = {"training", "sha256", "validation", "held_out_sha256"}
_READERS = 4  # label maps in memory at the same time
_VOLUME_PARTS = 4  # strata by volume, at most
_BY_LABELS = "labels"  # the recorded name of the strata of `--stratify`
_TABLES = (".csv", ".tsv")
_PATIENT = re.compile(r"(?i)(?:^|[^a-z])(?:p|pt|pat|patient|sub|subj|subject)[-_]?\d+$")
_FIX = "Correct or remove it: without it folds are made again, as --folds, --group-by, --stratify or --splits say."


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


class SplitsRecord(BaseModel):
    """How the folds were made, the content of splits_made.json: a file, or the options with what they said."""

    splits: str | None = None
    folds: int | None = None
    seed: int | None = None
    group_by: str | None = None
    stratify: str | None = None
    groups: dict[str, str] | None = None
    strata: dict[str, str] | None = None
    sha256: str = ""  # of splits.json


# ------------------------------------------------------------------------------------------------ folds of a dataset


def check_folds(file: Path, dataset: Dataset, rule: FoldRule) -> bool:
    """Report wrong options before any image or label map is read.

    Logs a warning where an existing splits.json names cases that the dataset does not have or has other folds than the
    splits_final.json of the dataset, or where new folds may have a patient on both sides.

    Parameters
    ----------
    file : Path
        splits.json of the workspace.
    dataset : Dataset
        Dataset whose cases are divided.
    rule : FoldRule
        Options of this call.

    Returns
    -------
    bool
        Whether an option or a splits_final.json names folds and splits.json does not exist yet.

    Raises
    ------
    UserError
        `make_splits`, `read_record` or `leave_out` fails, or the options make other folds than those of an existing
        splits.json.
    """
    asked = _rule_or_default(rule, dataset)
    if not file.is_file():
        if asked.group_by is None and asked.splits is None:
            _warn_of_patients(_ids(dataset.cases))
        if asked != DEFAULT_RULE:
            leave_out(make_splits(dataset, asked, strata={})[0], dataset)  # label maps are read later
        return asked != DEFAULT_RULE
    splits, record = load_splits(file), read_record(file)
    leave_out(splits, dataset)
    gone = sorted(_cases_of(splits).difference(_ids([*dataset.cases, *dataset.excluded])))
    if gone and rule == DEFAULT_RULE:
        log.warn_once(f"{file} names {name_cases(gone)}, which the dataset does not have: correct it, or delete it")
    try:
        if asked != DEFAULT_RULE:
            _refuse_other_folds(file, splits, record, dataset, asked)
    except UserError:
        if rule != DEFAULT_RULE:
            raise
        # once, although `run` calls this for each fold
        log.warn_once(f"{asked.splits} is not used: {file} exists. Delete it to use the other folds")
    return False


def _refuse_other_folds(
    file: Path, splits: Sequence[Split], record: SplitsRecord | None, dataset: Dataset, rule: FoldRule
) -> None:
    """Refuse options that make other folds than those of an existing splits.json."""
    divided = _cases_of(splits)
    excluded = [case for case in dataset.excluded if case.id in divided]  # since the folds were made
    before = tuple(case for case in dataset.excluded if case.id not in divided)
    whole = replace(dataset, cases=(*dataset.cases, *excluded), excluded=before)
    made, _ = make_splits(whole, rule, record.strata if record and record.stratify == _BY_LABELS else None)
    if [*map(_fingerprint, splits)] != [*map(_fingerprint, leave_out(made, whole))]:
        made_of = plural(len(whole.cases), "case")
        what = f"holds {_summarize(splits, record)}, not those that the options make of {made_of}"
        raise UserError(what, file, "Omit the options for folds to continue with these, or delete the file.")


def _rule_or_default(rule: FoldRule, dataset: Dataset) -> FoldRule:
    """Return the rule; where no option is given, the dataset's own splits_final.json, else nnU-Net's folds."""
    if rule != DEFAULT_RULE:
        return rule
    preprocessed = os.environ.get("nnUNet_preprocessed")  # noqa: SIM112 - the name that nnU-Net gave it
    folders = [dataset.root, *([Path(preprocessed) / dataset.name] if preprocessed else [])]
    return FoldRule(splits=next((f for d in folders if (f := d / "splits_final.json").is_file()), None))


def read_split(file: Path, dataset: Dataset, fold: str, rule: FoldRule = DEFAULT_RULE) -> Split:
    """Return the cases of one fold; write splits.json if it does not exist.

    Parameters
    ----------
    file, dataset, rule : Path, Dataset, FoldRule
        See `check_folds`.
    fold : str
        "0", "1", ... or "all".

    Returns
    -------
    Split
        Cases of the fold; "all" trains on every case and validates on the same.

    Raises
    ------
    UserError
        `read_splits` fails, or options for folds are given for "all".
    """
    ids = _ids(dataset.cases)
    if fold == ALL:
        if rule != DEFAULT_RULE:
            raise UserError("fold `all` trains on every case", fix="Omit the options for folds, or train `all-folds`.")
        return Split(ALL, tuple(ids), tuple(ids))
    splits = read_splits(file, dataset, rule, fold)
    split = splits[int(fold)]
    if left_out := sorted(set(ids) - _cases_of([split])):
        where = f": fold {fold}" if _cases_of(splits).intersection(left_out) else ""
        log.warn_once(f"{file}{where} leaves out {name_cases(left_out)}; edit or delete the file to use all cases")
    return split


def read_splits(file: Path, dataset: Dataset, rule: FoldRule = DEFAULT_RULE, fold: str = "0") -> list[Split]:
    """Return all folds; write splits.json if it does not exist and `fold` is one of them.

    Raises
    ------
    UserError
        splits.json is malformed, names an unknown case or differs from what the options ask for, there is no such
        fold, or `make_splits` or `leave_out` fails.
    """
    exists = file.is_file()
    whole, record = (load_splits(file, dataset), None) if exists else make_splits(dataset, rule)
    splits = leave_out(whole, dataset)
    if fold not in map(str, range(len(splits))):
        raise UserError(f"there is no fold {fold!r}", fix=f'Folds are 0 to {len(splits) - 1}, "all-folds" and "all".')
    if record is not None:
        write_splits(file, whole, record)
    elif rule != DEFAULT_RULE:
        check_folds(file, dataset, rule)
    return splits


def make_splits(
    dataset: Dataset, rule: FoldRule = DEFAULT_RULE, strata: Mapping[str, str] | None = None
) -> tuple[list[Split], SplitsRecord]:
    """Divide the cases into folds.

    Parameters
    ----------
    dataset, rule : Dataset, FoldRule
        See `check_folds`.
    strata : mapping of str to str, optional
        What `stratify_by_labels` returns, where that is known. Without it, `--stratify` reads every label map.

    Returns
    -------
    list of Split
        The folds.
    SplitsRecord
        How they were made.

    Raises
    ------
    UserError
        There are fewer than two folds or more than cases or groups, a wrong table, expression or file, `splits`
        together with another option, no stratum has a case for each fold, or a label map cannot be read.
    """
    rule = _rule_or_default(rule, dataset)
    ids, n_folds = _ids(dataset.cases), N_FOLDS if rule.folds is None else rule.folds
    if rule.splits is not None:
        if rule != FoldRule(splits=rule.splits):
            raise UserError("--splits names the folds: --folds, --group-by and --stratify cannot change them")
        return load_splits(Path(rule.splits), dataset), SplitsRecord(splits=str(rule.splits))
    group_by = None if rule.group_by is None else str(rule.group_by)
    groups = None if group_by is None else read_groups(ids, group_by)
    n, what = (len(ids), "case") if groups is None else (len(set(groups.values())), "group")
    if not 2 <= n_folds <= n:
        other = f", or take --folds 2{f' to {n}' * (n > 2)}" if n > 1 else ""
        fix = f"Train on every case: `nnlite train CONFIGURATION all`{other}."
        raise UserError(f"{plural(n, what)} cannot be split into {plural(n_folds, 'fold')}", fix=fix)
    record = SplitsRecord(folds=n_folds, seed=SEED, group_by=group_by, groups=groups)
    if rule.stratify is True:
        record.stratify = _BY_LABELS
        record.strata = dict(stratify_by_labels(dataset, n_folds) if strata is None else strata)
    elif rule.stratify:
        record.stratify = str(rule.stratify)
        record.strata = read_column(Path(rule.stratify), ids, "stratum")
    return divide(ids, n_folds, groups, record.strata or None), record


def divide(
    case_ids: Sequence[str],
    n_folds: int = N_FOLDS,
    groups: Mapping[str, str] | None = None,
    strata: Mapping[str, str] | None = None,
) -> list[Split]:
    """Divide cases into folds: those of nnU-Net, which are scikit-learn's KFold(5, shuffle=True, random_state=12345).

    With groups or strata, scikit-learn's StratifiedGroupKFold divides them.

    Parameters
    ----------
    case_ids : sequence of str
        Ids of all cases, in any order.
    n_folds : int
        Number of folds.
    groups : mapping of str to str, optional
        Case id -> group. A group is never on both sides; folds hold out about equal numbers of cases, not of groups.
    strata : mapping of str to str, optional
        Case id -> stratum. Each fold holds out about an equal share of every stratum.

    Raises
    ------
    UserError
        No stratum has a case for each fold.
    """
    ids = sorted(case_ids)
    if groups is None and strata is None:  # without scikit-learn, whose import takes longer than this whole command
        parts = np.array_split(np.random.RandomState(SEED).permutation(len(ids)), n_folds)
    else:
        groups, strata = groups or {i: i for i in ids}, strata or dict.fromkeys(ids, "")
        parts = _balance([groups[i] for i in ids], [strata[i] for i in ids], n_folds)
    return _hold_out({ids[i]: str(k) for k, part in enumerate(parts) for i in part}, n_folds)


def _balance(group_of_case: Sequence[str], stratum_of_case: Sequence[str], n_folds: int) -> list[np.ndarray]:
    """Divide the numbers of cases into folds that hold out about equal shares of each stratum, and whole groups."""
    from sklearn.model_selection import StratifiedGroupKFold  # slow to import

    if max(Counter(stratum_of_case).values()) < n_folds:
        raise UserError(f"no stratum has {n_folds} cases, one for each fold", fix="Use fewer strata or fewer folds.")
    # Where strata leave a choice, scikit-learn deals groups out in the order of their numbers. Numbers at random, the
    # largest group first, balance best; scikit-learn's own shuffle differs between its versions.
    sizes = Counter(group_of_case)
    names = np.random.RandomState(SEED).permutation(sorted(sizes)).tolist()
    number = {name: i for i, name in enumerate(sorted(names, key=lambda name: -sizes[name]))}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # of strata with fewer cases than folds
        parts = StratifiedGroupKFold(n_folds).split(group_of_case, stratum_of_case, [number[g] for g in group_of_case])
        return [part for _, part in parts]


def _hold_out(fold_of: Mapping[str, str], n_folds: int) -> list[Split]:
    """Make folds from the name of the one that holds out each case."""
    ids = sorted(fold_of)
    return [
        Split(k, tuple(i for i in ids if fold_of[i] != k), tuple(i for i in ids if fold_of[i] == k))
        for k in map(str, range(n_folds))
    ]


# ------------------------------------------------------------------------------------------------ groups and strata


def read_groups(case_ids: Sequence[str], group_by: str) -> dict[str, str]:
    """Return the group of each case.

    Parameters
    ----------
    case_ids : sequence of str
        Ids of the cases.
    group_by : str
        A table (a file, or a name that ends in .csv or .tsv) with the columns case and group; otherwise a regular
        expression that is searched for in the case id. Its first group names the group, or the whole match.

    Raises
    ------
    UserError
        The table lacks a case, or the expression is invalid or does not match a case.
    """
    if group_by.lower().endswith(_TABLES) or os.path.isfile(group_by):  # noqa: PTH113 - Path raises where a name is too long
        return read_column(Path(group_by), case_ids, "group")
    try:
        pattern = re.compile(group_by)
    except re.error as error:
        raise UserError(f"--group-by {group_by!r} is no regular expression: {error}") from None
    matches = {case_id: pattern.search(case_id) for case_id in case_ids}
    groups = {i: (pattern.groups and match[1]) or match[0] for i, match in matches.items() if match is not None}
    if missing := [case_id for case_id in case_ids if not groups.get(case_id)]:
        fix = r"Every case needs a group; `|.+` at the end makes the other cases groups of one."
        raise UserError(f"--group-by {group_by!r} matches nothing in {name_cases(missing)}", fix=fix)
    return groups


def find_patients(case_ids: Sequence[str]) -> str | None:
    """Return a regular expression for `--group-by` where names look as if cases share patients; otherwise None.

    A name is cut after its first, second or third number. What is before the cut is a patient if several names share it
    and what follows repeats from one to the next (pat01_a, pat01_b, pat02_a), which running numbers do not (site1_001,
    site1_002, site2_003), or if a word such as "sub" says so.

    Parameters
    ----------
    case_ids : sequence of str
        Ids of the cases.
    """
    for pattern in (rf"^(?:\D*\d+){{{numbers}}}" for numbers in (1, 2, 3)):
        pairs = [(match[0], match.string[match.end() :]) for i in case_ids if (match := re.match(pattern, i))]
        names = Counter(name for name, _ in pairs)
        shared = [name for name, n in names.items() if n > 1]
        cut = [(name, rest) for name, rest in pairs if rest]
        repeated = len({rest for _, rest in cut}) <= len({name for name, _ in cut})
        if shared and len(names) > 1 and (repeated or any(_PATIENT.search(name) for name in shared)):
            return pattern if len(pairs) == len(case_ids) else f"{pattern}|.+"
    return None


def _warn_of_patients(case_ids: Sequence[str]) -> None:
    """Warn where names look as if several cases were of one patient."""
    if (pattern := find_patients(case_ids)) is not None:
        n_patients = plural(len(set(read_groups(case_ids, pattern).values())), "patient")
        text = f"names look as if the {plural(len(case_ids), 'case')} were of {n_patients}"
        log.warn_once(f"{text}; if so, scores are too good unless you plan with --group-by '{pattern}'")


def read_column(file: Path, case_ids: Sequence[str], what: str) -> dict[str, str]:
    """Read a table with two columns, case and another, between commas, semicolons or tabs.

    A header and rows of other cases are ignored.

    Returns
    -------
    dict of str to str
        Case id -> value of the second column.

    Raises
    ------
    UserError
        There is no such table, or it has no value or two values for a case.
    """
    values = defaultdict[str, set[str]](set)
    for line, cells in enumerate(read_table(file), 1):
        if any(cells) and len(cells) != 2:
            raise UserError(f"line {line} has {len(cells)} columns, not two: case, {what}", file)
        if any(cells):
            values[cells[0]] |= {cells[1]} - {""}
    if missing := [case_id for case_id in case_ids if not values[case_id]]:
        raise UserError(f"has no {what} for {name_cases(missing)}", file, f"It needs two columns, case and {what}.")
    if several := [case_id for case_id in case_ids if len(values[case_id]) > 1]:
        raise UserError(f"has more than one {what} for {name_cases(several)}", file)
    return {case_id: min(values[case_id]) for case_id in case_ids}


def stratify_by_labels(dataset: Dataset, n_folds: int) -> dict[str, str]:
    """Return the stratum of each case, from its labels and their volume; reads every raw label map once.

    Logs a warning for each label that fewer cases have than there are folds.

    Raises
    ------
    UserError
        A label map cannot be read.
    """
    foreground = dataset.labels.values[1:]  # the background comes first

    def measure(case: Case) -> tuple[str, tuple[tuple[int, ...], float]]:
        label, geometry = read_annotation(case, dataset)
        values, counts = np.unique(label[np.isin(label, foreground)], return_counts=True)
        return case.id, (tuple(values.tolist()), float(counts.sum() * np.prod(geometry.spacing)))

    contents = dict(log.map_in_threads(measure, dataset.cases, min(_READERS, cpus()), "labels"))
    for value, n in sorted(Counter(value for values, _ in contents.values() for value in values).items()):
        if n < n_folds:
            log.warn(f"label {value} occurs in {n} of {len(contents)} cases: not every fold can hold it out")
    return make_strata(contents, n_folds)


def make_strata(contents: Mapping[str, tuple[tuple[int, ...], float]], n_folds: int) -> dict[str, str]:
    """Return the stratum of each case.

    Cases with the same labels are divided by volume into up to four strata of equal size, each with a case for every
    fold. Cases whose set of labels is rarer than the number of folds are treated as one set.

    Parameters
    ----------
    contents : mapping of str to (tuple of int, float)
        Case id -> label values, and the volume of the foreground in mm^3.
    n_folds : int
        Number of folds.
    """
    frequency = Counter(values for values, _ in contents.values())
    members = defaultdict[str, list[tuple[float, str]]](list)
    for case_id, (values, volume) in contents.items():
        name = "+".join(map(str, values)) or "nothing"
        members[name if frequency[values] >= n_folds else "rare"].append((volume, case_id))
    strata = {}
    for name, cases in members.items():
        parts = max(1, min(_VOLUME_PARTS, len(cases) // n_folds))
        for rank, (_, case_id) in enumerate(sorted(cases)):
            strata[case_id] = f"{name}, volume {rank * parts // len(cases) + 1} of {parts}"
    return strata


# ------------------------------------------------------------------------------------------------ files


class _FoldEntry(BaseModel):
    train: list[str]
    val: list[str]


_ENTRIES = TypeAdapter(Annotated[list[_FoldEntry], Field(min_length=1)])


def load_splits(file: Path, dataset: Dataset | None = None) -> list[Split]:
    """Read a splits.json, nnU-Net's splits_final.json, or a table with the columns case and fold.

    Parameters
    ----------
    dataset : Dataset, optional
        The dataset whose cases may occur, those of `--exclude` too; a table needs it, and only its other cases.

    Raises
    ------
    UserError
        It has another form, or a fold names an unknown case, a case twice, or none to train on.
    """
    try:
        if dataset is not None and file.suffix.lower() in _TABLES:
            fold_of = read_column(file, _ids(dataset.cases), "fold")
            names = sorted(set(fold_of.values()))
            if {*names} != {*map(str, range(len(names)))}:
                raise UserError(f"folds are {', '.join(names)}", file, "Number them 0, 1, 2 ...")
            splits = _hold_out(fold_of, len(names))
        else:
            entries = _ENTRIES.validate_python(read_json(file), strict=True)
            splits = [Split(str(k), tuple(entry.train), tuple(entry.val)) for k, entry in enumerate(entries)]
        for split in splits:
            _check_cases(split, None if dataset is None else _ids([*dataset.cases, *dataset.excluded]))
    except ValidationError:
        raise UserError('must be a list of {"train": [ids], "val": [ids]}', file, _FIX) from None
    except UserError as error:
        raise UserError(error.what, file, error.fix or (_FIX if file.is_file() else "")) from None
    return splits


def _check_cases(split: Split, ids: Collection[str] | None) -> None:
    """Refuse a fold that names a case twice, none to train on, or one that the dataset does not have."""
    cases = Counter([*split.training, *split.validation])
    if both := sorted({*split.training} & {*split.validation}):
        raise UserError(f"fold {split.name} has {both[0]} on both sides")
    if twice := sorted(case_id for case_id, n in cases.items() if n > 1):
        raise UserError(f"fold {split.name} names {twice[0]} twice")
    if not split.training:
        raise UserError(f"fold {split.name} has no training case")
    if unknown := [] if ids is None else sorted(set(cases) - set(ids)):
        raise UserError(f"fold {split.name} names unknown cases: {few(unknown, 5)}")


def leave_out(splits: Sequence[Split], dataset: Dataset) -> list[Split]:
    """Return the folds without the cases that `--exclude` names; the others stay in their folds.

    Raises
    ------
    UserError
        A fold would have no case to train on, or none to hold out.
    """
    excluded, left = set(_ids(dataset.excluded)), []
    for split in splits:
        sides = {"train on": split.training, "hold out": split.validation}
        kept = {use: tuple(i for i in side if i not in excluded) for use, side in sides.items()}
        if emptied := [use for use in sides if sides[use] and not kept[use]]:
            what = f"--exclude leaves fold {split.name} no case to {emptied[0]}: {name_cases(sides[emptied[0]])}"
            raise UserError(what, fix="Exclude fewer cases, or delete splits.json to make the folds again.")
        left.append(Split(split.name, kept["train on"], kept["hold out"]))
    return left


def write_splits(file: Path, splits: Sequence[Split], record: SplitsRecord) -> None:
    """Write splits.json and its record, and log what it holds."""
    content = [{"train": list(split.training), "val": list(split.validation)} for split in splits]
    record = record.model_copy(update={"sha256": hash_of(content)})
    write_json(_record_file(file), record.model_dump(exclude_none=True))  # before splits.json, which needs it
    write_json(file, content)
    held_out = ", ".join(str(len(split.validation)) for split in splits)
    log.info(f"{file.name}: {_summarize(splits, record)}; held out: {held_out}")


def read_record(file: Path) -> SplitsRecord | None:
    """Return how nnlite made the folds of splits.json; None where a user wrote or edited them."""
    if not _record_file(file).is_file():
        return None
    with understood(_record_file(file), "Delete it."):
        record = SplitsRecord.model_validate(read_json(_record_file(file)))
    return record if record.sha256 == hash_of(read_json(file)) else None


def _summarize(splits: Sequence[Split], record: SplitsRecord | None) -> str:
    """5 folds of 32 cases in 8 groups by ..., stratified by ..."""
    text = f"{plural(len(splits), 'fold')} of {plural(len(_cases_of(splits)), 'case')}"
    if record is None:
        return f"{text} (given or edited)"
    text += f" (from {record.splits})" if record.splits else ""
    text += f" in {plural(len(set(record.groups.values())), 'group')} by {record.group_by}" if record.groups else ""
    return text + (f", stratified by {record.stratify}" if record.stratify else "")


def refuse_other_cases(folder: Path, split: Split, file: Path, dataset: Dataset, restart: bool = False) -> None:
    """Make sure that the folds of a model were trained on the cases that splits.json lists now.

    Folds that were trained before cases were excluded hold out the same cases, and may be used.

    Parameters
    ----------
    folder : Path
        Folder of the model.
    split : Split
        Fold that is to be trained or used.
    file : Path
        splits.json of the workspace.
    dataset : Dataset
        Dataset whose cases are divided.
    restart : bool
        Whether this fold starts again, so that only the others matter.

    Raises
    ------
    UserError
        The cases of a fold changed: to resume it, or to average it with others, would mix training and validation.
    """
    ids = tuple(_ids([*dataset.cases, *dataset.excluded]))
    whole = [Split(ALL, ids, ids)] if split.name == ALL else load_splits(file)
    expected = [(one.name, _fingerprint(one)) for one in (*whole, *leave_out(whole, dataset))]
    for cases_file in sorted(folder.glob(f"fold_*/{CASES}")):
        name = cases_file.parent.name.removeprefix("fold_")
        if (name == ALL) != (split.name == ALL) or (restart and name == split.name):
            continue
        known = read_json(cases_file)
        if not any(name == fold and _is_same(known, of) for fold, of in expected):
            source, command = ("the dataset", "--restart") if name == ALL else (file.name, "`all-folds --restart`")
            fix = f"Train under another --name, restore {source} and --exclude, or train again with {command}."
            raise UserError(f"fold {name} was trained on other cases than {source} has now", folder, fix)


def refuse_excluded(fold_folder: Path, split: Split) -> None:
    """Make sure that a fold that is trained further began with the cases that are left of it.

    Raises
    ------
    UserError
        It began with cases that `--exclude` leaves out now, or without some that it left out then.
    """
    if (file := fold_folder / CASES).is_file() and not _is_same(read_json(file), _fingerprint(split)):
        what = "began with other cases than --exclude leaves now; plan with those of then to train it further"
        raise UserError(what, fold_folder, "Or start again with --restart.")


def record_cases(
    fold_folder: Path, split: Split, raw: Mapping[str, RawCase], learned: Mapping[str, Mapping[str, str]]
) -> None:
    """Write which cases a fold is trained on, hashes of their files, and the weights that it learns from.

    Of a fold that is resumed, the files that it began with, and what it has seen and learned from, are kept.

    Parameters
    ----------
    fold_folder : Path
        Of the fold.
    split : Split
        Its cases.
    raw : mapping of str to RawCase
        Their files.
    learned : mapping of str to mapping
        Name of a model, its folds, and the fingerprints of their weights.
    """
    files = [hash_of(raw[case_id].digests) for case_id in split.training]
    training, held_out = ([raw[i].digests[0] for i in ids] for ids in (split.training, split.validation))
    new = {_FILES: files, _IMAGES: training, HELD_OUT: [] if split.name == ALL else held_out, LEARNED: learned}
    before = read_cases(fold_folder) if (fold_folder / CHECKPOINT).is_file() else {}
    kept = {key: before[key] for key in (_FILES, SEEN, LEARNED) if key in before}
    write_json(fold_folder / CASES, {**_fingerprint(split), **new, **kept})


def record_seen(fold_folder: Path, name: str, sources: Iterable[Path], maybe_all: bool = False) -> None:
    """Add to the record of a fold what other weights have seen, and warn if it holds out some of that.

    Parameters
    ----------
    fold_folder : Path
        Of the fold that starts from these weights or learns from them.
    name : str
        Of their model, for the warning.
    sources : iterable of Path
        The folders of their folds.
    maybe_all : bool
        Weights without a record of their cases may have seen all cases of the fold.
    """
    theirs, own = [read_cases(source) for source in sources], read_cases(fold_folder)
    new = {image for known in theirs for key in (_IMAGES, SEEN) for image in known.get(key, ())}
    if maybe_all and not all(_IMAGES in known for known in theirs):
        new |= {image for key in (_IMAGES, HELD_OUT) for image in own.get(key, ())}
    if not own or not new:
        return
    write_json(fold_folder / CASES, own | {SEEN: sorted(new.union(own.get(SEEN, ())))})
    if why := why_not_held_out(fold_folder):
        log.warn(f"{why} ({name}): their scores will be too high, and are not compared with those of other models")


def changed_since_trained(fold_folder: Path, raw: Mapping[str, RawCase]) -> list[str]:
    """Return the training cases of a fold whose files are others now; `raw` has the stamps that they have now."""
    recorded = read_cases(fold_folder)
    known = set(recorded.get(_FILES, ()))
    return [name for name, case in raw.items() if hash_of(case.digests) not in known] if _FILES in recorded else []


def are_other_cases(one: Path, other: Path) -> bool:
    """Whether two fold folders say that they were trained on different cases; False if one of them says nothing."""
    files = [folder / CASES for folder in (one, other)]
    return all(file.is_file() for file in files) and not _is_same(*map(read_json, files))


def _fingerprint(split: Split) -> dict[str, Any]:
    """Count the cases and hash their ids; a model that is passed on does not contain the ids."""
    sides = [sorted(split.training), sorted(split.validation)]
    return {"training": len(sides[0]), "sha256": hash_of(sides), **held_out_fingerprint(split.validation)}


def _is_same(found: Any, expected: dict[str, Any]) -> bool:
    """Compare the ids that two fingerprints both have: of an imported model only the held-out cases are known."""
    shared = found.keys() & expected.keys() & _COMPARED if isinstance(found, dict) else None
    return shared is not None and all(found[key] == expected[key] for key in shared)


def _record_file(file: Path) -> Path:
    return file.with_name(f"{file.stem}_made.json")


def _ids(cases: Iterable[Case]) -> list[str]:
    return sorted(case.id for case in cases)


def _cases_of(splits: Iterable[Split]) -> set[str]:
    return {case_id for split in splits for case_id in (*split.training, *split.validation)}
