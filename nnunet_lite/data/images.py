"""Images and label maps on disk: any common format to an array (channels, z, y, x) with its geometry, and back."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from nnunet_lite.data.dicom import is_series, read_series, series_geometry
from nnunet_lite.data.formats import (
    fits_picture,
    is_palette,
    nifti_scale,
    read_file,
    read_header,
    write_file,
    write_nifti_like,
)
from nnunet_lite.data.geometry import ACCEPTABLE, IDENTITY, Geometry, Turn, turn_between
from nnunet_lite.data.labels import smallest_dtype
from nnunet_lite.data.names import (
    GIPL,
    NIFTI,
    PAIRS,
    PICTURES,
    SUFFIXES,
    TIFF,
    ending_of,
    must_be_readable,
    stem,
    suffix_of,
)
from nnunet_lite.data.tiff import read_tiff, tiff_alpha, tiff_header
from nnunet_lite.errors import UserError
from nnunet_lite.files import atomic, write_json

__all__ = [
    "PICTURES",
    "SUFFIXES",
    "Geometry",
    "Image",
    "ending_of",
    "is_dicom",
    "is_image",
    "label_suffix",
    "read_geometry",
    "read_image",
    "read_images",
    "read_label",
    "stem",
    "suffix_of",
    "write_label",
]

_LARGEST = 2**53  # above, not every integer is a float
_FRACTION_TOLERANCE = 1e-3  # how far a label stored as float may be from an integer


@dataclass(frozen=True)
class Image:
    """An array (channels, z, y, x) in the file's own type, its geometry, and notes on what had to be understood."""

    array: np.ndarray
    geometry: Geometry
    notes: tuple[str, ...] = ()

    def aligned(self, other: Geometry) -> Image:
        """The same image with its axes as another has them; itself where its grid as stored is the other's already.

        Where neither the stored nor the turned array has the other's grid, an array of the same shape stays as it is
        stored: these are the voxels that a user accepts with --accept-geometry.
        """
        own, wanted = self.geometry.orientation, other.orientation
        turn = turn_between(own, wanted)
        turned = self.geometry.turned(turn)
        if turn == Turn() or not self.geometry.differences(other):
            return self
        if turned.differences(other) and self.geometry.shape == other.shape:
            return self
        notes = (*self.notes, f"turned from {own} to {wanted}")
        return replace(self, array=turn.apply(self.array), geometry=turned, notes=notes)


def is_image(path: Path) -> bool:
    """Whether a file is an image to read: a supported ending, and not hidden (.DS_Store, ._x)."""
    return not path.name.startswith(".") and suffix_of(path) != ""


def is_dicom(path: Path) -> bool:
    """Whether a path is a DICOM series: its folder, or one of its files."""
    return not suffix_of(path) and is_series(path)


def label_suffix(suffix: str) -> str:
    """The ending for label maps of images with this ending: the same where that can be written, whole, in one file.

    A DICOM series has no ending, its label map is NIfTI.
    """
    others = {".jpg": ".png", ".jpeg": ".png", ".mhd": ".mha", ".nhdr": ".nrrd"}
    nifti = ("", *PAIRS, ".par", ".head")
    return others.get(suffix, ".nii.gz" if suffix in nifti else suffix)


def read_image(path: str | Path, channels: int | None = None) -> Image:
    """Read one file with all its channels, or a DICOM series: its folder, or one of its files.

    Parameters
    ----------
    path : str or Path
    channels : int or None
        How many are expected. Transparency (alpha) is a channel only where it makes up this number.

    Raises
    ------
    UserError : missing, truncated or unreadable; more than three dimensions and channels; complex numbers; a DICOM
        series that is no volume.
    """
    path = Path(path)
    if is_dicom(path):
        return Image(*read_series(path))
    array, geometry, notes = _read(path)
    if suffix_of(path) in TIFF:
        if geometry.dimensions == 3 and not geometry.calibrated:
            notes.append("no spacing known, 1x1x1 mm taken")
    elif suffix_of(path) in PICTURES:
        if array.shape[0] >= 3:
            notes.append("palette picture" if is_palette(path) else "RGB picture")
    elif array.shape[0] > 1:
        notes.append(f"{array.shape[0]} channels in one file")
    array, more = _without_alpha(path, array, channels)
    notes = [note for note in notes if not (more and array.shape[0] == 1)]  # grey with alpha is no file of channels
    read_as = f" read as {array.shape[0]} channels"
    notes = [note + read_as if note.endswith(" picture") else note for note in notes]
    return Image(array, geometry, (*notes, *more))


def read_images(
    paths: list[Path] | tuple[Path, ...], channels: int | None = None, accept_geometry: bool = False
) -> Image:
    """The channels of one case, one file or several, stacked; all in the orientation of the first.

    Parameters
    ----------
    paths : list of Path
    channels : int or None
        How many are expected in all files together; see `read_image`.
    accept_geometry : bool
        Whether the files may differ in origin and direction. The image has those of the first.

    Raises
    ------
    UserError : as `read_image`; or the files are on different grids.
    """
    images = [read_image(path, None if channels is None else channels // len(paths)) for path in paths]
    if len(images) == 1:
        return images[0]
    images = [image.aligned(images[0].geometry) for image in images]
    for path, image in zip(paths[1:], images[1:], strict=True):
        for what, found, expected in image.geometry.differences(images[0].geometry):
            if accept_geometry and what in ACCEPTABLE:
                continue
            more = " If the voxels do match, accept it with --accept-geometry." if what in ACCEPTABLE else ""
            raise UserError(
                f"{what} {found} differs from that of {Path(paths[0]).name}, {expected}",
                path,
                f"All channels of a case must be on one grid: register and resample them to one.{more}",
            )
    array = np.concatenate([image.array for image in images])
    return Image(array, images[0].geometry, tuple(dict.fromkeys(note for image in images for note in image.notes)))


def read_label(path: str | Path, like: Geometry | None = None) -> tuple[np.ndarray, Geometry, tuple[str, ...]]:
    """A label map: integers (z, y, x) as stored (floats that hold integers are rounded), geometry, and notes.

    Parameters
    ----------
    like : of its image, with whose axes it is aligned; None: as it is stored.

    Raises
    ------
    UserError : as `read_image`; or fractional values, NaN, colours, or more than one value per voxel.
    """
    path = Path(path)
    array, geometry, notes = _read(path, resolve_palette=False)
    notes = [
        note for note in notes if "channels" not in note and note != "RGB picture"
    ]  # equal ones are reported below
    if suffix_of(path) not in TIFF and is_palette(path):
        notes.append("palette picture read as the numbers of its colours")
    array, more = _without_alpha(path, array, None)
    notes += more
    if array.shape[0] > 1:
        if any(not np.array_equal(array[0], channel) for channel in array[1:]):
            flat = suffix_of(path) in PICTURES and array.shape[1] == 1
            what = "a colour picture" if flat else "no label map: it has a fourth dimension"
            raise UserError(
                f"is {what} ({array.shape[0]} different channels)",
                path,
                "Store one integer per voxel: 0 for background, 1, 2, ... for the labels.",
            )
        notes.append(f"label map with {array.shape[0]} equal channels read as one")
    label = Image(_integers(array[0], path)[None], geometry, tuple(notes))
    label = label if like is None else label.aligned(like)
    return label.array[0], label.geometry, label.notes


def read_geometry(path: str | Path, channels: int | None = None) -> tuple[Geometry, int]:
    """Geometry and number of channels, from the header alone where the format allows; `channels` as in `read_image`."""
    path = Path(path)
    if is_dicom(path):
        return series_geometry(path), 1
    must_be_readable(path)
    header = tiff_header(path) if suffix_of(path) in TIFF else read_header(path)
    if header is None:
        image = read_image(path)
        return image.geometry, image.array.shape[0]
    geometry, found = header
    return geometry, found - _has_alpha(path, found, channels)


def write_label(path: str | Path, array: np.ndarray, geometry: Geometry, like: Path | None = None) -> None:
    """Write a label map (z, y, x) of integers in the format of the path's ending, whole or not at all.

    Shape, spacing, origin and direction are the geometry's; types wider than 16 bit shrink to what the values need.

    Parameters
    ----------
    like : the image that the geometry was read from. Where both are NIfTI the header is carried over: qform, sform,
        their codes and units.

    Raises
    ------
    UserError : the format cannot hold it.
    """
    path = Path(path)
    if array.shape != geometry.shape:
        raise ValueError(f"array of shape {array.shape} for a geometry of shape {geometry.shape}")
    if array.dtype == bool or array.dtype.itemsize > 2:
        array = array.astype(smallest_dtype(int(array.min(initial=0)), int(array.max(initial=0))))
    suffix = suffix_of(path)
    if label_suffix(suffix) != suffix:
        what = f"label maps cannot be written as {suffix or path.suffix}"
        raise UserError(what, path, f"Use {label_suffix(suffix)}.")
    if suffix in PICTURES:
        fits_picture(path, array, geometry)
    if suffix in GIPL and not np.allclose(geometry.direction, IDENTITY, atol=1e-6):
        raise UserError("GIPL has no place for directions, and the image has some", path, "Use .nii.gz.")
    with atomic(path) as temporary:
        usual = temporary.with_name(stem(temporary) + suffix)  # libraries do not know `.Nii.gz`
        try:
            carried = like is not None and suffix_of(like) in NIFTI and suffix in NIFTI
            if like is not None and carried:
                write_nifti_like(usual, array, like)
            if not carried or read_geometry(usual)[0].differences(geometry):  # such as a header without voxel sizes
                write_file(usual, array, geometry)
            usual.replace(temporary)
        finally:
            usual.unlink(missing_ok=True) if usual != temporary else None
    if suffix in TIFF and geometry.calibrated:
        write_json(path.with_name(stem(path) + ".json"), {"spacing": list(geometry.spacing)})


def _read(path: Path, resolve_palette: bool = True) -> tuple[np.ndarray, Geometry, list[str]]:
    """Array, geometry and notes of a file that is no DICOM."""
    if suffix_of(path) in TIFF:
        return read_tiff(path, resolve_palette)
    return (*read_file(path, resolve_palette), [])


def _without_alpha(path: Path, array: np.ndarray, channels: int | None) -> tuple[np.ndarray, list[str]]:
    if not _has_alpha(path, array.shape[0], channels):
        return array, []
    varies = array[-1].min() != array[-1].max()
    return array[:-1], ["alpha channel dropped" + (" although it varies" if varies else "")]


def _has_alpha(path: Path, found: int, channels: int | None) -> bool:
    """Whether the last of the channels found is transparency and no measurement; never where all are expected."""
    if found not in (2, 4) or found == channels or suffix_of(path) not in PICTURES:
        return False
    return suffix_of(path) not in TIFF or tiff_alpha(path)


def _integers(array: np.ndarray, path: Path) -> np.ndarray:
    if array.dtype.kind in "iub":
        return array
    rounded = np.rint(array)
    with np.errstate(invalid="ignore"):
        wrong = ~(np.abs(array - rounded) < _FRACTION_TOLERANCE)
    if wrong.any():
        examples = ", ".join(f"{v:.6g}" for v in np.unique(array[wrong])[:3])
        what = f"label values are not whole numbers ({examples} and so on in {int(wrong.sum())} of {wrong.size} voxels)"
        if scale := nifti_scale(path):
            what += f": its header multiplies the stored integers by scl_slope {scale[0]:.6g} and adds {scale[1]:.6g}"
            raise UserError(what, path, "Save the labels as an integer type, without scl_slope and scl_inter.")
        raise UserError(what, path, "Resample label maps with nearest neighbour and store integers.")
    low, high = float(rounded.min(initial=0)), float(rounded.max(initial=0))
    if max(-low, high) > _LARGEST:
        raise UserError(
            f"holds label values from {low:.6g} to {high:.6g}, too large for labels", path, "Renumber them."
        )
    return rounded.astype(smallest_dtype(int(low), int(high)))
