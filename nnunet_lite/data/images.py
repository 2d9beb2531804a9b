"""Images and label maps on disk: a file of any format to an array (channels, z, y, x) with its geometry, and back."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from nnunet_lite.data import names
from nnunet_lite.data.dicom import is_series, read_series, series_geometry
from nnunet_lite.data.formats import read_file, read_file_header, require_picture_values, write_file
from nnunet_lite.data.geometry import ACCEPTABLE, IDENTITY, Geometry, Image
from nnunet_lite.data.labels import segments_note, smallest_dtype
from nnunet_lite.data.nifti import write_nifti
from nnunet_lite.data.slicer import segment_names
from nnunet_lite.data.tiff import read_tiff, write_tiff
from nnunet_lite.errors import UserError
from nnunet_lite.files import atomic, write_json

_LARGEST = 2**53  # above, not every integer is a float
_FRACTION_TOLERANCE = 1e-3  # largest distance of a label stored as float from an integer


def is_image(path: Path) -> bool:
    """Return whether a file has a supported ending and is not hidden (.DS_Store, ._x).

    Parameters
    ----------
    path : Path
        Any path.

    Returns
    -------
    bool
        False for DICOM files, which have no fixed ending.
    """
    return not path.name.startswith(".") and names.suffix_of(path) != ""


def is_dicom(path: Path) -> bool:
    """Return whether a path is a DICOM series: its folder, or one of its files.

    Parameters
    ----------
    path : Path
        An existing path.

    Returns
    -------
    bool
        Whether `read_image` reads it as a series.
    """
    return not names.suffix_of(path) and is_series(path)


def label_suffix(suffix: str) -> str:
    """Return the ending for label maps of images with an ending: the same if that can be written, in one file.

    Parameters
    ----------
    suffix : str
        In lower case; empty for a DICOM series, whose label map is NIfTI.

    Returns
    -------
    str
        Such as ".png" for ".jpg".
    """
    others = {".jpg": ".png", ".jpeg": ".png", ".mhd": ".mha", ".nhdr": ".nrrd"}
    others |= {".ome.tif": ".tif", ".ome.tiff": ".tif"}
    return others.get(suffix, ".nii.gz" if suffix in ("", *names.PAIRS) else suffix)


# -------------------------------------------------------------------------------------------------------------- reading


def read_image(path: str | Path, channels: int | None = None) -> Image:
    """Read a file with all its channels, or a DICOM series.

    Parameters
    ----------
    path : str or Path
        A file; of a DICOM series the folder, or one of its files.
    channels : int or None
        Expected number. Transparency (alpha) is a channel only if this number includes it.

    Returns
    -------
    Image
        Array, geometry and notes.

    Raises
    ------
    UserError
        The file is missing, truncated or unreadable, has more than three dimensions and channels, or complex numbers;
        or the DICOM series is not a volume.
    """
    path = Path(path)
    if is_dicom(path):
        return read_series(path)
    image, alpha_notes = _without_alpha(_read(path), channels)
    n, notes = image.array.shape[0], [*image.notes, *alpha_notes]
    if image.geometry.dimensions == 3 and not image.geometry.calibrated:
        notes.append("no spacing known, 1x1x1 mm taken")
    return replace(image, notes=(*notes, *([f"{n} channels in one file"] if n > 1 else [])))


def read_images(paths: Sequence[Path], channels: int | None = None, accept_geometry: bool = False) -> Image:
    """Read the channels of a case from one file or several, in the orientation of the first.

    Parameters
    ----------
    paths : sequence of Path
        The files, in the order of the channels.
    channels : int or None
        Expected number in all files together; see `read_image`.
    accept_geometry : bool
        Whether the files may differ in origin and direction. The image has those of the first.

    Returns
    -------
    Image
        The stacked channels.

    Raises
    ------
    UserError
        As `read_image`; or the files are on different grids.
    """
    images = [read_image(path, None if channels is None else channels // len(paths)) for path in paths]
    if len(images) == 1:
        return images[0]
    images = [image.aligned(images[0].geometry) for image in images]
    for path, image in zip(paths[1:], images[1:], strict=True):
        for what, found, expected in image.geometry.differences(images[0].geometry):
            if accept_geometry and what in ACCEPTABLE:
                continue
            fix = "All channels of a case must be on one grid: register and resample them to one."
            fix += " If the voxels do match, accept it with --accept-geometry." * (what in ACCEPTABLE)
            raise UserError(f"{what} {found} differs from that of {paths[0].name}, {expected}", path, fix)
    array = np.concatenate([image.array for image in images])
    return Image(array, images[0].geometry, tuple(dict.fromkeys(note for image in images for note in image.notes)))


def read_label(path: str | Path, like: Geometry | None = None) -> tuple[np.ndarray, Geometry, tuple[str, ...]]:
    """Read a label map.

    Parameters
    ----------
    path : str or Path
        The file.
    like : Geometry or None
        The grid of its image, to whose axes the label map is turned. None: as stored.

    Returns
    -------
    array : ndarray of int, shape (z, y, x)
        The values of the file; floats that hold integers are rounded.
    geometry : Geometry
        Its grid.
    notes : tuple of str
        How the file was understood.

    Raises
    ------
    UserError
        As `read_image`; or the file has fractions, NaN, colours, or more than one value per voxel.
    """
    image = read_label_image(path, like)
    return image.array[0], image.geometry, image.notes


def read_label_image(path: str | Path, like: Geometry | None = None) -> Image:
    """Read a label map as an image of one channel; see `read_label`.

    Parameters
    ----------
    path : str or Path
        The file.
    like : Geometry or None
        The grid of its image, to whose axes the label map is turned. None: as stored.

    Returns
    -------
    Image
        Of shape (1, z, y, x).

    Raises
    ------
    UserError
        As `read_label`.
    """
    path = Path(path)
    stored = _read(path, resolve_palette=False)
    image, alpha_notes = _without_alpha(stored, None)
    if alpha_notes and np.ptp(stored.array[-1]) and not np.ptp(image.array):
        fix = "Save the mask as grey values: 0 for background, 1, 2, ... for the labels."
        raise UserError("is transparent in parts and of one colour: the mask is in its alpha channel", path, fix)
    array, notes = image.array, [*image.notes, *alpha_notes]
    of_slicer = names.format_of(path) == "seg.nrrd"
    segments = segment_names(path) if of_slicer else {}
    notes += [segments_note(segments)] if segments else []
    if array.shape[0] > 1:
        if any(not np.array_equal(array[0], channel) for channel in array[1:]):
            flat = names.suffix_of(path) in names.PICTURES and array.shape[1] == 1
            what = "a colour picture" if flat else "not a label map: it has a fourth dimension"
            fix = "Store one integer per voxel: 0 for background, 1, 2, ... for the labels."
            if of_slicer:
                what = "a segmentation of 3D Slicer in layers: it has a fourth dimension"
                fix = "Export it from 3D Slicer as a label map, with one colour table for all."
            raise UserError(f"is {what} ({array.shape[0]} different channels)", path, fix)
        notes.append(f"label map with {array.shape[0]} equal channels read as one")
    label = replace(image, array=_integers(array[0], path)[None], notes=tuple(notes))
    return label if like is None else label.aligned(like)


def read_geometry(path: str | Path, channels: int | None = None) -> tuple[Geometry, int]:
    """Read geometry and number of channels, from the header alone if the format allows it.

    Parameters
    ----------
    path : str or Path
        As for `read_image`.
    channels : int or None
        As for `read_image`.

    Returns
    -------
    geometry : Geometry
        The grid.
    channels : int
        Without transparency, unless it is expected.

    Raises
    ------
    UserError
        As `read_image`.
    """
    path = Path(path)
    if is_dicom(path):
        return series_geometry(path), 1
    names.require_readable(path)
    if names.suffix_of(path) in names.TIFF:
        image = read_tiff(path, pixels=False)
        geometry, found, has_alpha = image.geometry, image.array.shape[0], image.has_alpha
    elif header := read_file_header(path):
        geometry, found, has_alpha = *header, names.suffix_of(path) in names.PICTURES
    else:
        image = read_image(path)
        return image.geometry, image.array.shape[0]
    return geometry, found - _drops_alpha(found, has_alpha, channels)


def _read(path: Path, resolve_palette: bool = True) -> Image:
    return read_tiff(path, resolve_palette) if names.suffix_of(path) in names.TIFF else read_file(path, resolve_palette)


def _without_alpha(image: Image, channels: int | None) -> tuple[Image, list[str]]:
    array = image.array
    if not _drops_alpha(array.shape[0], image.has_alpha, channels):
        return image, []
    varies = array[-1].min() != array[-1].max()
    return replace(image, array=array[:-1]), ["alpha channel dropped" + (" although it varies" if varies else "")]


def _drops_alpha(found: int, has_alpha: bool, channels: int | None) -> bool:
    """Return whether the last of 2 or 4 channels is transparency and not expected."""
    return has_alpha and found in (2, 4) and found != channels


def _integers(array: np.ndarray, path: Path) -> np.ndarray:
    if array.dtype.kind in "iub":
        return array
    rounded = np.rint(array)
    with np.errstate(invalid="ignore"):
        wrong = ~(np.abs(array - rounded) < _FRACTION_TOLERANCE)
    if wrong.any():
        examples = ", ".join(f"{v:.6g}" for v in np.unique(array[wrong])[:3])
        what = f"label values are not whole numbers ({examples} and so on in {int(wrong.sum())} of {wrong.size} voxels)"
        fix = "Resample label maps with nearest neighbour, and store integers without scl_slope."
        raise UserError(what, path, fix)
    low, high = float(rounded.min(initial=0)), float(rounded.max(initial=0))
    if max(-low, high) > _LARGEST:
        what = f"holds label values from {low:.6g} to {high:.6g}, too large for labels"
        raise UserError(what, path, "Renumber them.")
    return rounded.astype(smallest_dtype(int(low), int(high)))


# -------------------------------------------------------------------------------------------------------------- writing


def write_label(path: str | Path, array: np.ndarray, geometry: Geometry, like: Path | None = None) -> None:
    """Write a label map in the format of the path's ending, completely or not at all.

    Parameters
    ----------
    path : str or Path
        The file to write.
    array : ndarray of int, shape (z, y, x)
        Types wider than 16 bit shrink to what the values need.
    geometry : Geometry
        Of the array.
    like : Path or None
        The image that the geometry was read from. If both are NIfTI, its header is used: qform, sform, their codes and
        units.

    Raises
    ------
    UserError
        The format cannot store it.
    """
    path = Path(path)
    if array.shape != geometry.shape:
        raise ValueError(f"array of shape {array.shape} for a geometry of shape {geometry.shape}")
    if array.dtype == bool or array.dtype.itemsize > 2:
        array = array.astype(smallest_dtype(int(array.min(initial=0)), int(array.max(initial=0))))
    suffix = names.suffix_of(path)
    if path.is_dir():
        raise UserError("is a folder", path, "Give the name of a file in it, such as label.nii.gz.")
    if label_suffix(suffix) != suffix:
        what = f"label maps cannot be written {f'as {suffix or path.suffix}' if path.suffix else 'without an ending'}"
        endings = label_suffix(suffix) if suffix else " ".join(s for s in names.SUFFIXES if label_suffix(s) == s)
        raise UserError(what, path, f"Use {endings}.")
    if suffix in names.PICTURES:
        require_picture_values(path, array, geometry)
    if suffix in names.GIPL and not np.allclose(geometry.direction, IDENTITY, atol=1e-6):
        raise UserError("GIPL cannot store directions, and the image has some", path, "Use .nii.gz.")
    with atomic(path) as temporary:
        copies_header = like is not None and names.suffix_of(like) in names.NIFTI and suffix in names.NIFTI
        if copies_header:
            write_nifti(temporary, array, geometry, like=like)
        if not copies_header or read_geometry(temporary)[0].differences(geometry):  # such as a header without sizes
            write = write_tiff if suffix in names.TIFF else write_file
            write(temporary, array, geometry)
    if suffix in names.TIFF and geometry.calibrated:
        write_json(path.with_name(names.stem(path) + ".json"), {"spacing": list(geometry.spacing)})
