"""Where a step works: a workspace, and in it the current data set."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from nnunet_lite import log
from nnunet_lite.errors import UserError
from nnunet_lite.workspace import Paths, current, workspace_folder

if TYPE_CHECKING:
    from nnunet_lite.cluster import Cluster
    from nnunet_lite.data.dataset import Dataset

Folder = str | Path


def folder_of(given: Folder | None) -> Path:
    return workspace_folder(None if given is None else Path(given))


def current_paths(workspace: Folder | None = None, dataset: str | None = None, *, needs_plan: bool = True) -> Paths:
    """The files of the dataset to work on; logs which one it is. `needs_plan`: as for `workspace.current`."""
    paths = current(folder_of(workspace), dataset, needs_plan=needs_plan)
    log.info(f"data set {paths.name} (workspace {paths.root.parent})")
    return paths


@contextmanager
def cluster_of(scheduler: str | None, workspace: Path) -> Iterator[Cluster | None]:
    """The workers of a Dask scheduler; None where none is given.

    Raises
    ------
    UserError : the packages for it are not installed, or as `cluster.connected`.
    """
    if scheduler is None:
        yield None
        return
    try:
        from nnunet_lite.cluster import connected
    except ImportError as error:
        fix = "`pip install 'nnunet-lite[cluster]'`, here and on the workers."
        raise UserError(f"--scheduler needs Dask ({error})", fix=fix) from None
    with connected(scheduler, workspace) as cluster:
        yield cluster


def dataset_of(paths: Paths) -> Dataset:
    from nnunet_lite.data.dataset import stored_dataset

    return stored_dataset(paths.dataset)
