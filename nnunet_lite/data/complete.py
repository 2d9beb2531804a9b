"""Is a file whole? ITK fills what is missing from a truncated picture with zeros in silence, so we look ourselves.

NIfTI needs no look: nibabel, which reads the voxels, does complain. So do ITK's NRRD and MetaImage readers, and TIFF
is read by tiff.py.
"""

from __future__ import annotations

import gzip
import math
import re
import struct
import zlib
from pathlib import Path

from nnunet_lite.errors import UserError

AGAIN = "Copy or export it again."

DEFLATE_LIMIT = 1032  # no deflated byte becomes more
_MAY_BE_HEADERS = (".mhd", ".mha", ".nhdr", ".nrrd")
_DATA_FILE = re.compile(rb"^(?:ElementDataFile *=|data ?file:)([^\r\n]*)", re.MULTILINE | re.IGNORECASE)
_PICTURE_LIMIT = 100_000  # nor of the codecs of pictures, by far
_GIPL_HEADER = 256
_GIPL_BYTES = {7: 1, 8: 1, 15: 2, 16: 2, 31: 4, 32: 4, 64: 4, 65: 8}  # by its number of the type


def must_hold(path: Path, needed: int, picture: bool = False) -> None:
    """Refuse a file too small for the bytes that its header promises, before memory is taken for them.

    Raises
    ------
    UserError : no compression could make them of it.
    """
    size = path.stat().st_size
    if needed > size * (_PICTURE_LIMIT if picture else DEFLATE_LIMIT):
        raise UserError(f"is truncated: {size} bytes cannot hold the {needed} that its header states", path, AGAIN)


def elsewhere(path: Path) -> str:
    """The file that a header alone (NRRD, MetaImage) names for its voxels; empty for a file that holds them."""
    if path.suffix.lower() not in _MAY_BE_HEADERS:
        return ""
    with path.open("rb") as file:
        named = _DATA_FILE.search(file.read(4096))
    name = named[1].decode("utf-8", "replace").strip() if named else ""
    return "" if name.upper() == "LOCAL" else name


def _other_half(path: Path) -> str:
    """The missing file of an Analyze or NIfTI pair, header (.hdr) and voxels (.img); empty where both are there."""
    halves = {".hdr": ".img", ".img": ".hdr"}
    name = path.name[:-3] if path.name.lower().endswith(".gz") else path.name
    ending = halves.get(name[-4:].lower())
    if ending is None:
        return ""
    other = name[:-4] + (ending if name[-4:].islower() else ending.upper())
    return "" if any((path.parent / f"{other}{gz}").is_file() for gz in ("", ".gz", ".GZ")) else other


def defect(path: Path) -> str | None:
    """What is wrong with a file as a file (missing, empty, cut off), or None. Reads a few bytes."""
    if not path.exists():
        return "there is no such file"
    if not path.is_file():
        return "is no file"
    size = path.stat().st_size
    if size == 0:
        return "is empty (0 bytes)"
    other = elsewhere(path)
    if other and not (path.parent / other).is_file() and "%" not in other and not other.upper().startswith("LIST"):
        return f"names {other} for its voxels, which is not there"
    if absent := _other_half(path):
        return f"needs the file {absent} with it, which is not there"
    ends = {".png": _png_ends, ".jpg": _jpeg_ends, ".jpeg": _jpeg_ends, ".bmp": _bmp_ends}
    whole = ends.get(path.suffix.lower())
    if whole is None:
        return None if _holds_gipl(path) else f"is truncated: it ends after {size} bytes"
    with path.open("rb") as file:
        head = file.read(64)
        file.seek(max(0, size - 4096))
        if not whole(head, file.read(), size, path):
            return f"is truncated: it ends after {size} bytes"
    return None


def is_gzip(path: Path) -> bool:
    """Say whether a file begins as gzip does, whatever its name is."""
    with path.open("rb") as file:
        return file.read(2) == b"\x1f\x8b"


def gzip_defect(path: Path) -> str | None:
    """What is wrong with a .gz file that could not be read, or None. Decompresses all of it."""
    try:
        with gzip.open(path) as file:
            while file.read(1 << 20):
                pass
    except EOFError:
        return f"is truncated: the compressed data end after {path.stat().st_size} bytes"
    except gzip.BadGzipFile:
        return "is not gzip-compressed or is damaged"
    except zlib.error:
        return "is damaged: the compressed data make no sense"
    return None


def _png_ends(head: bytes, tail: bytes, size: int, path: Path) -> bool:
    return b"IEND" in tail or not head.startswith(b"\x89PNG")


def _jpeg_ends(head: bytes, tail: bytes, size: int, path: Path) -> bool:
    return b"\xff\xd9" in tail or not head.startswith(b"\xff\xd8")


def _bmp_ends(head: bytes, tail: bytes, size: int, path: Path) -> bool:
    return len(head) < 6 or not head.startswith(b"BM") or struct.unpack_from("<I", head, 2)[0] <= size


def _holds_gipl(path: Path) -> bool:
    """ITK reads zeros where a GIPL file ends too early. True for any other file."""
    if not path.name.lower().endswith((".gipl", ".gipl.gz")):
        return True
    with gzip.open(path) if is_gzip(path) else path.open("rb") as file:
        head = file.read(_GIPL_HEADER)
        if len(head) < _GIPL_HEADER:
            return False
        *shape, kind = struct.unpack_from(">5H", head)
        needed = math.prod(n for n in shape if n) * _GIPL_BYTES.get(kind, 0)
        try:
            while piece := file.read(1 << 20):
                needed -= len(piece)
        except (EOFError, zlib.error):
            return False
    return needed <= 0
