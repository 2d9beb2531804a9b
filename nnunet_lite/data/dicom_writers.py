"""Label maps are written as segmentations (DICOM-SEG) and contours (RTSTRUCT) of a series; needs the extra [dicom].

Both have a segment or structure for each label, with the name and colour of the label. Patient, study and frame of
reference are those of the series, so that a viewer shows them on top of it.

A segmentation has a binary frame for each slice and label with voxels in it. Contours run half-way between the voxels
inside and those outside, in the plane of their slice: marching squares. Voxels that touch only at corners are apart.
Filling a contour at the centres of voxels gives the label map again. A hole is a part of the contour around it, to
which a channel without width leads (keyhole): readers that fill each contour by itself, as the standard has it, and
readers that combine the contours of a slice by even-odd understand it the same.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from datetime import datetime
from importlib.metadata import version
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from contourpy import FillType, contour_generator
from highdicom import UID, AlgorithmIdentificationSequence, SOPClass
from highdicom.color import CIELabColor
from highdicom.seg import SegmentAlgorithmTypeValues, Segmentation, SegmentationTypeValues, SegmentDescription
from highdicom.sr import CodedConcept
from pydicom import Dataset, dcmread
from pydicom.sr.codedict import codes
from pydicom.uid import RTStructureSetStorage, generate_uid
from scipy.spatial.distance import cdist

from nnunet_lite import log
from nnunet_lite.data.dicom import series_slices
from nnunet_lite.data.geometry import Geometry, bounding_box
from nnunet_lite.data.labels import Labels, label_colours
from nnunet_lite.files import atomic

_NAME_LETTERS, _CODE_LETTERS = 64, 16  # limits of DICOM
_ASIDE = 0.3183  # pixels, by which the channel to a hole ends beside a corner: it crosses no centre of a pixel
_STUDY_UIDS = ("StudyInstanceUID", "SeriesInstanceUID", "FrameOfReferenceUID")
_STUDY_CLASS = "1.2.840.10008.3.1.2.3.1"  # by which RTSTRUCT refers to a study


def write_dicom_seg(path: Path, label_map: np.ndarray, source: Path, labels: Labels) -> None:
    """Write a label map as a DICOM segmentation of its series, completely or not at all. Regions may overlap.

    Parameters
    ----------
    path : Path
        The file to write.
    label_map : ndarray of int, shape (z, y, x)
        Values of the dataset, on the grid that `read_series(source)` returns.
    source : Path
        The series: its folder, or one of its files.
    labels : Labels
        Names of the values. Each label or region becomes a segment.

    Raises
    ------
    UserError
        `source` is not a series, or a value is not a label.
    ValueError
        The label map is on another grid.
    """
    images = _source_images(source, label_map.shape)
    if labels.has_regions:
        numbers = np.stack([np.isin(label_map, values) for values in labels.segments.values()], axis=-1)
    else:
        numbers = labels.encode(label_map)
    segments = _segment_descriptions(labels)
    file = Segmentation(
        source_images=images,
        pixel_array=numbers,
        segmentation_type=SegmentationTypeValues.BINARY,
        # without any voxel, empty frames are written for every segment, and those of one segment are enough
        segment_descriptions=segments if numbers.any() else segments[:1],
        omit_empty_frames=bool(numbers.any()),
        series_description="nnunet_lite segmentation",
        **_new_series(),
    )
    _save(file, path)


def write_rtstruct(path: Path, label_map: np.ndarray, geometry: Geometry, source: Path, labels: Labels) -> None:
    """Write a label map as the contours of a structure set (RTSTRUCT) of its series, completely or not at all.

    Parameters
    ----------
    path : Path
        The file to write.
    label_map : ndarray of int, shape (z, y, x)
        Values of the dataset, on the grid that `read_series(source)` returns.
    geometry : Geometry
        That grid.
    source : Path
        The series: its folder, or one of its files.
    labels : Labels
        Names of the values. Each label or region becomes a structure; one without voxels has no contours.

    Raises
    ------
    UserError
        `source` is not a series.
    ValueError
        The label map is on another grid.
    """
    images = _source_images(source, label_map.shape)
    study, frame = images[0].StudyInstanceUID, images[0].FrameOfReferenceUID
    references = [_item(ReferencedSOPClassUID=i.SOPClassUID, ReferencedSOPInstanceUID=i.SOPInstanceUID) for i in images]
    contours = defaultdict[str, list[Dataset]](list)
    cosines, (sz, sy, sx) = np.reshape(geometry.direction, (3, 3)), geometry.spacing
    for z, (plane, reference) in enumerate(zip(label_map, references, strict=True)):
        found = set(np.unique(plane).tolist())
        for name in [name for name, values in labels.segments.items() if found.intersection(values)]:
            for outline in outlines(np.isin(plane, labels.segments[name])):
                points = np.column_stack([outline, np.full(len(outline), z)]) * (sx, sy, sz) @ cosines.T
                contours[name].append(_item(
                    ContourImageSequence=[reference], ContourGeometricType="CLOSED_PLANAR",
                    NumberOfContourPoints=len(points),
                    ContourData=[f"{value:.5f}" for value in (points + geometry.origin).ravel()],
                ))  # fmt: skip
    file = SOPClass(
        study_instance_uid=study,
        sop_class_uid=RTStructureSetStorage,
        modality="RTSTRUCT",
        series_description="nnunet_lite contours",
        **_new_series(),
    )
    file.copy_patient_and_study_information(images[0])
    file.StructureSetLabel, file.FrameOfReferenceUID, file.OperatorsName = "nnunet_lite", frame, ""
    file.PositionReferenceIndicator, file.ApprovalStatus = "", "UNAPPROVED"
    file.StructureSetDate, file.StructureSetTime = f"{datetime.now():%Y%m%d}", f"{datetime.now():%H%M%S}"
    of_series = _item(SeriesInstanceUID=images[0].SeriesInstanceUID, ContourImageSequence=references)
    of_study = _item(
        ReferencedSOPClassUID=_STUDY_CLASS, ReferencedSOPInstanceUID=study, RTReferencedSeriesSequence=[of_series]
    )
    file.ReferencedFrameOfReferenceSequence = [_item(FrameOfReferenceUID=frame, RTReferencedStudySequence=[of_study])]
    file.StructureSetROISequence, file.ROIContourSequence, file.RTROIObservationsSequence = [], [], []
    for number, (name, colour) in enumerate(zip(labels.segments, label_colours(len(labels.segments)), strict=True), 1):
        file.StructureSetROISequence.append(_item(
            ROINumber=number, ReferencedFrameOfReferenceUID=frame, ROIName=name[:_NAME_LETTERS],
            ROIGenerationAlgorithm="AUTOMATIC",
        ))  # fmt: skip
        shape = _item(ROIDisplayColor=list(colour), ReferencedROINumber=number)
        if name in contours:
            shape.ContourSequence = contours[name]
        file.ROIContourSequence.append(shape)
        file.RTROIObservationsSequence.append(
            _item(ObservationNumber=number, ReferencedROINumber=number, RTROIInterpretedType="", ROIInterpreter="")
        )
    _save(file, path)


def outlines(mask: np.ndarray) -> Iterator[np.ndarray]:
    """Yield closed polygons around the pixels of a mask, each with its holes as keyholes.

    Parameters
    ----------
    mask : ndarray of bool, shape (y, x)
        One slice.

    Yields
    ------
    ndarray, shape (points, 2)
        Pixels (x, y), half-way between those inside and those outside; the last point is not the first one again.
    """
    _, (y0, y1), (x0, x1) = bounding_box(mask[None])
    padded = np.pad(mask[y0:y1, x0:x1], 1).astype(np.float64)
    for points, starts in zip(*contour_generator(z=padded, fill_type=FillType.OuterOffset).filled(0.5, 2), strict=True):
        points += (x0 - 1, y0 - 1)
        outline, *holes = (_corners(points[start : end - 1]) for start, end in pairwise(starts))
        for hole in holes:
            i, j = np.unravel_index(cdist(outline, hole).argmin(), (len(outline), len(hole)))
            hole = np.roll(hole, -int(j), axis=0)
            step = hole[1] - hole[0]
            end = hole[:1] + _ASIDE * step / np.abs(step).max()
            outline = np.concatenate([outline[: i + 1], end, hole[1:], hole[:1], end, outline[i:]])
        yield outline


def _corners(ring: np.ndarray) -> np.ndarray:
    """Return the points (n, 2) of a closed polygon at which it turns."""
    before, after = ring - np.roll(ring, 1, axis=0), np.roll(ring, -1, axis=0) - ring
    return ring[before[:, 0] * after[:, 1] != before[:, 1] * after[:, 0]]


def _segment_descriptions(labels: Labels) -> list[SegmentDescription]:
    software = AlgorithmIdentificationSequence(
        name="nnunet_lite", version=version("nnunet-lite"), family=codes.DCM.ArtificialIntelligence
    )
    segments = []
    each = zip(labels.segments.items(), label_colours(len(labels.segments)), strict=True)
    for number, ((name, values), colour) in enumerate(each, 1):
        segment = SegmentDescription(
            segment_number=number,
            segment_label=name[:_NAME_LETTERS],
            segmented_property_category=codes.SCT.AnatomicalStructure,
            # a label of a dataset is a name and no code of a terminology: it gets a code of ours
            segmented_property_type=CodedConcept(
                "+".join(map(str, values))[:_CODE_LETTERS], "99NNLITE", name[:_NAME_LETTERS]
            ),
            algorithm_type=SegmentAlgorithmTypeValues.AUTOMATIC,
            algorithm_identification=software,
            display_color=CIELabColor.from_rgb(*colour),
        )
        # the number of a segment cannot be any value
        segment.SegmentDescription = f"label value {', '.join(map(str, values))}"
        segments.append(segment)
    return segments


def _source_images(source: Path, shape: tuple[int, ...]) -> list[Dataset]:
    """Return the headers of a series in the order of its slices, with the UIDs that other files refer to."""
    images = [dcmread(s.path, stop_before_pixels=True) for s in series_slices(source)]
    grid = (len(images), int(images[0].Rows), int(images[0].Columns))
    if shape != grid:
        raise ValueError(f"segmentation of shape {shape} for a series of shape {grid}")
    for image in images:  # anonymisation empties UIDs that the file meta information still has
        image.SOPClassUID = image.get("SOPClassUID") or image.file_meta.MediaStorageSOPClassUID
        image.SOPInstanceUID = image.get("SOPInstanceUID") or image.file_meta.MediaStorageSOPInstanceUID
    missing = [name for name in _STUDY_UIDS if not images[0].get(name)]
    if missing:
        log.warn(f"{source}: has no {', '.join(missing)}; viewers may not find the series of the segmentation")
    for name in missing:
        uid = generate_uid(entropy_srcs=[name, images[0].SOPInstanceUID])  # the same each time
        for image in images:
            setattr(image, name, uid)
    return images


def _new_series() -> dict[str, Any]:
    """Return the arguments of highdicom that describe a file of its own series."""
    software = version("nnunet-lite")
    return {
        "series_instance_uid": UID(),
        "series_number": 1000,  # above those of the scanner
        "sop_instance_uid": UID(),
        "instance_number": 1,
        "manufacturer": "nnunet_lite",
        "manufacturer_model_name": "nnlite",
        "software_versions": software,
        "device_serial_number": software,
    }


def _item(**values: Any) -> Dataset:
    """Return an item of a sequence."""
    item = Dataset()
    for name, value in values.items():
        setattr(item, name, value)
    return item


def _save(file: SOPClass, path: Path) -> None:
    file.SpecificCharacterSet = "ISO_IR 192"  # UTF-8: names of labels may need letters that the series does not have
    with atomic(path) as temporary:
        file.save_as(temporary)
