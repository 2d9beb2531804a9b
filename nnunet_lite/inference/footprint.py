"""What a prediction will take of memory, and how much is computed and held at once so that it fits.

The image, the networks and Python itself are there already and are not counted.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from math import prod

import numpy as np
import torch

from nnunet_lite.budget import GB, cpus, free_memory
from nnunet_lite.data.labels import Labels
from nnunet_lite.data.problems import plural
from nnunet_lite.errors import UserError
from nnunet_lite.inference.passes import Passes
from nnunet_lite.inference.windows import Tiling, schedule, tile
from nnunet_lite.plan.schema import Resampling
from nnunet_lite.preprocess.decide import written_values
from nnunet_lite.preprocess.pipeline import Placement
from nnunet_lite.preprocess.resample import blocks, coarse_axis

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
        gpu = f" and {self.device / GB:.1f} GB of the GPU's" if self.device else ""
        what = f"{plural(self.batch_size, 'window')} at once, {plural(self.slab, 'slice')} written at once"
        return f"{what}, sums in {kind} on {self.where.type}: {self.host / GB:.1f} GB of memory{gpu}"


def plan_memory(
    passes: Passes, placement: Placement, labels: Labels, resampling: Resampling, step: float, most: int | None = None
) -> Footprint:
    """The fastest way to predict an image that fits.

    Parameters
    ----------
    step : distance of two windows as a share of the patch.
    most : bytes, of the machine and of the GPU each; by default 80 % of what is free.

    Raises
    ------
    UserError : nothing fits; says how much the least would need.
    """
    device, found = passes.device, None
    host_limit, device_limit = (int(SHARE * n) if most is None else most for n in (free_memory(), _free_on(device)))
    places = [device] if device.type == "cpu" else [device, torch.device("cpu")]
    kinds = (torch.float16,) if passes.half else (torch.float32, torch.float16)
    for where, dtype in itertools.product(places, kinds):
        for at_once in _halves(passes.at_once):
            found = _footprint(passes, placement, labels, resampling, step, at_once, dtype, where)
            if found.host <= host_limit and found.device <= device_limit:
                return found
    assert found is not None
    short = found.host > host_limit
    needed, limit = (found.host, host_limit) if short else (found.device, device_limit)
    raise UserError(
        f"to predict this image takes {needed / GB:.2f} GB of {'memory' if short else 'GPU memory'} at least, "
        f"{limit / GB:.2f} GB may be used",
        fix="Raise --max-memory." if most is not None else "Use a machine with more memory.",
    )


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
    passes: Passes,
    placement: Placement,
    labels: Labels,
    resampling: Resampling,
    step: float,
    at_once: int,
    dtype: torch.dtype,
    where: torch.device,
) -> Footprint:
    """Count what `at_once` windows, and sums of some type in some place, take."""
    tiling, batch_size = tiling_of(passes, placement.shape, step, at_once)
    plane = passes.held * prod(placement.shape[1:])
    slab = int(np.clip(_SLAB_VALUES // plane, 1, _SLAB))
    low, high = placement.box[0]
    parts = blocks(placement.shape[0], high - low, logits_orders(placement, resampling)[0], slab)
    depth, band = schedule(tiling.axes[0], parts)[1], max(part.high - part.low for part in parts)
    threads = cpus() if where.type == "cpu" else 1
    sums = depth * plane * dtype.itemsize + threads * (slab + band) * plane * 4

    voxels = prod(passes.patch)
    weighted = 2 * tiling.axes[0][0].size if len(passes.patch) == 2 else 2  # outputs that are flipped and weighted
    computed = at_once * passes.bytes + (at_once + weighted) * voxels * passes.outputs * 4
    host = prod(placement.geometry.shape) * written_values(labels).itemsize
    if passes.device.type == "cpu":
        return Footprint(tiling, batch_size, depth, dtype, where, slab, host + sums + computed, 0)
    on_device = computed + _CUDNN_BYTES
    host, on_device = (host + sums, on_device) if where.type == "cpu" else (host, on_device + sums)
    return Footprint(tiling, batch_size, depth, dtype, where, slab, host, on_device)


def _halves(number: int) -> list[int]:
    return [number] + (_halves(number // 2) if number > 1 else [])


def _free_on(device: torch.device) -> int:
    return torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else 0
