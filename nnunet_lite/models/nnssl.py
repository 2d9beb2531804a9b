"""Encoders that nnssl trained without labels, such as those of OpenMind: a torch file with an adaptation plan.

Wald et al., An OpenMind for 3D medical vision self-supervised learning, ICCV 2025 (arXiv:2412.17041). ResEnc-L is
the U-Net of Wald et al., Revisiting MAE pre-training for 3D medical image segmentation, CVPR 2025 (arXiv:2410.23132).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from math import ceil
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nnunet_lite.errors import UserError
from nnunet_lite.files import understood
from nnunet_lite.models.nnunet import WEIGHTS, rename_tensors
from nnunet_lite.networks.unet import UNet
from nnunet_lite.planning.nnunet import read_network
from nnunet_lite.planning.schema import Configuration, Network, Plan

Json = dict[str, Any]

ADAPTATION = "nnssl_adaptation_plan"  # an entry of its checkpoints that nnU-Net's do not have
_UNET = "ResidualEncoderUNet"  # its arguments are in the adaptation plan
_PRESETS = ("ResEncL", "NoSkipResEncL")  # have one encoder
_RESENC_L = {
    "n_stages": 6,
    "features_per_stage": [32, 64, 128, 256, 320, 320],
    "kernel_sizes": 3,
    "strides": [1, 2, 2, 2, 2, 2],
    "n_blocks_per_stage": [1, 3, 4, 6, 6, 6],
    "n_conv_per_stage_decoder": 1,
    "conv_bias": True,
    "norm_op": "InstanceNorm3d",
    "nonlin": "LeakyReLU",
}
_BATCH_SIZE = 2  # of nnU-Net's fine-tuning


def read_nnssl(checkpoint: Json, plan: Plan, configuration: str, file: Path) -> tuple[Plan, dict[str, Tensor]]:
    """Return the plan that an encoder of nnssl needs, and its weights.

    The plan is the dataset's, with the network of the encoder, the spacing of its training if that was fixed, the patch
    that nnssl recommends, which is no larger than images need, and a batch of 2.

    Parameters
    ----------
    checkpoint : dict
        The content of the file, see `read_checkpoint`.
    plan : Plan
        Of the dataset that is trained now.
    configuration : str
        Of that plan.
    file : Path
        What error messages name.

    Returns
    -------
    Plan
        Its channels are those of the encoder.
    dict of str to Tensor
        By our names. Tensors of the decoder, which learnt another task, keep nnssl's.

    Raises
    ------
    UserError
        The network is none that nnlite builds, or the file lacks something.
    """
    with understood(file, writer="nnssl"):
        adaptation = checkpoint[ADAPTATION]
        network = _read_network(adaptation, file)
        adapted = _adapt_plan(plan, configuration, network, adaptation)
        encoder = _read_encoder(checkpoint[WEIGHTS], adapted, configuration, adaptation, file)
    return adapted, encoder


def _read_network(adaptation: Json, file: Path) -> Network:
    architecture = adaptation["architecture_plans"]
    name = architecture["arch_class_name"]
    if name not in (*_PRESETS, _UNET):
        fix = f"nnlite starts from a {', '.join(_PRESETS)} or {_UNET} of nnssl."
        raise UserError(f"contains a {name}, which nnlite does not build", file, fix)
    arguments = _RESENC_L if name in _PRESETS else architecture["arch_kwargs"]
    described = {"network_class_name": _UNET, "arch_kwargs": arguments}
    return read_network({"architecture": described, "patch_size": adaptation["recommended_downstream_patchsize"]})


def _adapt_plan(plan: Plan, configuration: str, network: Network, adaptation: Json) -> Plan:
    planned, training = plan.configuration(configuration), adaptation.get("pretrain_plan", {})
    trained: Json = next(iter(training.get("configurations", {}).values()), {})
    spacing = trained.get("spacing") or (plan.median_spacing[0], *planned.spacing)[-3:]
    shape = [n * old / new for n, old, new in zip(plan.median_shape, plan.median_spacing, spacing, strict=True)]
    divisors, most = network.divisor, adaptation["recommended_downstream_patchsize"]
    needed = [ceil(n / divisor) * divisor for n, divisor in zip(shape, divisors, strict=True)]
    # two voxels an axis remain in the coarsest stage: one alone becomes 0 when normalised
    patch = [max(2 * divisor, min(n)) for divisor, *n in zip(divisors, most, needed, strict=True)]
    adapted = Configuration(
        spacing=spacing,
        median_shape=shape,
        patch_size=patch,
        batch_size=_BATCH_SIZE,
        network=network,
        batch_dice=planned.batch_dice,
        resampling=planned.resampling,
    )
    names = [f"channel {i} of nnssl" for i in range(adaptation["pretrain_num_input_channels"])]
    channels = tuple(plan.channels[0].model_copy(update={"name": name}) for name in names)
    dataset = training.get("dataset_name", "nnssl")
    return plan.model_copy(
        update={"dataset": dataset, "channels": channels, "configurations": {configuration: adapted}}
    )


def _read_encoder(
    weights: Mapping[str, Tensor], plan: Plan, configuration: str, adaptation: Json, file: Path
) -> dict[str, Tensor]:
    network = plan.configuration(configuration).network
    with torch.device("meta"):  # names and shapes only
        own = UNet(network, len(plan.channels), 1).state_dict()
    encoder = {name: tensor for name, tensor in own.items() if name.startswith(("stem.", "encoder."))}
    ours = {adaptation["key_to_stem"]: "encoder.stem.", adaptation["key_to_encoder"]: "encoder.stages."}
    start = re.compile(rf"^(?:module\.|_orig_mod\.)*({'|'.join(map(re.escape, ours))})\.")
    renamed = {start.sub(lambda found: ours[found[1]], name): tensor for name, tensor in weights.items()}
    tensors = rename_tensors(renamed, encoder, network, file)
    return {name: tensor for name, tensor in tensors.items() if ".all_modules." not in name}  # has another name too
