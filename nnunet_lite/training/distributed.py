"""Data-parallel training on several GPUs, or on several CPU processes.

NOTE TO TASK C: a first cut, so that loop.py imports; extend it (current, start, share, launch), keep these names.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor

T = TypeVar("T")


@dataclass(frozen=True)
class Ranks:
    """Which of how many processes this one is; `local` counts those on this machine."""

    rank: int = 0
    world: int = 1
    local: int = 0


ALONE = Ranks()


def from_first(value: T, ranks: Ranks) -> T:
    """The value that the first rank has."""
    if ranks.world == 1:
        return value
    box = [value]
    torch.distributed.broadcast_object_list(box, src=0)
    return box[0]


def any_rank(value: int, ranks: Ranks) -> int:
    """The largest value that any rank has."""
    if ranks.world == 1:
        return value
    found: list[Any] = [0] * ranks.world
    torch.distributed.all_gather_object(found, value)
    return max(found)


class _Sum(torch.autograd.Function):
    """Sum over the ranks. All have the same loss, so each one's gradient is that of its own part times the ranks."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        total = x.clone()
        torch.distributed.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        return gradients[0] * torch.distributed.get_world_size()


def sum_over_ranks(x: Tensor) -> Tensor:
    """The sum of a tensor over all ranks, through which gradients flow."""
    return _Sum.apply(x)
