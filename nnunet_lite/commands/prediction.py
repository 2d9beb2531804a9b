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
    Checkpoint,
    Dataset,
    Device,
    Epoch,
    Precision,
    Scheduler,
    SetOptions,
    TrustCode,
    Workspace,
    changes_of,
    only_one,
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


_GRAMMAR = "Give `nnlite export [MODEL] FILE.zip`, or `nnlite export [MODEL] --format nnunet -o FOLDER` (or onnx)."
PROBABILITIES = "--save-probabilities"  # `cli.main` knows it: its value may be left out


def predict(
    source: Annotated[
        list[Path], typer.Option("-i", "--input", help="Image, DICOM series, or folder of them; may be repeated.")
    ],
    out: Annotated[Path, typer.Option("-o", "--output", help="Folder for the label maps, or a file for one.")],
    model: Annotated[
        list[Path] | None,
        typer.Option(
            "-m", "--model", help="Model folder, nnU-Net's too, zip, or name [as selected, or trained]; several vote."
        ),
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
    checkpoint: Checkpoint = Epoch.final,
    trust_code: TrustCode = False,
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
        postprocess=postprocess, accept_geometry=accept_geometry, checkpoint=checkpoint.value, trust_code=trust_code,
        workspace=workspace,
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
    checkpoint: Checkpoint = Epoch.final,
    as_json: AsJson = False,
    workspace: Workspace = None,
) -> None:
    """Make a model folder of a zip or of a model that nnU-Net wrote; nothing that they may carry is run."""
    made = api.import_model(source, output, replace=replace, checkpoint=checkpoint.value, workspace=workspace)
    show({"model": str(made)}, f"{made}: predict with `nnlite predict -m {made}`", as_json)


def export(
    first: Annotated[
        Path | None, typer.Argument(metavar="MODEL", help="Folder, zip, or name in the workspace [the trained one].")
    ] = None,
    second: Annotated[Path | None, typer.Argument(metavar="TARGET", help="Zip or folder to write.")] = None,
    output: Annotated[Path | None, typer.Option("-o", "--output", help="Zip or folder to write.")] = None,
    model: Annotated[Path | None, typer.Option("-m", "--model", help="Model [the trained one].")] = None,
    configuration: Annotated[str | None, typer.Option("-c", "--configuration", help="2d, 3d_fullres, ...")] = None,
    format: Annotated[ModelFormat, typer.Option(help="What to make; onnx and nnunet are folders.")] = ModelFormat.zip,
    checkpoint: Checkpoint = Epoch.final,
    trust_code: TrustCode = False,
    licence: Annotated[str | None, typer.Option(help="SPDX identifier, text or file; for zip.")] = None,
    note: Annotated[str | None, typer.Option(help="On the training data; for zip.")] = None,
    dataset: Dataset = None,
    as_json: AsJson = False,
    workspace: Workspace = None,
) -> None:
    """Pack a model into one file, or write it as a folder for nnU-Net v2 or for onnxruntime."""
    source, target = _source_and_target(first, second, model, output, workspace)
    if (format is ModelFormat.zip) != (target.suffix.lower() == ".zip"):
        what = "a zip ends in .zip; a folder is written with --format nnunet or --format onnx"
        raise UserError(f"cannot be written as {format.value}: {what}", target)
    folder = api.export_model(
        target, source, format=format.value, licence=licence, note=note, configuration=configuration, dataset=dataset,
        checkpoint=checkpoint.value, trust_code=trust_code, workspace=workspace,
    )  # fmt: skip
    result = {"model": str(folder), "output": str(target), "format": format.value}
    use = {"zip": "nnlite import", "nnunet": "nnUNetv2_predict_from_modelfolder -m", "onnx": "see docs/models.md:"}
    show(result, f"{target}: {use[format.value]} {target}", as_json)


def _source_and_target(
    first: Path | None, second: Path | None, model: Path | None, output: Path | None, workspace: Path | None
) -> tuple[Path | None, Path]:
    """The model to export, None for the trained one, and where to.

    The last argument is the target, unless `output` is one; what is before it is the model, unless -m gives one.

    Raises
    ------
    UserError : one of them is given twice, or there is no target.
    """
    from nnunet_lite.models.choice import model_at
    from nnunet_lite.models.folder import is_model
    from nnunet_lite.workspace import workspace_folder

    if output is None and second is None and first is not None:
        names_model = model is None and is_model(model_at(first, workspace_folder(workspace)))
        first, second = (first, None) if names_model else (None, first)
    if second is not None and output is not None:
        raise UserError(f"two places to write to are given: {second} and, with -o, {output}", fix=_GRAMMAR)
    source, target = only_one(first, model), second or output
    if target is None:
        raise UserError("where to write it is not given", source, _GRAMMAR)
    return source, target
