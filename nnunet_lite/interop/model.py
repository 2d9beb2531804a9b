"""Whole model folders of nnU-Net v2, both ways: plans.json, dataset.json, fold_k/checkpoint_final.pth."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from tempfile import gettempdir
from typing import TYPE_CHECKING, Any

from nnunet_lite import log
from nnunet_lite.data.labels import BACKGROUND, Labels
from nnunet_lite.errors import UserError
from nnunet_lite.interop.nnunet import plan_from_nnunet, plan_to_nnunet
from nnunet_lite.plan.schema import Plan, inherited
from nnunet_lite.settings import AugmentationSettings, InferenceSettings, Settings
from nnunet_lite.training.run import FORMAT, MODEL, versions
from nnunet_lite.training.swaps import swap_of
from nnunet_lite.workspace import read_json, write_json, write_text
from nnunet_lite.writing import must_fit, scratch

if TYPE_CHECKING:
    from nnunet_lite.inference.predictor import Model

Json = dict[str, Any]

_CHECKPOINTS = ("checkpoint_final.pth", "checkpoint_best.pth")
_WEIGHTS = "network_weights"
_TRAINER = "nnUNetTrainer"


def nnunet_folds(folder: Path) -> dict[str, Path]:
    """The checkpoint of each fold of an nnU-Net model, the final one, else the best; empty where it is no such folder.

    A folder that holds a run.json is ours.
    """
    if (folder / "run.json").is_file() or not (folder / "plans.json").is_file():
        return {}
    checkpoints = {
        fold.name.removeprefix("fold_"): next((fold / name for name in _CHECKPOINTS if (fold / name).is_file()), None)
        for fold in sorted(folder.glob("fold_*"))
    }
    return {fold: file for fold, file in checkpoints.items() if file is not None}


def dataset_name(folder: Path) -> str:
    """The data set of an nnU-Net model.

    Raises
    ------
    UserError : it is no name for a folder.
    """
    name = str(read_json(folder / "plans.json").get("dataset_name", ""))
    if Path(name).name != name or name.startswith("."):
        raise UserError(f"dataset_name {name!r} is no name for a folder", folder / "plans.json")
    return name


@contextmanager
def native(folder: Path, folds: Sequence[str | int] | None = None) -> Iterator[Path]:
    """A model folder in our form: the folder itself or, of one that nnU-Net wrote, a copy that the block's end deletes.

    Parameters
    ----------
    folds : those of nnU-Net's that will be needed; default: all.
    """
    if not nnunet_folds(folder):
        yield folder
        return
    with scratch(Path(gettempdir())) as temporary:
        copy = temporary / folder.absolute().name
        import_model(folder, copy, folds)
        yield copy


def relocated(model: Model, folder: Path) -> Model:
    """A model that was loaded from a copy of `folder`, and the first stage of a cascade, as if from there."""
    first = model.previous
    previous = None if first is None else relocated(first, folder.absolute().with_name(first.folder.name))
    return replace(model, folder=folder, previous=previous)


def import_model(folder: Path, out: Path, folds: Sequence[str | int] | None = None) -> None:
    """Make a model folder of one that nnU-Net v2 wrote. Its checkpoints are read without running anything in them.

    The first stage of a cascade comes along, from beside `folder` to beside `out`, unless it is there already.

    Parameters
    ----------
    out : where; it appears when it is whole.
    folds : which; default: all that have a final or a best checkpoint.

    Raises
    ------
    UserError : `folder` is none of nnU-Net's or lacks a fold, `out` is there already, a checkpoint is damaged or names
        a function, or the network or the preprocessing is one that nnlite does not have.
    """
    from nnunet_lite.interop.unpickle import read_checkpoint
    from nnunet_lite.interop.weights import from_nnunet
    from nnunet_lite.training.checkpoint import save_weights

    folder, out = folder.absolute(), out.absolute()
    found = nnunet_folds(folder)
    if not found:
        raise UserError(f"is no model of nnU-Net (no plans.json, or no fold_0/{_CHECKPOINTS[0]})", folder)
    wanted = list(found) if folds is None else [str(fold) for fold in folds]
    if missing := [fold for fold in wanted if fold not in found]:
        raise UserError(f"has no trained fold {', '.join(missing)}", folder, f"Trained folds: {', '.join(found)}.")
    dataset, first = read_json(folder / "dataset.json"), None
    if not isinstance(dataset, dict):
        raise UserError("is not a JSON object", folder / "dataset.json")
    with _whole(out) as partial:
        for fold in wanted:
            checkpoint = read_checkpoint(found[fold], _WEIGHTS)
            plan, run = _plan_and_run(folder, dataset, checkpoint, found[fold])
            configuration, first = run["configuration"], run.get("previous")
            if fold != wanted[0] and run != read_json(partial / "run.json"):
                raise UserError(f"is of another run than fold {wanted[0]}", found[fold])
            network = from_nnunet(
                checkpoint[_WEIGHTS],
                plan.configuration(configuration).network,
                plan.n_inputs(configuration),
                plan.labels.n_channels,
                found[fold],
            )
            about = {"configuration": configuration, "checkpoint": found[fold].name, **_training(checkpoint)}
            save_weights(partial / f"fold_{fold}" / MODEL, network, about)
            write_json(partial / "run.json", run)
            write_text(partial / "plans.json", plan.to_json())
        write_json(partial / "dataset.json", {"name": plan.dataset, **dataset})
        write_json(partial / "run.json", {**run, "began": _now(), "versions": versions()})
    if first is not None and nnunet_folds(folder.with_name(first)) and not out.with_name(first).exists():
        import_model(folder.with_name(first), out.with_name(first))


def _plan_and_run(folder: Path, dataset: Json, checkpoint: Json, file: Path) -> tuple[Plan, Json]:
    """The plan of a checkpoint's configuration, and a run.json without date and versions."""
    from nnunet_lite.interop.weights import norm_of

    try:
        configuration = str(checkpoint["init_args"]["configuration"])
        trainer, axes = str(checkpoint["trainer_name"]), checkpoint.get("inference_allowed_mirroring_axes") or ()
    except (KeyError, TypeError) as error:
        raise UserError(f"is no checkpoint of nnU-Net v2 (lacks {error})", file) from None
    plan = _plan(folder / "plans.json", dataset, configuration)
    planned = plan.configuration(configuration)
    network = planned.network.model_copy(update={"norm": norm_of(checkpoint[_WEIGHTS])})
    planned = planned.model_copy(update={"network": network})
    plan = plan.model_copy(update={"configurations": {**plan.configurations, configuration: planned}})
    same = InferenceSettings(sums="float16")  # or maps would differ from nnU-Net's in close races
    settings = Settings(recipe=trainer, augmentation=AugmentationSettings(mirror_axes=tuple(axes)), inference=same)
    run = {"format": FORMAT, "configuration": configuration, "seed": 0, "settings": settings.model_dump(mode="json")}
    if planned.previous_stage is not None:  # nnU-Net calls a model's folder trainer__plans__configuration
        run["previous"] = f"{folder.name.rpartition('__')[0]}__{planned.previous_stage}"
    return plan, {**run, "imported_from": "nnU-Net"}


def _plan(file: Path, dataset: Json, configuration: str) -> Plan:
    """The plan of a configuration and of the previous stages that it needs; others may be what we cannot follow."""
    plans, needed = read_json(file), {}
    stage: str | None = configuration
    try:
        while stage is not None and stage not in needed:
            needed[stage] = inherited(plans["configurations"], stage)
            stage = needed[stage].get("previous_stage")
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"nnU-Net's plan: configurations: {error}", file) from None
    return plan_from_nnunet({**plans, "configurations": needed}, dataset, file)


def _training(checkpoint: Json) -> Json:
    """How long a checkpoint was trained."""
    log = checkpoint.get("logging") or {}
    times = zip(log.get("epoch_start_timestamps", ()), log.get("epoch_end_timestamps", ()), strict=False)
    seconds = sum(end - start for start, end in times if isinstance(start, float) and isinstance(end, float))
    return {"epochs": checkpoint.get("current_epoch", 0), "seconds": round(seconds, 1)}


def export_model(folder: Path, out: Path) -> None:
    """Make a folder of a model that nnU-Net v2 predicts with (nnUNetv2_predict_from_modelfolder).

    nnU-Net writes class numbers 0, 1, 2 ... as values; where the data set has other values, that is logged.

    Raises
    ------
    UserError : no model folder or no trained fold, `out` is there already, or the model has what nnU-Net has not.
    """
    import torch

    from nnunet_lite.inference.predictor import read_model
    from nnunet_lite.interop.weights import to_nnunet
    from nnunet_lite.network.build import build_network
    from nnunet_lite.training.checkpoint import load_weights

    plan, run = read_model(folder)
    configuration, settings = str(run["configuration"]), Settings.model_validate(run["settings"])
    if settings.network.factory is not None:
        raise UserError(f"has a network made by {settings.network.factory}, which nnU-Net has not", folder)
    if any(channel.clip_percentiles is not None for channel in plan.channels):
        raise UserError("clips images to percentiles, which nnU-Net cannot do", folder)
    files = sorted(folder.glob(f"fold_*/{MODEL}"))
    if not files:
        raise UserError("has no trained fold", folder, "Train one with `nnlite train`.")
    dataset = {**read_json(folder / "dataset.json"), "labels": _consecutive(plan.labels).to_json()}
    plans, network = plan_to_nnunet(plan, dataset), build_network(plan, configuration)
    with _whole(out) as partial:
        write_json(partial / "plans.json", plans)
        write_json(partial / "dataset.json", dataset)
        for file in files:
            about = load_weights(file, network)
            fold = file.parent.name.removeprefix("fold_")
            given = {"plans": plans, "configuration": configuration, "dataset_json": dataset,
                     "fold": int(fold) if fold.isdigit() else fold, "device": torch.device("cpu")}  # fmt: skip
            checkpoint = {
                _WEIGHTS: to_nnunet(network.state_dict(), plan.configuration(configuration).network),
                "optimizer_state": None,
                "grad_scaler_state": None,
                "logging": {},
                "_best_ema": None,
                "current_epoch": about["epochs"],
                "init_args": given,
                "trainer_name": _TRAINER,
                "inference_allowed_mirroring_axes": _mirror_axes(settings.augmentation, plan, configuration),
            }
            (partial / file.parent.name).mkdir()
            torch.save(checkpoint, partial / file.parent.name / _CHECKPOINTS[0])


def _consecutive(labels: Labels) -> Labels:
    """The labels with the values that nnU-Net writes: class numbers, or for regions those of the region order."""
    ordered = (BACKGROUND, *labels.region_names)
    if labels.has_regions or labels.values == tuple(range(labels.n_classes)):
        return labels
    changes = ", ".join(f"{ordered[i]} {value} -> {i}" for i, value in enumerate(labels.values) if value != i)
    log.info(f"nnU-Net numbers labels from 0 and will write: {changes}")
    return Labels(names={name: i for i, name in enumerate(ordered)}, ignore=labels.ignore_class)


def _mirror_axes(settings: AugmentationSettings, plan: Plan, configuration: str) -> tuple[int, ...] | None:
    """The axes that were mirrored in training; None, nnU-Net's word for it, where there were none."""
    if not settings.enabled or settings.p_mirror == 0:
        return None
    dimensions = plan.configuration(configuration).dimensions
    axes = tuple(range(dimensions)) if settings.mirror_axes is None else settings.mirror_axes
    swap = swap_of(plan, settings, dimensions)
    if swap is not None and (sideways := swap.axis - 3 + dimensions) in axes:
        log.info(f"nnU-Net would mix left and right: it will mirror no more along axis {sideways} when it predicts")
        axes = tuple(axis for axis in axes if axis != sideways)
    return axes or None


@contextmanager
def _whole(out: Path) -> Iterator[Path]:
    """A temporary folder beside `out` that takes its place when the block ends well, and is gone when it does not."""
    if out.exists() and (out.is_file() or any(out.iterdir())):
        raise UserError("is there already", out, "Choose another --output, or delete it.")
    with scratch(out.absolute().parent) as temporary:
        partial = temporary / out.name
        partial.mkdir()
        with must_fit(out, partial):
            yield partial
        partial.replace(out)


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
