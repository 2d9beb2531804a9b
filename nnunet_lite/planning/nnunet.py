"""Read and write nnU-Net v2's plans.json.

`plan_from_nnunet` and `plan_to_nnunet` convert a plan; the dataset.json of the same dataset has what it lacks. Older v2
plans (UNet_class_name, conv_kernel_sizes ...) are read too, and configurations that inherit from one another. What
nnlite cannot do the same way is refused rather than approximated.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn

from pydantic import ValidationError

from nnunet_lite import log
from nnunet_lite.data.dataset import channels_of, labels_of, orientation_of_reader
from nnunet_lite.data.names import NIFTI, PICTURES, TIFF
from nnunet_lite.errors import UserError
from nnunet_lite.files import first_problem, read_json
from nnunet_lite.planning import schema
from nnunet_lite.planning.memory import with_memory
from nnunet_lite.planning.planner import PRESETS
from nnunet_lite.planning.schema import Channel, Configuration, Network, Plan, Resampling, Statistics

Json = dict[str, Any]

# preset -> planner, name of the plans
_PLANNERS = {
    "default": ("ExperimentPlanner", "nnUNetPlans"),
    "resenc_m": ("nnUNetPlannerResEncM", "nnUNetResEncUNetMPlans"),
    "resenc_l": ("nnUNetPlannerResEncL", "nnUNetResEncUNetLPlans"),
    "resenc_xl": ("nnUNetPlannerResEncXL", "nnUNetResEncUNetXLPlans"),
}
_NORMALIZATIONS: dict[str, str] = {ours: row.nnunet for ours, row in schema.NORMALIZATIONS.items()}
_FOR_TIFF = {True: "Tiff3DIO", False: "NaturalImage2DIO"}  # stacks, pictures
_READ_BY_NNUNET = (".nii.gz", ".nii", ".nrrd", ".mha", ".gipl", ".png", ".bmp", ".tif", ".tiff")
_RESAMPLING = "resample_data_or_seg_to_shape"
_RESAMPLED = {"data": "image", "seg": "label", "probabilities": "logits"}  # nnU-Net's name -> ours
_STANDARD = ("2d", "3d_lowres", "3d_fullres")
_KINDS = {"plain": "PlainConvUNet", "residual": "ResidualEncoderUNet"}
_NORMS = {"instance": "InstanceNorm", "batch": "BatchNorm"}
_ACTIVATIONS = {"leaky_relu": "LeakyReLU", "relu": "ReLU"}
_BLOCKS = {"plain": "n_conv_per_stage", "residual": "n_blocks_per_stage"}
_NORM_KWARGS = {"eps": 1e-05, "affine": True}
_READ = {"n_stages", "features_per_stage", "conv_op", "kernel_sizes", "strides", "n_conv_per_stage_decoder", "norm_op",
         "nonlin", "nonlin_kwargs", "dropout_op_kwargs"}  # fmt: skip


def read_plan(path: Path, dataset_json: Mapping[str, Any] | None = None) -> Plan:
    """Read a plan, ours or nnU-Net's.

    Parameters
    ----------
    path : Path
        A plans.json.
    dataset_json : mapping, optional
        The content of the dataset.json, which a plan of nnU-Net needs for channel names and labels.

    Returns
    -------
    Plan
        The plan.

    Raises
    ------
    UserError
        The file is no plan, or one that cannot be followed.
    """
    plans = read_json(path)
    if isinstance(plans, dict) and "format" not in plans and "configurations" in plans:
        if dataset_json is None:
            raise UserError("is a plan of nnU-Net, which needs a dataset.json", path, "Give it with --dataset-json.")
        return plan_from_nnunet(plans, dataset_json, path)
    return Plan.read(path)


# ----------------------------------------------------------------------------------------------------- to nnU-Net


def plan_to_nnunet(plan: Plan, dataset_json: Mapping[str, Any]) -> Json:
    """Return the plans.json that nnU-Net v2 preprocesses, trains and predicts with.

    Parameters
    ----------
    plan : Plan
        The plan.
    dataset_json : mapping
        The dataset.json of the same dataset; its file ending chooses nnU-Net's image reader.

    Returns
    -------
    dict
        The content of the file.

    Raises
    ------
    UserError
        The plan clips images to percentiles, or its network is none of nnU-Net's.
    """
    if any(channel.clip_percentiles is not None for channel in plan.channels):
        raise UserError(f"the plan of {plan.dataset} clips images to percentiles, which nnU-Net cannot do")
    for name, configuration in plan.configurations.items():
        network = configuration.network
        if network.kind not in _KINDS or network.activation not in _ACTIVATIONS:
            what = f"{name} of {plan.dataset} is a network that nnU-Net lacks: {network.kind} with {network.activation}"
            raise UserError(what, fix="Its own are the presets default, resenc_m, resenc_l and resenc_xl.")
    planner, plans_name = _PLANNERS.get(plan.preset, _PLANNERS["default"])
    configurations: Json = {}
    for name, configuration in plan.configurations.items():
        shared = name in ("2d", "3d_fullres")  # nnU-Net's presets share the preprocessed data of these
        whole = _configuration_to_nnunet(plan, configuration, f"{'nnUNetPlans' if shared else plans_name}_{name}")
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


def _reader(plan: Plan, dataset_json: Mapping[str, Any]) -> str:
    """nnU-Net's reader for the images, by their file ending, unless dataset.json names one; "None" names none."""
    if (name := dataset_json.get("overwrite_image_reader_writer")) not in (None, "None"):
        return str(name)
    ending = str(dataset_json.get("file_ending", ".nii.gz")).lower()
    if ending not in _READ_BY_NNUNET:
        log.warn(f"nnU-Net has no reader for {ending}: convert the images to .png or .nii.gz before it trains on them")
    if plan.orientation == "RAS":
        return "NibabelIOWithReorient" if ending in NIFTI else "SimpleITKIOWithReorient"
    if plan.orientation is not None:
        log.info(f"nnU-Net does not turn images as nnlite does: give it images stored as {plan.orientation}")
    if ending in TIFF:
        return _FOR_TIFF[round(plan.median_shape[0]) > 1]
    if ending in PICTURES:
        return "NaturalImage2DIO"
    return "NibabelIO" if ending == ".nii" else "SimpleITKIO"


def _configuration_to_nnunet(plan: Plan, c: Configuration, data_identifier: str) -> Json:
    orders = c.resampling.model_dump()
    resampling: Json = {}
    for what, ours in _RESAMPLED.items():
        kwargs = {"is_seg": what == "seg", "order": orders[f"{ours}_order"], "order_z": orders[f"{ours}_order_z"]}
        resampling[f"resampling_fn_{what}"] = _RESAMPLING
        resampling[f"resampling_fn_{what}_kwargs"] = {**kwargs, "force_separate_z": c.resampling.separate_z}
    return {
        "data_identifier": data_identifier,
        "preprocessor_name": "DefaultPreprocessor",
        "batch_size": c.batch_size,
        "patch_size": list(c.patch_size),
        "median_image_size_in_voxels": list(c.median_shape),
        "spacing": list(c.spacing),
        "normalization_schemes": [_NORMALIZATIONS[channel.normalization] for channel in plan.channels],
        "use_mask_for_norm": [channel.use_mask for channel in plan.channels],
        **resampling,
        "architecture": _architecture_to_nnunet(c.network),
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


def _architecture_to_nnunet(network: Network) -> Json:
    """The `architecture` entry of a configuration."""
    dimensions = len(network.strides[0])
    norm = _NORMS.get(network.norm)
    return {
        "network_class_name": f"dynamic_network_architectures.architectures.unet.{_KINDS[network.kind]}",
        "arch_kwargs": {
            "n_stages": len(network.features),
            "features_per_stage": list(network.features),
            "conv_op": f"torch.nn.modules.conv.Conv{dimensions}d",
            "kernel_sizes": [list(kernel) for kernel in network.kernels],
            "strides": [list(stride) for stride in network.strides],
            _BLOCKS[network.kind]: list(network.blocks),
            "n_conv_per_stage_decoder": list(network.decoder_convolutions),
            "conv_bias": True,
            "norm_op": norm and f"torch.nn.modules.{norm.lower()}.{norm}{dimensions}d",
            "norm_op_kwargs": norm and _NORM_KWARGS,
            "dropout_op": None,
            "dropout_op_kwargs": None,
            "nonlin": f"torch.nn.{_ACTIVATIONS[network.activation]}",
            "nonlin_kwargs": {"inplace": True},
        },
        "_kw_requires_import": ["conv_op", "norm_op", "dropout_op", "nonlin"],
    }


# --------------------------------------------------------------------------------------------------- from nnU-Net


def plan_from_nnunet(plans: Mapping[str, Any], dataset_json: Mapping[str, Any], file: Path | None = None) -> Plan:
    """Convert a plans.json of nnU-Net v2.

    Parameters
    ----------
    plans : mapping
        The content of the file, of any 2.x version.
    dataset_json : mapping
        The dataset.json of the same dataset: channel names, labels, number of cases.
    file : Path, optional
        What error messages name.

    Returns
    -------
    Plan
        The plan, with its predicted memory.

    Raises
    ------
    UserError
        An entry is missing, or requires something that nnlite does not do. The message names its place in the file.
    """
    channels, labels = channels_of(dataset_json, None), labels_of(dataset_json, None)
    configurations = {}
    with _reading(file):
        resolved = {name: schema.inherited(plans["configurations"], name) for name in plans["configurations"]}
    for name, content in resolved.items():
        with _reading(file, f"configurations.{name}."):
            configurations[name] = _configuration_from_nnunet(content)
    with _reading(file):
        used = plans.get("experiment_planner_used")
        preset = next((preset for preset, (planner, _) in _PLANNERS.items() if planner == used), "default")
        return Plan(
            dataset=plans["dataset_name"],
            preset=preset,
            memory_gb=PRESETS[preset].memory_gb,
            orientation=orientation_of_reader(plans.get("image_reader_writer")),
            axis_order=plans["transpose_forward"],
            median_spacing=plans["original_median_spacing_after_transp"],
            median_shape=plans["original_median_shape_after_transp"],
            channels=_channels_from_nnunet(plans, resolved.values(), channels),
            labels=labels,
            n_cases=dataset_json.get("numTraining") or 0,
            configurations={name: with_memory(c, len(channels), labels) for name, c in configurations.items()},
        )


@contextmanager
def _reading(file: Path | None, where: str = "") -> Iterator[None]:
    """Turn an error about an entry of nnU-Net's plan into one line with the entry's place in the file."""
    try:
        yield
    except KeyError as error:
        raise UserError(f"nnU-Net's plan lacks {where}{error.args[0]}", file) from None
    except (TypeError, ValueError) as error:  # pydantic's is a ValueError
        what = first_problem(error) if isinstance(error, ValidationError) else error
        raise UserError(f"nnU-Net's plan: {where}{what}", file) from None


def _configuration_from_nnunet(c: Json) -> Configuration:
    if c.get("preprocessor_name", "DefaultPreprocessor") != "DefaultPreprocessor":
        _refuse("preprocessor_name", c["preprocessor_name"])
    return Configuration(
        spacing=c["spacing"],
        median_shape=c["median_image_size_in_voxels"],
        patch_size=c["patch_size"],
        batch_size=c["batch_size"],
        network=read_network(c),
        batch_dice=c["batch_dice"],
        resampling=_resampling_from_nnunet(c),
        previous_stage=c.get("previous_stage"),
        reasons=("taken over from a plan of nnU-Net",),
    )


def _resampling_from_nnunet(c: Json) -> Resampling:
    fields: Json = {}
    for what, ours in _RESAMPLED.items():
        key = f"resampling_fn_{what}"
        if c.get(key, _RESAMPLING) != _RESAMPLING:
            _refuse(key, c[key])
        kwargs = c[f"{key}_kwargs"]
        separate = kwargs.get("force_separate_z")
        if fields.setdefault("separate_z", separate) != separate:
            _refuse(f"{key}_kwargs.force_separate_z", separate)
        fields |= {f"{ours}_order": kwargs["order"], f"{ours}_order_z": kwargs["order_z"]}
    return Resampling(**fields)


def _channels_from_nnunet(
    plans: Mapping[str, Any], configurations: Iterable[Json], names: Sequence[str]
) -> list[Channel]:
    """nnU-Net has a normalisation per configuration, nnlite one for all."""
    chosen = {(tuple(c["normalization_schemes"]), tuple(c["use_mask_for_norm"])) for c in configurations}
    if len(chosen) != 1:
        raise ValueError("the configurations normalise differently, which nnlite does not do")
    schemes, masks = chosen.pop()
    statistics = plans["foreground_intensity_properties_per_channel"]
    if not len(schemes) == len(masks) == len(names):
        raise ValueError(f"{len(schemes)} channels are normalised, dataset.json has {len(names)}")
    return [
        Channel(
            name=name,
            normalization=_our_name(_NORMALIZATIONS, "normalization_schemes", scheme),
            use_mask=bool(mask),
            statistics=Statistics(**{field: statistics[str(i)][field] for field in Statistics.model_fields}),
        )
        for i, (name, scheme, mask) in enumerate(zip(names, schemes, masks, strict=True))
    ]


def read_network(c: Mapping[str, Any]) -> Network:
    """Return the network of a configuration of nnU-Net's plan.

    Parameters
    ----------
    c : mapping
        The configuration, of which `patch_size` and the network are read.

    Raises
    ------
    KeyError, ValueError
        An entry is missing; or the network is none that nnlite builds.
    """
    if "architecture" in c:
        name, kwargs = c["architecture"]["network_class_name"], c["architecture"]["arch_kwargs"]
        kind = _our_name(_KINDS, "network class", name)
    else:  # before 2.3 or so the network was spread over the configuration
        kind = _our_name(_KINDS, "network class", c["UNet_class_name"])
        stages, base, top = len(c["pool_op_kernel_sizes"]), c["UNet_base_num_features"], c["unet_max_num_features"]
        kwargs = {
            "n_stages": stages,
            "features_per_stage": [min(base << stage, top) for stage in range(stages)],
            "strides": c["pool_op_kernel_sizes"],
            "kernel_sizes": c["conv_kernel_sizes"],
            _BLOCKS[kind]: c["n_conv_per_stage_encoder"],
            "n_conv_per_stage_decoder": c["n_conv_per_stage_decoder"],
            "conv_bias": True,
            "norm_op": "InstanceNorm",
            "nonlin": "LeakyReLU",
        }
    _refuse_other_layers(kwargs, kind)
    stages, dimensions, norm = kwargs["n_stages"], len(c["patch_size"]), kwargs.get("norm_op")
    return Network(
        kind=kind,
        features=_repeat(kwargs["features_per_stage"], stages),
        strides=[_repeat(stride, dimensions) for stride in _repeat(kwargs["strides"], stages)],
        kernels=[_repeat(kernel, dimensions) for kernel in _repeat(kwargs["kernel_sizes"], stages)],
        blocks=_repeat(kwargs[_BLOCKS[kind]], stages),
        decoder_convolutions=_repeat(kwargs["n_conv_per_stage_decoder"], stages - 1),
        norm="none" if norm is None else _our_name(_NORMS, "norm_op", norm),
        activation=_our_name(_ACTIVATIONS, "nonlin", kwargs["nonlin"]),
    )


def _refuse_other_layers(kwargs: Json, kind: str) -> None:
    """Refuse an entry that asks for other layers than ours."""
    legal = {"conv_bias": True, "norm_op_kwargs": _NORM_KWARGS, "negative_slope": 0.01}  # None of all others
    norm_kwargs, activation_kwargs = kwargs.get("norm_op_kwargs") or {}, kwargs.get("nonlin_kwargs") or {}
    given = {
        "conv_bias": False,
        **kwargs,
        "norm_op_kwargs": {**_NORM_KWARGS, **norm_kwargs},
        "negative_slope": activation_kwargs.get("negative_slope", 0.01),
    }
    for key, value in given.items():
        if key not in {*_READ, _BLOCKS[kind]} and value != legal.get(key):
            _refuse(key, value)


def _our_name(names: Mapping[str, str], key: str, theirs: Any) -> Any:
    """Our name of a class of nnU-Net, whatever its module and its number of dimensions."""
    short = str(theirs).rpartition(".")[2].removesuffix("2d").removesuffix("3d")
    return next((ours for ours, name in names.items() if name == short), None) or _refuse(key, theirs)


def _repeat(value: Any, times: int) -> tuple[Any, ...]:
    """One number means the same number for all stages or axes."""
    return (value,) * times if isinstance(value, int) else tuple(value)


def _refuse(key: str, value: Any) -> NoReturn:
    raise ValueError(f"{key} {value!r} is not supported by nnlite")
