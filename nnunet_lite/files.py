"""Files: written completely or not at all, a full disk reported in one line, leftovers of killed runs deleted; JSON."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import re
import resource
import secrets
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any, TypeGuard

from nnunet_lite.errors import UserError
from nnunet_lite.start import unfinished
from nnunet_lite.system import in_units

SPARE = 1 << 16  # bytes that must be left after a write: one that was cut short leaves less
_NO_SPACE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)  # the disk is full; a quota is used up; a ulimit for files
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
    temporary = path.absolute().with_name(f"{_temporary_name()}-{path.name[-_TAIL:]}")
    unfinished.add(temporary)
    try:
        with _held(temporary), must_fit(path, temporary, needed):
            yield temporary
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
        unfinished.discard(temporary)


@contextmanager
def scratch(parent: Path) -> Iterator[Path]:
    """A temporary folder in `parent` that is gone when the block ends; what is to stay is moved out of it before."""
    parent.mkdir(parents=True, exist_ok=True)
    _sweep_once(parent.absolute())
    temporary = parent.absolute() / _temporary_name()
    temporary.mkdir()
    unfinished.add(temporary)
    try:
        with _held(temporary / "lock"):
            (temporary / "lock").rename(temporary / _ALIVE)  # so `sweep` never finds it unlocked
            yield temporary
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
        unfinished.discard(temporary)


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
    try:
        yield
        reason = cut_short(written)
    except UserError:
        raise
    except Exception as error:  # a library's own, which has no public base
        reason = shortage(error) or cut_short(written)
        if not reason:
            raise
    if reason:
        size = max(needed or 0, size_of(written)) + SPARE
        shutil.rmtree(written) if written.is_dir() else written.unlink(missing_ok=True)
        raise no_space(path.parent, f"{path.name} needs {'more than' if needed is None else 'about'}", size, reason)


def append(path: Path, line: str) -> None:
    """Append a line to a text file.

    Raises
    ------
    OSError : the disk is full; a part of the line may be there.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        with path.open("a", encoding="utf-8") as file:
            file.write(line + "\n")
    except OSError as error:
        if lacks_space(error):
            raise no_space(path.parent, f"{path.name} needs about", SPARE, error.errno) from None
        raise


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


# ------------------------------------------------------------------------------------------------- locks, text and JSON


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


# --------------------------------------------------------------------------------------------------------- a full disk


def lacks_space(error: BaseException | None) -> TypeGuard[OSError]:
    """Whether an error is that of a full disk, of a quota that is used up, or of a limit for the size of files."""
    return isinstance(error, OSError) and error.errno in _NO_SPACE


def shortage(error: Exception) -> int:
    """The number of the system's error by which there was no space to write, also of a library that wraps it; or 0."""
    if lacks_space(error):
        return error.errno or errno.ENOSPC
    return next((number for number in _NO_SPACE if os.strerror(number) in str(error)), 0)


def no_space(folder: Path, what: str, needed: int, reason: int | None = errno.ENOSPC) -> OSError:
    """The error to raise where `needed` bytes do not fit on the disk of a folder; one line, with what to do.

    Parameters
    ----------
    what : the subject of the sentence, such as "model.safetensors needs more than".
    reason : the number of the system's error.
    """
    reason = reason or errno.ENOSPC
    free = f", {in_units(shutil.disk_usage(folder).free)} are free" if reason == errno.ENOSPC else ""
    fix = "Raise the limit for files (ulimit -f)" if reason == errno.EFBIG else "Free some space"
    return OSError(
        reason,
        f"{os.strerror(reason)}: {what} {in_units(needed)}{free}. {fix}, then run the same command again",
        str(folder.absolute()),
    )


def cut_short(written: Path) -> int:
    """Whether a file or folder that was just written may be incomplete because there is no space: the reason, or 0.

    Libraries hide the system's error behind one of their own (safetensors, blosc2), or report none and leave a file
    that is cut off (ITK). Each leaves a disk without room, or a file as large as the limit allows.
    """
    limit, _ = resource.getrlimit(resource.RLIMIT_FSIZE)
    if limit != resource.RLIM_INFINITY and max((path.stat().st_size for path in _files(written)), default=0) >= limit:
        return errno.EFBIG
    try:
        with TemporaryFile(dir=written.parent) as file:
            os.posix_fallocate(file.fileno(), 0, SPARE)
    except OSError as error:
        if error.errno in _NO_SPACE:
            return error.errno
    return 0


def size_of(path: Path) -> int:
    """Bytes of a file, or of all files in a folder and below it; 0 where there is none."""
    return sum(file.stat().st_size for file in _files(path))


def _files(path: Path) -> list[Path]:
    return [file for file in (path, *path.rglob("*")) if file.is_file()]
