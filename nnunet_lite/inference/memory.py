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
from nnunet_lite.preprocessing.pipeline import Placement, logits_orders, output_values
from nnunet_lite.preprocessing.resampling import Block, blocks
from nnunet_lite.system import FREE_SHARE, cpus, free_memory, in_units

_CUDNN_BYTES = 500_000_000  # what cuDNN may need for its fastest algorithms; an allowance, not a count
_SLAB_VALUES = {"cpu": 1 << 22, "gpu": 1 << 26}  # largest size of output slices that are computed at once
_SLAB = {"cpu": 16, "gpu": 64}  # and largest number
_PIECE = 32  # rows that a CPU resamples and decides at once


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
        return logits_orders(self.placement, self.resampling)


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
) -> list[tuple[MemoryPlan, ...]]:
    """Choose the ways that fit to predict an image, with one model or with several side by side.

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
    list of tuple of MemoryPlan
        A plan for each task, the fastest way first; the others need less memory, if there is less than expected.

    Raises
    ------
    UserError
        Nothing fits; states the smallest size that would.
    """
    device = tasks[0].window.device
    free = free_memory(), free_device_memory(device)
    limits = tuple(int(FREE_SHARE * n) if limit is None else limit for n in free)
    kind = "cpu" if device.type == "cpu" else "gpu"
    plane = max(task.window.channels * prod(task.placement.shape[1:]) for task in tasks)
    slab = int(np.clip(_SLAB_VALUES[kind] // plane, 1, _SLAB[kind]))
    options = [list(_options(task, labels, step, slab)) for task in tasks]
    host, gpu = (n // len(tasks) for n in limits)
    plans: list[tuple[MemoryPlan, ...]] = []
    for sums_device in dict.fromkeys((device, torch.device("cpu"))):  # the same for all, so that they can be compared
        fitting = [
            [o for o in found if o.sums_device == sums_device and o.host <= host and o.device <= gpu]
            for found in options
        ]
        if all(fitting):
            number = max(map(len, fitting))
            plans += [tuple(found[min(i, len(found) - 1)] for found in fitting) for i in range(number)]
    if plans:
        return plans
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
    label_map = prod(placement.geometry.shape) * output_values(labels).itemsize
    dtypes = (torch.float16,) if window.half else (torch.float32, torch.float16)
    for sums_device, dtype in itertools.product(dict.fromkeys((window.device, torch.device("cpu"))), dtypes):
        at_once = window.at_once
        while at_once:
            tiling, batch_size = window.tile(placement.shape, step, at_once)
            depth = schedule(tiling[0], parts)[1]
            sums = depth * window.channels * prod(placement.shape[1:]) * dtype.itemsize
            windows = _windows_bytes(task, at_once, tiling[0][0].size)
            slabs = _slabs_bytes(task, parts, slab, copied=dtype == torch.float16, on_cpu=sums_device.type == "cpu")
            if window.device.type == "cpu":
                host, device = label_map + sums + max(windows, slabs), 0
            elif sums_device.type == "cpu":
                host, device = label_map + sums + slabs, windows + _CUDNN_BYTES
            else:
                host, device = label_map, sums + max(windows + _CUDNN_BYTES, slabs)
            yield MemoryPlan(tiling, batch_size, depth, dtype, sums_device, slab, host, device)
            at_once //= 2


def _windows_bytes(task: PredictionTask, at_once: int, depth: int) -> int:
    """Return the bytes to compute a batch of windows, of `depth` slices, and to sum one over its mirrored copies."""
    window, voxels = task.window, 4 * prod(task.window.patch)
    of_window = voxels * (depth if len(window.patch) == 2 else 1)
    inputs, outputs = (at_once * voxels * n for n in (len(task.image), window.outputs))
    network = at_once * window.window_bytes + (outputs if len(window.networks) > 1 else 0)
    copies = outputs + (window.outputs * of_window if window.flips != ((),) else 0)
    slices = 0 if window.device.type == "cpu" else task.image[:, 0].nbytes * depth
    return slices + inputs + (window.channels - 1) * of_window + max(network, copies)


def _slabs_bytes(task: PredictionTask, parts: Sequence[Block], slab: int, copied: bool, on_cpu: bool) -> int:
    """Return the bytes to resample and decide slabs of output slices; `copied`: their inputs become float32."""
    window, (_, *plane) = task.window, task.placement.shape
    channels = window.channels if window.head is not None else window.outputs
    (_, (y0, y1), (x0, x1)) = task.placement.box
    band = max(part.high - part.low for part in parts) if copied or window.head is None else 0
    resampled = 0 if parts[0].matrix is None else slab
    logits = 0 if window.head is None else window.n_logits
    threads, rows, slices = (min(cpus(), len(parts)), _PIECE, 1) if on_cpu else (1, y1 - y0, slab)
    piece = (3 * channels + logits) * slices * rows * (x1 - x0)  # two products, and a copy for the head or the rounding
    return 4 * threads * ((band + resampled) * channels * prod(plane) + piece)
