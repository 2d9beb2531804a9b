"""Where a data set's files lie: one workspace folder, the current data set, and writes that are whole or not at all.

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
import re
import secrets
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from nnunet_lite.budget import cut_short, lacks_space, no_space, size_of
from nnunet_lite.errors import UserError

_TAIL = 40  # letters of a name that its temporary name keeps: 255 bytes hold them, of 4 bytes each as they may be
_TEMPORARY = re.compile(r"\.tmp-[0-9a-f]{8}(-.*)?")
_ALIVE = ".lock"  # in a temporary folder: is locked while its process runs


@contextmanager
def atomic(path: Path, needed: int | None = None) -> Iterator[Path]:
    """A temporary path beside `path` that takes its place when the block ends well, and is gone when it does not.

    The temporary name keeps the suffixes, since writers choose the format by them, and is short enough where the name
    itself is as long as file systems allow.

    Parameters
    ----------
    needed : bytes that will be written, for the message where they do not fit; default: those that were.

    Raises
    ------
    OSError : the disk is full; says how much is needed.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    _sweep_once(path.parent.absolute())
    temporary = path.with_name(f"{_temporary_name()}-{path.name[-_TAIL:]}")
    try:
        with _held(temporary), must_fit(path, temporary, needed):
            yield temporary
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def scratch(parent: Path) -> Iterator[Path]:
    """A temporary folder in `parent` that is gone when the block ends; what is to stay is moved out of it before."""
    parent.mkdir(parents=True, exist_ok=True)
    _sweep_once(parent.absolute())
    temporary = parent / _temporary_name()
    temporary.mkdir()
    try:
        with _held(temporary / "lock"):
            (temporary / "lock").rename(temporary / _ALIVE)  # so `sweep` never finds it unlocked
            yield temporary
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _temporary_name() -> str:
    return f".tmp-{secrets.token_hex(4)}"


@contextmanager
def _held(file: Path) -> Iterator[None]:
    """Make a file and lock it: `sweep` deletes what no living process holds."""
    with file.open("ab") as lock:
        with suppress(OSError):  # a file system that has no locks
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield


@contextmanager
def must_fit(path: Path, written: Path, needed: int | None = None) -> Iterator[None]:
    """Turn what a block meets on a full disk into one error about `path`; `written` is what the block writes.

    Parameters
    ----------
    needed : bytes, for the message; default: those that were written until then.

    Raises
    ------
    OSError : the disk is full; says how much is needed. What was written is deleted.
    """
    reason: int | None
    try:
        yield
        reason = cut_short(written)
    except UserError:
        raise
    except Exception as error:  # a library's own, which has no public base
        reason = error.errno if lacks_space(error) else cut_short(written)
        if not reason:
            raise
    if reason:
        size = max(needed or 0, size_of(written))
        shutil.rmtree(written) if written.is_dir() else written.unlink(missing_ok=True)
        raise no_space(path.parent, f"{path.name} needs {'more than' if needed is None else 'about'}", size, reason)


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


def sweep(folder: Path, alone: bool = False) -> None:
    """Delete the temporary files and folders that killed runs left in a folder, not in those below it.

    What a living process writes there is kept: it holds a lock on it.

    Parameters
    ----------
    alone : no other process can be at work in this folder of ours: whatever is temporary is a leftover.
    """
    for leftover in folder.glob(".tmp*") if folder.is_dir() else ():
        if alone or (_TEMPORARY.fullmatch(leftover.name) and not _is_alive(leftover)):
            with suppress(OSError):  # another one sweeps too, or it is another user's
                shutil.rmtree(leftover) if leftover.is_dir() else leftover.unlink()


@cache
def _sweep_once(folder: Path) -> None:
    """Sweep a folder when this process first writes there."""
    sweep(folder)


def _is_alive(temporary: Path) -> bool:
    """Whether the process that made a temporary file or folder still runs."""
    lock = temporary / _ALIVE if temporary.is_dir() else temporary
    try:
        with lock.open("r+b") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:  # of another user, not locked yet, or on a file system without locks
        return True
    return False


def write_text(path: Path, text: str) -> None:
    with atomic(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


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
