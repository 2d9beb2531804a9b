"""Streaming gives the label map that the logits of the whole image give, in memory that is known beforehand."""

from __future__ import annotations

import itertools
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from nnunet_lite.data.geometry import Geometry, Turn
from nnunet_lite.data.images import read_image
from nnunet_lite.data.labels import Labels
from nnunet_lite.errors import UserError
from nnunet_lite.inference.memory import PredictionTask, plan_memory
from nnunet_lite.inference.outputs import open_stream, predict_label_map
from nnunet_lite.inference.predictor import load
from nnunet_lite.inference.sliding_window import SlidingWindow, build_sliding_window, predict_logits
from nnunet_lite.inference.windows import LabelSwap, gaussian_weight, mirrorings, window_starts
from nnunet_lite.networks.precision import ComputeFormat
from nnunet_lite.networks.unet import UNet
from nnunet_lite.planning.schema import Configuration, Network, Resampling
from nnunet_lite.preprocessing.pipeline import Placement, preprocess, restore_segmentation

Shape = tuple[int, int, int]

CPU, FP32 = torch.device("cpu"), ComputeFormat()
ISOTROPIC, COARSE = (1.0, 1.0, 1.0), (5.0, 1.0, 1.0)
REGIONS = Labels(names={"background": 0, "all": (1, 2, 3), "core": (2, 3), "inner": 3}, region_order=(1, 2, 3))


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)  # more would only wait for each other
    yield
    torch.set_num_threads(before)


def labels_of(n: int) -> Labels:
    return Labels(names={"background": 0, **{f"label {i}": i for i in range(1, n)}})


def configured(patch: tuple[int, ...], features: tuple[int, ...] = (6, 8)) -> Configuration:
    ones, twos, threes = ((n,) * len(patch) for n in (1, 2, 3))
    network = Network(
        features=features, strides=(ones, twos), kernels=(threes, threes), blocks=(1, 1), decoder_convolutions=(1,)
    )
    size: dict[str, Any] = {"spacing": [1.0] * len(patch), "median_shape": [40.0] * len(patch)}
    return Configuration(**size, patch_size=patch, batch_size=2, network=network, batch_dice=False)


def random_networks(configuration: Configuration, n_logits: int, folds: int = 1) -> list[UNet]:
    torch.manual_seed(n_logits)
    found = [UNet(configuration.network, 1, n_logits).eval().requires_grad_(False) for _ in range(folds)]
    for network in found:
        network.heads[-1].get_parameter("bias").normal_(std=0.1)
    return found


def placed(shape: Shape, target: Shape, spacing: Sequence[float] = ISOTROPIC, order: Shape = (0, 1, 2)) -> Placement:
    """An array of some shape that stands for `target` voxels of some spacing, inside an image larger by a margin."""
    margin = 0 if order == (0, 1, 2) else 3
    z, y, x = ((margin, margin + n) for n in target)
    grid = [target[order.index(axis)] + 2 * margin for axis in range(3)]
    there = [spacing[order.index(axis)] for axis in range(3)]
    new = tuple(s * t / n for s, t, n in zip(spacing, target, shape, strict=True))
    return Placement(Geometry(tuple(grid), tuple(there)), Turn(order), (z, y, x), tuple(spacing), new, shape)


def noise(shape: Shape) -> Tensor:
    return torch.from_numpy(np.random.default_rng(0).normal(size=(1, *shape)).astype(np.float32))


def agreement(
    configuration: Configuration,
    place: Placement,
    labels: Labels,
    how: dict[str, Any] | None = None,
    folds: int = 1,
    dtype: torch.dtype | None = None,
    **more: Any,
) -> float:
    """The share of voxels that streaming and whole-volume prediction agree on."""
    networks, image = random_networks(configuration, labels.n_channels, folds), noise(place.shape)
    resampling = Resampling(**(how or {}))
    passes, whole = (
        build_sliding_window(networks, configuration, labels.n_channels, FP32, CPU, whole=whole, **more)
        for whole in (False, True)
    )
    expected = restore_segmentation(predict_logits(whole, image), place, labels, resampling)
    assert len(np.unique(expected)) > 2
    (footprint,) = plan_memory([request := PredictionTask(passes, image, place, resampling)], labels, 0.5)
    if dtype is not None:
        footprint = replace(footprint, dtype=dtype)
    found = predict_label_map(open_stream(request, footprint), place, labels)
    assert found.shape == place.geometry.shape and found.dtype == expected.dtype
    return float((found == expected).mean())


@pytest.mark.parametrize(
    ("shape", "target"),
    [
        ((37, 20, 22), (60, 31, 41)),  # to a finer grid
        ((37, 20, 22), (19, 13, 15)),  # to a coarser one
        ((50, 17, 20), (50, 17, 20)),
        ((9, 30, 12), (23, 25, 12)),  # smaller than the patch, and not resampled along one axis
        ((1, 24, 24), (1, 30, 30)),  # a single slice
        ((50, 16, 16), (3, 16, 16)),  # slices that nothing needs
    ],
)
@pytest.mark.parametrize("labels", [labels_of(4), REGIONS, labels_of(20)])
def test_streaming_equals_the_whole(shape: Shape, target: Shape, labels: Labels) -> None:
    assert agreement(configured((16, 16, 16)), placed(shape, target), labels) > 0.9999


@pytest.mark.parametrize("spacing", [COARSE, (1.0, 5.0, 1.0), (1.0, 1.0, 5.0)])
@pytest.mark.parametrize("how", [{}, {"logits_order_z": 1}, {"separate_z": False}, {"logits_order": 3}])
def test_coarse_axes_and_other_orders(spacing: tuple[float, float, float], how: dict[str, Any]) -> None:
    place = placed((24, 21, 19), (40, 33, 30), spacing)
    assert agreement(configured((8, 16, 16)), place, labels_of(4), how) > 0.9999


@pytest.mark.parametrize("order", [2, 3, 5])
def test_splines_that_reach_far_along_the_first_axis(order: int) -> None:
    place = placed((90, 12, 13), (131, 17, 12))
    assert agreement(configured((8, 16, 16)), place, labels_of(3), {"logits_order": order}) > 0.9999


@pytest.mark.parametrize(("n_classes", "at_once"), [(3, 1), (3, 100), (20, 4)])
def test_two_dimensions(n_classes: int, at_once: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("nnunet_lite.inference.sliding_window._windows_at_once", lambda *_: at_once)
    place = placed((7, 25, 30), (7, 31, 23), COARSE)
    assert agreement(configured((16, 24)), place, labels_of(n_classes), mirror_axes=(0, 1)) > 0.9999


def test_axes_are_put_back_and_the_margin_is_background() -> None:
    place = placed((20, 18, 22), (25, 30, 20), order=(2, 0, 1))
    assert agreement(configured((16, 16, 16)), place, labels_of(4)) > 0.9999
    assert agreement(configured((16, 16, 16)), place, labels_of(20), mirror_axes=(0, 2), folds=2) > 0.9999


@pytest.mark.parametrize("n_classes", [4, 40])
def test_sides_that_change_places(n_classes: int) -> None:
    """With more classes than features, the features of swapped copies are held apart."""
    more: dict[str, Any] = {"mirror_axes": (1, 2), "swap": LabelSwap(2, (0, 2, 1, *range(3, n_classes)))}
    place = placed((20, 18, 22), (25, 30, 20))
    assert agreement(configured((16, 16, 16)), place, labels_of(n_classes), folds=2, **more) > 0.9999


@pytest.mark.parametrize("n_classes", [4, 20])
def test_float16_where_memory_is_short(n_classes: int) -> None:
    place = placed((37, 20, 22), (60, 31, 41))
    found = agreement(configured((16, 16, 16)), place, labels_of(n_classes), dtype=torch.float16)
    assert 0.995 < found < 1, "of a random network, which is sure of nothing"


def test_of_many_classes_features_are_held() -> None:
    configuration = configured((16, 16, 16))
    for n_classes, folds, sides, held in [
        (7, 1, None, 8),
        (8, 1, None, 7),
        (20, 3, None, 19),
        (20, 2, LabelSwap(2, (1,)), 21),
    ]:
        networks = random_networks(configuration, n_classes, folds)
        passes = build_sliding_window(networks, configuration, n_classes, FP32, CPU, mirror_axes=(2,), swap=sides)
        assert passes.channels == held


@pytest.mark.parametrize("shape", [(20, 21, 22), (5, 20, 9), (8, 8, 8)])
@pytest.mark.parametrize(
    "more", [{}, {"flips": tuple(mirrorings((0, 1, 2)))}, {"step": 1.0}, {"step": 0.3, "at_once": 5}]
)
def test_the_identity_returns_the_image(shape: Shape, more: dict[str, Any]) -> None:
    image, step = torch.randn(3, *shape), more.get("step", 0.5)
    passes = seeing(lambda x: x, (8, 8, 8), 3, **{k: v for k, v in more.items() if k != "step"})
    torch.testing.assert_close(predict_logits(passes, image, step), image, atol=1e-5, rtol=1e-5)


def seeing(forward: Callable[[Tensor], Tensor], patch: Shape, outputs: int, **more: Any) -> SlidingWindow:
    how: dict[str, Any] = {"flips": ((),), "at_once": 1} | more
    return SlidingWindow(forward=forward, outputs=outputs, patch=patch, device=CPU, window_bytes=0, **how)


def of_position(x: Tensor) -> Tensor:
    """A network that depends on where in its window a voxel is, hence on every weight and flip."""
    ramp = torch.arange(x.shape[2], dtype=torch.float32).reshape(-1, 1, 1)
    return torch.cat([x.cumsum(2), x * ramp], 1)


def one_by_one(image: Tensor, patch: Shape, flips: Sequence[tuple[int, ...]], half: bool) -> Tensor:
    """The weighted mean over windows, all of it at once: in float64, or as nnU-Net does in float16."""
    kind = torch.float16 if half else torch.float64
    weight = torch.from_numpy(gaussian_weight(patch, half)).to(kind)
    total, weights = torch.zeros(2, *image.shape[1:], dtype=kind), torch.zeros(image.shape[1:], dtype=kind)
    starts = [window_starts(size, p, 0.5) for size, p in zip(image.shape[1:], patch, strict=True)]
    for corner in itertools.product(*starts):
        place = tuple(slice(c, c + p) for c, p in zip(corner, patch, strict=True))
        window, said = image[None, :, *place], torch.zeros(2, *patch)
        for flip in flips:
            axes = [axis + 2 for axis in flip]
            said += of_position(window.flip(axes)).flip(axes)[0]
        total[:, *place] += said / len(flips) * weight
        weights[place] += weight
    return (total / weights).float()


@pytest.mark.parametrize("at_once", [1, 3, 7, 1000])
@pytest.mark.parametrize("flips", [mirrorings(()), mirrorings((0, 2))])
def test_overlapping_windows_and_copies_are_averaged(at_once: int, flips: list[tuple[int, ...]]) -> None:
    image, patch = torch.randn(1, 20, 10, 9), (8, 8, 8)
    more: dict[str, Any] = {"flips": tuple(flips), "at_once": at_once}
    found = predict_logits(seeing(of_position, patch, 2, **more), image)
    torch.testing.assert_close(found, one_by_one(image, patch, flips, half=False), atol=1e-4, rtol=1e-5)
    rounded = predict_logits(seeing(of_position, patch, 2, half=True, **more), image)
    assert torch.equal(rounded, one_by_one(image, patch, flips, half=True))


def test_trained_networks(tiny_model: Path, hippocampus: Path) -> None:
    changes = {"inference.mirroring": False, "inference.precision": "fp32"}
    model = load(tiny_model, device="cpu", settings=changes)
    labels, how = model.plan.labels, model.configuration.resampling
    for scan, spacing in zip(sorted((hippocampus / "imagesTs").iterdir()), [ISOTROPIC, (1.2, 0.7, 0.9)], strict=False):
        image = read_image(scan)
        image = replace(image, geometry=replace(image.geometry, spacing=spacing))
        ready = preprocess(image, None, model.plan, model.configuration)
        passes = build_sliding_window(model.networks, model.configuration, labels.n_channels, model.arithmetic, CPU)
        shown = torch.from_numpy(ready.image)
        expected = restore_segmentation(predict_logits(passes, shown), ready.placement, labels, how)
        request = PredictionTask(passes, shown, ready.placement, how)
        (footprint,) = plan_memory([request], labels, 0.5)
        found = predict_label_map(open_stream(request, footprint), ready.placement, labels)
        assert len(np.unique(found)) > 1
        assert (found == expected).mean() > 0.9999


def test_windows_of_nothing_may_be_left_out() -> None:
    configuration, place = configured((8, 8, 8)), placed((40, 12, 12), (50, 12, 12))
    image = noise(place.shape)
    image[:, 12:] = 0
    for n_classes in (4, 20):
        seen: list[int] = []
        passes = build_sliding_window(random_networks(configuration, n_classes), configuration, n_classes, FP32, CPU)

        def counted(x: Tensor, forward: Callable[[Tensor], Tensor] = passes.forward, seen: list[int] = seen) -> Tensor:
            seen.append(len(x))
            return forward(x)

        passes, labels = replace(passes, forward=counted), labels_of(n_classes)
        request = PredictionTask(passes, image, place, Resampling())
        (footprint,) = plan_memory([request], labels, 0.5)
        full, less = (
            predict_label_map(open_stream(request, footprint, skip_empty=skip), place, labels) for skip in (False, True)
        )
        assert sum(seen) == 9 * 4 + 3 * 4, "two windows reach slices 8 to 12, and none those from 16 on"
        assert np.array_equal(less[:9], full[:9])
        assert not less[26:].any() and full[26:].any()


def test_what_fits_is_found_and_what_does_not_is_refused() -> None:
    place, labels, how = placed((100, 60, 60), (200, 120, 120)), labels_of(20), Resampling()
    configuration = configured((32, 32, 32))
    passes = build_sliding_window(random_networks(configuration, 20), configuration, 20, FP32, CPU)
    request = PredictionTask(passes, noise(place.shape), place, how)
    (roomy,) = plan_memory([request], labels, 0.5)
    assert (roomy.batch_size, roomy.dtype) == (passes.at_once, torch.float32)
    found, limit = [roomy], roomy.host
    with pytest.raises(UserError, match=r"needs [\d.]+ MB of memory at least, [\d.]+ MB may be used\. Raise --max-mem"):
        while limit := int(0.98 * limit):
            found += plan_memory([request], labels, 0.5, limit)
            assert found[-1].host <= limit
    assert (found[-1].batch_size, found[-1].dtype) == (1, torch.float16)
    assert {plan.batch_size for plan in found} == {8, 4, 2, 1}


MEASURED = """
import os
import torch
from test_streaming import CPU, FP32, configured, labels_of, placed, random_networks
from nnunet_lite.inference.memory import PredictionTask, plan_memory
from nnunet_lite.inference.sliding_window import build_sliding_window
from nnunet_lite.inference.outputs import open_stream, predict_label_map
from nnunet_lite.planning.schema import Resampling

def peak():
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmHWM")) * 1024

os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
torch.set_num_threads(1)
configuration, labels = configured((32, 48, 48), (8, 8)), labels_of(40)
passes = build_sliding_window(random_networks(configuration, 40), configuration, 40, FP32, CPU)
for slices in (64, 64, 128, 512):
    place = placed((slices, 96, 96), (slices * 3 // 2, 144, 144))
    image = torch.zeros(1, slices, 96, 96).normal_()
    request = PredictionTask(passes, image, place, Resampling())
    (footprint,) = plan_memory([request], labels, 1.0)
    before = peak()
    out = predict_label_map(open_stream(request, footprint), place, labels)
    print(peak() - before, footprint.host, image.nbytes + out.nbytes)
"""


def test_memory_is_as_predicted_and_does_not_grow_with_the_image() -> None:
    command = [sys.executable, "-c", MEASURED]
    done = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True, check=True)
    first, again, double, long = ([int(n) for n in line.split()] for line in done.stdout.splitlines())
    assert first[0] < 1.25 * first[1], "memory that the first prediction takes, and what was predicted"
    for grown, _, given in (again, double, long):
        assert grown < given + 0.15 * first[0], "beside the image and the label map nothing grows"
