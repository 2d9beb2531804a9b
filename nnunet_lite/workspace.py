"""Where the files of a dataset are: one workspace folder, the current dataset, and the raw data.

workspace/
  current.json                 the dataset that was planned last
  Task04_Hippocampus/
    dataset.json  fingerprint.json  plans.json  check.json  raw.json  splits.json
    preprocessed/              see preprocess/store.py
    models/3d_fullres-cpu/     a model folder: plans.json dataset.json run.json fold_0/ ...
    ensembles/A+B/fold_0/      what two models predict together of the held-out cases
    inference.json             what `nnlite select` chose, and `nnlite predict` obeys
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from nnunet_lite import log
from nnunet_lite.errors import UserError
from nnunet_lite.files import read_json, understood, write_json


@dataclass(frozen=True)
class Paths:
    """The files of one dataset in a workspace."""

    root: Path

    @property
    def name(self) -> str:
        return self.root.name

    @property
    def dataset(self) -> Path:
        return self.root / "dataset.json"

    @property
    def fingerprint(self) -> Path:
        return self.root / "fingerprint.json"

    @property
    def plans(self) -> Path:
        return self.root / "plans.json"

    @property
    def check(self) -> Path:
        return self.root / "check.json"

    @property
    def raw(self) -> Path:
        """Size, time and hash of each raw file as it was when the dataset was planned."""
        return self.root / "raw.json"

    @property
    def option(self) -> str:
        """What names this dataset on a command line; nothing where its workspace has no other."""
        return f" -d {self.name}" if len(planned_datasets(self.root.parent)) > 1 else ""

    @property
    def splits(self) -> Path:
        return self.root / "splits.json"

    @property
    def preprocessed(self) -> Path:
        return self.root / "preprocessed"

    @property
    def models(self) -> Path:
        return self.root / "models"

    @property
    def ensembles(self) -> Path:
        return self.root / "ensembles"

    @property
    def inference(self) -> Path:
        return self.root / "inference.json"


def _imported(workspace: Path, given: str | None) -> Paths | None:
    """The dataset called `given`, or the only one of the workspace, if it has models and no plan; else None."""
    found = {file.parents[2] for file in workspace.glob("*/models/*/run.json")}
    found = {root for root in found if not (root / "plans.json").is_file()}
    if given is not None:
        found &= set(_named(workspace, Path(given).name))
    elif any(workspace.glob("*/plans.json")):
        return None
    if given is None and len(found) > 1:
        names = ", ".join(sorted(root.name for root in found))
        raise UserError(f"the workspace {workspace} has models of several datasets", fix=f"Choose with -d: {names}.")
    return Paths(found.pop()) if len(found) == 1 else None


def is_model_of(workspace: Path, folder: Path) -> bool:
    """Whether a model folder is in a workspace: WORKSPACE/DATASET/models/MODEL, once all links are followed.

    A link in the workspace that leads to another place is no model of the workspace.
    """
    above = (folder / "run.json").resolve().parents
    return len(above) > 3 and above[1].name == "models" and above[3] == workspace.resolve()


def workspace_folder(given: str | Path | None = None) -> Path:
    """The workspace: what was given, else NNLITE_WORKSPACE, else ./nnlite_workspace."""
    return Path(given or os.environ.get("NNLITE_WORKSPACE") or "nnlite_workspace").expanduser().absolute()


IMAGE_FOLDERS = ("imagestr", "images", "image")  # of raw data, in upper or lower case


def find_raw(given: str, workspace: Path) -> Path:
    """The folder of a raw dataset from a path or a name; `Task04` finds `Task04_Hippocampus`.

    Names are looked up in the current folder, ./data, the workspace and (if set) nnUNet_raw.

    Raises
    ------
    UserError : nothing of that name, or several.
    """
    path = Path(given).expanduser()
    if path.is_dir():
        return path.absolute()
    if path.exists():
        raise UserError("is a file; a dataset is a folder", path)
    raw = os.environ.get("nnUNet_raw")  # noqa: SIM112 - the name that nnU-Net gave it
    places = [Path.cwd(), Path.cwd() / "data", workspace, *([Path(raw)] if raw else [])]
    if len(path.parts) == 1:
        found = {match.resolve() for place in places for match in _named(place, given) if _is_raw(match)}
        if len(found) == 1:
            return found.pop()
        if found:
            names = ", ".join(sorted(str(match) for match in found))
            raise UserError(f"{given!r} could be {names}", fix="Give the path.")
    looked = ", ".join(str(place) for place in places)
    raise UserError(f"there is no dataset {given!r}", fix=f"Give its folder, or a name in one of: {looked}.")


def _named(place: Path, name: str) -> list[Path]:
    """Folders called `name`, else those that it begins: Task04 or Dataset004 for Task04_Hippocampus."""
    if not place.is_dir():
        return []
    exact = place / name
    if exact.is_dir():
        return [exact]
    return [entry for entry in place.iterdir() if entry.is_dir() and entry.name.startswith(f"{name}_")]


def _is_raw(folder: Path) -> bool:
    return any(entry.is_dir() and entry.name.lower() in IMAGE_FOLDERS for entry in folder.iterdir()) or (
        (folder / "dataset.json").is_file() and not (folder / "plans.json").is_file()
    )


def use(workspace: Path, name: str) -> Paths:
    """Record that a dataset is the one planned last."""
    write_json(workspace / "current.json", {"dataset": name})
    return Paths(workspace / name)


def planned_datasets(workspace: Path) -> list[str]:
    """The names of the datasets that are planned in a workspace."""
    return sorted(path.parent.name for path in workspace.glob("*/plans.json"))


def planned_paths(
    workspace: Path, given: str | None = None, *, only_reads: bool = False, needs_plan: bool = True
) -> Paths:
    """The planned dataset to work on: `given` (a name, the start of one, or a path to the raw data), else the only one.

    Parameters
    ----------
    only_reads : nothing will be written: of several datasets, the one planned last is taken.
    needs_plan : False: a dataset of which only models are there, imported ones, will do.

    Raises
    ------
    UserError : there is none, or not that one, or there are several and none is given.
    """
    have = planned_datasets(workspace)
    if not needs_plan and (imported := _imported(workspace, given)) is not None:
        return imported
    if given is None:
        if not have:
            raise UserError(f"no dataset is planned in the workspace {workspace}", fix="Run `nnlite plan DATA` first.")
        given = have[0] if len(have) == 1 else _planned_last(workspace) if only_reads else None
        if given not in have:
            what = f"the workspace {workspace} has {len(have)} planned datasets: {', '.join(have)}"
            raise UserError(what, fix="Say which one with -d NAME (from Python: dataset=NAME).")
    name = Path(given).name
    planned = [match for match in _named(workspace, name) if (match / "plans.json").is_file()]
    if len(planned) == 1:
        _refuse_other_root(Paths(planned[0]), Path(given).expanduser())
        return Paths(planned[0])
    what = "several planned datasets" if planned else "no planned dataset"
    there = f"It holds: {', '.join(have)}." if have else "Run `nnlite plan DATA` first."
    raise UserError(f"the workspace {workspace} has {what} called {given!r}", fix=there)


def _planned_last(workspace: Path) -> str | None:
    """The name in current.json; None where that is gone or damaged."""
    try:
        with understood(workspace / "current.json"):
            return str(read_json(workspace / "current.json")["dataset"])
    except UserError:
        return None


def _refuse_other_root(paths: Paths, given: Path) -> None:
    """Make sure that a folder which was given is the one that was planned under its name.

    Raises
    ------
    UserError : it is another folder of that name.
    """
    if len(given.parts) < 2 or not given.is_dir() or given.resolve() == paths.root.resolve():
        return
    with understood(paths.dataset, "Run `nnlite plan` again."):
        root = Path(read_json(paths.dataset)["root"])
    if root.exists() and root.resolve() != given.resolve():
        raise UserError(f"is not planned: the dataset {paths.name} in the workspace {paths.root.parent} is from {root}",
                        given, "Give the name with -d, or plan this folder in another --workspace.")  # fmt: skip


def select_dataset(
    workspace: str | Path | None = None,
    dataset: str | None = None,
    *,
    only_reads: bool = False,
    needs_plan: bool = True,
) -> Paths:
    """Return the files of the dataset that a command works on, as `planned_paths` finds it, and log which one it is."""
    paths = planned_paths(workspace_folder(workspace), dataset, only_reads=only_reads, needs_plan=needs_plan)
    planned = len(planned_datasets(paths.root.parent))
    chosen = f", planned last; -d takes one of the {planned} planned" if dataset is None and planned > 1 else ""
    log.info(f"dataset {paths.name} (workspace {paths.root.parent}{chosen})")
    return paths
