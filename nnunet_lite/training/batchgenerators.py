"""Transforms of batchgenerators: the original nnU-Net's pipeline, and any others that a recipe names.

They run on the CPU, sample by sample, and draw from the global random states of Python and numpy. These are seeded for
each sample and put back afterwards, so that a sample depends on nothing but its seed.
"""

from __future__ import annotations

import difflib
import importlib
import inspect
import itertools
import pkgutil
import random
import threading
from abc import ABC
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

from nnunet_lite.errors import UserError, describe
from nnunet_lite.settings import AugmentationSettings
from nnunet_lite.training.augmentation import is_in_plane, rotation, rotation_limit
from nnunet_lite.training.sampler import Shape, source_shape

P_ELASTIC = 0.2  # that of nnU-Net v1; without a setting, as the native pipeline has no elastic deformation
_KEY = "augmentation.extra"
_STATE = threading.Lock()  # of the global random states
Transform = Any  # an object of batchgenerators, called with data (1, channels, ...) and seg (1, maps, ...)


@cache
def registry() -> dict[str, type]:
    """The transforms of batchgenerators by name, without base classes and those that are made of others."""
    import batchgenerators.transforms as package

    names = [f"{package.__name__}.{m.name}" for m in pkgutil.iter_modules(package.__path__) if "abstract" not in m.name]
    found = [kind for name in names for _, kind in inspect.getmembers(importlib.import_module(name), inspect.isclass)]
    return {
        kind.__name__: kind
        for kind in found
        if kind.__module__ in names
        and ABC not in kind.__bases__
        and "transform" not in " ".join(inspect.signature(kind).parameters)
        and "data_dict" in inspect.signature(kind.__call__).parameters
    }


def extra_transforms(settings: AugmentationSettings) -> list[Transform]:
    """The transforms of `augmentation.extra`, made.

    Raises
    ------
    UserError : unknown name (names the nearest), or arguments that it does not take (with those that it does).
    """
    made = []
    for entry in settings.extra:
        name, arguments = entry.get("name"), {k: _tuples(v) for k, v in entry.items() if k != "name"}
        kind = registry().get(str(name))
        if kind is None:
            near = difflib.get_close_matches(str(name), registry(), 1, 0.4)
            hint = f"Did you mean {near[0]!r}?" if near else f"There are: {', '.join(sorted(registry()))}."
            raise UserError(f"{_KEY}: batchgenerators has no transform {name!r}", fix=hint)
        try:
            made.append(kind(**arguments))
        except Exception as error:
            takes = ", ".join(str(p) for p in inspect.signature(kind).parameters.values())
            raise UserError(f"{_KEY}: {name}: {error}", fix=f"It takes: {takes}.") from None
    return made


def _tuples(value: Any) -> Any:
    """Lists, which is what TOML has, as the tuples that batchgenerators looks for."""
    return tuple(map(_tuples, value)) if isinstance(value, list | tuple) else value


def reference_transforms(
    settings: AugmentationSettings,
    patch: Shape,
    p_elastic: float = P_ELASTIC,
    order: int = 3,
) -> list[Transform]:
    """The pipeline of the original nnU-Net, up to mirroring (Isensee et al. 2018, arXiv:1809.10486; version 1).

    Elastic deformation, rotation and scaling in one interpolation of `order` out of an oversized patch, then what else
    the settings ask for. All slices of an anisotropic patch are deformed equally.
    """
    from batchgenerators.transforms.color_transforms import (
        BrightnessMultiplicativeTransform,
        ContrastAugmentationTransform,
        GammaTransform,
    )
    from batchgenerators.transforms.noise_transforms import GaussianBlurTransform, GaussianNoiseTransform
    from batchgenerators.transforms.resample_transforms import SimulateLowResolutionTransform

    s, ignored = settings, (0,) if patch[0] > 1 and is_in_plane(patch) else None
    chances = [
        (s.p_noise, lambda p: GaussianNoiseTransform(s.noise_std, p_per_sample=p)),
        (s.p_blur, lambda p: GaussianBlurTransform(s.blur_sigma, True, True, 0, p_per_channel=0.5, p_per_sample=p)),
        (s.p_brightness, lambda p: BrightnessMultiplicativeTransform(s.brightness, p_per_sample=p)),
        (s.p_contrast, lambda p: ContrastAugmentationTransform(s.contrast, p_per_sample=p)),
        (s.p_low_resolution, lambda p: SimulateLowResolutionTransform(s.low_resolution, True, 0.5, order_downsample=0,
                                             order_upsample=order, p_per_sample=p, ignore_axes=ignored)),
        (s.p_gamma_inverted, lambda p: GammaTransform(s.gamma, True, True, retain_stats=True, p_per_sample=p)),
        (s.p_gamma, lambda p: GammaTransform(s.gamma, False, True, retain_stats=True, p_per_sample=p)),
    ]  # fmt: skip
    return [_spatial(settings, patch, p_elastic, order), *(make(p) for p, make in chances if p > 0)]


def _spatial(settings: AugmentationSettings, patch: Shape, p_elastic: float, order: int) -> Transform:
    """Deformation, rotation and scaling about the centre of the patch."""
    from batchgenerators.transforms.spatial_transforms import SpatialTransform

    in_plane = is_in_plane(patch)
    angle = np.deg2rad(rotation_limit(settings, patch))
    transform = SpatialTransform(
        patch[1:] if in_plane else patch, None, True, (0.0, 200.0 if in_plane else 900.0), (9.0, 13.0),
        True, (-angle, angle), (-angle, angle), (-angle, angle), True, settings.scaling,
        border_mode_data="constant", order_data=order, order_seg=1, random_crop=False, p_el_per_sample=p_elastic,
        p_scale_per_sample=settings.p_scaling, p_rot_per_sample=settings.p_rotation,
    )  # fmt: skip

    def per_slice(**sample: np.ndarray) -> dict[str, np.ndarray]:
        shapes = {key: array.shape[1:3] for key, array in sample.items()}
        moved = transform(**{key: array.reshape(1, -1, *array.shape[3:]) for key, array in sample.items()})
        return {key: moved[key].reshape(1, *shape, *moved[key].shape[2:]) for key, shape in shapes.items()}

    return per_slice if in_plane and patch[0] > 1 else transform


def oversized(settings: AugmentationSettings, patch: Shape) -> Shape:
    """The box that holds a patch however it is rotated and scaled; what a deformation adds is little and left out."""
    top = min(rotation_limit(settings, patch), 90.0)
    angles = [np.linspace(0, top, 4) if axis == 0 or not is_in_plane(patch) else [0.0] for axis in range(3)]
    largest = max(settings.scaling[1], 1.0) * np.eye(3)
    if is_in_plane(patch):
        largest[0, 0] = 1.0
    turns = (rotation(0, a) @ rotation(1, b) @ rotation(2, c) for a, b, c in itertools.product(*angles))
    z, y, x = np.max([patch, *(source_shape(turn @ largest, patch) for turn in turns)], axis=0).tolist()
    return z, y, x


def apply_transforms(
    transforms: Sequence[Transform], images: Tensor, classes: Tensor, seeds: Sequence[int] | np.ndarray, patch: Shape
) -> tuple[Tensor, Tensor]:
    """Apply transforms to the samples of a batch one by one, each from a seed of its own.

    Parameters
    ----------
    images : (batch, channels, z, y, x) float32; `classes` (batch, maps, z, y, x) integers. Of two-dimensional patches
        the transforms see arrays with two axes.
    patch : the shape (z, y, x) that comes out.

    Raises
    ------
    UserError : a transform fails, or makes another shape.
    """
    parts = [_apply_to_one(transforms, *sample, patch) for sample in zip(images, classes, seeds, strict=True)]
    found = (torch.stack(part) for part in zip(*parts, strict=True))
    return next(found).to(images), next(found).to(classes)


def _apply_to_one(
    transforms: Sequence[Transform], image: Tensor, label: Tensor, seed: int, patch: Shape
) -> tuple[Tensor, Tensor]:
    """One sample, (channels, z, y, x) and (maps, z, y, x)."""
    flat = patch[0] == 1  # the transforms want (1, channels, y, x)
    arrays = {"data": image.cpu().numpy().copy(), "seg": label.cpu().numpy().astype(np.float32)}
    sample = {key: array.swapaxes(0, 1) if flat else array[None] for key, array in arrays.items()}
    with _seeded(int(seed)):
        for transform in transforms:
            sample = _called(transform, sample)
    out = [np.ascontiguousarray(sample[key].swapaxes(0, 1) if flat else sample[key][0]) for key in ("data", "seg")]
    for before, after in zip((image, label), out, strict=True):
        if after.shape != (len(before), *patch):
            what = f"the transforms make {after.shape} of {tuple(before.shape)}"
            raise UserError(f"{_KEY}: {what}", fix=f"Leave out what makes anything but {(len(before), *patch)}.")
    return torch.from_numpy(out[0]), torch.from_numpy(np.rint(out[1]))


def _called(transform: Transform, sample: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    try:
        after: dict[str, np.ndarray] = transform(**sample)
        return after
    except Exception as error:
        raise UserError(f"augmentation: {type(transform).__name__} failed: {describe(error)}") from error


@contextmanager
def _seeded(seed: int) -> Iterator[None]:
    """Python's and numpy's global random states begun from a seed, as they were afterwards; one thread at a time."""
    with _STATE:
        before = random.getstate(), np.random.get_state()
        random.seed(seed)
        np.random.seed(seed % 2**32)
        try:
            yield
        finally:
            random.setstate(before[0])
            np.random.set_state(before[1])
