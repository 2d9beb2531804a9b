"""What there is, for `nnlite info` and `nnlite doctor`: a model, a data set, this machine."""

from __future__ import annotations

import os
import platform
import shutil
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

import nnunet_lite
from nnunet_lite import log
from nnunet_lite.system import GB, cpus, free_memory, in_units
from nnunet_lite.workspace import Paths, understood

if TYPE_CHECKING:
    from nnunet_lite.models.nnunet import Checkpoint
    from nnunet_lite.planning.schema import Plan

# what pyproject.toml asks for
_PACKAGES = (
    "torch", "numpy", "scipy", "SimpleITK", "nibabel", "pillow", "tifffile", "imagecodecs", "batchgenerators", "tqdm",
    "blosc2", "safetensors", "pydantic", "typer", "psutil", "matplotlib", "jinja2", "scikit-learn", "threadpoolctl",
)  # fmt: skip
_LITTLE_DISK = 5 * GB


@dataclass(frozen=True)
class About:
    """A description for --json and for a person."""

    values: dict[str, Any]
    text: str


def describe_model(model: Path, checkpoint: Checkpoint = "final") -> About:
    """What a model is: a model folder, ours or nnU-Net's, or an exported zip. Nothing that it may carry is run.

    Parameters
    ----------
    checkpoint : of each fold of a model of nnU-Net.

    Raises
    ------
    UserError : it is no model.
    """
    from nnunet_lite.models.choice import in_our_form

    with in_our_form([model], None, checkpoint) as (folder,):
        return _described(model, folder)


def _described(model: Path, folder: Path) -> About:
    """What a model folder holds; it is that of `model`, in our form."""
    from nnunet_lite.evaluation.cross_validation import mean_dice
    from nnunet_lite.inference.predictor import read_model
    from nnunet_lite.models.folder import MODEL, read_header, trained_folds
    from nnunet_lite.planning.show import length_unit

    plan, run = read_model(folder)
    configuration = plan.configuration(run["configuration"])
    folds = {}
    for fold in trained_folds(folder):
        with understood(folder / f"fold_{fold}" / MODEL):
            state = read_header(folder / f"fold_{fold}" / MODEL)
            folds[fold] = {"epochs": state["epochs"], "seconds": float(state["seconds"]), **state}
        folds[fold]["mean_dice"] = mean_dice(folder, fold)
    begun = sorted(p.name.removeprefix("fold_") for p in folder.glob("fold_*") if not (p / MODEL).is_file())
    network = configuration.network
    values = {
        "model": str(model),
        "dataset": plan.dataset,
        "configuration": run["configuration"],
        "recipe": run["settings"]["recipe"],
        "channels": [channel.name for channel in plan.channels],
        "labels": plan.labels.to_json(),
        "orientation": plan.orientation,
        "spacing": configuration.spacing,
        "patch_size": configuration.patch_size,
        "batch_size": configuration.batch_size,
        "network": network.model_dump(),
        "folds": folds,
        "unfinished_folds": begun,
        "seed": run["seed"],
        "versions": run["versions"],
        "settings": run["settings"],
    }
    lines = [
        f"{model}: {run['configuration']} of {plan.dataset}, recipe {run['settings']['recipe']}",
        f"channels  {', '.join(c.name for c in plan.channels)}",
        f"labels    {', '.join(plan.labels.region_names)}",
        f"axes      {_orientation(plan)}",
        f"spacing   {_by(configuration.spacing)} {length_unit(plan)}, patch {_by(configuration.patch_size)}",
        f"network   {network.kind}, features {'-'.join(map(str, network.features))}, {network.norm} norm",
    ]
    for fold, state in folds.items():
        dice = "not validated" if state["mean_dice"] is None else f"mean Dice {state['mean_dice']:.4f}"
        lines.append(f"fold {fold}    {state['epochs']} epochs in {log.duration(state['seconds'])}, {dice}")
    lines += [f"fold {fold}    not finished" for fold in begun]
    return About(values, "\n".join(lines))


def _orientation(plan: Plan) -> str:
    if plan.orientation is None:
        return "orientation not known: images are taken as they are stored"
    return f"images are turned to {plan.orientation}"


def describe_dataset(paths: Paths) -> About:
    """What the workspace has of a dataset: cases, plan, models; of one that is not planned, its imported models."""
    from nnunet_lite.data.dataset import stored_dataset
    from nnunet_lite.evaluation.selection import read_selection, trained_since
    from nnunet_lite.models.folder import first_training, model_folders
    from nnunet_lite.planning.schema import Plan
    from nnunet_lite.planning.show import plan_table

    models = [describe_model(folder) for folder in model_folders(paths)]
    if not paths.plans.is_file():
        about = {"dataset": paths.name, "workspace": str(paths.root.parent), "models": [m.values for m in models]}
        head = f"{paths.name}: models alone; the dataset itself is not planned in {paths.root.parent}"
        return About(about, "\n\n".join([head, *(model.text for model in models)]))
    plan, dataset = Plan.read(paths.plans), stored_dataset(paths.dataset)
    values = {
        "dataset": paths.name,
        "workspace": str(paths.root.parent),
        "raw": str(dataset.root),
        "layout": dataset.layout,
        "cases": len(dataset.cases),
        "configurations": list(plan.configurations),
        "models": [model.values for model in models],
    }
    selected = []
    if (selection := read_selection(paths)) is not None:
        changed = trained_since(paths, selection)
        values["selection"] = {**selection.to_json(), "changed_since": changed}
        stale = f"; {' and '.join(changed)} changed since: run `nnlite select` again" if changed else ""
        selected = [f"selected  {selection.how}, on {selection.made}{stale}"]
    head = f"{paths.name}: {values['cases']} cases in {dataset.root} ({dataset.layout})"
    nothing = f"no model yet: {first_training(paths)}"
    return About(values, "\n\n".join([head, plan_table(plan), *([m.text for m in models] or [nothing]), *selected]))


def describe_machine(workspace: Path) -> About:
    """Versions, CPUs, memory, GPUs, disk, and what stands in the way of a good run, missing packages included."""
    versions = {name: _version(name) for name in _PACKAGES}
    problems = [f"{name} is not installed: pip install {name}" for name, version in versions.items() if not version]
    total, free = _memory_gb(problems)
    cpu_capability, gpus = _torch(problems)
    folder = next(p for p in (workspace, *workspace.parents) if p.exists())
    disk = shutil.disk_usage(folder).free
    if disk < _LITTLE_DISK:
        problems.append(f"only {in_units(disk)} are free where the workspace is ({folder})")
    if not os.access(folder, os.W_OK):
        problems.append(f"the workspace cannot be written ({folder})")
    values = {
        "nnunet_lite": nnunet_lite.__version__,
        "python": platform.python_version(),
        "system": platform.platform(),
        "packages": versions,
        "cpus": cpus(),
        "cpu_capability": cpu_capability,
        "memory_gb": total,
        "memory_free_gb": free,
        "gpus": gpus,
        "workspace": str(workspace),
        "disk_free_gb": round(disk / GB, 1),
        "problems": problems,
    }
    shown = [f"{g['name']} ({g['memory_gb']} GB)" for g in gpus] or ["none: use --recipe cpu, or expect days"]
    lines = [
        f"nnunet_lite {nnunet_lite.__version__}, Python {values['python']}, {values['system']}",
        ", ".join(f"{name} {version or 'missing'}" for name, version in versions.items()),
        f"CPU     {values['cpus']} cores to use, {cpu_capability or 'instruction set unknown'}",
        f"memory  {free} of {total} GB free" if total else "memory  unknown",
        f"GPU     {', '.join(shown)}",
        f"disk    {in_units(disk)} free for the workspace {workspace}",
        *(f"problem: {problem}" for problem in problems),
    ]
    return About(values, "\n".join(lines + ([] if problems else ["no problem found"])))


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _memory_gb(problems: list[str]) -> tuple[float | None, float | None]:
    """Memory of this machine and what is free of it; None without psutil, which is added to the problems."""
    try:
        import psutil
    except ImportError as error:
        problems.append(f"psutil cannot be imported: {error}")
        return None, None
    memory = psutil.virtual_memory()
    return round(memory.total / GB, 1), round(free_memory() / GB, 1)


def _torch(problems: list[str]) -> tuple[str | None, list[dict[str, Any]]]:
    """What torch sees, the CPU's instruction set and the GPUs; what is wrong with it is added to the problems."""
    try:
        import torch
    except (ImportError, OSError) as error:  # OSError: a shared library is missing or is another version
        problems.append(f"torch cannot be imported: {error}")
        return None, []
    found = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
    gpus = [{"name": gpu.name, "memory_gb": round(gpu.total_memory / GB, 1)} for gpu in found]
    if not gpus and shutil.which("nvidia-smi"):
        problems.append("there is an NVIDIA driver but torch sees no GPU: install the CUDA build of torch")
    return torch.backends.cpu.get_cpu_capability(), gpus


def _by(values: tuple[Any, ...]) -> str:
    return "x".join(f"{v:g}" for v in values)
