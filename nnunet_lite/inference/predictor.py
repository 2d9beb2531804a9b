"""Load a trained model and predict images with it. Read this file from top to bottom.

`load` reads a plan and the networks of some folds. `prepare_image` preprocesses an image for them. `segment` predicts
it: it plans the memory (memory.py), runs the networks on overlapping windows (sliding_window.py), and decides the label
map slab by slab (outputs.py).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from os import PathLike
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import nn

from nnunet_lite import log
from nnunet_lite.data.images import Image
from nnunet_lite.data.problems import few, html_table
from nnunet_lite.errors import UserError, naming
from nnunet_lite.inference.cases import as_classes, as_image, check_channels
from nnunet_lite.inference.features import FEATURES
from nnunet_lite.inference.memory import PredictionTask, plan_memory
from nnunet_lite.inference.outputs import ExtraMaps, NewMap, parse_label_names, predict_label_map
from nnunet_lite.inference.quality import Quality, read_quality
from nnunet_lite.inference.segmentation import Segmentation
from nnunet_lite.inference.sliding_window import SlidingWindow
from nnunet_lite.models.argument import find_model, unpacked
from nnunet_lite.models.checkpoint import load_weights
from nnunet_lite.models.folder import (
    MODEL,
    QUALITY,
    Checkpoint,
    is_finished,
    is_nnunet,
    other_folds,
    stage_path,
    trained_folds,
    warn_of_other_weights,
    weights_fingerprint,
)
from nnunet_lite.models.lookup import model_fingerprint, read_headers, read_model
from nnunet_lite.models.nnunet import nnunet_checkpoints, read_nnunet
from nnunet_lite.networks.build import build_network
from nnunet_lite.networks.cpu import speed_up_on_cpu
from nnunet_lite.networks.devices import computes_bf16, has_bf16, pick_device, require_working, use_allowed_cpus
from nnunet_lite.networks.precision import ComputeFormat, apply_format, list_formats, pick_fastest
from nnunet_lite.networks.unet import EncoderDecoder, set_deep_supervision
from nnunet_lite.planning.schema import Configuration, Plan
from nnunet_lite.planning.swaps import ClassSwap, swap_of
from nnunet_lite.preprocessing.pipeline import Placement, Preprocessed, preprocess_image
from nnunet_lite.settings import InferenceSettings, Settings, with_changes
from nnunet_lite.system import GB
from nnunet_lite.training.splits import ALL
from nnunet_lite.workspace import is_model_of, workspace_folder


@dataclass(frozen=True)
class Predictor:
    """A trained configuration with the networks of one or more folds, ready to predict.

    `predictor(array, spacing)` or `predictor("scan.nii.gz")` returns the label map (z, y, x), a `Segmentation`.

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
    first_stage : Predictor, optional
        Of a cascade: it predicts an image before this model does.
    swap : ClassSwap, optional
        Labels that change places in mirrored copies.
    partners : tuple of Predictor
        Models whose probabilities are averaged with those of this one.
    of_nnunet : bool
        Whether nnU-Net trained it, so that it predicts as it does there.
    fingerprint : str
        Hash of its plan and weights.
    quality : Quality, optional
        What `nnlite select` calibrated for exactly these models and weights.
    calibrated_as : str
        The name of the model there.
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
    first_stage: Predictor | None = None
    swap: ClassSwap | None = None
    partners: tuple[Predictor, ...] = ()
    of_nnunet: bool = False
    fingerprint: str = ""
    quality: Quality | None = None
    calibrated_as: str = ""

    def __str__(self) -> str:
        first = "" if self.first_stage is None else f"{self.first_stage}, then "
        partners = "".join(f" and {partner}" for partner in self.partners)
        return f"{first}{self.folder} (fold {', '.join(self.folds)}){partners}"

    def __repr__(self) -> str:
        channels, labels = [channel.name for channel in self.plan.channels], self.plan.labels.region_names
        what = f"{self}, {self.configuration_name} of {self.plan.dataset} on {self.device}"
        return f"model: {what}\nchannels: {few(channels, 8)}\nlabels: {few(labels, 8)}"

    def _repr_html_(self) -> str:
        return html_table([line.split(": ", 1) for line in repr(self).splitlines()])

    @property
    def configuration(self) -> Configuration:
        return self.plan.configuration(self.configuration_name)

    @property
    def labels(self) -> Mapping[str, Any]:
        """The labels and their values; of a region, the values that it unites."""
        return self.plan.labels.names

    @property
    def skip_empty(self) -> bool:
        """Whether windows of zeros are background, and are not computed."""
        if self.settings.skip_empty != "auto":
            return self.settings.skip_empty
        as_nnunet = self.of_nnunet and self.device.type != "cpu"  # it computes them, and on a GPU they take little time
        return any(channel.use_mask for channel in self.plan.channels) and not as_nnunet

    def add_quality_maps(self, maps: ExtraMaps = ExtraMaps()) -> ExtraMaps:
        """Return maps together with those from which the quality of a prediction is judged."""
        by_fold = maps.uncertainty and maps.disagreement
        return ExtraMaps(maps.probabilities, uncertainty=True, disagreement=by_fold, of_models=bool(self.partners))

    def __call__(
        self, image: Any, spacing: Sequence[float] | None = None, *, probabilities: str | None = None
    ) -> Segmentation:
        """Segment an image.

        Parameters
        ----------
        image : str, Path, Image or array_like
            A file, an image, or an array (z, y, x) or (channels, z, y, x): of numpy, of torch, or nested lists.
        spacing : sequence of float, optional
            Voxel size (z, y, x) of an array in mm; by default 1 mm, which is logged once.
        probabilities : str, optional
            Labels whose probabilities are kept: "all", or names with commas.

        Returns
        -------
        Segmentation, shape (z, y, x)
            The label map, with the values of the dataset; a numpy array.

        Raises
        ------
        UserError
            The image cannot be read, has other channels than the model, or contains NaN or infinite voxels; a label is
            unknown; or the networks compute such values.
        """
        file = Path(image) if isinstance(image, str | PathLike) else None
        with nullcontext() if file is None else naming(file):
            names = () if probabilities is None else parse_label_names(probabilities, self.plan.labels)
            given = as_image(image, spacing, self.plan)
            label_map, maps = segment(self, prepare_image(self, given), maps=ExtraMaps(names))
        later = None if maps else partial(self, file or replace(given, array=given.array.copy()))  # it may be changed
        return Segmentation(label_map, given.geometry, self.plan.labels, maps, later, file)


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
    judging: bool = False,
) -> Predictor:
    """Load a model, of nnlite or of nnU-Net.

    Parameters
    ----------
    model : str, Path or sequence of them
        A model folder, a zip, or the name of a model in the workspace, as for `find_model`. Several models vote with
        the mean of their probabilities.
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
    judging : bool
        Read what `select` calibrated, from which `nnlite predict` judges its label maps.

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
    load_one = partial(_load_model, with_first_stage=first_stage, judging=judging)
    predictors = [load_one(path, folds, device, settings or {}, checkpoint, trusted) for path in paths]
    for path, other in zip(paths[1:], predictors[1:], strict=True):
        check_vote(predictors[0].plan, other.plan, paths[0], path)
    quality = predictors[0].quality
    if quality is not None:
        names = list(quality.weights)
        same = all(one.quality == quality for one in predictors)
        if same and sorted(one.calibrated_as for one in predictors) == sorted(names):
            predictors.sort(key=lambda one: names.index(one.calibrated_as))  # the first one describes the image
        else:
            log.info(f"{paths[0] / QUALITY} is of {' and '.join(names)}, not of what predicts now, so unused")
            quality = None
    return replace(predictors[0], partners=tuple(predictors[1:]), quality=quality)


@dataclass(frozen=True)
class _Trained:
    """What a model folder contains: its plan, run.json, and of each fold the network and the header of its weights."""

    plan: Plan
    run: dict[str, Any]
    networks: dict[str, nn.Module]
    headers: dict[str, dict[str, Any]]

    @property
    def header(self) -> dict[str, Any]:
        return next(reversed(self.headers.values()), {})

    @property
    def configuration(self) -> Configuration:
        return self.plan.configuration(self.run["configuration"])

    @property
    def of_nnunet(self) -> bool:
        return "imported_from" in self.run


def _load_model(
    path: Path,
    folds: Sequence[str | int] | None,
    device: str | None,
    changes: dict[str, Any],
    checkpoint: Checkpoint,
    trusted: Callable[[Path], bool],
    with_first_stage: bool = True,
    judging: bool = False,
) -> Predictor:
    """Load one model, and the first stage of a cascade. `trusted` says whether a model folder may run code."""
    first_stage = None
    with unpacked(path, checkpoint) as folder:
        trained = _read_nnunet(folder, folds, checkpoint) if is_nnunet(folder) else _read(folder, folds, trusted)
        fingerprint = model_fingerprint(folder, trained.networks, checkpoint)
        quality, name = _find_quality(folder, trained) if judging else (None, "")
        if with_first_stage and trained.configuration.previous_stage is not None:
            first = _find_first_stage(folder, trained)
            first_stage = _load_model(first, None, device, changes, checkpoint, trusted)
            if folder != path:  # it was unpacked from the same zip
                first_stage = replace(first_stage, folder=path.absolute().with_name(first.name))
    settings = Settings.model_validate(trained.run["settings"])
    inference = with_changes(settings, changes, sections=("inference",)).inference
    use_allowed_cpus()
    target, networks = require_working(pick_device(device)), list(trained.networks.values())
    for network in networks:
        set_deep_supervision(network, False)
        if target.type == "cpu":
            speed_up_on_cpu(network)
        network.to(target).eval().requires_grad_(False)
    arithmetic = _choose_arithmetic(trained, inference, target)
    for network in networks:
        apply_format(network, arithmetic, trained.configuration.dimensions)
    if inference.compile:
        networks = [cast(nn.Module, torch.compile(network)) for network in networks]
    dimensions = trained.configuration.dimensions
    mirror_axes = settings.augmentation.mirrored_axes(dimensions)
    if inference.mirroring and "inference.mirroring" in changes and not mirror_axes:
        log.warn(f"{path.name} was trained without mirrored images: --mirroring changes nothing")
    return Predictor(
        folder=path,
        plan=trained.plan,
        configuration_name=trained.run["configuration"],
        folds=tuple(trained.networks),
        networks=tuple(networks),
        mirror_axes=mirror_axes,
        settings=inference,
        device=target,
        arithmetic=arithmetic,
        first_stage=first_stage,
        swap=swap_of(trained.plan, settings.augmentation, dimensions),
        of_nnunet=trained.of_nnunet,
        fingerprint=fingerprint,
        quality=quality,
        calibrated_as=name,
    )


def _find_quality(folder: Path, trained: _Trained) -> tuple[Quality | None, str]:
    """Read what was calibrated for a model, and its name there; None if it is of other weights, labels or features."""
    if (quality := read_quality(folder)) is None:
        return None, ""
    weights = {weights_fingerprint(folder, fold) for fold in trained.networks}
    if quality.features == FEATURES and trained.plan.labels.region_names == tuple(quality.presence):
        for name, folds in quality.weights.items():
            if weights <= set(folds.values()):
                return quality, name
    what = "of other weights, labels or features, so unused; `nnlite select` makes it again"
    if ALL in trained.networks:
        what = "of folds that hold out cases, so unused: fold all holds out none"
    log.info(f"{folder / QUALITY} is {what}")
    return None, ""


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
    headers, networks = read_headers(folder, plan, run["configuration"], names), {}
    for fold in names:
        networks[fold] = build_network(plan, run["configuration"], factory)
        load_weights(folder / f"fold_{fold}" / MODEL, networks[fold])
    return _Trained(plan, run, networks, headers)


def _read_nnunet(folder: Path, folds: Sequence[str | int] | None, checkpoint: Checkpoint) -> _Trained:
    """Read a model folder of nnU-Net: plans.json, dataset.json, fold_k/checkpoint_final.pth."""
    files = nnunet_checkpoints(folder, folds, checkpoint)
    used = trained_folds(folder, checkpoint) if folds is None else files
    read = list(read_nnunet(files[fold] for fold in used))
    return _Trained(read[0].plan, read[0].run, dict(zip(used, (fold.network for fold in read), strict=True)), {})


def _find_first_stage(folder: Path, second: _Trained) -> Path:
    """Return the model folder of a cascade's first stage, next to the model folder of the second stage.

    Raises
    ------
    UserError
        It is missing, not trained, or of another configuration.
    """
    stage, first = second.configuration.previous_stage, stage_path(folder, second.run)
    if first is None:
        raise UserError(f"does not name its first stage, a model of {stage}", folder / "run.json", "Train it again.")
    fix = f"It is the first stage of {folder.name}: put it back next to it, or train it with `nnlite train {stage}`."
    if is_nnunet(first):
        return first
    if not trained_folds(first):
        raise UserError("contains no trained model", first, fix)
    plan, run = read_model(first)
    if (run["configuration"], plan.labels.meaning) != (stage, second.plan.labels.meaning):
        raise UserError(f"is no model of {stage} for the labels of {folder.name}", first, fix)
    for name, header in second.headers.items():
        warn_of_other_weights(folder / f"fold_{name}", first, header.get("first_stage", {}))
    return first


def check_vote(plan: Plan, other: Plan, path: Path, other_path: Path) -> None:
    """Refuse models that cannot vote together. Within a dataset labels may have been renamed."""
    fix = "Models vote together on the same labels and channels, such as configurations of one plan."
    renamed = plan.dataset == other.dataset
    one, another = (
        {
            "labels": p.labels.meaning if renamed else p.labels,
            "axis order": p.axis_order,
            "channels": [channel.name for channel in p.channels],
        }
        for p in (plan, other)
    )
    if differing := [what for what in one if one[what] != another[what]]:
        raise UserError(f"has other {differing[0]} than {path}", other_path, fix)


def _choose_arithmetic(trained: _Trained, settings: InferenceSettings, device: torch.device) -> ComputeFormat:
    """Choose by model and device alone, so that a model always predicts the same.

    On the kind of device that trained the model it is what the training chose. Otherwise, on a CPU: bf16 if the CPU has
    instructions for it and the model was not trained in fp32; fp32 for all others, and for models of nnU-Net, as there.
    On a GPU: bf16 if it has that, otherwise fp16; for models of nnU-Net fp16, as there. Only the memory format is
    timed, and that on a GPU: on a CPU our layers are made for channels-last. But with `--precision fp32` a model of
    nnU-Net has nnU-Net's memory format, in which it decides close races as there.
    """
    precision, of_nnunet, planned = settings.precision, trained.of_nnunet, trained.configuration
    channels_last: bool | str = "auto"
    if device.type == "cpu":
        channels_last = not (of_nnunet and precision == "fp32")
        trained_in = trained.header.get("arithmetic", {}).get("precision", "fp32")
        if precision == "auto" and trained_in == "fp32":
            precision = "fp32"
    elif device.type == "cuda" and precision == "auto":
        uses_bf16 = not of_nnunet and has_bf16(device) and computes_bf16(device, *planned.first_convolution)
        precision = "auto" if uses_bf16 else "fp16"
    network = next(iter(trained.networks.values()))
    options = list_formats(device, precision, channels_last, right_with_amx=isinstance(network, EncoderDecoder))
    if trained.header.get("device") == device.type:
        same = ComputeFormat(**trained.header["arithmetic"])
        same = same if settings.precision == "auto" else replace(same, precision=precision)
        same = same if settings.compile else replace(same, plain_norm=False)  # it would need twice the memory
        if same.precision in [option.precision for option in options]:
            return same
    if device.type == "cpu":
        return options[0]
    window = torch.zeros(1, trained.plan.n_inputs(trained.run["configuration"]), *planned.patch_size, device=device)

    def prepare(arithmetic: ComputeFormat) -> Callable[[], None]:
        def predict() -> None:
            with torch.inference_mode(), arithmetic.search_algorithms(), arithmetic.autocast(device):
                network(arithmetic.arrange(window))

        apply_format(network, arithmetic, planned.dimensions)
        return predict

    return pick_fastest(options, prepare, device)


# ---------------------------------------------------------------------------------------------------------- predicting


@dataclass(frozen=True)
class PreparedImage:
    """An image as the networks of a predictor take it.

    Parameters
    ----------
    arrays : tuple of Preprocessed
        For the model and each of its partners; for a cascade, those of its first stage.
    second_arrays : tuple of (Preprocessed or None)
        For the second stage of each cascade.
    image : Image, optional
        The image as it was read, if a cascade of nnU-Net preprocesses it with the label map of the first stage.
    """

    arrays: tuple[Preprocessed, ...]
    second_arrays: tuple[Preprocessed | None, ...] = (None,)
    image: Image | None = None

    @property
    def nbytes(self) -> int:
        arrays = (array.image for array in (*self.arrays, *self.second_arrays) if array is not None)
        return sum(array.nbytes for array in arrays) + (0 if self.image is None else self.image.array.nbytes)


def prepare_image(predictor: Predictor, image: Image) -> PreparedImage:
    """Check and preprocess an image.

    Raises
    ------
    UserError
        As `check_channels`, and `preprocess_image`.
    """
    check_channels(image, predictor.plan)
    made: list[tuple[Predictor, Preprocessed]] = []

    def preprocess(model: Predictor) -> Preprocessed:
        for other, array in made:
            if (other.plan, other.configuration) == (model.plan, model.configuration):
                return array
        made.append((model, preprocess_image(image, None, model.plan, model.configuration)))
        return made[-1][1]

    models = (predictor, *predictor.partners)
    arrays = tuple(preprocess(model.first_stage or model) for model in models)
    seconds = tuple(preprocess(model) if model.first_stage and not model.of_nnunet else None for model in models)
    needs_image = any(model.first_stage and model.of_nnunet for model in models)
    return PreparedImage(arrays, seconds, image if needs_image else None)


def segment(
    predictor: Predictor,
    prepared: PreparedImage,
    stage_classes: np.ndarray | None = None,
    maps: ExtraMaps = ExtraMaps(),
    new_map: NewMap = partial(np.zeros, dtype=np.uint8),
) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """Predict the label map of an image, and further maps.

    Parameters
    ----------
    predictor : Predictor
        The model, with its partners.
    prepared : PreparedImage
        The image, from `prepare_image`.
    stage_classes : ndarray, shape (z, y, x), optional
        Classes that the first stage predicts, on the grid of the network, if the predictor was loaded without it.
    maps : ExtraMaps
        Maps to make besides the label map.
    new_map : callable
        Returns zeros (z, y, x), uint8, of a shape.

    Returns
    -------
    label_map, extra
        As `predict_label_map`.

    Raises
    ------
    UserError
        The image does not fit into memory, or the networks compute values that are NaN or infinite.
    """
    settings, labels = predictor.settings, predictor.plan.labels
    models = []
    each = zip((predictor, *predictor.partners), prepared.arrays, prepared.second_arrays, strict=True)
    for model, array, second in each:
        if model.first_stage is None:
            classes = stage_classes
        elif second is not None:
            classes, array = predict_on_grid(model.first_stage, array, second.placement), second
        else:  # as nnU-Net does
            assert prepared.image is not None  # `prepare_image` kept it
            first, _ = segment(model.first_stage, PreparedImage((array,)))
            array = preprocess_image(prepared.image, as_classes(first, labels), model.plan, model.configuration)
            classes = array.classes
        models.append(_make_tasks(model, array, classes, by_fold=maps.uncertainty and maps.disagreement))
    tasks = [task for of_model in models for task in of_model]
    if any(task.placement.turn != tasks[0].placement.turn for task in tasks):
        raise UserError("the models turn this image to different orientations", fix="Predict with one of them: -m.")
    limit = None if settings.max_memory is None else int(settings.max_memory * GB)
    plans = plan_memory(tasks, labels, settings.step_size, limit)
    for plan in plans[0]:
        _log_once(str(plan))
    return predict_label_map(models, plans, labels, maps, new_map, skip_empty=predictor.skip_empty)


def predict_on_grid(first_stage: Predictor, array: Preprocessed, second: Placement) -> np.ndarray:
    """Predict classes (z, y, x) with the first stage of a cascade on the grid of its second stage, as in its training.

    Parameters
    ----------
    first_stage : Predictor
        The first stage.
    array : Preprocessed
        An image as the first stage takes it.
    second : Placement
        The same image as the second stage takes it.

    Raises
    ------
    UserError
        As `Placement.on_grid`.
    """
    place = array.placement.on_grid(second)
    label_map, _ = segment(first_stage, PreparedImage((Preprocessed(array.image, None, place),)))
    return as_classes(label_map, first_stage.plan.labels)


def _make_tasks(
    model: Predictor, array: Preprocessed, stage_classes: np.ndarray | None, by_fold: bool
) -> list[PredictionTask]:
    """Give an image, and the classes of a first stage as its last channel, to all folds of a model or to each alone."""
    image = array.image
    if stage_classes is not None:
        image = np.concatenate([image, stage_classes[None]], dtype=np.float32)
    window = SlidingWindow(
        networks=model.networks,
        configuration=model.configuration,
        n_logits=model.plan.labels.n_channels,
        arithmetic=model.arithmetic,
        device=model.device,
        mirror_axes=model.mirror_axes if model.settings.mirroring else (),
        swap=model.swap,
        n_classes=None if stage_classes is None else model.plan.labels.n_classes,
        sums=torch.float16 if model.settings.sums == "float16" else torch.float32,
        compiled=model.settings.compile,
    )
    windows = [replace(window, networks=(network,)) for network in model.networks] if by_fold else [window]
    image = np.ascontiguousarray(image, np.float32)
    return [PredictionTask(one, image, array.placement, model.configuration.resampling) for one in windows]


@lru_cache
def _log_once(message: str) -> None:
    log.detail(message)
