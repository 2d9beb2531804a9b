"""`nnlite preprocess`: crop, normalise and resample the cases of a planned dataset."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated

import typer

from nnunet_lite import log
from nnunet_lite.commands.options import DatasetName, Scheduler, Workers, Workspace, cluster_of, names_of
from nnunet_lite.data.dataset import stored_dataset
from nnunet_lite.planning.schema import Plan
from nnunet_lite.preprocessing.store import PreprocessingSummary, preprocess_dataset
from nnunet_lite.preprocessing.store import prune as delete_unneeded
from nnunet_lite.system import in_units
from nnunet_lite.workspace import select_dataset


def preprocess(
    configuration: Annotated[str | Sequence[str] | None, typer.Argument(help="Which [all of the plan].")] = None,
    *,
    dataset: DatasetName = None,
    prune: Annotated[bool, typer.Option("--prune", help="Delete what the plan no longer needs.")] = False,
    scheduler: Scheduler = None,
    workers: Workers = None,
    workspace: Workspace = None,
) -> PreprocessingSummary:
    """Crop, normalise and resample a planned dataset (train does it too where it is missing).

    Cases that are preprocessed already are kept.

    Returns
    -------
    PreprocessingSummary
        How many cases were made and kept.

    Raises
    ------
    UserError
        No dataset is planned, or a case cannot be read.
    """
    paths = select_dataset(workspace, dataset)
    plan = Plan.read(paths.plans)
    if prune:
        count, size = delete_unneeded(paths.preprocessed, plan)
        log.info(f"{count} arrays deleted that the plan does not need, {in_units(size)}")
    with cluster_of(scheduler, paths.root.parent) as cluster:
        return preprocess_dataset(
            stored_dataset(paths.dataset),
            plan,
            names_of(configuration) or list(plan.configurations),
            paths.preprocessed,
            workers,
            log.progress,
            spread=None if cluster is None else cluster.spread,
        )
