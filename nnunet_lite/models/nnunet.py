"""Whole model folders of nnU-Net v2, both ways: plans.json, dataset.json, fold_k/checkpoint_final.pth."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from tempfile import gettempdir
from typing import TYPE_CHECKING, Any, Literal, get_args

from nnunet_lite import log
from nnunet_lite.data.labels import BACKGROUND, Labels
from nnunet_lite.errors import UserError
from nnunet_lite.files import must_fit, read_json, scratch, understood, write_json, write_text
from nnunet_lite.models.folder import FORMAT, MODEL, package_versions, set_aside, suggest_models
from nnunet_lite.planning.nnunet import plan_from_nnunet, plan_to_nnunet
from nnunet_lite.planning.schema import Plan, inherited
from nnunet_lite.settings import AugmentationSettings, InferenceSettings, Settings
from nnunet_lite.training.swaps import swap_of

if TYPE_CHECKING:
    from nnunet_lite.inference.predictor import Model
    from nnunet_lite.networks.unet import UNet

Json = dict[str, Any]

Checkpoint = Literal["final", "best"]  # nnU-Net writes both: the last epoch's, and that of the best validation so far

_WEIGHTS = "network_weights"
_TRAINER = "nnUNetTrainer"


def is_nnunet(folder: Path) -> bool:
    """Whether a folder is a model that nnU-Net wrote; one that holds a run.json is ours."""
    if (folder / "run.json").is_file() or not (folder / "plans.json").is_file():
        return False
    return any(folder.glob("fold_*/checkpoint_*.pth"))


def nnunet_folds(folder: Path, checkpoint: Checkpoint = "final") -> dict[str, Path]:
    """The checkpoint of each fold of an nnU-Net model that has it; empty where it is no such folder."""
    files = sorted(folder.glob(f"fold_*/{_file(checkpoint)}")) if is_nnunet(folder) else []
    return {file.parent.name.removeprefix("fold_"): file for file in files}


def _file(checkpoint: Checkpoint) -> str:
    if checkpoint not in get_args(Checkpoint):
        raise UserError(f"there is no checkpoint {checkpoint!r}", fix='Give "final" or "best".')
    return f"checkpoint_{checkpoint}.pth"


def nnunet_names(folder: Path, checkpoint: Checkpoint = "final") -> tuple[str, str]:
    """The dataset of an nnU-Net model, and what nnU-Net calls the model: trainer__plans__configuration.

    Raises
    ------
    UserError : one of them is no name for a folder, or as `import_model`.
    """
    from nnunet_lite.models.unpickle import read_checkpoint

    file, plans = chosen_folds(folder, None, checkpoint)[0], read_json(folder / "plans.json")
    with understood(folder / "plans.json"):
        dataset, plans_name = str(plans["dataset_name"]), str(plans.get("plans_name", "nnUNetPlans"))
    trainer, configuration, _ = _origin(read_checkpoint(file), file)
    for what, name in (("dataset_name", dataset), ("plans_name", plans_name)):
        if Path(name).name != name or name.startswith("."):
            raise UserError(f"{what} {name!r} is no name for a folder", folder / "plans.json")
    return dataset, f"{trainer}__{plans_name}__{configuration}"


def chosen_folds(folder: Path, folds: Sequence[str | int] | None, checkpoint: Checkpoint) -> list[Path]:
    """The checkpoints of some folds of an nnU-Net model; default: of all that have it. Those left out are logged.

    Raises
    ------
    UserError : the folder is none of nnU-Net's, no fold has this checkpoint, or not one of those that are asked for.
    """
    if not is_nnunet(folder):
        what = "is no model of nnU-Net (no plans.json, or no fold_0/checkpoint_final.pth)"
        raise UserError(what, folder, suggest_models(folder))
    found, name = nnunet_folds(folder, checkpoint), _file(checkpoint)
    begun = sorted({file.parent.name.removeprefix("fold_") for file in folder.glob("fold_*/checkpoint_*.pth")})
    lacking = [fold for fold in begun if fold not in found]
    other: Checkpoint = "best" if checkpoint == "final" else "final"
    others = [fold for fold in nnunet_folds(folder, other) if fold in lacking]
    fix = f"--checkpoint {other} takes {_file(other)}, which fold {', '.join(others)} has." if others else ""
    if not found:
        raise UserError(f"no fold has a {name} (fold {', '.join(begun)} is there without)", folder, fix)
    wanted = list(found) if folds is None else [str(fold) for fold in folds]
    if not wanted:
        raise UserError("no fold of it is asked for", folder, f"Trained folds: {', '.join(found)}.")
    for fold in wanted:
        if fold in lacking:
            raise UserError(f"fold {fold} has no {name}", folder, fix)
        if fold not in found:
            raise UserError(f"has no trained fold {fold}", folder, f"Trained folds: {', '.join(found)}.")
    if folds is None and lacking:
        used = ", ".join([fold for fold in found if fold != "all"] or found)  # as `trained_folds` averages them
        left = ", ".join(lacking)
        log.warn(f"{folder}: fold {used} used ({name}), fold {left} left out (no {name}). {fix}".rstrip())
    return [found[fold] for fold in wanted]


@contextmanager
def native(folder: Path, folds: Sequence[str | int] | None = None, checkpoint: Checkpoint = "final") -> Iterator[Path]:
    """A model folder in our form: the folder itself or, of one that nnU-Net wrote, a copy that the block's end deletes.

    Parameters
    ----------
    folds : those of nnU-Net's that will be needed; default: all.
    checkpoint : of each of these folds.

    Raises
    ------
    UserError : as `import_model`.
    """
    if not is_nnunet(folder):
        yield folder
        return
    with scratch(Path(gettempdir())) as temporary:
        copy = temporary / folder.absolute().name
        import_model(folder, copy, folds, checkpoint)
        yield copy


def relocated(model: Model, folder: Path) -> Model:
    """A model that was loaded from a copy of `folder`, and the first stage of a cascade, as if from there."""
    first = model.previous
    previous = None if first is None else relocated(first, folder.absolute().with_name(first.folder.name))
    return replace(model, folder=folder, previous=previous)


def import_model(
    folder: Path,
    out: Path,
    folds: Sequence[str | int] | None = None,
    checkpoint: Checkpoint = "final",
    *,
    replace: bool = False,
) -> None:
    """Make a model folder of one that nnU-Net v2 wrote. Its checkpoints are read without running anything in them.

    The first stage of a cascade comes along, from beside `folder` to beside `out`, unless it is there already.

    Parameters
    ----------
    out : where; it appears when it is whole.
    folds : which; default: all that have the checkpoint. Those left out are logged.
    checkpoint : of each fold.
    replace : set the model aside that is there already; nothing is deleted.

    Raises
    ------
    UserError : `folder` is none of nnU-Net's or lacks a fold, `out` is there already, a checkpoint is damaged or names
        a function, or the network or the preprocessing is one that nnlite does not have.
    """
    from nnunet_lite.models.checkpoint import save_weights

    folder, out = folder.absolute(), out.absolute()
    files, first = chosen_folds(folder, folds, checkpoint), None
    with _whole(out, replace) as partial:
        for file in files:
            fold = read_fold(file)
            first = fold.run.get("previous")
            if file != files[0] and fold.run != read_json(partial / "run.json"):
                raise UserError(f"is of another run than {files[0].parent.name}", file)
            about = {"configuration": fold.run["configuration"], "checkpoint": file.name, **fold.trained}
            save_weights(partial / file.parent.name / MODEL, fold.network, about)
            write_json(partial / "run.json", fold.run)
            write_text(partial / "plans.json", fold.plan.to_json())
        write_json(partial / "dataset.json", {"name": fold.plan.dataset, **fold.dataset})
        write_json(partial / "run.json", {**fold.run, "began": _now(), "versions": package_versions()})
        if first is not None and is_nnunet(folder.with_name(first)) and not out.with_name(first).exists():
            import_model(folder.with_name(first), out.with_name(first), None, checkpoint)


@dataclass(frozen=True)
class NnunetFold:
    """A fold of an nnU-Net model in our form.

    Parameters
    ----------
    dataset : the content of its dataset.json. run : that of our run.json, without date and versions.
    network : with its weights, on the CPU. trained : epochs and seconds. number : of the fold, such as "0" or "all".
    """

    plan: Plan
    dataset: Json
    run: Json
    network: UNet
    trained: Json
    number: str


def read_fold(file: Path) -> NnunetFold:
    """Read a checkpoint of nnU-Net, without running anything in it.

    plans.json and dataset.json are those of its model folder; of a checkpoint that is alone, the copies in it.

    Raises
    ------
    UserError : as `import_model`.
    """
    from nnunet_lite.models.nnunet_weights import from_nnunet
    from nnunet_lite.models.unpickle import read_checkpoint

    checkpoint = read_checkpoint(file, _WEIGHTS)
    _origin(checkpoint, file)
    folder, given = file.absolute().parents[1], checkpoint["init_args"]  # what nnU-Net's trainer was made with
    if (source := folder / "plans.json").is_file():
        plans, dataset = read_json(source), read_json(folder / "dataset.json")
    else:
        source = file
        with understood(file, "Put it back into its model folder."):
            plans, dataset = given["plans"], given["dataset_json"]
    for what, value in (("dataset.json", dataset), ("plans.json", plans)):
        if not isinstance(value, dict):
            raise UserError(f"{what} is not a JSON object", source)
    plan, run = _plan_and_run(plans, dataset, checkpoint, file, source)
    configuration = run["configuration"]
    network = from_nnunet(
        checkpoint[_WEIGHTS],
        plan.configuration(configuration).network,
        plan.n_inputs(configuration),
        plan.labels.n_channels,
        file,
    )
    return NnunetFold(plan, dataset, run, network, _training(checkpoint), str(given.get("fold", "0")))


def _origin(checkpoint: Json, file: Path) -> tuple[str, str, tuple[int, ...]]:
    """Trainer, configuration and mirror axes of a checkpoint.

    Raises
    ------
    UserError : it is none of nnU-Net v2.
    """
    try:
        configuration = str(checkpoint["init_args"]["configuration"])
        trainer, axes = str(checkpoint["trainer_name"]), checkpoint.get("inference_allowed_mirroring_axes") or ()
    except (KeyError, TypeError) as error:
        raise UserError(f"is no checkpoint of nnU-Net v2 (lacks {error})", file) from None
    return trainer, configuration, tuple(axes)


def _plan_and_run(plans: Json, dataset: Json, checkpoint: Json, file: Path, source: Path) -> tuple[Plan, Json]:
    """The plan of a checkpoint's configuration, and a run.json without date and versions; `source` holds the plans."""
    from nnunet_lite.models.nnunet_weights import norm_of

    trainer, configuration, axes = _origin(checkpoint, file)
    plan = _plan(plans, dataset, configuration, source)
    planned = plan.configuration(configuration)
    network = planned.network.model_copy(update={"norm": norm_of(checkpoint[_WEIGHTS])})
    planned = planned.model_copy(update={"network": network})
    plan = plan.model_copy(update={"configurations": {**plan.configurations, configuration: planned}})
    same = InferenceSettings(sums="float16")  # or maps would differ from nnU-Net's in close races
    settings = Settings(recipe=trainer, augmentation=AugmentationSettings(mirror_axes=axes), inference=same)
    run = {"format": FORMAT, "configuration": configuration, "seed": 0, "settings": settings.model_dump(mode="json")}
    if planned.previous_stage is not None:  # nnU-Net calls a model's folder trainer__plans__configuration
        run["previous"] = f"{file.absolute().parents[1].name.rpartition('__')[0]}__{planned.previous_stage}"
    return plan, {**run, "imported_from": "nnU-Net"}


def _plan(plans: Json, dataset: Json, configuration: str, file: Path) -> Plan:
    """The plan of a configuration and of the previous stages that it needs; others may be what we cannot follow."""
    needed: dict[str, Json] = {}
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
    from nnunet_lite.models.checkpoint import load_weights
    from nnunet_lite.models.nnunet_weights import to_nnunet
    from nnunet_lite.networks.build import build_network

    plan, run = read_model(folder)
    configuration, settings = str(run["configuration"]), Settings.model_validate(run["settings"])
    if settings.network.factory is not None:
        raise UserError(f"has a network made by {settings.network.factory}, which nnU-Net has not", folder)
    files = sorted(folder.glob(f"fold_*/{MODEL}"))
    if not files:
        raise UserError("has no trained fold", folder, "Train one with `nnlite train`.")
    dataset = {**read_json(folder / "dataset.json"), "labels": _labels_for_nnunet(plan.labels)}
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
            torch.save(checkpoint, partial / file.parent.name / _file("final"))


def _labels_for_nnunet(labels: Labels) -> Json:
    """The labels of dataset.json as nnU-Net demands them: "background" is 0, and ignore follows the last value.

    Labels have the values that nnU-Net writes: class numbers. Regions keep theirs where nnU-Net accepts them.
    """
    ordered = (BACKGROUND, *labels.region_names)
    values: Sequence[int | tuple[int, ...]]
    if not labels.has_regions:
        changes = ", ".join(f"{ordered[i]} {value} -> {i}" for i, value in enumerate(labels.values) if value != i)
        if changes:
            log.info(f"nnU-Net numbers labels from 0 and will write: {changes}")
        values, ignore = range(labels.n_classes), labels.ignore_class
    elif labels.background == 0 and labels.ignore in (None, max(labels.values) + 1):
        values, ignore = (0, *labels.region_values), labels.ignore
    else:
        values, ignore = (0, *labels.region_classes), labels.ignore_class
    names = dict(zip(ordered, values, strict=True))
    return Labels(names=names, ignore=ignore, region_order=labels.region_order).to_json()


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
def _whole(out: Path, aside: bool = False) -> Iterator[Path]:
    """A temporary folder beside `out` that takes its place when the block ends well, and is gone when it does not.

    Parameters
    ----------
    aside : set what is there aside, rather than refuse.
    """
    taken = out.exists() and (out.is_file() or any(out.iterdir()))
    if taken and not aside:
        raise UserError("is there already", out, "Choose another --output, or delete it.")
    with scratch(out.absolute().parent) as temporary:
        partial = temporary / out.name
        partial.mkdir()
        with must_fit(out, partial):
            yield partial
        if taken:
            log.info(f"the model that was there is kept in {set_aside(out)}")
        partial.replace(out)


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
