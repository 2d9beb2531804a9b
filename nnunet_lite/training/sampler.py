"""Which patches a batch is made of, and reading them.

Every batch is drawn from a generator seeded with (seed, epoch, iteration): nothing but these numbers decides it, so a
resumed run sees the very batches that an undisturbed one would have seen, and no random state has to be saved.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from nnunet_lite.settings import AugmentationSettings
from nnunet_lite.training.augment import draw_matrix

Shape = tuple[int, int, int]


class CaseArrays(Protocol):
    """What a stored or loaded case offers: `image` (channels, z, y, x), `label` (z, y, x) and voxels (n, 3).

    `foreground` has the voxels of each class or region; `annotated` those that are not ignored, None if all are.
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


@dataclass(frozen=True)
class Sample:
    """A patch as read: larger than the patch and with a matrix where it is still to be rotated or scaled.

    `matrix` (3, 3) maps offsets from the patch centre to offsets from the centre of the array read, in voxels.
    """

    case_id: str
    image: np.ndarray  # (channels, z, y, x), as stored
    label: np.ndarray  # (z, y, x) classes
    matrix: np.ndarray | None


def rng_for(seed: int, *counters: int) -> np.random.Generator:
    """The generator of one batch."""
    return np.random.default_rng([seed, *counters])


def forced_foreground(batch_size: int, share: float) -> list[bool]:
    """Which samples of a batch are centred on a foreground voxel: the last ones, rounded as nnU-Net rounds (1 of 2)."""
    return [i >= round(batch_size * (1 - share)) for i in range(batch_size)]


def draw_corner(case: CaseArrays, patch: Shape, foreground: bool, rng: np.random.Generator) -> Shape:
    """Lower corner of a patch, centred on a voxel of a random class of the case where `foreground` is asked for.

    A patch stays inside the image; along an axis where the image is smaller, the image lies in the middle of the patch,
    as it does in the sliding window. Where labels are partly ignored, patches are centred on annotated voxels.
    """
    shape = case.label.shape
    low = [-(max(0, p - s) // 2) for s, p in zip(shape, patch, strict=True)]
    high = [max(lo, s - p) for lo, s, p in zip(low, shape, patch, strict=True)]
    classes = [c for c, voxels in case.foreground.items() if len(voxels)] if foreground else []
    voxels = case.foreground[classes[int(rng.integers(len(classes)))]] if classes else case.annotated
    if voxels is not None and len(voxels):
        voxel = voxels[int(rng.integers(len(voxels)))]
        corner = [int(np.clip(v - p // 2, lo, hi)) for v, p, lo, hi in zip(voxel, patch, low, high, strict=True)]
    else:
        corner = [int(rng.integers(lo, hi + 1)) for lo, hi in zip(low, high, strict=True)]
    return corner[0], corner[1], corner[2]


def read_padded(array: Any, corner: Sequence[int], shape: Sequence[int]) -> np.ndarray:
    """The box at `corner` of the last three axes of an array, with zeros where it reaches outside."""
    lead = array.ndim - 3
    inside = tuple(
        slice(max(0, c), max(0, min(n, c + s))) for c, s, n in zip(corner, shape, array.shape[lead:], strict=True)
    )
    data = np.asarray(array[(slice(None),) * lead + inside])
    if data.shape[lead:] == tuple(shape):
        return data
    out = np.zeros((*array.shape[:lead], *shape), data.dtype)
    target = tuple(
        slice(s.start - c, s.start - c + n) for s, c, n in zip(inside, corner, data.shape[lead:], strict=True)
    )
    out[(slice(None),) * lead + target] = data
    return out


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


def read_sample(case: CaseArrays, corner: Shape, patch: Shape, matrix: np.ndarray | None) -> Sample:
    """Read a patch; the larger box around it only where the patch is to be rotated or scaled."""
    if matrix is None:
        return Sample(
            case.case_id, read_padded(case.image, corner, patch), read_padded(case.label, corner, patch), None
        )
    wide = source_shape(matrix, patch)
    at = [c - (w - p) // 2 for c, w, p in zip(corner, wide, patch, strict=True)]
    return Sample(case.case_id, read_padded(case.image, at, wide), read_padded(case.label, at, wide), matrix)


def draw_batch(
    cases: Sequence[CaseArrays],
    patch: Shape,
    batch_size: int,
    foreground: float,
    augmentation: AugmentationSettings | None,
    in_plane: bool,
    rng: np.random.Generator,
) -> list[Sample]:
    """Draw and read one batch; cases with replacement, as nnU-Net draws them."""
    samples = []
    for forced in forced_foreground(batch_size, foreground):
        case = cases[int(rng.integers(len(cases)))]
        corner = draw_corner(case, patch, forced, rng)
        matrix = draw_matrix(rng, augmentation, patch, in_plane) if augmentation else None
        samples.append(read_sample(case, corner, patch, matrix))
    return samples
