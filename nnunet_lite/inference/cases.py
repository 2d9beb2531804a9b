"""Check what is predicted, and where it is written: images of files, cases and arrays, and outputs; without torch."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from mimetypes import guess_type
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np

from nnunet_lite import log
from nnunet_lite.data.cases import Case, split_name
from nnunet_lite.data.dicom import require_dicom
from nnunet_lite.data.formats import require_picture_values
from nnunet_lite.data.geometry import PICTURE_SPACING, Geometry
from nnunet_lite.data.images import Image, is_dicom, label_suffix, read_geometry, read_image, read_images
from nnunet_lite.data.labels import Labels
from nnunet_lite.data.names import ENDINGS, PICTURES, TIFF, Format, ending_of, format_of, stem, suffix_of
from nnunet_lite.data.problems import plural
from nnunet_lite.errors import UserError
from nnunet_lite.planning.schema import Plan
from nnunet_lite.preprocessing.pipeline import output_values

_NOT_IN_NAMES = str.maketrans(dict.fromkeys('/\\:*?"<>| ', "_"))  # characters that a file name cannot have everywhere
_MICROSCOPIC = 0.05  # mm: smaller voxels are of a microscope
_MUCH_COARSER = 2.5  # times the voxels of the training
_OTHER_UNIT = 100  # the unit of voxels that are 100 times smaller or larger than those of the training may be wrong


def read_case_image(plan: Plan, case: Case, accept_geometry: bool = False) -> Image:
    """Read the image of a case, with the number of channels that a model expects.

    Parameters
    ----------
    plan : Plan
        The plan of the model.
    case : Case
        A file, or a file for each channel.
    accept_geometry : bool
        Whether the files of the channels may differ in origin and direction.

    Raises
    ------
    UserError
        The image cannot be read, or has other channels than the model.
    """
    n_channels = len(plan.channels)
    expected = f"the model expects {n_channels} channels ({', '.join(c.name for c in plan.channels)})"
    if len(case.images) > 1:
        if absent := [path for path in case.images if not path.exists()]:
            raise UserError(f"there is no such file; {expected}", absent[0])
        extra = case.images[0].with_name(f"{case.id}_{n_channels:04d}{ending_of(case.images[0])}")
        if extra.is_file():
            raise UserError(f"is a channel too many; {expected}", extra)
    image = read_images(case.images, n_channels, accept_geometry)
    return use_trained_unit(plan, image, case.images[0], of_training=case.label is not None)


def use_trained_unit(plan: Plan, image: Image, path: Path, of_training: bool = False) -> Image:
    """Use the pixels of a microscope as the unit if the model was trained so, as nnU-Net reads such TIFF files.

    Parameters
    ----------
    plan : Plan
        The plan of the model.
    image : Image
        As it was read from `path`.
    path : Path
        Its file.
    of_training : bool
        It is a case of the dataset, whose voxels may differ from most others.

    Returns
    -------
    Image
        The same, or with a spacing of 1 mm.

    Raises
    ------
    UserError
        The image has another number of channels than the model, or the model was trained on micrometres, and the image
        states no spacing.
    """
    check_channels(image, plan, path)
    _warn_of_values(image, plan, path, of_training)
    geometry = image.geometry
    if not of_training:  # of which the check has warned
        if shear := geometry.shear_in_words():
            log.warn(f"{path}: {shear}")
        if 1 in geometry.shape and all(each.dimensions == 3 for each in plan.configurations.values()):
            log.warn(f"{path}: is one slice, and the model was trained on volumes: its label map may be wrong")
    planned = [configuration.spacing for configuration in plan.configurations.values()]
    stated = geometry.spacing[1:] if geometry.dimensions == 2 else geometry.spacing
    if geometry.calibrated:
        if suffix_of(path) not in TIFF or max(stated) > _MICROSCOPIC or not any(set(s) == {1.0} for s in planned):
            if not of_training:
                _warn_of_other_voxels(stated, plan, path)
            return image
        log.info(f"{path}: its spacing is not used: the model was trained on images without one")
        pixels = PICTURE_SPACING if geometry.dimensions == 2 else (1.0, 1.0, 1.0)
        return replace(image, geometry=replace(geometry, spacing=pixels, calibrated=False))
    finest = min(planned, key=max)
    if max(finest) < _MICROSCOPIC:
        trained_on = f"and the model was trained on voxels of {' x '.join(f'{s:.4g}' for s in finest)} mm"
        if geometry.dimensions == 2 and any(len(spacing) == 3 for spacing in planned):
            raise UserError(f"is a picture without a spacing, {trained_on}", path, "Give a volume.")
        fix = 'Give a TIFF file, and put <case>.json into its folder: {"spacing": [z, y, x]} in mm.'
        raise UserError(f"states no spacing, {trained_on}", path, fix)
    if geometry.dimensions == 3 and set(finest) != {1.0}:
        log.warn(f"{path}: no spacing known, 1x1x1 mm is used")
    return image


def _warn_of_other_voxels(stated: Sequence[float], plan: Plan, path: Path) -> None:
    """Warn of voxels whose unit may be wrong, or that are much coarser than those of the training."""
    own, trained = min(stated), min(plan.median_spacing)
    coarser = [a / b for a, b in zip(sorted(stated), sorted(plan.median_spacing), strict=False)]
    if max(own / trained, trained / own) > _OTHER_UNIT:
        log.warn(f"{path}: has voxels of {own:.3g} mm, the training images of {trained:.3g} mm; is its unit right?")
    elif max(coarser) > _MUCH_COARSER:
        sizes, usual = (" x ".join(f"{size:.3g}" for size in each) for each in (stated, plan.median_spacing))
        what = f"has voxels of {sizes} mm, and most training images of {usual} mm"
        log.warn(f"{path}: {what}: its label map may be worse than those of the validation")


def _warn_of_values(image: Image, plan: Plan, path: Path, of_training: bool) -> None:
    """Warn of channels of one value, except in the training, where the check does; and of a CT without HU below 0.

    Only if the training had other values: a channel may be empty in all images. Such a CT has lost its offset, or shows
    a window.
    """
    constant = []
    for channel, array in zip(plan.channels, image.array, strict=True):
        low, trained = array.min(), channel.statistics
        if low == array.max() and trained.min < trained.max:
            constant.append(f"{channel.name} ({low:g})")
        elif channel.normalization == "ct" and trained.min < 0 <= low:
            what = f"channel {channel.name} has no value below {low:g}, and the model expects Hounsfield units"
            log.warn(f"{path}: {what}, where air is -1000; export the image with its rescale slope and intercept")
    if constant and not of_training:
        log.warn(f"{path}: all voxels of channel {', '.join(constant)} are equal: its label map may be wrong")


def check_channels(image: Image, plan: Plan, path: Path | None = None, fix: str = "") -> None:
    """Refuse an image that has another number of channels than a plan."""
    expected, found = len(plan.channels), image.array.shape[0]
    if found != expected:
        names = ", ".join(channel.name for channel in plan.channels)
        who = "" if path else "the image "
        if not fix and image.geometry.dimensions == 2 and expected in (1, 3):
            fix = f"Save the picture as {'RGB' if expected == 3 else 'grey'} first."
        if not fix and found < expected and path:
            fix = "Number the files of a case in this order (_0000, _0001), or make a folder for each case."
        if not fix and found > expected and path:
            fix = "Of a series over time (cine, fMRI), predict one volume: save it as a file of its own."
        raise UserError(f"{who}has {plural(found, 'channel')}, the model expects {expected} ({names})", path, fix)


def as_image(given: Any, spacing: Sequence[float] | None, plan: Plan) -> Image:
    """Make an image of what is given from Python.

    Parameters
    ----------
    given : str, Path, Image or array_like
        A file, an image, or an array (z, y, x) or (channels, z, y, x): of numpy, of torch, or nested lists.
    spacing : sequence of float, optional
        Voxel size (z, y, x) of an array in mm; by default 1, with one warning unless the model is in pixels.
    plan : Plan
        The plan of the model.

    Raises
    ------
    UserError
        The file cannot be read, the array is no image, the spacing is not three positive numbers, or a file is given a
        spacing.
    """
    if isinstance(given, str | PathLike | Image) and spacing is not None:
        raise UserError("a spacing is given for an image that has its own", fix="Give it with arrays only.")
    if isinstance(given, str | PathLike):
        return use_trained_unit(plan, read_image(Path(given), len(plan.channels)), Path(given))
    if isinstance(given, Image):
        array = _as_array(given.array)
        if array.shape[1:] != given.geometry.shape:
            raise UserError(f"the image's array is {array.shape[1:]}, its geometry {given.geometry.shape} voxels")
        _check_spacing(given.geometry.spacing)
        return replace(given, array=array)
    array = _as_array(given)
    if spacing is None:
        if tuple(plan.median_spacing) != PICTURE_SPACING:
            log.warn_once("an array without spacing: 1 x 1 x 1 mm is used; give spacing=(z, y, x) in mm")
        spacing = (1.0, 1.0, 1.0)
    z, y, x = array.shape[1:]
    image = Image(array, Geometry((z, y, x), _check_spacing(spacing), oriented=False))
    picture = "array.transpose(2, 0, 1)[:, None]"
    check_channels(image, plan, fix=f"Give an array (channels, z, y, x); a picture (y, x, channels) is {picture}.")
    return image


def _as_array(given: Any) -> np.ndarray:
    """Return an array (channels, z, y, x) of real numbers, or refuse what is none."""
    if hasattr(given, "detach"):  # a tensor of torch, which may be on a GPU or part of a graph
        given = given.detach().cpu()
        given = given.float() if "bfloat16" in str(given.dtype) else given
    if isinstance(given, np.ma.MaskedArray) and np.ma.is_masked(given):
        raise UserError("the array is masked, and masked voxels have no value", fix="Use array.filled(0).")
    try:
        array = np.asarray(given)
    except (ValueError, TypeError, RuntimeError):
        array = np.empty(0, object)
    if array.dtype.kind not in "biuf" or array.ndim not in (3, 4) or 0 in array.shape:
        what = f"{type(given).__name__} of type {array.dtype} and shape {array.shape} cannot be segmented"
        fix = "Give real numbers (z, y, x) or (channels, z, y, x); a picture (y, x) is array[None], one slice."
        raise UserError(what, fix=fix)
    return array[None] if array.ndim == 3 else array


def _check_spacing(given: Sequence[float]) -> tuple[float, float, float]:
    """Return a spacing (z, y, x) in mm, or refuse what is none."""
    try:
        z, y, x = () if isinstance(given, str) else (float(value) for value in given)
        if all(0 < value < math.inf for value in (z, y, x)):
            return z, y, x
    except (TypeError, ValueError):
        pass
    raise UserError(f"a spacing of {given!r:.100} is not three positive numbers: (z, y, x) in mm") from None


def as_classes(label_map: np.ndarray, labels: Labels) -> np.ndarray:
    """Return the classes of a predicted label map, such as a second stage of a cascade takes them.

    Values that only the region order writes become background.
    """
    extra = sorted({*(labels.region_order or ())} - {*labels.values})
    if extra:
        label_map = np.where(np.isin(label_map, extra), labels.background, label_map)
    return labels.encode(label_map)


# -------------------------------------------------------------------------------------------------- where label maps go


def names_file(out: Path) -> bool:
    """Whether an output is the name of a label map, and not of a folder."""
    return (suffix_of(out) != "" or out.suffix.lower() == ".dcm") and not out.is_dir()


def file_name(label: str) -> str:
    """Return the name of a label as a part of a file's name on every system."""
    return label.translate(_NOT_IN_NAMES)


def output_file(case: Case, out: Path, format: Format | None = None) -> Path:
    """Return the file of a case's label map: its id, in a format or that of its image; or `out`, if it names a file."""
    if names_file(out):
        return out
    return out / f"{case.id}{ENDINGS[format] if format else label_suffix(suffix_of(case.images[0]))}"


def require_series(image: Path | None) -> Path:
    """Return the image of a DICOM-SEG or RTSTRUCT file; refuse what is no DICOM series, and a missing extra."""
    require_dicom()
    if image is None or not is_dicom(image):
        what = f"{'is' if image else 'the image is'} no DICOM series, so it can have no DICOM-SEG or RTSTRUCT"
        raise UserError(what, image, "Use --format nifti, or a name with .nii.gz.")
    return image


def check_output(
    sources: Sequence[Path], cases: Sequence[Case], out: Path, labels: Labels, format: Format | None = None
) -> None:
    """Refuse an output that the label maps cannot have, before anything is predicted.

    Parameters
    ----------
    sources : sequence of Path
        The files and folders in which the cases were found.
    cases : sequence of Case
        The images.
    out : Path
        A folder or, of a single case, a file.
    labels : Labels
        What the model predicts.
    format : str, optional
        Of the label maps; default: that of their images.

    Raises
    ------
    UserError
        One file for several cases; or a format that cannot store the label map; a DICOM format for an image that is no
        series; or a folder in which the next command would find the label maps as images.
    """
    if names_file(out):
        _check_file(cases, out, labels, format)
    elif not out.exists() and (any(guess_type(out.name)) or out.suffix.lower() in (".npy", ".npz")):
        raise UserError(f"label maps cannot be written as {out.suffix}", out, "Give a folder, or a name with .nii.gz.")
    for case in cases:
        if output_file(case, out, format).suffix.lower() == ".dcm":
            require_series(case.images[0])
    folder = (out.parent if names_file(out) else out).resolve()
    given = {identify(source) for source in sources if source.is_dir()}
    parents = {path if path.is_dir() else path.parent for case in cases for path in case.images}
    with_case_folders = {identify(parent.parent) for parent in parents if identify(parent) not in given} & given
    next_to_channels = any(
        len(case.images) > 1 and split_name(stem(case.images[0]))[0] == stem(output_file(case, out, format))
        for case in cases
        if identify(case.images[0].parent) == identify(folder)
    )
    if identify(folder) in given or identify(folder.parent) in with_case_folders or next_to_channels:
        what = "would contain images and label maps, and the next prediction would read the label maps as images"
        raise UserError(what, out, "Choose another --output.")


def _check_file(cases: Sequence[Case], out: Path, labels: Labels, format: Format | None) -> None:
    """Refuse a name of a label map for several images, or with a format that cannot store it."""
    if len(cases) > 1:
        raise UserError(f"names one label map, for {len(cases)} images", out, "Give a folder.")
    if format not in (None, format_of(out)):
        raise UserError(f"files of --format {format} end in {ENDINGS[format]}", out, "Rename it, or omit --format.")
    suffix = suffix_of(out)
    if suffix and label_suffix(suffix) != suffix:
        raise UserError(f"label maps cannot be written as {suffix}", out, f"Use {label_suffix(suffix)}.")
    if suffix in PICTURES:
        require_picture_values(out, output_values(labels), read_geometry(cases[0].images[0])[0])


def identify(path: Path) -> tuple[object, ...]:
    """Return what two paths share if they lead to the same file or folder, through links or in other letter case."""
    try:
        stat = path.stat()
    except OSError:
        return (path.resolve(),)
    return (stat.st_dev, stat.st_ino)
