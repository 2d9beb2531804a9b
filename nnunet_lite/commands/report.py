"""`nnlite report`: one HTML page about a planned dataset, its models and their scores."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer

from nnunet_lite.commands.options import DatasetName, FilePath, Workspace
from nnunet_lite.reporting.html import PAGE, write_report
from nnunet_lite.workspace import select_dataset


@dataclass(frozen=True)
class ReportFile:
    """The page that was written, and its size."""

    report: Path
    bytes: int

    def to_text(self) -> str:
        return str(self.report)


def report(
    output: Annotated[
        FilePath | None, typer.Option("-o", "--output", help="File to write [report.html in the dataset's folder].")
    ] = None,
    *,
    dataset: DatasetName = None,
    workspace: Workspace = None,
) -> ReportFile:
    """Write an HTML page about the dataset, its plan, models and scores, with pictures of the worst cases.

    Parameters
    ----------
    output : str or Path
        The file, or a folder for `report.html`.

    Returns
    -------
    ReportFile
        The page, which needs no other file.

    Raises
    ------
    UserError
        No dataset is planned, or one of its files is broken.
    """
    paths = select_dataset(workspace, dataset)
    target = paths.root / PAGE if output is None else Path(output).expanduser().absolute()
    page = write_report(paths, target / PAGE if target.is_dir() else target)
    return ReportFile(page, page.stat().st_size)
