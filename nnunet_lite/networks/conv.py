"""Convolutions that take the fastest way that a CPU has; elsewhere they are torch's."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from nnunet_lite.networks.winograd import convolved, saves_time


class Conv2d(nn.Conv2d):
    def forward(self, x: Tensor) -> Tensor:
        return _by_onednn(self, x) if _is_passed_over(self, x) else super().forward(x)


class Conv3d(nn.Conv3d):
    def forward(self, x: Tensor) -> Tensor:
        if saves_time(self, x):
            return convolved(x, self.weight, self.bias)
        return _by_onednn(self, x) if _is_passed_over(self, x) else super().forward(x)


def _is_passed_over(layer: nn.Conv2d | nn.Conv3d, x: Tensor) -> bool:
    """Whether torch may leave oneDNN, its fast library for CPUs, out: it does for one sample of a few thousand values.

    Its own convolution, which comes instead, takes four times as long at the sizes of a U-Net.
    """
    return (
        not torch.compiler.is_compiling()  # first: it exports graphs for any batch
        and len(x) == 1
        and x.is_cpu
        and x.dtype == torch.float32
        and max(layer.kernel_size) > 1
        and not isinstance(layer.padding, str)
        and torch.backends.mkldnn.is_available()
        and not torch.is_autocast_enabled("cpu")
        and not torch.jit.is_tracing()
    )


def _by_onednn(layer: nn.Conv2d | nn.Conv3d, x: Tensor) -> Tensor:
    assert not isinstance(layer.padding, str)
    return torch.mkldnn_convolution(
        x, layer.weight, layer.bias, layer.padding, layer.stride, layer.dilation, layer.groups
    )
