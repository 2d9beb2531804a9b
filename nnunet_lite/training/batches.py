"""The batches of a run: drawn, read, and augmented on the training device."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from torch import Tensor

from nnunet_lite.errors import UserError
from nnunet_lite.training.augmentation import (
    Intensity,
    apply_intensity,
    apply_mirror,
    draw_intensity,
    draw_mirror,
    is_in_plane,
    on_device,
    samples_of,
    warped,
)
from nnunet_lite.training.cascade import CascadeDraw, append_previous, draw_cascade
from nnunet_lite.training.distributed import rank_share
from nnunet_lite.training.job import Job
from nnunet_lite.training.sampler import CaseArrays, Place, draw_places, enlarged, read_stack, rng_for
from nnunet_lite.training.swaps import check_swaps, swap_of

Batch = tuple[Tensor, Tensor, tuple[str, ...]]  # images (batch, inputs, *patch), classes (batch, *patch), case ids


@dataclass(frozen=True)
class Draw:
    """Everything random about some samples. What is None is not done."""

    places: list[Place]
    intensity: Intensity | None
    flips: np.ndarray | None  # (samples, 3) bool
    cascade: CascadeDraw | None
    seeds: np.ndarray  # (samples,) for transforms of batchgenerators


def check_augmentation(job: Job) -> None:
    """Make sure before training that batches can be augmented as the settings say.

    Raises
    ------
    UserError : an axis to mirror that the patch does not have, labels that cannot be swapped, or a transform that
        batchgenerators does not have.
    """
    axes = job.settings.augmentation.mirror_axes or ()
    if max(axes, default=0) >= job.dimensions:
        what = f"augmentation.mirror_axes = {list(axes)}: {max(axes)} is no axis of a patch with {job.dimensions}"
        raise UserError(what, fix=f"Give some of 0 to {job.dimensions - 1}, or leave it out for all of them.")
    check_swaps(job.plan.labels, job.settings.augmentation, job.dimensions)
    if job.settings.augmentation.extra:
        from nnunet_lite.training.batchgenerators import extra_transforms

        extra_transforms(job.settings.augmentation)


def make_batch(job: Job, cases: Sequence[CaseArrays], stream: int, iteration: int, augment: bool) -> Batch:
    """This rank's samples of batch `iteration` of an epoch (`stream`): the same whenever and wherever they are made."""
    return build_batch(job, cases, draw_batch(job, cases, stream, iteration, augment))


def draw_batch(job: Job, cases: Sequence[CaseArrays], stream: int, iteration: int, augment: bool) -> Draw:
    """Draw a batch whole, so that a sample does not depend on the number of ranks, and keep this rank's part."""
    rng, size = rng_for(job.seed, stream, iteration), job.planned.batch_size
    mine = rank_share(size, job.ranks)
    settings = job.settings.augmentation if augment and job.settings.augmentation.enabled else None
    native = settings if settings and settings.pipeline == "native" else None
    foreground, in_plane = job.settings.training.foreground, is_in_plane(job.patch)
    places = draw_places(cases, job.patch, size, foreground, native, in_plane, rng)
    intensity = draw_intensity(rng, native, size, len(job.plan.channels)) if native else None
    flips = draw_mirror(rng, settings, size, job.mirror_axes) if settings else None
    cascade = draw_cascade(rng, settings, size, job.plan.labels.n_classes) if job.planned.previous_stage else None
    return Draw(
        places[mine],
        intensity and samples_of(intensity, mine),
        None if flips is None else flips[mine],
        cascade and samples_of(cascade, mine),
        rng.integers(2**62, size=size)[mine],
    )


def build_batch(job: Job, cases: Sequence[CaseArrays], draw: Draw) -> Batch:
    """Read samples and augment them on the device, as drawn."""
    reference = draw.flips is not None and job.settings.augmentation.pipeline == "batchgenerators"
    images, classes = (_reference if reference else _read)(job, cases, draw)
    if draw.intensity:
        images = apply_intensity(images, draw.intensity)
    if masked := _masked(job):
        outside = classes[:, 0] == job.plan.labels.outside_class
        classes[:, 0].masked_fill_(outside, 0)
        if draw.flips is not None:  # what augmentation has put there, and what resampling has
            for channel in masked:
                images[:, channel].masked_fill_(outside, 0)
    if draw.flips is not None:
        swap = swap_of(job.plan, job.settings.augmentation, job.dimensions)
        apply_mirror(images, classes, draw.flips, swap)
        if job.settings.augmentation.extra:
            images, classes = _extra(job, images, classes, draw.seeds)
    if draw.cascade:
        images = append_previous(images, classes[:, 1], draw.cascade)
    labels = classes[:, 0]
    if job.dimensions == 2:
        images, labels = images[:, :, 0], labels[:, 0]
    return images, labels, tuple(cases[place.case].case_id for place in draw.places)


def _read(job: Job, cases: Sequence[CaseArrays], draw: Draw) -> tuple[Tensor, Tensor]:
    """Patches on the device, rotated and scaled: images (n, channels, z, y, x) float32, classes (n, maps, z, y, x)."""
    places = draw.places
    order = sorted(range(len(places)), key=lambda i: places[i].matrix is not None)
    matrices = [place.matrix for place in places if place.matrix is not None]
    still, moved = order[: len(order) - len(matrices)], order[len(order) - len(matrices) :]
    parts = []
    for group in filter(None, (still, moved)):
        stack = read_stack(cases, [places[i] for i in group], job.patch, job.device, _beyond(job)).to(job.device)
        parts.append((stack.images, stack.classes))
    if not matrices:
        return parts[0]
    matrix, back = on_device([np.stack(matrices), np.argsort(order)], job.device)
    parts[-1] = warped(*parts[-1], matrix, job.patch)
    images, classes = (torch.cat(part)[back.long()] for part in zip(*parts, strict=True))
    return images, classes


def _reference(job: Job, cases: Sequence[CaseArrays], draw: Draw) -> tuple[Tensor, Tensor]:
    """The same by the original nnU-Net's pipeline on the CPU, intensities included, out of oversized patches."""
    from nnunet_lite.training.batchgenerators import apply_transforms, oversized, reference_transforms

    settings = job.settings.augmentation
    wide = oversized(settings, job.patch)
    around = [enlarged(place, job.patch, wide) for place in draw.places]
    cpu = torch.device("cpu")
    stack = read_stack(cases, around, wide, cpu, _beyond(job)).to(cpu)
    transforms = reference_transforms(settings, job.patch)
    images, classes = apply_transforms(transforms, stack.images, stack.classes, draw.seeds, job.patch)
    return images.to(job.device), classes.to(job.device)


def _extra(job: Job, images: Tensor, classes: Tensor, seeds: np.ndarray) -> tuple[Tensor, Tensor]:
    """Transforms of batchgenerators that the settings name; they run on the CPU."""
    from nnunet_lite.training.batchgenerators import apply_transforms, extra_transforms

    return apply_transforms(extra_transforms(job.settings.augmentation), images, classes, seeds, job.patch)


def _masked(job: Job) -> list[int]:
    """The channels that were normalised inside the nonzero mask: outside of it they stay zero, as in nnU-Net."""
    return [i for i, channel in enumerate(job.plan.channels) if channel.use_mask]


def _beyond(job: Job) -> int:
    """The class of what is outside of the images: it is outside the nonzero mask, where the data have one."""
    return job.plan.labels.outside_class if _masked(job) else 0


def training_batches(job: Job, epoch: int, iteration: int = 0) -> Iterator[Callable[[], Batch]]:
    """The augmented batches of a run from some batch of some epoch on, without end; each is made where it is called.

    `prefetch` calls them, several at once where there are threads for it.
    """
    per_epoch = job.settings.training.iterations * job.settings.training.accumulate
    while True:
        for i in range(iteration, per_epoch):
            yield partial(make_batch, job, job.training, epoch, i, augment=True)
        epoch, iteration = epoch + 1, 0
