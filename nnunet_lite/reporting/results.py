"""The sections of the page that tell how good the models are: scores, their cases, and the comparison of all."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from markupsafe import Markup

from nnunet_lite.evaluation.metrics import Measures
from nnunet_lite.evaluation.scores import CaseScore, Scores, Statistic
from nnunet_lite.reporting.collect import Material, Model, mean_dice
from nnunet_lite.reporting.gallery import Gallery
from nnunet_lite.reporting.plots import dots, intervals
from nnunet_lite.reporting.tables import Cell, Line, Row, Table, interval, number, score

_MOST_CELLS = 20_000  # of all case tables; with more labels than fit, a table shows the mean and the lowest label
_MOST_DOTS = 12  # rows of the chart
STATIC_CASES = 3  # of each model whose pictures are in the page itself, for paper and without JavaScript

# as they are called on the page, with the field of `Measures` and how to write it
MEASURES: tuple[tuple[str, str, str], ...] = (
    ("Dice", "dice", ".4f"),
    ("IoU", "iou", ".4f"),
    ("reference (ml)", "reference_ml", ".4g"),
    ("prediction (ml)", "prediction_ml", ".4g"),
    ("volume error", "volume_error", "+.1%"),
    ("NSD", "nsd", ".4f"),
    ("HD95 (mm)", "hd95_mm", ".3g"),
    ("lesion F1", "lesion_f1", ".3f"),
    ("TP", "tp", "d"),
    ("FP", "fp", "d"),
    ("FN", "fn", "d"),
)


def label_table(scores: Scores, names: Sequence[str]) -> Table:
    """One row per label, then the mean over them."""
    fields = ("iou", "absolute_volume_error", "lesion_f1")
    others = [{**scores.by_label(field), "all labels": scores.foreground(field)} for field in fields]
    dice = {**scores.by_label(), "all labels": scores.foreground()}
    rows = []
    for name in (*names, "all labels"):
        of = dice[name]
        iou, volume, lesion = (other[name].mean for other in others)
        rows.append((name, Cell(str(of.n), of.n), score(of.mean), Cell(interval(of.low, of.high), of.mean),
                     score(of.median), score(iou), number(volume, ".1%"), score(lesion)))  # fmt: skip
    head = ("Label", "cases", "mean Dice", "95 % interval", "median", "IoU", "abs. volume error", "lesion F1")
    return Table.plain("Scores of held-out cases, by label", head, rows)


def case_rows(model: Model, wide: bool) -> Table:
    """One row per held-out case, the worst first."""
    names = model.scores.labels.region_names
    rows = []
    for row in model.worst_first:
        cells = [Cell(row.case), Cell(model.fold_of.get(row.case, "")), score(mean_dice(row))]
        if wide:
            cells += [score(row.measures[name].dice) for name in names]
        else:
            cells += _lowest(row)
        rows.append(Row(tuple(cells), row.case, model.name))
    head = ("Case", "fold", "mean Dice", *(names if wide else ("lowest Dice", "of label")))
    texts = (0, 1) if wide else (0, 1, 4)
    return Table(f"Held-out cases of {model.label}, worst first", tuple(head), tuple(rows), sorted_by=2, texts=texts)


def _lowest(row: CaseScore) -> list[Cell]:
    known = [(m.dice, name) for name, m in row.measures.items() if m.dice is not None]
    if not known:
        return [Cell("n/a"), Cell("")]
    dice, name = min(known)
    return [score(dice), Cell(name)]


def is_wide(material: Material) -> bool:
    """Whether case tables have a column for each label."""
    cases = sum(len(model.worst_first) for model in material.scored)
    return cases * (len(material.dataset.labels.region_names) + 3) <= _MOST_CELLS


def dice_chart(model: Model) -> Markup:
    """A dot for each case and label, the lowest labels first where there are too many."""
    statistics = model.scores.by_label()
    names = list(model.scores.labels.region_names)
    if len(names) > _MOST_DOTS:
        names = sorted(names, key=lambda name: _or_one(statistics[name]))[:_MOST_DOTS]
    rows = [(name, [(row.case, row.measures[name].dice) for row in model.worst_first]) for name in names]
    return dots(f"Dice of each case by label, {model.label}", rows, model.name)


def _or_one(statistic: Statistic) -> float:
    return 1.0 if statistic.mean is None else statistic.mean


def model_view(model: Model, material: Material, gallery: Gallery) -> dict[str, Any]:
    """Everything that the page shows of the scores of a model."""
    names = material.dataset.labels.region_names
    shown = gallery.shown[model.name]
    return {
        "name": model.name,
        "label": model.label,
        "dice": model.scores.foreground(),
        "cases": len(model.worst_first),
        "shown": len(shown),
        "folds": sorted(set(model.fold_of.values())),
        "labels": label_table(model.scores, names),
        "table": case_rows(model, is_wide(material)),
        "chart": dice_chart(model),
        "too_many": len(names) - _MOST_DOTS,
        "worst": [
            {"case": row.case, "dice": mean_dice(row), "planes": gallery.seen[row.case].overlays[model.name]}
            for row in model.worst_first
            if row.case in shown[:STATIC_CASES]
        ],
    }


def page_data(material: Material, gallery: Gallery) -> dict[str, Any]:
    """What report.js opens cases from: every measure of every case, and the pictures."""
    names = material.dataset.labels.region_names
    models = {}
    for model in material.scored:
        shown = set(gallery.shown[model.name])
        models[model.name] = {
            "label": model.label,
            "fold": model.fold_of,
            "scores": {row.case: [_numbers(row.measures[name]) for name in names] for row in model.worst_first},
            "pictures": {case: gallery.seen[case].overlays[model.name] for case in shown},
        }
    return {
        "labels": list(names),
        "channels": [channel.name for channel in material.plan.channels],
        "measures": [name for name, *_ in MEASURES],
        "forms": [form for *_, form in MEASURES],
        "models": models,
    }


def _numbers(measures: Measures) -> list[float | None]:
    return [getattr(measures, field) for _, field, _ in MEASURES]


# ------------------------------------------------------------------------------------------------------ the comparison


def comparison(material: Material) -> dict[str, Any]:
    """The candidates of inference.json, else the models as they are."""
    if material.selection is None:
        return _of_models(material)
    chosen, candidates = material.selection, material.selection.get("candidates", [])
    labels = list(dict.fromkeys(name for candidate in candidates for name in candidate.get("by_label", {})))
    rows = []
    for place, candidate in enumerate(candidates):
        by_label, margin = candidate.get("by_label", {}), candidate.get("margin") or {}
        cells = [
            Cell(" + ".join(candidate["models"])),
            Cell(str(candidate.get("n_cases", "")), candidate.get("n_cases")),
        ]
        cells += [
            score(candidate["dice"]),
            Cell(interval(candidate.get("low"), candidate.get("high")), candidate["dice"]),
        ]
        cells += [_margin(margin) if place else Cell("", 0.0)]
        cells += [score(by_label.get(name)) for name in labels]
        rows.append(Row(tuple(cells), marked=place == 0))
    head = ("Models", "cases", "Dice", "95 % interval", "best is better by", *labels)
    table = Table("Candidates of nnlite select, the best first", head, tuple(rows), sorted_by=2)
    bars = [(" + ".join(c["models"]), c["dice"], c.get("low"), c.get("high")) for c in candidates]
    return {
        "selected": " + ".join(chosen.get("models", ())),
        "made": chosen.get("made", ""),
        "table": table if rows else None,
        "chart": intervals("Dice of the candidates", bars, "mean Dice with 95 % interval") if bars else Markup(""),
        "postprocessing": _postprocessing(chosen),
    }


def _margin(margin: dict[str, Any]) -> Cell:
    if margin.get("mean") is None:
        return Cell("n/a")
    ends = interval(margin.get("low"), margin.get("high"), "+.4f")
    return Cell(f"{margin['mean']:+.4f}" + ("" if ends == "n/a" else f" ({ends})"), margin["mean"])


def _postprocessing(selection: dict[str, Any]) -> Table | None:
    """What is done to the predictions of each label, and what that gains."""
    rows = []
    for label, steps in selection.get("postprocessing", {}).items():
        smallest = steps.get("min_size_mm3")
        done = ["only the largest component is kept"] if steps.get("largest_component") else []
        unit = steps.get("unit", "mm3").replace("mm3", "mm³").replace("mm2", "mm²")
        done += [f"components below {smallest:g} {unit} are removed"] if smallest else []
        gain = selection.get("postprocessing_gain", {}).get(label, {})
        others = number(gain.get("n"), "d")
        rows.append((label, ", ".join(done) or "nothing", score(gain.get("before")), score(gain.get("after")), others))
    head = ("Label", "what is done", "Dice before", "after", "cases that did not choose it")
    return Table.plain("Postprocessing of the predictions", head, rows, texts=(0, 1)) if rows else None


def _of_models(material: Material) -> dict[str, Any]:
    names = material.dataset.labels.region_names
    rows: list[Line] = []
    bars = []
    for model in material.scored:
        of, by_label = model.scores.foreground(), model.scores.by_label()
        line: Line = [model.label, number(of.n, "d"), ", ".join(sorted(set(model.fold_of.values()))), score(of.mean)]
        rows.append([*line, Cell(interval(of.low, of.high), of.mean), *(score(by_label[name].mean) for name in names)])
        if of.mean is not None:
            bars.append((model.label, of.mean, of.low, of.high))
    head = ("Model", "cases", "folds", "Dice", "95 % interval", *names)
    return {
        "selected": "",
        "table": Table.plain("Models on their held-out cases", head, rows, texts=(0, 2), sorted_by=3) if rows else None,
        "chart": intervals("Dice of the models", bars, "mean Dice with 95 % interval") if len(bars) > 1 else Markup(""),
        "postprocessing": None,
    }
