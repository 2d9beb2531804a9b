"""File formats by the ending of a name, the other files that an image needs, and whether a file is whole.

ITK fills the missing part of a truncated picture with zeros and reports nothing, so truncation is checked here. NIfTI,
NRRD, MetaImage and TIFF need no such check: their readers report it.
"""

from __future__ import annotations

import gzip
import math
import os
import re
import shutil
import struct
import zlib
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Literal

from nnunet_lite.errors import UserError

NIFTI = (".nii.gz", ".nii")
TIFF = (".ome.tif", ".ome.tiff", ".tif", ".tiff")
PICTURES = (".png", *TIFF, ".bmp", ".jpg", ".jpeg")
GIPL = (".gipl.gz", ".gipl")
_HEADERS, _VOXELS = (".hdr.gz", ".hdr"), (".img.gz", ".img")
PAIRS = (*_HEADERS, *_VOXELS)  # NIfTI or Analyze
NIBABEL_ONLY = (".mgz", ".mgh", *PAIRS)
SUFFIXES = (*NIFTI, ".nrrd", ".nhdr", ".mha", ".mhd", *GIPL, *PICTURES, *NIBABEL_ONLY)
SUPPORTED = f"Supported are {' '.join(SUFFIXES)}"
_LABEL_WORDS = (
    "masks?|msk|[dp]?segs?|segmentations?|labels?(?:tr)?|lbl|gt|ground[ _-]?truth|truth|rois?|annotations?|contours?"
)
LABEL_WORD = re.compile(rf"(?:^|[\W_])(?:{_LABEL_WORDS})(?=[\W_]|$)", re.IGNORECASE)

Format = Literal["nifti", "seg.nrrd", "dicom-seg", "rtstruct"]  # in which predictions are written
ENDINGS: dict[Format, str] = {
    "nifti": ".nii.gz", "seg.nrrd": ".seg.nrrd", "rtstruct": ".rtstruct.dcm", "dicom-seg": ".dcm",
}  # fmt: skip

AGAIN = "Copy or export it again."
DEFLATE_LIMIT = 1032  # largest factor by which deflate compresses
_PICTURE_LIMIT = 100_000  # larger than the factor of any picture format
_VOXELS_NAMED = re.compile(rb"^(?:ElementDataFile *=|data ?file:)([^\r\n]*)", re.MULTILINE | re.IGNORECASE)
_NIFTI_HEADER = 348  # bytes, the last four are the magic
_META_BYTES = {b"CHAR": 1, b"SHORT": 2, b"INT": 4, b"FLOAT": 4, b"DOUBLE": 8}  # of a voxel of MetaImage
_GIPL_HEADER = 256
_GIPL_BYTES = {7: 1, 8: 1, 15: 2, 16: 2, 31: 4, 32: 4, 64: 4, 65: 8}  # of a voxel, by the number of the type


def suffix_of(path: Path) -> str:
    """Return the ending of a supported format, both parts of a double one, in lower case.

    Parameters
    ----------
    path : Path
        Any path; the file need not exist.

    Returns
    -------
    str
        Such as ".nii.gz"; empty if the format is not supported.
    """
    name = path.name.lower()
    return next((s for s in SUFFIXES if name.endswith(s)), "")


def ending_of(path: Path) -> str:
    """Return the ending of a supported format as the name has it: ".NII.GZ".

    Parameters
    ----------
    path : Path
        Any path.

    Returns
    -------
    str
        Empty if the format is not supported.
    """
    return path.name[len(path.name) - len(suffix_of(path)) :]


def stem(path: Path) -> str:
    """Return the name of a file without its (double) ending.

    Parameters
    ----------
    path : Path
        Any path.

    Returns
    -------
    str
        "case_0000" for case_0000.nii.gz.
    """
    return path.name[: len(path.name) - len(suffix_of(path) or path.suffix)]


def format_of(path: Path) -> Format | None:
    """Return the format of a prediction.

    Parameters
    ----------
    path : Path
        Its file.

    Returns
    -------
    str or None
        None for other endings of images, such as .png.
    """
    if suffix_of(path) in NIFTI:
        return "nifti"
    return next((known for known, ending in ENDINGS.items() if path.name.lower().endswith(ending)), None)


def case_of(path: Path) -> str:
    """Return the name of a prediction without its ending.

    Parameters
    ----------
    path : Path
        Its file.

    Returns
    -------
    str
        "scan" for scan.nii.gz, scan.seg.nrrd and scan.rtstruct.dcm.
    """
    known = format_of(path)
    return path.name[: -len(ENDINGS[known])] if known in ("seg.nrrd", "rtstruct") else stem(path)


def visible(folder: Path) -> list[Path]:
    """Return the files and folders in a folder, sorted, without hidden ones."""
    return sorted(path for path in folder.iterdir() if not path.name.startswith("."))


# ---------------------------------------------------------------------------------------------- images of several files


def has_label_word(path: Path) -> bool:
    """Whether the name of a file, or of a folder in its relative path, has a word such as mask, seg or label."""
    return bool(LABEL_WORD.search(stem(path))) or any(map(LABEL_WORD.fullmatch, path.parts[:-1]))


def voxel_file(path: Path) -> str:
    """Return the name of the file that contains the voxels of a header (NRRD, MetaImage).

    Parameters
    ----------
    path : Path
        An existing file of any format.

    Returns
    -------
    str
        As the header has it; empty if the file contains its voxels itself.
    """
    if path.suffix.lower() not in (".mhd", ".mha", ".nhdr", ".nrrd"):
        return ""
    with path.open("rb") as file:
        found = _VOXELS_NAMED.search(file.read(4096))
    name = found[1].decode("utf-8", "replace").strip() if found else ""
    return "" if name.upper() == "LOCAL" else name


def companions(path: Path) -> list[Path]:
    """Return the other files that an image is read from: its voxels, or the spacing of a TIFF file.

    Parameters
    ----------
    path : Path
        An image.

    Returns
    -------
    list of Path
        Those that exist.
    """
    suffix, name = suffix_of(path), stem(path)
    if suffix in TIFF:
        names = [f"{name}.json", re.sub(r"_\d{4}$", "", name) + ".json"]
    elif suffix in _HEADERS:
        names = [name + ending for ending in (".img", ".IMG", ".img.gz", ".IMG.GZ")]
    else:
        names = [voxel_file(path)] if path.is_file() else []
    return [path.with_name(other) for other in dict.fromkeys(filter(None, names)) if (path.parent / other).is_file()]


def header_of(path: Path) -> Path | None:
    """Return the header (.hdr) of a file of voxels (.img); of the two, the header counts as the image.

    Parameters
    ----------
    path : Path
        An image.

    Returns
    -------
    Path or None
        None if there is no such header, or the file is no .img.
    """
    if suffix_of(path) not in _VOXELS:
        return None
    names = (stem(path) + ending for ending in (".hdr", ".HDR", ".hdr.gz", ".HDR.GZ"))
    return next((path.with_name(name) for name in names if path.with_name(name).is_file()), None)


@contextmanager
def usual_name(path: Path) -> Iterator[Path]:
    """Give a file an ending in lower case that fits its content, since libraries choose the reader by the ending.

    Parameters
    ----------
    path : Path
        An image; a compressed NIfTI file may be called .nii, and the reverse.

    Yields
    ------
    Path
        The path itself, or a link to it in a temporary folder.
    """
    suffix = suffix_of(path)
    if suffix in NIFTI:
        suffix = ".nii.gz" if is_gzip(path) else ".nii"
    if path.name.endswith(suffix) and suffix_of(path) == suffix:
        yield path
        return
    others = [other for other in (*companions(path), header_of(path)) if other and suffix not in TIFF]
    with TemporaryDirectory() as folder:
        link = Path(folder) / f"image{suffix}"
        _link(link, path.resolve())
        for other in others:  # a header names its voxels, or shares their name
            name = voxel_file(path) or "image" + other.name[len(stem(path)) :].lower()
            (link.parent / name).parent.mkdir(parents=True, exist_ok=True)
            _link(link.parent / name, other.resolve())
        yield link


def _link(link: Path, target: Path) -> None:
    """Make a link to a file, or a copy where the system refuses links, as Windows does to most users."""
    try:
        link.symlink_to(target)
    except (OSError, NotImplementedError):
        shutil.copyfile(target, link)


# ---------------------------------------------------------------------------------------------------------- whole files


def require_readable(path: Path) -> None:
    """Refuse a file that is of no supported format, missing, empty, truncated, or may not be opened. Reads a few bytes.

    Parameters
    ----------
    path : Path
        A file to read as an image.

    Raises
    ------
    UserError
        Says what is wrong with the file.
    """
    if path.is_dir():
        raise UserError("is a folder, and one image is expected", path)
    if not suffix_of(path):
        raise UserError("is of no supported format", path, f"{SUPPORTED}. Of header and voxels, give the header.")
    try:
        if suffix_of(path) in PAIRS and path.is_file():
            _require_pair(path)
        problem = _defect(path)
    except OSError as error:
        raise UserError(f"cannot be opened ({error.strerror})", path) from None
    if problem:
        raise UserError(problem, path, AGAIN if path.is_file() else "")


def require_bytes(path: Path, needed: int, picture: bool = False) -> None:
    """Refuse a file that is too small for the voxels in its header, before memory is allocated for them.

    Parameters
    ----------
    path : Path
        An image.
    needed : int
        Bytes of its voxels.
    picture : bool
        Whether a codec for pictures may have compressed them.

    Raises
    ------
    UserError
        No compression reaches this ratio.
    """
    size = path.stat().st_size
    if needed > size * (_PICTURE_LIMIT if picture else DEFLATE_LIMIT):
        raise UserError(f"is truncated: {size} bytes cannot hold the {needed} that its header states", path, AGAIN)


def is_gzip(path: Path) -> bool:
    """Return whether a file begins as gzip does, whatever its name is.

    Parameters
    ----------
    path : Path
        An existing file.

    Returns
    -------
    bool
        Whether the first two bytes are those of gzip.
    """
    with path.open("rb") as file:
        return file.read(2) == b"\x1f\x8b"


def gzip_defect(path: Path) -> str | None:
    """Say what is wrong with a compressed file. Decompresses all of it.

    Parameters
    ----------
    path : Path
        A file that could not be read.

    Returns
    -------
    str or None
        None if it can be decompressed.
    """
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


def _defect(path: Path) -> str | None:
    """Say what is wrong with a file of a supported format: missing, empty, truncated, or without its other half."""
    if not path.exists():
        return "there is no such file"
    if not path.is_file():
        return "is a pipe or a device, not a file"
    with path.open("rb") as file:
        size = file.seek(0, os.SEEK_END)
    if size == 0:
        return "is empty (0 bytes)"
    voxels = voxel_file(path)
    if voxels and not (path.parent / voxels).is_file() and "%" not in voxels and not voxels.upper().startswith("LIST"):
        return f"names {voxels} for its voxels, which is not there"
    suffix = suffix_of(path)
    if suffix in _HEADERS and not companions(path):
        return "needs the file of its voxels with it, which is not there"
    if suffix in _VOXELS and not header_of(path):
        return "needs its header (.hdr) with it, which is not there"
    is_cut = _is_cut_gipl if suffix in GIPL else _is_cut_metaimage if suffix == ".mha" else _is_cut_picture
    return f"is truncated: it ends after {size} bytes" if is_cut(path) else None


def _require_pair(path: Path) -> None:
    """Refuse a file that needs no other one, and files of which only one is compressed: nibabel reads neither."""
    compressed, head = is_gzip(path), b""
    with gzip.open(path) if compressed else path.open("rb") as file, suppress(EOFError, gzip.BadGzipFile, zlib.error):
        head = file.read(_NIFTI_HEADER)
    if head[344:] == b"n+1\0":
        fix = f"Rename it to {stem(path)}.nii{'.gz' if compressed else ''}."
        raise UserError("is a NIfTI file with header and voxels", path, fix)
    others = [other for other in (*companions(path), header_of(path)) if other]
    if others and all(is_gzip(other) != compressed for other in others):
        raise UserError(f"one of it and {others[0].name} is compressed", path, "Compress both with gzip, or neither.")


def _is_cut_picture(path: Path) -> bool:
    """Return whether a picture lacks the mark of its format at its end, or bytes that its header states.

    False for TIFF and what is no picture.
    """
    size, suffix = path.stat().st_size, suffix_of(path)
    with path.open("rb") as file:
        head = file.read(64)
        file.seek(max(0, size - 4096))
        tail = file.read()
    if suffix == ".png":
        return head.startswith(b"\x89PNG") and b"IEND" not in tail
    if suffix in (".jpg", ".jpeg"):
        return head.startswith(b"\xff\xd8") and b"\xff\xd9" not in tail
    return suffix == ".bmp" and head.startswith(b"BM") and size < int.from_bytes(head[2:6].ljust(4, b"\0"), "little")


def _is_cut_metaimage(path: Path) -> bool:
    """Return whether voxels that are not compressed are too few; ITK finds it too, and prints lines of its own."""
    with path.open("rb") as file:
        head, _, _ = file.read(4096).partition(b"LOCAL")
    fields = dict(re.findall(rb"^(\w+) *= *([^\r\n]*)", head, re.MULTILINE))
    size = _META_BYTES.get(fields.get(b"ElementType", b"").removeprefix(b"MET_").removeprefix(b"U"), 0)
    counts = (fields.get(name, b"").split() for name in (b"DimSize", b"ElementNumberOfChannels"))
    values = math.prod(int(n) for found in counts for n in found if n.isdigit())
    is_raw = fields.get(b"CompressedData", b"False").lower() == b"false"
    return is_raw and size * values > path.stat().st_size - len(head)


def _is_cut_gipl(path: Path) -> bool:
    """Return whether a GIPL file lacks voxels of its header; ITK reads zeros for them."""
    with gzip.open(path) if is_gzip(path) else path.open("rb") as file:
        try:
            head = file.read(_GIPL_HEADER)
            if len(head) < _GIPL_HEADER:
                return True
            *shape, kind = struct.unpack_from(">5H", head)
            missing = math.prod(n for n in shape if n) * _GIPL_BYTES.get(kind, 0)
            while piece := file.read(1 << 20):
                missing -= len(piece)
        except (EOFError, zlib.error):
            return True
    return missing > 0
