"""The U-Net of a plan, plain or with a residual encoder, in two or three dimensions.

Isensee et al., nnU-Net, Nature Methods 2021 (doi:10.1038/s41592-020-01008-z); residual encoder: Isensee et al.,
nnU-Net Revisited, MICCAI 2024 (arXiv:2404.09556). Convolutions are padded and have a bias; the first one of a stage has
the stride; upsampling is a transposed convolution; every decoder stage has a segmentation head for deep supervision.
"""

from __future__ import annotations

import math
from collections.abc import Callable

from torch import Tensor, nn

from nnunet_lite.networks.conv import Conv2d, Conv3d
from nnunet_lite.networks.norm import InstanceNorm
from nnunet_lite.networks.upsample import joined
from nnunet_lite.planning.schema import Network

NEGATIVE_SLOPE = 0.01

_CONV: dict[int, Callable[..., nn.Module]] = {2: Conv2d, 3: Conv3d}
_TRANSPOSED: dict[int, Callable[..., nn.Module]] = {2: nn.ConvTranspose2d, 3: nn.ConvTranspose3d}
_POOL: dict[int, Callable[..., nn.Module]] = {2: nn.AvgPool2d, 3: nn.AvgPool3d}
_NORM: dict[str, dict[int, Callable[[int], nn.Module]]] = {
    "instance": {2: InstanceNorm, 3: InstanceNorm},
    "batch": {2: nn.BatchNorm2d, 3: nn.BatchNorm3d},
    "none": {2: lambda _: nn.Identity(), 3: lambda _: nn.Identity()},
}
_ACTIVATION: dict[str, Callable[[], nn.Module]] = {
    "leaky_relu": lambda: nn.LeakyReLU(NEGATIVE_SLOPE, inplace=True),
    "relu": lambda: nn.ReLU(inplace=True),
}

Size = tuple[int, ...]


def convolution(n_in: int, n_out: int, kernel: Size, stride: Size, bias: bool = True) -> nn.Module:
    """A convolution padded so that only the stride changes the size."""
    return _CONV[len(kernel)](n_in, n_out, kernel, stride=stride, padding=[k // 2 for k in kernel], bias=bias)


def conv_block(spec: Network, n_in: int, n_out: int, kernel: Size, stride: Size) -> nn.Sequential:
    """Convolution, normalisation, activation."""
    return nn.Sequential(
        convolution(n_in, n_out, kernel, stride),
        _NORM[spec.norm][len(kernel)](n_out),
        _ACTIVATION[spec.activation](),
    )


def conv_stage(spec: Network, n_in: int, n_out: int, kernel: Size, stride: Size, n_blocks: int) -> nn.Sequential:
    ones = (1,) * len(kernel)
    first = conv_block(spec, n_in, n_out, kernel, stride)
    return nn.Sequential(first, *(conv_block(spec, n_out, n_out, kernel, ones) for _ in range(n_blocks - 1)))


class ResidualBlock(nn.Module):
    """Two convolutions beside a skip that pools (stride) and projects (channels) where needed: ResNet-D."""

    def __init__(self, spec: Network, n_in: int, n_out: int, kernel: Size, stride: Size) -> None:
        super().__init__()
        ones = (1,) * len(kernel)
        norm = _NORM[spec.norm][len(kernel)]
        self.first = conv_block(spec, n_in, n_out, kernel, stride)
        self.second = nn.Sequential(convolution(n_out, n_out, kernel, ones), norm(n_out))
        skip: list[nn.Module] = []
        if math.prod(stride) > 1:
            skip.append(_POOL[len(kernel)](stride, stride))
        if n_in != n_out:
            skip += [convolution(n_in, n_out, ones, ones, bias=False), norm(n_out)]
        self.skip = nn.Sequential(*skip)
        self.activation = _ACTIVATION[spec.activation]()

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.activation(self.second(self.first(x)) + self.skip(x))
        return out


def residual_stage(spec: Network, n_in: int, n_out: int, kernel: Size, stride: Size, n_blocks: int) -> nn.Sequential:
    ones = (1,) * len(kernel)
    first = ResidualBlock(spec, n_in, n_out, kernel, stride)
    return nn.Sequential(first, *(ResidualBlock(spec, n_out, n_out, kernel, ones) for _ in range(n_blocks - 1)))


class UNet(nn.Module):
    """A U-Net after a plan's `Network`.

    Parameters
    ----------
    spec : the plan's description, finest stage first.
    n_in : input channels.
    n_out : output channels (classes with the background, or regions).

    `forward` maps (batch, n_in, *patch) to logits (batch, n_out, *patch). With `deep_supervision` set it returns a list
    of logits, finest first, each decoder stage at its own resolution.
    """

    def __init__(self, spec: Network, n_in: int, n_out: int) -> None:
        super().__init__()
        self.spec = spec
        self.deep_supervision = False
        features, strides, kernels = spec.features, spec.strides, spec.kernels
        ones = (1,) * len(kernels[0])
        residual = spec.kind == "residual"
        self.stem = conv_block(spec, n_in, features[0], kernels[0], ones) if residual else nn.Identity()
        stage = residual_stage if residual else conv_stage
        widths = (features[0] if residual else n_in, *features)
        self.encoder = nn.ModuleList(
            stage(spec, widths[i], features[i], kernels[i], strides[i], spec.blocks[i]) for i in range(len(features))
        )
        # Decoder stages run from the coarsest to the finest; stage i restores the resolution of encoder stage `level`.
        levels = range(len(features) - 2, -1, -1)
        self.upsample = nn.ModuleList(
            _TRANSPOSED[len(ones)](features[lv + 1], features[lv], strides[lv + 1], strides[lv + 1]) for lv in levels
        )
        self.decoder = nn.ModuleList(
            conv_stage(spec, 2 * features[lv], features[lv], kernels[lv], ones, spec.decoder_convolutions[i])
            for i, lv in enumerate(levels)
        )
        self.heads = nn.ModuleList(convolution(features[lv], n_out, ones, ones) for lv in levels)
        self.apply(_initialise)
        for module in self.modules():
            if isinstance(module, ResidualBlock) and spec.norm != "none":
                nn.init.zeros_(module.second[1].get_parameter("weight"))  # a residual block starts as its skip

    def forward(self, x: Tensor) -> Tensor | list[Tensor]:
        skips = [self.stem(x)]
        for stage in self.encoder:
            skips.append(stage(skips[-1]))
        x = skips.pop()
        outputs = []
        for i, (up, stage, head) in enumerate(zip(self.upsample, self.decoder, self.heads, strict=True)):
            x = stage(joined(up, x, skips.pop()))
            if self.deep_supervision or i == len(self.heads) - 1:
                outputs.append(head(x))
        return outputs[::-1] if self.deep_supervision else outputs[0]


def _initialise(module: nn.Module) -> None:
    """He initialisation for the leaky ReLU, biases zero."""
    if isinstance(module, nn.Conv2d | nn.Conv3d | nn.ConvTranspose2d | nn.ConvTranspose3d):
        nn.init.kaiming_normal_(module.weight, a=NEGATIVE_SLOPE)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
