"""Files: written completely or not at all, locks, text and JSON, and one line for a full disk.

`atomic` and `scratch` write to a temporary path. Temporary paths of killed processes are deleted when another process
first writes to their folder: a living process holds a lock on its own.
"""

from __future__ import annotations

import csv
import errno
import hashlib
import io
import json
import math
import os
import platform
import re
import secrets
import shutil
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path
from tempfile import TemporaryFile
from typing import IO, Any, TypeGuard, TypeVar

from filelock import lock_descriptor
from pydantic import AfterValidator, BaseModel, ValidationError

from nnunet_lite import log
from nnunet_lite.errors import Busy, UserError
from nnunet_lite.system import file_size_limit, in_units, temporary_paths

Validated = TypeVar("Validated", bound=BaseModel)

SPARE = 1 << 16  # bytes that must be free after a write: one that was cut short leaves less
_NO_SPACE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)  # the disk is full; a quota is used up; a ulimit for files
_TAIL = 40  # letters of a name that its temporary name keeps: 255 bytes hold them, of up to 4 bytes each
_LONGEST_NAME = 80  # of a dataset or a model
_TEMPORARY = re.compile(r"\.tmp-[0-9a-f]{8}(-.*)?")
_LOCK = ".lock"
_MOMENT = 0.05  # seconds
_IS_WINDOWS = os.name == "nt"  # where a file that one handle has locked or open cannot be written or renamed by others


# -------------------------------------------------------------------------------------------------- temporary paths


@contextmanager
def atomic(path: Path, needed: int | None = None) -> Iterator[Path]:
    """Give a temporary path that replaces `path` when the block ends; if the block raises, it is deleted.

    The temporary name keeps the suffixes in lower case, because writers choose the format by them, and is short enough
    where the name itself is as long as file systems allow.

    Parameters
    ----------
    path : Path
        The file to write.
    needed : int, optional
        Bytes that will be written, for the message if they do not fit; default: those that were written.

    Raises
    ------
    OSError
        The disk is full; the message says how much is needed.
    """
    temporary = _temporary_path(path.parent, f"-{path.name[-_TAIL:].lower()}")
    try:
        with _held(temporary), must_fit(path, temporary, needed):
            yield temporary
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
        temporary_paths.discard(temporary)


@contextmanager
def scratch(parent: Path) -> Iterator[Path]:
    """Make a temporary folder in `parent` that is deleted when the block ends; move results out of it before."""
    temporary = _temporary_path(parent)
    temporary.mkdir()
    try:
        with _held(temporary / "lock"):
            (temporary / "lock").rename(temporary / _LOCK)  # so that `sweep` never finds it unlocked
            yield temporary
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary_paths.discard(temporary)


def _temporary_path(folder: Path, tail: str = "") -> Path:
    """Return a new path in a folder, which is made and swept first."""
    must_be_writable(folder)
    folder.mkdir(parents=True, exist_ok=True)
    _sweep_once(folder.absolute())
    path = folder.absolute() / f".tmp-{secrets.token_hex(4)}{tail}"
    temporary_paths.add(path)
    return path


@contextmanager
def _held(file: Path) -> Iterator[None]:
    """Make a file and lock it while the block runs; on Windows only make it."""
    if _IS_WINDOWS:
        file.touch()
        yield
        return
    with file.open("ab") as lock:
        with suppress(OSError):  # a file system without locks
            lock_descriptor(lock.fileno())
        yield


def sweep(folder: Path, alone: bool = False) -> None:
    """Delete the temporary files and folders of killed processes in a folder, not in those below it.

    Parameters
    ----------
    folder : Path
        The folder.
    alone : bool
        No other process can work in this folder: delete everything that is temporary.
    """
    for leftover in folder.glob(".tmp*") if alone else leftovers(folder):
        with suppress(OSError):  # another process sweeps too, or it is another user's
            remove(leftover)


def leftovers(folder: Path, pattern: str = ".tmp*") -> list[Path]:
    """Return the temporary files and folders of killed processes in a folder; with "**/.tmp*" those below it too."""
    if _IS_WINDOWS:  # where they are not locked
        return []
    found = [path for path in folder.glob(pattern) if _TEMPORARY.fullmatch(path.name)]
    return [path for path in found if not _is_held(path / _LOCK if path.is_dir() else path, unknown=True)]


def remove(path: Path) -> None:
    """Delete a file, a link, or a folder with all that is in it."""
    shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()


_sweep_once = cache(sweep)  # of a folder, when this process first writes there


def is_locked(folder: Path) -> bool:
    """Whether a process works in a folder that it `locked`; False where that cannot be known."""
    return _is_held(folder / _LOCK, unknown=False)


def _is_held(file: Path, unknown: bool) -> bool:
    """Whether a process holds a lock on a file; `unknown` if that cannot be known."""
    try:
        with file.open("r+b") as opened:
            return not lock_descriptor(opened.fileno(), blocking=False)
    except OSError:  # of another user, not locked yet, or on a file system without locks
        return unknown


@contextmanager
def locked(folder: Path, doing: str, *, wait: bool = True, leave: bool = True) -> Iterator[None]:
    """Let only one process at a time work in a folder; its death releases the lock.

    The lock file contains the number and the machine of the process, for the message to others.

    Parameters
    ----------
    folder : Path
        The folder; it is made if it does not exist.
    doing : str
        The work, such as "training".
    wait : bool
        Wait for another process that works there.
    leave : bool
        Leave the lock file there. Otherwise it is deleted, except on Windows.

    Raises
    ------
    Busy
        Another process works there, and `wait` is False.
    """
    must_be_writable(folder)
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / _LOCK
    while True:
        with path.open("a+") as file:
            _acquire(file, folder, doing, wait)
            try:
                is_there = os.path.samestat(path.stat(), os.fstat(file.fileno()))
            except FileNotFoundError:
                is_there = False
            if not is_there:
                continue  # its last holder has deleted it, so others lock a new one
            with suppress(OSError):  # a full disk
                file.truncate(0)
                os.write(file.fileno(), f"({os.getpid()} on {platform.node()})".encode())
            try:
                yield
            finally:
                if not leave:
                    with suppress(OSError):  # Windows deletes no open file
                        path.unlink()
            return


def _acquire(file: IO[str], folder: Path, doing: str, wait: bool) -> None:
    """Lock the lock file of a folder; wait for another process, or raise `Busy`."""
    try:
        is_free = lock_descriptor(file.fileno(), blocking=False)
    except OSError as error:
        log.warn(f"{folder}: this file system has no locks ({error.strerror}); start nothing else that writes here")
        is_free = True
    if not is_free:  # `is_locked` of another process holds the lock for a moment
        time.sleep(_MOMENT)
        is_free = lock_descriptor(file.fileno(), blocking=False)
    if not is_free:
        holder = ""
        with suppress(OSError):  # on Windows, no other process can read a locked file
            file.seek(0)
            holder = file.read()
        what = f"another process is {doing} here {holder}".rstrip()
        if not wait:
            raise Busy(what, folder, "Wait for it, or stop it.")
        log.warn(f"{folder}: {what}, waiting for it")  # with --quiet too: nothing else explains the silence
        with log.working("waiting for another process"):
            lock_descriptor(file.fileno())


# ---------------------------------------------------------------------------------------------------- text and JSON


def must_be_writable(folder: Path) -> None:
    """Refuse a folder where no file can be made, or below such a folder or a broken link; before long work too.

    Raises
    ------
    UserError
        The folder, or the nearest one above it that exists, is read-only for this user, or a broken link; it is named.
    """
    places = (folder.absolute(), *folder.absolute().parents)
    # functions of os.path: methods of Path may raise
    nearest = next((place for place in places if os.path.isdir(place)), None)  # noqa: PTH112
    if broken := next((p for p in places if os.path.islink(p) and not os.path.exists(p)), None):  # noqa: PTH110, PTH114
        raise UserError("is a link to a folder that does not exist", broken, "Mount its disk, or correct the link.")
    if nearest is not None and not os.access(nearest, os.W_OK):  # on Windows a drive may be missing
        raise UserError("is read-only for you", nearest, "Write elsewhere, or change the rights of this folder.")


def is_folder_name(name: str) -> bool:
    """Whether a dataset or a model may have this name: one that a folder can have on every system, and not hidden."""
    is_plain = name.isprintable() and not name.startswith(".") and not {*"/\\:"} & {*name}
    return is_plain and 0 < len(name) <= _LONGEST_NAME


def write_text(path: Path, text: str) -> None:
    """Write a text file completely or not at all."""
    content = text.encode("utf-8")
    with atomic(path, len(content)) as temporary:
        temporary.write_bytes(content)


def write_json(path: Path, value: Any) -> None:
    """Write a JSON file completely or not at all."""
    write_text(path, json.dumps(value, indent=1) + "\n")


def to_csv(rows: Iterable[Sequence[Any]]) -> str:
    """Return a table as CSV, the headings first; None is an empty cell."""
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(rows)
    return text.getvalue()


def table_of(records: Sequence[Mapping[str, Any]]) -> list[list[Any]]:
    """Return records as a table: the headings, then a row for each; None where a record lacks a value."""
    columns = list(dict.fromkeys(name for record in records for name in record))
    return [columns, *([record.get(name) for name in columns] for record in records)]


def read_table(path: Path) -> list[list[str]]:
    """Return the cells of a table between commas, semicolons or tabs, without spaces around them, line by line.

    Raises
    ------
    UserError
        As `read_text`.
    """
    text = read_text(path)
    lines = csv.reader(text.splitlines(), delimiter=max(",;\t", key=text.count))
    return [[cell.strip() for cell in line] for line in lines]


def hash_of(value: Any) -> str:
    """Hash what JSON can hold: 16 hexadecimal digits."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:16]


def append(path: Path, line: str) -> None:
    """Append a line to a text file.

    Raises
    ------
    OSError
        The disk is full; a part of the line may be written.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        with path.open("a", encoding="utf-8") as file:
            file.write(line + "\n")
    except OSError as error:
        if lacks_space(error):
            raise no_space(path.parent, f"{path.name} needs about", SPARE, error.errno) from None
        raise


def read_text(path: Path) -> str:
    """Return the content of a text file.

    Raises
    ------
    UserError
        The file does not exist, or is not UTF-8.
    """
    try:
        return path.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise UserError("no such file", path) from None
    except UnicodeDecodeError as error:
        raise UserError(f"is not UTF-8 text (byte {error.start})", path) from None


def read_json(path: Path) -> Any:
    """Return the content of a JSON file.

    Raises
    ------
    UserError
        The file does not exist, or is not JSON (with line and column).
    """
    try:
        return json.loads(read_text(path))
    except json.JSONDecodeError as error:
        raise UserError(f"invalid JSON at line {error.lineno}, column {error.colno}: {error.msg}", path) from None
    except (RecursionError, ValueError) as error:  # too many levels, or a number of thousands of digits
        raise UserError(f"cannot be read ({error})", path) from None


@contextmanager
def understood(path: Path, fix: str = "", writer: str = "nnlite") -> Iterator[None]:
    """Report an error of the block, which interprets a file that `writer` wrote, as one line that names the file.

    Raises
    ------
    UserError
        The file lacks something, or has something of another kind than `writer` writes.
    """
    try:
        yield
    except (LookupError, TypeError, ValueError, AttributeError, RecursionError) as error:  # pydantic's are ValueErrors
        reason = " ".join(str(error).split())
        raise UserError(f"is not as {writer} writes it ({type(error).__name__}: {reason:.100})", path, fix) from None


def must_be(what: str, is_legal: Callable[[Any], bool]) -> AfterValidator:
    """Return a validator for a type of pydantic that refuses values unless `is_legal`, which `what` says in words."""

    def check(value: Any) -> Any:
        if not is_legal(value):
            raise ValueError(f"must be {what}")
        return value

    return AfterValidator(check)


def first_problem(error: ValidationError) -> str:
    """Return the first problem that pydantic found in a line: its place in the file, what is legal, and the value."""
    problem = error.errors()[0]
    where = ".".join(str(part) for part in problem["loc"])
    message = problem["msg"].removeprefix("Value error, ")
    if isinstance(problem["input"], dict):  # the message says which of its entries is wrong
        return f"{where}: {message}" if where else message
    return f"{where or 'the file'}: {message} (found {problem['input']!r:.80})"


@contextmanager
def validated(path: Path | None = None, what: str = "{}", fix: str = "") -> Iterator[None]:
    """Report the first problem that pydantic finds in the block, in place of {} in `what`, in one line about a file.

    Raises
    ------
    UserError
        A value does not fit a model.
    """
    try:
        yield
    except ValidationError as error:
        raise UserError(what.format(first_problem(error)), path, fix) from None


def read_validated(path: Path, model: type[Validated], what: str, fix: str) -> Validated | None:
    """Read a JSON file as a pydantic model; None if there is no such file.

    Parameters
    ----------
    path : Path
        The file.
    model : type
        A subclass of pydantic's BaseModel.
    what : str
        What the file is if it does not fit, such as "is no audit".
    fix : str
        How to correct it.

    Raises
    ------
    UserError
        The file cannot be read, or does not fit the model.
    """
    if not path.is_file():
        return None
    with validated(path, f"{what} ({{}})", fix):
        return model.model_validate(read_json(path))


def must_be_known(found: str, ours: str, file: Path) -> None:
    """Refuse a format that is not ours, such as nnlite-model-2 of a later version.

    Parameters
    ----------
    found : str
        The format that the file names.
    ours : str
        The format that this version reads, such as "nnlite-model-1".
    file : Path
        The file.

    Raises
    ------
    UserError
        The file is of a newer nnlite, or of an unknown format.
    """
    kind, _, number = ours.rpartition("-")
    theirs, _, later = found.rpartition("-")
    if found == ours:
        return
    if theirs == kind and later.isdigit() and int(later) > int(number):
        raise UserError(f"is of a newer nnlite ({found}, this one reads {ours})", file, "Update nnunet-lite.")
    raise UserError(f"is of an unknown format, {found!r:.80}", file)


# ----------------------------------------------------------------------------------------------------- a full disk


@contextmanager
def must_fit(path: Path, written: Path, needed: int | None = None) -> Iterator[None]:
    """Report a full disk, in whatever way the block meets it, as one error about `path`.

    Parameters
    ----------
    path : Path
        The file or folder to name.
    written : Path
        The temporary file or folder that the block writes; it is deleted if the disk is full.
    needed : int, optional
        Bytes, for the message; default: those that were written.

    Raises
    ------
    OSError
        The disk is full; the message says how much is needed.
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


def lacks_space(error: BaseException | None) -> TypeGuard[OSError]:
    """Whether an error is that of a full disk, of a quota that is used up, or of a limit for the size of files."""
    return isinstance(error, OSError) and error.errno in _NO_SPACE


def shortage(error: Exception) -> int:
    """Return the system's error number of a lack of space, also of a library that wraps it in text; otherwise 0."""
    found = getattr(error, "errno", None)
    return next((number for number in _NO_SPACE if number == found or os.strerror(number) in str(error)), 0)


def no_space(folder: Path, what: str, needed: int, reason: int | None = errno.ENOSPC) -> OSError:
    """Return the error to raise if bytes do not fit on the disk of a folder; one line, with what to do.

    Parameters
    ----------
    folder : Path
        Where the bytes should be written.
    what : str
        The subject of the sentence, such as "model.safetensors needs more than".
    needed : int
        Bytes.
    reason : int, optional
        The system's error number.
    """
    reason = reason or errno.ENOSPC
    free = f", {in_units(shutil.disk_usage(folder).free)} are free" if reason == errno.ENOSPC else ""
    fix = "Raise the limit for files (ulimit -f)" if reason == errno.EFBIG else "Free some space"
    message = f"{os.strerror(reason)}: {what} {in_units(needed)}{free}. {fix}, then run the same command again"
    return OSError(reason, message, str(folder.absolute()))


def cut_short(written: Path) -> int:
    """Return the error number if a file or folder may be incomplete because there is no space, otherwise 0.

    Libraries hide the system's error behind one of their own (safetensors, blosc2), or report none and leave a file
    that is cut off (ITK). Each leaves a full disk, or a file as large as the limit allows.
    """
    limit = file_size_limit()
    if limit < math.inf and max((path.stat().st_size for path in _files(written)), default=0) >= limit:
        return errno.EFBIG
    try:
        with TemporaryFile(dir=written.parent) as file:
            allocate(file, SPARE, written.parent)
    except OSError as error:
        return shortage(error)
    return 0


def allocate(file: IO[bytes], size: int, folder: Path) -> None:
    """Reserve bytes for an open file in a folder; macOS and Windows cannot, so there the free space is compared.

    Raises
    ------
    OSError
        There is no space.
    """
    if hasattr(os, "posix_fallocate"):
        os.posix_fallocate(file.fileno(), 0, size)
    elif size > shutil.disk_usage(folder).free:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    else:
        file.truncate(size)


def size_of(path: Path) -> int:
    """Return the bytes of a file, or of all files in a folder and below it; 0 if it does not exist."""
    return sum(file.stat().st_size for file in _files(path))


def _files(path: Path) -> list[Path]:
    return [file for file in (path, *path.rglob("*")) if file.is_file()]
