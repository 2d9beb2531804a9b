"""Samples that are computed side by side give the outputs and gradients of the whole batch."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from nnunet_lite.networks.apart import Apart, side_by_side
from nnunet_lite.networks.build import supervise_deeply
from nnunet_lite.networks.unet import UNet
from nnunet_lite.planning.schema import Plan
from nnunet_lite.workspace import planned_paths


@pytest.fixture(autouse=True)
def two_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def small(tiny_workspace: Path, norm: str = "instance") -> UNet:
    planned = Plan.read(planned_paths(tiny_workspace).plans).configuration("3d_fullres").network
    torch.manual_seed(0)
    features = tuple(min(4 * 2**i, 16) for i in range(len(planned.features)))
    return UNet(planned.model_copy(update={"features": features, "norm": norm}), 1, 3)


def learnt(network: nn.Module, forward: nn.Module, x: Tensor, heads: slice) -> tuple[list[Tensor], list[Tensor | None]]:
    """Outputs of a batch, and the gradients of a loss that sees the batch as a whole."""
    network.zero_grad()
    found = forward(x)
    outputs = found if isinstance(found, list) else [found]
    sum(y.softmax(1).square().mean((0, 2, 3, 4)).log().sum() for y in outputs[heads]).backward()  # type: ignore[union-attr]
    return [y.detach() for y in outputs], [w.grad for w in network.parameters()]


@pytest.mark.parametrize("deep", [True, False])
@pytest.mark.parametrize("layout", [torch.channels_last_3d, torch.contiguous_format])
def test_outputs_and_gradients_are_those_of_the_batch(
    tiny_workspace: Path, deep: bool, layout: torch.memory_format
) -> None:
    network = small(tiny_workspace).to(memory_format=layout)  # type: ignore[call-overload]
    supervise_deeply(network, deep)
    next(network.parameters()).requires_grad_(False)
    x = torch.randn(4, 1, 16, 32, 16).contiguous(memory_format=layout)
    apart = side_by_side(network)
    heads = slice(0, -1) if deep else slice(0, 1)  # the coarsest one is left out of the loss
    (found, gradients), (wanted, expected) = (learnt(network, f, x, heads) for f in (apart, network))
    assert len(found) == len(wanted) == (len(network.heads) if deep else 1)
    for mine, theirs in zip(found, wanted, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-4)
    assert [g is None for g in gradients] == [g is None for g in expected]
    for mine, theirs in zip(gradients, expected, strict=True):
        if mine is not None and theirs is not None:
            assert float((mine - theirs).norm()) <= 1e-4 * float(theirs.norm()) + 1e-5
    again = learnt(network, apart, x, heads)[1]
    assert all(a is b or torch.equal(a, b) for a, b in zip(gradients, again, strict=True) if a is not None)  # type: ignore[arg-type]


def test_it_is_left_alone_where_samples_depend_on_each_other_or_do_not_share_out(tiny_workspace: Path) -> None:
    mixing, own = small(tiny_workspace, "batch"), nn.Conv3d(1, 3, 1)
    assert side_by_side(mixing) is mixing
    assert side_by_side(own) is own
    network = small(tiny_workspace)
    apart = side_by_side(network)
    assert isinstance(apart, Apart)
    for n in (1, 3):
        x = torch.randn(n, 1, 16, 32, 16)
        assert torch.equal(apart(x), network(x))
    with torch.inference_mode():
        x = torch.randn(2, 1, 16, 32, 16)
        assert torch.equal(apart(x), network(x))
