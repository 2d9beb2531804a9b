"""File formats: one file to an array (channels, z, y, x) with its geometry, and a label map to a file.

nifti.py reads plain NIfTI; SimpleITK the other headers, and most voxels. nibabel reads the voxels of the other NIfTI
files (ITK pads a truncated one with zeros in silence) and whole files that ITK refuses: sheared NIfTI, NIfTI-2, MGH,
Analyze, PAR/REC, AFNI. Pillow reads what ITK gets wrong: BMP (three channels of grey), black and white, grey with
alpha, palettes (no numbers of the colours).
"""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any

import numpy as np

from nnunet_lite.data.complete import AGAIN, defect, elsewhere, gzip_defect, must_hold, tiff_samples
from nnunet_lite.data.geometry import Geometry
from nnunet_lite.data.labels import smallest_dtype
from nnunet_lite.data.nifti import read_nifti, read_nifti_header
from nnunet_lite.errors import UserError
from nnunet_lite.workspace import read_json

NIFTI = (".nii.gz", ".nii")
PICTURES = (".png", ".tif", ".tiff", ".bmp", ".jpg", ".jpeg")
NIBABEL_ONLY = (".mgz", ".mgh", ".hdr", ".par", ".head")
SUFFIXES = (*NIFTI, ".nrrd", ".nhdr", ".mha", ".mhd", *PICTURES, *NIBABEL_ONLY)

_PICTURE_SPACING = (999.0, 1.0, 1.0)


def suffix_of(path: Path) -> str:
    """The ending of a supported file, both parts of a double one, in lower case; empty where it is not supported."""
    name = path.name.lower()
    return next((s for s in SUFFIXES if name.endswith(s)), "")


def stem(path: Path) -> str:
    """The file's name without its (double) ending."""
    return path.name[: len(path.name) - len(suffix_of(path) or path.suffix)]


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


def must_be_readable(path: Path) -> None:
    if not suffix_of(path):
        raise UserError("is of no supported format", path, f"Supported are {' '.join(SUFFIXES)}.")
    problem = defect(path)
    if problem:
        raise UserError(problem, path, AGAIN if path.exists() else "")


def _sitk() -> Any:
    import SimpleITK

    SimpleITK.ProcessObject.SetGlobalWarningDisplay(False)
    return SimpleITK


def read_header(path: Path) -> tuple[Geometry, int] | None:
    """Geometry and number of channels from the header; None where only nibabel reads the file."""
    if _is_pillows(path):
        with _pillow(path) as picture:
            pages = getattr(picture, "n_frames", 1)
            channels = 3 if picture.mode in ("P", "PA") else len(picture.getbands())
            return _picture_geometry(path, (*picture.size, pages)), channels
    if suffix_of(path) in NIBABEL_ONLY:
        return None
    if suffix_of(path) in NIFTI and (plain := read_nifti_header(path)):
        return plain
    reader = _sitk().ImageFileReader()
    reader.SetFileName(str(path))
    try:
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
        if suffix_of(path) in (".tif", ".tiff") and channels != (samples := tiff_samples(path)):
            fix = "Save it as RGB, with planar configuration, or one file per channel."
            raise UserError(f"holds {samples} interleaved channels, of which only {channels} can be read", path, fix)
        return _picture_geometry(path, size), channels
    geometry = Geometry(
        shape=(1, *size[:2][::-1]) if axes == 2 else tuple(size[:3][::-1]),
        spacing=(max(spacing) * 999, *spacing) if axes == 2 else spacing,
        origin=(*reader.GetOrigin()[:axes], 0.0)[:3],
        direction=tuple(c for row in cosines for c in row),
        dimensions=axes,
    )
    _must_be_a_place(geometry, path)
    return geometry, channels


def _must_be_a_place(geometry: Geometry, path: Path) -> None:
    """Refuse voxels of no or negative size, or at NaN."""
    numbers = (*geometry.spacing, *geometry.origin, *geometry.direction)
    if not np.isfinite(numbers).all() or min(geometry.spacing) <= 0:
        raise UserError(f"has voxels of {geometry.spacing} mm at {geometry.origin}, which cannot be", path, AGAIN)


def _picture_geometry(path: Path, size: tuple[int, ...]) -> Geometry:
    """Pictures have no physical size. The pages of a TIFF are a volume whose spacing a file `<case>.json` may tell."""
    if len(size) == 2 or size[2] == 1:
        return Geometry((1, size[1], size[0]), _PICTURE_SPACING, dimensions=2)
    spacing = (1.0, 1.0, 1.0)
    for name in (stem(path), re.sub(r"_\d{4}$", "", stem(path))):
        sidecar = path.with_name(name + ".json")
        if sidecar.is_file():
            found = read_json(sidecar)
            if not isinstance(found, dict) or "spacing" not in found:  # it tells of something else
                continue
            told = found["spacing"]
            numbers = isinstance(told, list) and all(type(s) in (int, float) and 0 < s < math.inf for s in told)
            if not numbers or len(told) != 3:
                raise UserError(f"spacing is {told}", sidecar, "Give three numbers in mm: [z, y, x].")
            spacing = (float(told[0]), float(told[1]), float(told[2]))
            break
    return Geometry((size[2], size[1], size[0]), spacing, oriented=False)


def picture_mode(path: Path) -> str:
    """How a picture stores its pixels, in Pillow's words where that matters: P for palette, RGBA and so on."""
    if suffix_of(path) not in PICTURES or suffix_of(path) in (".jpg", ".jpeg"):
        return "RGB"
    if suffix_of(path) == ".png":
        with path.open("rb") as file:
            return {b"\x03": "P", b"\x04": "LA"}.get(file.read(26)[25:], "RGB")
    try:
        with _pillow(path) as picture:
            return str(picture.mode)
    except UserError:  # a kind of TIFF that only ITK knows, or none at all, which it will say
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
    pages = []
    try:
        with _pillow(path) as picture:
            for page in range(getattr(picture, "n_frames", 1)):
                picture.seek(page)
                if picture.mode in ("P", "PA"):
                    colours = picture.convert("RGBA").convert("RGB") if resolve_palette else picture.convert("P")
                    pages.append(np.asarray(colours))
                else:
                    pages.append(np.asarray(picture.convert("L") if picture.mode == "1" else picture))
    except (OSError, SyntaxError, ValueError) as error:
        raise UserError(f"cannot be read ({_reason(error)})", path, AGAIN) from None
    array = np.stack(pages)
    return np.ascontiguousarray(np.moveaxis(array, 3, 0)) if array.ndim == 4 else array[None]


def _itk_voxels(path: Path, geometry: Geometry, channels: int) -> np.ndarray:
    sitk = _sitk()
    try:
        image = sitk.ReadImage(str(path))
    except RuntimeError as error:
        raise UserError(f"cannot be read ({_reason(error)})", path, AGAIN) from None
    array = sitk.GetArrayFromImage(image)
    if image.GetNumberOfComponentsPerPixel() > 1:
        array = np.moveaxis(array, -1, 0)
    if array.size != channels * np.prod(geometry.shape):
        raise UserError(f"has {array.size} values where its header says {channels} x {geometry.shape}", path)
    return np.ascontiguousarray(array.reshape(channels, *geometry.shape))


def _read_nibabel(path: Path) -> tuple[np.ndarray, Geometry]:
    """As nibabel reads it; axes and affine turned from RAS to ITK's LPS."""
    import nibabel
    from nibabel.imageglobals import LoggingOutputSuppressor

    try:
        with LoggingOutputSuppressor():  # what it mends of a header by itself
            image: Any = nibabel.load(path)
            stored = image.dataobj
        must_hold(Path(image.file_map["image"].filename), math.prod(stored.shape) * stored.dtype.itemsize)
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
    )
    return array, geometry


def _reason(error: BaseException) -> str:
    """The last telling line of a library's error."""
    lines = [re.sub(r"^.*?ITK ERROR: (\w+\(0x\w+\): )?|sitk::ERROR: ", "", line) for line in str(error).splitlines()]
    return next(
        (line.strip(" .").replace(". ", "; ") for line in reversed(lines) if line.strip()), type(error).__name__
    )


def fits_picture(path: Path, array: np.ndarray, geometry: Geometry) -> None:
    suffix = suffix_of(path)
    top = 255 if suffix == ".bmp" else 65535
    low, high = int(array.min(initial=0)), int(array.max(initial=0))
    if geometry.dimensions == 3 and suffix not in (".tif", ".tiff"):
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

    source = nibabel.load(like)
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
