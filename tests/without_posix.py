"""Import every module and run commands of `nnlite` without the parts of Python that macOS or Windows lack.

    python tests/without_posix.py check DATA then plan DATA

What packages other than ours need of them on Linux is kept: they have their own code for each system. So they may be
imported already, as in the processes of samples.py.
"""

import builtins
import importlib
import multiprocessing
import os
import pkgutil
import signal
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

PACKAGE = str(Path(__file__).parents[1] / "nnunet_lite")
MODULES = ("fcntl", "grp", "pwd", "resource", "termios", "tty", "syslog")
FUNCTIONS = (
    *("sched_getaffinity", "sched_setaffinity", "posix_fallocate", "posix_fadvise", "fork", "forkpty", "killpg"),
    *("getuid", "geteuid", "getgid", "getpgid", "setsid", "uname", "link", "symlink", "mkfifo", "statvfs", "sysconf"),
    *("getloadavg", "chown", "pread", "pwrite", "sendfile", "wait", "WIFEXITED", "register_at_fork", "O_NOFOLLOW"),
)
SIGNALS = ("SIGHUP", "SIGQUIT", "SIGUSR1", "SIGUSR2", "SIGALRM", "SIGCHLD", "SIGPIPE", "SIGKILL")


def is_ours() -> bool:
    """Whether our code, not another package, made the call that is refused; pathlib and os work for both."""
    frame = sys._getframe(2)
    while frame.f_back and ("pathlib" in frame.f_code.co_filename or "<frozen" in frame.f_code.co_filename):
        frame = frame.f_back
    return frame.f_code.co_filename.startswith(PACKAGE)


def without(module: ModuleType, names: tuple[str, ...]) -> None:
    """Take functions and constants from a module, as far as our code can see."""
    kept = {name: vars(module).pop(name) for name in names}

    def find(name: str) -> object:
        if name not in kept or is_ours():
            raise AttributeError(f"module {module.__name__!r} has no attribute {name!r}", name=name, obj=module)
        return kept[name]

    vars(module)["__getattr__"] = find


def refuse(event: str, arguments: tuple[object, ...]) -> None:
    """Refuse /proc and /sys to our code."""
    if event == "open" and str(arguments[0]).startswith(("/proc", "/sys")) and is_ours():
        raise FileNotFoundError(2, "No such file or directory", arguments[0])


def import_others(name: str, globals: dict[str, Any] | None = None, *more: Any, **named: Any) -> object:
    """Import, but from our code, and where locks are made, no module that other systems lack."""
    if name in MODULES and str((globals or {}).get("__name__")).startswith(("nnunet_lite", "filelock")):
        raise ModuleNotFoundError(f"No module named {name!r}", name=name)
    return import_all(name, globals, *more, **named)


import_all, builtins.__import__ = builtins.__import__, import_others
without(os, FUNCTIONS)
without(signal, SIGNALS)
multiprocessing.set_start_method("spawn", force=True)
sys.addaudithook(refuse)
commands = " ".join(sys.argv[1:]).split(" then ")
sys.argv = ["nnlite"]
for name in [name for name in sys.modules if name.partition(".")[0] in ("nnunet_lite", "filelock")]:
    del sys.modules[name]
for module in pkgutil.walk_packages([PACKAGE], "nnunet_lite."):
    if not module.name.endswith("__main__"):
        importlib.import_module(module.name)
for command in commands:
    sys.argv[1:] = command.split()
    try:
        importlib.import_module("nnunet_lite.cli").main()
    except SystemExit as end:
        if end.code and (command, end.code) != ("doctor", 1):  # 1: this machine has a problem
            raise
