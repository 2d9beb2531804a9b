"""What a model is shown: images as its first network wants them, and label maps of a first stage as classes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from nnunet_lite import log
from nnunet_lite.data.dataset import Case
from nnunet_lite.data.geometry import PICTURE_SPACING
from nnunet_lite.data.images import Geometry, Image, ending_of, read_images
from nnunet_lite.data.labels import Labels
from nnunet_lite.data.names import TIFF, suffix_of
from nnunet_lite.data.problems import plural
from nnunet_lite.errors import UserError
from nnunet_lite.plan.schema import Configuration, Plan
from nnunet_lite.preprocess.pipeline import Preprocessed, preprocess

if TYPE_CHECKING:
    from nnunet_lite.inference.predictor import Model

_MICROSCOPIC = 0.05  # mm: voxels below it are of a microscope


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
    image = calibrated_as_trained(model.plan, read_images(case.images, wanted, accept_geometry), case.images[0])
    return ready_image(model, image)


def calibrated_as_trained(plan: Plan, image: Image, path: Path) -> Image:
    """Take the pixels of a microscope for the unit if the model was trained so, as nnU-Net reads such TIFF files.

    Parameters
    ----------
    plan : Plan
        The model's.
    image : Image
        As it was read from `path`.
    path : Path

    Returns
    -------
    Image
        The same, or with a spacing of 1 mm.

    Raises
    ------
    UserError : the model was trained on micrometres, and the image states no spacing.
    """
    geometry = image.geometry
    planned = [configuration.spacing for configuration in plan.configurations.values()]
    stated = geometry.spacing[1:] if geometry.dimensions == 2 else geometry.spacing
    if geometry.calibrated:
        if suffix_of(path) not in TIFF or max(stated) > _MICROSCOPIC or not any(set(s) == {1.0} for s in planned):
            return image
        log.info(f"{path}: its spacing is not used: the model was trained on images without one")
        pixels = PICTURE_SPACING if geometry.dimensions == 2 else (1.0, 1.0, 1.0)
        return replace(image, geometry=replace(geometry, spacing=pixels, calibrated=False))
    finest = min(planned, key=max)
    if max(finest) < _MICROSCOPIC:
        what = f"states no spacing, and the model was trained on voxels of {' x '.join(f'{s:.4g}' for s in finest)} mm"
        raise UserError(what, path, 'Put <case>.json into the folder of a TIFF file: {"spacing": [z, y, x]} in mm.')
    if geometry.dimensions == 3 and set(finest) != {1.0}:
        log.warn(f"{path}: no spacing known, 1x1x1 mm taken")
    return image


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
