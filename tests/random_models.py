"""Networks with random weights, and images for them: what the tests of sliding windows and of label maps share."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from nnunet_lite.data.geometry import Geometry, Turn
from nnunet_lite.data.labels import Labels
from nnunet_lite.inference.predictor import Predictor, _make_tasks
from nnunet_lite.inference.sliding_window import SlidingWindow, average_windows
from nnunet_lite.inference.windows import schedule
from nnunet_lite.networks.precision import ComputeFormat
from nnunet_lite.networks.unet import UNet
from nnunet_lite.planning.schema import Configuration, Network
from nnunet_lite.preprocessing.pipeline import Placement, Preprocessed
from nnunet_lite.preprocessing.resampling import blocks

Shape = tuple[int, int, int]

CPU, FP32 = torch.device("cpu"), ComputeFormat()
REGIONS = Labels(names={"background": 0, "all": (1, 2, 3), "core": (2, 3), "inner": 3}, region_order=(1, 2, 3))


def labels_of(n: int) -> Labels:
    return Labels(names={"background": 0, **{f"label {i}": i for i in range(1, n)}})


def planned(patch: tuple[int, ...], features: tuple[int, ...] = (6, 8)) -> Configuration:
    ones, twos, threes = ((n,) * len(patch) for n in (1, 2, 3))
    network = Network(
        features=features, strides=(ones, twos), kernels=(threes, threes), blocks=(1, 1), decoder_convolutions=(1,)
    )
    size: dict[str, Any] = {"spacing": [1.0] * len(patch), "median_shape": [40.0] * len(patch)}
    return Configuration(**size, patch_size=patch, batch_size=2, network=network, batch_dice=False)


def random_networks(configuration: Configuration, n_logits: int, folds: int = 1) -> list[UNet]:
    torch.manual_seed(n_logits)
    networks = [UNet(configuration.network, 1, n_logits).eval().requires_grad_(False) for _ in range(folds)]
    for network in networks:
        network.heads[-1].get_parameter("bias").normal_(std=0.1)
    return networks


def placed(
    shape: Shape, target: Shape, spacing: Sequence[float] = (1.0, 1.0, 1.0), order: Shape = (0, 1, 2)
) -> Placement:
    """An array of `shape` that shows `target` voxels of an image; with another order, the image has a margin."""
    margin = 0 if order == (0, 1, 2) else 3
    z, y, x = ((margin, margin + n) for n in target)
    grid = [target[order.index(axis)] + 2 * margin for axis in range(3)]
    own = [spacing[order.index(axis)] for axis in range(3)]
    new = tuple(s * t / n for s, t, n in zip(spacing, target, shape, strict=True))
    return Placement(Geometry(tuple(grid), tuple(own)), Turn(order), (z, y, x), tuple(spacing), new, shape)


def noise(shape: Sequence[int], channels: int = 1) -> np.ndarray:
    return np.random.default_rng(0).normal(size=(channels, *shape)).astype(np.float32)


class Function(nn.Module):
    """A function as a network: a sliding window computes its logits, and does not take its last layer apart."""

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)


def sliding(
    networks: Sequence[nn.Module], configuration: Configuration, n_logits: int, **options: Any
) -> SlidingWindow:
    return SlidingWindow(tuple(networks), configuration, n_logits, FP32, CPU, **options)


def predict_logits(window: SlidingWindow, image: np.ndarray, step: float = 0.5) -> Tensor:
    """The logits (logits, z, y, x) of a whole preprocessed image, by the same windows and without a head."""
    window = replace(window, networks=tuple(map(Function, window.networks)))
    depth, *plane = image.shape[1:]
    tiling, batch_size = window.tile(image.shape[1:], step, window.at_once)
    parts = blocks(depth, depth, 1, 16)
    out = torch.empty(window.n_logits, depth, *plane)
    sums = torch.empty(schedule(tiling[0], parts)[1], window.channels, *plane, dtype=window.sums)
    for finished, _ in average_windows(window, image, tiling, parts, sums, batch_size):
        for part in finished:
            out[:, part.start : part.stop] = sums[part.low : part.high, :-1].transpose(0, 1)
    return out


def predict_preprocessed(model: Predictor, image: np.ndarray, stage_classes: np.ndarray | None = None) -> Tensor:
    """The same of a predictor, without its first stage and its partners."""
    shape = image.shape[1:]
    array = Preprocessed(image, None, placed(shape, shape))  # type: ignore[arg-type]
    (task,) = _make_tasks(model, array, stage_classes, by_fold=False)
    return predict_logits(task.window, task.image, model.settings.step_size)
