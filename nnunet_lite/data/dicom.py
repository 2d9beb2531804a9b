"""DICOM series: the slices of one CT or MR volume, checked, put in order and read as one array with its geometry.

SimpleITK (GDCM) reads headers and pixels, one file at a time, and applies each file's rescale slope and intercept. Its
own series reader takes any pile of files for a volume. Here a pile that is no volume is refused with the numbers:
several series, several images of one place, slices missing, uneven or sheared by a gantry tilt. The geometry of a sound
series is ITK's: the slices in order of their positions along the normal of the image plane, LPS.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from nnunet_lite import log
from nnunet_lite.data.geometry import Geometry
from nnunet_lite.data.problems import plural
from nnunet_lite.errors import UserError
from nnunet_lite.system import cpus

ENDINGS = (".dcm", ".ima", ".dicom")
_TAGS = {
    "series": "0020|000e",
    "number": "0020|0011",
    "description": "0008|103e",
    "image type": "0008|0008",
    "frames": "0028|0008",
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
_DIMENSIONS = ("echo time", "temporal position", "b-value", "acquisition", "image type")  # beside the three of space
_NO_SCANS = (  # classes of files that lie beside scans, by how their UIDs begin
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
_DEEPEST = 4  # folders below the one that is given: patient, study, series, and one to spare
_READERS = 4  # threads; more do not help GDCM
_COSINE_TOLERANCE = 1e-3
_SPACING_TOLERANCE = 1e-3  # mm
_GAP_TOLERANCE, _LEAST_TOLERANCE = 0.02, 0.02  # of a slice's place: share of the spacing, and mm that rounding takes
_SHIFT_TOLERANCE, _LEAST_SHIFT = 1e-3, 0.05  # across the slices: share of the stack's length, and mm
_CONVERT = "Export it with one file per slice, or convert it to NIfTI first."
_REGRID = "Export it with all its slices, or convert it to NIfTI with a tool that evens it out, such as dcm2niix."


@dataclass(frozen=True)
class Slice:
    """One file of a series.

    Parameters
    ----------
    tags : the header's text by the names of `_TAGS`; empty where the header has none.
    size : (frames, rows, columns).
    position : of the first voxel, LPS mm (x, y, z).
    orientation : direction cosines of a row (increasing x) and a column (increasing y).
    spacing : mm (y, x).
    """

    path: Path
    tags: dict[str, str]
    size: tuple[int, int, int]
    channels: int
    position: tuple[float, ...]
    orientation: tuple[float, ...]
    spacing: tuple[float, ...]


def is_series(path: Path) -> bool:
    """Whether a path is a DICOM file with an image, or a folder that holds one, itself or in folders below it."""
    return bool(series_folders(path)) if path.is_dir() else _is_scan(path)


def series_folders(folder: Path, depth: int = _DEEPEST) -> list[Path]:
    """The folder itself if it holds DICOM images, else those below it that do: patient/study/series."""
    inside = sorted(path for path in folder.iterdir() if not path.name.startswith("."))
    if any(_is_scan(path) for path in inside):
        return [folder]
    below = [path for path in inside if path.is_dir()] if depth else []
    return [found for path in below for found in series_folders(path, depth - 1)]


def read_series(path: Path) -> tuple[np.ndarray, Geometry, tuple[str, ...]]:
    """Array (1, z, y, x), rescaled (a CT in HU), geometry, and a note.

    Parameters
    ----------
    path : a folder with one series, or one file of the series that is wanted.

    Raises
    ------
    UserError : several series, or files that make up no volume on a regular grid, or cannot be read.
    """
    slices = series_slices(path)
    volume: np.ndarray | None = None
    with ThreadPoolExecutor(min(cpus(), _READERS)) as pool:
        for i, plane in enumerate(pool.map(_pixels, slices)):
            if volume is None:
                volume = np.empty((1, len(slices), *plane.shape), plane.dtype)
            elif (common := np.result_type(volume, plane)) != volume.dtype:  # each file has a slope of its own
                volume = volume.astype(common)
            volume[0, i] = plane
    assert volume is not None  # a series has a file
    return volume, _geometry(slices), (f"DICOM series of {plural(len(slices), 'slice')}",)


def series_geometry(path: Path) -> Geometry:
    """The geometry of a series from its headers; raises as `read_series`."""
    return _geometry(series_slices(path))


def series_slices(path: Path) -> list[Slice]:
    """The files of a series, checked, in order of their positions along the normal; raises as `read_series`."""
    slices = _one_series(path)
    _must_be_grey_slices(slices)
    _must_be_alike(slices, "size", "voxels", [s.size[1:] for s in slices], 0)
    _must_be_alike(slices, "orientation", "", [s.orientation for s in slices], _COSINE_TOLERANCE)
    _must_be_alike(slices, "pixel spacing", "mm", [s.spacing for s in slices], _SPACING_TOLERANCE)
    normal = _axes(slices)[2]
    slices = sorted(slices, key=lambda s: float(normal @ s.position))
    _must_be_regular(path, slices)
    return slices


# -------------------------------------------------------------------------------------------------------------- files


def _is_scan(path: Path) -> bool:
    """Whether a file is DICOM and of a class that holds images."""
    if path.name.startswith(".") or not path.is_file():
        return False
    with path.open("rb") as file:
        head = file.read(1024)
    found = _CLASS.search(head)
    return _begins_as_dicom(head) and not (found and found[1].decode("ascii").startswith(_NO_SCANS))


def _begins_as_dicom(head: bytes) -> bool:
    """Whether the first bytes of a file are those of DICOM, with its preamble of 128 bytes or without."""
    if head[128:132] == b"DICM":
        return True
    return head[:2] in (b"\x02\0", b"\x08\0") and head[3:4] == b"\0" and _CLASS.search(head) is not None


def _one_series(path: Path) -> list[Slice]:
    """The headers of the only series of a folder, or of that which a file belongs to."""
    folder = path if path.is_dir() else path.parent
    series: dict[str, list[Slice]] = defaultdict(list)
    for file in (file for place in series_folders(folder) for file in _scans(place)):
        found = _header(file)
        series[found.tags["series"]].append(found)
    if not path.is_dir():
        return series[_header(path).tags["series"]]
    if not series:
        raise UserError("holds no DICOM image", folder)
    if len(series) > 1:
        names = "; ".join(_describe(slices, folder) for slices in series.values())
        fix = "Give one file of the series that you want instead of the folder."
        raise UserError(f"holds {len(series)} series: {names}", folder, fix)
    return next(iter(series.values()))


def _scans(folder: Path) -> list[Path]:
    """The DICOM images of a folder; what else might have been one is named."""
    files = sorted(path for path in folder.iterdir() if path.is_file() and not path.name.startswith("."))
    scans = [path for path in files if _is_scan(path)]
    others = [path for path in files if path not in set(scans) and not _is_dicom(path)]
    if broken := [path for path in others if path.suffix.lower() in ENDINGS]:
        raise UserError("is no DICOM file, or a damaged one", broken[0], "Copy or export it again, or remove it.")
    if unclear := [path.name for path in others if not path.suffix[1:].isalpha()]:
        log.warn(f"{folder}: no DICOM, passed over: {_some(unclear)}")
    return scans


def _is_dicom(path: Path) -> bool:
    with path.open("rb") as file:
        return _begins_as_dicom(file.read(1024))


def _describe(slices: list[Slice], folder: Path) -> str:
    first = slices[0]
    name = first.tags["description"] or first.tags["series"] or "without a name"
    number = f"number {first.tags['number']}, " if first.tags["number"] else ""
    return f"{name} ({number}{plural(len(slices), 'file')}, such as {first.path.relative_to(folder)})"


def _reader(path: Path) -> Any:
    import SimpleITK as sitk

    sitk.ProcessObject.SetGlobalWarningDisplay(False)
    reader = sitk.ImageFileReader()
    reader.SetImageIO("GDCMImageIO")
    reader.SetFileName(str(path))
    return reader


def _header(path: Path) -> Slice:
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
    """The rescaled pixels (y, x) of a file: integers where slope and intercept are, else float32."""
    import SimpleITK as sitk

    try:
        array = sitk.GetArrayFromImage(_reader(source.path).Execute())
    except RuntimeError:
        raise UserError("its pixels cannot be decoded", source.path, "Copy or export it again.") from None
    return array[0].astype(np.float32) if array.dtype == np.float64 else array[0]


def _text(value: str) -> str:
    """A header's text; letters that are not UTF-8 come as halves of surrogate pairs, which cannot be printed."""
    return value.encode("utf-8", "surrogateescape").decode("utf-8", "replace").strip(" \0")


def _numbers(text: str, n: int) -> tuple[float, ...]:
    """n numbers of a header; none where there are not that many, or one is not finite."""
    try:
        values = tuple(float(part) for part in text.split("\\"))
    except ValueError:
        return ()
    return values if len(values) == n and np.isfinite(values).all() else ()


# ------------------------------------------------------------------------------------------------------------- checks


def _must_be_grey_slices(slices: Iterable[Slice]) -> None:
    """Each file holds one slice, of grey values, and says where it lies."""
    for s in slices:
        frames, rows, columns = s.size
        if frames > 1:
            raise UserError(f"is a multi-frame file of {frames} frames", s.path, _CONVERT)
        if "MOSAIC" in s.tags["image type"]:
            raise UserError(f"is a mosaic: many slices in one picture of {rows} x {columns}", s.path, _CONVERT)
        if s.channels > 1 or s.tags["colours"] != "MONOCHROME2":
            what = f"holds {s.tags['colours'] or 'unnamed'} values, {s.channels} per pixel, no MONOCHROME2"
            raise UserError(what, s.path, "Only slices of grey values, as of CT and MR, make up a volume.")
        missing = [name for name in ("position", "orientation", "spacing") if not getattr(s, name)]
        if missing:
            told = f"{s.tags[missing[0]]!r}" if s.tags[missing[0]] else "not there"
            raise UserError(f"has no place in space: its {missing[0]} is {told}", s.path, "Is it a slice of a volume?")
        row, column = np.reshape(s.orientation, (2, 3))
        if np.abs([row @ row - 1, column @ column - 1, row @ column]).max() > _COSINE_TOLERANCE or min(s.spacing) <= 0:
            what = f"has the orientation {_listed(s.orientation)} and the pixel spacing {_listed(s.spacing)} mm"
            raise UserError(what, s.path, "Directions have length 1 and are at right angles; spacings are positive.")


def _must_be_alike(
    slices: list[Slice], what: str, unit: str, values: list[tuple[float, ...]], tolerance: float
) -> None:
    different = [i for i, value in enumerate(values) if np.abs(np.subtract(value, values[0])).max() > tolerance]
    if different:
        i = different[0]
        raise UserError(
            f"the files differ in {what}: {_listed(values[0])} {unit}".rstrip()
            + f" in {slices[0].path.name}, {_listed(values[i])} in {slices[i].path.name}"
            + f" ({len(different)} of {len(slices)} differ from the first)",
            slices[0].path.parent,
            "Is it a localizer, or another series? Give each series a folder of its own.",
        )


def _must_be_regular(path: Path, slices: list[Slice]) -> None:
    """Slices in order of depth lie one behind the other, evenly, each place once."""
    if len(slices) == 1:
        return
    places = np.array([s.position for s in slices])
    normal = _axes(slices)[2]
    depth = (places - places[0]) @ normal
    spacing = depth[-1] / (len(slices) - 1)
    tolerance = max(_GAP_TOLERANCE * spacing, _LEAST_TOLERANCE)
    _must_differ_in_place(path, slices, depth)
    problems = [_tilt(slices, (places - places[0]) - depth[:, None] * normal, depth)]
    if np.abs(depth - spacing * np.arange(len(slices))).max() > tolerance:
        problems.append(_uneven(slices, np.diff(depth), tolerance))
    if told := "; ".join(problem for problem in problems if problem):
        raise UserError(told, path, _REGRID)


def _must_differ_in_place(path: Path, slices: list[Slice], depth: np.ndarray) -> None:
    same = np.flatnonzero(np.diff(depth) < _LEAST_TOLERANCE / 2)
    if not same.size:
        return
    first, second = slices[same[0]], slices[same[0] + 1]
    found = {name: sorted({s.tags[name] for s in slices}) for name in _DIMENSIONS}
    ways = [f"{name} ({_some(values)})" for name, values in found.items() if len(values) > 1]
    what = f"{same.size} of {len(slices)} slices lie where another one does, such as {first.path.name} and "
    what += f"{second.path.name} at {_listed(first.position)} mm"
    if ways:
        what += f"; the files differ in {', '.join(ways)}"
    fix = "Leave one image of each place: give echoes, time points or b-values a folder each, and remove copies."
    raise UserError(what, path, fix)


def _tilt(slices: list[Slice], shifts: np.ndarray, depth: np.ndarray) -> str:
    """How slices are shifted (n, xyz) in their own planes as they go deeper; nothing where they are not."""
    tolerance = max(_SHIFT_TOLERANCE * depth[-1], _LEAST_SHIFT)
    amounts = np.linalg.norm(shifts, axis=1)
    if amounts.max() <= tolerance:
        return ""
    straight = np.linalg.norm(shifts - shifts[-1] * (depth / depth[-1])[:, None], axis=1)
    if straight.max() <= tolerance:
        angle = np.degrees(np.arctan2(amounts[-1], depth[-1]))
        return f"gantry tilt: the stack of slices leans by {angle:.3g} degrees, {amounts[-1]:.4g} mm from first to last"
    worst = int(straight.argmax())
    return f"{slices[worst].path.name} lies {straight[worst]:.4g} mm beside the line of the other slices"


def _uneven(slices: list[Slice], gaps: np.ndarray, tolerance: float) -> str:
    usual = float(np.median(gaps))
    whole = np.rint(gaps / usual)
    wide = int(gaps.round(3).argmax())  # the first of equal ones
    after = f"the widest follows {slices[wide].path.name}"
    if whole.max() > 1 and np.abs(gaps - whole * usual).max() <= tolerance:
        missing = plural(int((whole - 1).sum()), "slice")
        return f"missing {missing}: gaps of {usual:.4g} mm, but also of {gaps[wide]:.4g} mm; {after}"
    return f"uneven gaps of {gaps.min():.4g} to {gaps.max():.4g} mm (median {usual:.4g} mm); {after}"


# ----------------------------------------------------------------------------------------------------------- geometry


def _axes(slices: list[Slice]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Unit vectors along a row, along a column, and normal to both."""
    row, column = np.reshape(slices[0].orientation, (2, 3))
    row, column = row / np.linalg.norm(row), column / np.linalg.norm(column)
    return row, column, np.cross(row, column)


def _geometry(slices: list[Slice]) -> Geometry:
    """As ITK has it: the third axis leads from the first slice to the last, evenly."""
    row, column, deep = _axes(slices)
    if len(slices) > 1:
        path = np.subtract(slices[-1].position, slices[0].position)
        length = float(np.linalg.norm(path))
        deep, step = path / length, length / (len(slices) - 1)
    else:
        step = next((v[0] for name in ("step", "thickness") if (v := _numbers(slices[0].tags[name], 1))), 0.0)
        if step <= 0:
            raise UserError("is one slice, of unknown thickness", slices[0].path)
    _, rows, columns = slices[0].size
    x, y, z = slices[0].position
    cosines = np.stack([row, column, deep], axis=1) + 0.0  # no negative zeros
    spacing = (step, slices[0].spacing[0], slices[0].spacing[1])
    return Geometry((len(slices), rows, columns), spacing, (x, y, z), tuple(cosines.ravel().tolist()))


def _some(names: list[str]) -> str:
    return ", ".join(names[:4]) + (" ..." if len(names) > 4 else "")


def _listed(values: Iterable[float]) -> str:
    return "(" + ", ".join(f"{v:.6g}" for v in values) + ")"
