"""Optimizers and learning-rate schedules: two small registries."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from nnunet_lite.settings import OptimizerSettings, ScheduleSettings


def make_optimizer(network: nn.Module, settings: OptimizerSettings, device: torch.device) -> torch.optim.Optimizer:
    """SGD with Nesterov momentum, Adam or AdamW, of the weights that are not frozen.

    Fused kernels where torch has them: on a CPU, too, they take a third of the time.
    """
    make: dict[str, Callable[..., torch.optim.Optimizer]] = {
        "sgd": lambda p, **k: torch.optim.SGD(p, momentum=settings.momentum, nesterov=settings.momentum > 0, **k),
        "adam": torch.optim.Adam,
        "adamw": torch.optim.AdamW,
    }
    options: dict[str, Any] = {"fused": True} if device.type in ("cuda", "cpu") else {}
    weights = [p for p in network.parameters() if p.requires_grad]
    made = make[settings.name](weights, lr=settings.lr, weight_decay=settings.weight_decay, **options)
    if settings.name == "sgd" and settings.momentum > 0:
        # the fused kernel makes them without a value, which they keep where the first step is skipped
        for weight in weights:
            made.state[weight]["momentum_buffer"] = torch.zeros_like(weight)
    return made


def learning_rate(base: float, settings: ScheduleSettings, progress: float) -> float:
    """The rate when a share `progress` (0..1) of the run is done. Plateau: `base` is what the rule left of it."""
    if progress < settings.warmup:
        return base * max(progress / settings.warmup, 0.01)
    if settings.name == "poly":
        return base * max(0.0, 1 - progress) ** settings.power
    if settings.name == "cosine":
        return base * 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))
    return base


@dataclass(frozen=True)
class Plateau:
    """The rule of the original nnU-Net (Isensee et al. 2018, arXiv:1809.10486) on the moving average of the loss.

    `factor` is what it has made of the learning rate so far; the rate itself is the settings', which may change.
    """

    average: float | None = None
    best: float = math.inf
    since: int = 0
    factor: float = 1.0

    def after_epoch(self, loss: float, settings: ScheduleSettings) -> Plateau:
        """Average the loss in; after `patience` epochs without improvement multiply the rate by `factor`."""
        average = loss if self.average is None else 0.93 * self.average + 0.07 * loss
        improved = average < self.best - 5e-3
        since = 0 if improved else self.since + 1
        best = average if improved else self.best
        if since > settings.patience:
            return Plateau(average, best, 0, self.factor * settings.factor)
        return Plateau(average, best, since, self.factor)


def start_average(network: nn.Module) -> dict[str, Tensor]:
    """A copy of a network's weights and buffers, from which their moving average starts."""
    return {name: value.detach().clone() for name, value in network.state_dict().items()}


@torch.no_grad()
def average_step(average: dict[str, Tensor], network: nn.Module, decay: float, number: int) -> None:
    """Move the average towards the weights after step `number`; at first faster, to forget the random start."""
    share = 1 - min(decay, (1 + number) / (10 + number))
    own = network.state_dict()
    floats = [name for name, value in average.items() if value.is_floating_point()]
    torch._foreach_lerp_([average[n] for n in floats], [own[n] for n in floats], share)
    for name in average.keys() - set(floats):
        average[name].copy_(own[name])
