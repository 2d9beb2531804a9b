"""nnU-Net v2's JSON files: plans.json, dataset.json and splits_final.json, both ways.

Older v2 plans (UNet_class_name, conv_kernel_sizes ...) are read too, and configurations that inherit from one another.
What nnlite cannot do the same way is refused rather than approximated.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from nnunet_lite import log
from nnunet_lite.data.dataset import channels_of, labels_of, orientation_of_reader
from nnunet_lite.data.labels import Labels
from nnunet_lite.data.names import NIFTI, PICTURES
from nnunet_lite.errors import UserError
from nnunet_lite.files import read_json
from nnunet_lite.planning.memory import with_memory
from nnunet_lite.planning.nnunet_architecture import architecture_from_nnunet, architecture_to_nnunet, refuse
from nnunet_lite.planning.planner import PRESETS
from nnunet_lite.planning.schema import Channel, Configuration, Plan, Resampling, Scheme, Statistics, inherited

Json = dict[str, Any]

# preset -> planner, name of the plans
_PLANNERS = {
    "default": ("ExperimentPlanner", "nnUNetPlans"),
    "resenc_m": ("nnUNetPlannerResEncM", "nnUNetResEncUNetMPlans"),
    "resenc_l": ("nnUNetPlannerResEncL", "nnUNetResEncUNetLPlans"),
    "resenc_xl": ("nnUNetPlannerResEncXL", "nnUNetResEncUNetXLPlans"),
}
_SCHEMES: dict[Scheme, str] = {
    "ct": "CTNormalization",
    "zscore": "ZScoreNormalization",
    "none": "NoNormalization",
    "rescale_0_1": "RescaleTo01Normalization",
    "rgb_0_1": "RGBTo01Normalization",
}
_FOR_TIFF = {True: "Tiff3DIO", False: "NaturalImage2DIO"}  # stacks, pictures
_READ_BY_NNUNET = (".nii.gz", ".nii", ".nrrd", ".mha", ".gipl", ".png", ".bmp", ".tif", ".tiff")
_RESAMPLING = "resample_data_or_seg_to_shape"
_STANDARD = ("2d", "3d_lowres", "3d_fullres")


@dataclass(frozen=True)
class Description:
    """What a dataset.json tells about a data set."""

    channels: tuple[str, ...]
    labels: Labels
    n_cases: int
    file_ending: str


def description_from_nnunet(dataset_json: Mapping[str, Any], file: Path | None = None) -> Description:
    """Read a dataset.json of nnU-Net v2 (`channel_names`), or of v1 and MSD (`modality`).

    Raises
    ------
    UserError : channels or labels are missing or malformed; `file` is what the message names.
    """
    return Description(
        channels_of(dataset_json, file),
        labels_of(dataset_json, file),
        int(dataset_json.get("numTraining") or 0),
        str(dataset_json.get("file_ending", ".nii.gz")),
    )


def description_to_nnunet(description: Description, name: str | None = None) -> Json:
    """The dataset.json of nnU-Net v2."""
    order = description.labels.region_order
    return {
        **({} if name is None else {"name": name}),
        "channel_names": {str(i): channel for i, channel in enumerate(description.channels)},
        "labels": description.labels.to_json(),
        **({} if order is None else {"regions_class_order": list(order)}),
        "numTraining": description.n_cases,
        "file_ending": description.file_ending,
    }


def read_plan(path: Path, dataset_json: Mapping[str, Any] | None = None) -> Plan:
    """A plan from a file, ours or nnU-Net's (which needs the dataset.json for channel names and labels).

    Raises
    ------
    UserError : no plan, or one that cannot be followed.
    """
    plans = read_json(path)
    if isinstance(plans, dict) and "format" not in plans and "configurations" in plans:
        if dataset_json is None:
            raise UserError("is a plan of nnU-Net, which needs a dataset.json", path, "Give it with --dataset-json.")
        return plan_from_nnunet(plans, dataset_json, path)
    return Plan.read(path)


# ----------------------------------------------------------------------------------------------------- to nnU-Net


def plan_to_nnunet(plan: Plan, dataset_json: Mapping[str, Any]) -> Json:
    """The plans.json that nnU-Net v2 preprocesses, trains and predicts with.

    Parameters
    ----------
    dataset_json : of the same dataset; its file ending chooses nnU-Net's image reader.

    Raises
    ------
    UserError : the plan clips images to percentiles, which nnU-Net cannot do.
    """
    if any(channel.clip_percentiles is not None for channel in plan.channels):
        raise UserError(f"the plan of {plan.dataset} clips images to percentiles, which nnU-Net cannot do")
    planner, plans_name = _PLANNERS.get(plan.preset, _PLANNERS["default"])
    configurations: Json = {}
    for name, configuration in plan.configurations.items():
        whole = _configuration_to_nnunet(plan, configuration, _data_identifier(name, plans_name))
        following = [other for other, c in plan.configurations.items() if c.previous_stage == name]
        if following:
            whole["next_stage"] = following[0]
        configurations[name] = whole if name in _STANDARD else _inheriting(whole, configurations)
    order = plan.axis_order
    return {
        "dataset_name": plan.dataset,
        "plans_name": plans_name,
        "original_median_spacing_after_transp": list(plan.median_spacing),
        "original_median_shape_after_transp": [round(n) for n in plan.median_shape],
        "image_reader_writer": _reader(plan, dataset_json),
        "transpose_forward": list(order),
        "transpose_backward": [order.index(axis) for axis in range(3)],
        "configurations": configurations,
        "experiment_planner_used": planner,
        "label_manager": "LabelManager",
        "foreground_intensity_properties_per_channel": {
            str(i): channel.statistics.model_dump() for i, channel in enumerate(plan.channels)
        },
    }


def _data_identifier(name: str, plans_name: str) -> str:
    """The folder of preprocessed data; nnU-Net's presets share those of 2d and 3d_fullres."""
    return f"{'nnUNetPlans' if name in ('2d', '3d_fullres') else plans_name}_{name}"


def _reader(plan: Plan, dataset_json: Mapping[str, Any]) -> str:
    """nnU-Net's reader for the images, by their file ending, unless dataset.json names one; "None" names none."""
    named = dataset_json.get("overwrite_image_reader_writer")
    if named not in (None, "None"):
        return str(named)
    ending = str(dataset_json.get("file_ending", ".nii.gz")).lower()
    if ending not in _READ_BY_NNUNET:
        log.warn(
            f"nnU-Net has no reader for {ending}: convert the images, to .png or .nii.gz, before it trains on them"
        )
    if plan.orientation == "RAS":
        return "NibabelIOWithReorient" if ending in NIFTI else "SimpleITKIOWithReorient"
    if plan.orientation is not None:
        log.info(f"nnU-Net does not turn images as nnlite does: give it images stored as {plan.orientation}")
    if ending in (".tif", ".tiff"):
        return _FOR_TIFF[round(plan.median_shape[0]) > 1]
    if ending in PICTURES:
        return "NaturalImage2DIO"
    return "NibabelIO" if ending == ".nii" else "SimpleITKIO"


def _configuration_to_nnunet(plan: Plan, c: Configuration, data_identifier: str) -> Json:
    r = c.resampling
    kwargs = {
        "data": {"is_seg": False, "order": r.image_order, "order_z": r.image_order_z},
        "seg": {"is_seg": True, "order": r.label_order, "order_z": r.label_order_z},
        "probabilities": {"is_seg": False, "order": r.logits_order, "order_z": r.logits_order_z},
    }
    return {
        "data_identifier": data_identifier,
        "preprocessor_name": "DefaultPreprocessor",
        "batch_size": c.batch_size,
        "patch_size": list(c.patch_size),
        "median_image_size_in_voxels": list(c.median_shape),
        "spacing": list(c.spacing),
        "normalization_schemes": [_SCHEMES[channel.normalization] for channel in plan.channels],
        "use_mask_for_norm": [channel.use_mask for channel in plan.channels],
        **{f"resampling_fn_{what}": _RESAMPLING for what in kwargs},
        **{f"resampling_fn_{what}_kwargs": {**k, "force_separate_z": r.separate_z} for what, k in kwargs.items()},
        "architecture": architecture_to_nnunet(c.network),
        "batch_dice": c.batch_dice,
        **({} if c.previous_stage is None else {"previous_stage": c.previous_stage}),
    }


def _inheriting(whole: Json, written: Mapping[str, Json]) -> Json:
    """A configuration as its differences from a standard one with the same preprocessed data, if there is one."""
    same = [key for key in whole if key == "spacing" or key.startswith("resampling_fn")]
    for name in _STANDARD:
        base = written.get(name)
        if base is not None and all(base[key] == whole[key] for key in same) and set(base) <= set(whole):
            changed = {k: v for k, v in whole.items() if k != "data_identifier" and base.get(k) != v}
            return {"inherits_from": name, **changed}
    return whole


# --------------------------------------------------------------------------------------------------- from nnU-Net


def plan_from_nnunet(plans: Mapping[str, Any], dataset_json: Mapping[str, Any], file: Path | None = None) -> Plan:
    """The plan that an nnU-Net v2 plans.json stands for.

    Parameters
    ----------
    plans : plans.json, of any 2.x version.
    dataset_json : of the same data set: channel names, labels, number of cases.
    file : what error messages name.

    Raises
    ------
    UserError : an entry is missing, or asks for something that nnlite does not do; names the JSON path.
    """
    description = description_from_nnunet(dataset_json)
    resolved, configurations = {}, {}
    with _reading(file):
        names = list(plans["configurations"])
    for name in names:
        with _reading(file, f"configurations.{name}."):
            resolved[name] = inherited(plans["configurations"], name)
            configurations[name] = _configuration_from_nnunet(resolved[name])
    with _reading(file):
        preset = _preset(plans)
        plan = Plan(
            dataset=plans["dataset_name"],
            preset=preset,
            memory_gb=PRESETS[preset].memory_gb,
            orientation=orientation_of_reader(plans.get("image_reader_writer")),
            axis_order=plans["transpose_forward"],
            median_spacing=plans["original_median_spacing_after_transp"],
            median_shape=plans["original_median_shape_after_transp"],
            channels=_channels(plans, resolved, description),
            labels=description.labels,
            n_cases=description.n_cases,
            configurations=configurations,
        )
    counted = {name: with_memory(c, len(plan.channels), plan.labels) for name, c in configurations.items()}
    return plan.model_copy(update={"configurations": counted})


@contextmanager
def _reading(file: Path | None, where: str = "") -> Iterator[None]:
    """What goes wrong with an entry of nnU-Net's plan is the user's to know, with its path in the JSON."""
    try:
        yield
    except KeyError as error:
        raise UserError(f"nnU-Net's plan lacks {where}{error.args[0]}", file) from None
    except ValidationError as error:
        first = error.errors()[0]
        path = where + ".".join(str(part) for part in first["loc"])
        message = first["msg"].removeprefix("Value error, ")
        raise UserError(f"nnU-Net's plan: {path.rstrip('.')}: {message}", file) from None
    except (TypeError, ValueError) as error:
        raise UserError(f"nnU-Net's plan: {where}{error}", file) from None


def _preset(plans: Mapping[str, Any]) -> str:
    used = plans.get("experiment_planner_used")
    return next((preset for preset, (planner, _) in _PLANNERS.items() if planner == used), "default")


def _configuration_from_nnunet(c: Json) -> Configuration:
    if c.get("preprocessor_name", "DefaultPreprocessor") != "DefaultPreprocessor":
        refuse("preprocessor_name", c["preprocessor_name"])
    return Configuration(
        spacing=c["spacing"],
        median_shape=c["median_image_size_in_voxels"],
        patch_size=c["patch_size"],
        batch_size=c["batch_size"],
        network=architecture_from_nnunet(c),
        batch_dice=c["batch_dice"],
        resampling=_resampling(c),
        previous_stage=c.get("previous_stage"),
        reasons=("taken over from a plan of nnU-Net",),
    )


def _resampling(c: Json) -> Resampling:
    kwargs = {}
    for what in ("data", "seg", "probabilities"):
        key = f"resampling_fn_{what}"
        if c.get(key, _RESAMPLING) != _RESAMPLING:
            refuse(key, c[key])
        kwargs[what] = c[f"{key}_kwargs"]
    separate = {k.get("force_separate_z") for k in kwargs.values()}
    if len(separate) > 1:
        refuse("resampling_fn_*_kwargs.force_separate_z", separate)
    return Resampling(
        image_order=kwargs["data"]["order"],
        image_order_z=kwargs["data"]["order_z"],
        label_order=kwargs["seg"]["order"],
        label_order_z=kwargs["seg"]["order_z"],
        logits_order=kwargs["probabilities"]["order"],
        logits_order_z=kwargs["probabilities"]["order_z"],
        separate_z=separate.pop(),
    )


def _channels(plans: Mapping[str, Any], resolved: Mapping[str, Json], description: Description) -> tuple[Channel, ...]:
    """Normalisation is one for all configurations here, per configuration in nnU-Net."""
    chosen = {(tuple(c["normalization_schemes"]), tuple(c["use_mask_for_norm"])) for c in resolved.values()}
    if len(chosen) != 1:
        raise ValueError("the configurations normalise differently, which nnlite does not do")
    schemes, masks = chosen.pop()
    statistics = plans["foreground_intensity_properties_per_channel"]
    if not len(schemes) == len(masks) == len(description.channels):
        raise ValueError(f"{len(schemes)} channels are normalised, dataset.json has {len(description.channels)}")
    by_name = {theirs: ours for ours, theirs in _SCHEMES.items()}
    for scheme in schemes:
        if scheme not in by_name:
            refuse("normalization_schemes", scheme)
    return tuple(
        Channel(
            name=name,
            normalization=by_name[scheme],
            use_mask=bool(mask),
            statistics=Statistics(**{field: statistics[str(i)][field] for field in Statistics.model_fields}),
        )
        for i, (name, scheme, mask) in enumerate(zip(description.channels, schemes, masks, strict=True))
    )
