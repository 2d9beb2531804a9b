"""Degrade images as scanners and people do: the quality of predictions is calibrated on such copies too.

A degradation takes an image and its reference, a strength from 0 to 1, and random numbers. It returns both, on a new
grid where it changes the grid. Intensities are changed on the scale of the image itself.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
from scipy import fft, ndimage

from nnunet_lite.data.geometry import triple
from nnunet_lite.data.images import Image

Random = np.random.Generator


@dataclass(frozen=True)
class Labelled:
    """An image and its reference.

    Parameters
    ----------
    image : Image
        With all channels.
    reference : ndarray of int, shape (z, y, x)
        On the same grid.
    """

    image: Image
    reference: np.ndarray

    def with_channels(self, change: Callable[[np.ndarray, float, float], np.ndarray]) -> Labelled:
        """Change each channel (z, y, x), given its 1st and 99th percentile."""
        channels = []
        for channel in self.image.array.astype(np.float32):
            low, high = np.percentile(channel, (1, 99))
            channels.append(change(channel, float(low), max(float(high - low), 1e-6)))
        return replace(self, image=replace(self.image, array=np.stack(channels).astype(np.float32)))


def add_noise(pair: Labelled, strength: float, random: Random) -> Labelled:
    """Add white noise, with a standard deviation of 3 to 30 % of the range of intensities."""
    sigma = 0.03 + 0.27 * strength
    return pair.with_channels(lambda x, low, span: x + sigma * span * random.standard_normal(x.shape, np.float32))


def blur_image(pair: Labelled, strength: float, random: Random) -> Labelled:
    """Smooth with a Gaussian of 0.7 to 3.5 voxels."""
    sigma = [0.0 if n == 1 else 0.7 + 2.8 * strength for n in pair.reference.shape]
    return pair.with_channels(lambda x, low, span: ndimage.gaussian_filter(x, sigma))


def add_bias_field(pair: Labelled, strength: float, random: Random) -> Labelled:
    """Multiply with a smooth field that changes by a factor of 1.3 to 7 over the image."""
    axes = np.ix_(*(np.linspace(-1, 1, n, dtype=np.float32) for n in pair.reference.shape))
    slopes, bowls = random.standard_normal((2, 3), np.float32)
    field = sum(a * axis + b * axis**2 for axis, a, b in zip(axes, slopes, bowls, strict=True))
    field = (0.15 + 0.85 * strength) * field / max(np.abs(field).max(), 1e-6)
    return pair.with_channels(lambda x, low, span: low + (x - low) * np.exp(field))


def add_ghosts(pair: Labelled, strength: float, random: Random) -> Labelled:
    """Weaken every second to fourth line of k-space along one axis, as periodic motion does."""
    axis = _random_axis(pair, random)
    lines = np.ones(pair.reference.shape[axis], np.float32)
    lines[:: random.integers(2, 5)] -= 0.2 + 0.5 * strength
    lines[0] = 1
    shape = [-1 if a == axis else 1 for a in range(3)]

    def ghost(x: np.ndarray, low: float, span: float) -> np.ndarray:
        return np.abs(fft.ifft(fft.fft(x - low, axis=axis) * lines.reshape(shape), axis=axis)) + low

    return pair.with_channels(ghost)


def thicken_slices(pair: Labelled, strength: float, random: Random) -> Labelled:
    """Average 2 to 6 neighbouring slices into one, along a random axis of a volume."""
    axis = _random_axis(pair, random)
    shape = pair.reference.shape
    factor = min(2 + round(4 * strength), shape[axis] // 4)
    if factor < 2:
        return blur_image(pair, strength, random)
    starts = np.arange(0, shape[axis] - factor + 1, factor)
    cut = np.take(pair.image.array, range(starts[-1] + factor), axis + 1).astype(np.float32)
    array = np.add.reduceat(cut, starts, axis + 1) / factor
    reference = np.take(pair.reference, starts + factor // 2, axis)
    spacing = triple(s * (factor if a == axis else 1) for a, s in enumerate(pair.image.geometry.spacing))
    geometry = replace(pair.image.geometry, shape=triple(reference.shape), spacing=spacing)
    return Labelled(replace(pair.image, array=array, geometry=geometry), reference)


def crop(pair: Labelled, strength: float, random: Random) -> Labelled:
    """Cut 15 to 55 % off one end of an axis."""
    axis = _random_axis(pair, random)
    size = pair.reference.shape[axis]
    n = min(size - 1, max(1, round((0.15 + 0.4 * strength) * size)))
    kept = slice(n, None) if random.random() < 0.5 else slice(None, size - n)
    inside = tuple(kept if a == axis else slice(None) for a in range(3))
    reference = pair.reference[inside]
    geometry = replace(pair.image.geometry, shape=triple(reference.shape))
    return Labelled(replace(pair.image, array=pair.image.array[:, *inside], geometry=geometry), reference)


def flip(pair: Labelled, strength: float, random: Random) -> Labelled:
    """Mirror along a random axis, as a wrong orientation in the header does."""
    axis = _random_axis(pair, random)
    array = np.ascontiguousarray(np.flip(pair.image.array, axis + 1))
    return Labelled(replace(pair.image, array=array), np.ascontiguousarray(np.flip(pair.reference, axis)))


def change_contrast(pair: Labelled, strength: float, random: Random) -> Labelled:
    """Map intensities by a random curve, as another sequence does; a weak one is mixed with the image itself."""
    knots = np.linspace(0, 1, 6)
    curve = random.random(6)
    curve, share_of_it = (curve - curve.min()) / np.ptp(curve), strength**0.5

    def bend(x: np.ndarray, low: float, span: float) -> np.ndarray:
        share = (x - low) / span
        return low + span * (share_of_it * np.interp(share, knots, curve) + (1 - share_of_it) * share)

    return pair.with_channels(bend)


DEGRADATIONS: dict[str, Callable[[Labelled, float, Random], Labelled]] = {
    "noise": add_noise,
    "blur": blur_image,
    "bias field": add_bias_field,
    "ghosts": add_ghosts,
    "thick slices": thicken_slices,
    "cropped": crop,
    "flipped": flip,
    "contrast": change_contrast,
}


def _random_axis(pair: Labelled, random: Random) -> int:
    return int(random.choice([axis for axis, n in enumerate(pair.reference.shape) if n > 3]))
