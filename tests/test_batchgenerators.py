"""batchgenerators' transforms are found, checked and seeded; its pipeline and ours agree in distribution."""

from __future__ import annotations

import random
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
import torch
from scipy.stats import ks_2samp
from torch import Tensor

from nnunet_lite.errors import UserError
from nnunet_lite.settings import AugmentationSettings
from nnunet_lite.training.augmentation import (
    Shape,
    apply_intensity,
    copy_parameters,
    draw_intensity,
    draw_matrix,
    rotation,
    source_shape,
    warp_samples,
)
from nnunet_lite.training.batchgenerators import (
    apply_transforms,
    extra_transforms,
    list_transforms,
    oversize,
    reference_transforms,
)
from nnunet_lite.training.dataloader import Location, draw_locations, enlarge, read_patches, rng_for

CPU = torch.device("cpu")
PATCH = (24, 32, 24)


def extra(*entries: dict[str, Any]) -> AugmentationSettings:
    return AugmentationSettings(extra=entries)


def test_transforms_are_found_by_name_and_take_their_arguments() -> None:
    assert {"RicianNoiseTransform", "SpatialTransform", "BrightnessGradientAdditiveTransform"} <= set(list_transforms())
    others = {"AbstractTransform", "LocalTransform", "Compose", "OneOfTransform", "ColorFunctionExtractor"}
    assert not others & set(list_transforms())
    arguments = {"rectangle_size": [3, 4, 5], "rectangle_value": 7, "num_rectangles": 2}
    (blank,) = extra_transforms(extra({"name": "BlankRectangleTransform", **arguments}))
    assert (blank.rectangle_size, blank.num_rectangles) == ((3, 4, 5), 2)


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ({"name": "RicianNoise"}, "no transform 'RicianNoise'. Did you mean 'RicianNoiseTransform'"),
        ({"p": 1}, "no transform None"),
        ({"name": "RicianNoiseTransform", "p": 1}, "unexpected keyword argument 'p'. It takes: .*p_per_sample=1"),
        ({"name": "BlankRectangleTransform"}, "missing .* 'rectangle_size'.* It takes: rectangle_size"),
    ],
)
def test_mistakes_are_reported_with_what_would_be_right(entry: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        extra_transforms(extra(entry))


def test_a_transform_that_fails_or_changes_the_shape_is_named() -> None:
    images, classes = torch.zeros(1, 1, 8, 8, 8), torch.zeros(1, 1, 8, 8, 8, dtype=torch.uint8)
    wrong = {"name": "BrightnessTransform", "mu": "a", "sigma": 1}
    with pytest.raises(UserError, match="augmentation: BrightnessTransform failed"):
        apply_transforms(extra_transforms(extra(wrong)), images, classes, [1], (8, 8, 8))
    smaller = {"name": "CenterCropTransform", "crop_size": [4, 4, 4]}
    with pytest.raises(UserError, match=r"make \(1, 4, 4, 4\) of \(1, 8, 8, 8\).* keep the shape \(1, 8, 8, 8\)"):
        apply_transforms(extra_transforms(extra(smaller)), images, classes, [1], (8, 8, 8))


@pytest.mark.parametrize("patch", [(6, 7, 8), (1, 7, 8)])
def test_samples_depend_on_their_seeds_and_global_states_stay(patch: Shape) -> None:
    images, classes = torch.rand(3, 2, *patch), torch.randint(0, 3, (3, 1, *patch), dtype=torch.uint8)
    noise = [{"name": f"{kind}NoiseTransform"} for kind in ("Rician", "Gaussian")]
    transforms = extra_transforms(extra(*noise, {"name": "MirrorTransform", "axes": [0, 1]}))
    random.seed(1), np.random.seed(1)
    expected = random.random(), np.random.random()
    random.seed(1), np.random.seed(1)
    noisy, moved = apply_transforms(transforms, images, classes, [11, 12, 2**61], patch)
    assert (random.random(), np.random.random()) == expected
    assert (noisy.shape, noisy.dtype, moved.dtype) == (images.shape, torch.float32, torch.uint8)
    assert (noisy != images).any()
    again = apply_transforms(transforms, images[1:], classes[1:], [12, 2**61], patch)
    assert torch.equal(again[0], noisy[1:]) and torch.equal(again[1], moved[1:])


def test_threads_do_not_share_the_global_states() -> None:
    images, classes = torch.zeros(2, 1, 16, 16, 16), torch.zeros(2, 1, 16, 16, 16, dtype=torch.uint8)
    transforms = extra_transforms(extra(*[{"name": "GaussianNoiseTransform"}] * 3))

    def made(seed: int) -> Tensor:
        return apply_transforms(transforms, images, classes, [seed, seed + 1], (16, 16, 16))[0]

    with ThreadPoolExecutor(4) as pool:
        for seed, found in enumerate(pool.map(made, range(16))):
            assert torch.equal(found, made(seed))


@pytest.mark.parametrize("patch", [(24, 32, 24), (4, 32, 24), (1, 40, 24)])
def test_an_oversized_patch_holds_every_rotation(patch: Shape) -> None:
    settings = AugmentationSettings(rotation=15, scaling=(0.85, 1.25))
    wide = oversize(settings, patch)
    assert all((w - p) % 2 == 0 for w, p in zip(wide, patch, strict=True))
    for i in range(200):
        matrix = draw_matrix(rng_for(0, 0, i), settings, patch)
        if matrix is not None:
            assert all(s <= w + 1 for s, w in zip(source_shape(matrix, patch), wide, strict=True))
    assert oversize(AugmentationSettings(rotation=0, scaling=(0.9, 1.0)), patch)[0] == patch[0]
    turned = source_shape(rotation(0, 15) * 1.25, patch)[1:]
    assert all(w >= t for w, t in zip(wide[1:], turned, strict=True))


def statistics(images: Tensor, classes: Tensor) -> np.ndarray:
    """(samples, numbers): mean, log of variance, skewness, logs of the radial power spectrum and of label volumes."""
    x = images[:, 0].double()
    centred = x - x.mean((1, 2, 3), keepdim=True)
    skewness = (centred / x.std((1, 2, 3), keepdim=True)).pow(3).mean((1, 2, 3))
    power = torch.fft.fftn(centred, dim=(1, 2, 3)).abs().square().flatten(1)
    axes = [torch.fft.fftfreq(n) for n in x.shape[1:]]
    radius = torch.stack(torch.meshgrid(*axes, indexing="ij")).square().sum(0).sqrt().flatten()
    bins = torch.bucketize(radius, torch.linspace(0.06, 0.5, 8))
    spectrum = torch.stack([power[:, bins == b].mean(1) for b in range(8)], 1)
    volumes = torch.stack([(classes[:, 0] == c).sum((1, 2, 3)) for c in (1, 2)], 1)
    moments = torch.stack([x.mean((1, 2, 3)), x.var((1, 2, 3)).log(), skewness], 1)
    return torch.cat([moments, spectrum.log(), (volumes + 50).log()], 1).numpy()


INTENSITY = ("noise", "blur", "brightness", "contrast", "low_resolution", "gamma", "gamma_inverted")
CHANCES = (*INTENSITY, "rotation", "scaling")


@pytest.mark.parametrize(
    ("patch", "which"),
    [
        *((PATCH, (name,)) for name in ("rotation", "scaling", "low_resolution", "gamma_inverted")),
        *((PATCH, names) for names in (("noise", "blur"), ("brightness", "contrast"))),
        *((patch, CHANCES) for patch in (PATCH, (8, 32, 28), (1, 40, 32))),
    ],
)
def test_both_pipelines_agree_in_distribution(tiny_cases: list[Any], patch: Shape, which: tuple[str, ...]) -> None:
    """What augmentation changes in real patches, with equal settings of both: no deformation, linear interpolation.

    Over many samples, means differ by what chance explains (4 standard errors) and a percent for blur, which treats
    the border otherwise; distributions are not distinguished by a test of Kolmogorov and Smirnov.
    """
    chances: dict[str, Any] = {f"p_{name}": float(name in which) if len(which) < 3 else 0.5 for name in CHANCES}
    settings = AugmentationSettings(**chances, scaling=(0.75, 1.25))  # about one: v1 shrinks half of the samples
    n, rng = 80, rng_for(1, 2, 3)
    places = draw_locations(tiny_cases, patch, n, 0.5, None, rng)
    before = statistics(*read_patches(tiny_cases, places, patch, CPU))

    matrices = [draw_matrix(rng, settings, patch) for _ in range(n)]
    whole = [m if m is not None else np.eye(3) for m in matrices]
    images, classes = read_patches(
        tiny_cases, [Location(p.case, p.corner, m) for p, m in zip(places, whole, strict=True)], patch, CPU
    )
    images, classes = warp_samples(images, classes, *copy_parameters([np.stack(whole)], CPU), patch)
    ours = statistics(apply_intensity(images, draw_intensity(rng, settings, n, 1)), classes) - before

    wide = oversize(settings, patch)
    images, classes = read_patches(tiny_cases, [enlarge(p, patch, wide) for p in places], wide, CPU)
    transforms = reference_transforms(settings, patch, p_elastic=0, order=1)
    images, classes = apply_transforms(transforms, images, classes, range(n), patch)
    theirs = statistics(images, classes) - before

    error = np.sqrt((ours.var(0) + theirs.var(0)) / n)
    apart = np.abs(ours.mean(0) - theirs.mean(0))
    assert (apart < 4 * error + 0.01).all(), np.round(apart / (error + 1e-9), 1)
    pairs = zip(np.round(ours.T, 2), np.round(theirs.T, 2), strict=True)  # what differs by less does not differ
    assert min(ks_2samp(a, b, method="asymp").pvalue for a, b in pairs) > 1e-4
    assert ours.std(0).max() > 0.05, "something was changed"
