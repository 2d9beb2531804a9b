"""Plan how much a prediction computes and keeps at once, so that it fits into memory.

The image, the networks and Python itself are in memory already and are not counted.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import prod

import numpy as np
import torch

from nnunet_lite.data.labels import Labels
from nnunet_lite.data.problems import plural
from nnunet_lite.errors import UserError
from nnunet_lite.inference.sliding_window import SlidingWindow
from nnunet_lite.inference.windows import Span, schedule
from nnunet_lite.networks.devices import free_device_memory
from nnunet_lite.planning.schema import Resampling
from nnunet_lite.preprocessing.pipeline import Placement, output_values
from nnunet_lite.preprocessing.resampling import blocks, coarse_axis
from nnunet_lite.system import cpus, free_memory, in_units

FREE_SHARE = 0.8  # of the free memory that is used by default; the rest is for what is not counted
_CUDNN_BYTES = 500_000_000  # what cuDNN may need for its fastest algorithms; an allowance, not a count
_SLAB_VALUES, _SLAB = 1 << 22, 16  # largest size of output slices that are computed at once, and largest number


@dataclass(frozen=True)
class PredictionTask:
    """An image to predict with the networks of a model.

    Parameters
    ----------
    window : SlidingWindow
        The networks.
    image : ndarray, shape (channels, z, y, x)
        Preprocessed for these networks, float32.
    placement : Placement
        Where the preprocessed array is in the original image.
    resampling : Resampling
        How logits are resampled to the original image.
    """

    window: SlidingWindow
    image: np.ndarray
    placement: Placement
    resampling: Resampling

    @property
    def orders(self) -> tuple[int, int, int]:
        """The spline order of each axis when logits are resampled to the original image."""
        axis = coarse_axis(self.placement.new_spacing, self.placement.spacing, self.resampling.separate_z)
        z, y, x = (self.resampling.logits_order_z if a == axis else self.resampling.logits_order for a in range(3))
        return z, y, x


@dataclass(frozen=True)
class MemoryPlan:
    """What a prediction computes and keeps at once, and the memory that this needs.

    Parameters
    ----------
    tiling : sequence of sequence of Span
        The windows along each axis.
    batch_size : int
        Windows and mirrored copies that are computed at once.
    depth : int
        Slices whose sums are kept.
    dtype : torch.dtype
        Type of the sums.
    sums_device : torch.device
        Where the sums are.
    slab : int
        Output slices that are computed at once.
    host, device : int
        Bytes besides the image and the networks, in memory and on the GPU (0 without one).
    """

    tiling: Sequence[Sequence[Span]]
    batch_size: int
    depth: int
    dtype: torch.dtype
    sums_device: torch.device
    slab: int
    host: int
    device: int

    def __str__(self) -> str:
        """Describe it in a line that differs little between similar images."""
        kind = str(self.dtype).removeprefix("torch.")
        gpu = f" and {in_units(self.device)} of GPU memory" if self.device else ""
        what = f"{plural(self.batch_size, 'window')} at once, {plural(self.slab, 'slice')} written at once"
        return f"{what}, sums in {kind} on {self.sums_device.type}: {in_units(self.host)} of memory{gpu}"


def plan_memory(
    tasks: Sequence[PredictionTask], labels: Labels, step: float, limit: int | None = None
) -> tuple[MemoryPlan, ...]:
    """Choose the fastest way that fits to predict an image, with one model or with several side by side.

    Parameters
    ----------
    tasks : sequence of PredictionTask
        One image, for each model. Each task gets an equal share of the memory.
    labels : Labels
        What is predicted.
    step : float
        Distance of two windows, as a share of the patch.
    limit : int, optional
        Bytes, in memory and on the GPU each; by default 80 % of what is free.

    Returns
    -------
    tuple of MemoryPlan
        One for each task.

    Raises
    ------
    UserError
        Nothing fits; states the smallest size that would.
    """
    device = tasks[0].window.device
    free = free_memory(), free_device_memory(device)
    limits = tuple(int(FREE_SHARE * n) if limit is None else limit for n in free)
    plane = max(task.window.channels * prod(task.placement.shape[1:]) for task in tasks)
    slab = int(np.clip(_SLAB_VALUES // plane, 1, _SLAB))
    options = [list(_options(task, labels, step, slab)) for task in tasks]
    host, gpu = (n // len(tasks) for n in limits)
    for sums_device in dict.fromkeys((device, torch.device("cpu"))):  # the same for all, so that they can be compared
        fitting = [
            [o for o in found if o.sums_device == sums_device and o.host <= host and o.device <= gpu]
            for found in options
        ]
        if all(fitting):
            return tuple(found[0] for found in fitting)
    smallest = [found[-1] for found in options]
    host, gpu = (len(tasks) * max(sizes) for sizes in zip(*((o.host, o.device) for o in smallest), strict=True))
    short, number, most = ("memory", host, limits[0]) if host > limits[0] else ("GPU memory", gpu, limits[1])
    raise UserError(
        f"predicting this image needs {in_units(number)} of {short} at least, {in_units(most)} may be used",
        fix="Raise --max-memory." if limit is not None else "Use a machine with more memory.",
    )


def _options(task: PredictionTask, labels: Labels, step: float, slab: int) -> Iterator[MemoryPlan]:
    """Yield the ways to predict an image with their bytes, the fastest first and the smallest last."""
    window, placement = task.window, task.placement
    low, high = placement.box[0]
    parts = blocks(placement.shape[0], high - low, task.orders[0], slab)
    band = max(part.high - part.low for part in parts)
    plane, voxels = window.channels * prod(placement.shape[1:]), prod(window.patch)
    label_map = prod(placement.geometry.shape) * output_values(labels).itemsize
    dtypes = (torch.float16,) if window.half else (torch.float32, torch.float16)
    for sums_device, dtype in itertools.product(dict.fromkeys((window.device, torch.device("cpu"))), dtypes):
        at_once = window.at_once
        while at_once:
            tiling, batch_size = window.tile(placement.shape, step, at_once)
            depth = schedule(tiling[0], parts)[1]
            threads = cpus() if sums_device.type == "cpu" else 1
            sums = depth * plane * dtype.itemsize + threads * (slab + band) * plane * 4
            weighted = 2 * tiling[0][0].size if len(window.patch) == 2 else 2  # outputs that are flipped, weighted
            computed = at_once * window.window_bytes + (at_once + weighted) * voxels * window.outputs * 4
            host, device = label_map, 0
            if window.device.type == "cpu":
                host += sums + computed
            else:
                device = computed + _CUDNN_BYTES
                host, device = (host + sums, device) if sums_device.type == "cpu" else (host, device + sums)
            yield MemoryPlan(tiling, batch_size, depth, dtype, sums_device, slab, host, device)
            at_once //= 2
