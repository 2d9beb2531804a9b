"""The exceptions whose message is all that a user needs: a mistake to mend, a stop that was asked for, a loss."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from os import PathLike
from pathlib import Path
from typing import Any


class UserError(Exception):
    """A mistake of the user's: the command line prints it as one line and exits with code 2.

    Parameters
    ----------
    what : what is wrong, without a full stop.
    file : the file it is about, if any; it opens the message.
    fix : what to do about it, a full sentence.
    """

    def __init__(self, what: str, file: str | Path | None = None, fix: str = "") -> None:
        self.what, self.file, self.fix = what, file, fix
        where = f"{file}: " if file is not None else ""
        super().__init__(f"{where}{what}." + (f" {fix}" if fix else ""))

    def __reduce__(self) -> tuple[Any, ...]:  # an exception travels between processes by what it was made with
        return type(self), (self.what, self.file, self.fix)


@contextmanager
def naming(file: str | PathLike[str]) -> Iterator[None]:
    """Let a mistake that is noticed in a block name the file, or the case, that it is about, unless it names one."""
    try:
        yield
    except UserError as error:
        if error.file is not None:
            raise
        raise UserError(error.what, str(file), error.fix) from error


class Busy(UserError):
    """Another process is at work on the same folder; waiting for it helps."""


class Stopped(Exception):
    """A run ended because a signal asked it to, with its checkpoint written; the exit code is 128 + the signal."""

    def __init__(self, what: str, number: int) -> None:
        self.what, self.number = what, number
        super().__init__(what)

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.what, self.number)


class Lost(Exception):
    """What the work needs is gone, by no mistake of the user's; the line says all, the exit code is 1."""


def describe(problem: BaseException) -> str:
    """One line that says what went wrong, for reports that go on with the next case."""
    text = " ".join(str(problem).split())
    return text if isinstance(problem, UserError) else f"{type(problem).__name__}: {text}"
