"""Training one fold: read this file from top to bottom.

fold folder: checkpoint.safetensors (every epoch), metrics.jsonl (a line an epoch), progress.png,
             and at the end model.safetensors, which marks the fold as finished
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from nnunet_lite import log
from nnunet_lite.errors import UserError
from nnunet_lite.network.arithmetic import (
    Arithmetic,
    as_layout,
    candidates,
    fastest,
    keep_freed_memory,
    use_allowed_cpus,
)
from nnunet_lite.network.unet import UNet
from nnunet_lite.plan.schema import Plan
from nnunet_lite.settings import Settings
from nnunet_lite.training import loss as losses
from nnunet_lite.training.augment import apply_intensity, collate, draw_intensity, is_in_plane
from nnunet_lite.training.checkpoint import (
    CHECKPOINT,
    load_checkpoint,
    read_state,
    save_checkpoint,
    save_weights,
)
from nnunet_lite.training.optimize import Plateau, learning_rate, make_optimizer
from nnunet_lite.training.prefetch import prefetch
from nnunet_lite.training.progress import draw_progress
from nnunet_lite.training.run import MODEL, exclusive
from nnunet_lite.training.sampler import CaseArrays, Sample, Shape, draw_batch, rng_for
from nnunet_lite.workspace import sweep, write_text

METRICS = "metrics.jsonl"
Batch = tuple[Tensor, Tensor, tuple[str, ...]]  # images (batch, channels, *patch), classes (batch, *patch), case ids
_VALIDATION_STREAM = 2**31  # keeps the validation patches apart from every training epoch


@dataclass(frozen=True)
class Job:
    """Everything that decides a fold's training. `plan` already has the settings' batch, patch and network."""

    plan: Plan
    configuration: str
    settings: Settings
    seed: int
    folder: Path
    device: torch.device
    training: Sequence[CaseArrays]
    validation: Sequence[CaseArrays]

    @property
    def patch(self) -> Shape:
        """The patch as (z, y, x); two-dimensional ones are one voxel thick."""
        size = self.plan.configuration(self.configuration).patch_size
        return (1, size[0], size[1]) if len(size) == 2 else (size[0], size[1], size[2])

    @property
    def dimensions(self) -> int:
        return self.plan.configuration(self.configuration).dimensions

    @property
    def mirror_axes(self) -> tuple[int, ...]:
        """Axes of (z, y, x) that augmentation mirrors."""
        offset = 3 - self.dimensions
        axes = self.settings.augmentation.mirror_axes
        return tuple(a + offset for a in (range(self.dimensions) if axes is None else axes))


@dataclass
class State:
    """Where a run stands; stored with every checkpoint."""

    plateau: Plateau
    arithmetic: Arithmetic
    epoch: int = 0
    scale: float = 2.0**16  # of the loss, for fp16
    seconds: float = 0.0
    bad_steps: int = 0

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> State:
        plateau, arithmetic = Plateau(**values.pop("plateau")), Arithmetic(**values.pop("arithmetic"))
        return cls(plateau, arithmetic, **values)


def train_fold(job: Job) -> None:
    """Train a fold, from its last checkpoint if there is one, and write its model.

    Raises
    ------
    UserError : another process trains it; the loss is not finite too often; the GPU's memory is too small for the plan.
    """
    with exclusive(job.folder):
        sweep(job.folder)
        try:
            _train_fold(job)
        except torch.OutOfMemoryError:
            batch = job.plan.configuration(job.configuration).batch_size
            raise UserError(
                f"the GPU's memory is too small for a batch of {batch} patches of {job.patch}",
                fix="Use --batch-size or --patch-size with smaller values, or plan with a smaller --memory.",
            ) from None


def _train_fold(job: Job) -> None:
    use_allowed_cpus()
    if job.device.type == "cpu":
        keep_freed_memory()
    torch.backends.cudnn.benchmark = True  # all batches have one shape
    torch.manual_seed(job.seed)
    planned = job.plan.configuration(job.configuration)
    network = UNet(planned.network, len(job.plan.channels), job.plan.labels.n_channels).to(job.device)
    network.deep_supervision = job.settings.training.deep_supervision
    optimizer = make_optimizer(network, job.settings.optimizer, job.device)
    checkpoint = job.folder / CHECKPOINT
    if checkpoint.is_file():
        state = State.from_json(read_state(checkpoint))
        network.to(memory_format=state.arithmetic.layout(job.dimensions))  # type: ignore[call-overload]
        load_checkpoint(checkpoint, network, optimizer)
        log.info(f"going on from epoch {state.epoch} of {job.settings.training.epochs}")
    else:
        state = State(Plateau(lr=job.settings.optimizer.lr), _choose_arithmetic(job, network))
        network.to(memory_format=state.arithmetic.layout(job.dimensions))  # type: ignore[call-overload]
    log.info(f"{job.device}, {state.arithmetic.precision}, channels-last {state.arithmetic.channels_last}: "
             f"{state.arithmetic.reason}")  # fmt: skip
    with closing(prefetch(_batches(job, state.epoch), job.device, job.settings.training.workers)) as batches:
        _run_epochs(job, network, optimizer, batches, state)
    about = {"configuration": job.configuration, "epochs": state.epoch, "seconds": round(state.seconds, 1),
             "device": job.device.type, "arithmetic": state.arithmetic.to_json()}  # fmt: skip
    save_weights(job.folder / MODEL, network, about)


def _run_epochs(job: Job, network: UNet, optimizer: torch.optim.Optimizer, batches: Iterator[Batch],
                state: State) -> None:  # fmt: skip
    """Train to the end of the run, with a line of metrics and a checkpoint after every epoch."""
    metrics = _keep_metrics(job.folder / METRICS, state.epoch)
    scaler = torch.amp.GradScaler(job.device.type, state.scale, enabled=state.arithmetic.precision == "fp16")
    drawn = time.monotonic()
    while not _is_over(job, state):
        start = time.monotonic()
        row = _epoch(job, network, optimizer, scaler, batches, state)
        row |= _validate(job, network, state.arithmetic)
        state.seconds += time.monotonic() - start
        state.scale = scaler.get_scale() if scaler.is_enabled() else state.scale
        metrics.append(row)
        _append(job.folder / METRICS, row)
        save_checkpoint(job.folder / CHECKPOINT, network, optimizer, asdict(state))
        log.info(_line(job, row, state))
        if time.monotonic() - drawn > 20:  # matplotlib takes a good part of a second
            draw_progress(metrics, job.folder / "progress.png")
            drawn = time.monotonic()
    draw_progress(metrics, job.folder / "progress.png")


def _progress(job: Job, epoch: int, iteration: int, seconds: float) -> float:
    """How much of the run is done: by iterations, or by time where there is a limit and it comes first."""
    training = job.settings.training
    done = (epoch + iteration / training.iterations) / training.epochs
    return done if training.time_limit is None else max(done, seconds / (60 * training.time_limit))


def _is_over(job: Job, state: State) -> bool:
    schedule = job.settings.schedule
    annealed = schedule.name == "plateau" and state.plateau.lr < schedule.min_lr
    return annealed or _progress(job, state.epoch, 0, state.seconds) >= 1


def _batch(job: Job, cases: Sequence[CaseArrays], stream: int, iteration: int, augment: bool) -> Batch:
    """Batch `iteration` of an epoch: images (batch, channels, *patch), classes (batch, *patch), case ids."""
    settings, configuration = job.settings, job.plan.configuration(job.configuration)
    rng = rng_for(job.seed, stream, iteration)
    augmentation = settings.augmentation if augment and settings.augmentation.enabled else None
    samples: list[Sample] = draw_batch(
        cases,
        job.patch,
        configuration.batch_size,
        settings.training.foreground,
        augmentation,
        is_in_plane(job.patch),
        rng,
    )
    images, classes = collate(samples, job.patch, job.device)
    if augmentation:
        draw = draw_intensity(rng, augmentation, len(samples), images.shape[1], job.mirror_axes)
        masked = [i for i, channel in enumerate(job.plan.channels) if channel.use_mask]
        images, classes = apply_intensity(images, classes, draw, masked)
    if job.dimensions == 2:
        images, classes = images[:, :, 0], classes[:, 0]
    return images, classes, tuple(sample.case_id for sample in samples)


def _batches(job: Job, first_epoch: int) -> Iterator[Batch]:
    epoch = first_epoch
    while True:
        for iteration in range(job.settings.training.iterations):
            yield _batch(job, job.training, epoch, iteration, augment=True)
        epoch += 1


def _choose_arithmetic(job: Job, network: UNet) -> Arithmetic:
    """Time a training step of the real network on a real batch in each candidate format and layout."""
    training = job.settings.training
    options = candidates(job.device, training.precision, training.channels_last)
    if training.seed is not None:  # what is fastest may change from run to run
        return replace(options[-1], channels_last=options[0].channels_last, reason="not timed, for the seed's sake")
    images, classes, _ = _batch(job, job.training, 0, 0, augment=False)

    def step(arithmetic: Arithmetic) -> None:
        network.to(memory_format=arithmetic.layout(job.dimensions))  # type: ignore[call-overload]
        network.zero_grad()
        with arithmetic.autocast(job.device):
            outputs = network(as_layout(images, arithmetic))
        losses.deep_supervision_loss(outputs, classes, job.plan, job.configuration, job.settings.loss).backward()

    statistics = {name: buffer.clone() for name, buffer in network.named_buffers()}  # batch norm counts the trial steps
    best = fastest(options, step, job.device)
    for name, buffer in network.named_buffers():
        buffer.copy_(statistics[name])
    network.zero_grad()
    return best


def _epoch(job: Job, network: UNet, optimizer: torch.optim.Optimizer, scaler: torch.amp.GradScaler,
           batches: Iterator[Batch], state: State) -> dict[str, Any]:  # fmt: skip
    """Train one epoch and return its row of metrics; `state` moves on."""
    training, start, waited = job.settings.training, time.monotonic(), 0.0
    network.train()
    history, rate, steps = [], 0.0, 0
    for iteration in range(training.iterations):
        elapsed = state.seconds + time.monotonic() - start
        progress = _progress(job, state.epoch, iteration, elapsed)
        if progress >= 1:
            break
        rate = learning_rate(state.plateau.lr, job.settings.schedule, progress)
        for group in optimizer.param_groups:
            group["lr"] = rate
        asked = time.monotonic()
        images, classes, case_ids = next(batches)
        waited += time.monotonic() - asked
        optimizer.zero_grad(set_to_none=True)
        with state.arithmetic.autocast(job.device):
            outputs = network(as_layout(images, state.arithmetic))
        loss = losses.deep_supervision_loss(outputs, classes, job.plan, job.configuration, job.settings.loss)
        scaler.scale(loss).backward()
        if _step(job, network, optimizer, scaler):
            history.append(loss.detach())
        elif state.arithmetic.precision != "fp16" or not torch.isfinite(loss):  # else its scale is adapting
            state.bad_steps += 1
            if state.bad_steps >= training.max_bad_steps:
                raise UserError(
                    f"the loss was not finite in {state.bad_steps} steps, last with the cases {', '.join(case_ids)}",
                    fix="Look at these images with `nnlite check`; else lower --lr or use --precision fp32.",
                )
        steps += 1
    seconds = time.monotonic() - start
    state.epoch += 1
    mean_loss = float(torch.stack(history).mean()) if history else math.nan
    if job.settings.schedule.name == "plateau" and math.isfinite(mean_loss):
        state.plateau = state.plateau.after_epoch(mean_loss, job.settings.schedule)
    batch_size = job.plan.configuration(job.configuration).batch_size
    return {
        "epoch": state.epoch,
        "train_loss": _finite(mean_loss),
        "lr": rate,
        "seconds": round(seconds, 2),
        "samples_per_second": round(steps * batch_size / max(seconds, 1e-9), 2),
        "waiting": round(waited / max(seconds, 1e-9), 3),
        "memory_gb": round(_memory_peak(job.device), 2),
        "bad_steps": state.bad_steps,
    }


def _step(job: Job, network: nn.Module, optimizer: torch.optim.Optimizer, scaler: torch.amp.GradScaler) -> bool:
    """Clip and apply the gradients; False, and nothing applied, where they are not finite."""
    scaler.unscale_(optimizer)
    limit = job.settings.training.gradient_clip
    norm = nn.utils.clip_grad_norm_(network.parameters(), limit if limit else math.inf)
    finite = bool(torch.isfinite(norm))
    if finite:
        scaler.step(optimizer)
    scaler.update()
    return finite


@torch.inference_mode()
def _validate(job: Job, network: UNet, arithmetic: Arithmetic) -> dict[str, Any]:
    """Loss and pseudo-Dice on fixed patches of the held-out cases; Dice is None for a label that they do not show."""
    n_batches = job.settings.training.validation_iterations
    if not n_batches or not job.validation:
        return {}
    network.eval()
    labels = job.plan.labels
    regions = labels.region_classes if labels.has_regions else None
    total, counts = 0.0, np.zeros((3, len(labels.region_names)))
    for i in range(n_batches):
        images, classes, _ = _batch(job, job.validation, _VALIDATION_STREAM, i, augment=False)
        with arithmetic.autocast(job.device):
            outputs = network(as_layout(images, arithmetic))
        total += float(losses.deep_supervision_loss(outputs, classes, job.plan, job.configuration, job.settings.loss))
        finest = outputs[0] if isinstance(outputs, list) else outputs
        counts += losses.pseudo_dice_counts(finest, classes, regions, labels.ignore_class).cpu().numpy()
    tp, fp, fn = counts
    dice = [round(float(2 * t / (2 * t + p + n)), 4) if t + n else None for t, p, n in zip(tp, fp, fn, strict=True)]
    known = [d for d in dice if d is not None]
    return {
        "validation_loss": _finite(total / n_batches),
        "dice": dict(zip(labels.region_names, dice, strict=True)),
        "mean_dice": round(float(np.mean(known)), 4) if known else None,
    }


def _finite(value: float) -> float | None:
    """Rounded for metrics.jsonl; JSON has no NaN."""
    return round(value, 5) if math.isfinite(value) else None


def _memory_peak(device: torch.device) -> float:
    """GB: of the GPU since the start of the run, else of this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6


def _keep_metrics(path: Path, epochs: int) -> list[dict[str, Any]]:
    """The rows of the epochs that the checkpoint has seen; later ones (killed before the checkpoint) are dropped."""
    lines = path.read_text().splitlines(keepends=True) if path.is_file() else []
    rows = [json.loads(line) for line in lines if line.endswith("\n")]  # the last may be cut off
    kept = [row for row in rows if row["epoch"] <= epochs]
    write_text(path, "".join(json.dumps(row) + "\n" for row in kept))
    return kept


def _append(path: Path, row: dict[str, Any]) -> None:
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(row) + "\n")


def _line(job: Job, row: dict[str, Any], state: State) -> str:
    """One epoch for a person to read."""
    done = max(_progress(job, state.epoch, 0, state.seconds), 1e-9)
    left = state.seconds / done * max(0.0, 1 - done)
    dice = row.get("mean_dice")
    each = " ".join("-" if d is None else f"{d:.3f}" for d in list(row.get("dice", {}).values())[:8])
    loss = "not finite" if row["train_loss"] is None else f"{row['train_loss']:+.4f}"
    score = f"  Dice {dice:.3f} ({each})" if dice is not None else ""
    return (
        f"epoch {row['epoch']:>4}  loss {loss}{score}  lr {row['lr']:.1e}  "
        f"{log.duration(row['seconds'])}, {log.duration(left)} left"
    )
