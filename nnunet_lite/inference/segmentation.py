"""What `model(image)` returns: a label map that knows where its voxels are, and can be saved."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from nnunet_lite.data.geometry import Geometry
from nnunet_lite.data.labels import Labels
from nnunet_lite.errors import UserError
from nnunet_lite.inference.outputs import PROBABILITIES, STEPS
from nnunet_lite.inference.results import write_segmentation


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
