"""The U-Net of a plan, plain or with a residual encoder, in two or three dimensions.

Isensee et al., nnU-Net, Nature Methods 2021 (doi:10.1038/s41592-020-01008-z); residual encoder: Isensee et al.,
nnU-Net Revisited, MICCAI 2024 (arXiv:2404.09556). Convolutions are padded and have a bias, except for the projection
of a residual block; the first one of a stage has the stride; upsampling is a transposed convolution; every decoder
stage has a segmentation head for deep supervision.

`EncoderDecoder` is what all networks of a plan share, `UNet` has its parts above it. build.py makes the network of a
configuration, and cpu.py makes a built network faster on CPUs.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial

import torch
from torch import Tensor, nn

from nnunet_lite.planning.schema import Network

NEGATIVE_SLOPE = 0.01

# by the number of dimensions
CONVOLUTION: dict[int, Callable[..., nn.Module]] = {2: nn.Conv2d, 3: nn.Conv3d}
TRANSPOSED: dict[int, Callable[..., nn.Module]] = {2: nn.ConvTranspose2d, 3: nn.ConvTranspose3d}
_POOLING: dict[int, Callable[..., nn.Module]] = {2: nn.AvgPool2d, 3: nn.AvgPool3d}
NORM: dict[str, dict[int, Callable[..., nn.Module]]] = {
    "instance": {2: partial(nn.InstanceNorm2d, affine=True), 3: partial(nn.InstanceNorm3d, affine=True)},
    "batch": {2: nn.BatchNorm2d, 3: nn.BatchNorm3d},
    "none": {2: nn.Identity, 3: nn.Identity},
}
ACTIVATION: dict[str, Callable[..., nn.Module]] = {
    "leaky_relu": partial(nn.LeakyReLU, NEGATIVE_SLOPE, inplace=True),
    "relu": partial(nn.ReLU, inplace=True),
    "gelu": nn.GELU,
}

Size = tuple[int, ...]


def convolution(n_in: int, n_out: int, kernel: Size, stride: Size, bias: bool = True) -> nn.Module:
    """Make a convolution padded so that only the stride changes the size."""
    return CONVOLUTION[len(kernel)](n_in, n_out, kernel, stride=stride, padding=[k // 2 for k in kernel], bias=bias)


def conv_block(spec: Network, n_in: int, n_out: int, kernel: Size, stride: Size) -> nn.Sequential:
    """Make a convolution, normalization and activation."""
    norm, activation = NORM[spec.norm][len(kernel)], ACTIVATION[spec.activation]
    return nn.Sequential(convolution(n_in, n_out, kernel, stride), norm(n_out), activation())


class ResidualBlock(nn.Module):
    """Two convolutions parallel to a skip that pools (stride) and projects (channels) where needed, as in ResNet-D."""

    def __init__(self, spec: Network, n_in: int, n_out: int, kernel: Size, stride: Size) -> None:
        super().__init__()
        ones = (1,) * len(kernel)
        norm = NORM[spec.norm][len(kernel)]
        self.first = conv_block(spec, n_in, n_out, kernel, stride)
        self.second = nn.Sequential(convolution(n_out, n_out, kernel, ones), norm(n_out))
        skip: list[nn.Module] = []
        if math.prod(stride) > 1:
            skip.append(_POOLING[len(kernel)](stride, stride))
        if n_in != n_out:
            skip += [convolution(n_in, n_out, ones, ones, bias=False), norm(n_out)]
        self.skip = nn.Sequential(*skip)
        self.activation = ACTIVATION[spec.activation]()

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.activation(self.second(self.first(x)) + self.skip(x))
        return out


Block = Callable[[Network, int, int, Size, Size], nn.Module]


def stage(block: Block, spec: Network, n_in: int, n_out: int, kernel: Size, stride: Size, n: int) -> nn.Sequential:
    """Make n blocks in sequence; the first one changes channels and resolution."""
    blocks = [block(spec, n_in, n_out, kernel, stride)]
    blocks += [block(spec, n_out, n_out, kernel, (1,) * len(kernel)) for _ in range(n - 1)]
    return nn.Sequential(*blocks)


class EncoderDecoder(nn.Module):
    """An encoder, a decoder with skip connections, and a segmentation head on each decoder stage.

    `forward` maps (batch, n_in, *patch) to logits (batch, n_out, *patch). With `deep_supervision` set it returns a list
    of logits, finest first, each decoder stage at its own resolution, without those of `idle_heads`.

    Parameters
    ----------
    spec : Network
        The network of the plan.
    """

    idle_heads = 0  # how many of the coarsest heads no loss uses
    stem: nn.Module
    encoder: nn.ModuleList
    upsample: nn.ModuleList
    decoder: nn.ModuleList
    heads: nn.ModuleList

    def __init__(self, spec: Network) -> None:
        super().__init__()
        self.spec = spec
        self.deep_supervision = False

    def forward(self, x: Tensor) -> Tensor | list[Tensor]:
        skips = [self.stem(x)]
        for encode in self.encoder:
            skips.append(encode(skips[-1]))
        x = skips.pop()
        outputs = []
        for i, (up, decode, head) in enumerate(zip(self.upsample, self.decoder, self.heads, strict=True)):
            x = decode(self.join(up, x, skips.pop()))
            if i == len(self.heads) - 1 or (self.deep_supervision and i >= self.idle_heads):
                outputs.append(self.logits(head, x))
        return outputs[::-1] if self.deep_supervision else outputs[0]

    def logits(self, head: nn.Module, x: Tensor) -> Tensor:
        """Apply a head; training does it in float32, because the loss needs more digits than 16 bits have."""
        if not self.training:
            return head(x)
        has_autocast = torch.amp.is_autocast_available(x.device.type)  # the device "meta", which counts, has none
        with torch.autocast(x.device.type, enabled=False) if has_autocast else nullcontext():
            return head(x.to(next(head.parameters()).dtype))

    @staticmethod
    def join(up: nn.Module, x: Tensor, skip: Tensor) -> Tensor:
        """Upsample the coarser features and combine them with those of the skip connection."""
        raise NotImplementedError


class UNet(EncoderDecoder):
    """A U-Net as a plan describes it, see `EncoderDecoder`; as in nnU-Net no loss uses the coarsest head.

    Parameters
    ----------
    spec : Network
        Features, strides and kernels of the plan, finest stage first.
    n_in : int
        Number of input channels.
    n_out : int
        Number of output channels: classes with the background, or regions.
    """

    idle_heads = 1

    def __init__(self, spec: Network, n_in: int, n_out: int) -> None:
        super().__init__(spec)
        features, strides, kernels = spec.features, spec.strides, spec.kernels
        ones = (1,) * len(kernels[0])
        residual = spec.kind == "residual"
        self.stem = conv_block(spec, n_in, features[0], kernels[0], ones) if residual else nn.Identity()
        block: Block = ResidualBlock if residual else conv_block
        widths = (features[0] if residual else n_in, *features)
        self.encoder = nn.ModuleList(
            stage(block, spec, widths[i], features[i], kernels[i], strides[i], spec.blocks[i])
            for i in range(len(features))
        )
        # Decoder stages run from the coarsest to the finest; stage i restores the resolution of encoder stage `level`.
        levels = range(len(features) - 2, -1, -1)
        self.upsample = nn.ModuleList(
            TRANSPOSED[len(ones)](features[lv + 1], features[lv], strides[lv + 1], strides[lv + 1]) for lv in levels
        )
        self.decoder = nn.ModuleList(
            stage(conv_block, spec, 2 * features[lv], features[lv], kernels[lv], ones, spec.decoder_convolutions[i])
            for i, lv in enumerate(levels)
        )
        self.heads = nn.ModuleList(convolution(features[lv], n_out, ones, ones) for lv in levels)
        self.apply(_initialize)
        for module in self.modules():
            if isinstance(module, ResidualBlock) and spec.norm != "none":
                nn.init.zeros_(module.second[1].get_parameter("weight"))  # a residual block starts as its skip

    @staticmethod
    def join(up: nn.Module, x: Tensor, skip: Tensor) -> Tensor:
        """Upsample the coarser features and append those of the skip connection."""
        return torch.cat((up(x), skip), 1)


def _initialize(module: nn.Module) -> None:
    """He initialization for the leaky ReLU; biases are zero."""
    if isinstance(module, nn.Conv2d | nn.Conv3d | nn.ConvTranspose2d | nn.ConvTranspose3d):
        nn.init.kaiming_normal_(module.weight, a=NEGATIVE_SLOPE)
        if module.bias is not None:
            nn.init.zeros_(module.bias)


def one_hot(classes: Tensor, n_classes: int) -> Tensor:
    """Turn the classes that a first stage predicts into input channels of the second stage of a cascade.

    Parameters
    ----------
    classes : Tensor, shape (batch, *shape)
        Predicted classes.
    n_classes : int
        Number of classes, with the background.

    Returns
    -------
    Tensor of bool, shape (batch, n_classes - 1, *shape)
        A channel for each foreground class.
    """
    foreground = torch.arange(1, n_classes, device=classes.device, dtype=classes.dtype)  # bytes are compared as bytes
    return classes[:, None] == foreground.view(-1, *[1] * (classes.ndim - 1))


def set_deep_supervision(network: nn.Module, on: bool) -> None:
    """Let a network return the logits of every decoder stage, or the finest only; others than U-Nets may ignore it."""
    if hasattr(network, "deep_supervision"):
        setattr(network, "deep_supervision", on)  # noqa: B010 - the type checker knows modules and tensors only


def mixes_samples(network: nn.Module) -> bool:
    """Return whether a network normalizes over its batch, so that the output of a sample depends on the others."""
    return any(isinstance(layer, nn.modules.batchnorm._BatchNorm) for layer in network.modules())
