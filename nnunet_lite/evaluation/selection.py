"""What `nnlite select` found: the models, folds and postprocessing with which `nnlite predict` predicts.

It is stored as inference.json. `comparison.py` makes it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import product
from pathlib import Path
from typing import Any, Literal

import numpy as np
from pydantic import BaseModel, Field

from nnunet_lite import log
from nnunet_lite.data.problems import align, html_table
from nnunet_lite.errors import UserError
from nnunet_lite.evaluation.postprocessing import Gain, Rule
from nnunet_lite.evaluation.scores import four_digits
from nnunet_lite.evaluation.statistics import Margin, summarize
from nnunet_lite.files import read_validated, understood
from nnunet_lite.models.bundle import MANIFEST, is_zip, read_manifest
from nnunet_lite.models.folder import is_finished, trained_folds, weights_fingerprint
from nnunet_lite.models.lookup import choose_model, read_model
from nnunet_lite.workspace import Paths

_SELECT_AGAIN = "Run `nnlite select` again."


class Candidate(BaseModel, frozen=True):
    """A model, or two that vote, on the held-out cases that all candidates have predicted.

    Parameters
    ----------
    models : tuple of str
        Names of model folders.
    n_cases : int
        Number of held-out cases.
    dice, low, high : float or None
        The foreground mean (of the means of the labels) with its 95 % interval.
    median : float or None
        The median over cases of their means over labels; None in a file of an older version.
    by_label : dict
        Mean Dice of each label or region; None if no case has it.
    margin : Margin
        By how much the winner is better, on the same cases.
    """

    models: tuple[str, ...]
    n_cases: int
    dice: float | None
    low: float | None
    high: float | None
    median: float | None = None
    by_label: dict[str, float | None]
    margin: Margin

    @classmethod
    def of(cls, models: Sequence[str], dice: np.ndarray, labels: Sequence[str], margin: Margin) -> Candidate:
        """Sum up the Dice of models (cases, labels)."""
        mean, by_label = summarize(dice), zip(labels, dice.T, strict=True)
        means = {name: summarize(column[:, None]).mean for name, column in by_label}
        return cls(models=tuple(models), n_cases=len(dice), dice=mean.mean, low=mean.low, high=mean.high,
                   median=mean.median, by_label=means, margin=margin)  # fmt: skip

    @property
    def name(self) -> str:
        return " + ".join(self.models)


class Selection(BaseModel, frozen=True, coerce_numbers_to_str=True):
    """The models to predict with, and what is done with their label maps: the content of inference.json.

    Parameters
    ----------
    format : str
        The format of the file.
    models : tuple of str
        Names of model folders. Two vote with the mean of their probabilities.
    folds : tuple of str
        The folds of each model, whose networks are averaged.
    postprocessing : dict
        Label or region -> rule, of those that it helps.
    postprocessing_gain : dict
        Label or region -> mean Dice before and after, on cases that did not choose the rule.
    candidates : tuple of Candidate
        The winner first, then the others from the best on.
    weights : dict
        Model -> fold -> fingerprint of its weights, to notice that it was trained since.
    notes : tuple of str
        What the comparison leaves out, and why labels have no postprocessing.
    made : str
        The date (ISO).
    version : str
        The version of nnunet_lite.
    """

    format: Literal["nnlite-inference-1"]
    models: tuple[str, ...] = Field(min_length=1)
    folds: tuple[str, ...] = Field(min_length=1)
    postprocessing: dict[str, Rule]
    postprocessing_gain: dict[str, Gain]
    candidates: tuple[Candidate, ...]
    weights: dict[str, dict[str, str]] = {}
    notes: tuple[str, ...] = ()
    made: str
    version: str

    def to_json(self) -> dict[str, Any]:
        """Return the content of inference.json."""
        return self.model_dump(mode="json")

    @property
    def unconfirmed(self) -> list[str]:
        """The labels whose rule was chosen and measured on the same cases, by an older version."""
        gains = self.postprocessing_gain
        return [label for label in self.postprocessing if label not in gains or gains[label].n is None]

    @property
    def summary(self) -> str:
        """The models, folds and rules in a line."""
        return describe_selection(self.models, self.folds, self.postprocessing)

    def to_text(self) -> str:
        """Write the candidates as plain text, the winner first; then the postprocessing and the notes."""
        return "\n".join([align(self._lines()), *self._remarks()])

    def _remarks(self) -> list[str]:
        rules = [
            f"postprocessing of {label}: {rule}, {self.postprocessing_gain.get(label, 'gain unknown')}"
            for label, rule in self.postprocessing.items()
        ]
        return [*(rules or ["postprocessing: none"]), *(f"note: {note}" for note in self.notes)]

    def __repr__(self) -> str:
        return f"Selection: {self.summary}"

    def _repr_html_(self) -> str:
        return html_table(self._lines(), self._remarks())

    def _lines(self) -> list[tuple[str, ...]]:
        """Return the cells of the table, after the headings."""
        labels = list(self.candidates[0].by_label) if self.candidates else []
        shown = labels if 1 < len(labels) <= 5 else []  # more would not fit a terminal
        lines: list[tuple[str, ...]] = [
            ("candidate", "n", "Dice", "95 % interval", "median", *shown, "winner's margin", "95 %")
        ]
        for i, one in enumerate(self.candidates):
            by_label = [four_digits(one.by_label[label]) for label in shown]
            interval = "n/a" if one.low is None else f"{one.low:.4f} to {one.high:.4f}"
            margin = "n/a" if one.margin.mean is None else f"{one.margin.mean:+.4f}"
            ends = "n/a" if one.margin.low is None else f"{one.margin.low:+.4f} to {one.margin.high:+.4f}"
            row = (one.name, str(one.n_cases), four_digits(one.dice), interval, four_digits(one.median), *by_label)
            lines.append((*row, margin, ends) if i else (*row, "selected", ""))
        return lines


def describe_selection(models: Sequence[str], folds: Sequence[str], rules: Mapping[str, Rule]) -> str:
    """Write models, folds and rules in a line.

    Parameters
    ----------
    models, folds : sequence of str
        Names of model folders, and of their folds.
    rules : dict
        Label or region -> rule.
    """
    trained = f"{' and '.join(models)}, fold{'s' * (len(folds) > 1)} {', '.join(folds)}"
    return f"{trained}; postprocessing: {describe_rules(rules) or 'none'}"


def describe_rules(rules: Mapping[str, Rule]) -> str:
    """Write rules in a line.

    Parameters
    ----------
    rules : dict
        Label or region -> rule.
    """
    return "; ".join(f"{label}: {rule}" for label, rule in rules.items())


def read_selection(paths: Paths) -> Selection | None:
    """Read what was selected for a dataset; None if nothing was.

    Parameters
    ----------
    paths : Paths
        The workspace of the dataset.

    Raises
    ------
    UserError
        The file cannot be read.
    """
    what = "is no selection of the form nnlite-inference-1"
    return read_validated(paths.inference, Selection, what, _SELECT_AGAIN)


def choose_models(
    paths: Paths | None,
    models: Sequence[Path],
    configurations: Sequence[str],
    folds: list[str] | None,
    postprocess: bool,
) -> tuple[list[Path], list[str] | None, dict[str, Rule]]:
    """Choose the models that predict: the given ones, otherwise the selected ones, otherwise the trained one.

    The selected postprocessing is done only if exactly the selected models predict. A zip contains that of its model.

    Parameters
    ----------
    paths : Paths, optional
        The files of the dataset; None if `models` are given, which may be among the selected ones too.
    models : sequence of Path
        Model folders or zips.
    configurations : sequence of str
        Configurations whose trained models predict.
    folds : list of str, optional
        The given folds.
    postprocess : bool
        Whether label maps are postprocessed.

    Returns
    -------
    folders : list of Path
        The models.
    folds : list of str, optional
        Folds of them; None for all that are trained.
    rules : dict of str to Rule
        The postprocessing of each label.

    Raises
    ------
    UserError
        No model is trained, or a selected one does not exist any more.
    """
    folders = list(models) if paths is None else [choose_model(paths, name) for name in configurations]
    paths = paths or Paths(folders[0].absolute().parent.parent)
    in_dataset = all(folder.absolute().parent == paths.models for folder in folders)
    selection = read_selection(paths) if in_dataset else None
    if selection is None or (folders and {folder.name for folder in folders} != set(selection.models)):
        folders = folders or [choose_model(paths)]
        rules = packed_rules(folders[0]) if postprocess and len(folders) == 1 else {}
        if rules:
            log.info(f"{folders[0]}: postprocessing: {describe_rules(rules)}")
        return folders, folds, rules
    selected = [paths.models / Path(name).name for name in selection.models]
    for folder, fold in product([] if folders else selected, selection.folds):
        if not is_finished(folder / f"fold_{fold}"):
            what = f"names fold {fold} of the model {folder.name}, which does not exist any more"
            raise UserError(what, paths.inference, f"{_SELECT_AGAIN[:-1]}, or name a model with -m or -c.")
    folds = list(selection.folds) if folds is None else folds
    rules = selection.postprocessing if postprocess else {}
    if doubtful := [label for label in selection.unconfirmed if label in rules]:
        rules = {label: rule for label, rule in rules.items() if label not in doubtful}
        what = f"the postprocessing of {', '.join(doubtful)} was chosen and measured on the same cases"
        log.warn(f"{what}, and is not applied; `nnlite select` chooses and confirms it on different cases")
    log.info(f"{paths.inference}: {describe_selection(selection.models, folds, rules)}")
    if rules:  # the model has names of labels that may have been changed since it was trained, in the same order
        own = read_model(selected[0])[0].labels.region_names
        called = {old: new for one in selection.candidates[:1] for old, new in zip(one.by_label, own, strict=False)}
        rules = {called.get(label, label): rule for label, rule in rules.items()}
    if changed := changed_models(paths, selection):
        what = f"{' and '.join(changed)} changed since that was selected ({selection.made})"
        log.warn(f"{what}; `nnlite select` compares them again")
    return folders or selected, folds, rules


def packed_rules(folder: Path) -> dict[str, Rule]:
    """Return the postprocessing in a zip, or in that from which a model was imported."""
    if not (is_zip(folder) or (folder / MANIFEST).is_file()):
        return {}
    with understood(folder / MANIFEST, "Export the model again."):
        stored = read_manifest(folder).about.get("postprocessing", {})
        return {label: Rule.model_validate(rule) for label, rule in stored.items()}


def changed_models(paths: Paths, selection: Selection) -> list[str]:
    """Return the selected models of which a fold has other weights than when they were selected, or was trained since.

    Parameters
    ----------
    paths : Paths
        The workspace of the dataset.
    selection : Selection
        From `read_selection`.
    """
    alone = len(selection.models) == 1  # of two that vote, one may have had folds that the other lacks
    return [
        name
        for name, folds in selection.weights.items()
        if any(weights_fingerprint(paths.models / name, fold) != weights for fold, weights in folds.items())
        or (alone and not {*trained_folds(paths.models / name)} <= {*folds})
    ]
