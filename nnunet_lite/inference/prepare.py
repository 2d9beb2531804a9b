"""What a model is shown: images as its first network wants them, and label maps of a first stage as classes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from nnunet_lite import log
from nnunet_lite.data.cases import Case
from nnunet_lite.data.geometry import PICTURE_SPACING, Geometry
from nnunet_lite.data.images import Image, read_image, read_images
from nnunet_lite.data.labels import Labels
from nnunet_lite.data.names import TIFF, ending_of, suffix_of
from nnunet_lite.data.problems import plural
from nnunet_lite.errors import UserError
from nnunet_lite.planning.schema import Configuration, Plan
from nnunet_lite.preprocessing.pipeline import Preprocessed, preprocess

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
    UserError : as `must_fit`.
    """
    must_fit(image, model.plan)
    first = model.previous or model
    prepared = preprocess(image, None, first.plan, first.configuration)
    return Ready(prepared, first.plan, first.configuration, image if model.previous or model.partners else None)


def must_fit(image: Image, plan: Plan) -> None:
    """Refuse an image that the networks of a plan cannot see.

    Raises
    ------
    UserError : it has another number of channels than the model, or voxels that are NaN, infinite or no float32.
    """
    expected = len(plan.channels)
    if image.array.shape[0] != expected:
        names = ", ".join(channel.name for channel in plan.channels)
        raise UserError(
            f"the image has {plural(image.array.shape[0], 'channel')}, the model expects {expected} ({names})"
        )
    for channel, values in zip(plan.channels, image.array, strict=True):
        # of integers there is no need to ask, and the sum of finite floats is finite but for an overflow
        wide = values.dtype.itemsize > 4
        if values.dtype.kind == "f" and (wide or not np.isfinite(values.sum(dtype=np.float64))):
            with np.errstate(over="ignore"):
                wrong = int(values.size - np.count_nonzero(np.isfinite(values.astype(np.float32))))
            if wrong:
                what = f"{plural(wrong, 'voxel')} of channel {channel.name} NaN or infinite{', as float32' * wide}"
                raise UserError(what, fix="Replace them, for example by 0, or export the image again.")


def as_image(given: Any, spacing: Sequence[float] | None, plan: Plan) -> Image:
    """An image as it may be given from Python.

    Parameters
    ----------
    given : a file, an `Image`, or an array (z, y, x) or (channels, z, y, x): of numpy, of torch, or nested lists.
    spacing : of an array's voxels, (z, y, x), in mm; without it 1 mm is taken, which is logged once.
    plan : of the model that will see it.

    Raises
    ------
    UserError : the file cannot be read, the array is no image, or the spacing is none; a file that is given a spacing.
    """
    if isinstance(given, str | PathLike | Image) and spacing is not None:
        what = "a spacing is given for what has its own"
        raise UserError(what, None if isinstance(given, Image) else str(given), "Give it with arrays only.")
    if isinstance(given, str | PathLike):
        return calibrated_as_trained(plan, read_image(Path(given), len(plan.channels)), Path(given))
    if isinstance(given, Image):
        array = _image_array(given.array)
        if array.shape[1:] != given.geometry.shape:
            raise UserError(f"the image's array is {array.shape[1:]}, its geometry {given.geometry.shape} voxels")
        _spacing(given.geometry.spacing)
        return replace(given, array=array)
    array = _image_array(given)
    if spacing is None:
        _assume_a_millimetre()
        spacing = (1.0, 1.0, 1.0)
    z, y, x = array.shape[1:]
    return Image(array, Geometry((z, y, x), _spacing(spacing), oriented=False))


def _image_array(given: Any) -> np.ndarray:
    """An array (channels, z, y, x) of real numbers.

    Raises
    ------
    UserError : it is none.
    """
    fix = "Give (z, y, x) or (channels, z, y, x); a picture (y, x) is array[None], one slice."
    if hasattr(given, "detach"):  # a tensor of torch, which may be on a GPU or part of a graph
        given = given.detach().cpu()
        given = given.float() if "bfloat16" in str(given.dtype) else given
    if isinstance(given, np.ma.MaskedArray) and np.ma.is_masked(given):
        raise UserError("the array is masked, and what its masked voxels are is not known", fix="Use array.filled(0).")
    try:
        array = np.asarray(given)
    except (ValueError, TypeError, RuntimeError) as error:
        raise UserError(f"{type(given).__name__} is no array ({' '.join(str(error).split()):.100})", fix=fix) from None
    if array.dtype.kind not in "biuf":
        what = f"an array of {array.dtype} is no image" if array.ndim else f"{type(given).__name__} is no image"
        raise UserError(what, fix="Give real numbers, for example array.astype('float32').")
    if array.ndim not in (3, 4) or 0 in array.shape:
        raise UserError(f"an array of shape {array.shape} cannot be segmented", fix=fix)
    return array[None] if array.ndim == 3 else array


def _spacing(given: Sequence[float]) -> tuple[float, float, float]:
    """A spacing (z, y, x) in mm.

    Raises
    ------
    UserError : it is none.
    """
    try:
        z, y, x = () if isinstance(given, str) else (float(value) for value in given)
        if all(0 < value < math.inf for value in (z, y, x)):
            return z, y, x
    except (TypeError, ValueError):
        pass
    what = f"an image with a spacing of {given!r:.100} cannot be segmented"
    raise UserError(what, fix="Give three positive numbers: (z, y, x) in mm.") from None


@cache
def _assume_a_millimetre() -> None:
    log.warn("an array without spacing: 1 x 1 x 1 mm is taken; give spacing=(z, y, x) in mm")


def as_classes(segmentation: np.ndarray, labels: Labels) -> np.ndarray:
    """Classes of a predicted label map; a value that the region order writes and no label has is background."""
    strange = sorted({*(labels.region_order or ())} - {*labels.values})
    if strange:
        segmentation = np.where(np.isin(segmentation, strange), labels.background, segmentation)
    return labels.encode(segmentation)
