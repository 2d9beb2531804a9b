"""Find the trained models of a dataset that held-out cases can judge. Needs torch only to check weights."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from nnunet_lite.data.dataset import Dataset
from nnunet_lite.errors import UserError
from nnunet_lite.models.bundle import is_imported
from nnunet_lite.models.folder import (
    CASES,
    MODEL,
    first_training,
    model_folders,
    stage_path,
    trained_folds,
    why_not_held_out,
)
from nnunet_lite.models.lookup import read_model
from nnunet_lite.planning.schema import Plan
from nnunet_lite.training.splits import load_splits, read_split, refuse_other_cases
from nnunet_lite.workspace import Paths


@dataclass(frozen=True, eq=False)
class Member:
    """A trained model.

    Parameters
    ----------
    folder : Path
        The model folder.
    configuration : str
        Such as "3d_fullres".
    first_stage : Path or None
        The model folder of the first stage of a cascade.
    plan : Plan
        The plan it was trained with.
    folds : tuple of str
        The trained folds that hold out cases.
    """

    folder: Path
    configuration: str
    first_stage: Path | None
    plan: Plan
    folds: tuple[str, ...]

    @property
    def name(self) -> str:
        return self.folder.name


def find_members(
    paths: Paths, dataset: Dataset, only: Sequence[str] | None = None, *, predicting: bool = False
) -> tuple[list[Member], list[str]]:
    """Find the models that cross-validation can judge, and note why it cannot judge others.

    Parameters
    ----------
    paths : Paths
        The workspace of the dataset.
    dataset : Dataset
        The planned dataset.
    only : sequence of str or None
        Configurations, or names of model folders; None for all.
    predicting : bool
        Whether they will predict: those with damaged weights are left out.

    Raises
    ------
    UserError
        There is none, or not what `only` names.
    """
    members, notes, names = [], [], set[str]()
    n_splits = len(load_splits(paths.splits)) if paths.splits.is_file() else 0
    for folder in model_folders(paths):
        try:
            plan, run = read_model(folder)
        except UserError as error:
            names.add(folder.name)
            notes.append(f"{folder.name} is left out: {error}")
            continue
        configuration = run["configuration"]
        if only is not None and not {folder.name, configuration} & set(only):
            continue
        names |= {folder.name, configuration}
        folds = tuple(fold for fold in trained_folds(folder) if fold in map(str, range(n_splits)))
        member = Member(folder, configuration, stage_path(folder, run), plan, folds)
        if reason := _reason_to_omit(member, paths, dataset) or (_damaged_weights(member) if predicting else None):
            notes.append(f"{member.name} is left out: {reason}")
        else:
            members.append(member)
            if is_imported(folder) and not all((folder / f"fold_{fold}" / CASES).is_file() for fold in folds):
                what = "does not say which cases it held out (fold_k/cases.json)"
                notes.append(f"{member.name} {what}: its scores count only if these are those of splits.json")
    fix = f"Run `{first_training(paths)}`."
    if missing := [name for name in only or () if name not in names]:
        raise UserError(f"no model of {paths.name} is {missing[0]}", paths.models, fix)
    if not members:
        reasons = f" ({'; '.join(notes)})" if notes else ""
        raise UserError(f"no fold of {paths.name} is trained{reasons}", paths.models, fix)
    return members, notes


def _damaged_weights(member: Member) -> str | None:
    """Return which weights of a model, or of its first stage, cannot be read, and why; None if all can."""
    from nnunet_lite.models.checkpoint import read_weights  # torch is slow to load

    try:
        for stage in filter(None, (member.folder, member.first_stage)):
            for fold in member.folds:
                read_weights(stage / f"fold_{fold}" / MODEL)
    except UserError as error:
        return str(error)
    return None


def _reason_to_omit(member: Member, paths: Paths, dataset: Dataset) -> str | None:
    """Return why a model cannot be judged on the dataset; None if it can."""
    if not trained_folds(member.folder):
        return "no fold of it is trained"
    if member.plan.labels.meaning != dataset.labels.meaning or len(member.plan.channels) != len(dataset.channels):
        return "it was made for other labels or channels"
    if not member.folds:
        return "it was trained on every case, so that none can judge it"
    try:
        split = read_split(paths.splits, dataset, member.folds[0])
        refuse_other_cases(member.folder, split, paths.splits, dataset)
    except UserError as error:
        return error.what
    for stage in filter(None, (member.folder, member.first_stage)):
        for why in filter(None, (why_not_held_out(stage / f"fold_{fold}") for fold in member.folds)):
            return why if stage == member.folder else f"of {stage.name}, its first stage, {why}"
    return None
