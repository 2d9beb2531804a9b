"""The names of a U-Net's weights in nnU-Net v2 (dynamic_network_architectures), both ways.

Theirs lie deeper, and a layer is found under up to four names, for a block also lists its layers by number and the
decoder holds the encoder.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from math import prod
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from nnunet_lite.errors import UserError
from nnunet_lite.networks.unet import UNet
from nnunet_lite.planning.schema import Network

# ours -> theirs, of a convolution with its norm
_BLOCKS = (
    (r"stem", r"encoder.stem.convs.0"),
    (r"encoder\.(\d+)\.(\d+)", r"encoder.stages.\1.0.convs.\2"),
    (r"encoder\.(\d+)\.(\d+)\.first", r"encoder.stages.\1.blocks.\2.conv1"),
    (r"encoder\.(\d+)\.(\d+)\.second", r"encoder.stages.\1.blocks.\2.conv2"),
    (r"decoder\.(\d+)\.(\d+)", r"decoder.stages.\1.convs.\2"),
)
_LAYERS = (r"upsample\.(\d+)", r"decoder.transpconvs.\1"), (r"heads\.(\d+)", r"decoder.seg_layers.\1")
_PARTS = ("conv", "norm")
_WRAPPERS = re.compile(r"^(module\.|_orig_mod\.)+")  # of data-parallel and of compiled networks


def nnunet_name(name: str, spec: Network) -> str:
    """Theirs for the name of one of our tensors."""
    module, _, parameter = name.rpartition(".")
    for ours, theirs in _LAYERS:
        if re.fullmatch(ours, module):
            return f"{re.sub(ours, theirs, module)}.{parameter}"
    block, _, number = module.rpartition(".")
    if skip := re.fullmatch(r"encoder\.(\d+)\.(\d+)\.skip", block):
        stage, position = skip.groups()
        pools = int(prod(spec.strides[int(stage)]) > 1)  # then the pooling is the first entry, here and there
        return f"encoder.stages.{stage}.blocks.{position}.skip.{pools}.{_PARTS[int(number) - pools]}.{parameter}"
    for ours, theirs in _BLOCKS:
        if re.fullmatch(ours, block):
            return f"{re.sub(ours, theirs, block)}.{_PARTS[int(number)]}.{parameter}"
    raise ValueError(f"{name} is no tensor of the U-Net")


def nnunet_names(name: str, spec: Network) -> tuple[str, ...]:
    """All their names for one of our tensors."""
    first = nnunet_name(name, spec)
    listed = re.sub(r"\.(conv|norm)\.(?=\w+$)", lambda part: f".all_modules.{_PARTS.index(part[1])}.", first)
    names = (first,) if listed == first else (first, listed)
    return names + tuple(f"decoder.{n}" for n in names if n.startswith("encoder."))


def norm_of(weights: Mapping[str, Tensor]) -> Literal["instance", "batch", "none"]:
    """The normalisation layers that a state dict of nnU-Net belongs to: some trainers take others than planned."""
    if any(name.endswith(".running_mean") for name in weights):
        return "batch"
    return "instance" if any(".norm." in name for name in weights) else "none"


def from_nnunet(weights: Mapping[str, Tensor], spec: Network, inputs: int, outputs: int, file: Path) -> UNet:
    """Our network with the weights of nnU-Net's state dict, on the CPU.

    Heads of deep supervision that the state dict lacks become zero; they predict nothing.

    Raises
    ------
    UserError : it is not that of this network; names the first tensor that does not fit. `file` opens the message.
    """
    network = UNet(spec, inputs, outputs)
    found, state = {_WRAPPERS.sub("", name): value for name, value in weights.items()}, {}
    unknown, finest = set(found), f"heads.{len(network.heads) - 1}."
    fix = "Only the U-Nets of nnU-Net v2's own planners can be read."
    for name, own in network.state_dict().items():
        theirs = nnunet_names(name, spec)
        unknown -= set(theirs)
        value = next((found[n] for n in theirs if n in found), None)
        if value is None and name.startswith("heads.") and not name.startswith(finest):
            value = torch.zeros_like(own)
        if value is None:
            raise UserError(f"does not hold {theirs[0]}, which the plan's network has", file, fix)
        if value.shape != own.shape:
            shapes = f"{tuple(value.shape)}, in the plan's network {tuple(own.shape)}"
            raise UserError(f"{theirs[0]} is of shape {shapes}", file, fix)
        state[name] = value
    if unknown:
        raise UserError(f"holds {min(unknown)}, which the plan's network has not", file, fix)
    network.load_state_dict(state)
    return network


def to_nnunet(weights: Mapping[str, Tensor], spec: Network) -> dict[str, Tensor]:
    """Our state dict under all the names that nnU-Net loads it by."""
    return {theirs: value for name, value in weights.items() for theirs in nnunet_names(name, spec)}
