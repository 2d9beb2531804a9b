"""The exception that is the user's to mend, and the one that a signal to stop ends in."""

from __future__ import annotations

from pathlib import Path


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


class Stopped(Exception):
    """A run ended because a signal asked it to, with its checkpoint written; the exit code is 128 + the signal."""

    def __init__(self, what: str, number: int) -> None:
        self.number = number
        super().__init__(what)


def describe(problem: BaseException) -> str:
    """One line that says what went wrong, for reports that go on with the next case."""
    text = " ".join(str(problem).split())
    return text if isinstance(problem, UserError) else f"{type(problem).__name__}: {text}"
