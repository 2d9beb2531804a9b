"""Steps that tell how good something is."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from nnunet_lite.api.place import Folder, current_paths

if TYPE_CHECKING:
    from nnunet_lite.evaluation.scores import Scores


def evaluate(prediction: Folder, reference: Folder, **options: Any) -> Scores:
    """Score label maps against references; see `nnunet_lite.evaluation.scores.evaluate`."""
    from nnunet_lite.evaluation.scores import evaluate as evaluate_folders

    return evaluate_folders(Path(prediction), Path(reference), **options)


def report(output: Folder | None = None, *, dataset: str | None = None, workspace: Folder | None = None) -> Path:
    """Write one self-contained HTML page about a planned data set, its models and their scores; returns its path.

    Parameters
    ----------
    output : the file, or a folder for `report.html`; by default the data set's folder in the workspace.

    Raises
    ------
    UserError : no data set is planned, or one of its files is broken.
    """
    from nnunet_lite.report.html import PAGE, write_report

    paths = current_paths(workspace, dataset)
    target = paths.root / PAGE if output is None else Path(output).expanduser().absolute()
    return write_report(paths, target / PAGE if target.is_dir() else target)
