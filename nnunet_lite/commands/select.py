"""`nnlite select` and `nnlite report`: compare the trained models, and describe all results on one page."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

from nnunet_lite.commands import options
from nnunet_lite.data.dataset import stored_dataset
from nnunet_lite.evaluation.comparison import select_models
from nnunet_lite.evaluation.selection import Selection
from nnunet_lite.reporting.page import PAGE, write_report
from nnunet_lite.workspace import select_dataset


def select(
    configuration: Annotated[
        str | Sequence[str] | None,
        options.model(
            "-c", "--configuration", help="2d, 3d_fullres, ..., or a model's name; may be repeated.", show_default="all"
        ),
    ] = None,
    *,
    ensembles: Annotated[bool, options.setting("--ensembles/--no-ensembles", help="Try all pairs.")] = True,
    postprocess: Annotated[
        bool, options.setting("--postprocess/--no-postprocess", help="Try rules for components.")
    ] = True,
    device: options.Device = None,
    workers: options.Workers = None,
    dataset: options.DatasetName = None,
    workspace: options.Workspace = None,
) -> Selection:
    """Compare trained models and pairs of them on the held-out cases; predict uses the best.

    Predictions of held-out cases that are missing are made first. Writes inference.json.

    Parameters
    ----------
    configuration : str or sequence of str, optional
        Compare only models of these configurations, or with these names.
    ensembles : bool
        Whether to try all pairs of models.
    postprocess : bool
        Whether to try rules that remove components.
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
    return select_models(
        paths, stored_dataset(paths.dataset), options.names_of(configuration), ensembles=ensembles,
        postprocess=postprocess, device=device, workers=workers,
    )  # fmt: skip


def report(
    output: Annotated[
        str | Path | None,
        options.output("-o", "--output", help="File to write.", show_default="report.html in the dataset's folder"),
    ] = None,
    *,
    dataset: options.DatasetName = None,
    workspace: options.Workspace = None,
) -> Path:
    """Write an HTML page about the dataset, its plan, models and scores, with pictures of the worst cases.

    Parameters
    ----------
    output : str or Path, optional
        The file, or a folder for `report.html`; default: in the dataset's folder.
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
        No dataset is planned, or one of its files is broken.

    Examples
    --------
    nnlite report
    nnlite report -d Task04_Hippocampus -o report.html
    """
    paths = select_dataset(workspace, dataset, only_reads=True)
    target = paths.root / PAGE if output is None else Path(output).expanduser().absolute()
    return write_report(paths, target / PAGE if target.is_dir() else target)
