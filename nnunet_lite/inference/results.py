"""The files of a predicted label map: one in any format, one for each label, and how large the labels are."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from nnunet_lite.data.geometry import Geometry
from nnunet_lite.data.images import label_suffix, write_label
from nnunet_lite.data.labels import Labels
from nnunet_lite.data.names import case_of, format_of, suffix_of
from nnunet_lite.data.slicer import write_seg_nrrd
from nnunet_lite.inference.cases import file_name, require_series

SEGMENTATIONS = "segmentations"  # the folder of the files for each label


def write_segmentation(
    path: Path, label_map: np.ndarray, geometry: Geometry, labels: Labels, source: Path | None
) -> None:
    """Write a label map in the format of the path's ending, completely or not at all.

    Parameters
    ----------
    path : Path
        Ends as `ENDINGS` has it, or as an image.
    label_map : ndarray of int, shape (z, y, x)
        Values of the dataset.
    geometry : Geometry
        Of the image.
    labels : Labels
        Names of the values.
    source : Path, optional
        The image: a DICOM series, or a file whose NIfTI header is copied.

    Raises
    ------
    UserError
        The format cannot store it; or the image of a DICOM file is no series.
    """
    known = format_of(path)
    if path.suffix.lower() == ".dcm":
        series = require_series(source)
        from nnunet_lite.data.dicom_writers import write_dicom_seg, write_rtstruct  # pydicom and highdicom

        if known == "rtstruct":
            write_rtstruct(path, label_map, geometry, series, labels)
        else:
            write_dicom_seg(path, label_map, series, labels)
    elif known == "seg.nrrd":
        write_seg_nrrd(path, label_map, geometry, labels)
    else:
        write_label(path, label_map, geometry, like=source)


def label_file(target: Path, label: str, image: Path) -> Path:
    """Return the file of one label of the case with a label map: segmentations/CASE/LABEL, in the image's format."""
    return target.parent / SEGMENTATIONS / case_of(target) / f"{file_name(label)}{label_suffix(suffix_of(image))}"


def measure_labels(
    label_map: np.ndarray, image: np.ndarray, geometry: Geometry, labels: Labels, channels: Sequence[str]
) -> dict[str, dict[str, Any]]:
    """Return the size of each label or region, and the mean of each channel inside.

    Parameters
    ----------
    label_map : ndarray of int, shape (z, y, x)
        Values of the dataset.
    image : ndarray, shape (channels, z, y, x)
        The image.
    geometry : Geometry
        Of both.
    labels : Labels
        Names of the values.
    channels : sequence of str
        Names of the channels.

    Returns
    -------
    dict of str to dict
        Label -> voxels and volume_ml; of a picture pixels and area_mm2; and mean_CHANNEL. None is unknown: a size
        without a spacing, a mean without voxels.
    """
    low, high = int(label_map.min()), int(label_map.max())
    counts, sums = np.zeros(high - low + 1), np.zeros((len(image), high - low + 1))
    for z, plane in enumerate(label_map):
        values = plane.ravel().astype(np.intp) - low
        counts += np.bincount(values, minlength=counts.size)
        sums += [np.bincount(values, channel[z].ravel(), counts.size) for channel in image]
    flat = geometry.dimensions == 2
    unit = np.prod(geometry.spacing[1:]) if flat else np.prod(geometry.spacing) / 1000
    if len(set(channels)) < len(channels):
        channels = [f"{name}_{number:04d}" for number, name in enumerate(channels)]
    measured = {}
    for name, covered in labels.segments.items():
        found = [value - low for value in covered if low <= value <= high]
        n = int(counts[found].sum())
        size = float(f"{n * unit:.6g}") if geometry.calibrated else None
        means = [float(f"{total / n:.6g}") if n else None for total in sums[:, found].sum(axis=1)]
        row = {"pixels": n, "area_mm2": size} if flat else {"voxels": n, "volume_ml": size}
        measured[name] = {**row, **{f"mean_{channel}": mean for channel, mean in zip(channels, means, strict=True)}}
    return measured
