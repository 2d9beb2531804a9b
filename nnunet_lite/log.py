"""Messages and progress on standard error; standard output contains only results, as text or as JSON."""

from __future__ import annotations

import os
import re
import sys
import time
from collections.abc import Iterable, Iterator
from functools import cache
from typing import Any, TextIO, TypeVar

T = TypeVar("T")

_SECONDS_BETWEEN_LINES = 10.0

_COLOURS = {"error": "\x1b[31m", "failed": "\x1b[31m", "warning": "\x1b[33m"}  # red, red, yellow

# what is printed: nothing, results and warnings, messages as well, details as well
SILENT, QUIET, NORMAL, VERBOSE = -2, -1, 0, 1
_VERBOSITY = "_NNLITE_VERBOSITY"  # a variable of the environment: processes that this one starts print as much
_verbosity = int(os.environ.get(_VERBOSITY, NORMAL))
_start = time.monotonic()
_bars: Any = None  # tqdm, once a bar is shown


def set_verbosity(verbosity: int) -> None:
    """Choose what this process, and processes that it starts, print from now on: SILENT, QUIET, NORMAL or VERBOSE."""
    global _verbosity
    _verbosity = verbosity
    os.environ[_VERBOSITY] = str(verbosity)


def info(message: str) -> None:
    """Print a message; with --verbose after the seconds since the start."""
    if _verbosity >= NORMAL:
        _print(f"[{time.monotonic() - _start:.1f} s] {message}" if _verbosity >= VERBOSE else message, sys.stderr)


def detail(message: str) -> None:
    """Print what only --verbose shows."""
    if _verbosity >= VERBOSE:
        info(message)


def warn(message: str) -> None:
    """Print a warning."""
    if _verbosity >= QUIET:
        _print(f"warning: {message}", sys.stderr)


@cache
def warn_once(message: str) -> None:
    """Print a warning, unless this process has printed it before."""
    warn(message)


def error(message: str) -> None:
    """Print why this process ends, or what it could not do, whatever the verbosity."""
    _print(message, sys.stderr)


def answer(text: str) -> None:
    """Print the result of a command on standard output."""
    if _verbosity >= QUIET:
        _print(text, sys.stdout)


def _print(text: str, stream: TextIO | None) -> None:
    """Print to a stream, above the progress bars; nothing if it is closed, or None as without a console."""
    if stream is None or stream.closed:
        return
    text = _coloured(text, stream)
    try:
        if _bars is None:
            print(text, file=stream, flush=True)
        else:
            _bars.write(text, file=stream)
            stream.flush()
    except OSError as error:  # messages on a full disk, or on a terminal that was closed, end no training
        if stream is sys.stdout or isinstance(error, BrokenPipeError):
            raise


def _coloured(text: str, stream: TextIO) -> str:
    """Return a text as a stream shows it: on a terminal, `error:` and the like at the start of a line have a colour.

    Not if NO_COLOR is set (no-color.org), nor on Windows, whose older consoles print the codes as text.
    """
    if os.environ.get("NO_COLOR") or os.environ.get("TERM") == "dumb" or os.name == "nt" or not stream.isatty():
        return text
    return re.sub(
        rf"^({'|'.join(_COLOURS)}):", lambda found: f"{_COLOURS[found[1]]}{found[0]}\x1b[0m", text, flags=re.M
    )


def duration(seconds: float) -> str:
    """Return a duration in words: 42 s, 3:07 min, 2:05 h."""
    if seconds < 60:
        return f"{seconds:.0f} s" if seconds >= 10 else f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes}:{rest:02d} min" if minutes < 60 else f"{minutes // 60}:{minutes % 60:02d} h"


def progress(items: Iterable[T], total: int, what: str) -> Iterator[T]:
    """Show the progress of a loop: a bar with ETA on a terminal, otherwise a line every ten seconds.

    Parameters
    ----------
    items : iterable
        What the loop iterates over.
    total : int
        Number of items.
    what : str
        Name of the loop.
    """
    global _bars
    if _verbosity >= NORMAL and sys.stderr is not None and not sys.stderr.closed and sys.stderr.isatty():
        from tqdm import tqdm  # not needed by commands without a loop

        _bars = tqdm
        yield from tqdm(items, total=total, desc=what, leave=False)
        return
    start = last = time.monotonic()
    for done, item in enumerate(items, 1):
        yield item
        now = time.monotonic()
        if now - last >= _SECONDS_BETWEEN_LINES and done < total:
            info(f"{what}: {done}/{total}, {duration((now - start) / done * (total - done))} left")
            last = now
