"""`nnlite export` and `nnlite import`: write a model for others, and read one that others wrote."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Literal

import typer

from nnunet_lite import log
from nnunet_lite.commands import options
from nnunet_lite.errors import UserError
from nnunet_lite.inference.onnx import export_onnx
from nnunet_lite.models.bundle import as_model_folder, is_bundle, pack, read_manifest, unpack
from nnunet_lite.models.folder import is_model, model_folder
from nnunet_lite.models.lookup import choose_model, find_model
from nnunet_lite.models.nnunet import export_nnunet, import_nnunet, nnunet_model_name
from nnunet_lite.workspace import Paths, select_dataset, workspace_folder

_GRAMMAR = "Give `nnlite export [MODEL] FILE.zip`, or `nnlite export [MODEL] --format nnunet -o FOLDER` (or onnx)."


def import_model(
    source: Annotated[str | Path, typer.Argument(help="Zip of `nnlite export`, or model folder of nnU-Net v2.")],
    *,
    output: Annotated[
        str | Path | None, options.output("-o", "--output", help="New folder.", show_default="in the workspace")
    ] = None,
    replace: Annotated[bool, options.output("--replace", help="Set a model of that name aside.")] = False,
    checkpoint: options.WhichCheckpoint = "final",
    workspace: options.Workspace = None,
) -> Path:
    """Make a model folder of a zip or of a model that nnU-Net wrote; none of its code is run.

    In the workspace the model has the name that it was exported with; a model of nnU-Net is called
    trainer__plans__configuration. Folds without the checkpoint are left out, which is logged.

    Parameters
    ----------
    source : str or Path
        A zip of `export_model`, or a model folder of nnU-Net v2.
    output : str or Path, optional
        The new folder; default: in the workspace.
    replace : bool
        Set a model of that name aside.
    checkpoint : {"final", "best"}
        Which of nnU-Net's checkpoints to read.
    workspace : str or Path, optional
        The workspace.

    Returns
    -------
    Path
        The new model folder.

    Raises
    ------
    UserError
        The source is neither, or damaged, or the model exists already.

    Examples
    --------
    nnlite import model.zip
    nnlite import nnUNetTrainer__nnUNetPlans__3d_fullres --checkpoint best
    """
    path, place = Path(source).absolute(), workspace_folder(workspace)
    if not path.exists():
        raise UserError("there is no such file or folder", path)
    if is_bundle(path):
        about = read_manifest(path)
        target = Path(output) if output else model_folder(Paths(place / about.dataset), about.models[0])
        target = unpack(path, target, replace=replace)
    elif (path / "run.json").is_file():
        raise UserError("is a model folder of nnlite already", path, "Use it with -m, or pack it with `nnlite export`.")
    else:
        dataset, name = ("", "") if output else nnunet_model_name(path, checkpoint)
        target = Path(output) if output else model_folder(Paths(place / dataset), name)
        import_nnunet(path, target, checkpoint, replace=replace)
    log.info(f"predict with: nnlite predict -m {target}")
    return target


def export_model(
    paths: Annotated[
        str | Path | Sequence[str | Path] | None,
        typer.Argument(metavar="[MODEL] [TARGET]", help="Model folder, zip or name; zip or folder to write."),
    ] = None,
    *,
    output: Annotated[str | Path | None, options.output("-o", "--output", help="Zip or folder to write.")] = None,
    model: Annotated[
        str | Path | None, options.model("-m", "--model", help="Model.", show_default="the trained one")
    ] = None,
    configuration: Annotated[str | None, options.model("-c", "--configuration", help="2d, 3d_fullres, ...")] = None,
    format: Annotated[
        Literal["zip", "onnx", "nnunet"], options.output(help="What to make; onnx and nnunet are folders.")
    ] = "zip",
    checkpoint: options.WhichCheckpoint = "final",
    trust_code: options.TrustCode = False,
    licence: Annotated[str | None, options.output(help="SPDX identifier, text or file; for zip.")] = None,
    note: Annotated[str | None, options.output(help="On the training data; for zip.")] = None,
    dataset: options.DatasetName = None,
    workspace: options.Workspace = None,
) -> Path:
    """Pack a model into one file, or write it for nnU-Net v2 or onnxruntime.

    Parameters
    ----------
    paths : str, Path or sequence of them
        The model and the target, or the target alone if `model` is given or the trained model is to be exported.
    output : str or Path, optional
        The target, unless it is one of `paths`.
    model : str or Path, optional
        The model, unless it is one of `paths`.
    configuration : str, optional
        Export the trained model of this configuration.
    format : {"zip", "onnx", "nnunet"}
        What to write.
    checkpoint : {"final", "best"}
        Which of nnU-Net's checkpoints to read.
    trust_code : bool
        Run code that the model names, although it is not in the workspace.
    licence : str, optional
        SPDX identifier, text or file, for a zip.
    note : str, optional
        On the training data, for a zip.
    dataset : str, optional
        Planned dataset.
    workspace : str or Path, optional
        The workspace.

    Returns
    -------
    Path
        The zip or folder that was written.

    Raises
    ------
    UserError
        There is no such model, the target exists, or the format cannot represent the model.

    Examples
    --------
    nnlite export model.zip
    nnlite export -c 3d_fullres --format onnx -o onnx_model
    """
    root = workspace_folder(workspace)
    source, target = _source_and_target(paths, model, output, root)
    if (format == "zip") != (target.suffix.lower() == ".zip"):
        what = "a zip ends in .zip; a folder is written with --format nnunet or --format onnx"
        raise UserError(f"cannot be written as {format}: {what}", target)
    if source is not None:
        folder = find_model(source, root, dataset)
    else:
        folder = choose_model(select_dataset(workspace, dataset, needs_plan=False), configuration)
    if format == "onnx":
        differences = export_onnx(folder, target, checkpoint=checkpoint, trust_code=trust_code, workspace=root)
        log.info(f"logits differ from torch's by {max(differences.values()):.1e} at most; see docs/models.md")
        return target
    with as_model_folder(folder, checkpoint) as converted:
        if format == "nnunet":
            export_nnunet(converted, target)
        else:
            pack(converted, target, licence=licence, note=note)
    log.info(f"use it with: {'nnlite import' if format == 'zip' else 'nnUNetv2_predict_from_modelfolder -m'} {target}")
    return target


def _source_and_target(
    paths: str | Path | Sequence[str | Path] | None,
    model: str | Path | None,
    output: str | Path | None,
    workspace: Path,
) -> tuple[Path | None, Path]:
    """Return the model to export, None for the trained one, and the target.

    Raises
    ------
    UserError
        One of them is given twice, or there is no target.
    """
    given = [Path(path) for path in ([paths] if isinstance(paths, str | Path) else paths or [])]
    names_model = len(given) == 1 and model is None and output is None and is_model(find_model(given[0], workspace))
    n_models = int(names_model or len(given) > 1 or (output is not None and bool(given)))
    sources = [Path(path) for path in (*given[:n_models], model) if path is not None]
    targets = [Path(path) for path in (*given[n_models:], output) if path is not None]
    for what, found in (("models", sources), ("places to write to", targets)):
        if len(found) > 1:
            raise UserError(f"{len(found)} {what} are given: {' and '.join(map(str, found))}", fix=_GRAMMAR)
    if not targets:
        raise UserError("where to write it is not given", sources[0] if sources else None, _GRAMMAR)
    return sources[0] if sources else None, targets[0]
