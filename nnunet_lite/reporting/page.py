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
from nnunet_lite.data.problems import plural
from nnunet_lite.errors import UserError, describe
from nnunet_lite.evaluation.audit import changed_since
from nnunet_lite.evaluation.calibration_rows import Row
from nnunet_lite.evaluation.metrics import METRICS
from nnunet_lite.evaluation.scores import CaseScore
from nnunet_lite.evaluation.selection import Candidate
from nnunet_lite.evaluation.statistics import Margin, Statistic
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
from nnunet_lite.reporting.verdict import Verdict, judge_training
from nnunet_lite.settings import Settings
from nnunet_lite.training.splits import load_splits
from nnunet_lite.workspace import Paths

PAGE = "report.html"
_PLANE_SIZE, _PICTURE_SIZE = 240, 320  # pixels on the page along the longer side of a plane, and of a flat image
_INTENSITY_LABELS = 8  # labels whose intensities are drawn
_VOLUME_LABELS = 12  # labels whose volumes are drawn
_ROUNDING = 1e-4  # up to this relative difference, a quantity is equal in all cases
_DICE_LABELS = 12  # labels with a Dice for each case
_INTENSITY_BINS = 60
_CASES_TO_LOOK_AT = 8
_PALETTE = 10  # colours of report.css
_AUDITED_CASES = 8  # the first ones of the audit
_SEVERITIES = ("error", "warning", "notice")

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
    material = read_material(paths)
    for note in material.notes:
        log.warn(note)
    return write_page(output or paths.root, PAGE, render_page(draw_cases(material)))


def write_page(output: Path, name: str, page: str) -> Path:
    """Write a page to a file, or under a name into a folder; returns the file.

    Parameters
    ----------
    output : Path
        The file or the folder.
    name : str
        Its name in a folder.
    page : str
        HTML.
    """
    file = output / name if output.is_dir() else output
    write_text(file, page)
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
        overview=_overview_section(material),
        data=_data_section(material),
        plan=_plan_section(material),
        trainings=_training_section(material),
        size=material.units.size,
        verdicts=verdicts(material),
        methods=_methods_section(material),
        models=_scores_section(material),
        comparison=_comparison_section(material),
        quality=_quality_section(material),
        audit=_audit_section(material),
        costs=costs_table(material),
        settings=_settings_section(material),
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
    environment.filters |= {"page_size": _page_size}
    script, style = _read_source("report.js"), _read_source("report.css") + _picture_colours()
    return environment.get_template(template).render(
        script=Markup(script),
        style=Markup(style),
        script_hash=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
        name=material.paths.name,
        version=nnunet_lite.__version__,
        date=datetime.now().astimezone().strftime("%d %B %Y, %H:%M"),
        labels=material.dataset.labels.region_names,
        errors=error_names(material),
        page_data=page_data(material),
        **content,
    )


def _read_source(name: str) -> str:
    """Read a file of this package that goes into the page as it is."""
    return (Path(__file__).parent / "templates" / name).read_text(encoding="utf-8")


def _page_size(plane: Picture) -> tuple[float, float]:
    """Return width and height of a plane on the page."""
    scale = (_PICTURE_SIZE if plane["of"] == 1 else _PLANE_SIZE) / max(plane["mm"])
    return round(scale * plane["mm"][0], 1), round(scale * plane["mm"][1], 1)


def _picture_colours() -> str:
    """Return the colours of labels and errors on pictures as a rule of CSS."""
    named = {"c": label_colours(_PALETTE), "e": ERROR_COLOURS.values()}
    rules = [f"--{name}{i}: rgb{colour};" for name, colours in named.items() for i, colour in enumerate(colours)]
    return f".plane svg, .swatch-on-picture {{ {' '.join(rules)} }}\n"


def error_names(material: Material) -> list[str]:
    """Return the kinds of errors; with one label there is no other one.

    Parameters
    ----------
    material : Material
        From `read_material`.
    """
    return list(ERROR_COLOURS)[: 3 if len(material.dataset.labels.region_names) > 1 else 2]


def verdicts(material: Material) -> list[Verdict]:
    """Say how the training of each model went.

    Parameters
    ----------
    material : Material
        From `read_material`.
    """
    splits = material.paths.splits
    folds = [split.name for split in load_splits(splits)] if splits.is_file() else []
    models = [model for model in material.trained if any(fold.rows for fold in model.folds)]
    return [judge_training(model, material.paths, folds) for model in models]


def _case_value(material: Material, row: CaseScore, label: str, metric: str) -> float | None:
    """Return a metric of a case in the units of the page."""
    values, units, unit = row.metrics[label], material.units, METRICS[metric].unit
    if unit == "ml" and units.volume != "ml":
        voxels, pictures = values["n_ref" if metric == "reference_ml" else "n_pred"], material.pictures.get(row.case)
        geometry = pictures.geometry if pictures else None
        return None if voxels is None or geometry is None else units.volume_of(voxels, geometry)
    value = values[metric]
    return value * units.per_mm if value is not None and unit == "length" and row.has_spacing else value


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


def _overview_section(material: Material) -> dict[str, Any]:
    """Return cards (what, figure, detail), the next command, and what the report leaves out."""
    labels, plan = material.dataset.labels, material.plan
    named = plural(len(labels.region_names), "region" if labels.has_regions else "label")
    cards = [
        ("Cases", str(len(material.dataset.cases)), f"{named}, {plural(len(plan.channels), 'channel')}"),
        ("Configurations", str(len(plan.configurations)), ", ".join(plan.configurations)),
    ]
    finished = {model.name: sum(bool(fold.state) for fold in model.folds) for model in material.trained}
    if finished:
        n_folds = len(load_splits(material.paths.splits)) if material.paths.splits.is_file() else 0
        begun = {model.name: sum(bool(fold.rows) for fold in model.folds) for model in material.trained}
        folds = "; ".join(
            f"{name}: {n}"
            + (f" of {n_folds}" if n_folds else "")
            + (f", {begun[name] - n} not finished" if begun[name] > n else "")
            for name, n in finished.items()
        )
        seconds = sum(fold.seconds for model in material.models for fold in model.folds)
        cards.append(("Folds trained", str(sum(finished.values())), folds))
        cards.append(("Training time", log.duration(seconds), "all folds and models"))
    if material.scored and (dice := material.scored[0].scores.foreground()).mean is not None:
        interval = _interval(dice.mean, dice)
        ends = f", 95 % interval {interval[0]}" if isinstance(interval, tuple) else ""
        cards.append(
            (
                "Dice, held-out",
                f"{dice.mean:.3f}",
                f"{material.scored[0].label}, {plural(dice.n, 'case')}, median {dice.median:.3f}{ends}",
            )
        )
    following = "nnlite select" if material.selection is None and len(material.scored) > 1 else ""
    if not any(finished.values()):
        following = first_training(material.paths).removesuffix(material.paths.option)
    return {"cards": cards, "next": following and following + material.paths.where, "notes": material.notes}


# ------------------------------------------------------------------------------------------------------------ the data


def _data_section(material: Material) -> dict[str, Any]:
    """Return what the dataset contains, what its check found, the montage, sizes, volumes and intensities."""
    dataset, labels = material.dataset, material.dataset.labels
    regions = zip(labels.region_names, labels.region_values, strict=True)
    named = [f"{name} ({', '.join(map(str, values))})" for name, values in regions]
    named += [] if labels.ignore is None else [f"ignore ({labels.ignore})"]
    volumes = _volumes(material)
    charts, constants = _spreads(material, volumes)
    return {
        "facts": [
            ("Cases", f"{len(dataset.cases)} with a label map"),
            ("Channels", ", ".join(f"{c.name} ({c.to_text()})" for c in material.plan.channels)),
            ("Regions" if labels.has_regions else "Labels", ", ".join(named)),
            ("Layout", f"{dataset.layout}, {dataset.file_ending}"),
            ("Folder", str(dataset.root)),
            *(("Understood", note) for note in dataset.notes),
        ],
        "problems": _problems(material),
        "tiles": [(case, pictures.tile) for case, pictures in material.pictures.items() if pictures.tile],
        "charts": charts,
        "constants": constants,
        "intensity_charts": _intensity_charts(material),
        "intensity_labels": labels.region_names[:_INTENSITY_LABELS],
        "intensity_table": _intensity_table(material),
        "cases": _case_table(material, volumes),
    }


def _problems(material: Material) -> list[tuple[tuple[str, ...], list[str]]]:
    """Group the problems of the check, errors first: ((severity, found, expected, fix), files)."""
    files: dict[tuple[str, ...], list[str]] = {}
    for problem in sorted(material.problems, key=lambda problem: _SEVERITIES.index(problem["severity"])):
        key = tuple(problem[name] for name in ("severity", "found", "expected", "fix"))
        files.setdefault(key, []).append(problem["file"])
    return list(files.items())


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
    numbers = ("mean", "SD", "minimum", "0.5 %", "median", "99.5 %", "maximum")
    rows: list[list[Value]] = []
    for channel in material.plan.channels:
        s = channel.statistics
        values = (s.mean, s.std, s.min, s.percentile_00_5, s.median, s.percentile_99_5, s.max)
        rows.append([channel.name, channel.to_text(), *values])
    columns = (Column("Channel"), Column("normalised"), *(Column(name, ".4g") for name in numbers))
    return Table("Intensities of all labelled voxels", columns, rows)


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
    names, units = material.dataset.labels.region_names, material.units
    is_calibrated, axes = units.length != "pixels", ", ".join("zyx"[-units.dimensions :])
    rows: list[list[Value]] = []
    for case in material.dataset.cases:
        place = material.pictures[case.id].geometry
        size: Value = "not read"
        spacing: Value = None
        if place is not None:
            size = _times(place.shape[-units.dimensions :]), float(prod(place.shape))
        if place is not None and place.calibrated:
            lengths = [length * units.per_mm for length in place.spacing[-units.dimensions :]]
            spacing = _times(lengths, ".4g"), float(prod(lengths))
        sizes = [size, spacing] if is_calibrated else [size]
        rows.append([case.id, *sizes, *(volumes.get(case.id, {}).get(name) for name in names)])
    columns = [Column("Case"), Column(f"size ({axes})", "d")]
    columns += [Column(f"spacing ({units.length})", "g")] if is_calibrated else []
    columns += [Column(f"{name} ({units.volume})", ".4g" if is_calibrated else ".0f") for name in names]
    return Table(f"All {len(rows)} cases", columns, rows, sorted_by=0)


# ------------------------------------------------------------------------------------------- the plan and the training


def _plan_section(material: Material) -> dict[str, Any]:
    """Return the configurations, the reasons for them, and their networks."""
    plan = material.plan
    name, *others = plan_head(plan)
    networks = {name: c.network for name, c in plan.configurations.items()}
    return {
        "title": plan_title(plan),
        "table": Table("Configurations", [Column(name), *(Column(other, "s") for other in others)], plan_rows(plan)),
        "reasons": plan_reasons(plan),
        "networks": [
            (name, f"{n.kind}{' U-Net' * (n.kind in ('plain', 'residual'))}, "
                   f"features {'-'.join(map(str, n.features))}, kernels {', '.join(map(_times, n.kernels))}, "
                   f"strides {', '.join(map(_times, n.strides))}, {n.norm} normalisation")
            for name, n in networks.items()
        ],
    }  # fmt: skip


def _training_section(material: Material) -> list[dict[str, Any]]:
    """Draw the curves of each model, a colour for each fold."""
    sections = []
    for model in material.trained:
        folds = [fold for fold in model.folds if fold.rows]
        if folds:
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
    losses = (("train_loss", ", training", "solid"), ("validation_loss", ", held-out patches", "dashed"))
    kinds: tuple[tuple[str, Sequence[tuple[str, str, str]], tuple[float | None, float | None], str], ...] = (
        ("Loss", losses, (None, None), "solid: training, dashed: held-out patches"),
        ("Dice of held-out patches", [("mean_dice", "", "solid")], (0, 1), ""),
        ("Learning rate", [("lr", "", "solid")], (0, None), ""),
    )
    charts = []
    for title, keys, limits, note in kinds:
        curves = [
            Curve(f"{name}{what}", [(row["epoch"], row.get(key)) for row in fold.rows], colour, style)
            for name, colour, fold in folds
            for key, what, style in keys
        ]
        charts.append(figures.plot_curves(title, curves, "epoch", "", limits, note))
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
    rows: list[list[Value]] = []
    for model, fold in ((m, fold) for m in material.trained for fold in m.folds if fold.rows):
        keys = ("seconds", "samples_per_second", "waiting")
        medians = [float(np.median([row[key] for row in fold.rows])) for key in keys]
        epochs, arithmetic = fold.rows[-1]["epoch"], fold.state.get("arithmetic", {})
        time = (f"{epochs}{'' if fold.state else ' so far'}", float(epochs)), (log.duration(fold.seconds), fold.seconds)
        planned = model.plan.configuration(model.run["configuration"]).memory_gb if model.plan else None
        memory = max(row["memory_gb"] for row in fold.rows), planned
        prediction = float(np.median(fold.prediction_seconds)) if fold.prediction_seconds else None
        device = f"{fold.state.get('device', '')} {arithmetic.get('precision', '')}".strip()
        rows.append([model.name, fold.name, *time, *medians, *memory, prediction, device])
    columns = (
        Column("Model"), Column("fold"), Column("epochs", "d"), Column("time", "g"), Column("s/epoch", ".3g"),
        Column("samples/s", ".3g"), Column("waiting", ".0%"), Column("memory", ".2f", " GB"),
        Column("planned", ".2f", " GB"), Column("predicting a case", ".3g", " s"), Column("device"),
    )  # fmt: skip
    return Table("Time and memory of each fold", columns, rows)


# ---------------------------------------------------------------------------------------------------------- the scores


def _scores_section(material: Material) -> list[dict[str, Any]]:
    """Return for each model its scores by label, all its held-out cases, and pictures of some of them."""
    sections = []
    for model in material.scored:
        rows, pictures, labels = model.worst_first, material.overlays[model.name], _hardest_labels(model)
        dots = [(label, [(row.case, row.metrics[label]["Dice"]) for row in rows]) for label in labels]
        means = {row.case: row.mean_dice for row in rows}
        sections.append(
            {
                "name": model.name,
                "label": model.label,
                "cases": plural(len(rows), "held-out case"),
                "folds": sorted(set(model.fold_of.values())),
                "by_label": _label_table(material, model),
                "chart": figures.plot_dots(f"Dice of each case by label, {model.label}", dots, model.name),
                "omitted_labels": len(model.scores.labels.region_names) - len(labels),
                "agreement": _agreement_charts(material, model, labels),
                "table": _held_out_table(material, model, labels),
                "examples": [
                    (case, what, means[case], pictures[case], _view_command(material, case, model))
                    for case, what in model.examples.items()
                    if case in pictures
                ],
            }
        )
    return sections


def _held_out_table(material: Material, model: ModelResults, labels: Sequence[str]) -> Table:
    """Return every held-out case with its fold, its means over the labels, and the Dice of some labels."""
    surfaces = [metric for metric in ("NSD", "HD95") if metric in _measured(model)]
    columns = [Column("Case"), Column("fold"), share_column("mean Dice")]
    columns += [metric_column(material, metric, "mean") for metric in surfaces]
    columns += map(share_column, labels)
    rows: list[list[Value]] = []
    for row in model.worst_first:
        means = [row.mean_dice, *(_label_mean(material, row, metric) for metric in surfaces)]
        rows.append([row.case, model.fold_of[row.case], *means, *(row.metrics[label]["Dice"] for label in labels)])
    return Table(f"Held-out cases of {model.label}, worst first", columns, rows, sorted_by=2, model=model.name)


def _measured(model: ModelResults) -> list[str]:
    """Return the metrics of a label that a case has."""
    return [name for name in _LABEL_METRICS if np.isfinite(model.scores.values(name)).any()]


def _label_mean(material: Material, row: CaseScore, metric: str) -> float | None:
    """Return the mean of a metric over the labels of a case."""
    values = [_case_value(material, row, label, metric) for label in row.metrics]
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None


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


def _view_command(material: Material, case: str, model: ModelResults) -> str:
    """Return the command that shows a case with the prediction of a model, which may be one of another dataset."""
    command, root = shlex.join(["nnlite", "view", case, "-m", model.folder.name]), model.folder.parents[1]
    if root == material.paths.root:
        return command + material.paths.where
    return f"{command} {shlex.join(['-d', root.name, '-w', str(root.parent)])}"


def _hardest_labels(model: ModelResults) -> list[str]:
    """Return the labels to show for each case: all, or those with the lowest mean Dice."""
    names = list(model.scores.labels.region_names)
    if len(names) > _DICE_LABELS:
        means = {name: 1.0 if s.mean is None else s.mean for name, s in model.scores.by_label().items()}
        names = sorted(names, key=means.__getitem__)[:_DICE_LABELS]
    return names


def _label_table(material: Material, model: ModelResults) -> Table:
    """Return one row for each label with means and medians, then those over all labels."""
    scores, columns = model.scores, [Column("Label"), Column("cases", "d")]
    dice = {**scores.by_label(), "all labels": scores.foreground()}
    rows: list[list[Value]] = [[label, one.n] for label, one in dice.items()]
    for name in _measured(model):
        scale = material.units.per_mm if METRICS[name].unit == "length" else 1.0
        for row, one in zip(rows, [*scores.by_label(name).values(), scores.foreground(name)], strict=True):
            row += [None if value is None else value * scale for value in (one.mean, one.median)]
        columns += [metric_column(material, name, what) for what in ("mean", "median")]
    for row, one in zip(rows, dice.values(), strict=True):
        row.insert(4, _interval(one.mean, one))
    columns.insert(4, Column("95 % interval", "g"))
    return Table("Scores of held-out cases, by label", columns, rows)


def metric_column(material: Material, metric: str, what: str) -> Column:
    """Return the column of a mean or median of a metric.

    Parameters
    ----------
    material : Material
        From `draw_cases`.
    metric : str
        A name of `METRICS`.
    what : str
        What stands before its name.
    """
    name = f"{what} {metric_heading(material, metric)}"
    return share_column(name) if METRICS[metric].better == "higher" else Column(name, METRICS[metric].number_format)


def page_data(material: Material) -> dict[str, Any]:
    """Return what report.js opens cases from: the metrics of every case, and the pictures.

    Parameters
    ----------
    material : Material
        From `draw_cases`.
    """
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
            "view": {case: _view_command(material, case, model) for case in scores},
        }
    return {
        "labels": list(names),
        "channels": [channel.name for channel in material.plan.channels],
        "errors": error_names(material),
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
    rows: list[list[Value]] = []
    for c in candidates:
        margin = () if selection is None else (write_margin(c.margin) if rows else ("", 0.0),)
        dice = [c.by_label.get(name) for name in labels]
        rows.append([c.name, c.n_cases, c.dice, _interval(c.dice, c), c.median, *margin, *dice])
    columns = [Column("Models"), Column("cases", "d"), share_column("Dice"), Column("95 % interval", "g"),
               share_column("median")]  # fmt: skip
    columns += [] if selection is None else [Column("best is better by", "g")]
    caption = "Models on their held-out cases" if selection is None else "Candidates of nnlite select, the best first"
    bars = [(c.name, c.dice, c.low, c.high) for c in candidates]
    steps: list[list[Value]] = []
    for label, rule in ({} if selection is None else selection.postprocessing).items():
        gain = selection.postprocessing_gain.get(label) if selection else None
        steps.append([label, str(rule), *((gain.before, gain.after, gain.n) if gain else (None, None, None))])
    step_columns = (Column("Label"), Column("what is kept"), share_column("Dice before"), share_column("after"),
                    Column("cases that did not choose it", "d"))  # fmt: skip
    return {
        "selected": " + ".join(selection.models) if selection else "",
        "date": selection.made if selection else "",
        "table": Table(
            caption, [*columns, *map(share_column, labels)], rows, sorted_by=2, first_is_best=bool(selection)
        ),
        "chart": figures.plot_intervals("Dice of the candidates", bars, "mean Dice with 95 % interval"),
        "postprocessing": Table("Postprocessing of the predictions", step_columns, steps),
    }


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
    clean = [(row, judged) for row, judged in rows if row.kind == "clean"]
    if not clean:
        return {}
    pairs = {kind: _expected_pairs([pair for pair in rows if pair[0].kind == kind]) for kind in dict.fromkeys(
        row.kind for row in material.calibration)}  # fmt: skip
    by_kind: list[list[Value]] = []
    for kind, found in pairs.items():
        flagged = [bool(judged.flags) for row, judged in rows if row.kind == kind]
        error, covered = _errors(found)
        real = float(np.mean([dice for _, dice in found])) if found else None
        by_kind.append([kind, len(flagged), real, error, covered, float(np.mean(flagged))])
    by_label: list[list[Value]] = []
    for label in clean[0][0].dice:
        found = _expected_pairs(clean, (label,))
        by_label.append([label, len(found), *_errors(found)])
    first = sorted(clean, key=lambda pair: _surprise(*pair))[:_CASES_TO_LOOK_AT]
    cases: list[list[Value]] = [
        [row.case, judged.mean, row.mean_dice, judged.in_cells()[1], "; ".join(judged.flags)] for row, judged in first
    ]
    means = {row.case: (row.mean_dice or 0.0, judged.mean or 0.0) for row, judged in clean}
    kinds = (Column("Images"), Column("number", "d"), share_column("real Dice"), Column("mean error", ".3f"),
             Column("in the 90 % interval", ".0%"), Column("flagged", ".0%"))  # fmt: skip
    of_labels = (Column("Label"), Column("cases", "d"), *kinds[3:5])
    looked_at = (Column("Case"), share_column("expected Dice"), share_column("real Dice"), Column("90 % interval"),
                 Column("why"))  # fmt: skip
    return {
        "cases": plural(len(clean), "held-out case"),
        "copies": f"{len(rows) - len(clean)} degraded copies",
        "chart": figures.plot_agreement("Expected against real Dice", means, "Dice", "", ("expected", "real")),
        "by_kind": Table("Held-out cases and degraded copies", kinds, by_kind),
        "by_label": Table("Held-out cases by label", of_labels, by_label),
        "first": Table("Cases to look at first: less like the reference than expected", looked_at, cases),
    }


def _expected_pairs(
    rows: Sequence[tuple[Row, CaseQuality]], labels: Sequence[str] = ()
) -> list[tuple[Expected, float]]:
    """Return what is expected of each label, and its Dice."""
    return [
        (expected, dice)
        for row, judged in rows
        for label, dice in row.dice.items()
        if dice is not None and (expected := judged.expected[label]) is not None and label in (labels or (label,))
    ]


def _errors(pairs: Sequence[tuple[Expected, float]]) -> tuple[float | None, float | None]:
    """Return the mean absolute error of the expected Dice, and the share of real ones in the interval."""
    if not pairs:
        return None, None
    covered = [expected.low <= dice <= expected.high for expected, dice in pairs]
    return float(np.mean([abs(expected.dice - dice) for expected, dice in pairs])), float(np.mean(covered))


def _surprise(row: Row, judged: CaseQuality) -> float:
    """Return by how much a case is worse than expected, the most as the smallest number."""
    return (row.mean_dice or 0.0) - (judged.mean or 0.0)


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
    models = [model for model in material.trained if any(fold.rows for fold in model.folds)]
    models = [model for model in models if model.name in selection.models] if selection else models[:1]
    name = "+".join(selection.models if selection else [model.name for model in models])
    result = next((model for model in material.scored if model.name == name), None)
    units, described = material.units, []
    for model in models:
        assert model.plan is not None  # an ensemble has none
        trained = [fold for fold in model.folds if fold.rows]
        lengths = sorted(fold.rows[-1]["epoch"] for fold in [f for f in trained if f.state] or trained)
        more = f"{lengths[0]} to " if lengths[0] < lengths[-1] else ""
        planned = model.plan.configuration(model.run["configuration"])
        described.append({
            "name": model.name, "plan": model.plan, "configuration": planned,
            "settings": Settings.model_validate(model.run["settings"]), "versions": model.run.get("versions", {}),
            "unit": length_unit(model.plan), "is_resampled": not _has_spacing(material, planned.spacing),
            "normalizations": _normalizations(model.plan), "epochs": more + plural(lengths[-1], "epoch"),
        })  # fmt: skip
    splits = load_splits(material.paths.splits) if material.paths.splits.is_file() else []
    folds = set(result.fold_of.values()) if result else set()
    scored = [split for split in splits if split.name in folds]
    return {"models": described, "n_folds": len(splits), "scores": result and {
        "n_training": sorted({len(split.training) for split in scored}),
        "folds": sorted(set(result.fold_of.values())),
        "label": result.label,
        "n_cases": len(result.scores.rows),
        "metrics": [
            (metric_heading(material, metric).partition(" (")[0], f" {units.length}" if metric == "HD95" else "",
             units.per_mm if metric == "HD95" else 1, result.scores.foreground(metric))
            for metric in _measured(result) if metric in ("Dice", "NSD", "HD95")
        ],
        "postprocessing": selection.postprocessing if selection else {},
    }}  # fmt: skip


def _has_spacing(material: Material, spacing: Sequence[float]) -> bool:
    """Return whether all images have a spacing, so that none was resampled."""
    found = material.fingerprint.spacings if material.fingerprint else ()
    return bool(found) and all(np.allclose(one[-len(spacing) :], spacing) for one in found)


def _normalizations(plan: Plan) -> list[tuple[list[str], Any]]:
    """Group the channels that are normalised in the same way: (names, one of them)."""
    groups: dict[tuple[Any, ...], list[Any]] = defaultdict(list)
    for channel in plan.channels:
        clip = tuple(channel.clip_percentiles or ())
        groups[(channel.normalization, channel.use_mask, clip)].append(channel)
    return [([channel.name for channel in group], group[0]) for group in groups.values()]


def _settings_section(material: Material) -> tuple[Table, dict[str, dict[str, Any]]]:
    """Return seed and versions of the models, and their settings."""
    runs = {model.name: model.run for model in material.trained}
    packages = list(dict.fromkeys(package for run in runs.values() for package in run.get("versions", {})))
    rows = []
    for name, run in runs.items():
        about = {"recipe": run["settings"].get("recipe", ""), **run, **run.get("versions", {})}
        rows.append([name, *(str(about.get(key, "")) for key in ("began", "recipe", "seed", *packages))])
    columns = [Column(name) for name in ("Model", "began", "recipe", "seed", *packages)]
    return Table("Versions and seeds of the models", columns, rows), {
        name: run["settings"] for name, run in runs.items()
    }
