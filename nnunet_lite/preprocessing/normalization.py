"""Normalise intensities, with one function per scheme of the plan; `SCHEMES` lists them.

Each scheme changes one channel (z, y, x), float32, in place and needs no second array of its size: sums run over slices
in double precision. `inside` is the mask (z, y, x) of the voxels that count, or None for every voxel; only z-score uses
it. The schemes are nnU-Net's (Isensee et al., Nature Methods 2021, doi:10.1038/s41592-020-01008-z).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np

from nnunet_lite.errors import UserError
from nnunet_lite.planning.schema import Channel, Statistics

_SMALLEST = 1e-8  # a constant image is not divided by zero
_SLAB = 1 << 20  # voxels summed at a time

Scheme = Callable[[np.ndarray, Statistics, np.ndarray | None], None]


def normalize(image: np.ndarray, channels: tuple[Channel, ...], inside: np.ndarray | None) -> None:
    """Normalise an image in place, each channel by its own scheme.

    Parameters
    ----------
    image : ndarray, shape (channels, z, y, x)
        float32.
    channels : tuple of Channel
        The plan's channels.
    inside : ndarray of bool or None, shape (z, y, x)
        The voxels that clipping and z-score count and change in channels with `use_mask`; the others stay as they are.

    Raises
    ------
    UserError
        The image has another number of channels than the plan, or values that the scheme cannot take.
    """
    if len(image) != len(channels):
        raise UserError(f"the image has {len(image)} channels, the plan {len(channels)}")
    for array, channel in zip(image, channels, strict=True):
        counted = inside if channel.use_mask else None
        if channel.clip_percentiles is not None:
            voxels = array if counted is None else array[counted]
            if voxels.size:  # an image of zeros alone has none inside its mask
                limits = np.percentile(voxels, channel.clip_percentiles).astype(np.float32)
                np.clip(array, *limits, out=array, where=True if counted is None else counted)
        SCHEMES[channel.normalization](array, channel.statistics, counted)


def ct(array: np.ndarray, statistics: Statistics, inside: np.ndarray | None) -> None:
    """Clip to the foreground's 0.5 and 99.5 percentiles, then standardise by its mean and standard deviation."""
    np.clip(array, statistics.percentile_00_5, statistics.percentile_99_5, out=array)
    array -= statistics.mean
    array /= max(statistics.std, _SMALLEST)


def zscore(array: np.ndarray, statistics: Statistics, inside: np.ndarray | None) -> None:
    """Zero mean and unit variance over this image, or over its voxels inside the mask."""
    mean, std = moments(array, inside)
    if inside is None:
        array -= mean
        array /= max(std, _SMALLEST)
    else:
        for part, mask in zip(array, inside, strict=True):
            np.subtract(part, mean, out=part, where=mask)
            np.divide(part, max(std, _SMALLEST), out=part, where=mask)


def none(array: np.ndarray, statistics: Statistics, inside: np.ndarray | None) -> None:
    """Leave the values as they are."""


def rescale_0_1(array: np.ndarray, statistics: Statistics, inside: np.ndarray | None) -> None:
    """The lowest value becomes 0, the highest 1."""
    array -= array.min()
    array /= max(float(array.max()), _SMALLEST)


def rgb_0_1(array: np.ndarray, statistics: Statistics, inside: np.ndarray | None) -> None:
    """Bytes become 0 to 1."""
    low, high = float(array.min()), float(array.max())
    if low < 0 or high > 255:
        what = f"the plan takes the image for RGB of 0 to 255, but its values are {low:g} to {high:g}"
        raise UserError(what, fix="Give the channel another name in dataset.json and plan again.")
    array /= 255


SCHEMES: dict[str, Scheme] = {scheme.__name__: scheme for scheme in (ct, zscore, none, rescale_0_1, rgb_0_1)}


def moments(array: np.ndarray, inside: np.ndarray | None = None) -> tuple[float, float]:
    """Return mean and standard deviation of an array (z, y, x), or of its voxels inside a mask; (0, 0) for no voxel."""
    count = array.size if inside is None else int(np.count_nonzero(inside))
    if not count:
        return 0.0, 0.0
    mean = sum(float(part.sum(dtype=np.float64)) for part in _slabs(array, inside)) / count
    squares = sum(float(np.square(part - np.float64(mean)).sum()) for part in _slabs(array, inside))
    return mean, float(np.sqrt(squares / count))


def _slabs(array: np.ndarray, inside: np.ndarray | None) -> Iterator[np.ndarray]:
    """The array, or its voxels inside the mask, a few slices at a time."""
    step = max(1, _SLAB * len(array) // max(1, array.size))
    for start in range(0, len(array), step):
        part = array[start : start + step]
        yield part if inside is None else part[inside[start : start + step]]
