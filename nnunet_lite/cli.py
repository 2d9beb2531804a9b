"""The `nnlite` command: one thin function per command, in commands/; the steps themselves are in api.py.

Everything heavy is imported inside the functions, so that `nnlite --help` answers at once.
"""

from __future__ import annotations

import sys
from itertools import pairwise
from typing import Annotated

import typer

from nnunet_lite import __version__, log, start
from nnunet_lite.commands import data, prediction, results, training, workflow
from nnunet_lite.errors import Lost, Stopped, UserError

app = typer.Typer(
    name="nnlite",
    help="Self-configuring medical image segmentation: plan, train, predict.",
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)


# what an OSError of these kinds says is the user's mistake; any other one is a failure of the machine
_MISPLACED = (PermissionError, FileExistsError, NotADirectoryError, IsADirectoryError)


def main() -> None:
    """Run a command: exit code 0, 1 for a failure, 2 for a mistake of the user's (one line, no traceback)."""
    try:
        start.interruptible()
        code = app(_spelled_out(sys.argv[1:]) or ["--help"], prog_name="nnlite", standalone_mode=False)
        if code == start.INTERRUPTED:  # typer keeps the KeyboardInterrupt to itself
            raise KeyboardInterrupt
        sys.exit(code)
    except UserError as error:
        sys.exit(_fail(f"error: {error}", 2))
    except Lost as lost:
        sys.exit(_fail(f"error: {lost}.", 1))
    except Stopped as stopped:
        sys.exit(_fail(str(stopped), 128 + stopped.number))
    except (KeyboardInterrupt, typer.Abort):
        sys.exit(_fail(f"stopped; {start.RESUME}", start.INTERRUPTED))
    except BrokenPipeError:
        if sys.stderr is not None:
            sys.stderr.close()  # the reader of our output is gone
        sys.exit(1)
    except OSError as error:
        sys.exit(
            _fail(f"error: {error.filename or 'system'}: {error.strerror or error}.", 1 + isinstance(error, _MISPLACED))
        )
    except Exception as error:
        # typer's complaints about options come from its own copy of click, whose classes have no public name
        if start.interrupted:  # a library made another exception of it
            sys.exit(_fail(f"stopped; {start.RESUME}", start.INTERRUPTED))
        if not hasattr(error, "format_message"):
            raise
        command = getattr(getattr(error, "ctx", None), "command_path", "nnlite")
        sys.exit(_fail(f"error: {error.format_message().rstrip('.?')}. See `{command} --help`.", 2))


def _spelled_out(arguments: list[str]) -> list[str]:
    """`--save-probabilities` without labels means all of them; typer knows no optional values."""
    out = []
    for argument, after in pairwise([*arguments, "-"]):
        out += [argument, "all"] if argument == prediction.PROBABILITIES and after.startswith("-") else [argument]
    return out


def _fail(message: str, code: int) -> int:
    log.last(message)
    return code


def _version(asked: bool) -> None:
    if asked:
        print(__version__)
        raise typer.Exit


@app.callback()
def _options(version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True)] = False) -> None:
    """Self-configuring medical image segmentation: plan, train, predict."""


for command in (
    data.check, data.plan, data.preprocess, training.train, prediction.predict, results.evaluate, results.select,
    results.report, workflow.run, results.view, prediction.import_, prediction.export, results.info, results.doctor,
    workflow.cluster,
):  # fmt: skip
    app.command(command.__name__.rstrip("_"))(command)
