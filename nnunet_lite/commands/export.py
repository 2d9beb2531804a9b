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
from nnunet_lite.models.argument import as_model_folder, find_model, find_models, unpacked
from nnunet_lite.models.bundle import is_zip, pack, read_manifest, unpack
from nnunet_lite.models.folder import model_folder
from nnunet_lite.models.lookup import choose_model
from nnunet_lite.models.nnunet import export_nnunet, import_nnunet, nnunet_names
from nnunet_lite.workspace import Paths, select_dataset, workspace_folder

_GRAMMAR = "Give `nnlite export [MODEL] FILE.zip`, or `nnlite export [MODEL] --format nnunet -o FOLDER` (or onnx)."


def import_model(
    source: Annotated[str | Path, typer.Argument(help="Zip, ours or nnU-Net's, or model folder of nnU-Net v2.")],
    *,
    name: Annotated[
        str | None, options.output(help="Name of the new folder.", show_default="CONFIGURATION-nnunet, or as exported")
    ] = None,
    output: Annotated[
        str | Path | None, options.output("-o", "--output", help="New folder.", show_default="in the workspace")
    ] = None,
    replace: Annotated[bool, options.output("--replace", help="Set a model of that name aside.")] = False,
    checkpoint: options.WhichCheckpoint = "final",
    workspace: options.Workspace = None,
) -> Path:
    """Make a model folder of a zip or of a model that nnU-Net wrote; none of its code is run.

    In the workspace its dataset needs no raw data and no plan: `predict`, `info`, `export` and `--init` find the model.
    Folds without the checkpoint are left out, which is logged.

    Parameters
    ----------
    source : str or Path
        A zip of `export_model` or of nnU-Net, or a folder of nnU-Net v2. All models in it are imported.
    name : str, optional
        Of the model folder; default: the name that it was exported with, CONFIGURATION-nnunet for one of nnU-Net.
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
        The new model folder; of several, the folder that contains them.

    Raises
    ------
    UserError
        The source is neither, or damaged, or the model exists already.

    Examples
    --------
    nnlite import model.zip
    nnlite import nnUNetTrainer__nnUNetPlans__3d_fullres --name mine
    """
    place, made = workspace_folder(workspace), list[Path]()
    found = find_models(source, place)
    if len(found) > 1 and (name or output):
        what = f"contains {len(found)} models, and --name and --output are for one"
        raise UserError(what, Path(source), f"Give one of them: {', '.join(map(str, found))}.")
    for path in found:
        if (path / "run.json").is_file():
            fix = "Use it with -m, or pack it with `nnlite export`."
            raise UserError("is a model folder of nnlite already", path, fix)
        if is_zip(path):
            manifest = read_manifest(path)
            target = Path(output or model_folder(Paths(place / manifest.dataset), name or manifest.models[0]))
            target = unpack(path, target, replace=replace)
            made += [target, *(target.with_name(stage) for stage in manifest.models[1:])]
            continue
        with unpacked(path) as folder:
            dataset, configuration = nnunet_names(folder, checkpoint)
            target = Path(output or model_folder(Paths(place / dataset), name or f"{configuration}-nnunet")).absolute()
            if target not in made:  # as the first stage of a cascade, which the alphabet has before it
                stage_name = None if output else name or "nnunet"
                made += import_nnunet(folder, target, checkpoint, name=stage_name, replace=replace)
    for path in made:
        log.info(f"imported {path}")
    option = f" -w {workspace}" if workspace else ""
    if output or {run.parent for run in place.glob("*/models/*/run.json")} - set(made):
        option = f" -m {made[0]}"
    log.info(f"predict with: nnlite predict -i IMAGES -o OUT{option}")
    return made[0] if len(found) == 1 else made[0].parent


def export_model(
    paths: Annotated[
        str | Path | Sequence[str | Path] | None,
        typer.Argument(metavar="[MODEL] [TARGET]", help="Model folder, zip or name; zip or folder to write."),
    ] = None,
    *,
    output: Annotated[str | Path | None, options.output("-o", "--output", help="Zip or folder to write.")] = None,
    model: Annotated[
        str | Path | None,
        options.model("-m", "--model", help="Model folder, zip or name.", show_default="the trained one"),
    ] = None,
    configuration: Annotated[str | None, options.model("-c", "--configuration", help="2d, 3d_fullres, ...")] = None,
    format: Annotated[
        Literal["zip", "onnx", "nnunet"], options.output(help="What to make; onnx and nnunet are folders.")
    ] = "zip",
    checkpoint: options.WhichCheckpoint = "final",
    trust_code: options.TrustCode = False,
    licence: Annotated[str | None, options.output(help="SPDX identifier, text or file; for zip.")] = None,
    note: Annotated[str | None, options.output(help="Remark on the training data; for zip.")] = None,
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
        folder = find_model(source, root, dataset, configuration)
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
    names_model = len(given) == 1 and model is None and output is None and not is_zip(given[0])
    names_model = names_model and bool(find_models(given[0], workspace, required=False))
    n_models = int(names_model or len(given) > 1 or (output is not None and bool(given)))
    sources = [Path(path) for path in (*given[:n_models], model) if path is not None]
    targets = [Path(path) for path in (*given[n_models:], output) if path is not None]
    for what, found in (("models", sources), ("places to write to", targets)):
        if len(found) > 1:
            raise UserError(f"{len(found)} {what} are given: {' and '.join(map(str, found))}", fix=_GRAMMAR)
    if not targets:
        raise UserError("where to write it is not given", sources[0] if sources else None, _GRAMMAR)
    return sources[0] if sources else None, targets[0]
