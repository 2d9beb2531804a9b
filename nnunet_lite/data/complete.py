"""Is a file whole? ITK fills what is missing from a truncated picture with zeros in silence, so we look ourselves.

(NIfTI needs no look: nibabel, which reads the voxels, does complain. So do ITK's NRRD and MetaImage readers.)
"""

from __future__ import annotations

import gzip
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


def must_hold(path: Path, needed: int, picture: bool = False) -> None:
    """Refuse a file too small for the bytes that its header promises, before memory is taken for them.

    Raises
    ------
    UserError : no compression could make them of it.
    """
    size = path.stat().st_size
    if needed > size * (_PICTURE_LIMIT if picture else DEFLATE_LIMIT):
        raise UserError(f"is truncated: {size} bytes cannot hold the {needed} that its header tells of", path, AGAIN)


def elsewhere(path: Path) -> str:
    """The file that a header alone (NRRD, MetaImage) names for its voxels; empty for a file that holds them."""
    if path.suffix.lower() not in _MAY_BE_HEADERS:
        return ""
    with path.open("rb") as file:
        named = _DATA_FILE.search(file.read(4096))
    name = named[1].decode("utf-8", "replace").strip() if named else ""
    return "" if name.upper() == "LOCAL" else name


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
    ends = {".png": _png_ends, ".jpg": _jpeg_ends, ".jpeg": _jpeg_ends, ".bmp": _bmp_ends, ".tif": _tiff_ends}
    whole = ends.get(path.suffix.lower().replace(".tiff", ".tif"))
    if whole is None:
        return None
    with path.open("rb") as file:
        head = file.read(64)
        file.seek(max(0, size - 4096))
        if not whole(head, file.read(), size, path):
            return f"is truncated: it ends after {size} bytes"
    return None


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


def _tiff_ends(head: bytes, tail: bytes, size: int, path: Path) -> bool:
    """The chain of page directories must not leave the file."""
    try:
        return len(_tiff_samples_per_page(path)) > 0
    except struct.error:
        return False


def tiff_samples(path: Path) -> int:
    """Values per pixel of a (whole) TIFF's first page."""
    return _tiff_samples_per_page(path)[0]


def _tiff_samples_per_page(path: Path) -> list[int]:
    """Follow the directories of a TIFF, in which tag 277 is SamplesPerPixel. BigTIFF (43) has 8-byte fields.

    Raises
    ------
    struct.error : the file ends too early.
    """
    found: dict[int, int] = {}
    with path.open("rb") as file:

        def read(kind: str) -> int:
            return int(struct.unpack(order + kind, file.read(struct.calcsize(order + kind)))[0])

        order = ">" if file.read(2) == b"MM" else "<"
        big = read("H") == 43
        count_kind, offset_kind, entry_size = ("Q", "Q", 20) if big else ("H", "I", 12)
        file.seek(8 if big else 4)
        offset = read(offset_kind)
        while offset and offset not in found:
            file.seek(offset)
            entries = file.read(read(count_kind) * entry_size)
            found[offset] = 1
            for start in range(0, len(entries), entry_size):
                if struct.unpack_from(f"{order}H", entries, start)[0] == 277:
                    found[offset] = struct.unpack_from(f"{order}H", entries, start + entry_size - (8 if big else 4))[0]
            offset = read(offset_kind)
    return list(found.values())
