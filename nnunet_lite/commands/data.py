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
    from nnunet_lite.plan.schema import Plan


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
    preset: Annotated[Preset, typer.Option(help="Kind of U-Net.")] = Preset.default,
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
    accept_geometry: AcceptGeometry = False,
    store: Annotated[Stored, typer.Option(help="Type of preprocessed images on disk.")] = Stored.float16,
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
    """Check a data set, take its fingerprint and plan its networks."""
    from nnunet_lite.plan.show import plan_table
    from nnunet_lite.workspace import write_json

    patch = None if patch_size is None else numbers_of(patch_size, "--patch-size")
    change = (configuration or ("2d" if patch and len(patch) == 2 else "3d_fullres"), patch, batch_size)
    about: dict[str, Any] | None = None
    if from_fingerprint is not None:
        if dataset_json is None:
            raise UserError("--from-fingerprint needs --dataset-json")
        made, about = api.plan_from_fingerprint(
            from_fingerprint, dataset_json, preset=preset, memory=memory, change=change
        )
    elif data is not None:
        made = api.plan(
            data, workspace=workspace, preset=preset, memory=memory, adopt=plans, change=change,
            clip_percentiles=clip, stored_as=store.value, folds=folds, group_by=group_by,
            stratify=stratify_by or stratify, splits=splits, accept_geometry=accept_geometry,
            workers=workers,
        )  # fmt: skip
    else:
        raise UserError("name the data set to plan", fix="For example `nnlite plan Task04_Hippocampus`.")
    if output is not None:
        write_json(output, _formatted(made, about, format))
    show(made.model_dump(mode="json"), plan_table(made), as_json)
    if measure:
        log.info(api.measure(made, device))


def _formatted(made: Plan, about: dict[str, Any] | None, format: Format) -> Any:
    """A plan as JSON, ours or nnU-Net's, which also wants the dataset.json."""
    if format is Format.nnlite:
        return made.model_dump(mode="json")
    from nnunet_lite.interop.nnunet import Description, description_to_nnunet, plan_to_nnunet

    names = tuple(channel.name for channel in made.channels)
    return plan_to_nnunet(
        made, about or description_to_nnunet(Description(names, made.labels, made.n_cases, ".nii.gz"))
    )


def preprocess(
    configuration: Annotated[list[str] | None, typer.Argument(help="Which [all of the plan].")] = None,
    dataset: Dataset = None,
    prune: Annotated[bool, typer.Option("--prune", help="Delete what the plan does not need any more.")] = False,
    scheduler: Scheduler = None,
    workers: Workers = None,
    as_json: AsJson = False,
    workspace: Workspace = None,
) -> None:
    """Crop, normalise and resample the current data set (train does it too where it is missing)."""
    summary = api.preprocess(
        configuration, dataset=dataset, clean=prune, scheduler=scheduler, workspace=workspace, workers=workers
    )
    show(summary.to_json(), summary.to_text(), as_json)
