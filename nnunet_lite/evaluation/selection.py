"""What `nnlite select` found, as inference.json holds it and `nnlite predict` obeys it."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from html import escape
from pathlib import Path
from typing import Any

from nnunet_lite.errors import UserError
from nnunet_lite.evaluation.postprocessing import Gain
from nnunet_lite.evaluation.rules import Rule
from nnunet_lite.evaluation.statistics import Margin
from nnunet_lite.files import read_json, write_json
from nnunet_lite.models.folder import MODEL, is_finished
from nnunet_lite.workspace import Paths

FORMAT = "nnlite-inference-1"
_FINGERPRINT_BYTES = 1 << 22  # of a file of weights: its header says how they were trained, and all weights differ
_AGAIN = "Run `nnlite select` again."


@dataclass(frozen=True)
class Candidate:
    """A model, or two that vote, on the held-out cases that all candidates have predicted.

    Parameters
    ----------
    models : names of model folders.
    dice, low, high : foreground mean (of the labels' means) with its 95 % interval.
    by_label : mean Dice of each label or region; None where no case has it.
    margin : by how much the winner is better, on the same cases.
    """

    models: tuple[str, ...]
    n_cases: int
    dice: float | None
    low: float | None
    high: float | None
    by_label: dict[str, float | None]
    margin: Margin

    @property
    def name(self) -> str:
        return " + ".join(self.models)


@dataclass(frozen=True)
class Selection:
    """The models to predict with, and what is done with their label maps.

    Parameters
    ----------
    models : names of model folders; two vote with the mean of their probabilities.
    folds : of each, whose networks are averaged.
    postprocessing : label or region -> rule, of those that it helps.
    gains : label or region -> mean Dice before and after, of those, on cases that did not choose the rule.
    candidates : the winner first, then the others from the best on.
    weights : model -> fold -> fingerprint, to notice that it was trained since.
    notes : what the comparison leaves out, and why labels have no postprocessing.
    made : date, ISO. version : of nnunet_lite.
    """

    models: tuple[str, ...]
    folds: tuple[str, ...]
    postprocessing: dict[str, Rule]
    gains: dict[str, Gain]
    candidates: tuple[Candidate, ...]
    weights: dict[str, dict[str, str]]
    notes: tuple[str, ...]
    made: str
    version: str

    def to_json(self) -> dict[str, Any]:
        """The content of inference.json."""
        return {
            "format": FORMAT,
            "models": list(self.models),
            "folds": list(self.folds),
            "postprocessing": {label: asdict(rule) for label, rule in self.postprocessing.items()},
            "postprocessing_gain": {label: gain._asdict() for label, gain in self.gains.items()},
            "candidates": [{**asdict(one), "models": list(one.models)} for one in self.candidates],
            "weights": self.weights,
            "notes": list(self.notes),
            "made": self.made,
            "version": self.version,
        }

    @classmethod
    def from_json(cls, value: Any, file: Path) -> Selection:
        """From the content of inference.json.

        Raises
        ------
        UserError : it is none.
        """
        try:
            if value["format"] != FORMAT or not value["models"] or not value["folds"]:
                raise ValueError(value["format"])
            candidates = [
                Candidate(**{**one, "models": tuple(one["models"]), "margin": Margin(**one["margin"])})
                for one in value["candidates"]
            ]
            return cls(
                models=tuple(value["models"]),
                folds=tuple(map(str, value["folds"])),
                postprocessing={label: Rule(**rule).checked() for label, rule in value["postprocessing"].items()},
                gains={label: Gain(**gain).checked() for label, gain in value["postprocessing_gain"].items()},
                candidates=tuple(candidates),
                weights=value.get("weights", {}),
                notes=tuple(value.get("notes", ())),
                made=str(value["made"]),
                version=str(value["version"]),
            )
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise UserError(f"is no selection of the form {FORMAT} ({error})", file, _AGAIN) from None

    @property
    def unconfirmed(self) -> list[str]:
        """The labels whose rule was chosen and measured on the same cases, by a version that did so."""
        return [label for label in self.postprocessing if label not in self.gains or self.gains[label].n is None]

    @property
    def how(self) -> str:
        """The models, folds and rules in a line."""
        return in_words(self.models, self.folds, self.postprocessing)

    def to_text(self) -> str:
        """Plain text: the candidates, the winner first; then the postprocessing and the notes."""
        head, *rows = self._rows()
        widths = [max(map(len, column)) for column in zip(head, *rows, strict=True)]
        lines = [
            "  ".join([first.ljust(widths[0]), *(c.rjust(w) for c, w in zip(rest, widths[1:], strict=True))]).rstrip()
            for first, *rest in (head, *rows)
        ]
        words = [
            f"postprocessing of {label}: {rule}, {self.gains.get(label, 'gain unknown')}"
            for label, rule in self.postprocessing.items()
        ]
        words = words or ["postprocessing: none"]
        return "\n".join([*lines, *words, *(f"note: {note}" for note in self.notes)])

    def _repr_html_(self) -> str:
        """The same for a notebook."""
        head, *rows = ["".join(f"<td>{escape(cell)}</td>" for cell in row) for row in self._rows()]
        body = "".join(f"<tr>{row}</tr>" for row in rows)
        rules = escape(f"postprocessing: {rules_in_words(self.postprocessing)}")
        head = head.replace("td>", "th>")
        return f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table><p>{rules}</p>"

    def _rows(self) -> list[tuple[str, ...]]:
        """The candidates as text, after the names of the columns."""
        labels = list(self.candidates[0].by_label) if self.candidates else []
        shown = labels if 1 < len(labels) <= 5 else []  # more would not fit a terminal
        rows: list[tuple[str, ...]] = [("candidate", "n", "Dice", "95 % interval", *shown, "winner's margin", "95 %")]
        for i, one in enumerate(self.candidates):
            each = [_number(one.by_label[label]) for label in shown]
            margin = ("selected", "") if i == 0 else (_signed(one.margin.mean), _interval(one.margin, _signed))
            rows.append((one.name, str(one.n_cases), _number(one.dice), _interval(one, _number), *each, *margin))
        return rows


def _number(value: float | None) -> str:
    return "n/a" if value is None else f"{value:.4f}"


def _signed(value: float | None) -> str:
    return "n/a" if value is None else f"{value:+.4f}"


def _interval(of: Candidate | Margin, as_text: Any) -> str:
    return "n/a" if of.low is None else f"{as_text(of.low)} to {as_text(of.high)}"


def in_words(models: Sequence[str], folds: Sequence[str], rules: Mapping[str, Rule]) -> str:
    """Models, folds and rules in a line."""
    which = f"fold{'s' * (len(folds) > 1)} {', '.join(folds)}"
    return f"{' and '.join(models)}, {which}; postprocessing: {rules_in_words(rules)}"


def rules_in_words(rules: Mapping[str, Rule]) -> str:
    return "; ".join(f"{label}: {rule}" for label, rule in rules.items()) or "none"


def read_selection(paths: Paths) -> Selection | None:
    """What was selected for a data set; None where nothing was.

    Raises
    ------
    UserError : inference.json is not readable.
    """
    return Selection.from_json(read_json(paths.inference), paths.inference) if paths.inference.is_file() else None


def write_selection(paths: Paths, selection: Selection) -> None:
    write_json(paths.inference, selection.to_json())


def require_models(paths: Paths, selection: Selection) -> list[Path]:
    """The folders of the selected models.

    Raises
    ------
    UserError : one of them is gone, or one of its folds.
    """
    folders = [paths.models / Path(name).name for name in selection.models]
    for folder in folders:
        for fold in selection.folds:
            if not is_finished(folder / f"fold_{fold}"):
                what = f"names fold {fold} of the model {folder.name}, which is gone"
                raise UserError(what, paths.inference, f"{_AGAIN[:-1]}, or name a model with -m or -c.")
    return folders


def trained_since(paths: Paths, selection: Selection) -> list[str]:
    """The selected models of which a fold has other weights than when they were selected."""
    return [
        name
        for name, folds in selection.weights.items()
        if any(fingerprint(paths.models / name, fold) != weights for fold, weights in folds.items())
    ]


def fingerprints(folders: Sequence[Path], folds: Sequence[str]) -> dict[str, dict[str, str]]:
    """Model -> fold -> `fingerprint`."""
    return {folder.name: {fold: fingerprint(folder, fold) for fold in folds} for folder in folders}


def fingerprint(folder: Path, fold: str) -> str:
    """What tells a fold's weights from those of another training, of a cascade with its first stage's; "" for none.

    It takes the size and the first megabytes of the file, which are read in an instant.
    """
    run = read_json(folder / "run.json") if (folder / "run.json").is_file() else {}
    stages = [folder, *([folder.parent / Path(run["previous"]).name] if run.get("previous") else [])]
    digest = hashlib.sha256()
    for stage in stages:
        file = stage / f"fold_{fold}" / MODEL
        if not file.is_file():
            return ""
        digest.update(str(file.stat().st_size).encode())
        with file.open("rb") as content:
            digest.update(content.read(_FINGERPRINT_BYTES))
    return digest.hexdigest()[:16]
