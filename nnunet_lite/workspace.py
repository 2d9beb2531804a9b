"""Where the files of a dataset are: one workspace folder, the current dataset, locks, and JSON.

workspace/
  current.json                 the data set that was planned last
  Task04_Hippocampus/
    dataset.json  fingerprint.json  plans.json  check.json  splits.json
    preprocessed/              see preprocess/store.py
    models/3d_fullres-cpu/     a model folder: plans.json dataset.json run.json fold_0/ ...
    ensembles/A+B/fold_0/      what two models predict together of the held-out cases
    inference.json             what `nnlite select` chose, and `nnlite predict` obeys
"""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nnunet_lite.errors import UserError
from nnunet_lite.writing import atomic


@contextmanager
def locked(folder: Path, when_taken: Callable[[], None]) -> Iterator[None]:
    """Only one process at a time works in a folder; its death releases the lock.

    Where another one holds it, `when_taken` is called, which may raise; then this one waits for its turn.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / ".lock").open("a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            when_taken()
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def write_text(path: Path, text: str) -> None:
    content = text.encode("utf-8")
    with atomic(path, len(content)) as temporary:
        temporary.write_bytes(content)


def write_json(path: Path, value: Any) -> None:
    write_text(path, json.dumps(value, indent=1) + "\n")


def read_json(path: Path) -> Any:
    """The contents of a JSON file.

    Raises
    ------
    UserError : not there, or not JSON (with line and column).
    """
    try:
        return json.loads(path.read_text(encoding="utf-8-sig"))
    except RecursionError:
        raise UserError("is nested too deeply to be read", path) from None
    except FileNotFoundError:
        raise UserError("no such file", path) from None
    except UnicodeDecodeError as error:
        raise UserError(f"is not UTF-8 text (byte {error.start})", path) from None
    except json.JSONDecodeError as error:
        raise UserError(f"invalid JSON at line {error.lineno}, column {error.colno}: {error.msg}", path) from None
    except ValueError as error:  # a number of thousands of digits
        raise UserError(f"cannot be read ({error})", path) from None


@contextmanager
def understood(path: Path, fix: str = "") -> Iterator[None]:
    """Turn what a block stumbles over in the content of a file that nnlite wrote into one line that names the file.

    Raises
    ------
    UserError : something is missing in it, or of another kind than nnlite writes.
    """
    try:
        yield
    except (KeyError, IndexError, TypeError, ValueError, AttributeError) as error:  # pydantic's are ValueErrors
        reason = " ".join(str(error).split())
        raise UserError(f"is not as nnlite writes it ({type(error).__name__}: {reason:.100})", path, fix) from None


def must_be_known(found: str, ours: str, file: Path) -> None:
    """Refuse a format that is not ours, such as nnlite-model-2 of a later version.

    Raises
    ------
    UserError : of a newer nnlite, or of a format that there is not.
    """
    kind, _, number = ours.rpartition("-")
    theirs, _, later = found.rpartition("-")
    if found == ours:
        return
    if theirs == kind and later.isdigit() and int(later) > int(number):
        raise UserError(f"is of a newer nnlite ({found}, this one reads {ours})", file, "Update nnunet-lite.")
    raise UserError(f"is of an unknown format, {found!r:.80}", file)


@dataclass(frozen=True)
class Paths:
    """The files of one data set in a workspace."""

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


def workspace_folder(given: Path | None = None) -> Path:
    """The workspace: what was given, else NNLITE_WORKSPACE, else ./nnlite_workspace."""
    return Path(given or os.environ.get("NNLITE_WORKSPACE") or "nnlite_workspace").expanduser().absolute()


def find_raw(given: str, workspace: Path) -> Path:
    """The folder of a raw data set from a path or a name; `Task04` finds `Task04_Hippocampus`.

    Names are looked up in the current folder, ./data, the workspace and (if set) nnUNet_raw.

    Raises
    ------
    UserError : nothing of that name, or several.
    """
    path = Path(given).expanduser()
    if path.is_dir():
        return path.absolute()
    if path.exists():
        raise UserError("is a file; a data set is a folder", path)
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
    raise UserError(f"there is no data set {given!r}", fix=f"Give its folder, or a name in one of: {looked}.")


def _named(place: Path, name: str) -> list[Path]:
    """Folders called `name`, else those that it begins: Task04 or Dataset004 for Task04_Hippocampus."""
    if not place.is_dir():
        return []
    exact = place / name
    if exact.is_dir():
        return [exact]
    return [entry for entry in place.iterdir() if entry.is_dir() and entry.name.startswith(f"{name}_")]


def _is_raw(folder: Path) -> bool:
    return any((folder / name).is_dir() for name in ("imagesTr", "images")) or (
        (folder / "dataset.json").is_file() and not (folder / "plans.json").is_file()
    )


def place_of(workspace: Path, name: str, root: Path, ids: Sequence[str]) -> Paths:
    """Where a raw data set, with these cases, has its files in a workspace.

    Raises
    ------
    UserError : its name is no folder's, that is where its raw data lie, or another data set of that name is there.
    """
    paths = Paths(workspace / name)
    if not name:
        raise UserError("has no name, which a data set takes from its folder", root)
    if paths.root.resolve() == root.resolve():
        raise UserError(f"lies itself in the workspace {workspace}", root, "Give another folder with --workspace.")
    if not paths.dataset.is_file():
        return paths
    with understood(paths.dataset, "Move it away."):
        there = read_json(paths.dataset)
        other, theirs = Path(there["root"]), [case["id"] for case in there["dataset"]]
    if other.resolve() == root.resolve() or not other.exists() or theirs == list(ids):
        return paths
    what = f"the workspace {workspace} has another data set called {name}, with other cases, from {other}"
    raise UserError(what, root, "Give another folder with --workspace, or rename one of the two.")


def use(workspace: Path, name: str) -> Paths:
    """Make a data set the current one."""
    write_json(workspace / "current.json", {"dataset": name})
    return Paths(workspace / name)


def current(workspace: Path, given: str | None = None) -> Paths:
    """The planned data set to work on: `given` (a name, the start of one, or a path to the raw data), else the current.

    Raises
    ------
    UserError : there is none, or not that one.
    """
    if given is None:
        if not (workspace / "current.json").is_file():
            raise UserError(f"no data set is planned in the workspace {workspace}", fix="Run `nnlite plan DATA` first.")
        with understood(workspace / "current.json", "Run `nnlite plan DATA` again."):
            given = str(read_json(workspace / "current.json")["dataset"])
    name = Path(given).name
    planned = [match for match in _named(workspace, name) if (match / "plans.json").is_file()]
    if len(planned) == 1:
        return Paths(planned[0])
    what = "several planned data sets" if planned else "no planned data set"
    have = sorted(path.parent.name for path in workspace.glob("*/plans.json"))
    there = f"It holds: {', '.join(have)}." if have else "Run `nnlite plan DATA` first."
    raise UserError(f"the workspace {workspace} has {what} called {given!r}", fix=there)
