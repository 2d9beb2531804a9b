"""From the cross-validation of all trained models to a verdict: which one, or which two together, and with what rules.

Models are compared on the cases that the same folds hold out, by the foreground mean of Dice. Of single models the best
one wins, of equals the simplest. Two that vote win over it only where the 95 % interval of the paired difference is
above zero: they cost twice the time. Nothing needs to have been decided before the training; what is missing is
predicted.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from datetime import date
from functools import partial
from itertools import combinations
from pathlib import Path

import numpy as np

import nnunet_lite
from nnunet_lite import log
from nnunet_lite.data.dataset import Dataset
from nnunet_lite.data.images import read_geometry
from nnunet_lite.data.problems import plural
from nnunet_lite.errors import UserError
from nnunet_lite.evaluation.cross_validation import (
    predicted_cases,
    read_pair,
    read_reference,
    score_predictions,
    summed_up,
    validate,
    validate_fold,
)
from nnunet_lite.evaluation.postprocessing import Decision, Pair, decide
from nnunet_lite.evaluation.selection import (
    Candidate,
    Selection,
    fingerprint,
    fingerprints,
    write_selection,
)
from nnunet_lite.evaluation.statistics import paired, summarize
from nnunet_lite.files import locked, read_json, sweep, write_json
from nnunet_lite.inference.first_stage import FirstStage, predict_first_stage
from nnunet_lite.inference.predictor import Model, load, read_model
from nnunet_lite.models.folder import VALIDATION, first_training, model_folders, trained_folds
from nnunet_lite.planning.schema import Plan
from nnunet_lite.training.splits import ALL, Split, load_splits, read_split, refuse_other_cases
from nnunet_lite.workspace import Paths

_ORDER = ("2d", "3d_lowres", "3d_fullres", "3d_cascade_fullres")  # from simple to costly
MADE_OF = "made_of.json"  # of a fold of an ensemble: the fingerprints of the weights that predicted it


@dataclass(frozen=True, eq=False)
class Member:
    """A trained model: its folder, its first stage's if it is a cascade, its plan, and the folds that can be judged."""

    folder: Path
    configuration: str
    previous: Path | None
    plan: Plan
    folds: tuple[str, ...]

    @property
    def name(self) -> str:
        return self.folder.name


Team = tuple[Member, ...]  # one model, or two that vote


@dataclass(frozen=True)
class Comparison:
    """What the candidates are compared on, and how what is missing is made.

    `holders` : case id -> the fold that holds it out.
    """

    paths: Paths
    dataset: Dataset
    holders: dict[str, Split]
    device: str | None
    workers: int | None


def select_models(
    paths: Paths,
    dataset: Dataset,
    only: Sequence[str] | None = None,
    *,
    ensembles: bool = True,
    postprocess: bool = True,
    device: str | None = None,
    workers: int | None = None,
) -> Selection:
    """Compare the trained models of a data set and all pairs of them, decide on postprocessing, write inference.json.

    Parameters
    ----------
    only : configurations, or names of model folders; None for all.
    ensembles : try pairs. postprocess : try rules for the labels' components.
    device : to predict what is missing with.
    workers : threads that read and score.

    Raises
    ------
    UserError : nothing is trained, or not what `only` names, or the models share no fold; a case cannot be predicted.
    """
    members, notes = find_members(paths, dataset, only)
    names = _shared(members)
    notes += _uneven(members, names)
    for note in notes:
        log.info(note)
    folds = [read_split(paths.splits, dataset, fold) for fold in names]
    comparison = Comparison(paths, dataset, {i: fold for fold in folds for i in fold.validation}, device, workers)
    teams: list[Team] = [(member,) for member in members]
    if ensembles:
        pairs, refused = _pairs(members)
        teams, notes = [*teams, *pairs], [*notes, *refused]
    tables = {team: _dice_of(comparison, team) for team in teams}
    winner = choose(tables)
    decision = _postprocessing(comparison, winner) if postprocess else Decision({}, {}, ())
    used = winner[0].folds if len(winner) == 1 else names
    selection = Selection(
        tuple(member.name for member in winner), used, decision.rules, decision.gains,
        _ranked(tables, winner, dataset), fingerprints([member.folder for member in winner], used),
        (*notes, *decision.notes), date.today().isoformat(),
        nnunet_lite.__version__,
    )  # fmt: skip
    write_selection(paths, selection)
    return selection


def choose(tables: dict[Team, np.ndarray]) -> Team:
    """The models that win, from the Dice (cases, labels) of each candidate on the same cases."""

    def rank(team: Team) -> tuple[float, list[int]]:
        dice = summarize(tables[team]).mean
        return -round(dice or 0.0, 9), [_complexity(member) for member in team]

    best = min((team for team in tables if len(team) == 1), key=rank)
    pairs = sorted((team for team in tables if len(team) > 1), key=rank)
    for pair in pairs:
        low = paired(tables[pair], tables[best]).low
        if low is not None and low > 0:
            return pair
    return best


def _complexity(member: Member) -> int:
    return _ORDER.index(member.configuration) if member.configuration in _ORDER else len(_ORDER)


def _ranked(tables: dict[Team, np.ndarray], winner: Team, dataset: Dataset) -> tuple[Candidate, ...]:
    """The winner, then the others from the best on."""
    found = []
    for team, table in tables.items():
        overall = summarize(table)
        by_label = {
            name: summarize(column[:, None]).mean
            for name, column in zip(dataset.labels.region_names, table.T, strict=True)
        }
        names = tuple(member.name for member in team)
        margin = paired(tables[winner], table)
        one = Candidate(names, len(table), overall.mean, overall.low, overall.high, by_label, margin)
        found.append((team != winner, -(overall.mean or 0.0), len(team), names, one))
    return tuple(one for *_, one in sorted(found, key=lambda entry: entry[:-1]))


# ------------------------------------------------------------------------------------------------ what can be compared


def find_members(paths: Paths, dataset: Dataset, only: Sequence[str] | None = None) -> tuple[list[Member], list[str]]:
    """The models that cross-validation can judge, and notes on those that it cannot.

    Raises
    ------
    UserError : there is none, or nothing of what `only` names.
    """
    members, notes = [], []
    known: set[str] = set()
    for folder in model_folders(paths):
        plan, run = read_model(folder)
        configuration, previous = run["configuration"], run.get("previous")
        if only is not None and not {folder.name, configuration} & set(only):
            continue
        known |= {folder.name, configuration}
        there = trained_folds(folder)
        splits = len(load_splits(paths.splits)) if paths.splits.is_file() else 0
        folds = tuple(fold for fold in there if fold != ALL and fold in map(str, range(splits)))
        why = _unfit(folder, plan, dataset, folds) if there else "no fold of it is trained"
        if why is None:
            why = _other_cases(folder, paths, dataset, folds)
        if why is not None:
            notes.append(f"{folder.name} is left out: {why}")
            continue
        first = None if previous is None else folder.parent / Path(previous).name
        members.append(Member(folder, configuration, first, plan, folds))
    if missing := [name for name in only or () if name not in known]:
        raise UserError(f"no model of {paths.name} is {missing[0]}", paths.models, f"Run `{first_training(paths)}`.")
    if not members:
        why = f" ({'; '.join(notes)})" if notes else ""
        what = f"no fold of {paths.name} is trained{why}"
        raise UserError(what, paths.models, f"Run `{first_training(paths)}`.")
    return members, notes


def _unfit(folder: Path, plan: Plan, dataset: Dataset, folds: Sequence[str]) -> str | None:
    """Why a model cannot be judged on the data set; None where it can."""
    if plan.labels != dataset.labels or len(plan.channels) != len(dataset.channels):
        return "it was made for other labels or channels"
    return None if folds else "it was trained on every case, so that none can judge it"


def _other_cases(folder: Path, paths: Paths, dataset: Dataset, folds: Sequence[str]) -> str | None:
    """Whether a model was trained on other folds than those of splits.json; a sentence, or None."""
    try:
        refuse_other_cases(folder, read_split(paths.splits, dataset, folds[0]), paths.splits)
    except UserError as error:
        return error.what
    return None


def _shared(members: Sequence[Member]) -> tuple[str, ...]:
    """The folds that all models have.

    Raises
    ------
    UserError : there is none.
    """
    shared = [fold for fold in members[0].folds if all(fold in member.folds for member in members)]
    if not shared:
        have = "; ".join(f"{member.name}: {', '.join(member.folds)}" for member in members)
        raise UserError(f"the models share no fold to be compared on ({have})", fix="Train one, or choose with -c.")
    return tuple(shared)


def _uneven(members: Sequence[Member], shared: Sequence[str]) -> list[str]:
    """A note where some models have more folds than all share."""
    more = [f"{member.name} has {', '.join(member.folds)}" for member in members if len(member.folds) > len(shared)]
    what = "fold" if len(shared) == 1 else "folds"
    return [f"compared on {what} {', '.join(shared)}, which all models have; {'; '.join(more)}"] if more else []


def _pairs(members: Sequence[Member]) -> tuple[list[Team], list[str]]:
    """The pairs that can vote, and notes on those that cannot."""
    pairs: list[Team] = list(combinations(members, 2))
    refused = [(a, b) for a, b in pairs if _axes(a.plan) != _axes(b.plan)]
    notes = [f"{a.name} and {b.name} do not vote together: their plans have other orders of axes" for a, b in refused]
    return [pair for pair in pairs if pair not in refused], notes


def _axes(plan: Plan) -> tuple[str | None, tuple[int, int, int]]:
    return plan.orientation, plan.axis_order


# ---------------------------------------------------------------------------------------------- predictions and scores


def _folder(comparison: Comparison, team: Sequence[Member], fold: Split) -> Path:
    """Where the label maps of a fold's held-out cases lie."""
    if len(team) == 1:
        return team[0].folder / f"fold_{fold.name}" / VALIDATION
    return comparison.paths.ensembles / "+".join(member.name for member in team) / f"fold_{fold.name}" / VALIDATION


def _postprocessing(comparison: Comparison, team: Team) -> Decision:
    """The rules for the label maps of a candidate that its held-out cases, in the order of their ids, confirm."""
    dataset = comparison.dataset
    cases = {case.id: case for case in dataset.cases}
    held_out = sorted(comparison.holders.items(), key=lambda entry: entry[0])
    readers: list[Callable[[], Pair]] = [
        partial(read_pair, cases[case_id], _folder(comparison, team, fold), dataset) for case_id, fold in held_out
    ]
    folds = [fold.name for _, fold in held_out]
    references = [partial(read_reference, case, dataset) for case in dataset.cases]
    return decide(readers, folds, references, dataset.labels, _size_unit(dataset), comparison.workers)


def _size_unit(dataset: Dataset) -> str:
    """What sizes of components are called; in pixels only where no image has a spacing."""
    files = [case.images[0] for case in dataset.cases]
    flat = read_geometry(files[0])[0].dimensions == 2
    if not any(read_geometry(file)[0].calibrated for file in files):
        return "px" if flat else "voxels"
    return "mm2" if flat else "mm3"


def _dice_of(comparison: Comparison, team: Team) -> np.ndarray:
    """Dice (cases, labels) of a candidate, the cases in the order of their ids; predicts and scores what is missing."""
    by_case: dict[str, list[float | None]] = {}
    for fold in dict.fromkeys(comparison.holders.values()):
        out = _folder(comparison, team, fold)
        with locked(out.parent, partial(log.info, f"{out}: another process works there, waiting for it")):
            by_case |= _dice_of_fold(comparison, team, fold, out)
    return np.array([by_case[case_id] for case_id in sorted(comparison.holders)], dtype=float)


def _dice_of_fold(comparison: Comparison, team: Team, fold: Split, out: Path) -> dict[str, list[float | None]]:
    """Dice of each held-out case of a fold, by label."""
    dataset, wanted = comparison.dataset, fold.validation
    if len(team) > 1:
        _forget_others(team, fold, out)
    there = predicted_cases(out, dataset, wanted)
    if there == set(wanted) and (rows := summed_up(out, dataset, wanted)) is not None:
        return rows
    names = " and ".join(member.name for member in team)
    if there == set(wanted):
        log.info(f"scoring fold {fold.name} of {names}: {plural(len(wanted), 'case')}")
        scores = score_predictions(out, dataset, wanted, comparison.workers)
    else:
        log.info(f"predicting fold {fold.name} of {names}: {plural(len(wanted) - len(there), 'case')}")
        if len(team) > 1:
            scores = validate(_voting(comparison, team, fold), out, dataset, wanted)
        else:
            before = _first_predictions(comparison, team[0], fold)
            scores = validate_fold(team[0].folder, fold.name, dataset, wanted, comparison.device, before)
    return {row.case: line.tolist() for row, line in zip(scores.rows, scores.values(), strict=True)}


def _forget_others(team: Team, fold: Split, out: Path) -> None:
    """Remove what an ensemble predicted with other weights, and what a killed run left; note which ones predict now."""
    note, weights = out.parent / MADE_OF, weights_of(team, fold.name)
    if note.is_file() and read_json(note) == weights:
        sweep(out, alone=True)
        return
    for file in out.glob("*") if out.is_dir() else ():
        if file.is_file():
            file.unlink()
    write_json(note, weights)


def weights_of(team: Team, fold: str) -> dict[str, str]:
    """The content of `MADE_OF`: model -> fingerprint."""
    return {member.name: fingerprint(member.folder, fold) for member in team}


def _voting(comparison: Comparison, team: Sequence[Member], fold: Split) -> Model:
    """The networks of one fold of several models as one; a cascade with the first stage of this fold alone."""
    load_fold = partial(load, folds=[fold.name], device=comparison.device, workspace=comparison.paths.root.parent)
    loaded = []
    for member in team:
        if member.previous is None:
            loaded.append(load_fold(member.folder))
        else:
            loaded.append(replace(load_fold(member.folder, alone=True), previous=load_fold(member.previous)))
    return replace(loaded[0], partners=tuple(loaded[1:]))


def _first_predictions(comparison: Comparison, member: Member, fold: Split) -> dict[str, Path] | None:
    """What the first stage of a cascade predicts of the held-out cases; None for other models."""
    stage = member.plan.configuration(member.configuration).previous_stage
    if stage is None or member.previous is None:
        return None
    first = FirstStage(stage, member.previous, dict.fromkeys(fold.validation, fold.name))
    return predict_first_stage(
        first, comparison.dataset, member.plan, member.configuration, comparison.paths.preprocessed,
        comparison.workers, comparison.device,
    )  # fmt: skip
