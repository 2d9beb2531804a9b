"""The network of a run and what trains it, executed in the way that is fastest on this machine.

`make_network` -> `choose_format` (number format and memory layout, timed) -> `make_learner` (optimizer) ->
`parallelize` (several processes, torch.compile) -> `train_step` for each step. `compute_loss` is the forward pass of
training and validation.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from textwrap import shorten
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from nnunet_lite import log
from nnunet_lite.errors import UserError, describe
from nnunet_lite.networks.cpu import parallelize_samples, speed_up_on_cpu
from nnunet_lite.networks.precision import ComputeFormat, list_formats, measure_seconds, pick_device, pick_fastest
from nnunet_lite.networks.unet import build_network, set_deep_supervision
from nnunet_lite.planning.schema import Plan
from nnunet_lite.settings import Settings
from nnunet_lite.training.dataloader import Batch, make_batch
from nnunet_lite.training.distributed import ALONE, from_first, sum_over_ranks
from nnunet_lite.training.finetune import freeze
from nnunet_lite.training.job import Job
from nnunet_lite.training.limits import TIMING_SHARE, limit_seconds
from nnunet_lite.training.loss import alone, deep_supervision_loss
from nnunet_lite.training.optim import make_optimizer, start_average, update_average

LOSS_SCALE = 2.0**16  # of fp16, at the start
_COMPILE_SECONDS = 60.0  # about what torch.compile takes
_COMPILE_GAIN = 0.95  # a compiled step must take at most this share of the time, since each start compiles again


@dataclass
class Learner:
    """A network and what trains it.

    Parameters
    ----------
    network : Module
        The bare network, whose weights are saved.
    forward : Module
        The same, perhaps compiled and data-parallel.
    optimizer : Optimizer
        Of the weights that are not frozen.
    scaler : GradScaler
        Scales the loss for fp16; does nothing otherwise.
    compute : ComputeFormat
        Number format and memory layout.
    average : dict of str to Tensor, or None
        Moving average of the weights, which becomes the model; None without `optimizer.ema`.
    """

    network: nn.Module
    forward: nn.Module
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    compute: ComputeFormat
    average: dict[str, Tensor] | None

    @property
    def parameters(self) -> list[nn.Parameter]:
        return [p for group in self.optimizer.param_groups for p in group["params"]]


def make_network(job: Job) -> nn.Module:
    """Return the network of a job on its device, with random weights that the seed decides."""
    torch.manual_seed(job.seed)
    network = build_network(job.plan, job.configuration, job.settings.network.factory).to(job.device)
    if job.device.type == "cpu":
        speed_up_on_cpu(network)
    set_deep_supervision(network, job.settings.training.deep_supervision)
    return network


def make_learner(job: Job, network: nn.Module, compute: ComputeFormat, scale: float = LOSS_SCALE) -> Learner:
    """Lay the network out in memory and give it an optimizer; `scale` is that of the loss, for fp16."""
    network.to(memory_format=compute.memory_format(job.dimensions))  # type: ignore[call-overload]
    optimizer = make_optimizer(network, job.settings.optimizer, job.device)
    scaler = torch.amp.GradScaler(job.device.type, scale, enabled=compute.precision == "fp16")
    average = None if job.settings.optimizer.ema is None else start_average(network)
    # in the other layout torch computes single samples slowly
    apart = job.device.type == "cpu" and compute.precision == "fp32" and compute.channels_last
    forward = parallelize_samples(network) if apart and job.settings.training.compile is not True else network
    return Learner(network, forward, optimizer, scaler, compute, average)


def parallelize(job: Job, learner: Learner) -> Learner:
    """Let the processes of a data-parallel run sum their gradients, and compile the network where that pays."""
    if job.ranks.world > 1:
        network = learner.network
        if job.device.type == "cuda":  # batch norm by the statistics of the whole batch
            network = nn.SyncBatchNorm.convert_sync_batchnorm(network)
            freeze(network, job.settings.training.freeze)  # the layers are new
        # the coarsest head has no weight in the loss, hence no gradient
        devices = [job.device] if job.device.type == "cuda" else None
        forward = DistributedDataParallel(network, device_ids=devices, find_unused_parameters=True)
        learner = replace(learner, network=network, forward=forward)
    return _compile(job, learner)


def compute_loss(job: Job, learner: Learner, batch: Batch) -> tuple[Tensor, Any]:
    """Return the loss of a batch over all processes, and the network's output."""
    images, classes, _ = batch
    with learner.compute.autocast(job.device):
        outputs = learner.forward(learner.compute.arrange(images))
    reduce = sum_over_ranks if job.ranks.world > 1 else alone
    loss = deep_supervision_loss(outputs, classes, job.plan, job.configuration, job.settings.loss, reduce=reduce)
    return loss, outputs


def train_step(job: Job, learner: Learner, batches: list[Batch], rate: float, number: int) -> tuple[Tensor, Tensor]:
    """Do one step of the optimizer on the mean gradient of some batches.

    Parameters
    ----------
    job, learner : Job, Learner
        What is trained.
    batches : list of Batch
        As many as `training.accumulate`.
    rate : float
        Learning rate.
    number : int
        Index of the step since the run began.

    Returns
    -------
    loss : Tensor
        Mean over the batches, on the device.
    good : Tensor
        False for a step with a gradient that is not finite, which changes nothing. With fp16 it is True if the loss is
        finite: a gradient that overflows only lowers the loss scale.
    """
    torch.manual_seed(job.seed + number)  # for a user's network that draws random numbers
    for group in learner.optimizer.param_groups:
        group["lr"] = rate
    learner.optimizer.zero_grad(set_to_none=True)
    statistics = norm_statistics(learner.network)
    forward, last, losses = learner.forward, len(batches) - 1, []
    for i, batch in enumerate(batches):
        # until the last batch, gradients stay in their process
        with forward.no_sync() if isinstance(forward, DistributedDataParallel) and i < last else nullcontext():
            loss, _ = compute_loss(job, learner, batch)
            learner.scaler.scale(loss / len(batches)).backward()
        losses.append(loss.detach())
    updated = _update_weights(job, learner)
    for value, before in statistics:
        value.copy_(torch.where(updated, value, before))
    if learner.average is not None:
        update_average(learner.average, learner.network, job.settings.optimizer.ema or 0.0, number)
    loss = torch.stack(losses).mean()
    return loss, updated | torch.isfinite(loss) if learner.scaler.is_enabled() else updated


def _update_weights(job: Job, learner: Learner) -> Tensor:
    """Clip and apply the gradients unless one is not finite; return whether they were applied."""
    learner.scaler.unscale_(learner.optimizer)
    norm = nn.utils.clip_grad_norm_(learner.parameters, job.settings.training.gradient_clip or math.inf)
    finite = torch.isfinite(norm)
    if learner.scaler.is_enabled():
        learner.scaler.step(learner.optimizer)
    elif job.device.type == "cuda":
        # fused optimizers read this on the device, and then leave everything as it is
        learner.optimizer.found_inf = (~finite).float()  # type: ignore[attr-defined]
        learner.optimizer.step()
    elif finite:
        learner.optimizer.step()
    learner.scaler.update()
    return finite


@contextmanager
def averaged_weights(learner: Learner) -> Iterator[None]:
    """Give the network its averaged weights, if there are any, for the duration of the block."""
    if learner.average is None:
        yield
        return
    weights = {name: value.clone() for name, value in learner.network.state_dict().items()}
    learner.network.load_state_dict(learner.average)
    try:
        yield
    finally:
        learner.network.load_state_dict(weights)


def norm_statistics(network: nn.Module) -> list[tuple[Tensor, Tensor]]:
    """Return the running statistics of batch norm, each with a copy."""
    layers = (module for module in network.modules() if isinstance(module, nn.modules.batchnorm._NormBase))
    return [(value, value.clone()) for layer in layers for value in layer.buffers()]


# ---------------------------------------------------------------------------------------------- what is fastest here


@contextmanager
def _trial(network: nn.Module) -> Iterator[None]:
    """Undo what trial steps do to the running statistics of batch norm."""
    statistics = norm_statistics(network)
    try:
        yield
    finally:
        for value, before in statistics:
            value.copy_(before)


def _trial_step(job: Job, learner: Learner, batch: Batch) -> Callable[[], None]:
    """A step that changes no weights: forward and backward."""

    def step() -> None:
        learner.network.zero_grad()
        compute_loss(job, learner, batch)[0].backward()
        learner.network.zero_grad()

    return step


def choose_format(job: Job, network: nn.Module) -> ComputeFormat:
    """Time training steps of the network on a real batch, and return the fastest number format and memory layout.

    With a seed nothing is timed, because what is fastest may change from run to run. Under a time limit the timing ends
    early, with the fastest of the options that were timed until then.
    """
    training = job.settings.training
    options = list_formats(job.device, training.precision, training.channels_last)
    if training.seed is not None:
        return replace(options[-1], channels_last=options[0].channels_last, reason="not timed, because a seed is set")
    batch = make_batch(job, job.training, 0, 0, augment=False)
    single = replace(job, ranks=ALONE)

    def prepare(compute: ComputeFormat) -> Callable[[], None]:
        learner = make_learner(single, network, compute)
        return _trial_step(single, learner if job.ranks.world == 1 else replace(learner, forward=network), batch)

    with _trial(network):
        best = pick_fastest(options, prepare, job.device, TIMING_SHARE * limit_seconds(job.settings))
    return from_first(best, job.ranks)


def _compile(job: Job, learner: Learner) -> Learner:
    """The learner with a compiled network: on request, or on a GPU where it proves to be faster."""
    choice = job.settings.training.compile
    too_short = TIMING_SHARE * limit_seconds(job.settings) < _COMPILE_SECONDS
    if choice is False or (choice == "auto" and (job.device.type != "cuda" or too_short)):
        return learner
    batch = make_batch(job, job.training, 0, 0, augment=False)
    compiled = replace(learner, forward=torch.compile(learner.forward))  # type: ignore[arg-type]
    times = []
    try:
        with _trial(learner.network):
            for option in (learner, compiled):
                step = _trial_step(job, option, batch)
                step()
                times.append(min(measure_seconds(step, job.device) for _ in range(3)))
    except Exception as error:  # the compiler's own errors, of many kinds: the run continues without it
        reason = shorten(describe(error), 300)
        if job.ranks.world > 1:  # the others may wait for this process, and cannot continue without it
            raise UserError(f"torch.compile failed: {reason}", fix="Use --set training.compile=false.") from error
        log.warn(f"torch.compile failed and is left out: {reason}")
        return learner
    pays = choice is True or from_first(times[1] < _COMPILE_GAIN * times[0], job.ranks)
    log.info(f"{'compiled' if pays else 'not compiled'}: a step takes {times[0]:.3g} s, compiled {times[1]:.3g} s")
    return compiled if pays else learner


def measure_memory(plan: Plan, configuration: str, name: str | None) -> float | None:
    """Measure the GPU memory of two training steps of the default recipe on random data, for `nnlite plan --measure`.

    The first step creates the state of the optimizer, the second one needs it.

    Parameters
    ----------
    plan : Plan
        The plan.
    configuration : str
        Name of a configuration of the plan.
    name : str or None
        Name of the GPU, such as "cuda:1"; None for the first one.

    Returns
    -------
    float or None
        Peak in GB (1e9 bytes); None if it does not fit.

    Raises
    ------
    UserError
        The device is no GPU.
    """
    device = pick_device(name)
    if device.type != "cuda":
        raise UserError("--measure needs a GPU", fix="Leave it out, or run it where there is one.")
    job = Job(plan, configuration, Settings(), 0, Path(), device, [], [])
    shape = (job.planned.batch_size, *job.planned.patch_size)
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats(device)
    try:
        learner = make_learner(job, make_network(job), list_formats(device, "auto", True)[0])
        images = torch.randn(shape[0], plan.n_inputs(configuration), *shape[1:], device=device)
        classes = torch.randint(0, plan.labels.n_classes, shape, device=device, dtype=torch.uint8)
        for number in range(2):
            train_step(job, learner, [(images, classes, ())], 0.01, number)
    except torch.OutOfMemoryError:
        return None
    finally:
        torch.cuda.synchronize(device)
    return torch.cuda.max_memory_allocated(device) / 1e9
