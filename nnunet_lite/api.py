"""The steps as Python functions; the commands of `nnlite` are these with options in place of arguments.

    import nnunet_lite
    nnunet_lite.plan("Task04_Hippocampus")
    nnunet_lite.train("3d_fullres", 0, recipe="cpu")
    nnunet_lite.predict("in", "out")

Every step works in a workspace (a folder, default ./nnlite_workspace) on its current data set, the one planned last.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from nnunet_lite import log
from nnunet_lite.errors import UserError
from nnunet_lite.workspace import Paths, current, find_raw, read_json, use, workspace_folder, write_json, write_text

if TYPE_CHECKING:
    from nnunet_lite.data.dataset import Dataset
    from nnunet_lite.data.problems import Report
    from nnunet_lite.evaluation.scores import Scores
    from nnunet_lite.plan.schema import Plan
    from nnunet_lite.preprocess.store import Summary

Folder = str | Path
Change = tuple[str, Sequence[int] | None, int | None]  # configuration, patch size, batch size


def check(data: Folder, *, workspace: Folder | None = None, workers: int | None = None) -> Report:
    """Read every file of a data set and report all problems at once.

    Parameters
    ----------
    data : a folder, or a name looked up in the current folder, ./data, the workspace and nnUNet_raw.
    """
    from nnunet_lite.data.check import broken_dataset
    from nnunet_lite.data.check import check as check_dataset
    from nnunet_lite.data.dataset import read_dataset

    root = find_raw(str(data), _workspace(workspace))
    try:
        dataset = read_dataset(root)
    except UserError as error:
        return broken_dataset(root, error)
    return check_dataset(dataset, None, workers=workers, progress=log.progress)


def plan(
    data: Folder,
    *,
    workspace: Folder | None = None,
    preset: str = "default",
    memory: float | None = None,
    adopt: Folder | None = None,
    change: Change | None = None,
    clip_percentiles: tuple[float, float] | None = None,
    stored_as: Literal["float16", "float32"] = "float16",
    splits: Folder | None = None,
    workers: int | None = None,
) -> Plan:
    """Check a data set, take its fingerprint and plan its networks; it becomes the current data set.

    Parameters
    ----------
    preset : default, resenc_m, resenc_l or resenc_xl.
    memory : GPU memory budget in GB; default: the preset's.
    adopt : a plans.json, ours or nnU-Net's, to use instead of making one.
    change : configuration, and the patch and batch size to give it instead of the planned ones.
    splits : folds to use instead of making them, ours or nnU-Net's splits_final.json.
    stored_as : type of the preprocessed images on disk.
    clip_percentiles : clip each image to these percentiles before it is normalised; CT is clipped by its own rule.

    Raises
    ------
    UserError : the data set has errors, which are all logged, or an option is illegal; nothing is written then.
    """
    from nnunet_lite.data.dataset import dataset_to_json, read_dataset
    from nnunet_lite.interop.nnunet import splits_from_nnunet
    from nnunet_lite.plan.fingerprint import check_and_fingerprint
    from nnunet_lite.plan.planner import budget, make_plan

    folds = None if splits is None else splits_from_nnunet(read_json(Path(splits)), Path(splits))
    budget(preset, memory)  # a mistake in the options is told before minutes of reading
    root = find_raw(str(data), _workspace(workspace))
    dataset = read_dataset(root)
    paths = Paths(_workspace(workspace) / dataset.name)
    report, fingerprint = check_and_fingerprint(dataset, workers, log.progress)
    log.info(report.to_text())
    if fingerprint is None:
        errors = report.count("error")
        raise UserError(f"{errors} error{'s' if errors > 1 else ''} must be mended before planning", root, "See above.")
    if adopt is None:
        made = make_plan(fingerprint, dataset.name, dataset.channels, dataset.labels, preset, memory)
    else:
        made = _adopted(Path(adopt), dataset)
    made = _changed(made, change)
    if clip_percentiles is not None:
        clipped = [c if c.normalization == "ct" else c.model_copy(update={"clip_percentiles": clip_percentiles})
                   for c in made.channels]  # fmt: skip
        made = made.model_copy(update={"channels": tuple(clipped)})
    made = made.model_copy(update={"stored_as": stored_as})
    write_json(paths.check, report.to_json())
    write_json(paths.dataset, dataset_to_json(dataset))
    write_json(paths.fingerprint, fingerprint.to_nnunet())
    write_text(paths.plans, made.to_json())
    if folds is not None:
        write_json(paths.splits, folds)
    use(_workspace(workspace), dataset.name)
    return made


def _adopted(file: Path, dataset: Dataset) -> Plan:
    """A plan made elsewhere, for this data set.

    Raises
    ------
    UserError : it is for other channels or labels.
    """
    from nnunet_lite.interop.nnunet import Description, description_to_nnunet, read_plan

    about = Description(dataset.channels, dataset.labels, len(dataset.cases), dataset.file_ending)
    theirs = read_plan(file, description_to_nnunet(about))
    if len(theirs.channels) != len(dataset.channels) or theirs.labels.n_channels != dataset.labels.n_channels:
        raise UserError(
            f"is for {len(theirs.channels)} channels and {theirs.labels.n_channels} outputs, {dataset.name} has "
            f"{len(dataset.channels)} and {dataset.labels.n_channels}",
            file,
        )
    return theirs.model_copy(update={"dataset": dataset.name, "labels": dataset.labels, "n_cases": len(dataset.cases)})


def plan_from_fingerprint(
    fingerprint: Folder,
    dataset_json: Folder,
    *,
    preset: str = "default",
    memory: float | None = None,
    change: Change | None = None,
) -> tuple[Plan, dict[str, Any]]:
    """Plan from a fingerprint.json and a dataset.json alone; returns the plan and the description of the data set."""
    from nnunet_lite.interop.nnunet import description_from_nnunet
    from nnunet_lite.plan.fingerprint import Fingerprint
    from nnunet_lite.plan.planner import make_plan

    told = read_json(Path(dataset_json))
    about = description_from_nnunet(told, Path(dataset_json))
    taken = Fingerprint.read(Path(fingerprint))
    name = str(told.get("name", Path(dataset_json).absolute().parent.name))
    made = make_plan(taken, name, about.channels, about.labels, preset, memory, about.n_cases or None)
    return _changed(made, change), told


def _changed(made: Plan, change: Change | None) -> Plan:
    from nnunet_lite.plan.override import override

    return made if change is None or change[1:] == (None, None) else override(made, *change)


def measure(made: Plan, device: str | None = None) -> str:
    """Predicted against measured GPU memory of a training step, a line for each configuration that can be trained.

    Raises
    ------
    UserError : there is no GPU.
    """
    from nnunet_lite.network.arithmetic import pick_device
    from nnunet_lite.training.measure import measure_step

    target, lines = pick_device(device), []
    for name, planned in made.configurations.items():
        measured = measure_step(made, name, target)
        found = "more than the GPU has" if measured is None else f"{measured:.2f} GB"
        lines.append(f"{name}: predicted {planned.memory_gb:.2f} GB, measured {found}")
    return "\n".join(lines)


def preprocess(
    configurations: Sequence[str] | None = None,
    *,
    dataset: str | None = None,
    clean: bool = False,
    workspace: Folder | None = None,
    workers: int | None = None,
) -> Summary:
    """Preprocess the current data set for some configurations (default: all); what is there already is kept.

    Parameters
    ----------
    clean : delete what the plan does not need any more first.
    """
    from nnunet_lite.plan.schema import Plan
    from nnunet_lite.preprocess.store import preprocess_dataset, prune

    paths = current_paths(workspace, dataset)
    made = Plan.read(paths.plans)
    names = list(configurations or made.configurations)
    if clean:
        count, size = prune(paths.preprocessed, made)
        log.info(f"{count} arrays deleted that the plan does not need, {size / 1e6:.1f} MB")
    return preprocess_dataset(_dataset(paths), made, names, paths.preprocessed, workers, log.progress)


def train(
    configuration: str,
    fold: int | str,
    *,
    recipe: str = "default",
    changes: dict[str, Any] | None = None,
    dataset: str | None = None,
    name: str | None = None,
    device: str | None = None,
    restart: bool | Literal["model"] = False,
    workspace: Folder | None = None,
) -> Scores | None:
    """Train one fold, then predict and score its held-out cases. The same call again goes on where it stopped.

    Parameters
    ----------
    configuration : of the plan, e.g. "3d_fullres".
    fold : 0 to 4, or "all" to train on every case (nothing is held out: returns None).
    recipe : a name in configs/ or a TOML file.
    changes : settings on top of the recipe, e.g. {"training.epochs": 100}.
    name : of the model folder; default `<configuration>-<recipe>`.
    restart : begin anew; the fold that is there is moved aside, not deleted; "model": all folds are.
    """
    from nnunet_lite.plan.schema import Plan
    from nnunet_lite.preprocess.store import open_case, preprocess_dataset
    from nnunet_lite.settings import load as load_settings
    from nnunet_lite.training.folds import ALL, read_fold
    from nnunet_lite.training.run import (
        configured,
        fold_seed,
        is_finished,
        load_cases,
        model_folder,
        open_run,
        other_folds,
        set_aside,
    )

    settings = load_settings(recipe, changes)
    paths = current_paths(workspace, dataset)
    data, planned = _dataset(paths), Plan.read(paths.plans)
    made = configured(planned, configuration, settings)
    split = read_fold(paths.splits, [case.id for case in data.cases], str(fold))
    folder = model_folder(paths, name or f"{configuration}-{settings.recipe}")

    # torch takes seconds to import: mistakes are told before
    from nnunet_lite.evaluation.crossval import validate_fold
    from nnunet_lite.network.arithmetic import pick_device
    from nnunet_lite.training.job import Job
    from nnunet_lite.training.loop import train_fold

    target = pick_device(device)
    if target.type == "cpu" and settings.recipe == "default" and device is None:
        log.warn("there is no GPU, for which the recipe `default` is made; `--recipe cpu` gives a model in minutes")
    if restart:
        only = restart == "model" or not other_folds(folder, split.name)
        set_aside(folder if only else folder / f"fold_{split.name}")
    seed = fold_seed(open_run(folder, made, data, configuration, settings), split.name)
    fold_folder = folder / f"fold_{split.name}"
    if is_finished(fold_folder):
        log.info(f"{fold_folder}: training is finished")
    else:
        preprocess_dataset(data, made, [configuration], paths.preprocessed, settings.training.workers, log.progress)

        def cases(ids: Sequence[str]) -> list[Any]:
            return load_cases(ids, partial(open_case, paths.preprocessed, made, configuration), settings.training.cache)

        training = cases(split.training)
        validation = training if split.name == ALL else cases(split.validation)
        log.info(f"training {configuration} fold {split.name} on {len(training)} cases in {fold_folder}")
        fold_folder.mkdir(parents=True, exist_ok=True)
        train_fold(Job(made, configuration, settings, seed, fold_folder, target, training, validation))
    if split.name == ALL:
        return None
    return validate_fold(folder, split.name, data, split.validation, device)


def fold_names(*, dataset: str | None = None, workspace: Folder | None = None) -> list[str]:
    """The folds of the current data set, "0" and up; splits.json is made if it is not there."""
    from nnunet_lite.training.folds import read_splits

    paths = current(_workspace(workspace), dataset)
    return [str(i) for i in range(len(read_splits(paths.splits, [case.id for case in _dataset(paths).cases])))]


@dataclass(frozen=True)
class Predictions:
    """The label maps that were written, what failed (case id -> why), and the model that was used."""

    files: tuple[Path, ...]
    failed: dict[str, str]
    model: Path
    folds: tuple[str, ...]


def predict(
    source: Folder,
    out: Folder,
    *,
    model: Folder | None = None,
    configuration: str | None = None,
    folds: Sequence[str | int] | None = None,
    dataset: str | None = None,
    device: str | None = None,
    changes: dict[str, Any] | None = None,
    skip_existing: bool = False,
    workspace: Folder | None = None,
) -> Predictions:
    """Segment an image or a folder of images.

    Parameters
    ----------
    source : a file, or a folder of any mix of supported formats.
    model : a model folder; by default the trained one of the current data set (says which).
    configuration : take a model of this configuration.
    folds : networks to average; default: all trained folds.
    changes : of the `inference` settings, e.g. {"inference.mirroring": False}.
    skip_existing : keep label maps that are there already.
    """
    from nnunet_lite.data.dataset import find_cases
    from nnunet_lite.data.problems import plural
    from nnunet_lite.inference.predictor import load, predict_cases, read_model

    folder = Path(model) if model else choose_model(current_paths(workspace, dataset), configuration)
    cases = find_cases(Path(source), len(read_model(folder)[0].channels))
    loaded = load(folder, folds, device, changes)
    if loaded.device.type == "cpu":
        from nnunet_lite.network.arithmetic import keep_freed_memory  # imports torch: after the checks above

        keep_freed_memory()
    where = f"{loaded.device}, {loaded.arithmetic.precision}"
    log.info(f"predicting {plural(len(cases), 'image')} with {folder} (fold {', '.join(loaded.folds)}) on {where}")
    files, failed = predict_cases(loaded, cases, Path(out), skip_existing=skip_existing, show=log.progress)
    return Predictions(tuple(files), failed, folder, loaded.folds)


def choose_model(paths: Paths, configuration: str | None = None) -> Path:
    """The trained model with the most folds, of equals the one that scored best on its held-out cases.

    Raises
    ------
    UserError : nothing is trained (of that configuration).
    """
    from nnunet_lite.evaluation.crossval import mean_dice
    from nnunet_lite.training.run import first_training, model_folders, trained_folds

    found = [
        (len(folds := trained_folds(folder)), max(mean_dice(folder, fold) or 0.0 for fold in folds), folder)
        for folder in model_folders(paths)
        if trained_folds(folder)
        and configuration in (None, folder.name, read_json(folder / "run.json")["configuration"])
    ]
    if not found:
        of = f" {configuration}" if configuration else ""
        raise UserError(f"no{of} model of {paths.name} is trained", paths.models, f"Run `{first_training(paths)}`.")
    n_folds, dice, best = max(found)
    if len(found) > 1:
        why = f"most folds ({n_folds}), then best Dice on held-out cases ({dice:.3f})"
        log.info(f"{len(found)} models are trained; taking {best.name}: {why}. -m takes another")
    return best


def evaluate(prediction: Folder, reference: Folder, **options: Any) -> Scores:
    """Score label maps against references; see `nnunet_lite.evaluation.scores.evaluate`."""
    from nnunet_lite.evaluation.scores import evaluate as evaluate_folders

    return evaluate_folders(Path(prediction), Path(reference), **options)


def _workspace(given: Folder | None) -> Path:
    return workspace_folder(None if given is None else Path(given))


def current_paths(workspace: Folder | None = None, dataset: str | None = None) -> Paths:
    """The files of the data set to work on; logs which one it is."""
    paths = current(_workspace(workspace), dataset)
    log.info(f"data set {paths.name} (workspace {paths.root.parent})")
    return paths


def _dataset(paths: Paths) -> Dataset:
    from nnunet_lite.data.dataset import dataset_from_json

    return dataset_from_json(read_json(paths.dataset))
