"""Augmentation of whole batches on the training device.

Parameters are drawn first, on the host, for each sample and channel (`draw_matrix`, `draw_intensity`); they are then
applied to all the samples concerned at once. Transforms, probabilities and ranges are nnU-Net v2's: rotation, scaling,
noise, blur, brightness, contrast, low resolution, inverted gamma, gamma, mirroring, in this order.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from functools import partial
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from nnunet_lite.settings import AugmentationSettings
from nnunet_lite.training.swaps import Swap
from nnunet_lite.training.transforms import blur, contrast, gamma, low_resolution, mirror, warp

Drawn = TypeVar("Drawn", bound=Any)

ANISOTROPY = 3.0  # a patch this much longer in plane than across is rotated and scaled in plane only
ELONGATED = 1.5  # a two-dimensional patch more elongated than this is rotated by 15 degrees at most


def is_in_plane(patch: tuple[int, ...]) -> bool:
    """Whether spatial transforms leave the first axis alone: two-dimensional and anisotropic patches."""
    return patch[0] == 1 or max(patch) / patch[0] > ANISOTROPY


def rotation(axis: int, degrees: float) -> np.ndarray:
    """The (3, 3) matrix of a rotation about one axis."""
    angle, (i, j) = np.deg2rad(degrees), [a for a in range(3) if a != axis]
    turn = np.eye(3)
    turn[i, i] = turn[j, j] = np.cos(angle)
    turn[i, j], turn[j, i] = -np.sin(angle), np.sin(angle)
    return turn


def rotation_limit(settings: AugmentationSettings, patch: tuple[int, int, int]) -> float:
    """Degrees that a patch is rotated by at most, either way."""
    if not is_in_plane(patch):
        return settings.rotation
    if settings.rotation_in_plane is not None:
        return settings.rotation_in_plane
    return 15.0 if patch[0] == 1 and max(patch) / min(patch[1:]) > ELONGATED else 180.0


def draw_matrix(
    rng: np.random.Generator, settings: AugmentationSettings, patch: tuple[int, int, int], in_plane: bool
) -> np.ndarray | None:
    """Rotation and scaling of one sample as a (3, 3) matrix in voxels, or None where it gets neither."""
    rotate, scale = rng.random() < settings.p_rotation, rng.random() < settings.p_scaling
    if not rotate and not scale:
        return None
    matrix = np.eye(3)
    if rotate:
        limit = rotation_limit(settings, patch)
        for axis in (0,) if in_plane else (0, 1, 2):
            matrix = matrix @ rotation(axis, rng.uniform(-limit, limit))
    if scale:
        factor = rng.uniform(*settings.scaling)
        matrix = matrix @ np.diag([1.0 if in_plane else factor, factor, factor])
    return matrix


@dataclass(frozen=True)
class Intensity:
    """Parameters of the intensity transforms of a batch; NaN where a (sample, channel) does not get one."""

    noise: np.ndarray  # (batch, channels) standard deviation, the same for all channels of a sample
    blur: np.ndarray  # (batch, channels, 3) sigma in voxels, per axis
    brightness: np.ndarray  # (batch, channels) factor
    contrast: np.ndarray  # (batch, channels) factor
    low_resolution: np.ndarray  # (batch, channels) factor
    gamma_inverted: np.ndarray  # (batch, channels) exponent
    gamma: np.ndarray  # (batch, channels) exponent
    seed: np.ndarray  # (batch,) of the noise


def draw_intensity(rng: np.random.Generator, settings: AugmentationSettings, batch: int, channels: int) -> Intensity:
    """Draw the parameters of a batch; a sample that is blurred or coarsened is so in half of its channels."""
    size = (batch, channels)

    def where(p: float, values: np.ndarray, p_channel: float = 1.0) -> np.ndarray:
        chosen = (rng.random((batch, 1)) < p) & (rng.random(size) < p_channel)
        return np.where(chosen.reshape(size + (1,) * (values.ndim - 2)), values, np.nan)

    def factors(limits: tuple[float, float]) -> np.ndarray:
        """Below and above one equally often."""
        low, high = limits
        below = (low < 1) & ((high <= 1) | (rng.random(size) < 0.5))
        return rng.uniform(np.where(below, low, max(low, 1.0)), np.where(below, min(high, 1.0), high))

    return Intensity(
        noise=where(settings.p_noise, rng.uniform(*settings.noise_std, (batch, 1)) + np.zeros(size)),
        blur=where(settings.p_blur, rng.uniform(*settings.blur_sigma, (*size, 3)), 0.5),
        brightness=where(settings.p_brightness, factors(settings.brightness)),
        contrast=where(settings.p_contrast, factors(settings.contrast)),
        low_resolution=where(settings.p_low_resolution, rng.uniform(*settings.low_resolution, size), 0.5),
        gamma_inverted=where(settings.p_gamma_inverted, factors(settings.gamma)),
        gamma=where(settings.p_gamma, factors(settings.gamma)),
        seed=rng.integers(2**62, size=batch),
    )


def samples_of(draw: Drawn, chosen: slice) -> Drawn:
    """What was drawn for some samples of a batch; of any dataclass of arrays with a sample in each row."""
    return replace(draw, **{field.name: getattr(draw, field.name)[chosen] for field in fields(draw)})


def on_device(arrays: Sequence[np.ndarray], device: torch.device) -> list[Tensor]:
    """Small arrays as float32 tensors on a device, in one copy that the host does not wait for."""
    flat = torch.from_numpy(np.concatenate([np.ravel(a) for a in arrays]).astype(np.float32))
    flat = (flat.pin_memory() if device.type == "cuda" else flat).to(device, non_blocking=True)
    return [part.view(a.shape) for part, a in zip(flat.split([a.size for a in arrays]), arrays, strict=True)]


def warped(images: Tensor, classes: Tensor, matrices: Tensor, patch: tuple[int, int, int]) -> tuple[Tensor, Tensor]:
    """Samples rotated and scaled, (n, channels, z, y, x); matrices that leave the first axis alone do so per slice."""
    if not is_in_plane(patch):
        return warp(images, classes, matrices, patch)
    flat = warp(images.flatten(1, 2), classes.flatten(1, 2), matrices[:, 1:, 1:], patch[1:])
    return flat[0].unflatten(1, images.shape[1:3]), flat[1].unflatten(1, classes.shape[1:3])


def apply_intensity(images: Tensor, draw: Intensity) -> Tensor:
    """Apply drawn parameters to a batch (batch, channels, z, y, x) float32; what is given is overwritten."""
    for i in np.flatnonzero(~np.isnan(draw.noise[:, 0])):
        generator = torch.Generator(images.device).manual_seed(int(draw.seed[i]))
        images[i] += float(draw.noise[i, 0]) * torch.randn(images.shape[1:], generator=generator, device=images.device)
    steps = _steps(draw, is_in_plane(tuple(images.shape[2:])))
    x = images.flatten(0, 1)  # from here on every channel of every sample is a row of its own
    rows = [values.reshape(len(x), -1) for values, _ in steps]
    chosen = [np.flatnonzero(~np.isnan(values[:, 0])) for values in rows]
    drawn = on_device([*chosen, *(values[i] for values, i in zip(rows, chosen, strict=True))], images.device)
    for (_, transform), index, parameter in zip(steps, drawn[: len(steps)], drawn[len(steps) :], strict=True):
        if len(index):
            row = index.long()
            x.index_copy_(0, row, transform(x.index_select(0, row), parameter))
    return x.unflatten(0, images.shape[:2])


def _steps(draw: Intensity, in_plane: bool) -> list[tuple[np.ndarray, Callable[[Tensor, Tensor], Tensor]]]:
    """The transforms of single channels in their order, each with what was drawn for it."""
    widest = float(np.nanmax(draw.blur, initial=0))
    return [
        (draw.blur, partial(blur, widest=widest)),
        (draw.brightness, lambda x, factor: x * factor[..., None, None]),
        (draw.contrast, contrast),
        (draw.low_resolution, partial(low_resolution, axes=(1, 2) if in_plane else (0, 1, 2))),
        (draw.gamma_inverted, lambda x, exponent: -gamma(-x, exponent)),
        (draw.gamma, gamma),
    ]


def draw_mirror(
    rng: np.random.Generator, settings: AugmentationSettings, batch: int, axes: tuple[int, ...]
) -> np.ndarray:
    """Along which axes of (z, y, x) the samples of a batch are mirrored, (batch, 3) bool."""
    return (rng.random((batch, 3)) < settings.p_mirror) & np.isin(np.arange(3), axes)


def apply_mirror(images: Tensor, classes: Tensor, flips: np.ndarray, swap: Swap | None = None) -> None:
    """Mirror images (batch, channels, z, y, x) and classes (batch, maps, z, y, x) in place, as drawn (batch, 3).

    With `swap`, classes change places where left and right do.
    """
    table = np.asarray(swap.table if swap else ())
    swapped, *flipped = on_device([table, *(np.flatnonzero(along) for along in flips.T)], images.device)
    rows = [index.long() for index in flipped]
    mirror(images, rows)
    mirror(classes, rows)
    if swap and len(rows[swap.axis]):
        index = rows[swap.axis]
        classes[index] = swapped.to(classes.dtype)[classes[index].long()]
