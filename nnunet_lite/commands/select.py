"""`nnlite select` and `nnlite report`: compare the trained models, and describe all results on one page."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from nnunet_lite import log
from nnunet_lite.commands import options
from nnunet_lite.data.dataset import stored_dataset
from nnunet_lite.data.raw_files import first_change
from nnunet_lite.evaluation.comparison import select_models
from nnunet_lite.evaluation.selection import Selection
from nnunet_lite.models.argument import find_model
from nnunet_lite.reporting.page import write_report
from nnunet_lite.reporting.side_by_side import write_comparison
from nnunet_lite.system import expand_home
from nnunet_lite.workspace import select_dataset, workspace_folder


def select(
    configuration: options.ComparedModels = None,
    *,
    ensembles: Annotated[bool, options.setting("--ensembles/--no-ensembles", help="Try all pairs.")] = True,
    postprocess: Annotated[
        bool, options.setting("--postprocess/--no-postprocess", help="Try rules for components.")
    ] = True,
    quality: Annotated[
        bool, options.setting("--quality/--no-quality", help="Calibrate what predict says of its quality.")
    ] = True,
    device: options.Device = None,
    workers: options.Workers = None,
    dataset: options.DatasetName = None,
    workspace: options.Workspace = None,
) -> Selection:
    """Compare trained models and pairs of them on the held-out cases; predict uses the best.

    Predictions of held-out cases that are missing are made first. Writes inference.json. The selected model predicts up
    to 200 held-out cases, and degraded copies of them, once more: from these `predict` knows how good to expect its
    label maps.

    Parameters
    ----------
    configuration : str or sequence of str, optional
        Compare only models of these configurations, or with these names.
    ensembles : bool
        Whether to try all pairs of models.
    postprocess : bool
        Whether to try rules that remove components.
    quality : bool
        Whether to calibrate the quality of predictions; it is written into the folders of the selected models.
    device : str, optional
        Such as "cpu" or "cuda:1"; default: a GPU if there is one.
    workers : int, optional
        Threads, 0 for none; default: as fits the machine.
    dataset : str, optional
        Planned dataset; default: the only one.
    workspace : str or Path, optional
        The workspace; default: NNLITE_WORKSPACE, otherwise ./nnlite_workspace.

    Returns
    -------
    Selection
        The selected models and the scores of all candidates.

    Raises
    ------
    UserError
        No trained models can be compared, or a case cannot be predicted.

    Examples
    --------
    nnlite select
    nnlite select -c 2d -c 3d_fullres --no-ensembles
    """
    paths = select_dataset(workspace, dataset)
    planned = stored_dataset(paths.dataset)
    if paths.raw.is_file() and (changed := first_change(planned.cases, paths.raw)) and changed.exists():
        what = f"{changed} changed since it was planned, and scores may be of the former file"
        log.warn(f"{what}; `nnlite plan` with the same options deletes these, and `nnlite select` makes them again")
    selection = select_models(
        paths, planned, options.names_of(configuration), ensembles=ensembles, postprocess=postprocess, device=device,
        workers=workers,
    )  # fmt: skip
    if quality:
        from nnunet_lite.evaluation.calibration import calibrate_quality  # scikit-learn is slow to load

        calibrate_quality(paths, planned, selection, device, workers)
    return selection


def report(
    output: Annotated[
        str | Path | None,
        options.output("-o", "--output", help="File to write.", show_default="report.html in the dataset's folder"),
    ] = None,
    *,
    compare: Annotated[
        tuple[str, str] | None,
        options.model(metavar="MODEL MODEL", help="Instead: two models side by side; names or folders."),
    ] = None,
    dataset: options.DatasetName = None,
    workspace: options.Workspace = None,
) -> Path:
    """Write an HTML page about the dataset, its plan, models and scores, with pictures of the worst cases.

    Parameters
    ----------
    output : str or Path, optional
        The file, or a folder for it; default: `report.html` or `comparison.html` in the dataset's folder.
    compare : tuple of str, optional
        Write instead how these two models differ, and their scores of the cases that both held out: names of models in
        the workspace, or model folders anywhere.
    dataset : str, optional
        Planned dataset; default: the only one, of several the one planned last.
    workspace : str or Path, optional
        The workspace; default: NNLITE_WORKSPACE, otherwise ./nnlite_workspace.

    Returns
    -------
    Path
        The page, which needs no other file.

    Raises
    ------
    UserError
        No dataset is planned, a file is broken, or there is no such model.

    Examples
    --------
    nnlite report
    nnlite report -d Task04_Hippocampus -o report.html
    nnlite report --compare 3d_fullres-default 2d-default
    """
    target = None if output is None else expand_home(output).absolute()
    if compare is None:
        return write_report(select_dataset(workspace, dataset, only_reads=True), target)
    root = workspace_folder(workspace)
    first, second = (find_model(given, root, dataset) for given in compare)
    return write_comparison(first, second, target)
