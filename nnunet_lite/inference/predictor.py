"""Load a trained model and predict images with it. Read this file from top to bottom.

`load` reads a plan and the networks of some folds. `segment` predicts an image: it preprocesses it for each model
(`_tasks`), plans the memory (memory.py), runs the networks on overlapping windows (sliding_window.py), and writes a
label map slab by slab (outputs.py).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from os import PathLike
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn

from nnunet_lite import log
from nnunet_lite.data.images import Image
from nnunet_lite.errors import UserError, naming
from nnunet_lite.inference.cases import as_classes, as_image, check_image
from nnunet_lite.inference.memory import PredictionTask, plan_memory
from nnunet_lite.inference.outputs import ExtraMaps, NewMap, open_stream, predict_label_map, predict_maps
from nnunet_lite.inference.sliding_window import SlidingWindow, build_sliding_window, predict_logits
from nnunet_lite.inference.windows import LabelSwap
from nnunet_lite.models.bundle import require_final, unpacked
from nnunet_lite.models.checkpoint import load_weights
from nnunet_lite.models.folder import MODEL, is_finished, other_folds, trained_folds
from nnunet_lite.models.lookup import Checkpoint, default_folds, find_model, is_nnunet, nnunet_folds, read_model
from nnunet_lite.models.nnunet import nnunet_checkpoints, read_nnunet
from nnunet_lite.networks.cpu import speed_up_on_cpu
from nnunet_lite.networks.devices import pick_device, use_allowed_cpus
from nnunet_lite.networks.precision import ComputeFormat, list_formats, pick_fastest
from nnunet_lite.networks.unet import build_network, set_deep_supervision
from nnunet_lite.planning.schema import Configuration, Plan
from nnunet_lite.planning.swaps import swap_channels, swap_of
from nnunet_lite.preprocessing.pipeline import Preprocessed, preprocess_image
from nnunet_lite.settings import AugmentationSettings, InferenceSettings, Settings, with_changes
from nnunet_lite.system import GB, free_memory, in_units
from nnunet_lite.workspace import is_model_of, workspace_folder


@dataclass(frozen=True)
class Predictor:
    """A trained configuration with the networks of one or more folds, ready to predict.

    `predictor(array, spacing)` or `predictor("scan.nii.gz")` returns the label map (z, y, x), with the values of the
    dataset.

    Parameters
    ----------
    folder : Path
        Where the model was loaded from.
    plan : Plan
        Its plan.
    configuration_name : str
        Such as "3d_fullres".
    folds : tuple of str
        The folds whose logits are averaged.
    networks : tuple of Module
        The network of each fold.
    mirror_axes : tuple of int
        Axes of the patch that were mirrored in training.
    settings : InferenceSettings
        How to predict.
    device : torch.device
        Where the networks are.
    arithmetic : ComputeFormat
        Precision and memory format.
    previous : Predictor, optional
        The first stage of a cascade, which predicts an image before this model does.
    swap : LabelSwap, optional
        Labels that change places in mirrored copies.
    partners : tuple of Predictor
        Models whose probabilities are averaged with those of this one.
    """

    folder: Path
    plan: Plan
    configuration_name: str
    folds: tuple[str, ...]
    networks: tuple[nn.Module, ...]
    mirror_axes: tuple[int, ...]
    settings: InferenceSettings
    device: torch.device
    arithmetic: ComputeFormat
    previous: Predictor | None = None
    swap: LabelSwap | None = None
    partners: tuple[Predictor, ...] = ()

    def __str__(self) -> str:
        first = "" if self.previous is None else f"{self.previous}, then "
        partners = "".join(f" and {partner}" for partner in self.partners)
        return f"{first}{self.folder} (fold {', '.join(self.folds)}){partners}"

    @property
    def configuration(self) -> Configuration:
        return self.plan.configuration(self.configuration_name)

    def __call__(self, image: Any, spacing: Sequence[float] | None = None) -> np.ndarray:
        """Segment an image.

        Parameters
        ----------
        image : str, Path, Image or array_like
            A file, an image, or an array (z, y, x) or (channels, z, y, x): of numpy, of torch, or nested lists.
        spacing : sequence of float, optional
            Voxel size (z, y, x) of an array in mm; by default 1 mm, which is logged once.

        Returns
        -------
        ndarray, shape (z, y, x)
            The label map, with the values of the dataset.

        Raises
        ------
        UserError
            The image cannot be read, has other channels than the model, or contains NaN or infinite voxels; or the
            networks compute such values.
        """
        with naming(image) if isinstance(image, str | PathLike) else nullcontext():
            return segment(self, prepare_image(self, as_image(image, spacing, self.plan)))


# ------------------------------------------------------------------------------------------------------------- loading


def load(
    model: str | Path | Sequence[str | Path],
    folds: Sequence[str | int] | str | int | None = None,
    device: str | None = None,
    settings: dict[str, Any] | None = None,
    *,
    checkpoint: Checkpoint = "final",
    trust_code: bool = False,
    workspace: str | Path | None = None,
    first_stage: bool = True,
) -> Predictor:
    """Load a model, of nnlite or of nnU-Net.

    Parameters
    ----------
    model : str, Path or sequence of them
        A model folder, a zip, or the name of a model in the workspace. Several models vote with the mean of their
        probabilities.
    folds : str, int or sequence of them, optional
        By default all that are trained. All folds of a cascade's first stage are always used.
    device : str, optional
        Such as "cpu" or "cuda:1"; by default a GPU if there is one.
    settings : dict, optional
        Changes of the `inference` settings, such as {"inference.step_size": 0.75}.
    checkpoint : {"final", "best"}
        Of each fold of an nnU-Net model. Folds without it are left out, which is logged.
    trust_code : bool
        Run the code that makes the network, if `network.factory` names any. Without it only models in the workspace
        may run code.
    workspace : str or Path, optional
        By default NNLITE_WORKSPACE, or ./nnlite_workspace.
    first_stage : bool
        Load the first stage of a cascade too; without it, the caller gives its predictions.

    Returns
    -------
    Predictor
        `predictor(array, spacing)` or `predictor("scan.nii.gz")` segments an image.

    Raises
    ------
    UserError
        There is no model, no such fold, or no first stage; the models cannot vote together; or a model names code that
        is not trusted.
    """
    root = workspace_folder(None if workspace is None else Path(workspace))
    paths = [find_model(path, root) for path in ([model] if isinstance(model, str | Path) else model)]
    if not paths:
        raise UserError("no model folder is given")
    folds = [folds] if isinstance(folds, str | int) else folds
    trusted = (lambda _: True) if trust_code else partial(is_model_of, root)
    predictors = [_load_model(path, folds, device, settings or {}, checkpoint, trusted, first_stage) for path in paths]
    for path, other in zip(paths[1:], predictors[1:], strict=True):
        _check_vote(predictors[0].plan, other.plan, paths[0], path)
    return replace(predictors[0], partners=tuple(predictors[1:]))


def _load_model(
    path: Path,
    folds: Sequence[str | int] | None,
    device: str | None,
    changes: dict[str, Any],
    checkpoint: Checkpoint,
    trusted: Callable[[Path], bool],
    first_stage: bool = True,
) -> Predictor:
    """Load one model, and the first stage of a cascade. `trusted` says whether a model folder may run code."""
    with unpacked(path) as folder:
        require_final(path, folder, checkpoint)
        read = partial(_read_nnunet, checkpoint=checkpoint) if is_nnunet(folder) else partial(_read, trusted=trusted)
        plan, run, header, networks = read(folder, folds)
        previous = None
        if first_stage and plan.configuration(run["configuration"]).previous_stage is not None:
            first = _first_stage(folder, plan, run, checkpoint)
            previous = _load_model(first, None, device, changes, checkpoint, trusted)
            if folder != path:  # it was unpacked from the same zip
                previous = replace(previous, folder=path.absolute().with_name(first.name))
    trained = Settings.model_validate(run["settings"])
    use_allowed_cpus()
    target = pick_device(device)
    for network in networks.values():
        set_deep_supervision(network, False)
        if target.type == "cpu":
            speed_up_on_cpu(network)
        network.to(target).eval().requires_grad_(False)
    augmentation = trained.augmentation
    mirror_axes = augmentation.mirror_axes if augmentation.enabled and augmentation.p_mirror > 0 else ()
    dimensions = plan.configuration(run["configuration"]).dimensions
    predictor = Predictor(
        folder=path,
        plan=plan,
        configuration_name=run["configuration"],
        folds=tuple(networks),
        networks=tuple(networks.values()),
        mirror_axes=tuple(range(dimensions)) if mirror_axes is None else mirror_axes,
        settings=with_changes(trained, changes, sections=("inference",)).inference,
        device=target,
        arithmetic=ComputeFormat(),
        previous=previous,
        swap=label_swap(plan, run["configuration"], augmentation),
    )
    predictor = replace(predictor, arithmetic=_choose_arithmetic(predictor, header))
    if not predictor.settings.compile:
        return predictor
    return replace(predictor, networks=tuple(cast(nn.Module, torch.compile(network)) for network in networks.values()))


# plan, run.json, what the header of the weights says, and the network of each fold
_Trained = tuple[Plan, dict[str, Any], dict[str, Any], dict[str, nn.Module]]


def _read(folder: Path, folds: Sequence[str | int] | None, trusted: Callable[[Path], bool]) -> _Trained:
    """Read a model folder of nnlite: plans.json, run.json, fold_k/model.safetensors."""
    plan, run = read_model(folder)
    factory = Settings.model_validate(run["settings"]).network.factory
    if factory is not None and not trusted(folder):
        what = f"names code to run (network.factory = {factory!r:.200}) and is no model of the workspace"
        fix = "If you trust that code, give --trust-code (Python: trust_code=True)."
        raise UserError(f"{what}; the code was not run", folder, fix)
    names = trained_folds(folder) if folds is None else [str(fold) for fold in folds]
    missing = [fold for fold in names if not is_finished(folder / f"fold_{fold}")]
    if missing or not names:
        have = trained_folds(folder)
        fix = f"Trained folds: {', '.join(have)}." if have else "Train one with `nnlite train`."
        begun = [name for name in other_folds(folder, "") if not is_finished(folder / name)]
        if begun:
            fix += f" {', '.join(begun)} is not finished; the same `nnlite train` command resumes it."
        raise UserError(f"has no trained fold {', '.join(missing)}".rstrip(), folder, fix)
    header, networks = {}, {}
    for fold in names:
        networks[fold] = build_network(plan, run["configuration"], factory)
        header = load_weights(folder / f"fold_{fold}" / MODEL, networks[fold])
    return plan, run, header, networks


def _read_nnunet(folder: Path, folds: Sequence[str | int] | None, checkpoint: Checkpoint) -> _Trained:
    """Read a model folder of nnU-Net: plans.json, dataset.json, fold_k/checkpoint_final.pth."""
    files = nnunet_checkpoints(folder, folds, checkpoint)
    names = [file.parent.name.removeprefix("fold_") for file in files]
    used = names if folds is not None else default_folds(names)
    read = list(read_nnunet(file for file, name in zip(files, names, strict=True) if name in used))
    return read[0].plan, read[0].run, {}, dict(zip(used, (fold.network for fold in read), strict=True))


def _first_stage(folder: Path, plan: Plan, run: dict[str, Any], checkpoint: Checkpoint) -> Path:
    """Return the model folder of a cascade's first stage, next to the model folder of the second stage.

    Raises
    ------
    UserError
        It is missing, not trained, or of another configuration.
    """
    stage, name = plan.configuration(run["configuration"]).previous_stage, run.get("previous")
    if name is None:
        raise UserError(f"does not name its first stage, a model of {stage}", folder / "run.json", "Train it again.")
    first = folder.absolute().parent / Path(name).name
    fix = f"It is the first stage of {folder.name}: put it back next to it, or train it with `nnlite train {stage}`."
    if nnunet_folds(first, checkpoint):
        return first
    if not trained_folds(first):
        raise UserError("contains no trained model", first, fix)
    found, about = read_model(first)
    if (about["configuration"], found.labels) != (stage, plan.labels):
        raise UserError(f"is no model of {stage} for the labels of {folder.name}", first, fix)
    return first


def _check_vote(plan: Plan, other: Plan, path: Path, other_path: Path) -> None:
    """Refuse models that cannot vote together."""
    fix = "Models vote together on the same labels and channels, such as configurations of one plan."
    for what in ("labels", "axis_order"):
        if getattr(plan, what) != getattr(other, what):
            raise UserError(f"has other {what.replace('_', ' ')} than {path}", other_path, fix)
    if [channel.name for channel in plan.channels] != [channel.name for channel in other.channels]:
        raise UserError(f"has other channels than {path}", other_path, fix)


def label_swap(plan: Plan, configuration: str, augmentation: AugmentationSettings) -> LabelSwap | None:
    """Return the labels that changed places in training when left and right did."""
    planned = plan.configuration(configuration)
    swap = swap_of(plan, augmentation, planned.dimensions)
    if swap is None:
        return None
    classes = None if planned.previous_stage is None else swap.table
    return LabelSwap(swap.axis, swap_channels(plan.labels, augmentation.mirror_swap), classes)


def _choose_arithmetic(predictor: Predictor, header: dict[str, Any]) -> ComputeFormat:
    """Choose what the training chose, so that a model always predicts the same; on another kind of device, time it.

    On a CPU the memory format is not timed: our normalisation, upsampling and convolution are made for channels-last.
    But a model of nnU-Net in fp32 decides close races as nnU-Net does only in nnU-Net's memory format.
    """
    like_nnunet = predictor.settings.sums == "float16" and predictor.settings.precision == "fp32"
    channels_last = not like_nnunet if predictor.device.type == "cpu" else "auto"
    options = list_formats(predictor.device, predictor.settings.precision, channels_last)
    if header.get("device") == predictor.device.type:
        trained, precision = ComputeFormat(**header["arithmetic"]), predictor.settings.precision
        best = replace(trained, precision=trained.precision if precision == "auto" else precision)
        if best.precision in [option.precision for option in options]:
            _set_memory_format(predictor, best)
            return best
    patch, inputs = predictor.configuration.patch_size, predictor.plan.n_inputs(predictor.configuration_name)
    window = torch.zeros(1, inputs, *patch, device=predictor.device)

    def prepare(arithmetic: ComputeFormat) -> Callable[[], None]:
        def predict() -> None:
            with torch.inference_mode(), arithmetic.autocast(predictor.device):
                predictor.networks[0](arithmetic.arrange(window))

        _set_memory_format(predictor, arithmetic)
        return predict

    best = pick_fastest(options, prepare, predictor.device)
    _set_memory_format(predictor, best)
    return best


def _set_memory_format(predictor: Predictor, arithmetic: ComputeFormat) -> None:
    for network in predictor.networks:
        network.to(memory_format=arithmetic.memory_format(predictor.configuration.dimensions))  # type: ignore[call-overload]


# ---------------------------------------------------------------------------------------------------------- predicting


@dataclass(frozen=True)
class NetworkInput:
    """An image, preprocessed for the first network that predicts it.

    Parameters
    ----------
    preprocessed : Preprocessed
        The array of the network.
    plan : Plan
        The plan that it was preprocessed with.
    configuration : Configuration
        The configuration that it was preprocessed for.
    image : Image, optional
        The image as it was read, if other networks need it preprocessed in another way.
    """

    preprocessed: Preprocessed
    plan: Plan
    configuration: Configuration
    image: Image | None


def prepare_image(predictor: Predictor, image: Image) -> NetworkInput:
    """Check and preprocess an image.

    Raises
    ------
    UserError
        As `check_image`.
    """
    check_image(image, predictor.plan)
    first = predictor.previous or predictor
    preprocessed = preprocess_image(image, None, first.plan, first.configuration)
    needed = predictor.previous or predictor.partners
    return NetworkInput(preprocessed, first.plan, first.configuration, image if needed else None)


def segment(
    predictor: Predictor,
    given: NetworkInput,
    previous: np.ndarray | None = None,
    maps: ExtraMaps | None = None,
    new_map: NewMap | None = None,
) -> np.ndarray:
    """Predict the label map of an image.

    Parameters
    ----------
    predictor : Predictor
        The model, with its partners.
    given : NetworkInput
        The image, from `prepare_image`.
    previous : ndarray, shape (z, y, x), optional
        Classes that the first stage predicts, on the grid of the network, if the predictor was loaded without it.
    maps : ExtraMaps, optional
        Maps to write besides the label map.
    new_map : callable, optional
        Makes an empty map, see `predict_maps`.

    Returns
    -------
    ndarray, shape (z, y, x)
        Values of the dataset, on the image's own grid.

    Raises
    ------
    UserError
        The image does not fit into memory, or the networks compute values that are NaN or infinite.
    """
    maps = maps or ExtraMaps()
    settings, labels = predictor.settings, predictor.plan.labels
    models = [_tasks(model, given, previous, maps.uncertainty) for model in (predictor, *predictor.partners)]
    tasks = [task for model in models for task in model]
    placement = tasks[0].placement
    if any(task.placement.turn != placement.turn for task in tasks):
        raise UserError("the models turn this image to different orientations", fix="Predict with one of them: -m.")

    limit = None if settings.max_memory is None else int(settings.max_memory * GB)
    plans = plan_memory(tasks, labels, settings.step_size, limit)
    for plan in plans:
        _log_once(str(plan))

    masked = any(channel.use_mask for channel in predictor.plan.channels)
    skip_empty = masked if settings.skip_empty == "auto" else settings.skip_empty
    streams = iter([open_stream(task, plan, skip_empty=skip_empty) for task, plan in zip(tasks, plans, strict=True)])
    if len(tasks) == 1 and not maps:
        return predict_label_map(next(streams), placement, labels)
    new_map = new_map or (lambda _: np.zeros(placement.geometry.shape, np.uint8))
    return predict_maps([[next(streams) for _ in model] for model in models], placement, labels, maps, new_map)


def _tasks(
    predictor: Predictor, given: NetworkInput, previous: np.ndarray | None, by_fold: bool
) -> list[PredictionTask]:
    """Preprocess an image for a model, with the classes of its first stage: one task, or one for each fold."""
    preprocessed = given.preprocessed
    if predictor.previous is not None and given.image is not None:
        classes = as_classes(segment(predictor.previous, given), predictor.plan.labels)
        preprocessed = preprocess_image(given.image, classes, predictor.plan, predictor.configuration)
        previous = preprocessed.classes
    elif given.image is not None and (given.plan, given.configuration) != (predictor.plan, predictor.configuration):
        preprocessed = preprocess_image(given.image, None, predictor.plan, predictor.configuration)
    image = _stack(preprocessed.image, previous)
    folds = [(network,) for network in predictor.networks] if by_fold else [predictor.networks]
    windows = [_sliding_window(replace(predictor, networks=networks), previous is not None) for networks in folds]
    resampling = predictor.configuration.resampling
    return [PredictionTask(window, image, preprocessed.placement, resampling) for window in windows]


def _stack(image: np.ndarray, previous: np.ndarray | None) -> np.ndarray:
    """Return the input of a network: a preprocessed image, and the classes of a first stage as its last channel."""
    channels = image if previous is None else np.concatenate([image, previous[None]], dtype=np.float32)
    return np.ascontiguousarray(channels, np.float32)


def _sliding_window(predictor: Predictor, second: bool, whole: bool = False) -> SlidingWindow:
    """Build the sliding window of a model; of a `second` stage, whose last channel contains classes."""
    return build_sliding_window(
        predictor.networks,
        predictor.configuration,
        predictor.plan.labels.n_channels,
        predictor.arithmetic,
        predictor.device,
        mirror_axes=predictor.mirror_axes if predictor.settings.mirroring else (),
        swap=predictor.swap,
        n_previous=predictor.plan.labels.n_classes if second else None,
        whole=whole,
        half=predictor.settings.sums == "float16",
        compiled=predictor.settings.compile,
    )


@lru_cache
def _log_once(message: str) -> None:
    log.info(message)


def predict_preprocessed(predictor: Predictor, image: np.ndarray, previous: np.ndarray | None = None) -> Tensor:
    """Predict the logits of a preprocessed image.

    Parameters
    ----------
    predictor : Predictor
        The model; its first stage and its partners are not used.
    image : ndarray, shape (channels, z, y, x)
        The preprocessed image.
    previous : ndarray, shape (z, y, x), optional
        Classes that the first stage of a cascade predicts, on the same grid.

    Returns
    -------
    Tensor, shape (logits, z, y, x)
        float32, the mean over the folds.

    Raises
    ------
    UserError
        The logits do not fit into memory.
    """
    outputs = predictor.plan.labels.n_channels
    needed, free = outputs * image[0].size * 4, free_memory()
    if needed > free:
        what = f"its {outputs} logits per voxel need {in_units(needed)}, {in_units(free)} are free"
        raise UserError(what, fix="Use a machine with more memory.")
    window = _sliding_window(predictor, previous is not None, whole=True)
    return predict_logits(window, _stack(image, previous), predictor.settings.step_size)
