"""What a workspace contains of one dataset: all that the report is made from, at whatever stage the dataset is."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from nnunet_lite.data.dataset import Dataset, stored_dataset
from nnunet_lite.errors import UserError
from nnunet_lite.evaluation.scores import CaseScore, Scores, read_summaries
from nnunet_lite.evaluation.selection import Selection, read_selection
from nnunet_lite.files import read_json
from nnunet_lite.models.folder import MODEL, model_folders, read_weights_header
from nnunet_lite.planning.fingerprint import Fingerprint
from nnunet_lite.planning.schema import Plan
from nnunet_lite.training.metrics import METRICS
from nnunet_lite.workspace import Paths


@dataclass(frozen=True)
class FoldHistory:
    """The epochs of one fold (rows of metrics.jsonl), and the state of its finished model, empty while it trains."""

    name: str
    rows: tuple[dict[str, Any], ...]
    state: dict[str, Any]

    @property
    def seconds(self) -> float:
        return float(self.state.get("seconds") or sum(row["seconds"] for row in self.rows))


@dataclass(frozen=True)
class ModelResults:
    """A model or an ensemble with the scores of its held-out cases.

    Parameters
    ----------
    name : str
        The model folder, "a+b" for an ensemble.
    run : dict
        run.json; empty for an ensemble, which has no folds either.
    planned_memory_gb : float or None
        Of a training step, as the plan predicts.
    scores : Scores
        Of all validated folds; without rows if there is none.
    fold_of : dict
        Case -> the fold that held it out.
    """

    name: str
    run: dict[str, Any]
    planned_memory_gb: float | None
    folds: tuple[FoldHistory, ...]
    scores: Scores
    fold_of: dict[str, str]

    @property
    def label(self) -> str:
        return " + ".join(self.name.split("+"))

    @cached_property
    def dice(self) -> float | None:
        """The foreground mean over all held-out cases."""
        return self.scores.foreground().mean

    @cached_property
    def worst_first(self) -> tuple[CaseScore, ...]:
        """The cases by their mean Dice; those without any label come last."""
        key = {row.case: row.mean_dice for row in self.scores.rows}
        return tuple(sorted(self.scores.rows, key=lambda row: (key[row.case] is None, key[row.case] or 0.0, row.case)))


@dataclass(frozen=True)
class Material:
    """All that the report is made from.

    Parameters
    ----------
    problems : tuple of dict
        From check.json.
    models : tuple of ModelResults
        The selected one first, then by Dice, those without scores last.
    selection : Selection or None
        None before `nnlite select`.
    notes : tuple of str
        What could not be read, and why.
    """

    paths: Paths
    dataset: Dataset
    plan: Plan
    fingerprint: Fingerprint | None
    problems: tuple[dict[str, Any], ...]
    models: tuple[ModelResults, ...]
    selection: Selection | None
    notes: tuple[str, ...]

    @property
    def scored(self) -> list[ModelResults]:
        """The models with at least one validated fold."""
        return [model for model in self.models if model.scores.rows]

    @property
    def trained(self) -> list[ModelResults]:
        """The models without the ensembles."""
        return [model for model in self.models if model.run]


def read_material(paths: Paths) -> Material:
    """Read everything about a dataset but its images.

    Raises
    ------
    UserError : the dataset is not planned, or one of its files is broken.
    """
    plan, dataset, selection = Plan.read(paths.plans), stored_dataset(paths.dataset), read_selection(paths)
    chosen = "+".join(selection.models) if selection else ""
    notes: list[str] = []
    models = list(_read_models(paths, dataset, notes))
    ensemble = paths.root / "ensembles" / chosen
    if "+" in chosen and ensemble.is_dir():
        models.append(ModelResults(chosen, {}, None, (), *_read_scores(ensemble, dataset, notes)))
    models.sort(key=lambda model: (model.name != chosen, model.dice is None, -(model.dice or 0.0), model.name))
    return Material(
        paths,
        dataset,
        plan,
        Fingerprint.read(paths.fingerprint) if paths.fingerprint.is_file() else None,
        tuple(read_json(paths.check)["problems"]) if paths.check.is_file() else (),
        tuple(models),
        selection,
        tuple(notes),
    )


def _read_models(paths: Paths, dataset: Dataset, notes: list[str]) -> Iterable[ModelResults]:
    for folder in model_folders(paths):
        try:
            run, plan = read_json(folder / "run.json"), Plan.read(folder / "plans.json")
        except UserError as error:
            notes.append(f"model {folder.name} is left out: {error}")
            continue
        folds = tuple(_read_fold(path) for path in sorted(folder.glob("fold_*")) if path.is_dir())
        memory = plan.configuration(run["configuration"]).memory_gb
        yield ModelResults(folder.name, run, memory, folds, *_read_scores(folder, dataset, notes))


def _read_fold(folder: Path) -> FoldHistory:
    state = read_weights_header(folder / MODEL) if (folder / MODEL).is_file() else {}
    file = folder / METRICS
    lines = file.read_text(encoding="utf-8").splitlines(keepends=True) if file.is_file() else []
    rows = tuple(json.loads(line) for line in lines if line.endswith("\n"))  # the last may be half written
    return FoldHistory(folder.name.removeprefix("fold_"), rows, state)


def _read_scores(folder: Path, dataset: Dataset, notes: list[str]) -> tuple[Scores, dict[str, str]]:
    """The scores of all validated folds, and the fold of each case."""
    rows: list[CaseScore] = []
    fold_of: dict[str, str] = {}
    for file in sorted(folder.glob("fold_*/validation/summary.json")):
        try:
            found = read_summaries([file], dataset.labels).rows
        except UserError as error:
            notes.append(f"scores are left out: {error}")
            continue
        rows += [row for row in found if row.case not in fold_of]
        fold = file.parent.parent.name.removeprefix("fold_")
        fold_of = {row.case: fold for row in found} | fold_of
    return Scores(tuple(rows), dataset.labels), fold_of
