"""The batches of a run: drawn, read, and augmented on the training device."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial

import numpy as np
import torch
from torch import Tensor

from nnunet_lite.training.augment import (
    apply_intensity,
    draw_intensity,
    is_in_plane,
    on_device,
    samples_of,
    warped,
)
from nnunet_lite.training.cascade import append_previous, draw_cascade
from nnunet_lite.training.distributed import share
from nnunet_lite.training.job import Job
from nnunet_lite.training.sampler import CaseArrays, Place, draw_places, read_stack, rng_for
from nnunet_lite.training.swaps import swap_of

Batch = tuple[Tensor, Tensor, tuple[str, ...]]  # images (batch, inputs, *patch), classes (batch, *patch), case ids


def make_batch(job: Job, cases: Sequence[CaseArrays], stream: int, iteration: int, augment: bool) -> Batch:
    """This rank's samples of batch `iteration` of an epoch (`stream`): the same whenever and wherever they are made.

    The whole batch is drawn on every rank, so that a sample does not depend on how many there are.
    """
    size, n_classes = job.planned.batch_size, job.plan.labels.n_classes
    settings = job.settings.augmentation if augment and job.settings.augmentation.enabled else None
    rng = rng_for(job.seed, stream, iteration)
    places = draw_places(
        cases, job.patch, size, job.settings.training.foreground, settings, is_in_plane(job.patch), rng
    )
    mine = share(size, job.ranks)
    images, classes = _read(job, cases, places[mine])
    if settings:
        draw = draw_intensity(rng, settings, size, images.shape[1], job.mirror_axes)
        masked = [i for i, channel in enumerate(job.plan.channels) if channel.use_mask]
        swap = swap_of(job.plan, settings, job.dimensions)
        images, classes = apply_intensity(images, classes, samples_of(draw, mine), masked, swap)
    if job.planned.previous_stage is not None:
        images = append_previous(images, classes[:, 1], samples_of(draw_cascade(rng, settings, size, n_classes), mine))
    labels = classes[:, 0]
    if job.dimensions == 2:
        images, labels = images[:, :, 0], labels[:, 0]
    return images, labels, tuple(cases[place.case].case_id for place in places[mine])


def _read(job: Job, cases: Sequence[CaseArrays], places: Sequence[Place]) -> tuple[Tensor, Tensor]:
    """Patches on the device, rotated and scaled: images (n, channels, z, y, x) float32, classes (n, maps, z, y, x)."""
    order = sorted(range(len(places)), key=lambda i: places[i].matrix is not None)
    matrices = [place.matrix for place in places if place.matrix is not None]
    still, moved = order[: len(order) - len(matrices)], order[len(order) - len(matrices) :]
    parts = []
    for group in filter(None, (still, moved)):
        stack = read_stack(cases, [places[i] for i in group], job.patch, job.device).to(job.device)
        parts.append((stack.images, stack.classes))
    if not matrices:
        return parts[0]
    matrix, back = on_device([np.stack(matrices), np.argsort(order)], job.device)
    parts[-1] = warped(*parts[-1], matrix, job.patch)
    images, classes = (torch.cat(part)[back.long()] for part in zip(*parts, strict=True))
    return images, classes


def training_batches(job: Job, epoch: int, iteration: int = 0) -> Iterator[Callable[[], Batch]]:
    """The augmented batches of a run from some batch of some epoch on, without end; each is made where it is called.

    `prefetch` calls them, several at once where there are threads for it.
    """
    per_epoch = job.settings.training.iterations * job.settings.training.accumulate
    while True:
        for i in range(iteration, per_epoch):
            yield partial(make_batch, job, job.training, epoch, i, augment=True)
        epoch, iteration = epoch + 1, 0
