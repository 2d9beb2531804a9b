"""Steps that tell how good something is."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nnunet_lite.api.place import Folder, current_paths, dataset_of

if TYPE_CHECKING:
    from nnunet_lite.evaluation.scores import Scores
    from nnunet_lite.evaluation.selection import Selection


def select(
    configurations: str | Sequence[str] | None = None,
    *,
    ensembles: bool = True,
    postprocess: bool = True,
    dataset: str | None = None,
    device: str | None = None,
    workspace: Folder | None = None,
    workers: int | None = None,
) -> Selection:
    """Compare all trained models of a planned dataset on their held-out cases, and decide how `predict` predicts.

    All pairs of models are tried too, and whether removing small components helps a label. What is missing of the
    cross-validation is predicted. Writes inference.json, which `predict` obeys, unless models are given to it.

    Parameters
    ----------
    configurations : limit it to these, or to model folders of these names; default: all.
    ensembles : try pairs, which predict the held-out cases together first; resumable.
    postprocess : try rules for the labels' components.
    device : to predict with. workers : threads that read and score.

    Raises
    ------
    UserError : nothing is trained that can be compared, or a case cannot be predicted.
    """
    from nnunet_lite.evaluation.select import select as select_models

    only = [configurations] if isinstance(configurations, str) else configurations
    paths = current_paths(workspace, dataset)
    return select_models(
        paths, dataset_of(paths), only, ensembles=ensembles, postprocess=postprocess, device=device, workers=workers
    )


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
    UserError : no dataset is planned, or one of its files is broken.
    """
    from nnunet_lite.reporting.html import PAGE, write_report

    paths = current_paths(workspace, dataset)
    target = paths.root / PAGE if output is None else Path(output).expanduser().absolute()
    return write_report(paths, target / PAGE if target.is_dir() else target)
