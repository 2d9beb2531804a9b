"""Turn a dataset's fingerprint into its plan by nnU-Net's rules: plain arithmetic, milliseconds, no network is built.

Read `make_plan` first, then `_plan_configurations` and `_plan_configuration`. `override_sizes` and `limit_sizes` change
the patch or batch of a planned configuration. Sources: Isensee et al., nnU-Net, Nature Methods 2021
(doi:10.1038/s41592-020-01008-z), and for the residual-encoder presets Isensee et al., nnU-Net Revisited, MICCAI 2024
(arXiv:2404.09556). Plans equal those of nnU-Net 2.8.1 in every field, but for single slices, which are the first axis.
Presets of MedNeXt (Roy et al. 2023, arXiv:2303.09975) have a budget that a patch of 128x128x128 and batch of 2 fill.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod

import numpy as np

from nnunet_lite import log
from nnunet_lite.data.labels import Labels
from nnunet_lite.errors import UserError, suggest
from nnunet_lite.planning import topology as rules
from nnunet_lite.planning.fingerprint import Fingerprint
from nnunet_lite.planning.memory import network_layers, with_memory
from nnunet_lite.planning.schema import NORMALIZATIONS, Channel, Configuration, Kind, Network, Options, Plan
from nnunet_lite.planning.topology import EXPANSION, Topology, join_by_x

ANISOTROPY = 3  # an axis is coarse when its voxels are this much longer, and this much fewer, than along the others
SMALL_AFTER_CROP = 0.75  # below this median relative size after cropping, z-scores are taken inside the nonzero mask
START_VOXELS = {2: 2048**2, 3: 256**3}  # of the first patch tried, isotropic in mm
REFERENCE_BATCH = {2: 12, 3: 2}  # the batch size that the feature-map counts of a preset refer to, by dimension
MIN_BATCH = 2
_BATCH_DICE = "Dice is taken over the batch: a patch sees little of an image"
LOWRES_BELOW = 0.25  # 3d_lowres is planned where a patch covers less than this share of the median image
LOWRES_STEP = 1.03

_SCHEMES = {normalization.channel_name: scheme for scheme, normalization in NORMALIZATIONS.items()}
_AXIS = "zyx"


@dataclass(frozen=True)
class PlannerPreset:
    """The constants of one of nnU-Net's planners, or of a size of MedNeXt.

    Parameters
    ----------
    kind : {"plain", "residual", "mednext_s", "mednext_b", "mednext_m", "mednext_l"}
        The blocks.
    memory_gb : float
        Budget in GB that `feature_maps` refers to.
    feature_maps : dict of int to float
        Largest number of values in all feature maps, by dimension.
    data_share : float
        Largest share of the dataset's voxels in a batch.
    least_batch : dict of int to int
        The patch shrinks until a batch of this size fits, by dimension.
    """

    kind: Kind
    memory_gb: float
    feature_maps: dict[int, float]
    data_share: float
    least_batch: dict[int, int]


PRESETS: dict[str, PlannerPreset] = {
    "default": PlannerPreset("plain", 8, {2: 8.5e7, 3: 5.6e8}, 0.05, {2: 2, 3: 2}),
    "resenc_m": PlannerPreset("residual", 8, {2: 1.35e8, 3: 6.8e8}, 1.0, REFERENCE_BATCH),
    "resenc_l": PlannerPreset("residual", 24, {2: 3.8e8, 3: 2.1e9}, 1.0, REFERENCE_BATCH),
    "resenc_xl": PlannerPreset("residual", 40, {2: 5.6e8, 3: 3.6e9}, 1.0, REFERENCE_BATCH),
    "mednext_s": PlannerPreset("mednext_s", 20, {2: 3.9e8, 3: 2.35e9}, 0.05, {2: 2, 3: 2}),
    "mednext_b": PlannerPreset("mednext_b", 22, {2: 4.2e8, 3: 2.55e9}, 0.05, {2: 2, 3: 2}),
    "mednext_m": PlannerPreset("mednext_m", 30, {2: 5.9e8, 3: 3.55e9}, 0.05, {2: 2, 3: 2}),
    "mednext_l": PlannerPreset("mednext_l", 42, {2: 8.2e8, 3: 4.95e9}, 0.05, {2: 2, 3: 2}),
}


@dataclass(frozen=True)
class _Task:
    """What all configurations of one plan share."""

    preset: PlannerPreset
    memory_gb: float
    n_cases: int
    n_channels: int
    labels: Labels

    @property
    def label_entries(self) -> int:
        """nnU-Net budgets one output per entry of dataset.json's labels, ignore included."""
        return len(self.labels.names) + (self.labels.ignore is not None)


def make_plan(
    fingerprint: Fingerprint,
    dataset_name: str,
    channels: Sequence[str],
    labels: Labels,
    preset: str = "default",
    memory_gb: float | None = None,
    n_cases: int | None = None,
    spacing: Sequence[float] | None = None,
) -> Plan:
    """Plan all configurations of a dataset.

    Parameters
    ----------
    fingerprint : Fingerprint
        Spacings in mm and cropped shapes in voxels per case, (z, y, x); intensities per channel.
    dataset_name : str
        Name for the plan.
    channels : sequence of str
        Name of each channel. "CT", "noNorm", "zscore", "rescale_to_0_1" and "rgb_to_0_1" (in any case) choose a
        normalisation; every other name means z-score.
    labels : Labels
        The dataset's labels.
    preset : str
        One of `PRESETS`.
    memory_gb : float, optional
        GPU memory budget in GB; the preset's own by default.
    n_cases : int, optional
        Number of training cases; by default the number of cases in the fingerprint.
    spacing : sequence of float, optional
        Target spacing in mm, see `target_spacing`; by default chosen by nnU-Net's rule.

    Returns
    -------
    Plan
        The plan, equal to the one of nnU-Net 2.8.1 but for single slices along an axis that is not the coarsest.

    Raises
    ------
    UserError
        The preset is unknown, no patch fits the budget, the fingerprint has other channels, or the spacing does not
        fit the images.
    """
    gigabytes = memory_budget(preset, memory_gb)
    spacings = np.asarray(fingerprint.spacings, np.float64)
    shapes = np.asarray(fingerprint.shapes_after_crop, np.float64)
    if not len(spacings):
        raise UserError("the fingerprint has no case", fix="Plan a dataset with at least one training case.")
    task = _Task(PRESETS[preset], gigabytes, n_cases or len(spacings), len(channels), labels)
    target, reasons = target_spacing(spacings, shapes, spacing)
    median = np.median(np.rint(spacings / target * shapes), axis=0)
    if median.min() < 1:
        raise UserError(f"a spacing of {join_by_x(target)} mm leaves no voxel along {_AXIS[int(np.argmin(median))]}",
                        fix="Give a smaller one.")  # fmt: skip
    # nnU-Net takes the coarsest axis. That of single slices may be another one, and a 2d network would see lines.
    order = axis_order(np.where(median == 1, np.inf, target))
    if order != (0, 1, 2):
        first = "the coarsest" if median.min() > 1 else "that of single slices"
        reasons.append(f"axes are taken in the order {', '.join(_AXIS[a] for a in order)}: {first} comes first")
    return Plan(
        dataset=dataset_name,
        preset=preset,
        memory_gb=gigabytes,
        orientation=fingerprint.orientation,
        axis_order=order,
        median_spacing=np.median(spacings, axis=0)[list(order)].tolist(),
        median_shape=np.median(shapes, axis=0)[list(order)].tolist(),
        channels=plan_channels(fingerprint, channels),
        labels=labels,
        n_cases=task.n_cases,
        configurations=_plan_configurations(task, target[list(order)], median[list(order)], tuple(reasons)),
    )


def memory_budget(preset: str, memory_gb: float | None = None) -> float:
    """Return the GPU memory budget in GB: `memory_gb`, or the preset's own.

    Raises
    ------
    UserError
        The preset is unknown, or the budget is not a positive number.
    """
    if preset not in PRESETS:
        raise UserError(f"there is no preset {preset!r}", fix=suggest(preset, PRESETS))
    gigabytes = PRESETS[preset].memory_gb if memory_gb is None else float(memory_gb)
    if not gigabytes > 0:
        raise UserError(f"a memory budget of {gigabytes:g} GB is not positive", fix="Give GB of GPU memory, such as 8.")
    return gigabytes


def plan_channels(fingerprint: Fingerprint, names: Sequence[str]) -> tuple[Channel, ...]:
    """Choose the normalisation of each channel: by its name, and inside the nonzero mask where cropping removed much.

    Raises
    ------
    UserError
        The fingerprint has another number of channels.
    """
    if len(names) != len(fingerprint.intensities):
        what = f"the dataset has {len(names)} channels, its fingerprint {len(fingerprint.intensities)}"
        raise UserError(what, fix="Take the fingerprint again.")
    mask = fingerprint.median_relative_size_after_cropping < SMALL_AFTER_CROP
    schemes = [_SCHEMES.get(name.casefold(), "zscore") for name in names]
    return tuple(
        Channel(name=name, normalization=scheme, use_mask=mask and scheme == "zscore", statistics=statistics)
        for name, scheme, statistics in zip(names, schemes, fingerprint.intensities, strict=True)
    )


def target_spacing(
    spacings: np.ndarray, shapes: np.ndarray, given: Sequence[float] | None = None
) -> tuple[np.ndarray, list[str]]:
    """Choose the spacing that 3d_fullres resamples to.

    It is the median along each axis. Along an axis with voxels over three times as long, and over three times as few,
    as along both others, it is the 10th percentile, so that thin-sliced cases keep their slices; never finer than in
    plane.

    Parameters
    ----------
    spacings : ndarray, shape (cases, 3)
        mm, (z, y, x).
    shapes : ndarray, shape (cases, 3)
        Voxels after cropping, (z, y, x).
    given : sequence of float, optional
        mm to take instead: one length for all axes, (z, y, x), or (y, x) where images have one slice. The distance of
        single slices stays as it is.

    Returns
    -------
    tuple of ndarray and list of str
        The spacing in mm, (z, y, x), and the reasons.

    Raises
    ------
    UserError
        Another number of lengths is given.
    """
    target = np.percentile(spacings, 50, axis=0)
    voxels = np.percentile(shapes, 50, axis=0)
    if given is not None:
        sampled = voxels > 1
        if len(given) not in (1, 3, sampled.sum()):
            what = f"a spacing of {len(given)} numbers for images with {sampled.sum()} axes"
            raise UserError(what, fix="Give one length in mm, or one for each axis: z y x.")
        target[sampled] = np.asarray(given)[sampled] if len(given) == 3 else given
        return target, [f"spacing {join_by_x(target[sampled])} was set by hand"]
    coarse = int(np.argmax(target))
    others = [axis for axis in range(3) if axis != coarse]
    in_plane, fewest = target[others].max(), voxels[others].min()
    if not (target[coarse] > ANISOTROPY * in_plane and voxels[coarse] * ANISOTROPY < fewest):
        return target, ["spacing is the median of the dataset"]
    median, thin = target[coarse], np.percentile(spacings[:, coarse], 10)
    # A hair coarser than in plane, so that this axis stays the coarsest.
    target[coarse] = thin if thin >= in_plane else in_plane + 1e-5
    if voxels[coarse] == 1:
        return target, ["images have one slice: only the pixels count"]
    short, shown = f"{target[coarse]:.4g} mm", f"{median:.4g} mm"
    percentile = "the 10th percentile" if short == shown else f"the 10th percentile, not the median {shown}"
    return target, [
        f"spacing along {_AXIS[coarse]} is {short}, {percentile}: voxels there are over {ANISOTROPY}x longer than the "
        f"{in_plane:.4g} mm in plane, and over {ANISOTROPY}x fewer"
    ]


def axis_order(spacing: np.ndarray) -> tuple[int, int, int]:
    """Return the transposition that puts the coarsest axis first."""
    first = int(np.argmax(spacing))
    second, third = (axis for axis in range(3) if axis != first)
    return first, second, third


def _plan_configurations(
    task: _Task, spacing: np.ndarray, median: np.ndarray, reasons: tuple[str, ...]
) -> dict[str, Configuration]:
    """Plan all configurations for a target spacing (mm) and the median shape (voxels) at it, in transposed axes."""
    data_voxels = float(prod(median)) * task.n_cases
    planned = {"2d": _plan_configuration(task, spacing[1:], median[1:], data_voxels, reasons)}
    if median[0] == 1:
        return planned
    full = _plan_configuration(task, spacing, median, data_voxels, reasons)
    low, note = _plan_lowres(task, full)
    if low is None:
        return {**planned, "3d_fullres": _with_reason(full, note)}
    full = _with_reason(full, _BATCH_DICE, batch_dice=True)
    reason = "as 3d_fullres, with the segmentation of 3d_lowres as further input channels"
    cascade = full.model_copy(update={"previous_stage": "3d_lowres", "reasons": (reason,)})
    return {
        **planned,
        "3d_lowres": low,
        "3d_fullres": full,
        "3d_cascade_fullres": with_memory(cascade, task.n_channels, task.labels),
    }


def _with_reason(configuration: Configuration, reason: str, **fields: object) -> Configuration:
    return configuration.model_copy(update={**fields, "reasons": (*configuration.reasons, reason)})


def _plan_lowres(task: _Task, full: Configuration) -> tuple[Configuration | None, str]:
    """Plan 3d_lowres: coarser by 3 % a step until a patch sees a quarter of the image; None and why where not."""
    share = prod(full.patch_size) / prod(full.median_shape)
    sees, limit = f"{_percent(share)} of the median image", _percent(LOWRES_BELOW)
    if share >= LOWRES_BELOW:
        return None, f"no 3d_lowres: a patch sees {sees}, not less than {limit}"
    start, median = np.array(full.spacing), np.array(full.median_shape)
    spacing, low, shape = start.copy(), full, median
    while prod(low.patch_size) / prod(shape) < LOWRES_BELOW:
        finer = spacing.max() / spacing > 2
        spacing[finer if finer.any() else slice(None)] *= LOWRES_STEP
        shape = start / spacing * median
        low = _plan_configuration(task, spacing, np.maximum(1, np.rint(shape)), float(prod(shape)) * task.n_cases, ())
    smaller = prod(median) / prod(shape)
    if smaller < 2:
        return None, f"no 3d_lowres: it would be only {smaller:.2g}x smaller than 3d_fullres, less than 2x"
    note = f"made because a patch of 3d_fullres sees {sees}, less than {limit}; images are {smaller:.2g}x smaller here"
    return low.model_copy(update={"reasons": (note, *low.reasons)}), note


def _plan_configuration(
    task: _Task, spacing: np.ndarray, median: np.ndarray, data_voxels: float, reasons: tuple[str, ...]
) -> Configuration:
    """Find the largest patch that fits the budget, its network, and the largest batch for both."""
    dimensions = len(spacing)
    budget = task.preset.feature_maps[dimensions] * (task.memory_gb / task.preset.memory_gb)
    topology, patch_reason = _fit_patch(task, spacing, median, budget)
    maps = _feature_maps(task, topology)
    batch, batch_reason = _fit_batch(
        task.preset.data_share, maps / REFERENCE_BATCH[dimensions], budget, data_voxels / prod(topology.patch)
    )
    planned = Configuration(
        spacing=tuple(spacing.tolist()),
        median_shape=tuple(median.tolist()),
        patch_size=topology.patch,
        batch_size=batch,
        network=rules.default_network(task.preset.kind, topology),
        batch_dice=dimensions == 2,
        reasons=(*reasons, patch_reason, *_network_reasons(topology), batch_reason),
    )
    return with_memory(planned, task.n_channels, task.labels)


def _fit_patch(task: _Task, spacing: np.ndarray, median: np.ndarray, budget: float) -> tuple[Topology, str]:
    """Return the largest patch that fits the budget, with its topology, and the reason.

    It starts isotropic in mm and clipped to the median image; the relatively longest axis is shortened until it fits.
    """
    dimensions, mm = len(spacing), spacing.tolist()
    density = 1 / spacing
    ideal = [max(1, round(n)) for n in density * (START_VOXELS[dimensions] / prod(density)) ** (1 / dimensions)]
    kind = task.preset.kind
    first = topology = rules.topology_of(mm, [min(n, m) for n, m in zip(ideal, median, strict=True)], kind)
    per_patch = task.preset.least_batch[dimensions] / REFERENCE_BATCH[dimensions]
    while _feature_maps(task, topology) * per_patch > budget:
        smaller = rules.shorten_patch(topology, mm, median.tolist(), kind)
        if smaller is None:
            raise UserError(f"{task.memory_gb:g} GB are too few for this dataset", fix="Give more with --memory.")
        topology = smaller
    fits = f"its feature maps fit {task.memory_gb:g} GB"
    if topology is first:
        whole = all(n >= m for n, m in zip(topology.patch, median, strict=True))
        size = "covers the median image" if whole else "has its full size"
        return topology, f"patch {join_by_x(topology.patch)} {size}: {fits}"
    return topology, f"patch shrunk from {join_by_x(first.patch)} to {join_by_x(topology.patch)} so that {fits}"


def _feature_maps(task: _Task, topology: Topology) -> int:
    """Count the values that the budget limits; of MedNeXt all layers' outputs but those of the coarser heads."""
    kind = task.preset.kind
    if kind not in EXPANSION:
        return rules.feature_map_count(kind, topology, task.label_entries)
    layers = network_layers(rules.default_network(kind, topology), topology.patch, 0, task.label_entries)
    return sum(layer.values for layer in layers if layer.kind != "head" or layer is layers[-1])


def _fit_batch(share: float, maps: float, budget: float, patches: float) -> tuple[int, str]:
    """Return the batch size that fills the budget, and the reason.

    A batch holds at most a share of the dataset's voxels, which are `patches` patches, and at least two samples.
    """
    fitting = round(budget / maps)
    cap = round(patches * share)
    batch = max(min(fitting, cap), MIN_BATCH)
    if batch == fitting:
        return batch, f"batch {batch} fills the budget"
    if batch == cap:
        held = "" if share >= 1 else f"{_percent(share)} of "
        return batch, f"batch {batch}: {fitting} would fit, but a batch holds at most {held}the voxels of the dataset"
    few_voxels = f": {fitting} would fit, but the dataset is small (a batch holds {_percent(share)} of it at most)"
    return batch, f"batch {batch} is the minimum{few_voxels if fitting > batch else ''}"


def _network_reasons(topology: Topology) -> list[str]:
    """Say what is unusual about the network, and why."""
    if len(topology.strides) == 1:
        return ["images are too small to pool: this network has no decoder and cannot be trained"]
    flat = sum(1 in kernel for kernel in topology.kernels)
    if not flat:
        return []
    stages = "the first stage" if flat == 1 else f"the first {flat} stages"
    return [f"kernels {join_by_x(topology.kernels[0])} in {stages}: voxels there are over 2x longer along one axis"]


def _percent(share: float) -> str:
    return f"{100 * share:.2g} %" if share < 0.995 else "all"


# ------------------------------------------------------------------------------------------------ other sizes in a plan


def apply_options(plan: Plan, options: Options) -> Plan:
    """Return the plan with the sizes, the clipping and the storage that the options of `nnlite plan` give.

    Parameters
    ----------
    plan : Plan
        The plan to change.
    options : Options
        The options; preset, memory and adoption are those of the plan.

    Returns
    -------
    Plan
        The changed plan.

    Raises
    ------
    UserError
        A size does not fit the plan.
    """
    for name, sizes in options.sizes.items():
        plan = override_sizes(plan, name, sizes.patch_size, sizes.batch_size)
    channels = plan.channels
    if options.clip_percentiles is not None:
        clipped = {"clip_percentiles": None if options.clip_percentiles == (0, 100) else options.clip_percentiles}
        channels = tuple(c if c.normalization == "ct" else c.model_copy(update=clipped) for c in channels)
    return plan.model_copy(update={"channels": channels, "stored_as": options.stored_as or plan.stored_as})


def override_sizes(
    plan: Plan, configuration: str, patch_size: Sequence[int] | None = None, batch_size: int | None = None
) -> Plan:
    """Return the plan with another patch or batch size for one configuration.

    A new patch gets the topology of nnU-Net's rule. Stages that exist before and after keep their features and blocks.

    Parameters
    ----------
    plan : Plan
        The plan to change.
    configuration : str
        Name of the configuration.
    patch_size : sequence of int, optional
        Voxels per axis; None keeps the planned patch.
    batch_size : int, optional
        Patches per step; None keeps the planned batch.

    Returns
    -------
    Plan
        The changed plan, with its predicted memory.

    Raises
    ------
    UserError
        The plan has no such configuration, the batch is below 1, or the patch cannot be pooled. The message names the
        nearest legal patches.
    """
    changed = plan.configuration(configuration)
    if patch_size is not None and tuple(patch_size) != changed.patch_size:
        changed = _with_patch(configuration, changed, tuple(patch_size))
    if batch_size is not None and batch_size != changed.batch_size:
        if batch_size < 1:
            raise UserError(f"a batch size of {batch_size} is not possible", fix="Give 1 or more.")
        changed = _with_reason(changed, f"batch {batch_size} was set by hand", batch_size=batch_size)
    changed = with_memory(changed, len(plan.channels), plan.labels)
    return plan.with_configuration(configuration, changed)


def limit_sizes(
    plan: Plan, configuration: str, patch_voxels: int | None = None, batch_voxels: int | None = None
) -> Plan:
    """Return the plan with a smaller patch and batch where they exceed a number of voxels.

    Where a shortened patch sees less than a quarter of the median image, Dice is taken over the batch, as in plans that
    have a 3d_lowres: in most patches some label is missing, and a Dice of each patch would teach to leave it out.

    Parameters
    ----------
    plan : Plan
        The plan to change.
    configuration : str
        Name of the configuration.
    patch_voxels : int, optional
        Largest number of voxels of a patch. The patch is shortened by the planner's rule.
    batch_voxels : int, optional
        Largest number of voxels of a batch, which has at least two patches.

    Returns
    -------
    Plan
        The changed plan; sizes within the limits stay.
    """
    c = plan.configuration(configuration)
    patch, batch = c.patch_size, c.batch_size
    topology = rules.topology_of(c.spacing, patch, c.network.kind)
    while patch_voxels is not None and prod(patch) > patch_voxels:
        smaller = rules.shorten_patch(topology, c.spacing, c.median_shape, c.network.kind)
        if smaller is None or len(smaller.strides) == 1:
            break
        topology, patch = smaller, smaller.patch
    if batch_voxels is not None:
        batch = min(batch, max(2, batch_voxels // prod(patch)))
    changed = override_sizes(plan, configuration, patch, batch)
    if patch == c.patch_size or c.batch_dice or prod(patch) / prod(c.median_shape) >= LOWRES_BELOW:
        return changed
    shortened = _with_reason(changed.configuration(configuration), _BATCH_DICE, batch_dice=True)
    return changed.with_configuration(configuration, shortened)


def _with_patch(name: str, configuration: Configuration, patch: tuple[int, ...]) -> Configuration:
    """Return a configuration with another patch, and with strides for it unless they were set by hand and fit it."""
    network, spacing, kind = configuration.network, configuration.spacing, configuration.network.kind
    size = f"{name}: patch size {join_by_x(patch)}"
    if len(patch) != configuration.dimensions or min(patch) < 1:
        fix = f"Give {configuration.dimensions} positive numbers of voxels."
        raise UserError(f"{size} is no patch", fix=fix)
    old, topology = (rules.topology_of(spacing, each, kind) for each in (configuration.patch_size, patch))
    by_hand, divisor = network.strides != old.strides, network.divisor
    fits = patch != divisor and not any(n % d for n, d in zip(patch, divisor, strict=True))  # equal: one voxel remains
    if not (by_hand and fits):
        if topology.patch != patch:
            below, above = (join_by_x(legal) for legal in rules.neighbouring_patches(spacing, patch, kind))
            what = f"{size} cannot be pooled: it must be a multiple of {join_by_x(topology.divisor)}"
            raise UserError(what, fix=f"The nearest are {below} and {above}.")
        if len(topology.strides) == 1:
            raise UserError(f"{size} is too small to pool", fix="Give at least 8 voxels along an axis.")
        if by_hand:
            log.warn_once(f"{size} does not fit the strides that were set by hand; they are those of the rule now")
        network = _adapt_network(network, old, topology)
    return _with_reason(configuration, f"patch {join_by_x(patch)} was set by hand", patch_size=patch, network=network)


def _adapt_network(network: Network, old: Topology, topology: Topology) -> Network:
    """Keep what the network has for the stages of both topologies, and add deeper stages by nnU-Net's rule.

    Kernels follow the spacing of each stage, by the rule, unless they were set by hand.
    """
    largest = max(max(kernel) for kernel in network.kernels)
    before, kernels = (rules.resize_kernels(each.kernels, largest) for each in (old, topology))
    if network.kernels != before:
        kernels = network.kernels + kernels[len(network.kernels) :]
    stages, known = len(topology.strides), len(network.features)
    rule = rules.default_network(network.kind, topology)
    features = rules.default_features(network.kind, stages, len(topology.patch), base=network.features[0])
    return network.model_copy(
        update={
            "features": (network.features + features[known:])[:stages],
            "strides": topology.strides,
            "kernels": kernels[:stages],
            "blocks": (network.blocks + rule.blocks[known:])[:stages],
            "decoder_convolutions": (rule.decoder_convolutions + network.decoder_convolutions)[-(stages - 1) :],
        }
    )
