"""The sections of the page that tell of the data, the plan, the training and its costs: text and tables to fill in."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import numpy as np
from markupsafe import Markup

from nnunet_lite import log
from nnunet_lite.data.geometry import Geometry
from nnunet_lite.data.problems import plural
from nnunet_lite.planning.show import normalization, plan_head, plan_reasons, plan_rows, plan_title
from nnunet_lite.reporting.collect import Fold, Material, Model
from nnunet_lite.reporting.gallery import Gallery
from nnunet_lite.reporting.plots import Series, curves, histogram
from nnunet_lite.reporting.tables import Cell, Line, Row, Table, by, number

_CURVED_LABELS = 8  # of which intensities are drawn
_DRAWN_LABELS = 12  # of which volumes are drawn
_BINS = 60


@dataclass(frozen=True)
class Chart:
    """A drawing with a heading and a line below it."""

    title: str
    drawing: Markup
    below: str = ""


# ----------------------------------------------------------------------------------------------------------- the data


def volumes(material: Material, gallery: Gallery) -> dict[str, dict[str, int]]:
    """case -> region -> voxels in the reference, from summary.json where a case was scored, else from its label map."""
    found = {case: seen.voxels for case, seen in gallery.seen.items() if seen.voxels}
    for model in material.scored:
        for row in model.scores.rows:
            found.setdefault(row.case, {name: m.n_reference for name, m in row.measures.items()})
    return found


def data_facts(material: Material) -> list[tuple[str, str]]:
    dataset, plan = material.dataset, material.plan
    return [
        ("Cases", f"{len(dataset.cases)} with a label map"),
        ("Channels", ", ".join(f"{c.name} ({normalization(c)})" for c in plan.channels)),
        ("Regions" if dataset.labels.has_regions else "Labels", ", ".join(_label_texts(material))),
        ("Layout", f"{dataset.layout}, {dataset.file_ending}"),
        ("Folder", str(dataset.root)),
        *(("Understood", note) for note in dataset.notes),
    ]


def _label_texts(material: Material) -> list[str]:
    labels = material.dataset.labels
    pairs = zip(labels.region_names, labels.region_values, strict=True)
    named = [f"{name} ({', '.join(map(str, values))})" for name, values in pairs]
    return named if labels.ignore is None else [*named, f"ignore ({labels.ignore})"]


def problem_rows(material: Material) -> list[dict[str, str]]:
    """What the check found, equal problems of many files together, errors first."""
    order = {"error": 0, "warning": 1, "notice": 2}
    same = Counter((p["severity"], p["found"], p["expected"], p["fix"]) for p in material.problems)
    files = {(p["severity"], p["found"], p["expected"], p["fix"]): p["file"] for p in reversed(material.problems)}
    return [
        {"severity": key[0], "found": key[1], "expected": key[2], "fix": key[3],
         "file": files[key] + (f" and {n - 1} more" if n > 1 else "")}
        for key, n in sorted(same.items(), key=lambda entry: order[entry[0][0]])
    ]  # fmt: skip


def data_charts(material: Material, gallery: Gallery) -> list[Chart]:
    """Sizes, spacings, and the volume of each label. What is the same in all cases is told, not drawn."""
    places = [seen.geometry for seen in gallery.seen.values() if seen.geometry]
    if not places:
        return []
    flat = all(place.dimensions == 2 for place in places)
    axes = "yx" if flat else "zyx"
    charts = _along("Size", axes, [place.shape for place in places], "pixels" if flat else "voxels")
    if any(place.calibrated for place in places):
        charts += _along("Spacing", axes, [place.spacing for place in places], "mm")
    found = volumes(material, gallery)
    title, unit = "Area" if flat else "Volume", _volume_unit(material, places)
    names = material.dataset.labels.region_names
    for name in names[:_DRAWN_LABELS]:
        values = [
            _volume(v[name], gallery.seen[case].geometry, unit) for case, v in found.items() if case in gallery.seen
        ]
        present = [value for value in values if value]
        note = f"; in {len(present)} of {len(values)} cases" if len(present) < len(values) else ""
        if present:
            charts.append(_spread(f"{title} of {name}", present, "% of the picture" if flat else unit, note))
    if len(names) > _DRAWN_LABELS:
        rest = plural(len(names) - _DRAWN_LABELS, "more label")
        charts.append(Chart("Other labels", Markup(""), f"{rest}: in the table of all cases"))
    return charts


def _along(what: str, axes: str, values: Sequence[Sequence[float]], unit: str) -> list[Chart]:
    """How something is spread along each axis; one line where all cases are equal."""
    columns = list(zip(*values, strict=True))[-len(axes) :]
    charts = [_spread(f"{what} along {axis}", column, unit) for axis, column in zip(axes, columns, strict=True)]
    if any(chart.drawing for chart in charts):
        return charts
    same = by([float(np.median(column)) for column in columns], ".4g")
    return [Chart(f"{what} ({', '.join(axes)})", Markup(""), f"{same} {unit} in every case")]


def _volume_unit(material: Material, places: Sequence[Geometry]) -> str:
    """What volumes are measured in: ml; voxels without a spacing; of images without thickness the share of pixels."""
    if places and all(place.dimensions == 2 for place in places):
        return "%"
    unscaled = not any(place.calibrated for place in places)
    return "voxels" if places and unscaled else "ml"


def _volume(voxels: int, geometry: Geometry | None, unit: str) -> float | None:
    """The volume of some voxels in a unit of `_volume_unit`."""
    if geometry is None or unit == "voxels":
        return None if geometry is None else voxels
    return 100 * voxels / prod(geometry.shape) if unit == "%" else voxels * prod(geometry.spacing) / 1000


def _spread(title: str, values: Sequence[float], unit: str, note: str = "") -> Chart:
    """A histogram, with the median and the range in words; only these where all values are equal."""
    low, middle, high = (float(v) for v in np.percentile(values, (0, 50, 100)))
    if high - low <= 1e-4 * abs(high):
        return Chart(title, Markup(""), f"{middle:.4g} {unit} in every case{note}")
    return Chart(title, histogram(title, values, unit), f"median {middle:.4g} {unit}, {low:.4g} to {high:.4g}{note}")


def intensity_table(material: Material) -> Table:
    """Statistics of the foreground, which the normalisation of CT uses."""
    head = ("Channel", "normalised", "mean", "SD", "minimum", "0.5 %", "median", "99.5 %", "maximum")
    rows: list[Line] = []
    for channel in material.plan.channels:
        s = channel.statistics
        values = (s.mean, s.std, s.min, s.percentile_00_5, s.median, s.percentile_99_5, s.max)
        rows.append([channel.name, normalization(channel), *(number(value, ".4g") for value in values)])
    return Table.plain("Intensities of all labelled voxels", head, rows, texts=(0, 1))


def intensity_charts(material: Material, gallery: Gallery) -> list[Chart]:
    """Densities of the intensities of each label, and of the whole image where it is not zero, for each channel."""
    samples = [seen.intensities for seen in gallery.seen.values() if seen.intensities]
    if not samples:
        return []
    names = [name for name in material.dataset.labels.region_names if any(s[name].size for s in samples if name in s)]
    charts = []
    for i, channel in enumerate(material.plan.channels):
        every = {
            name: np.concatenate([s[name][i] for s in samples if name in s])
            for name in ("image", *names[:_CURVED_LABELS])
        }
        inside = every["image"][np.isfinite(every["image"])]
        if not inside.size:
            continue
        low, high = (float(v) for v in np.percentile(inside, (0.5, 99.5)))
        edges = np.linspace(low, high if high > low else low + (abs(low) or 1), _BINS + 1)
        middles = [float(f"{v:.8g}") for v in (edges[:-1] + edges[1:]) / 2]
        series = []
        for number_, (name, values) in enumerate(every.items()):
            counts = np.histogram(values, edges)[0].astype(float)
            density = counts / max(counts.max(), 1)
            kind = "dashed" if name == "image" else "solid"
            shown = "whole image" if name == "image" else name
            series.append(Series(shown, middles, [round(float(v), 3) for v in density], number_ - 1, kind))
        title = f"Intensities, {channel.name}"
        unit = "z-score of the image" if channel.normalization == "zscore" else "intensity"
        charts.append(Chart(title, curves(title, series, unit, "relative frequency", (0, 1.05))))
    return charts


def case_table(material: Material, gallery: Gallery) -> Table:
    """Every case with its size and the volumes of its labels."""
    names = material.dataset.labels.region_names
    found = volumes(material, gallery)
    unit = _volume_unit(material, [seen.geometry for seen in gallery.seen.values() if seen.geometry])
    rows = []
    for case in material.dataset.cases:
        seen = gallery.seen[case.id]
        place = seen.geometry
        cells = [Cell(case.id)]
        cells.append(Cell("not read") if place is None else Cell(by(place.shape), float(prod(place.shape))))
        if place is not None and place.calibrated:
            cells.append(Cell(by(place.spacing, ".4g"), float(prod(place.spacing))))
        else:
            cells.append(Cell("n/a"))
        for name in names:
            volume = _volume(found[case.id][name], place, unit) if case.id in found else None
            cells.append(number(volume, ".4g"))
        rows.append(Row(tuple(cells)))
    head = ("Case", "size (z, y, x)", "spacing (mm)", *(f"{name} ({unit})" for name in names))
    return Table(f"All {len(rows)} cases", head, tuple(rows), sorted_by=0)


# ----------------------------------------------------------------------------------------------------------- the plan


def plan_section(material: Material) -> dict[str, Any]:
    plan = material.plan
    return {
        "title": plan_title(plan),
        "table": Table.plain("Configurations", plan_head(plan), plan_rows(plan)),
        "reasons": plan_reasons(plan),
        "networks": [
            (name, f"{c.network.kind} U-Net, features {'-'.join(map(str, c.network.features))}, "
                   f"kernels {', '.join(by(k) for k in c.network.kernels)}, "
                   f"strides {', '.join(by(s) for s in c.network.strides)}, {c.network.norm} normalisation")
            for name, c in plan.configurations.items()
        ],
    }  # fmt: skip


# ------------------------------------------------------------------------------------------------------- the training


def training_charts(model: Model) -> list[Chart]:
    """Loss, Dice of held-out patches, and the learning rate, a colour for each fold."""
    folds = [fold for fold in model.folds if fold.rows]
    parts = (
        (
            "Loss",
            [("train_loss", "solid", "training"), ("validation_loss", "dashed", "held-out patches")],
            (None, None),
        ),
        ("Dice of held-out patches", [("mean_dice", "solid", "mean")], (0.0, 1.0)),
        ("Learning rate", [("lr", "solid", "")], (0.0, None)),
    )
    charts = []
    for title, keys, limits in parts:
        series = [
            Series(f"fold {fold.name}{f', {what}' if len(keys) > 1 else ''}", [row["epoch"] for row in fold.rows],
                   [row.get(key) for row in fold.rows], i, kind)
            for i, fold in enumerate(folds) for key, kind, what in keys
        ]  # fmt: skip
        drawing = curves(f"{title} of {model.name}", series, "epoch", "", limits)
        if drawing:
            below = "solid: training, dashed: held-out patches" if len(keys) > 1 else ""
            charts.append(Chart(title, drawing, below))
    return charts


def fold_legend(model: Model) -> list[tuple[int, str]]:
    """(colour, name) of the folds that are drawn."""
    drawn = [fold for fold in model.folds if fold.rows]
    return [(i % 10, f"fold {fold.name}{'' if fold.state else ' (not finished)'}") for i, fold in enumerate(drawn)]


def cost_table(material: Material) -> Table:
    """Time and memory of every fold."""
    head = ("Model", "fold", "epochs", "time", "s/epoch", "samples/s", "waiting", "memory",
            "planned", "device")  # fmt: skip
    rows: list[Line] = []
    for model in material.models:
        if model.plan is None:
            continue
        planned = model.plan.configuration(model.run["configuration"]).memory_gb
        rows += [
            [model.name, fold.name, *_costs(fold), number(planned, ".2f", " GB"), _device(fold)]
            for fold in model.folds
            if fold.rows
        ]
    return Table.plain("Time and memory of training", head, rows, texts=(0, 1, 9))


def _costs(fold: Fold) -> list[Cell]:
    rows = fold.rows
    seconds = fold.state.get("seconds") or sum(row["seconds"] for row in rows)
    middle = {key: float(np.median([row[key] for row in rows])) for key in ("seconds", "samples_per_second", "waiting")}
    return [
        Cell(str(rows[-1]["epoch"]) + ("" if fold.state else " so far"), float(rows[-1]["epoch"])),
        Cell(log.duration(seconds), float(seconds)),
        number(middle["seconds"], ".3g"),
        number(middle["samples_per_second"], ".3g"),
        Cell(f"{middle['waiting']:.0%}", middle["waiting"]),
        number(max(row["memory_gb"] for row in rows), ".2f", " GB"),
    ]


def _device(fold: Fold) -> str:
    arithmetic = fold.state.get("arithmetic", {})
    return " ".join(filter(None, (fold.state.get("device", ""), arithmetic.get("precision", ""))))


def total_time(material: Material) -> float:
    """Seconds of all trainings."""
    return sum(
        fold.state.get("seconds") or sum(row["seconds"] for row in fold.rows)
        for model in material.models
        for fold in model.folds
    )


# ------------------------------------------------------------------------------------------------------- the settings


def settings_of(model: Model) -> list[tuple[str, str]]:
    """Every setting of a run, as `--set` takes it."""
    flat = []
    for section, values in model.run.get("settings", {}).items():
        if isinstance(values, dict):
            flat += [(f"{section}.{key}", _setting(value)) for key, value in values.items()]
        else:
            flat.append((section, _setting(values)))
    return flat


def _setting(value: Any) -> str:
    return "not set" if value is None else str(value).lower() if isinstance(value, bool) else str(value)


def version_table(material: Material) -> Table:
    names = list(dict.fromkeys(name for model in material.models for name in model.run.get("versions", {})))
    head = ("Model", "began", "recipe", "seed", *names)
    rows = [
        (model.name, str(model.run.get("began", "")), str(model.run["settings"].get("recipe", "")),
         str(model.run.get("seed", "")), *(model.run.get("versions", {}).get(name, "") for name in names))
        for model in material.models if model.run
    ]  # fmt: skip
    return Table.plain("What the models were made with", head, rows, texts=tuple(range(len(head))))
