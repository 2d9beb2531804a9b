"""Commands of trained models: predicting, importing, exporting."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from nnunet_lite import api, log
from nnunet_lite.commands.options import (
    AcceptGeometry,
    AsJson,
    Dataset,
    Device,
    Precision,
    Scheduler,
    SetOptions,
    Workspace,
    changes_of,
    show,
)
from nnunet_lite.errors import UserError


class ModelFormat(StrEnum):
    zip = "zip"
    onnx = "onnx"
    nnunet = "nnunet"


class Speed(StrEnum):
    fast = "fast"
    balanced = "balanced"
    best = "best"


PROBABILITIES = "--save-probabilities"  # `cli.main` knows it: its value may be left out


def predict(
    source: Annotated[
        list[Path], typer.Option("-i", "--input", help="Image, DICOM series, or folder of them; may be repeated.")
    ],
    out: Annotated[Path, typer.Option("-o", "--output", help="Folder for the label maps.")],
    model: Annotated[
        list[Path] | None,
        typer.Option("-m", "--model", help="Model folder [as selected, or trained]; several vote together."),
    ] = None,
    configuration: Annotated[
        list[str] | None, typer.Option("-c", "--configuration", help="2d, 3d_fullres, ...; several vote together.")
    ] = None,
    folds: Annotated[
        list[str] | None, typer.Option("-f", "--fold", help="Networks to average [selected, or all].")
    ] = None,
    speed: Annotated[
        Speed | None, typer.Option(help="balanced: no mirrored copies; fast: one fold, fewer windows, too [best].")
    ] = None,
    mirroring: Annotated[bool | None, typer.Option(help="Average over mirrored copies: 4 to 8 times slower.")] = None,
    step_size: Annotated[float | None, typer.Option(help="Distance of windows as a share of the patch.")] = None,
    precision: Precision = None,
    max_memory: Annotated[
        float | None, typer.Option(metavar="GB", help="Beside the image; of the GPU's as well [80 % of what is free].")
    ] = None,
    save_probabilities: Annotated[
        str | None,
        typer.Option(PROBABILITIES, metavar="[LABELS]", help="Maps of them too: all, or names with commas [all]."),
    ] = None,
    save_uncertainty: Annotated[
        bool, typer.Option("--save-uncertainty", help="Maps of entropy and of the folds' disagreement too.")
    ] = False,
    dicom_seg: Annotated[bool, typer.Option("--dicom-seg", help="Write DICOM segmentations of DICOM series.")] = False,
    scheduler: Scheduler = None,
    device: Device = None,
    skip_existing: Annotated[bool, typer.Option("--continue", help="Keep label maps that are there.")] = False,
    postprocess: Annotated[
        bool, typer.Option("--postprocess/--no-postprocess", help="As `nnlite select` found to help.")
    ] = True,
    accept_geometry: AcceptGeometry = False,
    assignments: SetOptions = None,
    dataset: Dataset = None,
    as_json: AsJson = False,
    workspace: Workspace = None,
) -> None:
    """Segment images with a trained model."""
    from nnunet_lite.data.problems import plural

    flags = {
        "inference.mirroring": mirroring,
        "inference.step_size": step_size,
        "inference.precision": precision,
        "inference.max_memory": max_memory,
    }
    done = api.predict(
        source, out, model=model or None, configuration=configuration or None, folds=folds or None,
        speed=None if speed is None else speed.value, save_probabilities=save_probabilities,
        save_uncertainty=save_uncertainty, dicom_seg=dicom_seg, dataset=dataset, device=device,
        changes=changes_of(flags, assignments), skip_existing=skip_existing, scheduler=scheduler,
        postprocess=postprocess, accept_geometry=accept_geometry, workspace=workspace,
    )  # fmt: skip
    models = [str(folder) for folder in done.models]
    result = {"files": [str(path) for path in done.files], "failed": done.failed, "models": models}
    result |= {"folds": list(done.folds), "postprocessing": done.postprocessing}
    show(result, f"{plural(len(done.files), 'label map')} in {out}", as_json)
    for case, why in done.failed.items():
        log.info(f"failed: {case}: {why}")
    raise typer.Exit((1 if done.files else 2) if done.failed else 0)  # 2: there was nothing but mistakes


def import_(
    source: Annotated[Path, typer.Argument(help="Zip of `nnlite export`, or model folder of nnU-Net v2.")],
    output: Annotated[Path | None, typer.Option("-o", "--output", help="New folder [in the workspace].")] = None,
    replace: Annotated[bool, typer.Option("--replace", help="Set a model of that name aside.")] = False,
    as_json: AsJson = False,
    workspace: Workspace = None,
) -> None:
    """Make a model folder of a zip or of a model that nnU-Net wrote; nothing that they may carry is run."""
    made = api.import_model(source, output, replace=replace, workspace=workspace)
    show({"model": str(made)}, f"{made}: predict with `nnlite predict -m {made}`", as_json)


def export(
    file: Annotated[Path | None, typer.Argument(help="Zip to write, such as model.zip.")] = None,
    output: Annotated[Path | None, typer.Option("-o", "--output", help="Folder to write: nnunet, onnx.")] = None,
    model: Annotated[Path | None, typer.Option("-m", "--model", help="Model folder [the trained one].")] = None,
    configuration: Annotated[str | None, typer.Option("-c", "--configuration", help="2d, 3d_fullres, ...")] = None,
    format: Annotated[ModelFormat, typer.Option(help="What to make.")] = ModelFormat.zip,
    licence: Annotated[str | None, typer.Option(help="SPDX identifier, text or file; for zip.")] = None,
    note: Annotated[str | None, typer.Option(help="On the training data; for zip.")] = None,
    dataset: Dataset = None,
    as_json: AsJson = False,
    workspace: Workspace = None,
) -> None:
    """Pack a model into one file, or write it as a folder for nnU-Net v2 or for onnxruntime."""
    target = file or output
    if target is None or (file is not None and output is not None):
        raise UserError("say where to: `nnlite export MODEL.zip`, or `--format nnunet -o FOLDER`")
    if (format is ModelFormat.zip) != (target.suffix == ".zip"):
        raise UserError(f"{target}: a zip ends in .zip, and a folder needs --format nnunet or onnx")
    folder = api.export_model(
        target, model, format=format.value, licence=licence, note=note, configuration=configuration, dataset=dataset,
        workspace=workspace,
    )  # fmt: skip
    result = {"model": str(folder), "output": str(target), "format": format.value}
    use = {"zip": "nnlite import", "nnunet": "nnUNetv2_predict_from_modelfolder -m", "onnx": "see docs/models.md:"}
    show(result, f"{target}: {use[format.value]} {target}", as_json)
