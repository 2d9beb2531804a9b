"""`nnlite audit`: find errors in the label maps of a dataset with the predictions of its held-out cases."""

from __future__ import annotations

from typing import Annotated, Any

from nnunet_lite.commands import options
from nnunet_lite.data.dataset import stored_dataset
from nnunet_lite.evaluation.audit import Audit, audit_labels
from nnunet_lite.workspace import select_dataset


def audit(
    configuration: options.ComparedModels = None,
    *,
    top: Annotated[int, options.output(min=1, help="Most cases to print; the files have all.")] = 20,
    workers: options.Workers = None,
    dataset: options.DatasetName = None,
    workspace: options.Workspace = None,
) -> Audit:
    """Rank the training cases by how strongly held-out predictions contradict their label maps.

    It finds swapped labels, missing structures, slices without labels, flipped, shifted and exchanged label maps. It
    changes none. Writes audit.json and audit.csv.

    Parameters
    ----------
    configuration : str or sequence of str, optional
        Compare only models of these configurations, or with these names; default: all.
    top : int
        The most cases that the text shows.
    workers : int, optional
        Threads, 0 for none; default: as fits the machine.
    dataset : str, optional
        Planned dataset; default: the only one.
    workspace : str or Path, optional
        The workspace; default: NNLITE_WORKSPACE, otherwise ./nnlite_workspace.

    Returns
    -------
    Audit
        The cases with their findings, the worst first.

    Raises
    ------
    UserError
        No model is trained, or none has predicted the cases that it holds out.

    Examples
    --------
    nnlite audit
    nnlite audit -c 3d_fullres --top 50
    """
    paths = select_dataset(workspace, dataset)
    return audit_labels(paths, stored_dataset(paths.dataset), options.names_of(configuration), workers, top)


def after_audit(result: Audit, **given: Any) -> list[list[str]]:
    """Return the command that shows the first finding."""
    if not result.suspicious:
        return []
    worst = result.suspicious[0]
    place = map(str, worst.findings[0].place)
    return [["nnlite", "view", worst.case, "--at", *place, *options.where(given["dataset"], given["workspace"])]]
