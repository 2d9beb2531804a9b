"""Names of image files: which endings are supported, and what is left of a name without one."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

from nnunet_lite.data.complete import AGAIN, defect, is_gzip
from nnunet_lite.errors import UserError

NIFTI = (".nii.gz", ".nii")
TIFF = (".tif", ".tiff")
PICTURES = (".png", *TIFF, ".bmp", ".jpg", ".jpeg")
GIPL = (".gipl.gz", ".gipl")
PAIRS = (".hdr.gz", ".hdr", ".img.gz", ".img")  # of header and voxels, NIfTI or Analyze
NIBABEL_ONLY = (".mgz", ".mgh", *PAIRS, ".par", ".head")
SUFFIXES = (*NIFTI, ".nrrd", ".nhdr", ".mha", ".mhd", *GIPL, *PICTURES, *NIBABEL_ONLY)

_SEVERAL_FILES = (".nhdr", ".mhd", *PAIRS, ".par", ".head")  # named by each other


def suffix_of(path: Path) -> str:
    """The ending of a supported file, both parts of a double one, in lower case; empty where it is not supported."""
    name = path.name.lower()
    return next((s for s in SUFFIXES if name.endswith(s)), "")


def ending_of(path: Path) -> str:
    """The ending of a supported file as it is written in the name: `.NII.GZ`."""
    return path.name[len(path.name) - len(suffix_of(path)) :]


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
    if path.name.endswith(suffix) and (suffix != ".nii" or not path.name.endswith(".nii.gz")):
        yield path
        return
    if suffix in _SEVERAL_FILES:
        yield path
        return
    with TemporaryDirectory() as folder:
        link = Path(folder) / f"image{suffix}"
        link.symlink_to(path.resolve())
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
        raise UserError("is of no supported format", path, f"Supported are {' '.join(SUFFIXES)}.")
    problem = defect(path)
    if problem:
        raise UserError(problem, path, AGAIN if path.exists() else "")
