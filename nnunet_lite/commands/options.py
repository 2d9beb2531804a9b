"""Options that several commands have, and how what is typed becomes what the API takes."""

from __future__ import annotations

import json
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

from nnunet_lite import log
from nnunet_lite.errors import UserError

Workspace = Annotated[
    Path | None,
    typer.Option("-w", "--workspace", help="Folder that holds everything [$NNLITE_WORKSPACE or ./nnlite_workspace]."),
]
Dataset = Annotated[str | None, typer.Option("-d", "--dataset", help="Planned dataset [the only one].")]
AsJson = Annotated[bool, typer.Option("--json", help="Print the result as JSON.")]
Device = Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1 [a GPU if there is one].")]
Workers = Annotated[int | None, typer.Option(min=0, help="Threads; 0: none, everything in line [as fits the machine].")]
SetOptions = Annotated[
    list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Any setting; may be repeated.")
]
Scheduler = Annotated[
    str | None,
    typer.Option(metavar="ADDRESS", help="Dask scheduler whose workers do it: tcp://host:8786, or its file."),
]


class Epoch(StrEnum):
    final = "final"
    best = "best"


Checkpoint = Annotated[
    Epoch, typer.Option("-chk", "--checkpoint", help="Of nnU-Net's models: of the last epoch, or of the best.")
]
TrustCode = Annotated[
    bool, typer.Option("--trust-code", help="Run code that the model names, though it is not of your workspace.")
]
Precision = Annotated[str | None, typer.Option(help="auto, fp32, bf16 or fp16.")]
Folds = Annotated[int | None, typer.Option("--folds", min=2, metavar="N", help="Number of folds [5].")]
GroupBy = Annotated[
    str | None,
    typer.Option(metavar="REGEX|CSV", help="Cases of a group, such as a patient, are never on both sides of a fold."),
]
Stratify = Annotated[bool, typer.Option("--stratify", help="Folds alike in which labels occur, and their volume.")]
StratifyBy = Annotated[Path | None, typer.Option(metavar="CSV", help="Folds alike in this: columns case, stratum.")]
AcceptGeometry = Annotated[
    bool,
    typer.Option("--accept-geometry", help="Take files of a case by their voxels if origin or direction differ."),
]
Splits = Annotated[
    Path | None, typer.Option(help="Folds to use: splits.json, splits_final.json or a CSV with columns case, fold.")
]


def show(result: Any, text: str, as_json: bool) -> None:
    log.answer(json.dumps(result, indent=1) if as_json else text)


def only_one(argument: Path | None, option: Path | None) -> Path | None:
    """A model, which may be given as an argument or with -m.

    Raises
    ------
    UserError : it is given twice.
    """
    if argument is not None and option is not None:
        raise UserError(f"two models are given: {argument} and, with -m, {option}", fix="Give one of them.")
    return option if argument is None else argument


def changes_of(given: dict[str, Any], assignments: list[str] | None) -> dict[str, Any]:
    """Flags that were set, then --set key=value, as changes of settings."""
    changes = {key: value for key, value in given.items() if value is not None}
    for assignment in assignments or []:
        key, equals, value = assignment.partition("=")
        if not equals:
            raise UserError(f"--set {assignment!r} is not key=value")
        changes[key.strip()] = value.strip()
    return changes


def numbers_of(text: str, what: str) -> tuple[int, ...]:
    try:
        return tuple(int(part) for part in text.replace("x", " ").replace(",", " ").split())
    except ValueError:
        raise UserError(f"{what} {text!r} is not a list of whole numbers", fix="Write 40x56x40 or 40,56,40.") from None
