"""The `nnlite` command: every function of commands/ as a subcommand.

`main` runs the command line and turns exceptions into exit codes. `command_of` makes a subcommand from a function: its
parameters are the options, and its result is printed as text or, with `--json`, as JSON. The module of the function,
and with it torch, is imported when the command runs: `--help`, completion and mistakes in options answer at once.
"""

from __future__ import annotations

import ast
import gc
import inspect
import json
import re
import shlex
import signal
import sys
import traceback
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from functools import partial
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, Union, get_args, get_origin, get_type_hints

import typer
from typer.core import TyperCommand, TyperGroup

from nnunet_lite import __version__, log, system
from nnunet_lite.commands import options
from nnunet_lite.commands.nnunet_options import refuse_command, translate_arguments
from nnunet_lite.errors import Lost, Stopped, UserError

# the subcommands, in the order of use: module and function in commands/, and how the function's docstring begins
COMMANDS = {
    "init": ("init.init", "Make a dataset of the files that you have, without copying them."),
    "check": ("plan.check", "Report every problem of a dataset at once."),
    "plan": ("plan.plan", "Check a dataset, take its fingerprint and plan its networks."),
    "preprocess": ("plan.preprocess", "Crop, normalise and resample a planned dataset."),
    "train": ("train.train", "Train a fold and score its held-out cases."),
    "predict": ("predict.predict", "Segment images with a trained model."),
    "evaluate": ("evaluate.evaluate", "Score label maps against references."),
    "select": ("select.select", "Compare trained models and pairs of them on the held-out cases."),
    "report": ("select.report", "Write an HTML page about the dataset, its plan, models and scores."),
    "audit": (
        "audit.audit",
        "Rank the training cases by how strongly held-out predictions contradict their label maps.",
    ),
    "run": ("run.run", "Check, plan, preprocess, train every fold, select and report."),
    "view": ("evaluate.view", "Look at images with reference and prediction in the browser."),
    "distill": ("distill.distill", "Train a small network that predicts as trained models do together."),
    "import": ("export.import_model", "Make a model folder of a zip or of a model that nnU-Net wrote."),
    "export": ("export.export_model", "Pack a model into one file, or write it for nnU-Net v2 or onnxruntime."),
    "info": ("info.show_info", "Describe a model, how it was made and how well it scores; or a planned dataset."),
    "list": ("inventory.list_workspace", "List the datasets of a workspace, their models, folds and scores."),
    "clean": ("inventory.clean", "Delete preprocessed cases and leftover temporary files, which can be made again."),
    "doctor": ("machines.doctor", "Describe this machine: versions, CPUs, memory, GPUs, disk."),
    "cluster": ("machines.cluster", "Start a Dask scheduler and workers."),
}
_IMPORT_TORCH = ("train", "distill", "run", "predict", "select", "report")  # see commands/early.py
_AS_JSON = Annotated[bool, options.output("--json", help="Print the result as JSON.")]
_QUIET = Annotated[bool, options.general("-q", "--quiet", help="Print only results, warnings and errors.")]
_VERBOSE = Annotated[bool, options.general("-v", "--verbose", help="Print times, all warnings and tracebacks.")]
_EXAMPLES = """\
nnlite run Task04_Hippocampus --recipe cpu
nnlite predict -i scan.nii.gz -o label.nii.gz"""
_HOME = re.compile(r"(?<![^=])~[/\\].*", re.DOTALL)  # shells leave the ~ in --output=~/x
_LICENCE = f"""\
nnunet_lite {__version__} is licensed under the Apache License 2.0 (http://www.apache.org/licenses/LICENSE-2.0).
With it come NiiVue (BSD-2-Clause) and, in tests/data of its repository, MRIs of the hippocampus from the Medical
Segmentation Decathlon (CC BY-SA 4.0).
The method is nnU-Net's. Cite its authors if you use it:
  Isensee F, Jaeger PF, Kohl SAA, Petersen J, Maier-Hein KH. nnU-Net: a self-configuring method for deep
  learning-based biomedical image segmentation. Nature Methods 18, 203-211 (2021). doi:10.1038/s41592-020-01008-z"""

_FRAMES = -8  # of a traceback with --verbose: the last ones, not those of typer

# an OSError of these kinds is a mistake of the user; any other one is a failure of the machine
_MISPLACED = (PermissionError, FileExistsError, NotADirectoryError, IsADirectoryError)


class Command(TyperCommand):
    """A subcommand: its help shows the options in panels, and examples."""

    def collect_usage_pieces(self, ctx: Any) -> list[str]:
        """Write required arguments without braces, and several in one without a second pair of brackets."""
        return [re.sub(r"^{(.*)}|^\[(\[.*\])\]\.\.\.", r"\1\2", piece) for piece in super().collect_usage_pieces(ctx)]

    def panels(self, ctx: Any) -> dict[str, list[tuple[str, str]]]:
        """Return names and help of the arguments and options in each panel."""
        panels: dict[str, list[tuple[str, str]]] = {}
        for parameter in self.get_params(ctx):
            if record := parameter.get_help_record(ctx):  # a hidden one has none
                names = re.sub(r"<list\[(\w+)\]>", lambda kind: f"<{kind[1].lower()}>", record[0])
                names = names.replace(" range>", ">")
                text = re.sub(r"\[default: \((.*?)\)", r"[default: \1", record[1])  # typer encloses descriptions
                text = re.sub(r"(\d+)<=x<=(\d+)", r"\1 to \2", text)
                text = re.sub(r"\bx>=(\d+)", r"at least \1", text)
                is_argument = parameter.param_type_name == "argument"
                panel = "Arguments" if is_argument else getattr(parameter, "rich_help_panel", None) or "General"
                panels.setdefault(panel, []).append((names, text))
        return {panel: panels[panel] for panel in sorted(panels, key=options.PANELS.index)}

    def format_options(self, ctx: Any, formatter: Any) -> None:
        for panel, rows in self.panels(ctx).items():
            with formatter.section(panel):
                formatter.write_dl(rows)

    def format_epilog(self, ctx: Any, formatter: Any) -> None:
        with formatter.section("Examples"):
            formatter.write("".join(f"  {line}\n" for line in str(self.epilog).splitlines()))


class CommandGroup(TyperGroup):
    """The subcommands; each is made when it is used."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.commands = dict.fromkeys(COMMANDS)  # type: ignore[assignment]  # typer suggests one of these names

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        return command_of(cmd_name) if cmd_name in COMMANDS else None

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        if args[0] not in COMMANDS and not ctx.resilient_parsing:
            refuse_command(args[0], args[1:])
        name, command, rest = super().resolve_command(ctx, args)
        return name, command, rest if ctx.resilient_parsing else translate_arguments(command, rest)

    def format_options(self, ctx: Any, formatter: Any) -> None:
        with formatter.section("Commands"):
            formatter.write_dl([(name, summary) for name, (_, summary) in COMMANDS.items()])
        Command.format_options(self, ctx, formatter)  # type: ignore[arg-type]

    panels, format_epilog = Command.panels, Command.format_epilog


app = typer.Typer(
    name="nnlite",
    cls=CommandGroup,
    help="Self-configuring medical image segmentation: plan, train, predict.",
    epilog=_EXAMPLES,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 120},
)


def main() -> None:
    """Run a command: exit code 0, 1 for a failure, 2 for a mistake of the user (one line, no traceback)."""
    try:
        system.raise_on_interrupt()
        warnings.showwarning = _show_warning
        arguments = [_HOME.sub(lambda found: str(system.expand_home(found[0])), word) for word in sys.argv[1:]]
        code = app(arguments or ["--help"], prog_name="nnlite", standalone_mode=False)
        if code == system.INTERRUPTED:  # typer keeps the KeyboardInterrupt to itself
            raise KeyboardInterrupt
        sys.exit(code)
    except UserError as error:
        sys.exit(_fail(f"error: {error}", 2))
    except Lost as lost:
        sys.exit(_fail(f"error: {lost}.", 1))
    except Stopped as stopped:
        sys.exit(_fail(str(stopped), 128 + stopped.number))
    except (KeyboardInterrupt, typer.Abort):
        sys.exit(_fail(f"stopped; {system.how_to_resume()}", system.INTERRUPTED))
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
        if system.interrupted:  # a library made another exception of it
            sys.exit(_fail(f"stopped; {system.how_to_resume()}", system.INTERRUPTED))
        if not hasattr(error, "format_message"):
            raise
        command = getattr(getattr(error, "ctx", None), "command_path", "nnlite")
        text = error.format_message().replace("Value error, ", "")  # of pydantic
        text = re.sub("Input should be a valid integer,.*", "a whole number is needed, without a unit", text)
        text = re.sub("Input should be a valid number,.*", "a number is needed, without a unit", text)
        sys.exit(_fail(f"error: {text.rstrip('.?')}. See `{command} --help`.", 2))


def command_of(name: str) -> Any:
    """Make a subcommand of its function in commands/, whose parameters are annotated with typer's options.

    Its help is the beginning of the docstring, with the examples at its end. Its result is the path of a written file,
    or has `to_text()`; it may have `to_json()`, `exit_code`, and `finish()`, which is called at the end. A result with
    `wait()` and `close()` is a service, which runs until Ctrl-C. A function after_NAME next to it returns commands to
    type next.

    Parameters
    ----------
    name : str
        Of the subcommand.
    """
    path, function_name = COMMANDS[name][0].split(".")
    module = f"nnunet_lite.commands.{path}"

    def run(as_json: bool, quiet: bool, verbose: bool, **arguments: Any) -> None:
        _set_verbosity(quiet, verbose)
        arguments = {key: value for key, value in arguments.items() if value != []}  # an empty list: default
        commands_module = result = None
        if name in _IMPORT_TORCH:
            result = import_module("nnunet_lite.commands.early").answer_early(name, arguments)
        if result is None:
            with log.working(f"starting {name}"):  # most commands need torch, which takes seconds to load
                gc.disable()
                commands_module = import_module(module)
                gc.freeze()  # no collection looks at what libraries are made of, which stays
                gc.enable()
            result = getattr(commands_module, function_name)(**arguments)
        text = _as_json(result) if as_json else _as_text(result)
        if hasattr(result, "close"):
            _serve(result, text)
        else:
            log.answer(text)
        follow = getattr(commands_module, f"after_{function_name}", None)
        if follow is not None and (commands := follow(result, **arguments)):
            log.info(f"next: {'; or '.join(map(shlex.join, commands))}")
        log.detail("done")
        if hasattr(result, "finish"):
            result.finish()
        raise typer.Exit(getattr(result, "exit_code", 0))

    declared = _declaration(module, function_name)
    hints = get_type_hints(declared, include_extras=True)
    given = inspect.signature(declared).parameters.values()
    parameters = [one for one in given if get_origin(hints[one.name]) is Annotated]  # others are for Python alone
    for added, hint in {"as_json": _AS_JSON, "quiet": _QUIET, "verbose": _VERBOSE}.items():
        hints[added] = hint
        parameters.append(inspect.Parameter(added, inspect.Parameter.KEYWORD_ONLY, default=False))
    kinds = {parameter.name: _command_line_type(hints[parameter.name]) for parameter in parameters}
    run.__annotations__ = kinds
    run.__signature__ = inspect.Signature(  # type: ignore[attr-defined]
        [parameter.replace(annotation=kinds[parameter.name], kind=parameter.KEYWORD_ONLY) for parameter in parameters]
    )
    single = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)
    text = str(inspect.getdoc(declared))
    examples = text.partition("\nExamples\n--------\n")[2]
    single.command(name, cls=Command, help=text.partition("\n\n")[0], epilog=examples)(run)
    command = typer.main.get_command(single)
    for argument in command.params:
        if argument.param_type_name == "argument":
            argument.metavar = argument.metavar or str(argument.name).upper()
    return command


def _declaration(module: str, name: str) -> Callable[..., Any]:
    """Return a function of a module without its body, and without the imports that its parameters do not need.

    So `nnlite train --help`, a mistake in an option and the completion of a shell wait for no import of torch.
    """
    spec: Any = find_spec(module)
    statements = ast.parse(spec.loader.get_source(module)).body
    declared = next(one for one in statements if isinstance(one, ast.FunctionDef) and one.name == name)
    declared.body, declared.returns = declared.body[:1], None  # the docstring
    needed = {one.id for one in ast.walk(declared.args) if isinstance(one, ast.Name)}
    imports = (one for one in statements if isinstance(one, ast.ImportFrom | ast.Import))
    kept = [one for one in imports if needed & {alias.asname or alias.name for alias in one.names}]
    names: dict[str, Any] = {}
    exec(compile(ast.Module([*kept, declared], []), spec.origin, "exec"), names)
    return names[name]


def _set_verbosity(quiet: bool, verbose: bool) -> None:
    """Do what --quiet and --verbose say, which stand before or after the name of the subcommand."""
    if quiet or verbose:
        log.set_verbosity(verbose - quiet)
        warnings.simplefilter("default" if verbose else "ignore")  # those of libraries


def _show_warning(message: Any, category: Any, filename: str, lineno: int, *_: Any, **__: Any) -> None:
    """Print a warning of a library as ours, in one line."""
    log.warn(f"{' '.join(str(message).split())} ({category.__name__}, {filename}:{lineno})")


def _serve(service: Any, text: str) -> None:
    """Print what a service says, and keep it running until Ctrl-C or SIGTERM."""
    for number in (signal.SIGINT, signal.SIGTERM):  # a shell starts background jobs with SIGINT ignored
        signal.signal(number, signal.default_int_handler)
    try:
        log.answer(text)
        service.wait()
    except KeyboardInterrupt:
        log.info("closed")
    finally:
        service.close()


def _command_line_type(hint: Any) -> Any:
    """Return the type that the command line gives for the type of a parameter: the most general of a union."""
    kind, *option = get_args(hint) if get_origin(hint) is Annotated else (hint,)
    is_union = get_origin(kind) in (Union, UnionType)
    kinds = [one for one in (get_args(kind) if is_union else (kind,)) if one is not NoneType]
    lists = {get_origin(one): get_args(one)[0] for one in kinds if get_origin(one) in (Sequence, Mapping)}
    shown: Any = next((one for one in (Path, str) if one in kinds), kinds[0])
    if lists and not (option and option[0].parser is str):  # such as 40x56x40, one text
        shown = list[_command_line_type(next(iter(lists.values())))]  # type: ignore[misc]
    return Annotated[shown | None if NoneType in get_args(kind) else shown, *option] if option else shown


def _as_text(result: Any) -> str:
    """Return a result as text: a path, with --quiet in a line if it has one, otherwise by its own `to_text`."""
    brief = getattr(result, "brief", "") if log.is_quiet() else ""
    return str(result) if isinstance(result, Path) else brief or str(result.to_text())


def _as_json(result: Any) -> str:
    """Return a result as JSON text: a path, by its own `to_json`, or the fields of a dataclass."""
    if isinstance(result, Path):
        return json.dumps({"path": str(result)})
    value = result.to_json() if hasattr(result, "to_json") else asdict(result)
    return value if isinstance(value, str) else json.dumps(value, indent=1, default=_value_as_json)


def _value_as_json(value: Any) -> Any:
    """Return a value inside a result that JSON has no type for: by its own `to_json`, or a path as text."""
    return value.to_json() if hasattr(value, "to_json") else str(value)


def _fail(message: str, code: int) -> int:
    log.detail(traceback.format_exc(limit=_FRAMES).rstrip())
    log.error(message)
    return code


def _print_and_exit(option: typer.CallbackParam, given: bool) -> None:
    if given:
        log.answer(_LICENCE if option.name == "licence" else __version__)
        raise typer.Exit


_about = partial(options.general, callback=_print_and_exit, is_eager=True)


@app.callback()
def _options(
    quiet: _QUIET = False,
    verbose: _VERBOSE = False,
    version: Annotated[bool, _about("--version", help="Print the version.")] = False,
    licence: Annotated[bool, _about("--license", "--licence", help="Print licences and whom to cite.")] = False,
) -> None:
    """Self-configuring medical image segmentation: plan, train, predict."""
    _set_verbosity(quiet, verbose)
