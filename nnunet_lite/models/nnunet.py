"""Models of nnU-Net v2, read and written: plans.json, dataset.json, fold_k/checkpoint_final.pth.

Reading comes first: `nnunet_checkpoints` finds the files, `read_nnunet` makes a plan, settings and networks of them,
and `import_nnunet` writes a model folder. `export_nnunet` writes a model folder for nnU-Net. Names of weights are last.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Container, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path, PureWindowsPath
from typing import Any, Literal
from zipfile import BadZipFile, ZipFile

import torch
from safetensors.torch import load_file
from torch import Tensor

from nnunet_lite import log
from nnunet_lite.data.labels import BACKGROUND, Labels
from nnunet_lite.data.names import case_of
from nnunet_lite.data.problems import few
from nnunet_lite.errors import UserError
from nnunet_lite.files import is_folder_name, read_json, understood, write_json
from nnunet_lite.models.checkpoint import check_finite, load_weights, save_weights
from nnunet_lite.models.folder import (
    CASES,
    EXPECTED,
    MODEL,
    SUMMARY,
    VALIDATION,
    Checkpoint,
    held_out_fingerprint,
    is_nnunet,
    is_taken,
    new_model_folder,
    nnunet_file,
    stage_path,
    trained_folds,
    weight_files,
    write_description,
)
from nnunet_lite.models.lookup import read_headers, read_model
from nnunet_lite.networks.build import build_network
from nnunet_lite.networks.unet import UNet
from nnunet_lite.planning.nnunet import plan_from_nnunet, plan_to_nnunet
from nnunet_lite.planning.schema import Network, Plan, inherited
from nnunet_lite.planning.swaps import swap_of
from nnunet_lite.settings import AugmentationSettings, InferenceSettings, Settings

Json = dict[str, Any]

WEIGHTS = "network_weights"
_CHECKPOINTS = (
    f"One has {WEIGHTS}, init_args and trainer_name; --init also takes {WEIGHTS} with nnssl_adaptation_plan, of nnssl."
)
_TRAINER = "nnUNetTrainer"


# ------------------------------------------------------------------------------------------------------------- reading


@dataclass(frozen=True)
class NnunetFold:
    """One fold of a model of nnU-Net, as nnlite uses it.

    Parameters
    ----------
    name : str
        The fold, such as "0" or "all".
    plan : Plan
        The plan of its configuration, and of the previous stages that it needs.
    dataset : dict
        The content of dataset.json.
    run : dict
        The content of run.json, without format, date and versions.
    network : UNet
        The network with its weights, on the CPU.
    training : dict
        Epochs and seconds of the training.
    """

    name: str
    plan: Plan
    dataset: Json
    run: Json
    network: UNet
    training: Json


def nnunet_checkpoints(
    folder: Path, folds: Sequence[str | int] | None = None, checkpoint: Checkpoint = "final"
) -> dict[str, Path]:
    """Find the checkpoints of some folds of an nnU-Net model, and log which folds are left out.

    Parameters
    ----------
    folder : Path
        The model folder of nnU-Net.
    folds : sequence of str or int, optional
        By default all folds that have this checkpoint.
    checkpoint : {"final", "best"}
        nnU-Net writes both: one after the last epoch, one after the epoch with the best validation.

    Returns
    -------
    dict of str to Path
        The checkpoint file of each fold.

    Raises
    ------
    UserError
        The folder is no model of nnU-Net, or a fold has no such checkpoint.
    """
    if not is_nnunet(folder):
        raise UserError("is no model of nnU-Net (no plans.json, or no fold_0/checkpoint_final.pth)", folder, EXPECTED)
    found, name = weight_files(folder, checkpoint), nnunet_file(checkpoint)
    begun = sorted({file.parent.name.removeprefix("fold_") for file in folder.glob("fold_*/checkpoint_*.pth")})
    lacking = [fold for fold in begun if fold not in found]
    other: Checkpoint = "best" if checkpoint == "final" else "final"
    others = [fold for fold in weight_files(folder, other) if fold in lacking]
    fix = f"--checkpoint {other} takes {nnunet_file(other)}, which fold {', '.join(others)} has." if others else ""
    if not found:
        raise UserError(f"no fold has a {name} (fold {', '.join(begun)} lacks it)", folder, fix)
    trained = f"Trained folds: {', '.join(found)}."
    if folds is not None and not folds:
        raise UserError("no fold is given", folder, trained)
    if missing := [fold for fold in map(str, folds or ()) if fold not in found]:
        raise UserError(f"fold {missing[0]} has no {name}", folder, fix if missing[0] in others else trained)
    if folds is None and lacking:
        used, skipped = ", ".join(trained_folds(folder, checkpoint)), ", ".join(lacking)
        log.warn(f"{folder}: fold {used} used ({name}), fold {skipped} left out (no {name}). {fix}".rstrip())
    return {fold: found[fold] for fold in (found if folds is None else map(str, folds))}


def read_nnunet(files: Iterable[Path]) -> Iterator[NnunetFold]:
    """Read checkpoints of one model of nnU-Net, one after the other.

    Raises
    ------
    UserError
        As `read_nnunet_fold`; or the checkpoints are of different runs.
    """
    first: NnunetFold | None = None
    for file in files:
        fold = read_nnunet_fold(file)
        if first is not None and fold.run != first.run:
            raise UserError(f"is of another run than fold {first.name}", file)
        first = first or fold
        yield fold


def read_nnunet_fold(file: Path, checkpoint: Json | None = None) -> NnunetFold:
    """Read a checkpoint of nnU-Net without running code in it.

    plans.json and dataset.json are read from the model folder. A checkpoint outside of one contains copies of them.

    Parameters
    ----------
    file : Path
        Such as fold_0/checkpoint_final.pth.
    checkpoint : dict, optional
        Its content, if it was read before.

    Raises
    ------
    UserError
        The checkpoint is damaged or contains code, or nnlite lacks its network or its preprocessing.
    """
    checkpoint = checkpoint or read_checkpoint(file)
    trainer, configuration, axes = _origin(checkpoint, file)
    source, plans, dataset = _read_descriptions(file, checkpoint)
    plan = _plan(source, plans, dataset, configuration)
    planned = plan.configuration(configuration)
    spec = planned.network.model_copy(update={"norm": _norm_of(checkpoint[WEIGHTS])})
    planned = planned.model_copy(update={"network": spec})
    plan = plan.with_configuration(configuration, planned)
    settings = Settings(
        recipe=trainer,
        augmentation=AugmentationSettings(mirror_axes=axes),
        inference=InferenceSettings(sums="float16"),  # otherwise label maps differ from nnU-Net's in close decisions
    )
    run = {"configuration": configuration, "seed": 0, "settings": settings.model_dump(mode="json")}
    if planned.previous_stage is not None:
        run["previous"] = _first_folder(file.absolute().parents[1], planned.previous_stage)
    n_inputs, n_outputs = plan.n_inputs(configuration), plan.labels.n_channels
    return NnunetFold(
        name=str(checkpoint["init_args"].get("fold", "0")),
        plan=plan,
        dataset=dataset,
        run={**run, "imported_from": "nnU-Net"},
        network=network_from_nnunet(checkpoint[WEIGHTS], spec, n_inputs, n_outputs, file),
        training=_training(checkpoint),
    )


class _Ignored:
    """Replaces the numpy values in the log of a training, which nnlite does not read."""

    def __init__(self, *_: Any) -> None:
        pass

    def __setstate__(self, _: Any) -> None:
        pass


# what a checkpoint of nnU-Net names besides tensors; numpy 1 and 2 call their module differently
_ALLOWED: list[Any] = [
    type(name, (_Ignored,), {"__module__": module})
    for module, name in (
        ("numpy", "dtype"),
        ("numpy", "ndarray"),
        *((f"numpy.{core}.multiarray", name) for core in ("core", "_core") for name in ("scalar", "_reconstruct")),
    )
]


def read_checkpoint(file: Path) -> Json:
    """Read a file of torch.save that contains tensors and plain values, on the CPU.

    Raises
    ------
    UserError
        There is no such file, it is damaged, it is no checkpoint, or it names a function, which is not run.
    """
    try:
        with ZipFile(file) as archive:
            if (damaged := archive.testzip()) is not None:  # torch does not look at the checksums
                raise UserError(f"is damaged: the checksum of {damaged} differs", file, "Get the file again.")
        with torch.serialization.safe_globals(_ALLOWED), warnings.catch_warnings(action="ignore"):
            content = torch.load(file, map_location="cpu", weights_only=True)
        if not isinstance(content, Mapping):
            raise UserError(f"contains a {type(content).__name__}, not the entries of a checkpoint", file, _CHECKPOINTS)
        return dict(content)
    except BadZipFile:
        raise UserError("is no checkpoint of torch 1.6 or later, or is cut off", file) from None
    except (UserError, OSError):
        raise
    except Exception as error:  # damage shows in many ways
        if name := re.search(r"GLOBAL (\S+)", str(error)):
            what = f"names {name[1]}, which could run any code; it was not run"
            raise UserError(what, file, "Do not trust this file.") from None
        raise UserError(f"is no readable checkpoint ({' '.join(str(error).split())[-120:]})", file) from None


def _origin(checkpoint: Json, file: Path) -> tuple[str, str, tuple[int, ...]]:
    """Return trainer, configuration and mirror axes of a checkpoint; refuse one that nnU-Net v2 did not write."""
    try:
        configuration = str(checkpoint["init_args"]["configuration"])
        trainer, axes = str(checkpoint["trainer_name"]), checkpoint.get("inference_allowed_mirroring_axes") or ()
        checkpoint[WEIGHTS].items()
    except (KeyError, TypeError, AttributeError) as error:
        what = f"is no checkpoint of nnU-Net v2 (lacks {error}, contains {few(list(map(str, checkpoint)))})"
        raise UserError(what, file, _CHECKPOINTS) from None
    return trainer, configuration, tuple(axes)


def _read_descriptions(file: Path, checkpoint: Json) -> tuple[Path, Json, Json]:
    """Return plans.json and dataset.json next to a checkpoint, otherwise in it, and the file that they are from."""
    folder, arguments = file.absolute().parents[1], checkpoint["init_args"]  # the arguments of nnU-Net's trainer
    if (source := folder / "plans.json").is_file():
        plans, dataset = read_json(source), read_json(folder / "dataset.json")
    else:
        source = file
        with understood(file, "Put it back into its model folder."):
            plans, dataset = arguments["plans"], arguments["dataset_json"]
    for what, value in (("dataset.json", dataset), ("plans.json", plans)):
        if not isinstance(value, dict):
            raise UserError(f"{what} is not a JSON object", source)
    return source, plans, dataset


def _plan(file: Path, plans: Json, dataset: Json, configuration: str) -> Plan:
    """Read the plan of a configuration and of the previous stages that it needs; nnlite may lack what others need."""
    needed: dict[str, Json] = {}
    stage: str | None = configuration
    try:
        while stage is not None and stage not in needed:
            needed[stage] = inherited(plans["configurations"], stage)
            stage = needed[stage].get("previous_stage")
            if stage in needed and len(needed) > 1:
                raise ValueError(f"the previous stages of {configuration} are a circle")
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"nnU-Net's plan: {error}", file) from None
    return plan_from_nnunet({**plans, "configurations": needed}, dataset, file)


def _training(checkpoint: Json) -> Json:
    """Return for how many epochs and seconds a checkpoint was trained."""
    logged = checkpoint.get("logging") or {}
    times = zip(logged.get("epoch_start_timestamps", ()), logged.get("epoch_end_timestamps", ()), strict=False)
    seconds = sum(end - start for start, end in times if isinstance(start, float) and isinstance(end, float))
    return {"epochs": checkpoint.get("current_epoch", 0), "seconds": round(seconds, 1)}


def _first_folder(folder: Path, stage: str) -> str:
    """Return the name of a first stage's folder; nnU-Net calls a model folder trainer__plans__configuration."""
    return f"{folder.name.rpartition('__')[0]}__{stage}"


def stage_name(first: str, name: str) -> str:
    """Return CONFIGURATION-NAME for the folder of a first stage of nnU-Net."""
    return f"{first.rpartition('__')[2]}-{name}"


def nnunet_label(folder: Path) -> str:
    """Return "nnunet" with what TRAINER__PLANS__CONFIGURATION adds to nnU-Net's own, as in nnunet-ResEncUNetL."""
    found = re.fullmatch(r"(?:nnUNetTrainer)?_?(.*?)__(?:nnUNet)?(.*?)(?:Plans)?__.+", folder.name)
    return "-".join(["nnunet", *(part for part in (found.groups() if found else ()) if part)])


def nnunet_names(folder: Path, checkpoint: Checkpoint = "final") -> tuple[str, str, str | None]:
    """Return the dataset and the configuration of an nnU-Net model, and the folder name of its first stage.

    Raises
    ------
    UserError
        The dataset's name cannot be that of a folder, or as `nnunet_checkpoints`.
    """
    fold = list(weight_files(folder, checkpoint))[:1] if is_nnunet(folder) else []
    file = next(iter(nnunet_checkpoints(folder, fold or None, checkpoint).values()))
    read = read_nnunet_fold(file)
    dataset = read.plan.dataset
    if not is_folder_name(dataset):
        raise UserError(f"dataset_name {dataset!r} is no name for a folder", folder / "plans.json")
    return dataset, read.run["configuration"], read.run.get("previous")


def has_first_stage(out: Path, first: Path, checkpoint: Checkpoint = "final", replace: bool = False) -> bool:
    """Whether the model that nnU-Net wrote into `first` was imported into `out` before.

    Raises
    ------
    UserError
        Another model is there, and `replace` is not set.
    """
    files, ours = weight_files(first, checkpoint), weight_files(out)
    same = bool(files) and files.keys() == ours.keys()
    for fold, own in zip(read_nnunet(files.values() if same else ()), ours.values(), strict=same):
        state, stored = fold.network.state_dict(), load_file(own)
        same = same and fold.plan == read_model(out)[0] and state.keys() == stored.keys()
        same = same and all(torch.equal(value, stored[name]) for name, value in state.items())
    if not same:
        is_taken(out, replace)
    return same


def import_nnunet(
    folder: Path, out: Path, checkpoint: Checkpoint = "final", *, name: str | None = None, replace: bool = False
) -> list[Path]:
    """Write a model folder with the content of one that nnU-Net wrote.

    The first stage of a cascade is imported too, from the folder next to `folder` into one next to `out`. It is kept
    if it was imported before.

    Parameters
    ----------
    folder : Path
        The model folder of nnU-Net.
    out : Path
        The new model folder. It appears when it is complete.
    checkpoint : {"final", "best"}
        Which checkpoint of each fold. Folds without it are left out, which is logged.
    name : str, optional
        The first stage is called CONFIGURATION-NAME; default: as nnU-Net calls it.
    replace : bool
        Set existing models aside instead of refusing.

    Returns
    -------
    list of Path
        The new model folders: the model, and its first stage if it has one.

    Raises
    ------
    UserError
        As `nnunet_checkpoints` and `read_nnunet`; or a model exists already.
    """
    folder, out, made = folder.absolute(), out.absolute(), [out.absolute()]
    files = nnunet_checkpoints(folder, None, checkpoint)
    with new_model_folder(out, replace) as partial:
        for fold_name, fold in zip(files, read_nnunet(files.values()), strict=True):
            about = {"configuration": fold.run["configuration"], "checkpoint": files[fold_name].name, **fold.training}
            save_weights(partial / f"fold_{fold_name}" / MODEL, fold.network, about)
            if held_out := _held_out_cases(files[fold_name].parent):
                write_json(partial / f"fold_{fold_name}" / CASES, held_out_fingerprint(held_out))
        first, run = stage_path(folder, fold.run), fold.run
        if first is not None and name is not None:
            run = {**run, "previous": stage_name(first.name, name)}
        write_description(partial, fold.plan, {"name": fold.plan.dataset, **fold.dataset}, run)
        if first is not None and is_nnunet(first):
            target = out.with_name(run["previous"])
            if not has_first_stage(target, first, checkpoint, replace):
                made += import_nnunet(first, target, checkpoint, replace=replace)
    return made


def _held_out_cases(fold_folder: Path) -> list[str]:
    """Return the ids of the cases that nnU-Net held out and predicted after the training; none if that is unknown."""
    summary = fold_folder / VALIDATION / SUMMARY
    if not summary.is_file():
        return []
    try:
        with understood(summary, writer="nnU-Net"):
            files = [case["prediction_file"] for case in read_json(summary)["metric_per_case"]]
            return [case_of(Path(PureWindowsPath(file).name)) for file in files]  # of any system
    except UserError as error:  # weights and plan do not depend on it
        log.warn(f"{str(error).removesuffix('.')}: which cases {fold_folder.name} held out is unknown")
        return []


# ------------------------------------------------------------------------------------------------------------- writing


def export_nnunet(folder: Path, out: Path) -> None:
    """Write a model folder that nnU-Net v2 predicts with (nnUNetv2_predict_from_modelfolder).

    nnU-Net writes class numbers 0, 1, 2 ... as label values. Where the dataset has other values, this is logged.

    Parameters
    ----------
    folder : Path
        A model folder of nnlite.
    out : Path
        The new model folder of nnU-Net.

    Raises
    ------
    UserError
        `folder` is no model folder or has no trained fold, `out` exists already, or nnU-Net lacks what the model needs.
    """
    plan, run = read_model(folder)
    configuration, settings = str(run["configuration"]), Settings.model_validate(run["settings"])
    if settings.network.factory is not None:
        raise UserError(f"has a network made by {settings.network.factory}, which nnU-Net lacks", folder)
    files = weight_files(folder)
    if not files:
        raise UserError("has no trained fold", folder, "Train one with `nnlite train`.")
    dataset = {**read_json(folder / "dataset.json"), **_labels_for_nnunet(plan.labels)}
    headers = read_headers(folder, plan, configuration, files)
    plans, network = plan_to_nnunet(plan, dataset), build_network(plan, configuration)
    with new_model_folder(out) as partial:
        write_json(partial / "plans.json", plans)
        write_json(partial / "dataset.json", dataset)
        for fold, file in files.items():
            load_weights(file, network)
            checkpoint = {
                WEIGHTS: {
                    theirs: value
                    for name, value in network.state_dict().items()
                    for theirs in nnunet_tensor_names(name, plan.configuration(configuration).network)
                },
                "optimizer_state": None,
                "grad_scaler_state": None,
                "logging": {},
                "_best_ema": None,
                "current_epoch": headers[fold]["epochs"],
                "init_args": {
                    "plans": plans,
                    "configuration": configuration,
                    "dataset_json": dataset,
                    "fold": int(fold) if fold.isdigit() else fold,
                    "device": torch.device("cpu"),
                },
                "trainer_name": _TRAINER,
                "inference_allowed_mirroring_axes": _mirror_axes(settings.augmentation, plan, configuration),
            }
            (partial / f"fold_{fold}").mkdir()
            torch.save(checkpoint, partial / f"fold_{fold}" / nnunet_file("final"))
    if (first := stage_path(folder, run)) is not None:
        stage = plan.configuration(configuration).previous_stage
        beside = out.absolute().with_name(_first_folder(out.absolute(), str(stage)))
        log.warn(f"{out} is only the second stage: nnU-Net needs label maps of the first, {first.name}; "
                 f"export that too, to {beside} where nnlite looks for it")  # fmt: skip


def _labels_for_nnunet(labels: Labels) -> Json:
    """Return labels and region order of dataset.json as nnU-Net requires them: "background" 0, ignore the last value.

    Values are what nnU-Net writes: class numbers. Regions keep theirs where nnU-Net accepts them.
    """
    values: Sequence[int | tuple[int, ...]]
    if labels.has_regions and labels.background == 0 and labels.ignore in (None, max(labels.values) + 1):
        values, ignore, order = labels.region_values, labels.ignore, labels.region_order
    else:
        numbers = {value: i for i, value in enumerate(labels.values)}
        named = zip(labels.class_names, numbers.items(), strict=True)
        if changes := ", ".join(f"{name} {value} -> {i}" for name, (value, i) in named if value != i):
            log.info(f"nnU-Net numbers labels from 0 and will write: {changes}")
        values = labels.region_classes if labels.has_regions else range(1, labels.n_classes)
        ignore, order = labels.ignore_class, labels.region_order
        if order and numbers.keys() >= {*order}:  # otherwise they are free numbers
            order = tuple(numbers[value] for value in order)
    names = {BACKGROUND: 0, **dict(zip(labels.region_names, values, strict=True))}
    written = Labels(names=names, ignore=ignore, region_order=order).to_json()
    return {"labels": written, **({"regions_class_order": list(order)} if order else {})}


def _mirror_axes(settings: AugmentationSettings, plan: Plan, configuration: str) -> tuple[int, ...] | None:
    """Return the axes that were mirrored in training; None, as nnU-Net writes it, if there were none."""
    dimensions = plan.configuration(configuration).dimensions
    axes = settings.mirrored_axes(dimensions)
    swap = swap_of(plan, settings, dimensions)
    if swap is not None and (sideways := swap.axis - 3 + dimensions) in axes:
        log.info(f"nnU-Net would confuse left and right, and will not mirror along axis {sideways} when it predicts")
        axes = tuple(axis for axis in axes if axis != sideways)
    return axes or None


# ---------------------------------------------------------------------------------------------------- names of weights
# dynamic_network_architectures nests modules deeper, and a layer has up to four names: a block also lists its layers by
# number, and the decoder contains the encoder.

# our name -> nnU-Net's name, of a convolution with its norm
_BLOCKS = (
    (r"stem", r"encoder.stem.convs.0"),
    (r"encoder\.(\d+)\.(\d+)", r"encoder.stages.\1.0.convs.\2"),
    (r"encoder\.(\d+)\.(\d+)\.first", r"encoder.stages.\1.blocks.\2.conv1"),
    (r"encoder\.(\d+)\.(\d+)\.second", r"encoder.stages.\1.blocks.\2.conv2"),
    (r"decoder\.(\d+)\.(\d+)", r"decoder.stages.\1.convs.\2"),
)
_LAYERS = (r"upsample\.(\d+)", r"decoder.transpconvs.\1"), (r"heads\.(\d+)", r"decoder.seg_layers.\1")
_PARTS = ("conv", "norm")
_READABLE = "Only the U-Nets of nnU-Net v2's own planners can be read."
_WRAPPERS = re.compile(r"^(module\.|_orig_mod\.)+")  # of data-parallel and of compiled networks


def nnunet_tensor_names(name: str, spec: Network) -> tuple[str, ...]:
    """Return all names that nnU-Net has for a tensor of our U-Net.

    Parameters
    ----------
    name : str
        Our name of the tensor, such as "encoder.0.1.0.weight".
    spec : Network
        The planned network.
    """
    first = _nnunet_tensor_name(name, spec)
    listed = re.sub(r"\.(conv|norm)\.(?=\w+$)", lambda part: f".all_modules.{_PARTS.index(part[1])}.", first)
    names = (first,) if listed == first else (first, listed)
    return names + tuple(f"decoder.{n}" for n in names if n.startswith("encoder."))


def _nnunet_tensor_name(name: str, spec: Network) -> str:
    module, _, parameter = name.rpartition(".")
    for ours, theirs in _LAYERS:
        if re.fullmatch(ours, module):
            return f"{re.sub(ours, theirs, module)}.{parameter}"
    block, _, number = module.rpartition(".")
    if skip := re.fullmatch(r"encoder\.(\d+)\.(\d+)\.skip", block):
        stage, position = skip.groups()
        pools = int(prod(spec.strides[int(stage)]) > 1)  # then the pooling is the first entry, in both networks
        return f"encoder.stages.{stage}.blocks.{position}.skip.{pools}.{_PARTS[int(number) - pools]}.{parameter}"
    for ours, theirs in _BLOCKS:
        if re.fullmatch(ours, block):
            return f"{re.sub(ours, theirs, block)}.{_PARTS[int(number)]}.{parameter}"
    raise ValueError(f"{name} is no tensor of the U-Net")


def _norm_of(weights: Mapping[str, Tensor]) -> Literal["instance", "batch", "none"]:
    """Return the kind of normalisation of a state dict of nnU-Net: some trainers use another kind than planned."""
    if any(name.endswith(".running_mean") for name in weights):
        return "batch"
    return "instance" if any(".norm." in name for name in weights) else "none"


def network_from_nnunet(weights: Mapping[str, Tensor], spec: Network, inputs: int, outputs: int, file: Path) -> UNet:
    """Build our network with the weights of nnU-Net's state dict, on the CPU.

    Heads of deep supervision that the state dict lacks become zero; predicting does not use them.

    Parameters
    ----------
    weights : mapping of str to Tensor
        The state dict.
    spec : Network
        The planned network.
    inputs, outputs : int
        Number of input and output channels.
    file : Path
        The checkpoint, which error messages name.

    Raises
    ------
    UserError
        The state dict is of another network; names the first tensor that does not fit.
    """
    network = UNet(spec, inputs, outputs)
    own, finest = network.state_dict(), f"heads.{len(network.heads) - 1}."
    zeros = {
        name: torch.zeros_like(own[name]) for name in own if name.startswith("heads.") and not name.startswith(finest)
    }
    state = zeros | rename_tensors(weights, own, spec, file, optional=zeros)
    if unknown := state.keys() - own.keys():
        raise UserError(f"contains {min(unknown)}, which the plan's network lacks", file, _READABLE)
    network.load_state_dict(state)
    return network


def rename_tensors(
    weights: Mapping[str, Tensor], own: Mapping[str, Tensor], spec: Network, file: Path, optional: Container[str] = ()
) -> dict[str, Tensor]:
    """Give the tensors of nnU-Net's state dict our names; those that our network lacks keep theirs.

    Parameters
    ----------
    weights : mapping of str to Tensor
        The state dict.
    own : mapping of str to Tensor
        Names and shapes of our tensors.
    spec : Network
        The planned network.
    file : Path
        The checkpoint, which error messages name.
    optional : container of str
        Our names that the state dict may lack.

    Raises
    ------
    UserError
        A tensor is missing, has another shape, or has NaN.
    """
    rest, state = {_WRAPPERS.sub("", name): value for name, value in weights.items()}, {}
    for name, tensor in own.items():
        theirs = nnunet_tensor_names(name, spec)
        found = [value for value in (rest.pop(alias, None) for alias in theirs) if value is not None]
        if found and found[0].shape == tensor.shape:
            state[name] = found[0]
        elif found:
            shapes = f"{tuple(found[0].shape)}, in the plan's network {tuple(tensor.shape)}"
            raise UserError(f"{theirs[0]} has shape {shapes}", file, _READABLE)
        elif name not in optional:
            raise UserError(f"lacks {theirs[0]}, which the plan's network has", file, _READABLE)
    check_finite(state, file)
    return state | rest
