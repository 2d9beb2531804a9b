"""The samples of a training batch computed side by side on a CPU, each by threads of its own.

Threads that share each layer of a small network wait for each other after each layer, forwards and backwards.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from nnunet_lite.networks.norm import mixes_samples
from nnunet_lite.networks.threads import pool
from nnunet_lite.networks.unet import UNet


def side_by_side(network: nn.Module) -> nn.Module:
    """The network for training, whose samples are computed apart where none of them changes what becomes of another."""
    return Apart(network) if isinstance(network, UNet) and not mixes_samples(network) else network


class Apart(nn.Module):
    """A U-Net with its outputs and gradients; outside of training, and where the shares would differ, just that."""

    def __init__(self, network: UNet) -> None:
        super().__init__()
        self.network = network

    def forward(self, x: Tensor) -> Tensor | list[Tensor]:
        workers = min(torch.get_num_threads(), len(x))
        if workers < 2 or len(x) % workers or not torch.is_grad_enabled():
            found: Tensor | list[Tensor] = self.network(x)
            return found
        weights = [weight for weight in self.network.parameters() if weight.requires_grad]
        outputs = _Apart.apply(self.network, x, workers, *weights)
        return list(outputs) if self.network.deep_supervision else outputs[0]


class _Apart(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, network: UNet, x: Tensor, workers: int, *weights: Tensor) -> tuple[Tensor, ...]:
        def compute(share: Tensor) -> list[Tensor]:
            with torch.enable_grad():
                found = network(share)
            return found if isinstance(found, list) else [found]

        ctx.set_materialize_grads(False)  # an output that the loss leaves out gives its weights no gradient
        ctx.threads, ctx.weights = pool(workers, torch.get_num_threads() // workers), weights
        ctx.shares = list(ctx.threads.map(compute, x.tensor_split(workers)))
        return tuple(torch.cat([part.detach() for part in parts]) for parts in zip(*ctx.shares, strict=True))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        used = [(i, grad.tensor_split(len(ctx.shares))) for i, grad in enumerate(grads) if grad is not None]

        def compute(number: int) -> Sequence[Tensor | None]:
            outputs = [ctx.shares[number][i] for i, _ in used]
            upstream = [parts[number] for _, parts in used]
            return torch.autograd.grad(outputs, ctx.weights, upstream, allow_unused=True)

        found = list(ctx.threads.map(compute, range(len(ctx.shares))))
        return None, None, None, *(_sum(parts) for parts in zip(*found, strict=True))


def _sum(parts: Sequence[Tensor | None]) -> Tensor | None:
    """In order, whichever was done first."""
    there = [part for part in parts if part is not None]
    return sum(there[1:], there[0]) if there else None
