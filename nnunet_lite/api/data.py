"""Steps up to preprocessed data: check, plan, preprocess."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from nnunet_lite import log
from nnunet_lite.api.place import Folder, cluster_of, current_paths, dataset_of, folder_of, place_of
from nnunet_lite.errors import UserError
from nnunet_lite.system import GB, in_units
from nnunet_lite.workspace import find_raw, read_json, use, write_json

if TYPE_CHECKING:
    from nnunet_lite.data.problems import Report
    from nnunet_lite.planning.schema import Plan
    from nnunet_lite.preprocessing.store import Summary

Change = tuple[str, Sequence[int] | None, int | None]  # configuration, patch size, batch size


def check(
    data: Folder, *, accept_geometry: bool = False, workspace: Folder | None = None, workers: int | None = None
) -> Report:
    """Read every file of a dataset and report all problems at once.

    Parameters
    ----------
    data : a folder, or a name looked up in the current folder, ./data, the workspace and nnUNet_raw.
    accept_geometry : take files of a case by their voxels where origin or direction differ.
    """
    from nnunet_lite.data.check import broken_dataset
    from nnunet_lite.data.check import check as check_dataset
    from nnunet_lite.data.dataset import read_dataset

    root = find_raw(str(data), folder_of(workspace))
    try:
        dataset = read_dataset(root)
    except UserError as error:
        return broken_dataset(root, error)
    dataset = replace(dataset, accept_geometry=accept_geometry)
    return check_dataset(dataset, None, workers=workers, progress=log.progress)


def plan(
    data: Folder,
    *,
    workspace: Folder | None = None,
    preset: str | None = None,
    memory: float | None = None,
    adopt: Folder | None = None,
    change: Change | None = None,
    clip_percentiles: tuple[float, float] | None = None,
    stored_as: Literal["float16", "float32"] | None = None,
    folds: int | None = None,
    group_by: Folder | None = None,
    stratify: bool | Folder = False,
    splits: Folder | None = None,
    accept_geometry: bool = False,
    workers: int | None = None,
) -> Plan:
    """Check a dataset, take its fingerprint and plan its networks; it becomes the one planned last.

    Planned before, it is planned with the same options, as far as none are given, and with the edits of
    plans.json, as far as the planner gives the same for them as before; a copy, plans_1.json, keeps the others.

    Parameters
    ----------
    preset : default, resenc_m, resenc_l or resenc_xl.
    memory : GPU memory budget in GB; default: the preset's.
    adopt : a plans.json, ours or nnU-Net's, to use instead of making one.
    change : configuration, and the patch and batch size to give it instead of the planned ones.
    folds, group_by, stratify, splits : see `training.splits.FoldRule`; splits.json is written if one is given, or if
        there is a splits_final.json.
    stored_as : type of the preprocessed images on disk; default: float16, or float32 where a channel is not
        standardised.
    accept_geometry : take files of a case by their voxels where origin or direction differ; preprocessing does so too.
    clip_percentiles : clip each image to these percentiles before it is normalised; CT is clipped by its own rule.

    Raises
    ------
    UserError : the dataset has errors, which are all logged, or an option is illegal; nothing is written then.
    """
    from nnunet_lite.data.dataset import dataset_to_json, read_dataset
    from nnunet_lite.data.problems import plural
    from nnunet_lite.models.folder import model_folders, other_folds, set_aside
    from nnunet_lite.planning import replanning
    from nnunet_lite.planning.fingerprint import check_and_fingerprint
    from nnunet_lite.preprocessing.raw_files import look_at, memorize
    from nnunet_lite.training.grouping import warn_of_patients
    from nnunet_lite.training.splits import (
        ALL,
        FoldRule,
        make_splits,
        needs_splits,
        warn_of_unused_splits,
        write_splits,
    )

    # A mistake in the options is reported before minutes of reading.
    given = replanning.plan_options(preset, memory, adopt, change, clip_percentiles, stored_as)
    root = find_raw(str(data), folder_of(workspace))
    dataset = replace(read_dataset(root), accept_geometry=accept_geometry)
    paths = place_of(folder_of(workspace), dataset)
    rule = FoldRule(folds, group_by, stratify, splits)
    trained = [folder.name for folder in model_folders(paths) if other_folds(folder, ALL)]
    other_splits = needs_splits(paths.splits, dataset, rule, trained)
    if rule == FoldRule():
        warn_of_unused_splits(paths.splits, dataset)
    earlier = replanning.read_earlier_plan(paths)
    adopted = replanning.read_adopted_plan(given, earlier, dataset)
    raw = look_at(dataset.cases, paths.raw, workers, log.progress)  # first: a change while files are checked is seen
    problems, fingerprint = check_and_fingerprint(dataset, workers, log.progress)
    log.info(problems.to_text())
    if fingerprint is None:
        if errors := problems.count("error"):
            raise UserError(f"{plural(errors, 'error')} must be corrected before planning", root, "See above.")
        fix = "Correct the headers, or plan with --accept-geometry. See above."
        raise UserError("origin or direction differ between files of a case", root, fix)
    new = replanning.replan(given, earlier, fingerprint, dataset, adopted, trained=bool(model_folders(paths)))
    made_splits = make_splits(dataset, rule) if other_splits else None
    replanning.write_plan(paths, new, earlier)  # first: the files below say that it is up to date
    write_json(paths.check, problems.to_json())
    write_json(paths.dataset, dataset_to_json(dataset))
    write_json(paths.fingerprint, fingerprint.to_nnunet())
    memorize(paths.raw, raw)
    if made_splits is not None:
        if (old := set_aside(paths.splits)) is not None:
            log.info(f"the previous folds are kept in {old}")
        write_splits(paths.splits, *made_splits)
    elif not paths.splits.is_file():
        warn_of_patients([case.id for case in dataset.cases])
    use(folder_of(workspace), dataset.name)
    return new.plan


def plan_from_fingerprint(
    fingerprint: Folder,
    dataset_json: Folder,
    *,
    preset: str = "default",
    memory: float | None = None,
    change: Change | None = None,
) -> tuple[Plan, dict[str, Any]]:
    """Plan from a fingerprint.json and a dataset.json alone; returns the plan and the description of the dataset."""
    from nnunet_lite.planning.fingerprint import Fingerprint
    from nnunet_lite.planning.nnunet import description_from_nnunet
    from nnunet_lite.planning.override import override_sizes
    from nnunet_lite.planning.planner import make_plan

    told = read_json(Path(dataset_json))
    about = description_from_nnunet(told, Path(dataset_json))
    taken = Fingerprint.read(Path(fingerprint))
    name = str(told.get("name", Path(dataset_json).absolute().parent.name))
    made = make_plan(taken, name, about.channels, about.labels, preset, memory, about.n_cases or None)
    return made if change is None or change[1:] == (None, None) else override_sizes(made, *change), told


def measure(made: Plan, device: str | None = None) -> str:
    """Predicted against measured GPU memory of a training step, a line for each configuration that can be trained.

    Raises
    ------
    UserError : there is no GPU.
    """
    from nnunet_lite.networks.precision import pick_device
    from nnunet_lite.training.measure import measure_step

    target, lines = pick_device(device), []
    for name, planned in made.configurations.items():
        measured = measure_step(made, name, target)
        found = "more than the GPU has" if measured is None else in_units(measured * GB)
        lines.append(f"{name}: predicted {in_units((planned.memory_gb or 0) * GB)}, measured {found}")
    return "\n".join(lines)


def preprocess(
    configurations: Sequence[str] | None = None,
    *,
    dataset: str | None = None,
    clean: bool = False,
    scheduler: str | None = None,
    workspace: Folder | None = None,
    workers: int | None = None,
) -> Summary:
    """Preprocess a planned dataset for some configurations (default: all); what is there already is kept.

    Parameters
    ----------
    dataset : its name, or the start of it; needed where the workspace has several planned datasets.
    clean : delete what the plan does not need any more first.
    scheduler : address of a Dask scheduler, whose workers do it; see docs/cluster.md.
    """
    from nnunet_lite.planning.schema import Plan
    from nnunet_lite.preprocessing.store import preprocess_dataset, prune

    paths = current_paths(workspace, dataset)
    made = Plan.read(paths.plans)
    names = list(configurations or made.configurations)
    if clean:
        count, size = prune(paths.preprocessed, made)
        log.info(f"{count} arrays deleted that the plan does not need, {in_units(size)}")
    with cluster_of(scheduler, paths.root.parent) as cluster:
        return preprocess_dataset(
            dataset_of(paths), made, names, paths.preprocessed, workers, log.progress,
            spread=None if cluster is None else cluster.spread,
        )  # fmt: skip
