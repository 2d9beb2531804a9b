"""Instance normalisation that stays in the channels-last layout.

torch's own makes contiguous copies of channels-last tensors and back, which on a CPU costs more than the convolution
beside it. Here the forward pass is batch normalisation of one sample after the other, which is the same thing and has a
kernel for that layout. That of group normalisation with one channel a group would be faster still, but adds up values
and squares in one pass: it loses all digits where a channel's mean is a hundred times its deviation. The backward pass
is written out. scripts/bench_norm.py prints the times.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class InstanceNorm(nn.Module):
    """Zero mean and unit variance for each sample and channel over all positions, then a scale and a shift per channel.

    Ulyanov et al. 2016, arXiv:1607.08022. Input and output: (batch, channels, *positions), two or three of them.
    """

    def __init__(self, channels: int, eps: float = 1e-5) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels))

    def forward(self, x: Tensor) -> Tensor:
        if x.is_cpu and is_channels_last(x):
            return _ChannelsLast.apply(x, self.weight, self.bias, self.eps)
        return F.instance_norm(x, weight=self.weight, bias=self.bias, eps=self.eps)


def is_channels_last(x: Tensor) -> bool:
    layout = torch.channels_last if x.ndim == 4 else torch.channels_last_3d
    return x.is_contiguous(memory_format=layout) and not x.is_contiguous()


class _ChannelsLast(torch.autograd.Function):
    """y = (x - mean) * rstd * weight + bias, and its gradient from two sums per sample and channel."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
        y, mean, rstd = _normalized(x, weight, bias, eps)
        ctx.save_for_backward(x, weight, mean.float(), rstd.float())
        return y

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        x, weight, mean, rstd = ctx.saved_tensors
        (grad,) = gradients
        positions, size = tuple(range(2, x.ndim)), x[0, 0].numel()
        sum_grad = grad.sum(positions, dtype=torch.float32)
        sum_grad_xhat = ((grad * x).sum(positions, dtype=torch.float32) - mean * sum_grad) * rstd
        # dx = rstd * weight * (grad - mean(grad) - xhat * mean(grad * xhat)), as grad * a + x * b + c
        a = rstd * weight
        b = -a * rstd * sum_grad_xhat / size
        c = -a * sum_grad / size - b * mean
        a, b, c = (_over(positions, t).to(x.dtype) for t in (a, b, c))
        dx = torch.addcmul(c, x, b).addcmul_(grad, a)
        return dx, sum_grad_xhat.sum(0).to(weight.dtype), sum_grad.sum(0).to(weight.dtype), None


def _normalized(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """The output, and mean and 1 / deviation (batch, channels)."""
    batch, channels = x.shape[:2]
    y, mean, rstd = torch.empty_like(x), weight.new_empty(batch, channels), weight.new_empty(batch, channels)
    for i in range(batch):
        into = (y[i : i + 1], mean[i], rstd[i])
        torch.native_batch_norm(x[i : i + 1], weight, bias, None, None, True, 0.0, eps, out=into)
    return y, mean, rstd


def _over(positions: tuple[int, ...], values: Tensor) -> Tensor:
    """(batch, channels) so that it broadcasts over positions."""
    return values.reshape(*values.shape, *(1 for _ in positions))


def mixes_samples(network: nn.Module) -> bool:
    """Whether a network normalises over its batch, so that what becomes of a sample depends on the others."""
    return any(isinstance(layer, nn.modules.batchnorm._BatchNorm) for layer in network.modules())
