"""Which cases a fold trains on and which it holds out: made as asked for, obeyed once splits.json is there.

A model folder keeps in fold_k/cases.json how many cases the fold was begun with and a hash of their ids.
"""

from __future__ import annotations

import os
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from nnunet_lite import log
from nnunet_lite.data.dataset import Dataset
from nnunet_lite.data.problems import plural
from nnunet_lite.errors import UserError
from nnunet_lite.files import read_json, write_json
from nnunet_lite.training.grouping import groups_of, label_strata, looks_grouped, read_column, some
from nnunet_lite.training.splits import (
    Fold,
    Splits,
    checked_fold,
    digest,
    given_splits,
    how_made,
    load_splits,
    named_cases,
    splits_of,
    summary,
    write_splits,
)

SEED = 12345  # the one that nnU-Net has always used, so that folds can be compared
N_FOLDS = 5
ALL = "all"
LABELS = "labels"  # what is stratified by where no table is given
_CASES = "cases.json"
_SPLITS_FINAL = "splits_final.json"  # nnU-Net's
_TRIES = 20  # shuffles, of which the most even is taken where both groups and strata restrict the choice


@dataclass(frozen=True)
class Wanted:
    """The folds that were asked for, see `wanted_folds`; None is what was not asked.

    `found` : no option was given, and `given` are those of a splits_final.json that the dataset has.
    """

    n_folds: int | None = None
    group_by: str | None = None
    groups: Mapping[str, str] | None = None
    stratify: str | None = None
    strata: Callable[[int], Mapping[str, str]] | None = None
    file: str | None = None
    given: Splits | None = None
    found: bool = False

    @property
    def asked(self) -> bool:
        """Whether there is an option that splits.json has to agree with."""
        return not self.found and self != ANY

    @property
    def count(self) -> int:
        return self.n_folds or N_FOLDS if self.given is None else len(self.given)


ANY = Wanted()


def wanted_folds(
    dataset: Dataset,
    n_folds: int | None = None,
    group_by: str | Path | None = None,
    stratify: bool | str | Path = False,
    splits: str | Path | None = None,
) -> Wanted:
    """What was asked for, with its mistakes reported; no image or label map is read yet.

    Where nothing is asked for, the splits_final.json beside the dataset's images is taken, if there is one.

    Parameters
    ----------
    n_folds : how many.
    group_by : regular expression or table, see `groups_of`; a group, such as a patient, is never on both sides.
    stratify : True for folds alike in labels and volumes, see `label_strata`; or a table of the columns case, stratum.
    splits : these instead: a splits.json, nnU-Net's splits_final.json, or a table of the columns case and fold.

    Raises
    ------
    UserError : fewer than two folds, a wrong table, expression or file, or both `splits` and one of the others.
    """
    ids = sorted(case.id for case in dataset.cases)
    if splits is not None:
        if n_folds is not None or group_by is not None or stratify:
            raise UserError("--splits says what the folds are: --folds, --group-by and --stratify cannot change them")
        return Wanted(file=str(splits), given=given_splits(Path(splits), ids))
    if n_folds is None and group_by is None and not stratify and (file := _splits_of_nnunet(dataset)) is not None:
        try:
            return Wanted(file=str(file), given=given_splits(file, ids), found=True)
        except UserError as error:
            fix = f"{error.fix} Correct or remove it, or give --folds, --group-by, --stratify or --splits.".strip()
            raise UserError(error.what, error.file, fix) from None
    if n_folds is not None and n_folds < 2:
        raise UserError(f"{n_folds} is no number of folds", fix="Take 2 or more, or train on every case: fold `all`.")
    by = None if group_by is None else str(group_by)
    groups = None if by is None else groups_of(ids, by)
    if not stratify:
        return Wanted(n_folds, by, groups)
    if stratify is True:
        return Wanted(n_folds, by, groups, LABELS, lambda n: label_strata(dataset, n))
    table = read_column(Path(stratify), ids, "stratum")
    return Wanted(n_folds, by, groups, str(stratify), lambda _: table)


def _splits_of_nnunet(dataset: Dataset) -> Path | None:
    """The splits_final.json of a dataset: in its folder, or where nnU-Net keeps it."""
    preprocessed = os.environ.get("nnUNet_preprocessed")  # noqa: SIM112 - the name that nnU-Net gave it
    places = [dataset.root, *([Path(preprocessed) / dataset.name] if preprocessed else [])]
    return next((place / _SPLITS_FINAL for place in places if (place / _SPLITS_FINAL).is_file()), None)


def make_folds(
    case_ids: Sequence[str],
    n_folds: int = N_FOLDS,
    groups: Mapping[str, str] | None = None,
    strata: Mapping[str, str] | None = None,
) -> Splits:
    """nnU-Net's folds: KFold(5, shuffle, seed 12345) over the sorted case ids; with groups or strata scikit-learn's
    StratifiedGroupKFold.

    Parameters
    ----------
    groups : case id -> group, which is never on both sides; folds hold out about equal numbers of cases, not of groups.
    strata : case id -> stratum, of which each fold holds out about an equal share.

    Raises
    ------
    UserError : fewer cases or groups than folds, or no stratum has a case for each fold.
    """
    from sklearn.model_selection import KFold

    ids = sorted(case_ids)
    _require_enough(ids, n_folds, groups)
    if groups is None and strata is None:
        parts = KFold(n_folds, shuffle=True, random_state=SEED).split(ids)
        return splits_of(ids, ([ids[i] for i in held_out] for _, held_out in parts))
    together = [case_id if groups is None else groups[case_id] for case_id in ids]
    alike = ["" if strata is None else strata[case_id] for case_id in ids]
    if max(Counter(alike).values()) < n_folds:
        raise UserError(f"no stratum has {n_folds} cases, one for each fold", fix="Use fewer strata or fewer folds.")
    tries = 1 if groups is None or strata is None else _TRIES
    found = [_dealt(alike, together, n_folds, SEED + i) for i in range(tries)]
    return splits_of(ids, ([ids[i] for i in held_out] for held_out in min(found, key=partial(_uneven, alike))))


def _require_enough(ids: Sequence[str], n_folds: int, groups: Mapping[str, str] | None) -> None:
    """Make sure that each fold can hold out a case, or a group."""
    n, what = (len(ids), "case") if groups is None else (len({groups[case_id] for case_id in ids}), "group")
    if n < n_folds:
        fewer = f", or take --folds {n}" if n > 1 else ""
        raise UserError(
            f"{plural(n, what)} cannot be split into {n_folds} folds",
            fix=f"Train on every case: `nnlite train CONFIGURATION all`{fewer}.",
        )


def _dealt(alike: Sequence[str], together: Sequence[str], n_folds: int, seed: int) -> list[list[int]]:
    """What each fold holds out, as indices of cases, from the stratum and the group of each case.

    scikit-learn deals groups out in the order of their numbers where strata leave a choice. They are numbered at random
    and the largest first, which balances best; its own shuffle is not the same in all of its versions.
    """
    from sklearn.model_selection import StratifiedGroupKFold

    sizes = Counter(together)
    names = np.random.RandomState(seed).permutation(sorted(sizes)).tolist()
    number = {name: i for i, name in enumerate(sorted(names, key=lambda name: -sizes[name]))}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # of strata with fewer cases than folds
        parts = StratifiedGroupKFold(n_folds).split(alike, alike, [number[name] for name in together])
        return [held_out.tolist() for _, held_out in parts]


def _uneven(alike: Sequence[str], parts: Sequence[Sequence[int]]) -> tuple[int, float]:
    """How much folds differ: in number of cases, then in their shares of each stratum."""
    sizes = [len(held_out) for held_out in parts]
    counts = [Counter(alike[i] for i in held_out) for held_out in parts]
    unequal = sum(abs(found[name] - n / len(parts)) for name, n in Counter(alike).items() for found in counts)
    return max(sizes) - min(sizes), unequal


def make_splits(case_ids: Sequence[str], wanted: Wanted = ANY) -> tuple[Splits, dict[str, Any]]:
    """The folds that were asked for, nnU-Net's by default, and the record of how they were made.

    Raises
    ------
    UserError : as `make_folds`; or a label map cannot be read.
    """
    if wanted.given is not None:
        if left_out := sorted(set(case_ids) - named_cases(wanted.given)):
            log.warn(f"{wanted.file}: no fold has {some(left_out)}; only the fold `all` trains on them")
        return wanted.given, {"splits": wanted.file, "sha256": digest(wanted.given)}
    if wanted.groups is None:
        point_out_groups(case_ids)
    strata = None if wanted.strata is None else wanted.strata(wanted.count)
    folds = make_folds(case_ids, wanted.count, wanted.groups, strata)
    made = {"folds": wanted.count, "seed": SEED, "group_by": wanted.group_by, "stratify": wanted.stratify}
    return folds, {**made, "groups": wanted.groups, "strata": strata, "sha256": digest(folds)}


def point_out_groups(case_ids: Sequence[str]) -> None:
    """A line of warning where the names of cases look as if several were of one patient."""
    if (found := looks_grouped(case_ids)) is not None:
        pattern, (first, second, *_) = found
        n = len(set(groups_of(case_ids, pattern).values()))
        log.warn(
            f"{first} and {second} look like images of one patient, whom folds may have on both sides; "
            f"--group-by '{pattern}' makes {n} groups of the {len(case_ids)} cases"
        )


def read_splits(splits: Path, case_ids: Sequence[str], wanted: Wanted = ANY) -> Splits:
    """The folds of splits.json, which is made if it is not there.

    Raises
    ------
    UserError : it is malformed, or holds others than those that were asked for; or as `make_splits`.
    """
    if not splits.is_file():
        folds, made = make_splits(case_ids, wanted)
        write_splits(splits, folds, made)
        return folds
    folds = load_splits(splits)
    if wanted.found:
        return folds
    if difference := _difference(splits, folds, case_ids, wanted):
        fix = "Leave the options for folds out to continue with these, or delete the file to make them again."
        raise UserError(difference, splits, fix)
    return folds


def must_be_made(splits: Path, case_ids: Sequence[str], wanted: Wanted, trained: Sequence[str]) -> bool:
    """Whether the folds that were asked for, if any, are still to be written.

    Parameters
    ----------
    trained : models that are trained on the folds that are there.

    Raises
    ------
    UserError : there are others, and models trained on them; or there are fewer cases or groups than folds.
    """
    there = splits.is_file()
    if wanted == ANY or (wanted.found and there):
        return False
    difference = _difference(splits, load_splits(splits), case_ids, wanted) if there else None
    if difference and trained:
        what = f"{difference}, and {', '.join(trained)} {'is' if len(trained) == 1 else 'are'} trained on them"
        fix = "Scores on different folds do not compare: use another --workspace, or delete the file to go on here."
        raise UserError(what, splits, fix)
    if there and not difference:
        return False
    if wanted.given is None:
        _require_enough(case_ids, wanted.count, wanted.groups)  # here: before the minutes that a check takes
    return True


def point_out_other_folds(splits: Path, case_ids: Sequence[str], wanted: Wanted) -> None:
    """A line of warning where a splits_final.json that was found is not obeyed: there were other folds before."""
    if wanted.found and splits.is_file() and _difference(splits, load_splits(splits), case_ids, wanted):
        log.warn(
            f"{wanted.file} is not used: {splits} holds other folds, which stay. --splits {wanted.file} with "
            "`nnlite plan` takes it where nothing is trained yet; else delete the latter file"
        )


def read_fold(splits: Path, case_ids: Sequence[str], fold: str, wanted: Wanted = ANY) -> Fold:
    """The cases of fold "0", "1" ... or "all"; splits.json is made if it is not there and obeyed if it is.

    Raises
    ------
    UserError : no such fold, splits.json names a case that the data set does not have, or as `read_splits`.
    """
    ids = sorted(case_ids)
    if fold == ALL:
        if wanted.asked:
            what = "fold `all` trains on every case, whatever the folds are"
            raise UserError(what, fix="Leave their options out, or train each of them: `all-folds`.")
        return Fold(ALL, tuple(ids), tuple(ids))
    count = len(load_splits(splits)) if splits.is_file() else wanted.count
    if fold not in map(str, range(count)):  # told before the file is made: more folds may be asked for next
        raise UserError(f"there is no fold {fold!r}", fix=f'Folds are 0 to {count - 1}, "all-folds" and "all".')
    chosen = checked_fold(read_splits(splits, ids, wanted)[int(fold)], fold, ids, splits)
    if left_out := sorted(set(ids) - {*chosen.training, *chosen.validation}):
        names = f"{', '.join(left_out[:5])}{' ...' if len(left_out) > 5 else ''}"
        log.warn(f"{splits}: fold {fold} leaves out {len(left_out)} cases ({names}); delete the file to make it again")
    return chosen


def refuse_other_cases(folder: Path, fold: Fold, splits: Path, anew: bool = False) -> None:
    """Make sure that the folds of a model were begun with the cases that splits.json gives them now.

    Parameters
    ----------
    folder : of the model.
    anew : this fold is begun anew, so that only the others matter.

    Raises
    ------
    UserError : one was not: to go on with it, or to average it with others, would mix what was held out.
    """
    now = {ALL: _about(_sides(fold))}
    if fold.name != ALL:
        now = {str(i): _about(entry) for i, entry in enumerate(load_splits(splits))}
    for file in sorted(folder.glob(f"fold_*/{_CASES}")):
        name = file.parent.name.removeprefix("fold_")
        if (name == ALL) != (fold.name == ALL) or (anew and name == fold.name):
            continue
        if name not in now or read_json(file) != now[name]:
            which = "the data set" if name == ALL else splits.name
            anew_with = "--restart" if name == ALL else "`all-folds --restart`"
            raise UserError(
                f"fold {name} was begun with other cases than {which} has for it now",
                folder,
                f"Train under another --name, put {which} back as it was, or begin anew with {anew_with}.",
            )


def record_cases(fold_folder: Path, fold: Fold) -> None:
    """Write down which cases a fold is begun with, for `refuse_other_cases`."""
    write_json(fold_folder / _CASES, _about(_sides(fold)))


def _difference(splits: Path, folds: Splits, case_ids: Sequence[str], wanted: Wanted) -> str | None:
    """What the folds that are there hold and in what they are not those that were asked for."""
    made = how_made(splits, folds)
    return next((f"holds {summary(folds, made)}, {what}" for what in _unlike(folds, made, case_ids, wanted)), None)


def _unlike(folds: Splits, made: Mapping[str, Any], case_ids: Sequence[str], wanted: Wanted) -> Iterator[str]:
    """In what folds are not those that were asked for: it is what they hold that counts, not how they were made."""
    if wanted.given is not None and list(map(_about, folds)) != list(map(_about, wanted.given)):
        yield f"not those of {wanted.file}"
    if wanted.given is not None or wanted == ANY:
        return
    if named_cases(folds) != set(case_ids):
        yield f"not of the {len(case_ids)} that the data set has"
    if wanted.n_folds not in (None, len(folds)):
        yield f"not {wanted.n_folds}"
    if wanted.groups is not None:
        for i, fold in enumerate(folds):
            both = {wanted.groups[case_id] for case_id in fold["train"]} & {wanted.groups[i] for i in fold["val"]}
            if both:
                yield f"with the group {min(both)} on both sides of fold {i}"
    if wanted.strata is not None:
        labels = wanted.stratify == LABELS  # which are not read again for this
        if made.get("stratify") != LABELS if labels else made.get("strata") != wanted.strata(len(folds)):
            yield f"not stratified by {wanted.stratify}"


def _about(fold: Mapping[str, Sequence[str]]) -> dict[str, Any]:
    """How many cases a fold has, and a hash of their ids; not these, which do not travel with a model."""
    sides = [sorted(fold["train"]), sorted(fold["val"])]
    return {"training": len(sides[0]), "validation": len(sides[1]), "sha256": digest(sides)}


def _sides(fold: Fold) -> dict[str, Sequence[str]]:
    return {"train": fold.training, "val": fold.validation}
