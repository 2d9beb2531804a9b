"""Two models side by side on one page: what differs between them, their trainings, and their scores case by case.

`write_comparison` reads two models of any workspaces. Only the cases that both held out, with the same reference, say
which one is better. Every difference is that of the second model from the first. templates/comparison.html.j2 shows it.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from nnunet_lite.data.problems import plural
from nnunet_lite.errors import UserError
from nnunet_lite.evaluation.metrics import METRICS
from nnunet_lite.evaluation.scores import Scores
from nnunet_lite.evaluation.statistics import compare_paired, mean_of_known, p_of_difference, summarize
from nnunet_lite.files import write_text
from nnunet_lite.models.folder import is_nnunet
from nnunet_lite.reporting import figures, page
from nnunet_lite.reporting.figures import Chart, Column, Table, share_column
from nnunet_lite.reporting.material import Material, ModelResults, draw_case, read_material, read_results
from nnunet_lite.reporting.verdict import judge_training
from nnunet_lite.settings import flatten
from nnunet_lite.workspace import Paths

_PICTURE_PIXELS = 320  # along the longer side of a plane
_EXAMPLES = 3  # cases with pictures, in either direction


def write_comparison(first: Path, second: Path, output: Path | None) -> Path:
    """Write a page that compares two models.

    Parameters
    ----------
    first, second : Path
        Their folders.
    output : Path or None
        The file to write, or a folder for it; None for the folder of the first model's dataset.

    Returns
    -------
    Path
        The file.

    Raises
    ------
    UserError
        A folder is no model, or one of its files is broken; or the dataset of neither is planned.
    """
    folders = [first.resolve(), second.resolve()]
    if folders[0] == folders[1]:
        raise UserError("would be compared with itself", first, "Give two models.")
    for folder in folders:
        if not folder.is_dir() or is_nnunet(folder):
            raise UserError(
                "has no scores to compare", folder, f"Run `nnlite import {folder}`, and compare that model."
            )
    datasets = [Paths(folder.parents[1]) for folder in folders]
    paths = next((paths for paths in datasets if paths.plans.is_file()), None)
    if paths is None:
        raise UserError(
            "is in no workspace, nor is the other model", first, "Give at least one that is in a workspace."
        )
    file, notes = page.page_file(output or paths.root, "comparison.html"), list[str]()
    models = [replace(read_results(folder, notes), name=name) for folder, name in _names_of(folders).items()]
    folds = [(f"{model.label}, fold {fold.name}", i, fold) for i, model in enumerate(models) for fold in model.begun]
    material = _draw_shared(replace(read_material(paths), models=tuple(models), selection=None, notes=tuple(notes)))
    tables = [_paired_table(material, metric) for metric in ("Dice", "NSD", "HD95")]
    html = page.fill_template(
        "comparison.html.j2",
        material,
        models=models,
        verdicts=[judge_training(model, []) for model in models if model.begun],
        notes=[*material.notes, *_false_labels(material)],
        paired=[table for table in tables if table.rows[0][2] is not None],
        unpaired=[_own_scores(model) for model in models if model.scores.rows],
        chart=_difference_chart(material),
        changes=_most_changed(material),
        cases=_case_changes(material),
        charts=page.training_charts(folds),
        costs=page.costs_table(material),
        differences=_differences(models),
    )
    write_text(file, html)
    return file


def _names_of(folders: Sequence[Path]) -> dict[Path, str]:
    """Return the name of each folder; of equal names, the parts of the paths that differ."""
    above = Path(os.path.commonpath(folders))
    is_unique = folders[0].name != folders[1].name
    return {folder: folder.name if is_unique else str(folder.relative_to(above)) for folder in folders}


# ----------------------------------------------------------------------------------------------- settings and trainings


def _differences(models: Sequence[ModelResults]) -> tuple[Table, int]:
    """Return what differs in settings, plan and machine, and how many values are equal."""
    first, second = (dict(flatten(_describe(model))) for model in models)
    keys = list(first | second)
    other = [key for key in keys if first.get(key) != second.get(key)]
    values = ([_as_text(of[key]) if key in of else "" for key in other] for of in (first, second))
    columns = [Column(model.label, of) for model, of in zip(models, values, strict=True)]
    return Table("Settings and plan, where they differ", [Column("Setting", other), *columns]), len(keys) - len(other)


def _describe(model: ModelResults) -> dict[str, Any]:
    """Return what was set and planned."""
    assert model.plan is not None  # an ensemble has none
    name, plan = model.run["configuration"], model.plan.model_dump(mode="json")
    planned = plan | plan.pop("configurations")[name]
    del planned["reasons"]
    keys = ("configuration", "seed", "versions")
    return {**model.run["settings"], "plan": planned, **{key: model.run.get(key) for key in keys}}


def _as_text(value: Any) -> str:
    return "not set" if value is None else str(value).lower() if isinstance(value, bool) else str(value)


# ----------------------------------------------------------------------------------------------------------- the scores


def _own_scores(model: ModelResults) -> Table:
    """Return the scores of a model by label in their own units, as the terminal shows them."""
    columns = zip(*model.scores.lines(), strict=True)
    return Table(f"Held-out cases of {model.label}", [Column(head, cells) for head, *cells in columns])


def _draw_shared(material: Material) -> Material:
    """Keep the cases that both models held out with the same reference, and draw those that change most."""
    labels = material.dataset.labels
    rows = [{row.case: row for row in model.scores.rows} for model in material.models]
    cases = {case.id: case for case in material.dataset.cases}
    names = set(labels.region_names)
    shared = [
        case for case in cases  # equal names may be of different cases
        if all(case in of and set(of[case].metrics) == names for of in rows)
        and all(rows[0][case].metrics[name]["n_ref"] == rows[1][case].metrics[name]["n_ref"] for name in names)
    ]  # fmt: skip
    models = [
        replace(model, scores=Scores(tuple(of[case] for case in shared), labels))
        for model, of in zip(material.models, rows, strict=True)
    ]
    material = replace(material, models=tuple(models))
    files: dict[str, dict[str, Path]] = {case: {} for case in shared or list(cases)[:1]}
    for case in _most_changed(material):
        files[case] = {m.name: Path(str(of[case].prediction_file)) for m, of in zip(models, rows, strict=True)}
    draw = partial(draw_case, material.dataset, material.plan, _PICTURE_PIXELS, tile=False, volumes=False)
    pictures = {case: draw(case=cases[case], predictions=of_models) for case, of_models in files.items()}
    drawn = {case: one.overlays for case, one in pictures.items() if one.overlays}
    overlays = {model.name: {case: planes[model.name] for case, planes in drawn.items()} for model in models}
    problems = [one.problem for one in pictures.values() if one.problem]
    return replace(material, pictures=pictures, overlays=overlays, notes=(*material.notes, *problems))


def _by_label(material: Material, metric: str = "Dice") -> Iterator[tuple[str, np.ndarray, np.ndarray]]:
    """Yield a metric of both models (cases, labels) over all labels, then of each label; NaN unless both have it."""
    first, second = (model.scores.values(metric) * material.units.scale_of(metric) for model in material.models)
    first, second = np.where(np.isnan(second), np.nan, first), np.where(np.isnan(first), np.nan, second)
    yield "all labels", first, second
    for i, name in enumerate(material.dataset.labels.region_names):
        yield name, first[:, i : i + 1], second[:, i : i + 1]


def _false_labels(material: Material) -> list[str]:
    """Say how often one model alone finds a label where there is none: such a Dice of 0 is not compared with any."""
    first, second = (np.isfinite(model.scores.values()) for model in material.models)
    alone = (int((first & ~second).sum()), int((second & ~first).sum()))
    names = [model.label for model in material.models]
    return [
        f"{name} finds a label where neither the reference nor {other} has it, {plural(n, 'time')}: its Dice of 0 "
        "is in no difference"
        for name, other, n in zip(names, names[::-1], alone, strict=True) if n
    ]  # fmt: skip


def _changes(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """Return by how much the mean over the labels of each case rises (cases,); NaN without a label."""
    n = np.isfinite(first).sum(axis=1)
    return np.nansum(second - first, axis=1) / np.where(n, n, np.nan)


def _dice_changes(material: Material) -> dict[str, float]:
    """Return by how much the mean Dice of each shared case changes, the largest loss first."""
    _, first, second = next(_by_label(material))
    changes = zip(material.models[0].scores.rows, _changes(first, second).tolist(), strict=True)
    known = {row.case: change for row, change in changes if math.isfinite(change)}
    return dict(sorted(known.items(), key=lambda item: item[1]))


def _most_changed(material: Material) -> dict[str, float]:
    """Return the cases that lose and gain most, those that gain first."""
    changes = list(_dice_changes(material).items())
    gains = [(case, change) for case, change in changes if change > 0][-_EXAMPLES:]
    losses = [(case, change) for case, change in changes if change < 0][:_EXAMPLES]
    return dict([*gains[::-1], *losses])


def _paired_table(material: Material, metric: str) -> Table:
    """Return for each label the means of both models, and how the cases differ."""
    tables = {name: tables for name, *tables in _by_label(material, metric)}
    differences = [changes[np.isfinite(changes)] for changes in (_changes(*pair) for pair in tables.values())]
    means = [[summarize(pair[i]).mean for pair in tables.values()] for i in range(2)]
    margins = [page.write_margin(compare_paired(second, first)) for first, second in tables.values()]
    gains = [changes if METRICS[metric].better == "higher" else -changes for changes in differences]
    names = [model.label for model in material.models]
    columns = [
        Column("Label", list(tables)),
        Column("cases", [len(changes) for changes in differences], "d"),
        *(page.metric_column(material, metric, name, values) for name, values in zip(names, means, strict=True)),
        Column("difference (95 % interval)", margins, "g"),
        Column(f"{names[1]} better", [int((gain > 0).sum()) for gain in gains], "d"),
        Column("worse", [int((gain < 0).sum()) for gain in gains], "d"),
        Column("p", [p_of_difference(changes) if len(changes) else None for changes in differences], ".3g"),
    ]
    return Table(f"{page.metric_heading(material, metric)} of the same cases", columns)


def _difference_chart(material: Material) -> Chart | None:
    """Draw the differences of Dice."""
    margins = [(name, compare_paired(second, first)) for name, first, second in _by_label(material)]
    first, second = (model.label for model in material.models)
    label = f"Dice of {second} - Dice of {first}, with 95 % interval"
    rows = [(name, margin.mean, margin.low, margin.high) for name, margin in margins]
    return figures.plot_intervals("Difference of Dice", rows, label, has_zero=True)


def _case_changes(material: Material) -> Table:
    """Return every shared case with both scores, of labels that both have; a row opens its pictures."""
    (_, *tables), changes, rows = next(_by_label(material)), _dice_changes(material), material.models[0].scores.rows
    means = ([mean_of_known(one[np.isfinite(one)].tolist()) for one in table] for table in tables)
    dice = [{row.case: mean for row, mean in zip(rows, of, strict=True)} for of in means]
    columns = [
        Column("Case", list(changes)),
        *(share_column(f"Dice, {model.label}", [of[case] for case in changes])
          for model, of in zip(material.models, dice, strict=True)),
        Column("difference", [(f"{change:+.3f}", change) for change in changes.values()], "g"),
    ]  # fmt: skip
    return Table("Cases of both models, the largest loss first", columns, 3, material.models[1].name)
