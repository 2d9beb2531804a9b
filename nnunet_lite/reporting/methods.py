"""Sentences for the methods section of a paper: each number is one of the plan, the settings or the scores."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from nnunet_lite.data.problems import plural
from nnunet_lite.evaluation.metrics import METRICS
from nnunet_lite.planning.schema import Channel, Plan
from nnunet_lite.planning.show import length_unit
from nnunet_lite.reporting.material import Material, ModelResults
from nnunet_lite.settings import Settings

CITATION = (
    "[1] Isensee F, Jaeger PF, Kohl SAA, Petersen J, Maier-Hein KH. nnU-Net: a self-configuring method for deep "
    "learning-based biomedical image segmentation. Nature Methods 18, 203-211 (2021). doi:10.1038/s41592-020-01008-z"
)
_OPTIMIZERS = {"sgd": "stochastic gradient descent", "adam": "Adam", "adamw": "AdamW"}
_NORMALIZATIONS = {
    "ct": "were clipped and standardised by the intensities of the labelled voxels of all training images",
    "zscore": "were standardised (z-score) in each image",
    "none": "were left as they are",
    "rescale_0_1": "were scaled to 0 to 1 in each image",
    "rgb_0_1": "were divided by 255",
}
_TRANSFORMS = {
    "p_rotation": "rotation", "p_scaling": "scaling", "p_noise": "Gaussian noise", "p_blur": "Gaussian blur",
    "p_brightness": "brightness", "p_contrast": "contrast", "p_low_resolution": "simulated low resolution",
    "p_gamma": "gamma",
}  # fmt: skip


def describe_methods(material: Material) -> list[str]:
    """Write a paragraph for each model that the predictions are made with, or for the best one, and the scores.

    Parameters
    ----------
    material : Material
        Of the report.
    """
    models = [model for model in material.trained if any(fold.rows for fold in model.folds)]
    if material.selection:
        models = [model for model in models if model.name in material.selection.models]
    else:
        models = models[:1]
    if not models:
        return []
    return [*(_describe_model(model) for model in models), *_describe_scores(material, models)]


def _describe_model(model: ModelResults) -> str:
    """Say how one model was made."""
    assert model.plan is not None  # it is a trained one
    plan, settings, versions = model.plan, Settings.model_validate(model.run["settings"]), model.run["versions"]
    programs = ", ".join(
        f"{name} {versions[key]}" for key, name in (("torch", "PyTorch"), ("python", "Python")) if key in versions
    )
    channels, references = _list([channel.name for channel in plan.channels]), _list(plan.labels.region_names)
    begin = (
        f"The model {model.name} was trained with nnunet_lite {versions.get('nnunet_lite', '')} ({programs}), an "
        f"implementation of the self-configuring method nnU-Net [1]. The dataset has {plural(plan.n_cases, 'case')} "
        f"with {plural(len(plan.channels), 'channel')} ({channels}) and references of {references}."
    )
    return " ".join([begin, _describe_input(plan, model.run["configuration"]), *_describe_training(model, settings)])


def _describe_input(plan: Plan, name: str) -> str:
    """Describe resampling, normalisation and network."""
    c, unit = plan.configuration(name), length_unit(plan)
    network, resampling = c.network, c.resampling
    same = len({channel.normalization for channel in plan.channels}) == 1
    normalized = [
        f"{_clipping(channel)}the intensities {'' if same else f'of {channel.name} '}"
        f"{_NORMALIZATIONS[channel.normalization]}{' inside the nonzero region' if channel.use_mask else ''}"
        for channel in plan.channels[: 1 if same else None]
    ]
    spacing = "" if set(c.spacing) == {1.0} and unit == "px" else (
        f"Images were resampled to a spacing of {_times(c.spacing, '.3g')} {unit} with splines of order "
        f"{resampling.image_order}, and "
    )  # fmt: skip
    text = f"{spacing}{_list(normalized)}. "
    kind = "U-Net with residual blocks" if network.kind == "residual" else "U-Net"
    norm = "no normalisation" if network.norm == "none" else f"{network.norm} normalisation"
    return text[0].upper() + text[1:] + (
        f"The network is a {c.dimensions}D {kind} with {plural(len(network.features), 'resolution stage')} of "
        f"{'-'.join(map(str, network.features))} feature maps, {norm} and "
        f"{'ReLU' if network.activation == 'relu' else 'leaky ReLU'}; it sees patches of {_times(c.patch_size)} "
        f"{'pixels' if c.dimensions == 2 else 'voxels'} in batches of {c.batch_size}."
    )  # fmt: skip


def _clipping(channel: Channel) -> str:
    limits = channel.clip_percentiles
    return "" if limits is None else f"after clipping to the percentiles {limits[0]:g} and {limits[1]:g}, "


def _describe_training(model: ModelResults, settings: Settings) -> list[str]:
    """Describe loss, optimiser, schedule, length, augmentation and inference."""
    t, loss, optimizer, schedule = settings.training, settings.loss, settings.optimizer, settings.schedule
    terms = [("cross_entropy", "cross-entropy"), ("dice", "soft Dice"), ("top_k", "top-k cross-entropy"),
             ("bce", "binary cross-entropy")]  # fmt: skip
    weighed = [(getattr(loss, key), name) for key, name in terms if getattr(loss, key)]
    names = [name if weight == 1 else f"{weight:g} times {name}" for weight, name in weighed]
    momentum = f" with Nesterov momentum {optimizer.momentum:g}" if optimizer.name == "sgd" else ""
    decay = {"poly": f"polynomial decay (power {schedule.power:g})", "cosine": "cosine decay",
             "constant": "no decay", "plateau": "reductions on plateaus"}[schedule.name]  # fmt: skip
    lengths = sorted(fold.rows[-1]["epoch"] for fold in model.folds if fold.rows)
    epochs = f"{lengths[0]}" if lengths[0] == lengths[-1] else f"{lengths[0]} to {lengths[-1]}"
    sentences = [
        f"The loss was the sum of {_list(names)}{', with deep supervision' if t.deep_supervision else ''}."
        if len(names) > 1 else f"The loss was {names[0]}{', with deep supervision' if t.deep_supervision else ''}.",
        f"It was minimised by {_OPTIMIZERS[optimizer.name]}{momentum}, an initial learning rate of {optimizer.lr:g}, "
        f"{decay} and a weight decay of {optimizer.weight_decay:g}, for {epochs} epochs of {t.iterations} steps.",
    ]  # fmt: skip
    if optimizer.ema is not None:
        sentences.append(f"The model is the moving average of the weights (decay {optimizer.ema:g}).")
    augmentation = settings.augmentation
    used = [name for key, name in _TRANSFORMS.items() if getattr(augmentation, key)]
    used += ["mirroring"] if augmentation.mirrored_axes(3) else []
    if augmentation.enabled and augmentation.pipeline == "native" and used:
        sentences.append(f"Patches were augmented by random {_list(used)}.")
    mirrored = settings.inference.mirroring and bool(augmentation.mirrored_axes(3))
    sentences.append(
        f"Images were predicted in overlapping windows, {settings.inference.step_size:g} of the patch apart"
        f"{', averaged over mirrored copies' if mirrored else ''}."
    )
    return sentences


def _describe_scores(material: Material, models: Sequence[ModelResults]) -> list[str]:
    """Say on which held-out cases the result was measured, and the scores."""
    selected = "+".join(material.selection.models) if material.selection else models[0].name
    result = next((model for model in material.scored if model.name == selected), None)
    if result is None:
        return []
    folds = sorted(set(result.fold_of.values()))
    parts = []
    for name, unit in (("Dice", ""), ("NSD", ""), ("HD95", f" {material.units.length}")):
        statistic = result.scores.foreground(name)
        if statistic.mean is None or statistic.median is None:
            continue
        scale = material.units.per_mm if METRICS[name].unit == "length" else 1
        interval = "" if statistic.low is None or statistic.high is None else (
            f"95 % interval {scale * statistic.low:.3g} to {scale * statistic.high:.3g}, "
        )  # fmt: skip
        what = f"{name} at {result.scores.tolerance:g} {result.scores.unit}" if name == "NSD" else name
        parts.append(
            f"{what} {scale * statistic.mean:.3g}{unit} ({interval}median {scale * statistic.median:.3g}{unit})"
        )
    text = (
        f"In {'fold' if len(folds) == 1 else 'folds'} {_list(folds)} of the cross-validation, {result.label} reached "
        f"on {plural(len(result.scores.rows), 'held-out case')}, on average over the labels: {_list(parts)}."
    )
    rules = material.selection.postprocessing if material.selection else {}
    kept = [f"{rule} of {label}" for label, rule in rules.items()]
    return [text + (f" Postprocessing keeps {_list(kept)}; these scores are before it." if kept else "")]


def _list(names: Sequence[Any]) -> str:
    """Join names as in a sentence."""
    texts = list(map(str, names))
    return texts[0] if len(texts) == 1 else f"{', '.join(texts[:-1])} and {texts[-1]}"


def _times(values: Sequence[float], number_format: str = "g") -> str:
    return " × ".join(f"{value:{number_format}}" for value in values)
