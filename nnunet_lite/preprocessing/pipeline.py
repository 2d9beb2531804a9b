"""From an image to the array that a network sees, and from a network's output back to a label map.

Forwards, as nnU-Net does it: reorder the axes, crop to the nonzero region, normalise, resample. `prepare` does the part
that all configurations share; `preprocess` is all of it for one. Backwards, `restore_segmentation` undoes each step.
Axes are (z, y, x) as in the file, or *transposed*: turned to the plan's orientation, then in its axis order. Spacings
are mm in the same order.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from nnunet_lite.data.geometry import Box, Geometry, Turn, bounding_box, nonzero_box, nonzero_mask, slices, turn_between
from nnunet_lite.data.images import Image
from nnunet_lite.data.labels import Labels, smallest_dtype
from nnunet_lite.errors import UserError
from nnunet_lite.planning.schema import Configuration, Plan, Resampling
from nnunet_lite.preprocessing.normalization import normalize
from nnunet_lite.preprocessing.resampling import coarse_axis, resample_image, resample_labels, resample_slabs

if TYPE_CHECKING:
    import torch

Shape = tuple[int, int, int]
Spacing = tuple[float, float, float]

_SAME_SPACING = 1e-5  # relative; spacings this close give the same shape, so nothing is resampled
_VOXELS = 1 << 14  # decided at once on a CPU: their logits stay in its cache
_SPLIT = 2**13 + 1  # leaves 11 bits of a float32's 24, as many as a float16 has
_SLAB_VALUES = 1 << 24  # logits per slab of the way back: 64 MiB of float32 for each thread


@dataclass(frozen=True)
class Placement:
    """Where a preprocessed array is in its image: all that the way back needs.

    Parameters
    ----------
    geometry : of the image, axes as in the file.
    turn : from the axes of the file to transposed ones.
    box : half-open, of the nonzero region, transposed axes, voxels of the image.
    spacing : mm, transposed axes, of the image. new_spacing : of the preprocessed array.
    shape : of the preprocessed array, transposed axes.
    """

    geometry: Geometry
    turn: Turn
    box: Box
    spacing: Spacing
    new_spacing: Spacing
    shape: Shape

    def to_json(self) -> dict[str, Any]:
        turn = {"axis_order": self.turn.order, "reversed": self.turn.reversed}
        return {**{key: value for key, value in asdict(self).items() if key != "turn"}, **turn}

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> Placement:
        geometry: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in value["geometry"].items()}
        (z0, z1), (y0, y1), (x0, x1) = value["box"]
        return cls(
            Geometry(**geometry),
            Turn(tuple(value["axis_order"]), tuple(value.get("reversed", (False, False, False)))),
            ((z0, z1), (y0, y1), (x0, x1)),
            tuple(value["spacing"]),
            tuple(value["new_spacing"]),
            tuple(value["shape"]),
        )


@dataclass(frozen=True)
class Prepared:
    """A case cropped and normalised but not resampled, transposed axes: what all configurations share.

    `image` (channels, z, y, x) float32; `classes` (z, y, x) or None. Where a channel is normalised inside the nonzero
    mask, the background outside of that mask has the class `Labels.outside_class`.
    """

    image: np.ndarray
    classes: np.ndarray | None
    geometry: Geometry
    turn: Turn
    box: Box
    spacing: Spacing


@dataclass(frozen=True)
class Preprocessed:
    """A case as the network sees it, transposed: `image` (channels, z, y, x) float32, `classes` (z, y, x) or None."""

    image: np.ndarray
    classes: np.ndarray | None
    placement: Placement


def preprocess(image: Image, classes: np.ndarray | None, plan: Plan, configuration: Configuration) -> Preprocessed:
    """Image and classes (z, y, x) as the network of a configuration sees them.

    Raises
    ------
    UserError : the image does not fit the plan's channels.
    """
    return resample(prepare(image, classes, plan), configuration)


def prepare(image: Image, classes: np.ndarray | None, plan: Plan) -> Prepared:
    """Transpose, crop to the nonzero region and normalise.

    Raises
    ------
    UserError : the image does not fit the plan's channels.
    """
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
    return Prepared(array, classes, image.geometry, turn, box, transposed(image.geometry.spacing, turn.order))


def turn_for(plan: Plan, orientation: str | None) -> Turn:
    """How an image of an orientation, such as "LAS", is turned for a plan: to its orientation and its axis order."""
    return turn_between(orientation, plan.orientation).then(plan.axis_order)


def resample(case: Prepared, configuration: Configuration, threads: int | None = None) -> Preprocessed:
    """Resample a prepared case to the spacing of a configuration, in threads (None: one per CPU)."""
    new_spacing = resampled_spacing(configuration, case.spacing)
    old: Shape = case.image.shape[1:]
    shape = resampled_shape(old, case.spacing, new_spacing)
    how = configuration.resampling
    image = resample_image(
        case.image,
        shape,
        case.spacing,
        new_spacing,
        how.image_order,
        how.image_order_z,
        how.separate_z,
        threads=threads,
    )
    classes = case.classes
    if classes is not None:
        classes = resample_labels(
            classes, shape, case.spacing, new_spacing, how.label_order, how.label_order_z, how.separate_z, threads
        )
    place = Placement(case.geometry, case.turn, case.box, case.spacing, new_spacing, shape)
    return Preprocessed(image, classes, place)


def resampled_spacing(configuration: Configuration, spacing: Spacing) -> Spacing:
    """The spacing (mm, transposed axes) that a case of this spacing is resampled to.

    A two-dimensional configuration keeps the spacing of the first axis. A spacing that differs from the case's own by
    rounding only is the case's own.
    """
    wanted = (*spacing[: 3 - configuration.dimensions], *configuration.spacing)
    z, y, x = (
        own if abs(new - own) <= _SAME_SPACING * own else float(new) for own, new in zip(spacing, wanted, strict=True)
    )
    return z, y, x


def resampled_shape(shape: Sequence[int], spacing: Sequence[float], new_spacing: Sequence[float]) -> Shape:
    """Voxels per axis at the new spacing, rounded as nnU-Net rounds (half to even), never less than one."""
    z, y, x = (max(1, round(s / t * n)) for n, s, t in zip(shape, spacing, new_spacing, strict=True))
    return z, y, x


def transposed(values: Sequence[float], order: Sequence[int]) -> Spacing:
    """Spacing or the like of (z, y, x) in another order of the axes."""
    z, y, x = (float(values[axis]) for axis in order)
    return z, y, x


def restore_segmentation(
    logits: np.ndarray | torch.Tensor, placement: Placement, labels: Labels, resampling: Resampling
) -> np.ndarray:
    """The label map (z, y, x), values of the data set, on the image's own grid.

    Parameters
    ----------
    logits : network output (classes or regions, z, y, x) for the preprocessed array; on any device.

    Resamples slab by slab and keeps one number per voxel at once: never all channels at the image's size.

    Raises
    ------
    UserError : logits are NaN or infinite.
    """
    require_finite(logits, "Compute them in float32 (--precision fp32), and look at the image's values.")
    written = output_values(labels)
    out, inner = empty_map(placement, labels.background, written.dtype)

    def write(start: int, slab: Any) -> None:
        inner[start : start + slab.shape[1]] = written[decode_logits(slab, labels)]

    axis = coarse_axis(placement.new_spacing, placement.spacing, resampling.separate_z)
    orders = [resampling.logits_order_z if a == axis else resampling.logits_order for a in range(3)]
    size = int(np.clip(_SLAB_VALUES // (logits.shape[0] * inner[0].size), 1, 16))
    resample_slabs(logits, cropped_shape(placement.box), orders, write, size=size)
    return out


def empty_map(placement: Placement, fill: int, dtype: np.dtype) -> tuple[np.ndarray, np.ndarray]:
    """An array of an image's grid, and the part of it that is predicted, its axes in the order of the network's."""
    out = np.full(placement.geometry.shape, fill, dtype)
    return out, predicted_part(out, placement)


def predicted_part(array: np.ndarray, placement: Placement) -> np.ndarray:
    """The view of an array (z, y, x) on the image's grid that a preprocessed image shows, axes in its order."""
    return placement.turn.apply(array)[slices(placement.box)]


def cropped_shape(box: Box) -> Shape:
    z, y, x = (high - low for low, high in box)
    return z, y, x


def output_values(labels: Labels) -> np.ndarray:
    """The value written for each class, or for the background and each region."""
    values = (labels.background, *(labels.region_order or ())) if labels.has_regions else labels.values
    known = (*values, *labels.values)
    return np.asarray(values, smallest_dtype(min(known), max(known)))


def require_finite(logits: Any, fix: str) -> None:
    """Refuse logits that are NaN or infinite, which no decision can be made from.

    Their sum shows it; only where that is not finite, each value is looked at.

    Parameters
    ----------
    logits : float16 or float32, a numpy array or a torch tensor on any device, of any shape.
    fix : what to do about it.

    Raises
    ------
    UserError : one of them is.
    """
    if isinstance(logits, np.ndarray):
        with np.errstate(all="ignore"):
            if np.isfinite(logits.sum(dtype=np.float32)):
                return
        wrong = logits.size - int(np.count_nonzero(np.isfinite(logits)))
    else:
        import torch

        if math.isfinite(logits.sum(dtype=torch.float32)):
            return
        wrong = int((~logits.isfinite()).sum())
    if wrong:
        raise UserError(f"{wrong} of {math.prod(logits.shape)} values that the network computed are NaN or infinite "
                        "(non-finite logits)", fix=fix)  # fmt: skip


def decode_logits(data: Any, labels: Labels, head: Any = None, *, rounded: bool = False) -> np.ndarray:
    """Index into `output_values` for each voxel, in the smallest type.

    Parameters
    ----------
    data : (channels, *shape) float32 logits, a numpy array or a torch tensor on any device.
    head : (logits, channels), of the same kind: the logits are `head @ data`, of which few voxels' exist at once.
    rounded : round logits to float16 first, as nnU-Net does: it decides what would else be a close race.
    """
    flat = data.reshape(len(data), -1)
    out = np.empty(flat.shape[1], smallest_dtype(0, len(data if head is None else head)))
    at_once = _VOXELS if isinstance(data, np.ndarray) else len(out)
    for start in range(0, len(out), at_once):
        piece = slice(start, start + at_once)
        logits = flat[:, piece] if head is None else head @ flat[:, piece]
        _write(_rounded(logits) if rounded else logits, labels.has_regions, out[piece])
    return out.reshape(data.shape[1:])


def _write(logits: Any, regions: bool, out: np.ndarray) -> None:
    if not isinstance(logits, np.ndarray):
        out[:] = _on_device(logits, regions).cpu().numpy()
    elif regions:
        _last_region(logits, out)
    else:
        _highest(logits, out)


def _rounded(logits: Any) -> Any:
    """To the precision of float16 (Veltkamp's splitting), a third of the time of numpy's conversion there and back."""
    scaled = logits * _SPLIT
    return scaled - (scaled - logits)


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


def _on_device(logits: torch.Tensor, regions: bool) -> torch.Tensor:
    import torch

    if not regions:
        return logits.argmax(dim=0)
    numbers = torch.arange(1, len(logits) + 1, device=logits.device)[:, None]
    return ((logits > 0) * numbers).amax(dim=0)
