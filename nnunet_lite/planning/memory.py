"""Predicted GPU memory of one training step, by arithmetic over the layers of a configuration's network.

Counted: what autograd keeps for the backward pass at the precision of training, the loss, the parameters with their
gradients and momentum, and what comes and goes during the backward pass. Not counted: the CUDA context of the process
(0.3 to 0.6 GB, depending on driver and card).
"""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from typing import Literal

from nnunet_lite.data.labels import Labels
from nnunet_lite.planning.schema import Configuration, Network
from nnunet_lite.planning.topology import voxels_per_stage

Precision = Literal["fp16", "bf16", "fp32"]

BYTES: dict[str, int] = {"fp16": 2, "bf16": 2, "fp32": 4}
# What the loss keeps: log-softmax and softmax in float32; per voxel the target as int64 and its weight.
LOSS_BYTES_PER_LOGIT = 4 + 4
LOSS_BYTES_PER_VOXEL = 8 + 4
# Two float32 gradients of the logits, one per term of the loss, exist before anything is freed.
LOSS_GRADIENT_BYTES = 4 + 4
CUDNN_BYTES = 500_000_000  # what cuDNN may take for its fastest algorithms; an allowance, not a count


@dataclass(frozen=True)
class Layer:
    """One convolution: what it weighs and what it puts out for one patch."""

    kind: Literal["conv", "project", "up", "head"]
    stage: int
    inputs: int
    outputs: int
    kernel: int  # number of taps
    voxels: int  # of its output
    pools: bool = False
    bias: bool = True
    normalized: bool = True  # followed by a normalisation with two parameters per feature

    @property
    def values(self) -> int:
        return self.outputs * self.voxels

    @property
    def parameters(self) -> int:
        return self.outputs * (self.inputs * self.kernel + self.bias + 2 * self.normalized)


def layers(network: Network, patch: tuple[int, ...], inputs: int, outputs: int) -> list[Layer]:
    """Every convolution of the network, from the input to the finest head."""
    return _encoder(network, patch, inputs) + _decoder(network, patch, outputs)


def _encoder(network: Network, patch: tuple[int, ...], inputs: int) -> list[Layer]:
    voxels = voxels_per_stage(network.strides, patch)
    norm = network.norm != "none"
    found = []
    width = inputs
    if network.kind == "residual":
        width = network.features[0]
        found.append(Layer("conv", 0, inputs, width, prod(network.kernels[0]), voxels[0], normalized=norm))
    for stage, features in enumerate(network.features):
        taps, pools = prod(network.kernels[stage]), prod(network.strides[stage]) > 1
        for block in range(network.blocks[stage]):
            pools_here = pools and block == 0
            found.append(Layer("conv", stage, width, features, taps, voxels[stage], pools_here, normalized=norm))
            if network.kind == "residual":
                found.append(Layer("conv", stage, features, features, taps, voxels[stage], normalized=norm))
                if width != features:
                    found.append(
                        Layer("project", stage, width, features, 1, voxels[stage], pools_here, False, normalized=norm)
                    )
            width = features
    return found


def _decoder(network: Network, patch: tuple[int, ...], outputs: int) -> list[Layer]:
    voxels = voxels_per_stage(network.strides, patch)
    norm = network.norm != "none"
    found = []
    for i, stage in enumerate(range(len(voxels) - 2, -1, -1)):
        features, taps = network.features[stage], prod(network.kernels[stage])
        up = prod(network.strides[stage + 1])
        found.append(Layer("up", stage, network.features[stage + 1], features, up, voxels[stage], normalized=False))
        for n in range(network.decoder_convolutions[i]):
            width = features if n else 2 * features
            found.append(Layer("conv", stage, width, features, taps, voxels[stage], normalized=norm))
        found.append(Layer("head", stage, features, outputs, 1, voxels[stage], normalized=False))
    return found


def activation_values(network: Network, patch: tuple[int, ...], inputs: int, outputs: int) -> int:
    """How many values autograd keeps for the backward pass of one patch, heads included, without the loss.

    A convolution keeps its input, a normalisation its input, an in-place activation its output. So each convolution
    leaves its own output and, where an activation follows, the activated one, which is also the next one's input.
    """
    per_convolution = 2 if network.norm != "none" else 1
    kept = inputs * prod(patch)
    for layer in layers(network, patch, inputs, outputs):
        if layer.kind == "conv":
            kept += per_convolution * layer.values
        elif layer.kind == "project":
            # The pooled input where the skip pools, and the projection's output for its normalisation.
            kept += layer.inputs * layer.voxels * layer.pools + layer.values * layer.normalized
        elif layer.kind == "up":
            kept += 2 * layer.values  # upsampled and skip, concatenated
        else:
            kept += layer.values  # logits
    return kept


@dataclass(frozen=True)
class Memory:
    """Bytes of one training step, by what they are for."""

    activations: int
    loss: int
    weights: int
    gradients: int
    optimizer: int
    workspace: int

    @property
    def gb(self) -> float:
        """All of it, in GB (1e9 bytes)."""
        parts = (self.activations, self.loss, self.weights, self.gradients, self.optimizer, self.workspace)
        return sum(parts) / 1e9


def training_memory(
    network: Network,
    patch: tuple[int, ...],
    batch_size: int,
    inputs: int,
    outputs: int,
    precision: Precision = "fp16",
) -> Memory:
    """Predicted memory of one training step with deep supervision and SGD with momentum.

    Parameters
    ----------
    patch : voxels per axis, a multiple of the network's divisor.
    inputs, outputs : channels of the network; for a cascade `inputs` includes the one-hot previous segmentation.
    precision : of autocast. Below fp32, autocast keeps a copy of the weights at that precision.
    """
    found = layers(network, patch, inputs, outputs)
    size = BYTES[precision]
    parameters = sum(layer.parameters for layer in found)
    heads = [layer for layer in found if layer.kind == "head"]
    logits = sum(head.values for head in heads)
    # Going back, the widest point is the gradient of a convolution's output beside that of its input.
    widest = max(layer.values + layer.inputs * layer.voxels for layer in found if not layer.pools)
    return Memory(
        activations=size * batch_size * activation_values(network, patch, inputs, outputs),
        loss=batch_size * sum(LOSS_BYTES_PER_LOGIT * h.values + LOSS_BYTES_PER_VOXEL * h.voxels for h in heads),
        weights=parameters * (4 if precision == "fp32" else 4 + size),
        gradients=4 * parameters,
        optimizer=4 * parameters,
        workspace=max(size * batch_size * widest, LOSS_GRADIENT_BYTES * batch_size * logits) + CUDNN_BYTES,
    )


def with_memory(configuration: Configuration, channels: int, labels: Labels) -> Configuration:
    """The configuration with its predicted training memory (GB) under fp16 or bf16 autocast."""
    inputs = channels + (labels.n_classes - 1 if configuration.previous_stage else 0)
    memory = training_memory(
        configuration.network, configuration.patch_size, configuration.batch_size, inputs, labels.n_channels
    )
    return configuration.model_copy(update={"memory_gb": round(memory.gb, 3)})
