"""Where the voxels of an image are in space, whether two images share a grid, and how axes are turned without loss.

An orientation is three letters, as in nibabel: "LAS" says that the axes x, y, z of an array (z, y, x) point to the
patient's left, anterior and superior side.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache

import numpy as np

TOLERANCE = 0.005  # of a voxel: how far the origin may be off, and how far a direction may move the last voxel
SPACING_TOLERANCE = 0.001  # of the voxel size
_ROUNDING = 1e-6  # of a coordinate, as float32 rounds it
_COSINE_ROUNDING = 1e-4  # what the quaternion of a NIfTI header loses
IDENTITY = (1.0, 0.0, 0.0, 0.0, 1.0, 0.0, 0.0, 0.0, 1.0)
PICTURE_SPACING = (999.0, 1.0, 1.0)  # (z, y, x) where the file does not state one, as in nnU-Net
ACCEPTABLE = ("origin", "direction")  # differences that a user may accept, where the voxels do match


@dataclass(frozen=True)
class Geometry:
    """Where the voxels of an image are.

    Parameters
    ----------
    shape : tuple of int
        Voxels (z, y, x); a picture has z = 1.
    spacing : tuple of float
        mm (z, y, x). As in nnU-Net a 2D image's z spacing is 999 times its largest other, a picture's is 999.
    origin : tuple of float
        Place of the first voxel, LPS mm (x, y, z), as in ITK.
    direction : tuple of float
        Nine direction cosines, row by row, LPS, as in ITK.
    dimensions : int
        2 for a picture or a two-dimensional NIfTI, whose arrays carry a leading axis of length 1; else 3.
    calibrated : bool
        Whether the file states the spacing. If not, the spacing is one per pixel, and says nothing in a comparison.
    oriented : bool
        Whether the direction is known. It is not for arrays from Python, stacks of pictures, and files that state
        none. Then origin and direction say nothing in a comparison.
    """

    shape: tuple[int, int, int]
    spacing: tuple[float, float, float]
    origin: tuple[float, float, float] = (0.0, 0.0, 0.0)
    direction: tuple[float, ...] = IDENTITY
    dimensions: int = 3
    calibrated: bool = field(default=True, compare=False)
    oriented: bool = True

    @property
    def orientation(self) -> str | None:
        """Where the axes x, y, z point, such as "LAS"; of oblique axes the nearest; None where that is not known."""
        return _orientation(self.direction) if self.oriented and self.dimensions == 3 else None

    def turned(self, turn: Turn) -> Geometry:
        """The geometry of the same voxels after a turn of their array."""
        cosines = np.reshape(self.direction, (3, 3))[:, ::-1]  # columns z, y, x
        origin = np.array(self.origin, np.float64)
        columns = []
        for axis, is_reversed in zip(turn.order, turn.reversed, strict=True):
            column = cosines[:, axis]
            if is_reversed:
                origin += column * self.spacing[axis] * (self.shape[axis] - 1)
                column = -column
            columns.append(column)
        direction = tuple(np.stack(columns[::-1], axis=1).ravel().tolist())
        z, y, x = (self.shape[axis] for axis in turn.order)
        sz, sy, sx = (self.spacing[axis] for axis in turn.order)
        return replace(self, shape=(z, y, x), spacing=(sz, sy, sx), origin=tuple(origin.tolist()), direction=direction)

    def differences(self, other: Geometry) -> list[tuple[str, str, str]]:
        """List what differs beyond tolerance, as (what, of self, of other).

        The spacing may differ by 0.1 % of the voxel size, the origin by 0.5 % of it, and the direction by what moves
        the last voxel by 0.5 % of it. Of a two-dimensional image only the plane counts, and only the plane of an image
        (1, y, x) that it is compared with. Of an image whose file does not state a spacing only the shape counts.
        """
        flat = 2 in (self.dimensions, other.dimensions) and self.shape[0] == other.shape[0] == 1
        mine, others = self._described(flat), other._described(flat)
        if self.shape != other.shape:
            return [("shape", mine["shape"], others["shape"])]
        if not (self.calibrated and other.calibrated):
            return []
        sizes = list(zip(self.spacing, other.spacing, strict=True))[1 if flat else 0 :]
        voxel = min(min(pair) for pair in sizes)
        origins = list(zip(self.origin, other.origin, strict=True))[: 2 if flat else 3]
        cosines = list(zip(self.direction, other.direction, strict=True))
        cosines = [cosines[i] for i in (0, 1, 3, 4)] if flat else cosines
        turn = max(_COSINE_ROUNDING, TOLERANCE / max(self.shape))
        placed = self.oriented and other.oriented
        differs = {
            "spacing": any(abs(a - b) > SPACING_TOLERANCE * min(a, b) for a, b in sizes),
            "origin": placed and any(abs(a - b) > TOLERANCE * voxel + _ROUNDING * abs(a) for a, b in origins),
            "direction": placed and any(abs(a - b) > turn for a, b in cosines),
        }
        return [(what, mine[what], others[what]) for what, found in differs.items() if found]

    def describe(self) -> str:
        """Shape, spacing, origin and direction in one line, (z, y, x) and (x, y, z); of a 2D image only its plane."""
        return ", ".join(f"{what} {values}" for what, values in self._described(self.dimensions == 2).items())

    def _described(self, flat: bool) -> dict[str, str]:
        """The numbers as text; of a flat image those of its plane, since its z spacing is invented."""
        d = self.direction
        return {
            "shape": _numbers(self.shape[1:] if flat else self.shape),
            "spacing": _numbers(self.spacing[1:] if flat else self.spacing),
            "origin": _numbers(self.origin[:2] if flat else self.origin),
            "direction": _numbers((d[0], d[1], d[3], d[4]) if flat else d),
        }


def _numbers(values: tuple[float, ...]) -> str:
    return "(" + ", ".join(f"{v + 0.0:.6g}" for v in values) + ")"


@dataclass(frozen=True)
class Turn:
    """A change of the axes of an array that moves voxels and computes none: a transposition, then reversals.

    Parameters
    ----------
    order : the transposition applied to (z, y, x).
    reversed : which of the new axes run backwards.
    """

    order: tuple[int, int, int] = (0, 1, 2)
    reversed: tuple[bool, bool, bool] = (False, False, False)

    def apply(self, array: np.ndarray) -> np.ndarray:
        """The view of an array (..., z, y, x) with its last three axes turned."""
        before = array.ndim - 3
        moved = array.transpose(*range(before), *(before + axis for axis in self.order))
        steps = (slice(None, None, -1 if is_reversed else None) for is_reversed in self.reversed)
        return moved[..., *steps]

    def then(self, order: Sequence[int]) -> Turn:
        """This turn followed by a transposition."""
        a, b, c = (self.order[axis] for axis in order)
        u, v, w = (self.reversed[axis] for axis in order)
        return Turn((a, b, c), (u, v, w))


def turn_between(source: str | None, target: str | None) -> Turn:
    """The turn of an array (z, y, x) from one orientation to another; none where one of the two is not known."""
    if source is None or target is None:
        return Turn()
    own, wanted = source[::-1], target[::-1]  # from (x, y, z) to (z, y, x)
    sides = [_SIDES[letter] for letter in own]
    order = [sides.index(_SIDES[letter]) for letter in wanted]
    a, b, c = order
    u, v, w = (own[axis] != letter for axis, letter in zip(order, wanted, strict=True))
    return Turn((a, b, c), (u, v, w))


def common_orientation(orientations: Iterable[str | None]) -> str | None:
    """The orientation that most cases have, the first of equally frequent ones; None where none is known."""
    known = Counter(orientation for orientation in orientations if orientation is not None)
    return known.most_common(1)[0][0] if known else None


_SIDES = {"L": "LR", "R": "LR", "A": "AP", "P": "AP", "S": "SI", "I": "SI"}


@lru_cache(maxsize=1024)
def _orientation(direction: tuple[float, ...]) -> str:
    from nibabel.orientations import aff2axcodes  # a tenth of a second

    affine = np.eye(4)
    affine[:3, :3] = np.diag([-1.0, -1.0, 1.0]) @ np.reshape(direction, (3, 3))  # nibabel counts in RAS, ITK in LPS
    return "".join(aff2axcodes(affine))
