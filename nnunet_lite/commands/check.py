"""`nnlite check`: report every problem of a raw dataset at once."""

from __future__ import annotations

from dataclasses import replace
from typing import Annotated

import typer

from nnunet_lite import log
from nnunet_lite.commands.options import AcceptGeometry, FilePath, Workers, Workspace
from nnunet_lite.data.check import broken_dataset, check_dataset
from nnunet_lite.data.dataset import read_dataset
from nnunet_lite.data.problems import Report
from nnunet_lite.errors import UserError
from nnunet_lite.workspace import find_raw, workspace_folder


def check(
    data: Annotated[FilePath, typer.Argument(help="Folder of the raw data, or its name.")],
    *,
    accept_geometry: AcceptGeometry = False,
    workers: Workers = None,
    workspace: Workspace = None,
) -> Report:
    """Report every problem of a dataset at once.

    Every file is read; nothing is written.

    Parameters
    ----------
    data : str or Path
        A folder, or a name that is looked up in the current folder, ./data, the workspace and nnUNet_raw.

    Returns
    -------
    Report
        The problems. The command exits with code 2 if one of them is an error.
    """
    root = find_raw(str(data), workspace_folder(workspace))
    try:
        dataset = read_dataset(root)
    except UserError as error:
        return broken_dataset(root, error)
    return check_dataset(
        replace(dataset, accept_geometry=accept_geometry), None, workers=workers, progress=log.progress
    )
