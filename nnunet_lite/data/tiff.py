"""TIFF files as arrays (channels, z, y, x): pictures, stacks, ImageJ and OME files, with the spacing that they state.

tifffile decodes every layout and number format, with imagecodecs every compression, and names the axes of a file. What
cannot be one volume is refused: a time axis, several images, axes without a meaning, files that end too early.
"""

from __future__ import annotations

import logging
import math
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np

from nnunet_lite.data.complete import AGAIN, must_hold
from nnunet_lite.data.geometry import PICTURE_SPACING, Geometry
from nnunet_lite.data.names import companions, must_be_readable
from nnunet_lite.errors import UserError
from nnunet_lite.files import read_json

Spacing = tuple[float, float, float]

_UNITS = {  # in mm
    **dict.fromkeys(("m", "meter", "metre", "meters", "metres"), 1e3),
    **dict.fromkeys(("cm", "centimeter", "centimetre"), 10.0),
    **dict.fromkeys(("mm", "millimeter", "millimetre", "millimeters", "millimetres"), 1.0),
    **dict.fromkeys(("um", "µm", "μm", "micron", "microns", "micrometer", "micrometre", "micrometers"), 1e-3),
    **dict.fromkeys(("nm", "nanometer", "nanometre", "nanometers"), 1e-6),
    **dict.fromkeys(("pm", "picometer", "picometre"), 1e-9),
    **dict.fromkeys(("å", "angstrom", "ångström"), 1e-7),
    **dict.fromkeys(("inch", "in", "inches"), 25.4),
    "ft": 304.8,
}
_RESOLUTION_UNITS = {2: "inch", 3: "cm"}  # tag 296; 1 is no unit
_SCREEN = 72  # dots per inch that programs write where they know nothing
_TAG_BYTES = {1: 1, 2: 1, 3: 2, 4: 4, 5: 8, 6: 1, 7: 1, 8: 2, 9: 4, 10: 8, 11: 4, 12: 8, 13: 4, 16: 8, 17: 8, 18: 8}
_ALPHA = (1, 2)  # of the tag ExtraSamples: associated and unassociated alpha
_PALETTE, _WHITE_IS_ZERO, _COLOURS = 3, 0, (2, 3, 6)  # PhotometricInterpretation: RGB, palette, YCbCr
_FOREIGN = {5: "CMYK", 6: "YCbCr", 8: "CIELab", 9: "ICCLab", 10: "ITULab"}  # colours that tifffile leaves as they are
_LOSSLESS = (1, 5, 8, 32773, 32946, 50000)  # Compression: of YCbCr any other is JPEG, which is decoded to RGB
_SIDE_IMAGES = ("label", "macro", "thumbnail", "map")  # of a whole slide
_ONE_VOLUME = "Save one volume or picture in a file."


def read_tiff(path: Path, resolve_palette: bool = True) -> tuple[np.ndarray, Geometry, list[str]]:
    """Read a TIFF file.

    Parameters
    ----------
    path : Path
    resolve_palette : bool
        Whether a pixel of a palette picture is its colour (3 channels), or the number of its colour.

    Returns
    -------
    tuple
        Array (channels, z, y, x), geometry (mm), and notes on what had to be understood: "RGB picture", "palette
        picture", and whole ones.

    Raises
    ------
    UserError : missing, truncated or unreadable; no single volume; complex numbers.
    """
    with _opened(path) as (tif, series):
        page = series.keyframe
        array = series.asarray()
        if page.bitspersample == 1:
            # tifffile marks masks as white is zero and means one is true
            inverted = page.photometric == _WHITE_IS_ZERO and not str(page.software).startswith("tifffile")
            array = ((array != 0) ^ inverted).astype(np.uint8) * np.uint8(255)
        array, notes = _arranged(array, series.axes, path), []
        if page.photometric == _PALETTE and not resolve_palette:
            notes.append("palette picture read as the numbers of its colours")
        elif page.photometric == _PALETTE:
            array = _colours(array, page.colormap)
            notes.append("palette picture")
        elif page.photometric in _COLOURS and page.samplesperpixel > 2:
            notes.append("RGB picture")
        elif array.shape[0] > 1:
            notes.append(f"{array.shape[0]} channels in one file, of axes {series.axes}")
        if np.iscomplexobj(array):
            raise UserError("holds complex numbers", path, "Store the magnitude.")
        orientation = _orientation(page)
        if orientation > 1:
            array = _turned(array, orientation)
            notes.append(f"turned as its orientation tag ({orientation}) says")
        kind = np.float32 if array.dtype == np.float16 else array.dtype.newbyteorder("=")
        return np.ascontiguousarray(array, kind), _geometry(tif, series, path, array.shape[1:], notes), notes


def tiff_header(path: Path) -> tuple[Geometry, int]:
    """Read geometry (mm) and number of channels of a TIFF file without its pixels; raises as `read_tiff`."""
    with _opened(path) as (tif, series):
        outline = _arranged(np.broadcast_to(np.zeros((), np.uint8), series.shape), series.axes, path)
        outline = _turned(outline, _orientation(series.keyframe))
        channels = 3 if series.keyframe.photometric == _PALETTE else outline.shape[0]
        return _geometry(tif, series, path, outline.shape[1:], []), channels


def orientation_tag(path: Path) -> int:
    """Where a TIFF file says that its first pixel is shown: 1 is the top left corner; raises as `read_tiff`."""
    with _opened(path) as (_, series):
        return _orientation(series.keyframe)


def tiff_alpha(path: Path) -> bool:
    """Say whether the last channel of a TIFF file is transparency; raises as `read_tiff`."""
    with _opened(path) as (_, series):
        page = series.keyframe
        return bool(page.extrasamples and page.extrasamples[-1] in _ALPHA and "C" not in series.axes)


@contextmanager
def _opened(path: Path) -> Iterator[tuple[Any, Any]]:
    """An open file of tifffile and its one series of pages; whatever tifffile raises names the file."""
    import tifffile

    must_be_readable(path)
    logger = logging.getLogger("tifffile")
    if not logger.handlers:
        logger.addHandler(logging.NullHandler())  # what it logs is found below, or does not matter
    try:
        with tifffile.TiffFile(path) as tif:
            series = _only_series(tif, path)
            _must_be_whole(tif, series, path)
            yield tif, series
    except (MemoryError, UserError):
        raise
    except struct.error:
        raise UserError(f"is truncated: it ends after {path.stat().st_size} bytes", path, AGAIN) from None
    except Exception as error:  # a parser of damaged bytes raises whatever it stumbles over
        reason = " ".join(str(error).split()) or type(error).__name__
        raise UserError(f"cannot be read as TIFF ({reason:.160})", path, AGAIN) from None


def _only_series(tif: Any, path: Path) -> Any:
    """The image of a file, in full resolution; thumbnails and masks do not count."""
    found = [s for s in tif.series if s.nbytes and len(s.axes) == len(s.shape)]
    series = [s for s in found if not (s.keyframe.is_reduced or s.keyframe.is_mask)] or found
    series = [s for s in series if s.name.lower() not in _SIDE_IMAGES] or series
    if not series:
        raise UserError("holds no image", path, AGAIN)
    page = series[0].keyframe
    if page.photometric in _FOREIGN and (page.photometric != 6 or page.compression in _LOSSLESS):
        raise UserError(f"stores its colours as {_FOREIGN[page.photometric]}", path, "Save it as RGB or grey.")
    if len(series) > 1:
        shapes = ", ".join(" x ".join(map(str, s.shape)) for s in series[:3]) + (" ..." if len(series) > 3 else "")
        raise UserError(f"holds {len(series)} images ({shapes})", path, _ONE_VOLUME)
    return series[0]


def _must_be_whole(tif: Any, series: Any, path: Path) -> None:
    """Refuse a file that ends before its pages or pixels do, or whose pages are in other files that are gone."""
    size = tif.filehandle.size
    must_hold(path, series.nbytes, picture=True)
    pages = list(series)
    if any(page is None for page in pages) or (tif.is_ome and series.kind != "ome"):
        raise UserError("names other files for some of its pages, which are not there", path, "Keep them together.")
    ends = [series.dataoffset + series.nbytes] if series.dataoffset is not None else []
    ends += [at + n for page in pages for at, n in zip(page.dataoffsets, page.databytecounts, strict=False)]
    ends += [_end_of_tags(tif, tif.pages[0].offset)[0]]  # such as the description of OME
    following = _end_of_tags(tif, tif.pages[len(tif.pages) - 1].offset)[1]
    if following not in {0, *(page.offset for page in tif.pages)} or max(ends) > size:
        raise UserError(f"is truncated: it ends after {size} bytes", path, AGAIN)


def _end_of_tags(tif: Any, offset: int) -> tuple[int, int]:
    """Where the values of a page's tags end in the file, and where the next page begins; 0 after the last one.

    tifffile leaves out tags and pages that would be beyond the end of the file.
    """
    kind, file = tif.tiff, tif.filehandle
    wide = kind.offsetsize == 8  # BigTIFF
    file.seek(offset)
    (count,) = struct.unpack(kind.tagnoformat, file.read(kind.tagnosize))
    entries = struct.iter_unpack(kind.byteorder + ("HHQQ" if wide else "HHII"), file.read(count * kind.tagsize))
    (following,) = struct.unpack(kind.offsetformat, file.read(kind.offsetsize))
    sizes = [(n * _TAG_BYTES.get(number, 0), value) for _, number, n, value in entries]
    return max((value + size for size, value in sizes if size > kind.offsetsize), default=0), following


def _arranged(array: np.ndarray, axes: str, path: Path) -> np.ndarray:
    """The array of a series as (channels, z, y, x); pages without a name for their axis are slices.

    Parameters
    ----------
    array : numpy.ndarray
        As tifffile reads it.
    axes : str
        A letter for each axis: C channel, S sample, Z depth, I pages, Q unknown, T time.
    """
    named = {axis: i for i, axis in enumerate(axes) if axis in "YX"}
    long = [(axis, i) for i, (axis, n) in enumerate(zip(axes, array.shape, strict=True)) if axis not in "YX" and n > 1]
    channels = [i for wanted in "CS" for axis, i in long if axis == wanted]
    depth = [i for axis, i in long if axis in "ZIQ"]
    others = [(axis, array.shape[i]) for axis, i in long if axis not in "CSZIQ"]
    shape = " x ".join(map(str, array.shape))
    if times := [n for axis, n in others if axis == "T"]:
        fix = "Save a file for each time point; if they are slices, save them as Z (ImageJ: Image > Properties)."
        raise UserError(f"holds {times[0]} time points (axes {axes}, {shape})", path, fix)
    if len(named) < 2 or others or len(depth) > 1:
        fix = "Name the axes when it is written: tifffile.imwrite(..., metadata={'axes': 'CZYX'})."
        raise UserError(f"has axes {axes} ({shape}), which are no channels, slices, rows and columns", path, fix)
    rest = [i for i in range(array.ndim) if i not in (*channels, *depth, named["Y"], named["X"])]  # of length 1
    sizes = [math.prod(array.shape[i] for i in group) for group in (channels, depth)]
    turned = array.transpose(*rest, *channels, *depth, named["Y"], named["X"])
    return turned.reshape(*sizes, array.shape[named["Y"]], array.shape[named["X"]])


def _colours(numbers: np.ndarray, table: np.ndarray) -> np.ndarray:
    """The colours (3, z, y, x) of a palette picture."""
    table = (table >> 8 if table.max() > 255 else table).astype(np.uint8)
    return table[:, numbers[0]]


def _orientation(page: Any) -> int:
    """Where the first pixel is shown, as TIFF numbers it: 1 is the top left corner."""
    tag = page.tags.get(274)
    return int(tag.value) if tag is not None and int(tag.value) in range(1, 9) else 1


def _turned(array: np.ndarray, orientation: int) -> np.ndarray:
    """An array (channels, z, y, x) as it is to be shown: orientations from 5 on swap rows and columns."""
    if orientation >= 5:
        array = array.swapaxes(2, 3)
    rows, columns = {1: (1, 1), 2: (1, -1), 3: (-1, -1), 4: (-1, 1), 5: (1, 1), 6: (1, -1), 7: (-1, -1), 8: (-1, 1)}[
        orientation
    ]
    return array[:, :, ::rows, ::columns]


# ------------------------------------------------------------------------------------------------------------- spacing


def _geometry(tif: Any, series: Any, path: Path, shape: tuple[int, ...], notes: list[str]) -> Geometry:
    """Shape and spacing; `notes` gets a line where part of the spacing had to be assumed."""
    z, y, x = shape
    spacing = _of_sidecar(path) or _of_file(tif, series, z, notes)
    if spacing and _orientation(series.keyframe) >= 5:
        spacing = (spacing[0], spacing[2], spacing[1])
    if z > 1:
        return Geometry((z, y, x), spacing or (1.0, 1.0, 1.0), oriented=False, calibrated=spacing is not None)
    plane = (max(spacing[1:]) * 999, *spacing[1:]) if spacing else PICTURE_SPACING
    return Geometry((z, y, x), plane, dimensions=2, calibrated=spacing is not None)


def _of_sidecar(path: Path) -> Spacing | None:
    """The spacing of the file `<case>.json` in the folder of a TIFF file, mm (z, y, x)."""
    for sidecar in companions(path):
        found = read_json(sidecar)
        if not isinstance(found, dict) or "spacing" not in found:  # it is about something else
            continue
        given = found["spacing"]
        numbers = isinstance(given, list) and all(type(s) in (int, float) and 0 < s < math.inf for s in given)
        if not numbers or len(given) != 3:
            raise UserError(f"spacing is {given}", sidecar, "Give three numbers in mm: [z, y, x].")
        return float(given[0]), float(given[1]), float(given[2])
    return None


def _of_file(tif: Any, series: Any, slices: int, notes: list[str]) -> Spacing | None:
    """The spacing that the file itself states, mm (z, y, x). The resolution of a plain picture is none: 72 dpi."""
    stated: dict[str, Any] = (tif.shaped_metadata or ({},))[0]
    if tif.is_ome:
        sizes = _of_ome(tif.ome_metadata)
    elif tif.is_imagej:
        sizes = _of_imagej(tif.imagej_metadata or {}, series.keyframe)
    elif {"spacing", "unit"} & set(stated):  # as tifffile keeps what it is given, and means the same by it
        sizes = _of_imagej(stated, series.keyframe)
    else:
        return None
    z, y, x = sizes
    if all(unit is None and size == 1 for size, unit in filter(None, sizes)):
        return None
    if slices > 1 and not (z and (y or x)):
        missing = "rows and columns" if z else "slices"
        notes.append(f"no spacing of the {missing} known, that of the other axes taken")
    x, y = x or y or z, y or x or z
    z = z or x
    assert z and y and x  # one of them is known
    if any(unit is None for _, unit in (z, y, x)):
        notes.append(f"spacing ({', '.join(f'{size:.6g}' for size, _ in (z, y, x))}) without a unit, taken as mm")
    mm = [size * (1.0 if unit is None else unit) for size, unit in (z, y, x)]
    return mm[0], mm[1], mm[2]


Size = tuple[float, float | None]  # of a voxel along an axis, and its unit in mm where that is known


def _of_ome(xml: str) -> list[Size | None]:
    """Sizes of a voxel along z, y and x in an OME description; micrometres where it states no unit."""
    pixels = next(element for element in ElementTree.fromstring(xml).iter() if element.tag.endswith("}Pixels"))
    sizes: list[Size | None] = []
    for axis in "ZYX":
        size = _positive(pixels.get(f"PhysicalSize{axis}"))
        sizes.append(None if size is None else (size, _unit(pixels.get(f"PhysicalSize{axis}Unit", "µm"))))
    return sizes


def _of_imagej(stated: dict[str, Any], page: Any) -> list[Size | None]:
    """Sizes of a voxel along z, y and x as ImageJ states them: `spacing` and `unit`, and pixels per unit as tags.

    ImageJ leaves the spacing out where it is 1.
    """
    named = str(stated.get("unit") or "")
    tag = page.tags.get(296)
    name = named or _RESOLUTION_UNITS.get(0 if tag is None else int(tag.value), "")
    unit = _unit(name)
    depth = _positive(stated.get("spacing")) or (1.0 if _unit(named) else None)
    sizes: list[Size | None] = [None if depth is None else (depth, unit)]
    for code in (283, 282):  # YResolution, XResolution
        found = page.tags.get(code)
        over, under = found.value if found is not None else (0, 1)
        screen = unit == _UNITS["inch"] and over == _SCREEN * under
        sizes.append((under / over, unit) if over and under and not screen else None)
    return sizes


def _positive(value: Any) -> float | None:
    try:
        number = abs(float(value))  # ImageJ writes negative ones for stacks that are shown from the other side
    except (TypeError, ValueError):
        return None
    return number if 0 < number < math.inf else None


def _unit(name: str) -> float | None:
    """A unit of length in mm; None for pixels and whatever else is no length. ImageJ writes µ as \\u00B5."""
    return _UNITS.get(name.strip().replace("\\u00B5", "µ").replace("\\u00b5", "µ").lower())
