"""MedNeXt, a U-Net of ConvNeXt blocks, in two or three dimensions.

Roy et al., MedNeXt: Transformer-driven Scaling of ConvNets for Medical Image Segmentation, MICCAI 2023
(arXiv:2303.09975). A convolution with a large kernel is depthwise: it mixes voxels, but no channels. Two pointwise
convolutions mix channels, between them there are `expansion` times as many. Blocks that change the resolution are of
the same kind. Skip connections of the network are added, not concatenated, and all decoder stages are supervised.

The paper's group normalisation has one channel in each group: it is instance normalisation. Weights start as torch
makes them. A plan of an anisotropic dataset has strides and kernels of 1 along its coarse axis, as for a U-Net.
"""

from __future__ import annotations

from itertools import pairwise

import torch.nn.functional as F
from torch import Tensor, nn

from nnunet_lite.networks.unet import ACTIVATION, CONVOLUTION, NORM, TRANSPOSED, EncoderDecoder, Size, convolution
from nnunet_lite.planning.schema import Network
from nnunet_lite.planning.topology import EXPANSION, per_stage


class MedNeXtBlock(nn.Module):
    """Depthwise convolution, normalisation, expansion, GELU, compression; and a residual connection around them.

    Parameters
    ----------
    spec : Network
        Its normalisation and activation.
    n_in, n_out : int
        Channels.
    expansion : int
        How many times as many channels the activation has.
    kernel : tuple of int
        Size of the depthwise convolution, odd.
    stride : tuple of int, optional
        By which the block shortens the axes; its residual connection is a pointwise convolution of that stride.
    up : bool
        Whether it lengthens them instead, by transposed convolutions.
    """

    def __init__(
        self, spec: Network, n_in: int, n_out: int, expansion: int, kernel: Size, stride: Size = (), up: bool = False
    ) -> None:
        super().__init__()
        dimensions, ones, padding = len(kernel), (1,) * len(kernel), [size // 2 for size in kernel]
        resampling = (TRANSPOSED if up else CONVOLUTION)[dimensions]
        self.depthwise = resampling(n_in, n_in, kernel, stride=stride or ones, padding=padding, groups=n_in)
        self.norm = NORM[spec.norm][dimensions](n_in)
        self.expand = convolution(n_in, expansion * n_in, ones, ones)
        self.activation = ACTIVATION[spec.activation]()
        self.compress = convolution(expansion * n_in, n_out, ones, ones)
        self.residual = resampling(n_in, n_out, ones, stride=stride) if stride else nn.Identity()
        # A transposed convolution ends at the last coarse voxel; as in the authors' code, zeros are put in front.
        self.border = [n for step in reversed(stride) for n in (step - 1, 0)] if up else []

    def forward(self, x: Tensor) -> Tensor:
        out = self.compress(self.activation(self.expand(self.norm(self.depthwise(x)))))
        out = out + self.residual(x)
        return F.pad(out, self.border) if self.border else out


class MedNeXt(EncoderDecoder):
    """The MedNeXt of a plan, see `EncoderDecoder`.

    Parameters
    ----------
    spec : Network
        Kind and size, features, strides, kernels and numbers of blocks, finest stage first.
    n_in : int
        Number of input channels.
    n_out : int
        Number of output channels: classes with the background, or regions.
    """

    def __init__(self, spec: Network, n_in: int, n_out: int) -> None:
        super().__init__(spec)
        features, kernels, stages = spec.features, spec.kernels, range(len(spec.features))
        ratios, ones = per_stage(EXPANSION[spec.kind], len(features)), (1,) * len(kernels[0])

        def blocks(i: int, n: int) -> list[MedNeXtBlock]:
            return [MedNeXtBlock(spec, features[i], features[i], ratios[i], kernels[i]) for _ in range(n)]

        down = [
            MedNeXtBlock(spec, features[i], features[j], ratios[j], kernels[j], spec.strides[j])
            for i, j in pairwise(stages)
        ]
        up = [
            MedNeXtBlock(spec, features[j], features[i], ratios[i], kernels[j], spec.strides[j], up=True)
            for i, j in pairwise(stages)
        ]
        decoder = zip(stages[:-1], reversed(spec.decoder_convolutions), strict=True)
        self.stem = convolution(n_in, features[0], ones, ones)
        self.encoder = nn.ModuleList(nn.Sequential(*down[i - 1 : i], *blocks(i, spec.blocks[i])) for i in stages)
        self.upsample = nn.ModuleList(reversed(up))  # the decoder runs from the coarsest stage to the finest
        self.decoder = nn.ModuleList(reversed([nn.Sequential(*blocks(i, n)) for i, n in decoder]))
        self.heads = nn.ModuleList(convolution(features[i], n_out, ones, ones) for i in reversed(stages[:-1]))

    @staticmethod
    def join(up: nn.Module, x: Tensor, skip: Tensor) -> Tensor:
        """Upsample the coarser features and add those of the skip connection."""
        upsampled: Tensor = up(x)
        return upsampled + skip
