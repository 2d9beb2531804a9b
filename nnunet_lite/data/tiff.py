"""TIFF files as arrays (channels, z, y, x): pictures, stacks, ImageJ and OME files, with the spacing that they state.

tifffile decodes every layout and number format, with imagecodecs every compression, and names the axes of a file. Files
that are not a single volume are refused: a time axis, several images, axes without a meaning, truncated files.
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
import tifffile

from nnunet_lite.data.geometry import PICTURE_SPACING, Geometry, Image, Spacing, triple
from nnunet_lite.data.labels import palette_note, smallest_dtype
from nnunet_lite.data.names import AGAIN, companions, require_bytes, require_readable
from nnunet_lite.errors import UserError
from nnunet_lite.files import read_json

Size = tuple[float, float | None]  # of a voxel along an axis, and its unit in mm if that is known

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
_MICROSCOPIC = 0.1  # mm: smaller voxels are written in micrometres
_IMAGEJ_BYTES = 4 << 30  # of pixels: ImageJ reads no BigTIFF
_SCREEN = 72  # dots per inch that programs write if they know nothing
_TAG_BYTES = {1: 1, 2: 1, 3: 2, 4: 4, 5: 8, 6: 1, 7: 1, 8: 2, 9: 4, 10: 8, 11: 4, 12: 8, 13: 4, 16: 8, 17: 8, 18: 8}
_ALPHA = (1, 2)  # of the tag ExtraSamples: associated and unassociated alpha
_PALETTE, _WHITE_IS_ZERO = 3, 0  # PhotometricInterpretation
_FOREIGN = {5: "CMYK", 6: "YCbCr", 8: "CIELab", 9: "ICCLab", 10: "ITULab"}  # colours that tifffile does not convert
_LOSSLESS = (1, 5, 8, 32773, 32946, 50000)  # Compression: YCbCr with any other is JPEG, which is decoded to RGB
_SIDE_IMAGES = ("label", "macro", "thumbnail", "map")  # of a whole slide
_FLIPS = {1: (1, 1), 2: (1, -1), 3: (-1, -1), 4: (-1, 1), 5: (1, 1), 6: (1, -1), 7: (-1, -1), 8: (-1, 1)}


def read_tiff(path: Path, resolve_palette: bool = True, pixels: bool = True) -> Image:
    """Read a TIFF file.

    Parameters
    ----------
    path : Path
        The file.
    resolve_palette : bool
        Whether a pixel of a palette picture is its colour (3 channels), or the number of its colour.
    pixels : bool
        Whether to read the pixels; without them only the header is read.

    Returns
    -------
    Image
        Its geometry is in mm. Without pixels, the array is zeros that need no memory.

    Raises
    ------
    UserError
        The file is missing, truncated or unreadable, not a single volume, or holds complex numbers.
    """
    with _opened(path) as (tif, series):
        page, notes = series.keyframe, []
        if series.dtype.kind == "c":
            raise UserError("holds complex numbers", path, "Store the magnitude.")
        array = _pixels(series) if pixels else np.broadcast_to(np.uint8(0), series.shape)
        array = _arranged(array, series.axes, path)
        if page.photometric == _PALETTE and not resolve_palette:
            notes.append(palette_note(_bytes(page.colormap).T))
        elif page.photometric == _PALETTE:
            array = _bytes(page.colormap)[:, array[0]] if pixels else np.broadcast_to(array, (3, *array.shape[1:]))
        orientation = _orientation(page)
        if orientation > 1:
            array = array.swapaxes(2, 3) if orientation >= 5 else array  # from 5 on, rows and columns are swapped
            rows, columns = _FLIPS[orientation]
            array = array[:, :, ::rows, ::columns]
            notes.append(f"turned as its orientation tag ({orientation}) says")
        geometry = _geometry(tif, series, path, array.shape[1:], notes)
        has_alpha = bool(page.extrasamples and page.extrasamples[-1] in _ALPHA and "C" not in series.axes)
        if pixels:
            kind = np.float32 if array.dtype == np.float16 else array.dtype.newbyteorder("=")
            array = np.ascontiguousarray(array, kind)
        return Image(array, geometry, tuple(notes), has_alpha, orientation)


def ome_channels(path: Path) -> tuple[str, ...]:
    """Return the names of the channels in an OME-TIFF file; empty if it is another file, or if they are no names."""
    with _opened(path) as (tif, _):
        found = ElementTree.fromstring(tif.ome_metadata).iter() if tif.is_ome else ()
        names = [element.get("Name", "").strip() for element in found if element.tag.endswith("}Channel")]
    return tuple(names) if all(names) and len(set(names)) == len(names) else ()


def write_tiff(path: Path, array: np.ndarray, geometry: Geometry) -> None:
    """Write a label map as ImageJ does, with spacing and unit if they are known.

    Parameters
    ----------
    path : Path
        The file.
    array : ndarray, shape (z, y, x)
        Integers of 0 to 65535.
    geometry : Geometry
        Of the array.
    """
    flat = geometry.dimensions == 2
    unit = "um" if min(geometry.spacing) < _MICROSCOPIC else "mm"
    z, y, x = (size / _UNITS[unit] for size in geometry.spacing)
    known: dict[str, Any] = {"unit": unit, **({} if flat else {"spacing": z})} if geometry.calibrated else {}
    tifffile.imwrite(
        path,
        (array[0] if flat else array).astype(smallest_dtype(0, int(array.max(initial=0)))),
        imagej=array.nbytes < _IMAGEJ_BYTES,
        photometric="minisblack",
        compression="zlib",
        resolution=(1 / x, 1 / y) if known else None,
        metadata={"axes": "YX" if flat else "ZYX", **known},
    )


def _pixels(series: Any) -> np.ndarray:
    """Return the pixels as stored; black is 0 and white 255 in a picture of one bit."""
    page, array = series.keyframe, series.asarray()
    if page.bitspersample != 1:
        return array
    # tifffile marks masks as white is zero and means that one is true
    inverted = page.photometric == _WHITE_IS_ZERO and not str(page.software).startswith("tifffile")
    return ((array != 0) ^ inverted).astype(np.uint8) * np.uint8(255)


@contextmanager
def _opened(path: Path) -> Iterator[tuple[Any, Any]]:
    """Open a file with tifffile and yield it with its single series of pages; every error names the file."""
    require_readable(path)
    logger = logging.getLogger("tifffile")
    if not logger.handlers:
        logger.addHandler(logging.NullHandler())  # its messages are reported by the checks below, or do not matter
    try:
        with tifffile.TiffFile(path) as tif:
            series = _only_series(tif, path)
            _require_whole(tif, series, path)
            yield tif, series
    except (MemoryError, UserError):
        raise
    except struct.error:
        raise UserError(f"is truncated: it ends after {path.stat().st_size} bytes", path, AGAIN) from None
    except Exception as error:  # a parser of damaged bytes raises any exception
        reason = " ".join(str(error).split()) or type(error).__name__
        raise UserError(f"cannot be read as TIFF ({reason:.160})", path, AGAIN) from None


def _only_series(tif: Any, path: Path) -> Any:
    """Return the image of a file at full resolution; thumbnails and masks do not count."""
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
        raise UserError(f"holds {len(series)} images ({shapes})", path, "Save one volume or picture in a file.")
    return series[0]


def _require_whole(tif: Any, series: Any, path: Path) -> None:
    """Refuse a truncated file, and one whose pages are in other files that are missing."""
    size = tif.filehandle.size
    require_bytes(path, series.nbytes, picture=True)
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
    """Return where the values of a page's tags end, and where the next page begins; 0 after the last one.

    tifffile ignores tags and pages beyond the end of the file.
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
    """Return the array of a series as (channels, z, y, x).

    `axes` has a letter for each axis: C channel, S sample, Z depth, I pages, Q unknown, T time. Pages without a name
    are slices.
    """
    named = {axis: i for i, axis in enumerate(axes) if axis in "YX"}
    long = [(axis, i) for i, (axis, n) in enumerate(zip(axes, array.shape, strict=True)) if axis not in "YX" and n > 1]
    channels = [i for kind in "CS" for axis, i in long if axis == kind]
    depth = [i for axis, i in long if axis in "ZIQ"]
    others = [(axis, array.shape[i]) for axis, i in long if axis not in "CSZIQ"]
    shape = " x ".join(map(str, array.shape))
    if times := [n for axis, n in others if axis == "T"]:
        fix = "Save a file for each time point; if they are slices, save them as Z (ImageJ: Image > Properties)."
        raise UserError(f"holds {times[0]} time points (axes {axes}, {shape})", path, fix)
    if len(named) < 2 or others or len(depth) > 1:
        fix = "Name the axes when it is written: tifffile.imwrite(..., metadata={'axes': 'CZYX'})."
        raise UserError(f"has axes {axes} ({shape}), which are not channels, slices, rows and columns", path, fix)
    rest = [i for i in range(array.ndim) if i not in (*channels, *depth, named["Y"], named["X"])]  # of length 1
    sizes = [math.prod(array.shape[i] for i in group) for group in (channels, depth)]
    moved = array.transpose(*rest, *channels, *depth, named["Y"], named["X"])
    return moved.reshape(*sizes, array.shape[named["Y"]], array.shape[named["X"]])


def _bytes(table: np.ndarray) -> np.ndarray:
    """Return the colours (3, numbers) of a palette, 0 to 255."""
    return (table >> 8 if table.max() > 255 else table).astype(np.uint8)


def _orientation(page: Any) -> int:
    tag = page.tags.get(274)
    return int(tag.value) if tag is not None and int(tag.value) in _FLIPS else 1


# -------------------------------------------------------------------------------------------------------------- spacing


def _geometry(tif: Any, series: Any, path: Path, shape: tuple[int, ...], notes: list[str]) -> Geometry:
    """Return shape and spacing; `notes` gets a line if part of the spacing was assumed."""
    z, y, x = shape
    spacing = _sidecar_spacing(path) or _stated_spacing(tif, series, z, notes)
    if spacing and _orientation(series.keyframe) >= 5:
        spacing = (spacing[0], spacing[2], spacing[1])
    if z > 1:
        return Geometry((z, y, x), spacing or (1.0, 1.0, 1.0), oriented=False, calibrated=spacing is not None)
    plane = (max(spacing[1:]) * 999, *spacing[1:]) if spacing else PICTURE_SPACING
    return Geometry((z, y, x), plane, dimensions=2, calibrated=spacing is not None)


def _sidecar_spacing(path: Path) -> Spacing | None:
    """Return the spacing in the file `<case>.json` beside a TIFF file, mm (z, y, x)."""
    for sidecar in companions(path):
        found = read_json(sidecar)
        if not isinstance(found, dict) or "spacing" not in found:  # the file has another purpose
            continue
        given = found["spacing"]
        numbers = isinstance(given, list) and all(type(s) in (int, float) and 0 < s < math.inf for s in given)
        if not numbers or len(given) != 3:
            raise UserError(f"spacing is {given}", sidecar, "Give three numbers in mm: [z, y, x].")
        return triple(map(float, given))
    return None


def _stated_spacing(tif: Any, series: Any, slices: int, notes: list[str]) -> Spacing | None:
    """Return the spacing in the file itself, mm (z, y, x). The resolution of a plain picture is none: 72 dpi."""
    stated: dict[str, Any] = (tif.shaped_metadata or ({},))[0]
    if tif.is_ome:
        sizes = _ome_sizes(tif.ome_metadata)
    elif tif.is_imagej:
        sizes = _imagej_sizes(tif.imagej_metadata or {}, series.keyframe)
    elif {"spacing", "unit"} & set(stated):  # tifffile stores what it is given, with the meaning of ImageJ
        sizes = _imagej_sizes(stated, series.keyframe)
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
    return triple(size * (1.0 if unit is None else unit) for size, unit in (z, y, x))


def _ome_sizes(xml: str) -> list[Size | None]:
    """Return the sizes of a voxel along z, y and x in an OME description; micrometres if it states no unit."""
    pixels = next(element for element in ElementTree.fromstring(xml).iter() if element.tag.endswith("}Pixels"))
    sizes: list[Size | None] = []
    for axis in "ZYX":
        size = _positive(pixels.get(f"PhysicalSize{axis}"))
        sizes.append(None if size is None else (size, _unit(pixels.get(f"PhysicalSize{axis}Unit", "µm"))))
    return sizes


def _imagej_sizes(stated: dict[str, Any], page: Any) -> list[Size | None]:
    """Return the sizes of a voxel along z, y and x that ImageJ states: `spacing`, `unit`, and tags of pixels per unit.

    ImageJ omits a spacing of 1.
    """
    named = str(stated.get("unit") or "")
    tag = page.tags.get(296)
    unit = _unit(named or _RESOLUTION_UNITS.get(0 if tag is None else int(tag.value), ""))
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
        number = abs(float(value))  # ImageJ writes a negative spacing for a stack that is shown from the other side
    except (TypeError, ValueError):
        return None
    return number if 0 < number < math.inf else None


def _unit(name: str) -> float | None:
    """Return a unit of length in mm; None for pixels and other words. ImageJ writes µ as \\u00B5."""
    return _UNITS.get(name.strip().replace("\\u00B5", "µ").replace("\\u00b5", "µ").lower())
