"""NIfTI-1 files read directly: the common, unambiguous ones.

ITK takes 1.6 ms for a header, and nibabel decompresses in small pieces: on small images that is most of the time. Here
a file is decompressed in one go (zlib checks its CRC), and header and voxels come from the same bytes. The geometry is
ITK's to the last bit. What is not certain to be read as ITK and nibabel do, they read: NIfTI-2, pairs of files, scaled
values, colours, two dimensions, qform and sform that differ, files that end too early.
"""

from __future__ import annotations

import zlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from nnunet_lite.data.complete import gzip_defect
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
_BYTES = 348
_LAYOUT = np.dtype(
    {
        "names": list(_FIELDS),
        "formats": [kind for kind, _ in _FIELDS.values()],
        "offsets": [byte for _, byte in _FIELDS.values()],
        "itemsize": _BYTES,
    }
)
_TYPES = {2: "u1", 4: "i2", 8: "i4", 16: "f4", 64: "f8", 256: "i1", 512: "u2", 768: "u4"}
_MILLIMETRES = (0, 2)  # of xyzt_units' low three bits: unknown, mm
_LPS = np.array([-1.0, -1.0, 1.0])  # ITK's axes in those of NIfTI, RAS
_TOLERANCE = 1e-6  # of float32 matrices, relative
_DEFLATE_LIMIT = 1032  # no deflated byte becomes more


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
    UserError : a compressed file is cut off or damaged.
    """
    try:
        data = path.read_bytes()
        if path.suffix.lower() == ".gz":
            size = int.from_bytes(data[-4:], "little")  # one byte more or less than needed, and zlib copies it all
            data = zlib.decompress(data, 31, min(size, _DEFLATE_LIMIT * len(data)) or 1)
    except OSError:
        return None
    except zlib.error as error:
        raise UserError(gzip_defect(path) or f"is damaged ({error})", path, "Copy or export it again.") from None
    header = parse(data)
    if header is None or len(data) < header.start + header.dtype.itemsize * int(np.prod(header.shape)):
        return None
    array = np.frombuffer(data, header.dtype, int(np.prod(header.shape)), header.start).reshape(header.shape)
    return array.astype(header.dtype.newbyteorder("=")), header.geometry


def read_nifti_header(path: Path) -> tuple[Geometry, int] | None:
    """Geometry and number of channels, from the first bytes of a file; None where ITK or nibabel must read them."""
    try:
        with path.open("rb") as file:
            if path.suffix.lower() == ".gz":
                head = zlib.decompressobj(31).decompress(file.read(4096), _BYTES)
            else:
                head = file.read(_BYTES)
    except (OSError, zlib.error):
        return None
    header = parse(head)
    return (header.geometry, header.shape[0]) if header and header.geometry else None


def parse(head: bytes) -> Header | None:
    """The header in the first bytes of a NIfTI file; None where ITK or nibabel must read the file."""
    if len(head) < _BYTES:
        return None
    little = int.from_bytes(head[:4], "little") == _BYTES
    fields = np.frombuffer(head, _LAYOUT.newbyteorder("<" if little else ">"), 1)[0]
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
    dtype = np.dtype(("<" if little else ">") + _TYPES[kind])
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
