"""The exceptions whose message is all that a user needs: no traceback is printed."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from difflib import get_close_matches
from os import PathLike
from pathlib import Path
from typing import Any

_NAMES_SHOWN = 40


class UserError(Exception):
    """A mistake of the user: the command prints it as one line and exits with code 2.

    Parameters
    ----------
    what : str
        The problem, without a full stop.
    file : str or Path, optional
        The file that it is about; the message begins with it.
    fix : str
        What to do about it, a full sentence.
    """

    def __init__(self, what: str, file: str | Path | None = None, fix: str = "") -> None:
        self.what, self.file, self.fix = what, file, fix
        where = f"{file}: " if file is not None else ""
        super().__init__(f"{where}{what}." + (f" {fix}" if fix else ""))

    def __reduce__(self) -> tuple[Any, ...]:  # pickle makes an exception again from its arguments
        return type(self), (self.what, self.file, self.fix)


def how_to_install(extra: str) -> str:
    """Return how to install an extra, such as "onnx": the package is installed from a clone, not from an index."""
    return f"In the clone of nnunet_lite, type: pip install -e '.[{extra}]'"


class Busy(UserError):
    """Another process works on the same folder; waiting for it helps."""


class WorkersDied(UserError):
    """Several workers of a cluster died while they did the same work."""


class Stopped(Exception):
    """A signal ended a run, and its checkpoint is written; the exit code is 128 + the number of the signal."""

    def __init__(self, what: str, number: int) -> None:
        self.what, self.number = what, number
        super().__init__(what)

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.what, self.number)


class Lost(Exception):
    """Something that the work needs disappeared, without a mistake of the user; the exit code is 1."""


@contextmanager
def naming(file: str | PathLike[str]) -> Iterator[None]:
    """Add a file, or the name of a case, to a `UserError` of the block that names none."""
    try:
        yield
    except UserError as error:
        if error.file is not None:
            raise
        raise UserError(error.what, str(file), error.fix) from error


def suggest(name: str, known: Iterable[str], likeness: float = 0.6) -> str:
    """Return what to do about an unknown name: the known name that is most like it, otherwise what there is."""
    names = list(known)
    near = get_close_matches(name, names, 1, likeness)
    more = f" and {len(names) - _NAMES_SHOWN} more" if len(names) > _NAMES_SHOWN else ""
    return f"Did you mean {near[0]!r}?" if near else f"There are: {', '.join(names[:_NAMES_SHOWN])}{more}."


def no_such_file(path: Path) -> UserError:
    """Return the error for a path that does not exist, with the name in its folder that is most like it, or a pipe."""
    if path.exists():
        return UserError("is a pipe or a device, not a file", path)
    names = [other.name for other in path.parent.iterdir()] if path.parent.is_dir() else []
    near = get_close_matches(path.name, names, 1)
    return UserError(
        "there is no such file or folder", path, f"Did you mean {path.with_name(near[0])}?" if near else ""
    )


def describe(problem: BaseException) -> str:
    """Return an exception as one line, for reports that continue with the next case."""
    if isinstance(problem, OSError) and problem.filename is not None:
        return f"{problem.filename}: {problem.strerror}"
    text = " ".join(str(problem).split())
    return text if isinstance(problem, UserError) else f"{type(problem).__name__}: {text}"
