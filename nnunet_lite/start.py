"""What the command does before anything else is imported: it opens closed standard streams, and ends quietly by Ctrl-C.

`nnunet_lite/__init__.py` imports it first. A program that uses nnunet_lite as a library keeps its streams
and signals.
"""

from __future__ import annotations

import os
import signal
import sys

INTERRUPTED = 130  # the exit code that shells give a process that SIGINT ended


def _prepare() -> None:
    """Prepare this process if it is `nnlite` or `python -m nnunet_lite`; else do nothing."""
    if _is_command():
        _open_streams()
        if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # in the background it may be ignored
            signal.signal(signal.SIGINT, _stop_at_once)


def interruptible() -> None:
    """Raise KeyboardInterrupt again by Ctrl-C: there is somebody now who catches it."""
    if signal.getsignal(signal.SIGINT) is _stop_at_once:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def _is_command() -> bool:
    started = sys.argv[0] if sys.argv else ""
    if started == "-m":  # Python is looking for the module to run, which is not in sys.argv yet
        return "nnunet_lite" in sys.orig_argv[sys.orig_argv.index("-m") :][1:2]
    return started.rpartition("/")[2] == "nnlite"


def _stop_at_once(number: int, frame: object) -> None:
    os.write(2, b"stopped\n")
    os._exit(INTERRUPTED)


def _open_streams() -> None:
    """Open /dev/null for each of the streams 0 to 2 that is closed: else the next file that is opened becomes one."""
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # the lowest free number
            setattr(sys, name, open(number, "w" if number else "r", closefd=False))  # noqa: SIM115


_prepare()
