"""A trained model: loading it, and predicting arrays and images with it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import lru_cache
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from nnunet_lite import log
from nnunet_lite.data.images import Image
from nnunet_lite.errors import UserError, naming
from nnunet_lite.inference.prepare import Ready, as_classes, as_image, ready_image
from nnunet_lite.models.folder import MODEL, is_finished, other_folds, read_run, trained_folds
from nnunet_lite.planning.schema import Configuration, Plan
from nnunet_lite.preprocessing.pipeline import Preprocessed, preprocess
from nnunet_lite.settings import AugmentationSettings, InferenceSettings, Settings, with_changes
from nnunet_lite.system import GB, free_memory, in_units
from nnunet_lite.workspace import is_model_of

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

    from nnunet_lite.inference.maps import NewMap, Wanted
    from nnunet_lite.inference.passes import Passes
    from nnunet_lite.inference.tiles import Sides
    from nnunet_lite.networks.precision import ComputeFormat


@dataclass(frozen=True)
class Model:
    """A trained configuration with the networks of one or more folds, ready to predict.

    `model(array, spacing)` or `model("scan.nii.gz")` returns the label map (z, y, x) with the data set's values.
    `previous` is the first stage of a cascade, which predicts an image before this model does; `sides` are the labels
    that change places in mirrored copies; `partners` are models whose probabilities are averaged with this one's.
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
    previous: Model | None = None
    sides: Sides | None = None
    partners: tuple[Model, ...] = ()

    def __str__(self) -> str:
        before = "" if self.previous is None else f"{self.previous}, then "
        partners = "".join(f" and {partner}" for partner in self.partners)
        return f"{before}{self.folder} (fold {', '.join(self.folds)}){partners}"

    @property
    def configuration(self) -> Configuration:
        return self.plan.configuration(self.configuration_name)

    def __call__(self, image: Any, spacing: Sequence[float] | None = None) -> np.ndarray:
        """Segment an image.

        Parameters
        ----------
        image : a file, an Image, or an array (z, y, x) or (channels, z, y, x): of numpy, of torch, or nested lists.
        spacing : of an array's voxels, (z, y, x), in mm; without it 1 mm is taken, which is logged once.

        Raises
        ------
        UserError : the image cannot be read or is none, has other channels than the model, or voxels that are NaN or
            infinite; or the networks compute such values.
        """
        with naming(image) if isinstance(image, str | PathLike) else nullcontext():
            return predict_image(self, as_image(image, spacing, self.plan))


def load(
    folder: str | Path,
    folds: Sequence[str | int] | None = None,
    device: str | None = None,
    settings: dict[str, Any] | None = None,
    *,
    alone: bool = False,
    trust_code: bool = False,
    workspace: Path | None = None,
) -> Model:
    """Load a model folder: plans.json, run.json, fold_k/model.safetensors.

    Parameters
    ----------
    folds : which; by default all that are trained. Of a cascade's first stage, which lies beside it, always all.
    settings : changes of the run's `inference` settings, e.g. {"inference.step_size": 0.75}.
    alone : leave out the first stage of a cascade, for whoever has its predictions.
    trust_code : run the code that makes the model's network, if `network.factory` names any.
    workspace : the models that are trained in it may run their code, too.

    Raises
    ------
    UserError : no model there, or not that fold, or not the first stage that it needs; or it names code that is not
        trusted.
    """
    folder = Path(folder)
    plan, run = read_model(folder)
    trained = Settings.model_validate(run["settings"])
    if trained.network.factory is not None and not trust_code:
        _must_be_own(folder, trained.network.factory, workspace)
    inference = with_changes(trained, settings or {}, sections=("inference",)).inference
    configuration = plan.configuration(run["configuration"])
    there = trained_folds(folder)
    wanted = there if folds is None else [str(fold) for fold in folds]
    missing = [fold for fold in wanted if not is_finished(folder / f"fold_{fold}")]
    if missing or not wanted:
        have = f"Trained folds: {', '.join(there)}." if there else "Train one with `nnlite train`."
        begun = [name for name in other_folds(folder, "") if not is_finished(folder / name)]
        if begun:
            have += f" {', '.join(begun)} is not finished; the same `nnlite train` command goes on with it."
        raise UserError(f"has no trained fold {', '.join(missing)}".rstrip(), folder, have)

    needs_first = configuration.previous_stage is not None and not alone
    first = _first_stage(folder, plan, run) if needs_first else None

    # torch takes seconds to import: mistakes are told before
    from nnunet_lite.models.checkpoint import load_weights
    from nnunet_lite.networks.build import build_network
    from nnunet_lite.networks.cpu import speed_up_on_cpu
    from nnunet_lite.networks.precision import ComputeFormat, pick_device, use_allowed_cpus
    from nnunet_lite.networks.unet import set_deep_supervision

    use_allowed_cpus()
    target = pick_device(device)
    networks, about = [], {}
    for fold in wanted:
        network = build_network(plan, run["configuration"], trained.network.factory)
        set_deep_supervision(network, False)
        about = load_weights(folder / f"fold_{fold}" / MODEL, network)
        if target.type == "cpu":
            speed_up_on_cpu(network)
        networks.append(network.to(target).eval().requires_grad_(False))
    mirrored = trained.augmentation.enabled and trained.augmentation.p_mirror > 0
    axes = trained.augmentation.mirror_axes if mirrored else ()
    model = Model(
        folder=folder,
        plan=plan,
        configuration_name=run["configuration"],
        folds=tuple(wanted),
        networks=tuple(networks),
        mirror_axes=tuple(range(configuration.dimensions)) if axes is None else axes,
        settings=inference,
        device=target,
        arithmetic=ComputeFormat(),
        previous=None
        if first is None
        else load(first, None, device, settings, trust_code=trust_code, workspace=workspace),
        sides=sides_of(plan, run["configuration"], trained.augmentation),
    )
    return replace(model, arithmetic=_choose_arithmetic(model, about))


def _must_be_own(folder: Path, factory: str, workspace: Path | None) -> None:
    """Refuse to run the code that a model names, unless the model is one of the workspace.

    Raises
    ------
    UserError : it is not.
    """
    if workspace is None or not is_model_of(workspace, folder):
        where = "of the workspace" if workspace is None else f"of the workspace {workspace}"
        what = f"names code to run (network.factory = {factory!r:.200}) and is no model {where}; the code was not run"
        raise UserError(what, folder, "If you trust that code, give --trust-code (Python: trust_code=True).")


def _first_stage(folder: Path, plan: Plan, run: dict[str, Any]) -> Path:
    """The model folder of the first stage of a cascade: the one beside it that it was trained with.

    Raises
    ------
    UserError : it is not there, not trained, or another one.
    """
    stage, name = plan.configuration(run["configuration"]).previous_stage, run.get("previous")
    if name is None:
        raise UserError(
            f"does not say which model of {stage} predicts before it", folder / "run.json", "Train it anew."
        )
    first = folder.parent / Path(name).name
    fix = f"It is the first stage of {folder.name}: put it back beside it, or train it with `nnlite train {stage}`."
    if not trained_folds(first):
        raise UserError("no model is trained here", first, fix)
    found, about = read_model(first)
    if (about["configuration"], found.labels) != (stage, plan.labels):
        raise UserError(f"is no model of {stage} for the labels of {folder.name}", first, fix)
    return first


def read_model(folder: Path) -> tuple[Plan, dict[str, Any]]:
    """The plan and the run.json of a model folder.

    Raises
    ------
    UserError : it is no model folder, or one of its files is not as nnlite writes it.
    """
    run = read_run(folder)
    return Plan.read(folder / "plans.json"), run


def predict_image(model: Model, image: Image) -> np.ndarray:
    """Label map (z, y, x) of an image, on its own grid, with the data set's values.

    Raises
    ------
    UserError : the image has another number of channels than the model.
    """
    return segment(model, ready_image(model, image))


def predict_preprocessed(model: Model, image: np.ndarray, previous: np.ndarray | None = None) -> Tensor:
    """Logits (channels, z, y, x), float32, of a preprocessed image (channels, z, y, x); mean over the folds.

    Parameters
    ----------
    previous : (z, y, x) classes, what the previous stage of a cascade predicts on the same grid.
    """
    from nnunet_lite.inference.streaming import predict_logits

    outputs = model.plan.labels.n_channels
    needed, free = outputs * image[0].size * 4, free_memory()
    if needed > free:
        what = f"its {outputs} logits per voxel need {in_units(needed)}, {in_units(free)} are free"
        raise UserError(what, fix="Use a machine with more memory.")
    passes = _passes(model, previous is not None, whole=True)
    return predict_logits(passes, _shown(image, previous), model.settings.step_size)


def _passes(model: Model, second: bool, *, whole: bool = False) -> Passes:
    """How the model sees an image; a `second` stage, with the classes of the first as its last channel."""
    from nnunet_lite.inference.passes import passes_of

    return passes_of(
        model.networks,
        model.configuration,
        model.plan.labels.n_channels,
        model.arithmetic,
        model.device,
        mirror_axes=model.mirror_axes if model.settings.mirroring else (),
        sides=model.sides,
        n_previous=model.plan.labels.n_classes if second else None,
        whole=whole,
        half=model.settings.sums == "float16",
        compiled=model.settings.compile,
    )


def _shown(image: np.ndarray, previous: np.ndarray | None) -> Tensor:
    """What a network is shown of a preprocessed image, and of the classes of a previous stage."""
    import torch

    channels = image if previous is None else np.concatenate([image, previous[None]], dtype=np.float32)
    return torch.from_numpy(np.ascontiguousarray(channels, np.float32))


def segment(
    model: Model,
    ready: Ready,
    previous: np.ndarray | None = None,
    wanted: Wanted | None = None,
    new_map: NewMap | None = None,
) -> np.ndarray:
    """Label map (z, y, x) of a prepared image.

    Parameters
    ----------
    previous : (z, y, x) what the previous stage of a cascade that was loaded alone predicts, on the network's grid.
    wanted, new_map : maps to make beside it, see `inference.maps`.
    """
    from nnunet_lite.inference.maps import Wanted, predict_maps
    from nnunet_lite.inference.memory import Request, plan_memory
    from nnunet_lite.inference.streaming import opened, predict_labels

    wanted = wanted or Wanted()
    members = (model, *model.partners)
    requests, images = [], []
    for member in members:
        prepared, before = _prepared(member, ready, previous)
        shown = _shown(prepared.image, before)
        for networks in [(network,) for network in member.networks] if wanted.uncertainty else [member.networks]:
            passes = _passes(replace(member, networks=networks), before is not None)
            requests.append(Request(passes, prepared.placement, member.configuration.resampling))
            images.append(shown)
    most = None if model.settings.max_memory is None else int(model.settings.max_memory * GB)
    footprints = plan_memory(requests, model.plan.labels, model.settings.step_size, most)
    for footprint in footprints:
        _tell(str(footprint))
    skip = _skips_empty(model)
    streams = [opened(*one, skip_empty=skip) for one in zip(requests, images, footprints, strict=True)]
    place, labels = requests[0].placement, model.plan.labels
    if any(request.placement.turn != place.turn for request in requests):
        raise UserError("the models turn this image to different orientations", fix="Predict with one of them: -m.")
    if len(streams) == 1 and not wanted:
        return predict_labels(streams[0], place, labels)
    left = iter(streams)
    models = [[next(left) for _ in range(len(m.networks) if wanted.uncertainty else 1)] for m in members]
    return predict_maps(models, place, labels, wanted, new_map or (lambda _: np.zeros(place.geometry.shape, np.uint8)))


def _prepared(model: Model, ready: Ready, previous: np.ndarray | None) -> tuple[Preprocessed, np.ndarray | None]:
    """An image as a model wants it; of a cascade with what its first stage says, on the grid of the second."""
    if model.previous is not None and ready.image is not None:
        before = as_classes(segment(model.previous, ready), model.plan.labels)
        prepared = preprocess(ready.image, before, model.plan, model.configuration)
        return prepared, prepared.classes
    if (ready.plan, ready.configuration) == (model.plan, model.configuration):
        return ready.prepared, previous
    assert ready.image is not None
    return preprocess(ready.image, None, model.plan, model.configuration), previous


def _skips_empty(model: Model) -> bool:
    skip = model.settings.skip_empty
    return any(channel.use_mask for channel in model.plan.channels) if skip == "auto" else skip


@lru_cache
def _tell(how: str) -> None:
    """Say it once, not for each image."""
    log.info(how)


def sides_of(plan: Plan, configuration: str, trained: AugmentationSettings) -> Sides | None:
    """The labels that changed places in training when left and right did."""
    from nnunet_lite.inference.tiles import Sides
    from nnunet_lite.training.swaps import channel_swap, swap_of

    planned = plan.configuration(configuration)
    swap = swap_of(plan, trained, planned.dimensions)
    if swap is None:
        return None
    classes = None if planned.previous_stage is None else swap.table
    return Sides(swap.axis, channel_swap(plan.labels, trained.mirror_swap), classes)


def _choose_arithmetic(model: Model, about: dict[str, Any]) -> ComputeFormat:
    """What the training chose, so that a model predicts the same each time; on another kind of device it is timed.

    On a CPU the layout is not: our normalisation, upsampling and convolution are made for channels-last. But where a
    model of nnU-Net is to be computed in fp32, close races are to be decided as nnU-Net decides them, hence its layout.
    """
    import torch

    from nnunet_lite.networks.precision import ComputeFormat, list_formats, pick_fastest

    like_nnunet = model.settings.sums == "float16" and model.settings.precision == "fp32"
    layout = not like_nnunet if model.device.type == "cpu" else "auto"
    options = list_formats(model.device, model.settings.precision, layout)
    if about.get("device") == model.device.type:
        trained, asked = ComputeFormat(**about["arithmetic"]), model.settings.precision
        best = replace(trained, precision=trained.precision if asked == "auto" else asked)
        if best.precision in [option.precision for option in options]:
            _set_layout(model, best)
            return best
    configuration = model.configuration
    window = torch.zeros(
        1, model.plan.n_inputs(model.configuration_name), *configuration.patch_size, device=model.device
    )

    def prepare(arithmetic: ComputeFormat) -> Callable[[], None]:
        def predict() -> None:
            with torch.inference_mode(), arithmetic.autocast(model.device):
                model.networks[0](arithmetic.arrange(window))

        _set_layout(model, arithmetic)
        return predict

    best = pick_fastest(options, prepare, model.device)
    _set_layout(model, best)
    return best


def _set_layout(model: Model, arithmetic: ComputeFormat) -> None:
    for network in model.networks:
        network.to(memory_format=arithmetic.memory_format(model.configuration.dimensions))  # type: ignore[call-overload]
