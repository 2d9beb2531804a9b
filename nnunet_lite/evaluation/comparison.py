"""Compare all trained models on the cases that their folds hold out, and select one, or two that vote.

Models are compared by the foreground mean of Dice on the cases that the same folds hold out. The best single model
wins, of equals the simplest. A pair that votes takes twice the time, and wins only if the 95 % interval of the paired
difference is above zero. Predictions that are missing are made; `cross_validation.py` makes them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
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
from nnunet_lite.evaluation import cross_validation
from nnunet_lite.evaluation.members import Member, find_members
from nnunet_lite.evaluation.postprocessing import Decision, SizeUnit, choose_rules
from nnunet_lite.evaluation.selection import Candidate, Selection
from nnunet_lite.evaluation.statistics import compare_paired, summarize
from nnunet_lite.files import locked, read_json, sweep, write_json
from nnunet_lite.inference.first_stage import FirstStage, predict_first_stage
from nnunet_lite.inference.predictor import Predictor, load
from nnunet_lite.models.folder import VALIDATION, weights_fingerprint
from nnunet_lite.training.splits import Split, read_split
from nnunet_lite.workspace import Paths

_ORDER = ("2d", "3d_lowres", "3d_fullres", "3d_cascade_fullres")  # from simple to costly
ENSEMBLE_WEIGHTS = "made_of.json"  # in a fold of an ensemble: the fingerprints of the weights that predicted it


Team = tuple[Member, ...]  # one model, or two that vote


@dataclass(frozen=True)
class HeldOut:
    """The held-out cases on which models are compared.

    Parameters
    ----------
    paths : Paths
        The workspace of the dataset.
    dataset : Dataset
        The planned dataset.
    splits : tuple of Split
        The folds that all models have trained.
    device : str or None
        Where missing predictions are made.
    workers : int or None
        Threads that read and score; None for all CPUs.
    """

    paths: Paths
    dataset: Dataset
    splits: tuple[Split, ...]
    device: str | None
    workers: int | None

    @property
    def folds(self) -> list[str]:
        """The names of the folds."""
        return [split.name for split in self.splits]

    @property
    def fold_of(self) -> dict[str, Split]:
        """Case id -> the first fold that holds it out, in the order of the ids."""
        fold_of = {case_id: split for split in reversed(self.splits) for case_id in split.validation}
        return {case_id: fold_of[case_id] for case_id in sorted(fold_of)}


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
    """Compare the trained models of a dataset and all pairs of them, choose the postprocessing, write inference.json.

    Parameters
    ----------
    paths : Paths
        The workspace of the dataset.
    dataset : Dataset
        The planned dataset.
    only : sequence of str or None
        Configurations, or names of model folders; None for all.
    ensembles : bool
        Whether to try pairs.
    postprocess : bool
        Whether to try rules for the components of labels.
    device : str or None
        Where missing predictions are made.
    workers : int or None
        Threads that read and score; None for all CPUs.

    Raises
    ------
    UserError
        Nothing is trained, or not what `only` names, or the models share no fold; a case cannot be predicted.
    """
    members, notes = find_members(paths, dataset, only, predicting=True)
    folds = _shared_folds(members, notes)
    teams = _candidate_teams(members, ensembles, notes)
    splits = tuple(read_split(paths.splits, dataset, fold) for fold in folds)
    if not any(split.validation for split in splits):
        raise UserError(f"the trained folds ({', '.join(folds)}) hold out no case to compare models on", paths.splits)
    held_out = HeldOut(paths, dataset, splits, device, workers)
    dice = {team: _dice_of_team(held_out, team) for team in teams}
    winner = choose_team(dice)
    decision = _choose_postprocessing(held_out, winner) if postprocess else Decision({}, {}, ())
    used = winner[0].folds if len(winner) == 1 else folds
    selection = Selection(
        format="nnlite-inference-1",
        models=tuple(member.name for member in winner),
        folds=used,
        postprocessing=decision.rules,
        postprocessing_gain=decision.gains,
        candidates=_ranked_candidates(dice, winner, dataset.labels.region_names),
        weights=weights_of(winner, used),
        notes=(*notes, *decision.notes),
        made=date.today().isoformat(),
        version=nnunet_lite.__version__,
    )
    write_json(paths.inference, selection.to_json())
    return selection


def _shared_folds(members: Sequence[Member], notes: list[str]) -> tuple[str, ...]:
    """Return the folds that all models have trained; a note names the others."""
    folds = tuple(fold for fold in members[0].folds if all(fold in member.folds for member in members))
    if not folds:
        have = "; ".join(f"{member.name}: {', '.join(member.folds)}" for member in members)
        raise UserError(f"the models share no fold to be compared on ({have})", fix="Train one, or choose with -c.")
    if more := [f"{m.name} has {', '.join(m.folds)}" for m in members if len(m.folds) > len(folds)]:
        which = f"fold{'s' * (len(folds) > 1)} {', '.join(folds)}"
        notes.append(f"compared on {which}, which all models have; {'; '.join(more)}")
    return folds


def _candidate_teams(members: Sequence[Member], ensembles: bool, notes: list[str]) -> list[Team]:
    """Return the models and the pairs that can vote; a note names the others."""
    teams: list[Team] = [(member,) for member in members]
    for a, b in combinations(members, 2) if ensembles else ():
        if (a.plan.orientation, a.plan.axis_order) == (b.plan.orientation, b.plan.axis_order):
            teams.append((a, b))
        else:
            notes.append(f"{a.name} and {b.name} do not vote together: their plans have other orders of axes")
    return teams


def choose_team(dice: Mapping[Team, np.ndarray]) -> Team:
    """Choose the models that win.

    Parameters
    ----------
    dice : mapping of Team to ndarray, shape (cases, labels)
        The Dice of each candidate, all on the same cases.
    """

    def rank(team: Team) -> tuple[float, list[int]]:
        costs = [_ORDER.index(m.configuration) if m.configuration in _ORDER else len(_ORDER) for m in team]
        return -round(summarize(dice[team]).mean or 0.0, 9), costs

    best = min((team for team in dice if len(team) == 1), key=rank)
    for pair in sorted((team for team in dice if len(team) > 1), key=rank):
        low = compare_paired(dice[pair], dice[best]).low
        if low is not None and low > 0:
            return pair
    return best


def _ranked_candidates(dice: Mapping[Team, np.ndarray], winner: Team, labels: Sequence[str]) -> tuple[Candidate, ...]:
    """Return the winner, then the others from the best on."""
    candidates = [
        Candidate.of([member.name for member in team], table, labels, compare_paired(dice[winner], table))
        for team, table in dice.items()
    ]
    selected = tuple(member.name for member in winner)
    return tuple(sorted(candidates, key=lambda c: (c.models != selected, -(c.dice or 0.0), len(c.models), c.models)))


# ---------------------------------------------------------------------------------------------- predictions and scores


def _folder(held_out: HeldOut, team: Team, fold: str) -> Path:
    """Return the folder of the label maps of the held-out cases of a fold."""
    return held_out.paths.folder_of(team_name(team)) / f"fold_{fold}" / VALIDATION


def _choose_postprocessing(held_out: HeldOut, team: Team) -> Decision:
    """Choose the rules for the label maps of a candidate, on its held-out cases in the order of their ids."""
    dataset, fold_of = held_out.dataset, held_out.fold_of
    cases = {case.id: case for case in dataset.cases}
    pairs = [
        partial(cross_validation.read_pair, cases[case_id], _folder(held_out, team, split.name), dataset)
        for case_id, split in fold_of.items()
    ]
    references = [partial(cross_validation.read_reference, case, dataset) for case in dataset.cases]
    geometries = [read_geometry(case.images[0])[0] for case in dataset.cases]
    flat, calibrated = geometries[0].dimensions == 2, any(geometry.calibrated for geometry in geometries)
    unit: SizeUnit = ("mm2" if flat else "mm3") if calibrated else ("px" if flat else "voxels")
    folds = [split.name for split in fold_of.values()]
    return choose_rules(pairs, folds, references, dataset.labels, unit, held_out.workers)


def _dice_of_team(held_out: HeldOut, team: Team) -> np.ndarray:
    """Return Dice (cases in the order of their ids, labels) of a candidate; predict and score what is missing."""
    dataset, workers, device = held_out.dataset, held_out.workers, held_out.device
    by_case: dict[str, np.ndarray] = {}
    for split in held_out.splits:
        out, cases = _folder(held_out, team, split.name), split.validation
        with locked(out.parent, "predicting"):
            if len(team) > 1:
                _forget_other_weights(team, split.name, out)
            if missing := cross_validation.missing_cases(out, dataset, cases):
                names = " and ".join(member.name for member in team)
                log.info(f"predicting fold {split.name} of {names}: {plural(len(missing), 'case')}")
            if missing and len(team) > 1:
                ensemble = load_team(held_out, team, split.name)
                scores = cross_validation.validate_cases(ensemble, out, dataset, cases)
            elif missing:
                maps = _predict_first_stage(held_out, team[0], split)
                scores = cross_validation.validate_fold(team[0].folder, split.name, dataset, cases, device, maps)
            else:
                known = cross_validation.read_scores(out, dataset, cases)
                scores = known or cross_validation.score_predictions(out, dataset, cases, workers)
        by_case = {row.case: dice for row, dice in zip(scores.rows, scores.values(), strict=True)} | by_case
    return np.array([by_case[case_id] for case_id in held_out.fold_of], dtype=float)


def _forget_other_weights(team: Team, fold: str, out: Path) -> None:
    """Delete what an ensemble predicted with other weights, and what a killed run left; note the weights of now."""
    note, weights = out.parent / ENSEMBLE_WEIGHTS, ensemble_weights(team, fold)
    if note.is_file() and read_json(note) == weights:
        sweep(out, alone=True)
        return
    for file in out.glob("*") if out.is_dir() else ():
        if file.is_file():
            file.unlink()
    write_json(note, weights)


def team_name(team: Team) -> str:
    """Return the name of a model, or A+B of an ensemble."""
    return "+".join(member.name for member in team)


def weights_of(team: Team, folds: Sequence[str]) -> dict[str, dict[str, str]]:
    """Return model -> fold -> fingerprint of its weights.

    Parameters
    ----------
    team : tuple of Member
        The models.
    folds : sequence of str
        Names of their folds.
    """
    return {member.name: {fold: weights_fingerprint(member.folder, fold) for fold in folds} for member in team}


def ensemble_weights(team: Team, fold: str) -> dict[str, str]:
    """Return the content of `ENSEMBLE_WEIGHTS`: model -> fingerprint.

    Parameters
    ----------
    team : tuple of Member
        The models.
    fold : str
        Name of the fold.
    """
    return {member.name: weights_fingerprint(member.folder, fold) for member in team}


def _predict_first_stage(held_out: HeldOut, member: Member, split: Split) -> dict[str, Path] | None:
    """Predict the held-out cases of a fold with the first stage of a cascade; None for other models."""
    if member.first_stage is None:
        return None
    stage = member.plan.configuration(member.configuration).previous_stage or ""
    first = FirstStage(stage, member.first_stage, dict.fromkeys(split.validation, split.name))
    return predict_first_stage(
        first, held_out.dataset, member.plan, member.configuration, held_out.paths.preprocessed, held_out.workers,
        held_out.device,
    )  # fmt: skip


def load_team(held_out: HeldOut, team: Team, fold: str) -> Predictor:
    """Load the networks of one fold of a candidate as one, a cascade with the first stage of this fold alone.

    Parameters
    ----------
    held_out : HeldOut
        The dataset, and where to predict.
    team : tuple of Member
        The models.
    fold : str
        Name of the fold.
    """
    place = held_out.paths.root.parent
    load_fold = partial(load, folds=[fold], device=held_out.device, workspace=place)
    models = [
        load_fold(member.folder)
        if member.first_stage is None
        else replace(load_fold(member.folder, first_stage=False), first_stage=load_fold(member.first_stage))
        for member in team
    ]
    return replace(models[0], partners=tuple(models[1:]))
