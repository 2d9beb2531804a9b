"""What learns, and one step of it."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from textwrap import shorten
from typing import Any

import torch
from torch import Tensor, nn

from nnunet_lite import log
from nnunet_lite.errors import UserError, describe
from nnunet_lite.networks.build import build_network
from nnunet_lite.networks.cpu import parallelize_samples, speed_up_on_cpu
from nnunet_lite.networks.precision import ComputeFormat, list_formats, measure_seconds, pick_fastest
from nnunet_lite.networks.unet import set_deep_supervision
from nnunet_lite.training.batches import Batch, make_batch
from nnunet_lite.training.distributed import ALONE, from_first, sum_over_ranks
from nnunet_lite.training.initial import freeze
from nnunet_lite.training.job import Job
from nnunet_lite.training.limit import PROBED
from nnunet_lite.training.loss import alone, deep_supervision_loss
from nnunet_lite.training.optim import average_step, make_optimizer, start_average

_COMPILING = 60.0  # s; about what torch.compile takes
_WORTH = 0.95  # a compiled network must take at most this share of the time: compiling is paid again at every start


@dataclass
class Learner:
    """A network and what trains it.

    `network` is the bare one, whose weights are saved; `forward` is the same, perhaps compiled and made data-parallel.
    `average` : moving average of the weights, which becomes the model; None where the settings want none.
    """

    network: nn.Module
    forward: nn.Module
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    arithmetic: ComputeFormat
    average: dict[str, Tensor] | None

    @property
    def parameters(self) -> list[nn.Parameter]:
        return [p for group in self.optimizer.param_groups for p in group["params"]]


def make_network(job: Job) -> nn.Module:
    """The network of a job on its device, with random weights; the seed decides them."""
    torch.manual_seed(job.seed)
    network = build_network(job.plan, job.configuration, job.settings.network.factory).to(job.device)
    if job.device.type == "cpu":
        speed_up_on_cpu(network)
    set_deep_supervision(network, job.settings.training.deep_supervision)
    return network


def make_learner(job: Job, network: nn.Module, arithmetic: ComputeFormat, scale: float) -> Learner:
    """Lay the network out in memory and give it an optimizer; `scale` is that of the loss, for fp16."""
    network.to(memory_format=arithmetic.memory_format(job.dimensions))  # type: ignore[call-overload]
    optimizer = make_optimizer(network, job.settings.optimizer, job.device)
    scaler = torch.amp.GradScaler(job.device.type, scale, enabled=arithmetic.precision == "fp16")
    average = None if job.settings.optimizer.ema is None else start_average(network)
    # in the other layout torch computes single samples slowly
    apart = job.device.type == "cpu" and arithmetic.precision == "fp32" and arithmetic.channels_last
    forward = parallelize_samples(network) if apart and job.settings.training.compile is not True else network
    return Learner(network, forward, optimizer, scaler, arithmetic, average)


def parallel(job: Job, learner: Learner) -> Learner:
    """Let the ranks of a data-parallel run add up their gradients, and compile the network where that pays."""
    forward = learner.forward
    if job.ranks.world > 1:
        forward = learner.network
        if job.device.type == "cuda":  # batch norm by the statistics of the whole batch
            forward = nn.SyncBatchNorm.convert_sync_batchnorm(forward)
            freeze(forward, job.settings.training.freeze)  # the layers are others now
            learner = replace(learner, network=forward)
        # the coarsest head has no weight in the loss, hence no gradient
        devices = [job.device] if job.device.type == "cuda" else None
        forward = nn.parallel.DistributedDataParallel(forward, device_ids=devices, find_unused_parameters=True)
    return _compiled(job, replace(learner, forward=forward))


def loss_of(job: Job, learner: Learner, batch: Batch) -> tuple[Tensor, Any]:
    """Loss of a batch over all ranks, and the network's output."""
    images, classes, _ = batch
    with learner.arithmetic.autocast(job.device):
        outputs = learner.forward(learner.arithmetic.arrange(images))
    reduce = sum_over_ranks if job.ranks.world > 1 else alone
    return deep_supervision_loss(
        outputs, classes, job.plan, job.configuration, job.settings.loss, reduce=reduce
    ), outputs


def train_step(job: Job, learner: Learner, batches: list[Batch], rate: float, number: int) -> tuple[Tensor, Tensor]:
    """One step of the optimizer on the mean gradient of some batches.

    Parameters
    ----------
    number : of the step since the run began.

    Returns
    -------
    The loss, and whether the step was taken: one with a gradient that is not finite is skipped. Both are on the
    device, which is not waited for.
    """
    for group in learner.optimizer.param_groups:
        group["lr"] = rate
    learner.optimizer.zero_grad(set_to_none=True)
    statistics = _statistics(learner.network)
    losses = []
    for i, batch in enumerate(batches):
        with _local(learner.forward, i < len(batches) - 1):
            loss, _ = loss_of(job, learner, batch)
            learner.scaler.scale(loss / len(batches)).backward()
        losses.append(loss.detach())
    taken = _apply(job, learner)
    for value, before in statistics:
        value.copy_(torch.where(taken, value, before))
    if learner.average is not None:
        average_step(learner.average, learner.network, job.settings.optimizer.ema or 0.0, number)
    return torch.stack(losses).mean(), taken


def _statistics(network: nn.Module) -> list[tuple[Tensor, Tensor]]:
    """The running statistics of batch norm, each with a copy of what it is now."""
    layers = (module for module in network.modules() if isinstance(module, nn.modules.batchnorm._NormBase))
    return [(value, value.clone()) for layer in layers for value in layer.buffers()]


def _local(forward: nn.Module, on: bool) -> AbstractContextManager[None]:
    """Gradients stay with their rank until the last batch of a step."""
    if on and isinstance(forward, nn.parallel.DistributedDataParallel):
        return forward.no_sync()
    return nullcontext()


def _apply(job: Job, learner: Learner) -> Tensor:
    """Clip and apply the gradients unless one is not finite; whether they were applied."""
    learner.scaler.unscale_(learner.optimizer)
    limit = job.settings.training.gradient_clip
    norm = nn.utils.clip_grad_norm_(learner.parameters, limit if limit else math.inf)
    finite = torch.isfinite(norm)
    if learner.scaler.is_enabled():
        learner.scaler.step(learner.optimizer)
    elif job.device.type == "cuda":
        # fused optimizers look at this on the device and leave everything as it is
        learner.optimizer.found_inf = (~finite).float()  # type: ignore[attr-defined]
        learner.optimizer.step()
    elif finite:
        learner.optimizer.step()
    learner.scaler.update()
    return finite


@contextmanager
def averaged(learner: Learner) -> Iterator[None]:
    """The network with its averaged weights, where there are such, for the time of the block."""
    if learner.average is None:
        yield
        return
    own = {name: value.clone() for name, value in learner.network.state_dict().items()}
    learner.network.load_state_dict(learner.average)
    try:
        yield
    finally:
        learner.network.load_state_dict(own)


def choose_arithmetic(job: Job, network: nn.Module) -> ComputeFormat:
    """Time a training step of the real network on a real batch in each candidate format and layout."""
    training = job.settings.training
    options = list_formats(job.device, training.precision, training.channels_last)
    if training.seed is not None:  # what is fastest may change from run to run
        return replace(options[-1], channels_last=options[0].channels_last, reason="not timed, for the seed's sake")
    batch = make_batch(job, job.training, 0, 0, augment=False)
    single = replace(job, ranks=ALONE)
    statistics = _statistics(network)  # which the trial steps change

    def prepare(arithmetic: ComputeFormat, batch: Batch) -> Callable[[], None]:
        learner = make_learner(single, network, arithmetic, 1.0)
        return _trial(single, learner if job.ranks.world == 1 else replace(learner, forward=network), batch)

    budget = math.inf if training.time_limit is None else PROBED * 60 * training.time_limit
    if training.time_limit is not None and len(options) > 1:
        small = part_of(job, batch)
        took = measure_seconds(prepare(options[0], small), job.device)
        budget -= took
        if 2 * len(options) * took * batch[0].numel() / small[0].numel() > budget:
            batch = small
    best = pick_fastest(options, partial(prepare, batch=batch), job.device, budget)
    for value, before in statistics:
        value.copy_(before)
    return from_first(best, job.ranks)


def part_of(job: Job, batch: Batch) -> Batch:
    """One sample of a batch and half of its patch along each axis, where the network can take that.

    Parameters
    ----------
    job : Job
        What is trained.
    batch : Batch
        Images (batch, inputs, *patch), classes (batch, *patch) and case ids.
    """
    images, classes, ids = batch
    size = images.shape[2:]
    if job.settings.network.factory is None:
        divisor = job.planned.network.divisor
        half = [max(1, n // d // 2) * d for n, d in zip(size, divisor, strict=True)]
        if any(n > d for n, d in zip(half, divisor, strict=True)):  # instance norm needs more than one voxel
            size = torch.Size(half)
    inside = tuple(slice(0, n) for n in size)
    return images[:1, :, *inside], classes[:1, *inside], ids[:1]


def _trial(job: Job, learner: Learner, batch: Batch) -> Callable[[], None]:
    """A step without its end: forwards and backwards."""

    def work() -> None:
        learner.network.zero_grad()
        loss_of(job, learner, batch)[0].backward()
        learner.network.zero_grad()

    return work


def _compiled(job: Job, learner: Learner) -> Learner:
    """The learner with a compiled network: on request, or on a GPU where it proves to be faster."""
    wanted = job.settings.training.compile
    limit = job.settings.training.time_limit
    too_short = limit is not None and PROBED * 60 * limit < _COMPILING
    if wanted is False or (wanted == "auto" and (job.device.type != "cuda" or too_short)):
        return learner
    batch = make_batch(job, job.training, 0, 0, augment=False)
    statistics = _statistics(learner.network)
    plain, made = learner, replace(learner, forward=torch.compile(learner.forward))  # type: ignore[arg-type]
    times = []
    try:
        for each in (plain, made):
            work = _trial(job, each, batch)
            work()
            times.append(min(measure_seconds(work, job.device) for _ in range(3)))
    except Exception as error:  # the compiler's own errors, of many kinds: the run goes on without it
        why = shorten(describe(error), 300)
        if job.ranks.world > 1:  # the others may wait for this one by now, and cannot go on without it
            raise UserError(f"torch.compile failed: {why}", fix="Use --set training.compile=false.") from error
        log.warn(f"torch.compile failed and is left out: {why}")
        return plain
    finally:
        for value, before in statistics:
            value.copy_(before)
    pays = wanted is True or from_first(times[1] < _WORTH * times[0], job.ranks)
    log.info(f"{'compiled' if pays else 'not compiled'}: a step takes {times[0]:.3g} s, compiled {times[1]:.3g} s")
    return made if pays else plain
