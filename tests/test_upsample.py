"""Upsampling beside a skip is a transposed convolution and a concatenation, in either layout."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from nnunet_lite.networks.norm import is_channels_last
from nnunet_lite.networks.upsample import joined


@pytest.mark.parametrize("kernel", [(2, 2), (1, 2), (2, 2, 2), (1, 2, 2), (4, 2, 1)])
@pytest.mark.parametrize("channels_last", [True, False])
def test_equals_torch(kernel: tuple[int, ...], channels_last: bool) -> None:
    torch.manual_seed(0)
    axes, make = len(kernel), {2: nn.ConvTranspose2d, 3: nn.ConvTranspose3d}[len(kernel)]
    last = torch.channels_last if axes == 2 else torch.channels_last_3d
    layout = last if channels_last else torch.contiguous_format
    up = make(6, 4, kernel, kernel).to(memory_format=layout)
    positions = (3, 5, 4)[:axes]
    finer = [p * k for p, k in zip(positions, kernel, strict=True)]
    x = torch.randn(2, 6, *positions).contiguous(memory_format=layout).requires_grad_()
    skip = torch.randn(2, 3, *finer).contiguous(memory_format=layout).requires_grad_()
    grad = torch.randn(2, 7, *finer)
    found, expected = joined(up, x, skip), torch.cat((up(x), skip), 1)
    torch.testing.assert_close(found, expected)
    assert is_channels_last(found) == channels_last
    leaves = (x, skip, up.weight, up.bias)
    for a, b in zip(torch.autograd.grad(found, leaves, grad), torch.autograd.grad(expected, leaves, grad), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_low_precision() -> None:
    up = nn.ConvTranspose2d(6, 4, 2, 2)
    x, skip = (torch.randn(1, c, n, n).contiguous(memory_format=torch.channels_last) for c, n in ((6, 4), (3, 8)))
    with torch.autocast("cpu", torch.bfloat16):
        y = joined(up, x.bfloat16(), skip.bfloat16())
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y.float(), torch.cat((up(x), skip), 1), rtol=0.05, atol=0.05)
