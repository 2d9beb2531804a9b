"""All steps at once: from raw data to a report and the commands to predict."""

from __future__ import annotations

import shlex
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nnunet_lite import api, log
from nnunet_lite.api.place import Folder, cluster_of, current_paths, dataset_of, folder_of, place_of, why_to_plan
from nnunet_lite.errors import UserError
from nnunet_lite.workflow import Ended, Journal, Step, execute, overview, what_is_left
from nnunet_lite.workspace import Paths, find_raw, read_json, use

if TYPE_CHECKING:
    from nnunet_lite.cluster import Cluster
    from nnunet_lite.data.dataset import Dataset
    from nnunet_lite.fold import Run
    from nnunet_lite.planning.schema import Plan
    from nnunet_lite.settings import Settings

JOURNAL, REPORT = "steps.jsonl", "report.html"


@dataclass(frozen=True)
class Finished:
    """What `run` did, in seconds, and what it came to.

    Parameters
    ----------
    selected : what `nnlite predict` predicts with, in words; None where nothing was held out to select by.
    table : the comparison of the models, as `nnlite select` prints it.
    commands : what may be typed next.
    """

    dataset: str
    steps: tuple[Ended, ...]
    seconds: float
    models: tuple[Path, ...]
    selected: str | None
    table: str
    report: Path | None
    commands: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        return {
            "dataset": self.dataset,
            "steps": [asdict(step) for step in self.steps],
            "seconds": self.seconds,
            "models": [str(folder) for folder in self.models],
            "selected": self.selected,
            "report": None if self.report is None else str(self.report),
            "commands": list(self.commands),
        }

    def to_text(self) -> str:
        done = sum(step.state == "done" for step in self.steps)
        kept = f", {len(self.steps) - done} were done before" if done < len(self.steps) else ""
        report = [] if self.report is None else [f"report: {self.report}"]
        table = [self.table, ""] if self.table else []
        head = f"{self.dataset}: {done} steps done in {log.duration(self.seconds)}{kept}"
        return "\n".join([*table, head, *report, "what comes next:", *(f"  {command}" for command in self.commands)])


def run(
    data: Folder,
    *,
    recipe: str = "default",
    changes: dict[str, Any] | None = None,
    configurations: Sequence[str] | None = None,
    fold: Sequence[int | str] | None = None,
    folds: int | None = None,
    group_by: Folder | None = None,
    stratify: bool | Folder = False,
    splits: Folder | None = None,
    accept_geometry: bool = False,
    device: str | None = None,
    scheduler: str | None = None,
    workspace: Folder | None = None,
    workers: int | None = None,
) -> Finished:
    """Check, plan, preprocess, train every configuration and fold, select and report. The same call again goes on.

    Parameters
    ----------
    data : a folder, or a name, as for `plan`. What is planned already stays as it is while the data do.
    configurations : which to train, with the first stages that they need; default: all of the plan.
    fold : which folds; default: all. "all" trains on every case, and holds nothing out to select by.
    recipe, changes, folds, group_by, stratify, splits, device : as for `train`, for each fold.
    accept_geometry : as for `plan`; what was accepted when it was planned stays so.
    scheduler : address of a Dask scheduler, whose workers preprocess and train; see docs/cluster.md.
    workers : threads for the steps beside training.

    Raises
    ------
    UserError : the data have errors, a setting is illegal, or what is trained was begun with other settings.
    Stopped : a signal asked for it; the same call goes on.
    """
    from nnunet_lite.data.dataset import read_dataset
    from nnunet_lite.models.folder import told_lengths
    from nnunet_lite.settings import load as load_settings
    from nnunet_lite.training.splits import FoldRule, needs_splits

    begin, settings = time.monotonic(), load_settings(recipe, changes)  # a mistake in it is reported first
    place = folder_of(workspace)
    root = find_raw(str(data), place)
    dataset = read_dataset(root)
    paths = place_of(place, dataset)
    accepted = accept_geometry or (paths.dataset.is_file() and dataset_of(paths).accept_geometry)
    dataset = replace(dataset, accept_geometry=accepted)
    needs_splits(paths.splits, dataset, FoldRule(folds, group_by, stratify, splits))  # so is one in these
    journal = Journal(paths.root / JOURNAL)
    how: dict[str, Any] = {"folds": folds, "group_by": group_by, "stratify": stratify, "splits": splits}
    planning = partial(api.plan, root, workspace=place, workers=workers, accept_geometry=accepted, **how)
    why = why_to_plan(dataset, paths)
    plan = Step("check and plan", "plan", lambda: why is None, planning)
    if why is not None:
        log.info(f"{dataset.name} (workspace {place}) {why}; what there is to train follows from the plan")
    ended = execute([plan], journal)
    use(place, paths.name)

    names = _fold_names(fold, how, paths)
    runs = _runs(paths, settings, configurations, names, device, told_lengths(changes))
    _refuse_changes(runs)
    with cluster_of(scheduler, place) as cluster:
        steps = _steps(runs, dataset_of(paths), paths, workers, device, cluster)
        log.info(overview(f"{dataset.name} (workspace {place})", [plan, *steps], what_is_left(steps, journal)))
        ended += _execute(steps, journal, cluster)
    return _finished(paths, ended, [one.folder for one in runs], workspace, round(time.monotonic() - begin, 2))


def train_on(
    scheduler: str,
    configuration: str,
    *,
    recipe: str = "default",
    changes: dict[str, Any] | None = None,
    folds: int | None = None,
    group_by: Folder | None = None,
    stratify: bool | Folder = False,
    splits: Folder | None = None,
    dataset: str | None = None,
    device: str | None = None,
    workspace: Folder | None = None,
) -> dict[str, Any]:
    """Train all folds of a configuration, and what it needs before, on the workers of a Dask scheduler.

    Parameters are those of `train`. Returns the content of summary.json for each fold.
    """
    from nnunet_lite.models.folder import told_lengths
    from nnunet_lite.settings import load as load_settings

    settings, paths = load_settings(recipe, changes), current_paths(workspace, dataset)
    how: dict[str, Any] = {"folds": folds, "group_by": group_by, "stratify": stratify, "splits": splits}
    runs = _runs(paths, settings, [configuration], _fold_names(None, how, paths), device, told_lengths(changes))
    _refuse_changes(runs)
    with cluster_of(scheduler, paths.root.parent) as cluster:
        preparing = _preprocessing(runs, dataset_of(paths), paths, None, cluster)
        _execute([preparing, *map(_training, runs)], Journal(paths.root / JOURNAL), cluster)
    from nnunet_lite.evaluation.cross_validation import SUMMARY
    from nnunet_lite.models.folder import VALIDATION

    mine = [run for run in runs if run.configuration == configuration]
    return {run.split.name: read_json(run.fold_folder / VALIDATION / SUMMARY) for run in mine}


def _execute(steps: Sequence[Step], journal: Journal, cluster: Cluster | None) -> list[Ended]:
    if cluster is None:
        return execute(steps, journal)
    from nnunet_lite.cluster_steps import execute as execute_on

    return execute_on(cluster, steps, journal)


def _fold_names(fold: Sequence[int | str] | None, how: Mapping[str, Any], paths: Paths) -> list[str]:
    """The folds that are asked for, default all; splits.json is there when this returns, if it is needed."""
    asked = [str(name) for name in fold or ()]
    if asked == ["all"]:
        return asked
    there = api.fold_names(**how, dataset=paths.name, workspace=paths.root.parent)
    return asked or there


def _runs(
    paths: Paths,
    settings: Settings,
    configurations: Sequence[str] | None,
    folds: Sequence[str],
    device: str | None,
    lengthen: frozenset[str],
) -> list[Run]:
    """What is to be trained, first stages of cascades before the second, each examined for mistakes."""
    from nnunet_lite.fold import Request, examined, planned_for

    runs: dict[tuple[str, str], Run] = {}

    def add(configuration: str, fold: str) -> None:
        if (configuration, fold) in runs:
            return
        found = examined(Request(configuration, fold, settings, device=device, lengthen=lengthen), paths)
        if found.first is not None:
            for needed in found.first.folds:
                add(found.first.configuration, needed)
        runs[configuration, fold] = found

    for configuration in configurations or _worth_training(planned_for(paths, settings)):
        for fold in folds:
            add(configuration, fold)
    return list(runs.values())


def _refuse_changes(runs: Sequence[Run]) -> None:
    """Make sure, before anything is done, that all models that were begun go on with these settings.

    Raises
    ------
    UserError : one does not.
    """
    for run in runs:
        try:
            run.refuse_changes()
        except UserError as error:
            fix = (
                "Repeat the old settings, or train beside it with a recipe file of your own, whose name the models get."
            )
            raise UserError(error.what, error.file, fix) from None


def _worth_training(plan: Plan) -> list[str]:
    """The configurations of a plan whose images are large enough for a U-Net.

    Raises
    ------
    UserError : there is none.
    """
    names = [name for name, configuration in plan.configurations.items() if len(configuration.network.features) > 1]
    if left_out := [name for name in plan.configurations if name not in names]:
        log.warn(f"left out, for the images are too small for a U-Net: {', '.join(left_out)}")
    if not names:
        raise UserError("the images are too small for a U-Net: there is nothing to train")
    return names


def _steps(
    runs: Sequence[Run],
    dataset: Dataset,
    paths: Paths,
    workers: int | None,
    device: str | None,
    cluster: Cluster | None,
) -> list[Step]:
    """The steps after the plan."""
    trainings = {(run.configuration, run.split.name): _training(run) for run in runs}
    out = [_preprocessing(runs, dataset, paths, workers, cluster), *trainings.values()]
    folders = list(dict.fromkeys(run.folder for run in runs if run.split.name != "all"))
    if not folders:
        return out  # nothing is held out to select by
    names, place = [folder.name for folder in folders], paths.root.parent
    options: dict[str, Any] = {"dataset": paths.name, "workspace": place}
    selecting = partial(api.select, names, **options, device=device, workers=workers)
    needs = tuple(step.name for step in trainings.values())
    out.append(Step("select", "select", partial(_is_selected, paths, folders), selecting, needs))
    reporting = partial(api.report, **options)
    out.append(Step("report", "report", partial(_is_reported, paths), reporting, ("select",)))
    return out


def _training(run: Run) -> Step:
    """Train and validate a fold."""
    from nnunet_lite.fold import train_and_validate
    from nnunet_lite.models.folder import length
    from nnunet_lite.training.remaining import seconds_of_training, share_done

    of = f"{run.configuration} fold {run.split.name}"
    needs = ["preprocess"]
    if run.first is not None:
        needs += [f"train {run.first.configuration} fold {fold}" for fold in run.first.folds]
    where = (run.fold_folder, run.settings)
    return Step(
        f"train {of}", f"train {run.configuration} {length(run.settings)}", run.is_done,
        partial(train_and_validate, run.request, run.paths), tuple(needs), anywhere=True,
        progress=partial(share_done, *where), seconds=partial(seconds_of_training, *where),
    )  # fmt: skip


def _preprocessing(
    runs: Sequence[Run], dataset: Dataset, paths: Paths, workers: int | None, cluster: Cluster | None
) -> Step:
    """Preprocess every case for all that is trained; once all is trained, nothing needs the arrays any more."""
    from nnunet_lite.preprocessing.store import is_preprocessed, preprocess_dataset

    plans = _merged(runs)

    def is_done() -> bool:
        there = all(is_preprocessed(dataset, plan, list(plan.configurations), paths.preprocessed) for plan in plans)
        return there or all(run.is_done() for run in runs)

    def preprocess() -> None:
        for plan in plans:
            names = list(plan.configurations)
            spread = None if cluster is None else cluster.spread
            preprocess_dataset(dataset, plan, names, paths.preprocessed, workers, log.progress, spread=spread)

    return Step("preprocess", f"preprocess {len(dataset.cases)} cases", is_done, preprocess)


def _merged(runs: Sequence[Run]) -> list[Plan]:
    """The plans of what is trained; one for all configurations that agree in the rest, whose cases are read once."""
    plans: list[Plan] = []
    for run in runs:
        for i, plan in enumerate(plans):
            both = {**run.plan.configurations, **plan.configurations}
            if plan.model_copy(update={"configurations": both}) == run.plan.model_copy(update={"configurations": both}):
                plans[i] = plan.model_copy(update={"configurations": both})
                break
        else:
            plans.append(run.plan)
    return plans


def _is_selected(paths: Paths, models: Sequence[Path]) -> bool:
    """Whether what is selected was chosen among all of these models, after the last of their folds was scored."""
    file = paths.inference
    if not file.is_file():
        return False
    candidates = {name for candidate in read_json(file)["candidates"] for name in candidate["models"]}
    made = file.stat().st_mtime
    scores = [score for model in models for score in model.glob("fold_*/validation/summary.json")]
    return {model.name for model in models} <= candidates and all(score.stat().st_mtime <= made for score in scores)


def _is_reported(paths: Paths) -> bool:
    report, selected = paths.root / REPORT, paths.inference
    return report.is_file() and selected.is_file() and report.stat().st_mtime >= selected.stat().st_mtime


def _finished(
    paths: Paths, ended: Sequence[Ended], folders: Sequence[Path], workspace: Folder | None, seconds: float
) -> Finished:
    from nnunet_lite.evaluation.selection import read_selection

    models, selection, report = tuple(dict.fromkeys(folders)), read_selection(paths), paths.root / REPORT
    return Finished(
        paths.name, tuple(ended), seconds, models, None if selection is None else selection.how,
        "" if selection is None else selection.table(), report if report.is_file() else None,
        _commands(paths, workspace, models),
    )  # fmt: skip


def _commands(paths: Paths, workspace: Folder | None, models: Sequence[Path]) -> tuple[str, ...]:
    """What to type next, as it must be typed in this folder."""
    where = [*paths.option.split(), *([] if workspace is None else ["-w", str(workspace)])]
    chosen = [] if (paths.inference).is_file() else ["-m", str(models[-1])]
    commands = [
        ["nnlite", "predict", "-i", "IMAGES", "-o", "SEGMENTATIONS", *chosen, *where],
        ["nnlite", "info", *where],
    ]
    return tuple(shlex.join(command) for command in commands)
