"""Transforms of batchgenerators: the original nnU-Net's pipeline, and any others that a recipe names.

They run on the CPU, sample by sample, and draw from the global random states of Python and numpy. These are seeded for
each sample and restored afterwards, so that a sample depends on nothing but its seed.
"""

from __future__ import annotations

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

from nnunet_lite.data.geometry import Shape, triple
from nnunet_lite.errors import UserError, describe, suggest
from nnunet_lite.settings import AugmentationSettings
from nnunet_lite.training.augmentation import copy_to_device, is_in_plane, rotation, rotation_limit, source_shape

P_ELASTIC = 0.2  # nnU-Net v1's; not a setting, since the native pipeline has no elastic deformation
_KEY = "augmentation.extra"
_STATE = threading.Lock()  # for the global random states
Transform = Any  # an object of batchgenerators, called with data (1, channels, ...) and seg (1, maps, ...)


@cache
def list_transforms() -> dict[str, type]:
    """Return the transforms of batchgenerators by name, without base classes and those that combine others."""
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
    """Make the transforms of `augmentation.extra`.

    Raises
    ------
    UserError
        A name is unknown (the message has the nearest), or arguments are wrong (the message has the right ones).
    """
    transforms = []
    for entry in settings.extra:
        name, arguments = entry.get("name"), {k: _to_tuples(v) for k, v in entry.items() if k != "name"}
        kind = list_transforms().get(str(name))
        if kind is None:
            fix = suggest(str(name), sorted(list_transforms()), 0.4)
            raise UserError(f"{_KEY}: batchgenerators has no transform {name!r}", fix=fix)
        try:
            transforms.append(kind(**arguments))
        except Exception as error:
            takes = ", ".join(str(p) for p in inspect.signature(kind).parameters.values())
            raise UserError(f"{_KEY}: {name}: {error}", fix=f"It takes: {takes}.") from None
    return transforms


def _to_tuples(value: Any) -> Any:
    """Turn the lists of TOML into the tuples that batchgenerators expects."""
    return tuple(map(_to_tuples, value)) if isinstance(value, list | tuple) else value


def reference_transforms(
    settings: AugmentationSettings, patch: Shape, p_elastic: float = P_ELASTIC, order: int = 3
) -> list[Transform]:
    """Make the pipeline of the original nnU-Net up to mirroring (Isensee et al. 2018, arXiv:1809.10486; version 1).

    Elastic deformation, rotation and scaling are one interpolation of an oversized patch. All slices of an anisotropic
    patch are deformed equally.

    Parameters
    ----------
    settings : AugmentationSettings
        Probabilities and ranges.
    patch : tuple of int
        Patch size (z, y, x).
    p_elastic : float
        Probability of an elastic deformation.
    order : int
        Order of the spline interpolation of images.
    """
    s, ignored = settings, (0,) if patch[0] > 1 and is_in_plane(patch) else None
    low_resolution = {"order_downsample": 0, "order_upsample": order, "ignore_axes": ignored}
    steps: list[tuple[float, str, tuple[Any, ...], dict[str, Any]]] = [
        (s.p_noise, "GaussianNoiseTransform", (s.noise_std,), {}),
        (s.p_blur, "GaussianBlurTransform", (s.blur_sigma, True, True, 0), {"p_per_channel": 0.5}),
        (s.p_brightness, "BrightnessMultiplicativeTransform", (s.brightness,), {}),
        (s.p_contrast, "ContrastAugmentationTransform", (s.contrast,), {}),
        (s.p_low_resolution, "SimulateLowResolutionTransform", (s.low_resolution, True, 0.5), low_resolution),
        (s.p_gamma_inverted, "GammaTransform", (s.gamma, True, True), {"retain_stats": True}),
        (s.p_gamma, "GammaTransform", (s.gamma, False, True), {"retain_stats": True}),
    ]
    kinds = list_transforms()
    others = [kinds[name](*args, **more, p_per_sample=p) for p, name, args, more in steps if p > 0]
    return [_spatial_transform(settings, patch, p_elastic, order), *others]


def _spatial_transform(settings: AugmentationSettings, patch: Shape, p_elastic: float, order: int) -> Transform:
    """Deformation, rotation and scaling about the centre of the patch."""
    in_plane = is_in_plane(patch)
    angle = np.deg2rad(rotation_limit(settings, patch))
    transform = list_transforms()["SpatialTransform"](
        patch[1:] if in_plane else patch, None, True, (0.0, 200.0 if in_plane else 900.0), (9.0, 13.0),
        True, (-angle, angle), (-angle, angle), (-angle, angle), True, settings.scaling,
        border_mode_data="constant", order_data=order, order_seg=1, random_crop=False, p_el_per_sample=p_elastic,
        p_scale_per_sample=settings.p_scaling, p_rot_per_sample=settings.p_rotation,
    )  # fmt: skip

    def transform_slices(**sample: np.ndarray) -> dict[str, np.ndarray]:
        shapes = {key: array.shape[1:3] for key, array in sample.items()}
        moved = transform(**{key: array.reshape(1, -1, *array.shape[3:]) for key, array in sample.items()})
        return {key: moved[key].reshape(1, *shape, *moved[key].shape[2:]) for key, shape in shapes.items()}

    return transform_slices if in_plane and patch[0] > 1 else transform


def oversize(settings: AugmentationSettings, patch: Shape) -> Shape:
    """Return the box that contains a patch under every rotation and scaling; deformations, which add little, aside."""
    largest_angle = min(rotation_limit(settings, patch), 90.0)
    angles = [np.linspace(0, largest_angle, 4) if axis == 0 or not is_in_plane(patch) else [0.0] for axis in range(3)]
    scaling = max(settings.scaling[1], 1.0) * np.eye(3)
    if is_in_plane(patch):
        scaling[0, 0] = 1.0
    turns = (rotation(0, a) @ rotation(1, b) @ rotation(2, c) for a, b, c in itertools.product(*angles))
    return triple(np.max([patch, *(source_shape(turn @ scaling, patch) for turn in turns)], axis=0).tolist())


def apply_transforms(
    transforms: Sequence[Transform], images: Tensor, classes: Tensor, seeds: Sequence[int] | np.ndarray, patch: Shape
) -> tuple[Tensor, Tensor]:
    """Apply transforms to the samples of a batch one by one, each with a seed of its own.

    Parameters
    ----------
    transforms : sequence of Transform
        They get arrays with two axes for two-dimensional patches.
    images : Tensor, shape (batch, channels, z, y, x)
        float32.
    classes : Tensor, shape (batch, maps, z, y, x)
        Integers.
    seeds : sequence of int
        One for each sample.
    patch : tuple of int
        Shape (z, y, x) of the result.

    Raises
    ------
    UserError
        A transform fails, or returns another shape.
    """
    parts = [_apply_to_sample(transforms, *sample, patch) for sample in zip(images, classes, seeds, strict=True)]
    changed, moved = (copy_to_device(torch.stack(part), images.device) for part in zip(*parts, strict=True))
    return changed.to(images.dtype), moved.to(classes.dtype)


def _apply_to_sample(
    transforms: Sequence[Transform], image: Tensor, label: Tensor, seed: int, patch: Shape
) -> tuple[Tensor, Tensor]:
    """Transform one sample, (channels, z, y, x) and (maps, z, y, x)."""
    flat = patch[0] == 1  # the transforms expect (1, channels, y, x)
    arrays = {"data": image.cpu().numpy().copy(), "seg": label.cpu().numpy().astype(np.float32)}
    sample = {key: array.swapaxes(0, 1) if flat else array[None] for key, array in arrays.items()}
    with _seed_global_states(int(seed)):
        for transform in transforms:
            try:
                sample = transform(**sample)
            except Exception as error:
                raise UserError(f"augmentation: {type(transform).__name__} failed: {describe(error)}") from error
    out = [np.ascontiguousarray(sample[key].swapaxes(0, 1) if flat else sample[key][0]) for key in ("data", "seg")]
    for before, after in zip((image, label), out, strict=True):
        if after.shape != (len(before), *patch):
            what = f"the transforms make {after.shape} of {tuple(before.shape)}"
            raise UserError(f"{_KEY}: {what}", fix=f"Use transforms that keep the shape {(len(before), *patch)}.")
    return torch.from_numpy(out[0]), torch.from_numpy(np.rint(out[1]))


@contextmanager
def _seed_global_states(seed: int) -> Iterator[None]:
    """Seed the global random states of Python and numpy, and restore them afterwards; one thread at a time."""
    with _STATE:
        before = random.getstate(), np.random.get_state()
        random.seed(seed)
        np.random.seed(seed % 2**32)
        try:
            yield
        finally:
            random.setstate(before[0])
            np.random.set_state(before[1])
