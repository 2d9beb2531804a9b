"""What the workspace has of a data set, at whatever stage: what the report tells of."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from nnunet_lite.data.dataset import Dataset, dataset_from_json
from nnunet_lite.errors import UserError
from nnunet_lite.evaluation.scores import CaseScore, Scores
from nnunet_lite.evaluation.summary import read_summaries
from nnunet_lite.files import read_json
from nnunet_lite.planning.fingerprint import Fingerprint
from nnunet_lite.planning.schema import Plan
from nnunet_lite.workspace import Paths

SELECTION, ENSEMBLES = "inference.json", "ensembles"


@dataclass(frozen=True)
class Fold:
    """One fold of a model: its epochs (rows of metrics.jsonl), and how it ended, empty while it trains."""

    name: str
    rows: tuple[dict[str, Any], ...]
    state: dict[str, Any]


@dataclass(frozen=True)
class Model:
    """A model or an ensemble (which has no run, plan or folds of its own), with the scores of its held-out cases.

    Parameters
    ----------
    run : run.json.
    plan : what was trained; None where its plans.json cannot be read.
    scores : of all validated folds; without rows where there is none.
    fold_of : case -> the fold that held it out.
    """

    name: str
    folder: Path
    run: dict[str, Any]
    plan: Plan | None
    folds: tuple[Fold, ...]
    scores: Scores
    fold_of: dict[str, str]

    @cached_property
    def dice(self) -> float | None:
        """The foreground mean over all held-out cases."""
        return self.scores.foreground().mean

    @cached_property
    def worst_first(self) -> tuple[CaseScore, ...]:
        """Its cases by their mean Dice; those without any label come last."""
        return tuple(
            sorted(self.scores.rows, key=lambda row: (mean_dice(row) is None, mean_dice(row) or 0.0, row.case))
        )

    @property
    def label(self) -> str:
        return " + ".join(self.name.split("+"))


@dataclass(frozen=True)
class Material:
    """Everything that the report is made of.

    Parameters
    ----------
    models : the selected one first, then by Dice, those without scores last.
    selection : inference.json, None before `nnlite select`.
    notes : what was passed over, and why.
    """

    paths: Paths
    dataset: Dataset
    plan: Plan
    fingerprint: Fingerprint | None
    problems: tuple[dict[str, Any], ...]
    models: tuple[Model, ...]
    selection: dict[str, Any] | None
    notes: tuple[str, ...]

    @property
    def scored(self) -> list[Model]:
        return [model for model in self.models if model.scores.rows]


def mean_dice(row: CaseScore) -> float | None:
    """The mean over the labels that are in a case or its prediction."""
    known = [measures.dice for measures in row.measures.values() if measures.dice is not None]
    return sum(known) / len(known) if known else None


def collect(paths: Paths) -> Material:
    """Read what there is.

    Raises
    ------
    UserError : the data set is not planned, or one of its files is broken.
    """
    plan, dataset = Plan.read(paths.plans), dataset_from_json(read_json(paths.dataset))
    selection = read_json(paths.root / SELECTION) if (paths.root / SELECTION).is_file() else None
    chosen = "+".join(selection.get("models", ())) if selection else ""
    notes: list[str] = []
    models = list(_models(paths, dataset, notes))
    ensemble = paths.root / ENSEMBLES / chosen
    if "+" in chosen and ensemble.is_dir():
        scores, fold_of = _scores(ensemble, dataset, notes)
        models.append(Model(chosen, ensemble, {}, None, (), scores, fold_of))
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


def _models(paths: Paths, dataset: Dataset, notes: list[str]) -> Iterable[Model]:
    from nnunet_lite.models.folder import model_folders

    for folder in model_folders(paths):
        try:
            run, plan = read_json(folder / "run.json"), Plan.read(folder / "plans.json")
        except UserError as error:
            notes.append(f"model {folder.name} is left out: {error}")
            continue
        folds = tuple(_fold(path) for path in sorted(folder.glob("fold_*")) if path.is_dir())
        yield Model(folder.name, folder, run, plan, folds, *_scores(folder, dataset, notes))


def _fold(folder: Path) -> Fold:
    from nnunet_lite.models.folder import MODEL
    from nnunet_lite.training.record import METRICS

    state = {}
    if (folder / MODEL).is_file():
        from nnunet_lite.models.checkpoint import read_state

        state = read_state(folder / MODEL)
    file = folder / METRICS
    lines = file.read_text(encoding="utf-8").splitlines(keepends=True) if file.is_file() else []
    rows = tuple(json.loads(line) for line in lines if line.endswith("\n"))  # the last may be half written
    return Fold(folder.name.removeprefix("fold_"), rows, state)


def _scores(folder: Path, dataset: Dataset, notes: list[str]) -> tuple[Scores, dict[str, str]]:
    """The scores of all validated folds, and the fold of each case."""
    rows: list[CaseScore] = []
    fold_of: dict[str, str] = {}
    for file in sorted(folder.glob("fold_*/validation/summary.json")):
        try:
            found = read_summaries([file], dataset.labels).rows
        except UserError as error:
            notes.append(f"scores are left out: {error}")
            continue
        fold = file.parent.parent.name.removeprefix("fold_")
        new = [row for row in found if row.case not in fold_of]
        fold_of |= {row.case: fold for row in new}
        rows += new
    return Scores(tuple(rows), dataset.labels), fold_of
