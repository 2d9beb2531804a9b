"""Augmentation of whole batches on the training device.

Parameters are drawn first, on the host, for each sample and channel (`draw_matrix`, `draw_intensity`); they are then
applied to all the samples concerned at once. Transforms, probabilities and ranges are nnU-Net v2's: rotation, scaling,
noise, blur, brightness, contrast, low resolution, inverted gamma, gamma, mirroring, in this order.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from nnunet_lite.settings import AugmentationSettings

if TYPE_CHECKING:
    from nnunet_lite.training.sampler import Sample

ANISOTROPY = 3.0  # a patch this much longer in plane than across is rotated and scaled in plane only
ELONGATED = 1.5  # a two-dimensional patch more elongated than this is rotated by 15 degrees at most


def is_in_plane(patch: tuple[int, ...]) -> bool:
    """Whether spatial transforms leave the first axis alone: two-dimensional and anisotropic patches."""
    return patch[0] == 1 or max(patch) / patch[0] > ANISOTROPY


def _around_one(rng: np.random.Generator, low: float, high: float) -> float:
    """A factor that is below and above one equally often."""
    below = low < 1 and (high <= 1 or rng.random() < 0.5)
    return float(rng.uniform(low, min(high, 1.0)) if below else rng.uniform(max(low, 1.0), high))


def draw_matrix(
    rng: np.random.Generator, settings: AugmentationSettings, patch: tuple[int, int, int], in_plane: bool
) -> np.ndarray | None:
    """Rotation and scaling of one sample as a (3, 3) matrix in voxels, or None where it gets neither."""
    rotate, scale = rng.random() < settings.p_rotation, rng.random() < settings.p_scaling
    if not rotate and not scale:
        return None
    matrix = np.eye(3)
    if rotate:
        limit = settings.rotation
        if in_plane:
            limit = 15.0 if patch[0] == 1 and max(patch) / min(patch[1:]) > ELONGATED else 180.0
        for axis in (0,) if in_plane else (0, 1, 2):
            angle = np.deg2rad(rng.uniform(-limit, limit))
            i, j = [a for a in range(3) if a != axis]
            turn = np.eye(3)
            turn[i, i] = turn[j, j] = np.cos(angle)
            turn[i, j], turn[j, i] = -np.sin(angle), np.sin(angle)
            matrix = matrix @ turn
    if scale:
        factor = rng.uniform(*settings.scaling)
        matrix = matrix @ np.diag([1.0 if in_plane else factor, factor, factor])
    return matrix


@dataclass(frozen=True)
class Intensity:
    """Parameters of the intensity transforms of a batch; NaN where a (sample, channel) does not get one."""

    noise: np.ndarray  # (batch, 1) standard deviation of one field for all channels
    blur: np.ndarray  # (batch, channels, 3) sigma in voxels, per axis
    brightness: np.ndarray  # (batch, channels) factor
    contrast: np.ndarray  # (batch, channels) factor
    low_resolution: np.ndarray  # (batch, channels) factor
    gamma_inverted: np.ndarray  # (batch, channels) exponent
    gamma: np.ndarray  # (batch, channels) exponent
    mirror: np.ndarray  # (batch, 3) bool
    noise_seed: int


def draw_intensity(
    rng: np.random.Generator, settings: AugmentationSettings, batch: int, channels: int, mirror_axes: tuple[int, ...]
) -> Intensity:
    """Draw the parameters of a batch; a sample that is blurred or coarsened is so in half of its channels."""

    def chosen(p: float, p_channel: float = 1.0) -> np.ndarray:
        return (rng.random((batch, 1)) < p) & (rng.random((batch, channels)) < p_channel)

    def where(mask: np.ndarray, values: np.ndarray) -> np.ndarray:
        return np.where(mask, values, np.nan)

    def factors(limits: tuple[float, float]) -> np.ndarray:
        return np.array([[_around_one(rng, *limits) for _ in range(channels)] for _ in range(batch)])

    return Intensity(
        noise=where(rng.random((batch, 1)) < settings.p_noise, rng.uniform(*settings.noise_std, (batch, 1))),
        blur=where(chosen(settings.p_blur, 0.5)[..., None], rng.uniform(*settings.blur_sigma, (batch, channels, 3))),
        brightness=where(chosen(settings.p_brightness), factors(settings.brightness)),
        contrast=where(chosen(settings.p_contrast), factors(settings.contrast)),
        low_resolution=where(
            chosen(settings.p_low_resolution, 0.5), rng.uniform(*settings.low_resolution, (batch, channels))
        ),
        gamma_inverted=where(chosen(settings.p_gamma_inverted), factors(settings.gamma)),
        gamma=where(chosen(settings.p_gamma), factors(settings.gamma)),
        mirror=(rng.random((batch, 3)) < settings.p_mirror) & np.isin(np.arange(3), mirror_axes),
        noise_seed=int(rng.integers(2**62)),
    )


def collate(samples: list[Sample], patch: tuple[int, int, int], device: torch.device) -> tuple[Tensor, Tensor]:
    """Samples -> images (batch, channels, *patch) float32 and classes (batch, *patch), rotated and scaled."""
    images, labels = [], []
    for sample in samples:
        image = torch.from_numpy(sample.image).to(device, non_blocking=True).float()
        label = torch.from_numpy(sample.label).to(device, non_blocking=True)
        if sample.matrix is not None:
            grid = sampling_grid(sample.matrix, patch, sample.label.shape, device)
            image = F.grid_sample(image[None], grid, mode="bilinear", padding_mode="zeros", align_corners=True)[0]
            label = F.grid_sample(label[None, None].float(), grid, mode="nearest", align_corners=True)[0, 0].to(
                label.dtype
            )
        images.append(image)
        labels.append(label)
    return torch.stack(images), torch.stack(labels)


def sampling_grid(matrix: np.ndarray, patch: tuple[int, ...], source: tuple[int, ...], device: torch.device) -> Tensor:
    """Where each voxel of the patch comes from, as `grid_sample` wants it: (1, *patch, 3), x first, -1..1."""
    axes = [torch.arange(n, device=device, dtype=torch.float32) - (n - 1) / 2 for n in patch]
    offsets = torch.stack(torch.meshgrid(*axes, indexing="ij"), -1)
    half = torch.tensor([max(n - 1, 1) / 2 for n in source], device=device)
    moved = offsets @ torch.as_tensor(matrix.T, dtype=torch.float32, device=device) / half
    return moved.flip(-1)[None]


def apply_intensity(
    images: Tensor, labels: Tensor, draw: Intensity, masked: Sequence[int] = ()
) -> tuple[Tensor, Tensor]:
    """Apply drawn parameters to a batch: images (batch, channels, z, y, x) float32, labels (batch, z, y, x).

    `masked` channels were normalised inside the nonzero mask: outside of it they stay zero.
    """
    inside = (images != 0).any(1) if masked else None
    index, std = _chosen(draw.noise[:, 0], images.device)
    if len(index):
        generator = torch.Generator(device=images.device).manual_seed(draw.noise_seed)
        field = torch.randn((len(index), 1, *images.shape[2:]), generator=generator, device=images.device)
        images = images.index_add(0, index, (field * std[:, None]).expand(-1, images.shape[1], -1, -1, -1))
    x = images.flatten(0, 1)  # from here on every channel of every sample is a row of its own
    for values, transform in (
        (draw.blur.reshape(-1, 3), blur),
        (draw.brightness.reshape(-1), torch.mul),
        (draw.contrast.reshape(-1), contrast),
        (draw.low_resolution.reshape(-1), low_resolution),
        (draw.gamma_inverted.reshape(-1), lambda a, g: -gamma(-a, g)),
        (draw.gamma.reshape(-1), gamma),
    ):
        index, parameter = _chosen(values, images.device)
        if len(index):
            x = x.index_copy(0, index, transform(x[index], parameter))
    images = x.unflatten(0, images.shape[:2])
    if inside is not None:
        images[:, list(masked)] *= inside[:, None]
    return mirror(images, labels, draw.mirror)


def _chosen(values: np.ndarray, device: torch.device) -> tuple[Tensor, Tensor]:
    """The rows that get a transform, and the parameters of each, (rows, 1, 1, 1) or (rows, parameters, 1, 1, 1)."""
    index = np.flatnonzero(~np.isnan(values.reshape(len(values), -1)[:, 0]))
    parameters = torch.as_tensor(values[index].astype(np.float32), device=device)
    return torch.as_tensor(index, device=device), parameters[..., None, None, None]


def blur(x: Tensor, sigma: Tensor) -> Tensor:
    """Gaussian blur of (rows, z, y, x) with a sigma per row and axis, (rows, 3, 1, 1, 1), in voxels; edges repeated."""
    radius = 3
    taps = torch.arange(-radius, radius + 1, device=x.device)
    for axis in range(3):
        if x.shape[axis + 1] == 1:
            continue
        weights = torch.exp(-0.5 * (taps / sigma[:, axis]) ** 2)  # (rows, 1, 1, taps)
        weights = weights / weights.sum(-1, keepdim=True)
        edge = [0] * 6
        edge[2 * (2 - axis)] = edge[2 * (2 - axis) + 1] = radius
        padded = F.pad(x[:, None], edge, mode="replicate")[:, 0]
        size = x.shape[axis + 1]
        parts = [
            padded.narrow(axis + 1, k, size) * weights[..., k, None].reshape(-1, 1, 1, 1) for k in range(len(taps))
        ]
        x = torch.stack(parts).sum(0)
    return x


def contrast(x: Tensor, factor: Tensor) -> Tensor:
    """Scale the distance from the mean, within the range that was there."""
    mean = x.mean((1, 2, 3), keepdim=True)
    low, high = x.amin((1, 2, 3), keepdim=True), x.amax((1, 2, 3), keepdim=True)
    return torch.clamp((x - mean) * factor + mean, low, high)


def gamma(x: Tensor, exponent: Tensor) -> Tensor:
    """Raise the image, rescaled to 0..1, to a power; mean and standard deviation are kept."""
    mean, std = x.mean((1, 2, 3), keepdim=True), x.std((1, 2, 3), keepdim=True)
    low = x.amin((1, 2, 3), keepdim=True)
    span = (x.amax((1, 2, 3), keepdim=True) - low).clamp_min(1e-7)
    y = ((x - low) / span) ** exponent * span + low
    y = y - y.mean((1, 2, 3), keepdim=True)
    return y / y.std((1, 2, 3), keepdim=True).clamp_min(1e-7) * std + mean


def low_resolution(x: Tensor, factor: Tensor) -> Tensor:
    """Sample down (nearest) and up again (linear); along the first axis only where the patch is not anisotropic."""
    out = []
    keep_first = is_in_plane(tuple(x.shape[1:]))
    for row, f in zip(x, factor.flatten().tolist(), strict=True):
        small = [n if axis == 0 and keep_first else max(1, round(n * f)) for axis, n in enumerate(row.shape)]
        down = F.interpolate(row[None, None], size=small, mode="nearest-exact")
        out.append(F.interpolate(down, size=row.shape, mode="trilinear")[0, 0])
    return torch.stack(out)


def mirror(images: Tensor, labels: Tensor, flips: np.ndarray) -> tuple[Tensor, Tensor]:
    """Flip the samples along the axes drawn for each, (batch, 3)."""
    flipped = [
        (image.flip([a + 1 for a in axes]), label.flip(axes))
        if (axes := np.flatnonzero(flip).tolist())
        else (image, label)
        for image, label, flip in zip(images, labels, flips, strict=True)
    ]
    return torch.stack([image for image, _ in flipped]), torch.stack([label for _, label in flipped])
