"""`nnlite evaluate` and `nnlite view`: score label maps, and look at them. Only predicting them needs torch."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from difflib import get_close_matches
from pathlib import Path
from tempfile import gettempdir
from typing import Annotated

import typer

import nnunet_lite
from nnunet_lite import log
from nnunet_lite.commands import options
from nnunet_lite.data.cases import Case
from nnunet_lite.data.dataset import stored_dataset
from nnunet_lite.data.labels import Labels
from nnunet_lite.errors import UserError, no_such_file
from nnunet_lite.evaluation.scores import Scores, read_fold_scores, score_files
from nnunet_lite.evaluation.selection import read_selection
from nnunet_lite.files import must_be_writable, scratch, write_json, write_text
from nnunet_lite.inference.cases import output_file
from nnunet_lite.models.argument import find_models
from nnunet_lite.models.folder import VALIDATION, model_folders, trained_folds
from nnunet_lite.models.lookup import choose_model
from nnunet_lite.planning.schema import Plan
from nnunet_lite.reporting.viewer import Scene, View, open_at, open_browser, read_case_scene, read_file_scene, serve
from nnunet_lite.workspace import Paths, planned_datasets, select_dataset, workspace_folder


def evaluate(
    prediction: Annotated[str | Path, typer.Argument(help="Label map, or folder of them; with --model, images.")],
    reference: Annotated[str | Path, typer.Argument(help="Its reference, or their folder.")],
    *,
    model: Annotated[
        str | Path | None, options.model("-m", "--model", help="Predict the images with this model first.")
    ] = None,
    tolerance: Annotated[
        float | None,
        options.setting(help="Tolerance of the surface Dice, in mm (without a spacing: pixels).", show_default="1"),
    ] = None,
    surface: Annotated[bool, options.setting(help="Compute surface distances too.")] = True,
    accept_geometry: options.AcceptGeometry = False,
    output: Annotated[
        str | Path | None, options.output(help="Write JSON (.json) or one row per case and label (.csv).")
    ] = None,
    workers: options.Workers = None,
    device: options.Device = None,
    workspace: options.Workspace = None,
) -> Scores:
    """Score label maps against references: Dice, surface distances, volumes, lesions.

    Files of two folders are matched by name.

    Parameters
    ----------
    prediction, reference : str or Path
        Two label maps, or two folders of label maps; with `model`, images and their references.
    model : str or Path, optional
        Predict the images with it, as `predict` does; `predict` keeps the label maps and has all options.
    tolerance : float, optional
        How far apart surfaces may be for the surface Dice, in mm, or in pixels if no file has a spacing; default: 1.
    surface : bool
        Whether to measure surface distances.
    accept_geometry : bool
        Take files of a case by their voxels if origin or direction differ.
    output : str or Path, optional
        A .json or .csv file to write the scores to.
    workers : int, optional
        Threads, 0 for none; default: as fits the machine.
    device : str, optional
        Where the model predicts; default: a GPU if there is one.
    workspace : str or Path, optional
        Where a model is looked up by its name.

    Returns
    -------
    Scores
        The metrics of each case and label, and their means.

    Raises
    ------
    UserError
        No names match, a pair has two grids, a file cannot be read, `output` ends in anything else, or `tolerance` is
        negative, infinite, or given without `surface`.

    Examples
    --------
    nnlite evaluate labels references
    nnlite evaluate images references -m model.zip --output scores.csv
    """
    written = None if output is None else Path(output)
    if written is not None:
        if written.suffix.lower() not in (".json", ".csv"):
            raise UserError("scores are written as .json or .csv", written, f"Use {written.name}.csv.")
        must_be_writable(written.parent)
    if tolerance is not None and not surface:
        raise UserError("--tolerance is of the surface Dice, which --no-surface leaves out", fix="Give one of the two.")
    if tolerance is not None and not 0 <= tolerance < math.inf:
        raise UserError(f"--tolerance {tolerance:g} is no distance", fix="Give mm, or pixels without a spacing.")
    with ExitStack() as stack:
        predicted, expected, labels, exit_code = Path(prediction), Path(reference), None, 0
        if model is not None:
            if not expected.exists():  # predicting may take long
                raise no_such_file(expected)
            predicted = stack.enter_context(scratch(Path(gettempdir()))) / expected.name
            made = nnunet_lite.predict(
                prediction, predicted, model=model, device=device, workspace=workspace, accept_geometry=accept_geometry
            )
            labels, exit_code = made.labels, made.exit_code
            if not made.files:
                raise UserError("no image could be predicted", prediction)
        place = workspace_folder(workspace)
        planned = planned_datasets(place)
        only = Plan.read(Paths(place / planned[0]).plans).labels if len(planned) == 1 else None
        try:
            within = 1.0 if tolerance is None else tolerance
            scores = score_files(predicted, expected, labels, within, surface, workers, accept_geometry, only)
        except UserError as error:  # may name a temporary file
            if model is None or error.file is None or not Path(error.file).is_relative_to(predicted):
                raise
            file = Path(prediction) / Path(error.file).relative_to(predicted)
            raise UserError(f"its prediction {error.what}", file, error.fix) from None
    if model is not None:
        rows = tuple(replace(row, prediction_file=None) for row in scores.rows)
        scores = replace(scores, rows=rows, exit_code=exit_code)
    if written is not None and written.suffix.lower() == ".csv":
        write_text(written, scores.to_csv())
    elif written is not None:
        write_json(written, scores.to_json())
    return scores


def view(
    case: Annotated[
        str | Path | None,
        typer.Argument(help="Case of the dataset, or an image file or DICOM series.", show_default="the worst case"),
    ] = None,
    segmentations: Annotated[
        str | Path | Sequence[str | Path] | None,
        typer.Argument(help="Label maps of that file; the others are compared with the first."),
    ] = None,
    *,
    model: Annotated[
        str | Sequence[str] | None,
        options.model(
            "-m",
            "--model",
            help="Model whose cross-validation to show, a+b for an ensemble; or which predicts now.",
            show_default="the selected",
        ),
    ] = None,
    at: Annotated[
        Sequence[int] | None,
        options.output("--at", metavar="Z Y X", help="Voxel of the file to open at; of a picture Y X."),
    ] = None,
    browser: Annotated[bool, options.output(help="Open the page; otherwise only its address is printed.")] = True,
    dataset: options.DatasetName = None,
    workspace: options.Workspace = None,
) -> View:
    """Look at images with reference and prediction in the browser.

    The page lists all cases of the dataset, the worst first. It is served on 127.0.0.1 until `View.close()` or the end
    of the process.

    Parameters
    ----------
    case : str or Path, optional
        Case of the dataset, or an image file or DICOM series; default: the case with the lowest Dice.
    segmentations : str, Path or sequence of them, optional
        Label maps of that file; the others are compared with the first.
    model : str or sequence of str, optional
        Models of the dataset whose cross-validation to show, "a+b" for an ensemble; default: the selected one. Other
        models, and those that are given with a file, predict the image now.
    at : sequence of int, optional
        Voxel (z, y, x) of the image as stored, of a picture (y, x), at which the case opens; default: where most is
        wrong.
    browser : bool
        Open the page.
    dataset : str, optional
        Planned dataset; default: the only one.
    workspace : str or Path, optional
        The workspace; default: NNLITE_WORKSPACE, otherwise ./nnlite_workspace.

    Returns
    -------
    View
        The page that is served; `url` is its address.

    Raises
    ------
    UserError
        There is no such case, file or prediction, or one cannot be read.

    Examples
    --------
    nnlite view
    nnlite view hippocampus_001
    nnlite view hippocampus_001 --at 12 30 17
    nnlite view scan.nii.gz label.nii.gz -m model.zip
    """
    names, root = options.names_of(model) or [], workspace_folder(workspace)
    maps = [Path(path) for path in options.list_of(segmentations)]
    file = None if case is None else Path(case)
    if file is not None and file.exists() and not maps and find_models(file, root, required=False):
        raise UserError("is a model", file, f"See what it predicts: `nnlite view CASE -m {file}`.")
    if file is not None and (file.exists() or maps):
        models = [(name, nnunet_lite.load(name, workspace=root)) for name in names]
        labels = models[0][1].plan.labels if models else None
        if dataset:
            labels = stored_dataset(select_dataset(workspace, dataset, only_reads=True).dataset).labels
        scene = open_at(read_file_scene(file, maps, labels, models), at)
        page = serve(lambda _: scene, {file.name: None}, file.name)
    else:
        page = _serve_dataset(select_dataset(workspace, dataset, only_reads=True), case, names, root, at)
    if browser and not open_browser(page):
        log.info("no browser with windows was found; open the address in one")
    return page


def _serve_dataset(
    paths: Paths, case: str | Path | None, names: list[str], root: Path, at: Sequence[int] | None
) -> View:
    """Serve all cases of a dataset with their cross-validation, the worst first."""
    dataset, channels = stored_dataset(paths.dataset), Plan.read(paths.plans).channels
    own = {path.name for place in (paths.models, paths.ensembles) for path in place.glob("*/")}
    in_dataset = [name for name in names if name in own] if names else _chosen(paths)
    models = [(name, nnunet_lite.load(name, workspace=root)) for name in names if name not in own]
    cases = {case.id: case for case in dataset.cases}
    scores = _scores(paths, in_dataset[0], dataset.labels) if in_dataset else {}
    listed = {name: scores.get(name) for name in [*(case for case in scores if case in cases), *cases]}
    first = next(iter(listed)) if case is None else _case_of(cases, str(case), dataset.name)

    def read(name: str) -> Scene:
        for model, _ in models:
            log.warn(f"{model} predicts {name} now; it may have been trained on this case")
        predictions = _predictions(paths, cases[name], in_dataset, required=bool(names) and name == first)
        scene = read_case_scene(dataset, cases[name], predictions, models, channels)
        return open_at(scene, at) if name == first else scene

    return serve(read, listed, first)


def _scores(paths: Paths, model: str, labels: Labels) -> dict[str, float]:
    """Return the mean Dice of each case that a model held out, the lowest first."""
    notes: list[str] = []
    scores, _ = read_fold_scores(paths.folder_of(model), labels, notes)
    for note in notes:  # the cases can be looked at without their scores
        log.warn(note)
    known = {row.case: row.mean_dice for row in scores.rows if row.mean_dice is not None}
    return {case: known[case] for case in sorted(known, key=known.__getitem__)}


def _case_of(cases: Mapping[str, Case], name: str, dataset: str) -> str:
    if name not in cases:
        nearest = get_close_matches(name, cases, 3)
        fix = f"Did you mean {' or '.join(nearest)}?" if nearest else f"Its cases are {', '.join(list(cases)[:3])} ..."
        raise UserError(f"there is no file {name}, and no case of that name in {dataset}", fix=fix)
    return name


def _predictions(paths: Paths, case: Case, names: Sequence[str], required: bool) -> list[tuple[str, Path]]:
    """Return name and label map of each model's prediction of a case that it held out.

    Raises
    ------
    UserError
        One of the models has none, and it is required.
    """
    predictions = []
    for name in names:
        folder = paths.folder_of(name)
        maps = (output_file(case, fold / VALIDATION) for fold in sorted(folder.glob("fold_*")))
        if file := next((path for path in maps if path.is_file()), None):
            predictions.append((f"{name}, {file.parent.parent.name.replace('_', ' ')}", file))
        elif required:
            raise UserError(f"has not predicted {case.id}: the fold that holds it out is not trained", folder)
        else:
            log.info(f"{name} has not predicted {case.id}: the fold that holds it out is not trained")
    return predictions


def _chosen(paths: Paths) -> list[str]:
    """Return the selected model or ensemble, otherwise the best trained model, if there is one."""
    if selection := read_selection(paths):
        return ["+".join(selection.models)]
    return [choose_model(paths).name] if any(map(trained_folds, model_folders(paths))) else []
