"""One sample is convolved as fast as several, with torch's results."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from nnunet_lite.networks.conv import Conv2d, Conv3d


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize(("kind", "torchs", "shape"), [(Conv2d, nn.Conv2d, (9, 12)), (Conv3d, nn.Conv3d, (5, 9, 12))])
@pytest.mark.parametrize("last", [True, False])
def test_one_small_sample_goes_to_onednn(
    kind: type[nn.Conv2d] | type[nn.Conv3d],
    torchs: type[nn.Conv2d] | type[nn.Conv3d],
    shape: tuple[int, ...],
    stride: int,
    bias: bool,
    last: bool,
) -> None:
    torch.manual_seed(0)
    layout = (torch.channels_last if len(shape) == 2 else torch.channels_last_3d) if last else torch.contiguous_format
    layer = kind(6, 8, 3, stride, padding=1, bias=bias).to(memory_format=layout)  # type: ignore[call-overload]
    other = torchs(6, 8, 3, stride, padding=1, bias=bias)
    other.load_state_dict(layer.state_dict())
    x = torch.randn(1, 6, *shape).contiguous(memory_format=layout)
    found, wanted = layer(x), other(x)
    assert "Mkldnn" in found.grad_fn.name()
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)
    upstream = torch.randn_like(wanted)
    gradients = [
        torch.autograd.grad(y, tuple(of.parameters()), upstream) for y, of in ((found, layer), (wanted, other))
    ]
    for mine, theirs in zip(*gradients, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-4)


def test_several_samples_and_other_types_are_torchs() -> None:
    layer = Conv2d(6, 8, 3)
    assert "Mkldnn" not in layer(torch.randn(2, 6, 9, 9)).grad_fn.name()
    assert layer.double()(torch.randn(1, 6, 9, 9).double()).dtype == torch.float64
    with torch.autocast("cpu", torch.bfloat16):
        assert layer.float()(torch.randn(1, 6, 9, 9)).dtype == torch.bfloat16
