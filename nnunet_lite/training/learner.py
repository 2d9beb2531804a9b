"""The network of a run and what trains it, executed in the way that is fastest on this machine.

`make_network` -> `choose_format` (number format, memory format and torch.compile, timed) -> `make_learner` (optimizer)
-> `parallelize` (torch.compile, several processes) -> `train_step` for each step. `compute_loss` is the forward pass of
training and validation.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, replace
from textwrap import shorten
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from nnunet_lite import log
from nnunet_lite.errors import UserError, describe
from nnunet_lite.files import read_json, write_json
from nnunet_lite.networks.build import build_network
from nnunet_lite.networks.cpu import parallelize_samples, speed_up_on_cpu
from nnunet_lite.networks.devices import computes_bf16, describe_wrong_bf16, is_out_of_memory, release_memory
from nnunet_lite.networks.precision import ComputeFormat, apply_format, list_formats, pick_fastest
from nnunet_lite.networks.unet import EncoderDecoder, set_deep_supervision
from nnunet_lite.training.dataloader import Batch, make_batch
from nnunet_lite.training.distributed import from_first, sum_over_ranks
from nnunet_lite.training.finetune import freeze
from nnunet_lite.training.job import Job
from nnunet_lite.training.launch import ALONE
from nnunet_lite.training.limits import TIMING_SHARE, limit_seconds
from nnunet_lite.training.loss import alone, deep_supervision_loss
from nnunet_lite.training.optim import make_optimizer, start_average, update_average

LOSS_SCALE = 2.0**16  # of fp16, at the start
_COMPILE_SECONDS = 60.0  # about what torch.compile takes


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
        How the network computes.
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
    deep = job.settings.training.deep_supervision
    set_deep_supervision(network, deep)
    if isinstance(network, EncoderDecoder):  # data-parallel training waits for every weight that has a gradient
        last = len(network.heads) - 1
        network.heads[: min(network.idle_heads, last) if deep else last].requires_grad_(False)
    return network


def make_learner(job: Job, network: nn.Module, compute: ComputeFormat, scale: float = LOSS_SCALE) -> Learner:
    """Give the network its format and an optimizer; `scale` is that of the loss, for fp16."""
    apply_format(network, compute, job.dimensions)
    optimizer = make_optimizer(network, job.settings.optimizer, job.device)
    scaler = torch.amp.GradScaler(job.device.type, scale, enabled=compute.precision == "fp16")
    average = None if job.settings.optimizer.ema is None else start_average(network)
    # in the other layout torch computes single samples slowly
    apart = job.device.type == "cpu" and compute.channels_last and not compute.compiled and job.ranks.world == 1
    forward = parallelize_samples(network) if apart else network
    return Learner(network, forward, optimizer, scaler, compute, average)


def parallelize(job: Job, learner: Learner) -> Learner:
    """Compile the network if its format says so, and let the processes of a data-parallel run sum their gradients.

    Raises
    ------
    UserError
        The network cannot be compiled, although the settings request it or other processes did it.
    """
    network, forward, factory = learner.network, learner.forward, job.settings.network.factory
    several, on_gpu, compiled = job.ranks.world > 1, job.device.type == "cuda", learner.compute.compiled
    if several and on_gpu:  # batch norm by the statistics of the whole batch
        network = forward = nn.SyncBatchNorm.convert_sync_batchnorm(network)
        freeze(network, job.settings.training.freeze)  # the layers are new
    if compiled:
        forward = cast(nn.Module, torch.compile(forward, dynamic=False))
    if several:  # around the compiled network, so that `no_sync` works; in its graph torch cannot accumulate gradients
        forward = DistributedDataParallel(
            forward,
            device_ids=[job.device] if on_gpu else None,
            gradient_as_bucket_view=True,
            find_unused_parameters=factory is not None,  # a user's network may have a head that the loss leaves out
            static_graph=factory is None and job.settings.training.accumulate == 1,
        )
    parallel = replace(learner, network=network, forward=forward)
    if compiled:
        try:
            batch = make_batch(job, job.training, 0, 0, augment=False)
            with _restored(network.buffers()), log.working("compiling the network"):
                _trial_step(job, parallel, batch)()
            network.eval()
            with torch.inference_mode():  # as the pseudo-validation, whose duration is that of windows later
                compute_loss(job, parallel, batch)
        except Exception as error:  # the compiler's own errors, of many kinds
            if is_out_of_memory(error):
                raise
            reason = shorten(describe(error), 300)
            if several or job.settings.training.compile is True:
                raise UserError(f"torch.compile failed: {reason}", fix="Use --set training.compile=false.") from error
            log.warn(f"torch.compile failed and is left out: {reason}")
            compute = replace(learner.compute, compiled=False, plain_norm=False, reason="torch.compile failed")
            apply_format(network, compute, job.dimensions)
            return replace(learner, compute=compute)
    return parallel


def compute_loss(job: Job, learner: Learner, batch: Batch) -> tuple[Tensor, Any]:
    """Return the loss of a batch over all processes, and the network's output."""
    images, classes, _ = batch
    n_inputs = job.plan.n_inputs(job.configuration)
    teacher = images[:, n_inputs:] if images.shape[1] > n_inputs else None
    with learner.compute.autocast(job.device):
        outputs = learner.forward(learner.compute.arrange(images[:, :n_inputs]))
    if job.settings.network.factory is not None and isinstance(outputs, list) and len(outputs) > 1:
        outputs = outputs[:-1]  # as in nnU-Net, the coarsest one has no part in the loss
    reduce = sum_over_ranks if job.ranks.world > 1 else alone
    loss = deep_supervision_loss(outputs, classes, job.plan, job.configuration, job.settings.loss, teacher, reduce)
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
    if job.settings.network.factory is not None:
        torch.manual_seed(job.seed + number)  # a user's network may draw random numbers, as for dropout
    for group in learner.optimizer.param_groups:
        group["lr"] = rate
    learner.optimizer.zero_grad(set_to_none=True)
    statistics = [(value, value.clone()) for value in learner.network.buffers()]  # of batch norm
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
    with _restored(learner.network.state_dict().values()):
        learner.network.load_state_dict(learner.average)
        yield


@contextmanager
def _restored(values: Iterable[Tensor]) -> Iterator[None]:
    """Undo what the block does to some tensors."""
    before = [(value, value.clone()) for value in values]
    try:
        yield
    finally:
        for value, copy in before:
            value.copy_(copy)


# ---------------------------------------------------------------------------------------------- what is fastest here


def _trial_step(job: Job, learner: Learner, batch: Batch) -> Callable[[], None]:
    """Return a step that changes no weights: forward and backward."""

    def step() -> None:
        learner.network.zero_grad()
        compute_loss(job, learner, batch)[0].backward()
        learner.network.zero_grad()

    return step


def list_training_formats(job: Job) -> list[ComputeFormat]:
    """List the formats in which a job may be trained, likely winners first; compiled ones last.

    A run with a seed computes in fp32, unless it is on a GPU: it has the same result on every CPU.

    On a GPU whose library computes bf16 convolutions of this size wrongly, fp16 takes the place of bf16, unless the
    settings name bf16. Networks are compiled on a GPU, if the time limit leaves a minute for it, or on request.
    """
    training, network, device = job.settings.training, job.planned.network, job.device
    repeats = training.seed is not None and training.precision == "auto" and device.type != "cuda"
    formats = list_formats(device, "fp32" if repeats else training.precision, training.channels_last)
    if device.type != "cuda":
        return [replace(option, compiled=training.compile is True) for option in formats]
    if formats[0].precision == "bf16" and not computes_bf16(device, *job.planned.first_convolution):
        instead = "; it was set, and is used" if training.precision == "bf16" else "; fp16 is used instead"
        log.warn(f"{device}: {describe_wrong_bf16()}{instead}")
        if training.precision == "auto":
            formats = [replace(option, precision="fp16") for option in formats]
    choices = [False, True] if training.compile == "auto" else [training.compile]
    too_short = TIMING_SHARE * limit_seconds(job.settings) < _COMPILE_SECONDS
    if training.compile == "auto" and (too_short or training.patch_growth):  # each patch would be compiled
        choices = [False]
    norms = [False, True] if network.norm == "instance" and job.settings.network.factory is None else [False]
    return [
        replace(option, compiled=compiled, plain_norm=plain)
        for compiled in choices
        for plain in norms
        for option in formats
        if compiled or option.channels_last or not plain  # as several kernels, plain norm only saves copies
    ]


def choose_format(job: Job, network: nn.Module, options: list[ComputeFormat] | None = None) -> ComputeFormat:
    """Return the first format on a CPU; on a GPU time training steps of the network on a real batch, for the fastest.

    What was chosen for the same step on the same kind of GPU is kept in `job.formats`. Under a time limit the timing
    ends early, with the fastest of the options that were timed until then, and is not kept.

    Parameters
    ----------
    job : Job
        What is trained.
    network : Module
        Its network, whose weights stay.
    options : list of ComputeFormat, optional
        By default those of `list_training_formats`.
    """
    options = options or list_training_formats(job)
    if job.device.type == "cpu" or (job.settings.training.seed is not None and job.device.type != "cuda"):
        return options[0]
    key, budget = _describe_step(job, options), TIMING_SHARE * limit_seconds(job.settings)
    kept = from_first(_read_choices(job).get(key), job.ranks)
    if from_first(kept in options, job.ranks):  # GPUs may differ
        return cast(ComputeFormat, kept)
    batch = make_batch(job, job.training, 0, 0, augment=False)
    single = replace(job, ranks=ALONE)

    def prepare(compute: ComputeFormat) -> Callable[[], None]:
        learner = make_learner(job, network, compute)
        if compute.compiled:
            torch._dynamo.reset()  # the same code with other strides would be compiled for any
            learner = replace(learner, forward=cast(nn.Module, torch.compile(network, dynamic=False)))
        return _trial_step(single, learner, batch)

    with _restored(network.buffers()):  # the statistics of batch norm
        best = pick_fastest(options, prepare, job.device, budget)
    best = from_first(best, job.ranks)
    release_memory(job.device)
    if job.formats is not None and job.ranks.rank == 0 and math.isinf(budget):
        write_json(job.formats, {name: asdict(value) for name, value in {**_read_choices(job), key: best}.items()})
    return best


def _read_choices(job: Job) -> dict[str, ComputeFormat]:
    if job.formats is None or not job.formats.is_file():
        return {}
    try:
        return {key: ComputeFormat(**value) for key, value in read_json(job.formats).items()}
    except (UserError, AttributeError, TypeError):  # it is damaged: formats are timed and written again
        return {}


def _describe_step(job: Job, options: list[ComputeFormat]) -> str:
    """Return the key of a choice in formats.json: the device, and a hash of what else decides it."""
    name = torch.cuda.get_device_name(job.device) if job.device.type == "cuda" else job.device.type
    planned = job.planned.model_dump(mode="json", include={"network", "patch_size", "batch_size"})
    training = job.settings.training.model_dump(mode="json", include={"deep_supervision", "freeze"})
    model = [job.plan.n_inputs(job.configuration), job.plan.labels.n_channels, job.settings.network.factory]
    loss = job.settings.loss.model_dump(mode="json")
    step = [planned, training, model, loss, job.settings.recipe, job.ranks.world, list(map(str, options))]
    digest = hashlib.sha256(json.dumps([*step, torch.backends.cudnn.version()]).encode()).hexdigest()[:12]
    return f"{name}, torch {torch.__version__}, {job.configuration} {digest}"
