"""Which patches a batch is made of, and reading them.

Every batch is drawn from a generator seeded with (seed, epoch, iteration): nothing but these numbers decides it, so a
resumed run sees the very batches that an undisturbed one would have seen, and no random state has to be saved. Drawing
is apart from reading: each of several ranks draws the whole batch and reads its own samples.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from nnunet_lite.settings import AugmentationSettings
from nnunet_lite.training.augmentation import draw_matrix

Shape = tuple[int, int, int]


class CaseArrays(Protocol):
    """What a stored or loaded case offers: `image` (channels, z, y, x), `label` (z, y, x) and voxels (n, 3).

    `foreground` has the voxels of each class or region; `annotated` those that are not ignored, None if all are;
    `previous` (z, y, x) the classes that the previous stage of a cascade predicted on the same grid, None without one.
    """

    @property
    def case_id(self) -> str: ...
    @property
    def image(self) -> Any: ...
    @property
    def label(self) -> Any: ...
    @property
    def foreground(self) -> Mapping[int, np.ndarray]: ...
    @property
    def annotated(self) -> np.ndarray | None: ...
    @property
    def previous(self) -> Any: ...


@dataclass(frozen=True)
class Place:
    """Where a sample is taken from: a case, the lower corner of the patch in it, and how it is turned and scaled.

    `matrix` (3, 3) maps offsets from the centre of the patch to offsets from the same point of the image, in voxels;
    None where the patch is taken as it lies.
    """

    case: int
    corner: Shape
    matrix: np.ndarray | None


@dataclass(frozen=True)
class Stack:
    """Boxes of one shape, read: images (n, channels, z, y, x), classes (n, 1 or 2, z, y, x).

    The classes are those of the label and, in the second stage of a cascade, those that the first one predicted.
    """

    images: Tensor
    classes: Tensor

    def to(self, device: torch.device) -> Stack:
        """On the device, in float32; a copy from pinned memory is not waited for."""
        images = self.images.to(device, non_blocking=True).float()
        return Stack(images, self.classes.to(device, non_blocking=True))


def rng_for(seed: int, *counters: int) -> np.random.Generator:
    """The generator of one batch."""
    return np.random.default_rng([seed, *counters])


def forced_foreground(batch_size: int, share: float, rng: np.random.Generator) -> list[bool]:
    """Which samples of a batch are centred on a foreground voxel: the last ones, rounded as nnU-Net rounds (1 of 2).

    Where that would leave none of any batch, as of one sample alone, the last one is now and then, so that the share
    is kept over many batches.
    """
    forced = [i >= round(batch_size * (1 - share)) for i in range(batch_size)]
    if share > 0 and not forced[-1]:
        forced[-1] = rng.random() < batch_size * share
    return forced


def draw_corner(case: CaseArrays, patch: Shape, foreground: bool, rng: np.random.Generator) -> Shape:
    """Lower corner of a patch, centred on a voxel of a random class of the case where `foreground` is asked for.

    Patches lie where nnU-Net 2.8.1 puts them. Others than foreground patches stay inside the image; along an axis where
    the image is smaller, it lies in the middle of the patch, as in the sliding window. Foreground patches do not reach
    over the lower border, or not further than the others, but they reach over the upper one, so that their voxel is in
    the centre there. Where labels are partly ignored, the others are centred on annotated voxels in the same way.
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
    return corner[0], corner[1], corner[2]


def draw_places(
    cases: Sequence[CaseArrays],
    patch: Shape,
    batch_size: int,
    foreground: float,
    augmentation: AugmentationSettings | None,
    in_plane: bool,
    rng: np.random.Generator,
) -> list[Place]:
    """Draw where the samples of a batch lie; cases with replacement, as nnU-Net draws them.

    Without `augmentation` none of them is turned or scaled.
    """
    places = []
    for forced in forced_foreground(batch_size, foreground, rng):
        number = int(rng.integers(len(cases)))
        corner = draw_corner(cases[number], patch, forced, rng)
        matrix = draw_matrix(rng, augmentation, patch, in_plane) if augmentation else None
        places.append(Place(number, corner, matrix))
    return places


def source_shape(matrix: np.ndarray, patch: Shape) -> Shape:
    """Size of the box that holds a patch after the matrix moved its corners.

    It is larger or smaller than the patch by an even number, so that both have one centre and voxels of an axis that
    the matrix leaves alone are met exactly, not interpolated.
    """
    half = (np.asarray(patch) - 1) / 2
    corners = np.array(list(itertools.product((-1, 1), repeat=3))) * half
    reach = np.abs(corners @ matrix.T).max(0)
    z, y, x = (p + 2 * int(np.ceil(r - h - 1e-6)) for p, r, h in zip(patch, reach, half, strict=True))
    return z, y, x


def enlarged(place: Place, patch: Shape, shape: Shape) -> Place:
    """The place of a larger patch with the same centre; `shape` differs from `patch` by even numbers."""
    z, y, x = (c - (s - p) // 2 for c, s, p in zip(place.corner, shape, patch, strict=True))
    return Place(place.case, (z, y, x), place.matrix)


def read_box(array: Any, corner: Sequence[int], out: Any, beyond: int = 0) -> None:
    """Fill `out` (..., z, y, x) with the box at `corner` of the last three axes of an array, `beyond` outside of it.

    Both are tensors, or `out` is a numpy array and the other one like it, for instance on disk.
    """
    shape = out.shape[-3:]
    spans = [(max(c, 0), min(c + size, n)) for c, size, n in zip(corner, shape, array.shape[-3:], strict=True)]
    if any(stop - start < size for (start, stop), size in zip(spans, shape, strict=True)):
        out[...] = beyond
    if all(start < stop for start, stop in spans):
        inside = (..., *(slice(*span) for span in spans))
        target = (..., *(slice(start - c, stop - c) for (start, stop), c in zip(spans, corner, strict=True)))
        out[target] = array[inside]


def read_stack(
    cases: Sequence[CaseArrays], places: Sequence[Place], patch: Shape, device: torch.device, beyond: int = 0
) -> Stack:
    """Read patches as they are stored; those to be turned or scaled with a box that holds them, in the middle of one
    shape for all. `beyond` is the class of what a patch holds outside of its image.

    On the device where the cases lie there, else on the host, for a GPU in pinned memory.
    """
    shapes = [patch if place.matrix is None else source_shape(place.matrix, patch) for place in places]
    common: list[int] = np.max(shapes, axis=0).tolist()
    stack = _empty_stack([cases[place.case] for place in places], common, device)
    resident = isinstance(cases[0].image, Tensor)
    images, labels = (x if resident else x.numpy() for x in (stack.images, stack.classes))
    for place, shape, image, classes in zip(places, shapes, images, labels, strict=True):
        case, corner = cases[place.case], enlarged(place, patch, shape).corner
        if list(shape) != common:
            image[...] = classes[...] = 0
            inner = (..., *(slice((w - s) // 2, (w + s) // 2) for w, s in zip(common, shape, strict=True)))
            image, classes = image[inner], classes[inner]
        read_box(case.image, corner, image)
        read_box(case.label, corner, classes[0], beyond)
        if case.previous is not None:
            read_box(case.previous, corner, classes[1])
    return stack


def _empty_stack(cases: Sequence[CaseArrays], shape: Sequence[int], device: torch.device) -> Stack:
    """Room for a box of each case, of types that hold all of them."""
    first = cases[0]
    at = first.image.device if isinstance(first.image, Tensor) else torch.device("cpu")
    pinned = at.type == "cpu" and device.type == "cuda"
    image = torch.float32 if any(case.image.dtype.itemsize > 2 for case in cases) else torch.float16
    label = torch.uint8 if first.label.dtype.itemsize == 1 else torch.int32
    maps = 1 if first.previous is None else 2
    return Stack(
        torch.empty((len(cases), first.image.shape[0], *shape), dtype=image, device=at, pin_memory=pinned),
        torch.empty((len(cases), maps, *shape), dtype=label, device=at, pin_memory=pinned),
    )
