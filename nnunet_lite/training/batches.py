"""The batches of a run: drawn, read, and augmented on the training device."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from torch import Tensor

from nnunet_lite.training.augment import apply_intensity, collate, draw_intensity, is_in_plane
from nnunet_lite.training.job import Job
from nnunet_lite.training.sampler import CaseArrays, Sample, draw_batch, rng_for

Batch = tuple[Tensor, Tensor, tuple[str, ...]]  # images (batch, inputs, *patch), classes (batch, *patch), case ids


def make_batch(job: Job, cases: Sequence[CaseArrays], stream: int, iteration: int, augment: bool) -> Batch:
    """Batch `iteration` of an epoch (`stream`): the same whenever and on whatever machine it is made."""
    settings = job.settings
    rng = rng_for(job.seed, stream, iteration)
    augmentation = settings.augmentation if augment and settings.augmentation.enabled else None
    samples: list[Sample] = draw_batch(
        cases,
        job.patch,
        job.planned.batch_size,
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


def training_batches(job: Job, epoch: int, iteration: int = 0) -> Iterator[Batch]:
    """The augmented batches of a run from some batch of some epoch on, without end."""
    per_epoch = job.settings.training.iterations * job.settings.training.accumulate
    while True:
        for i in range(iteration, per_epoch):
            yield make_batch(job, job.training, epoch, i, augment=True)
        epoch, iteration = epoch + 1, 0
