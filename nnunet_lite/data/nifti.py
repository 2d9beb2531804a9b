"""NIfTI: the common files are read directly, checks of headers, and writing.

ITK takes 1.6 ms for a header, and nibabel decompresses in small pieces, which is most of the time on small images.
Here a file is decompressed at once by libdeflate, three times as fast as zlib, which checks its CRC too; header and
voxels come from the same bytes, without a copy. The geometry equals that of ITK to the last bit. Files that ITK and
nibabel might read in another way are left to them (formats.py): NIfTI-2, pairs of files, scaled values, colours, two
dimensions, qform and sform that differ, files that end too early.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterable, Sequence
from functools import lru_cache
from math import prod
from pathlib import Path
from typing import Any

import imagecodecs
import numpy as np

from nnunet_lite.data.geometry import Geometry
from nnunet_lite.data.names import AGAIN, DEFLATE_LIMIT, NIFTI, gzip_defect, suffix_of, usual_name
from nnunet_lite.errors import UserError

_BYTES, _BYTES_2 = 348, 540  # of a header of NIfTI-1, and of NIfTI-2
_FIELDS = {  # of a header of NIfTI-1 that are used: where they begin, and their type
    "sizeof_hdr": (0, "i4"), "dim": (40, "8i2"), "datatype": (70, "i2"), "pixdim": (76, "8f4"),
    "vox_offset": (108, "f4"), "scl_slope": (112, "f4"), "scl_inter": (116, "f4"), "xyzt_units": (123, "u1"),
    "qform_code": (252, "i2"), "sform_code": (254, "i2"), "quatern": (256, "3f4"), "qoffset": (268, "3f4"),
    "srow": (280, "(3,4)f4"), "magic": (344, "S4"),
}  # fmt: skip
_OFFSETS, _FORMATS = zip(*_FIELDS.values(), strict=True)
_LAYOUT = np.dtype({"names": [*_FIELDS], "formats": _FORMATS, "offsets": _OFFSETS, "itemsize": _BYTES})
_TYPES = {2: "u1", 4: "i2", 8: "i4", 16: "f4", 64: "f8", 256: "i1", 512: "u2", 768: "u4"}
_RARE = {32: 8, 128: 3, 1024: 8, 1280: 8, 1536: 16, 1792: 16, 2048: 32, 2304: 4}  # types left to nibabel: their bytes
_COLOURS = {128: 3, 2304: 4}  # types whose voxels are colours: their channels
_MILLIMETRES = (0, 2)  # of xyzt_units' low three bits: unknown, mm
_LPS = np.array([-1.0, -1.0, 1.0])  # the axes of ITK in those of NIfTI, RAS
_TOLERANCE = 1e-6  # of float32 matrices, relative
_RIGHT_ANGLES = 1e-3  # of cosines
_SHEARED = 0.02  # cosine of the angle of two axes, about 1 degree from a right angle
_FORMS_TOLERANCE = 0.25  # of a voxel, between qform and sform; the rounding of a quaternion takes up to a tenth


def read_nifti(path: Path) -> tuple[np.ndarray, Geometry | None] | None:
    """Read a common NIfTI file.

    Parameters
    ----------
    path : Path
        A file called .nii or .nii.gz, compressed or not.

    Returns
    -------
    tuple or None
        Array (channels, z, y, x) in native byte order, and geometry. The geometry is None if ITK must decide; all is
        None if ITK or nibabel must read the file.

    Raises
    ------
    UserError
        A compressed file is truncated or damaged, or the header is impossible.
    """
    try:
        data = np.fromfile(path, np.uint8)
        limit = data.size
        if _is_compressed(data[:4].tobytes(), path):
            limit *= DEFLATE_LIMIT
            data = _decompress(data.tobytes(), limit)
    except OSError:
        return None
    except zlib.error as error:
        raise UserError(gzip_defect(path) or f"is damaged ({error})", path, AGAIN) from None
    head = data[:_BYTES].tobytes()
    fields = _sound_fields(head, limit, path)
    array, found = None if fields is None else _voxels(fields, data), _geometry(head)
    return None if array is None else (array, found and found[0])


def _decompress(data: bytes, limit: int) -> np.ndarray:
    """Decompress the first of several members, to at most as many bytes as the last one states, or `limit`."""
    size = min(int.from_bytes(data[-4:], "little"), limit)
    try:
        return np.frombuffer(imagecodecs.gzip_decode(data, out=np.empty(size, np.uint8).data), np.uint8)
    except imagecodecs.GzipError:  # the first member is larger than the last, or damaged
        return np.frombuffer(bytearray(zlib.decompress(data, 31, size or 1)), np.uint8)


def read_nifti_header(path: Path) -> tuple[Geometry, int] | None:
    """Read geometry and number of channels from the first bytes of a file.

    Parameters
    ----------
    path : Path
        A file called .nii or .nii.gz.

    Returns
    -------
    tuple or None
        None if ITK or nibabel must read them.

    Raises
    ------
    UserError
        The header is impossible.
    """
    return _geometry(_first_bytes(path))


def _first_bytes(path: Path) -> bytes:
    """Return the first bytes of a NIfTI file, decompressed; none if they cannot be read."""
    try:
        with path.open("rb") as file:
            limit = path.stat().st_size
            head = file.read(4096)
            if _is_compressed(head, path):
                head, limit = zlib.decompressobj(31).decompress(head, _BYTES), limit * DEFLATE_LIMIT
    except (OSError, zlib.error):
        return b""
    head = head[:_BYTES]
    _sound_fields(head, limit, path)
    return head


def _is_compressed(data: bytes, path: Path) -> bool:
    """Return whether the content is gzip's, whatever the name; refuse a .gz file that is neither gzip nor NIfTI."""
    if data[:2] == b"\x1f\x8b":
        return True
    first = {int.from_bytes(data[:4], order) for order in ("little", "big")}
    if path.suffix.lower() == ".gz" and not first & {_BYTES, _BYTES_2}:
        raise UserError("is not gzip-compressed or is damaged", path, AGAIN)
    return False


# -------------------------------------------------------------------------------------------------------------- headers


def _fields(head: bytes) -> np.void | None:
    """Return the fields of a NIfTI-1 header; None for anything else."""
    if len(head) < _BYTES:
        return None
    is_little = int.from_bytes(head[:4], "little") == _BYTES
    fields = np.frombuffer(head, _LAYOUT.newbyteorder("<" if is_little else ">"), 1)[0]
    return fields if fields["sizeof_hdr"] == _BYTES else None


def _sound_fields(head: bytes, size: int, path: Path) -> np.void | None:
    """Return `_fields`; refuse a header on which ITK or nibabel would fail, or for which they would fill the memory.

    `size` is the largest number of bytes that the file can have after decompression.
    """
    fields = _fields(head)
    if fields is None:
        return None
    dimensions, kind = int(fields["dim"][0]), int(fields["datatype"])
    shape = [int(n) for n in fields["dim"][1 : dimensions + 1]]
    if not 1 <= dimensions <= 7 or min(shape) < 1:
        what = f"{dimensions} dimensions" if not 1 <= dimensions <= 7 else f"{' x '.join(map(str, shape))} voxels"
        raise UserError(f"is damaged: its header states {what}", path, AGAIN)
    itemsize = np.dtype(_TYPES[kind]).itemsize if kind in _TYPES else _RARE.get(kind)
    if itemsize is None:
        raise UserError(f"has voxels of type {kind}, which cannot be read", path, AGAIN)
    placement = [fields["srow"]] if fields["sform_code"] > 0 else []
    placement += [fields["quatern"], fields["qoffset"]] if fields["qform_code"] > 0 else []
    if not all(np.isfinite(numbers).all() for numbers in placement):
        raise UserError("is damaged: its header places it at NaN or infinity", path, AGAIN)
    sizes = fields["pixdim"][1 : min(dimensions, 3) + 1]
    if not _are_sizes(sizes, shape) and not (dimensions > 2 and _sform_columns(fields) is not None):
        raise _no_voxel_size(sizes, path)
    needed = prod(shape) * itemsize
    if fields["magic"] == b"n+1" and needed + _BYTES > size:
        found = max(0, size - _BYTES - 4)
        raise UserError(f"is truncated: it holds {found} of {needed} bytes of voxels", path, AGAIN)
    return fields


def _no_voxel_size(sizes: Iterable[float], path: Path) -> UserError:
    numbers = ", ".join(f"{size:.6g}" for size in sizes)
    fix = "Write the true size of the voxels into pixdim, or an sform."
    return UserError(f"its header gives voxels of ({numbers}) mm in pixdim, and no sform instead", path, fix)


def require_voxel_sizes(image: Any, path: Path) -> None:
    """Refuse an Analyze or NIfTI image whose voxels have no size: nibabel takes 1 mm and reports nothing.

    Parameters
    ----------
    image : SpatialImage
        As nibabel loads it; other formats pass.
    path : Path
        Its file, for the message.

    Raises
    ------
    UserError
        A size is zero, negative or not finite, and there is no sform.
    """
    if not isinstance(image.header, nib().AnalyzeHeader):
        return
    with image.file_map["header" if "header" in image.file_map else "image"].get_prepare_fileobj("rb") as file:
        stored = image.header_class.from_fileobj(file, check=False)
    placed = "sform_code" in stored.keys() and stored["sform_code"] > 0  # noqa: SIM118 (a header is no mapping)
    if not placed and not _are_sizes(stored["pixdim"][1:4], image.shape):
        raise _no_voxel_size(stored["pixdim"][1:4], path)


def _are_sizes(sizes: np.ndarray, shape: Sequence[int]) -> bool:
    """Return whether sizes of voxels are positive numbers; the depth of a single slice does not matter."""
    return all(0 < float(size) < np.inf for size, n in zip(sizes, shape, strict=False) if n > 1)


def _sform_columns(fields: np.void) -> np.ndarray | None:
    """Return the matrix (3, 3) of an sform that is valid without pixdim: finite, of right angles, with volume."""
    matrix = fields["srow"][:, :3].astype(np.float64)
    lengths = np.linalg.norm(matrix, axis=0)
    if fields["sform_code"] <= 0 or not (np.isfinite(matrix).all() and lengths.all()):
        return None
    return matrix if _skew(matrix / lengths) < _RIGHT_ANGLES else None


def _skew(cosines: np.ndarray) -> float:
    """Return how far three columns of length 1 are from right angles."""
    return float(np.abs(cosines.T @ cosines - np.eye(3)).max())


def _voxels(fields: np.void, data: np.ndarray) -> np.ndarray | None:
    """Return the voxels (channels, z, y, x) of a common file; None if nibabel must read them."""
    dimensions, x, y, z, channels = (int(n) for n in fields["dim"][:5])
    start, kind, slope = float(fields["vox_offset"]), int(fields["datatype"]), float(fields["scl_slope"])
    is_scaled = slope != 0 and (slope != 1 or fields["scl_inter"] != 0)
    is_plain = fields["magic"] == b"n+1" and kind in _TYPES and not is_scaled
    if not is_plain or dimensions not in (3, 4) or not (start >= _BYTES and start.is_integer()):
        return None
    shape = (channels if dimensions == 4 else 1, z, y, x)
    dtype = np.dtype(_TYPES[kind]).newbyteorder(fields.dtype["sizeof_hdr"].byteorder)
    if data.size < start + dtype.itemsize * prod(shape):
        return None
    voxels = np.frombuffer(data, dtype, prod(shape), int(start)).reshape(shape)
    return np.require(voxels, dtype.newbyteorder("="), ["ALIGNED", "WRITEABLE"])


@lru_cache(maxsize=256)
def _geometry(head: bytes) -> tuple[Geometry, int] | None:
    """Return geometry and channels by qform or sform; None if ITK must decide, as with two forms that differ."""
    fields = _fields(head)
    if fields is None:
        return None
    dimensions, x, y, z, channels = (int(n) for n in fields["dim"][:5])
    channels = (channels if dimensions == 4 else 1) * _COLOURS.get(int(fields["datatype"]), 1)
    if dimensions not in (3, 4) or min(x, y, z, channels) < 1:
        return None
    by_sform = _uses_sform(fields)
    if by_sform:
        unit, matrix, origin = millimetres(fields), *np.split(fields["srow"].astype(np.float64), [3], axis=1)
        spacing = np.linalg.norm(matrix, axis=0)
    else:
        unit, spacing = 1.0, fields["pixdim"][1:4].astype(np.float64)
        found = _equal_forms(fields, spacing)
        if found is None:
            return None
        matrix, origin = found
    cosines = matrix / np.linalg.norm(matrix, axis=0)
    sx, sy, sz = (spacing * unit).tolist()
    ox, oy, oz = (origin.ravel() * _LPS * unit).tolist()
    direction = tuple((cosines * _LPS[:, None]).ravel().tolist())
    return Geometry((z, y, x), (sz, sy, sx), (ox, oy, oz), direction), channels


def _uses_sform(fields: np.void) -> bool:
    """Return whether pixdim is not a voxel size, but the sform has one.

    ITK would take 1 mm for a size of zero, and flip the image for a negative one.
    """
    return not _are_sizes(fields["pixdim"][1:4], fields["dim"][1:4]) and _sform_columns(fields) is not None


def _equal_forms(fields: np.void, spacing: np.ndarray) -> tuple[np.ndarray, np.ndarray] | None:
    """Return matrix and origin if pixdim, qform and sform agree, as far as they exist."""
    is_single_file, is_mm = fields["magic"] == b"n+1", fields["xyzt_units"] & 7 in _MILLIMETRES
    if not (is_single_file and is_mm and np.isfinite(spacing).all() and (spacing > 0).all()):
        return None
    forms = []
    if fields["qform_code"] > 0:
        turn = _rotation(fields["quatern"], fields["pixdim"][0])
        forms.append((turn * spacing, fields["qoffset"]))
    if fields["sform_code"] > 0:
        forms.append((fields["srow"][:, :3], fields["srow"][:, 3]))
    if not forms:
        return None
    matrix, origin = (part.astype(np.float32).astype(np.float64) for part in forms[0])  # float32, as in ITK
    if not all(np.array_equal(matrix, other) and np.array_equal(origin, offset) for other, offset in forms[1:]):
        return None
    lengths = np.linalg.norm(matrix, axis=0)
    if not lengths.all() or not np.abs(lengths / spacing - 1).max() < _TOLERANCE:
        return None
    return (matrix, origin) if _skew(matrix / lengths) < _TOLERANCE else None


def _rotation(quaternion: np.ndarray, handedness: float) -> np.ndarray:
    """Return the direction cosines in columns; a negative pixdim[0] reverses the last one."""
    b, c, d = (float(q) for q in quaternion)
    squares = b * b + c * c + d * d
    if 1 - squares < 1e-7:  # half a turn, up to rounding
        length = np.sqrt(squares)
        a, b, c, d = 0.0, b / length, c / length, d / length
    else:
        a = np.sqrt(1 - squares)
    matrix = np.array(
        [
            [a * a + b * b - c * c - d * d, 2 * (b * c - a * d), 2 * (b * d + a * c)],
            [2 * (b * c + a * d), a * a + c * c - b * b - d * d, 2 * (c * d - a * b)],
            [2 * (b * d - a * c), 2 * (c * d + a * b), a * a + d * d - c * c - b * b],
        ]
    )
    return matrix * [1, 1, -1 if handedness < 0 else 1]


def millimetres(header: Any) -> float:
    """Return the unit of a NIfTI header in mm.

    Parameters
    ----------
    header : Nifti1Header or numpy.void
        Anything with the field `xyzt_units`.

    Returns
    -------
    float
        For metres, micrometres, and mm for any other number.
    """
    return {1: 1e3, 3: 1e-3}.get(int(header["xyzt_units"]) & 7, 1.0)


def has_forms(header: Any) -> bool:
    """Return whether a header of nibabel has a qform or an sform, which place the image in space.

    Parameters
    ----------
    header : AnalyzeHeader
        Of NIfTI or Analyze.

    Returns
    -------
    bool
        Whether one of the two codes is above 0.
    """
    codes = [key for key in ("qform_code", "sform_code") if key in header.keys()]  # noqa: SIM118 (no mapping)
    return any(int(header[key]) > 0 for key in codes)


def nib() -> Any:
    """Import nibabel on first use, without its log: what it corrects in a header is reported here.

    Returns
    -------
    module
        nibabel.
    """
    import nibabel
    from nibabel import imageglobals

    imageglobals.logger.setLevel("CRITICAL")
    return nibabel


def form_conflict(path: Path, geometry: Geometry) -> str | None:
    """Say which statement of a NIfTI header about its place differs from the geometry that is used.

    Parameters
    ----------
    path : Path
        An image of any format.
    geometry : Geometry
        As it was read.

    Returns
    -------
    str or None
        None if pixdim, qform and sform agree to a quarter of a voxel.
    """
    if suffix_of(path) not in NIFTI:
        return None
    head = _first_bytes(path)
    fields = _fields(head)
    if fields is not None and _geometry(head):
        return "its pixdim has no voxel sizes; those of its sform are used" if _uses_sform(fields) else None
    with usual_name(path) as usual:
        stored = nib().load(usual).header
    scale = np.diag([millimetres(stored)] * 3 + [1.0])
    try:
        forms = {"qform": stored.get_qform(coded=True)[0], "sform": stored.get_sform(coded=True)[0]}
    except ValueError:
        return "its qform is not a rotation"
    corners = np.array([(x, y, z, 1) for x in (0, 1) for y in (0, 1) for z in (0, 1)], float)
    corners[:, :3] *= np.subtract(geometry.shape[::-1], 1)
    for name, form in forms.items():
        if form is None:
            continue
        shifts = (corners @ (scale @ form - ras_affine(geometry)).T)[:, : geometry.dimensions]
        distance = float(np.linalg.norm(shifts, axis=1).max())
        if distance > _FORMS_TOLERANCE * min(geometry.spacing):
            skew = _skew(form[:3, :3] / np.linalg.norm(form[:3, :3], axis=0))
            sheared = ", sheared as by a tilted gantry," * (skew > _SHEARED)
            off = f"{distance:.4g} mm from where its other fields do, which are used"
            return f"its {name}{sheared} places it up to {off}"
    return None


# -------------------------------------------------------------------------------------------------------------- writing


def ras_affine(geometry: Geometry) -> np.ndarray:
    """Return the affine from voxels (x, y, z) to RAS mm; a 2D image is as thick as its larger pixel size.

    Parameters
    ----------
    geometry : Geometry
        Of an image.

    Returns
    -------
    ndarray, shape (4, 4)
        As nibabel has it.
    """
    affine = np.eye(4)
    z, y, x = geometry.spacing
    affine[:3, :3] = np.reshape(geometry.direction, (3, 3)) * (x, y, max(x, y) if geometry.dimensions == 2 else z)
    affine[:3, 3] = geometry.origin
    return np.diag([-1.0, -1.0, 1.0, 1.0]) @ affine


def _as_stored(array: np.ndarray, dimensions: int) -> np.ndarray:
    """Return an array (z, y, x) in the order of NIfTI: (x, y, z), or (x, y) in two dimensions."""
    return array[0].T if dimensions == 2 else array.transpose(2, 1, 0)


def write_nifti(path: Path, array: np.ndarray, geometry: Geometry, slope: float = 1, like: Path | None = None) -> None:
    """Write a NIfTI file, also with a sheared affine, which no qform can state.

    Parameters
    ----------
    path : Path
        Ends with .nii or .nii.gz.
    array : ndarray, shape (z, y, x)
        Integers.
    geometry : Geometry
        Of the array.
    slope : float
        Programs show the integers times this number.
    like : Path or None
        An image on the same grid. If it is NIfTI, its header is used.
    """
    if like is not None and suffix_of(like) in NIFTI:
        with usual_name(like) as usual:
            source = nib().load(usual)
        header = source.header.copy()
        header.set_data_dtype(array.dtype)
        header["cal_min"] = header["cal_max"] = 0  # the window of the image
        header.set_intent("none")
        image = source.__class__(_as_stored(array, len(source.shape)), None, header)
    else:
        affine, direction = ras_affine(geometry), np.reshape(geometry.direction, (3, 3))
        image = nib().Nifti1Image(_as_stored(array, geometry.dimensions), affine)
        image.set_sform(affine, "scanner")
        if np.allclose(direction @ direction.T, np.eye(3), atol=1e-4):
            image.set_qform(affine, "scanner")
        image.header.set_xyzt_units("mm")
    image.header.set_slope_inter(slope, 0)
    nib().save(image, path)


def nifti_bytes(array: np.ndarray, geometry: Geometry) -> bytes:
    """Return the bytes of a NIfTI file.

    Parameters
    ----------
    array : ndarray, shape (z, y, x) or (3, z, y, x)
        Grey values, or the bytes of colours.
    geometry : Geometry
        Of the array.

    Returns
    -------
    bytes
        Not compressed.
    """
    if array.ndim == 4:
        array = np.ascontiguousarray(np.moveaxis(array, 0, -1)).view([("R", "u1"), ("G", "u1"), ("B", "u1")])[..., 0]
    contents: bytes = nib().Nifti1Image(array.transpose(2, 1, 0), ras_affine(geometry)).to_bytes()
    return contents
