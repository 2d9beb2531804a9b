"""How cases are divided into folds: by nnU-Net's shuffle, by groups, and by strata.

`divide` makes the folds, `read_groups` serves `--group-by`, `stratify_by_labels` serves `--stratify`, and `read_column`
reads their tables.
"""

from __future__ import annotations

import csv
import os
import re
import warnings
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from nnunet_lite import log
from nnunet_lite.data.cases import Case
from nnunet_lite.data.dataset import Dataset, map_labels
from nnunet_lite.data.images import read_label
from nnunet_lite.data.problems import name_cases, plural
from nnunet_lite.errors import UserError
from nnunet_lite.system import cpus

N_FOLDS = 5
SEED = 12345  # nnU-Net's, so that folds can be compared
_READERS = 4  # label maps in memory at the same time
_VOLUME_PARTS = 4  # strata by volume, at most


def divide(
    case_ids: Sequence[str],
    n_folds: int = N_FOLDS,
    groups: Mapping[str, str] | None = None,
    strata: Mapping[str, str] | None = None,
) -> list[list[str]]:
    """Divide cases into folds: nnU-Net's KFold(5, shuffle, seed 12345) over the sorted ids, else StratifiedGroupKFold.

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

    Returns
    -------
    list of list of str
        The cases that each fold holds out.

    Raises
    ------
    UserError
        There are fewer cases or groups than folds, or no stratum has a case for each fold.
    """
    from sklearn.model_selection import KFold, StratifiedGroupKFold  # slow to import

    ids = sorted(case_ids)
    require_enough(ids, n_folds, groups)
    if groups is None and strata is None:
        parts = [held_out for _, held_out in KFold(n_folds, shuffle=True, random_state=SEED).split(ids)]
        return [[ids[i] for i in held_out] for held_out in parts]
    group_of_case = [case_id if groups is None else groups[case_id] for case_id in ids]
    stratum_of_case = ["" if strata is None else strata[case_id] for case_id in ids]
    if max(Counter(stratum_of_case).values()) < n_folds:
        raise UserError(f"no stratum has {n_folds} cases, one for each fold", fix="Use fewer strata or fewer folds.")
    # Where strata leave a choice, scikit-learn deals groups out in the order of their numbers. Numbers at random, the
    # largest group first, balance best; scikit-learn's own shuffle differs between its versions.
    sizes = Counter(group_of_case)
    names = np.random.RandomState(SEED).permutation(sorted(sizes)).tolist()
    number = {name: i for i, name in enumerate(sorted(names, key=lambda name: -sizes[name]))}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # of strata with fewer cases than folds
        parts = StratifiedGroupKFold(n_folds).split(ids, stratum_of_case, [number[name] for name in group_of_case])
        return [[ids[i] for i in held_out] for _, held_out in parts]


def require_enough(ids: Sequence[str], n_folds: int, groups: Mapping[str, str] | None) -> None:
    """Make sure that each fold can hold out a case, or a group.

    Raises
    ------
    UserError
        There are fewer cases or groups than folds.
    """
    n, what = (len(ids), "case") if groups is None else (len({groups[case_id] for case_id in ids}), "group")
    if n < n_folds:
        fewer = f", or take --folds {n}" if n > 1 else ""
        fix = f"Train on every case: `nnlite train CONFIGURATION all`{fewer}."
        raise UserError(f"{plural(n, what)} cannot be split into {n_folds} folds", fix=fix)


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
    if is_table(Path(group_by)) or os.path.isfile(group_by):  # noqa: PTH113 - Path raises where a name is too long
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


def is_table(file: Path) -> bool:
    return file.suffix.lower() in (".csv", ".tsv")


def read_column(file: Path, case_ids: Iterable[str], what: str) -> dict[str, str]:
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
    try:
        text = file.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise UserError("no such file", file) from None
    except UnicodeDecodeError as error:
        raise UserError(f"is not UTF-8 text (byte {error.start})", file) from None
    values = defaultdict[str, set[str]](set)
    rows = csv.reader(text.splitlines(), delimiter=max(",;\t", key=text.count))
    for row in rows:
        cells = [cell.strip() for cell in row]
        if any(cells) and len(cells) != 2:
            raise UserError(f"line {rows.line_num} has {len(cells)} columns, not two: case, {what}", file)
        if any(cells):
            values[cells[0]] |= {cells[1]} - {""}
    ids = list(case_ids)
    if missing := [case_id for case_id in ids if not values[case_id]]:
        raise UserError(f"has no {what} for {name_cases(missing)}", file, f"It needs two columns, case and {what}.")
    if several := [case_id for case_id in ids if len(values[case_id]) > 1]:
        raise UserError(f"has more than one {what} for {name_cases(several)}", file)
    return {case_id: min(values[case_id]) for case_id in ids}


def stratify_by_labels(dataset: Dataset, n_folds: int) -> dict[str, str]:
    """Return the stratum of each case, from its labels and their volume; reads every raw label map once.

    Logs a warning for each label that fewer cases have than there are folds.

    Raises
    ------
    UserError
        A label map cannot be read.
    """
    with ThreadPoolExecutor(min(_READERS, cpus())) as pool:
        results = pool.map(lambda case: _measure_labels(case, dataset), dataset.cases)
        contents = dict(log.progress(results, len(dataset.cases), "labels"))
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


def _measure_labels(case: Case, dataset: Dataset) -> tuple[str, tuple[tuple[int, ...], float]]:
    """The id of a case, its label values without background and ignore label, and their volume in mm^3."""
    assert case.label is not None  # every case of a planned dataset has one
    label, geometry, _ = read_label(case.label)
    label = map_labels(label, dataset.label_map)
    foreground = dataset.labels.values[1:]  # the background comes first
    values, counts = np.unique(label[np.isin(label, foreground)], return_counts=True)
    return case.id, (tuple(values.tolist()), float(counts.sum() * np.prod(geometry.spacing)))
