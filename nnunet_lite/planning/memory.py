"""Predict the GPU memory of one training step by arithmetic over the layers of a configuration's network.

Counted: what autograd keeps for the backward pass under float16 or bfloat16 autocast, the loss, the parameters with
their gradients and momentum, the temporary arrays of the backward pass, and the batches that are made meanwhile. Not
counted: the CUDA context of the process (0.3 to 0.6 GB, depending on driver and card).

`with_memory` is what planning calls; it sums `training_memory`, which counts over `network_layers`.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from math import prod
from typing import Literal

from nnunet_lite.data.labels import Labels
from nnunet_lite.planning.schema import Configuration, Network
from nnunet_lite.planning.topology import EXPANSION, per_stage, voxels_per_stage

HALF = 2  # bytes of an activation under autocast
SINGLE = 4  # bytes of what stays in float32: the input and the output of a head
# What the loss keeps: log-softmax and softmax in float32; per voxel the target as int64 and its weight.
LOSS_BYTES_PER_LOGIT = 4 + 4
LOSS_BYTES_PER_VOXEL = 8 + 4
# Two float32 gradients of the logits, one per term of the loss, exist before anything is freed.
LOSS_GRADIENT_BYTES = 4 + 4
# One batch is trained on, three are ready or being made.
BATCHES = 4
SOURCE_SHARE = 6  # voxels of the boxes that contain the rotated patches of a batch, per voxel; 99 of 100 have less
WARPED_VOXELS = 2**21  # of patches that are rotated and scaled together on a GPU
WARP_BYTES = 170  # what that takes for each of them and each label map, measured: mostly the votes of 8 neighbours
CUDNN_BYTES = 500_000_000  # what cuDNN may take for its fastest algorithms; an allowance, not a count


@dataclass(frozen=True)
class NetworkLayer:
    """One convolution of a network.

    Parameters
    ----------
    kind : {"conv", "project", "up", "head"}
        In a block, on a residual skip, transposed, or a segmentation head.
    stage : int
        Its stage, the finest is 0.
    inputs, outputs : int
        Channels.
    taps : int
        Voxels of its kernel.
    voxels : int
        Voxels of its output for one patch.
    pools : bool
        It has a stride above 1.
    bias : bool
        It has a bias.
    normalized : bool
        A normalisation with two parameters per feature follows.
    groups : int
        Of channels, among which it mixes; a depthwise convolution has one for each channel.
    smooth : bool
        A GELU follows, which keeps its input too.
    """

    kind: Literal["conv", "project", "up", "head"]
    stage: int
    inputs: int
    outputs: int
    taps: int
    voxels: int
    pools: bool = False
    bias: bool = True
    normalized: bool = False
    groups: int = 1
    smooth: bool = False

    @property
    def values(self) -> int:
        return self.outputs * self.voxels

    @property
    def parameters(self) -> int:
        return self.outputs * (self.inputs // self.groups * self.taps + self.bias + 2 * self.normalized)


def network_layers(network: Network, patch: tuple[int, ...], inputs: int, outputs: int) -> list[NetworkLayer]:
    """List every convolution of a network, from the input to the finest head.

    Parameters
    ----------
    network : Network
        The network.
    patch : tuple of int
        Voxels per axis, a multiple of the network's divisor.
    inputs, outputs : int
        Channels of the network; for a cascade `inputs` includes the one-hot previous segmentation.

    Returns
    -------
    list of NetworkLayer
        In the order of the forward pass.
    """
    if network.kind in EXPANSION:
        return _mednext_layers(network, patch, inputs, outputs)
    voxels = voxels_per_stage(network.strides, patch)
    taps = [prod(kernel) for kernel in network.kernels]
    norm, residual, smooth = network.norm != "none", network.kind == "residual", network.activation == "gelu"
    layers, width = [], inputs
    if residual:
        width = network.features[0]
        layers.append(NetworkLayer("conv", 0, inputs, width, taps[0], voxels[0], normalized=norm, smooth=smooth))
    for stage, features in enumerate(network.features):
        for block in range(network.blocks[stage]):
            pools = block == 0 and prod(network.strides[stage]) > 1
            size = taps[stage], voxels[stage]
            layers.append(NetworkLayer("conv", stage, width, features, *size, pools, normalized=norm, smooth=smooth))
            if residual:
                layers.append(NetworkLayer("conv", stage, features, features, *size, normalized=norm, smooth=smooth))
            if residual and width != features:
                layers.append(NetworkLayer("project", stage, width, features, 1, voxels[stage], pools, False, norm))
            width = features
    for convolutions, stage in zip(network.decoder_convolutions, range(len(voxels) - 2, -1, -1), strict=True):
        features, below = network.features[stage], network.features[stage + 1]
        layers.append(NetworkLayer("up", stage, below, features, prod(network.strides[stage + 1]), voxels[stage]))
        for n in range(convolutions):
            width, size = features if n else 2 * features, (taps[stage], voxels[stage])
            layers.append(NetworkLayer("conv", stage, width, features, *size, normalized=norm, smooth=smooth))
        layers.append(NetworkLayer("head", stage, features, outputs, 1, voxels[stage]))
    return layers


def _mednext_layers(network: Network, patch: tuple[int, ...], inputs: int, outputs: int) -> list[NetworkLayer]:
    features, stages, voxels = network.features, range(len(network.features)), voxels_per_stage(network.strides, patch)
    ratios, taps = per_stage(EXPANSION[network.kind], len(stages)), [prod(kernel) for kernel in network.kernels]
    norm, smooth = network.norm != "none", network.activation == "gelu"

    def block(stage: int, source: int) -> list[NetworkLayer]:
        """List the layers of a block whose input is of the stage `source`."""
        width, depthwise = features[source], taps[max(stage, source)]
        wide, size = ratios[stage] * width, voxels[stage]
        return [
            NetworkLayer("conv", stage, width, width, depthwise, size, normalized=norm, groups=width),
            NetworkLayer("conv", stage, width, wide, 1, size, smooth=smooth),
            NetworkLayer("conv", stage, wide, features[stage], 1, size),
            *[NetworkLayer("project", stage, width, features[stage], 1, size)] * (stage != source),
        ]

    layers = [NetworkLayer("conv", 0, inputs, features[0], 1, voxels[0]), *network.blocks[0] * block(0, 0)]
    for finer, stage in pairwise(stages):
        layers += [*block(stage, finer), *network.blocks[stage] * block(stage, stage)]
    for stage, blocks in zip(reversed(stages[:-1]), network.decoder_convolutions, strict=True):
        layers += [*block(stage, stage + 1), *blocks * block(stage, stage)]
        layers.append(NetworkLayer("head", stage, features[stage], outputs, 1, voxels[stage]))
    return layers


def activation_values(network: Network, patch: tuple[int, ...], inputs: int) -> int:
    """Count the 16-bit values that autograd keeps for the backward pass of one patch, without heads and loss.

    A convolution keeps its input, a normalisation its input, an in-place activation its output. So each convolution
    leaves its own output and, where a normalisation follows, the activated one, which is also the next one's input. A
    GELU keeps its input too. Parameters are those of `network_layers`.
    """
    kept = inputs * prod(patch)
    for layer in network_layers(network, patch, inputs, outputs=0):
        if layer.kind == "conv":
            kept += (1 + layer.normalized + layer.smooth) * layer.values
        elif layer.kind == "project":
            # The pooled input where the skip pools, and the projection's output for its normalisation.
            kept += layer.inputs * layer.voxels * layer.pools + layer.values * layer.normalized
        elif layer.kind == "up":
            kept += 2 * layer.values  # upsampled and skip, concatenated
    return kept


def training_memory(
    network: Network, patch: tuple[int, ...], batch_size: int, channels: int, outputs: int, previous: int = 0
) -> dict[str, int]:
    """Predict the memory of one training step with deep supervision and SGD with momentum under autocast.

    Parameters
    ----------
    network, patch, outputs
        As in `network_layers`.
    batch_size : int
        Patches per step.
    channels : int
        Channels of the images.
    previous : int
        Channels of a cascade's one-hot previous segmentation.

    Returns
    -------
    dict of str to int
        Bytes of activations, heads, loss, weights, gradients, optimizer, workspace and batches.
    """
    inputs, voxels = channels + previous, prod(patch)
    layers = network_layers(network, patch, inputs, outputs)
    parameters = sum(layer.parameters for layer in layers)
    heads = [layer for layer in layers if layer.kind == "head"]
    if network.kind not in EXPANSION:
        heads = heads[1:] or heads  # the coarsest one is not trained
    # Going back, the widest point is the gradient of a convolution's output together with that of its input.
    widest = max(layer.values + layer.inputs * layer.voxels for layer in layers if not layer.pools)
    at_heads = LOSS_GRADIENT_BYTES * sum(h.values for h in heads) + SINGLE * sum(h.inputs for h in heads[-1:]) * voxels
    ready = BATCHES * (SINGLE * inputs + 1)  # float32 images, uint8 classes
    maps = 2 if previous else 1
    read = SOURCE_SHARE * (HALF * channels + maps)
    together = min(batch_size, max(1, WARPED_VOXELS // voxels))
    warped = maps * WARP_BYTES + SOURCE_SHARE * SINGLE * channels
    return {
        "activations": HALF * batch_size * activation_values(network, patch, inputs),
        "heads": SINGLE * batch_size * sum((h.inputs + h.outputs) * h.voxels for h in heads),
        "loss": batch_size * sum(LOSS_BYTES_PER_LOGIT * h.values + LOSS_BYTES_PER_VOXEL * h.voxels for h in heads),
        "weights": parameters * (4 + HALF),  # autocast keeps a copy
        "gradients": 4 * parameters,
        "optimizer": 4 * parameters,
        "workspace": batch_size * max(HALF * widest, at_heads) + CUDNN_BYTES,
        "batches": voxels * (batch_size * (ready + read) + together * warped),
    }


def with_memory(configuration: Configuration, channels: int, labels: Labels) -> Configuration:
    """Return the configuration with its predicted training memory in GB (1e9 bytes).

    Parameters
    ----------
    configuration : Configuration
        The configuration.
    channels : int
        Channels of the images.
    labels : Labels
        The dataset's labels.

    Returns
    -------
    Configuration
        With `memory_gb`.
    """
    c = configuration
    previous = labels.n_classes - 1 if c.previous_stage else 0
    memory = training_memory(c.network, c.patch_size, c.batch_size, channels, labels.n_channels, previous)
    return c.model_copy(update={"memory_gb": round(sum(memory.values()) / 1e9, 3)})
