"""A predicted label map: what `model(image)` returns, its files, and how large its labels are."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from nnunet_lite.data.geometry import Geometry
from nnunet_lite.data.images import label_suffix, write_label
from nnunet_lite.data.labels import Labels
from nnunet_lite.data.names import case_of, format_of, suffix_of
from nnunet_lite.data.slicer import write_seg_nrrd
from nnunet_lite.errors import UserError
from nnunet_lite.inference.cases import file_name, require_series
from nnunet_lite.inference.outputs import PROBABILITIES, STEPS

SEGMENTATIONS = "segmentations"  # the folder of the files for each label


class Segmentation(np.ndarray):
    """The label map (z, y, x) of an image, with the values of the dataset: a numpy array with a geometry.

    It may be changed in place, and copied. What is computed or cut out of it is an array without a geometry. It refers
    to the image and the model, for `probabilities`; pickling leaves these out.

    Parameters
    ----------
    label_map : ndarray, shape (z, y, x)
        The array.
    geometry : Geometry
        Of the image.
    labels : Labels
        Names of the values.
    maps : mapping of str to ndarray, shape (z, y, x)
        Maps that were made with it, as from `predict_label_map`.
    predict : callable, optional
        Predicts the image again, and takes `probabilities`.
    source : Path, optional
        The image, whose NIfTI header is copied; or its DICOM series.
    """

    _geometry: Geometry | None = None  # of what is computed
    _labels: Labels | None = None
    _maps: Mapping[str, np.ndarray] = {}
    _predict: Callable[..., Segmentation] | None = None
    _source: Path | None = None

    def __new__(
        cls,
        label_map: np.ndarray,
        geometry: Geometry | None,
        labels: Labels | None,
        maps: Mapping[str, np.ndarray],
        predict: Callable[..., Segmentation] | None = None,
        source: Path | None = None,
    ) -> Segmentation:
        self = label_map.view(cls)
        self._geometry, self._labels, self._maps, self._predict = geometry, labels, maps, predict
        self._source = source
        return self

    def __array_wrap__(self, array: np.ndarray, context: Any = None, return_scalar: bool = False) -> Any:
        return self if array is self else np.asarray(array)[()]  # a sum is a number

    def copy(self, order: Any = "C") -> Segmentation:
        array = self.array.copy(order)
        return Segmentation(array, self._geometry, self._labels, self._maps, self._predict, self._source)

    def __copy__(self) -> Segmentation:
        return self.copy()

    def __deepcopy__(self, memo: Any) -> Segmentation:
        return self.copy()

    def __reduce__(self) -> tuple[Any, ...]:  # pickled without the model
        return Segmentation, (self.array, self._geometry, self._labels, self._maps, None, self._source)

    def __repr__(self) -> str:
        if self._geometry is None:
            return repr(self.array)
        return f"Segmentation: {self.dtype}, {self._geometry.describe()}"

    @property
    def array(self) -> np.ndarray:
        """The same voxels as a plain array."""
        return self.view(np.ndarray)

    @property
    def geometry(self) -> Geometry:
        """Spacing (z, y, x) in mm, origin and direction; of an image given as an array, the spacing given with it.

        Raises
        ------
        UserError
            It was computed or cut out of a segmentation.
        """
        if self._geometry is None:
            fix = "Change the segmentation in place, as in segmentation[mask] = 0."
            raise UserError("what is computed or cut out of a segmentation has no geometry", fix=fix)
        return self._geometry

    def probabilities(self) -> dict[str, np.ndarray]:
        """Return the probability of each label or region, in steps of 1/255.

        Of the labels that `model(image, probabilities="liver,tumor")` was asked for. Without that, the image is read
        and predicted again, for all labels.

        Returns
        -------
        dict of str to ndarray, shape (z, y, x)
            float32, by the name of the label.

        Raises
        ------
        UserError
            They were not asked for, and this is computed, or comes from another process.
        """
        if not self._maps:
            if self._predict is None:
                fix = 'Ask for them: model(image, probabilities="all").'
                raise UserError("this array is without the model that predicts probabilities", fix=fix)
            self._maps = self._predict(probabilities="all")._maps
        return {
            name.removeprefix(f"{PROBABILITIES}/"): np.divide(steps, STEPS, dtype=np.float32)
            for name, steps in self._maps.items()
        }

    def save(self, path: str | Path) -> None:
        """Write the label map in the format of the path's ending, with the geometry of the image.

        Parameters
        ----------
        path : str or Path
            Such as "liver.nii.gz" or "liver.seg.nrrd" (3D Slicer); of a DICOM series also "liver.dcm" (DICOM-SEG) and
            "liver.rtstruct.dcm" (contours).

        Raises
        ------
        UserError
            The format cannot store it.
        """
        geometry, labels = self.geometry, self._labels
        assert labels is not None  # what has a geometry has labels
        write_segmentation(Path(path), self.array, geometry, labels, self._source)


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
