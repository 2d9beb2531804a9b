"""Turn an image into the array that a network sees, and the network's output back into a label map.

Forwards, as in nnU-Net: reorder the axes, crop to the nonzero region, normalise, resample. `prepare` does the part that
all configurations share, `resample` the rest, `preprocess_image` both. Backwards, `restore_segmentation` undoes each
step; `decode_logits` chooses the label of each voxel.

Axes are (z, y, x) as in the file, or *transposed*: turned to the plan's orientation, then in its axis order. Spacings
are mm in the same order.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
from pydantic import TypeAdapter

from nnunet_lite.data.geometry import (
    Box,
    Geometry,
    Shape,
    Spacing,
    Turn,
    bounding_box,
    in_brackets,
    nonzero_box,
    nonzero_mask,
    slices,
    triple,
    turn_between,
)
from nnunet_lite.data.images import Image
from nnunet_lite.data.labels import Labels, smallest_dtype
from nnunet_lite.data.problems import plural
from nnunet_lite.errors import UserError
from nnunet_lite.planning.schema import Configuration, Plan, Resampling
from nnunet_lite.preprocessing.normalization import normalize
from nnunet_lite.preprocessing.resampling import (
    Block,
    coarse_axis,
    operators,
    resample_image,
    resample_labels,
    resampled_rows,
    run_in_threads,
)
from nnunet_lite.system import free_memory

if TYPE_CHECKING:
    import torch


_SAME_SPACING = 1e-5  # relative; spacings this close give the same shape, so nothing is resampled
_DECODED = 1 << 14  # voxels decoded at once on a CPU: their logits stay in its cache
_SPLIT = 2**13 + 1  # leaves 11 bits of a float32's 24, as many as a float16 has
_ALWAYS_FREE = 1 << 28  # bytes; to ask for the free memory takes as long as to resample a small case
_SLAB_VALUES = 1 << 24  # logits per slab of the way back: 64 MiB of float32 for each thread


@dataclass(frozen=True)
class Placement:
    """Where a preprocessed array is in its image: all that the way back needs.

    Parameters
    ----------
    geometry : Geometry
        Grid of the image, axes as in the file.
    turn : Turn
        From the axes of the file to transposed ones.
    box : tuple of tuple of int
        Half-open box of the nonzero region in voxels of the image, transposed axes.
    spacing, new_spacing : tuple of float
        mm, transposed axes, of the image and of the preprocessed array.
    shape : tuple of int
        Voxels of the preprocessed array, transposed axes.
    """

    geometry: Geometry
    turn: Turn
    box: Box
    spacing: Spacing
    new_spacing: Spacing
    shape: Shape

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> Placement:
        """Read what `dataclasses.asdict` makes of a placement; an earlier nnlite spread the fields of `turn`."""
        if "turn" not in value:
            turn = {"order": value["axis_order"], "reversed": value.get("reversed", (False, False, False))}
            value = {**value, "turn": turn}
        return _PLACEMENT.validate_python(value)

    def on_grid(self, second: Placement) -> Placement:
        """Return the placement of this array in another array of the same image, as if that were the image.

        As in nnU-Net, the spacing of this array alone then decides whether slices are resampled one by one.

        Raises
        ------
        UserError
            The arrays do not show the same box of the image in the same orientation.
        """
        if (self.turn, self.box) != (second.turn, second.box):
            raise UserError("two models turn or crop this image differently", fix="Train both again.")
        z, y, x = second.shape
        grid = Geometry(second.shape, second.new_spacing)
        return Placement(grid, Turn(), ((0, z), (0, y), (0, x)), self.new_spacing, self.new_spacing, self.shape)


_PLACEMENT = TypeAdapter(Placement)


@dataclass(frozen=True)
class Preprocessed:
    """A case as the network sees it, transposed axes; what `prepare` returns is not resampled yet.

    Parameters
    ----------
    image : ndarray, shape (channels, z, y, x)
        float32.
    classes : ndarray or None, shape (z, y, x)
        None for an image that is predicted. Where a channel is normalised inside the nonzero mask, background outside
        of that mask has the class `Labels.outside_class`.
    placement : Placement
        Where the array is in its image.
    """

    image: np.ndarray
    classes: np.ndarray | None
    placement: Placement


def preprocess_image(
    image: Image, classes: np.ndarray | None, plan: Plan, configuration: Configuration
) -> Preprocessed:
    """Turn image and classes into what the network of a configuration sees.

    Parameters
    ----------
    image : Image
        As read.
    classes : ndarray or None, shape (z, y, x)
        Classes, see `Labels.encode`.
    plan : Plan
        Axis order, normalisation and labels.
    configuration : Configuration
        Spacing and resampling.

    Returns
    -------
    Preprocessed
        The arrays.

    Raises
    ------
    UserError
        The image does not fit the plan's channels.
    """
    return resample(prepare(image, classes, plan), configuration)


def prepare(image: Image, classes: np.ndarray | None, plan: Plan) -> Preprocessed:
    """Transpose, crop to the nonzero region and normalise. Parameters are those of `preprocess_image`.

    Raises
    ------
    UserError
        The image does not fit the plan's channels, or has voxels that are NaN, infinite or beyond float32.
    """
    _require_finite_voxels(image, plan)
    turn = turn_for(plan, image.geometry.orientation)
    array = turn.apply(image.array)
    mask = nonzero_mask(array) if any(channel.use_mask for channel in plan.channels) else None
    box = nonzero_box(array) if mask is None else bounding_box(mask)
    inside = slices(box)
    array = np.array(array[:, *inside], np.float32, order="C")
    if classes is not None:
        classes = np.ascontiguousarray(turn.apply(classes)[inside])
    counted = None
    if mask is not None:  # as in nnU-Net, annotated voxels count even if zero
        counted = mask[inside] if classes is None else mask[inside] | (classes != 0)
    if counted is not None and classes is not None:
        outside = plan.labels.outside_class
        classes = np.where(counted, classes, np.min_scalar_type(outside).type(outside))
    normalize(array, plan.channels, counted)
    spacing = transposed(image.geometry.spacing, turn.order)
    return Preprocessed(array, classes, Placement(image.geometry, turn, box, spacing, spacing, array.shape[1:]))


def _require_finite_voxels(image: Image, plan: Plan) -> None:
    for channel, values in zip(plan.channels, image.array, strict=False):  # `normalize` counts them
        # integers are finite, and the sum of finite floats is finite unless it overflows
        wide = values.dtype.itemsize > 4
        if values.dtype.kind == "f" and (wide or not np.isfinite(values.sum(dtype=np.float64))):
            with np.errstate(over="ignore"):
                wrong = int(values.size - np.count_nonzero(np.isfinite(values.astype(np.float32))))
            if wrong:
                what = f"NaN or infinite{', as float32' * wide}: {plural(wrong, 'voxel')} of channel {channel.name}"
                raise UserError(what, fix="Replace them, for example by 0, or export the image again.")


def turn_for(plan: Plan, orientation: str | None) -> Turn:
    """Return how an image of an orientation, such as "LAS", is turned to a plan's orientation and axis order."""
    return turn_between(orientation, plan.orientation).then(plan.axis_order)


def resample(case: Preprocessed, configuration: Configuration, threads: int | None = None) -> Preprocessed:
    """Resample a prepared case to the spacing of a configuration.

    Parameters
    ----------
    case : Preprocessed
        What `prepare` returned.
    configuration : Configuration
        Spacing and resampling.
    threads : int, optional
        None for one per CPU.

    Returns
    -------
    Preprocessed
        The arrays.

    Raises
    ------
    UserError
        They do not fit into memory.
    """
    spacing, orders, classes = case.placement.spacing, configuration.resampling, case.classes
    target = resampled_spacing(configuration, spacing)
    shape = resampled_shape(case.placement.shape, spacing, target)
    needed = 4 * len(case.image) * math.prod(shape)
    if needed > _ALWAYS_FREE and needed > free_memory():
        what = f"at {in_brackets(target)} mm it has {' x '.join(map(str, shape))} voxels, more than fit into memory"
        raise UserError(what, fix=f"Is the size of its voxels right, {in_brackets(spacing)} mm?")
    how = (shape, spacing, target)
    image = resample_image(case.image, *how, orders.image_order, orders.image_order_z, orders.separate_z, threads)
    if classes is not None:
        classes = resample_labels(classes, *how, orders.label_order, orders.label_order_z, orders.separate_z, threads)
    return Preprocessed(image, classes, replace(case.placement, new_spacing=target, shape=shape))


def resampled_spacing(configuration: Configuration, spacing: Spacing) -> Spacing:
    """Return the spacing (mm, transposed axes) that a case of a spacing is resampled to.

    A two-dimensional configuration keeps the spacing of the first axis. A spacing that differs from the case's own by
    rounding only is the case's own.
    """
    target = (*spacing[: 3 - configuration.dimensions], *configuration.spacing)
    axes = zip(spacing, target, strict=True)
    return triple(own if abs(new - own) <= _SAME_SPACING * own else float(new) for own, new in axes)


def resampled_shape(shape: Sequence[int], spacing: Sequence[float], new_spacing: Sequence[float]) -> Shape:
    """Return the voxels per axis at a new spacing, rounded as in nnU-Net (half to even), never less than one."""
    return triple(max(1, round(s / t * n)) for n, s, t in zip(shape, spacing, new_spacing, strict=True))


def transposed(values: Sequence[float], order: Sequence[int]) -> Spacing:
    """Return a spacing of (z, y, x) in another order of the axes."""
    return triple(float(values[axis]) for axis in order)


# ------------------------------------------------------------------------------------------------------- the way back


def restore_segmentation(
    logits: np.ndarray | torch.Tensor, placement: Placement, labels: Labels, resampling: Resampling
) -> np.ndarray:
    """Turn network output into a label map on the image's own grid.

    Resamples slab by slab and keeps one number per voxel at once: never all channels at the image's size.

    Parameters
    ----------
    logits : ndarray or Tensor, shape (channels, z, y, x)
        Output for the preprocessed array, of classes or regions; on any device.
    placement : Placement
        Where the preprocessed array is in its image.
    labels : Labels
        The dataset's labels.
    resampling : Resampling
        Spline orders for logits.

    Returns
    -------
    ndarray, shape (z, y, x)
        Label values of the dataset, axes as in the file.

    Raises
    ------
    UserError
        Logits are NaN or infinite.
    """
    require_finite(logits, "Compute them in float32 (--precision fp32), and look at the image's values.")
    values = output_values(labels)
    out, inner = empty_map(placement, labels.background, values.dtype)

    data, shape = logits.swapaxes(0, 1), triple(logits.shape[1:])
    size = int(np.clip(_SLAB_VALUES // (logits.shape[0] * inner[0].size), 1, 16))
    parts, y, x = operators(data, shape, cropped_shape(placement.box), logits_orders(placement, resampling), size)

    def write(part: Block) -> None:
        for z, rows, piece in resampled_rows(data, part, y, x):
            inner[z, rows] = values[decode_logits(piece, labels)]

    run_in_threads(write, parts, None if isinstance(data, np.ndarray) else 1)
    return out


def logits_orders(placement: Placement, resampling: Resampling) -> tuple[int, int, int]:
    """Return the spline order of each axis when logits are resampled to the original image."""
    axis = coarse_axis(placement.new_spacing, placement.spacing, resampling.separate_z)
    return triple(resampling.logits_order_z if a == axis else resampling.logits_order for a in range(3))


def empty_map(placement: Placement, fill: int, dtype: np.dtype) -> tuple[np.ndarray, np.ndarray]:
    """Return an array of an image's grid, and the part of it that is predicted, its axes in the network's order."""
    out = np.full(placement.geometry.shape, fill, dtype)
    return out, predicted_part(out, placement)


def predicted_part(array: np.ndarray, placement: Placement) -> np.ndarray:
    """Return the view of an array (z, y, x) on the image's grid that a preprocessed image shows, axes in its order."""
    return placement.turn.apply(array)[slices(placement.box)]


def cropped_shape(box: Box) -> Shape:
    """Return the voxels per axis of a box."""
    return triple(high - low for low, high in box)


def output_values(labels: Labels) -> np.ndarray:
    """Return the label value of each class, or of the background and each region, in the smallest type."""
    values = (labels.background, *(labels.region_order or ())) if labels.has_regions else labels.values
    known = (*values, *labels.values)
    return np.asarray(values, smallest_dtype(min(known), max(known)))


def require_finite(logits: Any, fix: str) -> None:
    """Refuse logits that are NaN or infinite, which no label can be decided from.

    Their sum shows it; each value is checked only where the sum is not finite.

    Parameters
    ----------
    logits : ndarray or Tensor
        float16 or float32, on any device, of any shape.
    fix : str
        What the user can do about it.

    Raises
    ------
    UserError
        One of them is NaN or infinite.
    """
    if isinstance(logits, np.ndarray):
        with np.errstate(all="ignore"):
            if np.isfinite(logits.sum(dtype=np.float32)):
                return
        wrong = logits.size - int(np.count_nonzero(np.isfinite(logits)))
    else:
        if math.isfinite(logits.sum(dtype=logits.new_empty(0).float().dtype)):
            return
        wrong = int((~logits.isfinite()).sum())
    if wrong:
        raise UserError(f"{wrong} of {math.prod(logits.shape)} values that the network computed are NaN or infinite "
                        "(non-finite logits)", fix=fix)  # fmt: skip


def decode_logits(data: Any, labels: Labels, *, rounded: bool = False) -> np.ndarray:
    """Choose the class of each voxel: the highest logit, or the last region above zero.

    Parameters
    ----------
    data : ndarray or Tensor, shape (channels, *shape)
        float32 logits, on any device.
    labels : Labels
        The dataset's labels.
    rounded : bool
        Round logits to float16 first, as nnU-Net does: it decides where two logits are nearly equal.

    Returns
    -------
    ndarray, shape `shape`
        Index into `output_values`, in the smallest type.
    """
    if not isinstance(data, np.ndarray):
        return _decode_tensor(data.half() if rounded else data, labels.has_regions)
    flat = data.reshape(len(data), -1)
    out = np.empty(flat.shape[1], smallest_dtype(0, len(data)))
    for start in range(0, len(out), _DECODED):
        piece = slice(start, start + _DECODED)
        logits = _round_half(flat[:, piece]) if rounded else flat[:, piece]
        if labels.has_regions:
            _last_region(logits, out[piece])
        else:
            _highest(logits, out[piece])
    return out.reshape(data.shape[1:])


def _round_half(logits: np.ndarray) -> np.ndarray:
    """Round to float16 by Veltkamp's splitting: a third of the time of numpy's conversion to float16 and back."""
    scaled = logits * _SPLIT
    return scaled - (scaled - logits)


def _decode_tensor(logits: torch.Tensor, regions: bool) -> np.ndarray:
    """Decide on the device of the logits, and copy the result to numpy, from a GPU by pinned memory."""
    if regions:
        numbers = logits.new_ones(len(logits)).cumsum(0).view(-1, *[1] * (logits.ndim - 1))
        decided = ((logits > 0) * numbers).amax(dim=0)
    else:
        decided = logits.argmax(dim=0)
    decided = decided.byte() if len(logits) < 256 else decided.int()
    return decided.new_empty(decided.shape, device="cpu", pin_memory=decided.is_cuda).copy_(decided).numpy()


def _highest(logits: np.ndarray, out: np.ndarray) -> None:
    """The first channel of (channels, voxels) that no other exceeds; numpy's argmax takes several times as long."""
    best, better, number = logits[0].copy(), np.empty(out.shape, bool), np.empty_like(out)
    out[:] = 0
    for index, channel in enumerate(logits[1:], 1):
        np.greater(channel, best, out=better)
        np.maximum(best, channel, out=best)
        np.maximum(out, np.multiply(better, out.dtype.type(index), out=number), out=out)  # later ones are larger


def _last_region(logits: np.ndarray, out: np.ndarray) -> None:
    """One more than the last channel of (channels, voxels) above zero; zero where there is none."""
    out[:] = 0
    for index, region in enumerate(logits, 1):
        out[region > 0] = index
