"""`nnlite check`, `plan` and `preprocess`: from raw data to preprocessed cases."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from nnunet_lite import log
from nnunet_lite.commands import options
from nnunet_lite.data.check import broken_dataset, check_dataset, exclude_cases
from nnunet_lite.data.dataset import Dataset, channels_of, dataset_to_json, labels_of, read_dataset, stored_dataset
from nnunet_lite.data.geometry import ACCEPTABLE
from nnunet_lite.data.problems import Report, check_kinds, few, name_cases, plural
from nnunet_lite.data.raw_files import (
    RawCase,
    changed_files,
    dataset_paths,
    read_stamps,
    scan_raw_cases,
    warn_of_new_files,
    write_stamps,
)
from nnunet_lite.errors import UserError
from nnunet_lite.files import must_be_writable, read_json, write_json
from nnunet_lite.inference.cases import output_file
from nnunet_lite.models.bundle import is_imported
from nnunet_lite.models.folder import SUMMARY, VALIDATION, first_training, is_begun, model_folders
from nnunet_lite.planning import replanning
from nnunet_lite.planning.fingerprint import Fingerprint, check_and_fingerprint
from nnunet_lite.planning.nnunet import plan_to_nnunet
from nnunet_lite.planning.planner import apply_options, make_plan, memory_budget
from nnunet_lite.planning.schema import Options, Plan, Precision
from nnunet_lite.planning.spacing import warn_of_spacing
from nnunet_lite.preprocessing.store import PreprocessingSummary, preprocess_dataset
from nnunet_lite.settings import Preset
from nnunet_lite.system import expand_home
from nnunet_lite.training.splits import FoldRule, check_folds, make_splits, write_splits
from nnunet_lite.workspace import Paths, find_raw, select_dataset, use, workspace_folder

READER = "overwrite_image_reader_writer"  # in nnU-Net's dataset.json: the reader to take


def check(
    data: Annotated[str | Path, typer.Argument(help="Folder of the raw data, or its name.")],
    *,
    exclude: options.Exclude = None,
    accept: options.Accept = None,
    accept_geometry: options.AcceptGeometry = False,
    workers: options.Workers = None,
    workspace: options.Workspace = None,
) -> Report:
    """Report every problem of a dataset at once.

    Every file is read; nothing is written.

    Parameters
    ----------
    data : str or Path
        A folder, or a name that is looked up in the current folder, ./data, the workspace and nnUNet_raw.
    exclude : str or sequence of str, optional
        Ids of cases to leave out.
    accept : str or sequence of str, optional
        Kinds of problems to count as notices.
    accept_geometry : bool
        Take files of a case by their voxels if origin or direction differ: accept "origin" and "direction".
    workers : int, optional
        Threads, 0 for none; default: as fits the machine.
    workspace : str or Path, optional
        The workspace; default: NNLITE_WORKSPACE, otherwise ./nnlite_workspace.

    Returns
    -------
    Report
        The problems. The command exits with code 2 if one of them is an error.

    Raises
    ------
    UserError
        There is no such case or kind, or the kind cannot be accepted.

    Examples
    --------
    nnlite check Task04_Hippocampus
    nnlite check /data/Dataset004_Liver --exclude liver_12 --accept duplicate_case
    """
    place = workspace_folder(workspace)
    root = find_raw(str(data), place)
    try:
        dataset = read_dataset(root)
    except UserError as error:
        return broken_dataset(root, error)
    warn_of_new_files(dataset, place)
    dataset = choose_cases(dataset, exclude, accept, accept_geometry)
    return check_dataset(dataset, workers=workers)


def choose_cases(
    dataset: Dataset,
    exclude: str | Sequence[str] | None,
    accept: str | Sequence[str] | None,
    accept_geometry: bool,
    planned: Path | None = None,
) -> Dataset:
    """Return a raw dataset with the cases and the accepted problems that the options of a call name.

    Parameters
    ----------
    dataset : Dataset
        The raw dataset.
    exclude, accept : str or sequence of str, optional
        As for `check`; None for those of `planned`.
    accept_geometry : bool
        As for `check`.
    planned : Path, optional
        dataset.json of the workspace, which may not exist.

    Raises
    ------
    UserError
        There is no such case or kind, or the kind cannot be accepted.
    """
    earlier = stored_dataset(planned) if planned and planned.is_file() else dataset
    kinds = earlier.accept if accept is None else check_kinds(options.names_of(accept) or [])
    kinds += ACCEPTABLE if accept_geometry else ()
    known = {case.id for case in dataset.cases}
    gone = tuple(case for case in earlier.excluded if case.id not in known) if exclude is None else ()
    given = [case.id for case in earlier.excluded if case.id in known] if exclude is None else options.list_of(exclude)
    left_out = [name for text in given for name in ([text] if text in known else options.names_of(text) or [])]
    chosen = exclude_cases(dataset, left_out)
    return replace(chosen, excluded=chosen.excluded + gone, accept=tuple(dict.fromkeys(kinds)))


def plan(
    data: Annotated[str | Path | None, typer.Argument(help="Folder of the raw data, or its name.")] = None,
    *,
    preset: Annotated[
        Preset | None,
        options.setting(
            metavar="PRESET",
            help="U-Net: default; resenc_m, _l or _xl; mednext_s, _b, _m or _l.",
            show_default="as planned before, otherwise default",
        ),
    ] = None,
    memory: Annotated[
        float | None, options.setting(help="GPU memory budget in GB.", show_default="the preset's")
    ] = None,
    spacing: Annotated[
        float | Sequence[float] | None,
        options.setting(
            metavar="MM", help="Target spacing: one length for all axes, or z y x.", show_default="as the data's"
        ),
    ] = None,
    plans: Annotated[str | Path | None, options.setting(help="Adopt this plans.json, ours or nnU-Net's.")] = None,
    patch_size: options.PatchSize = None,
    batch_size: Annotated[int | None, options.setting(min=1, help="Patches per step, instead of the planned.")] = None,
    configuration: Annotated[
        str | Sequence[str] | None,
        options.setting(
            "-c",
            "--configuration",
            help="Configuration that gets these sizes.",
            show_default="3d_fullres, or 2d for a flat patch",
        ),
    ] = None,
    clip_percentiles: Annotated[
        tuple[float, float] | None,
        options.setting(min=0, max=100, help="Clip each image to these first; 0 100: not at all."),
    ] = None,
    folds: options.Folds = None,
    group_by: options.GroupBy = None,
    stratify: options.Stratify = False,
    stratify_by: options.StratifyBy = None,
    splits: options.Splits = None,
    store: Annotated[
        Precision | None, options.setting(help="Type of stored images.", show_default="as planned before")
    ] = None,
    exclude: options.Exclude = None,
    accept: options.Accept = None,
    accept_geometry: options.AcceptGeometry = False,
    from_fingerprint: Annotated[str | Path | None, options.data(help="Plan from this file, not from data.")] = None,
    dataset_json: Annotated[str | Path | None, options.data(help="dataset.json, with --from-fingerprint.")] = None,
    format: Annotated[Literal["nnlite", "nnunet"], options.output(help="Format of --output.")] = "nnlite",
    output: Annotated[str | Path | None, options.output(help="Write the plan to this file too.")] = None,
    workers: options.Workers = None,
    workspace: options.Workspace = None,
) -> Plan:
    """Check a dataset, take its fingerprint and plan its networks; the options are kept for planning it again.

    A dataset that was planned before is planned with its earlier options where none are given. Edits of plans.json
    stay, as far as the planner's own result is the same as before; a copy, plans_1.json, keeps the others. The dataset
    becomes the one planned last.

    Parameters
    ----------
    data : str or Path, optional
        Folder of the raw data, or its name; without it, give `from_fingerprint`.
    preset : {"default", "resenc_m", "resenc_l", "resenc_xl", "mednext_s", "mednext_b", "mednext_m", "mednext_l"}
        Kind of U-Net; default: as planned before.
    memory : float, optional
        GPU memory budget in GB; default: the preset's.
    spacing : float or sequence of float, optional
        mm that 3d_fullres resamples to: one for all axes, (z, y, x), or (y, x) of pictures; default: as planned before,
        otherwise the data's. Patch, batch and the other configurations follow from it.
    plans : str or Path, optional
        Adopt this plans.json, ours or nnU-Net's.
    patch_size : str or sequence of int, optional
        Voxels (z, y, x), such as "40x56x40", instead of the planned one.
    batch_size : int, optional
        Instead of the planned one.
    configuration : str or sequence of str, optional
        Which gets these sizes, without which it is skipped; default: "3d_fullres", or "2d" for a flat patch.
    clip_percentiles : tuple of float, optional
        Clip each image to these before normalisation; (0, 100) for no longer.
    folds : int, optional
        Number of folds; default: 5.
    group_by : str or Path, optional
        Regular expression or CSV with the group of each case, which is never on both sides of a fold.
    stratify : bool
        Folds with equal shares of labels and their volumes.
    stratify_by : str or Path, optional
        CSV with the stratum of each case, for folds with equal shares of strata.
    splits : str or Path, optional
        Folds to use: splits.json, splits_final.json or a CSV.
    store : {"float16", "float32"}, optional
        Type of preprocessed images on disk; default: as planned before.
    exclude : str or sequence of str, optional
        Ids of cases to leave out; default: as planned before. "" leaves out none.
    accept : str or sequence of str, optional
        Kinds of problems to count as notices; default: as planned before. "" accepts none.
    accept_geometry : bool
        Take files of a case by their voxels if origin or direction differ: accept "origin" and "direction".
    from_fingerprint, dataset_json : str or Path, optional
        Plan from these two files instead of data.
    format : {"nnlite", "nnunet"}
        Of `output`.
    output : str or Path, optional
        Write the plan to this file too.
    workers : int, optional
        Threads, 0 for none; default: as fits the machine.
    workspace : str or Path, optional
        The workspace; default: NNLITE_WORKSPACE, otherwise ./nnlite_workspace.

    Returns
    -------
    Plan
        The content of plans.json.

    Raises
    ------
    UserError
        The dataset has errors, which are all logged, or an option is illegal. Nothing is written in these cases.

    Examples
    --------
    nnlite plan Task04_Hippocampus
    nnlite plan /data/Dataset004_Liver --preset resenc_m --memory 16
    nnlite plan /data/Dataset004_Liver --spacing 2.5
    """
    # A mistake in the options is reported before minutes of reading.
    memory_budget(preset or "default", memory)
    patch = options.patch_of(patch_size)
    sizes = {"patch_size": patch, "batch_size": batch_size}
    resized = options.names_of(configuration)
    if resized and patch is None and batch_size is None:
        log.info("-c is skipped: all configurations are planned; it chooses those of --patch-size and --batch-size")
    resized = resized or ["2d" if patch and len(patch) == 2 else "3d_fullres"]
    given = Options.check(
        preset=preset,
        memory_gb=memory,
        spacing=spacing,
        adopted=None if plans is None else str(expand_home(plans).absolute()),
        sizes={} if patch is None and batch_size is None else dict.fromkeys(resized, sizes),
        clip_percentiles=clip_percentiles,
        stored_as=store,
    )
    if plans is not None and spacing is not None:
        raise UserError("--plans has a spacing of its own, --spacing plans another", fix="Give one of the two.")
    if output is None and format != "nnlite":
        raise UserError(f"--format {format} is given without a file", fix="Say where to write it: --output FILE.")
    if (from_fingerprint is None) != (dataset_json is None):
        raise UserError("--from-fingerprint and --dataset-json need each other")
    if output is not None:
        if Path(output).suffix.lower() != ".json":
            raise UserError("a plan is written as .json", Path(output), f"Use {Path(output).name}.json.")
        must_be_writable(Path(output).parent)
    if from_fingerprint is not None:
        of_data = {
            "DATA": data, "--plans": plans, "--folds": folds, "--group-by": group_by, "--stratify": stratify or None,
            "--stratify-by": stratify_by, "--splits": splits, "--exclude": exclude, "--accept": accept,
            "--accept-geometry": accept_geometry or None,
        }  # fmt: skip
        if unused := [name for name, value in of_data.items() if value is not None]:
            raise UserError(f"--from-fingerprint plans without a dataset: {', '.join(unused)} would have no effect")
        assert dataset_json is not None
        about = read_json(Path(dataset_json))
        made = _plan_fingerprint(Path(from_fingerprint), Path(dataset_json), about, given)
    elif data is not None:
        place = workspace_folder(workspace)
        rule = FoldRule(folds, group_by, options.strata_of(stratify, stratify_by), splits)
        dataset = read_dataset(find_raw(str(data), place))
        warn_of_new_files(dataset, place)
        paths = dataset_paths(place, dataset)
        dataset = choose_cases(dataset, exclude, accept, accept_geometry, paths.dataset)
        made = _plan_dataset(dataset, paths, given, rule, workers)
        about = _described_for_nnunet(paths)
    else:
        raise UserError("name the dataset to plan", fix="For example `nnlite plan Task04_Hippocampus`.")
    if output is not None:
        write_json(Path(output), plan_to_nnunet(made, about) if format == "nnunet" else made.as_dict())
    return made


def after_plan(plan: Plan, *, data: Any = None, workspace: Any = None, **_: Any) -> list[list[str]]:
    """Return the command to type next, if a dataset was planned."""
    if data is None:
        return []
    return [shlex.split(first_training(Paths(workspace_folder(workspace) / plan.dataset)))]


def _plan_dataset(dataset: Dataset, paths: Paths, given: Options, rule: FoldRule, workers: int | None) -> Plan:
    """Plan a raw dataset, and write what it was planned from into the workspace."""
    must_be_writable(paths.root)
    new_folds = check_folds(paths.splits, dataset, rule)
    earlier = replanning.read_earlier_plan(paths)
    adopted = replanning.read_adopted_plan(given, earlier, dataset)
    # First, so that a change while files are checked is noticed.
    known = read_stamps(paths.raw)
    raw, _ = scan_raw_cases(dataset.cases, known, workers)
    problems, fingerprint = check_and_fingerprint(dataset, workers)
    log.info(problems.to_text())
    if fingerprint is None:
        if errors := problems.count("error"):
            what = f"{plural(errors, 'error')} must be corrected before planning"
            raise UserError(what, dataset.root, "See above.")
        fix = "Correct the headers, or plan with --accept-geometry. See above."
        raise UserError("origin or direction differ between files of a case", dataset.root, fix)
    new = replanning.replan(given, earlier, fingerprint, dataset, adopted, trained=bool(model_folders(paths)))
    splits = make_splits(dataset, rule) if new_folds else None
    replanning.write_plan(paths, new, earlier)  # first: the files below say that it is up to date
    write_json(paths.check, problems.to_json())
    write_json(paths.dataset, dataset_to_json(dataset))
    write_json(paths.fingerprint, fingerprint.model_dump(mode="json"))
    changed = _forget_changed_cases(dataset, paths, known, raw)
    write_stamps(paths.raw, raw)
    if splits is not None:
        write_splits(paths.splits, *splits)
    if new.plan.options is not None and new.plan.options.spacing is not None:
        planned = new.planned.configurations
        warn_of_spacing(new.planned, planned.get("3d_fullres", planned["2d"]).spacing, dataset)
    own = [folder for folder in model_folders(paths) if not is_imported(folder)]
    trained = [folder.name for folder in own if any(map(is_begun, folder.glob("fold_*")))]
    if trained and earlier.plan is not None and not earlier.plan.trains_as(new.plan):
        log.warn(f"models trained so far belong to the former plan: {few(trained)}; they can predict, but get no "
                 "further folds: train again with --restart, or with a new --name")  # fmt: skip
    elif trained and changed:
        log.warn(f"models trained so far have seen the former files of {name_cases(changed)}: {few(trained)}; "
                 "--restart trains them again")  # fmt: skip
    use(paths.root.parent, dataset.name)
    return new.plan


def _forget_changed_cases(
    dataset: Dataset, paths: Paths, before: Mapping[str, RawCase], now: Mapping[str, RawCase]
) -> list[str]:
    """Delete the scores of held-out cases whose files have changed, and predictions of images that have.

    Returns
    -------
    list of str
        Ids of all cases whose files have changed.
    """
    known = [case for case in dataset.cases if case.id in before]
    changes = [(case, changed_files(case, before[case.id], now.get(case.id))) for case in known]
    models, outdated = [*model_folders(paths), *paths.ensembles.glob("*")], set[str]()
    for model in models:
        for folder, (case, files) in product(model.glob(f"fold_*/{VALIDATION}"), changes):
            if files and (label_map := output_file(case, folder)).is_file():
                (folder / SUMMARY).unlink(missing_ok=True)
                if files != [case.label]:
                    label_map.unlink()
                outdated.add(case.id)
    if outdated:
        for model in models:
            paths.calibration_of(model.name).unlink(missing_ok=True)
        what = f"{name_cases(sorted(outdated))} changed since models were scored on them"
        log.info(f"{what}: their scores are deleted, and `nnlite select` makes them again")
    return [case.id for case, files in changes if files]


def _plan_fingerprint(fingerprint: Path, dataset_json: Path, about: dict[str, Any], given: Options) -> Plan:
    """Plan from a fingerprint.json and the content of a dataset.json alone."""
    channels, labels = channels_of(about, dataset_json), labels_of(about, dataset_json)
    name = str(about.get("name", dataset_json.absolute().parent.name))
    preset, n_cases = given.preset or "default", int(about.get("numTraining") or 0) or None
    taken = Fingerprint.read(fingerprint)
    made = make_plan(taken, name, channels, labels, preset, given.memory_gb, n_cases, given.spacing)
    return apply_options(made, given)


def _described_for_nnunet(paths: Paths) -> dict[str, Any]:
    """Return the dataset.json of a planned dataset, with the reader that the raw dataset names for nnU-Net."""
    described = read_json(paths.dataset)
    raw = Path(described["root"]) / "dataset.json"
    return described | {READER: read_json(raw).get(READER) if raw.is_file() else None}


def preprocess(
    configuration: Annotated[
        str | Sequence[str] | None, typer.Argument(help="2d, 3d_fullres, ...", show_default="all")
    ] = None,
    *,
    dataset: options.DatasetName = None,
    scheduler: options.Scheduler = None,
    workers: options.Workers = None,
    workspace: options.Workspace = None,
) -> PreprocessingSummary:
    """Crop, normalise and resample a planned dataset (train does it too where it is missing).

    Cases that are preprocessed already are kept.

    Parameters
    ----------
    configuration : str or sequence of str, optional
        Which to preprocess; default: all of the plan.
    dataset : str, optional
        Planned dataset; default: the only one.
    scheduler : str, optional
        Address of a Dask scheduler, whose workers do it.
    workers : int, optional
        Threads, 0 for none; default: as fits the machine.
    workspace : str or Path, optional
        The workspace; default: NNLITE_WORKSPACE, otherwise ./nnlite_workspace.

    Returns
    -------
    PreprocessingSummary
        How many cases were made and kept.

    Raises
    ------
    UserError
        No dataset is planned, or a case cannot be read.

    Examples
    --------
    nnlite preprocess
    nnlite preprocess 3d_fullres -d Task04_Hippocampus --workers 4
    """
    paths = select_dataset(workspace, dataset)
    plan = replanning.current_plan(paths)
    with options.cluster_of(scheduler, paths.root.parent) as cluster:
        names = options.names_of(configuration) or list(plan.configurations)
        spread = None if cluster is None else cluster.spread
        return preprocess_dataset(stored_dataset(paths.dataset), plan, names, paths.preprocessed, workers, spread)
