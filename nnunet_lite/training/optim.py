"""Optimizers, learning-rate schedules and the moving average of the weights."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from nnunet_lite.settings import OptimizerSettings, ScheduleSettings

_IMPROVEMENT = 5e-3  # of the average loss, below which an epoch does not count as better


def make_optimizer(network: nn.Module, settings: OptimizerSettings, device: torch.device) -> torch.optim.Optimizer:
    """Return SGD with Nesterov momentum, Adam or AdamW for the weights that are not frozen.

    Fused kernels are used where torch has them: they take a third of the time, on a CPU too.
    """
    kinds: dict[str, Callable[..., torch.optim.Optimizer]] = {
        "sgd": lambda p, **k: torch.optim.SGD(p, momentum=settings.momentum, nesterov=settings.momentum > 0, **k),
        "adam": torch.optim.Adam,
        "adamw": torch.optim.AdamW,
    }
    options: dict[str, Any] = {"fused": True} if device.type in ("cuda", "cpu") else {}
    weights = [p for p in network.parameters() if p.requires_grad]
    optimizer = kinds[settings.name](weights, lr=settings.lr, weight_decay=settings.weight_decay, **options)
    if settings.name == "sgd" and settings.momentum > 0:
        # the fused kernel creates buffers without a value, and keeps them so if the first step is skipped
        for weight in weights:
            optimizer.state[weight]["momentum_buffer"] = torch.zeros_like(weight)
    return optimizer


def learning_rate(base: float, settings: ScheduleSettings, progress: float) -> float:
    """Return the learning rate at a point of the run.

    Parameters
    ----------
    base : float
        Initial rate; for the plateau schedule multiplied by `Plateau.factor`.
    settings : ScheduleSettings
        Schedule and warm-up.
    progress : float
        Share of the run that is done, from 0 to 1.
    """
    if progress < settings.warmup:
        return base * max(progress / settings.warmup, 0.01)
    if settings.name == "poly":
        return base * max(0.0, 1 - progress) ** settings.power
    if settings.name == "cosine":
        return base * 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))
    return base


@dataclass(frozen=True)
class Plateau:
    """The schedule of the original nnU-Net (Isensee et al. 2018, arXiv:1809.10486) on the average training loss.

    Parameters
    ----------
    average : float or None
        Moving average of the training loss.
    best : float
        The lowest average so far.
    since : int
        Epochs without improvement.
    factor : float
        Product of all reductions so far; the settings' rate is multiplied by it, since that may change.
    """

    average: float | None = None
    best: float = math.inf
    since: int = 0
    factor: float = 1.0

    def update(self, loss: float, settings: ScheduleSettings) -> Plateau:
        """Return the state after an epoch: `patience` epochs without improvement reduce the rate by `factor`."""
        average = loss if self.average is None else 0.93 * self.average + 0.07 * loss
        improved = average < self.best - _IMPROVEMENT
        since = 0 if improved else self.since + 1
        best = average if improved else self.best
        if since > settings.patience:
            return Plateau(average, best, 0, self.factor * settings.factor)
        return Plateau(average, best, since, self.factor)


def start_average(network: nn.Module) -> dict[str, Tensor]:
    """Return a copy of a network's weights and buffers, with which their moving average starts."""
    return {name: value.detach().clone() for name, value in network.state_dict().items()}


@torch.no_grad()
def update_average(average: dict[str, Tensor], network: nn.Module, decay: float, step: int) -> None:
    """Move an average towards the weights after a step, in place; faster at first, to forget the random start."""
    share = 1 - min(decay, (1 + step) / (10 + step))
    weights = network.state_dict()
    floats = [name for name, value in average.items() if value.is_floating_point()]
    torch._foreach_lerp_([average[name] for name in floats], [weights[name] for name in floats], share)
    for name in average.keys() - set(floats):
        average[name].copy_(weights[name])
