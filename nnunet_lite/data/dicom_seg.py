"""DICOM segmentations (DICOM-SEG): a label map written for the series that it was predicted on, and read back.

One binary segment per label, one frame per slice and label that has voxels there. Patient, study and frame of reference
are the series', so that a viewer lays the segments over it. Needs the extra [dicom] (pydicom and highdicom); reading a
series does not.
"""

from __future__ import annotations

import re
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from nnunet_lite import log
from nnunet_lite.data.dicom import series_slices
from nnunet_lite.data.geometry import Geometry
from nnunet_lite.data.labels import Labels, smallest_dtype
from nnunet_lite.errors import UserError
from nnunet_lite.files import atomic

_NAME_LETTERS = 64  # that DICOM allows
_VALUE = "label value"  # opens the description of a segment, whose number cannot be any value
_SERIES_NUMBER = 1000  # beyond those of the scanner
_STUDY_UIDS = ("StudyInstanceUID", "SeriesInstanceUID", "FrameOfReferenceUID")
_ON_GRID = 0.01  # voxels


def require_dicom() -> None:
    """Make sure that the extra [dicom] is installed.

    Raises
    ------
    UserError : it is not.
    """
    try:
        import highdicom  # noqa: F401
    except ImportError as error:
        raise UserError(
            f"DICOM-SEG needs the extra [dicom] ({error})", fix="Install it: pip install 'nnunet-lite[dicom]'."
        ) from None


def write_dicom_seg(path: Path, segmentation: np.ndarray, source: Path, labels: Labels) -> None:
    """Write a label map as a DICOM segmentation of the series that it was predicted on, whole or not at all.

    Parameters
    ----------
    segmentation : (z, y, x), the data set's values, on the grid that `read_series(source)` returns.
    source : the series: its folder, or one of its files.
    labels : the names of the values; what is not the background becomes a segment.

    Raises
    ------
    UserError : the extra [dicom] is missing, or the series is none.
    ValueError : another grid, or a value that is no label.
    """
    require_dicom()
    from highdicom import UID
    from highdicom.seg import Segmentation, SegmentationTypeValues

    names = segment_names(labels)
    numbers = _segment_numbers(segmentation, tuple(names), labels.background)
    images = _source_images(source)
    grid = (len(images), int(images[0].Rows), int(images[0].Columns))
    if segmentation.shape != grid:
        raise ValueError(f"segmentation of shape {segmentation.shape} for a series of shape {grid}")
    segments = _describe_segments(names)
    software = version("nnunet-lite")
    file = Segmentation(
        source_images=images,
        pixel_array=numbers,
        segmentation_type=SegmentationTypeValues.BINARY,
        # where nothing was found, empty frames are written for every segment: one tells as much as all
        segment_descriptions=segments if numbers.any() else segments[:1],
        omit_empty_frames=bool(numbers.any()),
        series_instance_uid=UID(),
        series_number=_SERIES_NUMBER,
        sop_instance_uid=UID(),
        instance_number=1,
        manufacturer="nnunet_lite",
        manufacturer_model_name="nnlite",
        software_versions=software,
        device_serial_number=software,
        series_description="nnunet_lite segmentation",
    )
    file.SpecificCharacterSet = "ISO_IR 192"  # UTF-8: names of labels may need letters that the series' has not
    with atomic(path) as temporary:
        file.save_as(temporary)


def read_dicom_seg(path: Path, onto: Geometry | None = None) -> tuple[np.ndarray, Geometry, dict[int, str]]:
    """The label map (z, y, x) of a DICOM segmentation, its geometry, and value -> name.

    Parameters
    ----------
    onto : the grid of the series, since slices without a label are not stored; by default the slices from the first to
        the last that are, in the order of a series.

    Raises
    ------
    UserError : it cannot be read, its segments overlap, or it lies on another grid.
    """
    require_dicom()
    from highdicom.seg import segread

    try:
        file = segread(path)
        volume = file.get_volume(combine_segments=True)
    except MemoryError:
        raise
    except Exception as error:  # a parser of damaged or strange files raises whatever it stumbles over
        raise UserError(f"cannot be read as a DICOM segmentation ({error})", path) from None
    values, names = _values_of(file)
    table = np.zeros(max(values) + 1, smallest_dtype(min(0, *values.values()), max(values.values())))
    table[list(values)] = list(values.values())
    array, geometry = _upright(table[volume.array], volume.affine)
    return (array, geometry, names) if onto is None else (_placed(array, geometry, onto, path), onto, names)


def segment_names(labels: Labels) -> dict[int, str]:
    """Value -> name of all that a prediction may hold but the background; of regions, the values in their order."""
    if labels.has_regions:
        return dict(zip(labels.region_order or (), labels.region_names, strict=True))
    return {values[0]: name for name, values in zip(labels.region_names, labels.region_values, strict=True)}


# ------------------------------------------------------------------------------------------------------------ writing


def _segment_numbers(segmentation: np.ndarray, values: tuple[int, ...], background: int) -> np.ndarray:
    """Values -> 1, 2, ... in their order, the background -> 0."""
    known = (background, *values)
    low, high, none = min(known), max(known), len(known)
    table = np.full(high - low + 1, none, smallest_dtype(0, none))
    table[np.subtract(known, low)] = np.arange(len(known))
    if segmentation.min() < low or segmentation.max() > high:
        raise ValueError(f"values {segmentation.min()}..{segmentation.max()}, labels {sorted(known)}")
    numbers = np.stack([table[plane.astype(np.intp) - low] for plane in segmentation])
    if numbers.max() == none:
        raise ValueError(f"a value is not among the labels {sorted(known)}")
    return numbers


def _describe_segments(names: dict[int, str]) -> list[Any]:
    from highdicom import AlgorithmIdentificationSequence
    from highdicom.seg import SegmentAlgorithmTypeValues, SegmentDescription
    from highdicom.sr import CodedConcept
    from pydicom.sr.codedict import codes

    software = AlgorithmIdentificationSequence(
        name="nnunet_lite", version=version("nnunet-lite"), family=codes.DCM.ArtificialIntelligence
    )
    segments = []
    for number, (value, name) in enumerate(names.items(), 1):
        segment = SegmentDescription(
            segment_number=number,
            segment_label=name[:_NAME_LETTERS],
            segmented_property_category=codes.SCT.AnatomicalStructure,
            # a data set's label is a name, not a code of a terminology: it gets one of ours
            segmented_property_type=CodedConcept(str(value), "99NNLITE", name[:_NAME_LETTERS]),
            algorithm_type=SegmentAlgorithmTypeValues.AUTOMATIC,
            algorithm_identification=software,
        )
        segment.SegmentDescription = f"{_VALUE} {value}"
        segments.append(segment)
    return segments


def _source_images(source: Path) -> list[Any]:
    """The headers of a series in the order of its slices, complete enough to refer to."""
    from pydicom import dcmread
    from pydicom.uid import generate_uid

    images = [dcmread(s.path, stop_before_pixels=True) for s in series_slices(source)]
    for image in images:  # anonymisation empties UIDs that the file meta information still has
        image.SOPClassUID = image.get("SOPClassUID") or image.file_meta.MediaStorageSOPClassUID
        image.SOPInstanceUID = image.get("SOPInstanceUID") or image.file_meta.MediaStorageSOPInstanceUID
    missing = [name for name in _STUDY_UIDS if not images[0].get(name)]
    if missing:
        log.warn(f"{source}: has no {', '.join(missing)}; viewers may not find the segmentation's series")
    for name in missing:
        uid = generate_uid(entropy_srcs=[name, images[0].SOPInstanceUID])  # the same each time
        for image in images:
            setattr(image, name, uid)
    return images


# ------------------------------------------------------------------------------------------------------------ reading


def _values_of(file: Any) -> tuple[dict[int, int], dict[int, str]]:
    """Segment number -> value, and value -> name; the number is the value where the file was written by others."""
    values, names = {}, {}
    for segment in file.SegmentSequence:
        told = re.fullmatch(rf"{_VALUE} (-?\d+)", str(segment.get("SegmentDescription", "")))
        value = int(told[1]) if told else int(segment.SegmentNumber)
        values[int(segment.SegmentNumber)], names[value] = value, str(segment.SegmentLabel)
    return values, names


def _upright(array: np.ndarray, affine: np.ndarray) -> tuple[np.ndarray, Geometry]:
    """Slices in the order of a series, against which highdicom's run; `affine` maps (z, y, x) indices to LPS mm."""
    axes, origin = affine[:3, :3], affine[:3, 3]
    if np.linalg.det(axes[:, ::-1]) < 0:  # (x, y, z) should be right-handed
        array, origin = array[::-1], origin + axes[:, 0] * (len(array) - 1)
        axes = axes * [-1.0, 1.0, 1.0]
    spacing = np.linalg.norm(axes, axis=0)
    direction = (axes / spacing)[:, ::-1] + 0.0
    z, y, x = array.shape
    sz, sy, sx = spacing.tolist()
    ox, oy, oz = origin.tolist()
    return np.ascontiguousarray(array), Geometry(
        (z, y, x), (sz, sy, sx), (ox, oy, oz), tuple(direction.ravel().tolist())
    )


def _placed(array: np.ndarray, geometry: Geometry, onto: Geometry, path: Path) -> np.ndarray:
    """The array on a grid that contains its own."""
    axes = np.reshape(onto.direction, (3, 3)) * onto.spacing[::-1]
    start = np.linalg.solve(axes, np.subtract(geometry.origin, onto.origin))[::-1]
    first = np.rint(start).astype(int)
    turned = replace(onto, spacing=geometry.spacing, direction=geometry.direction)
    for what, found, expected in turned.differences(onto):
        raise UserError(f"its {what} {found} differs from that of the series, {expected}", path)
    if np.abs(start - first).max() > _ON_GRID or (first < 0).any() or (first + array.shape > onto.shape).any():
        raise UserError(f"lies outside the series' grid of {onto.shape}, or between its voxels", path)
    out = np.zeros(onto.shape, array.dtype)
    z, y, x = (slice(at, at + n) for at, n in zip(first, array.shape, strict=True))
    out[z, y, x] = array
    return out
