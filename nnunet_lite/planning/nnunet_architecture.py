"""The network description inside nnU-Net v2's plans, of today and of the older 2.x versions, both ways."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, NoReturn

from nnunet_lite.planning.schema import Network

Json = dict[str, Any]

_PACKAGE = "dynamic_network_architectures.architectures.unet"
_CLASSES: dict[str, Literal["plain", "residual"]] = {"PlainConvUNet": "plain", "ResidualEncoderUNet": "residual"}
_NORMS: dict[str, Literal["instance", "batch"]] = {"InstanceNorm": "instance", "BatchNorm": "batch"}
_ACTIVATIONS: dict[str, Literal["leaky_relu", "relu"]] = {"LeakyReLU": "leaky_relu", "ReLU": "relu"}
_ENCODER_KEY = {"plain": "n_conv_per_stage", "residual": "n_blocks_per_stage"}
_SHAPE_KEYS = ("n_stages", "features_per_stage", "kernel_sizes", "strides", "n_conv_per_stage_decoder")


def architecture_to_nnunet(network: Network) -> Json:
    """The `architecture` entry of a configuration."""
    dimensions = len(network.strides[0])
    norm = next((theirs for theirs, ours in _NORMS.items() if ours == network.norm), None)
    activation = next(theirs for theirs, ours in _ACTIVATIONS.items() if ours == network.activation)
    name = next(theirs for theirs, ours in _CLASSES.items() if ours == network.kind)
    return {
        "network_class_name": f"{_PACKAGE}.{name}",
        "arch_kwargs": {
            "n_stages": len(network.features),
            "features_per_stage": list(network.features),
            "conv_op": f"torch.nn.modules.conv.Conv{dimensions}d",
            "kernel_sizes": [list(kernel) for kernel in network.kernels],
            "strides": [list(stride) for stride in network.strides],
            _ENCODER_KEY[network.kind]: list(network.blocks),
            "n_conv_per_stage_decoder": list(network.decoder_convolutions),
            "conv_bias": True,
            "norm_op": None if norm is None else f"torch.nn.modules.{norm.lower()}.{norm}{dimensions}d",
            "norm_op_kwargs": None if norm is None else {"eps": 1e-05, "affine": True},
            "dropout_op": None,
            "dropout_op_kwargs": None,
            "nonlin": f"torch.nn.{activation}",
            "nonlin_kwargs": {"inplace": True},
        },
        "_kw_requires_import": ["conv_op", "norm_op", "dropout_op", "nonlin"],
    }


def architecture_from_nnunet(configuration: Mapping[str, Any]) -> Network:
    """The network of a configuration.

    Raises
    ------
    ValueError : an architecture that nnlite does not build.
    KeyError : an entry is missing.
    """
    if "architecture" not in configuration:
        return _older(configuration)
    architecture = configuration["architecture"]
    kind = _kind(architecture["network_class_name"])
    kwargs = architecture["arch_kwargs"]
    norm, activation = _operations(kwargs, kind)
    stages, dimensions = kwargs["n_stages"], len(configuration["patch_size"])
    return Network(
        kind=kind,
        features=_per_stage(kwargs["features_per_stage"], stages),
        strides=[_per_axis(stride, dimensions) for stride in _per_stage(kwargs["strides"], stages)],
        kernels=[_per_axis(kernel, dimensions) for kernel in _per_stage(kwargs["kernel_sizes"], stages)],
        blocks=_per_stage(kwargs[_ENCODER_KEY[kind]], stages),
        decoder_convolutions=_per_stage(kwargs["n_conv_per_stage_decoder"], stages - 1),
        norm=norm,
        activation=activation,
    )


def _older(configuration: Mapping[str, Any]) -> Network:
    """Before 2.3 or so the network was spread over the configuration."""
    kind = _kind(configuration["UNet_class_name"])
    stages = len(configuration["pool_op_kernel_sizes"])
    base, top = configuration["UNet_base_num_features"], configuration["unet_max_num_features"]
    return Network(
        kind=kind,
        features=tuple(min(base << stage, top) for stage in range(stages)),
        strides=configuration["pool_op_kernel_sizes"],
        kernels=configuration["conv_kernel_sizes"],
        blocks=_per_stage(configuration["n_conv_per_stage_encoder"], stages),
        decoder_convolutions=_per_stage(configuration["n_conv_per_stage_decoder"], stages - 1),
    )


def _kind(class_name: str) -> Literal["plain", "residual"]:
    short = class_name.rpartition(".")[2]
    if short not in _CLASSES:
        refuse("network class", class_name)
    return _CLASSES[short]


def _operations(
    kwargs: Mapping[str, Any], kind: str
) -> tuple[Literal["instance", "batch", "none"], Literal["leaky_relu", "relu"]]:
    """Norm and activation, having made sure that nothing else is asked for."""
    known = {*_SHAPE_KEYS, _ENCODER_KEY[kind], "conv_op", "conv_bias", "norm_op", "norm_op_kwargs", "dropout_op"}
    known |= {"dropout_op_kwargs", "nonlin", "nonlin_kwargs"}
    for key, value in kwargs.items():
        if key not in known and value is not None:
            refuse(key, value)
    if kwargs.get("dropout_op") is not None:
        refuse("dropout_op", kwargs["dropout_op"])
    if not kwargs.get("conv_bias", False):
        refuse("conv_bias", False)
    norm_kwargs = {"eps": 1e-5, "affine": True, **(kwargs.get("norm_op_kwargs") or {})}
    if norm_kwargs != {"eps": 1e-5, "affine": True}:
        refuse("norm_op_kwargs", norm_kwargs)
    activation = str(kwargs["nonlin"]).rpartition(".")[2]
    slope = (kwargs.get("nonlin_kwargs") or {}).get("negative_slope", 0.01)
    if activation not in _ACTIVATIONS or slope != 0.01:
        refuse("nonlin", f"{activation} {kwargs.get('nonlin_kwargs')}")
    if kwargs.get("norm_op") is None:
        return "none", _ACTIVATIONS[activation]
    norm = str(kwargs["norm_op"]).rpartition(".")[2][:-2]
    if norm not in _NORMS:
        refuse("norm_op", kwargs["norm_op"])
    return _NORMS[norm], _ACTIVATIONS[activation]


def _per_stage(value: Any, stages: int) -> tuple[Any, ...]:
    """One number stands for all stages."""
    return (value,) * stages if isinstance(value, int) else tuple(value)


def _per_axis(value: Any, dimensions: int) -> tuple[int, ...]:
    return (value,) * dimensions if isinstance(value, int) else tuple(value)


def refuse(key: str, value: Any) -> NoReturn:
    """Raise the ValueError for an entry that means something nnlite does not do."""
    raise ValueError(f"{key} {value!r} is nothing that nnlite can do")
