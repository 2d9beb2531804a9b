"""Our instance normalisation equals torch's, forward and backward, in either layout."""

import pytest
import torch
import torch.nn.functional as F

from nnunet_lite.networks.norm import InstanceNorm, is_channels_last


@pytest.mark.parametrize("shape", [(2, 5, 6, 7, 4), (3, 4, 9, 8), (2, 3, 11, 10, 12), (2, 3, 40, 30)])
@pytest.mark.parametrize("channels_last", [True, False])
def test_equals_torch(shape: tuple[int, ...], channels_last: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(shape, generator=generator) * 3 + 2
    gradient = torch.randn(shape, generator=generator)
    norm = InstanceNorm(shape[1])
    torch.nn.init.uniform_(norm.weight, 0.5, 2)
    torch.nn.init.normal_(norm.bias)
    ours, theirs = x.clone().requires_grad_(), x.clone().requires_grad_()
    layout = torch.channels_last if x.ndim == 4 else torch.channels_last_3d
    given = ours.contiguous(memory_format=layout) if channels_last else ours
    assert is_channels_last(given) == channels_last
    y = norm(given)
    y.backward(gradient)
    weight, bias = (p.detach().clone().requires_grad_() for p in (norm.weight, norm.bias))
    expected = F.instance_norm(theirs, weight=weight, bias=bias, eps=1e-5)
    expected.backward(gradient)
    torch.testing.assert_close(y, expected, rtol=1e-4, atol=1e-5)
    for got, want in ((ours.grad, theirs.grad), (norm.weight.grad, weight.grad), (norm.bias.grad, bias.grad)):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)
    assert is_channels_last(y) == channels_last


@pytest.mark.parametrize("side", [4, 12])
def test_a_constant_image_is_normalised_to_the_shift(side: int) -> None:
    """Rounding must not make its variance negative."""
    x = torch.full((2, 3, side, side, side), 1234.5).contiguous(memory_format=torch.channels_last_3d).requires_grad_()
    norm = InstanceNorm(3)
    torch.nn.init.constant_(norm.bias, 0.25)
    y = norm(x)
    y.sum().backward()
    assert (y - 0.25).abs().max() < 1
    assert torch.isfinite(y).all() and x.grad is not None and torch.isfinite(x.grad).all()


@pytest.mark.parametrize("mean", [0.0, 10.0, 100.0])
def test_a_channel_far_from_zero_keeps_its_digits(mean: float) -> None:
    """A kernel that goes through them once is off by 0.15 at a mean of 100 deviations."""
    x = (torch.randn(1, 8, 40, 48, 40, generator=torch.Generator().manual_seed(0)) + mean).contiguous(
        memory_format=torch.channels_last_3d
    )
    exact = torch.nn.functional.instance_norm(x.double())
    assert (InstanceNorm(8)(x) - exact).abs().max() < 1e-3


def test_low_precision_keeps_its_statistics_in_float32() -> None:
    generator = torch.Generator().manual_seed(0)
    x = (torch.randn(2, 4, 9, 8, generator=generator) * 3 + 2).contiguous(memory_format=torch.channels_last)
    low, norm = x.bfloat16().requires_grad_(), InstanceNorm(4)
    y = norm(low)
    y.square().sum().backward()
    assert y.dtype == torch.bfloat16 and low.grad is not None and low.grad.dtype == torch.bfloat16
    torch.testing.assert_close(y.float(), F.instance_norm(low.detach().float()), rtol=0.01, atol=0.01)
    assert norm.weight.grad is not None and norm.weight.grad.dtype == torch.float32
