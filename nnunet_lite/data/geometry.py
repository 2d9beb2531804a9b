"""Where the voxels of an image are in space: grids and how they differ, turns of axes without loss, boxes in an array.

An orientation is three letters, as in nibabel: "LAS" means that the axes x, y, z of an array (z, y, x) point to the
left, anterior and superior side of the patient.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import TypeVar

import cc3d
import numpy as np

T = TypeVar("T")
Shape = tuple[int, int, int]  # voxels along (z, y, x)
Spacing = tuple[float, float, float]  # mm along (z, y, x)
Box = tuple[tuple[int, int], tuple[int, int], tuple[int, int]]

TOLERANCE = 0.005  # of a voxel: largest offset of the origin, and largest shift of the last voxel by the direction
SPACING_TOLERANCE = 0.001  # of the voxel size
_SHEAR = 1.0  # degrees from a right angle that are not reported
_ROUNDING = 1e-6  # of a coordinate, as float32 rounds it
_COSINE_ROUNDING = 1e-4  # error of the quaternion in a NIfTI header
IDENTITY = (1.0, 0.0, 0.0, 0.0, 1.0, 0.0, 0.0, 0.0, 1.0)
PICTURE_SPACING = (999.0, 1.0, 1.0)  # (z, y, x) if the file states none, as in nnU-Net
ACCEPTABLE = ("origin", "direction")  # differences that --accept-geometry accepts
_SIDES = {"L": "LR", "R": "LR", "A": "AP", "P": "AP", "S": "SI", "I": "SI"}


@dataclass(frozen=True)
class Geometry:
    """The grid of an image.

    Parameters
    ----------
    shape : tuple of int
        Voxels (z, y, x). A picture has z = 1.
    spacing : tuple of float
        Voxel size (z, y, x) in mm. As in nnU-Net, z is 999 for a picture and 999 times the larger of y and x for
        another two-dimensional image.
    origin : tuple of float
        Position of the first voxel, LPS (x, y, z) in mm, as in ITK.
    direction : tuple of float
        Nine direction cosines, row by row, LPS, as in ITK.
    dimensions : int
        2 for a picture or a two-dimensional NIfTI, whose array has a leading axis of length 1; otherwise 3.
    calibrated : bool
        Whether the file states the spacing. If not, comparisons ignore it.
    oriented : bool
        Whether the direction is known. If not, comparisons ignore origin and direction. It is unknown for arrays from
        Python, stacks of pictures, and files that state none.
    """

    shape: Shape
    spacing: Spacing
    origin: tuple[float, float, float] = (0.0, 0.0, 0.0)
    direction: tuple[float, ...] = IDENTITY
    dimensions: int = 3
    calibrated: bool = field(default=True, compare=False)
    oriented: bool = True

    @property
    def orientation(self) -> str | None:
        """Where the axes x, y, z point, such as "LAS". Oblique axes get the nearest letter; None if not known."""
        return _orientation(self.direction) if self.oriented and self.dimensions == 3 else None

    @property
    def shear(self) -> float:
        """The largest deviation (degrees) of two axes from a right angle, as with a tilted gantry."""
        axes = np.reshape(self.direction, (3, 3))
        cosines = np.abs(axes.T @ axes - np.eye(3)).max() if self.oriented else 0.0
        return float(np.degrees(np.arcsin(min(cosines, 1.0))))

    def shear_in_words(self) -> str:
        """Return what is wrong with axes that are sheared by more than a rounding error; empty if nothing is."""
        if self.shear <= _SHEAR:
            return ""
        return f"two axes are {self.shear:.1f} degrees from a right angle; volumes and distances assume right angles"

    def turned(self, turn: Turn) -> Geometry:
        """Return the geometry of the same voxels after a turn of their array.

        Parameters
        ----------
        turn : Turn
            The turn that is applied to the array.

        Returns
        -------
        Geometry
            Shape, spacing, origin and direction after the turn.
        """
        shape = triple(self.shape[axis] for axis in turn.order)
        spacing = triple(self.spacing[axis] for axis in turn.order)
        cosines = np.reshape(self.direction, (3, 3))[:, ::-1][:, turn.order]  # columns z, y, x
        origin = np.array(self.origin, np.float64)
        for axis in np.flatnonzero(turn.reversed):
            origin += cosines[:, axis] * spacing[axis] * (shape[axis] - 1)
            cosines[:, axis] *= -1
        direction = tuple(cosines[:, ::-1].ravel().tolist())
        return replace(self, shape=shape, spacing=spacing, origin=triple(origin.tolist()), direction=direction)

    def differences(self, other: Geometry) -> list[tuple[str, str, str]]:
        """List what differs by more than the tolerance.

        The tolerance of the spacing is 0.1 % of the voxel size, that of the origin 0.5 % of it. The direction may move
        the last voxel by 0.5 % of it. If one of the two is two-dimensional, only the plane is compared. If one of them
        states no spacing, only the shape is compared.

        Parameters
        ----------
        other : Geometry
            The geometry to compare with.

        Returns
        -------
        list of tuple of str
            (property, value of self, value of other) for each difference.
        """
        flat = 2 in (self.dimensions, other.dimensions) and self.shape[0] == other.shape[0] == 1
        mine, others = self._numbers(flat), other._numbers(flat)
        pairs = {what: list(zip(mine[what], others[what], strict=True)) for what in mine}
        voxel = min(map(min, pairs["spacing"]))
        largest_turn = max(_COSINE_ROUNDING, TOLERANCE / max(self.shape))
        calibrated = self.calibrated and other.calibrated and self.shape == other.shape
        oriented = self.oriented and other.oriented and calibrated
        differs = {
            "shape": self.shape != other.shape,
            "spacing": calibrated and any(abs(a - b) > SPACING_TOLERANCE * min(a, b) for a, b in pairs["spacing"]),
            "origin": oriented and any(abs(a - b) > TOLERANCE * voxel + _ROUNDING * abs(a) for a, b in pairs["origin"]),
            "direction": oriented and any(abs(a - b) > largest_turn for a, b in pairs["direction"]),
        }
        return [(what, in_brackets(mine[what]), in_brackets(others[what])) for what, is_so in differs.items() if is_so]

    def describe(self) -> str:
        """Return shape, spacing (z, y, x), origin and direction (x, y, z) in one line; of a 2D image only the plane."""
        return ", ".join(f"{what} {in_brackets(n)}" for what, n in self._numbers(self.dimensions == 2).items())

    def _numbers(self, flat: bool) -> dict[str, tuple[float, ...]]:
        """Return the numbers of the grid; of a flat image those of its plane, since its z spacing is invented."""
        if not flat:
            return {what: getattr(self, what) for what in ("shape", "spacing", "origin", "direction")}
        d = self.direction
        plane = (d[0], d[1], d[3], d[4])
        return {"shape": self.shape[1:], "spacing": self.spacing[1:], "origin": self.origin[:2], "direction": plane}


def triple(values: Iterable[T]) -> tuple[T, T, T]:
    """Return three values, one for each axis, as a tuple.

    Parameters
    ----------
    values : iterable
        Exactly three.

    Returns
    -------
    tuple
        The values.
    """
    a, b, c = values
    return a, b, c


def in_brackets(values: Iterable[float]) -> str:
    """Write numbers for a message: (1, 0.5, 0.5).

    Parameters
    ----------
    values : iterable of float
        Any numbers; six digits are shown.

    Returns
    -------
    str
        The numbers in round brackets.
    """
    return "(" + ", ".join(f"{value + 0.0:.6g}" for value in values) + ")"  # + 0.0: no negative zero


@dataclass(frozen=True)
class Turn:
    """A change of the axes of an array that moves voxels and computes none: a transposition, then reversals.

    Parameters
    ----------
    order : tuple of int
        The transposition of (z, y, x).
    reversed : tuple of bool
        Which of the new axes are reversed.
    """

    order: tuple[int, int, int] = (0, 1, 2)
    reversed: tuple[bool, bool, bool] = (False, False, False)

    def apply(self, array: np.ndarray) -> np.ndarray:
        """Turn the last three axes of an array.

        Parameters
        ----------
        array : ndarray, shape (..., z, y, x)
            Any array.

        Returns
        -------
        ndarray
            A view of the array.
        """
        moved = np.moveaxis(array, [axis - 3 for axis in self.order], [-3, -2, -1])
        return np.flip(moved, tuple(np.flatnonzero(self.reversed) - 3))

    def apply_to_voxel(self, voxel: Sequence[int], shape: Sequence[int]) -> tuple[int, int, int]:
        """Return where a voxel is in the turned array.

        Parameters
        ----------
        voxel, shape : sequence of int
            The voxel (z, y, x) and the shape of the array before the turn.
        """
        ends = zip(self.order, self.reversed, strict=True)
        return triple(shape[axis] - 1 - voxel[axis] if is_reversed else voxel[axis] for axis, is_reversed in ends)

    def then(self, order: Sequence[int]) -> Turn:
        """Return this turn followed by a transposition.

        Parameters
        ----------
        order : sequence of int
            The transposition of the turned axes.

        Returns
        -------
        Turn
            Both in one.
        """
        return Turn(triple(self.order[axis] for axis in order), triple(self.reversed[axis] for axis in order))


def turn_between(source: str | None, target: str | None) -> Turn:
    """Return the turn of an array (z, y, x) from one orientation to another.

    Parameters
    ----------
    source, target : str or None
        Orientations such as "LPS". If one of them is not known, nothing is turned.

    Returns
    -------
    Turn
        The turn to apply.
    """
    if source is None or target is None:
        return Turn()
    before, after = source[::-1], target[::-1]  # from (x, y, z) to (z, y, x)
    sides = [_SIDES[letter] for letter in before]
    order = [sides.index(_SIDES[letter]) for letter in after]
    return Turn(triple(order), triple(before[axis] != letter for axis, letter in zip(order, after, strict=True)))


def common_orientation(orientations: Iterable[str | None]) -> str | None:
    """Return the orientation of most cases, the first of equally frequent ones.

    Parameters
    ----------
    orientations : iterable of str or None
        One for each case; None where it is not known.

    Returns
    -------
    str or None
        None if no orientation is known.
    """
    known = Counter(orientation for orientation in orientations if orientation is not None)
    return known.most_common(1)[0][0] if known else None


@lru_cache(maxsize=1024)
def _orientation(direction: tuple[float, ...]) -> str:
    """Name the axes as nibabel's `aff2axcodes` does, which takes a fifth of a second to import."""
    cosines = np.reshape(direction, (3, 3)) * [[-1], [-1], [1]]  # the axes of ITK, LPS, as RAS
    left, _, right = np.linalg.svd(cosines / np.linalg.norm(cosines, axis=0))
    rotation, letters = left @ right, [""] * 3  # the nearest one without shear
    for axis in np.argsort(-(rotation**2).max(axis=0), kind="stable"):
        row = int(np.abs(rotation[:, axis]).argmax())
        letters[axis] = ("LR", "PA", "IS")[row][int(rotation[row, axis] > 0)]
        rotation[row] = 0  # each side names one axis
    return "".join(letters)


@dataclass(frozen=True)
class Image:
    """An array with its geometry.

    Parameters
    ----------
    array : ndarray, shape (channels, z, y, x)
        In the type of the file.
    geometry : Geometry
        Its grid.
    notes : tuple of str
        How the file was understood, such as "3 channels in one file".
    has_alpha : bool
        Whether the last channel may be transparency.
    orientation_tag : int
        Of a picture; 1 if the first pixel is shown at the top left. TIFF files are turned by it, others are not.
    """

    array: np.ndarray
    geometry: Geometry
    notes: tuple[str, ...] = ()
    has_alpha: bool = False
    orientation_tag: int = 1

    @property
    def is_colour(self) -> bool:
        """Whether the three channels are the red, green and blue of a picture."""
        return self.array.shape[0] == 3 and self.array.dtype == np.uint8 and self.geometry.dimensions == 2

    def aligned(self, other: Geometry) -> Image:
        """Turn the axes to those of another image.

        An image that already has the other grid is not turned. If neither the stored nor the turned array has the
        other grid and the shapes are equal, the array stays as stored: these are the voxels that a user accepts with
        --accept-geometry.

        Parameters
        ----------
        other : Geometry
            The grid of the other image.

        Returns
        -------
        Image
            Itself, or a turned view with a note.
        """
        source, target = self.geometry.orientation, other.orientation
        turn = turn_between(source, target)
        turned = self.geometry.turned(turn)
        if turn == Turn() or not self.geometry.differences(other):
            return self
        if turned.differences(other) and self.geometry.shape == other.shape:
            return self
        notes = (*self.notes, f"turned from {source} to {target}")
        return replace(self, array=turn.apply(self.array), geometry=turned, notes=notes)


# ---------------------------------------------------------------------------------------------------------------- boxes


def bounding_box(mask: np.ndarray) -> Box:
    """Return the smallest box that contains all voxels of a mask.

    Parameters
    ----------
    mask : ndarray, shape (z, y, x)
        What is not 0 is inside. An empty mask gives the box of the whole array.

    Returns
    -------
    Box
        Half-open ranges ((z0, z1), (y0, y1), (x0, x1)).
    """
    plane = np.any(mask, axis=2)
    lines = (np.any(plane, axis=1), np.any(plane, axis=0), np.any(mask, axis=(0, 1)))
    box = []
    for line, size in zip(lines, mask.shape, strict=True):
        inside = np.flatnonzero(line)
        box.append((int(inside[0]), int(inside[-1]) + 1) if inside.size else (0, size))
    return triple(box)


def slices(box: Box) -> tuple[slice, slice, slice]:
    """Return a box as an index of an array.

    Parameters
    ----------
    box : Box
        Half-open ranges (z, y, x).

    Returns
    -------
    tuple of slice
        The same ranges.
    """
    return slice(*box[0]), slice(*box[1]), slice(*box[2])


def nonzero_box(channels: Sequence[np.ndarray] | np.ndarray) -> Box:
    """Return the box of the voxels that are not zero in every channel.

    Parameters
    ----------
    channels : sequence of ndarray, shape (z, y, x)
        Intensities of one case.

    Returns
    -------
    Box
        Half-open ranges (z, y, x).
    """
    return bounding_box(_any_nonzero(channels))


def nonzero_mask(array: np.ndarray) -> np.ndarray:
    """Return which voxels are not zero in every channel, with holes filled.

    A hole is background that no path of faces connects to the outside (6-neighbourhood), as in nnU-Net. Labelling the
    components of the background is several times faster than scipy's binary_fill_holes and gives the same result. Only
    the bounding box is searched, since every hole is inside it.

    Parameters
    ----------
    array : ndarray, shape (channels, z, y, x)
        Intensities of one case.

    Returns
    -------
    ndarray of bool, shape (z, y, x)
        The mask.
    """
    mask = _any_nonzero(array)
    inside = slices(bounding_box(mask))
    part = mask[inside]
    if not part.all():
        components = cc3d.connected_components(np.pad(~part, 1, constant_values=True), connectivity=6)
        mask[inside] = (components != components[0, 0, 0])[1:-1, 1:-1, 1:-1]
    return mask


def _any_nonzero(channels: Sequence[np.ndarray] | np.ndarray) -> np.ndarray:
    mask = channels[0] != 0
    for channel in channels[1:]:
        if mask.all():
            break
        np.logical_or(mask, channel != 0, out=mask)
    return mask
