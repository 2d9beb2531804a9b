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
    folds: int | None = None,
    group_by: Folder | None = None,
    stratify: bool | Folder = False,
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
    folds, group_by, stratify, splits : see `training.folds.wanted_folds`; splits.json is written if one is given.
    stored_as : type of the preprocessed images on disk.
    clip_percentiles : clip each image to these percentiles before it is normalised; CT is clipped by its own rule.

    Raises
    ------
    UserError : the data set has errors, which are all logged, or an option is illegal; nothing is written then.
    """
    from nnunet_lite.data.dataset import dataset_to_json, read_dataset
    from nnunet_lite.plan.fingerprint import check_and_fingerprint
    from nnunet_lite.plan.planner import budget, make_plan
    from nnunet_lite.training.folds import ALL, make_splits, must_be_made, point_out_groups, wanted_folds, write_splits
    from nnunet_lite.training.run import model_folders, other_folds, set_aside

    budget(preset, memory)  # a mistake in the options is told before minutes of reading
    root = find_raw(str(data), _workspace(workspace))
    dataset = read_dataset(root)
    paths, ids = Paths(_workspace(workspace) / dataset.name), [case.id for case in dataset.cases]
    wanted = wanted_folds(dataset, folds, group_by, stratify, splits)
    trained = [folder.name for folder in model_folders(paths) if other_folds(folder, ALL)]
    other_splits = must_be_made(paths.splits, ids, wanted, trained)
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
    made_splits = make_splits(ids, wanted) if other_splits else None
    write_json(paths.check, report.to_json())
    write_json(paths.dataset, dataset_to_json(dataset))
    write_json(paths.fingerprint, fingerprint.to_nnunet())
    write_text(paths.plans, made.to_json())
    if made_splits is not None:
        if (old := set_aside(paths.splits)) is not None:
            log.info(f"the folds that were there are kept in {old}")
        write_splits(paths.splits, *made_splits)
    elif not paths.splits.is_file():
        point_out_groups(ids)
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
    folds: int | None = None,
    group_by: Folder | None = None,
    stratify: bool | Folder = False,
    splits: Folder | None = None,
    dataset: str | None = None,
    name: str | None = None,
    device: str | None = None,
    restart: bool | Literal["model"] = False,
    resume: bool = False,
    force: bool = False,
    preview: bool = False,
    workspace: Folder | None = None,
) -> Scores | None:
    """Train one fold, then predict and score its held-out cases. The same call again goes on where it stopped.

    The second stage of a cascade learns from what the first one predicts of cases that it held out: the folds of the
    first stage that this needs are trained before, with the same recipe and settings, where they are not there.

    Parameters
    ----------
    configuration : of the plan, e.g. "3d_fullres".
    fold : 0 to 4, or "all" to train on every case (nothing is held out: returns None).
    recipe : a name in configs/ or a TOML file.
    changes : settings on top of the recipe, e.g. {"training.epochs": 100}.
    folds, group_by, stratify, splits : see `training.folds.wanted_folds`; for splits.json where it is not there yet.
    name : of the model folder; default `<configuration>-<recipe>`. A first stage of the recipe that is trained is used
        by all second stages; else it is named alike.
    restart : begin anew; the fold that is there is moved aside, not deleted; "model": all folds are.
    resume : go on with a run that was begun; where there is none, that is an error.
    force : go on with changed settings; a longer run needs no force.
    preview : draw augmented samples to fold_k/preview.png first.

    Raises
    ------
    UserError : an illegal setting, a run that was begun with others, or nothing to resume.
    Stopped : a signal asked for it; the checkpoint is written.
    """
    from nnunet_lite.fold import Request, train_and_validate
    from nnunet_lite.settings import load as load_settings

    settings = load_settings(recipe, changes)  # a mistake in it is told first
    request = Request(
        configuration, str(fold), settings, folds, group_by, stratify, splits, name, device, restart,
        resume, force, preview,
    )  # fmt: skip
    return train_and_validate(request, current_paths(workspace, dataset))


def fold_names(
    *,
    folds: int | None = None,
    group_by: Folder | None = None,
    stratify: bool | Folder = False,
    splits: Folder | None = None,
    dataset: str | None = None,
    workspace: Folder | None = None,
) -> list[str]:
    """The folds of the current data set, "0" and up; splits.json is made if it is not there, as in `train`."""
    from nnunet_lite.training.folds import read_splits, wanted_folds

    paths = current(_workspace(workspace), dataset)
    data = _dataset(paths)
    wanted = wanted_folds(data, folds, group_by, stratify, splits)
    return [str(i) for i in range(len(read_splits(paths.splits, [case.id for case in data.cases], wanted)))]


@dataclass(frozen=True)
class Predictions:
    """The label maps that were written, what failed (case id -> why), and the models that were used."""

    files: tuple[Path, ...]
    failed: dict[str, str]
    models: tuple[Path, ...]
    folds: tuple[str, ...]


def predict(
    source: Folder | Sequence[Folder],
    out: Folder,
    *,
    model: Folder | Sequence[Folder] | None = None,
    configuration: str | Sequence[str] | None = None,
    folds: Sequence[str | int] | None = None,
    speed: Literal["fast", "balanced", "best"] | None = None,
    save_probabilities: str | None = None,
    save_uncertainty: bool = False,
    dicom_seg: bool = False,
    dataset: str | None = None,
    device: str | None = None,
    changes: dict[str, Any] | None = None,
    skip_existing: bool = False,
    workspace: Folder | None = None,
) -> Predictions:
    """Segment images.

    Parameters
    ----------
    source : files, DICOM series, or folders of any mix of supported formats.
    model : a model folder, ours or nnU-Net's, or an exported zip; by default the trained one of the current data set
        (says which). Several vote with the mean of their probabilities.
    configuration : take a model of this configuration, or of each of several, which then vote.
    folds : networks to average; default: all trained folds.
    speed : best: as the model's settings say; balanced: without mirrored copies; fast: by one fold, and with windows
        that overlap less, too. What is given besides, such as `folds`, stands.
    save_probabilities : "all", or names of labels with commas: maps for them in `out`/probabilities.
    save_uncertainty : maps of entropy and of the folds' disagreement in `out`/uncertainty.
    dicom_seg : write a DICOM segmentation of each DICOM series.
    changes : of the `inference` settings, e.g. {"inference.mirroring": False}.
    skip_existing : keep label maps that are there already.
    """
    from nnunet_lite.data.cases import find_all_cases
    from nnunet_lite.data.problems import plural
    from nnunet_lite.inference.folder import predict_cases
    from nnunet_lite.inference.maps import Wanted, wanted_labels
    from nnunet_lite.inference.predictor import read_model
    from nnunet_lite.models import SPEEDS, choose_model, first_fold, in_our_form, load_all

    paths = None if model else current_paths(workspace, dataset)
    names: Sequence[str | None] = [configuration] if configuration is None else _listed(configuration)
    folders = [choose_model(paths, name) for name in names] if paths else [Path(one) for one in _listed(model or ())]
    if speed == "fast" and folds is None:
        folds = first_fold(folders)
    with in_our_form(folders, folds) as ours:
        plan = read_model(ours[0])[0]
        cases = find_all_cases([Path(one) for one in _listed(source)], len(plan.channels))
        asked = () if save_probabilities is None else wanted_labels(save_probabilities, plan.labels)
        loaded = load_all(folders, ours, folds, device, {**SPEEDS[speed or "best"], **(changes or {})})
    if loaded.device.type == "cpu":
        from nnunet_lite.network.arithmetic import keep_freed_memory  # imports torch: after the checks above

        keep_freed_memory()
    log.info(
        f"predicting {plural(len(cases), 'image')} with {loaded} on {loaded.device}, {loaded.arithmetic.precision}"
    )
    files, failed = predict_cases(
        loaded, cases, Path(out), wanted=Wanted(asked, save_uncertainty), dicom_seg=dicom_seg,
        skip_existing=skip_existing, show=log.progress,
    )  # fmt: skip
    return Predictions(tuple(files), failed, tuple(folders), loaded.folds)


def _listed(given: Any) -> list[Any]:
    return [given] if isinstance(given, str | Path) else list(given)


def import_model(
    source: Folder, out: Folder | None = None, *, replace: bool = False, workspace: Folder | None = None
) -> Path:
    """Make a model folder of an exported zip or of a model that nnU-Net v2 wrote; nothing that they carry is run.

    Parameters
    ----------
    out : where; default: among the models of its data set in the workspace, under the name that the model has.
    replace : set a model of that name aside first (zip).

    Returns
    -------
    The new model folder.
    """
    from nnunet_lite.interop.model import dataset_name
    from nnunet_lite.interop.model import import_model as import_folder
    from nnunet_lite.interop.unpack import is_bundle, read_manifest, unpack
    from nnunet_lite.training.run import model_folder

    path, place = Path(source).absolute(), _workspace(workspace)
    if is_bundle(path):
        about = read_manifest(path)
        target = Path(out) if out else model_folder(Paths(place / about.dataset), about.models[0])
        return unpack(path, target, replace=replace)
    target = Path(out) if out else model_folder(Paths(place / dataset_name(path)), path.name)
    import_folder(path, target)
    return target


def export_model(
    out: Folder,
    model: Folder | None = None,
    *,
    format: Literal["zip", "nnunet", "onnx"] = "zip",
    licence: str | None = None,
    note: str | None = None,
    configuration: str | None = None,
    dataset: str | None = None,
    workspace: Folder | None = None,
) -> Path:
    """Pack a model into one file that travels, or write it for others to predict with; returns the model's folder.

    Parameters
    ----------
    model, configuration : as for `predict`.
    format : zip (for `import_model`), nnunet (a folder for nnU-Net v2) or onnx (a folder, see docs/models.md).
    licence : SPDX identifier, text or file. note : on the training data. Both for zip.
    """
    from nnunet_lite.interop.model import export_model as export_folder
    from nnunet_lite.interop.model import native
    from nnunet_lite.models import choose_model

    folder = Path(model) if model else choose_model(current_paths(workspace, dataset), configuration)
    if format == "nnunet":
        export_folder(folder, Path(out))
        return folder
    with native(folder) as ours:
        if format == "zip":
            from nnunet_lite.interop.bundle import licence_text, pack

            pack(ours, Path(out), licence=None if licence is None else licence_text(licence), note=note)
        else:
            from nnunet_lite.interop.onnx import export_onnx

            worst = max(export_onnx(ours, Path(out)).values())
            log.info(f"logits differ from torch's by {worst:.1e} at most")
    return folder


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
