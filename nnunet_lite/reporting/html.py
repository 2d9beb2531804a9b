"""The report of a data set: one HTML page that holds all it shows and asks the network for nothing."""

from __future__ import annotations

import base64
import hashlib
from datetime import datetime
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

import nnunet_lite
from nnunet_lite import log
from nnunet_lite.data.problems import plural
from nnunet_lite.files import write_text
from nnunet_lite.models.folder import first_training
from nnunet_lite.reporting.collect import Material, collect
from nnunet_lite.reporting.gallery import Gallery, make_gallery
from nnunet_lite.reporting.results import comparison, model_view, page_data
from nnunet_lite.reporting.sections import (
    case_table,
    cost_table,
    data_charts,
    data_facts,
    fold_legend,
    intensity_charts,
    intensity_table,
    plan_section,
    problem_rows,
    settings_of,
    total_time,
    training_charts,
    version_table,
)
from nnunet_lite.workspace import Paths

PAGE = "report.html"


def write_report(paths: Paths, output: Path) -> Path:
    """Write the report of a planned data set, at whatever stage it is.

    Raises
    ------
    UserError : the data set is not planned, or one of its files is broken.
    """
    material = collect(paths)
    for note in material.notes:
        log.warn(note)
    gallery = make_gallery(material, log.progress)
    write_text(output, render(material, gallery))
    return output


def render(material: Material, gallery: Gallery) -> str:
    """The page. Whatever comes from the data is escaped; a script that is not ours would not run (see the CSP)."""
    environment = Environment(
        loader=PackageLoader("nnunet_lite.reporting"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.policies["json.dumps_kwargs"] = {"separators": (",", ":"), "ensure_ascii": False}
    environment.filters |= {"shown_size": _shown_size, "errors": _errors}
    script, style = _source("report.js"), _source("report.css")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    return environment.get_template("report.html.j2").render(
        script=Markup(script), style=Markup(style), script_hash=digest, **_view(material, gallery)
    )


def _source(name: str) -> str:
    """A file of ours that goes into the page as it is."""
    return (Path(__file__).parent / "templates" / name).read_text(encoding="utf-8")


def _view(material: Material, gallery: Gallery) -> dict[str, Any]:
    """All that report.html.j2 fills in."""
    trained = [model for model in material.models if model.run]
    charts = data_charts(material, gallery)
    return {
        "name": material.paths.name,
        "version": nnunet_lite.__version__,
        "made": datetime.now().astimezone().strftime("%d %B %Y, %H:%M"),
        "overview": _overview(material),
        "next": _next_step(material),
        "notes": [*material.notes, *gallery.notes],
        "facts": data_facts(material),
        "problems": problem_rows(material),
        "data_charts": [chart for chart in charts if chart.drawing],
        "constants": [chart for chart in charts if not chart.drawing],
        "intensity_table": intensity_table(material),
        "intensity_charts": intensity_charts(material, gallery),
        "tiles": [(case, seen.tile) for case, seen in gallery.seen.items() if seen.tile],
        "labels": material.dataset.labels.region_names,
        "case_table": case_table(material, gallery),
        "plan": plan_section(material),
        "trainings": [(m.name, training_charts(m), fold_legend(m)) for m in trained if any(f.rows for f in m.folds)],
        "models": [model_view(model, material, gallery) for model in material.scored],
        "comparison": comparison(material),
        "costs": cost_table(material),
        "versions": version_table(material),
        "settings": [(model.name, settings_of(model)) for model in trained],
        "data": page_data(material, gallery),
    }


def _overview(material: Material) -> list[tuple[str, str, str]]:
    """(what, the figure, a line below it)"""
    labels = material.dataset.labels
    named = plural(len(labels.region_names), "region" if labels.has_regions else "label")
    cards = [
        ("Cases", str(len(material.dataset.cases)), f"{named}, {plural(len(material.plan.channels), 'channel')}"),
        ("Configurations", str(len(material.plan.configurations)), ", ".join(material.plan.configurations)),
    ]
    trained = [(model, [f for f in model.folds if f.state]) for model in material.models if model.run]
    if trained:
        folds = sum(len(done) for _, done in trained)
        below = ", ".join(f"{model.name}: {len(done)}" for model, done in trained)
        cards.append(("Folds trained", str(folds), below))
        cards.append(("Training time", log.duration(total_time(material)), "all folds and models"))
    if material.scored:
        best = material.scored[0]
        of = best.scores.foreground()
        if of.mean is not None:
            ends = (
                f", 95 % interval {of.low:.3f} to {of.high:.3f}" if of.low is not None and of.high is not None else ""
            )
            cards.append(("Dice, held-out", f"{of.mean:.3f}", f"{best.label}, {of.n} cases{ends}"))
    return cards


def _next_step(material: Material) -> str:
    """The command that brings more into the report; empty where all is there."""
    if not any(fold.state for model in material.models for fold in model.folds):
        return first_training(material.paths)
    if material.selection is None and len(material.scored) > 1:
        return "nnlite select"
    return ""


def _shown_size(mm: list[float]) -> tuple[float, float]:
    """Width and height on the page of a picture of that size in mm: the longer side is 240 pixels."""
    longest = max(mm)
    return round(240 * mm[0] / longest, 1), round(240 * mm[1] / longest, 1)


def _errors(plane: dict[str, Any]) -> list[str]:
    """For each region, both its outlines in one path: filled by the even-odd rule it is where they differ."""
    reference, prediction = dict(plane["reference"]), dict(plane["prediction"])
    return [reference.get(i, "") + prediction.get(i, "") for i in sorted({*reference, *prediction})]
