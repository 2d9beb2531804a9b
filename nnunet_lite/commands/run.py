"""`nnlite run`: all steps from raw data to a report and the commands to predict."""

from __future__ import annotations

import shlex
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from nnunet_lite import log
from nnunet_lite.commands import options
from nnunet_lite.commands.plan import choose_cases, plan
from nnunet_lite.commands.select import report, select
from nnunet_lite.commands.steps import JOURNAL, Journal, Step, StepResult, overview, run_steps
from nnunet_lite.commands.train import fold_names, train_and_validate
from nnunet_lite.commands.training_run import (
    TrainingRun,
    check_earlier_runs,
    plan_runs,
    preprocessing_step,
    training_step,
)
from nnunet_lite.data.dataset import read_dataset
from nnunet_lite.data.raw_files import dataset_paths, reason_to_plan, warn_of_new_files
from nnunet_lite.evaluation.selection import Selection, read_selection
from nnunet_lite.files import read_json
from nnunet_lite.models.bundle import is_imported
from nnunet_lite.models.folder import model_folders, read_run
from nnunet_lite.networks.devices import pick_device, require_working
from nnunet_lite.reporting.page import PAGE
from nnunet_lite.settings import load_settings
from nnunet_lite.training.splits import FoldRule, check_folds
from nnunet_lite.workspace import Paths, find_raw, use, workspace_folder

if TYPE_CHECKING:
    from nnunet_lite.cluster import Cluster


@dataclass(frozen=True)
class RunResult:
    """What `run` did, and its results.

    Parameters
    ----------
    dataset : str
        Name of the dataset.
    steps : tuple of StepResult
        The steps, with their seconds.
    seconds : float
        Time of this run.
    models : tuple of Path
        The model folders.
    selection : Selection or None
        The comparison of the models; None if no cases were held out.
    report : Path or None
        The HTML page.
    commands : tuple of str
        Commands to type next.
    """

    dataset: str
    steps: tuple[StepResult, ...]
    seconds: float
    models: tuple[Path, ...]
    selection: Selection | None
    report: Path | None
    commands: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        return {
            "dataset": self.dataset,
            "steps": [asdict(step) for step in self.steps],
            "seconds": self.seconds,
            "models": [str(folder) for folder in self.models],
            "selected": None if self.selection is None else self.selection.summary,
            "report": None if self.report is None else str(self.report),
            "commands": list(self.commands),
        }

    def to_text(self) -> str:
        table = [] if self.selection is None else [self.selection.to_text(), ""]
        return "\n".join([*table, repr(self), "what comes next:", *(f"  {command}" for command in self.commands)])

    def __repr__(self) -> str:
        done = sum(step.state == "done" for step in self.steps)
        report = "" if self.report is None else f"\nreport: {self.report}"
        before = ", the others before" if done < len(self.steps) else ""
        steps = f"{done} of {len(self.steps)} steps done in {log.duration(self.seconds)}"
        return f"{self.dataset}: {steps}{before}{report}"


def run(
    data: Annotated[str | Path, typer.Argument(help="Folder of the raw data, or its name.")],
    *,
    recipe: Annotated[
        str | None,
        options.setting(help="Name of a recipe, or a TOML file.", show_default="default, or cpu without a GPU"),
    ] = None,
    configurations: Annotated[
        str | Sequence[str] | None,
        options.setting(
            "-c",
            "--configurations",
            help="Configurations to train, as in 2d,3d_fullres.",
            show_default="all of the plan",
        ),
    ] = None,
    fold: Annotated[
        int | str | Sequence[int | str] | None,
        options.setting("-f", "--fold", help='Folds to train, as in 0,1; "all": on every case.', show_default="each"),
    ] = None,
    epochs: Annotated[int | None, options.length(help="Epochs of a fold.", show_default="the recipe's")] = None,
    time_limit: options.TimeLimit = None,
    seed: options.Seed = None,
    folds: options.Folds = None,
    group_by: options.GroupBy = None,
    stratify: options.Stratify = False,
    stratify_by: options.StratifyBy = None,
    splits: options.Splits = None,
    exclude: options.Exclude = None,
    accept: options.Accept = None,
    accept_geometry: options.AcceptGeometry = False,
    device: options.Device = None,
    scheduler: options.Scheduler = None,
    settings: options.SettingOverrides = None,
    workers: options.Workers = None,
    workspace: options.Workspace = None,
) -> RunResult:
    """Check, plan, preprocess, train every fold, select and report. The same command again resumes where it stopped.

    A plan is kept while the data stay the same. First stages of cascades are trained where a configuration needs them.

    Parameters
    ----------
    data : str or Path
        Folder of the raw data, or its name.
    recipe : str, optional
        Name of a recipe, or a TOML file; default: "default", or "cpu" on a CPU unless a model of "default" is begun.
    configurations : str or sequence of str, optional
        Which to train; default: all of the plan.
    fold : int, str or sequence of them, optional
        Which folds to train, or "all" to train on every case; default: each.
    epochs : int, optional
        Length of a fold; default: the recipe's.
    time_limit : str or float, optional
        Of a fold, in minutes or such as "8h"; default: the recipe's.
    seed : int, optional
        Makes two runs identical on the CPU.
    folds, group_by, stratify, stratify_by, splits, exclude, accept, accept_geometry
        As for `plan`.
    device : str, optional
        Such as "cpu" or "cuda:1"; default: a GPU if there is one.
    scheduler : str, optional
        Address of a Dask scheduler, whose workers preprocess and train.
    settings : mapping, optional
        Key to value, on top of the recipe.
    workers : int, optional
        Threads; default: as fits the machine.
    workspace : str or Path, optional
        The workspace.

    Returns
    -------
    RunResult
        The steps, the comparison of the models, and the commands to predict.

    Raises
    ------
    UserError
        The data have errors, a setting is illegal, or an earlier run has other settings.
    Stopped
        A signal ended the run; the same call resumes it.

    Examples
    --------
    nnlite run Task04_Hippocampus
    nnlite run Task04_Hippocampus -c 2d,3d_fullres -f 0 --recipe cpu
    """
    begin = time.monotonic()
    changed = options.overrides_of(
        settings, training__epochs=epochs, training__time_limit=time_limit, training__seed=seed
    )
    resolved = load_settings(recipe or "default", changed)  # a mistake in it is reported first
    place = workspace_folder(workspace)
    root = find_raw(str(data), place)
    dataset = read_dataset(root)
    warn_of_new_files(dataset, place)
    paths = dataset_paths(place, dataset)
    on_cpu = scheduler is None and require_working(pick_device(device)).type == "cpu"
    if recipe is None and on_cpu and not _begun(paths, "default"):
        log.info("on a CPU with the recipe `cpu`, for models in minutes; --recipe default trains as nnU-Net does")
        resolved = load_settings("cpu", changed)
    dataset = choose_cases(dataset, exclude, accept, accept_geometry, paths.dataset)
    rule = FoldRule(folds, group_by, options.strata_of(stratify, stratify_by), splits)
    check_folds(paths.splits, dataset, rule)  # a mistake in these too
    journal = Journal(paths.root / JOURNAL)
    planning = partial(
        plan, root, workspace=place, workers=workers, folds=folds, group_by=group_by, stratify=stratify,
        stratify_by=stratify_by, splits=splits, exclude=[c.id for c in dataset.excluded], accept=dataset.accept,
    )  # fmt: skip
    reason = reason_to_plan(dataset, paths)
    first = Step("check and plan", "plan", lambda: reason is None, planning)
    if reason is not None:
        log.info(f"{dataset.name} (workspace {place}) {reason}; the steps that follow depend on the plan")
    results = run_steps([first], journal)
    use(place, paths.name)

    names = options.names_of(fold)
    if names != ["all"]:
        existing = fold_names(paths, rule)  # also writes splits.json
        names = existing if names in (None, ["all-folds"]) else names
    lengthen = options.sets_length(changed)
    runs = plan_runs(paths, resolved, options.names_of(configurations), names, device=device, lengthen=lengthen)
    check_earlier_runs(runs)
    with options.cluster_of(scheduler, place) as cluster:
        steps = _steps(runs, paths, workers, device, cluster)
        left = journal.seconds_left(steps)
        log.info(overview(f"{dataset.name} (workspace {place})", [first, *steps], left))
        # with the first, which is done, so that they have the numbers of the overview
        results += run_steps([replace(first, is_done=lambda: True), *steps], journal, cluster)[1:]
    models = tuple({run.folder: None for run in runs})
    page = paths.root / PAGE
    return RunResult(
        dataset=paths.name,
        steps=tuple(results),
        seconds=round(time.monotonic() - begin, 2),
        models=models,
        selection=read_selection(paths),
        report=page if page.is_file() else None,
        commands=next_commands(paths, models),
    )


def _begun(paths: Paths, recipe: str) -> bool:
    """Whether a model of a dataset was begun with a recipe; imported ones were not begun here."""
    folders = [folder for folder in model_folders(paths) if not is_imported(folder)]
    return any(read_run(folder)["settings"]["recipe"] == recipe for folder in folders)


def _steps(
    runs: Sequence[TrainingRun], paths: Paths, workers: int | None, device: str | None, cluster: Cluster | None
) -> list[Step]:
    """Return the steps after the plan."""
    trainings = [training_step(run, train_and_validate) for run in runs]
    steps = [preprocessing_step(runs, workers, cluster), *trainings]
    folders = list(dict.fromkeys(run.folder for run in runs if run.split.name != "all"))
    if not folders:
        return steps  # no cases are held out to select by
    place: dict[str, Any] = {"dataset": paths.name, "workspace": paths.root.parent}
    selecting = partial(select, [folder.name for folder in folders], **place, device=device, workers=workers)
    needs = tuple(step.name for step in trainings)
    steps.append(Step("select", "select", partial(_is_selected, paths, folders), selecting, needs))
    steps.append(Step("report", "report", partial(_is_reported, paths), partial(report, **place), ("select",)))
    return steps


def _is_selected(paths: Paths, models: Sequence[Path]) -> bool:
    """Whether the selection was made among all of these models, after the plan and the scores of their last fold."""
    file = paths.inference
    if not file.is_file():
        return False
    candidates = {name for candidate in read_json(file)["candidates"] for name in candidate["models"]}
    made = file.stat().st_mtime
    scores = [score for model in models for score in model.glob("fold_*/validation/summary.json")]
    used = [paths.dataset, *scores]  # a case may have been excluded
    return {model.name for model in models} <= candidates and all(one.stat().st_mtime <= made for one in used)


def _is_reported(paths: Paths) -> bool:
    page, selected = paths.root / PAGE, paths.inference
    return page.is_file() and selected.is_file() and page.stat().st_mtime >= selected.stat().st_mtime


def next_commands(paths: Paths, models: Sequence[Path]) -> tuple[str, ...]:
    """Return the commands to type next, as they must be typed in this folder.

    Parameters
    ----------
    paths : Paths
        Of the planned dataset.
    models : sequence of Path
        Model folders; the last one predicts if none is selected.
    """
    where = shlex.split(paths.option)
    chosen = [] if paths.inference.is_file() else ["-m", str(models[-1])]
    commands = [
        ["nnlite", "predict", "-i", "IMAGES", "-o", "SEGMENTATIONS", *chosen, *where],
        ["nnlite", "info", *where],
    ]
    return tuple(shlex.join(command) for command in commands)
