"""What the command does before anything else is imported: closed standard streams, and the signals that end it.

`nnunet_lite/__init__.py` imports this first. A program that uses nnunet_lite as a library keeps its
streams and signals.
"""

from __future__ import annotations

import os
import shutil
import signal
import sys
from pathlib import Path

INTERRUPTED = 130  # the exit code that shells give a process that SIGINT ended
RESUME = "the same command resumes from here (predict: with --continue)"

unfinished: set[Path] = set()  # the temporary files and folders of this process, see files.py
interrupted = False  # whether SIGINT came: what it interrupts may raise something else than KeyboardInterrupt


def interruptible() -> None:
    """From now on raise KeyboardInterrupt by SIGINT: the caller catches it."""
    if signal.getsignal(signal.SIGINT) is _stop_at_once:
        signal.signal(signal.SIGINT, _interrupt)
        sys.unraisablehook = _unraisable


def _prepare() -> None:
    """Prepare this process if it is `nnlite` or `python -m nnunet_lite`; else do nothing."""
    if IS_COMMAND:
        _open_streams()
        usual = (signal.default_int_handler, signal.SIG_DFL)  # in the background, and by nohup, signals are ignored
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            if signal.getsignal(number) in usual:
                signal.signal(number, _stop_at_once)


def _is_command() -> bool:
    """Whether this process is `nnlite` or `python -m nnunet_lite`."""
    started = sys.argv[0] if sys.argv else ""
    if started == "-m":  # Python is looking for the module to run, which is not in sys.argv yet
        return "nnunet_lite" in sys.orig_argv[sys.orig_argv.index("-m") :][1:2]
    return started.rpartition("/")[2] == "nnlite"


def _stop_at_once(number: int, frame: object) -> None:
    """End this process wherever it is, in imports or in a loop that catches exceptions; nothing temporary stays."""
    for path in list(unfinished):
        shutil.rmtree(path, ignore_errors=True) if path.is_dir() else path.unlink(missing_ok=True)
    try:
        os.write(2, f"stopped by {signal.Signals(number).name}; {RESUME}\n".encode())
    finally:  # the terminal may be gone
        os._exit(128 + number)


def _interrupt(number: int, frame: object) -> None:
    global interrupted
    interrupted = True
    raise KeyboardInterrupt


def _unraisable(lost: sys.UnraisableHookArgs) -> None:
    """Stop where Python would only report a KeyboardInterrupt, in a destructor or a callback, and continue."""
    if lost.exc_type is KeyboardInterrupt:
        _stop_at_once(signal.SIGINT, None)
    sys.__unraisablehook__(lost)


def _open_streams() -> None:
    """Open /dev/null for each of the streams 0 to 2 that is closed: else the next file that is opened becomes one."""
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # the lowest free number
            setattr(sys, name, open(number, "w" if number else "r", closefd=False))  # noqa: SIM115


IS_COMMAND = _is_command()  # otherwise a program that uses nnunet_lite as a library
_prepare()
