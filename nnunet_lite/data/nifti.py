"""NIfTI-1 files read directly: the common, unambiguous ones.

ITK takes 1.6 ms for a header, and nibabel decompresses in small pieces: on small images that is most of the time. Here
a file is decompressed in one go (zlib checks its CRC), and header and voxels come from the same bytes. The geometry is
ITK's to the last bit. What is not certain to be read as ITK and nibabel do, they read: NIfTI-2, pairs of files, scaled
values, colours, two dimensions, qform and sform that differ, files that end too early.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, Literal

import numpy as np

from nnunet_lite.data.complete import AGAIN, DEFLATE_LIMIT, gzip_defect
from nnunet_lite.data.geometry import Geometry
from nnunet_lite.errors import UserError

_FIELDS: dict[str, tuple[str, int]] = {  # type and byte, from nifti1.h
    "sizeof_hdr": ("i4", 0),
    "dim": ("8i2", 40),
    "datatype": ("i2", 70),
    "pixdim": ("8f4", 76),
    "vox_offset": ("f4", 108),
    "scl_slope": ("f4", 112),
    "scl_inter": ("f4", 116),
    "xyzt_units": ("u1", 123),
    "qform_code": ("i2", 252),
    "sform_code": ("i2", 254),
    "quatern": ("3f4", 256),
    "qoffset": ("3f4", 268),
    "srow": ("(3,4)f4", 280),
    "magic": ("S4", 344),
}
_BYTES, _BYTES_2 = 348, 540  # of a header of NIfTI-1, and of NIfTI-2
_LAYOUT = np.dtype(
    {
        "names": list(_FIELDS),
        "formats": [kind for kind, _ in _FIELDS.values()],
        "offsets": [byte for _, byte in _FIELDS.values()],
        "itemsize": _BYTES,
    }
)
_TYPES = {2: "u1", 4: "i2", 8: "i4", 16: "f4", 64: "f8", 256: "i1", 512: "u2", 768: "u4"}
# bytes of each type, with complex numbers, colours and numbers of 16 bytes, which nibabel reads
_SIZES = {kind: np.dtype(name).itemsize for kind, name in _TYPES.items()}
_SIZES |= {32: 8, 128: 3, 1024: 8, 1280: 8, 1536: 16, 1792: 16, 2048: 32, 2304: 4}
_MILLIMETRES = (0, 2)  # of xyzt_units' low three bits: unknown, mm
_LPS = np.array([-1.0, -1.0, 1.0])  # ITK's axes in those of NIfTI, RAS
_TOLERANCE = 1e-6  # of float32 matrices, relative
_RIGHT_ANGLES = 1e-3  # of cosines


@dataclass(frozen=True)
class Header:
    """Where the voxels lie in the file and in space; `geometry` is None where that takes ITK to decide."""

    shape: tuple[int, int, int, int]  # (channels, z, y, x)
    dtype: np.dtype
    start: int  # byte
    geometry: Geometry | None


def read_nifti(path: Path) -> tuple[np.ndarray, Geometry | None] | None:
    """Array (channels, z, y, x), native byte order, and geometry; None for what ITK or nibabel must read.

    Raises
    ------
    UserError : a compressed file is cut off or damaged, or the header tells what cannot be.
    """
    try:
        data = path.read_bytes()
        most = len(data)
        if _is_compressed(data, path):
            most *= DEFLATE_LIMIT  # what is here decompressed is the first of maybe several members
            size = int.from_bytes(data[-4:], "little")  # one byte more or less than needed, and zlib copies it all
            data = zlib.decompress(data, 31, min(size, DEFLATE_LIMIT * len(data)) or 1)
    except OSError:
        return None
    except zlib.error as error:
        raise UserError(gzip_defect(path) or f"is damaged ({error})", path, AGAIN) from None
    _must_be_sound(data, most, path)
    header = parse(data)
    if header is None or len(data) < header.start + header.dtype.itemsize * int(np.prod(header.shape)):
        return None
    array = np.frombuffer(data, header.dtype, int(np.prod(header.shape)), header.start).reshape(header.shape)
    return array.astype(header.dtype.newbyteorder("=")), header.geometry


def read_nifti_header(path: Path) -> tuple[Geometry, int] | None:
    """Geometry and number of channels, from the first bytes of a file; None where ITK or nibabel must read them.

    Raises
    ------
    UserError : the header tells what cannot be.
    """
    head = _head(path)
    header = parse(head)
    return (header.geometry, header.shape[0]) if header and header.geometry else _by_sform(head)


def pixdim_defect(path: Path) -> str | None:
    """What is wrong with the voxel sizes in a header that is read by its sform instead, or None."""
    head = _head(path)
    if not _by_sform(head):
        return None
    sizes = ", ".join(f"{size:.6g}" for size in _fields(head)[0]["pixdim"][1:4])
    return f"its pixdim gives voxels of ({sizes}) mm (x, y, z); those of its sform are used"


def _head(path: Path) -> bytes:
    """The first bytes of a NIfTI file, decompressed; none where they cannot be read. Raises as `read_nifti_header`."""
    try:
        with path.open("rb") as file:
            most = path.stat().st_size
            head = file.read(4096)
            if _is_compressed(head, path):
                head, most = zlib.decompressobj(31).decompress(head, _BYTES), most * DEFLATE_LIMIT
    except (OSError, zlib.error):
        return b""
    _must_be_sound(head, most, path)
    return head


def _is_compressed(data: bytes, path: Path) -> bool:
    """Whether the first bytes of a file are gzip's, whatever its name is: NIfTI called .nii.gz, and gzip called .nii.

    Raises
    ------
    UserError : it is called .gz and is neither.
    """
    if data[:2] == b"\x1f\x8b":
        return True
    first = {int.from_bytes(data[:4], order) for order in ("little", "big")}
    if path.suffix.lower() == ".gz" and not first & {_BYTES, _BYTES_2}:
        raise UserError("is not gzip-compressed or is damaged", path, AGAIN)
    return False


def _must_be_sound(head: bytes, size: int, path: Path) -> None:
    """Refuse a NIfTI-1 header that ITK and nibabel would stumble over, or for which they would fill the memory.

    Parameters
    ----------
    size : the most bytes that the file can hold when it is decompressed.
    """
    if len(head) < _BYTES:
        return
    fields, _ = _fields(head)
    if fields["sizeof_hdr"] != _BYTES:
        return
    dimensions, kind = int(fields["dim"][0]), int(fields["datatype"])
    shape = [int(n) for n in fields["dim"][1 : dimensions + 1]]
    if not 1 <= dimensions <= 7 or min(shape) < 1:
        what = f"{dimensions} dimensions" if not 1 <= dimensions <= 7 else f"{' x '.join(map(str, shape))} voxels"
        raise UserError(f"is damaged: its header states {what}", path, AGAIN)
    if kind not in _SIZES:
        raise UserError(f"has voxels of type {kind}, which NIfTI does not have", path, AGAIN)
    placed = [*fields["srow"].ravel()] if fields["sform_code"] > 0 else []
    placed += [*fields["quatern"], *fields["qoffset"]] if fields["qform_code"] > 0 else []
    if not np.isfinite(placed).all():
        raise UserError("is damaged: its header places it at NaN or infinity", path, AGAIN)
    sizes = fields["pixdim"][1 : min(dimensions, 3) + 1]
    if not _sound_sizes(sizes, shape) and not (dimensions > 2 and _sform_columns(fields) is not None):
        raise no_voxel_size(sizes, path)
    needed = prod(shape) * _SIZES[kind]
    if fields["magic"] == b"n+1" and needed + _BYTES > size:
        held = max(0, size - _BYTES - 4)
        raise UserError(f"is truncated: it holds {held} of {needed} bytes of voxels", path, AGAIN)


def no_voxel_size(sizes: Iterable[float], path: Path) -> UserError:
    """The error for a header whose voxels have sizes (x, y, z) of zero, NaN or less."""
    numbers = ", ".join(f"{size:.6g}" for size in sizes)
    fix = "Write the true size of the voxels into pixdim, or an sform."
    return UserError(f"its header gives voxels of ({numbers}) mm in pixdim, and no sform instead", path, fix)


def must_have_sizes(image: Any, path: Path) -> None:
    """Refuse an image of nibabel, Analyze or NIfTI, whose voxels have no size: nibabel takes 1 mm in silence."""
    from nibabel.analyze import AnalyzeHeader

    if not isinstance(image.header, AnalyzeHeader):
        return
    with image.file_map["header" if "header" in image.file_map else "image"].get_prepare_fileobj("rb") as file:
        stored = image.header_class.from_fileobj(file, check=False)
    placed = "sform_code" in stored.keys() and stored["sform_code"] > 0  # noqa: SIM118 (a header is no mapping)
    sizes = [float(size) for size, n in zip(stored["pixdim"][1:4], image.shape, strict=False) if n > 1]
    if not placed and not all(0 < size < np.inf for size in sizes):
        raise no_voxel_size(stored["pixdim"][1:4], path)


def _sound_sizes(sizes: np.ndarray, shape: Sequence[int]) -> bool:
    """Whether the sizes of voxels are positive numbers; of a single slice it does not matter."""
    return all(0 < size < np.inf for size, n in zip(sizes, shape, strict=False) if n > 1)


def _sform_columns(fields: np.void) -> np.ndarray | None:
    """The matrix of an sform (3, 3) that is sound without pixdim: finite, of right angles, with volume."""
    matrix = fields["srow"][:, :3].astype(np.float64)
    lengths = np.linalg.norm(matrix, axis=0)
    if fields["sform_code"] <= 0 or not (np.isfinite(matrix).all() and lengths.all()):
        return None
    cosines = matrix / lengths
    return matrix if np.abs(cosines.T @ cosines - np.eye(3)).max() < _RIGHT_ANGLES else None


def _by_sform(head: bytes) -> tuple[Geometry, int] | None:
    """Geometry and number of channels of a header whose pixdim is no voxel size, and whose sform has it.

    ITK would take 1 mm for a size of zero, and turn the image round for a negative one.
    """
    if len(head) < _BYTES:
        return None
    fields, _ = _fields(head)
    dimensions, x, y, z, channels = (int(n) for n in fields["dim"][:5])
    if fields["sizeof_hdr"] != _BYTES or dimensions not in (3, 4):
        return None
    matrix = _sform_columns(fields)
    if matrix is None or _sound_sizes(fields["pixdim"][1:4], (x, y, z)):
        return None
    unit = {1: 1e3, 3: 1e-3}.get(int(fields["xyzt_units"]) & 7, 1.0)  # metres, micrometres
    lengths = np.linalg.norm(matrix, axis=0)
    sx, sy, sz = (lengths * unit).tolist()
    ox, oy, oz = (fields["srow"][:, 3] * _LPS * unit).tolist()
    direction = tuple((matrix / lengths * _LPS[:, None]).ravel().tolist())
    return Geometry((z, y, x), (sz, sy, sx), (ox, oy, oz), direction), channels if dimensions == 4 else 1


def _fields(head: bytes) -> tuple[np.void, Literal["<", ">"]]:
    """The header, and the byte order."""
    order: Literal["<", ">"] = "<" if int.from_bytes(head[:4], "little") == _BYTES else ">"
    return np.frombuffer(head, _LAYOUT.newbyteorder(order), 1)[0], order


def parse(head: bytes) -> Header | None:
    """The header in the first bytes of a NIfTI file; None where ITK or nibabel must read the file."""
    if len(head) < _BYTES:
        return None
    fields, order = _fields(head)
    dimensions, x, y, z, channels = (int(n) for n in fields["dim"][:5])
    channels = channels if dimensions == 4 else 1
    start, kind, slope = float(fields["vox_offset"]), int(fields["datatype"]), float(fields["scl_slope"])
    plain = (
        fields["sizeof_hdr"] == _BYTES
        and fields["magic"] == b"n+1"
        and dimensions in (3, 4)
        and min(x, y, z, channels) > 0
        and kind in _TYPES
        and start >= _BYTES
        and start.is_integer()
        and (slope == 0 or (slope == 1 and fields["scl_inter"] == 0))
    )
    if not plain:
        return None
    dtype = np.dtype(order + _TYPES[kind])
    return Header((channels, z, y, x), dtype, int(start), _geometry(fields, (z, y, x)))


def _geometry(fields: np.void, shape: tuple[int, int, int]) -> Geometry | None:
    """From the qform or the sform; of both, only where they are equal."""
    spacing = fields["pixdim"][1:4].astype(np.float64)
    if not (np.isfinite(spacing).all() and (spacing > 0).all() and fields["xyzt_units"] & 7 in _MILLIMETRES):
        return None
    forms = []
    if fields["qform_code"] > 0:
        forms.append((_rotation(fields["quatern"], fields["pixdim"][0]) * spacing, fields["qoffset"]))
    if fields["sform_code"] > 0:
        forms.append((fields["srow"][:, :3], fields["srow"][:, 3]))
    if not forms:
        return None
    matrix, origin = (part.astype(np.float32).astype(np.float64) for part in forms[0])  # as float32, like ITK's
    for other, offset in forms[1:]:
        if not (np.array_equal(matrix, other) and np.array_equal(origin, offset)):
            return None
    lengths = np.linalg.norm(matrix, axis=0)
    if not lengths.all():
        return None
    cosines = matrix / lengths
    skew = np.abs(cosines.T @ cosines - np.eye(3)).max()
    scale = np.abs(lengths / spacing - 1).max()
    if not (skew < _TOLERANCE and scale < _TOLERANCE):
        return None
    sx, sy, sz = spacing.tolist()
    ox, oy, oz = (origin * _LPS).tolist()
    return Geometry(shape, (sz, sy, sx), (ox, oy, oz), tuple((cosines * _LPS[:, None]).ravel().tolist()))


def _rotation(quaternion: np.ndarray, handedness: float) -> np.ndarray:
    """The direction cosines in columns; the last is turned round where pixdim[0] is negative."""
    b, c, d = (float(q) for q in quaternion)
    squares = b * b + c * c + d * d
    if 1 - squares < 1e-7:  # half a turn, but for rounding
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
