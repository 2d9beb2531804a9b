"""Messages and progress on standard error; standard output contains only results, as text or as JSON."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable, Iterator
from typing import Any, TextIO, TypeVar

T = TypeVar("T")

_SECONDS_BETWEEN_LINES = 10.0

_quiet = False
_bars: Any = None  # tqdm, once a bar is shown


def be_quiet() -> None:
    """Print no more messages: of the processes that train together only the first one prints."""
    global _quiet
    _quiet = True


def info(message: str) -> None:
    """Print a message, unless this process is quiet."""
    if not _quiet:
        _print(message, sys.stderr)


def warn(message: str) -> None:
    """Print a warning, unless this process is quiet."""
    info(f"warning: {message}")


def last(message: str) -> None:
    """Print the reason why this process ends, even if it is quiet."""
    _print(message, sys.stderr)


def answer(text: str) -> None:
    """Print the result of a command on standard output, unless this process is quiet."""
    if not _quiet:
        _print(text, sys.stdout)


def _print(text: str, stream: TextIO | None) -> None:
    """Print to a stream, above the progress bars; nothing if it is closed, or None as without a console."""
    if stream is None or stream.closed:
        return
    try:
        if _bars is None:
            print(text, file=stream, flush=True)
        else:
            _bars.write(text, file=stream)
            stream.flush()
    except OSError as error:  # messages on a full disk, or on a terminal that was closed, end no training
        if stream is sys.stdout or isinstance(error, BrokenPipeError):
            raise


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
    if not _quiet and sys.stderr is not None and not sys.stderr.closed and sys.stderr.isatty():
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
