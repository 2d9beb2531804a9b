"""The report of a dataset: one HTML page that contains everything it shows and never uses the network.

`write_report` reads the workspace and draws the cases (material.py). Each function `_..._section` returns what one
section of templates/report.html.j2 shows: tables and charts (figures.py), pictures
(pictures.py). `render_page` fills the template.
"""

from __future__ import annotations

import base64
import hashlib
import shlex
from collections import defaultdict
from collections.abc import Sequence
from datetime import datetime
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

import nnunet_lite
from nnunet_lite import log
from nnunet_lite.data.labels import label_colours
from nnunet_lite.data.problems import by_severity, plural
from nnunet_lite.errors import UserError, describe
from nnunet_lite.evaluation.audit import changed_since
from nnunet_lite.evaluation.calibration_rows import Row
from nnunet_lite.evaluation.metrics import METRICS
from nnunet_lite.evaluation.scores import CaseScore
from nnunet_lite.evaluation.selection import Candidate
from nnunet_lite.evaluation.statistics import Margin, Statistic, mean_of_known
from nnunet_lite.files import write_text
from nnunet_lite.inference.cases import output_file
from nnunet_lite.inference.quality import CaseQuality, Expected
from nnunet_lite.models.folder import VALIDATION, first_training
from nnunet_lite.planning.schema import Plan
from nnunet_lite.planning.show import length_unit, plan_head, plan_reasons, plan_rows, plan_title
from nnunet_lite.reporting import figures
from nnunet_lite.reporting.figures import Chart, Column, Curve, Table, Value, share_column
from nnunet_lite.reporting.material import FoldHistory, Material, ModelResults, draw_cases, draw_finding, read_material
from nnunet_lite.reporting.pictures import ERROR_COLOURS, Picture
from nnunet_lite.reporting.verdict import judge_training
from nnunet_lite.settings import Settings
from nnunet_lite.workspace import Paths

PAGE = "report.html"
_OF_PICTURES = {"bias field": "uneven light", "thick slices": "coarse along an axis"}  # names of their degraded copies
_INTENSITY_LABELS = 8  # labels whose intensities are drawn
_VOLUME_LABELS = 12  # labels whose volumes are drawn
_ROUNDING = 1e-4  # up to this relative difference, a quantity is equal in all cases
_DICE_LABELS = 12  # labels with a Dice for each case
_INTENSITY_BINS = 60
_CASES_TO_LOOK_AT = 8
_PALETTE = 10  # colours of report.css
_AUDITED_CASES = 8  # the first ones of the audit

# the metrics that the page shows of a case
_CASE_METRICS = (
    "Dice", "IoU", "reference_ml", "prediction_ml", "volume_error", "NSD", "HD95", "lesion_F1", "TP", "FP", "FN",
)  # fmt: skip
_LABEL_METRICS = ("Dice", "NSD", "HD95", "absolute_volume_error", "lesion_F1", "IoU")  # of a label, over all cases

Fact = tuple[str, str]  # what, and its value as text
Volumes = dict[str, dict[str, float]]  # case -> region -> volume in the reference


def write_report(paths: Paths, output: Path | None) -> Path:
    """Write the report of a planned dataset, whatever stage it has reached.

    Parameters
    ----------
    paths : Paths
        The workspace of the dataset.
    output : Path or None
        The file to write, or a folder for it; None for the folder of the dataset.

    Returns
    -------
    Path
        The file.

    Raises
    ------
    UserError
        The dataset is not planned, or one of its files is broken.
    """
    file = page_file(output or paths.root, PAGE)
    material = read_material(paths)
    for note in material.notes:
        log.warn(note)
    write_text(file, render_page(draw_cases(material)))
    return file


def page_file(output: Path, name: str) -> Path:
    """Return the file of a page: the output, or in a folder the name.

    Raises
    ------
    UserError
        The output is neither a folder nor the name of a page.
    """
    file = output / name if output.is_dir() else output
    if file.suffix.lower() not in (".html", ".htm"):
        raise UserError("a page is written as .html, or into a folder that exists", file, f"Use {file.name}.html.")
    return file


def render_page(material: Material) -> str:
    """Fill the template. It escapes all that comes from the data; its CSP stops every script but report.js.

    Parameters
    ----------
    material : Material
        From `draw_cases`.

    Returns
    -------
    str
        The page as HTML.
    """
    return fill_template(
        "report.html.j2",
        material,
        next_command=_next_command(material),
        data=_data_section(material),
        plan_title=plan_title(material.plan),
        plan_table=_plan_table(material.plan),
        plan_reasons=plan_reasons(material.plan),
        trainings=_training_section(material),
        verdicts=[judge_training(m, [split.name for split in material.splits]) for m in material.trained if m.begun],
        methods=_methods_section(material),
        models=_scores_section(material),
        comparison=_comparison_section(material),
        quality=_quality_section(material),
        audit=_audit_section(material),
        costs=costs_table(material),
        versions=_versions_table(material),
    )


def fill_template(template: str, material: Material, **content: Any) -> str:
    """Fill a template with content, and with what each page has: scripts, styles, names, and the cases to open.

    Parameters
    ----------
    template : str
        Its name.
    material : Material
        From `draw_cases`.
    **content
        What this template shows.

    Returns
    -------
    str
        The page as HTML.
    """
    environment = Environment(
        loader=PackageLoader("nnunet_lite.reporting"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.policies["json.dumps_kwargs"] = {"separators": (",", ":"), "ensure_ascii": False}
    environment.filters["duration"] = log.duration
    environment.globals["plural"] = plural
    script = _read_source("report.js")
    return environment.get_template(template).render(
        script=Markup(script),
        style=Markup(_read_source("report.css")),
        palette={"c": label_colours(_PALETTE), "e": ERROR_COLOURS.values()},
        script_hash=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
        material=material,
        version=nnunet_lite.__version__,
        date=datetime.now().astimezone().strftime("%d %B %Y, %H:%M"),
        labels=material.dataset.labels.region_names,
        page_data=_page_data(material),
        **content,
    )


def _read_source(name: str) -> str:
    """Read a file of this package that goes into the page as it is."""
    return (Path(__file__).parent / "templates" / name).read_text(encoding="utf-8")


def _case_value(material: Material, row: CaseScore, label: str, metric: str) -> float | None:
    """Return a metric of a case in the units of the page."""
    values, units, unit = row.metrics[label], material.units, METRICS[metric].unit
    if unit == "ml" and units.volume != "ml":
        voxels, pictures = values["n_ref" if metric == "reference_ml" else "n_pred"], material.pictures.get(row.case)
        geometry = pictures.geometry if pictures else None
        return None if voxels is None or geometry is None else units.volume_of(voxels, geometry)
    value = values[metric]
    return value * units.scale_of(metric) if value is not None and row.has_spacing else value


def metric_heading(material: Material, metric: str) -> str:
    """Return the heading of a metric with the unit of the page.

    Parameters
    ----------
    material : Material
        From `draw_cases`.
    metric : str
        A name of `METRICS`.
    """
    heading, units = METRICS[metric].heading, material.units
    if metric == "NSD":
        return f"NSD at 1 {'px' if units.length == 'pixels' else 'mm'}"
    named = heading.replace("ml", units.volume).replace("volume", units.size.lower())
    return f"{named} ({units.length})" if METRICS[metric].unit == "length" else named


def _interval(mean: float | None, ends: Statistic | Candidate) -> Value:
    """Write a 95 % interval, which is sorted by the mean."""
    return None if ends.low is None or ends.high is None else (f"{ends.low:.3f} to {ends.high:.3f}", mean)


def _times(values: Sequence[float], number_format: str = "g") -> str:
    """Write numbers as 40 × 56 × 40."""
    return " × ".join(f"{value:{number_format}}" for value in values)


# -------------------------------------------------------------------------------------------------------- the overview


def _next_command(material: Material) -> str:
    """Return the next command for the dataset; empty if there is none."""
    if not any(fold.state for model in material.trained for fold in model.folds):
        return first_training(material.paths).removesuffix(material.paths.option) + material.paths.where
    is_open = material.selection is None and len(material.scored) > 1
    return f"nnlite select{material.paths.where}" if is_open else ""


# ------------------------------------------------------------------------------------------------------------ the data


def _data_section(material: Material) -> dict[str, Any]:
    """Return what the check found, sizes, volumes and intensities."""
    volumes = _volumes(material)
    charts, constants = _spreads(material, volumes)
    return {
        "problems": by_severity(material.problems),
        "charts": charts,
        "constants": constants,
        "intensity_charts": _intensity_charts(material),
        "intensity_labels": material.dataset.labels.region_names[:_INTENSITY_LABELS],
        "intensity_table": _intensity_table(material),
        "cases": _case_table(material, volumes),
    }


def _volumes(material: Material) -> Volumes:
    """Return case -> region -> volume in the reference."""
    voxels = {case: pictures.voxels for case, pictures in material.pictures.items() if pictures.voxels}
    for model in material.scored:
        for row in model.scores.rows:
            voxels.setdefault(row.case, {name: int(values["n_ref"] or 0) for name, values in row.metrics.items()})
    geometries = {case: pictures.geometry for case, pictures in material.pictures.items() if pictures.geometry}
    return {
        case: {name: material.units.volume_of(n, geometries[case]) for name, n in regions.items()}
        for case, regions in voxels.items()
        if case in geometries
    }


def _spreads(material: Material, volumes: Volumes) -> tuple[list[Chart], list[Fact]]:
    """Draw histograms of sizes, spacings and volumes; a quantity that is equal in all cases is a fact."""
    geometries = [pictures.geometry for pictures in material.pictures.values() if pictures.geometry]
    units = material.units
    axes, unit = list(enumerate("zyx"))[-units.dimensions :], "pixels" if units.dimensions == 2 else "voxels"
    quantities: list[tuple[str, Sequence[float], str, str]] = []
    quantities += [(f"Size along {axis}", [g.shape[i] for g in geometries], unit, "") for i, axis in axes]
    if any(geometry.calibrated for geometry in geometries):
        quantities += [
            (f"Spacing along {axis}", [g.spacing[i] * units.per_mm for g in geometries], units.length, "")
            for i, axis in axes
        ]
    for name in material.dataset.labels.region_names[:_VOLUME_LABELS]:
        present = [regions[name] for regions in volumes.values() if regions[name]]
        note = f"; in {len(present)} of {len(volumes)} cases" if len(present) < len(volumes) else ""
        quantities.append((f"{units.size} of {name}", present, units.volume, note))
    charts, facts = [], []
    for title, values, unit, note in quantities:
        if not values:
            continue
        low, median, high = (f"{figures.rounded(v, 4):g}" for v in np.percentile(values, (0, 50, 100)))
        if max(values) - min(values) <= _ROUNDING * max(values):
            facts.append((title, f"{median} {unit} in every case{note}"))
        elif chart := figures.plot_histogram(title, values, unit, f"median {median} {unit}, {low} to {high}{note}"):
            charts.append(chart)
    return charts, facts


def _intensity_table(material: Material) -> Table:
    """Return statistics of the foreground, with which CT is normalized."""
    channels = material.plan.channels
    fields = {"mean": "mean", "SD": "std", "minimum": "min", "0.5 %": "percentile_00_5", "median": "median",
              "99.5 %": "percentile_99_5", "maximum": "max"}  # fmt: skip
    return Table("Intensities of all voxels that are not background", [
        Column("Channel", [channel.name for channel in channels]),
        Column("normalised", [channel.to_text() for channel in channels]),
        *(Column(heading, [getattr(channel.statistics, field) for channel in channels], ".4g")
          for heading, field in fields.items()),
    ])  # fmt: skip


def _intensity_charts(material: Material) -> list[Chart]:
    """Draw for each channel the densities of the intensities of each label and of the nonzero image."""
    samples = [pictures.intensities for pictures in material.pictures.values() if pictures.intensities]
    names = [name for name in material.dataset.labels.region_names if any(s[name].size for s in samples if name in s)]
    charts = []
    for i, channel in enumerate(material.plan.channels if samples else ()):
        values = {
            name: np.concatenate([s[name][i] for s in samples if name in s])
            for name in ("image", *names[:_INTENSITY_LABELS])
        }
        inside = values["image"][np.isfinite(values["image"])]
        if not inside.size:
            continue
        low, high = (float(v) for v in np.percentile(inside, (0.5, 99.5)))
        edges = np.linspace(low, high if high > low else low + (abs(low) or 1), _INTENSITY_BINS + 1)
        middles = [float(f"{v:.8g}") for v in (edges[:-1] + edges[1:]) / 2]
        curves = []
        for colour, (name, intensities) in enumerate(values.items(), -1):
            counts = np.histogram(intensities, edges)[0]
            density = [round(float(v), 3) for v in counts / max(counts.max(), 1)]
            curve_name, style = ("whole image", "dashed") if name == "image" else (name, "solid")
            curves.append(Curve(curve_name, list(zip(middles, density, strict=True)), colour, style))
        unit = "z-score of the image" if channel.normalization == "zscore" else "intensity"
        if chart := figures.plot_curves(f"Intensities, {channel.name}", curves, unit, "relative frequency", (0, 1.05)):
            charts.append(chart)
    return charts


def _case_table(material: Material, volumes: Volumes) -> Table:
    """Return every case with its size and the volumes of its labels."""
    cases, units = [case.id for case in material.dataset.cases], material.units
    geometries, n = [material.pictures[case].geometry for case in cases], units.dimensions
    sizes = ["not read" if g is None else (_times(g.shape[-n:]), float(prod(g.shape))) for g in geometries]
    columns = [Column("Case", cases), Column(f"size ({', '.join('zyx'[-n:])})", sizes, "d")]
    is_calibrated = units.length != "pixels"
    if is_calibrated:
        spacings = [[mm * units.per_mm for mm in g.spacing[-n:]] if g and g.calibrated else [] for g in geometries]
        texts = [(_times(one, ".4g"), float(prod(one))) if one else None for one in spacings]
        columns.append(Column(f"spacing ({units.length})", texts, "g"))
    for name in material.dataset.labels.region_names:
        of_label = [volumes.get(case, {}).get(name) for case in cases]
        columns.append(Column(f"{name} ({units.volume})", of_label, ".4g" if is_calibrated else ".0f"))
    return Table(f"All {len(cases)} cases", columns, sorted_by=0)


# ------------------------------------------------------------------------------------------- the plan and the training


def _plan_table(plan: Plan) -> Table:
    """Return a column for each configuration."""
    columns = enumerate(zip(plan_head(plan), zip(*plan_rows(plan), strict=True), strict=True))
    return Table("Configurations", [Column(name, values, "s" * (i > 0)) for i, (name, values) in columns])


def _training_section(material: Material) -> list[dict[str, Any]]:
    """Draw the curves of each model, a colour for each fold."""
    sections = []
    for model in material.trained:
        if folds := model.begun:
            names = [f"fold {fold.name}{'' if fold.state else ' (not finished)'}" for fold in folds]
            charts = training_charts([(f"fold {fold.name}", i, fold) for i, fold in enumerate(folds)])
            charts[2:2] = [chart for chart in [_label_curves(folds)] if chart]
            sections.append({"model": model.name, "charts": charts, "legend": names})
    return sections


def training_charts(folds: Sequence[tuple[str, int, FoldHistory]]) -> list[Chart]:
    """Draw the losses, the Dice and the learning rate of some folds.

    Parameters
    ----------
    folds : sequence of (str, int, FoldHistory)
        The name and the colour of each fold's curves.
    """

    def curves(key: str, what: str = "", style: str = "solid") -> list[Curve]:
        return [
            Curve(f"{name}{what}", [(row["epoch"], row.get(key)) for row in fold.rows], colour, style)
            for name, colour, fold in folds
        ]

    training, held_out = curves("train_loss", ", training"), curves("validation_loss", ", held-out patches", "dashed")
    losses = [curve for pair in zip(training, held_out, strict=True) for curve in pair]  # fold by fold in the legend
    charts = [
        figures.plot_curves("Loss", losses, "epoch", note="solid: training, dashed: held-out patches"),
        figures.plot_curves("Dice of held-out patches", curves("mean_dice"), "epoch", y_range=(0, 1)),
        figures.plot_curves("Learning rate", curves("lr"), "epoch", y_range=(0, None)),
    ]
    return [chart for chart in charts if chart]


def _label_curves(folds: list[FoldHistory]) -> Chart | None:
    """Draw the Dice of held-out patches of each label, a mean over the folds; of many labels, those that end lowest."""
    folds = [fold for fold in folds if fold.state] or folds
    common = set.intersection(*({row["epoch"] for row in fold.rows} for fold in folds))  # a mean of the same folds
    values: dict[str, dict[int, list[float]]] = defaultdict(lambda: defaultdict(list))
    for row in (row for fold in folds for row in fold.rows):
        for name, dice in row.get("dice", {}).items():
            if dice is not None and row["epoch"] in common:
                values[name][row["epoch"]].append(dice)
    points = {
        name: [(epoch, float(np.mean(dice))) for epoch, dice in sorted(of.items())] for name, of in values.items()
    }
    if len(points) < 2:
        return None
    names = sorted(points, key=lambda name: points[name][-1][1])[:_PALETTE]
    names = [name for name in points if name in names]  # in the order of the labels
    curves = [Curve(name, points[name], i) for i, name in enumerate(names)]
    notes = [f"mean of {len(folds)} folds"] if len(folds) > 1 else []
    notes += [f"the {len(names)} lowest of {len(points)} labels"] if len(names) < len(points) else []
    return figures.plot_curves("Dice by label", curves, "epoch", "", (0, 1), ", ".join(notes), names)


def costs_table(material: Material) -> Table:
    """Return time and memory of every fold.

    Parameters
    ----------
    material : Material
        From `read_material`.
    """
    trained = [(model, fold) for model in material.trained for fold in model.begun]
    folds = [fold for _, fold in trained]
    planned = [m.plan.configuration(m.run["configuration"]).memory_gb if m.plan else None for m, _ in trained]
    lengths = [(f"{fold.rows[-1]['epoch']}{'' if fold.state else ' so far'}", float(fold.rows[-1]["epoch"]))
               for fold in folds]  # fmt: skip
    devices = [(f.state.get("device", ""), f.state.get("arithmetic", {}).get("precision", "")) for f in folds]

    def medians(key: str) -> list[float]:
        return [float(np.median([row[key] for row in fold.rows])) for fold in folds]

    return Table("Time and memory of each fold", [
        Column("Model", [model.name for model, _ in trained]),
        Column("fold", [fold.name for fold in folds]),
        Column("epochs", lengths, "d"),
        Column("time", [(log.duration(fold.seconds), fold.seconds) for fold in folds], "g"),
        Column("s/epoch", medians("seconds"), ".3g"),
        Column("samples/s", medians("samples_per_second"), ".3g"),
        Column("waiting", medians("waiting"), ".0%"),
        Column("memory", [max(row["memory_gb"] for row in fold.rows) for fold in folds], ".2f", " GB"),
        Column("planned", planned, ".2f", " GB"),
        Column("predicting a case", [float(np.median(f.prediction_seconds)) if f.prediction_seconds else None
                                     for f in folds], ".3g", " s"),
        Column("device", [" ".join(filter(None, words)) for words in devices]),
    ])  # fmt: skip


# ---------------------------------------------------------------------------------------------------------- the scores


def _scores_section(material: Material) -> list[dict[str, Any]]:
    """Return for each model its scores by label, and all its held-out cases."""
    sections = []
    for model in material.scored:
        labels = _hardest_labels(model)
        dots = [(label, [(row.case, row.metrics[label]["Dice"]) for row in model.worst_first]) for label in labels]
        sections.append(
            {
                "model": model,
                "by_label": _label_table(material, model),
                "chart": figures.plot_dots(f"Dice of each case by label, {model.label}", dots, model.name),
                "omitted_labels": len(model.scores.labels.region_names) - len(labels),
                "agreement": _agreement_charts(material, model, labels),
                "table": _held_out_table(material, model, labels),
            }
        )
    return sections


def _held_out_table(material: Material, model: ModelResults, labels: Sequence[str]) -> Table:
    """Return every held-out case with its fold, its means over the labels, and the Dice of some labels."""
    rows, surfaces = model.worst_first, [metric for metric in ("NSD", "HD95") if metric in _measured(model)]
    means = {
        metric: [mean_of_known(_case_value(material, row, label, metric) for label in row.metrics) for row in rows]
        for metric in surfaces
    }
    columns = [
        Column("Case", [row.case for row in rows]),
        Column("fold", [model.fold_of[row.case] for row in rows]),
        share_column("mean Dice", [row.mean_dice for row in rows]),
        *(metric_column(material, metric, "mean", values) for metric, values in means.items()),
        *(share_column(label, [row.metrics[label]["Dice"] for row in rows]) for label in labels),
    ]
    return Table(f"Held-out cases of {model.label}, worst first", columns, sorted_by=2, model=model.name)


def _measured(model: ModelResults) -> list[str]:
    """Return the metrics of a label that a case has."""
    return [name for name in _LABEL_METRICS if np.isfinite(model.scores.values(name)).any()]


def _agreement_charts(material: Material, model: ModelResults, labels: Sequence[str]) -> list[Chart]:
    """Draw for each label how the volumes of the predictions agree with those of the references."""
    charts = []
    for label in labels:
        pairs = {
            row.case: tuple(_case_value(material, row, label, name) for name in ("reference_ml", "prediction_ml"))
            for row in model.scores.rows
        }
        volumes = {case: (a, b) for case, (a, b) in pairs.items() if a is not None and b is not None}
        title = f"{material.units.size} of {label}, {model.label}"
        charts.append(figures.plot_agreement(title, volumes, material.units.volume, model.name))
    return [chart for chart in charts if chart]


def _hardest_labels(model: ModelResults) -> list[str]:
    """Return the labels to show for each case: all, or those with the lowest mean Dice."""
    names = list(model.scores.labels.region_names)
    if len(names) > _DICE_LABELS:
        means = {name: 1.0 if s.mean is None else s.mean for name, s in model.scores.by_label().items()}
        names = sorted(names, key=means.__getitem__)[:_DICE_LABELS]
    return names


def _label_table(material: Material, model: ModelResults) -> Table:
    """Return one row for each label with means and medians, then those over all labels.

    A metric that other cases have than Dice says how many.
    """
    scores = model.scores
    dice = {**scores.by_label(), "all labels": scores.foreground()}
    columns = [Column("Label", list(dice)), Column("cases", [one.n for one in dice.values()], "d")]
    for name in _measured(model):
        scale, found = material.units.scale_of(name), [*scores.by_label(name).values(), scores.foreground(name)]
        for what in ("mean", "median"):
            values = [None if one.n == 0 else getattr(one, what) * scale for one in found]
            columns.append(metric_column(material, name, what, values))
        if (counts := [one.n for one in found]) != columns[1].values:  # HD95 needs both masks
            columns.append(Column(f"cases with {metric_heading(material, name).partition(' (')[0]}", counts, "d"))
    columns.insert(4, Column("95 % interval", [_interval(one.mean, one) for one in dice.values()], "g"))
    return Table("Scores of held-out cases, by label", columns)


def metric_column(material: Material, metric: str, what: str, values: Sequence[Value]) -> Column:
    """Return the column of a mean or median of a metric.

    Parameters
    ----------
    material : Material
        From `draw_cases`.
    metric : str
        A name of `METRICS`.
    what : str
        What stands before its name.
    values : sequence
        The cells, in the units of the page.
    """
    name, is_share = f"{what} {metric_heading(material, metric)}", METRICS[metric].better == "higher"
    return share_column(name, values) if is_share else Column(name, values, METRICS[metric].number_format)


def _page_data(material: Material) -> dict[str, Any]:
    """Return what report.js opens cases from: the metrics of every case, and the pictures."""
    names = material.dataset.labels.region_names
    models = {}
    for model in material.scored:
        scores = {
            row.case: [[_case_value(material, row, name, metric) for metric in _CASE_METRICS] for name in names]
            for row in model.worst_first
        }
        models[model.name] = {
            "label": model.label,
            "fold": model.fold_of,
            "scores": scores,
            "pictures": material.overlays[model.name],
            "view": {case: model.view_command(case) for case in scores},
        }
    return {
        "labels": list(names),
        "channels": [channel.name for channel in material.plan.channels],
        "errors": list(ERROR_COLOURS)[: 3 if len(names) > 1 else 2],  # with one label there is no other one
        "measures": [metric_heading(material, metric) for metric in _CASE_METRICS],
        "formats": [METRICS[metric].number_format for metric in _CASE_METRICS],
        "models": models,
    }


# ------------------------------------------------------------------------------------------------------ the comparison


def _comparison_section(material: Material) -> dict[str, Any]:
    """Return the candidates of `nnlite select` and the postprocessing that it chose; before it, the models."""
    selection = material.selection
    labels = material.dataset.labels.region_names
    candidates = selection.candidates if selection else [
        Candidate.of([model.label], model.scores.values(), labels, Margin(None)) for model in material.scored
    ]  # fmt: skip
    columns = [
        Column("Models", [c.name for c in candidates]),
        Column("cases", [c.n_cases for c in candidates], "d"),
        share_column("Dice", [c.dice for c in candidates]),
        Column("95 % interval", [_interval(c.dice, c) for c in candidates], "g"),
        share_column("median", [c.median for c in candidates]),
        *(share_column(name, [c.by_label.get(name) for c in candidates]) for name in labels),
    ]
    if selection:
        margins = [write_margin(c.margin) if i else ("", 0.0) for i, c in enumerate(candidates)]
        columns.insert(5, Column("best is better by", margins, "g"))
    caption = "Candidates of nnlite select, the best first" if selection else "Models on their held-out cases"
    bars = [(c.name, c.dice, c.low, c.high) for c in candidates]
    rules = selection.postprocessing if selection else {}
    gains = [selection.postprocessing_gain.get(label) for label in rules] if selection else []
    return {
        "table": Table(caption, columns, sorted_by=2, first_is_best=bool(selection)),
        "chart": figures.plot_intervals("Dice of the candidates", bars, "mean Dice with 95 % interval"),
        "postprocessing": Table("Postprocessing of the predictions", [
            Column("Label", list(rules)),
            Column("what is kept", [str(rule) for rule in rules.values()]),
            share_column("Dice before", [None if gain is None else gain.before for gain in gains]),
            share_column("after", [None if gain is None else gain.after for gain in gains]),
            Column("cases that did not choose it", [None if gain is None else gain.n for gain in gains], "d"),
        ]),
    }  # fmt: skip


def write_margin(margin: Margin) -> Value:
    """Write a difference with its 95 % interval.

    Parameters
    ----------
    margin : Margin
        From `compare_paired`.
    """
    if margin.mean is None:
        return None
    ends = "" if margin.low is None or margin.high is None else f" ({margin.low:+.4f} to {margin.high:+.4f})"
    return f"{margin.mean:+.4f}{ends}", margin.mean


# ---------------------------------------------------------------------------------------------- the expected quality


def _quality_section(material: Material) -> dict[str, Any]:
    """Return how the Dice that `nnlite predict` expects agrees with the real one; empty before it is calibrated.

    All is said by what was fitted without the case.
    """
    rows = [(row, row.quality) for row in material.calibration if row.quality is not None]
    by_kind = {kind: [pair for pair in rows if pair[0].kind == kind] for kind in dict.fromkeys(r.kind for r, _ in rows)}
    if (clean := by_kind.get("clean")) is None:
        return {}
    of_kinds, labels = [_expected_pairs(of_kind) for of_kind in by_kind.values()], list(clean[0][0].dice)
    of_labels = [_expected_pairs(clean, label) for label in labels]
    means = {row.case: (row.mean_dice or 0.0, judged.mean or 0.0) for row, judged in clean}
    lacking = {case: expected - real for case, (real, expected) in means.items()}
    worse = [pair for pair in clean if lacking[pair[0].case] > 0]
    first = sorted(worse, key=lambda pair: -lacking[pair[0].case])[:_CASES_TO_LOOK_AT]
    flat = material.units.dimensions == 2
    flagged = [mean_of_known(bool(judged.flags) for _, judged in of_kind) for of_kind in by_kind.values()]
    return {
        "cases": plural(len(clean), "held-out case"),
        "copies": f"{len(rows) - len(clean)} degraded copies",
        "chart": figures.plot_agreement("Expected against real Dice", means, "Dice", "", ("expected", "real")),
        "by_kind": Table("Held-out cases and degraded copies", [
            Column("Images", [_OF_PICTURES.get(kind, kind) if flat else kind for kind in by_kind]),
            Column("number", [len(of_kind) for of_kind in by_kind.values()], "d"),
            share_column("real Dice", [mean_of_known(dice for _, dice in pairs) for pairs in of_kinds]),
            *_error_columns(of_kinds),
            Column("flagged", flagged, ".0%"),
        ]),
        "by_label": Table("Held-out cases by label", [
            Column("Label", labels), Column("cases", [len(pairs) for pairs in of_labels], "d"),
            *_error_columns(of_labels),
        ]),
        "first": Table("Cases to look at first: less like the reference than expected", [
            Column("Case", [row.case for row, _ in first]),
            share_column("expected Dice", [judged.mean for _, judged in first]),
            share_column("real Dice", [row.mean_dice for row, _ in first]),
            Column("90 % interval", [judged.in_cells()[1] for _, judged in first]),
            Column("why", ["; ".join(judged.flags) for _, judged in first]),
        ]),
    }  # fmt: skip


Pairs = list[tuple[Expected, float]]  # what is expected of a label, and its Dice


def _expected_pairs(rows: Sequence[tuple[Row, CaseQuality]], only: str | None = None) -> Pairs:
    """Return what is expected of each label, or of one, and its Dice."""
    return [
        (expected, dice)
        for row, judged in rows
        for label, dice in row.dice.items()
        if dice is not None and (expected := judged.expected[label]) is not None and only in (None, label)
    ]


def _error_columns(groups: Sequence[Pairs]) -> list[Column]:
    """Return the mean absolute error of the expected Dice, and the share of real ones in the interval."""
    errors = [mean_of_known(abs(one.dice - dice) for one, dice in pairs) for pairs in groups]
    covered = [mean_of_known(one.low <= dice <= one.high for one, dice in pairs) for pairs in groups]
    return [Column("mean error", errors, ".3f"), Column("in the 90 % interval", covered, ".0%")]


# ------------------------------------------------------------------------------------------------------ the label audit


def _audit_section(material: Material) -> dict[str, Any] | None:
    """Return the first cases of the audit, with a prediction at the place and a command; None without an audit."""
    audit, cases = material.audit, {case.id: case for case in material.dataset.cases}
    if audit is None:
        return None
    first = [one for one in audit.suspicious if one.case in cases][:_AUDITED_CASES]
    changed = changed_since(audit, material.paths, [cases[one.case] for one in first])
    examples = []
    for one in (one for one in first if one.case not in changed):
        folds = (fold for name in audit.models for fold in sorted((material.paths.models / name).glob("fold_*")))
        files = (output_file(cases[one.case], fold / VALIDATION) for fold in folds)
        command, planes = ["nnlite", "view", one.case, "--at", *map(str, one.findings[0].place)], list[Picture]()
        if file := next((file for file in files if file.is_file()), None):
            command += ["-m", file.parents[2].name]
            try:
                planes = draw_finding(material, cases[one.case], file, one.findings[0])
            except (UserError, OSError) as error:
                log.warn(f"{one.case}: {describe(error)}")
        examples.append((one, one.findings[0], planes, shlex.join(command) + material.paths.where))
    return {"audit": audit, "changed": changed, "examples": examples}


# -------------------------------------------------------------------------------------- the methods and the settings


def _methods_section(material: Material) -> dict[str, Any]:
    """Return what methods.html.j2 says about the selected models, otherwise the best one, and about their scores."""
    selection = material.selection
    models = [model for model in material.trained if model.begun]
    models = [model for model in models if model.name in selection.models] if selection else models[:1]
    name = "+".join(selection.models if selection else [model.name for model in models])
    result = next((model for model in material.scored if model.name == name), None)
    units, described = material.units, []
    for model in models:
        assert model.plan is not None  # an ensemble has none
        folds = [fold for fold in model.begun if fold.state] or model.begun
        lengths = sorted(fold.rows[-1]["epoch"] for fold in folds)
        more = f"{lengths[0]} to " if lengths[0] < lengths[-1] else ""
        planned = model.plan.configuration(model.run["configuration"])
        described.append({
            "name": model.name, "plan": model.plan, "configuration": planned,
            "settings": Settings.model_validate(model.run["settings"]), "versions": model.run.get("versions", {}),
            "unit": length_unit(model.plan), "is_resampled": not _has_spacing(material, model.plan, planned.spacing),
            "normalizations": _normalizations(model.plan), "epochs": more + plural(lengths[-1], "epoch"),
        })  # fmt: skip
    held_out = set(result.fold_of.values()) if result else set()
    scores = {metric: result.scores.foreground(metric) for metric in _measured(result)} if result else {}
    return {
        "models": described,
        "result": result,
        "folds": sorted(held_out),
        "n_training": sorted({len(split.training) for split in material.splits if split.name in held_out}),
        "metrics": [
            (metric_heading(material, metric).partition(" (")[0], f" {units.length}" if metric == "HD95" else "",
             units.scale_of(metric), statistic)
            for metric, statistic in scores.items() if metric in ("Dice", "NSD", "HD95")
        ],
    }  # fmt: skip


def _has_spacing(material: Material, plan: Plan, spacing: Sequence[float]) -> bool:
    """Return whether all images have a spacing, in the plan's order of axes, so that none was resampled."""
    if material.fingerprint is None:
        return False
    found = np.array(material.fingerprint.spacings)[:, list(plan.axis_order)]
    return np.allclose(found[:, -len(spacing) :], spacing)


def _normalizations(plan: Plan) -> list[tuple[list[str], Any]]:
    """Group the channels that are normalised in the same way: (names, one of them)."""
    groups: dict[tuple[Any, ...], list[Any]] = defaultdict(list)
    for channel in plan.channels:
        clip = tuple(channel.clip_percentiles or ())
        groups[(channel.normalization, channel.use_mask, clip)].append(channel)
    return [([channel.name for channel in group], group[0]) for group in groups.values()]


def _versions_table(material: Material) -> Table:
    """Return seed and versions of the models."""
    runs = {model.name: model.run for model in material.trained}
    about = [{**run["settings"], **run, **run.get("versions", {})} for run in runs.values()]
    packages = list(dict.fromkeys(package for run in runs.values() for package in run.get("versions", {})))
    columns = [Column(key, [str(one.get(key, "")) for one in about]) for key in ("began", "recipe", "seed", *packages)]
    return Table("Versions and seeds of the models", [Column("Model", list(runs)), *columns])
