"""Is a file whole? ITK fills what is missing from a truncated picture with zeros in silence, so we look ourselves.

(NIfTI needs no look: nibabel, which reads the voxels, does complain. So do ITK's NRRD and MetaImage readers.)
"""

from __future__ import annotations

import gzip
import struct
import zlib
from pathlib import Path


def defect(path: Path) -> str | None:
    """What is wrong with a file as a file (missing, empty, cut off), or None. Reads a few bytes."""
    if not path.exists():
        return "there is no such file"
    if not path.is_file():
        return "is no file"
    size = path.stat().st_size
    if size == 0:
        return "is empty (0 bytes)"
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
    """Follow the chain of page directories; it must not leave the file. BigTIFF (43) has 8-byte fields."""
    order = {b"II": "<", b"MM": ">"}.get(head[:2])
    if order is None or len(head) < 16:
        return False
    big = struct.unpack_from(f"{order}H", head, 2)[0] == 43
    count_format, entry, offset_format = (f"{order}Q", 20, f"{order}Q") if big else (f"{order}H", 12, f"{order}I")
    offset = struct.unpack_from(offset_format, head, 8 if big else 4)[0]
    seen: set[int] = set()
    with path.open("rb") as file:
        while offset and offset not in seen:
            seen.add(offset)
            width = struct.calcsize(count_format)
            file.seek(offset)
            count = file.read(width)
            if len(count) < width:
                return False
            file.seek(offset + width + struct.unpack(count_format, count)[0] * entry)
            following = file.read(struct.calcsize(offset_format))
            if len(following) < struct.calcsize(offset_format):
                return False
            offset = struct.unpack(offset_format, following)[0]
    return True
