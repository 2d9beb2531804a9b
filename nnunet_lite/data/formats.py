"""File formats: one file to an array (channels, z, y, x) with its geometry, and a label map to a file.

nifti.py reads plain NIfTI; SimpleITK the other headers, and most voxels. nibabel reads the voxels of the other NIfTI
files (ITK pads a truncated one with zeros in silence) and whole files that ITK refuses: sheared NIfTI, NIfTI-2, MGH,
Analyze, PAR/REC, AFNI. Pillow reads what ITK gets wrong: BMP (three channels of grey), black and white, grey with
alpha, palettes (no numbers of the colours). tiff.py reads TIFF.
"""

from __future__ import annotations

import logging
import math
import re
from pathlib import Path
from typing import Any

import numpy as np

from nnunet_lite.data.complete import AGAIN, elsewhere, gzip_defect, must_hold
from nnunet_lite.data.geometry import PICTURE_SPACING, Geometry
from nnunet_lite.data.labels import smallest_dtype
from nnunet_lite.data.names import (
    GIPL,
    NIBABEL_ONLY,
    NIFTI,
    PAIRS,
    PICTURES,
    TIFF,
    must_be_readable,
    suffix_of,
    usual_name,
)
from nnunet_lite.data.nifti import must_have_sizes, pixdim_defect, read_nifti, read_nifti_header
from nnunet_lite.errors import UserError

_APART = 0.25  # of a voxel: how far qform and sform of an image may be apart; a quaternion rounds by a tenth


def read_file(path: Path, resolve_palette: bool = True) -> tuple[np.ndarray, Geometry]:
    """Array (channels, z, y, x) in native byte order, and geometry.

    Parameters
    ----------
    resolve_palette : whether a pixel of a palette picture is its colour (3 channels), or the number of its colour.

    Raises
    ------
    UserError : missing, truncated or unreadable; more than three dimensions and channels; complex numbers.
    """
    must_be_readable(path)
    plain = read_nifti(path) if suffix_of(path) in NIFTI else None
    if plain and plain[1]:
        return plain[0], plain[1]
    header = read_header(path)
    if plain and header:
        array, geometry = plain[0], header[0]
    elif header is None or suffix_of(path) in NIFTI:
        array, from_affine = _read_nibabel(path)
        geometry = header[0] if header else from_affine
    else:
        geometry, channels = header
        if not elsewhere(path):
            must_hold(path, channels * math.prod(geometry.shape), suffix_of(path) in PICTURES)
        array = _pillow_pixels(path, resolve_palette) if _is_pillows(path) else _itk_voxels(path, *header)
    if np.iscomplexobj(array):
        raise UserError("holds complex numbers", path, "Store the magnitude.")
    if array.shape[1:] != geometry.shape:
        raise UserError(f"has {array.shape[1:]} voxels where its header says {geometry.shape}", path)
    return array, geometry


def _sitk() -> Any:
    import SimpleITK

    SimpleITK.ProcessObject.SetGlobalWarningDisplay(False)
    return SimpleITK


def _nibabel() -> Any:
    import nibabel
    from nibabel import imageglobals

    imageglobals.logger.setLevel(logging.CRITICAL)  # what it corrects of a header by itself is reported here
    return nibabel


def read_header(path: Path) -> tuple[Geometry, int] | None:
    """Geometry and number of channels from the header; None where only nibabel reads the file."""
    if _is_pillows(path):
        with _pillow(path) as picture:
            channels = 3 if picture.mode in ("P", "PA") else len(picture.getbands())
            return _picture_geometry(*picture.size), channels
    if suffix_of(path) in NIBABEL_ONLY:
        return None
    if suffix_of(path) in NIFTI and (plain := read_nifti_header(path)):
        return plain
    reader = _sitk().ImageFileReader()
    try:
        with usual_name(path) as named:
            reader.SetFileName(str(named))
            reader.ReadImageInformation()
    except RuntimeError as error:
        if suffix_of(path) in NIFTI:
            return None
        raise UserError(f"cannot be read ({_reason(error)})", path) from None
    size = reader.GetSize()
    channels = reader.GetNumberOfComponents()
    axes = min(len(size), 3)
    more = [n for n in size[axes:] if n > 1]
    if len(size) == 1 or len(more) + (channels > 1) > 1:
        raise UserError(f"has {len(size)} dimensions {size}", path, "Images have 2 or 3, and a 4th for channels.")
    channels = more[0] if more else channels
    n = len(size)
    direction = reader.GetDirection()
    cosines = [[direction[i * n + j] if max(i, j) < axes else float(i == j) for j in range(3)] for i in range(3)]
    spacing = reader.GetSpacing()[:axes][::-1]
    if suffix_of(path) in PICTURES:
        return _picture_geometry(*size[:2]), channels
    geometry = Geometry(
        shape=(1, *size[:2][::-1]) if axes == 2 else tuple(size[:3][::-1]),
        spacing=(max(spacing) * 999, *spacing) if axes == 2 else spacing,
        origin=(*reader.GetOrigin()[:axes], 0.0)[:3],
        direction=tuple(c for row in cosines for c in row),
        dimensions=axes,
        oriented=_states_orientation(reader, suffix_of(path)),
    )
    _must_be_a_place(geometry, path)
    return geometry, channels


def _states_orientation(reader: Any, suffix: str) -> bool:
    """Whether a header that ITK has read says where the patient's sides are; ITK assumes LPS where it does not."""
    if suffix in NIFTI:
        forms = [key for key in ("qform_code", "sform_code") if reader.HasMetaDataKey(key)]
        return not forms or any(int(reader.GetMetaData(key)) > 0 for key in forms)
    if suffix in (".nrrd", ".nhdr"):
        return bool(reader.HasMetaDataKey("NRRD_space"))
    return suffix not in GIPL


def _must_be_a_place(geometry: Geometry, path: Path) -> None:
    """Refuse voxels of no or negative size, or at NaN."""
    numbers = (*geometry.spacing, *geometry.origin, *geometry.direction)
    if not np.isfinite(numbers).all() or min(geometry.spacing) <= 0:
        raise UserError(f"has voxels that cannot be: {geometry.describe()}", path, AGAIN)


def _picture_geometry(columns: int, rows: int) -> Geometry:
    """Pictures have no physical size."""
    return Geometry((1, rows, columns), PICTURE_SPACING, dimensions=2, calibrated=False)


def picture_mode(path: Path) -> str:
    """How a picture (no TIFF) stores its pixels, in Pillow's words where that matters: P for palette, LA and so on."""
    if suffix_of(path) == ".png":
        with path.open("rb") as file:
            return {b"\x03": "P", b"\x04": "LA"}.get(file.read(26)[25:], "RGB")
    if suffix_of(path) == ".bmp":
        with _pillow(path) as picture:
            return str(picture.mode)
    return "RGB"


def is_palette(path: Path) -> bool:
    """Whether a file is a picture whose pixels are indices into a table of colours."""
    return picture_mode(path) in ("P", "PA")


def _is_pillows(path: Path) -> bool:
    return suffix_of(path) == ".bmp" or picture_mode(path) in ("1", "P", "PA", "LA")


def _pillow(path: Path) -> Any:
    from PIL import Image

    Image.MAX_IMAGE_PIXELS = None  # whole slides are larger than Pillow dares to open
    try:
        return Image.open(path)
    except OSError:
        raise UserError(f"is no {suffix_of(path)} file", path, AGAIN) from None


def _pillow_pixels(path: Path, resolve_palette: bool) -> np.ndarray:
    try:
        with _pillow(path) as picture:
            if picture.mode in ("P", "PA"):
                pixels = picture.convert("RGBA").convert("RGB") if resolve_palette else picture.convert("P")
            else:
                pixels = picture.convert("L") if picture.mode == "1" else picture
            array = np.asarray(pixels)
    except (OSError, SyntaxError, ValueError) as error:
        raise UserError(f"cannot be read ({_reason(error)})", path, AGAIN) from None
    return np.ascontiguousarray(np.moveaxis(array, 2, 0))[:, None] if array.ndim == 3 else array[None, None]


def _itk_voxels(path: Path, geometry: Geometry, channels: int) -> np.ndarray:
    sitk = _sitk()
    try:
        with usual_name(path) as named:
            image = sitk.ReadImage(str(named))
    except RuntimeError as error:
        raise UserError(f"cannot be read ({_reason(error)})", path, AGAIN) from None
    array = sitk.GetArrayFromImage(image)
    if image.GetNumberOfComponentsPerPixel() > 1:
        array = np.moveaxis(array, -1, 0)
    if array.size != channels * np.prod(geometry.shape):
        raise UserError(f"has {array.size} values where its header says {channels} x {geometry.shape}", path)
    return np.ascontiguousarray(array.reshape(channels, *geometry.shape))


def has_forms(header: Any) -> bool:
    """Whether a header of nibabel, of NIfTI or Analyze, has a qform or an sform, which place the image."""
    codes = [key for key in ("qform_code", "sform_code") if key in header.keys()]  # noqa: SIM118 (no mapping)
    return any(int(header[key]) > 0 for key in codes)


def _read_nibabel(path: Path) -> tuple[np.ndarray, Geometry]:
    """As nibabel reads it; axes and affine turned from RAS to ITK's LPS."""
    import nibabel

    try:
        with usual_name(path) as named:
            image: Any = _nibabel().load(named)
            stored = image.dataobj
            must_hold(Path(image.file_map["image"].filename), math.prod(stored.shape) * stored.dtype.itemsize)
            must_have_sizes(image, path)
            array = np.asanyarray(stored)
    except (MemoryError, UserError):
        raise
    except Exception as error:  # a parser of damaged bytes raises whatever it stumbles over
        problem = gzip_defect(path) if path.suffix.lower() in (".gz", ".mgz") else None
        if short := re.search(r"Expected (\d+) bytes, got (\d+)", str(error)):
            problem = f"is truncated: it holds {short[2]} of {short[1]} bytes of voxels"
        raise UserError(problem or f"cannot be read ({_reason(error)})", path, AGAIN) from None
    if array.dtype.names:  # an RGB NIfTI: the channels are fields of a record
        array = np.stack([array[name] for name in array.dtype.names], axis=-1)
    array = array.reshape(array.shape + (1,) * (2 - array.ndim))
    while array.ndim > 3 and array.shape[-1] == 1:
        array = array[..., 0]
    array = np.squeeze(array, 3) if array.ndim == 5 and array.shape[3] == 1 else array
    if array.ndim > 4:
        raise UserError(
            f"has {array.ndim} dimensions {array.shape}", path, "Images have 2 or 3, and a 4th for channels."
        )
    dimensions = 2 if array.ndim == 2 else 3
    array = array.reshape(array.shape + (1,) * (4 - array.ndim)).transpose(3, 2, 1, 0)
    kind = array.dtype.newbyteorder("=") if array.dtype != np.float64 or stored.dtype == np.float64 else np.float32
    array = np.ascontiguousarray(array, dtype=kind)
    affine = np.diag([-1.0, -1.0, 1.0, 1.0]) @ np.asarray(image.affine, np.float64)
    if isinstance(image.header, nibabel.Nifti1Header):
        affine[:3] *= _millimetres(image.header)
    lengths = np.linalg.norm(affine[:3, :3], axis=0)
    if not (np.isfinite(affine).all() and np.isfinite(lengths).all() and (lengths > 0).all()):
        raise UserError("has an affine matrix without volume", path)
    spacing = tuple(float(s) for s in lengths[::-1])
    geometry = Geometry(
        shape=array.shape[1:],
        spacing=(max(spacing[1:]) * 999, *spacing[1:]) if dimensions == 2 else spacing,  # type: ignore[arg-type]
        origin=tuple(float(v) for v in affine[:3, 3]),  # type: ignore[arg-type]
        direction=tuple(float(v) for v in (affine[:3, :3] / lengths).ravel()),
        dimensions=dimensions,
        oriented=not isinstance(image.header, nibabel.AnalyzeHeader) or has_forms(image.header),
    )
    return array, geometry


def _reason(error: BaseException) -> str:
    """The last telling line of a library's error."""
    lines = [re.sub(r"^.*?ITK ERROR: (\w+\(0x\w+\): )?|sitk::ERROR: ", "", line) for line in str(error).splitlines()]
    return next(
        (line.strip(" .").replace(". ", "; ") for line in reversed(lines) if line.strip()), type(error).__name__
    )


def _millimetres(header: Any) -> float:
    """The unit of a NIfTI header in mm: metres, micrometres, and mm for any other number."""
    return {1: 1e3, 3: 1e-3}.get(int(header["xyzt_units"]) & 7, 1.0)


def nifti_scale(path: Path) -> tuple[float, float] | None:
    """Slope and intercept by which a NIfTI or Analyze header changes the stored integers; None where it does not."""
    if suffix_of(path) not in (*NIFTI, *PAIRS):
        return None
    with usual_name(path) as named:
        stored: Any = _nibabel().load(named).dataobj
    return None if (stored.slope, stored.inter) == (1, 0) else (float(stored.slope), float(stored.inter))


def forms_apart(path: Path, geometry: Geometry) -> str | None:
    """What a NIfTI image says of its own place in two ways that do not agree, with the numbers; None where it does not.

    Parameters
    ----------
    path : Path
        An image of any format.
    geometry : Geometry
        As it was read.
    """
    if suffix_of(path) not in NIFTI:
        return None
    if read_nifti_header(path):  # the forms are equal, or there is one, or pixdim is wrong
        return pixdim_defect(path)
    with usual_name(path) as named:
        header = _nibabel().load(named).header
    scale = np.diag([_millimetres(header)] * 3 + [1.0])
    try:
        stated = {"qform": header.get_qform(coded=True)[0], "sform": header.get_sform(coded=True)[0]}
    except ValueError:
        return "its qform is no rotation"
    forms = {name: scale @ form for name, form in stated.items() if form is not None}
    corners = np.array([(x, y, z, 1) for x in (0, 1) for y in (0, 1) for z in (0, 1)], float)
    corners[:, :3] *= np.subtract(geometry.shape[::-1], 1)

    def apart(one: np.ndarray, other: np.ndarray) -> float:
        return float(np.linalg.norm((corners @ (one - other).T)[:, : geometry.dimensions], axis=1).max())

    off = {name: apart(form, ras_affine(geometry)) for name, form in forms.items()}
    allowed = _APART * min(geometry.spacing)
    if len(forms) == 2 and (distance := apart(*forms.values())) > allowed:
        taken = min(off, key=lambda name: off[name])
        return f"its qform and its sform place it up to {distance:.4g} mm apart; the {taken} is used"
    for name in (name for name, distance in off.items() if distance > allowed):
        of_form = ", ".join(f"{size:.6g}" for size in np.linalg.norm(forms[name][:3, :3], axis=0))
        used = ", ".join(f"{size:.6g}" for size in geometry.spacing[::-1])
        return f"its {name} has voxels of ({of_form}) mm (x, y, z), its pixdim of ({used}) mm, which is used"
    return None


def fits_picture(path: Path, array: np.ndarray, geometry: Geometry) -> None:
    suffix = suffix_of(path)
    top = 255 if suffix == ".bmp" else 65535
    low, high = int(array.min(initial=0)), int(array.max(initial=0))
    if geometry.dimensions == 3 and suffix not in TIFF:
        raise UserError(f"a volume of shape {geometry.shape} cannot be written as {suffix}", path, "Use .nii.gz.")
    if low < 0 or high > top:
        raise UserError(f"label values {low}..{high} do not fit into {suffix}", path, "Use .nii.gz.")


def write_file(path: Path, array: np.ndarray, geometry: Geometry) -> None:
    """Write integers (z, y, x) in the format of the path's ending."""
    if suffix_of(path) in (".mgz", ".mgh") or (suffix_of(path) in NIFTI and not _is_orthonormal(geometry.direction)):
        _write_nibabel(path, array, geometry)
    else:
        _write_itk(path, array, geometry)


def _is_orthonormal(direction: tuple[float, ...]) -> bool:
    matrix = np.reshape(direction, (3, 3))
    return bool(np.allclose(matrix @ matrix.T, np.eye(3), atol=1e-4))


def _write_itk(path: Path, array: np.ndarray, geometry: Geometry) -> None:
    sitk = _sitk()
    flat = geometry.dimensions == 2
    if suffix_of(path) in PICTURES:
        array = array.astype(smallest_dtype(0, int(array.max(initial=0))))
    image = sitk.GetImageFromArray(array[0] if flat else array)
    matrix = np.reshape(geometry.direction, (3, 3))
    image.SetSpacing(geometry.spacing[::-1][:2] if flat else geometry.spacing[::-1])
    image.SetOrigin(geometry.origin[:2] if flat else geometry.origin)
    image.SetDirection((matrix[:2, :2] if flat else matrix).ravel().tolist())
    sitk.WriteImage(image, str(path), useCompression=suffix_of(path) not in (".nii", ".bmp"))


def write_nifti_like(path: Path, array: np.ndarray, like: Path, slope: float = 1) -> None:
    """Write integers (z, y, x) as NIfTI with the header of a NIfTI image on the same grid; values are times `slope`."""
    import nibabel

    with usual_name(like) as named:
        source = _nibabel().load(named)
    header = source.header.copy()
    header.set_data_dtype(array.dtype)
    header["cal_min"] = header["cal_max"] = 0  # the image's window
    header.set_intent("none")
    image = source.__class__(_as_stored(array, len(source.shape)), None, header)
    image.header.set_slope_inter(slope, 0)
    nibabel.save(image, path)


def write_share(path: Path, array: np.ndarray, geometry: Geometry, steps: int, like: Path) -> None:
    """Write shares of one, stored as integers (z, y, x) up to `steps`, as NIfTI that programs show as 0 to 1.

    Parameters
    ----------
    like : the image that the geometry was read from; where it is NIfTI its header is carried over, as to a label map.
    """
    import nibabel

    if suffix_of(like) in NIFTI:
        write_nifti_like(path, array, like, 1 / steps)
        return
    affine = ras_affine(geometry)
    image = nibabel.Nifti1Image(_as_stored(array, geometry.dimensions), affine)
    image.set_sform(affine, "scanner")
    if _is_orthonormal(geometry.direction):
        image.set_qform(affine, "scanner")
    image.header.set_xyzt_units("mm")
    image.header.set_slope_inter(1 / steps, 0)
    nibabel.save(image, path)


def _as_stored(array: np.ndarray, dimensions: int) -> np.ndarray:
    """An array (z, y, x) in the order of NIfTI: (x, y, z), or (x, y) in two dimensions."""
    return array[0].T if dimensions == 2 else array.transpose(2, 1, 0)


def nifti_bytes(array: np.ndarray, geometry: Geometry) -> bytes:
    """A NIfTI file in memory of an array (z, y, x), or of a colour picture's bytes (3, z, y, x)."""
    import nibabel

    if array.ndim == 4:
        array = np.ascontiguousarray(np.moveaxis(array, 0, -1)).view([("R", "u1"), ("G", "u1"), ("B", "u1")])[..., 0]
    contents: bytes = nibabel.Nifti1Image(array.transpose(2, 1, 0), ras_affine(geometry)).to_bytes()
    return contents


def ras_affine(geometry: Geometry) -> np.ndarray:
    """The affine (4, 4) from voxels (x, y, z) to RAS mm; a 2D image is as thick as its pixels are wide."""
    affine = np.eye(4)
    z, y, x = geometry.spacing
    affine[:3, :3] = np.reshape(geometry.direction, (3, 3)) * (x, y, max(x, y) if geometry.dimensions == 2 else z)
    affine[:3, 3] = geometry.origin
    return np.diag([-1.0, -1.0, 1.0, 1.0]) @ affine


def _write_nibabel(path: Path, array: np.ndarray, geometry: Geometry) -> None:
    """MGH, and NIfTI with a sheared affine, which ITK would straighten."""
    import nibabel

    affine = ras_affine(geometry)
    if suffix_of(path) in NIFTI:
        nibabel.save(nibabel.Nifti1Image(_as_stored(array, geometry.dimensions), affine), path)
        return
    kind = np.uint8 if array.min() >= 0 and array.max() <= 255 else np.int16 if array.max() < 1 << 15 else np.int32
    nibabel.save(nibabel.MGHImage(array.transpose(2, 1, 0).astype(kind), affine), path)
