"""Slices of an image as WebP with the outlines of labels and errors; templates/tables.html.j2 draws them.

Axial ones have the patient's right on the left and the front at the top; coronal ones the right on the left and
sagittal ones the front on the left, both with the head at the top. Files such as PNG are shown as stored.
"""

from __future__ import annotations

import base64
import io
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image as PillowImage

from nnunet_lite.data.geometry import Box, Geometry, Image, Turn, bounding_box, slices, triple, turn_between
from nnunet_lite.data.images import read_label
from nnunet_lite.data.labels import ADDED, CONFUSED, MISSED
from nnunet_lite.errors import UserError
from nnunet_lite.planning.schema import Channel, Plan

MAX_CHANNELS = 4  # of a case that are shown
_TILE_SIZE = 224  # pixels along the longer side of a picture of the montage
_QUALITY, _METHOD = 75, 4  # of WebP; method 0 is fast, 6 is small
_LEVEL_SAMPLES = 200_000  # voxels for the grey levels of an image
_CT_MARGIN = 0.25  # by which a CT's grey levels exceed the intensities of the foreground
_MARGIN = 0.3  # of a box on each side, as a share of what is in it
_SMALLEST_BOX = 96  # voxels, where the array is that large

# of the voxels that a prediction has wrong, as `find_errors` numbers them from 1
ERROR_COLOURS = {"missed": MISSED, "added": ADDED, "another label": CONFUSED}

Thinned = tuple[np.ndarray, tuple[int, int]]  # a slice of a label map with fewer voxels, see `thin_out`
Picture = dict[str, Any]  # a plane as tables.html.j2 and report.js draw it, see `OrientedImage.draw`


class Plane(NamedTuple):
    """A plane of a turned array.

    Parameters
    ----------
    name : str
        Such as "axial".
    normal, rows, columns : int
        Axes (0, 1, 2) of the array.
    upwards : bool
        Whether the first row is at the bottom.
    sides : str
        The letters at the left, right, top and bottom.
    """

    name: str
    normal: int
    rows: int
    columns: int
    upwards: bool = False
    sides: str = ""


_PATIENT_PLANES = (
    Plane("axial", 0, 1, 2, sides="RLAP"),
    Plane("coronal", 1, 0, 2, upwards=True, sides="RLSI"),
    Plane("sagittal", 2, 0, 1, upwards=True, sides="APSI"),
)
_STORED_PLANES = (Plane("xy", 0, 1, 2), Plane("xz", 1, 0, 2), Plane("yz", 2, 0, 1))


def planes_of(geometry: Geometry) -> tuple[Turn, tuple[Plane, ...]]:
    """Return how to turn an array (z, y, x) to the patient's head, back and left, and the planes to show.

    An image without a known orientation is shown as it is stored, a picture in its one plane.

    Parameters
    ----------
    geometry : Geometry
        Of the image.

    Returns
    -------
    Turn
        The transposition and flips.
    tuple of Plane
        The planes.
    """
    if geometry.orientation is None or geometry.shape[0] == 1:
        return Turn(), _STORED_PLANES[: 1 if geometry.shape[0] == 1 else 3]
    return turn_between(geometry.orientation, "LPS"), _PATIENT_PLANES


class OrientedImage:
    """An image turned to the patient's axes, with its planes and the grey levels of its channels.

    Parameters
    ----------
    image : Image
        The image as it is stored.
    plan : Plan
        Its labels and the statistics of its channels.
    """

    def __init__(self, image: Image, plan: Plan) -> None:
        self.turn, self.planes = planes_of(image.geometry)
        self.geometry, self.labels, self.colour = image.geometry, plan.labels, image.is_colour
        self.array, self.spacing = self.turn.apply(image.array), self.geometry.turned(self.turn).spacing
        channels = zip(image.array[:MAX_CHANNELS], plan.channels, strict=False)
        self.levels = [(0.0, 255.0) if self.colour else grey_levels(values, about) for values, about in channels]

    def foreground_of(self, label: np.ndarray) -> np.ndarray:
        """Return which voxels of a label map have a label; those that are not annotated have none.

        Parameters
        ----------
        label : ndarray of int
            Values of the dataset.
        """
        return np.isin(label, self.labels.values[1:])

    def tile(self, reference: np.ndarray | None) -> Picture:
        """Draw the first plane, through most of the labels, in the first channel or in colour.

        Parameters
        ----------
        reference : ndarray or None, shape (z, y, x)
            The turned label map.
        """
        shape = self.array.shape[1:]
        at = fullest_slices(np.zeros(shape) if reference is None else self.foreground_of(reference))
        whole = triple((0, n) for n in shape)
        return self.draw(self.planes[0], at, whole, _TILE_SIZE, reference, None, channels=3 if self.colour else 1)

    def overlays(self, reference: np.ndarray | None, files: Mapping[str, Path], size: int) -> dict[str, list[Picture]]:
        """Draw the planes of each prediction, all through the slices with most errors of any of them.

        Parameters
        ----------
        reference : ndarray or None, shape (z, y, x)
            The turned label map.
        files : mapping of str to Path
            Model -> prediction.
        size : int
            Pixels along the longer side.

        Raises
        ------
        UserError
            A prediction cannot be read, or has another shape than its image.
        """
        labels, shape = self.labels, self.array.shape[1:]
        foreground, wrong = np.zeros(shape, bool), np.zeros(shape, bool)
        predictions = {}
        for model, file in files.items():
            stored, geometry, _ = read_label(file, self.geometry)
            if geometry.shape != self.geometry.shape:
                raise UserError(f"has shape {geometry.shape}, its image {self.geometry.shape}", file)
            predictions[model] = prediction = self.turn.apply(stored)
            reference = np.zeros_like(prediction) if reference is None else reference
            wrong |= prediction != reference
            foreground |= self.foreground_of(reference) | self.foreground_of(prediction)
        if labels.ignore is not None and reference is not None:
            wrong &= reference != labels.ignore
        at, box = fullest_slices(wrong if wrong.any() else foreground), box_around(foreground)
        return {
            model: [self.draw(plane, at, box, size, reference, prediction) for plane in self.planes]
            for model, prediction in predictions.items()
        }

    def draw(
        self,
        plane: Plane,
        at: tuple[int, ...],
        box: Box,
        size: int,
        reference: np.ndarray | None,
        prediction: np.ndarray | None,
        channels: int = MAX_CHANNELS,
    ) -> Picture:
        """Draw one plane for the page.

        Parameters
        ----------
        plane : Plane
            Which one.
        at : tuple of int
            The slice along each axis.
        box : Box
            The part of the image to show.
        size : int
            Pixels along the longer side.
        reference, prediction : ndarray or None, shape (z, y, x)
            Turned label maps to outline.
        channels : int
            How many of them are shown.

        Returns
        -------
        dict
            WebP of each channel, outlines in voxels, size in voxels and mm, and the slice as it is stored; "errors" are
            the outlines of each kind of error.
        """
        index, n = at[plane.normal], self.array.shape[1 + plane.normal]
        visible = zip(self.array[:channels], self.levels, strict=False)
        pixels = [to_bytes(slice_of(channel, plane, index, box), levels) for channel, levels in visible]
        pictures = [np.stack(pixels, axis=-1)] if self.colour else pixels
        height, width = pixels[0].shape
        label_slices = [
            None if label is None else thin_out(slice_of(label, plane, index, box), size)
            for label in (reference, prediction)
        ]
        outlines = [None if label is None else self._outlines(*label) for label in label_slices]
        return {
            "name": plane.name,
            "sides": plane.sides,
            "size": [width, height],
            "mm": [round(width * self.spacing[plane.columns], 3), round(height * self.spacing[plane.rows], 3)],
            "slice": n - 1 - index if self.turn.reversed[plane.normal] else index,
            "of": n,
            "axis": "zyx"[self.turn.order[plane.normal]],
            "cropped": any(high - low < n for (low, high), n in zip(box, self.array.shape[1:], strict=True)),
            "images": [webp(picture, size) for picture in pictures],
            "reference": outlines[0] or [],
            "prediction": outlines[1],
            "errors": self._errors(*label_slices),
        }

    def _errors(self, reference: Thinned | None, prediction: Thinned | None) -> list[str]:
        """Outline each kind of error in a slice (SVG paths in the order of `ERROR_COLOURS`)."""
        if reference is None or prediction is None:
            return []
        wrong = find_errors(reference[0], prediction[0], self.labels.background)
        if self.labels.ignore is not None:
            wrong[reference[0] == self.labels.ignore] = 0
        return [outline_path(wrong == kind, reference[1]) for kind in range(1, len(ERROR_COLOURS) + 1)]

    def _outlines(self, label: np.ndarray, step: tuple[int, int]) -> list[tuple[int, str]]:
        """Outline the regions in a slice: (number of the region, SVG path)."""
        masks = (np.isin(label, members) for members in self.labels.region_values)
        return [(i, outline_path(mask, step)) for i, mask in enumerate(masks) if mask.any()]


def find_errors(reference: np.ndarray, prediction: np.ndarray, background: int = 0) -> np.ndarray:
    """Number the voxels where two label maps differ: 1 missed, 2 added, 3 another label; 0 where they are equal.

    Parameters
    ----------
    reference, prediction : ndarray of int
        Label maps of one shape.
    background : int
        Its value in both.

    Returns
    -------
    ndarray of uint8
        The keys of `ERROR_COLOURS`, from 1.
    """
    wrong = np.where(prediction == background, np.uint8(1), np.where(reference == background, np.uint8(2), np.uint8(3)))
    wrong[prediction == reference] = 0
    return wrong


def fullest_slices(mask: np.ndarray) -> tuple[int, ...]:
    """Return the slice along each axis that has most of a mask; the middle one if the mask is empty.

    Parameters
    ----------
    mask : ndarray of bool, shape (z, y, x)
    """
    if not mask.any():
        return tuple(n // 2 for n in mask.shape)
    by_row = mask.sum(axis=2, dtype=np.int64)
    counts = by_row.sum(axis=1), by_row.sum(axis=0), mask.sum(axis=(0, 1), dtype=np.int64)
    return tuple(int(count.argmax()) for count in counts)


def box_around(mask: np.ndarray) -> Box:
    """Return the box of a mask (z, y, x) with a margin; the whole array if the mask is empty."""
    box = []
    for (low, high), n in zip(bounding_box(mask), mask.shape, strict=True):
        size = max(high - low + 2 * int(np.ceil(_MARGIN * (high - low))), _SMALLEST_BOX)
        low = max(0, min((low + high - size) // 2, n - size))
        box.append((low, min(n, low + size)))
    return triple(box)


def slice_of(array: np.ndarray, plane: Plane, index: int, box: Box) -> np.ndarray:
    """Return a slice (rows, columns) of a turned array, with the rows as they are drawn.

    Parameters
    ----------
    array : ndarray, shape (z, y, x)
        The turned array.
    plane : Plane
        Which plane.
    index : int
        Which slice along its normal.
    box : Box
        The part to show.
    """
    where: list[slice | int] = [*slices(box)]
    where[plane.normal] = index
    picture = array[tuple(where)]
    return picture[::-1] if plane.upwards else picture


def grey_levels(values: np.ndarray, channel: Channel | None) -> tuple[float, float]:
    """Return the intensities of black and white.

    CT: those of the foreground with a margin. Others: the 1st and 99.5th percentile of all but the darkest value.

    Parameters
    ----------
    values : ndarray, shape (z, y, x)
        A channel of the image.
    channel : Channel or None
        Its normalization and statistics, if they are known.
    """
    if channel is not None and channel.normalization == "ct":
        low, high = channel.statistics.percentile_00_5, channel.statistics.percentile_99_5
        margin = _CT_MARGIN * max(high - low, 1.0)
        return low - margin, high + margin
    flat = values.reshape(-1)[:: max(1, values.size // _LEVEL_SAMPLES)]
    flat = flat[np.isfinite(flat)]
    inside = flat[flat > flat.min()] if flat.size else flat
    if not inside.size:
        return 0.0, 1.0
    low, high = (float(v) for v in np.percentile(inside, (1, 99.5)))
    return (low, high) if high > low else (low, low + 1)


def to_bytes(picture: np.ndarray, levels: tuple[float, float]) -> np.ndarray:
    """Convert intensities to grey levels 0 to 255; values that are not finite are black or white.

    Parameters
    ----------
    picture : ndarray, shape (y, x)
        Intensities.
    levels : tuple of float
        Those of black and white.
    """
    low, high = levels
    grey = (np.nan_to_num(picture.astype(np.float32), nan=low, posinf=high, neginf=low) - low) * (255 / (high - low))
    return np.clip(np.rint(grey), 0, 255).astype(np.uint8)


def webp(picture: np.ndarray, size: int) -> str:
    """Write a picture as a WebP file in base64.

    Parameters
    ----------
    picture : ndarray of uint8, shape (y, x) or (y, x, 3)
    size : int
        The most pixels along an axis; a larger picture shrinks.
    """
    image = PillowImage.fromarray(np.ascontiguousarray(picture))
    page_size = min(image.width, size), min(image.height, size)
    if page_size != image.size:
        image = image.resize(page_size, PillowImage.Resampling.BOX)
    file = io.BytesIO()
    image.save(file, "WEBP", quality=_QUALITY, method=_METHOD)
    return base64.b64encode(file.getvalue()).decode("ascii")


def thin_out(label: np.ndarray, size: int) -> Thinned:
    """Take every n-th voxel of a label map, so that at most about `size` remain along an axis; also returns n (y, x).

    Parameters
    ----------
    label : ndarray, shape (y, x)
    size : int
    """
    down, across = (max(1, -(-n // size)) for n in label.shape)
    return label[down // 2 :: down, across // 2 :: across], (down, across)


def outline_path(mask: np.ndarray, step: tuple[int, int] = (1, 1)) -> str:
    """Draw the closed outlines of a mask (y, x) along the edges of its voxels, as an SVG path.

    Holes run the other way round, so that both fill rules leave them empty.

    Parameters
    ----------
    mask : ndarray of bool, shape (y, x)
    step : tuple of int
        Size (y, x) of a pixel of the mask in the picture.
    """
    padded = np.zeros((mask.shape[0] + 2, mask.shape[1] + 2), np.int8)
    padded[1:-1, 1:-1] = mask
    across, down = defaultdict(list), defaultdict(list)  # start (y, x) -> ends of the runs that begin there
    # the mask is to the right of the path: its upper edges run to the right, its left edges up
    for y, first, last, sign in _runs(np.diff(padded, axis=0)):
        start, end = (first, last) if sign > 0 else (last, first)
        across[y, start].append((y, end))
    for x, first, last, sign in _runs(np.diff(padded, axis=1).T):
        start, end = (last, first) if sign > 0 else (first, last)
        down[start, x].append((end, x))
    paths = []
    for y, x in list(across):
        while across[y, x]:
            parts, at = [f"M{x * step[1]} {y * step[0]}"], (y, x)
            while True:
                corner = across[at].pop()
                parts.append(f"h{(corner[1] - at[1]) * step[1]}")
                at = down[corner].pop()
                if at == (y, x):  # z draws the last run
                    break
                parts.append(f"v{(at[0] - corner[0]) * step[0]}")
            paths.append("".join([*parts, "z"]))
    return "".join(paths)


def _runs(edges: np.ndarray) -> list[tuple[int, int, int, int]]:
    """Find runs of equal nonzero numbers along the rows: (row, first edge, last edge, number), with 0 at both ends."""
    rows, bounds = np.nonzero(np.diff(edges, axis=1))
    same_row = rows[1:] == rows[:-1]  # two bounds of a row enclose a run, which may be one of zeros
    rows, first, last = rows[:-1][same_row], bounds[:-1][same_row], bounds[1:][same_row]
    numbers = edges[rows, first + 1]
    runs = (array[numbers != 0].tolist() for array in (rows, first, last, numbers))
    return list(zip(*runs, strict=True))
