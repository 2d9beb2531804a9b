"""What a person sees: messages and progress, on standard error; standard output is left to results and --json."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable, Iterator
from typing import Any, TextIO, TypeVar

T = TypeVar("T")

_SECONDS_BETWEEN_LINES = 10.0

_quiet = False
_bars: Any = None  # the class of the bars, once one is shown


def be_quiet() -> None:
    """Say nothing from here on: of the processes that train together only the first one speaks."""
    global _quiet
    _quiet = True


def last(message: str) -> None:
    """What this process ends of: a silent one says it too."""
    _print(message, sys.stderr)


def info(message: str) -> None:
    if not _quiet:
        _print(message, sys.stderr)


def answer(text: str) -> None:
    """The result of a command, on standard output."""
    if not _quiet:
        _print(text, sys.stdout)


def _print(text: str, stream: TextIO | None) -> None:
    """Print to a stream, above the bars that are shown; nothing where it is closed or None, as without a console."""
    if stream is None or stream.closed:
        return
    if _bars is None:
        print(text, file=stream, flush=True)
    else:
        _bars.write(text, file=stream)
        stream.flush()


def warn(message: str) -> None:
    info(f"warning: {message}")


def duration(seconds: float) -> str:
    """A time as a person says it: 42 s, 3:07 min, 2:05 h."""
    if seconds < 60:
        return f"{seconds:.0f} s" if seconds >= 10 else f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes}:{rest:02d} min" if minutes < 60 else f"{minutes // 60}:{minutes % 60:02d} h"


def progress(items: Iterable[T], total: int, what: str) -> Iterator[T]:
    """Show how far a loop has come: a bar with ETA on a terminal, a line every ten seconds elsewhere."""
    global _bars
    if not _quiet and sys.stderr is not None and not sys.stderr.closed and sys.stderr.isatty():
        from tqdm import tqdm

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
