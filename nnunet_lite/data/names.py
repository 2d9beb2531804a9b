"""Names of image files: which endings are supported, and what is left of a name without one."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

from nnunet_lite.data.complete import AGAIN, defect, elsewhere, is_gzip
from nnunet_lite.errors import UserError

NIFTI = (".nii.gz", ".nii")
TIFF = (".tif", ".tiff")
PICTURES = (".png", *TIFF, ".bmp", ".jpg", ".jpeg")
GIPL = (".gipl.gz", ".gipl")
PAIRS = (".hdr.gz", ".hdr", ".img.gz", ".img")  # of header and voxels, NIfTI or Analyze
NIBABEL_ONLY = (".mgz", ".mgh", *PAIRS, ".par", ".head")
SUFFIXES = (*NIFTI, ".nrrd", ".nhdr", ".mha", ".mhd", *GIPL, *PICTURES, *NIBABEL_ONLY)

_HEADERS = {".rec": "the .PAR file", ".brik": "the .HEAD file", ".raw": "the .mhd or .nhdr file",
            ".zraw": "the .mhd file"}  # fmt: skip


def suffix_of(path: Path) -> str:
    """The ending of a supported file, both parts of a double one, in lower case; empty where it is not supported."""
    name = path.name.lower()
    return next((s for s in SUFFIXES if name.endswith(s)), "")


def ending_of(path: Path) -> str:
    """The ending of a supported file as it is written in the name: `.NII.GZ`."""
    return path.name[len(path.name) - len(suffix_of(path)) :]


def companions(path: Path) -> list[Path]:
    """The other files that an image is read from: voxels that its header names, and the spacing of a TIFF file."""
    suffix, name = suffix_of(path), stem(path)
    if suffix in TIFF:
        names = [f"{name}.json", re.sub(r"_\d{4}$", "", name) + ".json"]
    elif suffix in (".hdr", ".hdr.gz", ".par", ".head"):
        endings = {".par": (".rec",), ".head": (".brik", ".brik.gz")}.get(suffix, (".img", ".img.gz"))
        names = [name + written for ending in endings for written in (ending, ending.upper())]
    else:
        names = [elsewhere(path)] if path.is_file() else []
    return [path.with_name(other) for other in dict.fromkeys(filter(None, names)) if (path.parent / other).is_file()]


def header_of(path: Path) -> Path | None:
    """The header (.hdr) of a file of voxels (.img), where that exists; it is the image of the two."""
    if suffix_of(path) not in (".img", ".img.gz"):
        return None
    names = (stem(path) + ending for ending in (".hdr", ".HDR", ".hdr.gz", ".HDR.GZ"))
    return next((path.with_name(name) for name in names if path.with_name(name).is_file()), None)


@contextmanager
def usual_name(path: Path) -> Iterator[Path]:
    """A path to a file whose ending is in lower case and fits its content, since libraries choose the reader by it."""
    suffix = suffix_of(path)
    if suffix in NIFTI:
        suffix = ".nii.gz" if is_gzip(path) else ".nii"
    if suffix in (".par", ".head") or (path.name.endswith(suffix) and suffix_of(path) == suffix):
        yield path
        return
    others = [other for other in (*companions(path), header_of(path)) if other and suffix not in TIFF]
    with TemporaryDirectory() as folder:
        link = Path(folder) / f"image{suffix}"
        link.symlink_to(path.resolve())
        for other in others:  # a header names its voxels, or has their name
            named = elsewhere(path) or "image" + other.name[len(stem(path)) :].lower()
            (link.parent / named).parent.mkdir(parents=True, exist_ok=True)
            (link.parent / named).symlink_to(other.resolve())
        yield link


def stem(path: Path) -> str:
    """The file's name without its (double) ending."""
    return path.name[: len(path.name) - len(suffix_of(path) or path.suffix)]


def must_be_readable(path: Path) -> None:
    """Refuse a file that is of no supported format, or is no whole file.

    Raises
    ------
    UserError : says what is wrong with it as a file.
    """
    if not suffix_of(path):
        header = _HEADERS.get(path.suffix.lower()) or _HEADERS.get(Path(path.stem).suffix.lower())
        fix = f"Give its header, {header}, instead." if header else f"Supported are {' '.join(SUFFIXES)}."
        raise UserError("is of no supported format", path, fix)
    problem = defect(path)
    if problem:
        raise UserError(problem, path, AGAIN if path.exists() else "")
