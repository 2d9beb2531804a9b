"""DICOM segmentations (DICOM-SEG): a label map as a DICOM file that refers to the series it was predicted on.

There is a binary segment for each label, and a frame for each slice and label with voxels in it. Patient, study and
frame of reference are those of the series, so that a viewer shows the segments on top of it. This needs the extra
[dicom] (pydicom and highdicom); reading a series does not.
"""

from __future__ import annotations

from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from nnunet_lite import log
from nnunet_lite.data.dicom import series_slices
from nnunet_lite.data.labels import BACKGROUND, Labels
from nnunet_lite.errors import UserError
from nnunet_lite.files import atomic

_NAME_LETTERS = 64  # limit of DICOM
_SERIES_NUMBER = 1000  # above those of the scanner
_STUDY_UIDS = ("StudyInstanceUID", "SeriesInstanceUID", "FrameOfReferenceUID")


def require_dicom() -> None:
    """Check that the extra [dicom] is installed.

    Raises
    ------
    UserError
        It is not.
    """
    try:
        import highdicom  # noqa: F401
    except ImportError as error:
        fix = "Install it: pip install 'nnunet-lite[dicom]'."
        raise UserError(f"DICOM-SEG needs the extra [dicom] ({error})", fix=fix) from None


def write_dicom_seg(path: Path, segmentation: np.ndarray, source: Path, labels: Labels) -> None:
    """Write a label map as a DICOM segmentation of its series, completely or not at all.

    Parameters
    ----------
    path : Path
        The file to write.
    segmentation : ndarray of int, shape (z, y, x)
        Values of the dataset, on the grid that `read_series(source)` returns.
    source : Path
        The series: its folder, or one of its files.
    labels : Labels
        Names of the values. Each value but the background becomes a segment.

    Raises
    ------
    UserError
        The extra [dicom] is missing, `source` is not a series, or a value is not a label.
    ValueError
        The segmentation is on another grid.
    """
    require_dicom()
    from highdicom import UID
    from highdicom.seg import Segmentation, SegmentationTypeValues

    names = segment_names(labels)
    values: dict[str, int | tuple[int, ...]] = {str(value): value for value in names}
    numbers = Labels(names={BACKGROUND: labels.background, **values}).encode(segmentation)
    images = _source_images(source)
    grid = (len(images), int(images[0].Rows), int(images[0].Columns))
    if segmentation.shape != grid:
        raise ValueError(f"segmentation of shape {segmentation.shape} for a series of shape {grid}")
    segments = _segment_descriptions(names)
    software = version("nnunet-lite")
    file = Segmentation(
        source_images=images,
        pixel_array=numbers,
        segmentation_type=SegmentationTypeValues.BINARY,
        # without any voxel, empty frames are written for every segment, and those of one segment are enough
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
    file.SpecificCharacterSet = "ISO_IR 192"  # UTF-8: names of labels may need letters that the series does not have
    with atomic(path) as temporary:
        file.save_as(temporary)


def segment_names(labels: Labels) -> dict[int, str]:
    """Return the segments of a prediction.

    Parameters
    ----------
    labels : Labels
        Classes, or regions, of which each is written as one value.

    Returns
    -------
    dict of int to str
        Value -> name in ascending order, without the background.
    """
    if labels.has_regions:
        names = dict(zip(labels.region_order or (), labels.region_names, strict=True))
    else:
        names = {values[0]: name for name, values in zip(labels.region_names, labels.region_values, strict=True)}
    return dict(sorted(names.items()))


def _segment_descriptions(names: dict[int, str]) -> list[Any]:
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
            # a label of a dataset is a name and no code of a terminology: it gets a code of ours
            segmented_property_type=CodedConcept(str(value), "99NNLITE", name[:_NAME_LETTERS]),
            algorithm_type=SegmentAlgorithmTypeValues.AUTOMATIC,
            algorithm_identification=software,
        )
        segment.SegmentDescription = f"label value {value}"  # the number of a segment cannot be any value
        segments.append(segment)
    return segments


def _source_images(source: Path) -> list[Any]:
    """Return the headers of a series in the order of its slices, with the UIDs that a segmentation refers to."""
    from pydicom import dcmread
    from pydicom.uid import generate_uid

    images = [dcmread(s.path, stop_before_pixels=True) for s in series_slices(source)]
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
