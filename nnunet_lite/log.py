"""Messages and progress on standard error; standard output contains only results, as text or as JSON."""

from __future__ import annotations

import os
import re
import shutil
import sys
import threading
import time
from collections.abc import Callable, Collection, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from typing import Any, TextIO, TypeVar

T = TypeVar("T")
R = TypeVar("R")

_SECONDS_BETWEEN_LINES = 9.5  # with a look once in half a second, no silence is longer than ten
_SECONDS_BETWEEN_SIGNS = 0.5

_COLOURS = {"error": "\x1b[31m", "failed": "\x1b[31m", "warning": "\x1b[33m"}  # red, red, yellow

# what is printed: nothing, results and warnings, messages as well, details as well
SILENT, QUIET, NORMAL, VERBOSE = -2, -1, 0, 1
_VERBOSITY = "_NNLITE_VERBOSITY"  # a variable of the environment: processes that this one starts print as much
_verbosity = int(os.environ.get(_VERBOSITY, NORMAL))
_start = time.monotonic()
_bars: Any = None  # tqdm, once a bar is shown
_works: list[_Work] = []  # from the outer to the inner one
_clock: threading.Thread | None = None
_printed = _start  # when the last message was


def set_verbosity(verbosity: int) -> None:
    """Choose what this process, and processes that it starts, print from now on: SILENT, QUIET, NORMAL or VERBOSE."""
    global _verbosity
    _verbosity = verbosity
    os.environ[_VERBOSITY] = str(verbosity)


def is_quiet() -> bool:
    """Whether only results, warnings and errors are printed."""
    return _verbosity <= QUIET


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
    global _printed
    text, _printed = _coloured(text, stream), time.monotonic()
    encoding = stream.encoding or "utf-8"  # which may lack letters of a name, or of our words
    text = text.encode(encoding, "backslashreplace").decode(encoding)
    try:
        if _bars is None:
            print(text + "\n", end="", file=stream, flush=True)  # one write: threads and forks print, too
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
    """Return a duration in words: 42 s, 3:07 min, 2:05 h, 15 days."""
    if seconds < 60:
        return f"{seconds:.0f} s" if seconds >= 10 else f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes >= 48 * 60:
        return f"{minutes / 1440:.2g} days" if minutes < 100 * 1440 else f"{minutes // 1440:,} days"
    return f"{minutes}:{rest:02d} min" if minutes < 60 else f"{minutes // 60}:{minutes % 60:02d} h"


# ------------------------------------------------------------------------------------------------------------ progress


def _forget_clock() -> None:
    """Let a forked process start a clock of its own: threads, and the works of its parent, stay behind."""
    global _clock
    _clock = None
    _works.clear()


if hasattr(os, "register_at_fork"):  # not on Windows
    os.register_at_fork(after_in_child=_forget_clock)


def progress(items: Iterable[T], total: int, what: str) -> Iterator[T]:
    """Show the progress of a loop, as `working` does.

    Parameters
    ----------
    items : iterable
        What the loop iterates over.
    total : int
        Number of items.
    what : str
        Name of the loop.
    """
    with working(what, total) as advance:
        for item in items:
            yield item
            advance(1)


def map_in_threads(function: Callable[[T], R], items: Collection[T], threads: int, what: str) -> list[R]:
    """Call a function for each item, in threads, and show the progress; return the results in the order of the items.

    Parameters
    ----------
    function : callable
        Takes an item.
    items : collection
        What it is called for.
    threads : int
        Number of calls at once.
    what : str
        Name of the work.
    """
    with ThreadPoolExecutor(threads, what) as pool:
        return list(progress(pool.map(function, items), len(items), what))


@contextmanager
def working(what: str, total: int | None = None, done: int = 0) -> Iterator[Callable[..., object]]:
    """Show what the block does: a bar with ETA on a terminal, otherwise a line after ten seconds without a message.

    Parameters
    ----------
    what : str
        Name of the work.
    total : int, optional
        Number of its parts, if there are some.
    done : int
        How many of them are done already.

    Yields
    ------
    callable
        To be called with the number of parts that are done, and a text that takes the place of their number.
    """
    global _bars, _clock
    if _verbosity < NORMAL or sys.stderr is None or sys.stderr.closed:
        yield lambda n_parts, text="": None
        return
    bar = None
    if sys.stderr.isatty():
        from tqdm import tqdm  # not needed by commands without a loop

        _bars = tqdm
        shown = None if total else "{desc} {elapsed}"
        columns, rows = shutil.get_terminal_size()  # not 0, for which tqdm draws nothing, where a terminal has no size
        bar = tqdm(
            desc=what, total=total, initial=done, leave=False, bar_format=shown, ncols=columns - 1, nrows=rows,
            delay=1 if _works else 0,  # an inner bar is drawn if it takes a while
        )  # fmt: skip
    if _clock is None:
        _clock = threading.Thread(target=_show_signs, daemon=True)
        _clock.start()
    work = _Work(what, total, done, done, time.monotonic(), bar)
    _works.append(work)
    try:
        yield work.advance
    finally:
        if work in _works:  # not in a process that was forked from this block
            _works.remove(work)
        if bar is not None:
            bar.close()


@dataclass(eq=False)
class _Work:
    """What is being worked on; `bar` is its bar on a terminal, a tqdm."""

    what: str
    total: int | None
    first: int
    done: int
    start: float
    bar: Any
    text: str = ""

    def advance(self, n_parts: int, text: str = "") -> None:
        self.done, self.text = self.done + n_parts, text
        if self.bar is not None:
            if text:
                self.bar.bar_format = f"{self.what} |{{bar}}| {text}"  # the bar is that of the epoch
            self.bar.update(n_parts)

    def __str__(self) -> str:
        if self.text:
            return f"{self.what}: {self.text}"
        seconds = time.monotonic() - self.start
        count = f"{self.done}/{self.total}, " if self.total else ""
        if self.total is None or self.done in (self.first, self.total):  # when all is done, the last part is written
            return f"{self.what}: {count}{duration(seconds)} so far"
        left = seconds / (self.done - self.first) * (self.total - self.done)
        return f"{self.what}: {count}{duration(left)} left"


def _show_signs() -> None:
    """Let the bars' clocks run on a terminal; otherwise print a line when nothing was printed for ten seconds."""
    while True:
        time.sleep(_SECONDS_BETWEEN_SIGNS)
        now, works = time.monotonic(), list(_works)
        for work in works:
            if work.bar is not None and now - work.start > 1:
                work.bar.refresh()
        if works and works[-1].bar is None and now - _printed >= _SECONDS_BETWEEN_LINES:
            info("; ".join(map(str, works)))
