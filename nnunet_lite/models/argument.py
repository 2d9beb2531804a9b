"""What an argument that names a model means: `find_model` says where it is, `unpacked` opens it.

A model is a folder of nnlite or of nnU-Net, a zip of either, or the name of one in the workspace. A folder or zip with
one model in it, such as nnU-Net's folder of a dataset, means that model.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from tempfile import gettempdir

from nnunet_lite.errors import UserError
from nnunet_lite.files import scratch
from nnunet_lite.models.bundle import is_zip, models_in_zip, read_manifest, unpack, unpack_nnunet
from nnunet_lite.models.folder import EXPECTED, OLD, Checkpoint, is_model, is_nnunet, read_run, weight_files
from nnunet_lite.system import expand_home
from nnunet_lite.workspace import models_below, planned_paths


def find_model(
    given: str | Path,
    workspace: Path,
    dataset: str | None = None,
    configuration: str | None = None,
    *,
    required: bool = True,
) -> Path:
    """Return the path of the model that an argument names.

    Parameters
    ----------
    given : str or Path
        A model folder, ours or nnU-Net's, or a zip of one; a folder in which there is one, at most two levels down;
        the name of a model in the workspace; or a path in nnUNet_results.
    workspace : Path
        Where models are looked up by name.
    dataset : str, optional
        Take a name as that of a model of this dataset.
    configuration : str, optional
        Take a model of this configuration.
    required : bool
        Refuse models of other configurations; otherwise take the only one.

    Returns
    -------
    Path
        A folder or zip. A model in a zip of nnU-Net has the path of the zip and its folder in it: m.zip/A/B.

    Raises
    ------
    UserError
        There is no model (of that configuration), or there are several.
    """
    found = find_models(given, workspace, dataset)
    if configuration is not None:
        have = {path: _configuration_of(path) for path in found}
        matching = [path for path in found if configuration in (have[path], path.name)]
        if required and not matching:
            what = f"has no model of {configuration}, only of {', '.join(sorted(set(have.values())))}"
            raise UserError(what, Path(given), "Give another --configuration, or none.")
        found = matching or found
    if len(found) > 1:
        what = f"could be {len(found)} models: {', '.join(map(str, found))}"
        raise UserError(what, Path(given), "Give one of these paths.")
    return found[0]


def _configuration_of(model: Path) -> str:
    """Return the configuration of a model; of nnU-Net's, from its name TRAINER__PLANS__CONFIGURATION if it has one."""
    if is_zip(model):
        return str(read_manifest(model).about.get("configuration"))
    if (model / "run.json").is_file():
        return str(read_run(model)["configuration"])
    if "__" in model.name:
        return model.name.rpartition("__")[2]
    from nnunet_lite.models.nnunet import nnunet_names  # imports torch

    with unpacked(model) as folder:
        return nnunet_names(folder, "final" if weight_files(folder) else "best")[1]


def find_models(given: str | Path, workspace: Path, dataset: str | None = None, *, required: bool = True) -> list[Path]:
    """Return the paths of all models that an argument names, as `find_model`.

    Parameters
    ----------
    given, workspace, dataset
        As for `find_model`.
    required : bool
        Refuse an argument that names none.

    Raises
    ------
    UserError
        There is none.
    """
    path = expand_home(given)
    file, in_workspace = _zip_of(path), models_below(workspace)
    if not path.exists() and file is None:
        named = [folder for folder in in_workspace if folder.name == str(path)]
        if named and dataset is not None:
            of_dataset = planned_paths(workspace, dataset, needs_plan=False).models
            in_workspace = [folder for folder in in_workspace if folder.parent == of_dataset]
            named = [folder for folder in named if folder in in_workspace]
        if named:
            return named
        path = Path(os.environ.get("nnUNet_results", "")) / path  # noqa: SIM112 - the name that nnU-Net gave it
    if file is not None:
        found = [model for model in models_in_zip(file) if path in (model, *model.parents)]
    elif is_model(path):
        found = [path]
    else:
        levels = [sorted(plan.parent for plan in path.glob(f"{level}/plans.json")) for level in ("*", "*/*")]
        levels = [[one for one in level if is_model(one) and not one.name.startswith((".", OLD))] for level in levels]
        found = levels[0] or levels[1]
    if found or not required:
        return found
    why, fix = f"no {'fold_0' if (path / 'plans.json').is_file() else 'plans.json'} in it", EXPECTED
    if above := next((folder for folder in path.absolute().parents[:2] if is_model(folder)), None):
        why, fix = "it is a part of one", f"Give {above}, the model folder."
    elif path.suffix == ".onnx" or (path / "onnx.json").is_file():
        why = "it is one as ONNX"
        fix = "nnunet_lite.inference.onnx_runner.load_onnx reads it in Python, nnlite the model that was exported."
    elif path.is_file():
        why = "it is a file"
    elif not path.exists():
        why = "it does not exist"
        if in_workspace:
            datasets = {one.parents[1].name for one in in_workspace}
            of = f" of {datasets.pop()}" if dataset is not None and len(datasets) == 1 else ""
            fix = f"The models{of} in {workspace} are {', '.join(dict.fromkeys(one.name for one in in_workspace))}."
        elif not workspace.is_dir() and len(path.parts) == 1:  # a name
            fix = f"There is no workspace {workspace} either, where its name is looked up."
    raise UserError(f"is no model folder ({why})", Path(given), fix)


def _zip_of(path: Path) -> Path | None:
    """Return the zip that a path names or leads into."""
    return next((file for file in (path, *path.parents) if is_zip(file)), None)


@contextmanager
def unpacked(path: Path, checkpoint: Checkpoint = "final") -> Iterator[Path]:
    """Yield a model folder: the path itself, or a copy of what a zip contains, which is deleted after the block.

    Parameters
    ----------
    path : Path
        From `find_model`.
    checkpoint : {"final", "best"}
        Refused for a model that nnU-Net did not write unless it is the final one.

    Raises
    ------
    UserError
        As `unpack` and `unpack_nnunet`; or there is no such checkpoint.
    """
    with ExitStack() as stack:
        folder = path
        if (file := _zip_of(path)) is not None:
            temporary = stack.enter_context(scratch(Path(gettempdir())))
            if path == file:
                folder = unpack(path, temporary / read_manifest(path).models[0])
            else:
                folder = unpack_nnunet(file, path, temporary)
        if checkpoint != "final" and (folder / "run.json").is_file():
            ways = f"`nnlite import FOLDER -chk {checkpoint}`, or `-m FOLDER -chk {checkpoint}`"
            fix = f"Leave out --checkpoint; nnU-Net's own folder has more: {ways}."
            raise UserError("is a model of nnlite, which has one checkpoint", path, fix)
        try:
            yield folder
        except UserError as error:
            if file is None or error.file is None or not Path(error.file).is_relative_to(folder):
                raise
            raise UserError(error.what, path / Path(error.file).relative_to(folder), error.fix) from None


@contextmanager
def as_model_folder(path: Path, checkpoint: Checkpoint = "final") -> Iterator[Path]:
    """Yield a model folder of nnlite: as `unpacked`, and of a model of nnU-Net a copy too.

    Raises
    ------
    UserError
        As `unpacked`; or it is no model.
    """
    with unpacked(path, checkpoint) as folder:
        if not is_nnunet(folder):
            yield folder
            return
        from nnunet_lite.models.nnunet import import_nnunet  # imports torch, which `nnlite info` needs only here

        with scratch(Path(gettempdir())) as temporary:
            copy = temporary / folder.absolute().name
            import_nnunet(folder, copy, checkpoint)
            yield copy
