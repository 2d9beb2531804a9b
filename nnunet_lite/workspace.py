"""Where the files of a dataset are: one workspace folder, its planned datasets, and the raw data.

workspace/
  current.json                 the dataset that was planned last
  raw/NAME/dataset.json        a dataset that `nnlite init` wrote: the paths of its files
  Task04_Hippocampus/
    dataset.json  fingerprint.json  plans.json  planned.json  check.json  raw.json  splits.json
    splits_made.json           how the folds were made
    formats.json               which number format and memory format is fastest on which GPU
    preprocessed/              see preprocessing/store.py
    models/3d_fullres-cpu/     a model folder: plans.json dataset.json run.json fold_0/ ...
    ensembles/A+B/fold_0/      held-out cases that two models predict together
    inference.json             the models that `nnlite select` chose, and `nnlite predict` uses
"""

from __future__ import annotations

import os
import re
import shlex
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path

from nnunet_lite import log
from nnunet_lite.errors import UserError
from nnunet_lite.files import read_json, understood, write_json
from nnunet_lite.system import expand_home

RAW = "raw"  # a folder of the workspace: datasets that `nnlite init` wrote
IMAGE_FOLDERS = ("imagestr", "images", "image")  # of raw data, in upper or lower case


class _PathOf:
    """An attribute of `Paths`: a file or folder in the dataset's folder."""

    def __init__(self, name: str) -> None:
        self.name = name

    def __get__(self, paths: Paths, owner: type[Paths]) -> Path:
        return paths.root / self.name


@dataclass(frozen=True)
class Paths:
    """The files of one dataset in a workspace."""

    root: Path

    dataset = _PathOf("dataset.json")
    fingerprint = _PathOf("fingerprint.json")
    plans = _PathOf("plans.json")
    planned = _PathOf("planned.json")
    check = _PathOf("check.json")
    raw = _PathOf("raw.json")  # size, time and hash of each raw file when the dataset was planned
    splits = _PathOf("splits.json")
    formats = _PathOf("formats.json")
    preprocessed = _PathOf("preprocessed")
    teachers = _PathOf("preprocessed/teachers")
    models = _PathOf("models")
    ensembles = _PathOf("ensembles")
    inference = _PathOf("inference.json")
    audit = _PathOf("audit.json")

    @property
    def name(self) -> str:
        """The name of the dataset."""
        return self.root.name

    def folder_of(self, models: str) -> Path:
        """Return the folder of a model, or of an ensemble such as A+B."""
        return (self.ensembles if "+" in models else self.models) / models

    def calibration_of(self, models: str) -> Path:
        """Return the file with the cases and degraded copies by which `select` calibrates a model, or an ensemble."""
        return self.folder_of(models) / "calibration.jsonl"

    @property
    def option(self) -> str:
        """The options that select this dataset on a command line; empty if it is selected without them."""
        is_default = self.root.parent.absolute() == workspace_folder().absolute()
        return self._dataset_option if is_default else self.where

    @property
    def where(self) -> str:
        """The options that select this dataset from any folder, for commands on a page."""
        return f"{self._dataset_option} -w {shlex.quote(str(self.root.parent))}"

    @property
    def _dataset_option(self) -> str:
        return f" -d {shlex.quote(self.name)}" if len(planned_datasets(self.root.parent)) > 1 else ""


def workspace_folder(given: str | Path | None = None) -> Path:
    """Return the workspace: the one that is given, otherwise NNLITE_WORKSPACE, otherwise ./nnlite_workspace."""
    return expand_home(given or os.environ.get("NNLITE_WORKSPACE") or "nnlite_workspace").absolute()


def is_model_of(workspace: Path, folder: Path) -> bool:
    """Whether a model folder is in a workspace: WORKSPACE/DATASET/models/MODEL, with all links resolved.

    A link in the workspace to another place is no model of the workspace.
    """
    above = (folder / "run.json").resolve().parents
    return len(above) > 3 and above[1].name == "models" and above[3] == workspace.resolve()


# -------------------------------------------------------------------------------------------------------- raw data


RAW_IS_GONE = "If they were moved, `nnlite plan` their new folder: it counts as the same dataset. Else restore them."


def find_raw(given: str, workspace: Path) -> Path:
    """Return the folder of a raw dataset from a path or a name; `Task04` and `4` find `Task04_Hippocampus`.

    Of a folder that `nnlite init` has searched, it is the dataset that lists its files.
    Names are looked up in the current folder, ./data, the workspace, its raw/ and (if set) nnUNet_raw; then among the
    planned datasets, which know their raw data.

    Raises
    ------
    UserError
        There is no dataset of that name, or there are several.
    """
    path = expand_home(given)
    if path.is_dir():
        listed = None if (path / "dataset.json").is_file() else _listed(path.absolute(), workspace)
        return listed or path.absolute()
    if path.exists():
        raise UserError("is a file; a dataset is a folder", path, "Of a CSV file `nnlite init` makes one.")
    raw = os.environ.get("nnUNet_raw")  # noqa: SIM112 - the name that nnU-Net gave it
    places = [Path.cwd(), Path.cwd() / "data", workspace, workspace / RAW, *([Path(raw)] if raw else [])]
    if len(path.parts) == 1:
        found = {match.resolve() for place in places for match in _named(place, given) if _is_raw(match)}
        planned = [Paths(match) for match in _named(workspace, given) if (match / "plans.json").is_file()]
        roots = {_raw_root(paths) for paths in planned}
        found = found or {root for root in roots if root.is_dir()}
        if len(found) == 1:
            return found.pop()
        if found:
            names = ", ".join(sorted(str(match) for match in found))
            raise UserError(f"{given!r} could be {names}", fix="Give the path.")
        if roots:
            raise UserError(f"the raw data of {given!r} are not there any more", min(roots), RAW_IS_GONE)
    looked = ", ".join(str(place) for place in places)
    looked += f" (nnUNet_raw{'' if Path(raw).is_dir() else ', which does not exist'})" if raw else ""
    folders = [entry.name for place in (path.parent, *places) for entry in place.glob("*") if entry.is_dir()]
    near = "".join(f"Did you mean {name}? " for name in get_close_matches(path.name, folders, 1))
    raise UserError(f"there is no dataset {given!r}", fix=f"{near}Give its folder, or a name in one of: {looked}.")


def _named(place: Path, name: str) -> list[Path]:
    """Return the folder called `name`, otherwise those whose names begin with it, as Task04 or the number 4 do."""
    if (place / name).is_dir():
        return [place / name]
    number = rf"|(Task|Dataset)0*{int(name)}" if name.isdecimal() else ""
    beginning = re.compile(f"({re.escape(name)}{number})_")
    return [entry for entry in place.glob("*") if entry.is_dir() and beginning.match(entry.name)]


def _is_raw(folder: Path) -> bool:
    return any(entry.is_dir() and entry.name.lower() in IMAGE_FOLDERS for entry in folder.iterdir()) or (
        (folder / "dataset.json").is_file() and not (folder / "plans.json").is_file()
    )


def _listed(folder: Path, workspace: Path) -> Path | None:
    """Return the dataset of the same name that `nnlite init` wrote of the files in a folder."""
    file = workspace / RAW / folder.name / "dataset.json"
    if not file.is_file():
        return None
    with understood(file):
        images = [image for case in read_json(file)["dataset"].values() for image in case["images"]]
    if not any(folder in Path(image).parents for image in images):
        return None
    log.info(f"{folder}: the dataset that `nnlite init` made of it is {file.parent}")
    return file.parent


# -------------------------------------------------------------------------------------------------- planned datasets


def planned_datasets(workspace: Path) -> list[str]:
    """Return the names of the datasets that are planned in a workspace."""
    planned = (path.parent for path in workspace.glob("*/plans.json"))  # which an exported model has too
    return sorted(folder.name for folder in planned if (folder / "fingerprint.json").is_file())


def datasets_of(workspace: Path) -> list[str]:
    """Return the names of the datasets that are planned in a workspace or have models there."""
    return sorted({*planned_datasets(workspace), *(model.parents[1].name for model in models_below(workspace))})


def models_below(workspace: Path) -> list[Path]:
    """Return the model folders of all datasets of a workspace, also those that were set aside."""
    return sorted(run.parent for run in workspace.glob("*/models/*/run.json"))


def use(workspace: Path, name: str) -> None:
    """Record that a dataset is the one planned last."""
    write_json(workspace / "current.json", {"dataset": name})


def _planned_last(workspace: Path) -> str | None:
    """Return the name in current.json; None if the file does not exist or is damaged."""
    try:
        with understood(workspace / "current.json"):
            return str(read_json(workspace / "current.json")["dataset"])
    except UserError:
        return None


def select_dataset(
    workspace: str | Path | None = None,
    dataset: str | None = None,
    *,
    only_reads: bool = False,
    needs_plan: bool = True,
) -> Paths:
    """Return the files of the dataset that a command works on, and log which one it is.

    Parameters
    ----------
    workspace : str or Path, optional
        The workspace; default: NNLITE_WORKSPACE, otherwise ./nnlite_workspace.
    dataset : str, optional
        A name, the start of one, nnU-Net's number, or a path to the raw data; default: the only planned dataset.
    only_reads, needs_plan : bool
        As for `planned_paths`.

    Raises
    ------
    UserError
        There is no such dataset, or there are several and none is given.
    """
    paths = planned_paths(workspace_folder(workspace), dataset, only_reads=only_reads, needs_plan=needs_plan)
    planned = len(planned_datasets(paths.root.parent))
    why = "planned last" if only_reads else "the only one with a model"
    chosen = f", {why}; -d takes one of the {planned} planned" if dataset is None and planned > 1 else ""
    log.info(f"dataset {paths.name} (workspace {paths.root.parent}{chosen})")
    return paths


def planned_paths(
    workspace: Path, given: str | None = None, *, only_reads: bool = False, needs_plan: bool = True
) -> Paths:
    """Return the files of a planned dataset.

    Parameters
    ----------
    workspace : Path
        The workspace.
    given : str, optional
        A name, the start of one, nnU-Net's number, or a path to the raw data; default: the only planned dataset.
    only_reads : bool
        Nothing will be written: of several datasets, the one planned last is taken.
    needs_plan : bool
        If False, a dataset without a plan is found too, if it has models that were imported.

    Raises
    ------
    UserError
        There is no such dataset, or there are several and none is given.
    """
    planned = planned_datasets(workspace)
    names = planned if needs_plan else datasets_of(workspace)
    if given is None:
        if not needs_plan and (found_models := _with_models(workspace, planned, only_reads)) is not None:
            return found_models
        if not planned:
            raw = [file.parent.name for file in sorted((workspace / RAW).glob("*/dataset.json"))]
            fix = f"Run `nnlite plan {shlex.quote(raw[0]) if len(raw) == 1 else 'DATA'}` first."
            fix += f" Datasets that could be planned are {', '.join(raw)}." if len(raw) > 1 else ""
            raise UserError(f"no dataset is planned in the workspace {workspace}", fix=fix)
        given = planned[0] if len(planned) == 1 else _planned_last(workspace) if only_reads else None
        if given not in planned:
            what = f"the workspace {workspace} has {len(planned)} planned datasets: {', '.join(planned)}"
            raise UserError(what, fix="Say which one with -d NAME (from Python: dataset=NAME).")
    found = [match for match in _named(workspace, Path(given).name) if match.name in names]
    if len(found) != 1:
        what = "several datasets" if found else "no planned dataset"
        have = f"It holds: {', '.join(names)}." if names else "Run `nnlite plan DATA` first."
        if found:
            have = f"Give the name: {', '.join(sorted(match.name for match in found))}."
        elif not needs_plan:  # models are enough
            results = os.environ.get("nnUNet_results")  # noqa: SIM112 - the name that nnU-Net gave it
            trained = _named(Path(results), Path(given).name) if results else []
            folder = trained[0] if trained else "FOLDER"
            have += f" Or take a model of nnU-Net: `nnlite import {folder}`, or `-m {folder}`."
        raise UserError(f"the workspace {workspace} has {what} called {given!r}", fix=have)
    paths = Paths(found[0])
    if paths.name in planned:
        _refuse_other_root(paths, expand_home(given))
    return paths


def _with_models(workspace: Path, planned: list[str], only_reads: bool) -> Paths | None:
    """Return the only dataset with models; None where a planned dataset is to be chosen."""
    found = {model.parents[1] for model in models_below(workspace)}
    if planned and (only_reads or len(found) > 1):
        return None
    if len(found) > 1:
        names = ", ".join(sorted(root.name for root in found))
        raise UserError(f"the workspace {workspace} has models of several datasets", fix=f"Choose with -d: {names}.")
    return Paths(found.pop()) if len(found) == 1 else None


def _raw_root(paths: Paths) -> Path:
    """Return the raw data of a planned dataset."""
    with understood(paths.dataset, "Run `nnlite plan` again."):
        return Path(read_json(paths.dataset)["root"])


def _refuse_other_root(paths: Paths, given: Path) -> None:
    """Make sure that a folder which was given is the one that was planned under its name.

    Raises
    ------
    UserError
        It is another folder of that name.
    """
    if len(given.parts) < 2 or not given.is_dir() or given.resolve() == paths.root.resolve():
        return
    root = _raw_root(paths)
    if root.exists() and root.resolve() != given.resolve():
        what = f"is not planned: the dataset {paths.name} in the workspace {paths.root.parent} is from {root}"
        raise UserError(what, given, "Give the name with -d, or plan this folder in another --workspace.")
