"""What a prediction will take of memory, and how much is computed and held at once so that it fits.

The image, the networks and Python itself are there already and are not counted.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from math import prod

import numpy as np
import torch

from nnunet_lite.data.labels import Labels
from nnunet_lite.data.problems import plural
from nnunet_lite.errors import UserError
from nnunet_lite.inference.passes import Passes
from nnunet_lite.inference.windows import Tiling, schedule, tile
from nnunet_lite.planning.schema import Resampling
from nnunet_lite.preprocessing.pipeline import Placement, output_values
from nnunet_lite.preprocessing.resampling import blocks, coarse_axis
from nnunet_lite.system import cpus, free_memory, in_units

SHARE = 0.8  # of the free memory, taken by default: the rest is for what is not counted
_CUDNN_BYTES = 500_000_000  # what cuDNN may take for its fastest algorithms; an allowance, not a count
_SLAB_VALUES, _SLAB = 1 << 22, 16  # what output slices that are made at once may hold, and their number, at most


@dataclass(frozen=True)
class Footprint:
    """What a prediction computes and holds at once, and the memory that this takes.

    Parameters
    ----------
    tiling : the windows. batch_size : windows and mirrored copies computed at once.
    depth : slices held. dtype, where : of what is held.
    slab : output slices made at once.
    host, device : bytes beside the image and the networks, of the machine and of the GPU (0 without one).
    """

    tiling: Tiling
    batch_size: int
    depth: int
    dtype: torch.dtype
    where: torch.device
    slab: int
    host: int
    device: int

    def __str__(self) -> str:
        """One line: much the same for images that are much the same."""
        kind = str(self.dtype).removeprefix("torch.")
        gpu = f" and {in_units(self.device)} of the GPU's" if self.device else ""
        what = f"{plural(self.batch_size, 'window')} at once, {plural(self.slab, 'slice')} written at once"
        return f"{what}, sums in {kind} on {self.where.type}: {in_units(self.host)} of memory{gpu}"


@dataclass(frozen=True)
class Request:
    """What is to be predicted: networks, and where the image that was preprocessed for them lies."""

    passes: Passes
    placement: Placement
    resampling: Resampling


def plan_memory(
    requests: Sequence[Request], labels: Labels, step: float, most: int | None = None
) -> tuple[Footprint, ...]:
    """The fastest way that fits to predict an image, or one image in several ways slab by slab.

    Parameters
    ----------
    step : distance of two windows as a share of the patch.
    most : bytes, of the machine and of the GPU each; by default 80 % of what is free. Each request gets an equal share.

    Raises
    ------
    UserError : nothing fits; says how much the least would need.
    """
    device = requests[0].passes.device
    limits = tuple(int(SHARE * n) if most is None else most for n in (free_memory(), _free_on(device)))
    slab = min(_slab(request) for request in requests)
    ways = [list(_ways(request, labels, step, slab)) for request in requests]
    for where in dict.fromkeys((device, torch.device("cpu"))):  # sums lie in one place, so that they can be compared
        chosen = [_first_that_fits(found, where, [n // len(requests) for n in limits]) for found in ways]
        if all(chosen):
            return tuple(footprint for footprint in chosen if footprint)
    least = [found[-1] for found in ways]
    needed = [max(footprint.host for footprint in least), max(footprint.device for footprint in least)]
    host, gpu = (len(requests) * n for n in needed)
    short, number, limit = ("memory", host, limits[0]) if host > limits[0] else ("GPU memory", gpu, limits[1])
    raise UserError(
        f"to predict this image takes {in_units(number)} of {short} at least, {in_units(limit)} may be used",
        fix="Raise --max-memory." if most is not None else "Use a machine with more memory.",
    )


def _ways(request: Request, labels: Labels, step: float, slab: int) -> Iterator[Footprint]:
    """How an image can be predicted, the fastest first and the smallest last."""
    passes = request.passes
    kinds = (torch.float16,) if passes.half else (torch.float32, torch.float16)
    for where, dtype in itertools.product(dict.fromkeys((passes.device, torch.device("cpu"))), kinds):
        for at_once in _halves(passes.at_once):
            yield _footprint(request, labels, step, at_once, dtype, where, slab)


def _first_that_fits(ways: Iterable[Footprint], where: torch.device, limits: Sequence[int]) -> Footprint | None:
    host, device = limits
    return next((w for w in ways if w.where == where and w.host <= host and w.device <= device), None)


def _slab(request: Request) -> int:
    """Output slices that are made at once."""
    return int(np.clip(_SLAB_VALUES // (request.passes.held * prod(request.placement.shape[1:])), 1, _SLAB))


def tiling_of(passes: Passes, shape: Sequence[int], step: float, at_once: int) -> tuple[Tiling, int]:
    """The windows of an image (z, y, x), and how many of them and of their copies are computed at once.

    Those of a two-dimensional network are as many slices thick, up to the whole image.
    """
    slices = min(at_once, shape[0]) if len(passes.patch) == 2 else 1
    return tile(shape, passes.patch, step, passes.flips, slices), max(1, at_once // slices)


def logits_orders(placement: Placement, resampling: Resampling) -> tuple[int, int, int]:
    """The spline order of each axis on the way back to the image's grid."""
    axis = coarse_axis(placement.new_spacing, placement.spacing, resampling.separate_z)
    z, y, x = (resampling.logits_order_z if a == axis else resampling.logits_order for a in range(3))
    return z, y, x


def _footprint(
    request: Request, labels: Labels, step: float, at_once: int, dtype: torch.dtype, where: torch.device, slab: int
) -> Footprint:
    """Count what `at_once` windows, and sums of some type in some place, take."""
    passes, placement = request.passes, request.placement
    tiling, batch_size = tiling_of(passes, placement.shape, step, at_once)
    plane = passes.held * prod(placement.shape[1:])
    low, high = placement.box[0]
    parts = blocks(placement.shape[0], high - low, logits_orders(placement, request.resampling)[0], slab)
    depth, band = schedule(tiling.axes[0], parts)[1], max(part.high - part.low for part in parts)
    threads = cpus() if where.type == "cpu" else 1
    sums = depth * plane * dtype.itemsize + threads * (slab + band) * plane * 4

    voxels = prod(passes.patch)
    weighted = 2 * tiling.axes[0][0].size if len(passes.patch) == 2 else 2  # outputs that are flipped and weighted
    computed = at_once * passes.bytes + (at_once + weighted) * voxels * passes.outputs * 4
    host = prod(placement.geometry.shape) * output_values(labels).itemsize
    if passes.device.type == "cpu":
        return Footprint(tiling, batch_size, depth, dtype, where, slab, host + sums + computed, 0)
    on_device = computed + _CUDNN_BYTES
    host, on_device = (host + sums, on_device) if where.type == "cpu" else (host, on_device + sums)
    return Footprint(tiling, batch_size, depth, dtype, where, slab, host, on_device)


def _halves(number: int) -> list[int]:
    return [number] + (_halves(number // 2) if number > 1 else [])


def _free_on(device: torch.device) -> int:
    return torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else 0
