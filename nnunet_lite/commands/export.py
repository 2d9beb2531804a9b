"""`nnlite export` and `nnlite import`: write a model for others, and read one that others wrote."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Annotated, Literal

import typer

from nnunet_lite import log
from nnunet_lite.commands import options
from nnunet_lite.errors import UserError
from nnunet_lite.evaluation.selection import choose_models, describe_rules
from nnunet_lite.inference.onnx import export_onnx
from nnunet_lite.models.argument import as_model_folder, find_model, find_models, unpacked
from nnunet_lite.models.bundle import is_zip, pack, read_manifest, unpack
from nnunet_lite.models.folder import (
    Checkpoint,
    is_model,
    is_nnunet,
    is_taken,
    model_folder,
    model_folders,
    read_run,
    stage_path,
)
from nnunet_lite.models.nnunet import (
    export_nnunet,
    has_first_stage,
    import_nnunet,
    nnunet_label,
    nnunet_names,
    stage_name,
)
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
        Of the model folder; default: the name that it was exported with, CONFIGURATION-nnunet for one of nnU-Net, with
        its trainer and plans if they are not nnU-Net's own, as in 3d_fullres-nnunet-ResEncUNetL.
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
    place = workspace_folder(workspace)
    found = find_models(source, place)
    if len(found) > 1 and (name or output):
        what = f"contains {len(found)} models, and --name and --output are for one"
        raise UserError(what, Path(source), f"Give one of them: {', '.join(map(str, found))}.")
    if is_zip(found[0]):
        if checkpoint != "final":
            raise UserError("is a model of nnlite, which has one checkpoint", found[0], "Leave out --checkpoint.")
        manifest = read_manifest(found[0])
        target = Path(output or model_folder(Paths(place / manifest.dataset), name or manifest.models[0]))
        target = unpack(found[0], target, replace=replace)
        made = [target, *(target.with_name(stage) for stage in manifest.models[1:])]
    else:
        made = _import_from_nnunet(found, place, name, output, replace, checkpoint)
    for path in made:
        log.info(f"imported {path}")
    option = f" -w {shlex.quote(str(workspace))}" if workspace else ""
    if output or {model for dataset in place.iterdir() for model in model_folders(Paths(dataset))} - set(made):
        option = f" -m {shlex.quote(str(made[0]))}"
    elif len({path.parent for path in made}) > 1:
        option += f" -d {shlex.quote(made[0].parent.parent.name)}"
    log.info(f"predict with: nnlite predict -i IMAGES -o OUT{option}")
    return made[0] if len(found) == 1 else made[0].parent


def _import_from_nnunet(
    found: Sequence[Path],
    place: Path,
    name: str | None,
    output: str | Path | None,
    replace: bool,
    checkpoint: Checkpoint,
) -> list[Path]:
    """Import models of nnU-Net, after all of their new names are known to be free."""
    models: dict[Path, tuple[Path, Path, str, str | None]] = {}  # by their new folder
    made: list[Path] = []
    with ExitStack() as stack:
        for path in found:
            if (path / "run.json").is_file():
                fix = "Use it with -m, or pack it with `nnlite export`."
                raise UserError("is a model folder of nnlite already", path, fix)
            folder, label = stack.enter_context(unpacked(path)), name or nnunet_label(path)
            dataset, configuration, first = nnunet_names(folder, checkpoint)
            target = Path(output or model_folder(Paths(place / dataset), name or f"{configuration}-{label}")).absolute()
            if target in models:
                what = f"would become {target}, as {models[target][0]} would"
                raise UserError(what, path, "Import one of them alone, with --name.")
            models[target] = path, folder, label, first
        with_second = {path.with_name(first) for path, _, _, first in models.values() if first is not None}
        models = {target: model for target, model in models.items() if model[0] not in with_second}
        for target, (_, folder, label, first) in models.items():
            is_taken(target, replace)
            if first is not None and output is None and is_nnunet(stage := folder.absolute().with_name(first)):
                has_first_stage(target.with_name(stage_name(first, label)), stage, checkpoint, replace)
        for target, (_, folder, label, _) in models.items():
            made += import_nnunet(folder, target, checkpoint, name=None if output else label, replace=replace)
            beside = stage_path(target, read_run(target))
            if beside is not None and not is_model(beside):
                log.warn(f"{target} predicts only with its first stage: import that too, as {beside}")
    return made


def export_model(
    paths: Annotated[
        str | Path | Sequence[str | Path] | None,
        typer.Argument(metavar="[MODEL] [TARGET]", help="Model folder, zip or name; zip or folder to write."),
    ] = None,
    *,
    output: Annotated[str | Path | None, options.output("-o", "--output", help="Zip or folder to write.")] = None,
    model: Annotated[
        str | Path | None,
        options.model("-m", "--model", help="Model folder, zip or name.", show_default="the selected, or trained one"),
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
        The model, unless it is one of `paths`; default: what `select` chose, otherwise the trained one.
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
        There is no such model, an ensemble is selected, the target exists, or the format cannot represent the model.

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
    if format != "zip" and (licence or note):
        raise UserError(f"--licence and --note are for a zip, and {format} has no place for them", target)
    if source is not None:
        chosen = choose_models(None, [find_model(source, root, dataset, configuration)], [], None, postprocess=True)
    else:
        named = options.names_of(configuration) or []
        chosen = choose_models(select_dataset(workspace, dataset, needs_plan=False), [], named, None, postprocess=True)
    (folder, *others), _, rules = chosen
    if others:
        lost = f"; their postprocessing is not in them ({describe_rules(rules)})" if rules else ""
        fix = f"Export each with -m NAME, and predict with both: -m A.zip -m B.zip{lost}."
        names = " and ".join(path.name for path in (folder, *others))
        raise UserError(f"{names} are selected together, and an export has one model", fix=fix)
    if rules and format != "zip":
        log.warn(f"{format} has no place for the postprocessing of `nnlite predict`: {describe_rules(rules)}")
    if format == "onnx":
        differences = export_onnx(folder, target, checkpoint=checkpoint, trust_code=trust_code, workspace=root)
        log.info(f"logits differ from torch's by {max(differences.values()):.1e} at most; see docs/howto/models.md")
        return target
    with as_model_folder(folder, checkpoint) as converted:
        if format == "nnunet":
            export_nnunet(converted, target)
        else:
            stored = {label: rule.model_dump(mode="json") for label, rule in rules.items()}
            pack(converted, target, licence=licence, note=note, postprocessing=stored)
    program = ["nnlite", "import"] if format == "zip" else ["nnUNetv2_predict_from_modelfolder", "-m"]
    log.info(f"use it with: {shlex.join([*program, str(target)])}")
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
    given = [Path(path) for path in options.list_of(paths)]
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
