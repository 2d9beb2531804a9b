"""Where a step works: a workspace, and in it one dataset."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nnunet_lite import log
from nnunet_lite.errors import UserError
from nnunet_lite.workspace import Paths, current, planned_datasets, read_json, understood, workspace_folder, write_json

if TYPE_CHECKING:
    from nnunet_lite.cluster import Cluster
    from nnunet_lite.data.dataset import Dataset

Folder = str | Path


def folder_of(given: Folder | None) -> Path:
    return workspace_folder(None if given is None else Path(given))


def current_paths(
    workspace: Folder | None = None, dataset: str | None = None, *, only_reads: bool = False, needs_plan: bool = True
) -> Paths:
    """The files of the dataset to work on; logs which one it is. Parameters are those of `workspace.current`.

    Raises
    ------
    UserError : as `workspace.current`.
    """
    paths = current(folder_of(workspace), dataset, only_reads=only_reads, needs_plan=needs_plan)
    planned = len(planned_datasets(paths.root.parent))
    chosen = f", planned last; -d takes one of the {planned} planned" if dataset is None and planned > 1 else ""
    log.info(f"data set {paths.name} (workspace {paths.root.parent}{chosen})")
    return paths


def place_of(workspace: Path, dataset: Dataset) -> Paths:
    """Where a raw dataset has its files in a workspace; says where it is known from another folder.

    Raises
    ------
    UserError : its name is no folder's, that is where its raw data are, or another dataset of that name is there.
    """
    from nnunet_lite.data.dataset import dataset_from_json
    from nnunet_lite.preprocessing.raw_files import same_files

    paths, root = Paths(workspace / dataset.name), dataset.root
    if not dataset.name:
        raise UserError("has no name, which a dataset takes from its folder", root)
    if paths.root.resolve() == root.resolve():
        raise UserError(f"is itself in the workspace {workspace}", root, "Give another folder with --workspace.")
    if not paths.dataset.is_file():
        return paths
    with understood(paths.dataset, "Move it away."):
        stored = dataset_from_json(read_json(paths.dataset))
    if stored.root.resolve() == root.resolve():
        return paths
    moved = not stored.root.exists()
    if not same_files(dataset, stored, paths, moved):
        gone = ", which is gone" if moved else ""
        raise UserError(
            f"the workspace {workspace} has another dataset called {dataset.name}, with other files, "
            f"from {stored.root}{gone}",
            root,
            "Give another folder with --workspace, or rename one of the two.",
        )
    what = f"moved here from {stored.root}" if moved else f"has the same files as {stored.root}"
    log.info(f"{root}: {what}, and counts as the dataset {dataset.name} of the workspace {workspace}")
    return paths


def why_to_plan(dataset: Dataset, paths: Paths) -> str | None:
    """Why there is no plan of these very cases and files, in words; None where there is one.

    A dataset that was moved is not planned again: the new places of its files are recorded.
    """
    from nnunet_lite.data.dataset import dataset_to_json
    from nnunet_lite.preprocessing.raw_files import first_change
    from nnunet_lite.training.grouping import name_cases

    files = (paths.plans, paths.dataset, paths.fingerprint)
    if not all(file.is_file() for file in files):
        return "is not planned yet"
    with understood(paths.dataset, "Run `nnlite plan` again."):
        now, before = dataset_to_json(dataset), read_json(paths.dataset)
        ids, planned = ({case["id"] for case in described["dataset"]} for described in (now, before))
        differs = _unplaced(now) != _unplaced(before)
    if ids != planned:
        changes = {"lacks": sorted(planned - ids), "also has": sorted(ids - planned)}
        what = [f"{verb} {name_cases(names)}" for verb, names in changes.items() if names]
        return f"has changed since it was planned: it {' and '.join(what)}"
    if differs:
        return "has other files, channels or labels than were planned"
    if not paths.raw.is_file():
        return f"was planned before {paths.raw.name} was kept, which shows whether a file has changed"
    if (changed := first_change(dataset.cases, paths.raw)) is not None:
        return f"has changed since it was planned ({changed}{'' if changed.is_file() else ' is gone'})"
    if now != before:
        write_json(paths.dataset, now)
    return None


def _unplaced(described: dict[str, Any]) -> dict[str, Any]:
    """A description of a dataset, as workspaces have it, with the files relative to the dataset's folder."""
    root = Path(described["root"])

    def relative(file: str | None) -> str | None:
        return str(Path(file).relative_to(root)) if file and Path(file).is_relative_to(root) else file

    cases = [
        {**case, "images": [relative(file) for file in case["images"]], "label": relative(case["label"])}
        for case in described["dataset"]
    ]
    return {**described, "root": "", "dataset": cases}


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
