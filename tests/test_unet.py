"""The networks have the shapes, the size and the deep-supervision outputs of the plan."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from nnunet_lite.networks.unet import ResidualBlock, UNet
from nnunet_lite.planning.schema import Network

PLAIN = Network(
    features=(8, 16, 32),
    strides=((1, 1, 1), (1, 2, 2), (2, 2, 2)),
    kernels=((1, 3, 3), (3, 3, 3), (3, 3, 3)),
    blocks=(2, 2, 2),
    decoder_convolutions=(2, 2),
)
RESIDUAL = PLAIN.model_copy(update={"kind": "residual", "blocks": (1, 3, 4), "decoder_convolutions": (1, 1)})
FLAT = Network(
    features=(8, 16), strides=((1, 1), (2, 2)), kernels=((3, 3), (3, 3)), blocks=(2, 2), decoder_convolutions=(2,)
)


@pytest.mark.parametrize("spec", [PLAIN, RESIDUAL])
def test_output_has_the_input_size_and_deep_supervision_the_pooled_ones(spec: Network) -> None:
    net = UNet(spec, 2, 3)
    x = torch.randn(2, 2, 4, 16, 16)
    assert net(x).shape == (2, 3, 4, 16, 16)
    stage = {"features": (8, 16, 32, 32), "strides": (*spec.strides, (1, 2, 2)), "kernels": (*spec.kernels, (3, 3, 3))}
    deeper = spec.model_copy(update={**stage, "blocks": (1,) * 4, "decoder_convolutions": (1,) * 3})
    for one, shapes in ((net, [(4, 16, 16)]), (UNet(deeper, 2, 3), [(4, 16, 16), (4, 8, 8)])):
        one.deep_supervision = True
        assert [tuple(o.shape[2:]) for o in one(x)] == shapes, "without the coarsest"


def test_two_dimensions() -> None:
    assert UNet(FLAT, 3, 2)(torch.randn(1, 3, 10, 14)).shape == (1, 2, 10, 14)


def test_parameters_are_those_of_the_topology() -> None:
    # conv + bias + affine norm of a 2D net of 8 and 16 features, one input, two outputs
    conv = lambda a, b, k=9: a * b * k + b  # noqa: E731
    norm = lambda n: 2 * n  # noqa: E731
    encoder = conv(1, 8) + norm(8) + conv(8, 8) + norm(8) + conv(8, 16) + norm(16) + conv(16, 16) + norm(16)
    decoder = conv(16, 8, 4) + conv(16, 8) + norm(8) + conv(8, 8) + norm(8) + conv(8, 2, 1)
    assert sum(p.numel() for p in UNet(FLAT, 1, 2).parameters()) == encoder + decoder


def test_every_parameter_but_the_coarsest_head_gets_a_gradient_with_deep_supervision() -> None:
    net = UNet(PLAIN, 1, 2)
    net.deep_supervision = True
    sum(o.square().mean() for o in net(torch.randn(1, 1, 4, 8, 8))).backward()
    assert {name for name, p in net.named_parameters() if p.grad is None} == {"heads.0.weight", "heads.0.bias"}
    assert all(torch.isfinite(p.grad).all() for p in net.parameters() if p.grad is not None)


def test_residual_blocks_start_as_their_skip() -> None:
    block = UNet(RESIDUAL, 1, 2).encoder[1][1]
    assert isinstance(block, ResidualBlock)
    x = torch.rand(1, 16, 4, 8, 8)
    assert torch.allclose(block(x), x)


def test_ablations_change_norm_and_activation() -> None:
    bare = UNet(FLAT.model_copy(update={"norm": "none", "activation": "relu"}), 1, 2)
    kinds = {type(m) for m in bare.modules()}
    assert nn.ReLU in kinds and not kinds & {nn.LeakyReLU, nn.InstanceNorm2d, nn.BatchNorm2d}
