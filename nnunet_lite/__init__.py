"""nnunet_lite: nnU-Net's self-configuring medical image segmentation, made lean.

    import nnunet_lite
    nnunet_lite.plan("Task04_Hippocampus")
    nnunet_lite.train("3d_fullres", 0, recipe="cpu")
    nnunet_lite.predict("in", "out")

The functions are those of the command `nnlite`, with the same names of options. A module is imported when its function
is used first.
"""

from __future__ import annotations

import signal
import sys


def _is_command() -> bool:
    """Whether this process is `nnlite` or `python -m nnunet_lite`."""
    started = sys.argv[0] if sys.argv else ""
    if started == "-m":  # Python has not found the module to run yet; it adds it to sys.argv later
        return "nnunet_lite" in sys.orig_argv[sys.orig_argv.index("-m") :][1:2]
    return started.replace("\\", "/").rpartition("/")[2] in ("nnlite", "nnlite.exe")


_IS_COMMAND = _is_command()
if _IS_COMMAND and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # until system.py handles it: Ctrl-C ends without a traceback

from importlib import import_module  # noqa: E402
from typing import TYPE_CHECKING, Any  # noqa: E402

from nnunet_lite import system  # noqa: E402
from nnunet_lite.errors import UserError  # noqa: E402

if _IS_COMMAND:  # first, so that signals are handled during the other imports
    system.start_as_command()

__version__ = "0.1.0"

if TYPE_CHECKING:
    from nnunet_lite.commands.audit import audit
    from nnunet_lite.commands.distill import distill
    from nnunet_lite.commands.evaluate import evaluate, view
    from nnunet_lite.commands.export import export_model, import_model
    from nnunet_lite.commands.init import init
    from nnunet_lite.commands.plan import check, plan, preprocess
    from nnunet_lite.commands.predict import predict
    from nnunet_lite.commands.run import run
    from nnunet_lite.commands.select import report, select
    from nnunet_lite.commands.train import train
    from nnunet_lite.errors import UserError
    from nnunet_lite.inference.predictor import load

__all__ = [
    "UserError", "audit", "check", "distill", "evaluate", "export_model", "import_model", "init", "load", "plan",
    "predict", "preprocess", "report", "run", "select", "train", "view",
]  # fmt: skip
_ELSEWHERE = {
    "check": "commands.plan", "preprocess": "commands.plan", "view": "commands.evaluate", "report": "commands.select",
    "export_model": "commands.export", "import_model": "commands.export", "load": "inference.predictor",
    "UserError": "errors",
}  # fmt: skip


def __getattr__(name: str) -> Any:
    """Import a function of the API when it is used first."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_ELSEWHERE.get(name, f'commands.{name}')}"), name)


def __dir__() -> list[str]:
    return [*(name for name in globals() if name.startswith("__")), *__all__]
