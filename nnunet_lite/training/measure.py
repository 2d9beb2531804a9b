"""How much GPU memory a training step really takes, to hold against what the plan predicts."""

from __future__ import annotations

import torch

from nnunet_lite.errors import UserError
from nnunet_lite.networks.build import build_network
from nnunet_lite.networks.precision import ComputeFormat, list_formats
from nnunet_lite.networks.unet import set_deep_supervision
from nnunet_lite.planning.schema import Plan
from nnunet_lite.settings import Settings
from nnunet_lite.training.loss import deep_supervision_loss
from nnunet_lite.training.optim import make_optimizer


def measure_step(plan: Plan, configuration: str, device: torch.device) -> float | None:
    """Memory in GB at the peak of two training steps of the default recipe on random data; None if it does not fit.

    Two steps, for the optimizer's state comes into being at the end of the first.

    Raises
    ------
    UserError : the device is no GPU.
    """
    if device.type != "cuda":
        raise UserError("--measure needs a GPU", fix="Leave it out, or run it where there is one.")
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats(device)
    try:
        train_step(plan, configuration, device, list_formats(device, "auto", True)[0], steps=2)
    except torch.OutOfMemoryError:
        return None
    finally:
        torch.cuda.synchronize(device)
    return torch.cuda.max_memory_allocated(device) / 1e9


def train_step(plan: Plan, configuration: str, device: torch.device, arithmetic: ComputeFormat, steps: int) -> float:
    """Some training steps of the default recipe on random data; returns the last loss."""
    settings, planned = Settings(), plan.configuration(configuration)
    network = build_network(plan, configuration).to(device)
    network.to(memory_format=arithmetic.memory_format(planned.dimensions))  # type: ignore[call-overload]
    set_deep_supervision(network, True)
    optimizer = make_optimizer(network, settings.optimizer, device)
    scaler = torch.amp.GradScaler(device.type, enabled=arithmetic.precision == "fp16")
    images = torch.randn(planned.batch_size, plan.n_inputs(configuration), *planned.patch_size, device=device)
    shape = (planned.batch_size, *planned.patch_size)
    classes = torch.randint(0, plan.labels.n_classes, shape, device=device, dtype=torch.uint8)
    loss = torch.zeros(())
    for _ in range(steps):
        optimizer.zero_grad(set_to_none=True)
        with arithmetic.autocast(device):
            outputs = network(arithmetic.arrange(images))
        loss = deep_supervision_loss(outputs, classes, plan, configuration, settings.loss)
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
    return float(loss.detach())
