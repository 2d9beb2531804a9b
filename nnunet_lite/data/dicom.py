"""DICOM: series are read as one array.

SimpleITK (GDCM) reads headers and pixels, one file at a time, and applies the rescale slope and intercept of each
file. Its own series reader takes any set of files for a volume. Here a set that is not a volume is refused with the
numbers: several series, several images at one position, missing slices, uneven gaps, gantry tilt. The geometry of a
valid series is that of ITK: slices sorted by their positions along the normal of the image plane, LPS.
"""

from __future__ import annotations

import re
from collections import defaultdict
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from nnunet_lite import log
from nnunet_lite.data.formats import sitk
from nnunet_lite.data.geometry import Geometry, Image, in_brackets
from nnunet_lite.data.names import visible
from nnunet_lite.data.problems import few, plural
from nnunet_lite.errors import UserError, how_to_install
from nnunet_lite.system import cpus

ENDINGS = (".dcm", ".ima", ".dicom")
_TAGS = {
    "series": "0020|000e",
    "number": "0020|0011",
    "description": "0008|103e",
    "image type": "0008|0008",
    "colours": "0028|0004",
    "position": "0020|0032",
    "orientation": "0020|0037",
    "spacing": "0028|0030",
    "step": "0018|0088",
    "thickness": "0018|0050",
    "echo time": "0018|0081",
    "temporal position": "0020|0100",
    "b-value": "0018|9087",
    "acquisition": "0020|0012",
}
_DIMENSIONS = ("echo time", "temporal position", "b-value", "acquisition", "image type")  # besides the three of space
_LOCALIZER = "localizer"
_NO_SCANS = (  # classes of files that are exported with scans, by the beginning of their UIDs
    _LOCALIZER,
    "1.2.840.10008.1.3.10",  # DICOMDIR
    "1.2.840.10008.5.1.4.1.1.11.",  # presentation states
    "1.2.840.10008.5.1.4.1.1.66",  # raw data, registrations, segmentations
    "1.2.840.10008.5.1.4.1.1.88.",  # structured reports
    "1.2.840.10008.5.1.4.1.1.104.",  # documents
    "1.2.840.10008.5.1.4.1.1.481.",  # radiotherapy
)
_CLASS = re.compile(  # (0002,0002) or (0008,0016), the class: explicit, then implicit little endian
    rb"(?:\x02\x00\x02\x00|\x08\x00\x16\x00)(?:UI.\x00|.\x00\x00\x00)(1\.2\.840\.10008\.[0-9.]+)", re.DOTALL
)
_PLANNING = re.compile(rb"\x08\0\x08\0(?:CS.\0|.\0\0\0)[A-Z0-9_ \\]*LOCALIZER", re.DOTALL)  # (0008,0008)
_BARE = re.compile(rb"[\x02\x08]\0[\0-\x18]\0(?:[A-Z]{2}.\0|[\0-\x40]\0\0\0)", re.DOTALL)  # a first tag and its length
_DEPTH = 4  # levels of folders that are searched: patient, study, series, and one more
_READERS = 4  # threads; more do not help GDCM
_COSINE_TOLERANCE = 1e-3
_SPACING_TOLERANCE = 1e-3  # mm
_GAP_TOLERANCE, _LEAST_TOLERANCE = 0.02, 0.02  # of the position of a slice: share of the spacing, and mm of rounding
_SHIFT_TOLERANCE, _LEAST_SHIFT = 1e-3, 0.05  # across the slices: share of the length of the stack, and mm
_CONVERT = "Export it with one file per slice, or convert it to NIfTI first."


@dataclass(frozen=True)
class Slice:
    """The header of one file of a series.

    Parameters
    ----------
    path : Path
        The file.
    tags : dict of str to str
        Text of the header by the names in `_TAGS`; empty if the header has none.
    size : tuple of int
        (frames, rows, columns).
    channels : int
        Values per pixel.
    position : tuple of float
        Of the first voxel, LPS mm (x, y, z).
    orientation : tuple of float
        Direction cosines of a row (increasing x) and a column (increasing y).
    spacing : tuple of float
        mm (y, x).
    """

    path: Path
    tags: dict[str, str]
    size: tuple[int, int, int]
    channels: int
    position: tuple[float, ...]
    orientation: tuple[float, ...]
    spacing: tuple[float, ...]


def is_series(path: Path) -> bool:
    """Return whether a path is a DICOM image, or a folder that contains one at any of four levels.

    Parameters
    ----------
    path : Path
        A file or folder.

    Returns
    -------
    bool
        Whether `read_series` may read it.
    """
    return bool(series_folders(path)) if path.is_dir() else is_scan(dicom_class(path))


def series_folders(folder: Path, depth: int = _DEPTH) -> list[Path]:
    """Return the folders that contain DICOM images: the folder itself, otherwise those inside (patient/study/series).

    Parameters
    ----------
    folder : Path
        An existing folder.
    depth : int
        Levels to search.

    Returns
    -------
    list of Path
        Sorted.
    """
    entries = visible(folder)
    if any(is_scan(dicom_class(path)) for path in entries):
        return [folder]
    inside = [path for path in entries if path.is_dir()] if depth else []
    return [found for path in inside for found in series_folders(path, depth - 1)]


def read_series(path: Path) -> Image:
    """Read a DICOM series.

    Parameters
    ----------
    path : Path
        A folder with one series, or one file of the series to read.

    Returns
    -------
    Image
        Rescaled values of one channel, of a CT in HU; a note says how many slices there are.

    Raises
    ------
    UserError
        There are several series, or the files are not a volume on a regular grid, or cannot be read.
    """
    slices = series_slices(path)
    with ThreadPoolExecutor(min(cpus(), _READERS)) as pool:
        planes = list(pool.map(_pixels, slices))  # of the type that holds all: each file has a slope of its own
    return Image(np.stack(planes)[None], _geometry(slices), (f"DICOM series of {plural(len(slices), 'slice')}",))


def series_geometry(path: Path) -> Geometry:
    """Read the geometry of a DICOM series from its headers.

    Parameters
    ----------
    path : Path
        As for `read_series`.

    Returns
    -------
    Geometry
        The grid.

    Raises
    ------
    UserError
        As `read_series`.
    """
    return _geometry(series_slices(path))


def series_slices(path: Path) -> list[Slice]:
    """Return the checked files of a series, sorted by their positions along the normal.

    Parameters
    ----------
    path : Path
        As for `read_series`.

    Returns
    -------
    list of Slice
        At least one.

    Raises
    ------
    UserError
        As `read_series`.
    """
    slices = _one_series(path)
    for header in slices:
        _require_grey_slice(header)
    _require_equal(slices, "rows and columns", [s.size[1:] for s in slices], 0)
    _require_equal(slices, "orientation", [s.orientation for s in slices], _COSINE_TOLERANCE)
    _require_equal(slices, "pixel spacing in mm", [s.spacing for s in slices], _SPACING_TOLERANCE)
    normal = _axes(slices)[2]
    slices = sorted(slices, key=lambda s: float(normal @ s.position))
    _require_regular(path, slices)
    return slices


# ---------------------------------------------------------------------------------------------------------------- files


def dicom_class(path: Path) -> str | None:
    """Return the class of a DICOM file, with or without its preamble of 128 bytes.

    Parameters
    ----------
    path : Path
        Any path.

    Returns
    -------
    str or None
        Its UID; empty if it is not in the first bytes; "localizer" if it is one. None if the path is not a DICOM file.
    """
    if path.name.startswith(".") or not path.is_file():
        return None
    with path.open("rb") as file:
        head = file.read(1024)
    if head[128:132] != b"DICM" and not _BARE.match(head):
        return None
    if _PLANNING.search(head):
        return _LOCALIZER
    found = _CLASS.search(head)
    return found[1].decode("ascii") if found else ""


def is_scan(uid: str | None) -> bool:
    """Return whether the UID of a class is that of images that may be slices of a series.

    Parameters
    ----------
    uid : str or None
        As `dicom_class` returns it.

    Returns
    -------
    bool
        False for localizers, segmentations, reports, radiotherapy objects and what is not DICOM.
    """
    return uid is not None and not uid.startswith(_NO_SCANS)


def _one_series(path: Path) -> list[Slice]:
    """Return the headers of the only series of a folder, or of the series of a file."""
    folder = path if path.is_dir() else path.parent
    series: dict[str, list[Slice]] = defaultdict(list)
    for file in (file for found in series_folders(folder) for file in _scans(found)):
        header = _read_slice(file)
        series[header.tags["series"]].append(header)
    if not path.is_dir():
        return series[_read_slice(path).tags["series"]]
    if not series:
        raise UserError("holds no DICOM image", folder)
    if len(series) > 1:
        names = "; ".join(_describe(slices, folder) for slices in series.values())
        fix = "Give one file of the series that you want instead of the folder."
        raise UserError(f"holds {len(series)} series: {names}", folder, fix)
    return next(iter(series.values()))


def _scans(folder: Path) -> list[Path]:
    """Return the DICOM images of a folder; warn of files that could have been images."""
    classes = {path: dicom_class(path) for path in visible(folder) if path.is_file()}
    others = [path for path, uid in classes.items() if uid is None]
    if broken := [path for path in others if path.suffix.lower() in ENDINGS]:
        raise UserError("is not a DICOM file, or a damaged one", broken[0], "Copy or export it again, or remove it.")
    if unclear := [path.name for path in others if not path.suffix[1:].isalpha()]:
        log.warn(f"{folder}: ignored, since it is not DICOM: {few(unclear)}")
    return [path for path, uid in classes.items() if is_scan(uid)]


def _describe(slices: list[Slice], folder: Path) -> str:
    first = slices[0]
    name = first.tags["description"] or first.tags["series"] or "without a name"
    number = f"number {first.tags['number']}, " if first.tags["number"] else ""
    return f"{name} ({number}{plural(len(slices), 'file')}, such as {first.path.relative_to(folder)})"


def _reader(path: Path) -> Any:
    reader = sitk().ImageFileReader()
    reader.SetImageIO("GDCMImageIO")
    reader.SetFileName(str(path))
    return reader


def _read_slice(path: Path) -> Slice:
    reader = _reader(path)
    try:
        reader.ReadImageInformation()
    except RuntimeError:
        raise UserError("is damaged or truncated, or holds no image", path, "Copy or export it again.") from None
    tags = {name: _text(reader.GetMetaData(key)) if reader.HasMetaDataKey(key) else "" for name, key in _TAGS.items()}
    columns, rows, *frames = reader.GetSize()
    return Slice(
        path=path,
        tags=tags,
        size=(frames[0] if frames else 1, rows, columns),
        channels=reader.GetNumberOfComponents(),
        position=_numbers(tags["position"], 3),
        orientation=_numbers(tags["orientation"], 6),
        spacing=_numbers(tags["spacing"], 2),
    )


def _pixels(source: Slice) -> np.ndarray:
    """Return the rescaled pixels (y, x) of a file: integers if slope and intercept are integers, otherwise float32."""
    try:
        array = sitk().GetArrayFromImage(_reader(source.path).Execute())
    except RuntimeError:
        raise UserError("its pixels cannot be decoded", source.path, "Copy or export it again.") from None
    return array[0].astype(np.float32) if array.dtype == np.float64 else array[0]


def _text(value: str) -> str:
    """Return the text of a header without surrogates, which cannot be printed: letters that are not UTF-8."""
    return value.encode("utf-8", "surrogateescape").decode("utf-8", "replace").strip(" \0")


def _numbers(text: str, n: int) -> tuple[float, ...]:
    """Return n finite numbers of a header; none if it has another number of them."""
    try:
        values = tuple(float(part) for part in text.split("\\"))
    except ValueError:
        return ()
    return values if len(values) == n and np.isfinite(values).all() else ()


# --------------------------------------------------------------------------------------------------------------- checks


def _require_grey_slice(header: Slice) -> None:
    """Refuse a file that does not contain one slice of grey values, or does not state its place in space."""
    frames, rows, columns = header.size
    if frames > 1:
        raise UserError(f"is a multi-frame file of {frames} frames", header.path, _CONVERT)
    if "MOSAIC" in header.tags["image type"]:
        raise UserError(f"is a mosaic: many slices in one picture of {rows} x {columns}", header.path, _CONVERT)
    if header.channels > 1 or header.tags["colours"] != "MONOCHROME2":
        what = f"holds {header.tags['colours'] or 'unnamed'} values, {header.channels} per pixel, not MONOCHROME2"
        raise UserError(what, header.path, "Only slices of grey values, as of CT and MR, make up a volume.")
    for name in ("position", "orientation", "spacing"):
        if not getattr(header, name):
            stated = f"{header.tags[name]!r}" if header.tags[name] else "not there"
            what = f"has no place in space: its {name} is {stated}"
            raise UserError(what, header.path, "Is it a slice of a volume?")
    row, column = np.reshape(header.orientation, (2, 3))
    skew = np.abs([row @ row - 1, column @ column - 1, row @ column]).max()
    if skew > _COSINE_TOLERANCE or min(header.spacing) <= 0:
        orientation, spacing = in_brackets(header.orientation), in_brackets(header.spacing)
        what = f"has the orientation {orientation} and the pixel spacing {spacing} mm"
        raise UserError(what, header.path, "Directions have length 1 and are at right angles; spacings are positive.")


def _require_equal(slices: list[Slice], what: str, values: list[tuple[float, ...]], tolerance: float) -> None:
    different = [i for i, value in enumerate(values) if np.abs(np.subtract(value, values[0])).max() > tolerance]
    if different:
        one, other = (f"{in_brackets(values[i])} in {slices[i].path.name}" for i in (0, different[0]))
        found = f"{one}, {other} ({len(different)} of {len(slices)} differ from the first)"
        fix = "Is it another series? Give each series a folder of its own."
        raise UserError(f"the files differ in {what}: {found}", slices[0].path.parent, fix)


def _require_regular(path: Path, slices: list[Slice]) -> None:
    """Refuse sorted slices that are not on one line along the normal, at equal distances, one at each position."""
    if len(slices) == 1:
        return
    places = np.array([s.position for s in slices]) - slices[0].position
    normal = _axes(slices)[2]
    depth = places @ normal
    _require_different_positions(path, slices, depth)
    spacing, gaps = depth[-1] / (len(slices) - 1), np.diff(depth)
    off = np.abs(depth - spacing * np.arange(len(slices)))
    sideways = places - depth[:, None] * normal
    bent = np.linalg.norm(sideways - sideways[-1] * (depth / depth[-1])[:, None], axis=1)
    tilt = float(np.linalg.norm(sideways[-1]))
    tolerance = max(_SHIFT_TOLERANCE * depth[-1], _LEAST_SHIFT)
    problem = ""
    if off.max() > max(_GAP_TOLERANCE * spacing, _LEAST_TOLERANCE):
        wide = slices[int(gaps.round(3).argmax())].path.name  # the first of equal ones
        problem = f"missing slices, or uneven gaps of {gaps.min():.4g} to {gaps.max():.4g} mm"
        problem += f" (median {np.median(gaps):.4g} mm); the widest follows {wide}"
    elif bent.max() > tolerance:
        worst = int(bent.argmax())
        problem = f"{slices[worst].path.name} is {bent[worst]:.4g} mm off the line of the others"
    elif tilt > tolerance:
        angle = np.degrees(np.arctan2(tilt, depth[-1]))
        problem = f"gantry tilt: the stack of slices leans by {angle:.3g} degrees, {tilt:.4g} mm from first to last"
    if problem:
        fix = "Export it with all its slices, or convert it to NIfTI with a tool that evens it out, such as dcm2niix."
        raise UserError(problem, path, fix)


def _require_different_positions(path: Path, slices: list[Slice], depth: np.ndarray) -> None:
    same = np.flatnonzero(np.diff(depth) < _LEAST_TOLERANCE / 2)
    if not same.size:
        return
    first, second = slices[same[0]], slices[same[0] + 1]
    values = {name: sorted({s.tags[name] for s in slices}) for name in _DIMENSIONS}
    differences = [f"{name} ({few(found)})" for name, found in values.items() if len(found) > 1]
    what = f"{same.size} of {len(slices)} slices have the position of another one, such as {first.path.name} and "
    what += f"{second.path.name} at {in_brackets(first.position)} mm"
    if differences:
        what += f"; the files differ in {', '.join(differences)}"
    fix = "Keep one image of each position: give echoes, time points or b-values a folder each, and remove copies."
    raise UserError(what, path, fix)


# ------------------------------------------------------------------------------------------------------------- geometry


def _axes(slices: list[Slice]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return unit vectors along a row, along a column, and normal to both."""
    row, column = np.reshape(slices[0].orientation, (2, 3))
    row, column = row / np.linalg.norm(row), column / np.linalg.norm(column)
    return row, column, np.cross(row, column)


def _geometry(slices: list[Slice]) -> Geometry:
    """Return the geometry of ITK: the third axis runs from the first slice to the last, in equal steps."""
    row, column, third = _axes(slices)
    if len(slices) > 1:
        path = np.subtract(slices[-1].position, slices[0].position)
        length = float(np.linalg.norm(path))
        third, step = path / length, length / (len(slices) - 1)
    else:
        step = next((v[0] for name in ("step", "thickness") if (v := _numbers(slices[0].tags[name], 1))), 0.0)
        if step <= 0:
            raise UserError("is one slice, of unknown thickness", slices[0].path)
    _, rows, columns = slices[0].size
    x, y, z = slices[0].position
    cosines = np.stack([row, column, third], axis=1) + 0.0  # no negative zeros
    spacing = (step, slices[0].spacing[0], slices[0].spacing[1])
    return Geometry((len(slices), rows, columns), spacing, (x, y, z), tuple(cosines.ravel().tolist()))


# ----------------------------------------------------------------------------------------------------------- the extra


def require_dicom() -> None:
    """Check that the extra [dicom] is installed, which writes and reads segmentations and contours.

    Raises
    ------
    UserError
        It is not.
    """
    try:
        import highdicom  # noqa: F401
    except ImportError as error:
        what = f"DICOM-SEG and RTSTRUCT need the extra [dicom] ({error})"
        raise UserError(what, fix=how_to_install("dicom")) from None
