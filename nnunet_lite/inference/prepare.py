"""What a model is shown: images as its first network wants them, and label maps of a first stage as classes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from nnunet_lite.data.dataset import Case
from nnunet_lite.data.images import Geometry, Image, ending_of, read_images
from nnunet_lite.data.labels import Labels
from nnunet_lite.data.problems import plural
from nnunet_lite.errors import UserError
from nnunet_lite.plan.schema import Configuration, Plan
from nnunet_lite.preprocess.pipeline import Preprocessed, preprocess

if TYPE_CHECKING:
    from nnunet_lite.inference.predictor import Model


@dataclass(frozen=True)
class Ready:
    """An image prepared for one configuration; as read only where others have yet to see it."""

    prepared: Preprocessed
    plan: Plan
    configuration: Configuration
    image: Image | None


def ready_case(model: Model, case: Case, accept_geometry: bool = False) -> Ready:
    """Read and prepare a case.

    Parameters
    ----------
    model : Model
    case : Case
    accept_geometry : bool
        Whether the files of its channels may differ in origin and direction.

    Raises
    ------
    UserError : it cannot be read, or has other channels than the model.
    """
    wanted = len(model.plan.channels)
    expected = f"the model expects {wanted} channels ({', '.join(c.name for c in model.plan.channels)})"
    if len(case.images) > 1:
        if absent := [path for path in case.images if not path.exists()]:
            raise UserError(f"there is no such file; {expected}", absent[0])
        extra = case.images[0].with_name(f"{case.id}_{wanted:04d}{ending_of(case.images[0])}")
        if extra.is_file():
            raise UserError(f"is a channel too many; {expected}", extra)
    return ready_image(model, read_images(case.images, wanted, accept_geometry))


def ready_image(model: Model, image: Image) -> Ready:
    """Prepare an image.

    Raises
    ------
    UserError : it has another number of channels than the model, or voxels that are NaN or infinite.
    """
    expected = len(model.plan.channels)
    if image.array.shape[0] != expected:
        names = ", ".join(channel.name for channel in model.plan.channels)
        raise UserError(
            f"the image has {plural(image.array.shape[0], 'channel')}, the model expects {expected} ({names})"
        )
    for channel, values in zip(model.plan.channels, image.array, strict=True):
        # of integers there is no need to ask, and the sum of finite floats is finite but for an overflow
        if values.dtype.kind == "f" and not np.isfinite(values.sum(dtype=np.float64)):
            wrong = int(values.size - np.count_nonzero(np.isfinite(values)))
            if wrong:
                what = f"{plural(wrong, 'voxel')} of channel {channel.name} NaN or infinite"
                raise UserError(what, fix="Replace them, for example by 0, or export the image again.")
    first = model.previous or model
    prepared = preprocess(image, None, first.plan, first.configuration)
    return Ready(prepared, first.plan, first.configuration, image if model.previous or model.partners else None)


def as_image(array: np.ndarray, spacing: Sequence[float]) -> Image:
    """An array (z, y, x) or (channels, z, y, x) as an image; spacing (z, y, x) in mm.

    Raises
    ------
    UserError : another number of axes.
    """
    array = array[None] if array.ndim == 3 else array
    if array.ndim != 4 or len(spacing) != 3:
        raise UserError(
            f"an array of {array.ndim} dimensions with a spacing of {len(spacing)} cannot be segmented",
            fix="Give (z, y, x) or (channels, z, y, x) and the spacing (z, y, x) in mm.",
        )
    z, y, x = array.shape[1:]
    sz, sy, sx = (float(s) for s in spacing)
    return Image(array, Geometry((z, y, x), (sz, sy, sx)))


def as_classes(segmentation: np.ndarray, labels: Labels) -> np.ndarray:
    """Classes of a predicted label map; a value that the region order writes and no label has is background."""
    strange = sorted({*(labels.region_order or ())} - {*labels.values})
    if strange:
        segmentation = np.where(np.isin(segmentation, strange), labels.background, segmentation)
    return labels.encode(segmentation)
