"""Commands up to preprocessed data."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from nnunet_lite import api, log
from nnunet_lite.commands.options import (
    AcceptGeometry,
    AsJson,
    Dataset,
    Device,
    Folds,
    GroupBy,
    Scheduler,
    Splits,
    Stratify,
    StratifyBy,
    Workers,
    Workspace,
    numbers_of,
    show,
)
from nnunet_lite.errors import UserError

if TYPE_CHECKING:
    from nnunet_lite.planning.schema import Plan


READER = "overwrite_image_reader_writer"  # in nnU-Net's dataset.json: the reader to take


class Preset(StrEnum):
    default = "default"
    resenc_m = "resenc_m"
    resenc_l = "resenc_l"
    resenc_xl = "resenc_xl"


class Stored(StrEnum):
    float16 = "float16"
    float32 = "float32"


class Format(StrEnum):
    nnlite = "nnlite"
    nnunet = "nnunet"


def check(
    data: str,
    accept_geometry: AcceptGeometry = False,
    workers: Workers = None,
    as_json: AsJson = False,
    workspace: Workspace = None,
) -> None:
    """Report every problem of a dataset at once."""
    report = api.check(data, accept_geometry=accept_geometry, workspace=workspace, workers=workers)
    show(report.to_json(), report.to_text(), as_json)
    raise typer.Exit(0 if report.ok else 2)


def plan(
    data: Annotated[str | None, typer.Argument(help="Folder of the raw data, or its name.")] = None,
    preset: Annotated[Preset | None, typer.Option(help="Kind of U-Net [as planned before, else default].")] = None,
    memory: Annotated[float | None, typer.Option(help="GPU memory budget in GB [the preset's: 8, 8, 24, 40].")] = None,
    plans: Annotated[Path | None, typer.Option(help="Adopt this plans.json, ours or nnU-Net's.")] = None,
    patch_size: Annotated[str | None, typer.Option(help="Such as 40x56x40, instead of the planned one.")] = None,
    batch_size: Annotated[int | None, typer.Option(help="Instead of the planned one.")] = None,
    configuration: Annotated[
        str | None, typer.Option("-c", "--configuration", help="That gets them [3d_fullres, or 2d for a flat patch].")
    ] = None,
    clip: Annotated[
        tuple[float, float] | None,
        typer.Option("--clip-percentiles", min=0, max=100, help="Clip each image to these before normalisation."),
    ] = None,
    folds: Folds = None,
    group_by: GroupBy = None,
    stratify: Stratify = False,
    stratify_by: StratifyBy = None,
    splits: Splits = None,
    store: Annotated[
        Stored | None,
        typer.Option(help="Type of preprocessed images on disk [as planned before; float32 without standardisation]."),
    ] = None,
    accept_geometry: AcceptGeometry = False,
    measure: Annotated[
        bool, typer.Option("--measure", help="Compare with the memory of real steps on the GPU.")
    ] = False,
    device: Device = None,
    from_fingerprint: Annotated[Path | None, typer.Option(help="Plan from a fingerprint instead of data.")] = None,
    dataset_json: Annotated[Path | None, typer.Option(help="dataset.json, with --from-fingerprint.")] = None,
    format: Annotated[Format, typer.Option(help="Of --output.")] = Format.nnlite,
    output: Annotated[Path | None, typer.Option(help="Write the plan to this file too.")] = None,
    workers: Workers = None,
    as_json: AsJson = False,
    workspace: Workspace = None,
) -> None:
    """Check a dataset, take its fingerprint and plan its networks; the options are kept for planning it again."""
    from nnunet_lite.planning.show import plan_table
    from nnunet_lite.workspace import write_json

    patch = None if patch_size is None else numbers_of(patch_size, "--patch-size")
    change = (configuration or ("2d" if patch and len(patch) == 2 else "3d_fullres"), patch, batch_size)
    about: dict[str, Any] | None = None
    if from_fingerprint is not None:
        if dataset_json is None:
            raise UserError("--from-fingerprint needs --dataset-json")
        made, about = api.plan_from_fingerprint(
            from_fingerprint, dataset_json, preset=preset or Preset.default, memory=memory, change=change
        )
    elif data is not None:
        made = api.plan(
            data, workspace=workspace, preset=None if preset is None else preset.value, memory=memory, adopt=plans,
            change=change, clip_percentiles=clip, stored_as=None if store is None else store.value, folds=folds,
            group_by=group_by, stratify=stratify_by or stratify, splits=splits, accept_geometry=accept_geometry,
            workers=workers,
        )  # fmt: skip
    else:
        raise UserError("name the data set to plan", fix="For example `nnlite plan Task04_Hippocampus`.")
    if output is None and format is not Format.nnlite:
        raise UserError(f"--format {format.value} is given without a file", fix="Say where to write it: --output FILE.")
    if output is not None:
        write_json(output, _formatted(made, about or _description(made, workspace), format))
    show(made.as_dict(), plan_table(made), as_json)
    if measure:
        log.info(api.measure(made, device))


def _description(made: Plan, workspace: Path | None) -> dict[str, Any]:
    """What nnU-Net's dataset.json says about a dataset that was just planned."""
    from nnunet_lite.data.dataset import stored_dataset
    from nnunet_lite.planning.nnunet import Description, description_to_nnunet
    from nnunet_lite.workspace import Paths, read_json, workspace_folder

    planned = stored_dataset(Paths(workspace_folder(workspace) / made.dataset).dataset)
    described = Description(planned.channels, planned.labels, len(planned.cases), planned.file_ending)
    table = planned.root / "dataset.json"
    reader = read_json(table).get(READER) if table.is_file() else None
    return {**description_to_nnunet(described), **({} if reader is None else {READER: reader})}


def _formatted(made: Plan, about: dict[str, Any], format: Format) -> Any:
    """A plan as JSON, ours or nnU-Net's, which also wants the dataset.json."""
    if format is Format.nnlite:
        return made.as_dict()
    from nnunet_lite.planning.nnunet import plan_to_nnunet

    return plan_to_nnunet(made, about)


def preprocess(
    configuration: Annotated[list[str] | None, typer.Argument(help="Which [all of the plan].")] = None,
    dataset: Dataset = None,
    prune: Annotated[bool, typer.Option("--prune", help="Delete what the plan does not need any more.")] = False,
    scheduler: Scheduler = None,
    workers: Workers = None,
    as_json: AsJson = False,
    workspace: Workspace = None,
) -> None:
    """Crop, normalise and resample a planned dataset (train does it too where it is missing)."""
    summary = api.preprocess(
        configuration, dataset=dataset, clean=prune, scheduler=scheduler, workspace=workspace, workers=workers
    )
    show(summary.to_json(), summary.to_text(), as_json)
