"""What the viewer shows: an image and its segmentations, each as NIfTI in memory, with a legend."""

from __future__ import annotations

import colorsys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
from pydantic import ValidationError

from nnunet_lite import log
from nnunet_lite.data.dataset import Case, Dataset, map_labels
from nnunet_lite.data.geometry import Geometry
from nnunet_lite.data.images import Image, read_image, read_images, read_label
from nnunet_lite.data.labels import BACKGROUND, IGNORE, Labels
from nnunet_lite.data.nifti import nifti_bytes, ras_affine
from nnunet_lite.errors import UserError

Colour = tuple[int, int, int]

# told apart by most eyes, and from the greys of an image
_COLOURS: tuple[Colour, ...] = (
    (230, 75, 53), (77, 187, 213), (0, 190, 120), (245, 200, 60), (190, 110, 240), (255, 140, 0), (90, 130, 255),
    (240, 120, 180),
)  # fmt: skip
_DIFFERENCES = (("missed", (60, 140, 255)), ("too much", (255, 70, 70)), ("another label", (255, 215, 0)))
_WINDOW = (0.5, 99.5)  # percentiles of the intensities that are black and white
_SAMPLE = 1 << 20  # voxels that they are taken of
_LEGEND_LIMIT = 1000  # a longer legend is of no use, and such a file is rarely a label map


@dataclass(frozen=True)
class Layer:
    """One image channel, or one segmentation whose voxels count from 0, the background, along its legend.

    Parameters
    ----------
    legend : of a segmentation, the name and colour of the voxels 1, 2, ...
    window : of an image, the intensities that are drawn black and white.
    shown : from the beginning.
    """

    name: str
    kind: Literal["image", "segmentation"]
    nifti: bytes
    legend: tuple[tuple[str, Colour], ...] = ()
    window: tuple[float, float] | None = None
    shown: bool = True

    def to_json(self, url: str) -> dict[str, Any]:
        legend = [{"name": name, "colour": colour} for name, colour in self.legend]
        about = {"name": self.name, "kind": self.kind, "url": url, "shown": self.shown}
        return {**about, "legend": legend, "window": self.window}


@dataclass(frozen=True)
class Scene:
    """Layers in the order of drawing.

    Parameters
    ----------
    to_voxel : matrix (3, 4) from RAS mm to the image's voxels (x, y, z).
    flat : a picture, which has one plane and no left and right.
    """

    title: str
    layers: tuple[Layer, ...]
    to_voxel: tuple[tuple[float, ...], ...]
    flat: bool


def scene_of_case(dataset: Dataset, case: Case, predictions: Sequence[tuple[str, Path]]) -> Scene:
    """A case of a data set with its reference, and predictions (name, label map) with where they differ from it.

    Raises
    ------
    UserError : a file cannot be read, or holds values that are no labels of the data set.
    """
    image = read_images(case.images, len(dataset.channels), dataset.accept_geometry)
    maps: list[tuple[str, np.ndarray, Geometry]] = []
    if case.label is not None:
        values, geometry, _ = read_label(case.label, image.geometry)
        maps.append(("reference", map_labels(values, dataset.label_map), geometry))
    maps += [(name, *read_label(file, image.geometry)[:2]) for name, file in predictions]
    has_reference = case.label is not None
    return _scene(f"{case.id} ({dataset.name})", image, dataset.channels, maps, dataset.labels, has_reference)


def scene_of_files(file: Path, segmentations: Sequence[Path], labels: Labels | None = None) -> Scene:
    """An image file or DICOM series with label maps.

    Parameters
    ----------
    labels : what their values mean; without, they are called by number.

    Raises
    ------
    UserError : a file cannot be read, or holds values that are none of `labels`.
    """
    image = read_image(file)
    maps = [(_short(path, segmentations), *read_label(path, image.geometry)[:2]) for path in segmentations]
    channels = [f"channel {i}" for i in range(image.array.shape[0])]
    return _scene(file.name, image, channels, maps, labels or _numbered([values for _, values, _ in maps]), False)


def _short(path: Path, others: Sequence[Path]) -> str:
    """The name of a file, with its folder where another one has the same name."""
    return path.name if [other.name for other in others].count(path.name) == 1 else f"{path.parent.name}/{path.name}"


def _scene(
    title: str,
    image: Image,
    channels: Sequence[str],
    maps: Sequence[tuple[str, np.ndarray, Geometry]],
    labels: Labels,
    has_reference: bool,
) -> Scene:
    """Layers of everything; where the first map is a reference, the others are compared with it."""
    layers = _channels(image, channels)
    legend = tuple(zip(_names(labels), colours(len(labels.values) - 1 + (labels.ignore is not None)), strict=True))
    encoded = [(name, _encode(labels, name, values), _onto(image, geometry)) for name, values, geometry in maps]
    for name, classes, geometry in encoded:
        if differing := geometry.differences(image.geometry):
            what, found, expected = differing[0]
            log.warn(f"{name}: its {what} {found} is not the image's, {expected}; it is shown where its header says")
        layers.append(Layer(name, "segmentation", nifti_bytes(classes, geometry), legend))
    if has_reference:
        _, reference, _ = encoded[0]
        for name, classes, geometry in encoded[1:]:
            if classes.shape == reference.shape:
                wrong = nifti_bytes(_differences(reference, classes), geometry)
                layers.append(Layer(f"errors of {name}", "segmentation", wrong, _DIFFERENCES, shown=False))
    to_voxel = np.linalg.inv(ras_affine(image.geometry))[:3].tolist()
    return Scene(title, tuple(layers), tuple(map(tuple, to_voxel)), image.geometry.dimensions == 2)


def _channels(image: Image, names: Sequence[str]) -> list[Layer]:
    """A layer per channel; a colour picture is one layer."""
    array, geometry = image.array, image.geometry
    if array.shape[0] == 3 and array.dtype == np.uint8 and image.geometry.dimensions == 2:
        return [Layer("colours", "image", nifti_bytes(array, geometry))]
    layers: list[Layer] = []
    for name, channel in zip(names, map(_showable, array), strict=True):
        layer = Layer(name, "image", nifti_bytes(channel, geometry), window=_window(channel), shown=not layers)
        layers.append(layer)
    return layers


def _showable(array: np.ndarray) -> np.ndarray:
    """In a type that viewers know, and finite."""
    if array.dtype.kind == "b":
        return array.astype(np.uint8)
    if array.dtype.kind == "f":
        return np.nan_to_num(array.astype(np.float32, copy=False), posinf=0, neginf=0)
    return array.astype(np.float32) if array.dtype.itemsize > 4 else array


def _window(array: np.ndarray) -> tuple[float, float] | None:
    """What is drawn black and white; None leaves it to the viewer."""
    flat = array.reshape(-1)
    low, high = np.percentile(flat[:: max(1, flat.size // _SAMPLE)], _WINDOW)
    return (float(low), float(high)) if high > low else None


def _encode(labels: Labels, name: str, values: np.ndarray) -> np.ndarray:
    try:
        return labels.encode(values)
    except UserError as error:
        raise UserError(error.what, name) from None


def _onto(image: Image, geometry: Geometry) -> Geometry:
    """The geometry of a label map; the image's where the label map's file does not state a spacing."""
    return geometry if geometry.calibrated else replace(image.geometry, shape=geometry.shape)


def _differences(reference: np.ndarray, classes: np.ndarray) -> np.ndarray:
    """0 where both say the same, else 1, 2, 3 as in the legend `_DIFFERENCES`."""
    out = np.where(classes == 0, np.uint8(1), np.where(reference == 0, np.uint8(2), np.uint8(3)))
    out[classes == reference] = 0
    return out


def _names(labels: Labels) -> list[str]:
    """What each foreground class is called: its label, or the regions that it belongs to."""
    members = list(zip(labels.region_names, labels.region_values, strict=True))
    names = [" + ".join(name for name, values in members if value in values) for value in labels.values[1:]]
    return names if labels.ignore is None else [*names, IGNORE]


def _numbered(maps: Sequence[np.ndarray]) -> Labels:
    """Labels called by their numbers."""
    found = sorted({int(value) for array in maps for value in np.unique(array)} - {0})
    if len(found) > _LEGEND_LIMIT:
        raise UserError(f"{len(found)} different values are too many for label maps", fix="The image comes first.")
    try:
        return Labels(names={BACKGROUND: 0, **{f"label {value}": value for value in found or [1]}})
    except ValidationError as error:
        raise UserError(str(error.errors()[0]["msg"]).removeprefix("Value error, ")) from None


def colours(n: int) -> list[Colour]:
    """As many colours as there are labels; those after the first ones go round the circle of hues."""
    more = (colorsys.hsv_to_rgb(i * 0.618034 % 1, 0.55 + 0.15 * (i % 3), 0.95) for i in range(n))
    return [*_COLOURS, *((round(255 * r), round(255 * g), round(255 * b)) for r, g, b in more)][:n]
