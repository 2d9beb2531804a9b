"""Readers and writers of every format but TIFF and DICOM: one file to an array (channels, z, y, x), and back.

| format | header | voxels |
|---|---|---|
| common NIfTI | nifti.py | nifti.py |
| other NIfTI | SimpleITK, otherwise nibabel | nibabel, since ITK pads a truncated file with zeros and reports nothing |
| MGH, Analyze | nibabel | nibabel |
| BMP, PNG of one bit, of a palette, of grey with alpha | Pillow | Pillow, since ITK reads colours for numbers |
| NRRD, MetaImage, GIPL, JPEG, other PNG | SimpleITK | SimpleITK |
"""

from __future__ import annotations

import math
import re
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image as Pillow

from nnunet_lite.data import names, nifti
from nnunet_lite.data.geometry import PICTURE_SPACING, Geometry, Image
from nnunet_lite.data.labels import palette_note, smallest_dtype
from nnunet_lite.errors import UserError

_SAYS_NOTHING = re.compile("ImageIO reader|file type|Error while reading|^Reason:|identify image file")
_SPACING = re.compile(rb"^(?:(?:spacings|space directions):|Element(?:Spacing|Size) *=).*\d", re.MULTILINE)
_NRRD_UNIT = re.compile(rb'^space units:\s*"?([^"\s]+)', re.MULTILINE)
_HEADER_BYTES = 1 << 16  # of NRRD and MetaImage that are searched
_FLAT = 1e-6  # volume of a voxel, of that of a box with the same edges, up to which it is rounding
_ORIENTATION = 274  # the tag of TIFF and EXIF
Pillow.MAX_IMAGE_PIXELS = None  # whole slides exceed the limit of Pillow


def read_file(path: Path, resolve_palette: bool = True) -> Image:
    """Read a file that is neither TIFF nor DICOM.

    Parameters
    ----------
    path : Path
        The file; of header and voxels, either of the two.
    resolve_palette : bool
        Whether a pixel of a palette picture is its colour (3 channels), or the number of its colour.

    Returns
    -------
    Image
        In native byte order.

    Raises
    ------
    UserError
        The file is missing, truncated or unreadable, has more than three dimensions and channels, or complex numbers.
    """
    names.require_readable(path)
    plain = nifti.read_nifti(path) if names.suffix_of(path) in names.NIFTI else None
    if plain and plain[1]:
        return Image(plain[0], plain[1])
    is_picture = names.suffix_of(path) in names.PICTURES
    notes: list[str] = []
    orientation = 1
    header = read_file_header(path)
    if plain and header:
        array, geometry = plain[0], header[0]
    elif header is None or names.suffix_of(path) in names.NIFTI:
        array, from_affine = _read_nibabel(path)
        geometry = header[0] if header else from_affine
    else:
        geometry, channels = header
        if not names.voxel_file(path):
            names.require_bytes(path, channels * math.prod(geometry.shape), is_picture)
        array = _read_pillow(path, resolve_palette) if _needs_pillow(path) else _read_itk(path, *header)
        if unit := _ignored_unit(path):
            notes.append(f"lengths are read as mm, as by ITK and 3D Slicer, and its header says {unit}")
        if is_picture:
            orientation = _picture_notes(path, resolve_palette, notes)
    if np.iscomplexobj(array):
        raise UserError("holds complex numbers", path, "Store the magnitude.")
    if array.shape[1:] != geometry.shape:
        raise UserError(f"has {array.shape[1:]} voxels where its header says {geometry.shape}", path)
    return Image(array, geometry, tuple(notes), is_picture, orientation)


def read_file_header(path: Path) -> tuple[Geometry, int] | None:
    """Read geometry and number of channels of a file that is neither TIFF nor DICOM.

    Parameters
    ----------
    path : Path
        The file.

    Returns
    -------
    tuple or None
        None if only nibabel reads the file.

    Raises
    ------
    UserError
        The file is damaged, or has more than three dimensions and channels.
    """
    if _needs_pillow(path):
        with _open_pillow(path) as picture:
            channels = 3 if picture.mode in ("P", "PA") else len(picture.getbands())
            return _picture_geometry(*picture.size), channels
    if names.suffix_of(path) in names.NIBABEL_ONLY:
        return None
    if names.suffix_of(path) in names.NIFTI and (plain := nifti.read_nifti_header(path)):
        return plain
    reader = sitk().ImageFileReader()
    try:
        with names.usual_name(path) as usual:
            reader.SetFileName(str(usual))
            reader.ReadImageInformation()
    except RuntimeError as error:
        if names.suffix_of(path) in names.NIFTI:
            return None
        raise UserError(_reason(error, path), path, names.AGAIN) from None
    return _itk_geometry(reader, path)


# ------------------------------------------------------------------------------------------------------------ SimpleITK


def sitk() -> Any:
    """Import SimpleITK on first use, without its warnings: most commands on NIfTI files never need it.

    Returns
    -------
    module
        SimpleITK.
    """
    import SimpleITK

    SimpleITK.ProcessObject.SetGlobalWarningDisplay(False)
    return SimpleITK


def _itk_geometry(reader: Any, path: Path) -> tuple[Geometry, int]:
    """Return geometry and number of channels of a header that ITK has read."""
    size, channels = reader.GetSize(), reader.GetNumberOfComponents()
    n, axes = len(size), min(len(size), 3)
    more = [length for length in size[axes:] if length > 1]
    if n == 1 or len(more) + (channels > 1) > 1:
        raise UserError(f"has {n} dimensions {size}", path, "Images have 2 or 3, and a 4th for channels.")
    channels = more[0] if more else channels
    if names.suffix_of(path) in names.PICTURES:
        return _picture_geometry(*size[:2]), channels
    direction = reader.GetDirection()
    cosines = [direction[i * n + j] if max(i, j) < axes else float(i == j) for i in range(3) for j in range(3)]
    spacing = reader.GetSpacing()[:axes][::-1]
    geometry = Geometry(
        shape=(1, *size[:2][::-1]) if axes == 2 else tuple(size[:3][::-1]),
        spacing=(max(spacing) * 999, *spacing) if axes == 2 else spacing,
        origin=(*reader.GetOrigin()[:axes], 0.0)[:3],
        direction=tuple(cosines),
        dimensions=axes,
        calibrated=_states_spacing(path),
        oriented=_states_orientation(reader, names.suffix_of(path)),
    )
    numbers = (*geometry.spacing, *geometry.origin, *geometry.direction)
    if not np.isfinite(numbers).all() or min(geometry.spacing) <= 0:
        raise UserError(f"has impossible voxels: {geometry.describe()}", path, names.AGAIN)
    return geometry, channels


def _states_orientation(reader: Any, suffix: str) -> bool:
    """Return whether a header states the orientation; ITK assumes LPS if it does not."""
    if suffix in names.NIFTI:
        forms = [key for key in ("qform_code", "sform_code") if reader.HasMetaDataKey(key)]
        return not forms or any(int(reader.GetMetaData(key)) > 0 for key in forms)
    if suffix in (".nrrd", ".nhdr"):
        return bool(reader.HasMetaDataKey("NRRD_space"))
    return suffix not in names.GIPL


def _states_spacing(path: Path) -> bool:
    """Return whether a header states the size of voxels; ITK assumes 1 mm if an NRRD or MetaImage does not."""
    if names.suffix_of(path) not in (".nrrd", ".nhdr", ".mha", ".mhd"):
        return True
    with path.open("rb") as file:
        return bool(_SPACING.search(file.read(_HEADER_BYTES)))


def _ignored_unit(path: Path) -> str | None:
    """Return the unit that the header of an NRRD states, if it is not mm: ITK neither uses nor keeps it."""
    if names.suffix_of(path) not in (".nrrd", ".nhdr"):
        return None
    with path.open("rb") as file:
        found = _NRRD_UNIT.search(file.read(_HEADER_BYTES).partition(b"\n\n")[0])
    unit = found[1].decode(errors="replace") if found else "mm"
    return None if unit in ("mm", "millimeter", "millimeters", "???") else unit


def _read_itk(path: Path, geometry: Geometry, channels: int) -> np.ndarray:
    try:
        with names.usual_name(path) as usual:
            image = sitk().ReadImage(str(usual))
    except RuntimeError as error:
        raise UserError(_reason(error, path), path, names.AGAIN) from None
    array = sitk().GetArrayFromImage(image)
    if image.GetNumberOfComponentsPerPixel() > 1:
        array = np.moveaxis(array, -1, 0)
    if array.size != channels * np.prod(geometry.shape):
        raise UserError(f"has {array.size} values where its header says {channels} x {geometry.shape}", path)
    return np.ascontiguousarray(array.reshape(channels, *geometry.shape))


def _reason(error: BaseException, path: Path) -> str:
    """Say why a library cannot read a file: the last line of its error, if that says something."""
    lines = [re.sub(r"^.*?ITK ERROR: (\w+\(0x\w+\): )?|sitk::ERROR: ", "", line) for line in str(error).splitlines()]
    lines = [line.strip(" .").replace(". ", "; ") for line in lines if line.strip()]
    if not lines or _SAYS_NOTHING.search(lines[-1]):
        return f"is damaged, truncated or no {names.suffix_of(path)} file"
    return f"cannot be read ({lines[-1]})"


# -------------------------------------------------------------------------------------------------------------- nibabel


def _read_nibabel(path: Path) -> tuple[np.ndarray, Geometry]:
    """Read array (channels, z, y, x) and geometry, converted from RAS to LPS."""
    try:
        with names.usual_name(path) as usual:
            image = nifti.nib().load(usual)
            stored = image.dataobj
            names.require_bytes(Path(image.file_map["image"].filename), math.prod(stored.shape) * stored.dtype.itemsize)
            nifti.require_voxel_sizes(image, path)
            array = np.asanyarray(stored)
    except (MemoryError, UserError):
        raise
    except Exception as error:  # a parser of damaged bytes raises any exception
        problem = names.gzip_defect(path) if path.suffix.lower() in (".gz", ".mgz") else None
        if short := re.search(r"Expected (\d+) bytes, got (\d+)", str(error)):
            problem = f"is truncated: it holds {short[2]} of {short[1]} bytes of voxels"
        raise UserError(problem or _reason(error, path), path, names.AGAIN) from None
    if array.dtype.names:  # an RGB NIfTI: the channels are fields of a record
        array = np.stack([array[name] for name in array.dtype.names], axis=-1)
    array = array.reshape(array.shape + (1,) * (2 - array.ndim))
    while array.ndim > 3 and array.shape[-1] == 1:
        array = array[..., 0]
    array = np.squeeze(array, 3) if array.ndim == 5 and array.shape[3] == 1 else array
    if array.ndim > 4:
        what = f"has {array.ndim} dimensions {array.shape}"
        raise UserError(what, path, "Images have 2 or 3, and a 4th for channels.")
    dimensions = min(array.ndim, 3)
    array = array.reshape(array.shape + (1,) * (4 - array.ndim)).transpose(3, 2, 1, 0)
    widened = array.dtype == np.float64 and stored.dtype != np.float64  # by scl_slope
    array = np.ascontiguousarray(array, dtype=np.float32 if widened else array.dtype.newbyteorder("="))
    affine = np.diag([-1.0, -1.0, 1.0, 1.0]) @ np.asarray(image.affine, np.float64)
    if isinstance(image.header, nifti.nib().Nifti1Header):
        affine[:3] *= nifti.millimetres(image.header)
    lengths = np.linalg.norm(affine[:3, :3], axis=0)
    if not (np.isfinite(affine).all() and abs(np.linalg.det(affine[:3, :3])) > _FLAT * lengths.prod()):
        fix = "Export it again, or correct its affine matrix (in NIfTI, sform or qform)."
        raise UserError("has an affine matrix without volume: its axes are in one plane", path, fix)
    x, y, z = lengths.tolist()
    return array, Geometry(
        shape=array.shape[1:],
        spacing=(max(x, y) * 999 if dimensions == 2 else z, y, x),
        origin=tuple(affine[:3, 3].tolist()),
        direction=tuple((affine[:3, :3] / lengths).ravel().tolist()),
        dimensions=dimensions,
        oriented=not isinstance(image.header, nifti.nib().AnalyzeHeader) or nifti.has_forms(image.header),
    )


# ------------------------------------------------------------------------------------------------------------- pictures


def _picture_geometry(columns: int, rows: int) -> Geometry:
    """Return the geometry of a picture, which has no physical size."""
    return Geometry((1, rows, columns), PICTURE_SPACING, dimensions=2, calibrated=False)


def _picture_notes(path: Path, resolve_palette: bool, notes: list[str]) -> int:
    """Return the orientation tag of a picture that is no TIFF, and note what may mislead."""
    with _open_pillow(path) as picture:
        orientation = 1
        if "exif" in picture.info:
            with suppress(Exception):  # a parser of damaged bytes raises any exception
                orientation = int(picture.getexif().get(_ORIENTATION, 1))
        if not resolve_palette and picture.mode in ("P", "PA"):
            notes.append(palette_note(np.reshape(picture.getpalette("RGB"), (-1, 3))))
    if orientation not in range(2, 9):
        return 1
    notes.append(f"read as stored: its orientation tag ({orientation}), by which programs turn it, is ignored")
    return orientation


def _needs_pillow(path: Path) -> bool:
    """Return whether ITK would misread a picture, or refuse it, as grey with one transparent value."""
    if names.suffix_of(path) != ".png":
        return names.suffix_of(path) == ".bmp"
    with _open_pillow(path) as picture:
        return picture.mode in ("1", "P", "PA", "LA") or (
            "transparency" in picture.info and len(picture.getbands()) == 1
        )


def _open_pillow(path: Path) -> Any:
    try:
        return Pillow.open(path)
    except OSError:
        raise UserError(f"is damaged or no {names.suffix_of(path)} file", path, names.AGAIN) from None


def _read_pillow(path: Path, resolve_palette: bool) -> np.ndarray:
    try:
        with _open_pillow(path) as picture:
            if picture.mode in ("P", "PA"):
                pixels = picture.convert("RGBA").convert("RGB") if resolve_palette else picture.convert("P")
            else:
                pixels = picture.convert("L") if picture.mode == "1" else picture
            array = np.asarray(pixels)
    except (OSError, SyntaxError, ValueError) as error:
        raise UserError(_reason(error, path), path, names.AGAIN) from None
    return np.ascontiguousarray(np.moveaxis(array, 2, 0))[:, None] if array.ndim == 3 else array[None, None]


# -------------------------------------------------------------------------------------------------------------- writing


def require_picture_values(path: Path, array: np.ndarray, geometry: Geometry) -> None:
    """Refuse a label map that a picture format cannot store.

    Parameters
    ----------
    path : Path
        The picture to write.
    array : ndarray, shape (z, y, x)
        Integers.
    geometry : Geometry
        Of the array.

    Raises
    ------
    UserError
        The array is a volume, or its values do not fit.
    """
    suffix = names.suffix_of(path)
    top = 255 if suffix == ".bmp" else 65535
    low, high = int(array.min(initial=0)), int(array.max(initial=0))
    if geometry.shape[0] > 1 and suffix not in names.TIFF:
        raise UserError(f"a volume of shape {geometry.shape} cannot be written as {suffix}", path, "Use .nii.gz.")
    if low < 0 or high > top:
        raise UserError(f"label values {low}..{high} do not fit into {suffix}", path, "Use .nii.gz.")


def write_file(path: Path, array: np.ndarray, geometry: Geometry) -> None:
    """Write a label map in the format of the path's ending.

    Parameters
    ----------
    path : Path
        With an ending in lower case.
    array : ndarray, shape (z, y, x)
        Integers.
    geometry : Geometry
        Of the array.
    """
    suffix = names.suffix_of(path)
    if suffix in names.NIFTI:
        nifti.write_nifti(path, array, geometry)
    elif suffix in (".mgz", ".mgh"):
        high = array.max()
        kind = np.uint8 if array.min() >= 0 and high <= 255 else np.int16 if high < 1 << 15 else np.int32
        nifti.nib().save(nifti.nib().MGHImage(array.transpose(2, 1, 0).astype(kind), nifti.ras_affine(geometry)), path)
    else:
        _write_itk(path, array, geometry)


def _write_itk(path: Path, array: np.ndarray, geometry: Geometry) -> None:
    picture = names.suffix_of(path) in names.PICTURES
    flat = geometry.dimensions == 2 or picture
    if picture:
        array = array.astype(smallest_dtype(0, int(array.max(initial=0))))
    image = sitk().GetImageFromArray(array[0] if flat else array)
    matrix = np.reshape(geometry.direction, (3, 3))
    image.SetSpacing(geometry.spacing[::-1][:2] if flat else geometry.spacing[::-1])
    image.SetOrigin(geometry.origin[:2] if flat else geometry.origin)
    image.SetDirection((matrix[:2, :2] if flat else matrix).ravel().tolist())
    sitk().WriteImage(image, str(path), useCompression=names.suffix_of(path) != ".bmp")
