"""Optimizers, learning-rate schedules and the moving average of the weights."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from nnunet_lite.settings import OptimizerSettings, ScheduleSettings

_LEAST_INPUTS = 4  # of a kernel that Muon trains
_ADAM_SIZE = 0.2  # root mean square of a step of AdamW, in learning rates
_NEWTON_SCHULZ = ((4.0848, -6.8946, 2.9270), (3.9505, -6.3029, 2.6377), (3.7418, -5.5913, 2.3037),
                  (2.8769, -3.1427, 1.2046), (2.8366, -3.0525, 1.2012))  # fmt: skip
_IMPROVEMENT = 5e-3  # of the average loss, below which an epoch does not count as better


def make_optimizer(network: nn.Module, settings: OptimizerSettings, device: torch.device) -> torch.optim.Optimizer:
    """Return SGD with Nesterov momentum, Adam, AdamW or Muon for the weights that are not frozen.

    Fused kernels are used where torch has them: they take a third of the time, on a CPU too.
    """
    kinds: dict[str, Callable[..., torch.optim.Optimizer]] = {
        "sgd": lambda p, **k: torch.optim.SGD(p, momentum=settings.momentum, nesterov=settings.momentum > 0, **k),
        "adam": torch.optim.Adam,
        "adamw": torch.optim.AdamW,
        "muon": partial(Muon, momentum=settings.momentum),
    }
    options: dict[str, Any] = {"fused": True} if device.type in ("cuda", "cpu") else {}
    weights = [p for p in network.parameters() if p.requires_grad]
    optimizer = kinds[settings.name](weights, lr=settings.lr, weight_decay=settings.weight_decay, **options)
    if settings.name == "sgd" and settings.momentum > 0:
        # the fused kernel creates buffers without a value, and keeps them so if the first step is skipped
        for weight in weights:
            optimizer.state[weight]["momentum_buffer"] = torch.zeros_like(weight)
    return optimizer


class Muon(torch.optim.AdamW):
    """Muon for the kernels of convolutions, AdamW for those of few inputs and for all other weights.

    A step moves a kernel, as a matrix (outputs, inputs x voxels), along its Nesterov momentum with all singular values
    set to one (Jordan et al. 2024, https://kellerjordan.github.io/posts/muon). It is scaled to the size of a step of
    AdamW (Liu et al. 2025, arXiv:2502.16982), so that both parts have one learning rate and weight decay.

    Parameters
    ----------
    weights : list of Parameter
        What is trained.
    momentum : float
        Share of the last step that the next one keeps.
    **options
        Of AdamW.
    """

    def __init__(self, weights: list[nn.Parameter], momentum: float, **options: Any) -> None:
        kernels = [w for w in weights if w.ndim > 3 and w[0, 0].numel() > 1 and w.shape[1] >= _LEAST_INPUTS]
        chosen = set(map(id, kernels))
        super().__init__([{"params": [w for w in weights if id(w) not in chosen]}], **options)
        self.add_param_group({"params": kernels, "momentum": momentum})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> Any:
        groups, self.param_groups = self.param_groups, self.param_groups[:1]
        try:
            loss = super().step(closure)
        finally:
            self.param_groups = groups
        kernels, rate, momentum = (groups[1][key] for key in ("params", "lr", "momentum"))
        skip = getattr(self, "found_inf", None)  # on a GPU: 1 if a gradient is not finite, and the step does nothing
        done = 1.0 if skip is None else 1.0 - skip
        for w in kernels:
            if w.grad is None:
                continue
            if w not in self.state:  # AdamW loads only states that have a step
                self.state[w] = {"momentum_buffer": torch.zeros_like(w), "step": torch.zeros(())}
            grad = w.grad if skip is None else torch.where(skip > 0, 0, w.grad)
            average = self.state[w]["momentum_buffer"].lerp_(grad, (1 - momentum) * done)
            matrix = grad.lerp(average, momentum).flatten(1)
            size = rate * _ADAM_SIZE * max(matrix.shape) ** 0.5
            w.mul_(1 - rate * groups[1]["weight_decay"] * done)
            w.sub_(orthogonalize(matrix).view_as(w) * (size * done))
        return loss


def orthogonalize(matrix: Tensor) -> Tensor:
    """Return a matrix with about the same singular vectors, and singular values from 0.98 to 1.03.

    Newton-Schulz iterations X <- (a + b XX' + c (XX')^2) X, whose coefficients differ in each (Jordan et al. 2024; the
    coefficients by Cesista, You and Jordan 2025). They are computed on XX' alone, which is small: its product with the
    matrix follows at the end.
    """
    if len(matrix) > matrix.shape[1]:
        return orthogonalize(matrix.t()).t()
    matrix = matrix.float() / (matrix.norm() + 1e-12)
    gram = matrix @ matrix.t()
    identity = factor = torch.eye(len(matrix), device=matrix.device)
    for a, b, c in _NEWTON_SCHULZ:
        step = a * identity + b * gram + c * (gram @ gram)
        factor, gram = step @ factor, step @ gram @ step
    return factor @ matrix


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
    if settings.cooldown and progress > (begin := 1 - settings.cooldown):  # falls from what the schedule has there
        base, progress = base * max(0.0, 1 - progress) / settings.cooldown, begin
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
