"""Options that several commands share, as types of their parameters."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from nnunet_lite.errors import UserError

if TYPE_CHECKING:
    from nnunet_lite.cluster import Cluster


# Panels of `--help`, in the order in which it shows them. `options.length(help=...)` declares an option of the panel
# Length, as `typer.Option` does without a panel.
data = partial(typer.Option, rich_help_panel="Data")
model = partial(typer.Option, rich_help_panel="Model")
setting = partial(typer.Option, rich_help_panel="Settings")
length = partial(typer.Option, rich_help_panel="Length")
hardware = partial(typer.Option, rich_help_panel="Hardware")
resuming = partial(typer.Option, rich_help_panel="Resuming")
output = partial(typer.Option, rich_help_panel="Output")
nnunet = partial(typer.Option, rich_help_panel="nnU-Net")
general = partial(typer.Option, rich_help_panel="General")
PANELS = ("Arguments", "Data", "Model", "Settings", "Length", "Hardware", "Resuming", "Output", "nnU-Net", "General")


def _setting(text: str) -> tuple[str, str]:
    """Return key and value of a setting on the command line."""
    key, equals, value = text.partition("=")
    if not equals:
        raise UserError(f"--set {text!r} is not key=value")
    return key.strip(), value.strip()


Workspace = Annotated[
    str | Path | None,
    general("-w", "--workspace", help="Folder of all files.", show_default="$NNLITE_WORKSPACE or ./nnlite_workspace"),
]
DatasetName = Annotated[
    str | None,
    data(
        "-d",
        "--dataset",
        help="Planned dataset, or its number.",
        show_default="the only one, or where a command only reads, the one planned last",
    ),
]
OnlyDataset = Annotated[str | None, data("-d", "--dataset", help="Only this dataset, a name or number.")]
Device = Annotated[str | None, hardware(help="cpu, cuda, cuda:1.", show_default="a GPU if there is one")]
Workers = Annotated[
    int | None, hardware(min=0, help="Threads; 0: only the main thread.", show_default="as fits the machine")
]
ComparedModels = Annotated[
    str | Sequence[str] | None,
    model("-c", "--configuration", help="2d, 3d_fullres, ..., or a model's name; may be repeated.", show_default="all"),
]
Callbacks = Sequence[Callable[[dict[str, Any]], Any]]  # from Python alone
Recipe = Annotated[str, setting(help="Name of a recipe, or a TOML file.")]
SettingOverrides = Annotated[
    Mapping[str, Any] | None,
    setting("--set", parser=_setting, metavar="KEY=VALUE", help="Any setting; may be repeated."),
]
Scheduler = Annotated[
    str | None, hardware(metavar="ADDRESS", help="Dask scheduler whose workers do it: tcp://host:8786, or its file.")
]
WhichCheckpoint = Annotated[
    Literal["final", "best"],
    nnunet("-chk", "--checkpoint", help="Weights of nnU-Net's models: of the last epoch, or of the best."),
]
TrustCode = Annotated[
    bool, model("--trust-code", help="Run code that the model names, although it is not in your workspace.")
]
Precision = Annotated[str | None, hardware(help="auto, fp32, bf16 or fp16.", show_default="the recipe's")]
Seed = Annotated[int | None, setting(help="Random seed; makes two runs identical on the CPU.")]
TimeLimit = Annotated[
    str | float | None,
    length(help="Length of a fold, such as 8h, 90m or 20s (plain: minutes); the schedule fits itself to it."),
]
PatchSize = Annotated[
    str | Sequence[int] | None,
    setting(parser=str, metavar="SIZE", help="Patch in voxels, such as 40x56x40, instead of the planned one."),
]
ModelName = Annotated[str | None, output(help="Name of the model folder.", show_default="CONFIGURATION-RECIPE")]
AcceptGeometry = Annotated[
    bool, data("--accept-geometry", help="Take files of a case by their voxels if origin or direction differ.")
]
Exclude = Annotated[str | Sequence[str] | None, data(metavar="CASE", help="Leave out this case; may be repeated.")]
Accept = Annotated[
    str | Sequence[str] | None,
    data(metavar="KIND", help="Accept problems of this kind, as check names them; may be repeated."),
]
Folds = Annotated[int | None, data("--folds", min=2, metavar="N", help="Number of folds.", show_default="5")]
GroupBy = Annotated[
    str | Path | None,
    data(metavar="REGEX|CSV", help="Cases of a group, such as a patient, are never on both sides of a fold."),
]
Stratify = Annotated[bool, data("--stratify", help="Folds with equal shares of labels and their volumes.")]
StratifyBy = Annotated[
    str | Path | None, data(metavar="CSV", help="Folds with equal shares of strata: columns case, stratum.")
]
Splits = Annotated[
    str | Path | None, data(help="Folds to use: splits.json, splits_final.json or a CSV with columns case, fold.")
]


@dataclass(frozen=True)
class About:
    """A description.

    Parameters
    ----------
    values : dict
        Its values, which `--json` prints.
    text : str
        The same for people.
    exit_code : int
        Of the command.
    brief : str
        What `--quiet` prints instead of the text.
    """

    values: dict[str, Any]
    text: str
    exit_code: int = 0
    brief: str = ""

    def to_json(self) -> dict[str, Any]:
        return self.values

    def to_text(self) -> str:
        return self.text

    __repr__ = to_text


def patch_of(size: str | Sequence[int] | None) -> tuple[int, ...] | None:
    """Return a patch size such as "40x56x40" or (40, 56, 40) as a tuple of numbers of voxels; None stays None.

    Raises
    ------
    UserError
        The text is not a list of whole numbers.
    """
    if not isinstance(size, str):
        return None if size is None else tuple(size)
    try:
        return tuple(int(part) for part in size.replace("x", " ").replace(",", " ").split())
    except ValueError:
        what = f"--patch-size {size!r} is not a list of whole numbers"
        raise UserError(what, fix="Write 40x56x40 or 40,56,40.") from None


def where(dataset: str | None, workspace: str | Path | None) -> list[str]:
    """Return the options with which a call named its dataset and workspace."""
    return [*([] if dataset is None else ["-d", dataset]), *([] if workspace is None else ["-w", str(workspace)])]


def list_of(value: Any) -> list[Any]:
    """Return one value, several, or None for none as a list."""
    if value is None:
        return []
    return list(value) if isinstance(value, Iterable) and not isinstance(value, str) else [value]


def names_of(value: object) -> list[str] | None:
    """Return names that are given one by one, or several in a text with commas; None if there is no name."""
    return [name.strip() for item in list_of(value) for name in str(item).split(",") if name.strip()] or None


def overrides_of(settings: Mapping[str, Any] | None, **options: Any) -> dict[str, Any]:
    """Return the settings that a call changes: those of its own options, and those of `--set`.

    Parameters
    ----------
    settings : mapping or None
        Key of a setting, such as "training.epochs", to its value. The command line gives a list of pairs.
    **options : Any
        Name of a setting with two underscores for its dot, such as training__epochs. None is left out.

    Raises
    ------
    UserError
        An option and `--set` give a setting two values, or one of these is illegal.
    """
    given = {key.replace("__", "."): value for key, value in options.items() if value is not None}
    changed = dict(settings or {})
    for key in given.keys() & changed.keys():
        from nnunet_lite.settings import Settings, with_changes  # pydantic, which `nnlite --help` need not load

        if with_changes(Settings(), {key: given[key]}) != with_changes(Settings(), {key: changed[key]}):
            option = f"--{key.partition('.')[2].replace('_', '-')}"
            what = f"{option} is {given[key]}, and --set {key}={changed[key]} is another value of the same setting"
            raise UserError(what, fix="Give one of the two.")
    return {**given, **changed}


def strata_of(stratify: bool, stratify_by: str | Path | None) -> bool | str | Path:
    """Return what `FoldRule` takes of these two options.

    Raises
    ------
    UserError
        Both are given.
    """
    if stratify and stratify_by is not None:
        raise UserError("--stratify and --stratify-by are two ways to divide the cases", fix="Give one of the two.")
    return stratify_by or stratify


def sets_length(changed: Mapping[str, Any]) -> bool:
    """Whether a call changes the length of a run; without that, a finished one stays finished."""
    return not changed.keys().isdisjoint(("training.epochs", "training.time_limit"))


@contextmanager
def cluster_of(scheduler: str | None, workspace: Path) -> Iterator[Cluster | None]:
    """Connect to the workers of a Dask scheduler; without a scheduler, give None.

    Parameters
    ----------
    scheduler : str, optional
        Address of the scheduler, or its file.
    workspace : Path
        A folder that the workers must see.

    Raises
    ------
    UserError
        The packages for it are not installed, or the scheduler or its workers cannot be used.
    """
    if scheduler is None:
        yield None
        return
    from nnunet_lite.cluster import connect  # an optional extra

    with connect(scheduler, workspace) as cluster:
        yield cluster
