"""The data loader: draw patches, read them, augment them on the training device, and prepare batches ahead.

Every batch is drawn from a generator seeded with (seed, epoch, iteration). Nothing but these numbers decides it, so a
resumed run gets the same batches as an undisturbed one, and no random state has to be saved. Drawing is separate from
reading: each of several ranks draws the whole batch and reads its own samples.

`training_batches` and `prefetch` make the stream of batches of a run; `make_batch` makes one: `draw_batch`, then
`build_batch`. Locations and boxes follow at the end.
"""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import lru_cache, partial
from threading import Lock
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from nnunet_lite.data.geometry import Shape, triple
from nnunet_lite.errors import UserError
from nnunet_lite.planning.swaps import check_swaps, swap_of
from nnunet_lite.preprocessing.stored_case import CaseArrays
from nnunet_lite.settings import AugmentationSettings
from nnunet_lite.training import augmentation
from nnunet_lite.training.augmentation import Intensity, copy_parameters, copy_to_device, source_shape
from nnunet_lite.training.batchgenerators import apply_transforms, extra_transforms, oversize, reference_transforms
from nnunet_lite.training.cascade import CascadeDraw, append_previous, draw_cascade
from nnunet_lite.training.distributed import rank_share
from nnunet_lite.training.job import Job

# images (batch, inputs, *patch), followed by the probabilities of teachers; classes (batch, *patch); case ids
Batch = tuple[Tensor, Tensor, tuple[str, ...]]
Item = TypeVar("Item", bound=tuple[Any, ...])

_AUGMENTING = Lock()
_NNUNET_SHARE = 0.33  # of the samples that nnU-Net centres on a foreground voxel
_TEACHER_STEPS = 255  # of a stored probability, which is uint8
_GPU_WORKERS = 2  # one thread reads while the other waits for the disk or for the interpreter


@dataclass(frozen=True)
class Location:
    """Where a sample is taken from.

    Parameters
    ----------
    case : int
        Number of the case.
    corner : tuple of int
        Lower corner (z, y, x) of the patch in the case's arrays; may be outside of them.
    matrix : ndarray, shape (3, 3), optional
        Maps offsets from the centre of the patch to offsets from the same point of the image, in voxels; None without
        rotation and scaling.
    """

    case: int
    corner: Shape
    matrix: np.ndarray | None


@dataclass(frozen=True)
class BatchDraw:
    """The random parameters of some samples; a step whose parameters are None is left out.

    Parameters
    ----------
    locations : list of Location
        Where the samples are taken from.
    intensity : Intensity, optional
        Parameters of the intensity transforms.
    flips : ndarray of bool, shape (samples, 3), optional
        Axes to mirror.
    cascade : CascadeDraw, optional
        Changes of the previous stage's labels.
    seeds : ndarray of int, shape (samples,)
        Seeds for transforms of batchgenerators.
    """

    locations: list[Location]
    intensity: Intensity | None
    flips: np.ndarray | None
    cascade: CascadeDraw | None
    seeds: np.ndarray


# ------------------------------------------------------------------------------------------------ the stream of batches


def training_batches(job: Job, epoch: int, iteration: int = 0) -> Iterator[Callable[[], Batch]]:
    """Yield functions that make the augmented batches of a run, without end, for `prefetch`.

    Parameters
    ----------
    job : Job
        Fold that is trained.
    epoch, iteration : int
        The first batch.
    """
    per_epoch = job.settings.training.iterations * job.settings.training.accumulate
    while True:
        for i in range(iteration, per_epoch):
            yield partial(make_batch, job, job.training, epoch, i, augment=True)
        epoch, iteration = epoch + 1, 0


def prefetch(
    makers: Iterator[Callable[[], Item]], device: torch.device, workers: int | None
) -> Generator[Item, None, None]:
    """Yield the items of functions in their order, while threads make the next ones.

    On a GPU, threads copy and augment on a stream of their own: the training stream waits for an item, but the host
    never does. On a CPU the network needs every core, so items are made in line unless `workers` says otherwise.

    Parameters
    ----------
    makers : iterator of callable
        Functions that do not depend on each other. The error of one is raised here, after the items before it.
    device : torch.device
        Training device.
    workers : int, optional
        Number of threads; 0 makes items in line.
    """
    workers = (_GPU_WORKERS if device.type == "cuda" else 0) if workers is None else workers
    if workers == 0:
        yield from (make() for make in makers)
        return
    side = side_stream(device) if device.type == "cuda" else None
    if side:
        side.wait_stream(torch.cuda.current_stream(device))  # data may still be on its way to the device

    def make_on_side(make: Callable[[], Item]) -> tuple[Item, torch.cuda.Event | None]:
        if side is None:
            return make(), None
        with torch.cuda.stream(side):
            return make(), side.record_event()

    with ThreadPoolExecutor(workers, "prefetch") as pool:
        queue = deque(pool.submit(make_on_side, make) for make in itertools.islice(makers, workers + 1))
        try:
            while queue:
                item, event = queue.popleft().result()
                queue.extend(pool.submit(make_on_side, make) for make in itertools.islice(makers, 1))
                if event:  # the training stream waits for the tensors, and their memory is not reused before it is done
                    stream = torch.cuda.current_stream(device)
                    stream.wait_event(event)
                    for tensor in item:
                        if isinstance(tensor, Tensor):
                            tensor.record_stream(stream)
                yield item
        finally:
            for future in queue:
                future.cancel()


@lru_cache
def side_stream(device: torch.device) -> torch.cuda.Stream:
    """Return the stream of a GPU on which batches are made; the allocator keeps freed memory apart for each stream."""
    return torch.cuda.Stream(device)


# ------------------------------------------------------------------------------------------------ one batch


def check_augmentation(job: Job) -> None:
    """Make sure before training that batches can be augmented as the settings say.

    Raises
    ------
    UserError
        An axis to mirror that the patch does not have, labels that cannot be swapped, or a transform that
        batchgenerators does not have.
    """
    axes = job.settings.augmentation.mirror_axes or ()
    if max(axes, default=0) >= job.dimensions:
        what = f"augmentation.mirror_axes = {list(axes)}: {max(axes)} is not an axis of a patch with {job.dimensions}"
        raise UserError(what, fix=f"Give some of 0 to {job.dimensions - 1}, or leave it out for all of them.")
    check_swaps(job.plan.labels, job.settings.augmentation, job.dimensions)
    extra_transforms(job.settings.augmentation)


def make_batch(job: Job, cases: Sequence[CaseArrays], stream: int, iteration: int, augment: bool) -> Batch:
    """Make this rank's samples of a batch; the result depends on the job's seed, `stream` and `iteration` only."""
    return build_batch(job, cases, draw_batch(job, cases, stream, iteration, augment))


def draw_batch(job: Job, cases: Sequence[CaseArrays], stream: int, iteration: int, augment: bool) -> BatchDraw:
    """Draw a whole batch, so that a sample does not depend on the number of ranks, and return this rank's part.

    Parameters
    ----------
    job : Job
        Fold that is trained.
    cases : sequence of CaseArrays
        Cases to draw from.
    stream, iteration : int
        Seed of the batch together with the job's seed; the stream of a training batch is its epoch.
    augment : bool
        Whether to augment, if the settings do.
    """
    rng, size = rng_for(job.seed, stream, iteration), job.planned.batch_size
    mine = rank_share(size, job.ranks)
    settings = job.settings.augmentation if augment and job.settings.augmentation.enabled else None
    native = settings if settings and settings.pipeline == "native" else None
    locations = draw_locations(cases, job.patch, size, job.settings.training.foreground, native, rng)
    intensity = augmentation.draw_intensity(rng, native, size, len(job.plan.channels)) if native else None
    flips = augmentation.draw_mirror(rng, settings, size, job.mirror_axes) if settings else None
    cascade = draw_cascade(rng, settings, size, job.plan.labels.n_classes) if job.planned.previous_stage else None
    return BatchDraw(
        locations[mine],
        intensity and augmentation.select_samples(intensity, mine),
        None if flips is None else flips[mine],
        cascade and augmentation.select_samples(cascade, mine),
        rng.integers(2**62, size=size)[mine],
    )


def build_batch(job: Job, cases: Sequence[CaseArrays], draw: BatchDraw) -> Batch:
    """Read samples and augment them on the device, as drawn."""
    settings, augmented = job.settings.augmentation, draw.flips is not None
    read = _read_reference if augmented and settings.pipeline == "batchgenerators" else _read_native
    images, classes = read(job, cases, draw)
    if draw.intensity:
        n = len(job.plan.channels)
        with _one_at_a_time(job.device):
            changed = augmentation.apply_intensity(images[:, :n], draw.intensity)
            images = changed if images.shape[1] == n else torch.cat([changed, images[:, n:]], 1)
    if draw.flips is not None:
        swap, n_taught = swap_of(job.plan, settings, job.dimensions), images.shape[1] - len(job.plan.channels)
        augmentation.apply_mirror(images, classes, draw.flips, swap, n_taught)
        if settings.extra:
            images, classes = apply_transforms(extra_transforms(settings), images, classes, draw.seeds, job.patch)
    if masked := _masked_channels(job):
        outside = classes[:, 0] == job.plan.labels.outside_class
        classes[:, 0].masked_fill_(outside, 0)
        if augmented:  # augmentation and resampling have changed the zeros there
            for channel in masked:
                images[:, channel].masked_fill_(outside, 0)
    if draw.cascade:
        images = append_previous(images, classes[:, 1], draw.cascade)
    labels = classes[:, 0]
    if job.dimensions == 2:
        images, labels = images[:, :, 0], labels[:, 0]
    return images, labels, tuple(cases[location.case].case_id for location in draw.locations)


def _read_native(job: Job, cases: Sequence[CaseArrays], draw: BatchDraw) -> tuple[Tensor, Tensor]:
    """Patches on the device, rotated and scaled: images in float32, and classes, as `read_patches` returns them."""
    still = [i for i, location in enumerate(draw.locations) if location.matrix is None]
    moved = [i for i, location in enumerate(draw.locations) if location.matrix is not None]

    def read(samples: list[int]) -> tuple[Tensor, Tensor]:
        return read_patches(cases, [draw.locations[i] for i in samples], job.patch, job.device, _class_beyond(job))

    if not moved:
        images, classes = read(still)
        return images.float(), classes
    parts = [read(samples) for samples in (still, moved) if samples]  # apart: boxes to rotate or scale are larger
    matrices = np.stack([location.matrix for location in draw.locations if location.matrix is not None])
    matrix, back = copy_parameters([matrices, np.argsort(still + moved)], job.device)
    with _one_at_a_time(job.device):
        parts[-1] = augmentation.warp_samples(*parts[-1], matrix, job.patch)
    images, classes = (torch.cat(part)[back.long()] for part in zip(*parts, strict=True))
    return images, classes


def _one_at_a_time(device: torch.device) -> AbstractContextManager[Any]:
    """Let one thread at a time take a GPU's memory for temporary arrays, which are larger than a batch."""
    return _AUGMENTING if device.type == "cuda" else nullcontext()


def _read_reference(job: Job, cases: Sequence[CaseArrays], draw: BatchDraw) -> tuple[Tensor, Tensor]:
    """The same by the original nnU-Net's pipeline on the CPU, intensities included, from oversized patches."""
    settings, cpu = job.settings.augmentation, torch.device("cpu")
    shape = oversize(settings, job.patch)
    locations = [enlarge(location, job.patch, shape) for location in draw.locations]
    images, classes = read_patches(cases, locations, shape, cpu, _class_beyond(job))
    transforms = reference_transforms(settings, job.patch)
    images, classes = apply_transforms(transforms, images.float(), classes, draw.seeds, job.patch)
    return copy_to_device(images, job.device), copy_to_device(classes, job.device)


def _masked_channels(job: Job) -> list[int]:
    """The channels that were normalized inside the nonzero mask: they stay zero outside of it, as in nnU-Net."""
    return [i for i, channel in enumerate(job.plan.channels) if channel.use_mask]


def _class_beyond(job: Job) -> int:
    """The class of voxels beyond the image: outside the nonzero mask, where the data have one."""
    return job.plan.labels.outside_class if _masked_channels(job) else 0


# ------------------------------------------------------------------------------------------------ locations


def rng_for(seed: int, *counters: int) -> np.random.Generator:
    """Return the generator of one batch."""
    return np.random.default_rng([seed, *counters])


def draw_locations(
    cases: Sequence[CaseArrays],
    patch: Shape,
    batch_size: int,
    foreground: float,
    settings: AugmentationSettings | None,
    rng: np.random.Generator,
) -> list[Location]:
    """Draw where the samples of a batch are taken from; cases with replacement, as in nnU-Net.

    Parameters
    ----------
    cases : sequence of CaseArrays
        Cases to draw from.
    patch : tuple of int
        Patch size (z, y, x).
    batch_size : int
        Number of samples.
    foreground : float
        Share of samples that are centred on a foreground voxel (oversampling).
    settings : AugmentationSettings, optional
        Ranges of rotation and scaling; None for neither.
    rng : numpy.random.Generator
        Generator of the batch.
    """
    locations = []
    for forced in oversample_foreground(batch_size, foreground, rng):
        number = int(rng.integers(len(cases)))
        corner = draw_corner(cases[number], patch, forced, rng)
        matrix = augmentation.draw_matrix(rng, settings, patch) if settings else None
        locations.append(Location(number, corner, matrix))
    return locations


def oversample_foreground(batch_size: int, share: float, rng: np.random.Generator) -> list[bool]:
    """Return which samples of a batch are centred on a foreground voxel: the last ones.

    Parameters
    ----------
    batch_size : int
        Number of samples.
    share : float
        As for `draw_locations`.
    rng : numpy.random.Generator
        Generator of the batch; decides on a part of a sample.
    """
    number = count_oversampled(batch_size, share)
    n = int(number)
    if n < number:
        n += rng.random() < number - n
    return [i >= batch_size - n for i in range(batch_size)]


def count_oversampled(batch_size: int, share: float) -> float:
    """Return how many samples of a batch are centred on a foreground voxel, a mean over batches.

    nnU-Net's share of 0.33 is rounded as there (1 of 2). A larger share is kept over many batches, but gives no fewer
    than 0.33 does; and so is one that rounds to none, as with a batch of one sample.

    Parameters
    ----------
    batch_size : int
        Number of samples.
    share : float
        Their share to be centred on a foreground voxel.
    """
    rounded = batch_size - round(batch_size * (1 - min(share, _NNUNET_SHARE)))
    return max(rounded, batch_size * share) if share > _NNUNET_SHARE or rounded == 0 else rounded


def draw_corner(case: CaseArrays, patch: Shape, foreground: bool, rng: np.random.Generator) -> Shape:
    """Draw the lower corner of a patch, as nnU-Net 2.8.1 does.

    A foreground patch is centred on a voxel of a random class of the case. It does not reach beyond the lower border
    (no further than other patches), but beyond the upper one. Other patches stay inside the image; along an axis where
    the image is smaller, it is in the middle of the patch, as in the sliding window. Where labels are partly ignored,
    other patches are centred on annotated voxels in the same way.
    """
    shape = case.label.shape
    missing = [max(0, p - s) for s, p in zip(shape, patch, strict=True)]
    low = [-((m + 1) // 2) for m in missing]
    classes = [c for c, voxels in case.foreground.items() if len(voxels)] if foreground else []
    voxels = case.foreground[classes[int(rng.integers(len(classes)))]] if classes else case.annotated
    if voxels is not None and len(voxels):
        voxel = voxels[int(rng.integers(len(voxels)))]
        corner = [max(lo, int(v) - p // 2) for v, p, lo in zip(voxel, patch, low, strict=True)]
    else:
        high = [max(-(m // 2), s - p) for m, s, p in zip(missing, shape, patch, strict=True)]
        corner = [int(rng.integers(lo, hi + 1)) for lo, hi in zip(low, high, strict=True)]
    return triple(corner)


def enlarge(location: Location, patch: Shape, shape: Shape) -> Location:
    """Return the location of a larger patch with the same centre; `shape` differs from `patch` by even numbers."""
    corner = triple(c - (s - p) // 2 for c, s, p in zip(location.corner, shape, patch, strict=True))
    return Location(location.case, corner, location.matrix)


# ------------------------------------------------------------------------------------------------ reading


def read_patches(
    cases: Sequence[CaseArrays], locations: Sequence[Location], patch: Shape, device: torch.device, beyond: int = 0
) -> tuple[Tensor, Tensor]:
    """Read patches as they are stored; one with a matrix as the box that contains it, in the middle of a common shape.

    Parameters
    ----------
    cases : sequence of CaseArrays
        Arrays on disk or in RAM, which are copied through pinned memory to a GPU, or tensors on the device.
    locations : sequence of Location
        Where the samples are taken from.
    patch : tuple of int
        Patch size (z, y, x).
    device : torch.device
        Where the result goes; the host does not wait for a copy to a GPU.
    beyond : int
        Class of voxels beyond the image.

    Returns
    -------
    images : Tensor, shape (n, channels, z, y, x)
        float16, or float32 where a case is stored so. Where cases have a teacher, its probabilities are the last
        channels; beyond the image they are 0.
    classes : Tensor, shape (n, maps, z, y, x)
        Classes of the label and, in the second stage of a cascade, those that the first stage predicted.
    """
    shapes = [patch if location.matrix is None else source_shape(location.matrix, patch) for location in locations]
    common: list[int] = np.max(shapes, axis=0).tolist()
    images, classes = _empty_patches([cases[location.case] for location in locations], common, device)
    resident = isinstance(cases[0].image, Tensor)
    rows = zip(*((x if resident else x.numpy()) for x in (images, classes)), strict=True)
    n_channels = cases[0].image.shape[0]
    for location, shape, (image, maps) in zip(locations, shapes, rows, strict=True):
        case, corner = cases[location.case], enlarge(location, patch, shape).corner
        if list(shape) != common:
            image[...] = maps[...] = 0
            inner = (..., *(slice((w - s) // 2, (w + s) // 2) for w, s in zip(common, shape, strict=True)))
            image, maps = image[inner], maps[inner]
        read_box(case.image, corner, image[:n_channels])
        read_box(case.label, corner, maps[0], beyond)
        if case.previous is not None:
            read_box(case.previous, corner, maps[1])
        if case.teacher is not None:
            read_box(case.teacher, corner, image[n_channels:])
            image[n_channels:] /= _TEACHER_STEPS
    non_blocking = device.type == "cuda"
    return images.to(device, non_blocking=non_blocking), classes.to(device, non_blocking=non_blocking)


def _empty_patches(cases: Sequence[CaseArrays], shape: Sequence[int], device: torch.device) -> tuple[Tensor, Tensor]:
    """Allocate images and classes for a box of each case, of types that hold all of them."""
    first = cases[0]
    source = first.image.device if isinstance(first.image, Tensor) else torch.device("cpu")
    options: dict[str, Any] = {"device": source, "pin_memory": source.type == "cpu" and device.type == "cuda"}
    dtype = torch.float32 if any(case.image.dtype.itemsize > 2 for case in cases) else torch.float16
    label_dtype = torch.uint8 if first.label.dtype.itemsize == 1 else torch.int32
    maps = 1 if first.previous is None else 2
    n_channels = first.image.shape[0] + (0 if first.teacher is None else first.teacher.shape[0])
    images = torch.empty((len(cases), n_channels, *shape), dtype=dtype, **options)
    return images, torch.empty((len(cases), maps, *shape), dtype=label_dtype, **options)


def read_box(array: Any, corner: Sequence[int], out: Any, beyond: int = 0) -> None:
    """Fill `out` (..., z, y, x) with the box at `corner` of the last three axes of an array.

    Parameters
    ----------
    array : ndarray, Tensor or stored array
        A tensor if `out` is one; otherwise anything that returns numpy arrays for slices.
    corner : sequence of int
        Lower corner (z, y, x) of the box; it may be outside of the array.
    out : ndarray or Tensor, shape (..., z, y, x)
        Overwritten.
    beyond : int
        Value outside of the array.
    """
    shape = out.shape[-3:]
    spans = [(max(c, 0), min(c + size, n)) for c, size, n in zip(corner, shape, array.shape[-3:], strict=True)]
    if any(stop - start < size for (start, stop), size in zip(spans, shape, strict=True)):
        out[...] = beyond
    if all(start < stop for start, stop in spans):
        inside = (..., *(slice(*span) for span in spans))
        target = (..., *(slice(start - c, stop - c) for (start, stop), c in zip(spans, corner, strict=True)))
        out[target] = array[inside]
