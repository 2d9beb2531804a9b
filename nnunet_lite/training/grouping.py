"""Which cases belong together and which are alike: what folds keep on one side, and what they spread evenly."""

from __future__ import annotations

import csv
import os
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from nnunet_lite import log
from nnunet_lite.data.cases import Case
from nnunet_lite.data.dataset import Dataset, map_labels
from nnunet_lite.data.images import read_label
from nnunet_lite.data.problems import few
from nnunet_lite.errors import UserError
from nnunet_lite.system import cpus

_READERS = 4  # label maps in memory at once
_PARTS = 4  # by volume, at most
_NUMBERS = 3  # in a case id, up to which one is looked at as a patient's
_PERSON = re.compile(r"(?i)(?:^|[^a-z])(?:p|pt|pat|patient|sub|subj|subject|case|person|vol|volume)[-_ ]?\d+$")


def groups_of(case_ids: Sequence[str], group_by: str) -> dict[str, str]:
    """Case id -> group.

    Parameters
    ----------
    group_by : a table (a file, or a name that ends in .csv or .tsv) of the columns case and group; else a regular
        expression, searched for in the case id: its first group is the group, or the whole match where it has none.

    Raises
    ------
    UserError : the table lacks a case, or the expression is none or does not match one.
    """
    if is_table(Path(group_by)) or os.path.isfile(group_by):  # noqa: PTH113 - Path raises where a name is too long
        return read_column(Path(group_by), case_ids, "group")
    try:
        pattern = re.compile(group_by)
    except re.error as error:
        raise UserError(f"--group-by {group_by!r} is no regular expression: {error}") from None
    groups = {}
    for case_id in case_ids:
        match = pattern.search(case_id)
        first = match[1] if match and pattern.groups else None
        groups[case_id] = (match[0] if match else "") if first is None else first
    if strangers := [case_id for case_id, group in groups.items() if not group]:
        what = f"--group-by {group_by!r} matches nothing in {some(strangers)}"
        raise UserError(what, fix=r"Every case needs a group; `|.+` at the end makes the other cases groups of one.")
    return groups


def is_table(file: Path) -> bool:
    return file.suffix.lower() in (".csv", ".tsv")


def read_column(file: Path, case_ids: Iterable[str], what: str) -> dict[str, str]:
    """Case id -> value, from a table of two columns with commas, semicolons or tabs between them.

    Rows of other cases are passed over, a header among them.

    Raises
    ------
    UserError : there is no such file or table, or it lacks a case or has two values for one.
    """
    try:
        text = file.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise UserError("no such file", file) from None
    except UnicodeDecodeError as error:
        raise UserError(f"is not UTF-8 text (byte {error.start})", file) from None
    wanted, found = list(case_ids), defaultdict[str, set[str]](set)
    rows = csv.reader(text.splitlines(), delimiter=max(",;\t", key=text.count))
    for row in rows:
        cells = [cell.strip() for cell in row]
        if any(cells) and len(cells) != 2:
            raise UserError(f"line {rows.line_num} has {len(cells)} columns, not two: case, {what}", file)
        if any(cells):
            found[cells[0]].add(cells[1])
    if lacking := [case_id for case_id in wanted if not found.get(case_id, set()) - {""}]:
        raise UserError(f"has no {what} for {some(lacking)}", file, f"It needs two columns, case and {what}.")
    if several := [case_id for case_id in wanted if len(found[case_id]) > 1]:
        raise UserError(f"has more than one {what} for {some(several)}", file)
    return {case_id: next(iter(found[case_id])) for case_id in wanted}


def looks_grouped(case_ids: Sequence[str]) -> tuple[str, list[str]] | None:
    """Whether cases seem to share patients by their names: pat01_a and pat01_b, 12_left and 12_right.

    A name is cut behind its first, second or third number. The cut is taken for a patient's where names share what
    is before it, and what is behind it comes again from patient to patient, as _left and _right do and the running
    numbers of site1_001, site1_002, site2_001 do not; or where a word says so (pat, sub, case).

    Returns
    -------
    the regular expression for `groups_of`, and the cases of the first such patient; None where there is none.
    """
    ids = sorted(case_ids)
    for numbers in range(1, _NUMBERS + 1):
        pattern = "^" + r"\D*\d+" * numbers
        if not all(re.match(pattern, case_id) for case_id in ids):
            pattern += "|.+"
        members = defaultdict[str, list[str]](list)
        for case_id, group in groups_of(ids, pattern).items():
            members[group].append(case_id.removeprefix(group))
        shared = [group for group, endings in members.items() if len(endings) > 1]
        if len(members) < 2 or not shared:
            continue
        endings = {ending for those in members.values() for ending in those if ending}
        n_cut = sum(any(those) for those in members.values())
        if len(endings) <= n_cut or any(_PERSON.search(group) for group in shared):
            return pattern, [shared[0] + ending for ending in members[shared[0]]]
    return None


def label_strata(dataset: Dataset, n_folds: int) -> dict[str, str]:
    """Case id -> stratum, by which labels occur in a case and by their volume; reads every raw label map once.

    Cases with the same labels are cut into as many parts of equal number, by the volume (mm^3) of the foreground, as
    give each fold a case of each part, at most four. Sets of labels that fewer cases have than there are folds go
    together. Labels that fewer cases have than there are folds are pointed out.

    Raises
    ------
    UserError : a label map cannot be read.
    """
    with ThreadPoolExecutor(min(_READERS, cpus())) as pool:
        results = pool.map(lambda case: _foreground(case, dataset), dataset.cases)
        found = list(log.progress(results, len(dataset.cases), "labels"))
    contents = {case.id: content for case, content in zip(dataset.cases, found, strict=True)}
    occurring = Counter(value for values, _ in contents.values() for value in values)
    for value, n in sorted(occurring.items()):
        if n < n_folds:
            log.warn(f"label {value} occurs in {n} of {len(contents)} cases: not every fold can hold it out")
    return strata_of(contents, n_folds)


def strata_of(contents: Mapping[str, tuple[tuple[int, ...], float]], n_folds: int) -> dict[str, str]:
    """Case id -> stratum, from the label values and the foreground volume (mm^3) of each case; see `label_strata`."""
    alike = Counter(values for values, _ in contents.values())
    members = defaultdict[str, list[tuple[float, str]]](list)
    for case_id, (values, volume) in contents.items():
        name = "+".join(map(str, values)) or "nothing"
        members[name if alike[values] >= n_folds else "rare"].append((volume, case_id))
    strata = {}
    for name, cases in members.items():
        parts = max(1, min(_PARTS, len(cases) // n_folds))
        for rank, (_, case_id) in enumerate(sorted(cases)):
            strata[case_id] = f"{name}, volume {rank * parts // len(cases) + 1} of {parts}"
    return strata


def _foreground(case: Case, dataset: Dataset) -> tuple[tuple[int, ...], float]:
    """The label values of a case, without background and ignore, and their volume in mm^3."""
    assert case.label is not None  # every case of a planned data set has one
    label, geometry, _ = read_label(case.label)
    label = map_labels(label, dataset.label_map)
    known = dataset.labels.values[1:]  # the background comes first
    values, counts = np.unique(label[np.isin(label, known)], return_counts=True)
    return tuple(int(value) for value in values), float(counts.sum() * np.prod(geometry.spacing))


def some(case_ids: Sequence[str]) -> str:
    what = "case" if len(case_ids) == 1 else "cases"
    return f"{what} {few(case_ids)}"
