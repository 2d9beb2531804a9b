"""Planes of an image as a radiologist looks at them: turned to the patient's axes, in grey levels, as WebP.

Axial pictures have the patient's right on the left and the front at the top; coronal ones the right on the left,
sagittal ones the front on the left, both the head at the top. Pictures (PNG, TIFF, ...) are shown as they are stored.
"""

from __future__ import annotations

import base64
import io
from dataclasses import dataclass

import numpy as np

from nnunet_lite.data.geometry import Geometry, Turn, turn_between

Box = tuple[slice, slice, slice]
_SAMPLES = 200_000  # voxels from which grey levels are taken
_METHOD = 4  # of WebP: 0 fast, 6 small


@dataclass(frozen=True)
class Plane:
    """One of the planes: rows and columns are axes (0, 1, 2) of the turned array, rows drawn backwards or not."""

    name: str
    normal: int
    rows: int
    columns: int
    upwards: bool  # whether the first row is at the bottom
    sides: str  # letters at the left, right, top and bottom


_PATIENT = (
    Plane("axial", 0, 1, 2, False, "RLAP"),
    Plane("coronal", 1, 0, 2, True, "RLSI"),
    Plane("sagittal", 2, 0, 1, True, "APSI"),
)
_STORED = (
    Plane("xy", 0, 1, 2, False, ""),
    Plane("xz", 1, 0, 2, False, ""),
    Plane("yz", 2, 0, 1, False, ""),
)


@dataclass(frozen=True)
class View:
    """How an image is shown: its axes (z, y, x) turned to the patient's head, back and left.

    Parameters
    ----------
    turn : of the image's array.
    spacing : mm along the turned axes.
    planes : those that are drawn.
    """

    turn: Turn
    spacing: tuple[float, float, float]
    planes: tuple[Plane, ...]

    @classmethod
    def of(cls, geometry: Geometry) -> View:
        """The view of an image; one without a known orientation is shown as it is stored."""
        if geometry.orientation is None or geometry.shape[0] == 1:
            planes = _STORED[:1] if geometry.shape[0] == 1 else _STORED
            return cls(Turn(), geometry.spacing, planes)
        turn = turn_between(geometry.orientation, "LPS")
        return cls(turn, geometry.turned(turn).spacing, _PATIENT)


def cut(array: np.ndarray, plane: Plane, index: int, box: Box) -> np.ndarray:
    """A slice (rows, columns) of a turned array (..., 3 axes), the rows as they are drawn."""
    where: list[slice | int] = list(box)
    where[plane.normal] = index
    picture = array[(..., *where)]
    return picture[..., ::-1, :] if plane.upwards else picture


def box_around(mask: np.ndarray, margin: float = 0.3, least: int = 96) -> Box:
    """Where a mask lies, with a margin on each side (of its extent), at least so many voxels; all where it is empty."""
    box = []
    for axis, n in enumerate(mask.shape):
        inside = np.flatnonzero(mask.any(axis=tuple(other for other in range(mask.ndim) if other != axis)))
        if not inside.size:
            return tuple(slice(0, size) for size in mask.shape)  # type: ignore[return-value]
        low, high = int(inside[0]), int(inside[-1]) + 1
        size = max(high - low + 2 * int(np.ceil(margin * (high - low))), least)
        low = max(0, min((low + high - size) // 2, n - size))
        box.append(slice(low, min(n, low + size)))
    return tuple(box)  # type: ignore[return-value]


def grey_levels(channel: np.ndarray) -> tuple[float, float]:
    """What is shown as black and as white: the 1st and 99.5th percentile of what is not the darkest value."""
    flat = channel.reshape(-1)[:: max(1, channel.size // _SAMPLES)]
    flat = flat[np.isfinite(flat)]
    inside = flat[flat > flat.min()] if flat.size else flat
    if not inside.size:
        return 0.0, 1.0
    low, high = (float(v) for v in np.percentile(inside, (1, 99.5)))
    return (low, high) if high > low else (low, low + 1)


def to_bytes(picture: np.ndarray, levels: tuple[float, float]) -> np.ndarray:
    """Grey levels 0 to 255; what is not finite is black."""
    low, high = levels
    shown = (np.nan_to_num(picture.astype(np.float32), nan=low, posinf=high, neginf=low) - low) * (255 / (high - low))
    return np.clip(np.rint(shown), 0, 255).astype(np.uint8)


def webp(picture: np.ndarray, longest: int, quality: int) -> str:
    """Bytes (y, x) or (y, x, 3) as base64 of a WebP file, each axis shrunk to at most `longest` pixels."""
    from PIL import Image

    image = Image.fromarray(picture)
    size = min(image.width, longest), min(image.height, longest)
    if size != image.size:
        image = image.resize(size, Image.Resampling.BOX)
    file = io.BytesIO()
    image.save(file, "WEBP", quality=quality, method=_METHOD)
    return base64.b64encode(file.getvalue()).decode("ascii")


def thinned(mask: np.ndarray, longest: int) -> tuple[np.ndarray, tuple[int, int]]:
    """A label map (y, x) with at most about `longest` voxels kept along an axis, and how many one stands for."""
    down, across = (max(1, -(-n // longest)) for n in mask.shape)
    return mask[down // 2 :: down, across // 2 :: across], (down, across)
